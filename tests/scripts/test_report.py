"""report.py: geometry in closed form, the table by hand, one self-contained page, no markup from a
model."""

import base64
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from eval_set import example, stand_in, write_set
from markupsafe import escape
from PIL import Image

import eval as evaluation
import report
from srreal import target


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
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


HOSTILE = '<script>alert(1)</script><img src="http://x.y/z.png"> & </pre>'


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """SFT: every other LOR answer is wrong, centres are 0.15 m off. RL: all but the last is
    right."""
    folder = tmp_path_factory.mktemp("run")
    data = write_set(folder / "set")

    def before(e):
        if e.path == "lor" and int(e.id[1]) % 2 or e.id.startswith("s5-order"):
            return f"<think>{HOSTILE}</think><answer>E</answer>"
        return target(e).replace("0.0,0.0,2.0", "0.15,0.0,2.0")

    def after(e):
        return HOSTILE if e.id.startswith("s5-order") else target(e)

    with pytest.MonkeyPatch.context() as patch:
        for name, write in (("eval-sft", before), ("eval-rl", after)):
            stand_in(patch, write)
            evaluation.main(evaluation.Config("m", (data,), out=str(folder / name)))
    (folder / "rl").mkdir()
    rows = [
        dict(step=i, loss=0.1, lor_reward=0.5 + i / 100, dtr_reward=0.6, kl=None)
        for i in range(1, 9)
    ]
    lines = "".join(json.dumps(row | {"reward": 0.5}) + "\n" for row in rows)
    (folder / "rl" / "metrics.jsonl").write_text(lines + '{"step": 9, "lo')
    return folder


# ---- Geometry
def test_project():
    camera = (50.0, 60.0, 20.0, 15.0)
    assert report.project((1.0, -0.5, 2.0), camera) == (45.0, 0.0)
    assert report.project((0.0, 0.0, 7.0), camera) == (20.0, 15.0)
    assert report.project((0.0, 0.0, -1.0), camera) is None


def places(drawn) -> list[tuple[float, float]]:
    return [(glyph.x, glyph.y) for glyph in drawn.glyphs]


def test_centres_lie_where_the_camera_sees_them_and_where_they_stand():
    e = example(objects={"red bbox": (1.0, -0.5, 4.0)}, regions=[], question="?")
    parsed = dict(boxes=[["red bbox", "chair", [0.0, 0.0, 2.0]]], frame=None)
    points = report.points_of(e, dict(parsed=parsed, region_mentions=[], head_centres=[]), 0)
    red = report.COLOURS["red"]
    assert points == [("truth", red, (1.0, -0.5, 4.0)), ("text", red, [0.0, 0.0, 2.0])]
    assert places(report.picture(e.images[0], e, points, 0)) == [(32.5, 8.75), (20.0, 15.0)]
    assert places(report.top_view(e.images[0], e, points, 0)) == [(1.0, -4.0), (0.0, -2.0)]
    assert report.top_view(e.images[0], example(intrinsics=None), points, 0) is None


def test_from_above_shows_the_floor_and_not_the_ceiling():
    """A camera 1.5 m above a floor and below a ceiling: z = 50 * 1.5 / |v - cy|."""
    image, camera = Image.new("RGB", (40, 30), (10, 200, 30)), (50.0, 50.0, 19.5, 14.5)
    v = np.indices((30, 40))[0] - 14.5
    image.paste((200, 0, 0), (0, 0, 40, 15))
    floor = report.from_above(image, 75 / np.abs(v), camera, size=0.5)
    assert (floor.x, floor.y) == pytest.approx((-19.5 * 3, -150.0))
    assert floor.height == pytest.approx(145, abs=0.5)
    assert floor.width == pytest.approx(117, abs=0.5)
    png = base64.b64decode(floor.href.removeprefix("data:image/png;base64,"))
    raster = np.asarray(Image.open(io.BytesIO(png)))
    drawn = raster[raster[..., 3] > 0]
    assert len(drawn) and (drawn[:, :3] == (10, 200, 30)).all()


@pytest.mark.parametrize("unknown", [0.0, np.nan, np.inf])
def test_a_depth_map_without_a_known_pixel_draws_nothing(unknown):
    depth = np.full((30, 40), unknown, np.float32)
    e = example(depths=[depth])
    assert report.from_above(e.images[0], depth, e.intrinsics[0]) is None
    top = report.top_view(e.images[0], e, [], 0)
    assert top.floor is None and top.far == pytest.approx(3.3)
    assert top.left == pytest.approx(-3.3 * 20 / 50) and top.right == pytest.approx(3.3 * 20 / 50)
    depth[:5] = 2.0  # known where the ceiling is: nothing below it to draw
    assert report.top_view(e.images[0], e, [], 0).floor is None


def test_several_views_draw_a_prediction_in_its_frame_only():
    views = {"red bbox": {0: (0.0, 0.0, 2.0), 1: (1.0, 0.0, 2.0)}}
    e = example(
        images=[Image.new("RGB", (40, 30))] * 2, objects=views, regions=[(1, (1, 2, 11, 12))]
    )
    parsed = dict(boxes=[["red bbox", "chair", [1.0, 0.0, 2.2]]], frame=1)
    row = dict(parsed=parsed, region_mentions=["red bbox"], head_centres=[[1.0, 0.1, 2.0]])
    assert [kind for kind, *_ in report.points_of(e, row, 0)] == ["truth"]
    assert [kind for kind, *_ in report.points_of(e, row, 1)] == ["truth", "text", "head"]


# ---- Numbers
def test_ticks_and_smoothing():
    assert report.ticks(0, 1) == [0, 0.5, 1.0] or report.ticks(0, 1) == [0, 0.25, 0.5, 0.75, 1]
    assert report.ticks(0, 800) == [0, 200, 400, 600, 800]
    for low, high in ((0.013, 0.0131), (-3e-9, 5e-9), (7, 123456)):
        marks = report.ticks(low, high)
        assert 1 <= len(marks) <= 5 and all(low <= mark <= high for mark in marks)
    assert report.smooth(np.ones(100)) == pytest.approx(np.ones(100))
    assert report.smooth(np.arange(90.0))[45] == pytest.approx(45)


def test_table_holds_the_numbers(run):
    """LOR: before, the odd ones of 6 images are wrong; after, one of 12 questions. The change is
    paired."""
    text = report.page(run, 0).split("accuracy by task")[0]
    found = re.findall("<td[^>]*>(.*?)</td>", text, re.S)
    cells = [re.sub("<[^>]+>", "", cell).strip() for cell in found]
    at = cells.index("accuracy")
    # an image's mean: of image 5 one question is wrong before and after
    changes = [0, 1, 0, 1, 0, 0.5]
    error = np.std(changes, ddof=1) / np.sqrt(6)
    assert cells[at + 1 : at + 3] == ["LOR", "12"] and cells[at + 4].startswith("0.500 ±")
    assert (
        cells[at + 5].startswith("0.917 ±")
        and cells[at + 6] == f"+{np.mean(changes):.3f} ± {error:.3f}"
    )
    bare = cells.index("accuracy, no depth")
    assert cells[bare + 1 : bare + 3] == ["LOR", "12"] and cells[bare + 6] == "–"
    assert "no depth" not in report.page(run, 0).split("accuracy by task")[1]
    centre = cells.index("centre in the text, m")
    # the last question places no object
    assert cells[centre + 1 : centre + 4] == ["DTR", "22", "1.000"]
    # one of two
    assert cells[centre + 4].startswith("0.075 ±") and cells[centre + 5] == "0.000 ± 0.000"


# ---- The page
def test_page_is_self_contained_and_well_formed(run):
    report.main(report.Config(str(run), questions=6))
    text = (run / "report.html").read_text()
    page = Page(text)
    assert not page.open and len(page.links) > 6
    assert all(link.startswith("data:image/") for link in page.links)
    bare = text.replace(str(escape(HOSTILE)), "")
    assert "http" not in bare and "@import" not in bare and "url(" not in bare
    assert len([tag for tag, _ in page.tags if tag == "article"]) == 6
    assert page.text.count("LOR after RL") == page.text.count("DTR after SFT") == 6


def test_what_a_model_writes_is_text(run):
    text = report.page(run, 12)
    page = Page(text)
    assert HOSTILE in page.text and not {"script", "img"} & {tag for tag, _ in page.tags}
    pieces = report.split_sections("a <think><b>x</think>\n<answer>")
    assert pieces == [("", "a "), ("think", "<b>x"), ("", "<answer>")]


def test_curves_by_path(run):
    page = Page(report.page(run, 1))
    titles = [tag for tag, attrs in page.tags if attrs.get("class") == "title"]
    assert len(titles) == 2  # loss and reward; kl is None throughout, the cut last row is left out
    assert "Reinforcement learning, 8 steps" in page.text
    assert "LOR 0.58" in page.text and "DTR 0.6" in page.text


def test_curves_skip_what_was_not_finite():
    """run.Log writes null there."""
    losses = [1.0, None, 3.0, 2.0]
    rows = [{"step": i, "loss": loss, "kl": None} for i, loss in enumerate(losses, 1)]
    (chart,), costs = report.charts(rows)
    (curve,) = chart.curves
    assert chart.title == "loss" and curve.path == "" and not costs
    assert len(curve.raw.split()) == 3 and "nan" not in curve.raw + curve.smoothed


def test_every_logged_column_gets_a_curve_by_path():
    """Nothing is listed twice: a fork's reward and a validation appear because they are logged."""
    rows = [
        dict(step=i, reward=0.5, lor_kindness=0.1, dtr_kindness=0.2, val_lor_format=1.0, seconds=2)
        for i in (1, 2)
    ]
    learning, costs = report.charts(rows)
    by_title = {chart.title: [curve.path for curve in chart.curves] for chart in learning}
    assert by_title == {"kindness": ["lor", "dtr"], "val_format": ["lor"], "reward": [""]}
    assert [chart.title for chart in costs] == ["seconds"]


def test_chips_and_rows_follow_the_registry(run, monkeypatch):
    monkeypatch.setitem(report.REWARDS, "kindness", None)
    row = report.read_lines(run / "eval-rl" / "predictions.jsonl")[0] | {"kindness": 0.25}
    assert ("kindness", 0.25) in report.answer("after RL", row).chips
    metrics = report.metrics_of({"lor": {"all": {"n": 3, "kindness": {}, "chance": {}}}})
    assert metrics == ["kindness"]


def test_missing_parts(run, tmp_path):
    assert "Not evaluated yet" in Page(report.page(tmp_path, 3)).text
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
    page = Page(report.page(tmp_path, 3))
    assert "Training, 2 steps" in page.text and "Results" not in page.text
    (tmp_path / "eval-sft").symlink_to(run / "eval-sft")
    page = Page(report.page(tmp_path, 3))
    assert "After SFT" in page.text and "RL moved" not in page.text
    assert len([tag for tag, _ in page.tags if tag == "article"]) == 3
    summary = json.loads((run / "eval-rl" / "summary.json").read_text())
    (tmp_path / "eval-rl").mkdir()
    (tmp_path / "eval-rl" / "predictions.jsonl").symlink_to(run / "eval-rl" / "predictions.jsonl")
    for name in ("no rows", "bad"):
        (tmp_path / name).mkdir()
    (tmp_path / "bad" / "rows.jsonl").write_text('{"id": 3}\n')
    for data in (
        "/no/such/set",
        tmp_path / "no rows",
        tmp_path / "bad",
        "coco:/x",
        tmp_path / "bad" / "x@y",
    ):
        summary["config"]["data"] = [str(data)]
        (tmp_path / "eval-rl" / "summary.json").write_text(json.dumps(summary))
        assert "No gallery" in Page(report.page(tmp_path, 3)).text
    (tmp_path / "at @ 12:30").symlink_to(run / "set")  # a path is not taken apart where it exists
    summary["config"]["data"] = [str(tmp_path / "at @ 12:30")]
    (tmp_path / "eval-rl" / "summary.json").write_text(json.dumps(summary))
    assert "No gallery" not in Page(report.page(tmp_path, 3)).text


def test_gallery_mixes_tasks_and_outcomes(run):
    questions: dict = {}
    for folder, name in report.EVALS.items():
        for row in report.read_lines(run / folder / "predictions.jsonl"):
            questions.setdefault(row["question_id"], {})[name, row["path"]] = row
    chosen = report.choose(questions, 6)
    assert chosen == report.choose(dict(reversed(questions.items())), 6) and len(set(chosen)) == 6
    assert [name.split("-")[1] for name in chosen] == ["distance", "order"] * 3
    assert {report.outcome(questions[name]) for name in chosen} == {"right", "changed", "wrong"}
    assert len(report.choose(questions, 99)) == 12
