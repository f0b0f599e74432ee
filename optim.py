"""AdamW for parameters of any dtype, sharded or not, Muon for a model from scratch, and the schedules.

fp32 parameters are updated in place. Others (bf16) are the rounded image of an fp32 master kept here: at a
learning rate of 1e-6 an update is far below bf16's spacing, and would vanish if added to the weight itself.

A parameter without a gradient counts as one whose gradient is zero: the update doesn't depend on which rank
happened to see an image or a region, and one counter serves all.

State is {kind: {full parameter name: full tensor}}: it is stored as safetensors and resumes on any number
of ranks. Bytes a parameter, split over the ranks: fp32 4 + 4 (gradient) + 8; bf16 2 + 2 + 8 + 4 (master)."""

import math
import re
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.adamw import adamw

KINDS = ("master", "exp_avg", "exp_avg_sq")
BUCKET = 2**24  # gradients of replicas are summed so many elements at a time


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
    """Sums each tensor over the ranks, in place, and to the same bits on all."""
    bucket, size = [], 0
    for i, tensor in enumerate(tensors):
        bucket, size = [*bucket, tensor], size + tensor.numel()
        if size >= BUCKET or i + 1 == len(tensors):
            flat = torch.cat([t.flatten() for t in bucket])
            dist.all_reduce(flat)
            for t, part in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
                t.copy_(part.view_as(t))
            bucket, size = [], 0


class AdamW:
    """The state of some named parameters. Only matrices (and larger) decay: not biases, not norms."""

    def __init__(
        self, named: Iterable[tuple[str, Tensor]], weight_decay=0.0, betas=(0.9, 0.999), eps=1e-8, muon=False
    ):
        self.params = {name: p for name, p in named if p.requires_grad}
        self.muon = [n for n, p in self.params.items() if muon and BLOCK_MATRIX.search(n) and p.ndim == 2]
        self.weight_decay, self.betas, self.eps, self.updates = weight_decay, betas, eps, 0
        self.master = {name: local(p).float() for name, p in self.params.items()}  # fp32: itself
        self.exp_avg = {name: torch.zeros_like(m) for name, m in self.master.items()}
        self.exp_avg_sq = {name: torch.zeros_like(m) for name, m in self.master.items()}
        self.grads: dict[str, Tensor] = {}
        sharded = any(isinstance(p, DTensor) for p in self.params.values())
        self.sharded, replicated = sharded, dist.is_initialized() and not sharded
        self.rank, self.replicas = (dist.get_rank(), dist.get_world_size()) if replicated else (0, 1)

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
        """Global norm of the gradients, equal on all ranks, not finite if any gradient isn't. A host sync."""
        for name, p in self.params.items():
            part = self.master[name]
            self.grads[name] = torch.zeros_like(part) if p.grad is None else local(p.grad).float()
        if self.replicas > 1:
            sum_replicas(list(self.grads.values()))
        square = torch.stack(torch._foreach_norm(list(self.grads.values()))).double().square().sum()
        if self.sharded:
            dist.all_reduce(square)
        return math.sqrt(square.item())

    @torch.no_grad()
    def update(self, lr: float, shrink: float = 1.0) -> None:
        """One step with the gradients of `norm()` times `shrink`. Frees the gradients."""
        if shrink < 1:
            torch._foreach_mul_(list(self.grads.values()), shrink)
        for decays in (True, False):
            names = [n for n, p in self.params.items() if (p.ndim >= 2) == decays and self.master[n].numel()]
            if names := [n for n in names if n not in self.muon]:
                self._adamw(names, lr, self.weight_decay if decays else 0.0)
        self._muon(lr)
        self.updates += 1
        for name, p in self.params.items():
            if p.dtype != torch.float32:
                local(p).copy_(self.master[name])
        self.clear()

    def _adamw(self, names: list[str], lr: float, weight_decay: float) -> None:
        tables = (self.master, self.grads, self.exp_avg, self.exp_avg_sq)
        device = self.master[names[0]].device
        steps = torch.full((len(names),), float(self.updates), device=device).unbind()  # adamw adds the one
        adamw(
            *([table[name] for name in names] for table in tables), [], list(steps), fused=True,
            beta1=self.betas[0], beta2=self.betas[1], eps=self.eps, lr=lr, weight_decay=weight_decay,
            amsgrad=False, maximize=False,
        )  # fmt: skip

    def _muon(self, lr: float) -> None:
        """Nesterov momentum, made orthogonal: all directions of a matrix move alike, not just the loud.

        Replicas deal the matrices among themselves, and add up what each has done."""
        moves = {}
        for i, name in enumerate(self.muon):
            grad, average = self.grads[name], self.exp_avg[name]
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

    def clear(self) -> None:
        self.grads = {}
        for p in self.params.values():
            p.grad = None

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
    "linear": lambda done: min(1.0, (1 - done) / 0.3),  # flat, then down over the last 30 %
}


def learning_rate(step: int, steps: int, peak: float, warmup: int, schedule: str) -> float:
    """The rate of step `step` (from 0) of `steps`: up over `warmup` steps, then the schedule. Never 0."""
    done = max(0, step - warmup) / max(1, steps - warmup)
    return peak * min((step + 1) / (warmup + 1), SCHEDULES[schedule](done))
