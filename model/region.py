"""Region token: one embedding for a box or mask, in the place of `<mask>` (paper, section on region
prompts; SR-3D).

    region r = LayerNorm( sum_p w[r,p] * feature[p] ) -> Linear -> one row of the decoder's input

The features are the vision tower's patch features before the merger, with the point map's embedding
added, so a region knows what it looks like and where it is. The weights w are areas: how much of
the box covers patch p, divided by the box's area. The processor makes them with `region_weights`. A
box smaller than a patch thus still gets that patch's feature; sampling the mask at patch centres,
as the official code does, can give it nothing.

P patches, R regions, E overlaps of a region and a patch, C width of the tower, H width of the
decoder.
"""

import numpy as np
import torch
from torch import Tensor, nn

from kernels.packed_attention import gather_rows

LEAST = 1e-6  # cells: the length of a side that has none, so that every box has an area


def read_region(region, size: tuple[int, int]):
    """Read a region on an image of `size` (width, height): four floats, or a bool array (H, W).

    region: a box (x0, y0, x1, y1) in pixels, or a mask in any form (array, tensor, nested lists).
    ValueError for what is neither, or isn't on the image.
    """
    width, height = size
    try:
        if np.ndim(region) == 2:
            region = np.asarray(region) != 0
        else:
            x0, y0, x1, y1 = (float(side) for side in region)
    except (TypeError, ValueError) as error:
        raise ValueError(str(error)) from error
    if np.ndim(region) == 2:
        if region.shape != (height, width) or not region.any():
            raise ValueError(
                f"a mask of {region.shape}, {region.sum()} set, on an image of {height, width}"
            )
        return region
    # Written so that NaN fails, too.
    is_on_image = max(x0, 0) <= min(x1, width) and max(y0, 0) <= min(y1, height)
    if not is_on_image:
        raise ValueError(f"region {x0, y0, x1, y1} is not on its image of {width} x {height}")
    return x0, y0, x1, y1


def region_weights(region, size: tuple[int, int], grid: tuple[int, int]) -> np.ndarray:
    """Weigh the patches of a grid (rows, columns) by the area of each that a region covers.

    region and size as in `read_region`. Returns (rows, columns) with sum 1.
    """
    width, height = size
    rows, columns = grid
    region = read_region(region, size)
    if isinstance(region, np.ndarray):
        down = pixel_shares(height, rows).T  # (rows, H)
        across = pixel_shares(width, columns)  # (W, columns)
        areas = down @ region @ across
    else:
        x0, y0, x1, y1 = region
        down = covered_cells(y0, y1, height, rows)
        across = covered_cells(x0, x1, width, columns)
        areas = np.outer(down, across)
    return areas / areas.sum()


def covered_cells(low: float, high: float, pixels: int, cells: int) -> np.ndarray:
    """Return how much of each cell one side of a box covers: (cells,).

    The side is cut off at the image.
    """
    low = min(max(low, 0), pixels) * cells / pixels
    high = min(max(high, 0), pixels) * cells / pixels
    low = min(low, cells - LEAST)
    high = max(high, low + LEAST)
    return cell_overlap(low, high, cells)


def cell_overlap(low, high, cells: int) -> np.ndarray:
    """Return the length of [low, high] within each unit cell of a line: (..., cells)."""
    left = np.arange(cells)
    low = np.asarray(low)[..., None]
    high = np.asarray(high)[..., None]
    return np.clip(np.minimum(high, left + 1) - np.maximum(low, left), 0, None)


def pixel_shares(pixels: int, cells: int) -> np.ndarray:
    """Cut a line of pixels into cells: the length of each pixel within each cell, (pixels, cells).

    Lengths are in cells. Where sizes don't divide, a pixel belongs to two cells in part.
    """
    edges = np.arange(pixels + 1) * (cells / pixels)
    return cell_overlap(edges[:-1], edges[1:], cells)


class RegionToken(nn.Module):
    """Pool patch features (P, C) by area weights and project them: embeddings (R, H)."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.proj = nn.Linear(width, hidden)

    def init_like(self, embedding: Tensor, seed: int = 0) -> None:
        """Start the output at the RMS of the embedding rows (V, H).

        A new token is then as loud as the old ones; without it a pretrained decoder sees an
        outlier at `<mask>`.
        """
        # V may be 152,000: about 4,096 rows are enough.
        sampled = embedding[:: max(1, len(embedding) // 4096)].float()
        rms = sampled.pow(2).mean().sqrt()
        noise = torch.randn(self.proj.weight.shape, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            # The input has unit RMS after the norm, so weight rows of length `rms` give outputs of
            # RMS `rms`.
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
        # Summed in fp32, one after the other, and rounded once: of 1,024 equal patches, sums in
        # bf16 lose the last 768.
        wide = torch.promote_types(features.dtype, torch.float32)
        terms = gather_rows(features, patch).to(wide) * weight[:, None].to(wide)  # (E, C)
        first_region = torch.arange(count + 1, device=region.device)
        starts = torch.searchsorted(region, first_region)  # (R + 1,) where each one's terms start
        # unsafe: it doesn't look at the offsets, for which the host would wait.
        pooled = torch.segment_reduce(terms, "sum", offsets=starts, axis=0, unsafe=True)  # (R, C)
        return self.proj(self.norm(pooled.to(features.dtype)))
