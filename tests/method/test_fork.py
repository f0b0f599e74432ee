"""Every diff of docs/fork.md, applied to a copy of the tree, does what the page promises."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import warm
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
    python = sys.executable if "TRITON_INTERPRET" in environment else warm.python()
    done = subprocess.run(
        [python, *map(str, command)],
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
    printed = run(copy, "tests/support/fork_run.py", home, out, path, *flags)
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
official = srreal.score(text.replace("<answer>B", "<answer>2"), example, rules="official")
assert official.parts == {"accuracy": 0, "format": 1, "detect": 0, "brevity": 0}, official
official = srreal.score("<think>so</think><answer>B</answer>", example, rules="official")
assert official.total == 1.0 and official.parts["brevity"] == 1, official
"""


def test_a_reward_is_scored_logged_and_shown(tiny_home, tmp_path):
    copy = fork("A reward", tmp_path)
    run(copy, "-c", REWARD)
    row, printed = train_and_eval(copy, tiny_home, tmp_path, "lor")
    assert row["lor_brevity"] == row["brevity"] and 0 <= row["brevity"] <= 1
    assert re.fullmatch(r"\d\.\d{3}(±\d\.\d{3})?", cell(printed, "LOR", "brevity"))
    answers = (tmp_path / "eval" / "predictions.jsonl").read_text().splitlines()
    assert all("brevity" in json.loads(answer) for answer in answers)
    run(copy, "report.py", "--run", tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert re.search(r"<td>brevity\b", page) and 'id="about-brevity"' in page


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


LOSS = """
import pytest
import torch
from kernels.policy_loss import policy_loss
logprob = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
advantage = torch.tensor([1.0, -0.5])
starts = torch.tensor([0, 2, 3])
old = logprob.detach() - 3.0  # a ratio of 20, which nothing clips
loss, metrics = policy_loss(logprob, old, advantage, starts, kind="reinforce", fused=False)
loss.backward()
assert abs(loss.item() - (1.0 + 2.0 - 0.25) / 3) < 1e-6, loss
assert torch.allclose(logprob.grad, torch.tensor([-1.0, -1.0, 0.5]) / 3)
assert metrics["clip_high"] == metrics["clip_low"] == 0
"""
REFUSED = """
import pytest
import torch
from kernels.policy_loss import policy_loss
one = torch.zeros(1)
with pytest.raises(ValueError, match="reinforce.*--no-fused-loss"):
    policy_loss(one, one, one, torch.tensor([0, 1]), kind="reinforce")
"""


def test_a_loss_is_trained_by_its_reference_and_refused_by_the_kernel(tiny_home, tmp_path):
    copy = fork("A loss", tmp_path)
    run(copy, "-c", LOSS)
    run(copy, "-c", REFUSED, TRITON_INTERPRET="1")
    # All answers of a random model are wrong: no group differs, so all have to be kept.
    flags = ["--loss", "reinforce", "--no-fused-loss", "--filter", "none"]
    row, _ = train_and_eval(copy, tiny_home, tmp_path, "lor", *flags)
    assert row["loss"] is not None and row["entropy"] > 0


DATA_SET = """
import json, sys
from pathlib import Path
import pytest
from PIL import Image
import data
folder = Path(sys.argv[1])
Image.new("RGB", (40, 30)).save(folder / "a.png")
good = {"image": "a.png", "question": "Near?", "answer": "yes"}
rows = [good, {"image": "a.png", "answer": "no"}]
(folder / "qa.jsonl").write_text("\\n".join(map(json.dumps, rows)))
with pytest.raises(data.BadRows) as bad:
    data.load([f"qa:{folder}"])
assert bad.value.rows == [(str(folder / "qa.jsonl"), 2, "question", "missing")]
(example,) = data.load([f"qa:{folder}"], skip_bad_rows=True)
assert (example.path, example.question, example.answer) == ("lor", "Near?", "yes")
"""


def test_a_data_set_is_read_and_checked(tmp_path):
    copy = fork("A data set", tmp_path)
    run(copy, "-c", DATA_SET, tmp_path)


BENCHMARK = """
import json, sys
from pathlib import Path
from PIL import Image
import eval as evaluation
import tyro
folder, model = map(Path, sys.argv[1:])
Image.new("RGB", (40, 30)).save(folder / "a.png")
row = {"image": "a.png", "question": "Where is it?", "options": ["table", "shelf"], "room": "x"}
rows = [row | {"answer": "A"}, row | {"answer": "B"}]
(folder / "test.jsonl").write_text("\\n".join(map(json.dumps, rows)))
flags = ["--model", str(model), "--data", str(folder), "--benchmark", "kitchen", "--path", "lor"]
flags += ["--max-new-tokens", "4", "--out", str(folder / "out")]
summary = evaluation.main(tyro.cli(evaluation.Config, args=flags))
assert set(summary["benchmark"]["lor"]) == {"official", "robust"}
from data import benchmarks
(first, second) = benchmarks.load("kitchen", folder, "lor")
assert first.question.endswith("\\nA. table\\nB. shelf") and first.task == "x"
marks = benchmarks.score("kitchen", [(first, "a cup"), (second, "C")], scorer="official")
assert marks["overall"] == marks["x"] == 50.0
"""


def test_a_benchmark_is_asked_and_scored(tiny_home, tmp_path):
    copy = fork("A benchmark", tmp_path)
    printed = run(copy, "-c", BENCHMARK, tmp_path, tiny_home / "tiny").splitlines()
    (heading,) = (line for line in printed if line.startswith("kitchen lor"))
    assert "official" in heading and "Qwen2.5-VL-7B (its paper)" in heading
    (overall,) = (line for line in printed if line.startswith("  overall"))
    assert overall.split()[-1] == "61.2"


FAMILY = """
import json, shutil, sys
from pathlib import Path
from transformers import AutoConfig, Qwen3VLConfig
from model.processor import Processor
from model.qwen_vl import QwenVL
from model.rollout import generate
from srreal import Example
from PIL import Image
class LabConfig(Qwen3VLConfig):
    model_type = "lab_vl"
AutoConfig.register("lab_vl", LabConfig)
tiny, copy = map(Path, sys.argv[1:])
shutil.copytree(tiny, copy)
config = json.loads((copy / "config.json").read_text())
(copy / "config.json").write_text(json.dumps(config | {"model_type": "lab_vl"}))
image = Image.new("RGB", (64, 48))
regions = [(0, (0, 0, 64, 48))]
example = Example("e", "lor", [image], "Is it (red bbox <mask>) near?", "B", regions=regions)
texts = []
for folder in (tiny, copy):
    processor = Processor.from_pretrained(folder, regions="text")
    texts.append(processor.decode(processor.prompt_ids(example)))
    model = QwenVL.from_pretrained(folder)
    ((answer,),) = generate(model, processor, [example], max_new_tokens=3, temperature=0.0)
    assert len(answer.tokens) <= 3
assert "1000" in texts[0] and "1000" not in texts[1], texts
"""


def test_a_family_loads_and_answers(tiny_home, tmp_path):
    copy = fork("A model family", tmp_path)
    run(copy, "-c", FAMILY, tiny_home / "tiny", tmp_path / "lab")


@pytest.mark.parametrize("title", ["A reward", "A path"])
def test_the_tests_of_the_registries_stay_green(title, tmp_path):
    """No test freezes a list that a fork has to extend."""
    copy = fork(title, tmp_path)
    names = "fields or weights or named or unpack or round_trip or target or prompt or fork or earn"
    run(
        copy,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/method/test_srreal.py",
        "-k",
        names,
    )
