"""What training a model by RL will take of a GPU, and the settings to choose, before anything is
loaded.

    python plan.py --model Qwen/Qwen2.5-VL-7B-Instruct --gpus 8 --memory 80

The training scripts ask `choose` too: it is what --shard auto and --checkpointing auto come to.
Only config.json is read; parameters are counted on the model itself, on the meta device. GB are 1e9
bytes of each of the N GPUs of a box. Of A parameters T learn; b bytes a weight (2); t tokens a pass
(--micro-tokens).

    weights             A b: the whole copy that samples, and trains where training is not sharded;
                        a sharded SFT has only its frozen ones, (A - T) b
    master and moments  T (4 + 4 + 4), / N if sharded; in fp32 (a CPU) the weights are their own masters
    reference           T b / N; with one GPU on the host; none at --kl 0; with LoRA next to nothing
    cache               rollout: (slots R + 2 prompts P) 2 layers (key-value heads) (head width) b
    prefill             rollout: keys and values, and an MLP, of PREFILL tokens
    sampler             rollout: 3 fp32 rows of logits a slot
    gradients           update: 4 T, / N if sharded; and the largest weight's own in b, or, sharded,
                        two layers' and the embeddings' whole ones in b, a layer's and theirs in
                        fp32
    activations         update: t layers (4 H + 2 (query + key-value heads) D + 3 I) b, and t 3 I b of a
                        layer's gradients; with checkpointing t layers H b, and one layer whole
    gathered keys       update: on CUDA, of a layer (of all, without checkpointing) the keys and values as the
                        completions read them, each with its prompt's: t (P + G (P + R)) / (P + G R)
    logits              update: 64 MB, and the head's gradient in fp32 and in b
    pixels              update: the vision tower's patches of t, and its activations where it learns

The peak is what stays and the larger of rollout and update. The first candidate that fits into the
memory less RESERVE is chosen: replicated before sharded, whole activations before checkpointing,
both before LoRA; then as many slots as the update leaves room for, or BUSY. At the peak the cache
has made room for the update. Where there is room for both (with BUSY slots at least), it stays, and
the sampler's CUDA graph with it: that is the other peak, `cache kept`. Else every step records the
graph again.
"""

import math
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Literal

import torch
import tyro
from transformers import AutoConfig

from model.families import DecoderSizes, VisionSizes
from model.files import read_config
from model.lora import LORA_RANK, learn
from model.qwen_vl import QwenVL

RESERVE = 1.5, 0.05  # GB of CUDA, its libraries and NCCL; share of the rest that lies in gaps
# live samples that keep a GPU busy; above SLOTS the matrix products gain nothing more
BUSY, SLOTS = 128, 384
PREFILL = 8192  # tokens of prompts that are encoded at a time: model.rollout's


@dataclass
class Config:
    model: str  # checkpoint directory or hub id
    gpus: int = 1  # of one box
    memory: float = 80.0  # GB of each
    # a step, over all GPUs; 0: SFT, which samples nothing (one target a prompt, no KL)
    prompts: int = 64
    group: int = 8  # completions a prompt (G)
    prompt_tokens: int = 1024  # P, the image's included
    new_tokens: int = 1024  # R, of a completion
    train: Literal["lm", "all", "spatial", "lora"] = "lm"  # which parameters learn
    kl: float = 0.01  # 0: no reference policy
    lora: int | None = None  # rank; 0: never; None: if nothing else fits
    dtype: Literal["bf16", "fp32"] = "bf16"  # of the weights; fp32 is a CPU's


@dataclass(frozen=True)
class Settings:
    shard: bool = False
    checkpointing: bool = False
    lora: int = 0
    micro_tokens: int = 16384
    slots: int = 0
    # the cache of so many slots, and the graph that reads it, stay during the update
    keep: bool = False


def count(config, train: str, lora: int) -> dict[str, int]:
    """`tally` of a model that has not been loaded."""
    with torch.device("meta"):
        model = QwenVL(config)
    learn(model, train, lora)
    return tally(model)


def tally(model) -> dict[str, int]:
    """Parameters: all; of those that learn all, a decoder layer's, the largest tensor's, the
    decoder's outside of layers, vision's, the head's."""

    def own(*parts) -> int:
        return sum(p.numel() for part in parts for p in part.parameters() if p.requires_grad)

    z = model.decoder
    outside = own(model) - own(z.layers, model.vision, model.region, model.points, model.head3d)
    return dict(
        all=sum(p.numel() for p in model.parameters()),
        trained=own(model),
        layer=own(z.layers[0]),
        largest=max((p.numel() for p in model.parameters() if p.requires_grad), default=0),
        outside=outside,
        vision=own(model.vision),
        head=outside and model.head_weight.numel(),
    )


def estimate(config, cfg: Config, s: Settings, n: dict[str, int]) -> dict[str, float]:
    """GB a GPU of each part, of the peak, and of that with the cache kept."""
    z, vision, b = DecoderSizes.of(config), config.vision_config, {"bf16": 2, "fp32": 4}[cfg.dtype]
    parts, query, kv = cfg.gpus if s.shard else 1, z.heads * z.head_dim, z.kv_heads * z.head_dim
    masters = 4 if b == 2 or s.shard else 0  # whole fp32 weights are their own masters
    # reduced in fp32
    gathered = (2 * n["layer"] + n["outside"]) * b + (n["layer"] + n["outside"]) * 4
    transient = n["largest"] * b if b == 2 else 0  # until its fp32 master has it
    qk_norm = (query + kv) * z.family.qk_norm
    layer = (4 * z.hidden + 2 * (query + kv) + qk_norm + 3 * z.inner) * b  # bytes a token
    layer += (3 * query + z.inner) * b if b == 4 else 0  # a CPU's rotations and SwiGLU aren't fused
    kept = z.layers * (z.hidden * b if s.checkpointing else layer) + layer * s.checkpointing
    # At most: prompts that are all image, as many as go into a pass.
    patches = s.micro_tokens * cfg.prompt_tokens / (cfg.prompt_tokens + cfg.group * cfg.new_tokens)
    patches *= vision.spatial_merge_size**2
    width = VisionSizes.of(config).width
    block = (1 if s.checkpointing else 24) * width * b  # an MLP of 4 C
    pixels = 12 * vision.temporal_patch_size * vision.patch_size**2 + block * vision.depth * (
        n["vision"] > 0
    )
    # of the prompts, and room for the next ones
    rows = 2 * -(-s.slots // cfg.group) * cfg.prompt_tokens
    prefill = (2 * z.layers * kv + 3 * z.inner + 6 * z.hidden) * b
    reference = n["trained"] * b / cfg.gpus if cfg.kl and cfg.gpus > 1 else 0
    samples = cfg.prompts > 0 or not s.shard
    whole = n["all"] if samples else n["all"] - n["trained"]
    stays = {
        "weights": whole * b,
        "master and moments": n["trained"] * (masters + 8) / parts,
        "reference": reference,
    }
    rollout = {
        "cache": (s.slots * cfg.new_tokens + rows) * 2 * z.layers * kv * b,
        "prefill": min(rows, PREFILL) * prefill,
        "sampler": 3 * s.slots * z.vocab * 4,
    }
    tokens, keys = cfg.prompt_tokens + cfg.group * cfg.new_tokens, cfg.prompt_tokens
    keys += cfg.group * (cfg.prompt_tokens + cfg.new_tokens)
    copies = 2 * kv * b * keys / tokens * (1 if s.checkpointing else z.layers) * (b == 2)
    update = {
        "gradients": n["trained"] * 4 / parts + (gathered if s.shard else transient),
        "activations": s.micro_tokens * (kept + 3 * z.inner * b),
        "gathered keys": s.micro_tokens * copies,
        "pixels": patches * pixels,
        "logits": 64 * 2**20 + n["head"] * (6 if b == 2 else 4),
    }
    both = rollout["cache"] + rollout["sampler"]  # the logits lie in the graph's own memory
    always, longest = sum(stays.values()), max(sum(rollout.values()), sum(update.values()))
    peaks = {
        "peak": always + longest,
        "cache kept": always + max(longest, both + sum(update.values())),
    }
    return {name: size / 1e9 for name, size in (stays | rollout | update | peaks).items()}


def candidates(cfg: Config) -> Iterator[Settings]:
    """In the order of preference."""
    least, group = (
        cfg.prompt_tokens + cfg.new_tokens,
        cfg.prompt_tokens + cfg.group * cfg.new_tokens,
    )
    whole = [t for t in (16384, 8192, 4096) if t >= group] or [group]
    split = [t for t in (8192, 4096, 2048) if least <= t < group]  # groups in parts, prompts again
    ranks = [LORA_RANK] if cfg.train == "lora" else [0, LORA_RANK]
    ranks = ranks if cfg.lora is None else [cfg.lora]
    for lora, shard in product(ranks, (False, True)):
        if not shard or cfg.gpus > 1:
            yield Settings(shard, False, lora, whole[0])
            yield from (Settings(shard, True, lora, tokens) for tokens in whole + split)


def choose(
    config,
    cfg: Config,
    options: Iterable[Settings] | None = None,
    counts: Callable[[int], dict[str, int]] | None = None,
) -> tuple[Settings, dict[str, float]]:
    """The first of the options (all candidates) that fits, and its estimate; ValueError where none
    does. counts(lora rank) is what `tally` says of the model, if one is there already."""
    options = candidates(cfg) if options is None else options
    counts = counts or cache(lambda lora: count(config, cfg.train, lora))
    room = (cfg.memory - RESERVE[0]) * (1 - RESERVE[1])
    most = min(-(-cfg.prompts // cfg.gpus) * cfg.group, max(SLOTS // cfg.group, 1) * cfg.group)
    for s in options:
        alone = estimate(config, cfg, s, counts(s.lora))["peak"]  # of the update
        sizes = {
            n: estimate(config, cfg, replace(s, slots=n), counts(s.lora))
            for n in range(most, 0, -cfg.group) or [0]
        }
        fit = [
            n for n, gb in sizes.items() if gb["peak"] <= (min(alone, room) if n > BUSY else room)
        ]
        stay = [n for n in fit if sizes[n]["cache kept"] <= room and n >= min(BUSY, fit[0])]
        if fit:  # better fewer slots than to record the graph in every step
            slots = (stay or fit)[0]
            return replace(s, slots=slots, keep=bool(stay)), sizes[slots]
    raise ValueError(
        f"nothing fits into {cfg.gpus} x {cfg.memory:g} GB: more memory, fewer --new-tokens, or --lora"
    )


def main(cfg: Config) -> None:
    low = {
        k: v
        for k, v in vars(cfg).items()
        if isinstance(v, int | float) and v < (k not in ("kl", "lora", "prompts"))
    }
    if low:
        raise ValueError(", ".join(f"--{k.replace('_', '-')} {v}: too low" for k, v in low.items()))
    cfg = cfg if cfg.prompts else replace(cfg, group=1, kl=0.0)
    folder = Path(cfg.model)
    try:
        config = read_config(folder) if folder.is_dir() else AutoConfig.from_pretrained(cfg.model)
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{cfg.model}: no such directory, nor hub id ({reason})") from error
    s, gb = choose(config, cfg)
    n = count(config, cfg.train, s.lora)
    whole, own = n["all"] / 1e9, n["trained"] / 1e9
    print(f"{cfg.model}: {whole:.3f} B parameters, {own:.3f} B of them learn; GB a GPU:")
    kept = gb.pop("cache kept")
    for name, size in (gb | {"left": cfg.memory - gb["peak"]}).items():
        print(f"  {name:20}{size:7.2f}")
    said = {True: "always", False: "never"}
    flags = [f"--shard {said[s.shard]} --checkpointing {said[s.checkpointing]}"]
    flags += [f"--micro-tokens {s.micro_tokens}"]
    flags += [f"--lora {s.lora}"] * bool(s.lora)
    print(*flags, f" ({s.slots} samples at a time)" if s.slots else "")
    if s.slots and s.keep:
        print(
            f"their cache and the graph of a step stay during the update: then the peak is {kept:.1f} GB"
        )
    elif s.slots:
        print(
            f"their cache goes before the update (kept: {kept:.1f} GB); every step records its graph again"
        )
    if cfg.kl and cfg.gpus == 1:
        size = n["trained"] * (2 if cfg.dtype == "bf16" else 4)
        pinned = 2 ** math.ceil(math.log2(size))  # CUDA's pinned memory comes in powers of two
        print(f"and {pinned / 1e9:.1f} GB of host memory for the reference policy")


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=__doc__.split("\n\n")[0]))
    except ValueError as error:  # no such model, or numbers that can't be
        print(f"plan: {error}", file=sys.stderr)
        sys.exit(2)
