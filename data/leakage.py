"""Which scenes stand on both sides: in the rows that are trained on, and in a benchmark.

    python -m data.leakage --train spar:/sets/SPAR-7M out/cold --benchmark vsi-bench=/sets/VSI-Bench

Scenes are read off the text of a row: its ids, the paths of its images, every other field. No image
is opened. Exit code 1 where any scene is on both sides; --drop-leaks of the training scripts leaves
the rows of these scenes out.

    ScanNet      scene0000_01; scans of one room, scene0000_00 and scene0000_01, are one scene here
    ScanNet++    ten digits in hex, 09c1414f1b
    ARKitScenes  a video, six to eight digits, where this row or the other side's speaks of
                 ARKitScenes or CA-1M. Several videos may show one home; no row says which, so
                 only the same video is found

Where no row of a set names a scene, that is said: nothing is known of it then.
"""

import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import PurePath

import flags
from data import parts_of, rows_of, say
from data.benchmarks import BENCHMARKS, all_records, find_files
from data.rows import Bad, BadSource, Row, progress
from errors import launch

SCANNET = "ScanNet"
SCANNETPP = "ScanNet++"
ARKIT = "ARKitScenes"
# A number that may be one of ARKitScenes' videos: its row doesn't say of what.
UNKNOWN = "?"

SCAN = re.compile(r"(?<![A-Za-z0-9])scene[0-9]{4}(?![0-9])(?:_[0-9]{2}(?![0-9]))?")
ROOM = len("scene0000")
HEX = re.compile(r"(?<![0-9A-Za-z])[0-9a-f]{10}(?![0-9A-Za-z])")
SPEAKS_OF_SCANNETPP = re.compile(r"scannet(?:pp|\+\+|_pp)", re.IGNORECASE)
SPEAKS_OF_ARKIT = re.compile(r"arkit|ca-?1m", re.IGNORECASE)
# None begins with 0, as the numbers of frames do.
LONG_NUMBER = re.compile(r"(?<![0-9A-Za-z.])[1-9][0-9]{7}(?![0-9A-Za-z])")
# A shorter one is too common: it has to be a folder's name, a video's, or all of a field of scenes.
SHORT_NUMBER = re.compile(r"[1-9][0-9]{5,6}")
OF_SCENES = re.compile("scene|video|visit", re.IGNORECASE)
VIDEOS = (".mp4", ".mov")
LONGEST = 1000  # characters; longer texts are images in base64, and conversations


@dataclass(frozen=True, order=True)
class Scene:
    set: str
    scan: str

    @property
    def room(self) -> "Scene":
        # Scans of one room show the same things, so what is learnt from one helps in the other.
        return Scene(self.set, self.scan[:ROOM]) if self.set == SCANNET else self


# ---- The scenes of a row


def scenes_in(texts: Iterable[tuple[str, str]]) -> set[Scene]:
    """Return the scans that a row names. texts: (field, text) of all that it says."""
    texts = list(texts)
    found = set()
    # Where the set is named in another field than the scene, the whole row has to be heard first.
    is_scannetpp = any(SPEAKS_OF_SCANNETPP.search(text) for _, text in texts)
    is_arkit = any(SPEAKS_OF_ARKIT.search(text) for _, text in texts)
    for name, text in texts:
        found |= {Scene(SCANNET, scan) for scan in SCAN.findall(text)}
        for code in HEX.findall(text):
            # Digits or letters alone are numbers and words elsewhere.
            if is_scannetpp or not (code.isdigit() or code.isalpha()):
                found.add(Scene(SCANNETPP, code))
        found |= {Scene(ARKIT if is_arkit else UNKNOWN, number) for number in numbers(name, text)}
    return found


def numbers(name: str, text: str) -> list[str]:
    """Return what may be the numbers of videos in a field."""
    found = LONG_NUMBER.findall(text)
    # A file's own name is a frame's number, unless it is a video's.
    path = PurePath(text)
    places = list(path.parts[:-1])
    if OF_SCENES.search(name) or path.suffix.lower() in VIDEOS:
        places.append(path.stem)
    return found + [place for place in places if SHORT_NUMBER.fullmatch(place)]


def texts_of(value, name: str = "") -> Iterator[tuple[str, str]]:
    """Yield (field, text) of all that a row of JSON or parquet says; bytes say nothing."""
    if isinstance(value, dict):
        for key, inner in value.items():
            # The innermost field names a text: of {"scene": {"id": ...}} that is id.
            yield from texts_of(inner, key)
    elif isinstance(value, list):
        for inner in value:
            yield from texts_of(inner, name)
    elif isinstance(value, str) and len(value) <= LONGEST:
        yield name, value
    # Any other number is a size, a count or an answer.
    elif isinstance(value, int) and OF_SCENES.search(name):
        yield name, str(value)


def scenes_of(row: Row) -> set[Scene]:
    """Return the scans that a row of --train names."""
    texts = [("file", row.file), *texts_of(row.record)]
    # Readers of sets that aren't a row a question keep no record; their ids and images name scenes.
    if not row.record:
        texts += [("id", row.id), *(("image", file) for file in row.list_files())]
    return scenes_in(texts)


# ---- Both sides


@dataclass
class Asked:
    """The scenes of a benchmark, and how many of its rows name one."""

    name: str
    rows: int = 0
    with_scene: int = 0
    scans: dict[Scene, set[Scene]] = field(default_factory=dict)  # by room

    def add(self, scenes: set[Scene]) -> None:
        self.rows += 1
        self.with_scene += 1 if scenes else 0
        for scene in scenes:
            self.scans.setdefault(scene.room, set()).add(scene)

    def shared(self, scenes: set[Scene]) -> set[Scene]:
        """Return the rooms that a training row shows, too."""
        found = set()
        for scene in scenes:
            room = scene.room
            # A number means a video of ARKitScenes where either side says so.
            video = Scene(ARKIT, room.scan)
            if room.set == UNKNOWN and video in self.scans:
                found.add(video)
            if room.set != UNKNOWN and self.scans_of(room):
                found.add(room)
        return found

    def scans_of(self, room: Scene) -> set[Scene]:
        # The other way round than in `shared`: here the benchmark may be what names no set.
        number = Scene(UNKNOWN, room.scan) if room.set == ARKIT else room
        return self.scans.get(room) or self.scans.get(number) or set()


def read_benchmark(text: str) -> Asked:
    """Return the scenes of NAME=DIR; of NAME alone those of the set on the hub."""
    name, _, root = text.partition("=")
    name, _, _ = name.partition("/")
    if name not in BENCHMARKS:
        raise BadSource(f"unknown benchmark {name!r} in {text!r}: one of {', '.join(BENCHMARKS)}")
    # Not load(): it would open every image, and cut videos into frames.
    _, files = find_files(name, root or None)
    asked = Asked(name)
    for file, _, record in all_records(files):
        if not isinstance(record, Bad):
            asked.add(scenes_in([("file", str(file)), *texts_of(record)]))
    return asked


class Filter:
    """Leaves out the training rows whose scenes are a benchmark's, and counts them."""

    def __init__(self, names: Iterable[str]):
        self.benchmarks = [read_benchmark(name) for name in names]
        self.rows = 0
        self.left_out = 0
        self.of_benchmark = Counter()

    def keeps(self, row: Row) -> bool:
        if not self.benchmarks:
            return True
        scenes = scenes_of(row)
        leaks = [asked.name for asked in self.benchmarks if asked.shared(scenes)]
        self.rows += 1
        self.left_out += 1 if leaks else 0
        # A row may leak into several benchmarks: these counts can add up to more than left_out.
        self.of_benchmark.update(leaks)
        return not leaks

    def summary(self) -> str:
        """Return a line: how many rows were left out, and whose scenes they show."""
        parts = []
        for asked in self.benchmarks:
            part = f"{self.of_benchmark[asked.name]} show scenes of {asked.name}"
            parts.append(part if asked.with_scene else f"{asked.name} names no scene")
        return (
            f"--drop-leaks: {self.left_out} of {self.rows} training rows are left out: "
            f"{', '.join(parts)}"
        )


# ---- The command


@dataclass
class Config:
    train: tuple[str, ...]  # data sets to train on: paths or kind:path; or a mixture file
    benchmark: tuple[str, ...]  # NAME=DIR: a name of data/benchmarks, and where it lies


@dataclass
class Leak:
    """A room on both sides."""

    rows: int = 0  # of the training sets
    trained: set[Scene] = field(default_factory=set)


def main(cfg: Config) -> dict[str, dict[Scene, Leak]]:
    """Print what stands on both sides, and return it: benchmark -> room -> Leak."""
    benchmarks = [read_benchmark(text) for text in cfg.benchmark]
    leaks: dict[str, dict[Scene, Leak]] = {asked.name: {} for asked in benchmarks}
    trained = Asked("training")
    for row in progress(rows_of(parts_of(cfg.train)), "training rows", "row"):
        scenes = scenes_of(row)
        trained.add(scenes)
        for asked in benchmarks:
            for room in asked.shared(scenes):
                leak = leaks[asked.name].setdefault(room, Leak())
                leak.rows += 1
                # By number alone: one side may say ARKitScenes, and the other name no set.
                leak.trained |= {scene for scene in scenes if scene.room.scan == room.scan}
    say(described(trained))
    for asked in benchmarks:
        say(described(asked))
        if asked.with_scene:
            say(told(asked, leaks[asked.name]))
    return leaks


def described(side: Asked) -> str:
    """Return a line: how many rows name a scene, and how many rooms these are, by set."""
    if not side.with_scene:
        return (
            f"{side.name}: none of its rows ({side.rows}) names a scene: nothing is known of them"
        )
    rooms = Counter(room.set for room in side.scans if room.set != UNKNOWN)
    counts = [f"{count} of {name}" for name, count in sorted(rooms.items())]
    unknown = sum(room.set == UNKNOWN for room in side.scans)
    if unknown:
        counts.append(f"{unknown} numbers that may be videos of {ARKIT}")
    named = f"{side.with_scene} of {side.rows} rows name a scene"
    return f"{side.name}: {named}: {', '.join(counts)}"


def told(asked: Asked, leaks: dict[Scene, Leak]) -> str:
    """Return which rooms are on both sides, by set, a line each."""
    if not leaks:
        return "  no scene stands on both sides"
    lines = []
    for name in sorted({room.set for room in leaks}):
        rooms = sorted(room for room in leaks if room.set == name)
        rescans = []
        entries = []
        for room in rooms:
            leak = leaks[room]
            scans = asked.scans_of(room)
            entries.append(f"    {room.scan}: training rows {leak.rows}")
            # The weaker leak: other images of the same room.
            if name == SCANNET and not leak.trained & scans:
                rescans.append(room)
                entries[-1] += f", of {names(leak.trained)}; asked about {names(scans)}"
        count = f"  {name}: scenes on both sides {len(rooms)}"
        if name == SCANNET:
            same = len(rooms) - len(rescans)
            count += f" (in the same scan {same}, in another scan of the room {len(rescans)})"
        lines += [count, *entries]
    return "\n".join(lines)


def names(scans: set[Scene]) -> str:
    return ", ".join(sorted(scene.scan for scene in scans))


def run(cfg: Config) -> None:
    leaks = main(cfg)
    if any(leaks.values()):
        sys.exit(1)


if __name__ == "__main__":
    launch("leakage", run, flags.parse(Config, __doc__))
