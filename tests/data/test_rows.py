"""What lies in folders and rows as people have them: links, leftovers, blank lines, images in text,
text without images, sources that come twice, and thousands of bad rows."""

import base64
import io
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
from data import benchmarks
from data.bad_rows import shortened
from data.folders import walk
from errors import UserError


def picture(file: Path, colour=(10, 200, 30), size=(32, 24)) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(file)
    return file


def own(name="a", **changes):
    row = {"id": name, "path": "lor", "images": ["a.png"], "question": "How far?", "answer": "1.5"}
    return row | changes


def write(file: Path, *rows) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def chat(*texts, **fields):
    speakers = ("human", "gpt") * (len(texts) // 2)
    said = [{"from": who, "value": text} for who, text in zip(speakers, texts, strict=True)]
    return {"conversations": said, **fields}


def encoded(kind="PNG", mode="RGB", size=(32, 24)) -> bytes:
    noise = np.random.default_rng(0).integers(0, 255, (*size[::-1], 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(stream, kind)
    return stream.getvalue()


# ---- Folders


@pytest.fixture
def linked(tmp_path):
    """A set of LLaVA's files, put together by links from elsewhere."""
    store = tmp_path / "store"
    for name in ("real", "far", "alone"):
        picture(store / name / "0.png")
        write(store / name / f"{name}.jsonl", chat("<image>\nWhat?", "That.", image="0.png"))
    folder = tmp_path / "set"
    folder.mkdir()
    os.rename(store / "real", folder / "real")
    (folder / "far").symlink_to(store / "far")
    (folder / "again").symlink_to(store / "far")  # the same once more
    (folder / "z_real").symlink_to(folder / "real")  # what lies here anyway
    (folder / "a_real").symlink_to("real")
    (folder / "real" / "up").symlink_to("..")  # cycles
    (folder / "self").symlink_to(".")
    (store / "far" / "back").symlink_to(folder)
    (store / "far" / "above").symlink_to(tmp_path)
    (folder / "alone.jsonl").symlink_to(store / "alone" / "alone.jsonl")  # a file alone
    (folder / "gone").symlink_to(tmp_path / "nowhere")
    (folder / "round.json").symlink_to(folder / "and-round.json")  # files in a circle
    (folder / "and-round.json").symlink_to(folder / "round.json")
    return folder


def test_links_to_folders_are_followed_once(linked, capsys):
    found = sorted(path.name for path in map(Path, walk(linked).files) if path.suffix == ".jsonl")
    assert found == ["alone.jsonl", "far.jsonl", "real.jsonl"]
    picture(linked / "0.png")  # of the file that is linked alone
    read = data.load([f"llava:{linked}"])
    assert len(read) == 3 and str(linked / "real" / "0.png") in {e.images[0] for e in read}
    assert data.load([linked]) == read  # recognised
    said = capsys.readouterr().out
    assert f"{linked}: skipped 3 links that lead nowhere (and-round.json, gone, round.json)" in said


def test_walking_equals_find_where_there_are_no_links(tmp_path):
    for name in ("b/c/1.json", "b/2.json", "a-b/3.json", "a/4.json", "5.json", "b/d.json/6.json"):
        write(tmp_path / name)
    found = walk(tmp_path)
    every = sorted(tmp_path.rglob("*"))
    assert [Path(path) for path in found.files] == [path for path in every if path.is_file()]
    assert [Path(path) for path in found.folders] == [path for path in every if path.is_dir()]


LEFTOVERS = [
    ".ipynb_checkpoints/chat-checkpoint.json",
    "._chat.json",
    "__MACOSX/chat.json",
    ".chat.json.swp",
    "chat.json~",
    "#chat.json#",
    "chat.bak.json",
    "chat.json.tmp",
    "~$chat.json",
    "sub/.hidden.json",
    "sub/.DS_Store",
    "sub/Thumbs.db",
    "@eaDir/chat.json",
    "System Volume Information/chat.json",
]


def test_what_editors_and_systems_leave_is_no_data_and_is_said(tmp_path, capsys):
    picture(tmp_path / "0.png")
    for name in ("chat.json", *LEFTOVERS):
        write(tmp_path / name, chat("<image>What?", "That.", image="0.png"))
    assert len(data.load([tmp_path])) == 1
    said = capsys.readouterr().out.splitlines()
    (line,) = [line for line in said if "skipped" in line]
    assert f"skipped {len(LEFTOVERS)} hidden files" in line and len(line) < 300
    # Who names one gets it.
    picture(tmp_path / "sub" / "0.png")
    assert len(data.load([f"llava:{tmp_path / 'sub' / '.hidden.json'}"])) == 1
    # A folder may have a hidden one above it.
    below = tmp_path / ".cache" / "set"
    picture(below / "0.png")
    write(below / "chat.json", chat("<image>What?", "That.", image="0.png"))
    assert len(data.load([below])) == 1


def test_endings_in_capitals_are_read_and_pipes_are_not(tmp_path, capsys):
    picture(tmp_path / "0.png")
    for name in ("a.JSON", "b.Jsonl", "c.json"):
        write(tmp_path / name, chat("<image>What?", "That.", image="0.png"))
    os.mkfifo(tmp_path / "pipe.json")  # whoever opens it waits for ever
    assert len(data.load([f"llava:{tmp_path}"])) == len(data.load([tmp_path])) == 3
    assert "skipped 1 hidden files, or copies that editors and systems leave (pipe.json)" in (
        capsys.readouterr().out
    )
    assert len(data.load([tmp_path / "a.JSON"])) == 1


def test_a_name_that_is_no_text_gives_an_id_that_is(tmp_path):
    picture(tmp_path / "0.png")
    name = os.fsdecode(b"caf\xe9.json")
    write(tmp_path / name, chat("<image>What?", "That.", image="0.png"))
    (example,) = data.load([f"llava:{tmp_path}"])
    assert "caf?" in example.id and example.id.encode()


def test_a_folder_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    write(tmp_path / "set" / "closed" / "rows.json")
    scan = os.scandir

    def scandir(folder):
        if str(folder).endswith("closed"):
            raise PermissionError(13, "Permission denied", folder)
        return scan(folder)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match="set/closed: Permission denied"):
        data.load([f"llava:{tmp_path / 'set'}"])


def test_a_benchmark_may_be_linked_together(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    row = {"image": {"bytes": encoded(), "path": None}, "question": "How many?", "answer": "3"}
    store = tmp_path / "store"
    store.mkdir()
    parquet.write_table(pa.Table.from_pylist([row]), store / "test-0.parquet")
    root = tmp_path / "root"
    root.mkdir()
    (root / "data").symlink_to(store)
    (root / "._test-0.parquet").write_bytes(b"Mac OS X")
    with pytest.warns(UserWarning, match="1 rows in"):
        assert len(benchmarks.load("realworldqa", root, "direct")) == 1


# ---- Rows


def test_folders_of_images_are_not_looked_into_where_a_set_says_so(tmp_path):
    for name in ("a/images/deep/1.jsonl", "a/images.jsonl"):
        write(tmp_path / name)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "images").symlink_to(tmp_path / "a")
    found = walk(tmp_path, without=("images",))
    assert [os.path.relpath(path, tmp_path) for path in found.files] == ["a/images.jsonl"]
    assert len(found.folders) == 3


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_blank_lines_pass_and_count(tmp_path, end, mark):
    picture(tmp_path / "a.png")
    lines = ["", json.dumps(own("1")), "", "  \t", json.dumps(own("2")), "{torn", "", ""]
    file = tmp_path / "rows.jsonl"
    file.write_bytes(mark + end.join(lines).encode())
    with pytest.raises(data.BadRows) as error:
        data.load([file])
    assert [row[1:3] for row in error.value.rows] == [(6, "row")]
    file.write_bytes(mark + end.join(lines[:5] + lines[6:]).encode())
    assert [e.id for e in data.load([file])] == ["1", "2"]
    # An array, as well.
    file.write_bytes(mark + json.dumps([own("1"), own("2")]).replace(", ", f",{end}").encode())
    assert [e.id for e in data.load([file])] == ["1", "2"]
    file.write_bytes(mark + (end * 3).encode())
    with pytest.raises(data.BadRows, match="empty file"):
        data.load([file])


def uri(content: bytes, kind="png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


@pytest.mark.parametrize(
    "text",
    [
        uri(encoded()),
        uri(encoded("JPEG"), "jpeg"),
        uri(encoded("PNG", "RGBA")),
        uri(encoded()).replace("image/png;base64", "image/png;charset=utf-8;base64"),
        uri(encoded()).replace("image/png", ""),
        uri(encoded()).rstrip("="),
        "\n".join(uri(encoded())[i : i + 76] for i in range(0, len(uri(encoded())), 76)),
        uri(encoded())
        .replace("+", "%2B")
        .replace("/", "%2F")
        .replace("data:image%2F", "data:image/"),
        uri(encoded()).replace("+", "-").replace("/", "_").replace("data:image_", "data:image/"),
        base64.b64encode(encoded(size=(64, 64))).decode(),  # without its header
    ],
)
def test_images_in_the_row_itself(tmp_path, text):
    header, comma, content = text.replace("\n", "").partition("base64,")
    (own_row,) = data.load([write(tmp_path / "rows.jsonl", own(images=[text]))])
    (llava,) = data.load([write(tmp_path / "c.jsonl", chat("<image>?", "1", image=text))])
    for example in (own_row, llava):
        (image,) = pickle.loads(pickle.dumps(example.images))
        assert image.size in ((32, 24), (64, 64))
        same = np.asarray(Image.open(io.BytesIO(image.source)).convert("RGB"))
        assert np.array_equal(np.asarray(image.convert("RGB")), same)
    assert np.array_equal(
        np.asarray(own_row.images[0].convert("RGB")), np.asarray(llava.images[0].convert("RGB"))
    )


def test_regions_lie_on_an_image_of_the_row_itself(tmp_path):
    row = own(images=[uri(encoded())], question="What is <mask>?", regions=[[0, [1, 2, 30, 20]]])
    (example,) = data.load([write(tmp_path / "rows.jsonl", row)])
    assert example.regions == [(0, (1, 2, 30, 20))]
    with pytest.raises(data.BadRows, match="outside its image"):
        data.load([write(tmp_path / "rows.jsonl", row | {"regions": [[0, [1, 2, 33, 20]]]})])
    marked = chat("<image>(red point)?", "1", image=uri(encoded()), red_point=[[500, 500]], cot="c")
    (example,) = data.load([write(tmp_path / "s.jsonl", marked)])
    assert example.images[0].convert("RGB").getpixel((16, 12)) == (255, 0, 0)


@pytest.mark.parametrize(
    "text, why",
    [
        (uri(encoded()) + "!!", "broken data URI"),
        (uri(b"no image" * 100_000), "broken data URI"),
        (uri(encoded(size=(300, 300)))[:5000], "broken data URI"),
        ("data:image/png;base64,", "broken data URI"),
        ("x" * 800_000, "broken data URI"),
        ("data:text/plain,hello", "broken data URI"),
        ("https://example.org/a.png", "a URL and no file: .* images are not downloaded"),
        ("images/" + "x" * 3000 + ".png", "missing file|corrupt file"),
    ],
)
@pytest.mark.parametrize("kind", ["scenes", "llava"])
def test_a_broken_image_in_a_row_is_named_shortly(tmp_path, text, why, kind):
    rows = {"scenes": own(images=[text]), "llava": chat("<image>?", "1", image=text)}
    file = write(tmp_path / "rows.jsonl", rows[kind])
    with pytest.raises(data.BadRows, match=why) as error:
        data.load([f"{kind}:{file}"])
    assert [row[:2] for row in error.value.rows] == [(str(file), 1)]
    assert "BytesIO" not in str(error.value)
    assert len(str(error.value)) < 1000 and max(map(len, error.value.rows[0][2:])) < 450


def test_rows_of_text_alone_are_for_path_direct(tmp_path):
    text = own("t", path="direct")
    del text["images"]
    picture(tmp_path / "a.png")
    read = data.load(
        [write(tmp_path / "rows.jsonl", own(), text, text | {"id": "u", "images": []})]
    )
    assert [len(e.images) for e in read] == [1, 0, 0]
    for change, why in (({}, "images: missing"), ({"images": []}, "images: no image, on path lor")):
        file = write(tmp_path / "rows.jsonl", text | {"path": "lor"} | change)
        with pytest.raises(data.BadRows, match=why):
            data.load([file])
    file = write(tmp_path / "rows.jsonl", text | {"question": "<image> what?"})
    with pytest.raises(data.BadRows, match="<image> count: 1 for 0"):
        data.load([file])
    file = write(
        tmp_path / "rows.jsonl", text | {"question": "<mask>?", "regions": [[0, [0, 0, 1, 1]]]}
    )
    with pytest.raises(data.BadRows, match="no such image: 0"):
        data.load([file])


def test_llava_s_rows_of_text_alone(tmp_path):
    picture(tmp_path / "a.png")
    rows = [chat("Hi", "Hello", "And?", "So."), chat("<image>\nWhat?", "That.", image="a.png")]
    rows += [chat("Hi", "Hello", image=none) for none in (None, "", [])]
    read = data.load([write(tmp_path / "chat.jsonl", *rows)])
    assert [(e.path, len(e.images)) for e in read] == [("direct", n) for n in (0, 0, 1, 0, 0, 0)]
    for row, field in ((chat("<image>Hi", "Hello"), "image"), (chat("Hi <mask>", "So"), "bbox")):
        with pytest.raises(data.BadRows) as error:
            data.load([f"llava:{write(tmp_path / 'bad.jsonl', row)}"])
        assert error.value.rows[0][2] == field
    with pytest.raises(data.BadRows, match="bbox: no such image: 0 of 0"):
        data.load([write(tmp_path / "bad.jsonl", chat("Hi <mask>", "So", bbox=[[1, 2, 3, 4]]))])


def test_one_line_says_what_was_loaded(tmp_path, capsys):
    picture(tmp_path / "a.png")
    truths = ("B", "(C)", "2.4 meters away", "30°", "move_up:1", "a chair")
    rows = [own(str(k), answer=truth, task="t") for k, truth in enumerate(truths)]
    rows.append(own("d", path="direct"))
    data.load([write(tmp_path / "rows.jsonl", *rows)])
    assert capsys.readouterr().out == (
        "7 rows by path lor 6, direct 1; by task t 6, (none) 1; "
        "by truth number 3, choice 2, motion 1, text 1\n"
    )


# ---- Sources that come more than once


@pytest.fixture
def two_sets(tmp_path):
    for name in ("one", "two"):
        picture(tmp_path / name / "a.png")
        rows = [own(f"{name}{k}") for k in range(100)]
        write(tmp_path / name / "rows.jsonl", *rows)
    return tmp_path / "one", tmp_path / "two"


def counts(*sources):
    found = {}
    for example in data.load(sources):
        found[example.id] = found.get(example.id, 0) + 1
    return found


def test_a_weight_above_1_has_rows_come_so_often(two_sets):
    one, two = two_sets
    thrice = counts(f"{one},weight=3", two)
    assert [thrice[f"one{k}"] for k in range(100)] == [3] * 100 and thrice["two0"] == 1
    mixed = counts(f"{one},weight=2.5")
    assert set(mixed.values()) == {2, 3} and 30 < sum(n == 3 for n in mixed.values()) < 70
    # The half that comes once more is the half that a weight of .5 takes.
    assert {name for name, n in mixed.items() if n == 3} == set(counts(f"{one},weight=.5"))
    assert counts(f"{one},weight=2,cap=10") == dict.fromkeys(counts(f"{one},cap=10"), 2)
    read = data.load([f"{one},weight=2"])
    assert all(read[2 * k] is read[2 * k + 1] for k in range(100))


def test_a_source_may_be_named_twice(two_sets, monkeypatch):
    one, _ = two_sets
    assert set(counts(one, one).values()) == {2}
    monkeypatch.chdir(one.parent)
    (one.parent / "link").symlink_to(one)
    assert set(counts(one, "one", "./one/rows.jsonl", "link").values()) == {4}
    half = counts(one, f"{one},weight=.5,seed=3")
    assert set(half.values()) == {1, 2}


def test_two_rows_of_one_id_are_still_an_error(two_sets):
    one, two = two_sets
    write(two / "rows.jsonl", own("one7", answer="9"))
    with pytest.raises(data.BadRows) as error:
        data.load([one, two])
    ((file, row, field, reason),) = error.value.rows
    assert (file, row, field) == (str(two / "rows.jsonl"), 1, "id")
    assert reason.startswith("duplicate") and f"{one / 'rows.jsonl'}:8" in reason
    write(one / "rows.jsonl", own("a"), own("a"))  # by mistake within one
    with pytest.raises(data.BadRows, match="rows.jsonl:2: id: duplicate.*rows.jsonl:1"):
        data.load([f"{one},weight=2"])


def test_the_bad_rows_of_a_source_named_twice_come_once(two_sets):
    one, _ = two_sets
    write(one / "rows.jsonl", own("a"), own("b", answer=" "))
    with pytest.raises(data.BadRows) as error:
        data.load([one, one])
    assert [row[1] for row in error.value.rows] == [2]
    assert [e.id for e in data.load([one, one], skip_bad_rows=True)] == ["a", "a"]


def test_a_home_is_found_and_a_mixture_may_begin_with_a_mark(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    picture(tmp_path / "images" / "0.png")
    write(tmp_path / "set" / "c.json", chat("<image>What?", "That.", image="0.png"))
    source = "llava:~/set/c.json@~/images"
    mixture = tmp_path / "mixture.toml"
    mixture.write_bytes(b'\xef\xbb\xbf[[source]]\r\ndata = "' + source.encode() + b'"\r\n')
    (example,) = data.load([source])
    assert example.images == [str(tmp_path / "images" / "0.png")]
    assert data.load([mixture]) == [example]


def test_every_path_that_is_not_there_is_named(two_sets):
    one, _ = two_sets
    with pytest.raises(UserError, match="nowhere.*elsewhere"):
        data.load(["nowhere", one, "llava:elsewhere"])


# ---- Thousands of bad rows


def test_bad_rows_are_grouped_with_three_examples_each(tmp_path):
    picture(tmp_path / "a.png")
    rows = [own(str(k), images=[f"{k}.png"]) for k in range(1000)] + [own("x", answer=7), own("y")]
    file = write(tmp_path / "rows.jsonl", *rows)
    with pytest.raises(data.BadRows) as error:
        data.load([file])
    bad = error.value
    assert len(bad.rows) == 1001 and bad.rows[5][:3] == (str(file), 6, "images")
    lines = str(bad).splitlines()
    assert lines[:2] == ["1001 rows cannot be used:", "1000 x images: missing file"]
    assert lines[2].startswith(f"{file}:1: images: missing file: {tmp_path}/0.png")
    assert lines[5] == "... and 997 more" and "1001: answer: unknown answer kind" in lines[6]
    assert len(lines) == 7
    told = bad.told(tmp_path / "out")
    assert told == f"{bad}\nthe whole list is in {tmp_path}/out/bad_rows.txt"
    listed = (tmp_path / "out" / "bad_rows.txt").read_text().splitlines()
    assert len(listed) == 1001 and listed[999].startswith(f"{file}:1000: images: missing file")


def test_few_bad_rows_leave_no_file(tmp_path):
    bad = data.BadRows([("a.jsonl", 1, "answer", "missing"), ("a.jsonl", 2, "id", "duplicate: x")])
    assert bad.told(tmp_path / "out") == str(bad) and not (tmp_path / "out").exists()


def test_many_reasons_fill_no_screen(tmp_path):
    rows = [("a.jsonl", k, "row", f"reason {k % 150}: of row {k}") for k in range(1000)]
    bad = data.BadRows(rows)
    assert shortened("lexical error:\n      [1\n    ^\n") == "lexical error: [1 ^"
    assert len(str(bad).splitlines()) < 30 and len(bad.summary(2000)) < 500
    (tmp_path / "file").write_text("")
    assert "could not be written" in bad.told(tmp_path / "file")
