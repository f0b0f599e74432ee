"""Attention within packed sequences: the trainer's, the prefill's and the vision tower's.

    segment (start, end, prefix_start, prefix_end):
    out(q) = softmax( q [K_prefix ; K_own]^T / sqrt(D) ) [V_prefix ; V_own]
    causal within the own part

A segment has at most one earlier segment as its prefix. G completions of a prompt cost P + G R
tokens instead of G (P + R), and the questions of one image share that image: at P = 700, R = 300,
G = 8 that is 2.58 times fewer.

On CUDA it is one call of flash attention, however many segments there are and however long. A call
of SDPA per completion and layer, with the two concatenations that it needs, made the host the
bottleneck: a pass of 3B over 8 prompts with 8 completions of 100 tokens each took 48,770 launches.
Queries stay as they are packed. Keys and values are gathered, each segment's prefix before its own,
by one index that is made on the host once a batch and serves all layers. Flash's causal mask is
aligned at the lower right, so that every query sees its whole prefix. Grouped heads are the
kernel's business. Elsewhere a segment is one call of PyTorch's attention, with the same mask.

Both copy a prompt's keys for each of its completions. The form without copies, in which all
completions' queries meet the prompt in one call and are merged with their own part by log-sum-exp,
isn't written: its gain is not measured.

A gathered row is read by several sequences, and its gradient is their sum: in fp32, rounded once.
CUDA's own gradient of x[index] rounds to 16 bits after every addition.

Shapes: T packed tokens, A query heads, K key-value heads (A a multiple of K), D head width; N
sequences.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention.bias import causal_lower_right

Segment = tuple[int, int, int, int]  # start, end, prefix_start, prefix_end


def upload(values, device: torch.device | str) -> Tensor:
    """Move values from the host to the device; to CUDA from pinned memory, without a wait."""
    values = torch.as_tensor(values)
    if torch.device(device).type != "cuda" or values.is_cuda:
        return values.to(device)
    # A slice would be gathered in memory that isn't pinned.
    return values.contiguous().pin_memory().to(device, non_blocking=True)


# ---- Rows that several read


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, index):
        ctx.save_for_backward(index)
        ctx.shape = rows.shape
        return rows.index_select(0, index)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (index,) = ctx.saved_tensors  # once: non-reentrant checkpointing allows no second look
        wide = torch.promote_types(grad.dtype, torch.float32)
        total = torch.zeros(ctx.shape, dtype=wide, device=grad.device)
        return total.index_add_(0, index, grad.to(wide)).to(grad.dtype), None


def gather_rows(rows: Tensor, index: Tensor) -> Tensor:
    """rows[index], index (Y,) int64; a row's gradient is summed in fp32, then rounded."""
    return _GatherRows.apply(rows, index)


# ---- The call


@dataclass(frozen=True)
class Lengths:
    """N sequences one behind the other, as the variable-length call takes them."""

    # `longest` is on the host: the launch needs it, and reading it from the device would be a wait.
    starts: Tensor  # (N + 1,) int32 on the device; sequence i is rows starts[i] to starts[i + 1]
    longest: int

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> "Lengths":
        starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        return cls(upload(starts, device), max(lengths))


def takes_flash(q: Tensor) -> bool:
    """Whether CUDA's flash attention takes queries (T, A, D): 16 bits, D a multiple of 8."""
    narrow = q.dtype in (torch.bfloat16, torch.float16)
    width = q.shape[-1]
    return q.is_cuda and narrow and width % 8 == 0 and width <= 256


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, queries: Lengths, keys: Lengths, causal: bool
) -> Tensor:
    """Attend with sequence i of q (T, A, D) to sequence i of k and v (S, K, D).

    The last axes are contiguous.

    This is the operator below torch.nn.attention.varlen.varlen_attn. That one takes no grouped
    heads in torch 2.11, and in 2.13 is a custom operator in Python that launches one kernel more a
    call.
    """
    # In order: no dropout, is_causal, no debug mask. Differentiable.
    return torch.ops.aten._flash_attention_forward(
        q, k, v, queries.starts, keys.starts, queries.longest, keys.longest, 0.0, causal, False
    )[0]


# ---- Segments with prefixes: the decoder


@dataclass
class Packing:
    """The segments of a batch, which tile [0, T) in order, and what all layers' calls share."""

    segments: list[Segment]
    device: torch.device

    @cached_property
    def filled(self) -> list[Segment]:
        """The segments that have tokens."""
        return [segment for segment in self.segments if segment[1] > segment[0]]

    @cached_property
    def queries(self) -> Lengths:
        return Lengths.of([end - start for start, end, _, _ in self.filled], self.device)

    @cached_property
    def keys(self) -> Lengths:
        lengths = [end - start + high - low for start, end, low, high in self.filled]
        return Lengths.of(lengths, self.device)

    @cached_property
    def key_index(self) -> Tensor | None:
        """(S,) int64: the packed tokens as the keys come; None if no segment has a prefix."""
        if all(low == high for _, _, low, high in self.filled):
            return None
        pieces = []
        for start, end, low, high in self.filled:
            # The prefix first, then its own: flash's mask aligns the ends of both.
            pieces += [np.arange(low, high), np.arange(start, end)]
        return upload(np.concatenate(pieces), self.device)


def flash_prefix_attention(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
    """Attend as `reference_prefix_attention` does, in one launch for all segments."""
    if not packing.filled:
        return q
    if packing.key_index is not None:
        # P + R keys for each completion: the copy that the header speaks of.
        k = gather_rows(k, packing.key_index)
        v = gather_rows(v, packing.key_index)
    return flash_attention(q, k, v, packing.queries, packing.keys, causal=True)


def _segment_mask(length: int, prefix: int, q: Tensor):
    """Return the mask of `length` queries that see the whole prefix and are causal behind it."""
    if q.is_cuda:
        # CUDA's flash attention takes no mask, but knows this one.
        return causal_lower_right(length, prefix + length)
    return q.new_ones(length, prefix + length, dtype=torch.bool).tril(prefix)


def reference_prefix_attention(q: Tensor, k: Tensor, v: Tensor, segments: list[Segment]) -> Tensor:
    """Specify `prefix_attention`, a segment at a time."""
    # One split, not a slice a segment: a slice's backward fills a whole (T, K, D) gradient, T / L
    # times.
    lengths = [end - start for start, end, _, _ in segments]
    queries, keys, values = (t.transpose(0, 1).split(lengths, 1) for t in (q, k, v))
    # A segment by its first token. An empty one starts where the next does, and must not hide it.
    index = {start: i for i, (start, _, _, _) in enumerate(segments) if lengths[i]}
    # Completions of a group are often equally long, so that a mask serves several.
    masks = {}
    out = []
    for i, (_, _, prefix_start, prefix_end) in enumerate(segments):
        query = queries[i]  # (A, L, D)
        key = keys[i]
        value = values[i]
        mask = None
        prefix = prefix_end - prefix_start
        if prefix:
            # A prefix is always a whole earlier segment, so its keys are at hand as they were
            # split.
            before = index[prefix_start]
            key = torch.cat((keys[before], key), 1)
            value = torch.cat((values[before], value), 1)
            shape = (lengths[i], prefix)
            if shape not in masks:
                masks[shape] = _segment_mask(*shape, q)
            mask = masks[shape]
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


def prefix_attention(q: Tensor, k: Tensor, v: Tensor, segments: list[Segment] | Packing) -> Tensor:
    """Attend with q (T, A, D), k and v (T, K, D), all rotated; return (T, A, D).

    The segments tile [0, T) in order. A Packing, made once, saves what all layers share.
    """
    packing = segments if isinstance(segments, Packing) else Packing(segments, q.device)
    if takes_flash(q):
        return flash_prefix_attention(q, k, v, packing)
    return reference_prefix_attention(q, k, v, packing.segments)


# ---- Whole sequences: the vision tower


@dataclass
class Windows:
    """Sequences within which every patch sees every other: an image's windows, or whole images."""

    lengths: list[int]
    device: torch.device

    @cached_property
    def rows(self) -> Lengths:
        return Lengths.of(self.lengths, self.device)


def reference_window_attention(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    """Specify `window_attention`: one call for all windows of a size, as most are of one."""
    # (A, P, D), a piece a window: views, as split copies nothing.
    queries, keys, values = (t.transpose(0, 1).split(lengths, dim=1) for t in (q, k, v))
    out = [None] * len(lengths)
    for length in set(lengths):
        own = [i for i, other in enumerate(lengths) if other == length]
        query = torch.stack([queries[i] for i in own])  # (windows, A, length, D)
        key = torch.stack([keys[i] for i in own])
        value = torch.stack([values[i] for i in own])
        # (windows, A, length, D), in the windows' own order of appearance.
        attended = F.scaled_dot_product_attention(query, key, value)
        for i, window in zip(own, attended.unbind(), strict=True):
            out[i] = window
    return torch.cat(out, dim=1).transpose(0, 1)


def window_attention(q: Tensor, k: Tensor, v: Tensor, windows: Windows) -> Tensor:
    """Attend within each window: q, k, v (P, A, D); return (P, A, D)."""
    if not takes_flash(q):
        return reference_window_attention(q, k, v, windows.lengths)
    return flash_attention(q, k, v, windows.rows, windows.rows, causal=False)
