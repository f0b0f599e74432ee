"""The benchmarks as published: `load(name, root)` reads one, `score(name, pairs, scorer)` marks it.

    python eval.py --model DIR --benchmark cv-bench --path direct --out out/cv-bench
    python eval.py --model DIR --benchmark spar-bench --data /sets/SPAR-Bench --out out/spar

`root` is a directory as downloaded, a file of it, or a hub id (default: the set's own). A name may
choose one task: blink/Relative_Depth. What a row asks on each path:
    direct  the words of the published harness (SPAR and lmms-eval; SAT: "Only output the letter.")
    lor     the set's own question, without such words, as SR-REAL does
    dtr     as lor, and with regions where the set has or shows any (see each file)
A video is shown as `frames` of its frames, which data/frames.py chooses.

Each set is one file here: its reader, its published rule and its aggregate. To add one, write such
a file and enter it in BENCHMARKS. A row's answers are marked by two scorers:
    official  the published rule, bugs included, on the first <answer> block (without one: on the
              whole response). One that is a language model is replaced by one that isn't (`judged`)
    robust    reads one answer or none, and none is wrong (answers.py)
`unparsed`: the share of responses in which the robust scorer reads no answer, given with both.

`estimates` gives the same with standard errors (means.py), clustered by what rows share: an image,
a video, and the scene where the set says which it is.

Departures: a row that can't be used stops the run, as a benchmark is read whole, unless
skip_bad_rows leaves it out. A count that differs from the published one is a warning, and no
published figure is shown beside ours then.
"""

import csv
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from data import BadRows, say
from data.benchmarks.answers import answer_text
from data.benchmarks.blink import BLINK
from data.benchmarks.cv_bench import CV_BENCH
from data.benchmarks.embspatial import EMBSPATIAL
from data.benchmarks.erqa import ERQA
from data.benchmarks.means import Mean, Scored
from data.benchmarks.mindcube import MINDCUBE_TINY
from data.benchmarks.mmsi import MMSI
from data.benchmarks.omnispatial import OMNISPATIAL
from data.benchmarks.realworldqa import REALWORLDQA
from data.benchmarks.sat import SAT
from data.benchmarks.schema import Benchmark, Row
from data.benchmarks.site import SITE
from data.benchmarks.spar_bench import SPAR_BENCH, TINY
from data.benchmarks.spatialrgpt_bench import SPATIALRGPT_BENCH
from data.benchmarks.threedsrbench import THREEDSRBENCH
from data.benchmarks.viewspatial import VIEWSPATIAL
from data.benchmarks.vsi_bench import VSI_BENCH, VSI_BENCH_DEBIASED
from data.parquet import parquet_rows
from data.rows import Bad, BadSource, MissingFile, look_below, progress, records
from data.sets.spar_marks import PHRASE
from pictures import BadPicture
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
    "vsi-bench": VSI_BENCH,
    "vsi-bench-debiased": VSI_BENCH_DEBIASED,
    "mmsi": MMSI,
    "mindcube-tiny": MINDCUBE_TINY,
    "viewspatial": VIEWSPATIAL,
    "site": SITE,
    "3dsrbench": THREEDSRBENCH,
    "omnispatial": OMNISPATIAL,
}
# EASI's eight, the table that papers share: eval.py --suite.
SUITES = {
    "easi8": (
        "vsi-bench",
        "mmsi",
        "mindcube-tiny",
        "viewspatial",
        "site",
        "blink",
        "3dsrbench",
        "embspatial",
    ),
}


# ---- Reading


@dataclass
class Loaded:
    """What was read of a benchmark."""

    examples: list[Example]
    rows: int  # of the set that are there and can be used
    published: int  # how many there should be

    @property
    def is_complete(self) -> bool:
        return self.rows == self.published


def load(
    name: str, root=None, path: str = "both", skip_bad_rows: bool = False, frames: int = 32
) -> list[Example]:
    """Return a benchmark's questions on a path of srreal.PATHS, or on lor and dtr for both.

    frames: how many of a video. Raises BadRows with all that can't be used (or counts and prints
    them, and leaves them out), BadSource for an unknown name, MissingFile where nothing is found.
    """
    return read(name, root, path, skip_bad_rows, frames).examples


def read(
    name: str, root=None, path: str = "both", skip_bad_rows: bool = False, frames: int = 32
) -> Loaded:
    """Do what `load` does; return as well how many of the published rows there are."""
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
    keys = set()
    shown = {}
    total = 0  # rows of the files
    used = 0  # those that are questions of this benchmark
    unusable = 0
    # Only what the row says wrong is caught: any other exception of a reader is a bug in it.
    numbered = progress(all_records(files), f"reading {name}", "row", total=benchmark.rows)
    for file, number, record in numbered:
        total += 1
        try:
            if isinstance(record, Bad):
                raise record
            if is_copy(record, benchmark.key, keys):
                continue
            row = Row(record, folder, file, total, path, beside, frames, shown)
            asked = examples_of(benchmark, row, path)
        except (Bad, BadPicture) as error:
            problems = error.args[0] if isinstance(error, Bad) else [("image", f"corrupt: {error}")]
            bad += [(str(file), number, *problem) for problem in problems]
            unusable += 1
            continue
        used += 1 if asked else 0
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
    # A mirror may lack rows or hold another version: the numbers would not be comparable. Rows that
    # are there and can't be used are no such difference, so they don't use up the slack.
    there = used + unusable
    loaded = Loaded(examples, used, benchmark.rows)
    if abs(there - benchmark.rows) <= benchmark.slack:
        loaded.published = there
    if there != loaded.published:
        warn_of_count(name, folder, there, examples)
    if path == "dtr":
        warn_of_marks(name, examples)
    return loaded


def is_copy(record: dict, key: str, seen: set) -> bool:
    """Whether a row was seen before, in a copy of its file under another name."""
    name = record.get(key) if key else None
    if name is None:
        return False
    # A number in one file may be a text in its copy.
    name = str(name)
    is_known = name in seen
    seen.add(name)
    return is_known


def examples_of(benchmark: Benchmark, row: Row, path: str) -> list[Example]:
    examples = []
    for item in benchmark.read(row):
        examples += item.examples(path)
    return examples


def all_records(files: list[Path]) -> Iterator[tuple[Path, int, dict | Bad]]:
    """Yield (file, number in it, row or what is wrong with it)."""
    for file in files:
        for number, record in records_of(file):
            yield file, number, record


def records_of(file: Path) -> Iterator[tuple[int, dict | Bad]]:
    readers = {
        ".parquet": partial(parquet_rows, field="file"),
        ".tsv": partial(table_rows, delimiter="\t"),
        ".csv": partial(table_rows, delimiter=","),
    }
    return readers.get(file.suffix, records)(file)


def table_rows(file: Path, delimiter: str) -> Iterator[tuple[int, dict | Bad]]:
    csv.field_size_limit(2**31 - 1)  # a field is an image
    # Behind a damaged line nothing can be told apart: fields are quoted over many lines.
    number = 0
    try:
        with open(file, newline="", encoding="utf-8") as lines:
            for number, row in enumerate(csv.DictReader(lines, delimiter=delimiter), 1):
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
        files = list(below.files_like(pattern.removeprefix("**/")))
        if benchmark.columns:
            files = [file for file in files if has_columns(file, benchmark.columns)]
        if files:
            return root, files
    raise MissingFile(f"{name}: no {' or '.join(benchmark.files)} in {root}")


def has_columns(file: Path, names: tuple[str, ...]) -> bool:
    """Whether a file's first row has these columns."""
    for _, record in records_of(file):
        # A damaged file is for the reader to complain of.
        return isinstance(record, Bad) or all(name in record for name in names)
    return False


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
    return {key: found.value for key, found in estimates(name, pairs, scorer).items()}


def estimates(
    name: str,
    pairs: Iterable[tuple[Example, str]],
    scorer: str = "official",
    clusters: list[str] | None = None,
) -> dict[str, Mean]:
    """Return what `score` does, with standard errors where each pair's cluster is named."""
    pairs = list(pairs)
    benchmark = known(name, scorer, len(pairs))
    examples = [example for example, _ in pairs]
    # `unparsed` is always the robust scorer's: the official ones take anything as an answer.
    robust = marks(name, pairs, "robust")
    earned = robust if scorer == "robust" else marks(name, pairs, scorer)
    values = [0.0 if value is None else value for value in earned]
    lost = [100.0 if value is None else 0.0 for value in robust]

    def scored(numbers: list[float]) -> Scored:
        return Scored.of(list(zip(examples, numbers, strict=True)), clusters)

    return benchmark.aggregate(scored(values)) | {"unparsed": scored(lost).mean()}


def marks(
    name: str, pairs: Iterable[tuple[Example, str]], scorer: str = "official"
) -> list[float | None]:
    """Return what each answer earns by itself, in per cent; robust: None where none is read."""
    pairs = list(pairs)
    benchmark = known(name, scorer, len(pairs))
    found = []
    for example, response in pairs:
        if scorer == "official":
            value = benchmark.official(answer_text(response), example)
        else:
            value = benchmark.robust(response, example)
        found.append(None if value is None else 100 * value)
    return found


def known(name: str, scorer: str, count: int) -> Benchmark:
    """Return the benchmark; ValueError where there is nothing to be marked, or not so."""
    name, _, _ = name.partition("/")
    if name not in BENCHMARKS or scorer not in ("official", "robust") or not count:
        raise ValueError(
            f"{name!r} by scorer {scorer!r}, {count} answers: wanted one of "
            f"{', '.join(BENCHMARKS)}, official or robust, and an answer"
        )
    return BENCHMARKS[name]


def scene_of(name: str, example: Example) -> str | None:
    """Return the scene that a question's images show, where the set says which it is."""
    scene = BENCHMARKS[name.partition("/")[0]].scene
    return scene(example) if scene else None
