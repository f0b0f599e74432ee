"""Ways to earn more than an answer is worth: what each got from the official code, and what it gets
here.

Every number is worked out by hand. The hacks are numbered B1 to B18,
as in the test names; B15 and B17 are properties
of the paper's reward rather than mistakes, and are kept.
"""

import math
from collections import namedtuple

import pytest

from srreal import Example, score, weights_of

# What is compared here, whatever rewards a fork adds.
Scores = namedtuple("Scores", "total accuracy format detect")

RED, BLUE, GREEN = (0.0, 0.0, 2.0), (1.0, 0.0, 3.0), (-1.0, 0.0, 4.0)
THREE = {"red bbox": RED, "blue bbox": BLUE, "green bbox": GREEN}


def example(path="dtr", answer="B", question="Which is nearer?", objects=None, frame=None):
    return Example(
        "e",
        path,
        ["a.png"],
        question,
        answer,
        objects=THREE if objects is None else objects,
        frame=frame,
    )


def box(name, centre):
    xyz = centre if isinstance(centre, str) else ",".join(map(str, centre))
    return f'<3d_box center="{xyz}">{name}</3d_box>'


def dtr(*lines, count=None, answer="B", think="so", frame=None):
    count = len(lines) if count is None else count
    head = "Find" if frame is None else f"After aligning to the reference frame {frame}, find"
    block = "\n".join([f"{head} {count} relevant objects:", *lines])
    return f"<detect>{block}</detect>\n<think>{think}</think>\n<answer>{answer}</answer>"


def lor(answer, think="so"):
    return f"<think>{think}</think>\n<answer>{answer}</answer>"


def both(response, e):
    return four(score(response, e)), four(score(response, e, rules="official"))


def four(scores):
    return Scores(scores.total, scores.accuracy, scores.format, scores.detect)


def by_weights(e, accuracy, format, detect=0.0):
    """Scores of these parts, with the total that the path's weights make of them."""
    weights = weights_of(e)
    parts = {"accuracy": accuracy, "format": format, "detect": detect}
    total = sum(weights[name] * part for name, part in parts.items())
    return Scores(total, accuracy, format, detect)


ALL = [box(f"chair ({mention})", centre) for mention, centre in THREE.items()]


def test_an_honest_answer_earns_everything_under_both_rules():
    strict, official = both(dtr(*ALL), example())
    assert strict == official == Scores(1.0, 1.0, 1.0, 1.0)
    assert both(lor("B"), example("lor")) == (Scores(1.0, 1.0, 1.0, 0.0),) * 2
    assert both(dtr(*ALL), example(objects={}))[1] == Scores(1.0, 1.0, 1.0, 0.0)


def test_b1_frame_0_of_a_first_image_question():
    e = example(
        question="In the first image, which is nearer?",
        objects={"red bbox": {0: RED, 1: BLUE}},
        frame=0,
    )
    strict, official = both(dtr(box("chair (red bbox)", RED), frame=0), e)
    # there: the text "0" never equals the number 0
    assert (strict.detect, official.detect) == (1.0, 0.0)
    strict, official = both(dtr(box("chair (red bbox)", BLUE), frame=1), e)
    assert (strict.detect, official.detect) == (0.0, 0.0)


def test_b2_frames_of_two_digits():
    e = example(objects={"red bbox": {1: BLUE, 10: RED}})
    strict, official = both(dtr(box("chair (red bbox)", RED), frame=10), e)
    # there: compared with frame 1, sqrt(2) m away
    assert (strict.detect, official.detect) == (1.0, 0.0)
    strict, official = both(dtr(box("chair (red bbox)", BLUE), frame=10), e)
    assert (strict.detect, official.detect) == (0.0, 1.0)
    e = example(objects={"red bbox": {10: RED}})
    strict, official = both(dtr(box("chair (red bbox)", RED), frame=7), e)
    assert (strict.detect, official.detect) == (0.0, 0.0)


def test_b3_predicting_the_easy_object_only():
    strict, official = both(dtr(ALL[0]), example())
    assert strict.detect == pytest.approx(1 / 3) and strict.total == pytest.approx(0.9 + 0.1 / 3)
    assert official == Scores(1.0, 1.0, 1.0, 1.0)


def test_b4_one_box_with_every_mention():
    near = {"red bbox": RED, "blue bbox": RED}
    strict, official = both(dtr(box("red bbox blue bbox", RED)), example(objects=near))
    assert official.detect == 2.0 and official.total == pytest.approx(1.1)
    assert strict.detect == 0.0
    strict, official = both(dtr(box("chair (red bbox) (blue bbox)", RED)), example(objects=near))
    assert (strict.detect, official.detect) == (0.5, 2.0)


@pytest.mark.parametrize(
    "centre, theirs", [("0.0", 1.0), ("0.0,0.0", 1.0), ("0.0,0.0,2.0,9", 1.0), ("0.0,", 0.0)]
)
def test_b5_centres_with_missing_coordinates(centre, theirs):
    strict, official = both(
        dtr(box("chair (red bbox)", centre)), example(objects={"red bbox": RED})
    )
    assert official.detect == theirs and strict == Scores(0.0, 0.0, 0.0, 0.0)


def test_b6_repeated_names_as_free_retries():
    wrong, right = box("chair (red bbox)", GREEN), box("chair (red bbox)", RED)
    e = example(objects={"red bbox": RED})
    strict, official = both(dtr(wrong, wrong, right), e)
    assert (strict.detect, official.detect) == (0.0, 1.0)
    strict, official = both(dtr(right, wrong), e)
    assert (strict.detect, official.detect) == (0.5, 0.0)


def test_b7_camera_motion_in_both_directions():
    truth = "move_right:0.4,rotate_left:30"
    hedge = "move_right:0.4,move_left:0.4,rotate_left:30,rotate_right:30,move_up:1"
    strict, official = both(lor(hedge), example("lor", truth))
    assert official.accuracy == 1.0
    # Three axes: .4 and 30 answered with 0 (r = .4 / .41 and 30 / 30.01), and one that does not
    # move (0).
    floor = math.exp(-2)
    by_hand = sum((math.exp(-2 * r) - floor) / (1 - floor) for r in (0.4 / 0.41, 30 / 30.01)) / 3
    assert strict.accuracy == pytest.approx(by_hand, abs=1e-12) and strict.accuracy < 0.01
    strict, official = both(lor("move_right:0.4"), example("lor", truth))
    assert official.accuracy == 0.5  # there: a missing key scores 0


def test_b8_constant_guesses():
    strict, official = both(lor("0"), example("lor", "2.0"))
    assert official.accuracy == round(math.exp(-4 / 2.01), 2) == 0.14
    assert strict.accuracy == pytest.approx(
        (math.exp(-4 / 2.01) - math.exp(-2)) / (1 - math.exp(-2)), abs=1e-12
    )
    assert strict.accuracy < 0.002
    strict, official = both(lor("4.0"), example("lor", "2.0"))
    assert official.accuracy == 0.14 and strict.accuracy < 0.002
    strict, official = both(lor("5.0"), example("lor", "2.0"))
    assert official.accuracy == 0.05 and strict.accuracy == 0.0


def test_b9_nan():
    strict, official = both(lor("nan"), example("lor", "2.0"))
    assert math.isnan(official.accuracy) and math.isnan(official.total)
    assert strict == pytest.approx((0.2, 0.0, 1.0, 0.0))
    strict, official = both(lor("inf"), example("lor", "2.0"))
    assert strict.accuracy == official.accuracy == 0.0
    strict, official = both(lor("2e0"), example("lor", "2.0"))
    assert (strict.accuracy, official.accuracy) == (0.0, 1.0)
    strict, official = both(
        dtr(box("chair (red bbox)", "nan,nan,nan")), example(objects={"red bbox": RED})
    )
    assert (strict.total, official.detect) == (0.0, 0.0)


@pytest.mark.parametrize(
    "said, truth",
    [
        ("1.5 m", "1.5"),
        ("150 cm", "1.5"),
        ("1.5 m.", "1.5"),
        ("B.", "B"),
        ("B)", "B"),
        ("B. left", "B"),
    ],
)
def test_b10_units_and_trailing_dots(said, truth):
    strict, official = both(lor(said), example("lor", truth))
    assert (strict.accuracy, official.accuracy) == (1.0, 0.0)


@pytest.mark.parametrize("said", ["B", "b", "(B)", "[B]", "{B}"])
def test_b10_letters_that_both_accept(said):
    assert [scores.accuracy for scores in both(lor(said), example("lor"))] == [1.0, 1.0]


def test_b10_letters_that_neither_or_one_accepts():
    for said in ("Option B", '"B"', "C", "A or B"):
        assert [scores.accuracy for scores in both(lor(said), example("lor"))] == [0.0, 0.0]
    assert [scores.accuracy for scores in both(lor(r"\text{B}"), example("lor"))] == [0.0, 1.0]


def test_b11_an_answer_with_a_line_break():
    for gap, theirs in ((" ", 1.0), ("\n", 0.0)):
        e = example("lor", "move_right:0.4,rotate_left:30")
        strict, official = both(lor(f"move_right:0.4,{gap}rotate_left:30"), e)
        assert (strict.accuracy, strict.format, official.accuracy, official.format) == (
            1.0,
            1.0,
            theirs,
            1.0,
        )


def test_b12_format_credit_for_nothing():
    strict, official = both("<detect></detect><think></think><answer>B</answer>", example())
    assert official == pytest.approx((0.9, 1.0, 1.0, 0.0)) and strict == Scores(0.0, 0.0, 0.0, 0.0)
    e = example("lor")
    strict, official = both(lor("B", think=""), e)
    assert official == by_weights(e, 1.0, 1.0) and strict == Scores(0.0, 0.0, 0.0, 0.0)


def test_b13_two_answers():
    strict, official = both(dtr(*ALL) + "<answer>C</answer>", example())
    assert official == pytest.approx((0.2, 0.0, 1.0, 1.0)) and strict == Scores(0.0, 0.0, 0.0, 0.0)
    # here they count the tags
    strict, official = both(lor("B") + "<answer>C</answer>", example("lor"))
    assert strict == official == Scores(0.0, 0.0, 0.0, 0.0)


def test_b14_the_stated_count():
    for count in (0, 2, 4):
        strict, official = both(dtr(*ALL, count=count), example())
        assert official == Scores(1.0, 1.0, 1.0, 1.0) and strict == Scores(0.0, 0.0, 0.0, 0.0)


@pytest.mark.parametrize("depth", [1.0, 8.0])
def test_b15_steps_are_in_absolute_metres_under_both_rules(depth):
    table = (0.05, 1.0), (0.15, 0.8), (0.25, 0.6), (0.35, 0.4), (0.5, 0.2), (0.9, 0.1), (1.1, 0.0)
    for off, expected in table:
        e = example(objects={"red bbox": (0.0, 0.0, depth)})
        strict, official = both(dtr(box("chair (red bbox)", (off, 0.0, depth))), e)
        assert strict.detect == official.detect == expected


def test_b16_groups_that_differ_in_detection_only():
    """Accuracy stands apart in Scores, so that groups are filtered on it: this one teaches
    nothing."""
    e = example(objects={"red bbox": RED})
    group = [score(dtr(box("chair (red bbox)", (off, 0.0, 2.0))), e) for off in (0, 0.15, 0.25)]
    assert [scores.total for scores in group] == pytest.approx([1.0, 0.98, 0.96])
    assert max(s.accuracy for s in group) - min(s.accuracy for s in group) == 0.0


def test_b17_a_rationale_that_contradicts_its_detections_costs_nothing():
    for think in ("the red one is at 2 m", "the red one is at 90 m", "no"):
        assert both(dtr(*ALL, think=think), example()) == (Scores(1.0, 1.0, 1.0, 1.0),) * 2


def test_b18_the_choice_of_the_frame():
    views = {"red bbox": {0: RED, 1: BLUE, 2: GREEN}}
    for frame, centre in views["red bbox"].items():
        response = dtr(box("chair (red bbox)", centre), frame=frame)
        strict, official = both(response, example(objects=views))
        assert strict.detect == official.detect == 1.0  # nobody asked for a frame: any will do
        e = example(objects=views, frame=1, question="Seen from the second image?")
        strict, official = both(response, e)
        assert (strict.detect, official.detect) == (float(frame == 1), 1.0)


def test_official_white_space_and_slashes():
    e = example("lor", "move_right:0.4")
    spread = " < think > so < / think >\n< answer > move_right:0.4 </ answer > "
    strict, official = both(spread, e)
    assert official == by_weights(e, 1.0, 1.0) and strict == Scores(0.0, 0.0, 0.0, 0.0)
    named = {"tv / lamp": RED}
    assert score(dtr(box("tv / lamp", RED)), example(objects=named)).detect == 1.0
    assert (
        score(dtr(box("tv / lamp", RED)), example(objects=named), rules="official").detect == 0.0
    )  # reads tv/lamp


def test_official_first_block_and_first_name():
    e = example(objects={"red bbox": RED})
    near, far = box("old red bbox", RED), box("red bbox", GREEN)
    # the first name with the mention in it
    assert score(dtr(near, far), e, rules="official").detect == 0.5
    assert score(dtr(far, near), e, rules="official").detect == 0.0
    for first, second, theirs in ((near, far, 1.0), (far, near, 0.0)):
        response = f"<detect>{first}</detect>{dtr(second)}"
        assert (
            score(response, e, rules="official").detect == theirs
            and score(response, e).total == 0.0
        )


def test_official_keys_with_underscores_and_text_truths():
    e = example(objects={"red_bbox": RED})
    assert score(dtr(box("chair (red bbox)", RED)), e, rules="official").detect == 1.0
    assert both(lor("a chair"), example("lor", "a chair"))[1].accuracy == 0.0  # no number
    # no move_
    assert both(lor("rotate_left:30"), example("lor", "rotate_left:30"))[1].accuracy == 0.0
    assert both("B", example())[1] == Scores(0.0, 0.0, 0.0, 0.0)


def test_ill_formed_responses_earn_nothing_here():
    """Where accuracy pays without the format, the policy learns to leave out the detect block."""
    strict, official = both(lor("B"), example())
    assert official.accuracy == 1.0 and strict == Scores(0.0, 0.0, 0.0, 0.0)
