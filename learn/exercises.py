"""Check the five exercises of docs/one_step.ipynb; print what is wrong, or that one is solved.

A gap that is not filled in is `...`. tests/docs/test_notebook.py has the answers.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean, stdev

import numpy as np
import torch

from learn.step import Trainer
from model.processor import has_depth
from model.rollout import predict_centres
from srreal import PATHS, Example, Scores, score, target, weights_of

# What trainings add to a std, and what rounding may change of a total.
EPS = 1e-6
GROUP = 8


def verdict(number: int, complaints: list[str]) -> bool:
    """Print the first complaint, or that the exercise is solved; return whether it is."""
    if complaints:
        print(f"exercise {number}: {complaints[0]}")
    else:
        print(f"exercise {number}: solved")
    return not complaints


def is_open(number: int, *gaps) -> bool:
    """Tell whether one of the gaps still holds `...`, and say so."""
    for gap in gaps:
        if gap is ...:
            verdict(number, ["there is a gap to fill in"])
            return True
    return False


# ---- 1. Hack the reward


def hack(response: str, example: Example) -> bool:
    """Check a response that has full marks by the official rules, and none by the strict ones."""
    if is_open(1, response):
        return False
    official = score(response, example, rules="official")
    strict = score(response, example)
    print(f"official {official.parts}, total {official.total:.3f}; strict total {strict.total:.3f}")
    complaints = []
    # Any response will do: how it gets there is the exercise.
    if official.total < 1 - EPS:
        complaints.append("the official rules don't give it full marks yet")
    if strict.total > EPS:
        complaints.append("the strict rules still give it something")
    return verdict(1, complaints)


# ---- 2. Drop the std


def parts_of(scores: Sequence[Scores]) -> torch.Tensor:
    """Return reward parts as `rewards_and_advantages` takes them: (N, R) fp64."""
    return torch.tensor([list(s.parts.values()) for s in scores], dtype=torch.float64)


def calm_parts() -> torch.Tensor:
    """Return the parts (8, R) of a group that is all right, and whose boxes hardly differ."""
    # All answers are right, and one box is a little off. Divided by the group's tiny std, that
    # weighs as much as the difference of a right and a wrong answer.
    detects = [0.8, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8, 0.6]
    return parts_of([Scores(1.0, 1.0, 1.0, detect) for detect in detects])


def no_std(
    plain: Sequence[float],
    share_with_std: float,
    share_without: float,
    parts: torch.Tensor,
    weights: Sequence[float],
) -> bool:
    """Check the advantages of a group without the std, and the calm group's share of sum |A|.

    parts (8, R) and weights (R,) are those of the group of the notebook.
    """
    if is_open(2, plain, share_with_std, share_without):
        return False
    # By hand, and not by the kernel that the notebook calls.
    ours = totals_of(parts, weights)
    calm = totals_of(calm_parts(), weights)
    complaints = []
    if not np.allclose([float(a) for a in plain], centred(ours), atol=1e-6):
        complaints.append("`plain` is not total - mean of the group")
    with_std = share_of(centred(calm, divide=True), centred(ours, divide=True))
    if not math.isclose(share_with_std, with_std, abs_tol=1e-3):
        complaints.append("`share_with_std` is another number")
    if not math.isclose(share_without, share_of(centred(calm), centred(ours)), abs_tol=1e-3):
        complaints.append("`share_without` is another number")
    return verdict(2, complaints)


def totals_of(parts: torch.Tensor, weights: Sequence[float]) -> list[float]:
    totals = []
    for row in parts.tolist():
        totals.append(sum(part * weight for part, weight in zip(row, weights, strict=True)))
    return totals


def centred(totals: list[float], divide: bool = False) -> list[float]:
    """Subtract the mean; divide by the unbiased std where asked to."""
    mean = fmean(totals)
    # As the kernel does: with n - 1, and an epsilon for a group of equal totals.
    scale = stdev(totals) + EPS if divide else 1.0
    return [(total - mean) / scale for total in totals]


def share_of(some: list[float], others: list[float]) -> float:
    # sum |A| stands for the pull on the weights: each token's gradient is scaled by its A.
    own = sum(abs(a) for a in some)
    return own / (own + sum(abs(a) for a in others))


# ---- 3. Filter on the total


def filter_on_total(keep, responses: Sequence[str], example: Example) -> bool:
    """Check a filter on totals, and eight responses that it keeps for nothing.

    keep: a function (list of Scores) -> bool.
    """
    if is_open(3, keep, responses):
        return False
    complaints = []
    # A function can't be compared with ours, so it is tried on three groups.
    if not is_filter_on_total(keep):
        complaints.append("`keep` has to be true just where the totals differ by more than 1e-6")
    scores = [score(response, example) for response in responses]
    accuracies = [s.accuracy for s in scores]
    totals = [s.total for s in scores]
    if len(responses) != GROUP:
        complaints.append(f"{len(responses)} responses; a group has {GROUP}")
    elif max(accuracies) - min(accuracies) > EPS:
        complaints.append("their accuracies differ: the filter on accuracy keeps this group, too")
    elif max(totals) - min(totals) <= EPS:
        complaints.append("their totals are equal: no filter keeps this group")
    else:
        print("what would be learnt:", [round(a, 2) for a in centred(totals, divide=True)])
    return verdict(3, complaints)


def is_filter_on_total(keep) -> bool:
    """Try a filter on groups of two."""
    same = [Scores(0.5, 1.0), Scores(0.5, 0.0)]
    other = [Scores(0.5, 1.0), Scores(0.6, 1.0)]
    close = [Scores(0.5, 1.0), Scores(0.5 + 1e-9, 1.0)]
    return [bool(keep(group)) for group in (same, other, close)] == [False, True, False]


# ---- 4. Take the depth away


def no_depth(blind: Example, example: Example, trainer: Trainer) -> bool:
    """Check a copy of the example without depth; print the 3D head's error with and without."""
    if is_open(4, blind):
        return False
    complaints = []
    if has_depth(blind):
        complaints.append("it still has depth")
    if not has_depth(example):
        complaints.append("the original has lost its depth: change a copy (dataclasses.replace)")
    # The camera may stay or go: without depth nobody reads it.
    rest = [replace(e, depths=None, intrinsics=None) for e in (blind, example)]
    if rest[0] != rest[1]:
        complaints.append("something else has changed as well")
    if not complaints:
        seen, unseen = centre_errors(trainer, [example, blind])
        print(f"3D head, mean error: {seen:.2f} m with depth, {unseen:.2f} m without")
        if unseen <= seen:
            complaints.append("it is no worse without depth: is this the trained checkpoint?")
    return verdict(4, complaints)


def centre_errors(trainer: Trainer, examples: list[Example]) -> list[float]:
    """Return the mean distance in metres of the 3D head's centres to the truth, of each example."""
    # The head reads the prompt alone, so that nothing needs to be sampled.
    predicted = predict_centres(trainer.model, trainer.processor, examples)
    errors = []
    for example, centres in zip(examples, predicted, strict=True):
        regions = trainer.processor.prompt(example).regions
        distances = [math.dist(c, r.centre) for c, r in zip(centres, regions, strict=True)]
        errors.append(fmean(distances))
    return errors


# ---- 5. A third path


def third_path(name: str, example: Example) -> bool:
    """Check a path that the notebook added to PATHS, by the notebook's question put on it."""
    if is_open(5, name, PATHS.get(name, ...)):
        return False
    path = PATHS[name]
    complaints = []
    if name in ("lor", "dtr", "direct"):
        complaints.append(f"{name} was there before")
    if "answer" not in path.sections:
        complaints.append("without the section `answer` nothing can be scored")
    # The name alone would make it another path for the logs, and the same one for the model.
    if path.sections in (PATHS["lor"].sections, PATHS["dtr"].sections):
        complaints.append("it has the sections of a path that was there before")
    if not complaints:
        complaints = faults_of_path(name, replace(example, path=name))
    return verdict(5, complaints)


def faults_of_path(name: str, example: Example) -> list[str]:
    """Say what is wrong with a path, by what its own target earns."""
    weights = weights_of(example)
    if not math.isclose(sum(weights.values()), 1.0):
        return [f"its weights add up to {sum(weights.values())}, not to 1"]
    try:
        text = target(example)
    except ValueError as error:
        return [f"`target` can't write it: {error}"]
    print(text)
    # A path whose own target can't earn everything would teach RL to leave that target.
    if score(text, example).total < 1 - EPS:
        return [f"the true answer earns {score(text, example).parts}: not everything"]
    return []
