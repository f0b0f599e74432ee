"""Attention of a decode step: one new query a slot, prompts' keys stored and read once.

    out(q) = softmax( q [K_prompt ; K_own]^T / sqrt(D) ) [V_prompt ; V_own]

The slots that hold samples of one prompt share its keys. For 8 samples with r keys of their own, a
step reads P + 8 r keys instead of 8 (P + r). The two parts, on a GPU splits of them, are computed
on their own and merged by log-sum-exp:

    out = sum_i w_i out_i,    w_i = exp(lse_i - lse),    lse = log sum_i exp(lse_i)

On a GPU one launch takes the prompts' keys in splits; a second one takes the slots' own, and merges
the prompts' parts in; where a slot's own keys are in splits too, a third one merges those. On a CPU
it is a call of PyTorch's flash attention for each part. What share of the bandwidth the kernels
reach is not measured yet (`python -m bench.kernels --only decode_attention`).

Shapes: S slots, B prompts with at most n slots each; A query heads, K key-value heads (A a multiple
of K), D head width; P and R: room of a prompt and of a sample's own keys in the cache.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import interpreted, on_triton, tl, triton

# (out, log-sum-exp)
FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
# Added to a score: it leaves exactly nothing, and unlike -inf no NaN where all are hidden.
HIDDEN = -1e30
MULTIPROCESSORS = 132  # of an H100 and an H200
MAX_SPLITS = 16  # of a prompt: the suffix's kernel takes in one after the other
# Keys, and at most so many queries, of a tile; the interpreter pays by the element.
BLOCK = 64
MAX_ROWS = 64
INTERPRETED_BLOCK = 16
INTERPRETED_MAX_ROWS = 32
# The fewest keys of a split. A prompt's 128 are 64 KB that are read, for 32 KB of fp32 parts that
# 64 queries write: with half as many both would be equal. A suffix's second split costs a launch,
# the merge.
MIN_PREFIX_KEYS = 128
MIN_SUFFIX_KEYS = 256
INTERPRETED_MIN_KEYS = 16


@dataclass
class Table:
    """Which slots share which prompt, and how full the caches are: one for all layers of a step."""

    prefix_lengths: Tensor  # (B,) int64
    suffix_lengths: Tensor  # (S,) int64, with the token of this step
    members: Tensor  # (B, n) int64: the slots of each prompt, -1 where there is none; no slot twice
    # (S,) int64: where a slot stands in members.flatten(); any place for a slot without prompt
    member_index: Tensor
    # What hides the room behind the lengths: a CPU's first layer makes it for all.
    prefix_mask: Tensor | None = None  # (B, 1, 1, P)
    suffix_mask: Tensor | None = None  # (S, 1, 1, R)


def length_mask(lengths: Tensor, keys: Tensor) -> Tensor:
    """Return (X, 1, 1, Y): 0 for the keys (X, K, Y, D) within the lengths (X,), else HIDDEN."""
    place = torch.arange(keys.shape[2], device=keys.device)
    behind = place >= lengths[:, None, None, None]
    mask = torch.zeros(behind.shape, dtype=keys.dtype, device=keys.device)
    return mask.masked_fill_(behind, HIDDEN)


def reference_decode_attention(
    q: Tensor, prefix_k: Tensor, prefix_v: Tensor, suffix_k: Tensor, suffix_v: Tensor, table: Table
) -> Tensor:
    """Specify `decode_attention`: each slot gets a copy of its prompt's keys."""
    prompt = table.member_index // table.members.shape[1]  # (S,)
    k = torch.cat((prefix_k[prompt], suffix_k), 2)
    v = torch.cat((prefix_v[prompt], suffix_v), 2)
    prefix_mask = length_mask(table.prefix_lengths, prefix_k)[prompt]
    suffix_mask = length_mask(table.suffix_lengths, suffix_k)
    mask = torch.cat((prefix_mask, suffix_mask), 3)
    q = q.unflatten(1, (k.shape[1], -1)) * q.shape[-1] ** -0.5  # (S, K, A / K, D)
    # (S, K, A / K, P + R); the softmax in fp32, as flash attention has it in its registers.
    weights = (q @ k.transpose(2, 3) + mask).softmax(-1, dtype=torch.float32)
    return (weights.to(v.dtype) @ v).flatten(1, 2)


# ---- Decoding on a CPU


def _decode_cpu(q, prefix_k, prefix_v, suffix_k, suffix_v, table):
    """Attend to the samples' own keys and to the prompts', a call each, and merge.

    All heads and samples that read a prompt's keys are the rows of one matrix, so that it is read
    once.
    """
    if table.suffix_mask is None:
        table.suffix_mask = length_mask(table.suffix_lengths, suffix_k)
    grouped = q.unflatten(1, (suffix_k.shape[1], -1))  # (S, K, A / K, D)
    # Query heads of a key head stand as rows of one sequence: (S, K, A / K, D), lse (S, K, A / K).
    own, own_lse = FLASH(grouped, suffix_k, suffix_v, attn_mask=table.suffix_mask)
    if prefix_k is None:
        return own.flatten(1, 2)

    if table.prefix_mask is None:
        table.prefix_mask = length_mask(table.prefix_lengths, prefix_k)
    prompts, n = table.members.shape
    # Places without a slot (-1) read slot 0's query, for nobody: no live slot takes the result.
    readers = grouped.index_select(0, table.members.flatten().clamp(min=0))
    # (B n, K, A / K, D) -> (B, K, n A / K, D): all that read the same keys are rows of one matrix.
    queries = readers.unflatten(0, (prompts, n)).transpose(1, 2).flatten(2, 3)
    shared, shared_lse = FLASH(queries, prefix_k, prefix_v, attn_mask=table.prefix_mask)

    def by_slot(t):  # (B, K, n A / K, X) -> (S, K, A / K, X)
        t = t.unflatten(2, (n, -1)).transpose(1, 2).flatten(0, 1)
        return t.index_select(0, table.member_index)

    # Of two parts, a weight is the sigmoid of the difference: in fp32, for 16 bits, too.
    weight = (by_slot(shared_lse[..., None]) - own_lse[..., None]).sigmoid_()
    # own + w (shared - own): the header's merge of two parts.
    out = torch.lerp(own.to(weight.dtype), by_slot(shared).to(weight.dtype), weight)
    return out.to(q.dtype).flatten(1, 2)


# ---- Decoding on a GPU


def splits_for(programs: int, length: int, min_keys: int) -> tuple[int, int]:
    """Return into how many splits to cut rows of `length` keys, and how many keys a split has.

    programs: how many there would be if nothing were cut. Splits make about one for each
    multiprocessor of them: to the nearest, as two and more fit on one, so that a few too many don't
    wait for a second round. There are at most MAX_SPLITS, and none has fewer than min_keys keys.
    """
    # Rounded to the nearest: 132 multiprocessors over 100 programs are one split, over 80 two.
    wanted = max((MULTIPROCESSORS + programs // 2) // programs, 1)
    pieces = max(triton.cdiv(length, min_keys), 1)
    # In whole pieces, so that only the last split is shorter than the others.
    chunk = triton.cdiv(pieces, min(wanted, pieces, MAX_SPLITS)) * min_keys
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
        # (BLOCK, WIDE): the keys of a head lie one behind the other.
        at = j[:, None] * D + d[None, :]
        mask = (j < end)[:, None] & (d < D)[None, :]
        key = tl.load(k + at, mask=mask, other=0.0)
        value = tl.load(v + at, mask=mask, other=0.0)
        if UPCAST:
            key = key.to(tl.float32)
            value = value.to(tl.float32)
        # -inf, not HIDDEN: a block has at least one key, so that the peak is finite.
        score = tl.dot(query, key.trans(), input_precision="ieee") * scale
        score = tl.where((j < end)[None, :], score, -float("inf"))
        # Online softmax: what was summed before is scaled to the new maximum.
        higher = tl.maximum(peak, tl.max(score, 1))
        weight = tl.exp(score - higher[:, None])
        shrink = tl.exp(peak - higher)
        total = total * shrink + tl.sum(weight, 1)
        # Weights are rounded to the values' type for the tensor cores, as flash attention does;
        # their sum isn't. ieee: fp32 inputs would go through TF32 otherwise, with 10 bits.
        weighted = tl.dot(weight.to(value.dtype), value, input_precision="ieee")
        summed = summed * shrink[:, None] + weighted
        peak = higher
    return peak, total, summed


@triton.jit
def _load_query(q, at, rows, D: tl.constexpr, WIDE: tl.constexpr, UPCAST: tl.constexpr):
    """Load queries `at` (ROWS,) of S * A as (ROWS, WIDE): 0 outside of `rows` and behind D."""
    d = tl.arange(0, WIDE)
    mask = rows[:, None] & (d < D)[None, :]
    query = tl.load(q + at[:, None] * D + d[None, :], mask=mask, other=0.0)
    return query.to(tl.float32) if UPCAST else query


@triton.jit
def _store_part(out, lse, part, rows, peak, total, summed, D: tl.constexpr, WIDE: tl.constexpr):
    """Store an online softmax's output and, where there is an lse, its log-sum-exp.

    0 and -inf where there was no key.
    """
    d = tl.arange(0, WIDE)
    mask = rows[:, None] & (d < D)[None, :]
    # No key, no sum: summed is 0 then, and 0 / 1 is 0 where 0 / 0 would be nan in every merge.
    divisor = tl.where(total > 0, total, 1.0)
    tl.store(out + part[:, None] * D + d[None, :], summed / divisor[:, None], mask=mask)
    if lse is not None:
        part_lse = tl.where(total > 0, peak + tl.log(divisor), -float("inf"))
        tl.store(lse + part, part_lse, mask=rows)


@triton.jit
def _merge_parts(
    out,
    lse,
    at,
    rows,
    D: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Take the online softmax over the SPLITS finished parts of queries `at` (ROWS,) of S * A.

    A part counts like one key, whose score is its log-sum-exp and whose value is its output.
    """
    d = tl.arange(0, WIDE)
    peak = tl.full([ROWS], -1e38, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    summed = tl.zeros([ROWS, WIDE], tl.float32)
    # The peak starts at a finite number: a part without keys scores -inf, and -inf - -inf is nan.
    # Unrolled, so that all loads are on their way before the first is used.
    for part in tl.static_range(SPLITS):
        place = at * SPLITS + part
        score = tl.load(lse + place, mask=rows, other=-float("inf"))
        mask = rows[:, None] & (d < D)[None, :]
        value = tl.load(out + place[:, None] * D + d[None, :], mask=mask, other=0.0)
        higher = tl.maximum(peak, score)
        weight = tl.exp(score - higher)
        shrink = tl.exp(peak - higher)
        total = total * shrink + weight
        summed = summed * shrink[:, None] + value * weight[:, None]
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
    row_stride,
    head_stride,
    q_heads: tl.constexpr,
    kv_heads: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Attend to one split of one prompt's keys, read once by the queries of its N slots.

    Program (prompt * K + head, split, block of queries). Each slot of the prompt gets the part's
    output, in out (S, A, splits, D), and its log-sum-exp, in lse (S, A, splits): 0 and -inf for a
    split without keys.
    """
    # int64: the cache may hold more than 2^31 elements.
    row = (tl.program_id(0) // kv_heads).to(tl.int64)
    head = tl.program_id(0) % kv_heads
    split = tl.program_id(1)
    group: tl.constexpr = q_heads // kv_heads
    # Rows are (sample of the prompt, query head of this key head), so that all of them read the
    # same keys: N * A / K rows a key instead of one.
    i = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    slot = tl.load(members + row * N + i // group, mask=i < N * group, other=-1)
    rows = slot >= 0
    # Of rows without a slot this is negative; they are masked wherever it is used.
    at = slot.to(tl.int32) * q_heads + head * group + i % group  # (ROWS,) of S * A
    query = _load_query(q, at, rows, D, WIDE, UPCAST)

    # Rows of the buffers without a live sample read nothing.
    begin = split * chunk
    end = tl.minimum(tl.load(lengths + row).to(tl.int32), begin + chunk)
    any_query = tl.max(rows.to(tl.int32), 0) > 0
    end = tl.where(any_query, end, begin)
    peak = tl.full([ROWS], -1e38, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    summed = tl.zeros([ROWS, WIDE], tl.float32)
    first_key = row * row_stride + head * head_stride
    k += first_key
    v += first_key
    peak, total, summed = _attend_keys(
        query, k, v, begin, end, scale, peak, total, summed, D, WIDE, BLOCK, UPCAST
    )

    part = at * tl.num_programs(1) + split
    _store_part(out, lse, part, rows, peak, total, summed, D, WIDE)


@triton.jit
def _suffix_kernel(
    q,
    k,
    v,
    lengths,
    members,
    member_index,
    prefix_out,
    prefix_lse,
    out,
    lse,
    scale,
    chunk,
    row_stride,
    head_stride,
    q_heads: tl.constexpr,
    kv_heads: tl.constexpr,
    D: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PREFIX_SPLITS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Attend to one split of one slot's own keys. Program (slot * K + head, split).

    The first split starts from the parts that `_prefix_kernel` left, which is a launch before this
    one. With a single split (lse None) out (S, A, D) is the result; with several it is
    (S, A, splits, D), to be merged with lse (S, A, splits).
    """
    slot = (tl.program_id(0) // kv_heads).to(tl.int64)
    head = tl.program_id(0) % kv_heads
    split = tl.program_id(1)
    group: tl.constexpr = q_heads // kv_heads
    i = tl.arange(0, ROWS)
    rows = i < group
    at = slot * q_heads + head * group + i  # (ROWS,) of S * A
    query = _load_query(q, at, rows, D, WIDE, UPCAST)

    # There are no parts of a slot without a prompt, whose member_index is another's place.
    # member_index: where in `members` this slot should stand; it does if its prompt is live.
    member = tl.load(members + tl.load(member_index + slot))
    has_parts = (member == slot) & (split == 0)
    peak, total, summed = _merge_parts(
        prefix_out, prefix_lse, at, rows & has_parts, D, WIDE, ROWS, PREFIX_SPLITS
    )

    begin = split * chunk
    end = tl.minimum(tl.load(lengths + slot).to(tl.int32), begin + chunk)
    first_key = slot * row_stride + head * head_stride
    k += first_key
    v += first_key
    peak, total, summed = _attend_keys(
        query, k, v, begin, end, scale, peak, total, summed, D, WIDE, BLOCK, UPCAST
    )

    part = at * tl.num_programs(1) + split
    _store_part(out, lse, part, rows, peak, total, summed, D, WIDE)


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


def _constants(q: Tensor, k: Tensor) -> dict:
    """Return what both kernels are compiled for."""
    d = q.shape[2]
    return dict(
        q_heads=q.shape[1],
        kv_heads=k.shape[1],
        D=d,
        WIDE=max(triton.next_power_of_2(d), 16),
        BLOCK=INTERPRETED_BLOCK if interpreted() else BLOCK,
        UPCAST=interpreted() and q.dtype != torch.float32,  # the interpreter's dot takes no bf16
        num_warps=4,
    )


def _empty_parts(q: Tensor, splits: int) -> tuple[Tensor, Tensor]:
    """Return room for outputs (S, A, splits, D) and log-sum-exps (S, A, splits), in fp32."""
    slots, q_heads, d = q.shape
    out = q.new_empty(slots, q_heads, splits, d, dtype=torch.float32)
    return out, out.new_empty(slots, q_heads, splits)


def _attend_prefixes(q, k, v, table):
    """Return the parts of the prompts' splits for each slot: outputs and log-sum-exps."""
    slots, q_heads, d = q.shape
    prompts, kv_heads, room, _ = k.shape
    n = table.members.shape[1]
    queries = n * q_heads // kv_heads
    # 64 queries of 256 channels (Qwen3.5) don't fit into the registers.
    max_rows = MAX_ROWS if d <= 128 else MAX_ROWS // 2
    if interpreted():
        max_rows = INTERPRETED_MAX_ROWS
    rows = triton.next_power_of_2(min(max(queries, 16), max_rows))
    query_blocks = triton.cdiv(queries, rows)
    # Of the prompts in the buffers so many are read, if all n samples of a prompt are live.
    # The other rows hold no live sample, and their programs end at once.
    live = triton.cdiv(slots, n)
    min_keys = INTERPRETED_MIN_KEYS if interpreted() else MIN_PREFIX_KEYS
    splits, chunk = splits_for(live * kv_heads * query_blocks, room, min_keys)
    out, lse = _empty_parts(q, splits)
    _prefix_kernel[prompts * kv_heads, splits, query_blocks](
        q,
        k,
        v,
        table.prefix_lengths,
        table.members,
        out,
        lse,
        d**-0.5,
        chunk,
        *k.stride()[:2],
        N=n,
        ROWS=rows,
        **_constants(q, k),
    )
    return out, lse


def _attend_suffixes(q, k, v, table, prefix_out, prefix_lse):
    """Return the result (S, A, D), of the slots' own keys and the prompts' parts."""
    slots, q_heads, d = q.shape
    _, kv_heads, room, _ = k.shape
    min_keys = INTERPRETED_MIN_KEYS if interpreted() else MIN_SUFFIX_KEYS
    splits, chunk = splits_for(slots * kv_heads, room, min_keys)
    result = torch.empty_like(q)
    out, lse = (result, None) if splits == 1 else _empty_parts(q, splits)
    constants = _constants(q, k)
    _suffix_kernel[slots * kv_heads, splits](
        q,
        k,
        v,
        table.suffix_lengths,
        table.members,
        table.member_index,
        prefix_out,
        prefix_lse,
        out,
        lse,
        d**-0.5,
        chunk,
        *k.stride()[:2],
        ROWS=max(triton.next_power_of_2(q_heads // kv_heads), 16),
        PREFIX_SPLITS=prefix_lse.shape[2],
        **constants,
    )
    if splits > 1:
        _merge_kernel[(slots * q_heads,)](
            out,
            lse,
            result,
            splits,
            D=d,
            WIDE=constants["WIDE"],
            SPLITS=triton.next_power_of_2(splits),
            num_warps=4,
        )
    return result


def _decode_triton(q, prefix_k, prefix_v, suffix_k, suffix_v, table):
    slots = len(q)
    prompts = len(table.members)
    if not (len(suffix_k) == len(suffix_v) == slots and len(prefix_k) == len(prefix_v) == prompts):
        # The kernels would read past the smaller one.
        raise ValueError(
            f"{slots} queries, {len(suffix_k)} suffixes; {len(prefix_k)} prompts, {prompts} in the "
            f"table"
        )
    if prefix_k.stride() != prefix_v.stride() or suffix_k.stride() != suffix_v.stride():
        raise ValueError("keys and values need equal strides")
    q = q.contiguous()
    prefix_out, prefix_lse = _attend_prefixes(q, prefix_k, prefix_v, table)
    return _attend_suffixes(q, suffix_k, suffix_v, table, prefix_out, prefix_lse)


def decode_attention(
    q: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    suffix_k: Tensor,
    suffix_v: Tensor,
    table: Table,
) -> Tensor:
    """Attend with q (S, A, D); return (S, A, D). Rows of slots without a prompt mean nothing.

    prefix_k, prefix_v (B, K, P, D); suffix_k, suffix_v (S, K, R, D): entries behind the table's
    lengths are finite, the last two axes contiguous, the strides of keys and values equal. Without
    Triton there may be no prefix (None). No gradients.
    """
    decode = _decode_triton if on_triton(q) else _decode_cpu
    return decode(q, prefix_k, prefix_v, suffix_k, suffix_v, table)
