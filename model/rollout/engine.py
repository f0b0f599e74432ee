"""The sampler: examples in, groups of completions out, in the examples' order.

A turn of the engine is

    admit     waiting sequences take free slots; where their prompts are not encoded yet, the next
              ones go through the model once, packed, and fill rows that all their samples read
    step      one token for every slot: logits, sample, record; then through the decoder
    finish    sequences that have ended leave their slots, the last of a prompt frees its row

Turns go on until the next group is whole.
"""

from dataclasses import dataclass

import torch

from kernels import interpreted
from model.batch import Prompt
from model.images import DeviceImages
from model.rollout.cache import Options, default_slots
from model.rollout.cpu import CpuModelRunner
from model.rollout.decode import ModelRunner
from model.rollout.prefill import PREFILL_TOKENS, prompts_within
from model.rollout.scheduler import Scheduler, Sequence
from srreal import Example


@dataclass
class Rollout:
    """One sampled completion.

    `tokens` hold the end token where there was one; `text` does not, and is not stripped.
    """

    text: str
    tokens: list[int]
    logprobs: list[float]  # of `tokens`, under the full softmax at the sampling temperature
    finished: bool  # False: cut at max_new_tokens


class SampleStream:
    """The groups of one call, sampled as they are asked for: an iterator of list[Rollout].

    Groups come in the examples' order, never in that of finishing, which would prefer short ones.
    After `close()` `discarded_samples` and `discarded_tokens` count what was sampled behind the
    last group that was returned.
    """

    def __init__(self, processor, scheduler: Scheduler, runner, prefill_tokens: int, images=None):
        self.processor = processor
        self.scheduler = scheduler
        self.runner = runner
        self.prefill_tokens = prefill_tokens
        self.images = images
        self.closed = False
        self.returned = 0
        self.discarded_samples = 0
        self.discarded_tokens = 0

    def __iter__(self) -> "SampleStream":
        return self

    def __next__(self) -> list[Rollout]:
        if self.closed or self.returned == len(self.scheduler.groups):
            self.close()
            raise StopIteration
        # Others may have finished long ago; they are returned when it is their turn.
        group = self.scheduler.groups[self.returned]
        while group.unfinished:
            self.advance()
        self.returned += 1
        return [self._rollout(sequence) for sequence in group.sequences]

    @torch.no_grad()
    def advance(self) -> None:
        """Sample a token for every sequence that runs, and let others begin before."""
        scheduler = self.scheduler
        runner = self.runner
        # Prompts whose rows wait for others to end, wait here with all that come after them.
        admitted = scheduler.admit(runner.cache, runner.clock)
        while scheduler.waiting and runner.cache.free_slots and self._prefill():
            admitted += scheduler.admit(runner.cache, runner.clock)
        # Once for all that were admitted, however many prefills it took.
        if admitted:
            runner.slots.load(admitted, runner.cache.prompts)
            runner.cache.fork(admitted)
            runner.link(scheduler.running)
        runner.step()
        # On CUDA this lags by up to two looks: an ended slot goes on for nobody until it is seen.
        ended = runner.take_ended(scheduler.running)
        if ended:
            runner.slots.clear(ended)
            scheduler.finish(ended, runner.cache)
        runner.tidy(scheduler.running, bool(ended), bool(scheduler.waiting))

    def _prefill(self) -> bool:
        """Encode the next prompts, as many as the budget and the free rows hold.

        Returns False while they have to wait for rows that are in use.
        """
        prompts = self.runner.cache.prompts
        if not prompts.free:
            return False
        # A prompt at least; how many more depends on their lengths.
        groups = list(self.scheduler.unencoded)[: len(prompts.free)]
        sources = (group.source for group in groups)
        encoded = prompts_within(self.processor, sources, self.prefill_tokens, share=True)
        if not self.runner.make_room(max(len(prompt.ids) for prompt in encoded)):
            return False
        # Wider rows may be fewer.
        encoded = encoded[: len(prompts.free)]
        # One packed forward, without padding and with shared images once, as in training.
        batch = self.processor.pack(encoded, share=True).to(prompts.lengths.device, self.images)
        rows = prompts.take([len(prompt.ids) for prompt in encoded])
        # hidden (T, H); of each layer its keys and values, or a delta net's state and ring.
        hidden, layers = self.runner.model.prefill(batch)
        prompts.store(rows, batch, hidden, layers)
        self.scheduler.start_prompts(rows)
        return True

    def _rollout(self, sequence: Sequence) -> Rollout:
        tokens = sequence.tokens
        # Cut at max_new_tokens there is no end token, even if the text happens to be complete.
        finished = bool(tokens) and tokens[-1] in self.processor.end_ids
        return Rollout(self.processor.decode(tokens), tokens, sequence.logprobs, finished)

    @torch.no_grad()
    def close(self) -> None:
        """Stop, and count what was sampled in vain."""
        if self.closed:
            return
        self.closed = True
        # What ended later than its group's turn, and what still runs. The one wait is for lengths.
        returned = set(self.scheduler.groups[: self.returned])
        running = self.scheduler.running
        lengths = self.runner.slots.length.tolist() if running else []
        for sequence in self.scheduler.finished + running:
            if sequence.group not in returned:
                self.discarded_samples += 1
                self.discarded_tokens += len(sequence.tokens)
        for sequence in running:
            if sequence.group not in returned:
                self.discarded_tokens += lengths[sequence.slot]
        # Buffers and images go, unless the caller has them, too.
        self.runner = None
        self.images = None


class Engine:
    """A sampler for one model; on CUDA its buffers and its graph outlive a call.

    The options are the fields of `Options`. There may be one open stream at a time. runner: the
    class that steps; None: ModelRunner, or CpuModelRunner on a CPU unless Triton's kernels are
    interpreted.
    """

    def __init__(self, model, processor, runner: type | None = None, **options):
        self.model = model
        self.processor = processor
        self.options = Options(**options)
        if runner is None:
            # Interpreted, the kernels run in ModelRunner: so a CPU tests what a GPU does.
            has_kernels = model.device.type != "cpu" or interpreted()
            runner = ModelRunner if has_kernels else CpuModelRunner
        self.runner_class = runner
        self.runner = None

    def sample_groups(
        self,
        examples: list[Example | Prompt],
        seed: int = 0,
        images: DeviceImages | None = None,
        occurrence_of: list[int] | None = None,
    ) -> SampleStream:
        """Sample n completions of each example, or of the prompt that the processor made of it.

        The weights are those of now.

        images: takes the prompts' images, and lends them to whoever trains on them. occurrence_of:
        which occurrence each is of its example, where other ranks have some; None: as in these
        examples.
        """
        options = self.options
        scheduler = Scheduler(examples, options.n, seed, occurrence_of)
        if options.max_new_tokens == 0:
            scheduler.cancel()
        # A call that asks for nothing makes no buffers.
        samples = len(scheduler.waiting)
        runner = self._prepare(samples) if samples else None
        budget = options.prefill_tokens or PREFILL_TOKENS[self.model.device.type]
        return SampleStream(self.processor, scheduler, runner, budget, images)

    def _prepare(self, samples: int):
        """Return an empty runner for so many samples."""
        # On a CPU buffers cost next to nothing to make, and should not stay during an update.
        options = self.options
        slots = options.slots or default_slots(self.model, options.n, options.max_new_tokens)
        if self.model.device.type == "cpu":
            runner = self.runner_class(self.model, options, min(slots, samples))
        else:
            if self.runner is None:
                self.runner = self.runner_class(self.model, options, slots)
            runner = self.runner
        runner.reset(self.processor)
        return runner

    def release(self) -> None:
        """Free the buffers and the graph; the next call makes them again."""
        self.runner = None


def sample_groups(
    model,
    processor,
    examples: list[Example | Prompt],
    n: int = 1,
    seed: int = 0,
    images: DeviceImages | None = None,
    **options,
) -> SampleStream:
    """Sample n completions of each example: a stream of groups, for whom one call is enough.

    options: max_new_tokens, temperature, top_p, slots and the other fields of `Options`.
    """
    return Engine(model, processor, n=n, **options).sample_groups(examples, seed, images)


def generate(
    model,
    processor,
    examples: list[Example | Prompt],
    n: int = 1,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    slots: int | None = None,
    **options,
) -> list[list[Rollout]]:
    """Return n completions of each example, in the examples' order.

    temperature 0 is greedy; slots: sequences that run at a time, None: as many as fit; options: the
    other fields of `Options`.
    """
    return list(
        sample_groups(
            model,
            processor,
            examples,
            n=n,
            seed=seed,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            slots=slots,
            **options,
        )
    )
