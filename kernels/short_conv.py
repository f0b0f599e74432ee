"""A short causal convolution of every channel by itself, and SiLU, over packed sequences.

    y_t = silu( sum_j c_(w-1-j) x_(t-j) ),   j < w;   before the start of a sequence x = 0

Three layers in four of Qwen3.5 begin with it (w = 4). `before` (T,) says how many earlier rows of
its sequence a row has, up to w - 1: no row reads another sequence.

Why fuse: it is all memory traffic. T = 8192 tokens of 8192 channels are 134 MB in bf16. Eager
PyTorch passes over them about twenty times, forward; two passes are enough. The backward makes the
sum again instead of keeping it: it reads x and d_y once (their neighbours come from the cache) and
writes d_x. Time on a GPU: not measured yet (`python -m bench.kernels --only short_conv`).

Shapes: T rows, C channels, w taps.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import interpreted, on_triton, tl, triton

# Rows and channels of a tile. A program of the backward walks over ROW_BLOCKS of them, and keeps
# its share of the taps' gradient.
ROWS = 16
CHANNELS = 64
ROW_BLOCKS = 16


def reference_short_conv(x: Tensor, weight: Tensor, before: Tensor) -> Tensor:
    """Specify `short_conv`: summed in fp32 (or fp64), rounded once."""
    wide = torch.promote_types(x.dtype, torch.float32)
    taps = weight.shape[1]
    rows = x.to(wide)
    weight = weight.to(wide)
    # The last tap is the token's own; the oldest comes first, as in the checkpoint.
    total = rows * weight[:, -1]
    for back in range(1, taps):
        # Row t - back, where it is one of the same sequence.
        earlier = F.pad(rows, (0, 0, back, 0))[: len(rows)]
        inside = (before >= back)[:, None]
        total = total + torch.where(inside, earlier, 0) * weight[:, -1 - back]
    return F.silu(total).to(x.dtype)


@triton.jit
def _sum_of_taps(x, weight, before, t, c, rows, channels, TAPS: tl.constexpr):
    """Return the sum before SiLU of rows t (ROWS,) and channels c: (ROWS, CHANNELS) fp32."""
    # int64: T C passes 2^31 elements at 260k tokens of 8,192 channels.
    at = t.to(tl.int64)[:, None] * channels + c[None, :]
    inside = (t < rows)[:, None] & (c < channels)[None, :]
    earlier = tl.load(before + t, mask=t < rows, other=0)[:, None]
    total = tl.zeros(at.shape, tl.float32)
    for back in tl.static_range(TAPS):
        # (CHANNELS,), with a stride: a channel's taps lie together.
        w = tl.load(weight + c * TAPS + TAPS - 1 - back, mask=c < channels, other=0.0)
        # One mask for both ends: rows beyond the tile, and rows of the sequence before.
        read = inside & (earlier >= back)
        row = tl.load(x + at - back * channels, mask=read, other=0.0).to(tl.float32)
        # Rows of another sequence were masked to 0.
        total += row * w.to(tl.float32)[None, :]
    return total


@triton.jit
def _conv_kernel(
    x,
    weight,
    before,
    out,
    rows,
    channels,
    TAPS: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Take one tile of rows and channels."""
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    total = _sum_of_taps(x, weight, before, t, c, rows, channels, TAPS)
    at = t.to(tl.int64)[:, None] * channels + c[None, :]
    inside = (t < rows)[:, None] & (c < channels)[None, :]
    # silu(x) = x sigmoid(x).
    tl.store(out + at, total / (1 + tl.exp(-total)), mask=inside)


@triton.jit
def _conv_grad_kernel(
    x,
    weight,
    before,
    d_out,
    d_x,
    partial,
    rows,
    channels,
    TAPS: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROW_BLOCKS: tl.constexpr,
):
    """Take the gradient of ROW_BLOCKS tiles: d_x, and this program's share of the taps'.

    A row is read by itself and by up to w - 1 rows behind it, each of which says by `before`
    whether it is of the same sequence. No atomics: partial (programs, w, C) is added up later.
    """
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    for tap in tl.static_range(TAPS):
        # The taps' gradients one after the other: the tile comes from the cache again.
        d_weight = tl.zeros([CHANNELS], tl.float32)
        for block in range(ROW_BLOCKS):
            first = (tl.program_id(0) * ROW_BLOCKS + block) * ROWS
            t = first + tl.arange(0, ROWS)
            at = t.to(tl.int64)[:, None] * channels + c[None, :]
            inside = (t < rows)[:, None] & (c < channels)[None, :]
            # Made again for every tap: w times the arithmetic, for no (ROWS, w, CHANNELS) tile in
            # registers.
            d_sum = _grad_of_sum(x, weight, before, d_out, t, c, rows, channels, TAPS)
            earlier = tl.load(before + t, mask=t < rows, other=0)[:, None]
            read = inside & (earlier >= tap)
            row = tl.load(x + at - tap * channels, mask=read, other=0.0).to(tl.float32)
            d_weight += tl.sum(d_sum * row, 0)
        # The tap that looks `tap` rows back is the w-1-tap-th of the weight.
        place = (tl.program_id(0) * TAPS + TAPS - 1 - tap) * channels
        tl.store(partial + place + c, d_weight, mask=c < channels)

    for block in range(ROW_BLOCKS):
        first = (tl.program_id(0) * ROW_BLOCKS + block) * ROWS
        t = first + tl.arange(0, ROWS)
        at = t.to(tl.int64)[:, None] * channels + c[None, :]
        inside = (t < rows)[:, None] & (c < channels)[None, :]
        total = tl.zeros([ROWS, CHANNELS], tl.float32)
        for tap in tl.static_range(TAPS):
            # d_x_t = sum over the rows that read x_t: row t + tap, by the tap that looks back so
            # far.
            reader = t + tap
            d_sum = _grad_of_sum(x, weight, before, d_out, reader, c, rows, channels, TAPS)
            # -1 beyond the last row: nobody reads from there.
            reads = tl.load(before + reader, mask=reader < rows, other=-1)[:, None] >= tap
            w = tl.load(weight + c * TAPS + TAPS - 1 - tap, mask=c < channels, other=0.0)
            total += tl.where(reads, d_sum * w.to(tl.float32)[None, :], 0.0)
        tl.store(d_x + at, total, mask=inside)


@triton.jit
def _grad_of_sum(x, weight, before, d_out, t, c, rows, channels, TAPS: tl.constexpr):
    """Return the gradient of rows t's sums: d_out silu'(sum), 0 beyond the last row."""
    total = _sum_of_taps(x, weight, before, t, c, rows, channels, TAPS)
    at = t.to(tl.int64)[:, None] * channels + c[None, :]
    inside = (t < rows)[:, None] & (c < channels)[None, :]
    d = tl.load(d_out + at, mask=inside, other=0.0).to(tl.float32)
    sigmoid = 1 / (1 + tl.exp(-total))
    # silu'(s) = sigma (1 + s (1 - sigma)).
    return d * sigmoid * (1 + total * (1 - sigmoid))


class _ShortConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, before):
        ctx.save_for_backward(x, weight, before)
        rows, channels = x.shape
        out = torch.empty_like(x)
        grid = (triton.cdiv(rows, ROWS), triton.cdiv(channels, CHANNELS))
        _conv_kernel[grid](
            x,
            weight,
            before,
            out,
            rows,
            channels,
            TAPS=weight.shape[1],
            ROWS=ROWS,
            CHANNELS=CHANNELS,
        )
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        x, weight, before = ctx.saved_tensors
        rows, channels = x.shape
        taps = weight.shape[1]
        d_x = torch.empty_like(x)
        # More rows a program, fewer rows of `partial` to add up.
        row_blocks = 2 if interpreted() else ROW_BLOCKS
        programs = triton.cdiv(rows, ROWS * row_blocks)
        partial = x.new_empty(programs, taps, channels, dtype=torch.float32)
        _conv_grad_kernel[programs, triton.cdiv(channels, CHANNELS)](
            x,
            weight,
            before,
            d_out.contiguous(),
            d_x,
            partial,
            rows,
            channels,
            TAPS=taps,
            ROWS=ROWS,
            CHANNELS=CHANNELS,
            ROW_BLOCKS=row_blocks,
        )
        # (programs, w, C) -> (C, w), in fp32 until here.
        return d_x, partial.sum(0).T.to(weight.dtype), None


def short_conv(x: Tensor, weight: Tensor, before: Tensor) -> Tensor:
    """Return y (T, C) of x (T, C) and weight (C, w), the oldest tap first; differentiable in both.

    before (T,) int64: how many earlier rows of its sequence each row has; more than w - 1 are as
    good as w - 1.
    """
    if x.ndim != 2 or weight.shape[0] != x.shape[1] or before.shape != (len(x),):
        shapes = [list(t.shape) for t in (x, weight, before)]
        raise ValueError(f"shapes must be [T, C], [C, w], [T]: got {shapes}")
    if not on_triton(x) or x.dtype == torch.float64 or not len(x):
        return reference_short_conv(x, weight, before)
    return _ShortConv.apply(x.contiguous(), weight.contiguous(), before.contiguous())
