"""What every benchmark's file uses: a row with checked fields, its questions, shared rules."""

import ast
import base64
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from data.benchmarks.answers import LETTERS, read_choice, robust
from data.benchmarks.means import Mean, Scored
from data.benchmarks.means import by_sample as by_sample  # for files that need no more of means.py
from data.frames import Frame, frames_of
from data.marks import Marked
from data.rows import Bad, matches
from pictures import picture_size
from srreal import Example


@dataclass(frozen=True)
class Row:
    """A row as its file has it. What is wrong with a field is the file's fault, and raises Bad."""

    columns: dict
    folder: Path  # of the set
    file: Path
    number: int  # from 1, through all files of the set: ids and orders are made of it
    path: str  # what is asked for: lor and direct need no region
    beside: dict  # what the benchmark's `beside` read in the folder
    frames: int = 32  # of a video
    # Files and videos that earlier rows showed: rows that show them, too, get the same objects, so
    # that each is decoded and encoded once.
    shown: dict = field(default_factory=dict)

    # A parquet's null and a column that isn't there are one: neither can be asked about.
    def has(self, name: str) -> bool:
        return self.columns.get(name) is not None

    def raw(self, name: str):
        if not self.has(name):
            raise Bad(name, f"missing; there are {', '.join(self.columns)}")
        return self.columns[name]

    def text(self, name: str) -> str:
        # Not unpacked: a question may begin with a bracket. Ids are numbers in some copies.
        text = self.raw(name)
        if not isinstance(text, str | int | float):
            raise Bad(name, f"wrong type or value: {text!r:.50} is no text")
        return str(text)

    def value(self, name: str):
        """Return a field, also where a converter wrote it as JSON or as Python's repr."""
        return unpacked(self.raw(name))

    def items(self, name: str, hint=None) -> list:
        """Return a list whose items are of a type, as data.rows.matches reads it."""
        value = self.value(name)
        if not isinstance(value, list) or (hint and not matches(value, list[hint])):
            raise Bad(
                name, f"wrong type or value: {value!r:.50} is no list of {hint or 'anything'}"
            )
        return value

    def images(self, *names: str) -> list[Marked]:
        """Return the images of some fields, each one image or a list; unused ones are null."""
        found = []
        for name in names:
            value = self.value(name)
            for image in value if isinstance(value, list) else [value]:
                if image is not None:
                    found.append(self.image(image))
        return found

    def image(self, value) -> Marked:
        """Return {bytes, path}, raw bytes, base64, or a path under the set's folder as an image."""
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, str):
            # A path is tried first: base64 is far too long to be one, and is known at once.
            file = self.find(value)
            if file is not None:
                return self.picture(file)
            value = self.base64(value)
        if not isinstance(value, bytes):
            raise Bad("image", f"neither bytes nor a path: {value!r:.60}")
        # Some copies hold an image again in each row that shows it.
        if value not in self.shown:
            self.shown[value] = readable(Marked(value))
        return self.shown[value]

    def picture(self, file: Path) -> Marked:
        """Return a file as an image: the path alone, for there may be many GB of them."""
        name = str(file)
        if name not in self.shown:
            self.shown[name] = readable(Marked(name))
        return self.shown[name]

    def base64(self, text: str) -> bytes:
        try:
            return base64.b64decode(text, validate=True)
        except ValueError:
            reason = f"missing file: {text[:80]} in {self.folder} (--data: where it is)"
            raise Bad("image", reason) from None

    def find(self, name: str) -> Path | None:
        """Return the file or folder of that name below the set's folder, or beside its rows."""
        if len(name) > LONGEST_PATH:
            return None
        near = (self.folder, self.file.parent, self.file.parent.parent)
        bases = [*near, self.folder / "images", self.folder / "videos", self.folder / "data"]
        for base in bases:
            if os.path.exists(base / name):
                return base / name
        return None

    def video(self, name: str) -> list[Frame]:
        """Return the frames of a video, named with its ending, or of the folder in its place."""
        folder, _ = os.path.splitext(name)
        found = self.find(folder) or self.find(name)
        if found is None:
            reason = f"missing file: {name} in {self.folder} (nor is there a folder of its frames)"
            raise Bad("video", reason)
        # Of a folder the ending is only what `frames_of` cuts off again.
        file = found.with_name(os.path.basename(name))
        if str(file) not in self.shown:
            self.shown[str(file)] = frames_of(file, self.frames)
        return self.shown[str(file)]


def readable(image: Marked) -> Marked:
    """Return the image; Bad where not even its header can be read."""
    # The pixels are decoded when the question is asked.
    try:
        picture_size(image.source)
    except Exception as error:  # Pillow raises all sorts on bad bytes
        raise Bad("image", f"corrupt: {error}") from error
    return image


def unpacked(value):
    if not (isinstance(value, str) and value.startswith(("[", "{"))):
        return value
    # literal_eval reads literals and calls nothing, so it is safe on text from a file.
    for read in (json.loads, ast.literal_eval):
        try:
            return read(value)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
    return value


@dataclass
class Item:
    """A question of a row, as each path asks it; "" is as lor."""

    id: str
    images: list
    answer: str
    task: str
    lor: str
    direct: str = ""
    dtr: str = ""
    regions: list = field(default_factory=list)  # by <mask>: (image, (x0, y0, x1, y1))
    depths: list | None = None  # as an Example has them
    intrinsics: list | None = None

    def examples(self, path: str) -> Iterator[Example]:
        """Yield it on one path; or for both: lor, and dtr where that is asked in another way."""
        # eval.py asks the lor form on dtr where there is no other, so it comes once.
        paths = [path]
        if path == "both":
            paths = ["lor", "dtr"] if self.dtr else ["lor"]
        texts = {"direct": self.direct, "dtr": self.dtr}
        for path in paths:
            text = texts.get(path) or self.lor
            self.check(text)
            yield Example(
                self.id,
                path,
                self.images,
                text,
                self.answer,
                task=self.task,
                depths=self.depths,
                intrinsics=self.intrinsics,
                regions=self.regions if "<mask>" in text else [],
            )

    def check(self, text: str) -> None:
        """Raise Bad where a question's places, regions and images don't belong together."""
        # Either form may do without regions or places, but not with some of them.
        masks = text.count("<mask>")
        places = text.count("<image>")
        if masks not in (0, len(self.regions)):
            raise Bad("question", f"{masks} <mask> for {len(self.regions)} regions")
        if places not in (0, len(self.images)):
            raise Bad("question", f"{places} <image> for {len(self.images)} images")
        if not self.images:
            raise Bad("image", "there is none")
        if not self.answer.strip():
            raise Bad("answer", "there is none")
        for image, box in self.regions if masks else ():
            if not (0 <= image < len(self.images) and inside(box, self.images[image].size)):
                raise Bad("regions", f"outside of image {image}: {box}")


@dataclass(frozen=True)
class Benchmark:
    """A set as published: where it lies, how a row is read, what an answer earns."""

    hub: str
    rows: int
    files: tuple[str, ...]  # globs of the files with rows; the first that finds any
    read: Callable[[Row], Iterator[Item]]
    official: Callable[[str, Example], float]  # (text of the answer, its Example) -> 0..1
    aggregate: Callable[[Scored], dict[str, Mean]]
    # Somebody else's figures: (the model, who says so, {key: per cent}). They stand beside ours
    # where all of the set was asked.
    others: tuple[str, str, dict]
    more: tuple[tuple[str, str, dict], ...] = ()  # and of other models
    robust: Callable[[str, Example], float | None] = robust  # of the whole response
    judged: str = ""  # where the published rule is a language model: what `official` is instead
    beside: Callable[[Path], dict] | None = None  # reads what a folder has beside the rows
    # What a row's questions share with others' beside images: a scene. They are one cluster.
    scene: Callable[[Example], str | None] | None = None
    # A column that names a row: one that recurs, as in a copy in another file, is left out.
    key: str = ""
    # Columns by which a file with rows is known, where names are not: others are left out.
    columns: tuple[str, ...] = ()
    slack: int = 0  # cards and files differ by so many rows
    # Of pairs (Example, response): key -> mean error of what is read, where that is published.
    errors: Callable[[list], dict[str, float]] | None = None


# ---- Questions

TEST = "**/test*.parquet"
LONGEST_PATH = 4096


def lettered(options: list[str], form: str) -> str:
    """Write a line an option: form holds {} for the letter and {} for the text."""
    # More than eight options have no letter that a scorer would read.
    pairs = zip(LETTERS, options, strict=False)
    return "".join("\n" + form.format(letter, option) for letter, option in pairs)


def letter(answer, count: int) -> str:
    """Return B of `B`, `(B)` or the index 1, where there are so many options."""
    text = str(answer).strip("() .")
    if isinstance(answer, int) and 0 <= answer < len(LETTERS):
        text = LETTERS[answer]
    if text not in tuple(LETTERS[:count]):
        raise Bad("answer", f"no letter of {count} options: {answer!r}")
    return text


def only_letters(count: int) -> str:
    """Write what lmms-eval puts before a question of so many options."""
    letters = ", ".join(LETTERS[:count])
    wanted = (
        f"You only need to respond with {letters} without providing any additional information."
    )
    return f"Note: {wanted}\n"


def inside(box: tuple, size: tuple[int, int]) -> bool:
    x0, y0, x1, y1 = box
    return 0 <= x0 < x1 <= size[0] and 0 <= y0 < y1 <= size[1]


# ---- Official rules that several benchmarks share


def equal(text: str, example: Example) -> float:
    """SR-REAL's rule, and BLINK's first step: equal but for case, ( ) . and blanks."""
    # "B. cabinet" so is none of its letters: that is the published rule.
    bare = str.maketrans("", "", "(). ")
    return float(text.lower().translate(bare) == example.answer.lower().translate(bare))


def letter_or_text(text: str, example: Example) -> float:
    """lmms-eval's rule for RealWorldQA and ERQA: the letter that is read, or equality."""
    truth = example.answer
    if truth in tuple("ABCD"):
        return float(read_choice(text, example.question) == truth)
    return float(text.lower().strip().rstrip(".") == truth.lower().strip())
