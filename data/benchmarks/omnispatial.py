"""OmniSpatial: dynamics, logic, traffic and maps, and other people's perspectives.

official  the authors' rule `re`: the last "Answer: X", and option A where there is none, so an
          empty response earns what A does. The letter is compared as it is typed: "Answer: b" is
          wrong. On LOR and DTR, whose <answer> holds no such words, it reads A everywhere: look at
          robust there.

Departures: on path direct the instruction to reason in steps (their manual_cot) is in our words;
what the parser looks for is as published. Asked once, greedily; the authors pool five samples.
"""

import re
from collections.abc import Iterator

from data.benchmarks.answers import LETTERS
from data.benchmarks.means import Mean, Scored, by_sample, means
from data.benchmarks.schema import TEST, Benchmark, Item, Row, letter, lettered
from data.marks import Marked
from data.rows import Bad
from srreal import Example

STEPS = (
    "You answer questions about where things are in an image.\n\n"
    "You are given an image, a question about it, and options, each with its letter.\n"
    "1. Look at the image, and find the objects that matter and how they lie to each other.\n"
    "2. Break the question into its parts.\n"
    "3. Reason about space step by step; take another's perspective where that helps.\n"
    "4. Choose the option that fits best.\n\n"
    "Rely on what can be seen. If you are not sure, choose the likeliest option; never refuse.\n"
)
FORMAT = (
    "\nEnd your answer with a separate line formatted exactly as:\n\n"
    "Answer: X\nwhere X ∈ {A, B, C, D}.\n"
)


# ---- Rows


def read(row: Row) -> Iterator[Item]:
    kind = row.text("task_type")
    # An id is one only together with its task's type.
    number = row.text("id")
    options = row.items("options", str)
    answer = row.value("answer" if row.has("answer") else "gt")
    if isinstance(answer, str) and answer.isdigit():
        answer = int(answer)
    question = row.text("question") + lettered(options, "{}. {}")
    yield Item(
        f"{kind}/{number}",
        [image_of(row, kind, number)],
        letter(answer, max(len(options), 4)),
        row.text("sub_task_type"),
        question,
        direct=f"{STEPS}{FORMAT}\n{question}",
    )


def image_of(row: Row, kind: str, number: str) -> Marked:
    for name in ("image", "image_path"):
        if row.has(name):
            return row.image(row.value(name))
    # Several questions share an image: what stands before the _ is its name.
    name = f"{kind}/{number.partition('_')[0]}.png"
    file = row.find(name)
    if file is None:
        raise Bad("id", f"missing file: {name} in {row.folder}")
    return row.picture(file)


# ---- Scores


def official(text: str, example: Example) -> float:
    found = re.findall(r"Answer\s*:\s*([A-D])\b", text, re.IGNORECASE)
    said = found[-1] if found else LETTERS[0]
    return float(said == example.answer)


def aggregate(scored: Scored) -> dict[str, Mean]:
    return by_sample(scored) | means(scored, lambda example: example.id.rpartition("/")[0] or None)


OMNISPATIAL = Benchmark(
    hub="qizekun/OmniSpatial",
    rows=1533,
    files=("**/data.json", TEST, "**/*.parquet"),
    read=read,
    official=official,
    aggregate=aggregate,
    others=("Qwen2.5-VL-7B", "EASI", {"overall": 39.2}),
    more=(
        ("Qwen2.5-VL-3B", "OmniSpatial's paper", {"overall": 40.3}),
        ("InternVL3-8B", "OmniSpatial's paper", {"overall": 41.6}),
    ),
    columns=("id", "task_type", "question", "options"),
)
