"""ask.py: one image, one question; what is missing is assumed and said; what is drawn."""

import json

import numpy as np
import pytest
from PIL import Image

import ask
from errors import UserError

QUESTION = "How far apart are the red bbox <mask> and the blue bbox <mask>?"
REGIONS = ((10, 20, 50, 60), (70, 30, 110, 80))


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photo")
    pixels = np.random.default_rng(0).integers(0, 256, (96, 128, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "room.png")
    Image.fromarray(np.full((96, 128), 2500, np.uint16)).save(folder / "depth.png")
    Image.fromarray(np.full((9, 12), 2500, np.uint16)).save(folder / "small.png")
    return folder


def config(tiny_home, photo, tmp_path, question=QUESTION, **flags):
    model = flags.pop("model", str(tiny_home / "tiny"))
    defaults = dict(max_new_tokens=6, out=str(tmp_path / "out"))
    return ask.Config(model, str(photo / "room.png"), question, **defaults | flags)


def test_both_paths_answer_and_all_is_written(tiny_home, photo, tmp_path, capsys):
    cfg = config(
        tiny_home,
        photo,
        tmp_path,
        region=REGIONS,
        depth=str(photo / "depth.png"),
        intrinsics=(100.0, 100.0, 63.5, 47.5),
        regions="token",
        compare=str(tiny_home / "tiny"),
    )
    ask.main(cfg)
    said = json.loads((tmp_path / "out" / "ask.json").read_text())
    assert said["question"] == QUESTION
    assert [answer["path"] for answer in said["answers"]] == ["lor", "dtr"] * 2
    for answer in said["answers"]:
        assert answer.keys() == {"model", "path", "text", "answer", "boxes", "head", "finished"}
        assert answer["text"] in capsys.readouterr().out or answer["text"]
    with Image.open(tmp_path / "out" / "ask.png") as drawn:
        # The image, twenty times as many pixels, and beside it a square.
        assert drawn.size == (640 + 12 + 480, 480)


def test_regions_without_a_mask_get_names(tiny_home, photo, tmp_path):
    """The k-th region is the k-th <mask>; the names that the question has are taken."""
    result = ask.main(
        config(
            tiny_home,
            photo,
            tmp_path,
            question="Is the red bbox <mask> near?",
            region=(*REGIONS, (0, 0, 20, 20)),
            path="lor",
        )
    )
    assert (
        result["question"] == "Is the red bbox <mask> near? (blue bbox <mask>, green bbox <mask>)"
    )
    text = " ".join(result["assumed"])
    assert "blue bbox, green bbox" in text and "no depth" in text
    assert len(result["answers"]) == 1 and result["answers"][0]["head"] is None


def test_only_appended_regions_are_drawn_for_the_model(tiny_home, photo, tmp_path):
    """A question of one's own speaks of marks that its image has; ours have to be drawn first."""
    regions = ((10.0, 20.0, 60.0, 70.0), (5.0, 5.0, 30.0, 40.0))
    cfg = config(tiny_home, photo, tmp_path, "Is the red bbox <mask> near?", region=regions)
    (seen,) = ask.prepare(cfg).example.images
    before = np.asarray(Image.open(photo / "room.png").convert("RGB"))
    changed = (np.asarray(seen) != before).any(-1)
    edge = np.zeros_like(changed)
    edge[5:41, 5:31] = True
    edge[6:40, 6:30] = False
    assert (changed == edge).all()
    # Blue, as the first free name is.
    assert np.asarray(seen)[5, 5].argmax() == 2


def test_a_camera_that_is_not_known_is_assumed(tiny_home, photo, tmp_path):
    result = ask.main(
        config(tiny_home, photo, tmp_path, "What is it?", depth=str(photo / "depth.png"))
    )
    # 64 / tan 30 degrees
    assert "field of view of 60 degrees, focal length 111 pixels" in " ".join(result["assumed"])
    assert ask.main(config(tiny_home, photo, tmp_path, "What is it?", path="direct"))["answers"]


@pytest.mark.parametrize(
    "flags, words",
    [
        (dict(region=REGIONS[:1]), "2 <mask>, and there are 1 --region"),
        (dict(region=(REGIONS[0], (0, 0, 300, 20))), "--region 0 0 300 20: .* 128 x 96"),
        (
            dict(region=REGIONS, depth="small.png"),
            "small.png: 12 x 9 pixels, the image has 128 x 96",
        ),
        (dict(region=REGIONS, model="nowhere"), "nowhere"),
    ],
)
def test_mistakes_end_in_words_and_leave_nothing(flags, words, tiny_home, photo, tmp_path):
    if "depth" in flags:
        flags = flags | dict(depth=str(photo / flags["depth"]))
    with pytest.raises(UserError, match=words):
        ask.main(config(tiny_home, photo, tmp_path, **flags))
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="one of them"):
        config(tiny_home, photo, tmp_path, depth="a", depth_model="b")


def test_a_number_that_a_model_made_up_ends_no_picture(tiny_home, photo, tmp_path):
    """A line a metre would be drawn for ever."""
    asked = ask.prepare(config(tiny_home, photo, tmp_path, region=REGIONS))
    box = dict(mention="red bbox", name="box", centre=[0.0, 0.0, 99999999999.0])
    assert ask.from_above(asked, [dict(boxes=[box], head=None)], 100).size == (100, 100)


def test_names_are_compared_without_case(tiny_home, photo, tmp_path):
    question = "Red bbox <mask> is what?"
    asked = ask.prepare(config(tiny_home, photo, tmp_path, question, region=REGIONS))
    assert asked.names == ["Red bbox", "blue bbox"]


def test_a_box_is_drawn_where_it_projects():
    """A cube of one metre, three metres ahead: its near face is 2.5 m away."""
    camera = (100.0, 100.0, 50.0, 40.0)
    points = [ask.project(corner, camera) for corner in ask.corners((0, 0, 3), (1, 1, 1))]
    assert min(x for x, _ in points) == pytest.approx(50 - 100 * 0.5 / 2.5)
    assert max(y for _, y in points) == pytest.approx(40 + 100 * 0.5 / 2.5)
    assert len(ask.EDGES) == 12 and ask.project((0, 0, -1), camera) is None
