"""AdamW for parameters of any dtype, sharded or not, Muon for a model from scratch, and the schedules.

fp32 parameters are updated in place. Others (bf16) are the rounded image of an fp32 master kept here: at a
learning rate of 1e-6 an update is far below bf16's spacing, and would vanish if added to the weight itself.
With `rounding` there is no master: weights and moments stay bf16, and what lies between two bf16 numbers goes
up or down at random, right on average,

    round(x) = x + u, cut to bf16,    u uniform in [0, one bf16 step): a hash of (seed, update, name, element)

`element` counts in the full tensor, so that replicas stay equal and cuts don't matter: rank-local noise
drifts replicas apart. The second moment's noise is a few per cent of the step size at beta2 = 0.999.

A parameter without a gradient counts as one whose gradient is zero: the update doesn't depend on which rank
happened to see an image or a region, and one counter serves all. Gradients become fp32 a bucket at a time,
and each is freed as soon as it is used.

State is {kind: {full parameter name: full tensor}}: it is stored as safetensors and resumes on any number
of ranks. Bytes a parameter, split over the ranks: fp32 4 + 4 (gradient) + 8; bf16 2 + 2 + 8 + 4 (master);
bf16 with rounding 2 + 2 + 4."""

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.adamw import adamw

KINDS = ("master", "exp_avg", "exp_avg_sq")
BUCKET = 2**24  # elements that are summed over replicas, or updated, at a time
MIX = 0x7FEB352D, 0x846CA68B, 2**32 - 1  # multipliers of a 32-bit mixer with low bias; its mask


# Muon (Jordan et al., 2024) for the matrices of attention and MLP; everything else stays with AdamW.
BLOCK_MATRIX = re.compile(r"\.(layers|blocks)\.\d+\.")
MUON_MOMENTUM, MUON_RATE = 0.95, 0.3  # the rate is in units of lr * sqrt(longer side)


def orthogonal(matrix: Tensor) -> Tensor:
    """Nearest matrix with orthonormal rows or columns, roughly: five Newton-Schulz steps in fp32."""
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (2.0315 * square @ square - 4.7750 * square) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, as a plain tensor on the same storage."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def full(part: Tensor, like: Tensor) -> Tensor:
    """The whole tensor that `part` is this rank's part of, cut as the parameter `like` is. Collective."""
    if not isinstance(like, DTensor):
        return part
    mesh, cuts = like.device_mesh, like.placements
    return DTensor.from_local(part, mesh, cuts, shape=like.shape, stride=like.stride()).full_tensor()


def part_of(whole: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a whole tensor that every rank holds. No communication."""
    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None).to_local()


def sum_replicas(tensors: list[Tensor]) -> None:
    """Sums each tensor over the ranks in fp32 (or finer), in place, and to the same bits on all."""
    bucket, size = [], 0
    for i, tensor in enumerate(tensors):
        bucket, size = [*bucket, tensor], size + tensor.numel()
        if size >= BUCKET or i + 1 == len(tensors):
            flat = torch.cat([t.flatten().to(torch.promote_types(t.dtype, torch.float32)) for t in bucket])
            dist.all_reduce(flat)
            for t, part in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
                t.copy_(part.view_as(t))
            bucket, size = [], 0


def first_element(param: Tensor) -> int:
    """Where this rank's part (whole rows) begins in the flattened full tensor."""
    if not isinstance(param, DTensor):
        return 0
    rows = part_of(torch.arange(param.shape[0], device=param.device), param)
    return int(rows[0]) * (param.numel() // param.shape[0]) if len(rows) else 0


def noise(key: str, start: int, count: int, device) -> Tensor:
    """(count,) int64 with 32 random bits each: a hash of (key, start + i). All arithmetic modulo 2^32."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    stride, shift = (int.from_bytes(part, "little") for part in (digest[:4], digest[4:]))
    first, second, mask = MIX
    x = (torch.arange(start, start + count, device=device) * (stride | 1) + shift) & mask
    x = ((x ^ (x >> 16)) * first) & mask
    x = ((x ^ (x >> 15)) * second) & mask
    return x ^ (x >> 16)


def round_into(low: Tensor, wide: Tensor, bits: Tensor) -> None:
    """low (bf16) = wide (fp32), rounded up in magnitude with the probability of the part that is cut off."""
    raised = (wide.view(torch.int32) + (bits & 0xFFFF).int()) & -0x10000
    low.copy_(raised.view(torch.float32))


class AdamW:
    """The state of some named parameters. Only matrices (and larger) decay: not biases, not norms.

    vector_rate: the learning rate of biases and norms, in units of the matrices'."""

    def __init__(
        self, named: Iterable[tuple[str, Tensor]], weight_decay=0.0, betas=(0.9, 0.999), eps=1e-8, muon=False,
        rounding=False, seed=0, vector_rate=1.0,
    ):  # fmt: skip
        if muon and rounding:
            raise ValueError("Muon needs fp32 masters: --optimizer muon and --rounding exclude each other")
        self.params = {name: p for name, p in named if p.requires_grad}
        self.muon = [n for n, p in self.params.items() if muon and BLOCK_MATRIX.search(n) and p.ndim == 2]
        self.weight_decay, self.betas, self.eps, self.updates = weight_decay, betas, eps, 0
        self.seed, self.vector_rate = seed, vector_rate
        # fp32 parameters, and with rounding all, are their own masters.
        self.master = {n: local(p) if rounding else local(p).float() for n, p in self.params.items()}
        self.exp_avg = {name: torch.zeros_like(m) for name, m in self.master.items()}
        self.exp_avg_sq = {name: torch.zeros_like(m) for name, m in self.master.items()}
        self.starts = {n: first_element(p) for n, p in self.params.items() if self._rounded(n)}
        mesh = next((p.device_mesh for p in self.params.values() if isinstance(p, DTensor)), None)
        # Ranks that hold the same shard: all ranks without a mesh, the first axis of a mesh with two.
        self.copies = 1 if mesh is None or mesh.ndim == 1 else mesh.size(0)
        self.sharded, replicated = mesh is not None, dist.is_initialized() and mesh is None
        self.rank, self.replicas = (dist.get_rank(), dist.get_world_size()) if replicated else (0, 1)

    def _rounded(self, name: str) -> bool:
        return self.master[name].dtype != torch.float32

    def step(self, lr: float, clip_norm: float, loss: float, name: str) -> float:
        """Norm, finite check, clip, update; returns the norm before the clip.

        `loss` is the global one, so that all ranks stop together: a FloatingPointError that says `name`.
        """
        norm = self.norm()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise FloatingPointError(f"{name}: the loss is {loss}, the gradient norm {norm}")
        self.update(lr, min(1.0, clip_norm / (norm + 1e-6)))
        return norm

    @torch.no_grad()
    def norm(self) -> float:
        """Global norm of the gradients, equal on all ranks, not finite if any gradient isn't. A host sync.
        Replicas have the summed gradients then."""
        if self.replicas > 1:
            for p in self.params.values():
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            sum_replicas([p.grad for p in self.params.values()])
        grads = [local(p.grad) for p in self.params.values() if p.grad is not None]
        norms = torch._foreach_norm(grads, 2, torch.float32) if grads else [torch.zeros(())]
        square = torch.stack(norms).double().square().sum()
        if self.sharded:
            dist.all_reduce(square)
        return math.sqrt(square.item() / self.copies)

    @torch.no_grad()
    def update(self, lr: float, shrink: float = 1.0) -> None:
        """One step with the gradients of `norm()` times `shrink`. Frees the gradients."""
        for decays in (True, False):
            names = [n for n, p in self.params.items() if (p.ndim >= 2) == decays and self.master[n].numel()]
            for bucket in self._buckets([n for n in names if n not in self.muon]):
                rate = lr if decays else lr * self.vector_rate
                self._adamw(bucket, rate, self.weight_decay if decays else 0.0, shrink)
        self._muon(lr, shrink)
        self.updates += 1
        for name, p in self.params.items():
            p.grad = None
            if p.dtype != self.master[name].dtype:
                local(p).copy_(self.master[name])

    def _buckets(self, names: list[str]) -> Iterator[list[tuple[str, slice]]]:
        """Pieces (name, elements) of the flattened tensors, in lists of at most BUCKET elements."""
        bucket, size = [], 0
        for name in names:
            whole = self.master[name].numel()
            for start in range(0, whole, BUCKET):
                piece = slice(start, min(start + BUCKET, whole))
                if bucket and size + piece.stop - start > BUCKET:
                    yield bucket
                    bucket, size = [], 0
                bucket, size = [*bucket, (name, piece)], size + piece.stop - start
        if bucket:
            yield bucket

    def _grad(self, name: str) -> Tensor:
        """The flattened gradient of this rank's part; zeros where there is none."""
        grad = self.params[name].grad
        return torch.zeros_like(self.master[name]).flatten() if grad is None else local(grad).flatten()

    def _adamw(self, bucket: list[tuple[str, slice]], lr: float, weight_decay: float, shrink: float) -> None:
        kept = [[table[name].view(-1)[piece] for name, piece in bucket]
                for table in (self.master, self.exp_avg, self.exp_avg_sq)]  # fmt: skip
        grads = [self._grad(name)[piece].float() for name, piece in bucket]
        if shrink < 1:
            torch._foreach_mul_(grads, shrink)
        wide = [[part.float() for part in parts] for parts in kept]  # fp32: the same tensors
        steps = torch.full((len(bucket),), float(self.updates), device=grads[0].device).unbind()
        adamw(
            wide[0], grads, wide[1], wide[2], [], list(steps), fused=True,  # adamw adds the one to the steps
            beta1=self.betas[0], beta2=self.betas[1], eps=self.eps, lr=lr, weight_decay=weight_decay,
            amsgrad=False, maximize=False,
        )  # fmt: skip
        for i, (name, piece) in enumerate(bucket):
            if self._rounded(name):
                self._round(name, piece, [parts[i] for parts in kept], [parts[i] for parts in wide])
            if piece.stop == self.master[name].numel():
                self.params[name].grad = None

    def _round(self, name: str, piece: slice, kept: list[Tensor], wide: list[Tensor]) -> None:
        start, count = self.starts[name] + piece.start, piece.stop - piece.start
        both, more = (noise(f"{self.seed} {self.updates} {name} {i}", start, count, kept[0].device)
                      for i in range(2))  # fmt: skip
        for low, high, bits in zip(kept, wide, (both, both >> 16, more), strict=True):
            round_into(low, high, bits)

    def _muon(self, lr: float, shrink: float) -> None:
        """Nesterov momentum, made orthogonal: all directions of a matrix move alike, not just the loud.

        Replicas deal the matrices among themselves, and add up what each has done."""
        moves = {}
        for i, name in enumerate(self.muon):
            average = self.exp_avg[name]
            grad = self._grad(name).view_as(average).float() * shrink
            average.lerp_(grad, 1 - MUON_MOMENTUM)
            if i % self.replicas == self.rank:
                moves[name] = orthogonal(full(grad.lerp_(average, MUON_MOMENTUM), self.params[name]))
            else:
                moves[name] = grad.zero_()
        if self.replicas > 1:
            sum_replicas(list(moves.values()))
        for name, whole in moves.items():
            self.master[name].mul_(1 - lr * self.weight_decay)
            size = MUON_RATE * max(whole.shape) ** 0.5
            self.master[name].add_(part_of(whole, self.params[name]), alpha=-lr * size)

    def state(self, kind: str) -> Iterator[tuple[str, Tensor]]:
        """(name, full tensor) of each parameter. Collective: every rank must walk all of it."""
        return ((name, full(getattr(self, kind)[name], p)) for name, p in self.params.items())

    @torch.no_grad()
    def load(self, read: Callable[[str, str], Tensor], updates: int) -> None:
        """Restores state and parameters (from their masters). read(kind, name) gives the full tensor."""
        self.updates = updates
        for name, p in self.params.items():
            for kind in KINDS:
                part = getattr(self, kind)[name]
                part.copy_(part_of(read(kind, name).to(part.device), p))
            local(p).copy_(self.master[name])


# Learning rate as a fraction of its peak; `done` in [0, 1) is the share of the steps after the warm-up.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "linear": lambda done: min(1.0, (1 - done) / 0.45),  # flat, then down over the last 45 %
}


def learning_rate(step: int, steps: int, peak: float, warmup: int, schedule: str) -> float:
    """The rate of step `step` (from 0) of `steps`: up over `warmup` steps, then the schedule. Never 0."""
    done = max(0, step - warmup) / max(1, steps - warmup)
    return peak * min((step + 1) / (warmup + 1), SCHEDULES[schedule](done))
