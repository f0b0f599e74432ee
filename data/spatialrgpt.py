"""SpatialRGPT's OpenSpatialDataset: an array of 32 GB, about ten questions a row, on regions of
OpenImages.

{"filename": "0a1b2c", "bbox": [[x0, y0, x1, y1], ...], "rle": [{"size", "counts"}, ...],
"conversations": [
    {"from": "human", "value": "<image>\\nHow far is Region [0] <mask> <depth> from Region [1]
    <mask> ...?"}, {"from": "gpt", "value": "Region [0] is 3.5 feet from Region [1]."}, ...]}
in pixels; the k-th <mask> of the whole row is region k. Images are FILENAME.jpg in @root
(OpenImages' train folder, or the one above its train_0 ... train_f).

Path direct (the default) learns the sentences. `path=lor` takes the questions whose answer has
exactly one quantity, which becomes the answer, with its unit (`3.5 feet`): srreal.answer_score
converts units, so a reply in metres is right. The set's own loader cuts its masks out of arrays, so
a box that runs over the edge ends there; here, too."""

import os
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

from data.llava import OPTIONAL, direct, split
from data.rows import Bad, Row, each, estimated, size, typed
from srreal import UNITS, Example

REQUIRED = {"filename": str, "conversations": list[dict[str, str]]}
NUMBER = r"[0-9]+(?:\.[0-9]+)?"
LENGTHS = "|".join(
    sorted((unit for unit in UNITS if not unit.startswith("degree")), key=len, reverse=True)
)
# not: 2 in the image
QUANTITY = re.compile(rf"(?<![\w.\[])({NUMBER})\s*({LENGTHS})\b(?<!in(?= \w))", re.I)
OTHER = re.compile(rf"(?<![\w.\[])({NUMBER})(?![\w\]]|\.[0-9])")  # any number but a region's


def spatialrgpt_rows(path: Path, root: str | None) -> Iterator[Row]:
    yield from each(path, (".json", ".jsonl"), partial(build, root or str(path.absolute().parent)))


def build(base: str, file: Path, number: int, row: dict) -> Iterator[Row]:
    row = typed(row, REQUIRED, OPTIONAL)
    row["conversations"] = [
        part | {"value": re.sub(r"\s*<depth>", "", part.get("value", ""))}
        for part in row["conversations"]
    ]
    look = lru_cache(1)(partial(files, base, row["filename"]))
    yield from split(file, number, {"id": row["filename"]} | row, 1, look, "direct", both_paths)


def files(base: str, name: str) -> tuple[list, list]:
    """(its image, its depth map or None), looked for when a row is taken."""
    image = find(base, name)
    return [image], [estimated(image)]


@lru_cache(1)
def folders(base: str) -> tuple[str, ...]:
    """The folder and those in it, as OpenImages comes in train_0 ... train_f."""
    return base, *(
        entry.path for entry in sorted(os.scandir(base), key=lambda e: e.name) if entry.is_dir()
    )


def find(base: str, name: str) -> str:
    name = name if name.lower().endswith((".jpg", ".jpeg", ".png")) else f"{name}.jpg"
    likely = os.path.join(base, f"train_{name[:1]}")  # as OpenImages deals its files
    places = [
        os.path.join(folder, name) for folder in sorted(folders(base), key=lambda f: f != likely)
    ]
    # the first is what will be said to be missing
    return next(filter(os.path.isfile, places), places[0])


def both_paths(name, look, question, answer, kind, given, sizes: dict) -> list[Example]:
    if "<mask>" in answer:
        raise Bad("conversations", "<mask> in an answer")
    width, height = size(look()[0][0], sizes)
    if kind == "bbox":
        given = [
            (view, (max(x0, 0), max(y0, 0), min(x1, width), min(y1, height)))
            for view, (x0, y0, x1, y1) in given
        ]
    examples = direct(name, look, question, answer, kind, given, sizes)
    short = quantity(answer)
    return examples + [replace(e, path="lor", answer=short) for e in examples if short]


def quantity(answer: str) -> str | None:
    """The one length in a sentence, with its unit: `It is about 3.5 feet away.` -> `3.5 feet`."""
    found = QUANTITY.findall(answer)
    others = OTHER.findall(QUANTITY.sub("", answer))
    return " ".join(found[0]) if len(found) == 1 and not others else None
