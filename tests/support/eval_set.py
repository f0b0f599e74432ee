"""A small set in our own row format, and a stand-in for the model that answers it."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image

import eval as evaluation
from model.rollout import Rollout
from srreal import Example
from training import run


def example(name="q", path="dtr", **changes) -> Example:
    fields = dict(
        images=[Image.new("RGB", (40, 30))],
        question="How far apart are the chair (red bbox <mask>) and the table (blue point <mask>)?",
        answer="2.0",
        intrinsics=[(50.0, 50.0, 20.0, 15.0)],
        task="distance",
        regions=[(0, (1, 2, 11, 12)), (0, (20, 5, 26, 15))],
        rationale="They are 2.0 m apart.",
        objects={"red bbox": (0.0, 0.0, 2.0), "blue point": (0.0, 0.0, 4.0)},
    )
    return Example(id=f"{name}-{path}", path=path, **fields | changes)


def write_set(folder: Path, n: int = 6) -> str:
    """A set of n images with a question of each of two tasks, in both paths, in our own row
    format."""
    for part in ("images", "depth"):
        (folder / part).mkdir(parents=True)
    rows = []
    for i in range(n):
        Image.new("RGB", (40, 30), (40 * i, 90, 60)).save(folder / "images" / f"{i}.png")
        Image.fromarray(np.full((30, 40), 5000, np.uint16)).save(folder / "depth" / f"{i}.png")
        for task, answer in (("distance", "2.0"), ("order", "AB"[i % 2])):
            for path in ("lor", "dtr"):
                e = example(f"s{i}-{task}", path, answer=answer, task=task)
                row = {key: value for key, value in vars(e).items() if value not in (None, {}, [])}
                rows.append(row | {"images": [f"images/{i}.png"], "depths": [f"depth/{i}.png"]})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def stand_in(monkeypatch, write):
    """A model whose answer to an example is write(example), and whose 3D head is 0.3 m too far."""
    monkeypatch.setattr(evaluation, "load_model", lambda *args: None)
    processor = SimpleNamespace(
        prefetch=lambda examples: None,
        pixels_of=lambda size: size[0] * size[1],
        untrained_parts=lambda examples, learning, head: [],
    )
    monkeypatch.setattr(run, "load_processor", lambda *args: processor)

    def head(e):
        return np.array([np.add(centre, (0, 0, 0.3)) for centre in e.objects.values()])

    def heads(model, processor, examples):
        return [head(e) for e in examples]

    def answers(model, processor, examples, **options):
        return [[Rollout(write(e), list(range(7)), [0.0] * 7, True)] for e in examples]

    monkeypatch.setattr(evaluation, "predict_centres", heads)
    monkeypatch.setattr(evaluation, "sample_groups", answers)
