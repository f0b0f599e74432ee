"""What each slot has sampled so far. It stays on the device, so that a step never asks the host.

S slots, M = max_new_tokens, H hidden width, V vocabulary rows.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.packed_attention import upload
from kernels.sample import sample
from model.rollout.cache import Options, PromptRows
from model.rollout.scheduler import Sequence

# Steps between two looks at a GPU's slots: an ended sequence idles for 4 + 8 steps in the mean.
POLL = 8


class Slots:
    """The state of S sequences."""

    def __init__(self, model, options: Options, count: int):
        self.options = options
        like = model.decoder.norm.weight.detach()
        integers = like.new_zeros(count, dtype=torch.int64)
        most = options.max_new_tokens
        self.hidden = like.new_zeros(count, model.decoder.sizes.hidden)  # of the last token
        self.noise_key = integers.clone()
        self.first_position = integers.clone()  # of the sampled tokens
        self.length = integers.clone()
        self.ended = like.new_zeros(count, dtype=torch.bool)
        # The last column takes what slots without a running sequence sample.
        self.tokens = like.new_zeros(count, most + 1, dtype=torch.int64)
        self.logprobs = like.new_zeros(count, most + 1, dtype=torch.float32)
        self.unused_column = torch.tensor(most, device=like.device)
        self.banned = like.new_zeros(model.decoder.sizes.vocab, dtype=torch.bool)
        self.is_end = torch.zeros_like(self.banned)

    def reset(self, processor) -> None:
        """Empty all slots."""
        self.ended.fill_(True)
        self.length.fill_(1)
        self.banned.copy_(processor.banned)
        self.is_end.zero_()[processor.end_ids] = True

    def load(self, sequences: list[Sequence], prompts: PromptRows) -> None:
        """Begin sequences behind their prompts."""
        values = [(s.slot, s.group.row, s.noise_key) for s in sequences]
        slots, rows, keys = upload(values, self.length.device).T
        self.noise_key[slots] = keys
        self.hidden[slots] = prompts.last_hidden[rows]
        self.first_position[slots] = prompts.next_position[rows]
        # Unlike [slots] = 0, which copies the number from the host and waits for that.
        self.length.index_fill_(0, slots, 0)
        self.ended.index_fill_(0, slots, False)

    def clear(self, ended: list[Sequence]) -> None:
        """Let the slots of ended sequences read one key, not all that their sequence had."""
        slots = [sequence.slot for sequence in ended]
        self.length.index_fill_(0, upload(slots, self.length.device), 1)

    def sample_tokens(self, head_weight: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Sample and record a token for each of the first `count` slots: (ids, mRoPE positions)."""
        ended = self.ended[:count]
        length = self.length[:count]
        options = self.options
        logits = fp32_logits(self.hidden[:count], head_weight)
        tokens, logprobs = sample(
            logits,
            self.noise_key[:count],
            length,
            options.temperature,
            options.top_p,
            self.banned,
        )
        # No branches: an ended slot samples on, into a column that nobody reads.
        column = torch.where(ended, self.unused_column, length)[:, None]
        self.tokens[:count].scatter_(1, column, tokens[:, None])
        self.logprobs[:count].scatter_(1, column, logprobs[:, None])
        # The place of a live slot's new token. Text has one position on all axes of mRoPE.
        positions = self.first_position[:count] + length
        length += ~ended
        ended |= self.is_end[tokens] | (length == options.max_new_tokens)
        return tokens, positions

    def state(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return what the host reads of sequences that have ended."""
        return self.ended, self.length, self.tokens, self.logprobs


def fp32_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """Return hidden (N, H) @ weight (V, H).T in fp32, as the trainer's log-probs take them.

    Logits rounded to bf16 would move a log-prob by up to .09.
    """
    if hidden.dtype == torch.float32:
        return F.linear(hidden, weight)
    if hidden.is_cuda:
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)
    # A part of the vocabulary at a time: the whole weight in fp32 would take as much as the model.
    parts = [F.linear(hidden.float(), rows.float()) for rows in weight.split(16384)]
    return torch.cat(parts, 1)


def take_ended(running: list[Sequence], state: tuple, clock: int) -> list[Sequence]:
    """Return the sequences that have ended in a slots' state of `clock`, with what they sampled."""
    ended, lengths, tokens, logprobs = state
    flags = ended.tolist()
    out = []
    for sequence in running:
        slot = sequence.slot
        # A state from before its start is still that of the slot's previous sequence.
        if flags[slot] and sequence.started < clock:
            length = int(lengths[slot])
            sequence.tokens = tokens[slot, :length].tolist()
            sequence.logprobs = logprobs[slot, :length].tolist()
            out.append(sequence)
    return out


class HostState:
    """A copy of CUDA's slots on the host, made every few steps while further steps run.

    What is read was copied at the look before, so the host never waits for the steps in between.
    """

    def __init__(self, slots: Slots):
        self.source = slots.state()
        self.target = [torch.zeros_like(t, device="cpu").pin_memory() for t in self.source]
        self.copied = torch.cuda.Event()
        self.copied_at = 0

    def reset(self) -> None:
        self.copied_at = 0

    def take_ended(self, running: list[Sequence], clock: int) -> list[Sequence]:
        """Return the sequences that had ended at the look before; none between two looks."""
        if clock % POLL:
            return []
        # Recorded a whole poll ago: it has long passed.
        self.copied.synchronize()
        out = take_ended(running, self.target, self.copied_at)
        # Everything, not only who has ended: that is not known yet, and it's megabytes at most.
        for source, target in zip(self.source, self.target, strict=True):
            target.copy_(source, non_blocking=True)
        self.copied.record()
        self.copied_at = clock
        return out
