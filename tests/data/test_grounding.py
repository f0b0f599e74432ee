"""Omni3D, CA-1M and RefCOCO: a rendered room in each set's schema comes back with its centres and
boxes."""

import io
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import rooms
from PIL import Image

import data
from data.rooms.render import turn


@pytest.fixture(scope="module")
def one():
    return rooms.rich(1, 3)


def pixels(room, thing):
    return (room.box(thing, 0) * (rooms.SIZE * 2) / 1000).tolist()


def pose(room, thing):
    """(3, 3) object -> camera."""
    axes = turn(np.eye(3), room.things[thing].yaw)
    return room.cameras[0].axes @ axes


def omni3d(folder, found, annotations=None, **changes):
    room, things = found
    rooms.save(room.images[0], folder / "SUNRGBD" / "0.jpg")
    picture = {
        "id": 5,
        "dataset_id": 1,
        "width": rooms.SIZE[0],
        "height": rooms.SIZE[1],
        "file_path": "SUNRGBD/0.jpg",
        "K": rooms.matrix(room.cameras[0]).tolist(),
        "src_90_rotate": 0,
        "src_flagged": False,
    }
    listed = [annotation(room, k) for k in things] if annotations is None else annotations
    content = {
        "info": {"id": 1},
        "images": [picture | changes],
        "categories": [{"id": 1, "name": "x"}],
        "annotations": listed,
    }
    (folder / "SUNRGBD_train.json").write_text(json.dumps(content))
    return f"omni3d:{folder / 'SUNRGBD_train.json'}"


def annotation(room, k, **changes):
    t = room.things[k]
    return {
        "id": k,
        "image_id": 5,
        "category_id": 1,
        "category_name": t.name,
        "valid3D": True,
        "behind_camera": False,
        "bbox2D_tight": [-1, -1, -1, -1],
        "bbox2D_trunc": pixels(room, k),
        "bbox2D_proj": [-9, -9, 500, 500],
        "bbox3D_cam": np.zeros((8, 3)).tolist(),
        "center_cam": room.centre(k, 0).tolist(),
        "R_cam": pose(room, k).tolist(),
        # w, h, l: along the object's z, y, x
        "dimensions": (2 * t.half[[2, 1, 0]]).tolist(),
        "visibility": 1.0,
        "truncation": 0.0,
        "lidar_pts": -1,
        "segmentation_pts": 99,
        "depth_error": 0.01,
    } | changes


def check_grounding(found, examples):
    """Each object's centre and box, and several centres: number for number, region on the
    object."""
    room, things = found
    by_task = {
        task: [e for e in examples if e.task == task]
        for task in ("ground center", "ground box", "ground centers")
    }
    assert [len(rows) for rows in by_task.values()] == [len(things), len(things), 1]
    for task, rows in by_task.items():
        for e, own in zip(
            rows, [[k] for k in things] if task != "ground centers" else [None], strict=True
        ):
            own = own or [
                min(things, key=lambda k: np.linalg.norm(room.centre(k, 0) - e.objects[m]))
                for m in e.objects
            ]
            lines = e.answer.split("\n")
            assert len(lines) == len(own) == e.question.count("<mask>") and e.path == "direct"
            for line, mention, (_, (x0, y0, x1, y1)), k in zip(
                lines, e.objects, e.regions, own, strict=True
            ):
                xyz = ",".join(str(round(float(v), 2) + 0.0) for v in room.centre(k, 0))
                size = 2 * room.things[k].half[[2, 1, 0]]
                measures = ",".join(str(round(float(v), 2)) for v in size)
                measures = f' size="{measures}"' if task == "ground box" else ""
                name = room.things[k].name + (f" ({mention})" if task == "ground centers" else "")
                assert line == f'<3d_box center="{xyz}"{measures}>{name}</3d_box>'
                assert np.allclose(e.objects[mention], room.centre(k, 0))
                assert np.allclose(e.sizes[mention], size)
                inside = room.owners[0][int(y0) : int(y1), int(x0) : int(x1)]
                assert np.bincount(inside[inside >= 0]).argmax() == k
            middle = (rooms.SIZE[0] - 1) / 2, (rooms.SIZE[1] - 1) / 2
            assert e.intrinsics == [(room.cameras[0].focal,) * 2 + middle]


def test_omni3d(tmp_path, one):
    source = omni3d(tmp_path, one)
    examples = data.load([source])
    check_grounding((one[0], one[1]), examples)
    assert data.load([source.partition(":")[2]]) == examples  # recognised
    assert data.load([f"{source}@{tmp_path}"]) == examples
    assert len({e.id for e in examples}) == len(examples)


def test_omni3d_of_a_folder_leaves_val_and_test_out(tmp_path, one, capsys):
    """The released zip has all splits in one folder; benchmarks ask about images of val and
    test."""
    file = omni3d(tmp_path / "zip", one).partition(":")[2]
    for split in ("val", "test"):
        (tmp_path / "zip" / f"SUNRGBD_{split}.json").write_bytes(
            (tmp_path / "zip" / file).read_bytes()
        )
    read = data.load([f"omni3d:{tmp_path / 'zip'}"])
    assert read == data.load([file]) and all("_train/" in e.id for e in read)
    assert (
        "2 left out: of val and test splits, which the path does not name"
        in capsys.readouterr().out
    )
    named = data.load([f"omni3d:{tmp_path / 'zip' / 'SUNRGBD_val.json'}"])
    assert len(named) == len(read) and "left out" not in capsys.readouterr().out
    (tmp_path / "zip" / "SUNRGBD_train.json").unlink()
    with pytest.raises(FileNotFoundError, match="val and test splits alone"):
        data.load([f"omni3d:{tmp_path / 'zip'}"])


IGNORED = [
    {"behind_camera": True},
    {"valid3D": False},
    {"dimensions": [1, 0, 1]},
    {"lidar_pts": 0},
    {"segmentation_pts": 0},
    {"depth_error": 0.6},
    {"truncation": 0.4},
    {"visibility": 0.3},
    {"bbox2D_trunc": [5, 5, 50, 8]},
    {"image_id": 6},
    {"center_cam": [0, 0, -1]},
]


def test_omni3d_leaves_out_what_the_set_ignores(tmp_path, one, capsys):
    room, (a, *_) = one
    listed = [annotation(room, a), *(annotation(room, a, **change) for change in IGNORED)]
    assert len(data.load([omni3d(tmp_path, one, listed)])) == 2
    said = capsys.readouterr().out
    assert "10 objects left out: by the rules of the set's own evaluation" in said
    assert "1 objects left out: of images that are left out or missing" in said
    with pytest.raises(data.BadRows, match="SUNRGBD_train.json:0: images: missing, or all flagged"):
        data.load([omni3d(tmp_path, one, listed, src_flagged=True)])


def test_omni3d_s_turned_images_are_used(tmp_path, one):
    """The set's makers turned them, with their cameras and boxes; nothing is left to turn."""
    examples = data.load([omni3d(tmp_path, one)])
    assert data.load([omni3d(tmp_path, one, src_90_rotate=1)]) == examples


def test_omni3d_takes_the_tight_box_and_clips_the_projected_one(tmp_path, one):
    room, (a, *_) = one
    tight, none = [20, 20, 90, 90], [-1, -1, -1, -1]
    listed = [
        annotation(room, a, bbox2D_tight=tight),
        annotation(room, a, bbox2D_trunc=none, bbox2D_proj=[-9, 7, 500, 200]),
    ]
    found = [
        e.regions[0][1]
        for e in data.load([omni3d(tmp_path, one, listed)])
        if e.task == "ground center"
    ]
    assert found == [tuple(tight), (0, 7, rooms.SIZE[0], 200)]


def test_omni3d_names_what_it_cannot_use(tmp_path, one):
    room, (a, *_) = one
    listed = [
        annotation(room, a),
        annotation(room, a, center_cam=[1, 2]),
        annotation(room, a, category_name=None),
    ]
    with pytest.raises(data.BadRows) as error:
        data.load([omni3d(tmp_path, one, listed)])
    assert [(row, field) for _, row, field, _ in error.value.rows] == [
        (2, "annotations: center_cam"),
        (3, "annotations: category_name"),
    ]
    with pytest.raises(data.BadRows, match="annotations: row: wrong type.*no JSON object"):
        data.load([omni3d(tmp_path, one, [annotation(room, a), [1]])])
    with pytest.raises(data.BadRows, match=f"missing file: {tmp_path}/gone.jpg"):
        data.load([omni3d(tmp_path, one, file_path="gone.jpg")])
    with pytest.raises(
        data.BadRows, match=r"1: image: wrong size: the file has \(320, 240\), the set says"
    ):
        data.load([omni3d(tmp_path, one, width=640, height=480)])
    with pytest.raises(data.BadRows, match="1: images: K: missing"):
        data.load([omni3d(tmp_path, one, K=None)])
    with pytest.raises(data.BadRows, match="farther than 1000 m, so in millimetres"):
        data.load([omni3d(tmp_path, one, [annotation(room, a, center_cam=[100, 200, 3000])])])
    (tmp_path / "SUNRGBD_train.json").write_text('{"images": [{"id": 5')
    with pytest.raises(data.BadRows, match="SUNRGBD_train.json:0: row: unreadable"):
        data.load([f"omni3d:{tmp_path / 'SUNRGBD_train.json'}"])


def ca1m(folder, found, depth=True):
    room, things = found
    frame = folder / "42" / "123456.wide"
    rooms.save(room.images[0], frame / "image.png")
    (frame / "image").mkdir(exist_ok=True)
    (frame / "image" / "K.json").write_text(json.dumps(rooms.matrix(room.cameras[0]).tolist()))
    if depth:
        coarse = Image.fromarray(room.depths[0]).resize((160, 120), Image.Resampling.NEAREST)
        rooms.save(coarse, folder / "42" / "123456.gt" / "depth.png")
    stated = folder / "42" / "123456._wide" / "image" / "size"
    stated.parent.mkdir(parents=True, exist_ok=True)
    stated.write_text(json.dumps(rooms.SIZE))
    listed = [
        {
            "id": f"{k}",
            "category": room.things[k].name,
            "position": room.centre(k, 0).tolist(),
            "scale": (2 * room.things[k].half).tolist(),
            "R": pose(room, k).tolist(),
            "corners": [],
            "box_2d_rend": pixels(room, k),
            "box_2d_proj": [0, 0, 9, 9],
        }
        for k in things
    ]
    (frame / "instances.json").write_text(json.dumps(listed))
    (folder / "42" / "world.gt").mkdir(exist_ok=True)
    (folder / "42" / "world.gt" / "instances.json").write_text("[]")
    return frame


def test_ca1m(tmp_path, one):
    frame = ca1m(tmp_path, one)
    examples = data.load([tmp_path])  # recognised
    # as webdataset writes it
    (frame / "image" / "K.json").rename(frame / "image" / "k.json")
    assert [e.answer for e in data.load([tmp_path])] == [e.answer for e in examples]
    check_grounding(one, examples)
    depth = np.asarray(examples[0].depths[0])
    assert depth.shape == rooms.SIZE[::-1]
    assert np.allclose(depth[::2, ::2] * 1000, one[0].depths[0][1::2, 1::2], atol=0.01)


def test_ca1m_of_a_folder_leaves_val_captures_out(tmp_path, one, capsys):
    ca1m(tmp_path / "ca1m-train-42", one)
    ca1m(tmp_path / "ca1m-val-43", one)
    read = data.load([f"ca1m:{tmp_path}"])
    assert {e.images[0] for e in read} == {str(tmp_path / "ca1m-train-42/42/123456.wide/image.png")}
    assert "1 left out: of val and test splits" in capsys.readouterr().out
    assert len(data.load([f"ca1m:{tmp_path / 'ca1m-val-43'}"])) == len(read)


def test_ca1m_reports_a_box_outside_its_image(tmp_path, one):
    """Up to 2 pixels are rounding, and cut off."""
    frame = ca1m(tmp_path, one)
    whole, listed = data.load([tmp_path]), json.loads((frame / "instances.json").read_text())
    for over in (2, 3):
        listed[1]["box_2d_rend"] = [5, 6, rooms.SIZE[0] + over, 90]
        (frame / "instances.json").write_text(json.dumps(listed))
        if over == 2:
            read = data.load([tmp_path])
            assert len(read) == len(whole) and (0, (5, 6, rooms.SIZE[0], 90)) in read[2].regions
    with pytest.raises(
        data.BadRows, match=r"s.json:2: box_2d: outside its image: \[5, 6, 323, 90\], of"
    ):
        data.load([tmp_path])


def test_ca1m_without_depth_takes_an_estimated_one(tmp_path, one):
    frame = ca1m(tmp_path, one, depth=False)
    assert data.load([f"ca1m:{tmp_path}"])[0].depths is None
    rooms.save(Image.fromarray(one[0].depths[0]), frame / "image.depth.png")
    assert data.load([f"ca1m:{tmp_path}"])[0].depths == [str(frame / "image.depth.png")]


def test_ca1m_names_what_it_cannot_use(tmp_path, one):
    frame = ca1m(tmp_path, one, depth=False)
    listed = json.loads((frame / "instances.json").read_text())
    for text, match in (
        ("{", "row: unreadable"),
        ("[1]", "row: wrong type"),
        (json.dumps([{**listed[0], "scale": [1, 2]}]), "scale: wrong type"),
    ):
        (frame / "instances.json").write_text(text)
        with pytest.raises(data.BadRows, match=f"123456.wide/instances.json:1: {match}"):
            data.load([f"ca1m:{tmp_path}"])
    (frame / "instances.json").write_text(json.dumps(listed))
    stated = tmp_path / "42" / "123456._wide" / "image" / "size"
    stated.unlink()
    with pytest.raises(
        data.BadRows, match=r"1: image: wrong size: .*320, 240\), the set says \(1024, 768\)"
    ):
        data.load([f"ca1m:{tmp_path}"])
    stated.write_text("[1")
    with pytest.raises(data.BadRows, match="1: row: unreadable"):
        data.load([f"ca1m:{tmp_path}"])
    (frame / "image" / "K.json").unlink()
    with pytest.raises(data.BadRows, match="row: unreadable.*K.json"):
        data.load([f"ca1m:{tmp_path}"])
    with pytest.raises(FileNotFoundError, match="unpack"):
        data.load([f"ca1m:{frame / 'image'}"])


def reference(found, **changes):
    room, (a, *_) = found
    x0, y0, x1, y1 = pixels(room, a)
    return {
        "question_id": "9",
        "question": "...",
        "answer": ["the chair", "it"],
        "bbox": [x0, y0, x1 - x0, y1 - y0],
        "iscrowd": 0,
        "file_name": "COCO_0.jpg",
    } | changes


def test_refcoco_rows_and_parquet(tmp_path, one, capsys):
    room, (a, *_) = one
    rooms.save(room.images[0], tmp_path / "train2014" / "COCO_0.jpg")
    file = rooms.jsonl(tmp_path / "refcoco.jsonl", [reference(one)])
    # recognised by its fields
    first, second = data.load([f"{file}@{tmp_path / 'train2014'}"])
    assert first.question == "Locate the chair and give its 2D box."
    assert second.question == "Locate it and give its 2D box."
    wanted = ",".join(f"{v:.2f}" for v in pixels(room, a))
    assert first.answer == second.answer == f"<2d_box>{wanted}</2d_box>"
    assert first.path == "direct" and not first.regions
    # as data.depth writes it
    estimated = tmp_path / "train2014" / "COCO_0.depth.png"
    rooms.save(Image.fromarray(room.depths[0]), estimated)
    assert data.load([f"{file}@{tmp_path / 'train2014'}"])[0].depths == [str(estimated)]
    held = io.BytesIO()
    room.images[0].save(held, "PNG")
    image = {"bytes": held.getvalue(), "path": "COCO_0.jpg"}
    file = parquet(tmp_path / "data", [reference(one, image=image)])
    capsys.readouterr()
    third, _ = data.load([tmp_path / "data"])
    assert "read of val.parquet: others evaluate on this split" in capsys.readouterr().out
    assert third.answer == first.answer and third.images[0].size == rooms.SIZE
    assert np.array_equal(np.asarray(third.images[0].convert("RGB")), np.asarray(room.images[0]))
    parquet(
        tmp_path / "data",
        [
            reference(one, image=image | {"bytes": b"no image"}),
            reference(one, image={"bytes": None, "path": None}, file_name=None),
        ],
    )
    with pytest.raises(data.BadRows) as error:
        data.load([tmp_path / "data"])
    assert {(row, field, why[:12]) for _, row, field, why in error.value.rows} == {
        (1, "image", "corrupt file"),
        (2, "image", "missing"),
    }
    file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(data.BadRows, match="val.parquet:0: row: unreadable"):
        data.load([tmp_path / "data"])


def parquet(folder, rows):
    folder.mkdir(exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "val.parquet")
    return folder / "val.parquet"


BAD = {
    "fractions": ({"bbox": [0.1, 0.1, 0.5, 0.5]}, "bbox", "in fractions"),
    "outside": ({"bbox": [10, 10, 400, 20]}, "bbox", "outside"),
    "no extent": ({"bbox": [10, 10, 0, 20]}, "bbox", "empty"),
    "nan": ({"bbox": [float("nan"), 1, 2, 3]}, "bbox", "empty"),
    "no image": ({"file_name": None}, "image", "missing"),
    "gone": ({"file_name": "x.jpg"}, "image", "missing file"),
    "no expression": ({"answer": None}, "answer", "missing"),
    "three numbers": ({"bbox": [1, 2, 3]}, "bbox", "wrong type"),
}


def test_refcoco_names_what_it_cannot_use(tmp_path, one):
    rooms.save(one[0].images[0], tmp_path / "COCO_0.jpg")
    bad = [reference(one, **change) for change, *_ in BAD.values()]
    file = rooms.jsonl(tmp_path / "r.jsonl", [reference(one), *bad])
    with pytest.raises(data.BadRows) as error:
        data.load([f"refcoco:{file}"])
    found = {number: (field, reason) for _, number, field, reason in error.value.rows}
    for number, (kind, (_, field, start)) in enumerate(BAD.items(), 2):
        assert found[number][0] == field and found[number][1].startswith(start), (
            kind,
            found.get(number),
        )
