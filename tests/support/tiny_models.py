"""Small random models of every family, with odd sizes, made by transformers: the oracle of
the model tests.

(The embedded demo's checkpoint comes from `model.tiny`; these here are smaller and stranger.)
"""

import torch
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5")
IMAGE, VISION_START, VISION_END = 300, 298, 299
_SPECIAL = dict(
    image_token_id=IMAGE,
    video_token_id=301,
    vision_start_token_id=VISION_START,
    vision_end_token_id=VISION_END,
)
_TEXT = dict(
    vocab_size=303,
    hidden_size=48,
    intermediate_size=88,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[1, 2, 3]),
    rms_norm_eps=1e-6,
    bos_token_id=1,
    eos_token_id=2,
)


def make(family: str, seed: int = 0, tied: bool = False):
    """transformers' model of a family, weights, biases and norms random (their defaults hide
    mistakes)."""
    if family == "qwen2_vl":
        vision = dict(depth=2, embed_dim=32, hidden_size=48, num_heads=2, mlp_ratio=3, patch_size=6)
        config = Qwen2VLConfig(
            text_config=_TEXT, vision_config=vision, tie_word_embeddings=tied, **_SPECIAL
        )
        cls = Qwen2VLForConditionalGeneration
    elif family == "qwen2_5_vl":
        vision = dict(
            depth=3,
            hidden_size=32,
            out_hidden_size=48,
            num_heads=2,
            intermediate_size=40,
            patch_size=6,
            window_size=36,
            fullatt_block_indexes=[1],
        )
        config = Qwen2_5_VLConfig(
            text_config=_TEXT, vision_config=vision, tie_word_embeddings=tied, **_SPECIAL
        )
        cls = Qwen2_5_VLForConditionalGeneration
    elif family == "qwen3_5":
        return make_qwen3_5(seed, tied)
    else:
        rope = dict(
            rope_type="default", rope_theta=1e4, mrope_section=[5, 3, 2], mrope_interleaved=True
        )
        text = _TEXT | dict(head_dim=20, rope_parameters=rope)
        vision = dict(
            depth=4,
            hidden_size=32,
            out_hidden_size=48,
            num_heads=2,
            intermediate_size=40,
            patch_size=6,
            num_position_embeddings=25,
            deepstack_visual_indexes=[0, 2],
        )
        config = Qwen3VLConfig(
            text_config=text, vision_config=vision, tie_word_embeddings=tied, **_SPECIAL
        )
        cls = Qwen3VLForConditionalGeneration
    return randomised(cls, config, seed)


def randomised(cls, config, seed: int):
    torch.manual_seed(seed)
    model = cls(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return model


def make_qwen3_5(seed: int = 0, tied: bool = False, key_heads: int = 2, value_heads: int = 6):
    """A Qwen3.5 whose delta heads forget fast, as transformers starts them, and slowly, in turn."""
    rope = dict(rope_type="default", rope_theta=1e4, mrope_section=[3, 2, 1])
    delta = dict(
        linear_num_key_heads=key_heads,
        linear_num_value_heads=value_heads,
        linear_key_head_dim=12,
        linear_value_head_dim=20,
        linear_conv_kernel_dim=4,
    )
    text = _TEXT | dict(
        num_hidden_layers=4,
        head_dim=24,
        rope_parameters=rope | dict(partial_rotary_factor=0.5),
        layer_types=["linear_attention", "full_attention", "linear_attention", "linear_attention"],
        **delta,
    )
    vision = dict(
        depth=3,
        hidden_size=32,
        out_hidden_size=48,
        num_heads=2,
        intermediate_size=40,
        patch_size=6,
        num_position_embeddings=25,
    )
    config = Qwen3_5Config(
        text_config=text, vision_config=vision, tie_word_embeddings=tied, **_SPECIAL
    )
    model = randomised(Qwen3_5ForConditionalGeneration, config, seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("dt_bias"):
                p[::2] -= 5
    return model


def inputs(side: str = "right", seed: int = 0) -> dict[str, torch.Tensor]:
    """Two images of different sizes, one image, and text only, padded on `side`: what transformers'
    model takes.
    """
    grids = torch.tensor([[1, 4, 10], [1, 6, 4], [1, 2, 2]])
    a, b, c = (t * h * w // 4 for t, h, w in grids.tolist())
    rows = [
        [3, 4, VISION_START]
        + [IMAGE] * a
        + [VISION_END, 5, 6, VISION_START]
        + [IMAGE] * b
        + [VISION_END, 7, 8],
        [9, VISION_START] + [IMAGE] * c + [VISION_END, 11],
        [3, 4, 5, 17, 290],
    ]
    longest = max(map(len, rows))
    pads = [[0] * (longest - len(row)) for row in rows]
    ids = [row + pad if side == "right" else pad + row for row, pad in zip(rows, pads, strict=True)]
    keep = [
        [1] * len(row) + pad if side == "right" else pad + [1] * len(row)
        for row, pad in zip(rows, pads, strict=True)
    ]
    pixels = torch.randn(
        int(grids.prod(1).sum()), 3 * 2 * 6 * 6, generator=torch.Generator().manual_seed(seed)
    )
    return dict(
        input_ids=torch.tensor(ids),
        attention_mask=torch.tensor(keep),
        pixel_values=pixels,
        image_grid_thw=grids,
    )


def reference_logits(model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    kinds = (batch["input_ids"] == IMAGE).int()
    with torch.no_grad():
        return model(**batch, mm_token_type_ids=kinds).logits
