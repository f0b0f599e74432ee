"""Geometry3K-shaped data through every script: README's command, SFT, RL and eval of them."""

import io
import json
import shlex
from pathlib import Path

import pyarrow as pa
import pytest
from commands import ROOT
from PIL import Image
from published import IMAGE, parquet

import eval as evaluation
import flags
import latex
import train_rl
import train_sft

# What Geometry3K's answers are: numbers, and texts in LaTeX (which need math-verify).
ANSWERS = ["12", "5.5", r"2 \sqrt { 221 }", "30", r"36 \pi", "7"]
SMALL = ["--max-pixels", "3136"]
FEW = ["--steps", "2", "--prompts", "4", "--group", "2", "--max-new-tokens", "4", *SMALL]


@pytest.fixture(scope="module")
def geometry3k(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sets") / "geometry3k"
    answers = [text for text in ANSWERS if latex.is_installed() or not latex.is_latex(text)]
    for split, count in (("train", 6), ("validation", 2), ("test", 3)):
        rows = []
        for k in range(count):
            Image.new("RGB", (64, 48), (40 * k, 90, 60)).save(out := io.BytesIO(), "PNG")
            rows.append(
                {
                    "images": [{"bytes": out.getvalue(), "path": None}],
                    "problem": f"<image>Find x. ({split} {k})",
                    "answer": answers[k % len(answers)],
                }
            )
        parquet(folder / "data" / f"{split}-0-of-1.parquet", rows, images=pa.list_(IMAGE))
    return folder


def rows_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def readme_command() -> list[str]:
    """The flags of the command in README that trains on a vqa set."""
    (line,) = [line for line in (ROOT / "README.md").read_text().splitlines() if "vqa:" in line]
    words = shlex.split(line.strip("` "))
    return words[words.index("train_rl.py") + 1 :]


def test_readmes_command_goes_from_files_to_grpo(geometry3k, tiny_home, tmp_path):
    words = [word.replace("geometry3k", str(geometry3k)) for word in readme_command()]
    words[words.index("--model") + 1] = str(tiny_home / "tiny")
    words[words.index("--out") + 1] = str(tmp_path / "run")
    train_rl.main(flags.parse(train_rl.Config, train_rl.__doc__, args=[*words, *FEW]))
    metrics = rows_of(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [1, 2]
    # Its own split alone is trained on, and another one validates.
    assert all("(train " in row["question"] for row in rows_of(tmp_path / "run" / "rollouts.jsonl"))
    assert metrics[0]["val0_lor_groups"] == metrics[-1]["val_lor_groups"] == 3
    assert (tmp_path / "run" / "step-000002" / "model.safetensors").exists()


def test_sft_then_rl_then_eval_on_both_paths(geometry3k, tiny_home, tmp_path, capsys):
    source = f"vqa:{geometry3k}"
    sft = ["--model", str(tiny_home / "tiny"), "--data", source, "--out", str(tmp_path / "sft")]
    sft += ["--steps", "2", "--batch", "4", *SMALL]
    train_sft.main(flags.parse(train_sft.Config, "", args=sft))
    assert "6 rows left out on path lor" in capsys.readouterr().out
    assert all(0 < row["loss"] < 100 for row in rows_of(tmp_path / "sft" / "metrics.jsonl"))

    model = str(tmp_path / "sft" / "step-000002")
    rl = ["--model", model, "--data", source, "--out", str(tmp_path / "rl"), "--filter", "none"]
    train_rl.main(flags.parse(train_rl.Config, "", args=[*rl, *FEW]))
    metrics = rows_of(tmp_path / "rl" / "metrics.jsonl")
    assert all(0 <= row[f"{p}_accuracy"] <= 1 for row in metrics for p in ("lor", "direct"))
    assert all(row["loss"] is not None for row in metrics)

    for path in ("direct", "lor"):
        ask = ["--model", str(tmp_path / "rl" / "step-000002"), "--data", f"{source},split=test"]
        ask += ["--path", path, "--max-new-tokens", "4", "--out", str(tmp_path / path), *SMALL]
        evaluation.main(flags.parse(evaluation.Config, "", args=ask))
        answers = rows_of(tmp_path / path / "predictions.jsonl")
        assert [row["path"] for row in answers] == [path] * 3
        assert {row["truth"] for row in answers} <= set(ANSWERS)
