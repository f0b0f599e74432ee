"""The families of Qwen-VL: everything in which one differs from another, as data.

The rest of the model asks a `Family` what to do and never what it is called. To add one, add an
entry to FAMILIES; what it has that no other family does is a new field here, and the one place in
the model that reads it.

`DecoderSizes` and `VisionSizes` are what the model needs of transformers' config object.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """What sets one family apart from the others."""

    name: str  # config.json's model_type

    # Decoder. Qwen2 has biases on q, k and v; Qwen3 an RMSNorm on every query and key head instead.
    qkv_bias: bool
    qk_norm: bool
    mrope_interleaved: bool  # which rotary frequency listens to time, row, column: T H W T H W ...
    head_dim_field: bool  # the config says how wide a head is; else hidden width / heads
    sliding_window_field: bool  # the config has a switch for it, which must be off

    # Vision tower.
    width_field: str  # the config's name for the width of the tower
    output_field: str  # and for the width of its merged tokens
    norm: str  # "layer" or "rms"
    mlp_names: tuple[str, str] | None  # the two linear layers of its MLP; None: SwiGLU
    mlp_ratio_field: bool  # the config gives the inner width of the MLP as a ratio
    patch_bias: bool
    has_windows: bool  # most blocks look at windows of the image only
    has_learnt_positions: bool  # a table of position vectors, added to the patches
    has_deepstack: bool  # features of early blocks go into the decoder's first layers; new merger

    # A 2D box in a text: x0, y0, x1, y1 in 1/box_scale of the image; None: in pixels of the resized
    # image.
    box: str
    box_scale: int | None

    # What a tiny checkpoint needs to look like a published one.
    system_prompt: str | None  # the template's, where the user gives none
    has_think_tokens: bool
    pixel_mean: tuple[float, float, float]
    pixel_std: tuple[float, float, float]
    tiny_sections: tuple[int, int, int]  # rotary frequencies of time, row, column: 16 in all
    tiny_vision: dict  # the sizes of its tower, by the config's names


CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

QWEN2_VL = Family(
    name="qwen2_vl",
    qkv_bias=True,
    qk_norm=False,
    mrope_interleaved=False,
    head_dim_field=False,
    sliding_window_field=True,
    width_field="embed_dim",
    output_field="hidden_size",
    norm="layer",
    mlp_names=("fc1", "fc2"),
    mlp_ratio_field=True,
    patch_bias=False,
    has_windows=False,
    has_learnt_positions=False,
    has_deepstack=False,
    box="<|box_start|>({},{}),({},{})<|box_end|>",
    box_scale=1000,
    system_prompt="You are a helpful assistant.",
    has_think_tokens=False,
    pixel_mean=CLIP_MEAN,
    pixel_std=CLIP_STD,
    tiny_sections=(4, 6, 6),
    tiny_vision=dict(embed_dim=64, hidden_size=128, mlp_ratio=4),
)
QWEN2_5_VL = Family(
    name="qwen2_5_vl",
    qkv_bias=True,
    qk_norm=False,
    mrope_interleaved=False,
    head_dim_field=False,
    sliding_window_field=True,
    width_field="hidden_size",
    output_field="out_hidden_size",
    norm="rms",
    mlp_names=None,
    mlp_ratio_field=False,
    patch_bias=False,
    has_windows=True,
    has_learnt_positions=False,
    has_deepstack=False,
    box='{{"bbox_2d": [{}, {}, {}, {}]}}',
    box_scale=None,
    system_prompt="You are a helpful assistant.",
    has_think_tokens=False,
    pixel_mean=CLIP_MEAN,
    pixel_std=CLIP_STD,
    tiny_sections=(4, 6, 6),
    tiny_vision=dict(
        hidden_size=64,
        out_hidden_size=128,
        intermediate_size=256,
        window_size=64,
        fullatt_block_indexes=[1],
    ),
)
QWEN3_VL = Family(
    name="qwen3_vl",
    qkv_bias=False,
    qk_norm=True,
    mrope_interleaved=True,
    head_dim_field=True,
    sliding_window_field=False,
    width_field="hidden_size",
    output_field="out_hidden_size",
    norm="layer",
    mlp_names=("linear_fc1", "linear_fc2"),
    mlp_ratio_field=False,
    patch_bias=True,
    has_windows=False,
    has_learnt_positions=True,
    has_deepstack=True,
    box='{{"bbox_2d": [{}, {}, {}, {}]}}',
    box_scale=1000,
    system_prompt=None,
    has_think_tokens=True,
    pixel_mean=(0.5, 0.5, 0.5),
    pixel_std=(0.5, 0.5, 0.5),
    tiny_sections=(6, 5, 5),
    tiny_vision=dict(
        hidden_size=64,
        out_hidden_size=128,
        intermediate_size=256,
        num_position_embeddings=256,
        deepstack_visual_indexes=[0],
    ),
)
FAMILIES = {family.name: family for family in (QWEN2_VL, QWEN2_5_VL, QWEN3_VL)}


def family_of(config) -> Family:
    """Look up the family of transformers' config object; ValueError for any other model."""
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"model_type {config.model_type!r} is not supported; this is for {', '.join(FAMILIES)}"
        )
    return FAMILIES[config.model_type]


@dataclass(frozen=True)
class DecoderSizes:
    """The sizes and constants of a decoder."""

    family: Family
    vocab: int
    hidden: int
    inner: int  # width of the MLP
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    theta: float
    sections: tuple[int, int, int]  # how many rotary frequencies listen to time, row, column
    tied: bool  # the head is the embedding

    @classmethod
    def of(cls, config) -> "DecoderSizes":
        """Read transformers' config object; ValueError, in one line, for what isn't supported."""
        family = family_of(config)
        text = config.text_config
        rope = text.rope_parameters
        if rope.get("rope_type", "default") != "default":
            raise ValueError(f"rope_type {rope['rope_type']!r} is not supported (only 'default')")
        if family.sliding_window_field and text.use_sliding_window:
            raise ValueError(
                "use_sliding_window is not supported; no published Qwen-VL checkpoint has it on"
            )
        head_dim = text.hidden_size // text.num_attention_heads
        if family.head_dim_field:
            head_dim = text.head_dim
        return cls(
            family=family,
            vocab=text.vocab_size,
            hidden=text.hidden_size,
            inner=text.intermediate_size,
            layers=text.num_hidden_layers,
            heads=text.num_attention_heads,
            kv_heads=text.num_key_value_heads,
            head_dim=head_dim,
            eps=text.rms_norm_eps,
            theta=rope["rope_theta"],
            sections=tuple(rope["mrope_section"]),
            tied=config.tie_word_embeddings,
        )


@dataclass(frozen=True)
class VisionSizes:
    """The sizes and constants of a vision tower."""

    family: Family
    width: int
    inner: int  # width of the MLP
    output: int  # width of a merged token
    depth: int
    heads: int
    channels: int
    frames: int  # that make up a patch
    patch: int  # pixels along a patch's side
    merge: int  # merge x merge patches become one token
    activation: str
    theta: float
    window: int | None  # side of a window in merged tokens
    full_blocks: tuple[int, ...]  # blocks that see the whole image
    deepstack_blocks: tuple[int, ...]  # blocks whose features go into the decoder
    positions: int  # entries of the table of learnt positions

    @classmethod
    def of(cls, config) -> "VisionSizes":
        """Read transformers' config object of the whole model."""
        family = family_of(config)
        vision = config.vision_config
        width = getattr(vision, family.width_field)
        window = None
        full_blocks = tuple(range(vision.depth))
        if family.has_windows:
            window = vision.window_size // vision.spatial_merge_size // vision.patch_size
            full_blocks = tuple(vision.fullatt_block_indexes)
        if family.mlp_ratio_field:
            inner = int(width * vision.mlp_ratio)
        else:
            inner = vision.intermediate_size
        deepstack_blocks = ()
        if family.has_deepstack:
            deepstack_blocks = tuple(vision.deepstack_visual_indexes)
        return cls(
            family=family,
            width=width,
            inner=inner,
            output=getattr(vision, family.output_field),
            depth=vision.depth,
            heads=vision.num_heads,
            channels=vision.in_channels,
            frames=vision.temporal_patch_size,
            patch=vision.patch_size,
            merge=vision.spatial_merge_size,
            activation=vision.hidden_act,
            theta=vision.rope_parameters["rope_theta"],
            window=window,
            full_blocks=full_blocks,
            deepstack_blocks=deepstack_blocks,
            positions=vision.num_position_embeddings if family.has_learnt_positions else 0,
        )
