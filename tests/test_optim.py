"""optim.AdamW against torch's own, and the closed forms of the schedules."""

import math

import pytest
import torch

import optim
from optim import KINDS, AdamW, learning_rate


def params(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return {
        "w": torch.nn.Parameter(torch.randn(5, 3).to(dtype)),
        "b": torch.nn.Parameter(torch.randn(4).to(dtype)),
    }


def set_grads(table, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    for p in table.values():
        p.grad = (torch.randn(p.shape, generator=generator) * scale).to(p.dtype)


def test_equals_torch_and_decays_matrices_only():
    ours, theirs = params(), params()
    optimizer = AdamW(ours.items(), weight_decay=0.1, betas=(0.9, 0.99))
    oracle = torch.optim.AdamW(
        [{"params": [theirs["w"]], "weight_decay": 0.1}, {"params": [theirs["b"]], "weight_decay": 0.0}],
        betas=(0.9, 0.99), foreach=False,
    )  # fmt: skip
    for step in range(20):
        set_grads(ours, step)
        set_grads(theirs, step)
        for group in oracle.param_groups:
            group["lr"] = 0.01 * (step + 1)
        optimizer.norm()
        optimizer.update(0.01 * (step + 1))
        oracle.step()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-7)
        assert ours[name].grad is None


def test_norm_clip_and_missing_gradients():
    ours, zeros = params(), params()
    a, b = AdamW(ours.items()), AdamW(zeros.items())
    for step in range(3):
        set_grads(ours, step, 100)
        set_grads(zeros, step, 100)
        if step == 1:  # a parameter that no batch touched is one with a zero gradient
            ours["w"].grad, zeros["w"].grad = None, torch.zeros(5, 3)
        norm = a.norm()
        expected = torch.nn.utils.clip_grad_norm_(zeros.values(), 1.0)
        assert norm == pytest.approx(expected.item(), rel=1e-6)
        b.norm()
        a.update(0.1, shrink=1 / norm)
        b.update(0.1)
    for name in ours:
        torch.testing.assert_close(ours[name], zeros[name], rtol=1e-5, atol=1e-6)
    ours["b"].grad = torch.tensor([0.0, math.nan, 0.0, 0.0])
    assert not math.isfinite(a.norm())


def test_small_updates_do_not_vanish_in_bf16():
    bf16, fp32 = params(torch.bfloat16), params()
    for name in fp32:
        fp32[name].data = bf16[name].data.float()
    start = bf16["w"].detach().clone()
    a, b = AdamW(bf16.items()), AdamW(fp32.items())
    for step in range(300):
        for table, optimizer in ((bf16, a), (fp32, b)):
            set_grads(table, step % 2)  # exact in bf16 only after rounding: give both the rounded one
            for p in table.values():
                p.grad = p.grad.to(torch.bfloat16).to(p.dtype)
            optimizer.norm()
            optimizer.update(1e-4)
    for name in fp32:
        torch.testing.assert_close(a.master[name], fp32[name], rtol=0, atol=0)
        torch.testing.assert_close(bf16[name], fp32[name].to(torch.bfloat16), rtol=0, atol=0)
    assert (bf16["w"] != start).float().mean() > 0.8
    assert torch.equal(
        start + torch.tensor(1e-4, dtype=torch.bfloat16), start
    )  # without a master it would stand still


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_goes_on_to_the_bit(dtype):
    def run(table, optimizer, steps):
        for step in steps:
            set_grads(table, step)
            optimizer.norm()
            optimizer.update(0.01)

    whole = params(dtype)
    run(whole, AdamW(whole.items()), range(6))
    first = params(dtype)
    saved = AdamW(first.items())
    run(first, saved, range(3))
    state = {kind: {name: t.clone() for name, t in saved.state(kind)} for kind in KINDS}
    second = params(dtype, seed=9)
    loaded = AdamW(second.items())
    loaded.load(lambda kind, name: state[kind][name], saved.updates)
    run(second, loaded, range(3, 6))
    for name in whole:
        assert torch.equal(whole[name], second[name])


def test_schedules():
    rates = [learning_rate(step, 110, 2.0, 10, "linear") for step in range(110)]
    assert rates[0] == pytest.approx(2 / 11) and rates[9] == pytest.approx(20 / 11)
    assert rates[10:80] == [2.0] * 70 and rates[95] == pytest.approx(2 * 0.15 / 0.3) and 0 < rates[109] < 0.07
    cosine = [learning_rate(step, 100, 1.0, 0, "cosine") for step in range(100)]
    assert cosine[0] == 1 and cosine[50] == pytest.approx(0.5) and 0 < cosine[99] < 0.001
    assert [learning_rate(step, 3, 0.5, 0, "constant") for step in range(3)] == [0.5] * 3
    assert learning_rate(0, 1, 1.0, 50, "cosine") > 0


@pytest.mark.parametrize(
    "loss, gradient", [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)]
)
def test_a_step_that_is_not_finite_changes_nothing(loss, gradient):
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = AdamW([("p", p)])
    p.grad = torch.tensor([0.0, gradient, 0.0])
    with pytest.raises(FloatingPointError, match="step 7"):
        optimizer.step(0.1, 1.0, loss, "step 7")
    assert torch.equal(p.detach(), torch.ones(3)) and optimizer.updates == 0


def test_orthogonal_matrices():
    """Newton-Schulz against the SVD: same singular vectors, singular values near 1."""
    for shape in ((16, 48), (48, 16), (24, 24)):
        matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        values = u.T @ optim.orthogonal(matrix) @ vh.T
        assert (values - values.diag().diag()).abs().max() < 1e-4
        assert 0.5 < values.diag()[s > 0.3].min() and values.diag().max() < 1.3


def test_muon_moves_the_blocks_matrices_only():
    names = ("decoder.layers.0.mlp.up_proj.weight", "decoder.layers.0.norm.weight", "decoder.embed.weight")
    shapes = ((8, 6), (6,), (10, 6))
    params = {n: torch.nn.Parameter(torch.zeros(shape)) for n, shape in zip(names, shapes, strict=True)}
    muon, adamw = (optim.AdamW(params.items(), muon=muon) for muon in (True, False))
    assert muon.muon == [names[0]] and adamw.muon == []
    matrix = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    for n, p in params.items():
        p.grad = matrix.clone() if n == names[0] else torch.ones_like(p)
    muon.step(lr=0.1, clip_norm=1e9, loss=0.0, name="step 1")
    step = -params[names[0]].detach() / (0.1 * optim.MUON_RATE * 8**0.5)
    assert (step - optim.orthogonal(matrix)).abs().max() < 1e-5  # the momentum's scale drops out
    assert torch.allclose(params[names[1]], torch.full((6,), -0.1))  # Adam's first step is lr
