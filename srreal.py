"""SR-REAL in one file, no torch: what the model reads, what it is taught to write, what its answers
earn.

The paper (arXiv 2606.17539) lets one vision language model answer a spatial question on two paths.
Nothing routes between them: the prompt alone selects the path.
    lor     language-only reasoning    <think>T</think> <answer>A</answer>
    dtr     detect, then reason        <detect>D</detect> <think>T</think> <answer>A</answer>
    direct  no reasoning               A        (grounding, captions, base models)
D is a header and a line an object, with its centre in metres (camera frame: x right, y down, z
forward):
    Find 1 relevant objects:
    <3d_box center="0.3,-0.81,3.32">chair (red bbox)</3d_box>

To fork: a reward is a function and an entry in REWARDS (Scores gets its field), weighted in a Path;
a path is an entry in PATHS; a new tag is an entry in SECTIONS.

Departures from the official code's reward (rules="official" has its numbers; tests/test_hacks.py
shows both):
 1. Frames are read as integers: frame 10 is not 1, and frame 0 of a "first image" question is right.
 2. Detection divides by max(boxes, objects): neither silence nor spam pays. Mentions match whole.
 3. A centre is exactly three plain numbers. A repeated mention is a false positive, not another try.
 4. Camera motion is scored on signed axes: answering both directions of an axis nets zero.
 5. The numeric score has its floor subtracted (a constant 0 earned .14); nan is no number; units are read.
 6. Well-formed = each tag once, no blank section, as many boxes as stated. Nothing else earns anything:
    where accuracy alone still paid, the policy dropped <detect>.
Kept as in the paper: steps in absolute metres, and nobody checks that T makes use of D.
"""

import math
import re
from collections import namedtuple
from dataclasses import dataclass, field


@dataclass
class Example:
    """A question about one or more images, and all that is known about its answer."""

    id: str
    path: str  # a key of PATHS
    images: list  # file paths, PIL images, or anything with .size and .convert("RGB")
    # <mask> follows a region's mention; the k-th <image>, if any, is the k-th image's place
    question: str
    answer: str
    # by image: path, float32 [H, W] in metres (0, nan, inf: unknown), or None
    depths: list | None = None
    intrinsics: list | None = None  # by image: (fx, fy, cx, cy) in pixels, or None
    # by <mask>: (image, (x0, y0, x1, y1) px | bool [H, W])
    regions: list = field(default_factory=list)
    # mention -> (x, y, z) metres, or -> {view: (x, y, z)}
    objects: dict = field(default_factory=dict)
    frame: int | None = None  # the view that the question wants centres in; None: any
    task: str = ""
    rationale: str | None = None  # the text of <think>, for SFT
    names: dict = field(default_factory=dict)  # mention -> the object's name
    sizes: dict | None = None  # mention -> (w, h, l) metres


def several_views(example: Example) -> bool:
    """Whether centres need a reference frame: truth by view or, without truth, more than one
    image."""
    by_view = [isinstance(centre, dict) for centre in example.objects.values()]
    return any(by_view) if by_view else len(example.images) > 1


# ---- Paths: the prompt, and what the cold start teaches to write
@dataclass(frozen=True)
class Path:
    """A way to answer. Weights name entries of REWARDS and sum to 1, so that totals of all paths
    compare."""

    sections: tuple[str, ...]  # keys of SECTIONS, in order; none: the whole text is the answer
    instruction: str  # may hold {images} and {frame}
    weights: dict[str, float]
    # where nothing is known that detection could be compared with
    weights_without_objects: dict[str, float]


PATHS = {
    "lor": Path(
        ("think", "answer"),
        "Study the {images}, reason step by step, and only then answer.",
        {"accuracy": 0.8, "format": 0.2},
        {"accuracy": 0.8, "format": 0.2},
    ),
    "dtr": Path(
        ("detect", "think", "answer"),
        "Locate the relevant objects of the {images} in 3D, reason with them, then answer. "
        "Centers are metres, x right, y down, z forward{frame}.",
        {"accuracy": 0.8, "format": 0.1, "detect": 0.1},
        {"accuracy": 0.8, "format": 0.2},
    ),
    "direct": Path((), "", {"accuracy": 1.0}, {"accuracy": 1.0}),
}
ROLE = "You answer spatial questions about what a camera sees."
HEADERS = {
    False: "Find {n} relevant objects:",  # one view
    True: "After aligning to the reference frame {k}, find {n} relevant objects:",
}  # several


def pick(table: dict, name: str):
    if name not in table:
        raise ValueError(f"{name!r} is none of: {', '.join(table)}")
    return table[name]


def prompt(example: Example) -> str:
    """The user turn: role, instruction, form of the reply, question (with its <image>s and
    <mask>s)."""
    path, several = pick(PATHS, example.path), several_views(example)
    if not path.sections:
        return example.question
    instruction = path.instruction.format(
        images="images" if len(example.images) > 1 else "image",
        frame=", seen from image K (0-based)" if several else "",
    )
    form = "\n".join(f"<{tag}>{SECTIONS[tag][0]}</{tag}>" for tag in path.sections)
    form = form.replace("HEADER", HEADERS[several].format(n="N", k="K"))
    return f"{ROLE}\n\n{instruction} Reply as\n{form}\n\n Question: {example.question}"


def target(example: Example) -> str:
    """What SFT teaches to write: a section a line. ValueError where parse would not read it back:
    without a rationale, on dtr without objects or a view of them all, for a tag in a text, for a
    centre of nan."""
    path = pick(PATHS, example.path)
    if not path.sections:
        return example.answer
    text = "\n".join(f"<{tag}>{SECTIONS[tag][1](example)}</{tag}>" for tag in path.sections)
    parsed, mentions = (
        parse(text, example.path),
        example.objects if "detect" in path.sections else (),
    )
    if not parsed.well_formed or [mention for mention, _, _ in parsed.boxes] != list(mentions):
        raise ValueError(f"{example.id}: no valid target on path {example.path}: {text[:300]!r}")
    return text


def write_detect(example: Example) -> str:
    """Header and object lines, in the order of `objects`; frame: that asked for, else the lowest
    with all."""
    several, k = bool(example.objects) and several_views(example), example.frame
    if several:
        common = set.intersection(*map(set, example.objects.values()))
        k = min(common, default=None) if k is None else k
        if k not in common:
            raise ValueError(
                f"{example.id}: no view, or not the one asked for, has a centre of every object"
            )
    lines = [HEADERS[several].format(n=len(example.objects), k=k)]
    for mention, centre in example.objects.items():
        xyz = [round(v, 2) for v in (centre[k] if several else centre)]
        xyz = ",".join(str(v if v else abs(v)) for v in xyz)  # abs: no -0.0
        name = f"{example.names[mention]} ({mention})" if example.names.get(mention) else mention
        lines.append(f'<3d_box center="{xyz}">{name}</3d_box>')
    return "\n".join(lines)


SECTIONS = {  # tag -> (what the prompt shows, the function that writes it in a target)
    "detect": ('HEADER\n<3d_box center="x,y,z">name (mention)</3d_box>', write_detect),
    "think": ("your reasoning", lambda example: example.rationale or ""),
    "answer": ("the answer alone", lambda example: example.answer),
}

# ---- Parsing: the only code that sees untrusted text. It never raises, and its time is linear in
# the text.
N = "([0-9]{1,4})"  # not \d, which takes the digits of every script
HEADER = re.compile(
    f"(?:Find|After aligning to the reference frame {N}, find) {N} relevant objects:"
)
DECIMAL = r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)"
BOX_OPEN, BOX_CLOSE, BOX = '<3d_box center="', "</3d_box>", re.compile("<3d_box|</3d_box>")


@dataclass
class Parsed:
    """A response, read; of an ill-formed one what could be: each tag's first block, each good
    object line."""

    boxes: list = field(default_factory=list)  # of (mention, name, (x, y, z) metres)
    count: int | None = None  # the header's N
    frame: int | None = None  # the header's K
    think: str | None = None
    answer: str | None = None
    well_formed: bool = False
    # tag -> text, for the rewards of a fork's own tags
    sections: dict = field(default_factory=dict)


def parse(response: str, path: str) -> Parsed:
    """Read a response of that path, whatever its text (ValueError only for an unknown path)."""
    tags = pick(PATHS, path).sections
    if not tags:
        return Parsed(answer=response, well_formed=bool(response.strip()))
    found, in_order = split_sections(response, tags)
    parsed = Parsed(think=found.get("think"), answer=found.get("answer"), sections=found)
    detected = read_detect(found["detect"], parsed) if "detect" in found else True
    parsed.well_formed = in_order and detected and all(text.strip() for text in found.values())
    return parsed


def split_sections(response: str, tags: tuple[str, ...]) -> tuple[dict[str, str], bool]:
    """Tag -> text of its first block; and whether the response is just these, in order, each tag
    once."""
    known = {tag for path in PATHS.values() for tag in path.sections}
    good = all(
        response.count(mark) == (tag in tags) for tag in known for mark in (f"<{tag}>", f"</{tag}>")
    )
    found, end = {}, 0
    for tag in tags:
        start = response.find(f"<{tag}>")
        stop = response.find(f"</{tag}>", max(start, 0))
        good = good and end <= start < stop and not response[end:start].strip()
        if 0 <= start < stop:
            found[tag], end = response[start + len(tag) + 2 : stop], stop + len(tag) + 3
    return found, good and not response[end:].strip()


def read_detect(text: str, parsed: Parsed) -> bool:
    """Fill in boxes, count and frame; True for a header and then exactly N >= 1 object lines."""
    # splitlines() also splits at \f and U+2028
    lines = [line.strip() for line in text.strip().split("\n")]
    header = HEADER.fullmatch(lines[0])
    if header:
        parsed.frame, parsed.count = header[1] and int(header[1]), int(header[2])
    boxes = [read_box(line) for line in lines[bool(header) :]]
    parsed.boxes = [box for box in boxes if box]
    return bool(header) and 1 <= parsed.count == len(boxes) == len(parsed.boxes)


def read_box(line: str) -> tuple[str, str, tuple[float, float, float]] | None:
    if not (line.startswith(BOX_OPEN) and line.endswith(BOX_CLOSE)):
        return None
    centre, _, text = line[len(BOX_OPEN) : -len(BOX_CLOSE)].partition('">')
    xyz = centre.split(",")
    if (
        len(xyz) != 3
        or BOX.search(text)
        or not all(len(v) <= 20 and re.fullmatch(DECIMAL, v) for v in xyz)
    ):
        return None
    mention, name = split_mention(text.strip())
    return (mention, name, tuple(map(float, xyz))) if mention and name else None


def split_mention(text: str) -> tuple[str, str]:
    """`chair (red bbox)` -> (`red bbox`, `chair`). Parentheses nest; with none at the end, text is
    both."""
    depth = 0
    for i in reversed(range(len(text) if text.endswith(")") else 0)):
        depth += (text[i] == ")") - (text[i] == "(")
        if depth == 0:
            return text[i + 1 : -1].strip(), text[:i].strip()
    return text, text


# ---- Comparing an answer with the truth (eval.py uses the same function)
CHOICE = r"L[.):]?|\(L\)|\[L\]|\{L\}|(?:L[.)]|\(L\))\s.*"  # L: the letter
# two factors: 57 / 100 is 0.57, 57 * 0.01 is not
UNITS = {
    unit: (up, down)
    for up, down, units in (
        (1, 1, "m meter meters metre metres degree degrees"),
        (0.3048, 1, "ft feet"),
        (0.0254, 1, "in inch inches"),
        (1, 100, "cm centimeter centimeters centimetre centimetres"),
        (1, 1000, "mm"),
        (1000, 1, "km"),
    )
    for unit in units.split()
}
# `5.` but not `5..`
QUANTITY = re.compile(rf"({DECIMAL})(?:\s*((?ai:{'|'.join(UNITS)})))?(?:(?<!\.)\.)?")
AXES = [
    ("move_right", "move_left"),
    ("move_up", "move_down"),
    ("move_forward", "move_backward"),
    ("rotate_right", "rotate_left"),
    ("rotate_up", "rotate_down"),
]


def answer_score(answer: str | None, truth: str) -> float:
    """How right an answer is, in [0, 1], by the truth's kind: choice A-E, camera motion, number, or
    text."""
    if answer is None:
        return 0.0
    if truth.strip() in tuple("ABCDE"):
        return float(
            bool(re.fullmatch(CHOICE.replace("L", truth.strip()), answer.strip(), re.I | re.S))
        )
    if "move_" in truth or "rotate_" in truth:
        return motion_score(motion(answer), motion(truth))
    if math.isfinite(number(truth)):
        return number_score(number(answer), number(truth))
    said, true = (" ".join(text.lower().split()).removesuffix(".") for text in (answer, truth))
    return float(said == true)


def number(text: str) -> float:
    """One decimal number with at most a unit behind it, lengths in metres; nan for anything
    else."""
    match = QUANTITY.fullmatch(text.strip())
    if not match:
        return math.nan
    up, down = UNITS[(match[2] or "m").lower()]
    return float(match[1]) * up / down


def number_score(x: float, true: float) -> float:
    """(e^-2r - e^-2) / (1 - e^-2) of the relative error r; 0 from r = 1 on, which constant guesses
    reach."""
    r = abs(x - true) / (abs(true) + 0.01)
    # nan and inf: 0
    return (math.exp(-2 * r) - math.exp(-2)) / (1 - math.exp(-2)) if r < 1 else 0.0


def motion(text: str) -> list[float]:
    """`move_right:0.4,rotate_left:30` -> five signed axes; nan for an unknown, repeated or bad
    entry."""
    entries = [entry.partition(":") for entry in text.split(",")]
    moves = {key.strip(): number(value) for key, _, value in entries}
    finite, unknown = all(map(math.isfinite, moves.values())), moves.keys() - set(sum(AXES, ()))
    if len(moves) < len(entries) or not finite or unknown:
        return [math.nan] * len(AXES)
    return [moves.get(plus, 0.0) - moves.get(minus, 0.0) for plus, minus in AXES]


def motion_score(axes: list[float], true: list[float]) -> float:
    """Mean number score over the axes on which answer or truth moves; 1 where both stand still."""
    scores = [number_score(a, b) for a, b in zip(axes, true, strict=True) if a or b]
    return sum(scores) / len(scores) if scores else 1.0


# ---- Rewards: (Parsed, Example) -> [0, 1], of well-formed responses only. The others earn 0
# throughout. nearer than (metres): score
STEPS = (0.1, 1.0), (0.2, 0.8), (0.3, 0.6), (0.4, 0.4), (0.6, 0.2), (1.0, 0.1)


def detection(parsed: Parsed, example: Example) -> float:
    """Points by distance over max(boxes, objects); of several views, in the frame that the header
    states."""
    truth = example.objects
    if several_views(example):  # an object that this frame lacks still counts below
        k = parsed.frame if example.frame in (None, parsed.frame) else None
        truth = {mention: views[k] for mention, views in truth.items() if k in views}
    first = {mention.lower(): centre for mention, _, centre in reversed(parsed.boxes)}
    pairs = [
        (xyz, first[mention.lower()]) for mention, xyz in truth.items() if mention.lower() in first
    ]
    # The slack decides ties alike on every machine: centres lie on a 0.01 m grid, so exactly 0.1 m
    # happens.
    total = sum(points(math.dist(a, b), slack=1e-6) for a, b in pairs)
    return total / max(len(parsed.boxes), len(example.objects), 1)


def points(distance: float, slack: float) -> float:
    return next((value for limit, value in STEPS if distance < limit - slack), 0.0)


REWARDS = {
    "accuracy": lambda parsed, example: answer_score(parsed.answer, example.answer),
    "format": lambda parsed, example: 1.0,
    "detect": detection,
}
Scores = namedtuple("Scores", ("total", *REWARDS))


def score(response: str, example: Example, rules: str = "strict") -> Scores:
    """What a response earns: the total by its path's weights, and every part; finite, in [0, 1].
    rules: strict, or official, which has that code's bugs (detect above 1, accuracy nan); else
    ValueError."""
    path, rewarded = pick(PATHS, example.path), pick(RULES, rules)
    parts = dict.fromkeys(REWARDS, 0.0) | (rewarded if path.sections else strict)(response, example)
    weights = path.weights if example.objects else path.weights_without_objects
    return Scores(sum(weight * parts[name] for name, weight in weights.items()), **parts)


def strict(response: str, example: Example) -> dict[str, float]:
    parsed = parse(response, example.path)
    return (
        {name: reward(parsed, example) for name, reward in REWARDS.items()}
        if parsed.well_formed
        else {}
    )


# ---- The official code's numbers, bugs included, for comparison. It has no path without sections.
# (?>): no way back, so the time stays linear
FORMS = {
    "lor": "<think>(?>.*?</think><answer>).*</answer>",
    "dtr": "<detect>(?>.*?</detect><think>)(?>.*?</think><answer>).*</answer>",
}
PAIR = re.compile(r"(?<!\w)(\w+):([+-]?(?:\d+\.?\d*|\.\d+))")  # so does the look-behind
ITEM = re.compile(r'<3d_box center="([^"]*)">([^<]*)</3d_box>')


def official(response: str, example: Example) -> dict[str, float]:
    for mark in "<>/":  # white space around these goes, also in `a / b`
        response = mark.join(part.strip() for part in response.split(mark))
    answer, ordered = (
        block(response, "answer"),
        re.fullmatch(pick(FORMS, example.path), response, re.S),
    )
    once = all(response.count(tag) == 1 for tag in ("<think>", "</think>", "<answer>", "</answer>"))
    return {
        "accuracy": official_accuracy(answer, example.answer)
        if once and "\n" not in answer
        else 0.0,
        "format": float(bool(ordered) and (once or example.path == "dtr")),  # dtr counts no tags
        "detect": official_detect(block(response, "detect"), example)
        if example.path == "dtr"
        else 0.0,
    }


def block(text: str, tag: str) -> str:
    inside, closed, _ = text.partition(f"<{tag}>")[2].partition(f"</{tag}>")
    return inside if closed else ""


def official_accuracy(answer: str, truth: str) -> float:
    """0 earns e^-2, "nan" is a number, extra motions are free."""

    def decay(x: str, true: str) -> float:
        return math.exp(-2 * abs(float(x) - float(true)) / (abs(float(true)) + 0.01))

    if truth in tuple("ABCDE"):
        return float(
            answer.upper() in [f % truth for f in ("%s", "(%s)", "[%s]", "{%s}", r"\TEXT{%s}")]
        )
    try:
        if "move_" not in truth:
            return round(decay(answer, truth), 2)
        said, true = dict(PAIR.findall(answer)), dict(PAIR.findall(truth))
        return round(sum(decay(said[key], true[key]) for key in true if key in said) / len(true), 2)
    except (ValueError, ZeroDivisionError):
        return 0.0


def official_detect(text: str, example: Example) -> float:
    """Last box of a name, first name with the mention in it, over the number of names; any failure
    is 0."""
    truth, total = example.objects, 0.0
    try:
        found = {name: [float(v) for v in xyz.split(",")] for xyz, name in ITEM.findall(text)}
        if several_views(example):  # one character at a fixed place: 10 reads as 1
            if "first image" in example.question:
                return 0.0  # there that character is compared with the number 0
            k = text[len("After aligning to the reference frame ")]
            truth = {
                key: {str(view): xyz for view, xyz in views.items()}[k]
                for key, views in truth.items()
            }
        for mention, true in truth.items():
            for near in [xyz for name, xyz in found.items() if mention.replace("_", " ") in name][
                :1
            ]:
                # one number: on x alone
                total += points(math.dist(near[:3], true[: len(near)]), slack=0.0)
        return total / len(found)
    except (ValueError, KeyError, IndexError, ZeroDivisionError):
        return 0.0


RULES = {"strict": strict, "official": official}
