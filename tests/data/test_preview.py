"""python -m data: counts, bad rows, lengths, exit codes, and the page of examples."""

import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

import data
import flags
from data import preview
from data.__main__ import Config, main
from errors import UserError
from model.processor import Processor
from srreal import target

CAMERA = (100.0, 110.0, 60.0, 44.0)
CENTRE = (0.3, -0.2, 2.5)


@pytest.fixture
def rows(tmp_path):
    """Three rows of one picture, with a red box in it, and its depth; the writer of more."""
    picture = Image.new("RGB", (120, 90), "grey")
    picture.paste((255, 0, 0), (60, 20, 85, 45))
    picture.save(tmp_path / "a.png")
    depth = np.full((90, 120), 2500, np.uint16)
    depth[:30] = 0
    Image.fromarray(depth).save(tmp_path / "depth.png")
    common = dict(images=["a.png"], regions=[[0, [60, 20, 85, 45]]], objects={"red bbox": CENTRE})
    common |= dict(depths=["depth.png"], intrinsics=[CAMERA], names={"red bbox": "box"})
    question = "How far is the box (red bbox <mask>)?"
    kinds = [
        dict(path="lor", task="depth", answer="2.5", rationale="It is 2.5 m.", question=question),
        dict(path="dtr", task="depth", answer="2.5 m", rationale="So far.", question=question),
        dict(path="lor", task="which", answer="B", question="<script>? A. x B. red bbox <mask>"),
    ]
    made = [common | kind | dict(id=f"row-{i}") for i, kind in enumerate(kinds)]

    def write(rows) -> str:
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(file)

    return made, write


def cells(said: str, start: str) -> list[str]:
    """The cells of the printed line that begins so."""
    (line,) = [line for line in said.splitlines() if line.startswith(start)]
    return line.split()


def test_nothing_to_train_on_is_no_success(rows):
    made, write = rows
    assert main(Config((f"{write(made[:0])}",))) == 1


def test_good_rows_are_counted(rows, capsys):
    made, write = rows
    assert main(Config((write(made),))) == 0
    said = capsys.readouterr().out
    assert "3 rows, 0 of them unusable; 3 examples" in said
    # path, task, truth; rows, images, depth, regions, centres, rationale
    assert cells(said, "lor   depth") == ["lor", "depth", "number", *"111111"]
    assert cells(said, "dtr   depth") == ["dtr", "depth", "number", *"111111"]
    assert cells(said, "lor   which") == ["lor", "which", "choice", *"111110"]
    assert "1 have no target for SFT" in said


def test_bad_rows_come_by_reason(rows, tmp_path, capsys):
    made, write = rows
    bad = [made[0] | dict(id=f"bad-{i}", images=["b.png"]) for i in range(5)]
    bad.append(made[0] | dict(id="out", regions=[[0, [0, 0, 500, 20]]]))
    source = write(made + bad)
    assert main(Config((source,), out=str(tmp_path / "out"))) == 1
    said = capsys.readouterr().out
    assert "9 rows, 6 of them unusable" in said
    assert "5 x images: missing file" in said and "rows.jsonl:9: regions: outside" in said
    listed = (tmp_path / "out" / "bad_rows.txt").read_text().splitlines()
    assert len(listed) == 6 and (tmp_path / "out" / "index.html").is_file()
    # Where no row is left there is nothing to show, and without --out nothing is written.
    assert main(Config((write(bad),))) == 1
    assert "6 of them unusable; 0 examples" in capsys.readouterr().out


def test_a_mixture_is_a_source(rows, tmp_path, capsys):
    made, write = rows
    (tmp_path / "mix.toml").write_text(f'[[source]]\ndata = "{write(made)}"\npath = "lor"\n')
    assert main(Config((str(tmp_path / "mix.toml"),))) == 0
    assert "2 examples" in capsys.readouterr().out


def test_mistakes_end_in_words():
    with pytest.raises(UserError, match="no such file or folder: nowhere"):
        main(Config(("nowhere",)))
    for arguments in ([], ["a", "--modle", "b"], ["a", "--examples", "0"]):
        with pytest.raises(SystemExit) as end:
            flags.parse(Config, "", arguments)
        assert end.value.code == 2


@pytest.mark.parametrize("regions", ["token", "text"])
def test_lengths_are_the_processors(regions, rows, tiny_home, tmp_path, capsys):
    made, write = rows
    source = write(made)
    model = tiny_home / "tiny"
    processor = Processor.from_pretrained(model, regions=regions, max_pixels=64 * 64)
    prompts = {}
    both = {}
    for example in data.load(source):
        prompt = len(processor.prompt_ids(example))
        prompts.setdefault(example.path, []).append(prompt)
        if example.rationale:
            text = len(processor.target_ids(example))
            both.setdefault(example.path, []).append(prompt + text)
    settings = dict(model=str(model), regions=regions, max_pixels=64 * 64)
    assert main(Config((source,), **settings)) == 0
    said = capsys.readouterr().out
    for path, lengths in prompts.items():
        row = cells(said, f"{path}   prompt")
        assert row[2] == str(len(lengths)) and row[-1] == str(max(lengths))
        assert float(row[3]) == pytest.approx(np.median(lengths), abs=0.51)
    for path, lengths in both.items():
        assert cells(said, f"{path}   both")[2:] == [str(len(lengths)), *[str(lengths[0])] * 3]

    # A checkpoint whose context lies between: the prompts fit, one with its target does not.
    short = tmp_path / "short"
    shutil.copytree(model, short)
    config = json.loads((short / "config.json").read_text())
    limit = max(both["dtr"]) - 1
    config["text_config"]["max_position_embeddings"] = limit
    (short / "config.json").write_text(json.dumps(config))
    assert main(Config((source,), **settings | dict(model=str(short)))) == 0
    words = f"0 prompts, and 1 prompts with their targets, exceed the context of {limit}"
    assert words in capsys.readouterr().out
    config["text_config"]["max_position_embeddings"] = 20
    (short / "config.json").write_text(json.dumps(config))
    assert main(Config((source,), **settings | dict(model=str(short)))) == 1


class Page(HTMLParser):
    """The elements of a page, with their attributes, and its texts."""

    def __init__(self, text: str):
        super().__init__()
        self.elements = []
        self.texts = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, text):
        self.texts.append(text)

    def named(self, tag: str, css: str | None = None) -> list[dict]:
        return [a for name, a in self.elements if name == tag and css in (None, a.get("class"))]


def decoded(uri: str) -> Image.Image:
    kind, content = uri.split(",")
    assert kind == "data:image/jpeg;base64"
    return Image.open(io.BytesIO(base64.b64decode(content)))


def test_the_page_draws_what_the_row_says(rows, tmp_path):
    made, write = rows
    examples = data.load(write(made))
    preview.write(examples, tmp_path / "page", 5, 0)
    page = Page((tmp_path / "page" / "index.html").read_text())
    regions = page.named("rect", "region")
    assert len(regions) == 3
    for region in regions:
        assert [float(region[name]) for name in ("x", "y", "width", "height")] == [60, 20, 25, 25]
        assert region["style"] == "stroke:#e5484d"
    fx, fy, cx, cy = CAMERA
    x, y, z = CENTRE
    for dot in page.named("circle", "dot"):
        assert float(dot["cx"]) == pytest.approx(fx * x / z + cx, abs=0.01)
        assert float(dot["cy"]) == pytest.approx(fy * y / z + cy, abs=0.01)
    assert page.texts.count("2.50 m") == 3
    seen = decoded(page.named("image")[0]["href"])
    assert seen.size == (120, 90) and np.asarray(seen)[32, 72, 0] > 200
    depth = np.asarray(decoded(page.named("img")[0]["src"]))
    assert (depth[:20] > 240).all() and not (depth[40:] > 240).all()
    assert "depth 2.5 to 2.5 m, 33% unknown" in page.texts
    # The text of a row is no markup, and nothing is fetched.
    assert not page.named("script") and any("<script>?" in text for text in page.texts)
    assert any(target(examples[0]) in text for text in page.texts)
    assert not re.search(r"(?:src|href)=.https?:|url\(", (tmp_path / "page/index.html").read_text())


def test_masks_several_views_and_no_image(tmp_path):
    black = Image.new("RGB", (40, 30))
    mask = np.zeros((30, 40), bool)
    mask[10:20, 5:25] = True
    example = data.Example("a", "dtr", [black] * 8, "Is it (blue bbox <mask>)?", "yes")
    example.regions = [(1, mask)]
    example.objects = {"blue bbox": {1: (0, 0, 1.0), 2: (0, 0, -1.0)}}
    example.intrinsics = [(40.0, 40.0, 20.0, 15.0)] * 8
    talk = data.Example("b", "direct", [], "Hello?", "Hi.")
    page = Page(preview.page([example, talk], 2, 0))
    assert len(page.named("image")) == preview.VIEWS and "and 2 more images" in page.texts
    (outline,) = page.named("rect", "region")
    assert (outline["x"], outline["width"], outline["height"]) == ("5.0", "20.0", "10.0")
    # What lies behind the camera of a view is not drawn there.
    assert [dot["cx"] for dot in page.named("circle", "dot")] == ["20.00"]
    tinted = np.asarray(decoded(page.named("image")[1]["href"])).astype(int)
    assert tinted[15, 15, 2] > 80 > tinted[3, 3, 2]
    assert "no image" in page.texts


def test_the_choice_is_seeded_and_of_every_kind():
    examples = []
    for i in range(40):
        for path in ("lor", "dtr"):
            examples.append(data.Example(f"{i}-{path}", path, [], "?", "1", task=f"t{i % 4}"))
    chosen = preview.choose(examples, 2, seed=0)
    kinds = [(example.task, example.path) for example in chosen]
    assert len(chosen) == 16 and len(set(kinds)) == 8
    # Neither the order of the rows nor one that comes twice changes it; another seed does.
    again = preview.choose(examples[::-1] + examples[:5], 2, seed=0)
    assert [example.id for example in again] == [example.id for example in chosen]
    other = preview.choose(examples, 2, seed=1)
    assert [example.id for example in other] != [example.id for example in chosen]
    assert len(preview.choose(examples, 40, seed=0)) == 80
    many = [data.Example(str(i), "lor", [], "?", "1", task=str(i)) for i in range(300)]
    assert len(preview.choose(many, 2, seed=0)) == preview.EXAMPLES
