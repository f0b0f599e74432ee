"""Print a run's row of docs/leaderboard.md, and what it lacks to be an entry.

    python -m runs.leaderboard --run out/speedrun
    python -m runs.leaderboard --run out/seed-0 out/seed-1 out/seed-2     three seeds: the median

The time is the sum of `seconds` over the steps of every metrics.jsonl in the folder: rl/ is RL, the
others are stages of SFT. The accuracies are those of eval-rl/summary.json, in per cent.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import flags
from errors import UserError, launch
from runs.ranges import rows_of

GOAL = 85.0  # per cent, on each path
# A part of the test could be chosen to be easy.
QUESTIONS = 1022  # of the test, on each path
SEEDS = 3


@dataclass
class Config:
    run: tuple[Path, ...]  # folders of runs/speedrun.sh, a seed each


@dataclass
class Entry:
    folder: Path
    sft: float  # seconds of training
    rl: float
    accuracy: dict[str, float]  # path -> per cent
    questions: dict[str, int]  # path -> how many were asked

    @property
    def seconds(self) -> float:
        return self.sft + self.rl


def read(folder: Path) -> Entry:
    """Read a run; UserError where a file of it is missing."""
    path = folder / "eval-rl" / "summary.json"
    try:
        results = json.loads(path.read_text())["results"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} can't be read: {error!r}") from error
    accuracy = {}
    questions = {}
    for name, tasks in results.items():
        # Strict accuracy: a right answer in a wrong form is 0.
        accuracy[name] = 100 * tasks["all"]["accuracy"]["value"]
        questions[name] = tasks["all"]["n"]
    rl = seconds_of(folder / "rl")
    sft = 0.0
    # Those of the speedrun's stages that a run has; runs/claims.sh trains more in the same folder.
    for stage in ("read", "worked", "sft"):
        if (folder / stage / "metrics.jsonl").exists():
            sft += seconds_of(folder / stage)
    return Entry(folder, sft, rl, accuracy, questions)


def seconds_of(run: Path) -> float:
    return sum(row["seconds"] for row in rows_of(run))


def missing(entries: list[Entry]) -> list[str]:
    """Say what keeps these runs from being an entry."""
    found = []
    for entry in entries:
        for path in ("lor", "dtr"):
            if entry.questions.get(path) != QUESTIONS:
                asked = entry.questions.get(path, 0)
                found.append(f"{entry.folder}: {asked} questions on {path}, not {QUESTIONS}")
            # Every seed has to reach the goal, not their mean.
            elif entry.accuracy[path] < GOAL:
                found.append(f"{entry.folder}: {entry.accuracy[path]:.1f} on {path}, not {GOAL:g}")
    if len(entries) < SEEDS:
        found.append(f"{len(entries)} of {SEEDS} seeds")
    return found


def row(entries: list[Entry]) -> str:
    """Write the row: the median run's time, and every accuracy's median."""
    # Of an even number the slower of the middle two: a run, and no mean of two.
    middle = sorted(entries, key=time_of)[len(entries) // 2]
    time = f"{middle.seconds / 60:.1f} min (SFT {middle.sft / 60:.1f}, RL {middle.rl / 60:.1f})"
    accuracies = []
    for path in ("lor", "dtr"):
        # Medians one by one: the middle run in time need not be that in accuracy.
        known = [entry.accuracy[path] for entry in entries if path in entry.accuracy]
        accuracies.append(f"{median(known):.1f}" if known else "")
    return f"| {time} | | {' | '.join(accuracies)} | {len(entries)} | | |"


def time_of(entry: Entry) -> float:
    return entry.seconds


def main(cfg: Config) -> None:
    if not cfg.run:
        raise UserError("--run names no folder")
    entries = [read(folder) for folder in cfg.run]
    print(row(entries))
    for sentence in missing(entries):
        print(f"missing: {sentence}")


if __name__ == "__main__":
    launch("leaderboard", main, flags.parse(Config, __doc__))
