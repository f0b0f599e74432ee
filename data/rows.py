"""What all readers share: rows in bounded memory, checks of their types, names of files.

A reader is a generator: from (path, image root or None) it yields a `Row` for each row of its
files, cheaply and without opening an image. `Row.make` works out what the row says, after a mixture
has taken its share and the headers of all images have been read in a pool; it returns Examples, or
raises `Bad` with what is wrong.
"""

import json
import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import UnionType
from typing import Annotated, NamedTuple, Union, get_args, get_origin

import ijson
import numpy as np
from pydantic import Field, Strict, TypeAdapter, ValidationError, WrapValidator
from tqdm import tqdm

from data.folders import Found, leftovers_line, walk
from data.marks import DepthMap, Marked
from errors import UserError
from pictures import is_data_uri, on_its_side
from srreal import Example


class BadSource(UserError, ValueError):
    """A source, its options or its mixture file cannot be understood."""


class MissingFile(UserError, FileNotFoundError):
    """A source names a file or a folder that isn't there."""


class Bad(ValueError):
    """A row that cannot be used: Bad(field, reason), or Bad([(field, reason), ...]).

    data.load catches it and goes on, so that all bad rows come in one list.
    """

    def __init__(self, field: str | list, reason: str = ""):
        problems = [(field, reason)] if isinstance(field, str) else field
        super().__init__(problems)


class Notes(Counter):
    """What a source counts while its rows are made; it may be added to from several threads."""

    def __init__(self, *counts):
        super().__init__(*counts)
        self.lock = threading.Lock()

    def add(self, note: str, count: int = 1) -> None:
        with self.lock:
            self[note] += count


class Header(NamedTuple):
    """What the header of an image file says."""

    width: int
    height: int
    mode: str  # Pillow's, or RELATIVE


# Header of each file, or the text that says what is wrong with it.
Headers = dict[str, Header | str]


@dataclass
class Row:
    """One row of a set, before anything but its text was read."""

    file: str
    number: int  # from 1; 0: the whole file
    id: str  # its hash decides whether a mixture takes the row
    make: Callable[[Headers], list[Example]]  # raises Bad
    # Images and depth maps whose headers `make` and the checks want to know. A function is called
    # only for rows that are taken: on a network's disk, looking for a file takes its time.
    files: tuple | Callable = ()
    path: str | None = None  # only Examples on this path, unless a mixture asks for another
    notes: Notes | None = None  # None: the source's, which data.load makes
    # As its file has it: what names its scene may stand in any field (data/leakage.py).
    record: dict = field(default_factory=dict)
    # Paths on which its set has no rationales. What SFT can't learn of them is left out and
    # counted, where it would be bad in a set that is made for SFT.
    untaught: tuple[str, ...] = ()
    # Set by the mixture that takes the row.
    source: str = ""
    part: int = 0  # index of its source in the mixture
    copies: int = 1  # how often it comes an epoch

    def list_files(self) -> tuple:
        return self.files() if callable(self.files) else self.files


# Reported late, with all other bad rows, and only where a mixture takes the row.
def broken(file, number: int, error: Bad) -> Row:
    """Return a Row that reports the error when it is made."""

    def fail(headers, **options):
        raise error

    return Row(str(file), number, f"{file}#{number}", fail)


def say(text: str) -> None:
    """Print once, not on each of torchrun's ranks."""
    if os.environ.get("RANK", "0") == "0":
        print(text)


def progress(items: Iterable, what: str, unit: str, total: int | None = None) -> Iterable:
    """Show a bar while items are gone through, on the first rank, where it takes some seconds."""
    # None: where there is no terminal.
    hidden = None if os.environ.get("RANK", "0") == "0" else True
    return tqdm(items, what, total, unit=f" {unit}", leave=False, delay=3, disable=hidden)


# ---- files of rows

# Folders inside a set, which don't tell sets apart.
GENERIC_FOLDERS = {"data", "annotations", "json", "jsonl", "train", "val", "test"}


def set_name(file: Path) -> str:
    """Return the prefix of the ids of a file's rows, e.g. `RefCOCO/data/val-00000-of-00001`.

    It is the file's name behind its folders', up to the first that is not generic, so that the
    train.json of two sets are told apart.
    """
    names = [file.stem]
    for folder in file.absolute().parents:
        names.append(folder.name)
        if folder.name not in GENERIC_FOLDERS:
            break
    # A name may hold bytes that are no text, which an id can't.
    return "/".join(reversed(names)).encode(errors="replace").decode()


def each(path: Path, suffixes: tuple, build: Callable) -> Iterator[Row]:
    """Yield the Rows that build(file, number, row) yields for every row of a file or folder."""
    for file in files_of(path, suffixes):
        for number, row in records(file):
            if isinstance(row, Bad):
                yield broken(file, number, row)
                continue
            record = dict(row)  # some readers fill in what a row lacks
            try:
                for made in build(file, number, row):
                    made.record = record
                    yield made
            except Bad as error:
                yield broken(file, number, error)


def files_of(
    path: Path, suffixes: tuple, notes: Notes | None = None, without: tuple[str, ...] = ()
) -> list[Path]:
    """Return the file itself, or all such files in a folder, in order of their names.

    With notes, those of val and test splits are left out and counted. without: as in folders.walk.
    """
    if path.is_file():
        found = [path]
    else:
        found = list(look_below(path, without).files_like(*[f"*{suffix}" for suffix in suffixes]))
    if not found:
        raise MissingFile(f"{path}: no {' or '.join(suffixes)} in this folder")
    # Readers whose sets come without splits pass no notes.
    return found if notes is None else training(path, found, notes)


def look_below(path: Path, without: tuple[str, ...] = ()) -> Found:
    """Return what lies below a folder; print a line about what was skipped."""
    below = walk(path, without)
    skipped = leftovers_line(path, below)
    if skipped:
        say(skipped)
    return below


HELD_OUT = re.compile(r"(?:^|[/_-])(?:val|test[AB]?)(?=$|[/._-])")


def training(path: Path, found: list[Path], notes: Notes) -> list[Path]:
    """Leave out the files of val and test splits, of which benchmarks are made.

    Only names below `path` count: who names such a split itself gets it.
    """
    if path.is_file():
        return found
    kept = [file for file in found if not HELD_OUT.search(str(file.relative_to(path)))]
    if not kept:
        raise MissingFile(
            f"{path}: val and test splits alone: to be read, the path has to name them"
        )
    left_out = len(found) - len(kept)
    if left_out:
        notes.add("left out: of val and test splits, which the path does not name", left_out)
    return kept


def records(file: Path) -> Iterator[tuple[int, dict | Bad]]:
    """Yield (number from 1, row or what is wrong with it).

    The file holds JSON lines, one object, or an array of any size.
    """
    number = 0
    try:
        for number, row in json_values(file):
            if isinstance(row, dict | Bad):
                yield number, row
            else:
                yield number, Bad("row", f"wrong type: {row!r:.60} is no JSON object")
    except ValueError as error:
        # A damaged array: rows behind this place can't be told apart.
        yield number + 1, Bad("row", f"unreadable from here on: {error}")
        return
    if number == 0:
        yield 0, Bad("row", "empty file")


def json_values(file: Path) -> Iterator[tuple[int, object]]:
    """Yield (number from 1, value): an array's elements, the single object, or of each line."""
    if first_byte(file) == b"[":
        yield from enumerate(elements(file), 1)
    elif file.suffix.lower() == ".json":
        yield from single_object(file)
    else:
        yield from json_lines(file)


# The byte order mark that some editors put in front.
BOM = b"\xef\xbb\xbf"
BLANK = BOM + b" \t\r\n\f\v"


def first_byte(file: Path) -> bytes:
    """Return the first byte behind white space and a byte order mark; b"" of an empty file."""
    try:
        with open(file, "rb") as stream:
            start = stream.read(4096)
    except OSError as error:
        raise BadSource(f"{file}: {error.strerror}") from error
    return start.lstrip(BLANK)[:1]


def json_lines(file: Path) -> Iterator[tuple[int, object]]:
    """Yield (number of the line, its value); blank lines count, and are no rows."""
    with open(file, "rb") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip(BLANK):
                continue
            try:
                yield number, json.loads(line)
            # No JSON, no UTF-8, a number too long, or nested too deep.
            except (ValueError, OverflowError, RecursionError) as error:
                yield number, Bad("row", f"unreadable: {error}")


def single_object(file: Path) -> Iterator[tuple[int, object]]:
    """Yield an object that spans lines, as in unpacked WebDatasets; or lines after all."""
    try:
        yield 1, json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        yield from json_lines(file)


def elements(file: Path, prefix: str = "item") -> Iterator:
    """Yield the elements of an array as they come: tens of GB pass through a few MB."""
    with open(file, "rb") as stream:
        # ijson knows no byte order mark.
        if stream.read(len(BOM)) != BOM:
            stream.seek(0)
        # use_float: ijson's numbers are Decimals otherwise.
        try:
            yield from ijson.items(stream, prefix, use_float=True)
        except ijson.JSONError as error:
            raise ValueError(error) from error


# ---- types


def unchanged(value, check):
    """Check a value, and return it as it is: an integer that stands for a number stays one."""
    check(value)
    return value


# JSON says what it means: "1.5" is no number and true is no 1. An empty text is a missing one, and
# pydantic refuses half a surrogate pair, which could not be written again.
Text = Annotated[str, Field(min_length=1), Strict()]
Number = Annotated[float, Strict(), WrapValidator(unchanged)]
Whole = Annotated[int, Strict()]
Truth = Annotated[bool, Strict()]
STRICT = {str: Text, float: Number, int: Whole, bool: Truth}


def strict(hint):
    """Return a type whose leaves take no other type's values; a tuple is a list of JSON."""
    if hint in STRICT:
        return STRICT[hint]
    inner = tuple(map(strict, get_args(hint)))
    if isinstance(hint, UnionType):
        return Union[inner]
    return get_origin(hint)[inner] if inner else hint


@lru_cache
def type_adapter(hint) -> TypeAdapter:
    # Built in a millisecond, used for every row. It depends on the type alone.
    return TypeAdapter(strict(hint))


def matches(value, hint) -> bool:
    """Return whether a value from JSON is of a type such as dict[str, list[float] | None]."""
    try:
        type_adapter(hint).validate_python(value)
    except ValidationError:
        return False
    return True


def typed(row: dict, required: dict, optional: dict) -> dict:
    """Return the row without its nulls; Bad names every field that is missing or of another type.

    required, optional: name -> type.
    """
    if not isinstance(row, dict):
        raise Bad("row", f"wrong type: {row!r:.60} is no JSON object")
    row = {name: value for name, value in row.items() if value is not None}
    problems = [(name, "missing") for name in required if name not in row]
    for name, hint in (required | optional).items():
        if name in row and not matches(row[name], hint):
            problems.append((name, f"wrong type or value: {row[name]!r:.50} not {hint}"))
    if problems:
        raise Bad(problems)
    return row


# ---- conversations


def only_turn(row: dict) -> tuple[str, str]:
    """Return (question, answer) of a conversation that has one."""
    turn, *more = turns(row)
    if more:
        raise Bad("conversations", f"wrong count: {1 + len(more)} turns")
    return turn


def turns(row: dict) -> list[tuple[str, str]]:
    """Return (question, answer) of every turn."""
    texts = [part.get("value", "").strip() for part in row["conversations"]]
    speakers = [part.get("from") for part in row["conversations"]]
    # Names differ from set to set; what counts is that nobody speaks in the other's place.
    in_turn = len(texts) % 2 == 0
    in_turn = in_turn and not {"gpt", "assistant"} & {*speakers[::2]}
    in_turn = in_turn and not {"human", "user"} & {*speakers[1::2]}
    if not (in_turn and texts and all(texts)):
        raise Bad("conversations", "wrong order or blank: questions and answers have to take turns")
    pairs = []
    for question, answer in zip(texts[::2], texts[1::2], strict=True):
        pairs.append((without_first_marks(question), answer))
    return pairs


def without_first_marks(question: str) -> str:
    """Drop image tokens that all stand in front: images come first anyway."""
    bare = re.sub(r"^(?:<image>\s*)+", "", question)
    return question if "<image>" in bare else bare


# ---- sizes and depth maps of images

# What data.depth once wrote into PNGs of models without a unit, and Header.mode then says.
RELATIVE = "relative"
RELATIVE_NOTE = "depth maps left out: relative, so without a unit; point maps are metric"


def size(file: str | Marked, headers: Headers, field: str = "image") -> tuple[int, int]:
    """Return (width, height) from the header; Bad where there is none to be read."""
    if isinstance(file, Marked):  # its row holds the image
        return file.size
    header = headers[file]
    if isinstance(header, str):
        raise Bad(field, header)
    return header[:2]


def estimated_name(image: str) -> str:
    """Return where `python -m data.depth` writes an image's depth: a/b.jpg -> a/b.depth.png."""
    return f"{os.path.splitext(image)[0]}.depth.png"


def estimated(image: str | Marked) -> str | None:
    """Return that file where it is there; an image that its row holds lies beside none."""
    if isinstance(image, Marked):
        return None
    file = estimated_name(image)
    return file if os.path.isfile(file) else None


def depth_map(file: str | None, image_size: tuple[int, int], headers: Headers):
    """Return what reads a depth file at the size of its image.

    That is its path, or a DepthMap for a file of another resolution but the same shape.
    """
    if file is None or isinstance(headers[file], str) or headers[file][:2] == image_size:
        return file
    width, height = headers[file][:2]
    # Up to rounding: a map of another shape is cut out of the image, nobody knows where.
    stretch = width / height / (image_size[0] / image_size[1])
    if not abs(stretch - 1) < 0.02:
        asked = f"{image_size[0]} x {image_size[1]}"
        reason = f"wrong shape: {width} x {height} for an image of {asked}"
        raise Bad("depth", reason + on_its_side((width, height), image_size))
    return DepthMap(file, image_size)


def stamp(file: str | Path) -> tuple[int, int] | None:
    """Return what changes with a file's content; None where there is no file."""
    if is_data_uri(file) or not os.path.isfile(file):
        return None
    status = os.stat(file)
    return status.st_size, status.st_mtime_ns


def file_of(depth):
    """Return the file that a depth map lies in; an array or None as it is."""
    return depth.source if isinstance(depth, DepthMap) else depth


def drop_relative_depth(example: Example, headers: Headers, notes: Notes) -> Example:
    """Leave out depth maps without a unit, which would be taken for metres, and count them."""
    if example.depths is None:
        return example
    kept = []
    for depth in example.depths:
        file = file_of(depth)
        relative = isinstance(file, str) and headers[file][2:] == (RELATIVE,)
        if relative:
            notes.add(RELATIVE_NOTE)
        kept.append(None if relative else depth)
    example.depths = kept
    return example


# ---- cameras


@lru_cache(4096)
def matrix(file: Path) -> list | None:
    """Return the 3x3 or 4x4 matrix in a text file; None where there is no such file.

    The rows of a scene share its files, hence the cache.
    """
    if not file.is_file():
        return None
    try:
        found = np.loadtxt(file, ndmin=2)
    except ValueError as error:
        raise Bad("image", f"no matrix: {file}: {error}") from error
    if found.shape not in ((3, 3), (4, 4)) or not np.isfinite(found).all():
        raise Bad("image", f"no matrix: {file}: its shape is {found.shape}, or it isn't finite")
    return found.tolist()


def camera(matrix) -> tuple[float, ...]:
    """Return (fx, fy, cx, cy) of a 3x3 or 4x4 matrix."""
    fx, _, cx = matrix[0][:3]
    _, fy, cy = matrix[1][:3]
    return float(fx), float(fy), float(cx), float(cy)


def pinhole(matrix, image: tuple[int, int], stated: tuple[int, int] | None) -> tuple[float, ...]:
    """Return (fx, fy, cx, cy) for an image of that size.

    The matrix's file doesn't say which size it is for: the image's own, or the one that the set
    states; then it is scaled. Twice its principal point has to be that size up to a tenth, else it
    is Bad: no factor is guessed.
    """
    fx, fy, cx, cy = camera(matrix)
    for size_of_matrix in (image, stated):
        if size_of_matrix is None:
            continue
        width, height = size_of_matrix
        if abs(2 * cx / width - 1) < 0.1 and abs(2 * cy / height - 1) < 0.1:
            x = image[0] / width
            y = image[1] / height
            return fx * x, fy * y, cx * x, cy * y
    reason = f"not of an image of {image}, nor {stated}: the principal point is ({cx}, {cy})"
    raise Bad("intrinsics", reason)
