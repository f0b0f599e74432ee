"""The reward of the paper's official code, bugs included: what score(..., rules="official") gives.

It is there to compare with runs of that code, and to show what its reward pays for
(tests/method/test_hacks.py has every hole beside what srreal.py makes of it). It was written from a
description of what the official code computes, not from its text.
"""

import math
import re

# An atomic group (?>) is never entered twice, so the time stays linear in the text.
FORMS = {
    "lor": "<think>(?>.*?</think><answer>).*</answer>",
    "dtr": "<detect>(?>.*?</detect><think>)(?>.*?</think><answer>).*</answer>",
}
COUNTED = ("<think>", "</think>", "<answer>", "</answer>")
# What its grader takes for a letter, in upper case.
LETTER_FORMS = ("{}", "({})", "[{}]", "{{{}}}", r"\TEXT{{{}}}")
# The look-behind, too, keeps the time linear.
PAIR = re.compile(r"(?<!\w)(\w+):([+-]?(?:\d+\.?\d*|\.\d+))")
ITEM = re.compile(r'<3d_box center="([^"]*)">([^<]*)</3d_box>')
FRAME_PREFIX = "After aligning to the reference frame "


def rewards(response: str, example, several_views: bool, steps) -> dict[str, float]:
    """Return accuracy (nan where the answer is "nan"), format, and detect (it may exceed 1).

    example: a srreal.Example on path lor or dtr, else ValueError. steps: (limit, points) of a
    distance, in metres.
    """
    if example.path not in FORMS:
        raise ValueError(f"{example.path!r} is none of the official paths: {', '.join(FORMS)}")
    # White space around these goes, also in `a / b`.
    for mark in "<>/":
        response = mark.join(part.strip() for part in response.split(mark))
    tags_once = all(response.count(tag) == 1 for tag in COUNTED)

    accuracy = 0.0
    answer = first_block(response, "answer")
    if tags_once and "\n" not in answer:
        accuracy = answer_score(answer, example.answer)

    has_form = re.fullmatch(FORMS[example.path], response, re.S) is not None
    # On dtr nobody counts the tags.
    if example.path == "lor" and not tags_once:
        has_form = False

    detect = 0.0
    if example.path == "dtr":
        detect = detection(first_block(response, "detect"), example, several_views, steps)
    return {"accuracy": accuracy, "format": float(has_form), "detect": detect}


def first_block(text: str, tag: str) -> str:
    inside, closing, _ = text.partition(f"<{tag}>")[2].partition(f"</{tag}>")
    return inside if closing else ""


def answer_score(answer: str, truth: str) -> float:
    """Score an answer: 0 earns e^-2, "nan" is a number, and extra motions are free."""
    if truth in ("A", "B", "C", "D", "E"):
        return float(answer.upper() in [form.format(truth) for form in LETTER_FORMS])
    try:
        if "move_" in truth:
            return motion_score(answer, truth)
        return round(decay(answer, truth), 2)
    except (ValueError, ZeroDivisionError):
        return 0.0


def motion_score(answer: str, truth: str) -> float:
    said = dict(PAIR.findall(answer))
    true = dict(PAIR.findall(truth))
    scores = [decay(said[key], true[key]) for key in true if key in said]
    return round(sum(scores) / len(true), 2)


def decay(x: str, true: str) -> float:
    return math.exp(-2 * abs(float(x) - float(true)) / (abs(float(true)) + 0.01))


def detection(text: str, example, several_views: bool, steps) -> float:
    """Compare the first name with a mention in it, and the last box of that name; divide by the
    number of names. Any failure is 0."""
    try:
        found = {}
        for centre, name in ITEM.findall(text):
            found[name] = [float(v) for v in centre.split(",")]
        truth = example.objects
        if several_views:
            # There the frame is one character, compared with the number 0 in a "first image"
            # question: never equal.
            if "first image" in example.question:
                return 0.0
            frame = text[len(FRAME_PREFIX)]
            truth = {mention: in_view(views, frame) for mention, views in truth.items()}
        total = 0.0
        for mention, true in truth.items():
            phrase = mention.replace("_", " ")
            centre = next((xyz for name, xyz in found.items() if phrase in name), None)
            if centre is not None:
                # A centre of one number is compared on x alone.
                total += points(math.dist(centre[:3], true[: len(centre)]), steps)
        return total / len(found)
    except (ValueError, KeyError, IndexError, ZeroDivisionError):
        return 0.0


def in_view(views: dict, character: str):
    """Return the centre in the view that this one character names: 10 reads as 1."""
    by_text = {str(view): centre for view, centre in views.items()}
    return by_text[character]


def points(distance: float, steps) -> float:
    for limit, value in steps:
        if distance < limit:
            return value
    return 0.0
