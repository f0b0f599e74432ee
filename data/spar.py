"""SPAR-7M and SPAR-7M-RGBD as distributed: a folder with
    spar/<source>/qa_jsonl/<split>/<task>/<format>/*.jsonl
    spar/<source>/images/<scene>/{image,video}_color/N.jpg
any part of it, one .jsonl, or an index of the set's own generate_data_json.py (without its
repeat_time: mixtures have weights). Of folders the formats fill and select of all tasks but the
video's are read, and of one above `train` no `val`; a file or an index is read as it is.

Points and boxes are in 1/1000 of the image, and drawn when it is opened, as the set's own tool
does: a disc of radius 20 pixels, a stroke of 20 that lies outside the box but for 2.5. Which view a
colour is marked in depends on the task, not on the order of the row's keys (the official SR-REAL
code takes that, and marks wrong views). The RGBD release adds image_depth/N.png (millimetres),
pose/N.txt (camera to world) and intrinsic/intrinsic_color.txt a scene.

Every row is a question on path lor. Where embodiedscan_infos_*.pkl lies beside `spar`, rows of
ScanNet whose marks are found there (data/embodiedscan.py) get their centres, and are asked on path
dtr, too; what was found is counted and printed.

Departures: boxes are in pixels of their own image, where the official code takes the first one's
size for all."""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

from PIL import Image, ImageDraw

from data.embodiedscan import SCANNET, Scenes
from data.marks import Marked
from data.rows import (
    Bad,
    Notes,
    Row,
    depth_map,
    each,
    files_of,
    maps_of,
    matrix,
    pinhole,
    size,
    turns,
    typed,
)
from srreal import Example

COLOURS = {"red": (255, 0, 0), "blue": (0, 0, 255), "green": (0, 255, 0), "yellow": (255, 255, 0)}
PHRASE = re.compile(rf"\b({'|'.join(COLOURS)}) (bbox|point)\b")
FIRST = re.compile(r"\bfirst (?:image|frame|view|picture|photo)\b", re.I)
# Task -> the colours in the order of bbox_img_idx or point_img_idx. One that the row lacks takes no
# place.
ORDERS = {
    task: colours.split()
    for task, colours in {
        "depth_prediction_oc_mv": "red blue",
        "depth_prediction_oo_mv": "red blue green",
        "distance_prediction_oc_mv": "red",
        "distance_prediction_oo_mv": "red blue",
        "distance_infer_center_oo_mv": "red green blue",
        "spatial_imagination_oc_mv": "green blue red",
        "spatial_imagination_oo_mv": "green blue red yellow",
        "obj_spatial_relation_oo_mv": "red blue green",
    }.items()
}
FIRST_VIEW = ("obj_spatial_relation_oc_mv",)  # all boxes in the view idx[0]
VIDEO = re.compile(r"_video|^(?:obj_frame_locate|appearance_order|room_size|obj_count|nav)$")
UNMARKED = ("view_change_infer", "camera_motion_infer", "distance_infer_center_oc_mv")
CONVERSATION = list[dict[str, str]]
REQUIRED = {"conversations": CONVERSATION, "image": list[str], "type": str}
MARKS = {
    f"{colour}_{kind}": list[list[float] | None] for colour in COLOURS for kind in ("bbox", "point")
}
OPTIONAL = MARKS | {
    "id": str | int,
    "depth": list[str],
    "bbox_img_idx": list[list[int]],
    "point_img_idx": list[list[int]],
}


@dataclass(frozen=True)
class Mark:
    colour: str
    kind: str  # "bbox" | "point"
    view: int
    at: tuple[float, ...]  # (x, y) or (x0, y0, x1, y1) in 1/1000 of the image
    mention = property(lambda self: f"{self.colour} {self.kind}")

    def box(self) -> tuple[float, ...]:
        """Its region in 1/1000: a point's is a square of 50, moved in at the edges as the paper
        does."""
        x, y = self.at[:2]
        around = (
            max(x - 25, 0),
            max(y - 25, 0),
            *(v + 25 if v + 25 <= 1000 else 999 for v in (x, y)),
        )
        return self.at if self.kind == "bbox" else around

    def pixels(self, image: tuple[int, int]) -> tuple[int, ...]:
        return tuple(int(v * side / 1000) for v, side in zip(self.box(), image * 2, strict=True))


# ---- reading what a row marks, and drawing it
def marks_of(row: dict, views: dict | None = None) -> list[Mark]:
    """Every mark of a row, in the order of its keys, with the view that it belongs to. views:
    {"red_bbox": image} where the row says it otherwise than by its task."""
    views = views or {}
    given = [(name, row[name][0]) for name in row if name in MARKS and row[name] and row[name][0]]
    marks, unmarked = [], row.get("type") in UNMARKED
    for name, at in given:
        (colour, kind), wanted = name.split("_"), 4 if name.endswith("bbox") else 2
        if len(at) != wanted or wanted == 4 and not (at[0] < at[2] and at[1] < at[3]):
            form = "x0 < x1, y0 < y1" if wanted == 4 else "x, y"
            raise Bad(name, f"wrong type or value: {at} has to be {form}")
        if not all(0 <= v <= 1000 for v in at):  # nan is not, either
            raise Bad(name, f"outside 0..1000, so in pixels?: {at}")
        same = {other.partition("_")[0] for other, _ in given if other.endswith(kind)}
        view = 0 if unmarked else view_of(row, name, same, views.get(name))
        if not 0 <= view < len(row["image"]):
            raise Bad(f"{kind}_img_idx", f"no such view: {view} of {len(row['image'])}, for {name}")
        marks.append(Mark(colour, kind, view, tuple(at)))
    return [] if unmarked else marks


def view_of(row: dict, name: str, colours: set[str], said: int | None) -> int:
    """The image that a colour is marked in. colours: the row's, of that kind. What the row says
    itself counts where the task is none of ORDERS; the order of its keys says nothing."""
    (colour, kind), task, count = name.split("_"), row.get("type"), len(row["image"])
    index = (row.get(f"{kind}_img_idx") or [[]])[0]
    if count == 1 or task == "position_matching":
        return 0
    if index and (task in FIRST_VIEW or len({*index}) == 1):
        return index[0]
    order = [one for one in ORDERS.get(task, ()) if one in colours]
    if colour in order and order.index(colour) < len(index):
        return index[order.index(colour)]
    if said is None:
        raise Bad(
            f"{kind}_img_idx",
            f"in which of {count} images is {name}? {index} of {task} doesn't say",
        )
    return said


def draw_marks(
    image: Image.Image, marks: tuple, stroke: int = 20, outside: float = 7 / 8, radius: int = 20
) -> Image.Image:
    """Draws (colour, kind, (x, y) or (x0, y0, x1, y1) in 1/1000) into an RGB image: the last lies
    on top."""
    pen = ImageDraw.Draw(image)
    for colour, kind, at in marks:
        at = [v * side / 1000 for v, side in zip(at, image.size * 2, strict=False)]
        if kind == "point":
            x, y = at
            pen.ellipse([x - radius, y - radius, x + radius, y + radius], fill=COLOURS[colour])
        else:
            grow = stroke * outside
            edges = at[0] - grow, at[1] - grow, at[2] + grow, at[3] + grow
            pen.rectangle(edges, outline=COLOURS[colour], width=stroke)
    return image


def marked(files: list[str], marks: list[Mark], **style) -> list:
    """The images: a path where nothing is marked, else one that draws when it is opened."""
    of = {
        view: tuple((m.colour, m.kind, m.at) for m in marks if m.view == view)
        for view in range(len(files))
    }
    return [
        Marked(file, draw_marks, (("marks", of[view]), *style.items())) if of[view] else file
        for view, file in enumerate(files)
    ]


def insert_masks(question: str, marks: list[Mark], several: bool) -> tuple[str, list[Mark]]:
    """(the question with a <mask> behind each mention, the mark of each). With one image behind
    every mention, with several behind the first one of each; and a lone mark that no colour names
    is the first `bbox`."""
    by_mention, used, found = {mark.mention: mark for mark in marks}, set(), []

    def put(match):
        mark = by_mention.get(match[0])
        if mark is None or several and mark.mention in used:
            return match[0]
        used.add(mark.mention)
        found.append(mark)
        return f"{match[0]} <mask>"

    text = PHRASE.sub(put, question)
    if several and len(marks) == 1 and not PHRASE.search(question) and "bbox" in question:
        return question.replace("bbox", "bbox <mask>", 1), marks
    return text, found


# ---- rows
def spar_rows(path: Path, root: str | None) -> Iterator[Row]:
    notes, scenes = Notes(), None
    places = (path, *path.absolute().parents[:7])
    if pickles := next(
        filter(None, (sorted(up.glob("embodiedscan_infos_*.pkl")) for up in places)), []
    ):
        scenes = Scenes(pickles, notes)
    for file, base in annotations(path, root, notes):
        yield from each(file, (".jsonl",), partial(build, base, notes, scenes))


def annotations(path: Path, root: str | None, notes: Notes) -> Iterator[tuple[Path, str]]:
    """(file of rows, folder of its images) of an index, a folder, or a file."""
    if path.suffix == ".json":
        for name, part in read_index(path).items():
            found = [
                [up / part[key] for up in path.absolute().parents if (up / part[key]).exists()]
                for key in ("annotation", "root")
            ]
            if not (found[0] and (root or found[1])):
                raise FileNotFoundError(
                    f"{path}: {name}: neither beside nor above it: {part['annotation']}, {part['root']}"
                )
            yield found[0][0], root or str(found[1][0])
        return
    files = [
        f
        for f in files_of(path, (".jsonl",), notes)
        if path.is_file()
        or f.parent.name in ("fill", "select")
        and not VIDEO.search(f.parent.parent.name)
    ]
    if not files:
        raise FileNotFoundError(
            f"{path}: no fill/*.jsonl nor select/*.jsonl of a task about images"
        )
    for file in files:
        ups = file.absolute().parents
        above = next((up.parent for up in ups if up.name == "qa_jsonl"), ups[0])
        yield file, root or str(above / "images")


def read_index(path: Path) -> dict:
    try:
        index = json.loads(path.read_bytes())
        return {
            name: typed(part, {"annotation": str, "root": str}, {}) for name, part in index.items()
        }
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: no index {{name: {{annotation, root}}}}: {error}") from error


def build(base: str, notes: Notes, scenes, file: Path, number: int, row: dict) -> Iterator[Row]:
    row = typed(row, REQUIRED, OPTIONAL)
    if VIDEO.search(row["type"]):
        raise Bad("type", f"a question about a video: {row['type']}")
    row["image"] = images = [os.path.join(base, name) for name in row["image"]]
    named = [os.path.join(base, name) for name in row.get("depth", ())]
    if len(named or images) != len(images):
        raise Bad("depth", f"wrong count: {len(named)} for {len(images)} images")
    look = lru_cache(1)(partial(depths_of, named, images))
    name = f"{source_of(file)}/{row['type']}/{file.stem}/{row.get('id', '')}#{number}"
    yield Row(
        str(file),
        number,
        name,
        partial(examples, name, row, look, notes, scenes),
        lambda: (*images, *filter(None, look()[1])),
        notes=notes,
    )


def depths_of(named: list[str], images: list[str]) -> tuple[list, list]:
    """(measured, measured or estimated) depth files, an image each or None. SPAR-7M names but lacks
    them."""
    measured = [file if os.path.isfile(file) else None for file in named] or [None] * len(images)
    return measured, maps_of(measured, images)


def source_of(file: Path) -> str:
    """scannet/train, of spar/scannet/qa_jsonl/train/...; the folder's name where a file lies
    elsewhere."""
    parts = file.absolute().parts
    at = parts.index("qa_jsonl") if "qa_jsonl" in parts[1:-2] else len(parts)
    return "/".join((*parts[at - 1 : at], *parts[at + 1 : at + 2])) or file.absolute().parent.name


def examples(
    name: str, row: dict, look, notes: Notes, scenes, sizes: dict, occlusion=True
) -> list[Example]:
    (question, answer), *more = turns(row)
    if more:
        raise Bad("conversations", f"wrong count: {1 + len(more)} turns")
    files, marks, (measured, depths) = row["image"], marks_of(row), look()
    shapes = [size(file, sizes) for file in files]
    question, masks = insert_masks(question, marks, len(files) > 1)
    lor = Example(
        name,
        "lor",
        marked(files, marks),
        question,
        answer,
        task=row["type"],
        depths=[depth_map(d, s, sizes) for d, s in zip(depths, shapes, strict=True)]
        if any(depths)
        else None,
        intrinsics=[intrinsics(f, s, notes) for f, s in zip(files, shapes, strict=True)],
        regions=[(mark.view, mark.pixels(shapes[mark.view])) for mark in masks],
        frame=0 if len(files) > 1 and FIRST.search(question) else None,
    )
    lor.intrinsics = lor.intrinsics if any(lor.intrinsics) else None
    # An estimated depth cannot tell what is hidden.
    truth = (
        scenes.truth(files, shapes, marks, measured if occlusion else None)
        if scenes and marks
        else None
    )
    if not truth:
        return [lor]
    return [replace(lor, path=path, **truth) for path in ("lor", "dtr")]


def intrinsics(image: str, shape: tuple[int, int], notes: Notes) -> tuple | None:
    scene = Path(image).absolute().parents[1]
    found = matrix(scene / "intrinsic" / "intrinsic_color.txt")
    stated = SCANNET if re.fullmatch(r"scene\d{4}_\d\d", scene.name) else None
    try:
        return None if found is None else pinhole(found, shape, stated)
    except Bad:
        notes.add("cameras left out: written down for an image of another size")
