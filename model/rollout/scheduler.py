"""Which sequences wait for a slot, run in one, and have finished. Lists on the host, no tensors."""

from collections import Counter, deque
from dataclasses import dataclass, field

from kernels.sample import sequence_key
from model.batch import Prompt
from srreal import Example


@dataclass(eq=False)
class SequenceGroup:
    """One prompt and its n samples."""

    source: Example | Prompt
    sequences: list["Sequence"] = field(default_factory=list)
    row: int | None = None  # of the cache; None before prefill, and again when all have finished
    unfinished: int = 0

    @property
    def example(self) -> Example:
        return self.source.example if isinstance(self.source, Prompt) else self.source


@dataclass(eq=False)
class Sequence:
    """One sample: its noise, the slot that it runs in, and in the end what was sampled."""

    group: SequenceGroup
    noise_key: int
    slot: int | None = None
    started: int = 0  # the runner's clock when it got its slot
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


def occurrences(examples: list[Example]) -> list[int]:
    """Return of each example how many before it have the same id and path."""
    counts: Counter = Counter()
    occurrence_of = []
    for example in examples:
        key = (example.id, example.path)
        occurrence_of.append(counts[key])
        counts[key] += 1
    return occurrence_of


class Scheduler:
    """All sequences of one call, in the examples' order.

    occurrence_of: which occurrence each is of its example; None: as `occurrences` counts them.
    """

    def __init__(
        self,
        examples: list[Example | Prompt],
        n: int,
        seed: int,
        occurrence_of: list[int] | None = None,
    ):
        self.groups = [SequenceGroup(example) for example in examples]
        if occurrence_of is None:
            occurrence_of = occurrences([group.example for group in self.groups])
        for group, occurrence in zip(self.groups, occurrence_of, strict=True):
            example = group.example
            group.unfinished = n
            for index in range(n):
                # Of what the sample is, never of where it runs: the same noise in any slot and on
                # any rank.
                key = sequence_key(seed, example.id, example.path, index, occurrence)
                group.sequences.append(Sequence(group, key))
        # Groups whose prompts still have to go through the model; always the last ones.
        self.unencoded = deque(self.groups)
        self.waiting: deque[Sequence] = deque()
        for group in self.groups:
            self.waiting.extend(group.sequences)
        self.running: list[Sequence] = []
        self.finished: list[Sequence] = []

    def cancel(self) -> None:
        """Finish all groups without a token."""
        self.waiting.clear()
        for group in self.groups:
            group.unfinished = 0

    def start_prompts(self, rows: list[int]) -> None:
        """Give the next prompts, which have been encoded, their rows of the cache."""
        for row in rows:
            self.unencoded.popleft().row = row

    def admit(self, cache, clock: int) -> list[Sequence]:
        """Move waiting sequences into free slots, as far as their prompts are encoded."""
        admitted = []
        # First come, first served: what stands behind an unencoded prompt waits with it.
        while self.waiting and cache.free_slots and self.waiting[0].group.row is not None:
            sequence = self.waiting.popleft()
            sequence.slot = cache.take_slot(sequence.group.row)
            # To know which look at the slots' state is the first that can be of this sequence.
            sequence.started = clock
            admitted.append(sequence)
        self.running += admitted
        # In the slots' order, whatever order they were taken in: so results don't depend on it.
        self.running.sort(key=lambda sequence: sequence.slot)
        return admitted

    def finish(self, ended: list[Sequence], cache) -> None:
        """Free the slots of sequences that have ended, and a prompt's row after its last one."""
        for sequence in ended:
            # A walk through a list of some hundred; next to a step of the model it is nothing.
            self.running.remove(sequence)
            group = sequence.group
            group.unfinished -= 1
            if group.unfinished == 0:
                # Nobody reads the prompt any more.
                cache.prompts.free.append(group.row)
                group.row = None
        self.finished += ended
        # Of these the lowest is the first to be taken again.
        cache.free_slots += [sequence.slot for sequence in reversed(ended)]
