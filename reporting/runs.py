"""What runs and evaluations have written, by folder, and which evaluations can be compared."""

import json
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from errors import UserError

# How the folders of runs/*.sh are called, in the order of its table: what comes first is what the
# others are compared with.
NAMES = {
    "read": "SFT, text",
    "worked": "SFT, rooms",
    "sft": "SFT",
    "rl": "RL",
    "eval-sft": "after SFT",
    "eval-before": "before RL",
    "eval-rl": "after RL",
    "eval-after": "after RL",
    "eval-sft-sampled": "after SFT, sampled",
    "eval-rl-sampled": "after RL, sampled",
    "eval-blind": "blind",
}


@dataclass
class Run:
    """A folder that train_sft.py or train_rl.py has written."""

    name: str
    folder: Path
    config: dict  # the script and its flags; {} where there is no config.json
    rows: list[dict]  # of metrics.jsonl, a step each

    @property
    def script(self) -> str:
        """Return which script it was; of a folder without config.json what its columns suggest."""
        # Only RL has a reward.
        guess = "train_rl" if "reward" in self.rows[-1] else "train_sft"
        return self.config.get("script", guess)

    @property
    def date(self) -> str:
        return self.config.get("date") or date_of(self.folder, "metrics.jsonl")

    @property
    def steps(self) -> int:
        return self.rows[-1]["step"]

    @property
    def seconds(self) -> float:
        """Return the time of its steps, without validation and saving."""
        return sum(row.get("seconds") or 0 for row in self.rows)


@dataclass
class Evaluation:
    """A folder that eval.py has finished."""

    name: str
    folder: Path
    config: dict
    results: dict  # path -> task, "all" or "no depth" -> metric -> estimate: value, se, n
    summary: dict  # the rest of summary.json; of a benchmark its marks, and others' figures
    rows: list[dict]  # of predictions.jsonl, an answer each
    is_named: bool  # by --eval, and so to be compared with the others whatever it was

    @property
    def date(self) -> str:
        return self.summary.get("date") or date_of(self.folder, "summary.json")

    @property
    def is_blind(self) -> bool:
        return self.config.get("blind", False)

    def of_path(self, path: str, task: str = "all") -> list[dict]:
        return [r for r in self.rows if r["path"] == path and task in ("all", r["task"])]


@dataclass
class Comparison:
    """Evaluations that asked the same questions; each is compared with the first."""

    evals: list[Evaluation] = field(default_factory=list)

    @property
    def title(self) -> str:
        config = self.evals[0].config
        asked = config.get("benchmark")
        if not asked:
            asked = ", ".join(Path(source).name for source in config["data"])
        temperature = config.get("temperature")
        return f"{asked}, sampled at temperature {temperature:g}" if temperature else asked

    @property
    def paths(self) -> list[str]:
        paths = {}
        for evaluation in self.evals:
            paths |= dict.fromkeys(evaluation.results)
        return list(paths)

    @property
    def sighted(self) -> list[Evaluation]:
        """Return the evaluations that saw the images, or all where none did."""
        # A page about nothing but a blind model is still a page.
        return [e for e in self.evals if not e.is_blind] or self.evals


# ---- Reading


def read_lines(path: Path) -> list[dict]:
    """Read a JSON-lines file; [] if it isn't there.

    What follows the last newline is still being written, and is left out.
    """
    if not path.exists():
        return []
    # A report may be asked for while a run is writing its log.
    whole_lines = path.read_text().split("\n")[:-1]
    try:
        return [json.loads(line) for line in whole_lines]
    except ValueError as error:
        raise UserError(f"{path} can't be read: {error}") from error


def read_object(path: Path) -> dict:
    """Read a JSON object; {} if it isn't there."""
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} can't be read: {error}") from error


def read_run(folder: Path) -> Run | None:
    rows = read_lines(folder / "metrics.jsonl")
    if not rows:
        return None
    config = read_object(folder / "config.json")
    return Run(name_of(folder), folder, config, rows)


def read_eval(folder: Path, is_named: bool = False) -> Evaluation | None:
    """Read a finished evaluation; None where there is none."""
    # eval.py writes its summary last, and removes it first when it starts again.
    summary = read_object(folder / "summary.json")
    # data.coldstart writes a summary of its own.
    if not {"config", "results"} <= summary.keys():
        return None
    return Evaluation(
        name=name_of(folder),
        folder=folder,
        config=summary["config"],
        results=summary["results"],
        summary=summary,
        rows=read_lines(folder / "predictions.jsonl"),
        is_named=is_named,
    )


def name_of(folder: Path) -> str:
    folder = folder.resolve()
    return NAMES.get(folder.name, folder.name)


def in_order(items: list) -> list:
    """Sort the runs or evaluations of a folder: the speedrun's as its table has them, then the
    others from the oldest on, as an evaluation before a training should come before one after it.
    """
    known = list(NAMES)

    def place(item: Run | Evaluation) -> tuple:
        if item.folder.name in known:
            return known.index(item.folder.name), "", ""
        return len(known), item.date, item.folder.name

    return sorted(items, key=place)


def collect(
    run_folders: tuple[str, ...], eval_folders: tuple[str, ...]
) -> tuple[list[Run], list[Evaluation]]:
    """Read all folders; a run's is taken with the runs and evaluations that lie in it.

    Evaluations that are named come first, in their order.
    """
    evals = []
    for name in eval_folders:
        evals += named_evals(existing(name, "--eval"), name)
    known = {evaluation.folder.resolve() for evaluation in evals}
    runs = []
    for name in run_folders:
        found, asked = inside(existing(name, "--run"))
        if not (found or asked):
            raise UserError(
                f"--run {name}: no metrics.jsonl of a run and no summary.json of an evaluation "
                "in it, nor in the folders in it"
            )
        runs += found
        # One may be named, and lie in a run that is taken whole.
        evals += [evaluation for evaluation in asked if evaluation.folder.resolve() not in known]
    tell_apart(runs)
    tell_apart(evals)
    # A blind model is a floor to look at, and nothing to compare with, unless it was named first.
    return runs, sorted(evals, key=lambda e: e.is_blind and not e.is_named)


def inside(folder: Path) -> tuple[list[Run], list[Evaluation]]:
    """Read the runs and evaluations of a folder and of those right below it."""
    folders = [folder, *(path for path in folder.iterdir() if path.is_dir())]
    runs = [read_run(path) for path in folders]
    evals = [read_eval(path) for path in folders]
    return in_order([run for run in runs if run]), in_order([found for found in evals if found])


def named_evals(folder: Path, name: str) -> list[Evaluation]:
    """Read the evaluation of a folder; of eval.py --suite, those of all its benchmarks."""
    folders = [folder]
    if (folder / "suite.json").exists():
        folders = sorted(path for path in folder.iterdir() if path.is_dir())
    read = [read_eval(path, is_named=True) for path in folders]
    found = [evaluation for evaluation in read if evaluation]
    if not found:
        raise UserError(f"--eval {name}: no summary.json in it, which eval.py writes at its end")
    return found


def existing(name: str, flag: str) -> Path:
    folder = Path(name)
    if not folder.is_dir():
        raise UserError(f"{flag} {name}: no such directory")
    return folder


def tell_apart(items: list) -> None:
    """Put the names of folders above in front of a name that occurs twice, as many as it takes."""
    named = {}
    for item in items:
        named.setdefault(item.name, []).append(item)
    # Only names that occur twice: most reports have one speedrun, whose short names read best.
    for name, alike in named.items():
        if len(alike) == 1:
            continue
        for number, item in enumerate(alike, 1):
            above = item.folder.resolve().parent.name
            item.name = f"{above}: {name}"
            # Two folders out/a/rl/eval and out/b/rl/eval have the same name above them as well.
            others = [other for other in alike if other is not item]
            if any(other.folder.resolve().parent.name == above for other in others):
                item.name += f" ({number})"


def date_of(folder: Path, file: str) -> str:
    """Return the day on which a file was last written, for what has recorded none."""
    # A guess: a copy of the folder (cp without -p, git) has the day of the copy.
    written = datetime.fromtimestamp((folder / file).stat().st_mtime)
    return f"{written:%Y-%m-%d %H:%M}"


# ---- What can be compared


def comparisons(evals: list[Evaluation]) -> list[Comparison]:
    """Put evaluations together that share questions, and are alike in sampling.

    One that was named by --eval joins the others even if it sampled otherwise.
    """
    found: list[Comparison] = []
    for evaluation in evals:
        # The first stands for its comparison: all others of it share its questions, not each
        # other's.
        sharing = [c for c in found if share_questions(c.evals[0], evaluation)]
        alike = [c for c in sharing if is_sampled(c.evals[0]) == is_sampled(evaluation)]
        if not alike and evaluation.is_named:
            alike = sharing
        if not alike:
            alike = [Comparison()]
            found += alike
        # The first that fits: an evaluation that stood in two would be shown twice.
        alike[0].evals.append(evaluation)
    return found


def is_sampled(evaluation: Evaluation) -> bool:
    return bool(evaluation.config.get("temperature"))


def share_questions(a: Evaluation, b: Evaluation) -> bool:
    """Tell whether two evaluations asked the same set, or one of them a part of it."""
    if benchmark_of(a) != benchmark_of(b):
        return False
    # Ids are numbers in many sets: two sets may share some, and by chance even their truths.
    one = questions_and_truths(a)
    other = questions_and_truths(b)
    # More than half of the smaller: with --limit one may have been asked a part of the other's.
    return bool(one and other) and 2 * len(one & other) > min(len(one), len(other))


def benchmark_of(evaluation: Evaluation) -> str:
    """Return the name of the benchmark that was asked, without its task; "" of a data set."""
    # blink/Relative_Depth is a part of blink, so the two can be compared.
    name, _, _ = (evaluation.config.get("benchmark") or "").partition("/")
    return name


def questions_and_truths(evaluation: Evaluation) -> set[tuple[str, str]]:
    return {(row["question_id"], row["truth"]) for row in evaluation.rows}
