"""From a region to 3D: the questions about the objects of an image in Omni3D and CA-1M.

Every object is asked for its centre, and for its box; and one question has up to four of them, in
random order. All on path direct; answers are lines of the grammar, metres in the camera's frame (x
right, y down, z forward), and data/boxes.py reads them:
    <3d_box center="x,y,z">chair</3d_box>
    <3d_box center="x,y,z" size="w,h,l">chair</3d_box>
    <3d_box center="x,y,z">chair (region 1)</3d_box>
In both sets an object's own x is its length, y its height, z its width."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from data.rows import Bad, Headers, Row, depth_map, size
from data.sets.regions import clip
from srreal import Example, write_metres

XYZ = tuple[float, float, float]
QUESTIONS = {
    "center": "Where is the center of the object in {regions}? Give it in 3D, in metres.",
    "box": "What are the 3D center and the size of the object in {regions}? Give both in metres.",
    "centers": "Where are the centers of the objects in {regions}? "
    "Give a line each, in 3D, in metres.",
}


# ---- What a set says of an image


@dataclass(frozen=True)
class Thing:
    """An object of an image."""

    name: str
    centre: tuple  # (x, y, z) metres, camera frame
    size: tuple  # (w, h, l) metres
    box: tuple  # (x0, y0, x1, y1) pixels


@dataclass(frozen=True)
class View:
    """An image as the set describes it."""

    key: str
    image: str
    depth: str | None  # a file
    intrinsics: tuple  # (fx, fy, cx, cy)
    shape: tuple[int, int]  # (width, height), which camera and boxes are for


# ---- What is asked


def questions(file: Path, number: int, view: View, things: list[Thing]) -> Iterator[Row]:
    """Yield the Rows of one image: a centre and a box an object, and several centres at once."""
    # (key, what is asked for, the objects that it is about)
    asked = []
    for k, thing in enumerate(things):
        asked.append((f"{view.key}/{k}/center", "center", [thing]))
        asked.append((f"{view.key}/{k}/box", "box", [thing]))
    if len(things) > 1:
        # Drawn by the image's own key, so that no other image or set changes the question.
        some = random.Random(view.key).sample(things, min(4, len(things)))
        asked.append((f"{view.key}/centers", "centers", some))
    files = (view.image, view.depth) if view.depth else (view.image,)
    for key, what, some in asked:
        yield Row(str(file), number, key, partial(ask, key, what, view, some), files)


def ask(key: str, what: str, view: View, things: list[Thing], headers: Headers) -> list[Example]:
    """Return the Example of a question."""
    shape = size(view.image, headers)
    # Of another size, neither boxes nor camera are of this file.
    if shape != view.shape:
        stated = f"the file has {shape}, the set says {view.shape}"
        raise Bad("image", f"wrong size: {stated}: {view.image}")
    # Objects have no marks here: the question counts its regions.
    by_mention = {f"region {k}": thing for k, thing in enumerate(things, 1)}
    regions = ", ".join(f"{mention} <mask>" for mention in by_mention)
    answer = [line(what, mention, thing) for mention, thing in by_mention.items()]
    # The laser's map is coarser than its image; it is read at the image's size.
    depth = depth_map(view.depth, shape, headers)
    return [
        Example(
            key,
            "direct",
            [view.image],
            QUESTIONS[what].format(regions=regions),
            "\n".join(answer),
            depths=[depth] if depth else None,
            intrinsics=[view.intrinsics],
            regions=[(0, clip(thing.box, shape)) for thing in things],
            task=f"ground {what}",
            objects={mention: thing.centre for mention, thing in by_mention.items()},
            names={mention: thing.name for mention, thing in by_mention.items()},
            sizes={mention: thing.size for mention, thing in by_mention.items()},
        )
    ]


def line(what: str, mention: str, thing: Thing) -> str:
    """Write what the answer says of one object."""
    measures = f' size="{numbers(thing.size)}"' if what == "box" else ""
    label = f"{thing.name} ({mention})" if what == "centers" else thing.name
    return f'<3d_box center="{numbers(thing.centre)}"{measures}>{label}</3d_box>'


def numbers(values) -> str:
    # As a DTR target has them, so that both teach one form.
    return write_metres([float(v) for v in values])
