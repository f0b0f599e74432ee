"""Images and depth maps of all questions, each once, as small as the page's room asks for."""

import base64
import io
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from errors import UserError
from pictures import image_key, metres_of, picture_size, read_picture
from srreal import Example

# Pixels of an image's width: the first of which all images fit into the room that there is.
WIDTHS = (640, 512, 384, 320, 256, 192, 128, 96)
QUALITY = 72  # of WebP
TRIED = 12  # images on which a width is tried
# Images of one question at most: of a video's frames the first.
MOST = 8
# Points of a depth map, and of all together.
CELLS = 96 * 72
ALL_CELLS = 2_400_000


@dataclass
class View:
    """One image with what is known of its camera."""

    image: object  # what pictures.py opens
    depth: object
    camera: tuple | None


class Views:
    """The views of a page. A question names them by their numbers."""

    def __init__(self):
        self.views: list[View] = []
        self.numbers: dict[tuple, int] = {}

    def of_example(self, example: Example) -> list[int]:
        """Return the numbers of a question's images, MOST at most."""
        numbers = []
        for i, image in enumerate(example.images[:MOST]):
            depth = example.depths[i] if example.depths else None
            camera = example.intrinsics[i] if example.intrinsics else None
            numbers.append(self.number(View(image, depth, camera)))
        return numbers

    def of_files(self, names: list) -> list[int]:
        """Return the numbers of the images that still exist, for a question whose set is gone."""
        files = [name for name in names if name and Path(name).is_file()]
        return [self.number(View(file, None, None)) for file in files[:MOST]]

    def number(self, view: View) -> int:
        # Depth and camera belong to it: two sets may measure one image differently.
        key = (image_key(view.image), image_key(view.depth), view.camera)
        if key not in self.numbers:
            self.numbers[key] = len(self.views)
            self.views.append(view)
        return self.numbers[key]

    def packed(self, room: float) -> list[dict]:
        """Return what the page needs of each view; the images take `room` bytes at most."""
        width, most = fitting(self.views, room)
        # All views share the points, so a page of many questions has coarser rooms, not fewer.
        cells = min(CELLS, ALL_CELLS // max(len(self.views), 1))
        entries = []
        for number, view in enumerate(tqdm(self.views, desc="images", leave=False, disable=None)):
            width_of_view = width if number < most else None
            entries.append(packed_view(view, width_of_view, cells))
        return entries


# ---- Images


def thumbnail(image: Image.Image, width: int) -> str:
    """Return an image as a data URI, at most that many pixels wide."""
    if image.width > width:
        height = max(round(image.height * width / image.width), 1)
        # Only downwards: enlarging would cost bytes and show nothing new.
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=QUALITY)
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return f"data:image/webp;base64,{encoded}"


def fitting(views: list[View], room: float) -> tuple[int, int]:
    """Return the width at which the images fit into the room, and how many of them do."""
    # A few tell how large all will be: to encode each in every width would take minutes.
    some = views[:: len(views) // TRIED + 1]
    images = []
    for view in some:
        try:
            images.append(read_picture(view.image))
        except UserError:
            continue
    if not images:
        return WIDTHS[0], len(views)
    for width in WIDTHS:
        # Bytes of a data URI. An estimate: the page may end some per cent above or below its room.
        mean = np.mean([len(thumbnail(image, width)) for image in images])
        if mean * len(views) <= room:
            break
    # Where even the smallest width is too large, the first ones get their image.
    return width, math.floor(room / mean)


def packed_view(view: View, width: int | None, cells: int) -> dict:
    """Return a view's image (None: it can't be read, or there is no room), camera and depth."""
    entry = {"src": None, "size": None, "camera": view.camera, "depth": None}
    try:
        entry["size"] = picture_size(view.image)
        if width:
            entry["src"] = thumbnail(read_picture(view.image), width)
        if view.camera is not None and cells:
            entry["depth"] = packed_depth(metres_of(view.depth), cells)
    except UserError as error:
        entry["missing"] = str(error)
    return entry


# ---- Depth


def packed_depth(metres: np.ndarray | None, cells: int) -> dict | None:
    """Return a depth map's grid of at most so many points, a byte each: 255 is `far`, 0 unknown."""
    if metres is None:
        return None
    height, width = metres.shape
    # Points fall with the square of the stride.
    stride = max(math.ceil(math.sqrt(height * width / cells)), 1)
    # Every so many pixels, and no mean: that of two surfaces lies on neither.
    grid = metres[stride // 2 :: stride, stride // 2 :: stride]
    known = np.isfinite(grid) & (grid > 0)
    if not known.any():
        return None
    # A quantile: one pixel through a window must not coarsen the room.
    far = float(np.quantile(grid[known], 0.99))
    near = np.where(known & (grid <= far), grid, 0)
    # Rounded up, so that what is near does not become 0, which means unknown.
    levels = np.ceil(near / far * 255)
    return {
        "columns": grid.shape[1],
        "stride": stride,
        "far": round(far, 3),
        "levels": base64.b64encode(levels.astype(np.uint8).tobytes()).decode(),
    }
