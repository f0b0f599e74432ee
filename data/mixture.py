"""Which rows a training run takes: sources with their shares, on the command line or in a .toml
file.

    kind:path@image_root,weight=.1,cap=1000,seed=1,path=dtr,occlusion=off

    seed = 0                              in a file; $NAME is an environment variable
    [[source]]
    data = "spar:$SPAR/scannet"
    weight = 0.1

A row is taken by the hash of (seed, its id): so the share doesn't depend on the number of ranks, a
larger share holds a smaller one, and of an array of millions only the share stays in memory. Where
a set has no ids of its own, an id holds the row's place in its file: then the files must stay as
they are."""

import hashlib
import heapq
import os
import re
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from data.rows import Row, matches
from srreal import PATHS

KEYS = ("weight", "cap", "seed", "path", "occlusion")
OPTIONS = re.compile(rf"(.*?)((?:,(?:{'|'.join(KEYS)})=[^,]*)+)")


@dataclass
class Part:
    source: str  # as open_source takes it
    weight: float = 1.0  # the share of its rows
    cap: int | None = None  # at most so many rows: those with the lowest hashes
    seed: int = 0
    path: str | None = None  # only its Examples on this path
    occlusion: str = "on"  # of spar: off leaves out data/embodiedscan.py's check of depth

    def __post_init__(self):
        try:  # of a command line's text, too
            self.weight, self.seed = float(self.weight), int(str(self.seed))
            self.cap = None if self.cap is None else int(str(self.cap))
            good = 0 < self.weight <= 1 and (self.cap is None or self.cap >= 1)
        except (ValueError, TypeError):
            good = False
        if self.occlusion != "on" and not (
            self.occlusion == "off" and self.source.startswith("spar:")
        ):
            raise ValueError(
                f"{self.source}: occlusion={self.occlusion}: it is on, or off for a spar:PATH"
            )
        if not good or self.path not in (None, *PATHS):
            raise ValueError(
                f"{self.source}: weight={self.weight}, cap={self.cap}, seed={self.seed}, path="
                f"{self.path}: it takes 0 < weight <= 1, whole cap >= 1 and seed, path one of "
                f"{', '.join(PATHS)}"
            )

    def share(self, rows: Iterable[Row]) -> Iterable[Row]:
        if self.occlusion == "off":
            rows = (replace(row, make=partial(row.make, occlusion=False)) for row in rows)
        placed = ((self.place(row), k, row) for k, row in enumerate(rows))
        share = (item for item in placed if item[0] < self.weight)
        share = (
            sorted(heapq.nsmallest(self.cap, share), key=lambda item: item[1])
            if self.cap
            else share
        )
        return (row for *_, row in share)

    def place(self, row: Row) -> float:
        """In [0, 1); a row that stands for a whole file is always taken, as it says what is wrong
        with it."""
        text = f"{self.seed} {row.id}".encode(errors="replace")
        digest = hashlib.blake2b(text, digest_size=8).digest()
        return int.from_bytes(digest, "big") / 2**64 if row.number else -1.0


def parts(source: str) -> Iterator[Part]:
    """A source with its options, or all those of a mixture file."""
    options = None if os.path.exists(source) else OPTIONS.fullmatch(source)
    if options:
        source, options = options[1], dict(pair.split("=", 1) for pair in options[2][1:].split(","))
    if not source.endswith(".toml"):
        yield Part(source, **(options or {}))
        return
    if options:
        raise ValueError(f"{source}: a mixture's shares stand in the file: {', '.join(options)}")
    try:
        mixture = tomllib.loads(Path(source).read_text())
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    entries = mixture.get("source")
    if not (
        entries
        and matches(entries, list[dict])
        and all(matches(e.get("data"), str) for e in entries)
    ):
        raise ValueError(f"{source}: a mixture is a list of [[source]] tables, each with `data`")
    unknown = mixture.keys() - {"seed", "source"} | set().union(*entries) - {"data", *KEYS}
    if unknown:
        raise ValueError(f"{source}: unknown key {', '.join(sorted(unknown))}")
    for entry in entries:
        place = os.path.expandvars(entry["data"])
        if "$" in place:
            raise ValueError(
                f"{source}: {place}: where the set lies: that environment variable is not set"
            )
        yield Part(
            place, **{"seed": mixture.get("seed", 0)} | {k: entry[k] for k in KEYS if k in entry}
        )
