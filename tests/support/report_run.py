"""A folder like the speedrun's for report.py: two evaluations, an RL run, what it wrote."""

import base64
import json
import re
import zlib
from pathlib import Path

import pytest
from eval_set import stand_in, write_set
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import eval as evaluation
from srreal import target

HOSTILE = '<script>alert(1)</script><img src="http://x.y/z.png"> & </pre>'
STEPS = 8


def before(example) -> str:
    """Answer every other LOR question wrongly; put centres 0.15 m off."""
    odd = int(re.search(r"\d+", example.id)[0]) % 2
    if (example.path == "lor" and odd) or example.id.startswith("s5-order"):
        return f"<think>{HOSTILE}</think><answer>E</answer>"
    return target(example).replace("0.0,0.0,2.0", "0.15,0.0,2.0")


def after(example) -> str:
    """Answer all but the last question rightly."""
    return HOSTILE if example.id.startswith("s5-order") else target(example)


def write_evals(data: str, folder: Path, writers: dict, **options) -> None:
    """Run eval.py with stand-ins: folder's name -> what answers an example."""
    with pytest.MonkeyPatch.context() as patch:
        for name, write in writers.items():
            stand_in(patch, write)
            evaluation.main(evaluation.Config("m", (data,), out=str(folder / name), **options))


def write_run(folder: Path, data: str) -> None:
    """Write an RL run's log, and two completions of one prompt of each path in two of its steps."""
    (folder / "step-000008").mkdir(parents=True)
    config = {"script": "train_rl", "model": "m", "data": [data], "out": str(folder), "seed": 3}
    made = {"commit": "abc1234", "date": "2026-01-02 03:04 UTC"}
    (folder / "config.json").write_text(json.dumps(config | made))
    rows = []
    for i in range(1, STEPS + 1):
        by_path = dict(lor_reward=0.5 + i / 100, dtr_reward=0.6)
        rows.append(dict(step=i, seconds=60, loss=0.1, **by_path, reward=0.5, kl=None))
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    # The last line is still being written.
    (folder / "metrics.jsonl").write_text(lines + '{"step": 9, "lo')
    tokenizer = bytewise_tokenizer()
    tokenizer.save(str(folder / "step-000008" / "tokenizer.json"))
    samples = []
    for step in (2, 8):
        for path in ("dtr", "lor"):
            samples += [sample_row(tokenizer, step, path, i) for i in range(2)]
    (folder / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))


def bytewise_tokenizer() -> Tokenizer:
    """Return a tokenizer with a token a byte."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def sample_row(tokenizer, step: int, path: str, sample: int) -> dict:
    """Return a row of rollouts.jsonl; the second sample is the worse one."""
    box = '<detect>Find 1 relevant objects:\n<3d_box center="0.0,0.3,2.0">x (red bbox)</3d_box></detect>'
    text = f"<think>é {HOSTILE}</think>\n<answer>{2 + sample}.0</answer>"
    if path == "dtr":
        text = f"{box}\n{text}"
    tokens = tokenizer.encode(text).ids
    parts = {"accuracy": 1.0 - sample, "format": 1.0, "detect": 0.3}
    return dict(
        step=step,
        group=0,
        sample=sample,
        id=f"s0-distance-{path}",
        path=path,
        question="How far apart are the chair (red bbox <mask>) and the table (blue point <mask>)?",
        truth="2.0",
        text=text,
        tokens=tokens,
        logprobs=[-0.6931] * len(tokens),
        parts=parts,
        total=1.0 - 0.8 * sample,
        advantage=0.7071 - 1.4142 * sample,
        kept=True,
        finished=sample == 0,
    )


def write_speedrun(folder: Path) -> Path:
    data = write_set(folder / "set")
    write_evals(data, folder, {"eval-sft": before, "eval-rl": after})
    write_run(folder / "rl", data)
    return folder


def unpacked(page: str, name: str):
    """Return what the page's own scripts read from it."""
    (text,) = re.findall(rf'id="{name}">([^<]*)<', page)
    return json.loads(zlib.decompress(base64.b64decode(text)))
