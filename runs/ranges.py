"""Print what each column of a run's metrics.jsonl was like, and write it into docs/metrics.md.

    python -m runs.ranges --run out/rl                  a table: column, start, end, 5 and 95 %
    python -m runs.ranges --run out/speedrun --write    and the cells "seen" of docs/metrics.md

start and end are the means of the first and the last tenth of the steps, 5 and 95 % the percentiles
of all steps; steps in which a column is null don't count. Times and rates are the machine's own and
are not written.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import flags
from errors import UserError, launch
from eval_table import COLUMNS, COUNTS
from training.recorded import read_config

PAGE = Path(__file__).parent.parent / "docs" / "metrics.md"
# A stage -> its folder in a speedrun, the first of these that is there: the long one of SFT.
STAGES = {"SFT": ("worked", "sft"), "RL": ("rl",)}
# Section of the page -> the stages that its names are columns of.
SECTIONS = {"Both scripts": ("SFT", "RL"), "train_sft.py": ("SFT",), "train_rl.py": ("RL",)}
EVAL = "eval.py"
# The eval whose table is shown, of those that the speedrun makes.
SHOWN = "eval-rl"
START = "<!-- ranges -->"
END = "<!-- end of ranges -->"
# \| is a bar within a cell.
CELL_BORDER = re.compile(r"(?<!\\)\|")
# "second" is in seconds, and in every rate per_second. lr and step are what the flags say.
MACHINES_OWN = re.compile("second|^lr$|^step$")


@dataclass
class Config:
    run: Path  # a run's folder; or that of a speedrun, with worked/, rl/ and eval-rl/
    write: bool = False  # into docs/metrics.md


# ---- A run's numbers


def rows_of(folder: Path) -> list[dict]:
    """Read metrics.jsonl of a run; UserError where there is none."""
    path = folder / "metrics.jsonl"
    try:
        lines = path.read_text().splitlines()
        rows = [json.loads(line) for line in lines]
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read: {error}") from error
    if not rows:
        raise UserError(f"{path} has no step yet")
    return rows


def runs_in(folder: Path) -> dict[str, list[dict]]:
    """Return stage -> rows: of the folder's own metrics.jsonl, else of a speedrun's stages."""
    if (folder / "metrics.jsonl").is_file():
        return {folder.name: rows_of(folder)}
    runs = {}
    for stage, names in STAGES.items():
        there = [name for name in names if (folder / name).is_dir()]
        # Where none is there, the error names the first.
        runs[stage] = rows_of(folder / (there or names)[0])
    return runs


def range_of(rows: list[dict], column: str) -> tuple[float, float, float, float] | None:
    """Return (start, end, 5 %, 95 %) of a column over the steps; None where it is always null."""
    values = [row[column] for row in rows if row.get(column) is not None]
    if not values:
        return None
    # A tenth, not one step: a step of RL sees a handful of prompts, and its reward jumps.
    tenth = max(len(values) // 10, 1)
    start = np.mean(values[:tenth])
    end = np.mean(values[-tenth:])
    # Not the extremes: one bad step of a thousand would be the whole range.
    low, high = np.quantile(values, (0.05, 0.95))
    return float(start), float(end), float(low), float(high)


def short(value: float) -> str:
    """Write three significant digits, with as many places as they need."""
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    if abs(value) < 1e-3:
        return f"{value:.1e}"
    return f"{value:.3g}"


def words(found: tuple[float, float, float, float] | None) -> str:
    """Write a range as the page has it: start -> end (5 to 95 %)."""
    if found is None:
        return "null"
    start, end, low, high = (short(value) for value in found)
    # A constant, such as a count of prompts, is written once.
    if start == end == low == high:
        return start
    return f"{start} -> {end} ({low} to {high})"


def columns_of(rows: list[dict]) -> list[str]:
    """Return the columns of all rows, in the order in which they first occur."""
    # A validation's columns are in some rows only.
    columns = {}
    for row in rows:
        columns |= dict.fromkeys(row)
    return list(columns)


def seen_in_run(rows: list[dict], name: str) -> str:
    """Return a column's range, by path where it has paths; empty where no row has it."""
    columns = columns_of(rows)
    # lor of lor_reward, but neither discarded of discarded_tokens nor val_lor of val_lor_reward.
    paths = sorted(column[: -len(name) - 1] for column in columns if column.endswith(f"_{name}"))
    paths = [path for path in paths if f"{path}_reward" in columns and "val" not in path]
    if paths:
        texts = []
        for path in paths:
            found = range_of(rows, f"{path}_{name}")
            if found is not None:
                texts.append(f"{path} {words(found)}")
        return "; ".join(texts) or "null"
    return words(range_of(rows, name)) if name in columns else ""


def seen_in_eval(summary: dict, heading: str) -> str:
    """Return a column of eval's table, by path."""
    metrics = {shown: metric for metric, shown in COLUMNS.items()}
    # As in the table: path -> task -> metric.
    texts = []
    for path, tasks in summary["results"].items():
        value = tasks["all"][metrics.get(heading, heading)]
        if heading in COUNTS:
            texts.append(f"{path} {value}")
        elif value is not None:
            texts.append(f"{path} {short(value['value'])}")
    return "; ".join(texts) or "-"


# ---- The page


def fill(page: str, runs: dict[str, list[dict]], summary: dict | None, said: str) -> str:
    """Write the cells "seen" of a page's tables, and what run that was between the marks."""
    before, mark, rest = page.partition(START)
    _, end, rest = rest.partition(END)
    if not mark or not end:
        raise UserError(f"{PAGE}: no lines {START} and {END}")
    lines = f"{before}{START}\n{said}\n{END}{rest}".split("\n")
    section = ""
    column = None
    for i, line in enumerate(lines):
        if line.startswith("## "):
            section = line.removeprefix("## ")
        cells = CELL_BORDER.split(line)
        if not line.startswith("|"):
            # Which cell is "seen" stands in a table's heading, and holds up to its last line.
            column = None
        elif column is None:
            column = cells.index(" seen ") if " seen " in cells else None
        elif line.startswith("| `"):
            text = seen(section, re.findall("`([^`]+)`", line)[0], runs, summary)
            if text:
                # A name that the run lacks keeps what the page says of an earlier run.
                cells[column] = f" {text} "
                lines[i] = "|".join(cells)
    return "\n".join(lines)


def seen(section: str, name: str, runs: dict[str, list[dict]], summary: dict | None) -> str:
    if section == EVAL:
        return seen_in_eval(summary, name) if summary else ""
    if MACHINES_OWN.search(name):
        return ""
    stages = SECTIONS.get(section, ())
    texts = []
    for stage in stages:
        text = seen_in_run(runs[stage], name)
        if text:
            # On a section of one stage its name would be said in every cell.
            texts.append(f"{stage} {text}" if len(stages) > 1 else text)
    return ", ".join(texts)


def describe(folder: Path, runs: dict[str, list[dict]]) -> str:
    """Say what run it was."""
    steps = " and ".join(f"{rows[-1]['step']:,} steps of {stage}" for stage, rows in runs.items())
    config = read_config(str(folder / "rl")) or {}
    return f"Seen in {folder.name}, seed {config.get('seed')}: {steps}."


def print_table(stage: str, rows: list[dict]) -> None:
    print(f"\n| {stage} | start | end | 5 % | 95 % |\n|---|---|---|---|---|")
    for column in columns_of(rows):
        found = range_of(rows, column)
        cells = ["null"] * 4 if found is None else [short(value) for value in found]
        print(f"| {column} | {' | '.join(cells)} |")


def main(cfg: Config) -> None:
    runs = runs_in(cfg.run)
    if cfg.write and runs.keys() != STAGES.keys():
        raise UserError(f"--write takes a speedrun's folder; {cfg.run} is one run")
    for stage, rows in runs.items():
        print_table(stage, rows)
    if cfg.write:
        path = cfg.run / SHOWN / "summary.json"
        summary = json.loads(path.read_text()) if path.is_file() else None
        PAGE.write_text(fill(PAGE.read_text(), runs, summary, describe(cfg.run, runs)))
        print(f"\n{PAGE}")


if __name__ == "__main__":
    launch("ranges", main, flags.parse(Config, __doc__))
