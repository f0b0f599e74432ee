"""trainer.py without a model: data order, cuts, checkpoints on disk, the log, and the words of errors."""

import json
import math
from collections import Counter
from dataclasses import dataclass

import pytest
import torch

import data
import plan
import trainer
from model import lora
from model.qwen_vl import QwenVL
from model.tiny import SPECIAL, configuration
from srreal import Example


def test_order_is_an_epoch_a_time_in_runs_and_a_pure_function():
    keys = [i // 10 for i in range(50)]  # 5 images of 10 questions
    order = trainer.Order(keys, seed=3, run=4)
    epoch = order.rows(0, 50)
    assert sorted(epoch) == list(range(50)) and epoch != order.rows(50, 50)
    runs = [keys[row] for row in epoch]
    changes = sum(a != b for a, b in zip(runs, runs[1:], strict=False))
    assert changes <= 5 * 3  # each image has runs of 4, 4 and 2, shuffled
    assert sorted(order.rows(50, 50)) == list(range(50))
    again = trainer.Order(keys, seed=3, run=4)
    assert sum((again.rows(i, 7) for i in range(0, 105, 7)), []) == order.rows(0, 105)
    assert order.rows(120, 5) == trainer.Order(keys, seed=3, run=4).rows(120, 5)  # no history needed
    assert order.rows(0, 50) == epoch  # and going back is fine
    assert trainer.Order(range(50), seed=4).rows(0, 50) != trainer.Order(range(50), seed=5).rows(0, 50)


def test_shares_tile_and_cuts_obey_the_budget():
    for count in range(9):
        for world in (1, 2, 3, 8):
            rows = [i for rank in range(world) for i in range(count)[trainer.mine(count, rank, world)]]
            assert rows == list(range(count))
            weights = [1 + 7 * i % 5 for i in range(count)]
            shares = [range(count)[trainer.evenly(weights, rank, world)] for rank in range(world)]
            assert [row for share in shares for row in share] == list(range(count))
            heavy = [sum(weights[row] for row in share) for share in shares]
            assert max(heavy) <= sum(weights) / world + max(weights, default=0)
    lengths = [5, 5, 5, 30, 1, 1, 9]
    cuts = [lengths[part] for part in trainer.cut(lengths, 11)]
    assert cuts == [[5, 5], [5], [30], [1, 1, 9]] and trainer.cut([], 11) == []


def test_the_filler_stands_only_where_ranks_need_it():
    text = Example("a", "direct", [], "What?", "1")
    assert trainer.pad([text], 1) == [text]
    assert [e.id for e in trainer.pad([text], 2)] == ["a", "filler"]
    assert [e.id for e in trainer.pad([trainer.filler()], 2)] == ["filler"]


def fake_checkpoint(out, step, size=3):
    folder = out / f"step-{step:06d}"
    (folder / "trainer").mkdir(parents=True)
    (folder / "model.safetensors").write_text("x" * size)
    (folder / "trainer" / "state.json").write_text(
        json.dumps({"step": step, "files": {"model.safetensors": 3}})
    )
    return folder


def test_the_newest_whole_checkpoint(tmp_path, capsys):
    assert trainer.newest(tmp_path) is None
    good = fake_checkpoint(tmp_path, 9)
    assert trainer.newest(tmp_path) == good
    fake_checkpoint(tmp_path, 10, size=2)  # a file cut short
    (fake_checkpoint(tmp_path, 11) / "model.safetensors").unlink()  # a file gone
    (fake_checkpoint(tmp_path, 12) / "trainer" / "state.json").write_text("{")  # no record
    (tmp_path / "step-000013.partial").mkdir()  # killed while writing
    assert trainer.newest(tmp_path) == good
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
    with pytest.raises(trainer.Stop, match="--resume"):
        trainer.begin(Config(str(tmp_path)))
    found, done = trainer.begin(Config(str(tmp_path), resume=True))
    assert found.name == "step-000009" and done == 9
    assert trainer.begin(Config(str(tmp_path / "new"), resume=True)) == (None, 0)
    assert json.loads((tmp_path / "new" / "config.json").read_text())["steps"] == 3


def test_log_keeps_rows_up_to_the_checkpoint(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        "".join(json.dumps({"step": i, "loss": 1.0}) + "\n" for i in range(1, 5)) + '{"step": 5, "lo'
    )
    trainer.Log(Config(str(tmp_path), resume=True), 3, {"loss": ".1f"})({"step": 4, "loss": 2.0})
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and rows[-1]["loss"] == 2.0
    assert "loss 2.0" in capsys.readouterr().out
    path.write_text('{"step": 1, "loss": 1.0}\n{"ste')  # killed before the first checkpoint
    trainer.Log(Config(str(tmp_path), resume=True), 0, {"loss": ".1f"})
    assert path.read_text() == ""
    log = trainer.Log(Config(str(tmp_path)), 0, {"loss": ".1f"})  # a new run starts a new file
    assert path.read_text() == ""
    with pytest.raises(ValueError):
        log({"step": 1, "loss": math.nan})  # strict JSON has no NaN


def last_words(monkeypatch, error, argv=()):
    """(message, exit code) of a run whose main raises `error`."""
    said = []

    def end(message, code):
        said.append((message, code))
        raise SystemExit(code)

    def main(cfg):
        raise error

    monkeypatch.setattr(trainer, "end", end)
    monkeypatch.setattr("sys.argv", ["train.py", *argv])
    with pytest.raises(SystemExit):
        trainer.launch(main, Config)
    return said[0]


def test_errors_that_a_user_can_mend_are_words_and_exit_codes(monkeypatch, tmp_path):
    rows = [("a.jsonl", 3, "images", "a.png: no such file"), ("b.jsonl", 1, "answer", "is empty")]
    message, code = last_words(monkeypatch, data.BadRows(rows))
    assert code == 2 and "--skip-bad-rows" in message
    assert all(part in message for row in rows for part in map(str, row))
    assert last_words(monkeypatch, trainer.Stop("no such thing")) == ("train.py: no such thing", 2)
    for error in (torch.OutOfMemoryError("CUDA out of memory."), MemoryError(),
                  RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")):  # fmt: skip
        message, code = last_words(monkeypatch, error, ["--micro-tokens", "123"])
        assert code == 1 and "--micro-tokens (now 123)" in message
    fake_checkpoint(tmp_path, 5)
    message, code = last_words(monkeypatch, FloatingPointError("step 7: nan"), ["--out", str(tmp_path)])
    assert code == 1 and "step 7" in message and "step-000005" in message
    assert last_words(monkeypatch, KeyboardInterrupt())[1] == 130
    monkeypatch.setattr("sys.argv", ["train.py"])
    with pytest.raises(RuntimeError, match="a bug"):  # what only we can mend keeps its traceback
        trainer.launch(lambda cfg: (_ for _ in ()).throw(RuntimeError("a bug")), Config)


def test_unknown_flags_fail_with_the_nearest_name(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train.py", "--step", "3"])
    with pytest.raises(SystemExit) as stop:
        trainer.launch(lambda cfg: None, Config)
    captured = capsys.readouterr()
    assert stop.value.code == 2 and "--steps" in captured.out + captured.err


def test_fingerprint_sees_ids_paths_and_order():
    rows = [Example(str(i), "lor", [], "?", "A") for i in range(3)]
    other = [Example(str(i), "dtr", [], "?", "A") for i in range(3)]
    prints = Counter(map(trainer.fingerprint, (rows, other, rows[::-1], rows[:2], list(rows))))
    assert sorted(prints.values()) == [1, 1, 1, 2]


@dataclass
class Run:
    train: str = "lm"
    lora: int = 0
    rounding: bool = False
    shard: str = "auto"
    checkpointing: str = "auto"
    micro_tokens: int = 4096


def test_auto_is_what_the_plan_chooses(monkeypatch, capsys):
    """Keep what fits, else recompute the blocks, else cut as well; whatever a flag fixes stays."""
    config = configuration("qwen3_vl", {token: 900 + i for i, token in enumerate(SPECIAL)})
    config.text_config.num_hidden_layers = 40
    with torch.device("meta"):
        model = QwenVL(config)
    lora.learn(model, "lm")

    def settle(gigabytes, world=1, **flags):
        pages = {"SC_PHYS_PAGES": int(gigabytes * 1e9) * world, "SC_PAGE_SIZE": 1}
        with monkeypatch.context() as patch:
            patch.setattr(trainer.os, "sysconf", pages.get)
            s = trainer.settle(Run(**flags), model, world, prompts=0, group=1, new_tokens=64, kl=0.0)
        return s.shard, s.checkpointing

    cfg, counts = plan.Config("", 1, group=1, new_tokens=64, kl=0.0, dtype="fp32"), plan.tally(model)
    options = {c: plan.Settings(False, c, True, 0, 4096) for c in (False, True)}
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
