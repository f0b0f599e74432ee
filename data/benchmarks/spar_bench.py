"""SPAR-Bench, its tiny and its RGBD variants: twenty tasks of depth, distance, views, relations.

official  SPAR's and lmms-eval's rule. Numbers: MRA of the first (single view) or the last
          (several), unsigned. Options: equal, or a substring of the truth (so the empty answer is
          right), or the first character. Camera motion: mean MRA over five axes with truth and
          answer swapped: the error is divided by the answer. All as they are, not stripped.
robust    MRA of signed numbers with units, with exact ties, and truth and answer in their places.

Path dtr asks with regions from SR-REAL's sparbench_region_prompts.json where that lies under the
folder, else where all marks are found in the images (found_marks.py). A row without regions is
asked with the DTR prompt all the same, where SR-REAL's DTR column has it on LOR: eval.py says how
many had regions. The RGBD variants come with depth and cameras, which the model gets to see.
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from data.benchmarks.answers import SLACK, mra, read_number, read_text, robust
from data.benchmarks.means import Mean, Scored, average, averages, mean, means
from data.benchmarks.schema import TEST, Benchmark, Item, Row, inside
from data.folders import walk
from data.marks import DepthMap, Marked
from data.rows import Bad, BadSource, matches, pinhole, typed
from data.sets.embodiedscan import SCANNET
from data.sets.found_marks import find_marks
from data.sets.regions import FIELDS, placed
from data.sets.spar_marks import insert_masks
from pictures import read_turned
from srreal import QUANTITY, Example, motion

KINDS = ("oc", "oo", "oc_mv", "oo_mv")  # object to camera, object to object; _mv: several views
LOW = [f"depth_prediction_{kind}" for kind in KINDS]
LOW += [f"distance_prediction_{kind}" for kind in KINDS]
MOTION = "view_change_infer"
MIDDLE = [MOTION, "position_matching", "camera_motion_infer"]
HIGH = [f"spatial_imagination_{kind}" for kind in KINDS]
HIGH += ["distance_infer_center_oo", "distance_infer_center_oo_mv"]
HIGH += [f"obj_spatial_relation_{kind}" for kind in ("oo", "oc_mv", "oo_mv")]
LEVELS = {"Low": LOW, "Middle": MIDDLE, "High": HIGH}

# ---- Rows

# What the published harness writes behind a question.
NUMBER_WORDS = "Please answer the question using a single word or phrase."
OPTION_WORDS = "\nAnswer with the option's letter from the given choices directly."
BOX_WORDS = (
    "The values represent the bounding box coordinates normalized to a 0-1000 scale, "
    "with the top-left corner as the origin of the image."
)
WORDS = dict.fromkeys(LOW, NUMBER_WORDS)
WORDS |= dict.fromkeys(MIDDLE, BOX_WORDS + OPTION_WORDS)
WORDS |= dict.fromkeys(HIGH, OPTION_WORDS)
WORDS[MOTION] = "\n"
PROMPT = {"question_region": str, "bbox": FIELDS["bbox"]}


def read(row: Row) -> Iterator[Item]:
    task = row.text("task")
    if task not in WORDS:
        raise Bad("task", f"unknown: {task!r}")
    images = row.images("image")
    question = row.text("question")
    # Marks are searched for in every pixel, which no other path needs.
    text = ""
    regions = []
    if row.path in ("dtr", "both"):
        find = prompted_regions if row.beside else found_regions
        text, regions = find(row, question, images)
    depths = depth_maps(row, images)
    yield Item(
        row.text("id"),
        images,
        row.text("answer"),
        task,
        question,
        direct=f"\n{question}\n{WORDS[task]}",
        dtr=text if regions else "",
        regions=regions,
        depths=depths,
        intrinsics=cameras(row, images) if depths else None,
    )


def region_prompts(folder: Path) -> dict:
    """Return SR-REAL's sparbench_region_prompts.json, by id, where it lies under the folder."""
    # It isn't part of the set, but is put beside it: in SR-REAL's repository it has this name.
    file = next(walk(folder).files_like("sparbench_region_prompts.json"), None)
    if file is None:
        return {}
    try:
        prompts = json.loads(file.read_text())
    except ValueError as error:
        raise BadSource(f"{file}: unreadable: {error}") from error
    if matches(prompts, list[dict]):
        prompts = {str(prompt.get("id")): prompt for prompt in prompts}
    if not matches(prompts, dict[str, dict]):
        raise BadSource(f"{file}: no {{id: region prompt}}")
    return prompts


def prompted_regions(row: Row, question: str, images: list[Marked]) -> tuple[str, list]:
    """Return the question of the row's region prompt, with its <mask>s, and the region of each."""
    prompt = row.beside.get(row.text("id"), {})
    if not prompt.get("visual_prompt"):
        return "", []
    prompt = typed(prompt, PROMPT, {"mask_idx": FIELDS["mask_idx"]})
    boxes = prompt["bbox"]
    # Boxes of one image are a list; of several they come by image, and mask_idx has their order.
    if isinstance(boxes, list):
        regions = [(0, tuple(box)) for box in boxes]
    else:
        regions = [(view, tuple(box)) for view, box in placed(prompt, "bbox", len(images))]
    return prompt["question_region"], regions


def found_regions(row: Row, question: str, images: list[Marked]) -> tuple[str, list]:
    """Return the question with <mask>s, and the regions of the marks that its images show."""
    text, marks = insert_masks(question, find_marks(images, question), len(images) > 1)
    regions = []
    # A mark over the edge was cut when it was drawn: its true box is not known.
    for mark in marks:
        size = images[mark.view].size
        box = mark.pixels(size)
        if not inside(box, size):
            return question, []
        regions.append((mark.view, box))
    return text, regions


def depth_maps(row: Row, images: list[Marked]) -> list | None:
    """Return the depth maps of the RGBD variants: 16-bit PNGs in millimetres."""
    files = row.images("depth") if row.has("depth") else []
    if not files:
        return None
    if len(files) != len(images):
        raise Bad("depth", f"{len(files)} for {len(images)} images")
    for file in files:
        picture = read_turned(file.source)
        if not picture.mode.startswith("I"):
            raise Bad("depth", f"wrong mode: {picture.mode}, not a 16-bit PNG")
        _, most = picture.getextrema()
        # No room is less than 10 cm deep; 0 is unknown.
        if 0 < most < 100:
            raise Bad("depth", f"in metres, not millimetres?: at most {most}")
    return [DepthMap(file.source, image.size) for file, image in zip(files, images, strict=True)]


def cameras(row: Row, images: list[Marked]) -> list | None:
    """Return (fx, fy, cx, cy) of each image, from a matrix of sixteen numbers for each or all."""
    if not row.has("intrinsic_color"):
        return None
    # Sixteen numbers for all images, or for each; as with SPAR-7M's, no size is stated beside them.
    matrices = row.value("intrinsic_color")
    if matches(matrices, list[float]):
        matrices = [matrices]
    if not matches(matrices, list[list[float]]) or set(map(len, matrices)) != {16}:
        raise Bad("intrinsic_color", f"no matrix of sixteen numbers: {matrices!r:.50}")
    if len(matrices) != len(images):
        matrices = matrices[:1] * len(images)
    stated = SCANNET if row.columns.get("source") == "scannet" else None
    found = []
    for matrix, image in zip(matrices, images, strict=True):
        # The first two lines of four: the rest is 0, 0, 1.
        lines = [matrix[:4], matrix[4:8]]
        found.append(pinhole(lines, image.size, stated))
    return found


# ---- Scores


def official(text: str, example: Example) -> float:
    try:
        if example.task == MOTION:
            pairs = zip(official_axes(text), official_axes(example.answer), strict=True)
            # The error is divided by the answer, as published.
            return mean(mra(true, value) for value, true in pairs)
        if example.task in LOW:
            return mra(official_number(text, example.task), float(example.answer))
    except ValueError:  # also as published
        return 0.0
    said = text.lower()
    true = example.answer.lower()
    return float(said in true or said[0] == true)


def official_number(text: str, task: str) -> float:
    # What follows a ^ is no number, nor is a sign part of one.
    found = re.findall(r"(?<!\^)\d+\.\d+|(?<!\^)\d+", text)
    if not found:
        raise ValueError("no number")
    return float(found[-1] if task.endswith("_mv") else found[0])


AXES = [
    ("move_right", "move_left"),
    ("move_up", "move_down"),
    ("move_forward", "move_backward"),
    ("rotate_right", "rotate_left"),
    ("rotate_up", "rotate_down"),
]


def official_axes(text: str) -> list[float]:
    """Read five signed axes; unknown keys count for nothing, the last of a repeated one counts."""
    moves = {}
    for entry in text.split(","):
        key, value = entry.split(":")
        moves[key] = float(value)
    return [moves.get(plus, 0) - moves.get(minus, 0) for plus, minus in AXES]


def robust_mra(response: str, example: Example) -> float | None:
    """Score numbers and motions by MRA, anything else as every benchmark."""
    if example.task == MOTION:
        # Five axes with a blank here and there are ten words at most; more is prose.
        axes = motion(read_text(response, words=10) or "")
        if not all(map(math.isfinite, axes)):
            return None
        pairs = zip(axes, motion(example.answer), strict=True)
        return mean(mra(value, true, SLACK) for value, true in pairs)
    if example.task in LOW and QUANTITY.fullmatch(example.answer.strip()):
        value = read_number(response, example.question)
        true = read_number(example.answer, example.question)
        return None if value is None else mra(value, true, SLACK)
    return robust(response, example)


def aggregate(scored: Scored) -> dict[str, Mean]:
    """Average over tasks, as published; `_samples` and the splits weigh by sample, as SR-REAL."""
    # Both ways of averaging, as both are quoted: tasks differ in size.
    tasks = means(scored, lambda example: example.task)
    levels = means(scored, level)
    samples = {f"{name}_samples": value for name, value in levels.items()}
    out = {"overall": average(tasks.values())}
    out |= averages(tasks, LEVELS)
    out |= samples
    out["overall_samples"] = scored.mean()
    return out | means(scored, split) | tasks


def level(example: Example) -> str:
    if example.task in LOW:
        return "Low"
    return "Middle" if example.task in MIDDLE else "High"


def split(example: Example) -> str:
    task = example.task
    # The tasks of the middle level all compare views, without saying so in their names.
    views = "multi" if task in MIDDLE or task.endswith("_mv") else "single"
    form = "fill" if task in LOW or task == MOTION else "select"
    return f"{views}_{form}"


FULL = {"overall": 33.07, "Low": 28.75, "Middle": 22.97, "High": 40.27}
SPAR_BENCH = Benchmark(
    hub="jasonzhango/SPAR-Bench",
    rows=7211,
    files=(TEST,),
    read=read,
    official=official,
    robust=robust_mra,
    aggregate=aggregate,
    others=("Qwen2.5-VL-7B", "SPAR's readme", FULL),
    beside=region_prompts,
)
TINY = replace(
    SPAR_BENCH,
    hub="jasonzhango/SPAR-Bench-Tiny",
    rows=1000,
    others=("Qwen2.5-VL-72B", "SPAR's readme", {"overall": 39.40}),
)
