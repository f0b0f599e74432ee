"""Regions as sets write them: boxes, COCO's run lengths or polygons, and the <mask> of each.

A box becomes four numbers in pixels; a mask becomes an array [H, W] that stays in memory, so a row
that has both is read for its boxes."""

import re

import numpy as np
from PIL import Image, ImageDraw

from data.rows import Bad

FOUR = tuple[float, float, float, float]
FIELDS = {
    "bbox": list[FOUR] | dict[str, list[FOUR]],
    "rle": list[dict[str, list[int] | str]],
    "segmentation": list[list[list[float]]],
    "mask_idx": int | dict[str, tuple[int, int]],
}


# ---- One region, for an image of (width, height)


def box(corners: list, shape: tuple[int, int]) -> tuple:
    return tuple(corners)


def clip(corners, shape: tuple[int, int]) -> tuple[float, ...]:
    """Cut a box off at the edges of its image."""
    return tuple(min(max(v, 0), side) for v, side in zip(corners, shape * 2, strict=True))


def polygons(outlines: list, shape: tuple[int, int]) -> np.ndarray:
    """Return (H, W) bool of COCO's polygons [[x, y, x, y, ...], ...]."""
    mask = Image.new("1", shape)
    for outline in outlines:
        if len(outline) < 6 or len(outline) % 2:
            raise Bad("segmentation", f"no polygon: {len(outline)} numbers")
        # Also of nan, which Pillow can't draw.
        if not all(abs(value) < 1e6 for value in outline):
            raise Bad("segmentation", f"far outside its image: {outline!r:.50}")
        ImageDraw.Draw(mask).polygon(outline, fill=1)
    return np.asarray(mask)


def rle(code: dict, shape: tuple[int, int]) -> np.ndarray:
    """Return (H, W) bool of COCO's run lengths, a list of numbers or COCO's string of them."""
    width, height = shape
    mask = None
    if code.get("size") == [height, width]:
        mask = decode(code.get("counts"), height, width)
    if mask is None:
        reason = f"wrong size or counts: {code.get('size')} for an image of {height} x {width}"
        raise Bad("rle", reason)
    return mask.astype(bool)


def decode(counts, height: int, width: int) -> np.ndarray | None:
    """Return the mask of run lengths, or None where these don't fill the image exactly."""
    # Here, so that only sets with run lengths need the package.
    from pycocotools import mask as coco

    if isinstance(counts, list):
        # frPyObjects looks at neither.
        if not counts or min(counts) < 0 or sum(counts) != height * width:
            return None
        text = coco.frPyObjects({"size": [height, width], "counts": counts}, height, width)
        return coco.decode(text)
    # pycocotools reads past the end of a string whose last number is cut off: only 0 to O end one.
    if not isinstance(counts, str) or not re.fullmatch("[0-o]*[0-O]", counts):
        return None
    # It refuses runs that are too long, but takes those that are too short: they also fit into an
    # image that lacks a pixel.
    if decode_text(counts, 1, height * width - 1) is not None:
        return None
    return decode_text(counts, height, width)


def decode_text(counts: str, height: int, width: int) -> np.ndarray | None:
    from pycocotools import mask as coco

    try:
        return coco.decode({"size": [height, width], "counts": counts})
    except ValueError:  # more pixels than the image has
        return None


# Field of a row -> what reads one region of it, in order of preference.
REGIONS = {"bbox": box, "rle": rle, "segmentation": polygons}


# ---- The regions of a row


def kind_of(row: dict) -> str:
    """Return the field that a row's regions are read from."""
    for kind in REGIONS:
        if row.get(kind):
            return kind
    return "bbox"


def placed(row: dict, kind: str, views: int) -> list[tuple]:
    """Return (image index, region as the row has it) of the k-th <mask>.

    Of several images the row has to say which a region is in; a plain list doesn't.
    """
    given = row.get(kind) or []
    if isinstance(given, list):
        if given and views > 1:
            say_so = "Of several, {image: list} and mask_idx say it"
            raise Bad(kind, f"in which of {views} images? {say_so}")
        given = {"0": given} if given else {}
    # (image index, index in its list) -> region
    regions = {}
    for view, listed in given.items():
        if not (view.isdecimal() and int(view) < views):
            raise Bad(kind, f"no such image: {view} of {views}")
        for k, region in enumerate(listed):
            regions[int(view), k] = region
    order = row.get("mask_idx")
    if not isinstance(order, dict):
        # SR-REAL's rows of one image have the number of masks here. Their lists are in order.
        return [(view, regions[view, k]) for view, k in sorted(regions)]
    return [(place[0], regions[place]) for place in places_of_masks(order, kind, regions)]


def places_of_masks(order: dict, kind: str, regions: dict) -> list[tuple]:
    """Return (image index, index there) of the k-th <mask>, from {"k": [image, index]}."""
    if not all(k.isdecimal() for k in order):
        wanted = "{place of a <mask>: [image, index]}"
        raise Bad("mask_idx", f"wrong type or value: {order!r:.50} not {wanted}")
    # As numbers: as text, "10" would come before "2".
    places = [tuple(order[k]) for k in sorted(order, key=int)]
    for place in places:
        if place not in regions:
            raise Bad("mask_idx", f"no such region: {list(place)} of {kind}")
    return places
