"""SPAR-7M's reader: a rendered room in the published layout comes back, every mark on its object
and view."""

import json

import numpy as np
import pytest
import rooms
from PIL import Image

import data
from data.rows import Bad, Row, each, pinhole, typed
from data.sets.spar_marks import COLOURS, Mark, draw_marks, insert_masks, marks_of
from data.sources import Source
from srreal import Example


@pytest.fixture(scope="module")
def three():
    return rooms.rich(3, 4)


def point(room, thing, view):
    return [[round(float(v)) for v in room.pixel(thing, view) / rooms.SIZE * 1000]]


def box(room, thing, view):
    return [[round(float(v)) for v in room.box(thing, view)]]


def load_one(*sources, **options):
    (example,) = data.load(list(sources), **options)
    return example


def test_a_row_arrives_whole(tmp_path, three):
    room, (a, b, *_) = three
    images, depths = rooms.spar_images(room, tmp_path)
    row = rooms.spar_row(
        "depth_prediction_oo",
        images[:1],
        "The counter (red point) is 1.6 m deep, how deep is the box (blue bbox)?",
        "1.5",
        depth=list(depths[:1]),
        red_point=point(room, a, 0),
        blue_bbox=box(room, b, 0),
    )
    rooms.spar_file(tmp_path, "depth_prediction_oo", [row])
    e = load_one(f"spar:{tmp_path}/spar")
    asked = "The counter (red point <mask>) is 1.6 m deep, how deep is the box (blue bbox <mask>)?"
    assert e.question == asked
    assert (e.path, e.answer, e.task, e.frame) == ("lor", "1.5", "depth_prediction_oo", None)
    assert e.id == f"scannet/train/depth_prediction_oo/fill_1/{rooms.SCENE}_16#1"
    assert not e.objects and e.rationale is None
    camera = room.cameras[0]
    assert e.intrinsics == [
        (camera.focal, camera.focal, (rooms.SIZE[0] - 1) / 2, (rooms.SIZE[1] - 1) / 2)
    ]
    with Image.open(e.depths[0]) as depth:
        assert np.array_equal(np.asarray(depth), room.depths[0])
    # each on the right thing
    for (view, (x0, y0, x1, y1)), thing in zip(e.regions, (a, b), strict=True):
        assert view == 0
        inside = room.owners[0][int(y0) : int(y1), int(x0) : int(x1)]
        assert np.bincount(inside[inside >= 0]).argmax() == thing
    u, v = np.array(point(room, a, 0)[0]) * rooms.SIZE // 1000
    width, height = np.array([50, 50]) * rooms.SIZE / 1000
    around = [u - width / 2, v - height / 2, u + width / 2, v + height / 2]
    assert np.allclose(e.regions[0][1], around, atol=1.1)
    image = e.images[0]
    assert image.size == rooms.SIZE
    drawn = np.asarray(image.convert("RGB"))
    assert tuple(drawn[v, u]) == COLOURS["red"]
    same = (drawn == np.asarray(room.images[0])).all(-1)
    # only the marks differ
    assert 0.3 < same.mean() < 0.99
    assert np.asarray(image.convert("L")).shape == rooms.SIZE[::-1]


def test_boxes_and_points_are_drawn_as_by_the_set_s_tool():
    blank = Image.new("RGB", (1000, 1000))
    drawn = np.asarray(draw_marks(blank, (("blue", "bbox", (400, 500, 600, 700)),)))[..., 2] > 0
    rows, columns = np.flatnonzero(drawn.any(1)), np.flatnonzero(drawn.any(0))
    assert abs(rows[0] - (500 - 17.5)) <= 1 and abs(rows[-1] - (700 + 17.5)) <= 1
    assert abs(columns[0] - (400 - 17.5)) <= 1 and abs(columns[-1] - (600 + 17.5)) <= 1
    assert drawn[600, columns[0] : columns[0] + 20].all()
    assert not drawn[600, columns[0] + 20 : columns[-1] - 20].any()
    blank = Image.new("RGB", (1000, 500))
    drawn = np.asarray(draw_marks(blank, (("green", "point", (300, 400)),)))[..., 1] > 0
    v, u = np.nonzero(drawn)
    assert (u.mean().round(), v.mean().round()) == (300, 200) and np.hypot(
        u - 300, v - 200
    ).max() <= 20.8
    assert abs(drawn.sum() - np.pi * 20.5**2) < 30
    blank = Image.new("RGB", (1000, 1000))
    thin = np.asarray(draw_marks(blank, (("red", "bbox", (400, 500, 600, 700)),), 5, 0))[..., 0] > 0
    assert np.flatnonzero(thin.any(0))[[0, -1]].tolist() == [400, 600]
    assert thin[600, 400:405].all() and not thin[600, 405]
    both = ("red", "point", (500, 500)), ("blue", "point", (500, 500))
    assert draw_marks(Image.new("RGB", (99, 99)), both).getpixel((49, 49)) == COLOURS["blue"]


# Task: keys as stored (in an order that misleads), the views of img_idx, and where each colour has
# to be.
ORDERS = {
    "depth_prediction_oc_mv": (["blue", "red"], [2, 0], {"red": 2, "blue": 0}),
    "depth_prediction_oo_mv": (
        ["green", "blue", "red"],
        [1, 0, 2],
        {"red": 1, "blue": 0, "green": 2},
    ),
    "distance_prediction_oc_mv": (["red"], [2], {"red": 2}),
    "distance_prediction_oo_mv": (["blue", "red"], [1, 2], {"red": 1, "blue": 2}),
    "distance_infer_center_oo_mv": (
        ["red", "blue", "green"],
        [2, 0, 1],
        {"red": 2, "green": 0, "blue": 1},
    ),
    "spatial_imagination_oc_mv": (
        ["red", "blue", "green"],
        [0, 2, 1],
        {"green": 0, "blue": 2, "red": 1},
    ),
    "spatial_imagination_oo_mv": (
        ["red", "blue", "green", "yellow"],
        [3, 2, 1, 0],
        {"green": 3, "blue": 2, "red": 1, "yellow": 0},
    ),
    "obj_spatial_relation_oc_mv": (["red", "blue"], [2, 1], {"red": 2, "blue": 2}),
    "obj_spatial_relation_oo_mv": (["blue", "red"], [1, 0], {"red": 1, "blue": 0}),
    "position_matching": (["red"], [2], {"red": 0}),
    "view_change_infer": (["red"], [1], {}),
    "camera_motion_infer": (["red"], [1], {}),
    "distance_infer_center_oc_mv": (["red"], [1], {}),
}


@pytest.mark.parametrize("task", ORDERS)
@pytest.mark.parametrize("kind", ["bbox", "point"])
def test_colours_go_to_the_views_that_the_task_says(task, kind):
    keys, index, wanted = ORDERS[task]
    at = [[100, 100, 300, 300]] if kind == "bbox" else [[200, 200]]
    row = {"type": task, "image": ["a"] * 4, f"{kind}_img_idx": [index]} | {
        f"{c}_{kind}": at for c in keys
    }
    assert {mark.colour: mark.view for mark in marks_of(row)} == wanted
    assert {mark.mention for mark in marks_of(row)} == {f"{colour} {kind}" for colour in wanted}


def test_a_missing_colour_takes_no_view():
    row = {"type": "obj_spatial_relation_oo_mv", "image": ["a"] * 3, "bbox_img_idx": [[2, 1]]}
    boxes = {"red_bbox": [None], "green_bbox": [[1, 2, 3, 4]], "blue_bbox": [[5, 6, 7, 8]]}
    assert {m.colour: m.view for m in marks_of(row | boxes)} == {"blue": 2, "green": 1}


def test_files_are_looked_for_of_the_rows_that_are_taken(tmp_path, three, monkeypatch):
    """A share of millions of rows, on a network's disk: not a look for each depth map of those left
    out."""
    room, (a, *_) = three
    images, depths = rooms.spar_images(room, tmp_path)
    row = rooms.spar_row(
        "depth_prediction_oc",
        images[:1],
        "(red point)?",
        "2",
        depth=list(depths[:1]),
        red_point=point(room, a, 0),
    )
    rooms.spar_file(tmp_path, "depth_prediction_oc", [row] * 50)
    looks, look = [], data.sets.files.os.path.isfile
    monkeypatch.setattr(
        data.sets.files.os.path, "isfile", lambda file: looks.append(str(file)) or look(file)
    )
    taken = data.load([f"spar:{tmp_path}/spar,cap=3"])
    assert len(taken) == 3 and sum(file.endswith("image_depth/0.png") for file in looks) <= 4


def test_the_order_of_keys_says_nothing():
    """A task of no known order: one view for all, or what the row says otherwise, or the row is
    bad."""
    at = {"red_bbox": [[1, 1, 9, 9]], "blue_bbox": [[5, 5, 9, 9]]}
    row = {"type": "of_tomorrow", "image": ["a"] * 3} | at
    for index in ([[2, 1]], None):
        with pytest.raises(Bad, match="in which of 3 images is red_bbox"):
            marks_of(row | {"bbox_img_idx": index})
    assert [m.view for m in marks_of(row | {"bbox_img_idx": [[2]]})] == [2, 2]
    said = {"red_bbox": 1, "blue_bbox": 2}
    assert [m.view for m in marks_of(row | {"bbox_img_idx": [[2, 1]]}, said)] == [1, 2]
    known = row | {"type": "distance_prediction_oo_mv", "bbox_img_idx": [[2, 0]]}
    assert [m.view for m in marks_of(known, said)] == [2, 0]
    with pytest.raises(Bad, match="in which of 3 images is blue_bbox"):  # a task of red alone
        marks_of(row | {"type": "distance_prediction_oc_mv", "bbox_img_idx": [[2, 1]]})


def test_several_views_are_marked_where_their_things_are(tmp_path, three):
    room, things = three
    images, depths = rooms.spar_images(room, tmp_path)
    # distance_infer_center_oo_mv
    views = {"red": 2, "green": 0, "blue": 1}
    row = rooms.spar_row(
        "distance_infer_center_oo_mv",
        images,
        "In the first image: is the box (red bbox) nearer to (green bbox) or (blue bbox)? "
        "Or (red bbox)?",
        "B",
        depth=list(depths),
        bbox_img_idx=[[2, 0, 1]],
        **{
            f"{c}_bbox": box(room, things[k], views[c])
            for k, c in enumerate(("red", "blue", "green"))
        },
    )
    e = load_one(rooms.spar_file(tmp_path, "distance_infer_center_oo_mv", [row], "select"))
    assert (
        e.question.count("<mask>") == 3 and e.question.endswith("Or (red bbox)?") and e.frame == 0
    )
    assert [view for view, _ in e.regions] == [2, 0, 1]
    for (view, (x0, y0, x1, y1)), k in zip(e.regions, (0, 2, 1), strict=True):
        inside = room.owners[view][int(y0) : int(y1), int(x0) : int(x1)]
        assert np.bincount(inside[inside >= 0]).argmax() == things[k]
    for view, colour in enumerate(("green", "blue", "red")):
        changed = (np.asarray(e.images[view].convert("RGB")) != np.asarray(room.images[view])).any(
            -1
        )
        assert {tuple(c) for c in np.asarray(e.images[view].convert("RGB"))[changed]} == {
            COLOURS[colour]
        }


def test_masks_are_inserted_by_the_paper_s_rules():
    red, blue = Mark("red", "bbox", 0, (0, 0, 9, 9)), Mark("blue", "point", 0, (5, 5))
    text = "a (blue point), b (red bbox), a (blue point), c (green bbox), red bboxes"
    one = "a (blue point <mask>), b (red bbox <mask>), a (blue point <mask>), c (green bbox), "
    one += "red bboxes"
    assert insert_masks(text, [red, blue], False) == (one, [blue, red, blue])
    several = (
        "a (blue point <mask>), b (red bbox <mask>), a (blue point), c (green bbox), red bboxes"
    )
    assert insert_masks(text, [red, blue], True) == (several, [blue, red])
    lone = "the bbox of the chair, or the other bbox"
    assert insert_masks(lone, [red], True) == (
        "the bbox <mask> of the chair, or the other bbox",
        [red],
    )
    assert insert_masks(lone, [red], False) == insert_masks(lone, [red, blue], True) == (lone, [])


def test_a_point_s_region_stays_inside():
    assert Mark("red", "point", 0, (10, 990)).box() == (0, 965, 35, 999)
    assert Mark("red", "point", 0, (975, 500)).box() == (950, 475, 1000, 525)
    assert Mark("red", "bbox", 0, (333, 0, 1000, 999)).pixels((640, 480)) == (213, 0, 640, 479)


def test_a_folder_is_read_for_fill_and_select_and_an_index_for_what_it_names(tmp_path, three):
    room, (a, *_) = three
    images, _ = rooms.spar_images(room, tmp_path)
    row = rooms.spar_row(
        "depth_prediction_oc",
        images[:1],
        "How deep is (red point)?",
        "2",
        red_point=point(room, a, 0),
    )
    for form in ("fill", "select", "sentence"):
        rooms.spar_file(tmp_path, "depth_prediction_oc", [row], form)
    rooms.spar_file(tmp_path, "obj_count", [row | {"type": "obj_count"}])
    # recognised by its folders, which may be linked in from elsewhere, as may the images
    (tmp_path / "spar" / "scannet" / "images").rename(tmp_path / "ScanNet")
    (tmp_path / "spar" / "scannet" / "images").symlink_to(tmp_path / "ScanNet")
    (tmp_path / "spar" / "scannet").rename(tmp_path / "elsewhere")
    (tmp_path / "spar" / "scannet").symlink_to(tmp_path / "elsewhere")
    read = data.load([f"{tmp_path}/spar"])
    assert [e.id.split("/")[3] for e in read] == ["fill_1", "select_1"] and read[0].depths is None
    index = tmp_path / "data_jsons" / "all.json"
    index.parent.mkdir()
    file = "spar/scannet/qa_jsonl/train/depth_prediction_oc/sentence/sentence_1.jsonl"
    entry = {"root": "spar/scannet/images", "annotation": file, "repeat_time": 1, "length": 1}
    index.write_text(json.dumps({"scannet_depth_prediction_oc_sentence": entry}))
    assert load_one(index).images[0].source == str(tmp_path / "spar/scannet/images" / images[0])
    index.write_text(json.dumps({"gone": entry | {"annotation": "nowhere.jsonl"}}))
    with pytest.raises(FileNotFoundError, match="nowhere.jsonl"):
        data.load([index])
    for text in ("[]", "{", '{"a": 1}', '{"a": {"root": "x"}}'):
        index.write_text(text)
        with pytest.raises(ValueError, match="all.json: no index"):
            data.load([f"spar:{index}"])
    with pytest.raises(FileNotFoundError, match="no fill/.*nor select/"):  # not silently nothing
        data.load([f"spar:{tmp_path}/spar/scannet/qa_jsonl/train/depth_prediction_oc/sentence"])


def test_a_folder_above_train_is_not_read_for_val(tmp_path, three, capsys):
    room, (a, *_) = three
    images, _ = rooms.spar_images(room, tmp_path)
    row = rooms.spar_row(
        "depth_prediction_oc", images[:1], "(red point)?", "2", red_point=point(room, a, 0)
    )
    train = rooms.spar_file(tmp_path, "depth_prediction_oc", [row]).parents[2]
    other = rooms.spar_file(tmp_path / "other", "depth_prediction_oc", [row]).parents[2]
    val = other.rename(train.parent / "val")
    assert [e.id.split("/")[1] for e in data.load([f"spar:{tmp_path}/spar"])] == ["train"]
    assert "1 left out: of val and test splits" in capsys.readouterr().out
    assert [e.id.split("/")[1] for e in data.load([f"spar:{val}"])] == ["val"]
    assert "left out" not in capsys.readouterr().out


def test_images_elsewhere_without_depth_or_with_a_coarser_one(tmp_path, three):
    room, (a, *_) = three
    rooms.spar_images(room, tmp_path)
    rooms.save(room.images[0], tmp_path / "other" / "s" / "image_color" / "0.jpg")
    row = rooms.spar_row(
        "depth_prediction_oc",
        ["s/image_color/0.jpg"],
        "(red point)?",
        "2",
        red_point=point(room, a, 0),
        depth=["s/image_depth/0.png"],
    )
    file = rooms.jsonl(tmp_path / "elsewhere" / "fill_1.jsonl", [row])
    e = load_one(f"spar:{file}@{tmp_path}/other")
    assert e.depths is None and e.intrinsics is None
    coarse = Image.fromarray(room.depths[0]).resize((160, 120), Image.Resampling.NEAREST)
    rooms.save(coarse, tmp_path / "other" / "s" / "image_depth" / "0.png")
    depth = load_one(f"spar:{file}@{tmp_path}/other").depths[0]
    assert depth.shape == rooms.SIZE[::-1] and np.asarray(depth).dtype == np.float32
    assert np.array_equal(np.asarray(depth)[::2, ::2], np.asarray(coarse).astype(np.float32) / 1000)
    with pytest.raises(FileNotFoundError, match="nowhere.*behind the @"):
        data.load([f"spar:{file}@nowhere"])


def test_a_camera_is_scaled_by_a_size_that_is_stated_and_else_left_out(tmp_path, three, capsys):
    """ScanNet states 1296 x 968. Of another size it is left out, as in other sets: no factor is
    guessed."""
    room, (a, *_) = three
    images, _ = rooms.spar_images(room, tmp_path)
    file = tmp_path / "spar/scannet/images" / rooms.SCENE / "intrinsic" / "intrinsic_color.txt"
    np.savetxt(file, rooms.matrix(room.cameras[0]) * np.array([[1296 / 320], [968 / 240], [1]]))
    row = rooms.spar_row(
        "depth_prediction_oc", images[:1], "(red point)?", "2", red_point=point(room, a, 0)
    )
    rooms.spar_file(tmp_path, "depth_prediction_oc", [row])
    (found,) = load_one(f"spar:{tmp_path}/spar").intrinsics
    assert np.allclose(found[:2], room.cameras[0].focal)
    assert np.allclose(found[2:], (159.5, 119.5))
    assert "cameras left out" not in capsys.readouterr().out
    np.savetxt(file, rooms.matrix(room.cameras[0]) * 2)
    data.rows.matrix.cache_clear()
    assert load_one(f"spar:{tmp_path}/spar").intrinsics is None
    assert (
        "1 cameras left out: written down for an image of another size" in capsys.readouterr().out
    )
    matrix = rooms.matrix(room.cameras[0])
    assert pinhole(matrix, rooms.SIZE, None) == (room.cameras[0].focal,) * 2 + (159.5, 119.5)
    with pytest.raises(Bad, match="not of an image"):
        pinhole(matrix * np.array([[4.05], [4.03], [1]]), rooms.SIZE, None)


def test_images_in_a_folder_named_by_a_relative_path(tmp_path, three, monkeypatch):
    """Also where the image's name has no folder: the scene's is then found from the working
    directory."""
    room, (a, *_) = three
    images, _ = rooms.spar_images(room, tmp_path)
    row = rooms.spar_row(
        "depth_prediction_oc", images[:1], "(red point)?", "2", red_point=point(room, a, 0)
    )
    file = rooms.jsonl(tmp_path / "fill_1.jsonl", [row])
    monkeypatch.chdir(tmp_path / "spar/scannet/images")
    there = load_one(f"spar:{file}@.")
    assert there == load_one(f"spar:{file}@{tmp_path / 'spar/scannet/images'}") and there.intrinsics
    rooms.jsonl(file, [row | {"image": ["7.jpg"]}])
    monkeypatch.chdir(tmp_path / "spar/scannet/images" / rooms.SCENE / "image_color")
    assert load_one(f"spar:{file}@.").intrinsics == there.intrinsics


BAD = {
    "pixels": ({"red_point": [[1296, 400]]}, "red_point", "outside 0..1000, so in pixels?"),
    "negative": ({"red_point": [[-1, 400]]}, "red_point", "outside 0..1000"),
    "nan": ({"red_point": [[5, float("nan")]]}, "red_point", "outside 0..1000"),
    "a point of four": ({"red_point": [[1, 2, 3, 4]]}, "red_point", "wrong type"),
    "an inverted box": ({"red_bbox": [[300, 300, 200, 400]]}, "red_bbox", "wrong type or value"),
    "text as point": ({"red_point": "1,2"}, "red_point", "wrong type"),
    "no images": ({"image": None}, "image", "missing"),
    "no such view": (
        {"image": ["I", "I"], "point_img_idx": [[7]]},
        "point_img_idx",
        "no such view: 7 of 2",
    ),
    "a missing image": ({"image": ["gone.jpg"]}, "image", "missing file: FOLDER/images/gone.jpg"),
    "three parts": (
        {"conversations": [{"from": "human", "value": "?"}] * 3},
        "conversations",
        "wrong order",
    ),
    "two questions": (
        {"conversations": [{"from": "human", "value": "?"}] * 2},
        "conversations",
        "wrong order",
    ),
    "two turns": (
        {"conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "2"}] * 2},
        "conversations",
        "wrong count: 2 turns",
    ),
    "no answer": (
        {"conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": ""}]},
        "conversations",
        "wrong type",
    ),
    "a video": ({"type": "room_size"}, "type", "a question about a video"),
    "too many depths": ({"depth": ["I", "I"]}, "depth", "wrong count"),
    "a depth of another shape": ({"depth": ["square.png"]}, "depth", "wrong shape"),
    "a depth in metres": ({"depth": ["metres.png"]}, "depths", "depth in metres, not millimetres?"),
    "a depth of 8 bits": ({"depth": ["grey.png"]}, "depths", "wrong mode: L"),
}


def test_every_bad_row_is_named(tmp_path, three):
    room, (a, *_) = three
    images = tmp_path / "scannet" / "images"
    rooms.save(room.images[0], images / "a.jpg")
    rooms.save(Image.fromarray(np.full((64, 64), 2000, np.uint16)), images / "square.png")
    rooms.save(
        Image.fromarray((room.depths[0] / 1000).round().astype(np.uint16)), images / "metres.png"
    )
    rooms.save(Image.new("L", rooms.SIZE), images / "grey.png")
    good = rooms.spar_row(
        "depth_prediction_oc", ["a.jpg"], "(red point)?", "2", red_point=point(room, a, 0)
    )
    name = {"I": "a.jpg"}
    rows = [good] + [
        {
            k: [name.get(f, f) for f in v] if k in ("image", "depth") and v else v
            for k, v in (good | change).items()
        }
        for change, *_ in BAD.values()
    ]
    file = (
        tmp_path
        / "scannet"
        / "qa_jsonl"
        / "train"
        / "depth_prediction_oc"
        / "fill"
        / "fill_1.jsonl"
    )
    rooms.jsonl(file, rows)
    with open(file, "a") as more:
        more.write("{torn\n[1]\n")
    with pytest.raises(data.BadRows) as error:
        data.load([f"spar:{file}"])
    found = error.value.rows
    assert [row for _, row, *_ in found] == list(range(2, len(BAD) + 4))
    assert {file for file, *_ in found} == {str(file)}
    for (_, _, field, reason), (kind, (_, wanted, start)) in zip(found, BAD.items(), strict=False):
        start = start.replace("FOLDER/images", str(images))
        assert field == wanted and reason.startswith(start), (kind, field, reason)
    last = [(field, reason[:10]) for *_, field, reason in found[-2:]]
    assert last == [("row", "unreadable"), ("row", "wrong type")]
    assert len(data.load([f"spar:{file}"], skip_bad_rows=True)) == 1


def test_a_bug_in_a_reader_keeps_its_traceback(tmp_path, three, monkeypatch):
    """A forker's typo is no fault of the data; a field that a row lacks is, and is named."""
    room, _ = three
    rooms.save(room.images[0], tmp_path / "a.png")

    def rows(path, root):
        yield from each(path, (".jsonl",), build)

    def build(file, number, row):
        row = typed(row, {"question": str, "answer": str}, {})

        def make(headers):
            image = str(tmp_path / "a.png")
            return [Example(str(number), "lor", [image], row["question"], row[column])]

        yield Row(str(file), number, str(number), make, (str(tmp_path / "a.png"),))

    monkeypatch.setitem(data.SOURCES, "mine", Source(rows))
    good = {"question": "How far?", "answer": "2 m"}
    file = rooms.jsonl(tmp_path / "rows.jsonl", [good])
    column = "answer"
    assert load_one(f"mine:{file}").answer == "2 m"
    column = "anwser"
    with pytest.raises(KeyError, match="anwser"):
        data.load([f"mine:{file}"])
    rooms.jsonl(file, [{"question": "How far?"}])
    with pytest.raises(data.BadRows, match="rows.jsonl:1: answer: missing"):
        data.load([f"mine:{file}"])
