"""Every diff of docs/fork.md, applied to a copy of the tree, does what the page promises."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commands import QUIET, ROOT

PAGE = (ROOT / "docs" / "fork.md").read_text()
NOT_COPIED = ("__pycache__", ".*", "out", "runs", "bench", "shared", "assets", "*.png")
TIMEOUT = 120  # seconds; a fork takes less than ten on an idle machine


def diff_of(title: str) -> str:
    """Return the diff in the section of the page with that title."""
    section = PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]
    (diff,) = re.findall(r"```diff\n(.*?)```", section, re.S)
    return diff


def fork(title: str, folder: Path) -> Path:
    """Copy the tree and apply the diff of a section; return the copy."""
    copy = folder / "fork"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*NOT_COPIED))
    # Not the repository that this tree may lie in: the copy has none.
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.resolve())}
    done = subprocess.run(
        ["git", "apply", "-"],
        cwd=copy,
        input=diff_of(title),
        env=environment,
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    return copy


def run(copy: Path, *command, **environment: str) -> str:
    """Run `python COMMAND` in the copy; return what it printed."""
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=copy,
        env=os.environ | QUIET | {"PYTHONPATH": str(copy)} | environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=TIMEOUT,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def train_and_eval(copy: Path, home: Path, out: Path, path: str, *flags) -> tuple[dict, list[str]]:
    """Return the row of metrics.jsonl and what was printed, by lines."""
    printed = run(copy, "tests/fork_run.py", home, out, path, *flags)
    (row,) = (out / "rl" / "metrics.jsonl").read_text().splitlines()
    return json.loads(row), printed.splitlines()


def cell(printed: list[str], line: str, column: str) -> str:
    """Return a cell of eval's table by the names of its line and its column."""
    start = next(i for i, text in enumerate(printed) if text.strip().startswith("n  "))
    heading = printed[start]
    (row,) = (text for text in printed[start + 1 :] if text.split()[:1] == [line])
    end = heading.index(f" {column} ") + len(f" {column}")
    return row[:end].split()[-1]


REWARD = """
import srreal
example = srreal.Example("e", "lor", ["a.png"], "Is it near?", "B")
for words, expected in ((3, 1.0), (150, 0.5), (400, 0.0)):
    text = f"<think>{' so' * words}</think><answer>B</answer>"
    scores = srreal.score(text, example)
    assert scores.parts == {"accuracy": 1, "format": 1, "detect": 0, "brevity": expected}, scores
    assert abs(scores.total - (0.9 + 0.1 * expected)) < 1e-12, scores
assert srreal.score("B", example).parts["brevity"] == 0
"""


def test_a_reward_is_scored_logged_and_shown(tiny_home, tmp_path):
    copy = fork("A reward", tmp_path)
    run(copy, "-c", REWARD)
    row, printed = train_and_eval(copy, tiny_home, tmp_path, "lor")
    assert row["lor_brevity"] == row["brevity"] and 0 <= row["brevity"] <= 1
    assert re.fullmatch(r"\d\.\d{3}(±\d\.\d{3})?", cell(printed, "LOR", "brevity"))
    answers = (tmp_path / "eval" / "predictions.jsonl").read_text().splitlines()
    assert all("brevity" in json.loads(answer) for answer in answers)


PATH = """
import srreal
example = srreal.Example(
    "e", "plan", ["a.png"], "Is it near?", "B", objects={"red bbox": (0, 0, 1)}, rationale="so"
)
text = srreal.target(example)
assert text.splitlines()[0] == "<plan>Look at red bbox</plan>", text
assert "<plan>the objects to look at</plan>" in srreal.prompt(example)
assert srreal.score(text, example).total == 1.0
assert srreal.parse(text, "plan").sections["plan"] == "Look at red bbox"
bad = "<think><plan></think><answer>B</answer>"
assert not srreal.parse(bad, "lor").well_formed
"""


def test_a_path_is_written_trained_and_asked(tiny_home, tmp_path):
    copy = fork("A path", tmp_path)
    run(copy, "-c", PATH)
    row, printed = train_and_eval(copy, tiny_home, tmp_path, "plan")
    assert {"plan_reward", "plan_accuracy", "plan_format", "plan_kl"} <= row.keys()
    assert cell(printed, "PLAN", "n") == "2"
    assert re.fullmatch(r"\d\.\d{3}(±\d\.\d{3})?", cell(printed, "PLAN", "accuracy"))


@pytest.mark.parametrize("title", ["A reward", "A path"])
def test_the_tests_of_the_registries_stay_green(title, tmp_path):
    """No test freezes a list that a fork has to extend."""
    copy = fork(title, tmp_path)
    names = "fields or weights or named or unpack or round_trip or target or prompt or fork or earn"
    run(copy, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_srreal.py", "-k", names)
