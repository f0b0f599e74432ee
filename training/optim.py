"""torch.optim's AdamW, and Muon, on fp32 masters; the schedules of the learning rate.

fp32 is what learns, the compute dtype (bf16 on CUDA) is what samples and, unless training is
sharded, trains. At a learning rate of 1e-6 an update is far below bf16's spacing: added to a bf16
weight, it would vanish.

    name      of a parameter that learns
    master    its fp32 weight, which torch.optim updates: the parameter itself where that is fp32
              (a CPU's; FSDP2's shards), else a copy that lives here
    computed  the whole weight in the compute dtype, which is rounded from the master after every
              step, in place: CUDA graphs read its address. The parameter itself, or that of a whole
              copy beside the shards

    bf16 on one GPU        computed (parameter) 2 B, master 4 B, gradient 4 B, moments 8 B a weight
    fp32 on a CPU          master = computed = parameter 4 B, gradient 4 B, moments 8 B
    FSDP2 over N ranks     master = parameter: (4 + 4 + 8) B / N; computed, if anything samples, 2 B

Gradients are summed in fp32: over the passes of a step (a bf16 parameter's gradient moves into its
master's as soon as a backward has made it), and over the ranks. A parameter that no batch touched
has a zero gradient: the update doesn't depend on which rank happened to see an image or a region.

The state is {kind: {full parameter name: whole tensor}}, so that it is stored as safetensors and
resumes on any number of ranks, sharded or not.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

KINDS = ("master", "exp_avg", "exp_avg_sq", "momentum_buffer")
BUCKET = 2**24  # elements that are summed over replicas at a time

# Muon takes the matrices of attention and MLP; everything else stays with AdamW.
BLOCK_MATRIX = re.compile(r"\.(layers|blocks)\.\d+\.")
# Muon's learning rate in units of AdamW's. At 1 their steps are equally long; a model from scratch
# took half as much again (LOG.md).
MUON_LR_SCALE = 1.5
# Of the Newton-Schulz iteration: x <- a x + b (x x') x + c (x x')^2 x, five times, takes singular
# values of .01 to 1 to between .7 and 1.2 (Jordan's coefficients: steep at 0, not exact at 1).
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5


def whole(tensor: Tensor) -> Tensor:
    """Return the full tensor of a shard (collective), or the tensor itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor, as a plain tensor on the same storage."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def shard_like(full: Tensor, like: Tensor) -> Tensor:
    """Cut a whole tensor, which every rank holds, as `like` is cut. No communication."""
    if not isinstance(like, DTensor):
        return full
    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None)


def sum_over_replicas(tensors: list[Tensor]) -> None:
    """Sum each tensor over all ranks, in place, in its dtype, to the same bits on every rank."""
    bucket = []
    size = 0
    for i, tensor in enumerate(tensors):
        bucket.append(tensor)
        size += tensor.numel()
        if size < BUCKET and i + 1 < len(tensors):
            continue
        # One message for many small tensors: a call of its own for each norm would be all latency.
        flat = torch.cat([t.flatten() for t in bucket])
        dist.all_reduce(flat)
        for t, summed in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
            t.copy_(summed.view_as(t))
        bucket = []
        size = 0


def accumulate_in_master(master: Tensor, param: Tensor) -> None:
    """Move a gradient, which a backward has just made, from a 16-bit parameter to its master."""
    if master.grad is None:
        # The first pass of a step makes the fp32 gradient, later ones add to it.
        master.grad = param.grad.float()
    else:
        master.grad.add_(param.grad)
    # Freed at once: a whole model's 16-bit gradients never stand beside its fp32 ones.
    param.grad = None


def orthogonalize(matrix: Tensor) -> Tensor:
    """Return the nearest matrix (R, C) with orthonormal rows (columns if R > C), about."""
    a, b, c = NEWTON_SCHULZ
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.mT if is_tall else matrix  # the products of rows are the smaller ones
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.addmm(x, polynomial, x, beta=a)
    return x.mT if is_tall else x


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al., 2024): momentum SGD whose updates of a matrix are made orthogonal, so
    that all its directions take steps of one length, which doesn't depend on the gradient's.

    Gives what torch.optim.Muon(adjust_lr_fn="match_rms_adamw") gives, but computes in fp32, and
    deals the matrices out to the ranks. torch's computes in bf16, which takes a CPU that has no
    instructions for it twenty times as long, and all matrices on every rank (LOG.md).
    """

    def __init__(self, groups: list[dict], lr: float = 1e-3, momentum: float = 0.95):
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self) -> None:
        """Update every matrix by its gradient. Collective."""
        for group in self.param_groups:
            updates = [self._smoothed(param, group["momentum"]) for param in group["params"]]
            for param, update in zip(group["params"], dealt_out(updates), strict=True):
                param.mul_(1 - group["lr"] * group["weight_decay"])
                # At this scale a step is as long as AdamW's (Liu et al., 2025).
                scale = 0.2 * math.sqrt(max(param.shape))
                param.add_(shard_like(update, param), alpha=-group["lr"] * scale)

    def _smoothed(self, param: nn.Parameter, momentum: float) -> Tensor:
        """Return the gradient with Nesterov's momentum, whole."""
        buffer = self.state[param]["momentum_buffer"]
        buffer.lerp_(param.grad, 1 - momentum)
        return whole(param.grad.lerp(buffer, momentum))


def dealt_out(updates: list[Tensor]) -> list[Tensor]:
    """Orthogonalise matrices that every rank holds, each on one rank; all ranks get all."""
    if not dist.is_initialized():
        return [orthogonalize(update) for update in updates]
    out = []
    for i, update in enumerate(updates):
        if i % dist.get_world_size() == dist.get_rank():
            out.append(orthogonalize(update))
        else:
            out.append(torch.zeros_like(update))
    # Each is zero on all ranks but one.
    sum_over_replicas(out)
    return out


class Optimizer:
    """The fp32 masters of some named parameters, and torch.optim over them.

    named: (name, parameter) pairs; those that don't require a gradient are left out.
    compute_weights: name -> whole weight that is kept equal to the master; None: the parameters;
        {} where training is sharded and nothing samples.
    Only matrices (and larger) decay: not biases, not norms. vector_lr_scale is the learning rate of
    biases and norms in units of the matrices'.
    """

    def __init__(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        compute_weights: dict[str, Tensor] | None = None,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        muon: bool = False,
        vector_lr_scale: float = 1.0,
    ):
        # In the model's own order, which is the same on every rank and in every run.
        params = {name: p for name, p in named if p.requires_grad}
        self.compute_weights = params
        if compute_weights is not None:
            kept = {name: compute_weights[name] for name in params if name in compute_weights}
            self.compute_weights = kept
        self.updates = 0
        self.masters: dict[str, nn.Parameter] = {}
        for name, param in params.items():
            self.masters[name] = self._master_of(param)

        self.muon_names = [
            n for n, p in params.items() if muon and p.ndim == 2 and BLOCK_MATRIX.search(n)
        ]
        # Weight decay pulls towards 0: right for a matrix, wrong for a norm's gain, whose neutral
        # value is 1.
        matrices = [n for n, p in params.items() if p.ndim >= 2 and n not in self.muon_names]
        vectors = [n for n, p in params.items() if p.ndim < 2]
        self.optimizers = []
        groups = [
            {"params": self._of(matrices), "weight_decay": weight_decay, "lr_scale": 1.0},
        ]
        # torch.optim's fused step takes shards or whole tensors, but not both in one group.
        for kind in self._by_kind():
            own = {id(master) for master in kind}
            of_kind = [master for master in self._of(vectors) if id(master) in own]
            groups.append({"params": of_kind, "weight_decay": 0.0, "lr_scale": vector_lr_scale})
        groups = [group for group in groups if group["params"]]
        if groups:
            self.optimizers.append(torch.optim.AdamW(groups, betas=betas, fused=True))
        if self.muon_names:
            group = {"params": self._of(self.muon_names), "lr_scale": MUON_LR_SCALE}
            self.optimizers.append(Muon([group | {"weight_decay": weight_decay}]))
        self._init_state()

    def _init_state(self) -> None:
        """Give torch.optim its zero moments now, as they may be saved before the first step."""
        for name, master in self.masters.items():
            zeros = partial(torch.zeros_like, master, requires_grad=False)
            if name in self.muon_names:
                self.optimizers[-1].state[master] = {"momentum_buffer": zeros()}
            else:
                step = torch.zeros((), device=master.device)
                state = {"step": step, "exp_avg": zeros(), "exp_avg_sq": zeros()}
                self.optimizers[0].state[master] = state

    def _of(self, names: list[str]) -> list[nn.Parameter]:
        return [self.masters[name] for name in names]

    def _master_of(self, param: nn.Parameter) -> nn.Parameter:
        if torch.promote_types(param.dtype, torch.float32) == param.dtype:
            return param
        master = nn.Parameter(param.detach().float())
        param.register_post_accumulate_grad_hook(partial(accumulate_in_master, master))
        return master

    def step(self, lr: float, clip_norm: float, loss: float, name: str) -> float:
        """Sum over replicas, check, clip, update, publish; return the global norm before the clip.

        `loss` is the global one, so that all ranks stop together: FloatingPointError, which says
        `name`, if it or the norm isn't finite; nothing is updated then. One host sync. Frees the
        gradients.
        """
        # The global norm, over every rank's shards: the clip has to be the same everywhere.
        kinds = self._gradients()
        norms = [whole(get_total_norm(grads)) for grads in kinds if grads]
        total_norm = norms[0] if len(norms) == 1 else torch.stack(norms).norm()
        # The one wait for the device in a step; all ranks read the same number, so all stop or
        # none.
        norm = total_norm.item()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise FloatingPointError(f"{name}: the loss is {loss}, the gradient norm {norm}")
        if clip_norm:  # 0: off
            for masters in self._by_kind():
                clip_grads_with_norm_(masters, clip_norm, total_norm)
        for optimizer in self.optimizers:
            # The schedule sets one number; each group has its own scale of it.
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.updates += 1
        self.publish()
        return norm

    def _by_kind(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Return the masters that are whole on every rank, and those that are shards."""
        replicated = []
        sharded = []
        for master in self.masters.values():
            (sharded if isinstance(master, DTensor) else replicated).append(master)
        return replicated, sharded

    def _gradients(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return the gradients of both kinds of masters, zero where no batch touched one."""
        for master in self.masters.values():
            if master.grad is None:
                # Not skipped: torch.optim would leave out its decay and its moments, on this rank
                # only.
                master.grad = torch.zeros_like(master)
        replicated, sharded = self._by_kind()
        replicated = [master.grad for master in replicated]
        sharded = [master.grad for master in sharded]
        # FSDP2 has reduced the gradients of shards by itself.
        if dist.is_initialized():
            sum_over_replicas(replicated)
        return replicated, sharded

    @torch.no_grad()
    def publish(self) -> None:
        """Round the masters to the weights that compute, in place. Collective where sharded."""
        for name, weight in self.compute_weights.items():
            master = self.masters[name]
            if weight is not master:
                # Rounded before it is gathered: half the bytes between ranks.
                weight.copy_(whole(master.detach().to(weight.dtype)))

    def _state_of(self, name: str) -> dict[str, Tensor]:
        """Return what belongs to a name: its master, and what torch.optim keeps of it."""
        optimizer = self.optimizers[-1] if name in self.muon_names else self.optimizers[0]
        master = self.masters[name]
        return {"master": master, **optimizer.state[master]}

    def has_learnt(self, prefix: str) -> bool:
        """Whether this rank's share of the weights so named had a gradient other than zero."""
        for name in self.masters:
            if not name.startswith(prefix):
                continue
            state = self._state_of(name)
            moment = state["momentum_buffer" if name in self.muon_names else "exp_avg_sq"]
            if isinstance(moment, DTensor):
                moment = moment.to_local()
            if moment.any():
                return True
        return False

    def state(self, kind: str) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, whole tensor) of each master that has this kind of state.

        Collective: every rank has to walk all of it.
        """
        for name in self.masters:
            state = self._state_of(name)
            if kind in state:
                yield name, whole(state[kind].detach())

    @torch.no_grad()
    def load(self, read: Callable[[str, str], Tensor], updates: int) -> None:
        """Restore masters and moments, and publish. read(kind, name) gives the whole tensor.

        Exact on any number of ranks, with the same --train, --lora and --optimizer as when it was
        saved.
        """
        self.updates = updates
        for name in self.masters:
            state = self._state_of(name)
            if "step" in state:
                # All parameters have made the same number of steps, as zeros stand for absent
                # gradients.
                state.pop("step").fill_(updates)
            for kind, tensor in state.items():
                tensor.copy_(shard_like(read(kind, name).to(tensor.device), tensor))
        self.publish()


# Learning rate as a fraction of its peak; `done` in [0, 1) is the share of the steps after the
# warm-up.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "linear": lambda done: min(1.0, (1 - done) / 0.45),  # flat, then down over the last 45 %
}


def learning_rate(step: int, steps: int, peak: float, warmup: int, schedule: str) -> float:
    """Return the learning rate of step `step` (from 0) of `steps`; it is never 0.

    It rises over `warmup` steps, then follows the schedule.
    """
    done = max(0, step - warmup) / max(1, steps - warmup)
    return peak * min((step + 1) / (warmup + 1), SCHEDULES[schedule](done))
