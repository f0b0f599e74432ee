"""LLaVA's JSON (kind `llava`): general questions and captions, on path direct.

.json (one array, of any size) or .jsonl: {"id", "image": "a.jpg" or ["a.jpg", ...],
"conversations": [{"from": "human", "value"}, {"from": "gpt", "value"}, ...], ...}, images relative
to the file's folder or to @root.

Every turn is an Example, without the turns before it. The k-th <mask> of the whole conversation is
region k of `bbox` (pixels x0 y0 x1 y1), else of `rle` or `segmentation` (polygons); of several
images, as in the `bbox` and `mask_idx` of SR-REAL's rows (srreal.py)."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from data.rows import Bad, Row, depth_map, each, estimated, set_name, size, turns, typed
from data.sets.regions import FIELDS, REGIONS, kind_of, placed
from srreal import Example

REQUIRED = {"conversations": list[dict[str, str]], "image": str | list[str]}
OPTIONAL = FIELDS | {"id": str | int, "image_hw": tuple[int, int], "depth": str | list[str]}


@dataclass
class Files:
    """The images of a row, and their depth maps, which are looked for once the row is taken.

    A look at a network's disk takes longer than reading a row, and most rows aren't taken.
    """

    images: list[str]
    named_depths: list  # by image: what the row says, or None

    @cached_property
    def depths(self) -> list:
        """By image: the named file, else an estimated one, else None (or the name of none)."""
        found = []
        for image, named in zip(self.images, self.named_depths, strict=True):
            there = named and os.path.isfile(named)
            found.append(named if there else estimated(image) or named)
        return found

    def all(self) -> tuple:
        return tuple(file for file in (*self.images, *self.depths) if file)


def files_of_row(row: dict, base: str) -> Files:
    """Return the files that a row names, which lie under a folder."""
    images = paths(row["image"], base)
    depths = paths(row.get("depth", ()), base)
    if not images:
        raise Bad("image", "no image")
    if depths and len(depths) != len(images):
        raise Bad("depth", f"wrong count: {len(depths)} for {len(images)} images")
    return Files(images, depths or [None] * len(images))


def paths(names, base: str) -> list[str]:
    names = [names] if isinstance(names, str) else names
    return [os.path.join(base, name) for name in names]


@dataclass
class Turn:
    """A question of a conversation, with its share of the row's regions."""

    key: str
    files: Files
    question: str
    answer: str
    kind: str  # of the regions: a key of REGIONS
    regions: list[tuple]  # by <mask>: (image index, region as the row has it)

    def direct(self, sizes: dict) -> list[Example]:
        """Return its Example on path direct. sizes: file -> (width, height, mode)."""
        images = self.files.images
        shapes = [size(image, sizes) for image in images]
        read = REGIONS[self.kind]
        regions = [(view, read(region, shapes[view])) for view, region in self.regions]
        depths = depths_of(self.files.depths, shapes, sizes)
        return [
            Example(
                self.key,
                "direct",
                images,
                self.question,
                self.answer,
                depths=depths,
                regions=regions,
            )
        ]


def depths_of(files: list, shapes: list, sizes: dict) -> list | None:
    """Return the depth map or None of each image, or None where no image has one."""
    if not any(files):
        return None
    return [depth_map(file, shape, sizes) for file, shape in zip(files, shapes, strict=True)]


def turns_of(file: Path, number: int, row: dict, views: int, files: Files) -> Iterator[Turn]:
    """Yield every turn of a row, whose key ends in /k where there are several."""
    said = turns(row)
    kind = kind_of(row)
    given = placed(row, kind, views)
    count = sum(question.count("<mask>") for question, _ in said)
    if count != len(given):
        raise Bad(kind, f"<mask> count: {count} for {len(given)} regions")
    key = f"{set_name(file)}/{row.get('id', '')}#{number}"
    start = 0
    for k, (question, answer) in enumerate(said):
        end = start + question.count("<mask>")
        name = f"{key}/{k}" if len(said) > 1 else key
        yield Turn(name, files, question, answer, kind, given[start:end])
        start = end


def llava_rows(path: Path, root: str | None) -> Iterator[Row]:
    """Yield a Row for each turn of the files that a path stands for. root: of the images."""
    yield from each(path, (".json", ".jsonl"), partial(build, root))


def build(root: str | None, file: Path, number: int, row: dict) -> Iterator[Row]:
    row = typed(row, REQUIRED, OPTIONAL)
    files = files_of_row(row, root or str(file.parent))
    for turn in turns_of(file, number, row, len(files.images), files):
        yield Row(str(file), number, turn.key, turn.direct, files.all)
