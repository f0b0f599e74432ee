"""A page of examples, as a student of the data would want to see them: index.html, one file.

A few of each path and task, chosen by the hash of (seed, id): the images with their regions, the
true centres projected onto them, depth beside them, and prompt and target as text. Images lie in
the page, so it needs no network. Its markup is in data/preview.html.
"""

import base64
import hashlib
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from data.colours import colour_of
from data.geometry import box_of, camera_of, project
from errors import writing
from mentions import object_of
from pictures import metres_of, read_picture
from srreal import PATHS, Example, prompt, target, truth_kind

SIDE = 560  # pixels of the longer side of a picture in the page
VIEWS = 6  # pictures of an example at most
EXAMPLES = 200  # on a page: with pictures some 60 kB each
NEAR = 0.05  # metres before the camera, from which on a centre is drawn
# From near to far, dark enough to tell from the white of what is unknown.
SHADES = np.array([(255, 214, 102), (240, 114, 80), (168, 50, 116), (72, 28, 110), (18, 12, 56)])


@dataclass
class Outline:
    """A region's box, in pixels of its image."""

    mention: str
    colour: str
    x: float
    y: float
    width: float
    height: float


@dataclass
class Dot:
    """A true centre, where it lies in the image."""

    label: str
    colour: str
    x: float
    y: float


@dataclass
class View:
    """One image of an example, and its depth."""

    name: str
    href: str
    width: int
    height: int
    outlines: list[Outline]
    dots: list[Dot]
    depth: str | None  # a data URI
    depth_range: str


@dataclass
class Card:
    example: Example
    kind: str  # of the truth
    views: list[View]
    left_out: int  # views
    centres: list[tuple[str, str, str]]  # (colour, mention, where)
    prompt: str
    target: str
    lacking: str  # why there is no target


# ---- The choice


def choose(examples: list[Example], count: int, seed: int) -> list[Example]:
    """Return `count` of each path and task, no question twice, at most EXAMPLES.

    By a hash of the id: the same rows whatever else the sources hold.
    """
    groups: dict[tuple, dict[str, Example]] = {}
    order = list(PATHS)
    for example in examples:
        key = (example.task, order.index(example.path))
        # By id: a row that stands in two sources is shown once.
        groups.setdefault(key, {})[example.id] = example
    chosen = []
    for key in sorted(groups):
        ids = sorted(groups[key], key=lambda name: hashlib.sha1(f"{seed} {name}".encode()).digest())
        chosen += [groups[key][name] for name in ids[:count]]
    return chosen[:EXAMPLES]


# ---- Pictures


def data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def smaller(image: Image.Image) -> Image.Image:
    # thumbnail() works in place, and the image may be the row's own.
    image = image.copy()
    image.thumbnail((SIDE, SIDE))
    return image


def css(colour: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)


def mentions_of(example: Example) -> list[str]:
    """Return what each region is called: an object's mention, else the two words before <mask>."""
    found = []
    for text in example.question.split("<mask>")[: len(example.regions)]:
        words = text.replace("(", " ").replace(",", " ").split()
        # A guess for regions whose object is unknown: "the red chair <mask>" gives "red chair".
        found.append(object_of(text, example.objects) or " ".join(words[-2:]) or "region")
    return found


def tint(image: Image.Image, mask: np.ndarray, colour: tuple) -> Image.Image:
    """Lay half of a colour over the pixels of a mask."""
    pixels = np.asarray(image).astype(np.float32)
    pixels[mask] = 0.5 * pixels[mask] + 0.5 * np.array(colour)
    return Image.fromarray(pixels.astype(np.uint8))


def centre_in(example: Example, mention: str, view: int) -> tuple | None:
    """Return a true centre in the camera frame of a view, None where it is not known there."""
    truth = example.objects[mention]
    if isinstance(truth, dict):
        return truth.get(view)
    # One centre for several views lies in the frame that the question asks for.
    is_its_frame = len(example.images) == 1 or view == example.frame
    return truth if is_its_frame else None


def shaded(depth: np.ndarray) -> tuple[Image.Image, str]:
    """Draw a depth map, near is bright and unknown white; return it and its range in words."""
    known = np.isfinite(depth) & (depth > 0)
    if not known.any():
        return Image.new("RGB", depth.shape[::-1], "white"), "no pixel is known"
    # Quantiles: one pixel through a window must not take all shades.
    near, far = np.quantile(depth[known], (0.01, 0.99))
    # A wall seen straight on has one depth: nothing is divided by 0.
    share = (np.where(known, depth, far) - near) / max(far - near, 1e-6)
    place = share.clip(0, 1) * (len(SHADES) - 1)
    pixels = np.full((*depth.shape, 3), 255, np.uint8)
    for channel in range(3):
        # Linear between the five colours, channel by channel.
        shades = np.interp(place, np.arange(len(SHADES)), SHADES[:, channel])
        pixels[..., channel] = np.where(known, shades, 255)
    words = f"depth {near:.1f} to {far:.1f} m"
    if not known.all():
        words += f", {1 - known.mean():.0%} unknown"
    return Image.fromarray(pixels), words


def view_of(example: Example, index: int) -> View:
    """Draw an image: as the model sees it, with its own marks; on top what the row says of it."""
    image = read_picture(example.images[index])
    outlines = []
    for mention, (view, region) in zip(mentions_of(example), example.regions, strict=True):
        if view != index:
            continue
        colour = colour_of(mention)
        region = np.asarray(region)
        if region.ndim == 2:
            image = tint(image, region, colour)
        x0, y0, x1, y1 = (float(value) for value in box_of(region))
        outlines.append(Outline(mention, css(colour), x0, y0, x1 - x0, y1 - y0))
    dots = []
    camera = camera_of(example, index)
    # Without intrinsics nobody knows where in the image a point in metres lies.
    shown = example.objects if camera else ()
    for mention in shown:
        centre = centre_in(example, mention, index)
        # What lies behind the camera has no pixel.
        pixel = project(centre, camera, NEAR) if centre else None
        if pixel and 0 <= pixel[0] < image.width and 0 <= pixel[1] < image.height:
            dots.append(Dot(f"{centre[2]:.2f} m", css(colour_of(mention)), *pixel))
    depth = metres_of(example.depths[index] if example.depths else None)
    picture = None
    words = "no depth"
    if depth is not None:
        drawn, words = shaded(depth)
        picture = data_uri(smaller(drawn))
    name = f"image {index}" if len(example.images) > 1 else "image"
    return View(
        name=name,
        href=data_uri(smaller(image)),
        width=image.width,
        height=image.height,
        outlines=outlines,
        dots=dots,
        depth=picture,
        depth_range=words,
    )


# ---- The page


def where(example: Example, truth) -> str:
    """Write a truth's centre: metres, by view where it is known by view."""
    if isinstance(truth, dict):
        return "; ".join(f"image {view}: {where(example, xyz)}" for view, xyz in truth.items())
    return ", ".join(f"{value:.2f}" for value in truth)


def card_of(example: Example) -> Card:
    centres = []
    for mention, truth in example.objects.items():
        name = (example.names or {}).get(mention)
        label = f"{name} ({mention})" if name else mention
        centres.append((css(colour_of(mention)), label, where(example, truth)))
    lacking = ""
    try:
        text = target(example)
    except ValueError as error:
        text = ""
        # The card has the id in its heading.
        lacking = str(error).removeprefix(f"{example.id}: ")
    count = min(len(example.images), VIEWS)
    return Card(
        example=example,
        kind=truth_kind(example.answer),
        views=[view_of(example, index) for index in range(count)],
        left_out=len(example.images) - count,
        centres=centres,
        prompt=prompt(example),
        target=text,
        lacking=lacking,
    )


def page(examples: list[Example], count: int, seed: int) -> str:
    """Render the page of examples as HTML."""
    # Autoescape: nothing that stands in a row becomes markup.
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    cards = [card_of(example) for example in choose(examples, count, seed)]
    return environment.get_template("preview.html").render(
        cards=cards, total=len(examples), seed=seed
    )


def write(examples: list[Example], out: str, count: int, seed: int) -> str:
    """Write index.html into a folder; return a line that says so."""
    file = Path(out) / "index.html"
    text = page(examples, count, seed)
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return f"{file} ({len(text) / 1e6:.1f} MB)"
