"""The images of a row and their depth maps, which are looked for once the row is taken.

A look at a network's disk takes longer than reading a row, and of millions of rows most aren't
taken.
"""

import os
from dataclasses import dataclass
from functools import cached_property

from data.embedded import image_of
from data.rows import Bad, depth_map, estimated, size


@dataclass
class Files:
    """Paths of images, and of the depth maps that the row names, or None, by image."""

    images: list  # Marked, where the row holds the image itself
    named_depths: list
    # Whether the set may name depth maps that its release lacks; else a missing one is an error.
    lacks_depths: bool = False

    # Looked for once, and only of the rows that a mixture takes.
    @cached_property
    def measured(self) -> list:
        return [file if file and os.path.isfile(file) else None for file in self.named_depths]

    @cached_property
    def depths(self) -> list:
        """The measured map, else an estimated one, else None (or the name of a missing one)."""
        # The name of a missing file goes on, for the check of headers to report it.
        missing = [None] * len(self.images) if self.lacks_depths else self.named_depths
        found = []
        for image, measured, named in zip(self.images, self.measured, missing, strict=True):
            found.append(measured or estimated(image) or named)
        return found

    def all(self) -> tuple:
        return tuple(file for file in (*self.images, *self.depths) if isinstance(file, str))


def files_of_row(row: dict, base: str, lacks_depths: bool = False) -> Files:
    """Return the files that a row names in `image` and `depth`, which lie under a folder."""
    images = [image_of(name, base) for name in listed(row.get("image", ()))]
    depths = [os.path.join(base, name) for name in listed(row.get("depth", ()))]
    if "image" in row and not images:
        raise Bad("image", "no image")
    # Which image a map belongs to is known by its place alone.
    if depths and len(depths) != len(images):
        raise Bad("depth", f"wrong count: {len(depths)} for {len(images)} images")
    return Files(images, depths or [None] * len(images), lacks_depths)


def listed(names: str | list) -> list[str]:
    # One image is often written without a list.
    return [names] if isinstance(names, str) else names


def sizes_of(images: list, headers: dict) -> list[tuple[int, int]]:
    """Return (width, height) by image; Bad where one can't be read."""
    return [size(image, headers) for image in images]


def depths_of(files: list, shapes: list, headers: dict) -> list | None:
    """Return the depth map or None of each image, or None where no image has one."""
    if not any(files):
        return None
    return [depth_map(file, shape, headers) for file, shape in zip(files, shapes, strict=True)]
