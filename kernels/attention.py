"""Attention over a prompt that many completions share, in training and in decoding.

    out(q) = softmax( q [K_prefix ; K_own]^T / sqrt(D) ) [V_prefix ; V_own],    causal within the own part

`prefix_attention` is the trainer's: packed segments, each with at most one earlier segment as its
prefix. G completions of a prompt cost P + G R tokens instead of G (P + R), and the questions of one
image share that image. `decode_attention` is the sampler's: one new query a slot; a prompt's keys
are stored, and read, once for all slots that hold its samples. Why that pays: at P = 700, R = 300,
G = 8 the packed form has 2.58 times fewer tokens, and a decode step of 8 samples reads 700 + 8 r
keys instead of 8 (700 + r).

Decoding computes the two parts, on a GPU splits of them, on their own and merges by log-sum-exp:

    out = sum_i w_i out_i,    w_i = exp(lse_i - lse),    lse = log sum_i exp(lse_i)

In training all segments are one call of flash attention on CUDA (packed_attention.py); elsewhere a
segment is one call of PyTorch's attention over its prefix and itself, with the causal mask at the
lower right. Both copy a prompt's keys for each of its completions. The form without copies, in
which all completions ask the prompt in one call and are merged with their own part as above, isn't
written: its gain is not measured.

T packed tokens; S slots, B prompts with at most n slots each; A query heads, K key-value heads (A a
multiple of K), D head width; P and R: room of a prefix and of a suffix.
"""

import os
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from kernels.packed_attention import Packing, Segment, flash_prefix_attention, takes_flash

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default  # (out, log-sum-exp)
# added to a score: it leaves exactly nothing, and unlike -inf no NaN where all are hidden
HIDDEN = -1e30
MULTIPROCESSORS = 132  # of an H100 and an H200
MOST_SPLITS = 16  # of a prompt: the suffix's kernel takes in one after the other
BLOCK, MOST_ROWS = (16, 32) if INTERPRET else (64, 64)  # keys, and queries, of a tile
# The fewest keys of a split. A prompt's 128 are 64 KB that are read, for 32 KB of fp32 parts that
# 64 queries write: with half as many both would be equal. A suffix's second split costs a launch,
# the merge.
PREFIX_LEAST, SUFFIX_LEAST = (16, 16) if INTERPRET else (128, 256)


def reference_prefix_attention(q: Tensor, k: Tensor, v: Tensor, segments: list[Segment]) -> Tensor:
    """q (T, A, D), k and v (T, K, D), rotated; segments tile [0, T) in order. Returns (T, A, D)."""
    # One split, not a slice a segment: a slice's backward fills a whole (T, K, D) gradient, T / L
    # times.
    lengths = [end - start for start, end, _, _ in segments]
    # (A or K, L, D)
    parts = zip(*(t.transpose(0, 1).split(lengths, 1) for t in (q, k, v)), strict=True)
    out, masks, seen = [], {}, {}
    for (start, _, prefix_start, prefix_end), (query, key, value) in zip(
        segments, parts, strict=True
    ):
        seen[start], prefix, mask = (key, value), prefix_end - prefix_start, None
        if prefix:
            before, length = seen[prefix_start], query.shape[1]
            key, value = torch.cat((before[0], key), 1), torch.cat((before[1], value), 1)
            # CUDA's flash attention takes no mask, but knows this one
            if (length, prefix) not in masks:
                masks[length, prefix] = (
                    causal_lower_right(length, prefix + length)
                    if q.is_cuda
                    else q.new_ones(length, prefix + length, dtype=torch.bool).tril(prefix)
                )
            mask = masks[length, prefix]
        attended = F.scaled_dot_product_attention(
            query[None],
            key[None],
            value[None],
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=len(query) != len(key),
        )
        out.append(attended[0])
    return torch.cat(out, 1).transpose(0, 1) if out else q


@dataclass
class Table:
    """Which slots share which prompt, and how full the caches are: the same for all layers of a
    step."""

    prefix_lengths: Tensor  # (B,) int64
    suffix_lengths: Tensor  # (S,) int64, with the token of this step
    members: Tensor  # (B, n) int64: the slots of each prompt, -1 where there is none; no slot twice
    # (S,) int64: where a slot stands in members.flatten(); any place for a slot without
    # prompt
    home: Tensor

    @cached_property
    def readers(self) -> Tensor:
        return self.members.flatten().clamp(min=0)

    def mask(self, lengths: Tensor, like: Tensor) -> Tensor:
        """0 for the keys of `like` (X, K, Y, D) that exist, HIDDEN for those behind them: (X, 1, 1,
        Y)."""
        behind = torch.arange(like.shape[2], device=like.device) >= lengths[:, None, None, None]
        return torch.zeros(behind.shape, dtype=like.dtype, device=like.device).masked_fill_(
            behind, HIDDEN
        )

    def masks(self, prefix: Tensor | None, suffix: Tensor) -> list[Tensor | None]:
        """Those of (B, K, P, D) and (S, K, R, D), made for the first layer of a step."""
        if "_masks" not in vars(self):
            pairs = (self.prefix_lengths, prefix), (self.suffix_lengths, suffix)
            self._masks = [
                None if keys is None else self.mask(lengths, keys) for lengths, keys in pairs
            ]
        return self._masks


def reference_decode_attention(
    q: Tensor, prefix_k: Tensor, prefix_v: Tensor, suffix_k: Tensor, suffix_v: Tensor, table: Table
) -> Tensor:
    """q (S, A, D); prefix_k, prefix_v (B, K, P, D); suffix_k, suffix_v (S, K, R, D), whose entries
    behind the table's lengths are finite. Returns (S, A, D); rows of slots without a prompt mean
    nothing."""
    prompt = table.home // table.members.shape[1]  # (S,)
    k, v = torch.cat((prefix_k[prompt], suffix_k), 2), torch.cat((prefix_v[prompt], suffix_v), 2)
    masks = (
        table.mask(table.prefix_lengths, prefix_k)[prompt],
        table.mask(table.suffix_lengths, suffix_k),
    )
    q = q.unflatten(1, (k.shape[1], -1)) * q.shape[-1] ** -0.5  # (S, K, A / K, D)
    weights = (q @ k.transpose(2, 3) + torch.cat(masks, 3)).softmax(-1, dtype=torch.float32)
    return (weights.to(v.dtype) @ v).flatten(1, 2)


def _decode_cpu(q, prefix_k, prefix_v, suffix_k, suffix_v, table):
    """A call for the suffixes and one for the prompts, merged by log-sum-exp. All heads and samples
    that read a prompt's keys are the rows of one matrix, so that it is read once."""
    grouped = q.unflatten(1, (suffix_k.shape[1], -1))  # (S, K, A / K, D)
    prefix_mask, suffix_mask = table.masks(prefix_k, suffix_k)
    own, own_lse = FLASH(grouped, suffix_k, suffix_v, attn_mask=suffix_mask)
    if prefix_k is None:
        return own.flatten(1, 2)
    b, n = table.members.shape

    def by_slot(t):  # (B, K, n A / K, X) -> (S, K, A / K, X)
        t = t.unflatten(2, (n, -1)).transpose(1, 2).flatten(0, 1)
        return t.index_select(0, table.home)

    asked = (
        grouped.index_select(0, table.readers).unflatten(0, (b, n)).transpose(1, 2).flatten(2, 3)
    )
    shared, shared_lse = FLASH(asked, prefix_k, prefix_v, attn_mask=prefix_mask)
    # fp32 in 16 bits, too
    weight = (by_slot(shared_lse[..., None]) - own_lse[..., None]).sigmoid_()
    out = torch.lerp(own.to(weight.dtype), by_slot(shared).to(weight.dtype), weight)
    return out.to(q.dtype).flatten(1, 2)


# ---- Decoding on a GPU: the prompts' keys in splits, then the suffixes', which take in the
# prompts' parts


def splits_for(programs: int, length: int, least: int) -> tuple[int, int]:
    """Return into how many splits to cut rows of `length` keys, and how many keys a split has.

    programs: how many there would be if nothing were cut. Splits make about one for each
    multiprocessor of them: to the nearest, as two and more fit on one, so that a few too many don't
    wait for a second round. There are at most MOST_SPLITS, and none has fewer than `least` keys.
    """
    wanted = max((MULTIPROCESSORS + programs // 2) // programs, 1)
    pieces = max(triton.cdiv(length, least), 1)
    chunk = triton.cdiv(pieces, min(wanted, pieces, MOST_SPLITS)) * least
    return max(triton.cdiv(length, chunk), 1), chunk


@triton.jit
def _attend_keys(
    query,
    k,
    v,
    begin,
    end,
    scale,
    peak,
    total,
    summed,
    D: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Go on with an online softmax of query (ROWS, WIDE) over one head's keys begin .. end - 1.

    peak (ROWS,) is the largest score so far, total (ROWS,) the sum of exp(score - peak), summed
    (ROWS, WIDE) that of exp(score - peak) times value.
    """
    d = tl.arange(0, WIDE)
    for start in range(begin, end, BLOCK):
        j = start + tl.arange(0, BLOCK)
        at = j[:, None] * D + d[None, :]
        mask = (j < end)[:, None] & (d < D)[None, :]
        key = tl.load(k + at, mask=mask, other=0.0)
        value = tl.load(v + at, mask=mask, other=0.0)
        if UPCAST:
            key = key.to(tl.float32)
            value = value.to(tl.float32)
        score = tl.dot(query, key.trans(), input_precision="ieee") * scale
        score = tl.where((j < end)[None, :], score, -float("inf"))
        higher = tl.maximum(peak, tl.max(score, 1))
        weight = tl.exp(score - higher[:, None])
        shrink = tl.exp(peak - higher)
        total = total * shrink + tl.sum(weight, 1)
        weighted = tl.dot(weight.to(value.dtype), value, input_precision="ieee")
        summed = summed * shrink[:, None] + weighted
        peak = higher
    return peak, total, summed


@triton.jit
def _prefix_kernel(
    q,
    k,
    v,
    lengths,
    members,
    out,
    lse,
    scale,
    chunk,
    k_row,
    k_head,
    v_row,
    v_head,
    q_heads: tl.constexpr,
    kv_heads: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One split of one prompt's keys, read once by the queries of its N slots.

    Program (prompt * K + head, split, block of queries). Each slot that asks gets the part's
    output, in out (S, A, splits, D), and its log-sum-exp, in lse (S, A, splits): -inf, and no
    output, for a split without keys.
    """
    row = (tl.program_id(0) // kv_heads).to(tl.int64)
    head = tl.program_id(0) % kv_heads
    split = tl.program_id(1)
    group: tl.constexpr = q_heads // kv_heads
    i = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, WIDE)
    slot = tl.load(members + row * N + i // group, mask=i < N * group, other=-1)
    asked = slot >= 0
    at = slot.to(tl.int32) * q_heads + head * group + i % group  # (ROWS,) of S * A
    query = tl.load(
        q + at[:, None] * D + d[None, :], mask=asked[:, None] & (d < D)[None, :], other=0.0
    )
    query = query.to(tl.float32) if UPCAST else query

    begin = split * chunk
    end = tl.minimum(tl.load(lengths + row).to(tl.int32), begin + chunk)
    somebody_asks = tl.max(asked.to(tl.int32), 0) > 0
    end = tl.where(somebody_asks, end, begin)
    peak = tl.full([ROWS], -1e38, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    summed = tl.zeros([ROWS, WIDE], tl.float32)
    k += row * k_row + head * k_head
    v += row * v_row + head * v_head
    peak, total, summed = _attend_keys(
        query, k, v, begin, end, scale, peak, total, summed, D, WIDE, BLOCK, UPCAST
    )

    part = at * tl.num_programs(1) + split
    divisor = tl.where(total > 0, total, 1.0)
    tl.store(lse + part, tl.where(total > 0, peak + tl.log(divisor), -float("inf")), mask=asked)
    mask = (asked & (total > 0))[:, None] & (d < D)[None, :]
    tl.store(out + part[:, None] * D + d[None, :], summed / divisor[:, None], mask=mask)


@triton.jit
def _suffix_kernel(
    q,
    k,
    v,
    lengths,
    members,
    home,
    prefix_out,
    prefix_lse,
    out,
    lse,
    scale,
    chunk,
    k_row,
    k_head,
    v_row,
    v_head,
    q_heads: tl.constexpr,
    kv_heads: tl.constexpr,
    D: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PREFIX_SPLITS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One split of one slot's own keys. Program (slot * K + head, split).

    The first split starts from what `_prefix_kernel` left: a finished part of a softmax counts like
    one key, whose score is its log-sum-exp and whose value is its output. That kernel is a launch
    before this one, so its parts are there. With a single split (lse None) out (S, A, D) is the
    result; with several it is (S, A, splits, D), to be merged with lse (S, A, splits).
    """
    slot = (tl.program_id(0) // kv_heads).to(tl.int64)
    head = tl.program_id(0) % kv_heads
    split = tl.program_id(1)
    group: tl.constexpr = q_heads // kv_heads
    i = tl.arange(0, ROWS)
    d = tl.arange(0, WIDE)
    at = slot * q_heads + head * group + i  # (ROWS,) of S * A
    mask = (i < group)[:, None] & (d < D)[None, :]
    query = tl.load(q + at[:, None] * D + d[None, :], mask=mask, other=0.0)
    query = query.to(tl.float32) if UPCAST else query

    peak = tl.full([ROWS], -1e38, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    summed = tl.zeros([ROWS, WIDE], tl.float32)
    # Nobody wrote parts for a slot without a prompt, whose home is anybody's place.
    has_parts = (tl.load(members + tl.load(home + slot)) == slot) & (split == 0)
    # Unrolled, so that all loads are on their way before the first is used.
    for part in tl.static_range(PREFIX_SPLITS):
        place = at * PREFIX_SPLITS + part
        score = tl.load(prefix_lse + place, mask=(i < group) & has_parts, other=-float("inf"))
        value = tl.load(
            prefix_out + place[:, None] * D + d[None, :], mask=mask & has_parts, other=0.0
        )
        value = tl.where(
            (score > -float("inf"))[:, None], value, 0.0
        )  # an empty part's output is anything
        higher = tl.maximum(peak, score)
        weight = tl.exp(score - higher)
        shrink = tl.exp(peak - higher)
        total = total * shrink + weight
        summed = summed * shrink[:, None] + value * weight[:, None]
        peak = higher

    begin = split * chunk
    end = tl.minimum(tl.load(lengths + slot).to(tl.int32), begin + chunk)
    k += slot * k_row + head * k_head
    v += slot * v_row + head * v_head
    peak, total, summed = _attend_keys(
        query, k, v, begin, end, scale, peak, total, summed, D, WIDE, BLOCK, UPCAST
    )

    divisor = tl.where(total > 0, total, 1.0)
    part = at * tl.num_programs(1) + split
    tl.store(out + part[:, None] * D + d[None, :], summed / divisor[:, None], mask=mask)
    if lse is not None:
        tl.store(
            lse + part, tl.where(total > 0, peak + tl.log(divisor), -float("inf")), mask=i < group
        )


@triton.jit
def _merge_kernel(
    parts, lse, out, splits, D: tl.constexpr, WIDE: tl.constexpr, SPLITS: tl.constexpr
):
    """A program a slot and query head: its parts (splits, D), weighted by exp(lse)."""
    at = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, SPLITS)
    d = tl.arange(0, WIDE)
    score = tl.load(lse + at * splits + i, mask=i < splits, other=-float("inf"))
    peak = tl.maximum(tl.max(score, 0), -1e38)  # finite where there is no key at all
    weight = tl.exp(score - peak)
    mask = (i < splits)[:, None] & (d < D)[None, :]
    part = tl.load(parts + (at * splits + i)[:, None] * D + d[None, :], mask=mask, other=0.0)
    total = tl.sum(weight, 0)
    merged = tl.sum(part * weight[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(out + at * D + d, merged, mask=d < D)


def _decode_triton(q, prefix_k, prefix_v, suffix_k, suffix_v, table):
    slots, q_heads, d = q.shape
    kv_heads = prefix_k.shape[1]
    n = table.members.shape[1]
    prompts = len(table.members)
    if not (len(suffix_k) == len(suffix_v) == slots and len(prefix_k) == len(prefix_v) == prompts):
        # The kernels would read past the smaller one.
        raise ValueError(
            f"{slots} queries, {len(suffix_k)} suffixes; {len(prefix_k)} prompts, {prompts} in the table"
        )
    group = q_heads // kv_heads
    prefix_rows = triton.next_power_of_2(min(max(n * group, 16), MOST_ROWS))
    query_blocks = triton.cdiv(n * group, prefix_rows)
    # Of the prompts in the buffers so many are read, those whose n samples all live.
    live = triton.cdiv(slots, n)
    prefix_programs = live * kv_heads * query_blocks
    prefix_splits, prefix_chunk = splits_for(prefix_programs, prefix_k.shape[2], PREFIX_LEAST)
    suffix_splits, suffix_chunk = splits_for(slots * kv_heads, suffix_k.shape[2], SUFFIX_LEAST)
    upcast = INTERPRET and q.dtype != torch.float32
    sizes = dict(q_heads=q_heads, kv_heads=kv_heads, D=d, WIDE=max(triton.next_power_of_2(d), 16))
    sizes |= dict(BLOCK=BLOCK, UPCAST=upcast, num_warps=4)

    def parts(splits):
        lse = torch.empty(slots, q_heads, splits, dtype=torch.float32, device=q.device)
        return lse.new_empty(slots, q_heads, splits, d), lse

    q = q.contiguous()
    prefix_out, prefix_lse = parts(prefix_splits)
    _prefix_kernel[prompts * kv_heads, prefix_splits, query_blocks](
        q,
        prefix_k,
        prefix_v,
        table.prefix_lengths,
        table.members,
        prefix_out,
        prefix_lse,
        d**-0.5,
        prefix_chunk,
        *prefix_k.stride()[:2],
        *prefix_v.stride()[:2],
        N=n,
        ROWS=prefix_rows,
        **sizes,
    )
    out = torch.empty_like(q)
    suffix_out, suffix_lse = (out, None) if suffix_splits == 1 else parts(suffix_splits)
    _suffix_kernel[slots * kv_heads, suffix_splits](
        q,
        suffix_k,
        suffix_v,
        table.suffix_lengths,
        table.members,
        table.home,
        prefix_out,
        prefix_lse,
        suffix_out,
        suffix_lse,
        d**-0.5,
        suffix_chunk,
        *suffix_k.stride()[:2],
        *suffix_v.stride()[:2],
        ROWS=max(triton.next_power_of_2(group), 16),
        PREFIX_SPLITS=prefix_splits,
        **sizes,
    )
    if suffix_splits > 1:
        _merge_kernel[(slots * q_heads,)](
            suffix_out,
            suffix_lse,
            out,
            suffix_splits,
            D=d,
            WIDE=sizes["WIDE"],
            SPLITS=triton.next_power_of_2(suffix_splits),
            num_warps=4,
        )
    return out


def decode_attention(
    q: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    suffix_k: Tensor,
    suffix_v: Tensor,
    table: Table,
) -> Tensor:
    """One step of S slots; arguments as for `reference_decode_attention`. The last two axes of the
    keys and values, (room, D), must be contiguous. Without Triton there may be no prefix (None). No
    gradients."""
    decode = _decode_triton if q.is_cuda or INTERPRET else _decode_cpu
    return decode(q, prefix_k, prefix_v, suffix_k, suffix_v, table)


def prefix_attention(q: Tensor, k: Tensor, v: Tensor, segments: list[Segment] | Packing) -> Tensor:
    """Attend as `reference_prefix_attention` does; a Packing, made once, saves what all layers
    share."""
    packing = segments if isinstance(segments, Packing) else Packing(segments, q.device)
    if takes_flash(q):
        return flash_prefix_attention(q, k, v, packing)
    return reference_prefix_attention(q, k, v, packing.segments)
