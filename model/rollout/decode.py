"""A token for every slot: sampled from the last hidden states, then taken through the decoder.

On CUDA the whole step, sampling included, is one graph over all slots, and the host looks for ended
sequences only every few steps, without waiting. Elsewhere it runs eagerly: so Triton's interpreter
and the tests run a GPU's operations (CPUs have cpu.py).

S slots, H hidden width, A query heads, K key-value heads, D head width, C channels
of a head that rotate.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.decode_attention import Table, decode_attention
from kernels.delta_step import delta_step
from kernels.layers import add_rms_norm, qk_norm_rope_write, swiglu_joint
from model.qwen_vl import fused_linears, rope_frequencies
from model.rollout.cache import Cache, Extent, Options
from model.rollout.scheduler import Sequence
from model.rollout.slots import HostState, Slots, take_ended


@dataclass
class Step:
    """What a step's layers read beside the tokens' hidden states; one for all layers."""

    cache: Cache
    extent: Extent
    table: Table
    cos: Tensor  # (S, C)
    sin: Tensor
    at: Tensor  # (S,) where a slot's new token goes in its suffix
    ended: Tensor  # (S,) slots whose tokens nobody reads


class FusedAttention:
    """A layer's attention in few launches; index: which of the layers that attend it is."""

    def __init__(self, attn, sizes, index: int):
        self.attn = attn
        self.sizes = sizes
        self.index = index

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        """Return (S, H) of x (S, H); the new keys and values go into the suffixes."""
        attn = self.attn
        q, k, v = project(x, attn.q_proj, attn.k_proj, attn.v_proj)
        q, gate = attn.split_gate(q)
        k = k.unflatten(-1, (-1, attn.head_dim))
        v = v.unflatten(-1, (-1, attn.head_dim))
        keys, values = step.cache.suffixes[self.index]
        query = qk_norm_rope_write(
            q, k, v, step.cos, step.sin, keys, values, step.at, *attn.qk_norm
        )
        cached = step.cache.keys_and_values(self.index, step.extent)
        out = decode_attention(query, *cached, step.table)
        if gate is not None:
            out = out * gate.sigmoid()
        return attn.o_proj(out.flatten(1))


class FusedDeltaNet:
    """A gated delta net in three launches; index: which of those layers it is."""

    def __init__(self, net, index: int):
        self.net = net
        self.index = index

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        """Return (S, H) of x (S, H); the slots' states move on."""
        net = self.net
        mixed, z, b, a = project(x, net.in_proj_qkv, net.in_proj_z, net.in_proj_b, net.in_proj_a)
        z = z.unflatten(-1, (-1, net.sizes.value_dim))
        state, ring = step.cache.states[self.index]
        slots = len(x)
        y = delta_step(
            mixed, z, b, a, net.step_weights, state[:slots], ring[:slots], step.at, step.ended
        )
        return net.out_proj(y)


def project(x: Tensor, *layers) -> list[Tensor] | tuple[Tensor, ...]:
    """Return each linear layer of x (S, H): from one product where their weights adjoin."""
    fused = fused_linears(*layers)
    if fused is None:
        # Weights that lie apart, or that have adapters.
        return [layer(x) for layer in layers]
    return F.linear(x, *fused).split([layer.weight.shape[0] for layer in layers], -1)


class FusedLayer:
    """A decoder layer in few launches: `mix`, its attention or delta net, and `mlp`."""

    def __init__(self, layer, mix: Callable[[Tensor, Step], Tensor]):
        self.mix = mix
        self.mlp_module = layer.mlp

    def mlp(self, x: Tensor) -> Tensor:
        """Return the MLP of x (S, H): gate and up from one product where their weights adjoin."""
        fused = fused_linears(self.mlp_module.gate_proj, self.mlp_module.up_proj)
        if fused is None:
            return self.mlp_module(x)
        return self.mlp_module.down_proj(swiglu_joint(F.linear(x, *fused)))


def step_layers(
    decoder, make_attention: Callable, make_delta_net: Callable, make_layer: Callable
) -> list:
    """Return the decoder's layers as a step calls them, each with its number among its kind."""
    layers = []
    attention = delta = 0
    for layer in decoder.layers:
        if layer.attends:
            mix = make_attention(layer.self_attn, decoder.sizes, attention)
            attention += 1
        else:
            mix = make_delta_net(layer.linear_attn, delta)
            delta += 1
        layers.append(make_layer(layer, mix))
    return layers


def frequencies_of(model) -> Tensor:
    """Return (C,) radians a position: each frequency turns a channel of both halves."""
    half = rope_frequencies(model.decoder.sizes, model.device)
    return torch.cat((half, half))


def rotation(positions: Tensor, frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cos and sin (S, C) of positions (S,), computed in fp32 and rounded when written.

    For text, mRoPE is the plain rotary embedding.
    """
    # (S, C) fp32: in bf16 a position above 256 wouldn't even be an integer.
    angles = positions[:, None] * frequencies
    cos = torch.cos(angles, out=angles.new_empty(angles.shape, dtype=dtype))
    sin = torch.sin(angles, out=angles.new_empty(angles.shape, dtype=dtype))
    return cos, sin


def decode(decoder, layers: list, tokens: Tensor, step: Step) -> Tensor:
    """Return the decoder's final hidden states (S, H) of one text token per slot, tokens (S,).

    layers: an object per layer with `mix` and `mlp` as FusedLayer has them.
    """
    # (S, H); x is the residual stream, `normed` what the next block reads of it.
    x = decoder.embed_tokens(tokens)
    normed = decoder.layers[0].input_layernorm(x)
    next_norms = [layer.input_layernorm for layer in decoder.layers[1:]]
    next_norms.append(decoder.norm)
    for i, layer in enumerate(layers):
        norm = decoder.layers[i].post_attention_layernorm
        mixed = layer.mix(normed, step)
        x, normed = add_rms_norm(x, mixed, norm.weight, norm.eps, norm.offset)
        # The MLP's residual goes into the next layer's norm: one launch less a layer.
        norm = next_norms[i]
        x, normed = add_rms_norm(x, layer.mlp(normed), norm.weight, norm.eps, norm.offset)
    return normed


def weight_addresses(model) -> list[int]:
    """Return where the decoder's weights lie, from which a graph reads them."""
    weights = (*model.decoder.parameters(), model.head_weight)
    return [weight.data_ptr() for weight in weights]


class ModelRunner:
    """The buffers of all slots, and the step over them."""

    def __init__(self, model, options: Options, slots: int):
        self.model = model
        self.cache = Cache(model, options, slots)
        self.slots = Slots(model, options, slots)
        self.suffix_keys = options.max_new_tokens
        self.frequencies = frequencies_of(model)
        self.layers = step_layers(model.decoder, FusedAttention, FusedDeltaNet, FusedLayer)
        self.clock = 0  # steps since the last reset
        self.graph = None
        self.addresses: list[int] = []  # of the weights that the graph reads
        # None: the host reads the slots' state itself.
        self.host_state = None
        if model.device.type == "cuda":
            self.host_state = HostState(self.slots)

    def reset(self, processor) -> None:
        """Empty the slots for a new call, with the weights as they are now."""
        self.clock = 0
        self.cache.reset()
        self.slots.reset(processor)
        if self.host_state:
            self.host_state.reset()
        # The optimiser writes in place, and so does `publish`; what moves needs a new graph.
        addresses = weight_addresses(self.model)
        if addresses != self.addresses:
            self.addresses = addresses
            self.graph = None

    def make_room(self, length: int) -> bool:
        """Make room for prompts of `length` tokens; False as long as that has to wait."""
        # Wider rows have new addresses, too.
        room = self.cache.prompts.room
        has_room = self.cache.make_room(length)
        if self.cache.prompts.room != room:
            self.graph = None
        return has_room

    def link(self, running: list[Sequence]) -> None:
        """Take note of the sequences that run from now on."""
        self.cache.link(running)

    def step(self) -> None:
        """Sample a token in every slot."""
        if self.host_state is None:
            self._step()
        else:
            if self.graph is None:
                self.graph = self._record()
            self.graph.replay()
        self.clock += 1

    def take_ended(self, running: list[Sequence]) -> list[Sequence]:
        """Return the sequences that are known to have ended, with what they sampled."""
        if self.host_state is None:
            return take_ended(running, self.slots.state(), self.clock)
        return self.host_state.take_ended(running, self.clock)

    def tidy(self, running: list[Sequence], some_ended: bool, refill: bool) -> None:
        """Get ready for the next step; refill: others are going to take free slots."""
        # So that attention does not read prompts for nobody.
        if some_ended:
            self.cache.link(running)

    def _step(self) -> None:
        """Queue a step; nothing in it waits for the device."""
        prompts = self.cache.prompts
        count = len(self.slots.length)
        extent = Extent(count, prompts.count, prompts.room, self.suffix_keys)
        tokens, positions = self.slots.sample_tokens(self.model.head_weight, count)
        cos, sin = rotation(positions, self.frequencies, self.model.dtype)
        table = self.cache.table(self.slots.length, extent)
        # Where the new token's keys and values go; its length counts it already.
        at = self.slots.length - 1
        step = Step(self.cache, extent, table, cos, sin, at, self.slots.ended)
        # Into the buffer that the next step samples from: in a graph all addresses are fixed.
        self.slots.hidden.copy_(decode(self.model.decoder, self.layers, tokens, step))

    def _record(self) -> torch.cuda.CUDAGraph:
        """Capture the step over all slots and the whole of the buffers."""
        # Once without a graph: what compiles a kernel or sets up a library can't be captured. No
        # slot takes part in that step, and delta nets leave ended slots as they are, so it changes
        # only these:
        slots = self.slots
        first_places = [suffix[..., 0, :] for suffix in self.cache.suffixes]
        changed = [slots.hidden, slots.length, slots.ended, *first_places]
        before = [t.clone() for t in changed]
        slots.length.fill_(1)
        slots.ended.fill_(True)
        self._step()
        for t, old in zip(changed, before, strict=True):
            t.copy_(old)
        graph = torch.cuda.CUDAGraph()
        # NCCL's watchdog is another thread, whose calls must not end the capture.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._step()
        return graph
