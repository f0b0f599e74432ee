"""The kinds of sets that can be read: one entry in SOURCES each, with its reader.

A source is a path, `kind:path`, or `kind:path@image_root` where the images lie elsewhere. Where no
kind is said, the names of the files or the first row's fields tell.
"""

import os
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path

from data.folders import Found, walk
from data.parquet import column_names
from data.rows import BadSource, MissingFile, Row, first_byte, records
from data.schema import own_rows
from data.sets.ca1m import ca1m_rows
from data.sets.llava import llava_rows
from data.sets.omni3d import omni3d_rows
from data.sets.refcoco import refcoco_rows
from data.sets.spar import spar_rows
from data.sets.spar_marks import MARKS
from data.sets.spatialrgpt import spatialrgpt_rows
from data.sets.srreal import srreal_rows
from data.sets.vqa import is_vqa, vqa_rows


def has(*fields: str) -> Callable[[dict], bool]:
    """Return a function that tells whether a row has all of these fields."""
    return lambda row: row.keys() >= {*fields}


is_spar = has("conversations", "type", "image")


def is_srreal(row: dict) -> bool:
    if "conversations" not in row:
        return False
    if row.keys() & {"3d_pos", "cot", "main_frame_idx"}:
        return True
    if "</think>" in str(row["conversations"]):
        return True
    # Its plainest rows have SPAR's marks, but not all of SPAR's other fields.
    return bool(row.keys() & MARKS.keys()) and not is_spar(row)


# How a kind is read: (path, image root or None) -> rows; and how it is recognised where no kind is
# said: by patterns of names in a folder, or by a function of a file's first row.
Source = namedtuple("Source", "read folder row", defaults=((), None))

# The first that fits counts.
SOURCES = {
    "scenes": Source(own_rows, folder=("rows.jsonl",)),
    "srreal": Source(srreal_rows, row=is_srreal),
    "spar": Source(spar_rows, folder=("qa_jsonl", "**/qa_jsonl"), row=is_spar),
    "spatialrgpt": Source(spatialrgpt_rows, row=has("conversations", "filename")),
    "omni3d": Source(omni3d_rows),
    "ca1m": Source(ca1m_rows, folder=("**/*.wide",)),
    "llava": Source(llava_rows, row=has("conversations")),
    "refcoco": Source(refcoco_rows, row=has("bbox", "answer")),
    "vqa": Source(vqa_rows, folder=("**/*.arrow",), row=is_vqa),
}


def open_source(source: str, **options) -> Iterator[Row]:
    """Return the rows of a source, which are read as they are asked for.

    options: what its reader takes beside the path and the image root.
    """
    kind, colon, path = source.partition(":")
    # What exists as a path is not taken apart.
    if not colon or os.path.exists(source):
        kind = None
        path = source
    elif kind not in SOURCES:
        raise BadSource(f"unknown kind {kind!r} in {source!r}: one of {', '.join(SOURCES)}")
    # The last @: folders may have one in their names.
    root = None
    if "@" in path and not os.path.exists(path):
        path, _, root = path.rpartition("@")
    # Behind a colon no shell does it.
    path = os.path.expanduser(path)
    if not os.path.exists(path):
        raise MissingFile(f"no such file or folder: {path} (of source {source!r})")
    if root is not None:
        root = os.path.expanduser(root)
        if not os.path.isdir(root):
            raise MissingFile(
                f"no such folder of images: {root} (what stands behind the @ of {source!r})"
            )
        root = os.path.abspath(root)
    if kind == "srreal" and os.path.isfile(os.path.join(path, "rows.jsonl")):
        # What data.coldstart wrote of SR-REAL's rows is of our own format.
        kind = "scenes"
    if kind is None:
        kind = recognise(Path(path))
    return SOURCES[kind].read(Path(path), root, **options)


def recognise(path: Path) -> str:
    """Return the kind of a path that says none."""
    if path.is_dir():
        # What lies in the folder itself is tried before a look at all that lies below, and folders
        # of images last.
        found = Found()
        for look in (None, ("images",), ()):
            if look is not None:
                found = walk(path, without=look)
            kind = recognise_folder(path, found)
            if kind is not None:
                return kind
            table = next(found.files_like("*.parquet"), None)
            if table is not None:
                return recognise_columns(table)
            rows = next(found.files_like("*.json*"), None)
            if rows is not None:
                path = rows
                break
    if path.suffix.lower() == ".parquet":
        return recognise_columns(path)
    if path.suffix.lower() == ".arrow":
        return "vqa"
    if path.suffix.lower() not in (".json", ".jsonl"):
        raise MissingFile(
            f"{path}: neither a folder with rows.jsonl (a whole set) nor a .json, .jsonl, .parquet "
            "or .arrow file"
        )
    start = first_byte(path)
    if not start:
        return "llava"  # its reader names an empty file
    # One object is a single row, or a table of GBs: not to be read for this.
    if path.suffix.lower() == ".json" and start == b"{":
        kind = recognise_object(path)
        if kind is not None:
            return kind
    rows = (row for _, row in records(path) if isinstance(row, dict))
    return recognise_row(next(rows, {}))


def recognise_folder(path: Path, found: Found) -> str | None:
    for kind, source in SOURCES.items():
        if any(holds(path, pattern, found) for pattern in source.folder):
            return kind
    return None


def holds(folder: Path, pattern: str, found: Found) -> bool:
    """Say whether a name lies in a folder or, after **/, anywhere below it."""
    name = pattern.removeprefix("**/")
    if name == pattern:
        return next(folder.glob(name), None) is not None
    return any(found.files_like(name)) or any(found.folders_like(name))


def recognise_columns(file: Path) -> str:
    """Return the kind of a parquet file."""
    names = column_names(file)
    # Either reader names a file that can't be read.
    is_refcoco = not names or SOURCES["refcoco"].row(dict.fromkeys(names))
    return "refcoco" if is_refcoco else "vqa"


def recognise_object(file: Path) -> str | None:
    """Return the kind of a file that is one JSON object, by its start; None: a single row."""
    with open(file, errors="replace") as stream:
        start = stream.read(4096)
    if '"conversations"' in start:
        return None
    return "spar" if '"annotation"' in start else "omni3d"


def recognise_row(row: dict) -> str:
    for kind, source in SOURCES.items():
        if source.row is not None and source.row(row):
            return kind
    return "scenes"
