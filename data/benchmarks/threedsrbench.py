"""3DSRBench: height, location, orientation and several objects, each question also mirrored, and in
every order of its options.

official  lmms-eval's rule: a letter that leads, is alone, or stands behind "answer"; else (X), X.,
          or any stand-alone one, the article "A" included. "Answer: Because" is B.

Four figures that must not be mixed, over rows whose qid is KEY, KEY-N (options rotated by N),
KEY-flip (the mirrored image, with the answer to that) or KEY-flip-N:
    overall        every row counts by itself, as in EASI's headline (published as vanilla)
    flip           right as it is and mirrored, in the same order of options
    circular       right in every order; the mirrored question is another one (CE, as in papers)
    flip_circular  right in all of them
Groups and types are of rows.

Departures: images are not downloaded: of the files with URLs they are looked for by name, and
mirrored for the rows that say -flip. Options are not rotated here: for `circular` the file has to
bring the orders.
"""

import re
from collections.abc import Iterator

from PIL import Image, ImageOps

from data.benchmarks.means import Mean, Scored, by_sample, means
from data.benchmarks.schema import TEST, Benchmark, Item, Row, letter, lettered
from data.marks import Marked
from data.rows import Bad
from srreal import Example

GROUPS = ("height", "location", "orientation", "multi_object")
WORDS = "Please select the correct answer from the options above. \n"


# ---- Rows


def read(row: Row) -> Iterator[Item]:
    # Unused options are null, NaN, or a text that says so.
    options = []
    for name in "ABCD":
        text = str(row.columns.get(name) if row.has(name) else "").strip()
        if text and text.lower() not in ("nan", "none"):
            options.append(text)
    asked = row.text("question")
    # Without a qid nothing tells which rows are one question: then there are no such figures.
    name = row.text("qid" if row.has("qid") else "index")
    yield Item(
        name,
        [image_of(row, name)],
        letter(row.value("answer"), len(options)),
        row.text("category"),
        asked + lettered(options, "{}. {}"),
        direct=f"Question: {asked}\nOptions:{lettered(options, '{}. {}')}\n{WORDS}",
    )


def image_of(row: Row, name: str) -> Marked:
    if row.has("image"):
        return row.image(row.value("image"))
    url = row.text("image_url")
    # COCO's name, as in val2017/000000000139.jpg.
    file = url.rpartition("/")[2]
    found = row.find(file) or row.find(f"coco_images/{file}")
    if found is None:
        raise Bad("image_url", f"missing file: {file} in {row.folder}; URLs are not downloaded")
    image = row.picture(found)
    # A URL is of the image as it was taken; a file with images inside has mirrored ones.
    return Marked(image.source, mirrored) if "-flip" in name else image


def mirrored(image: Image.Image) -> Image.Image:
    return ImageOps.mirror(image)


# ---- Scores

# Tried in this order; the first place of the first that fits counts.
FORMS = (
    r"^([A-D])[.\s)]",
    r"^([A-D])$",
    r"[Aa]nswer[:\s]+([A-D])",
    r"[Tt]he answer is[:\s]+([A-D])",
    r"[Mm]y answer is[:\s]+([A-D])",
    r"\(([A-D])\)",
    r"([A-D])\.",
    r"\b([A-D])\b",
)


def official(text: str, example: Example) -> float:
    text = text.strip()
    for form in FORMS:
        if found := re.search(form, text):
            return float(found[1] == example.answer)
    return 0.0


def unrotated(example: Example) -> str:
    """Return a qid without the number of its order."""
    return re.sub(r"-[0-9]+$", "", example.id)


# Only the same order of options makes a pair: AAAA1111-2 and AAAA1111-flip-2.
def unflipped(example: Example) -> str:
    return example.id.replace("-flip", "")


# Also the cluster: all forms of a question show one image.
def base(example: Example) -> str:
    """Return the key of a question, which all its forms begin with."""
    return unrotated(example).removesuffix("-flip")


def group(example: Example) -> str | None:
    for name in GROUPS:
        if example.task.startswith(name):
            return name
    return None


def aggregate(scored: Scored) -> dict[str, Mean]:
    rows = by_sample(scored)
    out = {"overall": rows.pop("overall")}
    # Without mirrored or rotated rows these would be the plain accuracy under another name.
    has_flips = any("-flip" in example.id for example in scored.examples)
    has_orders = any(unrotated(example) != example.id for example in scored.examples)
    if has_orders:
        out["circular"] = scored.all_right(unrotated)
    if has_flips:
        out["flip"] = scored.all_right(unflipped)
    if has_flips and has_orders:
        out["flip_circular"] = scored.all_right(base)
    return out | means(scored, group) | rows


THREEDSRBENCH = Benchmark(
    hub="ccvl/3DSRBench",
    rows=11686,
    files=(
        "**/3dsrbench_v1_vlmevalkit_circular.tsv",
        "**/3DSRBench*.tsv",
        "**/3dsrbench_v1*.tsv",
        "**/3dsrbench_v1*.parquet",
        TEST,
        "**/3dsrbench_v1.csv",
    ),
    read=read,
    official=official,
    aggregate=aggregate,
    others=("Qwen2.5-VL-7B", "SpatialThinker", {"circular": 48.4}),
    more=(
        ("Qwen2.5-VL-3B", "SpatialThinker", {"circular": 43.9}),
        ("SpatialReasoner-7B", "its paper", {"overall": 61.7, "circular": 60.3}),
    ),
    scene=base,
    key="qid",
)
