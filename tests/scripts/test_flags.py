"""The command lines: bounds, other trainers' names, and how soon they answer."""

import os
import re
import resource
import subprocess
import sys
import typing
from dataclasses import fields

import pytest
from commands import ROOT, start

import ask
import eval as evaluation
import flags
import plan
import report
import train_rl
import train_sft
from data import coldstart, depth, scenes
from errors import UserError
from model import tiny

SCRIPTS = {
    "train_sft.py": (train_sft, "--model m --data d --out o"),
    "train_rl.py": (train_rl, "--model m --data d --out o"),
    "eval.py": (evaluation, "--model m --data d"),
    "ask.py": (ask, "--model m --image i --question q"),
    "plan.py": (plan, "--model m"),
    "report.py": (report, "--run r"),
    "-m data.scenes": (scenes, "--out o"),
    "-m data.coldstart": (coldstart, "--data d --out o"),
    "-m data.depth": (depth, "--data d --model m"),
    "-m model.tiny": (tiny, "--out o"),
}


def numbers_in(hint) -> set:
    if hint in (int, float):
        return {hint}
    found = set()
    for part in typing.get_args(hint):
        found |= numbers_in(part)
    return found


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_number_has_bounds(script):
    config = SCRIPTS[script][0].Config
    for name, hint in typing.get_type_hints(config, include_extras=True).items():
        assert not numbers_in(hint) or flags.bound_of(hint), name


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_number_may_be_negative_or_no_number(script):
    config = SCRIPTS[script][0].Config
    hints = typing.get_type_hints(config, include_extras=True)
    required = {f.name: "x" for f in fields(config) if f.default is f.default_factory}
    for name, hint in hints.items():
        kinds = numbers_in(hint)
        bad = {int: [-1], float: [-1.0, float("nan"), float("inf")]}
        for value in [value for kind in kinds for value in bad[kind]]:
            several = typing.get_origin(hint) is tuple
            flag = f"--{name.replace('_', '-')} "
            with pytest.raises(UserError, match=f"^{flag}.*(at least|above) "):
                config(**required | {name: (value, value) if several else value})


def answer(script: str, line: str, capsys, monkeypatch) -> str:
    """What the command says of a line that is wrong."""
    monkeypatch.setattr(sys, "argv", [script.split()[-1], *line.split()])
    module, needed = SCRIPTS[script]
    with pytest.raises(SystemExit) as end:
        flags.parse(module.Config, module.__doc__, [*needed.split(), *line.split()])
    assert end.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    "script, line, words",
    [
        ("train_sft.py", "--clip-norm -1", "--clip-norm -1.0: it has to be at least 0"),
        ("train_sft.py", "--save-every -1", "--save-every -1: it has to be at least 0"),
        ("train_sft.py", "--steps 0", "--steps 0: it has to be at least 1"),
        ("train_sft.py", "--batch 0", "--batch 0: it has to be at least 1"),
        ("train_sft.py", "--beta2 1", "--beta2 1.0: it has to be at least 0 and below 1"),
        ("train_sft.py", "--drop-depth 1.5", "--drop-depth 1.5: .* at least 0 and at most 1"),
        ("train_sft.py", "--lr nan", "--lr nan: it has to be above 0"),
        ("train_sft.py", "--seed -1", "--seed -1: it has to be at least 0"),
        ("train_rl.py", "--prompts 0", "--prompts 0: it has to be at least 1"),
        ("train_rl.py", "--group 1", r"--group 1: it has to be at least 2 \(one alone is never"),
        ("train_rl.py", "--group 0", "--group 0: it has to be at least 2"),
        ("train_rl.py", "--temperature 0", "--temperature 0.0: it has to be above 0"),
        ("train_rl.py", "--top-p 0", "--top-p 0.0: it has to be above 0 and at most 1"),
        ("train_rl.py", "--clip-low 1.2", "--clip-low 1.2: it has to be above 0 and at most 1"),
        ("train_rl.py", "--dual-clip 1", "--dual-clip 1.0: it has to be 0, or above 1"),
        ("train_rl.py", "--kl inf", "--kl inf: it has to be at least 0"),
        ("train_rl.py", "--loss ppo", "--loss ppo: it is one of dapo, grpo"),
        ("train_rl.py", "--reward-weights detect", "--reward-weights detect: it is NAME=WEIGHT"),
        (
            "train_rl.py",
            "--reward-weights detct=.3",
            "--reward-weights detct=.3: it is of accuracy, format, detect",
        ),
        (
            "train_rl.py",
            "--reward-weights detect=1",
            "--reward-weights detect=1: a weight is at least 0 and below 1",
        ),
        (
            "train_rl.py",
            "--steps 0 --slots 0",
            "--steps 0: .* at least 1; --slots 0: .* at least 1",
        ),
        ("eval.py", "--limit 0", "--limit 0: it has to be at least 1"),
        ("eval.py", "--temperature -1", "--temperature -1.0: it has to be at least 0"),
        ("plan.py", "--memory 0", "--memory 0.0: it has to be above 0"),
        ("report.py", "--questions -1", "--questions -1: it has to be at least 0"),
        ("-m data.scenes", "--size 16 64", "--size 16 64: it has to be at least 32"),
        ("-m data.scenes", "--lor 2", "--lor 2.0: .* at least 0 and at most 1"),
        ("-m data.coldstart", "--samples 0", "--samples 0: it has to be at least 1"),
        ("-m data.depth", "--batch 0", "--batch 0: it has to be at least 1"),
        (
            "train_sft.py",
            "--resume true",
            "--resume takes no value: it is --resume, or --no-resume",
        ),
        ("train_rl.py", "--no-fused-loss=1", "--no-fused-loss takes no value: it is --fused-loss"),
        ("eval.py", "--depth False --limit 3", "--depth takes no value"),
        ("train_sft.py", "--out=", "--out is empty"),
        ("-m data.scenes", "--out=", "--out is empty"),
        ("-m model.tiny", "--seed 4294967296", "--seed 4294967296: .* at most 4.29497e"),
    ],
)
def test_a_number_out_of_bounds_is_one_line(script, line, words, capsys, monkeypatch):
    said = answer(script, line, capsys, monkeypatch)
    assert re.match(rf"{script.split()[-1]}: {words}", said) and said.count("\n") == 1, said


@pytest.mark.parametrize(
    "script, theirs, ours",
    [
        ("train_sft.py", "--epochs 3", "--steps"),
        ("train_sft.py", "--num-train-epochs 3", "--steps"),
        ("train_sft.py", "--num_train_epochs=3", "--steps"),
        ("train_sft.py", "--batch-size 8", "--batch"),
        ("train_rl.py", "--batch-size 8", "--prompts"),
        ("train_sft.py", "--per-device-train-batch-size 8", "--batch"),
        ("train_sft.py", "--gradient-accumulation-steps 8", "--micro-tokens"),
        ("train_rl.py", "--max-grad-norm 1", "--clip-norm"),
        ("train_rl.py", "--num-generations 8", "--group"),
        ("train_rl.py", "--beta 0.04", "--kl"),
        ("train_rl.py", "--max-completion-length 512", "--max-new-tokens"),
        ("train_rl.py", "--report-to wandb", "metrics.jsonl"),
        ("train_sft.py", "--learning-rate 1e-5", "--lr"),
        ("train_sft.py", "--output-dir x", "--out"),
        ("train_sft.py", "--model-name-or-path x", "--model"),
        ("eval.py", "--model-path x", "--model"),
        ("train_sft.py", "--dataset x", "--data"),
        ("train_sft.py", "--bf16", "bf16"),
        ("train_sft.py", "--deepspeed x.json", "--shard"),
        ("train_sft.py", "--logging-steps 10", "every step"),
        ("train_rl.py", "--eval-steps 10", "--eval-every"),
        ("train_rl.py", "--save-steps 10", "--save-every"),
        ("train_rl.py", "--save-total-limit 2", "--keep"),
        ("-m data.coldstart", "--num-samples 3", "--samples"),
        ("train_sft.py", "--n_epochs=3", "--steps"),
        ("train_sft.py", "--clip_grad 1", "--clip-norm"),
        ("train_rl.py", "--ppo-mini-batch-size 8", "--updates"),
        ("train_rl.py", "--lora_alpha 32", "--lora"),
        ("train_rl.py", "--entropy-coeff 0.01", "--entropy-coef"),
        ("train_sft.py", "--image_folder x", "PATH@FOLDER"),
        ("train_sft.py", "--local_rank=0", "torchrun"),
    ],
)
def test_other_trainers_flags_get_a_hint_at_ours(script, theirs, ours, capsys, monkeypatch):
    said = answer(script, theirs, capsys, monkeypatch)
    name = theirs.split()[0].partition("=")[0].replace("_", "-")
    assert said.startswith(f"{script.split()[-1]}: {name}: ") and said.count("\n") == 1
    assert re.search(rf"{ours}\b", said.partition(name)[2]), said


def test_an_unknown_flag_gets_the_nearest_name(capsys, monkeypatch):
    assert "--save-every" in answer("train_sft.py", "--save-evry 3", capsys, monkeypatch)


def test_the_hints_are_flags_that_there_are():
    known = set()
    for module, _ in SCRIPTS.values():
        names = {field.name for field in fields(module.Config)}
        known |= names
        assert not {name.replace("-", "_") for name in flags.PEERS} & names
    known.add("track")  # what logs elsewhere, where there is one
    for theirs, (ours, note) in flags.PEERS.items():
        assert set(ours) <= known and (ours or note), theirs


def test_an_empty_word_is_refused_where_the_flag_has_a_meaning_for_none(monkeypatch, capsys):
    needed = ["--model", "m", "--data", "d"]
    assert flags.parse(evaluation.Config, "", [*needed, "--out", ""]).out == ""
    for words in (["--data", "a", ""], ["--model", ""], ["--out", "", "--resume"]):
        with pytest.raises(SystemExit):
            flags.parse(train_sft.Config, "", [*needed, *words])
        assert re.search(r": --\w+ is empty\n$", capsys.readouterr().err)


def test_ctrl_c_while_a_script_is_imported_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["/here/train_rl.py"])
    flags.say_interrupted(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert capsys.readouterr().err == "train_rl.py: interrupted\n"


# ---- How soon

NO_TORCH = """
import sys

class NoTorch:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in ("torch", "transformers", "triton"):
            raise AssertionError(f"{name} is imported")

sys.meta_path.insert(0, NoTorch())
"""


@pytest.fixture(scope="module")
def without_torch(tmp_path_factory):
    """The environment in which to import torch or transformers is an error."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "sitecustomize.py").write_text(NO_TORCH)
    return os.environ | {"PYTHONPATH": str(folder)}


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("line", ["--help", "--such-a-flag 1", "{} --seed -1", "{} --batch-size"])
def test_help_and_a_wrong_flag_need_no_torch(script, line, without_torch):
    line = line.format(SCRIPTS[script][1])
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, *script.split(), *line.split()],
        cwd=ROOT,
        env=without_torch,
        capture_output=True,
        text=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == (0 if line == "--help" else 2), done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 3


@pytest.mark.parametrize("module", ["flags", "data", "report"])
def test_an_old_python_is_told_so(module):
    # Nothing is installed for it, either.
    code = "import sys; sys.version_info = (3, 10, 9); sys.modules['numpy'] = None; import "
    code += module
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("Python 3.11 or newer is needed; this is 3.")
    assert done.stderr.count("\n") == 1


def test_of_several_ranks_the_first_speaks():
    """torchrun ends all with the first that ends, so the others wait for it."""
    line = ["train_sft.py", "--epochs", "3"]
    first, second = (start(*line, RANK=str(rank)) for rank in range(2))
    assert "--steps" in first.communicate()[0] and first.returncode == 2
    assert second.communicate()[0] == "" and second.returncode == 2
