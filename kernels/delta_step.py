"""One decode step of a gated delta layer, between its projections: conv, gates, rule, gated norm.

    m' = silu(sum_j c_(w-1-j) m_(t-j))         of q, k and v together; earlier rows from a ring
    q, k normed (kernels/delta_rule.py)
    beta = sigmoid(b);  g = -exp(A_log) softplus(a + dt_bias)
    S <- e^g S;   S <- S + k (beta (v - S^T k))^T;   o = S^T q
    y  = weight o / sqrt(mean o^2 + eps) * silu(z),  per value head

Why fuse: a slot and layer of 4B moves 4.1 MiB, 96 % of it S (fp32), read and written. Eager PyTorch
passes over S about eight times; here a program holds one head's S in registers, all 128 x 128 of
it, and the rest is a few vectors. Ended slots are skipped: they move nothing, and keep their state.
At 3.0 TB/s 64 slots of 4B take 92 us a layer. Time on a GPU: not measured yet (`python -m
bench.kernels --only delta_step`).

The ring holds the last w rows of m: a step writes row t % w and reads the others, so that programs
that share a key head don't race.

Shapes: S slots; K key heads, V value heads, D width of a key, E of a value; C = 2 K D + V E
channels: queries, keys, values; w taps.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import on_triton, tl, triton
from kernels.delta_rule import unit
from kernels.gated_norm import reference_gated_norm


@dataclass
class StepWeights:
    """What a step reads of a layer beside its projections."""

    conv: Tensor  # (C, w), the oldest tap first
    A_log: Tensor  # (V,)
    dt_bias: Tensor  # (V,)
    norm: Tensor  # (E,)
    eps: float
    key_heads: int


def log_decay(a: Tensor, A_log: Tensor, dt_bias: Tensor) -> Tensor:
    """Return g (..., V), the log of what a head keeps of its state, in fp32 (or fp64)."""
    wide = torch.promote_types(a.dtype, torch.float32)
    return -A_log.to(wide).exp() * F.softplus(a.to(wide) + dt_bias.to(wide))


def reference_delta_step(
    mixed: Tensor,
    z: Tensor,
    b: Tensor,
    a: Tensor,
    weights: StepWeights,
    state: Tensor,
    ring: Tensor,
    place: Tensor,
    ended: Tensor,
) -> Tensor:
    """Specify `delta_step`, in plain PyTorch."""
    slots, heads, key_width, width = state.shape
    taps = ring.shape[1]
    live = ~ended

    # The ring's rows from the oldest to the new one.
    slot = torch.arange(slots, device=mixed.device)
    # The new row takes the place of the one that is w tokens old, which nobody reads any more.
    newest = place % taps
    ring[slot, newest] = torch.where(live[:, None], mixed, ring[slot, newest])
    rows = (place[:, None] + torch.arange(1, taps + 1, device=mixed.device)) % taps
    window = ring[slot[:, None], rows].to(state.dtype)  # (S, w, C)
    window[:, -1] = mixed
    convolved = F.silu((window * weights.conv.T).sum(1))

    keys = weights.key_heads * key_width
    q, k, v = convolved.split((keys, keys, heads * width), 1)
    repeat = heads // weights.key_heads
    # (S, V, D): key head j serves value heads j V / K and on.
    q = unit(q.unflatten(1, (-1, key_width))).repeat_interleave(repeat, 1) * key_width**-0.5
    k = unit(k.unflatten(1, (-1, key_width))).repeat_interleave(repeat, 1)
    v = v.unflatten(1, (-1, width))

    beta = b.to(state.dtype).sigmoid()
    g = log_decay(a, weights.A_log, weights.dt_bias)
    # The prediction is taken after the decay, the output after the update.
    decayed = state * g.exp()[..., None, None]
    predicted = (k[:, :, None] @ decayed)[:, :, 0]  # (S, V, E)
    correction = beta[..., None] * (v - predicted)
    updated = decayed + k[..., None] * correction[:, :, None]
    out = (q[:, :, None] @ updated)[:, :, 0]
    state.copy_(torch.where(live[:, None, None, None], updated, state))
    normed = reference_gated_norm(out.to(mixed.dtype), z, weights.norm, weights.eps)
    return normed.flatten(1)


@triton.jit
def _convolved(mixed, ring, weight, c, mask, newest, channels, writes, TAPS: tl.constexpr):
    """Return silu of the convolution at channels c (WIDE,), and write the new row of the ring."""
    # The token's own row comes from the projection: the ring may not have it yet.
    x = tl.load(mixed + c, mask=mask, other=0.0)
    w = tl.load(weight + c * TAPS + TAPS - 1, mask=mask, other=0.0).to(tl.float32)
    total = x.to(tl.float32) * w
    for back in tl.static_range(1, TAPS):
        # + TAPS: the remainder of a negative number would be negative.
        row = (newest + TAPS - back) % TAPS
        earlier = tl.load(ring + row * channels + c, mask=mask, other=0.0).to(tl.float32)
        w = tl.load(weight + c * TAPS + TAPS - 1 - back, mask=mask, other=0.0).to(tl.float32)
        total += earlier * w
    tl.store(ring + newest * channels + c, x, mask=mask & writes)
    # silu(x) = x sigmoid(x).
    return total / (1 + tl.exp(-total))


@triton.jit
def _delta_step_kernel(
    mixed,
    z,
    b,
    a,
    conv,
    A_log,
    dt_bias,
    norm,
    state,
    ring,
    place,
    ended,
    out,
    mixed_slot,
    z_slot,
    b_slot,
    a_slot,
    eps,
    scale,
    key_heads: tl.constexpr,
    heads: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    WIDE_D: tl.constexpr,
    WIDE_E: tl.constexpr,
    TAPS: tl.constexpr,
):
    """Take one value head of one slot. mixed_slot and so on: from a slot to the next."""
    slot = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    if tl.load(ended + slot) == 0:
        # constexpr, so that the divisions below are shifts where the ratio is a power of two; in
        # 27B it is 3.
        repeat: tl.constexpr = heads // key_heads
        channels: tl.constexpr = 2 * key_heads * D + heads * E
        i = tl.arange(0, WIDE_D)
        j = tl.arange(0, WIDE_E)
        newest = (tl.load(place + slot) % TAPS).to(tl.int32)
        mixed += slot * mixed_slot
        ring += slot * TAPS * channels

        # Several value heads read one key head; the first of them writes it to the ring.
        key_head = head // repeat
        first = head % repeat == 0
        # Channels of a row: all queries, then all keys, then all values.
        c = key_head * D + i
        q = _convolved(mixed, ring, conv, c, i < D, newest, channels, first, TAPS)
        c += key_heads * D
        k = _convolved(mixed, ring, conv, c, i < D, newest, channels, first, TAPS)
        c_value = 2 * key_heads * D + head * E + j
        v = _convolved(mixed, ring, conv, c_value, j < E, newest, channels, True, TAPS)
        q = q * (tl.rsqrt(tl.sum(q * q, 0) + 1e-6) * scale)
        k = k * tl.rsqrt(tl.sum(k * k, 0) + 1e-6)

        beta = 1 / (1 + tl.exp(-tl.load(b + slot * b_slot + head).to(tl.float32)))
        x = tl.load(a + slot * a_slot + head).to(tl.float32)
        x += tl.load(dt_bias + head).to(tl.float32)
        # log(1 + e^x), which is x itself where e^x would swallow the 1.
        softplus = tl.where(x > 20, x, tl.log(1 + tl.exp(tl.minimum(x, 20.0))))
        # e^g: the header's g, and its exponential.
        kept = tl.exp(-tl.exp(tl.load(A_log + head).to(tl.float32)) * softplus)

        # (WIDE_D, WIDE_E): the state of this head, keys down and values across.
        at = ((slot * heads + head) * D + i)[:, None] * E + j[None, :]
        inside = (i < D)[:, None] & (j < E)[None, :]
        # All of a head's memory at once: 128 x 128 floats over 8 warps are 64 registers a thread.
        S = tl.load(state + at, mask=inside, other=0.0) * kept
        # S^T k as a sum of products: a matrix product would need 16 rows for one vector.
        predicted = tl.sum(S * k[:, None], 0)
        S += k[:, None] * (beta * (v - predicted))[None, :]
        # fp32: in 16 bits the small corrections of a thousand tokens would be rounded away.
        tl.store(state + at, S, mask=inside)
        o = tl.sum(S * q[:, None], 0)

        # The norm needs the whole head, which is why a program holds one.
        gain = tl.load(norm + j, mask=j < E, other=0.0).to(tl.float32)
        gain *= tl.rsqrt(tl.sum(o * o, 0) / E + eps)
        gate = tl.load(z + slot * z_slot + head * E + j, mask=j < E, other=0.0).to(tl.float32)
        gate = gate / (1 + tl.exp(-gate))
        tl.store(out + (slot * heads + head) * E + j, o * gain * gate, mask=j < E)


def delta_step(
    mixed: Tensor,
    z: Tensor,
    b: Tensor,
    a: Tensor,
    weights: StepWeights,
    state: Tensor,
    ring: Tensor,
    place: Tensor,
    ended: Tensor,
) -> Tensor:
    """Take a token in every slot: return y (S, V E); state and ring move on in place.

    mixed (S, C), z (S, V, E), b and a (S, V): the token's projections, parts of a joint product or
    not; state (S, V, D, E) fp32; ring (S, w, C); place (S,) int64: which token of its slot this is;
    ended (S,) bool: slots that are left as they are, whose y means nothing. No gradients.
    """
    if not on_triton(mixed) or mixed.dtype == torch.float64:
        return reference_delta_step(mixed, z, b, a, weights, state, ring, place, ended)
    slots, heads, key_width, width = state.shape
    out = mixed.new_empty(slots, heads * width)
    _delta_step_kernel[slots, heads](
        mixed,
        z,
        b,
        a,
        weights.conv,
        weights.A_log,
        weights.dt_bias,
        weights.norm,
        state,
        ring,
        place,
        ended,
        out,
        mixed.stride(0),
        z.stride(0),
        b.stride(0),
        a.stride(0),
        weights.eps,
        key_width**-0.5,
        key_heads=weights.key_heads,
        heads=heads,
        D=key_width,
        E=width,
        WIDE_D=triton.next_power_of_2(key_width),
        WIDE_E=triton.next_power_of_2(width),
        TAPS=ring.shape[1],
        num_warps=8,
    )
    return out
