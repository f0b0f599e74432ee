"""Activation checkpointing and the product's own autograd functions.

A backward under non-reentrant checkpointing may unpack its saved tensors once: each unpacking finds
what the block's second forward has just computed. A function that reads `ctx.saved_tensors` twice
is right in every other test, and ends a GPU run in its first backward. On a CPU most calls take
their reference, which hides that, so test_compile_gate.py runs the cases below a second time, under
TRITON_INTERPRET=1. On a GPU they test whatever a GPU takes, another library's functions among them.
"""

import importlib
import pkgutil
from functools import partial

import pytest
import torch
from commands import finish, flags, metrics, start
from interpreter import needs_interpreter
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import kernels
import model
from kernels import interpreted
from kernels.gated_norm import gated_norm
from kernels.layers import add_rms_norm, qk_norm_rope, rms_norm, swiglu
from kernels.linear_logprob import linear_logprob
from kernels.packed_attention import gather_rows
from kernels.policy_loss import FUSED_SURROGATES, LOSSES, policy_loss
from kernels.short_conv import short_conv

CUDA = torch.cuda.is_available() and not interpreted()
DEVICE = "cuda" if CUDA else "cpu"


def normal(*shape, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rotated(q, k, *weights):
    angle = normal(len(q), q.shape[-1] // 2, seed=8).repeat(1, 2).to(q)
    return qk_norm_rope(q, k, angle.cos(), angle.sin(), *weights)


def logprobs(hidden, weight):
    targets = torch.arange(len(hidden), device=hidden.device) % len(weight)
    return linear_logprob(hidden, weight, targets)


def loss_of(kind, logprob):
    starts = torch.tensor([0, 3, len(logprob)], device=logprob.device)
    advantage = torch.tensor([1.0, -0.5], device=logprob.device)
    old = logprob.detach() - 0.1
    loss, _ = policy_loss(
        logprob, old, advantage, starts, kind=kind, ref_logprob=old, kl=0.1, max_tokens=9
    )
    return loss


FUSED = [kind for kind, loss in LOSSES.items() if loss.surrogate in FUSED_SURROGATES]


def read_twice(rows):
    return gather_rows(rows, torch.arange(len(rows), device=rows.device).repeat(2))


def convolved(x, weight):
    before = torch.tensor([0, 1, 2, 0, 1, 2, 3], device=x.device)
    return short_conv(x, weight, before)


HEADS = normal(5, 4, 8, seed=0), normal(5, 2, 8, seed=1)
# Name: (call, its differentiable inputs). A new autograd function needs a call here that comes by
# it.
CASES = {
    "rms_norm": (rms_norm, [normal(5, 16, seed=0), normal(16, seed=1)]),
    "add_rms_norm": (
        add_rms_norm,
        [normal(5, 16, seed=0), normal(5, 16, seed=1), normal(16, seed=2)],
    ),
    "swiglu": (swiglu, [normal(5, 24, seed=0), normal(5, 24, seed=1)]),
    "rope": (rotated, [*HEADS]),
    "qk_norm_rope": (rotated, [*HEADS, normal(8, seed=2), normal(8, seed=3)]),
    "short_conv": (convolved, [normal(7, 12, seed=0), normal(12, 4, seed=1)]),
    "gated_norm": (
        gated_norm,
        [normal(5, 3, 16, seed=0), normal(5, 3, 16, seed=1), normal(16, seed=2)],
    ),
    "gather_rows": (read_twice, [normal(5, 8, seed=0)]),
    "linear_logprob": (logprobs, [normal(6, 16, seed=0), normal(40, 16, seed=1)]),
    **{f"policy_loss {kind}": (partial(loss_of, kind), [normal(7, seed=0)]) for kind in FUSED},
}


def run(call, inputs, checkpointed: bool) -> tuple[list[Tensor], set[str]]:
    """Gradients of the inputs, and the names of the autograd functions that were on the way to
    them."""
    given = [x.to(DEVICE).detach().requires_grad_() for x in inputs]
    if checkpointed:  # with the flags of the model's own blocks
        call = partial(checkpoint, call, use_reentrant=False, preserve_rng_state=False)
    out = call(*given)
    outputs = [out] if isinstance(out, Tensor) else list(out)
    mix = [normal(*y.shape, seed=20 + i).to(y) for i, y in enumerate(outputs)]
    torch.autograd.backward(outputs, mix)
    return [x.grad for x in given], nodes(outputs)


def nodes(outputs: list[Tensor]) -> set[str]:
    """Names of all nodes of the graph behind the outputs."""
    found, names = [y.grad_fn for y in outputs], set()
    while found:
        node = found.pop()
        if node is not None:
            names.add(node.name())
            found += [before for before, _ in node.next_functions]
    return names


def own_functions() -> set[str]:
    """The nodes' names of every autograd.Function that kernels/ and model/ define."""
    for package in (kernels, model):
        for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
            importlib.import_module(module.name)
    classes = torch.autograd.Function.__subclasses__()
    return {
        f"{c.__name__}Backward" for c in classes if c.__module__.startswith(("kernels.", "model."))
    }


@pytest.mark.parametrize("case", CASES)
def test_a_function_has_the_same_gradients(case):
    plain, _ = run(*CASES[case], checkpointed=False)
    again, _ = run(*CASES[case], checkpointed=True)
    for wanted, found in zip(plain, again, strict=True):
        assert wanted.abs().max() > 0
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(
    not interpreted(), reason="without TRITON_INTERPRET=1 references stand in for some functions"
)
def test_every_function_of_ours_has_a_case():
    reached = set()
    for case in CASES.values():
        reached |= run(*case, checkpointed=False)[1]
    missing = own_functions() - reached
    assert not missing, f"CASES needs a call that comes by {missing}"


# ---- A step of both scripts

SCRIPTS = {
    "train_sft.py": dict(data="rows.jsonl", batch=2),
    # cispo: where all lengths are equal, the other losses are 0 before the first update.
    "train_rl.py": dict(
        data="numbers.jsonl",
        prompts=2,
        group=8,
        max_new_tokens=1,
        filter="none",
        loss="cispo",
        kl=0.05,
    ),
}


@needs_interpreter
@pytest.mark.parametrize("script", SCRIPTS)
def test_commands_on_triton_with_checkpointing(script, tiny_home, tmp_path):
    """What every GPU run does in its first step, against the references without checkpointing, in
    fp32."""
    options = SCRIPTS[script] | dict(model=tiny_home / "tiny", steps=1)
    options["data"] = tiny_home / "scenes" / options["data"]
    plain, triton = tmp_path / "plain", tmp_path / "triton"
    finish(
        start(script, *flags(options | dict(out=plain, checkpointing="never"))),
        start(
            script, *flags(options | dict(out=triton, checkpointing="always")), TRITON_INTERPRET="1"
        ),
    )
    (wanted,), (found,) = metrics(plain), metrics(triton)
    assert wanted["grad_norm"] > 0, "no completion earned anything: take another --seed"
    for name in {
        "loss",
        "loss_text",
        "loss_head",
        "grad_norm",
        "entropy",
        "reward",
    } & wanted.keys():
        assert found[name] == pytest.approx(wanted[name], rel=1e-5, abs=1e-6), name
