"""Images and depth maps that are opened when asked for.

A list of millions of rows so holds paths, not pixels. `Marked` is an image with the coloured points
and boxes that a question speaks of; `DepthMap` a depth PNG whose resolution isn't its image's. Both
compare by value, and pickle where `draw` is a module's function.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from pictures import picture_size, read_picture, read_turned


@dataclass(frozen=True)
class Marked:
    """An image whose marks are drawn each time it is converted."""

    source: str | Path | bytes | Image.Image  # see pictures.py
    # Takes the RGB image, a copy of its own, and returns it with its marks; None: there are none.
    draw: Callable | None = None
    options: tuple = ()  # of (name, value), for `draw`

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the turned image, from the file's header."""
        return picture_size(self.source)

    def convert(self, mode: str = "RGB") -> Image.Image:
        image = read_picture(self.source)
        if image is self.source:
            # An RGB image comes back itself; the marks must not get into the source.
            image = image.copy()
        if self.draw is not None:
            image = self.draw(image, **dict(self.options))
        return image.convert(mode)


@dataclass(frozen=True)
class DepthMap:
    """A 16-bit PNG in millimetres, read in metres at its image's size.

    By nearest neighbour: a mean of two surfaces lies on neither.
    """

    source: str | bytes
    size: tuple[int, int]  # width, height of the image

    @property
    def shape(self) -> tuple[int, int]:
        return self.size[::-1]

    def __gt__(self, metres):
        # All else that is done with a depth map are numpy's functions, which call __array__.
        return np.asarray(self) > metres

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        picture = read_turned(self.source)
        millimetres = np.asarray(picture.resize(self.size, Image.Resampling.NEAREST))
        return (millimetres.astype(np.float32) / 1000).astype(dtype or np.float32)
