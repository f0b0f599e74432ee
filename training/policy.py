"""The model that trains, the one that samples, and the policy that a run began with.

One rank, or several that each hold the whole model: one object trains and samples. Where one rank
can't hold it, FSDP2 cuts what learns into fp32 shards and gathers a layer at a time, cast to the
compute dtype; then a whole copy in the compute dtype samples, for CUDA graphs need addresses that
never change.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from model import lora
from model.qwen_vl import QwenVL
from plan import Settings
from training import ranks
from training.optim import Optimizer


def compute_dtype(device: torch.device) -> torch.dtype:
    """Return what forward and backward compute in: bf16 on CUDA, fp32 on a CPU.

    What learns is fp32 in both cases (training/optim.py).
    """
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def load_model(
    source: str,
    device: torch.device,
    train: str | None = None,
    lora_rank: int = 0,
    regions: str = "token",
) -> QwenVL:
    """Load a whole model onto the device, in its compute dtype.

    train: a name of lora.TRAIN, None: nothing learns. lora_rank: of the adapters, 0 for none.
    regions: as of the processor.
    """
    model = QwenVL.from_pretrained(source, device, compute_dtype(device), regions=regions)
    lora.learn(model, train, lora_rank)
    return model


@dataclass
class Policy:
    """`model` trains; `rollout_model` samples and takes log-probs that need no gradient.

    They are one object unless training is sharded. `Optimizer.publish` keeps a copy up to date.
    """

    model: QwenVL
    rollout_model: QwenVL | None  # None: nothing samples (a sharded SFT)

    @property
    def compute_weights(self) -> dict[str, nn.Parameter] | None:
        """The weights that `Optimizer` keeps equal to its masters; None: the model's own."""
        if self.rollout_model is self.model:
            return None
        if self.rollout_model is None:
            return {}
        return dict(self.rollout_model.named_parameters())


def load_policy(
    source: str, cfg, device: torch.device, world: int, settings: Settings, samples: bool
) -> Policy:
    """Load what trains, sharded where the settings say so, and what samples.

    A GPU never holds two whole models but for the copy that samples: sharding starts from the
    checkpoint's own pages on the host.
    """
    if settings.shard:
        # First what samples: what is frozen in it serves training as well.
        rollout_model = None
        if samples:
            rollout_model = load_model(source, device, cfg.train, cfg.lora, cfg.regions)
        host = torch.device("cpu")
        model = QwenVL.from_pretrained(
            source, host, compute_dtype(device), fuse=False, regions=cfg.regions
        )
        lora.learn(model, cfg.train, cfg.lora)
        shard(model, device, world, compute_dtype(device), rollout_model)
    else:
        model = load_model(source, device, cfg.train, cfg.lora, cfg.regions)
        rollout_model = model
    if settings.checkpointing:
        model.checkpoint_blocks()
    return Policy(model, rollout_model)


# ---- Sharding


def shard(
    model: QwenVL,
    device: torch.device,
    world: int,
    compute: torch.dtype,
    rollout_model: QwenVL | None = None,
) -> None:
    """Cut what learns over the ranks, layer by layer, from the host to the device, as fp32.

    A block goes to the device whole, is cut there, and its shard stays. Gradients are reduced in
    fp32 behind each pass: to wait would keep 4 bytes a parameter on every rank. With several boxes
    the shards of one are replicated on the others. What is frozen stays whole on each rank, in the
    compute dtype, shared with the rollout model where there is one: so a rank without images may
    skip a frozen tower.
    """
    frozen = place_frozen(model, device, rollout_model)
    # FSDP2 takes one dtype a group: what computes in fp32 stays whole on each rank.
    whole = keep_wide(model, device, compute)
    local_world = ranks.local_world_size(world)
    if local_world == world:
        mesh = init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))
    else:
        # Shards travel within a box, where links are fast; only sums of gradients cross boxes.
        boxes = world // local_world
        mesh = init_device_mesh(
            device.type, (boxes, local_world), mesh_dim_names=("boxes", "shard")
        )
    master = torch.promote_types(compute, torch.float32)
    # cast_forward_inputs would round the vision tower's fp32 angles.
    precision = MixedPrecisionPolicy(compute, reduce_dtype=master, cast_forward_inputs=False)
    # Each layer is a unit that FSDP2 gathers and frees; the last unit, the model, takes what is
    # left.
    for block in [*model.decoder.layers, *model.vision.blocks, model]:
        # Of the whole model these are DTensors already, but for embeddings, norms and heads.
        learning = [p for p in block.parameters() if p.requires_grad and p not in whole]
        if not learning:
            continue
        for p in learning:
            if not isinstance(p, DTensor):
                p.data = p.data.to(device, master)
        fully_shard(block, mesh=mesh, ignored_params=frozen | whole, mp_policy=precision)
        block.set_gradient_divide_factor(1.0)  # the loss is divided by global counts already
        block.set_force_sum_reduction_for_comms(True)  # gloo can't scale while it sums


def place_frozen(
    model: QwenVL, device: torch.device, rollout_model: QwenVL | None
) -> set[nn.Parameter]:
    """Put frozen parameters on the device, or take the rollout model's; return them."""
    shared = dict(rollout_model.named_parameters()) if rollout_model else {}
    frozen = set()
    for name, p in list(model.named_parameters()):
        if p.requires_grad:
            continue
        weight = shared[name].data if name in shared else p.data.to(device)
        frozen.add(replace_parameter(model, name, weight, requires_grad=False))
    return frozen


def keep_wide(model: QwenVL, device: torch.device, compute: torch.dtype) -> set[nn.Parameter]:
    """Put what learns and computes in a wider dtype than the rest on the device; return it."""
    wide = set()
    for name, p in list(model.named_parameters()):
        if p.requires_grad and p.dtype != compute:
            wide.add(replace_parameter(model, name, p.data.to(device)))
    return wide


def replace_parameter(
    model: QwenVL, name: str, weight: Tensor, requires_grad: bool = True
) -> nn.Parameter:
    """Give a parameter's name to another, as none can change its device in place; return that."""
    placed = nn.Parameter(weight, requires_grad=requires_grad)
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, placed)
    return placed


def reshard(model: QwenVL) -> None:
    """Free the weights that FSDP's root keeps gathered after a forward without a backward."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def synced_passes(model: QwenVL, microbatches: Sequence) -> Iterator:
    """Yield each micro-batch; with several boxes, gradients cross them behind the last alone."""
    for i, microbatch in enumerate(microbatches):
        if isinstance(model, FSDPModule):
            # Within a box gradients are reduced behind each pass, as keeping them whole would cost
            # memory.
            model.set_requires_all_reduce(i + 1 == len(microbatches))
        yield microbatch


# ---- The reference


class Reference:
    """The policy that the run began with: `with reference:` the rollout model is that policy.

    There is no second model: what learns changes places with what it was. Adapters are switched
    off, which takes nothing. Of the rest a rank keeps what it began with, in the compute dtype:
    alone, on the host in one pinned buffer; several ranks deal the weights among themselves, and
    broadcast them. On the way back the weights are rounded from their masters again, so that only
    those that are their own masters (a CPU's) have to be kept meanwhile. Collective; made before
    `checkpoints.restore`.
    """

    def __init__(self, model: QwenVL, optimizer: Optimizer):
        self.model = model
        self.optimizer = optimizer
        self.weights = []
        for name, weight in optimizer.compute_weights.items():
            if not name.endswith((".lora_a", ".lora_b")):
                self.weights.append(weight)

        self.world = ranks.world_size()
        first = ranks.rank() if self.world > 1 else 0
        # Rank r keeps weights r, r + world, ...: together one copy of the model.
        mine = range(first, len(self.weights), self.world)
        copies = copy_into_buffer([self.weights[i] for i in mine], on_host=self.world == 1)
        self.kept = dict(zip(mine, copies, strict=True))  # index -> what the run began with

        # By identity: equal tensors may be different weights.
        masters = {id(master) for master in optimizer.masters.values()}
        self.own_masters = [weight for weight in self.weights if id(weight) in masters]
        self.current: list[Tensor] = []  # of own_masters, while the reference is in their place
        self.adapters_off = contextlib.ExitStack()

    @torch.no_grad()
    def __enter__(self) -> None:
        self.adapters_off.enter_context(lora.off(self.model))
        self.current = [weight.clone() for weight in self.own_masters]
        for i, weight in enumerate(self.weights):
            if i in self.kept:
                # From pinned memory, so that the copies run one behind the other without the host.
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


def copy_into_buffer(weights: list[nn.Parameter], on_host: bool) -> list[Tensor]:
    """Return copies of the weights, as views of one buffer on their device, or on the host.

    On the host it is pinned for CUDA, whose allocator rounds it up to a power of two. A buffer for
    each dtype, in truth: a gated delta net has weights in fp32.
    """
    copies = {}
    for dtype in sorted({weight.dtype for weight in weights}, key=str):
        alike = [weight for weight in weights if weight.dtype == dtype]
        views = copy_of_one_dtype(alike, on_host)
        copies |= {id(weight): view for weight, view in zip(alike, views, strict=True)}
    return [copies[id(weight)] for weight in weights]


def copy_of_one_dtype(weights: list[nn.Parameter], on_host: bool) -> list[Tensor]:
    # One buffer, not hundreds of pinned tensors: each would be rounded up by itself.
    sizes = [weight.numel() for weight in weights]
    like = weights[0]
    if on_host:
        buffer = torch.empty(sum(sizes), dtype=like.dtype, pin_memory=like.is_cuda)
    else:
        buffer = torch.empty(sum(sizes), dtype=like.dtype, device=like.device)
    copies = []
    for part, weight in zip(buffer.split(sizes), weights, strict=True):
        copies.append(part.view(weight.shape))
        copies[-1].copy_(weight.detach())
    return copies
