"""Boxes that a model writes: 2D in the form of any family, 3D as data/sets/grounding.py asks."""

import re

from srreal import DECIMAL, split_mention

# Not the 2 of "bbox_2d".
NUMBER = re.compile(r"(?<![\w.-])[0-9]+(?:\.[0-9]+)?(?![\w.])")
TRIPLE = f"{DECIMAL},{DECIMAL},{DECIMAL}"
BOX_3D = re.compile(rf'<3d_box center="({TRIPLE})"(?: size="({TRIPLE})")?>([^<>]+)</3d_box>')


def read_box(text: str | None) -> list[float] | None:
    """Return the four numbers of a text that has just these, x0 < x1 and y0 < y1; else None."""
    # [x0, y0, x1, y1], (x0,y0),(x1,y1), with tags or without: families differ in signs alone.
    found = NUMBER.findall(text or "")
    if len(found) != 4:
        return None
    box = [float(number) for number in found]
    x0, y0, x1, y1 = box
    is_box = x0 < x1 and y0 < y1
    return box if is_box else None


def box_iou(answer: str | None, truth: str) -> float:
    """Return intersection over union, 0 without a box.

    Both have to be in one unit an axis, whichever it is: it cancels out.
    """
    a = read_box(answer)
    b = read_box(truth)
    if a is None or b is None:
        return 0.0
    left = max(a[0], b[0])
    top = max(a[1], b[1])
    right = min(a[2], b[2])
    bottom = min(a[3], b[3])
    # Boxes that don't touch have a negative side, and nothing in common.
    width = max(right - left, 0)
    height = max(bottom - top, 0)
    common = width * height
    # Never 0: read_box takes no box without an area.
    union = area(a) + area(b) - common
    return common / union


def area(box: list[float]) -> float:
    x0, y0, x1, y1 = box
    width = x1 - x0
    height = y1 - y0
    return width * height


def read_boxes_3d(text: str) -> dict[str, tuple]:
    """Return mention, lower-cased -> (centre, size or None) in metres; the first of a mention.

    The mention of `red chair (region 1)` is `region 1`; without parentheses it is the whole name.
    """
    boxes: dict[str, tuple] = {}
    for centre, size, label in BOX_3D.findall(text):
        xyz = numbers_of(centre)
        extent = numbers_of(size)
        # What no room holds is no box: its error would drown all others.
        largest = max(map(abs, xyz + extent))
        if largest < 1e6:
            mention, _ = split_mention(label.strip())
            boxes.setdefault(mention.lower(), (xyz, extent or None))
    return boxes


def numbers_of(triple: str) -> tuple[float, ...]:
    """Return the three numbers of `x,y,z`; none of an empty text."""
    if not triple:
        return ()
    return tuple(float(number) for number in triple.split(","))
