r"""Ask one question about one image: both paths answer, and their points are drawn.

    python ask.py --model out/rl --image kitchen.jpg --region 40 60 210 300 --region 300 80 420 260
        --question "How far apart are the red bbox <mask> and the blue bbox <mask>?"

The k-th --region is the k-th <mask> of the question. Regions that the question has no <mask> for
are appended to it, each behind a name of its own, and drawn in that colour, also in the image that
the model sees. No depth, no camera and no region are needed; what was assumed in their place is
said. Answers are greedy unless --temperature says otherwise, as eval.py's are.

Prints each answer, and writes to --out

    ask.png    the image with regions, the centres that path dtr wrote (x) and the 3D head's boxes
               (dashed), and the same from above
    ask.json   question, as the model read it; assumed, a list of sentences; answers, a list of
               {model, path, text, answer, boxes, head, finished}

--compare puts another model beside the first. --depth-model estimates depth by any metric model of
transformers' (Apple's DepthPro, Depth Anything V2 metric).
"""

import itertools
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import flags
from errors import UserError
from flags import Count, Positive, PositiveOrZero, Seed, ShareAboveZero
from srreal import PATHS, Example, parse


@dataclass
class Config:
    model: str  # checkpoint directory, a run's directory, or hub id
    image: str  # file
    question: str  # where it says <mask>, the next --region stands
    # pixels x0 y0 x1 y1 of a region of the image; several: again
    region: tuple[tuple[PositiveOrZero, PositiveOrZero, PositiveOrZero, PositiveOrZero], ...] = ()
    depth: str | None = None  # a 16-bit PNG of the image's size, millimetres
    depth_model: str | None = None  # estimates the depth: a metric model's directory or hub id
    # fx fy cx cy in pixels of the image; None: a horizontal field of view of 60 degrees, with depth
    intrinsics: tuple[Positive, Positive, Positive, Positive] | None = None
    path: Literal[(*PATHS, "both")] = "both"  # how to ask; both: lor and dtr
    compare: str | None = None  # another model, asked the same
    # how the model reads a region; None: as it was trained to, text if it never was
    regions: Literal["token", "text"] | None = None
    temperature: PositiveOrZero = 0.0  # 0 is greedy
    top_p: ShareAboveZero = 1.0  # sample among the likeliest tokens of this probability; 1: all
    max_new_tokens: Count = 1024  # a longer answer is cut
    max_pixels: Count | None = None  # image size limit; None: the checkpoint's own
    seed: Seed = 0  # of the sampling noise
    out: str = "out/ask"  # gets ask.png and ask.json

    def __post_init__(self):
        flags.check(self)
        if self.depth and self.depth_model:
            raise UserError("--depth and --depth-model: one of them")


if __name__ == "__main__":
    # Before the imports that take seconds: --help and a wrong flag are answered at once.
    cfg = flags.parse(Config, __doc__)

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data.colours import COLOURS, colour_of
from data.geometry import project
from model.checkpoint import SpatialRecord
from model.files import resolve
from model.processor import Processor
from model.rollout import generate, predict_boxes
from pictures import read_metres, read_picture
from training import ranks, run
from training.policy import load_model

SIDE = 640  # pixels of the longer side of what is drawn
CELL = 4  # pixels of a cell of the view from above
NEAR = 0.05  # metres before the camera, from which on something is drawn
FARTHEST = 50  # metres that the view from above shows at most
FIELD_OF_VIEW = 60  # degrees, of a camera that isn't known


@dataclass
class Asked:
    """A question ready to be asked, and how its regions are called."""

    example: Example
    names: list[str]  # the mention of each region
    assumed: list[str]


# ---- The question


def prepare(cfg: Config, depth: np.ndarray | None = None) -> Asked:
    """Build the example: mentions for all regions, depth and camera as far as they are known."""
    image = read_picture(cfg.image)
    question, names, assumed = with_regions(cfg.question, len(cfg.region))
    for box in cfg.region:
        check_box(box, image.size)
    named = cfg.question.count("<mask>")
    image = with_marks(image, cfg.region[named:], names[named:])
    camera = cfg.intrinsics
    if depth is None and cfg.depth:
        depth = read_metres(cfg.depth).astype(np.float32)
        if depth.shape != image.size[::-1]:
            raise UserError(
                f"--depth {cfg.depth}: {depth.shape[1]} x {depth.shape[0]} pixels, the image has "
                f"{image.width} x {image.height}"
            )
    if depth is None:
        assumed.append("no depth: the model sees the image alone")
    elif camera is None:
        # tan(half the angle) is half the width over the focal length.
        focal = image.width / 2 / math.tan(math.radians(FIELD_OF_VIEW / 2))
        camera = (focal, focal, image.width / 2, image.height / 2)
        assumed.append(
            f"no intrinsics: a horizontal field of view of {FIELD_OF_VIEW} degrees, focal length "
            f"{focal:.0f} pixels"
        )
    example = Example(
        id="ask",
        path="direct",
        images=[image],
        question=question,
        answer="",
        depths=None if depth is None else [depth],
        intrinsics=None if camera is None else [camera],
        regions=[(0, box) for box in cfg.region],
    )
    return Asked(example, names, assumed)


def with_regions(question: str, regions: int) -> tuple[str, list[str], list[str]]:
    """Return the question with a <mask> a region, the region's mentions, and what was appended."""
    *before, _ = question.split("<mask>")
    if len(before) > regions:
        raise UserError(
            f"--question has {len(before)} <mask>, and there are {regions} --region x0 y0 x1 y1"
        )
    names = []
    for text in before:
        # "... the chair (red bbox " -> red bbox: the mention is what stands right before <mask>.
        words = re.findall(r"\w+", text)[-2:]
        names.append(" ".join(words) or "region")
    used = " ".join(names).lower().split()
    free = [colour for colour in COLOURS if colour not in used]
    missing = regions - len(before)
    if missing > len(free):
        raise UserError(f"{missing} regions without a name: at most {len(free)} get one")
    added = [f"{colour} bbox" for colour in free[:missing]]
    if not added:
        return question, names, []
    listed = ", ".join(f"{name} <mask>" for name in added)
    sentence = (
        f"the question has no <mask> for {missing} regions: appended, and drawn in the image, are "
        f"{', '.join(added)}"
    )
    return f"{question.rstrip()} ({listed})", names + added, [sentence]


def with_marks(image: Image.Image, boxes: Sequence[tuple], names: list[str]) -> Image.Image:
    """Return a copy with an outline of each box, in the colour of its name, as in training."""
    image = image.copy()
    pen = ImageDraw.Draw(image)
    for box, name in zip(boxes, names, strict=True):
        pen.rectangle(box, outline=colour_of(name), width=max(1, round(image.width / 128)))
    return image


def check_box(box: tuple, size: tuple[int, int]) -> None:
    """Raise UserError for a region that has no pixel of the image."""
    x0, y0, x1, y1 = box
    width, height = size
    if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
        raise UserError(
            f"--region {x0:g} {y0:g} {x1:g} {y1:g}: x0 < x1 and y0 < y1 in pixels of the image, "
            f"which has {width} x {height}"
        )


def estimate_depth(cfg: Config) -> np.ndarray | None:
    """Return the depth map that --depth-model sees in the image; None without one."""
    if not cfg.depth_model:
        return None
    from data import depth

    model, processor = depth.load_model(cfg.depth_model, "--depth-model")
    if depth.kind_of(model.config) != "metric":
        raise UserError(
            f"--depth-model {cfg.depth_model}: its depth is relative; take a metric one"
        )
    (found,) = depth.predict(model, processor, [read_picture(cfg.image)])
    return found.astype(np.float32)


# ---- The answers


def ask(source: str, asked: Asked, cfg: Config, device) -> list[dict]:
    """Return the answers of one model, a dict a path, as ask.json has them."""
    directory = resolve(source)
    record = SpatialRecord.read(directory)
    # An older checkpoint of ours has no record.
    unknown = "token" if record.trained is None else "text"
    regions = cfg.regions or record.regions or unknown
    if asked.example.regions and regions == "text" and not (cfg.regions or record.regions):
        asked.assumed.append(f"{source} never learnt to read regions: their boxes are written out")
    processor = Processor.from_pretrained(directory, max_pixels=cfg.max_pixels, regions=regions)
    model = load_model(str(directory), device, None, 0, regions)
    paths = ("lor", "dtr") if cfg.path == "both" else (cfg.path,)
    examples = [replace(asked.example, path=path) for path in paths]
    boxes = None
    if asked.example.regions and regions == "token":
        (boxes,) = predict_boxes(model, processor, examples[:1])
        # A head that never learnt would draw boxes anywhere.
        if record.trained is not None and "head3d" not in record.trained:
            boxes = None
            asked.assumed.append(f"{source} has a 3D head that never learnt: it isn't asked")
    answers = []
    for example, (rollout,) in zip(
        examples,
        generate(
            model,
            processor,
            examples,
            max_new_tokens=cfg.max_new_tokens,
            temperature=cfg.temperature,
            top_p=cfg.top_p,
            seed=cfg.seed,
        ),
        strict=True,
    ):
        parsed = parse(rollout.text, example.path)
        written = [dict(mention=m, name=n, centre=list(xyz)) for m, n, xyz in parsed.boxes]
        answers.append(
            dict(
                model=source,
                path=example.path,
                text=rollout.text,
                answer=parsed.answer,
                boxes=written,
                head=head_of(boxes, asked.names),
                finished=rollout.finished,
            )
        )
    return answers


def head_of(boxes, names: list[str]) -> list[dict] | None:
    """Return what the 3D head says of each region, in metres; None where it wasn't asked."""
    if boxes is None:
        return None
    found = []
    for name, centre, size in zip(names, *boxes, strict=True):
        found.append(dict(mention=name, centre=rounded(centre), size=rounded(size)))
    return found


def rounded(values: np.ndarray) -> list[float]:
    """Round metres to the millimetre."""
    return [round(float(value), 3) for value in values]


# ---- The picture


def corners(centre, size) -> np.ndarray:
    """Return the corners (8, 3) of a box (w, h, l) along the camera's axes."""
    # Corner i has the signs of i's three bits.
    signs = np.stack(np.unravel_index(np.arange(8), (2, 2, 2)), 1) - 0.5
    return np.asarray(centre) + signs * np.asarray(size)


# Corners that differ in one sign.
PAIRS = itertools.combinations(range(8), 2)
EDGES = [(a, b) for a, b in PAIRS if (a ^ b).bit_count() == 1]


def draw(asked: Asked, answers: list[dict]) -> Image.Image:
    """Draw the image with what was written about it, and beside it the view from above."""
    example = asked.example
    (image,) = example.images
    # Small images are drawn larger, so that labels fit.
    scale = SIDE / max(image.size)
    canvas = image.resize((round(image.width * scale), round(image.height * scale)))
    pen = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(size=14)
    for name, (_, box) in zip(asked.names, example.regions, strict=True):
        x0, y0, x1, y1 = (round(value * scale) for value in box)
        pen.rectangle((x0, y0, x1, y1), outline=colour_of(name), width=3)
        at = (x0 + 4, max(y0 - 19, 0))
        pen.rectangle(pen.textbbox(at, name, font=font), fill="white")
        pen.text(at, name, fill=colour_of(name), font=font)

    camera = example.intrinsics[0] if example.intrinsics else None
    if camera is not None:
        for answer in answers:
            for box in answer["head"] or ():
                draw_box(pen, box, camera, scale)
            for box in answer["boxes"]:
                point = project(box["centre"], camera, NEAR)
                if point is not None:
                    cross(pen, point[0] * scale, point[1] * scale, colour_of(box["mention"]))
    above = from_above(asked, answers, canvas.height)
    sheet = Image.new("RGB", (canvas.width + above.width + 12, canvas.height), "white")
    sheet.paste(canvas, (0, 0))
    sheet.paste(above, (canvas.width + 12, 0))
    return sheet


def cross(pen, x: float, y: float, colour, half: int = 7) -> None:
    # A white rim, to be seen on any ground.
    for width, shade in ((6, "white"), (3, colour)):
        pen.line((x - half, y - half, x + half, y + half), fill=shade, width=width)
        pen.line((x - half, y + half, x + half, y - half), fill=shade, width=width)


def draw_box(pen, box: dict, camera, scale: float) -> None:
    """Draw the edges of the 3D head's box that lie before the camera, dashed."""
    points = [project(corner, camera, NEAR) for corner in corners(box["centre"], box["size"])]
    for a, b in EDGES:
        if points[a] is None or points[b] is None:
            continue
        start = np.array(points[a]) * scale
        end = np.array(points[b]) * scale
        pieces = max(int(np.linalg.norm(end - start) / 8), 1)
        for piece in range(0, pieces, 2):
            begin = start + (end - start) * piece / pieces
            stop = start + (end - start) * min((piece + 1) / pieces, 1)
            pen.line((*begin, *stop), fill=colour_of(box["mention"]), width=2)


def from_above(asked: Asked, answers: list[dict], height: int) -> Image.Image:
    """Draw depth, centres and boxes from above, the camera at the bottom, over lines of metres."""
    example = asked.example
    points = []
    for answer in answers:
        points += [box["centre"] for box in answer["boxes"] + (answer["head"] or [])]
    depth = example.depths[0] if example.depths else None
    far = max([3.0] + [point[2] for point in points])
    if depth is not None:
        known = depth[(depth > 0) & np.isfinite(depth)]
        if known.size:
            # A quantile: one pixel through a window must not shrink the room.
            far = max(far, float(np.quantile(known, 0.98)))
    # A model may write any number, and each metre has its line.
    far = min(far, FARTHEST) + 0.3
    scale = height / far
    view = Image.new("RGB", (height, height), (245, 245, 245))

    def place(x: float, z: float) -> tuple[float, float]:
        return height / 2 + x * scale, height - z * scale

    if depth is not None:
        paint_depth(view, example, depth, place)
    pen = ImageDraw.Draw(view)
    font = ImageFont.load_default(size=12)
    for metre in range(1, int(far) + 1):
        _, y = place(0, metre)
        pen.line((0, y, height, y), fill=(215, 215, 215))
        pen.text((4, y + 1), f"{metre} m", fill=(110, 110, 110), font=font)
    for answer in answers:
        for box in answer["head"] or ():
            x, _, z = box["centre"]
            width, _, length = box["size"]
            left, top = place(x - width / 2, z + length / 2)
            right, bottom = place(x + width / 2, z - length / 2)
            colour = colour_of(box["mention"])
            pen.rectangle((left, top, right, bottom), outline=colour, width=2)
        for box in answer["boxes"]:
            x, _, z = box["centre"]
            cross(pen, *place(x, z), colour_of(box["mention"]))
    return view


def paint_depth(view: Image.Image, example: Example, depth: np.ndarray, place) -> None:
    """Paint each pixel of known depth where it lies, the floor first, faded."""
    (image,) = example.images
    fx, fy, cx, cy = example.intrinsics[0]
    rows, columns = np.indices(depth.shape)
    known = (depth > 0) & np.isfinite(depth)
    down = np.where(known, (rows - cy) * depth / fy, 0)
    # A ceiling would hide the room.
    known &= down > -0.2
    # The floor first: what stands on it is painted over it.
    order = np.argsort(-down[known])
    z = depth[known][order]
    x = (columns[known][order] - cx) * z / fx
    faded = np.asarray(image)[known][order] * 0.55 + 255 * 0.45
    # In cells, as far pixels lie apart.
    across, upwards = place(x, z)
    across = (across // CELL).astype(int)
    upwards = (upwards // CELL).astype(int)
    cells = np.array(view.reduce(CELL))
    height, width, _ = cells.shape
    inside = (across >= 0) & (across < width) & (upwards >= 0) & (upwards < height)
    # Of several pixels in a cell the last one stays: the highest, as they are in that order.
    cells[upwards[inside], across[inside]] = faded[inside].astype(np.uint8)
    painted = Image.fromarray(cells)
    painted = painted.resize((width * CELL, height * CELL), Image.NEAREST)
    view.paste(painted, (0, 0))


# ---- The command


def main(cfg: Config) -> dict:
    """Ask, print, write ask.png and ask.json; return what the latter holds."""
    _, _, device = ranks.start_ranks()
    depth = estimate_depth(cfg)
    asked = prepare(cfg, depth)
    answers = ask(cfg.model, asked, cfg, device)
    if cfg.compare:
        answers += ask(cfg.compare, asked, cfg, device)

    print(asked.example.question)
    for sentence in asked.assumed:
        print(f"(assumed: {sentence})")
    for answer in answers:
        name = f"{answer['model']}, " if cfg.compare else ""
        cut = "" if answer["finished"] else ", cut at --max-new-tokens"
        print(f"\n{name}{answer['path'].upper()}{cut}: {answer['answer']}\n{answer['text']}")
    result = {"question": asked.example.question, "assumed": asked.assumed, "answers": answers}
    out = Path(cfg.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "ask.json").write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
        draw(asked, answers).save(out / "ask.png")
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}") from error
    print(f"\n{out / 'ask.png'}, {out / 'ask.json'}")
    return result


if __name__ == "__main__":
    run.launch(main, cfg)
