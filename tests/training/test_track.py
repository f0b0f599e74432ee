"""--track: what wandb and trackio are told, by stand-ins for both; and that neither ends a run."""

import json
import sys
from pathlib import Path

import pytest
from PIL import Image

import train_rl
import train_sft
from errors import UserError
from training import track

# Both packages, as far as they are called. A stand-in fails where FAILS names the call.
STAND_IN = """
from PIL import Image as Pictures

told = []
FAILS = ""


class Table:
    def __init__(self, columns, data):
        self.rows = [dict(zip(columns, row, strict=True)) for row in data]


class Image:
    def __init__(self, path):
        with Pictures.open(path) as picture:
            self.format, self.size = picture.format, picture.size


class Settings:
    def __init__(self, **settings):
        self.settings = settings


class Run:
    def log(self, columns, step):
        told.append(("log", step, columns))
        if FAILS == "log":
            raise ConnectionError("no route to host\\nand much more")

    def finish(self, **how):
        told.append(("finish", how))
        if FAILS == "finish":
            raise ConnectionError("no route to host")


def init(**options):
    told.append(("init", options))
    if FAILS == "init":
        raise ValueError("api_key not configured")
    return Run()


def finish():
    Run().finish()
"""


@pytest.fixture(params=["wandb", "trackio"])
def tracker(request, tmp_path, monkeypatch):
    """(kind, its stand-in, which is the only package of that name)."""
    yield request.param, stand_in(request.param, tmp_path, monkeypatch)
    sys.modules.pop(request.param, None)


def stand_in(kind: str, tmp_path: Path, monkeypatch):
    folder = tmp_path / "packages"
    folder.mkdir(exist_ok=True)
    (folder / f"{kind}.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    monkeypatch.setenv("WANDB_FINISH_TIMEOUT", "1")
    sys.modules.pop(kind, None)
    return __import__(kind)


def sft(home, out, **options):
    data = (str(home / "scenes" / "rows.jsonl"),)
    sizes = dict(steps=2, batch=2, lr=1e-3, schedule="constant", warmup=0)
    train_sft.main(
        train_sft.Config(str(home / "tiny"), data, str(out), **sizes | options),
    )


def rl(home, out, **options):
    data = (str(home / "scenes" / "rows.jsonl"),)
    sizes = dict(steps=2, prompts=2, group=2, max_new_tokens=3, filter="none")
    train_rl.main(
        train_rl.Config(str(home / "tiny"), data, str(out), **sizes | options),
    )


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def names(package) -> list[str]:
    return [call for call, *_ in package.told]


def test_a_run_and_its_resumption_are_one_run(tracker, tiny_home, tmp_path):
    kind, package = tracker
    out = tmp_path / "a run"
    sft(tiny_home, out, track=kind)
    assert names(package) == ["init", "log", "log", "finish"]
    for (_, step, columns), row in zip(package.told[1:3], metrics(out), strict=True):
        assert step == row.pop("step")
        assert columns == {name: value for name, value in row.items() if value is not None}
        assert {"loss", "grad_norm", "tokens_per_second"} <= columns.keys()
    before = package.told[0][1]
    assert before["config"]["batch"] == 2 and before["resume"] == "allow"
    assert before["project"] == "sr-real" and before["name"].startswith("a-run-")

    package.told.clear()
    sft(tiny_home, out, track=kind, steps=3, resume=True)
    assert names(package) == ["init", "log", "finish"] and package.told[1][1] == 3
    after = package.told[0][1]
    assert (after["name"], after.get("id")) == (before["name"], before.get("id"))
    if kind == "wandb":
        assert before["id"] == before["name"] and before["dir"] == str(out)
        assert package.told[-1][1] == {"exit_code": 0}


def test_track_may_change_at_resume(tiny_home, tmp_path, monkeypatch):
    out = tmp_path / "run"
    sft(tiny_home, out, steps=1)
    assert not (out / track.NAME_FILE).exists()
    package = stand_in("trackio", tmp_path, monkeypatch)
    sft(tiny_home, out, track="trackio", resume=True)
    assert [step for call, step, *_ in package.told if call == "log"] == [2]
    package.told.clear()
    sft(tiny_home, out, steps=3, resume=True)
    assert package.told == []


def test_rollouts_come_as_a_table_with_images(tracker, tiny_home, tmp_path):
    kind, package = tracker
    out = tmp_path / "run"
    rl(tiny_home, out, track=kind, steps=4, save_every=3, group=2)
    tables = {}
    for call in package.told:
        if call[0] == "log" and "rollouts" in call[2]:
            tables[call[1]] = call[2]["rollouts"].rows
    # The first step, where it saves, and the last one.
    assert list(tables) == [1, 3, 4]
    logged = [json.loads(line) for line in (out / "rollouts.jsonl").read_text().splitlines()]
    for step, table in tables.items():
        rows = [row for row in logged if row["step"] == step]
        assert [row["text"] for row in table] == [row["text"] for row in rows]
        for line, row in zip(table, rows, strict=True):
            assert line["image"].format == "JPEG" and line["image"].size == (128, 96)
            for name in ("path", "truth", "total", "advantage", "question", "sample"):
                assert line[name] == row[name]
            assert row["parts"].items() <= line.items()
    package.told.clear()
    rl(tiny_home, tmp_path / "none", track=kind, log_groups=0, steps=1)
    assert all("rollouts" not in call[2] for call in package.told if call[0] == "log")


def test_a_table_is_bounded():
    row = dict(question="q" * 9999, truth="1", text="t" * 9999, parts={"accuracy": 1.0})
    row |= dict(total=1.0, advantage=0.0, kept=True, finished=True)
    rows = []
    for path in ("dtr", "lor"):
        for group in range(8):
            rows += [row | dict(path=path, group=group, sample=i) for i in range(8)]
    lines = track.table_rows(rows, {("lor", 3): "picture"})
    assert len(lines) == 64
    assert {(line["path"], line["group"]) for line in lines} == {
        (path, group) for path in ("dtr", "lor") for group in range(4)
    }
    assert max(len(line["text"]) for line in lines) == track.TEXT
    shown = {line["image"] for line in lines if (line["path"], line["group"]) == ("lor", 3)}
    assert shown == {"picture"}
    large = Image.effect_noise((3000, 1000), 80)
    assert len(track.thumbnail(large)) < 40_000


@pytest.mark.parametrize("call", ["init", "log", "finish"])
def test_a_tracker_that_fails_ends_no_run(call, tracker, tiny_home, tmp_path, capsys):
    kind, package = tracker
    package.FAILS = call
    sft(tiny_home, tmp_path / "run", track=kind)
    assert len(metrics(tmp_path / "run")) == 2
    words = [line for line in capsys.readouterr().out.splitlines() if "--track" in line]
    assert len(words) == 1 and f"--track {kind} failed" in words[0], words
    assert words[0].endswith("the run goes on without it") and "much more" not in words[0]
    wanted = {
        "init": ["init"],
        "log": ["init", "log", "finish"],
        "finish": ["init", "log", "log", "finish"],
    }
    assert names(package) == wanted[call]


@pytest.mark.parametrize("end", [ValueError("a bug"), KeyboardInterrupt()])
def test_a_tracker_is_closed_whatever_ends_the_run(end, tracker, tiny_home, tmp_path, monkeypatch):
    kind, package = tracker

    def save(*arguments, **options):
        raise end

    monkeypatch.setattr(train_sft.checkpoints, "save", save)
    with pytest.raises(type(end)):
        sft(tiny_home, tmp_path / "run", track=kind, save_every=1)
    assert names(package) == ["init", "log", "finish"]
    if kind == "wandb":
        assert package.told[-1][1] == {"exit_code": 1}


@pytest.mark.parametrize("kind", ["wandb", "trackio"])
@pytest.mark.parametrize("begin", [sft, rl])
def test_without_the_package_nothing_begins(kind, begin, tmp_path, monkeypatch):
    # A folder of wandb's runs where the command starts is no package.
    (tmp_path / "here" / kind).mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "here")])
    monkeypatch.delitem(sys.modules, kind, raising=False)
    with pytest.raises(UserError, match=f"--track {kind}: .*pip install {kind}"):
        begin(tmp_path, tmp_path / "run", track=kind)
    assert not (tmp_path / "run").exists()


def test_other_ranks_tell_nothing(tmp_path, monkeypatch):
    package = stand_in("wandb", tmp_path, monkeypatch)
    monkeypatch.setenv("RANK", "1")
    cfg = train_sft.Config("m", ("d",), str(tmp_path), track="wandb")
    with track.Tracker("wandb") as tracker:
        tracker.start(cfg)
        tracker.log({"step": 1, "loss": 1.0})
    assert package.told == [] and not (tmp_path / track.NAME_FILE).exists()
