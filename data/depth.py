"""Depth for sets that have none: a depth model's, as a 16-bit PNG a/b.depth.png beside each image
a/b.jpg.

    python -m data.depth --data llava:sets/chat.json@sets/images \\
        --model depth-anything/Depth-Anything-V2-Metric-Indoor-Large-hf

All loaders take that file where a row names no depth. What a model of metric depth says is kept, in
millimetres (0 where it is not finite, at most 65.535 m). One of relative depth says a disparity d,
which has no unit: written is 1 / (1/10 + 9/10 d) m with d brought to 0..1, so that the nearest
pixel is at 1 m and the farthest at 10 m; the relative point map (model/head3d.py) takes no notice
of that scale, the metric one would take it for true, so data.load leaves it out and says so. Each
PNG says in its text fields which model and kind it is from. A second call goes on with the images
that have no depth yet.
"""

import os
import sys
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import numpy as np
import torch
import tyro
from PIL import Image, PngImagePlugin
from tqdm import tqdm
from transformers import AutoImageProcessor, AutoModelForDepthEstimation

import data
from data.marks import Marked

# by model_type
KINDS = {"zoedepth": "metric", "glpn": "metric", "depth_pro": "metric", "dpt": "relative"}


@dataclass
class Config:
    data: tuple[str, ...]  # sets: path or kind:path
    model: str  # hub id or directory of a depth model that transformers knows
    # what the model predicts; auto: by its config.json
    kind: Literal["auto", "metric", "relative"] = "auto"
    batch: int = 8  # images at a time, of one size
    skip_bad_rows: bool = False  # go on without the unusable rows, and count them


def place(image: str) -> str:
    return f"{os.path.splitext(image)[0]}.depth.png"


def kind_of(config) -> str:
    # Depth Anything's
    kind = KINDS.get(config.model_type) or getattr(config, "depth_estimation_type", None)
    if kind is None:
        raise ValueError(
            f"a depth model of type {config.model_type!r}: say --kind metric or --kind relative"
        )
    return kind


def millimetres(depth: np.ndarray, kind: str) -> np.ndarray:
    """What the model says (H, W) -> uint16."""
    if kind == "relative":
        low, high = depth.min(), depth.max()
        depth = 1 / (0.1 + 0.9 * (depth - low) / max(high - low, 1e-9))
    return (
        (np.nan_to_num(depth, nan=0, posinf=0, neginf=0) * 1000)
        .round()
        .clip(0, 65535)
        .astype(np.uint16)
    )


@torch.inference_mode()
def predict(model, processor, images: list) -> list[np.ndarray]:
    """Depth or disparity (H, W) of each image, at its own resolution."""
    sizes = [image.size[::-1] for image in images]
    inputs = processor(images=images, return_tensors="pt").to(model.device)
    # whose padding goes
    padded = {"source_sizes": sizes} if model.config.model_type == "zoedepth" else {}
    found = processor.post_process_depth_estimation(model(**inputs), target_sizes=sizes, **padded)
    return [one["predicted_depth"].float().cpu().numpy() for one in found]


def missing(cfg: Config) -> list[str]:
    """Image files of the sets without depth, those of one size together."""
    examples = data.load(cfg.data, cfg.skip_bad_rows)
    pairs = [
        pair
        for e in examples
        for pair in zip(e.images, e.depths or [None] * len(e.images), strict=True)
    ]
    bare = [
        image.source if isinstance(image, Marked) else image
        for image, depth in pairs
        if depth is None
    ]
    files = {str(image) for image in bare if isinstance(image, str | os.PathLike)}
    if held := sum(not isinstance(image, str | os.PathLike) for image in bare):
        print(f"{held} images lie in no file of their own: no depth for them")
    return sorted(
        (file for file in files if not os.path.exists(place(file))), key=lambda f: (size(f), f)
    )


def size(file: str) -> tuple[int, int]:
    with Image.open(file) as image:
        return image.size


def main(cfg: Config) -> None:
    if cfg.batch < 1:
        raise ValueError(f"--batch {cfg.batch}: at least 1")
    files = missing(cfg)
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans for every new shape
    try:
        model = AutoModelForDepthEstimation.from_pretrained(cfg.model)
        processor = AutoImageProcessor.from_pretrained(cfg.model)
    except (ValueError, OSError) as error:
        raise ValueError(f"--model {cfg.model}: {str(error).strip().splitlines()[0]}") from error
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    kind = kind_of(model.config) if cfg.kind == "auto" else cfg.kind
    about = PngImagePlugin.PngInfo()
    about.add_text("model", cfg.model)
    about.add_text("kind", kind)
    alike = [list(group) for _, group in groupby(files, key=size)]
    batches = [group[i : i + cfg.batch] for group in alike for i in range(0, len(group), cfg.batch)]
    with tqdm(total=len(files), desc=f"{kind} depth", unit="image") as bar:
        for batch in batches:
            images = [Image.open(file).convert("RGB") for file in batch]
            for file, depth in zip(batch, predict(model, processor, images), strict=True):
                part = f"{place(file)}.part"
                Image.fromarray(millimetres(depth, kind)).save(part, format="png", pnginfo=about)
                os.replace(part, place(file))  # whole or not at all
            bar.update(len(batch))
    print(f"{len(files)} depth maps, {kind} (by {cfg.model})")


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=__doc__.split("\n\n")[0]))
    except (ValueError, OSError) as error:  # rows, files, the model: what a user can mend
        print(f"depth: {error}", file=sys.stderr)
        sys.exit(2)
