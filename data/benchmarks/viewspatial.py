"""ViewSpatial-Bench: directions as the camera sees them, and as a person in the picture does.

official  the authors' rule: the first stand-alone A to D of the last line, in either case, so an
          article is option A, and behind a final newline there is no answer.

Trap: a scene simulation has up to 32 images, which at their own size are far more than 32k tokens:
see --max-pixels. The authors ask Qwen2.5-VL with every image at 420 x 280.
"""

import re
from collections.abc import Iterator

from data.benchmarks.means import by_sample
from data.benchmarks.schema import TEST, Benchmark, Item, Row, letter
from data.marks import Marked
from data.rows import Bad
from srreal import Example

FOLDER = "ViewSpatial-Bench/"  # the set's own name, with which its paths begin
SCAN = re.compile(r"scene[0-9]{4}(?=_[0-9]{2})")


# ---- Rows


def read(row: Row) -> Iterator[Item]:
    asked = row.text("question")
    # One text, an option a line.
    choices = row.text("choices")
    yield Item(
        f"viewspatial_{row.number}",
        images_of(row),
        letter(row.text("answer").partition(".")[0], choices.count("\n") + 1),
        row.text("question_type"),
        f"{asked}\n{choices}",
        direct=f"Question: {asked}\nChoices: {choices}\nReply only to the corresponding option."
        "\nAnswer:",
    )


def images_of(row: Row) -> list[Marked]:
    if not row.has("image_path"):
        return row.images("images" if row.has("images") else "image")
    images = []
    for name in row.items("image_path", str):
        file = row.find(name.removeprefix(FOLDER)) or row.find(name)
        if file is None:
            raise Bad("image_path", f"missing file: {name} in {row.folder}")
        images.append(row.picture(file))
    return images


def scene(example: Example) -> str | None:
    """Return the ScanNet room, whose scans and views are one cluster; None of COCO's images."""
    for image in example.images:
        # The copy in parquet holds bytes, which name no scan.
        named = isinstance(image, Marked) and isinstance(image.source, str)
        if named and (found := SCAN.search(image.source)):
            return found[0]
    return None


# ---- Scores


def official(text: str, example: Example) -> float:
    found = re.search(r"\b([A-D])\b", text.split("\n")[-1], re.IGNORECASE)
    return float(found is not None and found[1].upper() == example.answer)


VIEWSPATIAL = Benchmark(
    hub="lidingm/ViewSpatial-Bench",
    rows=5712,
    files=("**/ViewSpatial-Bench.json", TEST),
    read=read,
    official=official,
    aggregate=by_sample,
    others=("Qwen2.5-VL-7B", "ViewSpatial's paper", {"overall": 36.9}),
    more=(
        ("Qwen2.5-VL-3B", "ViewSpatial's paper", {"overall": 35.9}),
        ("Qwen3-VL-8B", "EASI", {"overall": 42.2}),
        ("random", "ViewSpatial's paper", {"overall": 26.3}),
    ),
    scene=scene,
)
