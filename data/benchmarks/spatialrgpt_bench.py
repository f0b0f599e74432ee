"""SpatialRGPT-Bench: relations, sizes, distances and directions of regions, in free text.

The published rule is GPT-4 as a judge; `official` is its instructions without it: the first yes or
no, region, clock hour or length in the text. A length is right within 25 %, a direction within an
hour. "In fact, ..." and "Actually, ..." are noes; a truth without what its category asks for earns
nothing. robust: one distinct thing said, in <answer> where there is one.

Questions have regions on every path.
"""

import operator
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from data.benchmarks.answers import answer_text
from data.benchmarks.means import Mean, Scored, averages, mean, means
from data.benchmarks.schema import Benchmark, Item, Row
from data.rows import Bad, typed
from data.sets.regions import FOUR, clip
from srreal import DECIMAL, QUANTITY, UNITS, Example, number

# Column of the published table -> the words in its categories. The first that fits counts:
# horizontal_distance_data has the word distance, too.
QUALITATIVE = {
    "below/above": {"below", "above"},
    "left/right": {"left", "right"},
    "big/small": {"big", "small"},
    "tall/short": {"tall", "short"},
    "wide/thin": {"wide", "thin"},
    "behind/front": {"behind", "front"},
}
QUANTITATIVE = {
    "horizontal": {"horizontal"},
    "vertical": {"vertical"},
    "direct": {"distance"},
    "width": {"width"},
    "height": {"height"},
    "direction": {"direction"},
}


def column_of(task: str) -> str | None:
    words = set(task.split("_"))
    for column, own in (QUALITATIVE | QUANTITATIVE).items():
        if words & own:
            return column
    return None


# ---- Rows


def read(row: Row) -> Iterator[Item]:
    task = typed(row.value("qa_info"), {"category": str}, {})["category"]
    if column_of(task) is None:
        raise Bad("qa_info", f"unknown category: {task!r}")
    if row.has("image"):
        image = row.image(row.value("image"))
    else:
        image = row.image(typed(row.value("image_info"), {"file_path": str}, {})["file_path"])
    turns = row.items("conversations")
    if len(turns) < 2:
        raise Bad("conversations", "there is no answer")
    # The set's own code cuts its masks off at the edges.
    boxes = [clip(box, image.size) for box in row.items("bbox", FOUR)]
    text = row.text("text_q")
    # A <mask> each in the order of the text, where a region is named for the first time.
    places = {k: text.find(f"Region [{k}]") for k in range(len(boxes))}
    named = sorted((k for k in places if places[k] >= 0), key=places.get)
    if not named:
        raise Bad("text_q", "names no region")
    for k in named:
        text = text.replace(f"Region [{k}]", f"Region [{k}] <mask>", 1)
    yield Item(
        row.text("id"),
        [image],
        typed(turns[1], {"value": str}, {})["value"],
        task,
        text,
        regions=[(0, boxes[k]) for k in named],
    )


# ---- What a judge would read off free text. Here truths are free text, too

VERDICT = re.compile(
    r"\b(?:(yes|correct|indeed|true)|(no|not|incorrect|false|wrong|isn['’]t"
    # Also a no: truths of the set that begin so contradict the question.
    r"|(?<!.)(?:in fact|actually)(?=,?\s(?:region|it|the)\b)))\b",
    re.IGNORECASE | re.DOTALL,
)
REGION = re.compile(r"region\s*\[?([0-9]{1,2})\b", re.IGNORECASE)
HOUR = re.compile(r"\b([0-9]{1,2})(?::[0-9]{2})?\s*o['’]?\s?clock", re.IGNORECASE)
# A bare number is no length, nor is "2 in the", nor a part of 1,200 m.
LENGTH = re.compile(
    rf"(?<![\w.])(?<!\d,)({DECIMAL}\s*)(?ai:({'|'.join(UNITS)})|foot)(?!\w|\s+the\b)"
)


@dataclass(frozen=True)
class Reading:
    """How answers to a category are read and compared."""

    every: Callable[[str], list]  # all that a text says
    alone: Callable[[str], object]  # what a text says at once, or None
    right: Callable[[object, object], bool]  # (said, true)
    error: Callable[[float, float], float] | None = None  # (said, true) -> as it is published
    silent: tuple = ()  # what a truth says that says nothing of the kind


def verdicts(text: str) -> list[bool]:
    return [found[1] is not None for found in VERDICT.finditer(text.strip())]


def first_word(text: str) -> bool | None:
    found = VERDICT.match(text)
    return found and found[1] is not None


def regions(text: str) -> list[int]:
    return [int(k) for k in REGION.findall(text)]


def hours(text: str) -> list[int]:
    return [int(hour) % 12 for hour in HOUR.findall(text)]


def short_number(text: str) -> int | None:
    return int(text) if re.fullmatch("[0-9]{1,2}", text) else None


def lengths(text: str) -> list[float]:
    return [number(value + (unit or "feet")) for value, unit in LENGTH.findall(text)]


def bare_length(text: str) -> float | None:
    # Within a sentence a length needs its unit; alone it is in metres, as in <answer> everywhere.
    return number(text) if QUANTITY.fullmatch(text) else None


def hours_apart(a: int, b: int) -> int:
    return min(abs(a - b), 12 - abs(a - b))


# "Region [0] is behind it" affirms.
PREDICATE = Reading(verdicts, first_word, operator.eq, silent=(True,))
CHOICE = Reading(regions, short_number, operator.eq)
DIRECTION = Reading(
    hours,
    short_number,
    right=lambda said, true: hours_apart(said, true) <= 1,
    error=lambda said, true: 30.0 * hours_apart(said, true),  # degrees
)
DISTANCE = Reading(
    lengths,
    bare_length,
    right=lambda said, true: 0.75 * true <= said <= 1.25 * true,
    error=lambda said, true: abs(said - true) / true,
)


def reading_of(example: Example) -> Reading:
    if example.task.endswith("_predicate"):
        return PREDICATE
    if example.task.endswith("_choice"):
        return CHOICE
    return DIRECTION if "direction" in example.task else DISTANCE


# ---- Scores


def score_of(said, example: Example) -> float:
    reading = reading_of(example)
    # The first thing that a truth says counts, as in the official reading of an answer.
    truths = reading.every(example.answer) or reading.silent
    return float(bool(truths) and reading.right(said, truths[0]))


def official(text: str, example: Example) -> float:
    found = reading_of(example).every(text)
    return score_of(found[0], example) if found else 0.0


def robust(response: str, example: Example) -> float | None:
    reading = reading_of(example)
    text = answer_text(response).strip()
    # "No, it is right of it." says no at once; "It isn't; yes?" says two things.
    said = reading.alone(text)
    if said is None:
        distinct = set(reading.every(text))
        if len(distinct) != 1:
            return None
        (said,) = distinct
    return score_of(said, example)


def aggregate(scored: Scored) -> dict[str, Mean]:
    """Average success by column of the published table.

    qualitative and quantitative are of their rows, as the set's script prints them; `_columns`: the
    means of six columns each.
    """
    columns = means(scored, lambda example: column_of(example.task))
    halves = {"qualitative_columns": QUALITATIVE, "quantitative_columns": QUANTITATIVE}
    out = {"overall": scored.mean()}
    out |= means(scored, half)
    return out | averages(columns, halves) | columns


def half(example: Example) -> str:
    return "qualitative" if column_of(example.task) in QUALITATIVE else "quantitative"


def errors(pairs: Iterable[tuple[Example, str]]) -> dict[str, float]:
    """Return column -> mean |said - true| / true of lengths, or degrees of directions.

    Only of answers and truths that are read.
    """
    found: dict[str, list[float]] = {}
    for example, response in pairs:
        reading = reading_of(example)
        said = reading.every(answer_text(response))
        true = reading.every(example.answer)
        if reading.error is None or not (said and true):
            continue
        # Of a length of 0 there is no relative error.
        if reading is DIRECTION or true[0] > 0:
            error = reading.error(said[0], true[0])
            found.setdefault(column_of(example.task), []).append(error)
    return {column: mean(values) for column, values in found.items()}


SPATIALRGPT_BENCH = Benchmark(
    hub="a8cheng/SpatialRGPT-Bench",
    rows=1406,
    files=("**/val*.parquet", "**/SpatialRGPT-Bench_v1.json"),
    read=read,
    official=official,
    robust=robust,
    aggregate=aggregate,
    others=(
        "Qwen2.5-VL-7B",
        "N3D-VLM, a judge",
        {"qualitative": 74.4, "quantitative_columns": 38.2},
    ),
    judged="official is a rule; the published one is GPT-4 as a judge",
    errors=errors,
)
