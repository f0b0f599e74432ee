"""Which rows a run takes: sources with their shares, on the command line or in a .toml file.

    kind:path@image_root,weight=.1,cap=1000,seed=1,path=dtr,occlusion=off
    vqa:path,image=COLUMN,question=COLUMN,answer=COLUMN,split=train

    seed = 0                              in a file; $NAME is an environment variable
    [[source]]
    data = "spar:$SPAR/scannet"
    weight = 0.1

A row is taken by the hash of (seed, its id): so the share doesn't depend on the number of ranks, a
larger share holds a smaller one, and of an array of millions only the share stays in memory. Where
a set has no ids of its own, an id holds the row's place in its file: then the files must stay as
they are. With a weight above 1 each row comes that many times an epoch, as does that of a source
which is named twice; ids stay the same.
"""

import hashlib
import heapq
import os
import re
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError
from pydantic.dataclasses import dataclass

from data.rows import BadSource, Row, matches
from srreal import PATHS


@dataclass(frozen=True)
class Part:
    """A source and the share of its rows that is taken; pydantic reads numbers from text."""

    source: str  # as data.sources.open_source takes it
    # Below 1 the share of its rows; from 1 on how often each comes: of 2.5 twice, and half of them
    # once more.
    weight: Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)] = 1.0
    # At most so many different rows: those with the lowest hashes.
    cap: Annotated[int, Field(ge=1)] | None = None
    seed: int = 0
    path: Literal[*PATHS] | None = None  # only its Examples on this path
    # Of spar: off leaves out the check of depth, which tells hidden marks.
    occlusion: Literal["on", "off"] = "on"
    # Of vqa: the names of its columns, and which of its splits is read.
    image: str | None = None
    question: str | None = None
    answer: str | None = None
    split: str | None = None

    def reading(self) -> dict[str, str]:
        """Return the options that the set's reader takes, those that are given."""
        values = {name: getattr(self, name) for name in OF_VQA}
        return {name: value for name, value in values.items() if value is not None}

    def share(self, rows: Iterable[Row]) -> Iterator[Row]:
        """Yield the rows that are taken, in their order."""
        taken = self.below_weight(rows)
        if self.cap is not None:
            # Never more than cap rows in memory, however many pass.
            lowest = heapq.nsmallest(self.cap, taken)
            taken = sorted(lowest, key=lambda item: item[1])
        whole, part = divmod(self.weight, 1)
        for place, _, row in taken:
            make = row.make
            if self.occlusion == "off":
                make = partial(row.make, occlusion=False)
            yield replace(
                row,
                make=make,
                path=self.path or row.path,
                source=self.source,
                # A row below the weight is taken at all; below its fraction, once more.
                copies=max(1, int(whole) + (place < part)),
            )

    def below_weight(self, rows: Iterable[Row]) -> Iterator[tuple[float, int, Row]]:
        for index, row in enumerate(rows):
            place = self.place(row)
            if place < self.weight:
                yield place, index, row

    def place(self, row: Row) -> float:
        """Return the row's place in [0, 1); those below the weight are taken.

        A row that stands for a whole file is always taken, as it says what is wrong with it.
        """
        if row.number == 0:
            return -1.0
        text = f"{self.seed} {row.id}".encode(errors="replace")
        # Python's own hash differs from run to run.
        digest = hashlib.blake2b(text, digest_size=8).digest()
        return int.from_bytes(digest, "big") / 2**64


OF_VQA = ("image", "question", "answer", "split")
OPTIONS = ("weight", "cap", "seed", "path", "occlusion", *OF_VQA)
WITH_OPTIONS = re.compile(rf"(.*?)((?:,(?:{'|'.join(OPTIONS)})=[^,]*)+)")


def parse_source(text: str) -> list[Part]:
    """Return the part that a source with its options is, or all those of a mixture file."""
    source = text
    options = {}
    # What exists as a path is not taken apart.
    match = None if os.path.exists(text) else WITH_OPTIONS.fullmatch(text)
    if match:
        source = match[1]
        options = dict(option.split("=", 1) for option in match[2][1:].split(","))
    if not source.endswith(".toml"):
        return [make_part(source, options)]
    if options:
        raise BadSource(f"{source}: a mixture's shares stand in the file: {', '.join(options)}")
    return read_mixture(source)


def make_part(source: str, options: dict) -> Part:
    # Only SPAR's reader takes it.
    occlusion = options.get("occlusion", "on")
    if occlusion != "on" and not (occlusion == "off" and source.startswith("spar:")):
        raise BadSource(f"{source}: occlusion={occlusion}: it is on, or off for a spar:PATH")
    for name in OF_VQA:
        if name in options and not source.startswith("vqa:"):
            raise BadSource(f"{source}: {name}={options[name]}: it is for a vqa:PATH")
        if options.get(name) == "":
            raise BadSource(f"{source}: {name}= is empty")
    try:
        return Part(source, **options)
    except ValidationError as error:
        given = ", ".join(f"{name}={value}" for name, value in options.items())
        raise BadSource(
            f"{source}: {given}: it takes 0 < weight <= 1000, whole cap >= 1 and seed, path one of "
            f"{', '.join(PATHS)}, and names (of columns, or a split) as text"
        ) from error


def read_mixture(file: str) -> list[Part]:
    """Return the parts that a .toml file lists."""
    try:
        mixture = tomllib.loads(Path(file).read_text("utf-8-sig"))
    except (ValueError, OSError) as error:
        raise BadSource(f"{file}: {error}") from error
    entries = mixture.get("source")
    listed = entries and matches(entries, list[dict])
    if not listed or not all(matches(entry.get("data"), str) for entry in entries):
        raise BadSource(f"{file}: a mixture is a list of [[source]] tables, each with `data`")
    # A misspelt key must not leave a source whole.
    unknown = mixture.keys() - {"seed", "source"}
    for entry in entries:
        unknown |= entry.keys() - {"data", *OPTIONS}
    if unknown:
        raise BadSource(f"{file}: unknown key {', '.join(sorted(unknown))}")
    parts = []
    for entry in entries:
        source = os.path.expandvars(entry.pop("data"))
        if "$" in source:
            raise BadSource(
                f"{file}: {source}: where the set lies: that environment variable is not set"
            )
        if source.endswith(".toml"):
            raise BadSource(f"{file}: {source}: a mixture can't hold another")
        entry.setdefault("seed", mixture.get("seed", 0))
        parts.append(make_part(source, entry))
    return parts
