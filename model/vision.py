"""The vision towers of Qwen2-VL, Qwen2.5-VL, Qwen3-VL and Qwen3.5: pixels in, patch features and
merged tokens out.

One skeleton, three sets of parts; Qwen3.5's is Qwen3-VL's without deepstack. An image is cut into
patches of p x p pixels (repeated over two frames, as the towers were built for video). Each patch
becomes a vector by one matrix product, the vectors pass through pre-norm ViT blocks with 2D rotary
positions, and each m x m square of patches (m = 2) is merged into one token of the language model.

                         Qwen2-VL       Qwen2.5-VL            Qwen3-VL
    patch bias           no             no                    yes
    learnt positions     no             no                    yes, resampled to the image's grid
    norm                 LayerNorm      RMSNorm               LayerNorm
    MLP                  quick GELU     SwiGLU                GELU (tanh)
    attention            whole image    windows, some whole   whole image
    merger               ln_q, mlp      ln_q, mlp             norm, fc1, fc2
    deepstack            no             no                    yes

families.py has this table as data. Parameter names are those of the published checkpoints below
`visual.`.

P patches, packed over images; the m * m patches of a merged token are neighbours (the image
processor's order). M = P / m^2 merged tokens; C width of the tower; H width of the language model;
N images.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.layers import qk_norm_rope, rms_norm, swiglu
from kernels.packed_attention import Windows, upload, window_attention
from model.families import VisionSizes

# Every norm in the towers has it.
EPS = 1e-6


class RMSNorm(nn.Module):
    """x / rms(x) * (offset + weight) over the last axis."""

    def __init__(self, width: int, eps: float, offset: float = 0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.full((width,), 1 - offset))
        self.eps = eps
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps, self.offset)


class GeluMLP(nn.Module):
    """Linear, activation, Linear; `names` are the checkpoint's names of the two layers."""

    def __init__(self, width: int, inner: int, activation: str, names: tuple[str, str]):
        super().__init__()
        self.activation = activation
        self.names = names
        self.add_module(names[0], nn.Linear(width, inner))
        self.add_module(names[1], nn.Linear(inner, width))

    def forward(self, x: Tensor) -> Tensor:
        first = self.get_submodule(self.names[0])
        second = self.get_submodule(self.names[1])
        return second(activate(first(x), self.activation))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), the MLP of the decoders and of Qwen2.5-VL's tower."""

    def __init__(self, width: int, inner: int, bias: bool = False):
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=bias)
        self.up_proj = nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


def activate(x: Tensor, activation: str) -> Tensor:
    """Apply the activation that a config names: quick_gelu, gelu_pytorch_tanh, or GELU."""
    if activation == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_pytorch_tanh" else "none")


class VisionAttention(nn.Module):
    """Full attention within each window, with rotary positions."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        windows: Windows,
    ) -> Tensor:
        qkv = self.qkv(x)
        qkv = qkv.view(len(x), 3, self.heads, -1)
        q, k, v = qkv.unbind(1)  # (P, heads, head_dim) each
        # In fp32, as transformers does. On CUDA that is one kernel, with fp32 inside.
        if x.is_cuda:
            q, k = qk_norm_rope(q, k, cos, sin)
        else:
            q = rotate(q.float(), cos, sin).to(x.dtype)
            k = rotate(k.float(), cos, sin).to(x.dtype)
        out = window_attention(q, k, v, windows)
        return self.proj(out.flatten(1))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn x (..., heads, D) by angles whose cos and sin are (..., D), halves duplicated."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return x * cos[..., None, :] + turned * sin[..., None, :]


class VisionBlock(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, s: VisionSizes):
        super().__init__()
        self.norm1 = make_norm(s)
        self.norm2 = make_norm(s)
        self.attn = VisionAttention(s.width, s.heads)
        self.mlp = make_mlp(s)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        windows: Windows,
    ) -> Tensor:
        x = x + self.attn(self.norm1(x), cos, sin, windows)
        return x + self.mlp(self.norm2(x))


def make_norm(s: VisionSizes) -> nn.Module:
    """Make the family's norm over the width of the tower."""
    if s.family.norm == "rms":
        return RMSNorm(s.width, EPS)
    return nn.LayerNorm(s.width, EPS)


def make_mlp(s: VisionSizes) -> nn.Module:
    """Make the family's MLP, with its names."""
    if s.family.mlp_names is None:
        return SwiGLU(s.width, s.inner, bias=True)
    return GeluMLP(s.width, s.inner, s.activation, s.family.mlp_names)


class Merger(nn.Module):
    """Qwen2-VL and Qwen2.5-VL: norm each patch (P, C), join m * m of them, two layers: (M, H)."""

    def __init__(self, s: VisionSizes):
        super().__init__()
        self.inner = s.width * s.merge**2
        self.ln_q = make_norm(s)
        self.mlp = nn.Sequential(
            nn.Linear(self.inner, self.inner),
            nn.GELU(),
            nn.Linear(self.inner, s.output),
        )

    def forward(self, x: Tensor) -> Tensor:
        # The m * m patches of a token are neighbours, so joining them is a view.
        joined = self.ln_q(x).view(-1, self.inner)
        return self.mlp(joined)


class FlatMerger(nn.Module):
    """From Qwen3-VL on: the same under other names. Deepstack's norm the joined patches."""

    def __init__(self, s: VisionSizes, norm_joined: bool):
        super().__init__()
        self.inner = s.width * s.merge**2
        self.norm_joined = norm_joined
        normed_width = self.inner if norm_joined else s.width
        self.norm = nn.LayerNorm(normed_width, EPS)
        self.linear_fc1 = nn.Linear(self.inner, self.inner)
        self.linear_fc2 = nn.Linear(self.inner, s.output)

    def forward(self, x: Tensor) -> Tensor:
        if self.norm_joined:
            x = self.norm(x.view(-1, self.inner))
        else:
            x = self.norm(x).view(-1, self.inner)
        return self.linear_fc2(F.gelu(self.linear_fc1(x)))


class VisionTower(nn.Module):
    """One tower for all families; `config` is transformers' config object of the model."""

    def __init__(self, config):
        super().__init__()
        s = VisionSizes.of(config)
        self.sizes = s
        kernel = (s.frames, s.patch, s.patch)
        # A convolution that is as wide as its stride: only its weights are used, as a matrix.
        bias = s.family.patch_bias
        proj = nn.Conv3d(s.channels, s.width, kernel, kernel, bias=bias)
        self.patch_embed = nn.ModuleDict({"proj": proj})
        self.blocks = nn.ModuleList([VisionBlock(s) for _ in range(s.depth)])
        if s.family.has_flat_merger:
            self.merger = FlatMerger(s, norm_joined=False)
        else:
            self.merger = Merger(s)
        # What only some families have.
        if s.family.has_learnt_positions:
            self.pos_embed = nn.Embedding(s.positions, s.width)
        if s.family.has_deepstack:
            mergers = [FlatMerger(s, norm_joined=True) for _ in s.deepstack_blocks]
            self.deepstack_merger_list = nn.ModuleList(mergers)

    def forward(self, pixel_values: Tensor, grid_thw: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Encode patches: features (P, C), and deepstack tokens, (M, H) a block.

        Features are those after the last block, deepstack tokens come from early ones. pixel_values
        (P, 3 * 2 * p * p); grid_thw (N, 3) patches along time, height, width, on the host. Features
        come in the order of the patches.
        """
        s = self.sizes
        # It lies on the host, so reading it makes nobody wait.
        grids = grid_thw.tolist()
        proj = self.patch_embed["proj"]
        weight = proj.weight.flatten(1)  # (C, 3 * 2 * p * p)
        x = F.linear(pixel_values.to(weight.dtype), weight, proj.bias)  # (P, C)

        # Where each patch is: learnt vectors for Qwen3-VL, and angles that turn q and k for all.
        positions = upload(patch_positions(grids, s.merge), x.device)  # (P, 2)
        if s.family.has_learnt_positions:
            x = x + self._learnt_positions(positions, grids).to(x.dtype)
        cos, sin = self._angles(positions)

        # Who sees whom: all patches of a frame, or those of a window (Qwen2.5-VL).
        whole_images = Windows(frame_lengths(grids), x.device)
        windows = whole_images
        if s.window is not None:
            # The patches of a window have to be neighbours for that. The patches of a token stay
            # together. A permutation: no row's gradient is a sum.
            order, lengths = window_order(grids, s.merge, s.window)
            windows = Windows(lengths, x.device)
            back = upload(order.argsort(), x.device)
            order = upload(order, x.device)
            x = x.index_select(0, order)
            cos = cos.index_select(0, order)
            sin = sin.index_select(0, order)

        # The blocks. Early features go to the decoder as they are at that depth.
        deepstack = []
        for i, block in enumerate(self.blocks):
            seen = whole_images if i in s.full_blocks else windows
            x = block(x, cos, sin, seen)
            if i in s.deepstack_blocks:
                merger = self.deepstack_merger_list[len(deepstack)]
                deepstack.append(merger(x))
        if s.window is not None:
            # Back to the image's order, in which regions count.
            x = x.index_select(0, back)
        return x, deepstack

    def _angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos, sin (P, head_dim) in fp32 for patches at rows and columns (P, 2).

        A quarter of a head's channels turns by the row, a quarter by the column; the second half
        repeats the first.
        """
        half = self.sizes.width // self.sizes.heads // 2
        # The usual frequencies, of an embedding that is half a head wide.
        even = torch.arange(0, half, 2, device=positions.device, dtype=torch.float)
        inv_freq = 1.0 / self.sizes.theta ** (even / half)  # (head_dim / 4,)
        angles = positions[:, :, None].float() * inv_freq  # (P, 2, head_dim / 4)
        angles = angles.flatten(1)
        angles = torch.cat((angles, angles), -1)
        return angles.cos(), angles.sin()

    def _learnt_positions(self, positions: Tensor, grids: list[list[int]]) -> Tensor:
        """Resample Qwen3-VL's square table of positions to each image's grid: (P, C).

        Bilinear, corners aligned: an image's last row and column lie on those of the table.
        """
        side = round(self.pos_embed.num_embeddings**0.5)
        grids = torch.tensor(grids)
        extent = grids[:, 1:].repeat_interleave(grids.prod(1), 0)  # (P, 2) rows, columns
        extent = upload(extent, positions.device)
        # In the table's units: (P, 2). An image of one row lies on the table's first.
        place = positions * (side - 1) / (extent - 1).clamp(min=1)
        low = place.floor().long()
        high = (low + 1).clamp(max=side - 1)
        to_high = (place - low).to(self.pos_embed.weight.dtype)
        to_low = 1 - to_high
        # The four entries around each patch. In transformers' order: a sum depends on it.
        total = 0
        corners = ((low, to_low), (high, to_high))
        for row, row_weight in corners:
            for column, column_weight in corners:
                entries = self.pos_embed(row[:, 0] * side + column[:, 1])
                weight = row_weight[:, 0] * column_weight[:, 1]
                total = total + entries * weight[:, None]
        return total


def frame_lengths(grids: list[list[int]]) -> list[int]:
    """Count the patches of every frame: attention never crosses from one to the next."""
    lengths = []
    for frames, rows, columns in grids:
        lengths += [rows * columns] * frames
    return lengths


def patch_positions(grids: list[list[int]], merge: int) -> Tensor:
    """Return row and column of every patch: (P, 2).

    In the image processor's order: the patches of a merge x merge square behind each other.
    """
    pieces = []
    for frames, rows, columns in grids:
        grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
        grid = grid.view(rows // merge, merge, columns // merge, merge, 2)
        squares = grid.transpose(1, 2)  # rows, columns of squares; rows, columns within one
        pieces.append(squares.reshape(-1, 2).repeat(frames, 1))
    return torch.cat(pieces)


def window_order(grids: list[list[int]], merge: int, size: int) -> tuple[Tensor, list[int]]:
    """Sort patches by windows of size x size merged tokens (Qwen2.5-VL).

    Returns the patches' order (P,) and the number of patches of each window. Windows at the right
    and lower border may be smaller.
    """
    # The patches of a merged token stay together.
    unit = merge**2
    order = []
    lengths = []
    start = 0
    for frames, rows, columns in grids:
        row = torch.arange(rows // merge)[:, None]
        column = torch.arange(columns // merge)[None]
        # Each token's window, numbered row by row. Any number that grows from window to window will
        # do: `columns` is more than enough.
        window = (row // size * columns + column // size).flatten()
        counts = window.unique(return_counts=True)[1] * unit
        for _ in range(frames):
            # Stable: within a window patches keep their order.
            order.append(start + window.argsort(stable=True))
            lengths += counts.tolist()
            start += len(window)
    # From tokens to their patches, which are neighbours.
    first = torch.cat(order) * unit
    patches = first[:, None] + torch.arange(unit)
    return patches.flatten(), lengths
