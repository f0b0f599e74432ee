"""Images and depth maps that are opened when asked for: a list of millions of rows holds paths, not
pixels.

`Marked` is an image with the coloured points and boxes that a question speaks of; `DepthMap` a
depth PNG whose resolution isn't its image's. Both compare by value, and pickle where `draw` is a
module's function."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image


def opened(source) -> Image.Image:
    """A path, the bytes of a file, or an image as it is."""
    if isinstance(source, Image.Image):
        return source
    return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)


@dataclass(frozen=True)
class Marked:
    source: str | Path | bytes | Image.Image
    # takes the RGB image, a copy of its own, and returns it with its marks
    draw: Callable | None = None
    options: tuple = ()  # of (name, value), for `draw`

    @property
    def size(self) -> tuple[int, int]:
        """(width, height), from the file's header."""
        return opened(self.source).size

    def convert(self, mode: str = "RGB") -> Image.Image:
        image = opened(self.source).convert("RGB")
        image = image.copy() if image is self.source else image
        return (self.draw(image, **dict(self.options)) if self.draw else image).convert(mode)


@dataclass(frozen=True)
class DepthMap:
    """A 16-bit PNG in millimetres, brought to its image's size by nearest neighbour: a mean of two
    surfaces lies on neither."""

    source: str | bytes
    size: tuple[int, int]  # width, height of the image
    shape = property(lambda self: self.size[::-1])

    def __gt__(self, metres):
        """All else that is done with a depth map are numpy's functions, which call __array__."""
        return np.asarray(self) > metres

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        with opened(self.source) as picture:
            depth = np.asarray(picture.resize(self.size, Image.Resampling.NEAREST))
        return (depth.astype(np.float32) / 1000).astype(dtype or np.float32)
