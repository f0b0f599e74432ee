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
from functools import cached_property, partial
from pathlib import Path

from data.rows import Bad, Headers, Row, each, size, typed
from data.sets.files import Files
from data.sets.llava import OPTIONAL, Turn, turns_of
from data.sets.regions import clip
from srreal import UNITS, Example

REQUIRED = {"filename": str, "conversations": list[dict[str, str]]}
NUMBER = r"[0-9]+(?:\.[0-9]+)?"
# The longest first, so that `m` doesn't match the start of `meters`.
LENGTHS = sorted(UNITS.keys() - {"degree", "degrees", "°"}, key=len, reverse=True)
# Not the 2 of "2 in the image".
QUANTITY = re.compile(
    rf"(?<![\w.\[])({NUMBER})\s*({'|'.join(LENGTHS)})\b(?<!in(?= \w))", re.IGNORECASE
)
# Any number but a region's.
OTHER = re.compile(rf"(?<![\w.\[])({NUMBER})(?![\w\]]|\.[0-9])")


class OpenImages:
    """The folder of OpenImages, in one piece or as train_0 ... train_f."""

    def __init__(self, base: str):
        self.base = base

    @cached_property
    def folders(self) -> list[str]:
        """The folder and those in it, listed once: a network's disk is slow."""
        inside = sorted(entry.path for entry in os.scandir(self.base) if entry.is_dir())
        return [self.base, *inside]

    def find(self, name: str) -> str:
        """Return the path of an image, or where it would be if it were there."""
        if not name.lower().endswith((".jpg", ".jpeg", ".png")):
            name = f"{name}.jpg"
        # OpenImages deals its files by the first character.
        likely = os.path.join(self.base, f"train_{name[0]}")
        # It is tried first, then all others: copies of the set are also cut up in other ways.
        folders = sorted(self.folders, key=lambda folder: folder != likely)
        places = [os.path.join(folder, name) for folder in folders]
        return next(filter(os.path.isfile, places), places[0])


class Picture(Files):
    """The image of a row: where it is in OpenImages is looked for once the row is taken."""

    def __init__(self, folder: OpenImages, name: str):
        self.folder = folder
        self.name = name
        self.named_depths = [None]

    @cached_property
    def images(self) -> list[str]:
        return [self.folder.find(self.name)]


def spatialrgpt_rows(path: Path, root: str | None) -> Iterator[Row]:
    """Yield a Row for each question of the files that a path stands for. root: of the images."""
    images = OpenImages(root or str(path.absolute().parent))
    yield from each(path, (".json", ".jsonl"), partial(build, images))


def build(images: OpenImages, file: Path, number: int, row: dict) -> Iterator[Row]:
    row = typed(row, REQUIRED, OPTIONAL)
    row.setdefault("id", row["filename"])
    # Depth belongs to the image here, not to a place in the text.
    said = [re.sub(r"\s*<depth>", "", part.get("value", "")) for part in row["conversations"]]
    parts = zip(row["conversations"], said, strict=True)
    row["conversations"] = [part | {"value": text} for part, text in parts]
    picture = Picture(images, row["filename"])
    for turn in turns_of(file, number, row, 1, picture):
        make = partial(both_paths, turn)
        yield Row(str(file), number, turn.key, make, picture.all, path="direct")


def both_paths(turn: Turn, headers: Headers) -> list[Example]:
    """Return the question on path direct and, where its answer is one length, on lor."""
    if "<mask>" in turn.answer:
        raise Bad("conversations", "<mask> in an answer")
    # A mask is an array of the image's own size, so only boxes can run over the edge.
    if turn.kind == "bbox":
        shape = size(turn.files.images[0], headers)
        turn = replace(turn, regions=[(view, clip(box, shape)) for view, box in turn.regions])
    (direct,) = turn.direct(headers)
    length = quantity(turn.answer)
    if length is None:
        return [direct]
    return [direct, replace(direct, path="lor", answer=length)]


def quantity(answer: str) -> str | None:
    """Return the one length in a sentence, with its unit: "It is 3.5 feet away." -> "3.5 feet"."""
    found = QUANTITY.findall(answer)
    # "2 by 3 feet" and "between 2 m and 3 m" say more than one number: no short answer is theirs.
    if len(found) != 1 or OTHER.search(QUANTITY.sub("", answer)):
        return None
    number, unit = found[0]
    return f"{number} {unit}"
