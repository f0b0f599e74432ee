"""eval.py: estimates in closed form, what is asked and shown, the numbers of a row, a run with a
stand-in."""

import json
import math
import random
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import tyro
from commands import ROOT
from eval_set import example, stand_in, write_set
from PIL import Image

import eval as evaluation
from errors import UserError
from eval import Config, answer_row, best_constants, seen, select
from eval_table import estimate, paired, summarise
from model.rollout import Rollout
from srreal import PATHS, target


def rollout(text: str, finished: bool = True) -> Rollout:
    return Rollout(text, [1, 2, 3], [0.0] * 3, finished)


# ---- Estimates
def test_mean_of_singletons_has_the_textbook_error():
    values = [0.0, 1.0, 1.0, 0.25, 0.5]
    got = estimate(values, list("abcde"))
    assert got["n"] == 5 and got["value"] == pytest.approx(np.mean(values))
    assert got["se"] == pytest.approx(np.std(values, ddof=1) / math.sqrt(5))


def test_questions_of_one_image_count_as_one():
    got = estimate([1, 1, 0, 0], list("aabb"))
    # sums 1, -1: sqrt((1 + 1) * 2 / 1) / 4
    assert got == dict(value=0.5, se=pytest.approx(0.5), n=4)
    twice = estimate([1, 1, 0, 0, 0.5, 0.5], list("aabbcc"))
    # a copy adds nothing
    assert twice["se"] == pytest.approx(estimate([1, 0, 0.5], list("abc"))["se"])
    assert estimate([0.3, 0.4], list("aa"))["se"] is None and estimate([], []) is None


def test_median_and_its_error():
    values = np.random.default_rng(0).normal(size=4000)
    got = estimate(values, range(4000), median=True)
    assert got["value"] == pytest.approx(np.median(values))
    # asymptotic, for a normal law
    assert got["se"] == pytest.approx(math.sqrt(math.pi / 2 / 4000), rel=0.25)


def test_paired_difference_closed_form():
    def row(name, value):
        return dict(id=name, path="lor", accuracy=value, cluster=name)

    before = [row("a", 0.0), row("b", 1.0), row("c", 0.5), row("gone", 1.0), row("none", None)]
    after = [row("c", 1.0), row("a", 1.0), row("b", 1.0), row("new", 0.0), row("none", 1.0)]
    got = paired(before, after)
    changes = [0.5, 1.0, 0.0]
    assert got["n"] == 3 and got["value"] == pytest.approx(0.5)
    assert got["se"] == pytest.approx(np.std(changes, ddof=1) / math.sqrt(3))
    assert paired(before, [row("new", 0.0)]) is None
    # another path is another question
    assert paired(before, [dict(row("a", 1.0), path="dtr")]) is None


# ---- What is asked, and what is shown
def test_each_question_once_in_each_path():
    rows = [example("a", "lor"), example("a", "dtr"), example("b", "dtr"), example("c", "direct")]
    both = select(rows, "both", None)
    assert [(e.id, e.path) for e in both[:3]] == [
        ("a-lor", "lor"),
        ("b-lor", "lor"),
        ("c-lor", "lor"),
    ]
    assert [(e.id, e.path) for e in both[3:]] == [
        ("a-dtr", "dtr"),
        ("b-dtr", "dtr"),
        ("c-dtr", "dtr"),
    ]
    assert both[0] is rows[0] and both[3] is rows[1]  # its own row where there is one
    assert {evaluation.question_id(e) for e in both} == {"a", "b", "c"}
    assert [e.path for e in select(rows, "direct", None)] == ["direct"] * 3
    with pytest.raises(UserError, match="a-lor"):
        select([*rows, example("a", "lor")], "both", None)
    with pytest.raises(UserError, match="'a-lor' and 'a' are both the lor row of question 'a'"):
        select([rows[0], replace(rows[0], id="a")], "both", None)
    with pytest.raises(UserError, match="nothing to ask"):
        evaluation.main(Config("m"))


def test_only_its_own_path_is_cut_off_an_id():
    odd = [
        replace(example("x"), id=name, path=path)
        for name, path in (
            ("turn-lor", "dtr"),
            ("turn", "lor"),
            ("q", "lor"),
            ("q", "dtr"),
            ("r", "dtr"),
        )
    ]
    both = select(odd, "both", None)
    keys = [(e.id, e.path) for e in both]
    names = {"turn-lor", "turn", "q", "r"}
    assert len(set(keys)) == 8 and {evaluation.question_id(e) for e in both} == names
    assert [evaluation.question_id(e) for e in both] == ["turn-lor", "turn", "q", "r"] * 2
    # else it would be taken for `turn`
    assert keys[0] == ("turn-lor-lor", "lor") and keys[3] == ("r", "lor")
    assert [(e.id, e.path) for e in select(both, "both", None)] == keys


def test_a_limit_keeps_the_same_questions_in_any_order():
    rows = [
        example(f"{task}{i}", path, task=task)
        for task in "xyz"
        for i in range(40)
        for path in ("lor", "dtr")
    ]
    kept = {e.id for e in select(rows, "both", 30)}
    assert len(kept) == 60 and {name[0] for name in kept} == set("xyz")
    random.Random(0).shuffle(rows)
    assert {e.id for e in select(rows, "both", 30)} == kept
    assert {e.id for e in select(rows, "lor", 10)} < kept  # and a smaller limit keeps some of them


def test_blind_shows_nothing_of_the_picture():
    e = example(depths=[np.ones((30, 40), np.float32)])
    e.images[0].paste((255, 0, 0), (1, 2, 11, 12))
    blind = seen(e, Config("m", blind=True))
    assert blind.images[0].size == (40, 30) and len(blind.images[0].getcolors()) == 1
    assert blind.depths is None and blind.intrinsics is None
    # a region's place would tell where the object is
    assert blind.regions == [(0, (0, 0, 40, 30))] * 2
    assert seen(e, Config("m")) is e
    no_depth = seen(e, Config("m", depth=False))
    assert no_depth.depths is None and no_depth.images is e.images and no_depth.regions == e.regions


def test_best_constants():
    rows = [example(str(i), answer=a, task="order") for i, a in enumerate("ABBCB")]
    rows += [
        example(f"n{i}", answer=a, task="n", objects={})
        for i, a in enumerate(["1.0", "1.1", "9.0"])
    ]
    best = best_constants(rows)
    assert best["order"][0] == "B" and best["order"][1] == [0, 0, 3.0]
    assert best["n"][0] in ("1.0", "1.1") and best["n"][1] is None


# ---- A row
CONSTANT = ("2.0", [0.0, 0.0, 3.0])
HEAD = np.array([[0.0, 0.3, 2.0], [0.0, 0.0, 4.4]])


def test_row_of_a_right_answer():
    e = example()
    row = answer_row(e, rollout(target(e)), HEAD, CONSTANT)
    assert (row["accuracy"], row["any_format"], row["format"], row["detect"], row["total"]) == (
        1,
        1,
        1,
        1,
        1,
    )
    assert row["text_errors"] == {"red bbox": 0, "blue point": 0} and row["tokens"] == 3
    assert row["head_errors"] == {0: pytest.approx(0.3), 1: pytest.approx(0.4)}
    assert row["chance_errors"] == {"red bbox": 1, "blue point": 1} and row["chance"] == 1
    assert row["region_mentions"] == ["red bbox", "blue point"]
    assert row["parsed"]["count"] == 2 and not row["unparsed"] and not row["truncated"]
    e = example(path="lor")
    assert answer_row(e, rollout(target(e)), HEAD, CONSTANT)["detect"] is None


def test_row_of_a_malformed_answer():
    """Accuracy needs the format, any_format and the centres do not; the first box of a mention
    counts."""
    lines = [
        f'<3d_box center="{c}">x ({m})</3d_box>'
        for c, m in (("0,0,2.5", "Red bbox"), ("0,0,2", "red bbox"), ("9,9,9", "green bbox"))
    ]
    text = "<detect>Find 2 relevant objects:\n" + "\n".join(lines) + "</detect><think>t</think>"
    text += "<answer>2 m</answer>"
    row = answer_row(example(), rollout(text, False), HEAD, CONSTANT)
    assert (row["accuracy"], row["any_format"], row["format"], row["detect"], row["total"]) == (
        0,
        1,
        0,
        0,
        0,
    )
    assert row["text_errors"] == {"red bbox": pytest.approx(0.5)} and row["truncated"]
    empty = answer_row(example(), rollout("no tag at all"), HEAD, CONSTANT)
    assert empty["unparsed"] and empty["text_errors"] == {} and empty["any_format"] == 0


BOX = '<3d_box center="{}" size="{}">{}</3d_box>'


def test_row_of_an_answer_in_3d_boxes():
    """Whatever a lone object is called; several by their mention, of which the first box counts."""
    one = example(
        path="direct",
        answer=BOX.format("0.0,0.0,2.0", "1.0,2.0,3.0", "chair"),
        objects={"region 1": (0.0, 0.0, 2.0)},
        sizes={"region 1": (1.0, 2.0, 3.0)},
    )
    row = answer_row(
        one, rollout("It is " + BOX.format("0,.3,2.4", "1,2.5,2", "seat")), HEAD[:1], CONSTANT
    )
    assert row["text_errors"] == {"region 1": pytest.approx(0.5)}
    assert row["size_errors"] == {"region 1": pytest.approx(0.5)}  # (0 + .5 + 1) / 3
    assert row["chance_errors"] == {"region 1": 1} and row["accuracy"] == 0
    bare = answer_row(one, rollout('<3d_box center="0,0,2">chair</3d_box>'), HEAD[:1], CONSTANT)
    assert bare["text_errors"] == {"region 1": 0} and bare["size_errors"] == {}
    for text in (
        "",
        "0,0,2",
        BOX.format("0,0", "1,2,3", "x"),
        BOX.format("0,0," + 400 * "9", "1,2,3", "x"),
        BOX.format("nan,0,0", "1,2,3", "x"),
    ):
        row = answer_row(one, rollout(text), HEAD[:1], CONSTANT)
        assert row["text_errors"] == row["size_errors"] == {}
    several = example(
        path="direct", answer="-", objects={"region 1": (0.0, 0.0, 2.0), "Region 2": (1, 0, 2)}
    )
    lines = [
        f'<3d_box center="{c}">{label}</3d_box>'
        for c, label in (
            ("1,0,5", "lamp (region 2)"),
            ("0,0,2.2", "a (nice) chair (Region 1)"),
            ("1,0,2", "lamp (region 2)"),
        )
    ]
    row = answer_row(several, rollout("\n".join(lines)), HEAD, CONSTANT)
    assert (
        row["text_errors"] == {"region 1": pytest.approx(0.2), "region 2": 3}
        and row["size_errors"] == {}
    )
    assert answer_row(example(path="lor"), rollout(lines[0]), HEAD, CONSTANT)["text_errors"] == {}


def test_several_views_are_measured_in_the_stated_frame():
    views = {
        "red bbox": {0: (0.0, 0.0, 2.0), 1: (1.0, 0.0, 2.0)},
        "blue point": {0: (0.0, 0.0, 4.0)},
    }
    e = example(
        images=[Image.new("RGB", (40, 30))] * 2,
        objects=views,
        regions=[(1, (1, 2, 11, 12)), (0, (20, 5, 26, 15))],
    )
    text = (
        "<detect>After aligning to the reference frame {}, find 1 relevant objects:\n"
        '<3d_box center="1.0,0,2.2">chair (red bbox)</3d_box></detect>'
        "<think>t</think><answer>2.0</answer>"
    )
    one = answer_row(e, rollout(text.format(1)), HEAD, CONSTANT)
    assert one["text_errors"] == {"red bbox": pytest.approx(0.2)}
    zero = answer_row(e, rollout(text.format(0)), HEAD, CONSTANT)
    assert zero["text_errors"] == {"red bbox": pytest.approx(math.hypot(1, 0.2))}
    assert answer_row(e, rollout(text.format(7)), HEAD, CONSTANT)["text_errors"] == {}
    assert zero["head_errors"][0] == pytest.approx(math.hypot(1, 0.3))  # region 0 lies in image 1


def test_summary_of_hand_made_rows():
    right, wrong = (
        answer_row(example(name), rollout(text), HEAD, CONSTANT)
        for name, text in (("a", target(example())), ("b", "nothing"))
    )
    got = summarise([right, wrong])
    assert got["n"] == 2 and got["unparsed"] == 1 and got["truncated"] == 0
    assert got["accuracy"] == dict(value=0.5, se=pytest.approx(0.5), n=2)
    assert got["text_errors"]["n"] == 2 and got["head_errors"]["value"] == pytest.approx(0.35)
    assert (
        summarise([answer_row(example(path="lor"), rollout("x"), HEAD, CONSTANT)])["detect"] is None
    )


# ---- A run
def test_run_with_a_stand_in(tmp_path, monkeypatch, capsys):
    bare = "<answer>2.0</answer>"
    stand_in(monkeypatch, lambda e: bare if e.path == "lor" and e.task == "distance" else target(e))
    monkeypatch.setattr(evaluation, "CHUNK", 5)
    config = Config("m", (write_set(tmp_path / "set"),), out=str(tmp_path / "out"))
    evaluation.main(config)

    def strict(text):
        return json.loads(text, parse_constant=pytest.fail)

    summary = strict((tmp_path / "out" / "summary.json").read_text())
    rows = [
        strict(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()
    ]
    assert len(rows) == len({(row["id"], row["path"]) for row in rows}) == 24
    assert summary["config"]["data"] == list(config.data) and set(summary["results"]) == {
        "lor",
        "dtr",
    }
    lor, dtr = (summary["results"][path] for path in ("lor", "dtr"))
    assert set(lor) == {"all", "distance", "order", "no depth"} and lor["all"]["n"] == 12
    assert lor["all"]["accuracy"]["value"] == 0.5 and lor["all"]["any_format"]["value"] == 1
    assert dtr["all"]["accuracy"]["value"] == 1 and dtr["all"]["text_errors"]["value"] == 0
    assert (
        dtr["all"]["head_errors"]["value"] == pytest.approx(0.3)
        and dtr["order"]["chance"]["value"] == 0.5
    )
    table = capsys.readouterr().out.splitlines()
    lor_line, dtr_line = (
        next(line for line in table if line.startswith(name)) for name in ("LOR", "DTR")
    )
    assert (
        lor_line.split()[:3] == ["LOR", "12", "0.500±0.000"]
        and dtr_line.split()[2] == "1.000±0.000"
    )
    assert len(lor_line) == len(dtr_line)


def test_what_has_depth_is_asked_again_without(tmp_path, monkeypatch, capsys):
    stand_in(monkeypatch, lambda e: target(e) if e.depths else "?")
    config = Config("m", (write_set(tmp_path / "set"),), out=str(tmp_path / "out"), again=8)
    summary = evaluation.main(config)
    table = capsys.readouterr().out.splitlines()
    for path in ("lor", "dtr"):
        whole, bare = (summary["results"][path][key] for key in ("all", "no depth"))
        assert (whole["n"], whole["accuracy"]["value"]) == (12, 1)
        assert (bare["n"], bare["accuracy"]["value"], bare["accuracy"]["se"]) == (8, 0, 0)
        (line,) = (line for line in table if line.startswith(f"{path} (no depth)"))
        assert line.split()[3:5] == ["8", "0.000±0.000"]
    answers = (tmp_path / "out" / "predictions-no-depth.jsonl").read_text().splitlines()
    assert len(answers) == 16 and {json.loads(line)["text"] for line in answers} == {"?"}
    assert len((tmp_path / "out" / "predictions.jsonl").read_text().splitlines()) == 24
    for change in (dict(depth=False), dict(blind=True), dict(again=0)):
        out = str(tmp_path / "-".join(change))
        found = evaluation.main(replace(config, **change, out=out))["results"]
        assert all("no depth" not in tasks for tasks in found.values())
    monkeypatch.setattr(evaluation.datasets, "load", lambda *args, **options: [example()])
    config = replace(config, out=str(tmp_path / "flat"))
    assert "no depth" not in evaluation.main(config)["results"]["dtr"]


def test_the_default_out_names_the_model_and_the_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stand_in(monkeypatch, target)
    data = (write_set(tmp_path / "set", 1),)
    for model in ("out/sft/step-000100", "Qwen/Qwen3-VL-4B-Instruct"):
        evaluation.main(Config(model, data))
    outs = sorted(path.parent.name for path in tmp_path.glob("out/eval/*/summary.json"))
    assert outs == ["Qwen3-VL-4B-Instruct-set", "sft-step-000100-set"]
    name = evaluation.default_out(Config("m", ("vqa:/a/b@/images,split=x",), benchmark=None))
    assert name == "out/eval/m-b"
    config = Config("m", ("/sets/BLINK",), benchmark="blink/Relative_Depth")
    assert evaluation.default_out(config) == "out/eval/m-blink-Relative_Depth"


def test_an_out_that_can_not_be_written(tmp_path, monkeypatch):
    stand_in(monkeypatch, target)
    (tmp_path / "file").write_text("mine")
    config = Config("m", (write_set(tmp_path / "set", 1),), out=str(tmp_path / "file"))
    with pytest.raises(UserError, match="can't write .*file.*--out has to be a folder"):
        evaluation.main(config)
    assert (tmp_path / "file").read_text() == "mine"

    def full(path, rows):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(evaluation, "append_rows", full)
    with pytest.raises(UserError, match=r"can't write .*predictions\.jsonl: No space left"):
        evaluation.main(replace(config, out=str(tmp_path / "out")))


def test_bad_input_ends_in_one_message(tmp_path):
    for limit in (0, -1):
        with pytest.raises(UserError, match="--limit"):
            evaluation.main(Config("m", (write_set(tmp_path / f"limit{limit}", 1),), limit=limit))
    for top_p in (0.0, 1.5, math.nan):
        with pytest.raises(UserError, match="--top-p"):
            evaluation.main(Config("m", ("no such set",), top_p=top_p))
    (tmp_path / "rows.jsonl").write_text('{"id": "a"}\n')
    command = [sys.executable, ROOT / "eval.py", "--model", "m", "--data", tmp_path]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert all(word in done.stderr for word in ("--skip-bad-rows", "images", "answer")), done.stderr
    with pytest.raises(UserError, match="./no/model"):
        evaluation.main(
            Config("./no/model", (write_set(tmp_path / "set", 1),), out=str(tmp_path / "out"))
        )
    with pytest.raises(UserError, match="/no/set"):
        evaluation.main(Config("m", ("/no/set",)))


def test_a_bug_is_not_the_users_to_mend(tmp_path, monkeypatch):
    """What the sampler or the 3D head raises ends in its own traceback."""
    config = Config("m", (write_set(tmp_path / "set", 1),), out=str(tmp_path / "out"))

    def broken(*args, **options):
        raise ValueError("zip() argument 2 is shorter than argument 1")

    for name in ("sample_groups", "predict_centres"):
        with monkeypatch.context() as patch:
            stand_in(patch, target)
            patch.setattr(evaluation, name, broken)
            with pytest.raises(ValueError, match="zip") as error:
                evaluation.main(config)
            assert not isinstance(error.value, UserError)


def test_the_flags_of_sampling_reach_the_sampler(tmp_path, monkeypatch):
    stand_in(monkeypatch, target)
    given = {}
    answers = evaluation.sample_groups
    monkeypatch.setattr(
        evaluation,
        "sample_groups",
        lambda *args, **options: given.update(options) or answers(*args, **options),
    )
    flags = dict(max_new_tokens=9, temperature=0.7, top_p=0.9, seed=3)
    config = Config("m", (write_set(tmp_path / "set", 1),), out=str(tmp_path / "out"), **flags)
    evaluation.main(config)
    assert given == flags


def test_every_path_is_a_value_of_the_flag():
    for path in (*PATHS, "both"):
        assert tyro.cli(Config, args=["--model", "m", "--path", path]).path == path
    with pytest.raises(SystemExit):
        tyro.cli(Config, args=["--model", "m", "--path", "cot"])


def test_the_head_is_asked_where_there_is_a_region(tmp_path, monkeypatch):
    """A forward of all prompts would be wasted on benchmarks without regions."""
    stand_in(monkeypatch, lambda e: e.answer)
    seen, heads = [], evaluation.predict_centres
    monkeypatch.setattr(
        evaluation, "predict_centres", lambda *args: seen.extend(args[2]) or heads(*args)
    )
    plain = example("plain", "direct", question="How far?", regions=[], objects={})
    monkeypatch.setattr(
        evaluation.datasets, "load", lambda *args, **options: [plain, example("q", "direct")]
    )
    evaluation.main(Config("m", ("x",), path="direct", out=str(tmp_path)))
    assert [e.id for e in seen] == ["q-direct"]
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert rows[0]["head_centres"] == [] and len(rows[1]["head_centres"]) == 2
