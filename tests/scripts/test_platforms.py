"""A machine without Triton, CPU sets and `resource` (macOS, Windows), and what runs say there.

No terminal either, as under nohup and Slurm.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import ROOT, finish, flags, metrics, start

import kernels
import machine
from kernels import absent
from training import run

ELSEWHERE = """
import os
import sys

sys.modules["triton"] = None  # to import it is an error
sys.modules["resource"] = None
del os.sched_getaffinity
del os.sysconf
"""

# Commands one after the other in one process, which imports torch once.
SEVERAL = """
import json
import runpy
import sys

for name, words in json.loads(sys.argv[1]).items():
    print(f"[{name}]", flush=True)
    is_module = words[0] == "-m"
    sys.argv = words[1:] if is_module else words
    run = runpy.run_module if is_module else runpy.run_path
    try:
        run(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
"""


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory) -> dict[str, str]:
    """The environment of such a machine."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "sitecustomize.py").write_text(ELSEWHERE)
    return {"PYTHONPATH": str(folder)}


def said_by(commands: dict[str, tuple], **environment) -> dict[str, str]:
    """Run commands, a name each; return what each of them said."""
    words = {name: list(map(str, command)) for name, command in commands.items()}
    process = start("-c", SEVERAL, json.dumps(words), fresh=True, **environment)
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0, said[-4000:]
    parts = re.split(r"^\[(\w+)\]\n", said, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.fixture(scope="module")
def runs(tiny_home, tmp_path_factory, elsewhere) -> tuple[Path, dict[str, str]]:
    """A folder with sft/ on rows without a centre, rl/ in which nothing is ever right, and eval/;
    what each has said."""
    out = tmp_path_factory.mktemp("runs")
    model = ("--model", tiny_home / "tiny")
    lines = (tiny_home / "scenes" / "rows.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    bare = tiny_home / "scenes" / "bare.jsonl"
    known = ("objects", "sizes", "names")
    with bare.open("w") as file:
        for row in rows:
            if row["path"] == "lor":
                kept = {name: value for name, value in row.items() if name not in known}
                file.write(json.dumps(kept) + "\n")
    both = ("--data", tiny_home / "scenes" / "rows.jsonl")
    sft = flags(dict(steps=2, batch=2, save_every=0))
    rl = flags(dict(steps=2, prompts=4, group=2, max_new_tokens=4, save_every=1))
    ask = flags(dict(limit=2, again=1, max_new_tokens=4))
    eval_data = ("--eval-data", tiny_home / "scenes" / "rows.jsonl", "--eval-limit", 4)
    commands = {
        "sft": ("train_sft.py", *model, "--data", bare, "--out", out / "sft", *sft),
        "rl": ("train_rl.py", *model, *both, "--out", out / "rl", *rl, *eval_data),
        "eval": ("eval.py", *model, *both, "--out", out / "eval", *ask),
        "plan": ("plan.py", "--model", out / "sft" / "step-000002"),
        "report": ("report.py", "--run", out),
        "tiny": ("-m", "model.tiny", "--help"),
    }
    return out, said_by(commands, **elsewhere)


def test_every_script_runs_without_triton_cpu_sets_and_resource(runs, tmp_path, elsewhere):
    out, said = runs
    assert (out / "sft" / "step-000002" / "model.safetensors").exists()
    assert (out / "rl" / "step-000002" / "model.safetensors").exists()
    summary = json.loads((out / "eval" / "summary.json").read_text())
    assert set(summary["results"]) == {"lor", "dtr"}
    assert metrics(out / "sft")[0]["peak_memory_mib"] is None  # nobody counts it there
    size = ("--n", 1, "--size", 64, 48)
    scenes = start("-m", "data.scenes", *size, "--out", tmp_path / "set", fresh=True, **elsewhere)
    finish(scenes)
    assert (out / "report.html").exists()
    assert "GB" in said["plan"] and "--family" in said["tiny"]


def test_a_run_without_a_terminal_says_where_it_is(runs):
    _, said = runs
    for name, steps in (("sft", 2), ("rl", 2)):
        lines = [line for line in said[name].splitlines() if line.startswith("step")]
        for step in range(1, steps + 1):
            pattern = rf"step +{step}/{steps}  eta \d+:\d\d:\d\d  "
            assert any(re.match(pattern, line) for line in lines), said[name]
    assert re.search(r"^saved step-000002$", said["sft"], re.M)
    assert "step-000001" not in said["sft"]  # --save-every 0: at the end only
    assert re.findall(r"^saved (step-\d+)$", said["rl"], re.M) == ["step-000001", "step-000002"]
    for line in re.findall(r"^step +\d/2.*$", said["rl"], re.M):
        assert re.search(r"  dtr_accuracy 0\.000  lor_accuracy 0\.000  ", line), line


def test_what_was_not_measured_is_null_and_no_zero(runs):
    out, said = runs
    for row in metrics(out / "sft"):
        assert row["loss"] == row["loss_text"] > 0
        assert row["loss_head"] is None and row["head_error_metres"] is None
    assert re.search(r"loss_head +-  head_error_metres +-", said["sft"])
    policy = ("entropy", "kl", "clip_low", "clip_high", "ratio_max", "mismatch_kl", "mismatch_max")
    for row in metrics(out / "rl"):
        assert "no update" in said["rl"] and row["kept"] == row["tokens"] == 0
        for name in ("loss", "grad_norm", "update_tokens_per_second", *policy):
            assert row[name] is None, name
        assert row["lor_entropy"] is None and row["dtr_kl"] is None
        assert row["accuracy"] == row["lor_accuracy"] == row["dtr_detect"] == 0  # measured
        assert row["lor_detect"] is None  # that path has nothing to detect
    assert re.search(r"entropy +-  ", said["rl"])


def test_what_is_not_asked_is_said(runs):
    _, said = runs
    assert re.search(
        r"validation asks 2 of \d+ dtr, 2 of \d+ lor questions: .*--eval-limit 4", said["rl"]
    )
    assert re.search(r"^--limit: 2 of \d+ questions are asked$", said["eval"], re.M)
    assert re.search(r"^--again: 1 of 2 questions are asked once more", said["eval"], re.M)
    assert re.search(r"^note: --warmup 50 .* --steps 2: .* reaches 4% of --lr$", said["sft"], re.M)


def test_kernels_that_are_absent_say_what_they_need():
    """Only a CUDA tensor asks for one."""

    @absent.jit
    def kernel(x, BLOCK: absent.constexpr):
        """Do nothing."""

    assert absent.constexpr(3) == 3 and kernel.__doc__ == "Do nothing."
    with pytest.raises(ModuleNotFoundError, match="Triton"):
        kernel[(1,)](1, BLOCK=2)


def test_the_kernels_take_triton_where_it_is():
    triton = pytest.importorskip("triton")
    assert kernels.triton is triton and kernels.tl is triton.language


def test_peak_memory_is_in_mib_on_every_platform(monkeypatch):
    status = Path("/proc/self/status").read_text()
    kib = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])
    assert run.peak_memory(torch.device("cpu")) == pytest.approx(kib / 1024, rel=0.05)
    resource = pytest.importorskip("resource")
    usage = resource.getrusage(resource.RUSAGE_SELF)
    counted = type("Usage", (), {"ru_maxrss": usage.ru_maxrss * 1024})
    monkeypatch.setattr(resource, "getrusage", lambda who: counted)
    monkeypatch.setattr(sys, "platform", "darwin")  # bytes there
    assert run.peak_memory(torch.device("cpu")) == pytest.approx(kib / 1024, rel=0.05)


def test_cores_and_memory_where_the_system_does_not_say(monkeypatch):
    assert machine.cpus() == len(os.sched_getaffinity(0))
    assert machine.memory() == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.delattr(os, "sysconf")
    assert machine.cpus() == os.cpu_count()
    assert machine.memory() == machine.ASSUMED_MEMORY


def test_no_other_device_than_cuda_is_taken():
    """MPS is left alone: a Mac computes on its CPU."""
    for file in [*ROOT.glob("*.py"), *(ROOT / "training").rglob("*.py")]:
        assert not re.search(r"\bmps\b", file.read_text()), file


def test_what_has_no_wheel_elsewhere_is_marked():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    marked = [line for line in lines if 'sys_platform == "linux"' in line]
    names = {re.split("[=;]", line)[0] for line in marked}
    assert names == {"triton", "liger-kernel"}


def test_make_names_an_old_python(tmp_path):
    old = tmp_path / "python3"
    old.write_text(
        f"#!/bin/sh\nexec {sys.executable} -c 'import sys; sys.version_info = (3, 10, 9)\n"
        'exec(sys.argv[1])\' "$2"\n'
    )
    old.chmod(0o755)
    (tmp_path / "requirements.txt").touch()
    path = f"{tmp_path}:{os.environ['PATH']}"
    made = subprocess.run(
        ["make", "-f", ROOT / "Makefile", ".venv/installed"],
        cwd=tmp_path,
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
    )
    assert made.returncode == 2 and "Python 3.11 or newer is needed" in made.stderr
    assert not (tmp_path / ".venv").exists()
