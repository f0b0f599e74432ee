"""Policy-gradient loss over flat packed completions: five kinds, metrics, the gradient in closed
form.

    r = exp(logprob - old)      (gspo: exp of its mean over the sequence)      A: the sequence's advantage
    dapo, grpo, dr_grpo   l = max(-r A, -clip(r, 1 - clip_low, 1 + clip_high) A); A < 0: at most -dual_clip A
    gspo                  the same without the dual clip
    cispo                 l = -stopgrad(min(r, 1 + clip_high)) A logprob
    a token's loss        stopgrad(min(exp(old - rollout), rollout_cap)) l + kl (e^d - d - 1), d = ref - new
    dapo, cispo           sum over tokens / denominator (T)
    grpo, gspo            sum over sequences of the mean over their tokens / denominator (S)
    dr_grpo               sum over tokens / (denominator (S) max_tokens)

The caller gives the global denominator, a number or a 0-dim tensor, so that micro-batches and ranks
add up exactly. Exponents end at 80: e^80 is finite in fp32 and beyond every clip, while inf * 0
would make a clipped token's gradient nan. nan itself is passed on, for the training script to stop
at.

Why fuse: 24 bytes a token, so 32,768 tokens are under 1 MB and all the time is launches. Eager
PyTorch makes about sixty, forward and backward; here it is a token kernel, which also yields
dlogprob, and a one-block finaliser (gspo: a pass over sequences before). No atomics: sums have one
order, every run the same bits. Time on a GPU: not measured yet (`python -m bench.kernels --only
policy_loss`).

Shapes: T tokens of all completions, one after the other; S sequences; cu_seqlens[s] is where s
starts.
"""

import os

import torch
import triton
import triton.language as tl

KINDS = ("dapo", "grpo", "dr_grpo", "gspo", "cispo")
CAP = 80.0
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"


def _k3(d):
    return torch.expm1(d.clamp(max=CAP)) - d.clamp(max=CAP)


def _mean(x):
    return x.detach().sum(dtype=torch.promote_types(x.dtype, torch.float32)) / max(len(x), 1)


def reference_policy_loss(
    logprob,
    old_logprob,
    advantage,
    cu_seqlens,
    *,
    kind="dapo",
    clip_low=0.2,
    clip_high=0.3,
    dual_clip=3.0,
    ref_logprob=None,
    kl=0.0,
    rollout_logprob=None,
    rollout_cap=2.0,
    max_tokens=None,
    denominator=None,
):
    """The specification. Fork here: the CPU runs this, and the tests say when Triton lags
    behind."""
    wide, zero = torch.promote_types(logprob.dtype, torch.float32), torch.zeros_like(logprob)
    new, constants = logprob.to(wide), (old_logprob, advantage, ref_logprob, rollout_logprob)
    old, A, ref, rollout = (None if x is None else x.detach().to(wide) for x in constants)
    token = torch.arange(len(new), device=new.device, dtype=cu_seqlens.dtype)
    # an empty sequence owns no token
    sequence = torch.searchsorted(cu_seqlens, token, right=True) - 1
    length, A, d = cu_seqlens.diff()[sequence], A[sequence], new - old
    if kind == "gspo":
        d = torch.zeros_like(advantage, dtype=wide).index_add(0, sequence, d / length)[sequence]
    r = d.clamp(max=CAP).exp()
    plain, clipped = -r * A, -r.clamp(1 - clip_low, 1 + clip_high) * A
    bound = clipped > plain
    loss = torch.where(bound, clipped, plain)
    if kind == "cispo":
        bound, loss = (r > 1 + clip_high) & (A != 0), -r.detach().clamp(max=1 + clip_high) * A * new
    elif kind != "gspo" and dual_clip is not None:
        loss = torch.where((A < 0) & (loss > -dual_clip * A), -dual_clip * A, loss)
    if rollout is not None:
        loss = loss * (old - rollout).exp().clamp(max=rollout_cap)
    k3, mismatch = (
        zero if ref is None else _k3(ref - new),
        zero if rollout is None else _k3(old - rollout),
    )
    loss = (loss + kl * k3) / (length if kind in ("grpo", "gspo") else 1)
    low = bound & (A < 0) & (kind != "cispo")
    metrics = {
        "kl": _mean(k3),
        "clip_low": _mean(low),
        "clip_high": _mean(bound & ~low),
        "ratio_max": torch.cat((r.detach(), r.new_zeros(1))).amax(),
        "mismatch_kl": _mean(mismatch),
        "tokens": torch.full((), float(len(new)), device=new.device),
    }
    return loss.sum() / _denominator(
        kind, len(new), len(advantage), max_tokens, denominator
    ), metrics


def _denominator(kind, tokens, sequences, max_tokens, denominator):
    if denominator is None:
        denominator = max(tokens if kind in ("dapo", "cispo") else sequences, 1)
    return denominator * (max_tokens if kind == "dr_grpo" else 1)


@triton.jit
def _load(pointer, i, mask):
    return tl.load(pointer + i, mask=mask, other=0).to(tl.float32)


@triton.jit
def _k3_kernel(d):
    """e^d - d - 1; near 0 its series, as the difference would lose all digits."""
    d = tl.where(d > 80.0, 80.0, d)
    series = (
        d
        * d
        * (1 / 2 + d * (1 / 6 + d * (1 / 24 + d * (1 / 120 + d * (1 / 720 + d * (1 / 5040))))))
    )
    return tl.where(tl.abs(d) < 0.3, series, tl.exp(d) - d - 1)


@triton.jit
def _weight(old, rollout, cap):
    w = tl.exp(old - rollout)
    return tl.where(w > cap, cap, w)


@triton.jit
def _sequence_kernel(new, old, rollout, cu, out, sequences, cap, BLOCK: tl.constexpr):
    """gspo, a program a sequence: the means over its tokens of logprob - old and of the weight."""
    s = tl.program_id(0)
    start, end = tl.load(cu + s), tl.load(cu + s + 1)
    d, w = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for at in range(start, end, BLOCK):
        i, mask = at + tl.arange(0, BLOCK), at + tl.arange(0, BLOCK) < end
        o = _load(old, i, mask)
        d += _load(new, i, mask) - o
        w += tl.where(
            mask, _weight(o, _load(rollout, i, mask), cap) if rollout is not None else 1.0, 0.0
        )
    tl.store(out + s, tl.sum(d, 0) / (end - start))
    tl.store(out + sequences + s, tl.sum(w, 0) / (end - start))


@triton.jit
def _surrogate(r, d, A, n, low, high, dual, KIND: tl.constexpr):
    """The loss before weights, its derivative in logprob, and whether the clip binds."""
    plain, clipped = -r * A, -tl.where(r > high, high, tl.where(r < low, low, r)) * A
    bound = clipped > plain
    loss, slope = tl.where(bound, clipped, plain), tl.where(bound | (d > 80.0), 0.0, plain)
    if KIND == "cispo":
        bound, slope = (r > high) & (A != 0), -tl.where(r > high, high, r) * A
        loss = slope * n
    elif KIND != "gspo" and dual is not None:
        over = (A < 0) & (loss > -dual * A)
        loss, slope = tl.where(over, -dual * A, loss), tl.where(over, 0.0, slope)
    return loss, slope, bound


@triton.jit
def _token_kernel(
    new,
    old,
    advantage,
    cu,
    ref,
    rollout,
    means,
    partial,
    slope_out,
    tokens,
    sequences,
    steps,
    low,
    high,
    dual,
    kl,
    cap,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program a block of tokens: their dlogprob, and the block's sums (lanes beyond T read and
    add 0)."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < tokens
    s, after = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32) + sequences
    for _ in range(steps):  # bisection: cu[s] <= i < cu[after]
        middle = (s + after) // 2
        right = tl.load(cu + middle, mask=mask, other=0) <= i
        s, after = tl.where(right, middle, s), tl.where(right, after, middle)
    A, n, o = _load(advantage, s, mask), _load(new, i, mask), _load(old, i, mask)
    d, k3, mismatch = n - o, tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    w = mismatch + 1.0
    if rollout is not None:
        b = _load(rollout, i, mask)
        w, mismatch = _weight(o, b, cap), _k3_kernel(o - b)
    slope_w = w
    if KIND == "gspo":
        d, slope_w = _load(means, s, mask), _load(means + sequences, s, mask)
    r = tl.exp(tl.where(d > 80.0, 80.0, d))
    loss, slope, bound = _surrogate(r, d, A, n, low, high, dual, KIND)
    loss, slope = loss * w, slope * slope_w
    if ref is not None:
        gap = _load(ref, i, mask) - n
        k3 = _k3_kernel(gap)
        loss, slope = loss + kl * k3, slope - kl * tl.where(gap > 80.0, 0.0, k3 + gap)
    if KIND == "grpo" or KIND == "gspo":
        length = tl.maximum(_load(cu + 1, s, mask) - _load(cu, s, mask), 1.0)
        loss, slope = loss / length, slope / length
    tl.store(slope_out + i, slope, mask=mask)
    clip_low = bound & (A < 0) & (KIND != "cispo")
    at, blocks = partial + tl.program_id(0), tl.num_programs(0)
    tl.store(at, tl.sum(loss, 0))
    tl.store(at + blocks, tl.sum(k3, 0))
    tl.store(at + 2 * blocks, tl.sum(clip_low.to(tl.float32), 0))
    tl.store(at + 3 * blocks, tl.sum((bound & (clip_low == 0)).to(tl.float32), 0))
    tl.store(at + 4 * blocks, tl.sum(mismatch, 0))
    tl.store(at + 5 * blocks, tl.max(tl.where(mask, r, 0.0), 0))


@triton.jit
def _finaliser(partial, out, blocks, tokens, BLOCK: tl.constexpr):
    """One program: the blocks' sums, in order -> loss, kl, clip_low, clip_high, mismatch_kl,
    ratio_max, T."""
    for row in tl.static_range(6):
        total = tl.zeros([BLOCK], tl.float32)
        for at in range(0, blocks, BLOCK):
            x = _load(
                partial + row * blocks, at + tl.arange(0, BLOCK), at + tl.arange(0, BLOCK) < blocks
            )
            total = tl.maximum(total, x) if row == 5 else total + x
        value = tl.max(total, 0) if row == 5 else tl.sum(total, 0)
        tl.store(out + row, value if row == 0 or row == 5 else value / tl.maximum(tokens, 1))
    tl.store(out + 6, tl.zeros([], tl.float32) + tokens)  # a 1 comes as a Python int


class _PolicyLoss(torch.autograd.Function):
    """The sum of the token losses, before the denominator, and the finaliser's numbers."""

    @staticmethod
    def forward(ctx, new, old, advantage, cu, ref, rollout, kind, low, high, dual, kl, cap):
        t, s, block, means = len(new), len(advantage), 32 if INTERPRET else 256, None
        blocks, empty = (
            triton.cdiv(t, block),
            lambda *shape: new.new_empty(shape, dtype=torch.float32),
        )
        partial, slope, out = empty(6, blocks), empty(t), empty(7)
        if kind == "gspo" and t:
            means = empty(2, s)
            _sequence_kernel[(s,)](new, old, rollout, cu, means, s, cap, BLOCK=block)
        if t:
            _token_kernel[(blocks,)](
                new,
                old,
                advantage,
                cu,
                ref,
                rollout,
                means,
                partial,
                slope,
                t,
                s,
                s.bit_length(),
                low,
                high,
                dual,
                kl,
                cap,
                KIND=kind,
                BLOCK=block,
            )
        _finaliser[(1,)](partial, out, blocks, t, BLOCK=block)
        ctx.save_for_backward(slope)
        ctx.dtype = new.dtype
        ctx.mark_non_differentiable(out)
        return out[0].clone(), out

    @staticmethod
    def backward(ctx, grad, _):
        return (ctx.saved_tensors[0] * grad).to(ctx.dtype), *[None] * 11


def _check(
    logprob, old_logprob, advantage, cu_seqlens, kind, ref_logprob, kl, rollout_logprob, max_tokens
):
    if kind not in KINDS:
        raise ValueError(f"unknown loss kind {kind!r}: one of {', '.join(KINDS)}")
    if kind == "dr_grpo" and max_tokens is None:
        raise ValueError("dr_grpo divides by max_tokens, the longest completion allowed: give it")
    if kl and ref_logprob is None:
        raise ValueError(f"kl={kl} needs ref_logprob")
    given = [x for x in (logprob, old_logprob, ref_logprob, rollout_logprob) if x is not None]
    shapes = [list(x.shape) for x in (*given, advantage, cu_seqlens)]
    if any(x.shape != (len(logprob),) for x in given) or cu_seqlens.shape != (len(advantage) + 1,):
        raise ValueError(f"log-probs must be [T], advantage [S], cu_seqlens [S + 1]: got {shapes}")
    if not cu_seqlens.is_cuda:  # on CUDA this would stop the host
        if cu_seqlens[0] != 0 or cu_seqlens[-1] != len(logprob) or (cu_seqlens.diff() < 0).any():
            raise ValueError(
                f"cu_seqlens must rise from 0 to {len(logprob)}: {cu_seqlens.tolist()}"
            )


def policy_loss(
    logprob: torch.Tensor,
    old_logprob: torch.Tensor,
    advantage: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    kind: str = "dapo",
    clip_low: float = 0.2,
    clip_high: float = 0.3,
    dual_clip: float | None = 3.0,
    ref_logprob: torch.Tensor | None = None,
    kl: float = 0.0,
    rollout_logprob: torch.Tensor | None = None,
    rollout_cap: float = 2.0,
    max_tokens: int | None = None,
    denominator: float | torch.Tensor | None = None,
):
    """(loss, metrics) of logprob[T] against old_logprob[T], with the advantage[S] of each sequence.

    Differentiable in logprob only. metrics: detached 0-dim tensors on the device (no host sync),
    means over this call's tokens: kl, clip_low, clip_high, ratio_max, mismatch_kl; and tokens, to
    weigh them with. What is not given yields 0.
    """
    _check(
        logprob,
        old_logprob,
        advantage,
        cu_seqlens,
        kind,
        ref_logprob,
        kl,
        rollout_logprob,
        max_tokens,
    )
    if not (logprob.is_cuda or INTERPRET) or logprob.dtype == torch.float64:
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
    constants = (old_logprob, advantage, cu_seqlens, ref_logprob, rollout_logprob)
    total, out = _PolicyLoss.apply(
        logprob.contiguous(),
        *(None if x is None else x.detach().contiguous() for x in constants),
        kind,
        1 - clip_low,
        1 + clip_high,
        dual_clip,
        kl,
        rollout_cap,
    )
    names = "kl", "clip_low", "clip_high", "mismatch_kl", "ratio_max", "tokens"
    loss = total / _denominator(kind, len(logprob), len(advantage), max_tokens, denominator)
    return loss, dict(zip(names, out[1:].unbind(), strict=True))
