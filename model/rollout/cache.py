"""Keys and values: a row for each prompt, which its samples share, and a suffix for each slot.

Of a gated delta layer (Qwen3.5) a prompt leaves a state instead, of a fixed size, which is copied
to the slot of each of its samples: at the first token they part.

B prompt rows, S slots, n samples a prompt; P room of a prompt row, R room of a suffix; T packed
tokens, H hidden width, K key-value heads, D head width.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kernels.decode_attention import Table
from kernels.packed_attention import upload
from model.delta import walked
from model.rollout.scheduler import Sequence

MAX_SLOTS = 256  # more hardly raise the throughput, neither of a GPU nor of a CPU
ASSUMED_PROMPT = 1024  # tokens, where no prompt is known yet
CPU_BYTES = 2**31  # for keys and values
CUDA_SHARE = 0.4  # for keys and values, of the memory that is free
PROMPT_STEP = 256  # a prompt row has room for a multiple of so many tokens
# With a power of two as their distance, suffixes would share the sets of a CPU's caches.
SPARE_PLACES = 8


@dataclass(frozen=True)
class Options:
    """How to sample, and in how much memory."""

    n: int = 1  # samples of each prompt
    max_new_tokens: int = 256
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    slots: int | None = None  # sequences that run at a time; None: see `default_slots`
    prefill_tokens: int | None = None  # of prompts encoded at a time; None: PREFILL_TOKENS
    prompt_step: int = PROMPT_STEP
    cache_bytes: float | None = None  # room for new keys and values; None: see `spare_bytes`


def default_slots(model, n: int, max_new_tokens: int) -> int:
    """Return how many slots fit, with all their keys and values, behind ASSUMED_PROMPT tokens.

    On a CPU this follows from shapes alone, on CUDA from the memory that is free now.
    """
    # The cache has two prompt rows for every n slots.
    tokens = max_new_tokens + 2 * ASSUMED_PROMPT / n
    # A slot's own, and its share of the prompts'.
    states = 1 + 2 / n
    slot = tokens * token_bytes(model) + states * state_bytes(model)
    # Whole sequences: a slot's keys are never moved out to make room for another's.
    slots = spare_bytes(model.device) // slot
    return int(max(1, min(MAX_SLOTS, slots)))


def spare_bytes(device: torch.device) -> float:
    """Return the bytes that new keys and values may take."""
    if device.type == "cpu":
        return CPU_BYTES
    free, _ = torch.cuda.mem_get_info(device)
    # What PyTorch has reserved and does not use is free, too.
    reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return CUDA_SHARE * (free + reserved)


def token_bytes(model) -> int:
    """Return the bytes of one token's keys and values in all layers that attend."""
    sizes = model.decoder.sizes
    return 2 * sizes.attention_layers * sizes.kv_heads * sizes.head_dim * model.dtype.itemsize


def state_bytes(model) -> int:
    """Return the bytes of one sequence's states in all gated delta layers."""
    return sum(state.nbytes + ring.nbytes for state, ring in new_states(model, 1, "meta"))


def new_states(model, count: int, device=None) -> list[tuple[Tensor, Tensor]]:
    """Return zeros for each delta layer: states (count, V, D, E) fp32, and rings (count, w, C).

    V value heads, D and E widths of a key and of a value, w taps, C channels of the convolution.
    """
    sizes = model.decoder.sizes
    delta = sizes.delta
    if delta is None:
        return []
    device = device or model.device
    state = (count, delta.value_heads, delta.key_dim, delta.value_dim)
    ring = (count, delta.taps, delta.channels)
    states = []
    for _ in range(sizes.delta_layers):
        zeros = torch.zeros(state, dtype=torch.float32, device=device)
        states.append((zeros, torch.zeros(ring, dtype=model.dtype, device=device)))
    return states


@dataclass
class Extent:
    """How much of the buffers a step reads: all of them in a graph, on a CPU what is in use."""

    slots: int
    prompts: int
    prompt_keys: int
    suffix_keys: int


class PromptRows:
    """What sampling needs of B encoded prompts."""

    def __init__(self, model, count: int, options: Options):
        sizes = model.decoder.sizes
        self.options = options
        self.token_bytes = token_bytes(model)
        like = model.decoder.norm.weight.detach()
        shape = (2, count, sizes.kv_heads, options.prompt_step, sizes.head_dim)
        # Keys and values of each layer that attends, (2, B, K, P, D).
        self.layers = [like.new_zeros(shape) for _ in range(sizes.attention_layers)]
        self.states = new_states(model, count)
        self.attends = sizes.attends
        self.last_hidden = like.new_zeros(count, sizes.hidden)
        self.next_position = like.new_zeros(count, dtype=torch.int64)
        self.lengths = like.new_zeros(count, dtype=torch.int64)
        self.host_lengths = [0] * count
        self.free = list(range(count))

    @property
    def count(self) -> int:
        return self.layers[0].shape[1]

    @property
    def room(self) -> int:
        return self.layers[0].shape[3]

    def reset(self) -> None:
        self.free = list(range(self.count))

    def make_room(self, length: int) -> bool:
        """Widen the rows for prompts of `length` tokens, and drop some if memory is too small.

        Returns False while rows that have to go are in use, or while none would be left free. The
        rows move to new addresses.
        """
        room = self.room
        if length <= room:
            return True
        step = self.options.prompt_step
        # Rounded up, so that a slightly longer prompt later doesn't move all rows again.
        wider = -(-length // step) * step
        # The old rows' bytes count as free: layer by layer, the new ones take their place.
        spare = self.options.cache_bytes or spare_bytes(self.lengths.device)
        fitting = (spare + self.count * room * self.token_bytes) // (wider * self.token_bytes)
        count = int(max(min(self.count, fitting), 1))
        # Rows keep their numbers, so those that go are the last.
        taken = set(range(self.count)) - set(self.free)
        # Rows up to the last one in use have to stay where they are.
        used = max(taken, default=-1) + 1
        free = [row for row in self.free if row < count]
        if used > count or (used and not free):
            return False
        self.free = free
        for i, old in enumerate(self.layers):
            # The old layer's memory is free before the next layer's is taken.
            _, _, heads, _, width = old.shape
            # Zeros, not empty: attention reads behind a prompt's end, and masks what it read; nan
            # it couldn't mask.
            self.layers[i] = old.new_zeros(2, count, heads, wider, width)
            self.layers[i][:, :used, :, :room] = old[:, :used]
        return True

    def take(self, lengths: list[int]) -> list[int]:
        """Return free rows for prompts of these lengths."""
        self.free.sort()
        rows = self.free[: len(lengths)]
        self.free = self.free[len(lengths) :]
        for row, length in zip(rows, lengths, strict=True):
            self.host_lengths[row] = length
        return rows

    def store(self, rows: list[int], batch, hidden: Tensor, layers: list) -> None:
        """Fill rows with what the model's prefill returned for a batch of prompts."""
        device = self.lengths.device
        at = upload(rows, device)
        lengths = torch.tensor([self.host_lengths[row] for row in rows])
        self.last_hidden[at] = hidden[batch.last]
        self.next_position[at] = batch.next_position
        self.lengths[at] = upload(lengths, device)
        # (T, K, D) -> (rows, K, P, D): behind its end a prompt repeats its last token, unseen.
        longest = int(lengths.max())
        index = upload(prompt_tokens(batch, longest), device)
        ends = upload(prompt_ends(batch), device)
        caches = iter(self.layers)
        states = iter(self.states)
        for attends, left in zip(self.attends, layers, strict=True):
            for room, new in zip(next(caches if attends else states), left, strict=True):
                if attends:  # keys, then values
                    room[at, :, :longest] = new[index].transpose(1, 2)
                else:  # state, then ring
                    room[at] = new[ends]


def prompt_tokens(batch, longest: int) -> np.ndarray:
    """Return where the tokens of a batch's prompts are packed: (B, longest), the last repeated.

    A prompt is the segment that its last token ends, behind that segment's prefix.
    """
    segments = walked(batch.segments)
    rows = []
    for place in prompt_ends(batch):
        start, end, low, high = segments[place]
        tokens = np.concatenate((np.arange(low, high), np.arange(start, end)))
        rows.append(np.pad(tokens, (0, longest - len(tokens)), mode="edge"))
    return np.stack(rows)


def prompt_ends(batch) -> list[int]:
    """Return which segment, in the order of a walk, each of a batch's prompts ends with."""
    by_end = {end: place for place, (_, end, _, _) in enumerate(walked(batch.segments))}
    return [by_end[last + 1] for last in batch.last.tolist()]


class Cache:
    """Prompt rows that n slots share, a suffix for each slot, and who reads which row."""

    def __init__(self, model, options: Options, slots: int):
        sizes = model.decoder.sizes
        # The prompts of all slots, and as many again whose last samples are still running.
        self.prompts = PromptRows(model, 2 * -(-slots // options.n), options)
        like = self.prompts.last_hidden
        room = options.max_new_tokens + SPARE_PLACES
        shape = (2, slots, sizes.kv_heads, room, sizes.head_dim)
        # Keys and values of each layer that attends, (2, S, K, R, D).
        self.suffixes = [like.new_zeros(shape) for _ in range(sizes.attention_layers)]
        self.states = new_states(model, slots)
        # (B, n) the slots that read a row, -1 for none; (S,) where a slot stands in that table.
        self.readers = like.new_zeros(len(self.prompts.lengths), options.n, dtype=torch.int64)
        self.reader_index = like.new_zeros(slots, dtype=torch.int64)
        self.free_slots: list[int] = []
        self.reset()

    @property
    def nbytes(self) -> int:
        keys_and_values = sum(t.nbytes for t in (*self.prompts.layers, *self.suffixes))
        states = (*self.prompts.states, *self.states)
        return keys_and_values + sum(state.nbytes + ring.nbytes for state, ring in states)

    def reset(self) -> None:
        self.prompts.reset()
        self.readers.fill_(-1)
        # Taken from the end: the lowest first.
        self.free_slots = list(range(self.slot_count))[::-1]

    @property
    def slot_count(self) -> int:
        return len(self.reader_index)

    def make_room(self, length: int) -> bool:
        return self.prompts.make_room(length)

    def take_slot(self, row: int) -> int:
        """Return a free slot for a sample of the prompt in `row`."""
        return self.free_slots.pop()

    def fork(self, sequences: list[Sequence]) -> None:
        """Copy the states of their prompts' ends to the slots of sequences that begin."""
        if not self.states:
            return
        device = self.reader_index.device
        places = [(sequence.slot, sequence.group.row) for sequence in sequences]
        slots, rows = upload(places, device).T
        for own, prompts in zip(self.states, self.prompts.states, strict=True):
            for slot_part, prompt_part in zip(own, prompts, strict=True):
                slot_part[slots] = prompt_part[rows]

    def link(self, running: list[Sequence]) -> None:
        """Write down which slots read which prompt row."""
        rows, n = self.readers.shape
        # A row's readers stand together, so that they are few blocks of queries.
        readers = [[] for _ in range(rows)]
        index = [0] * self.slot_count
        for sequence in running:
            of_row = readers[sequence.group.row]
            index[sequence.slot] = sequence.group.row * n + len(of_row)
            of_row.append(sequence.slot)
        for of_row in readers:
            of_row += [-1] * (n - len(of_row))
        # In place: a graph reads from this address.
        self.readers.copy_(upload(readers, self.readers.device))
        self.reader_index.copy_(upload(index, self.readers.device))

    def table(self, lengths: Tensor, extent: Extent) -> Table:
        """Return what attention has to know; lengths (S,): tokens of each slot's suffix."""
        # Lengths differ by slot and are read on the device, so that a graph serves all steps.
        prompts = extent.prompts
        return Table(
            self.prompts.lengths[:prompts],
            lengths,
            self.readers[:prompts],
            self.reader_index[: extent.slots],
        )

    def keys_and_values(self, layer: int, extent: Extent) -> tuple:
        """Return a layer's (prompt keys, values, suffix keys, values) as far as a step reads."""
        # Views: nothing is copied.
        prompts = self.prompts.layers[layer][:, : extent.prompts]
        suffixes = self.suffixes[layer][:, : extent.slots]
        return (
            *prompts[..., : extent.prompt_keys, :],
            *suffixes[..., : extent.suffix_keys, :],
        )
