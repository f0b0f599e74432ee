"""BLINK's validation split: fourteen tasks of perception, each with one to four images.

official  BLINK's first step: equal but for case, ( ) . and blanks.
"""

from collections.abc import Iterator

from data.benchmarks.means import Mean, Scored, average, by_sample, means
from data.benchmarks.schema import Benchmark, Item, Row, equal, letter, only_letters

IMAGES = ("image_1", "image_2", "image_3", "image_4")


# ---- Rows


def read(row: Row) -> Iterator[Item]:
    count = len(row.items("choices"))
    prompt = row.text("prompt")
    yield Item(
        row.text("idx"),
        row.images(*filter(row.has, IMAGES)),
        letter(row.value("answer"), count),
        row.text("sub_task"),
        prompt,
        direct=only_letters(count) + prompt,
    )


# ---- Scores


def aggregate(scored: Scored) -> dict[str, Mean]:
    # The published mean is over tasks, whatever their number of rows.
    rows = by_sample(scored)
    tasks = means(scored, lambda example: example.task)
    return rows | {"overall": average(tasks.values()), "overall_samples": rows["overall"]}


BLINK = Benchmark(
    hub="BLINK-Benchmark/BLINK",
    rows=1901,
    files=("**/val*.parquet",),
    read=read,
    official=equal,
    aggregate=aggregate,
    others=("Qwen2.5-VL-7B", "Spatial-SSRL", {"overall": 55.87}),
    judged="official is its exact match; the published one asks GPT-3.5 to match what is left",
)
