"""Both loops and eval on a tiny Qwen3.5: gated delta nets from the first step to a resumed run."""

import json
from pathlib import Path

import pytest
import torch

import eval as evaluation
import train_rl
import train_sft
from model import tiny

TIMES = ("seconds", "per_second", "peak_memory")


@pytest.fixture(scope="module")
def home(tmp_path_factory, tiny_home):
    """A checkpoint of one delta layer and one that attends, and rooms."""
    folder = tmp_path_factory.mktemp("qwen3_5")
    shape = tiny.tiny_shape("qwen3_5")
    shape.scenes = 20
    shape.vocabulary = 1000
    shape.text |= dict(num_hidden_layers=2, layer_types=["linear_attention", "full_attention"])
    tiny.write("qwen3_5", folder / "tiny", shape=shape)
    (folder / "scenes").symlink_to(tiny_home / "scenes")
    return folder


def rows(out: Path) -> list[dict]:
    """metrics.jsonl without times."""
    found = []
    for line in (out / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        found.append({k: v for k, v in row.items() if not any(word in k for word in TIMES)})
    return found


def sft(home, out, **changes):
    flags = dict(steps=6, batch=4, lr=1e-3, save_every=3, schedule="constant", warmup=0)
    data = (str(home / "scenes" / "rows.jsonl"),)
    config = train_sft.Config(str(home / "tiny"), data, str(out), **flags | changes)
    train_sft.main(config)


def rl(home, out, **changes):
    flags = dict(steps=4, prompts=2, group=4, max_new_tokens=3, filter="none", save_every=2)
    data = (str(home / "scenes" / "numbers.jsonl"),)
    config = train_rl.Config(
        str(home / "tiny"), data, str(out), **flags | changes, kl=0.05, lr=1e-3
    )
    train_rl.main(config)


@pytest.mark.parametrize("train, half", [(sft, 3), (rl, 2)])
def test_a_resumed_run_is_the_run_that_never_stopped(train, half, home, tmp_path):
    torch.set_num_threads(1)
    train(home, tmp_path / "whole")
    train(home, tmp_path / "parts", steps=half)
    train(home, tmp_path / "parts", resume=True)
    whole = rows(tmp_path / "whole")
    assert whole == rows(tmp_path / "parts") and len(whole) == 2 * half
    last = f"step-{2 * half:06d}"
    for file in ("model.safetensors", "spatial.safetensors", "trainer/master.safetensors"):
        a, b = ((tmp_path / run / last / file).read_bytes() for run in ("whole", "parts"))
        assert a == b, file
    if train is rl:
        assert max(row["mismatch_max"] for row in whole) < 1e-4


def test_eval_asks_it_on_both_paths(home, tmp_path):
    config = evaluation.Config(
        str(home / "tiny"),
        data=(str(home / "scenes"),),
        out=str(tmp_path / "eval"),
        limit=3,
        max_new_tokens=4,
        again=0,
    )
    summary = evaluation.main(config)
    assert summary["results"].keys() == {"lor", "dtr"}
    assert len((tmp_path / "eval" / "predictions.jsonl").read_text().splitlines()) == 6
