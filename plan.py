"""What training a model by RL will take of a GPU, and the settings to choose, before anything is loaded.

    python plan.py --model Qwen/Qwen2.5-VL-7B-Instruct --gpus 8 --memory 80

Only config.json is read; parameters are counted on the model itself, on the meta device. GB are 1e9 bytes of
each of the N GPUs of a box. Of A parameters T learn; b bytes a weight (2); t tokens a forward pass
(--micro-tokens).

    weights             A b, and T b / N more where training is sharded: the rollout reads a whole copy
    master and moments  T (4 + 4 + 4), with stochastic rounding T (2 + 2); / N if sharded
    reference           A b / N; with one GPU on the host; none at --kl 0; with LoRA adapters are switched off
    cache               rollout: (slots R + prompts P) 2 layers (key-value heads) (head width) b
    sampler             rollout: 3 fp32 rows of logits a slot
    gradients           update: T b, / N if sharded, and what a sharded layer and the embeddings are gathered
                        to
    activations         update: t layers (4 H + 2 (query + key-value heads) D + 4 I) b, and what the norms
                        keep in fp32; with checkpointing t layers H b, and one layer whole
    logits              update: 64 MB, and the head's gradient in fp32
    pixels              update: the vision tower's patches of t; its activations where it learns, else a
                        block's

The peak is what stays and the larger of rollout and update. The first candidate that fits into the memory
less RESERVE is chosen: replicated before sharded, whole activations before checkpointing, fp32 masters before
stochastic rounding, all of these before LoRA; then as many slots as the update leaves room for, or BUSY.
"""
import sys
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Literal

import torch
import tyro
from transformers import AutoConfig

from model.checkpoint import read_config
from model.lora import attach
from model.qwen_vl import QwenVL, Sizes
from trainer import TRAIN

RESERVE = 1.5, 0.05  # GB of CUDA, its libraries and NCCL; share of the rest that lies in gaps
BUSY, SLOTS = 128, 384  # live samples that keep a GPU busy; above SLOTS the matrix products gain nothing more
LORA = 32  # the rank that is suggested


@dataclass
class Config:
    model: str  # checkpoint directory or hub id
    gpus: int = 1  # of one box
    memory: float = 80.0  # GB of each
    prompts: int = 64  # a step, over all GPUs
    group: int = 8  # completions a prompt (G)
    prompt_tokens: int = 1024  # P, the image's included
    new_tokens: int = 1024  # R, of a completion
    train: Literal["lm", "all", "spatial"] = "lm"  # which parameters learn
    kl: float = 0.01  # 0: no reference policy
    lora: int | None = None  # rank; 0: never; None: if nothing else fits
    dtype: Literal["bf16", "fp32"] = "bf16"  # of the weights; fp32 is a CPU's

@dataclass(frozen=True)
class Settings:
    shard: bool = False
    checkpointing: bool = False
    fp32_master: bool = True
    lora: int = 0
    micro_tokens: int = 16384
    slots: int = 0

def count(config, train: str, lora: int) -> dict[str, int]:
    """Parameters: all; of those that learn all, a decoder layer's, the decoder's outside of layers, vision's,
    the head's."""
    with torch.device("meta"):
        model = QwenVL(config)
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith(TRAIN[train]))
    if lora:
        attach(model, lora)
    learn = lambda *parts: sum(  # noqa: E731
        p.numel() for part in parts for p in part.parameters() if p.requires_grad)
    inside = learn(model.decoder.layers, model.vision, model.region, model.points, model.head3d)
    outside = learn(model) - inside
    return dict(all=sum(p.numel() for p in model.parameters()), trained=learn(model),
                layer=learn(model.decoder.layers[0]), outside=outside, vision=learn(model.vision),
                head=outside and model.head_weight.numel())

def estimate(config, cfg: Config, s: Settings, n: dict[str, int]) -> dict[str, float]:
    """GB a GPU of each part, and of the peak."""
    z, vision, b = Sizes.of(config), config.vision_config, {"bf16": 2, "fp32": 4}[cfg.dtype]
    parts, merge = cfg.gpus if s.shard else 1, vision.spatial_merge_size
    query, kv = z.heads * z.head_dim, z.kv_heads * z.head_dim
    state = (12 if b == 2 else 8) if s.fp32_master else 4  # fp32 weights are their own masters
    # Reduced in fp32.
    gathered = (2 * n["layer"] + n["outside"]) * b + (n["layer"] + n["outside"]) * 4 if s.shard else 0
    qk_norm = (query + kv) * z.qwen3
    layer = (4 * z.hidden + 2 * (query + kv) + qk_norm + 4 * z.inner) * b  # bytes a token
    # Norms in fp32; a CPU's attention makes copies.
    layer += 4 * (2 * z.hidden + qk_norm) if b == 2 else 3 * query * b
    kept = z.layers * z.hidden * b + layer if s.checkpointing else z.layers * layer
    # At most: prompts that are all image, as many as go into a pass.
    patches = s.micro_tokens * merge**2 * cfg.prompt_tokens / (cfg.prompt_tokens + cfg.group * cfg.new_tokens)
    width = vision.embed_dim if config.model_type == "qwen2_vl" else vision.hidden_size
    tower = width * 24 * b  # with an MLP of 4 C
    tower *= vision.depth if n["vision"] and not s.checkpointing else 1
    cached = s.slots * cfg.new_tokens + -(-s.slots // cfg.group) * cfg.prompt_tokens
    stays = {"weights": n["all"] * b + (n["trained"] * b / parts if s.shard else 0),
             "master and moments": n["trained"] * state / parts,
             "reference": n["all"] * b / cfg.gpus if cfg.kl and not s.lora and cfg.gpus > 1 else 0}
    rollout = {"cache": cached * 2 * z.layers * kv * b, "sampler": 3 * s.slots * z.vocab * 4}
    update = {"gradients": n["trained"] * b / parts + gathered, "activations": s.micro_tokens * kept,
              "logits": 64 * 2**20 + n["head"] * 4,
              "pixels": patches * (3 * vision.temporal_patch_size * vision.patch_size**2 * 4 + tower)}
    peak = sum(stays.values()) + max(sum(rollout.values()), sum(update.values()))
    return {name: size / 1e9 for name, size in (stays | rollout | update | {"peak": peak}).items()}

def candidates(cfg: Config):
    """In the order of preference."""
    least, group = cfg.prompt_tokens + cfg.new_tokens, cfg.prompt_tokens + cfg.group * cfg.new_tokens
    whole = [t for t in (16384, 8192, 4096) if t >= group] or [group]
    # A group in parts: its prompt is computed again.
    split = [t for t in (8192, 4096, 2048) if least <= t < group]
    ranks = [0, LORA] if cfg.lora is None else [cfg.lora]
    for lora, master, shard in product(ranks, (True, False), (False, True)):
        if (master or not lora) and (not shard or cfg.gpus > 1):
            yield Settings(shard, False, master, lora, whole[0])
            yield from (Settings(shard, True, master, lora, tokens) for tokens in whole + split)

def choose(config, cfg: Config) -> tuple[Settings, dict[str, float]]:
    """The first candidate that fits, and its estimate. ValueError where none does."""
    room = (cfg.memory - RESERVE[0]) * (1 - RESERVE[1])
    counts = cache(lambda lora: count(config, cfg.train, lora))
    most = min(-(-cfg.prompts // cfg.gpus) * cfg.group, max(SLOTS // cfg.group, 1) * cfg.group)
    for s in candidates(cfg):
        alone = estimate(config, cfg, s, counts(s.lora))["peak"]  # of the update
        for slots in range(most, 0, -cfg.group):
            found = estimate(config, cfg, replace(s, slots=slots), counts(s.lora))
            if found["peak"] <= (min(alone, room) if slots > BUSY else room):
                return replace(s, slots=slots), found
    raise ValueError(
        f"nothing fits into {cfg.gpus} x {cfg.memory:g} GB: more memory, fewer --new-tokens, or --lora")

def main(cfg: Config) -> None:
    low = {name: v for name, v in vars(cfg).items()
           if isinstance(v, int | float) and v < (name not in ("kl", "lora"))}
    if low:
        raise ValueError(", ".join(f"--{name.replace('_', '-')} {v}: too low" for name, v in low.items()))
    try:
        local = Path(cfg.model).is_dir()
        config = read_config(Path(cfg.model)) if local else AutoConfig.from_pretrained(cfg.model)
    except OSError as error:
        why = str(error).strip().splitlines()[0]
        raise ValueError(f"{cfg.model}: no such directory, nor hub id ({why})") from error
    s, gb = choose(config, cfg)
    n = count(config, cfg.train, s.lora)
    print(f"{cfg.model}: {n['all'] / 1e9:.3f} B parameters, of which {n['trained'] / 1e9:.3f} B learn; "
          "GB a GPU:")
    for name, size in (gb | {"left": cfg.memory - gb["peak"]}).items():
        print(f"  {name:20}{size:7.2f}")
    print("replicated" if not s.shard else "sharded",
          "checkpointing" if s.checkpointing else "all activations kept",
          "fp32 masters" if s.fp32_master else "bf16 moments and stochastic rounding",
          f"LoRA {s.lora or 'off'}", f"--micro-tokens {s.micro_tokens}", f"{s.slots} slots", sep=", ")
    if cfg.kl and not s.lora and cfg.gpus == 1:
        print(f"and {gb['weights']:.1f} GB of host memory for the reference policy")

if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=__doc__.split("\n\n")[0]))
    except ValueError as error:  # no such model, or numbers that can't be
        print(f"plan: {error}", file=sys.stderr)
        sys.exit(2)
