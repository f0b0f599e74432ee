"""The questions themselves, with images, depth and truth, where their data are still there."""

import contextlib
from pathlib import Path

import data as datasets
from data import benchmarks
from errors import UserError
from eval_table import question_id
from srreal import PATHS, Example


def place_of(folder: Path, out: str) -> Path:
    """Return the directory in which a script was started whose --out was `folder`."""
    folder = folder.resolve()
    # Relative names in its flags start there, wherever the report is made.
    parts = Path(out).parts
    # With --out out/rl the folder /work/out/rl was made by a script started in /work. A folder
    # that has moved since doesn't end in --out: then the current directory is the best guess.
    if out and not Path(out).is_absolute() and folder.parts[-len(parts) :] == parts:
        return Path(*folder.parts[: -len(parts)])
    return Path.cwd()


def find_examples(folder: Path, config: dict, questions: set[str]) -> dict[str, Example]:
    """Return the wanted questions by id (without its path); those whose data are gone are left out.

    folder, config: of the run or evaluation that was about them.
    """
    if not (config.get("data") and questions):
        return {}
    with contextlib.chdir(place_of(folder, config.get("out", ""))):
        try:
            if config.get("benchmark"):
                examples = of_benchmark(config)
            else:
                examples = of_sources(config["data"], questions)
        except (OSError, ValueError, UserError):
            return {}  # the data may have moved since, or changed
    found = {}
    for example in examples:
        if question_id(example) in questions:
            # The first of its paths: image, regions and truth are the same on all.
            found.setdefault(question_id(example), example)
    return found


def of_benchmark(config: dict) -> list[Example]:
    (root,) = config["data"]
    # Nothing is downloaded for a report.
    if not Path(root).exists():
        return []
    frames = config.get("frames", 32)
    return benchmarks.load(config["benchmark"], root, config["path"], True, frames)


def of_sources(sources: list[str], questions: set[str]) -> list[Example]:
    """Return the Examples of the wanted rows; of a large training set no other is opened."""
    wanted = set(questions)
    for question in questions:
        # A row's id is its question's, or that with the path behind it (eval_table.question_id).
        wanted |= {f"{question}-{path}" for path in PATHS}
    # Up to here a row is its text: images and depth are looked at for the wanted alone.
    taken = datasets.rows_of(datasets.parts_of(sources))
    loaded, _ = datasets.examples_of([row for row in taken if row.id in wanted], None)
    return loaded.examples
