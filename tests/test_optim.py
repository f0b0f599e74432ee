"""optim.AdamW against torch's own, and the closed forms of the schedules."""

import math

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

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


@pytest.mark.parametrize("vector_rate", [1.0, 20.0])
def test_equals_torch_and_decays_matrices_only(vector_rate):
    ours, theirs = params(), params()
    optimizer = AdamW(ours.items(), weight_decay=0.1, betas=(0.9, 0.99), vector_rate=vector_rate)
    oracle = torch.optim.AdamW(
        [{"params": [theirs["w"]], "weight_decay": 0.1}, {"params": [theirs["b"]], "weight_decay": 0.0}],
        betas=(0.9, 0.99), foreach=False,
    )  # fmt: skip
    for step in range(20):
        set_grads(ours, step)
        set_grads(theirs, step)
        for group, rate in zip(oracle.param_groups, (1.0, vector_rate), strict=True):
            group["lr"] = 0.01 * (step + 1) * rate
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
    assert rates[10:65] == [2.0] * 55
    assert rates[95] == pytest.approx(2 * 0.15 / 0.45) and 0 < rates[109] < 0.07
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


# ---- bf16 moments and stochastic rounding


def test_rounding_is_right_on_average_and_to_a_neighbour():
    wide = torch.randn(200, generator=torch.Generator().manual_seed(0)) * torch.logspace(-20, 3, 200)
    low, total = torch.empty(200, dtype=torch.bfloat16), torch.zeros(200, dtype=torch.double)
    near = wide.bfloat16().float()
    step = (wide.abs().view(torch.int32) & -0x10000).view(torch.float32) * 2.0**-7  # at most one bf16 step
    for draw in range(2000):
        optim.round_into(low, wide, optim.noise(f"a {draw}", 0, 200, "cpu"))
        assert ((low.float() - wide).abs() < step + 1e-30).all()
        total += low.double()
    # The mean of 2000 draws is off by at most half a step / sqrt(2000), times 5.
    assert ((total / 2000 - wide.double()).abs() <= 5 * step / 2 / 2000**0.5).all()
    assert (near - wide).abs().sum() > 0
    exact = near.clone()  # what bf16 can hold stays
    optim.round_into(low, exact, optim.noise("b", 0, 200, "cpu"))
    assert torch.equal(low.float(), exact)


def test_noise_is_uniform_and_counted_by_element():
    bits = optim.noise("key", 0, 200_000, "cpu")
    for shift in (0, 16):
        part = ((bits >> shift) & 0xFFFF).double() / 2**16
        assert abs(part.mean() - 0.5) < 0.005 and abs(part.var() - 1 / 12) < 0.002
        assert abs(((part[1:] - 0.5) * (part[:-1] - 0.5)).mean()) < 0.001
    assert torch.equal(optim.noise("key", 1234, 100, "cpu"), bits[1234:1334])
    assert (optim.noise("other", 0, 1000, "cpu") == bits[:1000]).sum() < 3


def test_updates_at_1e_6_do_not_vanish_and_follow_fp32():
    """Each gradient keeps its sign: fp32 Adam moves a weight by about lr a step. Rounded weights must be
    there on average; nearly all weights rounded to nearest would not have moved at all."""
    start = (torch.randn(64, 256, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    low, wide = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.float())
    rounded, exact = AdamW([("w", low)], rounding=True, seed=3), AdamW([("w", wide)])
    sign = torch.ones(64, 256)
    sign[:, ::2] = -1
    generator = torch.Generator().manual_seed(1)
    for _ in range(50):
        gradient = ((sign + torch.randn(sign.shape, generator=generator) * 0.3) * 1e-3).bfloat16()
        low.grad, wide.grad = gradient, gradient.float()
        for optimizer in (rounded, exact):
            optimizer.norm()
            optimizer.update(1e-6)
    assert {t.dtype for t in (rounded.master["w"], rounded.exp_avg["w"], rounded.exp_avg_sq["w"])} == {
        torch.bfloat16}  # fmt: skip
    moved, wanted = low.detach().double() - start.double(), wide.detach().double() - start.double()
    lost = (start + (wanted / 50).bfloat16() == start).double().mean()
    assert lost > 0.98  # a step alone is lost in a bf16 sum
    assert 0.2 < (moved != 0).double().mean() < 0.9  # about 50e-6 of steps of 6e-5 to 1.2e-4
    for half in (slice(0, None, 2), slice(1, None, 2)):
        assert moved[:, half].mean() == pytest.approx(wanted[:, half].mean().item(), rel=0.1)
    scale = exact.exp_avg_sq["w"].mean().item()
    assert rounded.exp_avg_sq["w"].float().mean().item() == pytest.approx(scale, rel=0.02)


def test_rounding_does_not_depend_on_the_bucket_and_goes_on_to_the_bit(monkeypatch):
    def run(steps, state=None):
        table = params(torch.bfloat16)
        optimizer = AdamW(table.items(), 0.1, rounding=True, seed=5)
        if state:
            optimizer.load(lambda kind, name: state[0][kind][name], state[1])
        for step in steps:
            set_grads(table, step)
            optimizer.norm()
            optimizer.update(1e-3)
        kept = {kind: {name: t.clone() for name, t in optimizer.state(kind)} for kind in KINDS}
        return table, (kept, optimizer.updates)

    whole, _ = run(range(4))
    again, _ = run(range(2, 4), run(range(2))[1])
    monkeypatch.setattr(optim, "BUCKET", 4)
    pieces, _ = run(range(4))
    for name in whole:
        assert torch.equal(whole[name], again[name]) and torch.equal(whole[name], pieces[name])


def test_buckets_change_no_bit_of_fp32_and_each_gradient_goes_when_used(monkeypatch):
    results = []
    for bucket in (2**24, 4):
        monkeypatch.setattr(optim, "BUCKET", bucket)
        table = params()
        optimizer = AdamW(table.items(), 0.1)
        alive = []

        def watch(*args, table=table, alive=alive, go_on=optim.adamw, **options):
            alive.append([name for name, p in table.items() if p.grad is not None])
            go_on(*args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(optim, "adamw", watch)
            for step in range(3):
                set_grads(table, step)
                optimizer.norm()
                optimizer.update(0.01, shrink=0.5)
        assert all(p.grad is None for p in table.values())
        results.append(({n: p.detach().clone() for n, p in table.items()}, alive))
    for name in params():
        torch.testing.assert_close(results[0][0][name], results[1][0][name], rtol=1e-6, atol=1e-7)
    assert results[1][1][:5] == [["w", "b"]] * 4 + [["b"]]  # 15 elements of w by four, then b alone


@pytest.mark.parametrize("shape, placements", [((4,), [Shard(0)]), ((2, 2), [Replicate(), Shard(0)])])
def test_rounding_does_not_depend_on_the_cut(shape, placements):
    """What each of four ranks does, in turn: a process group that sends nothing."""
    whole = torch.nn.Parameter(params(torch.bfloat16)["w"].detach().repeat(2, 1))  # (10, 3), cut unevenly

    def stepped(p):
        optimizer = AdamW([("w", p)], rounding=True, seed=5)
        gradient = torch.randn(10, 3, generator=torch.Generator().manual_seed(2)).bfloat16()
        p.grad = gradient if p is whole else distribute_tensor(
            gradient, p.device_mesh, placements, src_data_rank=None)  # fmt: skip
        optimizer.update(1e-3)
        return optim.local(p)

    parts = []
    for rank in range(4):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=4)
        try:
            names = tuple(f"{axis} of rank {rank}" for axis in range(len(shape)))
            mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)  # equal ones share a rank's cache
            cut = distribute_tensor(whole.detach().clone(), mesh, placements, src_data_rank=None)
            parts.append(stepped(torch.nn.Parameter(cut)))
        finally:
            dist.destroy_process_group()
    wanted = stepped(whole)
    copies = [torch.cat(parts)] if len(shape) == 1 else [torch.cat(parts[:2]), torch.cat(parts[2:])]
    assert all(torch.equal(copy, wanted) for copy in copies)


def test_muon_refuses_rounding():
    with pytest.raises(ValueError, match="--rounding"):
        AdamW(params().items(), muon=True, rounding=True)
