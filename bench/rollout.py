"""Tokens a second of `generate`: on a CPU beside transformers' generate, on a GPU beside the
roofline.

    OMP_NUM_THREADS=2 python -m bench.rollout        writes bench/results/<device>-rollout.json

CPU: a random Qwen3-VL-shaped model of about 30 M parameters in fp32, 4 image prompts of about 300
tokens, G samples of 64 tokens each, without end tokens; transformers gets the same prompts G times
in one batch, and the better of its caches. Both sides sample at temperature 1, pixels are prepared
on both, runs alternate, the ratio is the median over the rounds.

GPU: the shapes of published models with random weights in bf16, B slots, 8 to a prompt of about 896
tokens, while samples grow to 256 tokens (1,024 keys a sample in the mean). A step can't be faster
than

    max(weights / bandwidth, 2 FLOPs a weight and slot / rate) + keys and values / bandwidth

with the weights of the decoder's layers and the head, a prompt's keys and values once, and the
bandwidth of a copy and the rate of a matrix product as measured in the same run. `share` is that
bound over the measured step. Timed are steps and the look at their flags, by events, without
prefill; `host_share` is the host's part of that time, without its wait for the flags;
`generate_tokens_per_second` is of whole calls, with prefill and texts.
"""

import gc
import json
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from bench import train
from model import tiny
from model.processor import Processor
from model.qwen_vl import QwenVL
from model.rollout import Engine, generate
from model.rollout.cache import token_bytes
from srreal import Example
from training.ranks import start_ranks

RESULTS = Path(__file__).parent / "results"
MEDIUM = {  # what the bench changes of tiny's sizes: about 30 M parameters, images of 256 tokens
    "images": dict(
        patch_size=8,
        merge_size=2,
        temporal_patch_size=2,
        size={"shortest_edge": 32 * 32, "longest_edge": 256 * 256},
    ),
    "text": dict(
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=4096,
    ),
    "vision": dict(depth=4, num_heads=4, patch_size=8, temporal_patch_size=2, spatial_merge_size=2),
}
TOWER = dict(hidden_size=256, out_hidden_size=512, intermediate_size=1024)


def medium(folder: Path) -> None:
    """Writes the random checkpoint of about 30 M parameters."""
    shape = tiny.tiny_shape("qwen3_vl")
    shape.images |= MEDIUM["images"]
    shape.text |= MEDIUM["text"] | {"head_dim": 64}
    shape.vision |= MEDIUM["vision"] | TOWER
    shape.sections = [12, 10, 10]
    tiny.write("qwen3_vl", folder, shape=shape)


def prompts(folder: Path, count: int) -> list[Example]:
    """Image prompts of about 300 tokens; the images are files, so the processor remembers their
    pixels."""
    out = []
    for i in range(count):
        noise = np.random.default_rng(i).integers(0, 255, (32, 32, 3), dtype=np.uint8)
        path = folder / f"{i}.png"
        Image.fromarray(noise).resize((256, 256)).save(path)
        out.append(
            Example(
                f"bench {i}", "direct", [str(path)], "What is left of the chair? " * (4 + i), "A"
            )
        )
    return out


def endless(processor: Processor) -> Processor:
    """The processor without end tokens: every sample runs to max_new_tokens."""
    processor.end_ids = []
    return processor


def transformers_side(
    model, processor: Processor, examples: list[Example], g: int, tokens: int, cache
):
    """A call that samples g times from each prompt in one left-padded batch; it returns how many
    tokens."""
    # generate() knows no groups: a prompt and its image come once for each sample.
    rows = []
    for example in examples:
        rows += [processor([example]) for _ in range(g)]
    longest = max(len(row.input_ids) for row in rows)
    # On the left, so that all samples grow from one column on.
    pads = [longest - len(row.input_ids) for row in rows]
    padded = []
    for row, pad in zip(rows, pads, strict=True):
        padded.append(torch.nn.functional.pad(row.input_ids, (pad, 0)))
    ids = torch.stack(padded)
    mask = torch.arange(longest) >= torch.tensor(pads)[:, None]
    images = dict(
        pixel_values=torch.cat([row.pixel_values for row in rows]),
        image_grid_thw=torch.cat([row.image_grid_thw for row in rows]),
        mm_token_type_ids=(ids == processor.image_token_id).int(),
    )
    options = dict(
        do_sample=True,
        top_k=0,
        max_new_tokens=tokens,
        cache_implementation=cache,
        # Ours never draws these either: both choose among the same ids.
        suppress_tokens=processor.banned.nonzero()[:, 0].tolist(),
    )
    # No sample ends early, or one side would have less to do.
    model.generation_config.eos_token_id = None

    def run() -> int:
        out = model.generate(input_ids=ids, attention_mask=mask.long(), **images, **options)
        return out[:, longest:].numel()

    return run


def alternate(calls: dict, rounds: int) -> dict[str, list[float]]:
    """Tokens a second of each call, in turns: what else the machine does meets all of them."""
    rates = {name: [] for name in calls}
    # To warm up: allocators grow, and the processor remembers its pixels.
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            tokens = call()
            rates[name].append(tokens / (time.perf_counter() - start))
    return rates


def cpu(rounds: int = 7, tokens: int = 64) -> dict:
    out = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        medium(folder)
        model = QwenVL.from_pretrained(name)
        processor = endless(Processor.from_pretrained(name))
        theirs = AutoModelForImageTextToText.from_pretrained(name).eval()
        examples = prompts(folder, 4)
        out["parameters"] = sum(p.numel() for p in theirs.parameters())
        out["prompt_tokens"] = [len(processor.prompt_ids(example)) for example in examples]
        for g in (8, 1):

            def ours(g=g) -> int:
                groups = generate(model, processor, examples, n=g, max_new_tokens=tokens)
                drawn = 0
                for group in groups:
                    drawn += sum(len(rollout.tokens) for rollout in group)
                return drawn

            calls = {"ours": ours}
            for cache in ("dynamic", "static"):
                calls[cache] = transformers_side(theirs, processor, examples, g, tokens, cache)
            rates = alternate(calls, rounds)
            # Round by round, against the better of its caches in that round.
            ratios = [a / max(b, c) for a, b, c in zip(*rates.values(), strict=True)]
            out[f"G={g}"] = {
                "tokens_per_second": rates,
                "ratios": ratios,
                "ratio": statistics.median(ratios),
            }
            print(f"G={g}", json.dumps(out[f"G={g}"]))
    return out


# ---- A GPU


def seconds(call: Callable, repeats: int = 20) -> float:
    """Median of single calls, by events."""
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def ceilings() -> tuple[float, float]:
    """(bytes a second of a copy, read and written; FLOP/s of a square product in bf16)."""
    # 1 GiB is twenty times an L2 cache: the copy goes through memory.
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    bandwidth = 2 * len(source) / seconds(lambda: target.copy_(source))
    # Large enough that every multiprocessor has work, and that starting it costs nothing.
    a = torch.randn(8192, 8192, device="cuda").bfloat16()
    rate = 2 * 8192**3 / seconds(lambda: a @ a)
    return bandwidth, rate


def long_prompts(processor: Processor, count: int, tokens: int) -> list[Example]:
    """Text of at least `tokens` tokens each; not the same, and as long."""
    question = ""
    words = "What is left of the chair? "
    # The template's own tokens count, so that it is tried out and not computed.
    while len(processor.prompt_ids(Example("", "direct", [], question, "A"))) < tokens:
        question += words
    return [Example(str(i), "direct", [], f"{i:03d} {question}", "A") for i in range(count)]


def bound(model, slots: int, keys: float, bandwidth: float, rate: float) -> float:
    """Return the seconds that a step of all slots takes at least; it reads so many keys."""
    s = model.decoder.sizes
    # The head is read whole at each step; of the embedding only a row a slot.
    weights = sum(p.numel() for p in model.decoder.layers.parameters()) + s.vocab * s.hidden
    compute = 2 * weights * slots / rate
    read = keys * token_bytes(model) / bandwidth
    # Weights are read while they are multiplied; keys come in a kernel of their own.
    return max(weights * model.dtype.itemsize / bandwidth, compute) + read


class Waited:
    """An event that counts the seconds for which the host waits for it."""

    def __init__(self, event: torch.cuda.Event):
        self.event = event
        self.record = event.record
        self.seconds = 0.0

    def synchronize(self) -> None:
        start = time.perf_counter()
        self.event.synchronize()
        self.seconds += time.perf_counter() - start


@torch.no_grad()
def decode(model, processor, count: int, bandwidth: float, rate: float, tokens: int = 256) -> dict:
    """`count` slots, full from the first step to the last."""
    g = min(count, 8)
    examples = long_prompts(processor, count // g, 896)
    torch.cuda.reset_peak_memory_stats()
    weights = torch.cuda.memory_allocated()
    engine = Engine(model, processor, n=g, max_new_tokens=tokens, slots=count)
    stream = engine.sample_groups(examples)
    warm = 8
    start = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    for _ in range(warm):  # encodes the prompts, fills all slots, records the graph
        stream.advance()
    torch.cuda.synchronize()
    # The runner looks at last step's flags while the GPU does the next: what the host waits there
    # is the GPU's time, and not its own.
    state = engine.runner.host_state
    state.copied = Waited(state.copied)
    start.record()
    clock = time.perf_counter()
    for _ in range(tokens - warm):
        stream.advance()
    host = (time.perf_counter() - clock - state.copied.seconds) / (tokens - warm)
    end.record()
    end.synchronize()
    state.copied = state.copied.event
    stream.close()
    step = start.elapsed_time(end) / 1e3 / (tokens - warm)
    prompt_tokens = [len(processor.prompt_ids(example)) for example in examples]
    # A prompt's keys once, whatever its samples; a sample's own grow from `warm` to `tokens`.
    keys = sum(prompt_tokens) + count * (warm + tokens) / 2
    least = bound(model, count, keys, bandwidth, rate)
    # To see that later calls replay this graph, and record no other.
    graph = engine.runner.graph
    rates = []
    for seed in range(3):
        clock = time.perf_counter()
        list(engine.sample_groups(examples, seed))
        rates.append(count * tokens / (time.perf_counter() - clock))
    return {
        "slots": count,
        "prompt_tokens": prompt_tokens[0],
        "new_tokens": tokens,
        "step_ms": step * 1e3,
        "bound_ms": least * 1e3,
        "share": least / step,
        "tokens_per_second": count / step,
        "generate_tokens_per_second": statistics.median(rates),
        "host_share": host / step,
        "peak_gb_beyond_weights": (torch.cuda.max_memory_allocated() - weights) / 1e9,
        "cache_gb": engine.runner.cache.nbytes / 1e9,
        "same_graph": engine.runner.graph is graph,
    }


def gpu() -> dict:
    _, _, device = start_ranks()
    bandwidth, rate = ceilings()
    out = {"copy_gb_per_s": bandwidth / 1e9, "matmul_tflop_per_s": rate / 1e12}
    for shape, slots in (
        ("qwen2.5-vl-3b", (1, 64, 256)),
        ("qwen3-vl-4b", (64,)),
        ("qwen3-vl-8b", (64,)),
    ):
        with tempfile.TemporaryDirectory() as folder:
            model, processor = train.load(train.Config(shape), folder, device)
        endless(processor)
        more = model.decoder.sizes.vocab - len(processor.banned)  # ids of the true vocabulary
        processor.banned = torch.nn.functional.pad(processor.banned, (0, more), value=True)
        for count in slots:
            out[f"{shape} B={count}"] = decode(model, processor, count, bandwidth, rate)
            print(shape, json.dumps(out[f"{shape} B={count}"]), flush=True)
        # The next shape needs the room. What refers to itself in a circle waits for the collector.
        del model
        gc.collect()
        torch.cuda.empty_cache()
    return out


if __name__ == "__main__":
    RESULTS.mkdir(exist_ok=True)
    cuda = torch.cuda.is_available()
    row = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        **(gpu() if cuda else cpu()),
    }
    device = torch.cuda.get_device_name() if cuda else "cpu"
    device = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    (RESULTS / f"{device}-rollout.json").write_text(json.dumps(row, indent=1) + "\n")
