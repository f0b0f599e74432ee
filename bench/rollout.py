"""Tokens a second of `generate` beside transformers' generate, on a CPU.

    OMP_NUM_THREADS=2 python -m bench.rollout        writes bench/results/<device>-rollout.json

CPU: a random Qwen3-VL-shaped model of about 30 M parameters in fp32, 4 image prompts of about 300 tokens, G
samples of 64 tokens each, without end tokens; transformers gets the same prompts G times in one batch, and
the better of its caches. Both sides sample at temperature 1, pixels are prepared on both, runs alternate, the
ratio is the median over the rounds.
"""

import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from model import tiny
from model.processor import Processor
from model.qwen_vl import QwenVL
from model.rollout import generate
from srreal import Example

RESULTS = Path(__file__).parent / "results"
MEDIUM = {  # what the bench changes of tiny's sizes: about 30 M parameters, images of 256 tokens
    "images": dict(patch_size=8, merge_size=2, temporal_patch_size=2,
                   size={"shortest_edge": 32 * 32, "longest_edge": 256 * 256}),
    "text": dict(hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=8,
                 num_key_value_heads=4, max_position_embeddings=4096),
    "vision": dict(depth=4, num_heads=4, patch_size=8, temporal_patch_size=2, spatial_merge_size=2),
}  # fmt: skip
TOWER = dict(hidden_size=256, out_hidden_size=512, intermediate_size=1024)


def medium(folder: Path) -> None:
    """Writes the random checkpoint of about 30 M parameters."""
    tiny.SIZES.update(MEDIUM)
    tiny.FAMILIES["qwen3_vl"][0]["head_dim"] = 64
    tiny.FAMILIES["qwen3_vl"][1]["mrope_section"] = [12, 10, 10]
    tiny.FAMILIES["qwen3_vl"][2].update(TOWER)
    tiny.write("qwen3_vl", folder)


def prompts(folder: Path, count: int) -> list[Example]:
    """Image prompts of about 300 tokens; the images are files, so the processor remembers their pixels."""
    out = []
    for i in range(count):
        noise = np.random.default_rng(i).integers(0, 255, (32, 32, 3), dtype=np.uint8)
        path = folder / f"{i}.png"
        Image.fromarray(noise).resize((256, 256)).save(path)
        out.append(Example(f"bench {i}", "direct", [str(path)], "What is left of the chair? " * (4 + i), "A"))
    return out


def endless(processor: Processor) -> Processor:
    """The processor without end tokens: every sample runs to max_new_tokens."""
    processor.end_ids = []
    return processor


def transformers_side(model, processor: Processor, examples: list[Example], g: int, tokens: int, cache):
    """A call that samples g times from each prompt in one left-padded batch; it returns how many tokens."""
    rows = [processor([example]) for example in examples for _ in range(g)]
    longest = max(len(row.input_ids) for row in rows)
    pads = [longest - len(row.input_ids) for row in rows]
    both = zip(rows, pads, strict=True)
    ids = torch.stack([torch.nn.functional.pad(row.input_ids, (pad, 0)) for row, pad in both])
    mask = torch.arange(longest) >= torch.tensor(pads)[:, None]
    images = dict(pixel_values=torch.cat([row.pixel_values for row in rows]),
                  image_grid_thw=torch.cat([row.image_grid_thw for row in rows]),
                  mm_token_type_ids=(ids == processor.image_token_id).int())  # fmt: skip
    options = dict(do_sample=True, top_k=0, max_new_tokens=tokens, cache_implementation=cache,
                   suppress_tokens=processor.banned.nonzero()[:, 0].tolist())  # fmt: skip
    model.generation_config.eos_token_id = None

    def run() -> int:
        out = model.generate(input_ids=ids, attention_mask=mask.long(), **images, **options)
        return out[:, longest:].numel()

    return run


def alternate(calls: dict, rounds: int) -> dict[str, list[float]]:
    """Tokens a second of each call, in turns: what else the machine does meets all of them."""
    rates = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            tokens = call()
            rates[name].append(tokens / (time.perf_counter() - start))
    return rates


def cpu(rounds: int = 3, tokens: int = 64) -> dict:
    out = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        medium(folder)
        model, processor = QwenVL.from_pretrained(name), endless(Processor.from_pretrained(name))
        theirs, examples = AutoModelForImageTextToText.from_pretrained(name).eval(), prompts(folder, 4)
        out["parameters"] = sum(p.numel() for p in theirs.parameters())
        out["prompt_tokens"] = [len(processor.prompt_ids(example)) for example in examples]
        for g in (8, 1):
            def ours(g=g) -> int:
                groups = generate(model, processor, examples, n=g, max_new_tokens=tokens)
                return sum(len(rollout.tokens) for group in groups for rollout in group)

            calls = {"ours": ours}
            for cache in ("dynamic", "static"):
                calls[cache] = transformers_side(theirs, processor, examples, g, tokens, cache)
            rates = alternate(calls, rounds)
            ratios = [a / max(b, c) for a, b, c in zip(*rates.values(), strict=True)]
            out[f"G={g}"] = {"tokens_per_second": rates, "ratios": ratios, "ratio": statistics.median(ratios)}
            print(f"G={g}", json.dumps(out[f"G={g}"]))
    return out


if __name__ == "__main__":
    RESULTS.mkdir(exist_ok=True)
    row = {"torch": torch.__version__, "threads": torch.get_num_threads(), **cpu()}
    (RESULTS / "cpu-rollout.json").write_text(json.dumps(row, indent=1) + "\n")
