"""Where Examples come from: `load(sources)` reads and checks them, or lists every row that cannot be used.

A source is a path, `kind:path`, or `kind:path@image_root` where the images lie elsewhere; a plain path is of
kind `scenes`, our own format. A new kind is one file with a generator and one line in SOURCES: from (path,
image root or None) it yields (file, row number, Example or list of (field, reason)).

Our own format: a folder with rows.jsonl, or a .jsonl file; one JSON object a line, paths relative to it:
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
SFT needs a rationale in each lor and dtr row; RL and eval need none, so here a row without is a good one.
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
from types import NoneType, UnionType

import numpy as np
from PIL import Image

from srreal import PATHS, Example


class BadRows(ValueError):
    """Rows that cannot be used: `.rows` holds (file, row, field, reason) of each, rows counted from 1."""
    rows = property(lambda self: self.args[0])

    def __str__(self):
        lines = (f"{file}:{row}: {field}: {reason}" for file, row, field, reason in self.rows)
        return "\n".join([f"{len({row[:2] for row in self.rows})} rows cannot be used:", *lines])

def load(sources: Iterable, skip_bad_rows: bool = False) -> list[Example]:
    """The Examples of all sources, in order. Bad rows raise BadRows, or are counted, printed and left out."""
    sources = [sources] if isinstance(sources, (str, Path)) else sources
    read = [item for source in sources for item in open_source(str(source))]
    files = (file for *_, e in read if isinstance(e, Example) for file in (*e.images, *(e.depths or ())))
    sizes = measure([file for file in dict.fromkeys(files) if isinstance(file, str)])
    good, bad, ids = [], [], set()
    for file, row, item in read:
        reasons = item if isinstance(item, list) else check(item, sizes, ids)
        bad += [(file, row, *reason) for reason in reasons]
        good += [] if reasons else [item]
    if bad and not (skip_bad_rows and good):
        raise BadRows(bad)
    if bad:
        kinds = Counter(f"{field}: {reason.partition(':')[0]}" for *_, field, reason in bad).most_common()
        why = "; ".join(f"{count} x {kind}" for kind, count in kinds)
        print(f"skipped {len(read) - len(good)} of {len(read)} rows: {why}")
    return good

def open_source(source: str) -> Iterator:
    kind, colon, path = source.partition(":")
    if not colon or os.path.exists(source):                   # what exists as a path is not taken apart
        kind, path = "scenes", source
    if kind not in SOURCES:
        raise ValueError(f"unknown kind {kind!r} in {source!r}: one of {', '.join(SOURCES)}")
    file, _, root = path.rpartition("@") if "@" in path and not os.path.exists(path) else (path, "", None)
    if not os.path.exists(file):
        raise FileNotFoundError(f"no such file or folder: {file} (of source {source!r})")
    return SOURCES[kind](Path(file), root)

# ---- our own format
XYZ, FOUR = tuple[float, float, float], tuple[float, float, float, float]
REQUIRED = {"id": str, "path": str, "images": list[str], "question": str, "answer": str}
FIELDS = REQUIRED | {  # a tuple is a JSON list of just these
    "depths": list[str | None], "intrinsics": list[FOUR | None], "regions": list[tuple[int, FOUR]],
    "objects": dict[str, XYZ] | dict[str, dict[str, XYZ]], "frame": int, "task": str, "rationale": str,
    "names": dict[str, str], "sizes": dict[str, XYZ]}

def matches(value, hint) -> bool:
    if hint is str:                                           # half a surrogate pair can't be encoded again
        return type(value) is str and value != "" and not re.search("[\ud800-\udfff]", value)
    if hint in (int, float, NoneType):                        # an int may be too large for a float
        return type(value) is hint or hint is float and type(value) is int and abs(value) < 1e18
    if isinstance(hint, UnionType):
        return any(matches(value, one) for one in hint.__args__)
    kind, inner = hint.__origin__, hint.__args__
    if kind is dict:
        return isinstance(value, dict) and all(matches([*pair], tuple[inner]) for pair in value.items())
    inner = inner * len(value) if kind is list and isinstance(value, list) else inner   # JSON has no tuples
    return isinstance(value, list) and len(value) == len(inner) and all(map(matches, value, inner))

def own_rows(path: Path, root: str | None) -> Iterator:
    file, number = path / "rows.jsonl" if path.is_dir() else path, 0
    if file.suffix != ".jsonl" or not file.is_file():
        raise FileNotFoundError(f"{path}: neither a folder with rows.jsonl (a whole set) nor a .jsonl file")
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                yield str(file), number, own_row(json.loads(line), os.path.abspath(root or file.parent))
            except (ValueError, OverflowError, RecursionError) as error:    # no JSON, no UTF-8, or too deep
                yield str(file), number, [("row", f"unreadable: {error}")]
    if not number:
        yield str(file), 0, [("row", "empty file")]

def own_row(row, base: str) -> Example | list:
    if not isinstance(row, dict):
        return [("row", f"wrong type: {row!r:.60} is no JSON object")]
    row, what = {k: v for k, v in row.items() if v is not None}, {"answer": "unknown answer kind"}
    bad = [(name, "missing") for name in REQUIRED if name not in row]
    bad += [(ascii(name)[1:-1], "unknown field") for name in row if name not in FIELDS]
    wrong = [name for name in FIELDS if name in row and not matches(row[name], FIELDS[name])]
    bad += [(name, f"{what.get(name, 'wrong type or value')}: {row[name]!r:.50} not {FIELDS[name]}")
            for name in wrong]
    if bad:
        return bad
    row["images"] = [os.path.join(base, file) for file in row["images"]]
    row["depths"] = [file and os.path.join(base, file) for file in row.get("depths", ())] or None
    row["intrinsics"] = [k and tuple(k) for k in row.get("intrinsics", ())] or None
    row["regions"] = [(image, tuple(box)) for image, box in row.get("regions", ())]
    views = {str(k): k for k in range(len(row["images"]))}    # another key stays as it is, for check to name
    for mention, truth in row.get("objects", {}).items():
        by_view = isinstance(truth, dict) and {views.get(k, k): tuple(xyz) for k, xyz in truth.items()}
        row["objects"][mention] = by_view or tuple(truth)
    return Example(**row)

SOURCES = {"scenes": own_rows}

# ---- what every Example has to hold, whatever its source
def size_of(image, sizes: dict) -> tuple | str:
    if isinstance(image, str):
        return sizes[image] if isinstance(sizes[image], str) else sizes[image][:2]
    return image.shape[::-1] if isinstance(image, np.ndarray) else image.size

def check(e: Example, sizes: dict, ids: set) -> list:
    """(field, reason) of all that makes it unusable. sizes: file -> (W, H, mode), or what is wrong."""
    shapes = [size_of(image, sizes) for image in e.images]
    depths = [(size_of(depth, sizes), size) for depth, size in zip(e.depths or (), shapes, strict=False)
              if depth is not None]
    modes = [sizes[depth][2] for depth in e.depths or ()
             if isinstance(depth, str) and not isinstance(sizes[depth], str)]
    count, masks, places = len(shapes), e.question.count("<mask>"), e.question.count("<image>")
    rules = [
        ((e.id, e.path) in ids, "id", f"duplicate: {e.id} on path {e.path}"),
        (e.path not in PATHS, "path", f"unknown path: {e.path!r}, not one of {', '.join(PATHS)}"),
        (not e.answer.strip(), "answer", f"unknown answer kind: {e.answer!r}"),
        (not shapes, "images", "no image"),
        *((isinstance(size, str), "images", size) for size in shapes),
        *((isinstance(found, str), "depths", found) for found, _ in depths),
        *((found != size, "depths", f"wrong size: {found}, not {size}")
          for found, size in depths if not isinstance(found, str) and not isinstance(size, str)),
        *((not mode.startswith("I"), "depths", f"wrong mode: {mode}, not a 16-bit PNG") for mode in modes),
        (masks != len(e.regions), "regions", f"<mask> count: {masks} for {len(e.regions)} regions"),
        (places not in (0, count), "question", f"<image> count: {places} for {count} images"),
        *((len(v) != count, name, f"wrong count: {len(v)} for {count} images")
          for name, v in (("depths", e.depths), ("intrinsics", e.intrinsics)) if v is not None),
        *((not (all(map(math.isfinite, k)) and min(k[:2]) > 0), "intrinsics", f"not finite and positive: {k}")
          for k in e.intrinsics or () if k is not None),
        *((not (all(map(math.isfinite, size)) and min(size) > 0), "sizes",
           f"not finite and positive: {name}: {size}") for name, size in (e.sizes or {}).items() if size),
        (e.frame is not None and not 0 <= e.frame < count, "frame", f"no such view: {e.frame} of {count}")]
    by_view = [truth for truth in e.objects.values() if isinstance(truth, dict)]
    plain, dtr = len(by_view) < len(e.objects), e.path == "dtr"
    rules += [(plain and by_view, "objects", "some by view, some not"),
              (dtr and plain and count > 1 and e.frame is None, "objects", f"in which of {count} views?"),
              (dtr and by_view and e.frame is not None and not any(e.frame in views for views in by_view),
               "objects", f"none has a centre in the view asked for: {e.frame}")]
    for mention, truth in e.objects.items():
        views = truth if isinstance(truth, dict) else {0: truth}
        finite = all(len(xyz) == 3 and all(map(math.isfinite, xyz)) for xyz in views.values())
        rules += [(not finite, "objects", f"not finite: {mention}: {truth}"),
                  (not all(k in range(count) for k in views), "objects", f"no such view: {mention}: {truth}")]
    ids.add((e.id, e.path))
    regions = [wrong_region(region, shapes[k] if 0 <= k < count else k) for k, region in e.regions]
    return [rule[1:] for rule in rules if rule[0]] + [("regions", reason) for reason in regions if reason]

def wrong_region(region, size) -> str | None:
    if not isinstance(size, tuple):
        return f"no such image: {size}" if isinstance(size, int) else None
    if isinstance(region, np.ndarray):
        return None if region.shape == size[::-1] and region.any() else f"empty or odd mask: {region.shape}"
    x0, y0, x1, y1 = region
    if not (x0 < x1 and y0 < y1):                             # so is nan
        return f"empty: {region}"
    inside = min(x0, y0) >= 0 and x1 <= size[0] and y1 <= size[1]
    return None if inside else f"outside its image: {region}, of {size}"

def probe(file: str, decode: bool) -> tuple | str:
    try:
        with Image.open(file) as image:
            if decode:
                image.load()
            return *image.size, image.mode
    except FileNotFoundError:
        return f"missing file: {file}"
    except Exception as error:                                # Pillow raises all sorts on bad bytes
        return f"corrupt file: {file}: {error}"

def remembered(cache: Path) -> dict:
    """file -> [bytes, time, W, H, mode]; nothing where the cache is damaged, or of another version."""
    with suppress(OSError, ValueError, RecursionError):
        known = json.loads(cache.read_text())
        if matches(known, dict[str, tuple[int, int, int, int, str]]):
            return known
    return {}

def measure(files: list, decoded: int = 20_000) -> dict:
    """file -> (W, H, mode), or what is wrong with it. Decodes the first new ones, remembers the sound."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "sr-real", "images.json")
    known = remembered(cache)
    stamps = {file: [(s := os.stat(file)).st_size, s.st_mtime_ns] for file in files if os.path.isfile(file)}
    sizes = {file: tuple(known[file][2:]) for file in stamps if known.get(file, [])[:2] == stamps[file]}
    fresh = [file for file in files if file not in sizes]
    with ThreadPoolExecutor() as pool:                        # Pillow decodes outside of Python's lock
        sizes |= zip(fresh, pool.map(probe, fresh, [k < decoded for k in range(len(fresh))]), strict=True)
    known |= {f: [*stamps[f], *sizes[f]] for f in fresh[:decoded] if type(sizes[f]) is tuple}
    with suppress(OSError):                                   # no home to write to: no cache
        cache.parent.mkdir(parents=True, exist_ok=True)
        (aside := cache.with_suffix(f".{os.getpid()}")).write_text(json.dumps(known))
        os.replace(aside, cache)                              # whole or not at all, also under many ranks
    return sizes
