"""What stands between a decoder's matrix products: RMSNorm, SwiGLU, QK-norm and mRoPE.

    rms_norm              y = x / sqrt(mean(x^2) + eps) * (offset + weight), over the last axis
    add_rms_norm          h = x + delta,  y = rms_norm(h)
    swiglu                gate * sigmoid(gate) * up
    swiglu_joint          the same of (gate, up) side by side, for decoding
    qk_norm_rope          n = rms_norm of a head (Qwen3), or the head itself (Qwen2, 2.5);
                          with its halves, (n_1 cos - n_2 sin, n_2 cos + n_1 sin); where cos and sin
                          are narrower than a head, so much of its front turns, and the rest stays
    qk_norm_rope_write    the same for decoding: the new keys and values go straight into the cache

cos and sin hold mRoPE already: the model makes them once a forward for all layers, from the axis
(time, row, column) that each frequency listens to.

Why fuse: it is all memory traffic. T = 8192 tokens of H = 4096 are 67 MB in bf16, 22 us at the 3.0
TB/s that an H100 copies. Eager PyTorch passes over memory about ten times for an RMSNorm in bf16
(casts, square, mean, products) where two passes are enough (backward three), five times for SwiGLU
where three are enough, about thirty times for both norms and rotations of q and k where two are
enough.

On CUDA the norms and SwiGLU are Liger's kernels. Ours is what Liger lacks: mRoPE with QK-norm,
forward and backward, over packed tokens in one launch, and the same that writes into a cache; fp32
in registers, rounded once, at the end. `python -m bench.kernels --only layers` sets all of them
beside PyTorch and torch.compile; no GPU has run it yet. On a CPU the references run, but for
RMSNorm (`torch_norm` and `_norm_grad_torch` say why); so they do under TRITON_INTERPRET=1 for what
is Liger's.

Shapes: T tokens; H width; A query heads, K key-value heads, D head width; a row is a token, or its
head.
"""

import functools
import sys

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import interpreted, on_triton, tl, triton

# Elements of a tile (at least a row): the interpreter pays by the operation.
TILE = 2048
INTERPRETED_TILE = 1 << 14
# At most so many sum up a weight's gradient: a guess, four to an H100's multiprocessor.
PROGRAMS = 4 * 132
# Liger's casting mode: all in fp32, rounded once. ("llama" rounds twice, as transformers does for
# Qwen: in bf16 an error 1.4 times as large, and twice as large in the weight's gradient.)
ROUND_ONCE = "gemma"


# ---- The references


def reference_rms_norm(x, weight, eps=1e-6, offset=0.0):
    """Norm as transformers does: 16 bits are rounded before the product with the weight, too.

    Not so with an offset (Qwen3.5), where all is fp32 and rounded once.
    """
    if x.dtype in (torch.float32, torch.float64):
        return F.rms_norm(x, weight.shape, add_offset(weight, offset), eps)
    wide = x.float()
    # (..., 1): one number a row.
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if offset:
        return (wide * scale * add_offset(weight, offset)).to(x.dtype)
    return weight * (wide * scale).to(x.dtype)


def add_offset(weight, offset):
    """Return offset + weight, in fp32 at least: 1 + 0.001 would be 1 in 16 bits."""
    if not offset:
        return weight
    return weight.to(torch.promote_types(weight.dtype, torch.float32)) + offset


def reference_add_rms_norm(x, delta, weight, eps=1e-6, offset=0.0):
    h = x + delta
    return h, reference_rms_norm(h, weight, eps, offset)


def reference_swiglu(gate, up):
    return F.silu(gate) * up


def reference_swiglu_joint(gate_up):
    return reference_swiglu(*gate_up.chunk(2, -1))


def reference_qk_norm_rope(q, k, cos, sin, q_weight=None, k_weight=None, eps=1e-6, offset=0.0):
    rotary = cos.shape[-1]

    def rotate(x, weight):
        if weight is not None:
            x = reference_rms_norm(x, weight, eps, offset)
        front = x[..., :rotary]
        # Halves, not even and odd places: the layout of Hugging Face's checkpoints.
        first, second = front.chunk(2, -1)
        turned = front * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]
        turned = turned.to(x.dtype)  # cos and sin may be wider
        if rotary == x.shape[-1]:
            return turned
        return torch.cat((turned, x[..., rotary:]), -1)

    return rotate(q, q_weight), rotate(k, k_weight)


def reference_qk_norm_rope_write(
    q, k, v, cos, sin, cache_k, cache_v, at, q_weight=None, k_weight=None, eps=1e-6, offset=0.0
):
    q, k = reference_qk_norm_rope(q, k, cos, sin, q_weight, k_weight, eps, offset)
    # Slot i writes at its own place at[i]: samples differ in length.
    # Two indices around a slice: the result has shape (S, K, D), whatever the cache's order of
    # axes.
    row = torch.arange(len(at), device=at.device)
    cache_k[row, :, at] = k
    cache_v[row, :, at] = v
    return q


# ---- RMSNorm on a CPU


def torch_norm(x, delta, weight, eps):
    """Return the residual stream h, and y, for any weights that can be multiplied with x.

    Rounded as the reference is, in half as many operations as F.rms_norm has on a CPU.
    """
    h = x if delta is None else x + delta
    wide = torch.promote_types(x.dtype, torch.float32)
    # |h|^2 / H + eps: one reduction and one fused product instead of square, mean and sum.
    norm = torch.linalg.vector_norm(h, dim=-1, keepdim=True, dtype=wide)
    square = torch.addcmul(norm.new_full((), eps), norm, norm, value=1 / x.shape[-1])
    return h, (h * square.rsqrt_()).to(x.dtype).mul_(weight)


def _norm_grad_torch(h, weight, d_out, d_summed, eps):
    """Return d_h and d_weight in closed form, as `_norm_grad_kernel` has it.

    Autograd's chain of small operators takes 2.9 times as long (one core, T = 3000, H = 128, 4.6
    ms). d_summed: the gradient that h gets as the residual stream, or None.
    """
    # d_h = scale (g - n mean(g n)) with n = h scale: the kernel's formula.
    # The header's formula comes from y = w h (mean h^2 + eps)^(-1/2), by the product rule.
    n = h.to(torch.promote_types(h.dtype, torch.float32))
    scale = (n.square().mean(-1, keepdim=True) + eps).rsqrt_()
    n = n * scale
    g = d_out * weight.to(n.dtype)
    mean = (g * n).mean(-1, keepdim=True)
    d_h = (g - n * mean).mul_(scale)
    d_weight = (d_out * n).flatten(0, -2).sum(0)
    if d_summed is not None:
        d_h.add_(d_summed)
    return d_h.to(h.dtype), d_weight


class _Norm(torch.autograd.Function):
    """RMSNorm on a CPU: h and y; without delta y alone."""

    @staticmethod
    def forward(ctx, x, delta, weight, eps):
        ctx.eps = eps
        ctx.adds = delta is not None
        h, out = torch_norm(x, delta, weight, eps)
        ctx.save_for_backward(h, weight)
        return (h, out) if ctx.adds else out

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        h, weight = ctx.saved_tensors
        d_summed = grads[0] if ctx.adds else None
        d_h, d_weight = _norm_grad_torch(h, weight, grads[-1], d_summed, ctx.eps)
        return d_h, d_h if ctx.adds else None, d_weight.to(weight.dtype), None


# ---- QK-norm and mRoPE: a row is a head of a token, half is D / 2


@triton.jit
def _load(pointer, at, mask):
    return tl.load(pointer + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _normed_and_turned(
    x,
    weight,
    cos,
    sin,
    row,
    token,
    mask,
    width,
    rotary,
    eps,
    offset,
    WIDE: tl.constexpr,
    BACK: tl.constexpr,
):
    """Return heads (ROWS, WIDE), normed and rotated, in fp32.

    row (ROWS, 1): where each head starts in x; token (ROWS,): whose angle it turns by. Each channel
    is read with its partner, half of `rotary` away, with which it turns; channels from `rotary` on
    don't. Without weight no norm; BACK: by the opposite angle.
    """
    c = tl.arange(0, WIDE)[None, :]
    y = _load(x, row + c, mask)
    scale = 1.0
    if weight is not None:
        # Padding behind the head is 0, so that it adds nothing to the sum.
        scale = tl.rsqrt(tl.sum(y * y, 1) / width + eps)[:, None]
        y = y * scale * (_load(weight, c, c < width) + offset)
    # A second read instead of a shuffle between threads: the line is in the cache already.
    partner = tl.where(c < rotary // 2, c + rotary // 2, c - rotary // 2)
    turns = mask & (c < rotary)
    other = _load(x, row + partner, turns)
    if weight is not None:
        # The norm is the head's, so that the partner has the same scale, but a weight of its own.
        other = other * scale * (_load(weight, partner, c < rotary) + offset)
    # (a, b) -> (a cos - b sin, b cos + a sin). cos and sin repeat in their second half.
    angle = (token * rotary)[:, None] + c
    # Channels that don't turn: cos 1 and sin 0 leave them as they are.
    cosine = tl.load(cos + angle, mask=turns, other=1.0).to(tl.float32)
    sine = _load(sin, angle, turns)
    if BACK:
        sine = -sine
    return y * cosine + tl.where(c < rotary // 2, -other, other) * sine


def _tile() -> int:
    return INTERPRETED_TILE if interpreted() else TILE


@triton.jit
def _norm_grad_kernel(
    h,
    weight,
    d_out,
    d_h,
    partial,
    rows,
    width,
    eps,
    offset,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Take the norm's gradient, of heads. With n = h scale, g = d_out (offset + weight):

        d_h = scale (g - n mean(g n)),  d_weight = sum d_out n

    A program walks over many rows and keeps its share of d_weight: no atomics, the same bits every
    run.
    """
    c = tl.arange(0, BLOCK)
    # (1, BLOCK), read once by the program and used for all of its rows.
    w = _load(weight, c, c < width)[None, :] + offset
    # In registers over all rows that the program takes.
    d_weight = tl.zeros([BLOCK], tl.float32)
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        r = first + tl.arange(0, ROWS)
        mask = (r < rows)[:, None] & (c < width)[None, :]
        # int64, as in the forward.
        at = r.to(tl.int64)[:, None] * width + c[None, :]
        n = _load(h, at, mask)
        d = _load(d_out, at, mask)
        scale = tl.rsqrt(tl.sum(n * n, 1) / width + eps)[:, None]
        n = n * scale
        g = d * w
        d_weight += tl.sum(d * n, 0)
        mean = (tl.sum(g * n, 1) / width)[:, None]
        tl.store(d_h + at, scale * (g - n * mean), mask=mask)
    # A row a program: summed by the caller, in the same order every time.
    tl.store(partial + tl.program_id(0) * width + c, d_weight, mask=c < width)


def _norm_grad_triton(h, weight, d_out, eps, offset):
    """Return d_h and d_weight of heads h (T, heads, D) and their gradient, contiguous both."""
    width = len(weight)
    rows = h.numel() // width
    block = triton.next_power_of_2(width)
    tile = max(_tile() // block, 1)
    # Few enough that adding up `partial` costs nothing, enough to fill the device.
    programs = min(triton.cdiv(rows, tile), PROGRAMS)
    d_h = torch.empty_like(h)
    partial = h.new_empty(programs, width, dtype=torch.float32)
    _norm_grad_kernel[(programs,)](
        h,
        weight,
        d_out,
        d_h,
        partial,
        rows,
        width,
        eps,
        offset,
        ROWS=tile,
        BLOCK=block,
        num_warps=8,
    )
    return d_h, partial.sum(0)


@triton.jit
def _rope_kernel(
    q,
    k,
    v,
    cos,
    sin,
    q_weight,
    k_weight,
    at,
    q_out,
    k_out,
    v_out,
    tokens,
    q_heads,
    k_heads,
    q_token,
    q_head,
    k_token,
    v_token,
    out_token,
    out_head,
    out_place,
    width,
    rotary,
    eps,
    offset,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
    BACK: tl.constexpr,
):
    """Rotate queries in programs (i, 0) and keys in (i, 1); copy values in (i, 2).

    x_token, x_head, out_place: strides; at: each token's place in a cache. A program takes ROWS
    heads of neighbouring tokens.
    """
    part = tl.program_id(1)
    heads = tl.where(part == 0, q_heads, k_heads)
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, WIDE)[None, :]
    # int64: T heads D passes 2^31 elements at 500k tokens.
    token = (r // heads).to(tl.int64)
    head = r % heads
    is_row = r < tokens * heads
    mask = is_row[:, None] & (c < width)
    if part == 0:
        row = (token * q_token + head * q_head)[:, None]
        y = _normed_and_turned(
            q, q_weight, cos, sin, row, token, mask, width, rotary, eps, offset, WIDE, BACK
        )
        # The queries of a call lie one behind the other, wherever q came from.
        place = ((token * q_heads + head) * width)[:, None] + c
        tl.store(q_out + place, y, mask=mask)
    else:
        first = token * out_token + head * out_head
        if at is not None:
            # A cache's row: (heads, places, D).
            first += tl.load(at + token, mask=is_row, other=0) * out_place
        place = first[:, None] + c
        if part == 1:
            row = (token * k_token + head * width)[:, None]
            y = _normed_and_turned(
                k, k_weight, cos, sin, row, token, mask, width, rotary, eps, offset, WIDE, BACK
            )
            tl.store(k_out + place, y, mask=mask)
        elif v is not None:
            row = (token * v_token + head * width)[:, None]
            tl.store(v_out + place, tl.load(v + row + c, mask=mask), mask=mask)


def _with_adjacent_heads(x: Tensor) -> Tensor:
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()


def _rope_triton(
    q, k, cos, sin, q_weight, k_weight, eps, offset, k_out, v=None, v_out=None, at=None, back=False
):
    """Return the queries; write keys and values to k_out and v_out (T, K, [places,] D).

    Of k and v the heads of a token lie together, as in parts of a joint projection; tokens, and
    heads of q, may lie anywhere.
    """
    tokens, heads, width = q.shape
    k_heads = k.shape[1]
    q = q if q.stride(2) == 1 else q.contiguous()
    k = _with_adjacent_heads(k)
    v = None if v is None else _with_adjacent_heads(v)
    q_out = q.new_empty(q.shape)
    # A tile's sides are powers of two; published heads, of 128 and 256 channels, are as well.
    wide = triton.next_power_of_2(width)
    rows = max(_tile() // wide, 1)
    # 2,048 elements a program: 16 heads of 128 channels.
    blocks = triton.cdiv(tokens * max(heads, k_heads), rows)
    # Keys and values take as many programs as queries, although they have fewer rows: those beyond
    # do nothing, and one launch is cheaper than three.
    _rope_kernel[blocks, 2 if v is None else 3](
        q,
        k,
        v,
        cos,
        sin,
        q_weight,
        k_weight,
        at,
        q_out,
        k_out,
        v_out,
        tokens,
        heads,
        k_heads,
        *q.stride()[:2],
        k.stride(0),
        0 if v is None else v.stride(0),
        *k_out.stride()[:2],
        0 if at is None else k_out.stride(2),
        width,
        cos.shape[1],
        eps,
        offset,
        ROWS=rows,
        WIDE=wide,
        BACK=back,
        num_warps=8,
    )
    return q_out


class _Rope(torch.autograd.Function):
    """Backward: the rotation by the opposite angle, which is its inverse; then the norm's own."""

    @staticmethod
    def forward(ctx, q, k, cos, sin, q_weight, k_weight, eps, offset):
        cos = cos.contiguous()
        sin = sin.contiguous()
        # The rotation is undone by its angle alone; the norm needs what went in.
        normed = () if q_weight is None else (q, k, q_weight, k_weight)
        ctx.save_for_backward(cos, sin, *normed)
        ctx.eps = eps
        ctx.offset = offset
        k_out = k.new_empty(k.shape)
        q_out = _rope_triton(q, k, cos, sin, q_weight, k_weight, eps, offset, k_out)
        return q_out, k_out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_q, d_k):
        # Once: under non-reentrant checkpointing saved tensors can be unpacked a single time.
        cos, sin, *normed = ctx.saved_tensors
        eps = ctx.eps
        offset = ctx.offset
        turned_k = d_k.new_empty(d_k.shape)
        turned_q = _rope_triton(d_q, d_k, cos, sin, None, None, eps, offset, turned_k, back=True)
        if not normed:
            return turned_q, turned_k, *[None] * 6
        q, k, q_weight, k_weight = normed
        # (T, heads, D) one behind the other: the kernel counts heads, not tokens.
        d_q, d_q_weight = _norm_grad_triton(q.contiguous(), q_weight, turned_q, eps, offset)
        d_k, d_k_weight = _norm_grad_triton(k.contiguous(), k_weight, turned_k, eps, offset)
        d_q_weight = d_q_weight.to(q_weight.dtype)
        d_k_weight = d_k_weight.to(k_weight.dtype)
        return d_q, d_k, None, None, d_q_weight, d_k_weight, None, None


# ---- The public calls


@functools.cache
def _liger():
    """Return Liger's operations, or None where the package is missing: PyTorch's take over then.

    They are imported for the first CUDA tensor, which takes 1.7 s; macOS has no such package.
    """
    try:
        from liger_kernel import ops
    except ImportError:
        print("liger-kernel is not installed: norms and SwiGLU take more launches", file=sys.stderr)
        return None
    return ops


def _on_triton(x):
    return on_triton(x) and x.dtype != torch.float64 and x.numel() > 0


def _on_liger(x):
    return x.is_cuda and x.dtype != torch.float64 and x.numel() > 0 and _liger() is not None


def _check_equal(*shapes):
    # A kernel would read past the smaller one.
    if len(set(shapes)) > 1:
        listed = " and ".join(str(list(shape)) for shape in shapes)
        raise ValueError(f"shapes must agree: {listed}")


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6, offset: float = 0.0) -> Tensor:
    """Norm x (..., H) with offset + weight (H,); return (..., H), differentiable in both."""
    _check_equal(x.shape[-1:], weight.shape)
    if _on_liger(x):
        # Not in place, which would write over the gradient of y: another operation may hold it.
        return _liger().LigerRMSNormFunction.apply(x, weight, eps, offset, ROUND_ONCE, False)
    weight = add_offset(weight, offset)
    if torch.is_grad_enabled():
        return _Norm.apply(x, None, weight, eps)
    return torch_norm(x, None, weight, eps)[1]


def add_rms_norm(
    x: Tensor, delta: Tensor, weight: Tensor, eps: float = 1e-6, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return the residual stream h = x + delta, and rms_norm(h), all (..., H)."""
    _check_equal(x.shape, delta.shape)
    _check_equal(x.shape[-1:], weight.shape)
    if _on_liger(x):
        return _add_norm_liger(x, delta, weight, eps, offset)
    weight = add_offset(weight, offset)
    if torch.is_grad_enabled():
        return _Norm.apply(x, delta, weight, eps)
    return torch_norm(x, delta, weight, eps)


def _add_norm_liger(x, delta, weight, eps, offset):
    """Take one launch without gradients; an addition and a norm with them.

    The backward of Liger 0.8.5's fused call takes ceil(tokens / 132) as a constant: it would
    compile anew for nearly every batch. Apart, they pass over the stream four times more: about 0.5
    % of a layer's time.
    """
    if torch.is_grad_enabled():
        h = x + delta
        return h, rms_norm(h, weight, eps, offset)
    y, h = _liger().LigerFusedAddRMSNormFunction.apply(
        x, delta, weight, eps, offset, ROUND_ONCE, False
    )
    return h, y


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up, of one shape. On CUDA the backward writes over gate and up.

    That is safe for outputs of linear layers, with or without adapters, as those are kept for no
    other backward, and for one backward of a graph. It isn't for leaves, nor for one tensor as
    both.
    """
    _check_equal(gate.shape, up.shape)
    if _on_liger(gate):
        return _liger().LigerSiLUMulFunction.apply(gate, up)
    return reference_swiglu(gate, up)


def swiglu_joint(gate_up: Tensor) -> Tensor:
    """Return the same, (..., I), of both side by side, (..., 2 I), as one product makes them.

    Nothing is written in place.
    """
    if _on_liger(gate_up):
        return _liger().LigerFusedGateUpSiLUMulFunction.apply(gate_up)
    return reference_swiglu_joint(gate_up)


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    offset: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Norm q (T, A, D) and k (T, K, D), where both weights (D,) are given, and rotate them.

    cos, sin (T, R), R <= D: two equal halves, for the first R channels of each head; they may be of
    a wider type than q and k: fp32 beside bf16. q and k may be parts of a joint projection; they
    aren't copied. The norm multiplies by offset + weight. Differentiable in q, k and the weights.
    """
    _check_equal(q.shape[::2], k.shape[::2])
    _check_equal(cos.shape, sin.shape, (len(q), min(cos.shape[1], q.shape[2])))
    for weight in (q_weight, k_weight):
        if weight is not None:
            _check_equal(q.shape[2:], weight.shape)
    if _on_triton(q):
        return _Rope.apply(q, k, cos, sin, q_weight, k_weight, eps, offset)
    if q_weight is not None:
        q = rms_norm(q, q_weight, eps, offset)
        k = rms_norm(k, k_weight, eps, offset)
    return reference_qk_norm_rope(q, k, cos, sin)


@torch.no_grad()
def qk_norm_rope_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    cache_k: Tensor,
    cache_v: Tensor,
    at: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    offset: float = 0.0,
) -> Tensor:
    """Do the same for one new token of each of T sequences; return the queries (T, A, D).

    The rotated keys and the values are written to cache_k and cache_v (T, K, places, D), at
    [t, :, at[t]]; at (T,) int64. No gradient.
    """
    if not _on_triton(q):
        return reference_qk_norm_rope_write(
            q, k, v, cos, sin, cache_k, cache_v, at, q_weight, k_weight, eps, offset
        )
    if cache_k.stride() != cache_v.stride() or cache_k.stride(3) != 1:
        raise ValueError(
            f"caches need equal strides, the last 1: {cache_k.stride()} and {cache_v.stride()}"
        )
    cos = cos.contiguous()
    sin = sin.contiguous()
    return _rope_triton(q, k, cos, sin, q_weight, k_weight, eps, offset, cache_k, v, cache_v, at)
