"""What the readers of other people's files share: raw rows in bounded memory, their types, names of
files.

A reader is a generator: from (path, image root or None) it yields a `Row` for each row of its
files, cheaply and without opening an image. What the row says is worked out by `make`, after the
mixture has taken its share and the headers of all images have been read in a pool; it returns
Examples, or raises `Bad` with what is wrong."""

import json
import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import NoneType, UnionType

import numpy as np

from data.marks import DepthMap
from srreal import Example


class Bad(ValueError):
    """A row that cannot be used: Bad(field, reason), or Bad([(field, reason), ...])."""

    def __init__(self, name, reason: str = ""):
        super().__init__([(name, reason)] if isinstance(name, str) else name)


class Notes(Counter):
    """What a source counts while its rows are made, in several threads."""

    def add(self, note: str, count: int = 1) -> None:
        with LOCK:
            self[note] += count


LOCK = threading.Lock()


@dataclass
class Row:
    file: str
    number: int  # from 1; 0: the whole file
    id: str  # its hash decides whether a mixture takes the row
    make: Callable  # {file: (W, H, mode) or what is wrong with it} -> list of Examples; raises Bad
    # images and depth maps whose sizes `make` and `check` want to know; or what
    files: tuple | Callable = ()
    # looks for them, and is called for the rows that are taken: a look at a network's disk takes
    # its time only Examples on this path are taken, unless the mixture says one; None: all
    path: str | None = None
    notes: Notes = field(default_factory=Notes)  # a source's own; printed


def broken(file, number: int, error: Bad) -> Row:
    def fail(sizes, **options):
        raise error

    return Row(str(file), number, f"{file}#{number}", fail)


# ---- files of rows
# folders in a set, not its name
GENERIC = {"data", "annotations", "json", "jsonl", "train", "val", "test"}


def set_name(file: Path) -> str:
    """What the ids of a file's rows begin with, so that two sets' train.json are told apart: its
    name behind those of its folders, up to the first that is no generic one.
    `RefCOCO/data/val-00000-of-00001`."""
    folders = [folder.name for folder in file.absolute().parents]
    last = next((k for k, name in enumerate(folders) if name not in GENERIC), 0)
    return "/".join([*folders[last::-1], file.stem])


def each(path: Path, suffixes: tuple, build: Callable) -> Iterator[Row]:
    """The Rows that build(file, number, row) yields for every row of a file, or of all files in a
    folder."""
    for file in files_of(path, suffixes):
        for number, row in records(file):
            try:
                yield from (
                    [broken(file, number, row)]
                    if isinstance(row, Bad)
                    else build(file, number, row)
                )
            except Bad as error:
                yield broken(file, number, error)


def files_of(path: Path, suffixes: tuple, notes: Notes | None = None) -> list[Path]:
    """The file itself, or all in a folder, in order of their names; with notes, but for val and
    test."""
    found = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.suffix in suffixes)
    if not found:
        raise FileNotFoundError(f"{path}: no {' or '.join(suffixes)} in this folder")
    return found if notes is None else training(path, found, notes)


HELD_OUT = re.compile(r"(?:^|[/_-])(?:val|test[AB]?)(?=$|[/._-])")


def training(path: Path, found: list[Path], notes: Notes) -> list[Path]:
    """Of a folder's files those whose names below it are of no val or test split: these make
    benchmarks. The path itself may name them."""
    kept = [
        file for file in found if path.is_file() or not HELD_OUT.search(str(file.relative_to(path)))
    ]
    if not kept:
        raise FileNotFoundError(
            f"{path}: val and test splits alone: to be read, the path has to name them"
        )
    if len(kept) < len(found):
        notes.add(
            "left out: of val and test splits, which the path does not name", len(found) - len(kept)
        )
    return kept


def records(file: Path) -> Iterator[tuple[int, dict | Bad]]:
    """(number from 1, row or what is wrong with it): of JSON lines, an object, or an array of any
    size."""
    number, read = (
        0,
        elements if first_byte(file) == b"[" else one if file.suffix == ".json" else lines,
    )
    try:
        for number, row in enumerate(read(file), 1):
            good = isinstance(row, dict | Bad)
            yield number, row if good else Bad("row", f"wrong type: {row!r:.60} is no JSON object")
    except ValueError as error:  # behind it nothing can be told apart
        yield number + 1, Bad("row", f"unreadable: {error}")
    else:
        if not number:
            yield 0, Bad("row", "empty file")


def first_byte(file: Path) -> bytes:
    with open(file, "rb") as stream:
        return stream.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")[:1]


def lines(file: Path) -> Iterator:
    with open(file, "rb") as stream:
        for line in stream:
            try:
                yield json.loads(line)
            # no JSON, no UTF-8, or too deep
            except (ValueError, OverflowError, RecursionError) as error:
                yield Bad("row", f"unreadable: {error}")


def one(file: Path) -> Iterator:
    """An object over several lines, as in unpacked WebDatasets; or lines after all."""
    try:
        yield json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        yield from lines(file)


def elements(file: Path, prefix: str = "item") -> Iterator:
    """The elements of an array, read as they come: tens of GB pass through a few MB."""
    import ijson  # only such files need it

    with open(file, "rb") as stream:
        try:
            yield from ijson.items(stream, prefix, use_float=True)
        except ijson.JSONError as error:
            raise ValueError(error) from error


# ---- types
def matches(value, hint) -> bool:
    # half a surrogate pair can't be encoded again
    if hint is str:
        return type(value) is str and value != "" and not re.search("[\ud800-\udfff]", value)
    # an int may be too large for a float
    if hint in (int, float, bool, NoneType):
        return type(value) is hint or hint is float and type(value) is int and abs(value) < 1e18
    if isinstance(hint, UnionType):
        return any(matches(value, one) for one in hint.__args__)
    if hint is dict:
        return isinstance(value, dict)
    kind, inner = hint.__origin__, hint.__args__
    if kind is dict:
        return isinstance(value, dict) and all(
            matches([*pair], tuple[inner]) for pair in value.items()
        )
    # JSON has no tuples
    inner = inner * len(value) if kind is list and isinstance(value, list) else inner
    return isinstance(value, list) and len(value) == len(inner) and all(map(matches, value, inner))


def typed(row: dict, required: dict, optional: dict) -> dict:
    """The row without its nulls; Bad with every field that is missing or of another type."""
    if not isinstance(row, dict):
        raise Bad("row", f"wrong type: {row!r:.60} is no JSON object")
    row = {name: value for name, value in row.items() if value is not None}
    bad = [(name, "missing") for name in required if name not in row]
    bad += [
        (name, f"wrong type or value: {row[name]!r:.50} not {hint}")
        for name, hint in (required | optional).items()
        if name in row and not matches(row[name], hint)
    ]
    if bad:
        raise Bad(bad)
    return row


# ---- conversations, images, depth maps
def turns(row: dict) -> list[tuple[str, str]]:
    """(question, answer) of every turn. Where all image tokens lead, they go: images come first
    anyway."""
    said = [(part.get("from"), part.get("value", "").strip()) for part in row["conversations"]]
    human, model = said[::2], said[1::2]
    odd = len(human) != len(model) or any(who in ("gpt", "assistant") for who, _ in human)
    odd = odd or any(who in ("human", "user") for who, _ in model)
    if odd or not said or not all(text for _, text in said):
        raise Bad("conversations", "wrong order or blank: questions and answers have to take turns")
    bare = [re.sub(r"^(?:<image>\s*)+", "", question) for _, question in human]
    return [
        (question if "<image>" in plain else plain, answer)
        for (_, question), plain, (_, answer) in zip(human, bare, model, strict=True)
    ]


def estimated(image: str) -> str | None:
    """The depth that `python -m data.depth` wrote for an image, beside it: a/b.jpg ->
    a/b.depth.png."""
    file = f"{os.path.splitext(image)[0]}.depth.png"
    return file if os.path.isfile(file) else None


def size(file: str, sizes: dict, name: str = "image") -> tuple[int, int]:
    """(width, height) from the header; Bad where there is none to be read."""
    if isinstance(sizes[file], str):
        raise Bad(name, sizes[file])
    return sizes[file][:2]


def maps_of(named: list, images: list[str]) -> list:
    """A depth file an image: the one that is named, else the estimated one, or None."""
    return [found or estimated(image) for found, image in zip(named, images, strict=True)]


def depth_map(file: str | None, image: tuple[int, int], sizes: dict):
    """A depth file for an image of that size: its path; of another resolution and equal shape a
    DepthMap."""
    if file is None or isinstance(sizes[file], str) or sizes[file][:2] == image:
        return file
    (width, height), stretch = sizes[file][:2], image[0] / image[1]
    if not abs(width / height / stretch - 1) < 0.02:
        raise Bad(
            "depth", f"wrong shape: {width} x {height} for an image of {image[0]} x {image[1]}"
        )
    return DepthMap(file, image)


# what data.depth writes into a PNG by a model without unit, and data.probe finds
RELATIVE = "relative"


def metric(e: Example, sizes: dict, notes: Notes) -> Example:
    """The Example without such depth maps."""
    files = [depth.source if isinstance(depth, DepthMap) else depth for depth in e.depths or ()]
    if any(lost := [isinstance(file, str) and sizes[file][2:] == (RELATIVE,) for file in files]):
        note = (
            "depth maps left out: relative (data.depth --kind relative), point maps are metric here"
        )
        notes.add(note, sum(lost))
        e.depths = [None if gone else depth for gone, depth in zip(lost, e.depths, strict=True)]
    return e


@lru_cache(4096)
def matrix(file: Path) -> list | None:
    """A 3x3 or 4x4 matrix from a text file, None where there is no such file."""
    if not file.is_file():
        return None
    try:
        found = np.loadtxt(file, ndmin=2)
    except ValueError as error:
        raise Bad("image", f"no matrix in {file}: {error}") from error
    if found.shape not in ((3, 3), (4, 4)) or not np.isfinite(found).all():
        raise Bad("image", f"no matrix in {file}: its shape is {found.shape}, or it isn't finite")
    return found.tolist()


def camera(matrix) -> tuple[float, ...]:
    """(fx, fy, cx, cy) of a 3x3 or 4x4 matrix."""
    (fx, _, cx), (_, fy, cy) = (list(map(float, line[:3])) for line in matrix[:2])
    return fx, fy, cx, cy


def pinhole(matrix, image: tuple[int, int], stated: tuple[int, int] | None) -> tuple[float, ...]:
    """(fx, fy, cx, cy) for an image of that size, of a matrix whose file doesn't say which size it
    is for: the image's own, or the one that the set states; then it is scaled. Twice its principal
    point has to be that size up to a tenth, else Bad: no factor is guessed."""
    fx, fy, cx, cy = camera(matrix)
    for width, height in filter(None, (image, stated)):
        if abs(2 * cx / width - 1) < 0.1 and abs(2 * cy / height - 1) < 0.1:
            x, y = image[0] / width, image[1] / height
            return fx * x, fy * y, cx * x, cy * y
    raise Bad(
        "intrinsics",
        f"not of an image of {image}, nor {stated}: the principal point is ({cx}, {cy})",
    )
