"""Images in: each is decoded once, to patches on a grid and a point for every patch.

    Source --ImageDecoder--> View --pack (batch.py)--> Batch --DeviceImages--> the device

The ImageDecoder may run in worker processes, ahead of the step that asks for its work
(Prefetcher). An ImageCache keeps Views for as long as they are asked for again.

P patches of p x p pixels; `merge` x `merge` of them become one token.
"""

import os
import signal
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection
from concurrent.futures import BrokenExecutor, CancelledError, ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing import forkserver, get_context, parent_process
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
    Qwen2VLImageProcessorPil,
    smart_resize,
)

from errors import UserError
from kernels.packed_attention import upload
from model.head3d import point_grid, read_depth
from pictures import BadPicture, image_key, is_data_uri, is_stored, read_picture

CACHE_BYTES = 4e9  # of views, per process
# At most so many images are with the workers, or made and not asked for yet.
MAX_AHEAD = 256
# Where depth comes without intrinsics: a horizontal view of 60 degrees.
ASSUMED_FOV = np.pi / 3


class ExampleError(UserError, ValueError):
    """A row that can't be used; one line that says which row, what of it, and why."""


@dataclass
class Source:
    """What a View is made of: an image of an example with its depth and its camera."""

    image: object  # a source of pictures.py
    depth: object  # a path, an array (H, W) in metres, or None
    camera: tuple | None  # fx, fy, cx, cy in pixels

    @property
    def key(self) -> tuple:
        """Equal for the same image with the same depth and camera, as long as both are alive."""
        return identity(self.image), identity(self.depth), self.camera

    @property
    def is_file(self) -> bool:
        """Whether all of it is files or their content, and so can't change unnoticed."""
        return is_stored(self.image) and isinstance(self.depth, str | Path | None)


def identity(source):
    """Identify a file by path, size and time of change, all else by its `image_key`."""
    if is_data_uri(source) or not isinstance(source, str | Path):
        return image_key(source)
    # A file that is written again is another image.
    state = os.stat(source)
    return str(source), state.st_size, state.st_mtime_ns


def source_of(example, index: int) -> Source:
    """Return image `index` of an example, with its depth and camera where it has them."""
    depth = example.depths[index] if example.depths else None
    camera = example.intrinsics[index] if example.intrinsics else None
    if depth is None or camera is None:
        return Source(example.images[index], depth, None)
    return Source(example.images[index], depth, tuple(camera))


@dataclass
class View:
    """A decoded image on its patch grid. Patches come in the image processor's order."""

    size: tuple[int, int]  # width, height of the original, turned
    grid: tuple[int, int]  # rows, columns of patches
    patches: np.ndarray  # (P, 3, p * p) uint8; the model makes levels and frames of them
    points: np.ndarray | None  # (P, 3) fp32 metres, NaN where unknown
    key: tuple = ()  # its Source's
    source: Source | None = None  # kept alive, so that the id()s in the key stay its own


def view_bytes(view: View) -> int:
    """Estimate a view's memory: its patches, and as much for what the source holds."""
    return 2 * view.patches.nbytes


# ---- Decoding


@dataclass
class ImageDecoder:
    """Decode a Source: all that a worker process needs to know."""

    image_processor: Qwen2VLImageProcessorPil
    max_pixels: int

    def __call__(self, source: Source) -> View:
        """Return a View without key and source; ExampleError for what can't be decoded."""
        try:
            picture = read_picture(source.image)
        except BadPicture as error:
            raise ExampleError(str(error)) from error
        grid, patches = self.cut_into_patches(picture)
        points = None
        if source.depth is not None:
            points = self.read_points(source, picture.size, grid)
        return View(picture.size, grid, patches, points)

    def cut_into_patches(self, picture: Image.Image) -> tuple[tuple[int, int], np.ndarray]:
        """Resize an image as transformers does and cut it: its grid, and patches (P, 3, p * p)."""
        patch = self.image_processor.patch_size
        grid = self.grid_of(picture.size)
        size = grid[1] * patch, grid[0] * patch
        pixels = np.asarray(picture.resize(size, self.image_processor.resample))
        # Channels first within a patch, as the towers' weights have them.
        cells = pixels.reshape(grid[0], patch, grid[1], patch, 3)
        cells = cells.transpose(0, 2, 4, 1, 3)  # rows, columns, 3, p, p
        patches = in_merge_order(cells, self.image_processor.merge_size)
        return grid, patches.reshape(-1, 3, patch**2)

    def grid_of(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the rows and columns of patches of an image of (width, height)."""
        patch = self.image_processor.patch_size
        unit = patch * self.image_processor.merge_size
        min_pixels = self.image_processor.size["shortest_edge"]
        width, height = size
        if not self.image_processor.do_resize:
            if width % unit or height % unit:
                raise ExampleError(
                    f"{width} x {height} pixels, which do_resize false leaves as they are: sides"
                    f" have to be multiples of {unit}"
                )
            return height // patch, width // patch
        try:
            height, width = smart_resize(height, width, unit, min_pixels, self.max_pixels)
        except ValueError as error:  # far too long for its height, or the other way round
            raise ExampleError(str(error)) from error
        return height // patch, width // patch

    def read_points(self, source: Source, size, grid) -> np.ndarray:
        """Make the point map of a depth map on the patch grid: (P, 3)."""
        width, height = size
        try:
            depth = read_depth(source.depth, (height, width))
        except ValueError as error:  # also of a file that can't be read
            raise ExampleError(str(error)) from error
        camera = source.camera
        # Better a wrong focal length than no third dimension; ImageCache says so.
        if camera is None:
            focal = width / 2 / np.tan(ASSUMED_FOV / 2)
            camera = (focal, focal, (width - 1) / 2, (height - 1) / 2)
        return in_merge_order(point_grid(depth, camera, grid), self.image_processor.merge_size)


def in_merge_order(grid: np.ndarray, merge: int) -> np.ndarray:
    """Flatten a patch grid: (rows, columns, ...) -> (rows * columns, ...).

    In the image processor's order, in which the patches of one token are neighbours.
    """
    rows, columns, *rest = grid.shape
    squares = grid.reshape(rows // merge, merge, -1, merge, *rest)
    squares = squares.swapaxes(1, 2)
    return squares.reshape(rows * columns, *rest)


def byte_levels(settings: Qwen2VLImageProcessorPil) -> torch.Tensor:
    """Tabulate what transformers makes of every byte of each channel: (3, 256) fp32."""
    every_byte = np.arange(256, dtype=np.uint8)
    # An image of 256 rows and one column.
    values = np.tile(every_byte[:, None], (3, 1, 1))
    if settings.do_rescale:
        values = settings.rescale(values, settings.rescale_factor)
    if settings.do_normalize:
        values = settings.normalize(values, settings.image_mean, settings.image_std)
    return torch.from_numpy(values[..., 0].astype(np.float32))


# ---- Keeping


class LRUCache:
    """Keep what was asked for last, up to a number of bytes. Threads may share one."""

    def __init__(self, max_bytes: float, size_of: Callable):
        self.max_bytes = max_bytes
        self.size_of = size_of  # item -> bytes
        self.bytes = 0
        self.items = OrderedDict()  # by last use
        self.lock = threading.Lock()

    def get(self, key, make: Callable):
        """Return the item under `key`; where there is none, make and keep it."""
        with self.lock:
            if key in self.items:
                self.items.move_to_end(key)
                return self.items[key]
        # Outside of the lock, since it takes long; of two threads' work one is thrown away.
        made = make()
        with self.lock:
            if key not in self.items:
                self.items[key] = made
                self.bytes += self.size_of(made)
            item = self.items[key]
            while self.bytes > self.max_bytes and len(self.items) > 1:
                _, oldest = self.items.popitem(last=False)
                self.bytes -= self.size_of(oldest)
        return item

    def retain(self, keys: Collection) -> None:
        """Drop what is under other keys."""
        with self.lock:
            for key in self.items.keys() - keys:
                self.bytes -= self.size_of(self.items.pop(key))


class Prefetcher:
    """Run `make(argument)` in `workers` processes before its result is asked for.

    make is a pure function that can be pickled. With 0 workers it runs where it is asked for. Only
    time depends on it: what no worker has begun, or what one failed at, is made in line by
    whoever asks. So any number of workers gives the same bits, and a bad file the same words.

    The processes are forked from a server that has imported make's module and nothing else: no
    CUDA, no threads, no data. They compute with one thread, and end with this process, however that
    ends.
    """

    def __init__(self, make: Callable, workers: int):
        self.make = make
        self.max_ahead = MAX_AHEAD
        self.pool = start_workers(type(make).__module__, workers) if workers else None
        self.futures = {}  # by key
        self.waiting = {}  # key -> argument
        self.has_warned = False
        self.lock = threading.Lock()

    def prefetch(self, arguments: dict) -> None:
        """Begin with what is asked for next: key -> argument, in the order of use.

        What was prefetched before, and isn't named now, is let go.
        """
        with self.lock:
            for key in self.futures.keys() - arguments.keys():
                self.futures.pop(key).cancel()
            self.waiting = {key: arguments[key] for key in arguments if key not in self.futures}
            self._submit()

    def take(self, key, argument):
        """Return make(argument), from a worker where one is at it, and forget it."""
        with self.lock:
            self.waiting.pop(key, None)
            future = self.futures.pop(key, None)
            self._submit()
        # cancel() succeeds where no worker has begun: then it is quicker made here.
        failure = None
        if future and not future.cancel():
            try:
                return future.result()
            except CancelledError:  # what to prefetch has changed meanwhile
                pass
            except Exception as error:
                failure = error
        # A bad file fails here again, where the row is known.
        made = self.make(argument)
        if failure:
            self._warn(failure)
        return made

    def _submit(self) -> None:
        """Give the workers what fits into max_ahead, the next one first."""
        while self.pool and self.waiting and len(self.futures) < self.max_ahead:
            key = next(iter(self.waiting))
            argument = self.waiting.pop(key)
            try:
                self.futures[key] = self.pool.submit(self.make, argument)
            except BrokenExecutor as error:
                self.pool = None
                self._warn(error)

    def _warn(self, error: Exception) -> None:
        """Say once what only workers fail at.

        One was killed (for want of memory?), or an argument can't be pickled.
        """
        if not self.has_warned:
            message = f"workers: {error}: done in line, which takes longer"
            print(message, file=sys.stderr, flush=True)
        self.has_warned = True


def start_workers(module: str, count: int) -> ProcessPoolExecutor:
    """Start worker processes whose server has imported `module`."""
    context = get_context("forkserver")
    context.set_forkserver_preload([module])
    pool = ProcessPoolExecutor(count, context, init_worker)
    # OpenMP reads its number of threads at import: the server's is the workers'.
    threads = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    forkserver.ensure_running()
    del os.environ["OMP_NUM_THREADS"]
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = threads
    return pool


def init_worker() -> None:
    """Leave interrupts to the parent, and watch it: a killed parent tells nobody to end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    threading.Thread(target=exit_with_parent, daemon=True).start()


def exit_with_parent() -> None:
    """Wait for the parent's end, then end this process without further ado."""
    parent_process().join()
    os._exit(1)


class ImageCache:
    """Views by Source.

    Those that are prefetched are kept until the next prefetch, which says what to keep. Without
    one, those of files are kept while there is room; objects may change, so they are decoded for
    every call that asks.
    """

    def __init__(self, decoder: ImageDecoder, workers: int):
        self.prefetcher = Prefetcher(decoder, workers)
        self.views = LRUCache(CACHE_BYTES, view_bytes)
        # It holds the sources, so that the id()s in keys stay their own.
        self.expected: dict[tuple, Source] = {}
        # Images that were decoded with depth but without intrinsics.
        self.assumed_fov = 0

    def prefetch(self, sources: list[Source]) -> None:
        """Let workers make these, each once, in this order; let go of all others."""
        expected = {}
        for source in sources:
            # That a file isn't there is said when it is asked for.
            with suppress(OSError):
                expected[source.key] = source
        self.expected = expected
        self.views.retain(expected)
        missing = {key: expected[key] for key in expected if key not in self.views.items}
        self.prefetcher.prefetch(missing)

    def view(self, source: Source) -> View:
        """Return the View of a Source; ExampleError, which doesn't name the row, if it is bad."""
        try:
            key = source.key
        except OSError as error:
            raise ExampleError(str(error)) from error
        if source.is_file or key in self.expected:
            return self.views.get(key, lambda: self._decode(key, source))
        return self._decode(key, source)

    def _decode(self, key: tuple, source: Source) -> View:
        """Take the View from a worker, or make it here."""
        if source.depth is not None and source.camera is None:
            if not self.assumed_fov:
                print("Depth without intrinsics: a view of 60 degrees is assumed.", file=sys.stderr)
            self.assumed_fov += 1
        view = self.prefetcher.take(key, source)
        return replace(view, key=key, source=source)


class DeviceImages:
    """A step's images on the device, each uploaded once, as bytes.

    The rollout's prompts, the reference's passes and the update's share it. Whoever makes it drops
    it when the step ends.
    """

    def __init__(self, device: torch.device | str):
        self.device = torch.device(device)
        # By the array itself, which is held here: a view's key is an id() of its image, which may
        # have changed since.
        self.uploaded: dict[int, tuple[np.ndarray, torch.Tensor]] = {}

    def patches(self, arrays: tuple[np.ndarray, ...]) -> torch.Tensor:
        """Return the patches of a batch's images, one behind the other: (P, 3, p * p) uint8."""
        for array in arrays:
            if id(array) not in self.uploaded:
                uploaded = upload(torch.from_numpy(array), self.device)
                self.uploaded[id(array)] = array, uploaded
        return torch.cat([self.uploaded[id(array)][1] for array in arrays])
