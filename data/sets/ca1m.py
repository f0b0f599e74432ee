"""CA-1M (kind `ca1m`): captures as unpacked (`tar -xf`).

VIDEO/TIME.wide/{image.png, image/K.json, instances.json}, with the laser's depth
(TIME.gt/depth.png) where it is, else the device's. Of a folder, captures named *-val-* are left
out. Questions: grounding.py."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from data.folders import LEFTOVER
from data.rows import (
    Bad,
    MissingFile,
    Notes,
    Row,
    broken,
    camera,
    estimated,
    look_below,
    matches,
    training,
    typed,
)
from data.sets.grounding import XYZ, Thing, View, questions
from data.sets.regions import FOUR, clip

SIZE = 1024, 768  # width, height of the set's images, where no file says it
REQUIRED = {"category": str, "position": XYZ, "scale": XYZ}
OPTIONAL = {"box_2d_rend": FOUR, "box_2d_proj": FOUR}


# ---- Rows


def ca1m_rows(path: Path, root: str | None) -> Iterator[Row]:
    """Yield the Rows of every frame in a folder, or of one instances.json."""
    # World files (VIDEO/world.gt) end otherwise: their boxes are in no camera's frame.
    frames = [path.parent]
    if path.name != "instances.json":
        frames = list(look_below(path).folders_like("*.wide"))
    if not frames:
        raise MissingFile(
            f"{path}: no VIDEO/TIME.wide folders; unpack CA-1M's captures with tar -xf"
        )
    notes = Notes()
    for frame in training(path, frames, notes):
        file = frame / "instances.json"
        try:
            for row in rows_of_frame(frame, file, notes):
                yield replace(row, notes=notes)
        except Bad as error:
            yield replace(broken(file, 1, error), notes=notes)


def rows_of_frame(frame: Path, file: Path, notes: Notes) -> Iterator[Row]:
    view = view_of(frame)
    listed = read_json(file)
    if not isinstance(listed, list):
        raise Bad("row", f"unreadable: {file}: no list")
    instances = [typed(instance, REQUIRED, OPTIONAL) for instance in listed]
    things = []
    for number, instance in enumerate(instances, 1):
        # What is rendered is what can be seen; the projection also has what is hidden.
        box = instance.get("box_2d_rend") or instance.get("box_2d_proj")
        if not box:
            notes.add("objects left out: without a 2D box")
            continue
        over = [abs(a - b) for a, b in zip(box, clip(box, view.shape), strict=True)]
        # Up to two pixels are rounding.
        if max(over) > 2:
            outside = Bad("box_2d", f"outside its image: {box}, of {view.shape}")
            yield broken(file, number, outside)
        # As in Omni3D: flat ones, and those that the camera stands in or has passed.
        elif min(instance["scale"]) <= 0 or instance["position"][2] <= 0:
            notes.add("objects left out: flat, or with their centre behind the camera")
        else:
            things.append(thing_of(instance, box))
    yield from questions(file, 1, view, things)


def thing_of(instance: dict, box: list) -> Thing:
    # An object's own x, y, z are its length, height, width.
    length, height, width = instance["scale"]
    return Thing(
        instance["category"], tuple(instance["position"]), (width, height, length), tuple(box)
    )


# ---- What lies beside the instances


def view_of(frame: Path) -> View:
    image = str(frame / "image.png")
    # The last that is there counts: the laser's map is the better one.
    depth = estimated(image)
    for place in (frame / "depth.png", frame.with_suffix(".gt") / "depth.png"):
        if place.is_file():
            depth = str(place)
    return View(
        key=f"{frame.parent.name}/{frame.stem}",
        image=image,
        depth=depth,
        intrinsics=camera(camera_matrix(frame)),
        shape=stated_size(frame),
    )


def camera_matrix(frame: Path) -> list:
    """Return the 3x3 matrix of K.json, or of k.json, as webdataset writes it."""
    # min: K before k where a file system tells them apart and has both.
    file = min((frame / "image").glob("[Kk].json"), default=frame / "image" / "K.json")
    matrix = read_json(file)
    if matches(matrix, list[float]) and len(matrix) == 9:
        matrix = [matrix[:3], matrix[3:6], matrix[6:]]
    if not matches(matrix, tuple[XYZ, XYZ, XYZ]):
        raise Bad("row", f"unreadable: {file}: no matrix of 3 x 3: {matrix!r:.60}")
    return matrix


def stated_size(frame: Path) -> tuple[int, int]:
    """Return (width, height) for which camera and boxes hold.

    It stands in TIME._wide/image/size.json; else it is what all images of the set have.
    """
    # `size`, with or without an ending.
    for place in (frame.with_suffix("._wide"), frame):
        named = [file for file in place.glob("image/size*") if not LEFTOVER.fullmatch(file.name)]
        for file in sorted(named):
            size = read_json(file)
            if not matches(size, tuple[float, float]):
                raise Bad("row", f"unreadable: {file}: no [width, height]: {size!r:.60}")
            return int(size[0]), int(size[1])
    return SIZE


def read_json(file: Path):
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise Bad("row", f"unreadable: {error}") from error
