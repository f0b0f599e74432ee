"""What an RL step adds up to, by path, over all ranks."""

import math

import torch

from training.ranks import all_reduce

# Of a whole path: name of the mean -> name of the sum that it is divided by.
MEANS = {
    "reward": "completions",
    "length": "completions",
    "truncated": "completions",
    "kept": "groups",
    "entropy": "tokens",
    "kl": "reference_tokens",
    "clip_low": "tokens",
    "clip_high": "tokens",
    "mismatch_kl": "tokens",
    "mismatch_mean": "tokens",
}
COUNTS = (
    "completions",
    "detecting_completions",  # that have objects to detect
    "groups",
    "sampled_tokens",
    "tokens",
    "reference_tokens",  # whose log-prob the reference has told
)
LOGGED_COUNTS = ("groups", "sampled_tokens", "tokens")
# What a loss says of all its tokens, whatever their path; not logged by path.
OF_ALL_PATHS = ("clip_low", "clip_high", "mismatch_kl", "mismatch_mean")
MAXIMA = ("ratio_max", "mismatch_max")


class Metrics:
    """Sums by path on this rank; `row` has their means over all ranks.

    What was not measured is None: a mean over nothing, and no 0 that could be read as a result. A
    column is logged for each path as `PATH_name`, and for all together as `name`. Every entry of
    the registry of rewards is a column.
    """

    def __init__(self, paths: list[str], rewards: list[str]):
        self.paths = paths
        self.means = MEANS | dict.fromkeys(rewards, "completions")
        if "detect" in rewards:
            self.means["detect"] = "detecting_completions"
        self.columns = [*self.means, *COUNTS]
        self.sums = {path: dict.fromkeys(self.columns, 0.0) for path in paths}
        self.maxima = dict.fromkeys(MAXIMA, -math.inf)

    def add(self, path: str, **values: float) -> None:
        """Add to the sums of a path."""
        sums = self.sums[path]
        for name, value in values.items():
            sums[name] += value

    def add_maximum(self, name: str, value: float) -> None:
        """Keep the largest value; one that is not a number stays."""
        if math.isnan(value) or value > self.maxima[name]:
            self.maxima[name] = value

    def add_group(
        self, path: str, rewards: list[dict[str, float]], detects: bool, lengths, cut, kept
    ) -> None:
        """Add the completions of one prompt.

        rewards: of each completion, its total as "reward" and its parts by name; detects: whether
        there are objects to detect; lengths: in tokens; cut: of each, whether it has no end token;
        kept: whether the group is trained on.
        """
        if detects:
            self.add(path, detecting_completions=len(lengths))
        self.add(path, groups=1, kept=kept, completions=len(lengths))
        self.add(path, length=sum(lengths), sampled_tokens=sum(lengths), truncated=sum(cut))
        for parts in rewards:
            self.add(path, **parts)

    def row(self, names: list[str] | None = None) -> dict[str, float | None]:
        """Return means, counts and maxima over all ranks. Collective.

        names: the columns to return; None: all of them.
        """
        # One message for all sums: a step has some hundred of them, and each collective waits for
        # the slowest rank.
        flat = []
        for path in self.paths:
            flat.extend(self.sums[path][column] for column in self.columns)
        totals = all_reduce(flat)
        by_path = {}
        for i, path in enumerate(self.paths):
            # In the order in which they were laid out above.
            own = totals[i * len(self.columns) : (i + 1) * len(self.columns)]
            by_path[path] = dict(zip(self.columns, own, strict=True))
        overall = {}
        for column in self.columns:
            overall[column] = sum(sums[column] for sums in by_path.values())

        row = {}
        for path, sums in by_path.items():
            for name, value in self._averages(sums, names).items():
                if name not in OF_ALL_PATHS:
                    row[f"{path}_{name}"] = value
        row |= self._averages(overall, names)
        if "kept" in row and row["kept"] is None:
            row["kept"] = 0.0  # of no group none; of a path that was not asked it is null
        # A maximum over ranks isn't a sum, hence a second message.
        largest = all_reduce([self.maxima[name] for name in MAXIMA], "MAX")
        for name, value in zip(MAXIMA, largest, strict=True):
            if names is None or name in names:
                row[name] = None if value == -math.inf else value
        return row

    def _averages(self, sums: dict[str, float], names: list[str] | None) -> dict[str, float | None]:
        out = {}
        for name, by in self.means.items():
            out[name] = sums[name] / sums[by] if sums[by] else None
        for name in LOGGED_COUNTS:
            out[name] = sums[name]
        if names is None:
            return out
        return {name: value for name, value in out.items() if name in names}


def sums_by_path(values: torch.Tensor, owner: torch.Tensor, paths: int) -> torch.Tensor:
    """Sum the rows of values (T, C) by their path owner (T,) -> (paths, C) fp64, on the device."""
    # fp64, and on the device: nobody waits for it here, and a long step's sums keep their digits.
    sums = torch.zeros(paths, values.shape[1], dtype=torch.float64, device=values.device)
    return sums.index_add_(0, owner, values.double())
