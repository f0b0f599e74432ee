"""GRPO on both paths, top to bottom: roll out, score, advantage, filter, loss, step, log.

    1 GPU    python train_rl.py --model out/sft/step-002000 --data scenes:out/train --out out/rl
    8 GPUs   torchrun --nproc_per_node 8 train_rl.py (the same flags; --prompts stays the global number)

A step takes --prompts prompts, as many of each path that the data have (each path walks its own
shuffled order: the rows of one question in two paths are not kept together), and --group
completions of each.

    r = srreal.score(text, example).total          A = (r - mean) / (std + 1e-6) in the group
    loss = policy loss(log p, A) + kl * k3(ref)    over the completion tokens of the groups that are kept

A group is kept if the accuracies in it differ (--filter accuracy): where all are right or all
wrong, only noise in the smaller parts would be learnt. Three policies stand beside the one that
learns:
    old      itself before the step: its log-prob, detached. With --updates 1 that takes no extra forward
    rollout  the sampler: same weights, other numerics; a token weighs min(p_old / p_rollout, rollout_cap)
    ref      --model, also after --resume; its log-probs are taken once a rollout, and only if --kl > 0. It is
             no second model: what learns changes places with what it was (trainer.Reference)

Metrics of a step: loss; reward, the mean total of all completions; groups, how many were sampled,
and kept, their share that is trained on; discarded and discarded_tokens, samples (also begun ones)
behind the last group that --tries wanted; truncated, of completions without an end token; of each
path P: P_reward, P_accuracy, P_format, P_detect, P_length (tokens), P_truncated, P_kept, P_entropy
(nats), P_kl. Over the trained tokens: entropy, kl (k3 to ref), clip_low, clip_high (shares whose
loss the clip binds), ratio_max, mismatch_kl, and mismatch_mean and mismatch_max of |log p_old - log
p_rollout|. grad_norm is before the clip; times are without validation and saving. With --eval-data:
val_P_accuracy and so on, greedy, after the row's update; val0_* in the first row, before any.

Departures from the paper and the official code:
 1. Rewards are strict (srreal.py says how); --rules official gives the official numbers.
 2. Groups are filtered on accuracy, not on .2 < mean total < .99, which keeps all-right groups whose boxes
    differ. Filtered groups are not replaced unless --tries says so (DAPO's dynamic sampling, in the
    order of the prompts: in that of finishing, short answers would be preferred; each rank wants
    its share).
 3. The loss is divided by the global number of trained tokens, not by micro-batch. 4. Sampling is
 not cut (top_p 1; theirs .99), and the sampler's own log-probs correct the loss. Completions
    that were cut at --max-new-tokens are trained on as they are: ill-formed, they earn nothing.
 5. One set of weights samples and trains; theirs keeps the prompts' embeddings from a frozen copy.
 6. The paths have equal shares of each step; theirs is one shuffled list.
"""

import json
import math
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

import trainer
from kernels.policy_loss import policy_loss
from kernels.rewards import group_advantages
from model.lora import LORA_RANK
from model.processor import Batch, DeviceImages, Processor
from model.rollout import Rollout, default_slots, generate, release
from optim import Optimizer, learning_rate
from srreal import REWARDS, Example, Scores, score


@dataclass
class Config:
    model: str  # checkpoint directory or hub id; also the reference policy
    data: tuple[str, ...]  # data sets: paths or kind:path, concatenated; or a mixture file
    out: str  # the run's directory
    steps: int = 100  # rollouts
    prompts: int = 64  # prompts a step, over all ranks, in equal shares of the paths
    group: int = 8  # completions a prompt
    # above 1: up to so many times the prompts, until --prompts groups differ in accuracy
    tries: int = 1
    # live samples of a rank; None: by its memory at the start, then as config.json
    slots: int | None = None
    updates: int = 1  # optimiser steps a rollout, each on its own share of the prompts
    max_new_tokens: int = 1024  # a longer completion is cut, and so is not well-formed
    temperature: float = 1.0  # of sampling; the trainer's log-probs are at the same
    rules: Literal["strict", "official"] = "strict"  # of scoring
    filter: Literal["accuracy", "none"] = "accuracy"  # which groups are trained on
    loss: Literal["dapo", "grpo", "dr_grpo", "gspo", "cispo"] = "dapo"  # see kernels/policy_loss.py
    kl: float = 0.01  # weight of the k3 KL to the reference policy
    clip_low: float = 0.2  # the ratio is clipped to 1 - clip_low ...
    clip_high: float = 0.3  # ... 1 + clip_high
    dual_clip: float = 3.0  # cap of the loss where A < 0, in units of |A|
    rollout_cap: float = 2.0  # cap of the weight p_old / p_rollout
    lr: float = 1e-6  # peak learning rate
    vector_rate: float = 1.0  # learning rate of norms and biases, in units of --lr
    schedule: Literal["constant", "cosine", "linear"] = "constant"  # linear: flat, then 45 % down
    warmup: int = 0  # steps of linear warm-up
    weight_decay: float = 0.01  # of matrices
    beta2: float = 0.999  # of AdamW
    clip_norm: float = 1.0  # gradients are shrunk to this global norm
    # which parameters learn (TRAIN in model/lora.py)
    train: Literal["lm", "all", "spatial", "lora"] = "lm"
    # rank of adapters on the decoder, which then stays as it is; merged on saving; 0: none
    lora: int = 0
    regions: Literal["token", "text"] = "token"  # as the model was trained to read a region
    max_pixels: int | None = None  # image size limit; None: the checkpoint's own
    # over the ranks (FSDP2); auto: if one can't hold it
    shard: Literal["auto", "always", "never"] = "auto"
    checkpointing: Literal["auto", "always", "never"] = "auto"  # recompute blocks backwards
    micro_tokens: int = 16384  # tokens of a forward pass of a rank; turn it down if memory runs out
    # processes a rank that read images ahead; None: up to 8 on CUDA, 0 on a CPU
    workers: int | None = None
    eval_data: tuple[str, ...] = ()  # data sets for validation, greedy, by the same rules
    eval_every: int = 0  # steps between validations; 0: at the start and at the end
    eval_limit: int = 256  # at most so many validation prompts, equally many of each path
    seed: int = 0  # order of the data, sampling noise
    save_every: int = 50  # steps between checkpoints
    keep: int = 0  # so many of them stay such that --resume can go on from them; 0: all
    resume: bool = False  # go on from the newest whole checkpoint in --out
    skip_bad_rows: bool = False  # go on without the unusable rows, and count them

    def __post_init__(self):
        self.lora = self.lora or LORA_RANK * (self.train == "lora")


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
# What is logged of each path and of all, and what the sum of it is divided by (None: by nothing).
GRADES = dict.fromkeys(("reward", *REWARDS, "length", "truncated"), "completions")
GRADES |= {"kept": "groups", "groups": None, "sampled_tokens": None}
TOKENS = {"tokens": None, "entropy": "tokens", "kl": "tokens"}
GAPS = dict.fromkeys(("clip_low", "clip_high", "mismatch_kl", "mismatch_mean"), "trained")


class Prompts:
    """An endless row of prompts: number i is of path i mod k, and each path has its own shuffled
    order."""

    def __init__(self, examples: list[Example], seed):
        self.paths = sorted({e.path for e in examples})
        self.rows = {path: [e for e in examples if e.path == path] for path in self.paths}
        self.orders = {
            p: trainer.Order(range(len(rows)), f"{seed} {p}") for p, rows in self.rows.items()
        }

    def __getitem__(self, i: int) -> tuple[int, Example]:
        """(turn, example): a turn has one prompt of each path."""
        turn, path = i // len(self.paths), self.paths[i % len(self.paths)]
        return turn, self.rows[path][self.orders[path].rows(turn, 1)[0]]


@dataclass
class Group:
    """The completions of one prompt, and what they earned."""

    example: Example
    turn: int
    rollouts: list[Rollout]
    scores: list[Scores] = field(default_factory=list)
    advantages: list[float] = field(default_factory=list)
    differs: bool = False  # in accuracy


def choose_slots(cfg: Config, model, planned: int, earlier: int) -> Config:
    """--slots, else those of the run that goes on, else what every rank has memory for; in
    config.json."""
    own = default_slots(model, cfg.group, cfg.max_new_tokens)
    own = min(own, planned or own) if model.device.type == "cuda" else own
    earlier, most = trainer.reduce([earlier, -own], "MAX")
    cfg = replace(cfg, slots=cfg.slots or int(earlier or -most))
    if trainer.FIRST:
        config = json.loads((Path(cfg.out) / "config.json").read_text())
        trainer.write_config(Path(cfg.out), config | {"slots": cfg.slots})
    return cfg


def roll_out(
    model,
    processor: Processor,
    prompts,
    cfg: Config,
    seed: int,
    wanted=0,
    greedy=False,
    images: DeviceImages | None = None,
):
    """Groups of the prompts in their order, and how many samples and tokens were in vain: with
    `wanted`, groups end with the one that is so many's last to differ."""
    n, temperature = (1, 0.0) if greedy else (cfg.group, cfg.temperature)
    quiet, examples, heard, in_vain = (
        None if trainer.FIRST else True,
        [e for _, e in prompts],
        [],
        [],
    )

    def enough(rollouts: list[Rollout]) -> bool:
        accuracies = [score(r.text, examples[len(heard)], cfg.rules).accuracy for r in rollouts]
        heard.append(max(accuracies) - min(accuracies) > 1e-6)
        return sum(heard) >= wanted

    with tqdm(total=len(prompts) * n, desc="rollout", leave=False, disable=quiet) as bar:
        rollouts = trainer.mendable(
            generate,
            model,
            processor,
            examples,
            n=n,
            max_new_tokens=cfg.max_new_tokens,
            temperature=temperature,
            seed=seed,
            progress=bar.update,
            slots=None if greedy else cfg.slots,  # prompts of one sample each take more memory
            enough=enough if wanted else None,
            wasted=lambda *counts: in_vain.extend(counts),
            images=images,
        )
    groups = [
        Group(example, turn, own) for (turn, example), own in zip(prompts, rollouts, strict=False)
    ]
    return groups, in_vain or [0, 0]


def means(sums: dict[str, Counter], names: dict[str, str | None]) -> dict[str, float]:
    """Sums by path on each rank -> path_name of each path, and name of all paths together, over all
    ranks."""
    columns = sorted({*names, *filter(None, names.values())})
    flat = iter(trainer.reduce([float(sums[path][column]) for path in sums for column in columns]))
    rows = {path: {column: next(flat) for column in columns} for path in sums}
    rows[""] = {column: sum(row[column] for row in rows.values()) for column in columns}
    return {
        f"{path}_{name}".lstrip("_"): row[name] / (max(row[by], 1.0) if by else 1.0)
        for path, row in rows.items()
        for name, by in names.items()
    }


def grade(groups: list[Group], paths: list[str], rules: str) -> dict[str, float]:
    """Scores the groups, fills in their advantages, and says how they did."""
    sums = {path: Counter() for path in paths}
    for group in groups:
        scores = [score(r.text, group.example, rules) for r in group.rollouts]
        # The official rules take "nan" for a number.
        group.scores = [s if math.isfinite(s.total) else Scores(0.0) for s in scores]
    parts = torch.tensor(
        [(s.total, s.accuracy) for g in groups for s in g.scores], dtype=torch.float64
    )
    starts = torch.tensor([0, *(len(g.scores) for g in groups)]).cumsum(0)
    advantages, differs = group_advantages(*parts.view(-1, 2).T, starts)
    for i, group in enumerate(groups):
        group.advantages, group.differs = (
            advantages[starts[i] : starts[i + 1]].tolist(),
            bool(differs[i]),
        )
        own = sums[group.example.path]
        for r, s in zip(group.rollouts, group.scores, strict=True):
            own.update(completions=1, reward=s.total, **s.parts)
            own.update(length=len(r.tokens), sampled_tokens=len(r.tokens), truncated=not r.finished)
        own.update(groups=1, kept=group.differs)
    return means(sums, GRADES)


@dataclass
class Micro:
    """One forward pass: a packed batch, and what the loss needs of its S sequences and L target
    tokens. Behind them a filler may stand in the batch, for other ranks' sake."""

    batch: Batch
    owner: Tensor  # (L,) index of each token's path
    advantage: Tensor  # (S,)
    cu: Tensor  # (S+1,)
    rollout: Tensor  # (L,) the sampler's log-probs
    old: Tensor | None = None  # (L,)
    ref: Tensor | None = None  # (L,)


def pack(
    groups: list[Group], processor: Processor, paths: list[str], cfg: Config, world: int, device
):
    """Groups in forward passes of about micro_tokens; a longer group is split, its prompt
    repeated."""
    pieces, lengths = [], []
    for group in groups:
        prompt, own = (
            len(processor.prompt_ids(group.example)),
            [len(r.tokens) for r in group.rollouts],
        )
        for part in trainer.cut(own, cfg.micro_tokens - prompt):
            pieces.append((group.example, group.rollouts[part], group.advantages[part]))
            lengths.append(prompt + sum(own[part]))
    parts = [pieces[part] for part in trainer.cut(lengths, cfg.micro_tokens)]
    return trainer.even(
        [micro(part, processor, paths, world, device) for part in parts],
        lambda: micro([], processor, paths, world, device),
    )


def micro(pieces: list, processor: Processor, paths: list[str], world: int, device) -> Micro:
    """pieces: (example, rollouts, their advantages)."""
    examples = trainer.pad([example for example, _, _ in pieces], world)
    completions = [[r.tokens for r in rollouts] for _, rollouts, _ in pieces]
    completions += [[[processor.end_ids[0]]]] * (len(examples) - len(pieces))
    batch = processor(examples, completions)
    owner = [paths.index(e.path) for e, rollouts, _ in pieces for r in rollouts for _ in r.tokens]
    advantage = [a for _, _, advantages in pieces for a in advantages]
    sampled = [logprob for _, rollouts, _ in pieces for r in rollouts for logprob in r.logprobs]
    owner, advantage, sampled = (
        torch.tensor(x, device=device) for x in (owner, advantage, sampled)
    )
    return Micro(
        batch, owner, advantage, batch.cu_targets[: len(advantage) + 1].to(device), sampled
    )


def forward(
    model, one: Micro, temperature: float, images: DeviceImages | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies (L,). The batch is on the host; a step's images are uploaded once."""
    output = model(one.batch.to(one.cu.device, images), temperature)
    return output.logprob[: len(one.rollout)], output.entropy[: len(one.rollout)]


@torch.no_grad()
def token_stats(
    one: Micro, sums: dict[str, Counter], logprob: Tensor, entropy: Tensor, metrics: dict
):
    """Adds the pass to `sums` (by path, in their order; "" is of all); returns its maxima."""
    gaps = torch.cat((logprob.new_zeros(1), (one.old - one.rollout).abs()))
    d = torch.zeros_like(logprob) if one.ref is None else one.ref - logprob
    each = torch.stack((torch.ones_like(d), entropy, torch.expm1(d) - d), 1).double()
    paths, names = (
        [path for path in sums if path],
        ("clip_low", "clip_high", "mismatch_kl", "ratio_max"),
    )
    own = each.new_zeros(len(paths), 3).index_add_(0, one.owner.long(), each)
    values = [*(metrics[name] for name in names), gaps.sum(), gaps.max()]
    # the one wait for the device
    values = torch.cat((own.flatten(), torch.stack(values).double())).tolist()
    *own, low, high, mismatch, ratio, gap, most = values
    for i, path in enumerate(paths):
        tokens, nats, kl = own[3 * i : 3 * i + 3]
        sums[path].update(tokens=tokens, entropy=nats, kl=kl)
    shares = {
        "clip_low": low * len(d),
        "clip_high": high * len(d),
        "mismatch_kl": mismatch * len(d),
    }
    sums[""].update(shares, trained=len(d), mismatch_mean=gap)
    return Counter(ratio_max=ratio, mismatch_max=most)


def main(cfg: Config) -> None:
    rank, world, device = trainer.setup()
    # of the run that --resume goes on with; `begin` writes a new one
    old = Path(cfg.out) / "config.json"
    old = json.loads(old.read_text()) if trainer.FIRST and cfg.resume and old.exists() else {}
    checkpoint, done = trainer.begin(cfg)
    examples, held_out = trainer.load_data(cfg)
    prompts, exam = Prompts(examples, cfg.seed), Prompts(held_out, "exam")
    questions = min([cfg.eval_limit, *(len(exam.paths) * len(rows) for rows in exam.rows.values())])

    processor = trainer.load_processor(str(checkpoint or cfg.model), cfg)
    some = examples[:: len(examples) // 64 + 1]
    processor.expect(some)
    sizes = dict(
        prompts=cfg.prompts,
        group=cfg.group,
        new_tokens=cfg.max_new_tokens,
        kl=cfg.kl,
        prompt_tokens=max(len(trainer.mendable(processor.prompt_ids, e)) for e in some),
    )
    settings = trainer.settle(cfg, processor.config, device, world, **sizes)
    policy = trainer.load_policy(cfg.model, cfg, device, world, settings, samples=True)
    model, rollout_model = policy.model, policy.rollout_model  # what has learnt comes by `restore`
    optimizer = Optimizer(
        model.named_parameters(),
        policy.images,
        cfg.weight_decay,
        (0.9, cfg.beta2),
        vector_lr_scale=cfg.vector_rate,
    )
    reference = trainer.Reference(rollout_model, optimizer) if cfg.kl > 0 else None
    same = {"data": trainer.fingerprint(examples), "--train": cfg.train, "--lora": cfg.lora}
    trainer.restore(checkpoint, optimizer, **same)
    cfg = choose_slots(cfg, rollout_model, settings.slots, old.get("slots") or 0)

    def own_share(rows: list[tuple[int, Example]]) -> list[tuple[int, Example]]:
        """This rank's prompts, by expected length: path dtr writes a box, and reasons, per
        region."""
        weights = [1.0 + len(e.regions) * (e.path == "dtr") for _, e in rows]
        return [rows[i] for i in trainer.deal(weights, rank, world)]

    def validate(prefix: str) -> dict[str, float]:
        chosen = own_share([exam[i] for i in range(questions)])
        processor.expect([example for _, example in chosen])
        groups, _ = roll_out(rollout_model, processor, chosen, cfg, seed=0, greedy=True)
        values = grade(groups, exam.paths, cfg.rules).items()
        return {prefix + name: value for name, value in values if not name.endswith("kept")}

    def offered(step: int) -> list[tuple[int, Example]]:
        """This rank's share of the prompts."""
        offer = cfg.prompts * cfg.tries if step < cfg.steps else 0
        return own_share([prompts[step * offer + i] for i in range(offer)])

    log, paths = trainer.Log(cfg, done, COLUMNS), prompts.paths
    before = validate("val0_") if held_out and done == 0 else {}
    for step in range(done, cfg.steps):
        # Roll out, while the workers read the next step's images. Score; keep the groups that
        # teach.
        trainer.phase(f"step {step + 1}, rollout")
        clock = [time.perf_counter()]
        own, noise = offered(step), cfg.seed * 1_000_003 + step
        processor.expect([example for _, example in own + offered(step + 1)])
        wanted = -(-len(own) // cfg.tries) if cfg.tries > 1 else 0
        images = DeviceImages(device)
        groups, in_vain = roll_out(rollout_model, processor, own, cfg, noise, wanted, images=images)
        if not settings.keep or cfg.slots > settings.slots:
            release()  # the update needs the cache's room: the next step records the graph again
        in_vain = trainer.reduce(in_vain)  # the wait for the slowest rank is the rollout's
        clock.append(time.perf_counter())
        row = grade(groups, paths, cfg.rules)
        kept = [group for group in groups if group.differs or cfg.filter == "none"]
        clock.append(time.perf_counter())

        # Pack. Log-probs of the reference, and, if there are several updates, of the policy before
        # the first.
        shares = [[g for g in kept if g.turn % cfg.updates == u] for u in range(cfg.updates)]
        shares = [
            trainer.mendable(pack, share, processor, paths, cfg, world, device) for share in shares
        ]
        trainer.phase(f"step {step + 1}, log-probs")
        with torch.no_grad():
            with reference or nullcontext():
                for one in (one for share in shares for one in share):
                    one.ref = (
                        forward(rollout_model, one, cfg.temperature, images)[0]
                        if reference
                        else None
                    )
            for one in (one for share in shares for one in share):
                one.old = (
                    forward(rollout_model, one, cfg.temperature, images)[0]
                    if cfg.updates > 1
                    else None
                )

        # Update.
        clock.append(time.perf_counter())
        trainer.phase(f"step {step + 1}, update")
        lr = learning_rate(step, cfg.steps, cfg.lr, cfg.warmup, cfg.schedule)
        sums, peaks, losses, norms = {path: Counter() for path in (*paths, "")}, Counter(), [], []
        for share in shares:
            counts = [
                sum(len(one.rollout) for one in share),
                sum(len(one.advantage) for one in share),
            ]
            tokens, sequences = trainer.reduce(counts)
            if tokens == 0:
                continue
            losses.append(0.0)
            for one in trainer.passes(model, share):
                logprob, entropy = forward(model, one, cfg.temperature, images)
                one.old = logprob.detach() if one.old is None else one.old
                loss, metrics = policy_loss(
                    logprob,
                    one.old,
                    one.advantage,
                    one.cu,
                    kind=cfg.loss,
                    clip_low=cfg.clip_low,
                    clip_high=cfg.clip_high,
                    dual_clip=cfg.dual_clip,
                    ref_logprob=one.ref,
                    kl=cfg.kl,
                    rollout_logprob=one.rollout,
                    rollout_cap=cfg.rollout_cap,
                    max_tokens=cfg.max_new_tokens,
                    denominator=tokens if cfg.loss in ("dapo", "cispo") else sequences,
                )
                loss.backward()
                losses[-1] += loss.item()
                peaks |= token_stats(one, sums, logprob, entropy, metrics)
            losses[-1] = trainer.reduce(losses[-1:])[0]
            norms.append(optimizer.step(lr, cfg.clip_norm, losses[-1], name=f"step {step + 1}"))
        shares = share = one = images = None  # no pixels stay behind
        clock.append(time.perf_counter())

        # Log, validate, save.
        rollout, scoring, logprobs, update = (b - a for a, b in pairwise(clock))
        last = step + 1 == cfg.steps
        row |= means({"": sums.pop("")}, GAPS) | means(sums, TOKENS) | before
        names = ("ratio_max", "mismatch_max")
        row |= zip(
            names, trainer.reduce([float(peaks[name]) for name in names], "MAX"), strict=True
        )
        if not norms:
            trainer.say(f"step {step + 1}: in no group do the accuracies differ: no update")
        if row["truncated"] > 0.5:
            trainer.say(
                f"step {step + 1}: {row['truncated']:.0%} were cut: is --max-new-tokens too low?"
            )
        before = {}
        trainer.phase(f"step {step + 1}, validation and saving")
        if held_out and (last or (cfg.eval_every and (step + 1) % cfg.eval_every == 0)):
            row |= validate("val_")
        log(
            {
                "step": step + 1,
                "seconds": clock[-1] - clock[0],
                "loss": fmean(losses or [0.0]),
                "grad_norm": fmean(norms or [0.0]),
                "lr": lr,
                **row,
                "rollout_seconds": rollout,
                "discarded": in_vain[0],
                "discarded_tokens": in_vain[1],
                "score_seconds": scoring,
                "logprob_seconds": logprobs,
                "update_seconds": update,
                "peak_memory_mib": trainer.peak_memory(device),
                "rollout_tokens_per_second": row["sampled_tokens"] / rollout,
                "update_tokens_per_second": row["tokens"] / update,
            }
        )
        if last or (step + 1) % cfg.save_every == 0:
            trainer.save(cfg, step + 1, model, processor, optimizer, **same)


if __name__ == "__main__":
    trainer.launch(main, Config)
