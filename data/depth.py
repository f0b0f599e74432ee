"""Depth for sets that have none: a depth model's, as a PNG a/b.depth.png beside each a/b.jpg.

    python -m data.depth --data llava:sets/chat.json@sets/images \\
        --model depth-anything/Depth-Anything-V2-Metric-Indoor-Large-hf

All loaders take that file where a row names no depth. It has 16 bits: millimetres, 0 where depth is
not finite, at most 65.535 m. Its text fields say which model it is from. A model of relative depth
is refused: what it predicts has no unit, and point maps are metric. A second call goes on with the
images that have no depth yet.
"""

import os
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import flags
from flags import Count


@dataclass
class Config:
    data: tuple[str, ...]  # sets: path or kind:path
    model: str  # hub id or directory of a depth model that transformers knows
    # what the model predicts; auto: by its config.json
    kind: Literal["auto", "metric"] = "auto"
    batch: Count = 8  # images at a time, of one size
    skip_bad_rows: bool = False  # go on without the unusable rows, and count them

    def __post_init__(self):
        flags.check(self)


if __name__ == "__main__":
    # Before the imports that take seconds: --help and a wrong flag are answered at once.
    cfg = flags.parse(Config, __doc__)

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from tqdm import tqdm
from transformers import AutoImageProcessor, AutoModelForDepthEstimation

import data
from data.marks import Marked
from data.rows import estimated, estimated_name, progress
from errors import UserError, launch, writing
from pictures import is_data_uri, picture_size, read_picture

# By model_type; Depth Anything's config says it itself.
KINDS = {"zoedepth": "metric", "glpn": "metric", "depth_pro": "metric", "dpt": "relative"}


def main(cfg: Config) -> None:
    files = missing(cfg)
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans for every new shape
    model, processor = load_model(cfg.model)
    kind = kind_of(model.config) if cfg.kind == "auto" else cfg.kind
    if kind != "metric":
        raise UserError(f"--model {cfg.model}: {kind} depth has no unit: a metric model is needed")
    about = PngImagePlugin.PngInfo()
    about.add_text("model", cfg.model)
    about.add_text("kind", kind)
    with tqdm(total=len(files), desc=f"{kind} depth", unit="image") as bar:
        for batch in batches(files, cfg.batch):
            images = [read_picture(file) for file in batch]
            for file, depth in zip(batch, predict(model, processor, images), strict=True):
                # Whole or not at all.
                part = f"{estimated_name(file)}.part"
                image = Image.fromarray(millimetres(depth))
                with writing(part, "images have to lie in a folder"):
                    image.save(part, format="png", pnginfo=about)
                    os.replace(part, estimated_name(file))
            bar.update(len(batch))
    print(f"{len(files)} depth maps, {kind} (by {cfg.model})")


def missing(cfg: Config) -> dict[str, tuple[int, int]]:
    """Return the sizes of the sets' image files without depth, those of one size together."""
    files = set()
    held = 0
    for example in data.load(cfg.data, cfg.skip_bad_rows):
        depths = example.depths or [None] * len(example.images)
        for image, depth in zip(example.images, depths, strict=True):
            if depth is not None:
                continue
            source = image.source if isinstance(image, Marked) else image
            if isinstance(source, str | os.PathLike) and not is_data_uri(source):
                files.add(str(source))
            else:
                held += 1
    if held:
        print(f"{held} images lie in no file of their own: no depth for them")
    # Images of one size make a batch without padding; by name within it, so that runs are alike.
    bare = [file for file in files if estimated(file) is None]
    if len(bare) < len(files):
        print(f"{len(files) - len(bare)} of {len(files)} images have a depth map already")
    sizes = {file: picture_size(file) for file in progress(bare, "sizes", "image", len(bare))}
    return dict(sorted(sizes.items(), key=lambda item: (item[1], item[0])))


def batches(sizes: dict[str, tuple], most: int):
    """Yield lists of at most that many files, whose images are of one size."""
    for _, group in groupby(sizes, key=sizes.get):
        alike = list(group)
        for start in range(0, len(alike), most):
            yield alike[start : start + most]


def load_model(name: str, flag: str = "--model"):
    """Return a depth model of transformers and its processor; UserError names the flag."""
    try:
        model = AutoModelForDepthEstimation.from_pretrained(name)
        processor = AutoImageProcessor.from_pretrained(name)
    except (ValueError, OSError) as error:
        raise UserError(f"{flag} {name}: {str(error).strip().splitlines()[0]}") from error
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device).eval(), processor


def kind_of(config) -> str:
    """Return "metric" or "relative" of a model's config."""
    kind = KINDS.get(config.model_type) or getattr(config, "depth_estimation_type", None)
    if kind is None:
        asked = f"a depth model of type {config.model_type!r}: is its depth metric or relative?"
        raise UserError(f"{asked} (data.depth takes --kind metric)")
    return kind


@torch.inference_mode()
def predict(model, processor, images: list) -> list[np.ndarray]:
    """Return the depth (H, W) of each image, at its own resolution."""
    sizes = [image.size[::-1] for image in images]
    # The processor brings them to the model's own size.
    inputs = processor(images=images, return_tensors="pt").to(model.device)
    # ZoeDepth pads its images; knowing their sizes, it cuts the padding off.
    padded = {"source_sizes": sizes} if model.config.model_type == "zoedepth" else {}
    outputs = model(**inputs)
    found = processor.post_process_depth_estimation(outputs, target_sizes=sizes, **padded)
    return [one["predicted_depth"].float().cpu().numpy() for one in found]


def millimetres(depth: np.ndarray) -> np.ndarray:
    """Turn metres (H, W) into what a 16-bit PNG holds."""
    # 0 is unknown, in all depth maps here.
    finite = np.nan_to_num(depth, nan=0, posinf=0, neginf=0)
    return (finite * 1000).round().clip(0, 65535).astype(np.uint16)


if __name__ == "__main__":
    launch("depth", main, cfg)
