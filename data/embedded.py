"""Images that a row holds in its own text: data URIs, as LLaVA's sets have them."""

import base64
import binascii
import io
import os
import re
from urllib.parse import unquote_to_bytes

from PIL import Image

from data.marks import Marked
from data.rows import Bad

# data:image/png;base64,iVBOR...
DATA_URI = re.compile(r"data:([^,]{0,200}),", re.IGNORECASE)
URL = re.compile(r"[a-z][a-z0-9]+://", re.IGNORECASE)
# No file's path is as long: so a text is the base64 of an image without its header.
LONGEST_PATH = 4096


def image_of(name: str, base: str, field: str = "image") -> str | Marked:
    """Return the path of an image that a row names, or the image that it holds; Bad if broken."""
    header = DATA_URI.match(name)
    if header:
        return decode(name[header.end() :], header[1], field)
    if URL.match(name):
        raise Bad(field, f"a URL and no file: {name}: images are not downloaded")
    if len(name) > LONGEST_PATH:
        return decode(name, "base64", field)
    return os.path.join(base, name)


def decode(text: str, header: str, field: str) -> Marked:
    """Return the image in the text of a data URI. Reads its header, not yet its pixels."""
    content = unquote_to_bytes(text)
    if "base64" in header.lower():
        # Some are broken into lines, or lack the = at the end.
        content = re.sub(rb"[\s=]", b"", content).translate(URL_SAFE)
        try:
            content = base64.b64decode(content + b"=" * (-len(content) % 4), validate=True)
        except binascii.Error as error:
            raise Bad(field, f"broken data URI: {about(text)}: {error}") from error
    try:
        # Of a PNG this also checks that all of it is there.
        Image.open(io.BytesIO(content)).verify()
    except Exception as error:  # Pillow raises all sorts on bad bytes
        # Pillow names the stream in memory, by its address.
        reason = str(error).partition(" <_io")[0]
        if len(reason) > 80:
            reason = type(error).__name__
        raise Bad(field, f"broken data URI: {about(text)}: {reason}") from error
    return Marked(content)


# The other alphabet of base64.
URL_SAFE = bytes.maketrans(b"-_", b"+/")


def about(text: str) -> str:
    return f"{text[:20]}... of {len(text)} characters"
