"""The questions about a scene: each family is one function, and an entry in FAMILIES.

A family takes a generator, a view and its marks, and returns None where it should not ask. What
rounding or occlusion could flip is not asked; DTR's rationale works with the rounded centres of its
own detect block. Options stand in alphabetical order unless --shuffle-options says otherwise (a
tiny model that saw them shuffled found the right words, but not their letters), and of two things
the closer one is asked for (of "closer" and "farther" in turns it took the one for the other).

To add a family, write such a function and enter it with the number of its marks, in FAMILIES, or in
ON_REQUEST if only --ask should bring it.
"""

import math
from collections import namedtuple
from itertools import permutations

from data.arithmetic import DEPTHS, SIDES, WAYS, by_sign

# answer is right and wrong has the other options, () where a number is asked for; lor and dtr are
# the rationales of both paths that work it out, and guess is one that doesn't, all of them up to
# the option's letter.
Question = namedtuple("Question", "text answer wrong lor dtr guess", defaults=("By eye",))

# ask: (rng, view, *marks) -> Question or None; for how many marks, in how many views.
Family = namedtuple("Family", "ask marks views", defaults=(1,))

# The way between two marks. steps: along x, y and z by the rounded centres, of one decimal; exact:
# its true length; worked: its length by the steps; words: LOR's; working: DTR's.
Way = namedtuple("Way", "steps exact worked words working")

# Metres by which two things must differ for a question about which is closer, or further left: less
# the eye does not tell, and rounding may flip it.
CLEAR = 0.25

LETTERS = "ABC"


def way_between(view, a, b):
    # Few words, and no units: what a rationale says of itself, a tiny model has to learn as well.
    # + 0.0 turns -0.0 into 0.0: a step of no length has no sign.
    steps = [round(q - p, 1) + 0.0 for p, q in zip(a.near(view), b.near(view), strict=True)]
    x, y, z = (
        f"{abs(step)} {by_sign(step, names)}" for step, names in zip(steps, WAYS, strict=True)
    )
    start = f"From {a.colour} to {b.colour}:"
    return Way(
        steps,
        exact=math.dist(a.centres[view], b.centres[view]),
        worked=math.hypot(*steps),
        words=f"{start} about {x}, {y}, {z}",
        working=f"{start} {x}, {y}, {z}",
    )


def ask_number(text, exact, worked, lor, dtr):
    """Ask for one decimal, where the exact and the worked value agree on it with a margin."""
    answer = f"{exact:.1f}"
    # 0.05 is where the decimal would flip.
    error = max(abs(exact - float(answer)), abs(worked - float(answer)))
    if error >= 0.044:
        return None
    # A number has no other option.
    claim = f"the answer is {answer}"
    return Question(
        text,
        answer,
        (),
        f"{lor}, so {claim}",
        f"{dtr}, so {claim}",
        f"By eye, {claim}",
    )


def ask_closer(rng, origin, a, b, p, q, lor, dtr):
    """Ask which of two marks, p and q metres away, is closer to the origin, where that is clear."""
    if abs(p - q) <= CLEAR:
        return None
    start = rng.choice(["Which is", "Tell me what is"])
    closer = a if p < q else b
    other = b if p < q else a
    than = "under" if p < q else "over"
    claim = f"closer is {closer.colour}"
    end = f"{p:.1f} is {than} {q:.1f}, so {claim}"
    return Question(
        f"{start} closer to {origin}: {a.text} or {b.text}?",
        closer.colour,
        (other.colour,),
        f"{lor}. {end}",
        f"{dtr}. {end}",
        f"By eye, {claim}",
    )


def depth_order(rng, view, a, b):
    p = a.near(view)[2]
    q = b.near(view)[2]
    # By z and by distance alike.
    if (p - q) * (math.hypot(*a.centres[view]) - math.hypot(*b.centres[view])) <= 0:
        return None
    both = f"{p:.1f} to {a.colour}, {q:.1f} to {b.colour}"
    lor = f"From the camera: about {both}"
    return ask_closer(rng, "the camera", a, b, p, q, lor, f"By their z: {both}")


def closest(rng, view, *marks):
    """Ask which of three marks is closest to the camera, where that is clear."""
    depths = [mark.near(view)[2] for mark in marks]
    first, second, _ = sorted(depths)
    best = marks[depths.index(first)]
    if second - first <= CLEAR:
        return None
    # By z and by distance alike.
    if best is not min(marks, key=lambda mark: math.hypot(*mark.centres[view])):
        return None
    start = rng.choice(["Which is", "Tell me what is"])
    a, b, c = (mark.text for mark in marks)
    each = ", ".join(
        f"{metres:.1f} to {mark.colour}" for metres, mark in zip(depths, marks, strict=True)
    )
    claim = f"closest is {best.colour}"
    end = f"Least is {first:.1f}, so {claim}"
    return Question(
        f"{start} closest to the camera: {a}, {b} or {c}?",
        best.colour,
        tuple(mark.colour for mark in marks if mark is not best),
        f"From the camera: about {each}. {end}",
        f"By their z: {each}. {end}",
        f"By eye, {claim}",
    )


def nearest(rng, view, a, b, c):
    to_a = way_between(view, c, a)
    to_b = way_between(view, c, b)
    p = to_a.worked
    q = to_b.worked
    lor = f"{to_a.words}, in all {p:.1f}. {to_b.words}, in all {q:.1f}"
    dtr = f"{to_a.working}, in all {p:.1f}. {to_b.working}, in all {q:.1f}"
    return ask_closer(rng, c.text, a, b, p, q, lor, dtr)


def depth(rng, view, a):
    z = a.centres[view][2]
    near = a.near(view)[2]
    start = rng.choice(["What is the depth of", "How deep in the view is"])
    between = f"Between {int(near)} and {int(near) + 1} m"
    return ask_number(
        f"{start} {a.text}, in metres?",
        z,
        near,
        f"{between}, about {z:.1f}",
        f"Its z is {near}",
    )


def height(rng, view, a):
    """Ask how tall a thing is: the detect block has where it is, but not how large."""
    tall = 2 * a.thing.half[1]
    start = rng.choice(["How tall is", "What is the height of"])
    seen = f"from foot to top about {tall:.1f}"
    return ask_number(
        f"{start} {a.text}, in metres?",
        tall,
        tall,
        seen.capitalize(),
        f"Its z is {a.near(view)[2]}, {seen}",
    )


def distance(rng, view, a, b):
    way = way_between(view, a, b)
    start = rng.choice(["How far is it", "What is the distance"])
    return ask_number(
        f"{start} from {a.text} to {b.text}, in metres?",
        way.exact,
        way.worked,
        f"{way.words}, in all {way.worked:.1f}",
        f"{way.working}, in all {way.worked:.1f}",
    )


def relation(rng, view, a, b):
    """Ask for left or right, or above or below, where the image says so, too."""
    axis = 1 if rng.random() < 0.35 else 0
    low, high = (("left of", "right of"), ("above", "below"))[axis]
    p = a.near(view)[axis]
    q = b.near(view)[axis]
    # x / z: where it stands in the image, in units of the focal length.
    seen_a, seen_b = (mark.centres[view][axis] / mark.centres[view][2] for mark in (a, b))
    # To the left in space, but not in the image, or hardly: not asked.
    if abs(p - q) <= CLEAR or (seen_a - seen_b) * (p - q) <= 0.02:
        return None
    start = rng.choice(["Seen from", "From"])
    answer = low if p < q else high
    way = way_between(view, b, a)
    claim = f"{a.colour} is {answer} {b.colour}"
    return Question(
        f"{start} the camera, is {a.text} {low} or {high} {b.text}?",
        answer,
        (high if p < q else low,),
        f"{way.words}, so {claim}",
        f"{way.working}, so {claim}",
        f"By eye, {claim}",
    )


OPPOSITE = {"left": "right", "right": "left", "nearer": "farther", "farther": "nearer"}
# What is on the right of someone who faces that way.
RIGHT_OF = {"farther": "right", "right": "nearer", "nearer": "left", "left": "farther"}


def products(way, other, sideways):
    """Return the x and z terms of the cross product of two ways, or of their dot product.

    Seen from above, the cross product is positive on the right, the dot product in front.
    """
    x, _, z = way
    u, _, w = other
    if sideways:
        return z * u, -x * w
    return x * u, z * w


def perspective(rng, view, a, b, c):
    """Ask where c is for someone at a who faces b.

    Asked where b lies along one axis of the camera, more or less: a tiny model never found the sign
    of a sum of products, but looks up words ("facing left, nearer is to the left and farther is to
    the right"). Told one of both, it has to compare, and was right half of the time.
    """
    sideways = rng.random() < 0.5
    low, high = ("to the left", "to the right") if sideways else ("behind", "in front")
    ahead = way_between(view, a, b)
    there = way_between(view, a, c)
    fx, _, fz = ahead.steps
    tx, _, tz = there.steps
    across, deep = products(ahead.steps, there.steps, sideways)
    total = across + deep
    along_x = abs(fx) > abs(fz)
    # The term that decides, in words.
    if along_x != sideways:
        main = across
        step = tx
        way = by_sign(tx, SIDES)
    else:
        main = deep
        step = tz
        way = by_sign(tz, DEPTHS)
    # Facing askew: no single word for that.
    if min(abs(fx), abs(fz)) >= 0.5 * max(abs(fx), abs(fz)):
        return None
    # The deciding term has to be clear, and to outweigh the other.
    if abs(step) <= CLEAR or main * total <= 0:
        return None
    size = math.hypot(fx, fz) * math.hypot(tx, tz)
    # Too close together, or nearly on the border between both options.
    if size <= 0.3 or abs(total) <= 0.3 * size:
        return None
    origin = a.thing.centre
    truth = sum(products(b.thing.centre - origin, c.thing.centre - origin, sideways))
    # Rounded steps must not say otherwise than the exact centres.
    if total * truth <= 0:
        return None
    answer = high if total > 0 else low
    if answer == "in front" and rng.random() < 0.75:
        # A room has far more in front than behind.
        return None
    facing = by_sign(fx, SIDES) if along_x else by_sign(fz, DEPTHS)
    high_way = RIGHT_OF[facing] if sideways else facing
    around = f"{OPPOSITE[high_way]} is {low} and {high_way} is {high}"
    stand = rng.choice(["facing", "looking at"])
    end = f"facing {facing}, {around}, so {way} is {answer}"
    return Question(
        f"Standing at {a.text} and {stand} {b.text}, is {c.text} {low} or {high}?",
        answer,
        (low if total > 0 else high,),
        f"{ahead.words}. {there.words}, {end}",
        f"{ahead.working}. {there.working}, {end}",
        f"By eye, {c.colour} is {answer}",
    )


def two_view(rng, view, a, b):
    """Ask for order or relation in the frame of one of two images."""
    family = (depth_order, relation)[rng.integers(2)]
    asked = family(rng, view, a, b)
    if asked is None:
        return None
    frame = ("first", "second")[view]
    return asked._replace(text=f"In the frame of the {frame} image: {asked.text}")


FAMILIES = {
    "depth_order": Family(depth_order, marks=2),
    "depth": Family(depth, marks=1),
    "distance": Family(distance, marks=2),
    "nearest": Family(nearest, marks=3),
    "relation": Family(relation, marks=2),
    "perspective": Family(perspective, marks=3),
    "two_view": Family(two_view, marks=2, views=2),
}
# Asked only where --ask names them: the speedrun's results are those of the seven above.
ON_REQUEST = {
    "closest": Family(closest, marks=3),
    "height": Family(height, marks=1),
}


def ask(rng, family, marks):
    """Return (view, question) of a family: the first of a few picks of marks that it asks about."""
    views = list(range(family.views))
    view = int(rng.choice(views))
    picks = []
    for pick in permutations(marks, family.marks):
        # Of each view a mark, where several are spoken of.
        if sorted({mark.view for mark in pick}) == views:
            picks.append(pick)
    for index in rng.permutation(len(picks))[:8]:
        question = family.ask(rng, view, *picks[index])
        if question is not None:
            return view, question
    return view, None


def with_options(question, rng=None):
    """Return a choice with its options and their letters; a number as it is.

    rng: a random.Random by which the options are shuffled; None: they stand in alphabetical order.
    """
    if not question.wrong:
        return question
    options = sorted([question.answer, *question.wrong])
    if rng is not None:
        rng.shuffle(options)
    letter = LETTERS[options.index(question.answer)]
    listed = " ".join(f"{name}. {option}" for name, option in zip(LETTERS, options, strict=False))
    return question._replace(
        text=f"{question.text} {listed}",
        answer=letter,
        wrong=(),
        lor=f"{question.lor}, option {letter}",
        dtr=f"{question.dtr}, option {letter}",
        guess=f"{question.guess}, option {letter}",
    )
