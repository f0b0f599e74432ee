"""What is only there for a CPU's speed; decode.py does the same on any device.

- A step takes the slots, prompts and keys that are in use, not the whole buffers, and sees at once
  who has ended. When nothing waits any more, what still runs moves together.
- The one sample of a prompt (n = 1) goes on in the prompt's row: attention is then one call.
- Queries, keys and values come from one matrix product, whose weights MKL has in its own order.
- inference_mode: without autograd's bookkeeping a step takes 4 to 6 % less.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.decode_attention import Table, decode_attention
from kernels.delta_step import delta_step
from kernels.layers import add_offset, torch_norm
from model.qwen_vl import fused_linears
from model.rollout.cache import Cache, Extent, Options, PromptRows
from model.rollout.decode import decode, frequencies_of, rotation, step_layers
from model.rollout.scheduler import Sequence
from model.rollout.slots import Slots, take_ended

# Running sequences move together when they take less than this share of the slots.
COMPACT_BELOW = 0.75


class RowCache:
    """The cache where every prompt has one sample: slot i goes on behind the prompt of row i."""

    def __init__(self, model, options: Options, slots: int):
        self.prompts = PromptRows(model, slots, options)
        self.max_new_tokens = options.max_new_tokens
        self.free_slots = list(range(slots))

    @property
    def slot_count(self) -> int:
        return self.prompts.count

    @property
    def suffixes(self) -> list[Tensor]:
        return self.prompts.layers

    @property
    def states(self) -> list[tuple[Tensor, Tensor]]:
        return self.prompts.states

    def make_room(self, length: int) -> bool:
        has_room = self.prompts.make_room(length + self.max_new_tokens)
        # A row that had to go took its slot along.
        self.free_slots = [slot for slot in self.free_slots if slot < self.slot_count]
        return has_room

    def take_slot(self, row: int) -> int:
        self.free_slots.remove(row)
        return row

    def fork(self, sequences: list[Sequence]) -> None:
        """Do nothing: a prompt's state is its only sample's."""

    def link(self, running: list[Sequence]) -> None:
        """Do nothing: every slot reads its own row."""

    def table(self, lengths: Tensor, extent: Extent) -> Table:
        # Attention sees a suffix alone, which begins with the prompt.
        prompts = self.prompts.lengths[: extent.slots]
        return Table(prompts, prompts + lengths, None, None)

    def keys_and_values(self, layer: int, extent: Extent) -> tuple:
        keys = extent.prompt_keys + extent.suffix_keys
        rows = self.prompts.layers[layer]
        return (None, None, *rows[:, : extent.slots, :, :keys])


@dataclass
class CpuStep:
    """As decode.Step; cos and sin are (S, 1, R), the first half of sin negative."""

    cache: "Cache | RowCache"
    extent: Extent
    table: Table
    cos: Tensor
    sin: Tensor
    at: Tensor  # (S,) which token of its slot this is
    places: Tensor  # (S * 2 K,) where keys and values go, of all (D,) in a layer's suffixes
    ended: Tensor  # (S,)


class CpuAttention:
    """A layer's attention in few and large operations; index: which of those that attend."""

    def __init__(self, attn, sizes, index: int):
        self.index = index
        self.heads = sizes.heads
        self.rotated_heads = sizes.heads + sizes.kv_heads
        self.width = sizes.head_dim
        self.gated = attn.gated
        self.qkv = joint_linear(attn.q_proj, attn.k_proj, attn.v_proj)
        self.output = joint_linear(attn.o_proj)
        self.eps = sizes.eps
        self.norm_weight = None
        if attn.q_norm is not None:
            # Of all query and key heads, (A + K, D): one norm serves both.
            queries = attn.q_norm.weight.expand(sizes.heads, -1)
            keys = attn.k_norm.weight.expand(sizes.kv_heads, -1)
            weight = torch.cat((queries, keys))
            self.norm_weight = add_offset(weight, attn.q_norm.offset)

    def __call__(self, x: Tensor, step: CpuStep) -> Tensor:
        """Return (S, H) of x (S, H); the new keys and values go to the step's places."""
        width = self.width
        qkv = self.qkv(x).view(len(x), -1, width)
        gate = None
        if self.gated:
            # Each query head has its gate's behind it; without them all lie as they do ungated.
            gate = qkv[:, 1 : 2 * self.heads : 2]
            qkv = torch.cat((qkv[:, : 2 * self.heads : 2], qkv[:, 2 * self.heads :]), 1)
        self.rotate(qkv[:, : self.rotated_heads], step)
        # Keys and values lie side by side, too: one write for all slots and heads.
        written = qkv[:, self.heads :].reshape(-1, width)
        step.cache.suffixes[self.index].view(-1, width).index_copy_(0, step.places, written)
        cached = step.cache.keys_and_values(self.index, step.extent)
        out = decode_attention(qkv[:, : self.heads], *cached, step.table)
        if gate is not None:
            out = out * gate.sigmoid()
        return self.output(out.flatten(1))

    def rotate(self, heads: Tensor, step: CpuStep) -> None:
        """Norm and rotate queries and keys (S, A + K, D), which lie side by side, in place."""
        normed = heads
        if self.norm_weight is not None:
            _, normed = torch_norm(heads, None, self.norm_weight, self.eps)
        rotary = step.cos.shape[-1]
        front = normed[..., :rotary]
        # (n_1 cos - n_2 sin, n_2 cos + n_1 sin) of a head's halves n_1, n_2
        swapped = front.roll(rotary // 2, -1)
        torch.addcmul(front * step.cos, swapped, step.sin, out=heads[..., :rotary])
        if rotary < self.width and normed is not heads:
            heads[..., rotary:] = normed[..., rotary:]


class CpuDeltaNet:
    """A gated delta net; index: which of those layers it is."""

    def __init__(self, net, index: int):
        self.net = net
        self.index = index
        self.inputs = joint_linear(net.in_proj_qkv, net.in_proj_z, net.in_proj_b, net.in_proj_a)
        self.output = joint_linear(net.out_proj)
        heads = net.sizes.value_heads
        self.parts = (net.sizes.channels, heads * net.sizes.value_dim, heads, heads)

    def __call__(self, x: Tensor, step: CpuStep) -> Tensor:
        """Return (S, H) of x (S, H); the slots' states move on."""
        mixed, z, b, a = self.inputs(x).split(self.parts, -1)
        z = z.unflatten(-1, (-1, self.net.sizes.value_dim))
        slots = step.extent.slots
        state, ring = step.cache.states[self.index]
        weights = self.net.step_weights
        y = delta_step(mixed, z, b, a, weights, state[:slots], ring[:slots], step.at, step.ended)
        return self.output(y)


class CpuLayer:
    """A decoder layer: `mix`, its attention or delta net, and `mlp`."""

    def __init__(self, layer, mix: Callable[[Tensor, CpuStep], Tensor]):
        mlp = layer.mlp
        self.mix = mix
        self.gate_up = joint_linear(mlp.gate_proj, mlp.up_proj)
        self.down = joint_linear(mlp.down_proj)

    def mlp(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(F.silu(gate).mul_(up))


class CpuModelRunner:
    """As decode.ModelRunner. Every call makes its own: MKL copies the weights as they are then."""

    def __init__(self, model, options: Options, slots: int):
        self.model = model
        make_cache = RowCache if options.n == 1 else Cache
        self.cache = make_cache(model, options, slots)
        self.slots = Slots(model, options, slots)
        self.extent = Extent(slots, 0, 0, 0)
        # The clock when the oldest running sequence began: none has a longer suffix.
        self.oldest = 0
        self.frequencies = frequencies_of(model)
        with torch.inference_mode():
            self.layers = step_layers(model.decoder, CpuAttention, CpuDeltaNet, CpuLayer)
        self.clock = 0

    def reset(self, processor) -> None:
        self.slots.reset(processor)

    def make_room(self, length: int) -> bool:
        return self.cache.make_room(length)

    def link(self, running: list[Sequence]) -> None:
        """Note who reads which prompt, and how far running sequences reach into the buffers."""
        self.cache.link(running)
        rows = [sequence.group.row for sequence in running]
        lengths = [self.cache.prompts.host_lengths[row] for row in rows]
        self.oldest = min(sequence.started for sequence in running)
        # Rows that went because longer prompts need more memory have taken their slots along.
        self.extent.slots = min(self.extent.slots, self.cache.slot_count)
        self.extent.prompts = max(rows) + 1
        self.extent.prompt_keys = max(lengths)
        # Where each slot's 2 K heads start in a layer's suffixes as a list of (D,): (S, 2 K).
        _, slots, heads, room, _ = self.cache.suffixes[0].shape
        places = 2 * slots * heads * room
        starts = torch.arange(0, places, room).view(2, slots, heads)
        self.head_starts = starts.transpose(0, 1).flatten(1)

    @torch.inference_mode()
    def step(self) -> None:
        extent = self.extent
        # With the token of this step.
        extent.suffix_keys = self.clock - self.oldest + 1
        tokens, positions = self.slots.sample_tokens(self.model.head_weight, extent.slots)
        cos, sin = rotation(positions, self.frequencies, self.model.dtype)
        # The sign of the rotation's first half goes into sin, once for all layers.
        half = sin.shape[1] // 2
        sin[:, :half].neg_()
        cos = cos[:, None]
        sin = sin[:, None]
        table = self.cache.table(self.slots.length[: extent.slots], extent)
        last = table.suffix_lengths - 1
        places = self.head_starts[: extent.slots] + last[:, None]
        at = self.slots.length[: extent.slots] - 1
        ended = self.slots.ended[: extent.slots]
        step = CpuStep(self.cache, extent, table, cos, sin, at, places.flatten(), ended)
        hidden = decode(self.model.decoder, self.layers, tokens, step)
        self.slots.hidden[: extent.slots].copy_(hidden)
        self.clock += 1

    def take_ended(self, running: list[Sequence]) -> list[Sequence]:
        return take_ended(running, self.slots.state(), self.clock)

    def tidy(self, running: list[Sequence], some_ended: bool, refill: bool) -> None:
        """Move sequences and prompts together when nothing waits any more and many slots idle."""
        if refill or not running:
            return
        # Now and then: a move copies the keys of what moves.
        if len(running) > COMPACT_BELOW * self.extent.slots:
            return
        groups = {sequence.group for sequence in running}
        slots = self.slots
        prompts = self.cache.prompts
        by_slot = [slots.hidden, slots.noise_key, slots.first_position, *slots.state()]
        by_row = [prompts.lengths]
        for layer in prompts.layers:
            by_row += layer  # its keys, its values
        # In a RowCache they are the same, and move once.
        if self.cache.suffixes is not prompts.layers:
            for layer in self.cache.suffixes:
                by_slot += layer
        for state in self.cache.states:
            by_slot += state
        new_slots = move_down([sequence.slot for sequence in running], by_slot)
        new_rows = move_down(sorted({group.row for group in groups}), by_row)
        for old, new in new_rows.items():
            prompts.host_lengths[new] = prompts.host_lengths[old]
        for sequence in running:
            sequence.slot = new_slots.get(sequence.slot, sequence.slot)
        for group in groups:
            group.row = new_rows.get(group.row, group.row)
        running.sort(key=lambda sequence: sequence.slot)
        self.extent.slots = len(running)
        self.link(running)


def move_down(used: list[int], tensors: list[Tensor]) -> dict[int, int]:
    """Copy used rows of the tensors into the gaps below them; return {old: new} of those rows."""
    gaps = sorted(set(range(len(used))) - set(used))
    above = [row for row in used if row >= len(used)]
    for t in tensors:
        t[gaps] = t[above]
    return dict(zip(above, gaps, strict=True))


def joint_linear(*layers) -> Callable[[Tensor], Tensor]:
    """Return x -> the layers' outputs side by side, from one matrix product where they adjoin.

    In fp32 MKL gets a copy of the weights in its own order: made sooner than a transpose, and for
    few rows a fifth to a third faster.
    """
    fused = fused_linears(*layers)
    if fused is None:
        return lambda x: torch.cat([layer(x) for layer in layers], -1)
    weight, bias = fused
    has_mkl = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    if not has_mkl or weight.dtype != torch.float32:
        return lambda x: F.linear(x, weight, bias)
    # MKL reads only the shape of the weights in their first order.
    shape = weight.new_empty(1, 1).expand_as(weight)
    packed = torch.ops.mkl._mkl_reorder_linear_weight(weight, 32)
    return lambda x: torch.ops.mkl._mkl_linear(x, packed, shape, bias, len(x))
