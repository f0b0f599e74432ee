"""VSI-Bench: what a walk through rooms shows of counts, sizes, distances, directions and order; and
its debiased half, without the questions that text alone answers.

official  the authors' rule, on what stands before the first blank, without its last dots. Options:
          equal but for case, so "(A)" and "A. chair" are wrong. Numbers: MRA of what Python's
          float() takes, so "3," and "about 3" earn nothing.
robust    numbers by MRA with units, ties count as right; options as everywhere.

`overall` is the mean of eight types, of which object_rel_direction is itself the mean of its three
levels; `overall_samples` weighs by row.

Departure: where a part of the set lacks one of the levels, the authors' code fails, and the mean
here is over those there are.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from data.benchmarks.answers import SLACK, THRESHOLDS, mra, read_number, robust
from data.benchmarks.means import Mean, Scored, average, by_sample
from data.benchmarks.schema import Benchmark, Item, Row
from data.rows import Bad
from srreal import Example

NUMBERS = (
    "object_counting",
    "object_abs_distance",
    "object_size_estimation",
    "room_size_estimation",
)
DIRECTION = "object_rel_direction"
LEVELS = tuple(f"{DIRECTION}_{level}" for level in ("easy", "medium", "hard"))
CHOICES = ("object_rel_distance", *LEVELS, "route_planning", "obj_appearance_order")


# ---- Rows

FRAMES = "These are frames of a video."
NUMBER_WORDS = "Please answer the question using a single word or phrase."
OPTION_WORDS = "Answer with the option's letter from the given choices directly."


def read(row: Row) -> Iterator[Item]:
    task = row.text("question_type")
    if task not in NUMBERS + CHOICES:
        raise Bad("question_type", f"unknown: {task!r}")
    lines = [FRAMES, row.text("question")]
    words = NUMBER_WORDS
    if task in CHOICES:
        # Each begins with its letter.
        lines += ["Options:", *row.items("options", str)]
        words = OPTION_WORDS
    question = "\n".join(lines)
    yield Item(
        row.text("id"),
        row.video(f"{row.text('dataset')}/{row.text('scene_name')}.mp4"),
        row.text("ground_truth"),
        task,
        question,
        direct=f"{question}\n{words}",
    )


def read_debiased(row: Row) -> Iterator[Item]:
    """Yield a row's question unless it was pruned, as the row, its file or a list says."""
    if row.has("pruned"):
        pruned = str(row.raw("pruned")).lower() in ("true", "1")
    elif row.file.name.startswith("test_debiased"):
        pruned = False
    elif row.beside:
        pruned = row.text("id") in row.beside
    else:
        raise Bad("pruned", "missing, nor is there a pruned_ids.txt: is it kept or not?")
    if not pruned:
        yield from read(row)


def pruned_ids(folder: Path) -> dict[str, bool]:
    """Return what pruned_ids.txt lists, an id a line; {} without it."""
    file = folder / "pruned_ids.txt"
    if not file.is_file():
        return {}
    return dict.fromkeys(file.read_text().split(), True)


# ---- Scores


def official(text: str, example: Example) -> float:
    # A newline does not end the first word, and dots go before white space: "B.\n" stays "B.".
    said = text.split(" ")[0].rstrip(".").strip()
    if example.task not in NUMBERS:
        return float(said.lower() == example.answer.lower())
    try:
        value = float(said)
        true = float(example.answer)
    except ValueError:
        return 0.0
    if true == 0:
        return 0.0
    # To the bit as published: ties of relative errors fall as these floats do.
    return float(np.mean(abs(value - true) / true <= 1 - THRESHOLDS))


def robust_mra(response: str, example: Example) -> float | None:
    if example.task not in NUMBERS:
        return robust(response, example)
    value = read_number(response, example.question)
    true = read_number(example.answer, example.question)
    return None if value is None or true is None else mra(value, true, SLACK)


def aggregate(scored: Scored) -> dict[str, Mean]:
    rows = by_sample(scored)
    samples = rows.pop("overall")
    types = dict(rows)
    # As the authors' code has it, the levels count as types of their own where there is no easy.
    if LEVELS[0] in types:
        levels = [types.pop(level) for level in LEVELS if level in types]
        types[DIRECTION] = average(levels)
    overall = {"overall": average(types.values()), "overall_samples": samples}
    return overall | types | rows


VSI_BENCH = Benchmark(
    hub="nyu-visionx/VSI-Bench",
    rows=5130,
    # Today's two halves; else the one file that there was before, which has every row again.
    files=("**/test_[dp]*.parquet", "**/test-0*.parquet", "**/test.jsonl"),
    read=read,
    official=official,
    robust=robust_mra,
    aggregate=aggregate,
    others=("Qwen2.5-VL-7B", "EASI, 128 frames", {"overall": 33.7}),
    more=(
        ("Qwen2.5-VL-3B", "EASI, 128 frames", {"overall": 26.6}),
        ("Qwen3-VL-8B", "EASI", {"overall": 57.9}),
    ),
    key="id",
    slack=1,
)
VSI_BENCH_DEBIASED = replace(
    VSI_BENCH,
    rows=2362,
    files=("**/test_debiased*.parquet", "**/test.jsonl", "**/test-0*.parquet"),
    read=read_debiased,
    beside=pruned_ids,
    others=("Qwen2.5-VL-7B", "EASI, 128 frames", {"overall": 29.1}),
    more=(("Qwen2.5-VL-3B", "EASI, 128 frames", {"overall": 22.8}),),
)
