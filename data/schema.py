"""Our own row format, which data.scenes and data.coldstart write.

A set is a folder with rows.jsonl, or a .jsonl file; an object a line, files named relative to it.
OwnRow has the fields. Null is as good as absent. SFT needs a rationale in each lor and dtr row; RL
and eval need none, so here a row without is a good one.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel, ValidationError

from data.embedded import image_of
from data.rows import Bad, MissingFile, Number, Row, Text, Whole, broken, estimated, records
from srreal import Example

Point = tuple[Number, Number, Number]
Four = tuple[Number, Number, Number, Number]


class OwnRow(BaseModel):
    """A question about one or more images, on one path."""

    id: Text  # no two rows of all sources have both id and path in common
    path: Text  # lor | dtr | direct
    # Files, e.g. images/a.png, or data URIs; on path direct there may be none. A mark that the
    # question speaks of ("red bbox") has to be drawn in them: nobody else does (docs/data.md).
    images: list[Text] = []
    question: Text  # with a <mask> behind each region's mention; <image> once an image, or nowhere
    answer: Text  # an option's letter, a number, a camera motion, or other text

    # One an image: a 16-bit PNG of the image's size, millimetres, 0 is unknown.
    depths: list[Text | None] = []
    # One an image: (fx, fy, cx, cy) in pixels.
    intrinsics: list[Four | None] = []
    # One a <mask>: the image's index, and x0, y0, x1, y1 in pixels inside it.
    regions: list[tuple[Whole, Four]] = []
    # Mention -> centre in metres, camera frame; of several views {mention: {"0": centre, ...}}.
    objects: dict[Text, Point] | dict[Text, dict[Text, Point]] = {}
    frame: Whole | None = None  # index of the view that the question asks for
    task: Text = ""
    rationale: Text | None = None  # what stands in <think>
    names: dict[Text, Text] = {}  # mention -> the object's name
    sizes: dict[Text, Point] = {}  # mention -> (w, h, l) in metres


def own_rows(path: Path, root: str | None) -> Iterator[Row]:
    file = path / "rows.jsonl" if path.is_dir() else path
    if file.suffix.lower() != ".jsonl" or not file.is_file():
        raise MissingFile(
            f"{path}: neither a folder with rows.jsonl (a whole set) nor a .jsonl file"
        )
    base = os.path.abspath(root or file.parent)
    for number, row in records(file):
        try:
            if isinstance(row, Bad):
                raise row
            example = to_example(parse_row(row), base)
        except Bad as error:
            yield broken(file, number, error)
            continue
        files = [*example.images, *(example.depths or ())]
        yield Row(
            str(file),
            number,
            example.id,
            make=lambda headers, example=example: [example],
            files=tuple(file for file in files if isinstance(file, str)),
            record=row,
        )


def parse_row(row: dict) -> OwnRow:
    """Check a row's fields; Bad names every one that is missing, unknown or of another type."""
    row = {name: value for name, value in row.items() if value is not None}
    unknown = [name for name in row if name not in OwnRow.model_fields]
    # Not left to pydantic, which stops at a name with half a surrogate pair; ascii prints it, too.
    problems = [(ascii(name)[1:-1], "unknown field") for name in unknown]
    # Only a question without reasoning can be about no image.
    if "images" not in row and row.get("path") != "direct":
        problems.append(("images", "missing"))
    known = {name: value for name, value in row.items() if name not in unknown}
    try:
        parsed = OwnRow.model_validate(known)
    except ValidationError as error:
        reasons = {}
        for detail in error.errors(include_url=False):
            name = detail["loc"][0]
            # The first of a field's details: the others are of the same value.
            reasons.setdefault(name, describe(name, row, detail))
        problems += reasons.items()
    if problems:
        raise Bad(problems)
    return parsed


def describe(name: str, row: dict, detail: dict) -> str:
    if name not in row:
        return "missing"
    kind = "unknown answer kind" if name == "answer" else "wrong type or value"
    return f"{kind}: {row[name]!r:.50}: {detail['msg']}"


def to_example(row: OwnRow, base: str) -> Example:
    """Return the Example of a row whose files lie in `base`."""
    images = [image_of(name, base, "images") for name in row.images]
    depths = [file and os.path.join(base, file) for file in row.depths or [None] * len(images)]
    # Depth maps of another number than images stay as they are, for the checks to name them.
    for index, image in enumerate(images[: len(depths)]):
        depths[index] = depths[index] or estimated(image)
    return Example(
        row.id,
        row.path,
        images,
        row.question,
        row.answer,
        depths=depths if any(depths) else None,
        intrinsics=row.intrinsics or None,
        regions=row.regions,
        objects={mention: by_view(truth, len(images)) for mention, truth in row.objects.items()},
        frame=row.frame,
        task=row.task,
        rationale=row.rationale,
        names=row.names,
        sizes=row.sizes or None,
    )


def by_view(truth: tuple | dict, views: int) -> tuple | dict:
    """Turn the keys "0", "1" ... of a truth by view into numbers.

    Any other key stays a text, for the checks to name it.
    """
    if isinstance(truth, tuple):
        return truth
    numbers = {str(view): view for view in range(views)}
    return {numbers.get(key, key): centre for key, centre in truth.items()}
