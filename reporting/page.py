"""The page itself: what there is of tables, curves, gallery and rollouts, in one HTML file."""

import base64
import json
import zlib
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from reporting import curves, gallery, rollouts, tables
from reporting.explained import Explained
from reporting.runs import Comparison, Evaluation, Run, comparisons
from reporting.views import Views
from srreal import PATHS, SECTIONS

FOLDER = Path(__file__).parent
# The page's own JavaScript, in the order in which it needs each other.
SCRIPTS = ("common.js", "picture.js", "room.js", "gallery.js", "rollouts.js")
# Bytes of a page at most, as far as smaller images can keep to it.
ROOM = 14e6
# Rather a page above ROOM than one without pictures.
LEAST_FOR_IMAGES = 2e6


@dataclass
class Made:
    """What a run or an evaluation was made with: a fold-out line at the top of the page."""

    name: str
    kind: str
    facts: dict[str, str]  # in the line itself
    flags: dict[str, str] = field(default_factory=dict)


# ---- What was run


def made_by_run(run: Run) -> Made:
    config = run.config
    return Made(
        name=run.name,
        kind=run.script,
        facts=facts_of(
            model=config.get("model"),
            data=config.get("data"),
            steps=f"{run.steps:,}",
            duration=duration(run.seconds),
            seed=config.get("seed"),
            date=run.date,
            commit=config.get("commit"),
        ),
        flags=flags_of(config),
    )


def made_by_eval(evaluation: Evaluation) -> Made:
    config = evaluation.config
    summary = evaluation.summary
    return Made(
        name=evaluation.name,
        kind="eval",
        facts=facts_of(
            model=config.get("model"),
            data=config.get("benchmark") or config.get("data"),
            answers=f"{len(evaluation.rows):,}",
            duration=duration(summary.get("seconds")),
            seed=config.get("seed"),
            date=evaluation.date,
            commit=summary.get("commit"),
        ),
        flags=flags_of(config),
    )


def facts_of(**facts) -> dict[str, str]:
    """Return the facts that are known, in words."""
    return {name: in_words(value) for name, value in facts.items() if value not in (None, "")}


def flags_of(config: dict) -> dict[str, str]:
    """Return the flags as they were typed, or could have been."""
    # Those three are facts of the run, which stand in the line itself.
    names = [name for name in config if name not in ("script", "commit", "date")]
    return {f"--{name.replace('_', '-')}": in_words(config[name]) for name in names}


def in_words(value) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return str(value)


def duration(seconds: float | None) -> str | None:
    """Write seconds as `1 h 12 min`, `12 min` or `45 s`."""
    if not seconds:
        return None
    minutes = round(seconds / 60)
    # Of a short run seconds say more.
    if minutes < 2:
        return f"{max(seconds, 1):.0f} s"
    hours, rest = divmod(minutes, 60)
    return f"{hours} h {rest} min" if hours else f"{minutes} min"


# ---- What JavaScript reads


def packed(value) -> str:
    """Return a value as JSON, compressed and in base64: no markup can hide in it."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return base64.b64encode(zlib.compress(text.encode(), 9)).decode()


def scripts() -> str:
    return "\n".join((FOLDER / name).read_text() for name in SCRIPTS)


# ---- The page


@dataclass
class RolledOut:
    """What is shown of a run's rollouts.jsonl."""

    by_task: list[tuple[str, list]]  # (run, its charts)
    runs: list[dict]


def roll_out(runs: list[Run], views: Views) -> RolledOut:
    """Pack the rollouts of all runs, and draw their reward by task."""
    found = RolledOut([], [])
    for run in runs:
        rows = rollouts.read_rollouts(run)
        if not rows:
            continue
        examples = rollouts.examples_of_run(run, rows)
        charts = curves.charts_by_task(rows, rollouts.tasks_of_rows(rows, examples))
        if charts:
            found.by_task.append((run.name, charts))
        found.runs.append(rollouts.rollouts(run, rows, examples, views))
    return found


def explanations(found: list[Comparison], sections: list, by_task: list) -> dict[str, str]:
    """Return what each metric on the page is; those that nobody has explained are missing."""
    # Each text stands once on the page, however many charts and rows refer to it.
    names = []
    for comparison in found:
        names += tables.metrics_of(comparison)
    for section in sections:
        names += [chart.metric for chart in section.learning + section.costs]
    if by_task:
        names.append("reward")
    explained = Explained()
    texts = {name: explained(name) for name in names}
    return {name: text for name, text in texts.items() if text}


def page(runs: list[Run], evals: list[Evaluation], questions: int, title: str) -> str:
    """Render the report as HTML.

    questions: so many of each set are in the gallery at most.
    """
    found = comparisons(evals)
    sections = curves.sections(runs)
    views = Views()
    sets = gallery.gallery(found, questions, views) if questions else []
    rolled_out = roll_out(runs, views)
    # The texts first: images are as large as the room that is left.
    answers = packed({"sets": sets, "rollouts": rolled_out.runs})
    images = views.packed(max(ROOM - len(answers), LEAST_FOR_IMAGES))
    # Autoescape: nothing that a model wrote becomes markup.
    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        # A name that is missing is a bug, and no empty cell.
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html").render(
        title=title,
        today=f"{datetime.now():%Y-%m-%d}",
        headline=tables.headline(found),
        made=[made_by_run(run) for run in runs] + [made_by_eval(e) for e in evals],
        # Each with its tables, the names of others' models, and a benchmark's breakdown.
        comparisons=[(c, tables.tables(c), *tables.breakdowns(c)) for c in found],
        percent=tables.PERCENT,
        sections=sections,
        by_task=rolled_out.by_task,
        sets=sets,
        rollouts=rolled_out.runs,
        explained=explanations(found, sections, rolled_out.by_task),
        path_numbers={path: i for i, path in enumerate(PATHS)},
        answers=answers,
        # Images are compressed already.
        images=packed(images),
        tags=list(SECTIONS),
        # Our own files, the one text that must not be escaped.
        scripts=Markup(scripts()),
    )
