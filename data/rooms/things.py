"""What stands in a room: kinds of things, each a union of boxes and solids of revolution.

World: metres, x right, y down (the floor is y = 0), z into the room.
"""

from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import numpy as np

# Paints are far from the colours of the marks.
HEX = "e4dac6 966c4c 74747a 484850 649498 9a78a0 d8a4a8 e0ac86 687896 be966c"
PAINTS = np.array([list(bytes.fromhex(paint)) for paint in HEX.split()], np.float32)
# The corners of the unit cube [-1, 1]^3, (3, 8).
CORNERS = np.mgrid[-1:2:2, -1:2:2, -1:2:2].reshape(3, 8)

# A part fills its box, [-1, 1]^3: all of it (None), or x^2 + z^2 <= a + b y + c y^2 for a profile
# (a, b, c).
BOX = None
BALL = (1, 0, -1)
ROD = (1, 0, 0)
CONE = (0.28, 0.5, 0.22)
SHADE = (0.64, 0.32, 0.04)
BULGE = (0.9, 0.1, -0.6)


class Part(NamedTuple):
    """A part of a thing; places and sizes in half sizes of the thing."""

    profile: tuple | None
    centre: tuple = (0, 0, 0)
    half: tuple = (1, 1, 1)
    paint: int = 0  # index into the thing's paints; 0 may be patterned


class Kind(NamedTuple):
    smallest: tuple  # (w, h, l) in metres
    largest: tuple
    parts: list[Part]


@dataclass(frozen=True)
class Thing:
    """A thing in the world: its box, and its looks."""

    name: str
    centre: np.ndarray  # (3,)
    half: np.ndarray  # (3,)
    yaw: float
    paints: np.ndarray  # (3, 3): two of the parts, and the pattern's
    pattern: np.ndarray  # (3, 1): the axes along which paint 0 changes


def feet(top: float) -> list[Part]:
    """Return four legs from a height to the floor."""
    half = (0.1, 1 - top, 0.1)
    corners = product((-0.85, 0.85), repeat=2)
    return [Part(BOX, (x, top, z), half, paint=1) for x, z in corners]


TABLE = [
    Part(BOX, (0, -0.9, 0), (1, 0.1, 1)),
    *feet(0.1),
    # A shelf, or one would see through its centre.
    Part(BOX, half=(0.85, 0.04, 0.85), paint=1),
]
CHAIR = [
    Part(BOX, half=(1, 0.08, 1)),
    Part(BOX, (0, -0.5, 0.9), (0.97, 0.5, 0.07)),
    *feet(0.5),
]
LAMP = [
    Part(SHADE, (0, -0.7, 0), (1, 0.3, 1)),
    Part(ROD, (0, 0.2, 0), (0.1, 0.8, 0.1), 1),
    Part(ROD, (0, 0.96, 0), (0.7, 0.04, 0.7), 1),
]
DOORS = Part(BOX, half=(0.88, 0.9, 1.03), paint=1)
KINDS = {
    "box": Kind(
        smallest=(0.4, 0.3, 0.4),
        largest=(0.8, 0.8, 0.8),
        parts=[Part(BOX)],
    ),
    "ball": Kind(
        smallest=(0.3, 0.3, 0.3),
        largest=(0.6, 0.6, 0.6),
        parts=[Part(BALL)],
    ),
    "vase": Kind(
        smallest=(0.25, 0.3, 0.25),
        largest=(0.35, 0.5, 0.35),
        parts=[Part(BULGE)],
    ),
    "barrel": Kind(
        smallest=(0.4, 0.5, 0.4),
        largest=(0.6, 1.1, 0.6),
        parts=[Part(ROD)],
    ),
    "cone": Kind(
        smallest=(0.4, 0.5, 0.4),
        largest=(0.7, 1.1, 0.7),
        parts=[Part(CONE)],
    ),
    "cabinet": Kind(
        smallest=(0.6, 0.9, 0.4),
        largest=(1, 1.6, 0.6),
        parts=[Part(BOX), DOORS],
    ),
    "table": Kind(
        smallest=(0.8, 0.5, 0.7),
        largest=(1.4, 0.8, 1),
        parts=TABLE,
    ),
    "chair": Kind(
        smallest=(0.4, 0.8, 0.4),
        largest=(0.6, 1.1, 0.6),
        parts=CHAIR,
    ),
    "lamp": Kind(
        smallest=(0.4, 1.1, 0.4),
        largest=(0.6, 1.7, 0.6),
        parts=LAMP,
    ),
}
