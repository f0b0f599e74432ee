"""The benchmarks as published: `load(name, root)` reads one, `score(name, pairs, scorer)` marks it.

    python eval.py --model DIR --benchmark cv-bench --path direct --out out/cv-bench
    python eval.py --model DIR --benchmark spar-bench --data /sets/SPAR-Bench --out out/spar

`root` is a directory as downloaded, a file of it, or a hub id (default: the set's own). A name may
choose one task: blink/Relative_Depth. What a row asks on each path:
    direct  the words of the published harness (SPAR and lmms-eval; SAT: "Only output the letter.")
    lor     the set's own question, without such words, as SR-REAL does
    dtr     as lor, and with regions where the set has or shows any (see each file)

Each set is one file here: its reader, its published rule and its aggregate. To add one, write such
a file and enter it in BENCHMARKS. A row's answers are marked by two scorers:
    official  the published rule, bugs included, on the first <answer> block (without one: on the
              whole response). One that is a language model is replaced by one that isn't (`judged`)
    robust    reads one answer or none, and none is wrong (answers.py)
`unparsed`: the share of responses in which the robust scorer reads no answer, given with both.

Departures: a row that can't be used stops the run, as a benchmark is read whole, unless
skip_bad_rows leaves it out. A count that differs from the published one is a warning.
"""

import csv
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

from data import BadRows, say
from data.benchmarks.answers import answer_text
from data.benchmarks.blink import BLINK
from data.benchmarks.cv_bench import CV_BENCH
from data.benchmarks.embspatial import EMBSPATIAL
from data.benchmarks.erqa import ERQA
from data.benchmarks.realworldqa import REALWORLDQA
from data.benchmarks.sat import SAT
from data.benchmarks.schema import Benchmark, Row
from data.benchmarks.spar_bench import SPAR_BENCH, TINY
from data.benchmarks.spatialrgpt_bench import SPATIALRGPT_BENCH
from data.parquet import parquet_rows
from data.rows import Bad, BadSource, MissingFile, look_below, records
from data.sets.spar_marks import PHRASE
from srreal import Example

# Everything derives from this: eval's --benchmark, both scorers, the figures beside the table.
BENCHMARKS = {
    "spar-bench": SPAR_BENCH,
    "spar-bench-tiny": TINY,
    "embspatial": EMBSPATIAL,
    "sat": SAT,
    "cv-bench": CV_BENCH,
    "blink": BLINK,
    "realworldqa": REALWORLDQA,
    "erqa": ERQA,
    "spatialrgpt-bench": SPATIALRGPT_BENCH,
}


# ---- Reading


def load(name: str, root=None, path: str = "both", skip_bad_rows: bool = False) -> list[Example]:
    """Return a benchmark's questions on a path of srreal.PATHS, or on lor and dtr for both.

    Raises BadRows with all that can't be used (or counts and prints them, and leaves them out),
    BadSource for an unknown name, MissingFile where nothing is found.
    """
    name, _, task = name.partition("/")
    if name not in BENCHMARKS:
        raise BadSource(f"unknown benchmark {name!r}: one of {', '.join(BENCHMARKS)}")
    benchmark = BENCHMARKS[name]
    # Read once a load, and handed to every row.
    folder, files = find_files(name, root)
    beside = benchmark.beside(folder) if benchmark.beside else {}
    examples = []
    bad = []
    seen = set()
    total = 0
    # Only what the row says wrong is caught: any other exception of a reader is a bug in it.
    for file, number, record in all_records(files):
        total += 1
        try:
            if isinstance(record, Bad):
                raise record
            row = Row(record, folder, file, total, path, beside)
            asked = []
            for item in benchmark.read(row):
                asked += item.examples(path)
        except Bad as error:
            bad += [(str(file), number, *problem) for problem in error.args[0]]
            continue
        # Ids are given before a task is chosen, so that a part's are those of the whole.
        rename_known(asked, seen, total)
        examples += [example for example in asked if task in ("", example.task)]
    if bad and not (skip_bad_rows and examples):
        raise BadRows(bad)
    if bad:
        say(f"{name}: left out {BadRows(bad).summary(total)}")
    if not examples:
        missing = f"no task {task!r}" if task else "no rows"
        raise BadSource(f"{name}: {missing} in {folder}")
    # A mirror may lack rows or hold another version: the numbers would not be comparable.
    if total != benchmark.rows:
        warn_of_count(name, folder, total, examples)
    if path == "dtr":
        warn_of_marks(name, examples)
    return examples


def all_records(files: list[Path]) -> Iterator[tuple[Path, int, dict | Bad]]:
    """Yield (file, number in it, row or what is wrong with it)."""
    readers = {".parquet": partial(parquet_rows, field="file"), ".tsv": tsv_rows}
    for file in files:
        read = readers.get(file.suffix, records)
        for number, record in read(file):
            yield file, number, record


def tsv_rows(file: Path) -> Iterator[tuple[int, dict | Bad]]:
    csv.field_size_limit(2**31 - 1)  # a field is an image
    # Behind a damaged line nothing can be told apart: fields are quoted over many lines.
    number = 0
    try:
        with open(file, newline="", encoding="utf-8") as lines:
            for number, row in enumerate(csv.DictReader(lines, delimiter="\t"), 1):
                yield number, row
    except (ValueError, OSError, csv.Error) as error:
        yield number, Bad("file", f"unreadable: {error}")


def find_files(name: str, root) -> tuple[Path, list[Path]]:
    """Return (folder, its files with rows), downloaded where root is no local one."""
    benchmark = BENCHMARKS[name]
    root = Path(root or benchmark.hub)
    if root.is_file():
        return root.parent, [root]
    if not root.is_dir():
        # A hub id is owner/name; anything else was meant as a path.
        if len(root.parts) != 2 or str(root).startswith((".", "/", "~")):
            raise MissingFile(f"{name}: no such directory, nor a hub id: {root}")
        root = download(str(root), benchmark)
    # The first pattern that finds any: a folder may hold the set in two formats.
    below = look_below(root)
    for pattern in benchmark.files:
        if files := list(below.files_like(pattern.removeprefix("**/"))):
            return root, files
    raise MissingFile(f"{name}: no {' or '.join(benchmark.files)} in {root}")


def download(hub: str, benchmark: Benchmark) -> Path:
    from huggingface_hub import snapshot_download  # a local directory needs no hub

    # Only the files with rows: some sets have many GB of other splits beside them.
    patterns = [pattern.replace("**/", "*") for pattern in benchmark.files]
    try:
        return Path(snapshot_download(hub, repo_type="dataset", allow_patterns=patterns))
    except (OSError, ValueError) as error:  # no such set, no network, no access
        raise MissingFile(f"{hub}: it can't be downloaded: {error}") from error


def rename_known(examples: list[Example], seen: set, number: int) -> None:
    """Give an id that recurs the row's number."""
    for example in examples:
        key = example.id, example.path
        if key in seen:
            example.id += f"#{number}"
        seen.add(key)


def warn_of_count(name: str, folder: Path, total: int, examples: list[Example]) -> None:
    counts = Counter(example.task or "rows" for example in examples)
    tasks = ", ".join(f"{task} {count}" for task, count in counts.items())
    published = f"{BENCHMARKS[name].rows} are published"
    warnings.warn(f"{name}: {total} rows in {folder}, {published} ({tasks})", stacklevel=3)


def warn_of_marks(name: str, examples: list[Example]) -> None:
    # The question speaks of a mark, and the model is shown none in words.
    lost = [e for e in examples if not e.regions and PHRASE.search(e.question)]
    if lost:
        text = f"{name}: no region for the marks of {len(lost)} rows, asked without"
        warnings.warn(text, stacklevel=3)


# ---- Scoring


def score(
    name: str, pairs: Iterable[tuple[Example, str]], scorer: str = "official"
) -> dict[str, float]:
    """Mark (Example, response) pairs by scorer "official" or "robust".

    Returns per cent: `overall`, every published breakdown by its published name, and `unparsed`.
    ValueError for an unknown benchmark or scorer, and without pairs.
    """
    name, _, _ = name.partition("/")
    pairs = list(pairs)
    if name not in BENCHMARKS or scorer not in ("official", "robust") or not pairs:
        raise ValueError(
            f"{name!r} by scorer {scorer!r}, {len(pairs)} answers: wanted one of "
            f"{', '.join(BENCHMARKS)}, official or robust, and an answer"
        )
    benchmark = BENCHMARKS[name]
    marked = []
    unparsed = 0
    # `unparsed` is always the robust scorer's: the official ones take anything as an answer.
    for example, response in pairs:
        value = benchmark.robust(response, example)
        unparsed += 1 if value is None else 0
        if scorer == "official":
            value = benchmark.official(answer_text(response), example)
        marked.append((example, 100 * (value or 0.0)))
    return benchmark.aggregate(marked) | {"unparsed": 100 * unparsed / len(pairs)}
