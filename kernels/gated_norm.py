"""RMSNorm of each head, gated: the end of a gated delta net (Qwen3.5).

    y = weight n silu(z),   n = x / sqrt(mean x^2 + eps),   over a head

Why fuse: it is all memory traffic: T = 8192 tokens of 32 heads of 128 are 67 MB in bf16. Eager
PyTorch passes over them about ten times and keeps four fp32 copies for the backward; here a pass
reads x and z and writes y, and the backward, which keeps x and z alone, is one launch. fp32 in
registers, rounded once. Time on a GPU: not measured yet (`python -m bench.kernels --only
gated_norm`).

Shapes: a row is a head of a token; E its width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import interpreted, on_triton, tl, triton

# Elements of a tile; and at most so many programs sum up the weight's gradient.
TILE = 2048
PROGRAMS = 4 * 132


def reference_gated_norm(x: Tensor, z: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """Specify `gated_norm`, in fp32 (or fp64)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    normed = x.to(wide)
    # eps within the root, as in every RMSNorm of the family.
    normed = normed * torch.rsqrt(normed.square().mean(-1, keepdim=True) + eps)
    return (weight.to(wide) * normed * F.silu(z.to(wide))).to(x.dtype)


@triton.jit
def _load(pointer, at, mask):
    return tl.load(pointer + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _norm_kernel(x, z, weight, out, rows, width, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Take ROWS rows."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, BLOCK)[None, :]
    mask = (r < rows)[:, None] & (c < width)
    at = r.to(tl.int64)[:, None] * width + c
    n = _load(x, at, mask)
    # Padding behind the head is 0, so that it adds nothing to the sum.
    n = n * tl.rsqrt(tl.sum(n * n, 1) / width + eps)[:, None]
    gate = _load(z, at, mask)
    # silu(z) = z sigmoid(z).
    gate = gate / (1 + tl.exp(-gate))
    tl.store(out + at, n * _load(weight, c, c < width) * gate, mask=mask)


@triton.jit
def _grad_kernel(
    x,
    z,
    weight,
    d_out,
    d_x,
    d_z,
    partial,
    rows,
    width,
    eps,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Take the gradients. With s = silu(z), g = d_out weight s:

        d_x = scale (g - n mean(g n)),  d_z = d_out weight n silu'(z),  d_weight = sum d_out n s

    A program walks over many rows and keeps its share of d_weight: no atomics, the same bits every
    run.
    """
    c = tl.arange(0, BLOCK)[None, :]
    w = _load(weight, c, c < width)
    d_weight = tl.zeros([BLOCK], tl.float32)
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        r = first + tl.arange(0, ROWS)
        mask = (r < rows)[:, None] & (c < width)
        at = r.to(tl.int64)[:, None] * width + c
        n = _load(x, at, mask)
        scale = tl.rsqrt(tl.sum(n * n, 1) / width + eps)[:, None]
        n = n * scale
        gate = _load(z, at, mask)
        sigmoid = 1 / (1 + tl.exp(-gate))
        d = _load(d_out, at, mask)
        # d_out s: the gradient of weight n.
        d_normed = d * gate * sigmoid
        # Over all of the program's rows, in registers.
        d_weight += tl.sum(d_normed * n, 0)
        # The norm's own gradient: of n = x scale, where scale depends on all of a head's x.
        g = d_normed * w
        mean = (tl.sum(g * n, 1) / width)[:, None]
        tl.store(d_x + at, scale * (g - n * mean), mask=mask)
        # silu'(z)
        slope = sigmoid * (1 + gate * (1 - sigmoid))
        tl.store(d_z + at, d * w * n * slope, mask=mask)
    # A row of `partial` a program, added up by the caller in one order.
    place = tl.program_id(0) * width + tl.arange(0, BLOCK)
    tl.store(partial + place, d_weight, mask=tl.arange(0, BLOCK) < width)


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, z, weight, eps):
        # Not n, nor silu(z): to make them again costs no memory traffic, as x and z are read
        # anyway.
        ctx.save_for_backward(x, z, weight)
        ctx.eps = eps
        width = len(weight)
        rows = x.numel() // width
        block = triton.next_power_of_2(width)
        tile = max(TILE // block, 1)
        out = torch.empty_like(x)
        grid = (triton.cdiv(rows, tile),)
        _norm_kernel[grid](x, z, weight, out, rows, width, eps, ROWS=tile, BLOCK=block)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        x, z, weight = ctx.saved_tensors
        width = len(weight)
        rows = x.numel() // width
        block = triton.next_power_of_2(width)
        tile = max(TILE // block, 1)
        # Few enough that adding up `partial` costs nothing, enough to fill the device.
        programs = min(triton.cdiv(rows, tile), 4 if interpreted() else PROGRAMS)
        d_x = torch.empty_like(x)
        d_z = torch.empty_like(z)
        partial = x.new_empty(programs, width, dtype=torch.float32)
        _grad_kernel[(programs,)](
            x,
            z,
            weight,
            d_out.contiguous(),
            d_x,
            d_z,
            partial,
            rows,
            width,
            ctx.eps,
            ROWS=tile,
            BLOCK=block,
        )
        return d_x, d_z, partial.sum(0).to(weight.dtype), None


def gated_norm(x: Tensor, z: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """Return y (..., E) of x and its gate z (..., E), and weight (E,); differentiable in all."""
    if x.shape != z.shape or weight.shape != x.shape[-1:]:
        shapes = [list(t.shape) for t in (x, z, weight)]
        raise ValueError(f"shapes must be [..., E], [..., E], [E]: got {shapes}")
    if not on_triton(x) or x.dtype == torch.float64 or not x.numel():
        return reference_gated_norm(x, z, weight, eps)
    return _GatedNorm.apply(x.contiguous(), z.contiguous(), weight, eps)
