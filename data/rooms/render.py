"""Renders a room in colour and depth: each part is met in closed form by its own pixels' rays.

Camera: OpenCV, pixel centres at integers, depth is z. Vectors are (3, ...), one plane an axis; all
is float32 where pixels are many.
"""

import math
from collections import namedtuple

import numpy as np

from data.rooms.things import CORNERS, KINDS

# Size (W, H) and focal length in pixels, position (3,), axes (3, 3): rows right, down, forward.
Camera = namedtuple("Camera", "size focal position axes")

# An empty room, in vectors (3, 1, 1) of float32: its corner on the left, at the ceiling, in front,
# and the opposite one; colours of floor and walls, 0..255; the lamp's position. tile is the side of
# the floor's tiles in metres.
Room = namedtuple("Room", "low high floor wall light tile")

# rgb (H, W, 3) uint8, depth (H, W) in metres, owner (H, W): the index of the thing that is seen, or
# -1; alone (things, H, W): whether a thing would be seen if nothing hid it.
Drawing = namedtuple("Drawing", "rgb depth owner alone")


# ---- cameras


def look(size, focal, position, target):
    """Return a level camera at a position that faces a target."""
    way = target - position
    forward = way / np.linalg.norm(way)
    # Level: `right` lies in the floor's plane, so that the horizon is never tilted.
    right = np.cross((0, 1, 0), forward)
    right = right / across_floor(forward)
    down = np.cross(forward, right)
    axes = np.stack([right, down, forward])
    return Camera(size, focal, position, axes)


def middle(size):
    """Return the principal point (cx, cy)."""
    width, height = size
    cx = (width - 1) / 2
    cy = (height - 1) / 2
    return cx, cy


def project(camera, points):
    """Return points (N, 3) of the world in the camera's frame (N, 3), and their pixels (N, 2)."""
    relative = points - camera.position
    local = relative @ camera.axes.T
    xy = local[:, :2]
    # 5 cm at least: what lies behind the camera lands far outside of the image, not mirrored in it.
    z = local[:, 2:].clip(0.05)
    pixels = camera.focal * xy / z
    pixels = pixels + middle(camera.size)
    return local, pixels


def turn(vectors, yaw):
    """Rotate vectors (3, ...) about the y axis."""
    cosine = np.float32(math.cos(yaw))
    sine = np.float32(math.sin(yaw))
    x, y, z = vectors
    across = cosine * x + sine * z
    deep = cosine * z - sine * x
    return np.stack([across, y, deep])


def across_floor(vector):
    """Return a vector's length in the plane of the floor."""
    x, _, z = vector
    return np.hypot(x, z)


def window(camera, centre, half, yaw=0.0):
    """Return the pixels that a box may touch, as slices of (3, H, W)."""
    corners = CORNERS * np.reshape(half, (3, 1))
    corners = turn(corners, yaw).T
    corners = corners + centre
    _, pixels = project(camera, corners)
    first = pixels.min(0)
    first = first.clip(0, camera.size)
    # One for the slice's open end, and one as the cast to int rounds down.
    last = pixels.max(0) + 2
    last = last.clip(0, camera.size)
    x0, y0 = first.astype(int)
    x1, y1 = last.astype(int)
    rows = slice(y0, y1)
    columns = slice(x0, x1)
    return slice(None), rows, columns


def rays(camera):
    """Return each pixel's ray (3, H, W); its z is 1 for the camera, so that t is the depth."""
    width, height = camera.size
    cx, cy = middle(camera.size)
    u = np.arange(width, dtype=np.float32)
    v = np.arange(height, dtype=np.float32)[:, None]
    x = (u - cx) / camera.focal
    y = (v - cy) / camera.focal
    axes = camera.axes.astype(np.float32)
    right, down, forward = axes[..., None, None]
    # (W,) times (3, 1, 1) and (H, 1) times (3, 1, 1): broadcast to (3, H, W).
    ray = x * right + y * down + forward
    # A ray that is parallel to a plane meets it very far away, instead of dividing by zero.
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
        square = dx * dx + dz * dz
        square = square - c * dy * dy
        slope = b / 2 + c * y
        linear = x * dx + z * dz
        linear = linear - slope * dy
        rest = x**2 + z**2
        rest = rest - a - b * y - c * y**2
        # NaN where the ray misses the profile: no comparison below holds for it.
        discriminant = linear * linear - square * rest
        root = np.sqrt(discriminant)
        enters = (-root - linear) / square
        leaves = (root - linear) / square
        # The ends of the profile are the box's.
        near = [near[1], enters]
        far = [far[1], leaves]
    near = np.max(near, 0)
    far = np.min(far, 0)
    is_hit = (near < far) & (near > 0)
    return np.where(is_hit, near, np.inf)


def shell(room, things, camera, ray, origin):
    """Return depth (H, W), normals and albedo (3, H, W) of floor, walls and ceiling."""
    ahead = np.where(ray > 0, room.high, room.low)
    t = (ahead - origin) / ray
    depth = t.min(0)
    # Of three planes the nearest is met.
    axis = np.arange(3)[:, None, None]
    is_met = t.argmin(0) == axis
    normal = -np.sign(ray) * is_met
    x, y, z = origin + depth * ray
    floor = normal[1] < 0
    # A chessboard: tiles whose two numbers add up to an odd one are lighter.
    tiles = np.floor(x / room.tile)
    tiles = tiles + np.floor(z / room.tile)
    floor_tone = 0.88 + 0.12 * (tiles % 2)
    # The lowest 10 cm of a wall.
    wall_tone = np.where(y > -0.1, np.float32(0.7), np.float32(1))
    tone = np.where(floor, floor_tone, wall_tone)
    ceiling = normal[1].clip(0)
    # The left, the middle and the right wall differ, or a corner could not be seen.
    sideways = 0.06 * normal[0]
    tone += 0.12 * ceiling - sideways
    for thing in things:
        # A soft shadow on the floor.
        across, _, deep = thing.centre.tolist()
        reach = float(across_floor(thing.half))
        below = (across, 0, deep)
        half = (1.6 * reach, 0.01, 1.6 * reach)
        # (3, H, W) without its first axis: tone has one plane.
        _, rows, columns = window(camera, below, half)
        at = (rows, columns)
        dx = x[at] - across
        dz = z[at] - deep
        square = dx**2 + dz**2
        width = -0.7 * reach**2
        fading = np.exp(square / width)
        # In place, and in the order of the things: where shadows overlap, both darken.
        tone[at] -= 0.45 * floor[at] * fading
    colour = np.where(floor, room.floor, room.wall)
    return depth, normal, colour * tone


def normals(part, point, half, yaw):
    """Return unit normals (3, N) in the world, at points (3, N) on a part's surface."""
    # On a box's face, or on the end of a rod.
    normal = point * (abs(point) > 0.999)
    if part.profile:
        # Half the gradient of x^2 + z^2 - a - b y - c y^2.
        _, b, c = part.profile
        x, y, z = point
        upwards = -b / 2 - c * y
        side = [x, upwards, z]
        # The flat ends: along y, up or down as the point lies.
        end = [[0], [1], [0]] * point
        normal = np.where(normal[1] != 0, end, side)
    # Normals scale by the inverse of what points scale by.
    normal = normal / half
    normal = turn(normal, yaw)
    square = (normal * normal).sum(0)
    return normal / np.sqrt(square)


def colours(thing, part, metres):
    """Return colours (3, N) at points (3, N) of a part, in metres from its centre."""
    if part.paint == 0:
        # 15 cm wide; moved by a share of that, so that no part's middle lies on an edge.
        stripe = np.floor(metres / 0.15 + 0.37)
        number = (stripe * thing.pattern).sum(0)
        is_odd = number % 2 == 1
        paint = np.where(is_odd, 2, 0)
    else:
        paint = np.full(metres.shape[1], part.paint)
    return thing.paints[paint].T


def render(room, things, camera, kinds=KINDS):
    """Draw the room, then part by part what is nearer than what stands there.

    kinds: what shape a thing of which name has.
    """
    origin = np.float32(camera.position)[:, None, None]
    ray = rays(camera)
    depth, normal, albedo = shell(room, things, camera, ray, origin)
    owner = np.full(depth.shape, -1)
    alone = np.zeros((len(things), *depth.shape), bool)
    for index, thing in enumerate(things):
        yaw = thing.yaw
        for part in kinds[thing.name].parts:
            shift = turn(part.centre * thing.half, yaw)
            centre = thing.centre + shift
            half = np.float32(part.half * thing.half)
            # Most of the image can't show the part, and isn't looked at.
            box = window(camera, centre, half, yaw)
            _, rows, columns = box
            at = (rows, columns)
            # In the part's own frame, in which it fills [-1, 1]^3.
            start = turn(camera.position - centre, -yaw)
            start = np.float32(start / half)
            start = start[:, None]
            half = half[:, None]
            way = turn(ray[box], -yaw)
            way = way / half[..., None]
            # t counts lengths of the ray in whatever frame: it is the depth, as ray's z is 1.
            t = hit(start[..., None], way, part.profile)
            # Before the depth test: how much of the thing the image could show at all.
            alone[index][at] |= t < np.inf
            front = t < depth[at]
            depth[at][front] = t[front]
            owner[at][front] = index
            # Of the pixels that this part wins alone: (3, N).
            point = start + t[front] * way[:, front]
            metres = point * half
            # Views of the window: the assignments write into the whole image.
            normal[box][:, front] = normals(part, point, half, yaw)
            albedo[box][:, front] = colours(thing, part, metres)
    # From the surface to the lamp, once for all pixels.
    light = room.light - origin - depth * ray
    rgb = albedo * brightness(normal, light, ray)
    rgb = rgb.clip(0, 255)
    rgb = rgb.astype(np.uint8)
    rgb = rgb.transpose(1, 2, 0)
    return Drawing(rgb, depth, owner, alone)


def brightness(normal, light, ray):
    """Return (H, W): ambient light, the lamp's in the direction `light`, and the camera's."""
    distance = np.sqrt(dot(light, light))
    # Lambert: the cosine between the normal and the way to the lamp; nothing from behind.
    cosine = dot(normal, light) / distance
    diffuse = cosine.clip(0)
    # The camera's own light falls on what faces it: there normal and ray point against each other.
    facing = dot(normal, ray)
    return 0.42 + 0.55 * diffuse - 0.12 * facing


def dot(a, b):
    return np.einsum("ihw,ihw->hw", a, b)
