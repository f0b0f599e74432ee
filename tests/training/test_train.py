"""Both training scripts, end to end on a tiny model: resuming, two ranks, what learns, what is
refused."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import warm
from commands import ROOT
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

import data
import eval as evaluation
import train_rl
import train_sft
from errors import UserError
from model import lora
from model.checkpoint import SpatialRecord, rename
from model.images import Prefetcher
from model.processor import Processor
from model.qwen_vl import QwenVL
from model.rollout import Engine, Rollout
from srreal import REWARDS, Example, Scores
from training import batches, checkpoints, policy, ranks, run
from training.metrics import Metrics
from training.optim import Optimizer

SCRIPTS = {"sft": train_sft, "rl": train_rl}
ONE = {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """These models are too small for two; and another number of threads adds in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def python(*command, **environment):
    command, environment = (
        [warm.python(), *map(str, command)],
        {**os.environ, **ONE, **environment},
    )
    environment = {name: str(value) for name, value in environment.items()}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def home(tiny_home, tmp_path_factory, one_thread):
    """A tiny checkpoint stored in bf16 (so that the masters matter on resuming), and scenes."""
    home = tmp_path_factory.mktemp("home")
    for name in ("tiny", "scenes"):
        shutil.copytree(tiny_home / name, home / name)
    weights = load_file(home / "tiny" / "model.safetensors")
    save_file(
        {k: v.bfloat16() for k, v in weights.items()},
        home / "tiny" / "model.safetensors",
        {"format": "pt"},
    )
    return home


def config(home, script, out, **options):
    common = {
        "model": str(home / "tiny"),
        "data": (str(home / "scenes"),),
        "out": str(out),
        "steps": 4,
        "save_every": 2,
    }
    own = {
        "sft": {"batch": 6, "lr": 1e-3, "warmup": 2},
        "rl": {"prompts": 4, "group": 3, "max_new_tokens": 6, "lr": 1e-3, "kl": 0.05},
    }[script]
    return SCRIPTS[script].Config(**{**common, **own, **options})


def fake_score(text, example, rules):
    """A random model never earns anything; this pays for the parity of the text, so that groups
    differ."""
    good = float(sum(text.encode()) % 2)
    return Scores(0.8 * good + 0.1 * (len(text) % 3), good, 0.0, 0.0)


@pytest.fixture(autouse=True)
def pay(monkeypatch):
    monkeypatch.setattr(train_rl, "score", fake_score)


def rows(out, drop=("second", "mib")):
    lines = (Path(out) / "metrics.jsonl").read_text().splitlines()
    parsed = [
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} in metrics.jsonl"))
        for line in lines
    ]
    return [{k: v for k, v in row.items() if not any(part in k for part in drop)} for row in parsed]


def tensors(step):
    files = sorted(Path(step).rglob("*.safetensors"))
    return {
        f"{path.relative_to(step)}:{k}": v for path in files for k, v in load_file(path).items()
    }


def assert_same_run(a, b, step="step-000004", few=100):
    assert rows(a) == rows(b)
    first, second = tensors(Path(a) / step), tensors(Path(b) / step)
    assert first.keys() == second.keys() and len(first) > few
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def whole(home):
    """An uninterrupted run of each script: the oracle of most tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_rl, "score", fake_score)
        for script, module in SCRIPTS.items():
            module.main(config(home, script, home / f"whole-{script}"))
    return {script: home / f"whole-{script}" for script in SCRIPTS}


def test_a_run_directory(whole):
    for script, out in whole.items():
        assert {p.name for p in out.iterdir()} == {
            "config.json",
            "metrics.jsonl",
            *(["rollouts.jsonl"] if script == "rl" else []),
            "step-000002",
            "step-000004",
        }
        table = rows(out, drop=())
        assert [row["step"] for row in table] == [1, 2, 3, 4]
        assert all(
            row["seconds"] > 0 and math.isfinite(row["loss"]) and row["grad_norm"] > 0
            for row in table
        )
        assert json.loads((out / "config.json").read_text())["save_every"] == 2
        folder = out / "step-000004"
        # no pickle
        assert {p.suffix for p in (folder / "trainer").iterdir()} == {".safetensors", ".json"}
        # as it came
        assert load_file(folder / "model.safetensors")["lm_head.weight"].dtype == torch.bfloat16
        assert (
            load_file(folder / "trainer" / "master.safetensors")["lm_head.weight"].dtype
            == torch.float32
        )
        QwenVL.from_pretrained(str(folder))


def test_sft_lowers_the_loss_of_its_first_batch(whole, home, tmp_path):
    train_sft.main(config(home, "sft", tmp_path, model=str(whole["sft"] / "step-000004"), steps=1))
    assert rows(tmp_path)[0]["loss"] < rows(whole["sft"])[0]["loss"] - 0.05


def test_rl_metrics_say_what_happened(whole):
    for row in rows(whole["rl"]):
        assert {
            f"{path}_{name}"
            for path in ("lor", "dtr")
            for name in (
                "reward",
                "accuracy",
                "format",
                "detect",
                "length",
                "truncated",
                "kept",
                "entropy",
                "kl",
            )
        } <= row.keys()
        assert row["reward"] == pytest.approx((row["lor_reward"] + row["dtr_reward"]) / 2)
        assert 0 < row["kept"] <= 1 and row["tokens"] <= row["sampled_tokens"] <= 4 * 3 * 6
        # One update a rollout: the policy is still the one that sampled.
        assert row["ratio_max"] == 1 and row["clip_low"] == row["clip_high"] == 0
        assert row["mismatch_max"] < 1e-4 and row["mismatch_kl"] < 1e-6
    first, last = rows(whole["rl"])[0], rows(whole["rl"])[-1]
    assert first["kl"] < 1e-9 < last["kl"]  # the reference is where the run began, and stays there


def test_what_learns(home, whole):
    start = dict(QwenVL.from_pretrained(str(home / "tiny"), dtype=torch.float32).named_parameters())
    for script, prefixes in (("sft", lora.TRAIN["all"]), ("rl", lora.TRAIN["lm"])):
        end = dict(
            QwenVL.from_pretrained(
                str(whole[script] / "step-000004"), dtype=torch.float32
            ).named_parameters()
        )
        changed = {name for name in start if not torch.equal(start[name], end[name])}
        assert changed and all(name.startswith(prefixes) for name in changed)
        for prefix in ("decoder.layers.0.", "decoder.embed_tokens.", "lm_head."):
            assert any(name.startswith(prefix) for name in changed)
    assert any(name.startswith("head3d.") for name in start)


@pytest.mark.parametrize("script", SCRIPTS)
def test_resume_is_the_run_that_never_stopped(home, whole, tmp_path, monkeypatch, script):
    interrupt(monkeypatch, home, script, tmp_path)
    SCRIPTS[script].main(config(home, script, tmp_path, resume=True))
    assert_same_run(tmp_path, whole[script])


class Killed(Exception):
    pass


def interrupt(monkeypatch, home, script, out, **options):
    """A run that ends in its last step, one behind its checkpoint."""

    def stop(optimizer, lr, clip_norm, loss, name, go_on=Optimizer.step):
        if name == "step 4":  # after the checkpoint of step 2 and the row of step 3
            raise Killed
        return go_on(optimizer, lr, clip_norm, loss, name)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Optimizer, "step", stop)
        # --resume without a checkpoint: from 0
        SCRIPTS[script].main(config(home, script, out, resume=True, **options))
    assert len(rows(out)) == 3


LORA = {"sft": {"train": "spatial", "lora": 4}, "rl": {"lora": 4}}


@pytest.mark.parametrize("script", SCRIPTS)
def test_adapters_learn_merge_and_resume(home, tmp_path, monkeypatch, script):
    SCRIPTS[script].main(config(home, script, tmp_path / "whole", **LORA[script]))
    folder = tmp_path / "whole" / "step-000004"
    start, end = (load_file(path / "model.safetensors") for path in (home / "tiny", folder))
    assert start.keys() == end.keys()  # merged: transformers loads it as it loaded the base
    moved = {name for name in start if not torch.equal(start[name], end[name])}
    assert moved and all(name.rsplit(".", 2)[-2] in lora.PROJECTIONS for name in moved)
    assert any("layers.1" in name for name in moved) and not any("visual" in name for name in moved)
    master = load_file(folder / "trainer" / "master.safetensors")
    assert any(name.endswith("q_proj.lora_b") for name in master)
    assert all(
        ".lora_" in name or script == "sft" and not name.startswith("decoder.") for name in master
    )
    name = next(name for name in moved if name.endswith("layers.0.self_attn.q_proj.weight"))
    a, b = (master[f"decoder.layers.0.self_attn.q_proj.lora_{x}"] for x in "ab")
    assert torch.equal(end[name], (start[name].float() + lora.SCALE * b @ a).bfloat16())
    theirs, report = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert torch.equal(theirs.get_parameter("lm_head.weight").bfloat16(), end["lm_head.weight"])
    interrupt(monkeypatch, home, script, tmp_path / "cut", **LORA[script])
    SCRIPTS[script].main(config(home, script, tmp_path / "cut", resume=True, **LORA[script]))
    assert_same_run(tmp_path / "cut", tmp_path / "whole", few=2 * 7 * 2)
    with pytest.raises(UserError, match="--lora 4, now it is 2"):
        options = LORA[script] | {"lora": 2}
        SCRIPTS[script].main(config(home, script, tmp_path / "cut", resume=True, **options))


@pytest.mark.parametrize("script", SCRIPTS)
def test_workers_change_no_bit(home, whole, tmp_path, monkeypatch, script):
    """A run with two, cut off, goes on with two; the oracle had none."""
    made, prefetch = [], Prefetcher.prefetch
    monkeypatch.setattr(
        Prefetcher,
        "prefetch",
        lambda self, wanted: (
            prefetch(self, wanted) or made.append((self.pool is not None, len(self.futures)))
        ),
    )
    interrupt(monkeypatch, home, script, tmp_path, workers=2)
    SCRIPTS[script].main(config(home, script, tmp_path, resume=True, workers=2))
    assert_same_run(tmp_path, whole[script])
    assert all(pool for pool, _ in made) and any(count for _, count in made)


def session(number: int) -> list[str]:
    """The command lines of a session's processes."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == number and fields[0] != "Z":
                found.append((folder / "cmdline").read_text())
    return found


def test_no_process_stays_behind_and_a_bad_image_is_named(home, tmp_path):
    """An image that was sound when the rows were read, and an interrupt, with workers at work."""
    shutil.copytree(home / "scenes", tmp_path / "scenes")
    flags = [
        "--model",
        home / "tiny",
        "--data",
        tmp_path / "scenes",
        "--batch",
        6,
        "--workers",
        2,
        "--steps",
        100_000,
        "--save-every",
        100_000,
    ]
    environment = {**os.environ, **ONE}

    def start(out):
        command = [sys.executable, "train_sft.py", *map(str, flags), "--out", str(tmp_path / out)]
        # an "&" turns it off
        heard = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            start_new_session=True,
            text=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            preexec_fn=heard,
        )

    def end(run, code):
        words = run.communicate(timeout=300)[1]
        deadline = time.time() + 60
        while session(run.pid) and time.time() < deadline:
            time.sleep(0.1)
        assert run.returncode == code and not session(run.pid) and "Traceback" not in words, words
        return words

    run = start("interrupted")
    log = tmp_path / "interrupted" / "metrics.jsonl"
    while not (log.exists() and log.read_text()) and run.poll() is None:
        time.sleep(0.05)
    assert any("forkserver" in command for command in session(run.pid))
    os.killpg(run.pid, signal.SIGINT)  # as a terminal does it
    assert "interrupted" in end(run, 130)

    # damaged, and not to be seen from outside
    for file in (tmp_path / "scenes" / "images").iterdir():
        state = file.stat()
        file.write_bytes(b"?" * state.st_size)
        os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    words = end(start("bad"), 2)
    assert (
        "image 0" in words
        and str(tmp_path / "scenes" / "images") in words
        and "cannot identify" in words
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_stops_an_eval_with_its_row(home, tmp_path, monkeypatch, workers):
    (tmp_path / "bad.png").write_bytes(b"?")
    row = Example("row 7", "direct", [str(tmp_path / "bad.png")], "How far?", "1")
    monkeypatch.setattr(data, "load", lambda *_, **options: [row])
    config = evaluation.Config(
        str(home / "tiny"), out=str(tmp_path), path="direct", workers=workers
    )
    with pytest.raises(UserError, match=r"row 7: image 0 .*bad\.png"):
        evaluation.main(config)


@pytest.mark.parametrize("script", SCRIPTS)
def test_checkpointing_changes_no_bit(home, whole, tmp_path, script):
    SCRIPTS[script].main(config(home, script, tmp_path, checkpointing="always"))
    assert_same_run(tmp_path, whole[script])


def test_the_reference_is_the_model_that_the_run_began_with(home):
    """Against a second model: the way round that we save."""
    cpu, example = torch.device("cpu"), Example("a", "lor", [], "Which is nearer?", "A")
    model, other = (policy.load_model(str(home / "tiny"), cpu, "lm") for _ in range(2))
    processor = Processor.from_pretrained(str(home / "tiny"))
    batch = processor([example], [[[5, 6, 7]]])
    reference = policy.Reference(model, Optimizer(model.named_parameters()))
    with torch.no_grad():
        for p in model.decoder.parameters():
            p.mul_(1.1)
        changed = {name: p.clone() for name, p in model.named_parameters()}
        apart = model(batch).logprob
        with reference:
            assert torch.equal(model(batch).logprob, other(batch).logprob)
        assert torch.equal(model(batch).logprob, apart) and not torch.equal(
            apart, other(batch).logprob
        )
    assert all(torch.equal(p, changed[name]) for name, p in model.named_parameters())


def test_resume_after_sigkill(home, whole, tmp_path):
    flags = [
        "--model",
        home / "tiny",
        "--data",
        home / "scenes",
        "--out",
        tmp_path,
        "--batch",
        6,
        "--lr",
        1e-3,
        "--warmup",
        2,
        "--steps",
        4,
        "--save-every",
        1,
    ]
    command = [sys.executable, "train_sft.py", *map(str, flags)]
    run = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | ONE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.time() + 120
    while (
        not list(tmp_path.glob("step-000002*")) and time.time() < deadline
    ):  # perhaps while it is being written
        time.sleep(0.005)
    run.send_signal(signal.SIGKILL)
    run.communicate()
    shutil.rmtree(tmp_path / "step-000004", ignore_errors=True)
    resumed = python("train_sft.py", *flags, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert_same_run(tmp_path, whole["sft"])


def test_resume_refuses_another_run(home, whole, tmp_path):
    out = shutil.copytree(whole["sft"], tmp_path / "run")
    with pytest.raises(UserError, match="--resume"):
        train_sft.main(config(home, "sft", out))
    with pytest.raises(UserError, match="--train all"):
        train_sft.main(config(home, "sft", out, resume=True, train="lm"))
    lines = (home / "scenes" / "rows.jsonl").read_text().splitlines()
    (home / "scenes" / "fewer.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    fewer = {"data": (str(home / "scenes" / "fewer.jsonl"),)}
    with pytest.raises(UserError, match="--data .*scenes, now it is .*fewer.jsonl"):
        train_sft.main(config(home, "sft", out, resume=True, **fewer))
    # Other rows in the place of the run's own, which has steps to go.
    shutil.rmtree(out / "step-000004")
    file = out / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fewer))
    with pytest.raises(UserError, match="rows, sha256"):
        train_sft.main(config(home, "sft", out, resume=True, **fewer))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_equal_those_of_the_padded_forward(home, checkpointing):
    """Groups behind one copy of their prompt, and of its image, against transformers on G rows of
    prompt and completion, padded; in fp64, but for the fp32 log-probs."""
    source = str(home / "tiny")
    ours, processor = (
        QwenVL.from_pretrained(source, dtype=torch.float64),
        Processor.from_pretrained(source),
    )
    theirs = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float64)
    row = next(e for e in data.load([str(home / "scenes")]) if e.images)
    examples = [
        replace(row, question="How far is it?", regions=(), depths=None, objects={}, path="lor"),
        Example("b", "lor", [], "How many are two and three?", "5"),
    ]
    completions = [[[21, 22, 23, 24], [31, 32], [41, 42, 43]], [[51, 52], [61, 62, 63, 64, 65]]]
    batch = processor(examples, completions)
    assert len(batch.input_ids) < 1.2 * sum(len(processor.prompt_ids(e)) for e in examples) + 30
    weights = torch.linspace(-1, 1, len(batch.targets), dtype=torch.float64)
    if checkpointing:
        ours.checkpoint_blocks()
    loss = (ours(batch).logprob * weights).sum()
    loss.backward()

    starts = [list(processor.prompt_ids(e)) for e in examples]
    rows = [start + c for start, own in zip(starts, completions, strict=True) for c in own]
    prompts = [len(start) for start, own in zip(starts, completions, strict=True) for _ in own]
    longest, pixels = max(map(len, rows)), batch.pixel_values.double()
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    logits = theirs(
        input_ids=ids,
        attention_mask=mask,
        pixel_values=pixels.repeat(3, 1),
        image_grid_thw=batch.image_grid_thw.repeat(3, 1),
        mm_token_type_ids=(ids == ours.config.image_token_id).int(),
    ).logits
    logprob = torch.cat(
        [
            logits[i, p - 1 : len(row) - 1]
            .log_softmax(-1)
            .gather(1, torch.tensor(row[p:])[:, None])[:, 0]
            for i, (row, p) in enumerate(zip(rows, prompts, strict=True))
        ]
    )
    wanted = (logprob * weights).sum()
    wanted.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    own, compared = dict(ours.named_parameters()), 0
    for name, p in theirs.named_parameters():
        if p.grad is not None and p.grad.abs().max() > 0:
            gap = (own[rename(name)].grad - p.grad).norm() / p.grad.norm()
            assert gap < 1e-5, (name, gap)
            compared += 1
    assert compared > 60


HANG = """\"""One rank does not come.\"""
import time
from dataclasses import dataclass
import flags
from training import ranks, run

@dataclass
class Config:
    out: str = ""

def main(cfg):
    rank, _, _ = ranks.start_ranks()
    ranks.phase("step 3, update")
    time.sleep(60 * rank)
    ranks.all_reduce([1.0])

if __name__ == "__main__":
    run.launch(main, flags.parse(Config, __doc__))
"""


def test_a_rank_that_waits_in_vain_says_where(tmp_path):
    (tmp_path / "hang.py").write_text(HANG)
    started = time.time()
    run = python(
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        tmp_path / "hang.py",
        PYTHONPATH=ROOT,
        RANK_TIMEOUT="5",
    )
    assert run.returncode != 0
    assert "hang.py: rank 0, step 3, update: the other ranks did not answer" in run.stderr
    assert "rank 0 has been at 'step 3, update' for 4 s" in run.stderr or time.time() - started > 60


# ---- Two ranks: the same numbers as one


def text_rows():
    return [
        Example(f"t{i}", "direct", [], f"How much is {i} and one?", str(i + 1)) for i in range(8)
    ]


def pay_dtr(text, example, rules):
    scores = fake_score(text, example, rules)
    return scores if example.path == "dtr" else Scores(0.0, 0.0, 0.0, 0.0)


def runs(home, out):
    """(script, config, what to patch) of each run that one and two ranks must agree on."""
    base = {"steps": 3, "save_every": 3, "shard": "always"}

    def half_text(cfg, _):
        """Step 1: three scene rows a rank. Step 2: text alone on the first rank, step 3: on the
        second."""
        scenes, text = data.load(cfg.data), text_rows()
        wanted = scenes[:6] + text[:3] + scenes[6:12] + text[3:6]
        places = batches.Order(range(18), cfg.seed).rows(0, 18)
        return [wanted[places.index(i)] for i in range(18)], scenes[:5]

    # Three rows a rank and step; the cut makes one, two or three micro-batches of them.
    yield (
        "sft",
        config(home, "sft", out / "text", micro_tokens=300, schedule="constant", **base),
        {
            (run, "load_data"): half_text,
            (train_sft, "images_key"): id,
            (ranks, "shard_contiguous"): lambda x, i, n: slice(
                i * len(x) // n, (i + 1) * len(x) // n
            ),
        },
    )
    # No row has a region; those of the dummies that two ranks pack are not on record as read.
    yield (
        "sft",
        config(home, "sft", out / "no-regions", **base),
        {(run, "load_data"): lambda cfg, _: (text_rows(), [])},
    )
    # A turn is one dtr and one lor prompt, a rank each: the second rank's groups are all filtered
    # out. cispo: the value of the other losses is about 0 while the ratio is 1 and the lengths are
    # equal.
    yield (
        "rl",
        config(home, "rl", out / "filtered", prompts=2, group=4, loss="cispo", **base),
        {(train_rl, "score"): pay_dtr},
    )
    more = dict(
        prompts=5, updates=2, train="all", micro_tokens=200, loss="grpo", eval_limit=3, **base
    )
    more["eval_data"] = (str(home / "scenes"),)
    yield "rl", config(home, "rl", out / "all", **more), {(train_rl, "score"): fake_score}
    whole = base | {"shard": "never"}  # each rank holds all of it, and its share of the data
    yield "sft", config(home, "sft", out / "replicas", optimizer="muon", **whole), {}
    whole = dict(prompts=5, updates=2, train="all", micro_tokens=200, **whole)
    yield "rl", config(home, "rl", out / "replicas-rl", **whole), {(train_rl, "score"): fake_score}
    # A rank is a box of its own, so that nothing is sharded within and all is replicated across.
    more = dict(prompts=5, micro_tokens=200, checkpointing="always", **base)
    yield (
        "rl",
        config(home, "rl", out / "boxes", **more),
        {(train_rl, "score"): fake_score, (os, "environ"): os.environ | {"LOCAL_WORLD_SIZE": "1"}},
    )
    more = dict(prompts=5, micro_tokens=200, lora=4, checkpointing="always", steps=3, save_every=3)
    for shard in ("always", "never"):
        name = f"lora-{shard}"
        yield (
            "rl",
            config(home, "rl", out / name, shard=shard, **more),
            {(train_rl, "score"): fake_score},
        )


def run_all(home, out):
    for script, cfg, patches in runs(home, out):
        with pytest.MonkeyPatch.context() as patch:
            for (module, name), value in patches.items():
                patch.setattr(module, name, value)
            SCRIPTS[script].main(cfg)


def record(folder):
    return SpatialRecord.read(folder / "step-000003")


def test_two_ranks_equal_one(home, tmp_path, capsys):
    ranks = python(
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        __file__,
        home,
        tmp_path / "two",
        PYTHONPATH=f"{ROOT}:{ROOT / 'tests' / 'support'}",
    )
    assert ranks.returncode == 0, ranks.stderr[-3000:]
    run_all(home, tmp_path / "one")
    for name in sorted(path.name for path in (tmp_path / "one").iterdir()):
        one, two = rows(tmp_path / "one" / name), rows(tmp_path / "two" / name)
        assert len(one) == len(two) == 3  # only rank 0 writes
        for a, b in zip(one, two, strict=True):
            assert a.keys() == b.keys()
            assert (a["loss"] is None) == (b["loss"] is None)  # a step without an update
            for key in [key for key in ("loss", "grad_norm", "tokens") if a[key] is not None]:
                # Gradients are summed in another order, and AdamW makes much of little.
                rel = 1e-5
                if key == "grad_norm":
                    rel = 3e-5 if a["step"] == 1 else 1e-4
                assert b[key] == pytest.approx(a[key], rel=rel, abs=2e-6), (name, a["step"], key)
        first, second = (
            tensors(tmp_path / "one" / name / "step-000003"),
            tensors(tmp_path / "two" / name / "step-000003"),
        )
        assert record(tmp_path / "one" / name) == record(tmp_path / "two" / name)
        assert first.keys() == second.keys()
        for key in (key for key in first if "master" in key):
            torch.testing.assert_close(first[key], second[key], rtol=1e-3, atol=2e-3)
    # on another number of ranks
    longer = {"steps": 4, "schedule": "constant"}
    cfg = config(home, "sft", tmp_path / "two" / "text", resume=True, **longer)
    with pytest.MonkeyPatch.context() as patch:
        for (module, name), value in next(runs(home, tmp_path))[2].items():
            patch.setattr(module, name, value)
        train_sft.main(cfg)
    assert len(rows(tmp_path / "two" / "text")) == 4 and "not to the bit" in capsys.readouterr().out


# ---- The parts of GRPO


def graded(*groups):
    """Groups whose completions have given (accuracy, format), and their row of metrics."""
    example, rollout = Example("a", "lor", [], "?", "A"), Rollout("", [1], [0.0], True)
    prompt = train_rl.Prompt(example, 0)
    out = []
    for group in groups:
        out.append(train_rl.Group(prompt, [rollout] * len(group)))
        for accuracy, form in group:
            out[-1].scores.append(Scores(0.8 * accuracy + 0.2 * form, accuracy, form, 0.0))
    train_rl.add_advantages(out, torch.device("cpu"))
    metrics = Metrics(["lor"], list(REWARDS))
    train_rl.add_scores(metrics, out, is_kept=lambda group: group.differs)
    return out, metrics.row()


@pytest.mark.parametrize("limit, each", [(0, 5), (256, 5), (10, 3), (3, 1), (1, 1)])
def test_validation_asks_as_many_of_each_path(capsys, limit, each):
    paths = ["direct", "dtr", "lor"]
    rows = [Example(f"{path} {i}", path, [], "?", "A") for path in paths for i in range(5)]
    rows += [Example(f"more {i}", "lor", [], "?", "A") for i in range(4)]
    exam = train_rl.validation_prompts(rows, limit)
    assert Counter(prompt.example.path for prompt in exam) == dict.fromkeys(paths, each)
    assert len({prompt.example.id for prompt in exam}) == 3 * each
    train_rl.say_exam(exam, rows, limit)
    said = capsys.readouterr().out
    assert f"{each} of 5 direct, {each} of 5 dtr, {each} of 9 lor" in said
    assert ("--eval-limit" in said) == (limit > 0)


def test_a_changed_weight_reaches_the_advantages():
    example = Example("a", "dtr", [], "?", "A", objects={"red bbox": (0.0, 0.0, 2.0)})
    rollout = Rollout("", [1], [0.0], True)
    group = train_rl.Group(train_rl.Prompt(example, 0), [rollout] * 2)
    # Both right and well-formed, only one near: the totals differ by the weight of detect.
    group.scores = [Scores(1.0, 1.0, 1.0, 1.0), Scores(0.7, 1.0, 1.0, 0.0)]
    train_rl.add_advantages([group], torch.device("cpu"), "none", {"detect": 0.3})
    assert group.advantages == pytest.approx([0.15, -0.15])


def test_advantages_and_filter():
    (split, alone, equal, near, boxes), row = graded(
        [(1, 1.0), (0, 1.0), (0, 1.0), (1, 1.0)],
        [(1, 0.7)],
        [(1, 0.7), (1, 0.7)],
        [(0.5, 0), (0.5 + 1e-7, 0)],
        [(1, 1.0), (1, 0.5)],
    )
    std = math.sqrt(4 * 0.4**2 / 3)  # unbiased
    assert split.advantages == pytest.approx([x / (std + 1e-6) for x in (0.4, -0.4, -0.4, 0.4)])
    assert alone.advantages == [0.0] and equal.advantages == [0.0, 0.0]
    assert [g.differs for g in (split, alone, equal, near)] == [True, False, False, False]
    assert not boxes.differs  # the boxes differ, the answers don't: nothing to learn
    totals = [1.0, 0.2, 0.2, 1.0, 0.94, 0.94, 0.94, 0.4, 0.4, 1.0, 0.9]
    assert row["kept"] == 0.2 and row["reward"] == pytest.approx(sum(totals) / 11)
    assert graded()[1]["kept"] == 0.0
    # Of a path that a step has not asked, nothing was measured.
    assert graded()[1]["lor_kept"] is None


def test_prompts_alternate_between_the_paths():
    examples = [
        Example(f"{path}{i}", path, [], "?", "A") for i in range(10) for path in ("lor", "dtr")
    ]
    prompts = train_rl.PromptOrder(examples, 0)
    chosen = [(prompts[i].turn, prompts[i].example) for i in range(40)]
    assert [e.path for _, e in chosen] == ["dtr", "lor"] * 20 and [
        turn for turn, _ in chosen[:6]
    ] == [
        0,
        0,
        1,
        1,
        2,
        2,
    ]
    for epoch in (chosen[:20], chosen[20:]):
        assert len({e.id for _, e in epoch}) == 20
    again = train_rl.PromptOrder(examples, 0)[33]
    assert (again.turn, again.example) == chosen[33]
    alone = train_rl.PromptOrder(examples[::2], 0)
    assert {alone[i].example.path for i in range(5)} == {"lor"}


def test_no_kept_group_means_no_update(home, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        train_rl, "score", lambda text, example, rules: Scores(0.1 * (len(text) % 5), 1.0, 0.0, 0.0)
    )
    train_rl.main(config(home, "rl", tmp_path, steps=2))
    assert [
        (row["loss"], row["kept"], row["tokens"], row["grad_norm"]) for row in rows(tmp_path)
    ] == [(None, 0, 0, None)] * 2
    assert all(row["entropy"] is row["kl"] is row["ratio_max"] is None for row in rows(tmp_path))
    assert "no update" in capsys.readouterr().out
    before, after = (
        load_file(home / "tiny" / "model.safetensors"),
        load_file(tmp_path / "step-000002" / "model.safetensors"),
    )
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("loss", ["dapo", "grpo", "dr_grpo", "gspo", "cispo"])
def test_the_cut_into_micro_batches_changes_nothing(home, tmp_path, loss):
    for budget in (30, 100_000):  # 30: even a group is split, its prompt repeated
        few = {"steps": 1, "prompts": 2, "max_new_tokens": 4, "micro_tokens": budget, "seed": 1}
        train_rl.main(config(home, "rl", tmp_path / str(budget), loss=loss, **few))
    (small,), (large,) = (rows(tmp_path / str(budget)) for budget in (30, 100_000))
    for key in ("loss", "grad_norm", "tokens", "entropy", "lor_entropy"):
        assert small[key] == pytest.approx(large[key], rel=1e-5, abs=1e-6), key


def test_an_update_makes_good_completions_likelier(home, tmp_path, monkeypatch):
    cfg = config(home, "rl", tmp_path, steps=1, kl=0.0, group=8, lr=3e-4)
    seen = []

    def remember(micros, spare, go_on=batches.equalize_passes):
        seen.extend(one for one in micros if isinstance(one, train_rl.MicroBatch))
        return go_on(micros, spare)

    monkeypatch.setattr(train_rl, "equalize_passes", remember)
    train_rl.main(cfg)
    model = QwenVL.from_pretrained(str(tmp_path / "step-000001"), dtype=torch.float32)
    with torch.no_grad():
        gains = [train_rl.forward(model, one, 1.0, None)[0] - one.old_logprob for one in seen]
    owners = [one.advantage.repeat_interleave(one.cu_seqlens.diff()) for one in seen]
    assert seen and sum((a * gain).sum() for a, gain in zip(owners, gains, strict=True)) > 0


def test_tries_go_on_in_prompt_order_until_enough_groups_differ(home, tmp_path, monkeypatch):
    """Of eight prompts the third and the fourth have groups that differ; two are wanted."""
    seen = []

    def scores(text, example, rules="strict"):
        seen.append(example.id)
        turn = list(dict.fromkeys(seen)).index(example.id)
        good = float(len(seen) % 2) if turn in (2, 3) else 1.0
        return Scores(good, good, 1.0, 0.0)

    monkeypatch.setattr(train_rl, "score", scores)
    cfg = config(home, "rl", tmp_path, prompts=2, group=3, tries=4, slots=2)
    model, processor = QwenVL.from_pretrained(cfg.model), run.load_processor(cfg.model, cfg)
    prompts = [train_rl.Prompt(e, i) for i, e in enumerate(data.load(cfg.data)[:8])]
    train_rl.encode(prompts, processor)
    engine = Engine(model, processor, n=3, max_new_tokens=cfg.max_new_tokens, slots=2)
    result = train_rl.roll_out(engine, prompts, cfg, seed=0, wanted=2)
    # One slot had been refilled, or both.
    assert result.discarded_samples <= 2 and result.discarded_samples <= result.discarded_tokens
    assert [g.example.id for g in result.groups] == [prompt.example.id for prompt in prompts[:4]]
    seen.clear()
    result = train_rl.roll_out(engine, prompts, cfg, seed=0, wanted=3)
    assert len(result.groups) == 8  # there are only two that differ
    assert result.discarded_samples == result.discarded_tokens == 0


def test_several_updates_move_the_ratio(home, tmp_path):
    train_rl.main(config(home, "rl", tmp_path, steps=1, updates=2, lr=1e-2, filter="none"))
    (row,) = rows(tmp_path)
    # the second update is off-policy, and `old` is from before the first
    assert row["ratio_max"] > 1.001


# ---- What is refused


def test_a_loss_that_explodes_stops_the_run(home, tmp_path):
    with pytest.raises(FloatingPointError, match=r"step \d+: the loss is"):
        train_sft.main(
            config(home, "sft", tmp_path, lr=1e20, clip_norm=1e30, warmup=0, steps=9, save_every=1)
        )
    last = sorted(tmp_path.glob("step-*"))[-1]
    assert checkpoints.newest(tmp_path) == last and len(rows(tmp_path)) == int(last.name[-6:])


def test_rows_without_a_target_are_refused_or_counted(home, tmp_path, capsys):
    lines = [
        json.loads(line) for line in (home / "scenes" / "rows.jsonl").read_text().splitlines()[:12]
    ]
    lines[3].pop("rationale")
    (home / "scenes" / "bad.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = {"data": (str(home / "scenes" / "bad.jsonl"),), "steps": 1}
    with pytest.raises(data.BadRows) as bad:
        train_sft.main(config(home, "sft", tmp_path, **options))
    assert [row[:3] for row in bad.value.rows] == [
        (str(home / "scenes" / "bad.jsonl"), 4, "target")
    ]
    train_sft.main(config(home, "sft", tmp_path, skip_bad_rows=True, **options))
    assert "skipped 1 of 12" in capsys.readouterr().out


def test_the_command_line_in_words_and_exit_codes(home, tmp_path):
    (home / "scenes" / "broken.jsonl").write_text('{"id": "a"\n{"id": "b", "path": "lor"}\n')
    good = {
        "--model": home / "tiny",
        "--data": home / "scenes",
        "--out": tmp_path / "out",
        "--steps": 1,
    }
    broken = home / "scenes" / "broken.jsonl"
    for script, change, word in (
        ("train_sft.py", {"--data": broken}, "broken.jsonl"),
        ("train_rl.py", {"--model": tmp_path / "nowhere"}, "nowhere"),
        ("train_rl.py", {"--kll": 0.1}, "--kl"),
    ):
        run = python(script, *(str(x) for pair in (good | change).items() for x in pair))
        assert (
            run.returncode == 2
            and word in run.stderr + run.stdout
            and "Traceback" not in run.stderr
        ), run.stderr


def scripts(home, tmp_path, *changes):
    """Each script by its command line, with (flag, value) changes; RL and SFT take one step."""
    common = {"--model": home / "tiny", "--data": home / "scenes", "--out": tmp_path / "out"}
    for script, own in (
        ("train_sft.py", {"--steps": 1}),
        ("train_rl.py", {"--steps": 1}),
        ("eval.py", {}),
    ):
        flags = common | own | dict(changes)
        yield script, [str(x) for pair in flags.items() for x in pair]


@pytest.mark.parametrize("case", ["empty", "torn", "nothing"])
def test_bad_input_by_the_command_line(home, tmp_path, case):
    """One line, exit code 2: an empty file, whatever the script, a torn checkpoint, no row that is
    left."""
    tiny = shutil.copytree(home / "tiny", tmp_path / "tiny")
    (tmp_path / "empty.json").touch()
    (tiny / "spatial.safetensors").write_bytes((tiny / "spatial.safetensors").read_bytes()[:100])
    change, word = {
        "empty": (("--data", tmp_path / "empty.json"), "empty.json:0: row: empty file"),
        "torn": (("--model", tiny), "spatial.safetensors"),
        "nothing": (("--data", f"{home / 'scenes'},path=direct"), ""),
    }[case]
    wanted = {"torn": "train_rl.py", "nothing": "eval.py"}.get(case)
    for script, flags in scripts(home, tmp_path, change):
        if wanted not in (None, script):
            continue
        run = python(script, *flags)
        said = run.stderr + run.stdout
        assert run.returncode == 2 and word in said and "Traceback" not in said, (script, said)


def test_what_another_rank_alone_knows_is_said():
    code = """'A script.'
import flags
import train_sft
from training import ranks, run
def main(cfg):
    from errors import UserError
    raise UserError("row 7")
run.launch(main, flags.parse(train_sft.Config, __doc__))
"""
    run = python("-c", code, "--model", "m", "--data", "d", "--out", "o", RANK=1)
    assert run.returncode == 2 and "row 7" in run.stderr and "Traceback" not in run.stderr


def test_a_bad_image_is_named_by_the_rank_that_reads_it(home, tmp_path):
    lines = (home / "scenes" / "rows.jsonl").read_text().splitlines()
    for name in ("images", "depth"):
        shutil.copytree(home / "scenes" / name, tmp_path / name)
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    data.load([str(tmp_path)])  # remembered as sound
    (image,) = {row["images"][0] for row in map(json.loads, lines[-1:])}
    broken, state = tmp_path / image, os.stat(tmp_path / image)
    broken.write_bytes(b"x" * state.st_size)
    os.utime(broken, ns=(state.st_atime_ns, state.st_mtime_ns))
    run = python(
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        2,
        "train_rl.py",
        "--model",
        home / "tiny",
        "--data",
        tmp_path,
        "--out",
        tmp_path / "out",
        "--steps",
        1,
        "--prompts",
        len(lines),
    )
    assert run.returncode != 0 and "train_rl.py: s1-" in run.stderr, run.stderr
    assert 'train_rl.py", line' not in run.stderr and Path(image).name in run.stderr, run.stderr


def test_old_checkpoints_keep_their_weights_alone(home, whole, tmp_path):
    train_sft.main(config(home, "sft", tmp_path, save_every=1, keep=2))
    kept = [(step / "trainer").exists() for step in sorted(tmp_path.glob("step-*"))]
    assert kept == [False, False, True, True]
    assert all((step / "model.safetensors").exists() for step in tmp_path.glob("step-*"))
    assert_same_run(tmp_path, whole["sft"])


if __name__ == "__main__":
    run_all(*map(Path, sys.argv[1:]))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
