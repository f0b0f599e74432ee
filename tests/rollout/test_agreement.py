"""Eight steps of SFT and five of RL, on the references and on Triton (interpreted): the same
losses.

The kernels' own tests compare single calls. Here what one side rounds differently is fed back
twenty times: into weights, and in RL into what is sampled, where one other token would change
everything after it. The interpreter takes milliseconds an operation: hence one layer, short
questions and answers of one word.
"""

import json
import os
import subprocess
import sys

import pytest
import warm
from commands import ROOT
from interpreter import needs_interpreter

# A micro checkpoint, and short runs on it. The random model earns nothing: it is paid for its
# text's parity.
MAKE = """if True:
    import sys
    from pathlib import Path
    import model.tiny as tiny
    shape = tiny.tiny_shape("qwen3_vl")
    shape.scenes = 20
    shape.vocabulary = 1000
    shape.text["num_hidden_layers"] = 1
    tiny.write("qwen3_vl", Path(sys.argv[1]), shape=shape)"""
RUN = """if True:
    import json, sys
    import train_rl, train_sft
    from srreal import Scores
    def parity(text, example, rules):
        good = float(sum(text.encode()) % 2)
        return Scores(good, good, 0.0, 0.0)
    train_rl.score = parity
    script, options = {"sft": train_sft, "rl": train_rl}[sys.argv[1]], json.loads(sys.argv[2])
    script.main(script.Config(**options))"""
OPTIONS = {
    "sft": dict(batch=4, lr=1e-3, warmup=2),
    "rl": dict(
        prompts=2,
        group=2,
        updates=2,
        max_new_tokens=2,
        lr=1e-3,
        kl=0.05,
        clip_low=0.01,
        clip_high=0.02,
    ),
}
STEPS = {"sft": 8, "rl": 5}
# Seen over 20 steps: 8e-7 in a loss of 9, 5e-6 in a gradient norm of 12. AdamW may turn the
# rounding of a gradient near 0 into an update near lr, hence the room above that; a wrong formula
# leaves 1e-1.
TOLERANCE = 5e-5
COLUMNS = {
    "sft": ("loss", "loss_text", "grad_norm"),
    "rl": ("loss", "reward", "entropy", "kl", "clip_high", "ratio_max", "grad_norm"),
}


def python(*command, **environment):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | environment
    # The interpreter is chosen when Triton is imported.
    is_interpreted = environment.get("TRITON_INTERPRET") == "1"
    command = [sys.executable if is_interpreted else warm.python(), *command]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    python("-c", MAKE, str(home / "micro"))
    scenes = home / "scenes"
    python(
        "-m", "data.scenes", "--out", str(scenes), "--n", "8", "--seed", "1", "--size", "64", "64"
    )
    rows = [json.loads(line) for line in (scenes / "rows.jsonl").read_text().splitlines()]
    rows = [
        row | {"path": "direct"} for row in rows if row["path"] == "lor" and row["task"] == "depth"
    ]
    (scenes / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return home


@needs_interpreter
@pytest.mark.parametrize("script", OPTIONS)
def test_triton_and_references_train_alike(script, home):
    steps = STEPS[script]
    runs = {}
    for interpret in ("0", "1"):
        out = home / f"{script}-{interpret}"
        options = OPTIONS[script] | dict(
            model=str(home / "micro"), data=[str(home / "scenes")], out=str(out)
        )
        options |= dict(steps=steps, save_every=0)
        python("-c", RUN, script, json.dumps(options), TRITON_INTERPRET=interpret)
        runs[interpret] = [
            json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()
        ]
    assert len(runs["0"]) == len(runs["1"]) == steps
    for plain, triton in zip(runs["0"], runs["1"], strict=True):
        for name in COLUMNS[script]:
            if plain[name] is None:  # a step without an update
                assert triton[name] is None, f"step {plain['step']}: {name}"
                continue
            close = pytest.approx(plain[name], rel=TOLERANCE, abs=TOLERANCE)
            assert triton[name] == close, f"step {plain['step']}: {name}"
    assert len({row["loss"] for row in runs["0"]}) > steps // 2  # something was learnt
