"""Check and preview data before a training: what there is, what is unusable, what it looks like.

    python -m data out/rooms --model out/tiny --out out/preview
    python -m data runs/rl_mixture.toml

PATH is what --data of the training scripts takes: any number of sources, or a mixture file. Prints
how many rows there are by path, task and kind of truth, and the unusable ones by reason, each as a
training would find them. --model adds lengths in tokens at that checkpoint's settings. --out gets
index.html, a page of examples: regions, marks, centres and depth drawn, prompt and target as text.

The exit code is 0 where a training could begin, 1 where rows are unusable or too long, or where
there is none, 2 for a wrong flag.
"""

import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import Annotated, Literal

import numpy as np
import tyro

import data
import flags
from data import preview
from data.rows import progress
from errors import UserError, launch
from flags import Count, Seed
from srreal import PATHS, Example, target, truth_kind

NAME = "python -m data"


@dataclass
class Config:
    # data sets: paths or kind:path; or a mixture file
    sources: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PATH...")]
    model: str | None = None  # checkpoint directory or hub id, whose tokens are counted
    out: str | None = None  # a folder for index.html
    examples: Count = 2  # of each path and task on the page, chosen by --seed
    seed: Seed = 0  # of that choice
    # how a region is read, as in training; it changes lengths
    regions: Literal["token", "text"] = "token"
    max_pixels: Count | None = None  # image size limit; None: the checkpoint's own

    def __post_init__(self):
        flags.check(self)
        if not self.sources:
            raise UserError("PATH is missing: a data set, or a mixture file")


# ---- Counts


def counted(examples: list[Example]) -> list[list]:
    """Return a table: a line for each path, task and kind of truth, and what its rows have."""
    header = ["path", "task", "truth", "rows", "images", "depth", "regions", "centres", "rationale"]
    counts: dict[tuple, Counter] = {}
    for example in examples:
        key = (example.path, example.task or "-", truth_kind(example.answer))
        has = counts.setdefault(key, Counter())
        facts = {
            "rows": True,
            "images": bool(example.images),
            "depth": any(depth is not None for depth in example.depths or ()),
            "regions": bool(example.regions),
            "centres": bool(example.objects),
            "rationale": bool(example.rationale),
        }
        # A Counter of names: each fact that holds counts one.
        has.update(name for name, holds in facts.items() if holds)
    table = [header]
    for key in sorted(counts):
        numbers = [f"{counts[key][name]:,}" for name in header[3:]]
        table.append([*key, *numbers])
    return table


def print_table(table: list[list[str]], texts: int) -> None:
    """Print rows of cells in columns; the first `texts` columns stand to the left."""
    widths = []
    for column in zip(*table, strict=True):
        widths.append(max(map(len, column)))
    for row in table:
        cells = []
        for i, (cell, width) in enumerate(zip(row, widths, strict=True)):
            cells.append(cell.ljust(width) if i < texts else cell.rjust(width))
        print("  ".join(cells).rstrip())


def target_of(example: Example) -> str | None:
    """Return what SFT would teach; None where there is nothing to learn."""
    try:
        return target(example)
    except ValueError:
        return None


# ---- Lengths


@dataclass
class Lengths:
    """Tokens of the rows of one path."""

    prompts: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)  # both together


def lengths_of(examples: list[Example], processor) -> dict[str, Lengths]:
    """Count tokens by path. Images are not decoded: their headers say what they become."""
    from training.lengths import key_of, measured  # imports torch

    found: dict[str, Lengths] = {}
    # One image may stand in thousands of rows: each header is read once.
    sizes = measured(examples)
    for example in progress(examples, "lengths", "row", len(examples)):
        lengths = found.setdefault(example.path, Lengths())
        images = [sizes[key_of(image)] for image in example.images]
        if None in images:
            continue  # a file that is torn behind its header
        prompt = processor.prompt_length(example, images)
        lengths.prompts.append(prompt)
        text = target_of(example)
        if text is not None:
            # And the end token.
            answer = len(processor.encode(text)) + 1
            lengths.targets.append(answer)
            lengths.rows.append(prompt + answer)
    return found


def lengths_table(found: dict[str, Lengths]) -> list[list[str]]:
    table = [["path", "tokens of", "rows", "median", "95 %", "longest"]]
    for path in PATHS:
        if path not in found:
            continue
        lengths = found[path]
        parts = {"prompt": lengths.prompts, "target": lengths.targets, "both": lengths.rows}
        for name, tokens in parts.items():
            if tokens:
                # The longest decides what fits into memory; the median what an epoch costs.
                numbers = [len(tokens), *np.quantile(tokens, (0.5, 0.95, 1))]
                table.append([path, name, *map(whole, numbers)])
    return table


def whole(number: float) -> str:
    return f"{number:,.0f}"


def print_lengths(examples: list[Example], cfg: Config) -> int:
    """Print lengths in tokens; return how many prompts exceed the checkpoint's context."""
    from model.processor import Processor  # imports torch

    processor = Processor.from_pretrained(cfg.model, max_pixels=cfg.max_pixels, regions=cfg.regions)
    found = lengths_of(examples, processor)
    print()
    print_table(lengths_table(found), texts=2)
    limit = processor.max_positions
    if limit is None:
        print(f"{cfg.model} does not say how long a context it was trained on")
        return 0
    # A prompt that is too long can't be asked at all; with its target, RL can still ask it.
    too_long = 0
    for_sft = 0
    for lengths in found.values():
        too_long += sum(length > limit for length in lengths.prompts)
        for_sft += sum(length > limit for length in lengths.rows)
    print(
        f"{too_long:,} prompts, and {for_sft:,} prompts with their targets, exceed the context of "
        f"{limit:,} tokens"
    )
    return too_long


# ---- The command


def main(cfg: Config) -> int:
    """Check, print, write the page; return the exit code."""
    loaded = data.read(cfg.sources)
    bad = data.BadRows(loaded.bad)
    examples = loaded.examples
    print(f"\n{loaded.rows:,} rows, {len(bad):,} of them unusable; {len(examples):,} examples")
    if examples:
        print_table(counted(examples), texts=3)
        without = sum(target_of(example) is None for example in examples)
        if without:
            print(
                f"{without:,} have no target for SFT (no rationale, or no centres on path dtr): "
                "python -m data.coldstart makes rationales"
            )
    if bad.rows:
        print()
        print(bad.told(cfg.out) if cfg.out else bad)
    # The slow part, as every prompt is tokenised: only where a checkpoint is named.
    too_long = print_lengths(examples, cfg) if cfg.model and examples else 0
    if cfg.out and examples:
        print(f"\n{preview.write(examples, cfg.out, cfg.examples, cfg.seed)}")
    return 1 if bad.rows or too_long or not examples else 0


def command(cfg: Config) -> None:
    sys.exit(main(cfg))


if __name__ == "__main__":
    sys.argv[0] = NAME  # in --help and in errors, in the place of __main__.py
    launch(NAME, command, flags.parse(Config, __doc__))
