"""The tables of eval.py --benchmark and --suite: both scorers, and what others have published."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain

from data import benchmarks
from data.benchmarks.means import Mean
from data.frames import Frame
from srreal import Example

SCORERS = ("official", "robust")
# As data/frames.py has it.
FRAME_RULE = "int(i (n - 1) / (k - 1)) of n, i = 0 .. k - 1"


@dataclass
class Marks:
    """What the answers on one path earn."""

    official: dict[str, Mean]
    robust: dict[str, Mean]
    errors: dict[str, float] | None  # of what is read, where that is published

    def values(self) -> dict[str, dict[str, float]]:
        """Return scorer -> key -> per cent, for summary.json."""
        found = {name: values_of(getattr(self, name)) for name in SCORERS}
        return found if self.errors is None else found | {"errors": self.errors}

    def standard_errors(self) -> dict[str, dict[str, float | None]]:
        return {name: errors_of(getattr(self, name)) for name in SCORERS}


def values_of(table: dict[str, Mean]) -> dict[str, float]:
    return {key: found.value for key, found in table.items()}


def errors_of(table: dict[str, Mean]) -> dict[str, float | None]:
    return {key: found.se for key, found in table.items()}


def marks_of(name: str, pairs: list[tuple[Example, str]], clusters: list[str]) -> Marks:
    """Mark a path's (question, response) pairs by both scorers."""
    official = benchmarks.estimates(name, pairs, "official", clusters)
    robust = benchmarks.estimates(name, pairs, "robust", clusters)
    errors = benchmarks.BENCHMARKS[name.partition("/")[0]].errors
    return Marks(official, robust, errors(pairs) if errors else None)


def published(name: str) -> tuple[tuple[str, str, dict], ...]:
    """Return (model, source, figures) of everyone who has measured a benchmark."""
    benchmark = benchmarks.BENCHMARKS[name.partition("/")[0]]
    return (benchmark.others, *benchmark.more)


# ---- What was shown


def input_of(examples: list[Example], pixels: Iterable[list[int]]) -> dict:
    """Return in which form the questions' images were shown, for summary.json.

    pixels: of each question, the sizes of its images as the model reads them, in pixels.
    """
    frames = []
    images = []
    # SITE asks of images and of videos.
    for example in examples:
        is_video = any(isinstance(image, Frame) for image in example.images)
        (frames if is_video else images).append(len(example.images))
    # What the model read, after --max-pixels: papers differ by it as much as by frames.
    sizes = list(chain.from_iterable(pixels))
    forms = []
    if images:
        forms.append("images")
    if frames:
        forms.append("video frames")
    return {
        "form": " and ".join(forms),
        "images": ends(images),
        "frames": ends(frames),
        "frame_rule": FRAME_RULE if frames else None,
        "pixels": ends(sizes),
    }


def ends(numbers: list[int]) -> list[int] | None:
    """Return the least and the greatest; None of none."""
    return [min(numbers), max(numbers)] if numbers else None


def input_line(shown: dict) -> str:
    """Say what was shown in one line."""
    parts = []
    if shown["images"]:
        images = "image" if shown["images"] == [1, 1] else "images"
        parts.append(f"{span(shown['images'])} {images} a question")
    if shown["frames"]:
        parts.append(f"{span(shown['frames'])} frames of a video as images, {shown['frame_rule']}")
    # Of SITE's mixture there is one range for both.
    each = "a frame" if shown["frames"] and not shown["images"] else "an image"
    size = f"{span(shown['pixels'])} pixels {each}" if shown["pixels"] else "no images"
    return "; ".join([*parts, size])


def span(numbers: list[int]) -> str:
    low, high = numbers
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


# ---- Printing


def shown(found: Mean | None) -> str:
    """Write a mean and its error, as in 41.0±1.6."""
    if found is None:
        return "-"
    return f"{found.value:.1f}" if found.se is None else f"{found.value:.1f}±{found.se:.1f}"


def print_marks(name: str, path: str, marks: Marks, figures: tuple) -> None:
    """Print a path's per cent by both scorers, and a column for each of others' figures."""
    # One model stands there twice where two sources disagree: SITE's paper and EASI by 6 points.
    others = [f"{model} ({source})" for model, source, _ in figures]
    heading = "".join(f"{other:>{len(other) + 4}}" for other in others)
    title = f"{name} {path}"
    width = max(34, len(title) + 1, *[len(key) + 3 for key in marks.official])
    print(f"\n{title:{width}}{'official':>12}{'robust':>12}{heading}")
    for key, official in marks.official.items():
        line = f"{'  ' + key:{width}}{shown(official):>12}{shown(marks.robust[key]):>12}"
        for other, (_, _, figure) in zip(others, figures, strict=True):
            # Most have published the headline alone.
            cell = f"{figure[key]:.1f}" if key in figure else ""
            line += f"{cell:>{len(other) + 4}}"
        print(line.rstrip())
    for column, error in (marks.errors or {}).items():
        unit = "off, degrees" if column == "direction" else "off / truth"
        print(f"{f'  {column} {unit}':{width}}{error:>12.2f}")


@dataclass
class SuiteRow:
    """A benchmark's line in the table of a suite."""

    name: str
    path: str
    rows: int  # that were asked: with --limit fewer than there are
    published_rows: int
    official: Mean | None
    robust: Mean | None
    shown: str  # its input

    @property
    def is_complete(self) -> bool:
        return self.rows == self.published_rows


def print_suite(suite: str, rows: list[SuiteRow], figures: dict[str, tuple]) -> None:
    """Print a line for each benchmark and path; figures: name -> what others have published."""
    print(f"\n{suite + ', overall':24}{'rows':>16}{'official':>12}{'robust':>12}  published")
    for row in rows:
        cells = f"{shown(row.official):>12}{shown(row.robust):>12}"
        count = f"{row.rows:,}"
        if not row.is_complete:
            count += f" of {row.published_rows:,}"
        line = f"{row.name + ' ' + row.path:24}{count:>16}{cells}  "
        line += figures_line(figures.get(row.name, ()))
        print(line.rstrip())
    print()
    for name, text in {row.name: row.shown for row in rows}.items():
        print(f"  {name}: {text}")


def figures_line(figures: tuple) -> str:
    """Write others' headline figures in one line, each with its source."""
    parts = []
    for model, source, figure in figures:
        # Papers report 3DSRBench's `circular`, and the line's own figure is `overall`: it is named,
        # so that nobody compares the two.
        for key in ("overall", "circular"):
            if key in figure:
                of_what = "" if key == "overall" else f" {key}"
                parts.append(f"{figure[key]:.1f}{of_what} {model} ({source})")
                break
    return "; ".join(parts)
