"""data.scenes against oracles of its own: marching rays, planes, closed forms, answers worked out
again."""

import json
import math
import re
import runpy
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
from data import scenes
from data.rooms.questions import FAMILIES, ON_REQUEST, Family, Question
from data.rooms.render import Room, hit, look, render
from data.rooms.scene import MARKS, draw, furnish, scene
from data.rooms.things import KINDS, PAINTS, STYLES, Thing
from errors import UserError
from srreal import parse, prompt, score, target

SIZE = 128, 96
NUMBER = r"-?\d+\.\d+"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("set")
    scenes.main(scenes.Config(out=out, n=60, seed=3, size=SIZE, workers=2))
    return out


@pytest.fixture(scope="module")
def examples(folder):
    return data.load([folder])


def room(wide=6.0, high=3.0, deep=8.0):
    values = {
        "low": (-wide / 2, -high, 0),
        "high": (wide / 2, 0, deep),
        "floor": (120, 100, 80),
        "wall": (200, 190, 180),
        "light": (0, -2.5, 2),
    }
    planes = {key: np.float32(v).reshape(3, 1, 1) for key, v in values.items()}
    return Room(**planes, tile=0.5)


def thing(name, centre, half, yaw=0.0):
    centre, half = np.array(centre, float), np.array(half, float)
    return Thing(name, centre, half, yaw, PAINTS[:3], np.zeros((3, 1)))


def level(height=1.0, size=(129, 97), focal=120.0):
    return look(size, focal, np.array([0, -height, 0.5]), np.array([0, -height, 5.0]))


def points_of(camera, depth):
    """(N, 3) world points of all pixels, by the definition of a pinhole camera."""
    (w, h), (fx, fy, cx, cy) = (
        camera.size,
        (camera.focal,) * 2 + tuple((n - 1) / 2 for n in camera.size),
    )
    v, u = np.mgrid[:h, :w]
    local = np.stack([(u - cx) * depth / fx, (v - cy) * depth / fy, depth], -1).reshape(-1, 3)
    return np.linalg.solve(camera.axes, local.T).T + camera.position


# ---- rendering

SHAPES = {part[0] for *_, parts in KINDS.values() for part in parts}


@pytest.mark.parametrize("profile", sorted(SHAPES, key=str))
def test_hit_against_marching(profile):
    rng = np.random.default_rng(0)
    # from aside: no camera looks down as steeply as a cone's side
    around = rng.uniform(0, 6.28, 300)
    origin = np.stack([4 * np.cos(around), rng.uniform(-3, 3, 300), 4 * np.sin(around)])
    ray = rng.uniform(-1, 1, (3, 300)) - origin
    t = np.linspace(0, 2, 20001)[:, None]
    x, y, z = (o + t * d for o, d in zip(origin, ray, strict=True))
    inside = (abs(x) <= 1) & (abs(y) <= 1) & (abs(z) <= 1)
    if profile:
        inside &= x**2 + z**2 <= profile[0] + profile[1] * y + profile[2] * y**2
    first = np.where(inside.any(0), t[inside.argmax(0), 0], np.inf)
    found = hit(np.float32(origin), np.float32(ray), profile)
    both = np.isfinite(first) & np.isfinite(found)
    assert (np.isfinite(first) != np.isfinite(found)).mean() < 0.01 and both.sum() > 100
    np.testing.assert_allclose(found[both], first[both], atol=3e-4)


def test_box_face_is_flat_and_as_wide_as_it_should_be():
    _, depth, owner, _ = render(room(), [thing("box", (0, -1, 4.5), (0.5, 0.5, 0.5))], level())
    np.testing.assert_allclose(depth[owner == 0], 3.5, atol=1e-5)
    columns = np.nonzero(owner == 0)[1]
    assert columns.min() == 64 - 17 and columns.max() == 64 + 17  # 120 * .5 / 3.5 = 17.1


@pytest.mark.parametrize("at", [(0, -1, 4.0), (1.1, -0.6, 3.0), (-0.8, -2, 5.0)])
def test_ball_in_the_middle_is_as_far_as_its_centre_less_its_radius(at):
    camera = look((129, 97), 120.0, np.array([0.2, -1.5, 0.3]), np.array(at))
    _, depth, owner, _ = render(room(), [thing("ball", at, (0.4, 0.4, 0.4))], camera)
    assert owner[48, 64] == 0
    assert depth[48, 64] == pytest.approx(
        np.linalg.norm(np.array(at) - camera.position) - 0.4, abs=1e-4
    )


def test_barrel_silhouette():
    _, depth, owner, _ = render(
        room(), [thing("barrel", (0, -1, 4.5), (0.5, 0.8, 0.5), 0.7)], level()
    )
    assert depth[48, 64] == pytest.approx(4 - 0.5, abs=1e-4)
    tangent = 120 * math.tan(math.asin(0.5 / 4))
    assert np.nonzero(owner[48] == 0)[0].max() == 64 + math.floor(tangent)


def test_wall_behind_and_floor_below():
    camera = level(height=1.25)
    _, depth, owner, alone = render(room(), [], camera)
    assert (owner == -1).all() and alone.shape == (0, 97, 129)
    assert depth[48, 64] == pytest.approx(8 - 0.5)
    assert depth[96, 64] == pytest.approx(1.25 * 120 / 48, rel=1e-5)  # the floor at the lowest row


@pytest.mark.parametrize("seed", range(6))
def test_every_pixel_lies_on_a_surface(seed):
    place, camera, things = furnish(np.random.default_rng(seed), (160, 120))
    _, depth, owner, alone = render(place, things, camera)
    points, owner = points_of(camera, depth.astype(float)), owner.ravel()
    low, high = place.low.ravel(), place.high.ravel()
    planes = np.concatenate([points - low, points - high], 1)[owner == -1]
    assert abs(planes).min(1).max() < 2e-4  # on one of the six planes
    assert (points > low - 1e-3).all() and (points < high + 1e-3).all()
    for i, one in enumerate(things):
        c, s = math.cos(one.yaw), math.sin(one.yaw)
        x, y, z = (points[owner == i] - one.centre).T
        local = np.stack([c * x - s * z, y, s * x + c * z], 1) / one.half
        assert abs(local).max(initial=0) < 1.0301  # doors of a cabinet stand out by 3 %
        if one.name == "box":
            assert abs(abs(local).max(1) - 1).max(initial=0) < 1e-3
        if one.name == "ball":
            assert abs(np.linalg.norm(local, axis=1) - 1).max(initial=0) < 1e-3
        assert alone[i].ravel()[owner == i].all()


def test_the_nearest_thing_is_seen():
    near, far = (
        thing("box", (0, -1, 3.5), (0.3, 0.3, 0.3)),
        thing("ball", (0, -1, 5.5), (0.6, 0.6, 0.6)),
    )
    for things in ([near, far], [far, near]):
        _, depth, owner, alone = render(room(), things, level())
        assert things[owner[48, 64]] is near and depth[48, 64] == pytest.approx(2.7, abs=1e-4)
        assert alone[:, 48, 64].all()


# ---- scenes and files


def test_same_seed_same_bytes_whatever_the_workers(tmp_path):
    for name, workers, seed in (("one", 1, 0), ("two", 2, 0), ("other", 1, 1)):
        scenes.main(
            scenes.Config(out=tmp_path / name, n=10, seed=seed, size=(64, 48), workers=workers)
        )
    sets = {name: tmp_path / name for name in ("one", "two", "other")}
    files = {
        name: {file.relative_to(out): file.read_bytes() for file in out.rglob("*.*")}
        for name, out in sets.items()
    }
    assert files["one"] == files["two"] and Path("rows.jsonl") in files["one"]
    assert not files["one"].keys() & files["other"].keys() - {Path("rows.jsonl")}
    assert not set(files["one"].values()) & set(files["other"].values())
    assert not list((tmp_path / "one").glob("*.part"))


def test_depth_files_hold_a_room(folder, examples):
    seconds = sum(file.stem.endswith("-1") for file in (folder / "depth").iterdir())
    assert seconds > 10 and seconds < 30
    for file in (folder / "depth").iterdir():
        depth = np.asarray(Image.open(file)).astype(int)
        assert depth.shape == SIZE[::-1] and depth.min() > 200 and depth.max() < 12_000


def test_a_set_that_was_cut_off_has_no_rows(tmp_path, monkeypatch):
    config = scenes.Config(out=tmp_path, n=2, seed=0, size=(64, 48), workers=1)
    scenes.main(config)
    monkeypatch.setattr(scenes, "rows_of", None)
    with pytest.raises(TypeError):
        scenes.main(config)
    assert not (tmp_path / "rows.jsonl").exists()


def test_rows_pair_the_paths(folder, examples):
    pairs = defaultdict(dict)
    for e in examples:
        pairs[e.id.rpartition("-")[0]][e.path] = e
    assert len(pairs) * 2 == len(examples) == len((folder / "rows.jsonl").read_text().splitlines())
    for name in ("question", "answer", "task", "objects"):
        assert all(
            getattr(pair["lor"], name) == getattr(pair["dtr"], name) for pair in pairs.values()
        )
    assert {e.task for e in examples} == set(FAMILIES)
    assert 5 <= len(pairs) / 60 <= 6 and len({e.question for e in examples}) > 0.9 * len(pairs)


def test_which_questions_are_asked(tmp_path):
    def rows(name, **options):
        scenes.main(scenes.Config(out=tmp_path / name, n=16, size=(64, 48), workers=1, **options))
        return [
            json.loads(line) for line in (tmp_path / name / "rows.jsonl").read_text().splitlines()
        ]

    every, few = rows("every"), rows("few", ask=("depth", "nearest"), lor=0.5)
    assert {row["task"] for row in few} == {"depth", "nearest"} < {row["task"] for row in every}
    lor = {row["images"][0] for row in few if row["path"] == "lor"}
    assert 0 < len(lor) < len({row["images"][0] for row in few})
    assert few == [
        row
        for row in every
        if row["task"] in ("depth", "nearest") and (row["path"] == "dtr" or row["images"][0] in lor)
    ]


def test_marks_are_where_the_regions_say(examples):
    drawn, total = 0, 0
    for e in examples:
        mentions = re.findall(r"\((\w+ \w+) <mask>\)", e.question)
        assert mentions == list(e.objects) == list(e.names) == list(e.sizes)
        for mention, (view, (x0, y0, x1, y1)) in zip(mentions, e.regions, strict=True):
            image = np.asarray(Image.open(e.images[view]))
            colour, kind = mention.split()
            at = ((y0 + y1) // 2, (x0 + x1) // 2) if kind == "point" else (y0, (x0 + x1) // 2)
            drawn, total = drawn + (tuple(image[at]) == MARKS[colour]), total + 1
            truth = e.objects[mention]
            x, y, z = truth[view] if isinstance(truth, dict) else truth
            fx, fy, cx, cy = e.intrinsics[view]
            u, v = fx * x / z + cx, fy * y / z + cy
            assert 0 < u < SIZE[0] and 0 < v < SIZE[1] and z > 1
            assert kind == "point" or x0 <= u <= x1 and y0 <= v <= y1
    assert drawn > 0.97 * total  # later marks may cross earlier ones


def test_points_of_the_region_lie_in_the_object_s_box(examples):
    for e in {e.images[0]: e for e in examples if e.task == "depth"}.values():
        (mention, centre), (_, (x0, y0, x1, y1)) = *e.objects.items(), e.regions[0]
        z = np.asarray(Image.open(e.depths[0])).astype(float)[y0:y1, x0:x1] / 1000
        fx, fy, cx, cy = e.intrinsics[0]
        v, u = np.mgrid[y0:y1, x0:x1]
        points = np.stack([(u - cx) * z / fx, (v - cy) * z / fy, z], -1).reshape(-1, 3)
        reach = np.linalg.norm(e.sizes[mention]) / 2
        # a lamp is thin
        assert (np.linalg.norm(points - centre, axis=1) < 1.03 * reach + 0.01).mean() > 0.12


def test_every_kind_of_thing_is_seen_at_its_centre(examples):
    named = [name for e in examples for name in e.names.values()]
    assert min(named.count(kind) for kind in KINDS) > len(named) / 100
    for kind in KINDS:
        low, _, _ = KINDS[kind]
        half = np.array(low) / 2
        camera = look((257, 193), 240.0, np.array([0.3, -1.6, 0.3]), np.array([0, -half[1], 3.5]))
        one = thing(kind, (0, -half[1], 3.5), half, 0.5)
        _, depth, owner, _ = render(room(), [one], camera)
        # or the depth there would be the wall's
        assert owner[96, 128] == 0, kind


@pytest.mark.parametrize(
    "change",
    [
        dict(n=0),
        dict(seed=-1),
        dict(seed=2**32),
        dict(workers=0),
        dict(size=(31, 64)),
        dict(size=(64, 0)),
        dict(ask=("colour",)),
        dict(lor=1.5),
    ],
)
def test_what_cannot_be_rendered_is_said_in_one_line(change, tmp_path):
    with pytest.raises(UserError) as error:
        scenes.main(scenes.Config(**dict(out=tmp_path / "set", workers=1) | change))
    said = str(error.value)
    assert "\n" not in said and f"--{next(iter(change))}" in said
    assert not (tmp_path / "set").exists()


def test_point_region_is_clipped_like_the_paper_s():
    camera = level(size=(641, 481), focal=500.0)  # its middle is the pixel (320, 240)
    edge = thing("ball", (0, -1, 4), (0.4, 0.4, 0.4))
    drawing = render(room(), [edge], camera)
    _, (mark,) = draw(np.random.default_rng(0), [edge], [camera], 0, drawing, ["red"], "point", [])
    assert mark.mention == "red point"
    u, v = int(320 / 641 * 1000), int(240 / 481 * 1000)
    ends = (u - 25, 641), (v - 25, 481), (u + 25, 641), (v + 25, 481)
    assert mark.region == [int(t * n / 1000) for t, n in ends]


# ---- questions


def test_all_marks_of_a_room_are_of_one_kind(examples):
    kinds = defaultdict(set)
    for e in examples:
        kinds[e.id.rsplit("-", 2)[0]] |= {mention.split()[1] for mention in e.objects}
    assert all(len(kind) == 1 for kind in kinds.values()) and set.union(*kinds.values()) == {
        "bbox",
        "point",
    }


def test_targets_earn_everything(examples):
    for e in examples:
        text = target(e)
        parsed = parse(text, e.path)
        assert parsed.well_formed and parsed.answer == e.answer
        assert score(text, e).total == pytest.approx(1.0)
        assert 8 <= len(text.split()) <= (45 if e.path == "lor" else 80)
        assert e.frame == parsed.frame if e.path == "dtr" else True


def chosen(e):
    """The option's text that the answer's letter stands for; asserts that both differ."""
    first, second = re.search(r" A\. (.+) B\. (.+)$", e.question).groups()
    assert first != second
    return {"A": first, "B": second}[e.answer]


def worked_out(e):
    """The answer once more, from the exact objects and the question's words alone."""
    m = re.search(r"frame of the (\w+) image", e.question)
    view = ("first", "second").index(m[1]) if m else None
    assert view == e.frame
    at = {k: np.array(v[view] if view is not None else v) for k, v in e.objects.items()}
    named = re.findall(r"\((\w+ \w+) <mask>\)", e.question)
    if e.task == "depth":
        return f"{at[named[0]][2]:.1f}"
    if e.task == "distance":
        return f"{np.linalg.norm(at[named[0]] - at[named[1]]):.1f}"
    if e.task == "perspective":
        a, b, c = (at[name][[0, 2]] for name in named)
        # clockwise from above
        angle = math.degrees(math.atan2(*(c - a)) - math.atan2(*(b - a))) % 360
        if "to the left" in e.question:
            return "to the right" if angle < 180 else "to the left"
        return "in front" if angle < 90 or angle > 270 else "behind"
    if m := re.search(r"(left of|above) or (right of|below)", e.question):
        axis = 0 if m[1] == "left of" else 1
        return m[1] if at[named[0]][axis] < at[named[1]][axis] else m[2]
    origin = np.zeros(3) if "camera:" in e.question else at[named[0]]
    far = {
        name: abs(at[name][2]) if "camera:" in e.question else np.linalg.norm(at[name] - origin)
        for name in named[-2:]
    }
    return (min if "closer to" in e.question else max)(far, key=far.get).split()[0]


def test_answers_worked_out_again(examples):
    count = defaultdict(set)
    for e in examples:
        said = chosen(e) if " A. " in e.question else e.answer
        assert said == worked_out(e), e
        count[e.task].add(e.answer)
        tail = e.rationale.rpartition("so ")[2]  # the option's text before its letter
        assert (
            said in tail
            and tail.endswith(f"{e.answer}.")
            and (said == e.answer or "option" in tail)
        )
    assert all(len(answers) > 1 for answers in count.values())


def test_close_calls_are_not_asked(examples):
    for e in examples:
        view = e.frame
        at = [np.array(v[view] if view is not None else v) for v in e.objects.values()]
        if e.task == "depth_order":
            assert abs(at[0][2] - at[1][2]) > 0.24
            assert (at[0][2] < at[1][2]) == (np.linalg.norm(at[0]) < np.linalg.norm(at[1]))
        if e.task in ("depth", "distance"):
            exact = at[0][2] if e.task == "depth" else np.linalg.norm(at[0] - at[1])
            assert abs(exact - float(e.answer)) < 0.0441


def test_dtr_reasons_with_its_own_boxes(examples):
    """Each number of a DTR rationale is one of the block's, or follows by the step in which it
    stands."""
    for e in (e for e in examples if e.path == "dtr"):
        text = re.sub(r"so the answer is \S+", "", e.rationale)
        boxes = {mention.split()[0]: xyz for mention, _, xyz in parse(target(e), "dtr").boxes}
        known = {x for xyz in boxes.values() for x in xyz}
        step = rf"({NUMBER}) (\w+)"
        for a, b, *far in re.findall(rf"From (\w+) to (\w+): {step}, {step}, {step}", text):
            steps = [round(q - p, 1) for p, q in zip(boxes[a], boxes[b], strict=True)]
            assert [float(v) for v in far[::2]] == [abs(step) for step in steps]
            ways = zip(steps, far[1::2], ("right", "down", "farther"), strict=True)
            assert all((way == more) == (step > 0) for step, way, more in ways)
            known |= {abs(step) for step in steps}
        for x, _, y, _, z, _, root in re.findall(
            rf"{step}, {step}, {step}, in all ({NUMBER})", text
        ):
            assert float(root) == pytest.approx(
                math.hypot(float(x), float(y), float(z)), abs=0.0501
            )
            known.add(float(root))
        z = rf"({NUMBER}) to (\w+)"
        for p, a, q, b in re.findall(rf"By their z: {z}, {z}", text):
            for said, name in ((p, a), (q, b)):
                assert float(said) == pytest.approx(boxes[name][2], abs=0.0501)
                known.add(float(said))
        assert {float(v) for v in re.findall(NUMBER, text)} <= known, (e.rationale, known)
        for left, than, right in re.findall(rf"({NUMBER}) is (under|over) ({NUMBER})", text):
            assert (float(left) < float(right)) == (than == "under")


def test_a_family_of_one_s_own_is_asked(monkeypatch):
    def colour(rng, view, mark):
        return Question(f"What colour is {mark.text}?", mark.colour, None, "It is seen", "So it is")

    for name in list(FAMILIES):
        monkeypatch.delitem(FAMILIES, name)
    monkeypatch.setitem(FAMILIES, "colour", Family(colour, marks=1))
    lor, dtr = scenes.rows_of(scene(0, 0, (64, 48)), "s")
    assert (lor["path"], lor["id"], lor["task"]) == ("lor", "s-colour-lor", "colour")
    assert lor["answer"] in MARKS and lor["rationale"] == "It is seen."
    assert dtr == lor | {"path": "dtr", "id": "s-colour-dtr", "rationale": "So it is."}


def test_families_on_request_change_no_other_row(tmp_path):
    config = scenes.Config(out=tmp_path / "usual", n=24, seed=3, size=SIZE, workers=1)
    scenes.main(config)
    scenes.main(replace(config, out=tmp_path / "more", ask=(*FAMILIES, *ON_REQUEST)))
    usual, more = rows_in(tmp_path / "usual"), rows_in(tmp_path / "more")
    assert [row for row in more if row["task"] in FAMILIES] == usual
    assert {row["task"] for row in more} == {*FAMILIES, *ON_REQUEST}
    # Loading checks them as it does any row.
    loaded = data.load([str(tmp_path / "more")])
    asked = [e for e in loaded if e.task in ON_REQUEST]
    letters = set()
    for e in asked:
        assert score(target(e), e).total == pytest.approx(1.0)
        if e.task == "height":
            (size,) = e.sizes.values()
            assert abs(float(e.answer) - size[1]) < 0.0441
            continue
        options = dict(re.findall(r"([ABC])\. (\w+)", e.question))
        depth = {mention.split()[0]: centre[2] for mention, centre in e.objects.items()}
        assert len(options) == len(depth) == 3
        assert options[e.answer] == min(depth, key=depth.get)
        first, second, _ = sorted(depth.values())
        assert second - first > 0.24
        letters.add(e.answer)
    assert letters == {"A", "B", "C"}


def test_a_perspective_s_answer_is_read_off_its_own_words(examples):
    for e in examples:
        if e.task != "perspective":
            continue
        around, answer = re.search(r"facing \w+, (.+), so (.+), option", e.rationale).groups()
        assert answer in around.split(" and ")


def test_shuffled_options_are_the_same_questions(tmp_path):
    config = scenes.Config(out=tmp_path / "sorted", n=24, seed=3, size=SIZE, workers=1)
    scenes.main(config)
    scenes.main(replace(config, out=tmp_path / "shuffled", shuffle_options=True))
    turned = 0
    count = 0
    sets = [data.load([str(tmp_path / name)]) for name in ("sorted", "shuffled")]
    for a, b in zip(*sets, strict=True):
        assert (a.id, a.objects, Path(a.images[0]).read_bytes()) == (
            b.id,
            b.objects,
            Path(b.images[0]).read_bytes(),
        )
        assert score(target(b), b).total == pytest.approx(1.0)
        if " A. " not in a.question:
            assert (a.question, a.answer, a.rationale) == (b.question, b.answer, b.rationale)
            continue
        assert chosen(a) == chosen(b) == worked_out(b)
        assert a.question.partition(" A. ")[0] == b.question.partition(" A. ")[0]
        assert a.rationale.removesuffix(f"{a.answer}.") == b.rationale.removesuffix(f"{b.answer}.")
        turned += a.answer != b.answer
        count += 1
    assert 0.35 < turned / count < 0.65


def rows_in(folder):
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def test_guesses_change_nothing_but_rationales(tmp_path):
    for name, share in (("worked", 0.0), ("mixed", 0.5), ("guessed", 1.0)):
        scenes.main(scenes.Config(out=tmp_path / name, n=6, size=(64, 48), guess=share, workers=1))
    worked, mixed, guessed = (rows_in(tmp_path / n) for n in ("worked", "mixed", "guessed"))
    count = 0
    for a, b, c in zip(worked, mixed, guessed, strict=True):
        rationale = {"rationale": c["rationale"]}
        assert c["rationale"].startswith("By eye, ") and not a["rationale"].startswith("By eye")
        assert a | rationale == c and b in (a, c)
        # It says what the worked one ends with.
        assert a["rationale"].endswith(c["rationale"].rpartition(" is ")[2])
        count += b == c
    assert 0.2 < count / len(mixed) < 0.8


def test_scenes_without_depth_are_the_same_otherwise(tmp_path):
    config = scenes.Config(out=tmp_path / "deep", n=4, seed=3, size=(64, 48), workers=1)
    scenes.main(config)
    scenes.main(replace(config, out=tmp_path / "flat", depth=False))
    assert not list((tmp_path / "flat" / "depth").iterdir())
    deep, flat = (data.load([str(tmp_path / name)]) for name in ("deep", "flat"))
    for a, b in zip(deep, flat, strict=True):
        assert (a.id, a.question, a.answer, a.objects) == (b.id, b.question, b.answer, b.objects)
        assert Path(a.images[0]).read_bytes() == Path(b.images[0]).read_bytes()
        assert not any(b.depths or [])


def test_told_scenes_are_text_alone(tmp_path, folder):
    config = scenes.Config(out=tmp_path / "told", n=6, seed=3, size=(64, 48), told=True, workers=1)
    scenes.main(config)
    scenes.main(replace(config, out=tmp_path / "shown", told=False))
    assert not list((tmp_path / "told" / "images").iterdir())
    shown = {e.id: e for e in data.load([str(tmp_path / "shown")])}
    told = data.load([str(tmp_path / "told")])
    assert len(told) == len(shown)
    for e in told:
        assert (e.path, e.images, e.regions) == ("direct", [], [])
        same = shown[e.id.removesuffix("-told")]
        assert target(e) == target(same)
        # In place of every region stands what a DTR target says of it; the rest is the same.
        parts = prompt(same).split("<mask>")
        boxes = parse(target(replace(same, path="dtr")), "dtr").boxes
        told_prompt = parts[0]
        for (_, _, centre), part in zip(boxes, parts[1:], strict=True):
            told_prompt += ",".join(str(value) for value in centre) + part
        assert prompt(e) == told_prompt


def test_a_second_style_asks_the_same_of_rooms_that_look_otherwise(tmp_path):
    config = scenes.Config(out=tmp_path, n=8, seed=5, size=(144, 88), style="loft", workers=1)
    scenes.main(config)
    # Loading checks every centre against its region, depth map and camera.
    examples = data.load([str(tmp_path)])
    for e in examples:
        assert score(target(e), e).total == pytest.approx(1.0)
        assert e.answer in worked_out(e) or chosen(e) == worked_out(e)
        fx, *_ = e.intrinsics[0]
        assert 0.55 <= fx / 144 <= 0.7
    house, loft = STYLES["house"], STYLES["loft"]
    assert house.kinds.keys() == loft.kinds.keys()
    assert all(house.kinds[name] != loft.kinds[name] for name in loft.kinds)
    assert not (house.paints[:, None] == loft.paints).all(-1).any()


def test_lor_holds_no_coordinates(examples):
    for e in (e for e in examples if e.path == "lor"):
        assert "3d_box" not in e.rationale and not re.search(r"\d,-?\d", e.rationale)
        # one decimal: it may estimate, not measure
        assert not re.search(r"\d\.\d\d", e.rationale)


def test_an_output_that_is_no_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(UserError, match="--out .*file"):
        scenes.main(scenes.Config(out=tmp_path / "file", n=1, workers=1))
    # As on a full disk, an image can't be written, by a worker.
    image = tmp_path / "set" / "images" / "s0-000000-0.png"
    image.mkdir(parents=True)
    with pytest.raises(UserError, match=f"can't write {image}"):
        scenes.main(scenes.Config(out=tmp_path / "set", n=1, workers=1))
    assert not (tmp_path / "set" / "rows.jsonl").exists()


def test_a_wrong_flag_ends_the_command_in_one_line(tmp_path, capsys, monkeypatch):
    arguments = ["scenes", "--out", str(tmp_path / "set"), "--n", "0"]
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.delitem(sys.modules, "data.scenes")
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("data.scenes", run_name="__main__")
    assert stop.value.code == 2
    assert re.fullmatch("scenes: --n 0: it has to be at least 1\n", capsys.readouterr().err)


def test_json_of_rows_is_strict(folder):
    for line in (folder / "rows.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)
