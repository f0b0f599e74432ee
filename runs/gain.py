"""Print what a training has gained: LOR +x ± y, paired over the questions of two evals, in points.

    python -m runs.gain --before out/rl/eval-before --after out/rl/eval-after

Of the total reward, by path; standard errors by image, as everywhere (eval_table.py).
"""

import json
from dataclasses import dataclass
from pathlib import Path

import flags
from errors import UserError, launch
from eval_table import by_path, paired, points


@dataclass
class Config:
    before: Path  # a finished eval's folder
    after: Path  # another's, of the same questions

    def __post_init__(self):
        flags.check(self)


def main(cfg: Config) -> None:
    before = by_path(answers(cfg.before))
    after = by_path(answers(cfg.after))
    for path in before:
        # Same questions: what makes one hard is in both, and cancels.
        gain = paired(before[path], after.get(path, []), "total")
        if gain is None:
            raise UserError(f"{cfg.after}: it answers no question of {cfg.before} on path {path}")
        print(f"{path.upper()} {points(gain)}")


def answers(folder: Path) -> list[dict]:
    # eval.py writes it last: without it predictions.jsonl may be a part of the answers.
    if not (folder / "summary.json").exists():
        raise UserError(f"{folder}: there is no finished eval")
    return read_rows(folder / "predictions.jsonl")


def read_rows(file: Path) -> list[dict]:
    with open(file, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


if __name__ == "__main__":
    launch("gain", main, flags.parse(Config, __doc__))
