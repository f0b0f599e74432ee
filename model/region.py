"""Region token: one embedding for a box or mask, in the place of `<mask>` (paper, section on region
prompts; SR-3D).

    region r = LayerNorm( sum_p w[r,p] * feature[p] ) -> Linear -> one row of the language model's
    input

The features are the vision tower's patch features before the merger, with the point map's embedding
added, so a region knows what it looks like and where it is. The weights w are areas: how much of
the box covers patch p, divided by the box's area (made by the processor). A box smaller than a
patch thus still gets that patch's feature; sampling the mask at patch centres, as the official code
does, can give it nothing.

P patches, R regions, E overlaps of a region and a patch, C width of the tower, H width of the
language model.
"""

import numpy as np
import torch
from torch import Tensor, nn

from kernels.packed_attention import gather_rows


def is_mask(region) -> bool:
    return isinstance(region, np.ndarray) and region.ndim == 2


def region_weights(region, size, grid) -> np.ndarray:
    """Area weights of a pixel box or a bool mask (H, W) on the patch grid -> (rows, columns), sum
    1."""
    (width, height), (rows, columns) = size, grid
    if is_mask(region):
        if region.shape != (height, width) or not region.any():
            raise ValueError(
                f"a mask of {region.shape}, {region.sum()} set, on an image of {height, width}"
            )
        weights = shares(height, rows).T @ region @ shares(width, columns)
    else:
        x0, y0, x1, y1 = (float(v) for v in region)
        if not (max(x0, 0) <= min(x1, width) and max(y0, 0) <= min(y1, height)):  # NaN fails too
            raise ValueError(f"region {x0, y0, x1, y1} is not on its image of {width} x {height}")
        weights = np.outer(side(y0, y1, height, rows), side(x0, x1, width, columns))
    return weights / weights.sum()


def side(low: float, high: float, pixels: int, cells: int) -> np.ndarray:
    """One side of a box on the grid, cut off at the image; without length it gets a millionth of a
    cell."""
    low, high = (min(max(v, 0), pixels) * cells / pixels for v in (low, high))
    low = min(low, cells - 1e-6)
    return overlap(low, max(high, low + 1e-6), cells)


def overlap(low, high, cells: int) -> np.ndarray:
    """Length of [low, high] within each unit cell of a line -> (..., cells)."""
    edge, low, high = np.arange(cells), np.asarray(low)[..., None], np.asarray(high)[..., None]
    return np.clip(np.minimum(high, edge + 1) - np.maximum(low, edge), 0, None)


def shares(pixels: int, cells: int) -> np.ndarray:
    """(pixels, cells): the length of each pixel within each cell, when a line of pixels is cut into
    cells."""
    edge = np.arange(pixels + 1) * (cells / pixels)
    return overlap(edge[:-1], edge[1:], cells)


class RegionToken(nn.Module):
    """Patch features (P, C) and area weights -> embeddings (R, H)."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.proj = nn.Linear(width, hidden)

    def init_like(self, embedding: Tensor, seed: int = 0) -> None:
        """Start the output at the RMS of the embedding rows (V, H): a new token that is as loud as
        the old ones.

        Without it a pretrained decoder sees an outlier at `<mask>`; rows are sampled, as V may be
        152,000.
        """
        rms = embedding[:: max(1, len(embedding) // 4096)].float().pow(2).mean().sqrt()
        noise = torch.randn(self.proj.weight.shape, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            # The input has unit RMS after the norm, so rows of length `rms` give outputs of RMS
            # `rms`.
            self.proj.weight.copy_(noise * rms.cpu() / self.proj.in_features**0.5)
            self.proj.bias.zero_()
            self.norm.weight.fill_(1.0)
            self.norm.bias.zero_()

    def forward(
        self, features: Tensor, region: Tensor, patch: Tensor, weight: Tensor, count: int
    ) -> Tensor:
        """Pool each region's patches and project: features (P, C) -> (R, H), R = count.

        region, patch (E,) int64 and weight (E,) fp32 are the overlaps, sorted by region.
        """
        # In fp32, one after the other, rounded once: of 1,024 equal patches, bf16 sums lose the
        # last 768.
        wide = torch.promote_types(features.dtype, torch.float32)
        parts = gather_rows(features, patch).to(wide) * weight[:, None].to(wide)  # (E, C)
        # (R + 1,)
        starts = torch.searchsorted(region, torch.arange(count + 1, device=region.device))
        # unsafe: it doesn't look at the offsets, for which the host would wait.
        pooled = torch.segment_reduce(parts, "sum", offsets=starts, axis=0, unsafe=True)  # (R, C)
        return self.proj(self.norm(pooled.to(features.dtype)))
