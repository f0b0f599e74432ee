"""Frames of a video: which ones, and images that are decoded when asked for.

The rule: of n frames, k are int(i (n - 1) / (k - 1)) for i = 0 .. k - 1, so the first and the last
are always among them; of fewer than k all. It is numpy's linspace, cut off, as VSI-Bench's own code
and lmms-eval's multi-image tasks have it (100 frames, k = 8: 0 14 28 42 56 70 84 99). Others round,
or take the middles of k parts.

A video is a file, or in its place a folder with the file's name without its ending, whose images
are its frames, in the order of the numbers in their names, the first one first. Where both are
there the folder is read. Files need `av`, which is imported when the first one is met.
"""

import os
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from data.rows import Bad
from errors import UserError
from pictures import BadPicture, picture_size, read_picture

VIDEOS = (".mp4", ".webm", ".mkv", ".avi", ".mov", ".m4v")
STILLS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


@dataclass(frozen=True)
class Frame:
    """One frame of a video. Questions about one video are given the same objects."""

    video: str  # a file, or the folder of its frames
    index: int  # which frame of all, from 0
    size: tuple[int, int]  # width, height
    source: str | None = None  # its image in a folder
    chosen: tuple[int, ...] = ()  # all that are taken of a file: they are decoded together

    def convert(self, mode: str = "RGB") -> Image.Image:
        if self.source is not None:
            return read_picture(self.source).convert(mode)
        # All frames of the question at the price of one: the others are asked for next.
        frames = decode(self.video, self.chosen)
        return frames[self.chosen.index(self.index)].convert(mode)


def uniform(count: int, wanted: int) -> list[int]:
    """Return which of `count` frames are taken where `wanted` are asked for, from 0."""
    taken = min(count, wanted)
    # The published call as it is: its steps are floats, and where one falls short of a whole number
    # the frame before it is taken.
    return np.linspace(0, count - 1, taken, dtype=int).tolist()


def is_video(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in VIDEOS


def frames_of(video: Path, wanted: int) -> list[Frame]:
    """Return the frames of a video file or of the folder in its place; Bad where there is neither.

    UserError for a file without av.
    """
    # First, as it needs no decoder, and gives the same pixels on every machine.
    folder = video.with_suffix("")
    if folder.is_dir():
        return frames_in(folder, wanted)
    return frames_in_file(video, wanted)


def frames_in(folder: Path, wanted: int) -> list[Frame]:
    """Return the frames of a folder of numbered images."""
    numbered = []
    for name in os.listdir(folder):
        stem, ending = os.path.splitext(name)
        numbers = [int(digits) for digits in re.findall("[0-9]+", stem)]
        if ending.lower() in STILLS and numbers and not name.startswith("."):
            numbered.append((numbers, name))
    if not numbered:
        raise Bad("video", f"no numbered images in {folder}")
    # By number: frame 9 comes before frame 10, however they are written. All numbers of a name
    # count, in their order: the last alone would sort ARKitScenes' 41069021_305.377.png by its
    # milliseconds, and 10_640x480.jpg before 9_640x480.jpg.
    numbered.sort()
    frames = []
    for index in uniform(len(numbered), wanted):
        file = str(folder / numbered[index][1])
        try:
            # Its header alone: pixels are decoded when the question is asked.
            size = picture_size(file)
        except UserError as error:
            raise Bad("video", str(error)) from error
        frames.append(Frame(str(folder), index, size, file))
    return frames


def frames_in_file(video: Path, wanted: int) -> list[Frame]:
    if not video.is_file():
        raise Bad("video", f"missing file: {video} (nor is there a folder of its frames)")
    count, size = measure(str(video))
    # A tuple, as `decode` is cached by it.
    chosen = tuple(uniform(count, wanted))
    return [Frame(str(video), index, size, chosen=chosen) for index in chosen]


def import_av(video: str):
    """Return the module av; UserError where it is not installed."""
    try:
        import av  # optional, and tens of MB
    except ImportError as error:
        folder = os.path.splitext(video)[0]
        reason = f"it takes av (pip install av) to read a video, or its frames in a folder {folder}"
        raise UserError(f"{video}: {reason}") from error
    return av


def measure(video: str) -> tuple[int, tuple[int, int]]:
    """Return a video's number of frames and its size, from its headers; Bad if it can't be read."""
    av = import_av(video)
    try:
        with av.open(video) as container:
            stream = container.streams.video[0]
            size = (stream.codec_context.width, stream.codec_context.height)
            count = stream.frames
            if not count:
                # Some containers don't say it: then each packet is a frame.
                count = sum(1 for packet in container.demux(stream) if packet.size)
    except (OSError, ValueError, IndexError) as error:  # av's own errors are these, too
        raise Bad("video", f"unreadable: {video}: {error}") from error
    if not count:
        raise Bad("video", f"there is no frame in {video}")
    return count, size


# A video is decoded once for all its frames, which are asked for one behind the other: the last
# video's stay (32 of 640 x 480: 29 MB). Each worker process that is given some of them does so.
@lru_cache(maxsize=1)
def decode(video: str, chosen: tuple[int, ...]) -> list[Image.Image]:
    """Return these frames of a video. Its last one stands for those that its header promised."""
    av = import_av(video)
    found = {}
    last = None
    try:
        with av.open(video) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            # Decoded from the start and counted: a seek lands where key frames are.
            for index, frame in enumerate(container.decode(stream)):
                last = frame
                if index in chosen:
                    found[index] = frame.to_image()
                # Stop behind the last wanted frame, which as a rule is the video's.
                if len(found) == len(set(chosen)):
                    break
    except (OSError, ValueError) as error:
        raise BadPicture(f"{video}: {error}") from error
    if last is None:
        raise BadPicture(f"{video}: there is no frame in it")
    return [found[index] if index in found else last.to_image() for index in chosen]
