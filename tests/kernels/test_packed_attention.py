"""Packed attention as one call, and sums of rows that several read, against fp64 and the
reference."""

from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from kernels import packed_attention
from kernels.packed_attention import (
    Lengths,
    Packing,
    Windows,
    flash_prefix_attention,
    gather_rows,
    prefix_attention,
    reference_prefix_attention,
    reference_window_attention,
    window_attention,
)

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
needs_cuda = pytest.mark.skipif(not CUDA, reason="flash attention of packed sequences is CUDA's")

SEGMENTS = [
    (0, 5, 0, 0),
    (5, 9, 0, 5),
    (9, 9, 0, 5),
    (9, 10, 0, 5),
    (10, 13, 0, 0),
    (13, 20, 10, 13),
]


def random(*shape: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(DEVICE, dtype)


def flash_by_hand(q, k, v, queries: Lengths, keys: Lengths, causal: bool) -> torch.Tensor:
    """What flash attention of packed sequences computes, in any dtype and on any device."""
    out = []
    heads = q.shape[1] // k.shape[1]
    starts = queries.starts.tolist(), keys.starts.tolist()
    for i in range(len(starts[0]) - 1):
        query = q[starts[0][i] : starts[0][i + 1]].transpose(0, 1)  # (A, L, D)
        key, value = (
            t[starts[1][i] : starts[1][i + 1]].transpose(0, 1).repeat_interleave(heads, 0)
            for t in (k, v)
        )
        scores = query @ key.transpose(1, 2) / q.shape[-1] ** 0.5
        if causal:
            seen = torch.ones_like(scores[0], dtype=torch.bool).tril(key.shape[1] - query.shape[1])
            scores = scores.masked_fill(~seen, -torch.inf)
        out.append((scores.softmax(-1) @ value).transpose(0, 1))
    return torch.cat(out)


# ---- What the call is given


def test_keys_are_each_segments_prefix_and_its_own():
    packing = Packing(SEGMENTS, DEVICE)
    # The empty segment has no place.
    assert packing.queries.starts.tolist() == [0, 5, 9, 10, 13, 20]
    assert packing.keys.starts.tolist() == [0, 5, 14, 20, 23, 33]
    assert (packing.queries.longest, packing.keys.longest) == (7, 10)
    assert packing.queries.starts.dtype == packing.keys.starts.dtype == torch.int32
    prefixes = [*range(5), *range(9), *range(5), 9, *range(10, 13), *range(10, 20)]
    assert packing.key_index.tolist() == prefixes
    assert Packing([(0, 3, 0, 0), (3, 7, 0, 0)], DEVICE).key_index is None  # no copy of the keys


@pytest.mark.parametrize(("heads", "kv"), [(4, 4), (4, 2), (7, 1)])
def test_the_packed_form_equals_the_reference(heads, kv, monkeypatch):
    """With the flash call written out in fp64: the index, and its gradients."""
    monkeypatch.setattr(packed_attention, "flash_attention", flash_by_hand)
    shapes = (20, heads, 8), (20, kv, 8), (20, kv, 8)
    given = [random(*s, seed=i, dtype=torch.float64).requires_grad_() for i, s in enumerate(shapes)]
    ours = flash_prefix_attention(*given, Packing(SEGMENTS, DEVICE))
    theirs = reference_prefix_attention(*given, SEGMENTS)
    assert (ours - theirs).abs().max() < 1e-12
    mix = random(*ours.shape, seed=9, dtype=torch.float64)
    gradients = [torch.autograd.grad((out * mix).sum(), given) for out in (ours, theirs)]
    assert all((a - b).abs().max() < 1e-12 for a, b in zip(*gradients, strict=True))


def test_nothing_packed():
    empty = torch.zeros(0, 2, 8, device=DEVICE)
    assert flash_prefix_attention(empty, empty, empty, Packing([], DEVICE)).shape == (0, 2, 8)
    assert prefix_attention(empty, empty, empty, []).shape == (0, 2, 8)


# ---- Sums


def one_by_one(terms: torch.Tensor) -> torch.Tensor:
    """The sum over the first axis as an atomic addition in 16 bits makes it."""
    total = torch.zeros_like(terms[0])
    for term in terms:
        total = total + term
    return total


@pytest.mark.parametrize("readers", [1, 64, 512])
def test_gradient_of_a_row_that_many_read(readers):
    """512 completions of a prompt, bf16: the gradient is the fp64 sum, rounded once."""
    rows = random(30, 2, 8, seed=0).requires_grad_()
    index = torch.arange(30, device=DEVICE).repeat(readers)
    grad = 1 + random(30 * readers, 2, 8, seed=1) / 4
    (ours,) = torch.autograd.grad(gather_rows(rows, index), rows, grad)
    terms = grad.unflatten(0, (readers, 30))
    truth = terms.double().sum(0)
    assert ours.dtype == torch.bfloat16
    assert ((ours - truth) / truth).abs().max() < 2**-8
    if readers == 512:
        assert ((one_by_one(terms) - truth) / truth).abs().max() > 2**-5  # what it must not be


def test_gathered_rows_bits_on_a_cpu_are_those_of_indexing():
    rows = torch.randn(40, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    index = torch.randint(40, (300,), generator=torch.Generator().manual_seed(1))
    mix = torch.randn(300, 16, generator=torch.Generator().manual_seed(2))
    assert torch.equal(gather_rows(rows, index), rows[index])
    ours, theirs = (
        torch.autograd.grad(t, rows, mix)[0] for t in (gather_rows(rows, index), rows[index])
    )
    assert torch.equal(ours, theirs)


def test_gathered_rows_under_checkpointing():
    rows = random(10, 8, seed=0).requires_grad_()
    index = torch.arange(10, device=DEVICE).repeat(3)
    run = partial(gather_rows, index=index)
    (plain,) = torch.autograd.grad(run(rows).float().square().sum(), rows)
    again = checkpoint(run, rows, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(again.float().square().sum(), rows)[0], plain)


# ---- CUDA's call against the reference, at true sizes

ONE_PROMPT = [(0, 700, 0, 0), (700, 1000, 0, 700), (1000, 1001, 0, 700), (1001, 1258, 0, 700)]
TWO_PROMPTS = [
    (0, 333, 0, 0),
    (333, 350, 0, 333),
    (350, 350, 0, 333),
    (350, 480, 0, 333),
    (480, 1001, 0, 0),
    (1001, 1130, 480, 1001),
    (1130, 1258, 480, 1001),
]
NO_PREFIX = [(0, 500, 0, 0), (500, 501, 0, 0), (501, 1258, 0, 0)]


def compare(ours, reference, given: list[torch.Tensor]) -> None:
    """Outputs and gradients in bf16: as near to fp64 as the reference in bf16 is, and a bit."""
    found = []
    mix = random(*given[0].shape, seed=9)
    for call, dtype in (
        (ours, torch.bfloat16),
        (reference, torch.bfloat16),
        (reference, torch.float64),
    ):
        leaves = [t.detach().to(dtype).requires_grad_() for t in given]
        out = call(*leaves)
        found.append((out, *torch.autograd.grad((out * mix.to(dtype)).sum(), leaves)))
    for mine, theirs, truth in zip(*found, strict=True):
        slack = 2**-8 * truth.abs().max()
        assert (mine - truth).abs().max() <= (theirs - truth).abs().max() + slack


@needs_cuda
@pytest.mark.parametrize("segments", [ONE_PROMPT, TWO_PROMPTS, NO_PREFIX])
@pytest.mark.parametrize(("heads", "kv"), [(16, 2), (28, 4)])
def test_flash_equals_the_reference(heads, kv, segments):
    given = [random(1258, n, 128, seed=i) for i, n in enumerate((heads, kv, kv))]
    packing = Packing(segments, DEVICE)
    compare(
        lambda q, k, v: prefix_attention(q, k, v, packing),
        lambda q, k, v: flash_by_hand(
            q,
            k if packing.key_index is None else k[packing.key_index],
            v if packing.key_index is None else v[packing.key_index],
            packing.queries,
            packing.keys,
            causal=True,
        ),
        given,
    )


@needs_cuda
@pytest.mark.parametrize("width", [64, 72, 80])
@pytest.mark.parametrize("lengths", [[64] * 9 + [32, 16, 48], [300, 420], [4]])
def test_windows_equal_the_reference(width, lengths):
    given = [random(sum(lengths), 4, width, seed=i) for i in range(3)]
    windows = Windows(lengths, DEVICE)
    compare(
        lambda q, k, v: window_attention(q, k, v, windows),
        lambda q, k, v: reference_window_attention(q, k, v, lengths),
        given,
    )


@needs_cuda
def test_gradient_of_a_prompt_under_many_completions():
    """The prompt's values get one gradient of about 1 from each of 300 completions of one token."""
    prompt, count = 16, 300
    segments = [(0, prompt, 0, 0)]
    segments += [(prompt + i, prompt + i + 1, 0, prompt) for i in range(count)]
    shapes = [(prompt + count, n, 32) for n in (4, 2, 2)]
    given = [random(*shape, seed=i) for i, shape in enumerate(shapes)]
    found = []
    for dtype in (torch.bfloat16, torch.float64):
        q, k, v = (t.to(dtype).requires_grad_() for t in given)
        call = prefix_attention if dtype == torch.bfloat16 else reference_prefix_attention
        out = call(q, k, v, segments)
        found.append(torch.autograd.grad(out, v, torch.ones_like(out))[0][:prompt].double())
    assert (found[0] - found[1]).norm() < 2**-7 * found[1].norm()


class Calls(TorchDispatchMode):
    """Names of the operators of attention that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "attention" in func._schema.name:
            self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@needs_cuda
def test_one_call_however_many_segments():
    segments = [(0, 40, 0, 0), *((40 + i, 41 + i, 0, 40) for i in range(60))]
    q, k, v = (random(100, n, 64, seed=n) for n in (4, 2, 2))
    windows = Windows([10] * 7 + [30], DEVICE)
    with Calls() as calls:
        prefix_attention(q, k, v, segments)
        window_attention(k, k, v, windows)
    assert calls.names == ["aten::_flash_attention_forward"] * 2


@needs_cuda
def test_values_may_be_a_view_of_one_product():
    """The vision tower's q, k and v lie beside each other; under checkpointing, as in training."""
    qkv = random(60, 3, 4, 80, seed=0).requires_grad_()
    windows = Windows([20, 30, 10], DEVICE)

    def run(qkv, call):
        return call(*qkv.unbind(1), windows).float().square().sum()

    plain = partial(run, call=lambda q, k, v, w: reference_window_attention(q, k, v, w.lengths))
    (theirs,) = torch.autograd.grad(plain(qkv), qkv)
    ours = checkpoint(run, qkv, window_attention, use_reentrant=False)
    (ours,) = torch.autograd.grad(ours, qkv)
    assert (ours - theirs).abs().max() < 2**-6 * theirs.abs().max()


# ---- Prefix attention against a softmax that is written out


def plain(q, k, v, visible):
    """softmax(q k^T / sqrt(D)) v with a boolean (T, S) mask; q (T, A, D), k and v (S, K, D)."""
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(0, 1) for t in (k, v))
    scores = (q.transpose(0, 1) @ k.transpose(1, 2)) / q.shape[-1] ** 0.5
    return (scores.masked_fill(~visible, float("-inf")).softmax(-1) @ v).transpose(0, 1)


def what_is_seen(segments):
    visible = torch.zeros(segments[-1][1], segments[-1][1], dtype=torch.bool)
    for start, end, a, b in segments:
        visible[start:end, a:b] = True
        visible[start:end, start:end] = torch.ones(end - start, end - start).tril().bool()
    return visible.to(DEVICE)


@needs_cuda
@pytest.mark.parametrize(("heads", "kv"), [(16, 2), (28, 4), (32, 8)])
def test_prefix_attention_of_a_gpu(heads, kv):
    """bf16 at true sizes: as near to fp64 as eager PyTorch in bf16, and a bit."""
    given = [random(1258, n, 128, seed=i) for i, n in enumerate((heads, kv, kv))]
    visible = what_is_seen(ONE_PROMPT)
    compare(
        lambda q, k, v: prefix_attention(q, k, v, ONE_PROMPT),
        lambda q, k, v: plain(q, k, v, visible),
        given,
    )


@pytest.mark.parametrize(("heads", "kv"), [(4, 4), (4, 2), (7, 1)])
def test_prefix_attention(heads, kv):
    shapes = (20, heads, 6), (20, kv, 6), (20, kv, 6)
    given = [random(*s, seed=i, dtype=torch.float64).requires_grad_() for i, s in enumerate(shapes)]
    ours = prefix_attention(*given, SEGMENTS)
    truth = plain(*given, what_is_seen(SEGMENTS))
    assert (ours - truth).abs().max() < 1e-12
    weight = random(*truth.shape, seed=3, dtype=torch.float64)
    gradients = [torch.autograd.grad((out * weight).sum(), given) for out in (ours, truth)]
    assert all((a - b).abs().max() < 1e-12 for a, b in zip(*gradients, strict=True))
