"""The process group of a run: its ranks, their sums, and their shares of the work.

A plain `python` run has one rank and needs no group. Under torchrun each rank has one GPU, or one
process of a CPU. Host tensors travel by gloo, device tensors by NCCL.
"""

import os
import sys
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from errors import UserError

# Words of a collective that took too long, or whose other end is gone.
HUNG = ("imed out", "imeout", "Connection closed by peer", "Connection reset by peer")


class Ranks(NamedTuple):
    rank: int
    world: int
    device: torch.device


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def is_first() -> bool:
    """Whether this rank prints and writes."""
    return rank() == 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def local_world_size(world: int) -> int:
    """Return how many of the `world` ranks this box has."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world))


def timeout() -> float:
    """Return the seconds that a rank waits for the others."""
    return float(os.environ.get("RANK_TIMEOUT", 1800))


def start_ranks() -> Ranks:
    """Join torchrun's process group, if there is one, and take this rank's device."""
    # cuDNN's attention, which sm_90 prefers, plans for every new shape: tenths of a second each,
    # and packed batches have a new shape each time.
    torch.backends.cuda.enable_cudnn_sdp(False)
    world = int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local_rank)
    if world > 1 and not dist.is_initialized():
        # Counts and sums live on the host, so they travel by gloo, and no GPU is kept waiting for
        # them.
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout()))
        threading.Thread(target=watch, daemon=True).start()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    return Ranks(rank(), world, device)


# ---- What this rank is doing


def phase(name: str) -> None:
    """Say what comes now: it is what a rank that waits for the others in vain will name.

    The name is the main thread's, which debuggers show, too.
    """
    threading.main_thread().name = name


def current_phase() -> str:
    return threading.main_thread().name


def watch() -> None:
    """Say once where this rank is when a phase takes nearly as long as a collective may.

    gloo's own timeout ends in an exception; NCCL's watchdog ends the process, and knows no phase.
    """
    seen = ""
    said = ""
    since = time.monotonic()
    while True:
        time.sleep(min(10.0, timeout() / 10))
        name = current_phase()
        if name != seen:
            seen = name
            since = time.monotonic()
        seconds = time.monotonic() - since
        if name != said and seconds > 0.7 * timeout():
            said = name
            text = f"rank {rank()} has been at {name!r} for {seconds:.0f} s"
            print(text, file=sys.stderr, flush=True)


def say(text: str) -> None:
    """Print a line on the first rank alone, above the progress bars."""
    if is_first():
        tqdm.write(text)
        sys.stdout.flush()


def did_not_answer(error: BaseException) -> bool:
    """Return whether a collective failed because of the other ranks."""
    text = str(error)
    return any(word in text for word in HUNG)


# ---- Sums and shares


def all_reduce(values: Sequence[float], op: str = "SUM") -> list[float]:
    """Return the SUM, MAX or MIN of each value over the ranks, in fp64. Collective."""
    if not dist.is_initialized():
        return list(values)
    # fp64: counts of tokens stay exact far beyond 2^24.
    tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(tensor, getattr(dist.ReduceOp, op))
    return tensor.tolist()


def broadcast(value, rank: int = 0):
    """Return that rank's value on every rank. Collective."""
    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box, rank)
    return box[0]


def gather(rows: list) -> list:
    """Return all ranks' rows, in their order, on rank 0, and [] on the others. Collective."""
    if not dist.is_initialized():
        return rows
    parts = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(rows, parts)
    return sum(parts or [], [])


def raise_together(problem: str | None) -> None:
    """Raise UserError on all ranks where any has a problem, so that nobody waits. Collective.

    A rank that alone reads or writes a file says what went wrong here, behind its work.
    """
    # The highest rank with a problem speaks; one sentence is enough.
    (last,) = all_reduce([rank() + 1 if problem else 0], "MAX")
    if last:
        raise UserError(broadcast(problem, int(last) - 1))


def shard_by_length(lengths: Sequence[float], rank: int, world: int) -> list[int]:
    """Return this rank's indices, in their order, so that all ranks have about equal length.

    The longest left goes to whoever has least. Every rank computes the same.
    """
    loads = [0.0] * world
    mine = []
    # Greedy: within a third of the best possible share, and here far nearer, as rows are many.
    longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for i in longest_first:
        least_loaded = loads.index(min(loads))
        loads[least_loaded] += lengths[i]
        if least_loaded == rank:
            mine.append(i)
    return sorted(mine)


def shard_contiguous(lengths: Sequence[float], rank: int, world: int) -> slice:
    """Return this rank's share of consecutive rows, of about equal length for all ranks."""
    # A row belongs to the rank in whose stretch its middle lies.
    middles = np.cumsum(lengths) - np.array(lengths) / 2
    edges = np.searchsorted(middles, sum(lengths) * np.arange(world + 1) / world)
    return slice(int(edges[rank]), int(edges[rank + 1]))
