"""Kind vqa: sets of images, questions and answers in the forms in which others publish them."""

import base64
import io
import json
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from PIL import Image
from published import IMAGE, parquet

import data
import latex
import train_sft
from data.rows import BadSource, MissingFile
from pictures import read_picture


def picture(level: int) -> Image.Image:
    return Image.new("RGB", (40, 30), (level, level, level))


def png(level: int) -> bytes:
    picture(level).save(out := io.BytesIO(), "PNG")
    return out.getvalue()


def uri(level: int) -> str:
    return f"data:image/png;base64,{base64.b64encode(png(level)).decode()}"


def level_of(image) -> int:
    """The grey of an image, as the trainer reads it."""
    return read_picture(image).getpixel((0, 0))[0]


def row(k: int = 0, **changes) -> dict:
    fields = {
        "images": [{"bytes": png(k), "path": None}],
        "problem": f"<image>Find x in figure {k}.",
        "answer": str(k),
    }
    return fields | changes


def geometry3k(folder: Path, **splits: int) -> Path:
    """As published: data/train-00000-of-00001.parquet and so on, of so many rows each."""
    for split, count in splits.items():
        rows = [row(k, id=k) for k in range(count)]
        parquet(folder / "data" / f"{split}-00000-of-00001.parquet", rows, images=pa.list_(IMAGE))
    return folder


def jsonl(folder: Path, *rows: dict, name: str = "rows.jsonl") -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps(entry) + "\n" for entry in rows))
    return f"vqa:{folder}"


def only(source: str, path: str = "lor"):
    """The one example of a source on a path."""
    (example,) = data.load(f"{source},path={path}")
    return example


# ---- Rows and paths


def test_a_row_is_asked_on_lor_and_direct(tmp_path):
    examples = data.load(f"vqa:{geometry3k(tmp_path / 'geometry3k', train=2)}")
    assert [(e.path, e.question, e.answer) for e in examples] == [
        ("lor", "Find x in figure 0.", "0"),
        ("direct", "Find x in figure 0.", "0"),
        ("lor", "Find x in figure 1.", "1"),
        ("direct", "Find x in figure 1.", "1"),
    ]
    assert [level_of(e.images[0]) for e in examples] == [0, 0, 1, 1]
    assert not any(e.rationale or e.objects or e.regions for e in examples)
    assert len({e.id for e in examples}) == 2


@pytest.mark.parametrize("path", ["lor", "direct"])
def test_path_picks(tmp_path, path):
    source = f"vqa:{geometry3k(tmp_path / 'set', train=3)},path={path}"
    assert [e.path for e in data.load(source)] == [path] * 3


def test_sft_leaves_lor_out_and_says_how_many(tmp_path, capsys):
    source = f"vqa:{geometry3k(tmp_path / 'set', train=3)}"
    for sources in (source, [source, source]):
        examples = data.load(sources, more=train_sft.why_not_trainable)
        assert {e.path for e in examples} == {"direct"}
        count = len(examples)
        assert f"{count} rows left out on path lor: no rationale" in capsys.readouterr().out


# ---- Files and splits


@pytest.mark.parametrize(
    "files, split, wanted",
    [
        (["data/train-0.parquet", "data/test-0.parquet", "data/validation-0.parquet"], None, [0]),
        (["train-0-of-2.parquet", "train-1-of-2.parquet", "test-0.parquet"], None, [0, 1]),
        (["data/a.parquet", "data/test-0.parquet", "validation-0.parquet"], None, [0]),
        (["train/0.parquet", "test/0.parquet", "dev/0.parquet"], None, [0]),
        (["a/b.parquet", "c.parquet"], None, [0, 1]),
        (["train-0.parquet", "more.parquet"], None, [0]),
        (["data/train-0.parquet", "data/test-0.parquet"], "test", [1]),
        (["train-0.parquet", "val-0.parquet"], "validation", [1]),
        (["train-0.parquet", "hard-0.parquet"], "hard", [1]),
        (["a-protest.parquet", "trainer.parquet"], None, [0, 1]),
    ],
)
def test_a_folder_means_its_train_split(tmp_path, files, split, wanted):
    for k, name in enumerate(files):
        parquet(tmp_path / "set" / name, [row(k)], images=pa.list_(IMAGE))
    option = f",split={split}" if split else ""
    examples = data.load(f"vqa:{tmp_path / 'set'},path=lor{option}")
    assert sorted(int(e.answer) for e in examples) == wanted


def test_a_file_that_is_named_is_read_whatever_its_split(tmp_path):
    folder = geometry3k(tmp_path, test=1)
    assert only(f"vqa:{folder}/data/test-00000-of-00001.parquet").answer == "0"


def test_held_out_splits_alone_have_to_be_asked_for(tmp_path):
    folder = geometry3k(tmp_path, test=1, validation=1)
    with pytest.raises(MissingFile, match="no file of split train"):
        data.load(f"vqa:{folder}")


def test_json_and_jsonl_beside_what_a_library_writes(tmp_path):
    source = jsonl(tmp_path / "a", row(1, images=[uri(1)]), name="train.jsonl")
    assert level_of(only(source).images[0]) == 1
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "train.json").write_text(json.dumps([row(2, images=[uri(2)])]))
    (tmp_path / "b" / "dataset_info.json").write_text("{}")
    assert level_of(only(f"vqa:{tmp_path / 'b'}").images[0]) == 2


def test_a_folder_that_save_to_disk_wrote(tmp_path):
    table = pa.Table.from_pylist([row(k) for k in range(40)])
    table = table.set_column(0, "images", table["images"].cast(pa.list_(IMAGE)))
    for split in ("train", "test"):
        file = tmp_path / split / "data-00000-of-00001.arrow"
        file.parent.mkdir()
        with pa.OSFile(str(file), "wb") as out, pa.ipc.new_stream(out, table.schema) as writer:
            writer.write_table(table)
        (tmp_path / split / "state.json").write_text("{}")
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    examples = data.load(str(tmp_path))
    assert [int(e.answer) for e in examples if e.path == "lor"] == list(range(40))


def test_the_kind_is_known_without_being_named(tmp_path):
    assert len(data.load(str(geometry3k(tmp_path / "set", train=1)))) == 2
    fields = {"image": uri(1), "question": "?", "answer": "B"}
    jsonl(tmp_path / "lines", fields, name="train.jsonl")
    assert len(data.load(str(tmp_path / "lines"))) == 2


# ---- Columns


@pytest.mark.parametrize(
    "fields",
    [
        {"image": {"bytes": png(7), "path": "x.png"}, "question": "Q?", "answer": "5"},
        {"img": png(7), "query": "Q?", "label": 5},
        {"image": png(7), "problem": "<image>\nQ?", "solution": "so <answer> 5 </answer>"},
        {"Image": png(7), "Prompt": "Q?", "Ground_Truth": ["5"]},
        {"image_1": png(7), "image_2": None, "question": "Q?", "answer": "5"},
    ],
)
def test_names_are_guessed(tmp_path, fields):
    parquet(tmp_path / "train-0.parquet", [fields])
    example = only(f"vqa:{tmp_path}")
    assert (example.question, example.answer) == ("Q?", "5")
    assert [level_of(image) for image in example.images] == [7]


def test_options_name_columns(tmp_path):
    fields = {
        "problem": "no",
        "answer": "no",
        "images": [],
        "ask": "Q?",
        "gold": "5",
        "view": png(7),
    }
    parquet(tmp_path / "train-0.parquet", [fields], images=pa.list_(pa.binary()))
    example = only(f"vqa:{tmp_path},image=view,question=ask,answer=gold")
    assert (example.question, example.answer, level_of(example.images[0])) == ("Q?", "5", 7)


def test_a_mixture_file_has_these_options_too(tmp_path):
    geometry3k(tmp_path / "set", train=1, test=4)
    text = f'[[source]]\ndata = "vqa:{tmp_path / "set"}"\nsplit = "test"\nquestion = "answer"\n'
    (tmp_path / "mix.toml").write_text(text)
    examples = data.load(str(tmp_path / "mix.toml"))
    assert [e.question for e in examples if e.path == "lor"] == ["0", "1", "2", "3"]


@pytest.mark.parametrize(
    "option, said",
    [
        ("question=ask", "no such column, but images, problem, answer"),
        ("image=view", "no such column"),
        ("split=hard", "no file of split hard"),
        ("split=", "split="),
    ],
)
def test_an_option_that_fits_nothing_is_a_users_mistake(tmp_path, option, said):
    with pytest.raises((BadSource, MissingFile), match=said):
        data.load(f"vqa:{geometry3k(tmp_path / 'set', train=1)},{option}")


def test_options_of_another_kind_are_refused(tmp_path):
    with pytest.raises(BadSource, match="it is for a vqa:PATH"):
        data.load(f"llava:{geometry3k(tmp_path / 'set', train=1)},image=view")


# ---- Images


def test_paths_lie_beside_the_file_in_the_folder_or_in_the_root(tmp_path):
    picture(3).save(tmp_path / "3.png")
    (tmp_path / "data").mkdir()
    picture(4).save(tmp_path / "data" / "4.png")
    (tmp_path / "root").mkdir()
    picture(5).save(tmp_path / "root" / "4.png")
    fields = {"images": ["3.png", "4.png"], "problem": "?", "answer": "B"}
    jsonl(tmp_path / "data", fields, name="train.jsonl")
    assert [level_of(image) for image in only(f"vqa:{tmp_path}").images] == [3, 4]
    jsonl(tmp_path / "data", fields | {"images": {"path": "4.png"}}, name="train.jsonl")
    source = f"vqa:{tmp_path}@{tmp_path / 'root'}"
    assert [level_of(image) for image in only(source).images] == [5]


def test_several_images_stand_where_the_text_has_them(tmp_path):
    images = [{"bytes": png(1), "path": None}, {"bytes": png(2), "path": None}]
    text = "Is <image> above <image>?"
    parquet(tmp_path / "a.parquet", [row(images=images, problem=text)], images=pa.list_(IMAGE))
    example = only(f"vqa:{tmp_path}")
    assert example.question == text
    assert [level_of(image) for image in example.images] == [1, 2]


def test_rows_of_text_alone_are_asked_on_direct(tmp_path, capsys):
    rows = [row(0), row(1, images=None, problem="1 + 0 = ?"), row(2, images=[], problem="?")]
    parquet(tmp_path / "a.parquet", rows, images=pa.list_(IMAGE))
    examples = data.load(f"vqa:{tmp_path}")
    assert [(e.answer, e.path) for e in examples] == [
        ("0", "lor"),
        ("0", "direct"),
        ("1", "direct"),
        ("2", "direct"),
    ]
    assert "2 rows without an image" in capsys.readouterr().out


# ---- Truths


@pytest.mark.parametrize(
    "fields, question, answer",
    [
        ({"answer": 1, "choices": ["red", "blue"]}, "Which?\nA. red\nB. blue", "B"),
        ({"answer": "(B)", "options": ["red", "blue"]}, "Which?\nA. red\nB. blue", "(B)"),
        ({"answer": "blue", "choices": ["red", "blue"]}, "Which?", "blue"),
        ({"answer": 7, "choices": ["red", "blue"]}, "Which?", "7"),
        ({"answer": 5, "choices": [*"uvwxyz"]}, "Which?\nA. u\nB. v\nC. w\nD. x\nE. y\nF. z", "F"),
        ({"answer": 7}, "Which?", "7"),
        ({"answer": 2.5}, "Which?", "2.5"),
    ],
)
def test_a_letter_comes_with_its_options(tmp_path, fields, question, answer):
    example = only(jsonl(tmp_path, {"image": uri(1), "question": "Which?"} | fields))
    assert (example.question, example.answer) == (question, answer)


def test_options_that_the_question_lists_are_not_listed_again(tmp_path):
    asked = "Which?\n(A) red\n(B) blue"
    fields = {"image": uri(1), "question": asked, "answer": "A", "choices": ["red", "blue"]}
    assert only(jsonl(tmp_path, fields)).question == asked


def test_latex_without_math_verify_is_refused_by_row(tmp_path, monkeypatch):
    rows = [row(0), row(1, answer=r"2 \sqrt { 221 }"), row(2, answer="x^2"), row(3, answer="$5$")]
    parquet(tmp_path / "a.parquet", rows, images=pa.list_(IMAGE))
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(data.BadRows, match="math-verify") as error:
        data.load(f"vqa:{tmp_path},path=lor")
    assert [(number, field) for _, number, field, _ in error.value.rows] == [
        (2, "answer"),
        (3, "answer"),
        (4, "answer"),
    ]
    assert len(data.load(f"vqa:{tmp_path},path=lor", skip_bad_rows=True)) == 1


@pytest.mark.skipif(not latex.is_installed(), reason="without math-verify")
def test_latex_is_a_text_to_be_compared(tmp_path, capsys):
    parquet(tmp_path / "a.parquet", [row(answer=r"2 \sqrt { 221 }")], images=pa.list_(IMAGE))
    assert only(f"vqa:{tmp_path}").answer == r"2 \sqrt { 221 }"
    assert "by truth text 1" in capsys.readouterr().out


# ---- Rows that can't be used


@pytest.mark.parametrize(
    "fields, field, reason",
    [
        ({"images": [b"no image"]}, "image", "corrupt"),
        ({"images": [png(1)[:60]]}, "image", "corrupt"),
        ({"problem": "<image><image>Which?"}, "problem", "<image> count: 2 for 1 images"),
        ({"problem": "<image>?", "images": None}, "problem", "<image> count: 1 for 0 images"),
        ({"problem": " "}, "problem", "no text"),
        ({"problem": None}, "question", "missing: no problem or question"),
        ({"answer": None}, "answer", "missing: no answer or solution"),
        ({"answer": "<answer> </answer>"}, "answer", "missing"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, fields, field, reason):
    rows = [row(0, images=[png(0)]), row(1, images=[png(1)]) | fields]
    parquet(tmp_path / "a.parquet", rows, images=pa.list_(pa.binary()))
    with pytest.raises(data.BadRows) as error:
        data.load(f"vqa:{tmp_path}")
    ((_, number, named, said),) = error.value.rows
    assert (number, named) == (2, field) and reason in said


@pytest.mark.parametrize(
    "fields, field, reason",
    [
        ({"image": "none.png"}, "image", "missing file"),
        ({"image": "https://a.b/c.png"}, "image", "a URL"),
        ({"image": 5}, "image", "neither bytes nor a path"),
        ({"answer": ["1", "2"]}, "answer", "not one text or number"),
        ({"question": ["a"]}, "question", "no text"),
    ],
)
def test_what_is_wrong_in_json_is_named(tmp_path, fields, field, reason):
    good = {"image": uri(1), "question": "?", "answer": "B"}
    with pytest.raises(data.BadRows) as error:
        data.load(jsonl(tmp_path, good, good | fields))
    ((_, number, named, said),) = error.value.rows
    assert (number, named) == (2, field) and reason in said
