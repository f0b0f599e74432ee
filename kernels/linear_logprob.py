"""Linear layer -> log-softmax -> log-prob of the target and entropy, without logits in memory.

    z[n, v] = hidden[n] . weight[v] / T                p = softmax(z)
    logprob[n] = z[n, t_n] - logsumexp(z[n])           entropy[n] = -sum_v p log p
    dz = g_logprob (1[v = t_n] - p) - g_entropy p (log p + entropy)
    dhidden = dz @ weight / T                          dweight = dz.T @ hidden / T

Why fuse: at N = 8192, V = 151,936 the logits are 5.0 GB in fp32, and eager PyTorch holds about
three such tensors. Here a tile of some 2048 x 2048 is made by one matmul (cuBLAS on a GPU), folded
into four numbers a row (Triton on a GPU, torch ops on a CPU) and forgotten; the backward makes it
again and turns it into dz in place. That is one matmul more (8NHV FLOPs for 6NHV) and a fixed
workspace (<= 64 MB beside dhidden and the fp32 dweight) for a peak of about 15 GB. Logits reach the
softmax in fp32 (rounded to bf16 they are off by up to 0.06 at |z| = 20, which biases the policy),
and products are accumulated in fp32.

What it reaches on a GPU is not measured yet (`python -m bench.kernels --only linear_logprob`). On
two busy CPU cores (fp32, N = 4096, V = 151,936, H = 512, both outputs, forward and backward) tiles
took 21 and 31 s, eager PyTorch 58 and 51 s; beyond inputs and gradients 48 MB, eager 14.6 GB.

Shapes: N tokens, H width, V vocabulary; a tile is R rows (tokens) x C columns (of the vocabulary);
x_RC. A row's state, folded tile by tile: m = max z, s = sum e^(z-m), x = sum e^(z-m) (z-m), t = z
of the target. All relative to the max: logits of +-1e4 cost no digits, and as t <= m and s >= 1 no
log-prob is positive.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import on_triton, tl, triton

# bytes: the tile, its copy in the matmul's dtype, a chunk of hidden and of dhidden
WORKSPACE = 64_000_000
MIN = torch.finfo(torch.float32).min / 2  # the max of nothing, finite so that MIN - m is too
MIN_ = tl.constexpr(MIN)


def reference_linear_logprob(hidden, weight, targets, temperature=1.0):
    """Specify `linear_logprob`: logits in fp32 (fp64 for fp64), all in memory, several times."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    logits_NV = hidden.to(wide) @ weight.to(wide).T / temperature
    # N x V in fp32: this is the tensor that the tiles avoid.
    logp_NV = logits_NV.log_softmax(-1)
    logprob = logp_NV.gather(1, targets[:, None].long()).squeeze(1)
    entropy = -(logp_NV.exp() * logp_NV).sum(-1)
    return logprob, entropy


# ---- A step on a tile, in torch ops (CPU, fp64): fold it into the state, or turn it into dz


def _target_columns(targets_R, column, cols):
    """Return where each row's target stands in the tile that begins at `column`, and whether."""
    local = targets_R - column
    return local, (local >= 0) & (local < cols)


def _fold_torch(tile_RC, scratch_RC, targets_R, column, inv_temperature, state_4R):
    # Views of one buffer; the steps below write into it.
    m, s, x, t = state_4R
    cols = tile_RC.shape[1]
    if inv_temperature != 1.0:
        tile_RC.mul_(inv_temperature)
    local, inside = _target_columns(targets_R, column, cols)
    # Of the rows whose target isn't in this tile, some logit is gathered and not used.
    # (R,). A sum over all columns with a mask would read the tile once more.
    z = tile_RC.gather(1, local.clamp(0, cols - 1)[:, None])[:, 0]
    t.copy_(torch.where(inside, z, t))

    # Online softmax: the old sums are rescaled to the new max.
    peak = torch.maximum(m, tile_RC.amax(1))
    tile_RC.sub_(peak[:, None])
    torch.exp(tile_RC, out=scratch_RC)
    # <= 0: how far the old maximum lies below the new one.
    drop = m - peak
    scale = drop.exp()
    # x = sum e^(z-m) (z-m): with z - peak = (z - m) + drop, the old part is e^drop (x + drop s).
    x.copy_(scale * (x + drop * s))
    s.mul_(scale).add_(scratch_RC.sum(1))
    x.add_(scratch_RC.mul_(tile_RC).sum(1))
    m.copy_(peak)


def _dlogits_torch(tile_RC, scratch_RC, targets_R, column, inv_temperature, stats_3R, grads_2R):
    m, log_s, entropy = stats_3R
    g_logprob, g_entropy = grads_2R
    if inv_temperature != 1.0:
        tile_RC.mul_(inv_temperature)
    # With y = z - m and p = e^y / s: dz = p (-g_e y + g_e (log s - entropy) - g_l), in place.
    tile_RC.sub_(m[:, None])
    torch.exp(tile_RC, out=scratch_RC)
    # 1 / s, and the 1 / T of dz in the header: two factors a row instead of a pass over the tile.
    over_s = torch.exp(-log_s) * inv_temperature
    shift = (g_entropy * (log_s - entropy) - g_logprob) * over_s
    slope = -g_entropy * over_s
    torch.addcmul(shift[:, None], tile_RC, slope[:, None], out=tile_RC)
    tile_RC.mul_(scratch_RC)
    local, inside = _target_columns(targets_R, column, tile_RC.shape[1])
    # On a CPU that costs no wait; on CUDA this function runs for fp64 alone.
    row = inside.nonzero()[:, 0]
    # The 1[v = t] of the formula, for the rows that have their target here.
    tile_RC[row, local[row]] += g_logprob[row] * inv_temperature
    return tile_RC


# ---- The same in Triton, a program a row


@triton.jit
def _fold_kernel(
    tile, targets, state, column, inv_temperature, cols, state_stride, BLOCK: tl.constexpr
):
    """Fold one row of logits, which is read once."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    z = tl.load(tile + row * cols + c, mask=c < cols, other=MIN_) * inv_temperature
    state += row
    m = tl.load(state)
    s = tl.load(state + state_stride)
    x = tl.load(state + 2 * state_stride)
    peak = tl.maximum(m, tl.max(z, 0))
    e = tl.exp(z - peak)
    scale = tl.exp(m - peak)
    # Columns behind the tile's end are MIN, and their e is 0. But z - peak may overflow to -inf
    # there, and 0 * -inf is nan: hence the maximum.
    folded = tl.sum(e * tl.maximum(z - peak, MIN_), 0)
    tl.store(state, peak)
    tl.store(state + state_stride, s * scale + tl.sum(e, 0))
    tl.store(state + 2 * state_stride, scale * (x + (m - peak) * s) + folded)
    # The target's logit is read once more, from the cache, instead of being searched in z.
    t = tl.load(targets + row) - column
    inside = (t >= 0) & (t < cols)
    z_target = tl.load(tile + row * cols + t, mask=inside, other=0.0) * inv_temperature
    tl.store(state + 3 * state_stride, z_target, mask=inside)


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
    """Turn one row of logits into dz (in place where the matmul takes fp32)."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    z = tl.load(tile + row * cols + c, mask=c < cols, other=MIN_) * inv_temperature
    m = tl.load(stats + row)
    log_s = tl.load(stats + stats_stride + row)
    entropy = tl.load(stats + 2 * stats_stride + row)
    g_logprob = tl.load(grads + row)
    g_entropy = tl.load(grads + grads_stride + row)
    # Not z - (m + log s): at |z| = 1e4 that sum would round digits of log s away.
    logp = (z - m) - log_s
    # 1[v = t] g_logprob
    hit = tl.where(c == tl.load(targets + row) - column, g_logprob, 0.0)
    dz = hit - tl.exp(logp) * (g_logprob + g_entropy * (logp + entropy))
    tl.store(out + row * cols + c, dz * inv_temperature, mask=c < cols)


def _fold_triton(tile_RC, scratch_RC, targets_R, column, inv_temperature, state_4R):
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
    rows, cols = tile_RC.shape
    out_RC = tile_RC if scratch_RC is None else scratch_RC
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


# ---- The walk over the tiles


def _tile_shape(n, v, max_cells, cell_bytes, row_bytes, column_bytes):
    """Return rows and columns of a tile, by what they take of the workspace.

    By V / H, as others have it, a large vocabulary would get a thousand small matmuls.
    """
    # 2048 columns: on a GPU one program holds a row of a tile in its registers.
    cols = min(v, 2048)
    rows = max(min(n, max_cells // cols), 1)
    # Halve the longer side, so that the tile stays near a square, the shape of a fast matmul.
    while max(rows, cols) > 1:
        if rows * cols * cell_bytes + rows * row_bytes + cols * column_bytes <= WORKSPACE:
            break
        if rows >= cols:
            rows = (rows + 1) // 2
        else:
            cols = (cols + 1) // 2
    return rows, cols


def _matmul(a, b, out, beta=0.0):
    """out = beta out + a @ b, accumulated in fp32; a 16-bit product into fp32 is CUDA's only."""
    if a.dtype == out.dtype:
        return torch.addmm(out, a, b, beta=beta, out=out)
    return torch.addmm(out, a, b, out_dtype=out.dtype, beta=beta, out=out)


class _Tiles:
    """The buffers of a walk over the tiles, and the steps on a tile.

    wide is the dtype of the logits, fp32 (or fp64); operand that of the matmuls' factors, 16 bits
    on CUDA where the inputs are.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, backward: bool):
        self.hidden = hidden
        self.weight = weight
        self.wide = torch.promote_types(hidden.dtype, torch.float32)
        self.operand = hidden.dtype if hidden.is_cuda else self.wide
        triton_runs = on_triton(hidden) and self.wide == torch.float32
        self.fold = _fold_triton if triton_runs else _fold_torch
        self.dlogits = _dlogits_triton if triton_runs else _dlogits_torch

        # The torch ops need scratch; so does dz, if a matmul takes it in 16 bits.
        in_place = triton_runs and (self.operand == self.wide or not backward)
        cell_bytes = self.wide.itemsize
        if not in_place:
            cell_bytes += self.operand.itemsize
        # Bytes of a row of hidden, dhidden or weight in the logits' dtype.
        wide_row = self.wide.itemsize * hidden.shape[1]
        # A cast chunk is made while the last is still held.
        cast = 0 if self.operand == hidden.dtype else 2 * wide_row
        row_bytes = cast + wide_row if backward else cast
        self.rows, self.cols = _tile_shape(
            len(hidden), len(weight), self._max_cells(backward), cell_bytes, row_bytes, cast
        )

        # Flat, as the last tile of a row is narrower, and has to be contiguous for all that.
        self.tile = hidden.new_empty(self.rows * self.cols, dtype=self.wide)
        self.scratch = None if in_place else torch.empty_like(self.tile, dtype=self.operand)
        self.d_hidden = None
        if backward:
            self.d_hidden = hidden.new_empty(self.rows, hidden.shape[1], dtype=self.wide)

    def _max_cells(self, backward: bool) -> int:
        if not self.hidden.is_cuda:
            return 1 << 21  # 8 MB, which stay in the cache
        # 4096 x 2048; backward, with dz and dhidden, 2048 x 2048: 256 and 128 blocks of a matmul
        # for an H100's 132 multiprocessors.
        return 1 << 22 if backward else 1 << 23

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield the rows of a chunk, and its hidden states in the matmul's dtype."""
        for first in range(0, len(self.hidden), self.rows):
            chunk = slice(first, first + self.rows)
            yield chunk, self.hidden[chunk].to(self.operand)

    def tiles(self, hidden_RH: Tensor) -> Iterator[tuple[int, Tensor, Tensor, Tensor | None]]:
        """Yield a tile's first column, its rows of weight, its logits, and scratch of its size."""
        rows = len(hidden_RH)
        for i, weight_CH in enumerate(self.weight.split(self.cols)):
            cols = len(weight_CH)
            weight_CH = weight_CH.to(self.operand)
            tile_RC = self.tile[: rows * cols].view(rows, cols)
            scratch_RC = None
            if self.scratch is not None:
                scratch_RC = self.scratch[: rows * cols].view(rows, cols)
            yield i * self.cols, weight_CH, _matmul(hidden_RH, weight_CH.T, tile_RC), scratch_RC


def _forward_tiles(hidden, weight, targets, temperature):
    walk = _Tiles(hidden, weight, backward=False)
    state_4N = hidden.new_zeros(4, len(hidden), dtype=walk.wide)
    # An empty row: no maximum yet, sums of 0.
    state_4N[0] = MIN
    for chunk, hidden_RH in walk.chunks():
        targets_R = targets[chunk]
        state_4R = state_4N[:, chunk]
        for column, _, tile_RC, scratch_RC in walk.tiles(hidden_RH):
            walk.fold(tile_RC, scratch_RC, targets_R, column, 1 / temperature, state_4R)
    return state_4N


def _backward_tiles(
    hidden, weight, targets, temperature, stats_3N, grads_2N, need_hidden, need_weight
):
    """Return dhidden and dweight, None where not needed.

    Within a chunk dhidden is summed over the tiles; dweight over the chunks, in fp32 throughout.
    """
    # The logits are made again, by one more product: cheaper than to keep 5 GB of them.
    walk = _Tiles(hidden, weight, backward=True)
    d_hidden = torch.empty_like(hidden) if need_hidden else None
    d_weight = None
    if need_weight:
        # Without rows there is no first chunk that writes it.
        new = weight.new_empty if len(hidden) else weight.new_zeros
        d_weight = new(weight.shape, dtype=walk.wide)
    for chunk, hidden_RH in walk.chunks():
        targets_R = targets[chunk]
        stats_3R = stats_3N[:, chunk]
        grads_2R = grads_2N[:, chunk]
        d_chunk_RH = walk.d_hidden[: len(hidden_RH)]
        for column, weight_CH, tile_RC, scratch_RC in walk.tiles(hidden_RH):
            dz_RC = walk.dlogits(
                tile_RC, scratch_RC, targets_R, column, 1 / temperature, stats_3R, grads_2R
            )
            if need_hidden:
                # beta 0 at the first tile: it overwrites what the buffer held, so that nobody has
                # to clear it.
                _matmul(dz_RC, weight_CH, d_chunk_RH, beta=float(column > 0))
            if need_weight:
                d_weight_CH = d_weight[column : column + walk.cols]
                _matmul(dz_RC.T, hidden_RH, d_weight_CH, beta=float(chunk.start > 0))
        if need_hidden:
            d_hidden[chunk] = d_chunk_RH
    if need_weight:
        d_weight = d_weight.to(weight.dtype)
    return d_hidden, d_weight


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature):
        m, s, x, t = _forward_tiles(hidden, weight, targets, temperature)
        # A log-prob near 0 must not be rounded to above it, nor an entropy to below.
        # log p of the target = t - m - log s; -sum p log p = log s - x / s, as log p = (z - m) -
        # log s.
        log_s = s.log()
        logprob = (t - m - log_s).clamp_(max=0)
        entropy = (log_s - x / s).clamp_(min=0)
        # Three numbers a token are all that is kept of the softmax.
        ctx.save_for_backward(hidden, weight, targets, torch.stack((m, log_s, entropy)))
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)
        return logprob, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        hidden, weight, targets, stats_3N = ctx.saved_tensors
        # None: that output was not used.
        zeros = torch.zeros_like(stats_3N[0])
        grads_2N = torch.stack([zeros if grad is None else grad for grad in grads])
        d_hidden, d_weight = _backward_tiles(
            hidden,
            weight,
            targets,
            ctx.temperature,
            stats_3N,
            grads_2N,
            *ctx.needs_input_grad[:2],
        )
        return d_hidden, d_weight, None, None


# ---- The public call


def _check(hidden, weight, targets, temperature):
    shapes = [list(x.shape) for x in (hidden, weight, targets)]
    matrices = hidden.ndim == weight.ndim == 2
    if not matrices or hidden.shape[1] != weight.shape[1] or targets.shape != (len(hidden),):
        raise ValueError(f"shapes must be [N, H], [V, H], [N]: got {shapes}")
    floats = hidden.is_floating_point() and hidden.dtype == weight.dtype
    if not floats or targets.is_floating_point():
        dtypes = [x.dtype for x in (hidden, weight, targets)]
        raise TypeError(
            f"dtypes of hidden and weight must agree, targets be integers: got {dtypes}"
        )
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")


def linear_logprob(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return log-prob of targets[N], and entropy, under softmax(hidden @ weight.T / temperature).

    hidden[N, H], weight[V, H]. Two fp32 [N] (fp64 for fp64), differentiable in hidden and weight
    through both, each only where it requires grad. Rows may repeat. weight is a plain tensor: under
    FSDP2, call this where it is unsharded. Targets outside of 0..V-1 raise IndexError.
    """
    _check(hidden, weight, targets, temperature)
    vocab = len(weight)
    bad = (targets < 0) | (targets >= vocab)
    # The host's only wait comes when the forward is queued.
    any_bad = bad.any().to("cpu", non_blocking=True)
    copied = torch.cuda.current_stream(bad.device).record_event() if bad.is_cuda else None
    out = _LinearLogprob.apply(hidden, weight, targets.long().contiguous(), float(temperature))
    if copied:
        copied.synchronize()
    if any_bad:
        i = int(bad.nonzero()[0])
        raise IndexError(
            f"targets[{i}] = {int(targets[i])} is outside of the vocabulary 0..{vocab - 1}"
        )
    return out
