"""SR-REAL's own rows and LLaVA's: every field arrives, on its object of a rendered room, or is
named."""

import json

import numpy as np
import pytest
import rooms
from PIL import Image

import data
from data.rows import Bad
from data.sets.regions import rle
from data.sets.spar_marks import COLOURS
from srreal import parse, prompt, target


@pytest.fixture(scope="module")
def two():
    return rooms.rich(2, 3)


def said(question, answer):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def pixels(room, thing, view):
    return [int(v) for v in room.box(thing, view) * (rooms.SIZE * 2) / 1000]


def units(room, thing, view):
    return [[int(v) for v in room.box(thing, view)]]


def pictures(room, folder):
    for view, (image, depth) in enumerate(zip(room.images, room.depths, strict=True)):
        rooms.save(image, folder / f"{view}.png")
        rooms.save(Image.fromarray(depth), folder / f"depth/{view}.png")


def one_view(found):
    """DTR, RL: the raw question, with <mask>s."""
    room, (a, b, *_) = found
    centre = {c: [float(v) for v in room.centre(k, 0)] for c, k in (("red", a), ("blue", b))}
    return {
        "id": 7,
        "image": "0.png",
        "depth": "depth/0.png",
        "image_hw": [rooms.SIZE[1], rooms.SIZE[0]],
        "type": "x_oo",
        "conversations": said(
            "<image>\nHow far is the a (red bbox <mask>) from b (blue bbox <mask>), red bbox?",
            "1.5",
        ),
        "bbox": [pixels(room, a, 0), pixels(room, b, 0)],
        "mask_idx": 2,
        "red_bbox": units(room, a, 0),
        "blue_bbox": units(room, b, 0),
        "3d_pos": {
            f"{c}_bbox": {"bbox_2d": [0, 0, 1, 1], "center_cam": xyz, "label": f"{c} thing"}
            for c, xyz in centre.items()
        },
    }


def two_views(found):
    """DTR with a rationale, in the frame of the second image; places of the <mask>s by mask_idx."""
    room, (a, b, *_) = found
    truth = {}
    for colour, thing, view in (("red", a, 1), ("blue", b, 0)):
        every = {
            str(v): {"bbox_2d": [0, 0, 1, 1], "center_cam": room.centre(thing, v).tolist()}
            for v in (0, 1)
        }
        truth[f"{colour}_bbox"] = {
            "current_frame": view,
            "all_frame_3d": every,
            "current_frame_3d": every[str(view)] | {"label": f"the {colour}"},
        }
    return {
        "id": "m",
        "image": ["0.png", "1.png"],
        "depth": ["depth/0.png", "depth/1.png"],
        "type": "distance_prediction_oo_mv",
        "cot": "It is far.",
        "conversations": said("From a (red bbox <mask>) to b (blue bbox <mask>)?", "2"),
        "bbox": {"0": [pixels(room, b, 0)], "1": [pixels(room, a, 1)]},
        "mask_idx": {"0": [1, 0], "1": [0, 0]},
        "red_bbox": units(room, a, 1),
        "blue_bbox": units(room, b, 0),
        "bbox_img_idx": [[1, 0]],
        "3d_pos": truth,
        "main_frame_idx": 1,
    }


def load(folder, rows, kind="srreal", name="rows.json", **options):
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / name).write_text(json.dumps(rows) if name.endswith(".json") else lines)
    return data.load([f"{kind}:{folder / name}"], **options)


def on(room, region, thing):
    view, (x0, y0, x1, y1) = region
    inside = room.owners[view][int(y0) : int(y1), int(x0) : int(x1)]
    return np.bincount(inside[inside >= 0]).argmax() == thing


def test_one_view_dtr(tmp_path, two):
    room, (a, b, *_) = two
    pictures(room, tmp_path)
    for name in ("rows.json", "rows.jsonl"):
        (e,) = load(tmp_path, [one_view(two)], name=name)
        assert (e.path, e.answer, e.rationale, e.frame) == ("dtr", "1.5", None, None)
        assert (e.task, e.id) == ("x_oo", f"{tmp_path.name}/rows/7#1")
        assert (
            e.question.startswith("How far is the a (red bbox <mask>)")
            and e.question.count("<mask>") == 2
        )
        assert on(room, e.regions[0], a) and on(room, e.regions[1], b)
        assert (
            np.allclose(e.objects["red bbox"], room.centre(a, 0))
            and e.names["blue bbox"] == "blue thing"
        )
        with Image.open(e.depths[0]) as depth:
            assert np.array_equal(np.asarray(depth), room.depths[0])
    drawn, plain = np.asarray(e.images[0].convert("RGB")), np.asarray(room.images[0])
    box = zip(one_view(two)["red_bbox"][0], rooms.SIZE * 2, strict=True)
    x0, y0, x1, y1 = (round(v * side / 1000) for v, side in box)
    assert (
        tuple(drawn[y0 + 2, (x0 + x1) // 2])
        == COLOURS["red"]
        != tuple(drawn[y0 + 8, (x0 + x1) // 2])
    )
    assert {tuple(c) for c in drawn[(drawn != plain).any(-1)]} == {COLOURS["red"], COLOURS["blue"]}


def test_several_views_with_a_rationale(tmp_path, two):
    room, (a, b, *_) = two
    pictures(room, tmp_path)
    (e,) = load(tmp_path, [two_views(two)])
    assert (
        e.frame == 1 and e.rationale == "It is far." and [view for view, _ in e.regions] == [1, 0]
    )
    assert on(room, e.regions[0], a) and on(room, e.regions[1], b)
    for mention, k in (("red bbox", a), ("blue bbox", b)):
        assert all(np.allclose(e.objects[mention][v], room.centre(k, v)) for v in (0, 1))
    text = target(e)
    assert text.startswith(
        "<detect>After aligning to the reference frame 1, find 2 relevant objects:"
    )
    assert "the red (red bbox)" in text
    red, blue = (
        (np.asarray(e.images[v].convert("RGB")) != np.asarray(room.images[v])).any(-1)
        for v in (1, 0)
    )
    assert {tuple(c) for c in np.asarray(e.images[1].convert("RGB"))[red]} == {
        COLOURS["red"]
    } and blue.any()


def test_without_a_rationale_only_the_question_sets_the_frame(tmp_path, two):
    pictures(two[0], tmp_path)
    row = {k: v for k, v in two_views(two).items() if k != "cot"}
    asked = row | {
        "conversations": said(
            "In the first image, from a (red bbox <mask>) to b (blue bbox <mask>)?", "2"
        )
    }
    free, first = load(tmp_path, [row, asked])
    assert free.frame is None and first.frame == 0


def test_what_our_target_writes_is_read_back(tmp_path, two):
    """The official SFT rows: template and tags baked in, centres only in the text."""
    pictures(two[0], tmp_path)
    (e,) = load(tmp_path, [one_view(two) | {"cot": "a is 1.5 m from b."}])
    baked = {k: v for k, v in one_view(two).items() if k != "3d_pos"}
    baked["conversations"] = said("<image>\n" + prompt(e), target(e))
    (again,) = load(tmp_path, [baked])
    assert again.question == e.question and again.rationale == e.rationale
    assert again.answer == e.answer and again.path == "dtr"
    assert target(again) == target(e) and again.names == e.names and again.regions == e.regions
    (lor,) = load(
        tmp_path,
        [
            baked
            | {
                "conversations": said(
                    baked["conversations"][0]["value"],
                    "<think>near</think>\n<answer>\nB\n</answer>",
                )
            }
        ],
    )
    assert (lor.path, lor.rationale, lor.answer, lor.objects) == ("lor", "near", "B", {})
    assert parse(target(lor), "lor").well_formed


def test_raw_rows_get_their_masks_from_the_marks(tmp_path, two):
    room, (a, b, *_) = two
    pictures(room, tmp_path)
    raw = {k: v for k, v in one_view(two).items() if k not in ("bbox", "mask_idx", "3d_pos")}
    raw["conversations"] = said("From (red bbox) to (blue bbox), (red bbox)?", "B")
    (e,) = load(tmp_path, [raw])
    assert (e.path, e.question) == (
        "lor",
        "From (red bbox <mask>) to (blue bbox <mask>), (red bbox <mask>)?",
    )
    assert [on(room, region, k) for region, k in zip(e.regions, (a, b, a), strict=True)] == [
        True
    ] * 3


def test_relative_depth_of_8_bits_is_left_out_and_said(tmp_path, two, capsys):
    pictures(two[0], tmp_path)
    rooms.save(Image.new("L", rooms.SIZE, 100), tmp_path / "grey.png")
    (e,) = load(tmp_path, [one_view(two) | {"depth": "grey.png"}])
    assert e.depths is None and "1 depth maps left out: 8 bits" in capsys.readouterr().out


def test_estimated_depth_stands_in_for_one_of_8_bits_or_none(tmp_path, two):
    """Image by image; a file that is named and nowhere is still named."""
    pictures(two[0], tmp_path)
    rooms.save(Image.new("L", rooms.SIZE, 100), tmp_path / "grey.png")
    rooms.save(Image.fromarray(two[0].depths[0]), tmp_path / "0.depth.png")
    for depth in ("grey.png", "gone.png"):
        (e,) = load(tmp_path, [one_view(two) | {"depth": depth}])
        assert e.depths == [str(tmp_path / "0.depth.png")]
        (e,) = load(tmp_path, [two_views(two) | {"depth": [depth, "depth/1.png"]}])
        assert e.depths == [str(tmp_path / "0.depth.png"), str(tmp_path / "depth/1.png")]
    with pytest.raises(data.BadRows, match="depths: missing file: .*gone.png"):
        load(tmp_path, [two_views(two) | {"depth": ["depth/0.png", "gone.png"]}])


def test_depth_made_beside_the_image_is_picked_up(tmp_path, two):
    pictures(two[0], tmp_path)
    rooms.save(Image.fromarray(two[0].depths[0]), tmp_path / "0.depth.png")
    (e,) = load(tmp_path, [{k: v for k, v in one_view(two).items() if k != "depth"}])
    assert e.depths == [str(tmp_path / "0.depth.png")]
    (e,) = load(tmp_path, [{"image": "0.png", "conversations": said("What?", "That.")}], "llava")
    assert e.depths == [str(tmp_path / "0.depth.png")]


def test_unpacked_webdatasets(tmp_path, two):
    """A file a sample, its image beside it under the same name."""
    pictures(two[0], tmp_path)
    for key in ("000001", "000002"):
        rooms.save(two[0].images[0], tmp_path / "set" / f"{key}.jpg")
        row = {k: v for k, v in one_view(two).items() if k not in ("image", "depth")}
        (tmp_path / "set" / f"{key}.json").write_text(json.dumps(row, indent=1))
    read = data.load([f"srreal:{tmp_path / 'set'}"])
    assert [e.images[0].source for e in read] == [
        str(tmp_path / f"set/00000{k}.jpg") for k in (1, 2)
    ]


BAD = {
    "another size": ({"image_hw": [1, 2]}, "image_hw", "wrong size"),
    "boxes in 1/1000": (
        {"bbox": [[900, 900, 990, 990], [1, 2, 300, 400]]},
        "bbox",
        "not in pixels, or of another object?",
    ),
    "boxes in fractions": (
        {"bbox": [[0.1, 0.1, 0.5, 0.5]] * 2, "red_bbox": None, "blue_bbox": None},
        "regions",
        "in fractions",
    ),
    "too few boxes": (
        {"bbox": [[1, 2, 30, 40]], "red_bbox": None},
        "regions",
        "<mask> count: 2 for 1",
    ),
    "a box outside": (
        {"bbox": [[1, 2, 30, 40], [1, 2, 3000, 40]], "red_bbox": None, "blue_bbox": None},
        "regions",
        "outside its image",
    ),
    "a torn answer": (
        {"conversations": said("a <mask>, b <mask>?", "<think>c</think><answer>B")},
        "conversations",
        "an answer with tags, but without <answer>",
    ),
    "marks in pixels": (
        {"red_bbox": [[10, 10, 1200, 900]]},
        "red_bbox",
        "outside 0..1000, so in pixels?",
    ),
    "a centre of two": ({"3d_pos": {"red_bbox": {"center_cam": [1, 2]}}}, "objects", "not finite"),
    "a centre in millimetres": (
        {"3d_pos": {"red_bbox": {"center_cam": [100, 200, 2500]}}},
        "objects",
        "farther than 1000 m",
    ),
    "no centre": ({"3d_pos": {"red_bbox": {}}}, "3d_pos", "wrong type or value: red_bbox"),
    "two lists for objects": (
        {"3d_pos": {"red_bbox": {"all_frame_3d": [1], "current_frame_3d": [2]}}},
        "3d_pos",
        "wrong type or value: red_bbox",
    ),
    "no image": ({"image": None}, "image", "missing"),
    "a missing image": ({"image": "gone.png"}, "image", "missing file"),
    "two turns": ({"conversations": said("a", "b") * 2}, "conversations", "wrong count: 2 turns"),
    "the model first": ({"conversations": said("a", "b")[::-1]}, "conversations", "wrong order"),
    "a conversation that is text": ({"conversations": "a"}, "conversations", "wrong type"),
    "a frame that is no number": (
        {
            "main_frame_idx": "x",
            "cot": "c",
            "image": ["0.png", "1.png"],
            "depth": None,
            "bbox": None,
            "red_bbox": None,
            "blue_bbox": None,
            "conversations": said("Where?", "B"),
        },
        "main_frame_idx",
        "wrong type or value: 'x'",
    ),
    "a mark of no known view": (
        {"image": ["0.png", "1.png"], "depth": None},
        "bbox_img_idx",
        "in which of 2 images is red_bbox?",
    ),
    "boxes of no known view": (
        {"image": ["0.png", "1.png"], "depth": None, "red_bbox": None, "blue_bbox": None},
        "bbox",
        "in which of 2 images?",
    ),
    "a place that is no number": ({"mask_idx": {"a": [0, 0]}}, "mask_idx", "wrong type or value"),
    "an empty list of images": ({"image": [], "depth": None}, "image", "no image"),
    "too many depths": ({"depth": ["depth/0.png"] * 2}, "depth", "wrong count"),
}


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_every_bad_row_is_named(tmp_path, two, name, capsys):
    pictures(two[0], tmp_path)
    rows = [one_view(two)] + [one_view(two) | change for change, *_ in BAD.values()]
    with pytest.raises(data.BadRows) as error:
        load(tmp_path, rows, name=name)
    found = {row: (field, reason) for _, row, field, reason in reversed(error.value.rows)}
    assert sorted(found) == list(range(2, len(BAD) + 2))
    assert {file for file, *_ in error.value.rows} == {str(tmp_path / name)}
    for number, (kind, (_, field, start)) in enumerate(BAD.items(), 2):
        assert found[number][0] == field and found[number][1].startswith(start), (
            kind,
            found[number],
        )
    assert len(load(tmp_path, rows, name=name, skip_bad_rows=True)) == 1
    assert f"skipped {len(BAD)} of {len(BAD) + 1} rows" in capsys.readouterr().out


def test_places_that_mask_idx_gives_have_to_exist(tmp_path, two):
    pictures(two[0], tmp_path)
    with pytest.raises(data.BadRows, match="mask_idx: no such region: \\[1, 3\\]"):
        load(tmp_path, [two_views(two) | {"mask_idx": {"0": [1, 3], "1": [0, 0]}}])


def test_a_mark_of_another_view_than_its_box_is_named(tmp_path, two):
    """As where no type tells whose views bbox_img_idx lists: the mark would be drawn into the wrong
    image."""
    pictures(two[0], tmp_path)
    same = units(two[0], two[1][0], 1)
    row = two_views(two) | {"bbox_img_idx": [[0, 1]], "red_bbox": same, "blue_bbox": same}
    row["bbox"] = dict.fromkeys("01", [pixels(two[0], two[1][0], 1)])
    with pytest.raises(data.BadRows, match="bbox: .*of another object.*in image 1,.*in image 0"):
        load(tmp_path, [row])


def test_a_row_s_own_frames_place_its_marks_where_no_task_does(tmp_path, two):
    """current_frame of 3d_pos; the order of the keys, and of bbox_img_idx, says nothing."""
    pictures(two[0], tmp_path)
    (known,) = load(tmp_path, [two_views(two)])
    (said_so,) = load(tmp_path, [two_views(two) | {"type": None, "bbox_img_idx": [[0, 1]]}])
    assert said_so.regions == known.regions and said_so.images == known.images


def test_equal_file_names_of_two_sets_are_told_apart(tmp_path, two):
    for name in ("one", "two"):
        pictures(two[0], tmp_path / name / "data")
        load(
            tmp_path / name / "data",
            [{"id": 1, "image": "0.png", "conversations": said("Hi", "Ho")}],
            "llava",
            "train.json",
        )
    read = data.load([f"llava:{tmp_path / name}/data/train.json" for name in ("one", "two")])
    assert [e.id for e in read] == ["one/data/train/1#1", "two/data/train/1#1"]


def test_a_torn_array_keeps_what_stands_before_the_tear(tmp_path, two, capsys):
    pictures(two[0], tmp_path)
    whole = json.dumps([one_view(two), one_view(two), one_view(two)])
    (tmp_path / "torn.json").write_text(whole[: len(whole) * 5 // 6])
    with pytest.raises(data.BadRows, match="torn.json:3: row: unreadable from here on"):
        data.load([f"srreal:{tmp_path / 'torn.json'}"])
    assert len(data.load([f"srreal:{tmp_path / 'torn.json'}"], skip_bad_rows=True)) == 2


# ---- kind llava


def test_turns_and_captions(tmp_path, two):
    pictures(two[0], tmp_path / "images")
    turns = said("<image>\nWhat is it?", "A room.") + said("Really?", "Yes.")
    rows = [
        {"id": "a", "image": "0.png", "conversations": turns},
        {"image": ["0.png", "1.png"], "conversations": said("<image> and <image>: equal?", "No.")},
    ]
    (tmp_path / "chat.json").write_text(json.dumps(rows))
    read = data.load([f"llava:{tmp_path / 'chat.json'}@{tmp_path / 'images'}"])
    assert [(e.id, e.path, e.question, e.answer) for e in read] == [
        (f"{tmp_path.name}/chat/a#1/0", "direct", "What is it?", "A room."),
        (f"{tmp_path.name}/chat/a#1/1", "direct", "Really?", "Yes."),
        (f"{tmp_path.name}/chat/#2", "direct", "<image> and <image>: equal?", "No."),
    ]
    assert read[0].images == [str(tmp_path / "images/0.png")] and len(read[2].images) == 2
    with pytest.raises(data.BadRows, match=f"missing file: {tmp_path}/0.png .kind:path@image_root"):
        # recognised; but its images aren't there
        data.load([tmp_path / "chat.json"])
    (tmp_path / "chat.json").write_text(
        json.dumps([{"conversations": said("<image>\nHi", "Hello")}])
    )
    with pytest.raises(data.BadRows, match="chat.json:1: image: missing"):
        data.load([tmp_path / "chat.json"])


def counts_of(mask):
    """COCO's run lengths of a mask, the plain way."""
    flat, runs, value = mask.T.ravel().tolist(), [0], False
    for v in flat:
        if v != value:
            runs.append(0)
            value = v
        runs[-1] += 1
    return runs


def packed(counts):
    """COCO's string of run lengths."""
    text = ""
    for i, x in enumerate(counts):
        x -= counts[i - 2] if i > 2 else 0
        more = True
        while more:
            bits, x = x & 31, x >> 5
            more = x != (-1 if bits & 16 else 0)
            text += chr((bits | (32 if more else 0)) + 48)
    return text


def test_run_lengths(two):
    # the example of COCO's own mask API
    assert packed([6, 1, 40, 4, 5, 4, 5, 4, 21]) == "61X13mN000`0"
    room, (a, *_) = two
    mask = room.owners[0] == a
    for counts in (counts_of(mask), packed(counts_of(mask))):
        assert np.array_equal(rle({"size": list(mask.shape), "counts": counts}, rooms.SIZE), mask)
    with pytest.raises(ValueError, match="wrong size or counts"):
        rle({"size": list(mask.shape[::-1]), "counts": counts}, rooms.SIZE)


@pytest.mark.parametrize(
    "counts",
    ["", [], None, "33", "335", "33k", "33é", "2O", [3, 3], [3, 3, 7], [-1, 13], "o" * 40 + "0"],
)
def test_torn_run_lengths_are_refused(counts):
    """Too short, too long, cut off within a number, below zero: pycocotools takes some of them."""
    assert rle({"size": [3, 4], "counts": "336"}, (4, 3)).sum() == 3
    with pytest.raises(Bad, match=r"wrong size or counts: \[3, 4\] for an image of 3 x 4"):
        rle({"size": [3, 4], "counts": counts}, (4, 3))


def test_masks_and_polygons_in_srreal_s_rows(tmp_path, two):
    room, (a, b, *_) = two
    pictures(room, tmp_path)
    masks = [room.owners[0] == k for k in (a, b)]
    codes = [{"size": list(mask.shape), "counts": packed(counts_of(mask))} for mask in masks]
    outlines = [[[10, 10, 50, 10, 50, 40, 10, 40]]] * 2
    row = one_view(two) | {"bbox": None}
    e, polygon = load(tmp_path, [row | {"rle": codes}, row | {"segmentation": outlines}])
    assert all(
        np.array_equal(found, mask) for (_, found), mask in zip(e.regions, masks, strict=True)
    )
    assert polygon.regions[1][1].sum() == 41 * 31 and e.path == "dtr"


def test_masks_and_polygons_as_regions(tmp_path, two):
    room, (a, *_) = two
    pictures(room, tmp_path)
    mask = room.owners[0] == a
    base = {"image": "0.png", "conversations": said("What is <mask>?", "It.")}
    rows = [
        base | {"rle": [{"size": list(mask.shape), "counts": packed(counts_of(mask))}]},
        base | {"segmentation": [[[10, 10, 50, 10, 50, 40, 10, 40]]]},
        base | {"bbox": [[1, 2, 30, 40]]},
    ]
    e, polygon, box = load(tmp_path, rows, "llava")
    assert np.array_equal(e.regions[0][1], mask) and box.regions == [(0, (1, 2, 30, 40))]
    assert polygon.regions[0][1].sum() == 41 * 31 and polygon.regions[0][1][10, 50]
    both = {"image": ["0.png", "1.png"], "conversations": said("<mask>, then <mask>?", "It.")}
    views = {"bbox": {"0": [[1, 2, 30, 40]], "1": [[5, 6, 70, 80]]}}
    placed, listed = load(
        tmp_path, [both | views | {"mask_idx": {"0": [1, 0], "1": [0, 0]}}, both | views], "llava"
    )
    assert placed.regions == [(1, (5, 6, 70, 80)), (0, (1, 2, 30, 40))] == listed.regions[::-1]
    for region in (
        {"bbox": [[1, 2, 30, 40]] * 2},
        {"segmentation": [[[10, 10, 50, 10, 50, 40]]] * 2},
    ):
        with pytest.raises(data.BadRows, match="1: (bbox|segmentation): in which of 2 images"):
            load(tmp_path, [both | region], "llava")
    with pytest.raises(data.BadRows, match="bbox: no such image: 2 of 2"):
        load(tmp_path, [both | {"bbox": {"2": [[1, 2, 30, 40]] * 2}}], "llava")
    with pytest.raises(data.BadRows, match="bbox: <mask> count: 1 for 2"):
        load(tmp_path, [base | {"bbox": [[1, 2, 30, 40]] * 2}], "llava")
