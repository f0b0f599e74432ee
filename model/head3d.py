"""Metric 3D in and out: a point map embedded into the patch features, and a head that reads centres
at region tokens.

In (paper: 3D positional embedding; SR-3D). Depth and intrinsics become a camera-frame point (x
right, y down, z forward, metres) per patch, by `point_grid` in the processor; here it becomes

    e(p) = MLP( p, a sin(2 pi p / L), a cos(2 pi p / L) ),
    L = 32 m, 16 m, ... 0.25 m,    a = sqrt(L / 32 m)

and is added to the vision tower's last features. The paper adds a relative, scale-free map; its
targets are metric, so ours is. The MLP's last layer starts at zero: at step 0 a pretrained model
equals its checkpoint, to the bit. (A model trained from scratch needs it loud instead:
`init_unit_scale`.)

Out. From the decoder's hidden state at a region token: the centre and size of the region's object
in metres, in the camera frame of the region's own image. It is an auxiliary loss in SFT and a
second opinion beside the numbers in the text.

P patches, R regions, C width of the tower, H width of the decoder.
"""

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.packed_attention import upload
from model.region import pixel_shares
from pictures import on_its_side, read_metres

WAVELENGTHS = (32.0, 16.0, 8.0, 4.0, 2.0, 1.0, 0.5, 0.25)  # metres
# The numbers that describe a point: its coordinates, their sines and cosines.
FEATURES = 3 * (1 + 2 * len(WAVELENGTHS))
# In patches: below it a patch has no valid pixel.
LEAST_AREA = 1e-9


def read_depth(depth, shape: tuple[int, int]) -> np.ndarray:
    """Return depth (H, W) in metres: an array as it is, or a file, a 16-bit PNG in millimetres."""
    depth = read_metres(depth) if isinstance(depth, str | Path) else np.asarray(depth)
    if depth.shape != shape:
        sides = f"depth of (height, width) {depth.shape}, image of {shape}"
        raise ValueError(sides + on_its_side(depth.shape, shape))
    return depth


def point_grid(depth: np.ndarray, intrinsics, grid: tuple[int, int]) -> np.ndarray:
    """Average the camera-frame points of each patch's valid pixels: (rows, columns, 3) fp32.

        X = (u - cx) z / fx,  Y = (v - cy) z / fy,  Z = z

    u, v are a pixel's column and row (centres lie at integers, as in OpenCV). depth (H, W) metres,
    where 0, NaN and inf are unknown; intrinsics (fx, fy, cx, cy) pixels. A patch without a valid
    pixel is NaN.
    """
    height, width = depth.shape
    rows, columns = grid
    fx, fy, cx, cy = intrinsics
    valid = np.isfinite(depth) & (depth > 0)
    # Unknown pixels add nothing to a sum, and nothing to the area that it is divided by.
    z = np.where(valid, depth, 0).astype(np.float64)
    x_over_z = (np.arange(width) - cx) / fx  # (W,)
    y_over_z = (np.arange(height) - cy) / fy  # (H,)

    # A patch covers pixels in part where sizes don't divide. Its sum over pixels, weighed by what
    # it covers of each, is a product from either side; x depends on the column alone and y on the
    # row alone, so both go into the factors.
    down = pixel_shares(height, rows).T  # (rows, H)
    across = pixel_shares(width, columns)  # (W, columns)
    strips = down @ z  # (rows, W)
    sum_x = strips @ (x_over_z[:, None] * across)
    sum_y = (down * y_over_z) @ z @ across
    sum_z = strips @ across
    area = (down @ valid @ across)[..., None]
    sums = np.stack([sum_x, sum_y, sum_z], -1)
    means = sums / np.maximum(area, LEAST_AREA)
    return np.where(area > LEAST_AREA, means, np.nan).astype(np.float32)


def fourier(points: Tensor) -> Tensor:
    """Turn points (P, 3) in metres into features (P, 51).

    They are the coordinates and, per wavelength and coordinate, a sine and a cosine times its a.
    Without a the short waves, which cancel in a region's mean, drown the long ones: with it a small
    head on pooled embeddings reached a median of 0.15 m instead of 0.17 m in 600 steps.
    """
    wavelengths = torch.tensor(WAVELENGTHS, dtype=points.dtype)
    wavelengths = upload(wavelengths, points.device)
    # 2 pi p / L. A point at 32 m has turned 128 times on the shortest wave.
    phase = points[:, :, None] * (2 * math.pi / wavelengths)  # (P, 3, 8)
    amplitude = (wavelengths / wavelengths[0]).sqrt()  # (8,)
    sines = (phase.sin() * amplitude).flatten(1)
    cosines = (phase.cos() * amplitude).flatten(1)
    return torch.cat((points, sines, cosines), dim=1)


def init_linear(layer: nn.Linear, gain: float, generator: torch.Generator) -> None:
    """Fill a layer so that inputs of unit RMS give outputs of RMS `gain`."""
    noise = torch.randn(layer.weight.shape, generator=generator)
    with torch.no_grad():
        layer.weight.copy_(noise * gain / layer.in_features**0.5)
        layer.bias.zero_()


class PointEmbedding(nn.Module):
    """Embed camera-frame points (P, 3) in metres: (P, C) to add, zero where a point is NaN."""

    def __init__(self, width: int):
        super().__init__()
        self.up = nn.Linear(FEATURES, width)
        self.down = nn.Linear(width, width)

    def init_silent(self, seed: int = 0) -> None:
        """Start with an output of exactly 0 for every input, with gradients that are not."""
        self.init_unit_scale(seed)
        nn.init.zeros_(self.down.weight)

    def init_unit_scale(self, seed: int = 0) -> None:
        """Start with an output of about unit RMS.

        For a model trained from scratch: a silent embedding is never heard there (tried).
        """
        generator = torch.Generator().manual_seed(seed)
        init_linear(self.up, 2.0, generator)
        init_linear(self.down, 2.0, generator)

    def forward(self, points: Tensor) -> Tensor:
        known = points.isfinite().all(dim=1, keepdim=True)
        # NaN would survive a product with 0, in the gradient too: it is replaced before.
        # The phase needs fp32: at 8 m and a wavelength of 0.25 m bf16 has no digits left.
        features = fourier(torch.where(known, points.float(), 0.0))
        features = features.to(self.up.weight.dtype)
        return self.down(F.gelu(self.up(features))) * known


class Head3D(nn.Module):
    """Read centres and sizes at region tokens: hidden (R, H) -> (R, 3) and (R, 3), fp32 metres.

    A size is width, height, length.
    """

    def __init__(self, hidden: int):
        super().__init__()
        self.norm = nn.LayerNorm(hidden)
        self.up = nn.Linear(hidden, hidden)
        self.out = nn.Linear(hidden, 6)

    def init(self, seed: int = 0) -> None:
        """Start at the prior: an object of 0.7 m (softplus of 0), 3 m ahead."""
        generator = torch.Generator().manual_seed(seed)
        init_linear(self.up, 1.0, generator)
        init_linear(self.out, 0.1, generator)
        with torch.no_grad():
            self.norm.weight.fill_(1.0)
            self.norm.bias.zero_()
            self.out.bias[2] = 3.0

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        inner = F.gelu(self.up(self.norm(hidden)))
        # The loss and eval count in fp32.
        out = self.out(inner).float()
        # A view would trouble FSDP2.
        centres = out[:, :3].contiguous()
        return centres, F.softplus(out[:, 3:])


def head_loss(centres: Tensor, sizes: Tensor, true_centres: Tensor, true_sizes: Tensor) -> Tensor:
    """Sum the smooth-L1 loss (beta 0.1 m) over the labelled coordinates.

    All are (R, 3) in metres; rows of the truth that are NaN are skipped. Divide it by the global
    count of labelled regions, as the token loss is by that of tokens.
    """
    # A rank without labels has to take part in the backward, too: 0 with a gradient of 0.
    total = centres.sum() * 0.0
    for predicted, truth in ((centres, true_centres), (sizes, true_sizes)):
        known = truth.isfinite().all(dim=1)
        loss = F.smooth_l1_loss(predicted[known], truth[known], beta=0.1, reduction="sum")
        total = total + loss
    return total
