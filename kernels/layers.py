"""What stands between a decoder's matrix products: RMSNorm (with the residual), SwiGLU, QK-norm and mRoPE.

    rms_norm              y = x / sqrt(mean(x^2) + eps) * weight, over the last axis
    add_rms_norm          h = x + delta,  y = rms_norm(h)
    swiglu                gate * sigmoid(gate) * up
    qk_norm_rope          n = rms_norm of a head (Qwen3), or the head itself (Qwen2, 2.5); with its halves,
                          (n_1 cos - n_2 sin, n_2 cos + n_1 sin)
    qk_norm_rope_write    the same for decoding: the new keys and values go straight into the cache

cos and sin hold mRoPE already: the model makes them once a forward for all layers, from the axis (time, row,
column) that each frequency listens to.

Why fuse: it is all memory traffic. T = 8192 tokens of H = 4096 are 67 MB in bf16, 22 us at the 3.0 TB/s that
an H100 copies. Eager PyTorch passes over memory about ten times for an RMSNorm in bf16 (casts, square, mean,
products) where two passes are enough (backward three), five times for SwiGLU where three are enough, about
thirty times for both norms and rotations of q and k where two are enough. Here each call is one launch;
everything is fp32 in registers and rounded once, at the end.

What they reach on a GPU is not measured yet, nor whether they beat torch.compile and Liger:
`python -m bench.kernels --only layers` sets them side by side, and one that loses is to go. On the CPU the
references run, but for RMSNorm (`torch_norm` and `_norm_grad_torch` say why).

Shapes: T tokens; H width; A query heads, K key-value heads, D head width; a row is a token, or its head.
"""

import functools
import os

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
TILE = 1 << 14 if INTERPRET else 2048  # elements of a tile, or one row: the interpreter pays by the operation
PROGRAMS = 4 * 132  # at most so many sum up a weight's gradient: a guess, four to an H100's multiprocessor


def reference_rms_norm(x, weight, eps=1e-6):
    """In 16 bits as transformers does: rounded before the product with the weight, and after it."""
    if x.dtype in (torch.float32, torch.float64):
        return F.rms_norm(x, weight.shape, weight, eps)
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def reference_add_rms_norm(x, delta, weight, eps=1e-6):
    return x + delta, reference_rms_norm(x + delta, weight, eps)


def reference_swiglu(gate, up):
    return F.silu(gate) * up


def reference_qk_norm_rope(q, k, cos, sin, q_weight=None, k_weight=None, eps=1e-6):
    def rotate(x, weight):
        x = x if weight is None else reference_rms_norm(x, weight, eps)
        first, second = x.chunk(2, -1)
        return x * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]

    return rotate(q, q_weight), rotate(k, k_weight)


def reference_qk_norm_rope_write(q, k, v, cos, sin, cache_k, cache_v, at, q_weight=None, k_weight=None,
                                 eps=1e-6):
    q, k = reference_qk_norm_rope(q, k, cos, sin, q_weight, k_weight, eps)
    row = torch.arange(len(at), device=at.device)
    cache_k[row, :, at], cache_v[row, :, at] = k, v
    return q


@triton.jit
def _load(pointer, at, mask):
    return tl.load(pointer + at, mask=mask, other=0.0).to(tl.float32)


# ---- RMSNorm


@triton.jit
def _norm_kernel(x, delta, weight, summed, out, rows, width, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """A program ROWS rows. With delta, the sum is stored too, and its rounded value is what is normed."""
    r, c = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    mask, at = (r < rows)[:, None] & (c < width)[None, :], r.to(tl.int64)[:, None] * width + c[None, :]
    h = _load(x, at, mask)
    if delta is not None:
        h = (h + _load(delta, at, mask)).to(summed.dtype.element_ty)
        tl.store(summed + at, h, mask=mask)
        h = h.to(tl.float32)
    scale = tl.rsqrt(tl.sum(h * h, 1) / width + eps)[:, None]
    tl.store(out + at, h * scale * _load(weight, c, c < width)[None, :], mask=mask)


@triton.jit
def _norm_grad_kernel(h, weight, d_out, d_summed, d_h, partial, rows, width, eps, ROWS: tl.constexpr,
                      BLOCK: tl.constexpr):
    """With n = h scale, g = d_out weight: d_h = scale (g - n mean(g n)) [+ d_summed], d_weight = sum d_out n.
    A program walks over many rows and keeps its share of d_weight: no atomics, the same bits every run."""
    c, d_weight = tl.arange(0, BLOCK), tl.zeros([BLOCK], tl.float32)
    w = _load(weight, c, c < width)[None, :]
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        r = first + tl.arange(0, ROWS)
        mask, at = (r < rows)[:, None] & (c < width)[None, :], r.to(tl.int64)[:, None] * width + c[None, :]
        n, d = _load(h, at, mask), _load(d_out, at, mask)
        scale = tl.rsqrt(tl.sum(n * n, 1) / width + eps)[:, None]
        n, g = n * scale, d * w
        d_weight += tl.sum(d * n, 0)
        out = scale * (g - n * (tl.sum(g * n, 1) / width)[:, None])
        if d_summed is not None:
            out += _load(d_summed, at, mask)
        tl.store(d_h + at, out, mask=mask)
    tl.store(partial + tl.program_id(0) * width + c, d_weight, mask=c < width)


def _tile(width):
    block = triton.next_power_of_2(width)
    return dict(ROWS=max(TILE // block, 1), BLOCK=block)


def _norm_triton(x, delta, weight, eps):
    width, tile, out = len(weight), _tile(len(weight)), torch.empty_like(x)
    rows, h = x.numel() // width, x if delta is None else torch.empty_like(x)
    _norm_kernel[(triton.cdiv(rows, tile["ROWS"]),)](x, delta, weight, h, out, rows, width, eps, num_warps=8,
                                                     **tile)
    return h, out


def _norm_grad_triton(h, weight, d_out, d_summed, eps):
    width, tile, d_h = len(weight), _tile(len(weight)), torch.empty_like(h)
    rows = h.numel() // width
    programs = min(triton.cdiv(rows, tile["ROWS"]), PROGRAMS)
    partial = h.new_empty(programs, width, dtype=torch.float32)
    _norm_grad_kernel[(programs,)](h, weight, d_out, d_summed, d_h, partial, rows, width, eps, num_warps=8,
                                   **tile)
    return d_h, partial.sum(0)


scalar = functools.lru_cache(torch.tensor)


def torch_norm(x, delta, weight, eps):
    """(h, y), of any weights that can be multiplied with x. Rounded as the reference is, in half as many
    operations as F.rms_norm has on a CPU."""
    h, wide = x if delta is None else x + delta, torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(h, dim=-1, keepdim=True, dtype=wide)
    square = torch.addcmul(scalar(eps, dtype=wide, device=x.device), norm, norm, value=1 / x.shape[-1])
    return h, (h * square.rsqrt_()).to(x.dtype).mul_(weight)


def _norm_grad_torch(h, weight, d_out, d_summed, eps):
    """Autograd's chain of small operators takes 2.9 times as long (one core, T = 3000, H = 128, 4.6 ms)."""
    n = h.to(torch.promote_types(h.dtype, torch.float32))
    scale = (n.square().mean(-1, keepdim=True) + eps).rsqrt_()
    n, g = n * scale, d_out * weight.to(n.dtype)
    mean = (g * n).mean(-1, keepdim=True)
    d_h, d_weight = (g - n * mean).mul_(scale), (d_out * n).flatten(0, -2).sum(0)
    return (d_h if d_summed is None else d_h.add_(d_summed)).to(h.dtype), d_weight


def _norm(x, delta, weight, eps):
    """(h, y)"""
    if _on_triton(x):
        return _norm_triton(x.contiguous(), None if delta is None else delta.contiguous(), weight, eps)
    return torch_norm(x, delta, weight, eps)


class _Norm(torch.autograd.Function):
    """(h, y); without delta y alone."""

    @staticmethod
    def forward(ctx, x, delta, weight, eps):
        ctx.eps, ctx.triton, ctx.adds = eps, _on_triton(x), delta is not None
        h, out = _norm(x, delta, weight, eps)
        ctx.save_for_backward(h, weight)
        return (h, out) if ctx.adds else out

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        h, weight = ctx.saved_tensors
        d_out, d_summed = grads[-1].contiguous(), grads[0].contiguous() if ctx.adds else None
        backward = _norm_grad_triton if ctx.triton else _norm_grad_torch
        d_h, d_weight = backward(h, weight, d_out, d_summed, ctx.eps)
        return d_h, d_h if ctx.adds else None, d_weight.to(weight.dtype), None


# ---- SwiGLU


@triton.jit
def _swiglu_kernel(gate, up, out, d_gate, d_up, size, BACKWARD: tl.constexpr, BLOCK: tl.constexpr):
    """Forward writes `out`, backward reads its gradient there."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g, u = _load(gate, i, i < size), _load(up, i, i < size)
    s = tl.sigmoid(g)
    if BACKWARD:
        d = _load(out, i, i < size)
        tl.store(d_gate + i, d * u * s * (1 + g * (1 - s)), mask=i < size)
        tl.store(d_up + i, d * g * s, mask=i < size)
    else:
        tl.store(out + i, g * s * u, mask=i < size)


def _launch_swiglu(gate, up, out, d_gate=None, d_up=None):
    grid, size = (triton.cdiv(gate.numel(), TILE),), gate.numel()
    _swiglu_kernel[grid](gate, up, out, d_gate, d_up, size, BACKWARD=d_up is not None, BLOCK=TILE)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        gate, up, out = gate.contiguous(), up.contiguous(), gate.new_empty(gate.shape)
        _launch_swiglu(gate, up, out)
        ctx.save_for_backward(gate, up)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        # Once: under non-reentrant checkpointing saved tensors can be unpacked a single time.
        gate, up = ctx.saved_tensors
        d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
        _launch_swiglu(gate, up, grad.contiguous(), d_gate, d_up)
        return d_gate, d_up


# ---- QK-norm and mRoPE: a row is a head of a token, half is D / 2


@triton.jit
def _pair(pointer, at, half, mask):
    return _load(pointer, at, mask), _load(pointer, at + half, mask)


@triton.jit
def _rotate(x, weight, cos, sin, at, out, tokens, heads, x_token, out_token, out_head, out_place, half, eps,
            ROWS: tl.constexpr, HALF: tl.constexpr):
    """Without cos a copy. x_token, out_*: strides (a token of x is contiguous); at: its place in a cache."""
    r, c, rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, HALF)[None, :], tokens * heads
    token, head, mask = (r // heads).to(tl.int64), r % heads, (r < rows)[:, None] & (c < half)
    a, b = _pair(x, (token * x_token + head * 2 * half)[:, None] + c, half, mask)
    if weight is not None:
        w1, w2 = _pair(weight, c, half, c < half)
        scale = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / (2 * half) + eps)[:, None]
        a, b = a * scale * w1, b * scale * w2
    if cos is not None:
        angle = (token * 2 * half)[:, None] + c
        co, si = _load(cos, angle, mask), _load(sin, angle, mask)
        a, b = a * co - b * si, b * co + a * si
    place = token * out_token + head * out_head
    if at is not None:
        place += tl.load(at + token, mask=r < rows, other=0) * out_place
    tl.store(out + place[:, None] + c, a, mask=mask)
    tl.store(out + place[:, None] + c + half, b, mask=mask)


@triton.jit
def _rope_kernel(q, k, v, cos, sin, q_weight, k_weight, at, q_out, k_out, v_out, tokens, q_heads, k_heads,
                 q_token, k_token, v_token, out_token, out_head, out_place, half, eps, ROWS: tl.constexpr,
                 HALF: tl.constexpr):
    """Programs (i, 0) take queries, (i, 1) keys, (i, 2) values."""
    if tl.program_id(1) == 0:
        _rotate(q, q_weight, cos, sin, None, q_out, tokens, q_heads, q_token, q_heads * 2 * half, 2 * half, 0,
                half, eps, ROWS, HALF)
    elif tl.program_id(1) == 1:
        _rotate(k, k_weight, cos, sin, at, k_out, tokens, k_heads, k_token, out_token, out_head, out_place,
                half, eps, ROWS, HALF)
    elif v is not None:
        _rotate(v, None, None, None, at, v_out, tokens, k_heads, v_token, out_token, out_head, out_place,
                half, eps, ROWS, HALF)


def _rope_triton(q, k, cos, sin, q_weight, k_weight, eps, k_out, v=None, v_out=None, at=None):
    (tokens, heads, width), k_heads, q_out = q.shape, k.shape[1], q.new_empty(q.shape)
    half, places = triton.next_power_of_2(width // 2), 0 if at is None else k_out.stride(2)
    blocks = triton.cdiv(tokens * max(heads, k_heads), TILE // half)
    q, k, v = (x if x is None or x.stride()[1:] == (width, 1) else x.contiguous() for x in (q, k, v))
    _rope_kernel[blocks, 2 if v is None else 3](
        q, k, v, cos, sin, q_weight, k_weight, at, q_out, k_out, v_out, tokens, heads, k_heads,
        q.stride(0), k.stride(0), 0 if v is None else v.stride(0), *k_out.stride()[:2], places, width // 2,
        eps, ROWS=TILE // half, HALF=half, num_warps=8)
    return q_out


class _Rope(torch.autograd.Function):
    """Backward: the rotation's inverse is the rotation by -sin; then the norm's own backward."""

    @staticmethod
    def forward(ctx, q, k, cos, sin, q_weight, k_weight, eps):
        q, k, cos, sin, k_out = *(x.contiguous() for x in (q, k, cos, sin)), k.new_empty(k.shape)
        ctx.save_for_backward(cos, sin, *(() if q_weight is None else (q, k, q_weight, k_weight)))
        ctx.eps = eps
        return _rope_triton(q, k, cos, sin, q_weight, k_weight, eps, k_out), k_out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_q, d_k):
        (cos, sin, *normed), d_q, out = ctx.saved_tensors, d_q.contiguous(), d_k.new_empty(d_k.shape)
        d_q, d_k = _rope_triton(d_q, d_k.contiguous(), cos, -sin, None, None, ctx.eps, out), out
        if not normed:
            return d_q, d_k, None, None, None, None, None
        q, k, *weights = normed
        (d_q, d_q_weight), (d_k, d_k_weight) = (_norm_grad_triton(x, w, d, None, ctx.eps)
                                                for x, w, d in zip((q, k), weights, (d_q, d_k), strict=True))
        return d_q, d_k, None, None, d_q_weight.to(q.dtype), d_k_weight.to(q.dtype), None


# ---- The public calls


def _on_triton(x):
    return (x.is_cuda or INTERPRET) and x.dtype != torch.float64 and x.numel() > 0


def _agree(*shapes):
    if len(set(shapes)) > 1:  # a kernel would read past the smaller one
        raise ValueError(f"shapes must agree: {' and '.join(str(list(shape)) for shape in shapes)}")


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """x (..., H), weight (H,) -> (..., H), differentiable in both."""
    _agree(x.shape[-1:], weight.shape)
    return _Norm.apply(x, None, weight, eps) if torch.is_grad_enabled() else _norm(x, None, weight, eps)[1]


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """x, delta (..., H) -> the residual stream h = x + delta, and rms_norm(h), both (..., H)."""
    _agree(x.shape, delta.shape), _agree(x.shape[-1:], weight.shape)
    return (_Norm.apply if torch.is_grad_enabled() else _norm)(x, delta, weight, eps)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up of one shape."""
    _agree(gate.shape, up.shape)
    return _SwiGLU.apply(gate, up) if _on_triton(gate) else reference_swiglu(gate, up)


def qk_norm_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_weight: Tensor | None = None,
                 k_weight: Tensor | None = None, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """q (T, A, D), k (T, K, D): normed where both weights (D,) are given, rotated by cos, sin (T, D), whose
    two halves are equal. Differentiable in q, k and the weights."""
    _agree(q.shape[::2], k.shape[::2], cos.shape, sin.shape)
    _agree(q.shape[2:], *(weight.shape for weight in (q_weight, k_weight) if weight is not None))
    if _on_triton(q):
        return _Rope.apply(q, k, cos, sin, q_weight, k_weight, eps)
    if q_weight is not None:
        q, k = rms_norm(q, q_weight, eps), rms_norm(k, k_weight, eps)
    return reference_qk_norm_rope(q, k, cos, sin)


@torch.no_grad()
def qk_norm_rope_write(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, cache_k: Tensor,
                       cache_v: Tensor, at: Tensor, q_weight: Tensor | None = None,
                       k_weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """One new token of each of T sequences: returns the rotated queries (T, A, D), writes the rotated keys
    and the values to cache_k and cache_v (T, K, places, D) at [t, :, at[t]], at (T,) int64. No gradient."""
    if not _on_triton(q):
        return reference_qk_norm_rope_write(q, k, v, cos, sin, cache_k, cache_v, at, q_weight, k_weight, eps)
    if cache_k.stride() != cache_v.stride() or cache_k.stride(3) != 1:
        raise ValueError(f"caches need equal strides, the last 1: {cache_k.stride()} and {cache_v.stride()}")
    cos, sin = cos.contiguous(), sin.contiguous()
    return _rope_triton(q, k, cos, sin, q_weight, k_weight, eps, cache_k, v, cache_v, at)
