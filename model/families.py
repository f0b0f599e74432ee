"""The families of Qwen-VL: everything in which one differs from another, as data.

The rest of the model asks a `Family` what to do and never what it is called. To add one, add an
entry to FAMILIES; what it has that no other family does is a new field here, and the one place in
the model that reads it.

`DecoderSizes` and `VisionSizes` are what the model needs of transformers' config object.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Family:
    """What sets one family apart from the others."""

    name: str  # config.json's model_type

    # ---- Decoder
    # Qwen2 has biases on q, k and v; Qwen3 an RMSNorm on every query and key head instead.
    qkv_bias: bool = False
    qk_norm: bool = False
    # How rotary frequencies are dealt out to time, row and column: T H W T H W ..., or in blocks.
    mrope_interleaved: bool = False
    # Only some channels of a head rotate: the config says which share.
    partial_rotary: bool = False
    # The decoder's norms multiply by 1 + weight.
    norm_offset: float = 0.0
    # Each query head has a gate, whose rows follow the query's own: out * sigmoid(gate).
    attention_gate: bool = False
    # Some layers, which the config lists, are gated delta nets (delta.py).
    has_delta_layers: bool = False
    # Whether the config says how wide a head is; else it is the hidden width / heads.
    head_dim_field: bool = False
    # Whether the config has a switch for a sliding window, which must be off.
    sliding_window_field: bool = False

    # ---- Vision tower
    # The config's names for the width of the tower, and for that of its merged tokens.
    width_field: str
    output_field: str
    # Whether the config gives the inner width of the MLP as a ratio.
    mlp_ratio_field: bool = False
    norm: str  # "layer" or "rms"
    mlp_names: tuple[str, str] | None  # of the two linear layers of its MLP; None: SwiGLU
    patch_bias: bool = False
    # Most blocks look at windows of the image only.
    has_windows: bool = False
    # A table of position vectors is added to the patches.
    has_learnt_positions: bool = False
    # The merger's names: norm, linear_fc1, linear_fc2; else ln_q, mlp.
    has_flat_merger: bool = False
    # Features of early blocks go into the decoder's first layers.
    has_deepstack: bool = False

    # ---- Text
    # A 2D box: x0, y0, x1, y1 in 1/box_scale of the image; None: in pixels of the resized image.
    box: str
    box_scale: int | None

    # What ends a turn beside what generation_config.json and the tokenizer say.
    turn_end: str | None = None
    # Where text is cut before it is tokenized, whatever tokenizer.json says: its files disagree.
    pretokenizer: str | None = None

    # ---- What a tiny checkpoint needs to look like a published one
    # The chat template's system prompt, where the user gives none.
    system_prompt: str | None
    # <think> and </think> are tokens of their own.
    has_think_tokens: bool = False
    pixel_mean: tuple[float, float, float]
    pixel_std: tuple[float, float, float]
    # How many rotary frequencies listen to time, row, column: 16 in all.
    tiny_sections: tuple[int, int, int]
    # The sizes of its tower, by the config's names.
    tiny_vision: dict
    # Further sizes of its decoder.
    tiny_text: dict = field(default_factory=dict)
    # What its rope_parameters have beside theta and sections.
    tiny_rope: dict = field(default_factory=dict)


CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

QWEN2_VL = Family(
    name="qwen2_vl",
    qkv_bias=True,
    sliding_window_field=True,
    width_field="embed_dim",
    output_field="hidden_size",
    norm="layer",
    mlp_names=("fc1", "fc2"),
    mlp_ratio_field=True,
    box="<|box_start|>({},{}),({},{})<|box_end|>",
    box_scale=1000,
    system_prompt="You are a helpful assistant.",
    pixel_mean=CLIP_MEAN,
    pixel_std=CLIP_STD,
    tiny_sections=(4, 6, 6),
    tiny_vision=dict(embed_dim=64, hidden_size=128, mlp_ratio=4),
)
QWEN2_5_VL = Family(
    name="qwen2_5_vl",
    qkv_bias=True,
    sliding_window_field=True,
    width_field="hidden_size",
    output_field="out_hidden_size",
    norm="rms",
    mlp_names=None,
    has_windows=True,
    box='{{"bbox_2d": [{}, {}, {}, {}]}}',
    box_scale=None,
    system_prompt="You are a helpful assistant.",
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
    qk_norm=True,
    mrope_interleaved=True,
    head_dim_field=True,
    width_field="hidden_size",
    output_field="out_hidden_size",
    norm="layer",
    mlp_names=("linear_fc1", "linear_fc2"),
    patch_bias=True,
    has_learnt_positions=True,
    has_flat_merger=True,
    has_deepstack=True,
    box='{{"bbox_2d": [{}, {}, {}, {}]}}',
    box_scale=1000,
    system_prompt=None,
    has_think_tokens=True,
    pixel_mean=(0.5, 0.5, 0.5),
    pixel_std=(0.5, 0.5, 0.5),
    tiny_sections=(6, 5, 5),
    tiny_text=dict(head_dim=32),
    tiny_rope=dict(mrope_interleaved=True),
    tiny_vision=dict(
        hidden_size=64,
        out_hidden_size=128,
        intermediate_size=256,
        num_position_embeddings=256,
        deepstack_visual_indexes=[0],
    ),
)
# As transformers cuts text for Qwen3.5 since 5.18: unlike Qwen2's, combining marks go with letters.
# Before, it took Qwen2's, and so do some tokenizer.json files.
QWEN3_5_PRETOKENIZER = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Qwen3.5, 3.6 and 3.8 (dense) are one model_type.
QWEN3_5 = Family(
    name="qwen3_5",
    qk_norm=True,
    mrope_interleaved=True,
    head_dim_field=True,
    partial_rotary=True,
    norm_offset=1.0,
    attention_gate=True,
    has_delta_layers=True,
    width_field="hidden_size",
    output_field="out_hidden_size",
    norm="layer",
    mlp_names=("linear_fc1", "linear_fc2"),
    patch_bias=True,
    has_learnt_positions=True,
    has_flat_merger=True,
    box='{{"bbox_2d": [{}, {}, {}, {}]}}',
    box_scale=1000,
    turn_end="<|im_end|>",
    pretokenizer=QWEN3_5_PRETOKENIZER,
    system_prompt=None,
    has_think_tokens=True,
    pixel_mean=(0.5, 0.5, 0.5),
    pixel_std=(0.5, 0.5, 0.5),
    tiny_sections=(3, 3, 2),
    tiny_vision=dict(
        hidden_size=64,
        out_hidden_size=128,
        intermediate_size=256,
        num_position_embeddings=256,
    ),
    tiny_text=dict(
        head_dim=32,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=32,
        linear_value_head_dim=32,
    ),
    tiny_rope=dict(mrope_interleaved=True, partial_rotary_factor=0.5),
)
FAMILIES = {family.name: family for family in (QWEN2_VL, QWEN2_5_VL, QWEN3_VL, QWEN3_5)}


MOE = "a mixture of experts, of which a rollout needs a whole copy on every rank"
# Relatives that are refused, and why.
REFUSED = {
    "qwen3_vl_moe": MOE,
    "qwen3_5_moe": MOE,
    "qwen3_5_text": "an export of the decoder alone, without a vision tower",
    "qwen3_next": "a language model without a vision tower",
    "qwen4_exp": "its hyper-connections, n-gram embeddings and sparse attention aren't written",
}


def family_of(config) -> Family:
    """Look up the family of transformers' config object; ValueError for any other model."""
    check_family(config.model_type)
    return FAMILIES[config.model_type]


def check_family(model_type: str) -> None:
    """Raise ValueError, which says why, for what isn't one of FAMILIES."""
    if model_type in FAMILIES:
        return
    reason = f"this is for {', '.join(FAMILIES)}"
    if model_type in REFUSED:
        reason = f"{REFUSED[model_type]}; {reason}"
    raise ValueError(f"model_type {model_type!r} is not supported: {reason}")


def default_sections(frequencies: int) -> tuple[int, int, int]:
    """Return what transformers makes of a Qwen3.5 config without mrope_section: [11, 11, 10].

    Interleaved, and cut where there are fewer frequencies.
    """
    rows = len(range(1, min(33, frequencies), 3))
    columns = len(range(2, min(30, frequencies), 3))
    return frequencies - rows - columns, rows, columns


@dataclass(frozen=True)
class DeltaSizes:
    """The sizes of a gated delta net."""

    key_heads: int
    value_heads: int  # a multiple of key_heads
    key_dim: int
    value_dim: int
    taps: int  # of the convolution

    @property
    def channels(self) -> int:
        """Of the convolution: queries, keys and values."""
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim

    @classmethod
    def of(cls, text) -> "DeltaSizes":
        """Read the text part of transformers' config object."""
        kinds = set(text.layer_types) - {"linear_attention", "full_attention"}
        if kinds:
            raise ValueError(f"layer_types {', '.join(sorted(kinds))} are not supported")
        for name, allowed in (
            ("output_gate_type", ("silu", "swish")),
            ("attn_output_gate", (True,)),
            ("attention_bias", (False,)),
            ("hidden_act", ("silu",)),
        ):
            value = getattr(text, name, allowed[0])
            if value not in allowed:
                raise ValueError(f"{name} {value!r} is not supported (only {allowed[0]!r})")
        return cls(
            key_heads=text.linear_num_key_heads,
            value_heads=text.linear_num_value_heads,
            key_dim=text.linear_key_head_dim,
            value_dim=text.linear_value_head_dim,
            taps=text.linear_conv_kernel_dim,
        )


@dataclass(frozen=True)
class DecoderSizes:
    """The sizes and constants of a decoder."""

    family: Family
    vocab: int  # rows of the embedding, spare ones included
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
    rotary: int  # channels of a head that rotate, the first ones
    attends: tuple[bool, ...]  # of each layer: whether it attends, or is a gated delta net
    delta: DeltaSizes | None  # of the gated delta nets

    @property
    def attention_layers(self) -> int:
        return sum(self.attends)

    @property
    def delta_layers(self) -> int:
        return self.layers - self.attention_layers

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
        rotary = head_dim
        if family.partial_rotary:
            rotary = int(head_dim * rope["partial_rotary_factor"])
        sections = rope.get("mrope_section")
        if sections is None and family.partial_rotary:
            sections = default_sections(rotary // 2)
        sections = tuple(sections)
        if 2 * sum(sections) != rotary:
            raise ValueError(f"mrope_section {list(sections)} should sum to {rotary // 2}")
        attends = (True,) * text.num_hidden_layers
        if family.has_delta_layers:
            attends = tuple(kind == "full_attention" for kind in text.layer_types)
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
            sections=sections,
            tied=config.tie_word_embeddings,
            rotary=rotary,
            attends=attends,
            delta=DeltaSizes.of(text) if family.has_delta_layers else None,
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
