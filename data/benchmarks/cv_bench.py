"""CV-Bench: counting and relations in 2D, depth and distance in 3D.

official  lmms-eval's rule: the first letter of the text, so "The answer is B" is T.
"""

import re
from collections.abc import Iterator

from data.benchmarks.means import Mean, Scored, average, averages, by_sample, means, source
from data.benchmarks.schema import TEST, Benchmark, Item, Row, letter, only_letters
from srreal import Example

HALVES = {"2D": ("ADE20K", "COCO"), "3D": ("Omni3D",)}


# ---- Rows


def read(row: Row) -> Iterator[Item]:
    # `prompt` has the options, which `question` lacks.
    count = len(row.items("choices"))
    prompt = row.text("prompt")
    yield Item(
        f"{row.text('source')}_{row.text('idx')}",
        row.images("image"),
        letter(row.value("answer"), count),
        row.text("task"),
        prompt,
        direct=f"{only_letters(count)}\n{prompt}",
    )


# ---- Scores


def official(text: str, example: Example) -> float:
    found = re.match(r"[(\s]*([A-Z])", text.strip(), re.I)
    return float(found is not None and found[1].upper() == example.answer)


def aggregate(scored: Scored) -> dict[str, Mean]:
    """Average 2D, itself of ADE20K and COCO, and 3D, which is Omni3D; `_samples`: the rows."""
    # A task alone may have no source of one half, or of either.
    sources = means(scored, source)
    halves = averages(sources, HALVES)
    rows = by_sample(scored)
    overall = average(halves.values()) if halves else rows["overall"]
    return rows | sources | halves | {"overall": overall, "overall_samples": rows["overall"]}


CV_BENCH = Benchmark(
    hub="nyu-visionx/CV-Bench",
    rows=2638,
    files=("**/test_[23]d*.parquet", TEST),
    read=read,
    official=official,
    aggregate=aggregate,
    others=("Qwen2.5-VL-7B", "SpatialThinker", {"overall": 68.6, "2D": 69.1, "3D": 68.0}),
)
