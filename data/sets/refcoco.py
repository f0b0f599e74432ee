"""RefCOCO, + and g (kind `refcoco`): from words to a 2D box, on path direct.

.parquet files, or rows {"answer": [expressions], "bbox": [x, y, w, h] pixels, "file_name"} as .json
or .jsonl with COCO's images in @root. The answer is <2d_box>x0,y0,x1,y1</2d_box> in pixels of the
image, which the processor writes in the family's own convention."""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from data.folders import walk
from data.marks import Marked
from data.parquet import parquet_rows
from data.rows import (
    Bad,
    Headers,
    Notes,
    Row,
    broken,
    depth_map,
    each,
    estimated,
    files_of,
    set_name,
    size,
    training,
    typed,
)
from data.sets.regions import FOUR, clip
from pictures import BadPicture
from srreal import Example

REQUIRED = {"answer": str | list[str], "bbox": FOUR}
OPTIONAL = {"file_name": str, "image": str | dict, "question_id": str | int}


# ---- Rows


def refcoco_rows(path: Path, root: str | None) -> Iterator[Row]:
    """Yield a Row for each expression of the files that a path stands for. root: of the images."""
    notes = Notes()
    in_parquet = path.suffix.lower() == ".parquet" or (
        path.is_dir() and any(walk(path).files_like("*.parquet"))
    )
    suffixes = (".parquet",) if in_parquet else (".json", ".jsonl")
    # Of a folder, only train files are read, except where there are none.
    every = files_of(path, suffixes)
    try:
        files = training(path, every, notes)
    except FileNotFoundError:  # the hub's copy has no other splits
        files = every
        notes.update(f"read of {file.name}: others evaluate on this split" for file in files)
    read = partial(build, root)
    for file in files:
        rows = rows_of_parquet(file, read) if in_parquet else each(file, suffixes, read)
        for row in rows:
            yield replace(row, notes=notes)


# What data.rows.each does with JSON.
def rows_of_parquet(file: Path, read) -> Iterator[Row]:
    for number, row in parquet_rows(file):
        try:
            if isinstance(row, Bad):
                raise row
            yield from read(file, number, row)
        except Bad as error:
            yield broken(file, number, error)


def build(root: str | None, file: Path, number: int, row: dict) -> Iterator[Row]:
    row = typed(row, REQUIRED, OPTIONAL)
    source = row.get("image") or row.get("file_name")
    if isinstance(source, dict):  # a parquet's: {"bytes", "path"}
        source = source.get("bytes") or source.get("path")
    # Bytes from a parquet lie beside no depth map, and have no header to look up by path.
    depth = None
    files = ()
    if isinstance(source, str):
        source = os.path.join(root or str(file.parent), source)
        depth = estimated(source)
        files = (source, depth) if depth else (source,)
    elif not isinstance(source, bytes):
        raise Bad("image", "missing")
    # The hub's copy lists a box's expressions; others have a row an expression.
    expressions = [row["answer"]] if isinstance(row["answer"], str) else row["answer"]
    for k, words in enumerate(expressions):
        key = f"{set_name(file)}/{row.get('question_id', '')}#{number}/{k}"
        reference = Reference(key, source, depth, words, row["bbox"])
        yield Row(str(file), number, key, reference.examples, files)


# ---- Examples


@dataclass
class Reference:
    """An expression, and the box that it refers to."""

    key: str
    source: str | bytes  # of the image: a path, or the bytes of its file
    depth: str | None
    words: str
    bbox: list  # x, y, width, height in pixels

    def examples(self, headers: Headers) -> list[Example]:
        # The header of a path was read in the pool, before; that of bytes is read here.
        image = self.source
        if isinstance(image, str):
            shape = size(image, headers)
        else:
            image = Marked(image)
            shape = size_of_bytes(image)
        corners = clip(self.corners(shape), shape)
        numbers = ",".join(f"{v:.2f}" for v in corners)
        depths = [depth_map(self.depth, shape, headers)] if self.depth else None
        return [
            Example(
                self.key,
                "direct",
                [image],
                f"Locate {self.words.strip()} and give its 2D box.",
                f"<2d_box>{numbers}</2d_box>",
                depths=depths,
                task="refcoco",
            )
        ]

    def corners(self, shape: tuple[int, int]) -> tuple[float, ...]:
        """Return (x0, y0, x1, y1) of a box that an image of (width, height) can have."""
        box = self.bbox
        x, y, w, h = box
        corners = x, y, x + w, y + h
        if not (all(map(math.isfinite, corners)) and w > 0 and h > 0):
            raise Bad("bbox", f"empty: {box}")
        # A box of one pixel is rarer than a set in fractions.
        if max(corners) <= 1 < min(shape):
            raise Bad("bbox", f"in fractions of the image, not pixels?: {box}")
        # One pixel over the edge is rounding, and is cut off.
        if min(corners) < 0 or corners[2] > shape[0] + 1 or corners[3] > shape[1] + 1:
            raise Bad("bbox", f"outside its image: {box} as x y w h, of {shape}")
        return corners


def size_of_bytes(image: Marked) -> tuple[int, int]:
    try:
        return image.size
    except BadPicture as error:
        raise Bad("image", f"corrupt file: {error}") from error
