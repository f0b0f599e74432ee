"""Sampling on the training weights: a fixed number of slots, each with one live sample, refilled as
they end.

    1. prefill   the next prompts, packed up to a budget of tokens, go through the model once; their keys and
                 values fill prompt rows, which all n samples of a prompt read
    2. load      the next samples take the free slots: the prompt's last hidden state, a noise key
    3. step      one token for every slot: logits, sample, record; its key and value join the slot's own
                 suffix; attention to the shared prompt and to that suffix gives the next hidden
                 state
    4. collect   samples that have ended leave their slots; the last of a prompt frees its row. Back to 1
                 until no sample waits; Rollouts come out in the order of the examples

All buffers are static. On CUDA the whole step, sampling included, is one graph over all slots, and
the host looks at the flags of ended samples only every few steps, without waiting; buffers and
graph outlive a call. On a CPU a step takes only the rows in use, so the last, long samples do not
pay for empty slots; and the one sample of a prompt (n = 1) goes on behind its prompt, in the row of
the slot's number: there are no suffixes.

The noise of a token is a hash of (seed, example id, path, sample index, position, token id): never
of the slot, the batch or the rank, so in fp32 a sample does not depend on what it is batched with.
The log-prob kept is the trainer's: log softmax of all logits at the sampling temperature (at
temperature 0, greedy, that at 1). Banned ids (vision markers, `<mask>`, rows without a token) are
never sampled; the ban does not enter the log-probs. A sample without an end token after
max_new_tokens is cut, and marked by `finished`.

S slots, n samples a prompt, B prompt rows, M = max_new_tokens; P longest prompt, A query heads, K
key-value heads, D head width, H hidden width, V vocabulary rows.
"""

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import interpreted
from kernels.decode_attention import Table, decode_attention
from kernels.layers import add_rms_norm, qk_norm_rope_write, swiglu_joint, torch_norm
from kernels.sample import sample, sequence_key
from model.processor import DeviceImages
from model.qwen_vl import adjoined
from srreal import Example

SLOTS = 256  # at most: more live samples hardly raise the throughput, neither of a GPU nor of a CPU
KV_BYTES, KV_SHARE = 2**31, 0.4  # for keys and values: on a CPU; on CUDA the share of what is free
# tokens a packed forward (of 8B 1.8 GB); a longer prompt goes alone
PREFILL = {"cpu": 4096, "cuda": 8192}
# steps between two looks at the flags on CUDA: an ended sample idles for 4 + 8 steps in the mean
POLL = 8
PAD = 256  # prompt rows have room for a multiple of so many tokens
# more places than needed: slots at powers of two apart would share the sets of a CPU's caches
ODD = 8
# on a CPU: gaps between live slots are closed when fewer than this share of the rows is live
CLOSE = 0.75


@dataclass
class Rollout:
    """One sampled completion. `tokens` hold the end token where there was one; `text` does not, and
    is not stripped.
    """

    text: str
    tokens: list[int]
    logprobs: list[float]  # of `tokens`, under the full softmax at the sampling temperature
    finished: bool  # False: cut at max_new_tokens


@torch.no_grad()
def generate(
    model,
    processor,
    examples: list[Example],
    n: int = 1,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    progress: Callable | None = None,
    slots: int | None = None,
    enough: Callable[[list[Rollout]], bool] | None = None,
    wasted: Callable[[int, int], None] | None = None,
    images: DeviceImages | None = None,
) -> list[list[Rollout]]:
    """n completions per example, in the examples' order; temperature 0 is greedy.

    `progress` hears how many samples have ended. `slots`: live samples, None: see `default_slots`.
    `enough` hears every example's rollouts, in the order of the examples and never in that of
    finishing, which would prefer short ones; once it returns True the result ends there, and what
    runs behind it is thrown away: `wasted` hears of how many samples, and tokens. `images` takes
    the prompts' images, and lends them to whoever trains on them.
    """
    if not (examples and n and max_new_tokens):
        return [[Rollout("", [], [], False) for _ in range(n)] for _ in examples]
    if model.device.type == "cpu":
        slots = min(slots or default_slots(model, n, max_new_tokens), len(examples) * n)
    make = kept if model.device.type == "cuda" else Slots
    engine = make(model, n, max_new_tokens, temperature, top_p, slots)
    engine.begin(processor, len(examples) * n)
    # sample i n + j is example i's j-th
    waiting, left = deque(range(len(examples) * n)), [n] * len(examples)
    # prompt rows in use; examples prefilled; examples done in order
    rows, encoded, whole, out = {}, 0, 0, []
    while whole < len(examples):
        jobs = []
        while waiting and engine.free:
            i, j = divmod(waiting[0], n)
            if i == encoded and engine.free_rows:
                taken = engine.prefill(processor, examples[encoded:], images)
                rows |= enumerate(taken, encoded)
                encoded += len(taken)
            if i not in rows:
                break
            key = sequence_key(seed, examples[i].id, examples[i].path, j)
            jobs.append((engine.take(rows[i]), waiting.popleft(), rows[i], key))
        engine.load(jobs)
        engine.step()
        ended = engine.collect()
        if progress and ended:
            progress(len(ended))
        for i in (number // n for number in ended):
            left[i] -= 1
            if left[i] == 0:
                engine.free_rows.append(rows.pop(i))
        if not waiting:
            engine.close_gaps()
        while whole < len(examples) and left[whole] == 0:
            whole += 1
            if enough:
                out += engine.read(processor, whole - 1, whole)
                if enough(out[-1]):
                    if wasted:
                        wasted(
                            len(examples) * n - len(waiting) - whole * n,
                            engine.tokens_behind(whole),
                        )
                    return out
    return out or engine.read(processor, 0, len(examples))


def default_slots(model, n: int, max_new_tokens: int, prompt: int = 1024) -> int:
    """As many as fit with their keys and values and prompts of `prompt` tokens: on a CPU from
    shapes alone, on CUDA from the memory that is free now.
    """
    room = kv_room(model.device) / token_bytes(model)
    return int(max(1, min(SLOTS, room // (max_new_tokens + 2 * prompt / n))))


def kv_room(device: torch.device) -> float:
    """Bytes that keys and values may take from now on."""
    if device.type == "cpu":
        return KV_BYTES
    spare = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return KV_SHARE * (torch.cuda.mem_get_info(device)[0] + spare)  # PyTorch's reserve is free, too


def token_bytes(model) -> int:
    """Of a token's keys and values in all layers."""
    s = model.decoder.sizes
    return 2 * s.layers * s.kv_heads * s.head_dim * model.dtype.itemsize


def fitting(processor, examples: list[Example], budget: int) -> list[int]:
    """Prompt lengths of the first of the examples, as many as `budget` tokens hold; one at
    least."""
    lengths = []
    for example in examples:
        lengths.append(len(processor.prompt_ids(example)))
        if sum(lengths) > budget:
            return lengths[:-1] or lengths
    return lengths


@dataclass
class Job:
    """What a slot is busy with."""

    number: int  # of the sample
    row: int  # of its prompt
    began: int  # the step


class Slots:
    """The buffers of S slots and B prompt rows, and the step over them."""

    def __init__(
        self, model, n: int, max_new_tokens: int, temperature: float, top_p: float, slots=None
    ):
        self.model, self.n, self.room, self.sampling = (
            model,
            n,
            max_new_tokens,
            (temperature, top_p),
        )
        self.count = slots or default_slots(model, n, max_new_tokens)
        s, self.device = model.decoder.sizes, model.device
        self.sizes, self.graph, self.weights = s, None, []
        self.fused = self.device.type == "cuda" or interpreted()
        # A CPU's many small operations: without autograd's bookkeeping, too.
        self.quick = torch.inference_mode if self.device.type == "cpu" else torch.no_grad
        self.alone = n == 1 and not self.fused
        # The prompts of the samples in the slots, and as many for stragglers.
        b = self.count if self.alone else 2 * -(-self.count // n)
        zeros = lambda *shape, dtype=torch.int64: blank(shape, dtype, self.device)  # noqa: E731
        wide = lambda *shape: zeros(*shape, dtype=model.dtype)  # noqa: E731
        cache = lambda *room: [wide(2, *room, s.head_dim) for _ in range(s.layers)]  # noqa: E731
        # Of a prompt: a layer's (keys, values), last hidden state, position behind it.
        self.prefix, self.last, self.after = cache(b, s.kv_heads, PAD), wide(b, s.hidden), zeros(b)
        self.prefix_length, self.members = zeros(b), zeros(b, n)
        # Of a slot; in the last column of tokens and logprobs lands what a slot without a sample
        # says.
        own = self.prefix if self.alone else cache(self.count, s.kv_heads, self.room + ODD)
        self.suffix, self.hidden = own, wide(self.count, s.hidden)
        self.key, self.start, self.length, self.home = (zeros(self.count) for _ in range(4))
        self.ended, self.tokens = (
            zeros(self.count, dtype=torch.bool),
            zeros(self.count, self.room + 1),
        )
        self.logprobs = zeros(self.count, self.room + 1, dtype=torch.float32)
        self.banned, self.is_end = (zeros(s.vocab, dtype=torch.bool) for _ in range(2))
        # Text has one position on all three axes of mRoPE, which then is the plain rotary
        # embedding.
        inv_freq = 1.0 / s.theta ** (
            torch.arange(0, s.head_dim, 2, device=self.device) / s.head_dim
        )
        self.inv_freq = torch.cat((inv_freq, inv_freq))  # (D,)
        # where a slot without a sample writes
        self.no_column = torch.tensor(self.room, device=self.device)
        if self.device.type == "cuda":
            self.flags = torch.zeros(self.count, dtype=torch.bool, pin_memory=True)
            self.copied = torch.cuda.Event()

    def begin(self, processor, samples: int) -> None:
        """Empties the slots for a call of `samples` samples, with the weights as they are now."""
        self.rows = min(self.count, samples) if self.device.type == "cpu" else self.count
        self.jobs, self.free = [None] * self.rows, list(range(self.rows))[::-1]
        self.lengths, self.free_rows = [0] * len(self.after), list(range(self.prefix[0].shape[1]))
        self.clock, self.looked, self.since = 0, 0, 0
        self.ended.fill_(True)
        self.length.fill_(1)
        self.members.fill_(-1)
        self.banned.copy_(processor.banned)
        self.is_end.zero_()[processor.end_ids] = True
        self.results = [t.new_zeros(samples, self.room + 1) for t in (self.tokens, self.logprobs)]
        self.results.append(self.length.new_zeros(samples))
        layers = self.model.decoder.layers
        if not self.fused:
            self.qkv = [
                joined(a.q_proj, a.k_proj, a.v_proj) for a in (layer.self_attn for layer in layers)
            ]
            self.qk_norm = [qk_weight(layer.self_attn, self.sizes) for layer in layers]
            self.out = [joined(layer.self_attn.o_proj) for layer in layers]
            self.gate_up = [joined(layer.mlp.gate_proj, layer.mlp.up_proj) for layer in layers]
            self.down = [joined(layer.mlp.down_proj) for layer in layers]
        weights = [w.data_ptr() for w in (*self.model.decoder.parameters(), self.model.head_weight)]
        # a graph reads addresses: optimisers and `gather` write in place
        if weights != self.weights:
            self.weights, self.graph = weights, None

    # ---- 1. prefill ----

    def prefill(
        self, processor, examples: list[Example], images: DeviceImages | None = None
    ) -> list[int]:
        """Encodes the first of the examples, as many as the budget and the free rows hold; their
        rows. It is no one while room for them has to wait for rows in use.
        """
        lengths = fitting(processor, examples[: len(self.free_rows)], PREFILL[self.device.type])
        if not self._make_room(max(lengths) + self.alone * self.room):
            return []
        lengths = lengths[: len(self.free_rows)]
        batch = processor(examples[: len(lengths)])
        self.free_rows.sort()
        rows, self.free_rows = self.free_rows[: len(lengths)], self.free_rows[len(lengths) :]
        for row, length in zip(rows, lengths, strict=True):
            self.lengths[row] = length
        batch, at = batch.to(self.device, images), sent(rows, self.device)
        with self.quick():
            hidden, cache = self.model.prefill(batch)
        self.last[at], self.after[at] = hidden[batch.last], batch.next_position
        self.prefix_length[at] = sent(lengths, self.device)
        # (T, K, D) packed -> (rows, K, P, D): behind its end a prompt repeats its last token,
        # unseen.
        index = torch.tensor([start for start, *_ in batch.segments])[:, None] + torch.minimum(
            torch.arange(max(lengths)), torch.tensor(lengths)[:, None] - 1
        )
        index = sent(index, self.device)
        for rooms, layer in zip(self.prefix, cache, strict=True):
            for room, packed in zip(rooms, layer, strict=True):
                room[at, :, : max(lengths)] = packed[index].transpose(1, 2)
        return rows

    def _make_room(self, length: int) -> bool:
        """For `length` tokens: longer rows, and fewer where memory has it so; False as long as rows
        that would go are in use, or none would be free. New addresses: the graph is recorded again.
        """
        _, count, heads, room, width = self.prefix[0].shape
        if length > room:
            used = 1 + max(set(range(count)) - set(self.free_rows), default=-1)
            wider, row = -(-length // PAD) * PAD, token_bytes(self.model)
            fits = (kv_room(self.device) + count * room * row) // (wider * row)
            count = int(max(min(count, fits), 1))
            free = [row for row in self.free_rows if row < count]
            if used > count or (used and not free):
                return False
            self.free_rows, self.asked = free, None  # an old layer leaves when its new one is there
            for i, old in enumerate(self.prefix):
                self.prefix[i] = blank((2, count, heads, wider, width), old.dtype, self.device)
                self.prefix[i][:, :used, :, :room] = old[:, :used]
            if self.alone:  # a row is a slot
                self.count, self.rows, self.jobs = count, min(self.rows, count), self.jobs[:count]
                self.free = [slot for slot in self.free if slot < count]
            self.graph = None
        return True

    # ---- 2. load ----

    def take(self, row: int) -> int:
        """A free slot for a sample of the prompt in `row`."""
        if self.alone:
            self.free.remove(row)
            return row
        return self.free.pop()

    def load(self, jobs: list[tuple[int, int, int, int]]) -> None:
        """Puts samples into slots: (slot, number of the sample, prompt row, noise key) each."""
        if jobs:
            for slot, number, row, _ in jobs:
                self.jobs[slot] = Job(number, row, self.clock)
            at, _, rows, self.key[at] = sent(jobs, self.device).T
            self.hidden[at], self.start[at] = self.last[rows], self.after[rows]
            self.length.index_fill_(0, at, 0)  # unlike [at] = 0, which waits for a copy of the 0
            self.ended.index_fill_(0, at, False)
            self._link()

    def _link(self) -> None:
        """Writes down who reads which prompt, and how far the live rows of the buffers reach."""
        members, home = [[-1] * self.n for _ in self.lengths], [0] * self.rows
        filled = [0] * len(self.lengths)
        live = [(slot, job) for slot, job in enumerate(self.jobs) if job]
        for slot, job in live:
            members[job.row][filled[job.row]] = slot
            home[slot] = job.row * self.n + filled[job.row]
            filled[job.row] += 1
        self.members.copy_(sent(members, self.device))
        self.home[: self.rows] = sent(home, self.device)
        self.since = min(job.began for _, job in live)
        if self.device.type == "cpu":
            prompts = 1 + max(job.row for _, job in live)
            self.reach = max(self.lengths[job.row] for _, job in live)
            self.asked = [t[:, :prompts, :, : self.reach] for t in self.prefix]
            # Where a slot's (key heads, value heads) start in a layer's flat suffix: (S, 2 K).
            _, count, _, room, _ = self.suffix[0].shape
            starts = torch.arange(0, self.suffix[0][..., 0].numel(), room)
            self.places = starts.view(2, count, -1).transpose(0, 1).flatten(1)

    # ---- 3. step ----

    def step(self) -> None:
        if self.device.type == "cpu":
            with self.quick():
                own = self.clock - self.since + 1 + self.alone * self.reach
                self._step(self.rows, own, self.asked)
        else:
            self.graph = self.graph or self._record()
            self.graph.replay()
        self.clock += 1

    def _record(self):
        """The step over all slots and the whole of the buffers, as a CUDA graph."""
        # Once without a graph first: what compiles a kernel or sets up a library can't be recorded.
        # No slot takes part in that step, so it changes only these:
        state = [self.hidden, self.length, self.ended, *(t[..., 0, :] for t in self.suffix)]
        before = [t.clone() for t in state]
        self.length.fill_(1)
        self.ended.fill_(True)
        self._step(self.count, self.room, self.prefix)
        for t, old in zip(state, before, strict=True):
            t.copy_(old)
        graph = torch.cuda.CUDAGraph()
        # NCCL's watchdog is another thread
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._step(self.count, self.room, self.prefix)
        return graph

    def _step(self, rows: int, own: int, prefix: list[Tensor]) -> None:
        """A token for the first `rows` slots, which read up to `own` keys of their own, and of each
        layer the prompts' keys and values in `prefix`; no host synchronisation.
        """
        ended, length, key, hidden = (
            t[:rows] for t in (self.ended, self.length, self.key, self.hidden)
        )
        logits = fp32_logits(hidden, self.model.head_weight)  # (rows, V)
        chosen, logprob = sample(logits, key, length, *self.sampling, self.banned)
        column = torch.where(ended, self.no_column, length)[:, None]
        self.tokens[:rows].scatter_(1, column, chosen[:, None])
        self.logprobs[:rows].scatter_(1, column, logprob[:, None])
        position = self.start[:rows] + length  # of the token that a live slot has just chosen
        length += ~ended
        ended |= self.is_end[chosen] | (length == self.room)
        prompts = prefix[0].shape[1]
        keys = length + self.prefix_length[:rows] if self.alone else length
        table = Table(self.prefix_length[:prompts], keys, self.members[:prompts], self.home[:rows])
        hidden.copy_(self._decode(chosen, position, table, prefix, own))

    def _decode(
        self, chosen: Tensor, position: Tensor, table: Table, prefix: list, own: int
    ) -> Tensor:
        """The decoder on one text token a slot, (rows,), at `position` (rows,), with fewer and
        larger operations than in training: (rows, H).
        """
        decoder, at = self.model.decoder, table.suffix_lengths - 1
        x = decoder.embed_tokens(chosen)
        angles = position[:, None] * self.inv_freq  # (rows, D) fp32
        cos = torch.cos(angles, out=x.new_empty(angles.shape))  # rounded as it is written
        sin = torch.sin(angles, out=x.new_empty(angles.shape))
        if not self.fused:
            sin.chunk(2, -1)[0].neg_()
            cos, sin = cos[:, None], sin[:, None]
            at = (self.places[: len(x)] + at[:, None]).flatten()
        qkv = self._fused_qkv if self.fused else self._qkv
        normed = decoder.layers[0].input_layernorm(x)
        following = [*(layer.input_layernorm for layer in decoder.layers[1:]), decoder.norm]
        for i, (layer, last) in enumerate(zip(decoder.layers, following, strict=True)):
            middle = layer.post_attention_layernorm
            q = qkv(i, normed, cos, sin, at)
            shared = (None, None) if self.alone else prefix[i]
            out = decode_attention(
                q, *shared, *self.suffix[i][:, : len(x), :, :own], table
            ).flatten(1)
            out = layer.self_attn.o_proj(out) if self.fused else self.out[i](out)
            x, normed = add_rms_norm(x, out, middle.weight, middle.eps)
            if self.fused:
                out = fused_mlp(layer.mlp, normed)
            else:
                gate, up = self.gate_up[i](normed).chunk(2, -1)
                out = self.down[i](F.silu(gate).mul_(up))
            x, normed = add_rms_norm(x, out, last.weight, last.eps)
        return normed

    def _fused_qkv(self, i: int, x: Tensor, cos: Tensor, sin: Tensor, at: Tensor) -> Tensor:
        """Layer i's rotated queries (rows, A, D) of x (rows, H); writes keys and values to its
        suffixes at [slot, :, at].
        """
        attn, (k, v) = self.model.decoder.layers[i].self_attn, self.suffix[i][:, : len(x)]
        projections, kv = (attn.q_proj, attn.k_proj, attn.v_proj), self.sizes.kv_heads
        if one := adjoined(*projections):
            qkv = (
                F.linear(x, *one)
                .view(len(x), -1, attn.head_dim)
                .split((self.sizes.heads, kv, kv), 1)
            )
        else:
            qkv = (proj(x).view(len(x), -1, attn.head_dim) for proj in projections)
        norms = (attn.q_norm.weight, attn.k_norm.weight, attn.q_norm.eps) if attn.norms else ()
        return qk_norm_rope_write(*qkv, cos, sin, k, v, at, *norms)

    def _qkv(self, i: int, x: Tensor, cos: Tensor, sin: Tensor, at: Tensor) -> Tensor:
        """The same for a CPU: one matrix product, one norm and one rotation of queries and keys,
        one write; sin's first half is negative, and `at` are places in the layer's whole suffix.
        """
        heads, kv_heads, width = self.sizes.heads, self.sizes.kv_heads, self.sizes.head_dim
        qkv = self.qkv[i](x).view(len(x), -1, width)
        rotated = qk = qkv[:, : heads + kv_heads]
        if self.qk_norm[i] is not None:
            _, qk = torch_norm(qk, None, self.qk_norm[i], self.sizes.eps)
        torch.addcmul(qk * cos, qk.roll(width // 2, -1), sin, out=rotated)
        self.suffix[i].view(-1, width).index_copy_(0, at, qkv[:, heads:].reshape(-1, width))
        return qkv[:, :heads]

    # ---- 4. collect ----

    def collect(self) -> list[int]:
        """Takes the samples that have ended out of their slots; their numbers."""
        flags, when = self._flags()
        slots = [s for s, job in enumerate(self.jobs) if job and job.began < when and flags[s]]
        numbers = [self.jobs[slot].number for slot in slots]
        if slots:
            at, to = sent(slots, self.device), sent(numbers, self.device)
            for result, t in zip(
                self.results, (self.tokens, self.logprobs, self.length), strict=True
            ):
                result[to] = t[at]
            self.length.index_fill_(0, at, 1)  # an idle slot's next place must lie in its room
        for slot in slots:
            self.jobs[slot] = None
        self.free += slots[::-1]
        if slots and self.device.type == "cuda" and any(self.jobs):
            self._link()  # so that nobody's prompts are not read any more
        return numbers

    def _flags(self) -> tuple[list[bool], int]:
        """Which slots had ended after how many steps: on CUDA at the last look but one, so nobody
        waits."""
        if self.device.type == "cpu":
            return self.ended[: self.rows].tolist(), self.clock
        if self.clock % POLL:
            return [], 0
        self.copied.synchronize()
        seen, self.looked = (self.flags.tolist(), self.looked), self.clock
        self.flags.copy_(self.ended, non_blocking=True)
        self.copied.record()
        return seen

    def close_gaps(self) -> None:
        """On a CPU, when no sample waits any more: moves live slots and prompts down into the gaps
        once a quarter of the rows is idle, so that the work of a step falls with the number of live
        samples.
        """
        live = [slot for slot, job in enumerate(self.jobs) if job]
        if self.device.type != "cpu" or not live or len(live) > CLOSE * self.rows:
            return
        state = (
            self.hidden,
            self.key,
            self.start,
            self.length,
            self.ended,
            self.tokens,
            self.logprobs,
        )
        suffix = () if self.alone else (t for both in self.suffix for t in both)
        for slot, gap in moved(live, *state, *suffix).items():
            self.jobs[gap] = self.jobs[slot]
        self.rows, self.jobs = len(live), self.jobs[: len(live)]
        prompts = sorted({job.row for job in self.jobs})
        place = moved(prompts, self.prefix_length, *(t for both in self.prefix for t in both))
        for row, gap in place.items():
            self.lengths[gap] = self.lengths[row]
        for job in self.jobs:
            job.row = place.get(job.row, job.row)
        self._link()

    def tokens_behind(self, whole: int) -> int:
        """How many were sampled for the examples from `whole` on."""
        live = [slot for slot, job in enumerate(self.jobs) if job and job.number >= whole * self.n]
        return int(self.results[2][whole * self.n :].sum() + self.length[live].sum())

    def read(self, processor, first: int, stop: int) -> list[list[Rollout]]:
        """The groups of examples first .. stop - 1."""
        tokens, logprobs, lengths = (
            t[first * self.n : stop * self.n].tolist() for t in self.results
        )
        own = zip(tokens, logprobs, lengths, strict=True)
        ends = processor.end_ids
        out = [Rollout(processor.decode(t[:k]), t[:k], p[:k], t[k - 1] in ends) for t, p, k in own]
        return [out[i : i + self.n] for i in range(0, len(out), self.n)]


_kept: dict[tuple, Slots] = {}


def kept(*arguments) -> Slots:
    """The Slots of the last call if its arguments were the same; else new ones, once the old have
    gone."""
    if arguments not in _kept:
        release()
        _kept[arguments] = Slots(*arguments)
    return _kept[arguments]


def release() -> None:
    """Frees the buffers and the graph that `generate` leaves behind on CUDA; they hold the model
    too."""
    _kept.clear()


def joined(*layers) -> Callable[[Tensor], Tensor]:
    """x -> the outputs of linear layers side by side: by one matrix product, or one by one where
    they lie apart or have adapters. In fp32 MKL gets a copy of the weights in its own order, which
    is quicker made than a transpose, and a fifth to a third faster for few rows; of the weights it
    reads the shape only.
    """
    if not (one := adjoined(*layers)):
        return lambda x: torch.cat([layer(x) for layer in layers], -1)
    weight, bias = one
    mkl = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    if not mkl or weight.dtype != torch.float32:
        return lambda x: F.linear(x, weight, bias)
    shape = weight.new_empty(1, 1).expand_as(weight)
    packed = torch.ops.mkl._mkl_reorder_linear_weight(weight, 32)
    return lambda x: torch.ops.mkl._mkl_linear(x, packed, shape, bias, len(x))


def fused_mlp(mlp, x: Tensor) -> Tensor:
    """The MLP of x (rows, H) with gate and up from one matrix product; with two where they lie
    apart or have adapters.
    """
    if not (one := adjoined(mlp.gate_proj, mlp.up_proj)):
        return mlp(x)
    return mlp.down_proj(swiglu_joint(F.linear(x, *one)))


def qk_weight(attn, sizes) -> Tensor | None:
    """The norms' weights of all query and key heads, (A + K, D)."""
    if attn.norms:
        heads = (
            attn.q_norm.weight.expand(sizes.heads, -1),
            attn.k_norm.weight.expand(sizes.kv_heads, -1),
        )
        return torch.cat(heads)
    return None


def blank(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on a CPU pages that the system hands out when they are first touched."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return (
        torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8))
        .view(dtype)
        .view(shape)
    )


def sent(values, device: torch.device) -> Tensor:
    """The values on the device; to CUDA from pinned memory, for which the host does not wait."""
    values = torch.as_tensor(values)
    return values if device.type == "cpu" else values.pin_memory().to(device, non_blocking=True)


def moved(live: list[int], *tensors: Tensor) -> dict[int, int]:
    """Copies the live rows of the tensors into the gaps below them, so that they become the first:
    row -> gap.
    """
    gaps = sorted(set(range(len(live))) - set(live))
    above = [row for row in live if row >= len(live)]
    for t in tensors:
        t[gaps] = t[above]
    return dict(zip(above, gaps, strict=True))


def fp32_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden (N, H) @ weight (V, H).T in fp32, as the trainer's log-probs take them: rounding
    logits to bf16 moves a log-prob by up to 0.09.
    """
    if hidden.dtype == torch.float32:
        return F.linear(hidden, weight)
    if hidden.is_cuda:
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)
    return torch.cat([F.linear(hidden.float(), rows.float()) for rows in weight.split(16384)], 1)


@torch.no_grad()
def predict_centres(model, processor, examples: list[Example]) -> list[np.ndarray]:
    """The 3D head's centre of every region, per example (k, 3), metres in the camera frame of the
    region's own image.
    """
    out = []
    while len(out) < len(examples):
        count = len(fitting(processor, examples[len(out) :], PREFILL[model.device.type]))
        batch = processor(examples[len(out) : len(out) + count]).to(model.device)
        centres = model.head3d(model.hidden(batch)[batch.region_token])[0].cpu().numpy()
        ends = [end for _, end, *_ in batch.segments]
        at = np.searchsorted(ends, batch.region_token.cpu().numpy(), side="right")
        out += [centres[at == i] for i in range(len(ends))]
    return out
