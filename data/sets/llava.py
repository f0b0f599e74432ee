"""LLaVA's JSON (kind `llava`): general questions and captions, on path direct.

.json (one array, of any size) or .jsonl: {"id", "image": "a.jpg" or ["a.jpg", ...],
"conversations": [{"from": "human", "value"}, {"from": "gpt", "value"}, ...], ...}, images relative
to the file's folder or to @root, or in the row itself as data URIs. Without `image` a row is of
text alone, which keeps a model from forgetting how to talk.

Every turn is an Example, without the turns before it. The k-th <mask> of the whole conversation is
region k of `bbox` (pixels x0 y0 x1 y1), else of `rle` or `segmentation` (polygons); of several
images, as in the `bbox` and `mask_idx` of SR-REAL's rows (srreal.py)."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from data.rows import Bad, Headers, Row, each, set_name, turns, typed
from data.sets.files import Files, depths_of, files_of_row, sizes_of
from data.sets.regions import FIELDS, REGIONS, kind_of, placed
from srreal import Example

REQUIRED = {"conversations": list[dict[str, str]]}
IMAGE = {"image": str | list[str]}
# Of image_hw, which SR-REAL's rows are checked by, only the type is looked at here.
OPTIONAL = FIELDS | {"id": str | int, "image_hw": tuple[int, int], "depth": str | list[str]}


# ---- Turns


@dataclass
class Turn:
    """A question of a conversation, with its share of the row's regions."""

    key: str
    files: Files
    question: str
    answer: str
    kind: str  # of the regions: a key of REGIONS
    regions: list[tuple]  # by <mask>: (image index, region as the row has it)

    def direct(self, headers: Headers) -> list[Example]:
        """Return its Example on path direct."""
        images = self.files.images
        shapes = sizes_of(images, headers)
        read = REGIONS[self.kind]
        regions = [(view, read(region, shapes[view])) for view, region in self.regions]
        depths = depths_of(self.files.depths, shapes, headers)
        return [
            Example(
                self.key,
                "direct",
                images,
                self.question,
                self.answer,
                depths=depths,
                regions=regions,
            )
        ]


def turns_of(file: Path, number: int, row: dict, views: int, files: Files) -> Iterator[Turn]:
    """Yield every turn of a row, whose key ends in /k where there are several."""
    said = turns(row)
    kind = kind_of(row)
    given = placed(row, kind, views)
    # Answers may not have masks: only a question's are filled in.
    count = sum(question.count("<mask>") for question, _ in said)
    if count != len(given):
        raise Bad(kind, f"<mask> count: {count} for {len(given)} regions")
    key = f"{set_name(file)}/{row.get('id', '')}#{number}"
    # The regions are numbered through the conversation, so each turn takes the next ones.
    start = 0
    for k, (question, answer) in enumerate(said):
        end = start + question.count("<mask>")
        name = f"{key}/{k}" if len(said) > 1 else key
        yield Turn(name, files, question, answer, kind, given[start:end])
        start = end


# ---- Rows


def llava_rows(path: Path, root: str | None) -> Iterator[Row]:
    """Yield a Row for each turn of the files that a path stands for. root: of the images."""
    yield from each(path, (".json", ".jsonl"), partial(build, root))


def build(root: str | None, file: Path, number: int, row: dict) -> Iterator[Row]:
    # Rows of text alone have no image; in some copies theirs is "" or [].
    if not row.get("image"):
        row.pop("image", None)
    row = typed(row, REQUIRED, OPTIONAL | IMAGE)
    files = files_of_row(row, root or str(file.parent))
    said = [part.get("value", "") for part in row["conversations"]]
    if not files.images and any("<image>" in text for text in said):
        raise Bad("image", "missing, but the text has its place: <image>")
    # Captions and chats have no truth by which a path's reasoning could be taught.
    for turn in turns_of(file, number, row, len(files.images), files):
        yield Row(str(file), number, turn.key, turn.direct, files.all)
