"""GRPO on both paths, top to bottom: roll out, score, advantage, filter, loss, step, log.

    1 GPU    python train_rl.py --model out/sft/step-002000 --data DIR --out out/rl
    8 GPUs   torchrun --nproc_per_node 8 train_rl.py (the same flags; --prompts stays global)

A step takes --prompts prompts, as many of each path that the data have (each path walks its own
shuffled order: the rows of one question in two paths are not kept together), and --group
completions of each.

    r = srreal.score(text, example).total          A = (r - mean) / (std + 1e-6) in the group
    loss = policy loss(log p, A) + kl * k3(ref)    over completion tokens of kept groups

--loss and --advantage choose other papers' (docs/papers.md has the flags of eight).

A group is kept if the accuracies in it differ (--filter accuracy): where all are right or all
wrong, only noise in the smaller parts would be learnt. Three policies stand beside the one that
learns:

    old      itself before the step: its log-prob, detached. With --updates 1 that takes no extra
             forward, and no ratio can leave 1: the clips can't act
    rollout  the sampler: same weights, other numerics; a token weighs
             min(p_old / p_rollout, rollout_cap)
    ref      --model, also after --resume; its log-probs are taken once a rollout, and only if
             --kl > 0. It is no second model: what learns changes places with what it was
             (training/policy.py)

Metrics of a step: loss; reward, the mean total of all completions; a column for each entry of
srreal.REWARDS; groups, how many were sampled, and kept, their share that is trained on; discarded
and discarded_tokens, samples (also begun ones) behind the last group that --tries wanted;
truncated, the share of completions without an end token; length in tokens. Each of these for each
path P as well: P_reward, P_accuracy and so on. Over the trained tokens: entropy (nats), kl (k3 to
ref), both by path, too; clip_low, clip_high (shares whose loss the clip binds), ratio_max,
mismatch_kl, and mismatch_mean and mismatch_max of |log p_old - log p_rollout|. What a step has not
measured is null: all of these in a step without an update, kl at --kl 0. grad_norm is before the
clip; times are without validation and saving. With --eval-data: val_P_accuracy and so on,
greedy, after the row's update; val0_* in the first row, before any.

Departures from the paper and the official code:

 1. Rewards are strict (srreal.py says how); --rules official gives the official numbers.

 2. Groups are filtered on accuracy, not on .2 < mean total < .99, which keeps all-right groups
    whose boxes differ. Filtered groups are not replaced unless --tries says so (DAPO's dynamic
    sampling, in the order of the prompts: in that of finishing, short answers would be preferred;
    each rank wants its share).

 3. The loss is divided by the global number of trained tokens, not by micro-batch.

 4. Sampling is not cut (top_p 1; theirs .99), and the sampler's own log-probs correct the loss.
    Completions that were cut at --max-new-tokens are trained on as they are: ill-formed, they earn
    nothing (--mask-truncated leaves them out).

 5. One set of weights samples and trains; theirs keeps the prompts' embeddings from a frozen copy.

 6. The paths have equal shares of each step; theirs is one shuffled list.
"""

import math
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Annotated, Literal

import flags
from errors import UserError
from flags import (
    Bound,
    Count,
    CountOrZero,
    Positive,
    PositiveOrZero,
    Seed,
    ShareAboveZero,
    ShareBelowOne,
)
from srreal import REWARDS
from training.recorded import read_config, recorded_flags


@dataclass
class Config:
    model: str  # checkpoint directory or hub id; also the reference policy
    data: tuple[str, ...]  # data sets: paths or kind:path, concatenated; or a mixture file
    out: str  # the run's directory
    steps: Count = 100  # rollouts
    prompts: Count = 64  # prompts a step, over all ranks, in equal shares of the paths
    # completions a prompt
    group: Annotated[int, Bound(2, why="one alone is never better than its group")] = 8
    # above 1: up to so many times the prompts, until --prompts groups differ in accuracy
    tries: Count = 1
    # live samples of a rank; None: by its memory at the start, then as config.json
    slots: Count | None = None
    updates: Count = 1  # optimiser steps a rollout, each on its own share of the prompts
    max_new_tokens: Count = 1024  # a longer completion is cut, and so is not well-formed
    temperature: Positive = 1.0  # of sampling; the trainer's log-probs are at the same
    # sample from the likeliest tokens that have so much probability together; 1: from all
    top_p: ShareAboveZero = 1.0
    rules: Literal["strict", "official"] = "strict"  # of scoring
    # what rewards count in the totals, as detect=.3, in paths that weigh them; the others keep
    # their proportions; empty: the weights of PATHS in srreal.py
    reward_weights: tuple[str, ...] = ()
    filter: Literal["accuracy", "none"] = "accuracy"  # which groups are trained on
    # a name of LOSSES in kernels/policy_loss.py; docs/papers.md has those of eight papers
    loss: str = "dapo"
    # what advantages are divided by: the std of their group, nothing, or the std of all completions
    # of the step; None: what the loss's paper has (dr_grpo: none)
    advantage: Literal["std", "none", "batch"] | None = None
    # completions that were cut at --max-new-tokens count in their group, but aren't trained on
    mask_truncated: bool = False
    entropy_coef: PositiveOrZero = 0.0  # weight of an entropy bonus in the loss; 0: none
    # the loss's Triton kernel on CUDA; --no-fused-loss: its PyTorch reference
    fused_loss: bool = True
    kl: PositiveOrZero = 0.01  # weight of the k3 KL to the reference policy; 0: no reference
    # the ratio is clipped to 1 - clip_low ...; None: what the loss's paper has (LOSSES)
    clip_low: ShareAboveZero | None = None
    clip_high: Positive | None = None  # ... 1 + clip_high
    # cap of the loss where A < 0, in units of |A|; 0: none
    dual_clip: Annotated[float, Bound(1, without=(1,), also=0)] = 3.0
    rollout_cap: Positive = 2.0  # cap of the weight p_old / p_rollout
    lr: Positive = 1e-6  # peak learning rate
    # learning rate of norms and biases, in units of --lr; 0: they stay
    vector_rate: PositiveOrZero = 1.0
    schedule: Literal["constant", "cosine", "linear"] = "constant"  # linear: flat, then 45 % down
    warmup: CountOrZero = 0  # steps of linear warm-up; 0: none
    weight_decay: PositiveOrZero = 0.01  # of matrices; 0: none
    beta2: ShareBelowOne = 0.999  # of AdamW
    clip_norm: PositiveOrZero = 1.0  # gradients are shrunk to this global norm; 0: off
    # which parameters learn (TRAIN in model/lora.py)
    train: Literal["lm", "all", "spatial", "lora"] = "lm"
    # rank of adapters on the decoder, which then stays as it is; merged on saving; 0: none, but 32
    # with --train lora
    lora: CountOrZero = 0
    regions: Literal["token", "text"] = "token"  # as the model was trained to read a region
    max_pixels: Count | None = None  # image size limit; None: the checkpoint's own
    # over the ranks (FSDP2); auto: if one can't hold it
    shard: Literal["auto", "always", "never"] = "auto"
    checkpointing: Literal["auto", "always", "never"] = "auto"  # recompute blocks backwards
    # tokens of a forward pass of a rank; turn it down if memory runs out
    micro_tokens: Count = 16384
    # processes a rank that read images ahead; 0: none; None: up to 8 on CUDA, 0 on a CPU
    workers: CountOrZero | None = None
    eval_data: tuple[str, ...] = ()  # data sets for validation, greedy, by the same rules
    eval_every: CountOrZero = 0  # steps between validations; 0: at the start and at the end
    # at most so many validation prompts, equally many of each path; 0: all
    eval_limit: CountOrZero = 256
    seed: Seed = 0  # order of the data, sampling noise
    # so many groups of each path a step go to rollouts.jsonl, with text and advantages; 0: none
    log_groups: CountOrZero = 1
    save_every: CountOrZero = 50  # steps between checkpoints; 0: only at the end
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
        from kernels.policy_loss import LOSSES  # here, as it imports torch

        if self.loss not in LOSSES:
            raise UserError(f"--loss {self.loss}: it is one of {', '.join(LOSSES)}")
        parse_weights(self.reward_weights)


def parse_weights(settings: tuple[str, ...]) -> dict[str, float]:
    """Read --reward-weights: NAME=WEIGHT each. UserError names the one that is wrong."""
    weights = {}
    for setting in settings:
        name, _, text = setting.partition("=")
        try:
            weights[name] = float(text)
        except ValueError:
            raise UserError(f"--reward-weights {setting}: it is NAME=WEIGHT") from None
        if name not in REWARDS:
            raise UserError(f"--reward-weights {setting}: it is of {', '.join(REWARDS)}")
        if not 0 <= weights[name] < 1:
            raise UserError(f"--reward-weights {setting}: a weight is at least 0 and below 1")
    if sum(weights.values()) >= 1:
        raise UserError(f"--reward-weights {' '.join(settings)}: nothing is left for the others")
    return weights


if __name__ == "__main__":
    # Before the imports that take seconds: --help and a wrong flag are answered at once.
    cfg = flags.parse(Config, __doc__, recorded=recorded_flags)

import torch
from torch import Tensor
from tqdm import tqdm

from kernels.policy_loss import LOSSES, aggregate, k3, policy_loss
from kernels.rewards import EPS, rewards_and_advantages
from model.batch import Batch
from model.batch import Prompt as EncodedPrompt
from model.images import DeviceImages
from model.processor import Processor
from model.qwen_vl import QwenVL
from model.rollout import Engine, Rollout, default_slots, occurrences
from srreal import PATHS, Example, Scores, score, total_of, weights_of
from training import checkpoints, folder, interrupt, ranks, run
from training.batches import (
    Order,
    dummy_prompt,
    equalize_passes,
    needs_dummy,
    pack_by_tokens,
)
from training.interrupt import Interrupts
from training.lengths import check_lengths
from training.metrics import Metrics, sums_by_path
from training.optim import Optimizer, learning_rate
from training.policy import Reference, load_policy, synced_passes
from training.track import Tracker, thumbnail

# What a printed line shows of a step: name -> format.
COLUMNS = {
    "step": "5d",
    "reward": "6.3f",
    "loss": "8.4f",
    "kl": "7.4f",
    "entropy": "6.3f",
    "kept": "4.2f",
    "grad_norm": "8.3f",
    "rollout_tokens_per_second": "6.0f",
    "seconds": "6.2f",
}


def columns_of(paths: list[str]) -> dict[str, str]:
    """Return what the line shows of a run on these paths: the accuracy of each, too."""
    accuracies = {f"{path}_accuracy": "5.3f" for path in paths}
    first = {name: COLUMNS[name] for name in ("step", "reward")}
    return first | accuracies | COLUMNS


# Columns that a validation has.
VALIDATED = ["reward", *REWARDS, "length", "truncated", "groups", "sampled_tokens"]


# ---- Prompts and groups


@dataclass
class Prompt:
    """An example, the turn that it came in, and what the processor made of it for this step."""

    example: Example
    turn: int  # a turn has one prompt of each path
    occurrence: int = 0  # how often the step has asked the same before: other noise each time
    # Which of its path's prompts in the step: "group" in rollouts.jsonl.
    index_in_path: int = 0
    encoded: EncodedPrompt | None = None


class PromptOrder:
    """An endless row of prompts: number i is of path i mod k. Each path has its own order."""

    def __init__(self, examples: list[Example], seed):
        self.paths = sorted({example.path for example in examples})
        self.examples = {}
        self.orders = {}
        for path in self.paths:
            # Each path is shuffled by itself: a set with few DTR rows sees them in every step all
            # the same.
            own = [example for example in examples if example.path == path]
            self.examples[path] = own
            self.orders[path] = Order(range(len(own)), f"{seed} {path}")

    def __getitem__(self, i: int) -> Prompt:
        turn, which = divmod(i, len(self.paths))
        path = self.paths[which]
        (row,) = self.orders[path].rows(turn, 1)
        return Prompt(self.examples[path][row], turn)


@dataclass
class Group:
    """The completions of one prompt, and what they earned."""

    prompt: Prompt
    rollouts: list[Rollout]
    scores: list[Scores] = field(default_factory=list)
    advantages: list[float] = field(default_factory=list)
    differs: bool = False  # in accuracy

    @property
    def example(self) -> Example:
        return self.prompt.example


def number_occurrences(prompts: list[Prompt]) -> None:
    """Number a step's prompts, in the order over all ranks: within their path, and repeats."""
    of_path = Counter()
    for prompt in prompts:
        prompt.index_in_path = of_path[prompt.example.path]
        of_path[prompt.example.path] += 1
    examples = [prompt.example for prompt in prompts]
    for prompt, occurrence in zip(prompts, occurrences(examples), strict=True):
        prompt.occurrence = occurrence


def encode(prompts: list[Prompt], processor: Processor) -> None:
    """Build each prompt once: ids, positions, regions, images. Its group carries it from here."""
    for prompt in prompts:
        prompt.encoded = processor.prompt(prompt.example)


def local_share(prompts: list[Prompt], rank: int, world: int) -> list[Prompt]:
    """Return this rank's prompts, by expected length: path dtr writes a box for each region."""
    lengths = []
    for prompt in prompts:
        boxes = len(prompt.example.regions) if prompt.example.path == "dtr" else 0
        # A guess before anything is sampled; real lengths are known too late.
        lengths.append(1.0 + boxes)
    return [prompts[i] for i in ranks.shard_by_length(lengths, rank, world)]


class Sampler:
    """Which prompts this rank takes: a pure function of the step.

    The run goes on at step `first_step`, behind `rows_before` prompts of the endless order.
    """

    def __init__(self, order: PromptOrder, cfg: Config, first_step: int, rows_before: int):
        self.order = order
        self.cfg = cfg
        self.first_step = first_step
        self.rows_before = rows_before

    def rows_until(self, step: int) -> int:
        """Return how many prompts the steps before this one have taken, over all ranks."""
        per_step = self.cfg.prompts * self.cfg.tries
        return self.rows_before + (step - self.first_step) * per_step

    def local_prompts(self, step: int, rank: int, world: int) -> list[Prompt]:
        """Return this rank's prompts of a step; none behind the last."""
        if step >= self.cfg.steps:
            return []
        places = range(self.rows_until(step), self.rows_until(step + 1))
        prompts = [self.order[place] for place in places]
        number_occurrences(prompts)
        return local_share(prompts, rank, world)


# ---- Roll out, score, advantage


@dataclass
class RolloutResult:
    groups: list[Group]
    scoring_seconds: float
    discarded_samples: int = 0
    discarded_tokens: int = 0


def roll_out(
    engine: Engine,
    prompts: list[Prompt],
    cfg: Config,
    seed: int,
    images: DeviceImages | None = None,
    wanted: int = 0,
) -> RolloutResult:
    """Sample completions of each prompt, and score them.

    wanted: stop behind the group that is so many's last to differ in accuracy, in the order of the
    prompts; 0: never. What runs behind it is discarded.
    """
    encoded = [prompt.encoded for prompt in prompts]
    occurrence_of = [prompt.occurrence for prompt in prompts]
    stream = engine.sample_groups(encoded, seed, images, occurrence_of)
    groups = []
    informative = 0
    scoring_seconds = 0.0
    for group in with_progress(prompts, stream, engine.options.n):
        before = time.perf_counter()
        group.scores = [finite_score(r.text, group.example, cfg) for r in group.rollouts]
        scoring_seconds += time.perf_counter() - before
        # The filter is the kernel's later; here it only decides how long to go on.
        accuracies = [s.accuracy for s in group.scores]
        if max(accuracies) - min(accuracies) > EPS:
            informative += 1
        groups.append(group)
        if wanted and informative >= wanted:
            break
    stream.close()
    discarded = stream.discarded_samples, stream.discarded_tokens
    return RolloutResult(groups, scoring_seconds, *discarded)


def with_progress(
    prompts: list[Prompt], stream: Iterator[list[Rollout]], n: int
) -> Iterator[Group]:
    """Yield the groups of the prompts as they come, below a progress bar of their samples."""
    hidden = None if ranks.is_first() else True
    with tqdm(total=len(prompts) * n, desc="rollout", leave=False, disable=hidden) as bar:
        for prompt, rollouts in zip(prompts, stream, strict=False):
            bar.update(n)
            yield Group(prompt, rollouts)


def finite_score(text: str, example: Example, cfg: Config) -> Scores:
    """Score a completion. The official rules take "nan" for a number: then it earns nothing."""
    scores = score(text, example, cfg.rules)
    if cfg.reward_weights:
        scores.total = total_of(scores.parts, example, parse_weights(cfg.reward_weights))
    if math.isfinite(scores.total):
        return scores
    return Scores(0.0)


def add_advantages(
    groups: list[Group],
    device: torch.device,
    scale: str = "std",
    changes: dict[str, float] | None = None,
) -> None:
    """Fill in advantages, and whether the accuracies of a group differ: one launch on CUDA.

    changes: of the rewards' weights, as `srreal.weights_of` takes them.
    Collective where scale is "batch": that is the std over all ranks, of which the kernel sees one.
    """
    parts = []
    weights = []
    starts = [0]
    for group in groups:
        weights.append(list(weights_of(group.example, changes).values()))
        for scores in group.scores:
            parts.append(list(scores.parts.values()))
        starts.append(len(parts))
    total, advantages, keep = rewards_and_advantages(
        torch.tensor(parts, dtype=torch.float64, device=device).view(-1, len(REWARDS)),
        torch.tensor(weights, dtype=torch.float64, device=device).view(-1, len(REWARDS)),
        torch.tensor(starts, device=device),
        accuracy_column=list(REWARDS).index("accuracy"),
        scale="none" if scale == "batch" else scale,
    )
    if scale == "batch":
        advantages = advantages / (std_over_ranks(total.tolist()) + EPS)
    advantages = advantages.tolist()
    for group, differs, start, end in zip(groups, keep.tolist(), starts, starts[1:], strict=False):
        group.advantages = advantages[start:end]
        group.differs = differs


def std_over_ranks(values: list[float]) -> float:
    """Return the unbiased standard deviation of all ranks' values. Collective."""
    count, total = ranks.all_reduce([len(values), sum(values)])
    mean = total / max(count, 1)
    (squares,) = ranks.all_reduce([sum((value - mean) ** 2 for value in values)])
    return math.sqrt(squares / max(count - 1, 1))


def add_scores(metrics: Metrics, groups: list[Group], is_kept) -> None:
    """Add what the groups earned to the metrics, every entry of REWARDS by its name."""
    for group in groups:
        metrics.add_group(
            group.example.path,
            rewards=[{"reward": s.total, **s.parts} for s in group.scores],
            detects=detects(group.example),
            lengths=[len(r.tokens) for r in group.rollouts],
            cut=[not r.finished for r in group.rollouts],
            kept=is_kept(group),
        )


def rollout_rows(step: int, groups: list[Group], count: int, is_kept) -> list[dict]:
    """Return rollouts.jsonl's rows of a step: a completion each, of `count` groups of each path."""
    rows = []
    for group in groups:
        if group.prompt.index_in_path >= count:
            continue
        example = group.example
        completions = zip(group.rollouts, group.scores, group.advantages, strict=True)
        for sample, (rollout, scores, advantage) in enumerate(completions):
            rows.append(
                {
                    "step": step,
                    "group": group.prompt.index_in_path,
                    "sample": sample,
                    "id": example.id,
                    "path": example.path,
                    "question": example.question,
                    "truth": example.answer,
                    "text": rollout.text,
                    "tokens": rollout.tokens,
                    "logprobs": [round(logprob, 4) for logprob in rollout.logprobs],
                    "parts": dict(scores.parts),
                    "total": scores.total,
                    "advantage": advantage,
                    "kept": is_kept(group),
                    "finished": rollout.finished,
                }
            )
    rows = ranks.gather(rows)
    return sorted(rows, key=lambda row: (row["path"], row["group"], row["sample"]))


def shows_rollouts(cfg: Config, step: int) -> bool:
    """Whether that step is shown to the tracker: the first, and each validation, or else save."""
    if cfg.track == "none":
        return False
    return step == 1 or run.is_due(step, cfg.eval_every or cfg.save_every, last=cfg.steps)


def rollout_images(groups: list[Group], count: int) -> dict[tuple[str, int], bytes]:
    """Return (path, group) -> JPEG of the first image, of `rollout_rows`' groups. Collective."""
    images = []
    for group in groups:
        if group.prompt.index_in_path < count and group.example.images:
            key = (group.example.path, group.prompt.index_in_path)
            images.append((key, thumbnail(group.example.images[0])))
    return dict(ranks.gather(images))


def detects(example: Example) -> bool:
    """Whether a response has objects to detect; else its part `detect` says nothing."""
    return bool(example.objects) and "detect" in PATHS[example.path].sections


def validate(
    model: QwenVL, processor: Processor, prompts: list[Prompt], paths: list[str], cfg: Config
) -> dict[str, float]:
    """Return the columns of a greedy validation, by the rules of training."""
    processor.prefetch([prompt.example for prompt in prompts])
    encode(prompts, processor)
    # Prompts of one sample each take more memory than groups: as many slots as there is room for.
    greedy = Engine(model, processor, n=1, max_new_tokens=cfg.max_new_tokens, temperature=0.0)
    groups = roll_out(greedy, prompts, cfg, seed=0).groups
    for prompt in prompts:
        prompt.encoded = None  # its images needn't stay
    metrics = Metrics(paths, list(REWARDS))
    add_scores(metrics, groups, is_kept=lambda group: False)
    return metrics.row(VALIDATED)


# ---- Forward passes


@dataclass
class MicroBatch:
    """One forward pass: a packed batch, and what the loss needs of its S sequences and L tokens.

    Behind the sequences the dummy may stand in the batch, for other ranks' sake.
    """

    batch: Batch  # on the host
    owner: Tensor  # (L,) int64, index of each token's path
    advantage: Tensor  # (S,)
    cu_seqlens: Tensor  # (S + 1,)
    rollout_logprob: Tensor  # (L,)
    old_logprob: Tensor | None = None  # (L,)
    ref_logprob: Tensor | None = None  # (L,)


@dataclass
class Piece:
    """Some completions of a group: one that is longer than a pass is split, its prompt repeated."""

    prompt: Prompt
    rollouts: list[Rollout]
    advantages: list[float]


def pack(
    groups: list[Group],
    processor: Processor,
    paths: list[str],
    cfg: Config,
    world: int,
    device: torch.device,
) -> list[MicroBatch]:
    """Pack groups into forward passes of about --micro-tokens, equally many on every rank."""
    pieces = []
    lengths = []
    for group in groups:
        prompt_tokens = len(group.prompt.encoded.ids)
        rollouts = []
        advantages = []
        for rollout, advantage in zip(group.rollouts, group.advantages, strict=True):
            if rollout.finished or not cfg.mask_truncated:
                rollouts.append(rollout)
                advantages.append(advantage)
        completions = [len(r.tokens) for r in rollouts]
        for part in pack_by_tokens(completions, cfg.micro_tokens - prompt_tokens):
            pieces.append(Piece(group.prompt, rollouts[part], advantages[part]))
            lengths.append(prompt_tokens + sum(completions[part]))
    microbatches = []
    for part in pack_by_tokens(lengths, cfg.micro_tokens):
        microbatches.append(make_microbatch(pieces[part], processor, paths, world, device))
    return equalize_passes(
        microbatches, lambda: make_microbatch([], processor, paths, world, device)
    )


def make_microbatch(
    pieces: list[Piece],
    processor: Processor,
    paths: list[str],
    world: int,
    device: torch.device,
) -> MicroBatch:
    owner = []
    advantage = []
    rollout_logprob = []
    completions = []
    for piece in pieces:
        path = paths.index(piece.prompt.example.path)
        advantage.extend(piece.advantages)
        completions.append([r.tokens for r in piece.rollouts])
        for r in piece.rollouts:
            owner.extend([path] * len(r.tokens))
            rollout_logprob.extend(r.logprobs)
    prompts = [piece.prompt.encoded for piece in pieces]
    if needs_dummy([piece.prompt.example for piece in pieces], world):
        # FSDP2 waits for a gradient of every parameter from every rank.
        prompts.append(dummy_prompt(processor))
        completions.append([[processor.end_ids[0]]])
    batch = processor.pack(prompts, completions)
    return MicroBatch(
        batch,
        torch.tensor(owner, dtype=torch.int64, device=device),
        torch.tensor(advantage, dtype=torch.float32, device=device),
        batch.cu_targets[: len(advantage) + 1].to(device),
        torch.tensor(rollout_logprob, dtype=torch.float32, device=device),
    )


def forward(
    model: QwenVL, mb: MicroBatch, temperature: float, images: DeviceImages | None
) -> tuple[Tensor, Tensor]:
    """Return log-probs and entropies (L,). A step's images are uploaded once."""
    output = model(mb.batch.to(model.device, images), temperature)
    tokens = len(mb.rollout_logprob)
    return output.logprob[:tokens], output.entropy[:tokens]


@torch.no_grad()
def add_tokens(
    metrics: Metrics, mb: MicroBatch, logprob: Tensor, entropy: Tensor, loss_metrics: dict
) -> None:
    """Add a pass to the metrics, in one transfer from the device."""
    gap = (mb.old_logprob - mb.rollout_logprob).abs()
    gap = torch.cat((gap, gap.new_zeros(1)))  # a pass may have no token
    has_reference = mb.ref_logprob is not None
    kl_terms = k3(mb.ref_logprob - logprob) if has_reference else torch.zeros_like(logprob)
    by_path = sums_by_path(
        torch.stack((torch.ones_like(kl_terms), entropy, kl_terms), 1),
        mb.owner,
        len(metrics.paths),
    )
    names = ("clip_low", "clip_high", "mismatch_kl", "ratio_max")
    of_all = torch.stack([*(loss_metrics[name] for name in names), gap.sum(), gap.max()])
    values = torch.cat((by_path.flatten(), of_all.double())).tolist()

    for i, path in enumerate(metrics.paths):
        tokens, nats, kl = values[3 * i : 3 * i + 3]
        metrics.add(path, tokens=tokens, entropy=nats, kl=kl)
        metrics.add(path, reference_tokens=tokens if has_reference else 0)
    clip_low, clip_high, mismatch_kl, ratio_max, gap_sum, gap_max = values[-6:]
    count = len(logprob)
    metrics.add(
        metrics.paths[0],  # what is not logged by path may count as any path's
        clip_low=clip_low * count,
        clip_high=clip_high * count,
        mismatch_kl=mismatch_kl * count,
        mismatch_mean=gap_sum,
    )
    metrics.add_maximum("ratio_max", ratio_max)
    metrics.add_maximum("mismatch_max", gap_max)


# ---- The update


def update(
    model: QwenVL,
    optimizer: Optimizer,
    microbatches: list[MicroBatch],
    images: DeviceImages,
    metrics: Metrics,
    cfg: Config,
    step: int,
) -> tuple[float, float] | None:
    """Take one optimiser step; return (loss, gradient norm), None where no rank has a token."""
    tokens = sum(len(mb.rollout_logprob) for mb in microbatches)
    sequences = sum(len(mb.advantage) for mb in microbatches)
    tokens, sequences = ranks.all_reduce([tokens, sequences])
    if tokens == 0:
        return None
    # Of all ranks and passes of this update: so the cut into micro-batches changes nothing.
    denominator = tokens if LOSSES[cfg.loss].divided_by == "tokens" else sequences
    loss_sum = torch.zeros((), dtype=torch.float64, device=model.device)
    for mb in synced_passes(model, microbatches):
        logprob, entropy = forward(model, mb, cfg.temperature, images)
        if mb.old_logprob is None:
            # The first pass of the only update: the policy has not moved since it sampled.
            mb.old_logprob = logprob.detach()
        loss, loss_metrics = loss_of(cfg, mb, logprob, entropy, denominator)
        loss.backward()
        loss_sum += loss.detach()
        add_tokens(metrics, mb, logprob, entropy, loss_metrics)
    (loss_sum,) = ranks.all_reduce([loss_sum.item()])
    lr = learning_rate(step, cfg.steps, cfg.lr, cfg.warmup, cfg.schedule)
    grad_norm = optimizer.step(lr, cfg.clip_norm, loss_sum, name=f"step {step + 1}")
    return loss_sum, grad_norm


def loss_of(
    cfg: Config, mb: MicroBatch, logprob: Tensor, entropy: Tensor, denominator: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of a pass by the flags, and its metrics.

    denominator: tokens or sequences of all ranks' passes.
    """
    loss, metrics = policy_loss(
        logprob,
        mb.old_logprob,
        mb.advantage,
        mb.cu_seqlens,
        kind=cfg.loss,
        clip_low=cfg.clip_low,
        clip_high=cfg.clip_high,
        dual_clip=cfg.dual_clip or None,
        ref_logprob=mb.ref_logprob,
        kl=cfg.kl,
        rollout_logprob=mb.rollout_logprob,
        rollout_cap=cfg.rollout_cap,
        max_tokens=cfg.max_new_tokens,
        denominator=denominator,
        fused=cfg.fused_loss,
    )
    if cfg.entropy_coef:
        bonus = aggregate(entropy, mb.cu_seqlens, cfg.loss, cfg.max_new_tokens, denominator)
        loss = loss - cfg.entropy_coef * bonus
    return loss, metrics


@torch.no_grad()
def add_logprobs(
    rollout_model: QwenVL,
    reference: Reference | None,
    microbatches: list[MicroBatch],
    images: DeviceImages,
    cfg: Config,
) -> None:
    """Fill in the reference's log-probs and, before several updates, the policy's own."""
    if reference:
        with reference:
            for mb in microbatches:
                mb.ref_logprob, _ = forward(rollout_model, mb, cfg.temperature, images)
    if cfg.updates > 1:
        for mb in microbatches:
            mb.old_logprob, _ = forward(rollout_model, mb, cfg.temperature, images)


# ---- Set up


def doubts(cfg: Config) -> list[str]:
    """Return what is odd, though not wrong, about the flags, a sentence each."""
    found = []
    clips = [name for name in ("clip_low", "clip_high") if getattr(cfg, name) is not None]
    unused = {"sapo": clips, "cispo": [name for name in clips if name == "clip_low"]}
    for name in unused.get(cfg.loss, []):
        found.append(f"{flags.flag(name)} does nothing with --loss {cfg.loss}")
    if cfg.updates == 1 and (cfg.clip_low or cfg.clip_high):
        found.append("--clip-low and --clip-high never act with --updates 1: no ratio leaves 1")
    if cfg.tries > 1 and cfg.filter == "none":
        found.append(f"--tries {cfg.tries} counts groups that differ, --filter none keeps them all")
    return found


def check_updates(cfg: Config, paths: list[str]) -> None:
    """Raise UserError where an update would get no prompt: they are split by whole turns."""
    turns = math.ceil(cfg.prompts / len(paths))
    if cfg.updates > turns:
        raise UserError(
            f"--updates {cfg.updates}: --prompts {cfg.prompts} on {len(paths)} paths "
            f"({', '.join(paths)}) can be split into {turns} at most"
        )


def plan_sizes(cfg: Config, processor: Processor, examples: list[Example]) -> dict:
    """Return what plan.py has to know; the longest prompt is that of 64 examples or so."""
    some = examples[:: len(examples) // 64 + 1]
    processor.prefetch(some)
    longest = max(len(processor.prompt_ids(example)) for example in some)
    return {
        "prompts": cfg.prompts,
        "group": cfg.group,
        "new_tokens": cfg.max_new_tokens,
        "kl": cfg.kl,
        "prompt_tokens": longest,
    }


def choose_slots(cfg: Config, model: QwenVL, planned: int, before: int) -> Config:
    """Fill in --slots: those of the run that goes on (`before`, on rank 0), else what every rank
    has memory for."""
    slots = default_slots(model, cfg.group, cfg.max_new_tokens)
    if model.device.type == "cuda" and planned:
        slots = min(slots, planned)
    (before,) = ranks.all_reduce([before], "MAX")
    (fits_all,) = ranks.all_reduce([slots], "MIN")
    return replace(cfg, slots=cfg.slots or int(before or fits_all))


# ---- The loop


def main(cfg: Config) -> None:
    place = ranks.start_ranks()
    run.check_together(cfg, doubts(cfg))
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
    examples, held_out = run.load_data(cfg)
    order = PromptOrder(examples, cfg.seed)
    paths = order.paths
    check_updates(cfg, paths)
    exam = validation_prompts(held_out, cfg.eval_limit)
    say_exam(exam, held_out, cfg.eval_limit)
    exam_paths = sorted({example.path for example in held_out})

    processor = run.load_processor(str(checkpoint or cfg.model), cfg, examples)
    check_lengths(processor, examples + held_out, with_target=False)
    sizes = plan_sizes(cfg, processor, examples)
    settings = run.resolve_auto_settings(cfg, processor.config, device, world, **sizes)
    policy = load_policy(cfg.model, cfg, device, world, settings, samples=True)
    model = policy.model
    rollout_model = policy.rollout_model
    optimizer = Optimizer(
        model.named_parameters(),
        policy.compute_weights,
        weight_decay=cfg.weight_decay,
        betas=(0.9, cfg.beta2),
        vector_lr_scale=cfg.vector_rate,
    )
    reference = Reference(rollout_model, optimizer) if cfg.kl > 0 else None
    same = {
        "data": checkpoints.fingerprint(examples),
        "--train": cfg.train,
        "--lora": cfg.lora,
    }
    # What has learnt comes from here.
    rows_before = checkpoints.restore(checkpoint, optimizer, **same)
    sampler = Sampler(order, cfg, done, rows_before)
    before = read_config(cfg.out) if checkpoint and ranks.is_first() else None
    cfg = choose_slots(cfg, rollout_model, settings.slots, (before or {}).get("slots") or 0)
    folder.write_config(cfg)

    def is_kept(group: Group) -> bool:
        return group.differs or cfg.filter == "none"

    def validation() -> dict[str, float]:
        own = local_share(exam, rank, world)
        engine.release()  # it needs the cache's room
        return validate(rollout_model, processor, own, exam_paths, cfg)

    engine = Engine(
        rollout_model,
        processor,
        n=cfg.group,
        max_new_tokens=cfg.max_new_tokens,
        temperature=cfg.temperature,
        top_p=cfg.top_p,
        slots=cfg.slots,
    )
    log = run.Log(cfg, done, columns_of(paths), tracker)
    rollout_log = None
    if cfg.log_groups:
        rollout_log = folder.Rows(Path(cfg.out) / "rollouts.jsonl", done)
    first_columns = {}
    if held_out and done == 0:
        first_columns = {f"val0_{name}": value for name, value in validation().items()}

    interrupts.defer()
    for step in range(done, cfg.steps):
        # Roll out and score, while the workers read the next step's images.
        ranks.phase(f"step {step + 1}, rollout")
        clock = [time.perf_counter()]
        metrics = Metrics(paths, list(REWARDS))
        images = DeviceImages(device)
        prompts = sampler.local_prompts(step, rank, world)
        # Which prompts come next is known: a pure function of the step.
        following = sampler.local_prompts(step + 1, rank, world)
        upcoming = [prompt.example for prompt in prompts + following]
        processor.prefetch(upcoming)
        wanted = math.ceil(len(prompts) / cfg.tries) if cfg.tries > 1 else 0
        # A step's noise is its own; the multiplier is a prime beyond any number of steps.
        seed = cfg.seed * 1_000_003 + step
        encode(prompts, processor)
        rolled_out = roll_out(engine, prompts, cfg, seed, images, wanted)
        if not settings.keep or cfg.slots > settings.slots:
            engine.release()  # the update needs the cache's room; the graph is recorded again
        discarded = [rolled_out.discarded_samples, rolled_out.discarded_tokens]
        discarded = ranks.all_reduce(discarded)  # the wait for the slowest rank is the rollout's
        clock.append(time.perf_counter())

        # Advantages; the groups that teach; batches.
        scale = cfg.advantage or LOSSES[cfg.loss].advantage
        add_advantages(rolled_out.groups, device, scale, parse_weights(cfg.reward_weights))
        add_scores(metrics, rolled_out.groups, is_kept)
        if rollout_log:
            logged = rollout_rows(step + 1, rolled_out.groups, cfg.log_groups, is_kept)
            rollout_log.append(logged)
            if shows_rollouts(cfg, step + 1):
                shown = rollout_images(rolled_out.groups, cfg.log_groups)
                tracker.log_rollouts(step + 1, logged, shown)
        kept = [group for group in rolled_out.groups if is_kept(group)]
        minibatches = []
        for u in range(cfg.updates):
            # By turns, so that each update has prompts of every path.
            share = [group for group in kept if group.prompt.turn % cfg.updates == u]
            minibatches.append(pack(share, processor, paths, cfg, world, device))
        scoring_seconds = rolled_out.scoring_seconds
        clock.append(time.perf_counter())

        # Log-probs of the reference and, before several updates, of the policy itself.
        ranks.phase(f"step {step + 1}, log-probs")
        for microbatches in minibatches:
            add_logprobs(rollout_model, reference, microbatches, images, cfg)
        clock.append(time.perf_counter())

        # Update.
        ranks.phase(f"step {step + 1}, update")
        updates = []
        for microbatches in minibatches:
            done_update = update(model, optimizer, microbatches, images, metrics, cfg, step)
            if done_update:
                updates.append(done_update)
        minibatches = images = prompts = rolled_out = kept = None  # no pixels stay behind
        clock.append(time.perf_counter())

        # Log, validate, save.
        ranks.phase(f"step {step + 1}, validation and saving")
        rollout, grading, logprobs, updating = (
            b - a for a, b in zip(clock, clock[1:], strict=False)
        )
        # Groups are scored as they come, while others run.
        rollout -= scoring_seconds
        row = {
            "step": step + 1,
            "seconds": clock[-1] - clock[0],
            "loss": fmean([loss for loss, _ in updates]) if updates else None,
            "grad_norm": fmean([norm for _, norm in updates]) if updates else None,
            "lr": learning_rate(step, cfg.steps, cfg.lr, cfg.warmup, cfg.schedule),
            **metrics.row(),
            **first_columns,
            "rollout_seconds": rollout,
            "discarded": discarded[0],
            "discarded_tokens": discarded[1],
            "score_seconds": scoring_seconds + grading,
            "logprob_seconds": logprobs,
            "update_seconds": updating,
            "peak_memory_mib": run.peak_memory(device),
        }
        row["rollout_tokens_per_second"] = row["sampled_tokens"] / rollout
        row["update_tokens_per_second"] = row["tokens"] / updating if updates else None
        first_columns = {}
        say_what_is_odd(row, bool(updates))
        if held_out and run.is_due(step + 1, cfg.eval_every, last=cfg.steps):
            row |= {f"val_{name}": value for name, value in validation().items()}
        log(row)
        signum = interrupts.arrived()
        if signum or run.is_due(step + 1, cfg.save_every, last=cfg.steps):
            rows = sampler.rows_until(step + 1)
            checkpoints.save(cfg, step + 1, rows, model, processor, optimizer, **same)
        interrupt.raise_if(signum, f"saved step-{step + 1:06d}; --resume goes on")


def say_what_is_odd(row: dict, has_update: bool) -> None:
    """Say what a step had that should not become a habit."""
    if not has_update:
        ranks.say(f"step {row['step']}: in no group do the accuracies differ: no update")
    if row["truncated"] and row["truncated"] > 0.5:
        share = f"{row['truncated']:.0%}"
        ranks.say(f"step {row['step']}: {share} were cut: is --max-new-tokens too low?")


def validation_prompts(examples: list[Example], limit: int) -> list[Prompt]:
    """Return about `limit` prompts (0: all), equally many of each path that --eval-data has."""
    if not examples:
        return []
    order = PromptOrder(examples, "exam")
    of_each = min(len(own) for own in order.examples.values())
    if limit:
        of_each = min(of_each, max(limit // len(order.paths), 1))
    return [order[i] for i in range(of_each * len(order.paths))]


def say_exam(exam: list[Prompt], examples: list[Example], limit: int) -> None:
    """Say how many questions of --eval-data are not asked."""
    asked = Counter(prompt.example.path for prompt in exam)
    there = Counter(example.path for example in examples)
    if asked != there:
        counts = ", ".join(f"{asked[path]} of {there[path]} {path}" for path in sorted(there))
        cap = f" (--eval-limit {limit})" if limit else ""
        ranks.say(f"validation asks {counts} questions: equally many of each path{cap}")


if __name__ == "__main__":
    run.launch(main, cfg)
