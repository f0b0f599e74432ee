"""report.py: geometry in closed form, tables by hand, one self-contained page, no markup from a
model."""

import base64
import json
import re
import shutil
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
from eval_set import example, write_set
from PIL import Image
from report_run import HOSTILE, unpacked, write_evals, write_run, write_speedrun

import report
from errors import UserError
from reporting import curves, explained, gallery, rollouts, runs, tables, views
from srreal import REWARDS, Example, target


class Page(HTMLParser):
    """Collects tags and what they point at; checks that all but void tags are closed in order."""

    def __init__(self, text: str):
        super().__init__()
        self.open = []
        self.tags = []
        self.links = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.links += [
            value for name, value in attrs if name in ("src", "href", "xlink:href", "data")
        ]
        if tag not in ("meta", "input", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def written(out, run=(), evals=(), questions=2000) -> str:
    """Return the page of these folders."""
    folders = [tuple(map(str, some)) for some in (run, evals)]
    report.main(report.Config(*folders, out=str(out), questions=questions))
    return out.read_text()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_speedrun(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def page(run, tmp_path_factory):
    return written(tmp_path_factory.mktemp("page") / "page.html", [run])


# ---- Geometry


def test_boxes_lie_in_the_view_whose_frame_they_are_in():
    by_view = {"Red bbox": {0: (0.0, 0.0, 2.0), 1: (1.0, 0.0, 2.0)}}
    e = example(
        images=[Image.new("RGB", (40, 30))] * 2,
        objects=by_view,
        sizes={"Red bbox": (0.5, 1.0, 0.25)},
        intrinsics=[(50.0, 50.0, 20.0, 15.0)] * 2,
        regions=[(1, (1, 2, 11, 12))],
        question="How far is the chair (Red bbox <mask>)?",
    )
    found = gallery.geometry_of(e, views.Views())
    truths = [(box["view"], box["mention"], box["at"], box["size"]) for box in found["truths"]]
    size = [0.5, 1.0, 0.25]
    assert truths == [(0, "red bbox", [0, 0, 2], size), (1, "red bbox", [1, 0, 2], size)]
    assert found["regions"] == [{"view": 1, "mention": "red bbox", "box": [1, 2, 10, 10]}]
    parsed = dict(boxes=[["Red bbox", "chair", [1.0, 0.0, 2.2]]], frame=1)
    (box,) = gallery.written_boxes("", "dtr", parsed, e)
    assert (box["view"], box["mention"], box["at"]) == (1, "red bbox", [1, 0, 2.2])
    assert gallery.written_boxes("", "dtr", parsed | {"frame": None}, e) == []
    row = dict(region_mentions=["Red bbox"], head_centres=[[1.0, 0.1, 2.0]])
    assert [box["view"] for box in gallery.head_boxes(row, e)] == [1]


def test_a_grounding_answer_has_boxes_with_sizes():
    e = example(path="direct", objects={"chair": (0.0, 0.0, 2.0)})
    text = '<3d_box center="0.1,0.2,2.0" size="0.5,1.0,0.25">chair</3d_box>'
    (box,) = gallery.written_boxes(text, "direct", dict(boxes=[], frame=None), e)
    assert box == {"view": 0, "mention": "chair", "at": [0.1, 0.2, 2], "size": [0.5, 1, 0.25]}


def test_a_region_may_be_a_mask():
    mask = np.zeros((30, 40), bool)
    mask[5:8, 10:21] = True
    assert gallery.bounds_of(mask) == [10, 5, 10, 2]


def test_depth_is_a_byte_a_point():
    metres = np.full((30, 40), 2.0, np.float32)
    metres[:, 20:] = 4.0
    metres[0, 0] = np.nan
    packed = views.packed_depth(metres, 10_000)
    levels = np.frombuffer(base64.b64decode(packed["levels"]), np.uint8).reshape(30, 40)
    assert (packed["columns"], packed["stride"], packed["far"]) == (40, 1, 4.0)
    assert levels[0, 0] == 0 and levels[5, 5] == 128 and levels[5, 30] == 255
    coarse = views.packed_depth(metres, 100)
    assert coarse["stride"] == 4 and coarse["columns"] == 10
    for unknown in (0.0, np.nan, np.inf):
        assert views.packed_depth(np.full((30, 40), unknown, np.float32), 100) is None
    assert views.packed_depth(None, 100) is None


def test_of_a_video_the_first_frames_are_shown():
    frames = [Image.new("RGB", (8, 6), (i, 0, 0)) for i in range(12)]
    e = example(images=frames, objects={}, regions=[], intrinsics=None)
    assert views.Views().of_example(e) == list(range(views.MOST))


def test_images_are_shared_and_fit_into_the_room():
    noise = np.random.default_rng(0).integers(0, 256, (480, 640, 3), np.uint8)
    shared = Image.fromarray(noise)
    pool = views.Views()
    one = example("a", images=[shared])
    other = example("b", images=[shared])
    assert pool.of_example(one) == pool.of_example(other) == [0]
    (wide,) = pool.packed(1e7)
    (narrow,) = pool.packed(20_000)
    assert wide["size"] == narrow["size"] == (640, 480)
    assert len(narrow["src"]) < 20_000 < len(wide["src"])
    (none,) = pool.packed(100)
    assert none["src"] is None


# ---- Numbers


def test_ticks_and_smoothing():
    assert curves.ticks(0, 1) == [0, 0.5, 1.0] or curves.ticks(0, 1) == [0, 0.25, 0.5, 0.75, 1]
    assert curves.ticks(0, 800) == [0, 200, 400, 600, 800]
    for low, high in ((0.013, 0.0131), (-3e-9, 5e-9), (7, 123456)):
        marks = curves.ticks(low, high)
        assert 1 <= len(marks) <= 5 and all(low <= mark <= high for mark in marks)
    assert curves.smooth(np.ones(100)) == pytest.approx(np.ones(100))
    assert curves.smooth(np.arange(90.0))[45] == pytest.approx(45)
    line = curves.polyline(np.arange(5000.0), np.zeros(5000)).split()
    assert len(line) <= curves.POINTS and line[-1] == "4999.0,0.0"


def cells_of(page: str, heading: str) -> list[str]:
    """Return the cells of a table, without what stands in small print below a number."""
    table = page.split(f"<th>{heading}</th>")[1].split("</table>")[0]
    found = re.findall("<td[^>]*>(.*?)</td>", table, re.S)
    return [" ".join(re.sub("<[^>]+>", " ", cell).split()) for cell in found]


def test_table_holds_the_numbers(page):
    """LOR: before, the odd ones of 6 images are wrong; after, one of 12 questions. The change is
    paired."""
    cells = cells_of(page, "all questions")
    at = cells.index("accuracy ?")
    # an image's mean: of image 5 one question is wrong before and after
    changes = [0, 1, 0, 1, 0, 0.5]
    error = 100 * np.std(changes, ddof=1) / np.sqrt(6)
    assert cells[at + 1 : at + 3] == ["LOR", "12"] and cells[at + 4].startswith("50.0 ±")
    assert cells[at + 5].startswith("91.7 ±")
    assert cells[at + 5].endswith(f"{100 * np.mean(changes):+.1f} ± {error:.1f}")
    bare = cells.index("accuracy, no depth ?")
    assert cells[bare + 1 : bare + 3] == ["LOR", "12"] and "+" not in cells[bare + 5]
    centre = cells.index("centre in the text, m ?")
    # the last question places no object
    assert cells[centre + 1 : centre + 4] == ["DTR", "22", "1.000"]
    # one of two
    assert cells[centre + 4].startswith("0.075 ±") and cells[centre + 5] == "0.000 ± 0.000"
    assert "no depth" not in page.split("<th>accuracy by task</th>")[1].split("</table>")[0]


def test_a_base_model_is_compared_with_both_paths(tmp_path, capsys):
    data = write_set(tmp_path / "set", n=4)
    write_evals(data, tmp_path, {"base": lambda e: "A"}, path="direct", again=0)
    write_evals(data, tmp_path, {"trained": target}, again=0)
    capsys.readouterr()
    folders = [tmp_path / "base", tmp_path / "trained"]
    text = written(tmp_path / "page.html", evals=folders, questions=3)
    said = capsys.readouterr().out
    # "A" is right in 2 of 8: each image has one question with a letter.
    assert len(re.findall(r"trained  (?:LOR|DTR) - DIRECT \+75\.0 ± 14\.4 ", said)) == 2
    cells = cells_of(text, "all questions")
    at = cells.index("accuracy ?")
    rows = {cells[at + 7 * i + 1]: cells[at + 7 * i : at + 7 * i + 7] for i in range(3)}
    assert rows["LOR"][4] == "–" and rows["LOR"][5].endswith("+75.0 ± 14.4")
    assert rows["DIRECT"][4].startswith("25.0 ±") and rows["DIRECT"][5] == "–"
    (questions,) = unpacked(text, "answers")["sets"]
    assert len(questions["questions"]) == 3 and questions["asked"] == 8
    assert questions["columns"] == ["base", "trained"]
    by_path = {a["path"]: a["column"] for a in questions["questions"][0]["answers"]}
    assert by_path == {"direct": 0, "lor": 1, "dtr": 1}


def test_n_is_that_of_all_questions_where_the_last_column_has_fewer(tmp_path):
    data = write_set(tmp_path / "set", n=4)
    write_evals(data, tmp_path, {"trained": target}, again=0)
    write_evals(data, tmp_path, {"blind": lambda e: "A"}, again=0, limit=3)
    text = written(tmp_path / "page.html", evals=[tmp_path / "trained", tmp_path / "blind"])
    cells = cells_of(text, "all questions")
    at = cells.index("accuracy ?")
    assert cells[at + 1 : at + 3] == ["LOR", "8"]


def test_evaluations_of_other_names_stand_in_the_order_of_their_dates(tmp_path):
    data = write_set(tmp_path / "set", n=1)
    writers = {"after": target, "before": lambda e: "A", "eval-sft": target}
    write_evals(data, tmp_path, writers, again=0)
    for name, day in (("after", 2), ("before", 1), ("eval-sft", 3)):
        file = tmp_path / name / "summary.json"
        summary = json.loads(file.read_text()) | {"date": f"2026-01-0{day} 10:00 UTC"}
        file.write_text(json.dumps(summary))
    _, evals = runs.collect([str(tmp_path)], [])
    # The speedrun's own come first, whenever they were made.
    assert [evaluation.folder.name for evaluation in evals] == ["eval-sft", "before", "after"]


def test_what_is_compared():
    def evaluation(name, ids, is_named=False, **config):
        rows = [dict(question_id=i, truth="A") for i in ids]
        settings = {"data": ["set"]} | config
        return runs.Evaluation(name, None, settings, {}, {}, rows, is_named)

    greedy = evaluation("greedy", "abc")
    later = evaluation("later", "bcd")
    sampled = evaluation("sampled", "abc", temperature=1.0)
    apart = evaluation("apart", "xyz")
    found = runs.comparisons([greedy, sampled, later, apart])
    assert [[e.name for e in c.evals] for c in found] == [
        ["greedy", "later"],
        ["sampled"],
        ["apart"],
    ]
    assert found[1].title == "set, sampled at temperature 1"
    other = evaluation("other", "abc", benchmark="blink")
    part = evaluation("part", "a", benchmark="blink/Counting")
    found = runs.comparisons([greedy, other, part])
    assert [[e.name for e in c.evals] for c in found] == [["greedy"], ["other", "part"]]
    sampled.is_named = True
    assert [len(c.evals) for c in runs.comparisons([greedy, sampled, apart])] == [2, 1]


def test_an_evaluation_that_is_named_comes_first_and_once(run, tmp_path):
    (tmp_path / "suite").mkdir()
    (tmp_path / "suite" / "suite.json").write_text("{}")
    (tmp_path / "suite" / "one").symlink_to(run / "eval-sft")
    named = (str(run / "eval-rl"), str(tmp_path / "suite"))
    _, evals = runs.collect((str(run),), named)
    assert [e.name for e in evals] == ["after RL", "after SFT"]
    assert [e.name for e in runs.collect((str(run),), ())[1]] == ["after SFT", "after RL"]


def test_a_benchmark_has_its_own_table(run, tmp_path):
    """As eval.py --benchmark writes it: marks of both scorers in the rows and in the summary."""
    for name, mark in (("one", 50.0), ("two", 100.0)):
        (tmp_path / name).mkdir()
        rows = runs.read_lines(run / "eval-rl" / "predictions.jsonl")[:4]
        rows = [row | {"official": mark, "robust": mark / 2} for row in rows]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / name / "predictions.jsonl").write_text(lines)
        summary = json.loads((run / "eval-rl" / "summary.json").read_text())
        summary["config"] |= {"benchmark": "cv-bench", "data": []}
        scorers = {"official": {"overall": mark, "2D": 7.0}, "robust": {"overall": 1.0, "2D": 2.0}}
        summary["benchmark"] = {"lor": scorers}
        summary["standard_errors"] = {"lor": {"official": {"overall": 1.5}}}
        figures = {"overall": 60.0}
        summary["published"] = [{"model": "m", "source": "paper", "figures": figures}]
        (tmp_path / name / "summary.json").write_text(json.dumps(summary))
    text = written(tmp_path / "page.html", evals=[tmp_path / "one", tmp_path / "two"])
    cells = cells_of(text, "as published")
    assert cells[:5] == ["overall", "LOR", "50.0 ± 1.5 1.0", "100.0 ± 1.5 1.0", "60.0"]
    assert cells[7:10] == ["7.0 2.0", "7.0 2.0", ""] and "<th>m (paper)</th>" in text
    cells = cells_of(text, "all questions")
    at = cells.index("official scorer")
    assert cells[at + 4].startswith("50.0 ±") and "+50.0 ± 0.0" in cells[at + 5]
    (questions,) = unpacked(text, "answers")["sets"]
    marks = [answer["mark"] for answer in questions["questions"][0]["answers"]]
    assert marks == [0.25, 0.5]  # the robust scorer's


# ---- The page


def test_page_is_self_contained_and_well_formed(page):
    parsed = Page(page)
    assert not parsed.open
    assert all(link.startswith("#") for link in parsed.links)
    images = unpacked(page, "images")
    assert len(images) == 6  # of 12 questions, and of the rollouts
    assert all(image["src"].startswith("data:image/webp;base64,") for image in images)
    bare = page.replace("http://www.w3.org/2000/svg", "")
    assert "http" not in bare and "@import" not in bare and "url(" not in bare


def test_what_a_model_writes_is_no_markup(page):
    assert HOSTILE not in page and "alert(1)" not in page
    payload = unpacked(page, "answers")
    (questions,) = payload["sets"]
    texts = [a["text"] for q in questions["questions"] for a in q["answers"]]
    assert any(HOSTILE in text for text in texts)
    assert Page(page).tags.count(("script", {})) == 1


def test_the_gallery_has_every_question(page):
    (questions,) = unpacked(page, "answers")["sets"]
    assert questions["columns"] == ["after SFT", "after RL"]
    assert len(questions["questions"]) == 12
    by_id = {question["id"]: question for question in questions["questions"]}
    wrong_before = by_id["s1-distance"]
    marks = {(a["column"], a["path"]): a["mark"] for a in wrong_before["answers"]}
    assert marks == {(0, "lor"): 0, (0, "dtr"): 1, (1, "lor"): 1, (1, "dtr"): 1}
    dtr = wrong_before["answers"][1]
    assert dtr["boxes"][0]["at"] == [0.15, 0, 2] and dtr["head"][0]["at"] == [0, 0, 2.3]
    assert [box["at"] for box in wrong_before["truths"]] == [[0, 0, 2], [0, 0, 4]]


def test_data_that_are_gone_leave_the_texts(run, tmp_path):
    """Wherever the data went, and whatever lies there now."""
    (tmp_path / "eval").mkdir()
    rows = (run / "eval-rl" / "predictions.jsonl").read_text()
    rows = rows.replace(str(run), "/gone")
    (tmp_path / "eval" / "predictions.jsonl").write_text(rows)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "rows.jsonl").write_text('{"id": 3}\n')
    summary = json.loads((run / "eval-rl" / "summary.json").read_text())
    for source in ("/no/such/set", tmp_path / "bad", "coco:/x"):
        summary["config"]["data"] = [str(source)]
        (tmp_path / "eval" / "summary.json").write_text(json.dumps(summary))
        text = written(tmp_path / "page.html", evals=[tmp_path / "eval"])
        (questions,) = unpacked(text, "answers")["sets"]
        assert len(questions["questions"]) == 12 and not questions["questions"][0]["truths"]
        assert "without depth and truth" in text
    # A relative name is one of where eval.py was started.
    summary["config"] |= {"data": ["set"], "out": "eval"}
    (tmp_path / "eval" / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "set").symlink_to(run / "set")
    text = written(tmp_path / "page.html", evals=[tmp_path / "eval"])
    assert unpacked(text, "answers")["sets"][0]["questions"][0]["truths"]


def test_a_cold_start_beside_the_runs_is_no_evaluation(run, tmp_path):
    """data.coldstart has a summary.json of its own."""
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "cold").mkdir()
    (tmp_path / "run" / "cold" / "summary.json").write_text('{"rows": 3}')
    report.main(report.Config((str(tmp_path / "run"),)))
    with pytest.raises(UserError, match="cold"):
        report.main(report.Config(eval=(str(tmp_path / "run" / "cold"),)))


def test_a_region_is_named_by_the_longest_mention_before_it():
    objects = {"chair": (0.0, 0.0, 1.0), "red chair": (0.0, 0.0, 2.0)}
    example = Example("a", "dtr", [], "?", "A", objects=objects)
    assert gallery.mention_before("beside the Red Chair (", example) == "red chair"
    assert gallery.mention_before("beside the armchair ", example) == "the armchair"


def test_a_mistake_ends_in_a_line(run, tmp_path):
    with pytest.raises(UserError, match="--run or --eval"):
        report.Config()
    (tmp_path / "empty").mkdir()
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "summary.json").write_text("{")
    for folders, words in (
        (dict(run=["/no/such"]), "--run /no/such: no such directory"),
        (dict(run=[tmp_path / "empty"]), "empty: no metrics.jsonl of a run"),
        (dict(evals=[tmp_path / "empty"]), "--eval .*empty: no summary.json"),
        (dict(evals=[tmp_path / "torn"]), "summary.json can't be read"),
    ):
        with pytest.raises(UserError, match=words):
            written(tmp_path / "page.html", **folders)
    assert not (tmp_path / "page.html").exists()


def test_the_header_says_what_was_run(page):
    header = page.split('id="made"')[1].split("<h2")[0]
    words = " ".join(re.sub("<[^>]+>", " ", header).split())
    assert "RL train_rl model m data" in words and "steps 8 duration 8 min seed 3" in words
    assert "date 2026-01-02 03:04 UTC commit abc1234" in words
    made = r"after SFT eval model m data \S+set answers 24 duration \d+ s seed 0 date \d{4}-"
    assert re.search(made, words) and "--max-new-tokens 1024" in words


# ---- Curves


def test_every_logged_column_gets_a_curve_by_path():
    """Nothing is listed twice: a fork's reward and a validation appear because they are logged."""
    rows = [
        dict(step=i, reward=0.5, lor_kindness=0.1, dtr_kindness=0.2, val_lor_format=1.0, seconds=2)
        for i in (1, 2)
    ]
    (section,) = curves.sections([SimpleNamespace(name="a", script="train_rl", rows=rows, steps=2)])
    drawn = {chart.title: [curve.name for curve in chart.curves] for chart in section.learning}
    assert drawn == {"kindness": ["lor", "dtr"], "val_format": ["lor"], "reward": [""]}
    assert [chart.title for chart in section.costs] == ["seconds"]


def test_several_runs_share_their_axes():
    def run_of(name, script, steps, **values):
        rows = [dict(step=i, **values) for i in range(1, steps + 1)]
        return SimpleNamespace(name=name, script=script, rows=rows, steps=steps)

    found = curves.sections(
        [
            run_of("a", "train_rl", 4, lor_reward=0.1, dtr_reward=0.2),
            run_of("b", "train_rl", 9, lor_reward=0.3),
            run_of("c", "train_sft", 3, loss=1.0),
        ]
    )
    assert [section.heading for section in found] == [
        "Reinforcement learning",
        "Supervised fine-tuning, 3 steps",
    ]
    drawn = {c.title: [(o.name, o.last) for o in c.curves] for c in found[0].learning}
    assert drawn == {"reward LOR": [("a", "0.1"), ("b", "0.3")], "reward DTR": [("a", "0.2")]}
    assert found[0].runs == [("a", "colour-0"), ("b", "colour-1")]


def test_curves_skip_what_was_not_finite():
    """run.Log writes null there."""
    losses = [1.0, None, 3.0, 2.0]
    rows = [{"step": i, "loss": loss, "kl": None} for i, loss in enumerate(losses, 1)]
    (chart,) = curves.charts_of_run(SimpleNamespace(rows=rows))
    (curve,) = chart.curves
    assert chart.title == "loss" and curve.name == ""
    assert len(curve.raw.split()) == 3 and "nan" not in curve.raw + curve.smoothed


def test_curves_by_task():
    rows = []
    for step in (1, 2):
        for name, total in (("a", 0.5), ("b", 1.0), ("gone", 0.0)):
            rows.append(dict(step=step, id=name, path="lor", total=total))
    found = curves.charts_by_task(rows, {"a": "depth", "b": "depth"})
    assert [(c.title, [(o.name, o.last) for o in c.curves]) for c in found] == [
        ("depth", [("lor", "0.75")])
    ]


def test_a_new_reward_is_shown_and_explained(run, monkeypatch):
    def kindness(parsed, example):
        """Reward polite words."""

    monkeypatch.setitem(REWARDS, "kindness", kindness)
    row = runs.read_lines(run / "eval-rl" / "predictions.jsonl")[0] | {"kindness": 0.25}
    assert gallery.answer_of(0, row, None)["parts"]["kindness"] == 0.25
    assert explained.Explained()("lor_kindness") == "Reward polite words."
    results = {"lor": {"all": {"n": 3, "kindness": {}, "chance": {}}}}
    evaluation = runs.Evaluation("a", None, {}, results, {}, [], False)
    assert tables.metrics_of(runs.Comparison([evaluation])) == ["kindness"]


def test_metrics_are_explained_by_the_tables_of_the_docs():
    text = "words\n\n| name | what it is | seen | what it means when it leaves that |\n|---|---|---|---|\n"
    text += "| `kl`, `kl_max` | the KL, see [loss](#loss) | .1 | a \\| b |\n\n| `x` | no table |\n"
    assert explained.read_tables(text) == {
        "kl": "The KL, see loss. Seen: .1. A | b.",
        "kl_max": "The KL, see loss. Seen: .1. A | b.",
    }
    explain = explained.Explained()
    for name in ("reward", "lor_accuracy", "kl", "entropy", "text_errors", "any_format", "loss"):
        assert explain(name), name
    assert explain("val0_lor_accuracy").startswith("On --eval-data, greedy, before")
    assert explain("nobody_knows") == ""


# ---- Rollouts


def test_rollouts_show_each_group(page):
    (found,) = unpacked(page, "answers")["rollouts"]
    assert (found["name"], found["steps"], found["logged"]) == ("RL", 8, 2)
    keys = [(group["step"], group["path"], group["task"]) for group in found["groups"]]
    assert keys == [(s, p, "distance") for s in (2, 8) for p in ("dtr", "lor")]
    dtr = found["groups"][0]
    assert len(dtr["views"]) == 1 and dtr["truths"][0]["at"] == [0, 0, 2]
    best, worst = dtr["samples"]
    assert best["boxes"][0]["at"] == [0, 0.3, 2] and best["parts"]["detect"] == 0.3
    assert (best["total"], best["advantage"], worst["advantage"]) == (1, 0.71, -0.71)
    assert best["finished"] and not worst["finished"] and set(best["sure"]) == {50}
    # A token a byte: the two of é come together.
    text = "".join(best["pieces"])
    assert text.endswith("<answer>2.0</answer>") and HOSTILE in text
    assert best["pieces"].count("é") == 1 and "�" not in text
    assert len(best["pieces"]) == len(best["sure"])


def test_long_logs_are_thinned_by_steps():
    rows = [dict(step=step, tokens=[0] * 10) for step in range(1, 21)]
    assert rollouts.thinned(rows, 200) == rows
    assert [row["step"] for row in rollouts.thinned(rows, 50)] == [4, 8, 12, 16, 20]


def test_without_a_tokenizer_a_completion_is_one_piece(run, tmp_path):
    write_run(tmp_path / "rl", str(run / "set"))
    (tmp_path / "rl" / "step-000008" / "tokenizer.json").unlink()
    found = unpacked(written(tmp_path / "page.html", [tmp_path]), "answers")["rollouts"][0]
    assert found["groups"][0]["samples"][0]["pieces"][0].startswith("<detect>Find 1")
