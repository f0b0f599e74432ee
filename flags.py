"""A script's command line: its flags, the bounds of their numbers, other trainers' names for them.

The flags are the fields of a dataclass, the comment behind a field is its help, and its type says
what a number may be: `steps: Count = 1000  # optimiser steps`. A script calls `parse` before it
imports torch, which takes seconds: --help and a wrong flag are answered at once. So nothing heavy
is imported here.
"""

import python_version  # noqa: F401

# isort: split

import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, TypeVar, get_args, get_origin, get_type_hints

import tyro

from errors import UserError

T = TypeVar("T")

LORA_RANK = 32  # of --train lora, where --lora names none


# ---- Bounds


@dataclass(frozen=True)
class Bound:
    """What a number may be: finite, from low to high; `without` are ends that it may not be."""

    low: float
    high: float = math.inf
    without: tuple[float, ...] = ()
    also: float | None = None  # a value outside of that, which has a meaning of its own
    why: str = ""

    def holds(self, value: float) -> bool:
        if value == self.also:
            return True
        # NaN is in no range.
        in_range = self.low <= value <= self.high
        return in_range and value not in self.without and value != math.inf

    def __str__(self) -> str:
        text = f"{'above' if self.low in self.without else 'at least'} {self.low:g}"
        if self.high < math.inf:
            text += f" and {'below' if self.high in self.without else 'at most'} {self.high:g}"
        if self.also is not None:
            text = f"{self.also:g}, or {text}"
        return f"{text} ({self.why})" if self.why else text


Count = Annotated[int, Bound(1)]
CountOrZero = Annotated[int, Bound(0)]
Seed = Annotated[int, Bound(0, 2**32 - 1)]
Positive = Annotated[float, Bound(0, without=(0,))]
PositiveOrZero = Annotated[float, Bound(0)]
Share = Annotated[float, Bound(0, 1)]
ShareAboveZero = Annotated[float, Bound(0, 1, without=(0,))]
ShareBelowOne = Annotated[float, Bound(0, 1, without=(1,))]


def bound_of(hint) -> Bound | None:
    """Return the bound in a type: that of `Count`, also in `Count | None`, `tuple[Count, ...]`."""
    if isinstance(hint, Bound):
        return hint
    # Count | None and tuple[Count, ...] hold the bound among their parts, at any depth.
    for part in get_args(hint):
        bound = bound_of(part)
        if bound is not None:
            return bound
    return None


def check(config) -> None:
    """Raise UserError, with all of them, for the numbers of a Config that are out of bounds."""
    wrong = []
    for name, hint in get_type_hints(type(config), include_extras=True).items():
        bound = bound_of(hint)
        value = getattr(config, name)
        # None means what the flag's comment says, and is never out of bounds.
        if bound is None or value is None:
            continue
        numbers = numbers_in(value)
        if not all(bound.holds(number) for number in numbers):
            typed = " ".join(str(number) for number in numbers)
            wrong.append(f"{flag(name)} {typed}: it has to be {bound}")
    if wrong:
        raise UserError("; ".join(wrong))


def numbers_in(value) -> list:
    """Return a number as a list, and all of a tuple's, also of a tuple of tuples."""
    if not isinstance(value, tuple):
        return [value]
    numbers = []
    for part in value:
        numbers += numbers_in(part)
    return numbers


def flag(name: str) -> str:
    """Return the flag of a field."""
    return f"--{name.replace('_', '-')}"


# ---- Other trainers' flags

# What others put behind a switch.
TRUTHS = ("true", "false", "yes", "no", "on", "off", "0", "1")

# What TRL, transformers, verl and others call it -> ours, the first that the script has; and what
# else there is to say.
PEERS: dict[str, tuple[tuple[str, ...], str]] = {
    "epochs": (("steps",), "an epoch has rows / --batch steps, in RL prompts / --prompts"),
    "num-epochs": (("steps",), "an epoch has rows / --batch steps, in RL prompts / --prompts"),
    "num-train-epochs": (("steps",), "an epoch has rows / --batch steps"),
    "total-epochs": (("steps",), "an epoch has rows / --batch steps, in RL prompts / --prompts"),
    "max-steps": (("steps",), ""),
    "num-steps": (("steps",), ""),
    "iterations": (("steps",), ""),
    "batch-size": (("batch", "prompts"), "over all ranks"),
    "train-batch-size": (("batch", "prompts"), "over all ranks"),
    "global-batch-size": (("batch", "prompts"), ""),
    "per-device-train-batch-size": (
        ("batch", "prompts"),
        "over all ranks; what a pass holds is --micro-tokens",
    ),
    "per-device-eval-batch-size": ((), "validation takes as many as fit"),
    "eval-batch-size": ((), "validation takes as many as fit"),
    "micro-batch-size": (("micro_tokens",), "in tokens"),
    "gradient-accumulation-steps": (
        ("micro_tokens",),
        "a step is accumulated over as many passes of so many tokens as it takes",
    ),
    "gradient-checkpointing": (("checkpointing",), "auto, always or never"),
    "max-grad-norm": (("clip_norm",), ""),
    "grad-clip": (("clip_norm",), ""),
    "gradient-clip-val": (("clip_norm",), ""),
    "learning-rate": (("lr",), ""),
    "lr-scheduler-type": (("schedule",), ""),
    "lr-scheduler": (("schedule",), ""),
    "warmup-steps": (("warmup",), ""),
    "num-warmup-steps": (("warmup",), ""),
    "warmup-ratio": (("warmup",), "in steps"),
    "wd": (("weight_decay",), ""),
    "adam-beta2": (("beta2",), ""),
    "adam-beta1": ((), "it is 0.9"),
    "optim": (("optimizer",), "RL trains with AdamW"),
    "num-generations": (("group",), ""),
    "group-size": (("group",), ""),
    "num-samples": (("samples", "group"), ""),
    "n-samples": (("samples", "group"), ""),
    "rollout-n": (("group",), ""),
    "num-iterations": (("updates",), "of a rollout's prompts each update takes its own share"),
    "ppo-epochs": (("updates",), "of a rollout's prompts each update takes its own share"),
    "beta": (("kl",), ""),
    "kl-coef": (("kl",), ""),
    "kl-coeff": (("kl",), ""),
    "kl-loss-coef": (("kl",), ""),
    "epsilon": (("clip_low",), "and --clip-high"),
    "epsilon-low": (("clip_low",), ""),
    "epsilon-high": (("clip_high",), ""),
    "cliprange": (("clip_low",), "and --clip-high"),
    "clip-ratio": (("clip_low",), "and --clip-high"),
    "delta": (("dual_clip",), ""),
    "loss-type": (("loss",), ""),
    "scale-rewards": (("advantage",), "std, none or batch"),
    "max-completion-length": (("max_new_tokens",), ""),
    "max-response-length": (("max_new_tokens",), ""),
    "max-tokens": (("max_new_tokens", "micro_tokens"), ""),
    "max-length": (("max_new_tokens",), "prompts are never cut"),
    "max-seq-length": (("max_new_tokens",), "prompts are never cut"),
    "max-prompt-length": ((), "prompts are never cut"),
    "use-vllm": ((), "the weights that train sample, too"),
    "vllm-mode": ((), "the weights that train sample, too"),
    "report-to": (
        ("track",),
        "every step is a line of metrics.jsonl in --out, and report.py draws it",
    ),
    "wandb-project": (("track",), "every step is a line of metrics.jsonl in --out"),
    "run-name": (("out",), ""),
    "logging-dir": (("out",), "its metrics.jsonl"),
    "logging-steps": ((), "every step is logged"),
    "log-every": ((), "every step is logged"),
    "eval-steps": (("eval_every",), ""),
    "eval-interval": (("eval_every",), ""),
    "eval-dataset": (("eval_data",), ""),
    "val-data": (("eval_data",), ""),
    "save-steps": (("save_every",), ""),
    "save-interval": (("save_every",), ""),
    "save-freq": (("save_every",), ""),
    "save-total-limit": (("keep",), ""),
    "resume-from-checkpoint": (("resume",), "with the run's --out"),
    "output-dir": (("out",), ""),
    "output": (("out",), ""),
    "output-path": (("out",), ""),
    "model-name-or-path": (("model",), ""),
    "model-name": (("model",), ""),
    "model-path": (("model",), ""),
    "pretrained-model-name-or-path": (("model",), ""),
    "model-id": (("model",), ""),
    "ref-model": ((), "the reference is the run's --model"),
    "dataset": (("data",), ""),
    "dataset-name": (("data",), ""),
    "dataset-path": (("data",), ""),
    "data-path": (("data",), ""),
    "train-data": (("data",), ""),
    "train-file": (("data",), ""),
    "dataloader-num-workers": (("workers",), ""),
    "num-workers": (("workers",), ""),
    "num-proc": (("workers",), ""),
    "bf16": ((), "on CUDA it always computes in bf16, on fp32 masters"),
    "fp16": ((), "on CUDA it always computes in bf16, on fp32 masters"),
    "torch-dtype": (("dtype",), "on CUDA training computes in bf16, on fp32 masters"),
    "precision": (("dtype",), "on CUDA training computes in bf16, on fp32 masters"),
    "device": ((), "the GPU if there is one; CUDA_VISIBLE_DEVICES= leaves it out"),
    "attn-implementation": ((), "it has its own"),
    "deepspeed": (("shard",), "FSDP2, started with torchrun"),
    "fsdp": (("shard",), "started with torchrun"),
    "zero-stage": (("shard",), "started with torchrun"),
    "num-gpus": (("gpus",), "training is started with torchrun --nproc_per_node"),
    "n-gpus-per-node": (("gpus",), "training is started with torchrun --nproc_per_node"),
    "use-peft": (("lora",), "the rank"),
    "use-lora": (("lora",), "the rank"),
    "lora-r": (("lora",), ""),
    "lora-rank": (("lora",), ""),
    "freeze-vision-tower": (("train",), "lm"),
    "reward-funcs": (("rules",), "rewards are the entries of REWARDS in srreal.py"),
    "image-max-pixels": (("max_pixels",), ""),
    "num-examples": (("limit", "n"), ""),
    "num-scenes": (("n",), ""),
    "tasks": (("benchmark",), ""),
    "n-epochs": (("steps",), "an epoch has rows / --batch steps, in RL prompts / --prompts"),
    "max-epochs": (("steps",), "an epoch has rows / --batch steps, in RL prompts / --prompts"),
    "total-steps": (("steps",), ""),
    "total-training-steps": (("steps",), ""),
    "max-train-steps": (("steps",), ""),
    "rollout-batch-size": (("prompts",), "over all ranks"),
    "generation-batch-size": (("prompts",), "over all ranks; --group completions of each"),
    "steps-per-generation": (("updates",), ""),
    "mini-batch-size": (("updates", "batch"), "in RL a rollout is split into so many"),
    "ppo-mini-batch-size": (("updates", "batch"), "in RL a rollout is split into so many"),
    "micro-train-batch-size": (("micro_tokens",), "in tokens"),
    "per-gpu-train-batch-size": (("batch", "prompts"), "over all ranks"),
    "train-micro-batch-size-per-gpu": (("micro_tokens",), "in tokens"),
    "gradient-accumulation": (
        ("micro_tokens",),
        "a step is accumulated over as many passes of so many tokens as it takes",
    ),
    "clip-grad": (("clip_norm",), ""),
    "gradient-clipping": (("clip_norm",), ""),
    "warmup-iters": (("warmup",), ""),
    "lr-warmup-steps": (("warmup",), ""),
    "min-lr": ((), "a cosine ends at 0; see --schedule"),
    "adam-epsilon": ((), "it is 1e-8"),
    "num-return-sequences": (("group",), ""),
    "init-kl-coef": (("kl",), ""),
    "kl-penalty": (("kl",), "it is k3"),
    "entropy-coeff": (("entropy_coef",), ""),
    "adv-estimator": (("advantage", "loss"), "and --loss"),
    "advantage-estimator": (("advantage", "loss"), "and --loss"),
    "mask-truncated-completions": (("mask_truncated",), ""),
    "top-k": (("top_p",), "or --temperature"),
    "min-p": (("top_p",), "or --temperature"),
    "do-sample": (("temperature",), "0 is greedy"),
    "cutoff-len": (("max_new_tokens",), "prompts are never cut"),
    "max-model-len": (("max_new_tokens",), "prompts are never cut"),
    "gpu-memory-utilization": (("slots",), "the live samples of a rank"),
    "tensor-parallel-size": ((), "each rank samples its own share of the prompts"),
    "lora-alpha": (("lora",), "the rank"),
    "lora-dropout": (("lora",), "the rank; there is no dropout"),
    "lora-target-modules": (("lora",), "it is on all matrices of the decoder"),
    "load-in-4bit": ((), "quantised weights do not learn here; --lora takes least memory"),
    "finetuning-type": (("train",), ""),
    "train-type": (("train",), ""),
    "freeze-vision-modules": (("train",), "lm"),
    "freeze-vit": (("train",), "lm"),
    "tune-mm-vision": (("train",), "all"),
    "min-pixels": (("max_pixels",), "the least is the checkpoint's own"),
    "eval-strategy": (("eval_every",), "in steps"),
    "evaluation-strategy": (("eval_every",), "in steps"),
    "eval-freq": (("eval_every",), "in steps"),
    "save-strategy": (("save_every",), "in steps"),
    "overwrite-output-dir": (("out",), "what a run has written is never replaced"),
    "experiment-name": (("out",), ""),
    "exp-name": (("out",), ""),
    "save-dir": (("out",), ""),
    "checkpoint-dir": (("out",), ""),
    "log-dir": (("out",), "its metrics.jsonl"),
    "use-wandb": (("track",), "every step is a line of metrics.jsonl in --out"),
    "resume-from": (("resume",), "with the run's --out"),
    "ckpt": (("model",), ""),
    "checkpoint": (("model",), ""),
    "data-dir": (("data",), ""),
    "image-folder": (("data",), "PATH@FOLDER, where the images lie elsewhere"),
    "image-root": (("data",), "PATH@FOLDER, where the images lie elsewhere"),
    "prompt-key": (("data",), "vqa:PATH,question=COLUMN"),
    "answer-key": (("data",), "vqa:PATH,answer=COLUMN"),
    "image-key": (("data",), "vqa:PATH,image=COLUMN"),
    "device-map": ((), "the GPU if there is one; CUDA_VISIBLE_DEVICES= leaves it out"),
    "flash-attn": ((), "it has its own attention"),
    "attn-impl": ((), "it has its own attention"),
    "local-rank": ((), "several ranks are started with torchrun"),
    "nproc-per-node": ((), "it stands before the script: torchrun --nproc_per_node 8 ..."),
    "random-seed": (("seed",), ""),
}


def hint_at_ours(args: list[str], names: set[str]) -> None:
    """Raise UserError for flags that other trainers have, with ours. names: the script's fields."""
    hints = []
    for arg in args:
        theirs = arg.partition("=")[0].removeprefix("--").replace("_", "-")
        is_ours = theirs.replace("-", "_") in names
        if not arg.startswith("--") or is_ours or theirs not in PEERS:
            continue
        candidates, note = PEERS[theirs]
        # The first of ours that this script has: --batch in SFT, --prompts in RL.
        ours = [flag(name) for name in candidates if name in names][:1]
        if ours or note:
            said = [f"here it is {ours[0]}"] if ours else ["there is no such flag here"]
            if note:
                said.append(note)
            hints.append(f"--{theirs}: {': '.join(said)}")
    if hints:
        raise UserError("; ".join(hints))


def check_words(args: list[str], config: type) -> None:
    """Raise UserError for a switch with a value, `--resume true`, and for an empty value.

    An empty one is what a shell makes of a variable that is not set; a path would become ".".
    """
    hints = get_type_hints(config)
    may_be_empty = {flag(field.name) for field in fields(config) if field.default == ""}
    typed = ""
    for word in args:
        value = word
        is_flag = word.startswith("--")
        if is_flag:
            # Words behind it are its values, until the next flag.
            typed, is_joined, value = word.partition("=")
            if not is_joined:
                continue
        name = typed.removeprefix("--").replace("-", "_")
        if not value and typed and flag(name) not in may_be_empty:
            raise UserError(f"{typed} is empty")
        if name not in hints:
            # tyro's --no-resume is the same switch.
            name = name.removeprefix("no_")
        if hints.get(name) is bool and (is_flag or value.lower() in TRUTHS):
            off = flag(f"no_{name}")
            raise UserError(f"{typed} takes no value: it is {flag(name)}, or {off} to leave it out")


# ---- The command line


def join_repeated(arguments: list[str], config: type) -> list[str]:
    """Return the arguments with `--data A --data B` as `--data A B`; tyro alone would keep B.

    config: the dataclass of the flags. Those of several values are its tuples of any length.
    """
    several = set()
    for name, hint in get_type_hints(config).items():
        if get_origin(hint) is tuple and ... in get_args(hint):
            several.add(name)
    groups: list[list[str]] = []  # a flag with its values
    for argument in arguments:
        # A negative number begins with one dash, and so stays a value.
        if argument.startswith("--") or not groups:
            groups.append([argument])
        else:
            groups[-1].append(argument)
    joined = []
    first: dict[str, list[str]] = {}  # by name, the group that takes the values of later ones
    for group in groups:
        flag, equals, value = group[0].partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if name not in several:
            joined.append(group)
            continue
        values = [value, *group[1:]] if equals else group[1:]
        if name in first:
            first[name] += values
        else:
            first[name] = [flag, *values]
            joined.append(first[name])
    words = []
    for group in joined:
        words += group
    return words


def say_interrupted(kind: type, error: BaseException, trace) -> None:
    """Say that Ctrl-C ended a command, in place of the traceback of what it was importing."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
    elif os.environ.get("RANK", "0") == "0":
        print(f"{Path(sys.argv[0]).name}: interrupted", file=sys.stderr)


def parse(
    config: type[T],
    doc: str,
    args: list[str] | None = None,
    recorded: Callable[[type[T], list[str]], T | None] | None = None,
) -> T:
    """Return the Config that the command line makes. What is wrong with it ends in exit code 2.

    doc: the script's, whose first paragraph --help shows; args: instead of the process's own;
    recorded: returns the defaults that a run in --out has recorded, None for the Config's own.
    """
    name = Path(sys.argv[0]).name
    # The imports behind the flags take seconds, in which Ctrl-C is likely; run.launch comes later.
    sys.excepthook = say_interrupted
    args = join_repeated(sys.argv[1:] if args is None else args, config)
    is_first = os.environ.get("RANK", "0") == "0"
    try:
        hint_at_ours(args, {field.name for field in fields(config)})
        check_words(args, config)
        defaults = recorded(config, args) if recorded else None
        return tyro.cli(
            config,
            prog=name,
            description=doc.split("\n\n")[0],
            args=args,
            console_outputs=is_first,
            **({} if defaults is None else {"default": defaults}),
        )
    except UserError as error:
        if is_first:
            print(f"{name}: {error}", file=sys.stderr)
        code = 2
    except SystemExit as end:
        code = end.code
    if not is_first:
        time.sleep(5)  # torchrun ends all ranks with the first that ends: that is to say why
    sys.exit(code)
