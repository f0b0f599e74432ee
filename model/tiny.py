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
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Literal

import torch
import tyro
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

from srreal import Example, prompt, target

SIZES = {
    # at most so many tokens before the special ones; scenes for the tokenizer
    "vocab": 1280,
    "scenes": 100,
    # 256 x 192: 16 x 12 patches, 48 tokens
    "images": dict(
        patch_size=8,
        merge_size=2,
        temporal_patch_size=2,
        size={"shortest_edge": 32 * 32, "longest_edge": 128 * 96},
    ),
    "text": dict(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
    ),
    "vision": dict(depth=2, num_heads=4, patch_size=8, temporal_patch_size=2, spatial_merge_size=2),
    "std": 0.05,
    "embedding_std": 0.5,
    "head_std": 0.02,
}
FAMILIES = {  # what differs: (decoder, rotary sections, vision tower)
    "qwen2_vl": (
        {},
        {"mrope_section": [4, 6, 6]},
        dict(embed_dim=64, hidden_size=128, mlp_ratio=4),
    ),
    "qwen2_5_vl": (
        {},
        {"mrope_section": [4, 6, 6]},
        dict(
            hidden_size=64,
            out_hidden_size=128,
            intermediate_size=256,
            window_size=64,
            fullatt_block_indexes=[1],
        ),
    ),
    "qwen3_vl": (
        {"head_dim": 32},
        {"mrope_section": [6, 5, 5], "mrope_interleaved": True},
        dict(
            hidden_size=64,
            out_hidden_size=128,
            intermediate_size=256,
            num_position_embeddings=256,
            deepstack_visual_indexes=[0],
        ),
    ),
}
# pixel mean and std
CLIP = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
SPECIAL = [
    f"<|{name}|>"
    for name in (
        "endoftext",
        "im_start",
        "im_end",
        "object_ref_start",
        "object_ref_end",
        "box_start",
        "box_end",
        "quad_start",
        "quad_end",
        "vision_start",
        "vision_end",
        "vision_pad",
        "image_pad",
        "video_pad",
    )
]
# No token spans two pieces: a tag, an attribute's end, a signed number's first digits, a word and
# its blank.
PIECES = r"""</?[a-z0-9_]+>?|="|">|[+-]?\p{N}(?:\.\p{N})?| ?\p{L}+| ?[^\s\p{L}\p{N}<+-]|[<+-]|\s"""
SYSTEM = """{% if loop.first and message['role'] != 'system' %}{{ '<|im_start|>system
You are a helpful assistant.<|im_end|>
' }}{% endif %}"""
TEMPLATE = """{% for message in messages %}SYSTEM{{ '<|im_start|>' + message['role'] + '
' }}{% if message['content'] is string %}{{ message['content'] }}{% else %}\
{% for item in message['content'] %}{% if item['type'] == 'text' %}{{ item['text'] }}\
{% else %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>
' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""


@functools.cache
def corpus() -> list[str]:
    """Scene text (from its command: model/ imports nothing of data/), and each number of one
    decimal so often that it becomes a token before any word does."""
    numbers = [f"{sign}{tenth / 10}" for tenth in range(100) for sign in ("", "-")]
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "data.scenes",
            "--out",
            folder,
            "--n",
            str(SIZES["scenes"]),
        ]
        command += ["--seed", "0", "--size", "128", "96"]
        subprocess.run(command, check=True, capture_output=True, cwd=Path(__file__).parent.parent)
        rows = (Path(folder) / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    views = lambda table: {int(k) if k.isdigit() else k: v for k, v in table.items()}  # noqa: E731
    examples = [Example(**json.loads(row, object_hook=views)) for row in rows]
    # it's in no piece
    texts = "<mask>".join(f"{prompt(e)}\n{target(e)}" for e in examples).split("<mask>")
    return texts + numbers * 10 * SIZES["scenes"]


def tokenizer(family: str) -> PreTrainedTokenizerFast:
    model, level = (
        Tokenizer(models.BPE()),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    )
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(PIECES), "isolated"), level]
    )
    model.decoder = decoders.ByteLevel()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())  # all bytes: no text is out of reach
    trainer = trainers.BpeTrainer(
        vocab_size=SIZES["vocab"], show_progress=False, initial_alphabet=letters
    )
    model.train_from_iterator(corpus(), trainer)
    model.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL]
    )
    if family == "qwen3_vl":  # as in the real one: added, yet not special
        model.add_tokens([AddedToken(token, normalized=False) for token in ("<think>", "</think>")])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=model, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = TEMPLATE.replace("SYSTEM", "" if family == "qwen3_vl" else SYSTEM)
    return fast


def configuration(family: str, ids: dict[str, int]):
    extra, sections, vision = FAMILIES[family]
    rope = {"rope_type": "default", "rope_theta": 10000.0, **sections}
    # at least 16 to spare, as in every published checkpoint
    rows = -(-(max(ids.values()) + 17) // 64) * 64
    text = dict(
        vocab_size=rows, rope_parameters=rope, bos_token_id=None, eos_token_id=ids["<|im_end|>"]
    )
    return AutoConfig.for_model(
        family,
        tie_word_embeddings=False,
        dtype="float32",
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        text_config=SIZES["text"] | extra | text | {"initializer_range": SIZES["std"]},
        vision_config=SIZES["vision"] | vision | {"initializer_range": SIZES["std"]},
    )


def write(family: str, out: Path, seed: int = 0) -> None:
    tokens = tokenizer(family)
    ids = tokens.get_vocab()
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(configuration(family, ids))
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=SIZES["embedding_std"])
    torch.nn.init.normal_(model.get_output_embeddings().weight, std=SIZES["head_std"])
    end, pad = ids["<|im_end|>"], ids["<|endoftext|>"]
    model.generation_config = GenerationConfig(eos_token_id=[end, pad], pad_token_id=pad)
    model.save_pretrained(out)
    tokens.save_pretrained(out)
    mean, std = ([0.5] * 3, [0.5] * 3) if family == "qwen3_vl" else CLIP
    images = {"image_processor_type": "Qwen2VLImageProcessor", "image_mean": mean, "image_std": std}
    images |= SIZES["images"]
    (Path(out) / "preprocessor_config.json").write_text(json.dumps(images, indent=2) + "\n")
    write_spatial(out, seed)


def write_spatial(out: Path, seed: int) -> None:
    """The extra weights, with a point map that is heard from the start: a silent one is never
    learnt here."""
    from model.qwen_vl import QwenVL

    model = QwenVL.from_pretrained(out)
    model.points.init_unit_scale(seed)
    model.save_pretrained(out)


def main(
    out: Path, family: Literal["qwen3_vl", "qwen2_5_vl", "qwen2_vl"] = "qwen3_vl", seed: int = 0
):
    """Writes a tiny random checkpoint, with tokenizer and processor files.

    Args:
        out: directory to write
        family: which Qwen-VL's structure
        seed: of the weights
    """
    write(family, out, seed)


if __name__ == "__main__":
    tyro.cli(main)
