"""Write assets/ from a finished speedrun: its cold start in bf16, three rooms to ask about, a card.

    make speedrun && python -m runs.assets --speedrun out/speedrun

The checkpoint is the one that GRPO starts from, so that `make rl` can show what GRPO does.
"""

import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

import data
import flags
from errors import UserError, launch, writing
from model.qwen_vl import QwenVL
from runs.gain import read_rows
from srreal import Example
from training.checkpoints import step_folders

# One room a task, none of which training has seen.
TASKS = ("nearest", "relation", "distance")

CARD = """# Assets

`tiny/` is a Qwen3-VL-shaped checkpoint of {millions:.1f} million parameters in bf16, with region
tokens and a 3D head, trained from scratch on rendered rooms by `runs/speedrun.sh` (commit {commit},
seed {seed}): the cold start, before any RL. Two thirds of its last rationales were guesses ("By
eye, ..."), so it mostly guesses, too; GRPO (`make rl`) finds that working the answer out pays. It
knows these rooms and the questions that `data.scenes` asks, and nothing else.

On {questions} questions about rooms that it has not seen, strict accuracy in per cent:

| | LOR | DTR |
|---|---|---|
| this checkpoint | {lor_before} | {dtr_before} |
| after the speedrun's RL | {lor_after} | {dtr_after} |

The three rooms are of the same test set. To ask about them:

{commands}

Licence: MIT, as all of this repository; the data are rendered by `data.scenes`.
`python -m runs.assets` wrote this folder.
"""


@dataclass
class Config:
    speedrun: Path = Path("out/speedrun")  # a finished speedrun
    out: Path = Path("assets")  # is written anew

    def __post_init__(self):
        flags.check(self)


def main(cfg: Config) -> None:
    steps = step_folders(cfg.speedrun / "sft")
    if not steps or not (cfg.speedrun / "eval-rl" / "summary.json").exists():
        raise UserError(f"--speedrun {cfg.speedrun}: there is no finished speedrun")
    if cfg.out.exists() and not (cfg.out / "tiny").is_dir():
        raise UserError(f"--out {cfg.out}: it holds something else than what this writes")
    # Until all is written; after a failure it is still there.
    old = cfg.out.with_name(f"{cfg.out.name}.old")
    with writing(cfg.out):
        # All of it: a room of an older speedrun must not stay beside the new ones.
        if cfg.out.exists():
            shutil.rmtree(old, ignore_errors=True)
            cfg.out.rename(old)
        cfg.out.mkdir(parents=True)
    # Half the bytes, and what checkpoints of real size come in.
    write_in_bf16(steps[-1], cfg.out / "tiny")
    # Loaded from what was written: a checkpoint that can't be read must not be committed.
    model = QwenVL.from_pretrained(str(cfg.out / "tiny"))
    rooms = pick_rooms(data.load([str(cfg.speedrun / "scenes" / "test")]))
    commands = [write_room(number, room, cfg.out) for number, room in enumerate(rooms, start=1)]
    size = sum(p.numel() for p in model.parameters()) / 1e6
    (cfg.out / "README.md").write_text(card(cfg.speedrun, size, commands), encoding="utf-8")
    shutil.rmtree(old, ignore_errors=True)


def write_in_bf16(checkpoint: Path, out: Path) -> None:
    """Copy a checkpoint without its trainer's state, its weights rounded to bf16."""
    # The optimiser's state only serves to train on, and is larger than the weights.
    shutil.copytree(checkpoint, out, ignore=shutil.ignore_patterns("trainer"))
    for name in ("model.safetensors", "spatial.safetensors"):
        with safe_open(out / name, "pt") as file:
            tensors = {key: file.get_tensor(key).bfloat16() for key in file.keys()}  # noqa: SIM118
            metadata = file.metadata()
        save_file(tensors, out / name, metadata)
        (out / name).chmod(0o644)  # save_file's own is for the owner alone
    config = (out / "config.json").read_text(encoding="utf-8")
    # As text, and not parsed: key names of the dtype differ by version, and may be nested.
    (out / "config.json").write_text(config.replace('"float32"', '"bfloat16"'), encoding="utf-8")


def pick_rooms(examples: list[Example]) -> list[Example]:
    """Return a question of each task, each about a room of its own with boxes drawn."""
    rooms = []
    taken = set()
    for task in TASKS:
        # The first that fits, in the order of the set: the same ones at every call.
        for example in examples:
            image = example.images[0]
            # ask.py takes boxes and one image; marks that are points have no box to give.
            boxed = "bbox" in example.question and len(example.images) == 1
            if example.task == task and example.path == "dtr" and boxed and image not in taken:
                taken.add(image)
                rooms.append(example)
                # One a task; the next task looks on in the rooms that are left.
                break
    return rooms


def write_room(number: int, room: Example, out: Path) -> str:
    """Copy a room's picture and depth, write the script that asks its question; return its line."""
    name = f"room-{number}"
    shutil.copy(room.images[0], out / f"{name}.png")
    shutil.copy(room.depths[0], out / f"{name}-depth.png")
    lines = [
        f'"${{PYTHON:-python}}" ask.py --model {out}/tiny --out "${{OUT:-out/ask}}"',
        f"    --image {out}/{name}.png --depth {out}/{name}-depth.png",
        "    --intrinsics " + " ".join(f"{value:.1f}" for value in room.intrinsics[0]),
    ]
    # In the order of the question's <mask>s, as ask.py takes them.
    for _, box in room.regions:
        lines.append("    --region " + " ".join(f"{value:.0f}" for value in box))
    lines.append(f'    --question "{room.question}" "$@"')
    command = " \\\n".join(lines)
    script = f"#!/bin/sh\n# The answer is {room.answer}. More flags may follow.\n{command}\n"
    (out / f"{name}.sh").write_text(script, encoding="utf-8")
    return f"- `sh {out}/{name}.sh`: {room.question.replace(' <mask>', '')} ({room.answer})"


def card(speedrun: Path, millions: float, commands: list[str]) -> str:
    config = json.loads((speedrun / "sft" / "config.json").read_text())
    before = accuracies(speedrun / "eval-sft")
    after = accuracies(speedrun / "eval-rl")
    # Only for a run that has recorded none, so it is the commit of today, not of the training.
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return CARD.format(
        millions=millions,
        commit=config.get("commit") or git.stdout.strip() or "unknown",
        seed=config["seed"],
        questions=f"{before['n']:,}",
        lor_before=before["lor"],
        dtr_before=before["dtr"],
        lor_after=after["lor"],
        dtr_after=after["dtr"],
        commands="\n".join(commands),
    )


def accuracies(folder: Path) -> dict:
    """Return path -> accuracy in per cent, as text, and "n" -> how many questions were asked."""
    totals = {"lor": [], "dtr": []}
    for row in read_rows(folder / "predictions.jsonl"):
        totals[row["path"]].append(row["accuracy"])
    texts = {path: f"{100 * sum(values) / len(values):.1f}" for path, values in totals.items()}
    # Every question is asked on both paths, so one count holds for both.
    return texts | {"n": len(totals["lor"])}


if __name__ == "__main__":
    launch("assets", main, flags.parse(Config, __doc__))
