"""Walk folders: links are followed, each file once; what editors and systems leave is no data.

A set is often linked together from several disks. What is skipped is said in one line.
"""

import fnmatch
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from errors import UserError

# Hidden files (.ipynb_checkpoints, ._a.json, .DS_Store, .a.json.swp), copies of editors (a.json~,
# #a.json#, a.bak.json), half-written files, and what systems leave.
LEFTOVER = re.compile(
    r"\..*|~\$.*|.*~|#.*#|.*\.(?:bak|tmp|swp|orig|part|partial|crdownload)(?:\.\w+)?"
    r"|__MACOSX|__pycache__|Thumbs\.db|desktop\.ini|\$RECYCLE\.BIN|lost\+found",
    re.IGNORECASE,
)


@dataclass
class Found:
    """What lies below a folder, in order of names."""

    files: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    leftovers: list[str] = field(default_factory=list)  # neither read nor looked into
    dead_links: list[str] = field(default_factory=list)

    def files_like(self, *patterns: str) -> Iterator[Path]:
        """Yield the files whose names fit one of the patterns."""
        return like(self.files, patterns)

    def folders_like(self, *patterns: str) -> Iterator[Path]:
        return like(self.folders, patterns)


def like(paths: list[str], patterns: tuple[str, ...]) -> Iterator[Path]:
    # One expression for all, as there may be millions of files.
    fits = re.compile("|".join(map(fnmatch.translate, patterns))).match
    for path in paths:
        if fits(os.path.basename(path)):
            yield Path(path)


def walk(folder: Path) -> Found:
    """Return all that lies below a folder, whichever way a link leads to it.

    What is reached in several ways is found once: where it really lies, if that is below `folder`.
    A link to a folder that it lies in itself leads nowhere new.
    """
    found = Found()
    seen: set[str] = set()  # real paths of folders, and of files that links lead to
    links = look_into(str(folder), found, seen)
    # Links come last, as what they lead to may lie here as well; and those to files behind those to
    # folders, for the same reason.
    to_files = []
    while links:
        links.sort(reverse=True)
        link = links.pop()
        if os.path.isdir(link):
            links += follow(link, found, seen)
        else:
            to_files.append(link)
    for link in to_files:
        add_file(link, found, seen)
    for paths in (found.files, found.folders, found.leftovers, found.dead_links):
        paths.sort(key=by_parts)
    return found


def look_into(folder: str, found: Found, seen: set) -> list[str]:
    """Add what lies in a folder and below to `found`; return the links on the way."""
    links = []
    folders = [folder]
    seen.add(os.path.realpath(folder))
    while folders:
        folder = folders.pop()
        try:
            entries = list(os.scandir(folder))
        except OSError as error:
            raise UserError(f"{folder}: {error.strerror}") from error
        # Asking for the folder's alone is quicker than for that of each file.
        real_folder = os.path.realpath(folder)
        for entry in entries:
            real = os.path.join(real_folder, entry.name)
            if LEFTOVER.fullmatch(entry.name):
                found.leftovers.append(entry.path)
            elif entry.is_symlink():
                links.append(entry.path)
            elif not entry.is_dir():
                found.files.append(entry.path)
            elif real not in seen:
                seen.add(real)
                found.folders.append(entry.path)
                folders.append(entry.path)
    return links


def follow(link: str, found: Found, seen: set) -> list[str]:
    """Look into the folder that a link leads to, unless it was found; return the links in it."""
    real = os.path.realpath(link)
    here = os.path.realpath(os.path.dirname(link))
    if real in seen or os.path.commonpath([real, here]) == real:
        return []
    found.folders.append(link)
    return look_into(link, found, seen)


def add_file(link: str, found: Found, seen: set) -> None:
    """Add the file that a link leads to, unless it was found under its own name."""
    real = os.path.realpath(link)
    if not os.path.exists(real):
        found.dead_links.append(link)
        return
    # Where downloads are kept by their hashes, only the links have the files' endings.
    has_ending = os.path.splitext(real)[1] == os.path.splitext(link)[1]
    if real in seen or (has_ending and os.path.dirname(real) in seen):
        return
    seen.add(real)
    found.files.append(link)


def by_parts(path: str) -> list[str]:
    return path.split(os.sep)


def leftovers_line(folder: Path, found: Found) -> str | None:
    """Return a line that says what was skipped, or None."""
    parts = []
    for paths, what in (
        (found.leftovers, "hidden files, or copies that editors and systems leave"),
        (found.dead_links, "links that lead nowhere"),
    ):
        if paths:
            names = [os.path.relpath(path, folder) for path in paths[:3]]
            more = ", ..." if len(paths) > 3 else ""
            parts.append(f"{len(paths)} {what} ({', '.join(names)}{more})")
    return f"{folder}: skipped {'; '.join(parts)}" if parts else None
