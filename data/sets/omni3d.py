"""Omni3D (kind `omni3d`): its JSON files, .json or a folder of them, images relative to @root.

Of a folder, *_val and *_test, of which SpatialRGPT-Bench and CV-Bench are made, are left out.
Objects are left out by the set's rules: behind the camera, not valid in 3D, without extent,
truncated or hidden by a third and more, lower than a sixteenth of the image, without lidar or
segmentation points, depth off; so are flagged images. All that is left out is counted. Images with
src_90_rotate are upright: the set's makers turned them, with their cameras and boxes. The 2D box is
the tight one, else the truncated or the projected one, cut off at the image. Questions:
grounding.py."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from data.rows import (
    Bad,
    Notes,
    Row,
    broken,
    camera,
    elements,
    estimated,
    files_of,
    set_name,
    typed,
)
from data.sets.grounding import XYZ, Thing, View, questions
from data.sets.regions import FOUR

PICTURE = {"id": int, "width": int, "height": int, "file_path": str, "K": tuple[XYZ, XYZ, XYZ]}
FLAGS = {"src_flagged": bool | int, "incomplete": bool | int}
OBJECT = {
    "image_id": int,
    "category_name": str,
    "center_cam": XYZ,
    "dimensions": XYZ,
    "bbox2D_proj": FOUR,
}
QUALITY = {
    "bbox2D_tight": FOUR,
    "bbox2D_trunc": FOUR,
    "behind_camera": bool | int,
    "valid3D": bool | int,
    "visibility": float,
    "truncation": float,
    "lidar_pts": float,
    "segmentation_pts": float,
    "depth_error": float,
}


# ---- Rows


def omni3d_rows(path: Path, root: str | None) -> Iterator[Row]:
    """Yield the Rows of every image of the files that a path stands for. root: of the images."""
    notes = Notes()
    for file in files_of(path, (".json",), notes):
        try:
            for row in rows_of_file(file, root or str(file.parent), notes):
                yield replace(row, notes=notes)
        except Bad as error:
            yield broken(file, 0, error)


def rows_of_file(file: Path, base: str, notes: Notes) -> Iterator[Row]:
    """Yield the Rows of a file, in two passes, as images stand before or behind annotations.

    Annotations are many GB: of an object only a small Thing is kept, by image.
    """
    # image id -> (number of its entry, for error messages; the entry)
    pictures: dict[int, tuple] = {}
    for number, entry in entries(file, "images", PICTURE, FLAGS):
        if isinstance(entry, Row):
            yield entry
        elif any(entry.get(flag) for flag in FLAGS):
            notes.add("images left out: flagged or incomplete")
        else:
            pictures[entry["id"]] = number, entry
    if not pictures:
        yield broken(file, 0, Bad("images", "missing, or all flagged or bad: no Omni3D file?"))
    things: dict[int, list[Thing]] = {}
    for _, entry in entries(file, "annotations", OBJECT, QUALITY):
        if isinstance(entry, Row):
            yield entry
            continue
        # An object of a flagged image has no picture here.
        _, picture = pictures.get(entry["image_id"], (0, None))
        if picture is None:
            notes.add("objects left out: of images that are left out or missing")
        elif ignored(entry, picture["height"]):
            notes.add("objects left out: by the rules of the set's own evaluation")
        else:
            things.setdefault(picture["id"], []).append(thing_of(entry))
    for number, picture in pictures.values():
        view = view_of(picture, f"{set_name(file)}/{picture['id']}", base)
        yield from questions(file, number, view, things.get(picture["id"], []))


def entries(
    file: Path, what: str, required: dict, optional: dict
) -> Iterator[tuple[int, dict | Row]]:
    """Yield (number, entry, or the Row that says what is wrong with it) of a list in the file."""
    # Files without a list of that name have no entries: rows_of_file says so.
    for number, entry in enumerate(listed(file, what), 1):
        try:
            yield number, typed(entry, required, optional)
        except Bad as error:
            reasons = [(f"{what}: {name}", why) for name, why in error.args[0]]
            yield number, broken(file, number, Bad(reasons))


def listed(file: Path, what: str) -> Iterator:
    try:
        yield from elements(file, f"{what}.item")
    except ValueError as error:  # behind a tear nothing can be told apart
        raise Bad("row", f"unreadable: {error}") from error


# ---- Entries


def view_of(picture: dict, key: str, base: str) -> View:
    image = os.path.join(base, picture["file_path"])
    shape = picture["width"], picture["height"]
    return View(key, image, estimated(image), camera(picture["K"]), shape)


def thing_of(entry: dict) -> Thing:
    # `dimensions` is (w, h, l), though the object's own x is its length and z its width.
    return Thing(
        name=entry["category_name"],
        centre=tuple(entry["center_cam"]),
        size=tuple(entry["dimensions"]),
        box=tuple(box_of(entry)),
    )


def box_of(entry: dict) -> list:
    """Return the tight 2D box, else the truncated one, else the projected one; -1 is unknown."""
    # The tight box is that of the object's pixels, the projected one that of its whole 3D box.
    for kind in ("tight", "trunc"):
        box = entry.get(f"bbox2D_{kind}")
        if box and -1 not in box:
            return box
    return entry["bbox2D_proj"]


def ignored(entry: dict, height: int) -> bool:
    """Say whether the set's own evaluation ignores an object in an image of that height."""
    # As Omni3D's own evaluation has them (cubercnn/evaluation), but for its limit of depth.
    box = box_of(entry)
    rules = [
        entry.get("behind_camera"),
        not entry.get("valid3D", True),
        min(entry["dimensions"]) <= 0,
        entry["center_cam"][2] <= 0,
        # -1 is unknown here, and a visibility below 0, too.
        entry.get("lidar_pts") == 0,
        entry.get("segmentation_pts") == 0,
        entry.get("depth_error", 0) > 0.5,
        not height / 16 < box[3] - box[1] < 1.5 * height,
        entry.get("truncation", 0) >= 1 / 3,
        0 <= entry.get("visibility", 1) <= 1 / 3,
    ]
    return any(rules)
