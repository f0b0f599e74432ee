"""Sampling on the training weights: prefill each prompt once, decode its n samples together.

    1. prefill   the prompts of a wave are packed into one forward; images are encoded, and keys and values
    computed, once per example
    2. step      one token for every live sample: append its key and value, attend to the shared prompt and
    the own tokens, sample
    3. compact   when enough prompts have finished all their samples, their rows are dropped from the step
    4. collect   Rollouts in the order of the examples

The noise of a token is a hash of (seed, example id, path, sample index, position, token id): never of the
slot, the batch or the rank, so in fp32 a sample does not depend on what it is batched with. The log-prob kept
is the trainer's: log softmax of all logits at the sampling temperature (at temperature 0, greedy, that at 1).
Banned ids (vision markers, `<mask>`, rows without a token) are never sampled; the ban does not enter the
log-probs.

B prompts of a wave, n samples each, P longest prompt, r tokens sampled so far, K key-value heads, D head
width, V vocabulary rows.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.attention import decode_attention
from kernels.sample import sample, sequence_key
from srreal import Example

ROWS = 128  # live samples of a wave: enough to fill matrix products, few enough for the cache of a CPU
BLOCK = 64  # the suffix cache grows by so many tokens


@dataclass
class Rollout:
    """One sampled completion. `tokens` hold the end token where there was one; `text` does not, and is not
    stripped.
    """

    text: str
    tokens: list[int]
    logprobs: list[float]  # of `tokens`, under the full softmax at the sampling temperature
    finished: bool  # False: cut at max_new_tokens


@dataclass
class Cache:
    """Keys and values of a wave: per layer the prompts', (B, K, P, D), and the samples' own, (B, n, K,
    capacity, D).
    """

    prefix: list[tuple[Tensor, Tensor]]
    lengths: Tensor  # (B,) prompt lengths
    suffix: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    used: int = 0

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Appends k, v (B n, K, D) of this step and attends: q, out (B n, A, D)."""
        prefix_k, prefix_v = self.prefix[layer]
        b, n = len(prefix_k), len(q) // len(prefix_k)
        if layer == len(self.suffix):
            self.suffix.append(tuple(k.new_empty(b, n, k.shape[1], BLOCK, k.shape[2]) for _ in range(2)))
        elif self.used == self.suffix[layer][0].shape[3]:
            self.suffix[layer] = tuple(F.pad(old, (0, 0, 0, BLOCK)) for old in self.suffix[layer])
        own_k, own_v = self.suffix[layer]
        own_k[:, :, :, self.used], own_v[:, :, :, self.used] = k.unflatten(0, (b, n)), v.unflatten(0, (b, n))
        upto = self.used + 1
        out = decode_attention(
            q.unflatten(0, (b, n)),
            prefix_k,
            prefix_v,
            self.lengths,
            own_k[:, :, :, :upto],
            own_v[:, :, :, :upto],
        )
        return out.flatten(0, 1)

    def keep(self, prompts: Tensor) -> None:
        """Drops the rows of all other prompts."""
        longest = int(self.lengths[prompts].max())
        self.prefix = [(k[prompts, :, :longest], v[prompts, :, :longest]) for k, v in self.prefix]
        self.suffix = [(k[prompts], v[prompts]) for k, v in self.suffix]
        self.lengths = self.lengths[prompts]


@torch.no_grad()
def generate(
    model, processor, examples: list[Example], n: int = 1, max_new_tokens: int = 256,
    temperature: float = 1.0, top_p: float = 1.0, seed: int = 0, progress: Callable | None = None,
) -> list[list[Rollout]]:  # fmt: skip
    """n completions per example, in the examples' order; temperature 0 is greedy. `progress` hears of
    finished ones.
    """
    out, width = [], max(1, ROWS // n)
    for start in range(0, len(examples), width):
        wave = examples[start : start + width]
        out += _wave(model, processor, wave, n, max_new_tokens, temperature, top_p, seed)
        if progress:
            progress(len(wave) * n)
    return out


def _wave(model, processor, examples, n, max_new_tokens, temperature, top_p, seed) -> list[list[Rollout]]:
    device = model.device
    batch = processor(examples).to(device)
    hidden, packed = model.prefill(batch)
    cache = Cache(*_unpack(packed, batch.segments))
    keys = [[sequence_key(seed, e.id, e.path, i) for i in range(n)] for e in examples]
    keys = torch.tensor(keys, dtype=torch.int64, device=device)  # (B, n)
    banned, ends = processor.banned.to(device), torch.tensor(processor.end_ids, device=device)
    live = torch.arange(len(examples), device=device)  # prompts still decoding
    done = torch.zeros(len(examples), n, dtype=torch.bool, device=device)
    tokens = torch.zeros(len(examples), n, max_new_tokens, dtype=torch.int64, device=device)
    logprobs = torch.zeros(len(examples), n, max_new_tokens, device=device)
    lengths = torch.full((len(examples), n), max_new_tokens, device=device)
    hidden = hidden[batch.last].repeat_interleave(
        n, 0
    )  # (B n, H): all samples of a prompt start from its last token
    for step in range(max_new_tokens):
        logits = fp32_logits(hidden, model.head_weight)  # (B n, V)
        row_keys = keys[live].flatten()
        positions = torch.full_like(row_keys, step)
        chosen, logprob = sample(logits, row_keys, positions, temperature, top_p, banned)
        tokens[live, :, step], logprobs[live, :, step] = chosen.view(-1, n), logprob.view(-1, n).float()
        ended = torch.isin(tokens[:, :, step], ends) & ~done
        lengths[ended], done = step + 1, done | ended
        going = ~done[live].all(1)  # (live prompts,)
        if not going.any() or step + 1 == max_new_tokens:
            break
        if going.sum() <= 0.75 * len(live):  # copying the cache pays once a quarter of the rows is idle
            kept = going.nonzero()[:, 0]
            cache.keep(kept)
            chosen, live = chosen.view(-1, n)[kept].flatten(), live[kept]
        positions = (batch.next_position[live] + step).repeat_interleave(n)
        hidden = model.decode(chosen, positions, cache.attend)
        cache.used += 1
    return _collect(processor, tokens, logprobs, lengths, done)


def fp32_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden (N, H) @ weight (V, H).T in fp32, as the trainer's log-probs take them: rounding logits to bf16
    moves a
    log-prob by up to 0.09."""
    if hidden.dtype == torch.float32:
        return F.linear(hidden, weight)
    if hidden.is_cuda:
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)
    return torch.cat([F.linear(hidden.float(), rows.float()) for rows in weight.split(16384)], 1)


def _unpack(packed: list[tuple[Tensor, Tensor]], segments) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """Packed keys and values (T, K, D) of every layer -> (B, K, P, D), padded at the end, and the lengths
    (B,).
    """
    starts = torch.tensor([start for start, *_ in segments])
    lengths = torch.tensor([end - start for start, end, *_ in segments])
    index = starts[:, None] + torch.minimum(torch.arange(int(lengths.max())), lengths[:, None] - 1)  # (B, P)
    index, lengths = index.to(packed[0][0].device), lengths.to(packed[0][0].device)
    return [tuple(t[index].transpose(1, 2).contiguous() for t in layer) for layer in packed], lengths


def _collect(
    processor, tokens: Tensor, logprobs: Tensor, lengths: Tensor, done: Tensor
) -> list[list[Rollout]]:
    out = []
    for row in zip(tokens.tolist(), logprobs.tolist(), lengths.tolist(), done.tolist(), strict=True):
        group = []
        for ids, values, length, finished in zip(*row, strict=True):
            group.append(Rollout(processor.decode(ids[:length]), ids[:length], values[:length], finished))
        out.append(group)
    return out


@torch.no_grad()
def predict_centres(model, processor, examples: list[Example]) -> list[np.ndarray]:
    """The 3D head's centre of every region, per example (k, 3), metres in the camera frame of the region's
    own image.
    """
    out = []
    for start in range(0, len(examples), ROWS):
        wave = examples[start : start + ROWS]
        batch = processor(wave).to(model.device)
        centres = model.head3d(model.hidden(batch)[batch.region_token])[0].cpu().numpy()
        at = np.searchsorted(
            [end for _, end, *_ in batch.segments], batch.region_token.cpu().numpy(), side="right"
        )
        out += [centres[at == i] for i in range(len(wave))]
    return out
