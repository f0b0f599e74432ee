"""What makes a row unusable, whatever its source: `check` finds it, with its images' headers."""

import math
import re
from difflib import SequenceMatcher
from zlib import crc32

import numpy as np

import latex
from data.geometry import check_geometry
from data.marks import DepthMap, Marked
from data.rows import Header, Headers, file_of
from data.sets.spar_marks import PHRASE
from mentions import object_of, without_closing_marks
from pictures import BadPicture, on_its_side, picture_size
from srreal import PATHS, Example, truth_kind

# A chat template's token would end a turn, or stand for an image; boxes may be written in them.
CONTROL = re.compile(r"<\|(?!(?:object_ref|box|quad)_)\w+\|>")
# Centres are compared with depth maps, which have to be decoded for it, in all rows of sets of so
# many files, and in as large a share of the rows of larger ones.
COMPARED = 400
LARGEST = 100  # metres of an object


def check(example: Example, headers: Headers) -> list[tuple[str, str]]:
    """Return (field, reason) of all that makes an Example unusable by itself."""
    sizes = [size_of(image, headers) for image in example.images]
    problems = [*check_texts(example)]
    problems += check_images(example, sizes)
    problems += check_depths(example, sizes, headers)
    problems += check_numbers(example)
    problems += check_views(example)
    for mention, truth in example.objects.items():
        problems += check_object(mention, truth, len(sizes))
    problems += check_regions(example, sizes)
    # Another image or a missing region would only be named a second time.
    if not problems:
        problems += check_mentions(example)
        with_depth = crc32(example.id.encode()) * len(headers) <= COMPARED * 2**32
        problems += check_geometry(example, sizes, with_depth)
    return problems


# ---- checks: each yields (field, reason) of what it finds


def size_of(image, headers: Headers) -> tuple[int, int] | str:
    """Return (width, height) of an image or depth map, or what is wrong with its file."""
    file = image.source if isinstance(image, Marked | DepthMap) else image
    header = headers.get(file) if isinstance(file, str) else None
    if isinstance(header, str):
        return header
    if isinstance(image, np.ndarray):
        return image.shape[::-1]
    # A DepthMap has its image's size, whatever its file's.
    if isinstance(image, DepthMap):
        return image.size
    if header is not None:
        return header[:2]
    try:
        return picture_size(image)
    except BadPicture as error:
        return f"corrupt file: {error}"


def check_texts(example):
    if example.path not in PATHS:
        yield "path", f"unknown path: {example.path!r}, not one of {', '.join(PATHS)}"
    if not example.answer.strip():
        yield "answer", f"unknown answer kind: {example.answer!r}"
    is_latex = latex.is_latex(example.answer) and truth_kind(example.answer) == "text"
    if is_latex and not latex.is_installed():
        reason = "LaTeX, which math-verify compares (pip install math-verify)"
        yield "answer", f"{reason}: {example.answer!r:.60}"
    for field in ("question", "answer", "rationale"):
        text = getattr(example, field) or ""
        tokens = CONTROL.findall(text)
        if tokens:
            yield field, f"control token: {tokens[:1]}"
        if field != "question" and "<mask>" in text:
            yield field, "<mask>: only a question has regions"
    count = len(example.images)
    places = example.question.count("<image>")
    if places not in (0, count):
        yield "question", f"<image> count: {places} for {count} images"


def check_images(example, sizes):
    # Text alone keeps a model from forgetting; a path that reasons about an image needs one.
    if not sizes and example.path != "direct":
        yield "images", f"no image, on path {example.path}"
    for size in sizes:
        if isinstance(size, str):
            yield "images", size
        # The limit of Qwen-VL's processor.
        elif max(size) > 200 * min(size):
            yield "images", f"too long and thin: {size}"


def check_depths(example, sizes, headers):
    if example.depths is None:
        return
    if len(example.depths) != len(sizes):
        yield "depths", f"wrong count: {len(example.depths)} for {len(sizes)} images"
    for depth, size in zip(example.depths, sizes, strict=False):
        if depth is None:
            continue
        found = size_of(depth, headers)
        if isinstance(found, str):
            yield "depths", found
        elif not isinstance(size, str) and found != size:
            yield "depths", f"wrong size: {found}, not {size}{on_its_side(found, size)}"
    # Arrays and maps whose file can't be read have no mode.
    for depth in example.depths:
        file = file_of(depth)
        header = headers[file] if isinstance(file, str) else None
        if isinstance(header, Header) and not header.mode.startswith("I"):
            yield "depths", f"wrong mode: {header.mode}, not a 16-bit PNG"


def check_numbers(example):
    """Check cameras, sizes of objects, and the view that is asked for."""
    count = len(example.images)
    if example.intrinsics is not None:
        if len(example.intrinsics) != count:
            yield "intrinsics", f"wrong count: {len(example.intrinsics)} for {count} images"
        for camera in example.intrinsics:
            if camera and not (is_finite(camera) and min(camera[:2]) > 0):
                yield "intrinsics", f"not finite and positive: {camera}"
    for mention, size in (example.sizes or {}).items():
        if size and not (is_finite(size) and min(size) > 0):
            yield "sizes", f"not finite and positive: {mention}: {size}"
        elif size and max(size) > LARGEST:
            yield "sizes", f"above {LARGEST} m, so in millimetres?: {mention}: {size}"
    if example.frame is not None and not 0 <= example.frame < count:
        yield "frame", f"no such view: {example.frame} of {count}"


def check_mentions(example):
    """Check that the question speaks of every object, and one region at least shows one."""
    if not example.objects:
        return
    for mention in example.objects:
        # An answer's mention stands in brackets of the answer's own, without blanks around it.
        if mention != mention.strip() or (mention[:1], mention[-1:]) == ("(", ")"):
            yield "objects", f"blanks or brackets around a mention: {mention!r}"
            return
    texts = example.question.split("<mask>")[:-1]
    if is_lone_mark(example, texts):
        return
    for mention in example.objects:
        if without_closing_marks(mention) not in example.question.lower():
            yield "objects", f"not in the question: {mention!r}{nearest_mention(mention, texts)}"
            return
    if texts and not any(object_of(text, example.objects) for text in texts):
        mention = next(iter(example.objects))
        reason = "of no region, as none stands before its <mask>"
        yield "objects", f"{reason}: {mention!r}{nearest_mention(mention, texts)}"


def is_lone_mark(example, texts):
    """Say whether SPAR's only mark is meant, which some questions name without its colour."""
    if len(texts) != 1 or len(example.objects) != 1 or PHRASE.search(example.question):
        return False
    (mention,) = example.objects
    return bool(PHRASE.fullmatch(mention) and object_of(texts[0], mention.split()[1:]))


def nearest_mention(mention, texts):
    """Return what to add: the words before a <mask> that are most like a mention."""
    count = len(mention.split())
    candidates = [" ".join(re.findall(r"\w+", text)[-count:]) for text in texts]
    likeness = {other: SequenceMatcher(None, mention, other).ratio() for other in candidates}
    if not likeness:
        return ""
    return f"; the nearest mention is {max(likeness, key=likeness.get)!r}"


def is_finite(values):
    return all(map(math.isfinite, values))


def check_views(example):
    """Check that it is clear which view each centre is of, and that dtr has one to detect."""
    truths = example.objects.values()
    by_view = [truth for truth in truths if isinstance(truth, dict)]
    # Plain: one centre, of the only view or of the frame that is asked for.
    has_plain = len(by_view) < len(truths)
    count = len(example.images)
    frame = example.frame
    if has_plain and by_view:
        yield "objects", "some by view, some not"
    if example.path != "dtr":
        return
    if has_plain and count > 1 and frame is None:
        yield "objects", f"in which of {count} views?"
    if by_view and frame is not None and not any(frame in views for views in by_view):
        yield "objects", f"none has a centre in the view asked for: {frame}"


def check_object(mention, truth, count):
    views = truth if isinstance(truth, dict) else {0: truth}
    centres = list(views.values())
    if not centres or not all(len(centre) == 3 and is_finite(centre) for centre in centres):
        yield "objects", f"not finite: {mention}: {truth}"
    elif np.abs(centres).max() > 1000:
        yield "objects", f"farther than 1000 m, so in millimetres?: {mention}: {truth}"
    if not all(view in range(count) for view in views):
        yield "objects", f"no such view: {mention}: {truth}"


def check_regions(example, sizes):
    masks = example.question.count("<mask>")
    if masks != len(example.regions):
        yield "regions", f"<mask> count: {masks} for {len(example.regions)} regions"
    for image, region in example.regions:
        if not 0 <= image < len(sizes):
            yield "regions", f"no such image: {image}"
            continue
        size = sizes[image]
        # An image that can't be read has been named already.
        if isinstance(size, str):
            continue
        if isinstance(region, np.ndarray):
            reason = wrong_mask(region, size)
        else:
            reason = wrong_box(region, size)
        if reason is not None:
            yield "regions", reason


def wrong_mask(mask, size):
    sides = mask.shape[::-1]
    if sides != size:
        return f"odd mask: {sides}, not {size}{on_its_side(sides, size)}"
    return None if mask.any() else f"empty mask: {sides}"


def wrong_box(box, size):
    x0, y0, x1, y1 = box
    # Not x0 >= x1: nan is neither.
    if not (x0 < x1 and y0 < y1):
        return f"empty: {box}"
    if max(box) <= 1 < min(size):
        return f"in fractions of the image, not pixels?: {box}"
    if min(x0, y0) >= 0 and x1 <= size[0] and y1 <= size[1]:
        return None
    reason = f"outside its image: {box}, of {size}"
    if min(box) >= 0 and max(box) <= 1000:
        reason += " (or in 1/1000 of it, not pixels?)"
    return reason
