"""The benchmarks as published: `load(name, root)` reads one, `score(name, pairs, scorer)` marks
answers.

    python eval.py --model DIR --benchmark cv-bench --path direct --out out/cv-bench python eval.py
    --model DIR --benchmark spar-bench --data /sets/SPAR-Bench --path both --out out/spar

`root` is a directory as downloaded, a file of it, or a hub id (default: the set's own). A name may
choose one task: blink/Relative_Depth. What a row asks on each path:
    direct  the words of the published harness (SPAR and lmms-eval; SAT: "Only output the letter.")
    lor     the set's own question, without such words, as SR-REAL does
    dtr     as lor, and with regions: spar-bench from SR-REAL's sparbench_region_prompts.json where that lies
            under root, else where all marks are found in the images (data/found_marks.py);
            embspatial unless a box leaves its image (the official code looks at x alone);
            spatialrgpt-bench on every path. A row without regions is asked with the DTR prompt all
            the same, where SR-REAL's DTR column has it on LOR: eval.py says how many had regions

Departures: sat is asked in both orders of its options, drawn from the row's number, not from a
rank's generator. erqa's images stand where visual_indices puts them. A row that can't be used stops
the run, as a benchmark is read whole, unless skip_bad_rows leaves it out. A count that differs from
the published one is a warning. SPAR-Bench's RGBD variants (--data) come with depth and cameras,
which the model gets to see.
"""

import ast
import base64
import binascii
import csv
import json
import os
import random
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np

from data import BadRows, say, scorers
from data.embodiedscan import SCANNET
from data.found_marks import find_marks
from data.marks import DepthMap, Marked, opened
from data.rows import Bad, pinhole
from data.scorers import LETTERS
from data.spar import PHRASE, insert_masks
from srreal import Example

score = scorers.score


@dataclass
class Item:
    """A row of a benchmark, and its question as each path asks it; "" is as lor."""

    id: str
    images: list
    answer: str
    task: str
    lor: str
    direct: str = ""
    dtr: str = ""
    # of each text that holds <mask>: (image, (x0, y0, x1, y1))
    regions: list = field(default_factory=list)
    depths: list | None = None  # as an Example has them
    intrinsics: list | None = None


@dataclass(frozen=True)
class Place:
    """Where a row stands."""

    folder: Path
    file: Path
    number: int  # from 1, through all files of the set: ids and orders are made of it
    path: str  # what is asked for: lor and direct need no region


class Wrong(ValueError):
    """(field, reason)"""


def need(good: bool, name: str, reason: str) -> None:
    if not good:
        raise Wrong(name, reason)


# ---- Fields


def nested(value):
    """A list or dict, also where a converter wrote it as JSON or as Python's repr."""
    for read in (
        (json.loads, ast.literal_eval) if isinstance(value, str) and value[:1] in "[{" else ()
    ):
        try:
            return read(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return value


def picture(value, at: Place):
    """{bytes, path}, raw bytes, base64, or a path under the set's folder -> what opens as an
    image."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str):
        bases = (at.folder, at.folder / "images", at.file.parent)
        file = next((base / value for base in bases if os.path.isfile(base / value)), None)
        try:
            value = file.read_bytes() if file else base64.b64decode(value, validate=True)
        except binascii.Error:
            raise Wrong(
                "image", f"missing file: {value[:80]} in {at.folder} (--data: where it is)"
            ) from None
    need(isinstance(value, bytes), "image", f"neither bytes nor a path: {value!r:.60}")
    try:
        return Marked(value) if min(Marked(value).size) else None
    except Exception as error:  # Pillow raises all sorts on bad bytes
        raise Wrong("image", f"corrupt: {error}") from error


def pictures(values, at: Place) -> list:
    values = nested(values)
    values = values if isinstance(values, list) else [values]
    return [picture(value, at) for value in values if value is not None]


def lettered(options: list, form: str) -> str:
    """A line an option: form holds {} for the letter and {} for the text."""
    return "".join("\n" + form.format(*pair) for pair in zip(LETTERS, options, strict=False))


def letter(answer, count: int, name: str = "answer") -> str:
    """`B`, `(B)` or the index 1 -> B."""
    found = (
        LETTERS[answer]
        if isinstance(answer, int) and 0 <= answer < 8
        else str(answer).strip("() .")
    )
    need(found in tuple(LETTERS[:count]), name, f"no letter of {count} options: {answer!r}")
    return found


def inside(box, size) -> bool:
    return 0 <= box[0] < box[2] <= size[0] and 0 <= box[1] < box[3] <= size[1]


def only(count: int) -> str:
    letters = ", ".join(LETTERS[:count])
    return f"Note: You only need to respond with {letters} without providing any additional information.\n"


# ---- One function a benchmark: a row and its place -> Items


@cache
def region_prompts(folder: Path) -> dict:
    """SR-REAL's sparbench_region_prompts.json, by id, where it lies under the folder."""
    file = next(folder.glob("**/sparbench_region_prompts.json"), None)
    rows = json.loads(file.read_text()) if file else {}
    return {str(row["id"]): row for row in rows} if isinstance(rows, list) else rows


BOXES = (
    "The values represent the bounding box coordinates normalized to a 0-1000 scale, with the top-left "
    "corner as the origin of the image."
)
WORDS = dict.fromkeys(
    scorers.HIGH, "\nAnswer with the option's letter from the given choices directly."
)
WORDS |= dict.fromkeys(scorers.LOW, "Please answer the question using a single word or phrase.")
WORDS |= dict.fromkeys(scorers.MIDDLE, BOXES + WORDS[scorers.HIGH[0]]) | {"view_change_infer": "\n"}


def spar_bench(row: dict, at: Place) -> Iterator[Item]:
    need(row["task"] in WORDS, "task", f"unknown: {row['task']!r}")
    images, question = pictures(row["image"], at), row["question"]
    text, regions = spar_regions(row, images, at) if at.path in ("dtr", "both") else ("", [])
    yield Item(
        str(row["id"]),
        images,
        str(row["answer"]),
        row["task"],
        question,
        f"\n{question}\n{WORDS[row['task']]}",
        text if regions else "",
        regions,
        *spar_depths(row, images, at),
    )


def spar_depths(row: dict, images: list, at: Place) -> tuple[list | None, list | None]:
    """(depth maps, cameras) of the RGBD variants: 16-bit PNGs in millimetres, and sixteen
    numbers."""
    files, matrix = pictures(row.get("depth"), at), nested(row.get("intrinsic_color"))
    need(len(files) in (0, len(images)), "depth", f"{len(files)} for {len(images)} images")
    if not files:
        return None, None
    for picture in (opened(file.source) for file in files):
        need(picture.mode.startswith("I"), "depth", f"wrong mode: {picture.mode}, not a 16-bit PNG")
        most = picture.getextrema()[1]
        need(most == 0 or most >= 100, "depth", f"in metres, not millimetres?: at most {most}")
    depths = [DepthMap(file.source, image.size) for file, image in zip(files, images, strict=True)]
    if not matrix:
        return depths, None
    matrices = np.reshape(matrix, (-1, 4, 4)).tolist()
    matrices = matrices if len(matrices) == len(images) else matrices[:1] * len(images)
    stated = SCANNET if row.get("source") == "scannet" else None
    return depths, [
        pinhole(one, image.size, stated) for one, image in zip(matrices, images, strict=True)
    ]


def spar_regions(row: dict, images: list, at: Place) -> tuple[str, list]:
    """(question with its <mask>s, regions), from the region prompts or from the marks in the
    images. Boxes of one image are a list; of several they come by image, and mask_idx says which is
    the k-th <mask>'s."""
    if prompts := region_prompts(at.folder):
        prompt = prompts.get(str(row["id"]), {})
        if not prompt.get("visual_prompt"):
            return "", []
        if isinstance(prompt["bbox"], list):
            return prompt["question_region"], [(0, tuple(box)) for box in prompt["bbox"]]
        order = sorted(prompt["mask_idx"].items(), key=lambda pair: int(pair[0]))
        boxes = [(image, tuple(prompt["bbox"][str(image)][k])) for _, (image, k) in order]
        return prompt["question_region"], boxes
    text, marks = insert_masks(
        row["question"], find_marks(images, row["question"]), len(images) > 1
    )
    regions = [(mark.view, mark.pixels(images[mark.view].size)) for mark in marks]
    return text, regions if all(inside(box, images[view].size) for view, box in regions) else []


def embspatial(row: dict, at: Place) -> Iterator[Item]:
    images, options = pictures(row["image"], at), nested(row["answer_options"])
    things = nested(row["objects"])
    boxes = [(x, y, x + w, y + h) for x, y, w, h in (thing["bbox"] for thing in things)]
    whole = boxes and all(inside(box, images[0].size) for box in boxes)
    question = (
        row["question"] + " Select from the following choices." + lettered(options, "({}) {}")
    )
    relevant = ", ".join(f"{thing['name']} <mask>" for thing in things)
    name, source = str(row["question_id"]), f"{row['data_source']}_"
    yield Item(
        source + name.removeprefix(source),
        images,
        letter(row["answer"], len(options)),
        row["relation"],
        question,
        only(len(options)) + row["question"] + lettered(options, "{}) {}"),
        f"{question}\nRelevant objects: {relevant}." if whole else "",
        [(0, box) for box in boxes],
    )


def sat(row: dict, at: Place) -> Iterator[Item]:
    images = pictures(row["image_bytes"] if "image_bytes" in row else row["images"], at)
    options, said = [text.strip() for text in nested(row["answers"])], row["correct_answer"].strip()
    bare = lambda text: re.sub(r",?\s+in the first frame\.?$", "", text)  # noqa: E731 - one side may have it
    true = next(
        (option for same in (str, bare) for option in options if same(option) == same(said)), None
    )
    need(true is not None, "correct_answer", f"{said!r} is none of {options}")
    random.Random(f"sat {at.number}").shuffle(options)
    for k, order in enumerate((options, options[::-1])):
        question = row["question"] + "\nSelect the correct response from the given choices."
        question += lettered(order, "{}. {}")
        yield Item(
            f"sat_{at.number}-{k}",
            images,
            LETTERS[order.index(true)],
            row["question_type"],
            question,
            f"{question}\nOnly output the letter.",
        )


def cv_bench(row: dict, at: Place) -> Iterator[Item]:
    count = len(nested(row["choices"]))
    yield Item(
        f"{row['source']}_{row['idx']}",
        pictures(row["image"], at),
        letter(row["answer"], count),
        row["task"],
        row["prompt"],
        f"{only(count)}\n{row['prompt']}",
    )


def blink(row: dict, at: Place) -> Iterator[Item]:
    count, images = (
        len(nested(row["choices"])),
        pictures([row.get(f"image_{k}") for k in range(1, 5)], at),
    )
    yield Item(
        row["idx"],
        images,
        letter(row["answer"], count),
        row["sub_task"],
        row["prompt"],
        only(count) + row["prompt"],
    )


def realworldqa(row: dict, at: Place) -> Iterator[Item]:
    yield Item(
        f"realworldqa_{at.number}",
        pictures(row["image"], at),
        str(row["answer"]),
        "",
        row["question"],
    )


def erqa(row: dict, at: Place) -> Iterator[Item]:
    """Image k stands before character visual_indices[k]; all at 0, or not one an image: all come
    first."""
    images, text = pictures(row["images"] if "images" in row else row["image"], at), row["question"]
    places = nested(row.get("visual_indices")) or []
    places = [places] if isinstance(places, int) else [int(place) for place in places]
    if len(places) == len(images) and any(places):
        order = sorted(range(len(images)), key=places.__getitem__)
        images, cuts = [images[k] for k in order], [0, *sorted(places), len(text)]
        text = "<image>".join(text[a:b] for a, b in zip(cuts, cuts[1:], strict=False))
    name = row.get("question_id", row.get("index", f"erqa_{at.number}"))
    yield Item(str(name), images, letter(row["answer"], 8), row["question_type"], text)


def spatialrgpt(row: dict, at: Place) -> Iterator[Item]:
    image = picture(row.get("image") or nested(row["image_info"])["file_path"], at)
    boxes, turns = nested(row["bbox"]), nested(row["conversations"])
    task, text = nested(row["qa_info"])["category"], row["text_q"]
    need(scorers.spatialrgpt_column(task) is not None, "qa_info", f"unknown category: {task!r}")
    wide, high = image.size
    boxes = [(max(x0, 0), max(y0, 0), min(x1, wide), min(y1, high)) for x0, y0, x1, y1 in boxes]
    places = {k: text.find(f"Region [{k}]") for k in range(len(boxes))}
    order = sorted((k for k in places if places[k] >= 0), key=places.get)
    need(bool(order), "text_q", "names no region")
    for k in order:
        text = text.replace(f"Region [{k}]", f"Region [{k}] <mask>", 1)
    yield Item(
        str(row["id"]),
        [image],
        turns[1]["value"],
        task,
        text,
        regions=[(0, boxes[k]) for k in order],
    )


# ---- The sets


@dataclass(frozen=True)
class Benchmark:
    hub: str
    rows: int  # published
    read: Callable[[dict, Place], Iterator[Item]]
    files: tuple[str, ...]  # where the rows lie: the first that finds any
    # somebody else's figures: the model, who says so, {key: per cent}
    others: tuple[str, str, dict]


TEST, QWEN = ("**/test*.parquet",), "Qwen2.5-VL-7B"
BENCHMARKS = {
    "spar-bench": Benchmark(
        "jasonzhango/SPAR-Bench",
        7211,
        spar_bench,
        TEST,
        (QWEN, "SPAR's readme", {"overall": 33.07, "Low": 28.75, "Middle": 22.97, "High": 40.27}),
    ),
    "spar-bench-tiny": Benchmark(
        "jasonzhango/SPAR-Bench-Tiny",
        1000,
        spar_bench,
        TEST,
        ("Qwen2.5-VL-72B", "SPAR's readme", {"overall": 39.40}),
    ),
    "embspatial": Benchmark(
        "Phineas476/EmbSpatial-Bench",
        3640,
        embspatial,
        ("**/embspatial_bench.json", *TEST),
        ("Qwen3-VL-8B", "Qwen3-VL's report", {"overall": 78.5}),
    ),
    "sat": Benchmark(
        "array/SAT",
        150,
        sat,
        ("**/SAT_test*.parquet", *TEST),
        ("Qwen2.5-VL-32B", "RoboBrain 2.0", {"overall": 80.00}),
    ),
    "cv-bench": Benchmark(
        "nyu-visionx/CV-Bench",
        2638,
        cv_bench,
        ("**/test_[23]d*.parquet", *TEST),
        (QWEN, "SpatialThinker", {"overall": 68.6, "2D": 69.1, "3D": 68.0}),
    ),
    "blink": Benchmark(
        "BLINK-Benchmark/BLINK",
        1901,
        blink,
        ("**/val*.parquet",),
        (QWEN, "Spatial-SSRL", {"overall": 55.87}),
    ),
    "realworldqa": Benchmark(
        "xai-org/RealworldQA", 765, realworldqa, TEST, (QWEN, "Spatial-SSRL", {"overall": 68.63})
    ),
    "erqa": Benchmark(
        "FlagEval/ERQA",
        400,
        erqa,
        (*TEST, "**/ERQA.tsv", "**/erqa.json"),
        ("Qwen3-VL-8B", "Qwen3-VL's report", {"overall": 45.8}),
    ),
    "spatialrgpt-bench": Benchmark(
        "a8cheng/SpatialRGPT-Bench",
        1406,
        spatialrgpt,
        ("**/val*.parquet", "**/SpatialRGPT-Bench_v1.json"),
        (QWEN, "N3D-VLM, a judge", {"qualitative": 74.4, "quantitative_columns": 38.2}),
    ),
}


def find(name: str, root) -> tuple[Path, list[Path]]:
    """(folder, its files with rows), downloaded where root is no local one."""
    spec = BENCHMARKS[name]
    root = Path(spec.hub if root is None else root)
    if root.is_file():
        return root.parent, [root]
    if not root.is_dir():
        if len(root.parts) != 2 or str(root).startswith((".", "/", "~")):
            raise FileNotFoundError(f"{name}: no such directory, nor a hub id: {root}")
        from huggingface_hub import snapshot_download  # here: a local directory needs no hub

        globs = [pattern.replace("**/", "*") for pattern in spec.files]
        root = Path(snapshot_download(str(root), repo_type="dataset", allow_patterns=globs))
    found = next((files for pattern in spec.files if (files := sorted(root.glob(pattern)))), None)
    if not found:
        raise FileNotFoundError(f"{name}: no {' or '.join(spec.files)} in {root}")
    return root, found


def rows_of(file: Path) -> Iterator[dict]:
    if file.suffix == ".parquet":
        from pyarrow import parquet  # here: JSON needs none of it

        for batch in parquet.ParquetFile(file).iter_batches(batch_size=16):
            yield from batch.to_pylist()
    elif file.suffix == ".tsv":
        csv.field_size_limit(2**31 - 1)  # a field is an image
        with open(file, newline="", encoding="utf-8") as lines:
            yield from csv.DictReader(lines, delimiter="\t")
    else:
        text = file.read_text(encoding="utf-8")
        yield from (
            map(json.loads, text.splitlines()) if file.suffix == ".jsonl" else json.loads(text)
        )


def examples_of(item: Item, path: str) -> list[Example]:
    """On one path; or for both: the lor form, and the dtr form where it is another one."""
    asked = ["lor", *(["dtr"] if item.dtr else [])] if path == "both" else [path]
    texts = {name: getattr(item, name) or item.lor for name in asked}
    for text in texts.values():
        masks, places = text.count("<mask>"), text.count("<image>")
        need(
            masks in (0, len(item.regions)),
            "question",
            f"{masks} <mask> for {len(item.regions)} regions",
        )
        need(
            places in (0, len(item.images)),
            "question",
            f"{places} <image> for {len(item.images)} images",
        )
        for image, box in item.regions if masks else ():
            need(
                0 <= image < len(item.images) and inside(box, item.images[image].size),
                "regions",
                f"outside of image {image}: {box}",
            )
    need(item.images and item.answer.strip(), "answer" if item.images else "image", "there is none")
    return [
        Example(
            item.id,
            name,
            item.images,
            text,
            item.answer,
            task=item.task,
            depths=item.depths,
            intrinsics=item.intrinsics,
            regions=item.regions if "<mask>" in text else [],
        )
        for name, text in texts.items()
    ]


def usable(row: dict, at: Place, path: str, read: Callable) -> tuple[list[Example], list]:
    """(its Examples, what is wrong with it)."""
    try:
        need(isinstance(row, dict), "row", f"no object: {row!r:.60}")
        return [example for item in read(row, at) for example in examples_of(item, path)], []
    except Wrong as wrong:
        return [], [wrong.args]
    except Bad as bad:
        return [], bad.args[0]
    except KeyError as error:
        return [], [(str(error.args[0]), f"missing; there are {', '.join(row)}")]
    except (ValueError, TypeError, IndexError, AttributeError) as error:
        return [], [("row", f"of another schema: {error}")]


def load(name: str, root=None, path: str = "both", skip_bad_rows: bool = False) -> list[Example]:
    """Its questions on a path of srreal.PATHS; both: lor, and dtr where that is asked in another
    way. Raises BadRows with all that can't be used (or counts and prints them, and leaves them
    out), ValueError for an unknown name, OSError where nothing is found."""
    name, _, task = name.partition("/")
    if name not in BENCHMARKS:
        raise ValueError(f"unknown benchmark {name!r}: one of {', '.join(BENCHMARKS)}")
    spec, examples, bad, ids, number = BENCHMARKS[name], [], [], Counter(), 0
    folder, files = find(name, root)
    for file in files:
        place = 0
        try:
            for place, row in enumerate(rows_of(file), 1):
                number += 1
                good, wrong = usable(row, Place(folder, file, number, path), path, spec.read)
                bad += [(str(file), place, *why) for why in wrong]
                ids.update({(example.id, example.path) for example in good})
                for example in good:  # an id that recurs gets the row's number
                    example.id += f"#{number}" if ids[example.id, example.path] > 1 else ""
                examples += [example for example in good if task in ("", example.task)]
        except (ValueError, OSError) as error:
            bad.append((str(file), place, "file", f"unreadable: {error}"))
    if bad and not (skip_bad_rows and examples):
        raise BadRows(bad)
    if bad:
        kinds = Counter(
            f"{field}: {reason.partition(':')[0]}" for *_, field, reason in bad
        ).most_common()
        say(
            f"{name}: left out {len({why[:2] for why in bad})} of {number} rows: "
            + "; ".join(f"{count} x {kind}" for kind, count in kinds)
        )
    if not examples:
        raise ValueError(
            f"{name}: no task {task!r} in {folder}" if task else f"{name}: no rows in {folder}"
        )
    if number != spec.rows:
        tasks = ", ".join(
            f"{task or 'rows'} {n}" for task, n in Counter(e.task for e in examples).items()
        )
        warnings.warn(
            f"{name}: {number} rows in {folder}, {spec.rows} are published ({tasks})", stacklevel=2
        )
    lost = [
        e
        for e in examples
        if e.path in ("dtr", path) and not e.regions and PHRASE.search(e.question)
    ]
    if path == "dtr" and lost and spec.read is spar_bench:
        warnings.warn(
            f"{name}: no region for the marks of {len(lost)} rows, asked without", stacklevel=2
        )
    return examples
