"""Sampling on the training weights: a fixed number of slots, refilled as their sequences end.

    engine.py     Engine, and the stream that it returns: admit, step, finish, turn by turn
    scheduler.py  which sequences wait, run and have finished; lists, no tensors
    cache.py      keys and values: a row for each prompt, a suffix for each slot, and its readers
    slots.py      what each slot has sampled so far; logits to tokens
    decode.py     a token through the decoder, for all slots: eager, or as one CUDA graph
    cpu.py        the same, faster on a CPU; nothing else is in it
    prefill.py    how many prompts go through the model at once; the 3D head's answers

The noise of a token is a hash of (seed, example id, path, sample index, position, token id), and of
which occurrence it is where a call asks the same more than once: never of the slot, the batch or
the rank, so in fp32 a sample does not depend on what it is batched with.
The log-prob that is kept is the trainer's: log softmax of all logits at the sampling temperature
(at temperature 0, which is greedy, that at 1). Banned ids (vision markers, `<mask>`, rows without a
token) are never sampled; the ban does not enter the log-probs.
"""

from model.rollout.cache import default_slots
from model.rollout.engine import Engine, Rollout, SampleStream, generate, sample_groups
from model.rollout.prefill import predict_boxes, predict_centres
from model.rollout.scheduler import occurrences

__all__ = [
    "Engine",
    "Rollout",
    "SampleStream",
    "default_slots",
    "generate",
    "occurrences",
    "predict_boxes",
    "predict_centres",
    "sample_groups",
]
