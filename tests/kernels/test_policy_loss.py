"""policy_loss: the formula token by token, gradients, micro-batches, fp32, a fork's own loss."""

import inspect
import math

import pytest
import torch

from kernels import interpreted
from kernels.policy_loss import LOSSES, Loss, policy_loss, reference_policy_loss

DEVICE = "cuda" if torch.cuda.is_available() and not interpreted() else "cpu"
KINDS = ("dapo", "grpo", "dr_grpo", "gspo", "cispo", "sapo")
# The clips of the papers. CISPO has no lower one.
PAPER = {
    "dapo": (0.2, 0.3),
    "grpo": (0.2, 0.2),
    "dr_grpo": (0.2, 0.2),
    "gspo": (3e-4, 4e-4),
    "cispo": (1.0, 5.0),
    "sapo": (1.0, math.inf),  # has none
}
needs_triton = pytest.mark.skipif(
    not (DEVICE == "cuda" or interpreted()), reason="needs a GPU, or TRITON_INTERPRET=1"
)


def make(lengths=(3, 0, 5, 1, 7), dtype=torch.float64, seed=0, spread=0.4):
    g = torch.Generator().manual_seed(seed)
    cu = torch.tensor([0, *lengths]).cumsum(0)
    t = int(cu[-1])
    logprob = -torch.rand(t, generator=g, dtype=torch.float64) * 3
    old, ref, rollout = (
        logprob + torch.randn(t, generator=g, dtype=torch.float64) * spread for _ in range(3)
    )
    advantage = torch.randn(len(lengths), generator=g, dtype=torch.float64)
    args = [x.to(DEVICE, dtype) for x in (logprob, old, advantage)]
    others = dict(ref_logprob=ref.to(DEVICE, dtype), rollout_logprob=rollout.to(DEVICE, dtype))
    return [*args, cu.to(DEVICE)], others


def token_loss(kind, r, A, logprob, clips, dual_clip):
    """The loss of one token, and whether the low and the high clip bind."""
    low = 1 - clips[0]
    high = 1 + clips[1]
    if kind == "cispo":
        return -min(r, high) * A * logprob, False, r > high
    if kind == "sapo":
        tau = 1.0 if A > 0 else 1.05
        return -4 / tau / (1 + math.exp(-tau * (r - 1))) * A, False, False
    clip = min(max(r, low), high)
    loss = max(-r * A, -clip * A)
    if dual_clip is not None and kind != "gspo" and A < 0:
        loss = min(loss, -dual_clip * A)
    return loss, A < 0 and r < low, A > 0 and r > high


def oracle(
    logprob,
    old,
    advantage,
    cu,
    kind,
    clip_low=None,
    clip_high=None,
    dual_clip=3.0,
    ref_logprob=None,
    kl=0.0,
    rollout_logprob=None,
    rollout_cap=2.0,
    max_tokens=None,
    denominator=None,
):
    """One token at a time, in Python floats, straight from DESIGN.md."""
    low, high = PAPER[kind]
    clips = (low if clip_low is None else clip_low, high if clip_high is None else clip_high)
    lp = logprob.tolist()
    old = old.tolist()
    cu = cu.tolist()
    total = 0.0
    clipped_low = 0
    clipped_high = 0
    ratios = [0.0]
    for s, A in enumerate(advantage.tolist()):
        tokens = range(cu[s], cu[s + 1])
        mean = sum(lp[t] - old[t] for t in tokens) / max(len(tokens), 1)
        for t in tokens:
            r = math.exp(mean if kind == "gspo" else lp[t] - old[t])
            ratios.append(r)
            loss, is_low, is_high = token_loss(kind, r, A, lp[t], clips, dual_clip)
            clipped_low += is_low
            clipped_high += is_high
            if rollout_logprob is not None:
                loss *= min(math.exp(old[t] - rollout_logprob[t].item()), rollout_cap)
            if ref_logprob is not None:
                d = ref_logprob[t].item() - lp[t]
                loss += kl * (math.exp(d) - d - 1)
            total += loss / (len(tokens) if kind in ("grpo", "gspo", "sapo") else 1)
    default = len(lp) if kind in ("dapo", "cispo") else len(advantage)
    denominator = (denominator or default) * (max_tokens if kind == "dr_grpo" else 1)
    metrics = dict(clip_low=clipped_low, clip_high=clipped_high)
    metrics = {name: count / len(lp) for name, count in metrics.items()}
    return total / denominator, metrics | dict(ratio_max=max(ratios))


def mean_k3(d):
    return (d.exp() - d - 1).mean().item()


OPTIONS = [
    dict(),
    dict(dual_clip=None),
    dict(kl=0.1, clip_low=0.05, clip_high=0.1, rollout_cap=1.1, denominator=37.0),
]


@pytest.mark.parametrize("extra", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_formula(kind, options, extra):
    args, logprobs = make(spread=1.0)
    options = dict(options, kind=kind, max_tokens=9 if kind == "dr_grpo" else None)
    if extra:
        options |= logprobs
    else:
        options.pop("kl", None)
    loss, metrics = policy_loss(*args, **options)
    true, parts = oracle(*args, **options)
    assert loss.item() == pytest.approx(true, rel=1e-12)
    for name, value in parts.items():
        assert metrics[name].item() == pytest.approx(value, rel=1e-6, abs=1e-9), name
    kl = mean_k3(logprobs["ref_logprob"] - args[0]) if extra else 0
    mismatch = mean_k3(args[1] - logprobs["rollout_logprob"]) if extra else 0
    assert metrics["kl"].item() == pytest.approx(kl, rel=1e-6)
    assert metrics["mismatch_kl"].item() == pytest.approx(mismatch, rel=1e-6)
    assert metrics["tokens"].item() == 16
    assert all(m.ndim == 0 and not m.requires_grad for m in metrics.values())


def test_the_table_has_the_papers_clips():
    for kind, clips in PAPER.items():
        assert (LOSSES[kind].clip_low, LOSSES[kind].clip_high) == clips


def test_cispo_is_not_clipped_from_below():
    logprob = torch.tensor([-30.0, -1.0], device=DEVICE, requires_grad=True)
    old = torch.tensor([-1.0, -5.0], device=DEVICE)
    cu = torch.tensor([0, 1, 2], device=DEVICE)
    loss, metrics = policy_loss(logprob, old, torch.ones(2, device=DEVICE), cu, kind="cispo")
    loss.backward()
    assert metrics["clip_low"] == 0 and metrics["clip_high"] == 0.5
    assert logprob.grad.tolist() == pytest.approx([-math.exp(-29) / 2, -6.0 / 2])


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_equals_the_numeric_one(kind):
    """cispo's weight carries no gradient, so there the ratio is held at its value."""
    args, logprobs = make(spread=1.0, seed=3)
    options = dict(kind=kind, kl=0.1, max_tokens=9, clip_low=0.2, clip_high=0.3, **logprobs)
    logprob = args[0].requires_grad_()
    policy_loss(logprob, *args[1:], **options)[0].backward()
    if kind == "cispo":
        A = args[2].repeat_interleave(args[3].diff())
        w = (args[1] - logprobs["rollout_logprob"]).exp().clamp(max=2)
        d = logprobs["ref_logprob"] - logprob.detach()
        true = -(logprob.detach() - args[1]).exp().clamp(max=1.3) * A * w - 0.1 * (d.exp() - 1)
        torch.testing.assert_close(logprob.grad, true / 16)
        return

    def loss_of(x):
        return policy_loss(x, *args[1:], **options)[0]

    assert torch.autograd.gradcheck(loss_of, (args[0],), nondet_tol=1e-12)


@pytest.mark.parametrize("extra", [False, True])
@pytest.mark.parametrize("lengths", [(1,), (3, 0, 5, 1, 7), (0, 90, 31, 0, 0, 157, 1)])
@pytest.mark.parametrize("kind", KINDS)
def test_fp32_is_as_exact_as_eager(kind, lengths, extra):
    """Loss, gradient and metrics against fp64: Triton's on a GPU or interpreted, else the
    reference's."""

    def run(f, dtype):
        args, logprobs = make(lengths, torch.float32, seed=5, spread=0.8)
        new, old, advantage, cu, *rest = (
            x.to(x.dtype if x.dtype == torch.int64 else dtype) for x in (*args, *logprobs.values())
        )
        options = dict(kl=0.1, **dict(zip(logprobs, rest, strict=True))) if extra else {}
        loss, metrics = f(
            new.requires_grad_(), old, advantage, cu, kind=kind, max_tokens=300, **options
        )
        (loss * 3).backward()
        return {
            k: v.detach().double().cpu()
            for k, v in (("loss", loss), ("gradient", new.grad), *metrics.items())
        }

    truth, eager = (
        run(reference_policy_loss, torch.float64),
        run(reference_policy_loss, torch.float32),
    )
    ours, again = run(policy_loss, torch.float32), run(policy_loss, torch.float32)
    for name, true in truth.items():
        allowed = (eager[name] - true).abs().max() + 2e-6 * true.abs().max()
        assert (ours[name] - true).abs().max() <= allowed, name
        assert torch.equal(ours[name], again[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_on_policy_gradient_is_the_plain_one(kind):
    """old = the pass itself, detached: r = 1 everywhere, on no clip's flat side."""
    args, _ = make((4, 4))
    logprob = args[0].requires_grad_()
    policy_loss(logprob, logprob, *args[2:], kind=kind, max_tokens=4, clip_low=0.0, clip_high=0.0)[
        0
    ].backward()
    expected = -args[2].repeat_interleave(4) / 8
    torch.testing.assert_close(logprob.grad, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_add_up(kind):
    (logprob, old, advantage, cu), logprobs = make((3, 2, 5, 1, 7, 4))
    options = dict(kind=kind, kl=0.05, max_tokens=9)
    logprob.requires_grad_()
    whole, metrics = policy_loss(logprob, old, advantage, cu, **options, **logprobs)
    whole.backward()
    gradient, parts, means = logprob.grad.clone(), 0.0, dict.fromkeys(metrics, 0.0)
    logprob.grad = None
    for a, b in ((0, 2), (2, 6)):
        t = slice(int(cu[a]), int(cu[b]))
        loss, m = policy_loss(
            logprob[t],
            old[t],
            advantage[a:b],
            cu[a : b + 1] - cu[a],
            **options,
            **{k: x[t] for k, x in logprobs.items()},
            denominator=torch.tensor(22.0 if kind in ("dapo", "cispo") else 6.0),
        )
        loss.backward()
        parts, means = parts + loss.detach(), {k: means[k] + m[k] * m["tokens"] for k in m}
    torch.testing.assert_close(parts, whole.detach())
    torch.testing.assert_close(logprob.grad, gradient)
    for k in ("kl", "clip_low", "clip_high", "mismatch_kl"):
        torch.testing.assert_close(means[k] / 22, metrics[k])


@pytest.mark.parametrize("kind", KINDS)
def test_huge_ratios_stay_finite(kind):
    """Far off the policy: a clipped token's gradient is 0, not inf * 0; nan is passed on."""

    def on(values):
        return torch.tensor(values, device=DEVICE)

    logprob = on([-1.0, -1.0, -300.0, -300.0]).requires_grad_()
    old, advantage = on([-300.0, -300.0, -1.0, -1.0]), on([1.0, -1.0, 0.0, -1.0])
    cu = on([0, 1, 2, 3, 4])
    loss, metrics = policy_loss(
        logprob, old, advantage, cu, kind=kind, max_tokens=1, rollout_logprob=old - 500
    )
    loss.backward()
    assert (
        loss.isfinite()
        and logprob.grad.isfinite().all()
        and all(m.isfinite() for m in metrics.values())
    )
    assert kind == "cispo" or logprob.grad[0] == 0
    broken = policy_loss(
        logprob.detach().index_fill(0, on(2), torch.nan),
        old,
        advantage,
        cu,
        kind=kind,
        max_tokens=1,
    )
    assert broken[0].isnan()


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_to_learn_from(kind):
    for sequences in (0, 3):
        logprob = torch.zeros(0, device=DEVICE, requires_grad=True)
        loss, metrics = policy_loss(
            logprob,
            torch.zeros(0, device=DEVICE),
            torch.zeros(sequences, device=DEVICE),
            torch.zeros(sequences + 1, dtype=torch.int64, device=DEVICE),
            kind=kind,
            max_tokens=4,
        )
        loss.backward()
        assert loss == 0 and logprob.grad.shape == (0,) and all(m == 0 for m in metrics.values())


def test_constants_get_no_gradient_and_bf16_is_widened():
    args, logprobs = make(dtype=torch.bfloat16)
    for x in (*args[:3], *logprobs.values()):
        x.requires_grad_()
    loss, _ = policy_loss(*args, kl=0.1, **logprobs)
    loss.backward()
    assert loss.dtype == torch.float32 and args[0].grad.dtype == torch.bfloat16
    assert all(x.grad is None for x in (args[1], args[2], *logprobs.values()))


def test_bad_input():
    args, logprobs = make()
    for options in (
        dict(kind="ppo"),
        dict(kind="dr_grpo"),
        dict(kl=0.1),
        dict(ref_logprob=args[0][:2]),
        dict(rollout_logprob=args[0][None]),
    ):
        with pytest.raises(ValueError):
            policy_loss(*args, **options)
    for cu in ([0, 3, 3, 8, 9, 15], [1, 3, 3, 8, 9, 16], [0, 5, 3, 8, 9, 16], [0, 16]):
        with pytest.raises(ValueError):
            policy_loss(*args[:3], torch.tensor(cu))


def test_reference_has_the_same_signature():
    ours, reference = (
        list(inspect.signature(f).parameters) for f in (policy_loss, reference_policy_loss)
    )
    assert ours == [*reference, "fused"]


@pytest.mark.parametrize("kind", KINDS)
def test_unfused_is_the_reference(kind):
    args, logprobs = make(dtype=torch.float32)
    options = dict(kind=kind, kl=0.1, max_tokens=9, **logprobs)
    loss, metrics = policy_loss(*args, **options, fused=False)
    true, expected = reference_policy_loss(*args, **options)
    assert torch.equal(loss, true)
    assert all(torch.equal(metrics[name], value) for name, value in expected.items())


# ---- A loss that a fork adds, to the table and the reference alone


def plain_policy_gradient(ratio, advantage, logprob, low, high):
    return -advantage * logprob, torch.zeros_like(advantage, dtype=torch.bool)


@pytest.fixture
def reinforce(monkeypatch):
    loss = Loss(plain_policy_gradient, 0.0, 0.0, "tokens", dual_clip=False)
    monkeypatch.setitem(LOSSES, "reinforce", loss)


def test_a_new_loss_is_trained_unfused(reinforce):
    args, _ = make((4, 4), torch.float32)
    logprob = args[0].requires_grad_()
    loss, metrics = policy_loss(logprob, *args[1:], kind="reinforce", fused=False)
    loss.backward()
    torch.testing.assert_close(logprob.grad, -args[2].repeat_interleave(4) / 8)
    assert metrics["clip_low"] == metrics["clip_high"] == 0


@needs_triton
def test_a_new_loss_is_refused_by_the_kernel(reinforce):
    args, _ = make(dtype=torch.float32)
    with pytest.raises(ValueError, match="does not know the loss 'reinforce': --no-fused-loss"):
        policy_loss(*args, kind="reinforce")


@needs_triton
def test_new_clips_for_a_known_surrogate_are_fused(monkeypatch):
    loss = Loss(LOSSES["dapo"].surrogate, 0.1, 0.1, "sequences")
    monkeypatch.setitem(LOSSES, "narrow", loss)
    args, _ = make(dtype=torch.float32)
    fused, plain = (policy_loss(*args, kind="narrow", fused=f)[0] for f in (True, False))
    torch.testing.assert_close(fused, plain)
