"""Turn a run's directory into one self-contained report.html: what the model scores, how it
learned, what it writes.

    python report.py --run out/speedrun

It takes what there is of sft/ and rl/ (or the directory's own metrics.jsonl), of eval-blind/,
eval-sft/ and eval-rl/ (before and after RL, greedy), and of eval-sft-sampled/ and eval-rl-sampled/
(at temperature 1). Images lie in the file and curves are SVG, so it needs no network. Which curves
and scores there are follows from the files: whatever a run logged gets a curve, whatever an
evaluation measured gets a row.

The gallery takes the tasks in turn, and in turn a question that the last model gets right, one
whose answer training changed, and one that it gets wrong. That is a tour, not a sample: the shares
are in the table. The page's markup is in report/*.html and report/style.css.
"""

import python_version  # noqa: F401

# isort: split

import base64
import hashlib
import io
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

import data as datasets
import flags
from data.geometry import project
from errors import UserError, launch, writing
from eval_table import paired, question_id, true_centres
from flags import CountOrZero
from pictures import read_metres, read_picture
from srreal import PATHS, REWARDS, SECTIONS, Example, several_views

# The runs of eval.py that runs/speedrun.sh makes. RL's gain is that of AFTER over BEFORE.
BEFORE = "after SFT"
AFTER = "after RL"
# Directory -> the name of its column.
EVALS = {"eval-blind": "blind", "eval-sft": BEFORE, "eval-rl": AFTER}
# At temperature 1, which is what RL maximises.
SAMPLED_EVALS = {"eval-sft-sampled": BEFORE, "eval-rl-sampled": AFTER}
# Directory -> heading of its curves.
LOGS = {"": "Training", "sft": "Cold start (SFT)", "rl": "Reinforcement learning"}

TEMPLATES = Path(__file__).parent / "report"


@dataclass
class Config:
    run: str  # the run's directory; report.html is written into it
    questions: CountOrZero = 12  # shown in the gallery; 0: none

    def __post_init__(self):
        flags.check(self)


@dataclass(frozen=True)
class Scale:
    """A linear map from [low, high] to pixels [first, last]; values outside are clipped."""

    low: float
    high: float
    first: float
    last: float

    def __call__(self, value):
        share = (np.clip(value, self.low, self.high) - self.low) / (self.high - self.low)
        return self.first + (self.last - self.first) * share


# ---- What a run has written


@dataclass
class Evaluation:
    """A finished run of eval.py."""

    config: dict
    results: dict  # path -> task, "all" or "no depth" -> metric -> estimate: value, se, n
    rows: list[dict]  # an answer each


def read_lines(path: Path) -> list[dict]:
    """Read a JSON-lines file; [] if it isn't there.

    What follows the last newline is still being written, and is left out.
    """
    if not path.exists():
        return []
    # A report may be asked for while a run is writing its log.
    whole_lines = path.read_text().split("\n")[:-1]
    return [json.loads(line) for line in whole_lines]


def read_evals(run: Path, folders: dict[str, str]) -> dict[str, Evaluation]:
    """Read those of the folders whose evaluation has finished, by their columns' names."""
    evals = {}
    for folder, name in folders.items():
        # eval.py writes its summary last, and removes it first when it starts again.
        summary_file = run / folder / "summary.json"
        if summary_file.exists():
            summary = json.loads(summary_file.read_text())
            rows = read_lines(run / folder / "predictions.jsonl")
            evals[name] = Evaluation(summary["config"], summary["results"], rows)
    return evals


# ---- Results

# Metrics whose bare name would not do.
LABELS = {
    "text_errors": "centre in the text, m",
    "head_errors": "centre of the 3D head, m",
    "size_errors": "size in the text, m",
    "tokens": "length, tokens",
}
# What the best constant answer scores, by the metric that it is compared with.
CHANCE = {
    "accuracy": "chance",
    "text_errors": "chance_errors",
    "head_errors": "chance_errors",
}
# From 0 to 1, on the pixels of a table's last column.
UNIT = Scale(0, 1, 6, 234)


@dataclass
class TableRow:
    label: str
    path: str
    count: int
    digits: int
    chance: dict | None
    estimates: list[dict | None]  # of each evaluation
    gain: dict | None  # RL's paired difference
    dots: list[dict]  # the estimates to draw; none where they don't lie in [0, 1]

    @property
    def significant(self) -> bool:
        """Whether RL's gain is beyond two standard errors."""
        return bool(self.gain and self.gain["se"] and abs(self.gain["value"]) > 2 * self.gain["se"])


def rl_gain(evals: dict, path: str, metric: str, task: str = "all") -> dict | None:
    """Estimate what RL changed, question by question; None if one of the two runs is missing."""
    if BEFORE not in evals or AFTER not in evals:
        return None

    def asked(rows: list[dict]) -> list[dict]:
        return [row for row in rows if row["path"] == path and task in ("all", row["task"])]

    return paired(asked(evals[BEFORE].rows), asked(evals[AFTER].rows), metric)


def table_row(evals: dict, label: str, path: str, metric: str, task: str) -> TableRow:
    """Collect one metric of one path over all evaluations; the last of them has to have it."""
    # An evaluation may lack a path (--path lor) or a task (--limit).
    results = {name: e.results.get(path, {}).get(task) for name, e in evals.items()}
    last = [result for result in results.values() if result][-1]
    estimates = {name: r[metric] if r else None for name, r in results.items()}
    is_error = metric.endswith("errors")

    chance = None
    if metric in CHANCE and last[CHANCE[metric]]:
        chance = last[CHANCE[metric]] | {"se": None}
    gain = None
    if not is_error:  # a median over objects has no pairs
        gain = rl_gain(evals, path, metric, task)
    dots = []
    if not is_error and metric != "tokens":  # neither metres nor lengths lie in [0, 1]
        dots = [e for name, e in estimates.items() if e and name != "blind"]

    return TableRow(
        label=label,
        path=path,
        count=last[metric]["n"],
        digits=1 if metric == "tokens" else 3,
        chance=chance,
        estimates=list(estimates.values()),
        gain=gain,
        dots=dots,
    )


def metrics_of(results: dict) -> list[str]:
    """Return the names of all metrics but chance, in the order in which eval.py wrote them."""
    overall = [tasks["all"] for tasks in results.values()]
    names = []
    for name in overall[0]:
        measured = any(isinstance(result[name], dict) for result in overall)
        if measured and not name.startswith("chance"):
            names.append(name)
    return names


def tables(evals: dict[str, Evaluation]) -> dict[str, list[TableRow]]:
    """Build the rows of both tables, by their headings: every metric, then accuracy by task."""
    results = list(evals.values())[-1].results
    # The last evaluation decides what the rows are: it is what the report is about.
    overall = []
    for metric in metrics_of(results):
        label = LABELS.get(metric, metric.replace("_", " "))
        for path, tasks in results.items():
            if tasks["all"].get(metric):
                overall.append(table_row(evals, label, path, metric, "all"))
    for path, tasks in results.items():
        if "no depth" in tasks:
            overall.append(table_row(evals, "accuracy, no depth", path, "accuracy", "no depth"))

    names = set().union(*results.values()) - {"all", "no depth"}
    by_task = []
    for task in sorted(names):
        for path, tasks in results.items():
            if task in tasks:
                by_task.append(table_row(evals, task, path, "accuracy", task))
    return {"all questions": overall, "accuracy by task": by_task}


def written(estimate: dict, digits: int, sign: str = "") -> str:
    text = f"{estimate['value']:{sign}.{digits}f}"
    if estimate["se"] is None:
        return text
    return f"{text} ± {estimate['se']:.{digits}f}"


def percent(estimate: dict, sign: str = "") -> str:
    error = estimate["se"]
    scaled = {"value": 100 * estimate["value"], "se": None if error is None else 100 * error}
    return written(scaled, 1, sign)


def gain_sentence(evals: dict, paths: list[str], metric: str, name: str) -> str:
    gains = {path: rl_gain(evals, path, metric) for path in paths}
    parts = [f"{percent(gain, '+')} ({path.upper()})" for path, gain in gains.items() if gain]
    if not parts:
        return ""
    return f" RL moved {name} by {' and '.join(parts)} points."


def headline(evals: dict, sampled: dict) -> str:
    """Write the sentences that a reader takes away."""
    if not evals:
        return "Not evaluated yet: eval.py --out RUN/eval-sft, or RUN/eval-rl, fills in the scores."
    column, last_eval = list(evals.items())[-1]
    overall = {path: tasks["all"] for path, tasks in last_eval.results.items()}
    scores = [f"{path.upper()} scores {percent(r['accuracy'])} %" for path, r in overall.items()]
    last = list(overall.values())[-1]
    chance = 100 * last["chance"]["value"]

    # Not capitalize(): it would write "After rl".
    text = f"{column[0].upper() + column[1:]}, {' and '.join(scores)} on {last['n']:,} questions; "
    text += f"the best constant answers score {chance:.1f} %."
    text += gain_sentence(evals, list(overall), "accuracy", "that")
    text += gain_sentence(sampled, list(overall), "total", "the reward at temperature 1")
    if last["text_errors"]:
        centres = written(last["text_errors"], 2)
        text += f" The centres that it writes are {centres} m off (median)."
    return text


# ---- Curves

# A column of metrics.jsonl: val_ or val0_ (of a validation), the path, and what was measured.
COLUMN = re.compile(rf"(val0?_)?(?:({'|'.join(PATHS)})_)?(.+)")
# What a step costs, in contrast to how it learns.
COSTS = ("seconds", "per_second", "mib", "tokens")


@dataclass
class Curve:
    path: str  # "" is all paths together
    raw: str  # an SVG polyline's points, as logged
    smoothed: str
    last: str  # the last value of the smoothed curve


@dataclass
class Chart:
    title: str
    curves: list[Curve]
    x_ticks: list[tuple[float, str]]  # (pixel, label)
    y_ticks: list[tuple[float, str]]


def ticks(low: float, high: float, most: int = 4) -> list[float]:
    """Return round numbers from low to high, `most` intervals at most."""
    # The smallest of 1, 2, 5, 10 times a power of ten that gives few enough.
    power = 10 ** math.floor(math.log10((high - low) / most))
    for multiple in (1, 2, 5, 10):
        step = multiple * power
        if (high - low) / step <= most:
            break
    return [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def smooth(values: np.ndarray) -> np.ndarray:
    """Average over a window of a fifteenth of the run, which is cut at the run's ends."""
    # An odd width, so that the mean stays in its place. Dividing by how many values a window really
    # holds keeps the ends from bending towards 0.
    window = np.ones(2 * (len(values) // 30) + 1)
    counts = np.convolve(np.ones(len(values)), window, "same")
    return np.convolve(values, window, "same") / counts


def brief(value: float) -> str:
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if 0 < abs(value) < 1e-3:
        return f"{value:.1e}".replace("e-0", "e-")
    return f"{value:.3g}"


def polyline(xs: np.ndarray, ys: np.ndarray) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(xs, ys, strict=True))


def chart(title: str, series: dict[str, np.ndarray]) -> Chart:
    """Draw the series of one metric: path -> steps and values (2, n)."""
    means = {path: smooth(values) for path, (_, values) in series.items()}
    # Spikes are cut off, so that they don't flatten the rest.
    quantiles = [np.quantile(values, (0.02, 0.98)) for _, values in series.values()]
    bounds = np.concatenate([*quantiles, *means.values()])
    low = bounds.min()
    high = bounds.max()
    if high - low <= 1e-3 * abs(high):  # a constant needs some room
        margin = 0.05 * max(abs(high), 1e-3)
        low -= margin
        high += margin

    # Pixels of the chart's viewBox in report/curves.html; y grows downwards.
    last_step = max(steps.max() for steps, _ in series.values())
    x = Scale(0, last_step, 44, 294)
    y = Scale(low, high, 124, 32)
    curves = []
    for path, (steps, values) in series.items():
        mean = means[path]
        raw = polyline(x(steps), y(values))
        curves.append(Curve(path, raw, polyline(x(steps), y(mean)), brief(mean[-1])))
    x_ticks = [(x(step), brief(step)) for step in ticks(0, last_step)]
    y_ticks = [(y(value), brief(value)) for value in ticks(low, high)]
    return Chart(title, curves, x_ticks, y_ticks)


def logged_series(rows: list[dict]) -> dict[str, dict[str, np.ndarray]]:
    """Sort what a run logged: metric -> path -> steps and values (2, n).

    A metric that is logged by path loses the column of all paths together. Values that were not
    finite are null in the log, and are skipped; a single one makes no curve.
    """
    points = {}
    for row in rows:
        for column, value in row.items():
            if column == "step" or value is None:
                continue
            validation, path, measured = COLUMN.fullmatch(column).groups("")
            by_path = points.setdefault(validation + measured, {})
            by_path.setdefault(path, []).append((row["step"], value))

    series = {}
    for metric, by_path in points.items():
        curves = {}
        for path in (*PATHS, ""):
            pairs = by_path.get(path, [])
            if len(pairs) > 1 and not (path == "" and curves):
                curves[path] = np.array(pairs, dtype=float).T
        if curves:
            series[metric] = curves
    return series


def charts(rows: list[dict]) -> tuple[list[Chart], list[Chart]]:
    """Draw every column of metrics.jsonl: (how it learned, what a step cost)."""
    series = logged_series(rows)
    # The method's own quantities first: they are logged by path. The sort is stable, so within
    # either kind the order is that of the log.
    names = sorted(series, key=lambda name: "" in series[name])
    learning = [chart(name, series[name]) for name in names if not name.endswith(COSTS)]
    costs = [chart(name, series[name]) for name in names if name.endswith(COSTS)]
    return learning, costs


# ---- Gallery

# The colours of the marks, by the first word of a mention.
COLOURS = {"red": "#e5484d", "blue": "#3e7bfa", "green": "#2f9e5b", "yellow": "#e2b203"}
OTHER_COLOUR = "#8e4ec6"
OUTCOMES = ("right", "changed", "wrong")
PICTURE_WIDTH = 640  # pixels at most


class Point(NamedTuple):
    kind: str  # "truth" | "text" | "head": who says so
    colour: str
    xyz: tuple  # metres, in a view's camera frame


class Glyph(NamedTuple):
    kind: str
    colour: str
    x: float
    y: float


@dataclass
class Inlined:
    """An image as a data URI, at its place in an SVG."""

    href: str
    x: float
    y: float
    width: float
    height: float


@dataclass
class Picture:
    image: Inlined
    regions: list[tuple]  # (x, y, width, height) pixels
    glyphs: list[Glyph]


@dataclass
class TopView:
    """The view from above: x to the right, z up, metres."""

    far: float
    left: float  # where the field of view ends, at `far`
    right: float
    floor: Inlined | None
    glyphs: list[Glyph]


@dataclass
class Answer:
    title: str
    path: str
    chips: list[tuple[str, float]]  # (part of the score, value)
    pieces: list[tuple[str, str]]  # (tag or "", text)


@dataclass
class Card:
    example: Example
    question: list[tuple[str, str]]  # (text, colour of the region mentioned at its end, or "")
    pictures: list[Picture]
    top: TopView | None
    answers: list[Answer | None]
    columns: int


def colour_of(mention: str | None) -> str:
    word = (mention or "").split(" ")[0].lower()
    return COLOURS.get(word, OTHER_COLOUR)


def points_of(example: Example, row: dict, view: int) -> list[Point]:
    """Collect all centres, true and predicted, that are known in the camera frame of a view."""
    points = []
    for mention, xyz in true_centres(example, view).items():
        points.append(Point("truth", colour_of(mention), xyz))
    # Of several views the answer states one frame, and its centres mean nothing in the others.
    if not several_views(example) or row["parsed"]["frame"] == view:
        for mention, _, xyz in row["parsed"]["boxes"]:
            points.append(Point("text", colour_of(mention), xyz))
    regions = zip(row["region_mentions"], example.regions, row["head_centres"], strict=True)
    for mention, (index, _), xyz in regions:
        if index == view:
            points.append(Point("head", colour_of(mention), xyz))
    return points


def data_uri(image: Image.Image, kind: str) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, quality=88)
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return f"data:image/{kind.lower()};base64,{encoded}"


def bounds_of(region: np.ndarray) -> tuple[float, float, float, float]:
    """Return (x, y, width, height) of a box, or around a mask."""
    if region.ndim == 2:
        ys, xs = np.nonzero(region)
    else:
        xs = region[::2]
        ys = region[1::2]
    return xs.min(), ys.min(), np.ptp(xs), np.ptp(ys)


def camera_of(example: Example, view: int):
    return example.intrinsics[view] if example.intrinsics else None


def picture(image: Image.Image, example: Example, points: list[Point], view: int) -> Picture:
    """Prepare an image with its regions outlined and every point projected onto it."""
    width, height = image.size
    small = image
    if width > PICTURE_WIDTH:
        small = image.resize((PICTURE_WIDTH, PICTURE_WIDTH * height // width))
    regions = [bounds_of(np.asarray(region)) for index, region in example.regions if index == view]
    glyphs = []
    camera = camera_of(example, view)
    for point in points if camera else []:
        pixel = project(point.xyz, camera)
        if pixel:
            glyphs.append(Glyph(point.kind, point.colour, *pixel))
    return Picture(Inlined(data_uri(small, "JPEG"), 0, 0, width, height), regions, glyphs)


def from_above(image: Image.Image, depth: np.ndarray, camera, size: float = 0.05) -> Inlined | None:
    """Draw what the depth map shows, as seen from above, `size` metres a pixel; None if nothing."""
    fx, fy, cx, cy = camera
    v, u = np.indices(depth.shape)
    depth = np.where(np.isfinite(depth), depth, 0)
    down = (v - cy) * depth / fy  # metres below the camera
    shown = (depth > 0) & (down > -0.2)  # a ceiling would hide the room
    if not shown.any():
        return None
    # The floor is painted first: what stands on it covers it.
    order = np.argsort(-down[shown])
    z = depth[shown][order]
    x = (u[shown][order] - cx) * z / fx  # the pinhole camera, backwards
    columns = ((x - x.min()) / size).astype(int)
    rows = ((z.max() - z) / size).astype(int)
    raster = np.zeros((rows.max() + 1, columns.max() + 1, 4), np.uint8)
    faded = [1, 1, 1, 0.6]
    raster[rows, columns] = np.asarray(image.convert("RGBA"))[shown][order] * faded
    height, width, _ = raster.shape
    uri = data_uri(Image.fromarray(raster), "PNG")
    return Inlined(uri, x.min(), -z.max(), size * width, size * height)


def depth_of(example: Example, view: int) -> np.ndarray | None:
    """Return a view's depth in metres, or None."""
    depth = example.depths[view] if example.depths else None
    if depth is None:
        return None
    if isinstance(depth, str | Path):
        return read_metres(depth)
    return np.asarray(depth)


def top_view(image: Image.Image, example: Example, points: list[Point], view: int):
    """Prepare the view from above of the same points; None for a camera that isn't known."""
    camera = camera_of(example, view)
    if camera is None:
        return None
    far = max([3.0] + [point.xyz[2] for point in points if point.kind == "truth"])
    floor = None
    depth = depth_of(example, view)
    if depth is not None:
        floor = from_above(image, depth, camera)
        # A quantile: one pixel through a window must not shrink the room.
        known = depth[(depth > 0) & (depth < np.inf)]
        if len(known):
            far = max(far, np.quantile(known, 0.98))
    far = float(far) + 0.3
    fx, _, cx, _ = camera
    left = -far * cx / fx
    right = far * (image.width - cx) / fx
    glyphs = [Glyph(point.kind, point.colour, point.xyz[0], -point.xyz[2]) for point in points]
    return TopView(far, left, right, floor, glyphs)


def split_sections(text: str) -> list[tuple[str, str]]:
    """Cut an answer into (tag, what it encloses) and ("", what stands between)."""
    # A regular expression rather than srreal.parse: what is ill-formed has to be shown, too.
    tags = "|".join(SECTIONS)
    pieces = []
    end = 0
    for block in re.finditer(rf"<({tags})>(.*?)</\1>\s*", text, re.S):
        pieces.append(("", text[end : block.start()]))
        pieces.append(block.groups())
        end = block.end()
    pieces.append(("", text[end:]))
    return [piece for piece in pieces if piece[1]]


def split_question(question: str) -> list[tuple[str, str]]:
    """Cut a question behind each region's mention: (text, the colour of that region or "")."""
    *mentioned, rest = question.split("<mask>")
    pieces = []
    for text in mentioned:
        words = re.search(r"(\w+) \w+ ?$", text)
        pieces.append((text, colour_of(words[1] if words else None)))
    return [*pieces, (rest, "")]


def answer(column: str, row: dict | None) -> Answer | None:
    if row is None:
        return None
    title = f"{row['path'].upper()} {column}"
    if row["truncated"]:
        title += ", cut"
    parts = [(part, row.get(part)) for part in (*REWARDS, "total")]
    chips = [(part, value) for part, value in parts if value is not None]
    return Answer(title, row["path"], chips, split_sections(row["text"]))


def card(example: Example, rows: dict[tuple[str, str], dict]) -> Card:
    """Prepare a question with its answers: (column, path) -> row of predictions.jsonl.

    The points drawn are the last model's, of its answer on path dtr if there is one.
    """
    last = list(rows.values())[-1]
    for (_, path), row in rows.items():
        if path == "dtr":
            last = row
    images = [read_picture(image) for image in example.images]
    # From above, the room is drawn in the view whose frame the answer states.
    frame = last["parsed"]["frame"] if several_views(example) else 0
    if frame not in range(len(images)):
        frame = example.frame or 0

    points = [points_of(example, last, view) for view in range(len(images))]
    pictures = [picture(image, example, points[i], i) for i, image in enumerate(images)]
    columns = dict.fromkeys(column for column, _ in rows)
    paths = dict.fromkeys(path for _, path in rows)
    answers = []
    for column in columns:
        answers += [answer(column, rows.get((column, path))) for path in paths]
    top = top_view(images[frame], example, points[frame], frame)
    question = split_question(example.question)
    return Card(example, question, pictures, top, answers, len(paths))


def outcome(rows: dict[tuple[str, str], dict]) -> str:
    """Return "changed" if training moved the accuracy on a path by half; else right or wrong."""
    by_path = {}
    for (_, path), row in rows.items():
        by_path.setdefault(path, []).append(row["accuracy"])
    if any(max(scores) - min(scores) >= 0.5 for scores in by_path.values()):
        return "changed"
    last_column = list(rows)[-1][0]
    last_scores = [row["accuracy"] for (column, _), row in rows.items() if column == last_column]
    return "right" if min(last_scores) >= 0.5 else "wrong"


def choose(questions: dict[str, dict], count: int) -> list[str]:
    """Choose questions: the tasks in turn, the outcomes in turn, ties by hash."""
    # A hash, so that the choice depends on neither the order of the rows nor chance.
    left = sorted(questions, key=lambda name: hashlib.sha1(name.encode()).digest())
    kinds = {}
    for name, rows in questions.items():
        task = next(iter(rows.values()))["task"]
        kinds[name] = (task, outcome(rows))
    tasks = sorted({task for task, _ in kinds.values()})
    chosen = []
    for i in range(min(count, len(left))):
        turn, place = divmod(i, len(tasks))
        # Shifted by a place each turn: otherwise a task would always show the same outcome.
        wanted = OUTCOMES[(turn + place) % len(OUTCOMES)]
        best = closest(left, kinds, tasks[place], wanted)
        left.remove(best)
        chosen.append(best)
    return chosen


def closest(names: list[str], kinds: dict, task: str, wanted: str) -> str:
    """Return the first of that task and outcome, else of that task, else of that outcome."""
    return min(names, key=lambda name: (kinds[name][0] != task, kinds[name][1] != wanted))


def asked_examples(config: dict) -> dict[str, Example]:
    """Load what an evaluation asked, by question; {} if its data are gone or no longer readable."""
    if config["benchmark"]:
        return {}
    try:
        examples = datasets.load(config["data"], skip_bad_rows=True)
    except (OSError, ValueError, UserError):
        return {}  # the data may have moved since
    questions = {}
    for example in examples:
        questions.setdefault(question_id(example), example)
    return questions


def gallery(evals: dict[str, Evaluation], count: int) -> list[Card]:
    examples = asked_examples(list(evals.values())[-1].config)
    questions = {}
    for column, evaluation in evals.items():
        # A blind model's answers say nothing about an image, unless they are all there is.
        if column == "blind" and len(evals) > 1:
            continue
        for row in evaluation.rows:
            if row["question_id"] in examples:
                answers = questions.setdefault(row["question_id"], {})
                answers[column, row["path"]] = row
    return [card(examples[name], questions[name]) for name in choose(questions, count)]


# ---- The page


def page(run: Path, questions: int) -> str:
    """Render the report of a run as HTML."""
    evals = read_evals(run, EVALS)
    logs = []
    for folder, heading in LOGS.items():
        rows = read_lines(run / folder / "metrics.jsonl")
        if rows:
            logs.append((f"{heading}, {rows[-1]['step']:,} steps", *charts(rows)))
    # Autoescape: nothing that a model wrote becomes markup.
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html").render(
        title=run.resolve().name,
        headline=headline(evals, read_evals(run, SAMPLED_EVALS)),
        columns=list(evals),
        tables=tables(evals) if evals else {},
        unit=UNIT,
        logs=logs,
        cards=gallery(evals, questions) if evals else [],
        path_numbers={path: i for i, path in enumerate(PATHS)},
    )


def main(config: Config) -> None:
    run = Path(config.run)
    if not run.is_dir():
        raise UserError(f"{run}: no such directory")
    out = run / "report.html"
    text = page(run, config.questions)
    with writing(out):
        out.write_text(text)
    print(headline(read_evals(run, EVALS), read_evals(run, SAMPLED_EVALS)))
    print(f"{out} ({out.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    launch("report.py", main, flags.parse(Config, __doc__))
