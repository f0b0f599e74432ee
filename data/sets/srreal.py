"""SR-REAL's own rows (kind `srreal`): one question each, in .json or .jsonl as LLaVA's (llava.py).

A row is on path dtr if it has `3d_pos` or its answer a <detect> block, else on lor.
    conversations   the question, raw or in the official template; the answer, or all of
                    <detect> <think> <answer>
    cot             the text of <think>, where the answer has none
    red_bbox ...    marks in 1/1000 of the image, drawn as the official code does (disc of 20
                    pixels, stroke of 5); bbox_img_idx or point_img_idx: their views, in the order
                    that `type`, the SPAR task, tells; of no such task, `current_frame` in `3d_pos`
    bbox, mask_idx  regions in pixels: a list, or of several images {image: list} with the place of
                    the k-th <mask>, {k: [image, index]} (without: in the order of the images); else
                    rle or segmentation, as in llava. Without <mask>s the marks are the regions
    image_hw        [height, width] of the first image; depth: one 16-bit PNG an image
    3d_pos          {"red_bbox": {"center_cam": [x, y, z], "label"}}, metres; several views:
                    {"all_frame_3d": {"0": {"center_cam"}, ...}, "current_frame_3d": {"label"}}
    main_frame_idx  the view that a rationale speaks of. Without a rationale any will do, but in a
                    question about the "first image"
Departures: marks and boxes must lie on the same place, or the row is bad; names are the response's,
else the labels."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from data.rows import Bad, Headers, Notes, Row, each, estimated, only_turn, set_name, typed
from data.sets.files import Files, depths_of, files_of_row, sizes_of
from data.sets.llava import IMAGE, OPTIONAL, REQUIRED
from data.sets.regions import REGIONS, kind_of, placed
from data.sets.spar_marks import FIRST, MARKS, VIEWS, Mark, insert_masks, marked, marks_of
from srreal import Example, Parsed, parse

OWN = {"type": str, "cot": str, "3d_pos": dict, "main_frame_idx": int | str}
FIELDS = OPTIONAL | MARKS | VIEWS | OWN
# The official prompts stand before the raw question.
TEMPLATE = re.compile(r"^.*</answer>.*?\bQuestion:\s*", re.S)


def srreal_rows(path: Path, root: str | None) -> Iterator[Row]:
    """Yield a Row for each row of the files that a path stands for. root: of the images."""
    yield from each(path, (".json", ".jsonl"), partial(build, root, Notes()))


def build(root: str | None, notes: Notes, file: Path, number: int, row: dict) -> Iterator[Row]:
    # WebDatasets name no image: it has the sample's own key.
    if row.get("image") is None:
        row["image"] = image_beside(file)
    row = typed(row, REQUIRED | IMAGE, FIELDS)
    files = files_of_row(row, root or str(file.parent))
    row["image"] = files.images
    key = f"{set_name(file)}/{row.get('id', '')}#{number}"
    question = Question(key, row, files, notes)
    yield Row(str(file), number, key, question.examples, question.all_files, notes=notes)


def image_beside(file: Path) -> str | None:
    """Return the image of a sample of an unpacked WebDataset: key.jpg of key.json."""
    for suffix in (".jpg", ".jpeg", ".png"):
        image = file.with_suffix(suffix)
        if image.is_file():
            return image.name
    return None


@dataclass
class Question:
    """A row that may be taken: what it says, and its files, which are looked for when it is."""

    key: str
    row: dict
    files: Files
    notes: Notes

    # Looked for beside the named ones, as only the header says whether these have 8 bits.
    @cached_property
    def estimated_depths(self) -> list:
        return [estimated(image) for image in self.files.images]

    def all_files(self) -> tuple:
        return (*self.files.all(), *filter(None, self.estimated_depths))

    def examples(self, headers: Headers) -> list[Example]:
        row = self.row
        images = self.files.images
        shapes = sizes_of(images, headers)
        check_size(row, shapes[0])
        question, answer = one_turn(row)
        response = parse_answer(answer)
        rationale = (response.think or row.get("cot") or "").strip() or None
        objects, names = truth(row, response, len(images))
        marks = marks_of(row, frames_of_marks(row))
        question, regions = regions_of(row, question, marks, shapes)
        frame = frame_of(row, question, response, rationale)
        return [
            Example(
                self.key,
                "dtr" if "3d_pos" in row or "<detect>" in answer else "lor",
                marked(images, marks, stroke=5, outside=0),
                question,
                response.answer.strip() if response.answer else answer,
                depths=depths_of(self.metric_depths(headers), shapes, headers),
                regions=regions,
                objects=objects,
                names=names,
                task=row.get("type", ""),
                rationale=rationale,
                frame=frame if len(images) > 1 else None,
            )
        ]

    def metric_depths(self, headers: Headers) -> list:
        """Return the depth files, those of 8 bits replaced: the official code's have no unit."""
        depths = []
        for file, other in zip(self.files.depths, self.estimated_depths, strict=True):
            if file and headers[file][2:] == ("L",):
                self.notes.add("depth maps left out: 8 bits, so relative")
                file = other
            depths.append(file)
        return depths


# ---- What a row says


def check_size(row: dict, shape: tuple[int, int]) -> None:
    # Boxes are in pixels of that size: of another one they would lie elsewhere.
    stated = row.get("image_hw")
    found = list(shape[::-1])
    if stated and list(stated) != found:
        raise Bad("image_hw", f"wrong size: {stated}, the image has {found}")


def one_turn(row: dict) -> tuple[str, str]:
    question, answer = only_turn(row)
    return TEMPLATE.sub("", question), answer


def parse_answer(answer: str) -> Parsed:
    """Read a whole response, or an answer alone, which has no tags."""
    # An answer alone, as RL's rows have it, parses as a response without any section.
    response = parse(answer, "dtr" if "<detect>" in answer else "lor")
    if not response.answer and re.search("</?(?:detect|think|answer)>", answer):
        reason = f"an answer with tags, but without <answer>...</answer>: {answer!r:.60}"
        raise Bad("conversations", reason)
    return response


def frames_of_marks(row: dict) -> dict[str, int]:
    """Return {"red_bbox": view} where 3d_pos says it."""
    # Typed loosely: what else is wrong with an entry, `truth` names.
    frames = {}
    for name, place in (row.get("3d_pos") or {}).items():
        if isinstance(place, dict) and isinstance(place.get("current_frame"), int):
            frames[name] = place["current_frame"]
    return frames


def frame_of(row: dict, question: str, response: Parsed, rationale: str | None) -> int | None:
    """Return the view that centres have to be in, or None where any will do."""
    frame = response.frame
    # main_frame_idx says which view the rationale's numbers are of. Without a rationale the model
    # may choose its view, and is scored in the one that it states.
    if frame is None and rationale:
        frame = row.get("main_frame_idx")
    if frame is None:
        return 0 if FIRST.search(question) else None
    if not str(frame).isdecimal():
        raise Bad("main_frame_idx", f"wrong type or value: {frame!r} is no number of an image")
    return int(frame)


def regions_of(row: dict, question: str, marks: list[Mark], shapes: list) -> tuple[str, list]:
    """Return the question with its <mask>s, and the region of each."""
    if "<mask>" not in question:
        question, marks = insert_masks(question, marks, len(shapes) > 1)
        return question, [(mark.view, mark.pixels(shapes[mark.view])) for mark in marks]
    kind = kind_of(row)
    read = REGIONS[kind]
    regions = [
        (view, read(region, shapes[view])) for view, region in placed(row, kind, len(shapes))
    ]
    # Boxes of another image's size, or in another unit, would point at the wrong thing and nothing
    # would fail: so each is compared with the mark that is named right before its <mask>.
    for (view, region), text in zip(regions, question.split("<mask>"), strict=False):
        for mark in marks:
            if text.rstrip().endswith(mark.mention):
                check_place(kind, view, region, mark, shapes)
                break
    return question, regions


def check_place(kind: str, view: int, region, mark: Mark, shapes: list) -> None:
    """Raise Bad where a region lies elsewhere than the mark that its question names."""
    at = mark.pixels(shapes[mark.view])
    # A mask has no four numbers to compare.
    if view == mark.view and (kind != "bbox" or near(region, at)):
        return
    raise Bad(
        kind,
        f"not in pixels, or of another object?: {kind} {region} in image {view}, "
        f"where {mark.mention} is {at} in image {mark.view}",
    )


def near(a: tuple, b: tuple) -> bool:
    """Say whether two boxes are equal up to rounding, and to the 1/1000 grid of the marks."""
    # A step of that grid is .1 % of a side; half a per cent also forgives a side cut off at 999.
    slack = max(3, 0.005 * max(map(abs, b)))
    return all(abs(p - q) <= slack for p, q in zip(a, b, strict=True))


def truth(row: dict, response: Parsed, views: int) -> tuple[dict, dict]:
    """Return (objects, names): from 3d_pos, else from what the response detects."""
    # Of SFT's rows the response has the centres, of RL's only 3d_pos.
    names = {mention: name for mention, name, _ in response.boxes}
    if not row.get("3d_pos"):
        objects = {mention: xyz for mention, _, xyz in response.boxes}
        if views > 1 and response.frame is not None:
            objects = {mention: {response.frame: xyz} for mention, xyz in objects.items()}
        return objects, names
    # The response's names go first: they are what the rationale speaks of.
    objects = {}
    labels = {}
    for key, place in row["3d_pos"].items():
        mention = key.replace("_", " ")
        # The key is the place that a user finds in the file, so the reason names it.
        try:
            objects[mention], label = centre_and_label(place)
        except Bad as error:
            start = f"wrong type or value: {key}"
            faults = [("3d_pos", f"{start}: {field}: {reason}") for field, reason in error.args[0]]
            raise Bad(faults) from error
        labels[mention] = names.get(mention) or label or mention
    return objects, labels


def centre_and_label(place) -> tuple[tuple | dict, str | None]:
    """Return an object's (x, y, z), or {view: (x, y, z)}, and its name of an entry of 3d_pos."""
    place = typed(place, {}, {"all_frame_3d": dict[str, dict], "current_frame_3d": dict})
    label = (place.get("current_frame_3d") or place).get("label")
    frames = place.get("all_frame_3d")
    if not frames:
        return centre_of(place), label
    centres = {}
    for view, frame in frames.items():
        if not view.isdecimal():
            raise Bad("all_frame_3d", f"no number of an image: {view}")
        centres[int(view)] = centre_of(frame)
    return centres, label


def centre_of(place: dict) -> tuple[float, ...]:
    xyz = typed(place, {"center_cam": list[float]}, {})["center_cam"]
    return tuple(map(float, xyz))
