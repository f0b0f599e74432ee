"""MindCube-Tiny: a scene from two to four sides, and what stands where out of sight.

official  the authors' rule: the last A to E before a dot wins, wherever it stands ("TABLE." is E,
          and "B. is wrong, so <C>" is B). Without any: what stands behind <Answer> with a capital
          A; a letter at the start of a line; *X* or "X"; "Answer: X"; "my answer is X"; "answer is
          X"; the first stand-alone letter of the last line that has one.

`overall` leaves out questions of setting translation, as the authors' code does. Tiny has none.

Departure: on path direct the task is put in our words, unless the row brings its whole prompt.
"""

import re
from collections.abc import Iterator

from data.benchmarks.means import Mean, Scored, means
from data.benchmarks.schema import Benchmark, Item, Row, letter
from srreal import Example

# An id says which setting it is of; the first that occurs in it.
SETTINGS = ("around", "rotation", "translation", "among")


# ---- Rows

TASK = (
    "[Task]\n"
    "The images show one scene from different viewpoints. Work out how its objects are arranged.\n"
    "[Answer Instruction]\n"
    "Give the *ONE* correct option, its letter and its text, and nothing else. If it were A, and A "
    "were 'Above', your whole response would be '<answer>A. Above</answer>'.\n\n"
    "[Question]\n"
)


def read(row: Row) -> Iterator[Item]:
    if row.has("input_prompt"):
        direct = row.text("input_prompt")
        question = direct.rpartition("[Question]")[2].strip()
        # In the copy the images' places may stand before the question.
        if question.count("<image>") != direct.count("<image>"):
            question = question.replace("<image>", "").strip()
    else:
        question = row.text("question").strip()
        direct = TASK + question
    name = row.text("id" if row.has("id") else "index")
    answer = row.value("gt_answer" if row.has("gt_answer") else "answer")
    yield Item(
        name,
        row.images("images" if row.has("images") else "image"),
        letter(answer, 5),
        setting(name),
        question,
        direct=direct,
    )


def setting(name: str) -> str:
    for word in SETTINGS:
        if word in name.lower():
            return word
    return "other"


# ---- Scores

BEHIND_TAG = re.compile("<Answer>(.*?)(?:<|$)", re.DOTALL)
# In the order in which they are tried; of each the last that fits counts.
IN_TAG = (r"[Mm]y answer is ([A-E])", r"[Tt]he answer is ([A-E])", r"\b([A-E])\b")
ANYWHERE = (
    r"(?:^|\n)(?:Answer: )?([A-E])(?:$|\s)",
    r'[*"]([A-E])[*"]',
    r"\bAnswer:?\s*([A-E])\b",
    r"[Mm]y answer is ([A-E])",
    r"answer is ([A-E])",
)


def official(text: str, example: Example) -> float:
    return float(official_letter(text) == example.answer)


def official_letter(text: str) -> str | None:
    if dotted := last_of((r"([A-E])\.",), text):
        return dotted
    tag = BEHIND_TAG.search(text)
    if tag and (found := last_of(IN_TAG, tag[1])):
        return found
    if found := last_of(ANYWHERE, text):
        return found
    for line in reversed(text.split("\n")):
        if alone := re.search(r"\b([A-E])\b", line):
            return alone[1]
    return None


def last_of(patterns: tuple[str, ...], text: str) -> str | None:
    """Return the last letter that the first fitting pattern finds."""
    for pattern in patterns:
        if found := re.findall(pattern, text):
            return found[-1]
    return None


def aggregate(scored: Scored) -> dict[str, Mean]:
    settings = means(scored, lambda example: example.task)
    counted = scored.by(lambda example: None if example.task == "translation" else "overall")
    # Of translation alone there is no overall.
    overall = {"overall": counted["overall"].mean()} if counted else {}
    return overall | settings


MINDCUBE_TINY = Benchmark(
    hub="MLL-Lab/MindCube",
    rows=1050,
    files=(
        "**/MindCube_tinybench.jsonl",
        "**/*tiny*.parquet",
        "**/*tiny*.tsv",
        # A copy in splits: this one holds all the others.
        "**/combined*.parquet",
        "**/*.parquet",
    ),
    read=read,
    official=official,
    aggregate=aggregate,
    others=("Qwen2.5-VL-3B", "MindCube's paper", {"overall": 37.8}),
    more=(
        ("Qwen3-VL-8B", "EASI", {"overall": 29.4}),
        (
            "random",
            "MindCube's paper",
            {"overall": 32.4, "rotation": 36.4, "among": 32.3, "around": 30.7},
        ),
    ),
)
