"""A run's folder: who may go on with it, with what, and what an end leaves there."""

import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from commands import QUIET, ROOT, TIMEOUT, finish, flags, metrics, start

import train_rl
import train_sft
from errors import UserError
from flags import parse
from srreal import Example
from training import checkpoints, folder, interrupt, run
from training.recorded import recorded_flags

TIMES = ("second", "mib")
RANKS = ("-m", "training.torchrun", "--standalone", "--nproc_per_node", 2)


# ---- Fake runs: a checkpoint of three bytes


def fake_checkpoint(out: Path, step: int) -> Path:
    made = out / f"step-{step:06d}"
    (made / "trainer").mkdir(parents=True)
    (made / "model.safetensors").write_text("xxx")
    state = {"step": step, "files": {"model.safetensors": 3}}
    (made / "trainer" / "state.json").write_text(json.dumps(state))
    return made


def fake_run(out: Path, cfg, steps: int = 2) -> None:
    folder.write_config(cfg)
    fake_checkpoint(out, steps)
    rows = [json.dumps({"step": step + 1}) + "\n" for step in range(steps)]
    (out / "metrics.jsonl").write_text("".join(rows))


def contents(out: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in out.rglob("*") if path.is_file()}


SFT = {"model": "m", "data": ("d",)}


def sft(out: Path, **changes) -> train_sft.Config:
    return train_sft.Config(**(SFT | {"out": str(out)} | changes))


def rl(out: Path, **changes) -> train_rl.Config:
    return train_rl.Config(**(SFT | {"out": str(out)} | changes))


@pytest.mark.parametrize(
    "make, flag, then, now",
    [
        (sft, "model", "m", "other"),
        (sft, "data", ("d",), ("d", "e")),
        (sft, "seed", 0, 1),
        (sft, "batch", 64, 32),
        (sft, "regions", "token", "text"),
        (sft, "max_pixels", None, 1000),
        (sft, "schedule", "cosine", "constant"),
        (sft, "lr", 5e-6, 1e-5),
        (sft, "steps", 1000, 2000),  # of a cosine
        (rl, "filter", "accuracy", "none"),
        (rl, "group", 8, 4),
        (rl, "steps", 100, 50),
    ],
)
def test_a_flag_that_means_another_run_is_refused(tmp_path, make, flag, then, now):
    fake_run(tmp_path, make(tmp_path, **{flag: then}))
    before = contents(tmp_path)
    with pytest.raises(UserError) as refused:
        main = {sft: train_sft.main, rl: train_rl.main}[make]
        main(make(tmp_path, resume=True, **{flag: now}))
    name = flag.replace("_", "-")
    values = [" ".join(v) if isinstance(v, tuple) else str(v) for v in (then, now)]
    assert f"--{name} {values[0]}, now it is {values[1]}" in str(refused.value)
    assert "\n" not in str(refused.value) and contents(tmp_path) == before


def test_what_means_no_other_run_may_change(tmp_path):
    cfg = rl(tmp_path)
    fake_run(tmp_path, cfg)
    changes = dict(steps=200, save_every=1, eval_every=3, workers=2, micro_tokens=99, keep=1)
    changes |= dict(model="./m/", data=("d/",))  # another spelling of the same
    found, done = checkpoints.find_start(rl(tmp_path, resume=True, **changes))
    assert (found.name, done) == ("step-000002", 2)


def test_the_other_scripts_run_is_refused(tmp_path):
    fake_run(tmp_path, sft(tmp_path))
    with pytest.raises(UserError, match=r"run of train_sft\.py, and this is train_rl\.py"):
        train_rl.main(rl(tmp_path, resume=True))


def test_rows_without_a_whole_checkpoint_are_not_overwritten(tmp_path, capsys):
    fake_run(tmp_path, sft(tmp_path))
    (tmp_path / "step-000002" / "model.safetensors").write_text("x")
    before = contents(tmp_path)
    for resume, words in ((True, "no whole checkpoint"), (False, "--resume it, or choose")):
        with pytest.raises(UserError, match=words):
            train_sft.main(sft(tmp_path, resume=resume))
    assert contents(tmp_path) == before
    assert "skipping the incomplete checkpoint" in capsys.readouterr().out
    # Killed before its first row there is nothing that could be lost.
    fresh = tmp_path / "fresh"
    folder.write_config(sft(fresh))
    (fresh / "metrics.jsonl").touch()
    assert checkpoints.find_start(sft(fresh, resume=True)) == (None, 0)


def test_a_torn_later_step_does_not_count_as_kept(tmp_path):
    """Run on behind an incomplete step 9, --keep 1 is the step that has just been saved."""
    for step in (2, 9):
        fake_checkpoint(tmp_path, step)
    (tmp_path / "step-000009" / "model.safetensors").unlink()
    (tmp_path / "aside" / "trainer").mkdir(parents=True)
    final = tmp_path / "step-000003"
    checkpoints.finish(tmp_path / "aside", final, {"step": 3}, keep=1)
    assert checkpoints.newest(tmp_path) == final
    assert not (tmp_path / "step-000002" / "trainer").exists()


def test_a_finished_run_has_nothing_to_do(tmp_path, capsys):
    fake_run(tmp_path, sft(tmp_path, steps=2))
    before = contents(tmp_path)
    train_sft.main(sft(tmp_path, steps=2, resume=True))
    assert contents(tmp_path) == before and "nothing to do" in capsys.readouterr().out


def test_a_lost_or_torn_config_is_said(tmp_path, capsys):
    fake_run(tmp_path, sft(tmp_path))
    (tmp_path / "config.json").write_text('{"script": "tr')
    with pytest.raises(UserError, match=r"config\.json can't be read .*give all flags"):
        train_sft.main(sft(tmp_path, resume=True))
    kinds = {"steps": "abc", "lr": None, "data": "d", "schedule": "step", "max_pixels": 9.5}
    for name, value in kinds.items():
        (tmp_path / "config.json").write_text(json.dumps(SFT | {name: value}))
        with pytest.raises(UserError, match=rf"config\.json: {name} is .*give all flags"):
            recorded_flags(train_sft.Config, ["--out", str(tmp_path), "--resume"])
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json is missing.* give --data and --model"):
        recorded_flags(train_sft.Config, ["--out", str(tmp_path), "--resume"])
    checkpoints.find_start(sft(tmp_path, resume=True))
    assert "config.json is missing" in capsys.readouterr().out


def test_the_command_line_is_the_runs_own(tmp_path, monkeypatch):
    cfg = sft(tmp_path, data=("d", "e"), lr=1e-3, eval_data=("v",), max_pixels=7, keep=3)
    fake_run(tmp_path, cfg)

    def parsed(*words):
        monkeypatch.setattr("sys.argv", ["train_sft.py", *words])
        return parse(train_sft.Config, "", recorded=recorded_flags)

    again = parsed("--out", str(tmp_path), "--resume")
    assert again == replace(cfg, resume=True)
    # A flag beside it is read as ever; both spellings, and given again as it was.
    words = ["--resume", f"--out={tmp_path}", "--save_every", "9", "--data", "d", "e"]
    again = parsed(*words)
    assert (again.save_every, again.data, again.lr) == (9, ("d", "e"), 1e-3)
    fresh = ["--model", "m", "--data", "d", "--out", str(tmp_path / "new"), "--resume"]
    assert parsed(*fresh) == sft(tmp_path / "new", resume=True)


def test_rows_are_cut_by_their_step(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    log = run.Log(sft(tmp_path), 2, {"loss": ".1f"})
    assert "metrics.jsonl has rows of 0 of the 2 steps" in capsys.readouterr().out
    for step in (3, 4, 5):
        log({"step": step, "loss": 1.0})
    with path.open("a") as file:
        file.write('{"step": 6, "lo')
    run.Log(sft(tmp_path), 4, {"loss": ".1f"})({"step": 5, "loss": 2.0})
    assert [(row["step"], row["loss"]) for row in metrics(tmp_path)] == [(3, 1), (4, 1), (5, 2)]
    # Several rows a step.
    rows = folder.Rows(tmp_path / "rollouts.jsonl", 0)
    rows.append([{"step": 1}, {"step": 1}])
    rows.append([{"step": 2}])
    folder.Rows(tmp_path / "rollouts.jsonl", 1)
    assert len((tmp_path / "rollouts.jsonl").read_text().splitlines()) == 2


# ---- The lock


def held_by(path: Path, host: str, pid: int) -> None:
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(json.dumps({"host": host, "pid": pid}))


def test_one_run_a_folder(tmp_path, capsys):
    out = tmp_path / "a" / "b"
    file = out / "lock"
    with folder.lock(str(out)):
        assert json.loads(file.read_text()) == {"host": socket.gethostname(), "pid": os.getpid()}
    # Where nothing was written, nothing stays.
    assert not (tmp_path / "a").exists()
    with pytest.raises(ValueError, match="a bug"), folder.lock(str(out)):
        (out / "config.json").touch()
        raise ValueError("a bug")
    assert [path.name for path in out.iterdir()] == ["config.json"]

    alive = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    held_by(file, socket.gethostname(), alive.pid)
    with pytest.raises(UserError, match=f"process {alive.pid} is at work"):
        train_sft.main(sft(out))
    assert file.exists()
    alive.communicate()
    with folder.lock(str(out)):
        assert "is dead" in capsys.readouterr().out
    # Dead, though nobody has asked for its exit code yet.
    dead = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, dead.pid, os.WEXITED | os.WNOWAIT)
    held_by(file, socket.gethostname(), dead.pid)
    with folder.lock(str(out)):
        assert f"process {dead.pid}, which is dead" in capsys.readouterr().out
    dead.wait()
    held_by(file, "elsewhere", 1)
    with pytest.raises(UserError, match=r"lock: process 1 on elsewhere .* delete that file"):
        train_sft.main(sft(out))
    file.write_text("{")
    with pytest.raises(UserError, match="delete it if no run"):
        train_sft.main(sft(out))


def test_an_out_that_can_not_be_written(tmp_path):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        for main, make in ((train_sft.main, sft), (train_rl.main, rl)):
            with pytest.raises(UserError, match="can't write .*file.*--out has to be a folder"):
                main(make(out))
            with pytest.raises(UserError, match="can't write .*file.*--out has to be a folder"):
                main(make(out, resume=True))
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / "run" / "metrics.jsonl").mkdir(parents=True)
    with pytest.raises(UserError, match=r"metrics\.jsonl can't be read: Is a directory"):
        train_sft.main(sft(tmp_path / "run"))


# ---- The place in the data


def test_the_place_in_the_data_is_a_number_of_rows():
    """What is resumed behind seven rows takes the eighth, whatever its batch."""
    examples = [Example(str(i), "direct", [f"{i}.png"], "?", str(i)) for i in range(10)]
    cfg = sft(Path(), batch=3, drop_depth=0.0)
    whole = train_sft.Sampler(examples, cfg, 0, 1)
    order = [e.id for step in range(9) for e in whole.at_step(step)]
    later = train_sft.Sampler(examples, cfg, 0, 1, first_step=4, rows_before=7)
    assert later.rows_until(4) == 7 and later.rows_until(6) == 13
    assert [e.id for step in (4, 5) for e in later.at_step(step)] == order[7:13]

    prompts = train_rl.PromptOrder(examples, 0)
    cfg = rl(Path(), prompts=4, steps=9)
    later = train_rl.Sampler(prompts, cfg, first_step=2, rows_before=5)
    ids = [prompt.example.id for prompt in later.local_prompts(3, 0, 1)]
    assert ids == [prompts[place].example.id for place in range(9, 13)]
    assert later.local_prompts(9, 0, 1) == []


def test_occurrences_are_counted_over_all_ranks():
    """Three rows, eight prompts a step: the noise of each is one rank's or two ranks' alike."""
    examples = [Example(str(i), "lor", [], "?", "A") for i in range(3)]
    sampler = train_rl.Sampler(train_rl.PromptOrder(examples, 0), rl(Path(), prompts=8), 0, 0)

    def keys(world):
        ranks = [sampler.local_prompts(1, rank, world) for rank in range(world)]
        return [(p.example.id, p.occurrence) for prompts in ranks for p in prompts]

    assert len(set(keys(1))) == 8
    assert sorted(keys(1)) == sorted(keys(2)) == sorted(keys(3))


# ---- Signals


def test_the_first_signal_waits_for_the_step():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(interrupt.Interrupted) as stop, interrupt.Interrupts() as interrupts:
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop.value.exit_code == 143 and not interrupts.signum
    with pytest.raises(interrupt.Interrupted) as stop, interrupt.Interrupts() as interrupts:
        interrupts.defer()
        assert interrupts.arrived() == 0
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupts.arrived() == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("the second one ends at once")
    assert stop.value.exit_code == 130
    # One behind the last step is not lost, nor taken for a hung collective.
    for error in (None, RuntimeError("Connection closed by peer")):
        with pytest.raises(interrupt.Interrupted), interrupt.Interrupts() as interrupts:
            interrupts.defer()
            os.kill(os.getpid(), signal.SIGTERM)
            if error:
                raise error
    assert signal.getsignal(signal.SIGTERM) == before


def begin(*command, largest_file: int = resource.RLIM_INFINITY) -> subprocess.Popen:
    """Start `python COMMAND` in a session of its own, as in a terminal of its own."""

    def prepare():
        # A shell's "&" turns Ctrl-C off for what it starts.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))

    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=os.environ | QUIET,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=prepare,
    )


def wait_for_rows(out: Path, count: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + TIMEOUT
    while process.poll() is None and time.monotonic() < deadline:
        with suppress(FileNotFoundError):
            if (out / "metrics.jsonl").read_text().count("\n") >= count:
                return
        time.sleep(0.02)


def ended(process: subprocess.Popen) -> tuple[int, str]:
    try:
        said = process.communicate(timeout=TIMEOUT)[0]
    finally:
        process.kill()
    return process.returncode, said


def without_times(out: Path) -> list[dict]:
    rows = []
    for row in metrics(out):
        kept = {name: v for name, v in row.items() if not any(part in name for part in TIMES)}
        rows.append(kept)
    return rows


def options_of(tiny_home: Path, script: str) -> dict:
    options = {"model": tiny_home / "tiny", "save_every": 1000, "steps": 1000}
    if script == "train_sft.py":
        return options | {"data": tiny_home / "scenes" / "rows.jsonl", "batch": 6, "warmup": 0}
    own = {"prompts": 4, "group": 2, "max_new_tokens": 2, "filter": "none", "kl": 0.0}
    return options | own | {"data": tiny_home / "scenes" / "numbers.jsonl", "lr": 1e-4}


@pytest.mark.parametrize("script", ["train_sft.py", "train_rl.py"])
def test_a_signal_saves_and_resume_needs_only_out(tiny_home, tmp_path, script):
    """SIGTERM to one process, Ctrl-C to two ranks; each goes on as if it had never stopped."""
    shared = options_of(tiny_home, script) | {"schedule": "constant"}
    launcher = () if script == "train_sft.py" else RANKS
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    process = begin(*launcher, script, *flags(shared | {"out": cut}))
    wait_for_rows(cut, 2, process)
    number = signal.SIGTERM if script == "train_sft.py" else signal.SIGINT
    os.killpg(process.pid, number)
    code, said = ended(process)
    saved = [path.name for path in cut.glob("step-*")]
    done = len(metrics(cut))
    assert code == 128 + number and saved == [f"step-{done:06d}"], said
    assert f"{script}: interrupted: saved {saved[0]}; --resume goes on" in said.splitlines()[-1]
    assert "Traceback" not in said and "Error" not in said and not (cut / "lock").exists()

    longer = {"steps": done + 2}
    again = {"out": cut, "save_every": 2}
    # Fewer steps would be another run, were it not for config.json.
    config = json.loads((cut / "config.json").read_text())
    (cut / "config.json").write_text(json.dumps(config | {"steps": done + 1}))
    finish(
        start(*launcher, script, *flags(longer | again), "--resume"),
        start(*launcher, script, *flags(shared | longer | {"out": whole})),
    )
    assert without_times(cut) == without_times(whole)
    config = json.loads((cut / "config.json").read_text())
    assert (config["steps"], config["save_every"]) == (done + 2, 2)


def test_a_signal_before_the_loop_and_a_second_one(tiny_home, tmp_path):
    shared = options_of(tiny_home, "train_sft.py")
    early = begin("train_sft.py", *flags(shared | {"out": tmp_path / "early"}))
    while not (tmp_path / "early" / "lock").exists() and early.poll() is None:
        time.sleep(0.01)
    early.send_signal(signal.SIGINT)
    code, said = ended(early)
    assert code == 130 and "no step was finished, so there is nothing to save" in said, said
    assert "Traceback" not in said
    # Gone, unless it had got as far as its config.json before the signal came.
    left = {path.name for path in (tmp_path / "early").glob("*")}
    assert not left or "config.json" in left and "lock" not in left, left

    # Steps of many seconds.
    slow = shared | {"batch": 6000, "out": tmp_path / "slow"}
    twice = begin("train_sft.py", *flags(slow))
    deadline = time.monotonic() + TIMEOUT
    while not (tmp_path / "slow" / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(1)
    twice.send_signal(signal.SIGINT)
    time.sleep(1)
    assert twice.poll() is None
    twice.send_signal(signal.SIGINT)
    code, said = ended(twice)
    assert code == 130 and "Traceback" not in said, said
    assert not list((tmp_path / "slow").glob("step-*")) and not (tmp_path / "slow/lock").exists()


# ---- A full disk


@pytest.fixture(scope="module")
def one_step(tiny_home, tmp_path_factory):
    out = tmp_path_factory.mktemp("one-step")
    options = options_of(tiny_home, "train_sft.py") | {"out": out, "steps": 1}
    finish(start("train_sft.py", *flags(options | {"schedule": "constant"})))
    return out


@pytest.mark.parametrize("launcher", [(), RANKS])
def test_a_full_disk_is_one_line(one_step, tmp_path, launcher):
    shutil.copytree(one_step, tmp_path, dirs_exist_ok=True)
    good = contents(tmp_path / "step-000001")
    command = ["train_sft.py", *flags({"out": tmp_path, "steps": 2}), "--resume"]
    # No file may be larger than a part of the weights.
    code, said = ended(begin(*launcher, *command, largest_file=200_000))
    lines = [line for line in said.splitlines() if line.startswith("train_sft.py:")]
    assert code == 2 and len(lines) == 1 and "Traceback" not in said, said
    assert "can't write" in lines[0] and "step-000002" in lines[0] and "with room" in lines[0]
    assert "step-000001" in lines[0] and contents(tmp_path / "step-000001") == good
    assert not list(tmp_path.glob("*.partial")) and not (tmp_path / "lock").exists()


def test_rows_that_can_not_be_written(tmp_path):
    rows = folder.Rows(tmp_path / "metrics.jsonl", 0)
    rows.file.close()
    rows.file = Path("/dev/full").open("a")  # noqa: SIM115
    with pytest.raises(UserError, match=r"can't write .*metrics\.jsonl: No space left"):
        rows.append([{"step": 1}])


def test_when_a_thing_is_due():
    assert [step for step in range(1, 8) if run.is_due(step, 3, last=7)] == [3, 6, 7]
    assert [step for step in range(1, 8) if run.is_due(step, 0, last=7)] == [7]
