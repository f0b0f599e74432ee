"""The config.json of every dense size that Qwen has published, and how many parameters it has."""

IDS = dict(
    image_token_id=151655,
    video_token_id=151656,
    vision_start_token_id=151652,
    vision_end_token_id=151653,
)


def published() -> dict[str, dict]:
    """The config.json of each dense size, as published: Qwen2-VL and Qwen2.5-VL flat, Qwen3-VL
    nested."""
    rope = {"type": "mrope", "mrope_section": [16, 24, 24]}

    def qwen2(hidden, inner, layers, heads, kv, vocab, tied):
        return dict(
            hidden_size=hidden,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv,
            vocab_size=vocab,
            tie_word_embeddings=tied,
            rope_scaling=rope,
            rope_theta=1e6,
            rms_norm_eps=1e-6,
            use_sliding_window=False,
            **IDS,
        )

    def vision2(hidden):
        return dict(
            depth=32,
            embed_dim=1280,
            mlp_ratio=4,
            num_heads=16,
            in_chans=3,
            hidden_size=hidden,
            patch_size=14,
            spatial_merge_size=2,
            spatial_patch_size=14,
            temporal_patch_size=2,
        )

    def vision25(out):
        return dict(
            depth=32,
            hidden_act="silu",
            hidden_size=1280,
            intermediate_size=3420,
            num_heads=16,
            in_chans=3,
            out_hidden_size=out,
            patch_size=14,
            spatial_merge_size=2,
            window_size=112,
            fullatt_block_indexes=[7, 15, 23, 31],
            tokens_per_second=2,
            temporal_patch_size=2,
        )

    def qwen3(hidden, inner, layers, heads, tied, vision):
        rope = dict(mrope_interleaved=True, mrope_section=[24, 20, 20], rope_type="default")
        text = dict(
            model_type="qwen3_vl_text",
            hidden_size=hidden,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=8,
            head_dim=128,
            vocab_size=151936,
            rms_norm_eps=1e-6,
            rope_theta=5e6,
            rope_scaling=rope,
            attention_bias=False,
            tie_word_embeddings=tied,
        )
        depth, width, mlp, deep = vision
        tower = dict(
            model_type="qwen3_vl",
            depth=depth,
            hidden_size=width,
            intermediate_size=mlp,
            num_heads=16,
            patch_size=16,
            hidden_act="gelu_pytorch_tanh",
            out_hidden_size=hidden,
            deepstack_visual_indexes=deep,
            num_position_embeddings=2304,
            spatial_merge_size=2,
            temporal_patch_size=2,
        )
        return dict(
            model_type="qwen3_vl",
            text_config=text,
            vision_config=tower,
            tie_word_embeddings=tied,
            **IDS,
        )

    def qwen35(hidden, inner, layers, heads, kv, value_heads, tied, vision):
        rope = dict(rope_type="default", rope_theta=1e7, partial_rotary_factor=0.25)
        rope |= dict(mrope_section=[11, 11, 10], mrope_interleaved=True)
        text = dict(
            model_type="qwen3_5_text",
            hidden_size=hidden,
            intermediate_size=inner,
            num_hidden_layers=layers,
            full_attention_interval=4,
            num_attention_heads=heads,
            num_key_value_heads=kv,
            head_dim=256,
            linear_num_key_heads=16,
            linear_num_value_heads=value_heads,
            linear_key_head_dim=128,
            linear_value_head_dim=128,
            linear_conv_kernel_dim=4,
            vocab_size=248320,
            rms_norm_eps=1e-6,
            rope_parameters=rope,
            attn_output_gate=True,
            mamba_ssm_dtype="float32",
            tie_word_embeddings=tied,
        )
        depth, width, mlp, heads = vision
        tower = dict(
            model_type="qwen3_5",
            depth=depth,
            hidden_size=width,
            intermediate_size=mlp,
            num_heads=heads,
            patch_size=16,
            hidden_act="gelu_pytorch_tanh",
            out_hidden_size=hidden,
            deepstack_visual_indexes=[],
            num_position_embeddings=2304,
            spatial_merge_size=2,
            temporal_patch_size=2,
        )
        return dict(
            model_type="qwen3_5",
            text_config=text,
            vision_config=tower,
            tie_word_embeddings=tied,
            image_token_id=248056,
            video_token_id=248057,
            vision_start_token_id=248053,
            vision_end_token_id=248054,
        )

    middle = (24, 1024, 4096, 16)
    huge = (27, 1152, 4304, 16)
    small, large = (24, 1024, 4096, [5, 11, 17]), (27, 1152, 4304, [8, 16, 24])
    return {
        "Qwen2-VL-2B": qwen2(1536, 8960, 28, 12, 2, 151936, True)
        | dict(model_type="qwen2_vl", vision_config=vision2(1536)),
        "Qwen2-VL-7B": qwen2(3584, 18944, 28, 28, 4, 152064, False)
        | dict(model_type="qwen2_vl", vision_config=vision2(3584)),
        "Qwen2.5-VL-3B": qwen2(2048, 11008, 36, 16, 2, 151936, True)
        | dict(model_type="qwen2_5_vl", vision_config=vision25(2048)),
        "Qwen2.5-VL-7B": qwen2(3584, 18944, 28, 28, 4, 152064, False)
        | dict(model_type="qwen2_5_vl", vision_config=vision25(3584)),
        "Qwen3-VL-2B": qwen3(2048, 6144, 28, 16, True, small),
        "Qwen3-VL-4B": qwen3(2560, 9728, 36, 32, True, small),
        "Qwen3-VL-8B": qwen3(4096, 12288, 36, 32, False, large),
        "Qwen3.5-0.8B": qwen35(1024, 3584, 24, 8, 2, 16, True, (12, 768, 3072, 12)),
        "Qwen3.5-2B": qwen35(2048, 6144, 24, 8, 2, 16, True, middle),
        "Qwen3.5-4B": qwen35(2560, 9216, 32, 16, 4, 32, True, middle),
        "Qwen3.5-9B": qwen35(4096, 12288, 32, 16, 4, 32, False, huge),
        "Qwen3.5-27B": qwen35(5120, 17408, 64, 24, 4, 48, False, huge),
    }


# Billions of parameters as the published safetensors indices count them (tied heads once).
BILLIONS = {
    "Qwen2-VL-2B": 2.209,
    "Qwen2-VL-7B": 8.291,
    "Qwen2.5-VL-3B": 3.755,
    "Qwen2.5-VL-7B": 8.292,
    "Qwen3-VL-2B": 2.128,
    "Qwen3-VL-4B": 4.438,
    "Qwen3-VL-8B": 8.767,
    # Without the 15 tensors of the multi-token prediction head.
    "Qwen3.5-0.8B": 0.853,
    "Qwen3.5-2B": 2.213,
    "Qwen3.5-4B": 4.539,
    "Qwen3.5-9B": 9.410,
    "Qwen3.5-27B": 27.357,
}
