"""LLaVA's JSON: general questions and captions (kind `llava`), and SR-REAL's own rows (kind
`srreal`).

Both are .json (one array, of any size) or .jsonl: {"id", "image": "a.jpg" or ["a.jpg", ...],
"conversations": [{"from": "human", "value"}, {"from": "gpt", "value"}, ...], ...}, images relative
to the file's folder or to @root.

llava     every turn is an Example on path direct, without the turns before it. The k-th <mask> of the whole
          conversation is region k of `bbox` (pixels x0 y0 x1 y1), else of `rle` or `segmentation`
          (polygons); of several images, as in srreal's `bbox` and `mask_idx`.
srreal    one question, on path dtr if the row has `3d_pos` or its answer a <detect> block, else on lor.
    conversations   the question, raw or in the official template; the answer, or <detect> <think> <answer>
    cot             the text of <think>, where the answer has none
    red_bbox ...    marks in 1/1000 of the image, drawn as the official code does (disc of 20 pixels, stroke
                    of 5); bbox_img_idx or point_img_idx: their views, in the order that `type`, the
                    SPAR task, tells; of no such task, the `current_frame` in `3d_pos`
    bbox, mask_idx  regions in pixels: a list, or of several images {image: list} with the place of
    the k-th
                    <mask>, {k: [image, index]} (without: in the order of the images); else rle or
                    segmentation, as in llava. Without <mask>s the marks are the regions
    image_hw        [height, width] of the first image; depth: one 16-bit PNG an image
    3d_pos          {"red_bbox": {"center_cam": [x, y, z], "label"}}, metres; several views:
                    {"all_frame_3d": {"0": {"center_cam"}, ...}, "current_frame_3d": {"label"}}
    main_frame_idx  the view that a rationale speaks of. Without a rationale any will do, but in a
    question
                    about the "first image"
Departures: marks and boxes must lie on the same place, or the row is bad; names are the response's,
else the labels."""

import os
import re
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path

from data.rows import (
    REGIONS,
    Bad,
    Notes,
    Row,
    depth_map,
    each,
    estimated,
    set_name,
    size,
    turns,
    typed,
)
from data.spar import FIRST, MARKS, insert_masks, marked, marks_of
from srreal import Example, parse

BOX = tuple[float, float, float, float]
REQUIRED = {"conversations": list[dict[str, str]], "image": str | list[str]}
RLE = list[dict[str, list[int] | str]]
OPTIONAL = {
    "id": str | int,
    "bbox": list[BOX] | dict[str, list[BOX]],
    "rle": RLE,
    "segmentation": list[list[list[float]]],
    "image_hw": tuple[int, int],
    "depth": str | list[str],
    "mask_idx": int | dict[str, tuple[int, int]],
}
SRREAL = (
    OPTIONAL
    | MARKS
    | {
        "type": str,
        "cot": str,
        "3d_pos": dict,
        "main_frame_idx": int | str,
        "bbox_img_idx": list[list[int]],
        "point_img_idx": list[list[int]],
    }
)
# official prompts: before the raw question
TEMPLATE = re.compile(r"^.*</answer>.*?\bQuestion:\s*", re.S)


def images_of(row: dict, base: str) -> tuple[list[str], Callable]:
    """Paths of the images; and what looks for their depth maps (None: there is none), once the row
    is taken: looking at a network's disk takes longer than reading the row. It returns (images,
    depth maps, estimated ones where the row names none that is there)."""
    listed = (row.get(name, ()) for name in ("image", "depth"))
    images, depths = (
        [os.path.join(base, file) for file in ([files] if isinstance(files, str) else files)]
        for files in listed
    )
    if not images:
        raise Bad("image", "no image")
    if len(depths or images) != len(images):
        raise Bad("depth", f"wrong count: {len(depths)} for {len(images)} images")
    named = depths or [None] * len(images)
    return images, lru_cache(1)(
        lambda: (
            images,
            [
                found if found and os.path.isfile(found) else estimated(image) or found
                for found, image in zip(named, images, strict=True)
            ],
        )
    )


# ---- llava
def llava_rows(path: Path, root: str | None) -> Iterator[Row]:
    yield from each(path, (".json", ".jsonl"), partial(conversation, root))


def conversation(root: str | None, file: Path, number: int, row: dict) -> Iterator[Row]:
    row = typed(row, REQUIRED, OPTIONAL)
    images, look = images_of(row, root or str(file.parent))
    yield from split(file, number, row, len(images), look)


def files_of_row(look: Callable) -> tuple:
    return tuple(file for files in look() for file in files if file)


def kind_of(row: dict) -> str:
    return next((kind for kind in REGIONS if row.get(kind)), "bbox")


def split(
    file: Path, number: int, row: dict, views: int, look: Callable, path=None, make=None
) -> Iterator[Row]:
    """A Row a turn, whose id ends in /k where there are several; each with its share of the
    regions."""
    said, done, kind = turns(row), 0, kind_of(row)
    given, count = placed(row, kind, views), sum(question.count("<mask>") for question, _ in said)
    if count != len(given):
        raise Bad(kind, f"<mask> count: {count} for {len(given)} regions")
    for k, (question, answer) in enumerate(said):
        own = given[done : done + question.count("<mask>")]
        done += len(own)
        name = f"{set_name(file)}/{row.get('id', '')}#{number}" + (f"/{k}" if len(said) > 1 else "")
        work = partial(make or direct, name, look, question, answer, kind, own)
        yield Row(str(file), number, name, work, partial(files_of_row, look), path)


def direct(name, look, question, answer, kind, given, sizes: dict) -> list[Example]:
    images, depths = look()
    shapes = [size(image, sizes) for image in images]
    depths = [depth_map(depth, shape, sizes) for depth, shape in zip(depths, shapes, strict=True)]
    return [
        Example(
            name,
            "direct",
            images,
            question,
            answer,
            depths if any(depths) else None,
            regions=[(view, REGIONS[kind](region, shapes[view])) for view, region in given],
        )
    ]


def placed(row: dict, kind: str, views: int) -> list[tuple]:
    """(image, region) of the k-th <mask>. Of several images the row has to say which: no list
    does."""
    given = row.get(kind) or []
    if isinstance(given, list) and given and views > 1:
        raise Bad(
            kind, f"in which of {views} images? Of several, {{image: list}} and mask_idx say it"
        )
    given, order = given if isinstance(given, dict) else {"0": given}, row.get("mask_idx")
    if lost := [view for view in given if not (view.isdecimal() and int(view) < views)]:
        raise Bad(kind, f"no such image: {lost[0]} of {views}")
    regions = {
        (int(view), k): region for view, part in given.items() for k, region in enumerate(part)
    }
    if not isinstance(order, dict):
        return [(view, regions[view, k]) for view, k in sorted(regions)]
    if not all(k.isdecimal() for k in order):
        raise Bad(
            "mask_idx",
            f"wrong type or value: {order!r:.50} not {{place of a <mask>: [image, index]}}",
        )
    places = [tuple(order[k]) for k in sorted(order, key=int)]
    if lost := [place for place in places if place not in regions]:
        raise Bad("mask_idx", f"no such region: {list(lost[0])} of {kind}")
    return [(place[0], regions[place]) for place in places]


# ---- srreal
def srreal_rows(path: Path, root: str | None) -> Iterator[Row]:
    yield from each(path, (".json", ".jsonl"), partial(srreal_row, root, Notes()))


def srreal_row(root: str | None, notes: Notes, file: Path, number: int, row: dict) -> Iterator[Row]:
    # a sample of a WebDataset: key.json and key.jpg
    if row.get("image") is None:
        beside = (file.with_suffix(suffix) for suffix in (".jpg", ".jpeg", ".png"))
        row["image"] = next((image.name for image in beside if image.is_file()), None)
    row = typed(row, REQUIRED, SRREAL)
    row["image"], look = images_of(row, root or str(file.parent))
    name = f"{set_name(file)}/{row.get('id', '')}#{number}"
    # in place of 8-bit ones
    made = lru_cache(1)(lambda: [estimated(image) for image in row["image"]])
    yield Row(
        str(file),
        number,
        name,
        partial(srreal_example, name, row, look, made, notes),
        lambda: (*files_of_row(look), *filter(None, made())),
        notes=notes,
    )


def srreal_example(
    name: str, row: dict, look: Callable, made, notes: Notes, sizes: dict
) -> list[Example]:
    _, depths = look()
    shapes, ((question, answer), *more) = [size(image, sizes) for image in row["image"]], turns(row)
    if more:
        raise Bad("conversations", f"wrong count: {1 + len(more)} turns")
    # the official code's have no unit
    if relative := [d for d in depths if d and sizes[d][2:] == ("L",)]:
        notes.add("depth maps left out: 8 bits, so relative", len(relative))
        depths = [other if d in relative else d for d, other in zip(depths, made(), strict=True)]
    if "image_hw" in row and shapes[0] != tuple(row["image_hw"][::-1]):
        raise Bad(
            "image_hw", f"wrong size: {row['image_hw']}, the image has {list(shapes[0][::-1])}"
        )
    question = TEMPLATE.sub("", question)
    read = parse(answer, "dtr" if "<detect>" in answer else "lor")
    if not read.answer and re.search("</?(?:detect|think|answer)>", answer):
        raise Bad(
            "conversations",
            f"an answer with tags, but without <answer>...</answer>: {answer!r:.60}",
        )
    rationale = (read.think or row.get("cot") or "").strip() or None
    objects, names = truth(row, read, len(shapes))
    places = (row.get("3d_pos") or {}).items()
    marks = marks_of(
        row,
        {
            name: at["current_frame"]
            for name, at in places
            if isinstance(at, dict) and isinstance(at.get("current_frame"), int)
        },
    )
    question, regions = regions_of(row, question, marks, shapes)
    frame = (
        read.frame if read.frame is not None else row.get("main_frame_idx") if rationale else None
    )
    if frame is not None and not str(frame).isdecimal():
        raise Bad("main_frame_idx", f"wrong type or value: {frame!r} is no number of an image")
    if frame is None and FIRST.search(question):
        frame = 0
    return [
        Example(
            name,
            "dtr" if "3d_pos" in row or "<detect>" in answer else "lor",
            marked(row["image"], marks, stroke=5, outside=0),
            question,
            read.answer.strip() if read.answer else answer,
            [depth_map(d, s, sizes) for d, s in zip(depths, shapes, strict=True)]
            if any(depths)
            else None,
            regions=regions,
            objects=objects,
            names=names,
            task=row.get("type", ""),
            rationale=rationale,
            frame=int(frame) if frame is not None and len(shapes) > 1 else None,
        )
    ]


def regions_of(row: dict, question: str, marks: list, shapes: list) -> tuple[str, list]:
    """(the question with its <mask>s, the region of each)."""
    if "<mask>" not in question:
        question, marks = insert_masks(question, marks, len(shapes) > 1)
        return question, [(mark.view, mark.pixels(shapes[mark.view])) for mark in marks]
    kind = kind_of(row)
    found = [
        (view, REGIONS[kind](region, shapes[view]))
        for view, region in placed(row, kind, len(shapes))
    ]
    for (view, box), text in zip(found, question.split("<mask>"), strict=False):
        mark = next((mark for mark in marks if text.rstrip().endswith(mark.mention)), None)
        at = mark and (mark.view, mark.pixels(shapes[mark.view]))
        if at and not (view == at[0] and (kind != "bbox" or near(box, at[1]))):
            raise Bad(
                kind,
                f"not in pixels, or of another object?: {kind} {box} in image {view}, "
                f"where {mark.mention} is {at[1]} in image {at[0]}",
            )
    return question, found


def near(a: tuple, b: tuple) -> bool:
    """Equal up to rounding, and to the 1/1000 grid of the marks."""
    return all(abs(p - q) <= max(3, 0.005 * max(map(abs, b))) for p, q in zip(a, b, strict=True))


def truth(row: dict, read, views: int) -> tuple[dict, dict]:
    """(objects, names): from 3d_pos, else from what the response detects."""
    names = {mention: name for mention, name, _ in read.boxes}
    if not row.get("3d_pos"):
        found = {mention: xyz for mention, _, xyz in read.boxes}
        by_view = views > 1 and read.frame is not None
        return {m: {read.frame: xyz} if by_view else xyz for m, xyz in found.items()}, names
    objects = {}
    for key, place in row["3d_pos"].items():
        try:
            mention, label = (
                key.replace("_", " "),
                (place.get("current_frame_3d") or place).get("label"),
            )
            frames = place.get("all_frame_3d")
            by_view = frames and {
                int(k): tuple(map(float, at["center_cam"])) for k, at in frames.items()
            }
            objects[mention] = by_view or tuple(map(float, place["center_cam"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise Bad(
                "3d_pos", f"wrong type or value: {key}: {type(error).__name__}: {error}"
            ) from error
        names[mention] = names.get(mention) or label or mention
    return objects, {mention: names[mention] for mention in objects}
