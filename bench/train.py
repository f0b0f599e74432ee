"""One GRPO step, ours beside what a trainer on top of transformers does, and the update with and
without the shared prefix.

    python -m bench.train [--shape cpu] [--steps 2]                             ours and the peer, in turn
    for s in qwen3-vl-2b qwen2.5-vl-3b qwen3-vl-4b                                       (an 80 GB GPU: ours)
    do python -m bench.train --shape $s --image 832 768 --new-tokens 1024 --checkpointing; done
    for s in qwen2.5-vl-7b qwen3-vl-8b                                           (the same GPU, adapters only)
    do python -m bench.train --shape $s --image 832 768 --new-tokens 1024 --checkpointing --lora 32; done

Writes bench/results/<device>-train.json. Weights are random, and no end token is drawn, so every
completion has --new-tokens tokens. The language model learns (fp32 on a CPU, bf16 with fp32 masters
on a GPU), kl is 0: `logprobs`, a pass without gradients as --kl and --updates take it, is timed,
and no part of `step`. Full training of 7B and 8B takes several GPUs: there train_rl.py's own
metrics.jsonl has the same times.

    ours      model.rollout.generate; a group packed as P + G R tokens; linear_logprob, policy_loss,
              training.optim
    trl       TRL's GRPOTrainer, where TRL is installed, on the same checkpoint, prompts and images: its loop,
              its loss (dapo), its fused head, torch's AdamW; a micro-batch is a group, no
              checkpointing, fp32
    baseline  where it isn't: what it does, written by hand. generate() on rows that repeat prompt
    and image G
              times; padded forwards of one group, G (P + R) tokens; the same loss. TRL's own work
              around that isn't counted, nor the processing of images, which both others count
    unshared  ours, but each completion is packed behind a copy of its prompt and image: G (P + R)
    tokens

They are timed in turn, so that a disturbance hits all; medians of --steps. Seconds on a CPU are of
CPU time, of all threads together, so that other jobs on the machine hardly count; wall_step is by
the clock. MFU: 6 FLOPs a decoder parameter and token of the update, over --tflops.
"""

import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoTokenizer, TrainerCallback
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

import flags
import plan
import srreal
import train_rl
from flags import Count, CountOrZero, Positive
from kernels.policy_loss import policy_loss
from model import lora, tiny
from model.families import FAMILIES
from model.processor import Processor
from model.qwen_vl import QwenVL
from model.rollout import default_slots, generate
from srreal import Example
from training.optim import Optimizer
from training.policy import load_model
from training.ranks import start_ranks

# Decoder: width, inner, layers, heads, key-value heads, vocabulary (0: the tiny tokenizer's);
# tower: width, inner, layers, heads, patch. From the published config.json files.
SHAPES = {
    "tiny": ("qwen3_vl", (128, 384, 2, 4, 2, 0), (64, 256, 2, 4, 8)),
    "cpu": ("qwen3_vl", (512, 1536, 8, 8, 4, 0), (256, 1024, 4, 4, 8)),
    "qwen2.5-vl-3b": ("qwen2_5_vl", (2048, 11008, 36, 16, 2, 151936), (1280, 3420, 32, 16, 14)),
    "qwen2.5-vl-7b": ("qwen2_5_vl", (3584, 18944, 28, 28, 4, 152064), (1280, 3420, 32, 16, 14)),
    "qwen3-vl-2b": ("qwen3_vl", (2048, 6144, 28, 16, 8, 151936), (1024, 4096, 24, 16, 16)),
    "qwen3-vl-4b": ("qwen3_vl", (2560, 9728, 36, 32, 8, 151936), (1024, 4096, 24, 16, 16)),
    "qwen3-vl-8b": ("qwen3_vl", (4096, 12288, 36, 32, 8, 151936), (1152, 4304, 27, 16, 16)),
}


@dataclass
class Config:
    shape: Literal[tuple(SHAPES)] = "cpu"  # of the random model
    prompts: Count = 8  # images, one prompt each
    group: Count = 8  # completions a prompt (G)
    image: tuple[Count, Count] = (
        256,
        256,
    )  # width, height in pixels; a token is two patches square
    new_tokens: Count = 64  # of a completion (R)
    # of the comparison of updates: 650 tokens at the shape cpu
    update_image: tuple[Count, Count] = (416, 400)
    update_tokens: CountOrZero = 300  # R of that; 0: leave it out
    micro_tokens: Count = 16384  # tokens of a forward pass
    checkpointing: bool = False  # as the training scripts'
    lora: CountOrZero = 0  # likewise
    steps: Count = 2  # timed steps of each, after one of ours on one prompt to warm up
    baseline: bool = True  # and the peer: TRL, else the baseline; a CPU's only
    tflops: Positive = 989.0  # of the device in bf16, for MFU
    out: Path = Path("bench/results")

    def __post_init__(self):
        flags.check(self)


def shape_of(name: str) -> tiny.Shape:
    """Return the sizes of a row of SHAPES, as model.tiny writes them."""
    family, text, vision = SHAPES[name]
    width, inner, layers, heads, kv, vocabulary = text
    shape = tiny.tiny_shape(family)
    shape.text |= dict(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        max_position_embeddings=32768,
    )
    head_dim = 128 if vocabulary else width // heads
    if FAMILIES[family].head_dim_field:
        shape.text["head_dim"] = head_dim
    side = 5 * head_dim // 32
    shape.sections = [head_dim // 2 - 2 * side, side, side]
    tower_width, tower_inner, depth, tower_heads, patch = vision
    shape.vision |= dict(
        hidden_size=tower_width,
        intermediate_size=tower_inner,
        out_hidden_size=width,
        depth=depth,
        num_heads=tower_heads,
        patch_size=patch,
    )
    shape.images |= dict(
        patch_size=patch, size={"shortest_edge": 32 * 32, "longest_edge": 4096 * 4096}
    )
    return shape


def load(cfg: Config, folder: str, device: torch.device) -> tuple[QwenVL, Processor]:
    """A random model that never ends a completion, and its processor."""
    family, text, vision = SHAPES[cfg.shape]
    shape = shape_of(cfg.shape)
    vocabulary = text[-1]
    if vocabulary:  # of true size: not by way of a file
        tokens = tiny.tokenizer(family)
        config = tiny.configuration(family, tokens.get_vocab(), shape)
        config.text_config.vocab_size = vocabulary
        # Random weights are made where they stay: a file of 16 GB would take longer than the bench.
        with torch.device(device):
            model = QwenVL(config).to(torch.bfloat16).eval()
        model.fuse_linears()  # as a model from a file is: the sampler's products are the product's
        # A small checkpoint of the family, for the processor.
        small = tiny.tiny_shape(family)
        small.images |= shape.images
        small.vision["patch_size"] = vision[-1]
        tiny.write(family, folder, shape=small)
    else:
        tiny.write(family, folder, shape=shape)
        model = load_model(folder, device)
    lora.learn(model, "lm", cfg.lora)
    processor = Processor.from_pretrained(folder)
    processor.end_ids = [model.config.image_token_id]  # never sampled
    missing = model.decoder.sizes.vocab - len(processor.banned)  # the files are a smaller model's
    processor.banned = torch.nn.functional.pad(processor.banned, (0, missing), value=True)
    return model, processor


def examples_of(count: int, size: tuple[int, int]) -> list[Example]:
    rng = np.random.default_rng(0)
    pixels = [rng.integers(0, 255, (size[1], size[0], 3), np.uint8) for _ in range(count)]
    return [
        Example(str(i), "lor", [Image.fromarray(p)], "What is nearer: a or b?", "a")
        for i, p in enumerate(pixels)
    ]


def clocked(device: torch.device, work, *args) -> tuple[float, object]:
    """Return the seconds that work(*args) took (of CPU time on a CPU), and its result."""
    if device.type == "cpu":
        start = time.process_time()
        result = work(*args)
        return time.process_time() - start, result
    # Launches return at once: without these the clock would stop before the work does.
    torch.cuda.synchronize()
    start = time.perf_counter()
    result = work(*args)
    torch.cuda.synchronize()
    return time.perf_counter() - start, result


def groups_of(examples: list[Example], rollouts: list, processor) -> list[train_rl.Group]:
    """Made-up advantages: half of a group is good."""
    groups = []
    for i, (example, own) in enumerate(zip(examples, rollouts, strict=True)):
        advantages = [1.0 if k % 2 else -1.0 for k in range(len(own))]
        prompt = train_rl.Prompt(example, i)
        train_rl.encode([prompt], processor)
        groups.append(train_rl.Group(prompt, own, advantages=advantages, differs=True))
    return groups


def update(model, optimizer, micros: list, tokens: int) -> float:
    """Forward, backward and step of train_rl; the gradient's norm."""
    for one in micros:
        logprob, _ = train_rl.forward(model, one, 1.0, None)
        # One update a rollout: `old` is what this very pass says, so that the ratio is 1.
        loss, _ = policy_loss(
            logprob,
            logprob.detach(),
            one.advantage,
            one.cu_seqlens,
            rollout_logprob=one.rollout_logprob,
            denominator=tokens,
        )
        loss.backward()
    return optimizer.step(1e-6, 1.0, 0.0, "step")


def ours(cfg: Config, model, processor, optimizer, examples, seed: int) -> dict[str, float]:
    options = dict(n=cfg.group, max_new_tokens=cfg.new_tokens, temperature=1.0, seed=seed)
    began = time.perf_counter()
    peaks = []
    rollout, rollouts = clocked(
        model.device, lambda: generate(model, processor, examples, **options)
    )
    peaks.append(peak(model.device))

    def pack():
        return train_rl.pack(
            groups_of(examples, rollouts, processor),
            processor,
            ["lor"],
            cfg.micro_tokens,
            1,
            model.device,
        )

    def learn():
        return update(model, optimizer, pack(), len(examples) * cfg.group * cfg.new_tokens)

    seconds, norm = clocked(model.device, learn)
    wall = time.perf_counter() - began
    peaks.append(peak(model.device))
    # Beside the step: what --kl and --updates would add to it.
    with torch.no_grad():
        micros = pack()
        logprobs, _ = clocked(
            model.device, lambda: [train_rl.forward(model, one, 1.0, None) for one in micros]
        )
    return {
        "rollout": rollout,
        "update": seconds,
        "step": rollout + seconds,
        "wall_step": wall,
        "norm": norm,
        "logprobs": logprobs,
        "rollout_peak_mib": peaks[0],
        "update_peak_mib": peaks[1],
    }


def peak(device: torch.device) -> float:
    """MiB on a GPU since the last call. A process's would be the peer's, too: 0."""
    if device.type == "cpu":
        return 0.0
    found = torch.cuda.max_memory_allocated() / 2**20
    torch.cuda.reset_peak_memory_stats()
    return found


def planned(cfg: Config, model, prompt: int) -> dict[str, float]:
    """GB of each part, as plan.py has it for what was run here."""
    wanted = plan.Config(
        "",
        prompts=cfg.prompts,
        group=cfg.group,
        prompt_tokens=prompt,
        new_tokens=cfg.new_tokens,
        kl=0.0,
        dtype="bf16" if model.device.type == "cuda" else "fp32",
    )
    slots = min(default_slots(model, cfg.group, cfg.new_tokens), cfg.prompts * cfg.group)
    settings = plan.Settings(False, cfg.checkpointing, cfg.lora, cfg.micro_tokens, slots)
    return plan.estimate(model.config, wanted, settings, plan.tally(model))


def theirs(
    cfg: Config, model, optimizer, inputs: dict, prompt: int, banned: list[int], seed: int
) -> dict[str, float]:
    """The baseline's step: inputs are of all prompts, each repeated G times."""
    torch.manual_seed(seed)
    began = time.perf_counter()
    options = dict(
        max_new_tokens=cfg.new_tokens,
        min_new_tokens=cfg.new_tokens,
        do_sample=True,
        top_k=0,
        suppress_tokens=banned,
    )
    with torch.no_grad():
        rollout, ids = clocked(model.device, lambda: model.generate(**inputs, **options))
    patches = len(inputs["pixel_values"]) // len(ids)

    def learn():
        total = ids.shape[0] * cfg.new_tokens
        # A group at a time: all rows' logits at once would be gigabytes.
        for start in range(0, len(ids), cfg.group):
            rows = slice(start, start + cfg.group)
            logits = (
                model(
                    input_ids=ids[rows],
                    attention_mask=torch.ones_like(ids[rows]),
                    # Images lie one behind the other, without a batch axis.
                    pixel_values=inputs["pixel_values"][
                        start * patches : (start + cfg.group) * patches
                    ],
                    image_grid_thw=inputs["image_grid_thw"][rows],
                    # Of the completion, and the prompt's last, which draws its first token.
                    logits_to_keep=cfg.new_tokens + 1,
                    mm_token_type_ids=(ids[rows] == model.config.image_token_id).int(),
                )
                .logits[:, :-1]
                .float()
            )
            logprob = logits.log_softmax(-1).gather(2, ids[rows, prompt:, None])[..., 0]
            advantage = torch.tensor([1.0 if k % 2 else -1.0 for k in range(cfg.group)])[:, None]
            ratio = (logprob - logprob.detach()).exp()
            (
                -torch.min(ratio * advantage, ratio.clamp(0.8, 1.3) * advantage).sum() / total
            ).backward()
        norm = torch.nn.utils.clip_grad_norm_(
            [p for p in model.parameters() if p.requires_grad], 1.0
        )
        optimizer.step()
        optimizer.zero_grad()
        return norm.item()

    seconds, norm = clocked(model.device, learn)
    return {
        "rollout": rollout,
        "update": seconds,
        "step": rollout + seconds,
        "wall_step": time.perf_counter() - began,
        "norm": norm,
    }


class ImageProcessor(Qwen3VLProcessor):
    """transformers' processor without videos: for these it wants torchvision."""

    def __init__(self, image_processor, tokenizer):
        super().__init__(image_processor, tokenizer, chat_template=tokenizer.chat_template)


class Clock(TrainerCallback):
    """Times the steps of a GRPOTrainer, its rollouts apart, and hands each one's row to `turn`."""

    def __init__(self, grpo, turn: Callable[[dict[str, float]], None]):
        self.turn = turn
        self.rollout = 0.0
        self.began = 0.0
        self.wall_began = 0.0
        # TRL has no callback between rollout and update, so that its own method is wrapped.
        work = grpo._generate_and_score_completions

        def timed(*args):
            self.rollout, found = clocked(grpo.accelerator.device, work, *args)
            assert found["completion_mask"].all()  # no completion ended early
            return found

        grpo._generate_and_score_completions = timed

    def on_step_begin(self, *_, **__):
        self.began = time.process_time()
        self.wall_began = time.perf_counter()

    def on_step_end(self, *_, **__):
        step = time.process_time() - self.began
        wall = time.perf_counter() - self.wall_began
        self.turn(
            {
                "rollout": self.rollout,
                "update": step - self.rollout,
                "step": step,
                "wall_step": wall,
            }
        )


def run_trl(cfg: Config, folder: str, processor, examples: list[Example], turn: Callable) -> None:
    """cfg.steps steps of TRL's GRPOTrainer on all examples; turn(row) after each."""
    from trl import GRPOTrainer

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    for name, p in model.named_parameters():
        p.requires_grad_("visual" not in name)
    images = Qwen2VLImageProcessorPil.from_pretrained(folder)
    tokens = AutoTokenizer.from_pretrained(folder)
    own = ImageProcessor(images, tokens)
    # Both sides read the same.
    read = list(trl_ids(own, examples[0]))
    assert read == list(processor.prompt_ids(examples[0]))

    def half(completions, **_):
        """Half of a group is good, as in groups_of."""
        return [float(i % 2) for i in range(len(completions))]

    options = trl_options(cfg, folder, processor)
    grpo = GRPOTrainer(model, half, options, trl_rows(examples), processing_class=own)
    grpo.add_callback(Clock(grpo, turn))
    grpo.train()


def trl_options(cfg: Config, folder: str, processor):
    """Return TRL's settings of the same step: a micro-batch is a group, one update a rollout."""
    from trl import GRPOConfig

    return GRPOConfig(
        folder + "/trl",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        per_device_train_batch_size=cfg.group,
        gradient_accumulation_steps=cfg.prompts,
        num_generations=cfg.group,
        max_completion_length=cfg.new_tokens,
        max_steps=cfg.steps,
        beta=0.0,
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        shuffle_dataset=False,
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        # No sample ends early, and none draws what ours never draws.
        generation_kwargs=dict(
            min_new_tokens=cfg.new_tokens, suppress_tokens=processor.banned.nonzero()[:, 0].tolist()
        ),
    )


def trl_ids(own: "ImageProcessor", example: Example) -> list[int]:
    """Return the prompt's tokens as TRL makes them."""
    content = [
        {"type": "image", "image": example.images[0]},
        {"type": "text", "text": srreal.prompt(example)},
    ]
    text = own.apply_chat_template(
        [[{"role": "user", "content": content}]],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
    )
    return text["input_ids"][0]


def trl_rows(examples: list[Example]):
    """Return the examples as TRL reads a data set."""
    import datasets

    messages = [[{"role": "user", "content": srreal.prompt(e)}] for e in examples]

    def chosen_rows(chosen):
        return {
            "prompt": [messages[i] for i in chosen["row"]],
            "image": [examples[i].images[0] for i in chosen["row"]],
        }

    # Images are handed out as they are: a column of them would be encoded, and decoded again.
    return datasets.Dataset.from_dict({"row": range(len(examples))}).with_transform(chosen_rows)


def run_baseline(
    cfg: Config, folder: str, processor, examples: list[Example], turn: Callable
) -> None:
    """cfg.steps steps by hand, on transformers; turn(row) after each."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    for name, p in model.named_parameters():
        p.requires_grad_("visual" not in name)
    batch = processor(examples)
    ids = batch.input_ids.view(len(examples), -1).repeat_interleave(cfg.group, 0)
    pixels = batch.pixel_values.view(len(examples), -1, batch.pixel_values.shape[1])
    inputs = dict(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        mm_token_type_ids=(ids == model.config.image_token_id).int(),
        pixel_values=pixels.repeat_interleave(cfg.group, 0).flatten(0, 1),
        image_grid_thw=batch.image_grid_thw.repeat_interleave(cfg.group, 0),
    )
    model.generation_config.eos_token_id = None
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)
    banned = processor.banned.nonzero()[:, 0].tolist()
    for step in range(cfg.steps):
        turn(theirs(cfg, model, optimizer, inputs, ids.shape[1], banned, step + 1))


def compare_updates(cfg: Config, model, processor, optimizer) -> dict[str, float]:
    """One group, packed once behind its prompt, and once behind a copy for each completion."""
    (example,) = examples_of(1, cfg.update_image)
    copies = [copy.copy(example) for _ in range(cfg.group)]
    for one in copies:
        one.images = [example.images[0].copy()]
    ids = torch.randint(40, 500, (cfg.group, cfg.update_tokens)).tolist()
    owner = torch.zeros(cfg.group * cfg.update_tokens, dtype=torch.long)
    advantage = torch.tensor(
        [1.0 if k % 2 else -1.0 for k in range(cfg.group)], device=model.device
    )

    def run(examples, completions):
        batch = processor(examples, completions).to(model.device)
        zero = torch.zeros(len(owner), device=model.device)
        one = train_rl.MicroBatch(batch, owner, advantage, batch.cu_targets, zero)
        return update(model, optimizer, [one], len(owner)), len(batch.input_ids)

    kinds = {"shared": ([example], [ids]), "unshared": (copies, [[row] for row in ids])}
    seconds = {kind: [] for kind in kinds}
    norms = {}
    tokens = {}
    # Each update starts from the same weights, so that their gradients can be compared.
    state = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    for _ in range(cfg.steps):
        for kind, work in kinds.items():
            took, (norms[kind], tokens[kind]) = clocked(model.device, run, *work)
            seconds[kind].append(took)
            for name, p in model.named_parameters():
                if p.requires_grad:
                    p.data.copy_(state[name])
    assert abs(norms["shared"] / norms["unshared"] - 1) < 1e-2, norms  # the same gradient
    shared, unshared = (statistics.median(seconds[kind]) for kind in kinds)
    return {
        "shared_seconds": shared,
        "unshared_seconds": unshared,
        "ratio": unshared / shared,
        "token_ratio": tokens["unshared"] / tokens["shared"],
    }


# Of the steps of ours and of the peer's; then what ours alone has.
TIMES = ("rollout", "update", "step", "wall_step")
MORE = ("logprobs", "rollout_peak_mib", "update_peak_mib")


def medians(steps: list[dict[str, float]]) -> dict[str, float]:
    """Return the median of each column over the steps."""
    found = {}
    for key in (*TIMES, *MORE):
        if key in steps[0]:
            found[key] = statistics.median(row[key] for row in steps)
    return found


def peer_of(cfg: Config, device: torch.device) -> str | None:
    """Return who is timed beside ours: TRL where it is installed. On a GPU nobody."""
    if not cfg.baseline or device.type == "cuda":
        return None
    return "trl" if util.find_spec("trl") else "baseline"


def main(cfg: Config) -> dict:
    _, _, device = start_ranks()
    peers = {"trl": run_trl, "baseline": run_baseline}
    peer = peer_of(cfg, device)
    rows = {"ours": []}
    if peer:
        rows[peer] = []
    with tempfile.TemporaryDirectory() as folder:
        model, processor = load(cfg, folder, device)
        if cfg.checkpointing:
            model.checkpoint_blocks()
        examples = examples_of(cfg.prompts, cfg.image)
        optimizer = Optimizer(model.named_parameters())
        # To warm up: one prompt, whose row is thrown away.
        ours(cfg, model, processor, optimizer, examples[:1], 0)

        def turn(row: dict[str, float] | None = None) -> None:
            """The peer has done a step; one of ours."""
            if row:
                rows[peer].append(row)
            seed = len(rows["ours"]) + 1
            rows["ours"].append(ours(cfg, model, processor, optimizer, examples, seed))
            print(*(f"{name} {own[-1]}" for name, own in rows.items()), sep="\n", flush=True)

        if peer:
            # It calls back after each of its steps, as TRL's loop isn't ours to cut.
            peers[peer](cfg, folder, processor, examples, turn)
        else:
            for _ in range(cfg.steps):
                turn()
    result = {name: medians(steps) for name, steps in rows.items()}
    if peer:
        result["ratio"] = {key: result[peer][key] / result["ours"][key] for key in TIMES}
    result |= circumstances(cfg, model, processor, examples, peer, result["ours"])
    result["update_shared_prefix"] = None
    if cfg.update_tokens:
        result["update_shared_prefix"] = compare_updates(cfg, model, processor, optimizer)
    write(cfg, result)
    return result


def circumstances(
    cfg: Config, model, processor, examples: list[Example], peer: str | None, own: dict
) -> dict:
    """Return what was timed on what, and the rates that follow from our medians, own."""
    cuda = model.device.type == "cuda"
    packages = ["torch", "transformers"]
    if peer == "trl":
        packages.append("trl")
    prompt = len(processor.prompt_ids(examples[0]))
    drawn = cfg.prompts * cfg.group * cfg.new_tokens
    # 6 FLOPs a parameter and token: 2 forward, 4 backward. Once over the tokens that ours computes,
    # once over those that rows of prompt and completion would have.
    sizes = sum(p.numel() for p in model.decoder.layers.parameters())
    packed = cfg.prompts * (prompt + cfg.group * cfg.new_tokens)
    padded = cfg.prompts * cfg.group * (prompt + cfg.new_tokens)
    possible = own["update"] * cfg.tflops * 1e12
    return {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "threads": torch.get_num_threads(),
        "versions": {name: metadata.version(name) for name in packages},
        "config": {key: str(value) for key, value in vars(cfg).items() if key != "out"},
        "parameters_million": sum(p.numel() for p in model.parameters()) / 1e6,
        "prompt_tokens": prompt,
        "planned_gb": planned(cfg, model, prompt),
        "completion_tokens_per_second": drawn / own["step"],
        "update_mfu_computed": 6 * sizes * packed / possible if cuda else None,
        "update_mfu_padded": 6 * sizes * padded / possible if cuda else None,
    }


def write(cfg: Config, result: dict) -> None:
    """Write the result to a file of this device and shape, and print it."""
    name = result["device"].lower().replace(" ", "-")
    if cfg.shape != "cpu":
        name += f"-{cfg.shape}"
    text = json.dumps(result, indent=1)
    cfg.out.mkdir(parents=True, exist_ok=True)
    (cfg.out / f"{name}-train.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main(flags.parse(Config, __doc__))
