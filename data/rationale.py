"""Rationales computed from the truth: `compute(example, seed)` writes a response, wordings drawn by
the seed.

A rule takes the question and its things in order, and returns a number, or the words (as regular
expressions) that the right option has; how DTR works it out, in equations; how LOR says it. It
works with the centres as the detect block has them, rounded. A truth that doesn't follow from these
is not argued for: the response has another answer then, and data/coldstart.py throws it out.
"""

import math
import random
import re
from collections import namedtuple
from dataclasses import replace

from data.arithmetic import NUMBER, half_unit
from data.benchmarks.answers import OPTION
from srreal import Example, number, parse, target, write_detect

Thing = namedtuple("Thing", "text mention at")  # at: (x, y, z) as the detect block has it
CAMERA = Thing("the camera", "camera", (0.0, 0.0, 0.0))
WAYS = (("left", "right"), ("up", "down"), ("nearer", "farther"))
AXES = (
    ("left", "right"),
    ("above|higher", "below|lower"),
    ("front|nearer|closer", "behind|farther|further"),
)
REFERENCE = re.compile(
    r"\b(relative to|relation to|respect to|compared (to|with)|from)\s[\w\s]*\(?$", re.I
)
EXTREME = r"(near|clos|farth|furth)(?:er|est)\b(?P<than> to| from)?"


def r(value) -> float:
    return round(value, 2) + 0.0  # as the detect block writes it; never -0.0


def minus(q, p) -> str:
    return f"{q} - {f'({p})' if p < 0 else p} = {r(q - p)}"


def hop(a, b):
    """From a to b: rounded steps, distance, working, words."""
    steps, start = [r(q - p) for p, q in zip(a.at, b.at, strict=True)], f"From {a.text} to {b.text}"
    total = r(sum(step * step for step in steps))
    far, squares = r(math.sqrt(total)), " + ".join(f"({s})^2" if s < 0 else f"{s}^2" for s in steps)
    working = ", ".join(f"d{x} = {minus(q, p)}" for x, p, q in zip("xyz", a.at, b.at, strict=True))
    words = [f"{abs(step):.1f} m {way[step > 0]}" for step, way in zip(steps, WAYS, strict=True)]
    return (
        steps,
        far,
        f"{start}: {working}. The distance is sqrt({squares}) = sqrt({total}) = {far}",
        f"{start} it is about {words[0]}, {words[1]} and {words[2]}",
    )


def depth(question, a, b=None):
    words, z = [f"{t.text} is about {t.at[2]:.1f} m deep" for t in (a, b) if t], a.at[2]
    if b is None:
        return z, f"The depth of {a.text} is the z of its centre: {z}", f"{words[0]} in the view"
    working = f"From {a.text} to {b.text} the depth changes by dz = {minus(b.at[2], z)}"
    return abs(r(b.at[2] - z)), working, " and ".join(words)


def told_depth(question, *things):
    """SPAR tells the depth of what is red; asked is that of the other, or by how much two others
    differ."""
    return depth(question, *(t for t in things if not t.mention.startswith("red")))


def distance(question, a, b=None):
    _, far, working, words = hop(a, b) if b else hop(CAMERA, a)
    return far, working, words if b else f"From the camera it is about {far:.1f} m to {a.text}"


def extreme(question, *things):
    """Which thing is closest to (or farthest from) one of them, or the camera?"""
    match = re.search(EXTREME, question, re.I)
    rest = question[match.end() :]  # "closer to a: b or c", or "closer: b or c to a"
    behind = (
        rest if match["than"] else re.split(r"\b(?:to|from)\b", rest)[-1] if " to " in rest else ""
    )
    camera = re.match(r"\W*(?:the )?(?:camera|observer|viewer|you|me)\b", behind, re.I)
    named = [] if camera else [t for t in things if t.mention in behind]
    anchor = min(named, key=lambda t: behind.find(t.mention), default=CAMERA)
    rest = [t for t in things if t is not anchor]
    far, working = zip(
        *(
            (t.at[2], f"The depth z of {t.text} is {t.at[2]}")
            if anchor is CAMERA
            else hop(anchor, t)[1:3]
            for t in rest
        ),
        strict=True,
    )
    best = rest[far.index((min if match[1].lower() in ("near", "clos") else max)(far))].mention
    order, word = (
        " < ".join(map(str, sorted(far))),
        f"{match[1].lower()}{'er' if len(rest) == 2 else 'est'}",
    )
    words = " and ".join(f"about {d:.1f} m to {t.text}" for d, t in zip(far, rest, strict=True))
    return (
        [f"{re.escape(best)}|\\b{re.escape(best.split()[0])}\\b"],
        f"{'. '.join(working)}. {order}, and {word} is {best}",
        f"From {anchor.text} it is {words}",
    )


def relation(question, a, b):
    """Where is a, seen from b, along those axes of the camera that the question names?"""
    if REFERENCE.search(question[: question.find(a.mention)]):
        a, b = b, a
    steps, _, _, words = hop(b, a)
    axes = [i for i, names in enumerate(AXES) if re.search("|".join(names), question, re.I)]
    working = [
        f"along {'xyz'[i]}, {a.text} is at {minus(a.at[i], b.at[i])} from {b.text}, which is "
        f"{WAYS[i][steps[i] > 0]}"
        for i in axes
    ]
    return [AXES[i][steps[i] > 0] for i in axes], "; ".join(working), words


def perspective(question, a, b, c):
    """Standing at a, facing b, where is c? By dot and cross product in the camera's x-z plane."""
    (fx, _, fz), (tx, _, tz) = hop(a, b)[0], hop(a, c)[0]
    found, working = (
        [],
        [f"From {a.text}, {b.text} is dx {fx}, dz {fz} away, and {c.text} dx {tx}, dz {tz}"],
    )
    for names, i, j in ((AXES[0], fz, r(-fx)), (AXES[2][::-1], fx, fz)):
        if re.search("|".join(names), question, re.I):
            total = r(i * tx + j * tz)
            found.append(names[total > 0])
            working.append(
                f"{i} * {tx} + {j} * {tz} = {total}, and negative is {names[0].partition('|')[0]}"
            )
    if re.search("|".join(AXES[1]), question, re.I):
        found.append(AXES[1][c.at[1] > a.at[1]])
        working.append(
            f"Along y, {c.text} is {minus(c.at[1], a.at[1])} from {a.text}, and negative is above"
        )
    return found, ". ".join(working), f"{hop(a, b)[3]}; {hop(a, c)[3].replace('From', 'from', 1)}"


SPAR = (  # (how a task's name begins, for how many things, rule)
    ("depth_prediction_oc", (2,), told_depth),
    ("depth_prediction_oo", (3,), told_depth),
    ("distance_prediction", (1, 2), distance),
    ("distance_infer_center", (3,), extreme),
    ("obj_spatial_relation", (2,), relation),
    ("spatial_imagination_oc", (3,), perspective),
)
# (what the question says, for how many things, rule); the truth decides whether it was the right
RULES = (
    ("standing|facing|imagine|perspective", (3,), perspective),
    (EXTREME, (2, 3, 4), extreme),
    ("depth|deep", (1, 2), depth),
    ("far|distance|apart", (1, 2), distance),
    ("left|right|above|below|front|behind|higher|lower", (2,), relation),
)
STARTS = (
    "",
    "",
    "In metres, x right, y down, z forward. ",
    "First the positions. ",
    "Step by step. ",
)
SO = (
    ", so the answer is {}.",
    ". So the answer is {}.",
    ". That makes the answer {}.",
    ". The answer is {}.",
)


def conclude(found, e: Example) -> str:
    """The answer that follows from what a rule found: the truth's own text where they agree."""
    if isinstance(found, float):
        # the truth is rounded to it
        unit = half_unit(e.answer) if NUMBER.fullmatch(e.answer) else 0
        return (
            e.answer
            if abs(found - number(e.answer)) < max(unit + 0.01, 0.02 * found)
            else str(found)
        )
    options = dict(OPTION.findall(e.question)) or {e.answer: e.answer}
    fits = [
        letter
        for letter, text in options.items()
        if all(re.search(word, text, re.I) for word in found)
    ]
    return fits[0] if found and len(fits) == 1 else "unknown"


def centres(e: Example) -> list:
    """(mention, name, (x, y, z)) as the <detect> of its target has them, in the order of the
    question."""
    boxes = parse(
        f"<detect>{write_detect(e)}</detect><think>-</think><answer>-</answer>", "dtr"
    ).boxes
    return sorted(boxes, key=lambda box: e.question.find(box[0]) % 10**9)  # -1, not in it: last


def taught(e: Example, path: str, think: str = "-") -> bool:
    """Whether it has a target with that rationale."""
    try:
        return bool(target(replace(e, path=path, rationale=think)))
    except ValueError:
        return False


def compute(e: Example, seed: str) -> str | None:
    """A response whose rationale follows from the centres; None without them, or a rule for the
    question."""
    rng = random.Random(f"{seed} {e.id} {e.path}")
    form, boxes = (
        rng.choice(("the {} ({})", "the {} at the {}")),
        centres(e) if taught(e, "dtr") else [],
    )
    things = [Thing(form.format(name, m) if name != m else m, m, xyz) for m, name, xyz in boxes]
    known = [
        (".", n, rule)
        for task, n, rule in SPAR
        if (e.task or "").startswith(task) and len(things) in n
    ]
    for says, counts, rule in known or RULES:
        # no options
        question = e.question if rule in (relation, perspective) else OPTION.sub("", e.question)
        if len(things) in counts and re.search(says, question, re.I):
            break
    else:
        return None
    found, working, words = rule(question, *things)
    text, answer = working if e.path == "dtr" else words, conclude(found, e)
    start, end = rng.choice(STARTS) if e.path == "dtr" else "", rng.choice(SO).format(answer)
    return target(replace(e, rationale=f"{start}{text[:1].upper()}{text[1:]}{end}", answer=answer))
