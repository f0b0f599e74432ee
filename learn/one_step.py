"""Write docs/one_step.md: one question through one GRPO step, every number computed here.

    python -m learn.one_step             the page and its picture, from the completions that are
                                         kept
    python -m learn.one_step --sample    first choose a question and sample anew (minutes): after
                                         the checkpoint has changed

The prose is in one_step.md.jinja. tests/docs/test_one_step.py compares the page that is committed
with what this writes: text exactly, numbers to what two CPUs' rounding may change.
"""

import json
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path

import jinja2
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import errors
import flags
import srreal
import train_rl
from kernels.policy_loss import clip_range
from learn import step as steps
from model.region import region_weights
from model.rollout import predict_centres
from pictures import read_picture
from training.optim import learning_rate

PAGE = steps.ROOT / "docs" / "one_step.md"
PICTURE = PAGE.with_suffix(".png")
TEMPLATE = Path(__file__).with_name("one_step.md.jinja")

ZOOM = 2  # pixels of the drawing a pixel of the room
CAPTION = 22  # pixels
HEAT = np.array((240, 80, 0))
OPAQUE = 0.7  # of the largest weight

# The token tables leave out what the model was as good as sure of: most of a completion is form.
SURE = -0.01  # nats


@dataclass
class Config:
    # choose a question, and sample its completions anew
    sample: bool = False


# ---- The picture


def draw(prompt) -> Image.Image:
    """Draw the image on its grid of patches, and the weights of each region as a heat map."""
    (view,) = prompt.views
    image = read_picture(prompt.example.images[0])
    rows, columns = view.grid
    panels = [with_grid(image, view.grid)]
    captions = [f"{columns} x {rows} patches"]
    for k, (_, region) in enumerate(prompt.example.regions):
        # As the region token reads it: not the box, but the share of each patch that it covers.
        weights = region_weights(region, view.size, view.grid)
        panels.append(with_heat(image, weights))
        captions.append(f"region {k}: its weights, black outline: its box")
        box = [side * ZOOM for side in region]
        ImageDraw.Draw(panels[-1]).rectangle(box, outline=(0, 0, 0))
    return side_by_side(panels, captions)


def with_grid(image: Image.Image, grid: tuple[int, int]) -> Image.Image:
    width, height = (side * ZOOM for side in image.size)
    panel = image.resize((width, height), Image.BICUBIC)
    pen = ImageDraw.Draw(panel)
    rows, columns = grid
    for row in range(1, rows):
        y = height * row // rows
        pen.line((0, y, width, y), fill=(255, 255, 255))
    for column in range(1, columns):
        x = width * column // columns
        pen.line((x, 0, x, height), fill=(255, 255, 255))
    return panel


def with_heat(image: Image.Image, weights: np.ndarray) -> Image.Image:
    """Lay weights (rows, columns) over a faded image: the largest one is full colour."""
    width, height = (side * ZOOM for side in image.size)
    # Half contrast, towards white, so that the heat stands out.
    faded = np.asarray(image.resize((width, height), Image.BICUBIC)) * 0.5 + 127
    # A cell is a patch, with sharp borders.
    share = Image.fromarray((weights / weights.max()).astype(np.float32))
    share = np.asarray(share.resize((width, height), Image.NEAREST))[..., None] * OPAQUE
    mixed = faded * (1 - share) + HEAT * share
    return Image.fromarray(mixed.clip(0, 255).astype(np.uint8))


def side_by_side(panels: list[Image.Image], captions: list[str]) -> Image.Image:
    width, height = panels[0].size
    sheet = Image.new("RGB", (len(panels) * (width + 4) - 4, height + CAPTION), "white")
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=14)
    for i, (panel, caption) in enumerate(zip(panels, captions, strict=True)):
        sheet.paste(panel, (i * (width + 4), 0))
        pen.text((i * (width + 4) + 4, height + 2), caption, fill="black", font=font)
    return sheet


# ---- What the page says of each part


def mentions(example: srreal.Example) -> list[str]:
    """Return the mention of each region, in the order of the <mask>s."""
    texts = example.question.split("<mask>")[:-1]
    # Of all mentions before a <mask> the one that stands closest to it.
    return [max(example.objects, key=lambda mention: text.rfind(mention)) for text in texts]


def describe_region(prompt, k: int, head: np.ndarray) -> dict:
    """Return the weights of region k by patch, and three ways to say where its object is."""
    (view,) = prompt.views
    region = prompt.regions[k]
    grid = region_weights(prompt.example.regions[k][1], view.size, view.grid)
    rows = np.flatnonzero(grid.sum(1))
    columns = np.flatnonzero(grid.sum(0))
    # Both in the order in which patches are packed, neighbours that merge side by side.
    known = np.isfinite(view.points).all(1)
    weights = np.where(known, region.weights, 0)
    # The mean point of what is seen: the centre lies deeper, behind the surface, by about half
    # the object's depth. That is what the head has to learn.
    surface = (weights[:, None] * np.nan_to_num(view.points)).sum(0) / weights.sum()
    return {
        "mention": mentions(prompt.example)[k],
        "box": [round(side) for side in prompt.example.regions[k][1]],
        "rows": rows.tolist(),
        "columns": columns.tolist(),
        "weights": grid[np.ix_(rows, columns)].tolist(),
        "surface": surface.tolist(),
        "truth": list(region.centre),
        "head": head.tolist(),
        "head_error": math.dist(head, region.centre),
    }


def prompt_tokens(processor, prompt) -> list[str]:
    """Write each token with its index and its mRoPE position; an image's as first ... last."""
    cells = []
    image = prompt.ids == processor.image_token_id
    for i, token in enumerate(prompt.ids):
        # Of the placeholders the first and the last one say where the grid begins and ends.
        inside = image[i] and 0 < i < len(image) - 1 and image[i - 1] and image[i + 1]
        if inside:
            if cells[-1] != "...":
                cells.append("...")
            continue
        # Of text all three are one number, which is written once.
        time, row, column = prompt.positions[:, i].tolist()
        position = str(time) if time == row == column and not image[i] else f"{time},{row},{column}"
        cells.append(f"{i}@{position} {token_text(processor, token)}")
    return cells


def token_text(processor, token: int) -> str:
    """Show a token as it stands in a Python string."""
    text = processor.tokenizer.backend_tokenizer.decode([int(token)], skip_special_tokens=False)
    return repr(text)


def describe_completion(step: steps.Step, k: int) -> dict:
    """Return a completion, what it earned, and how the step moved it."""
    rollout = step.group.rollouts[k]
    scores = step.group.scores[k]
    before = step.of(k, step.mb.old_logprob)
    after = step.of(k, step.logprob)
    parsed = srreal.parse(rollout.text, step.group.example.path)
    # In a cell of a table.
    answer = " ".join((parsed.answer or "").split()).replace("<", "\\<").replace("|", "\\|")
    return {
        "text": rollout.text,
        "tokens": len(rollout.tokens),
        "answer": answer if len(answer) < 40 else f"{answer[:36]} ...",
        "well_formed": parsed.well_formed,
        "parts": scores.parts,
        "total": scores.total,
        "advantage": step.group.advantages[k],
        # By the engine, which has a cache and its own rounding; "before" is the trainer's.
        "sampled": sum(rollout.logprobs),
        "before": before.sum().item(),
        "after": after.sum().item(),
        "distances": distances(parsed, step.group.example),
    }


def distances(parsed: srreal.Parsed, example: srreal.Example) -> list[tuple]:
    """Return (mention, metres to the truth, points) of each box whose mention is known."""
    found = []
    for mention, _, centre in parsed.boxes:
        if mention in example.objects:
            metres = math.dist(centre, example.objects[mention])
            found.append((mention, metres, srreal.points(metres)))
    return found


def token_table(trainer: steps.Trainer, step: steps.Step, k: int) -> list[dict]:
    """Return a row for each token of completion k that was not sure: before and after the step."""
    tokens = step.group.rollouts[k].tokens
    sampled = step.group.rollouts[k].logprobs
    before = step.of(k, step.mb.old_logprob).tolist()
    after = step.of(k, step.logprob).tolist()
    # In this step the policy is still the old one; a second update would start from the new one.
    losses = steps.token_losses(trainer.cfg, step, step.mb.old_logprob, k)
    next_losses = steps.token_losses(trainer.cfg, step, step.logprob, k)
    rows = []
    for i, token in enumerate(tokens):
        if before[i] > SURE:
            continue
        rows.append(
            {
                "index": i,
                "token": token_text(trainer.processor, token),
                "sampled": sampled[i],
                "before": before[i],
                # Truncated importance sampling: trainer against engine, on the same weights.
                "weight": min(math.exp(before[i] - sampled[i]), trainer.cfg.rollout_cap),
                "loss": losses[i],
                "after": after[i],
                # pi_new / pi_old: what a second update on this rollout would clip.
                "ratio": math.exp(after[i] - before[i]),
                "next_loss": next_losses[i],
            }
        )
    return rows


@torch.no_grad()
def second_update(cfg, step: steps.Step) -> dict:
    """Return the metrics that the loss would have if a second update took the same rollout."""
    loss, metrics = train_rl.loss_of(
        cfg, step.mb, step.logprob, step.entropy, denominator=len(step.logprob)
    )
    return {"loss": loss.item()} | {name: value.item() for name, value in metrics.items()}


def moved(before: dict[str, Tensor], after: dict[str, Tensor], vectors: bool) -> dict:
    """Return how many weights the matrices (or vectors) have, and the RMS of their move."""
    squares = 0.0
    count = 0
    for name, weight in after.items():
        # Vectors (norms, biases) have a learning rate of their own: --vector-rate times that of
        # matrices.
        if (weight.ndim < 2) == vectors:
            # In fp64: millions of squares of 1e-5 are added up.
            squares += (weight - before[name]).double().square().sum().item()
            count += weight.numel()
    return {"count": count, "rms": math.sqrt(squares / count)}


# ---- The page


def compute(folder: Path) -> tuple[dict, Image.Image]:
    """Take the step; return what the template asks for, and the picture. folder: for the room."""
    trainer = steps.set_up(steps.settings())
    example, rollouts = steps.recorded(folder, trainer.processor)
    # Asked before the step, which changes the decoder that the head reads.
    heads = predict_centres(trainer.model, trainer.processor, [example])[0]
    weights = trainer.optimizer.compute_weights
    # Copies, as the optimiser writes into its weights in place.
    before = {name: weight.detach().clone() for name, weight in weights.items()}

    step = steps.take_step(trainer, example, rollouts)
    prompt = step.group.prompt.encoded
    values = {
        "cfg": trainer.cfg,
        "model": steps.MODEL.relative_to(steps.ROOT).as_posix(),
        "all": sum(p.numel() for p in trainer.model.parameters()),
        "example": example,
        "prompt_text": srreal.prompt(example),
        "target": srreal.target(example),
        "regions": [describe_region(prompt, k, head) for k, head in enumerate(heads)],
    }
    values |= about_prompt(trainer.processor, prompt)
    values |= about_group(step)
    values |= about_update(trainer, step, before)
    return values, draw(prompt)


def about_prompt(processor, prompt) -> dict:
    """Return sizes and tokens of the prompt."""
    (view,) = prompt.views
    return {
        "size": view.size,
        "grid": view.grid,
        "patch": processor.image_processor.patch_size,
        "merge": processor.image_processor.merge_size,
        "known_points": int(np.isfinite(view.points).all(1).sum()),
        "mask_positions": [region.index for region in prompt.regions],
        "prompt_length": len(prompt.ids),
        "next_position": prompt.next_position,
        "cells": prompt_tokens(processor, prompt),
    }


def about_group(step: steps.Step) -> dict:
    """Return the completions, their scores, and the statistics of the group."""
    completions = [describe_completion(step, k) for k in range(len(step.group.rollouts))]
    totals = np.array([completion["total"] for completion in completions])
    return {
        "completions": completions,
        "weights": {name: w for name, w in srreal.weights_of(step.group.example).items() if w},
        "steps": srreal.STEPS,
        "mean": totals.mean(),
        # Unbiased, as in the kernel.
        "std": totals.std(ddof=1),
        "differs": step.group.differs,
        "best": int(np.argmax(totals)),
        "worst": int(np.argmin(totals)),
    }


def about_update(trainer: steps.Trainer, step: steps.Step, before: dict[str, Tensor]) -> dict:
    """Return the loss, token by token, and what the update changed.

    before: name -> weight, of what learns, before the update.
    """
    cfg = trainer.cfg
    after = trainer.optimizer.compute_weights
    advantages = step.group.advantages
    low, high = clip_range(cfg.loss, cfg.clip_low, cfg.clip_high)
    return {
        "segments": step.mb.batch.segments,
        "batch_length": len(step.mb.batch.input_ids),
        "tokens": len(step.logprob),
        "low": low,
        "high": high,
        "best_tokens": token_table(trainer, step, int(np.argmax(advantages))),
        "worst_tokens": token_table(trainer, step, int(np.argmin(advantages))),
        "loss": step.loss,
        "grad_norm": step.grad_norm,
        "metrics": step.metrics,
        "lr": learning_rate(0, cfg.steps, cfg.lr, cfg.warmup, cfg.schedule),
        "learning": sum(weight.numel() for weight in after.values()),
        "matrices": moved(before, after, vectors=False),
        "norms": moved(before, after, vectors=True),
        "entropy_after": step.entropy.mean().item(),
        "second": second_update(cfg, step),
    }


def fixed(value: float, digits: int, sign: bool = False) -> str:
    """Write a number with so many digits, and no -0.00."""
    text = f"{value:{'+' if sign else ''}.{digits}f}"
    # -0.00 on one machine and 0.00 on another are both rounding.
    return text.lstrip("+-") if float(text) == 0 else text


def render(values: dict) -> str:
    """Fill the template."""
    # Strict: a name that is missing is a bug, and no empty cell.
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["fixed"] = fixed
    text = environment.from_string(TEMPLATE.read_text()).render(values)
    return text.strip() + "\n"


def sample_anew() -> None:
    """Choose a question, and write completions.json."""
    with tempfile.TemporaryDirectory() as folder:
        record = steps.choose(steps.set_up(steps.settings()), Path(folder))
    completions = record.pop("completions")
    head = json.dumps(record)[:-1]
    # A completion a line.
    lines = ",\n".join(json.dumps(completion) for completion in completions)
    steps.COMPLETIONS.write_text(f'{head}, "completions": [\n{lines}\n]}}\n')


def main(cfg: Config) -> None:
    if cfg.sample:
        sample_anew()
    with tempfile.TemporaryDirectory() as folder:
        values, picture = compute(Path(folder))
    PAGE.write_text(render(values))
    picture.save(PICTURE, optimize=True)
    print(f"{PAGE}, {PICTURE}")


if __name__ == "__main__":
    errors.launch("one_step", main, flags.parse(Config, __doc__))
