"""Policy-gradient losses over flat packed completions, with their gradient in closed form.

    r        the ratio, exp(logprob - old) of a token; for gspo exp of its mean over the sequence
    A        the advantage of the token's sequence
    dapo, grpo, dr_grpo, gspo
             l = max(-r A, -clip(r, 1 - clip_low, 1 + clip_high) A)
             but for gspo, where A < 0: at most -dual_clip A
    cispo    l = -stopgrad(min(r, 1 + clip_high)) A logprob
    sapo     l = -(4 / tau) sigmoid(tau (r - 1)) A,  tau = 1 where A > 0, else 1.05
    a token  stopgrad(min(exp(old - rollout), rollout_cap)) l + kl (e^d - d - 1),  d = ref - logprob
    the sum  dapo, cispo: over tokens / T
             grpo, gspo, sapo: over sequences of the mean over their tokens / S
             dr_grpo: over tokens / (S max_tokens)

PPO's clip: arXiv 1707.06347, eq. 7. Dual clip: 1912.09729, eq. 5. GRPO: 2402.03300, eq. 3; the KL
estimator: its eq. 4. DAPO: 2503.14476, eq. 8. Dr. GRPO: 2503.20783. GSPO: 2507.18071, eq. 5 to 7.
CISPO: 2506.13585, eq. 4 and 5. SAPO: 2511.20347, eq. 5 and 6.

T and S are those of the call, unless the caller gives the global denominator, a number or a 0-dim
tensor, so that micro-batches and ranks add up exactly. Exponents end at 80: e^80 is finite in fp32
and beyond every clip, while inf * 0 would make a clipped token's gradient nan. nan itself is passed
on, for the training script to stop at.

Why fuse: 24 bytes a token, so 32,768 tokens are under 1 MB and all the time is launches. Eager
PyTorch makes about sixty, forward and backward; here it is a token kernel, which also yields the
gradient, and a one-block finaliser (gspo: a pass over sequences before). No atomics: sums have one
order, every run the same bits. Time on a GPU: not measured yet (`python -m bench.kernels --only
policy_loss`).

To add a loss, write its surrogate and give it an entry in LOSSES: `--loss` takes it, and
`--no-fused-loss` (fused=False) trains it, on any device. The Triton kernel refuses it until it has
a branch for that surrogate.

Shapes: T tokens of all completions, one after the other; S sequences; sequence s is tokens
cu_seqlens[s] to cu_seqlens[s + 1].
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import interpreted, on_triton, tl, triton

# exp(80) = 5.5e34, and fp32 ends at 3.4e38.
MAX_EXPONENT = 80.0


# ---- The losses


def clipped_surrogate(
    ratio: Tensor, advantage: Tensor, logprob: Tensor, low: float, high: float
) -> tuple[Tensor, Tensor]:
    """Return -min(r A, clip(r, low, high) A), and where the clip binds."""
    unclipped = -ratio * advantage
    # PPO's pessimism: of the two the larger loss. So a clip never stops what undoes a step that
    # went too far: it binds above 1 + clip_high only where A > 0, below 1 - clip_low only where A <
    # 0.
    clipped = -ratio.clamp(low, high) * advantage
    binds = clipped > unclipped
    return torch.where(binds, clipped, unclipped), binds


def clipped_weight(
    ratio: Tensor, advantage: Tensor, logprob: Tensor, low: float, high: float
) -> tuple[Tensor, Tensor]:
    """Return -stopgrad(min(r, high)) A logprob, and where the clip binds.

    REINFORCE with clipped weights: unlike above, every token keeps a gradient. There is no `low`.
    """
    # The gradient is that of -weight A logprob: the weight itself is a constant.
    weight = ratio.detach().clamp(max=high)
    binds = (ratio > high) & (advantage != 0)
    return -weight * advantage * logprob, binds


# How fast SAPO's gate closes as the ratio leaves 1: where a token is made less likely, faster, as
# that raises all others'.
TAU = 1.0
TAU_DOWN = 1.05


def soft_gate(
    ratio: Tensor, advantage: Tensor, logprob: Tensor, low: float, high: float
) -> tuple[Tensor, Tensor]:
    """Return -(4 / tau) sigmoid(tau (r - 1)) A. Nothing is clipped: the slope fades out instead.

    4 / tau makes the slope that of -r A where r is 1.
    """
    # At advantage 0 either will do: the loss is 0.
    tau = torch.full_like(advantage, TAU_DOWN).masked_fill(advantage > 0, TAU)
    gate = torch.sigmoid(tau * (ratio - 1))
    return -4 / tau * gate * advantage, torch.zeros_like(ratio, dtype=torch.bool)


@dataclass(frozen=True)
class Loss:
    """What makes a kind of loss."""

    surrogate: (
        Callable  # (ratio, advantage, logprob, low, high), of tokens -> loss, where it is clipped
    )
    clip_low: float  # the paper's; the ratio is clipped to 1 - clip_low ...
    clip_high: float  # ... 1 + clip_high
    divided_by: Literal["tokens", "sequences", "sequences * max_tokens"]
    sequence_ratio: bool = False  # one ratio for all tokens of a sequence
    dual_clip: bool = True  # whether it takes one
    # What advantages are divided by, unless the caller says: the std of their group, nothing, or
    # the std of the batch (SCALES in kernels/rewards.py).
    advantage: Literal["std", "none", "batch"] = "std"

    @property
    def sequence_mean(self) -> bool:
        """Whether a token counts 1 / length of its sequence."""
        return self.divided_by == "sequences"


LOSSES = {
    "dapo": Loss(clipped_surrogate, 0.2, 0.3, "tokens"),
    "grpo": Loss(clipped_surrogate, 0.2, 0.2, "sequences"),
    "dr_grpo": Loss(clipped_surrogate, 0.2, 0.2, "sequences * max_tokens", advantage="none"),
    "gspo": Loss(clipped_surrogate, 3e-4, 4e-4, "sequences", sequence_ratio=True, dual_clip=False),
    # A ratio is never below 1 - 1: no lower clip.
    "cispo": Loss(clipped_weight, 1.0, 5.0, "tokens", dual_clip=False),
    "sapo": Loss(soft_gate, 1.0, math.inf, "sequences", dual_clip=False),
}


def clip_range(kind: str, clip_low: float | None, clip_high: float | None) -> tuple[float, float]:
    """Return what the ratio is clipped to; None stands for the paper's."""
    loss = LOSSES[kind]
    low = loss.clip_low if clip_low is None else clip_low
    high = loss.clip_high if clip_high is None else clip_high
    return 1 - low, 1 + high


# One number for all micro-batches and ranks, so that their losses add up to the loss of the step.
def _denominator(kind, tokens, sequences, max_tokens, denominator):
    divided_by = LOSSES[kind].divided_by
    if denominator is None:
        denominator = max(tokens if divided_by == "tokens" else sequences, 1)
    if divided_by == "sequences * max_tokens":
        denominator = denominator * max_tokens
    return denominator


def aggregate(
    values: Tensor,
    cu_seqlens: Tensor,
    kind: str,
    max_tokens: int | None = None,
    denominator: float | Tensor | None = None,
) -> Tensor:
    """Return what a loss of this kind makes of a number a token, values (T,): an entropy bonus.

    The sum over tokens, or over the sequences' means, divided as `policy_loss` divides.
    """
    if LOSSES[kind].sequence_mean:
        lengths = cu_seqlens.diff()
        values = values / torch.repeat_interleave(lengths, lengths, output_size=len(values))
    sequences = len(cu_seqlens) - 1
    return values.sum() / _denominator(kind, len(values), sequences, max_tokens, denominator)


# ---- The reference


def k3(d: Tensor) -> Tensor:
    """e^d - d - 1 of d = log p - log q: its mean over samples of q is KL(q || p)."""
    d = d.clamp(max=MAX_EXPONENT)
    return torch.expm1(d) - d


def _mean(x: Tensor) -> Tensor:
    # Summed in at least fp32: a bf16 sum stops growing at 256 ones.
    x = x.detach()
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.sum(dtype=wide) / max(len(x), 1)


def reference_policy_loss(
    logprob,
    old_logprob,
    advantage,
    cu_seqlens,
    *,
    kind="dapo",
    clip_low=None,
    clip_high=None,
    dual_clip=3.0,
    ref_logprob=None,
    kl=0.0,
    rollout_logprob=None,
    rollout_cap=2.0,
    max_tokens=None,
    denominator=None,
):
    """Specify `policy_loss`: fork here. The CPU runs this; tests say where Triton lags behind."""
    loss = LOSSES[kind]
    low, high = clip_range(kind, clip_low, clip_high)

    # Only logprob learns. In fp32 (or fp64), whatever the inputs are.
    dtype = torch.promote_types(logprob.dtype, torch.float32)
    logprob = logprob.to(dtype)
    old = old_logprob.detach().to(dtype)

    # Of each token: its sequence, that one's length and advantage. An empty sequence has no token.
    token = torch.arange(len(logprob), device=logprob.device, dtype=cu_seqlens.dtype)
    sequence = torch.searchsorted(cu_seqlens, token, right=True) - 1
    length = cu_seqlens.diff()[sequence]
    # (T,): a sequence's advantage at each of its tokens.
    A = advantage.detach().to(dtype)[sequence]

    # r = p / p_old, of a token; or the geometric mean over a sequence.
    log_ratio = logprob - old
    if loss.sequence_ratio:
        # Each token adds its share of the mean, so that no sequence needs a loop of its own.
        zeros = torch.zeros_like(advantage, dtype=dtype)
        mean = zeros.index_add(0, sequence, log_ratio / length)
        log_ratio = mean[sequence]
    ratio = log_ratio.clamp(max=MAX_EXPONENT).exp()

    token_loss, binds = loss.surrogate(ratio, A, logprob, low, high)

    # Without a bound, a bad token that has become likely (r >> 1, A < 0) would be all of the loss.
    if loss.dual_clip and dual_clip is not None:
        bound = -dual_clip * A
        token_loss = torch.where((A < 0) & (token_loss > bound), bound, token_loss)

    # Sampled by other numerics than trained: truncated importance weights.
    mismatch = torch.zeros_like(logprob)
    if rollout_logprob is not None:
        rollout = rollout_logprob.detach().to(dtype)
        token_loss = token_loss * (old - rollout).exp().clamp(max=rollout_cap)
        mismatch = k3(old - rollout)

    kl_terms = torch.zeros_like(logprob)
    if ref_logprob is not None:
        kl_terms = k3(ref_logprob.detach().to(dtype) - logprob)
    # Beside the surrogate and not in the reward, as in GRPO: so it is never clipped.
    token_loss = token_loss + kl * kl_terms

    if loss.sequence_mean:
        token_loss = token_loss / length
    total = token_loss.sum()
    divisor = _denominator(kind, len(logprob), len(advantage), max_tokens, denominator)

    metrics = {
        "kl": _mean(kl_terms),
        "clip_low": _mean(binds & (ratio < low)),
        "clip_high": _mean(binds & (ratio > high)),
        "ratio_max": torch.cat((ratio.detach(), ratio.new_zeros(1))).amax(),
        "mismatch_kl": _mean(mismatch),
        "tokens": torch.full((), float(len(logprob)), device=logprob.device),
    }
    return total / divisor, metrics


# ---- The kernels

# A forker edits the reference above first. What follows is the same once more, for CUDA, with the
# slope of each line written beside it, as no autograd runs through a kernel.
# The surrogates that `_surrogate` below has a branch for.
FUSED_SURROGATES = (clipped_surrogate, clipped_weight, soft_gate)


TAU_ = tl.constexpr(TAU)
TAU_DOWN_ = tl.constexpr(TAU_DOWN)


@triton.jit
def _load(pointer, i, mask):
    return tl.load(pointer + i, mask=mask, other=0).to(tl.float32)


@triton.jit
def _k3_kernel(d):
    """e^d - d - 1; near 0 by its series, as the difference would lose all digits."""
    d = tl.where(d > 80.0, 80.0, d)
    series = 1 / 720 + d * (1 / 5040)
    series = 1 / 120 + d * series
    series = 1 / 24 + d * series
    series = 1 / 6 + d * series
    series = 1 / 2 + d * series
    return tl.where(tl.abs(d) < 0.3, d * d * series, tl.exp(d) - d - 1)


@triton.jit
def _weight(old, rollout, cap):
    # tl.where and not tl.minimum: a nan has to come through, and a minimum may drop it.
    weight = tl.exp(old - rollout)
    return tl.where(weight > cap, cap, weight)


@triton.jit
def _sequence_kernel(
    logprob, old_logprob, rollout_logprob, cu_seqlens, out, sequences, cap, BLOCK: tl.constexpr
):
    """Take the means over one sequence a program, of logprob - old and of the weight (gspo)."""
    s = tl.program_id(0)
    start = tl.load(cu_seqlens + s)
    end = tl.load(cu_seqlens + s + 1)
    ratios = tl.zeros([BLOCK], tl.float32)
    weights = tl.zeros([BLOCK], tl.float32)
    # Sequences differ in length by a factor of a hundred: a loop, not a block that holds the
    # longest.
    for first in range(start, end, BLOCK):
        i = first + tl.arange(0, BLOCK)
        mask = i < end
        old = _load(old_logprob, i, mask)
        ratios += _load(logprob, i, mask) - old
        weight = tl.zeros([BLOCK], tl.float32) + 1.0
        if rollout_logprob is not None:
            weight = _weight(old, _load(rollout_logprob, i, mask), cap)
        # Lanes behind the end have loaded zeros: exp(0 - 0) would count as a weight of 1.
        weights += tl.where(mask, weight, 0.0)
    tl.store(out + s, tl.sum(ratios, 0) / (end - start))
    tl.store(out + sequences + s, tl.sum(weights, 0) / (end - start))


@triton.jit
def _surrogate(log_ratio, A, logprob, low, high, dual_clip, SURROGATE: tl.constexpr):
    """Return the loss before weights, its slope in logprob, the ratio, and where it is clipped."""
    ratio = tl.exp(tl.where(log_ratio > 80.0, 80.0, log_ratio))
    # constexpr: only one branch is compiled.
    if SURROGATE == "clipped_weight":
        binds = (ratio > high) & (A != 0)
        slope = -tl.where(ratio > high, high, ratio) * A
        loss = slope * logprob
    elif SURROGATE == "soft_gate":
        tau = tl.where(A > 0, TAU_, TAU_DOWN_)
        gate = 1 / (1 + tl.exp(-tau * (ratio - 1)))
        loss = -4 / tau * gate * A
        # dr/dlogprob = r; at the end of the exponents the gate is shut.
        slope = -4 * gate * (1 - gate) * ratio * A
        binds = ratio < 0
    else:
        clipped_ratio = tl.where(ratio > high, high, tl.where(ratio < low, low, ratio))
        unclipped = -ratio * A
        clipped = -clipped_ratio * A
        # max(-r A, -clip(r) A), and nan where r is nan: tl.maximum might drop it.
        binds = clipped > unclipped
        loss = tl.where(binds, clipped, unclipped)
        # dr/dlogprob = r; clipped, and at the end of the exponents, the loss is flat.
        slope = tl.where(binds | (log_ratio > 80.0), 0.0, unclipped)
        if dual_clip is not None:
            bounded = (A < 0) & (loss > -dual_clip * A)
            loss = tl.where(bounded, -dual_clip * A, loss)
            slope = tl.where(bounded, 0.0, slope)
    return loss, slope, ratio, binds


@triton.jit
def _sequence_of(i, mask, cu_seqlens, sequences, steps, BLOCK: tl.constexpr):
    """Return each token's sequence s, cu_seqlens[s] <= i < cu_seqlens[s + 1], by bisection."""
    s = tl.zeros([BLOCK], tl.int32)
    # bit_length(S) steps halve the range [s, after) to one sequence. Tokens of a block lie side by
    # side, so that nearly all loads come from the cache.
    after = tl.zeros([BLOCK], tl.int32) + sequences
    for _ in range(steps):
        middle = (s + after) // 2
        right = tl.load(cu_seqlens + middle, mask=mask, other=0) <= i
        s = tl.where(right, middle, s)
        after = tl.where(right, after, middle)
    return s


@triton.jit
def _token_kernel(
    logprob,
    old_logprob,
    advantage,
    cu_seqlens,
    ref_logprob,
    rollout_logprob,
    sequence_means,
    partial_sums,
    gradient,
    tokens,
    sequences,
    steps,
    low,
    high,
    dual_clip,
    kl,
    cap,
    SURROGATE: tl.constexpr,
    SEQUENCE_MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the gradient of one block of tokens, and the block's sums.

    Lanes beyond T read and add 0. sequence_means is `_sequence_kernel`'s, or None: token ratios.
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < tokens
    s = _sequence_of(i, mask, cu_seqlens, sequences, steps, BLOCK)
    # Lanes beyond T have some s; they load 0 and add 0.
    A = _load(advantage, s, mask)
    new = _load(logprob, i, mask)
    old = _load(old_logprob, i, mask)

    mismatch = tl.zeros([BLOCK], tl.float32)
    weight = mismatch + 1.0
    if rollout_logprob is not None:
        rollout = _load(rollout_logprob, i, mask)
        weight = _weight(old, rollout, cap)
        mismatch = _k3_kernel(old - rollout)

    # A sequence's ratio depends on each of its tokens alike, so each gets the mean of the weights.
    log_ratio = new - old
    slope_weight = weight
    if sequence_means is not None:
        log_ratio = _load(sequence_means, s, mask)
        slope_weight = _load(sequence_means + sequences, s, mask)
    # slope is dloss / dlogprob of the token: what the backward multiplies by the incoming gradient.
    loss, slope, ratio, binds = _surrogate(log_ratio, A, new, low, high, dual_clip, SURROGATE)
    # The weight carries no gradient.
    loss = loss * weight
    slope = slope * slope_weight

    k3 = tl.zeros([BLOCK], tl.float32)
    if ref_logprob is not None:
        d = _load(ref_logprob, i, mask) - new
        k3 = _k3_kernel(d)
        loss += kl * k3
        slope -= kl * tl.where(d > 80.0, 0.0, k3 + d)  # e^d - 1
    if SEQUENCE_MEAN:
        length = _load(cu_seqlens + 1, s, mask) - _load(cu_seqlens, s, mask)
        length = tl.maximum(length, 1.0)
        loss = loss / length
        slope = slope / length
    tl.store(gradient + i, slope, mask=mask)

    # Six numbers a block, each row contiguous for the finaliser. Atomics would add in any order,
    # and the loss would differ in its last bits from run to run.
    clipped_low = (binds & (ratio < low)).to(tl.float32)
    clipped_high = (binds & (ratio > high)).to(tl.float32)
    blocks = tl.num_programs(0)
    out = partial_sums + tl.program_id(0)
    tl.store(out, tl.sum(loss, 0))
    tl.store(out + blocks, tl.sum(k3, 0))
    tl.store(out + 2 * blocks, tl.sum(clipped_low, 0))
    tl.store(out + 3 * blocks, tl.sum(clipped_high, 0))
    tl.store(out + 4 * blocks, tl.sum(mismatch, 0))
    tl.store(out + 5 * blocks, tl.max(tl.where(mask, ratio, 0.0), 0))


@triton.jit
def _finaliser(partial_sums, out, blocks, tokens, BLOCK: tl.constexpr):
    """Add up the blocks' sums, in their order: the loss, the five metrics, T. One program."""
    # Row 0 is the loss, a sum; 1 to 4 are means over the tokens; 5 is a maximum.
    for row in tl.static_range(6):
        # A lane adds every BLOCK-th block's number, in fp32: 32,768 tokens are 128 blocks.
        total = tl.zeros([BLOCK], tl.float32)
        for first in range(0, blocks, BLOCK):
            i = first + tl.arange(0, BLOCK)
            x = _load(partial_sums + row * blocks, i, i < blocks)
            total = tl.maximum(total, x) if row == 5 else total + x
        if row == 0:
            value = tl.sum(total, 0)
        elif row == 5:
            value = tl.max(total, 0)
        else:
            value = tl.sum(total, 0) / tl.maximum(tokens, 1)
        tl.store(out + row, value)
    tl.store(out + 6, tl.zeros([], tl.float32) + tokens)  # a 1 comes as a Python int


METRICS = ("kl", "clip_low", "clip_high", "mismatch_kl", "ratio_max", "tokens")  # the finaliser's


class _PolicyLoss(torch.autograd.Function):
    """The sum of the token losses, before the denominator, and the finaliser's numbers."""

    @staticmethod
    def forward(ctx, logprob, old, advantage, cu_seqlens, ref, rollout, loss, clips, kl, cap):
        low, high, dual_clip = clips
        tokens = len(logprob)
        sequences = len(advantage)
        # The interpreter spends its time by operation and goes wrong on large tiles, so it gets
        # small ones.
        block = 32 if interpreted() else 256
        blocks = triton.cdiv(tokens, block)
        partial_sums = logprob.new_empty(6, blocks, dtype=torch.float32)
        gradient = logprob.new_empty(tokens, dtype=torch.float32)
        out = logprob.new_empty(7, dtype=torch.float32)
        means = None
        if loss.sequence_ratio and tokens:
            # Two rows: the mean of logprob - old, and that of the weights.
            means = logprob.new_empty(2, sequences, dtype=torch.float32)
            _sequence_kernel[(sequences,)](
                logprob, old, rollout, cu_seqlens, means, sequences, cap, BLOCK=block
            )
        if tokens:
            _token_kernel[(blocks,)](
                logprob,
                old,
                advantage,
                cu_seqlens,
                ref,
                rollout,
                means,
                partial_sums,
                gradient,
                tokens,
                sequences,
                sequences.bit_length(),
                low,
                high,
                dual_clip if loss.dual_clip else None,
                kl,
                cap,
                SURROGATE=loss.surrogate.__name__,
                SEQUENCE_MEAN=loss.sequence_mean,
                BLOCK=block,
            )
        # It runs without tokens, too: a rank whose groups were all filtered out still reports
        # zeros.
        _finaliser[(1,)](partial_sums, out, blocks, tokens, BLOCK=block)
        # The gradient is finished here, so that the backward is one product, and nothing else is
        # kept.
        ctx.save_for_backward(gradient)
        ctx.dtype = logprob.dtype
        ctx.mark_non_differentiable(out)
        # A copy: an output that is a view of another one can't be differentiated by itself.
        return out[0].clone(), out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        (gradient,) = ctx.saved_tensors
        return (gradient * grad).to(ctx.dtype), *[None] * 9


# ---- The public call


def _check(logprob, advantage, cu_seqlens, kind, kl, max_tokens, others):
    """others: old, ref and rollout log-probs, the last two of which may be None."""
    if kind not in LOSSES:
        raise ValueError(f"unknown loss kind {kind!r}: one of {', '.join(LOSSES)}")
    if LOSSES[kind].divided_by == "sequences * max_tokens" and max_tokens is None:
        raise ValueError(f"{kind} divides by max_tokens, the longest completion allowed: give it")
    old, ref, rollout = others
    if kl and ref is None:
        raise ValueError(f"kl={kl} needs ref_logprob")
    given = [x for x in (logprob, old, ref, rollout) if x is not None]
    wrong = [x for x in given if x.shape != (len(logprob),)]
    if wrong or cu_seqlens.shape != (len(advantage) + 1,):
        shapes = [list(x.shape) for x in (*given, advantage, cu_seqlens)]
        raise ValueError(f"log-probs must be [T], advantage [S], cu_seqlens [S + 1]: got {shapes}")
    if cu_seqlens.is_cuda:
        return  # looking would stop the host
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != len(logprob) or (cu_seqlens.diff() < 0).any():
        raise ValueError(f"cu_seqlens must rise from 0 to {len(logprob)}: {cu_seqlens.tolist()}")


def policy_loss(
    logprob: Tensor,
    old_logprob: Tensor,
    advantage: Tensor,
    cu_seqlens: Tensor,
    *,
    kind: str = "dapo",
    clip_low: float | None = None,
    clip_high: float | None = None,
    dual_clip: float | None = 3.0,
    ref_logprob: Tensor | None = None,
    kl: float = 0.0,
    rollout_logprob: Tensor | None = None,
    rollout_cap: float = 2.0,
    max_tokens: int | None = None,
    denominator: float | Tensor | None = None,
    fused: bool = True,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of logprob[T], old_logprob[T] and each sequence's advantage[S], and metrics.

    Differentiable in logprob only. clip_low, clip_high: None for those of the kind's paper, in
    LOSSES. fused=False runs the reference on any device. metrics: detached 0-dim tensors on the
    device (no host sync), means over this call's tokens: kl, clip_low, clip_high, ratio_max,
    mismatch_kl; and tokens, to weigh them with. What is not given yields 0.
    """
    others = (old_logprob, ref_logprob, rollout_logprob)
    _check(logprob, advantage, cu_seqlens, kind, kl, max_tokens, others)
    if not (fused and on_triton(logprob)) or logprob.dtype == torch.float64:
        return reference_policy_loss(
            logprob,
            old_logprob,
            advantage,
            cu_seqlens,
            kind=kind,
            clip_low=clip_low,
            clip_high=clip_high,
            dual_clip=dual_clip,
            ref_logprob=ref_logprob,
            kl=kl,
            rollout_logprob=rollout_logprob,
            rollout_cap=rollout_cap,
            max_tokens=max_tokens,
            denominator=denominator,
        )
    loss = LOSSES[kind]
    if loss.surrogate not in FUSED_SURROGATES:
        raise ValueError(
            f"the fused kernel does not know the loss {kind!r}: --no-fused-loss (fused=False) runs "
            f"its reference"
        )
    constants = []
    for x in (old_logprob, advantage, cu_seqlens, ref_logprob, rollout_logprob):
        # Parts of a joint tensor come with strides, and the kernel counts in elements.
        constants.append(None if x is None else x.detach().contiguous())
    clips = (*clip_range(kind, clip_low, clip_high), dual_clip)
    total, out = _PolicyLoss.apply(logprob.contiguous(), *constants, loss, clips, kl, rollout_cap)
    divisor = _denominator(kind, len(logprob), len(advantage), max_tokens, denominator)
    return total / divisor, dict(zip(METRICS, out[1:].unbind(), strict=True))
