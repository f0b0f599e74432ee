"""Where the marks are that SPAR-Bench's images come with: drawn in, and without coordinates.

A mark that the question mentions is looked for by its colour, and believed where drawing it again,
as the set's own tool does (spar_marks.draw_marks), covers the pixels of that colour: an
intersection over union of AGREED. So images with another stroke, and rooms with other things so
red, give no mark rather than a wrong one.
"""

import numpy as np
from PIL import Image

from data.sets.spar_marks import COLOURS, PHRASE, Mark, draw_marks

STROKE = 20  # pixels
INSIDE = 2.5  # of them within the box
AGREED = 0.6


def find_marks(images: list, question: str) -> list[Mark]:
    """Return the marks of all mentions, each in the view where it agrees best.

    [] unless all are found.
    """
    views = [np.asarray(image.convert("RGB")) for image in images]
    marks = []
    for colour, kind in dict.fromkeys(PHRASE.findall(question)):
        mark = best_mark(views, colour, kind)
        if mark is None:
            return []
        marks.append(mark)
    return marks


def best_mark(views: list[np.ndarray], colour: str, kind: str) -> Mark | None:
    # Nothing that agrees less is believed.
    best = None
    most = AGREED
    for view, pixels in enumerate(views):
        mask = coloured(pixels, colour)
        found = candidate(mask, kind)
        if found is None:
            continue
        height, width = mask.shape
        sides = (width, height) * 2
        at = [min(max(1000 * v / side, 0), 1000) for v, side in zip(found, sides, strict=False)]
        mark = Mark(colour, kind, view, tuple(map(float, at)))
        agreed = agreement(mask, mark)
        if agreed > most:
            best = mark
            most = agreed
    return best


def coloured(pixels: np.ndarray, colour: str) -> np.ndarray:
    """Return (H, W) bool: what is left of a pure colour after JPEG."""
    found = np.ones(pixels.shape[:2], bool)
    for channel, full in enumerate(COLOURS[colour]):
        # Wide bounds: JPEG stores colour at half the resolution, so a mark's rim is mixed with what
        # lies beside it.
        values = pixels[..., channel]
        found &= values > 165 if full else values < 90
    return found


def candidate(mask: np.ndarray, kind: str) -> tuple | None:
    """Return (x, y), or the box within the stroke, in pixels; None where there is nothing."""
    # Fewer pixels in a row or column are specks.
    least = STROKE // 2 if kind == "point" else 3 * STROKE // 4
    by_column = mask.sum(0)
    by_row = mask.sum(1)
    columns = np.flatnonzero(by_column >= least)
    rows = np.flatnonzero(by_row >= least)
    if len(columns) == 0 or len(rows) == 0:
        return None
    if kind == "point":
        return float(np.median(columns)), float(np.median(rows))
    x0, x1 = edges(by_column, columns, np.ptp(rows) + 1)
    y0, y1 = edges(by_row, rows, np.ptp(columns) + 1)
    return (x0, y0, x1, y1) if x0 < x1 and y0 < y1 else None


def edges(counts: np.ndarray, span: np.ndarray, across: int) -> tuple[float, float]:
    """Return a box's two edges along an axis, from the pixels of its colour by row or column.

    span: the rows or columns with colour. across: how many pixels the box has the other way.
    """
    # Where the sides run, there is colour all across; between them, only in the two other sides'
    # strokes. The outer edges won't do: they may lie outside of the image.
    sides = np.flatnonzero(counts > (across + 2 * STROKE) / 2)
    middle = (span[0] + span[-1]) / 2
    low = sides[sides < middle]
    high = sides[sides > middle]
    first = low[-1] + 1 - INSIDE if len(low) else span[0]
    last = high[0] + INSIDE if len(high) else span[-1] + 1
    return first, last


def agreement(mask: np.ndarray, mark: Mark) -> float:
    """Return the intersection over union of a colour's pixels with the mark, drawn again."""
    # On black, so that all of the colour's pixels are the mark's.
    blank = Image.new("RGB", mask.shape[::-1])
    again = draw_marks(blank, ((mark.colour, mark.kind, mark.at),))
    drawn = coloured(np.asarray(again), mark.colour)
    return (drawn & mask).sum() / max((drawn | mask).sum(), 1)
