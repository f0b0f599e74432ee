"""docs/papers.md's flags against each paper's formula, written out here token by token in fp64."""

import math
import re
import shlex
from types import SimpleNamespace

import pytest
import torch
import tyro
from commands import ROOT

import train_rl
from kernels.policy_loss import LOSSES
from model.rollout import Rollout
from srreal import Example, Scores

PROMPTS, GROUP, MAX_TOKENS = 4, 5, 9
ROW = re.compile(r"^\| ([\w. -]+), \[[\d.]+\]\(.*?\) \| `(.*?)` \|", re.M)
FLAGS = dict(ROW.findall((ROOT / "docs" / "papers.md").read_text()))


def config(paper: str) -> train_rl.Config:
    common = ["--model", "m", "--data", "d", "--out", "o", "--max-new-tokens", str(MAX_TOKENS)]
    return tyro.cli(train_rl.Config, args=common + shlex.split(FLAGS[paper]))


def groups() -> list[train_rl.Group]:
    """Completions of 1 to 9 tokens, of which some were cut, and what they earned."""
    generator = torch.Generator().manual_seed(0)
    out = []
    for g in range(PROMPTS):
        example = Example(f"q{g}", "lor", [], "How far is it?", "2.0")
        rollouts = []
        scores = []
        for _ in range(GROUP):
            length = int(torch.randint(1, MAX_TOKENS + 1, (1,), generator=generator))
            earned = round(float(torch.rand(1, generator=generator)), 1)
            logprobs = (-torch.rand(length, generator=generator)).tolist()
            rollouts.append(Rollout("x", [0] * length, logprobs, finished=length < MAX_TOKENS))
            scores.append(Scores(0.8 * earned + 0.2, earned, 1.0, 0.0))
        out.append(train_rl.Group(SimpleNamespace(example=example, turn=g), rollouts, scores))
    return out


# ---- The papers, from their formulas. r: ratios of a completion's tokens, A: its advantage.


def mean(values):
    return sum(values) / len(values)


def std(values):
    centre = mean(values)
    return math.sqrt(sum((v - centre) ** 2 for v in values) / (len(values) - 1))


def ppo(r, A, low, high):
    clipped = r.clamp(1 - low, 1 + high)
    return -torch.minimum(r * A, clipped * A)


def token_mean(losses):
    return torch.cat(losses).mean()


def sequence_mean(losses):
    return torch.stack([x.mean() for x in losses]).mean()


def by_group(rewards):
    return [[(r - mean(own)) / (std(own) + 1e-6) for r in own] for own in rewards]


def dual(loss, A, cap):
    return loss.clamp(max=-cap * A) if A < 0 else loss


def k3(new, ref):
    return (ref - new).exp() - (ref - new) - 1


def sr_real(rewards, new, old, ref):
    A = by_group(rewards)
    losses = []
    for g, i, n in new:
        r = (n - old[g, i]).exp()
        losses.append(dual(ppo(r, A[g][i], 0.2, 0.3), A[g][i], 3) + 0.01 * k3(n, ref[g, i]))
    return token_mean(losses)


def dapo(rewards, new, old, ref):
    A = by_group(rewards)
    # Overlong completions are masked.
    kept = [(g, i, n) for g, i, n in new if len(n) < MAX_TOKENS]
    return token_mean([ppo((n - old[g, i]).exp(), A[g][i], 0.2, 0.28) for g, i, n in kept])


def grpo(rewards, new, old, ref):
    A = by_group(rewards)
    losses = []
    for g, i, n in new:
        r = (n - old[g, i]).exp()
        losses.append(ppo(r, A[g][i], 0.2, 0.2) + 0.04 * k3(n, ref[g, i]))
    return sequence_mean(losses)


def dr_grpo(rewards, new, old, ref):
    A = [[r - mean(own) for r in own] for own in rewards]
    sums = [ppo((n - old[g, i]).exp(), A[g][i], 0.2, 0.2).sum() for g, i, n in new]
    return torch.stack(sums).sum() / (len(sums) * MAX_TOKENS)


def gspo(rewards, new, old, ref):
    A = by_group(rewards)
    losses = [ppo((n - old[g, i]).mean().exp(), A[g][i], 3e-4, 4e-4) for g, i, n in new]
    return torch.stack(losses).mean()


def cispo(rewards, new, old, ref):
    A = by_group(rewards)
    losses = []
    for g, i, n in new:
        weight = (n - old[g, i]).exp().detach().clamp(max=1 + 5.0)
        losses.append(-weight * A[g][i] * n)
    return token_mean(losses)


def sapo(rewards, new, old, ref):
    A = by_group(rewards)
    losses = []
    for g, i, n in new:
        tau = 1.0 if A[g][i] > 0 else 1.05
        gate = 4 / tau / (1 + torch.exp(-tau * ((n - old[g, i]).exp() - 1)))
        losses.append(-gate * A[g][i])
    return sequence_mean(losses)


def lite_ppo(rewards, new, old, ref):
    spread = std([r for own in rewards for r in own]) + 1e-6
    A = [[(r - mean(own)) / spread for r in own] for own in rewards]
    return token_mean([ppo((n - old[g, i]).exp(), A[g][i], 0.2, 0.2) for g, i, n in new])


PAPERS = {
    "SR-REAL": sr_real,
    "DAPO": dapo,
    "GRPO": grpo,
    "Dr. GRPO": dr_grpo,
    "GSPO": gspo,
    "CISPO": cispo,
    "SAPO": sapo,
    "Lite PPO": lite_ppo,
}


def test_every_row_has_its_formula():
    assert FLAGS.keys() == PAPERS.keys()


@pytest.mark.parametrize("paper", PAPERS)
def test_flags_are_the_papers_objective(paper):
    cfg = config(paper)
    rolled_out = groups()
    scale = cfg.advantage or LOSSES[cfg.loss].advantage
    train_rl.add_advantages(rolled_out, torch.device("cpu"), scale)

    # One pass of all completions, with the log-probs of a later update.
    generator = torch.Generator().manual_seed(1)
    new, old, ref, advantages, lengths = [], {}, {}, [], []
    for g, group in enumerate(rolled_out):
        for i, rollout in enumerate(group.rollouts):
            length = len(rollout.tokens)

            def moved(start, by, length=length):
                noise = torch.randn(length, generator=generator, dtype=torch.float64)
                return start + by * noise

            old[g, i] = torch.tensor(rollout.logprobs, dtype=torch.float64)
            ref[g, i] = moved(old[g, i], 0.3)
            # For gspo's narrow clip some sequences hardly move.
            by = 0.4 if i % 2 else 2e-4
            new.append((g, i, moved(old[g, i], by).requires_grad_()))
            if rollout.finished or not cfg.mask_truncated:
                advantages.append(group.advantages[i])
                lengths.append(length)
    trained = [
        (g, i, n) for g, i, n in new if rolled_out[g].rollouts[i].finished or not cfg.mask_truncated
    ]
    mb = SimpleNamespace(
        old_logprob=torch.cat([old[g, i] for g, i, _ in trained]),
        ref_logprob=torch.cat([ref[g, i] for g, i, _ in trained]) if cfg.kl else None,
        rollout_logprob=torch.cat([old[g, i] for g, i, _ in trained]),
        advantage=torch.tensor(advantages, dtype=torch.float64),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0),
    )
    logprob = torch.cat([n for _, _, n in trained])
    tokens = LOSSES[cfg.loss].divided_by == "tokens"
    denominator = len(logprob) if tokens else len(lengths)
    found, _ = train_rl.loss_of(cfg, mb, logprob, torch.zeros_like(logprob), denominator)

    rewards = [[s.total for s in group.scores] for group in rolled_out]
    expected = PAPERS[paper](rewards, new, old, ref)
    assert found.item() == pytest.approx(expected.item(), rel=1e-9)
    leaves = [n for _, _, n in trained]
    for a, b in zip(*(torch.autograd.grad(x, leaves) for x in (found, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_an_entropy_bonus_is_weighed_as_the_loss_is():
    cfg = config("GRPO")
    cfg.entropy_coef = 0.5
    entropy = torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64)
    zeros = torch.zeros(3, dtype=torch.float64)
    mb = SimpleNamespace(
        old_logprob=zeros,
        ref_logprob=zeros,
        rollout_logprob=zeros,
        advantage=torch.zeros(2, dtype=torch.float64),
        cu_seqlens=torch.tensor([0, 2, 3]),
    )
    loss, _ = train_rl.loss_of(cfg, mb, zeros, entropy, 2)
    assert loss.item() == pytest.approx(-0.5 * (1.5 + 6.0) / 2)
