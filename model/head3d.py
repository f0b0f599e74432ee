"""Metric 3D in and out: a point map embedded into the patch features, and a head that reads centres
at region tokens.

In (paper: 3D positional embedding; SR-3D). The processor turns depth and intrinsics into a
camera-frame point (x right, y down, z forward, metres) per patch; here it becomes

    e(p) = MLP( p, a sin(2 pi p / L), a cos(2 pi p / L) ),    L = 32 m, 16 m, ... 0.25 m,  a = sqrt(L / 32 m)

and is added to the vision tower's last features. The paper adds a relative, scale-free map; its
targets are metric, so ours is. The MLP's last layer starts at zero: at step 0 a pretrained model
equals its checkpoint, to the bit. (A model trained from scratch needs it loud instead:
`init_unit_scale`.)

Out. From the decoder's hidden state at a region token: the centre (and size) of the region's object
in metres, in the camera frame of the region's own image. It is an auxiliary loss in SFT and a
second opinion beside the numbers in the text.

P patches, R regions, C width of the tower, H width of the decoder.
"""

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from kernels.packed_attention import upload
from model.region import shares

WAVELENGTHS = tuple(32.0 / 2**k for k in range(8))  # metres


def read_depth(depth, shape) -> np.ndarray:
    """(H, W) metres: an array as it is, or a 16-bit PNG in millimetres."""
    if isinstance(depth, str | Path):
        with Image.open(depth) as picture:
            if not picture.mode.startswith("I"):
                raise ValueError(
                    f"depth of mode {picture.mode}; a 16-bit PNG in millimetres is wanted"
                )
            depth = np.asarray(picture).astype(np.float32) / 1000
    depth = np.asarray(depth)
    if depth.shape != shape:
        raise ValueError(f"depth of (height, width) {depth.shape}, image of {shape}")
    return depth


def point_grid(depth: np.ndarray, intrinsics, grid, kind: str) -> np.ndarray:
    """Mean camera-frame point of each patch's valid pixels -> (rows, columns, 3) f32, NaN where it
    has none.

    metric: X = (u - cx) z / fx, u the pixel's column (centres lie at integers, as in OpenCV).
    relative: the paper's map, u and v in [-1, 1], z = 2 d - 1 with d the inverted, min-max
    normalised disparity."""
    (height, width), (rows, columns) = depth.shape, grid
    valid = np.isfinite(depth) & (depth > 0)
    z, u, v = np.where(valid, depth, 1).astype(np.float64), np.arange(width), np.arange(height)
    if kind == "relative":
        near, far = (1 / z[valid]).max(initial=0), (1 / z[valid]).min(initial=np.inf)
        z = 2 * (near - 1 / z) / max(near - far, 1e-9) - 1
        u, v = np.linspace(-1, 1, width), np.linspace(-1, 1, height)
    else:
        fx, fy, cx, cy = intrinsics
        u, v = (u - cx) / fx, (v - cy) / fy
    z *= valid
    down, right = shares(height, rows).T, shares(width, columns)  # (rows, H), (W, columns)
    strips = down @ z
    sums = np.stack([strips @ (u[:, None] * right), (down * v) @ z @ right, strips @ right], -1)
    area = (down @ valid @ right)[..., None]
    return np.where(area > 1e-9, sums / np.maximum(area, 1e-9), np.nan).astype(np.float32)


def fourier(points: Tensor) -> Tensor:
    """points (P, 3) metres -> (P, 51): the coordinates, and a sine and cosine per wavelength, times
    its a.

    Without a the short waves, which cancel in a region's mean, drown the long ones: with it a small
    head on pooled embeddings reached a median of 0.15 m instead of 0.17 m in 600 steps."""
    waves = upload(torch.tensor(WAVELENGTHS, dtype=points.dtype), points.device)
    # (P, 3, 8), (8,)
    phase, loudness = points[:, :, None] * (2 * math.pi / waves), (waves / waves[0]).sqrt()
    waves = (phase.sin() * loudness, phase.cos() * loudness)
    return torch.cat((points, *(wave.flatten(1) for wave in waves)), dim=1)


class PointEmbedding(nn.Module):
    """Camera-frame points (P, 3) in metres, NaN where unknown -> (P, C) to add; zero where
    unknown."""

    def __init__(self, width: int):
        super().__init__()
        self.up = nn.Linear(3 * (1 + 2 * len(WAVELENGTHS)), width)
        self.down = nn.Linear(width, width)

    def init_silent(self, seed: int = 0) -> None:
        """Output exactly 0 for every input, with gradients that are not."""
        self._init(seed)
        nn.init.zeros_(self.down.weight)

    def init_unit_scale(self, seed: int = 0) -> None:
        """Output of about unit RMS, for a model trained from scratch: silent, it is never heard
        (tried)."""
        self._init(seed)

    def _init(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for layer, gain in ((self.up, 2.0), (self.down, 2.0)):
                noise = torch.randn(layer.weight.shape, generator=generator)
                layer.weight.copy_(noise * gain / layer.in_features**0.5)
                layer.bias.zero_()

    def forward(self, points: Tensor) -> Tensor:
        known = points.isfinite().all(dim=1, keepdim=True)
        # The phase needs fp32: at 8 m and a wavelength of 0.25 m bf16 has no digits left.
        features = fourier(torch.where(known, points.float(), 0.0)).to(self.up.weight.dtype)
        return self.down(F.gelu(self.up(features))) * known


class Head3D(nn.Module):
    """Hidden states at region tokens (R, H) -> centres (R, 3) and sizes (R, 3; w, h, l), fp32
    metres."""

    def __init__(self, hidden: int):
        super().__init__()
        self.norm = nn.LayerNorm(hidden)
        self.up = nn.Linear(hidden, hidden)
        self.out = nn.Linear(hidden, 6)

    def init(self, seed: int = 0) -> None:
        """Starts at the prior: an object of 0.7 m (softplus of 0), 3 m ahead."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.norm.weight.fill_(1.0)
            self.norm.bias.zero_()
            for layer, gain in ((self.up, 1.0), (self.out, 0.1)):
                layer.weight.copy_(
                    torch.randn(layer.weight.shape, generator=generator)
                    * gain
                    / layer.in_features**0.5
                )
                layer.bias.zero_()
            self.out.bias[2] = 3.0

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        out = self.out(F.gelu(self.up(self.norm(hidden)))).float()
        return out[:, :3].contiguous(), F.softplus(out[:, 3:])  # a view of it would trouble FSDP2


def head_loss(centres: Tensor, sizes: Tensor, true_centres: Tensor, true_sizes: Tensor) -> Tensor:
    """Summed smooth-L1 (beta 0.1 m) over the labelled coordinates; all (R, 3) metres, NaN rows of
    the truth skipped.

    Divide it by the global count of labelled regions, as the token loss is by that of tokens."""
    total = centres.sum() * 0.0
    for predicted, truth in ((centres, true_centres), (sizes, true_sizes)):
        known = truth.isfinite().all(dim=1)
        total = total + F.smooth_l1_loss(predicted[known], truth[known], beta=0.1, reduction="sum")
    return total
