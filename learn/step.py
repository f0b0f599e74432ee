"""One question of a rendered room through one GRPO step, by train_rl.py's own functions.

The completions are those that the model sampled once, kept in completions.json: two CPUs round
differently, so that sooner or later one samples another token. Everything else is computed.

    trainer = set_up(settings())                  processor, model, optimiser, reference policy
    example, rollouts = recorded(folder, trainer.processor)
    step = take_step(trainer, example, rollouts)  scores, advantages, log-probs before and after

`python -m learn.one_step --sample` chooses a question and samples anew: for another checkpoint.
"""

import json
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

import torch
from torch import Tensor

import data
import train_rl
from data import scenes
from errors import UserError
from kernels.policy_loss import LOSSES
from model.images import DeviceImages
from model.processor import Processor
from model.qwen_vl import QwenVL
from model.rollout import Engine, Rollout
from plan import Settings
from srreal import REWARDS, Example, score
from training.metrics import Metrics
from training.optim import Optimizer
from training.policy import Reference, load_policy

ROOT = Path(__file__).parent.parent
# The checkpoint that takes the step. After a change: python -m learn.one_step --sample
MODEL = ROOT / "assets" / "tiny"
COMPLETIONS = Path(__file__).parent / "completions.json"

# The rooms to choose from: a seed that runs/speedrun.sh gives to no set.
SEED = 9000
ROOMS = 24
# Of a distance the accuracy is graded, and two objects have to be found.
TASK = "distance"

CPU = torch.device("cpu")


def settings(model: Path | str = MODEL) -> train_rl.Config:
    """Return the flags of the step: the speedrun's (`rl` in runs/tiny.sh), for a group of eight.

    It is the first of many steps, so its learning rate is still small.
    """
    return train_rl.Config(
        model=str(model),
        data=("a rendered room",),
        out="nowhere",
        steps=100,
        prompts=1,
        group=8,
        max_new_tokens=200,
        lr=7e-5,
        vector_rate=120,
        schedule="linear",
        warmup=5,
        kl=0.05,
    )


# ---- What train_rl.train sets up


@dataclass
class Trainer:
    cfg: train_rl.Config
    processor: Processor
    model: QwenVL
    optimizer: Optimizer
    reference: Reference | None


def set_up(cfg: train_rl.Config) -> Trainer:
    """Load what trains, in fp32 on the CPU; UserError where there is no checkpoint."""
    if not Path(cfg.model).is_dir():
        raise UserError(f"{cfg.model}: there is no checkpoint")
    processor = Processor.from_pretrained(cfg.model)
    policy = load_policy(cfg.model, cfg, CPU, 1, Settings(), samples=True)
    optimizer = Optimizer(
        policy.model.named_parameters(),
        policy.compute_weights,
        weight_decay=cfg.weight_decay,
        betas=(0.9, cfg.beta2),
        vector_lr_scale=cfg.vector_rate,
    )
    # Before any update, as the reference is the policy that training starts from.
    reference = Reference(policy.rollout_model, optimizer) if cfg.kl > 0 else None
    return Trainer(cfg, processor, policy.model, optimizer, reference)


# ---- The question, and what was sampled for it


def room(folder: Path, seed: int, index: int) -> list[Example]:
    """Render a room of the demo into a folder, in our own row format; return its questions.

    On path dtr, the longer one. The same seed and index give the same room on every machine.
    """
    for name in ("images", "depth"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    rows = scenes.make(scenes.Config(out=folder, seed=seed), index)
    (folder / "rows.jsonl").write_text(rows)
    return [example for example in data.load([str(folder)]) if example.path == "dtr"]


def sample(trainer: Trainer, example: Example, seed: int = 0) -> list[Rollout]:
    """Sample a group of completions of one question, as a step of train_rl.py does."""
    cfg = trainer.cfg
    engine = Engine(
        trainer.model,
        trainer.processor,
        n=cfg.group,
        max_new_tokens=cfg.max_new_tokens,
        temperature=cfg.temperature,
    )
    prompt = encoded_prompt(trainer.processor, example)
    return train_rl.roll_out(engine, [prompt], cfg, seed).groups[0].rollouts


def encoded_prompt(processor: Processor, example: Example) -> train_rl.Prompt:
    """Return the prompt as a step carries it: with ids, positions, regions and patches."""
    prompt = train_rl.Prompt(example, turn=0)
    train_rl.encode([prompt], processor)
    return prompt


def choose(trainer: Trainer, folder: Path) -> dict:
    """Sample a group for one question of each room; return the record of the liveliest one."""
    tried = []
    for index in range(ROOMS):
        for example in room(folder / str(index), SEED, index):
            # Boxes are easier to see on a picture than points.
            if example.task != TASK or "point" in example.question:
                continue
            # The costly part of --sample, a group for every question that may be taken.
            rollouts = sample(trainer, example)
            tried.append((variety(example, rollouts), index, example, rollouts))
    # By liveliness alone, the first of equals: Examples have no order.
    _, index, example, rollouts = max(tried, key=itemgetter(0))
    completions = []
    for rollout in rollouts:
        logprobs = [round(logprob, 5) for logprob in rollout.logprobs]
        completions.append({"tokens": rollout.tokens, "logprobs": logprobs})
    return {"seed": SEED, "room": index, "id": example.id, "completions": completions}


def variety(example: Example, rollouts: list[Rollout]) -> tuple:
    """Rate how much a group shows, the first entry above the others.

    One or two ill-formed completions; short ones (guesses) beside long ones (workings); a spread of
    accuracies.
    """
    scores = [score(r.text, example) for r in rollouts]
    ill_formed = sum(s.format == 0 for s in scores)
    lengths = [len(r.tokens) for r, s in zip(rollouts, scores, strict=True) if s.format]
    accuracies = [s.accuracy for s in scores if s.format]
    if not accuracies:
        return (False, False, 0.0)
    both_kinds = max(lengths) - min(lengths) >= 15
    # Tuples compare entry by entry, so that the spread only decides between equals.
    return (0 < ill_formed <= 2, both_kinds, max(accuracies) - min(accuracies))


def recorded(folder: Path, processor: Processor) -> tuple[Example, list[Rollout]]:
    """Render the room of completions.json into a folder; return its question and completions."""
    record = json.loads(COMPLETIONS.read_text())
    examples = room(folder, record["seed"], record["room"])
    (example,) = [example for example in examples if example.id == record["id"]]
    rollouts = []
    for completion in record["completions"]:
        tokens = completion["tokens"]
        # As the engine says it: a completion cut at max_new_tokens has no end token.
        finished = tokens[-1] in processor.end_ids
        text = processor.decode(tokens)
        rollouts.append(Rollout(text, tokens, completion["logprobs"], finished))
    return example, rollouts


# ---- The step


@dataclass
class Step:
    """What a step computed. L tokens of all completions, one after the other."""

    group: train_rl.Group
    mb: train_rl.MicroBatch  # its old_logprob (L,) is what the update started from
    loss: float
    grad_norm: float
    metrics: dict  # the columns of metrics.jsonl that this step would log
    logprob: Tensor  # (L,) of the same completions after the update
    entropy: Tensor  # (L,) after the update

    def of(self, k: int, values: Tensor) -> Tensor:
        """Cut the tokens of completion k out of values (L,)."""
        start, end = self.mb.cu_seqlens[k : k + 2].tolist()
        return values[start:end]


def make_group(trainer: Trainer, example: Example, rollouts: list[Rollout]) -> train_rl.Group:
    """Score completions, and give them advantages: train_rl.roll_out's end, and what follows it."""
    cfg = trainer.cfg
    group = train_rl.Group(encoded_prompt(trainer.processor, example), rollouts)
    group.scores = [train_rl.finite_score(r.text, example, cfg) for r in rollouts]
    scale = cfg.advantage or LOSSES[cfg.loss].advantage
    train_rl.add_advantages([group], CPU, scale, train_rl.parse_weights(cfg.reward_weights))
    return group


def take_step(trainer: Trainer, example: Example, rollouts: list[Rollout]) -> Step:
    """Take one GRPO step on these completions; the trainer's model has learnt from them after it.

    In the order of train_rl.train: score, advantage, pack, log-probs of the reference, update.
    """
    cfg = trainer.cfg
    group = make_group(trainer, example, rollouts)
    paths = [example.path]
    # One group is one microbatch: its completions share one copy of the prompt.
    (mb,) = train_rl.pack([group], trainer.processor, paths, cfg, world=1, device=CPU)
    images = DeviceImages(CPU)
    train_rl.add_logprobs(trainer.model, trainer.reference, [mb], images, cfg)

    metrics = Metrics(paths, list(REWARDS))
    train_rl.add_scores(metrics, [group], is_kept=lambda group: group.differs)
    loss, grad_norm = train_rl.update(
        trainer.model, trainer.optimizer, [mb], images, metrics, cfg, step=0
    )
    with torch.no_grad():
        # To show what the update has moved; a training saves itself this pass.
        logprob, entropy = train_rl.forward(trainer.model, mb, cfg.temperature, images)
    return Step(group, mb, loss, grad_norm, metrics.row(), logprob, entropy)


def token_losses(cfg: train_rl.Config, step: Step, logprob: Tensor, k: int) -> list[float]:
    """Return the loss of each token of completion k, not yet divided by the number of tokens.

    logprob (L,): of the policy whose loss it is; step.mb.old_logprob is the one before the step.
    """
    mb = step.mb
    start, end = mb.cu_seqlens[k : k + 2].tolist()
    one = torch.tensor([0, 1])
    losses = []
    for token in range(start, end):
        # A sequence of one token: of dapo's sum over tokens this is the token's own term.
        alone = train_rl.MicroBatch(
            mb.batch,
            mb.owner[token : token + 1],
            mb.advantage[k : k + 1],
            one,
            mb.rollout_logprob[token : token + 1],
            mb.old_logprob[token : token + 1],
            mb.ref_logprob[token : token + 1],
        )
        # Slow, a call a token, but it is the loss of the training and no second formula.
        loss, _ = train_rl.loss_of(cfg, alone, logprob[token : token + 1], None, denominator=1)
        losses.append(loss.item())
    return losses
