"""What the policy wrote while it learnt, from rollouts.jsonl, as rollouts.js reads it."""

import math
from dataclasses import asdict
from pathlib import Path

from reporting.examples import find_examples, place_of
from reporting.gallery import DIGITS, geometry_of, written_boxes
from reporting.runs import Run, read_lines
from reporting.views import Views
from srreal import Example, parse

# Tokens of all completions on the page: the steps of a longer log are thinned out evenly.
ALL_TOKENS = 400_000


class Pieces:
    """Cuts a completion into the texts of its tokens."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, row: dict) -> list[str]:
        """Return a text a token; the whole text alone where the run's tokenizer is gone."""
        if self.tokenizer is None:
            return [row["text"]]
        from tokenizers.decoders import DecodeStream

        # A character may take several tokens: it comes with its last, the others are empty.
        stream = DecodeStream(skip_special_tokens=False)
        return [stream.step(self.tokenizer, token) or "" for token in row["tokens"]]


def find_tokenizer(run: Run):
    """Return the tokenizer of the run's newest checkpoint, else of its --model; None: neither."""
    from tokenizers import Tokenizer  # of a report without rollouts nobody asks for it

    # step-000150: zeros in front, so that the order of names is that of steps.
    places = sorted(run.folder.glob("step-*"), reverse=True)
    if run.config.get("model"):
        places.append(place_of(run.folder, run.config.get("out", "")) / run.config["model"])
    for place in places:
        file = Path(place) / "tokenizer.json"
        if file.is_file():
            return Tokenizer.from_file(str(file))
    return None


def read_rollouts(run: Run) -> list[dict]:
    return read_lines(run.folder / "rollouts.jsonl")


def thinned(rows: list[dict], most: int = ALL_TOKENS) -> list[dict]:
    """Return the rows of every k-th step, the last among them: about `most` tokens at most."""
    tokens = sum(len(row["tokens"]) for row in rows)
    steps = sorted({row["step"] for row in rows})
    # Steps are about equally long, so every k-th keeps about 1 / k of the tokens. Whole
    # steps: a group is only worth seeing beside its siblings.
    stride = max(math.ceil(tokens / most), 1)
    # Counted from the end, so that what the run has learnt is seen.
    kept = set(steps[::-1][::stride])
    return [row for row in rows if row["step"] in kept]


def rollouts(run: Run, rows: list[dict], examples: dict[str, Example], views: Views) -> dict:
    """Pack a run's groups: what was asked, and its completions side by side.

    rows: of rollouts.jsonl. examples: by question, as far as their data are still there.
    """
    # Token by token a long run would not fit into a page.
    shown = thinned(rows)
    pieces = Pieces(find_tokenizer(run))
    groups: dict[tuple, dict] = {}
    for row in shown:
        example = examples.get(question_of_row(row))
        key = (row["step"], row["path"], row["group"])
        if key not in groups:
            groups[key] = group_of(row, example, views)
        # A row is one completion; those of a group need not follow each other in the log.
        groups[key]["samples"].append(sample_of(row, example, pieces))
    return {
        "name": run.name,
        "steps": run.steps,
        "logged": len({row["step"] for row in rows}),
        "groups": list(groups.values()),
    }


def examples_of_run(run: Run, rows: list[dict]) -> dict[str, Example]:
    return find_examples(run.folder, run.config, {question_of_row(row) for row in rows})


def tasks_of_rows(rows: list[dict], examples: dict[str, Example]) -> dict[str, str]:
    """Return id -> task of the rows whose question is known."""
    tasks = {}
    for row in rows:
        example = examples.get(question_of_row(row))
        if example is not None:
            tasks[row["id"]] = example.task
    return tasks


def question_of_row(row: dict) -> str:
    return row["id"].removesuffix(f"-{row['path']}")


def group_of(row: dict, example: Example | None, views: Views) -> dict:
    group = {
        "step": row["step"],
        "path": row["path"],
        "id": row["id"],
        "task": example.task if example else "",
        "question": row["question"],
        "truth": row["truth"],
        "kept": row["kept"],
        "frame": None,
        "views": [],
        "regions": [],
        "truths": [],
        "samples": [],
    }
    if example is not None:
        group |= geometry_of(example, views)
    return group


def sample_of(row: dict, example: Example | None, pieces: Pieces) -> dict:
    """Return a completion: the texts of its tokens, their probabilities in per cent, its reward."""
    return {
        "pieces": pieces(row),
        # Whole per cent are enough for a shade, and shorter than log-probs.
        "sure": [round(100 * math.exp(logprob)) for logprob in row["logprobs"]],
        "parts": {name: round(value, DIGITS) for name, value in row["parts"].items()},
        "total": round(row["total"], DIGITS),
        # It scales the gradient of every token of the completion.
        "advantage": round(row["advantage"], 2),
        "finished": row["finished"],
        "boxes": written_boxes(
            row["text"], row["path"], asdict(parse(row["text"], row["path"])), example
        ),
    }
