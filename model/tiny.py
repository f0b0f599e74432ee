"""A tiny random checkpoint of any family in the Hugging Face layout, with a tokenizer trained on
scene text.

    python -m model.tiny --family qwen3_vl --out out/tiny --seed 0

Structure, special tokens and spare rows are the real thing's; transformers' own classes load it.
Its 1.3 M parameters are to learn the scenes from scratch on a CPU within minutes: hence loud
embeddings and point map, a quiet head that is not tied to them, and a number's sign, unit and first
decimal in one token ("-2.4").
"""

import functools
import json
import math
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import flags
from errors import UserError, launch, writing
from flags import Seed
from model.families import FAMILIES


@dataclass
class Config:
    out: Path  # directory to write
    family: Literal[tuple(FAMILIES)] = "qwen3_vl"  # which Qwen-VL's structure
    seed: Seed = 0  # of the weights

    def __post_init__(self):
        flags.check(self)


if __name__ == "__main__":
    # Before the imports that take seconds: --help and a wrong flag are answered at once.
    cfg = flags.parse(Config, __doc__)

import torch
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

from model.files import pre_tokenizer
from model.qwen_vl import QwenVL
from srreal import Example, prompt, target

STD = 0.05  # of all weights but these
EMBEDDING_STD = 0.5
HEAD_STD = 0.02
# Tokens that are a number of at most two digits before the point and one behind it.
NUMBER = re.compile(r" ?-?\d{1,2}(?:\.\d)?")
# Of the waves by which a number token knows its value.
WAVELENGTHS = tuple(0.4 * 2**k for k in range(7))
OWN_SHARE = 0.4  # how loud a number token's own noise is, beside EMBEDDING_STD
DT_BIAS = -4.0  # a gated delta net keeps nine tenths of its state a token, in the median
SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
# No token spans two pieces: a tag (with what always stands beside it), an attribute's end, a signed
# number's first digits or a word (each with its blank).
PIECES = (
    r'<3d_box center="|</(?:3d_box|detect|think)>\n?|</?[a-z0-9_]+>?|="|">|'
    r" ?[+-]?\p{N}(?:\.\p{N})?| ?\p{L}+| ?[^\s\p{L}\p{N}<+-]|[<+-]|\s"
)
# The chat template of the published checkpoints, less videos and tools.
SYSTEM = (
    "{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nPROMPT<|im_end|>\n' }}"
    "{% endif %}"
)
TEMPLATE = (
    "{% for message in messages %}SYSTEM{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for item in message['content'] %}"
    "{% if item['type'] == 'text' %}{{ item['text'] }}"
    "{% else %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass
class Shape:
    """The sizes of a checkpoint, by the names in its config files."""

    text: dict
    sections: list[int]  # mRoPE's, of time, row, column
    vision: dict
    images: dict
    vocabulary: int = 1280  # at most so many tokens before the special ones
    scenes: int = 100  # whose text the tokenizer is trained on


def tiny_shape(family: str) -> Shape:
    """Return the tiny sizes of a family, which the caller may change before `write`."""
    text = dict(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
    )
    vision = dict(depth=2, num_heads=4, patch_size=8, temporal_patch_size=2, spatial_merge_size=2)
    # 256 x 192 pixels become 128 x 96: 16 x 12 patches, 48 tokens.
    images = dict(
        patch_size=8,
        merge_size=2,
        temporal_patch_size=2,
        size={"shortest_edge": 32 * 32, "longest_edge": 128 * 96},
    )
    sections = list(FAMILIES[family].tiny_sections)
    text |= FAMILIES[family].tiny_text
    return Shape(text, sections, vision | FAMILIES[family].tiny_vision, images)


# ---- The tokenizer


@functools.cache
def corpus(count: int) -> list[str]:
    """Return the text of `count` scenes, and numbers.

    Each number of one decimal comes so often that it becomes a token before any word does.
    """
    texts = []
    for example in scenes(count):
        text = f"{prompt(example)}\n{target(example)}"
        texts += text.split("<mask>")  # which is in no piece
    for tenth in range(100):
        number = f"{tenth / 10}"
        texts += [number, f"-{number}", f" {number}"] * (10 * count)
    return texts


def scenes(count: int) -> list[Example]:
    """Render scenes with the command that does it: model/ imports nothing of data/."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "data.scenes", "--out", folder, "--n", str(count)]
        command += ["--seed", "0", "--size", "128", "96"]
        root = Path(__file__).parent.parent
        made = subprocess.run(command, capture_output=True, text=True, cwd=root)
        if made.returncode == 2:
            raise UserError(made.stderr.strip().splitlines()[-1])
        made.check_returncode()
        rows = (Path(folder) / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    return [Example(**json.loads(row, object_hook=with_view_numbers)) for row in rows]


def with_view_numbers(table: dict) -> dict:
    """Turn the keys that JSON made strings back into numbers: those of views."""
    return {int(key) if key.isdigit() else key: value for key, value in table.items()}


def tokenizer(family: str, shape: Shape | None = None) -> PreTrainedTokenizerFast:
    """Train a family's tokenizer, with its special tokens and chat template."""
    shape = shape or tiny_shape(family)
    # As Qwen's: byte-level BPE within pieces of text.
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizer(FAMILIES[family].pretokenizer or PIECES)
    if FAMILIES[family].pretokenizer is not None:
        # transformers' class of that family puts both in the place of what tokenizer.json says.
        model.normalizer = normalizers.NFC()
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=shape.vocabulary,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),  # no text is out of reach
    )
    model.train_from_iterator(corpus(shape.scenes), trainer)
    special = [AddedToken(token, special=True, normalized=False) for token in SPECIAL]
    model.add_special_tokens(special)
    if FAMILIES[family].has_think_tokens:
        # As in the real one: added, yet not special.
        think = [AddedToken(token, normalized=False) for token in ("<think>", "</think>")]
        model.add_tokens(think)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=model, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = chat_template(FAMILIES[family].system_prompt)
    return fast


def chat_template(system_prompt: str | None) -> str:
    """Return a template that begins with a system turn unless the user gives one; None: without."""
    system = "" if system_prompt is None else SYSTEM.replace("PROMPT", system_prompt)
    return TEMPLATE.replace("SYSTEM", system)


# ---- The checkpoint


def configuration(family: str, ids: dict[str, int], shape: Shape | None = None):
    """Return transformers' config object for a vocabulary (token -> id)."""
    shape = shape or tiny_shape(family)
    # A multiple of 64, with at least 16 rows to spare, as in every published checkpoint.
    rows = -(-(max(ids.values()) + 17) // 64) * 64
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": shape.sections}
    rope |= FAMILIES[family].tiny_rope
    text = dict(
        vocab_size=rows,
        rope_parameters=rope,
        bos_token_id=None,
        eos_token_id=ids["<|im_end|>"],
        initializer_range=STD,
    )
    return AutoConfig.for_model(
        family,
        tie_word_embeddings=False,
        dtype="float32",
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        text_config=shape.text | text,
        vision_config=shape.vision | {"initializer_range": STD},
    )


def write(family: str, out: Path, seed: int = 0, shape: Shape | None = None) -> None:
    """Write a random checkpoint: weights, configs, tokenizer, image settings, spatial weights."""
    shape = shape or tiny_shape(family)
    tokens = tokenizer(family, shape)
    ids = tokens.get_vocab()
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(configuration(family, ids, shape))
    # Loud embeddings and a quiet head: from transformers' own start nothing is learnt in minutes.
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=EMBEDDING_STD)
    torch.nn.init.normal_(model.get_output_embeddings().weight, std=HEAD_STD)
    place_numbers(model.get_input_embeddings().weight, tokens)
    # transformers starts gated delta nets such that they forget at once.
    for name, p in model.named_parameters():
        if name.endswith("dt_bias"):
            torch.nn.init.constant_(p, DT_BIAS)
    pad = ids["<|endoftext|>"]
    end = [ids["<|im_end|>"], pad]
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=pad)
    settings = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "image_mean": FAMILIES[family].pixel_mean,
        "image_std": FAMILIES[family].pixel_std,
        **shape.images,
    }
    with writing(out):
        Path(out).mkdir(parents=True, exist_ok=True)
        model.save_pretrained(out)
        tokens.save_pretrained(out)
        path = Path(out) / "preprocessor_config.json"
        path.write_text(json.dumps(settings, indent=2) + "\n")
        write_spatial(out, seed)


@torch.no_grad()
def place_numbers(embedding: Tensor, tokens: PreTrainedTokenizerFast) -> None:
    """Let number tokens start near those of about their value: as sines and cosines of it.

    A pretrained checkpoint knows that 2.0 lies between 1.9 and 2.1. Where every number starts
    elsewhere, to subtract them is what takes longest to learn (LOG.md).
    """
    values = {}
    # In order: the vocabulary comes in another one in every process.
    for i in sorted(tokens.get_vocab().values()):
        text = tokens.decode([i])
        if NUMBER.fullmatch(text):
            values[i] = float(text)
    value = torch.tensor(list(values.values()))[:, None]
    phase = 2 * math.pi * value / torch.tensor(WAVELENGTHS)
    waves = torch.cat((phase.sin(), phase.cos()), 1)
    width = embedding.shape[1]
    # Orthogonal directions: the waves keep their distances.
    directions = torch.nn.init.orthogonal_(torch.empty(width, width))[: waves.shape[1]]
    placed = waves @ directions * math.sqrt(width / len(WAVELENGTHS))
    noise = OWN_SHARE * torch.randn(placed.shape)
    embedding[list(values)] = EMBEDDING_STD * (placed + noise)


def write_spatial(out: Path, seed: int) -> None:
    """Write the extra weights, with a point map that is heard from the start.

    A silent one is never learnt here.
    """
    model = QwenVL.from_pretrained(out)
    model.points.init_unit_scale(seed)
    model.save_pretrained(out)


if __name__ == "__main__":
    launch("tiny", write, cfg.family, cfg.out, cfg.seed)
