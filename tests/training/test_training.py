"""training/ without a model: data order, cuts, checkpoints on disk, the log, and the words of
errors."""

import gc
import json
import math
import os
import subprocess
import time
from collections import Counter
from dataclasses import dataclass, fields, replace
from itertools import product
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import warm
from PIL import Image
from torch.distributed.tensor import DTensor

import data
import flags
import plan
import train_rl
import train_sft
from data.marks import Marked
from errors import UserError
from kernels.policy_loss import policy_loss
from model import lora
from model.files import check_files
from model.processor import Processor
from model.qwen_vl import QwenVL
from model.rollout import Rollout
from model.tiny import SPECIAL, configuration, write
from srreal import Example, Scores
from training import batches, checkpoints, folder, optim, policy, ranks, run


def test_bad_rows_of_both_data_flags_come_in_one_list(tmp_path):
    for name in ("train", "held_out"):
        (tmp_path / f"{name}.jsonl").write_text("{torn\n")
    paths = [str(tmp_path / f"{name}.jsonl") for name in ("train", "held_out")]
    with pytest.raises(data.BadRows) as bad:
        run.load_data(SimpleNamespace(data=paths[:1], eval_data=paths[1:], skip_bad_rows=False))
    assert [row[:3] for row in bad.value.rows] == [(path, 1, "row") for path in paths]


def test_control_tokens_in_a_row_are_named_before_the_first_step(tmp_path):
    Image.new("RGB", (32, 24)).save(tmp_path / "a.png")
    row = {"path": "direct", "images": ["a.png"], "question": "What?", "answer": "1"}
    box = "<|box_start|>(1,2),(3,4)<|box_end|>"
    odd = [{"question": "A<|im_end|>B"}, {"answer": "<|image_pad|>"}, {"answer": box}]
    lines = [json.dumps(row | change | {"id": str(i)}) for i, change in enumerate(odd)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    with pytest.raises(data.BadRows) as bad:
        data.load([tmp_path])
    assert [(number, field) for _, number, field, _ in bad.value.rows] == [
        (1, "question"),
        (2, "answer"),
    ]
    with pytest.raises(data.BadRows) as bad:  # what else a user of the rows can't use
        data.load([tmp_path], more=lambda e: [("target", "none")] if e.id == "2" else [])
    assert [row[1:3] for row in bad.value.rows] == [(1, "question"), (2, "answer"), (3, "target")]


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_torn_tokenizer_file_is_named(tmp_path, name):
    for file in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        (tmp_path / file).write_text("{}" if file != name else '{"model": ')
    with pytest.raises(ValueError, match=f"/{name}: not the JSON"):
        check_files(tmp_path)


def test_order_is_an_epoch_a_time_in_runs_and_a_pure_function():
    keys = [i // 10 for i in range(50)]  # 5 images of 10 questions
    order = batches.Order(keys, seed=3, run=4)
    epoch = order.rows(0, 50)
    assert sorted(epoch) == list(range(50)) and epoch != order.rows(50, 50)
    runs = [keys[row] for row in epoch]
    changes = sum(a != b for a, b in zip(runs, runs[1:], strict=False))
    assert changes <= 5 * 3  # each image has runs of 4, 4 and 2, shuffled
    assert sorted(order.rows(50, 50)) == list(range(50))
    again = batches.Order(keys, seed=3, run=4)
    assert sum((again.rows(i, 7) for i in range(0, 105, 7)), []) == order.rows(0, 105)
    # no history needed
    assert order.rows(120, 5) == batches.Order(keys, seed=3, run=4).rows(120, 5)
    assert order.rows(0, 50) == epoch  # and going back is fine
    assert batches.Order(range(50), seed=4).rows(0, 50) != batches.Order(range(50), seed=5).rows(
        0, 50
    )


def test_shares_tile_and_cuts_obey_the_budget():
    for count in range(9):
        for world in (1, 2, 3, 8):
            weights = [1 + 7 * i % 5 for i in range(count)]
            hands = [ranks.shard_by_length(weights, rank, world) for rank in range(world)]
            assert sorted(sum(hands, [])) == list(range(count))
            assert all(hand == sorted(hand) for hand in hands)
            shares = [
                range(count)[ranks.shard_contiguous(weights, rank, world)] for rank in range(world)
            ]
            assert [row for share in shares for row in share] == list(range(count))
            heavy = [sum(weights[row] for row in share) for share in shares]
            assert max(heavy) <= sum(weights) / world + max(weights, default=0)
            dealt = [sum(weights[row] for row in hand) for hand in hands]
            assert max(dealt) - min(dealt) <= max(weights, default=0)
    alternating = [4.0, 1.0] * 32  # whoever takes each other row has all the long ones
    for world in (2, 8):
        dealt = [
            sum(alternating[row] for row in ranks.shard_by_length(alternating, r, world))
            for r in range(world)
        ]
        assert max(dealt) <= 1.1 * min(dealt)
    lengths = [5, 5, 5, 30, 1, 1, 9]
    cuts = [lengths[part] for part in batches.pack_by_tokens(lengths, 11)]
    assert cuts == [[5, 5], [5], [30], [1, 1, 9]] and batches.pack_by_tokens([], 11) == []


def test_the_filler_stands_only_where_ranks_need_it():
    text = Example("a", "direct", [], "What?", "1")
    assert not batches.needs_dummy([text], 1)
    assert batches.needs_dummy([text], 2)
    assert not batches.needs_dummy([batches.dummy_example()], 2)


def fake_checkpoint(out, step, size=3):
    folder = out / f"step-{step:06d}"
    (folder / "trainer").mkdir(parents=True)
    (folder / "model.safetensors").write_text("x" * size)
    (folder / "trainer" / "state.json").write_text(
        json.dumps({"step": step, "files": {"model.safetensors": 3}})
    )
    return folder


def test_the_newest_whole_checkpoint(tmp_path, capsys):
    assert checkpoints.newest(tmp_path) is None
    good = fake_checkpoint(tmp_path, 9)
    assert checkpoints.newest(tmp_path) == good
    fake_checkpoint(tmp_path, 10, size=2)  # a file cut short
    (fake_checkpoint(tmp_path, 11) / "model.safetensors").unlink()  # a file gone
    (fake_checkpoint(tmp_path, 12) / "trainer" / "state.json").write_text("{")  # no record
    (tmp_path / "step-000013.partial").mkdir()  # killed while writing
    assert checkpoints.newest(tmp_path) == good
    said = capsys.readouterr().out
    for name in ("step-000010", "step-000011", "step-000012", "step-000013.partial"):
        assert name in said
    assert "step-000009" not in said


@dataclass
class Config:
    out: str = ""  # the run's directory
    steps: int = 3  # how many
    micro_tokens: int = 10  # tokens
    resume: bool = False  # go on
    seed: int = 0


def test_a_new_run_does_not_mix_with_an_old_one(tmp_path):
    fake_checkpoint(tmp_path, 9)
    with pytest.raises(UserError, match="--resume"):
        checkpoints.find_start(Config(str(tmp_path)))
    found, done = checkpoints.find_start(Config(str(tmp_path), resume=True))
    assert found.name == "step-000009" and done == 9
    new = Config(str(tmp_path / "new"), resume=True)
    assert checkpoints.find_start(new) == (None, 0)
    folder.write_config(new)
    assert json.loads((tmp_path / "new" / "config.json").read_text())["steps"] == 3


def test_log_keeps_rows_up_to_the_checkpoint(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        "".join(json.dumps({"step": i, "loss": 1.0}) + "\n" for i in range(1, 5))
        + '{"step": 5, "lo'
    )
    run.Log(Config(str(tmp_path), resume=True), 3, {"loss": ".1f"})({"step": 4, "loss": 2.0})
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and rows[-1]["loss"] == 2.0
    assert "loss 2.0" in capsys.readouterr().out
    path.write_text('{"step": 1, "loss": 1.0}\n{"ste')  # killed before the first checkpoint
    run.Log(Config(str(tmp_path), resume=True), 0, {"loss": ".1f"})
    assert path.read_text() == ""
    run.Log(Config(str(tmp_path)), 0, {"loss": ".1f"})  # a new run starts a new file
    assert path.read_text() == ""


def test_a_metric_that_is_not_finite_is_null_and_said(tmp_path, capsys):
    """A loss that isn't ends the run before: training/optim.py."""
    log = run.Log(Config(str(tmp_path)), 0, {"loss": ".1f", "kl": ".1f"})
    log({"step": 1, "loss": 0.5, "kl": math.nan, "ratio_max": math.inf, "tokens": 7})
    log({"step": 2, "loss": 0.5, "kl": 0.0})
    first, second = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert first == {"step": 1, "loss": 0.5, "kl": None, "ratio_max": None, "tokens": 7}
    assert second == {"step": 2, "loss": 0.5, "kl": 0.0}
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "step 1: kl is nan, ratio_max is inf; null in metrics.jsonl"
    assert said[1:] == ["loss 0.5  kl nan", "loss 0.5  kl 0.0"]


def last_words(monkeypatch, error, argv=()):
    """(message, exit code) of a run whose main raises `error`."""
    said = []

    def end(message, code):
        said.append((message, code))
        raise SystemExit(code)

    def main(cfg):
        raise error

    monkeypatch.setattr(run, "end", end)
    monkeypatch.setattr("sys.argv", ["train.py", *argv])
    with pytest.raises(SystemExit):
        run.launch(main, flags.parse(Config, __doc__))
    return said[0]


def test_errors_that_a_user_can_mend_are_words_and_exit_codes(monkeypatch, tmp_path):
    rows = [("a.jsonl", 3, "images", "a.png: no such file"), ("b.jsonl", 1, "answer", "is empty")]
    message, code = last_words(monkeypatch, data.BadRows(rows))
    assert code == 2 and "--skip-bad-rows" in message
    assert all(part in message for row in rows for part in map(str, row))
    assert last_words(monkeypatch, UserError("no such thing")) == ("train.py: no such thing", 2)
    for error in (
        torch.OutOfMemoryError("CUDA out of memory."),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
    ):
        message, code = last_words(monkeypatch, error, ["--micro-tokens", "123"])
        assert code == 1 and "--micro-tokens (now 123)" in message
    fake_checkpoint(tmp_path, 5)
    message, code = last_words(
        monkeypatch, FloatingPointError("step 7: nan"), ["--out", str(tmp_path)]
    )
    assert code == 1 and "step 7" in message and "step-000005" in message
    assert last_words(monkeypatch, KeyboardInterrupt())[1] == 130
    monkeypatch.setattr("sys.argv", ["train.py"])
    with pytest.raises(RuntimeError, match="a bug"):  # what only we can mend keeps its traceback
        run.launch(lambda cfg: (_ for _ in ()).throw(RuntimeError("a bug")), Config())


def test_unknown_flags_fail_with_the_nearest_name(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train.py", "--step", "3"])
    with pytest.raises(SystemExit) as stop:
        flags.parse(Config, __doc__)
    captured = capsys.readouterr()
    assert stop.value.code == 2 and "--steps" in captured.out + captured.err


def test_fingerprint_sees_rows_and_order():
    rows = [Example(str(i), "lor", [], "?", "A") for i in range(3)]
    other = [Example(str(i), "dtr", [], "?", "A") for i in range(3)]
    prints = Counter(map(checkpoints.fingerprint, (rows, other, rows[::-1], rows[:2], list(rows))))
    assert sorted(prints.values()) == [1, 1, 1, 2]
    # What is asked and answered, too: a set may be made again under the same ids.
    for change in ({"question": "!"}, {"answer": "B"}, {"rationale": "So."}):
        changed = [*rows[:2], replace(rows[2], **change)]
        assert checkpoints.fingerprint(changed) != checkpoints.fingerprint(rows)


# ---- Images made ahead


def sharpen(image, by):
    return image.point([min(255, by * v) for v in range(256)] * 3)


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    write("qwen3_vl", folder)
    return folder


@pytest.fixture
def asked(tmp_path):
    """Examples of files, objects, marks drawn when opened, depth with and without a camera."""
    rng, images = np.random.default_rng(0), []
    for k in range(4):
        images.append(Image.fromarray(rng.integers(0, 256, (48 + 32 * k, 96, 3), np.uint8)))
        images[k].save(tmp_path / f"{k}.png")
    Image.fromarray(rng.integers(0, 5000, (48, 96)).astype(np.uint16)).save(tmp_path / "depth.png")
    files, depth = [str(tmp_path / f"{k}.png") for k in range(4)], rng.random((80, 96), np.float32)
    region, ask = {"regions": [(0, (8, 8, 40, 40))]}, "Where is it <mask>?"
    return [
        Example("a", "lor", files[:2], "Which?", "A"),
        Example("b", "lor", [Marked(files[2], sharpen, (("by", 2),))], ask, "A", **region),
        Example(
            "c",
            "lor",
            files[:1],
            ask,
            "A",
            depths=[str(tmp_path / "depth.png")],
            intrinsics=[(90.0, 90.0, 48.0, 24.0)],
            **region,
        ),
        Example("d", "lor", [images[1]], ask, "A", depths=[depth], **region),
        Example("e", "lor", [], "How many?", "1"),
        Example("f", "lor", [files[3]], "How far?", "1"),
    ]


def same(a, b) -> bool:
    pairs = [(getattr(a, f.name), getattr(b, f.name)) for f in fields(a) if f.compare]
    return all(
        torch.equal(x.nan_to_num(-1), y.nan_to_num(-1)) if torch.is_tensor(x) else x == y
        for x, y in pairs
    )


def test_batches_are_the_same_with_workers_and_these_made_the_images(tiny_folder, asked):
    plain = Processor.from_pretrained(tiny_folder)
    busy = Processor.from_pretrained(tiny_folder, workers=2)
    completions = [[[5, 6, 7]]] * len(asked)
    wanted = plain(asked, completions)
    busy.prefetch(asked)
    for future in busy.images.prefetcher.futures.values():
        future.result()
    assert len(busy.images.prefetcher.futures) == 6
    busy.images.prefetcher.make = None  # in line nothing can be made any more
    assert same(busy(asked, completions), wanted) and same(busy(asked, completions), wanted)
    assert (
        busy.images.assumed_fov == plain.images.assumed_fov == 1
        and not busy.images.prefetcher.futures
    )
    busy.prefetch([])
    assert not busy.images.views.items and busy.images.views.bytes == 0


def test_what_is_expected_is_made_once_and_then_let_go(tiny_folder, asked):
    processor, made = Processor.from_pretrained(tiny_folder), []
    make = processor.images.prefetcher.make
    processor.images.prefetcher.make = lambda *args: made.append(args) or make(*args)
    processor.images.views.max_bytes = 0  # nothing is remembered for its own sake
    marked = asked[1:2]
    for expected, times in ((False, 3), (True, 4), (True, 4), (False, 7)):
        processor.prefetch(marked if expected else [])
        if len(made) == times:
            assert len(processor.images.views.items) == 1  # the next step asks for it again
        processor.prompt_ids(marked[0]), processor(marked), processor(marked)
        assert len(made) == times


def test_a_bad_image_has_the_same_words_and_a_dead_worker_costs_time_only(
    tiny_folder, asked, tmp_path, capsys
):
    (tmp_path / "bad.png").write_bytes(b"?")
    bad = [
        Example("row 7", "lor", [str(tmp_path / name)], "?", "A")
        for name in ("bad.png", "gone.png")
    ]
    busy = Processor.from_pretrained(tiny_folder, workers=2)
    busy.prefetch([*asked, *bad])
    for example in bad:
        with pytest.raises(ValueError, match="row 7: image 0 .*") as here:
            Processor.from_pretrained(tiny_folder)([example])
        with pytest.raises(ValueError) as there:
            busy([example])
        assert str(here.value) == str(there.value) and example.images[0] in str(here.value)
    for worker in busy.images.prefetcher.pool._processes.values():
        worker.kill()
        worker.join()
    wanted = Processor.from_pretrained(tiny_folder)(asked)
    for _ in range(2):
        busy.prefetch(asked)
        assert same(busy(asked), wanted)
        busy.prefetch([])
    assert capsys.readouterr().err.count("done in line") == 1
    odd = replace(asked[1], images=[Marked(asked[0].images[0], lambda image: image)])
    fresh = Processor.from_pretrained(tiny_folder, workers=1)
    fresh.prefetch([odd])
    assert len(fresh([odd]).pixel_values) and "pickle" in capsys.readouterr().err


def test_no_more_than_so_many_wait_to_be_asked_for(tiny_folder, tmp_path):
    files = [str(tmp_path / f"{k}.png") for k in range(9)]
    for k, file in enumerate(files):
        Image.new("RGB", (40, 40), (k, k, k)).save(file)
    rows = [Example(file, "lor", [file], "?", "A") for file in files]
    processor = Processor.from_pretrained(tiny_folder, workers=1)
    processor.images.prefetcher.max_ahead = 3
    processor.prefetch(rows)
    for k, row in enumerate(rows):
        assert [key[0][0] for key in processor.images.prefetcher.futures] == files[k : k + 3]
        processor([row])


def test_one_thing_is_made_while_the_one_before_is_used():
    made = []
    coming = batches.prefetched(lambda k: made.append(k) or 10 * k, range(5))
    for k in range(5):
        assert next(coming) == 10 * k
        deadline = time.time() + 30
        while len(made) < min(k + 2, 5) and time.time() < deadline:
            time.sleep(0.01)
        assert made == list(range(min(k + 2, 5)))
    assert next(coming, None) is None and list(batches.prefetched(int, "")) == []
    with pytest.raises(ZeroDivisionError):
        list(batches.prefetched(lambda k: 1 / k, [2, 1, 0]))


def test_workers_on_a_gpu_share_the_cores_and_a_cpu_keeps_its_own(monkeypatch):
    asked = []
    monkeypatch.setattr(
        Processor, "from_pretrained", lambda source, **options: asked.append(options)
    )
    monkeypatch.setattr(run.os, "sched_getaffinity", lambda _: set(range(24)))
    for cuda, near, flag, wanted in (
        (False, 1, None, 0),
        (True, 1, None, 8),
        (True, 4, None, 5),
        (True, 24, None, 0),
        (True, 1, 3, 3),
        (False, 1, 3, 3),
    ):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(near))
        run.load_processor("", SimpleNamespace(max_pixels=None, regions="token", workers=flag))
        assert asked.pop()["workers"] == wanted


@dataclass
class Run:
    model: str = "m"
    train: str = "lm"
    lora: int = 0
    shard: str = "auto"
    checkpointing: str = "auto"
    micro_tokens: int = 4096


def test_auto_is_what_the_plan_chooses(monkeypatch, capsys):
    """Keep what fits, else recompute the blocks, else cut as well; whatever a flag fixes stays."""
    config = configuration("qwen3_vl", {token: 900 + i for i, token in enumerate(SPECIAL)})
    config.text_config.num_hidden_layers = 40
    cpu = torch.device("cpu")

    def settle(gigabytes, world=1, **flags):
        pages = {"SC_PHYS_PAGES": int(gigabytes * 1e9) * world, "SC_PAGE_SIZE": 1}
        with monkeypatch.context() as patch:
            patch.setattr(run.os, "sysconf", pages.get)
            s = run.resolve_auto_settings(
                Run(**flags), config, cpu, world, prompts=0, group=1, new_tokens=64, kl=0.0
            )
        return s.shard, s.checkpointing

    cfg = plan.Config("", 1, group=1, new_tokens=64, kl=0.0, dtype="fp32")
    counts = plan.count(config, "lm", 0)
    options = {c: plan.Settings(False, c, 0, 4096) for c in (False, True)}
    need = {c: plan.estimate(config, cfg, s, counts)["peak"] for c, s in options.items()}
    enough = {c: gb / (1 - plan.RESERVE[1]) + plan.RESERVE[0] + 0.01 for c, gb in need.items()}
    assert enough[True] + 0.5 < enough[False]
    assert settle(enough[False]) == (False, False) == settle(enough[False], world=2)
    assert settle(enough[True]) == (False, True) == settle(enough[True], world=2)
    assert settle(99, checkpointing="always") == (False, True)
    assert settle(99, world=2, shard="always") == (True, False)
    assert capsys.readouterr().out == ""
    assert settle(1.0, world=2) == (True, True) and "memory may run out" in capsys.readouterr().out
    assert settle(1.0, world=2, shard="never", checkpointing="never") == (False, False)


# ---- Two ranks: the loss and the gradients of one


@pytest.fixture
def checkpoint(tiny_home):
    return str(tiny_home / "tiny")


def fixed_groups():
    """2 to 5 completions of 1 to 9 tokens each: with image, depth and region; with an image; of
    text."""
    rng, groups = np.random.default_rng(0), []
    image = Image.fromarray(rng.integers(0, 255, (96, 128, 3), np.uint8))
    examples = [
        replace(batches.dummy_example(), path="lor"),
        Example("1", "lor", [image], "What is near?", "a"),
        Example("2", "lor", [], "How much is two and one?", "3"),
        Example("3", "lor", [], "Why?", "b"),
    ]
    for i, example in enumerate(examples):
        lengths = rng.integers(1, 10, 2 + i)
        rollouts = [
            Rollout("", rng.integers(30, 900, n).tolist(), rng.normal(-6, 1, n).tolist(), True)
            for n in lengths
        ]
        advantages = rng.normal(0, 1, len(lengths)).tolist()
        groups.append(train_rl.Group(train_rl.Prompt(example, i), rollouts, advantages=advantages))
    return groups


# Which groups each of two ranks has: unequally many, text alone on the first, none left on the
# second.
SHARES = {"uneven": [[0, 1, 2], [3]], "text": [[2, 3], [0, 1]], "filtered": [[0, 1, 2, 3], []]}


def gradients(source, share, dtype, shard):
    """(loss, full gradients by name) of the fixed groups in passes of at most 90 tokens, over all
    ranks."""
    rank, world, device = ranks.start_ranks()
    model, processor = (
        QwenVL.from_pretrained(source, dtype=dtype),
        Processor.from_pretrained(source),
    )
    lora.learn(model, "all")
    if shard and world > 1:
        policy.shard(model, device, world, dtype)
    model.checkpoint_blocks()
    groups = fixed_groups()
    own = [groups[i] for i in (SHARES[share][rank] if world > 1 else range(4))]
    train_rl.encode([group.prompt for group in own], processor)
    cfg = SimpleNamespace(micro_tokens=90, mask_truncated=False)
    micros = train_rl.pack(own, processor, ["lor"], cfg, world, device)
    (tokens,), losses = ranks.all_reduce([sum(len(one.rollout_logprob) for one in micros)]), []
    for one in micros:
        logprob, _ = train_rl.forward(model, one, 1.0, None)
        sampled, advantage = one.rollout_logprob.to(dtype), one.advantage.to(dtype)
        loss, _ = policy_loss(logprob, sampled, advantage, one.cu_seqlens, denominator=tokens)
        loss.backward()
        losses.append(loss.item())
    named = list(model.named_parameters())
    grads = [
        torch.zeros_like(optim.local(p)) if p.grad is None else optim.local(p.grad)
        for _, p in named
    ]
    if world > 1 and not shard:
        optim.sum_over_replicas(grads)
    whole = {}
    for (name, p), grad in zip(named, grads, strict=True):
        if isinstance(p, DTensor):
            cut = {"shape": p.shape, "stride": p.stride()}
            grad = DTensor.from_local(grad, p.device_mesh, p.placements, **cut).full_tensor()
        whole[name] = grad.clone()
    return ranks.all_reduce([sum(losses)])[0], whole


def all_gradients(source, out):
    """What the two ranks run."""
    kinds = product(SHARES, (torch.float32, torch.float64), (True, False))
    found = {kind: gradients(source, *kind) for kind in kinds}
    if ranks.is_first():
        torch.save(found, out)


def test_two_ranks_have_the_gradients_of_one(checkpoint, tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text("import sys, test_training\ntest_training.all_gradients(*sys.argv[1:])\n")
    root = Path(run.__file__).parent.parent
    command = [
        warm.python(),
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        script,
        checkpoint,
        tmp_path / "two.pt",
    ]
    own = {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{root}:{root}/tests/support:{root}/tests/training",
    }
    ran = subprocess.run(
        list(map(str, command)), env=os.environ | own, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    two = torch.load(tmp_path / "two.pt")
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        loss, wanted = gradients(checkpoint, "uneven", dtype, False)
        norm = sum(g.double().square().sum() for g in wanted.values()).sqrt()
        heard = [name for name, g in wanted.items() if g.norm() > 1e-3 * norm]
        assert len(heard) > 40 and abs(loss) > 0.01
        for (share, other, shard), (found, grads) in two.items():
            if other == dtype:
                assert found == pytest.approx(loss, rel=tolerance), (share, shard)
                gap = (
                    sum((grads[n] - g).double().square().sum() for n, g in wanted.items()).sqrt()
                    / norm
                )
                assert gap < tolerance, (share, dtype, shard, gap)
                for name in heard:
                    gap = (grads[name] - wanted[name]).norm() / wanted[name].norm()
                    assert gap < 10 * tolerance, (share, dtype, shard, name, gap)


# ---- Which rows show the same images


def test_images_that_are_equal_bring_their_rows_together(tmp_path):
    """By path, by content, by what is drawn; in memory only the same object."""
    content = b"an image"
    other = Marked(bytes(bytearray(content)), sharpen, (("by", 3),))
    assert other.source is not content
    shown = [
        [str(tmp_path / "a.png")],
        [tmp_path / "a.png"],
        [Marked(content, sharpen, (("by", 3),))],
        [other],
        [Marked(content, sharpen, (("by", 4),))],
        [Image.new("RGB", (8, 8))],
        [Image.new("RGB", (8, 8))],
    ]
    rows = [Example(str(i), "lor", images, "?", "A") for i, images in enumerate(shown)]
    keys = [batches.images_key(row) for row in rows]
    assert [keys.index(key) for key in keys] == [0, 0, 2, 2, 4, 5, 6]


# ---- Host memory


@pytest.mark.parametrize("script", [train_sft, train_rl])
def test_host_memory_is_flat_over_thirty_steps(checkpoint, tmp_path, monkeypatch, script):
    """What is resident at the end of a step. Its pixels alone, if kept, would add 17 (RL) or 35 MB
    (SFT) between the two windows."""
    rng, resident, write_row = np.random.default_rng(0), [], run.Log.__call__
    images = rng.integers(0, 255, (8, 192, 256, 3), np.uint8)
    rows = [
        Example(
            str(i), "lor", [Image.fromarray(image)], "What is near?", "a", rationale="So it is."
        )
        for i, image in enumerate(images)
    ]

    gc.freeze()  # what is there already need not be walked through thirty times

    def log(self, row):
        write_row(self, row)
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        resident.append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)

    monkeypatch.setattr(run.Log, "__call__", log)
    monkeypatch.setattr(run, "load_data", lambda cfg, *_: (rows, []))
    parity = lambda text, *_: Scores(*[float(sum(text.encode()) % 2)] * 2, 0.0, 0.0)  # noqa: E731
    monkeypatch.setattr(train_rl, "score", parity)
    own = dict(batch=8) if script is train_sft else dict(prompts=4, group=4, max_new_tokens=4)
    script.main(script.Config(model=checkpoint, data=(), out=str(tmp_path), steps=30, **own))
    gc.unfreeze()
    assert fmean(resident[-10:]) - fmean(resident[5:15]) < 8
