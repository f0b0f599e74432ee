"""Packed attention with shared prefixes, and a decode step over slots, against a plain softmax in
fp64."""

import pytest
import torch

from kernels.attention import Table, decode_attention, prefix_attention, reference_decode_attention

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
needs_cuda = pytest.mark.skipif(not CUDA, reason="CUDA's own attention kernels, and true sizes")


def plain(q, k, v, visible):
    """softmax(q k^T / sqrt(D)) v with a boolean (T, S) mask; q (T, A, D), k and v (S, K, D)."""
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(0, 1) for t in (k, v))
    scores = (q.transpose(0, 1) @ k.transpose(1, 2)) / q.shape[-1] ** 0.5
    return (scores.masked_fill(~visible, float("-inf")).softmax(-1) @ v).transpose(0, 1)


def random(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()


def what_is_seen(segments):
    visible = torch.zeros(segments[-1][1], segments[-1][1], dtype=torch.bool)
    for start, end, a, b in segments:
        visible[start:end, a:b] = True
        visible[start:end, start:end] = torch.ones(end - start, end - start).tril().bool()
    return visible


@needs_cuda
@pytest.mark.parametrize(("heads", "kv"), [(16, 2), (28, 4), (32, 8)])
def test_prefix_attention_of_a_gpu(heads, kv):
    """bf16 at true sizes, forward and backward: as near to fp64 as eager PyTorch in bf16, and a
    bit."""
    segments = [(0, 700, 0, 0), (700, 1000, 0, 700), (1000, 1001, 0, 700), (1001, 1258, 0, 700)]
    whole = [random(1258, n, 128, seed=i).detach().cuda() for i, n in enumerate((heads, kv, kv))]
    visible, mix, found = (
        what_is_seen(segments).cuda(),
        random(1258, heads, 128, seed=3).detach().cuda(),
        [],
    )
    for call, dtype in (
        (prefix_attention, torch.bfloat16),
        (plain, torch.bfloat16),
        (plain, torch.float64),
    ):
        given = [t.bfloat16().to(dtype).requires_grad_() for t in whole]
        out = call(*given, segments if call is prefix_attention else visible)
        found.append((out, *torch.autograd.grad((out * mix.to(dtype)).sum(), given)))
    for ours, eager, truth in zip(*found, strict=True):
        worst = truth.abs().max()
        assert (ours - truth).abs().max() <= (eager - truth).abs().max() + 2**-8 * worst


@pytest.mark.parametrize(("heads", "kv"), [(4, 4), (4, 2), (7, 1)])
def test_prefix_attention(heads, kv):
    segments = [
        (0, 5, 0, 0),
        (5, 9, 0, 5),
        (9, 9, 0, 5),
        (9, 10, 0, 5),
        (10, 13, 0, 0),
        (13, 20, 10, 13),
    ]
    q, k, v = random(20, heads, 6, seed=0), random(20, kv, 6, seed=1), random(20, kv, 6, seed=2)
    ours, truth = prefix_attention(q, k, v, segments), plain(q, k, v, what_is_seen(segments))
    assert (ours - truth).abs().max() < 1e-12
    weight = random(*truth.shape, seed=3).detach()
    gradients = [torch.autograd.grad((out * weight).sum(), (q, k, v)) for out in (ours, truth)]
    assert all((a - b).abs().max() < 1e-12 for a, b in zip(*gradients, strict=True))


def step_of(heads, kv, n, d=6, dtype=torch.float32, seed=0, room=19, own=37):
    """Arguments of decode_attention: 7 slots in any order in the places of 3 prompts, one of them
    empty, one slot without a prompt, one with an empty suffix; odd lengths. And the slots that have
    a prompt."""
    generator = torch.Generator().manual_seed(seed)
    live = torch.randperm(7, generator=generator)[:6]
    places = torch.cat(
        (torch.randperm(2 * n, generator=generator)[: min(6, 2 * n)], torch.tensor([2 * n]))
    )
    live = live[: len(places)]
    places = places[: len(live)]
    members, home = torch.full((3 * n,), -1), torch.zeros(7, dtype=torch.int64)
    members[places], home[live] = live, places
    lengths = torch.randint(1, own + 1, (7,), generator=generator)
    lengths[live[0]] = 0
    table = (torch.tensor([room, 5, 1]), lengths, members.view(3, n), home)
    table = Table(*(t.to(DEVICE) for t in table))
    shapes = (7, heads, d), (3, kv, room, d), (3, kv, room, d), (7, kv, own, d), (7, kv, own, d)
    return (
        [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes],
        table,
        live,
    )


def decode_truth(q, prefix_k, prefix_v, suffix_k, suffix_v, table, slot):
    """One slot's output in fp64, from its own keys alone."""
    b, own = int(table.home[slot]) // table.members.shape[1], int(table.suffix_lengths[slot])
    length = int(table.prefix_lengths[b])
    k = torch.cat((prefix_k[b, :, :length], suffix_k[slot, :, :own]), 1).transpose(0, 1).double()
    v = torch.cat((prefix_v[b, :, :length], suffix_v[slot, :, :own]), 1).transpose(0, 1).double()
    return plain(
        q[slot][None].double(), k, v, torch.ones(1, len(k), dtype=torch.bool, device=k.device)
    )[0]


@pytest.mark.parametrize(("heads", "kv"), [(2, 2), (4, 2), (4, 1), (7, 1), (8, 1)])
@pytest.mark.parametrize("decode", [decode_attention, reference_decode_attention])
def test_decode_attention(heads, kv, decode):
    """GQA of 1, 2, 4, 7, 8. Under TRITON_INTERPRET=1 the call is the Triton kernel."""
    for n in (1, 4):
        inputs, table, live = step_of(heads, kv, n, seed=n)
        out = decode(*inputs, table)
        assert torch.isfinite(out).all()
        for slot in live.tolist():
            assert (out[slot] - decode_truth(*inputs, table, slot)).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("heads", "kv", "sizes"),
    [
        (8, 2, dict(d=32)),
        *(
            pytest.param(*heads, dict(d=128, room=700, own=300), marks=needs_cuda)
            for heads in ((16, 4), (28, 4), (16, 2))
        ),
    ],
)
def test_decode_attention_in_bf16(heads, kv, sizes):
    inputs, table, live = step_of(heads, kv, 3, dtype=torch.bfloat16, **sizes)
    out, eager = decode_attention(*inputs, table), reference_decode_attention(*inputs, table)
    truth = torch.stack([decode_truth(*inputs, table, slot) for slot in live.tolist()])
    assert (out[live] - truth).abs().max() <= (eager[live] - truth).abs().max() + 2**-8


def test_decode_attention_reads_nothing_behind_the_lengths():
    inputs, table, live = step_of(4, 2, 3)
    before = decode_attention(*inputs, table)
    lengths_of = [table.prefix_lengths] * 2 + [table.suffix_lengths] * 2
    for t, lengths in zip(inputs[1:], lengths_of, strict=True):
        for row, length in enumerate(lengths.tolist()):
            t[row, :, length:] = 1e4
    assert torch.equal(before[live], decode_attention(*inputs, table)[live])
