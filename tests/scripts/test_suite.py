"""eval.py --benchmark and --suite on the field's common table: what is printed and written, missing
and incomplete sets, ranks, interruptions; comparisons by question; frames that are encoded once."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args, get_type_hints

import field_sets as sets
import numpy as np
import pytest
import torch
from eval_set import stand_in

import eval as evaluation
from data import benchmarks
from data.frames import Frame
from errors import UserError
from eval import Config
from eval_table import connected, paired_by_question, points
from training import ranks

pytestmark = pytest.mark.filterwarnings("ignore:.* are published")

EASI8 = benchmarks.SUITES["easi8"]


def right(example) -> str:
    if example.path == "direct":
        return example.answer
    return f"<think>so</think><answer>{example.answer}</answer>"


@pytest.fixture
def asked(monkeypatch):
    """The questions that a stand-in has answered, rightly but for every third."""
    found = []

    def answer(example):
        found.append(example)
        return right(example) if sum(map(ord, example.id)) % 3 else "?"

    stand_in(monkeypatch, answer)
    return found


def rows_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def complete(monkeypatch, name: str, rows: int) -> None:
    """Let so many rows be all that a benchmark has."""
    entry = replace(benchmarks.BENCHMARKS[name], rows=rows)
    monkeypatch.setitem(benchmarks.BENCHMARKS, name, entry)


# ---- A benchmark's table


def test_the_table_says_what_was_shown_and_how_sure_it_is(tmp_path, monkeypatch, capsys, asked):
    complete(monkeypatch, "vsi-bench", 6)
    folder = sets.vsi_bench(tmp_path / "set")
    out = tmp_path / "out"
    config = Config("m", (folder,), benchmark="vsi-bench", path="direct", frames=3, out=str(out))
    summary = evaluation.main(config)
    printed = capsys.readouterr().out
    assert summary["input"] == {
        "form": "video frames",
        "images": None,
        "frames": [3, 3],
        "frame_rule": "int(i (n - 1) / (k - 1)) of n, i = 0 .. k - 1",
        "pixels": [768, 768],
    }
    assert "3 frames of a video as images, int(i (n - 1) / (k - 1))" in printed
    assert "768 pixels a frame" in printed
    heading = next(line for line in printed.splitlines() if line.startswith("vsi-bench direct"))
    assert "Qwen2.5-VL-7B (EASI, 128 frames)" in heading and "Qwen3-VL-8B (EASI)" in heading
    line = next(line for line in printed.splitlines() if line.startswith("  overall "))
    official, robust, *others = line.split()[1:]
    assert others == ["33.7", "26.6", "57.9"] and "±" in official and "±" in robust
    value, error = official.split("±")
    assert float(value) == pytest.approx(
        summary["benchmark"]["direct"]["official"]["overall"], abs=0.06
    )
    errors = summary["standard_errors"]["direct"]["official"]
    assert float(error) == pytest.approx(errors["overall"], abs=0.06)
    assert [figure["source"] for figure in summary["published"]][:2] == ["EASI, 128 frames"] * 2
    assert json.loads((out / "summary.json").read_text())["input"] == summary["input"]
    # Questions of one video are one cluster; frames are named by their video.
    rows = {row["id"]: row for row in rows_of(out)}
    assert rows["0"]["cluster"] == rows["1"]["cluster"] != rows["2"]["cluster"]
    assert rows["0"]["images"][1].endswith("scannet/scene0011_00#2")


def test_no_published_figure_beside_a_part(tmp_path, monkeypatch, capsys, asked):
    config = Config("m", (sets.mmsi(tmp_path / "set"),), benchmark="mmsi", out=str(tmp_path / "a"))
    summary = evaluation.main(config)
    printed = capsys.readouterr().out
    note = "(incomplete: 2 of 1,000 rows are there, so no published figure is shown)"
    assert printed.count(note) == 1 and "Qwen" not in printed and summary["published"] == []
    assert (summary["rows"], summary["published_rows"]) == (2, 1000)
    assert summary["input"]["images"] == [2, 3] and summary["input"]["form"] == "images"
    complete(monkeypatch, "mmsi", 2)
    limited = evaluation.main(replace(config, limit=1, out=str(tmp_path / "b")))
    assert limited["published"] == [] and "Qwen" not in capsys.readouterr().out
    # A limit that leaves all of it is none.
    whole = evaluation.main(replace(config, limit=2, out=str(tmp_path / "c")))
    assert whole["published"] and "25.9" in capsys.readouterr().out


def test_rows_that_are_left_out_make_a_set_incomplete(tmp_path, monkeypatch, capsys, asked):
    complete(monkeypatch, "viewspatial", 3)
    folder = sets.viewspatial(tmp_path / "set")
    (tmp_path / "set" / "val2017" / "000000000139.jpg").unlink()
    config = Config("m", (folder,), benchmark="viewspatial", path="lor", out=str(tmp_path / "out"))
    with pytest.raises(UserError, match="a benchmark is read whole"):
        evaluation.main(config)
    summary = evaluation.main(replace(config, skip_bad_rows=True))
    assert "(incomplete: 2 of 3 rows" in capsys.readouterr().out and not summary["published"]


# ---- A suite


def suite(folder, without=()) -> None:
    for name in EASI8:
        if name not in without:
            sets.SETS[name](folder / name)


def test_a_suite_is_one_table(tmp_path, monkeypatch, capsys, asked):
    suite(tmp_path / "sets", without=("blink", "site"))
    complete(monkeypatch, "embspatial", 1)
    config = Config("m", (str(tmp_path / "sets"),), suite="easi8", path="direct")
    config = replace(config, out=str(tmp_path / "out"))
    summary = evaluation.main(config)
    printed = capsys.readouterr().out.partition("easi8, overall")[2].splitlines()
    assert json.loads((tmp_path / "out" / "suite.json").read_text()) == json.loads(
        json.dumps(summary)
    )
    assert summary["missing"] == ["site", "blink"] and not summary["unreadable"]
    assert list(summary["sets"]) == [name for name in EASI8 if name not in ("site", "blink")]
    table = {line.split()[0]: line for line in printed if " direct " in line}
    assert list(table) == list(summary["sets"])
    # Of complete sets others' figures, with their source.
    assert "78.5 Qwen3-VL-8B (Qwen3-VL's report)" in table["embspatial"]
    assert "Qwen" not in table["mmsi"] and table["mmsi"].split()[2:5] == ["2", "of", "1,000"]
    assert f"  missing: blink ({tmp_path / 'sets' / 'blink'})" in printed
    assert any(line.startswith("  vsi-bench: 5 frames of a video") for line in printed)
    folders = {path.name for path in (tmp_path / "out").iterdir()}
    assert folders == {*summary["sets"], "suite.json"}
    # Each is as if it were asked alone, and goes on as such.
    count = len(asked)
    alone = Config("m", (str(tmp_path / "sets/mmsi"),), benchmark="mmsi", path="direct")
    alone = evaluation.main(replace(alone, out=str(tmp_path / "out" / "mmsi")))
    assert len(asked) == count
    assert alone["benchmark"] == summary["sets"]["mmsi"]["benchmark"]
    # The same command once more asks nothing; a set that has come meanwhile is asked.
    assert evaluation.main(config) == summary and len(asked) == count
    sets.blink(tmp_path / "sets" / "blink")
    more = evaluation.main(config)
    assert len(asked) == count + 1 and more["missing"] == ["site"]
    assert more["sets"]["mmsi"] == summary["sets"]["mmsi"]


def test_a_suite_on_both_paths_and_with_a_broken_set(tmp_path, capsys, asked):
    suite(tmp_path / "sets", without=EASI8[3:])
    (tmp_path / "sets" / "mmsi" / "MMSI_Bench.parquet").write_bytes(b"torn")
    config = Config("m", (str(tmp_path / "sets"),), suite="easi8", out=str(tmp_path / "out"))
    with pytest.raises(UserError, match="not asked, as they can't be read: mmsi"):
        evaluation.main(config)
    printed = capsys.readouterr().out
    assert "mmsi: " in printed and "DTR - LOR " in printed
    summary = json.loads((tmp_path / "out" / "suite.json").read_text())
    assert set(summary["sets"]) == {"vsi-bench", "mindcube-tiny"}
    assert set(summary["sets"]["vsi-bench"]["benchmark"]) == {"lor", "dtr"}
    assert list(summary["unreadable"]) == ["mmsi"] and len(summary["missing"]) == 5


def test_a_suite_says_how_many_questions_were_asked(tmp_path, monkeypatch, capsys, asked):
    suite(tmp_path / "sets", without=EASI8[2:])
    complete(monkeypatch, "mmsi", 2)
    complete(monkeypatch, "vsi-bench", 6)
    config = Config("m", (str(tmp_path / "sets"),), suite="easi8", path="lor", limit=2)
    summary = evaluation.main(replace(config, out=str(tmp_path / "out")))
    printed = capsys.readouterr().out.partition("easi8, overall")[2].splitlines()
    table = {line.split()[0]: line.split() for line in printed if " lor " in line}
    # Two of six are a part; a limit that leaves all of it is none.
    assert table["vsi-bench"][2:5] == ["2", "of", "6"] and "Qwen" not in str(table["vsi-bench"])
    assert table["mmsi"][2] == "2" and table["mmsi"][3] != "of"
    assert (summary["sets"]["vsi-bench"]["rows"], summary["sets"]["vsi-bench"]["questions"]) == (
        6,
        2,
    )


def test_mistakes_with_a_suite(tmp_path, asked):
    (tmp_path / "sets").mkdir()
    config = Config("m", (str(tmp_path / "sets"),), suite="easi8", out=str(tmp_path / "out"))
    with pytest.raises(UserError, match="sets has none of vsi-bench, mmsi"):
        evaluation.main(config)
    assert not (tmp_path / "out").exists()
    for wrong in (dict(benchmark="mmsi"), dict(data=()), dict(data=("a", "b"))):
        with pytest.raises(UserError, match="--suite easi8: give one --data"):
            evaluation.main(replace(config, **wrong))
    with pytest.raises(UserError, match="--frames 0"):
        Config("m", frames=0)
    assert get_args(get_type_hints(Config)["suite"])[0] == Literal[tuple(benchmarks.SUITES)]
    assert evaluation.default_out(replace(config, model="x/sft")) == "out/eval/sft-easi8"


# ---- Ranks, and interruptions


def as_ranks(monkeypatch, world: int, config: Config) -> dict:
    """Ask as each of several ranks, the first one last, which gets what the others have answered.

    The others keep theirs in folders of their own, for the first to know of them by `gather` alone.
    """
    gathered = []

    def gather(rows):
        gathered.extend(rows)
        return gathered if ranks.is_first() else []

    for rank in (*range(1, world), 0):
        monkeypatch.setenv("RANK", str(rank))
        place = ranks.Ranks(rank, world, torch.device("cpu"))
        monkeypatch.setattr(ranks, "start_ranks", lambda place=place: place)
        monkeypatch.setattr(ranks, "gather", gather)
        own = config
        if rank:
            own = replace(config, out=f"{config.out}-{rank}")
            Path(own.out).mkdir()
        summary = evaluation.main(own)
    return summary


@pytest.mark.parametrize("name", ["vsi-bench", "site", "3dsrbench", "mindcube-tiny"])
def test_three_ranks_give_the_figures_of_one(tmp_path, name):
    folder = sets.SETS[name](tmp_path / "set")
    results = []
    for world in (1, 3):
        asked = []

        def answer(example, asked=asked):
            asked.append(example.id)
            return right(example) if sum(map(ord, example.id)) % 3 else "?"

        with pytest.MonkeyPatch.context() as patch:
            stand_in(patch, answer)
            config = Config("m", (folder,), benchmark=name, out=str(tmp_path / str(world)))
            results.append(as_ranks(patch, world, config))
        assert len(asked) == len(set(asked)) * 2  # both paths
    one, three = results
    for key in ("results", "benchmark", "standard_errors", "input", "rows"):
        assert one[key] == three[key]
    assert rows_of(tmp_path / "1") == rows_of(tmp_path / "3")


def test_an_interrupted_one_equals_one_that_never_stopped(tmp_path, monkeypatch):
    folder = sets.site(tmp_path / "set")
    answered = []

    def answer(example):
        if len(answered) == 3:
            raise RuntimeError("killed")
        answered.append(example.id)
        return right(example)

    stand_in(monkeypatch, answer)
    monkeypatch.setattr(evaluation, "CHUNK", 2)
    config = Config("m", (folder,), benchmark="site", out=str(tmp_path / "a"))
    with pytest.raises(RuntimeError, match="killed"):
        evaluation.main(config)
    assert len(rows_of(tmp_path / "a")) == 2
    answered.clear()
    stand_in(monkeypatch, right)
    resumed = evaluation.main(config)
    whole = evaluation.main(replace(config, out=str(tmp_path / "b")))
    for key in ("results", "benchmark", "standard_errors", "input"):
        assert resumed[key] == whole[key]
    assert rows_of(tmp_path / "a") == rows_of(tmp_path / "b")


def test_a_rank_gets_all_questions_of_a_video(tmp_path):
    examples = benchmarks.load("vsi-bench", sets.vsi_bench(tmp_path), "direct")
    shares = [evaluation.local_share(examples, rank, 3) for rank in range(3)]
    assert sorted(example.id for example in sum(shares, [])) == [str(k) for k in range(6)]
    for share in shares:
        assert len({example.images[0].video for example in share}) == 1 and len(share) == 2


# ---- Clusters and comparisons


def test_clusters_are_what_rows_share_also_through_others():
    assert connected([["a"], ["b"], ["b", "c"], ["d"], ["c", "a"], []]) == [0, 0, 0, 3, 0, 5]
    assert connected([]) == []


def row(question, path, value, cluster=None, **more):
    name = f"{question}-{path}"
    return (
        dict(id=name, question_id=question, path=path, accuracy=value, cluster=cluster or question)
        | more
    )


def test_comparisons_by_question_and_across_paths():
    before = [
        row("a", "lor", 0.0),
        row("b", "lor", 1.0),
        row("c", "lor", 0.0),
        row("x", "lor", 1.0),
    ]
    after = [row("c", "lor", 1.0), row("b", "lor", 1.0), row("a", "lor", 1.0), row("y", "lor", 1.0)]
    got = paired_by_question(before, after)
    # 1, 0, 1
    assert got["n"] == 3 and got["value"] == pytest.approx(2 / 3)
    assert got["se"] == pytest.approx(np.std([1, 0, 1], ddof=1) / np.sqrt(3))
    assert points(got) == "+66.7 ± 33.3"
    across = [dict(entry, path="dtr") for entry in after]
    assert paired_by_question(before, across) == got
    # On the same path where there is one.
    both = [*across, row("a", "lor", 0.0)]
    assert paired_by_question(before, both)["value"] == pytest.approx((0 + 0 + 1) / 3)
    # By cluster; per cent as a benchmark's marks are.
    one = [row("a", "lor", 0.0, "i", official=0.0), row("b", "lor", 0.0, "i", official=100.0)]
    two = [row("a", "direct", 1.0, "i", official=100.0), row("b", "direct", 0.0, "i", official=0.0)]
    got = paired_by_question(one, two, "official")
    assert got["value"] == 0 and points(got, scale=1) == "+0.0"
    assert paired_by_question(one, [row("z", "lor", 1.0)]) is None
    assert points({"value": -0.0321, "se": 0.011, "n": 9}) == "-3.2 ± 1.1"


DETECTED = (
    '<detect>Find 1 relevant objects:\n<3d_box center="0,0,1">door (red bbox)</3d_box></detect>'
)


def test_both_paths_are_compared(tmp_path, monkeypatch, capsys):
    def answer(example):
        if example.path == "dtr":
            return DETECTED + right(example)
        return right(example) if example.id == "0" else "?"

    stand_in(monkeypatch, answer)
    config = Config("m", (sets.mmsi(tmp_path / "set"),), benchmark="mmsi", out=str(tmp_path / "a"))
    evaluation.main(config)
    printed = capsys.readouterr().out
    # Of two questions of an image each, one gains.
    assert "paired over 2 questions: DTR - LOR +50.0 ± 50.0 points of accuracy" in printed


# ---- Frames are encoded once


@pytest.fixture(params=["qwen3_vl", "qwen3_5"])
def tiny(tmp_path, request):
    """A random checkpoint: its model, and a processor for images of so many pixels."""
    from model import tiny
    from model.processor import Processor
    from model.qwen_vl import QwenVL

    torch.set_num_threads(1)
    tiny.write(request.param, tmp_path / "tiny")
    model = QwenVL.from_pretrained(tmp_path / "tiny", device="cpu", dtype=torch.float32)
    return model, lambda pixels: Processor.from_pretrained(tmp_path / "tiny", max_pixels=pixels)


def two_questions(folder, size) -> list:
    """Two questions about a video of 40 frames, of which 32 are shown."""
    sets.vsi_bench(folder, count=40, size=size)
    examples = benchmarks.load("vsi-bench", folder, "lor")
    found = [example for example in examples if example.id in ("0", "1")]
    assert [len(example.images) for example in found] == [32, 32]
    assert isinstance(found[0].images[0], Frame)
    return found


def sample(model, processor, examples, tokens: int, **options):
    from model.rollout import generate

    processor.prefetch(examples)
    return generate(model, processor, examples, max_new_tokens=tokens, temperature=0, **options)


def test_32_frames_for_two_questions_are_encoded_once(tmp_path, tiny, monkeypatch):
    """Of 640 x 480, and longer than what a pass may hold: counted where they are decoded, in the
    vision tower, and as tokens of the decoder. The tiny model reads them at 160 x 128."""
    model, processor_of = tiny
    processor = processor_of(160 * 128)
    examples = two_questions(tmp_path / "set", (640, 480))
    encoded = []
    decoded = []
    tokens = []
    model.vision.register_forward_pre_hook(lambda module, args: encoded.append(len(args[1])))
    model.decoder.register_forward_pre_hook(lambda module, args: tokens.append(len(args[0])))
    decode = type(processor.image_decoder).__call__

    def counted(self, source):
        decoded.append(source)
        return decode(self, source)

    monkeypatch.setattr(type(processor.image_decoder), "__call__", counted)
    sample(model, processor, examples, tokens=1, prefill_tokens=640)
    assert sum(encoded) == 32 and len(decoded) == 32
    first, second = [processor.prompt(example) for example in examples]
    assert first.images_end > 640
    # The second adds no more than its text.
    assert max(tokens) < len(first.ids) + len(second.ids) - second.images_end + 1


def test_shared_frames_change_no_answer(tmp_path, tiny):
    model, processor_of = tiny
    processor = processor_of(32 * 32)
    examples = two_questions(tmp_path / "set", (64, 48))
    together = sample(model, processor, examples, tokens=8)
    for example, (shared,) in zip(examples, together, strict=True):
        ((alone,),) = sample(model, processor, [example], tokens=8)
        assert shared.tokens == alone.tokens
        assert np.allclose(shared.logprobs, alone.logprobs, atol=1e-4)
