"""SpatialScenes: procedural RGB-D rooms with exact truth, and questions about them in both paths.

    python -m data.scenes --out out/scenes --n 4000 --seed 0 --size 256 192

Things are unions of boxes and solids of revolution, each met in closed form by the rays of its own
screen rectangle. World: metres, x right, y down (the floor is y = 0), z into the room. Camera:
OpenCV, pixel centres at integers, depth is z. Marks are drawn once a scene, so its questions share
its image. What rounding or occlusion could flip is not asked; DTR's rationale works with the
rounded centres of its own detect block. Options stand in alphabetical order (shuffled, a tiny model
found the right words, but not their letters), and of two things the closer one is asked for (of
"closer" and "farther" in turns it took the one for the other).
"""

import json
import math
import os
import sys
from collections import Counter, namedtuple
from dataclasses import dataclass
from functools import partial
from itertools import permutations
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import tyro
from PIL import Image, ImageDraw
from tqdm import tqdm

from srreal import answer_score

MARKS = {"red": (255, 0, 0), "blue": (0, 0, 255), "green": (0, 255, 0), "yellow": (255, 255, 0)}
# not the marks' colours
PAINTS = "e4dac6 966c4c 74747a 484850 649498 9a78a0 d8a4a8 e0ac86 687896 be966c"
PAINTS = np.array([list(bytes.fromhex(paint)) for paint in PAINTS.split()], np.float32)
CORNERS = np.mgrid[-1:2:2, -1:2:2, -1:2:2].reshape(3, 8)
# A part fills its box, [-1, 1]^3: all of it (BOX), or x^2 + z^2 <= a + b y + c y^2 for a profile
# (a, b, c).
BOX, BALL, ROD, CONE, SHADE = None, (1, 0, -1), (1, 0, 0), (0.28, 0.5, 0.22), (0.64, 0.32, 0.04)
FEET = {
    y: [(BOX, (x, y, z), (0.1, 1 - y, 0.1), 1) for x in (-0.85, 0.85) for z in (-0.85, 0.85)]
    for y in (0.1, 0.5)
}
ALL = (0, 0, 0), (1, 1, 1), 0
# smallest and largest (w, h, l) in metres; parts: shape, centre and half size in half sizes,
# paint
KINDS = {
    "box": ((0.4, 0.3, 0.4), (0.8, 0.8, 0.8), [(BOX, *ALL)]),
    "ball": ((0.3, 0.3, 0.3), (0.6, 0.6, 0.6), [(BALL, *ALL)]),
    "vase": ((0.25, 0.3, 0.25), (0.35, 0.5, 0.35), [((0.9, 0.1, -0.6), *ALL)]),
    "barrel": ((0.4, 0.5, 0.4), (0.6, 1.1, 0.6), [(ROD, *ALL)]),
    "cone": ((0.4, 0.5, 0.4), (0.7, 1.1, 0.7), [(CONE, *ALL)]),
    "cabinet": (
        (0.6, 0.9, 0.4),
        (1, 1.6, 0.6),
        [(BOX, *ALL), (BOX, (0, 0, 0), (0.88, 0.9, 1.03), 1)],
    ),
    "table": (
        (0.8, 0.5, 0.7),
        (1.4, 0.8, 1),
        [
            (BOX, (0, -0.9, 0), (1, 0.1, 1), 0),
            *FEET[0.1],
            # a shelf, or one would see through its centre
            (BOX, (0, 0, 0), (0.85, 0.04, 0.85), 1),
        ],
    ),
    "chair": (
        (0.4, 0.8, 0.4),
        (0.6, 1.1, 0.6),
        [
            (BOX, (0, 0, 0), (1, 0.08, 1), 0),
            (BOX, (0, -0.5, 0.9), (0.97, 0.5, 0.07), 0),
            *FEET[0.5],
        ],
    ),
    "lamp": (
        (0.4, 1.1, 0.4),
        (0.6, 1.7, 0.6),
        [
            (SHADE, (0, -0.7, 0), (1, 0.3, 1), 0),
            (ROD, (0, 0.2, 0), (0.1, 0.8, 0.1), 1),
            (ROD, (0, 0.96, 0), (0.7, 0.04, 0.7), 1),
        ],
    ),
}

# (W, H), pixels, (3,), rows right, down, forward
Camera = namedtuple("Camera", "size focal position axes")
# its box in the world, its looks
Thing = namedtuple("Thing", "name centre half yaw paints pattern")
# view -> centre; near: rounded
Mark = namedtuple("Mark", "colour mention text thing view region at near")
# between marks; LOR's words, DTR's working
Hop = namedtuple("Hop", "steps exact worked words working")


# ---- rendering: vectors are (3, ...), one plane an axis
def look(size, focal, position, target):
    forward = (target - position) / np.linalg.norm(target - position)
    right = np.cross((0, 1, 0), forward) / np.hypot(forward[0], forward[2])
    return Camera(size, focal, position, np.stack([right, np.cross(forward, right), forward]))


def project(camera, points):
    """(N, 3) world -> (N, 3) in the camera's frame, (N, 2) pixels."""
    local = (points - camera.position) @ camera.axes.T
    return local, camera.focal * local[:, :2] / local[:, 2:].clip(0.05) + (
        np.array(camera.size) - 1
    ) / 2


def turn(v, yaw):
    c, s = np.float32(math.cos(yaw)), np.float32(math.sin(yaw))
    return np.stack([c * v[0] + s * v[2], v[1], c * v[2] - s * v[0]])


def window(camera, centre, half, yaw=0.0):
    """The pixels that a box may touch, as slices of a (3, H, W)."""
    pixels = project(camera, turn(CORNERS * np.reshape(half, (3, 1)), yaw).T + centre)[1]
    (x0, y0), (x1, y1) = (
        np.stack([pixels.min(0), pixels.max(0) + 2]).clip(0, camera.size).astype(int)
    )
    return slice(None), slice(y0, y1), slice(x0, x1)


@np.errstate(divide="ignore", invalid="ignore")  # NaN where a ray misses
def hit(o, d, profile):
    """The t > 0 where rays o + t d enter a part, else inf; a part is convex, so last in, first
    out."""
    near, far = np.minimum((-1 - o) / d, (1 - o) / d), np.maximum((-1 - o) / d, (1 - o) / d)
    if profile:
        a, b, c = profile
        # > 0: no ray is as steep as a cone's side
        square = d[0] * d[0] + d[2] * d[2] - c * d[1] * d[1]
        linear = o[0] * d[0] + o[2] * d[2] - (b / 2 + c * o[1]) * d[1]
        root = np.sqrt(
            linear * linear - square * (o[0] ** 2 + o[2] ** 2 - a - b * o[1] - c * o[1] ** 2)
        )
        near, far = [near[1], (-root - linear) / square], [far[1], (root - linear) / square]
    near, far = np.max(near, 0), np.min(far, 0)
    return np.where((near < far) & (near > 0), near, np.inf)


def shell(room, things, camera, ray, origin):
    """Floor, walls, ceiling: depth (H, W), normals and albedo (3, H, W), with soft shadows around
    things."""
    t = (np.where(ray > 0, room["high"], room["low"]) - origin) / ray
    depth = t.min(0)
    normal, (x, y, z) = -np.sign(ray) * (t.argmin(0) == [[[0]], [[1]], [[2]]]), origin + depth * ray
    floor, tile, skirting = normal[1] < 0, room["tile"], np.float32(0.3) * (y > -0.1)
    tone = np.where(
        floor, 0.88 + 0.12 * ((np.floor(x / tile) + np.floor(z / tile)) % 2), 1 - skirting
    )
    tone += 0.12 * normal[1].clip(0) - 0.06 * normal[0]
    for thing in things:
        (across, _, deep), reach = thing.centre.tolist(), float(np.hypot(*thing.half[::2]))
        at = window(camera, thing.centre * (1, 0, 1), (1.6 * reach, 0.01, 1.6 * reach))[1:]
        square = (x[at] - across) ** 2 + (z[at] - deep) ** 2
        tone[at] -= 0.45 * floor[at] * np.exp(square / (-0.7 * reach**2))
    return depth, normal, np.where(floor, room["floor"], room["wall"]) * tone


def render(room, things, camera):
    """-> rgb (H, W, 3), depth (H, W), owner (H, W): a thing's index or -1, alone (things, H, W):
    unhidden."""
    x, y = ((np.arange(n, dtype=np.float32) - (n - 1) / 2) / camera.focal for n in camera.size)
    right, down, forward = camera.axes.astype(np.float32)[..., None, None]
    origin, ray = (
        np.float32(camera.position)[:, None, None],
        x * right + y[:, None] * down + forward,
    )
    # its z is 1 for the camera: t is the depth
    ray[ray == 0] = 1e-9
    depth, normal, albedo = shell(room, things, camera, ray, origin)
    owner, alone = np.full(depth.shape, -1), np.zeros((len(things), *depth.shape), bool)
    for i, thing in enumerate(things):
        for profile, offset, share, paint in KINDS[thing.name][2]:
            centre, half = (
                thing.centre + turn(offset * thing.half, thing.yaw),
                np.float32(share * thing.half),
            )
            _, *at = box = window(camera, centre, half, thing.yaw)
            half, o = (
                half[:, None],
                np.float32(turn(camera.position - centre, -thing.yaw) / half)[:, None],
            )
            d = turn(ray[box], -thing.yaw) / half[..., None]
            t = hit(o[..., None], d, profile)
            alone[i][*at] |= t < np.inf
            front = t < depth[*at]
            depth[*at][front], owner[*at][front] = t[front], i
            p = o + t[front] * d[:, front]
            # on a box's face, or on the end of a rod
            n = p * (abs(p) > 0.999)
            if profile:
                side = [p[0], -profile[1] / 2 - profile[2] * p[1], p[2]]
                n = np.where(n[1] != 0, [[0], [1], [0]] * p, side)
            n = turn(n / half, thing.yaw)
            normal[box][:, front] = n / np.sqrt((n * n).sum(0))
            odd = (np.floor(p * half / 0.15 + 0.37) * thing.pattern).sum(0) % 2 == 1
            albedo[box][:, front] = thing.paints[np.where(odd & (paint == 0), 2, paint)].T
    light, dot = room["light"] - origin - depth * ray, partial(np.einsum, "ihw,ihw->hw")
    shade = (
        0.42
        + 0.55 * (dot(normal, light) / np.sqrt(dot(light, light))).clip(0)
        - 0.12 * dot(normal, ray)
    )
    return (albedo * shade).clip(0, 255).astype(np.uint8).transpose(1, 2, 0), depth, owner, alone


# ---- a scene: what stands where, and what is marked
def furnish(rng, size):
    """-> room, camera, things: on the floor, or on the table before them."""
    w, h, d = rng.uniform((3.5, 2.4, 4.2), (6.5, 3.2, 7))
    floor, wall = PAINTS[rng.integers(10, size=2)] * 0.5 + [[105, 92, 78], [112, 110, 106]]
    room = {
        "low": (-w / 2, -h, 0),
        "high": (w / 2, 0, d),
        "floor": floor,
        "wall": wall,
        "light": (rng.uniform(-0.4, 0.4) * w, 0.2 - h, d * rng.uniform(0.2, 0.5)),
    }
    room = {key: np.float32(v).reshape(3, 1, 1) for key, v in room.items()} | {
        "tile": rng.uniform(0.3, 0.8)
    }
    eye = rng.uniform((-0.3 * w, -1.9, 0.1), (0.3 * w, -1.2, 0.4))
    goal = rng.uniform((-0.15 * w, -0.6, 0.55 * d), (0.15 * w, -0.2, 0.7 * d))
    camera, things = look(size, size[0] * rng.uniform(0.75, 1.05), eye, goal), []
    for name in rng.choice(list(KINDS), 14).tolist():
        low, high, _ = KINDS[name]
        half = (np.array(low) + np.subtract(high, low) * rng.random()) / 2
        ahead, across = (
            np.cross(camera.axes[0], (0, 1, 0)),
            rng.uniform(-0.4, 0.4) * size[0] / camera.focal,
        )
        spot = rng.uniform(1.6, d) * (ahead + across * camera.axes[0]) + eye * (1, 0, 1)
        reach = np.hypot(*half[::2])
        gaps = [np.hypot(*(spot - t.centre)[::2]) - reach - np.hypot(*t.half[::2]) for t in things]
        if things and name in ("ball", "vase") and things[-1].name in ("table", "cabinet"):
            spot = things[-1].centre - (0, things[-1].half[1], 0)
        elif abs(spot[0]) > w / 2 - reach or spot[2] > d - reach or min(gaps, default=1) < 0:
            continue
        pattern = np.array([(0, 0, 0), (0, 1, 0), (1, 1, 1)])[rng.integers(3), :, None]
        paints = PAINTS[rng.choice(10, 3, False)]
        things.append(
            Thing(name, spot - (0, half[1], 0), half, rng.uniform(0, 6.28), paints, pattern)
        )
    return room, camera, things[:7]


def draw(rng, things, cameras, view, drawing, colours, kind, marked):
    """Marks what is whole, mostly seen, seen at its centre and not marked yet: -> image, list of
    Mark."""
    rgb, _, owner, alone = drawing
    image, marks, size = Image.fromarray(rgb), [], cameras[view].size
    pen, radius, width = ImageDraw.Draw(image), round(size[0] / 32), max(1, round(size[0] / 128))
    places = [project(camera, np.array([thing.centre for thing in things])) for camera in cameras]
    middle = places[view][1].round().astype(int)
    least = max(0.003 * owner.size, 9 * radius**2 * (kind == "point"))
    seen = [np.argwhere(owner == i)[:, ::-1] for i in range(len(things))]  # (pixels, 2): u, v
    free = [
        i
        for i in rng.permutation(len(things))
        if all(mark.thing is not things[i] for mark in marked)
        and len(seen[i]) > max(0.6 * alone[i].sum(), least)
        and alone[i].sum() == alone[i, 1:-1, 1:-1].sum()
        and owner[*middle[i, ::-1]] == i
    ]
    for colour, i in zip(colours, free, strict=False):
        if kind == "point":
            # its own, closest to its centre
            pixel = seen[i][((seen[i] - middle[i]) ** 2).sum(1).argmin()]
            # 50 of 1000 wide, clipped as the paper does
            mid = pixel * 1000 // size
            box = np.stack([(mid - 25).clip(0), np.where(mid > 975, 999, mid + 25)]) * size // 1000
            pen.ellipse((*(pixel - radius), *(pixel + radius)), fill=MARKS[colour])
        else:
            box = np.stack([seen[i].min(0), seen[i].max(0) + 1])
            pen.rectangle((*box[0], *(box[1] - 1)), outline=MARKS[colour], width=width)
        at = [centres[i].round(4).tolist() for centres, _ in places]
        near, mention = [[r(x) for x in centre] for centre in at], f"{colour} {kind}"
        text = f"the {things[i].name} ({mention} <mask>)"
        marks.append(Mark(colour, mention, text, things[i], view, box.ravel().tolist(), at, near))
    return image, marks


def scene(seed, index, size):
    """-> the generator after its draws, images with marks, depths in metres, cameras, marks."""
    rng, marks = np.random.default_rng((seed, index)), []
    while len(marks) < 2:
        (room, camera, things), colours = furnish(rng, size), rng.permutation(list(MARKS)).tolist()
        aside = camera.position + rng.choice((-1, 1)) * rng.uniform(0.5, 1) * camera.axes[0]
        aside = aside.clip(room["low"].ravel() + 0.1, room["high"].ravel() - 0.1)
        aside = look(size, camera.focal, aside, camera.position + 3 * camera.axes[2])
        first, cameras = ((4, [camera]), (3, [camera]), (3, [camera, aside]))[rng.integers(3)]
        # of all marks: a mixture was never told apart
        kind = "point" if rng.random() < 0.4 else "bbox"
        drawings, images, marks = [render(room, things, c) for c in cameras], [], []
        for view, part in enumerate((colours[:first], colours[first:])[: len(cameras)]):
            image, more = draw(rng, things, cameras, view, drawings[view], part, kind, marks)
            images, marks = images + [image], marks + more
    return rng, images, [depth for _, depth, *_ in drawings], cameras, marks


# ---- questions: a family takes a generator, a view and marks, and returns None where it should not
# ask, else (question, answer, the wrong option or None, the rationales of LOR and DTR up to the
# option's letter)
def r(value):
    # as the detect block writes it; never -0.0
    return round(value, 2) + 0.0


def hop(view, a, b):
    """The way between two marks, both by their rounded centres: of one decimal, and its length by
    that."""
    steps = [round(q - p, 1) + 0.0 for p, q in zip(a.near[view], b.near[view], strict=True)]
    start, ways = (
        f"From {a.colour} to {b.colour} it is",
        ("left right", "up down", "nearer farther"),
    )
    far = [
        f"{abs(step)} m {names.split()[step > 0]}" for step, names in zip(steps, ways, strict=True)
    ]
    way = f"{far[0]}, {far[1]} and {far[2]}"
    return Hop(
        steps,
        math.dist(a.at[view], b.at[view]),
        math.hypot(*steps),
        f"{start} about {way}",
        f"{start} {way}",
    )


def fill(question, exact, worked, lor, dtr):
    """A number of one decimal, where the exact and the worked value agree on it with a margin."""
    answer = f"{exact:.1f}"
    if max(abs(exact - float(answer)), abs(worked - float(answer))) < 0.044:
        return (
            question,
            answer,
            None,
            *(f"{thought}, so the answer is {answer}" for thought in (lor, dtr)),
        )


def versus(rng, origin, a, b, p, q, *thoughts):
    """Which of a and b, at distances p and q, is closer to the origin?"""
    if abs(p - q) > 0.25:
        (win, lose), than = ((a, b), "less") if p < q else ((b, a), "more")
        ask = f"{rng.choice(['Which is', 'Tell me what is'])} closer to {origin}: {a.text} or {b.text}?"
        end = f"{p:.1f} is {than} than {q:.1f}, so closer is {win.colour}"
        return ask, win.colour, lose.colour, *(f"{thought}. {end}" for thought in thoughts)


def direct(name, a, b, p, q):
    return f"From {name} it is about {p:.1f} m to {a.colour} and about {q:.1f} m to {b.colour}"


def depth_order(rng, view, a, b):
    p, q = a.near[view][2], b.near[view][2]
    # by z and by distance alike
    if (p - q) * (math.hypot(*a.at[view]) - math.hypot(*b.at[view])) > 0:
        return versus(
            rng,
            "the camera",
            a,
            b,
            p,
            q,
            direct("the camera", a, b, p, q),
            f"By their z it is {p:.1f} m to {a.colour} and {q:.1f} m to {b.colour}",
        )


def nearest(rng, view, a, b, c):
    to_a, to_b = hop(view, c, a), hop(view, c, b)
    p, q = to_a.worked, to_b.worked
    return versus(
        rng,
        c.text,
        a,
        b,
        p,
        q,
        direct(c.colour, a, b, p, q),
        f"{to_a.working}, {p:.1f} m in all. {to_b.working}, {q:.1f} m in all",
    )


def depth(rng, view, a):
    z, near = a.at[view][2], a.near[view][2]
    between = f"between {int(near)} and {int(near) + 1} m"
    ask = rng.choice(["What is the depth of", "How deep in the view is"])
    return fill(
        f"{ask} {a.text}, in metres?",
        z,
        near,
        f"The {a.thing.name} is {between} away. Its centre is about {z:.1f} m deep",
        f"The depth of {a.colour} is its z, {near}",
    )


def distance(rng, view, a, b):
    way, ask = hop(view, a, b), rng.choice(["How far is it", "What is the distance"])
    return fill(
        f"{ask} from {a.text} to {b.text}, in metres?",
        way.exact,
        way.worked,
        f"From {a.colour} it is about {way.worked:.1f} m to {b.colour}",
        f"{way.working}, {way.worked:.1f} m in all",
    )


def relation(rng, view, a, b):
    axis = int(rng.random() < 0.35)
    low, high = (("left of", "right of"), ("above", "below"))[axis]
    p, q = a.near[view][axis], b.near[view][axis]
    seen = a.at[view][axis] / a.at[view][2] - b.at[view][axis] / b.at[view][2]
    if abs(p - q) > 0.25 and seen * (p - q) > 0.02:  # the image has to say so, too
        answer, wrong = (low, high) if p < q else (high, low)
        way, end = hop(view, b, a), f"so {a.colour} is {answer} {b.colour}"
        return (
            f"{rng.choice(['Seen from', 'From'])} the camera, is {a.text} {low} or {high} {b.text}?",
            answer,
            wrong,
            f"{way.words}, {end}",
            f"{way.working}, {end}",
        )


def perspective(rng, view, a, b, c):
    """Standing at a, facing b, where is c? Asked where b lies along one axis of the camera, more or
    less: a tiny model compares words ("facing left, with farther on the right, nearer is to the
    left"), but never found the sign of a sum of products."""
    ahead, there = hop(view, a, b), hop(view, a, c)
    (fx, _, fz), (tx, _, tz) = ahead.steps, there.steps
    (gx, _, gz), (hx, _, hz) = b.thing.centre - a.thing.centre, c.thing.centre - a.thing.centre
    i, j, truth, low, high = fx, fz, gx * hx + gz * hz, "behind", "in front"
    if rng.random() < 0.5:
        i, j, truth, low, high = fz, -fx, gz * hx - gx * hz, "to the left", "to the right"
    total, size = i * tx + j * tz, math.hypot(fx, fz) * math.hypot(tx, tz)
    sideways, deep = ("left", "right")[tx > 0], ("nearer", "farther")[tz > 0]
    main, step, way = (i * tx, tx, sideways) if abs(i) > abs(j) else (j * tz, tz, deep)
    facing = ("left", "right")[fx > 0] if abs(fx) > abs(fz) else ("nearer", "farther")[fz > 0]
    axial = (
        min(abs(fx), abs(fz)) < 0.5 * max(abs(fx), abs(fz))
        and abs(step) > 0.25
        and main * total > 0
    )
    if axial and size > 0.3 and abs(total) > 0.3 * size and total * truth > 0:
        answer, wrong = (low, high) if total < 0 else (high, low)
        if answer == "in front" and rng.random() < 0.75:
            # a room has far more in front than behind
            return None
        right = {"farther": "right", "right": "nearer", "nearer": "left", "left": "farther"}[facing]
        turned = f", with {right} on the right" if low == "to the left" else ""
        stand, end = (
            rng.choice(["facing", "looking at"]),
            f"so facing {facing}{turned}, {way} is {answer}",
        )
        return (
            f"Standing at {a.text} and {stand} {b.text}, is {c.text} {low} or {high}?",
            answer,
            wrong,
            f"{ahead.words}. {there.words}, {end}",
            f"{ahead.working}. {there.working}, {end}",
        )


def two_view(rng, view, a, b):
    asked = (depth_order, relation)[rng.integers(2)](rng, view, a, b)
    return asked and (
        f"In the frame of the {('first', 'second')[view]} image: {asked[0]}",
        *asked[1:],
    )


FAMILIES = {
    depth_order: 2,
    depth: 1,
    distance: 2,
    nearest: 3,
    relation: 2,
    perspective: 3,
    two_view: 2,
}


def rows(seed, index, rng, cameras, marks):
    """Up to six families of a scene, a question each, written in both paths."""
    found = []
    for family in rng.permutation(list(FAMILIES)):
        views, several = [0, 1][: 1 + (family is two_view)], family is two_view
        view, picks = int(rng.choice(views)), permutations(marks, FAMILIES[family])
        picks = [pick for pick in picks if sorted({mark.view for mark in pick}) == views]
        asked = (family(rng, view, *picks[i]) for i in rng.permutation(len(picks))[:8])
        question, answer, wrong, *thoughts = next(filter(None, asked), [None] * 3)
        if not question or len(found) == 12:
            continue
        if wrong:
            a, b = sorted([answer, wrong])  # in a fixed order: see the docstring
            question, answer = f"{question} A. {a} B. {b}", "A" if answer == a else "B"
            thoughts = [f"{thought}, option {answer}" for thought in thoughts]
        said = sorted(
            (m for m in marks if m.text in question), key=lambda m: question.index(m.text)
        )
        files = [f"s{seed}-{index:06d}-{v}.png" for v in views]
        row = {
            "task": family.__name__,
            "question": question,
            "answer": answer,
            "frame": view if several else None,
            "images": [f"images/{file}" for file in files],
            "depths": [f"depth/{file}" for file in files],
            "intrinsics": [
                [c.focal, c.focal, (c.size[0] - 1) / 2, (c.size[1] - 1) / 2]
                for c in cameras[: len(views)]
            ],
            "regions": [(m.view, m.region) for m in said],
            "names": {m.mention: m.thing.name for m in said},
            "objects": {m.mention: dict(enumerate(m.at)) if several else m.at[0] for m in said},
            "sizes": {m.mention: (2 * m.thing.half).round(3).tolist() for m in said},
        }
        for path, thought in zip(("lor", "dtr"), thoughts, strict=True):
            name = f"s{seed}-{index:06d}-{row['task']}-{path}"
            found.append({"id": name, "path": path, **row, "rationale": f"{thought}."})
    return found


def chance(examples):
    """Task -> the score of its best constant answer: what a model earns that does not look."""
    counts = {}
    for e in examples:
        counts.setdefault(e.task, Counter())[e.answer] += 1
    return {
        task: max(
            sum(n * answer_score(guess, truth) for truth, n in count.items()) for guess in count
        )
        / count.total()
        for task, count in sorted(counts.items())
    }


@dataclass
class Config:
    out: Path  # folder to write: rows.jsonl, images/, depth/
    n: int = 4000  # scenes; each yields several questions
    seed: int = 0  # two seeds share no scene
    size: tuple[int, int] = (256, 192)  # width and height of the images in pixels
    ask: tuple[str, ...] = ()  # only these families of questions; empty: all of them
    # share of the scenes that are asked about on path lor, too; dtr asks about all
    lor: float = 1.0
    # processes; the set does not depend on their number
    workers: int = len(os.sched_getaffinity(0))


def make(config, index):
    """One scene on disk: images and depth; -> its rows as text."""
    rng, images, depths, cameras, marks = scene(config.seed, index, config.size)
    for view, (image, z) in enumerate(zip(images, depths, strict=True)):
        name = f"s{config.seed}-{index:06d}-{view}.png"
        image.save(config.out / "images" / name, compress_level=1)
        z = Image.fromarray((z * 1000).round().astype(np.uint16))
        z.save(config.out / "depth" / name, compress_level=1)
    asked = [
        row
        for row in rows(config.seed, index, rng, cameras, marks)
        if not config.ask or row["task"] in config.ask
    ]
    paths = ("lor", "dtr") if rng.random() < config.lor else ("dtr",)
    return "".join(json.dumps(row) + "\n" for row in asked if row["path"] in paths)


def main(config: Config):
    """Renders a set. rows.jsonl appears last: a set that was cut off has none."""
    families = {family.__name__ for family in FAMILIES}
    sound = {
        "--size": min(config.size) >= 32,
        "--seed": 0 <= config.seed < 2**32,
        "--workers": config.workers >= 1,
        "--n": config.n >= 1,
        "--ask": set(config.ask) <= families,
        "--lor": 0 <= config.lor <= 1,
    }
    if not all(sound.values()):
        wrong = " ".join(flag for flag in sound if not sound[flag])
        print(
            f"scenes: {wrong}: size >= 32, 0 <= seed < 2^32, workers >= 1, n >= 1, 0 <= lor <= 1 "
            f"and ask of {', '.join(sorted(families))}",
            file=sys.stderr,
        )
        sys.exit(2)
    for folder in ("images", "depth"):
        (config.out / folder).mkdir(parents=True, exist_ok=True)
    (config.out / "rows.jsonl").unlink(missing_ok=True)
    with Pool(config.workers) as pool, open(config.out / "rows.jsonl.part", "w") as file:
        made = pool.imap(partial(make, config), range(config.n), chunksize=8)
        file.writelines(tqdm(made, total=config.n, desc="scenes", unit="scene"))
    os.replace(config.out / "rows.jsonl.part", config.out / "rows.jsonl")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
