"""optim.Optimizer against torch's own and closed forms: masters, images, sums in fp32, state by
name; schedules."""

import math
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from training import optim
from training.optim import KINDS, Optimizer, learning_rate

BLOCK = "decoder.layers.0.mlp.up_proj.weight"


def params(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return {
        "w": torch.nn.Parameter(torch.randn(5, 3).to(dtype)),
        "b": torch.nn.Parameter(torch.randn(4).to(dtype)),
        BLOCK: torch.nn.Parameter(torch.randn(6, 8).to(dtype)),
    }


def backward(table, seed, scale=1.0):
    """Give every parameter a random gradient, as a backward does: hooks run, and gradients add
    up."""
    generator = torch.Generator().manual_seed(seed)
    loss = 0.0
    for p in table.values():
        gradient = (torch.randn(p.shape, generator=generator) * scale).to(p.dtype)
        loss = loss + (p * gradient).sum()
    loss.backward()


def step(optimizer, lr, clip_norm=1e9):
    return optimizer.step(lr, clip_norm, loss=0.0, name="a step")


@pytest.mark.parametrize("vector_lr_scale", [1.0, 20.0])
def test_equals_torch_and_decays_matrices_only(vector_lr_scale):
    ours, theirs = params(), params()
    optimizer = Optimizer(
        ours.items(), weight_decay=0.1, betas=(0.9, 0.99), vector_lr_scale=vector_lr_scale
    )
    oracle = torch.optim.AdamW(
        [
            {"params": [theirs["w"], theirs[BLOCK]], "weight_decay": 0.1},
            {"params": [theirs["b"]], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.99),
        foreach=False,
    )
    for i in range(20):
        backward(ours, i)
        backward(theirs, i)
        for group, rate in zip(oracle.param_groups, (1.0, vector_lr_scale), strict=True):
            group["lr"] = 0.01 * (i + 1) * rate
        step(optimizer, 0.01 * (i + 1))
        oracle.step()
        oracle.zero_grad()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-7)
        assert ours[name].grad is None


def test_norm_clip_and_missing_gradients():
    ours, zeros = params(), params()
    a, b = Optimizer(ours.items()), Optimizer(zeros.items())
    for i in range(3):
        backward(ours, i, 100)
        backward(zeros, i, 100)
        if i == 1:  # a parameter that no batch touched is one with a zero gradient
            ours["w"].grad, zeros["w"].grad = None, torch.zeros(5, 3)
        expected = torch.stack([p.grad.norm() for p in zeros.values()]).norm().item()
        torch.nn.utils.clip_grad_norm_(zeros.values(), 1.0)
        assert step(a, 0.1, clip_norm=1.0) == pytest.approx(expected, rel=1e-6)
        step(b, 0.1)
    for name in ours:
        torch.testing.assert_close(ours[name], zeros[name], rtol=1e-5, atol=1e-6)


def test_a_clip_of_0_is_off():
    clipped, free = params(), params()
    a, b = Optimizer(clipped.items()), Optimizer(free.items())
    for i in range(3):
        backward(clipped, i, 100)
        backward(free, i, 100)
        assert step(a, 0.1, clip_norm=0.0) == step(b, 0.1, clip_norm=1e9)
    for name in clipped:
        assert torch.equal(clipped[name], free[name])


def test_small_updates_do_not_vanish_in_bf16():
    bf16 = params(torch.bfloat16)
    fp32 = {name: torch.nn.Parameter(p.detach().float()) for name, p in bf16.items()}
    start = bf16["w"].detach().clone()
    a, b = Optimizer(bf16.items()), Optimizer(fp32.items())
    for i in range(300):
        backward(bf16, i % 2)
        for name, master in a.masters.items():
            fp32[name].grad = master.grad.clone()
        step(a, 1e-4)
        step(b, 1e-4)
    for name in fp32:
        assert torch.equal(a.masters[name], fp32[name])
        assert torch.equal(bf16[name], fp32[name].to(torch.bfloat16))
    assert (bf16["w"] != start).float().mean() > 0.8
    assert torch.equal(
        start + torch.tensor(1e-4, dtype=torch.bfloat16), start
    )  # alone it would stand still


def test_gradients_of_many_passes_are_summed_in_fp32():
    """In bf16 a sum stops growing at 256 times its terms; and the gradient of a pass is freed at
    once."""
    p = torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    optimizer = Optimizer([("p", p)])
    for _ in range(1000):
        p.sum().backward()
        assert p.grad is None
    assert torch.equal(optimizer.masters["p"].grad, torch.full((3,), 1000.0))
    in_bf16 = torch.zeros(3, dtype=torch.bfloat16)
    for _ in range(1000):
        in_bf16 += 1
    assert in_bf16[0] == 256


def test_images_are_written_in_place():
    """A whole bf16 copy beside what learns: equal after each step, at the same address."""
    table = params()
    images = {name: p.detach().to(torch.bfloat16) for name, p in table.items()}
    addresses = {name: image.data_ptr() for name, image in images.items()}
    optimizer = Optimizer(table.items(), images)
    backward(table, 0)
    step(optimizer, 0.1)
    for name, image in images.items():
        assert (
            torch.equal(image, table[name].to(torch.bfloat16))
            and image.data_ptr() == addresses[name]
        )


@pytest.mark.parametrize("muon", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("done", [0, 3])
def test_state_goes_on_to_the_bit(dtype, muon, done):
    def run(table, optimizer, steps):
        for i in steps:
            backward(table, i)
            step(optimizer, 0.01)

    whole = params(dtype)
    run(whole, Optimizer(whole.items(), muon=muon), range(6))
    first = params(dtype)
    saved = Optimizer(first.items(), muon=muon)
    run(first, saved, range(done))
    state = {kind: {name: t.clone() for name, t in saved.state(kind)} for kind in KINDS}
    assert set(state["momentum_buffer"]) == ({BLOCK} if muon else set())
    second = params(dtype, seed=9)
    loaded = Optimizer(second.items(), muon=muon)
    loaded.load(lambda kind, name: state[kind][name], saved.updates)
    run(second, loaded, range(done, 6))
    for name in whole:
        assert torch.equal(whole[name], second[name])


def test_schedules():
    rates = [learning_rate(i, 110, 2.0, 10, "linear") for i in range(110)]
    assert rates[0] == pytest.approx(2 / 11) and rates[9] == pytest.approx(20 / 11)
    assert rates[10:65] == [2.0] * 55
    assert rates[95] == pytest.approx(2 * 0.15 / 0.45) and 0 < rates[109] < 0.07
    cosine = [learning_rate(i, 100, 1.0, 0, "cosine") for i in range(100)]
    assert cosine[0] == 1 and cosine[50] == pytest.approx(0.5) and 0 < cosine[99] < 0.001
    assert [learning_rate(i, 3, 0.5, 0, "constant") for i in range(3)] == [0.5] * 3
    assert learning_rate(0, 1, 1.0, 50, "cosine") > 0


@pytest.mark.parametrize(
    "loss, gradient", [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)]
)
def test_a_step_that_is_not_finite_changes_nothing(loss, gradient):
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = Optimizer([("p", p)])
    p.grad = torch.tensor([0.0, gradient, 0.0])
    with pytest.raises(FloatingPointError, match="step 7"):
        optimizer.step(0.1, 1.0, loss, "step 7")
    assert torch.equal(p.detach(), torch.ones(3)) and optimizer.updates == 0


def test_muon_moves_the_blocks_matrices_only():
    """Its step has the singular vectors of the gradient and singular values near 1, times .3
    sqrt(longer side)."""
    table = {name: torch.nn.Parameter(torch.zeros_like(p)) for name, p in params().items()}
    optimizer = Optimizer(table.items(), muon=True)
    matrix = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
    for name, p in table.items():
        p.grad = matrix.clone() if name == BLOCK else torch.ones_like(p)
    step(optimizer, lr=0.1)
    moved = -table[BLOCK].detach() / (0.1 * 0.3 * 8**0.5)
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    values = u.T @ moved @ vh.T
    assert (values - values.diag().diag()).abs().max() < 1e-5
    assert values.diag().min() > 0.5 and values.diag().max() < 1.3
    assert torch.allclose(table["w"], torch.full((5, 3), -0.1))  # Adam's first step is lr


@pytest.mark.parametrize("shape", [(6, 8), (24, 8), (8, 8)])
def test_muon_steps_as_torchs_does_in_bf16(shape):
    draw = torch.Generator().manual_seed(2)
    start = torch.randn(shape, generator=draw)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimizer = Optimizer([(BLOCK, ours)], weight_decay=0.1, muon=True)
    options = dict(lr=0.03, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    oracle = torch.optim.Muon([theirs], **options)
    for _ in range(3):
        gradient = torch.randn(shape, generator=draw)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        # The scale of ours is 1.5 in the schedule's unit.
        step(optimizer, lr=0.02)
        oracle.step()
    moved = (theirs - start).norm()
    # bf16 has 8 bits, and the iteration is steep.
    assert (ours - theirs).norm() < 0.02 * moved


@pytest.mark.parametrize(
    "shape, placements", [((4,), [Shard(0)]), ((2, 2), [Replicate(), Shard(0)])]
)
def test_the_cut_changes_nothing(shape, placements):
    """What each of four ranks does, in turn, behind a process group that sends nothing: AdamW is
    elementwise."""
    start = params()["w"].detach().repeat(2, 1)  # (10, 3), cut unevenly
    gradient = torch.randn(10, 3, generator=torch.Generator().manual_seed(2))

    def stepped(p, gradient):
        optimizer = Optimizer([("w", p)], compute_weights={}, weight_decay=0.1)
        p.grad = gradient
        for adamw in optimizer.optimizers:
            for group in adamw.param_groups:
                group["lr"] = 1e-3
            adamw.step()
        return optim.local(p)

    parts = []
    for rank in range(4):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=4)
        try:
            names = tuple(f"{axis} of rank {rank}" for axis in range(len(shape)))
            mesh = init_device_mesh(
                "cpu", shape, mesh_dim_names=names
            )  # equal ones share a rank's cache
            cut = partial(
                distribute_tensor, device_mesh=mesh, placements=placements, src_data_rank=None
            )
            parts.append(stepped(torch.nn.Parameter(cut(start.clone())), cut(gradient.clone())))
        finally:
            dist.destroy_process_group()
    wanted = stepped(torch.nn.Parameter(start.clone()), gradient.clone())
    copies = [torch.cat(parts)] if len(shape) == 1 else [torch.cat(parts[:2]), torch.cat(parts[2:])]
    for copy in copies:
        torch.testing.assert_close(copy, wanted, rtol=1e-6, atol=1e-8)
