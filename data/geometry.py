"""Whether cameras and centres can belong to their image; if not, both numbers and a likely cause.

A camera's principal point lies inside its image, 3 % of a side away from the borders at least, and
not a fifth off the middle by one share of both sides, as it does at another resolution; its focal
lengths are between a quarter and eight times the image's width. Centres lie in front of the camera.
Where an object's region and its camera are known, a ray through the region, whose box is grown by
half a side in each direction, passes the centre within reach. Where its depth was measured, the
centre lies between half the nearest and twice the farthest depth in the region, give or take reach,
or up to 5 m behind it, as things hide each other.

Reach is 1.5 times half the object's diagonal, at least 0.3 m, or 1 m where its size is not known;
and 5 % of its distance. So objects that are cut off or hidden in part pass, and so do centres
behind the surface that is seen.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from data.marks import Marked
from data.rows import estimated_name, file_of, stamp
from mentions import object_of
from pictures import BadPicture, read_metres
from srreal import Example

EDGE = 0.03  # of a side
OFF = 0.2  # of half a side
FOCAL = (0.25, 8)  # of the image's width
GROWN = 0.5  # of a region's sides
FAR = 2  # times the depth in a region
HIDDEN = 5.0  # metres behind it
AXES = "centres are x right, y down, z forward from the camera"
# What turns other frames' centres into the camera's.
FRAMES = {
    "with z up": [[1, 0, 0], [0, 0, -1], [0, 1, 0]],
    "with y up and z backward (OpenGL)": [[1, 0, 0], [0, -1, 0], [0, 0, -1]],
    "with x forward and z up": [[0, -1, 0], [0, 0, -1], [1, 0, 0]],
}


@dataclass
class Sighting:
    """An object with a known centre, in the region of an image."""

    view: int
    mention: str
    centre: tuple  # x, y, z metres, in that view's camera frame
    box: tuple  # x0, y0, x1, y1 pixels
    reach: float  # metres

    def __str__(self):
        return f"{self.mention}: centre {rounded(self.centre)}, region {rounded(self.box)}"


def check_geometry(example: Example, sizes: list, with_depth: bool) -> Iterator[tuple[str, str]]:
    """Yield (field, reason) of what can't belong to the images of (width, height).

    The row is sound otherwise. with_depth: decode the depth maps for it.
    """
    seen = sightings(example)
    faulty = set()
    for view, size in enumerate(sizes):
        camera = camera_of(example, view)
        # Without a camera there is nothing to compare the image with.
        fault = camera and camera_fault(camera, size)
        if fault:
            faulty.add(view)
            here = [sighting for sighting in seen if sighting.view == view]
            yield "intrinsics", fault + likely_cause(camera, size, here)
    yield from check_in_front(example, sizes, seen)
    for sighting in seen:
        if sighting.view in faulty or sighting.centre[2] <= 0:
            continue
        camera = camera_of(example, sighting.view)
        if camera and not fits(sighting, camera):
            beside = metres_beside(sighting, camera)
            reason = f"beside its region: {sighting}: by {beside:.2f} m"
            cause = likely_cause(camera, sizes[sighting.view], [sighting])
            yield "objects", f"{reason}, at most {sighting.reach:.2f}{cause}"
        elif with_depth:
            yield from check_depth_of(example, sighting)


# ---- What a row says


def sightings(example: Example) -> list[Sighting]:
    """Return the regions whose object's centre is known in the frame of their own image."""
    found = []
    texts = example.question.split("<mask>")
    for (view, region), text in zip(example.regions, texts, strict=False):
        mention = object_of(text, example.objects)
        centre = example.objects.get(mention)
        # By view: a centre in each camera's frame.
        if isinstance(centre, dict):
            centre = centre.get(view)
        elif len(example.images) > 1 and view != example.frame:
            # One centre for several views lies in the frame that the question asks for.
            centre = None
        if centre is None:
            continue
        size = (example.sizes or {}).get(mention)
        # 1.5 times half the diagonal.
        near = max(0.3, 0.75 * math.hypot(*size)) if size else 1.0
        reach = near + 0.05 * math.hypot(*centre)
        found.append(Sighting(view, mention, centre, box_of(region), reach))
    return found


def box_of(region) -> tuple:
    if isinstance(region, np.ndarray) and region.ndim == 2:
        # A mask (H, W): the box around what it has; + 1, the far sides of the last pixels.
        ys, xs = np.nonzero(region)
        return xs.min(), ys.min(), xs.max() + 1, ys.max() + 1
    return tuple(region)


def camera_of(example: Example, view: int) -> tuple | None:
    return example.intrinsics[view] if example.intrinsics else None


def rounded(values) -> str:
    return "(" + ", ".join(f"{value:.4g}" for value in values) + ")"


# ---- Cameras


def camera_fault(camera, size: tuple[int, int]) -> str | None:
    """Return what is wrong with (fx, fy, cx, cy) for an image of (width, height)."""
    width, height = size
    fx, fy, cx, cy = camera
    if is_middle(cx, cy, (height, width)) and not is_middle(cx, cy, size):
        place = f"({cx:.4g}, {cy:.4g}), of {size}"
        return f"principal point of the image on its side: {place}: its EXIF orientation turns it"
    if not (is_inside(cx, width) and is_inside(cy, height)):
        return f"principal point outside its image: ({cx:.4g}, {cy:.4g}), of {size}"
    # Half the resolution puts it at a quarter of both sides. A crop's is seldom off by one share.
    across = 2 * cx / width
    if abs(across - 2 * cy / height) < 0.03 and abs(across - 1) > OFF:
        return f"principal point far from the middle: ({cx:.4g}, {cy:.4g}), of {size}"
    low = FOCAL[0] * width
    high = FOCAL[1] * width
    if not (low <= min(fx, fy) and max(fx, fy) <= high):
        bounds = f"from {low:.4g} to {high:.4g} are possible"
        return f"odd focal length: ({fx:.4g}, {fy:.4g}) for an image of {size}, {bounds}"
    return None


def is_middle(cx: float, cy: float, size: tuple[int, int]) -> bool:
    width, height = size
    return abs(2 * cx / width - 1) < 0.02 and abs(2 * cy / height - 1) < 0.02


def is_inside(place: float, side: int) -> bool:
    return EDGE * side <= place <= (1 - EDGE) * side


def likely_cause(camera, size: tuple[int, int], seen: list[Sighting]) -> str:
    """Return what the row may have meant, under which all that is seen in the image fits."""
    for cause, other in other_cameras(camera, size).items():
        if not camera_fault(other, size) and all(fits(sighting, other) for sighting in seen):
            return f": {cause}?"
    # A permutation of the axes and their signs; a frame that is tilted as well is not recognised.
    for cause, axes in FRAMES.items():
        turned = [replace(one, centre=tuple(np.dot(axes, one.centre))) for one in seen]
        if not camera_fault(camera, size) and all(fits(sighting, camera) for sighting in turned):
            return f": centres in a frame {cause}? {AXES}"
    return ""


def other_cameras(camera, size: tuple[int, int]) -> dict[str, tuple]:
    """Return likely mistakes, and the camera in pixels of this image that each stands for."""
    fx, fy, cx, cy = camera
    width, height = size
    fractions = {
        "in fractions of the image (normalised), not in pixels": (
            fx * width,
            fy * height,
            cx * width,
            cy * height,
        )
    }
    swapped = {"fx fy swapped with cx cy": (cx, cy, fx, fy)}
    if min(cx, cy) <= 0:
        return fractions | swapped
    # A camera's principal point is about the middle of its own image.
    words = f"intrinsics of an image of about {round(2 * cx)} x {round(2 * cy)}"
    across = width / (2 * cx)
    down = height / (2 * cy)
    resolution = {words: (fx * across, fy * down, width / 2, height / 2)}
    # The same image at another resolution has the same shape.
    if abs(across / down - 1) < 0.03:
        return fractions | resolution | swapped
    return fractions | swapped | resolution


# ---- Centres


def check_in_front(
    example: Example, sizes: list, seen: list[Sighting]
) -> Iterator[tuple[str, str]]:
    """Check the centres that their image has to show: all of one view, else those in regions."""
    centres = {}
    for mention, centre in example.objects.items():
        if not isinstance(centre, dict):
            centres[mention] = centre
    hints = {}
    for sighting in seen:
        centres[sighting.mention] = sighting.centre
        camera = camera_of(example, sighting.view)
        if camera and sighting.centre[2] <= 0:
            hints[sighting.mention] = likely_cause(camera, sizes[sighting.view], [sighting])
    for mention, centre in centres.items():
        if centre[2] <= 0:
            hint = hints.get(mention) or f": {AXES} (not z up, nor y up as in OpenGL)"
            yield "objects", f"behind the camera: {mention}: {rounded(centre)}{hint}"


def fits(sighting: Sighting, camera) -> bool:
    return sighting.centre[2] > 0 and metres_beside(sighting, camera) <= sighting.reach


def metres_beside(sighting: Sighting, camera) -> float:
    """Return the distance of a centre from the nearest ray through its region, grown."""
    fx, fy, cx, cy = camera
    x, y, z = sighting.centre
    x0, y0, x1, y1 = sighting.box
    across = GROWN * (x1 - x0)
    down = GROWN * (y1 - y0)
    # The pixel of the region that is nearest to where the centre is seen, and the ray through it.
    # Clamped: 0 metres beside where the centre is seen within the grown region.
    u = min(max(fx * x / z + cx, x0 - across), x1 + across)
    v = min(max(fy * y / z + cy, y0 - down), y1 + down)
    right = (u - cx) / fx
    lower = (v - cy) / fy
    # z at the foot of the perpendicular from the centre: (c . ray) / (ray . ray).
    foot = (x * right + y * lower + z) / (right**2 + lower**2 + 1)
    return math.dist(sighting.centre, (foot * right, foot * lower, foot))


def check_depth_of(example: Example, sighting: Sighting) -> Iterator[tuple[str, str]]:
    """Compare a centre with the depth that was measured in its region."""
    metres = measured_depth(example, sighting.view)
    if metres is None:
        return
    x0, y0, x1, y1 = [int(side) for side in sighting.box]
    # With the box's last row and column.
    shown = metres[y0 : y1 + 1, x0 : x1 + 1]
    # 0 is what depth cameras write where they measured nothing.
    shown = shown[np.isfinite(shown) & (shown > 0)]
    if len(shown) == 0:
        return
    z = sighting.centre[2]
    low = shown.min() / FAR - sighting.reach
    high = max(shown.max() * FAR + sighting.reach, shown.max() + HIDDEN)
    if not low <= z <= high:
        span = f"{shown.min():.2f} to {shown.max():.2f} m"
        reason = f"far from its region's depth: {sighting.mention}: z = {z:.2f} m, depth {span}"
        yield "objects", f"{reason}: in metres, and {AXES}?"


def measured_depth(example: Example, view: int) -> np.ndarray | None:
    """Return a view's depth (H, W) in metres, unless a model has estimated it."""
    depth = example.depths[view] if example.depths else None
    image = example.images[view]
    # A mark is drawn on an image of a file: the estimate lies beside that file.
    image = image.source if isinstance(image, Marked) else image
    # An estimate may be more wrong than a row is.
    if depth is None or (isinstance(image, str) and file_of(depth) == estimated_name(image)):
        return None
    if not isinstance(depth, str | Path):
        return np.asarray(depth)
    try:
        return decoded(depth, stamp(depth))
    except BadPicture:  # said where it is used
        return None


@lru_cache(maxsize=4)
def decoded(depth: str | Path, version: tuple | None) -> np.ndarray:
    """Read a depth map, once for all the regions and questions that an image has in a row."""
    return read_metres(depth)


def project(xyz, camera, near: float = 0.01) -> tuple[float, float] | None:
    """Project a point of the camera frame to a pixel (u, v); None if it is nearer than `near`."""
    x, y, z = xyz
    fx, fy, cx, cy = camera
    if z <= near:
        return None
    # The pinhole camera of OpenCV: pixel centres lie at integers.
    return fx * x / z + cx, fy * y / z + cy
