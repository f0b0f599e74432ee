"""rewards_and_advantages against srreal's totals, and its formulas written in plain Python."""

import random
import statistics

import pytest
import torch

import srreal
from kernels import interpreted
from kernels.rewards import (
    SCALES,
    reference_rewards_and_advantages,
    rewards_and_advantages,
)

DEVICE = "cuda" if torch.cuda.is_available() and not interpreted() else "cpu"
# Sizes of the groups: empty, one, usual, and more than one block of the kernel.
SIZES = (3, 0, 8, 1, 33, 8, 2, 70)


def make(rewards=3, sizes=SIZES, seed=0, accuracy_column=0):
    """Random parts and weights; accuracies of a few values, so that some groups agree in them."""
    rng = random.Random(seed)
    parts = []
    weights = []
    for size in sizes:
        weights.append([rng.random() for _ in range(rewards)])
        levels = rng.choice(((1.0,), (0.0, 1.0), (0.0, 0.2, 0.7)))
        for _ in range(size):
            row = [rng.random() for _ in range(rewards)]
            row[accuracy_column] = rng.choice(levels)
            parts.append(row)
    return parts, weights


def tensors(parts, weights, sizes, device=DEVICE):
    columns = len(weights[0])
    return (
        torch.tensor(parts, dtype=torch.float64, device=device).view(-1, columns),
        torch.tensor(weights, dtype=torch.float64, device=device),
        torch.tensor([0, *sizes], device=device).cumsum(0),
    )


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def oracle(parts, weights, sizes, scale, accuracy_column=0):
    """Group by group, with the statistics module."""
    totals, advantages, keep = [], [], []
    first = 0
    for size, weight in zip(sizes, weights, strict=True):
        rows = parts[first : first + size]
        first += size
        own = [dot(weight, row) for row in rows]
        std = statistics.stdev(own) if size > 1 else 0.0
        divisor = std + 1e-6 if scale == "std" else 1.0
        totals += own
        advantages += [(total - statistics.fmean(own)) / divisor for total in own]
        accuracies = [row[accuracy_column] for row in rows]
        keep.append(size > 0 and max(accuracies) - min(accuracies) > 1e-6)
    if scale == "batch":
        std = statistics.stdev(totals)
        advantages = [advantage / (std + 1e-6) for advantage in advantages]
    return totals, advantages, keep


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("rewards", [1, 3, 5])
@pytest.mark.parametrize("call", [rewards_and_advantages, reference_rewards_and_advantages])
def test_equals_the_formulas(call, rewards, scale):
    column = rewards - 1
    parts, weights = make(rewards, seed=rewards, accuracy_column=column)
    inputs = tensors(parts, weights, SIZES)
    found = call(*inputs, accuracy_column=column, scale=scale)
    total, advantage, keep = (x.tolist() for x in found)
    true_total, true_advantage, true_keep = oracle(parts, weights, SIZES, scale, column)
    assert total == pytest.approx(true_total, rel=1e-12, abs=1e-12)
    assert advantage == pytest.approx(true_advantage, rel=1e-9, abs=1e-9)
    assert keep == true_keep
    assert found[0].dtype == found[1].dtype == torch.float64


def test_triton_equals_the_reference_to_twelve_digits():
    parts, weights = make(seed=4)
    inputs = tensors(parts, weights, SIZES)
    ours = rewards_and_advantages(*inputs, accuracy_column=0)
    reference = reference_rewards_and_advantages(*inputs, accuracy_column=0)
    torch.testing.assert_close(ours[:2], reference[:2], rtol=1e-12, atol=1e-12)
    assert torch.equal(ours[2], reference[2])


def test_totals_are_those_of_srreal():
    """The weights of both paths, with parts from srreal.score."""
    objects = {"red bbox": (0.3, -0.81, 3.32)}
    box = '<3d_box center="0.3,-0.81,3.5">a (red bbox)</3d_box>'
    detect = f"<detect>Find 1 relevant objects:\n{box}</detect>"
    tail = "<think>so</think><answer>{}</answer>"
    scores = []
    for path, head, shares in (("lor", "", (0.8, 0.2, 0)), ("dtr", detect, (0.8, 0.1, 0.1))):
        example = srreal.Example("e", path, [None], "?", "1.5", objects=objects)
        for answer in ("1.5", "1.4", "no", "1.0"):
            scores.append((srreal.score(head + tail.format(answer), example), shares))
    parts = [[score.accuracy, score.format, score.detect] for score, _ in scores]
    inputs = tensors(parts, [scores[0][1], scores[4][1]], (4, 4))
    total, _, keep = rewards_and_advantages(*inputs, accuracy_column=0)
    assert total.tolist() == pytest.approx([score.total for score, _ in scores], abs=1e-12)
    assert keep.tolist() == [True, True]


def test_a_group_by_hand():
    total = [1.0, 0.0, 0.2, 0.2, 0.7, 1.0, 1.0, 0.9]
    accuracy = [1.0, 0.0, 0.0, 0.0, 0.5, 1.0, 1.0, 1.0 - 1e-7]
    parts = [list(pair) for pair in zip(total, accuracy, strict=True)]
    sizes = (2, 2, 0, 1, 3)
    inputs = tensors(parts, [[1.0, 0.0]] * 5, sizes)
    _, advantage, keep = rewards_and_advantages(*inputs, accuracy_column=1)
    assert keep.tolist() == [True, False, False, False, False]
    assert advantage[:5].tolist() == pytest.approx([0.7071, -0.7071, 0, 0, 0], abs=1e-4)
    assert advantage[5:].sum().item() == pytest.approx(0, abs=1e-9)
    assert advantage[7] < -1


@pytest.mark.parametrize("scale", SCALES)
def test_no_completions(scale):
    for sizes in ((0, 0), ()):
        parts = torch.zeros(0, 3, device=DEVICE)
        weights = torch.ones(len(sizes), 3, device=DEVICE)
        start = torch.zeros(len(sizes) + 1, dtype=torch.int64, device=DEVICE)
        found = rewards_and_advantages(parts, weights, start, accuracy_column=0, scale=scale)
        assert len(found[0]) == len(found[1]) == 0
        assert found[2].tolist() == [False] * len(sizes)


def test_views_are_read_as_what_they_hold():
    """Every second row of twice as many, and transposed columns."""
    inputs = tensors(*make(seed=2), SIZES)
    strided = [x.repeat_interleave(2, 0)[::2] for x in inputs]
    turned = [strided[0].T.contiguous().T, *inputs[1:]]
    plain = rewards_and_advantages(*inputs, accuracy_column=0)
    for views in (strided, turned):
        found = rewards_and_advantages(*views, accuracy_column=0)
        for ours, wanted in zip(found, plain, strict=True):
            assert torch.equal(ours, wanted)


def test_bad_input():
    parts, weights, start = tensors(*make(), SIZES)
    for changes in (
        dict(weights=weights[:, :2]),
        dict(weights=weights[:3]),
        dict(parts=parts[0]),
        dict(accuracy_column=3),
        dict(accuracy_column=-1),
        dict(scale="group"),
    ):
        given = dict(parts=parts, weights=weights, group_start=start, accuracy_column=0)
        with pytest.raises(ValueError):
            rewards_and_advantages(**(given | changes))
    with pytest.raises(ValueError, match="must rise from 0"):
        rewards_and_advantages(parts[:9].cpu(), weights.cpu(), start.cpu(), accuracy_column=0)
