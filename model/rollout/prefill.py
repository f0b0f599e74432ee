"""How many prompts go through the model in one packed forward."""

import numpy as np
import torch

from srreal import Example

# Tokens of a packed forward; of an 8B model they take 1.8 GB. A longer prompt goes by itself.
PREFILL_TOKENS = {"cpu": 4096, "cuda": 8192}


def lengths_within(processor, examples: list[Example], budget: int) -> list[int]:
    """Return the lengths of the first prompts: as many as `budget` tokens hold, at least one."""
    lengths = []
    for example in examples:
        lengths.append(len(processor.prompt_ids(example)))
        if sum(lengths) > budget:
            return lengths[:-1] or lengths
    return lengths


@torch.no_grad()
def predict_centres(model, processor, examples: list[Example]) -> list[np.ndarray]:
    """Return the 3D head's centres of each example's regions, without sampling a token.

    An array (k, 3) per example, in metres, in the camera frame of the region's own image.
    """
    budget = PREFILL_TOKENS[model.device.type]
    out = []
    while len(out) < len(examples):
        remaining = examples[len(out) :]
        count = len(lengths_within(processor, remaining, budget))
        batch = processor(remaining[:count]).to(model.device)
        hidden = model.hidden(batch)
        centres, _ = model.head3d(hidden[batch.region_token])
        region_token = batch.region_token.cpu().numpy()
        centres = centres.cpu().numpy()
        # A segment is an example: its regions are the <mask> tokens inside.
        for start, end, *_ in batch.segments:
            inside = (region_token >= start) & (region_token < end)
            out.append(centres[inside])
    return out
