"""SpatialScenes: procedural RGB-D rooms with exact truth, and questions about them in both paths.

    python -m data.scenes --out out/scenes --n 4000 --seed 0 --size 256 192

data/rooms/ draws the rooms and asks the questions; this writes them in our own row format
(data/schema.py), a scene at a time.
"""

import json
import os
import random
import signal
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import Pool
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from PIL import Image
from tqdm import tqdm

import flags
from data.rooms.questions import FAMILIES, ON_REQUEST, ask, with_options
from data.rooms.render import middle
from data.rooms.scene import scene
from data.rooms.things import STYLES
from errors import UserError, launch, writing
from flags import Bound, Count, Seed, Share
from machine import cpus
from srreal import Example, prompt, target, write_metres

Side = Annotated[int, Bound(32)]


@dataclass
class Config:
    out: Path  # folder to write: rows.jsonl, images/, depth/
    n: Count = 4000  # scenes; each yields several questions
    seed: Seed = 0  # two seeds share no scene
    # width and height of the images in pixels
    size: tuple[Side, Side] = (256, 192)
    # only these families of questions (also closest and height, which are asked only here); empty:
    # the usual seven
    ask: tuple[str, ...] = ()
    # share of the scenes that are asked about on path lor, too; dtr asks about all
    lor: Share = 1.0
    # how rooms look, and from where they are seen (STYLES in data/rooms/things.py)
    style: Literal[tuple(STYLES)] = "house"
    # share of the questions whose rationale is a guess ("By eye, ...") in place of the working
    guess: Share = 0.0
    # options in random order; they are in alphabetical order otherwise
    shuffle_options: bool = False
    # depth maps beside the images; --no-depth: images alone
    depth: bool = True
    # text alone: centres stand in the question in place of regions, and no image is given
    told: bool = False
    # processes; the set does not depend on their number
    workers: Count = field(default_factory=cpus)

    def __post_init__(self):
        flags.check(self)
        known = FAMILIES | ON_REQUEST
        unknown = sorted(set(self.ask) - known.keys())
        if unknown:
            raise UserError(f"--ask {' '.join(unknown)}: it is of {', '.join(sorted(known))}")


def main(config: Config) -> None:
    """Render a set. rows.jsonl appears last: a set that was cut off has none."""
    rows = config.out / "rows.jsonl"
    part = config.out / "rows.jsonl.part"
    try:
        for folder in ("images", "depth"):
            (config.out / folder).mkdir(parents=True, exist_ok=True)
        rows.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"--out {config.out}: {error}") from error
    # Ctrl-C is this process's to answer.
    workers = Pool(config.workers, signal.signal, (signal.SIGINT, signal.SIG_IGN))
    # A scene depends on (seed, index) alone, and imap keeps the order: so not on the workers.
    with writing(part), workers as pool, open(part, "w") as file:
        made = pool.imap(partial(make, config), range(config.n), chunksize=8)
        file.writelines(tqdm(made, total=config.n, desc="scenes", unit="scene"))
    os.replace(part, rows)


def make(config: Config, index: int) -> str:
    """Write a scene's images and depth; return its rows as text."""
    made = scene(config.seed, index, config.size, config.style)
    name = f"s{config.seed}-{index:06d}"
    if not config.told:
        write_views(made, name, config)
    asked = rows_of(made, name, config.guess, config.shuffle_options)
    # Behind the usual draws: the share of lor changes nothing else, nor do other families.
    paths = ("lor", "dtr") if made.rng.random() < config.lor else ("dtr",)
    asked += rows_of(made, name, config.guess, config.shuffle_options, ON_REQUEST)
    wanted = config.ask or FAMILIES
    lines = []
    for row in asked:
        if row["path"] in paths and row["task"] in wanted:
            if not config.depth:
                row = row | {"depths": None}
            if config.told:
                row = told(row)
            lines.append(json.dumps(row) + "\n")
    return "".join(lines)


def write_views(made, name, config):
    """Write each view's image and, unless --no-depth, its depth in millimetres (16 bits)."""
    for view, (image, metres) in enumerate(zip(made.images, made.depths, strict=True)):
        pictures = {"images": image}
        if config.depth:
            pictures["depth"] = Image.fromarray((metres * 1000).round().astype(np.uint16))
        for folder, picture in pictures.items():
            path = config.out / folder / f"{name}-{view}.png"
            with writing(path):
                # Fast rather than small: a set is written once and read a few times.
                picture.save(path, compress_level=1)


def rows_of(made, name, guess=0.0, shuffle_options=False, families=FAMILIES):
    """Return the rows of up to six families, a question each, written in both paths.

    guess: share of the questions whose rationale doesn't work the answer out.
    """
    rows = []
    for task in made.rng.permutation(list(families)).tolist():
        # Each family draws, also when six have asked: a set's rows don't depend on this number.
        view, question = ask(made.rng, families[task], made.marks)
        if question is None or len(rows) == 12:
            continue
        # By generators of their own: options and guesses change no scene and no question.
        shuffler = random.Random(f"{name} {task} options") if shuffle_options else None
        question = with_options(question, shuffler)
        row = row_of(made, name, task, view, families[task].views, question)
        thoughts = {"lor": question.lor, "dtr": question.dtr}
        if random.Random(f"{name} {task}").random() < guess:
            thoughts = dict.fromkeys(thoughts, question.guess)
        for path, thought in thoughts.items():
            head = {"id": f"{name}-{task}-{path}", "path": path}
            rows.append(head | row | {"rationale": f"{thought}."})
    return rows


def row_of(made, name, task, view, count, question):
    """Return what a question's rows of both paths have in common.

    count: images of the question; view: the one in whose frame it asks.
    """
    several = count > 1
    # In the order of the question, as its <mask>s are.
    marks = [mark for mark in made.marks if mark.text in question.text]
    marks.sort(key=lambda mark: question.text.index(mark.text))
    files = [f"{name}-{k}.png" for k in range(count)]
    objects = {}
    for mark in marks:
        # By view only where the question names one.
        objects[mark.mention] = dict(enumerate(mark.centres)) if several else mark.centres[0]
    return {
        "task": task,
        "question": question.text,
        "answer": question.answer,
        "frame": view if several else None,
        "images": [f"images/{file}" for file in files],
        "depths": [f"depth/{file}" for file in files],
        "intrinsics": [(c.focal, c.focal, *middle(c.size)) for c in made.cameras[:count]],
        "regions": [(mark.view, mark.region) for mark in marks],
        "names": {mark.mention: mark.thing.name for mark in marks},
        "objects": objects,
        "sizes": {mark.mention: (2 * mark.thing.half).round(3).tolist() for mark in marks},
    }


def told(row):
    """Return a row as text alone: where a region's token would stand, its centre is told.

    A model from scratch learns to reckon and to compare from such rows: nothing in them depends on
    how well it sees. All other text is as in the row with images, so that it carries over.
    """
    example = Example(**row)
    question = prompt(example)
    for centre in row["objects"].values():
        seen = centre if row["frame"] is None else centre[row["frame"]]
        # The objects are in the order of the question.
        question = question.replace("<mask>", write_metres(seen), 1)
    return {
        "id": f"{row['id']}-told",
        "path": "direct",
        "task": row["task"],
        "question": question,
        "answer": target(example),
    }


if __name__ == "__main__":
    launch("scenes", main, flags.parse(Config, __doc__))
