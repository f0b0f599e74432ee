"""MMSI-Bench: questions over two to ten images that no single one answers.

official  the authors' rule: what stands in double back-ticks, within that in single ones, and there
          the first stand-alone upper-case A to D that no word follows, so "A chair" is no answer,
          nor is "B\\nBecause".
"""

import re
from collections.abc import Iterator

from data.benchmarks.means import by_sample
from data.benchmarks.schema import Benchmark, Item, Row, letter
from srreal import Example

WORDS = (
    "Answer with the option's letter from the given choices directly. "
    "Enclose the option's letter within ``."
)
# EASI's copy has names of its own for the published types.
PLACES = {"Cam": "Cam.", "Obj": "Obj.", "Reg": "Reg."}
RENAMED = {
    "Attr-Meas": "Attribute (Meas.)",
    "Attr-Appr": "Attribute (Appr.)",
    "Motion-Cam": "Motion (Cam.)",
    "Motion-Obj": "Motion (Obj.)",
}


# ---- Rows


def read(row: Row) -> Iterator[Item]:
    question = row.text("question").strip()
    letters = [name for name in "ABCD" if row.has(name)]
    if letters and "Options:" not in question:
        # The copies in columns: back to the form in which it was published.
        options = [f"{name}: {row.text(name)}" for name in letters]
        question += "\nOptions: " + ", ".join(options)
    name = "id" if row.has("id") else "index"
    kind = row.text("question_type" if row.has("question_type") else "category")
    yield Item(
        row.text(name),
        row.images("images" if row.has("images") else "image"),
        letter(row.value("answer"), 4),
        published_type(kind),
        question,
        direct=f"{question}\n{WORDS}",
    )


def published_type(name: str) -> str:
    """Return a type as published: with an en dash, where copies have a hyphen."""
    parts = name.split("-")
    if parts[0] in ("Pos", "Positional") and len(parts) == 3:
        first, second = [PLACES.get(part, part) for part in parts[1:]]
        return f"Positional Relationship ({first}–{second})"
    return RENAMED.get(name, name.replace(".-", ".–"))


# ---- Scores


def official(text: str, example: Example) -> float:
    for marks in ("``([^`]*)``", "`([^`]*)`"):
        if inside := re.search(marks, text):
            text = inside[1]
    found = re.search(r"\b[A-D]\b(?!\s[a-zA-Z])", text)
    return float(found is not None and found[0] == example.answer)


MMSI = Benchmark(
    hub="RunsenXu/MMSI-Bench",
    rows=1000,
    files=("**/MMSI_Bench*.parquet", "**/test*.parquet", "**/MMSI_bench.tsv", "**/MMSIBench*.tsv"),
    read=read,
    official=official,
    aggregate=by_sample,
    others=("Qwen2.5-VL-7B", "MMSI-Bench's paper", {"overall": 25.9}),
    more=(
        ("Qwen2.5-VL-3B", "MMSI-Bench's paper", {"overall": 26.5}),
        ("Qwen3-VL-8B", "EASI", {"overall": 31.1}),
        ("random", "MMSI-Bench's paper", {"overall": 25.0}),
    ),
)
