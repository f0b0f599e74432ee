"""The gated delta rule: a memory that decays and corrects itself (Qwen3.5, 3 layers in 4).

    per value head, of a state S (D, E) in fp32 that starts at 0 or where another sequence ended:
        S <- e^g S                     forget
        u  = beta (v - S^T k)          what the memory gets wrong about this key
        S <- S + k u^T                 corrected
        o  = S^T q
    q and k are normed before: x / sqrt(sum x^2 + 1e-6), and q is divided by sqrt(D)

Gated DeltaNet: arXiv 2412.06464, eq. 10. Token by token this is T small steps, one after the other.
Cut into chunks of C tokens, all but a product a chunk is done for all chunks at once (its section
3.3). With G the running sum of g within a chunk, and D_ij = e^(G_i - G_j) where j <= i, else 0:

    N = strictly lower part of (beta K K^T) * D          what the chunk's keys say about each other
    (1 + N) U = beta V,   (1 + N) W = beta e^G K         solved by forward substitution
    V' = U - W S                                         the chunk's corrections
    O  = (e^G Q) S + ((Q K^T) * D) V'
    S <- e^(G_C) S + (e^(G_C - G) K)^T V'

The reference is this form in PyTorch: the specification, and what a CPU runs. On CUDA it is
fla-core's kernel (pip install fla-core einops; nothing of it is imported before), else the
reference, and a line says so. fla multiplies states in the input's dtype and solves in TF32.

Shapes: T tokens, sequences one behind the other; K key heads, V value heads (a multiple of K; key
head j serves value heads j V / K and on); D width of a key, E of a value; N sequences; X chunks.
"""

import functools
import sys
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from packaging.version import Version
from torch import Tensor

from kernels import triton
from kernels.packed_attention import upload

CHUNK = 64
# Inside of the root, beside the sum of squares: transformers' and fla's.
NORM_EPS = 1e-6


@dataclass
class Chunks:
    """Where sequences one behind the other are cut: made once a batch, for all layers.

    Chunks are numbered by their place in their sequence first: step j of the walk over the states
    is the j-th chunk of every sequence that has so many, the longest sequences in front.
    """

    lengths: list[int]
    device: torch.device

    @cached_property
    def counts(self) -> np.ndarray:
        # Rounded up: the last chunk of a sequence may be short, an empty sequence has none.
        return -(-np.array(self.lengths, dtype=np.int64) // CHUNK)

    @cached_property
    def order(self) -> np.ndarray:
        """(N,): the sequences by falling number of chunks."""
        # Stable: sequences of one length keep the batch's order.
        return np.argsort(-self.counts, kind="stable")

    @cached_property
    def steps(self) -> list[int]:
        """How many sequences have a chunk number j, for each j."""
        return [int((self.counts > step).sum()) for step in range(self.counts.max(initial=0))]

    @cached_property
    def _host_index(self) -> np.ndarray:
        starts = self.host_starts.numpy()
        # One chunk a row, in the walk's order; behind a sequence's end stands the token of zeros.
        rows = []
        for step, active in enumerate(self.steps):
            for sequence in self.order[:active]:
                token = step * CHUNK + np.arange(CHUNK)
                inside = token < self.lengths[sequence]
                # Behind the end stands a token of zeros: no key, no value, nothing forgotten.
                rows.append(np.where(inside, starts[sequence] + token, starts[-1]))
        return np.concatenate(rows) if rows else np.zeros(0, np.int64)

    @cached_property
    def index(self) -> Tensor:
        """(X * C,) int64: the token at each place of the chunks, T where there is none."""
        return upload(self._host_index, self.device)

    @cached_property
    def places(self) -> Tensor:
        """(T,) int64: the place of each token in the chunks."""
        # One place more, for the token of zeros, on which many places of the chunks write.
        places = np.empty(sum(self.lengths) + 1, np.int64)
        places[self._host_index] = np.arange(len(self._host_index))
        return upload(places[:-1], self.device)

    @cached_property
    def by_length(self) -> Tensor:
        return upload(self.order, self.device)

    @cached_property
    def back(self) -> Tensor:
        return upload(np.argsort(self.order), self.device)

    @cached_property
    def starts(self) -> Tensor:
        """(N + 1,) int64, on the device: as fla takes sequences."""
        return upload(self.host_starts, self.device)

    @cached_property
    def host_starts(self) -> Tensor:
        return torch.from_numpy(np.cumsum([0, *self.lengths]))


def unit(x: Tensor) -> Tensor:
    """Norm the last axis, in fp32. Not F.normalize, whose 1e-12 is a bound and not a summand."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    # A key of zeros stays one, where x / |x| would be nan.
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + NORM_EPS)


def reference_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    chunks: Chunks,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Specify `delta_rule`, a chunk at a time, in fp32 (or fp64)."""
    heads, width = v.shape[1:]
    repeat = heads // k.shape[1]
    # Interleaved, not tiled: key head 0 serves value heads 0 ... V / K - 1.
    key = unit(k).repeat_interleave(repeat, 1)
    query = unit(q).repeat_interleave(repeat, 1) * q.shape[-1] ** -0.5
    wide = key.dtype

    def cut(x: Tensor) -> Tensor:
        """(T, V, Y) -> (X, V, C, Y)"""
        # The token of zeros at place T, to which `index` points behind the end of a sequence.
        x = torch.cat((x.to(wide), x.new_zeros(1, *x.shape[1:], dtype=wide)))
        return x.index_select(0, chunks.index).unflatten(0, (-1, CHUNK)).transpose(1, 2)

    query = cut(query)
    key = cut(key)
    value = cut(v)
    beta = cut(beta[..., None])
    decay = cut(g[..., None]).cumsum(2)  # G (X, V, C, 1)

    # Masked before the exponential: above the diagonal it overflows.
    above = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q.device).triu(1)
    # (X, V, C, C). The difference, and not e^G_i / e^G_j, of which both may underflow.
    between = (decay - decay.transpose(2, 3)).masked_fill(above, -torch.inf).exp()  # D
    last = decay[:, :, -1:]  # G_C

    # What depends on no state, for all chunks at once.
    # Within a chunk a token's correction depends on those before it: a triangular system.
    mutual = (beta * (key @ key.transpose(2, 3)) * between).tril(-1)  # N
    # Both right-hand sides in one call: (X, V, C, E + D).
    sides = torch.cat((beta * value, beta * decay.exp() * key), -1)
    solved = torch.linalg.solve_triangular(mutual, sides, upper=False, unitriangular=True)
    own, through_state = solved.split((width, key.shape[-1]), -1)  # U, W
    within = (query @ key.transpose(2, 3)) * between
    # What a query still sees of the state before its chunk, (X, V, C, D).
    reading = query * decay.exp()
    # What is left of a key's correction at the chunk's end, (X, V, D, C).
    writing = (key * (last - decay).exp()).transpose(2, 3)
    # From here on no value depends on another chunk's.
    kept = last.exp()

    # The longest sequence first, as the walk takes them.
    if initial_state is None:
        state = key.new_zeros(len(chunks.lengths), heads, key.shape[-1], width)
    else:
        state = initial_state.to(wide).index_select(0, chunks.by_length)
    outputs, final = _walk(state, (own, through_state, within, reading, writing, kept), chunks)
    if not outputs:
        return v, final
    # (X, V, C, E) -> (T, V, E)
    out = torch.cat(outputs).transpose(1, 2).flatten(0, 1).index_select(0, chunks.places)
    return out.to(v.dtype), final


def _walk(state: Tensor, terms: tuple, chunks: Chunks) -> tuple[list[Tensor], Tensor]:
    """Walk over the states (N, V, D, E), the longest sequence first: outputs, and final states.

    terms: U, W, the product within, and what reads, writes and keeps a state, each (X, V, ...).
    """
    # Split once: a slice's gradient would fill a whole tensor, each time.
    parts = [x.split(chunks.steps) for x in terms]
    outputs = []
    ended = []
    for u, w, attention, read, write, keep in zip(*parts, strict=True):
        # Sequences that have no chunk here are the last of those that had one before.
        # `order` has the longest first, so what ends here is a tail of the states.
        ended.append(state[len(u) :])
        state = state[: len(u)]
        # (active, V, C, E): U less what the state already says about these keys.
        correction = u - w @ state
        outputs.append(read @ state + attention @ correction)
        state = keep * state + write @ correction
    # Longest first, as the walk had them; then in the batch's order again.
    final = torch.cat((state, *reversed(ended))).index_select(0, chunks.back)
    return outputs, final


@functools.cache
def fla_rule():
    """Return fla-core's chunked rule, or None without the package. Imported for the first call."""
    try:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    except ImportError:
        print(
            "fla-core is not installed: the delta rule runs in PyTorch's operations, which is slow",
            file=sys.stderr,
        )
        return None
    return chunk_gated_delta_rule


def why_not_train(device: torch.device) -> str | None:
    """Return why fla-core's backward can't be used on this device, or None.

    On Hopper its gradients were wrong with Triton 3.4 up to 3.7.0 (fla#640), and it refuses to run
    there: in the first backward, which is late to learn of it.
    """
    if device.type != "cuda" or fla_rule() is None:
        return None
    on_hopper = torch.cuda.get_device_capability(device)[0] == 9
    version = Version(triton.__version__)
    if on_hopper and Version("3.4.0") <= version < Version("3.7.1"):
        return (
            f"fla-core does not train on Hopper with triton {version}: 3.4.0 to 3.7.0 miscompile"
            " its backward; take torch 2.13, which comes with 3.7.1"
        )
    return None


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    chunks: Chunks,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the outputs (T, V, E), and the state (N, V, D, E) in fp32 that each sequence ends in.

    q, k (T, K, D) are normed here; v (T, V, E); g (T, V) fp32, the log of what is kept, <= 0; beta
    (T, V); initial_state (N, V, D, E) fp32, None: zeros. A sequence without tokens keeps its state.
    Differentiable in all of them.
    """
    rule = fla_rule() if q.is_cuda else None
    if rule is None:
        return reference_delta_rule(q, k, v, g, beta, chunks, initial_state)
    out, final = rule(
        q[None],
        k[None],
        v[None],
        g[None],
        beta[None],
        initial_state=initial_state,
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
        cu_seqlens=chunks.starts,
        cu_seqlens_cpu=chunks.host_starts,
    )
    return out[0], final
