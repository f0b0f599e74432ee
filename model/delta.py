"""The gated delta net of Qwen3.5: what stands in the place of attention in three layers of four.

    m = W_qkv x, z = W_z x, b = W_b x, a = W_a x        projections of the normed input
    q, k, v = silu(conv(m))                              causal, over q, k and v together
    beta = sigmoid(b),  g = -exp(A_log) softplus(a + dt_bias)
    o = the gated delta rule of q, k, v, g, beta         (kernels/delta_rule.py)
    y = W_out (weight o / rms(o) * silu(z))              the norm is per head

Nothing here attends: what a token knows of those before it is a state of fixed size, and the last
w - 1 rows of m. So sequences that are packed together must not hand on either, and a completion
behind a shared prompt needs both of the prompt's end, with their gradients. `Walk` has the indices
for that: first all sequences without a prefix are walked, then, from the states that those have
left, all with one. A prefix is the whole of an earlier segment, as a recurrence can only branch
where it ends.

T packed tokens; H hidden width; C channels of the convolution, w taps; V value heads, K key heads,
D width of a key, E of a value; N segments.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from errors import UserError
from kernels.delta_rule import Chunks, delta_rule, why_not_train
from kernels.delta_step import StepWeights, log_decay
from kernels.gated_norm import gated_norm
from kernels.packed_attention import Segment, gather_rows, upload
from kernels.short_conv import short_conv
from model.families import DecoderSizes

# Rounded to bf16, decays would move logits by some 1e-3; there are a few hundred numbers a layer.
IN_FP32 = (".linear_attn.A_log", ".linear_attn.norm.weight")


def check_kernels(config, device: torch.device) -> None:
    """Raise UserError where a kernel that this model needs can't train here."""
    if DecoderSizes.of(config).delta_layers:
        problem = why_not_train(device)
        if problem is not None:
            raise UserError(problem)


def walked(segments: list[Segment]) -> list[Segment]:
    """Return the segments with tokens in the order of a walk: those without a prefix go first."""
    there = [segment for segment in segments if segment[1] > segment[0]]
    # Stable: otherwise in the order in which they are packed.
    return sorted(there, key=has_prefix)


def has_prefix(segment: Segment) -> bool:
    _, _, low, high = segment
    return low < high


@dataclass
class Walk:
    """In which order the rows of a packed batch are walked: made once, for all delta layers.

    Rows are laid out anew: the segments without a prefix, then those with one, each behind copies
    of the last w - 1 rows of its prefix, which only the convolution reads.
    """

    segments: list[Segment]
    taps: int
    device: torch.device

    def __post_init__(self):
        # Segments without tokens have no place in a walk: their state is that of nobody.
        self.roots = [segment for segment in walked(self.segments) if not has_prefix(segment)]
        self.leaves = [segment for segment in walked(self.segments) if has_prefix(segment)]
        self.root_at = {(start, end): i for i, (start, end, _, _) in enumerate(self.roots)}
        for _, _, low, high in self.leaves:
            if (low, high) not in self.root_at:
                raise ValueError(
                    f"the prefix {low}:{high} is no whole segment without a prefix of its own, "
                    "and a delta net's state is known at the end of those only"
                )

    @cached_property
    def root_tokens(self) -> int:
        return sum(end - start for start, end, _, _ in self.roots)

    @cached_property
    def root_chunks(self) -> Chunks:
        return Chunks([end - start for start, end, _, _ in self.roots], self.device)

    @cached_property
    def leaf_chunks(self) -> Chunks:
        return Chunks([end - start for start, end, _, _ in self.leaves], self.device)

    @cached_property
    def parents(self) -> Tensor:
        """(leaves,) int64: which root each leaf goes on from."""
        parents = [self.root_at[low, high] for _, _, low, high in self.leaves]
        return upload(np.array(parents, np.int64), self.device)

    @cached_property
    def _rows(self) -> list[tuple[np.ndarray, int]]:
        """Each walked segment's rows, the copies of its prefix's end in front, and their number."""
        rows = []
        for start, end, low, high in self.roots + self.leaves:
            # A prefix shorter than w - 1 rows has fewer, and zeros stand before it, as before any
            # sequence.
            tail = np.arange(max(low, high - self.taps + 1), high)
            rows.append((np.concatenate((tail, np.arange(start, end))), len(tail)))
        return rows

    @cached_property
    def is_packed_order(self) -> bool:
        """Whether the rows already lie as they are walked."""
        return not self.leaves

    @cached_property
    def rows(self) -> Tensor:
        """(T + copies,) int64: the packed token at each row of the walk."""
        return upload(np.concatenate([rows for rows, _ in self._rows]), self.device)

    @cached_property
    def before(self) -> Tensor:
        """(T + copies,) int64: how many earlier rows of its sequence each row has."""
        return upload(np.concatenate([np.arange(len(rows)) for rows, _ in self._rows]), self.device)

    @cached_property
    def own(self) -> Tensor:
        """(T,) int64: the rows of the walk that are no copies."""
        places = []
        at = 0
        for rows, copies in self._rows:
            places.append(np.arange(at + copies, at + len(rows)))
            at += len(rows)
        return upload(np.concatenate(places), self.device)

    @cached_property
    def _host_tokens(self) -> np.ndarray:
        return np.concatenate([rows[copies:] for rows, copies in self._rows])

    @cached_property
    def tokens(self) -> Tensor:
        """(T,) int64: the packed token at each walked place, copies left out."""
        return upload(self._host_tokens, self.device)

    @cached_property
    def back(self) -> Tensor:
        """(T,) int64: where each packed token is walked."""
        return upload(np.argsort(self._host_tokens), self.device)

    @cached_property
    def tails(self) -> tuple[Tensor, Tensor]:
        """(N, w) int64: the packed tokens whose rows of m a segment's end leaves in a ring.

        As decoding finds them: row t % w of token t, counted from behind the segment. And which of
        them there are at all: a short sequence has fewer, and the oldest is never read. Segments
        come in the order of the walk.
        """
        # Token -1 of the completion is the prompt's last: it stands in row (w - 1) % w, and so on
        # back.
        segments = walked(self.segments)
        index = np.zeros((len(segments), self.taps), np.int64)
        there = np.zeros((len(segments), self.taps), bool)
        for i, (start, end, low, high) in enumerate(segments):
            for back in range(1, self.taps):
                token = end - back
                # Before a segment comes the end of its prefix; without one, nothing.
                if token < start:
                    token += high - start
                    if token < low:
                        continue
                index[i, -back % self.taps] = token
                there[i, -back % self.taps] = True
        return upload(index, self.device), upload(there, self.device)


class GatedDeltaNet(nn.Module):
    """Project, convolve, walk, norm and gate, project. Names are the published checkpoints'."""

    def __init__(self, s: DecoderSizes, layer: int):
        super().__init__()
        d = s.delta
        self.layer = layer
        self.sizes = d
        self.eps = s.eps
        value_width = d.value_heads * d.value_dim
        self.in_proj_qkv = nn.Linear(s.hidden, d.channels, bias=False)
        self.in_proj_z = nn.Linear(s.hidden, value_width, bias=False)
        self.in_proj_b = nn.Linear(s.hidden, d.value_heads, bias=False)
        self.in_proj_a = nn.Linear(s.hidden, d.value_heads, bias=False)
        # Only its weight is used, (C, 1, w).
        self.conv1d = nn.Conv1d(d.channels, d.channels, d.taps, groups=d.channels, bias=False)
        self.A_log = nn.Parameter(torch.zeros(d.value_heads))
        self.dt_bias = nn.Parameter(torch.zeros(d.value_heads))
        # Names as published: norm.weight, and no norm of its own here (kernels/gated_norm.py).
        self.norm = nn.Module()
        self.norm.weight = nn.Parameter(torch.ones(d.value_dim))
        self.out_proj = nn.Linear(value_width, s.hidden, bias=False)

    @property
    def step_weights(self) -> StepWeights:
        """What a decode step reads beside the projections."""
        return StepWeights(
            self.conv1d.weight[:, 0],
            self.A_log,
            self.dt_bias,
            self.norm.weight,
            self.eps,
            self.sizes.key_heads,
        )

    def forward(self, x: Tensor, walk: Walk, cache: list | None = None) -> Tensor:
        """Return (T, H) of x (T, H).

        A cache is given the states that the segments end in, (N, V, D, E) fp32, and the rings of
        m's last rows, (N, w, C), in the order of the walk.
        """
        d = self.sizes
        # b and a are one number a head: how much of a correction is written, how much is forgotten.
        mixed = self.in_proj_qkv(x)
        z = self.in_proj_z(x).unflatten(-1, (-1, d.value_dim))
        beta = self.in_proj_b(x).sigmoid()
        g = log_decay(self.in_proj_a(x), self.A_log, self.dt_bias)

        convolved = self._convolve(mixed, walk)
        keys = d.key_heads * d.key_dim
        q, k, v = convolved.split((keys, keys, d.value_heads * d.value_dim), -1)
        q = q.unflatten(-1, (-1, d.key_dim))
        k = k.unflatten(-1, (-1, d.key_dim))
        v = v.unflatten(-1, (-1, d.value_dim))
        out, states = walk_sequences(q, k, v, g, beta, walk)
        if cache is not None:
            index, there = walk.tails
            # Where a short prompt has no row, zeros, as the convolution reads them.
            rings = mixed[index] * there[..., None].to(mixed.dtype)
            cache.append((states, rings))

        gated = gated_norm(out, z, self.norm.weight, self.eps)
        return self.out_proj(gated.flatten(-2))

    def _convolve(self, mixed: Tensor, walk: Walk) -> Tensor:
        """Return silu(conv(m)) of the tokens in the order of the walk, (T, C)."""
        weight = self.conv1d.weight[:, 0]
        if walk.is_packed_order:
            return short_conv(mixed, weight, walk.before)
        # A prompt's last rows are read by all its completions: their gradients sum in fp32.
        rows = gather_rows(mixed, walk.rows)
        return short_conv(rows, weight, walk.before).index_select(0, walk.own)


def walk_sequences(q, k, v, g, beta, walk: Walk) -> tuple[Tensor, Tensor]:
    """Apply the delta rule within each sequence; return outputs as packed, and all end states.

    q, k, v come in the order of the walk, g and beta as the tokens are packed; states come in the
    order of the walk.
    """
    if walk.is_packed_order:
        return delta_rule(q, k, v, g, beta, walk.root_chunks)
    # Copies of a prompt's last rows have no part in the rule.
    g = g.index_select(0, walk.tokens)
    beta = beta.index_select(0, walk.tokens)
    cut = (walk.root_tokens, len(q) - walk.root_tokens)
    # The walk has the roots' tokens first.
    parts = [x.split(cut) for x in (q, k, v, g, beta)]
    roots, leaves = zip(*parts, strict=True)
    root_out, states = delta_rule(*roots, walk.root_chunks)
    # A state that several go on from: a copy each, whose gradients sum in fp32, as all of it is.
    begun = states.index_select(0, walk.parents)
    leaf_out, leaf_states = delta_rule(*leaves, walk.leaf_chunks, begun)
    out = torch.cat((root_out, leaf_out)).index_select(0, walk.back)
    return out, torch.cat((states, leaf_states))
