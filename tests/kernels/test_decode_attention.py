"""A decode step over slots, against a plain softmax in fp64."""

import pytest
import torch

from kernels import interpreted
from kernels.decode_attention import Table, decode_attention, reference_decode_attention

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
needs_cuda = pytest.mark.skipif(not CUDA, reason="true sizes")


def plain(q, k, v):
    """softmax(q k^T / sqrt(D)) v; q (T, A, D), k and v (S, K, D)."""
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(0, 1) for t in (k, v))
    scores = (q.transpose(0, 1) @ k.transpose(1, 2)) / q.shape[-1] ** 0.5
    return (scores.softmax(-1) @ v).transpose(0, 1)


def step_of(heads, kv, n, d=6, dtype=torch.float32, seed=0, room=19, own=37):
    """Return arguments of decode_attention, and the slots that have a prompt.

    7 slots in any order in the places of 3 prompts, one of them empty, one slot without a prompt,
    one with an empty suffix; odd lengths.
    """
    generator = torch.Generator().manual_seed(seed)
    live = torch.randperm(7, generator=generator)[:6]
    places = torch.randperm(2 * n, generator=generator)[: min(6, 2 * n)]
    places = torch.cat((places, torch.tensor([2 * n])))
    live = live[: len(places)]
    places = places[: len(live)]
    members = torch.full((3 * n,), -1)
    members[places] = live
    member_index = torch.zeros(7, dtype=torch.int64)
    member_index[live] = places
    lengths = torch.randint(1, own + 1, (7,), generator=generator)
    lengths[live[0]] = 0
    table = (torch.tensor([room, 5, 1]), lengths, members.view(3, n), member_index)
    table = Table(*(t.to(DEVICE) for t in table))
    prefix = (3, kv, room, d)
    suffix = (7, kv, own, d)
    inputs = []
    for shape in ((7, heads, d), prefix, prefix, suffix, suffix):
        inputs.append(torch.randn(shape, generator=generator).to(DEVICE, dtype))
    return inputs, table, live


def decode_truth(q, prefix_k, prefix_v, suffix_k, suffix_v, table, slot):
    """One slot's output in fp64, from its own keys alone."""
    prompt = int(table.member_index[slot]) // table.members.shape[1]
    length = int(table.prefix_lengths[prompt])
    own = int(table.suffix_lengths[slot])
    k = torch.cat((prefix_k[prompt, :, :length], suffix_k[slot, :, :own]), 1)
    v = torch.cat((prefix_v[prompt, :, :length], suffix_v[slot, :, :own]), 1)
    k, v = (t.transpose(0, 1).double() for t in (k, v))
    return plain(q[slot][None].double(), k, v)[0]


@pytest.mark.parametrize(("heads", "kv"), [(2, 2), (4, 2), (4, 1), (7, 1), (8, 1)])
@pytest.mark.parametrize("decode", [decode_attention, reference_decode_attention])
def test_decode_attention(heads, kv, decode):
    """GQA of 1, 2, 4, 7, 8. Under TRITON_INTERPRET=1 the call is the Triton kernels.

    With one split of a suffix, which writes the result, and with several, which are merged.
    """
    for n, own in ((1, 37), (4, 37), (1, 10), (4, 10)):
        inputs, table, live = step_of(heads, kv, n, seed=n, own=own)
        out = decode(*inputs, table)
        assert torch.isfinite(out).all()
        for slot in live.tolist():
            assert (out[slot] - decode_truth(*inputs, table, slot)).abs().max() < 1e-6


TRUE_SIZES = [
    pytest.param(heads, kv, dict(d=128, room=700, own=own), marks=needs_cuda)
    for heads, kv, own in (
        (16, 4, 100),
        (16, 4, 300),
        (28, 4, 100),
        (28, 4, 300),
        (16, 2, 100),
        (16, 2, 300),
    )
]


@pytest.mark.parametrize(("heads", "kv", "sizes"), [(8, 2, dict(d=32)), *TRUE_SIZES])
def test_decode_attention_in_bf16(heads, kv, sizes):
    inputs, table, live = step_of(heads, kv, 3, dtype=torch.bfloat16, **sizes)
    out = decode_attention(*inputs, table)
    eager = reference_decode_attention(*inputs, table)
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


def test_keys_and_values_of_two_layouts_are_refused():
    if not (CUDA or interpreted()):
        pytest.skip("a CPU takes any layout")
    inputs, table, _ = step_of(4, 2, 3)
    inputs[4] = inputs[4].transpose(0, 1).contiguous().transpose(0, 1)
    with pytest.raises(ValueError, match="equal strides"):
        decode_attention(*inputs, table)
