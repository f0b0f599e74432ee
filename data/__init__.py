"""Where Examples come from: `load(sources)` reads and checks them, or lists every row that cannot
be used.

A source is a path, `kind:path`, or `kind:path@image_root` where the images lie elsewhere. SOURCES
has the kinds, each read by one file here; where none is said, the files tell. A share of a source,
and the .toml file that mixes several, are in data/mixture.py:
`kind:path,weight=.1,cap=1000,seed=1,path=dtr`.

Our own format (`scenes`): a folder with rows.jsonl, or a .jsonl file; an object a line, paths
relative to it:
    id, path    text, and "lor" | "dtr" | "direct"; no two rows of all sources have both in common
    images      ["images/a.png", ...], at least one
    question    text with a <mask> a region, behind its mention; <image> once an image, or nowhere
    answer      text: an option's letter, a number, a camera motion, or other text
and, where known (else null or absent):
    depths      ["depth/a.png" or null, ...], one an image: 16-bit PNG of its size, millimetres, 0 is unknown
    intrinsics  [[fx, fy, cx, cy] or null, ...] in pixels, one an image
    regions     [[image index, [x0, y0, x1, y1]], ...] in pixels inside the image, one a <mask>
    objects     {mention: [x, y, z]} metres, camera frame; of several views {mention: {"0": [x, y, z], ...}}
    names {mention: name}, sizes {mention: [w, h, l]}, frame (index of the view asked for), task, rationale
SFT needs a rationale in each lor and dtr row; RL and eval need none, so here a row without is a
good one.
"""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image

from data.marks import DepthMap, Marked
from data.mixture import parts
from data.rows import RELATIVE, Bad, Row, broken, estimated, first_byte, matches, metric, records
from data.sets.ca1m import ca1m_rows
from data.sets.llava import llava_rows
from data.sets.omni3d import omni3d_rows
from data.sets.refcoco import refcoco_rows
from data.sets.spar import spar_rows
from data.sets.spar_marks import MARKS
from data.sets.spatialrgpt import spatialrgpt_rows
from data.sets.srreal import srreal_rows
from errors import UserError
from srreal import PATHS, Example


class BadRows(UserError, ValueError):
    """Rows that cannot be used: `.rows` holds (file, row, field, reason) of each, rows counted from
    1."""

    rows = property(lambda self: self.args[0])

    def __str__(self):
        lines = (f"{file}:{row}: {field}: {reason}" for file, row, field, reason in self.rows)
        return "\n".join([f"{len({row[:2] for row in self.rows})} rows cannot be used:", *lines])


def say(text: str) -> None:
    """Once, not on each of torchrun's ranks."""
    if os.environ.get("RANK", "0") == "0":
        print(text)


def load(sources: Iterable, skip_bad_rows: bool = False, more=None) -> list[Example]:
    """The Examples of all sources, in order. Bad rows raise BadRows, or are counted, printed and
    left out.

    more: Example -> [(field, reason)], what else makes a row unusable where it is wanted."""
    sources = [sources] if isinstance(sources, (str, Path)) else sources
    wanted = [part for source in sources for part in parts(str(source))]
    taken = [(part, row) for part in wanted for row in part.share(open_source(part.source))]
    with ThreadPoolExecutor() as pool:
        looked = pool.map(
            lambda pair: pair[1].files() if callable(pair[1].files) else pair[1].files, taken
        )
        sizes = measure(list(dict.fromkeys(file for files in looked for file in files)))
    good, bad, ids, used = [], [], set(), {part.source: 0 for part in wanted}
    with ThreadPoolExecutor() as pool:  # for what is looked up in depth maps
        made = pool.map(lambda pair: examples_of(*pair, sizes), taken)
        for (part, row), (examples, reasons) in zip(taken, made, strict=True):
            reasons = reasons + [reason for e in examples for reason in check(e, sizes, ids)]
            reasons = reasons or [reason for e in examples for reason in (more(e) if more else ())]
            bad += [(row.file, row.number, *reason) for reason in dict.fromkeys(reasons)]
            good += [] if reasons else examples
            used[part.source] += len(examples) + len(reasons)
    # a row's notes are its own, or its set's
    noted = {}
    for part, notes in {
        id(row.notes): (part, row.notes) for part, row in taken if row.notes
    }.values():
        noted.setdefault(part.source, Counter()).update(notes)
    for source, notes in noted.items():
        say(f"{source}: " + ", ".join(f"{count} {note}" for note, count in notes.most_common()))
    if unused := [source for source, count in used.items() if not count]:
        say(f"nothing was taken of {', '.join(unused)}")
    if bad and not (skip_bad_rows and good):
        raise BadRows(bad)
    if bad:
        kinds = Counter(
            f"{field}: {reason.partition(':')[0]}" for *_, field, reason in bad
        ).most_common()
        why = "; ".join(f"{count} x {kind}" for kind, count in kinds)
        say(f"skipped {len({row[:2] for row in bad})} of {len(taken)} rows: {why}")
    return good


def examples_of(part, row: Row, sizes: dict) -> tuple[list[Example], list]:
    """(the Examples on the path that is wanted, why there are none)."""
    try:
        made = (e for e in row.make(sizes) if (part.path or row.path) in (None, e.path))
        return [metric(e, sizes, row.notes) for e in made], []
    except Bad as error:
        return [], error.args[0]


def open_source(source: str) -> Iterator[Row]:
    kind, colon, path = source.partition(":")
    # what exists as a path is not taken apart
    if not colon or os.path.exists(source):
        kind, path = None, source
    elif kind not in SOURCES:
        raise ValueError(f"unknown kind {kind!r} in {source!r}: one of {', '.join(SOURCES)}")
    file, _, root = (
        path.rpartition("@") if "@" in path and not os.path.exists(path) else (path, "", None)
    )
    if kind == "srreal" and os.path.isfile(os.path.join(file, "rows.jsonl")):
        # what data.coldstart writes is of our format
        kind = "scenes"
    if not os.path.exists(file):
        raise FileNotFoundError(f"no such file or folder: {file} (of source {source!r})")
    if root is not None and not os.path.isdir(root):
        raise FileNotFoundError(
            f"no such folder of images: {root} (what stands behind the @ of {source!r})"
        )
    return SOURCES[kind or recognise(Path(file))](Path(file), root and os.path.abspath(root))


def recognise(path: Path) -> str:
    """The kind of a path that says none, by its files' names and the first row's fields."""
    if path.is_dir():
        marks = {
            "rows.jsonl": "scenes",
            "qa_jsonl": "spar",
            "**/qa_jsonl": "spar",
            "**/*.wide": "ca1m",
            "**/*.parquet": "refcoco",
        }
        if kind := next((kind for mark, kind in marks.items() if any(path.glob(mark))), None):
            return kind
        path = next((file for file in sorted(path.rglob("*.json*")) if file.is_file()), path)
    if path.suffix == ".parquet":
        return "refcoco"
    if path.suffix not in (".json", ".jsonl"):
        raise FileNotFoundError(
            f"{path}: neither a folder with rows.jsonl (a whole set) nor a .json or .jsonl file"
        )
    if not first_byte(path):
        return "llava"  # its reader names an empty file
    if path.suffix == ".json" and first_byte(path) == b"{":
        with open(path, errors="replace") as file:
            start = file.read(4096)
        if '"conversations"' not in start:  # else it is a single row
            return "spar" if '"annotation"' in start else "omni3d"
    row = next((row for _, row in records(path) if isinstance(row, dict)), {})
    if "conversations" in row and "</think>" in str(row["conversations"]):
        # read as llava, its path would be direct
        return "srreal"
    return next((kind for kind, *fields in FIELDS_OF if row.keys() >= {*fields}), "scenes")


FIELDS_OF = [  # the first whose fields the row has
    ("spatialrgpt", "conversations", "filename"),
    *(("srreal", "conversations", own) for own in ("3d_pos", "cot", "main_frame_idx")),
    ("spar", "conversations", "type", "image"),
    *(("srreal", "conversations", mark) for mark in MARKS),
    ("llava", "conversations"),
    ("refcoco", "bbox", "answer"),
]

# ---- our own format
XYZ, FOUR = tuple[float, float, float], tuple[float, float, float, float]
REQUIRED = {"id": str, "path": str, "images": list[str], "question": str, "answer": str}
FIELDS = REQUIRED | {  # a tuple is a JSON list of just these
    "depths": list[str | None],
    "intrinsics": list[FOUR | None],
    "regions": list[tuple[int, FOUR]],
    "objects": dict[str, XYZ] | dict[str, dict[str, XYZ]],
    "frame": int,
    "task": str,
    "rationale": str,
    "names": dict[str, str],
    "sizes": dict[str, XYZ],
}


def own_rows(path: Path, root: str | None) -> Iterator[Row]:
    file = path / "rows.jsonl" if path.is_dir() else path
    if file.suffix != ".jsonl" or not file.is_file():
        raise FileNotFoundError(
            f"{path}: neither a folder with rows.jsonl (a whole set) nor a .jsonl file"
        )
    for number, row in records(file):
        try:
            if isinstance(row, Bad):
                raise row
            e = own_row(row, os.path.abspath(root or file.parent))
            files = tuple(f for f in (*e.images, *(e.depths or ())) if f)
            yield Row(str(file), number, e.id, lambda sizes, e=e: [e], files)
        except Bad as error:
            yield broken(file, number, error)


def own_row(row: dict, base: str) -> Example:
    row, what = {k: v for k, v in row.items() if v is not None}, {"answer": "unknown answer kind"}
    bad = [(name, "missing") for name in REQUIRED if name not in row]
    bad += [(ascii(name)[1:-1], "unknown field") for name in row if name not in FIELDS]
    wrong = [name for name in FIELDS if name in row and not matches(row[name], FIELDS[name])]
    bad += [
        (name, f"{what.get(name, 'wrong type or value')}: {row[name]!r:.50} not {FIELDS[name]}")
        for name in wrong
    ]
    if bad:
        raise Bad(bad)
    row["images"] = [os.path.join(base, file) for file in row["images"]]
    named = [
        file and os.path.join(base, file)
        for file in row.get("depths") or [None] * len(row["images"])
    ]
    depths = [file or estimated(image) for file, image in zip(named, row["images"], strict=False)]
    depths += named[len(depths) :]  # of another count: check names it
    row["depths"] = depths if any(depths) else None
    row["intrinsics"] = [k and tuple(k) for k in row.get("intrinsics", ())] or None
    row["regions"] = [(image, tuple(box)) for image, box in row.get("regions", ())]
    row["sizes"] = {mention: tuple(size) for mention, size in row.get("sizes", {}).items()} or None
    # another key stays as it is, for check to name
    views = {str(k): k for k in range(len(row["images"]))}
    for mention, truth in row.get("objects", {}).items():
        by_view = isinstance(truth, dict) and {
            views.get(k, k): tuple(xyz) for k, xyz in truth.items()
        }
        row["objects"][mention] = by_view or tuple(truth)
    return Example(**row)


SOURCES = {
    "scenes": own_rows,
    "srreal": srreal_rows,
    "spar": spar_rows,
    "spatialrgpt": spatialrgpt_rows,
    "omni3d": omni3d_rows,
    "ca1m": ca1m_rows,
    "refcoco": refcoco_rows,
    "llava": llava_rows,
}

# ---- what every Example has to hold, whatever its source
# would end a turn, or stand for an image
CONTROL = re.compile(r"<\|(?!(?:object_ref|box|quad)_)\w+\|>")


def size_of(image, sizes: dict) -> tuple | str:
    """(W, H), or what is wrong with its file. A DepthMap has its image's size."""
    file = image.source if isinstance(image, Marked | DepthMap) else image
    if isinstance(file, str) and (isinstance(sizes[file], str) or not isinstance(image, DepthMap)):
        return sizes[file] if isinstance(sizes[file], str) else sizes[file][:2]
    return image.shape[::-1] if isinstance(image, np.ndarray) else image.size


def check(e: Example, sizes: dict, ids: set) -> list:
    """(field, reason) of all that makes it unusable. sizes: file -> (W, H, mode), or what is
    wrong."""
    shapes = [size_of(image, sizes) for image in e.images]
    depths = [
        (size_of(depth, sizes), size)
        for depth, size in zip(e.depths or (), shapes, strict=False)
        if depth is not None
    ]
    files = [depth.source if isinstance(depth, DepthMap) else depth for depth in e.depths or ()]
    modes = [sizes[f][2] for f in files if isinstance(f, str) and not isinstance(sizes[f], str)]
    count, masks, places = len(shapes), e.question.count("<mask>"), e.question.count("<image>")
    rules = [
        ((e.id, e.path) in ids, "id", f"duplicate: {e.id} on path {e.path}"),
        (e.path not in PATHS, "path", f"unknown path: {e.path!r}, not one of {', '.join(PATHS)}"),
        (not e.answer.strip(), "answer", f"unknown answer kind: {e.answer!r}"),
        *(
            (CONTROL.search(text or ""), name, f"control token: {CONTROL.findall(text or '')[:1]}")
            for name, text in (
                ("question", e.question),
                ("answer", e.answer),
                ("rationale", e.rationale),
            )
        ),
        *(
            ("<mask>" in (text or ""), name, "<mask>: only a question has regions")
            for name, text in (("answer", e.answer), ("rationale", e.rationale))
        ),
        (not shapes, "images", "no image"),
        *((isinstance(size, str), "images", size) for size in shapes),
        # Qwen-VL's processor's limit
        *(
            (max(size) > 200 * min(size), "images", f"too long and thin: {size}")
            for size in shapes
            if not isinstance(size, str)
        ),
        *((isinstance(found, str), "depths", found) for found, _ in depths),
        *(
            (found != size, "depths", f"wrong size: {found}, not {size}")
            for found, size in depths
            if not isinstance(found, str) and not isinstance(size, str)
        ),
        *(
            (not mode.startswith("I"), "depths", f"wrong mode: {mode}, not a 16-bit PNG")
            for mode in modes
        ),
        (masks != len(e.regions), "regions", f"<mask> count: {masks} for {len(e.regions)} regions"),
        (places not in (0, count), "question", f"<image> count: {places} for {count} images"),
        *(
            (len(v) != count, name, f"wrong count: {len(v)} for {count} images")
            for name, v in (("depths", e.depths), ("intrinsics", e.intrinsics))
            if v is not None
        ),
        *(
            (
                not (all(map(math.isfinite, k)) and min(k[:2]) > 0),
                "intrinsics",
                f"not finite and positive: {k}",
            )
            for k in e.intrinsics or ()
            if k is not None
        ),
        *(
            (
                not (all(map(math.isfinite, size)) and min(size) > 0),
                "sizes",
                f"not finite and positive: {name}: {size}",
            )
            for name, size in (e.sizes or {}).items()
            if size
        ),
        (
            e.frame is not None and not 0 <= e.frame < count,
            "frame",
            f"no such view: {e.frame} of {count}",
        ),
    ]
    by_view = [truth for truth in e.objects.values() if isinstance(truth, dict)]
    plain, dtr = len(by_view) < len(e.objects), e.path == "dtr"
    rules += [
        (plain and by_view, "objects", "some by view, some not"),
        (dtr and plain and count > 1 and e.frame is None, "objects", f"in which of {count} views?"),
        (
            dtr
            and by_view
            and e.frame is not None
            and not any(e.frame in views for views in by_view),
            "objects",
            f"none has a centre in the view asked for: {e.frame}",
        ),
    ]
    for mention, truth in e.objects.items():
        views = truth if isinstance(truth, dict) else {0: truth}
        finite = all(len(xyz) == 3 and all(map(math.isfinite, xyz)) for xyz in views.values())
        rules += [
            (not finite, "objects", f"not finite: {mention}: {truth}"),
            (
                finite and any(abs(v) > 1000 for xyz in views.values() for v in xyz),
                "objects",
                f"farther than 1000 m, so in millimetres?: {mention}: {truth}",
            ),
            (
                not all(k in range(count) for k in views),
                "objects",
                f"no such view: {mention}: {truth}",
            ),
        ]
    ids.add((e.id, e.path))
    regions = [wrong_region(region, shapes[k] if 0 <= k < count else k) for k, region in e.regions]
    return [rule[1:] for rule in rules if rule[0]] + [
        ("regions", reason) for reason in regions if reason
    ]


def wrong_region(region, size) -> str | None:
    if not isinstance(size, tuple):
        return f"no such image: {size}" if isinstance(size, int) else None
    if isinstance(region, np.ndarray):
        return (
            None
            if region.shape == size[::-1] and region.any()
            else f"empty or odd mask: {region.shape}"
        )
    x0, y0, x1, y1 = region
    if not (x0 < x1 and y0 < y1):  # so is nan
        return f"empty: {region}"
    if max(region) <= 1 < min(size):
        return f"in fractions of the image, not pixels?: {region}"
    if min(x0, y0) >= 0 and x1 <= size[0] and y1 <= size[1]:
        return None
    maybe = " (or in 1/1000 of it, not pixels?)" if min(region) >= 0 and max(region) <= 1000 else ""
    return f"outside its image: {region}, of {size}{maybe}"


def probe(file: str, decode: bool) -> tuple | str:
    try:
        with Image.open(file) as image:
            if decode:
                image.load()
            if decode and image.mode.startswith("I") and 0 < image.getextrema()[1] < 100:
                return f"depth in metres, not millimetres?: {file}: at most {image.getextrema()[1]}"
            return *image.size, RELATIVE if image.info.get("kind") == RELATIVE else image.mode
    except FileNotFoundError:
        return f"missing file: {file} (kind:path@image_root says where the images of a set lie)"
    except Exception as error:  # Pillow raises all sorts on bad bytes
        return f"corrupt file: {file}: {error}"


def remembered(cache: Path) -> dict:
    """file -> [bytes, time, W, H, mode]; nothing where the cache is damaged, or of another
    version."""
    with suppress(OSError, ValueError, RecursionError):
        known = json.loads(cache.read_text())
        if matches(known, dict[str, tuple[int, int, int, int, str]]):
            return known
    return {}


def measure(files: list, decoded: int = 20_000) -> dict:
    """file -> (W, H, mode), or what is wrong with it. Decodes the first new ones, remembers the
    sound."""
    cache = Path(
        os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "sr-real", "images.json"
    )
    known = remembered(cache)
    stamps = {
        file: [(s := os.stat(file)).st_size, s.st_mtime_ns]
        for file in files
        if os.path.isfile(file)
    }
    sizes = {
        file: tuple(known[file][2:]) for file in stamps if known.get(file, [])[:2] == stamps[file]
    }
    fresh = [file for file in files if file not in sizes]
    # Pillow decodes outside of Python's lock
    with ThreadPoolExecutor() as pool:
        sizes |= zip(
            fresh, pool.map(probe, fresh, [k < decoded for k in range(len(fresh))]), strict=True
        )
    known |= {f: [*stamps[f], *sizes[f]] for f in fresh[:decoded] if type(sizes[f]) is tuple}
    with suppress(OSError):  # no home to write to: no cache
        cache.parent.mkdir(parents=True, exist_ok=True)
        (aside := cache.with_suffix(f".{os.getpid()}")).write_text(json.dumps(known))
        # whole or not at all, also under many ranks
        os.replace(aside, cache)
    return sizes
