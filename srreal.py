"""SR-REAL in one file, no torch: what the model reads, what it learns to write, what answers earn.

The paper (arXiv 2606.17539) lets one vision language model answer a spatial question on two paths.
Nothing routes between them: the prompt alone selects the path.
    lor     language-only reasoning    <think>T</think> <answer>A</answer>
    dtr     detect, then reason        <detect>D</detect> <think>T</think> <answer>A</answer>
    direct  no reasoning               A        (grounding, captions, base models)
D is a header and then a line for each object, with its centre in metres (camera frame: x right,
y down, z forward):
    Find 1 relevant objects:
    <3d_box center="0.3,-0.81,3.32">chair (red bbox)</3d_box>

Three tables hold what a fork adds to, and everything else derives from them (docs/fork.md):
    REWARDS   name -> function; logged for each path, a column of eval's table and of the kernel
    PATHS     name -> prompt, sections and weights; a value of --path
    SECTIONS  tag -> what the prompt shows of it, and how a target writes it

Departures from the official code's reward (rules="official" has its numbers: official.py;
tests/method/test_hacks.py shows both):
 1. Frames are read as integers: frame 10 is not 1, and frame 0 of a "first image" question counts.
 2. Detection divides by max(boxes, objects): neither silence nor spam pays. Mentions match whole.
 3. A centre is exactly three plain numbers. A repeated mention is a false positive, no second try.
 4. Camera motion is scored on signed axes: answering both directions of an axis nets zero.
 5. The numeric score has its floor subtracted (a constant 0 earned .14); nan is no number; units
    are read.
 6. Well-formed = each tag once, no blank section, as many boxes as stated. Nothing else earns
    anything: where accuracy alone still paid, the policy dropped <detect>.
Kept as in the paper: steps in absolute metres, and no check that T makes use of D.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import latex
import official


@dataclass
class Example:
    """A question about one or more images, and all that is known about its answer."""

    id: str
    # a key of PATHS
    path: str
    # file paths, bytes of files, data URIs, PIL images, or anything with .size and .convert("RGB")
    images: list
    # <mask> follows a region's mention; the k-th <image>, if any, is the k-th image's place
    question: str
    answer: str
    # by image: a path, float32 [H, W] in metres (0, nan, inf: unknown), or None
    depths: list | None = None
    # by image: (fx, fy, cx, cy) in pixels, or None
    intrinsics: list | None = None
    # by <mask>: (image index, (x0, y0, x1, y1) in pixels, or bool [H, W])
    regions: list = field(default_factory=list)
    # mention -> (x, y, z) in metres; where there are several views, mention -> {view: (x, y, z)}
    objects: dict = field(default_factory=dict)
    # the view that the question wants centres in; None: any
    frame: int | None = None
    task: str = ""
    # the text of <think>, for SFT
    rationale: str | None = None
    # mention -> the object's name
    names: dict = field(default_factory=dict)
    # mention -> (w, h, l) in metres
    sizes: dict | None = None


def several_views(example: Example) -> bool:
    """Tell whether a centre needs a reference frame.

    It does where the truth is given by view or, where none is known, if there are several images.
    """
    if not example.objects:
        return len(example.images) > 1
    return any(isinstance(centre, dict) for centre in example.objects.values())


# ---- Paths: the prompt, and what the cold start teaches to write


@dataclass
class Path:
    """A way to answer, and what it earns.

    Weights name entries of REWARDS and sum to 1, so that the totals of all paths compare.
    """

    # keys of SECTIONS, in order; none: the whole text is the answer
    sections: tuple[str, ...]
    # may hold {images} and {frame}
    instruction: str
    weights: dict[str, float]
    # of examples without known objects, whose detections can't be compared; None: the same
    weights_without_objects: dict[str, float] | None = None

    def __post_init__(self):
        if self.weights_without_objects is None:
            self.weights_without_objects = self.weights


PATHS = {
    "lor": Path(
        sections=("think", "answer"),
        instruction="Study the {images}, reason step by step, and only then answer.",
        weights={"accuracy": 0.8, "format": 0.2},
    ),
    "dtr": Path(
        sections=("detect", "think", "answer"),
        instruction=(
            "Locate the relevant objects of the {images} in 3D, reason with them, then answer. "
            "Centers are metres, x right, y down, z forward{frame}."
        ),
        weights={"accuracy": 0.8, "format": 0.1, "detect": 0.1},
        weights_without_objects={"accuracy": 0.8, "format": 0.2},
    ),
    "direct": Path(sections=(), instruction="", weights={"accuracy": 1.0}),
}

ROLE = "You answer spatial questions about what a camera sees."
HEADER_OF_ONE_VIEW = "Find {n} relevant objects:"
HEADER_OF_SEVERAL_VIEWS = "After aligning to the reference frame {k}, find {n} relevant objects:"


def prompt(example: Example) -> str:
    """Write the user turn: role, instruction, form of the reply, and the question as it is."""
    path = lookup(PATHS, example.path)
    if not path.sections:
        return example.question
    several = several_views(example)
    instruction = path.instruction.format(
        images="images" if len(example.images) > 1 else "image",
        frame=", seen from image K (0-based)" if several else "",
    )
    form = "\n".join(f"<{tag}>{SECTIONS[tag][0]}</{tag}>" for tag in path.sections)
    header = HEADER_OF_SEVERAL_VIEWS if several else HEADER_OF_ONE_VIEW
    form = form.replace("HEADER", header.format(n="N", k="K"))
    return f"{ROLE}\n\n{instruction} Reply as\n{form}\n\n Question: {example.question}"


def target(example: Example) -> str:
    """Write what SFT teaches for this example: a section a line.

    Raises ValueError where `parse` would not read it back: without a rationale; on path dtr without
    objects, or a view that has them all; for a tag inside of a text; for a centre of nan.
    """
    path = lookup(PATHS, example.path)
    if not path.sections:
        return example.answer
    blocks = []
    for tag in path.sections:
        _, write = SECTIONS[tag]
        blocks.append(f"<{tag}>{write(example)}</{tag}>")
    text = "\n".join(blocks)

    parsed = parse(text, example.path)
    read_back = [mention for mention, _, _ in parsed.boxes]
    written = list(example.objects) if "detect" in path.sections else []
    if not parsed.well_formed or read_back != written:
        raise ValueError(f"{example.id}: no valid target on path {example.path}: {text[:300]!r}")
    return text


def write_detect(example: Example) -> str:
    """Write the header and the object lines, in the order of `objects`."""
    frame = None
    header = HEADER_OF_ONE_VIEW
    if example.objects and several_views(example):
        frame = frame_to_write(example)
        header = HEADER_OF_SEVERAL_VIEWS
    lines = [header.format(n=len(example.objects), k=frame)]
    for mention, centre in example.objects.items():
        if frame is not None:
            centre = centre[frame]
        name = example.names.get(mention)
        label = f"{name} ({mention})" if name else mention
        lines.append(f'<3d_box center="{write_metres(centre)}">{label}</3d_box>')
    return "\n".join(lines)


def write_metres(values) -> str:
    """Write a centre or a size in metres, to the centimetre."""
    rounded = [round(v, 2) for v in values]
    # abs: 0.0, not -0.0
    return ",".join(str(v or abs(v)) for v in rounded)


def frame_to_write(example: Example) -> int:
    """Return the view that the question asks for, else the lowest that has every object's truth."""
    views = [set(centres) for centres in example.objects.values()]
    common = set.intersection(*views)
    frame = min(common, default=None) if example.frame is None else example.frame
    if frame not in common:
        raise ValueError(
            f"{example.id}: no view, or not the one asked for, has a centre of every object"
        )
    return frame


def write_think(example: Example) -> str:
    return example.rationale or ""


def write_answer(example: Example) -> str:
    return as_answer(example.answer)


# tag -> (what the prompt shows, the function that writes it in a target). HEADER stands for the one
# that fits the number of views.
SECTIONS = {
    "detect": ('HEADER\n<3d_box center="x,y,z">name (mention)</3d_box>', write_detect),
    "think": ("your reasoning", write_think),
    "answer": ("the answer alone", write_answer),
}


def lookup(table: dict, name: str):
    """Return an entry of a registry; ValueError for a name that it lacks."""
    if name not in table:
        raise ValueError(f"{name!r} is none of: {', '.join(table)}")
    return table[name]


# ---- Parsing: the only code that sees untrusted text. It never raises, and its time is linear in
# the length of the text, so the regular expressions have no two repeats side by side.

# Not \d, which takes the digits of every script.
COUNT = "([0-9]{1,4})"
HEADER = re.compile(
    f"(?:Find|After aligning to the reference frame {COUNT}, find) {COUNT} relevant objects:"
)
DECIMAL = r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)"
MAX_CHARACTERS = 20
BOX_OPEN = '<3d_box center="'
BOX_CLOSE = "</3d_box>"
BOX_TAG = re.compile("<3d_box|</3d_box>")


@dataclass
class Parsed:
    """What could be read of a response.

    Of an ill-formed one these are the first block of each tag, and every object line that is good.
    """

    # (mention, name, (x, y, z) in metres) of each
    boxes: list = field(default_factory=list)
    # the header's N and K
    count: int | None = None
    frame: int | None = None
    think: str | None = None
    answer: str | None = None
    well_formed: bool = False
    # tag -> text, for the rewards of a fork's own tags
    sections: dict = field(default_factory=dict)


def parse(response: str, path: str) -> Parsed:
    """Read a response on that path, whatever its text (ValueError only for an unknown path)."""
    tags = lookup(PATHS, path).sections
    if not tags:
        return Parsed(answer=response, well_formed=bool(response.strip()))
    blocks, in_order = split_sections(response, tags)
    parsed = Parsed(think=blocks.get("think"), answer=blocks.get("answer"), sections=blocks)
    good_lines = True
    if "detect" in blocks:
        good_lines = read_detect(blocks["detect"], parsed)
    none_blank = all(text.strip() for text in blocks.values())
    parsed.well_formed = in_order and none_blank and good_lines and has_just(response, tags)
    return parsed


def has_just(response: str, tags: tuple[str, ...]) -> bool:
    """Tell whether each of these tags opens and closes once, and no other of SECTIONS occurs."""
    for tag in SECTIONS:
        expected = 1 if tag in tags else 0
        for mark in (f"<{tag}>", f"</{tag}>"):
            if response.count(mark) != expected:
                return False
    return True


def split_sections(response: str, tags: tuple[str, ...]) -> tuple[dict[str, str], bool]:
    """Return tag -> text of its first block, and whether the response is just these, in order.

    White space may stand between and around them.
    """
    blocks = {}
    in_order = True
    # where the block before ends
    end = 0
    for tag in tags:
        start = response.find(f"<{tag}>")
        stop = response.find(f"</{tag}>", max(start, 0))
        if not 0 <= start < stop:
            in_order = False
            continue
        if start < end or response[end:start].strip():
            in_order = False
        blocks[tag] = response[start + len(f"<{tag}>") : stop]
        end = stop + len(f"</{tag}>")
    if response[end:].strip():
        in_order = False
    return blocks, in_order


def read_detect(text: str, parsed: Parsed) -> bool:
    """Fill in boxes, count and frame; tell whether there are a header and just N good lines."""
    # Not splitlines(), which also splits at \f and U+2028.
    lines = [line.strip() for line in text.strip().split("\n")]
    header = HEADER.fullmatch(lines[0])
    if header:
        frame, count = header.groups()
        parsed.frame = None if frame is None else int(frame)
        parsed.count = int(count)
        del lines[0]
    boxes = [read_box(line) for line in lines]
    parsed.boxes = [box for box in boxes if box]
    return header is not None and 1 <= parsed.count == len(lines) == len(parsed.boxes)


def read_box(line: str) -> tuple[str, str, tuple[float, float, float]] | None:
    """Return (mention, name, (x, y, z)) of a good object line, else None."""
    if not (line.startswith(BOX_OPEN) and line.endswith(BOX_CLOSE)):
        return None
    centre, _, label = line[len(BOX_OPEN) : -len(BOX_CLOSE)].partition('">')
    numbers = centre.split(",")
    if len(numbers) != 3 or BOX_TAG.search(label):
        return None
    for text in numbers:
        if len(text) > MAX_CHARACTERS or not re.fullmatch(DECIMAL, text):
            return None
    mention, name = split_mention(label.strip())
    if not mention or not name:
        return None
    return mention, name, tuple(float(text) for text in numbers)


def split_mention(text: str) -> tuple[str, str]:
    """Split `chair (red bbox)` into (`red bbox`, `chair`).

    Parentheses nest. A text that doesn't end in some is both, mention and name.
    """
    if not text.endswith(")"):
        return text, text
    depth = 0
    for i in reversed(range(len(text))):
        if text[i] == ")":
            depth += 1
        elif text[i] == "(":
            depth -= 1
        if depth == 0:
            return text[i + 1 : -1].strip(), text[:i].strip()
    return text, text


# ---- Comparing an answer with the truth (eval.py uses the same function)

LETTERS = ("A", "B", "C", "D", "E")
# `B`, `B.`, `(B)`, `[B]`, `{B}`, `B. some text`, ...; L stands for the letter.
CHOICE = r"L[.):]?|\(L\)|\[L\]|\{L\}|(?:L[.)]|\(L\))\s.*"
# unit -> a factor and a divisor to metres, since 57 / 100 is 0.57 and 57 * 0.01 is not
UNITS = {
    **dict.fromkeys(("m", "meter", "meters", "metre", "metres"), (1, 1)),
    **dict.fromkeys(("degree", "degrees", "°"), (1, 1)),
    **dict.fromkeys(("ft", "feet"), (0.3048, 1)),
    **dict.fromkeys(("in", "inch", "inches"), (0.0254, 1)),
    **dict.fromkeys(("cm", "centimeter", "centimeters", "centimetre", "centimetres"), (1, 100)),
    "mm": (1, 1000),
    "km": (1000, 1),
}
UNIT = rf"(?:\s*((?ai:{'|'.join(UNITS)})))?(?:(?<!\.)\.)?"
UNSIGNED = r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)"
# `5`, `5 m`, `5.` and `5 m.`, but not `5..`; unlike a centre's, its sign may be U+2212.
QUANTITY = re.compile(rf"([+\u2212-]?{UNSIGNED}){UNIT}")
# An answer that is nothing else may part the thousands by commas: `1,000`, but not `5,0`.
GROUPED = r"[1-9][0-9]{0,2}(?:,[0-9]{3})+(?:\.[0-9]*)?"
NUMERAL = rf"[+\u2212-]?(?:{GROUPED}|{UNSIGNED})"
NUMBER = re.compile(rf"({NUMERAL}){UNIT}")
# What may stand around the number of a truth: one word before it and one behind. An answer has to
# do without, or it could hedge.
BEFORE = r"about|around|approximately|approx\.?|roughly|nearly|almost|~|≈"
BEHIND = "away|apart|far|wide|tall|high|long|deep|thick|across"
TRUE_NUMBER = re.compile(
    rf"(?:(?ai:{BEFORE})\s*)?(?P<number>{NUMBER.pattern})(?:\s+(?ai:{BEHIND})\.?)?"
)
# direction of a camera motion -> (axis, sign)
DIRECTIONS = {
    "move_right": (0, 1),
    "move_left": (0, -1),
    "move_up": (1, 1),
    "move_down": (1, -1),
    "move_forward": (2, 1),
    "move_backward": (2, -1),
    "rotate_right": (3, 1),
    "rotate_left": (3, -1),
    "rotate_up": (4, 1),
    "rotate_down": (4, -1),
}


def answer_score(answer: str | None, truth: str) -> float:
    """Score an answer in [0, 1], by the truth's kind."""
    if answer is None:
        return 0.0
    kind = truth_kind(truth)
    if kind == "choice":
        forms = CHOICE.replace("L", true_letter(truth))
        return 1.0 if re.fullmatch(forms, answer.strip(), re.I | re.S) else 0.0
    if kind == "motion":
        return motion_score(motion(answer), motion(truth))
    # Said in the truth's own words, a number is right, too.
    if normalised(answer) == normalised(truth):
        return 1.0
    if kind == "number":
        return closeness(number(answer), number(as_answer(truth)))
    if latex.is_latex(truth) and latex.equal(truth, answer):
        return 1.0
    return 0.0


def truth_kind(truth: str) -> str:
    """Return choice (of A-E), motion (of the camera), number, or text (anything else).

    A truth is read as an answer would be: `B`, `(B)` and `B. chair` are choices, `1.5`, `30°` and
    `1,000 m` numbers. In addition a number may have a word of BEFORE and one of BEHIND around it:
    `about 2.4 meters away`. A bare `a` is a text.
    """
    if true_letter(truth):
        return "choice"
    if "move_" in truth or "rotate_" in truth:
        return "motion"
    if math.isfinite(number(as_answer(truth))):
        return "number"
    return "text"


def true_letter(truth: str) -> str | None:
    """Return B of `B`, `(B)`, `b)` or `B. chair`; None of a truth that is no choice."""
    text = truth.strip()
    for letter in LETTERS:
        if text == letter:
            return letter
        if len(text) > 1 and re.fullmatch(CHOICE.replace("L", letter), text, re.I | re.S):
            return letter
    return None


def as_answer(truth: str) -> str:
    """Return a truth as an answer has to say it: `2.4 meters` of `about 2.4 meters away`."""
    match = TRUE_NUMBER.fullmatch(truth.strip())
    if match is None or match["number"] == truth.strip():
        return truth
    return match["number"]


def number(text: str) -> float:
    """Read one decimal number with at most a unit behind it, in metres; nan for anything else."""
    match = NUMBER.fullmatch(text.strip())
    if not match:
        return math.nan
    numeral, unit = match.groups()
    factor, divisor = UNITS[(unit or "m").lower()]
    return float(numeral.replace("\u2212", "-").replace(",", "")) * factor / divisor


def closeness(x: float, true: float) -> float:
    """Score a number: (e^-2r - e^-2) / (1 - e^-2) of the relative error r, and 0 from r = 1 on."""
    # The official code's e^-2r, less its floor: r = 1 is what a constant guess of 0 reaches.
    r = abs(x - true) / (abs(true) + 0.01)
    # Not `r >= 1`, which is False for nan.
    if not r < 1:
        return 0.0
    return (math.exp(-2 * r) - math.exp(-2)) / (1 - math.exp(-2))


def motion(text: str) -> list[float]:
    """Read `move_right:0.4,rotate_left:30` as five signed axes.

    An unknown, repeated or unreadable entry makes all of them nan, which scores 0.
    """
    axes = [0.0] * 5
    seen = set()
    for entry in text.split(","):
        direction, _, amount = entry.partition(":")
        direction = direction.strip()
        value = number(amount)
        if direction not in DIRECTIONS or direction in seen or not math.isfinite(value):
            return [math.nan] * 5
        seen.add(direction)
        axis, sign = DIRECTIONS[direction]
        axes[axis] += sign * value
    return axes


def motion_score(axes: list[float], true: list[float]) -> float:
    """Average the closeness over the axes on which answer or truth moves; 1 where neither does."""
    scores = [closeness(a, b) for a, b in zip(axes, true, strict=True) if a or b]
    return sum(scores) / len(scores) if scores else 1.0


def normalised(text: str) -> str:
    return " ".join(text.lower().split()).removesuffix(".")


# ---- Rewards: (Parsed, Example) -> [0, 1]. They see well-formed responses only; others earn 0.

# (nearer than, in metres; points). Absolute, as in the paper: the same at 1 m and at 8 m of depth.
STEPS = (
    (0.1, 1.0),
    (0.2, 0.8),
    (0.3, 0.6),
    (0.4, 0.4),
    (0.6, 0.2),
    (1.0, 0.1),
)
# Centres lie on a 0.01 m grid, so a distance of exactly 0.1 m happens; it has to fall on the same
# side on every machine.
TIE_SLACK = 1e-6


def accuracy(parsed: Parsed, example: Example) -> float:
    return answer_score(parsed.answer, example.answer)


def well_formed(parsed: Parsed, example: Example) -> float:
    return 1.0


def detection(parsed: Parsed, example: Example) -> float:
    """Average the points of the objects over max(boxes, objects).

    Of several views, centres are compared in the frame that the header states.
    """
    truth = example.objects
    if several_views(example):
        if example.frame not in (None, parsed.frame):
            return 0.0
        # An object without truth in this frame is left out here and still counts below.
        views = truth.items()
        truth = {
            mention: by_view[parsed.frame] for mention, by_view in views if parsed.frame in by_view
        }
    said = {}
    for mention, _, centre in parsed.boxes:
        # The first box of a mention counts; the others only lengthen `boxes` below.
        said.setdefault(mention.lower(), centre)
    total = 0.0
    for mention, centre in truth.items():
        if mention.lower() in said:
            total += points(math.dist(centre, said[mention.lower()]))
    return total / max(len(parsed.boxes), len(example.objects), 1)


def points(distance: float) -> float:
    for limit, value in STEPS:
        if distance < limit - TIE_SLACK:
            return value
    return 0.0


REWARDS = {
    "accuracy": accuracy,
    "format": well_formed,
    "detect": detection,
}


class Scores:
    """What a response earns: `total`, and `parts`, each reward's by its name.

    It is built, unpacked and compared like the tuple (total, accuracy, format, detect), which goes
    on with a fork's own rewards, in the order of REWARDS. Parts that are not given are 0.
    """

    def __init__(self, total: float, *parts: float):
        self.total = total
        self.parts = dict.fromkeys(REWARDS, 0.0)
        self.parts |= zip(list(REWARDS)[: len(parts)], parts, strict=True)

    @property
    def accuracy(self) -> float:
        return self.parts["accuracy"]

    @property
    def format(self) -> float:
        return self.parts["format"]

    @property
    def detect(self) -> float:
        return self.parts["detect"]

    def __iter__(self) -> Iterator[float]:
        yield self.total
        yield from self.parts.values()

    def __len__(self) -> int:
        return 1 + len(self.parts)

    def __eq__(self, other) -> bool:
        if not isinstance(other, Scores | tuple):
            return NotImplemented
        return tuple(self) == tuple(other)

    def __repr__(self) -> str:
        return f"Scores(total={self.total}, parts={self.parts})"


def score(response: str, example: Example, rules: str = "strict") -> Scores:
    """Score a response: the total by its path's weights, and every part; finite and in [0, 1].

    rules: strict; or official, which has that code's bugs (detect above 1, accuracy nan); else
    ValueError.
    """
    rewards = lookup(RULES, rules)
    if not lookup(PATHS, example.path).sections:
        # The official code has no such path.
        rewards = strict
    parts = dict.fromkeys(REWARDS, 0.0) | rewards(response, example)
    return Scores(total_of(parts, example), *parts.values())


def total_of(
    parts: dict[str, float], example: Example, changes: dict[str, float] | None = None
) -> float:
    """Return the weighted sum of the parts. changes: of the weights, see `weights_of`."""
    weights = weights_of(example, changes)
    return sum(weight * parts[name] for name, weight in weights.items())


def weights_of(example: Example, changes: dict[str, float] | None = None) -> dict[str, float]:
    """Return the weight of every reward in this example's total, in the order of REWARDS.

    changes: other weights for some of the rewards that the path weighs; the rest of its weights
    keep their proportions, and all of them sum to 1 as before. Without a rest nothing changes.
    """
    path = lookup(PATHS, example.path)
    weights = path.weights if example.objects else path.weights_without_objects
    changed = {name: weight for name, weight in (changes or {}).items() if name in weights}
    unchanged = sum(weight for name, weight in weights.items() if name not in changed)
    if changed and unchanged:
        scale = (1 - sum(changed.values())) / unchanged
        weights = {name: scale * weight for name, weight in weights.items()} | changed
    return dict.fromkeys(REWARDS, 0.0) | weights


def strict(response: str, example: Example) -> dict[str, float]:
    """Apply every entry of REWARDS; an empty dict where the response is ill-formed."""
    parsed = parse(response, example.path)
    if not parsed.well_formed:
        return {}
    return {name: reward(parsed, example) for name, reward in REWARDS.items()}


def as_official(response: str, example: Example) -> dict[str, float]:
    """Put the official code's accuracy, format and detect in the place of ours."""
    theirs = official.rewards(response, example, several_views(example), STEPS)
    return strict(response, example) | theirs


RULES = {"strict": strict, "official": as_official}
