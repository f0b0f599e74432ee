"""Cold start: supervised fine-tuning on both paths, one loop.

    1 GPU    python train_sft.py --model Qwen/Qwen2.5-VL-3B-Instruct --data DIR --out out/sft
    8 GPUs   torchrun --nproc_per_node 8 train_sft.py (the same flags; --batch stays global)

The model learns to write `srreal.target` after `srreal.prompt`, and its 3D head where a region's
object is:

    loss = - sum log p(target token) / target tokens
           + head_weight * (sum smooth-L1(centre) + sum smooth-L1(size)) / regions with a known
           centre

counted over the global batch, so that neither the cut into micro-batches nor the number of ranks
matters. A batch takes runs of questions on one image: the processor packs them behind one copy of
it. With --drop-depth a share of the images loses its depth, so that the model also works without.

Metrics of a step: loss; its parts loss_text (nats a target token) and loss_head; head_error_metres,
the mean distance of the head's centres (both null where no region has a known centre); tokens
trained; grad_norm before the clip; times without validation and saving. val_loss is loss_text on
--eval-data, with all depths, after the row's update.

Departures from the paper and the official code:
 1. The loss is divided by the global number of target tokens, not by micro-batch.
 2. Point maps are metric where the data have depth and intrinsics, and dropped at random; theirs
    are relative.
 3. The 3D head is ours; the paper writes centres as text only (we do both).
 4. Questions of one image share a batch and its encoding. A row comes once an epoch: no random
    repeats.
"""

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import flags
from flags import Count, CountOrZero, Positive, PositiveOrZero, Seed, Share, ShareBelowOne
from training.recorded import recorded_flags


@dataclass
class Config:
    model: str  # checkpoint directory or hub id
    data: tuple[str, ...]  # data sets: paths or kind:path, concatenated; or a mixture file
    out: str  # the run's directory
    steps: Count = 1000  # optimiser steps
    batch: Count = 64  # questions a step, over all ranks
    lr: Positive = 5e-6  # peak learning rate
    schedule: Literal["constant", "cosine", "linear"] = "cosine"  # linear: flat, then 45 % down
    warmup: CountOrZero = 50  # steps of linear warm-up; 0: none
    # muon: for the blocks' matrices of a model from scratch
    optimizer: Literal["adamw", "muon"] = "adamw"
    weight_decay: PositiveOrZero = 0.0  # of matrices; 0: none
    beta2: ShareBelowOne = 0.999  # of AdamW
    clip_norm: PositiveOrZero = 1.0  # gradients are shrunk to this global norm; 0: off
    head_weight: PositiveOrZero = 1.0  # of the 3D head's loss; 0: it does not learn
    drop_depth: Share = 0.3  # share of the images that lose their depth
    questions_per_image: Count = 4  # at most so many questions of an image stand together
    # a region is read as its token, or as its box in text
    regions: Literal["token", "text"] = "token"
    max_pixels: Count | None = None  # image size limit; None: the checkpoint's own
    # which parameters learn (TRAIN in model/lora.py)
    train: Literal["all", "lm", "spatial", "lora"] = "all"
    # rank of adapters on the decoder, which then stays as it is; merged on saving; 0: none, but 32
    # with --train lora
    lora: CountOrZero = 0
    # over the ranks (FSDP2); auto: if one can't hold it
    shard: Literal["auto", "always", "never"] = "auto"
    checkpointing: Literal["auto", "always", "never"] = "auto"  # recompute blocks backwards
    # tokens of a forward pass of a rank; turn it down if memory runs out
    micro_tokens: Count = 16384
    # processes a rank that read images ahead; 0: none; None: up to 8 on CUDA, 0 on a CPU
    workers: CountOrZero | None = None
    eval_data: tuple[str, ...] = ()  # data sets for val_loss
    eval_every: CountOrZero = 0  # steps between validations; 0: only at the end
    seed: Seed = 0  # order of the data, dropped depths
    save_every: CountOrZero = 500  # steps between checkpoints; 0: only at the end
    keep: CountOrZero = 0  # so many of them stay such that --resume can go on from them; 0: all
    # a tracker that gets the columns of metrics.jsonl, too; its package has to be installed
    track: Literal["none", "wandb", "trackio"] = "none"
    # benchmarks, NAME=DIR each: rows that show their scenes are left out of --data
    drop_leaks: tuple[str, ...] = ()
    resume: bool = False  # go on from the newest whole checkpoint in --out
    skip_bad_rows: bool = False  # go on without the unusable rows, and count them

    def __post_init__(self):
        flags.check(self)
        if self.train == "lora" and not self.lora:
            self.lora = flags.LORA_RANK


if __name__ == "__main__":
    # Before the imports that take seconds: --help and a wrong flag are answered at once.
    cfg = flags.parse(Config, __doc__, recorded=recorded_flags)

import torch
from torch import Tensor

from model.batch import Batch
from model.head3d import head_loss
from model.lora import TRAIN
from model.processor import Processor
from model.qwen_vl import Output, QwenVL
from srreal import PATHS, Example, target
from training import checkpoints, folder, interrupt, ranks, run
from training.batches import (
    Order,
    dummy_prompt,
    equalize_passes,
    images_key,
    needs_dummy,
    pack_by_tokens,
    prefetched,
)
from training.interrupt import Interrupts
from training.lengths import check_lengths
from training.optim import Optimizer, learning_rate
from training.policy import load_policy, synced_passes
from training.track import Tracker

# What a printed line shows of a step: name -> format.
COLUMNS = {
    "step": "6d",
    "loss": "7.4f",
    "loss_head": "7.4f",
    "head_error_metres": "6.3f",
    "grad_norm": "7.3f",
    "lr": "8.1e",
    "tokens_per_second": "6.0f",
    "seconds": "6.2f",
}
# What a question costs beside its target, in characters of the target.
PROMPT_COST = 200


# ---- Data


def why_not_trainable(example: Example) -> list[tuple[str, str]]:
    """Return (field, reason) where there is no target to learn, for the list of bad rows."""
    if "think" in PATHS[example.path].sections and not (example.rationale or "").strip():
        return [("target", "no rationale to learn; `python -m data.coldstart` makes some")]
    try:
        target(example)
    except ValueError as error:
        # The list names the row; what all rows have in common stands first.
        return [("target", str(error).removeprefix(f"{example.id}: "))]
    return []


def instructions(example: Example) -> str:
    """Return what questions of text alone may have in common, all but their last line; else ""."""
    return "" if example.images else example.question.rpartition("\n")[0]


def drop_depths(examples: list[Example], probability: float, seed: str) -> list[Example]:
    """Take the depth from a share of the images. Drawn from (seed, place of the image).

    Questions of one image lose it together, so that they can still share its encoding.
    """
    # By the order in which images appear: the same on every rank, and after --resume.
    places: dict[tuple, int] = {}
    for example in examples:
        places.setdefault(images_key(example), len(places))
    dropped = set()
    for key, place in places.items():
        if random.Random(f"{seed} {place}").random() < probability:
            dropped.add(key)
    return [replace(e, depths=None) if images_key(e) in dropped else e for e in examples]


class Sampler:
    """Which examples this rank takes: a pure function of the step, so that it can look ahead.

    The run goes on at step `first_step`, behind `rows_before` rows of the endless order.
    """

    def __init__(
        self,
        examples: list[Example],
        cfg: Config,
        rank: int,
        world: int,
        first_step: int = 0,
        rows_before: int = 0,
    ):
        # One path a run: answers of like length.
        # Rows of one image, or of text alone with the same instructions, come together: they share
        # its tokens.
        keys = [(images_key(example), example.path, instructions(example)) for example in examples]
        self.order = Order(keys, cfg.seed, cfg.questions_per_image)
        self.examples = examples
        self.cfg = cfg
        self.rank = rank
        self.world = world
        self.first_step = first_step
        self.rows_before = rows_before

    def rows_until(self, step: int) -> int:
        """Return how many rows the steps before this one have taken."""
        return self.rows_before + (step - self.first_step) * self.cfg.batch

    def at_step(self, step: int) -> list[Example]:
        places = self.order.rows(self.rows_until(step), self.cfg.batch)
        rows = [self.examples[place] for place in places]
        return self.local(drop_depths(rows, self.cfg.drop_depth, f"{self.cfg.seed} {step}"))

    def local(self, examples: list[Example]) -> list[Example]:
        """Return this rank's share of a global batch."""
        lengths = [PROMPT_COST + len(target(example)) for example in examples]
        return examples[ranks.shard_contiguous(lengths, self.rank, self.world)]


@dataclass
class MicroBatch:
    """One forward pass."""

    batch: Batch
    sequences: int  # of the batch, that count; behind them a dummy may stand, for other ranks' sake

    @property
    def target_tokens(self) -> int:
        return int(self.batch.cu_targets[self.sequences])

    @property
    def labelled_regions(self) -> int:
        return int(torch.isfinite(self.batch.centres).all(1).sum())


def make_microbatches(
    examples: list[Example], processor: Processor, budget: int, world: int
) -> list[MicroBatch]:
    """Pack examples into forward passes of at most `budget` tokens.

    Neighbours with the same images share one copy of them, which counts once. Each prompt is built
    once, for its length and for the batch.
    """
    targets = [processor.target_ids(example) for example in examples]
    prompts = [processor.prompt(example) for example in examples]
    keys = [images_key(example) for example in examples]
    lengths = []
    shared = []
    for i, (prompt, answer) in enumerate(zip(prompts, targets, strict=True)):
        lengths.append(len(prompt.ids) + len(answer))
        same_images = i > 0 and keys[i] == keys[i - 1]
        image_tokens = prompt.ids == processor.image_token_id
        shared.append(int(image_tokens.sum()) if same_images else 0)
    out = []
    for run_of_rows in pack_by_tokens(lengths, budget, shared):
        packed = prompts[run_of_rows]
        completions = [[answer] for answer in targets[run_of_rows]]
        sequences = len(completions)
        if needs_dummy(examples[run_of_rows], world):
            dummy = dummy_prompt(processor)
            packed.append(dummy)
            completions.append([processor.target_ids(dummy.example)])
        out.append(MicroBatch(processor.pack(packed, completions), sequences))
    return out


def make_dummy(processor: Processor) -> MicroBatch:
    """Return a pass without weight, which a rank runs while another still has work."""
    return MicroBatch(processor.pack([dummy_prompt(processor)], [[[0]]]), 0)


def prefetched_microbatches(
    examples_of: Callable[[int], list[Example]], places: range, processor: Processor, cfg, world
) -> Iterator[list[MicroBatch]]:
    """Yield the micro-batches of each place, packed while the step before runs.

    Worker processes read their images earlier yet: those of this place and of the next.
    """

    def make(place: int) -> list[MicroBatch]:
        examples = examples_of(place)
        is_last = place == places[-1]
        processor.prefetch(examples if is_last else examples + examples_of(place + places.step))
        return make_microbatches(examples, processor, cfg.micro_tokens, world)

    return prefetched(make, places)


# ---- Loss


def losses(output: Output, mb: MicroBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Return sums: -log p of target tokens, the head's loss, its centres' distances in metres."""
    text = -output.logprob[: mb.target_tokens].sum()
    head = head_loss(output.centres, output.sizes, mb.batch.centres, mb.batch.sizes)
    distances = (output.centres - mb.batch.centres).detach().norm(dim=1)
    return text, head, distances.nansum()


@dataclass
class Sums:
    """What a global batch adds up to, over all ranks."""

    text: float
    head: float
    head_error: float
    tokens: float
    regions: float  # with a known centre


def run_batch(
    model: QwenVL, microbatches: list[MicroBatch], processor: Processor, cfg, learn: bool
) -> Sums:
    """Run forward, and backward if it is to learn, over this rank's part of a global batch."""
    tokens = sum(mb.target_tokens for mb in microbatches)
    regions = sum(mb.labelled_regions for mb in microbatches)
    tokens, regions = ranks.all_reduce([tokens, regions])
    # On the device: one read a batch, not one a pass.
    sums = torch.zeros(3, dtype=torch.float64, device=model.device)
    microbatches = equalize_passes(microbatches, lambda: make_dummy(processor))
    for mb in synced_passes(model, microbatches):
        mb = MicroBatch(mb.batch.to(model.device), mb.sequences)
        with torch.set_grad_enabled(learn):
            text, head, error = losses(model(mb.batch), mb)
        if learn:
            (text / max(tokens, 1) + cfg.head_weight * head / max(regions, 1)).backward()
        sums += torch.stack((text, head, error)).detach()
    return Sums(*ranks.all_reduce(sums.tolist()), tokens, regions)


def validate(
    model: QwenVL, examples: list[Example], sampler: Sampler, processor: Processor, cfg, world
) -> dict[str, float]:
    """Return val_loss, in nats a target token, on all of --eval-data; {} without any."""
    if not examples:
        return {}

    def local_examples(start: int) -> list[Example]:
        return sampler.local(examples[start : start + cfg.batch])

    text = tokens = 0.0
    places = range(0, len(examples), cfg.batch)
    for microbatches in prefetched_microbatches(local_examples, places, processor, cfg, world):
        sums = run_batch(model, microbatches, processor, cfg, learn=False)
        text += sums.text
        tokens += sums.tokens
    return {"val_loss": text / tokens}


# ---- The loop


def main(cfg: Config) -> None:
    place = ranks.start_ranks()
    run.check_together(cfg)
    with Interrupts() as interrupts, folder.lock(cfg.out):
        checkpoint, done = checkpoints.find_start(cfg)
        if done < cfg.steps:
            with Tracker(cfg.track) as tracker:
                train(cfg, checkpoint, done, place, interrupts, tracker)


def train(
    cfg: Config,
    checkpoint: Path | None,
    done: int,
    place: ranks.Ranks,
    interrupts: Interrupts,
    tracker: Tracker,
) -> None:
    rank, world, device = place
    torch.manual_seed(cfg.seed)  # nothing here draws from it; a fork's dropout would
    examples, held_out = run.load_data(cfg, why_not_trainable)

    source = str(checkpoint or cfg.model)
    processor = run.load_processor(source, cfg, examples, TRAIN[cfg.train])
    check_lengths(processor, examples + held_out, with_target=True)
    settings = run.resolve_auto_settings(
        cfg, processor.config, device, world, prompts=0, group=1, new_tokens=256, kl=0.0
    )
    # A checkpoint's adapters are merged: with --lora a run goes on from its base.
    source = cfg.model if cfg.lora else str(checkpoint or cfg.model)
    policy = load_policy(source, cfg, device, world, settings, samples=False)
    model = policy.model
    optimizer = Optimizer(
        model.named_parameters(),
        policy.compute_weights,
        weight_decay=cfg.weight_decay,
        betas=(0.9, cfg.beta2),
        muon=cfg.optimizer == "muon",
    )
    same = {
        "data": checkpoints.fingerprint(examples),
        "--train": cfg.train,
        "--optimizer": cfg.optimizer,
        "--lora": cfg.lora,
    }
    rows_before = checkpoints.restore(checkpoint, optimizer, **same)
    sampler = Sampler(examples, cfg, rank, world, done, rows_before)
    folder.write_config(cfg)

    log = run.Log(cfg, done, COLUMNS, tracker)
    steps = range(done, cfg.steps)
    upcoming = prefetched_microbatches(sampler.at_step, steps, processor, cfg, world)
    interrupts.defer()
    for step in steps:
        started = time.perf_counter()
        ranks.phase(f"step {step + 1}")
        sums = run_batch(model, next(upcoming), processor, cfg, learn=True)
        loss_text = sums.text / sums.tokens
        # Where no region has a known centre, nothing was measured: null, not 0.
        loss_head = sums.head / sums.regions if sums.regions else None
        head_error = sums.head_error / sums.regions if sums.regions else None
        loss = loss_text + cfg.head_weight * (loss_head or 0.0)
        lr = learning_rate(step, cfg.steps, cfg.lr, cfg.warmup, cfg.schedule)
        grad_norm = optimizer.step(lr, cfg.clip_norm, loss, name=f"step {step + 1}")
        seconds = time.perf_counter() - started

        rows = sampler.rows_until(step + 1)
        row = {
            "step": step + 1,
            "seconds": seconds,
            "loss": loss,
            "loss_text": loss_text,
            "loss_head": loss_head,
            "head_error_metres": head_error,
            "grad_norm": grad_norm,
            "lr": lr,
            "tokens": sums.tokens,
            "tokens_per_second": sums.tokens / seconds,
            "epoch": rows / len(examples),
            "peak_memory_mib": run.peak_memory(device),
        }
        if run.is_due(step + 1, cfg.eval_every, last=cfg.steps):
            row |= validate(model, held_out, sampler, processor, cfg, world)
        log(row)
        signum = interrupts.arrived()
        if signum or run.is_due(step + 1, cfg.save_every, last=cfg.steps):
            checkpoints.save(cfg, step + 1, rows, model, processor, optimizer, **same)
        interrupt.raise_if(signum, f"saved step-{step + 1:06d}; --resume goes on")


if __name__ == "__main__":
    run.launch(main, cfg)
