"""Renders a room in colour and depth: each part is met in closed form by its own pixels' rays.

Camera: OpenCV, pixel centres at integers, depth is z. Vectors are (3, ...), one plane an axis; all
is float32 where pixels are many.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from data.rooms.things import CORNERS, KINDS


@dataclass(frozen=True)
class Camera:
    size: tuple[int, int]  # width, height
    focal: float  # in pixels
    position: np.ndarray  # (3,)
    axes: np.ndarray  # (3, 3): rows right, down, forward

    @property
    def middle(self):
        """The principal point (cx, cy)."""
        width, height = self.size
        return (width - 1) / 2, (height - 1) / 2


@dataclass(frozen=True)
class Room:
    """An empty room; all arrays are float32 (3, 1, 1)."""

    low: np.ndarray  # its corner on the left, at the ceiling, in front
    high: np.ndarray  # its corner on the right, at the floor, at the back
    floor: np.ndarray  # colours, 0..255
    wall: np.ndarray
    light: np.ndarray  # the lamp's position
    tile: float  # side of the floor's tiles in metres


class Drawing(NamedTuple):
    rgb: np.ndarray  # (H, W, 3) uint8
    depth: np.ndarray  # (H, W) metres
    owner: np.ndarray  # (H, W): index of the thing that is seen, or -1
    alone: np.ndarray  # (things, H, W) bool: where a thing would be seen if nothing hid it


# ---- cameras


def look(size, focal, position, target):
    """Return a level camera at a position that faces a target."""
    way = target - position
    forward = way / np.linalg.norm(way)
    right = np.cross((0, 1, 0), forward)
    right = right / np.hypot(forward[0], forward[2])
    down = np.cross(forward, right)
    return Camera(size, focal, position, np.stack([right, down, forward]))


def project(camera, points):
    """Return points (N, 3) of the world in the camera's frame (N, 3), and their pixels (N, 2)."""
    local = (points - camera.position) @ camera.axes.T
    xy = local[:, :2]
    z = local[:, 2:].clip(0.05)
    return local, camera.focal * xy / z + np.array(camera.middle)


def turn(vectors, yaw):
    """Rotate vectors (3, ...) about the y axis."""
    cosine = np.float32(math.cos(yaw))
    sine = np.float32(math.sin(yaw))
    x, y, z = vectors
    return np.stack([cosine * x + sine * z, y, cosine * z - sine * x])


def window(camera, centre, half, yaw=0.0):
    """Return the pixels that a box may touch, as slices of (3, H, W)."""
    corners = CORNERS * np.reshape(half, (3, 1))
    _, pixels = project(camera, turn(corners, yaw).T + centre)
    first = pixels.min(0)
    last = pixels.max(0) + 2
    edges = np.stack([first, last]).clip(0, camera.size)
    (x0, y0), (x1, y1) = edges.astype(int)
    return slice(None), slice(y0, y1), slice(x0, x1)


def rays(camera):
    """Return each pixel's ray (3, H, W); its z is 1 for the camera, so that t is the depth."""
    width, height = camera.size
    cx, cy = camera.middle
    u = np.arange(width, dtype=np.float32)
    v = np.arange(height, dtype=np.float32)
    x = (u - cx) / camera.focal
    y = (v - cy) / camera.focal
    axes = camera.axes.astype(np.float32)
    right, down, forward = axes[..., None, None]
    ray = x * right + y[:, None] * down + forward
    ray[ray == 0] = 1e-9
    return ray


# ---- surfaces


@np.errstate(divide="ignore", invalid="ignore")  # NaN where a ray misses
def hit(origin, ray, profile):
    """Return the t > 0 where rays origin + t ray enter a part, else inf.

    A part is convex: a ray is inside between the last side that it enters and the first that it
    leaves. The box has |x|, |y|, |z| <= 1; a profile bounds x and z instead by
        x^2 + z^2 = a + b y + c y^2,
    which along the ray is square t^2 + 2 linear t + rest = 0.
    """
    low = (-1 - origin) / ray
    high = (1 - origin) / ray
    near = np.minimum(low, high)
    far = np.maximum(low, high)
    if profile:
        a, b, c = profile
        x, y, z = origin
        dx, dy, dz = ray
        # > 0: no ray is as steep as a cone's side.
        square = dx * dx + dz * dz - c * dy * dy
        linear = x * dx + z * dz - (b / 2 + c * y) * dy
        rest = x**2 + z**2 - a - b * y - c * y**2
        root = np.sqrt(linear * linear - square * rest)
        # The ends of the profile are the box's.
        near = [near[1], (-root - linear) / square]
        far = [far[1], (root - linear) / square]
    near = np.max(near, 0)
    far = np.min(far, 0)
    is_hit = (near < far) & (near > 0)
    return np.where(is_hit, near, np.inf)


def shell(room, things, camera, ray, origin):
    """Return depth (H, W), normals and albedo (3, H, W) of floor, walls and ceiling."""
    ahead = np.where(ray > 0, room.high, room.low)
    t = (ahead - origin) / ray
    depth = t.min(0)
    is_met = t.argmin(0) == [[[0]], [[1]], [[2]]]
    normal = -np.sign(ray) * is_met
    x, y, z = origin + depth * ray
    floor = normal[1] < 0
    tiles = np.floor(x / room.tile) + np.floor(z / room.tile)
    skirting = np.float32(0.3) * (y > -0.1)
    tone = np.where(floor, 0.88 + 0.12 * (tiles % 2), 1 - skirting)
    ceiling = normal[1].clip(0)
    tone += 0.12 * ceiling - 0.06 * normal[0]
    for thing in things:
        # A soft shadow on the floor.
        across, _, deep = thing.centre.tolist()
        reach = float(np.hypot(*thing.half[::2]))
        half = (1.6 * reach, 0.01, 1.6 * reach)
        _, *at = window(camera, thing.centre * (1, 0, 1), half)
        dx = x[*at] - across
        dz = z[*at] - deep
        fading = np.exp((dx**2 + dz**2) / (-0.7 * reach**2))
        tone[*at] -= 0.45 * floor[*at] * fading
    colour = np.where(floor, room.floor, room.wall)
    return depth, normal, colour * tone


def normals(part, point, half, yaw):
    """Return unit normals (3, N) in the world, at points (3, N) on a part's surface."""
    # On a box's face, or on the end of a rod.
    normal = point * (abs(point) > 0.999)
    if part.profile:
        _, b, c = part.profile
        x, y, z = point
        side = [x, -b / 2 - c * y, z]
        end = [[0], [1], [0]] * point
        normal = np.where(normal[1] != 0, end, side)
    normal = turn(normal / half, yaw)
    square = (normal * normal).sum(0)
    return normal / np.sqrt(square)


def colours(thing, part, metres):
    """Return colours (3, N) at points (3, N) of a part, in metres from its centre."""
    if part.paint == 0:
        stripe = np.floor(metres / 0.15 + 0.37)
        is_odd = (stripe * thing.pattern).sum(0) % 2 == 1
        paint = np.where(is_odd, 2, 0)
    else:
        paint = np.full(metres.shape[1], part.paint)
    return thing.paints[paint].T


def render(room, things, camera):
    """Draw the room, then part by part what is nearer than what stands there."""
    origin = np.float32(camera.position)[:, None, None]
    ray = rays(camera)
    depth, normal, albedo = shell(room, things, camera, ray, origin)
    owner = np.full(depth.shape, -1)
    alone = np.zeros((len(things), *depth.shape), bool)
    for index, thing in enumerate(things):
        yaw = thing.yaw
        for part in KINDS[thing.name].parts:
            centre = thing.centre + turn(part.centre * thing.half, yaw)
            half = np.float32(part.half * thing.half)
            box = window(camera, centre, half, yaw)
            _, *at = box
            # In the part's own frame, in which it fills [-1, 1]^3.
            start = turn(camera.position - centre, -yaw) / half
            start = np.float32(start)[:, None]
            half = half[:, None]
            way = turn(ray[box], -yaw) / half[..., None]
            t = hit(start[..., None], way, part.profile)
            alone[index][*at] |= t < np.inf
            front = t < depth[*at]
            depth[*at][front] = t[front]
            owner[*at][front] = index
            point = start + t[front] * way[:, front]
            normal[box][:, front] = normals(part, point, half, yaw)
            albedo[box][:, front] = colours(thing, part, point * half)
    light = room.light - origin - depth * ray
    rgb = albedo * brightness(normal, light, ray)
    rgb = rgb.clip(0, 255).astype(np.uint8)
    return Drawing(rgb.transpose(1, 2, 0), depth, owner, alone)


def brightness(normal, light, ray):
    """Return (H, W): ambient light, the lamp's in the direction `light`, and the camera's."""
    distance = np.sqrt(dot(light, light))
    diffuse = (dot(normal, light) / distance).clip(0)
    return 0.42 + 0.55 * diffuse - 0.12 * dot(normal, ray)


def dot(a, b):
    return np.einsum("ihw,ihw->hw", a, b)
