"""DTR truth for SPAR by EmbodiedScan's boxes, against rendered rooms and boxes projected in closed
form."""

import math
import os
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import rooms
from PIL import Image
from published import embodiedscan as write
from published import instance, scan

import data
from data.rows import Notes
from data.sets.embodiedscan import Restricted, Scenes, fits, points_of, project, rotation, visible
from data.sets.spar_marks import Mark


@pytest.fixture(scope="module")
def two():
    return rooms.rich(2, 4)


def spar(folder, found, views=1, depth=True, **fields):
    """A set of one row about the room's first good things: a red box in the last view, a blue point
    in the first."""
    room, (a, b, *_) = found
    images, depths = rooms.spar_images(room, folder, scan())
    task = "distance_prediction_oo_mv" if views > 1 else "distance_prediction_oo"
    row = rooms.spar_row(
        task,
        images[:views],
        "How far is it from a (red bbox) to b (blue point)?",
        "2",
        red_bbox=[[round(float(v)) for v in room.box(a, views - 1)]],
        blue_point=[[round(float(v)) for v in room.pixel(b, 0) / rooms.SIZE * 1000]],
        **({"depth": list(depths[:views])} if depth else {}),
    )
    if views > 1:
        row |= {"bbox_img_idx": [[1, 1]], "point_img_idx": [[0, 0]]}
    rooms.spar_file(folder, task, [row | fields])
    return f"spar:{folder}/spar"


def test_one_view(tmp_path, two, capsys):
    room, (a, b, *_) = two
    write(tmp_path / "embodiedscan_infos_train.pkl", room)
    lor, dtr = data.load([spar(tmp_path, two)])
    assert (lor.id, lor.path, dtr.path) == (dtr.id, "lor", "dtr")
    assert lor.objects == dtr.objects and dtr.regions == lor.regions
    assert list(dtr.objects) == ["red bbox", "blue point"] and dtr.frame is None
    for mention, thing in zip(dtr.objects, (a, b), strict=True):
        assert np.allclose(dtr.objects[mention], room.centre(thing, 0), atol=1e-6)
        assert dtr.names[mention] == f"{room.things[thing].name} {thing}"
        assert np.allclose(dtr.sizes[mention], 2 * room.things[thing].half)
    assert "1 rows with DTR truth" in capsys.readouterr().out


def test_several_views(tmp_path, two):
    room, (a, b, *_) = two
    write(tmp_path / "embodiedscan_infos_train.pkl", room)
    lor, dtr = data.load([spar(tmp_path, two, views=2)])
    for mention, thing in (("red bbox", a), ("blue point", b)):
        assert sorted(dtr.objects[mention]) == [0, 1]
        for view, xyz in dtr.objects[mention].items():
            assert np.allclose(xyz, room.centre(thing, view), atol=1e-6)
    assert [view for view, _ in dtr.regions] == [1, 0]


def test_why_there_is_no_truth(tmp_path, two, capsys):
    room, (a, b, *_) = two
    file = tmp_path / "embodiedscan_infos_train.pkl"
    everything = [instance(thing, k) for k, thing in enumerate(room.things)]
    # a wall half a metre away
    hidden = np.minimum(room.depths[0], 500)
    pose = Path("spar/scannet/images") / rooms.SCENE / "pose" / "0.txt"
    cases = {
        "with no candidate for a mark": lambda: write(
            file, room, [e for k, e in enumerate(everything) if k != a]
        ),
        "with several candidates for a mark": lambda: write(
            file, room, [*everything, everything[a]]
        ),
        "without their scene in EmbodiedScan": lambda: write(
            file, room, sample_idx="scannet/scene0999_00"
        ),
        "with a hidden object": lambda: (
            write(file, room),
            Image.fromarray(hidden).save(
                tmp_path / "spar/scannet/images" / rooms.SCENE / "image_depth" / "0.png"
            ),
        ),
        "without poses": lambda: (
            write(file, room),
            (tmp_path / pose).write_text("-inf " * 4 + "\n"),
        ),
    }
    for reason, change in cases.items():
        source = spar(tmp_path, two)
        change()
        data.rows.matrix.cache_clear()
        assert [e.path for e in data.load([source])] == ["lor"], reason
        assert f"1 rows {reason}" in capsys.readouterr().out
    data.rows.matrix.cache_clear()
    write(file, room)
    Image.fromarray(hidden).save(
        tmp_path / "spar/scannet/images" / rooms.SCENE / "image_depth" / "0.png"
    )
    # nothing to check against: said
    source = spar(tmp_path / "blind", two, depth=False)
    write(tmp_path / "blind" / file.name, room)
    assert (
        len(data.load([source])) == 2 and "1 of them without a depth map" in capsys.readouterr().out
    )
    image = tmp_path / "blind/spar/scannet/images" / rooms.SCENE / "image_color/0.jpg"
    # nor is an estimated map a check
    Image.fromarray(hidden).save(image.with_suffix(".depth.png"))
    estimated = data.load([source])
    assert len(estimated) == 2 and estimated[1].depths == [str(image.with_suffix(".depth.png"))]
    assert "1 of them without a depth map" in capsys.readouterr().out


def test_the_check_of_depth_can_be_switched_off(tmp_path, two, capsys):
    write(tmp_path / "embodiedscan_infos_train.pkl", two[0])
    source = spar(tmp_path, two)
    depth = tmp_path / "spar/scannet/images" / rooms.SCENE / "image_depth" / "0.png"
    # a wall half a metre away
    Image.fromarray(np.minimum(two[0].depths[0], 500)).save(depth)
    assert [e.path for e in data.load([source])] == ["lor"]
    assert [e.path for e in data.load([f"{source},occlusion=off"])] == ["lor", "dtr"]
    assert "to check" not in capsys.readouterr().out
    # a bad row keeps its reason
    with open(next(tmp_path.rglob("fill_1.jsonl")), "a") as more:
        more.write("{torn\n")
    with pytest.raises(data.BadRows, match="2: row: unreadable"):
        data.load([f"{source},occlusion=off"])


def test_a_corrupt_depth_map_is_named(tmp_path, two):
    write(tmp_path / "embodiedscan_infos_train.pkl", two[0])
    source = spar(tmp_path, two)
    depth = tmp_path / "spar/scannet/images" / rooms.SCENE / "image_depth" / "0.png"
    depth.write_bytes(depth.read_bytes()[:500])
    with pytest.raises(data.BadRows, match=f"1: depths: corrupt file: {depth}"):
        data.load([source])


def test_a_file_is_unpickled_once_for_all_sources_until_it_changes(tmp_path, two, monkeypatch):
    room, _ = two
    file, loads = tmp_path / "embodiedscan_infos_train.pkl", []
    write(file, room)
    source = spar(tmp_path, two)
    monkeypatch.setattr(
        Restricted, "load", lambda self: loads.append(1) or pickle.Unpickler.load(self)
    )
    first, again = data.load([source]), data.load([f"{source},seed=1"])
    assert first == again and len(first) == 2 and len(loads) == 1
    write(file, room, sample_idx="scannet/scene0999_00")
    os.utime(file, (1, 1))
    assert [e.path for e in data.load([source])] == ["lor"] and len(loads) == 2


def test_a_camera_of_another_size_gives_no_truth(tmp_path, two, capsys):
    """Scaled by what ScanNet states, 1296 x 968; anything else is left alone, and said."""
    room, source, four = two[0], spar(tmp_path, two), np.eye(4)
    scales = ((1296 / 320, 968 / 240, 2), (2, 2, 1))
    for x, y, count in scales:
        four[:3, :3] = rooms.matrix(room.cameras[0]) * np.array([[x], [y], [1]])
        write(tmp_path / "embodiedscan_infos_train.pkl", room, cam2img=four)
        assert len(data.load([source])) == count
    assert (
        "1 rows with images of another size than EmbodiedScan's camera" in capsys.readouterr().out
    )


def test_an_object_has_to_be_in_every_view(tmp_path, two):
    room, (a, b, *_) = two
    write(tmp_path / "embodiedscan_infos_train.pkl", room)
    source = spar(tmp_path, two, views=2)
    away = rooms.camera_to_world(room.cameras[0]) @ np.diag([-1.0, 1, -1, 1])  # turned around
    folder = tmp_path / "spar/scannet/images" / rooms.SCENE / "pose"
    np.savetxt(folder / "7.txt", scan() @ away)
    assert [e.path for e in data.load([source])] == ["lor"]


def quad(x, y, w, h):
    return np.array([[x, y, x + w, y + h]], float)


@pytest.mark.parametrize(
    "wide, several, good",
    [(75, False, True), (73.9, False, False), (71, True, True), (69, True, False)],
)
def test_iou_thresholds_in_closed_form(wide, several, good):
    # IoU of a part is its share
    mark = Mark("red", "bbox", 0, (100, 100, 200, 200))
    assert len(fits(mark, quad(100, 100, wide, 100), several)) == good


def test_points_are_near_within_40():
    mark = Mark("red", "point", 0, (500, 500))
    found = np.concatenate(
        [
            quad(500 + dx - 10, 500 + dy - 10, 20, 20)
            for dx, dy in ((39, 0), (24, 31), (24, 32), (0, 40))
        ]
    )
    assert fits(mark, found, False).tolist() == [0, 1]
    assert len(fits(mark, np.full((2, 4), np.nan), False)) == 0


def test_a_box_straight_ahead_projects_as_the_formula_says():
    boxes = np.array(
        [
            [0.5, -0.2, 4, 1.0, 0.6, 2.0, 0, 0, 0],
            [0, 0, -4, 1, 1, 1, 0, 0, 0],
            [40, 0, 4, 1, 1, 1, 0, 0, 0],
        ]
    )
    centres, found, reach = project(points_of(boxes), np.eye(4), (100, 100, 50, 50), (200, 100))
    # the face that looks largest
    near = 3.0
    wanted = [
        50 + 100 * 0 / near,
        50 + 100 * -0.5 / near,
        50 + 100 * 1.0 / near,
        50 + 100 * 0.1 / near,
    ]
    assert np.allclose(found[0], np.trunc(np.array(wanted) / (200, 100, 200, 100) * 1000))
    assert (
        np.isnan(found[1:]).all()
        and centres[0].tolist() == [0.5, -0.2, 4]
        and reach[0].tolist() == [3, 5]
    )
    around = points_of(boxes[:1] * [1, 1, 0, 1, 1, 1, 1, 1, 1])
    assert np.allclose(project(around, np.eye(4), (100, 100, 50, 50), (200, 100))[2], [-1, 1])


def test_angles_are_zxy():
    def about(axis, angle):  # Rodrigues' formula
        k = np.cross(np.eye(3), np.eye(3)[axis])
        return np.eye(3) + math.sin(angle) * k + (1 - math.cos(angle)) * k @ k

    a, b, c = 0.3, -0.7, 1.1
    assert np.allclose(rotation(np.array([[a, b, c]]))[0], about(2, a) @ about(0, b) @ about(1, c))
    assert np.allclose(rotation(np.array([[math.pi / 2, 0, 0]]))[0] @ [1, 0, 0], [0, 1, 0])


def test_visible_counts_known_depth_only(tmp_path):
    depth = np.zeros((100, 100), np.uint16)
    depth[:, :50], depth[:, 50:60] = 1000, 3000
    Image.fromarray(depth).save(tmp_path / "d.png")
    assert not visible(tmp_path / "d.png", (0, 0, 600, 1000), 2.5, 3.5)  # a sixth
    assert visible(tmp_path / "d.png", (200, 0, 600, 1000), 2.5, 3.5)  # a quarter
    assert not visible(tmp_path / "d.png", (700, 0, 1000, 1000), 2.5, 3.5)  # nothing known


class Evil:
    def __init__(self, call, *args):
        self.call, self.args = call, args

    def __reduce__(self):
        return self.call, self.args


@pytest.mark.parametrize(
    "call, args",
    [
        (os.system, ("true",)),
        (eval, ("1",)),
        (getattr, ("a", "upper")),
        (np.load, ("x",)),
        (open, ("x",)),
        (Counter, ()),
    ],
)
def test_pickles_are_data(tmp_path, two, call, args):
    file = tmp_path / "embodiedscan_infos_train.pkl"
    for protocol in (2, 4):
        file.write_bytes(pickle.dumps({"metainfo": Evil(call, *args)}, protocol=protocol))
        with pytest.raises(ValueError, match="only builtins and numpy arrays"):
            Scenes([file], Notes())


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_arrays_of_every_protocol_are_read(tmp_path, protocol):
    content = {
        "a": np.arange(6.0).reshape(2, 3),
        "b": np.float32(2),
        "c": [1, (2, "x"), {3}, b"\x00\xff"],
        "d": np.array([1, 2]),
    }
    with open(tmp_path / "x.pkl", "wb") as file:
        pickle.dump(content, file, protocol=protocol)
    with open(tmp_path / "x.pkl", "rb") as file:
        found = Restricted(file).load()
    assert (
        np.array_equal(found["a"], content["a"]) and found["b"] == 2 and found["c"] == content["c"]
    )


@pytest.mark.parametrize(
    "content",
    [b"", b"not a pickle", pickle.dumps([1]), pickle.dumps({"metainfo": {"categories": {}}})],
)
def test_what_is_not_embodiedscan_is_named(tmp_path, two, content):
    (tmp_path / "embodiedscan_infos_train.pkl").write_bytes(content)
    with pytest.raises(
        ValueError, match="embodiedscan_infos_train.pkl: not EmbodiedScan's annotations"
    ):
        data.load([spar(tmp_path, two)])
