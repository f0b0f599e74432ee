"""The coloured points and boxes that SPAR's questions speak of: where they are, and how they look.

Coordinates are in 1/1000 of the image. Marks are drawn when an image is opened, as the set's own
tool draws them: a disc of radius 20 pixels, a stroke of 20 that lies outside the box but for 2.5.
Which view a colour is marked in depends on the task, not on the order of the row's keys (the
official SR-REAL code takes that order, and so marks wrong views).
"""

import re
from dataclasses import dataclass

from PIL import Image, ImageDraw

from data.marks import Marked
from data.rows import Bad

COLOURS = {"red": (255, 0, 0), "blue": (0, 0, 255), "green": (0, 255, 0), "yellow": (255, 255, 0)}
PHRASE = re.compile(rf"\b({'|'.join(COLOURS)}) (bbox|point)\b")
FIRST = re.compile(r"\bfirst (?:image|frame|view|picture|photo)\b", re.I)

# Task -> its colours in the order of bbox_img_idx or point_img_idx, as the set's tool has it.
# A colour that the row lacks takes no place.
ORDERS = {
    "depth_prediction_oc_mv": ["red", "blue"],
    "depth_prediction_oo_mv": ["red", "blue", "green"],
    "distance_prediction_oc_mv": ["red"],
    "distance_prediction_oo_mv": ["red", "blue"],
    "distance_infer_center_oo_mv": ["red", "green", "blue"],
    "spatial_imagination_oc_mv": ["green", "blue", "red"],
    "spatial_imagination_oo_mv": ["green", "blue", "red", "yellow"],
    "obj_spatial_relation_oo_mv": ["red", "blue", "green"],
}
# All boxes of this task are in the first view that the row lists.
ONE_VIEW = "obj_spatial_relation_oc_mv"
UNMARKED = ("view_change_infer", "camera_motion_infer", "distance_infer_center_oc_mv")

COORDINATES = list[list[float] | None]
MARKS = {f"{colour}_bbox": COORDINATES for colour in COLOURS}
MARKS |= {f"{colour}_point": COORDINATES for colour in COLOURS}
VIEWS = {"bbox_img_idx": list[list[int]], "point_img_idx": list[list[int]]}


@dataclass(frozen=True)
class Mark:
    """A coloured point or box in one view of a question."""

    colour: str
    kind: str  # "bbox" | "point"
    view: int
    at: tuple[float, ...]  # (x, y) or (x0, y0, x1, y1) in 1/1000 of the image

    @property
    def mention(self) -> str:
        return f"{self.colour} {self.kind}"

    def box(self) -> tuple[float, ...]:
        """Return the mark's region in 1/1000; a point's is a square of 50, as in the paper."""
        if self.kind == "bbox":
            return self.at
        x, y = self.at
        # The paper's code moves the square in at the edges, to 999 and not to 1000.
        x1 = x + 25 if x + 25 <= 1000 else 999
        y1 = y + 25 if y + 25 <= 1000 else 999
        return max(x - 25, 0), max(y - 25, 0), x1, y1

    def pixels(self, image: tuple[int, int]) -> tuple[int, ...]:
        """Return the mark's region in pixels of an image of (width, height)."""
        return tuple(int(v * side / 1000) for v, side in zip(self.box(), image * 2, strict=True))


# ---- What a row marks


def marks_of(row: dict, views: dict | None = None) -> list[Mark]:
    """Return every mark of a row, in the order of its keys, with the view that it belongs to.

    views: {"red_bbox": image index} where the row says the view by itself.
    """
    given = {name: row[name][0] for name in row if name in MARKS and row[name] and row[name][0]}
    marks = []
    for name, at in given.items():
        colour, kind = name.split("_")
        check_coordinates(name, kind, at)
        view = 0
        if row.get("type") not in UNMARKED:
            same_kind = [other.split("_")[0] for other in given if other.endswith(kind)]
            view = view_of(row, name, same_kind, (views or {}).get(name))
        # A negative index would silently count from the end.
        if not 0 <= view < len(row["image"]):
            raise Bad(f"{kind}_img_idx", f"no such view: {view} of {len(row['image'])}, for {name}")
        marks.append(Mark(colour, kind, view, tuple(at)))
    # Their coordinates were checked all the same: a row in pixels is bad whatever it asks.
    return [] if row.get("type") in UNMARKED else marks


def check_coordinates(name: str, kind: str, at: list[float]) -> None:
    if kind == "point" and len(at) != 2:
        raise Bad(name, f"wrong type or value: {at} has to be x, y")
    if kind == "bbox" and not (len(at) == 4 and at[0] < at[2] and at[1] < at[3]):
        raise Bad(name, f"wrong type or value: {at} has to be x0 < x1, y0 < y1")
    # Written so that nan is outside, too.
    if not all(0 <= v <= 1000 for v in at):
        raise Bad(name, f"outside 0..1000, so in pixels?: {at}")


def view_of(row: dict, name: str, colours: list[str], stated: int | None) -> int:
    """Return the index of the image that a colour is marked in.

    colours: the row's, of the same kind. stated: the view that the row gives elsewhere, which
    counts where the task is none of ORDERS. The order of the row's keys says nothing.
    """
    colour, kind = name.split("_")
    task = row.get("type")
    count = len(row["image"])
    listed = row.get(f"{kind}_img_idx") or [[]]
    index = listed[0]
    if count == 1 or task == "position_matching":
        return 0
    # All marks in one view: then no order is needed.
    if index and (task == ONE_VIEW or len(set(index)) == 1):
        return index[0]
    order = [one for one in ORDERS.get(task, ()) if one in colours]
    if colour in order and order.index(colour) < len(index):
        return index[order.index(colour)]
    if stated is None:
        reason = f"in which of {count} images is {name}? {index} of {task} doesn't say"
        raise Bad(f"{kind}_img_idx", reason)
    return stated


# ---- Images with their marks


def draw_marks(
    image: Image.Image, marks: tuple, stroke: int = 20, outside: float = 7 / 8, radius: int = 20
) -> Image.Image:
    """Draw (colour, kind, coordinates in 1/1000) into an RGB image; the last lies on top.

    stroke, radius: pixels. outside: the share of a box's stroke that lies outside of the box.
    """
    pen = ImageDraw.Draw(image)
    for colour, kind, at in marks:
        at = [v * side / 1000 for v, side in zip(at, image.size * 2, strict=False)]
        if kind == "point":
            x, y = at
            pen.ellipse([x - radius, y - radius, x + radius, y + radius], fill=COLOURS[colour])
        else:
            # Pillow's stroke goes inwards from the edges that it is given.
            grow = stroke * outside
            edges = at[0] - grow, at[1] - grow, at[2] + grow, at[3] + grow
            pen.rectangle(edges, outline=COLOURS[colour], width=stroke)
    return image


def marked(files: list, marks: list[Mark], **style) -> list:
    """Return the images: a path where nothing is marked, else one that draws when it is opened."""
    images = []
    for view, file in enumerate(files):
        drawn = tuple((mark.colour, mark.kind, mark.at) for mark in marks if mark.view == view)
        options = (("marks", drawn), *style.items())
        source = file.source if isinstance(file, Marked) else file
        images.append(Marked(source, draw_marks, options) if drawn else file)
    return images


# ---- Questions with their regions


def insert_masks(question: str, marks: list[Mark], several: bool) -> tuple[str, list[Mark]]:
    """Return the question with a <mask> behind its mentions, and the mark of each <mask>.

    With one image every mention gets one; with several only the first of each, as in the paper, and
    a lone mark that no colour names is the first `bbox`.
    """
    # Two marks never share colour and kind: a row has one key for each.
    by_mention = {mark.mention: mark for mark in marks}
    asked = []

    def put(match: re.Match) -> str:
        mark = by_mention.get(match[0])
        if mark is None or (several and mark in asked):
            return match[0]
        asked.append(mark)
        return f"{match[0]} <mask>"

    text = PHRASE.sub(put, question)
    if several and len(marks) == 1 and "bbox" in question and not PHRASE.search(question):
        return question.replace("bbox", "bbox <mask>", 1), marks
    return text, asked
