"""A scene: what stands in a room, the cameras that see it, and the marks that are drawn.

Marks are drawn once a scene, so that its questions share its images.
"""

from collections import namedtuple

import numpy as np
from PIL import Image, ImageDraw

from data.arithmetic import rounded
from data.rooms.render import Room, across_floor, look, project, render
from data.rooms.things import STYLES, Thing

# Small things may stand on flat ones.
SMALL = ("ball", "vase")
FLAT = ("table", "cabinet")
MARKS = {
    "red": (255, 0, 0),
    "blue": (0, 0, 255),
    "green": (0, 255, 0),
    "yellow": (255, 255, 0),
}
# Added to half of a paint: floors are darker than walls.
FLOOR = (105, 92, 78)
WALL = (112, 110, 106)


class Mark(namedtuple("Mark", "colour kind thing view region centres")):
    """A thing that is marked in one view.

    kind: point or bbox. region: x0, y0, x1, y1 in pixels of that view. centres: (x, y, z) in metres
    in the camera's frame of each view.
    """

    @property
    def mention(self):
        return f"{self.colour} {self.kind}"

    @property
    def text(self):
        """How a question speaks of it."""
        return f"the {self.thing.name} ({self.mention} <mask>)"

    def near(self, view):
        """Return the centre as the detect block has it, rounded."""
        return [rounded(value) for value in self.centres[view]]


# The generator after its draws; a view each: images with marks, depths (H, W) in metres, cameras;
# the marks of all views.
Scene = namedtuple("Scene", "rng images depths cameras marks")


def scene(seed, index, size, style="house"):
    """Draw rooms of a style until one has two things to mark."""
    style = STYLES[style]
    rng = np.random.default_rng((seed, index))
    marks = []
    while len(marks) < 2:
        room, camera, things = furnish(rng, size, style)
        colours = rng.permutation(list(MARKS)).tolist()
        cameras = [camera]
        aside = second_camera(rng, room, camera)
        # A third of the scenes each: up to four marks in one view, three in one, three and
        # one in two.
        layout = rng.integers(3)
        if layout == 2:
            cameras.append(aside)
        first = 4 if layout == 0 else 3  # colours in the first view
        # Of all marks of a scene: a mixture was never told apart.
        share = rng.random()
        kind = "point" if share < 0.4 else "bbox"
        drawings = [render(room, things, camera, style.kinds) for camera in cameras]
        # From the start again: a room with a single mark is thrown away, and the generator goes on.
        images = []
        marks = []
        for view, drawing in enumerate(drawings):
            pens = colours[:first] if view == 0 else colours[first:]
            image, more = draw(rng, things, cameras, view, drawing, pens, kind, marks)
            images.append(image)
            marks = marks + more
    depths = [drawing.depth for drawing in drawings]
    return Scene(rng, images, depths, cameras, marks)


def furnish(rng, size, style=STYLES["house"]):
    """Return a room, a camera in it, and up to seven things, on the floor or on one another."""
    least = (3.5, 2.4, 4.2)
    most = (6.5, 3.2, 7)
    width, height, deep = rng.uniform(least, most)
    # Every draw of this file comes in a fixed order: another one would make other scenes of a seed.
    paints = rng.integers(10, size=2)
    floor, wall = style.paints[paints] * 0.5
    light_x = rng.uniform(-0.4, 0.4) * width
    light_z = deep * rng.uniform(0.2, 0.5)
    room = Room(
        low=plane(-width / 2, -height, 0),
        high=plane(width / 2, 0, deep),
        floor=plane(*(floor + FLOOR)),
        wall=plane(*(wall + WALL)),
        light=plane(light_x, 0.2 - height, light_z),
        tile=rng.uniform(0.3, 0.8),
    )
    camera = first_camera(rng, size, width, deep, style)
    things = []
    for name in rng.choice(list(style.kinds), 14).tolist():
        kind = style.kinds[name]
        # One number for all three sides: a kind keeps its proportions as it grows.
        smallest = np.array(kind.smallest)
        range_of_size = kind.largest - smallest
        growth = rng.random() * range_of_size
        half = (smallest + growth) / 2
        spot = spot_in_view(rng, camera, deep)
        if things and name in SMALL and things[-1].name in FLAT:
            # y is down: the top of the thing below lies half its height above its centre.
            below = things[-1]
            spot = below.centre - (0, below.half[1], 0)
        elif not is_free(spot, half, width, deep, things):
            continue
        pattern = style.patterns[rng.integers(3)]
        paints = rng.choice(10, 3, replace=False)
        yaw = rng.uniform(0, 6.28)
        thing = Thing(
            name,
            centre=spot - (0, half[1], 0),
            half=half,
            pattern=np.array(pattern)[:, None],
            paints=style.paints[paints],
            yaw=yaw,
        )
        things.append(thing)
    return room, camera, things[:7]


def plane(*vector):
    return np.float32(vector).reshape(3, 1, 1)


def first_camera(rng, size, width, deep, style):
    """Return a camera at eye height near the front wall that faces the middle of the room."""
    highest, lowest = style.eye
    near = (-0.3 * width, highest, 0.1)
    far = (0.3 * width, lowest, 0.4)
    eye = rng.uniform(near, far)
    near = (-0.15 * width, -0.6, 0.55 * deep)
    far = (0.15 * width, -0.2, 0.7 * deep)
    target = rng.uniform(near, far)
    focal = size[0] * rng.uniform(*style.focal)
    return look(size, focal, eye, target)


def spot_in_view(rng, camera, deep):
    """Return a place on the floor that the camera sees, or that lies beyond the walls."""
    right = camera.axes[0]
    # Where the camera looks, without its tilt: the way lies in the floor.
    ahead = np.cross(right, (0, 1, 0))
    # Within the middle four fifths of the image's width, as a share of the distance ahead.
    share = rng.uniform(-0.4, 0.4)
    across = share * camera.size[0] / camera.focal
    distance = rng.uniform(1.6, deep)
    way = distance * (ahead + across * right)
    # Straight below the camera: y = 0 is the floor.
    below = camera.position * (1, 0, 1)
    return way + below


def is_free(spot, half, width, deep, things):
    """Return whether a thing may stand there, however it is turned."""
    # The circle around its base, which holds it at every yaw.
    reach = across_floor(half)
    x, _, z = spot
    if abs(x) > width / 2 - reach or z > deep - reach:
        return False
    for thing in things:
        gap = across_floor(spot - thing.centre) - reach
        if gap < across_floor(thing.half):
            return False
    return True


def second_camera(rng, room, camera):
    """Return a camera aside of the first one that looks at the same spot."""
    right, _, forward = camera.axes
    side = rng.choice((-1, 1))
    step = side * rng.uniform(0.5, 1)
    # 10 cm from the walls: a camera in a wall would see nothing of the room.
    low = room.low.ravel() + 0.1
    high = room.high.ravel() - 0.1
    eye = (camera.position + step * right).clip(low, high)
    target = camera.position + 3 * forward
    return look(camera.size, camera.focal, eye, target)


# ---- marks


def draw(rng, things, cameras, view, drawing, colours, kind, marked):
    """Mark things that one view shows well, a colour each: -> image, list of Mark.

    marked: the marks of the other views, whose things get no second one.
    """
    image = Image.fromarray(drawing.rgb)
    size = cameras[view].size
    centres = np.array([thing.centre for thing in things])
    # In every view, also in those where the thing isn't marked: a question may ask about another.
    places = [project(camera, centres) for camera in cameras]
    middles = places[view][1].round().astype(int)
    # Smaller things could hardly be told, and a disc must leave most of its thing to see.
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
        region = region.ravel().tolist()
        by_view = [local[index].round(4).tolist() for local, _ in places]
        marks.append(Mark(colour, kind, things[index], view, region, by_view))
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
    inside = alone[1:-1, 1:-1]
    # Whole: nothing of it lies on the image's edge.
    if inside.sum() != area:
        return False
    seen = drawing.owner == index
    # Mostly seen: nothing hides more than two fifths of it.
    if seen.sum() <= max(0.6 * area, least):
        return False
    u, v = middle
    return seen[v, u]


def draw_point(image, colour, pixels, middle):
    """Draw a disc at the thing's pixel that is closest to its centre; return its region (2, 2)."""
    size = image.size
    radius = radius_of(size)
    distance = ((pixels - middle) ** 2).sum(1)
    pixel = pixels[distance.argmin()]
    first = pixel - radius
    last = pixel + radius
    disc = (*first, *last)
    pen = ImageDraw.Draw(image)
    pen.ellipse(disc, fill=MARKS[colour])
    # 50 of 1000 wide, clipped as the paper does.
    place = pixel * 1000 // size
    low = place - 25
    low = low.clip(0)
    high = np.where(place > 975, 999, place + 25)
    return np.stack([low, high]) * size // 1000


def draw_box(image, colour, pixels):
    """Draw a frame around the thing's pixels; return its region (2, 2)."""
    width = max(1, round(image.size[0] / 128))
    first = pixels.min(0)
    last = pixels.max(0)
    pen = ImageDraw.Draw(image)
    pen.rectangle((*first, *last), outline=MARKS[colour], width=width)
    return np.stack([first, last + 1])
