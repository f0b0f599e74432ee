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
import pickle
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np

from data.rows import Bad, BadSource, Notes, matrix, pinhole, typed
from data.sets.spar_marks import Mark
from pictures import BadPicture, read_turned

SCANNET = 1296, 968  # width, height of its colour camera: what its matrices are written down for
IOU_ONE_VIEW = 0.74
IOU_SEVERAL_VIEWS = 0.70
NEAR = 40  # of a point, in 1/1000 of the image
SLACK = 0.1  # metres around the box in which the depth map may show the object
SEEN = 0.2  # share of the mark's pixels that has to show it

# ---- Reading the annotations

HARMLESS = {
    *("list", "dict", "set", "frozenset", "tuple", "range", "slice"),
    *("int", "float", "complex", "bool", "str", "bytes", "bytearray"),
}
# numpy moved the functions that rebuild an array between versions; an array itself names them.
ARRAY = np.zeros(1)
NUMPY = {
    "_reconstruct": ARRAY.__reduce__()[0],
    "_frombuffer": ARRAY.__reduce_ex__(5)[0],
    "scalar": ARRAY[0].__reduce__()[0],
    "ndarray": np.ndarray,
    "dtype": np.dtype,
}


def latin1(text: str, encoding: str) -> bytes:
    """Stand in for _codecs.encode, by which pickle's protocol 2 writes bytes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes in {encoding}")
    return text.encode("latin1")


class Restricted(pickle.Unpickler):
    """An unpickler that knows builtins and numpy arrays, and calls nothing else."""

    def find_class(self, module: str, name: str):
        if module in ("builtins", "__builtin__") and name in HARMLESS:
            return getattr(builtins, name)
        if module.split(".")[0] == "numpy" and name in NUMPY:
            return NUMPY[name]
        if (module, name) == ("_codecs", "encode"):
            return latin1
        reason = f"it holds {module}.{name}: only builtins and numpy arrays are read"
        raise pickle.UnpicklingError(reason)


@dataclass
class Scene:
    """A scan of ScanNet, and its N objects in an axis-aligned world."""

    align: np.ndarray  # (4, 4): the scan's world -> the axis-aligned world
    camera: list  # the colour camera's matrix, of 1296 x 968
    boxes: np.ndarray  # (N, 9): centre, size, angles
    labels: list[str]

    @cached_property
    def points(self) -> np.ndarray:
        """(N, 9, 3): the corners and the centre of each box, worked out when a row asks."""
        return points_of(self.boxes)


# What is looked up in the annotations: arrays are taken as they are, of any type.
CONTENT = {"metainfo": dict, "data_list": list[dict]}
SCENE = {"axis_align_matrix": object, "cam2img": object, "instances": list[dict]}
INSTANCE = {"bbox_3d": object, "bbox_label_3d": object}


# The sources of a mixture look into one file, which takes longer to unpickle than rows to read.
@lru_cache(2)
def read(file: Path, changed: int) -> dict[str, Scene]:
    """Return the scenes of ScanNet by name. changed: when, in ns: no older copy is taken."""
    wanted = f"{file}: not EmbodiedScan's annotations"
    try:
        with open(file, "rb") as stream:
            content = Restricted(stream).load()
    except Exception as error:  # a damaged pickle raises all sorts
        raise BadSource(f"{wanted}: {type(error).__name__}: {error}") from error
    try:
        return scenes_in(content)
    except Bad as error:
        raise BadSource(f"{wanted}: {error}") from error


def scenes_in(content: dict) -> dict[str, Scene]:
    content = typed(content, CONTENT, {})
    categories = typed(content["metainfo"], {"categories": dict}, {})["categories"]
    names = {label: name for name, label in categories.items()}
    scenes = {}
    for scene in content["data_list"]:
        # The file also has 3RScan and Matterport, for which SPAR has no questions.
        if not str(scene.get("sample_idx")).startswith("scannet/"):
            continue
        fields = typed(scene, SCENE, {})
        instances = [typed(instance, INSTANCE, {}) for instance in fields["instances"]]
        boxes = [instance["bbox_3d"] for instance in instances]
        scenes[scene["sample_idx"]] = Scene(
            np.asarray(fields["axis_align_matrix"], float),
            np.asarray(fields["cam2img"], float).tolist(),
            np.asarray(boxes, float).reshape(-1, 9),
            [names.get(instance["bbox_label_3d"], "object") for instance in instances],
        )
    return scenes


# ---- Geometry

HALVES = np.array([-0.5, 0.5])
CORNERS = np.stack(np.meshgrid(HALVES, HALVES, HALVES, indexing="ij"), -1).reshape(8, 3)


def rotation(angles) -> np.ndarray:
    """Turn (N, 3) Euler angles "zxy" into (N, 3, 3) matrices Rz Rx Ry.

    So do Open3D and PyTorch3D read EmbodiedScan's.
    """
    z, x, y = np.transpose(angles)
    return about(2, z) @ about(0, x) @ about(1, y)


def about(axis: int, angle: np.ndarray) -> np.ndarray:
    """Return (N, 3, 3) rotations about an axis of the coordinates."""
    i = (axis + 1) % 3
    j = (axis + 2) % 3
    matrix = np.zeros((len(angle), 3, 3))
    matrix[:, axis, axis] = 1
    matrix[:, i, i] = matrix[:, j, j] = np.cos(angle)
    matrix[:, j, i] = np.sin(angle)
    matrix[:, i, j] = -matrix[:, j, i]
    return matrix


def points_of(boxes: np.ndarray) -> np.ndarray:
    """Return (N, 9, 3) of (N, 9) boxes: the eight corners, and the centre."""
    # Half the size along the box's own axes, turned into the world's.
    corners = CORNERS * boxes[:, None, 3:6] @ rotation(boxes[:, 6:]).swapaxes(1, 2)
    centre = np.zeros((len(boxes), 1, 3))
    return boxes[:, None, :3] + np.concatenate([corners, centre], 1)


def project(points: np.ndarray, world_to_camera: np.ndarray, camera: tuple, image: tuple[int, int]):
    """Project (N, 9, 3) points of boxes into an image of (width, height).

    Returns centres (N, 3) in the camera's frame, rectangles (N, 4) in 1/1000 of the image, nan
    where none is seen, and the least and largest z (N, 2) of the corners.
    """
    points = points @ world_to_camera[:3, :3].T + world_to_camera[:3, 3]
    corners = points[:, :8]
    depth = corners[..., 2]
    # u = fx x / z + cx, v = fy y / z + cy, for corners in front of the camera.
    fx, fy, cx, cy = camera
    # A corner behind the camera has no pixel: it widens the rectangle in neither direction.
    front = depth[..., None] > 0.1
    pixels = corners[..., :2] * (fx, fy) / np.where(front, depth[..., None], 1) + (cx, cy)
    low = np.where(front, pixels, np.inf).min(1).clip(0, image)
    high = np.where(front, pixels, -np.inf).max(1).clip(0, image)
    # In 1/1000 and cut down to whole numbers, as the paper's code compares them with the marks.
    rectangles = np.concatenate([low, high], 1) / (image * 2) * 1000
    # What has no extent after clipping lies outside of the image, or behind the camera.
    rectangles[((high - low) / image <= 0.001).any(1)] = np.nan
    reach = np.stack([depth.min(1), depth.max(1)], 1)
    return points[:, 8], np.trunc(rectangles), reach


def fits(mark: Mark, rectangles: np.ndarray, several: bool) -> np.ndarray:
    """Return the indices of the projections (N, 4) that a mark can mean; nan is none."""
    low = rectangles[:, :2]
    high = rectangles[:, 2:]
    if mark.kind == "point":
        offset = (low + high) / 2 - mark.at
        return np.flatnonzero(np.hypot(offset[:, 0], offset[:, 1]) < NEAR)
    mark_low = np.asarray(mark.at[:2])
    mark_high = np.asarray(mark.at[2:])
    sides = np.minimum(high, mark_high) - np.maximum(low, mark_low)
    intersection = sides.clip(0).prod(1)
    areas = (high - low).prod(1) + (mark_high - mark_low).prod()
    # nan of an unseen box compares as false below.
    iou = intersection / (areas - intersection)
    return np.flatnonzero(iou > (IOU_SEVERAL_VIEWS if several else IOU_ONE_VIEW))


def visible(depth: str, box: tuple, near: float, far: float) -> bool:
    """Say whether enough of the depth map within a mark (1/1000) lies at its object's depth."""
    try:
        picture = read_turned(depth)
    except BadPicture as error:
        raise Bad("depths", f"corrupt file: {depth}: {error}") from error
    # Of the depth map's own size, which may be another than the image's.
    sides = picture.size * 2
    edges = [round(v * side / 1000) for v, side in zip(box, sides, strict=True)]
    part = picture.crop(edges)
    metres = np.asarray(part) / 1000
    # 0 is unknown: glass and mirrors have none, and don't hide anything.
    known = metres[metres > 0]
    if len(known) == 0:
        return False
    shown = (known > near - SLACK) & (known < far + SLACK)
    return bool(shown.mean() >= SEEN)


# ---- Marks and their objects


class NoTruth(Exception):
    """Why a row gets no centres; it is counted, and the row is asked on path lor alone."""


class Scenes:
    """The scenes of EmbodiedScan's files, and a count of what came of looking for marks in them."""

    def __init__(self, files: list[Path], notes: Notes):
        self.scenes = {}
        for file in files:
            self.scenes |= read(file, file.stat().st_mtime_ns)
        self.notes = notes

    def truth(
        self, images: list[str], shapes: list, marks: list[Mark], depths: list | None
    ) -> dict | None:
        """Return `objects`, `names` and `sizes` of an Example, or None: why is in the notes.

        shapes: (width, height) by image. depths: measured map or None, by image; None: don't check.
        """
        try:
            found = self.find(images, shapes, marks, depths)
        except NoTruth as reason:
            self.notes.add(f"rows {reason}")
            return None
        self.notes.add("rows with DTR truth")
        if depths and not all(depths[mark.view] for mark in marks):
            self.notes.add("of them without a depth map to check")
        return found

    def find(self, images: list[str], shapes: list, marks: list[Mark], depths: list | None) -> dict:
        scene = self.scenes.get(f"scannet/{Path(images[0]).parents[1].name}")
        if scene is None:
            raise NoTruth("without their scene in EmbodiedScan")
        views = self.project_all(scene, images, shapes)
        # One mark without its object, and the row has no truth: half would teach a wrong count.
        objects = {}
        names = {}
        sizes = {}
        for mark in marks:
            k = only_match(mark, views)
            _, _, reach = views[mark.view]
            if (
                depths
                and depths[mark.view]
                and not visible(depths[mark.view], mark.box(), *reach[k])
            ):
                raise NoTruth("with a hidden object")
            centres = {view: tuple(xyz[k].tolist()) for view, (xyz, _, _) in enumerate(views)}
            objects[mark.mention] = centres if len(images) > 1 else centres[0]
            names[mark.mention] = scene.labels[k]
            # (w, h, l): the box's z is up, its y is its length.
            sizes[mark.mention] = tuple(scene.boxes[k, [3, 5, 4]].tolist())
        return {"objects": objects, "names": names, "sizes": sizes}

    def project_all(self, scene: Scene, images: list[str], shapes: list) -> list[tuple]:
        """Return what `project` makes of the scene's boxes, by image."""
        views = []
        for image, shape in zip(images, shapes, strict=True):
            world_to_camera = np.linalg.inv(scene.align @ pose_of(image))
            try:
                camera = pinhole(scene.camera, shape, SCANNET)
            except Bad:
                reason = "with images of another size than EmbodiedScan's camera"
                raise NoTruth(reason) from None
            views.append(project(scene.points, world_to_camera, camera, shape))
        return views


def only_match(mark: Mark, views: list[tuple]) -> int:
    """Return the index of the one object that a mark can mean, seen in every view."""
    _, rectangles, _ = views[mark.view]
    # Two that fit are as bad as none: nothing says which is meant.
    candidates = fits(mark, rectangles, len(views) > 1)
    if len(candidates) != 1:
        how_many = "several candidates" if len(candidates) else "no candidate"
        raise NoTruth(f"with {how_many} for a mark")
    k = candidates[0]
    if any(np.isnan(rectangles[k]).any() for _, rectangles, _ in views):
        raise NoTruth("with an object outside of a view")
    return k


def pose_of(image: str) -> np.ndarray:
    """Return the (4, 4) camera-to-world matrix of an image.

    It stands in scene/pose/7.txt of scene/image_color/7.jpg, in scene/video_pose/7.txt of
    scene/video_color/7.jpg.
    """
    file = Path(image)
    folder = "video_pose" if file.parent.name == "video_color" else "pose"
    try:
        pose = matrix(file.parents[1] / folder / f"{file.stem}.txt")
    except Bad:  # ScanNet has poses of -inf, where tracking failed
        pose = None
    # A matrix that can't be inverted is no pose, either.
    if pose is None or np.shape(pose) != (4, 4) or np.linalg.det(pose) == 0:
        raise NoTruth("without poses")
    return np.array(pose)
