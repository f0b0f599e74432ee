"""The headers of images and depth maps, each file decoded once: `measure`.

They are read in a pool of threads (Pillow decodes outside of Python's lock). What is sound is
remembered in a small database in the user's cache folder, by path, size and time of its file.
"""

import os
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from data.rows import RELATIVE, Header, Headers, progress, stamp
from pictures import name_of, opened, picture_size

# Of another name when other things are remembered, or when a header means something else.
DATABASE = "headers-1.sqlite"
# A path may hold any bytes, so it is stored as such.
TABLE = """CREATE TABLE IF NOT EXISTS headers (
    file BLOB PRIMARY KEY, bytes INTEGER, changed INTEGER, width INTEGER, height INTEGER, mode TEXT)
"""
FIND = "SELECT width, height, mode FROM headers WHERE file = ? AND bytes = ? AND changed = ?"
STORE = "INSERT OR REPLACE INTO headers VALUES (?, ?, ?, ?, ?, ?)"
DAMAGED = ("SQLITE_NOTADB", "SQLITE_CORRUPT")


def measure(files: list[str], decoded: int = 20_000) -> Headers:
    """Return the header of each file, or what is wrong with it.

    The first `decoded` files that aren't remembered as sound are decoded as well.
    """
    stamps = {file: stamp(file) for file in files}
    headers = recall(stamps)
    fresh = [file for file in stamps if file not in headers]
    # Decoding millions takes too long; the rest is decoded at use, and a failure names its row.
    decode = [index < decoded for index in range(len(fresh))]
    with ThreadPoolExecutor() as pool:
        found = pool.map(read_header, fresh, decode)
        bar = progress(found, "opening images", "file", total=len(fresh))
        headers |= zip(fresh, bar, strict=True)
    # Only what is sound is remembered: what was wrong may have been mended since.
    sound = {file: headers[file] for file in fresh[:decoded] if isinstance(headers[file], Header)}
    remember(sound, stamps)
    return headers


def read_header(file: str, decode: bool) -> Header | str:
    try:
        with opened(file) as image:
            # Before it is decoded: some formats are turned by that.
            size = picture_size(image)
            if decode:
                image.load()
                # Less than 10 cm in millimetres: nobody's room.
                largest = image.getextrema()[1] if image.mode.startswith("I") else 0
                if 0 < largest < 100:
                    return f"depth in metres, not millimetres?: {file}: at most {largest}"
            relative = image.info.get("kind") == RELATIVE
            return Header(*size, RELATIVE if relative else image.mode)
    except FileNotFoundError:
        return f"missing file: {file} (kind:path@image_root says where the images of a set lie)"
    except PermissionError:
        return f"no permission to read it: {file}"
    # Pillow raises all sorts of exceptions on bad bytes.
    except Exception as error:
        return f"corrupt file: {name_of(file)}: {error}"


# ---- what is remembered


def recall(stamps: dict[str, tuple | None]) -> Headers:
    """Return the headers that are remembered of files with these stamps."""

    def find(database: sqlite3.Connection) -> Headers:
        headers = {}
        for file, of_now in stamps.items():
            # Data URIs have no stamp: they are no files.
            if of_now is not None:
                row = database.execute(FIND, (os.fsencode(file), *of_now)).fetchone()
                if row is not None:
                    headers[file] = Header(*row)
        return headers

    return in_database(find) or {}


def remember(headers: dict[str, Header], stamps: dict[str, tuple | None]) -> None:
    """Store the headers of files for `recall`."""
    rows = []
    for file, header in headers.items():
        if stamps[file] is not None:
            rows.append((os.fsencode(file), *stamps[file], *header))
    if rows:
        in_database(lambda database: database.executemany(STORE, rows))


def in_database(work: Callable[[sqlite3.Connection], Any]) -> Any:
    """Return work(database), which is stored as a whole or not at all.

    None where there is no home to write to, while others hold the database for too long, or where
    it is damaged, which begins it anew.
    """
    # RuntimeError: a user without a home.
    with suppress(OSError, RuntimeError):
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        file = Path(home, "sr-real", DATABASE)
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            with closing(sqlite3.connect(file)) as database, database:
                database.execute(TABLE)
                return work(database)
        except sqlite3.Error as error:
            if getattr(error, "sqlite_errorname", "") in DAMAGED:
                file.unlink()
    return None
