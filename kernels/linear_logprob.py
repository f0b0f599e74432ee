"""Linear layer -> log-softmax -> log-prob of the target and entropy, without logits in memory.

    z[n, v] = hidden[n] . weight[v] / T                p = softmax(z)
    logprob[n] = z[n, t_n] - logsumexp(z[n])           entropy[n] = -sum_v p log p
    dz = g_logprob (1[v = t_n] - p) - g_entropy p (log p + entropy)
    dhidden = dz @ weight / T                          dweight = dz.T @ hidden / T

Why fuse: at N = 8192, V = 151,936 the logits are 5.0 GB in fp32, and eager PyTorch holds about
three such tensors. Here a tile of some 2048 x 2048 is made by one matmul, folded into four numbers
a row and forgotten; the backward makes it again and turns it into dz in place. That is one matmul
more (8NHV FLOPs for 6NHV) and a fixed workspace (<= 64 MB beside dhidden and the fp32 dweight) for
a peak of about 15 GB. Logits reach the softmax in fp32 (rounded to bf16 they are off by up to 0.06
at |z| = 20, which biases the policy), and products are accumulated in fp32.

Two backends behind one call: tiles (a cuBLAS matmul a tile, then Triton; on the CPU torch ops
instead) and, forward only, fused (one Triton kernel, the tile stays in registers). FUSED_ROWS
chooses. What they reach on a GPU is not measured yet (`python -m bench.kernels --only
linear_logprob`). On two busy CPU cores (fp32, N = 4096, V = 151,936, H = 512, both outputs, forward
and backward) tiles took 21 and 31 s, eager PyTorch 58 and 51 s; beyond inputs and gradients 48 MB,
eager 14.6 GB.

Shapes: N tokens, H width, V vocabulary; a tile is R rows (tokens) x C columns (of the vocabulary);
x_RC. A row's state, folded tile by tile: m = max z, s = sum e^(z-m), x = sum e^(z-m) (z-m), t = z
of the target. All relative to the max: logits of +-1e4 cost no digits, and as t <= m and s >= 1 no
log-prob is positive.
"""

import os

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable
from triton.tools.tensor_descriptor import TensorDescriptor

# bytes: the tile, its copy in the matmul's dtype, a chunk of hidden and of dhidden
WORKSPACE = 64_000_000
MIN = torch.finfo(torch.float32).min / 2  # the max of nothing, finite so that MIN - m is too
MIN_ = tl.constexpr(MIN)
# Up to width H: up to so many rows the fused forward, else tiles. A GUESS (launches), not measured
# on any GPU: `python -m bench.kernels --only linear_logprob` prints what should stand here.
FUSED_ROWS = {2048: 256, 3584: 256, 4096: 256, 8192: 256}
# 128 x 256 spills with the entropy's sums
FUSED = dict(BM=128, BN=128, BK=64, num_warps=8, num_stages=4)
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"


def reference_linear_logprob(hidden, weight, targets, temperature=1.0):
    """The specification: logits in fp32 (fp64 for fp64), all of them in memory, several times."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    logp_NV = (hidden.to(wide) @ weight.to(wide).T / temperature).log_softmax(-1)
    return logp_NV.gather(1, targets[:, None].long()).squeeze(1), -(logp_NV.exp() * logp_NV).sum(-1)


# ---- A step on a tile: fold it into the state, or turn it into dz. Twice: torch ops (CPU, fp64),
# Triton.


def _fold_torch(tile_RC, scratch_RC, targets_R, column, inv_temperature, state_4R):
    m, s, x, t = state_4R
    if inv_temperature != 1.0:
        tile_RC.mul_(inv_temperature)
    local = targets_R - column
    inside = (local >= 0) & (local < tile_RC.shape[1])
    z = tile_RC.gather(1, local.clamp(0, tile_RC.shape[1] - 1)[:, None])[:, 0]
    t.copy_(torch.where(inside, z, t))
    peak = torch.maximum(m, tile_RC.amax(1))
    tile_RC.sub_(peak[:, None])
    torch.exp(tile_RC, out=scratch_RC)
    drop = m - peak
    scale = drop.exp()
    x.copy_(scale * (x + drop * s))
    s.mul_(scale).add_(scratch_RC.sum(1))
    x.add_(scratch_RC.mul_(tile_RC).sum(1))
    m.copy_(peak)


def _dlogits_torch(tile_RC, scratch_RC, targets_R, column, inv_temperature, stats_3R, grads_2R):
    (m, log_s, entropy), (g_logprob, g_entropy) = stats_3R, grads_2R
    if inv_temperature != 1.0:
        tile_RC.mul_(inv_temperature)
    tile_RC.sub_(m[:, None])
    # p s. With y = z - m: dz = p (-g_e y + g_e (log s - entropy) - g_l)
    torch.exp(tile_RC, out=scratch_RC)
    over_s = torch.exp(-log_s) * inv_temperature
    shift = (g_entropy * (log_s - entropy) - g_logprob) * over_s
    torch.addcmul(shift[:, None], tile_RC, (-g_entropy * over_s)[:, None], out=tile_RC)
    tile_RC.mul_(scratch_RC)
    local = targets_R - column
    row = ((local >= 0) & (local < tile_RC.shape[1])).nonzero()[:, 0]
    tile_RC[row, local[row]] += g_logprob[row] * inv_temperature
    return tile_RC


@triton.jit
def _fold_kernel(
    tile, targets, state, column, inv_temperature, cols, state_stride, BLOCK: tl.constexpr
):
    """A program a row: one read of the tile."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    z = tl.load(tile + row * cols + c, mask=c < cols, other=MIN_) * inv_temperature
    m, s = tl.load(state + row), tl.load(state + state_stride + row)
    x = tl.load(state + 2 * state_stride + row)
    peak = tl.maximum(m, tl.max(z, 0))
    e = tl.exp(z - peak)
    scale = tl.exp(m - peak)
    tl.store(state + row, peak)
    tl.store(state + state_stride + row, s * scale + tl.sum(e, 0))
    folded = tl.sum(e * tl.maximum(z - peak, MIN_), 0)
    tl.store(state + 2 * state_stride + row, scale * (x + (m - peak) * s) + folded)
    t = tl.load(targets + row) - column
    inside = (t >= 0) & (t < cols)
    z_target = tl.load(tile + row * cols + t, mask=inside, other=0.0) * inv_temperature
    tl.store(state + 3 * state_stride + row, z_target, mask=inside)


@triton.jit
def _dlogits_kernel(
    tile,
    out,
    targets,
    stats,
    grads,
    column,
    inv_temperature,
    cols,
    stats_stride,
    grads_stride,
    BLOCK: tl.constexpr,
):
    """A program a row: logits in, dz out (in place where the matmul takes fp32)."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    z = tl.load(tile + row * cols + c, mask=c < cols, other=MIN_) * inv_temperature
    m, log_s = tl.load(stats + row), tl.load(stats + stats_stride + row)
    entropy = tl.load(stats + 2 * stats_stride + row)
    g_logprob, g_entropy = tl.load(grads + row), tl.load(grads + grads_stride + row)
    logp = (z - m) - log_s
    hit = tl.where(c == tl.load(targets + row) - column, g_logprob, 0.0)
    dz = hit - tl.exp(logp) * (g_logprob + g_entropy * (logp + entropy))
    tl.store(out + row * cols + c, dz * inv_temperature, mask=c < cols)


def _fold_triton(tile_RC, _, targets_R, column, inv_temperature, state_4R):
    rows, cols = tile_RC.shape
    _fold_kernel[(rows,)](
        tile_RC,
        targets_R,
        state_4R,
        column,
        inv_temperature,
        cols,
        state_4R.stride(0),
        BLOCK=triton.next_power_of_2(cols),
        num_warps=4,
    )


def _dlogits_triton(tile_RC, scratch_RC, targets_R, column, inv_temperature, stats_3R, grads_2R):
    (rows, cols), out_RC = tile_RC.shape, tile_RC if scratch_RC is None else scratch_RC
    _dlogits_kernel[(rows,)](
        tile_RC,
        out_RC,
        targets_R,
        stats_3R,
        grads_2R,
        column,
        inv_temperature,
        cols,
        stats_3R.stride(0),
        grads_2R.stride(0),
        BLOCK=triton.next_power_of_2(cols),
        num_warps=4,
    )
    return out_RC


# ---- Backend A: tiles


def _tile_shape(n, v, most, cell, row, column):
    """Rows and columns of a tile, by workspace bytes (by V / H, a large V gets a thousand matmuls):
    so much a cell, a row and a column; at most so many cells."""
    cols = min(v, 2048)
    rows = max(min(n, most // cols), 1)
    while max(rows, cols) > 1 and rows * cols * cell + rows * row + cols * column > WORKSPACE:
        rows, cols = ((rows + 1) // 2, cols) if rows >= cols else (rows, (cols + 1) // 2)
    return rows, cols


def _matmul(a, b, out, beta=0.0):
    """out = beta out + a @ b in out's dtype (fp32 out of bf16 operands, accumulated in fp32: CUDA
    only)."""
    if a.dtype == out.dtype:
        return torch.addmm(out, a, b, beta=beta, out=out)
    return torch.addmm(out, a, b, out_dtype=out.dtype, beta=beta, out=out)


class _Tiles:
    """Walks over the tiles: their operands in the matmul's dtype, and the raw products in fp32 (or
    fp64)."""

    def __init__(self, hidden, weight, backward):
        self.hidden, self.weight = hidden, weight
        self.wide = torch.promote_types(hidden.dtype, torch.float32)
        self.operand = hidden.dtype if hidden.is_cuda else self.wide
        on_triton = (hidden.is_cuda or INTERPRET) and self.wide == torch.float32
        steps = (_fold_triton, _dlogits_triton) if on_triton else (_fold_torch, _dlogits_torch)
        self.fold, self.dlogits = steps
        in_place = on_triton and (self.operand == self.wide or not backward)
        cell = self.wide.itemsize + (0 if in_place else self.operand.itemsize)
        row = self.wide.itemsize * hidden.shape[1]
        # one is made while the last is still held
        cast = 0 if self.operand == hidden.dtype else 2 * row
        # CUDA: 4096 x 2048; backward, with dz and dhidden, 2048 x 2048: 256 and 128 blocks of a
        # matmul for an H100's 132 multiprocessors. CPU: 8 MB, which stay in the cache.
        most = (1 << 22 if backward else 1 << 23) if hidden.is_cuda else 1 << 21
        self.rows, self.cols = _tile_shape(
            len(hidden), len(weight), most, cell, cast + backward * row, cast
        )
        self.tile = hidden.new_empty(self.rows * self.cols, dtype=self.wide)
        self.scratch = None if in_place else torch.empty_like(self.tile, dtype=self.operand)
        self.d_hidden = (
            hidden.new_empty(self.rows, hidden.shape[1], dtype=self.wide) if backward else None
        )

    def chunks(self):
        for r in range(0, len(self.hidden), self.rows):
            yield slice(r, r + self.rows), self.hidden[r : r + self.rows].to(self.operand)

    def tiles(self, hidden_RH):
        for i, weight_CH in enumerate(self.weight.split(self.cols)):
            shape, weight_CH = (len(hidden_RH), len(weight_CH)), weight_CH.to(self.operand)
            tile_RC, scratch_RC = (
                None if b is None else b[: shape[0] * shape[1]].view(shape)
                for b in (self.tile, self.scratch)
            )
            yield i * self.cols, weight_CH, _matmul(hidden_RH, weight_CH.T, tile_RC), scratch_RC


def _forward_tiles(hidden, weight, targets, temperature):
    walk = _Tiles(hidden, weight, backward=False)
    state_4N = hidden.new_zeros(4, len(hidden), dtype=walk.wide)
    state_4N[0] = MIN
    for chunk, hidden_RH in walk.chunks():
        targets_R, state_4R = targets[chunk], state_4N[:, chunk]
        for column, _, tile_RC, scratch_RC in walk.tiles(hidden_RH):
            walk.fold(tile_RC, scratch_RC, targets_R, column, 1 / temperature, state_4R)
    return state_4N


def _backward_tiles(
    hidden, weight, targets, temperature, stats_3N, grads_2N, need_hidden, need_weight
):
    walk, d_hidden = (
        _Tiles(hidden, weight, backward=True),
        torch.empty_like(hidden) if need_hidden else None,
    )
    if need_weight:
        d_weight = (weight.new_empty if len(hidden) else weight.new_zeros)(
            weight.shape, dtype=walk.wide
        )
    for chunk, hidden_RH in walk.chunks():
        targets_R, stats_3R, grads_2R = targets[chunk], stats_3N[:, chunk], grads_2N[:, chunk]
        d_chunk_RH = walk.d_hidden[: len(hidden_RH)]
        for column, weight_CH, tile_RC, scratch_RC in walk.tiles(hidden_RH):
            dz_RC = walk.dlogits(
                tile_RC, scratch_RC, targets_R, column, 1 / temperature, stats_3R, grads_2R
            )
            if need_hidden:
                _matmul(dz_RC, weight_CH, d_chunk_RH, float(column > 0))
            if need_weight:
                _matmul(
                    dz_RC.T,
                    hidden_RH,
                    d_weight[column : column + walk.cols],
                    float(chunk.start > 0),
                )
        if need_hidden:
            d_hidden[chunk] = d_chunk_RH
    return d_hidden, d_weight.to(weight.dtype) if need_weight else None


# ---- Backend B: the fused forward


@triton.jit
def _fold_registers(z, c, v, target, m, s, x, t):
    t += tl.sum(tl.where(c[None, :] == target[:, None], z, 0.0), 1)
    z = tl.where(c[None, :] < v, z, MIN_)
    peak = tl.maximum(m, tl.max(z, 1))
    y = z - peak[:, None]
    e = tl.exp(y)
    scale = tl.exp(m - peak)
    return peak, s * scale + tl.sum(e, 1), scale * (x + (m - peak) * s) + tl.sum(e * y, 1), t


@triton.jit
def _fused_kernel(
    hidden,
    weight,
    targets,
    partial,
    n,
    v,
    h,
    columns,
    inv_temperature,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """A program folds `columns` columns for BM rows. Those of one split share weight in L2."""
    first_row, split = tl.program_id(0) * BM, tl.program_id(1)
    row = first_row + tl.arange(0, BM)
    target = tl.load(targets + row, mask=row < n, other=-1)
    m, s = tl.full([BM], MIN_, tl.float32), tl.zeros([BM], tl.float32)
    x, t = tl.zeros([BM], tl.float32), tl.zeros([BM], tl.float32)
    for column in range(split * columns, tl.minimum(split * columns + columns, v), BN):
        z = tl.zeros([BM, BN], tl.float32)
        for k in range(0, h, BK):
            a, b = hidden.load([first_row, k]), weight.load([column, k])
            if UPCAST:  # the interpreter's dot takes no bf16
                a, b = a.to(tl.float32), b.to(tl.float32)
            z = tl.dot(a, b.T, z, input_precision="ieee")
        m, s, x, t = _fold_registers(
            z * inv_temperature, column + tl.arange(0, BN), v, target, m, s, x, t
        )
    out = partial + split.to(tl.int64) * 4 * n + row
    tl.store(out, m, mask=row < n)
    tl.store(out + n, s, mask=row < n)
    tl.store(out + 2 * n, x, mask=row < n)
    tl.store(out + 3 * n, t, mask=row < n)


def _forward_fused(hidden, weight, targets, temperature):
    (n, h), v = hidden.shape, len(weight)
    tile = dict(FUSED, BM=16, BN=32, BK=16) if INTERPRET else FUSED
    row_blocks, blocks = triton.cdiv(n, tile["BM"]), triton.cdiv(v, tile["BN"])
    # 16 waves on 132 SMs: a ragged last one is cheap
    splits = min(blocks, max(1, 16 * 132 // row_blocks))
    columns = triton.cdiv(blocks, splits) * tile["BN"]
    splits = triton.cdiv(v, columns)
    partial = torch.empty(splits, 4, n, dtype=torch.float32, device=hidden.device)
    a = TensorDescriptor.from_tensor(hidden.contiguous(), [tile["BM"], tile["BK"]])
    b = TensorDescriptor.from_tensor(weight, [tile["BN"], tile["BK"]])
    _fused_kernel[(row_blocks, splits)](
        a, b, targets, partial, n, v, h, columns, 1 / temperature, UPCAST=INTERPRET, **tile
    )
    m, s, x, t = partial.unbind(1)
    peak = m.amax(0)
    scale = (m - peak).exp()
    return torch.stack((peak, (s * scale).sum(0), (scale * (x + (m - peak) * s)).sum(0), t.sum(0)))


def _fused_fits(hidden, weight):
    """Few rows, of 16-bit numbers (fp32 is cuBLAS's), at addresses and strides that the copy engine
    takes."""
    rows = next((rows for width, rows in FUSED_ROWS.items() if hidden.shape[1] <= width), 0)
    small = 0 < len(hidden) <= rows and hidden.dtype in (torch.bfloat16, torch.float16)
    starts = hidden.data_ptr(), weight.data_ptr(), hidden.shape[1] * hidden.element_size()
    # else: copy it whole
    aligned = weight.is_contiguous() and not any(start % 16 for start in starts)
    return (hidden.is_cuda or INTERPRET) and small and aligned


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature):
        forward = _forward_fused if _fused_fits(hidden, weight) else _forward_tiles
        m, s, x, t = forward(hidden, weight, targets, temperature)
        log_s = s.log()
        logprob, entropy = (t - m - log_s).clamp_(max=0), (log_s - x / s).clamp_(min=0)
        ctx.save_for_backward(hidden, weight, targets, torch.stack((m, log_s, entropy)))
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)
        return logprob, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        hidden, weight, targets, stats_3N = ctx.saved_tensors
        grads_2N = torch.stack([torch.zeros_like(stats_3N[0]) if g is None else g for g in grads])
        return (
            *_backward_tiles(
                hidden,
                weight,
                targets,
                ctx.temperature,
                stats_3N,
                grads_2N,
                *ctx.needs_input_grad[:2],
            ),
            None,
            None,
        )


def linear_logprob(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-prob of targets[N], and entropy, under softmax(hidden[N, H] @ weight[V, H].T /
    temperature).

    Two fp32 [N] (fp64 for fp64), differentiable in hidden and weight through both, each only where
    it requires grad. Rows may repeat. weight is a plain tensor: under FSDP2, call this where it is
    unsharded.
    """
    (n, v), shapes = (len(hidden), len(weight)), [list(x.shape) for x in (hidden, weight, targets)]
    if (
        hidden.ndim != 2
        or weight.ndim != 2
        or targets.shape != (n,)
        or hidden.shape[1] != weight.shape[1]
    ):
        raise ValueError(f"shapes must be [N, H], [V, H], [N]: got {shapes}")
    if (
        hidden.dtype != weight.dtype
        or not hidden.is_floating_point()
        or targets.is_floating_point()
    ):
        dtypes = [x.dtype for x in (hidden, weight, targets)]
        raise TypeError(
            f"dtypes of hidden and weight must agree, targets be integers: got {dtypes}"
        )
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    bad = (targets < 0) | (targets >= v)
    found = bad.any().to("cpu", non_blocking=True)
    copied = torch.cuda.current_stream(bad.device).record_event() if bad.is_cuda else None
    out = _LinearLogprob.apply(hidden, weight, targets.long().contiguous(), float(temperature))
    if copied:
        copied.synchronize()  # the host's only wait: the forward is queued by now
    if found:
        i = int(bad.nonzero()[0])
        raise IndexError(
            f"targets[{i}] = {int(targets[i])} is outside of the vocabulary 0..{v - 1}"
        )
    return out
