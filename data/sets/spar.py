"""SPAR-7M and SPAR-7M-RGBD: a folder with
    spar/<source>/qa_jsonl/<split>/<task>/<format>/*.jsonl
    spar/<source>/images/<scene>/{image,video}_color/N.jpg
The set was first published as parts of one archive with all of it (cat spar-*.tar.gz | tar -xz).
Today's release has an archive a source, without the images of others: those of ScanNet, ScanNet++,
Matterport3D and Structured3D come from their makers, are prepared by the set's scripts, and linked
to where the first release had them. Both are read: links to files and folders are followed. Read is
any part of the folder, one .jsonl, or an index of the set's own generate_data_json.py (without its
repeat_time: mixtures have weights). Of folders the formats fill and select of all tasks but the
video's are read, and of one above `train` no `val`; a file or an index is read as it is.

The RGBD version adds image_depth/N.png (millimetres), pose/N.txt (camera to world) and
intrinsic/intrinsic_color.txt a scene. Points and boxes are drawn into the images (spar_marks.py).

Every row is a question on path lor. Where embodiedscan_infos_*.pkl lies beside `spar`, rows of
ScanNet whose marks are found there (embodiedscan.py) get their centres, and are asked on path dtr,
too; what was found is counted and printed.

Departures: boxes are in pixels of their own image, where the official code takes the first one's
size for all."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from data.marks import Marked
from data.rows import (
    Bad,
    BadSource,
    Headers,
    MissingFile,
    Notes,
    Row,
    each,
    files_of,
    matrix,
    only_turn,
    pinhole,
    typed,
)
from data.sets.embodiedscan import SCANNET, Scenes
from data.sets.files import Files, depths_of, files_of_row, sizes_of
from data.sets.spar_marks import FIRST, MARKS, VIEWS, insert_masks, marked, marks_of
from srreal import Example

VIDEO = re.compile(r"_video|^(?:obj_frame_locate|appearance_order|room_size|obj_count|nav)$")
REQUIRED = {"conversations": list[dict[str, str]], "image": list[str], "type": str}
OPTIONAL = MARKS | VIEWS | {"id": str | int, "depth": list[str]}
ENTRY = {"annotation": str, "root": str}  # of an index


# ---- Files


def spar_rows(path: Path, root: str | None) -> Iterator[Row]:
    """Yield a Row for each row of the files that a path stands for. root: of the images."""
    notes = Notes()
    pickles = annotations_near(path)
    scenes = Scenes(pickles, notes) if pickles else None
    for file, base in files_with_images(path, root, notes):
        yield from each(file, (".jsonl",), partial(build, base, notes, scenes))


def annotations_near(path: Path) -> list[Path]:
    """Return EmbodiedScan's files, in the path or the nearest folder above it that has any."""
    # Beside `spar` is seven folders up from spar/scannet/qa_jsonl/train/<task>/<format>/*.jsonl.
    for folder in (path, *path.absolute().parents[:7]):
        if pickles := sorted(folder.glob("embodiedscan_infos_*.pkl")):
            return pickles
    return []


def files_with_images(path: Path, root: str | None, notes: Notes) -> Iterator[tuple[Path, str]]:
    """Yield (file of rows, folder of its images) of an index, a folder, or a file."""
    if path.suffix == ".json":
        yield from indexed_files(path, root)
        return
    # Its images may be those of a linked ScanNet: a look at them all takes long.
    files = files_of(path, (".jsonl",), notes, without=("images",))
    # `sentence` and `judge` have answers in prose; a file that is named is read whatever it holds.
    if path.is_dir():
        files = [file for file in files if asks_about_images(file)]
    if not files:
        raise MissingFile(f"{path}: no fill/*.jsonl nor select/*.jsonl of a task about images")
    for file in files:
        yield file, root or str(images_folder(file))


def asks_about_images(file: Path) -> bool:
    """Say whether a file <task>/<format>/*.jsonl is of a format and a task that are read."""
    form = file.parent
    return form.name in ("fill", "select") and not VIDEO.search(form.parent.name)


def images_folder(file: Path) -> Path:
    """Return where the set has the images of a file of rows: beside its qa_jsonl."""
    for folder in file.absolute().parents:
        if folder.name == "qa_jsonl":
            return folder.parent / "images"
    return file.absolute().parent / "images"


def indexed_files(path: Path, root: str | None) -> Iterator[tuple[Path, str]]:
    for name, entry in read_index(path).items():
        file = find_above(path, entry["annotation"])
        images = root or find_above(path, entry["root"])
        if not (file and images):
            missing = f"{entry['annotation']}, {entry['root']}"
            raise MissingFile(f"{path}: {name}: neither beside nor above it: {missing}")
        yield file, str(images)


def find_above(path: Path, name: str) -> Path | None:
    # The set's tool writes paths from the folder that holds `spar`; the index lies somewhere in it.
    for folder in path.absolute().parents:
        if (folder / name).exists():
            return folder / name
    return None


def read_index(path: Path) -> dict:
    """Return {name: {annotation, root, ...}} of an index file."""
    wanted = f"{path}: no index {{name: {{annotation, root}}}}"
    try:
        index = json.loads(path.read_bytes())
        if not isinstance(index, dict):
            raise Bad("row", "no object")
        return {name: typed(entry, ENTRY, {}) for name, entry in index.items()}
    except (ValueError, RecursionError) as error:
        raise BadSource(f"{wanted}: {error}") from error


# ---- Rows


def build(base: str, notes: Notes, scenes, file: Path, number: int, row: dict) -> Iterator[Row]:
    """Yield the Row of one line, its files not yet looked for."""
    row = typed(row, REQUIRED, OPTIONAL)
    if VIDEO.search(row["type"]):
        raise Bad("type", f"a question about a video: {row['type']}")
    # Every row names its depth maps, but only the RGBD release has them.
    files = files_of_row(row, base, lacks_depths=True)
    # A row's own id recurs in other tasks and formats, so an id says where the row stands.
    key = f"{source_of(file)}/{row['type']}/{file.stem}/{row.get('id', '')}#{number}"
    question = Question(key, row, files, notes, scenes)
    yield Row(str(file), number, key, question.examples, files.all, notes=notes)


def source_of(file: Path) -> str:
    """Return scannet/train of spar/scannet/qa_jsonl/train/...; elsewhere the folder's name."""
    parts = file.absolute().parts
    if "qa_jsonl" not in parts[1:-2]:
        return file.absolute().parent.name
    at = parts.index("qa_jsonl")
    return f"{parts[at - 1]}/{parts[at + 1]}"


@dataclass
class Question:
    """A row that may be taken."""

    key: str
    row: dict
    files: Files
    notes: Notes
    scenes: Scenes | None

    def examples(self, headers: Headers, occlusion: bool = True) -> list[Example]:
        """Return the question on path lor and, where its objects are known, on dtr.

        occlusion: whether depth has to show the objects.
        """
        question, answer = only_turn(self.row)
        images = self.files.images
        several = len(images) > 1
        shapes = sizes_of(images, headers)
        marks = marks_of(self.row)
        question, masks = insert_masks(question, marks, several)
        cameras = [intrinsics(*pair, self.notes) for pair in zip(images, shapes, strict=True)]
        lor = Example(
            id=self.key,
            path="lor",
            images=marked(images, marks),
            question=question,
            answer=answer,
            task=self.row["type"],
            depths=depths_of(self.files.depths, shapes, headers),
            intrinsics=cameras if any(cameras) else None,
            regions=[(mark.view, mark.pixels(shapes[mark.view])) for mark in masks],
            frame=0 if several and FIRST.search(question) else None,
        )
        in_files = all(isinstance(image, str) for image in images)
        if not (self.scenes and marks and in_files):
            return [lor]
        # Centres go to both paths: on lor, they are only what eval compares with.
        # An estimated depth cannot tell what is hidden.
        depths = self.files.measured if occlusion else None
        truth = self.scenes.truth(images, shapes, marks, depths)
        if not truth:
            return [lor]
        return [replace(lor, path=path, **truth) for path in ("lor", "dtr")]


def intrinsics(image: str | Marked, shape: tuple[int, int], notes: Notes) -> tuple | None:
    """Return (fx, fy, cx, cy) of the image's scene, or None where none fits its size."""
    if isinstance(image, Marked):  # in the row itself, so beside no camera
        return None
    scene = Path(image).absolute().parent.parent
    camera = matrix(scene / "intrinsic" / "intrinsic_color.txt")
    if camera is None:
        return None
    # ScanNet's matrices are for 1296 x 968, whatever size the images are; other sets state none.
    stated = SCANNET if re.fullmatch(r"scene\d{4}_\d\d", scene.name) else None
    try:
        return pinhole(camera, shape, stated)
    except Bad:
        notes.add("cameras left out: written down for an image of another size")
        return None
