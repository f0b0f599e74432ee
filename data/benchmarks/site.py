"""SITE-Bench: spatial questions of 31 other sets, over one image, several, or a video.

official  the authors' rule: "(A)", else " A ", else "A.", else "A:" or ":A", of the row's letters
          in upper case; of several letters the one whose last " A " stands last, else the first.
          Where there is none the authors draw one at random; here that is wrong.

`overall` is the chance-adjusted accuracy over images and videos together,
(hits - sum 1/n) / (rows - sum 1/n) with n options a row: 0 is chance, and less is possible. So are
the categories; `accuracy` is not adjusted.

It holds questions of VSI-Bench, 3DSRBench, MMIU and others: who trains on those trains on SITE.
"""

from collections.abc import Iterator

import numpy as np

from data.benchmarks.answers import LETTERS, count_options
from data.benchmarks.means import Mean, Scored
from data.benchmarks.schema import Benchmark, Item, Row, letter, lettered
from data.frames import is_video
from data.rows import Bad, matches
from srreal import Example

VIDEO_WORDS = (
    "Select the best answer to the following multiple-choice question based on the video. "
    "Respond with only the letter of the correct option."
)
WORDS = "Give me the answer letter directly. The best answer is:"


# ---- Rows


def read(row: Row) -> Iterator[Item]:
    shown = row.value("visual")
    if isinstance(shown, str):
        shown = [shown]
    if not (shown and matches(shown, list[str])):
        raise Bad("visual", f"wrong type or value: {shown!r:.50} is no list of paths")
    options = row.items("options", str)
    asked = row.text("question").strip()
    direct = f"Question: {asked}\nOptions:{lettered(options, '{}: {}')}\n{WORDS}"
    if is_video(shown[0]):
        kind = "video"
        images = row.video(shown[0])
        direct = f"{VIDEO_WORDS}\n{direct}"
    else:
        kind = "image"
        images = [row.image(name) for name in shown]
    question = f"{asked}\nOptions:{lettered(options, '{}. {}')}"
    # Some questions and options say where the images stand; else, or where a place is missing, all
    # come first.
    if question.count("<image>") != len(images):
        question = question.replace("<image>", "")
        direct = direct.replace("<image>", "")
    yield Item(
        f"{kind}_{row.number}",
        images,
        letter(row.value("answer"), len(options)),
        row.text("category"),
        question,
        direct=direct,
    )


# ---- Scores


def letters_of(example: Example) -> str:
    # Four where the question's text shows none, as in EASI.
    return LETTERS[: count_options(example.question) or 4]


def official(text: str, example: Example) -> float:
    text = f" {text.strip()} "
    for forms in (("({})",), (" {} ",), ("{}.",), ("{}:", ":{}", ": {}")):
        found = []
        for name in letters_of(example):
            if any(form.format(name) in text for form in forms):
                found.append(name)
        if found:
            # Of several that are nowhere between blanks all have place -1, and max takes the first.
            return float(max(found, key=lambda name: text.rfind(f" {name} ")) == example.answer)
    return 0.0


def aggregate(scored: Scored) -> dict[str, Mean]:
    out = {"overall": adjusted(scored)}
    for name, part in scored.by(lambda example: example.task).items():
        out[name] = adjusted(part)
    for name, part in scored.by(lambda example: example.id.partition("_")[0]).items():
        if name in ("image", "video"):
            out[name] = adjusted(part)
    return out | {"accuracy": scored.mean()}


def adjusted(scored: Scored) -> Mean:
    """Return the chance-adjusted accuracy in per cent."""
    chance = np.array([1 / len(letters_of(example)) for example in scored.examples])
    return scored.ratio(scored.values - 100 * chance, 1 - chance)


SITE = Benchmark(
    hub="franky-veteran/SITE-Bench",
    rows=8068,
    # What the files are called isn't known: they are found by their columns.
    files=("**/*.parquet", "**/*.jsonl", "**/*.json", "**/SiteBench*.tsv"),
    read=read,
    official=official,
    aggregate=aggregate,
    others=("Qwen2.5-VL-7B", "SITE's paper", {"overall": 31.4}),
    more=(
        ("Qwen2.5-VL-7B", "EASI, 32 frames", {"overall": 37.6}),
        ("Qwen2.5-VL-3B", "EASI, 32 frames", {"overall": 33.1}),
    ),
    judged="official counts an answer without a letter as wrong; the published code draws one",
    columns=("question", "options", "answer", "visual", "category"),
)
