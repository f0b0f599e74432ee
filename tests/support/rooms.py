"""Rendered rooms of known truth, for tests of readers: images without marks, depth, and where
things are."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from data.rooms.render import look, project, render, turn
from data.rooms.scene import furnish
from data.rooms.things import CORNERS

SIZE = (320, 240)


@dataclass
class Room:
    images: list  # PIL RGB, a view each
    depths: list  # (H, W) uint16 millimetres
    cameras: list
    things: list
    owners: list  # (H, W): index of the thing seen at a pixel, or -1

    def centre(self, thing: int, view: int) -> np.ndarray:
        return project(self.cameras[view], self.things[thing].centre[None])[0][0]

    def pixel(self, thing: int, view: int) -> np.ndarray:
        return project(self.cameras[view], self.things[thing].centre[None])[1][0]

    def box(self, thing: int, view: int) -> np.ndarray:
        """(4,) in 1/1000 of the image: where the corners of the thing's box lie, cut off at the
        image."""
        t = self.things[thing]
        corners = project(self.cameras[view], turn(CORNERS * t.half[:, None], t.yaw).T + t.centre)[
            1
        ]
        edges = np.concatenate([corners.min(0).clip(0, SIZE), corners.max(0).clip(0, SIZE)])
        return edges / (SIZE * 2) * 1000

    def seen(self, view: int) -> list[int]:
        """Things mostly unhidden in a view, seen at their centre, and in every other view as
        well."""
        good = []
        for k in range(len(self.things)):
            area, alone = (self.owners[view] == k).sum(), self.alone[view][k].sum()
            u, v = self.pixel(k, view).round().astype(int)
            inside = all(
                self.centre(k, w)[2] > 1 and (self.box(k, w)[2:] - self.box(k, w)[:2] > 40).all()
                for w in range(len(self.images))
            )
            if (
                area > 200
                and area > 0.8 * alone
                and inside
                and 0 <= u < SIZE[0]
                and 0 <= v < SIZE[1]
            ):
                good += [k] if self.owners[view][v, u] == k else []
        return good


def room(seed: int, views: int = 1) -> Room:
    rng = np.random.default_rng(seed)
    shell, camera, things = furnish(rng, SIZE)
    cameras = [camera]
    for k in range(1, views):
        aside = camera.position + (-1) ** k * 0.25 * k * camera.axes[0]
        aside = aside.clip(shell.low.ravel() + 0.1, shell.high.ravel() - 0.1)
        cameras.append(look(SIZE, camera.focal, aside, camera.position + 3 * camera.axes[2]))
    drawn = [render(shell, things, c) for c in cameras]
    found = Room(
        [Image.fromarray(rgb) for rgb, *_ in drawn],
        [(z * 1000).round().astype(np.uint16) for _, z, *_ in drawn],
        cameras,
        things,
        [owner for *_, owner, _ in drawn],
    )
    found.alone = [alone for *_, alone in drawn]
    return found


def rich(views: int, least: int) -> tuple[Room, list[int]]:
    """The first room with enough things that can be asked about, and which."""
    for seed in range(200):
        found = room(seed, views)
        both = [k for k in found.seen(0) if all(k in found.seen(v) for v in range(views))]
        if len(both) >= least:
            return found, both
    raise AssertionError("no such room")


def camera_to_world(camera) -> np.ndarray:
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = camera.axes.T, camera.position
    return pose


def matrix(camera) -> np.ndarray:
    return np.array(
        [[camera.focal, 0, (SIZE[0] - 1) / 2], [0, camera.focal, (SIZE[1] - 1) / 2], [0, 0, 1]]
    )


def jsonl(file: Path, rows: list) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return file


def save(image, file: Path) -> None:
    """Without loss, whatever the name ends in."""
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file, format="PNG")


SCENE = "scene0000_00"


def spar_images(found: Room, folder: Path, world=np.eye(4)) -> tuple[list[str], list[str]]:  # noqa: B008
    """spar/scannet/images of the RGBD release -> names of images and depth maps. world: moves the
    axes."""
    images = folder / "spar" / "scannet" / "images"
    names = [
        [f"{SCENE}/image_color/{7 * v}.jpg", f"{SCENE}/image_depth/{7 * v}.png"]
        for v in range(len(found.images))
    ]
    for v, (image, depth) in enumerate(names):
        save(found.images[v], images / image)
        save(Image.fromarray(found.depths[v]), images / depth)
        pose = images / SCENE / "pose" / f"{7 * v}.txt"
        pose.parent.mkdir(exist_ok=True)
        np.savetxt(pose, world @ camera_to_world(found.cameras[v]))
    (images / SCENE / "intrinsic").mkdir(exist_ok=True)
    four = np.eye(4)
    four[:3, :3] = matrix(found.cameras[0])
    np.savetxt(images / SCENE / "intrinsic" / "intrinsic_color.txt", four)
    return tuple(zip(*names, strict=True))


def spar_file(folder: Path, task: str, rows: list, form: str = "fill") -> Path:
    file = (
        folder
        / "spar"
        / "scannet"
        / "qa_jsonl"
        / "train"
        / task
        / form
        / f"{form}_{len(rows)}.jsonl"
    )
    return jsonl(file, rows)


def spar_row(task: str, images, question: str, answer: str, **fields) -> dict:
    said = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {
        "id": f"{SCENE}_16",
        "conversations": said,
        "image": list(images),
        "type": task,
        **fields,
    }
