"""Attention over a prompt that many completions share, in training and in decoding.

    out(q) = softmax( q [K_prefix ; K_own]^T / sqrt(D) ) [V_prefix ; V_own],    causal within the own part

`prefix_attention` is the trainer's: packed segments, each with at most one earlier segment as its prefix. G
completions of a prompt cost P + G R tokens instead of G (P + R), and the questions of one image share that
image. `decode_attention` is the sampler's: one new query a slot; a prompt's keys are stored, and read, once
for all slots that hold its samples. Why that pays: at P = 700, R = 300, G = 8 the packed form has 2.58 times
fewer tokens, and a decode step of 8 samples reads 700 + 8 r keys instead of 8 (700 + r).

Decoding computes the two parts, on a GPU splits of them, on their own and merges by log-sum-exp:

    out = sum_i w_i out_i,    w_i = exp(lse_i - lse),    lse = log sum_i exp(lse_i)

In training all segments are one call of flash attention on CUDA (packed_attention.py); elsewhere a segment
is one call of PyTorch's attention over its prefix and itself, with the causal mask at the lower right. Both
copy a prompt's keys for each of its completions. The form without copies, in which all completions ask the
prompt in one call and are merged with their own part as above, isn't written: its gain is not measured.

T packed tokens; S slots, B prompts with at most n slots each; A query heads, K key-value heads (A a multiple
of K), D head width; P and R: room of a prefix and of a suffix.
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
HIDDEN = -1e30  # added to a score: it leaves exactly nothing, and unlike -inf no NaN where all are hidden


def reference_prefix_attention(q: Tensor, k: Tensor, v: Tensor, segments: list[Segment]) -> Tensor:
    """q (T, A, D), k and v (T, K, D), rotated; segments tile [0, T) in order. Returns (T, A, D)."""
    # One split, not a slice a segment: a slice's backward fills a whole (T, K, D) gradient, T / L times.
    lengths = [end - start for start, end, _, _ in segments]
    parts = zip(*(t.transpose(0, 1).split(lengths, 1) for t in (q, k, v)), strict=True)  # (A or K, L, D)
    out, masks, seen = [], {}, {}
    for (start, _, prefix_start, prefix_end), (query, key, value) in zip(segments, parts, strict=True):
        seen[start], prefix, mask = (key, value), prefix_end - prefix_start, None
        if prefix:
            before, length = seen[prefix_start], query.shape[1]
            key, value = torch.cat((before[0], key), 1), torch.cat((before[1], value), 1)
            if (length, prefix) not in masks:  # CUDA's flash attention takes no mask, but knows this one
                masks[length, prefix] = (
                    causal_lower_right(length, prefix + length) if q.is_cuda
                    else q.new_ones(length, prefix + length, dtype=torch.bool).tril(prefix))  # fmt: skip
            mask = masks[length, prefix]
        attended = F.scaled_dot_product_attention(
            query[None], key[None], value[None], attn_mask=mask, is_causal=mask is None,
            enable_gqa=len(query) != len(key),
        )  # fmt: skip
        out.append(attended[0])
    return torch.cat(out, 1).transpose(0, 1) if out else q


@dataclass
class Table:
    """Which slots share which prompt, and how full the caches are: the same for all layers of a step."""

    prefix_lengths: Tensor  # (B,) int64
    suffix_lengths: Tensor  # (S,) int64, with the token of this step
    members: Tensor  # (B, n) int64: the slots of each prompt, -1 where there is none; no slot twice
    home: Tensor  # (S,) int64: where a slot stands in members.flatten(); any place for a slot without prompt

    @cached_property
    def readers(self) -> Tensor:
        return self.members.flatten().clamp(min=0)

    def mask(self, lengths: Tensor, like: Tensor) -> Tensor:
        """0 for the keys of `like` (X, K, Y, D) that exist, HIDDEN for those behind them: (X, 1, 1, Y)."""
        behind = torch.arange(like.shape[2], device=like.device) >= lengths[:, None, None, None]
        return torch.zeros(behind.shape, dtype=like.dtype, device=like.device).masked_fill_(behind, HIDDEN)

    def masks(self, prefix: Tensor | None, suffix: Tensor) -> list[Tensor | None]:
        """Those of (B, K, P, D) and (S, K, R, D), made for the first layer of a step."""
        if "_masks" not in vars(self):
            pairs = (self.prefix_lengths, prefix), (self.suffix_lengths, suffix)
            self._masks = [None if keys is None else self.mask(lengths, keys) for lengths, keys in pairs]
        return self._masks

    def parts(self, q: Tensor, splits: int) -> tuple[Tensor, Tensor]:
        """Where splits leave their outputs (S, A, splits, D) and log-sum-exps (S, A, splits), -inf at first.
        All layers write to the same places of them, so that only the first of a step has to fill any.
        """
        if "_parts" not in vars(self) or self._parts[0].shape != (*q.shape[:2], splits, q.shape[2]):
            out = q.new_empty(*q.shape[:2], splits, q.shape[2], dtype=torch.float32)
            self._parts = out, torch.full_like(out[..., 0], -torch.inf)
        return self._parts


def reference_decode_attention(
    q: Tensor, prefix_k: Tensor, prefix_v: Tensor, suffix_k: Tensor, suffix_v: Tensor, table: Table
) -> Tensor:
    """q (S, A, D); prefix_k, prefix_v (B, K, P, D); suffix_k, suffix_v (S, K, R, D), whose entries behind the
    table's lengths are finite. Returns (S, A, D); rows of slots without a prompt mean nothing."""
    prompt = table.home // table.members.shape[1]  # (S,)
    k, v = torch.cat((prefix_k[prompt], suffix_k), 2), torch.cat((prefix_v[prompt], suffix_v), 2)
    masks = table.mask(table.prefix_lengths, prefix_k)[prompt], table.mask(table.suffix_lengths, suffix_k)
    q = q.unflatten(1, (k.shape[1], -1)) * q.shape[-1] ** -0.5  # (S, K, A / K, D)
    weights = (q @ k.transpose(2, 3) + torch.cat(masks, 3)).softmax(-1, dtype=torch.float32)
    return (weights.to(v.dtype) @ v).flatten(1, 2)


def _decode_cpu(q, prefix_k, prefix_v, suffix_k, suffix_v, table):
    """A call for the suffixes and one for the prompts, merged by log-sum-exp. All heads and samples that read
    a prompt's keys are the rows of one matrix, so that it is read once."""
    grouped = q.unflatten(1, (suffix_k.shape[1], -1))  # (S, K, A / K, D)
    prefix_mask, suffix_mask = table.masks(prefix_k, suffix_k)
    own, own_lse = FLASH(grouped, suffix_k, suffix_v, attn_mask=suffix_mask)
    if prefix_k is None:
        return own.flatten(1, 2)
    b, n = table.members.shape

    def by_slot(t):  # (B, K, n A / K, X) -> (S, K, A / K, X)
        t = t.unflatten(2, (n, -1)).transpose(1, 2).flatten(0, 1)
        return t.index_select(0, table.home)

    asked = grouped.index_select(0, table.readers).unflatten(0, (b, n)).transpose(1, 2).flatten(2, 3)
    shared, shared_lse = FLASH(asked, prefix_k, prefix_v, attn_mask=prefix_mask)
    weight = (by_slot(shared_lse[..., None]) - own_lse[..., None]).sigmoid_()  # fp32 in 16 bits, too
    out = torch.lerp(own.to(weight.dtype), by_slot(shared).to(weight.dtype), weight)
    return out.to(q.dtype).flatten(1, 2)


@triton.jit
def _split_kernel(q, k, v, lengths, members, out, lse, scale, first, splits, chunk, k_row, k_head, v_row,
                  v_head, q_heads: tl.constexpr, kv_heads: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
                  WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, UPCAST: tl.constexpr):
    """One split of one row's keys, read once by the queries of its N slots: program (row * K + head, split,
    block of queries). Writes the part's output and log-sum-exp for each slot."""
    row, head = (tl.program_id(0) // kv_heads).to(tl.int64), tl.program_id(0) % kv_heads
    group: tl.constexpr = q_heads // kv_heads
    i = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    d, d_mask = tl.arange(0, WIDE), tl.arange(0, WIDE) < D
    slot = row + tl.zeros([ROWS], tl.int64)
    if members is not None:
        slot = tl.load(members + row * N + i // group, mask=i < N * group, other=-1)
    asked = (i < N * group) & (slot >= 0)
    at = slot * q_heads + head * group + i % group  # (ROWS,) of S * A
    query = tl.load(q + at[:, None] * D + d[None, :], mask=asked[:, None] & d_mask[None, :], other=0.0)
    query = query.to(tl.float32) if UPCAST else query
    begin = tl.program_id(1) * chunk
    end = tl.minimum(tl.load(lengths + row).to(tl.int32), begin + chunk)
    end = tl.where(tl.max(asked.to(tl.int32), 0) > 0, end, begin)  # keys that nobody asks aren't read
    peak, total = tl.full([ROWS], -1e38, tl.float32), tl.zeros([ROWS], tl.float32)
    summed = tl.zeros([ROWS, WIDE], tl.float32)
    for start in range(begin, end, BLOCK):
        j = start + tl.arange(0, BLOCK)
        mask = (j < end)[:, None] & d_mask[None, :]
        key = tl.load(k + row * k_row + head * k_head + j[:, None] * D + d[None, :], mask=mask, other=0.0)
        value = tl.load(v + row * v_row + head * v_head + j[:, None] * D + d[None, :], mask=mask, other=0.0)
        if UPCAST:
            key, value = key.to(tl.float32), value.to(tl.float32)
        score = tl.dot(query, key.trans(), input_precision="ieee") * scale
        score = tl.where((j < end)[None, :], score, -float("inf"))
        higher = tl.maximum(peak, tl.max(score, 1))
        weight, shrink = tl.exp(score - higher[:, None]), tl.exp(peak - higher)
        total = total * shrink + tl.sum(weight, 1)
        summed = summed * shrink[:, None] + tl.dot(weight.to(value.dtype), value, input_precision="ieee")
        peak = higher
    part = at * splits + first + tl.program_id(1)
    some = tl.where(total > 0, total, 1.0)
    tl.store(lse + part, tl.where(total > 0, peak + tl.log(some), -float("inf")), mask=asked)
    summed = summed / some[:, None]
    mask = (asked & (total > 0))[:, None] & d_mask[None, :]
    tl.store(out + part[:, None] * D + d[None, :], summed, mask=mask)


@triton.jit
def _merge_kernel(parts, lse, out, splits, D: tl.constexpr, WIDE: tl.constexpr, SPLITS: tl.constexpr):
    """A program a slot and query head: its parts, weighted by exp(lse)."""
    at, i, d = tl.program_id(0).to(tl.int64), tl.arange(0, SPLITS), tl.arange(0, WIDE)
    score = tl.load(lse + at * splits + i, mask=i < splits, other=-float("inf"))
    peak = tl.maximum(tl.max(score, 0), -1e38)
    weight = tl.exp(score - peak)
    mask = (weight > 0)[:, None] & (d < D)[None, :]  # what nobody wrote has no weight, and isn't read
    part = tl.load(parts + (at * splits + i)[:, None] * D + d[None, :], mask=mask, other=0.0)
    merged = tl.sum(part * weight[:, None], 0) / tl.maximum(tl.sum(weight, 0), 1e-38)
    tl.store(out + at * D + d, merged, mask=d < D)


def _decode_triton(q, prefix_k, prefix_v, suffix_k, suffix_v, table):
    (s, q_heads, d), kv_heads, n = q.shape, prefix_k.shape[1], table.members.shape[1]
    if not (len(suffix_k) == len(suffix_v) == s and len(prefix_k) == len(prefix_v) == len(table.members)):
        raise ValueError(f"{s} queries, {len(suffix_k)} suffixes; {len(prefix_k)} prompts, "
                         f"{len(table.members)} in the table")  # the kernel would read past the smaller one
    block, chunk = (16, 16) if INTERPRET else (64, 256)
    prefix_splits, suffix_splits = (max(triton.cdiv(k.shape[2], chunk), 1) for k in (prefix_k, suffix_k))
    splits = prefix_splits + suffix_splits
    parts, lse = table.parts(q, splits)  # a slot without a prompt has no part of a prefix
    sizes = dict(q_heads=q_heads, kv_heads=kv_heads, D=d, WIDE=max(triton.next_power_of_2(d), 16),
                 BLOCK=block, UPCAST=INTERPRET and q.dtype != torch.float32)
    q = q.contiguous()

    def run(k, v, lengths, members, slots, first, count):
        queries = slots * q_heads // kv_heads
        rows = triton.next_power_of_2(min(max(queries, 16), 32 if INTERPRET else 64))
        strides = *k.stride()[:2], *v.stride()[:2]
        _split_kernel[len(k) * kv_heads, count, triton.cdiv(queries, rows)](
            q, k, v, lengths, members, parts, lse, d**-0.5, first, splits, chunk, *strides, N=slots,
            ROWS=rows, **sizes, num_warps=4)

    run(prefix_k, prefix_v, table.prefix_lengths, table.members, n, 0, prefix_splits)
    run(suffix_k, suffix_v, table.suffix_lengths, None, 1, prefix_splits, suffix_splits)
    out = torch.empty_like(q)
    _merge_kernel[(s * q_heads,)](parts, lse, out, splits, D=d, WIDE=sizes["WIDE"],
                                  SPLITS=triton.next_power_of_2(splits), num_warps=4)
    return out


def decode_attention(
    q: Tensor, prefix_k: Tensor | None, prefix_v: Tensor | None, suffix_k: Tensor, suffix_v: Tensor,
    table: Table,
) -> Tensor:  # fmt: skip
    """One step of S slots; arguments as for `reference_decode_attention`. The last two axes of the keys and
    values, (room, D), must be contiguous. Without Triton there may be no prefix (None). No gradients."""
    decode = _decode_triton if q.is_cuda or INTERPRET else _decode_cpu
    return decode(q, prefix_k, prefix_v, suffix_k, suffix_v, table)


def prefix_attention(q: Tensor, k: Tensor, v: Tensor, segments: list[Segment] | Packing) -> Tensor:
    """Attend as `reference_prefix_attention` does; a Packing, made once, saves what all layers share."""
    packing = segments if isinstance(segments, Packing) else Packing(segments, q.device)
    if takes_flash(q):
        return flash_prefix_attention(q, k, v, packing)
    return reference_prefix_attention(q, k, v, packing.segments)
