"""Tables of one or several evaluations, each compared with the first question by question."""

from dataclasses import dataclass

import numpy as np

from eval_table import estimate, paired_by_question, points
from reporting.runs import Comparison, Evaluation

# Metrics whose bare name would not do.
LABELS = {
    "text_errors": "centre in the text, m",
    "head_errors": "centre of the 3D head, m",
    "size_errors": "size in the text, m",
    "tokens": "length, tokens",
    "official": "official scorer",
    "robust": "robust scorer",
}
# What the best constant answer scores, by the metric that it is compared with.
CHANCE = {
    "accuracy": "chance",
    "text_errors": "chance_errors",
    "head_errors": "chance_errors",
}
# Marks of a benchmark's two scorers, which stand in the rows in per cent.
SCORERS = ("official", "robust")


@dataclass(frozen=True)
class Scale:
    """A linear map from [low, high] to pixels [first, last]; values outside are clipped."""

    low: float
    high: float
    first: float
    last: float

    def __call__(self, value):
        # A value on the border shows that there is something outside; one off the chart does not.
        share = (np.clip(value, self.low, self.high) - self.low) / (self.high - self.low)
        return self.first + (self.last - self.first) * share


# Per cent, on the pixels of a table's last column.
PERCENT = Scale(0, 100, 8, 178)


@dataclass
class Cell:
    """What one evaluation measured; empty where it has no such path, task or metric."""

    estimate: dict | None
    difference: dict | None  # from the first evaluation, on the same questions
    is_share: bool

    @property
    def verdict(self) -> str:
        """Return up or down where the difference is beyond two standard errors, else ""."""
        change = self.difference
        # Of lengths neither more nor less is better.
        if not (self.is_share and change and change["se"]):
            return ""
        # About 95 %, of one comparison alone. A table has dozens, so that a few verdicts in it are
        # chance: nothing is corrected for that.
        if abs(change["value"]) <= 2 * change["se"]:
            return ""
        return "up" if change["value"] > 0 else "down"


@dataclass
class TableRow:
    metric: str
    label: str
    path: str
    count: int
    digits: int
    chance: dict | None
    cells: list[Cell]
    is_share: bool  # in per cent, so that more is better
    dots: list[dict]  # what is drawn on an axis from 0 to 100: what models that saw images scored


@dataclass
class Table:
    heading: str
    columns: list[str]
    rows: list[TableRow]
    is_of_metrics: bool  # a row a metric; else a row a task


# ---- Differences


def difference(
    comparison: Comparison,
    evaluation: Evaluation,
    path: str,
    metric: str = "accuracy",
    task: str = "all",
) -> dict | None:
    """Estimate an evaluation minus the first on a path; None of the first, and without pairs.

    Where the first has no such path, its own is taken: what a base model answers without reasoning
    is compared with each of the trained model's paths.
    """
    first = comparison.evals[0]
    if evaluation is first or task == "no depth":
        return None
    before = having(metric, first.of_path(path_of_first(comparison, path), task))
    after = having(metric, evaluation.of_path(path, task))
    # Paired, as much of the variance is the questions' own: two scores whose errors overlap may
    # still differ beyond doubt.
    return paired_by_question(before, after, metric)


def having(metric: str, rows: list[dict]) -> list[dict]:
    """Return the rows with a number for a metric."""
    # Only a benchmark's rows have its scorers' marks.
    return [row for row in rows if row.get(metric) is not None]


def path_of_first(comparison: Comparison, path: str) -> str:
    own = comparison.evals[0].results
    # A base model is asked on path direct, as it never learnt the sections of the others.
    return path if path in own else next(iter(own))


def scaled(number: dict | None, factor: float) -> dict | None:
    """Return an estimate in another unit."""
    if number is None:
        return None
    error = number["se"]
    return number | {
        "value": factor * number["value"],
        "se": None if error is None else factor * error,
    }


def written(number: dict, digits: int = 1) -> str:
    text = f"{number['value']:.{digits}f}"
    if number["se"] is None:
        return text
    return f"{text} ± {number['se']:.{digits}f}"


def difference_lines(comparison: Comparison) -> list[str]:
    """Write what each evaluation scores minus the first, in points, a line for each path."""
    if len(comparison.evals) < 2:
        return []
    first = comparison.evals[0]
    lines = [
        f"{comparison.title}: points of accuracy and of the whole reward minus {first.name}, "
        "on the same questions ± one standard error"
    ]
    width = max(len(evaluation.name) for evaluation in comparison.evals)
    for evaluation in comparison.evals[1:]:
        for path in evaluation.results:
            lines.append(
                f"  {evaluation.name:{width}}  {changes_in_words(comparison, evaluation, path)}"
            )
    return lines


def changes_in_words(comparison: Comparison, evaluation: Evaluation, path: str) -> str:
    accuracy = difference(comparison, evaluation, path)
    if accuracy is None:
        return f"{path.upper()}: no question in common"
    reward = difference(comparison, evaluation, path, "total")
    against = path_of_first(comparison, path)
    name = path.upper() if against == path else f"{path.upper()} - {against.upper()}"
    text = f"{name} {points(accuracy)}   reward {points(reward)}"
    return f"{text}   ({accuracy['n']:,} questions)"


# ---- Rows


def measured(evaluation: Evaluation, path: str, metric: str, task: str) -> dict | None:
    """Return what an evaluation measured, in its own unit; None where it did not."""
    if metric in SCORERS:
        rows = having(metric, evaluation.of_path(path, task))
        marks = [row[metric] / 100 for row in rows]
        return estimate(marks, [row["cluster"] for row in rows])
    # An evaluation may lack a path (--path lor) or a task (--limit).
    return evaluation.results.get(path, {}).get(task, {}).get(metric)


def table_row(
    comparison: Comparison, path: str, metric: str, task: str, label: str
) -> TableRow | None:
    """Collect one metric of one path over all evaluations; None where none has it."""
    # In metres, of each object; all else is a mean over answers.
    is_error = metric.endswith("errors")
    is_share = not is_error and metric != "tokens"  # neither metres nor lengths lie in [0, 1]
    unit = 100 if is_share else 1
    cells = []
    dots = []
    chance = None
    count = 0
    for evaluation in comparison.evals:
        number = measured(evaluation, path, metric, task)
        change = None
        if number:
            # A blind or sampled evaluation may have asked some of the questions only.
            count = max(count, number["n"])
            if metric in CHANCE:
                chance = measured(evaluation, path, CHANCE[metric], task) or chance
        if number and not is_error:  # a median over objects has no pairs
            change = difference(comparison, evaluation, path, metric, task)
            # Its marks are in per cent already.
            change = scaled(change, 1 if metric in SCORERS else unit)
        number = scaled(number, unit)
        cells.append(Cell(number, change, is_share))
        # A blind model's score is a floor that stands in the table alone.
        if number and is_share and evaluation in comparison.sighted:
            dots.append(number)
    if not count:
        return None
    if chance:
        # Not an estimate that anything is tested against.
        chance = scaled(chance, unit) | {"se": None}
    # Tenths of a per cent and of a token; millimetres.
    digits = 1 if is_share or metric == "tokens" else 3
    return TableRow(metric, label, path, count, digits, chance, cells, is_share, dots)


def metrics_of(comparison: Comparison) -> list[str]:
    """Return the names of all metrics but chance, in the order in which eval.py wrote them."""
    names = {}
    for evaluation in comparison.evals:
        # "all" has every metric that any of the tasks has.
        for tasks in evaluation.results.values():
            for name, number in tasks["all"].items():
                if isinstance(number, dict) and not name.startswith("chance"):
                    names[name] = None
    if any("benchmark" in evaluation.summary for evaluation in comparison.evals):
        names |= dict.fromkeys(SCORERS)
    return list(names)


def tables(comparison: Comparison) -> list[Table]:
    """Build the tables of a comparison: every metric, then accuracy by task, then a benchmark's."""
    columns = [evaluation.name for evaluation in comparison.evals]
    overall = []
    for metric in metrics_of(comparison):
        # A reward that a fork adds needs no label of its own.
        label = LABELS.get(metric, metric.replace("_", " "))
        overall += [table_row(comparison, path, metric, "all", label) for path in comparison.paths]
    for path in comparison.paths:
        overall.append(table_row(comparison, path, "accuracy", "no depth", "accuracy, no depth"))

    by_task = []
    for task in tasks_of(comparison):
        by_task += [table_row(comparison, p, "accuracy", task, task) for p in comparison.paths]
    found = []
    for heading, rows in (("all questions", overall), ("accuracy by task", by_task)):
        # A metric that no evaluation has on this path would be a row of dashes.
        rows = [row for row in rows if row]
        if rows:
            found.append(Table(heading, columns, rows, rows[0] is overall[0]))
    return found


def tasks_of(comparison: Comparison) -> list[str]:
    names = set()
    for evaluation in comparison.evals:
        for tasks in evaluation.results.values():
            names |= set(tasks)
    return sorted(names - {"all", "no depth"})


# ---- A benchmark's own table


@dataclass
class Breakdown:
    """A published breakdown of a benchmark: a line of its table."""

    name: str
    path: str
    marks: list[dict | None]  # by evaluation: estimate by the official scorer, and `robust`
    published: list[float | None]  # by model of others


def breakdowns(comparison: Comparison) -> tuple[list[str], list[Breakdown]]:
    """Return whose figures stand beside a benchmark's, and its lines; both empty of a data set."""
    others: dict[str, dict] = {}
    for evaluation in comparison.evals:
        # eval.py leaves them out where a part of the set was asked.
        for one in evaluation.summary.get("published", []):
            others[f"{one['model']} ({one['source']})"] = one["figures"]
    lines = []
    for path in comparison.paths:
        keys = {}
        for evaluation in comparison.evals:
            keys |= dict.fromkeys(marks_of(evaluation, path, "official"))
        # A dict as an ordered set: the order is that of the published table.
        for key in keys:
            marks = [mark_of(evaluation, path, key) for evaluation in comparison.evals]
            published = [figures.get(key) for figures in others.values()]
            lines.append(Breakdown(key, path, marks, published))
    return list(others), lines


def marks_of(evaluation: Evaluation, path: str, scorer: str) -> dict[str, float]:
    return evaluation.summary.get("benchmark", {}).get(path, {}).get(scorer, {})


def mark_of(evaluation: Evaluation, path: str, key: str) -> dict | None:
    official = marks_of(evaluation, path, "official")
    if key not in official:
        return None
    errors = evaluation.summary.get("standard_errors", {}).get(path, {}).get("official", {})
    robust = marks_of(evaluation, path, "robust").get(key)
    return {"value": official[key], "se": errors.get(key), "robust": robust}


# ---- What a reader takes away


def headline(found: list[Comparison]) -> list[str]:
    """Write the sentences that stand at the top of the page."""
    if not found:
        return ["Not evaluated yet: eval.py fills in the scores."]
    sentences = [scores_in_words(found[0])]
    for comparison in found:
        sentences += gains_in_words(comparison)
    return sentences


def scores_in_words(comparison: Comparison) -> str:
    """Say what the last model that saw the images scores, and what chance does."""
    # In the order of NAMES it was trained longest; in that of --eval it is the user's choice.
    last = comparison.sighted[-1]
    overall = {path: tasks["all"] for path, tasks in last.results.items()}
    scores = []
    for path, result in overall.items():
        scores.append(f"{path.upper()} scores {written(scaled(result['accuracy'], 100))} %")
    # Chance and the question count are about the same on all paths: the last stands for them.
    result = list(overall.values())[-1]
    chance = 100 * result["chance"]["value"]
    # Not capitalize(): it would write "After rl".
    name = last.name[:1].upper() + last.name[1:]
    text = f"{name}, {' and '.join(scores)} on {result['n']:,} questions of {comparison.title}; "
    text += f"the best constant answers score {chance:.1f} %."
    if result["text_errors"]:
        text += (
            f" The centres that it writes are {written(result['text_errors'], 2)} m off (median)."
        )
    return text


def gains_in_words(comparison: Comparison) -> list[str]:
    """Say by how much each evaluation differs from the first, which saw the images as well."""
    sentences = []
    first = comparison.evals[0]
    # `difference` is None of the first itself, which so drops out.
    for evaluation in comparison.sighted:
        changes = []
        for path in evaluation.results:
            number = difference(comparison, evaluation, path, headline_metric(comparison))
            if number:
                changes.append(f"{points(number)} ({path.upper()})")
        if changes:
            what = "reward" if headline_metric(comparison) == "total" else "accuracy"
            sentences.append(
                f"{comparison.title}: {evaluation.name} against {first.name} "
                f"{' and '.join(changes)} points of {what}."
            )
    return sentences


def headline_metric(comparison: Comparison) -> str:
    """Return what RL maximises where answers were sampled, else the accuracy."""
    return "total" if comparison.evals[0].config.get("temperature") else "accuracy"
