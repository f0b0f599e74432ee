"""What stands in a room. World: metres, x right, y down (the floor is y = 0), z into the room.

things.toml has the kinds of things; to add one takes no code.
"""

import tomllib
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path

import numpy as np

# Paints are far from the colours of the marks.
HEX = (
    "e4dac6",
    "966c4c",
    "74747a",
    "484850",
    "649498",
    "9a78a0",
    "d8a4a8",
    "e0ac86",
    "687896",
    "be966c",
)
HEX_LOFT = (
    "f2efe9",
    "5b4636",
    "8f9a8c",
    "2f3a40",
    "c3b091",
    "7a5a68",
    "b7c4cf",
    "a4866a",
    "50606a",
    "d9cbb8",
)
PAINTS = np.array([list(bytes.fromhex(paint)) for paint in HEX], np.float32)
# The corners of the unit cube [-1, 1]^3, (3, 8).
CORNERS = np.mgrid[-1:2:2, -1:2:2, -1:2:2].reshape(3, 8)

# A part of a thing: its profile (a, b, c), () for a box; its centre and half size, in half sizes of
# the thing; and which of the thing's paints it has. Paint 0 may be patterned.
Part = namedtuple("Part", "profile centre half paint", defaults=((0, 0, 0), (1, 1, 1), 0))

# A kind of thing: the smallest and the largest (w, h, l) in metres, and its parts.
Kind = namedtuple("Kind", "smallest largest parts")

# A thing in the world: the name of its kind; centre (3,), half size (3,) and yaw of its box; its
# paints (3, 3), two for its parts and one for its pattern; the axes (3, 1) along which the pattern
# changes.
Thing = namedtuple("Thing", "name centre half yaw paints pattern")


def read_kinds(file):
    """Return name -> Kind of a .toml file."""
    table = tomllib.loads(file.read_text())
    kinds = {}
    for name, kind in table["kinds"].items():
        parts = []
        for part in kind["parts"]:
            # The file names a profile, as several parts share one; its centre, half size and paint
            # may be left to Part's defaults.
            profile = table["profiles"][part["profile"]]
            fields = part | {"profile": tuple(profile)}
            parts.append(Part(**fields))
        kinds[name] = Kind(kind["smallest"], kind["largest"], parts)
    return kinds


KINDS = read_kinds(Path(__file__).with_name("things.toml"))


@dataclass(frozen=True)
class Style:
    """How rooms look, and from where they are seen. Names and questions are those of every style.

    paints: (10, 3), 0..255. patterns: along which axes a thing's paint changes. eye: the lowest and
    the highest y of the first camera in metres. focal: its focal length, in widths of the image.
    """

    kinds: dict[str, Kind]
    paints: np.ndarray
    patterns: tuple[tuple[int, int, int], ...]
    eye: tuple[float, float]
    focal: tuple[float, float]


STYLES = {
    # A field of view of 51 to 67 degrees.
    "house": Style(
        kinds=KINDS,
        paints=PAINTS,
        patterns=((0, 0, 0), (0, 1, 0), (1, 1, 1)),
        eye=(-1.9, -1.2),
        focal=(0.75, 1.05),
    ),
    # What no model has seen that was trained on houses: other shapes and sizes, other paints and
    # patterns, a camera that stands higher, and a field of view of 71 to 84 degrees.
    "loft": Style(
        kinds=read_kinds(Path(__file__).with_name("things_loft.toml")),
        paints=np.array([list(bytes.fromhex(paint)) for paint in HEX_LOFT], np.float32),
        patterns=((1, 0, 0), (1, 0, 1), (0, 1, 1)),
        eye=(-2.3, -2.0),
        focal=(0.55, 0.7),
    ),
}
