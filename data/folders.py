"""Walk folders: links are followed, each file once; what editors and systems leave is no data.

A set is often linked together from several disks. What is skipped is said in one line.
"""

import fnmatch
import heapq
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
    r"|__MACOSX|__pycache__|Thumbs\.db|desktop\.ini|\$RECYCLE\.BIN|lost\+found|@eaDir"
    r"|System Volume Information",
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
    fits = re.compile("|".join(map(fnmatch.translate, patterns)), re.IGNORECASE).match
    for path in paths:
        if fits(os.path.basename(path)):
            yield Path(path)


def walk(folder: Path, without: tuple[str, ...] = ()) -> Found:
    """Return all that lies below a folder, whichever way a link leads to it.

    What is reached in several ways is found once: where it really lies, if that is below `folder`.
    A link to a folder that it lies in itself leads nowhere new. without: names of folders that
    aren't looked into, as they hold millions of images.
    """
    walker = Walker(without)
    walker.look_into(str(folder))
    # Links come last, as what they lead to may lie here as well; and those to files behind those to
    # folders, for the same reason.
    while walker.folder_links:
        walker.follow(heapq.heappop(walker.folder_links))
    for link in sorted(walker.file_links):
        walker.add_file(link)
    found = walker.found
    for paths in (found.files, found.folders, found.leftovers, found.dead_links):
        paths.sort(key=by_parts)
    return found


class Walker:
    """A walk under way."""

    def __init__(self, without: tuple[str, ...]):
        self.without = without
        self.found = Found()
        self.seen: set[str] = set()  # real paths of folders, and of files that links lead to
        self.folder_links: list[str] = []  # a heap: the first by name goes first
        self.file_links: list[str] = []

    def look_into(self, folder: str) -> None:
        """Add what lies in a folder and below, and keep the links for later."""
        folders = [folder]
        self.seen.add(os.path.realpath(folder))
        while folders:
            folder = folders.pop()
            try:
                entries = list(os.scandir(folder))
            except OSError as error:
                raise UserError(f"{folder}: {error.strerror}") from error
            # Asking for the folder's alone is quicker than for that of each file.
            real_folder = os.path.realpath(folder)
            for entry in entries:
                if LEFTOVER.fullmatch(entry.name):
                    self.found.leftovers.append(entry.path)
                elif entry.is_symlink():
                    self.keep_link(entry)
                elif entry.is_file():
                    self.found.files.append(entry.path)
                elif not entry.is_dir():  # a pipe, say: whoever reads it waits for ever
                    self.found.leftovers.append(entry.path)
                elif self.enter(entry.path, os.path.join(real_folder, entry.name)):
                    folders.append(entry.path)

    def keep_link(self, entry: os.DirEntry) -> None:
        # Not the entry's own method, which fails at links that lead to each other.
        if os.path.isdir(entry.path):
            heapq.heappush(self.folder_links, entry.path)
        else:
            self.file_links.append(entry.path)

    def enter(self, folder: str, real: str) -> bool:
        """Add a folder that wasn't found before; return whether it is to be looked into."""
        if real in self.seen:
            return False
        self.found.folders.append(folder)
        if os.path.basename(folder) in self.without:
            return False
        self.seen.add(real)
        return True

    def follow(self, link: str) -> None:
        """Look into the folder that a link leads to."""
        real = os.path.realpath(link)
        here = os.path.realpath(os.path.dirname(link))
        leads_up = os.path.commonpath([real, here]) == real
        if not leads_up and self.enter(link, real):
            self.look_into(link)

    def add_file(self, link: str) -> None:
        """Add the file that a link leads to, unless it was found under its own name."""
        real = os.path.realpath(link)
        if not os.path.isfile(real):
            self.found.dead_links.append(link)
            return
        # Where downloads are kept by their hashes, only the links have the files' endings.
        same_ending = os.path.splitext(real)[1] == os.path.splitext(link)[1]
        if real in self.seen or (same_ending and os.path.dirname(real) in self.seen):
            return
        self.seen.add(real)
        self.found.files.append(link)


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
