"""SAT's real images: what moved, and what happens if one moves.

official  SR-REAL's rule: equal but for case, ( ) . and blanks.

Departure: every question is asked in both orders of its options, drawn from the row's number, not
from a rank's generator.
"""

import random
import re
from collections.abc import Iterator

from data.benchmarks.answers import LETTERS
from data.benchmarks.means import Mean, Scored, by_sample
from data.benchmarks.schema import TEST, Benchmark, Item, Row, equal, lettered
from data.rows import Bad
from srreal import Example

# ---- Rows


def read(row: Row) -> Iterator[Item]:
    images = row.images("image_bytes" if row.has("image_bytes") else "images")
    options = [option.strip() for option in row.items("answers", str)]
    true = true_option(options, row.text("correct_answer").strip())
    # By the row's number, so that a row is asked alike on any number of ranks.
    random.Random(f"sat {row.number}").shuffle(options)
    for k, order in enumerate((options, options[::-1])):
        question = row.text("question") + "\nSelect the correct response from the given choices."
        question += lettered(order, "{}. {}")
        yield Item(
            f"sat_{row.number}-{k}",
            images,
            LETTERS[order.index(true)],
            row.text("question_type"),
            question,
            direct=f"{question}\nOnly output the letter.",
        )


def true_option(options: list[str], stated: str) -> str:
    if stated in options:
        return stated
    # On either side these words may have strayed into the text.
    stray = re.compile(r",?\s+in the first frame\.?$")
    for option in options:
        if stray.sub("", option) == stray.sub("", stated):
            return option
    raise Bad("correct_answer", f"{stated!r} is none of {options}")


# ---- Scores


def aggregate(scored: Scored) -> dict[str, Mean]:
    """Average over both orders; `circular`: right in both."""
    return by_sample(scored) | {"circular": scored.all_right(question)}


def question(example: Example) -> str:
    """Return what both orders of a question have in common."""
    return example.id.rpartition("-")[0]


SAT = Benchmark(
    hub="array/SAT",
    rows=150,
    files=("**/SAT_test*.parquet", TEST),
    read=read,
    official=equal,
    aggregate=aggregate,
    others=("Qwen2.5-VL-32B", "RoboBrain 2.0", {"overall": 80.00}),
)
