"""The layers' kernels against fp64 truth: values, gradients, the cache, odd shapes."""

import pytest
import torch
from torch import Tensor

from kernels import interpreted, layers

CUDA = torch.cuda.is_available() and not interpreted()
DEVICE = "cuda" if CUDA else "cpu"
CALLS = {
    name: (getattr(layers, name), getattr(layers, "reference_" + name))
    for name in ("rms_norm", "add_rms_norm", "swiglu", "swiglu_joint", "qk_norm_rope")
}


def normal(*shape, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale


def angles(tokens, width, seed=9):
    angle = normal(tokens, width // 2, seed=seed, scale=3.0).repeat(1, 2)
    return angle.cos(), angle.sin()


def norm_inputs(tokens, width, scale=1.0):
    return normal(tokens, width, scale=scale), normal(width, seed=1) + 1


def rope_inputs(tokens, heads, kv_heads, width, normed):
    q, k = (
        normal(tokens, heads, width, scale=3.0),
        normal(tokens, kv_heads, width, seed=1, scale=0.1),
    )
    weights = (normal(width, seed=2) + 1, normal(width, seed=3) + 1) if normed else ()
    return q, k, *angles(tokens, width), *weights


CASES = {
    **{
        f"rms_norm {t} x {h}": ("rms_norm", norm_inputs(t, h))
        # of one the gradient all cancels
        for t, h in ((1, 2), (3, 48), (70, 128), (5, 300), (2, 3584))
    },
    "rms_norm of tiny and of huge rows": ("rms_norm", norm_inputs(9, 40, 1e-4)),
    "rms_norm of heads": ("rms_norm", (normal(5, 3, 20), normal(20, seed=1))),
    **{
        f"add_rms_norm {t} x {h}": (
            "add_rms_norm",
            (normal(t, h), normal(t, h, seed=4), normal(h, seed=1)),
        )
        for t, h in ((1, 1), (7, 48), (33, 129))
    },
    **{
        f"swiglu {t} x {h}": ("swiglu", (normal(t, h, scale=4.0), normal(t, h, seed=1)))
        for t, h in ((1, 1), (7, 88), (3, 11008))
    },
    **{
        f"swiglu_joint {t} x 2 * {h}": ("swiglu_joint", (normal(t, 2 * h, scale=2.0),))
        for t, h in ((1, 1), (7, 88), (3, 11008))
    },
    **{
        f"qk_norm_rope {shape}, {normed=}": ("qk_norm_rope", rope_inputs(*shape, normed))
        for shape in ((1, 4, 2, 20), (19, 7, 1, 32), (9, 3, 3, 128))
        for normed in (True, False)
    },
}


def run(call, inputs, dtype):
    """Outputs, then the gradients of everything but cos and sin, in fp64."""
    given = [x.to(DEVICE, dtype).detach().requires_grad_() for x in inputs]
    # Copies, as SwiGLU's backward on CUDA writes over what it was given.
    out = call(*(x.clone() for x in given))
    out = (out,) if isinstance(out, Tensor) else out
    assert all(y.dtype == dtype for y in out)
    mix = [normal(*y.shape, seed=20 + i).to(DEVICE, dtype) for i, y in enumerate(out)]
    torch.autograd.backward(out, mix)
    angle = given[2:4] if len(inputs) > 3 else ()
    grads = (x.grad for x in given if all(x is not a for a in angle))
    return [y.detach().double().cpu() for y in (*out, *grads)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("case", CASES)
def test_equals_truth(case, dtype):
    """No further from fp64 than the reference in the same dtype is, plus 2e-6 of the largest value;
    in bf16 plus its rounding, 2^-8 (the interpreter cuts instead of rounding: 2^-7)."""
    name, inputs = CASES[case]
    ours, reference = CALLS[name]
    inputs = [x.to(dtype).double() for x in inputs]
    truth = run(reference, inputs, torch.float64)
    eager, mine = run(reference, inputs, dtype), run(ours, inputs, dtype)
    slack = (2**-7 if interpreted() else 2**-8) if dtype == torch.bfloat16 else 2e-6
    for i, (true, his, got) in enumerate(zip(truth, eager, mine, strict=True)):
        scale = max(true.abs().max().item(), 1e-30)
        error, allowed = (got - true).abs().max() / scale, (his - true).abs().max() / scale + slack
        assert error <= allowed, f"tensor {i}: {error:.2e} > {allowed:.2e}"


def test_gradients_by_finite_differences():
    cases = ("rms_norm", norm_inputs(3, 5)), ("add_rms_norm", (normal(3, 5), *norm_inputs(3, 5)))
    for name, inputs in cases:
        given = [x.clone().requires_grad_() for x in inputs]
        assert torch.autograd.gradcheck(CALLS[name][0], given)


def test_a_residual_stream_that_nobody_norms_again():
    """Only one of the two outputs is used: the other's gradient is zero."""
    x, delta, weight = (
        t.float().to(DEVICE) for t in (normal(4, 8), normal(4, 8, seed=1), normal(8, seed=2))
    )
    layers.add_rms_norm(x.requires_grad_(), delta, weight)[0].sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    frozen = x.detach().requires_grad_()
    layers.add_rms_norm(frozen, delta, weight)[1].sum().backward()
    truth = x.detach().double().requires_grad_()
    layers.reference_add_rms_norm(truth, delta.double(), weight.double())[1].sum().backward()
    torch.testing.assert_close(frozen.grad.double(), truth.grad, rtol=1e-5, atol=1e-5)


def test_slices_of_a_joint_projection_and_transposed_gradients():
    joint = normal(6, 5 * 8).float().to(DEVICE).requires_grad_()
    cos, sin = (t.float().to(DEVICE) for t in angles(6, 8))

    def split(x):
        return x[:, :24].unflatten(1, (3, 8)), x[:, 24:].unflatten(1, (2, 8))

    grads = []
    for call in CALLS["qk_norm_rope"]:
        q, k = call(
            *split(joint), cos, sin, torch.ones(8, device=DEVICE), torch.ones(8, device=DEVICE)
        )
        loss = (
            q.transpose(0, 1).flatten() * torch.arange(144.0, device=DEVICE)
        ).sum() + k.square().sum()
        grads.append(torch.autograd.grad(loss, joint)[0])
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-4)


def test_heads_of_a_vision_tower(monkeypatch):
    """bf16 queries and keys that are views of one (P, 3, heads, D) tensor, cos and sin in fp32: the
    kernel reads them where they are, and the result is the fp64 one, rounded."""
    joint = normal(6, 3, 2, 20).to(DEVICE, torch.bfloat16).requires_grad_()
    cos, sin = (t.float().to(DEVICE) for t in angles(6, 20))
    q, k, _ = joint.unbind(1)
    read = []
    kernel = layers._rope_kernel

    class Spy:
        def __getitem__(self, grid):
            def launch(q, k, *rest, **options):
                read.append((q.data_ptr(), k.data_ptr()))
                return kernel[grid](q, k, *rest, **options)

            return launch

    monkeypatch.setattr(layers, "_rope_kernel", Spy())
    turned = layers.qk_norm_rope(q, k, cos, sin)
    if CUDA or interpreted():
        assert read == [(q.data_ptr(), k.data_ptr())]
    mix = [normal(6, 2, 20, seed=i).to(DEVICE, torch.bfloat16) for i in (7, 8)]
    torch.autograd.backward(turned, mix)
    truth = joint.detach().double().requires_grad_()
    turned_truth = layers.reference_qk_norm_rope(*truth.unbind(1)[:2], cos.double(), sin.double())
    torch.autograd.backward(turned_truth, [m.double() for m in mix])
    slack = 2**-7 if interpreted() else 2**-8
    for ours, true in zip((*turned, joint.grad), (*turned_truth, truth.grad), strict=True):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours.double(), true, rtol=slack, atol=slack)


def test_swiglu_of_a_layer_under_checkpointing():
    """Where gate and up come from linear layers, writing over them in the backward changes nothing
    else."""
    from torch.utils.checkpoint import checkpoint

    gate, up = (torch.nn.Linear(8, 12, device=DEVICE) for _ in range(2))
    x = normal(5, 8).float().to(DEVICE).requires_grad_()
    learning = x, *gate.parameters(), *up.parameters()
    grads = []
    for call in (layers.swiglu, layers.reference_swiglu):

        def block(x, call=call):
            return call(gate(x), up(x))

        out = checkpoint(block, x, use_reentrant=False)
        grads.append(torch.autograd.grad(out.square().sum(), learning))
    for ours, true in zip(*grads, strict=True):
        torch.testing.assert_close(ours, true, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("one", [True, False])
def test_keys_and_values_are_written_to_their_places(one, normed, dtype):
    """one: queries, keys and values are parts of one product's output."""
    tokens, heads, kv_heads, width, places = 6, 4, 2, 20, 9
    inputs = rope_inputs(tokens, heads, kv_heads, width, normed)
    q, k, cos, sin, *weights = (x.to(DEVICE, dtype) for x in inputs)
    v, places_of = normal(tokens, kv_heads, width, seed=5).to(DEVICE, dtype), [0, 8, 3, 3, 1, 7]
    if one:
        q, k, v = torch.cat((q, k, v), 1).split((heads, kv_heads, kv_heads), 1)
    at = torch.tensor(places_of, device=DEVICE)
    caches = [
        normal(2, 3 * tokens, kv_heads, places, width, seed=6).to(DEVICE, dtype) for _ in range(2)
    ]
    rows = [cache[:, ::3] for cache in caches]  # a view, rows not contiguous
    before = [cache.clone() for cache in caches]
    arguments = (at, *weights)
    queries = layers.qk_norm_rope_write(q, k, v, cos, sin, *rows[0], *arguments)
    expected = layers.reference_qk_norm_rope_write(q, k, v, cos, sin, *rows[1], *arguments)
    slack = 2**-6 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(queries, expected, rtol=slack, atol=slack)
    torch.testing.assert_close(caches[0], caches[1], rtol=slack, atol=slack)
    changed = (caches[0] != before[0]).any(-1).any(2).nonzero()  # (cache, row, place)
    written = {(row, place) for _, row, place in changed.tolist()}
    assert written == {(3 * t, place) for t, place in enumerate(places_of)}
    assert torch.equal(rows[0][1][torch.arange(tokens), :, at], v)


def test_no_tokens():
    x = torch.zeros(0, 8, device=DEVICE, requires_grad=True)
    weight = torch.ones(8, device=DEVICE, requires_grad=True)
    layers.add_rms_norm(x, x, weight)[1].sum().backward()
    assert x.grad.shape == (0, 8) and (weight.grad == 0).all()
    assert layers.swiglu(x, x).shape == (0, 8)
    q = x.view(0, 2, 4)
    assert layers.qk_norm_rope(q, q, x[:, :4], x[:, :4])[1].shape == (0, 2, 4)


def test_caches_of_two_layouts_are_refused():
    if not (CUDA or interpreted()):
        pytest.skip("the reference takes any layout")
    q, cache = torch.zeros(1, 2, 4, device=DEVICE), torch.zeros(1, 2, 5, 4, device=DEVICE)
    with pytest.raises(ValueError, match="equal strides"):
        other, at = (
            cache.transpose(1, 2).contiguous().transpose(1, 2),
            torch.zeros(1, dtype=torch.int64),
        )
        layers.qk_norm_rope_write(q, q, q, q[:, 0], q[:, 0], cache, other, at)


def test_shapes_that_disagree_are_refused():
    x, cut, narrow = (torch.zeros(*shape, device=DEVICE) for shape in ((3, 8), (2, 8), (3, 4)))
    q, weight = x.view(3, 2, 4), torch.ones(8, device=DEVICE)
    for call, inputs in (
        (layers.rms_norm, (x, weight[:4])),
        (layers.rms_norm, (x, weight[:1])),
        (layers.add_rms_norm, (x, cut, weight)),
        (layers.add_rms_norm, (x, x, weight[:4])),
        (layers.swiglu, (x, cut)),
        (layers.swiglu, (x, x[:1])),
        (layers.qk_norm_rope, (q, q[:2], narrow, narrow)),
        (layers.qk_norm_rope, (q, q, narrow, narrow[:1])),
        (layers.qk_norm_rope, (q, q, narrow, narrow, weight[:4], weight)),
    ):
        with pytest.raises(ValueError, match="shapes must agree"):
            call(*inputs)
