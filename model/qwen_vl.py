"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL (dense) in one file: a packed batch in, hidden states and
log-probs out.

The decoder is the one that everybody knows: RMSNorm, grouped-query attention with rotary positions,
SwiGLU, residuals. What is Qwen-VL's own:

    mRoPE      a token has three positions (time, row, column), equal for text; each rotary frequency
               listens to one of them: in blocks (Qwen2, 2.5) or interleaved (Qwen3)
    biases     on q, k, v (Qwen2, 2.5), or an RMSNorm on every query and key head instead (Qwen3)
    deepstack  Qwen3-VL adds features of early vision blocks to the image tokens after the first layers

What is ours: `<mask>` tokens become region tokens (region.py), depth enters and 3D centres leave
(head3d.py), and the attention is handed in as a function, `attend(layer, q, k, v)`: the same layers
train on packed segments with shared prefixes, prefill a cache and decode from it. Logits never
exist in training: log-probs and entropies come from `linear_logprob`. Parameter names are those of
the published checkpoints, below our own prefixes.

T packed tokens, L target tokens, R regions, P patches, M image tokens; H hidden width, A query
heads, K key-value heads, D head width, V vocabulary rows.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels.layers import add_rms_norm, qk_norm_rope
from kernels.linear_logprob import linear_logprob
from kernels.packed_attention import Packing, gather_rows, prefix_attention, upload
from model.head3d import Head3D, PointEmbedding
from model.processor import Batch, rope_positions
from model.region import RegionToken
from model.vision import RMSNorm, SwiGLU, VisionTower

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
# (layer, q (T,A,D), k (T,K,D), v) -> (T,A,D)
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Sizes:
    """What the decoder needs of transformers' config object; everything else is derived."""

    vocab: int
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    theta: float
    sections: tuple[int, int, int]  # rotary frequencies that listen to time, row, column
    qwen3: bool
    tied: bool

    @classmethod
    def of(cls, config) -> "Sizes":
        """ValueError, in one line, on a checkpoint of another family or with an unsupported
        variant."""
        if config.model_type not in FAMILIES:
            raise ValueError(
                f"model_type {config.model_type!r} is not supported; this is for {', '.join(FAMILIES)}"
            )
        text, rope, qwen3 = (
            config.text_config,
            config.text_config.rope_parameters,
            config.model_type == "qwen3_vl",
        )
        if rope.get("rope_type", "default") != "default":
            raise ValueError(f"rope_type {rope['rope_type']!r} is not supported (only 'default')")
        if not qwen3 and text.use_sliding_window:
            raise ValueError(
                "use_sliding_window is not supported; no published Qwen-VL checkpoint has it on"
            )
        head_dim = text.head_dim if qwen3 else text.hidden_size // text.num_attention_heads
        return cls(
            text.vocab_size,
            text.hidden_size,
            text.intermediate_size,
            text.num_hidden_layers,
            text.num_attention_heads,
            text.num_key_value_heads,
            head_dim,
            text.rms_norm_eps,
            rope["rope_theta"],
            tuple(rope["mrope_section"]),
            qwen3,
            config.tie_word_embeddings,
        )


class Attention(nn.Module):
    def __init__(self, s: Sizes, layer: int):
        super().__init__()
        self.layer, self.head_dim, self.norms = layer, s.head_dim, s.qwen3
        self.q_proj = nn.Linear(s.hidden, s.heads * s.head_dim, bias=not s.qwen3)
        self.k_proj = nn.Linear(s.hidden, s.kv_heads * s.head_dim, bias=not s.qwen3)
        self.v_proj = nn.Linear(s.hidden, s.kv_heads * s.head_dim, bias=not s.qwen3)
        self.o_proj = nn.Linear(s.heads * s.head_dim, s.hidden, bias=False)
        if s.qwen3:
            self.q_norm, self.k_norm = RMSNorm(s.head_dim, s.eps), RMSNorm(s.head_dim, s.eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.head_dim))
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        norms = (self.q_norm.weight, self.k_norm.weight, self.q_norm.eps) if self.norms else ()
        q, k = qk_norm_rope(q, k, cos, sin, *norms)
        out = attend(self.layer, q, k, v)  # (T, A, D)
        return self.o_proj(out.flatten(-2))


def adjoin(*layers: nn.Linear) -> None:
    """Moves the weights, and biases, of linear layers into one tensor, of which each has its rows.
    To be done before an optimiser is made: in fp32 its masters are the parameters' own memory.
    """
    if adjoined(*layers) or any(type(layer) is not nn.Linear for layer in layers):
        return
    for kind in ("weight", "bias"):
        parts = [getattr(layer, kind) for layer in layers]
        if parts[0] is not None:
            rows = torch.cat([p.data for p in parts]).split([len(p) for p in parts])
            for p, own in zip(parts, rows, strict=True):
                p.data = own


def adjoined(*layers: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """(weight, bias) of linear layers in one tensor, so that one matrix product serves them all;
    None where they lie apart: what is moved, or copied, has to be joined again.
    """
    if any(type(layer) is not nn.Linear for layer in layers):
        return None
    out = []
    for parts in ([layer.weight for layer in layers], [layer.bias for layer in layers]):
        if parts[0] is None:
            out.append(None)
            continue
        one = len({p.untyped_storage().data_ptr() for p in parts}) == 1
        whole = one and all(p.is_contiguous() for p in parts)
        if not whole or any(p.data_ptr() + p.nbytes != q.data_ptr() for p, q in pairwise(parts)):
            return None
        shape = sum(len(p) for p in parts), *parts[0].shape[1:]
        out.append(parts[0].detach().as_strided(shape, parts[0].stride()))
    return tuple(out)


class Layer(nn.Module):
    def __init__(self, s: Sizes, layer: int):
        super().__init__()
        self.self_attn = Attention(s, layer)
        self.mlp = SwiGLU(s.hidden, s.inner)
        self.input_layernorm, self.post_attention_layernorm = (
            RMSNorm(s.hidden, s.eps),
            RMSNorm(s.hidden, s.eps),
        )

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        attended = self.self_attn(self.input_layernorm(x), cos, sin, attend)
        norm = self.post_attention_layernorm
        x, normed = add_rms_norm(x, attended, norm.weight, norm.eps)
        return x + self.mlp(normed)


class Decoder(nn.Module):
    def __init__(self, s: Sizes):
        super().__init__()
        self.sizes = s
        self.embed_tokens = nn.Embedding(s.vocab, s.hidden)
        self.layers = nn.ModuleList([Layer(s, i) for i in range(s.layers)])
        self.norm = RMSNorm(s.hidden, s.eps)

    def forward(
        self,
        x: Tensor,
        position_ids: Tensor,
        attend: Attend,
        image_at: Tensor | None = None,
        deepstack: tuple = (),
    ) -> Tensor:
        """x (T, H) embeddings, position_ids (3, T). deepstack[i] (M, H) is added at image_at (M,)
        after layer i.
        """
        cos, sin = self.angles(position_ids, x.dtype)
        for i, layer in enumerate(self.layers):
            x = layer(x, cos, sin, attend)
            if i < len(deepstack):
                # One term a token, and its gradient is one: nothing is summed in 16 bits.
                x = x.index_add(0, image_at, deepstack[i].to(x.dtype))
        return self.norm(x)

    def angles(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos, sin (T, D) of mRoPE, computed in fp32. Frequency j turns by
        position_ids[axis[j]]."""
        s, device = self.sizes, position_ids.device
        inv_freq = 1.0 / s.theta ** (
            torch.arange(0, s.head_dim, 2, device=device, dtype=torch.float) / s.head_dim
        )
        axis = upload(rope_axes(s.sections, interleaved=s.qwen3), device)
        angles = position_ids[axis].T.float() * inv_freq  # (T, D / 2)
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(dtype), angles.sin().to(dtype)


def rope_axes(sections: tuple[int, int, int], interleaved: bool) -> Tensor:
    """(D / 2,) the axis (0 time, 1 row, 2 column) of every rotary frequency."""
    axis = torch.repeat_interleave(torch.arange(3), torch.tensor(sections))
    if interleaved:  # T H W T H W ... and the rest T
        axis = torch.zeros(sum(sections), dtype=torch.long)
        axis[1 : 3 * sections[1] : 3], axis[2 : 3 * sections[2] : 3] = 1, 2
    return axis


@dataclass
class Output:
    """What one forward gives: hidden (T, H); logprob, entropy (L,) fp32 of `batch.targets`;
    centres, sizes (R, 3) metres.
    """

    hidden: Tensor
    logprob: Tensor
    entropy: Tensor
    centres: Tensor
    sizes: Tensor


class QwenVL(nn.Module):
    """The whole model. `config` is transformers' config object; weights come from
    `from_pretrained`."""

    def __init__(self, config):
        super().__init__()
        self.config, sizes = config, Sizes.of(config)
        self.vision = VisionTower(config)
        self.decoder = Decoder(sizes)
        # A tied head is the embedding itself: no second parameter, and its gradient adds up by
        # autograd.
        self.lm_head = None if sizes.tied else nn.Linear(sizes.hidden, sizes.vocab, bias=False)
        self.region = RegionToken(self.vision.width, sizes.hidden)
        self.points = PointEmbedding(self.vision.width)
        self.head3d = Head3D(sizes.hidden)
        self.points_kind = "metric"  # or "relative"; what spatial.safetensors records

    @classmethod
    def from_pretrained(
        cls, source: str, device=None, dtype: torch.dtype | None = None
    ) -> "QwenVL":
        """A directory or hub id of a Qwen2-VL, Qwen2.5-VL or dense Qwen3-VL checkpoint.

        dtype None: the decoder's on disk, for the whole model. The extra weights
        (spatial.safetensors) are cast to it too: they come back to the bit where they were saved in
        that dtype. Raises CheckpointError (a ValueError, one line) for what can't be loaded.
        """
        from model.checkpoint import load

        return load(source, device, dtype)

    def save_pretrained(self, directory: str, processor=None) -> None:
        """Atomically writes a checkpoint that transformers loads unchanged, and spatial.safetensors
        beside it.
        """
        from model.checkpoint import save

        save(self, directory, processor)

    def adjoin(self) -> None:
        """Puts weights that the sampler multiplies one input with side by side."""
        for layer in self.decoder.layers:
            attn, mlp = layer.self_attn, layer.mlp
            adjoin(attn.q_proj, attn.k_proj, attn.v_proj)
            adjoin(mlp.gate_proj, mlp.up_proj)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # of the room that they had apart

    def checkpoint_blocks(self) -> None:
        """From now on each block keeps only its input for the backward, which computes the rest
        again: a quarter to a third more arithmetic, the same numbers. Without gradients nothing
        changes.
        """
        for block in (*self.vision.blocks, *self.decoder.layers):
            # Inside of FSDP's hooks, which are the module's: what is computed again finds whole
            # weights.
            block.forward = partial(
                checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
            )

    @property
    def device(self) -> torch.device:
        return self.decoder.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder.norm.weight.dtype

    @property
    def head_weight(self) -> Tensor:
        return (self.decoder.embed_tokens if self.lm_head is None else self.lm_head).weight

    def forward(self, batch: Batch, temperature: float = 1.0) -> Output:
        """Log-probs and entropies of the batch's targets, and the 3D head at its regions (DESIGN:
        all inside one forward).
        """
        hidden = self.hidden(batch)
        logprob, entropy = linear_logprob(
            # All completions of a prompt begin at its last token.
            gather_rows(hidden, batch.predict_from),
            self.head_weight,
            batch.targets,
            temperature,
        )
        centres, sizes = self.head3d(hidden[batch.region_token])  # no token twice
        return Output(hidden, logprob, entropy, centres, sizes)

    def hidden(self, batch: Batch, pixel_values: Tensor | None = None) -> Tensor:
        """(T, H) final hidden states of a packed batch; pixel_values for one without patches."""
        packing = Packing(batch.segments, self.device)
        return self._run(
            batch, lambda layer, q, k, v: prefix_attention(q, k, v, packing), pixel_values
        )

    @torch.no_grad()
    def prefill(self, batch: Batch) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Hidden states (T, H) of a prompt-only batch, and per layer the rotated keys and values,
        (T, K, D) each.
        """
        cache, packing = [], Packing(batch.segments, self.device)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            cache.append((k, v))
            return prefix_attention(q, k, v, packing)

        return self._run(batch, attend), cache

    @torch.no_grad()
    def decode(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Hidden states (N, H) of one new text token per sequence: tokens, positions (N,) int64."""
        return self.decoder(self.decoder.embed_tokens(tokens), positions.expand(3, -1), attend)

    def _run(self, batch: Batch, attend: Attend, pixels: Tensor | None = None) -> Tensor:
        # The embedding's gradient sums in fp32, but for at most 3,072 tokens: then, on CUDA, 32 at
        # a time, rounded in between. Placeholders, the one token that comes by the thousand, hand
        # on none.
        x, deepstack = self.decoder.embed_tokens(batch.input_ids), []
        pixels = batch.pixels(self.dtype) if pixels is None else pixels
        if pixels is None and len(batch.image_at):
            raise ValueError(f"{len(batch.image_at)} image placeholders, but no pixel_values")
        if pixels is not None:
            features, deepstack = self.vision(pixels, batch.image_grid_thw)  # (P, C)
            if batch.points is not None:
                features = features + self.points(batch.points)
            # Each distinct image is merged once, and read by every prompt that shows it.
            # (placeholders, H)
            merged = gather_rows(self.vision.merger(features), batch.image_rows)
            x = x.index_copy(0, batch.image_at, merged.to(x.dtype))
            deepstack = [gather_rows(early, batch.image_rows) for early in deepstack]
            if len(batch.region_token):
                tokens = self.region(
                    features,
                    batch.region_id,
                    batch.region_patch,
                    batch.region_weight,
                    len(batch.region_token),
                )
                x = x.index_copy(0, batch.region_token, tokens.to(x.dtype))
        return self.decoder(x, batch.position_ids, attend, batch.image_at, tuple(deepstack))

    @torch.no_grad()
    def logits(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
    ) -> Tensor:
        """(B, T, V) logits from what transformers' model takes: for parity tests, and for people
        who just want logits.

        input_ids (B, T), padded on either side where attention_mask is 0; there the logits are 0.
        """
        keep = (
            torch.ones_like(input_ids, dtype=torch.bool)
            if attention_mask is None
            else attention_mask.bool()
        )
        packed, grids = (
            input_ids[keep],
            iter([] if image_grid_thw is None else image_grid_thw.tolist()),
        )
        ends = keep.sum(1).cumsum(0).tolist()
        segments = [(start, end, 0, 0) for start, end in zip([0] + ends, ends, strict=False)]
        is_image = packed == self.config.image_token_id
        positions = [
            positions_of(is_image[start:end].tolist(), grids, self.vision.merge)
            for start, end, *_ in segments
        ]
        none = packed.new_zeros(0)
        batch = Batch(
            packed,
            torch.cat(positions, 1).to(packed.device),
            segments,
            patches=None,
            levels=None,
            frames=0,
            image_grid_thw=image_grid_thw,
            image_at=is_image.nonzero()[:, 0],
            image_rows=torch.arange(int(is_image.sum()), device=packed.device),
            points=None,
            region_token=none,
            region_id=none,
            region_patch=none,
            region_weight=none,
            centres=none,
            sizes=none,
            predict_from=none,
            targets=none,
            cu_targets=none,
            last=none,
            next_position=none,
        )
        out = torch.zeros(
            *input_ids.shape, self.decoder.sizes.vocab, dtype=self.dtype, device=packed.device
        )
        out[keep] = F.linear(self.hidden(batch, pixel_values), self.head_weight)
        return out


def positions_of(is_image: list[bool], grids: Iterator[list[int]], merge: int) -> Tensor:
    """(3, T) mRoPE positions of a sequence whose placeholders are expanded already."""
    slots, merged, t, extra = [], [], 0, 0
    while any(is_image[t:]):
        t = is_image.index(True, t)
        _, rows, cols = next(grids)
        slots.append(t - extra)
        merged.append((rows // merge, cols // merge))
        t, extra = t + rows * cols // merge**2, extra + rows * cols // merge**2 - 1
    return torch.from_numpy(rope_positions(len(is_image) - extra, slots, merged)[0])
