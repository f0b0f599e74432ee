"""Where the marks are that SPAR-Bench's images come with: drawn in, and without coordinates.

A mark that the question mentions is looked for by its colour, and believed where drawing it again,
as the set's own tool does (data.spar.draw_marks), covers the pixels of that colour: an intersection
over union of AGREED. So images with another stroke, and rooms with other things so red, give no
mark rather than a wrong one.
"""

import numpy as np
from PIL import Image

from data.spar import COLOURS, PHRASE, Mark, draw_marks

STROKE, OUTSIDE, AGREED = 20, 7 / 8, 0.6  # pixels, share of the stroke outside of the box


def coloured(pixels: np.ndarray, colour: str) -> np.ndarray:
    """(H, W) bool: what is left of a pure colour after JPEG."""
    near = [
        pixels[..., k] > 165 if full else pixels[..., k] < 90
        for k, full in enumerate(COLOURS[colour])
    ]
    return near[0] & near[1] & near[2]


def candidate(mask: np.ndarray, kind: str) -> tuple | None:
    """(x, y), or the box within the stroke, in pixels."""
    # fewer in a row or column are specks
    least = STROKE // 2 if kind == "point" else 3 * STROKE // 4
    counts = mask.sum(0), mask.sum(1)
    spans = [np.flatnonzero(count >= least) for count in counts]
    if not (len(spans[0]) and len(spans[1])):
        return None
    if kind == "point":
        return tuple(float(np.median(span)) for span in spans)
    x0, x1 = inner(counts[0], spans[0], np.ptp(spans[1]) + 1)
    y0, y1 = inner(counts[1], spans[1], np.ptp(spans[0]) + 1)
    return (x0, y0, x1, y1) if x0 < x1 and y0 < y1 else None


def inner(counts: np.ndarray, span: np.ndarray, across: int) -> tuple[float, float]:
    """A box's two edges along an axis. Where the sides run, there is colour all across; between
    them, only in the two other sides' strokes. (The outer edge won't do: it may lie outside of the
    image.)"""
    sides, middle = np.flatnonzero(counts > (across + 2 * STROKE) / 2), (span[0] + span[-1]) / 2
    low, high, within = sides[sides < middle], sides[sides > middle], STROKE * (1 - OUTSIDE)
    return (low[-1] + 1 - within if len(low) else span[0]), (
        high[0] + within if len(high) else span[-1] + 1
    )


def agreement(mask: np.ndarray, colour: str, kind: str, at: tuple) -> float:
    """at in 1/1000 of the image."""
    blank = Image.new("RGB", mask.shape[::-1])
    drawn = coloured(np.asarray(draw_marks(blank, ((colour, kind, at),))), colour)
    return (drawn & mask).sum() / max((drawn | mask).sum(), 1)


def find_marks(images: list, question: str) -> list[Mark]:
    """The marks of all mentions, each in the view where it agrees best; [] unless all are found."""
    views, found = [np.asarray(image.convert("RGB")) for image in images], []
    for colour, kind in dict.fromkeys(PHRASE.findall(question)):
        best = AGREED, None
        for view, pixels in enumerate(views):
            mask = coloured(pixels, colour)
            at = candidate(mask, kind)
            if at is None:
                continue
            at = tuple(
                float(min(max(1000 * v / side, 0), 1000))
                for v, side in zip(at, mask.shape[::-1] * 2, strict=False)
            )
            mark = Mark(colour, kind, view, at)
            best = max(best, (agreement(mask, colour, kind, at), mark), key=lambda pair: pair[0])
        if best[1] is None:
            return []
        found.append(best[1])
    return found
