"""The curves of everything that runs have logged: a chart a metric, of one run or of several."""

import math
from dataclasses import dataclass

import numpy as np

from reporting.explained import COLUMN
from reporting.runs import Run
from reporting.tables import Scale
from srreal import PATHS

# Heading of the curves, by the script that wrote them.
HEADINGS = {"train_sft": "Supervised fine-tuning", "train_rl": "Reinforcement learning"}
# What a step costs, in contrast to how it learns.
COSTS = ("seconds", "per_second", "mib", "tokens", "discarded")
# Points of a curve at most: a chart is 250 pixels wide.
POINTS = 400

# Name of a curve -> steps and values (2, n).
Series = dict[str, np.ndarray]


@dataclass
class Curve:
    name: str  # a path, a run, or "" for all paths together
    colour: str  # a class of style.css
    raw: str  # an SVG polyline's points, as logged
    smoothed: str
    last: str  # the last value of the smoothed curve


@dataclass
class Chart:
    title: str
    metric: str  # to be explained
    curves: list[Curve]
    x_ticks: list[tuple[float, str]]  # (pixel, label)
    y_ticks: list[tuple[float, str]]


@dataclass
class Section:
    """The curves of one script's runs."""

    heading: str
    runs: list[tuple[str, str]]  # (name, colour) of each, where there are several
    learning: list[Chart]
    costs: list[Chart]


# ---- Numbers


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
    """Return the points of an SVG polyline, thinned to POINTS at most; the last one stays."""
    # Every k-th point, no mean: the raw curve is there to show its spikes.
    stride = math.ceil(len(xs) / POINTS)
    kept = range((len(xs) - 1) % stride, len(xs), stride)
    return " ".join(f"{xs[i]:.1f},{ys[i]:.1f}" for i in kept)


# ---- Charts


def chart(title: str, metric: str, series: Series, colours: dict[str, str]) -> Chart:
    """Draw the curves of one metric on one pair of axes."""
    means = {name: smooth(values) for name, (_, values) in series.items()}
    low, high = limits(series, means)
    # Pixels of the chart's viewBox in curves.html; y grows downwards.
    first_step = min(steps.min() for steps, _ in series.values())
    last_step = max(steps.max() for steps, _ in series.values())
    # From 0, unless a log begins so late that a quarter of the chart would be empty.
    first_step = 0 if first_step < last_step / 4 else first_step
    x = Scale(first_step, last_step, 44, 294)
    y = Scale(low, high, 104, 10)
    curves = []
    for name, (steps, values) in series.items():
        mean = means[name]
        raw = polyline(x(steps), y(values))
        smoothed = polyline(x(steps), y(mean))
        curves.append(Curve(name, colours[name], raw, smoothed, brief(mean[-1])))
    x_ticks = [(x(step), brief(step)) for step in ticks(first_step, last_step)]
    y_ticks = [(y(value), brief(value)) for value in ticks(low, high)]
    return Chart(title, metric, curves, x_ticks, y_ticks)


def limits(series: Series, means: dict[str, np.ndarray]) -> tuple[float, float]:
    """Return the ends of the vertical axis."""
    # Spikes are cut off, so that they don't flatten the rest.
    # The raw values but for their tails, and every smoothed curve in full.
    quantiles = [np.quantile(values, (0.02, 0.98)) for _, values in series.values()]
    bounds = np.concatenate([*quantiles, *means.values()])
    low = bounds.min()
    high = bounds.max()
    if high - low <= 1e-3 * abs(high):  # a constant needs some room
        # A constant 0 has no scale of its own: any will do.
        margin = 0.05 * abs(high) or 1
        low -= margin
        high += margin
    return low, high


def logged_series(rows: list[dict]) -> dict[str, Series]:
    """Sort what a run logged: metric -> path -> steps and values (2, n).

    A metric that is logged by path loses the column of all paths together. Values that were not
    finite are null in the log, and are skipped; a single one makes no curve.
    """
    points = {}
    for row in rows:
        for column, value in row.items():
            if column == "step" or not isinstance(value, int | float):
                continue
            # val_lor_reward -> "val_", "lor", "reward": a validation gets a chart of its own.
            validation, path, measured = COLUMN.fullmatch(column).groups("")
            by_path = points.setdefault(validation + measured, {})
            by_path.setdefault(path, []).append((row["step"], value))

    series = {}
    for metric, by_path in points.items():
        curves = {}
        for path in (*PATHS, ""):
            pairs = by_path.get(path, [])
            # "" comes last in the loop, when it is known whether any path has a curve.
            if len(pairs) > 1 and not (path == "" and curves):
                curves[path] = np.array(pairs, dtype=float).T
        if curves:
            series[metric] = curves
    return series


def path_colours() -> dict[str, str]:
    return {path: f"colour-{i}" for i, path in enumerate(PATHS)} | {"": "colour-all"}


def charts_of_run(run: Run) -> list[Chart]:
    """Draw every column of metrics.jsonl, the paths of a metric on one pair of axes."""
    series = logged_series(run.rows)
    # The method's own quantities first: they are logged by path. The sort is stable, so within
    # either kind the order is that of the log.
    names = sorted(series, key=lambda name: "" in series[name])
    return [chart(name, name, series[name], path_colours()) for name in names]


def charts_of_runs(runs: list[Run]) -> list[Chart]:
    """Draw every column of several runs: a chart a metric and path, all runs on its axes."""
    # A run keeps its colour in all charts, so that the legend stands once, above them.
    colours = run_colours(runs)
    by_chart = {}
    for run in runs:
        for metric, by_path in logged_series(run.rows).items():
            for path, values in by_path.items():
                by_chart.setdefault((metric, path), {})[run.name] = values
    # As in charts_of_run: what is logged by path comes first.
    names = sorted(by_chart, key=lambda key: key[1] == "")
    found = []
    for metric, path in names:
        title = f"{metric} {path.upper()}" if path else metric
        found.append(chart(title, metric, by_chart[metric, path], colours))
    return found


def run_colours(runs: list[Run]) -> dict[str, str]:
    """Return the class of each run's curves: eight colours; a ninth run has the first one's."""
    return {run.name: f"colour-{i % 8}" for i, run in enumerate(runs)}


def sections(runs: list[Run]) -> list[Section]:
    """Draw the curves of all runs; those of one script share their charts."""
    by_script: dict[str, list[Run]] = {}
    for run in runs:
        by_script.setdefault(run.script, []).append(run)
    found = []
    for script, alike in by_script.items():
        heading = HEADINGS.get(script, script)
        names = []
        if len(alike) == 1:
            heading += f", {alike[0].steps:,} steps"
            drawn = charts_of_run(alike[0])
        else:
            names = list(run_colours(alike).items())
            drawn = charts_of_runs(alike)
        learning = [c for c in drawn if not c.metric.endswith(COSTS)]
        costs = [c for c in drawn if c.metric.endswith(COSTS)]
        found.append(Section(heading, names, learning, costs))
    return found


def charts_by_task(rows: list[dict], tasks: dict[str, str]) -> list[Chart]:
    """Draw the mean reward of what a run has kept in rollouts.jsonl: a chart a task, by path.

    tasks: id of a row -> its task; rows of an unknown one are left out.
    """
    rewards: dict[tuple, list] = {}
    for row in rows:
        task = tasks.get(row["id"])
        if task:
            rewards.setdefault((task, row["path"], row["step"]), []).append(row["total"])
    by_task: dict[str, dict[str, list]] = {}
    for (task, path, step), totals in sorted(rewards.items()):
        # Sorted by (task, path, step), so that each curve's points come in the order of time.
        points = by_task.setdefault(task, {}).setdefault(path, [])
        points.append((step, np.mean(totals)))
    found = []
    for task, by_path in by_task.items():
        series = {p: np.array(points).T for p, points in by_path.items() if len(points) > 1}
        if series:
            found.append(chart(task, "reward", series, path_colours()))
    return found
