"""Any set of questions about images (kind `vqa`): Geometry3K and its siblings, or your own.

    vqa:DIR,image=COLUMN,question=COLUMN,answer=COLUMN,split=train,path=lor

.parquet, .arrow (the library datasets' `save_to_disk`), .json or .jsonl; a file, or a folder, of
which its train split is read: train-*, else all that isn't test-* or validation-*. A row:
    images    one or a list, each {"bytes", "path"}, the bytes of a file, a path or a data URI;
              or image_1, image_2 ...; null or missing in rows of text alone, asked on direct only
    problem   with <image> where the k-th image stands, or without
    answer    the truth: a letter, a number or a text (LaTeX: latex.py); <answer> around it goes
Names that other sets have for these are guessed (GUESSES), and options name any other. Where the
truth is a letter, or the index, of an option in `choices` or `options` that the question doesn't
list, they are listed behind it.

A row is an example on path lor, without a rationale, and one on path direct. Paths are relative to
the file's folder, to DIR, or to @root; what a parquet file holds stays in memory."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from string import ascii_uppercase

from data.embedded import decode, image_of, what_is_wrong
from data.marks import Marked
from data.parquet import arrow_rows, parquet_rows
from data.rows import (
    Bad,
    BadSource,
    Headers,
    MissingFile,
    Notes,
    Row,
    broken,
    look_below,
    matches,
    records,
    set_name,
    without_first_marks,
)
from data.sets.files import Files, depths_of, sizes_of
from srreal import Example, true_letter

# The first of these that a folder has is read: some have a set in two formats.
FORMATS = {".parquet": parquet_rows, ".arrow": arrow_rows, ".jsonl": records, ".json": records}
# What the library datasets writes beside the rows.
NO_ROWS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
# The first that a row has, in upper or lower case.
GUESSES = {
    "image": ("images", "image", "img", "picture", "image_path", "image_paths", "file_name"),
    "question": ("problem", "question", "prompt", "query"),
    "answer": ("answer", "solution", "ground_truth", "label"),
}
OPTIONS = ("choices", "options")
TASKS = ("task", "question_type", "category", "type")
IDS = ("id", "question_id")
NUMBERED = re.compile(r"image_?([0-9]+)", re.IGNORECASE)
ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
LETTERS = tuple(ascii_uppercase)
# A list of options in a question begins so.
LISTED = re.compile(r"(?:^|\s)\(?A[.):]\s")
# Split -> the words that name it in a path.
SPLITS = {
    "train": "train|training",
    "validation": "val|valid|validation|dev",
    "test": "test|testing|testmini|testdev|test[AB]",
}


def is_vqa(row: dict) -> bool:
    """Tell a row of such a set from all others', where no kind is said."""
    has_question = "problem" in row or {"image", "question"} <= row.keys()
    return has_question and not row.keys() & {"path", "conversations"}


# ---- Files


def vqa_rows(path: Path, root: str | None, split: str | None = None, **columns) -> Iterator[Row]:
    """Yield a Row for each row of the files that a path stands for.

    root: of the images. columns: role -> name of its column; others are guessed.
    """
    notes = Notes()
    folder = path.parent if path.is_file() else path
    for file in files_of_split(path, split, notes):
        bases = [root] if root else [str(file.absolute().parent), str(folder.absolute())]
        is_first = True
        for number, record in FORMATS[file.suffix.lower()](file):
            try:
                if isinstance(record, Bad):
                    raise record
                # Once a file: a column named wrongly is missing from its first row already.
                if is_first:
                    check_columns(file, record, columns)
                is_first = False
                question = read(file, number, record, bases, columns, notes)
            except Bad as error:
                yield broken(file, number, error)
                continue
            yield Row(
                str(file),
                number,
                question.key,
                question.examples,
                question.pictures.all,
                notes=notes,
                record=record,
                untaught=("lor",),
            )


def files_of_split(path: Path, split: str | None, notes: Notes) -> list[Path]:
    """Return the files of a split, None: of train; those that are left out are counted."""
    if path.is_file():
        if split is not None:
            raise BadSource(
                f"{path}: split={split}: of a folder's files one is chosen, this is one"
            )
        if path.suffix.lower() not in FORMATS:
            raise MissingFile(f"{path}: none of {', '.join(FORMATS)}")
        return [path]
    every = files_of_rows(path)
    if split is not None:
        kept = of_split(every, path, split)
    else:
        # data.parquet beside test.parquet: what no word names is taken for the train split.
        held_out = of_split(every, path, "test") + of_split(every, path, "validation")
        kept = of_split(every, path, "train") or [file for file in every if file not in held_out]
    if not kept:
        names = ", ".join(str(file.relative_to(path)) for file in every[:5])
        raise MissingFile(f"{path}: no file of split {split or 'train'}: there are {names}")
    if len(kept) < len(every):
        notes.add("files left out: of other splits", len(every) - len(kept))
    return kept


def files_of_rows(folder: Path) -> list[Path]:
    # A look at a folder of many images takes long.
    below = look_below(folder, without=("images",))
    for suffix in FORMATS:
        found = [file for file in below.files_like(f"*{suffix}") if file.name not in NO_ROWS]
        if found:
            return found
    raise MissingFile(f"{folder}: no {', '.join(FORMATS)} in this folder")


def of_split(files: list[Path], folder: Path, split: str) -> list[Path]:
    """Return the files that name a split below the folder: data/test-00000-of-00001.parquet."""
    words = SPLITS.get(split, re.escape(split))
    # A word of its own: "latest" and "contest-1" name no test.
    named = re.compile(rf"(?:^|[/._-])(?:{words})(?=$|[/._-])")
    return [file for file in files if named.search(file.relative_to(folder).as_posix())]


def check_columns(file: Path, record: dict, columns: dict[str, str]) -> None:
    """Raise BadSource where a column that an option names is not there."""
    for role, name in columns.items():
        if name not in record:
            there = ", ".join(record)
            raise BadSource(f"{file}: {role}={name}: there is no such column, but {there}")


# ---- Rows


class Pictures(Files):
    """The images of a row; where a path leads is looked for once the row is taken."""

    def __init__(self, named: list, bases: list[str]):
        self.named = named  # paths as the row has them; Marked, where it holds the image itself
        self.bases = bases
        self.named_depths = [None] * len(named)

    @cached_property
    def images(self) -> list:
        return [image if isinstance(image, Marked) else self.find(image) for image in self.named]

    def find(self, name: str) -> str:
        places = [os.path.join(base, name) for base in self.bases]
        # Where none is there, the first place stands in the message on the missing file.
        return next(filter(os.path.isfile, places), places[0])


@dataclass
class Question:
    """A row that may be taken."""

    key: str
    pictures: Pictures
    question: str
    answer: str
    task: str
    notes: Notes

    def examples(self, headers: Headers) -> list[Example]:
        images = self.pictures.images
        # Files were looked at in the pool, before; what the row holds is looked at here.
        for image in images:
            reason = what_is_wrong(image.source) if isinstance(image, Marked) else None
            if reason:
                raise Bad("image", f"corrupt: {reason}")
        shapes = sizes_of(images, headers)
        direct = Example(
            self.key,
            "direct",
            images,
            self.question,
            self.answer,
            depths=depths_of(self.pictures.depths, shapes, headers),
            task=self.task,
        )
        if not images:
            self.notes.add("rows without an image: on path direct only")
            return [direct]
        # The same objects on both paths, so that an image is decoded once.
        return [replace(direct, path="lor"), direct]


def read(
    file: Path, number: int, record: dict, bases: list[str], columns: dict[str, str], notes: Notes
) -> Question:
    """Return what a row says; Bad names the column that is wrong."""
    # A parquet's null and a column that isn't there are one; so are JSON's.
    row = {name: value for name, value in record.items() if value is not None}
    named = [picture(value) for value in images_of(row, columns)]
    name, question = chosen(row, "question", columns)
    if not (isinstance(question, str) and question.strip()):
        raise Bad(name, f"wrong type or value: {question!r:.60} is no text")
    places = question.count("<image>")
    if places not in (0, len(named)):
        raise Bad(name, f"<image> count: {places} for {len(named)} images")
    options = first(row, OPTIONS, list[str]) or []
    answer = truth_of(*chosen(row, "answer", columns), options)
    # A question that lists its options already must not list them twice.
    if letter_of(answer) in LETTERS[: len(options)] and not LISTED.search(question):
        lines = [f"{mark}. {option}" for mark, option in zip(LETTERS, options, strict=False)]
        question = "\n".join([question.rstrip(), *lines])
    return Question(
        key=f"{set_name(file)}/{first(row, IDS, str | int) or ''}#{number}",
        pictures=Pictures(named, bases),
        question=without_first_marks(question.strip()),
        answer=answer,
        task=first(row, TASKS, str) or "",
        notes=notes,
    )


def chosen(row: dict, role: str, columns: dict[str, str]) -> tuple[str, object]:
    """Return (name, value) of the column that has a role; Bad where there is none."""
    name = column_of(row, role, columns)
    if name is None:
        wanted = columns.get(role) or " or ".join(GUESSES[role])
        reason = f"no {wanted} ({role}=COLUMN names it); there are {', '.join(row)}"
        raise Bad(role, f"missing: {reason}")
    return name, row[name]


def column_of(row: dict, role: str, columns: dict[str, str]) -> str | None:
    """Return the column that an option names, else the first guess; None if the row lacks it."""
    if role in columns:
        return columns[role] if columns[role] in row else None
    # Copies of a set differ in their capitals.
    names = {name.lower(): name for name in row}
    found = [names[guess] for guess in GUESSES[role] if guess in names]
    return found[0] if found else None


def first(row: dict, names: tuple[str, ...], hint):
    """Return the first of these fields that is of a type, or None."""
    values = [row[name] for name in names if name in row and matches(row[name], hint)]
    return values[0] if values else None


def images_of(row: dict, columns: dict[str, str]) -> list:
    """Return the images as the row has them, in order; none of a row of text alone."""
    name = column_of(row, "image", columns)
    if name is not None:
        values = row[name] if isinstance(row[name], list) else [row[name]]
    elif "image" in columns:
        values = []
    else:
        # By number: as text image_10 would come before image_2.
        numbered = {int(match[1]): match[0] for match in map(NUMBERED.fullmatch, row) if match}
        values = [row[numbered[place]] for place in sorted(numbered)]
    # In some copies a row of text alone has "" or [].
    return [image for image in values if image not in (None, "")]


def picture(value) -> str | Marked:
    """Return a path, or the image that the row holds."""
    if isinstance(value, dict):
        content = value.get("bytes")
        if isinstance(content, str):  # JSON has no bytes
            return decode(f"data:;base64,{content}", "image")
        # Both may be there: the path is then a name in the maker's archive, which nobody else has.
        value = content or value.get("path")
    if isinstance(value, bytes):
        return Marked(value)
    if not (isinstance(value, str) and value):
        raise Bad("image", f"neither bytes nor a path: {value!r:.60}")
    return image_of(value, "", "image")


def letter_of(answer: str) -> str | None:
    """Return the option that a truth names: what srreal takes for a choice, or a later letter."""
    return answer if answer in LETTERS else true_letter(answer)


def truth_of(name: str, value, options: list[str]) -> str:
    """Return the truth that a column holds, as text; of an option's index its letter."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    # A number within the options is read as an index, counted from 0. Doubtful where the truth
    # is a number itself; sets with options write a letter or an index.
    if matches(value, int) and 0 <= value < min(len(options), len(LETTERS)):
        return LETTERS[value]
    if not isinstance(value, str | int | float):
        raise Bad(name, f"wrong type or value: {value!r:.60} is not one text or number")
    text = str(value)
    # Sets that teach a format have a whole response here.
    match = ANSWER.search(text)
    text = (match[1] if match else text).strip()
    # pandas writes a missing text as nan.
    if not text or text == "nan":
        raise Bad(name, f"missing: {value!r:.60}")
    return text
