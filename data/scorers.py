"""What an answer to a benchmark earns, by two scorers, and the aggregates that the benchmark
publishes.

official  the published rule, bugs included, on the first <answer> block (without one: on the whole
response)
    spar-bench  SPAR's and lmms-eval's. Numbers: MRA of the first (single view) or the last
    (several),
                unsigned; ties fall as numpy's floats do. Options: equal, or a substring of the
                truth (so the empty answer is right), or the first character. Camera motion: mean
                MRA over five axes with truth and answer swapped: the error is divided by the
                answer. All as they are, not stripped.
    embspatial  SR-REAL's: the first standalone A to D of the upper-cased text: the article "a" is option A
    cv-bench    lmms-eval's: the first letter of the text: "The answer is B" is T
    erqa, realworldqa    lmms-eval's: a truth of A to D against the letter that is extracted (read_choice),
                any other by equality of the lower-cased text without its last dots
    sat, blink  SR-REAL's, BLINK's first step: equal but for case, ( ) . and blanks
    spatialrgpt-bench    the judge's instructions: the first yes or no, region, clock hour or length in the
                text; a length is right within 25 %, a direction within an hour. "In fact, ..." and
                "Actually, ..." are noes; a truth without what its category asks for earns nothing
robust    reads one answer or none, and none is wrong: in <answer> only the forms that srreal.answer_score
    takes, or an option's text; without <answer> what the last "answer is X" says, else the only
    letter (number) in the text, or a text of a few words. Where an A may be an article beside
    another letter, none. Signed numbers with units; MRA with exact ties, and truth and answer in
    their places.

Where the published scorer is a language model (JUDGED), `official` is a rule without it.
`unparsed`: the share of responses in which the robust scorer reads no answer, given with both.
"""

import math
import re
from collections.abc import Callable, Iterable

import numpy as np

from srreal import (
    CHOICE,
    DECIMAL,
    QUANTITY,
    UNITS,
    Example,
    answer_score,
    motion,
    number,
    split_mention,
)

JUDGED = {
    "blink": "official is its exact match; the published one asks GPT-3.5 to match what is left",
    "spatialrgpt-bench": "official is a rule; the published one is GPT-4 as a judge",
}
KINDS = ("oc", "oo", "oc_mv", "oo_mv")  # object to camera, object to object; _mv: several views
LOW = [f"{what}_prediction_{kind}" for what in ("depth", "distance") for kind in KINDS]
MIDDLE = ["view_change_infer", "position_matching", "camera_motion_infer"]
HIGH = [
    "obj_spatial_relation_oo",
    "obj_spatial_relation_oc_mv",
    "obj_spatial_relation_oo_mv",
    *(f"spatial_imagination_{kind}" for kind in KINDS),
    "distance_infer_center_oo",
    "distance_infer_center_oo_mv",
]
LEVELS = {"Low": LOW, "Middle": MIDDLE, "High": HIGH}
# asked with several views
SEVERAL = {*MIDDLE, *(task for task in LOW + HIGH if task.endswith("_mv"))}
COLUMNS = {  # of SpatialRGPT-Bench's table -> the words in its categories
    "below/above": ("below", "above"),
    "left/right": ("left", "right"),
    "big/small": ("big", "small"),
    "tall/short": ("tall", "short"),
    "wide/thin": ("wide", "thin"),
    "behind/front": ("behind", "front"),
    "direct": ("distance",),
    "horizontal": ("horizontal",),
    "vertical": ("vertical",),
    "width": ("width",),
    "height": ("height",),
    "direction": ("direction",),
}


def answer_block(response: str) -> str | None:
    inside, closed, _ = response.partition("<answer>")[2].partition("</answer>")
    return inside if closed else None


# ---- Mean relative accuracy, and camera motions

THRESHOLDS = np.linspace(0.5, 0.95, 10)


def mra(value: float, true: float, slack: float = 0.0) -> float:
    """The share of the thresholds t with |value - true| / |true| <= 1 - t (true = 0: the absolute
    error)."""
    error = abs(value - true) if true == 0 else abs((value - true) / true)
    return float((error <= 1 - THRESHOLDS + slack).mean())


def official_motion(text: str) -> list[float]:
    """Five signed axes. Unknown keys count for nothing, of a repeated one the last is taken."""
    moves = {key: float(value) for key, value in (item.split(":") for item in text.split(","))}
    pairs = [
        "move_right move_left",
        "move_up move_down",
        "move_forward move_backward",
        "rotate_right rotate_left",
        "rotate_up rotate_down",
    ]
    return [moves.get(plus, 0) - moves.get(minus, 0) for plus, minus in map(str.split, pairs)]


# ---- Official rules: (text of the answer, Example) -> score


def spar_official(text: str, example: Example) -> float:
    try:
        if example.task == "view_change_infer":
            pairs = zip(official_motion(text), official_motion(example.answer), strict=True)
            # swapped, as published
            return float(np.mean([mra(true, value) for value, true in pairs]))
        if example.task in LOW:
            found = re.findall(r"(?<!\^)\d+\.\d+|(?<!\^)\d+", text)
            return mra(
                float(found[-1 if example.task.endswith("_mv") else 0]), float(example.answer)
            )
    except (ValueError, IndexError):
        return 0.0
    said, true = text.lower(), example.answer.lower()
    return float(said in true or said[0] == true)


def embspatial_official(text: str, example: Example) -> float:
    found = re.search(r"\b([A-D])\b", text.upper())
    return float(bool(found) and found[1] == example.answer)


def first_letter_official(text: str, example: Example) -> float:
    found = re.match(r"[(\s]*([A-Z])", text.strip(), re.I)
    return float(bool(found) and found[1].upper() == example.answer)


def equal_official(text: str, example: Example) -> float:
    said, true = (
        t.lower().translate(dict.fromkeys(map(ord, "(). "))) for t in (text, example.answer)
    )
    return float(said == true)


def letter_official(text: str, example: Example) -> float:
    if example.answer in tuple("ABCD"):
        return float(read_choice(text, example.question) == example.answer)
    return float(text.lower().strip().rstrip(".") == example.answer.lower().strip())


# ---- SpatialRGPT-Bench: what a judge would read off free text. Here truths are free text, too

YES = re.compile(
    r"\b(?:(yes|correct|indeed|true)|(no|not|incorrect|false|wrong|isn['’]t"
    # also no
    r"|(?<!.)(?:in fact|actually)(?=,?\s(?:region|it|the)\b)))\b",
    re.I | re.S,
)
HOUR = re.compile(r"\b([0-9]{1,2})(?::[0-9]{2})?\s*o['’]?\s?clock", re.I)
LENGTH = re.compile(
    rf"(?<![\w.])(?<!\d,)({DECIMAL}\s*)(?ai:({'|'.join(UNITS)})|foot)(?!\w|\s+the\b)"
)


def lengths(text: str) -> list[float]:
    """Metres; a bare number is no length, nor is "2 in the", nor a part of 1,200 m."""
    return [number(value + (unit or "feet")) for value, unit in LENGTH.findall(text)]


def verdicts(text: str) -> list[bool]:
    return [bool(found[1]) for found in YES.finditer(text.strip())]


def regions_named(text: str) -> list[int]:
    return [int(k) for k in re.findall(r"region\s*\[?([0-9]{1,2})\b", text, re.I)]


def hours(text: str) -> list[int]:
    return [int(hour) % 12 for hour in HOUR.findall(text)]


def read_judged(example: Example) -> Callable[[str], list]:
    """What to look for in truth and response of a category."""
    task = example.task
    if task.endswith("_predicate"):
        return verdicts
    return regions_named if task.endswith("_choice") else hours if "direction" in task else lengths


def judged_score(said, example: Example) -> float:
    read = read_judged(example)
    # "Region [0] is behind it": it affirms
    found = read(example.answer) or [True] * (read is verdicts)
    if not found:
        return 0.0
    if read is hours:
        return float(clock(said, found[0]) <= 1)
    return float(
        0.75 * found[0] <= said <= 1.25 * found[0] if read is lengths else said == found[0]
    )


def clock(a: int, b: int) -> int:
    return min(abs(a - b), 12 - abs(a - b))


def judged_official(text: str, example: Example) -> float:
    found = read_judged(example)(text)
    return judged_score(found[0], example) if found else 0.0


def judged_robust(response: str, example: Example) -> float | None:
    """One distinct thing said, in <answer> where there is one; a verdict is the sentence's first
    word."""
    block, read = answer_block(response), read_judged(example)
    text = (response if block is None else block).strip()
    if read is verdicts:
        first = YES.match(text)
        found = {bool(first[1])} if first else set(verdicts(text))
    elif read is lengths:
        # in <answer>, as everywhere else, a number without unit is in metres
        bare = QUANTITY.fullmatch(text)
        found = {number(text)} if bare else set(lengths(text))
    else:
        found = {int(text)} if re.fullmatch("[0-9]{1,2}", text) else set(read(text))
    return judged_score(found.pop(), example) if len(found) == 1 else None


# ---- The robust scorer

LETTERS = "ABCDEFGH"
# Of a question, each in its line or all in one; data/rationale.py reads them by this, too.
OPTION = re.compile(
    r"(?<![\w(])\(?([A-H])[.)]\s*(.+?)(?=\s+\(?[A-H][.)]|\s*$|\.?\s+(?:Please|Answer)\b)", re.M
)
SAYS = r"\b(?i:answer(?:\s+is\b\s*:?|\s*:))[\s*_\"'`]*"
# In lower case, b to h are no words, and a is none at the end or before a sign.
EXPLICIT = re.compile(
    SAYS + r"(?:[Oo]ption\s+)?[(\[{]?([A-Hb-h]|a(?=[^\w\s]|\s*(?:\n|$)))(?!\.?\w|['’-])"
    r"(?!\s*(?:or|and|/)\s*\(?[A-Ha-h]\b)"
)
ALONE = r"(?<![\w'’-])({})(?![\w'’-])"
NO_NOUN = "is|are|was|or|and|because|since|as|but|for|seems|looks|appears|has|would|must|should|can"
ANY = re.compile(ALONE.format("[A-H]"))
SURE = re.compile(
    ALONE.format(  # "A chair" has an article
        r"[B-H]|(?<=[Oo]ption )A|(?<=[Cc]hoice )A|(?<=[Ll]etter )A"
        rf"|A(?![ \t]+(?!(?:{NO_NOUN})\b)\w)"
    )
)
SAID_NUMBER = re.compile(SAYS + r"\(?" + QUANTITY.pattern + r"(?![\w.]*\w)")
ANY_NUMBER = re.compile(rf"(?<![\w.,^+-]){QUANTITY.pattern}(?![\w^]|[.,][0-9])")
ASKED_UNIT = re.compile(rf"\b(?:in|how many) ({'|'.join(UNITS)})\b", re.I)
FEW = 4  # words of a response that can be an answer by itself; more is prose


def plain(text: str) -> str:
    return " ".join(text.lower().split()).removesuffix(".")


def read_choice(response: str, question: str) -> str | None:
    """The letter that a response chooses, or None."""
    block = answer_block(response)
    text = (response if block is None else block).strip()
    if block is None and (explicit := EXPLICIT.findall(text)):
        return explicit[-1].upper()
    sure = set(SURE.findall(text)) if block is None else set()
    forms = [
        letter
        for letter in LETTERS
        if sure <= {letter}  # not "A. It is near.\nB. It is far."
        and re.fullmatch(CHOICE.replace("L", letter), text, re.I | re.S)
    ]
    worded = [letter for letter, option in OPTION.findall(question) if plain(option) == plain(text)]
    sole = sure if len(sure) == 1 and sure == set(ANY.findall(text)) else ()
    return next(iter((*forms, *worded, *sole)), None)


def read_number(response: str, question: str) -> float | None:
    """The number that a response states, in the unit that the question asks for, else in metres."""
    block = answer_block(response)
    text = (response.replace("**", "") if block is None else block).strip()
    found = QUANTITY.fullmatch(text)
    if not found and block is None:
        explicit, every = [*SAID_NUMBER.finditer(text)], [*ANY_NUMBER.finditer(text)]
        several = len({number(one[0]) for one in every}) != 1
        found = explicit[-1] if explicit else None if several else every[0]
    if not found:
        return None
    asked, (value, unit) = ASKED_UNIT.search(question), found.groups()
    stated = number(f"{value} {unit or 'm'}")
    return stated / number(f"1 {asked[1]}") if unit and asked else stated


def said_text(text: str) -> str | None:
    """What the last "answer is" says, to the end of its sentence."""
    ends = [found.end() for found in re.finditer(SAYS, text)]
    said = re.split(r"[.!](?:\s|$)|\n", text[ends[-1] :], maxsplit=1)[0] if ends else ""
    return said.strip(" *_\"'`") or None


def read_text(response: str, words: int = FEW) -> str | None:
    """What <answer> holds, else what the last "answer is" says, else a response of at most so many
    words."""
    block = answer_block(response)
    if block is None:
        text = response.replace("**", "")
        block = said_text(text) or (text if len(text.split()) <= words else "")
    return plain(block) or None


def robust(response: str, example: Example) -> float | None:
    """1 or 0, or None where no answer can be read. SPAR's numbers and camera motions earn MRA."""
    if example.answer.strip() in tuple(LETTERS):
        letter = read_choice(response, example.question)
        return letter and float(letter == example.answer.strip())
    if example.task == "view_change_infer":
        axes, true = motion(read_text(response, 10) or ""), motion(example.answer)
        pairs = list(zip(axes, true, strict=True))
        return (
            float(np.mean([mra(*p, 1e-9) for p in pairs]))
            if all(map(math.isfinite, axes))
            else None
        )
    if math.isfinite(number(example.answer)):
        value, true = (read_number(text, example.question) for text in (response, example.answer))
        exact = value is not None and math.isclose(value, true, abs_tol=1e-9)
        return (
            value
            if value is None
            else mra(value, true, 1e-9)
            if example.task in LOW
            else float(exact)
        )
    said = read_text(response, max(FEW, len(example.answer.split())))
    return said and answer_score(said, example.answer)


# ---- 2D boxes, as a family writes them

BOX_NUMBER = re.compile(r"(?<![\w.-])[0-9]+(?:\.[0-9]+)?(?![\w.])")  # not the 2 in "bbox_2d"


def read_box(text: str | None) -> list[float] | None:
    """The four numbers of a text that has just these, x0 < x1 and y0 < y1; else None."""
    found = [float(n) for n in BOX_NUMBER.findall(text or "")]
    return found if len(found) == 4 and found[0] < found[2] and found[1] < found[3] else None


def box_iou(said: str | None, true: str) -> float:
    """Intersection over union; 0 without a box. Both in one unit an axis, whichever: it cancels
    out."""
    said, true = read_box(said), read_box(true)
    if said is None or true is None:
        return 0.0
    (a, b, c, d), (e, f, g, h) = said, true
    common = max(min(c, g) - max(a, e), 0) * max(min(d, h) - max(b, f), 0)
    return common / ((c - a) * (d - b) + (g - e) * (h - f) - common)


# ---- 3D boxes, as data/grounding.py asks for them

TRIPLE = ",".join([DECIMAL] * 3)
BOX_3D = re.compile(rf'<3d_box center="({TRIPLE})"(?: size="({TRIPLE})")?>([^<>]+)</3d_box>')


def read_boxes_3d(text: str) -> dict[str, tuple]:
    """mention (`red chair (region 1)`: region 1; without parentheses all of it), lower-cased ->
    (centre, size or None), metres. The first box of a mention counts; what no room holds is
    none."""
    boxes: dict[str, tuple] = {}
    for centre, size, label in BOX_3D.findall(text):
        centre, size = (
            tuple(map(float, triple.split(","))) if triple else None for triple in (centre, size)
        )
        if max(map(abs, centre + (size or ()))) < 1e6:
            boxes.setdefault(split_mention(label.strip())[0].lower(), (centre, size))
    return boxes


# ---- Aggregates: pairs of (Example, score in 0..100) -> key -> mean


def means(pairs: Iterable, key: Callable) -> dict[str, float]:
    """The mean score of each key(example); None is left out."""
    groups: dict[str, list[float]] = {}
    for example, value in pairs:
        groups.setdefault(key(example), []).append(value)
    return {name: float(np.mean(values)) for name, values in groups.items() if name is not None}


def averages(table: dict[str, float], groups: dict[str, Iterable[str]]) -> dict[str, float]:
    """The mean of each group's entries; a group without any is left out (a part of a benchmark was
    asked)."""
    found = {name: [table[key] for key in keys if key in table] for name, keys in groups.items()}
    return {name: float(np.mean(values)) for name, values in found.items() if values}


def by_sample(pairs: list) -> dict[str, float]:
    return means(pairs, lambda e: "overall") | means(pairs, lambda e: e.task or None)


def spar(pairs: list) -> dict[str, float]:
    """Task means, as SPAR publishes them; `_samples` and the splits weigh by sample, as SR-REAL
    does."""
    tasks = means(pairs, lambda e: e.task)
    level = {task: name for name, members in LEVELS.items() for task in members}
    views, form = {True: "multi", False: "single"}, {True: "fill", False: "select"}
    fill = {*LOW, "view_change_infer"}
    split = lambda e: f"{views[e.task in SEVERAL]}_{form[e.task in fill]}"  # noqa: E731
    out = {"overall": float(np.mean(list(tasks.values())))}
    out |= averages(tasks, LEVELS)
    out |= {f"{name}_samples": mean for name, mean in means(pairs, lambda e: level[e.task]).items()}
    return (
        out
        | {"overall_samples": float(np.mean([v for _, v in pairs]))}
        | means(pairs, split)
        | tasks
    )


def source(example: Example) -> str:
    """The part of an id before its first _: where the image is from."""
    return example.id.partition("_")[0]


def embspatial(pairs: list) -> dict[str, float]:
    return by_sample(pairs) | means(pairs, source)


def sat(pairs: list) -> dict[str, float]:
    """Every question stands there in two orders of its options; `circular`: right in both."""
    both: dict[str, list[float]] = {}
    for example, value in pairs:
        both.setdefault(example.id.rpartition("-")[0], []).append(value)
    return by_sample(pairs) | {
        "circular": float(np.mean([min(values) for values in both.values()]))
    }


def cv_bench(pairs: list) -> dict[str, float]:
    """2D is the mean of ADE20K and COCO, 3D is Omni3D, overall the mean of both; `_samples`: of the
    rows."""
    table = means(pairs, source)
    halves = averages(table, {"2D": ("ADE20K", "COCO"), "3D": ("Omni3D",)})
    rows = by_sample(pairs)
    overall = float(np.mean(list(halves.values()))) if halves else rows["overall"]
    return rows | table | halves | {"overall": overall, "overall_samples": rows["overall"]}


def blink(pairs: list) -> dict[str, float]:
    tasks, rows = means(pairs, lambda e: e.task), by_sample(pairs)
    return rows | {
        "overall": float(np.mean(list(tasks.values()))),
        "overall_samples": rows["overall"],
    }


def spatialrgpt_column(task: str) -> str | None:
    words = set(task.split("_"))
    # horizontal_distance_data also holds the word distance
    order = ["horizontal", "vertical", *COLUMNS]
    return next((name for name in order if words.intersection(COLUMNS[name])), None)


def spatialrgpt(pairs: list) -> dict[str, float]:
    """Success by column of the published table. qualitative and quantitative are of their rows, as
    the set's script prints them; `_columns`: the means of six columns each."""
    table = means(pairs, lambda e: spatialrgpt_column(e.task))
    halves = {"qualitative": list(COLUMNS)[:6], "quantitative": list(COLUMNS)[6:]}
    half = {column: name for name, columns in halves.items() for column in columns}
    columns = averages(table, {f"{name}_columns": members for name, members in halves.items()})
    rows = means(pairs, lambda e: half[spatialrgpt_column(e.task)])
    return {"overall": float(np.mean([value for _, value in pairs]))} | rows | columns | table


def judged_errors(pairs: Iterable[tuple[Example, str]]) -> dict[str, float]:
    """Column of SpatialRGPT-Bench -> mean |said - true| / true of its lengths, or degrees of its
    directions, over the answers and truths that are read."""
    found: dict[str, list[float]] = {}
    for example, response in pairs:
        read, block = read_judged(example), answer_block(response)
        said, true = (read(text) for text in (response if block is None else block, example.answer))
        if read in (hours, lengths) and said and true and (read is hours or true[0] > 0):
            error = (
                30 * clock(said[0], true[0]) if read is hours else abs(said[0] - true[0]) / true[0]
            )
            found.setdefault(spatialrgpt_column(example.task), []).append(float(error))
    return {column: float(np.mean(errors)) for column, errors in found.items()}


OFFICIAL = {  # benchmark -> (official rule, robust rule, aggregates)
    "spar-bench": (spar_official, robust, spar),
    "spar-bench-tiny": (spar_official, robust, spar),
    "embspatial": (embspatial_official, robust, embspatial),
    "sat": (equal_official, robust, sat),
    "cv-bench": (first_letter_official, robust, cv_bench),
    "blink": (equal_official, robust, blink),
    "realworldqa": (letter_official, robust, by_sample),
    "erqa": (letter_official, robust, by_sample),
    "spatialrgpt-bench": (judged_official, judged_robust, spatialrgpt),
}


def score(
    name: str, pairs: Iterable[tuple[Example, str]], scorer: str = "official"
) -> dict[str, float]:
    """Per cent: `overall`, every published breakdown by its published name, and `unparsed`.
    ValueError for an unknown benchmark or scorer, and without pairs."""
    name, pairs = name.partition("/")[0], list(pairs)
    if name not in OFFICIAL or scorer not in ("official", "robust") or not pairs:
        raise ValueError(
            f"{name!r} by scorer {scorer!r}, {len(pairs)} answers: wanted one of "
            f"{', '.join(OFFICIAL)}, official or robust, and an answer"
        )
    published, strict, aggregate = OFFICIAL[name]
    read = [strict(response, example) for example, response in pairs]
    if scorer == "official":
        texts = [
            response if (block := answer_block(response)) is None else block
            for _, response in pairs
        ]
        scores = [published(text, example) for text, (example, _) in zip(texts, pairs, strict=True)]
    else:
        scores = [value or 0.0 for value in read]
    rows = [(example, 100 * value) for (example, _), value in zip(pairs, scores, strict=True)]
    return aggregate(rows) | {"unparsed": 100 * sum(value is None for value in read) / len(read)}
