"""Sampling: temperature, banned ids, top-p, Gumbel-max with counter noise, the choice's log-prob.

    z = logits / temperature, E = -log(1 - u)
    token = argmax over allowed v of z_v - log E_v
    logprob = z_token - logsumexp over ALL v of z: the trainer's; neither ban nor top-p enters
    temperature 0: token = argmax over allowed logits, log-prob at temperature 1

-log E of an exponential E is Gumbel noise, so the argmax is a draw from the softmax. u is a hash of
(key, position, token id) only: a sequence's noise does not depend on slot, batch or rank. It mixes
32-bit integers: Philox in torch costs seconds a batch at V = 151,936 on a CPU, this some 1-3 ms a
row. u = (31 bits + 0.5) * UNIT: near 0, where the winners are, it keeps full precision, so that a
token of probability 1e-9 is still drawn as often as it should be; it never reaches 1, where E would
be infinite. top_p keeps the smallest set of tokens, by falling probability (ties: lower id first),
with at least top_p of the allowed tokens' mass; it needs a sort, which is left to torch, also on a
GPU.

Why fuse: eager PyTorch reads or writes B x V about thirty times, this reads it once (256 x 151,936
in fp32: 156 MB) and keeps a max, a sum and a best token for each part of a row. Counted in sm_90's
assembly, not timed: 36 instructions an element (fp32, banned ids; Triton 3.9; 38 with 3.6), where
an H100 has time for 40 while it copies. What it reaches on a GPU is not measured yet (`python -m
bench.kernels --only sample`).

Shapes: B sequences, V vocabulary.
"""

import hashlib
import math

import torch
from torch import Tensor

from kernels import interpreted, on_triton, tl, triton


def _signed(constant: int, bits: int) -> int:
    """Return an unsigned constant as the signed integer of the same bits: torch has no others."""
    return constant - (1 << bits) if constant >> (bits - 1) else constant


# Multipliers of a 32-bit mixer with low bias (github.com/skeeto/hash-prospector), and of two steps
# of a 64-bit one (splitmix64, whose additive constant is the golden ratio's).
MIX32_A = 0x21F0AAAD
MIX32_B = _signed(0xD35A2D97, 32)
GOLDEN32 = _signed(0x9E3779B9, 32)
GOLDEN64 = _signed(0x9E3779B97F4A7C15, 64)
MIX64_A = _signed(0xBF58476D1CE4E5B9, 64)
MIX64_B = _signed(0x94D049BB133111EB, 64)
# The float below 2^-31: fp32 rounds the largest 31-bit integers up to 2^31.
UNIT = 2.0**-31 - 2.0**-55
# Tokens of a part, a warp's 64 a lane. Not by B: the order of the sums, so the log-probs, would
# depend on it.
BLOCK = 2048


def sequence_key(
    seed: int, example_id: str, path: str, sample_index: int, occurrence: int = 0
) -> int:
    """Return the stable 64-bit key of one sampled completion.

    It never depends on the completion's place in a list, slot or rank. occurrence: how often the
    same example has been asked before, so that no group is a copy of another.
    """
    text = f"{seed}\0{example_id}\0{path}\0{sample_index}"
    if occurrence:
        text += f"\0{occurrence}"
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


# ---- The reference


def _xorshift_(x: Tensor, k: int, scratch: Tensor) -> Tensor:
    """x ^= x >>> k on int32, in place: torch's shift is arithmetic, the mask makes it logical."""
    torch.bitwise_right_shift(x, k, out=scratch)
    scratch.bitwise_and_((1 << (32 - k)) - 1)
    return x.bitwise_xor_(scratch)


def _row_words(keys: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Hash (key, position) to two 32-bit words, int32 [B, 1].

    Integers wrap; the shifts are arithmetic.
    """
    # A row's two words are mixed in 64 bits once; what follows for each of V tokens is 32-bit work.
    # splitmix64 steps its state by the golden constant, and a place is a step; the key says where
    # the state begins.
    x = (keys ^ (positions.long() * GOLDEN64)) * MIX64_A
    x = (x ^ (x >> 32)) * MIX64_B
    x = (x ^ (x >> 29))[:, None]
    return x.to(torch.int32), (x >> 32).to(torch.int32)


def race_times(keys: Tensor, positions: Tensor, vocab: int) -> Tensor:
    """Return E[B, V], exponentials that depend on (key, position, token id) only.

    argmax z - log E is a draw from softmax(z).
    """
    first, second = _row_words(keys, positions)
    token = torch.arange(vocab, dtype=torch.int32, device=keys.device)
    # Weyl steps: neighbouring ids start far apart. One word is added before the mixing and one
    # xored within, so that rows whose first words agree still differ.
    x = token * GOLDEN32 + first
    scratch = torch.empty_like(x)
    _xorshift_(x, 16, scratch).mul_(MIX32_A)
    x.bitwise_xor_(second)
    _xorshift_(x, 15, scratch).mul_(MIX32_B)
    _xorshift_(x, 15, scratch)
    x.bitwise_and_(0x7FFFFFFF)
    # 31 bits -> u in (0, 1) -> E = -log(1 - u), each in place: a row of 151,936 is 0.6 MB.
    return x.to(torch.float32).add_(0.5).mul_(-UNIT).log1p_().neg_()


def _nucleus(z: Tensor, top_p: float) -> Tensor:
    """Return z with every token outside of the nucleus at -inf."""
    ordered = z.sort(dim=-1, descending=True, stable=True)
    p = ordered.values.softmax(-1)
    drop_ordered = p.cumsum(-1) - p >= top_p  # the mass before a token is enough
    # Back from the order of probability to the order of ids.
    drop = torch.zeros_like(drop_ordered).scatter(-1, ordered.indices, drop_ordered)
    return z.masked_fill(drop, -torch.inf)


def reference_sample(logits, keys, positions, temperature=1.0, top_p=1.0, banned=None):
    """Specify `sample`, in plain PyTorch."""
    # fp32: at |z| = 20 bf16 is off by 0.06, and the log-prob with it.
    z = logits.float() / (temperature or 1.0)
    peak = z.amax(-1, keepdim=True)
    # Over all tokens: what the trainer's softmax will say, whatever is banned.
    logsumexp = peak[:, 0] + (z - peak).exp_().sum(-1).log_()

    allowed = z
    if banned is not None:
        allowed = torch.where(banned, -torch.inf, allowed)
    if top_p < 1:
        allowed = _nucleus(allowed, top_p)
    if temperature > 0:
        # p / E may underflow, this can't
        allowed = allowed - race_times(keys, positions, z.shape[1]).log_()
    # The only step that picks; ties go to the lower id.
    token = allowed.argmax(-1)
    logprob = z.gather(1, token[:, None])[:, 0] - logsumexp
    return token, logprob.clamp_(max=0)


# ---- The kernels. Globals that they read have to be constexprs.

MIX32_A_ = tl.constexpr(MIX32_A)
MIX32_B_ = tl.constexpr(MIX32_B % 2**32)
GOLDEN32_ = tl.constexpr(GOLDEN32 % 2**32)
GOLDEN64_ = tl.constexpr(GOLDEN64)
MIX64_A_ = tl.constexpr(MIX64_A)
MIX64_B_ = tl.constexpr(MIX64_B)
UNIT_ = tl.constexpr(UNIT)
LOG2E_ = tl.constexpr(math.log2(math.e))


@triton.jit
def _log2(x, INTERPRETED: tl.constexpr):
    """Take one instruction, where tl.log2 takes twenty.

    It is off by 2^-22 at most for x in (1/2, 2), relatively elsewhere.
    """
    if INTERPRETED:
        return tl.log2(x)
    else:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def _race_times(first, second, token, INTERPRETED: tl.constexpr):
    """Return race_times / ln 2, of the same bits."""
    x = token.to(tl.uint32) * GOLDEN32_ + first
    x = (x ^ (x >> 16)) * MIX32_A_
    x = (x ^ (x >> 15) ^ (second ^ (second >> 15))) * MIX32_B_  # second: shifted once a row
    bits = (x ^ (x >> 15)) & 0x7FFFFFFF
    u = tl.fma(bits.to(tl.float32), UNIT_, UNIT_ / 2)
    # -log2(1 - u), near 0 by its series: there 1 - u loses its digits.
    # -ln(1 - u) = u + u^2 / 2 + u^3 / 3 + u^4 / 4 + ..., in base 2; u < 1/64 leaves 1e-8 of it out.
    series = tl.fma(u, LOG2E_ / 4, LOG2E_ / 3)
    series = tl.fma(u, series, LOG2E_ / 2)
    series = tl.fma(u, series, LOG2E_)
    return tl.where(u < 0.015625, u * series, -_log2(1 - u, INTERPRETED))


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
    INTERPRETED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Take one part of a row a program: max, sum of exponentials, best score; and its token.

    In base 2, where exponentials and logarithms are one instruction.
    """
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    # 75 parts a row at V = 151,936: one program a row would leave most of a GPU idle at small B.
    i = part * BLOCK + tl.arange(0, BLOCK)
    z = tl.load(logits + row * stride + i, mask=i < vocab, other=-float("inf")).to(tl.float32)
    # The maximum needs no scaling, as temperature is positive: one product an element is saved.
    scale = inv_temperature * LOG2E_
    # A part whose logits are all -inf: finite, so that -inf - peak is no nan.
    peak = tl.maximum(tl.max(z, 0), -1e38)
    total = tl.sum(tl.exp2((z - peak) * scale), 0)

    score = z
    if not GREEDY:
        # The row's words, hashed again by every part: cheaper than a launch that stores them.
        x = (tl.load(keys + row) ^ (tl.load(positions + row).to(tl.int64) * GOLDEN64_)) * MIX64_A_
        x = (x ^ (x >> 32)) * MIX64_B_
        x = x ^ (x >> 29)
        times = _race_times(x.to(tl.uint32), (x >> 32).to(tl.uint32), i, INTERPRETED)
        # z / T - log E in base 2, but for a constant: the argmax is the same.
        score = tl.fma(z, scale, -_log2(times, INTERPRETED))
    if banned is not None:
        score = tl.where(tl.load(banned + i, mask=i < vocab) != 0, -float("inf"), score)
    # Sampled scores don't tie; not having to look for the leftmost is cheaper.
    best, token = tl.max(
        score, 0, return_indices=True, return_indices_tie_break_left=GREEDY or INTERPRETED
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
    """Take one row a program: its parts to the token and its log-prob."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)
    mask = part < parts
    part_floats = floats + 3 * (row * parts + part)
    part_peak = tl.load(part_floats, mask=mask, other=-1e38)
    part_total = tl.load(part_floats + 1, mask=mask, other=0.0)
    part_best = tl.load(part_floats + 2, mask=mask, other=-float("inf"))

    # Merge the parts' sums by the row's maximum, as in an online softmax.
    peak = tl.max(part_peak, 0)
    total = tl.sum(part_total * tl.exp2((part_peak - peak) * (inv_temperature * LOG2E_)), 0)
    # Ties of greedy parts go to the lower one, which holds the lower ids.
    token = tl.load(ids + row * parts + tl.argmax(part_best, 0))
    z = tl.load(logits + row * stride + token).to(tl.float32)
    # The sum is relative to the peak, so that logits of 1e4 don't overflow it.
    logprob = (z - peak) * inv_temperature - tl.log(total)
    tl.store(tokens + row, token.to(tl.int64))
    # Rounding may lift a token of probability 1 above 0.
    tl.store(logprobs + row, tl.minimum(logprob, 0.0))


def _sample_triton(logits, keys, positions, temperature, banned):
    rows, vocab = logits.shape
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    inv_temperature = 1 / (temperature or 1.0)
    # One warp a program, so that the reductions need no shared memory.
    block = 512 if interpreted() else BLOCK
    parts = triton.cdiv(vocab, block)
    floats = logits.new_empty(rows, parts, 3, dtype=torch.float32)
    ids = keys.new_empty(rows, parts, dtype=torch.int32)
    _part_kernel[(rows, parts)](
        logits,
        keys,
        positions,
        banned,
        floats,
        ids,
        vocab,
        logits.stride(0),
        inv_temperature,
        GREEDY=temperature == 0,
        INTERPRETED=interpreted(),
        BLOCK=block,
        num_warps=1,
    )
    tokens = torch.empty_like(keys)
    logprobs = logits.new_empty(rows, dtype=torch.float32)
    _row_kernel[(rows,)](
        logits,
        floats,
        ids,
        tokens,
        logprobs,
        parts,
        logits.stride(0),
        inv_temperature,
        PARTS=triton.next_power_of_2(parts),
        num_warps=1,
    )
    return tokens, logprobs


# ---- The public call


def _check(logits, keys, positions, temperature, top_p, banned):
    rows, vocab = logits.shape
    wrong_ban = banned is not None and banned.shape != (vocab,)
    if keys.shape != (rows,) or positions.shape != (rows,) or wrong_ban:
        raise ValueError(
            f"logits {list(logits.shape)} need keys and positions [{rows}] and banned [{vocab}]"
        )
    if temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(
            f"temperature must be >= 0 and top_p in (0, 1]: got {temperature} and {top_p}"
        )


def sample(
    logits: Tensor,
    keys: Tensor,
    positions: Tensor,
    temperature: float = 1.0,
    top_p: float = 1.0,
    banned: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return tokens[B] int64 and logprobs[B] fp32, drawn from logits[B, V].

    keys[B]: int64, of `sequence_key`; positions[B]: the places in the completions; banned[V]: bool,
    ids that are never sampled (not all of them).
    """
    _check(logits, keys, positions, temperature, top_p, banned)
    rows, vocab = logits.shape
    if on_triton(logits) and top_p == 1 and rows:
        # top_p needs a sort of the row, which the kernel hasn't: then the reference runs, on CUDA
        # too.
        keys = keys.contiguous()
        return _sample_triton(logits, keys, positions.contiguous(), temperature, banned)
    # A CPU takes 1 MB at a time, so that the hash stays in its cache.
    chunk = max(rows, 1) if logits.is_cuda else max((1 << 18) // vocab, 1)
    tokens = []
    logprobs = []
    for i in range(0, max(rows, 1), chunk):
        own = slice(i, i + chunk)
        token, logprob = reference_sample(
            logits[own], keys[own], positions[own], temperature, top_p, banned
        )
        tokens.append(token)
        logprobs.append(logprob)
    return torch.cat(tokens), torch.cat(logprobs)
