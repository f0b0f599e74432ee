"""Rationales computed from the truth: `compute(example, seed)` writes a response.

A rule takes the question and its things in order, and returns three: a number, or the words (as
regular expressions) that the right option has; how DTR works it out, in equations; how LOR says it.
It works with the centres as the detect block has them, rounded. A truth that doesn't follow from
these is not argued for: the response has another answer then, and data/coldstart.py throws it out.

To add a rule, write such a function and enter it in SPAR (by a task's name) or RULES (by words).
"""

import math
import random
import re
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from data.arithmetic import NUMBER, WAYS, by_sign, half_unit, rounded
from data.benchmarks.answers import OPTION
from srreal import Example, as_answer, number, parse, target, write_detect


class Thing(NamedTuple):
    text: str
    mention: str
    at: tuple[float, float, float]  # as the detect block has it


class Hop:
    """The way from one thing to another: its steps and length, and how both paths say it."""

    def __init__(self, a: Thing, b: Thing):
        changes = []
        ways = []
        self.steps = []
        for axis, names, p, q in zip("xyz", WAYS, a.at, b.at, strict=True):
            step = rounded(q - p)
            self.steps.append(step)
            changes.append(f"d{axis} = {minus(q, p)}")
            ways.append(f"{abs(step):.1f} m {by_sign(step, names)}")
        square = rounded(sum(step * step for step in self.steps))
        self.distance = rounded(math.sqrt(square))
        squares = " + ".join(f"{bracket(step)}^2" for step in self.steps)
        start = f"From {a.text} to {b.text}"
        self.words = f"{start} it is about {ways[0]}, {ways[1]} and {ways[2]}"
        self.working = (
            f"{start}: {', '.join(changes)}. The distance is sqrt({squares}) = "
            f"sqrt({square}) = {self.distance}"
        )


CAMERA = Thing("the camera", "camera", (0.0, 0.0, 0.0))
# By axis, as WAYS, but patterns in the words of questions and options.
AXES = (
    ("left", "right"),
    ("above|higher", "below|lower"),
    ("front|nearer|closer", "behind|farther|further"),
)
# In "relative to a, where is b?" it is b that is asked for.
REFERENCE = re.compile(
    r"\b(relative to|relation to|respect to|compared (to|with)|from)\s[\w\s]*\(?$", re.I
)
EXTREME = r"(near|clos|farth|furth)(?:er|est)\b(?P<than> to| from)?"
OBSERVER = re.compile(r"\W*(?:the )?(?:camera|observer|viewer|you|me)\b", re.I)


def bracket(value) -> str:
    return f"({value})" if value < 0 else f"{value}"


def minus(q, p) -> str:
    return f"{q} - {bracket(p)} = {rounded(q - p)}"


# ---- rules


def depth(question, a, b=None):
    """Find how deep a is, or by how much a and b differ in depth."""
    z = a.at[2]
    words = f"{a.text} is about {z:.1f} m deep"
    if b is None:
        working = f"The depth of {a.text} is the z of its centre: {z}"
        return z, working, f"{words} in the view"
    step = minus(b.at[2], z)
    working = f"From {a.text} to {b.text} the depth changes by dz = {step}"
    words = f"{words} and {b.text} is about {b.at[2]:.1f} m deep"
    return abs(rounded(b.at[2] - z)), working, words


def told_depth(question, *things):
    """Find the depth, or the difference, that SPAR asks for: it tells that of what is red."""
    return depth(question, *(thing for thing in things if not thing.mention.startswith("red")))


def distance(question, a, b=None):
    if b is None:
        hop = Hop(CAMERA, a)
        words = f"From the camera it is about {hop.distance:.1f} m to {a.text}"
        return hop.distance, hop.working, words
    hop = Hop(a, b)
    return hop.distance, hop.working, hop.words


def extreme(question, *things):
    """Find which thing is closest to (or farthest from) one of them, or the camera."""
    match = re.search(EXTREME, question, re.I)
    # A task of SPAR's may be worded otherwise.
    if match is None:
        return [], "", ""
    anchor = anchor_of(question, match, things)
    others = [thing for thing in things if thing is not anchor]
    distances = []
    workings = []
    for thing in others:
        if anchor is CAMERA:
            distances.append(thing.at[2])
            workings.append(f"The depth z of {thing.text} is {thing.at[2]}")
        else:
            hop = Hop(anchor, thing)
            distances.append(hop.distance)
            workings.append(hop.working)
    stem = match[1].lower()
    wanted = min(distances) if stem in ("near", "clos") else max(distances)
    best = others[distances.index(wanted)].mention
    order = " < ".join(map(str, sorted(distances)))
    word = f"{stem}er" if len(others) == 2 else f"{stem}est"
    words = " and ".join(
        f"about {metres:.1f} m to {thing.text}"
        for metres, thing in zip(distances, others, strict=True)
    )
    # An option has the whole mention, or its first word: a colour.
    return (
        [f"{re.escape(best)}|\\b{re.escape(best.split()[0])}\\b"],
        f"{'. '.join(workings)}. {order}, and {word} is {best}",
        f"From {anchor.text} it is {words}",
    )


def anchor_of(question, match, things):
    """Return what is measured from: "closer to a: b or c", or "closer: b or c to a"."""
    behind = question[match.end() :]
    if not match["than"]:
        parts = re.split(r"\b(?:to|from)\b", behind)
        behind = parts[-1] if " to " in behind else ""
    # Closer to the camera, to the observer, to you.
    if OBSERVER.match(behind):
        return CAMERA
    named = [thing for thing in things if thing.mention in behind]
    return min(named, key=lambda thing: behind.find(thing.mention), default=CAMERA)


def relation(question, a, b):
    """Find where a is, seen from b, along those axes of the camera that the question names."""
    # The first thing that is named may be the one to look from.
    if REFERENCE.search(question[: question.find(a.mention)]):
        a, b = b, a
    hop = Hop(b, a)
    found = []
    workings = []
    for axis, names, ways, step, p, q in zip("xyz", AXES, WAYS, hop.steps, b.at, a.at, strict=True):
        if re.search("|".join(names), question, re.I):
            found.append(by_sign(step, names))
            workings.append(
                f"along {axis}, {a.text} is at {minus(q, p)} from {b.text}, which is "
                f"{by_sign(step, ways)}"
            )
    return found, "; ".join(workings), hop.words


def perspective(question, a, b, c):
    """Find where c is for someone at a who faces b: by dot and cross product, seen from above."""
    ahead = Hop(a, b)
    there = Hop(a, c)
    fx, _, fz = ahead.steps
    tx, _, tz = there.steps
    found = []
    start = f"From {a.text}, {b.text} is dx {fx}, dz {fz} away, and {c.text} dx {tx}, dz {tz}"
    workings = [start]
    front, behind = AXES[2]
    # The cross product is negative on the left, the dot product behind.
    products = ((AXES[0], fz, rounded(-fx)), ((behind, front), fx, fz))
    for names, i, j in products:
        if re.search("|".join(names), question, re.I):
            total = rounded(i * tx + j * tz)
            found.append(by_sign(total, names))
            negative = names[0].partition("|")[0]
            workings.append(f"{i} * {tx} + {j} * {tz} = {total}, and negative is {negative}")
    if re.search("|".join(AXES[1]), question, re.I):
        found.append(by_sign(c.at[1] - a.at[1], AXES[1]))
        step = minus(c.at[1], a.at[1])
        workings.append(f"Along y, {c.text} is {step} from {a.text}, and negative is above")
    words = f"{ahead.words}; {there.words.replace('From', 'from', 1)}"
    return found, ". ".join(workings), words


class Rule(NamedTuple):
    sign: str  # how a task's name begins, or a pattern of what the question says
    counts: tuple[int, ...]  # of things that it is for
    find: Callable


SPAR = (
    Rule("depth_prediction_oc", (2,), told_depth),
    Rule("depth_prediction_oo", (3,), told_depth),
    Rule("distance_prediction", (1, 2), distance),
    Rule("distance_infer_center", (3,), extreme),
    Rule("obj_spatial_relation", (2,), relation),
    Rule("spatial_imagination_oc", (3,), perspective),
)
# The first that fits; the truth decides whether it was the right one.
RULES = (
    Rule("standing|facing|imagine|perspective", (3,), perspective),
    Rule(EXTREME, (2, 3, 4), extreme),
    Rule("depth|deep", (1, 2), depth),
    Rule("far|distance|apart", (1, 2), distance),
    Rule("left|right|above|below|front|behind|higher|lower", (2,), relation),
)


# ---- responses

# Several of each, or a model would learn one sentence by heart.
STARTS = (
    "",
    "",
    "In metres, x right, y down, z forward. ",
    "First the positions. ",
    "Step by step. ",
)
ENDS = (
    ", so the answer is {}.",
    ". So the answer is {}.",
    ". That makes the answer {}.",
    ". The answer is {}.",
)


def compute(e: Example, seed: str) -> str | None:
    """Return a response whose rationale follows from the centres, wordings drawn by the seed.

    None without centres, or a rule for the question.
    """
    # By id and path, so that wordings don't depend on which other rows there are.
    rng = random.Random(f"{seed} {e.id} {e.path}")
    form = rng.choice(("the {} ({})", "the {} at the {}"))
    things = things_of(e, form)
    rule = rule_for(e, len(things))
    if rule is None:
        return None
    found, working, words = rule.find(asked_of(e, rule), *things)
    answer = conclude(found, e)
    if e.path == "dtr":
        start = rng.choice(STARTS)
        text = working
    else:
        start = ""
        text = words
    end = rng.choice(ENDS).format(answer)
    rationale = f"{start}{text[:1].upper()}{text[1:]}{end}"
    return target(replace(e, rationale=rationale, answer=answer))


def things_of(e: Example, form: str) -> list[Thing]:
    """Return what the detect block has, none where there can't be one."""
    if not is_teachable(e, "dtr"):
        return []
    things = []
    for mention, name, at in centres(e):
        text = form.format(name, mention) if name != mention else mention
        things.append(Thing(text, mention, at))
    return things


def rule_for(e: Example, count: int) -> Rule | None:
    """Return the rule for the task, where it is SPAR's, else for the question's words."""
    for rule in SPAR:
        if (e.task or "").startswith(rule.sign) and count in rule.counts:
            return rule
    for rule in RULES:
        if count in rule.counts and re.search(rule.sign, asked_of(e, rule), re.I):
            return rule
    return None


# Options hold words by which a rule would be chosen that the question doesn't call for.
def asked_of(e: Example, rule: Rule) -> str:
    """Return the question, without its options where these don't say what is asked for."""
    if rule.find in (relation, perspective):
        return e.question
    return OPTION.sub("", e.question)


def conclude(found: float | list[str], e: Example) -> str:
    """Return the answer that follows: the truth's own text where they agree."""
    if isinstance(found, float):
        # The truth is rounded to its last digit, and what is computed comes from rounded centres.
        true = as_answer(e.answer)
        unit = half_unit(true) if NUMBER.fullmatch(true) else 0
        is_true = abs(found - number(true)) < max(unit + 0.01, 0.02 * found)
        return true if is_true else str(found)
    options = dict(OPTION.findall(e.question)) or {e.answer: e.answer}
    # An open question has its own truth as the only option.
    fits = []
    for letter, text in options.items():
        if all(re.search(word, text, re.I) for word in found):
            fits.append(letter)
    return fits[0] if found and len(fits) == 1 else "unknown"


def centres(e: Example) -> list:
    """Return (mention, name, (x, y, z)) as its <detect> has them, in the question's order."""
    response = f"<detect>{write_detect(e)}</detect><think>-</think><answer>-</answer>"
    boxes = parse(response, "dtr").boxes
    # A mention that the question lacks (-1) comes last.
    return sorted(boxes, key=lambda box: e.question.find(box[0]) % 10**9)


def is_teachable(e: Example, path: str, think: str = "-") -> bool:
    """Return whether it has a target with that rationale."""
    try:
        target(replace(e, path=path, rationale=think))
    except ValueError:
        return False
    return True
