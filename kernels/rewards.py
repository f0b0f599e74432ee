"""From reward parts to advantages: weighted totals, group statistics and the filter, in one launch.

    total[n]       sum over the rewards r of weights[g, r] parts[n, r]
    advantage[n]   (total[n] - mean of its group) / (std + 1e-6)
                   scale "std": the group's own, unbiased (GRPO, arXiv 2402.03300, 4.1.2)
                   scale "none": not divided (Dr. GRPO, arXiv 2503.20783)
                   scale "batch": the std of all totals of this call
    keep[g]        max - min of the group's accuracy > 1e-6

Where all completions of a group are right, or all are wrong, only noise in the smaller parts would
be learnt: that is what `keep` is for. A group of one has advantage 0 and is not kept.

Why fuse: a few bytes a completion, so all the time is launches. Eager PyTorch makes about thirty;
here it is one, a program a group (scale "batch" takes a few more for its std). All of it is fp64,
as on the host, so that keep flags never depend on the device. Time on a GPU: not measured yet
(`python -m bench.kernels --only rewards`).

Shapes: N completions, G groups, R rewards. Group g has completions group_start[g] to
group_start[g + 1].
"""

import torch
from torch import Tensor

from kernels import on_triton, tl, triton

EPS = 1e-6
SCALES = ("std", "none", "batch")


def reference_rewards_and_advantages(
    parts: Tensor,
    weights: Tensor,
    group_start: Tensor,
    *,
    accuracy_column: int,
    scale: str = "std",
) -> tuple[Tensor, Tensor, Tensor]:
    """Specify `rewards_and_advantages`, in plain PyTorch."""
    parts = parts.double()
    # Which group each completion is of: (0, 0, 0, 1, 1, ...).
    count = group_start.diff()
    groups = torch.arange(len(count), device=parts.device)
    group = torch.repeat_interleave(groups, count, output_size=len(parts))  # (N,)

    total = (parts * weights.double()[group]).sum(1)

    # count is 0 in an empty group, count - 1 in a group of one.
    zero = total.new_zeros(len(count))
    mean = zero.index_add(0, group, total) / count.clamp(min=1)
    # The group's mean is GRPO's baseline: there is no value network.
    centred = total - mean[group]
    squares = zero.index_add(0, group, centred.square())
    std = (squares / (count - 1).clamp(min=1)).sqrt()

    accuracy = parts[:, accuracy_column]
    highest = zero.scatter_reduce(0, group, accuracy, "amax", include_self=False)
    lowest = zero.scatter_reduce(0, group, accuracy, "amin", include_self=False)
    # Accuracy alone decides, not the total: a group whose answers are all right still differs in
    # the detection reward, and would be trained on for that.
    keep = highest - lowest > EPS

    if scale == "none":
        return total, centred, keep
    if scale == "batch":
        return total, centred / (_std_of_all(total) + EPS), keep
    return total, centred / (std + EPS)[group], keep


# Of all completions of the call, unbiased as well.
def _std_of_all(total: Tensor) -> Tensor:
    # Centred first, as in the kernel: a difference of large sums would lose the digits.
    squares = (total - total.sum() / max(len(total), 1)).square().sum()
    return (squares / max(len(total) - 1, 1)).sqrt()


@triton.jit
def _rewards_kernel(
    parts,
    weights,
    group_start,
    total_out,
    advantage_out,
    keep_out,
    rewards,
    accuracy_column,
    DIVIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Take one group a program, BLOCK completions at a time.

    `zero` is a block in fp64: Triton's own floats are fp32.
    """
    g = tl.program_id(0).to(tl.int64)
    first = tl.load(group_start + g)
    last = tl.load(group_start + g + 1)
    lane = tl.arange(0, BLOCK)
    zero = tl.zeros([BLOCK], tl.float64)

    # Totals, their sum, and the range of the accuracy.
    # A lane adds every 32nd completion; groups are mostly smaller than that.
    summed = zero
    highest = zero - float("inf")
    lowest = zero + float("inf")
    for start in range(first, last, BLOCK):
        n = start + lane
        mask = n < last
        # Rewards are few (three, until a fork adds one), so a loop over columns costs less than a
        # padded tile.
        total = zero
        for r in range(rewards):
            part = tl.load(parts + n * rewards + r, mask=mask, other=0.0)
            total += part * tl.load(weights + g * rewards + r)
        tl.store(total_out + n, total, mask=mask)
        summed += total
        accuracy = tl.load(parts + n * rewards + accuracy_column, mask=mask, other=0.0)
        highest = tl.maximum(highest, tl.where(mask, accuracy, -float("inf")))
        lowest = tl.minimum(lowest, tl.where(mask, accuracy, float("inf")))
    # An empty group's -inf - inf is not above EPS either.
    tl.store(keep_out + g, tl.max(highest, 0) - tl.min(lowest, 0) > 1e-6)

    tl.debug_barrier()  # the program's threads read totals that others of them have written
    count = last - first
    mean = tl.sum(summed, 0) / tl.maximum(count, 1).to(tl.float64)

    # Centring before squaring: a difference of large sums would lose a small std's digits.
    squares = zero
    for start in range(first, last, BLOCK):
        n = start + lane
        centred = tl.load(total_out + n, mask=n < last, other=0.0) - mean
        squares += tl.where(n < last, centred * centred, zero)
    std = tl.sqrt(tl.sum(squares, 0) / tl.maximum(count - 1, 1).to(tl.float64))

    for start in range(first, last, BLOCK):
        n = start + lane
        advantage = tl.load(total_out + n, mask=n < last, other=0.0) - mean
        if DIVIDE:
            # Where all totals are equal, 0 / 1e-6: the advantage is 0, not nan.
            advantage = advantage / (std + 1e-6)
        tl.store(advantage_out + n, advantage, mask=n < last)


def _check(parts, weights, group_start, accuracy_column, scale):
    if scale not in SCALES:
        raise ValueError(f"unknown scale {scale!r}: one of {', '.join(SCALES)}")
    groups = len(group_start) - 1
    if parts.ndim != 2 or weights.shape != (groups, parts.shape[1]):
        shapes = [list(x.shape) for x in (parts, weights, group_start)]
        raise ValueError(f"shapes must be [N, R], [G, R], [G + 1]: got {shapes}")
    if not 0 <= accuracy_column < parts.shape[1]:
        raise ValueError(f"accuracy_column {accuracy_column}: there are {parts.shape[1]} columns")
    # On CUDA this would stop the host.
    if not group_start.is_cuda and (group_start[0] != 0 or group_start[-1] != len(parts)):
        raise ValueError(f"group_start must rise from 0 to {len(parts)}: {group_start.tolist()}")


def rewards_and_advantages(
    parts: Tensor,
    weights: Tensor,
    group_start: Tensor,
    *,
    accuracy_column: int,
    scale: str = "std",
) -> tuple[Tensor, Tensor, Tensor]:
    """Return total[N], advantage[N] (both fp64) and keep[G] (bool).

    parts[N, R]: what each reward gave a completion; weights[G, R]: what it counts in each group;
    group_start[G + 1]: int64; accuracy_column: what of parts the filter reads; scale: one of
    SCALES.
    """
    _check(parts, weights, group_start, accuracy_column, scale)
    if not on_triton(parts):
        return reference_rewards_and_advantages(
            parts, weights, group_start, accuracy_column=accuracy_column, scale=scale
        )
    parts = parts.double().contiguous()
    weights = weights.double().contiguous()
    completions, rewards = parts.shape
    total = parts.new_empty(completions)
    advantage = parts.new_empty(completions)
    keep = torch.empty(len(weights), dtype=torch.bool, device=parts.device)
    if len(weights):
        _rewards_kernel[(len(weights),)](
            parts,
            weights,
            group_start.contiguous(),
            total,
            advantage,
            keep,
            rewards,
            accuracy_column,
            DIVIDE=scale == "std",
            BLOCK=32,
            num_warps=1,
        )
    if scale == "batch":
        advantage /= _std_of_all(total) + EPS
    return total, advantage, keep
