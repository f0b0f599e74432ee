"""The one reader of images: whatever an image is held in, the same file gives the same pixels.

A source is a path, the bytes of a file, a data URI, a PIL image, or anything with .size and
.convert("RGB") that opens, and draws its marks, when asked. As in transformers an image is turned
by its EXIF orientation and transparency is laid on white. A size is that of the turned image,
and so are pixels of boxes, depth maps and intrinsics.
"""

import base64
import io
import os
import re
import struct
from pathlib import Path
from urllib.parse import unquote_to_bytes

import numpy as np
from PIL import ExifTags, Image

from errors import UserError

# What Pillow raises on a file that is torn or isn't an image.
BAD_FILE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
# EXIF's orientation -> what brings the stored pixels upright; 1 is upright.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Those that swap width and height.
SIDEWAYS = (5, 6, 7, 8)
# Where Pillow keeps an orientation.
ORIENTATION_TAGS = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")
# From base64's other alphabet.
URL_SAFE = bytes.maketrans(b"-_", b"+/")
# Chunks of a PNG that may hold one.
TEXT_CHUNKS = (b"eXIf", b"tEXt", b"zTXt", b"iTXt")


class BadPicture(UserError, ValueError):
    """An image that can't be read: which, and why."""


def is_data_uri(source) -> bool:
    return isinstance(source, str) and source[:5].lower() == "data:"


def is_stored(source) -> bool:
    """Whether a source is a file or its content, which is opened anew whenever it is read."""
    return isinstance(source, str | bytes | os.PathLike)


def image_key(source):
    """Return what equal images share: a path, content, or what a marked image is drawn from.

    That of an image in memory is its id, as long as it is alive.
    """
    if isinstance(source, os.PathLike):
        return os.fspath(source)
    try:
        hash(source)
    except TypeError:
        return id(source)
    return source


def metres_of(depth) -> np.ndarray | None:
    """Return a depth map (H, W) in metres, whether it is a file or in memory; None without one."""
    if depth is None:
        return None
    return read_metres(depth) if isinstance(depth, str | os.PathLike) else np.asarray(depth)


def name_of(source) -> str:
    """Name an image or depth map in an error: the file, else the kind of object."""
    if is_data_uri(source):
        return f"a data URI of {len(source)} characters"
    if isinstance(source, bytes):
        return f"an image of {len(source)} bytes"
    if is_stored(source) or source is None:
        return str(source)
    return type(source).__name__


def picture_size(source) -> tuple[int, int]:
    """Return (width, height) of the turned image, from its header; BadPicture for a bad file."""
    if not (is_stored(source) or isinstance(source, Image.Image)):
        return source.size
    try:
        image = opened(source)
        width, height = image.size
        # Pillow turns TIFFs itself, and says so in their size.
        if image.format != "TIFF" and orientation(image) in SIDEWAYS:
            return height, width
    except BAD_FILE as error:
        raise unreadable(source, error) from error
    return width, height


def read_picture(source) -> Image.Image:
    """Return an image of any mode as RGB, turned; BadPicture for a bad file.

    It may be the source itself: who draws on it takes a copy.
    """
    if not (is_stored(source) or isinstance(source, Image.Image)):
        return source.convert("RGB")
    image = read_turned(source)
    if image.mode.startswith("I"):
        image = to_eight_bits(image)
    try:
        return to_rgb(image)
    except ValueError as error:  # a mode that has no way to RGB
        raise unreadable(source, error) from error


def read_turned(source) -> Image.Image:
    """Decode a file or an image in its own mode, turned as its EXIF orientation says."""
    try:
        image = opened(source)
        image.load()
        turn = TURNS.get(orientation(image))
    except BAD_FILE as error:
        raise unreadable(source, error) from error
    if turn is None:
        return image
    image = image.transpose(turn)
    # Whoever reads the result again would turn it twice.
    for tag in ORIENTATION_TAGS:
        image.info.pop(tag, None)
    return image


def read_metres(source) -> np.ndarray:
    """Return the depth (H, W) fp32 in metres of a 16-bit PNG in millimetres; BadPicture if not."""
    image = read_turned(source)
    if not image.mode.startswith("I"):
        reason = f"depth of mode {image.mode}; a 16-bit PNG in millimetres is wanted"
        raise BadPicture(f"{name_of(source)}: {reason}")
    return np.asarray(image).astype(np.float32) / 1000


def on_its_side(found: tuple, size: tuple) -> str:
    """Return what to add where a depth map or mask of a wrong size fits the image on its side."""
    if found != size[::-1]:
        return ""
    return ": it lies on its side. The image's EXIF orientation turns it; turn this likewise"


# ---- Parts


def opened(source) -> Image.Image:
    """Read a file's header alone; return a PIL image as it is."""
    if isinstance(source, Image.Image):
        return source
    if is_data_uri(source):
        source = content_of(source)
    if isinstance(source, bytes):
        source = io.BytesIO(source)
    return Image.open(source)


def content_of(uri: str) -> bytes:
    """Return the bytes of a data URI, in either alphabet of base64 or with escapes."""
    head, _, text = uri.partition(",")
    content = unquote_to_bytes(text)
    if "base64" not in head.lower():
        return content
    # Some are broken into lines, or lack the = at the end.
    content = re.sub(rb"[\s=]", b"", content).translate(URL_SAFE)
    return base64.b64decode(content + b"=" * (-len(content) % 4), validate=True)


def orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of an image that may not be decoded yet."""
    try:
        # A PNG's own method decodes it, to know what stands behind its pixels.
        if image.format == "PNG" and not has_late_texts(image):
            return Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except (SyntaxError, KeyError, TypeError, ValueError, struct.error):
        # Tags that can't be read turn nothing: the pixels are as good as ever.
        return 1


def has_late_texts(image: Image.Image) -> bool:
    """Whether a PNG that isn't decoded yet has texts behind its pixels, which may be tags."""
    file = image.fp
    if file is None:
        return False
    place = file.tell()
    file.seek(8)
    is_late = False
    found = False
    while len(start := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", start)
        is_late = is_late or kind == b"IDAT"
        found = found or (is_late and kind in TEXT_CHUNKS)
        file.seek(length + 4, os.SEEK_CUR)
    file.seek(place)
    return found


def to_eight_bits(image: Image.Image) -> Image.Image:
    """Scale a grey image of 16 bits, of which Pillow would clip all above 255 to white."""
    values = np.asarray(image)
    if image.mode != "I" or values.max() > 255:
        values = (values >> 8).clip(0, 255)
    return Image.fromarray(values.astype(np.uint8))


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert to RGB, transparency laid on white, as transformers' image processors do."""
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")


def unreadable(source, error: Exception) -> BadPicture:
    """Return the error of an image that can't be read, with its name."""
    if isinstance(error, BadPicture):
        return error
    text = str(error)
    if isinstance(source, str | Path) and str(source) in text:
        return BadPicture(text)
    # Pillow names the stream in memory, by its address.
    if "cannot identify" in text:
        text = "cannot identify image file"
    return BadPicture(f"{name_of(source)}: {text}")
