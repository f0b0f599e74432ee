"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL and Qwen3.5 (dense) in one file: a packed batch in, hidden states
and log-probs out.

The decoder is the one that everybody knows: RMSNorm, grouped-query attention with rotary positions,
SwiGLU, residuals. What is Qwen-VL's own:

    mRoPE      a token has three positions (time, row, column), equal for text; each rotary
               frequency listens to one of them: in blocks (Qwen2, 2.5) or interleaved (Qwen3)
    biases     on q, k, v (Qwen2, 2.5), or an RMSNorm on every query and key head instead (Qwen3 on)
    deepstack  Qwen3-VL adds features of early vision blocks to the image tokens after the first
               layers
    delta nets Qwen3.5: three layers in four have a state of fixed size instead of keys and values
               (delta.py); in the others attention's output is gated, head by head, and only a
               quarter of a head's channels rotate

Which family has what is data in families.py.

What is ours: `<mask>` tokens become region tokens (region.py), depth enters and 3D centres leave
(head3d.py), and how tokens learn of each other is handed in, as a `Mixer`: the same layers train
on packed segments with shared prefixes, and prefill the cache that decoding reads. Logits never
exist in training: log-probs and entropies come from `linear_logprob`. Parameter names are those of
the published checkpoints, below our own prefixes.

T packed tokens, L target tokens, R regions, P patches, M image tokens; H hidden width, A query
heads, K key-value heads, D head width, C channels of a head that rotate, V vocabulary rows.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from kernels.layers import add_rms_norm, qk_norm_rope
from kernels.linear_logprob import linear_logprob
from kernels.packed_attention import Packing, gather_rows, prefix_attention, upload
from model import checkpoint
from model.batch import Batch, expanded_positions
from model.delta import IN_FP32, GatedDeltaNet, Walk
from model.families import DecoderSizes
from model.files import check_patches, read_config, resolve, rows_for_regions
from model.head3d import Head3D, PointEmbedding
from model.region import RegionToken
from model.vision import RMSNorm, SwiGLU, VisionTower

# ---- The decoder


class Mixer(Protocol):
    """How tokens learn of each other: a pass over packed segments, and a decode step, have theirs.

    Attention hands over queries (T, A, D), keys and values (T, K, D) of a layer and gets (T, A, D);
    a gated delta net hands over itself and its input x (T, H), and gets (T, H).
    """

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...

    def recur(self, net: GatedDeltaNet, x: Tensor) -> Tensor: ...


@dataclass
class PackedMixer:
    """Tokens see their own segment and its prefix; a cache is given what each layer leaves."""

    packing: Packing
    walk: Walk | None  # of the delta layers, where there are any
    cache: list | None = None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.cache is not None:
            self.cache.append((k, v))
        return prefix_attention(q, k, v, self.packing)

    def recur(self, net: GatedDeltaNet, x: Tensor) -> Tensor:
        return net(x, self.walk, self.cache)


class Attention(nn.Module):
    """Project, norm (Qwen3), rotate, attend, gate (Qwen3.5), project."""

    def __init__(self, s: DecoderSizes, layer: int):
        super().__init__()
        self.layer = layer
        self.head_dim = s.head_dim
        self.gated = s.family.attention_gate
        query_width = s.heads * s.head_dim
        kv_width = s.kv_heads * s.head_dim
        bias = s.family.qkv_bias
        # A gate's rows stand behind those of its query, head by head.
        q_width = 2 * query_width if self.gated else query_width
        self.q_proj = nn.Linear(s.hidden, q_width, bias=bias)
        self.k_proj = nn.Linear(s.hidden, kv_width, bias=bias)
        self.v_proj = nn.Linear(s.hidden, kv_width, bias=bias)
        self.o_proj = nn.Linear(query_width, s.hidden, bias=False)
        self.q_norm = None
        self.k_norm = None
        if s.family.qk_norm:
            self.q_norm = RMSNorm(s.head_dim, s.eps, s.family.norm_offset)
            self.k_norm = RMSNorm(s.head_dim, s.eps, s.family.norm_offset)

    @property
    def qk_norm(self) -> tuple:
        """The last arguments of `qk_norm_rope`: both weights, eps, offset; () without norms."""
        if self.q_norm is None:
            return ()
        return self.q_norm.weight, self.k_norm.weight, self.q_norm.eps, self.q_norm.offset

    def split_gate(self, q: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return queries (T, A, D), and their gates or None, of what q_proj made."""
        if not self.gated:
            return q.unflatten(-1, (-1, self.head_dim)), None
        q, gate = q.unflatten(-1, (-1, 2, self.head_dim)).unbind(-2)
        return q, gate

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mixer: Mixer) -> Tensor:
        q, gate = self.split_gate(self.q_proj(x))  # (T, A, D)
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim))  # (T, K, D)
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        q, k = qk_norm_rope(q, k, cos, sin, *self.qk_norm)
        out = mixer.attend(self.layer, q, k, v)  # (T, A, D)
        if gate is not None:
            out = out * gate.sigmoid()
        return self.o_proj(out.flatten(-2))


class Layer(nn.Module):
    """x + mix(norm(x)), then x + mlp(norm(x)). It mixes by attention, or by a gated delta net."""

    def __init__(self, s: DecoderSizes, layer: int):
        super().__init__()
        self.attends = s.attends[layer]
        # The checkpoints' names.
        if self.attends:
            self.self_attn = Attention(s, layer)
        else:
            self.linear_attn = GatedDeltaNet(s, layer)
        self.mlp = SwiGLU(s.hidden, s.inner)
        self.input_layernorm = RMSNorm(s.hidden, s.eps, s.family.norm_offset)
        self.post_attention_layernorm = RMSNorm(s.hidden, s.eps, s.family.norm_offset)

    @property
    def token_mixer(self) -> nn.Module:
        return self.self_attn if self.attends else self.linear_attn

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mixer: Mixer) -> Tensor:
        normed = self.input_layernorm(x)
        if self.attends:
            mixed = self.self_attn(normed, cos, sin, mixer)
        else:
            mixed = mixer.recur(self.linear_attn, normed)
        # The sum and its norm in one pass over memory.
        norm = self.post_attention_layernorm
        x, normed = add_rms_norm(x, mixed, norm.weight, norm.eps, norm.offset)
        return x + self.mlp(normed)


class Decoder(nn.Module):
    """Embedding, layers, final norm."""

    def __init__(self, s: DecoderSizes):
        super().__init__()
        self.sizes = s
        self.embed_tokens = nn.Embedding(s.vocab, s.hidden)
        self.layers = nn.ModuleList([Layer(s, i) for i in range(s.layers)])
        self.norm = RMSNorm(s.hidden, s.eps, s.family.norm_offset)

    def forward(
        self,
        x: Tensor,
        position_ids: Tensor,
        mixer: Mixer,
        image_at: Tensor | None = None,
        deepstack: tuple[Tensor, ...] = (),
    ) -> Tensor:
        """Run embeddings x (T, H) at positions (3, T) through all layers: (T, H).

        deepstack[i] (M, H) is added at the image tokens image_at (M,) after layer i.
        """
        cos, sin = self.angles(position_ids, x.dtype)
        for i, layer in enumerate(self.layers):
            x = layer(x, cos, sin, mixer)
            if i < len(deepstack):
                # One term a token, and its gradient is one: nothing is summed in 16 bits.
                x = x.index_add(0, image_at, deepstack[i].to(x.dtype))
        return self.norm(x)

    def angles(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return cos and sin (T, C) of mRoPE, computed in fp32, for the C channels that rotate.

        Frequency j turns by the position on the axis that it listens to.
        """
        s = self.sizes
        device = position_ids.device
        axes = upload(rope_axes(s.sections, s.family.mrope_interleaved), device)  # (C / 2,)
        # In fp32: bf16 knows a position of 10,000 to within 64 only.
        angles = position_ids[axes].T.float() * rope_frequencies(s, device)  # (T, C / 2)
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(dtype), angles.sin().to(dtype)


def rope_frequencies(sizes, device: torch.device) -> Tensor:
    """Return 1 / theta^(2 j / C) for frequency j, radians a position in fp32: (C / 2,)."""
    even = torch.arange(0, sizes.rotary, 2, device=device, dtype=torch.float)
    return 1.0 / sizes.theta ** (even / sizes.rotary)


def rope_axes(sections: tuple[int, int, int], interleaved: bool) -> Tensor:
    """Return the axis (0 time, 1 row, 2 column) that every rotary frequency listens to: (C / 2,).

    sections: how many listen to each, in blocks or interleaved: T H W T H W ... and the rest T.
    """
    if not interleaved:
        return torch.repeat_interleave(torch.arange(3), torch.tensor(sections))
    _, rows, columns = sections
    axes = torch.zeros(sum(sections), dtype=torch.long)
    axes[1 : 3 * rows : 3] = 1
    axes[2 : 3 * columns : 3] = 2
    return axes


# ---- Linear layers in one tensor


def fuse_linears(*layers: nn.Linear) -> None:
    """Move the weights, and biases, of linear layers into one tensor, of which each has its rows.

    To be done before an optimiser is made: in fp32 its masters are the parameters' own memory.
    Layers with adapters stay as they are.
    """
    if any(type(layer) is not nn.Linear for layer in layers) or fused_linears(*layers):
        return
    join_parameters([layer.weight for layer in layers])
    if layers[0].bias is not None:
        join_parameters([layer.bias for layer in layers])


def input_projections(layer: Layer) -> tuple[nn.Module, ...]:
    """Return the linear layers that a decoder layer multiplies its normed input with first."""
    if layer.attends:
        mixer = layer.self_attn
        return mixer.q_proj, mixer.k_proj, mixer.v_proj
    mixer = layer.linear_attn
    return mixer.in_proj_qkv, mixer.in_proj_z, mixer.in_proj_b, mixer.in_proj_a


def join_parameters(parameters: list[nn.Parameter]) -> None:
    """Let parameters be the rows of one new tensor, one behind the other."""
    joint = torch.cat([p.data for p in parameters])
    rows = joint.split([len(p) for p in parameters])
    for p, own_rows in zip(parameters, rows, strict=True):
        p.data = own_rows


def fused_linears(*layers: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """Return (weight, bias) of all layers as one; None where they lie apart.

    One matrix product then serves them all. What was moved or copied since has to be fused again.
    """
    if any(type(layer) is not nn.Linear for layer in layers):
        return None
    weight = joint_view([layer.weight for layer in layers])
    if weight is None:
        return None
    if layers[0].bias is None:
        return weight, None
    bias = joint_view([layer.bias for layer in layers])
    return None if bias is None else (weight, bias)


def joint_view(parameters: list[nn.Parameter]) -> Tensor | None:
    """Return one tensor over parameters that lie one behind the other; None where they don't."""
    # Adjacent addresses alone don't do: two tensors of their own may happen to lie so.
    first = parameters[0].detach()
    storage = first.untyped_storage().data_ptr()
    end = first.data_ptr()
    for p in parameters:
        follows = p.untyped_storage().data_ptr() == storage and p.data_ptr() == end
        if not (follows and p.is_contiguous()):
            return None
        end += p.nbytes
    rows = sum(len(p) for p in parameters)
    return first.as_strided((rows, *first.shape[1:]), first.stride())


# ---- The whole model


@dataclass
class Output:
    """What one forward gives."""

    hidden: Tensor  # (T, H)
    logprob: Tensor  # (L,) fp32, of batch.targets
    entropy: Tensor  # (L,) fp32, of the distribution that each target was drawn from
    centres: Tensor  # (R, 3) metres
    sizes: Tensor  # (R, 3) metres


class QwenVL(nn.Module):
    """The whole model.

    `config` is transformers' config object; weights come from `from_pretrained`.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.origin: checkpoint.Origin | None = None
        sizes = DecoderSizes.of(config)
        self.vision = VisionTower(config)
        self.decoder = Decoder(sizes)
        # A tied head is the embedding itself: no second parameter, and its gradient adds up by
        # autograd.
        self.lm_head = None
        if not sizes.tied:
            self.lm_head = nn.Linear(sizes.hidden, sizes.vocab, bias=False)
        width = self.vision.sizes.width
        self.region = RegionToken(width, sizes.hidden)
        self.points = PointEmbedding(width)
        self.head3d = Head3D(sizes.hidden)

    # -- From disk and to it

    @classmethod
    def from_pretrained(
        cls,
        source: str,
        device=None,
        dtype: torch.dtype | None = None,
        fuse: bool = True,
        regions: str = "token",
    ) -> "QwenVL":
        """Load a directory or hub id of a checkpoint of one of families.py's FAMILIES.

        dtype None: the decoder's on disk, for the whole model. The extra weights
        (spatial.safetensors) are cast to it, too: they come back to the bit where they were saved
        in that dtype. fuse: put weights that the sampler multiplies one input with side by side;
        without it, a model on a CPU in the dtype on disk takes no memory of its own: its weights
        are the file's pages. regions: "token" needs a row of the embedding for <mask>, which grows
        where it was cut to its vocabulary. Raises CheckpointError (one line) for what can't be
        loaded.
        """
        device = device or "cpu"
        # Everything is checked before anything is moved to a device.
        model, weights = cls._read(resolve(str(source)), regions)

        # One after the other, so that no second copy of all is in memory.
        dtype = dtype or model.origin.dtypes["decoder.norm.weight"]
        for name in list(weights):
            wide = name.endswith(IN_FP32) and dtype.itemsize < 4
            weights[name] = weights[name].to(device, torch.float32 if wide else dtype)
        model.load_state_dict(weights, strict=False, assign=True)
        if not any(name.startswith(checkpoint.SPATIAL) for name in weights):
            model._init_spatial(device, dtype)
        # So that memory is freed as soon as layers are fused.
        del weights
        if fuse:
            model.fuse_linears()
        return model.eval()

    @classmethod
    def _read(cls, directory: Path, regions: str) -> tuple["QwenVL", dict[str, Tensor]]:
        """Return a model whose parameters have shapes only, and the weights for them, by name."""
        config = read_config(directory)
        check_patches(directory, config)
        weights, origin = checkpoint.read_weights(directory)
        tied = checkpoint.tie_head(weights, origin, config.tie_word_embeddings)
        config.tie_word_embeddings = tied
        spatial = checkpoint.read_spatial(directory)
        weights |= spatial
        with torch.device("meta"):
            model = cls(config)
        shapes = {name: p.shape for name, p in model.named_parameters()}
        checkpoint.check_weights(directory, weights, shapes, spatial=bool(spatial))

        # A vocabulary that was cut has no row for <mask>.
        text_config = config.get_text_config()
        rows = rows_for_regions(directory, text_config.vocab_size, regions)
        if rows > text_config.vocab_size:
            checkpoint.grow_vocabulary(weights, rows)
            text_config.vocab_size = rows
            with torch.device("meta"):
                model = cls(config)
        model.origin = origin
        return model, weights

    def _init_spatial(self, device, dtype: torch.dtype) -> None:
        """Start the extra weights, such that a pretrained model's logits don't change."""
        for part in (self.region, self.points, self.head3d):
            part.to_empty(device=device).to(dtype)
        self.region.init_like(self.decoder.embed_tokens.weight)
        self.points.init_silent()
        self.head3d.init()

    def save_pretrained(self, directory: str, processor=None) -> None:
        """Atomically write a checkpoint that transformers loads unchanged.

        spatial.safetensors beside it holds the extra weights. processor: its settings are saved,
        too; None: the files are the source's.
        """
        weights = {name: p.detach() for name, p in self.named_parameters()}
        checkpoint.save(directory, weights, self.origin, processor)

    @property
    def record(self) -> checkpoint.SpatialRecord:
        """How it was trained to read regions, and which of the extra parts have learnt."""
        return self.origin.record

    # -- How it computes

    def fuse_linears(self) -> None:
        """Put weights that the sampler multiplies one input with side by side."""
        for layer in self.decoder.layers:
            fuse_linears(*input_projections(layer))
            fuse_linears(layer.mlp.gate_proj, layer.mlp.up_proj)
        if self.device.type == "cuda":
            # The room that they had apart is free for others.
            torch.cuda.empty_cache()

    def checkpoint_blocks(self) -> None:
        """Let each block keep only its input for the backward, which computes the rest again.

        A quarter to a third more arithmetic, the same numbers. Without gradients nothing changes.
        """
        for block in (*self.vision.blocks, *self.decoder.layers):
            # Inside of FSDP's hooks, which are the module's: what is computed again finds whole
            # weights.
            block.forward = partial(
                recompute, block.forward, use_reentrant=False, preserve_rng_state=False
            )

    @property
    def device(self) -> torch.device:
        return self.decoder.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder.norm.weight.dtype

    @property
    def head_weight(self) -> Tensor:
        """The weight of the head (V, H), tied or not."""
        head = self.decoder.embed_tokens if self.lm_head is None else self.lm_head
        return head.weight

    # -- Forward passes

    def forward(self, batch: Batch, temperature: float = 1.0) -> Output:
        """Return log-probs and entropies of the batch's targets, and the 3D head at its regions.

        All inside one forward, so that FSDP gathers the weights once.
        """
        hidden = self.hidden(batch)
        # A row may be read often: all completions of a prompt begin at its last token.
        predicting = gather_rows(hidden, batch.predict_from)
        logprob, entropy = linear_logprob(predicting, self.head_weight, batch.targets, temperature)
        centres, sizes = self.head3d(hidden[batch.region_token])  # no token twice
        return Output(hidden, logprob, entropy, centres, sizes)

    @torch.no_grad()
    def prefill(self, batch: Batch) -> tuple[Tensor, list]:
        """Return the hidden states (T, H) of a batch of prompts, and its cache.

        The cache is a pair a layer: the rotated keys and the values, (T, K, D) each; of a delta
        layer the states that the segments end in, and the last rows before its convolution.
        """
        cache = []
        return self.hidden(batch, cache=cache), cache

    def hidden(
        self, batch: Batch, pixel_values: Tensor | None = None, cache: list | None = None
    ) -> Tensor:
        """Return the final hidden states (T, H) of a packed batch.

        pixel_values for a batch without patches; a cache is given each layer's keys and values.
        """
        delta = self.decoder.sizes.delta
        walk = Walk(batch.segments, delta.taps, self.device) if delta else None
        mixer = PackedMixer(Packing(batch.segments, self.device), walk, cache)
        x, deepstack = self.embed(batch, pixel_values)
        return self.decoder(x, batch.position_ids, mixer, batch.image_at, deepstack)

    def embed(
        self, batch: Batch, pixel_values: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return what the decoder reads of a packed batch: its embeddings (T, H), and deepstack.

        Image and region tokens are in their places. deepstack[i] (M, H) is what the decoder adds at
        the image tokens after layer i; () without images and in families that have none.
        """
        # On CUDA the embedding's backward sums in fp32 above 3,072 tokens only; below, it rounds
        # after every 32. No harm: the one token that comes by the thousand, the image placeholder,
        # hands on no gradient.
        x = self.decoder.embed_tokens(batch.input_ids)
        if pixel_values is None:
            pixel_values = batch.pixels(self.dtype)
        if pixel_values is None:
            if len(batch.image_at):
                raise ValueError(f"{len(batch.image_at)} image placeholders, but no pixel_values")
            return x, ()

        # Images: the tower's patch features, with the point map's embedding added where there is
        # depth, so that regions and image tokens know where they are.
        features, deepstack = self.vision(pixel_values, batch.image_grid_thw)  # (P, C)
        if batch.points is not None:
            features = features + self.points(batch.points)
        # Each distinct image is merged once, and read by every prompt that shows it.
        image_tokens = gather_rows(self.vision.merger(features), batch.image_rows)  # (M, H)
        x = x.index_copy(0, batch.image_at, image_tokens.to(x.dtype))
        deepstack = tuple(gather_rows(early, batch.image_rows) for early in deepstack)

        # Regions: each <mask> becomes what its patches say.
        if len(batch.region_token):
            region_tokens = self.region(
                features,
                batch.region_id,
                batch.region_patch,
                batch.region_weight,
                len(batch.region_token),
            )  # (R, H)
            x = x.index_copy(0, batch.region_token, region_tokens.to(x.dtype))
        return x, deepstack

    @torch.no_grad()
    def logits(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
    ) -> Tensor:
        """Return logits (B, T, V) from what transformers' model takes.

        For parity tests, and for people who just want logits. input_ids (B, T), padded on either
        side where attention_mask is 0; there the logits are 0.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        keep = attention_mask.bool()
        tokens = input_ids[keep]  # packed
        is_image = tokens == self.config.image_token_id
        grids = iter([] if image_grid_thw is None else image_grid_thw.tolist())
        # The rows' tokens, packed one row behind the other.
        segments = []
        positions = []
        start = 0
        for length in keep.sum(1).tolist():
            end = start + length
            segments.append((start, end, 0, 0))
            row = is_image[start:end].tolist()
            positions.append(expanded_positions(row, grids, self.vision.sizes.merge))
            start = end
        batch = Batch(
            input_ids=tokens,
            position_ids=torch.cat(positions, 1).to(tokens.device),
            segments=segments,
            image_grid_thw=image_grid_thw,
            image_at=is_image.nonzero()[:, 0],
            image_rows=torch.arange(int(is_image.sum()), device=tokens.device),
        )
        hidden = self.hidden(batch, pixel_values)
        vocab = self.decoder.sizes.vocab
        logits = torch.zeros(*keep.shape, vocab, dtype=self.dtype, device=tokens.device)
        logits[keep] = F.linear(hidden, self.head_weight)
        return logits
