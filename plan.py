"""What training will take of a GPU, and the settings to choose, before a model is loaded.

    python plan.py --model Qwen/Qwen2.5-VL-7B-Instruct --gpus 8 --memory 80

The training scripts ask `choose` too: it is what --shard auto and --checkpointing auto come to.
Only config.json is read; parameters are counted on the model itself, on the meta device. GB are 1e9
bytes of each of the N GPUs of a box. Of A parameters T learn; b bytes a weight (2); t tokens a pass
(--micro-tokens); P, R tokens of a prompt, of a completion; G completions a prompt; H, I widths of
the decoder and its MLP; D of a head.

    weights             A b: the whole copy that samples, and trains where training is not sharded;
                        a sharded SFT has only its frozen ones, (A - T) b
    master and moments  T (4 + 4 + 4), / N if sharded; in fp32 (a CPU) the weights are their own
                        masters
    reference           T b / N; with one GPU on the host; none at --kl 0; with LoRA next to nothing
    cache               rollout: (slots R + 2 prompts P) 2 layers (key-value heads) D b
                        and (slots + 2 prompts) states of gated delta nets (Qwen3.5): a layer, a
                        matrix in fp32 for each value head, and some rows of its convolution
    prefill             rollout: keys and values, and an MLP, of PREFILL tokens
    sampler             rollout: 3 fp32 rows of logits a slot
    gradients           update: 4 T, / N if sharded; and the largest weight's own in b, or, sharded,
                        two layers' and the embeddings' whole ones in b, a layer's and theirs in
                        fp32
    activations         update: t layers (4 H + 2 (query + key-value heads) D + 3 I) b, and t 3 I b
                        of a layer's gradients; with checkpointing t layers H b, and one layer
                        whole. A gated delta net has other terms (`delta_activations`), with
                        fla-core's kernels; without them it takes several times as much
    gathered keys       update: on CUDA, of a layer (of all, without checkpointing) the keys and
                        values as the completions read them, each with its prompt's:
                        t (P + G (P + R)) / (P + G R); and the state that each completion's delta
                        nets go on from
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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal

import flags
from errors import UserError, launch
from flags import LORA_RANK, Count, CountOrZero, Positive, PositiveOrZero


@dataclass
class Config:
    model: str  # checkpoint directory or hub id
    gpus: Count = 1  # of one box
    memory: Positive = 80.0  # GB of each
    # a step, over all GPUs; 0: SFT, which samples nothing (one target a prompt, no KL)
    prompts: CountOrZero = 64
    group: Count = 8  # completions a prompt (G)
    prompt_tokens: Count = 1024  # P, the image's included
    new_tokens: Count = 1024  # R, of a completion
    train: Literal["lm", "all", "spatial", "lora"] = "lm"  # which parameters learn
    kl: PositiveOrZero = 0.01  # 0: no reference policy
    lora: CountOrZero | None = None  # rank; 0: never; None: if nothing else fits
    dtype: Literal["bf16", "fp32"] = "bf16"  # of the weights; fp32 is a CPU's

    def __post_init__(self):
        flags.check(self)


if __name__ == "__main__":
    # Before the imports that take seconds: --help and a wrong flag are answered at once.
    cfg = flags.parse(Config, __doc__)

import torch
from transformers import AutoConfig

from model.families import DecoderSizes, VisionSizes, check_family
from model.files import checkpoint_of, read_config
from model.lora import learn
from model.qwen_vl import QwenVL
from model.rollout.cache import MAX_SLOTS

RESERVE = 1.5, 0.05  # GB of CUDA, its libraries and NCCL; share of the rest that lies in gaps
BUSY = 128  # live samples that keep a GPU busy
PREFILL = 8192  # tokens of prompts that are encoded at a time: model.rollout's
WORKSPACE = 64 * 2**20  # bytes of logits: kernels.linear_logprob's, rounded up


@dataclass(frozen=True)
class Settings:
    shard: bool = False
    checkpointing: bool = False
    lora: int = 0
    micro_tokens: int = 16384
    slots: int = 0
    # the cache of so many slots, and the graph that reads it, stay during the update
    keep: bool = False


@dataclass(frozen=True)
class Counts:
    """How many parameters a model has; all but the first of those that learn."""

    all: int
    trained: int
    layer: int  # a decoder layer's
    largest: int  # the largest tensor's
    outside: int  # the decoder's outside of its layers
    vision: int
    head: int


def count(config, train: str, lora: int) -> Counts:
    """Count the parameters of a model that has not been loaded."""
    with torch.device("meta"):
        model = QwenVL(config)
    learn(model, train, lora)
    return tally(model)


def tally(model) -> Counts:
    """Count the parameters of a model whose `requires_grad` is set."""

    def trained(*parts) -> int:
        total = 0
        for part in parts:
            total += sum(p.numel() for p in part.parameters() if p.requires_grad)
        return total

    layers = model.decoder.layers
    beside = trained(layers, model.vision, model.region, model.points, model.head3d)
    outside = trained(model) - beside
    return Counts(
        all=sum(p.numel() for p in model.parameters()),
        trained=trained(model),
        layer=max(trained(layer) for layer in layers),
        largest=max((p.numel() for p in model.parameters() if p.requires_grad), default=0),
        outside=outside,
        vision=trained(model.vision),
        head=model.head_weight.numel() if outside else 0,
    )


class Parts:
    """Bytes a GPU of each part, by the header's table: a method a line."""

    def __init__(self, config, cfg: Config, settings: Settings, counts: Counts):
        self.cfg = cfg
        self.settings = settings
        self.counts = counts
        self.size = 2 if cfg.dtype == "bf16" else 4  # bytes a weight
        self.ranks = cfg.gpus if settings.shard else 1  # that share masters and gradients

        sizes = DecoderSizes.of(config)
        self.layers = sizes.layers
        self.hidden = sizes.hidden
        self.inner = sizes.inner
        self.vocab = sizes.vocab
        self.query = sizes.heads * sizes.head_dim
        self.kv = sizes.kv_heads * sizes.head_dim
        self.qk_norm = sizes.family.qk_norm
        self.gate = sizes.family.attention_gate
        self.attention_layers = sizes.attention_layers
        self.delta_layers = sizes.delta_layers
        self.delta = sizes.delta

        vision = VisionSizes.of(config)
        self.tower_depth = vision.depth
        self.tower_width = vision.width
        self.patch_values = vision.frames * vision.patch**2
        self.patches_a_token = vision.merge**2

    # What stays.

    def weights(self) -> float:
        samples = self.cfg.prompts > 0
        whole = self.counts.all
        if self.settings.shard and not samples:
            whole -= self.counts.trained
        return whole * self.size

    def master_and_moments(self) -> float:
        moments = 8
        # Whole fp32 weights are their own masters.
        # In bytes: fp32 masters beside bf16 weights; AdamW's two moments are fp32 always.
        master = 4 if self.size == 2 or self.settings.shard else 0
        return self.counts.trained * (master + moments) / self.ranks

    def reference(self) -> float:
        if self.cfg.kl and self.cfg.gpus > 1:
            return self.counts.trained * self.size / self.cfg.gpus
        return 0

    # Rollout.

    def prompt_rows(self) -> int:
        """Tokens of the prompts in the slots, and of as many that come next."""
        prompts = math.ceil(self.settings.slots / self.cfg.group)
        # As the cache has it: the next prompts go in before the last ones' samples have ended.
        return 2 * prompts * self.cfg.prompt_tokens

    def cache(self) -> float:
        tokens = self.settings.slots * self.cfg.new_tokens + self.prompt_rows()
        return tokens * 2 * self.attention_layers * self.kv * self.size

    def layer_state(self) -> float:
        """Bytes of one sequence's state in a delta layer, in fp32."""
        if not self.delta:
            return 0
        return self.delta.value_heads * self.delta.key_dim * self.delta.value_dim * 4

    def states(self) -> float:
        if not self.delta:
            return 0
        ring = self.delta.taps * self.delta.channels * self.size
        prompts = math.ceil(self.settings.slots / self.cfg.group)
        sequences = self.settings.slots + 2 * prompts
        return sequences * self.delta_layers * (self.layer_state() + ring)

    def prefill(self) -> float:
        keys_and_values = 2 * self.attention_layers * self.kv
        a_layer = 3 * self.inner + 6 * self.hidden
        return min(self.prompt_rows(), PREFILL) * (keys_and_values + a_layer) * self.size

    def sampler(self) -> float:
        # fp32 logits, with room for two temporaries of their size.
        return 3 * self.settings.slots * self.vocab * 4

    # Update.

    def gradients(self) -> float:
        counts = self.counts
        own = counts.trained * 4 / self.ranks
        if self.settings.shard:
            # Gathered in the dtype that computes, reduced in fp32.
            # FSDP2 gathers the next layer while this one computes: two at a time.
            gathered = (2 * counts.layer + counts.outside) * self.size
            return own + gathered + (counts.layer + counts.outside) * 4
        if self.size == 2:
            return own + counts.largest * self.size  # until its fp32 master has it
        return own

    def attention_activations(self) -> float:
        """Bytes a token that the backward of a layer needs that attends."""
        # What norms and products read; q, k, v and what attention returns; gate, up and their
        # product.
        values = 4 * self.hidden + 2 * (self.query + self.kv) + 3 * self.inner
        if self.qk_norm:
            values += self.query + self.kv
        if self.gate:
            values += 2 * self.query
        if self.size == 4:
            values += 3 * self.query + self.inner  # a CPU's rotations and SwiGLU aren't fused
        return values * self.size

    def delta_activations(self) -> float:
        """Bytes a token that the backward of a gated delta net's layer needs."""
        delta = self.delta
        if not delta:
            return 0
        values = delta.value_heads * delta.value_dim
        # The projection, its rows as they are walked, the convolution's, and normed q and k.
        convolved = 3 * delta.channels + 2 * delta.key_heads * delta.key_dim
        # The rule's output before and behind its order, its gate, and both as one.
        kept = 4 * self.hidden + convolved + 4 * values + 3 * self.inner
        # The inverse of a chunk of 64 tokens, in the compute dtype; gates in fp32.
        return (kept + 64 * delta.value_heads) * self.size + 16 * delta.value_heads

    def activations(self) -> float:
        attention = self.attention_activations()
        delta = self.delta_activations()
        kept = self.attention_layers * attention + self.delta_layers * delta
        if self.settings.checkpointing:
            # A layer's input each, and all of the one layer that is being made again.
            kept = self.layers * self.hidden * self.size + max(attention, delta)
        gradients = 3 * self.inner * self.size
        return self.settings.micro_tokens * (kept + gradients)

    def gathered_keys(self) -> float:
        if self.size == 4:
            return 0  # CUDA's only
        cfg = self.cfg
        tokens = cfg.prompt_tokens + cfg.group * cfg.new_tokens
        # A prompt's keys once for itself, and once for each completion:
        # kernels/packed_attention.py.
        keys = cfg.prompt_tokens + cfg.group * (cfg.prompt_tokens + cfg.new_tokens)
        layers = 1 if self.settings.checkpointing else self.attention_layers
        return self.settings.micro_tokens * keys / tokens * 2 * self.kv * self.size * layers

    def forked_states(self) -> float:
        cfg = self.cfg
        tokens = cfg.prompt_tokens + cfg.group * cfg.new_tokens
        sequences = self.settings.micro_tokens / tokens * cfg.group
        layers = 1 if self.settings.checkpointing else self.delta_layers
        return sequences * self.layer_state() * layers

    def pixels(self) -> float:
        # At most: prompts that are all image, as many as go into a pass.
        cfg = self.cfg
        prompt_share = cfg.prompt_tokens / (cfg.prompt_tokens + cfg.group * cfg.new_tokens)
        patches = self.settings.micro_tokens * prompt_share * self.patches_a_token
        patch = 12 * self.patch_values  # fp32, three colours
        if self.counts.vision:
            values = 1 if self.settings.checkpointing else 24  # of a block; its MLP has 4 widths
            patch += values * self.tower_width * self.size * self.tower_depth
        return patches * patch

    def logits(self) -> float:
        head_gradient = 6 if self.size == 2 else 4
        return WORKSPACE + self.counts.head * head_gradient


def estimate(config, cfg: Config, settings: Settings, counts: Counts) -> dict[str, float]:
    """Return GB a GPU of each part, of the peak, and of that with the cache kept."""
    parts = Parts(config, cfg, settings, counts)
    stays = {
        "weights": parts.weights(),
        "master and moments": parts.master_and_moments(),
        "reference": parts.reference(),
    }
    rollout = {
        "cache": parts.cache() + parts.states(),
        "prefill": parts.prefill(),
        "sampler": parts.sampler(),
    }
    update = {
        "gradients": parts.gradients(),
        "activations": parts.activations(),
        "gathered keys": parts.gathered_keys() + parts.forked_states(),
        "pixels": parts.pixels(),
        "logits": parts.logits(),
    }
    always = sum(stays.values())
    # Rollout and update take turns, so that the larger of them counts.
    longest = max(sum(rollout.values()), sum(update.values()))
    # The sampler's logits lie in the graph's own memory.
    kept = rollout["cache"] + rollout["sampler"] + sum(update.values())
    peaks = {
        "peak": always + longest,
        "cache kept": always + max(longest, kept),
    }
    return {name: size / 1e9 for name, size in (stays | rollout | update | peaks).items()}


def candidates(cfg: Config) -> Iterator[Settings]:
    """Yield settings in the order of preference."""
    sample = cfg.prompt_tokens + cfg.new_tokens
    group = cfg.prompt_tokens + cfg.group * cfg.new_tokens
    # A pass takes whole groups, or, better than nothing, parts of one, each with its prompt.
    # The largest first: few large passes are faster than many small ones.
    whole = [tokens for tokens in (16384, 8192, 4096) if tokens >= group] or [group]
    split = [tokens for tokens in (8192, 4096, 2048) if sample <= tokens < group]
    ranks = [0, LORA_RANK]
    if cfg.train == "lora":
        ranks = [LORA_RANK]
    if cfg.lora is not None:
        ranks = [cfg.lora]
    for lora in ranks:
        for shard in (False, True) if cfg.gpus > 1 else (False,):
            yield Settings(shard, False, lora, whole[0])
            for tokens in whole + split:
                yield Settings(shard, True, lora, tokens)


def choose_slots(
    config, cfg: Config, settings: Settings, counts: Counts
) -> tuple[Settings, dict[str, float]] | None:
    """Return the settings with their slots, and the estimate; None if not even a group fits."""
    reserved, gaps = RESERVE
    room = (cfg.memory - reserved) * (1 - gaps)
    update = estimate(config, cfg, settings, counts)["peak"]
    rank_prompts = math.ceil(cfg.prompts / cfg.gpus)
    most = min(rank_prompts, max(MAX_SLOTS // cfg.group, 1)) * cfg.group
    # From many to few; above BUSY no more than the update takes anyway.
    fitting = {}
    for slots in range(most, 0, -cfg.group) or [0]:
        gb = estimate(config, cfg, replace(settings, slots=slots), counts)
        limit = min(update, room) if slots > BUSY else room
        if gb["peak"] <= limit:
            fitting[slots] = gb
    if not fitting:
        return None
    most = max(fitting)
    # Better fewer slots than to record the graph in every step.
    for slots, gb in fitting.items():
        if gb["cache kept"] <= room and slots >= min(BUSY, most):
            return replace(settings, slots=slots, keep=True), gb
    return replace(settings, slots=most), fitting[most]


class NothingFits(UserError, ValueError):
    """No candidate fits into the memory."""


def choose(
    config,
    cfg: Config,
    options: Iterable[Settings] | None = None,
    counts: Callable[[int], Counts] | None = None,
) -> tuple[Settings, dict[str, float]]:
    """Return the first of the options (all candidates) that fits, and its estimate.

    counts(lora rank) is what `tally` says of the model, if one is there already. NothingFits where
    none does.
    """
    options = candidates(cfg) if options is None else options
    if counts is None:
        counts = cache(lambda lora: count(config, cfg.train, lora))
    for settings in options:
        found = choose_slots(config, cfg, settings, counts(settings.lora))
        if found:
            return found
    raise NothingFits(
        f"nothing fits into {cfg.gpus} x {cfg.memory:g} GB: more memory, fewer --new-tokens, or "
        f"--lora"
    )


# ---- The command


def read(model: str):
    """Return transformers' config object of a directory or hub id."""
    folder = Path(checkpoint_of(model))
    if folder.is_dir():
        return read_config(folder)
    try:
        config = AutoConfig.from_pretrained(model)
        check_family(config.model_type)
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{model}: no such directory, nor hub id ({reason})") from error
    # A type that transformers doesn't know, or we.
    except ValueError as error:
        raise UserError(f"{model}: {str(error).strip().splitlines()[0]}") from error
    return config


def main(cfg: Config) -> None:
    if not cfg.prompts:
        cfg = replace(cfg, group=1, kl=0.0)
    config = read(cfg.model)
    settings, gb = choose(config, cfg)
    counts = count(config, cfg.train, settings.lora)
    whole = counts.all / 1e9
    trained = counts.trained / 1e9
    print(f"{cfg.model}: {whole:.3f} B parameters, {trained:.3f} B of them learn; GB a GPU:")
    kept = gb.pop("cache kept")
    gb["left"] = cfg.memory - gb["peak"]
    for name, size in gb.items():
        print(f"  {name:20}{size:7.2f}")

    choice = {True: "always", False: "never"}
    chosen = f"--shard {choice[settings.shard]} --checkpointing {choice[settings.checkpointing]}"
    chosen += f" --micro-tokens {settings.micro_tokens}"
    if settings.lora:
        chosen += f" --lora {settings.lora}"
    print(chosen, f" ({settings.slots} samples at a time)" if settings.slots else "")
    if settings.slots and settings.keep:
        print(
            f"their cache and the graph of a step stay during the update: then the peak is "
            f"{kept:.1f} GB"
        )
    elif settings.slots:
        print(
            f"their cache goes before the update (kept: {kept:.1f} GB); every step records its "
            f"graph again"
        )
    if cfg.kl and cfg.gpus == 1:
        size = counts.trained * (2 if cfg.dtype == "bf16" else 4)
        pinned = 2 ** math.ceil(math.log2(size))  # CUDA's pinned memory comes in powers of two
        print(f"and {pinned / 1e9:.1f} GB of host memory for the reference policy")


if __name__ == "__main__":
    launch("plan", main, cfg)
