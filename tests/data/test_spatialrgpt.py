"""SpatialRGPT's reader: rows of the published schema about a rendered room; quantities keep their
units."""

import json

import numpy as np
import pytest
import rooms

import data
from data.sets import spatialrgpt
from data.sets.spatialrgpt import quantity
from srreal import answer_score


@pytest.fixture(scope="module")
def one():
    return rooms.rich(1, 3)


def row(found, **changes):
    room, things = found
    text = [
        "<image>\nHow far is Region [0] <mask> <depth> from Region [1] <mask> <depth>?",
        "They are 3.5 feet apart.",
        "Which is taller, Region [0] <mask> <depth> or Region [2] <mask> <depth>?",
        "Region [2].",
    ]
    boxes = [room.box(things[k], 0) * (rooms.SIZE * 2) / 1000 for k in (0, 1, 0, 2)]
    runs = [{"size": list(rooms.SIZE[::-1]), "counts": [0, rooms.SIZE[0] * rooms.SIZE[1]]}] * 4
    said = [
        {"from": who, "value": value} for who, value in zip(("human", "gpt") * 2, text, strict=True)
    ]
    return {
        "filename": "0a1b2c",
        "bbox": [box.tolist() for box in boxes],
        "rle": runs,
        "conversations": said,
    } | changes


def write(folder, *rows):
    (folder / "result_10_depth_convs.json").write_text(json.dumps(rows))
    return folder / "result_10_depth_convs.json"


def test_turns_regions_and_short_answers(tmp_path, one):
    room, things = one
    rooms.save(room.images[0], tmp_path / "train" / "train_0" / "0a1b2c.jpg")
    file = write(tmp_path, row(one))
    # recognised by its fields
    first, second = data.load([f"{file}@{tmp_path / 'train'}"])
    assert (first.path, first.question) == (
        "direct",
        "How far is Region [0] <mask> from Region [1] <mask>?",
    )
    assert first.answer == "They are 3.5 feet apart."
    assert first.id == f"{tmp_path.name}/result_10_depth_convs/0a1b2c#1/0"
    assert first.images == [str(tmp_path / "train/train_0/0a1b2c.jpg")]
    for e, wanted in ((first, (0, 1)), (second, (0, 2))):
        for (_, (x0, y0, x1, y1)), k in zip(e.regions, wanted, strict=True):
            inside = room.owners[0][int(y0) : int(y1), int(x0) : int(x1)]
            assert np.bincount(inside[inside >= 0]).argmax() == things[k]
    (short,) = data.load([f"spatialrgpt:{file}@{tmp_path / 'train'},path=lor"])
    assert (short.path, short.answer, short.regions) == ("lor", "3.5 feet", first.regions)
    assert answer_score("1.0668 m", short.answer) == pytest.approx(1)


@pytest.mark.parametrize(
    "text, short",
    [
        ("Region [0] is 3.5 feet from Region [1].", "3.5 feet"),
        ("About 12 inches.", "12 inches"),
        ("The height of Region [1] is 1.23 meters.", "1.23 meters"),
        ("It measures 96.5cm.", "96.5 cm"),
        ("Roughly 2 m.", "2 m"),
        ("Yes, Region [0] is wider.", None),
        ("At Region [1]'s 3 o'clock.", None),
        ("Between 2 m and 3 m.", None),
        ("2 by 3 feet", None),
        ("Region [3] ft", None),
        ("5 minutes", None),
        ("There are 2 in the image.", None),
        ("It is 12 in.", "12 in"),
        ("A width of 12 in, roughly.", "12 in"),
    ],
)
def test_the_quantity_of_a_sentence(text, short):
    assert quantity(text) == short


def test_only_rows_that_are_taken_have_their_files_looked_for(tmp_path, one, monkeypatch):
    rooms.save(one[0].images[0], tmp_path / "0a1b2c.jpg")
    file, looked = write(tmp_path, *[row(one) for _ in range(50)]), []
    find = spatialrgpt.OpenImages.find
    monkeypatch.setattr(
        spatialrgpt.OpenImages, "find", lambda *place: looked.append(place) or find(*place)
    )
    taken = data.load([f"spatialrgpt:{file}@{tmp_path},cap=3"])
    assert len(taken) == 3 and 1 <= len(looked) <= 3


def test_a_box_over_the_edge_ends_there(tmp_path, one):
    rooms.save(one[0].images[0], tmp_path / "0a1b2c.jpg")
    boxes = [[-3.5, 2, 30, 999], [5, 5, 9, 9], [5, 5, 9, 9], [5, 5, 9, 9]]
    first, _ = data.load([write(tmp_path, row(one, bbox=boxes))])
    assert first.regions[0] == (0, (0, 2, 30, rooms.SIZE[1]))


BAD = {
    "no image": ({"filename": "gone"}, "image", "missing file"),
    "no name": ({"filename": None}, "filename", "missing"),
    "a box less": ({"bbox": [[1, 2, 3, 4]] * 3, "rle": None}, "bbox", "<mask> count: 4 for 3"),
    "a box beside the image": ({"bbox": [[900, 2, 990, 9]] * 4}, "regions", "empty"),
    "boxes in fractions": ({"bbox": [[0.1, 0.2, 0.3, 0.4]] * 4}, "regions", "in fractions"),
    "a mask of another size": (
        {"bbox": None, "rle": [{"size": [3, 4], "counts": [0, 12]}] * 4},
        "rle",
        "wrong size",
    ),
    "torn run lengths": (
        {"bbox": None, "rle": [{"size": list(rooms.SIZE[::-1]), "counts": "61X1"}] * 4},
        "rle",
        "wrong size",
    ),
    "text as box": ({"bbox": "1 2 3 4"}, "bbox", "wrong type"),
    "a lone question": (
        {"conversations": [{"from": "human", "value": "?"}]},
        "conversations",
        "wrong order",
    ),
}


def test_every_bad_row_is_named(tmp_path, one):
    rooms.save(one[0].images[0], tmp_path / "0a1b2c.jpg")
    file = write(tmp_path, row(one), *(row(one) | change for change, *_ in BAD.values()))
    with pytest.raises(data.BadRows) as error:
        data.load([f"spatialrgpt:{file}"])
    found = {number: (field, reason) for _, number, field, reason in reversed(error.value.rows)}
    assert sorted(found) == list(range(2, len(BAD) + 2))
    for number, (kind, (_, field, start)) in enumerate(BAD.items(), 2):
        assert found[number][0] == field and found[number][1].startswith(start), (
            kind,
            found[number],
        )
