"""linear_logprob against fp64 truth: values, gradients, memory, bad input."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import interpreted
from kernels import linear_logprob as module
from kernels.linear_logprob import WORKSPACE, linear_logprob, reference_linear_logprob

CUDA = torch.cuda.is_available() and not interpreted()


@pytest.fixture(autouse=True)
def on_the_gpu_if_there_is_one():
    torch.set_default_device("cuda" if CUDA else "cpu")
    yield
    torch.set_default_device(None)


def make(n, v, h, dtype=torch.float32, scale=1.0, seed=0):
    """Draw on the CPU: the same numbers on every device."""
    g = torch.Generator().manual_seed(seed)
    device = "cuda" if CUDA else "cpu"
    hidden = torch.randn(n, h, generator=g, dtype=torch.float64, device="cpu") * scale
    weight = torch.randn(v, h, generator=g, dtype=torch.float64, device="cpu") * h**-0.5
    targets = torch.randint(v, (n,), generator=g, device="cpu")
    return hidden.to(device, dtype), weight.to(device, dtype), targets.to(device)


def run(f, hidden, weight, targets, temperature=1.0):
    """Both outputs, and the gradients of a mix of them."""
    hidden, weight = (x.detach().clone().requires_grad_() for x in (hidden, weight))
    logprob, entropy = f(hidden, weight, targets, temperature)
    mix = torch.linspace(-1, 1, len(hidden), dtype=logprob.dtype)
    (mix * logprob + 0.5 * mix.flip(0) * entropy).sum().backward()
    return [x.detach().double() for x in (logprob, entropy, hidden.grad, weight.grad)]


def small_tiles(monkeypatch, rows=8, cols=32):
    monkeypatch.setattr(module, "_tile_shape", lambda n, v, *_: (min(n, rows), min(v, cols)))


def low_logprob(hidden, weight, targets, temperature):
    """Eager PyTorch in 16 bits, logits widened after the product; its backward rounds dz to 16
    bits, too."""
    logp_NV = ((hidden @ weight.T).float() / temperature).log_softmax(-1)
    return logp_NV.gather(1, targets[:, None]).squeeze(1), -(logp_NV.exp() * logp_NV).sum(-1)


def check_against_truth(inputs, temperature=1.0, tolerance=2e-6, scales=(), rounds=CUDA):
    """`rounds`: dz to 16 bits, for tensor cores. Then 16-bit gradients are held against eager
    PyTorch in 16 bits, plus what rounding dz and the result may add by chance: 2^-9 of the largest
    each."""
    low = rounds and inputs[0].dtype == torch.bfloat16
    hidden, weight, targets = inputs
    truth = run(reference_linear_logprob, hidden.double(), weight.double(), targets, temperature)
    eager = run(reference_linear_logprob, *inputs, temperature)
    ours = run(linear_logprob, *inputs, temperature)
    if low:
        eager[2:] = run(low_logprob, *inputs, temperature)[2:]
    names = ("logprob", "entropy", "dhidden", "dweight")
    for name, true, theirs, mine in zip(names, truth, eager, ours, strict=True):
        scale = dict(scales).get(name) or max(true.abs().max().item(), 1e-30)
        slack = 2**-8 if low and name.startswith("d") else tolerance
        error = (mine - true).abs().max() / scale
        allowed = (theirs - true).abs().max() / scale + slack
        assert error <= allowed, f"{name}: {error:.2e} > {allowed:.2e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "n, v, h", [(1, 2, 1), (1, 97, 24), (7, 33, 5), (29, 300, 64), (8, 32, 16), (9, 1, 4)]
)
def test_equals_truth(n, v, h, dtype, monkeypatch):
    small_tiles(monkeypatch)
    inputs = make(n, v, h, dtype, scale=4.0)
    scales = {}
    if v == 2:
        # One of two tokens may have nearly all of the probability. Both gradients are multiples of
        # 1 - p then, which cancels, eager's as well as ours: errors are measured against the terms
        # of 1 and of p.
        hidden, weight, _ = inputs
        scales["dhidden"] = weight.abs().max().item() / 0.7
        scales["dweight"] = hidden.abs().max().item() / 0.7
    check_against_truth(inputs, temperature=0.7, scales=scales)


@pytest.mark.skipif(CUDA or interpreted(), reason="stands in for CUDA's rounding of dz")
@pytest.mark.parametrize("n, v, h", [(1, 97, 24), (7, 33, 5), (29, 300, 64), (64, 2000, 128)])
def test_gradients_from_a_rounded_dz_equal_truth(n, v, h, monkeypatch):
    small_tiles(monkeypatch)
    exact = module._dlogits_torch
    seen = []

    def rounded(*args):
        seen.append(exact(*args).bfloat16().float())
        return seen[-1]

    monkeypatch.setattr(module, "_dlogits_torch", rounded)
    for seed in range(5):
        check_against_truth(make(n, v, h, torch.bfloat16, 4.0, seed), temperature=0.7, rounds=True)
    assert seen


def test_default_tiles_and_several_chunks():
    check_against_truth(make(1500, 2500, 8, scale=3.0))


@pytest.mark.parametrize("shift", [1e4, -1e4])
def test_extreme_logits(shift, monkeypatch):
    """All logits at +-1e4 plus small integers: exact products, so the errors are the softmax's own.
    (dhidden sums terms of 1e4 that cancel: its errors are measured against the terms.)"""
    small_tiles(monkeypatch)
    weight = torch.cat((torch.full((70, 1), shift), torch.arange(70.0)[:, None] % 5), 1)
    targets = torch.arange(12) * 5
    check_against_truth(
        (torch.ones(12, 2), weight, targets), tolerance=1e-6, scales={"dhidden": 1e4}
    )
    spread = torch.linspace(-1e4, 1e4, 70)[:, None]
    logprob, entropy, *grads = run(linear_logprob, torch.ones(12, 1), spread, targets)
    assert all(x.isfinite().all() for x in (logprob, entropy, *grads))
    assert (logprob <= 0).all() and (entropy >= 0).all()
    assert logprob[0].item() == pytest.approx(-2e4)


def test_logprobs_are_never_positive():
    hidden, weight, _ = make(60, 50, 16, scale=30.0)
    best = (hidden @ weight.T).argmax(1)
    for temperature in (0.05, 1.0):
        logprob, entropy = linear_logprob(hidden, weight, best, temperature)
        assert (logprob <= 0).all() and (entropy >= 0).all() and logprob.max() == 0


def test_gradcheck_in_fp64(monkeypatch):
    small_tiles(monkeypatch, 3, 4)
    hidden, weight, targets = make(5, 11, 3, torch.float64)
    hidden = hidden[torch.tensor([0, 1, 1, 2, 0])]  # repeated rows
    for outputs in (lambda out: out, lambda out: out[0], lambda out: out[1]):
        assert torch.autograd.gradcheck(
            lambda h, w, o=outputs: o(linear_logprob(h, w, targets, 0.7)),
            (hidden.requires_grad_(), weight.requires_grad_()),
        )


def test_repeated_rows_and_a_tied_weight_accumulate():
    hidden, weight, targets = make(4, 40, 8, torch.float64)
    index = torch.tensor([0, 0, 1, 3, 3, 3])

    def grads(f):
        h = hidden.clone().requires_grad_()
        w = weight.clone().requires_grad_()
        rows = h[index] + w[index]  # the embedding is the head
        logprob, entropy = f(rows, w, targets[index])
        (logprob.sum() + entropy.square().sum()).backward()
        return h.grad, w.grad

    for a, b in zip(grads(linear_logprob), grads(reference_linear_logprob), strict=True):
        torch.testing.assert_close(a, b)


def test_frozen_sides_and_unused_outputs():
    hidden, weight, targets = make(6, 20, 4)
    linear_logprob(hidden.requires_grad_(), weight, targets)[1].sum().backward()
    assert hidden.grad.isfinite().all() and weight.grad is None
    hidden = hidden.detach()
    linear_logprob(hidden, weight.requires_grad_(), targets)[0].sum().backward()
    assert weight.grad.isfinite().all() and hidden.grad is None


def test_dtypes_out():
    wide = {torch.bfloat16: torch.float32, torch.float32: torch.float32}
    for dtype, out in (wide | {torch.float64: torch.float64}).items():
        hidden, weight, targets = make(3, 5, 4, dtype)
        hidden.requires_grad_()
        weight.requires_grad_()
        logprob, entropy = linear_logprob(hidden, weight, targets)
        (logprob + entropy).sum().backward()
        assert logprob.dtype == entropy.dtype == out
        assert hidden.grad.dtype == weight.grad.dtype == dtype


def test_no_rows():
    hidden, weight, targets = make(0, 5, 4)
    logprob, entropy = linear_logprob(hidden.requires_grad_(), weight.requires_grad_(), targets)
    (logprob.sum() + entropy.sum()).backward()
    assert logprob.shape == entropy.shape == (0,)
    assert hidden.grad.shape == (0, 4)
    assert (weight.grad == 0).all()


def test_bad_input():
    hidden, weight, targets = make(4, 10, 3)
    for bad in (10, -1, -100, 2**40):
        with pytest.raises(IndexError, match=rf"targets\[2\] = {bad} .*0\.\.9"):
            linear_logprob(hidden, weight, targets.index_fill(0, torch.tensor(2), bad))
    for kwargs in (
        dict(temperature=0.0),
        dict(temperature=-1.0),
        dict(temperature=float("nan")),
        dict(targets=targets[:3]),
        dict(weight=weight[:, :2]),
    ):
        with pytest.raises(ValueError):
            linear_logprob(**(dict(hidden=hidden, weight=weight, targets=targets) | kwargs))
    with pytest.raises(TypeError):
        linear_logprob(hidden.bfloat16(), weight, targets)


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that any operation made, views of the operands aside."""

    def __init__(self, known):
        super().__init__()
        self.bytes = 0
        self.known = {x.untyped_storage().data_ptr() for x in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in self.known:
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_bounded(dtype):
    """Logits would be 247 MB; nothing but dweight (and its fp32 copy) may be larger than the
    workspace."""
    hidden, weight, targets = make(5000, 12_345, 4, dtype)
    hidden.requires_grad_()

    def step():
        logprob, entropy = linear_logprob(hidden, weight, targets)
        (logprob.sum() + entropy.sum()).backward()

    with Largest((hidden, weight)) as seen:
        step()
    assert 0 < seen.bytes <= WORKSPACE
    if CUDA:  # cuBLAS has its own by now
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        assert torch.cuda.max_memory_allocated() - before <= WORKSPACE + 100 * len(hidden)


class OnCuda(torch.Tensor):
    is_cuda = True


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cuda", [True, False])
@pytest.mark.parametrize("v", [3, 1200, 151_936])
@pytest.mark.parametrize("h", [64, 512, 2048, 3584, 4096, 8192])
def test_workspace_of_any_shape(v, h, cuda, dtype, monkeypatch):
    """What a walk over the tiles allocates, and casts on its way: on the meta device, so also for
    CUDA."""
    monkeypatch.setattr(module, "_matmul", lambda a, b, out: out)
    kind = OnCuda if cuda else torch.Tensor
    for n, backward in itertools.product((1, 500, 1 << 20), (False, True)):
        given = [
            torch.empty(rows, h, dtype=dtype, device="meta").as_subclass(kind) for rows in (n, v)
        ]
        walk = module._Tiles(*given, backward)
        _, chunk = next(walk.chunks())
        _, *tensors = next(walk.tiles(chunk))
        storages = [x.untyped_storage() for x in (chunk, *tensors, walk.d_hidden) if x is not None]
        known = [x.untyped_storage()._cdata for x in given]
        used = sum({x._cdata: x.nbytes() for x in storages if x._cdata not in known}.values())
        assert walk.tile.nbytes <= used <= WORKSPACE
        if cuda and dtype == torch.bfloat16 and n > 500 and v > 1200:
            assert (walk.rows, walk.cols) == (4096 >> (backward + (backward and h > 4096)), 2048)
