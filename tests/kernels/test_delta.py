"""The gated delta net's kernels against a loop over tokens in fp64, and a convolution a sequence."""

import pytest
import torch
import torch.nn.functional as F

from kernels import interpreted
from kernels.delta_rule import Chunks, delta_rule, why_not_train
from kernels.delta_step import StepWeights, delta_step
from kernels.gated_norm import gated_norm
from kernels.short_conv import reference_short_conv, short_conv

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def unit(x):
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def token_by_token(q, k, v, g, beta, lengths, state):
    """The recurrence of kernels/delta_rule.py's header, as it stands there."""
    repeat = v.shape[1] // k.shape[1]
    q = unit(q).repeat_interleave(repeat, 1) / q.shape[-1] ** 0.5
    k = unit(k).repeat_interleave(repeat, 1)
    out = []
    finals = []
    t = 0
    for sequence, length in enumerate(lengths):
        S = state[sequence]  # (V, D, E)
        for _ in range(length):
            S = g[t].exp()[:, None, None] * S
            u = beta[t][:, None] * (v[t] - torch.einsum("vde,vd->ve", S, k[t]))
            S = S + torch.einsum("vd,ve->vde", k[t], u)
            out.append(torch.einsum("vde,vd->ve", S, q[t]))
            t += 1
        finals.append(S)
    return torch.stack(out), torch.stack(finals)


def rule_inputs(lengths, key_heads, value_heads, D=12, E=20):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    T = sum(lengths)
    q = normal(T, key_heads, D)
    k = normal(T, key_heads, D)
    v = normal(T, value_heads, E)
    # Heads that forget at once, and heads that hardly do.
    speed = torch.logspace(-3, 1, value_heads, dtype=torch.float64)
    g = -F.softplus(normal(T, value_heads)) * speed
    beta = normal(T, value_heads).sigmoid()
    state = normal(len(lengths), value_heads, D, E)
    return [x.requires_grad_() for x in (q, k, v, g, beta, state)]


@pytest.mark.parametrize("heads", [(2, 2), (2, 4), (1, 3)])
@pytest.mark.parametrize("lengths", [(1,), (64,), (3, 130, 0, 65, 64, 1)])
def test_chunks_equal_the_recurrence(lengths, heads):
    inputs = rule_inputs(lengths, *heads)
    truth = token_by_token(*inputs[:5], lengths, inputs[5])
    found = delta_rule(*inputs[:5], Chunks(list(lengths), torch.device("cpu")), inputs[5])
    weights = [torch.randn_like(x) for x in truth]
    for a, b in zip(found, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    grads = []
    for out in (found, truth):
        loss = sum((x * w).sum() for x, w in zip(out, weights, strict=True))
        grads.append(torch.autograd.grad(loss, inputs))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def test_in_fp32_and_from_zero():
    lengths = [70, 5, 64]
    inputs = [x.detach() for x in rule_inputs(lengths, 2, 6)[:5]]
    zeros = torch.zeros(3, 6, 12, 20, dtype=torch.float64)
    truth, final = token_by_token(*inputs, lengths, zeros)
    chunks = Chunks(lengths, torch.device(DEVICE))
    out, state = delta_rule(*(x.float().to(DEVICE) for x in inputs), chunks)
    assert state.dtype == torch.float32
    tolerance = 1e-5 if DEVICE == "cpu" else 1e-2  # fla solves in TF32
    torch.testing.assert_close(out.double().cpu(), truth, rtol=0, atol=tolerance)
    torch.testing.assert_close(state.double().cpu(), final, rtol=0, atol=tolerance)


def test_no_sequence_reads_another():
    """The gradient and the outputs of one with respect to the other are exactly 0."""
    inputs = rule_inputs((70, 80), 2, 4)
    chunks = Chunks([70, 80], torch.device("cpu"))
    out, _ = delta_rule(*inputs[:5], chunks)
    grads = torch.autograd.grad(out[70:].square().sum(), inputs[:5])
    assert all((grad[:70] == 0).all() and (grad[70:] != 0).any() for grad in grads)


# ---- The convolution


def conv_of_each(x, weight, lengths):
    """torch's own convolution of each sequence, padded in front."""
    out = []
    for rows in x.split(lengths):
        padded = F.pad(rows.T[None], (weight.shape[1] - 1, 0))
        out.append(F.silu(F.conv1d(padded, weight[:, None], groups=len(weight)))[0].T)
    return torch.cat(out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("channels", [3, 70])
def test_short_conv_equals_a_convolution_a_sequence(channels, dtype):
    if dtype == torch.bfloat16 and interpreted():
        pytest.skip("the interpreter has no bf16")
    torch.manual_seed(0)
    lengths = [1, 2, 40, 3, 17]
    x = torch.randn(sum(lengths), channels, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(channels, 4, dtype=torch.float64, requires_grad=True)
    before = torch.cat([torch.arange(length) for length in lengths])
    truth = conv_of_each(x, weight, lengths)
    d_out = torch.randn_like(truth)
    truth_grads = torch.autograd.grad(truth, (x, weight), d_out)

    mine = [t.detach().to(DEVICE, dtype).requires_grad_() for t in (x, weight)]
    found = short_conv(*mine, before.to(DEVICE))
    grads = torch.autograd.grad(found, mine, d_out.to(DEVICE, dtype))
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 0.05}[dtype]
    torch.testing.assert_close(found.double().cpu(), truth, rtol=tolerance, atol=tolerance)
    for a, b in zip(grads, truth_grads, strict=True):
        torch.testing.assert_close(a.double().cpu(), b, rtol=tolerance, atol=8 * tolerance)


def test_the_reference_is_differentiable_twice_over():
    x = torch.randn(9, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    before = torch.tensor([0, 1, 2, 3, 0, 1, 0, 1, 2])
    assert torch.autograd.gradcheck(lambda *a: reference_short_conv(*a, before), (x, weight))


# ---- The gated norm


@pytest.mark.parametrize("width", [20, 128])
def test_gated_norm_equals_autograd_in_fp64(width):
    torch.manual_seed(0)
    shapes = ((7, 3, width), (7, 3, width), (width,))
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    x, z, weight = inputs
    truth = weight * F.rms_norm(x, (width,), None, 1e-6) * F.silu(z)
    d_out = torch.randn_like(truth)
    truth_grads = torch.autograd.grad(truth, inputs, d_out)
    mine = [t.detach().float().to(DEVICE).requires_grad_() for t in inputs]
    found = gated_norm(*mine)
    grads = torch.autograd.grad(found, mine, d_out.float().to(DEVICE))
    for a, b in zip((found, *grads), (truth, *truth_grads), strict=True):
        torch.testing.assert_close(a.double().cpu(), b, rtol=1e-5, atol=1e-5)


# ---- The decode step


@pytest.mark.parametrize("heads", [(2, 4), (1, 3), (2, 2)])
def test_steps_equal_the_recurrence(heads):
    """Twelve tokens one by one, behind a prompt of two; one slot ends early and stays as it is."""
    key_heads, value_heads = heads
    D, E, taps, tokens, slots = 12, 20, 4, 12, 3
    C = 2 * key_heads * D + value_heads * E
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    rows = normal(2 + tokens, slots, C)
    z = normal(tokens, slots, value_heads, E)
    b = normal(tokens, slots, value_heads)
    a = normal(tokens, slots, value_heads)
    weights = StepWeights(
        normal(C, taps), normal(value_heads), normal(value_heads), normal(E), 1e-6, key_heads
    )
    state = normal(slots, value_heads, D, E)
    first_state = state.clone()
    # Tokens -2 and -1 of a slot stand in rows 2 and 3 of its ring; row 1 is before the start.
    ring = torch.zeros(slots, taps, C)
    ring[:, 2:] = rows[:2].transpose(0, 1)

    truth = []
    for slot in range(slots):
        m = conv_of_each(rows[:, slot].double(), weights.conv.double(), [2 + tokens])[2:]
        q, k, v = m.split((key_heads * D, key_heads * D, value_heads * E), -1)
        g = -weights.A_log.double().exp() * F.softplus(a[:, slot].double() + weights.dt_bias)
        out, final = token_by_token(
            q.unflatten(-1, (-1, D)),
            k.unflatten(-1, (-1, D)),
            v.unflatten(-1, (-1, E)),
            g,
            b[:, slot].double().sigmoid(),
            [tokens],
            first_state[slot : slot + 1].double(),
        )
        scale = (out.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        gated = weights.norm * out * scale * F.silu(z[:, slot].double())
        truth.append((gated.flatten(1), final[0]))

    device = torch.device(DEVICE)
    moved = {k: v.to(device) if torch.is_tensor(v) else v for k, v in vars(weights).items()}
    weights = StepWeights(**moved)
    state = state.to(device)
    ring = ring.to(device)
    ended = torch.zeros(slots, dtype=torch.bool, device=device)
    for t in range(tokens):
        if t == 5:
            ended[1] = True
            stopped = state[1].clone(), ring[1].clone()
        place = torch.full((slots,), t, device=device)
        # As parts of one product, whose rows are longer than theirs.
        joint = torch.cat((rows[2 + t], z[t].flatten(1), b[t], a[t]), 1).to(device)
        mixed, gate, b_t, a_t = joint.split((C, value_heads * E, value_heads, value_heads), 1)
        y = delta_step(
            mixed, gate.unflatten(1, (-1, E)), b_t, a_t, weights, state, ring, place, ended
        )
        for slot in range(slots):
            if not ended[slot]:
                expected = truth[slot][0][t]
                torch.testing.assert_close(y[slot].double().cpu(), expected, rtol=1e-4, atol=1e-4)
    for slot in (0, 2):
        torch.testing.assert_close(state[slot].double().cpu(), truth[slot][1], rtol=0, atol=2e-5)
    assert torch.equal(state[1], stopped[0]) and torch.equal(ring[1], stopped[1])


@pytest.mark.parametrize(
    "version, major, refused",
    [("3.6.0", 9, True), ("3.7.0", 9, True), ("3.7.1", 9, False), ("3.6.0", 10, False)],
)
def test_training_by_fla_is_refused_where_its_backward_is_wrong(
    version, major, refused, monkeypatch
):
    monkeypatch.setattr("kernels.delta_rule.fla_rule", lambda: object())
    monkeypatch.setattr("kernels.delta_rule.triton.__version__", version)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
    assert bool(why_not_train(torch.device("cuda"))) == refused
    assert why_not_train(torch.device("cpu")) is None
