"""The vision towers of Qwen2-VL, Qwen2.5-VL and Qwen3-VL: pixels in, patch features and merged
tokens out.

One skeleton, three sets of parts. An image is cut into patches of p x p pixels (repeated over two
frames, as the towers were built for video), each becomes a vector by one matrix product, the
vectors pass through pre-norm ViT blocks with 2D rotary positions, and each m x m square of patches
(m = 2) is merged into one token of the language model.

             patch bias  learnt positions  norm       MLP             attention            merger
             deepstack
Qwen2-VL     no          no                LayerNorm  quick GELU      whole image          ln_q, mlp   no
Qwen2.5-VL   no          no                RMSNorm    SwiGLU          windows, some whole  ln_q, mlp   no
Qwen3-VL     yes         yes, bilinear     LayerNorm  GELU (tanh)     whole image          norm, fc    yes

Parameter names are those of the published checkpoints below `visual.`.

P patches, packed over images; the m * m patches of a merged token are neighbours (the image
processor's order). M = P / m^2 merged tokens; C width of the tower; H width of the language model;
N images.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.layers import qk_norm_rope, rms_norm, swiglu
from kernels.packed_attention import Windows, upload, window_attention


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class GeluMLP(nn.Module):
    """Linear, activation, Linear; `names` are the checkpoint's names of the two layers."""

    def __init__(self, width: int, inner: int, act: str, names: tuple[str, str]):
        super().__init__()
        self.names, self.act = names, act
        self.add_module(names[0], nn.Linear(width, inner))
        self.add_module(names[1], nn.Linear(inner, width))

    def forward(self, x: Tensor) -> Tensor:
        first, second = (self.get_submodule(name) for name in self.names)
        return second(activate(first(x), self.act))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), the MLP of the decoders and of Qwen2.5-VL's tower."""

    def __init__(self, width: int, inner: int, bias: bool = False):
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=bias)
        self.up_proj = nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


def activate(x: Tensor, act: str) -> Tensor:
    if act == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    return F.gelu(x, approximate="tanh" if act == "gelu_pytorch_tanh" else "none")


class VisionAttention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, windows: Windows) -> Tensor:
        q, k, v = self.qkv(x).view(len(x), 3, self.heads, -1).unbind(1)  # (P, heads, head_dim) each
        if x.is_cuda:  # in fp32 as well, by one kernel
            q, k = qk_norm_rope(q, k, cos, sin)
        else:
            q, k = rotate(q.float(), cos, sin).to(x.dtype), rotate(k.float(), cos, sin).to(x.dtype)
        return self.proj(window_attention(q, k, v, windows).flatten(1))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x (..., heads, D) by angles whose cos and sin are (..., D), halves
    duplicated."""
    first, second = x.chunk(2, dim=-1)
    return x * cos[..., None, :] + torch.cat((-second, first), dim=-1) * sin[..., None, :]


class VisionBlock(nn.Module):
    def __init__(self, width: int, heads: int, norm: type[nn.Module], mlp: nn.Module):
        super().__init__()
        self.norm1, self.norm2 = norm(width, eps=1e-6), norm(width, eps=1e-6)
        self.attn = VisionAttention(width, heads)
        self.mlp = mlp

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, windows: Windows) -> Tensor:
        x = x + self.attn(self.norm1(x), cos, sin, windows)
        return x + self.mlp(self.norm2(x))


class Merger(nn.Module):
    """Qwen2-VL and Qwen2.5-VL: norm each patch, concatenate m * m of them, two layers."""

    def __init__(self, width: int, unit: int, out: int, norm: type[nn.Module]):
        super().__init__()
        self.inner = width * unit
        self.ln_q = norm(width, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(self.inner, self.inner), nn.GELU(), nn.Linear(self.inner, out)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.ln_q(x).view(-1, self.inner))  # (M, H)


class Merger3(nn.Module):
    """Qwen3-VL: as above under other names; a deepstack merger norms after the concatenation
    (`after`)."""

    def __init__(self, width: int, unit: int, out: int, after: bool):
        super().__init__()
        self.inner, self.after = width * unit, after
        self.norm = nn.LayerNorm(self.inner if after else width, eps=1e-6)
        self.linear_fc1 = nn.Linear(self.inner, self.inner)
        self.linear_fc2 = nn.Linear(self.inner, out)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x.view(-1, self.inner)) if self.after else self.norm(x).view(-1, self.inner)
        return self.linear_fc2(F.gelu(self.linear_fc1(x)))  # (M, H)


class VisionTower(nn.Module):
    """One tower for the three families; `config` is transformers' config object of the whole
    model."""

    def __init__(self, config):
        super().__init__()
        c, self.family = config.vision_config, config.model_type
        self.merge, self.heads, self.patch = c.spatial_merge_size, c.num_heads, c.patch_size
        width = c.embed_dim if self.family == "qwen2_vl" else c.hidden_size
        out = c.hidden_size if self.family == "qwen2_vl" else c.out_hidden_size
        self.width, three = width, self.family == "qwen3_vl"
        kernel = (c.temporal_patch_size, c.patch_size, c.patch_size)
        self.patch_embed = nn.ModuleDict(
            {"proj": nn.Conv3d(c.in_channels, width, kernel, kernel, bias=three)}
        )
        norm = RMSNorm if self.family == "qwen2_5_vl" else nn.LayerNorm
        self.blocks = nn.ModuleList(
            [VisionBlock(width, c.num_heads, norm, self._mlp(c)) for _ in range(c.depth)]
        )
        unit = self.merge**2
        self.merger = (
            Merger3(width, unit, out, after=False) if three else Merger(width, unit, out, norm)
        )
        self.theta = c.rope_parameters["rope_theta"]
        self.full_blocks, self.window, self.deepstack_at = set(range(c.depth)), None, ()
        if self.family == "qwen2_5_vl":
            self.full_blocks = set(c.fullatt_block_indexes)
            self.window = c.window_size // self.merge // c.patch_size  # in merged tokens
        if three:
            self.deepstack_at = tuple(c.deepstack_visual_indexes)
            self.pos_embed = nn.Embedding(c.num_position_embeddings, width)
            mergers = [Merger3(width, unit, out, after=True) for _ in self.deepstack_at]
            self.deepstack_merger_list = nn.ModuleList(mergers)

    def _mlp(self, c) -> nn.Module:
        if self.family == "qwen2_vl":
            return GeluMLP(
                c.embed_dim, int(c.embed_dim * c.mlp_ratio), c.hidden_act, ("fc1", "fc2")
            )
        if self.family == "qwen2_5_vl":
            return SwiGLU(c.hidden_size, c.intermediate_size, bias=True)
        return GeluMLP(
            c.hidden_size, c.intermediate_size, c.hidden_act, ("linear_fc1", "linear_fc2")
        )

    def forward(self, pixel_values: Tensor, grid_thw: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Patch features (P, C) after the last block, in the input's order, and deepstack tokens,
        each (M, H).

        pixel_values (P, 3 * 2 * p * p), grid_thw (N, 3) patches along time, height, width.
        """
        grids = grid_thw.tolist()
        proj = self.patch_embed["proj"]
        # (P, C)
        x = F.linear(pixel_values.to(proj.weight.dtype), proj.weight.flatten(1), proj.bias)
        at = upload(patch_positions(grids, self.merge), x.device)  # (P, 2)
        if self.family == "qwen3_vl":
            x = x + self._learnt_positions(at, grids).to(x.dtype)
        cos, sin = self._angles(at)
        whole = Windows([h * w for t, h, w in grids for _ in range(t)], x.device)
        windows = whole
        if self.window is not None:
            order, lengths = window_order(grids, self.merge, self.window)
            windows = Windows(lengths, x.device)
            back = upload(order.argsort(), x.device)
            order = upload(order, x.device)
            # A permutation: no row's gradient is a sum.
            x, cos, sin = (t.index_select(0, order) for t in (x, cos, sin))
        deepstack = []
        for i, block in enumerate(self.blocks):
            x = block(x, cos, sin, whole if i in self.full_blocks else windows)
            if i in self.deepstack_at:
                deepstack.append(self.deepstack_merger_list[self.deepstack_at.index(i)](x))
        return (x if self.window is None else x.index_select(0, back)), deepstack

    def _angles(self, at: Tensor) -> tuple[Tensor, Tensor]:
        """cos, sin (P, head_dim) fp32: a quarter of the head turns by the row, a quarter by the
        column, twice.
        """
        quarter = torch.arange(
            0, self.width // self.heads // 2, 2, device=at.device, dtype=torch.float
        )
        inv_freq = 1.0 / self.theta ** (quarter / (self.width // self.heads // 2))
        angles = (at[:, :, None].float() * inv_freq).flatten(1)
        return torch.cat((angles, angles), -1).cos(), torch.cat((angles, angles), -1).sin()

    def _learnt_positions(self, at: Tensor, grids: list[list[int]]) -> Tensor:
        """Qwen3-VL's square table of positions, resampled bilinearly (corners aligned) to each
        image's grid: (P, C).
        """
        side = round(self.pos_embed.num_embeddings**0.5)
        sizes, counts = torch.tensor(grids)[:, 1:], torch.tensor([t * h * w for t, h, w in grids])
        extent = upload(sizes.repeat_interleave(counts, 0), at.device)  # (P, 2)
        where = at * (side - 1) / (extent - 1).clamp(min=1)  # (P, 2) in table units
        low = where.floor().long()
        high, frac = (low + 1).clamp(max=side - 1), (where - low).to(self.pos_embed.weight.dtype)
        total = 0
        for rows, wr in ((low[:, 0], 1 - frac[:, 0]), (high[:, 0], frac[:, 0])):
            for cols, wc in ((low[:, 1], 1 - frac[:, 1]), (high[:, 1], frac[:, 1])):
                total = total + self.pos_embed(rows * side + cols) * (wr * wc)[:, None]
        return total


def patch_positions(grids: list[list[int]], merge: int) -> Tensor:
    """(P, 2) row and column of every patch, in the image processor's order (merge squares
    together)."""
    out = []
    for t, h, w in grids:
        rows, cols = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        at = torch.stack((rows, cols), -1).view(h // merge, merge, w // merge, merge, 2)
        out.append(at.transpose(1, 2).reshape(-1, 2).repeat(t, 1))
    return torch.cat(out)


def window_order(grids: list[list[int]], merge: int, size: int) -> tuple[Tensor, list[int]]:
    """Qwen2.5-VL: the patches' order (P,) with each window of size x size merged tokens together,
    and their lengths.
    """
    order, lengths, start = [], [], 0
    for t, h, w in grids:
        rows, cols = torch.meshgrid(
            torch.arange(h // merge), torch.arange(w // merge), indexing="ij"
        )
        window = (rows // size * w + cols // size).flatten()
        for _ in range(t):
            order.append(start + window.argsort(stable=True))
            lengths += (window.unique(return_counts=True)[1] * merge**2).tolist()
            start += len(window)
    units = torch.cat(order)[:, None] * merge**2 + torch.arange(merge**2)
    return units.flatten(), lengths
