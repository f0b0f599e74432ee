"""What a run writes about its model: how regions are read and which extra parts have learnt; who may
read its files; a run's directory in the place of a checkpoint's."""

import os
import shutil
import stat

import pytest
from commands import TIMEOUT, flags, start
from safetensors import safe_open

import eval as evaluation
import plan
import train_rl
import train_sft
from errors import UserError
from model.qwen_vl import QwenVL


def metadata(step) -> dict:
    with safe_open(step / "spatial.safetensors", "pt") as file:
        return file.metadata()


def sft(home, out, **options):
    common = dict(model=str(home / "tiny"), data=(str(home / "scenes" / "rows.jsonl"),))
    train_sft.main(
        train_sft.Config(
            **common | dict(out=str(out), steps=2, batch=6, lr=1e-3, schedule="constant") | options
        )
    )
    return out / f"step-{options.get('steps', 2):06d}"


def rl(home, model, out, **options):
    common = dict(model=str(model), data=(str(home / "scenes" / "numbers.jsonl"),), out=str(out))
    sizes = dict(steps=1, prompts=4, group=4, max_new_tokens=3, filter="none")
    train_rl.main(train_rl.Config(**common | sizes | options))
    return out / "step-000001"


def ask(home, model, out, **options):
    common = dict(model=str(model), data=(str(home / "scenes" / "rows.jsonl"),), out=str(out))
    sizes = dict(limit=2, max_new_tokens=2, again=0, path="lor")
    return evaluation.main(evaluation.Config(**common | sizes | options))


@pytest.fixture(scope="module")
def trained(tiny_home, tmp_path_factory):
    """A step of an SFT run with everything on, written under a umask that others may write."""
    before = os.umask(0o002)
    try:
        return sft(tiny_home, tmp_path_factory.mktemp("record") / "sft")
    finally:
        os.umask(before)


# What is switched off -> how regions are read then, and what has learnt.
CASES = {
    "head_weight": (dict(head_weight=0.0), "token", {"region", "points"}),
    "drop_depth": (dict(drop_depth=1.0), "token", {"region", "head3d"}),
    "lm": (dict(train="lm"), "token", set()),
    "lora": (dict(train="lora"), "token", set()),
    "spatial": (dict(train="spatial"), "token", {"region", "points", "head3d"}),
    "text": (dict(regions="text"), "text", {"points"}),
    "muon": (dict(optimizer="muon"), "token", {"region", "points", "head3d"}),
}


@pytest.mark.parametrize("case", list(CASES))
def test_a_checkpoint_says_what_it_learnt(case, tiny_home, tmp_path):
    options, regions, trained = CASES[case]
    found = metadata(sft(tiny_home, tmp_path / "run", **options))
    assert found["points"] == "metric" and found["regions"] == regions
    assert set(filter(None, found["trained"].split(","))) == trained


def test_the_record_goes_on_through_rl_and_resume(tiny_home, trained, tmp_path):
    everything = {"points": "metric", "regions": "token", "trained": "head3d,points,region"}
    assert metadata(trained) == everything
    assert metadata(rl(tiny_home, trained, tmp_path / "rl")) == everything
    shutil.copytree(trained.parent, tmp_path / "sft")
    sft(tiny_home, tmp_path / "sft", steps=3, resume=True)
    assert metadata(tmp_path / "sft" / "step-000003") == everything
    # RL alone trains no extra part of a checkpoint that had none.
    assert metadata(rl(tiny_home, tiny_home / "tiny", tmp_path / "raw"))["trained"] == ""


def test_another_way_to_read_regions_is_refused(tiny_home, trained, tmp_path):
    words = r"trained with --regions token, and --regions text is asked for[^\n]*$"
    for begin in (
        lambda: sft(tiny_home, tmp_path / "a", model=str(trained), regions="text"),
        lambda: rl(tiny_home, trained, tmp_path / "b", regions="text"),
        lambda: ask(tiny_home, trained, tmp_path / "c", regions="text"),
    ):
        with pytest.raises(UserError, match=words):
            begin()
    assert not list(tmp_path.rglob("*.json*"))


def test_untrained_parts_are_said_once(tiny_home, trained, tmp_path, capsys):
    def said(begin) -> list[str]:
        capsys.readouterr()
        begin()
        return [line for line in capsys.readouterr().out.splitlines() if "never learnt" in line]

    tiny = tiny_home / "tiny"
    assert len(said(lambda: ask(tiny_home, tiny, tmp_path / "a"))) == 3
    assert len(said(lambda: ask(tiny_home, tiny, tmp_path / "b", depth=False))) == 2
    assert len(said(lambda: ask(tiny_home, tiny, tmp_path / "c", blind=True))) == 2
    assert len(said(lambda: ask(tiny_home, tiny, tmp_path / "d", regions="text"))) == 1
    assert len(said(lambda: rl(tiny_home, tiny, tmp_path / "e"))) == 2
    assert len(said(lambda: sft(tiny_home, tmp_path / "f", train="lm"))) == 2
    assert said(lambda: sft(tiny_home, tmp_path / "g")) == []
    assert said(lambda: ask(tiny_home, trained, tmp_path / "h")) == []
    assert said(lambda: rl(tiny_home, trained, tmp_path / "i")) == []


def test_the_umask_decides_who_may_read_a_step(trained):
    files = [path for path in trained.rglob("*") if path.is_file()]
    assert any(path.parent.name == "trainer" for path in files)
    for path in files:
        assert stat.S_IMODE(path.stat().st_mode) == 0o664, path
    for path in (trained, trained / "trainer"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o775, path


def test_a_runs_directory_stands_for_its_newest_whole_step(tiny_home, trained, tmp_path, capsys):
    """In every command; one line says which, and it is the step that is recorded."""
    source = trained.parent
    common = flags({"model": source, "data": tiny_home / "scenes" / "numbers.jsonl"})
    few = {
        "train_sft.py": dict(steps=1, batch=2),
        "train_rl.py": dict(steps=1, prompts=2, group=2, max_new_tokens=2),
        "eval.py": dict(limit=1, max_new_tokens=2, again=0, path="direct"),
    }
    running = {}
    for script, options in few.items():
        out = flags({"out": tmp_path / script})
        running[script] = start(script, *common, *out, *flags(options))
    for script, process in running.items():
        said, _ = process.communicate(timeout=TIMEOUT)
        assert process.returncode == 0, said
        assert said.count("newest whole checkpoint is step-000002\n") == 1, said
        written = (tmp_path / script).glob("*.json")
        assert any(str(trained) in path.read_text() for path in written)
    plan.main(plan.Config(str(source), 1, 80.0))
    assert "newest whole checkpoint is step-000002" in capsys.readouterr().err
    assert QwenVL.from_pretrained(source).origin.directory == trained.absolute()
