"""Cameras and centres that can't belong to their image are named, with both numbers and a cause.

The oracle is a rendered room: its own rows all pass, and each mistake that people make with
cameras and frames is told by its name.
"""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import data
from data import geometry, scenes
from data.checks import check
from data.headers import measure
from pictures import read_metres
from srreal import Example

SIZE = (640, 480)
CAMERA = (577.0, 577.0, 319.5, 239.5)
CENTRE = (1.0, 0.5, 2.5)  # seen at (550.3, 354.9)
BOX = (500.0, 310.0, 600.0, 400.0)


def example(**changes) -> Example:
    fields = {
        "images": [Image.new("RGB", SIZE)],
        "question": "How far is the box (red bbox <mask>)?",
        "intrinsics": [CAMERA],
        "regions": [(0, BOX)],
        "objects": {"red bbox": CENTRE},
        "sizes": {"red bbox": (0.5, 0.4, 0.3)},
    }
    return Example("a", "dtr", answer="2", **(fields | changes))


def problems(**changes) -> list[tuple[str, str]]:
    return check(example(**changes), {})


def depth(metres: float) -> np.ndarray:
    return np.full(SIZE[::-1], metres, np.float32)


SOUND = {
    "as it is": {},
    "without a size": {"sizes": None},
    "without a camera": {"intrinsics": None},
    "without regions": {"question": "How far is the red bbox?", "regions": []},
    # A table whose corner is in the image: its centre is seen beside it.
    "cut off": {
        "regions": [(0, (600.0, 310.0, 640.0, 400.0))],
        "objects": {"red bbox": (2.2, 0.5, 2.5)},
        "sizes": {"red bbox": (2.0, 0.8, 1.2)},
    },
    "behind its surface": {
        "depths": [depth(1.2)],
        "objects": {"red bbox": (1.0, 0.5, 2.5)},
        "sizes": {"red bbox": (1.5, 1.5, 1.5)},
    },
    "hidden": {"depths": [depth(0.5)]},
    "unknown depth": {"depths": [depth(np.nan)]},
    "a mask": {"regions": [(0, np.pad(np.ones((90, 100), bool), ((310, 80), (500, 40))))]},
    "a long lens": {"intrinsics": [(8 * 640, 8 * 640, 319.5, 239.5)], "objects": {}},
    "a crop": {"intrinsics": [(577.0, 577.0, 200.0, 239.5)], "objects": {}},
    "a wide lens": {"intrinsics": [(160, 160, 319.5, 239.5)], "objects": {}},
    "two views, one of them without its object": {
        "images": [Image.new("RGB", SIZE)] * 2,
        "intrinsics": [CAMERA, CAMERA],
        "objects": {"red bbox": {0: CENTRE, 1: (1.0, 0.5, -2.5)}},
    },
    "SPAR's lone mark, which no colour names": {"question": "How far is the bbox <mask>?"},
    "in other letters": {"question": "Wo steht 红框 <mask>?", "objects": {"红框": CENTRE}},
    "in capitals": {"question": "Is the Red Bbox (<mask>) near?"},
}


@pytest.mark.parametrize("name", SOUND)
def test_what_can_be_passes(name):
    assert problems(**SOUND[name]) == []


FLIP = "behind the camera: red bbox: "
BAD = {  # mistake: (changes, field, what is said, among it both numbers and the cause)
    "normalised intrinsics": (
        {"intrinsics": [(0.9, 1.2, 0.5, 0.5)]},
        "intrinsics",
        ["(0.5, 0.5), of (640, 480)", "in fractions of the image (normalised), not in pixels?"],
    ),
    "normalised, and nothing known": (
        {"intrinsics": [(0.9, 1.2, 0.5, 0.5)], "objects": {}},
        "intrinsics",
        ["(0.5, 0.5), of (640, 480)", "in fractions of the image (normalised), not in pixels?"],
    ),
    "a larger camera": (
        {"intrinsics": [(1170.0, 1170.0, 648.0, 484.0)]},
        "intrinsics",
        ["(648, 484), of (640, 480)", "intrinsics of an image of about 1296 x 968?"],
    ),
    "twice as large, to the pixel": (
        {"intrinsics": [(1154.0, 1154.0, 639.5, 479.5)]},
        "intrinsics",
        ["(639.5, 479.5), of (640, 480)", "intrinsics of an image of about 1279 x 959?"],
    ),
    "a smaller camera": (
        {"intrinsics": [(288.5, 288.5, 159.75, 119.75)]},
        "intrinsics",
        ["(159.8, 119.8), of (640, 480)", "an image of about 320 x 240?"],
    ),
    "half as wide": (
        {"intrinsics": [(288.5, 577.0, 159.75, 239.5)]},
        "objects",
        ["(1, 0.5, 2.5), region (500, 310, 600, 400)", "an image of about 320 x 479?"],
    ),
    "fx fy swapped with cx cy": (
        {"intrinsics": [(319.5, 239.5, 577.0, 577.0)]},
        "intrinsics",
        ["(577, 577), of (640, 480)", "fx fy swapped with cx cy?"],
    ),
    "a focal length of nothing": (
        {"intrinsics": [(50.0, 50.0, 319.5, 239.5)], "objects": {}},
        "intrinsics",
        ["(50, 50) for an image of (640, 480), from 160 to 5120"],
    ),
    "a focal length of metres": (
        {"intrinsics": [(577.0, 577000.0, 319.5, 239.5)], "objects": {}},
        "intrinsics",
        ["(577, 5.77e+05) for an image of (640, 480), from 160 to 5120"],
    ),
    "the camera of the image on its side": (
        {"intrinsics": [(577.0, 577.0, 239.5, 319.5)]},
        "intrinsics",
        ["(239.5, 319.5), of (640, 480)", "its EXIF orientation turns it"],
    ),
    "behind the camera": (
        {"objects": {"red bbox": (1.0, 0.5, -2.5)}},
        "objects",
        [FLIP + "(1, 0.5, -2.5)", "x right, y down, z forward"],
    ),
    "in the camera": (
        {"objects": {"red bbox": (1.0, 0.5, 0.0)}, "intrinsics": None},
        "objects",
        [FLIP + "(1, 0.5, 0)"],
    ),
    "OpenGL's frame": (
        {"objects": {"red bbox": (1.0, -0.5, -2.5)}},
        "objects",
        [FLIP + "(1, -0.5, -2.5)", "a frame with y up and z backward (OpenGL)?"],
    ),
    "z up, below the camera": (
        {"objects": {"red bbox": (1.0, 2.5, -0.5)}},
        "objects",
        [FLIP + "(1, 2.5, -0.5)", "a frame with z up?"],
    ),
    "z up, above it": (
        {
            "objects": {"red bbox": (1.0, 2.5, 0.5)},
            "regions": [(0, (500.0, 80.0, 600.0, 170.0))],
        },
        "objects",
        ["(1, 2.5, 0.5), region (500, 80, 600, 170)", "a frame with z up?"],
    ),
    "x forward": (
        {"objects": {"red bbox": (2.5, -1.0, -0.5)}},
        "objects",
        [FLIP, "a frame with x forward and z up?"],
    ),
    "beside its region": (
        {"objects": {"red bbox": (-1.5, 0.5, 2.5)}},
        "objects",
        ["(-1.5, 0.5, 2.5), region (500, 310, 600, 400): by 2.02 m, at most 0.68"],
    ),
    "beside its region, of unknown size": (
        {"objects": {"red bbox": (-1.5, 0.5, 2.5)}, "sizes": None},
        "objects",
        ["by 2.02 m, at most 1.15"],
    ),
    "far behind its depth": (
        {"depths": [depth(2.4)], "objects": {"red bbox": tuple(100 * v for v in CENTRE)}},
        "objects",
        ["z = 250.00 m, depth 2.40 to 2.40 m"],
    ),
    "far before its depth": (
        {"depths": [depth(8.0)], "intrinsics": None},
        "objects",
        ["z = 2.50 m, depth 8.00 to 8.00 m"],
    ),
    "in the frame asked for": (
        {
            "images": [Image.new("RGB", SIZE)] * 2,
            "intrinsics": [None, CAMERA],
            "regions": [(1, BOX)],
            "objects": {"red bbox": (1.0, 0.5, -2.5)},
            "frame": 1,
        },
        "objects",
        [FLIP],
    ),
    "in one of two views": (
        {
            "images": [Image.new("RGB", SIZE)] * 2,
            "intrinsics": [CAMERA, CAMERA],
            "regions": [(1, BOX)],
            "objects": {"red bbox": {0: CENTRE, 1: (-1.5, 0.5, 2.5)}},
        },
        "objects",
        ["beside its region: red bbox: centre (-1.5, 0.5, 2.5)"],
    ),
    "another word": (
        {"objects": {"red box": CENTRE}},
        "objects",
        ["not in the question: 'red box'; the nearest mention is 'red bbox'"],
    ),
    "the name instead of the mention": (
        {"objects": {"box": CENTRE}},
        "objects",
        ["of no region, as none stands before its <mask>: 'box'", "nearest mention is 'bbox'"],
    ),
    "another colour": (
        {"question": "How far is the blue bbox <mask>?"},
        "objects",
        ["not in the question: 'red bbox'; the nearest mention is 'blue bbox'"],
    ),
    "a mention that no answer can say": (
        {"objects": {"red bbox ": CENTRE}, "sizes": None},
        "objects",
        ["blanks or brackets around a mention: 'red bbox '"],
    ),
    "a mention in brackets": (
        {"objects": {"(red bbox)": CENTRE}, "sizes": None},
        "objects",
        ["blanks or brackets around a mention: '(red bbox)'"],
    ),
    "a size in millimetres": (
        {"sizes": {"red bbox": (500.0, 400.0, 300.0)}},
        "sizes",
        ["above 100 m, so in millimetres?: red bbox: (500.0, 400.0, 300.0)"],
    ),
    "no mention at all": (
        {"question": "How far?", "regions": []},
        "objects",
        ["not in the question: 'red bbox'"],
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_is_named_with_its_cause(name):
    changes, field, said = BAD[name]
    ((found, reason),) = problems(**changes)
    assert found == field
    for words in said:
        assert words in reason, reason
    assert "\n" not in reason


def test_a_row_with_another_fault_is_named_once():
    found = problems(regions=[(0, (500.0, 310.0, 700.0, 400.0))], intrinsics=[(1, 1, 1, 1)])
    assert [field for field, _ in found] == ["regions"]


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    out = tmp_path_factory.mktemp("rooms")
    scenes.main(scenes.Config(out, n=12, seed=5))
    return out


def test_rendered_rooms_pass_and_their_mistakes_do_not(rendered):
    examples = data.load([rendered])
    assert len(examples) > 60
    files = [file for one in examples for file in (*one.images, *one.depths)]
    headers = measure(files)
    for one in examples:
        width, height = headers[one.images[0]][:2]
        normalised = np.divide(one.intrinsics, (width, height) * 2).tolist()
        for wrong in (
            np.multiply(one.intrinsics, 0.5).tolist(),
            np.multiply(one.intrinsics, 1.5).tolist(),
            normalised,
            np.multiply(one.intrinsics, 2).tolist(),
            np.roll(one.intrinsics, 2, 1).tolist(),
        ):
            found = check(replace(one, intrinsics=wrong), headers)
            assert found and {field for field, _ in found} == {"intrinsics"}


def test_an_estimated_depth_is_not_believed_against_a_row(rendered, tmp_path):
    row = json.loads((rendered / "rows.jsonl").read_text().splitlines()[0])
    Image.open(rendered / row["images"][0]).save(tmp_path / "a.png")
    width, height = Image.open(tmp_path / "a.png").size
    wrong = Image.fromarray(np.full((height, width), 65000, np.uint16))
    wrong.save(tmp_path / "a.depth.png")
    (tmp_path / "rows.jsonl").write_text(json.dumps(row | {"images": ["a.png"], "depths": None}))
    assert data.load([tmp_path])[0].depths == [str(tmp_path / "a.depth.png")]
    wrong.save(tmp_path / "d.png")
    with_measured = row | {"images": ["a.png"], "depths": ["d.png"]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(with_measured))
    with pytest.raises(data.BadRows, match="far from its region's depth.*depth 65.00 to 65.00 m"):
        data.load([tmp_path])


def test_of_large_sets_a_share_of_the_rows_is_compared_with_depth():
    headers = dict.fromkeys(range(4000))
    wrong = example(depths=[depth(8.0)], intrinsics=None)
    found = [bool(check(replace(wrong, id=str(k)), headers)) for k in range(400)]
    assert 20 < sum(found) < 60
    assert all(check(replace(wrong, id=str(k)), {}) for k in range(20))


def test_a_depth_map_is_decoded_once_for_all_questions_about_it(rendered, tmp_path, monkeypatch):
    read = []

    def counted(file):
        read.append(file)
        return read_metres(file)

    monkeypatch.setattr("data.geometry.read_metres", counted)
    geometry.decoded.cache_clear()
    examples = data.load([rendered])
    maps = {file for one in examples for file in one.depths}
    assert sorted(read) == sorted(maps) and len(maps) < len(examples) / 4

    # Written anew, it is read anew.
    one = examples[0]
    headers = measure([one.images[0], one.depths[0]])
    assert not check(one, headers)
    width, height = headers[one.images[0]][:2]
    copy = tmp_path / "d.png"
    for metres, is_sound in ((65.0, False), (one.objects[next(iter(one.objects))][2], True)):
        Image.fromarray(np.full((height, width), metres * 1000, np.uint16)).save(copy)
        changed = replace(one, depths=[str(copy)])
        headers = measure([one.images[0], str(copy)])
        assert bool(check(changed, headers)) is not is_sound
