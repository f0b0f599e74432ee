"""Where Examples come from: `load(sources)` reads and checks them, or lists every unusable row.

A source is a path, `kind:path`, or `kind:path@image_root` where the images lie elsewhere;
data/sources.py has the kinds. Options behind commas take a share of it, and a .toml file mixes
several (data/mixture.py): `kind:path,weight=.1,cap=1000,seed=1,path=dtr`. Our own row format is in
data/schema.py, and what makes a row unusable in data/checks.py.

To add a kind, write a generator of rows (data/rows.py says what it yields) and enter it in SOURCES.
"""

import python_version  # noqa: F401

# isort: split

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from data.bad_rows import BadRows, shortened
from data.checks import check
from data.headers import measure
from data.mixture import Part, parse_source
from data.rows import Bad, Headers, MissingFile, Notes, Row, drop_relative_depth, progress, say
from data.sources import SOURCES, open_source
from srreal import Example, truth_kind

TASKS_SHOWN = 10

__all__ = ["SOURCES", "BadRows", "Loaded", "load", "read", "say", "usable"]


@dataclass
class Loaded:
    """What sources hold: the Examples in order, and what is wrong with other rows."""

    examples: list[Example] = field(default_factory=list)
    bad: list[tuple] = field(default_factory=list)  # (file, row, field, reason)
    rows: int = 0  # good and bad ones


def load(
    sources: str | Path | Iterable,
    skip_bad_rows: bool = False,
    more: Callable[[Example], list] | None = None,
) -> list[Example]:
    """Return the Examples of all sources, in order.

    Bad rows raise BadRows, or are counted, printed and left out. more: Example -> [(field,
    reason)], what else makes a row unusable where it is wanted.
    """
    return usable(read(sources, more), skip_bad_rows)


def usable(loaded: Loaded, skip_bad_rows: bool) -> list[Example]:
    """Return the Examples; BadRows where others are bad and may not be skipped."""
    # Nothing left to train on is as bad as a bad row.
    if loaded.bad and not (skip_bad_rows and loaded.examples):
        raise BadRows(loaded.bad)
    if loaded.bad:
        say(f"skipped {BadRows(loaded.bad).summary(loaded.rows)}")
    return loaded.examples


def read(
    sources: str | Path | Iterable,
    more: Callable[[Example], list] | None = None,
    keeps: Callable[[Row], bool] | None = None,
) -> Loaded:
    """Return what the sources hold; print what was counted, and which rows there are.

    keeps: tells which rows are read at all; None: all.
    """
    parts = parts_of(sources)
    # Up to here a row is text: of sets of many GB only the share that is taken stays in memory.
    found = progress(rows_of(parts), "reading", "row")
    rows = [row for row in found if keeps is None or keeps(row)]
    loaded, used = examples_of(rows, more)
    print_notes(rows)
    unused = dict.fromkeys(part.source for part in parts if part.source not in used)
    if unused:
        say(f"nothing was taken of {', '.join(unused)}")
    print_counts(loaded.examples)
    return loaded


def parts_of(sources: str | Path | Iterable) -> list[Part]:
    """Return the parts that sources, with their options, and mixture files name."""
    if isinstance(sources, str | Path):
        sources = [sources]
    parts = []
    for source in sources:
        parts += parse_source(str(source))
    return parts


def rows_of(parts: list[Part]) -> Iterator[Row]:
    """Yield the rows that are taken of the parts, in order."""
    for index, opened in enumerate(open_all(parts)):
        yield from take_rows(parts[index], index, opened)


def open_all(parts: list[Part]) -> list[Iterator[Row]]:
    """Open every source before the first is read; MissingFile names all that aren't there."""
    opened = []
    missing = []
    for part in parts:
        try:
            opened.append(open_source(part.source, **part.reading()))
        except MissingFile as error:
            missing.append(str(error))
    if missing:
        raise MissingFile("; ".join(dict.fromkeys(missing)))
    return opened


def examples_of(rows: list[Row], more: Callable | None) -> tuple[Loaded, set[str]]:
    """Make and check the Examples of all rows; return them, and the sources that gave any."""
    # Of every image and depth map, each file once.
    headers = measure(files_of(rows))
    loaded = Loaded(rows=len(rows))
    used = set()
    known = Known()
    # In threads, as some rows look things up in depth maps.
    made = in_threads(partial(make_examples, headers=headers), rows)
    both = zip(rows, made, strict=True)
    for row, (examples, problems) in progress(both, "checking", "row", total=len(rows)):
        if examples or problems:
            used.add(row.source)
        fresh = []
        for place, example in enumerate(examples):
            before = known.add(example, row, problems)
            if before is None:
                fresh.append(example)
            else:
                examples[place] = before
        for example in fresh:
            problems += check(example, headers)
        if more is not None and not problems:
            leave_out_untaught(row, examples, more)
            for example in fresh:
                problems += more(example) if example in examples else []
        if not problems:
            # The same objects again, for a weight above 1: nothing is read twice.
            loaded.examples += examples * row.copies
        for name, reason in dict.fromkeys(problems):
            loaded.bad.append((row.file, row.number, name, shortened(reason)))
    # A source that is named twice has its bad rows once.
    loaded.bad = list(dict.fromkeys(loaded.bad))
    return loaded, used


def leave_out_untaught(row: Row, examples: list[Example], more: Callable) -> None:
    """Take out, and count, what can't be used on the paths for which the row's set is not made."""
    for example in list(examples):
        reasons = more(example) if example.path in row.untaught else []
        if reasons:
            examples.remove(example)
            row.notes.add(f"rows left out on path {example.path}: {reasons[0][1]}")


class Known:
    """The Examples so far: no two different ones may share id and path, which answers are kept by.

    The same one comes again where a source is named twice.
    """

    def __init__(self):
        # (id, path) -> the Example, its row, what is wrong with that
        self.known: dict[tuple, tuple[Example, Row, list]] = {}

    def add(self, example: Example, row: Row, problems: list) -> Example | None:
        """Return the Example of a source named before that this one repeats, else None.

        What is wrong with that, or with the id, is added to the row's problems.
        """
        key = (example.id, example.path)
        first, its_row, its_problems = self.known.setdefault(key, (example, row, problems))
        if first is example:
            return None
        if its_row.part != row.part and alike(first, example):
            problems += its_problems
            return first
        other = f"{its_row.file}:{its_row.number}"
        problems.append(("id", f"duplicate: {example.id} on path {example.path}, as in {other}"))
        return None


def alike(a: Example, b: Example) -> bool:
    """Say whether two Examples are equal, wherever a link or a relative path leads to them."""
    return comparable(a) == comparable(b)


def comparable(example: Example) -> dict:
    regions = []
    for view, region in example.regions:
        regions.append((view, region.tobytes() if isinstance(region, np.ndarray) else region))
    # Two names of one file are one image.
    images = [real_path(image) for image in example.images]
    depths = [real_path(depth) for depth in example.depths or ()]
    return vars(example) | {"regions": regions, "images": images, "depths": depths}


def real_path(item):
    return os.path.realpath(item) if isinstance(item, str) else item


def take_rows(part: Part, index: int, opened: Iterator[Row]) -> Iterator[Row]:
    """Yield the rows of part `index`; those without notes of their own share the source's."""
    notes = Notes()
    for row in part.share(opened):
        row.part = index
        if row.notes is None:
            row.notes = notes
        yield row


def files_of(rows: list[Row]) -> list[str]:
    """Return the files whose headers are wanted, each once."""
    files = {}
    for row_files in in_threads(Row.list_files, rows):
        files |= dict.fromkeys(row_files)
    return list(files)


def in_threads(function: Callable, items: list, at_once: int = 64) -> Iterator:
    """Yield function(item) of each item in order, worked out in a pool of threads.

    A thread takes `at_once` items together: to hand one over costs as much as a short task.
    """
    parts = [items[start : start + at_once] for start in range(0, len(items), at_once)]
    with ThreadPoolExecutor() as pool:
        for results in pool.map(lambda part: [function(item) for item in part], parts):
            yield from results


def make_examples(row: Row, headers: Headers) -> tuple[list[Example], list]:
    """Return (the Examples on the wanted path, [(field, reason)] why there are none)."""
    try:
        # A reader says what is wrong by Bad; any other error in it is a bug, and ends the run.
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


def print_counts(examples: list[Example]) -> None:
    """Print a line: how many rows by path, task and kind of truth."""
    if not examples:
        return
    kinds = {
        "path": Counter(example.path for example in examples),
        "task": Counter(example.task for example in examples),
        "truth": Counter(truth_kind(example.answer) for example in examples),
    }
    parts = []
    for name, counts in kinds.items():
        # Many sets name no tasks.
        if list(counts) == [""]:
            continue
        shown = counts.most_common(TASKS_SHOWN)
        commonest = [f"{kind or '(none)'} {count}" for kind, count in shown]
        rest = len(counts) - len(commonest)
        if rest:
            commonest.append(f"and {rest} more")
        parts.append(f"by {name} {', '.join(commonest)}")
    say(f"{len(examples)} rows {'; '.join(parts)}")
