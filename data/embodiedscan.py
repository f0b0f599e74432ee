"""Where the marked objects of SPAR's ScanNet rows are in 3D: EmbodiedScan's boxes, projected and
compared.

EmbodiedScan has (centre, size, angles) of every object of a scene, in an axis-aligned world;
SPAR-7M-RGBD the pose of every image. A mark's object is the only one whose projection fits it:
    box      IoU > 0.74 (one image), > 0.70 (several), projection clipped to the image
    point    closer than 40 to the centre of the projection, in 1/1000 of the image
none or two, and the row has no truth. So far the paper. Its code doesn't ask whether the object can
be seen: a box fits whatever stands in front of it. Here the depth map, where one was measured, must
lie between the box's nearest and farthest corner on at least a fifth of the mark's pixels (a
source's `occlusion=off` is the paper's rule). As in the paper, an object has to project into every
view.

The .pkl is data, and is read as such: an unpickler that knows builtins and numpy arrays, and calls
nothing else."""

import builtins
import os
import pickle
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from data.rows import Bad, Notes, matrix, pinhole

SCANNET = 1296, 968  # width, height of its colour camera: what its matrices are written down for
IOU = {False: 0.74, True: 0.70}  # several images?
NEAR = 40  # of a point, in 1/1000 of the image
SLACK, SEEN = 0.1, 0.2  # metres around the box; share of the mark's pixels within
CORNERS = np.stack(np.meshgrid(*[[-0.5, 0.5]] * 3, indexing="ij"), -1).reshape(8, 3)
HARMLESS = {
    "list",
    "dict",
    "set",
    "frozenset",
    "tuple",
    "int",
    "float",
    "complex",
    "bool",
    "str",
    "bytes",
    "bytearray",
    "slice",
    "range",
}
ARRAY = np.zeros(1)
NUMPY = {
    "_reconstruct": ARRAY.__reduce__()[0],
    "_frombuffer": ARRAY.__reduce_ex__(5)[0],
    "scalar": ARRAY[0].__reduce__()[0],
    "ndarray": np.ndarray,
    "dtype": np.dtype,
}


def latin1(text: str, encoding: str) -> bytes:
    """How protocol 2 writes bytes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes in {encoding}")
    return text.encode("latin1")


class Restricted(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        if module in ("builtins", "__builtin__") and name in HARMLESS:
            return getattr(builtins, name)
        if module.split(".")[0] == "numpy" and name in NUMPY:
            return NUMPY[name]
        if (module, name) == ("_codecs", "encode"):
            return latin1
        raise pickle.UnpicklingError(
            f"it holds {module}.{name}: only builtins and numpy arrays are read"
        )


@lru_cache(2)
def read(file: Path, changed: int) -> dict:
    """Scene -> axis_align_matrix (4, 4), camera matrix, boxes (N, 9), their points (N, 9, 3),
    classes. Kept, as several sources of a mixture look into one file. changed: when, in ns: an
    older copy isn't taken."""
    try:
        with open(file, "rb") as stream:
            content = Restricted(stream).load()
        classes = {label: name for name, label in content["metainfo"]["categories"].items()}
        return {
            scene["sample_idx"]: scene_of(scene, classes)
            for scene in content["data_list"]
            if str(scene["sample_idx"]).startswith("scannet/")
        }
    except Exception as error:  # of pickle all sorts, of content KeyError, TypeError, ValueError
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"{file}: not EmbodiedScan's annotations: {what}") from error


def scene_of(scene: dict, classes: dict) -> tuple:
    boxes = np.asarray([item["bbox_3d"] for item in scene["instances"]], float).reshape(-1, 9)
    labels = [classes.get(item["bbox_label_3d"], "object") for item in scene["instances"]]
    align, camera = (np.asarray(scene[key], float) for key in ("axis_align_matrix", "cam2img"))
    return align, camera.tolist(), boxes, points_of(boxes), labels


def rotation(angles) -> np.ndarray:
    """(N, 3) of Euler angles "zxy" -> (N, 3, 3): Rz Rx Ry, as Open3D and PyTorch3D read
    EmbodiedScan's."""
    (a, b, c), zero, one = np.transpose(angles), np.zeros(len(angles)), np.ones(len(angles))

    def stack(*rows):
        return np.moveaxis(np.array(rows), -1, 0)

    z = stack((np.cos(a), -np.sin(a), zero), (np.sin(a), np.cos(a), zero), (zero, zero, one))
    x = stack((one, zero, zero), (zero, np.cos(b), -np.sin(b)), (zero, np.sin(b), np.cos(b)))
    y = stack((np.cos(c), zero, np.sin(c)), (zero, one, zero), (-np.sin(c), zero, np.cos(c)))
    return z @ x @ y


def points_of(boxes: np.ndarray) -> np.ndarray:
    """(N, 9) boxes -> (N, 9, 3): the eight corners, and the centre."""
    corners = CORNERS * boxes[:, None, 3:6] @ rotation(boxes[:, 6:]).swapaxes(1, 2)
    return boxes[:, None, :3] + np.concatenate([corners, np.zeros((len(boxes), 1, 3))], 1)


def project(points: np.ndarray, world_to_camera: np.ndarray, camera: tuple, image: tuple[int, int]):
    """(N, 9, 3) of points_of -> centres (N, 3) in the camera's frame, rectangles (N, 4) in 1/1000
    of the image, NaN where none is seen, and the least and largest z (N, 2) of the corners."""
    points = points @ world_to_camera[:3, :3].T + world_to_camera[:3, 3]
    corners, centres = points[:, :8], points[:, 8]
    fx, fy, cx, cy = camera
    front = corners[..., 2:] > 0.1
    pixels = corners[..., :2] * (fx, fy) / np.where(front, corners[..., 2:], 1) + (cx, cy)
    low = np.where(front, pixels, np.inf).min(1).clip(0, image)
    high = np.where(front, pixels, -np.inf).max(1).clip(0, image)
    seen = ((high - low) / image > 0.001).all(1)  # else it lies outside, or behind
    rectangles = np.where(
        seen[:, None], np.concatenate([low, high], 1) / (image * 2) * 1000, np.nan
    )
    return (
        centres,
        np.trunc(rectangles),
        np.stack([corners[..., 2].min(1), corners[..., 2].max(1)], 1),
    )


def fits(mark, rectangles: np.ndarray, several: bool) -> np.ndarray:
    """Which of the projections (N, 4) a mark can mean: their indices. NaN compares as false."""
    if mark.kind == "point":
        return np.flatnonzero(
            np.hypot(*((rectangles[:, :2] + rectangles[:, 2:]) / 2 - mark.at).T) < NEAR
        )
    at = np.asarray(mark.at)
    sides = np.minimum(rectangles[:, 2:], at[2:]) - np.maximum(rectangles[:, :2], at[:2])
    inter = sides.clip(0).prod(1)
    areas = (rectangles[:, 2:] - rectangles[:, :2]).prod(1) + (at[2:] - at[:2]).prod()
    return np.flatnonzero(inter / (areas - inter) > IOU[several])


def visible(depth: str, box: tuple, low: float, high: float) -> bool:
    """Whether enough of the depth map within a mark (1/1000) lies at the depth of its object."""
    try:
        with Image.open(depth) as picture:
            edges = [round(v * side / 1000) for v, side in zip(box, picture.size * 2, strict=True)]
            metres = np.asarray(picture.crop(edges)) / 1000
    except Exception as error:  # Pillow raises all sorts on bad bytes
        raise Bad("depths", f"corrupt file: {depth}: {error}") from error
    known = metres[metres > 0]
    return len(known) > 0 and ((known > low - SLACK) & (known < high + SLACK)).mean() >= SEEN


class Scenes:
    """The scenes of EmbodiedScan's files, and what came of looking for marks in them."""

    def __init__(self, files: list[Path], notes: Notes):
        self.scenes = {
            name: scene
            for file in files
            for name, scene in read(file, file.stat().st_mtime_ns).items()
        }
        self.notes = notes

    def truth(
        self, images: list[str], shapes: list, marks: list, depths: list | None
    ) -> dict | None:
        """objects, names and sizes of an Example, or None: why is in the notes. depths None: not
        checked."""
        found = self.find(images, shapes, marks, depths)
        self.notes.add(f"rows {found}" if isinstance(found, str) else "rows with DTR truth")
        return None if isinstance(found, str) else found

    def find(self, images, shapes, marks, depths) -> dict | str:
        scene = self.scenes.get(f"scannet/{Path(images[0]).parents[1].name}")
        try:
            poses = [matrix(pose_file(image)) for image in images]
        # ScanNet has poses of -inf, where tracking failed
        except Bad:
            poses = [None]
        if scene is None or not all(poses):
            return "without their scene in EmbodiedScan" if scene is None else "without poses"
        align, colour, boxes, points, labels = scene
        try:
            cameras = [pinhole(colour, shape, SCANNET) for shape in shapes]
        except Bad:
            return "with images of another size than EmbodiedScan's camera"
        views = [
            project(points, np.linalg.inv(align @ pose), camera, shape)
            for pose, camera, shape in zip(poses, cameras, shapes, strict=True)
        ]
        truth: dict = {"objects": {}, "names": {}, "sizes": {}}
        for mark in marks:
            k = fits(mark, views[mark.view][1], len(images) > 1)
            if len(k) != 1:
                return f"with {'several candidates' if len(k) else 'no candidate'} for a mark"
            k, depth = k[0], depths and depths[mark.view]
            if any(np.isnan(rectangles[k]).any() for _, rectangles, _ in views):
                return "with an object outside of a view"
            if depth and not visible(depth, mark.box(), *views[mark.view][2][k]):
                return "with a hidden object"
            centres = {view: tuple(found[0][k].tolist()) for view, found in enumerate(views)}
            truth["objects"][mark.mention] = centres if len(images) > 1 else centres[0]
            truth["names"][mark.mention] = labels[k]
            # w, h (its z is up), l
            truth["sizes"][mark.mention] = tuple(boxes[k, [3, 5, 4]].tolist())
        if depths and not all(depths[mark.view] for mark in marks):
            self.notes.add("of them without a depth map to check")
        return truth


def pose_file(image: str) -> Path:
    """scene/image_color/7.jpg -> scene/pose/7.txt, scene/video_color/7.jpg ->
    scene/video_pose/7.txt"""
    file = Path(image)
    folder = {"image_color": "pose", "video_color": "video_pose"}.get(file.parent.name, "pose")
    return file.parents[1] / folder / f"{os.path.splitext(file.name)[0]}.txt"
