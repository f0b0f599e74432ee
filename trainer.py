"""What train_sft.py and train_rl.py share: command line, ranks, sharding, data order, checkpoints,
log.

Nothing here knows a loss. In the order of a run:

    launch         flags -> Config -> main; what a user can mend ends in one line, not in a traceback
    begin          the run's directory, and the checkpoint that --resume starts from
    setup          torchrun's environment -> rank, world, device (a plain `python` run needs none)
    load, settle   checkpoint -> QwenVL; what --shard and --checkpointing auto come to (plan.py)
    load_policy    FSDP2 where one rank can't hold it, and the whole copy for rollouts
    Reference      the policy that the run began with, without a second model
    Order          which rows a step takes: a pure function of (seed, position), whatever the number of ranks
    save, restore  step-000123/: a checkpoint, plus trainer/ with all that the run needs to go on to the bit
    Log            metrics.jsonl, one printed line a step, progress bar

Several ranks give the numbers of one: losses are divided by global counts, gradients summed, not
averaged. All ranks run the same passes over the same parameters (`even`, `pad`): to skip a
collective is to hang them all."""

import contextlib
import hashlib
import json
import math
import os
import random
import resource
import shutil
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import tyro
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from tqdm import tqdm

import data
import plan
from errors import UserError
from model import checkpoint as huggingface
from model import lora
from model.lora import TRAIN  # noqa: F401  what --train means
from model.processor import Processor
from model.qwen_vl import QwenVL
from optim import KINDS, Optimizer, whole
from srreal import Example

RANK = int(os.environ.get("RANK", 0))
FIRST = RANK == 0  # the rank that prints and writes
TIMEOUT = float(os.environ.get("RANK_TIMEOUT", 1800))  # seconds that a rank waits for the others
PHASE = ["start", 0.0]  # what this rank is doing, and since when
MEMORY = ("micro_tokens", "slots", "max_pixels")  # flags that bound it
# Of a collective that took too long, or whose other end is gone.
HUNG = ("imed out", "imeout", "Connection closed by peer", "Connection reset by peer")


class Stop(UserError):
    """Ends the run with one line for the user, who has to change something."""


def launch(main: Callable, config: type) -> None:
    """Runs main(Config) from the command line. The one handler for errors that a user can mend."""
    name = Path(sys.argv[0]).name
    cfg = tyro.cli(
        config, prog=name, description=sys.modules[main.__module__].__doc__.split("\n\n")[0]
    )
    try:
        main(cfg)
    except data.BadRows as bad:
        end(f"{name}: {bad}\n(--skip-bad-rows goes on without them)", 2)
    except UserError as stop:
        end(f"{name}: {stop}", 2)
    except KeyboardInterrupt:
        tail = (
            f"; --resume goes on from the newest checkpoint in {cfg.out}"
            if "resume" in vars(cfg)
            else ""
        )
        end(f"{name}: interrupted{tail}", 130)
    except FloatingPointError as error:
        kept = newest(Path(cfg.out), named=False)
        kept = (
            f"{kept} is whole, and --resume goes on from it"
            if kept
            else "no checkpoint was saved before"
        )
        end(f"{name}: {error}; nothing was updated; {kept} (with a lower --lr?)", 1)
    except (RuntimeError, MemoryError) as error:
        if any(word in str(error) for word in HUNG):
            end(f"{name}: rank {RANK}, {PHASE[0]}: the other ranks did not answer ({error})", 1)
        cuda, host = isinstance(error, torch.OutOfMemoryError), isinstance(error, MemoryError)
        if not (cuda or host or "can't allocate memory" in str(error)):
            raise
        flags = [f"--{k.replace('_', '-')} (now {v})" for k, v in vars(cfg).items() if k in MEMORY]
        end(f"{name}: out of memory; turn down {' or '.join(flags)}", 1)
    if dist.is_initialized():
        dist.destroy_process_group()


def end(message: str, code: int) -> None:
    """At once: other ranks and background threads may hang in what this rank will not take part
    in."""
    if code == 2 and not FIRST:
        # where all stop, rank 0 has said it by then, and torchrun has ended the others
        time.sleep(5)
    if FIRST or code != 130:
        print(message, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code)


def mendable(call: Callable, *args, **options):
    """call(...), with its complaint about a file, a checkpoint or a source of data as the run's
    last line."""
    try:
        return call(*args, **options)
    except data.BadRows:
        raise
    except (ValueError, OSError) as error:
        raise Stop(str(error)) from error


def say(text: str) -> None:
    """A line of one rank, above the progress bars."""
    if FIRST:
        tqdm.write(text)
        sys.stdout.flush()


# ---- Ranks and model


def setup() -> tuple[int, int, torch.device]:
    """(rank, world, device). gloo on CPU, NCCL on CUDA; host tensors always travel by gloo."""
    # cuDNN's attention, which sm_90 prefers, plans for every new shape: tenths of a second each,
    # and packed batches have a new shape each time.
    torch.backends.cuda.enable_cudnn_sdp(False)
    names, cuda = (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)), torch.cuda.is_available()
    rank, world, own = (int(os.environ.get(name, default)) for name, default in names)
    if cuda:
        torch.cuda.set_device(own)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(seconds=TIMEOUT)
        )
        threading.Thread(target=watch, daemon=True).start()
    return rank, world, torch.device("cuda", own) if cuda else torch.device("cpu")


def ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def phase(name: str) -> None:
    """What comes now: the words of a rank that waits for the others in vain."""
    PHASE[:] = name, time.monotonic()


def watch() -> None:
    """Says once where this rank is when a phase takes nearly as long as a collective may. gloo's
    own timeout ends in an exception and `launch`; NCCL's watchdog ends the process, and knows no
    phase."""
    said = None
    while True:
        time.sleep(min(10.0, TIMEOUT / 10))
        name, since = PHASE
        if since and name != said and time.monotonic() - since > 0.8 * TIMEOUT:
            said = name
            text = f"rank {RANK} has been at {name!r} for {time.monotonic() - since:.0f} s"
            print(text, file=sys.stderr, flush=True)


def reduce(values: list[float], op: str = "SUM") -> list[float]:
    """The SUM (or MAX) of each value over the ranks."""
    if not dist.is_initialized():
        return values
    tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(tensor, getattr(dist.ReduceOp, op))
    return tensor.tolist()


def deal(weights: list[float], rank: int, world: int) -> list[int]:
    """This rank's rows, in their order: the heaviest left goes to whoever has least, so that ranks
    finish together. Every rank computes the same."""
    loads, own = [0.0] * world, []
    for i in sorted(range(len(weights)), key=lambda i: -weights[i]):
        least = loads.index(min(loads))
        loads[least] += weights[i]
        own += [i] * (least == rank)
    return sorted(own)


def evenly(weights: list[float], rank: int, world: int) -> slice:
    """This rank's share of consecutive rows: of about equal weight, so that nobody waits for the
    others."""
    middles = np.cumsum(weights) - np.array(weights) / 2
    edges = np.searchsorted(middles, sum(weights) * np.arange(world + 1) / world)
    return slice(*edges[rank : rank + 2].tolist())


def compute_dtype(device: torch.device) -> torch.dtype:
    """What forward and backward compute in: bf16 on CUDA, fp32 on a CPU. Masters are fp32
    (optim.py)."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def load(source: str, device: torch.device, train: str | None = None, rank: int = 0) -> QwenVL:
    """A whole model on the device, in its compute dtype. train None: nothing learns; rank: of the
    adapters, 0 for none."""
    model = mendable(QwenVL.from_pretrained, source, device, compute_dtype(device))
    mendable(lora.learn, model, train, rank)
    return model


def load_processor(source: str, cfg) -> Processor:
    """--workers None: on CUDA a rank's share of the cores but one, at most 8; on a CPU, which
    computes, 0."""
    workers = cfg.workers
    if workers is None:
        near = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        cores = len(os.sched_getaffinity(0)) // near if torch.cuda.is_available() else 1
        workers = min(max(cores - 1, 0), 8)
    options = dict(max_pixels=cfg.max_pixels, regions=cfg.regions, workers=workers)
    return mendable(Processor.from_pretrained, source, **options)


def settle(cfg, config, device: torch.device, world: int, **sizes) -> plan.Settings:
    """What --shard and --checkpointing come to: where auto, what `plan.py` chooses for this rank's
    memory; with the slots of a rollout, and whether their cache may stay during the update. Nothing
    is loaded yet.

    config: of the checkpoint (transformers'); sizes: prompts, group, new_tokens, kl of the plan.
    """
    phase("loading and sharding")
    near = int(os.environ.get("LOCAL_WORLD_SIZE", world))  # ranks of this box
    sizes["prompts"] = -(-sizes["prompts"] * near // world)
    cuda = device.type == "cuda"
    host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / near
    memory = (torch.cuda.mem_get_info(device)[1] if cuda else host) / 1e9
    memory = -reduce([-memory], "MAX")[0]  # the least: all ranks have to choose alike
    wanted = plan.Config(
        "", near, memory, train=cfg.train, lora=cfg.lora, dtype="bf16" if cuda else "fp32", **sizes
    )
    choices = {"auto": (False, True), "always": (True,), "never": (False,)}
    options = []
    for sharded in choices[cfg.shard] if world > 1 else (False,):
        for checkpointing in choices[cfg.checkpointing]:
            options.append(plan.Settings(sharded, checkpointing, cfg.lora, cfg.micro_tokens))
    counts = mendable(plan.count, config, cfg.train, cfg.lora)
    try:
        settings, _ = plan.choose(config, wanted, options, lambda _: counts)
    except ValueError:
        settings = options[-1]
        gb = plan.estimate(config, wanted, settings, counts)["peak"]
        say(
            f"this takes about {gb:.0f} of {memory:.0f} GB a rank: memory may run out (plan.py says of what)"
        )
    return settings


@dataclass
class Policy:
    """The model that trains, and the whole model that samples and takes log-probs without
    gradients.

    They are one object where training is not sharded. Where it is, `model` has fp32 shards (FSDP2
    casts them to the compute dtype as it gathers a layer), and `rollout_model` is a whole copy in
    the compute dtype whose addresses never change, since CUDA graphs read it: `Optimizer.publish`
    keeps it up to date. None: nothing samples (SFT).
    """

    model: QwenVL
    rollout_model: QwenVL | None

    @property
    def images(self) -> dict[str, torch.Tensor] | None:
        """What `Optimizer` rounds the masters to: name -> weight. None: the parameters
        themselves."""
        if self.rollout_model is self.model:
            return None
        return dict(self.rollout_model.named_parameters()) if self.rollout_model else {}


def load_policy(
    source: str, cfg, device: torch.device, world: int, settings: plan.Settings, samples: bool
) -> Policy:
    """Load what trains, sharded where the settings say so, and what samples. Never two whole models
    on a GPU, but for the sampling copy."""
    if settings.shard:
        rollout_model = load(source, device, cfg.train, cfg.lora) if samples else None
        # in place of a copy: the checkpoint's own pages, read as they are sharded
        host = torch.device("cpu")
        model = mendable(QwenVL.from_pretrained, source, host, compute_dtype(device), fuse=False)
        mendable(lora.learn, model, cfg.train, cfg.lora)
        shard(model, device, world, compute_dtype(device), rollout_model)
    else:
        model = rollout_model = load(source, device, cfg.train, cfg.lora)
    if settings.checkpointing:
        model.checkpoint_blocks()
    return Policy(model, rollout_model)


def shard(
    model: QwenVL,
    device: torch.device,
    world: int,
    compute: torch.dtype,
    rollout_model: QwenVL | None = None,
) -> None:
    """Cut what learns over the ranks, layer by layer (FSDP2), from the host to the device, as fp32
    (or finer).

    Each block goes to the device whole, is cut there, and only its shard stays. Gradients are
    reduced in fp32 behind each pass: to wait would keep 4 bytes a parameter on every rank. Beyond
    one box the shards of one are replicated on the others. What is frozen stays whole on each rank
    and in the compute dtype, shared with the rollout model where there is one; so a rank without
    images may skip a frozen tower.
    """
    whole_weights = dict(rollout_model.named_parameters()) if rollout_model else {}
    frozen = set()
    for name, p in list(model.named_parameters()):
        if not p.requires_grad:
            place_frozen(model, name, whole_weights.get(name), device)
            frozen.add(model.get_parameter(name))

    near = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    sizes = (world,) if near == world else (world // near, near)
    mesh = init_device_mesh(device.type, sizes, mesh_dim_names=("boxes", "shard")[-len(sizes) :])
    master = torch.promote_types(compute, torch.float32)
    # cast_forward_inputs would round the vision tower's fp32 angles.
    precision = MixedPrecisionPolicy(compute, reduce_dtype=master, cast_forward_inputs=False)
    for block in [*model.decoder.layers, *model.vision.blocks, model]:
        learning = [p for p in block.parameters() if p.requires_grad]
        if not learning:
            continue
        for p in learning:
            if not isinstance(p, DTensor):
                p.data = p.data.to(device, master)
        fully_shard(block, mesh=mesh, ignored_params=frozen, mp_policy=precision)
        block.set_gradient_divide_factor(1.0)  # the loss is divided by global counts already
        block.set_force_sum_reduction_for_comms(True)  # gloo can't scale while it sums


def place_frozen(
    model: QwenVL, name: str, shared: torch.Tensor | None, device: torch.device
) -> None:
    """Put a frozen parameter on the device, or take the rollout model's in its place."""
    owner, _, leaf = name.rpartition(".")
    current = model.get_parameter(name)
    weight = current.data.to(device) if shared is None else shared.data
    setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(weight, requires_grad=False))


def reshard(model: QwenVL) -> None:
    """A forward without a backward leaves FSDP's root whole."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


class Reference:
    """The policy that the run began with: inside of `with reference:` the rollout model is that
    policy.

    It takes no second model: what learns changes places with what it was. Adapters are switched
    off, which takes nothing. Of the rest a rank keeps what it began with in the compute dtype:
    alone, on the host in one pinned buffer; several ranks deal the weights among themselves, and
    send them round. On the way back the weights are rounded from their masters again
    (Optimizer.publish); only what is its own master has to be kept meanwhile. Made before
    `restore`. Collective.
    """

    def __init__(self, model: QwenVL, optimizer: Optimizer):
        self.model, self.optimizer = model, optimizer
        adapted = (".lora_a", ".lora_b")
        self.weights = [w for name, w in optimizer.images.items() if not name.endswith(adapted)]
        self.world = ranks()
        mine = (
            range(len(self.weights))
            if self.world == 1
            else range(RANK, len(self.weights), self.world)
        )
        self.kept = keep_aside([self.weights[i] for i in mine], on_host=self.world == 1)
        self.kept = dict(zip(mine, self.kept, strict=True))
        masters = {id(master) for master in optimizer.masters.values()}
        self.own_masters = [w for w in self.weights if id(w) in masters]
        self.current: list[torch.Tensor] = []
        self.adapters_off = contextlib.ExitStack()

    @torch.no_grad()
    def __enter__(self) -> None:
        self.adapters_off.enter_context(lora.off(self.model))
        self.current = [w.clone() for w in self.own_masters]
        for i, weight in enumerate(self.weights):
            if i in self.kept:
                weight.copy_(self.kept[i], non_blocking=True)
            if self.world > 1:
                dist.broadcast(weight.detach(), i % self.world)

    @torch.no_grad()
    def __exit__(self, *_) -> None:
        for weight, current in zip(self.own_masters, self.current, strict=True):
            weight.copy_(current)
        self.current = []
        if self.weights:
            self.optimizer.publish()
        self.adapters_off.close()


def keep_aside(weights: list[torch.Tensor], on_host: bool) -> list[torch.Tensor]:
    """Copies of the weights, as views of one buffer: on their device, or on the host, pinned for
    CUDA (whose allocator of pinned memory rounds up to a power of two)."""
    if not weights:
        return []
    sizes = [w.numel() for w in weights]
    like = weights[0]
    if on_host:
        buffer = torch.empty(sum(sizes), dtype=like.dtype, pin_memory=like.is_cuda)
    else:
        buffer = torch.empty(sum(sizes), dtype=like.dtype, device=like.device)
    copies = [part.view(w.shape) for part, w in zip(buffer.split(sizes), weights, strict=True)]
    for copy, w in zip(copies, weights, strict=True):
        copy.copy_(w.detach())
    return copies


def passes(model: QwenVL, batches: list) -> Iterator:
    """Each of the batches; beyond one box, gradients go from box to box behind the last of them
    alone."""
    for i, batch in enumerate(batches, 1):
        if isinstance(model, FSDPModule):
            model.set_requires_all_reduce(i == len(batches))
        yield batch


# ---- Data


def load_data(cfg, more=None) -> tuple[list[Example], list[Example]]:
    """The examples of --data and of --eval-data; the bad rows of both in one list. more: as of
    data.load."""
    sets, bad = [], []
    for sources in (cfg.data, cfg.eval_data):
        try:
            sets.append(mendable(data.load, sources, cfg.skip_bad_rows, more) if sources else [])
        except data.BadRows as error:
            bad += error.rows
    if bad:
        raise data.BadRows(list(dict.fromkeys(bad)))
    if not sets[0]:
        raise Stop("no row is left to train on: see what --data takes")
    return tuple(sets)


class Order:
    """An endless shuffled order of rows. Epoch e is drawn from (seed, e), so a place is one number.

    Rows of one key (the questions of one image) come in runs of at most `run`, to share the image's
    encoding; each row once an epoch. Unique keys give a plain shuffle.
    """

    def __init__(self, keys: Iterable, seed, run: int = 1):
        groups: dict = {}
        for row, key in enumerate(keys):
            groups.setdefault(key, []).append(row)
        self.groups, self.seed, self.run, self.epochs = list(groups.values()), seed, run, {}
        self.count = sum(map(len, self.groups))

    def epoch(self, number: int) -> list[int]:
        if number not in self.epochs:
            rng, runs = random.Random(f"{self.seed} {number}"), []
            for rows in self.groups:
                rows = rng.sample(rows, len(rows))
                runs += [rows[i : i + self.run] for i in range(0, len(rows), self.run)]
            rng.shuffle(runs)
            # a batch may straddle two
            kept = {k: v for k, v in self.epochs.items() if k == number - 1}
            self.epochs = kept | {number: [row for run in runs for row in run]}
        return self.epochs[number]

    def rows(self, start: int, count: int) -> list[int]:
        """Rows [start, start + count) of the endless order."""
        return [self.epoch(i // self.count)[i % self.count] for i in range(start, start + count)]


def images_key(example: Example) -> tuple:
    return tuple(
        str(image) if isinstance(image, (str, Path)) else id(image) for image in example.images
    )


def fingerprint(examples: list[Example]) -> str:
    """What a checkpoint keeps of the data set, to refuse to resume on another."""
    text = "\n".join(f"{example.id} {example.path}" for example in examples)
    return f"{len(examples)} rows, sha256 {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def ahead(make: Callable, items: Iterable) -> Iterator:
    """make(item) of each; in a thread, while the caller is busy with the one before."""
    with ThreadPoolExecutor(1) as pool:
        coming = deque()
        for item in items:
            coming.append(pool.submit(make, item))
            if len(coming) > 1:
                yield coming.popleft().result()
        yield from (future.result() for future in coming)


def cut(lengths: list[int], budget: int, shared: list[int] | None = None) -> list[slice]:
    """Consecutive items in micro-batches of at most `budget` tokens (or of one item that alone is
    longer). shared: what an item has in common with the one before, and only needs as the first of
    a micro-batch."""
    starts, used = [], 0
    for i, length in enumerate(lengths):
        more = length - (shared[i] if shared else 0)
        if not starts or used + more > budget:
            starts, used, more = [*starts, i], 0, length
        used += more
    return (
        [slice(a, b) for a, b in zip(starts, [*starts[1:], len(lengths)], strict=True)]
        if starts
        else []
    )


def even(batches: list, spare: Callable) -> list:
    """The batches, and spare() for as long as another rank still has some: each pass is a
    collective."""
    longest = int(reduce([len(batches)], "MAX")[0])
    return [*batches, *(spare() for _ in range(longest - len(batches)))]


def filler() -> Example:
    """A tiny example that touches every parameter: image, depth, region. It gets no weight in any
    loss."""
    return Example(
        "filler",
        "direct",
        [Image.new("RGB", (64, 64))],
        "What is it <mask>?",
        "A",
        depths=[np.ones((64, 64), np.float32)],
        intrinsics=[(64, 64, 32, 32)],
        regions=[(0, (8, 8, 56, 56))],
    )


def pad(examples: list[Example], world: int) -> list[Example]:
    """Appends the filler where a pass might leave out parameters whose gradients other ranks
    reduce."""
    whole = any(
        e.images and e.regions and any(d is not None for d in e.depths or ()) for e in examples
    )
    return examples if world == 1 or whole else [*examples, filler()]


# ---- Checkpoints


def write_config(out: Path, config: dict) -> None:
    """config.json of the run, whole or not at all: --resume reads it."""
    aside = out / "config.json.partial"
    aside.write_text(json.dumps(config, indent=1, allow_nan=False) + "\n")
    aside.replace(out / "config.json")


def begin(cfg) -> tuple[Path | None, int]:
    """(checkpoint to go on from or None, steps done). Writes config.json; won't mix a new run with
    an old."""
    torch.manual_seed(cfg.seed)  # nothing here draws from it; a fork's dropout would
    out, old = Path(cfg.out), sorted(Path(cfg.out).glob("step-*[0-9]"))
    if old and not cfg.resume:
        raise Stop(
            f"{out} holds a run ({old[-1].name}) already: --resume it, or choose another --out"
        )
    found = newest(out) if cfg.resume else None
    done = record(found)["step"] if found else 0
    if reduce([done], "MAX") != [-least for least in reduce([-done], "MAX")]:
        raise Stop(
            f"{out}: the ranks find different checkpoints in it; --out has to be on a shared disk"
        )
    if cfg.resume:
        say(
            f"going on from {found}"
            if found
            else f"no whole checkpoint in {out}: starting at step 0"
        )
    if FIRST:
        out.mkdir(parents=True, exist_ok=True)
        config = {"script": Path(sys.argv[0]).stem, **asdict(cfg)}
        write_config(out, config)
    return found, done


def save(cfg, step: int, model: QwenVL, processor, optimizer: Optimizer, **same) -> None:
    """Writes out/step-000123 aside, then renames it. Rank 0 writes, but gathering is collective."""
    final = Path(cfg.out) / f"step-{step:06d}"
    aside = final.with_suffix(".partial")
    reshard(model)
    weights = {}
    for name, p in model.named_parameters():
        full = whole(p.detach().to(compute_dtype(p.device)))
        if FIRST:
            weights[name] = full.cpu()
    if FIRST:
        shutil.rmtree(aside, ignore_errors=True)
        (aside / "trainer").mkdir(parents=True)
        huggingface.write(aside, weights, model.origin, processor)
    del weights
    for kind in KINDS:
        state = {name: full.cpu() for name, full in optimizer.state(kind) if FIRST}
        if FIRST:
            save_file(state, aside / "trainer" / f"{kind}.safetensors")
    if FIRST:
        save_file({"torch": torch.get_rng_state()}, aside / "trainer" / "random.safetensors")
        files = {
            str(p.relative_to(aside)): p.stat().st_size for p in aside.rglob("*") if p.is_file()
        }
        state = {
            "step": step,
            "updates": optimizer.updates,
            "ranks": ranks(),
            "same": same,
            "files": files,
        }
        (aside / "trainer" / "state.json").write_text(json.dumps(state, indent=1, allow_nan=False))
        huggingface.replace(aside, final)
        for old in sorted(Path(cfg.out).glob("step-*[0-9]"))[: -cfg.keep] if cfg.keep else ():
            shutil.rmtree(old / "trainer", ignore_errors=True)
    reduce([0.0])  # nobody goes on before it is there


def restore(checkpoint: Path | None, optimizer: Optimizer, **same) -> None:
    """Optimiser, masters, random states. `same` must equal what `save` was given (the data's
    fingerprint)."""
    if checkpoint is None:
        return
    state, folder = record(checkpoint), checkpoint / "trainer"
    for key, now in same.items():
        if (then := state["same"].get(key, now)) != now:
            raise Stop(f"{checkpoint}: the run had {key} {then}, now it is {now}")
    if (then := state.get("ranks", ranks())) != ranks():
        say(f"going on with {ranks()} ranks after {then}: the same run, but not to the bit")
    try:
        paths = {kind: folder / f"{kind}.safetensors" for kind in KINDS}
        files = {kind: safe_open(path, "pt") for kind, path in paths.items()}
        optimizer.load(lambda kind, name: files[kind].get_tensor(name), state["updates"])
        torch.set_rng_state(safe_open(folder / "random.safetensors", "pt").get_tensor("torch"))
    except SafetensorError as error:
        raise Stop(f"{folder}: {error}") from error


def record(checkpoint: Path) -> dict:
    return json.loads((checkpoint / "trainer" / "state.json").read_text())


def missing(checkpoint: Path) -> str | None:
    """What a checkpoint lacks to resume from, or None: its files and their sizes are on record in
    it."""
    try:
        files = record(checkpoint)["files"].items()
        return next(
            (name for name, size in files if (checkpoint / name).stat().st_size != size), None
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        return getattr(error, "filename", None) or "trainer/state.json"


def newest(out: Path, named: bool = True) -> Path | None:
    """The newest whole checkpoint of a run."""
    for step in sorted(out.glob("step-*"), key=lambda path: path.name, reverse=True):
        if not (lack := missing(step)) and not step.suffix:
            return step
        if named:
            say(f"skipping the incomplete checkpoint {step}: {lack or 'never renamed'}")
    return None


# ---- Log


class Log:
    """metrics.jsonl, a printed line a step, and a bar with the time left on a terminal. Rank 0
    only."""

    def __init__(self, cfg, done: int, columns: dict[str, str]):
        self.columns = columns
        self.bar = tqdm(total=cfg.steps, initial=done, unit="step", disable=None if FIRST else True)
        # row k is step k: on resuming, what is behind the checkpoint's goes, a torn line
        # too
        if FIRST:
            path, aside = Path(cfg.out) / "metrics.jsonl", Path(cfg.out) / "metrics.partial"
            aside.write_text(
                "".join(path.read_text().splitlines(keepends=True)[:done] if done else [])
            )
            os.replace(aside, path)
            self.file = path.open("a")

    def __call__(self, row: dict) -> None:
        self.bar.update()
        if FIRST:
            # JSON has no NaN, and a metric beside a finite loss is no reason to stop.
            odd = {k: v for k, v in row.items() if isinstance(v, float) and not math.isfinite(v)}
            self.file.write(json.dumps(row | dict.fromkeys(odd), allow_nan=False) + "\n")
            self.file.flush()
            if odd:
                values = ", ".join(f"{name} is {value}" for name, value in odd.items())
                say(f"step {row['step']}: {values}; null in metrics.jsonl")
            say("  ".join(f"{name} {row[name]:{form}}" for name, form in self.columns.items()))


def peak_memory(device: torch.device) -> float:
    """MiB: of the GPU on CUDA, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
