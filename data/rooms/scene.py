"""A scene: what stands in a room, the cameras that see it, and the marks that are drawn.

Marks are drawn once a scene, so that its questions share its images.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from data.arithmetic import rounded
from data.rooms.render import Camera, Room, look, project, render
from data.rooms.things import KINDS, PAINTS, Thing

# Small things may stand on flat ones.
SMALL = ("ball", "vase")
FLAT = ("table", "cabinet")
# Along which axes a thing's paint changes.
PATTERNS = np.array([(0, 0, 0), (0, 1, 0), (1, 1, 1)])
MARKS = {"red": (255, 0, 0), "blue": (0, 0, 255), "green": (0, 255, 0), "yellow": (255, 255, 0)}


@dataclass(frozen=True)
class Mark:
    """A thing that is marked in one view."""

    colour: str
    kind: str  # point | bbox
    thing: Thing
    view: int
    region: list[int]  # x0, y0, x1, y1 in pixels
    centres: list  # by view: (x, y, z) in the camera's frame, metres

    @property
    def mention(self) -> str:
        return f"{self.colour} {self.kind}"

    @property
    def text(self) -> str:
        """How a question speaks of it."""
        return f"the {self.thing.name} ({self.mention} <mask>)"

    def near(self, view: int) -> list[float]:
        """Return the centre as the detect block has it, rounded."""
        return [rounded(value) for value in self.centres[view]]


class Scene(NamedTuple):
    rng: np.random.Generator  # after the draws of the scene
    images: list[Image.Image]  # a view each, with marks
    depths: list[np.ndarray]  # (H, W) metres
    cameras: list[Camera]
    marks: list[Mark]


def scene(seed, index, size):
    """Draw rooms until one has two things to mark."""
    rng = np.random.default_rng((seed, index))
    marks = []
    while len(marks) < 2:
        room, camera, things = furnish(rng, size)
        colours = rng.permutation(list(MARKS)).tolist()
        cameras = [camera]
        aside = second_camera(rng, room, camera)
        layout = rng.integers(3)
        if layout == 2:
            cameras.append(aside)
        first = 4 if layout == 0 else 3  # colours in the first view
        # Of all marks of a scene: a mixture was never told apart.
        kind = "point" if rng.random() < 0.4 else "bbox"
        drawings = [render(room, things, camera) for camera in cameras]
        images = []
        marks = []
        for view, drawing in enumerate(drawings):
            pens = colours[:first] if view == 0 else colours[first:]
            image, more = draw(rng, things, cameras, view, drawing, pens, kind, marks)
            images.append(image)
            marks = marks + more
    depths = [drawing.depth for drawing in drawings]
    return Scene(rng, images, depths, cameras, marks)


def furnish(rng, size):
    """Return a room, a camera in it, and up to seven things, on the floor or on one another."""
    width, height, deep = rng.uniform((3.5, 2.4, 4.2), (6.5, 3.2, 7))
    floor, wall = PAINTS[rng.integers(10, size=2)] * 0.5 + [[105, 92, 78], [112, 110, 106]]
    light_x = rng.uniform(-0.4, 0.4) * width
    light_z = deep * rng.uniform(0.2, 0.5)
    room = Room(
        low=plane(-width / 2, -height, 0),
        high=plane(width / 2, 0, deep),
        floor=plane(*floor),
        wall=plane(*wall),
        light=plane(light_x, 0.2 - height, light_z),
        tile=rng.uniform(0.3, 0.8),
    )
    eye = rng.uniform((-0.3 * width, -1.9, 0.1), (0.3 * width, -1.2, 0.4))
    goal = rng.uniform((-0.15 * width, -0.6, 0.55 * deep), (0.15 * width, -0.2, 0.7 * deep))
    camera = look(size, size[0] * rng.uniform(0.75, 1.05), eye, goal)
    right = camera.axes[0]
    ahead = np.cross(right, (0, 1, 0))
    things = []
    for name in rng.choice(list(KINDS), 14).tolist():
        kind = KINDS[name]
        growth = np.subtract(kind.largest, kind.smallest)
        half = (np.array(kind.smallest) + growth * rng.random()) / 2
        across = rng.uniform(-0.4, 0.4) * size[0] / camera.focal
        spot = rng.uniform(1.6, deep) * (ahead + across * right) + eye * (1, 0, 1)
        if things and name in SMALL and things[-1].name in FLAT:
            below = things[-1]
            spot = below.centre - (0, below.half[1], 0)
        elif not is_free(spot, half, (width, deep), things):
            continue
        thing = Thing(
            name,
            centre=spot - (0, half[1], 0),
            half=half,
            pattern=PATTERNS[rng.integers(3)][:, None],
            paints=PAINTS[rng.choice(10, 3, False)],
            yaw=rng.uniform(0, 6.28),
        )
        things.append(thing)
    return room, camera, things[:7]


def plane(*vector):
    return np.float32(vector).reshape(3, 1, 1)


def is_free(spot, half, floor, things):
    """Return whether a thing may stand there, however it is turned. floor: (width, depth)."""
    reach = np.hypot(*half[::2])
    width, deep = floor
    if abs(spot[0]) > width / 2 - reach or spot[2] > deep - reach:
        return False
    for thing in things:
        away = np.hypot(*(spot - thing.centre)[::2])
        if away - reach - np.hypot(*thing.half[::2]) < 0:
            return False
    return True


def second_camera(rng, room, camera):
    """Return a camera aside of the first one that looks at the same spot."""
    right, _, forward = camera.axes
    eye = camera.position + rng.choice((-1, 1)) * rng.uniform(0.5, 1) * right
    low = room.low.ravel() + 0.1
    high = room.high.ravel() - 0.1
    target = camera.position + 3 * forward
    return look(camera.size, camera.focal, eye.clip(low, high), target)


# ---- marks


def draw(rng, things, cameras, view, drawing, colours, kind, marked):
    """Mark things that one view shows well, a colour each: -> image, list of Mark.

    marked: the marks of the other views, whose things get no second one.
    """
    image = Image.fromarray(drawing.rgb)
    size = cameras[view].size
    centres = np.array([thing.centre for thing in things])
    places = [project(camera, centres) for camera in cameras]
    middles = places[view][1].round().astype(int)
    least = 0.003 * drawing.owner.size
    if kind == "point":
        least = max(least, 9 * radius_of(size) ** 2)
    taken = [mark.thing for mark in marked]
    free = []
    for index in rng.permutation(len(things)):
        is_taken = any(thing is things[index] for thing in taken)
        if not is_taken and is_seen(drawing, index, middles[index], least):
            free.append(index)
    marks = []
    for colour, index in zip(colours, free, strict=False):
        pixels = pixels_of(drawing, index)
        if kind == "point":
            region = draw_point(image, colour, pixels, middles[index])
        else:
            region = draw_box(image, colour, pixels)
        by_view = [local[index].round(4).tolist() for local, _ in places]
        mark = Mark(colour, kind, things[index], view, region.ravel().tolist(), by_view)
        marks.append(mark)
    return image, marks


def radius_of(size):
    return round(size[0] / 32)


def pixels_of(drawing, index):
    """Return the pixels in which a thing is seen, (N, 2): u, v."""
    return np.argwhere(drawing.owner == index)[:, ::-1]


def is_seen(drawing, index, middle, least):
    """Return whether a thing is whole, mostly seen, and seen at its centre."""
    alone = drawing.alone[index]
    area = alone.sum()
    # Whole: nothing of it lies on the image's edge.
    if area != alone[1:-1, 1:-1].sum():
        return False
    seen = (drawing.owner == index).sum()
    u, v = middle
    return seen > max(0.6 * area, least) and drawing.owner[v, u] == index


def draw_point(image, colour, pixels, middle):
    """Draw a disc at the thing's pixel that is closest to its centre; return its region (2, 2)."""
    size = image.size
    radius = radius_of(size)
    distance = ((pixels - middle) ** 2).sum(1)
    pixel = pixels[distance.argmin()]
    disc = np.stack([pixel - radius, pixel + radius])
    ImageDraw.Draw(image).ellipse(disc.ravel().tolist(), fill=MARKS[colour])
    # 50 of 1000 wide, clipped as the paper does.
    place = pixel * 1000 // size
    low = (place - 25).clip(0)
    high = np.where(place > 975, 999, place + 25)
    return np.stack([low, high]) * size // 1000


def draw_box(image, colour, pixels):
    """Draw a frame around the thing's pixels; return its region (2, 2)."""
    width = max(1, round(image.size[0] / 128))
    box = np.stack([pixels.min(0), pixels.max(0) + 1])
    frame = box - [(0, 0), (1, 1)]
    pen = ImageDraw.Draw(image)
    pen.rectangle(frame.ravel().tolist(), outline=MARKS[colour], width=width)
    return box
