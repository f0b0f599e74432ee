"""What learns, and low-rank adapters (LoRA, Hu et al. 2021): small to train, merged on saving.

    y = W x + b + s B (A x),    A (rank, in), B (out, rank), s = 2

B = 0 at the start, so that it begins as the base model.

A wrapped projection of the decoder keeps the names of its weight and bias; the adapters are
parameters like others, `...lora_a` and `...lora_b`, and lie in trainer/ by their full names. `with
off(model)` it is the base model, to the bit. A checkpoint holds what `merge` makes of them: W + s B
A, rounded to W's dtype. A run resumes from its base checkpoint and its adapters: in a merged one,
what is below half a unit of W's last bit is gone.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errors import UserError

# --train: prefixes of the parameters that learn. RL's default is lm (the paper froze the rest),
# SFT's is all. With --lora RANK the decoder and its head are frozen, and adapters of the decoder's
# projections learn instead; what learns beside them:
#     lm, lora   nothing (lora alone means --lora 32)
#     spatial    region token, point map and 3D head: what SFT wants
#     all        these and the vision tower
TRAIN = {
    "all": ("",),
    "lm": ("decoder.", "lm_head."),
    "lora": (),
    "spatial": ("region.", "points.", "head3d."),
}
# Of attention, of gated delta nets, of MLPs. in_proj_b and in_proj_a are left out: their few rows
# have no rank to spare.
PROJECTIONS = (
    *("q_proj", "k_proj", "v_proj", "o_proj"),
    *("in_proj_qkv", "in_proj_z", "out_proj"),
    *("gate_proj", "up_proj", "down_proj"),
)
SCALE = 2.0  # alpha / rank


class LoRALinear(nn.Module):
    """A Linear with an adapter, x (..., in) -> (..., out); its weight and bias are the Linear's."""

    def __init__(self, linear: nn.Linear, rank: int, generator: torch.Generator):
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias
        self.on = True
        out_features, in_features = self.weight.shape
        noise = torch.randn(rank, in_features, generator=generator)
        # So that A x has the RMS of x.
        noise = noise / in_features**0.5
        self.lora_a = nn.Parameter(noise.to(self.weight))
        self.lora_b = nn.Parameter(self.weight.new_zeros(out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        if not self.on:
            return y
        return y + SCALE * F.linear(F.linear(x, self.lora_a), self.lora_b)


def learn(model, train: str | None, rank: int = 0) -> None:
    """Let learn what the row `train` of TRAIN says (None: nothing), with adapters if rank > 0."""
    for name, p in model.named_parameters():
        p.requires_grad_(train is not None and name.startswith(TRAIN[train]))
    if rank:
        attach(model, rank)


def attach(model, rank: int, seed: int = 0) -> None:
    """Wrap the decoder's projections; of the language model only the adapters learn.

    Whether the other parts do (vision, region, points, head3d) stays as it is.
    """
    if rank < 1:
        raise UserError(f"--lora {rank}: the rank is at least 1")
    if adapters(model):
        raise ValueError("a model is wrapped once")
    for name, p in model.named_parameters():
        if name.startswith(("decoder.", "lm_head.")):
            p.requires_grad_(False)
    # On the host: the same on every rank and device.
    generator = torch.Generator().manual_seed(seed)
    for layer in model.decoder.layers:
        for block in (layer.token_mixer, layer.mlp):
            projections = [name for name, _ in block.named_children() if name in PROJECTIONS]
            for name in projections:
                linear = block.get_submodule(name)
                setattr(block, name, LoRALinear(linear, rank, generator))


def adapters(model) -> list[LoRALinear]:
    """List the wrapped projections of a model."""
    return [module for module in model.modules() if isinstance(module, LoRALinear)]


@contextmanager
def off(model) -> Iterator[None]:
    """Let the model be its base model for a while: the reference policy of a run with adapters."""
    switched_off = [adapter for adapter in adapters(model) if adapter.on]
    for adapter in switched_off:
        adapter.on = False
    try:
        yield
    finally:
        for adapter in switched_off:
            adapter.on = True


def merge(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights by name with each adapted one merged, W + s B A, and no adapters.

    All are whole (not sharded). A dict without adapters comes back as it is.
    """
    merged = {}
    for name, weight in weights.items():
        owner, _, kind = name.rpartition(".")
        if kind in ("lora_a", "lora_b"):
            continue
        if kind == "weight" and f"{owner}.lora_a" in weights:
            weight = add_adapter(weight, weights[f"{owner}.lora_a"], weights[f"{owner}.lora_b"])
        merged[name] = weight
    return merged


def add_adapter(weight: Tensor, lora_a: Tensor, lora_b: Tensor) -> Tensor:
    """Return W + s B A, summed in fp32 and rounded to W's dtype."""
    delta = lora_b.float() @ lora_a.float()
    return (weight.float() + SCALE * delta).to(weight.dtype)
