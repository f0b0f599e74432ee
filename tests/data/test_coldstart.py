"""The cold start's builder: each filter fires, the rest passes; what is kept is exact, loads, is a
target."""

import json
import math
import re
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
from data import coldstart, scenes
from data.arithmetic import equations, unknown_numbers, value, wrong
from data.coldstart import Config, judge
from data.rationale import compute
from errors import UserError
from model.tiny import write
from srreal import Example, parse, score, target

CENTRES = {"red bbox": (0.61, -0.01, 4.52), "blue bbox": (1.08, 0.18, 2.97)}
QUESTION = "How many metres apart are the lamp (red bbox <mask>) and the chair (blue bbox <mask>)?"
ONE = Example(
    "q",
    "dtr",
    [Image.new("RGB", (64, 48))],
    QUESTION,
    "1.6",
    regions=[(0, (1, 2, 30, 40))] * 2,
    objects=CENTRES,
    names={"red bbox": "lamp", "blue bbox": "chair"},
)
WORKED = (
    "From red to blue: dx = 1.08 - 0.61 = 0.47, dy 0.19, dz -1.55, "
    "sqrt(0.47^2 + 0.19^2 + (-1.55)^2) = 1.63, so the answer is 1.6."
)
CONFIG = Config(data=(), out=Path())


@pytest.fixture(scope="module")
def rooms(tmp_path_factory):
    out = tmp_path_factory.mktemp("rooms")
    scenes.main(scenes.Config(out, n=12, seed=3, size=(96, 64), workers=1))
    return out


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    out = tmp_path_factory.mktemp("tiny")
    write("qwen3_vl", str(out), seed=0)
    return out


def response(think=WORKED, answer="1.6", example=ONE):
    return (
        target(replace(example, rationale="-"))
        .replace("<think>-<", f"<think>{think}<")
        .replace(f"<answer>{example.answer}<", f"<answer>{answer}<")
    )


# ---- filters
THROWN_OUT = {
    "no closing tag": ("grammar", response().replace("</think>", "")),
    "a tag in the reasoning": ("grammar", response("As the <answer> is near, " + WORKED)),
    "no detect": ("grammar", response().partition("</detect>\n")[2]),
    "one box less than stated": (
        "grammar",
        re.sub(r"<3d_box[^\n]*chair[^\n]*</3d_box>", "", response()),
    ),
    "wrong answer": ("answer", response(answer="1.7")),
    "reasoning for another answer": ("answer", response(WORKED.replace("is 1.6", "is 1.63"))),
    "scene graph": ("leak", response("The scene graph says it. " + WORKED)),
    "ground truth": ("leak", response("By the ground-truth, " + WORKED)),
    "provided answer": ("leak", response("This agrees with the provided answer. " + WORKED)),
    "detect section": ("leak", response("As the detect section says. " + WORKED)),
    "as I was told": ("leak", response("As I was told. " + WORKED)),
    "too short": ("length", response("So the answer is 1.6.")),
    "too long": ("length", response("well " * 300 + WORKED)),
    "another centre than detected": ("numbers", response("The lamp is at 5.37 m. " + WORKED)),
    "follows from another centre": ("numbers", response("Take 5.37 - 0.61 = 4.76. " + WORKED)),
    "wrong difference": (
        "arithmetic",
        response(WORKED.replace("1.08 - 0.61 = 0.47", "0.61 - 0.47 = 1.08")),
    ),
    "wrong comparison": ("arithmetic", response("Here 4.52 < 2.97. " + WORKED)),
    "wrong root": ("arithmetic", response(WORKED.replace("= 1.63", "= 1.55"))),
}


@pytest.mark.parametrize("name", THROWN_OUT)
def test_every_filter_fires(name):
    filter_name, text = THROWN_OUT[name]
    assert judge(text, ONE, CONFIG, set()) == filter_name


def test_the_sound_response_passes_until_it_is_a_duplicate():
    assert judge(response(), ONE, CONFIG, set()) is None
    again = response(WORKED.upper().replace("SQRT", "sqrt"))
    assert judge(again, ONE, CONFIG, {coldstart.normalized(WORKED)}) == "duplicate"
    assert {name for name, _ in THROWN_OUT.values()} | {"duplicate"} == set(coldstart.FILTERS)


def test_choice_claims_and_language_only_numbers():
    choice = replace(ONE, path="lor", question=QUESTION + " A. far B. near", answer="B")
    think = "It stands about 7.77 m away, right in front of the wall."
    text = f"<think>{think} {{}}</think><answer>B</answer>"
    # LOR detects nothing
    assert judge(text.format("So the answer is B."), choice, CONFIG, set()) is None
    assert judge(text.format("So option (A)."), choice, CONFIG, set()) == "answer"
    assert judge(text.format("A chair is near, option B."), choice, CONFIG, set()) is None
    assert judge(text.format("2 + 2 = 5. So B."), choice, CONFIG, set()) == "arithmetic"


@pytest.mark.parametrize(
    "truth, say, sound",
    [
        ("3.5 feet", "So the answer is 3.5 feet.", True),
        ("12 in", "So the answer is 12 inches.", True),
        ("40 cm", "So the answer is 40 cm.", True),
        ("40 cm", "So the answer is 40 m.", False),
        ("1.5", "So the answer is 1.5 in the end.", True),
        ("yes", "So the answer is yes, as it is near.", True),
        ("yes", "So the answer is no.", False),
        ("left, above", "So the answer is 'left, above'.", True),
        ("yes", "That much can be seen.", True),
        ("move_right:0.4,rotate_left:30", "So the answer is move_right:0.4, rotate_left:30.", True),
        ("move_right:0.4", "So the answer is move_right:0.4, rotate_left:30.", False),
    ],
)
def test_the_last_claim_is_the_truth_whatever_its_kind(truth, say, sound):
    e = replace(ONE, path="lor", answer=truth)
    text = f"<think>It stands right in front of the wall. {say}</think><answer>{truth}</answer>"
    assert judge(text, e, CONFIG, set()) == (None if sound else "answer")


@pytest.mark.parametrize(
    "text, leak",
    [
        ("The correct answer is given as B.", True),
        ("Hence the answer provided is B.", True),
        ("The coordinates provided show it.", True),
        ("Given that the answer is B, it is nearer.", True),
        ("That is the given hint.", True),
        ("The reference answer is B.", True),
        ("Given that the box is left of it, it is nearer.", False),
    ],
)
def test_ways_to_leak(text, leak):
    assert judge(response(f"{text} {WORKED}"), ONE, CONFIG, set()) == ("leak" if leak else None)


@pytest.mark.parametrize(
    "question, frame",
    [
        (
            "How far are a (red bbox <mask>) and b (blue bbox <mask>) apart?",
            1,
        ),  # the first mark's view
        ("As seen first, how far are a (red bbox <mask>) and b (blue bbox <mask>) apart?", 0),
        ("In the third image, how far are a (red bbox <mask>) and b (blue bbox <mask>) apart?", 2),
    ],
)
def test_the_view_of_several_that_a_target_speaks_of(tmp_path, question, frame):
    """As the paper chooses it; centres are then that view's."""
    Image.new("RGB", (64, 48)).save(tmp_path / "a.png")
    views = {m: {str(k): [x + k, y, z] for k in range(3)} for m, (x, y, z) in CENTRES.items()}
    row = {
        "id": "q",
        "path": "dtr",
        "images": ["a.png"] * 3,
        "question": question,
        "answer": "1.6",
        "regions": [[1, [1, 2, 30, 40]], [2, [1, 2, 30, 40]]],
        "objects": views,
    }
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    coldstart.main(Config((str(tmp_path),), tmp_path / "out"))
    (e,) = data.load([tmp_path / "out"])
    assert e.frame == frame and target(e).startswith(
        f"<detect>After aligning to the reference frame {frame}, find 2 relevant objects:\n"
        f'<3d_box center="{round(0.61 + frame, 2)},-0.01,4.52">'
    )
    assert (
        coldstart.with_frame(
            replace(
                e,
                frame=None,
                question="?",
                objects={
                    m: {k: xyz for k, xyz in truth.items() if k != 1}
                    for m, truth in e.objects.items()
                },
            )
        ).frame
        is None
    )


def test_every_rationale_that_the_rooms_come_with_passes(rooms):
    """Written elsewhere, with steps and lengths of one decimal: no filter throws out sound
    reasoning."""
    examples = data.load([rooms])
    verdicts = [judge(target(e), e, replace(CONFIG, words=(1, 300)), set()) for e in examples]
    assert len(verdicts) > 100 and set(verdicts) == {None}


@pytest.mark.parametrize(
    "text",
    [
        "2 + 3 = 5",
        "-1.5 * -2 = 3.0",
        "sqrt(0.5^2) = 0.5",
        "√2.66 ≈ 1.63",
        "3 m − 1 m = 2 m",
        "0.3² = 0.09",
        "1 < 2",
        r"$\sqrt{2.66} \approx 1.63$",
        r"$2 \times 3 = 6$",
        "0.47 * 0.47 = 0.22",
        "1 / 3 = 0.33 ≈ 0.3",
    ],
)
def test_right_equations(text):
    assert equations(text) and not any(wrong(*e) for e in equations(text))


@pytest.mark.parametrize(
    "text",
    ["2 + 3 = 6", "1 / 3 = 0.34", "√2.66 = 1.7", "2 > 3", "1.0 - 0.5 = 0.5 = 0.6", "3 × 3 = 8"],
)
def test_wrong_equations(text):
    assert any(wrong(*e) for e in equations(text))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "2 +",
        "1 / 0",
        "9^9^9^9^9",
        "(" * 5000,
        "(" * 199,
        "sqrt(-1)",
        "1 2",
        "01",
        "-" * 9999 + "1",
        "9" * 9999,
        "1..2",
        "2(3)",
        "sqrt",
    ],
)
def test_whatever_is_no_equation_is_nan(text):
    assert math.isnan(value(text))
    judge(response(f"so {text} = {text} " + WORKED), ONE, CONFIG, set())  # never raises


@pytest.mark.parametrize(
    "unit", [" ", "1", "1 ", "1+", "sqrt", "1=1, ", "1=", "(", "1.", r"\sqrt{", "1 m"]
)
def test_time_is_linear_in_the_text(unit):
    """40,000 characters in seconds of processor time; a quadratic search needs minutes."""
    start = time.process_time()
    equations(unit * (40_000 // len(unit)) + "x")
    assert time.process_time() - start < 5


def test_a_response_without_end_is_too_long_before_its_numbers_are_checked(monkeypatch):
    monkeypatch.setattr(
        coldstart, "unknown_numbers", lambda *_: pytest.fail("asked for the numbers")
    )
    endless = "".join(f"{k}={k}," for k in range(100, 999))
    assert judge(response(f"{endless} {WORKED}"), ONE, CONFIG, set()) == "length"


@pytest.mark.parametrize(
    "text, left",
    [
        ("0.47 and 1.55 and 1.63", []),
        ("2.66 is 1.63 squared", []),
        ("half of 1.63 is 0.815", ["0.815"]),
        ("1.63 / 2 = 0.815, and 0.815 it is", []),
        ("0.5 m right, 0.2 m down and 1.5 m nearer, 1.6 m in all", []),
        ("7.7 / 2 = 3.85", ["7.7", "3.85"]),
        ("between 1 and 2 m, room 12", []),
        ("7 chairs, 7 of 7", ["7"]),
        ("about 4 m deep", ["4"]),
        ("about 5 m deep", []),
        ("between 4 m and 5 m deep", []),
        ("3 things", []),
    ],
)
def test_where_numbers_come_from(text, left):
    """The steps are 0.47, 0.19 and -1.55, the distance 1.63 m."""
    assert unknown_numbers(text, "room 12", CENTRES.values()) == left


def test_a_length_may_be_worked_with_steps_of_one_decimal():
    """(1.04, 1.04, 1.04) is 1.80 m long, and sqrt(3) = 1.73 m by its rounded steps."""
    assert unknown_numbers("1.7 or 1.8 or 1.6 m in all", "", [(1.04, 1.04, 1.04)]) == ["1.6"]


# ---- computed from the truth
def test_computed_rationales_answer_the_rooms_questions(rooms, tmp_path):
    summary = coldstart.main(Config((str(rooms),), tmp_path))
    before, after = data.load([rooms]), data.load([tmp_path])
    assert summary["lor"]["kept"] + summary["dtr"]["kept"] == len(after) > 0.97 * len(before)
    truth = {(e.id, e.path): e for e in before}
    for e in after:
        old = truth[e.id, e.path]
        assert score(target(e), old).total == pytest.approx(1.0) and e.rationale != old.rationale
        assert (e.question, e.answer, e.objects, e.regions, e.intrinsics) == (
            old.question,
            old.answer,
            old.objects,
            old.regions,
            old.intrinsics,
        )
        files = [[Path(file).resolve() for file in one.images + one.depths] for one in (e, old)]
        assert files[0] == files[1]
    assert (
        sum(bool(equations(e.rationale)) for e in after if e.path == "dtr") > 0.7 * len(after) / 2
    )
    assert len(
        {re.sub(r"[\d.-]+|red|blue|green|yellow", "", e.rationale) for e in after}
    ) > 0.5 * len(after)


@pytest.mark.parametrize(
    "question, answer, words",
    [
        (QUESTION, "1.63", "= 1.63"),
        (
            "What is the depth of the lamp (red bbox <mask>) minus nothing: its depth?",
            "4.5",
            "4.52",
        ),
        (
            "By how much do the lamp (red bbox <mask>) and the chair (blue bbox <mask>) differ in "
            "depth?",
            "1.55",
            "2.97 - 4.52",
        ),
        (
            "Where is the lamp (red bbox <mask>) seen from the chair (blue bbox <mask>)? "
            "(A) right, above (B) left, above (C) left, below",
            "B",
            "0.61 - 1.08 = -0.47",
        ),
        (
            "Which is nearer to the camera, the lamp (red bbox <mask>) or the chair "
            "(blue bbox <mask>)?\nA. red bbox\nB. blue bbox",
            "B",
            "2.97 < 4.52",
        ),
    ],
)
def test_computed_by_hand(question, answer, words):
    n = question.count("<mask>")
    objects = dict(list(CENTRES.items())[:n])
    e = replace(ONE, question=question, answer=answer, objects=objects, regions=ONE.regions[:n])
    text = compute(e, "0")
    assert words in parse(text, "dtr").think and judge(text, e, CONFIG, set()) is None


def test_computed_takes_the_truth_at_its_word():
    """A truth that does not follow from the centres is not argued for."""
    other = replace(ONE, answer="2.4")
    assert judge(compute(other, "0"), other, CONFIG, set()) == "answer"
    nice = replace(ONE, question="Is it nice (<mask> <mask>)?")
    assert judge(compute(nice, "0"), nice, CONFIG, set()) == "no rule"


def test_mentions_are_no_patterns():
    objects = dict(zip(("object (1", "object *2"), CENTRES.values(), strict=True))
    e = replace(
        ONE,
        answer="B",
        objects=objects,
        names={},
        question=(
            "Which is nearer: object (1 <mask> or object *2 <mask>? A. object (1 B. object *2"
        ),
    )
    assert "2.97 < 4.52, and nearer is object *2" in compute(e, "0")


def test_rows_that_no_view_can_teach(tmp_path, capsys):
    """Centres in different views: no <detect> has them both. LOR may come without, DTR is left
    out."""
    Image.new("RGB", (64, 48)).save(tmp_path / "a.png")
    row = {
        "id": "q",
        "images": ["a.png"] * 2,
        "question": QUESTION,
        "answer": "1.6",
        "frame": 0,
        "regions": [[0, [1, 2, 30, 40]]] * 2,
        "objects": {mention: {str(k): xyz} for k, (mention, xyz) in enumerate(CENTRES.items())},
    }
    lines = [json.dumps(row | {"path": path}) + "\n" for path in ("lor", "dtr")]
    (tmp_path / "rows.jsonl").write_text("".join(lines))
    summary = coldstart.main(Config((str(tmp_path),), tmp_path / "out", samples=2))
    assert summary == {
        "lor": dict.fromkeys(coldstart.FILTERS, 0)
        | {"questions": 1, "kept": 0, "samples": 2, "no rule": 2}
    }
    assert "1 dtr rows without objects" in capsys.readouterr().out


RED, BLUE, GREEN = (
    f"{name} ({mention} point <mask>)"
    for name, mention in (("the bag", "red"), ("the box", "blue"), ("the chair", "green"))
)
SPAR = [  # task, question, answer: red at (0, 0, 2), blue at (3, 0, 2), green at (0, -1, 4)
    ("depth_prediction_oc", f"{RED} is 2.0 meters deep. How deep is {BLUE}?", "2.0"),
    (
        "depth_prediction_oo_mv",
        f"{RED} is 2.0 meters deep. By how much do {BLUE} and {GREEN} differ?",
        "2.0",
    ),
    ("distance_prediction_oc", f"How many meters separate the camera and {BLUE}?", "3.6"),
    ("distance_prediction_oo", f"What is the gap between {RED} and {BLUE}?", "3.0"),
    (
        "distance_infer_center_oo",
        f"Which is closer: {GREEN} or {BLUE} to {RED}? "
        "A. the chair (green point) B. the box (blue point)",
        "A",
    ),
    (
        "distance_infer_center_oo_mv",
        f"Which is farther from {RED}: {GREEN} or {BLUE}? "
        "A. chair (green point) B. box (blue point)",
        "B",
    ),
    (
        "obj_spatial_relation_oo",
        f"Relative to {RED}, where is {GREEN}? A. above, behind B. below, behind C. above, front",
        "A",
    ),
    (
        "obj_spatial_relation_oo_mv",
        f"Where is {GREEN} in relation to {RED}? A. above, behind B. below, behind C. above, front",
        "A",
    ),
    (
        "spatial_imagination_oc",
        f"The observer walks to {RED} and turns to {BLUE}. {GREEN} is then: "
        "A. left, above B. right, above C. left, below",
        "A",
    ),
]


@pytest.mark.parametrize("task, question, answer", SPAR, ids=[task for task, *_ in SPAR])
@pytest.mark.parametrize("path", ["lor", "dtr"])
def test_spar_tasks_have_rules_whatever_their_words(path, task, question, answer):
    places = {
        "red point": (0.0, 0.0, 2.0),
        "blue point": (3.0, 0.0, 2.0),
        "green point": (0.0, -1.0, 4.0),
    }
    own = {m: xyz for m, xyz in places.items() if f"{m} <mask>" in question}
    e = Example(
        "s",
        path,
        [Image.new("RGB", (64, 48))],
        question,
        answer,
        objects=own,
        task=task,
        regions=[(0, (1, 2, 30, 40))] * len(own),
        names=dict.fromkeys(own, "thing"),
    )
    for seed in range(4):
        text = compute(e, str(seed))
        thrown = judge(text, e, CONFIG, set())
        assert thrown is None, (thrown, text)
        false = replace(e, answer="C" if "C. " in question else "B" if answer == "A" else "7.7")
        assert judge(compute(false, str(seed)), false, CONFIG, set()) == "answer"


def test_perspective_against_an_independent_angle():
    """c's bearing in degrees from the way a -> b, by atan2 in the plane seen from above."""
    rng, asked = np.random.default_rng(0), 0
    for _ in range(60):
        a, b, c = rng.uniform((-2, -1, 2), (2, 1, 6), (3, 3)).round(2)
        (fx, _, fz), (tx, _, tz) = b - a, c - a
        # clockwise from above
        bearing = math.degrees(math.atan2(tx, tz) - math.atan2(fx, fz)) % 360
        mentions = ("red bbox", "blue bbox", "green bbox")
        objects = dict(zip(mentions, (a.tolist(), b.tolist(), c.tolist()), strict=True))
        sine, cosine = math.sin(math.radians(bearing)), math.cos(math.radians(bearing))
        for options, truth, clear in (
            (("left", "right"), bearing < 180, abs(sine)),
            (("behind", "in front"), not 90 < bearing < 270, abs(cosine)),
        ):
            question = (
                "Standing at the red bbox <mask> and facing the blue bbox <mask>, where is the "
                f"green bbox <mask>? A. {options[0]} B. {options[1]}"
            )
            e = replace(
                ONE,
                question=question,
                answer="AB"[truth],
                objects=objects,
                names={},
                regions=ONE.regions[:1] * 3,
            )
            if clear > 0.1:
                asked += 1
                assert judge(compute(e, "0"), e, CONFIG, set()) is None, (
                    objects,
                    question,
                    compute(e, "0"),
                )
    assert asked > 80


def test_samples_differ_and_the_fullest_is_kept():
    texts = {compute(ONE, str(k)) for k in range(20)}
    assert len(texts) > 5
    bare, both = "so the answer is 1.6", "from red bbox to blue bbox 1 + 1 = 2"
    assert coldstart.best([bare, "red bbox, 1 + 1 = 2", both, both + " "], ONE) == both
    assert coldstart.best([], ONE) is None


def test_masks_arrays_and_opened_images_become_files(tmp_path):
    mask = np.zeros((48, 64), bool)
    mask[10:20, 5:50] = True
    depth = np.full((48, 64), 2.345, np.float32)
    depth[0, 0] = np.nan
    e = replace(ONE, regions=[(0, mask), (0, (1, 2, 30, 40))], depths=[depth], rationale="r")
    row = coldstart.as_row(e, "because", tmp_path)
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    (back,) = data.load([tmp_path])
    assert (
        back.regions == [(0, (5, 10, 50, 20)), (0, (1, 2, 30, 40))] and back.rationale == "because"
    )
    stored = np.asarray(Image.open(back.depths[0]))
    assert stored[0, 0] == 0 and (stored.ravel()[1:] == 2345).all()


# ---- the expert
def test_a_random_expert_is_thrown_out_and_goes_on_where_it_stopped(
    rooms, tiny, tmp_path, monkeypatch
):
    whole, cut = (
        Config(
            (str(rooms),), tmp_path / name, expert=str(tiny), samples=2, limit=6, max_new_tokens=12
        )
        for name in ("whole", "cut")
    )
    summary = coldstart.main(whole)
    total = sum(summary.values(), Counter())
    assert total["grammar"] == total["samples"] == 12 and total["kept"] == 0
    assert (whole.out / "rows.jsonl").read_text() == ""
    coldstart.main(replace(cut, limit=4))
    with open(cut.out / "tried.jsonl", "a") as file:
        file.write('{"id": "torn')
    asked = []
    with_hint = coldstart.with_hint
    monkeypatch.setattr(
        coldstart, "with_hint", lambda e, cfg: asked.append(e.id) or with_hint(e, cfg)
    )
    coldstart.main(cut)
    assert len(asked) == 2
    for name in ("tried.jsonl", "summary.json", "rows.jsonl"):
        assert (cut.out / name).read_text() == (whole.out / name).read_text()


def test_what_a_good_expert_writes_is_kept(rooms, tmp_path, monkeypatch):
    """Of one right and one wrong sample a question, the right one, with the truth's own detect."""

    def texts(e):
        leak = target(e).replace("</think>", " By the ground truth.</think>")
        return [leak, target(e), target(e)]

    monkeypatch.setattr(
        coldstart, "sampler", lambda cfg: lambda examples: [texts(e) for e in examples]
    )
    summary = coldstart.main(
        Config((str(rooms),), tmp_path, expert="any", samples=3, words=(1, 300))
    )
    kept = {(e.id, e.path): e.rationale for e in data.load([tmp_path])}
    wrote = {(e.id, e.path): e.rationale for e in data.load([rooms])}
    assert kept.items() <= wrote.items() and len(kept) > 0.9 * len(wrote)
    assert summary["lor"]["leak"] == summary["lor"]["questions"]


def test_the_expert_is_told_the_answer_and_on_dtr_the_scene_graph():
    for path in ("dtr", "lor"):
        question = coldstart.with_hint(replace(ONE, path=path), CONFIG).question
        assert question.startswith(QUESTION) and question.count("<mask>") == 2
        assert "1.6" in question[len(QUESTION) :]
        assert ("0.61,-0.01,4.52" in question) == (path == "dtr")


# ---- what a user can mend
def test_bad_input_is_named(rooms, tmp_path):
    with pytest.raises(UserError, match="no such file or folder: none"):
        coldstart.main(Config(("none",), tmp_path / "a"))
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(UserError, match="--out .*file"):
        coldstart.main(Config((str(rooms),), tmp_path / "file", limit=2))
    with pytest.raises(UserError, match="--samples 0"):
        coldstart.main(Config((str(rooms),), tmp_path / "b", samples=0))
    with pytest.raises(UserError, match="no such directory"):
        coldstart.main(Config((str(rooms),), tmp_path / "c", expert="./none", limit=2))
    # the other settings were not tried yet
    coldstart.main(Config((str(rooms),), tmp_path / "c", limit=2))
    coldstart.main(Config((str(rooms),), tmp_path / "d", limit=2))
    with pytest.raises(UserError, match="was begun with --seed 0, now it is 1"):
        coldstart.main(Config((str(rooms),), tmp_path / "d", limit=2, seed=1))
    row = json.loads((rooms / "rows.jsonl").read_text().splitlines()[0]) | {"path": "direct"}
    (tmp_path / "direct.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match="no row on path lor or dtr"):
        coldstart.main(Config((f"scenes:{tmp_path / 'direct.jsonl'}@{rooms}",), tmp_path / "e"))


def test_without_an_expert_no_torch_is_imported():
    source = Path(coldstart.__file__).read_text()
    assert "\nimport torch" not in source and "\nfrom model" not in source
