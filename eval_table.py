"""Means, medians and paired differences with clustered standard errors; the table of eval.py.

`paired_by_question` compares two evals, or two paths of one; `points` writes it: +3.2 ± 1.1.

Also what eval.py and report.py both have to know of a question.
"""

import math

import numpy as np

from srreal import REWARDS, Example

# metric of a row of predictions.jsonl -> heading
COLUMNS = {
    "accuracy": "accuracy",
    "any_format": "any format",
    "chance": "chance",
    **{name: name for name in REWARDS if name != "accuracy"},
    "total": "total",
    "text_errors": "text m",
    "head_errors": "head m",
    "size_errors": "size m",
    "tokens": "tokens",
    "iou": "2D IoU",
    "iou50": "IoU>.5",
}
# Columns of questions about boxes; they are printed only where there are some.
BOXED = ("size_errors", "iou", "iou50")
COUNTS = ("unparsed", "truncated")


def question_id(example: Example) -> str:
    """Return the id without its path: what a question's LOR and DTR rows have in common."""
    return example.id.removesuffix(f"-{example.path}")


def true_centres(example: Example, view: int | None) -> dict[str, tuple]:
    """Return mention -> centre in the camera frame of that view, where it is known."""
    known = {}
    for mention, centre in example.objects.items():
        if isinstance(centre, dict):
            centre = centre.get(view)
        if centre is not None:
            known[mention.lower().strip()] = centre
    return known


def estimate(values, clusters, median: bool = False) -> dict | None:
    """Return the mean or median as `value`, its standard error `se`, and `n`; None for n = 0.

    values (n,): what is measured; clusters (n,): the names of the images. se is None where there is
    one cluster only.
    """
    if not len(values):
        return None
    values = np.asarray(values, dtype=float)
    k = len(set(clusters))
    if median:
        # Half the distance of the quantiles 1/2 ± 1/(2 sqrt(k)): two standard errors of a rank.
        value = np.median(values)
        half = 0.5 / math.sqrt(k)
        se = np.ptp(np.quantile(values, (0.5 - half, 0.5 + half))) / 2
    else:
        # The sandwich estimator of a mean: residuals are summed by cluster before they are squared.
        # With singletons it is the usual sd / sqrt(n).
        value = values.mean()
        _, cluster_index = np.unique(clusters, return_inverse=True)
        sums = np.bincount(cluster_index, values - value)
        se = math.sqrt((sums**2).sum() * k / max(k - 1, 1)) / len(values)
    return {"value": float(value), "se": float(se) if k > 1 else None, "n": len(values)}


def summarise(rows: list[dict]) -> dict:
    """Return metric -> estimate over rows of predictions.jsonl, or None; and the counts."""
    result = {"n": len(rows)}
    for name in COUNTS:
        result[name] = sum(row[name] for row in rows)
    # chance_errors has no column of its own: `chance` is that of accuracy.
    for metric in (*COLUMNS, "chance_errors"):
        values = []
        clusters = []
        for row in rows:
            measured = values_of(row, metric)
            values += measured
            clusters += [row["cluster"]] * len(measured)
        result[metric] = estimate(values, clusters, median=metric.endswith("errors"))
    return result


def values_of(row: dict, metric: str) -> list[float]:
    """Return the row's number, if it has one; of a metric of errors, a distance for each object."""
    if metric.endswith("errors"):
        return list(row[metric].values())
    return [] if row[metric] is None else [row[metric]]


def paired(before: list[dict], after: list[dict], metric: str = "accuracy") -> dict | None:
    """Estimate the mean of after - before, over what both runs answered on the same path."""
    # Much of the variance is the questions' own, and cancels in the difference.
    old = {(row["id"], row["path"]): row[metric] for row in before}
    changes = []
    clusters = []
    for row in after:
        earlier = old.get((row["id"], row["path"]))
        if earlier is not None and row[metric] is not None:
            changes.append(row[metric] - earlier)
            clusters.append(row["cluster"])
    return estimate(changes, clusters)


def paired_by_question(
    before: list[dict], after: list[dict], metric: str = "accuracy"
) -> dict | None:
    """Estimate the mean of after - before over the questions that both answered.

    On each path that both were asked on; where a question has none in common, but one path on
    either side, across these: LOR against DTR, or a base model on path direct against LOR. metric:
    a number of a row of predictions.jsonl, such as a benchmark's `official` or `robust`.
    """
    old = values_by_question(before, metric)
    changes = []
    clusters = []
    for name, (cluster, new) in values_by_question(after, metric).items():
        if name not in old:
            continue
        _, earlier = old[name]
        both = [(earlier[path], new[path]) for path in new if path in earlier]
        if not both and len(earlier) == len(new) == 1:
            both = [(*earlier.values(), *new.values())]
        for first, second in both:
            changes.append(second - first)
            clusters.append(cluster)
    return estimate(changes, clusters)


def values_by_question(rows: list[dict], metric: str) -> dict[str, tuple[str, dict[str, float]]]:
    """Return question -> (its cluster, path -> what its answer is worth)."""
    found: dict[str, tuple[str, dict[str, float]]] = {}
    for row in rows:
        if row[metric] is not None:
            _, values = found.setdefault(row["question_id"], (row["cluster"], {}))
            values[row["path"]] = row[metric]
    return found


def points(difference: dict, scale: float = 100.0) -> str:
    """Write a difference in points, as in +3.2 ± 1.1. scale: 1 where it is in per cent already."""
    text = f"{scale * difference['value']:+.1f}"
    if difference["se"] is None:
        return text
    return f"{text} ± {scale * difference['se']:.1f}"


def connected(shared: list[list[str]]) -> list[int]:
    """Return for each row the first row that it shares a name with, also through other rows."""
    leader = list(range(len(shared)))

    def first(row: int) -> int:
        while leader[row] != row:
            # Halve the way for those who come next.
            leader[row] = leader[leader[row]]
            row = leader[row]
        return row

    seen: dict[str, int] = {}
    for row, names in enumerate(shared):
        for name in names:
            other = first(seen.setdefault(name, row))
            mine = first(row)
            leader[max(mine, other)] = min(mine, other)
    return [first(row) for row in range(len(shared))]


def summarise_paths(rows: list[dict], rows_without_depth: list[dict]) -> dict:
    """Return path -> task -> summary; the tasks "all", and "no depth" where that was asked."""
    results = {}
    for path, of_path in by_path(rows).items():
        tasks = {row["task"] or "all" for row in of_path} | {"all"}
        results[path] = {}
        for task in sorted(tasks):
            of_task = [row for row in of_path if task in ("all", row["task"])]
            results[path][task] = summarise(of_task)
    for path, of_path in by_path(rows_without_depth).items():
        results[path]["no depth"] = summarise(of_path)
    return results


def by_path(rows: list[dict]) -> dict[str, list[dict]]:
    groups = {}
    for row in rows:
        groups.setdefault(row["path"], []).append(row)
    return groups


def print_table(results: dict) -> None:
    """Print a line for each path, and then one for each of its tasks."""
    # The paths' lines stand together at the top, to be compared.
    lines = [(path.upper(), tasks["all"]) for path, tasks in results.items()]
    for path, tasks in results.items():
        for task, summary in tasks.items():
            if task == "no depth":
                lines.append((f"{path} (no depth)", summary))
            elif task != "all":
                lines.append((f"{path} {task}", summary))
    columns = list(COLUMNS)
    for metric in BOXED:
        if not any(summary[metric] for _, summary in lines):
            columns.remove(metric)
    headings = "".join(f"{COLUMNS[metric]:>12}" for metric in columns)
    width = max(22, *[len(name) + 1 for name, _ in lines])
    print(f"\n{'':{width}}{'n':>6}{headings}  unparsed  truncated")
    for name, summary in lines:
        cells = ""
        for metric in columns:
            digits = 1 if metric == "tokens" else 3
            cells += f"{show(summary[metric], digits):>12}"
        counts = f"{summary['unparsed']:>10}{summary['truncated']:>11}"
        print(f"{name:{width}}{summary['n']:>6}{cells}{counts}")


def show(number: dict | None, digits: int) -> str:
    if number is None:
        return "-"
    text = f"{number['value']:.{digits}f}"
    if number["se"] is not None:
        text += f"±{number['se']:.{digits}f}"
    return text
