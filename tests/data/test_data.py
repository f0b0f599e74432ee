"""data.load: every kind of bad row is named once, all of them in one list; good rows come back
whole."""

import json
import os
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

import data
from data import headers
from data.checks import check
from data.headers import measure
from data.rows import Bad, Row
from data.sets.regions import polygons
from data.sources import Source, recognise
from errors import UserError

GOOD = {
    "id": "a",
    "path": "dtr",
    "images": ["a.png"],
    "question": "How far is the box (red bbox <mask>)?",
    "answer": "2.1",
    "depths": ["d.png"],
    "intrinsics": [[50, 50, 15.5, 11.5]],
    "regions": [[0, [1, 2, 30, 20]]],
    "objects": {"red bbox": [0.1, 0.2, 2.1]},
    "task": "depth",
    "rationale": "z is 2.1",
    "names": {"red bbox": "box"},
    "sizes": {"red bbox": [0.5, 0.4, 0.3]},
}
VIEWS = {"red bbox": {"0": [0, 0, 2], "1": [1, 0, 2]}}
TWO = GOOD | {
    "id": "b",
    "images": ["a.png", "b.png"],
    "depths": ["d.png", None],
    "frame": 1,
    "intrinsics": [[50, 50, 15.5, 11.5], None],
    "objects": VIEWS,
}
PAIR = {"images": ["a.png", "b.png"], "depths": None, "intrinsics": None}
VIEW = {"red bbox": {"0": [0, 0, 2], "2": [1, 0, 2]}}
BAD = {  # kind: (changes to GOOD, the field it is reported at, how its reason begins)
    "no image file": ({"images": ["none.png"], "depths": None}, "images", "missing file"),
    "truncated image": ({"images": ["cut.png"], "depths": None}, "images", "corrupt file"),
    "text as image": ({"images": ["text.png"], "depths": None}, "images", "corrupt file"),
    "no image at all": (
        {
            "images": [],
            "depths": None,
            "intrinsics": None,
            "regions": [],
            "question": "?",
            "objects": None,
        },
        "images",
        "no image",
    ),
    "no depth file": ({"depths": ["none.png"]}, "depths", "missing file"),
    "depth of 8 bits": ({"depths": ["grey.png"]}, "depths", "wrong mode: L"),
    "image as depth": ({"depths": ["a.png"]}, "depths", "wrong mode: RGB"),
    "depth of another size": ({"depths": ["small.png"]}, "depths", "wrong size"),
    "too many depths": ({"depths": ["d.png", "d.png"]}, "depths", "wrong count"),
    "region outside": ({"regions": [[0, [1, 2, 33, 20]]]}, "regions", "outside its image"),
    "region left of it": ({"regions": [[0, [-1, 2, 30, 20]]]}, "regions", "outside its image"),
    "region empty": ({"regions": [[0, [5, 2, 5, 20]]]}, "regions", "empty"),
    "region nan": ({"regions": [[0, [5, float("nan"), 9, 20]]]}, "regions", "empty"),
    "region in fractions": (
        {"regions": [[0, [0.1, 0.2, 0.5, 1]]]},
        "regions",
        "in fractions of the image",
    ),
    "region in 1/1000": ({"regions": [[0, [100, 200, 500, 900]]]}, "regions", "outside its image"),
    "depth in metres": ({"depths": ["metres.png"]}, "depths", "depth in metres, not millimetres?"),
    "centre in millimetres": (
        {"objects": {"red bbox": [100, 200, 2100]}},
        "objects",
        "farther than 1000 m",
    ),
    "region of no image": ({"regions": [[1, [1, 2, 30, 20]]]}, "regions", "no such image"),
    "mask without region": ({"regions": []}, "regions", "<mask> count"),
    "region without mask": ({"question": "How far is the box?"}, "regions", "<mask> count"),
    "images marked twice": ({"question": "<image> <image> <mask>"}, "question", "<image> count"),
    "intrinsics nan": (
        {"intrinsics": [[float("nan"), 50, 15, 11]]},
        "intrinsics",
        "not finite and positive",
    ),
    "intrinsics zero": ({"intrinsics": [[50, 0, 15, 11]]}, "intrinsics", "not finite and positive"),
    "intrinsics short": ({"intrinsics": [[50, 50, 15]]}, "intrinsics", "wrong type"),
    "blank answer": ({"answer": " "}, "answer", "unknown answer kind"),
    "number as answer": ({"answer": 2.1}, "answer", "unknown answer kind"),
    "unknown path": ({"path": "cot"}, "path", "unknown path"),
    "unknown field": ({"rational": "z is 2.1"}, "rational", "unknown field"),
    "no question": ({"question": None}, "question", "missing"),
    "centre nan": ({"objects": {"red bbox": [0, 0, float("nan")]}}, "objects", "not finite"),
    "centre of two": ({"objects": {"red bbox": [0, 0]}}, "objects", "wrong type"),
    "centre too large": (
        {"objects": {"red bbox": [0, 0, 10**400]}},
        "objects",
        "wrong type or value",
    ),
    "camera too large": (
        {"intrinsics": [[10**400, 50, 15, 11]]},
        "intrinsics",
        "wrong type or value",
    ),
    "centre infinite": ({"objects": {"red bbox": [0, 0, float("inf")]}}, "objects", "not finite"),
    "half a character": ({"question": "\ud83d <mask>"}, "question", "wrong type or value"),
    "half a character in a mention": ({"names": {"\udc00": "box"}}, "names", "wrong type or value"),
    "half a character in a field": ({"\udc00": 1}, "\\udc00", "unknown field"),
    "size zero": ({"sizes": {"red bbox": [0.5, 0, 0.3]}}, "sizes", "not finite and positive"),
    "size nan": (
        {"sizes": {"red bbox": [0.5, float("nan"), 0.3]}},
        "sizes",
        "not finite and positive",
    ),
    "size infinite": (
        {"sizes": {"red bbox": [float("inf"), 1, 0.3]}},
        "sizes",
        "not finite and positive",
    ),
    "view that is no number": (
        {"objects": {"red bbox": {"x": [0, 0, 1]}}},
        "objects",
        "no such view",
    ),
    "view in other digits": (
        {"objects": {"red bbox": {"00": [0, 0, 1]}}},
        "objects",
        "no such view",
    ),
    "in one of two views": (PAIR, "objects", "in which of 2 views"),
    "frame that sees nothing": (
        PAIR | {"frame": 1, "objects": {"red bbox": {"0": [0, 0, 1]}}},
        "objects",
        "none has a centre in the view asked for",
    ),
    "object without views": ({"objects": {"red bbox": {}}}, "objects", "not finite"),
    "view out of range": ({"objects": VIEW}, "objects", "no such view"),
    "frame out of range": ({"frame": 1}, "frame", "no such view"),
    "boolean frame": ({"frame": True}, "frame", "wrong type"),
    "duplicate id": ({"id": "a"}, "id", "duplicate"),
    "region in a rationale": ({"rationale": "the box <mask> is near"}, "rationale", "<mask>"),
    "region in an answer": ({"answer": "<mask>"}, "answer", "<mask>"),
    "image like a thread": (
        {"images": ["thread.png"], "depths": None, "regions": [], "question": "?"},
        "images",
        "too long and thin",
    ),
}


@pytest.fixture
def folder(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (24, 32, 3), np.uint8)
    for name in ("a.png", "b.png", "cut.png"):
        Image.fromarray(noise).save(tmp_path / name)
    whole = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("not an image")
    Image.new("L", (32, 24), 2).save(tmp_path / "grey.png")
    Image.new("RGB", (1000, 4)).save(tmp_path / "thread.png")
    Image.fromarray(np.full((24, 32), 2100, np.uint16)).save(tmp_path / "d.png")
    Image.fromarray(np.full((12, 16), 2100, np.uint16)).save(tmp_path / "small.png")
    Image.fromarray(np.full((24, 32), 2, np.uint16)).save(tmp_path / "metres.png")
    return tmp_path


def write(folder, rows, name="rows.jsonl"):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / name).write_text("".join(f"{line}\n" for line in lines))
    return folder / name


def test_good_rows_come_back_whole(folder):
    write(folder, [GOOD, TWO])
    one, two = data.load([str(folder)])
    assert one.images == [str(folder / "a.png")] and one.depths == [str(folder / "d.png")]
    assert one.regions == [(0, (1, 2, 30, 20))] and one.intrinsics == [(50, 50, 15.5, 11.5)]
    assert (
        one.objects == {"red bbox": (0.1, 0.2, 2.1)} and one.frame is None and one.task == "depth"
    )
    assert one.sizes == {"red bbox": (0.5, 0.4, 0.3)}
    assert two.objects == {"red bbox": {0: (0, 0, 2), 1: (1, 0, 2)}} and two.frame == 1
    assert two.depths == [str(folder / "d.png"), None] and two.intrinsics[1] is None


def test_every_kind_of_bad_row_in_one_list(folder):
    rows = [GOOD] + [GOOD | {"id": kind} | change for kind, (change, _, _) in BAD.items()]
    rows += ["{not json", "[1, 2]", "", "[" * 200_000, '{"a": 1' + "0" * 5000 + "}"]
    file = write(folder, rows)
    with pytest.raises(data.BadRows) as error:
        data.load([str(folder)])
    found = error.value.rows
    want = [(str(file), k + 2, field, reason) for k, (_, field, reason) in enumerate(BAD.values())]
    for (_, row, field, reason), (_, row_, field_, start) in zip(found, want, strict=False):
        assert (row, field) == (row_, field_) and reason.startswith(start), (rows[row - 1], reason)
    rest = [(row, field) for _, row, field, _ in found[len(want) :]]
    # The blank line is the fourth.
    assert rest == [(len(BAD) + k, "row") for k in (2, 3, 5, 6)]
    said = str(error.value)
    assert said.startswith(f"{len(found)} rows cannot be used:\n")
    assert all(f"{file}:{row}: {field}: {reason[:300]}" in said for _, row, field, reason in found)


def test_one_triple_of_several_views_lies_in_the_frame_asked_for(folder):
    found = [PAIR | {"id": "c", "frame": 1}, PAIR | {"id": "d", "path": "lor"}]
    # detection counts what the frame lacks
    half = {"red bbox": {"0": [0, 0, 1]}, "b": {"1": [0, 0, 1]}}
    found.append(PAIR | {"id": "e", "objects": half, "frame": 1})
    found.append({"id": "f", "rationale": None})  # RL needs none
    write(folder, [GOOD | change for change in found])
    assert len(data.load([folder])) == 4
    mixed = data.load([folder])[2]
    # no row of our format can, a generator can
    mixed.objects["b"] = (0.0, 0.0, 1.0)
    sizes = dict.fromkeys(mixed.images, (32, 24, "RGB"))
    assert ("objects", "some by view, some not") in check(mixed, sizes)


def test_a_question_s_rows_of_two_paths_may_share_an_id(folder):
    write(folder, [GOOD, GOOD | {"path": "lor"}])
    assert [(e.id, e.path) for e in data.load([folder])] == [("a", "dtr"), ("a", "lor")]


def test_all_reasons_of_one_row(folder):
    write(folder, [GOOD | {"answer": " ", "path": "x", "regions": [[0, [0, 0, 99, 9]]]}])
    with pytest.raises(data.BadRows) as error:
        data.load([str(folder)])
    assert {field for _, _, field, _ in error.value.rows} == {"answer", "path", "regions"}


def test_skip_counts(folder, capsys):
    bad = [GOOD | {"id": "x", "answer": 3}, GOOD | {"id": "y", "answer": ""}]
    bad.append(GOOD | {"id": "z", "path": "cot"})
    write(folder, [GOOD, *bad, TWO])
    assert [e.id for e in data.load([str(folder)], skip_bad_rows=True)] == ["a", "b"]
    said = capsys.readouterr().out
    assert (
        "skipped 3 of 5 rows" in said
        and "2 x answer: unknown answer kind" in said
        and "1 x path" in said
    )
    write(folder, bad)
    with pytest.raises(data.BadRows):  # nothing is left to train on
        data.load([str(folder)], skip_bad_rows=True)


def test_sources(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("rows")
    write(folder, [GOOD])
    other = write(elsewhere, [TWO], "some.jsonl")
    read = data.load([f"scenes:{folder}", f"scenes:{other}@{folder}"])
    assert [e.images[0] for e in read] == [str(folder / "a.png")] * 2
    # what data.coldstart writes
    assert data.load([f"srreal:{folder}"]) == data.load([folder])
    # of one set: all its images are missing
    with pytest.raises(data.BadRows) as error:
        data.load([folder, other])
    assert {file for file, *_ in error.value.rows} == {str(other)}
    with pytest.raises(UserError, match="unknown kind 'coco'.*scenes"):
        data.load([f"coco:{folder}"])
    with pytest.raises(UserError, match="no such file or folder: nowhere"):
        data.load(["nowhere"])
    # a set that was cut off has no rows.jsonl
    with pytest.raises(UserError, match="neither a folder with rows.jsonl"):
        data.load([elsewhere])
    with pytest.raises(data.BadRows, match="empty file"):
        data.load([write(elsewhere, [], "empty.jsonl")])
    write(folder, [GOOD, TWO, GOOD])
    with pytest.raises(
        data.BadRows, match=f"duplicate: a on path dtr, as in {folder}/rows.jsonl:1"
    ):
        data.load([folder])


def test_cache_notices_a_new_file(folder):
    write(folder, [GOOD])
    assert len(data.load([folder])) == len(data.load([folder])) == 1
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    with pytest.raises(data.BadRows) as error:
        data.load([folder])
    assert {field for _, _, field, _ in error.value.rows} == {"depths", "regions"}
    (folder / "a.png").write_bytes(b"gone bad")
    with pytest.raises(data.BadRows, match="corrupt file"):
        data.load([folder])


@pytest.fixture
def remembered(tmp_path, monkeypatch):
    """A folder of its own for what is remembered of files."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "sr-real"


@pytest.mark.parametrize("damage", [b"", b"{", b"[1]", b"SQLite format 3\0" + b"7" * 5000, "cut"])
def test_a_damaged_cache_is_ignored_and_mended(folder, remembered, monkeypatch, damage):
    file = str(folder / "a.png")
    sound = {file: (32, 24, "RGB")}
    assert measure([file]) == sound
    (database,) = remembered.iterdir()
    database.write_bytes(database.read_bytes()[:6000] if damage == "cut" else damage)
    assert measure([file]) == sound
    monkeypatch.setattr(headers, "read_header", None)  # and now it is read from there
    assert measure([file]) == sound


def test_what_is_remembered_is_neither_read_nor_written_as_a_whole(folder, remembered):
    """Of many sets: a load takes its own files' headers, and writes nothing where none is new."""
    one, other = str(folder / "a.png"), str(folder / "b.png")
    Image.new("RGB", (8, 9)).save(other)
    measure([one])
    measure([other])
    (database,) = remembered.iterdir()
    before = database.stat().st_mtime_ns, database.read_bytes()
    assert measure([one]) == {one: (32, 24, "RGB")}
    assert measure([other, one]) == {other: (8, 9, "RGB"), one: (32, 24, "RGB")}
    assert (database.stat().st_mtime_ns, database.read_bytes()) == before


def test_without_a_home_to_write_to_files_are_read_each_time(folder, remembered):
    remembered.parent.write_text("a file where a folder should be")
    file = str(folder / "a.png")
    assert measure([file]) == measure([file]) == {file: (32, 24, "RGB")}


def test_a_user_without_a_home_has_nothing_remembered(folder, remembered, monkeypatch):
    def fail():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(headers.Path, "home", fail)
    file = str(folder / "a.png")
    assert measure([file]) == {file: (32, 24, "RGB")}


@pytest.mark.skipif(sys.platform == "darwin", reason="its file systems take no such names")
def test_names_that_are_no_text_are_remembered(folder, remembered, monkeypatch):
    file = os.fsdecode(os.fsencode(folder) + b"/\xff.png")
    shutil.copy(folder / "a.png", file)
    sound = {file: (32, 24, "RGB")}
    assert measure([file]) == sound
    monkeypatch.setattr(headers, "read_header", None)
    assert measure([file]) == sound


def test_beyond_the_first_files_only_headers_are_read(folder):
    files = [str(folder / name) for name in ("a.png", "cut.png")]
    assert measure(files, decoded=1)[files[1]] == (32, 24, "RGB")
    assert measure(files)[files[1]].startswith("corrupt file")
    assert measure(files)[files[0]] == (32, 24, "RGB")


def test_depth_beside_an_image_is_picked_up(folder):
    write(folder, [GOOD | {"depths": None}])
    assert data.load([folder])[0].depths is None
    Image.fromarray(np.full((24, 32), 2100, np.uint16)).save(folder / "a.depth.png")
    assert data.load([folder])[0].depths == [str(folder / "a.depth.png")]
    write(folder, [TWO | {"depths": [None, "d.png"]}])  # also of one image of several
    assert data.load([folder])[0].depths == [str(folder / "a.depth.png"), str(folder / "d.png")]
    write(folder, [TWO | {"depths": [None]}])
    with pytest.raises(data.BadRows, match="depths: wrong count: 1 for 2 images"):
        data.load([folder])


def test_a_missing_image_says_where_it_was_looked_for(folder):
    write(folder, [GOOD])
    (folder / "elsewhere").mkdir()
    with pytest.raises(data.BadRows) as error:
        data.load([f"scenes:{folder}@{folder}/elsewhere"])
    assert f"missing file: {folder}/elsewhere/a.png (kind:path@image_root" in str(error.value)
    with pytest.raises(UserError, match="no such folder of images: .*nowhere"):
        data.load([f"scenes:{folder}@{folder}/nowhere"])


def test_what_a_source_takes_of_no_row_is_said(folder, capsys):
    write(folder, [GOOD])
    assert (
        data.load([f"{folder},path=lor"]) == []
        and "nothing was taken of" in capsys.readouterr().out
    )
    assert (
        data.load([f"{folder},weight=1e-9"]) == []
        and "nothing was taken of" in capsys.readouterr().out
    )
    write(folder, [GOOD | {"path": "lor"}, GOOD | {"answer": " "}], "mixed.jsonl")
    read = data.load([f"{folder},weight=1e-9", folder / "mixed.jsonl"], skip_bad_rows=True)
    # also beside a bad row of another source
    said = capsys.readouterr().out
    assert (
        len(read) == 1 and f"nothing was taken of {folder}\n" in said and "skipped 1 of 2" in said
    )


LLAVA = {
    "image": "a.png",
    "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "1"}],
}


@pytest.mark.parametrize(
    "kind, row",
    [
        ("llava", LLAVA),
        ("srreal", LLAVA | {"3d_pos": {}}),
        ("spar", LLAVA | {"type": "t", "image": ["a.png"]}),
        ("srreal", LLAVA | {"type": "t", "cot": "so"}),
        ("srreal", LLAVA | {"red_point": [[5, 5]]}),
        (
            "srreal",
            LLAVA
            | {
                "conversations": [
                    {"from": "human", "value": "?"},
                    {"from": "gpt", "value": "<think>so</think>\n<answer>1</answer>"},
                ]
            },
        ),
        ("spatialrgpt", {"filename": "a.png", "conversations": LLAVA["conversations"]}),
        ("scenes", GOOD),
        ("refcoco", {"file_name": "a.png", "answer": ["x"], "bbox": [1, 2, 3, 4]}),
    ],
)
def test_kinds_are_recognised_by_the_first_row(folder, kind, row):
    for name in ("x.jsonl", "x.json"):
        (folder / name).write_text(json.dumps(row) if name == "x.jsonl" else json.dumps([row]))
        if (kind, name) != ("scenes", "x.json"):
            assert recognise(folder / name) == kind
    # SPAR's images lie in a folder of that name
    if kind not in ("scenes", "spar"):
        assert len(data.load([folder / "x.json"])) == 1


def one_row(make):
    """A kind of one row that is made by that function."""
    return Source(lambda path, root: iter([Row(str(path), 1, "a", make)]))


def test_a_reader_s_bug_keeps_its_traceback(folder, monkeypatch):
    monkeypatch.setitem(data.SOURCES, "mine", one_row(lambda headers: {}["id"]))
    with pytest.raises(KeyError):
        data.load([f"mine:{folder}"], skip_bad_rows=True)


def test_what_a_reader_finds_wrong_is_a_bad_row(folder, monkeypatch):
    def make(headers):
        raise Bad([("id", "missing"), ("answer", "missing")])

    monkeypatch.setitem(data.SOURCES, "mine", one_row(make))
    with pytest.raises(data.BadRows) as error:
        data.load([f"mine:{folder}"])
    assert error.value.rows == [(str(folder), 1, field, "missing") for field in ("id", "answer")]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e300])
def test_a_polygon_that_cannot_be_drawn_is_bad(value):
    with pytest.raises(Bad, match="far outside its image"):
        polygons([[1, 2, 3, 4, 5, value]], (32, 24))


def test_a_marked_image_survives_pickling_and_leaves_its_source_alone():
    import pickle

    from data.marks import Marked
    from data.sets.spar_marks import draw_marks

    blank = Image.new("RGB", (100, 100))
    image = Marked(blank, draw_marks, (("marks", (("red", "point", (500, 500)),)), ("radius", 5)))
    assert image.convert("RGB").getpixel((50, 50)) == (255, 0, 0) and image.size == (100, 100)
    assert blank.getbbox() is None
    again = pickle.loads(pickle.dumps(Marked("a.png", draw_marks, (("marks", ()),))))
    assert again == Marked("a.png", draw_marks, (("marks", ()),)) and hash(again)
