"""The numeric half of srreal.score, and group normalisation, from arrays, in fp64, in one launch.

    number     r = |x - g| / (|g| + 0.01),  score = max(0, (e^(-2r) - e^(-2)) / (1 - e^(-2)))
    motion     mean of the number score over the axes on which answer or truth is not 0; 1 where none is
    detect     sum over the true objects of step(|first box of its mention - centre|) / max(boxes, objects)
    total      lor .8 accuracy + .2 format; dtr .8 + .1 + .1 detect, without objects .8 + .2; direct accuracy
    advantage  (total - mean) / (std + 1e-6) over the group, unbiased std; keep: max - min of accuracy > 1e-6

Strict rules only; a group of one has advantage 0 and is not kept. The string half (tags, letters,
units) stays on the host, which fills `Scored`. Whoever scores wholly on the host needs
`group_advantages` alone.

Why fuse: some 200 bytes a completion, so all the time is launches: eager PyTorch makes about a
hundred, here it is one, a program a group. In fp64, as steps and keep flags must equal the host's
on every input. Time on a GPU: not measured yet (`python -m bench.kernels --only rewards`).

Shapes: N completions; G groups, the completions of one example, contiguous; P boxes; K true
centres.
"""

import math
import os
from typing import NamedTuple

import torch
import triton
import triton.language as tl

LOR, DTR, DIRECT = 0, 1, 2  # Scored.path
GIVEN, NUMBER, MOTION = 0, 1, 2  # Scored.kind
ANY_FRAME, NO_FRAME = -1, -2
# nearer than: score
STEPS = ((0.1, 1.0), (0.2, 0.8), (0.3, 0.6), (0.4, 0.4), (0.6, 0.2), (1.0, 0.1))
FLOOR, EPS = math.exp(-2), 1e-6
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"


class Scored(NamedTuple):
    """What the string half found, on one device; bool, int64 and fp64 tensors.

    Completion n's boxes are rows box_start[n] : box_start[n + 1]; group g's completions and true
    centres group_start[g] : group_start[g + 1] and true_start[g] : true_start[g + 1]. Mentions are
    numbered within their group, below objects[g], by their lower-cased text: keys of
    Example.objects that differ only in case share a number, and so a box. A box of no such mention
    has -1.
    """

    well_formed: torch.Tensor  # (N,) bool
    parsed: torch.Tensor  # (N,) bool. GIVEN: the answer is right; NUMBER, MOTION: it could be read
    answer: torch.Tensor  # (N, 5) fp64. NUMBER: column 0; MOTION: the signed axes; else 0
    frame: torch.Tensor  # (N,) the stated reference frame, or NO_FRAME
    box_start: torch.Tensor  # (N + 1,)
    box_centre: torch.Tensor  # (P, 3) fp64
    box_mention: torch.Tensor  # (P,)
    group_start: torch.Tensor  # (G + 1,)
    path: torch.Tensor  # (G,) LOR, DTR, DIRECT
    kind: torch.Tensor  # (G,) GIVEN (choice, text), NUMBER, MOTION
    truth: torch.Tensor  # (G, 5) fp64, as answer
    objects: torch.Tensor  # (G,) how many the example has; 0 off path dtr
    wanted_frame: torch.Tensor  # (G,) the view that the question asks for, or ANY_FRAME
    true_start: torch.Tensor  # (G + 1,)
    true_centre: torch.Tensor  # (K, 3) fp64, a row for each object and view with truth
    true_mention: torch.Tensor  # (K,)
    true_frame: torch.Tensor  # (K,) its view; ANY_FRAME where the example has one view


class Rewards(NamedTuple):
    total: torch.Tensor  # (N,) fp64, like the next four
    accuracy: torch.Tensor
    format: torch.Tensor
    detect: torch.Tensor
    advantage: torch.Tensor
    keep: torch.Tensor  # (G,) bool


def _owners(start, rows):
    groups = torch.arange(len(start) - 1, device=start.device)
    return torch.repeat_interleave(groups, start.diff(), output_size=rows)


def _accuracy(a, group):
    kind, x, g = a.kind[group], a.answer, a.truth[group]
    r, used = (x - g).abs() / (g.abs() + 0.01), (x != 0) | (g != 0)
    axis = torch.where(r < 1, (torch.exp(-2 * r) - FLOOR) / (1 - FLOOR), 0.0)  # nan and inf: 0
    motion = torch.where(used, axis, 0.0).sum(1) / used.sum(1).clamp(min=1)
    motion = torch.where(used.any(1), motion, 1.0)
    score = torch.where(kind == NUMBER, axis[:, 0], torch.where(kind == MOTION, motion, 1.0))
    return torch.where(a.parsed & a.well_formed, score, 0.0)


def _detect(a, group):
    n, boxes, device = len(group), len(a.box_mention), group.device
    width = int(a.objects.max()) if len(a.objects) else 0
    # by (completion, mention); the last: of none
    first = torch.full((n * width + 1,), boxes, device=device)
    slot = torch.where(
        a.box_mention >= 0, _owners(a.box_start, boxes) * width + a.box_mention, n * width
    )
    first.scatter_reduce_(0, slot, torch.arange(boxes, device=device), "amin")
    count = a.true_start.diff()[group]
    # pairs (completion, true centre)
    who = torch.repeat_interleave(torch.arange(n, device=device), count)
    k = (
        a.true_start[group][who]
        + torch.arange(len(who), device=device)
        - (count.cumsum(0) - count)[who]
    )
    box = first[who * width + a.true_mention[k]]
    found = (box < boxes) & ((a.true_frame[k] == ANY_FRAME) | (a.true_frame[k] == a.frame[who]))
    who, k, box = who[found], k[found], box[found]
    d = (a.box_centre[box] - a.true_centre[k]).square().sum(1).sqrt()
    credit = torch.zeros_like(d)
    for limit, value in reversed(STEPS):
        # the slack: ties lie on the 0.01 m grid
        credit = torch.where(d < limit - 1e-6, value, credit)
    total = torch.zeros(n, dtype=d.dtype, device=device).index_add(0, who, credit)
    total = total / torch.maximum(a.box_start.diff(), a.objects[group]).clamp(min=1)
    wanted = a.wanted_frame[group]
    return torch.where(a.well_formed & ((wanted == ANY_FRAME) | (wanted == a.frame)), total, 0.0)


def group_advantages(total: torch.Tensor, accuracy: torch.Tensor, group_start: torch.Tensor):
    """(advantage[N] fp64, keep[G] bool) of totals and accuracies [N] in the groups of group_start[G
    + 1]."""
    total, accuracy, count = total.double(), accuracy.double(), group_start.diff()
    group, zero = _owners(group_start, len(total)), total.new_zeros(len(count))
    centred = total - (zero.index_add(0, group, total) / count.clamp(min=1))[group]
    std = (zero.index_add(0, group, centred.square()) / (count - 1).clamp(min=1)).sqrt()
    most = zero.scatter_reduce(0, group, accuracy, "amax", include_self=False)
    least = zero.scatter_reduce(0, group, accuracy, "amin", include_self=False)
    return centred / (std + EPS)[group], most - least > EPS


def reference_rewards_and_advantages(a: Scored) -> Rewards:
    """The specification."""
    group = _owners(a.group_start, len(a.well_formed))
    accuracy, detect, fmt = _accuracy(a, group), _detect(a, group), a.well_formed.double()
    dtr = (a.path[group] == DTR) & (a.objects[group] > 0)
    detect = torch.where(dtr, detect, 0.0)
    total = 0.8 * accuracy + torch.where(dtr, 0.1 * fmt, 0.2 * fmt) + 0.1 * detect
    total = torch.where(a.path[group] == DIRECT, accuracy, total)
    return Rewards(total, accuracy, fmt, detect, *group_advantages(total, accuracy, a.group_start))


FLOOR_, STEPS_ = tl.constexpr(FLOOR), tl.constexpr(STEPS)
# Below, `zero` is an fp64 block: Triton's own floats are fp32, and the interpreter's | and & want
# two blocks.


@triton.jit
def _accuracy_of(answer, truth, kind, i, g, mask, zero):
    total, used, first = zero, zero, zero
    for axis in tl.static_range(5):
        x = tl.load(answer + 5 * i + axis, mask=mask, other=0.0)
        t = zero + tl.load(truth + 5 * g + axis)
        r = tl.abs(x - t) / (tl.abs(t) + 0.01)
        score = tl.where(r < 1, (tl.exp(-2 * r) - FLOOR_) / (1 - FLOOR_), zero)
        moves = (x != 0) | (t != 0)
        total, used = total + tl.where(moves, score, zero), used + moves.to(tl.float64)
        if axis == 0:
            first = score
    motion = tl.where(used > 0, total / tl.maximum(used, zero + 1), zero + 1)
    return tl.where(kind == 1, first, tl.where(kind == 2, motion, zero + 1))


@triton.jit
def _detect_of(
    centre,
    mention,
    true_centre,
    true_mention,
    true_frame,
    frame,
    start,
    end,
    k,
    k_end,
    objects,
    zero,
):
    """Boxes start : end of each completion against the true centres k : k_end of their group."""
    total, most = zero, tl.max(end - start, 0)
    while k < k_end:
        first, view, wanted = end, frame * 0 + tl.load(true_frame + k), tl.load(true_mention + k)
        for back in range(1, most + 1):  # from the last box on, so that the first one stays
            box = end - back
            same = tl.load(mention + box, mask=box >= start, other=-1) == wanted
            first = tl.where(same, box, first)
        found, square, credit = (first < end) & ((view == -1) | (view == frame)), zero, zero
        for axis in tl.static_range(3):
            x = tl.load(centre + 3 * first + axis, mask=found, other=0.0)
            offset = x - tl.load(true_centre + 3 * k + axis)
            square += offset * offset
        for step in tl.static_range(5, -1, -1):
            credit = tl.where(
                tl.sqrt(square) < STEPS_[step][0] - 1e-6, zero + STEPS_[step][1], credit
            )
        total += tl.where(found, credit, zero)
        k += 1
    return total / tl.maximum(tl.maximum(end - start, objects), 1).to(tl.float64)


@triton.jit
def _rewards_kernel(
    well_formed,
    parsed,
    answer,
    frame,
    box_start,
    box_centre,
    box_mention,
    group_start,
    path,
    kind,
    truth,
    objects,
    wanted_frame,
    true_start,
    true_centre,
    true_mention,
    true_frame,
    out,
    keep,
    n,
    BLOCK: tl.constexpr,
):
    """A program a group: parts and totals of its completions, their statistics, then the
    advantages."""
    g, lane = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    begin, last = tl.load(group_start + g), tl.load(group_start + g + 1)
    zero, none = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.int64)
    way, count = none + tl.load(path + g), none + tl.load(objects + g)
    wanted = none + tl.load(wanted_frame + g)
    total_sum, most, least, squares = zero, zero - 1, zero + 2, zero
    for at in range(begin, last, BLOCK):
        i, mask = at + lane, at + lane < last
        good = tl.load(well_formed + i, mask=mask, other=0) != 0
        stated = tl.load(frame + i, mask=mask, other=-2)
        right = good & (tl.load(parsed + i, mask=mask, other=0) != 0)
        accuracy = tl.where(
            right, _accuracy_of(answer, truth, tl.load(kind + g), i, g, mask, zero), zero
        )
        start = tl.load(box_start + i, mask=mask, other=0)
        end = tl.load(box_start + i + 1, mask=mask, other=0)
        detect = _detect_of(
            box_centre,
            box_mention,
            true_centre,
            true_mention,
            true_frame,
            stated,
            start,
            end,
            tl.load(true_start + g),
            tl.load(true_start + g + 1),
            count,
            zero,
        )
        dtr = (way == 1) & (count > 0)
        detect = tl.where(good & dtr & ((wanted == -1) | (wanted == stated)), detect, zero)
        form = good.to(tl.float64)
        total = accuracy * 0.8 + tl.where(dtr, form * 0.1, form * 0.2) + detect * 0.1
        total = tl.where(way == 2, accuracy, total)
        tl.store(out + i, total, mask=mask)
        tl.store(out + n + i, accuracy, mask=mask)
        tl.store(out + 2 * n + i, form, mask=mask)
        tl.store(out + 3 * n + i, detect, mask=mask)
        total_sum += tl.where(mask, total, zero)
        most = tl.maximum(most, tl.where(mask, accuracy, zero - 1))
        least = tl.minimum(least, tl.where(mask, accuracy, zero + 2))
    tl.store(keep + g, tl.max(most, 0) - tl.min(least, 0) > 1e-6)
    tl.debug_barrier()  # the totals are read back
    mean = tl.sum(total_sum, 0) / tl.maximum(last - begin, 1).to(tl.float64)
    for at in range(begin, last, BLOCK):
        centred = tl.load(out + at + lane, mask=at + lane < last, other=0.0) - mean
        squares += tl.where(at + lane < last, centred * centred, zero)
    std = tl.sqrt(tl.sum(squares, 0) / tl.maximum(last - begin - 1, 1).to(tl.float64))
    for at in range(begin, last, BLOCK):
        centred = tl.load(out + at + lane, mask=at + lane < last, other=0.0) - mean
        tl.store(out + 4 * n + at + lane, centred / (std + 1e-6), mask=at + lane < last)


def rewards_and_advantages(a: Scored) -> Rewards:
    """Parts, totals, advantages and keep flags of a step's completions: see `Scored` and
    `Rewards`."""
    n, groups = len(a.well_formed), len(a.path)
    if len(a.group_start) != groups + 1 or len(a.box_start) != n + 1:
        raise ValueError(
            f"{groups} groups and {n} completions need {groups + 1} group_start and {n + 1} "
            f"box_start: got {len(a.group_start)} and {len(a.box_start)}"
        )
    if not (a.answer.is_cuda or INTERPRET):
        return reference_rewards_and_advantages(a)
    out, keep = a.answer.new_empty(5, n), a.well_formed.new_zeros(groups)
    if groups:
        _rewards_kernel[(groups,)](
            *(x.contiguous() for x in a), out, keep, n, BLOCK=32, num_warps=1
        )
    return Rewards(*out, keep)
