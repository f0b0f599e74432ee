"""Images that a row holds in its own text: data URIs, as LLaVA's sets have them."""

import binascii
import io
import os
import re

from PIL import Image

from data.marks import Marked
from data.rows import Bad
from pictures import content_of

# data:image/png;base64,iVBOR...
DATA_URI = re.compile(r"data:([^,]{0,200}),", re.IGNORECASE)
URL = re.compile(r"[a-z][a-z0-9]+://", re.IGNORECASE)
# No file's path is as long: so a text is the base64 of an image without its header.
LONGEST_PATH = 4096


def image_of(name: str, base: str, field: str = "image") -> str | Marked:
    """Return the path of an image that a row names, or the image that it holds; Bad if broken."""
    if DATA_URI.match(name):
        return decode(name, field)
    if URL.match(name):
        raise Bad(field, f"a URL and no file: {name}: images are not downloaded")
    if len(name) > LONGEST_PATH:
        return decode(f"data:;base64,{name}", field)
    return os.path.join(base, name)


def decode(uri: str, field: str) -> Marked:
    """Return the image in a data URI. Reads its header, not yet its pixels."""
    text = uri.partition(",")[2]
    try:
        content = content_of(uri)
    except binascii.Error as error:
        raise Bad(field, f"broken data URI: {about(text)}: {error}") from error
    reason = what_is_wrong(content)
    if reason:
        raise Bad(field, f"broken data URI: {about(text)}: {reason}")
    return Marked(content)


def what_is_wrong(content: bytes) -> str | None:
    """Return why the bytes are no image's file, or None. Reads the header, not yet the pixels."""
    try:
        # Of a PNG this also checks that all of it is there.
        Image.open(io.BytesIO(content)).verify()
    except Exception as error:  # Pillow raises all sorts on bad bytes
        # Pillow names the stream in memory, by its address.
        reason = str(error).partition(" <_io")[0]
        return reason if len(reason) <= 80 else type(error).__name__
    return None


def about(text: str) -> str:
    return f"{text[:20]}... of {len(text)} characters"
