"""Where Examples come from: `load(sources)` reads and checks them, or lists every unusable row.

A source is a path, `kind:path`, or `kind:path@image_root` where the images lie elsewhere;
data/sources.py has the kinds. Options behind commas take a share of it, and a .toml file mixes
several (data/mixture.py): `kind:path,weight=.1,cap=1000,seed=1,path=dtr`. Our own row format is in
data/schema.py, and what makes a row unusable in data/checks.py.

To add a kind, write a generator of rows (data/rows.py says what it yields) and enter it in SOURCES.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from data.checks import check, measure
from data.mixture import Part, parse_source
from data.rows import Bad, Headers, Notes, Row, drop_relative_depth
from data.sources import SOURCES, open_source
from errors import UserError
from srreal import Example

__all__ = ["SOURCES", "BadRows", "load", "say"]


class BadRows(UserError, ValueError):
    """Rows that cannot be used: `.rows` holds (file, row, field, reason), rows counted from 1."""

    def __init__(self, rows: list[tuple]):
        super().__init__(rows)
        self.rows = rows

    def __str__(self):
        lines = [f"{count_rows(self.rows)} rows cannot be used:"]
        for file, row, field, reason in self.rows:
            lines.append(f"{file}:{row}: {field}: {reason}")
        return "\n".join(lines)


def load(
    sources: str | Path | Iterable,
    skip_bad_rows: bool = False,
    more: Callable[[Example], list] | None = None,
) -> list[Example]:
    """Return the Examples of all sources, in order.

    Bad rows raise BadRows, or are counted, printed and left out. more: Example -> [(field,
    reason)], what else makes a row unusable where it is wanted.
    """
    if isinstance(sources, str | Path):
        sources = [sources]
    parts = []
    for source in sources:
        parts += parse_source(str(source))
    # Up to here a row is text: of sets of many GB only the share that is taken stays in memory.
    rows = []
    for part in parts:
        rows += take_rows(part)
    headers = measure(files_of(rows))
    examples = []
    bad = []
    used = set()  # sources of which anything was taken
    # Ids of all sources: the sampler's noise is keyed by them, so two rows may not share one.
    seen = set()
    with ThreadPoolExecutor() as pool:
        # In a pool, as some rows look things up in depth maps.
        made = pool.map(partial(make_examples, headers=headers), rows)
        for row, (row_examples, problems) in zip(rows, made, strict=True):
            if row_examples or problems:
                used.add(row.source)
            for example in row_examples:
                problems += check(example, headers, seen)
            if more is not None and not problems:
                for example in row_examples:
                    problems += more(example)
            if not problems:
                examples += row_examples
            bad += [(row.file, row.number, *problem) for problem in dict.fromkeys(problems)]
    print_notes(rows)
    unused = dict.fromkeys(part.source for part in parts if part.source not in used)
    if unused:
        say(f"nothing was taken of {', '.join(unused)}")
    # Nothing left to train on is as bad as a bad row.
    if bad and not (skip_bad_rows and examples):
        raise BadRows(bad)
    if bad:
        print_skipped(bad, len(rows))
    return examples


def take_rows(part: Part) -> Iterator[Row]:
    """Yield the rows of a part; those without notes of their own share the source's."""
    notes = Notes()
    for row in part.share(open_source(part.source)):
        if row.notes is None:
            row.notes = notes
        yield row


def files_of(rows: list[Row]) -> list[str]:
    """Return the files whose headers are wanted, each once."""
    files = {}
    with ThreadPoolExecutor() as pool:
        for row_files in pool.map(Row.list_files, rows):
            files |= dict.fromkeys(row_files)
    return list(files)


def make_examples(row: Row, headers: Headers) -> tuple[list[Example], list]:
    """Return (the Examples on the wanted path, [(field, reason)] why there are none)."""
    try:
        examples = row.make(headers)
    except Bad as error:
        return [], list(error.args[0])
    wanted = [example for example in examples if row.path in (None, example.path)]
    return [drop_relative_depth(example, headers, row.notes) for example in wanted], []


def print_notes(rows: list[Row]) -> None:
    """Print what each source counted while its rows were made."""
    # Many rows share their notes, which are counted once; two parts of a source are one.
    shared = {id(row.notes): row for row in rows}
    totals: dict[str, Counter] = {}
    for row in shared.values():
        totals.setdefault(row.source, Counter()).update(row.notes)
    for source, notes in totals.items():
        if notes:
            counts = ", ".join(f"{count} {note}" for note, count in notes.most_common())
            say(f"{source}: {counts}")


def print_skipped(bad: list[tuple], total: int) -> None:
    # A reason's text up to the first colon is its kind; behind it stand the row's own values.
    kinds = Counter(f"{field}: {reason.partition(':')[0]}" for *_, field, reason in bad)
    why = "; ".join(f"{count} x {kind}" for kind, count in kinds.most_common())
    say(f"skipped {count_rows(bad)} of {total} rows: {why}")


def count_rows(bad: list[tuple]) -> int:
    return len({(file, row) for file, row, *_ in bad})


def say(text: str) -> None:
    """Print once, not on each of torchrun's ranks."""
    if os.environ.get("RANK", "0") == "0":
        print(text)
