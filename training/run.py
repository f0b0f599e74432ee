"""A run from its command line to its log: flags, user errors, data, settings, metrics.jsonl."""

import math
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import data
import flags
import machine
import plan
from data.leakage import Filter
from errors import UserError
from model.delta import check_kernels
from model.files import checkpoint_of
from model.processor import Processor
from srreal import Example
from training import checkpoints, folder, interrupt, ranks, track
from training.interrupt import Interrupted, Interrupts

MEMORY_FLAGS = ("micro_tokens", "slots", "max_new_tokens", "max_pixels")


# ---- The command line


def launch(main: Callable, cfg) -> None:
    """Run main(cfg), of the command line. A UserError ends it in one line, exit code 2.

    So do, with exit code 1, a loss that is not finite, want of memory, and ranks that don't answer;
    with 130 and 143, Ctrl-C and SIGTERM. Everything else is a bug and keeps its traceback.
    """
    name = Path(sys.argv[0]).name
    try:
        # Signals are taken from here on; within a loop they wait for the end of a step.
        with Interrupts():
            end_in_words(main, cfg, name)
    except UserError as error:
        end(f"{name}: {error}", 2)
    except Interrupted as stop:
        saved = str(stop) or what_is_left(cfg)
        end(f"{name}: interrupted: {saved}", stop.exit_code)
    except KeyboardInterrupt:
        end(f"{name}: interrupted: {what_is_left(cfg)}", 128 + signal.SIGINT)
    if dist.is_initialized():
        dist.destroy_process_group()


def end_in_words(main: Callable, cfg, name: str) -> None:
    """Run main(cfg); end the process in one line where it fails for a reason that is no bug."""
    try:
        if vars(cfg).get("model"):
            cfg.model = checkpoint_of(cfg.model, ranks.say)
        main(cfg)
    except data.BadRows as bad:
        told = bad.told(cfg.out or "out")
        # Where it is given already, no row is left.
        if not vars(cfg).get("skip_bad_rows"):
            told += "\n(--skip-bad-rows goes on without them)"
        end(f"{name}: {told}", 2)
    except FloatingPointError as error:
        end(f"{name}: {error}; nothing was updated; {what_is_saved(cfg)} (with a lower --lr?)", 1)
    except (RuntimeError, MemoryError) as error:
        words = explain(error, cfg)
        if words is None:
            raise
        end(f"{name}: {words}", 1)


def end(message: str, code: int) -> None:
    """Print the message and exit at once.

    Other ranks and background threads may hang in what this rank will not take part in.
    """
    interrupt.reset()
    by_signal = code > 128
    if code == 2 and not ranks.is_first():
        # Where all ranks stop, the first has said it by then, and torchrun has ended the others.
        time.sleep(5)
    if ranks.is_first() or not by_signal:
        print(message, file=sys.stderr, flush=True)
    sys.stdout.flush()
    # Not sys.exit, which would wait for those threads.
    os._exit(code)


def what_is_left(cfg) -> str:
    """Return what an interrupted command can go on from, where its loop had nothing to save."""
    if "resume" not in vars(cfg):
        return "the same command goes on" if "out" in vars(cfg) else "nothing is written"
    # A row or a step folder says that the loop got that far.
    out = Path(cfg.out)
    if folder.whole_rows(out / "metrics.jsonl") or checkpoints.step_folders(out):
        return what_is_saved(cfg)
    return "no step was finished, so there is nothing to save"


def what_is_saved(cfg) -> str:
    kept = checkpoints.newest(Path(cfg.out), say_skipped=False)
    if kept is None:
        return "no checkpoint was saved before"
    return f"{kept} is whole, and --resume goes on from it"


def explain(error: BaseException, cfg) -> str | None:
    """Return what a user can do about a hung collective or want of memory; None: it is a bug."""
    if ranks.did_not_answer(error):
        where = f"rank {ranks.rank()}, {ranks.current_phase()}"
        return f"{where}: the other ranks did not answer ({error})"
    # A CPU's allocator raises a plain RuntimeError: its words alone tell it from a bug.
    of_memory = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    if not of_memory and "can't allocate memory" not in str(error):
        return None
    knobs = []
    for name, value in vars(cfg).items():
        if name in MEMORY_FLAGS:
            knobs.append(f"{flags.flag(name)} (now {value})")
    return f"out of memory; turn down {' or '.join(knobs)}"


def check_together(cfg, doubts: Sequence[str] = ()) -> None:
    """Check flags that concern each other: UserError, or a line on what is odd, though not wrong.

    doubts: the script's own.
    """
    track.check(cfg.track)
    if cfg.eval_every and not cfg.eval_data:
        raise UserError(f"--eval-every {cfg.eval_every}: there is no --eval-data")
    found = list(doubts)
    if cfg.warmup >= cfg.steps:
        reached = cfg.steps / (cfg.warmup + 1)
        found.append(
            f"--warmup {cfg.warmup} is longer than --steps {cfg.steps}: the learning rate reaches "
            f"{reached:.0%} of --lr"
        )
    if cfg.keep and not cfg.save_every:
        found.append(f"--keep {cfg.keep} means nothing beside --save-every 0, which saves once")
    for doubt in found:
        ranks.say(f"note: {doubt}")


# ---- What a run starts from


def load_data(cfg, more: Callable | None = None) -> tuple[list[Example], list[Example]]:
    """Return the examples of --data and of --eval-data; bad rows of both in one BadRows.

    --data comes without the rows that --drop-leaks leaves out. more: example -> [(field, reason)],
    what else makes a row unusable, as in data.load.
    """
    leaks = Filter(vars(cfg).get("drop_leaks") or ())
    sets = [data.read(cfg.data, more, leaks.keeps if leaks.benchmarks else None)]
    if leaks.benchmarks:
        ranks.say(leaks.summary())
    sets.append(data.read(cfg.eval_data, more) if cfg.eval_data else data.Loaded())
    # A row that is in both sets is named once.
    bad = sets[0].bad + sets[1].bad
    bad = data.BadRows(list(dict.fromkeys(bad)))
    if bad.rows and not cfg.skip_bad_rows:
        raise bad
    training, validation = [data.usable(loaded, cfg.skip_bad_rows) for loaded in sets]
    if bad.rows:
        ranks.say(bad.write(cfg.out))
    if not training:
        raise UserError("no row is left to train on: see what --data takes")
    return training, validation


def load_processor(
    source: str,
    cfg,
    examples: Sequence[Example] = (),
    learning: tuple[str, ...] = (),
    head: bool = False,
) -> Processor:
    """Return the checkpoint's processor, with the workers that read images ahead.

    Parts of the model that the examples use though they never learnt are named, but for those that
    are learning now (prefixes of their tensors). head: whether the 3D head is read.

    --workers None: on CUDA a rank's share of the cores but one, at most 8; on a CPU, which
    computes, 0.
    """
    workers = cfg.workers
    if workers is None and torch.cuda.is_available():
        cores = machine.cpus() // ranks.local_world_size(1)
        # One core stays for this process. At most 8: a guess.
        workers = min(max(cores - 1, 0), 8)
    processor = Processor.from_pretrained(
        source, max_pixels=cfg.max_pixels, regions=cfg.regions, workers=workers or 0
    )
    # Text alone needs no place for an image in the chat template.
    if any(example.images for example in examples):
        processor.check_template()
    if examples:
        for sentence in processor.untrained_parts(examples, learning, head):
            ranks.say(sentence)
    return processor


def resolve_auto_settings(cfg, config, device: torch.device, world: int, **sizes) -> plan.Settings:
    """Return what --shard and --checkpointing come to, before anything is loaded.

    Where auto, it is what `plan.py` chooses for this rank's memory; with the slots of a rollout,
    and whether their cache may stay during the update. config: the checkpoint's (transformers');
    sizes: prompts (of all ranks), group, new_tokens, kl of the plan.
    """
    check_kernels(config, device)
    ranks.phase("loading and sharding")
    local_world = ranks.local_world_size(world)
    # The plan is of one box; prompts are of all.
    sizes["prompts"] = math.ceil(sizes["prompts"] * local_world / world)
    cuda = device.type == "cuda"
    # All that the device has, not what is free: nothing of ours is on it yet.
    if cuda:
        memory = torch.cuda.mem_get_info(device)[1] / 1e9
    else:
        memory = machine.memory() / local_world / 1e9
    least = ranks.all_reduce([memory], "MIN")[0]  # all ranks have to choose alike
    wanted = plan.Config(
        cfg.model,
        local_world,
        least,
        train=cfg.train,
        lora=cfg.lora,
        dtype="bf16" if cuda else "fp32",
        **sizes,
    )
    choices = {"auto": (False, True), "always": (True,), "never": (False,)}
    options = []
    # The order is that of preference: the first that fits is taken.
    for sharded in choices[cfg.shard] if world > 1 else (False,):
        for checkpointing in choices[cfg.checkpointing]:
            options.append(plan.Settings(sharded, checkpointing, cfg.lora, cfg.micro_tokens))
    # On the meta device: nothing is loaded to know how much there will be.
    counts = plan.count(config, cfg.train, cfg.lora)
    try:
        settings, _ = plan.choose(config, wanted, options, lambda _: counts)
    except ValueError:
        # The most sparing one, though by the plan it doesn't fit: the plan is an estimate.
        settings = options[-1]
        gb = plan.estimate(config, wanted, settings, counts)["peak"]
        ranks.say(
            f"this takes about {gb:.0f} of {least:.0f} GB a rank: memory may run out "
            "(plan.py says of what)"
        )
    return settings


def is_due(step: int, every: int, last: int) -> bool:
    """Return whether something is done after that step: each so many steps (0: never), and last."""
    return step == last or (every > 0 and step % every == 0)


# ---- The log


class Log:
    """metrics.jsonl, a printed line a step, and a bar with the time left. Rank 0 writes.

    columns: name -> format of what the line shows. A value that was not measured is None, and null
    in the row. tracker: is begun, and gets the rows, too.
    """

    def __init__(
        self, cfg, done: int, columns: dict[str, str], tracker: track.Tracker | None = None
    ):
        self.columns = columns
        self.tracker = tracker or track.Tracker("none")
        self.steps = cfg.steps
        self.steps_before = done
        self.started = time.monotonic()
        hidden = None if ranks.is_first() else True  # None: where there is no terminal
        self.bar = tqdm(total=cfg.steps, initial=done, unit="step", disable=hidden)
        self.rows = folder.Rows(Path(cfg.out) / "metrics.jsonl", done)
        self.tracker.start(cfg)

    def __call__(self, row: dict) -> None:
        """Append the row of one step. Collective.

        JSON has no NaN: what is not finite is null, and said.
        """
        self.bar.update()
        # A NaN may be the most telling value of a run, and JSON has none.
        not_finite = {}
        for name, value in row.items():
            if isinstance(value, float) and not math.isfinite(value):
                not_finite[name] = value
        written = row | dict.fromkeys(not_finite)
        self.rows.append([written])
        self.tracker.log(written)
        if not_finite:
            values = ", ".join(f"{name} is {value}" for name, value in not_finite.items())
            ranks.say(f"step {row['step']}: {values}; null in metrics.jsonl")
        ranks.say("  ".join(self.shown(row, name) for name in self.columns))

    def shown(self, row: dict, name: str) -> str:
        """Return what the line says of a column; without a bar of the step the total and ETA."""
        value = row[name]
        if value is None:
            return f"{name} {'-':>6}"
        text = f"{name} {value:{self.columns[name]}}"
        if name == "step" and self.bar.disable:
            # No terminal, no bar. The clock runs on while a run validates and saves.
            seconds = (time.monotonic() - self.started) / (value - self.steps_before)
            left = timedelta(seconds=round(seconds * (self.steps - value)))
            text += f"/{self.steps}  eta {left}"
        return text


def peak_memory(device: torch.device) -> float | None:
    """Return MiB: of the GPU on CUDA, else of the process; None where nobody counts them."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = machine.peak_memory()
    return None if peak is None else peak / 2**20
