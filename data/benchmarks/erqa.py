"""ERQA: embodied reasoning, from tasks and trajectories to states.

official  lmms-eval's rule, as realworldqa's.

Departure: images stand where visual_indices puts them. lmms-eval shows all of them first.
"""

from collections.abc import Iterator

from data.benchmarks.answers import LETTERS
from data.benchmarks.means import by_sample
from data.benchmarks.schema import TEST, Benchmark, Item, Row, letter, letter_or_text
from data.marks import Marked
from data.rows import Bad, matches

# ---- Rows


def read(row: Row) -> Iterator[Item]:
    images = row.images("images" if row.has("images") else "image")
    question, images = interleave(row.text("question"), images, places_of(row))
    name = f"erqa_{row.number}"
    # The tsv copy has an index; SR-REAL's json has neither.
    for column in ("index", "question_id"):
        if row.has(column):
            name = row.text(column)
    # Options are part of the question's text: how many there are isn't stated.
    answer = letter(row.value("answer"), len(LETTERS))
    yield Item(name, images, answer, row.text("question_type"), question)


def places_of(row: Row) -> list[int]:
    """Return the character before which each image stands; [] where the row doesn't say it."""
    if not row.has("visual_indices"):
        return []
    places = row.value("visual_indices")
    if isinstance(places, int):
        places = [places]
    if not matches(places, list[int]):
        raise Bad("visual_indices", f"wrong type or value: {places!r:.50} not list[int]")
    return places


def interleave(text: str, images: list[Marked], places: list[int]) -> tuple[str, list[Marked]]:
    """Put <image> into a text; all at 0, or not one an image: all come first."""
    if len(places) != len(images) or not any(places):
        return text, images
    order = sorted(range(len(images)), key=places.__getitem__)
    # From the last on, so that the places before it stay where they are.
    for k in reversed(order):
        text = f"{text[: places[k]]}<image>{text[places[k] :]}"
    return text, [images[k] for k in order]


ERQA = Benchmark(
    hub="FlagEval/ERQA",
    rows=400,
    files=(TEST, "**/ERQA.tsv", "**/erqa.json"),
    read=read,
    official=letter_or_text,
    aggregate=by_sample,
    others=("Qwen3-VL-8B", "Qwen3-VL's report", {"overall": 45.8}),
)
