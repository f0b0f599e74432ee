r"""Write a prompt as its decoder reads it: embeddings, image, depth and region tokens in place.

    python -m model.prompt_embeds --model out/rl/step-000100 --image room.png \
        --region 40 60 210 300 --question "How far is the chair (red bbox <mask>)?" \
        --path lor --out prompt.safetensors

For engines that don't know what stands at <mask>. What each of them can do with it, and what not,
is in docs/serve.md. T tokens, M image tokens, R regions, H the hidden size; in the checkpoint's
dtype:

    prompt_embeds    (T, H), the whole prompt: transformers' inputs_embeds
    position_ids     (3, T), mRoPE
    input_ids        (T,), for the tokens that are no image and no region

    image_embeds     (M, H), of Qwen3-VL (M, H * (1 + levels)): deepstack's features behind
    image_grid_thw   (1, 3), of the image in patches
    image_at         (M,), where the image tokens are in T
    region_embeds    (R, H), in the order of the <mask>s
    region_at        (R,), where those are in T

The file's metadata hold `text`, the user turn behind the image, with a <mask> a region.
"""

from dataclasses import dataclass, replace
from typing import Literal

import flags
from errors import UserError, launch, writing
from flags import Count, Positive, PositiveOrZero
from srreal import PATHS


@dataclass
class Config:
    model: str  # checkpoint directory, a run's directory, or hub id
    image: str  # file
    question: str  # where it says <mask>, the next --region stands
    out: str  # the .safetensors file to write
    # pixels x0 y0 x1 y1 of a region of the image; several: again
    region: tuple[tuple[PositiveOrZero, PositiveOrZero, PositiveOrZero, PositiveOrZero], ...] = ()
    depth: str | None = None  # a 16-bit PNG of the image's size, millimetres
    # fx fy cx cy in pixels of the image; None: a horizontal field of view of 60 degrees, with depth
    intrinsics: tuple[Positive, Positive, Positive, Positive] | None = None
    path: Literal[tuple(PATHS)] = "lor"  # how to ask
    # how the model reads a region: as its token, or as its box in text
    regions: Literal["token", "text"] = "token"
    max_pixels: Count | None = None  # image size limit; None: the checkpoint's own

    def __post_init__(self):
        flags.check(self)
        if not self.out.endswith(".safetensors"):
            raise UserError(f"--out {self.out}: a .safetensors file")


if __name__ == "__main__":
    # Before the imports that take seconds: --help and a wrong flag are answered at once.
    cfg = flags.parse(Config, __doc__)

import torch
from safetensors.torch import save_file
from torch import Tensor

from ask import prepare
from model.files import resolve
from model.processor import Processor
from model.qwen_vl import QwenVL
from srreal import Example, prompt


@torch.no_grad()
def embed_prompt(model: QwenVL, processor: Processor, example: Example) -> dict[str, Tensor]:
    """Return the tensors of one prompt, by the names above; what it lacks is left out."""
    batch = processor([example]).to(model.device)
    # The vision tower and the region tokens; of the decoder the embedding table alone is used.
    embeds, deepstack = model.embed(batch)
    tensors = {
        "prompt_embeds": embeds,
        "position_ids": batch.position_ids,
        "input_ids": batch.input_ids,
    }
    if example.images:
        # vLLM cuts what follows the first H columns into the levels of deepstack.
        tensors["image_embeds"] = torch.cat((embeds[batch.image_at], *deepstack), dim=1)
        tensors["image_grid_thw"] = batch.image_grid_thw
        tensors["image_at"] = batch.image_at
    if len(batch.region_token):
        tensors["region_embeds"] = embeds[batch.region_token]
        tensors["region_at"] = batch.region_token
    # safetensors refuses views and tensors that share memory.
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


def main(cfg: Config) -> None:
    asked = prepare(cfg)
    directory = resolve(cfg.model)
    processor = Processor.from_pretrained(directory, max_pixels=cfg.max_pixels, regions=cfg.regions)
    model = QwenVL.from_pretrained(directory, regions=cfg.regions)
    example = replace(asked.example, path=cfg.path)
    tensors = embed_prompt(model, processor, example)
    for sentence in asked.assumed:
        print(f"(assumed: {sentence})")
    with writing(cfg.out):
        save_file(tensors, cfg.out, metadata={"text": prompt(example)})
    tokens, width = tensors["prompt_embeds"].shape
    print(f"{cfg.out}: {tokens} tokens of {width} numbers")


if __name__ == "__main__":
    launch("prompt_embeds", main, cfg)
