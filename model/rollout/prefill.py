"""How many prompts go through the model in one packed forward."""

from collections.abc import Iterable

import numpy as np
import torch

from model.batch import Prompt
from srreal import Example

# Tokens of a packed forward; of an 8B model they take 1.8 GB. A longer prompt goes by itself, or
# with those that share its images.
PREFILL_TOKENS = {"cpu": 4096, "cuda": 8192}


def prompts_within(
    processor, sources: Iterable[Example | Prompt], budget: int, share: bool = False
) -> list[Prompt]:
    """Return the first prompts: as many as `budget` tokens hold, at least one.

    share: they will be packed so that neighbours with the same images share them.
    """
    prompts = []
    tokens = 0
    for source in sources:
        # The training loop has built its prompts already.
        prompt = source if isinstance(source, Prompt) else processor.prompt(source)
        cost = len(prompt.ids)
        limit = budget
        if share and prompts and prompt.views and prompt.image_keys == prompts[-1].image_keys:
            cost -= prompt.images_end
            # Behind a video that is longer than the budget there is room for its other questions:
            # else its frames would be encoded once for each.
            limit = max(budget, len(prompts[0].ids) + budget // 4)
        tokens += cost
        # The one that is too many is dropped, and built again in its turn.
        if prompts and tokens > limit:
            break
        prompts.append(prompt)
    return prompts


def predict_centres(model, processor, examples: list[Example]) -> list[np.ndarray]:
    """Return the 3D head's centres of each example's regions: see `predict_boxes`."""
    return [centres for centres, _ in predict_boxes(model, processor, examples)]


@torch.no_grad()
def predict_boxes(model, processor, examples: list[Example]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the 3D head's centres and sizes of each example's regions, without sampling a token.

    Two arrays (k, 3) per example, in metres, x y z in the camera frame of the region's own image,
    and w h l.
    """
    budget = PREFILL_TOKENS[model.device.type]
    out = []
    while len(out) < len(examples):
        remaining = examples[len(out) :]
        batch = processor.pack(prompts_within(processor, remaining, budget)).to(model.device)
        hidden = model.hidden(batch)
        centres, sizes = model.head3d(hidden[batch.region_token])
        region_token = batch.region_token.cpu().numpy()
        centres = centres.float().cpu().numpy()
        sizes = sizes.float().cpu().numpy()
        # A segment is an example: its regions are the <mask> tokens inside.
        for start, end, *_ in batch.segments:
            inside = (region_token >= start) & (region_token < end)
            out.append((centres[inside], sizes[inside]))
    return out
