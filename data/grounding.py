"""Grounding: from a region to 3D (Omni3D, CA-1M), and from words to a 2D box (RefCOCO). All on path
direct.

Every good object of an image is asked for its centre, and for its box; and one question has up to
four of them, in random order. Answers are lines of the grammar, metres in the camera's frame (x
right, y down, z forward):
    <3d_box center="x,y,z">chair</3d_box>
    <3d_box center="x,y,z" size="w,h,l">chair</3d_box>
    <3d_box center="x,y,z">chair (region 1)</3d_box>
In both sets an object's own x is its length, y its height, z its width.

omni3d    the JSON files of Omni3D (.json or a folder of them; of a folder, *_val and *_test, of which
          SpatialRGPT-Bench and CV-Bench are made, are left out), images relative to @root. Objects
          are left out by the set's rules: behind the camera, not valid in 3D, without extent,
          truncated or hidden by a third and more, lower than a sixteenth of the image, without
          lidar or segmentation points, depth off; so are flagged images. The 2D box is the tight
          one, else the truncated or the projected one, cut off at the image
ca1m      captures of CA-1M, unpacked (`tar -xf`): VIDEO/TIME.wide/{image.png, image/K.json, instances.json},
          with the laser's depth (TIME.gt/depth.png) where it is, else the device's
refcoco   RefCOCO, + and g: .parquet files, or rows {"answer": [expressions], "bbox": [x, y, w, h] pixels,
          "file_name"} as .json or .jsonl with COCO's images in @root. The answer is
          <2d_box>x0,y0,x1,y1</2d_box> in pixels of the image, which the processor writes in the
          family's own convention"""

import json
import math
import os
import random
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from data.marks import Marked
from data.rows import (
    Bad,
    Notes,
    Row,
    broken,
    camera,
    depth_map,
    each,
    elements,
    estimated,
    files_of,
    set_name,
    size,
    training,
    typed,
)
from srreal import Example

FOUR, XYZ = tuple[float, float, float, float], tuple[float, float, float]
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
CA1M = 1024, 768  # width, height of its images
FLAGS = ("src_flagged", "src_90_rotate", "incomplete")
PICTURE = {"id": int, "width": int, "height": int, "file_path": str, "K": tuple[XYZ, XYZ, XYZ]}
INSTANCE = {"category": str, "position": XYZ, "scale": XYZ}
REFERENCE = {"answer": str | list[str], "bbox": FOUR}


def numbers(values) -> str:
    return ",".join(str(round(float(v), 2) + 0.0) for v in values)  # never -0.0


# ---- regions to 3D: objects are (name, centre, (w, h, l), 2D box in pixels)
def questions(
    file, number: int, key: str, image: str, depth, view: tuple, objects: list
) -> Iterator[Row]:
    """The Rows of one image: a centre and a box an object, and several centres at once. view: what
    the set says of the image, ((fx, fy, cx, cy), (width, height))."""
    asked = [
        (f"{key}/{k}/{what}", what, [thing])
        for k, thing in enumerate(objects)
        for what in ("center", "box")
    ]
    if len(objects) > 1:
        some = random.Random(key).sample(objects, min(4, len(objects)))
        asked.append((f"{key}/centers", "centers", some))
    for name, what, things in asked:
        yield Row(
            str(file),
            number,
            name,
            partial(ask, name, what, image, depth, view, things),
            (image, *([depth] if depth else [])),
        )


def ask(
    name: str, what: str, image: str, depth, view: tuple, things: list, sizes: dict
) -> list[Example]:
    shape = size(image, sizes)
    # then neither boxes nor camera are of this file
    if shape != view[1]:
        raise Bad("image", f"wrong size: the file has {shape}, the set says {view[1]}: {image}")
    mentions = [f"region {k + 1}" for k in range(len(things))]
    listed = ", ".join(f"{mention} <mask>" for mention in mentions)
    question = {
        "center": f"Where is the center of the object in {listed}? Give it in 3D, in metres.",
        "box": f"What are the 3D center and the size of the object in {listed}? Give both in metres.",
        "centers": f"Where are the centers of the objects in {listed}? Give a line each, in 3D, in metres.",
    }
    answer = []
    for mention, (category, centre, extent, _) in zip(mentions, things, strict=True):
        measures = f' size="{numbers(extent)}"' if what == "box" else ""
        label = f"{category} ({mention})" if what == "centers" else category
        answer.append(f'<3d_box center="{numbers(centre)}"{measures}>{label}</3d_box>')
    depth = depth_map(depth, shape, sizes)
    return [
        Example(
            name,
            "direct",
            [image],
            question[what],
            "\n".join(answer),
            [depth] if depth else None,
            [view[0]],
            [(0, clip(box, shape)) for *_, box in things],
            task=f"ground {what}",
            objects={
                mention: tuple(thing[1]) for mention, thing in zip(mentions, things, strict=True)
            },
            names={mention: thing[0] for mention, thing in zip(mentions, things, strict=True)},
            sizes={
                mention: tuple(thing[2]) for mention, thing in zip(mentions, things, strict=True)
            },
        )
    ]


def clip(box, shape: tuple[int, int]) -> tuple[float, ...]:
    """What bbox2D_trunc is to bbox2D_proj: the box, cut off at the image."""
    return tuple(min(max(v, 0), side) for v, side in zip(box, shape * 2, strict=True))


# ---- Omni3D
def omni3d_rows(path: Path, root: str | None) -> Iterator[Row]:
    notes = Notes()
    for file in files_of(path, (".json",), notes):
        try:
            yield from (
                replace(row, notes=notes) for row in omni3d_file(file, root or str(file.parent))
            )
        except ValueError as error:
            yield broken(file, 0, Bad("row", f"unreadable: {error}"))


def listed(
    file: Path, what: str, required: dict, optional: dict
) -> Iterator[tuple[int, dict | Row]]:
    """(number, entry, or the Row that says what is wrong with it) of a list in the file."""
    for number, entry in enumerate(elements(file, f"{what}.item"), 1):
        try:
            yield number, typed(entry, required, optional)
        except Bad as error:
            yield (
                number,
                broken(
                    file, number, Bad([(f"{what}: {name}", why) for name, why in error.args[0]])
                ),
            )


def omni3d_file(file: Path, base: str) -> Iterator[Row]:
    """Two passes, as images stand before or behind annotations; objects are kept as small tuples by
    image."""
    pictures: dict[int, tuple] = {}
    objects: dict[int, list] = {}
    for number, entry in listed(file, "images", PICTURE, dict.fromkeys(FLAGS, bool | int)):
        if isinstance(entry, Row):
            yield entry
        elif not any(entry.get(flag) for flag in FLAGS):
            pictures[entry["id"]] = number, entry
    if not pictures:
        yield broken(file, 0, Bad("images", "missing, or all flagged or bad: no Omni3D file?"))
    for _, entry in listed(file, "annotations", OBJECT, QUALITY):
        if isinstance(entry, Row):
            yield entry
        elif entry["image_id"] in pictures and not ignored(
            entry, pictures[entry["image_id"]][1]["height"]
        ):
            kept = (
                entry["category_name"],
                entry["center_cam"],
                tuple(entry["dimensions"]),
                box_of(entry),
            )
            objects.setdefault(entry["image_id"], []).append(kept)
    for number, picture in pictures.values():
        image, key = os.path.join(base, picture["file_path"]), f"{set_name(file)}/{picture['id']}"
        view = camera(picture["K"]), (picture["width"], picture["height"])
        found = objects.get(picture["id"], [])
        yield from questions(file, number, key, image, estimated(image), view, found)


def box_of(thing: dict) -> list:
    boxes = (thing.get(f"bbox2D_{kind}") for kind in ("tight", "trunc", "proj"))
    return next(box for box in boxes if box and -1 not in box or box is thing["bbox2D_proj"])


def ignored(thing: dict, height: int) -> bool:
    box = box_of(thing)
    return bool(
        thing.get("behind_camera")
        or not thing.get("valid3D", True)
        or min(thing["dimensions"]) <= 0
        or thing["center_cam"][2] <= 0
        or thing.get("lidar_pts") == 0
        or thing.get("segmentation_pts") == 0
        or thing.get("depth_error", 0) > 0.5
        or not height / 16 < box[3] - box[1] < 1.5 * height
        or thing.get("truncation", 0) >= 1 / 3
        or 0 <= thing.get("visibility", 1) <= 1 / 3
    )


# ---- CA-1M
def ca1m_rows(path: Path, root: str | None) -> Iterator[Row]:
    frames = [path.parent] if path.name == "instances.json" else sorted(path.rglob("*.wide"))
    if not frames:
        raise FileNotFoundError(
            f"{path}: no VIDEO/TIME.wide folders; unpack CA-1M's captures with tar -xf"
        )
    notes = Notes()
    for frame in training(path, frames, notes):
        yield from (replace(row, notes=notes) for row in ca1m_frame(frame))


def ca1m_frame(frame: Path) -> Iterator[Row]:
    file = frame / "instances.json"
    try:
        place = min((frame / "image").glob("[Kk].json"), default=frame / "image" / "K.json")
        matrix = json.loads(place.read_text())
        view = camera(np.reshape(matrix, (3, 3)).tolist()), stated_size(frame)
        listed = json.loads(file.read_text())
        things = [
            typed(thing, INSTANCE, {"box_2d_rend": FOUR, "box_2d_proj": FOUR}) for thing in listed
        ]
    except Bad as error:
        yield broken(file, 1, error)
        return
    except (OSError, ValueError, TypeError, AttributeError) as error:
        yield broken(file, 1, Bad("row", f"unreadable: {error}"))
        return
    objects = []
    for number, thing in enumerate(things, 1):
        box = thing.get("box_2d_rend") or thing.get("box_2d_proj")
        # pixels
        if box and max(abs(a - b) for a, b in zip(box, clip(box, view[1]), strict=True)) > 2:
            yield broken(file, number, Bad("box_2d", f"outside its image: {box}, of {view[1]}"))
        elif box and min(thing["scale"]) > 0:
            objects.append((thing["category"], thing["position"], tuple(thing["scale"][::-1]), box))
    places = (frame.with_suffix(".gt") / "depth.png", frame / "depth.png")
    depth = next(
        (str(place) for place in places if place.is_file()), estimated(str(frame / "image.png"))
    )
    key = f"{frame.parent.name}/{frame.stem}"
    yield from questions(file, 1, key, str(frame / "image.png"), depth, view, objects)


def stated_size(frame: Path) -> tuple[int, int]:
    """(width, height) for which K and boxes hold: TIME._wide/image/size.json, or what all of the
    set have."""
    places = (frame.with_suffix("._wide"), frame)
    found = next((f for place in places for f in sorted(place.glob("image/size*"))), None)
    width, height = json.loads(found.read_text()) if found else CA1M
    return int(width), int(height)


# ---- RefCOCO
def refcoco_rows(path: Path, root: str | None) -> Iterator[Row]:
    notes, build = Notes(), partial(reference, root)
    held = path.suffix == ".parquet" or path.is_dir() and any(path.rglob("*.parquet"))
    suffixes = (".parquet",) if held else (".json", ".jsonl")
    try:
        found = files_of(path, suffixes, notes)
    except FileNotFoundError:  # the hub's copy has no other splits
        found = files_of(path, suffixes)
        notes.update(f"read of {file.name}: others evaluate on this split" for file in found)
    for file in found:
        rows = parquet_rows(file, build) if held else each(file, suffixes, build)
        yield from (replace(row, notes=notes) for row in rows)


def parquet_rows(file: Path, build) -> Iterator[Row]:
    for number, row in enumerate(parquet(file), 1):
        try:
            yield from [row] if isinstance(row, Row) else build(file, number, row)
        except Bad as error:
            yield broken(file, number, error)


def parquet(file: Path) -> Iterator[dict | Row]:
    """Its rows, or the Row that says why they cannot be read."""
    import pyarrow.parquet  # only such files need it

    try:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(64):
            yield from batch.to_pylist()
    except (ValueError, OSError) as error:  # of which are pyarrow's own
        yield broken(file, 0, Bad("row", f"unreadable: {error}"))


def reference(root: str | None, file: Path, number: int, row: dict) -> Iterator[Row]:
    """A Row an expression."""
    row = typed(row, REFERENCE, {"file_name": str, "image": str | dict, "question_id": str | int})
    source = row.get("image") or row.get("file_name")
    if isinstance(source, dict):  # a parquet's: {"bytes", "path"}
        source = source.get("bytes") or source.get("path")
    if not isinstance(source, str | bytes):
        raise Bad("image", "missing")
    source = os.path.join(root or str(file.parent), source) if isinstance(source, str) else source
    depth = estimated(source) if isinstance(source, str) else None
    files = tuple(filter(None, (source, depth))) if isinstance(source, str) else ()
    for k, words in enumerate([row["answer"]] if isinstance(row["answer"], str) else row["answer"]):
        name = f"{set_name(file)}/{row.get('question_id', '')}#{number}/{k}"
        yield Row(
            str(file), number, name, partial(locate, name, source, depth, words, row["bbox"]), files
        )


def locate(name: str, source, depth: str | None, words: str, box, sizes: dict) -> list[Example]:
    image = Marked(source) if isinstance(source, bytes) else source
    try:
        shape = image.size if isinstance(source, bytes) else size(source, sizes)
    except OSError as error:
        raise Bad("image", f"corrupt file: {error}") from error
    x0, y0, w, h = box
    corners = x0, y0, x0 + w, y0 + h
    if not (all(map(math.isfinite, corners)) and w > 0 and h > 0):
        raise Bad("bbox", f"empty: {box}")
    if max(corners) <= 1 < min(shape):
        raise Bad("bbox", f"in fractions of the image, not pixels?: {box}")
    if min(corners) < 0 or corners[2] > shape[0] + 1 or corners[3] > shape[1] + 1:
        raise Bad("bbox", f"outside its image: {box} as x y w h, of {shape}")
    answer = f"<2d_box>{','.join(f'{v:.2f}' for v in clip(corners, shape))}</2d_box>"
    question = f"Locate {words.strip()} and give its 2D box."
    return [
        Example(
            name,
            "direct",
            [image],
            question,
            answer,
            depth and [depth_map(depth, shape, sizes)],
            task="refcoco",
        )
    ]
