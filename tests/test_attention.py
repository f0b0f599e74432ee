"""Packed attention with shared prefixes, and one decode step, against a plain masked softmax in fp64."""

import pytest
import torch

from kernels.attention import decode_attention, prefix_attention


def plain(q, k, v, visible):
    """softmax(q k^T / sqrt(D)) v with a boolean (T, S) mask; q (T, A, D), k and v (S, K, D)."""
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(0, 1) for t in (k, v))
    scores = (q.transpose(0, 1) @ k.transpose(1, 2)) / q.shape[-1] ** 0.5
    return (scores.masked_fill(~visible, float("-inf")).softmax(-1) @ v).transpose(0, 1)


def random(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()


@pytest.mark.parametrize(("heads", "kv"), [(4, 4), (4, 2), (7, 1)])
def test_prefix_attention(heads, kv):
    segments = [(0, 5, 0, 0), (5, 9, 0, 5), (9, 9, 0, 5), (9, 10, 0, 5), (10, 13, 0, 0), (13, 20, 10, 13)]
    q, k, v = random(20, heads, 6, seed=0), random(20, kv, 6, seed=1), random(20, kv, 6, seed=2)
    visible = torch.zeros(20, 20, dtype=torch.bool)
    for start, end, a, b in segments:
        visible[start:end, a:b] = True
        visible[start:end, start:end] = torch.ones(end - start, end - start).tril().bool()
    ours, truth = prefix_attention(q, k, v, segments), plain(q, k, v, visible)
    assert (ours - truth).abs().max() < 1e-12
    weight = random(*truth.shape, seed=3).detach()
    gradients = [torch.autograd.grad((out * weight).sum(), (q, k, v)) for out in (ours, truth)]
    assert all((a - b).abs().max() < 1e-12 for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize(("heads", "kv"), [(4, 4), (4, 2), (7, 1)])
def test_decode_attention(heads, kv):
    lengths, n, r, d = torch.tensor([3, 7, 1]), 2, 4, 6
    q = random(3, n, heads, d, seed=0)
    prefix_k, prefix_v = random(3, kv, 7, d, seed=1), random(3, kv, 7, d, seed=2)
    suffix_k, suffix_v = random(3, n, kv, r, d, seed=3), random(3, n, kv, r, d, seed=4)
    out = decode_attention(q, prefix_k, prefix_v, lengths, suffix_k, suffix_v)
    for b in range(3):
        for i in range(n):
            k = torch.cat((prefix_k[b, :, : lengths[b]], suffix_k[b, i]), 1).transpose(0, 1)
            v = torch.cat((prefix_v[b, :, : lengths[b]], suffix_v[b, i]), 1).transpose(0, 1)
            truth = plain(q[b, i][None], k, v, torch.ones(1, len(k), dtype=torch.bool))
            # the softmax runs in fp32, as the model's does
            assert (out[b, i] - truth[0]).abs().max() < 1e-6
