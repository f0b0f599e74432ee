"""A run's directory -> one self-contained report.html: what the model scores, how it learned, what
it says.

    python report.py --run out/speedrun

Takes what there is of sft/ and rl/ (or the directory's own metrics.jsonl), of eval-blind/,
eval-sft/ and eval-rl/ (before and after RL, greedy), and of eval-sft-sampled/ and eval-rl-sampled/
(at temperature 1). Images lie in the file, curves are SVG: it needs no network. The gallery takes
the tasks in turn, in turn with a question that the last model gets right, one whose answer training
changed, and one that it gets wrong: a tour, not a sample. The shares are in the table.
"""

import base64
import hashlib
import io
import json
import math
import re
import sys
from contextlib import suppress
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
import tyro
from PIL import Image

import data as datasets
from eval import question_id, true_centres
from eval_table import paired
from srreal import Example, several_views

BEFORE, AFTER = "after SFT", "after RL"
EVALS = {"eval-blind": "blind", "eval-sft": BEFORE, "eval-rl": AFTER}  # directory -> column
# at temperature 1: what RL maximises
SAMPLED = {"eval-sft-sampled": BEFORE, "eval-rl-sampled": AFTER}
# directory -> heading
LOGS = {"": "Training", "sft": "Cold start (SFT)", "rl": "Reinforcement learning"}
ROWS = {
    "accuracy": "accuracy",
    "any_format": "accuracy, any format",
    "format": "format",
    "detect": "detect",
    "total": "reward",
    "text_errors": "centre in the text, m",
    "head_errors": "centre of the 3D head, m",
    "tokens": "length, tokens",
}  # metric of eval.py -> label
PANELS = {
    "loss": "loss",
    "loss_text": "loss of the text, nats a token",
    "val_loss": "loss on held-out rows",
    "head_error_metres": "3D head: centre error, m",
    "reward": "reward",
    "accuracy": "accuracy",
    "format": "format",
    "detect": "detect",
    "length": "length, tokens",
    "kept": "share of groups kept",
    "kl": "KL to the cold start",
    "entropy": "entropy, nats",
    "mismatch_kl": "sampler to trainer, KL",
    "grad_norm": "gradient norm",
    "tokens_per_second": "tokens a second",
    "rollout_tokens_per_second":
    # key of metrics.jsonl, alone or behind lor_ and dtr_ -> title
    "rollout, tokens a second",
}
LABELS = {"lor": "LOR", "dtr": "DTR", "direct": "direct", "one": ""}
# of the marks
COLOURS = {"red": "#e5484d", "blue": "#3e7bfa", "green": "#2f9e5b", "yellow": "#e2b203"}


@dataclass
class Config:
    run: str  # the run's directory; report.html is written into it
    questions: int = 12  # shown in the gallery


def tag(name: str, *children: str, **attributes) -> str:
    """<name attributes>children</name>. Children are markup already; attributes are escaped
    here."""
    names = (key.rstrip("_").replace("_", "-") for key in attributes)
    pairs = (
        f' {key}="{escape(str(value))}"'
        for key, value in zip(names, attributes.values(), strict=True)
    )
    return f"<{name}{''.join(pairs)}>{''.join(children)}</{name}>"


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> str:
    return tag("polyline", points=f"{x1:.2f},{y1:.2f} {x2:.2f},{y2:.2f}", class_=class_)


def word(text: str, x: float, y: float, anchor: str = "start", class_: str = "label") -> str:
    return tag("text", text, x=round(x, 2), y=round(y, 2), text_anchor=anchor, class_=class_)


# ---- Numbers
MARKS = (0, 0.25, 0.5, 0.75, 1)


def cell(number: dict | None, digits: int, sign: str = "") -> str:
    if number is None:
        return "–"
    text = f"{number['value']:{sign}.{digits}f}"
    return text if number["se"] is None else f"{text} <small>± {number['se']:.{digits}f}</small>"


def dots(chance: dict | None, numbers: list[dict], path: str) -> str:
    """On a line from 0 to 1: a bar for chance, hollow before, full after, whiskers of one standard
    error."""
    at = lambda value: 6 + 228 * min(max(value, 0), 1)  # noqa: E731
    parts = [line(6, 9, 234, 9, "grid"), *(line(at(v), 6, at(v), 12, "grid") for v in MARKS)]
    parts += [line(at(chance["value"]), 3, at(chance["value"]), 15, "chance")] if chance else []
    for number in numbers:
        value, se = number["value"], number["se"] or 0
        full = path + " full" * (number is numbers[-1])
        parts += [line(at(value - se), 9, at(value + se), 9, path)]
        parts += [tag("circle", cx=round(at(value), 2), cy=9, r=4, class_=full)]
    return tag("svg", *parts, viewBox="0 0 240 18", width=240, height=18)


def change(evals: dict, path: str, metric: str, task: str = "all") -> dict | None:
    """RL's paired difference, where there are both runs."""
    if not {BEFORE, AFTER} <= set(evals):
        return None
    return paired(
        *(
            [row for row in evals[name][1] if row["path"] == path and task in ("all", row["task"])]
            for name in (BEFORE, AFTER)
        ),
        metric,
    )


def table_row(evals: dict, path: str, metric: str, task: str) -> list[str]:
    """path, n, chance, a cell an evaluation, RL's paired difference, the dots."""
    digits, error = 1 if metric == "tokens" else 3, metric.endswith("errors")
    found = {
        name: summary["results"].get(path, {}).get(task) for name, (summary, _) in evals.items()
    }
    last = [result for result in found.values() if result][-1]
    chance = last["chance"] if metric == "accuracy" else last["chance_errors"] if error else None
    cells = [tag("i", LABELS[path], class_=path), str(last[metric]["n"])]
    cells += [cell(chance and {**chance, "se": None}, digits)]
    cells += [cell(result and result[metric], digits) for result in found.values()]
    # a median over objects has no pairs
    gain = None if error else change(evals, path, metric, task)
    sure = gain and gain["se"] and abs(gain["value"]) > 2 * gain["se"]
    cells += [tag("b" if sure else "span", cell(gain, digits, "+"))]
    trained = [result[metric] for name, result in found.items() if name != "blind" and result]
    return [
        *cells,
        "" if error or metric == "tokens" else dots(chance, [t for t in trained if t], path),
    ]


def table(first: str, groups: list[tuple], evals: dict) -> str:
    """groups: (label, path, metric, task), a line each; a label is written once."""
    axis = [word(f"{v:g}", 6 + 228 * v, 12, "middle") for v in MARKS]
    axis = tag("svg", *axis, viewBox="0 0 240 16", width=240, height=16)
    lines = [
        tag(
            "tr",
            *(tag("th", head) for head in (first, "", "n", "chance", *evals, "RL − SFT", axis)),
        )
    ]
    for i, (label, *what) in enumerate(groups):
        new = i == 0 or groups[i - 1][0] != label
        cells = [escape(label) if new else "", *table_row(evals, *what)]
        lines.append(
            tag("tr", *(tag("td", text) for text in cells), class_="first" if new else "more")
        )
    return tag("table", *lines)


def tables(evals: dict) -> str:
    scores = list(evals.values())[-1][0]["results"]
    whole = [
        (label, p, key, "all")
        for key, label in ROWS.items()
        for p in scores
        if scores[p]["all"][key]
    ]
    whole += [
        ("accuracy, no depth", p, "accuracy", "no depth") for p in scores if "no depth" in scores[p]
    ]
    names = sorted({task for tasks in scores.values() for task in tasks} - {"all", "no depth"})
    tasks = [(task, p, "accuracy", task) for task in names for p in scores if task in scores[p]]
    return table("all questions", whole, evals) + table("accuracy by task", tasks, evals)


def percent(number: dict, sign: str = "") -> str:
    return cell({key: value and 100 * value for key, value in number.items()}, 1, sign)


def headline(evals: dict, sampled: dict) -> str:
    """The sentences that a reader takes away."""
    if not evals:
        return "Not evaluated yet: eval.py --out RUN/eval-sft, or RUN/eval-rl, fills in the scores."
    column, (summary, _) = list(evals.items())[-1]
    scores = {path: tasks["all"] for path, tasks in summary["results"].items()}
    said = [
        f"{LABELS[path]} scores {percent(score['accuracy'])} %" for path, score in scores.items()
    ]
    last = list(scores.values())[-1]
    text = f"{column[0].upper() + column[1:]}, {' and '.join(said)} on {last['n']:,} questions"
    text += f"; the best constant answers score {100 * last['chance']['value']:.1f} %."
    for runs, metric, it in (
        (evals, "accuracy", "that"),
        (sampled, "total", "the reward at temperature 1"),
    ):
        gains = {path: change(runs, path, metric) for path in scores}
        said = [f"{percent(gain, '+')} ({LABELS[path]})" for path, gain in gains.items() if gain]
        text += f" RL moved {it} by {' and '.join(said)} points." if said else ""
    error = last["text_errors"]
    return text + (f" The centres it writes are {cell(error, 2)} m off (median)." if error else "")


# ---- Curves
def ticks(low: float, high: float, most: int = 4) -> list[float]:
    """Round numbers from low to high."""
    power = 10 ** math.floor(math.log10((high - low) / most))
    step = next(power * m for m in (1, 2, 5, 10) if (high - low) / (power * m) <= most)
    return [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def smooth(values: np.ndarray) -> np.ndarray:
    """Mean over a window of a fifteenth of the run, cut at its ends."""
    window = np.ones(2 * (len(values) // 30) + 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


def brief(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def chart(title: str, curves: dict[str, np.ndarray]) -> str:
    """curves: path -> (2, n) steps and values; faint as logged, strong smoothed, last one by the
    title."""
    means = {path: smooth(values) for path, (_, values) in curves.items()}
    bounds = np.concatenate(
        [np.quantile(v, (0.02, 0.98)) for _, v in curves.values()] + list(means.values())
    )
    low, high = bounds.min(), bounds.max()  # spikes are cut, so that they don't flatten the rest
    end = max(steps.max() for steps, _ in curves.values())
    # a constant needs some room
    margin = 0 if high - low > 1e-3 * abs(high) else 0.05 * (abs(high) or 1)
    low, high = low - margin, high + margin
    right = lambda step: 44 + 250 * step / end  # noqa: E731
    up = lambda value: 124 - 92 * (np.clip(value, low, high) - low) / (high - low)  # noqa: E731
    last = (
        tag("tspan", f"{LABELS[path]} {brief(mean[-1])} ", class_=path)
        for path, mean in means.items()
    )
    parts = [
        word(escape(title), 4, 14, class_="title"),
        word("".join(last), 298, 14, class_="last"),
    ]
    for value in ticks(low, high):
        parts += [
            line(44, up(value), 294, up(value), "grid"),
            word(brief(value), 39, up(value) + 3.5, "end"),
        ]
    parts += [word(brief(step), right(step), 139, "middle") for step in ticks(0, end)]
    for path, (steps, values) in curves.items():
        for ys, class_ in ((values, path + " faint"), (means[path], path)):
            points = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(right(steps), up(ys), strict=True))
            parts.append(tag("polyline", points=points, class_=class_))
    return tag("svg", *parts, viewBox="0 0 306 146", class_="chart")


def charts(rows: list[dict]) -> str:
    """The panels that these rows of metrics.jsonl have values for, by path where they are logged by
    path."""
    panels = []
    for key, title in PANELS.items():
        found = {}
        for path, name in (("lor", f"lor_{key}"), ("dtr", f"dtr_{key}"), ("one", key)):
            pairs = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
            if len(pairs) > 1 and not (path == "one" and found):
                found[path] = np.array(pairs, dtype=float).T
        panels += [chart(title, found)] if found else []
    return tag("div", *panels, class_="charts")


# ---- Gallery
def project(centre, camera) -> tuple[float, float] | None:
    """Pixel (u, v) of a camera-frame point; None behind the camera."""
    (x, y, z), (fx, fy, cx, cy) = centre, camera
    return (fx * x / z + cx, fy * y / z + cy) if z > 0.01 else None


def glyph(kind: str, x: float, y: float, r: float, colour: str) -> str:
    """A ring for the truth, a cross for the text's centre, a diamond for the 3D head's, on a white
    halo."""
    d = {
        "truth": f"m{-r} 0a{r} {r} 0 1 0 {2 * r} 0a{r} {r} 0 1 0 {-2 * r} 0z",
        "text": f"m{-r} {-r}l{2 * r} {2 * r}m{-2 * r} 0l{2 * r} {-2 * r}",
        "head": f"m0 {-r}l{r} {r} {-r} {r} {-r} {-r}z",
    }[kind]
    return "".join(
        tag("path", d=f"M{x:.3f} {y:.3f}{d}", fill="none", stroke=stroke, stroke_width=r * width)
        for stroke, width in (("#fff", 0.75), (colour, 0.4))
    )


def colour_of(mention: str | None) -> str:
    return COLOURS.get((mention or "").split(" ")[0].lower(), "#8e4ec6")


def points_of(example: Example, row: dict, view: int) -> list[tuple[str, str, tuple]]:
    """(kind, colour, centre) of all that is, or is said to be, in the camera frame of a view."""
    found = [("truth", mention, centre) for mention, centre in true_centres(example, view).items()]
    if not several_views(example) or row["parsed"]["frame"] == view:
        found += [("text", mention, centre) for mention, _, centre in row["parsed"]["boxes"]]
    heads = zip(row["region_mentions"], example.regions, row["head_centres"], strict=True)
    found += [("head", mention, centre) for mention, (index, _), centre in heads if index == view]
    return [(kind, colour_of(mention), centre) for kind, mention, centre in found]


def inlined(image: Image.Image, kind: str, x: float, y: float, width: float, height: float) -> str:
    """At this place of an SVG."""
    buffer = io.BytesIO()
    image.save(buffer, kind, quality=88)
    uri = f"data:image/{kind.lower()};base64," + base64.b64encode(buffer.getvalue()).decode()
    return tag(
        "image", href=uri, x=f"{x:.3f}", y=f"{y:.3f}", width=f"{width:.3f}", height=f"{height:.3f}"
    )


def picture(image: Image.Image, example: Example, points: list, view: int) -> str:
    """The image with its regions outlined and every point projected onto it."""
    width, height = image.size
    small = image.resize((640, 640 * height // width)) if width > 640 else image
    parts = [inlined(small, "JPEG", 0, 0, width, height)]
    for region in (np.asarray(region) for index, region in example.regions if index == view):
        # a mask or a box
        y, x = np.nonzero(region) if region.ndim == 2 else (region[1::2], region[::2])
        parts += [
            tag("rect", x=x.min(), y=y.min(), width=np.ptp(x), height=np.ptp(y), class_="region")
        ]
    camera = example.intrinsics[view] if example.intrinsics else None
    for kind, colour, centre in points if camera else []:
        at = project(centre, camera)
        parts += [glyph(kind, *at, width / 64, colour)] if at else []
    return tag("svg", *parts, viewBox=f"0 0 {width} {height}", class_="picture")


def from_above(image: Image.Image, depth: np.ndarray, camera, size: float = 0.05) -> str:
    """What the depth map shows below the camera, seen from above; `size` metres a pixel."""
    fx, fy, cx, cy = camera
    v, u = np.indices(depth.shape)
    depth = np.where(np.isfinite(depth), depth, 0)
    kept = (depth > 0) & ((v - cy) * depth > -0.2 * fy)  # a ceiling would hide the room
    if not kept.any():
        return ""
    order = np.argsort(-((v - cy) * depth)[kept])  # the floor first: what stands on it covers it
    z, u = depth[kept][order], u[kept][order]
    x = (u - cx) * z / fx
    columns, rows = ((x - x.min()) / size).astype(int), ((z.max() - z) / size).astype(int)
    raster = np.zeros((rows.max() + 1, columns.max() + 1, 4), np.uint8)
    raster[rows, columns] = np.asarray(image.convert("RGBA"))[kept][order] * [1, 1, 1, 0.6]
    height, width, _ = raster.shape
    return inlined(Image.fromarray(raster), "PNG", x.min(), -z.max(), size * width, size * height)


def top_view(image: Image.Image, example: Example, points: list, view: int) -> str:
    """x to the right, z up, a line a metre, the camera's field of view, the same glyphs as on the
    image."""
    camera = example.intrinsics[view] if example.intrinsics else None
    if camera is None:
        return ""
    depth, parts = example.depths[view] if example.depths else None, []
    far = max([3.0] + [centre[2] for kind, _, centre in points if kind == "truth"])
    if depth is not None:
        depth = (
            np.asarray(Image.open(depth)) / 1000
            if isinstance(depth, str | Path)
            else np.asarray(depth)
        )
        known = depth[(depth > 0) & (depth < np.inf)]
        parts = [from_above(image, depth, camera)]
        far = max(far, np.quantile(known, 0.98)) if len(known) else far
    far += 0.3
    left, right = (far * (side - camera[2]) / camera[0] for side in (0, image.width))
    for z in range(1, int(far) + 1):
        parts += [line(left, -z, right, -z, "grid metre")]
        parts += [word(f"{z} m", left + 0.06, -z - 0.07, class_="metres")]
    parts += [line(0, 0, side, -far, "cone") for side in (left, right)]
    parts += [glyph(kind, x, -z, 0.12, colour) for kind, colour, (x, _, z) in points]
    frame = f"{left:.2f} {-far:.2f} {right - left:.2f} {far + 0.1:.2f}"
    return tag("svg", *parts, viewBox=frame, class_="top")


def coloured(text: str) -> str:
    """Sections on their colours. Escaped first: nothing that a model wrote is markup."""
    block = re.compile(r"&lt;(detect|think|answer)&gt;(.*?)&lt;/\1&gt;\s*", re.S)
    return block.sub(r'<span class="\1"><u>\1</u>\2</span>', escape(text))


def answer(name: str, row: dict | None) -> str:
    if row is None:
        return tag("div", class_="cell")
    chips = []
    for part in ("accuracy", "format", "detect", "total"):
        value = row[part]
        grade = "fair" if value is None or 0.2 <= value < 0.8 else "good" if value >= 0.8 else "bad"
        chips += (
            [tag("span", f"{part} {value:.2f}", class_=f"chip {grade}")]
            if value is not None
            else []
        )
    title = f"{LABELS[row['path']]} {name}" + ", cut" * row["truncated"]
    title = tag("h4", title, class_=row["path"])
    return tag("div", title, *chips, tag("pre", coloured(row["text"])), class_="cell")


def card(example: Example, rows: dict[tuple[str, str], dict]) -> str:
    """rows: (column, path) -> an answer. Points are the last model's, of its DTR answer if it has
    one."""
    last = sorted(rows.items(), key=lambda item: item[0][1] == "dtr")[-1][1]
    images = [
        (Image.open(i) if isinstance(i, str | Path) else i).convert("RGB") for i in example.images
    ]
    points = [points_of(example, last, view) for view in range(len(images))]
    frame = last["parsed"]["frame"] if several_views(example) else 0
    frame = frame if frame in range(len(images)) else example.frame or 0
    seen = [picture(image, example, points[view], view) for view, image in enumerate(images)]
    names, paths = (list(dict.fromkeys(key[i] for key in rows)) for i in (0, 1))
    mark = lambda m: f'{m[1]} <mark style="color:{colour_of(m[1])}">▣</mark>'  # noqa: E731
    question = re.sub(r"(\w+ \w+) ?&lt;mask&gt;", mark, escape(example.question))
    answers = [answer(name, rows.get((name, path))) for name in names for path in paths]
    return tag(
        "article",
        tag("div", *seen, top_view(images[frame], example, points[frame], frame)),
        tag(
            "div",
            tag("h3", escape(example.task), tag("span", f"truth: {escape(example.answer)}")),
            tag("pre", question, class_="question"),
            tag("div", *answers, class_=f"of{len(paths)}"),
        ),
    )


def outcome(rows: dict[tuple[str, str], dict]) -> str:
    scores = {key: row["accuracy"] for key, row in rows.items()}
    last = list(rows)[-1][0]
    if any(abs(scores[a] - scores[b]) >= 0.5 for a in rows for b in rows if a[1] == b[1]):
        return "changed"
    return (
        "right" if all(score >= 0.5 for key, score in scores.items() if key[0] == last) else "wrong"
    )


def choose(questions: dict[str, dict], count: int) -> list[str]:
    """The tasks in turn, the outcomes in turn, ties by hash."""
    left = sorted(questions, key=lambda name: hashlib.sha1(name.encode()).digest())
    kinds = {
        name: (next(iter(rows.values()))["task"], outcome(rows)) for name, rows in questions.items()
    }
    tasks, chosen = sorted({task for task, _ in kinds.values()}), []
    for i in range(min(count, len(left))):
        turn, place = divmod(i, len(tasks))
        wanted = tasks[place], ("right", "changed", "wrong")[(turn + place) % 3]
        chosen.append(min(left, key=lambda name: [kinds[name][k] != wanted[k] for k in (0, 1)]))  # noqa: B023
        left.remove(chosen[-1])
    return chosen


def gallery(evals: dict, count: int) -> str:
    config = list(evals.values())[-1][0]["config"]
    examples: dict[str, Example] = {}
    # BadRows is one; data may move or change after an evaluation
    with suppress(OSError, ValueError):
        for example in (
            () if config["benchmark"] else datasets.load(config["data"], skip_bad_rows=True)
        ):
            examples.setdefault(question_id(example), example)
    if not examples:
        return tag("p", "No gallery: it needs the data of eval's --data at the same place.")
    questions: dict[str, dict] = {}
    for name, (_, rows) in evals.items():
        for row in rows if name != "blind" or len(evals) == 1 else []:
            if row["question_id"] in examples:
                questions.setdefault(row["question_id"], {})[name, row["path"]] = row
    return "".join(card(examples[name], questions[name]) for name in choose(questions, count))


# ---- The page
CSS = """
:root{color-scheme:light dark;--page:#fbfbf9;--card:#fff;--ink:#1d2126;--soft:#69727d;--rule:#dfe2e5;
--lor:#c05a00;--dtr:#1f6feb;--one:#5a6570;--detect:#ece7fb;--think:#f1f2f3;--answer:#dff3e4;--good:#d9f2e0;
--bad:#fbe1df}@media(prefers-color-scheme:dark){:root{--page:#14171a;--card:#1c2024;--ink:#e6e9ec;
--soft:#98a2ad;--rule:#363d44;--lor:#f0954a;--dtr:#6ea8ff;--one:#a3adb8;--detect:#352d52;--think:#272c31;
--answer:#1d3b28;--good:#1f4a2f;--bad:#54292a}}*{box-sizing:border-box}body{margin:0 auto;max-width:1240px;
padding:36px 24px 80px;background:var(--page);color:var(--ink)}body,.question{font:15px/1.5 system-ui,
sans-serif}h1{font-size:26px;margin:0}h2{font-size:19px;margin:44px 0 12px}h3{font-size:16px;margin:0 0 6px}
h4{font-size:13px;margin:0 0 4px}.lead,.note{max-width:960px;margin:10px 0 12px}.lead{font-size:19px;
line-height:1.45}.note,small,th,h3 span,pre u{color:var(--soft)}small{font-size:.85em}.lor{color:var(--lor);
stroke:var(--lor)}.dtr{color:var(--dtr);stroke:var(--dtr)}.one,.direct{color:var(--one);stroke:var(--one)}
table{width:100%;table-layout:fixed;border-collapse:collapse;margin:0 0 26px;font-size:14px;
text-align:right}td,th{padding:3px 10px;white-space:nowrap;font-variant-numeric:tabular-nums}
th{font-weight:600}th:first-child,td:first-child{text-align:left;padding-left:0;width:200px}
th:nth-child(2){width:64px}th:nth-child(3){width:70px}th:nth-child(4){width:80px}th:last-child,
td:last-child{width:250px;padding-right:0}tr.first td{border-top:1px solid var(--rule)}i{font-style:normal;
font-weight:600}td svg,th svg{margin-left:auto}svg{display:block}svg text{font-size:10px;fill:var(--soft);
stroke:none}.grid{stroke:var(--rule)}.chance{stroke:var(--soft);stroke-width:2}circle{fill:var(--card);
stroke-width:1.5}circle.full{fill:currentColor}.charts{display:grid;grid-template-columns:repeat(auto-fill,
minmax(285px,1fr));gap:14px}.chart,article{background:var(--card);border:1px solid var(--rule);
border-radius:9px}.chart{width:100%;padding:4px}.chart polyline{fill:none;stroke-width:1.8}
.chart .faint{stroke-width:1;opacity:.3}.chart .grid{stroke-width:1}
svg .title{font-size:11px;fill:var(--ink);font-weight:600}
svg .last{font-size:10.5px;text-anchor:end}svg .last tspan{fill:currentColor;stroke:none;font-weight:600}
article{display:grid;grid-template-columns:360px minmax(0,1fr);gap:22px;padding:18px;margin:0 0 18px}
h3 span{float:right;font-weight:400}.picture,.top{width:100%;border-radius:6px;margin:0 0 8px}
.top{background:var(--think);max-height:330px}.metre{stroke-width:.012}svg .metres{font-size:.19px}
.region{fill:none;stroke:#fff;stroke-width:.8;stroke-dasharray:3 2;vector-effect:non-scaling-stroke}
.cone{fill:none;stroke:var(--soft);stroke-width:.03}mark{background:none}pre{white-space:pre-wrap;
overflow-wrap:anywhere;margin:0;font:12.5px/1.5 ui-monospace,Menlo,monospace}pre.question{margin:0 0 12px}
.of1,.of2{display:grid;gap:12px}.of2{grid-template-columns:1fr 1fr}.cell{border-top:2px solid var(--rule);
padding-top:8px;min-width:0}.chip{display:inline-block;background:var(--think)}.chip{font-size:11.5px;
padding:0 7px;margin:0 4px 6px 0;border-radius:9px}.chip.good{background:var(--good)}
.chip.bad{background:var(--bad)}pre span{display:block;padding:3px 8px;border-radius:5px;margin:0 0 3px}
pre u{float:right;font-size:10px;text-decoration:none;margin-left:8px}.detect{background:var(--detect)}
.think{background:var(--think)}.answer{background:var(--answer)}@media(max-width:900px){article,
.of2{grid-template-columns:minmax(0,1fr)}table{display:block;overflow-x:auto}}
"""
RESULTS = """Mean ± one standard error (of centres the median and its error); questions of one image count as
one cluster. Chance is the best constant answer to each task. Bold: a paired difference beyond two standard
errors. On the line: │ chance, ○ after SFT, ● the last evaluation."""
GALLERY = """○ the true centre, × the one that the answer says, ◇ the 3D head's, in the colour of the object's
mark. Below the image the same from above, over what the depth map shows."""


def read_lines(path: Path) -> list[dict]:
    """Rows of a JSON-lines file, none if it is not there; without a last line that is still being
    written."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(row) for row in text[: text.rfind("\n") + 1].splitlines()]


def read_evals(run: Path, folders: dict[str, str]) -> dict:
    """column -> (summary, predictions) of the evaluations that have finished."""
    found = {name: run / folder for folder, name in folders.items()}
    return {
        name: (
            json.loads((done / "summary.json").read_text()),
            read_lines(done / "predictions.jsonl"),
        )
        for name, done in found.items()
        if (done / "summary.json").exists()
    }


def page(run: Path, questions: int) -> str:
    evals, sampled = read_evals(run, EVALS), read_evals(run, SAMPLED)
    title = escape(run.resolve().name)
    parts = [tag("h1", title), tag("p", headline(evals, sampled), class_="lead")]
    parts += (
        [tag("h2", "Results"), tag("p", RESULTS, class_="note"), tables(evals)] if evals else []
    )
    for folder, name in LOGS.items():
        rows = read_lines(run / folder / "metrics.jsonl")
        parts += [tag("h2", f"{name}, {rows[-1]['step']:,} steps"), charts(rows)] if rows else []
    if evals:
        parts += [
            tag("h2", "Test questions"),
            tag("p", GALLERY, class_="note"),
            gallery(evals, questions),
        ]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">' + tag(
        "title", title
    )
    head = tag("head", head, tag("style", CSS))
    return "<!doctype html>" + tag("html", head, tag("body", *parts), lang="en")


def main(config: Config) -> None:
    if not Path(config.run).is_dir():
        sys.exit(f"report.py: {config.run}: no such directory")
    out = Path(config.run) / "report.html"
    text = page(Path(config.run), config.questions)
    out.write_text(text)
    print(re.sub("<[^>]+>", "", re.search('class="lead">(.*?)</p>', text)[1]))
    print(f"{out} ({out.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
