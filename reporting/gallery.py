"""Every question with the answers of all evaluations, as the page's gallery.js reads it."""

import hashlib

import numpy as np

from data.boxes import read_boxes_3d
from eval_table import true_centres
from mentions import object_of
from reporting.examples import find_examples
from reporting.runs import Comparison
from reporting.views import Views
from srreal import PATHS, REWARDS, Example, several_views

DIGITS = 3  # of metres and rewards


def gallery(found: list[Comparison], most: int, views: Views) -> list[dict]:
    """Return a set of questions for each comparison; {columns, questions} each.

    most: so many questions of a set at most, the same ones in every report.
    """
    sets = []
    for comparison in found:
        by_question = answers_by_question(comparison)
        # Chosen before images are opened: finding one costs its file, and most are never shown.
        chosen = choose(list(by_question), most)
        examples = find_all(comparison, set(chosen))
        questions = []
        for name in chosen:
            questions.append(question_of(name, by_question[name], examples.get(name), views))
        sets.append(
            {
                "title": comparison.title,
                "columns": [evaluation.name for evaluation in comparison.sighted],
                "asked": len(by_question),
                "found": len(examples),
                "questions": questions,
            }
        )
    return [a_set for a_set in sets if a_set["questions"]]


def answers_by_question(comparison: Comparison) -> dict[str, list[tuple[int, dict]]]:
    """Return question -> (number of the evaluation, row) of its answers.

    A blind model's say nothing about an image, unless they are all there is.
    """
    answers: dict[str, list] = {}
    for column, evaluation in enumerate(comparison.sighted):
        for row in evaluation.rows:
            answers.setdefault(row["question_id"], []).append((column, row))
    return answers


def choose(names: list[str], most: int) -> list[str]:
    """Return `most` names at most, in their order: the same ones in every report."""
    # Those with the lowest hashes: of every task its share.
    kept = set(sorted(names, key=lambda name: hashlib.sha1(name.encode()).digest())[:most])
    return [name for name in names if name in kept]


def find_all(comparison: Comparison, questions: set[str]) -> dict[str, Example]:
    """Look the questions up where the evaluations found them, until all are there."""
    examples: dict[str, Example] = {}
    for evaluation in comparison.evals:
        # The first whose data are still there has them all, as a rule.
        missing = questions - examples.keys()
        examples |= find_examples(evaluation.folder, evaluation.config, missing)
    return examples


def question_of(name: str, answers: list, example: Example | None, views: Views) -> dict:
    # What was asked is the same in every answer's row.
    _, row = answers[0]
    question = {
        "id": name,
        "task": row["task"],
        "question": row["question"],
        "truth": row["truth"],
        "frame": None,
        "images": len(row["images"]),
        "views": [],
        "regions": [],
        "truths": [],
    }
    if example is None:
        question["views"] = views.of_files(row["images"])
    else:
        question |= geometry_of(example, views)
    return question | {"answers": [answer_of(column, row, example) for column, row in answers]}


# ---- Geometry


def geometry_of(example: Example, views: Views) -> dict:
    """Return a question's views, regions and true boxes, in pixels and metres."""
    truths = []
    for view in range(len(example.images)):
        for mention, centre in true_centres(example, view).items():
            truths.append(box_of(view, mention, centre, size_of(example, mention)))
    regions = []
    before = example.question.split("<mask>")
    # Not strict: there is one more text than regions, that behind the last <mask>.
    for (view, region), text in zip(example.regions, before, strict=False):
        mention = mention_before(text, example)
        regions.append({"view": view, "mention": mention, "box": bounds_of(region)})
    numbers = views.of_example(example)
    return {"views": numbers, "regions": regions, "truths": truths, "frame": example.frame}


def size_of(example: Example, mention: str):
    for name, size in (example.sizes or {}).items():
        # true_centres writes mentions in lower case; a row's sizes have them as they were typed.
        if name.lower().strip() == mention:
            return size
    return None


def box_of(view: int, mention: str | None, centre, size=None) -> dict:
    """Return a point, or a box along the camera's axes, in the camera frame of a view."""
    return {
        "view": view,
        "mention": (mention or "").lower(),
        # float: JSON doesn't know numpy's numbers.
        "at": [round(float(value), DIGITS) for value in centre],
        "size": None if size is None else [round(float(value), DIGITS) for value in size],
    }


def mention_before(text: str, example: Example) -> str:
    """Return what a region is called by the text before its <mask>: an object, else two words."""
    name = object_of(text, example.objects) or " ".join(text.split()[-2:]).strip("(")
    return name.lower()


def bounds_of(region) -> list[float]:
    """Return [x, y, width, height] of a box, or around a mask."""
    region = np.asarray(region)
    if region.ndim == 2:
        ys, xs = region.nonzero()
    else:
        xs = region[::2]
        ys = region[1::2]
    # Width and height are the distances of the outermost pixels.
    sides = (xs.min(), ys.min(), np.ptp(xs), np.ptp(ys))
    return [round(float(side), 1) for side in sides]


# ---- Answers


def answer_of(column: int, row: dict, example: Example | None) -> dict:
    """Return what an evaluation answered on a path, with what it earned and where it points."""
    names = (*REWARDS, "total", "official", "robust")
    parts = {name: row[name] for name in names if row.get(name) is not None}
    return {
        "column": column,
        "path": row["path"],
        "text": row["text"],
        "answer": row["answer"],
        "mark": mark_of(row),
        "parts": {name: round(value, DIGITS) for name, value in parts.items()},
        "tokens": row["tokens"],
        "truncated": row["truncated"],
        "boxes": written_boxes(row["text"], row["path"], row["parsed"], example),
        "head": head_boxes(row, example),
    }


def mark_of(row: dict) -> float:
    """Return what decides whether an answer is right, from 0 to 1."""
    # A benchmark's own rule where there is one: strict accuracy asks for our formats.
    if row.get("robust") is not None:
        return row["robust"] / 100
    return row["accuracy"]


def written_boxes(text: str, path: str, parsed: dict, example: Example | None) -> list[dict]:
    """Return the centres that an answer states, each in the view whose frame it names."""
    if example is None:
        return []
    # Of several views the answer states one frame, and its centres mean nothing in the others.
    view = parsed["frame"] if several_views(example) else 0
    if view not in range(len(example.images)):
        return []
    # Grounding data, on path direct, states boxes with sizes in a form of its own.
    if not PATHS[path].sections:
        boxes = read_boxes_3d(text)
        return [box_of(view, mention, centre, size) for mention, (centre, size) in boxes.items()]
    return [box_of(view, mention, centre) for mention, _, centre in parsed["boxes"]]


def head_boxes(row: dict, example: Example | None) -> list[dict]:
    """Return the 3D head's centres, each in the frame of its region's image."""
    if example is None:
        return []
    boxes = []
    # A blind model was shown other regions, equally many.
    regions = zip(row["region_mentions"], example.regions, row["head_centres"], strict=False)
    for mention, (view, _), centre in regions:
        boxes.append(box_of(view, mention, centre))
    return boxes
