"""EmbSpatial-Bench: which object is near, far, above, under, left or right, for robots.

official  SR-REAL's rule: the first standalone A to D of the upper-cased text, so the article "a" is
          option A.

Path dtr asks with the objects' regions, unless a box leaves its image (the official code looks at x
alone).
"""

import re
from collections.abc import Iterator

from data.benchmarks.means import Mean, Scored, by_sample, means, source
from data.benchmarks.schema import (
    TEST,
    Benchmark,
    Item,
    Row,
    inside,
    letter,
    lettered,
    only_letters,
)
from data.rows import typed
from data.sets.regions import FOUR
from srreal import Example

OBJECT = {"name": str, "bbox": FOUR}


# ---- Rows


def read(row: Row) -> Iterator[Item]:
    images = row.images("image")
    options = row.items("answer_options", str)
    asked = row.text("question")
    question = f"{asked} Select from the following choices.{lettered(options, '({}) {}')}"
    objects = [typed(entry, OBJECT, {}) for entry in row.items("objects")]
    regions = []
    for entry in objects:
        x, y, width, height = entry["bbox"]
        regions.append((0, (x, y, x + width, y + height)))
    # Cut off at its edge, a box would be another object's: such a row is asked without regions.
    dtr = ""
    if regions and all(inside(box, images[0].size) for _, box in regions):
        relevant = ", ".join(f"{entry['name']} <mask>" for entry in objects)
        dtr = f"{question}\nRelevant objects: {relevant}."
    # The JSON's ids begin with their source, those of the copies don't.
    prefix = f"{row.text('data_source')}_"
    yield Item(
        prefix + row.text("question_id").removeprefix(prefix),
        images,
        letter(row.value("answer"), len(options)),
        row.text("relation"),
        question,
        direct=only_letters(len(options)) + asked + lettered(options, "{}) {}"),
        dtr=dtr,
        regions=regions,
    )


# ---- Scores


def official(text: str, example: Example) -> float:
    # Upper-cased, the article in "It is a table, so C" reads as option A.
    found = re.search(r"\b([A-D])\b", text.upper())
    return float(found is not None and found[1] == example.answer)


def aggregate(scored: Scored) -> dict[str, Mean]:
    return by_sample(scored) | means(scored, source)


EMBSPATIAL = Benchmark(
    hub="Phineas476/EmbSpatial-Bench",
    rows=3640,
    files=("**/embspatial_bench.json", TEST),
    read=read,
    official=official,
    aggregate=aggregate,
    others=("Qwen3-VL-8B", "Qwen3-VL's report", {"overall": 78.5}),
)
