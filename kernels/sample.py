"""Sampling: temperature, banned ids, top-p, Gumbel-max with counter noise, the log-prob of the
choice.

    token = argmax over allowed v of  z_v - log E_v    z = logits / temperature, E = -log(1 - u)
    logprob = z_token - logsumexp over ALL v of z      the trainer's definition: neither ban nor top-p enters
    temperature 0: token = argmax over allowed logits, log-prob at temperature 1

u is a hash of (key, position, token id) only: a sequence's noise does not depend on slot, batch or
rank. It mixes 32-bit integers: Philox in torch costs seconds a batch at V = 151,936 on a CPU, this
some 1-3 ms a row. u = (31 bits + 0.5) * UNIT: near 0, where the winners are, it keeps full
precision, so that a token of probability 1e-9 is still drawn as often as it should be; it never
reaches 1, where E would be infinite. top_p keeps the smallest set of tokens, by falling probability
(ties: lower id first), with at least top_p of the allowed tokens' mass; it needs a sort, which is
left to torch, also on a GPU.

Why fuse: eager PyTorch reads or writes B x V about thirty times, this reads it once (256 x 151,936
in fp32: 156 MB) and keeps a max, a sum and a best token for each part of a row. Counted in sm_90's
assembly, not timed: 36 instructions an element (fp32, banned ids; Triton 3.9; 38 with 3.6), where
an H100 has time for 40 while it copies. What it reaches on a GPU is not measured yet (`python -m
bench.kernels --only sample`).

Shapes: B sequences, V vocabulary.
"""

import functools
import hashlib
import math
import os

import torch
import triton
import triton.language as tl

MIX32 = 0x21F0AAAD, 0xD35A2D97  # multipliers of a 32-bit mixer with low bias
MIX64 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
GOLDEN = 0x9E3779B9
# the float below 2^-31: fp32 rounds the largest 31-bit integers up to 2^31
UNIT = 2.0**-31 - 2.0**-55
# tokens of a part, a warp's 64 a lane: not by B, as the sums' order, so log-probs, would change
BLOCK = 2048
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"


def sequence_key(seed: int, example_id: str, path: str, sample_index: int) -> int:
    """The stable 64-bit key of one sampled completion: never of its place in a list, slot or
    rank."""
    text = f"{seed}\0{example_id}\0{path}\0{sample_index}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little", signed=True)


def _signed(c, bits):
    return c - (1 << bits) if c >> (bits - 1) else c


A32, B32, GOLDEN_, UNIT_, LOG2E_, INTERPRET_ = (
    tl.constexpr(c) for c in (*MIX32, GOLDEN, UNIT, math.log2(math.e), INTERPRET)
)
A64, B64, C64 = (tl.constexpr(_signed(c, 64)) for c in MIX64)


def _xorshift_(x, k, scratch):
    """x ^= x >>> k on int32, in place: torch's shift is arithmetic, the mask makes it logical."""
    torch.bitwise_right_shift(x, k, out=scratch)
    return x.bitwise_xor_(scratch.bitwise_and_((1 << (32 - k)) - 1))


def _row_words(keys, positions):
    """(key, position) -> two 32-bit words, as int32 [B, 1]. Integers wrap; the shifts are
    arithmetic."""
    x = (keys ^ (positions.long() * _signed(MIX64[0], 64))) * _signed(MIX64[1], 64)
    x = (x ^ (x >> 32)) * _signed(MIX64[2], 64)
    x = (x ^ (x >> 29))[:, None]
    return x.to(torch.int32), (x >> 32).to(torch.int32)


@functools.lru_cache(maxsize=4)
def _token_words(vocab, device):
    return torch.arange(vocab, dtype=torch.int32, device=device) * _signed(GOLDEN, 32)


def race_times(keys: torch.Tensor, positions: torch.Tensor, vocab: int) -> torch.Tensor:
    """E[B, V], exponentials of (key, position, token id) only: argmax z - log E is a draw from
    softmax(z)."""
    first, second = _row_words(keys, positions)
    x = _token_words(vocab, keys.device) + first
    scratch = torch.empty_like(x)
    _xorshift_(x, 16, scratch).mul_(MIX32[0]).bitwise_xor_(second)
    _xorshift_(x, 15, scratch).mul_(_signed(MIX32[1], 32))
    _xorshift_(x, 15, scratch).bitwise_and_(0x7FFFFFFF)
    return x.to(torch.float32).add_(0.5).mul_(-UNIT).log1p_().neg_()


def _nucleus(z, top_p):
    """z with every token outside of the nucleus at -inf."""
    ordered = z.sort(dim=-1, descending=True, stable=True)
    p = ordered.values.softmax(-1)
    drop = p.cumsum(-1) - p >= top_p
    return z.masked_fill(torch.zeros_like(drop).scatter(-1, ordered.indices, drop), -torch.inf)


def reference_sample(logits, keys, positions, temperature=1.0, top_p=1.0, banned=None):
    """The specification."""
    z = logits.float() / (temperature or 1.0)
    peak = z.amax(-1, keepdim=True)
    logsumexp = peak[:, 0] + (z - peak).exp_().sum(-1).log_()
    allowed = z if banned is None else torch.where(banned, -torch.inf, z)
    allowed = allowed if top_p == 1 else _nucleus(allowed, top_p)
    if temperature > 0:
        # p / E may underflow, this can't
        allowed = allowed - race_times(keys, positions, z.shape[1]).log_()
    token = allowed.argmax(-1)
    return token, (z.gather(1, token[:, None])[:, 0] - logsumexp).clamp_(max=0)


@triton.jit
def _log2(x):
    """One instruction, off by 2^-22 at most for x in (1/2, 2), relatively elsewhere; tl.log2 is
    twenty."""
    return (
        tl.log2(x)
        if INTERPRET_
        else tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    )


@triton.jit
def _race_times(first, second, token):
    """race_times / ln 2, of the same bits; log(1 - u) by its series near 0, where 1 - u loses its
    digits."""
    x = token.to(tl.uint32) * GOLDEN_ + first
    x = (x ^ (x >> 16)) * A32
    x = (x ^ (x >> 15) ^ (second ^ (second >> 15))) * B32  # the same for a row, so shifted once
    u = tl.fma(((x ^ (x >> 15)) & 0x7FFFFFFF).to(tl.float32), UNIT_, UNIT_ / 2)
    near = u * tl.fma(u, tl.fma(u, tl.fma(u, LOG2E_ / 4, LOG2E_ / 3), LOG2E_ / 2), LOG2E_)
    return tl.where(u < 0.015625, near, -_log2(1 - u))


@triton.jit
def _part_kernel(
    logits,
    keys,
    positions,
    banned,
    floats,
    ids,
    vocab,
    stride,
    inv_temperature,
    GREEDY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program a part of a row: max, sum of exponentials, and the best token of the race, in base
    2."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    x = (tl.load(keys + row) ^ (tl.load(positions + row).to(tl.int64) * A64)) * B64
    x = (x ^ (x >> 32)) * C64
    x = x ^ (x >> 29)
    i, scale = part * BLOCK + tl.arange(0, BLOCK), inv_temperature * LOG2E_
    z = tl.load(logits + row * stride + i, mask=i < vocab, other=-float("inf")).to(tl.float32)
    peak = tl.maximum(tl.max(z, 0), -1e38)
    total = tl.sum(tl.exp2((z - peak) * scale), 0)
    first, second = x.to(tl.uint32), (x >> 32).to(tl.uint32)
    score = z if GREEDY else tl.fma(z, scale, -_log2(_race_times(first, second, i)))
    if banned is not None:
        score = tl.where(tl.load(banned + i, mask=i < vocab) != 0, -float("inf"), score)
    best, token = tl.max(
        score, 0, return_indices=True, return_indices_tie_break_left=GREEDY or INTERPRET_
    )
    out = row * tl.num_programs(1) + part
    tl.store(floats + 3 * out, peak)
    tl.store(floats + 3 * out + 1, total)
    tl.store(floats + 3 * out + 2, best)
    tl.store(ids + out, part * BLOCK + token)


@triton.jit
def _row_kernel(
    logits, floats, ids, tokens, logprobs, parts, stride, inv_temperature, PARTS: tl.constexpr
):
    """A program a row: its parts to the token and its log-prob."""
    row, part = tl.program_id(0).to(tl.int64), tl.arange(0, PARTS)
    at, mask = row * parts + part, part < parts
    peak = tl.load(floats + 3 * at, mask=mask, other=-1e38)
    higher = tl.max(peak, 0)
    sums = tl.load(floats + 3 * at + 1, mask=mask, other=0.0)
    total = tl.sum(sums * tl.exp2((peak - higher) * (inv_temperature * LOG2E_)), 0)
    where = tl.argmax(tl.load(floats + 3 * at + 2, mask=mask, other=-float("inf")), 0)
    token = tl.load(ids + row * parts + where)
    z = tl.load(logits + row * stride + token).to(tl.float32)
    tl.store(tokens + row, token.to(tl.int64))
    tl.store(logprobs + row, tl.minimum((z - higher) * inv_temperature - tl.log(total), 0.0))


def _sample_triton(logits, keys, positions, temperature, banned):
    (b, v), block = logits.shape, 512 if INTERPRET else BLOCK
    parts, scale = triton.cdiv(v, block), 1 / (temperature or 1.0)
    floats, logprobs = (
        logits.new_empty(shape, dtype=torch.float32) for shape in ((b, parts, 3), (b,))
    )
    ids, tokens = keys.new_empty(b, parts, dtype=torch.int32), torch.empty_like(keys)
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    _part_kernel[(b, parts)](
        logits,
        keys,
        positions,
        banned,
        floats,
        ids,
        v,
        logits.stride(0),
        scale,
        GREEDY=temperature == 0,
        BLOCK=block,
        num_warps=1,
    )
    _row_kernel[(b,)](
        logits,
        floats,
        ids,
        tokens,
        logprobs,
        parts,
        logits.stride(0),
        scale,
        PARTS=triton.next_power_of_2(parts),
        num_warps=1,
    )
    return tokens, logprobs


def sample(
    logits: torch.Tensor,
    keys: torch.Tensor,
    positions: torch.Tensor,
    temperature: float = 1.0,
    top_p: float = 1.0,
    banned: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens[B] int64, logprobs[B] fp32) of logits[B, V]. keys[B]: int64, of `sequence_key`;
    positions[B]: the places in the completions; banned[V]: bool, ids that are never sampled (not
    all of them)."""
    b, v = logits.shape
    if (
        keys.shape != (b,)
        or positions.shape != (b,)
        or (banned is not None and banned.shape != (v,))
    ):
        raise ValueError(
            f"logits {list(logits.shape)} need keys and positions [{b}] and banned [{v}]"
        )
    if temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(
            f"temperature must be >= 0 and top_p in (0, 1]: got {temperature} and {top_p}"
        )
    if (logits.is_cuda or INTERPRET) and top_p == 1 and b:
        return _sample_triton(
            logits, keys.contiguous(), positions.contiguous(), temperature, banned
        )
    # CPU: 1 MB a chunk, the hash stays in the cache
    rows = max(b if logits.is_cuda else (1 << 18) // v, 1)
    parts = [
        reference_sample(
            logits[i : i + rows],
            keys[i : i + rows],
            positions[i : i + rows],
            temperature,
            top_p,
            banned,
        )
        for i in range(0, max(b, 1), rows)
    ]
    return torch.cat([token for token, _ in parts]), torch.cat([logprob for _, logprob in parts])
