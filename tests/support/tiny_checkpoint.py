"""A checkpoint of `python -m model.tiny`, with its processor, for tests."""

import atexit
import contextlib
import functools
import io
import shutil
import tempfile
from pathlib import Path

from model import tiny

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5")


@functools.cache
def checkpoint(family: str, seed: int = 0) -> Path:
    """Return its folder; it is written once a test process."""
    out = Path(tempfile.mkdtemp(prefix=f"tiny_{family}_"))
    atexit.register(shutil.rmtree, out)
    with contextlib.redirect_stderr(io.StringIO()):
        tiny.write(family, out, seed)
    return out
