"""Cold start: supervised fine-tuning on both paths, one loop.

    1 GPU    python train_sft.py --model Qwen/Qwen2.5-VL-3B-Instruct --data scenes:out/train --out out/sft
    8 GPUs   torchrun --nproc_per_node 8 train_sft.py (the same flags; --batch stays the global number)

The model learns to write `srreal.target` after `srreal.prompt`, and its 3D head where a region's
object is:

    loss = - sum log p(target token) / target tokens
           + head_weight * (sum smooth-L1(centre) + sum smooth-L1(size)) / regions with a known
           centre

counted over the global batch, so that neither the cut into micro-batches nor the number of ranks
matters. A batch takes runs of questions on one image: the processor packs them behind one copy of
it. With --drop-depth a share of the images loses its depth, so that the model also works without.

Metrics of a step: loss; its parts loss_text (nats a target token) and loss_head; head_error_metres,
the mean distance of the head's centres; tokens trained; grad_norm before the clip; times without
validation and saving. val_loss is loss_text on --eval-data, with all depths, after the row's
update.

Departures from the paper and the official code:
 1. The loss is divided by the global number of target tokens, not by micro-batch.
 2. Point maps are metric where the data have depth and intrinsics, and dropped at random; theirs relative.
 3. The 3D head is ours; the paper writes centres as text only (we do both).
 4. Questions of one image share a batch and its encoding. A row comes once an epoch: no random repeats.
"""

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

import trainer
from model.batch import Batch
from model.head3d import head_loss
from model.lora import LORA_RANK
from model.processor import Processor
from model.qwen_vl import Output
from optim import Optimizer, learning_rate
from srreal import Example, target


@dataclass
class Config:
    model: str  # checkpoint directory or hub id
    data: tuple[str, ...]  # data sets: paths or kind:path, concatenated; or a mixture file
    out: str  # the run's directory
    steps: int = 1000  # optimiser steps
    batch: int = 64  # questions a step, over all ranks
    lr: float = 5e-6  # peak learning rate
    schedule: Literal["constant", "cosine", "linear"] = "cosine"  # linear: flat, then 45 % down
    warmup: int = 50  # steps of linear warm-up
    # muon: for the blocks' matrices of a model from scratch
    optimizer: Literal["adamw", "muon"] = "adamw"
    weight_decay: float = 0.0  # of matrices
    beta2: float = 0.999  # of AdamW
    clip_norm: float = 1.0  # gradients are shrunk to this global norm
    head_weight: float = 1.0  # of the 3D head's loss
    drop_depth: float = 0.3  # share of the images that lose their depth
    questions_per_image: int = 4  # at most so many questions of an image stand together
    # a region is read as its token, or as its box in text
    regions: Literal["token", "text"] = "token"
    max_pixels: int | None = None  # image size limit; None: the checkpoint's own
    # which parameters learn (TRAIN in model/lora.py)
    train: Literal["all", "lm", "spatial", "lora"] = "all"
    # rank of adapters on the decoder, which then stays as it is; merged on saving; 0: none
    lora: int = 0
    # over the ranks (FSDP2); auto: if one can't hold it
    shard: Literal["auto", "always", "never"] = "auto"
    checkpointing: Literal["auto", "always", "never"] = "auto"  # recompute blocks backwards
    micro_tokens: int = 16384  # tokens of a forward pass of a rank; turn it down if memory runs out
    # processes a rank that read images ahead; None: up to 8 on CUDA, 0 on a CPU
    workers: int | None = None
    eval_data: tuple[str, ...] = ()  # data sets for val_loss
    eval_every: int = 0  # steps between validations; 0: only at the end
    seed: int = 0  # order of the data, dropped depths
    save_every: int = 500  # steps between checkpoints
    keep: int = 0  # so many of them stay such that --resume can go on from them; 0: all
    resume: bool = False  # go on from the newest whole checkpoint in --out
    skip_bad_rows: bool = False  # go on without the unusable rows, and count them

    def __post_init__(self):
        self.lora = self.lora or LORA_RANK * (self.train == "lora")


def untaught(example: Example) -> list[tuple[str, str]]:
    """(field, reason) where there is no target to teach."""
    try:
        target(example)
    except ValueError as error:
        return [("target", str(error))]
    return []


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


WHOLE = 200  # what a question costs beside its target, in the target's characters


def drop_depths(examples: list[Example], probability: float, seed: str) -> list[Example]:
    """Questions of one image lose their depth together: drawn from (seed, image)."""
    drops = {}
    for example in examples:
        drops.setdefault(trainer.images_key(example), len(drops))
    drops = {key: random.Random(f"{seed} {i}").random() < probability for key, i in drops.items()}
    return [replace(e, depths=None) if drops[trainer.images_key(e)] else e for e in examples]


def micro_batches(examples: list[Example], processor: Processor, budget: int, world: int) -> list:
    """(batch, how many of its sequences count) each; behind those a filler may stand, for other
    ranks."""
    answers = [processor.target_ids(e) for e in examples]
    prompts, keys = (
        [processor.prompt_ids(e) for e in examples],
        [trainer.images_key(e) for e in examples],
    )
    lengths = [len(p) + len(a) for p, a in zip(prompts, answers, strict=True)]
    shared = [
        key == before and p.count(processor.image_token_id)  # what it has from its neighbour
        for p, key, before in zip(prompts, keys, [None, *keys], strict=False)
    ]
    out = []
    for part in trainer.cut(lengths, budget, shared):
        padded = trainer.pad(examples[part], world)
        completions = answers[part] + [
            processor.target_ids(e) for e in padded[len(answers[part]) :]
        ]
        out.append((processor(padded, [[c] for c in completions]), len(answers[part])))
    return out


def losses(output: Output, batch: Batch, sequences: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sums: negative log-prob of the target tokens, head loss, the head's distance in metres."""
    text = -output.logprob[: int(batch.cu_targets[sequences])].sum()
    head = head_loss(output.centres, output.sizes, batch.centres, batch.sizes)
    error = (output.centres - batch.centres).detach().norm(dim=1).nansum()
    return text, head, error


def main(cfg: Config) -> None:
    rank, world, device = trainer.setup()
    checkpoint, done = trainer.begin(cfg)
    examples, held_out = trainer.load_data(cfg, untaught)
    # one path a run: answers of like length
    keys = ((trainer.images_key(e), e.path) for e in examples)
    order = trainer.Order(keys, cfg.seed, cfg.questions_per_image)

    processor = trainer.load_processor(str(checkpoint or cfg.model), cfg)
    # a checkpoint's adapters are merged
    source = cfg.model if cfg.lora else str(checkpoint or cfg.model)
    settings = trainer.settle(
        cfg, processor.config, device, world, prompts=0, group=1, new_tokens=256, kl=0.0
    )
    policy = trainer.load_policy(source, cfg, device, world, settings, samples=False)
    model = policy.model
    optimizer = Optimizer(
        model.named_parameters(),
        policy.images,
        cfg.weight_decay,
        (0.9, cfg.beta2),
        muon=cfg.optimizer == "muon",
    )
    same = {
        "data": trainer.fingerprint(examples),
        "--train": cfg.train,
        "--optimizer": cfg.optimizer,
        "--lora": cfg.lora,
    }
    trainer.restore(checkpoint, optimizer, **same)

    def own(rows: list[Example]) -> list[Example]:
        return rows[trainer.evenly([WHOLE + len(target(e)) for e in rows], rank, world)]

    def taught(step: int) -> list[Example]:
        """This rank's rows: a pure function of the step, so that it may be asked ahead."""
        rows = [examples[i] for i in order.rows(step * cfg.batch, cfg.batch)]
        return own(drop_depths(rows, cfg.drop_depth, f"{cfg.seed} {step}"))

    def tested(start: int) -> list[Example]:
        return own(held_out[start : start + cfg.batch])

    def batches(rows_of: Callable, places: range) -> Iterator[list[tuple[Batch, int]]]:
        """Of each place the rows in forward passes, made during the one before, their images yet
        earlier."""

        def make(place: int) -> list[tuple[Batch, int]]:
            rows = rows_of(place)
            processor.prefetch(rows + (rows_of(place + places.step) if place != places[-1] else []))
            return trainer.mendable(micro_batches, rows, processor, cfg.micro_tokens, world)

        return trainer.ahead(make, places)

    def sweep(passes: list[tuple[Batch, int]], learn: bool) -> tuple[list[float], tuple]:
        """Forward (and backward) over a global batch: sums of losses(), target tokens, regions with
        truth."""
        tokens = sum(int(batch.cu_targets[n]) for batch, n in passes)
        regions = sum(int(torch.isfinite(batch.centres).all(1).sum()) for batch, _ in passes)
        tokens, regions = (max(1.0, count) for count in trainer.reduce([tokens, regions]))
        sums = torch.zeros(3, dtype=torch.float64, device=device)
        passes = trainer.even(passes, lambda: (processor([trainer.filler()], [[[0]]]), 0))
        for batch, sequences in trainer.passes(model, passes):
            batch = batch.to(device)
            with torch.set_grad_enabled(learn):
                text, head, error = losses(model(batch), batch, sequences)
            if learn:
                (text / tokens + cfg.head_weight * head / regions).backward()
            sums += torch.stack((text, head, error)).detach()
        return trainer.reduce(sums.tolist()), (tokens, regions)

    def validate() -> dict[str, float]:
        places = range(0, len(held_out), cfg.batch)
        parts = [sweep(passes, learn=False) for passes in batches(tested, places)]
        text, tokens = (sum(part[k][0] for part in parts) for k in (0, 1))
        return {"val_loss": text / tokens} if parts else {}

    log = trainer.Log(cfg, done, COLUMNS)
    coming = batches(taught, range(done, cfg.steps))
    for step in range(done, cfg.steps):
        started = time.perf_counter()
        trainer.phase(f"step {step + 1}")
        (text, head, error), (tokens, regions) = sweep(next(coming), learn=True)
        loss = text / tokens + cfg.head_weight * head / regions
        lr = learning_rate(step, cfg.steps, cfg.lr, cfg.warmup, cfg.schedule)
        norm = optimizer.step(lr, cfg.clip_norm, loss, name=f"step {step + 1}")
        last = step + 1 == cfg.steps
        seconds = time.perf_counter() - started
        val = validate() if last or (cfg.eval_every and (step + 1) % cfg.eval_every == 0) else {}
        log(
            {
                "step": step + 1,
                "seconds": seconds,
                "loss": loss,
                "loss_text": text / tokens,
                "loss_head": head / regions,
                "head_error_metres": error / regions,
                "grad_norm": norm,
                "lr": lr,
                "tokens": tokens,
                "tokens_per_second": tokens / seconds,
                "epoch": (step + 1) * cfg.batch / len(examples),
                "peak_memory_mib": trainer.peak_memory(device),
                **val,
            }
        )
        if last or (step + 1) % cfg.save_every == 0:
            trainer.save(cfg, step + 1, model, processor, optimizer, **same)


if __name__ == "__main__":
    trainer.launch(main, Config)
