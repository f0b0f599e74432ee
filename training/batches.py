"""Which rows a step takes, and how they are packed into forward passes.

Both are pure functions: of (seed, position), whatever the number of ranks; of the lengths alone.
"""

import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

from model.processor import Processor, Prompt, has_depth
from pictures import image_key
from srreal import Example
from training.ranks import all_reduce


class Order:
    """An endless shuffled order of rows. Epoch e is drawn from (seed, e): a place is one number.

    Rows of one key (the questions of one image) come in runs of at most `run`, to share the image's
    encoding; each row once an epoch. Unique keys give a plain shuffle.
    """

    def __init__(self, keys: Iterable, seed, run: int = 1):
        rows_of_key: dict = {}
        self.rows_in_epoch = 0
        for row, key in enumerate(keys):
            rows_of_key.setdefault(key, []).append(row)
            self.rows_in_epoch += 1
        self.groups = list(rows_of_key.values())
        self.seed = seed
        self.run = run
        self.epochs: dict[int, list[int]] = {}  # the last two that were asked for

    def epoch(self, number: int) -> list[int]:
        """Return the rows of epoch `number` in their order."""
        if number in self.epochs:
            return self.epochs[number]
        # A string as the seed: Python hashes it the same on every machine, and no other epoch
        # shares it.
        rng = random.Random(f"{self.seed} {number}")
        runs = []
        for group in self.groups:
            rows = rng.sample(group, len(group))
            for start in range(0, len(rows), self.run):
                runs.append(rows[start : start + self.run])
        rng.shuffle(runs)
        order = []
        for rows in runs:
            order.extend(rows)
        # The one before stays: a batch may straddle two.
        before = {k: v for k, v in self.epochs.items() if k == number - 1}
        self.epochs = before | {number: order}
        return order

    def rows(self, start: int, count: int) -> list[int]:
        """Return rows [start, start + count) of the endless order."""
        out = []
        for place in range(start, start + count):
            # A place may lie in any epoch: a resumed run asks for where it was.
            epoch, offset = divmod(place, self.rows_in_epoch)
            out.append(self.epoch(epoch)[offset])
        return out


def images_key(example: Example) -> tuple:
    """Return what questions of the same images have in common."""
    return tuple(image_key(image) for image in example.images)


def prefetched(make: Callable, items: Iterable) -> Iterator:
    """Yield make(item) of each; the next is made in a thread while the caller uses the last."""
    with ThreadPoolExecutor(1) as pool:
        futures: deque = deque()
        for item in items:
            futures.append(pool.submit(make, item))
            if len(futures) > 1:
                yield futures.popleft().result()
        while futures:
            yield futures.popleft().result()


def pack_by_tokens(
    lengths: Sequence[int], budget: int, shared: Sequence[int] | None = None
) -> list[slice]:
    """Cut consecutive items into runs of at most `budget` tokens, or of one longer item.

    shared: how many tokens an item has in common with the one before; they count only where it
    starts a run.
    """
    runs = []
    start = used = 0
    for i, length in enumerate(lengths):
        # What the row before has packed already costs nothing.
        added = length - shared[i] if shared and i > start else length
        if i > start and used + added > budget:
            runs.append(slice(start, i))
            start = i
            used = length
        else:
            used += added
    if lengths:
        runs.append(slice(start, len(lengths)))
    return runs


# ---- Ranks with unequal work: each pass is a collective


def equalize_passes(microbatches: list, make_dummy: Callable) -> list:
    """Return the micro-batches, and dummies for as long as another rank still has some."""
    # Every pass is a collective where parameters are sharded: all ranks make equally many.
    most = int(all_reduce([len(microbatches)], "MAX")[0])
    return microbatches + [make_dummy() for _ in range(most - len(microbatches))]


def dummy_example() -> Example:
    """Return a tiny example with image, depth and region. It gets no weight in any loss."""
    return Example(
        "filler",
        "direct",
        [Image.new("RGB", (64, 64))],
        "What is it <mask>?",
        "A",
        depths=[np.ones((64, 64), np.float32)],
        intrinsics=[(64, 64, 32, 32)],
        regions=[(0, (8, 8, 56, 56))],
    )


def dummy_prompt(processor: Processor) -> Prompt:
    """Build the dummy's prompt. It isn't recorded that regions were read."""
    return processor.prompt(dummy_example(), is_dummy=True)


def needs_dummy(examples: list[Example], world: int) -> bool:
    """Return whether a pass might leave out parameters whose gradients other ranks reduce."""
    return world > 1 and not any(touches_all_parameters(example) for example in examples)


def touches_all_parameters(example: Example) -> bool:
    # Image, depth and region: together they pass by every parameter that may learn.
    return bool(example.images and example.regions) and has_depth(example)
