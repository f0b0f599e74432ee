"""Means of what answers earn, with standard errors that are clustered.

Questions about one image, video or scene are not independent, so they are one cluster. The error of
a plain mean is the sandwich estimator's, in closed form. Of all else (means of means, chance
adjustment, questions that have to be right in every order) it is the standard deviation over 1,000
resamples: as many clusters as there are, drawn with replacement, seed 0.

n answers, k clusters, R resamples.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from srreal import Example

RESAMPLES = 1000


@dataclass(frozen=True)
class Mean:
    """A mean in per cent, its standard error, and what it would be in each resample."""

    value: float
    se: float | None = None  # None: there are no clusters, or one
    draws: np.ndarray | None = None  # (R,), NaN where a resample has none of its answers


class Scored:
    """Examples with what their answers earn, in per cent, and the cluster of each.

    weights (R, k): how often each resample has drawn each cluster; None: no errors are wanted.
    """

    def __init__(
        self,
        examples: list[Example],
        values: np.ndarray,
        clusters: np.ndarray,
        weights: np.ndarray | None,
    ):
        self.examples = examples
        self.values = values
        self.clusters = clusters
        self.weights = weights

    @classmethod
    def of(cls, pairs: list[tuple[Example, float]], clusters: list[str] | None = None) -> "Scored":
        """Take pairs (Example, per cent), and the names of their clusters where there are any."""
        examples = [example for example, _ in pairs]
        values = np.array([value for _, value in pairs], dtype=float)
        if clusters is None:
            return cls(examples, values, np.zeros(len(pairs), dtype=int), None)
        names, index = np.unique(clusters, return_inverse=True)
        k = len(names)
        # Drawn once for all of a table, so that its means are of the same resamples and can be
        # averaged draw by draw. One cluster says nothing about how clusters differ.
        weights = None
        if k > 1:
            weights = np.random.default_rng(0).multinomial(k, np.full(k, 1 / k), size=RESAMPLES)
            # Products of floats are a library's, those of integers a loop.
            weights = weights.astype(float)
        return cls(examples, values, index, weights)

    def take(self, rows: list[int]) -> "Scored":
        examples = [self.examples[row] for row in rows]
        return Scored(examples, self.values[rows], self.clusters[rows], self.weights)

    def by(self, key: Callable[[Example], str | None]) -> dict[str, "Scored"]:
        """Part the answers by key(example); None is left out."""
        rows: dict[str, list[int]] = {}
        for row, example in enumerate(self.examples):
            rows.setdefault(key(example), []).append(row)
        rows.pop(None, None)
        return {name: self.take(found) for name, found in rows.items()}

    def mean(self) -> Mean:
        """Return the plain mean."""
        # The draws are for means of this mean; its own error needs none.
        found = self.ratio(self.values, np.ones(len(self.values)))
        value = float(self.values.mean())
        return Mean(value, self._sandwich(value), found.draws)

    def ratio(self, numerators: np.ndarray, denominators: np.ndarray) -> Mean:
        """Return the sum of (n,) numbers over that of others, with a resampled error."""
        value = float(numerators.sum() / denominators.sum())
        if self.weights is None:
            return Mean(value)
        k = self.weights.shape[1]
        # A resample's sums are those of its clusters.
        above = self.weights @ np.bincount(self.clusters, numerators, k)
        below = self.weights @ np.bincount(self.clusters, denominators, k)
        with np.errstate(divide="ignore", invalid="ignore"):
            draws = above / below
        return Mean(value, spread(draws), draws)

    def all_right(self, key: Callable[[Example], str]) -> Mean:
        """Return the mean over questions, each right where all of its answers are.

        All answers of one key have to be of one cluster.
        """
        least = []
        clusters = []
        for group in self.by(key).values():
            # 0 or 100 each, so the least is their product.
            least.append(group.values.min())
            clusters.append(group.clusters[0])
        values = np.array(least)
        found = Scored([], values, np.array(clusters), self.weights)
        return found.ratio(values, np.ones(len(values)))

    def _sandwich(self, value: float) -> float | None:
        """Return the error of the mean: residuals are summed by cluster, then squared."""
        # k / (k - 1): with an answer a cluster this is sd / sqrt(n).
        k = len(np.unique(self.clusters))
        if self.weights is None or k < 2:
            return None
        sums = np.bincount(self.clusters, self.values - value)
        return math.sqrt((sums**2).sum() * k / (k - 1)) / len(self.values)


def spread(draws: np.ndarray) -> float | None:
    known = draws[np.isfinite(draws)]
    return float(known.std(ddof=1)) if len(known) > 1 else None


def average(means: Iterable[Mean]) -> Mean:
    """Return the unweighted mean of means. A resample counts those that it has answers of."""
    means = list(means)
    value = mean(part.value for part in means)
    # Alone it keeps the sandwich's error.
    if len(means) == 1:
        return means[0]
    if any(part.draws is None for part in means):
        return Mean(value)
    # (means, R). A small type may be missing from a resample: NaN there.
    columns = np.stack([part.draws for part in means])
    known = np.isfinite(columns)
    with np.errstate(invalid="ignore"):
        draws = np.where(known, columns, 0).sum(0) / known.sum(0)
    return Mean(value, spread(draws), draws)


def mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


# ---- Aggregates: Scored -> key -> Mean


def means(scored: Scored, key: Callable[[Example], str | None]) -> dict[str, Mean]:
    """Return the mean score of each key(example); None is left out."""
    return {name: group.mean() for name, group in scored.by(key).items()}


def averages(table: dict[str, Mean], groups: dict[str, Iterable[str]]) -> dict[str, Mean]:
    """Return the mean of each group's entries.

    A group without any is left out: a part of a benchmark was asked.
    """
    found = {}
    for name, keys in groups.items():
        if parts := [table[key] for key in keys if key in table]:
            found[name] = average(parts)
    return found


def by_sample(scored: Scored) -> dict[str, Mean]:
    """Return the mean of all, `overall`, and of each task."""
    return {"overall": scored.mean()} | means(scored, lambda example: example.task or None)


def source(example: Example) -> str:
    """Return where an image is from: the part of its id before the first _."""
    return example.id.partition("_")[0]
