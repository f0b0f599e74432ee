"""Write the tables of runs/claims.sh and of the speedrun's seeds from the runs' own files.

    python -m runs.claims out/claims                         prints them
    python -m runs.claims out/claims --into docs/results.md  puts them between that page's marks

out/claims has a folder a seed, seed-0 and so on, as runs/claims.sh makes them. All seeds answer the
same test questions. A difference is paired: the same question, path and seed, before and after.
Its standard error takes all answers about one image, of all seeds, as one cluster, so it has what
another set of questions would change; the column of seeds shows what another seed changes. Claims
whose runs aren't there (yet) are left out, and named.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from operator import itemgetter
from pathlib import Path
from statistics import fmean
from typing import Annotated

import tyro

import data
import flags
from errors import UserError, launch, writing
from eval_table import estimate, paired, points
from runs.gain import read_rows
from srreal import Example, score

BEGIN = "<!-- claims: written by python -m runs.claims -->"
END = "<!-- claims: end -->"
PATHS = ("lor", "dtr")


@dataclass
class Config:
    # what runs/claims.sh has made
    folder: Annotated[Path, tyro.conf.Positional]
    into: Path | None = None  # a page with the two marks; None: print the tables

    def __post_init__(self):
        flags.check(self)


class Seeds:
    """The runs and answers of all seeds, read when they are asked for."""

    def __init__(self, folder: Path):
        self.folders = sorted(folder.glob("seed-*"))
        if not self.folders:
            raise UserError(f"{folder}: no folder seed-0 and so on, as runs/claims.sh makes them")

    def answers(self, name: str) -> list[list[dict]]:
        """Return the rows of an eval, a list a seed, of those seeds that have finished it.

        Ids get their seed, so that only answers of one seed are paired; clusters keep the image's
        name alone, as all seeds are asked about the same images.
        """
        found = []
        for folder in self.folders:
            if not (folder / name / "summary.json").exists():
                continue
            rows = []
            # The seed joins the id, so that only answers of one seed are paired.
            for row in read_rows(folder / name / "predictions.jsonl"):
                row["id"] = f"{folder.name} {row['id']}"
                row["cluster"] = Path(row["cluster"]).name
                rows.append(row)
            found.append(rows)
        return found

    def examples(self) -> dict[str, Example]:
        """Return the test questions by id: the same for every seed."""
        examples = data.load([str(self.folders[0] / "scenes" / "test")])
        return {example.id: example for example in examples}

    def metrics(self, name: str) -> list[list[dict]]:
        """Return the rows of metrics.jsonl of a run, a list a seed."""
        files = [folder / name / "metrics.jsonl" for folder in self.folders]
        return [read_rows(file) for file in files if file.exists()]


# ---- Numbers


def pool(answers: list[list[dict]], path: str | None = None, task: str | None = None) -> list[dict]:
    """Return the rows of all seeds on a path (None: any) about a family (None: all)."""
    rows = list(chain.from_iterable(answers))
    if path:
        rows = [row for row in rows if row["path"] == path]
    if task:
        rows = [row for row in rows if row["task"] == task]
    return rows


def percent(rows: list[dict], metric: str = "accuracy") -> str:
    # null: a metric that this question has not, such as `detect` without known objects.
    values = [row[metric] for row in rows if row[metric] is not None]
    return f"{100 * fmean(values):.1f}" if values else "-"


def gain(before: list[dict], after: list[dict], metric: str = "accuracy") -> str:
    """Write the paired difference in points with its standard error."""
    difference = paired(before, after, metric)
    return points(difference) if difference else "-"


def gains_by_seed(
    before: list[list[dict]], after: list[list[dict]], path: str | None = None
) -> str:
    """Write each seed's own paired difference of accuracy in points."""
    texts = []
    for seed in after:
        # Ids hold their seed. One that has no "before" yet has no pairs.
        difference = paired(pool(before, path), pool([seed], path))
        if difference:
            texts.append(f"{100 * difference['value']:+.1f}")
    return ", ".join(texts)


def centre_error(rows: list[dict]) -> str:
    """Write the median distance of the text's centres to the truth in metres, with its error."""
    distances = []
    clusters = []
    for row in rows:
        # By mention: an object that wasn't written, or under another name, has no distance.
        own = list(row["text_errors"].values())
        distances += own
        clusters += [row["cluster"]] * len(own)
    median = estimate(distances, clusters, median=True)
    return f"{median['value']:.3f} ± {median['se'] or 0:.3f}" if median else "-"


def families(answers: list[list[dict]]) -> list[str]:
    return sorted({row["task"] for row in pool(answers)})


def table(heading: list[str], rows: list[list[str]]) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# ---- Claims: each returns its table, or None where its runs are missing


def rl_lifts_both_paths(seeds: Seeds) -> str | None:
    before = seeds.answers("eval-sft")
    after = seeds.answers("eval-rl")
    if not (before and after):
        return None
    rows = []
    # Greedy but for the last column: RL maximises the reward of sampled answers.
    for path in PATHS:
        for task in (None, *families(after)):
            old = pool(before, path, task)
            new = pool(after, path, task)
            sampled = "-"
            # What RL maximises; by family its error would be as large as itself.
            if task is None:
                sampled = gain(
                    pool(seeds.answers("eval-sft-sampled"), path),
                    pool(seeds.answers("eval-rl-sampled"), path),
                    "total",
                )
            name = f"**{path.upper()}**" if task is None else task
            by_seed = gains_by_seed(before, after, path) if task is None else ""
            line = [name, f"{len(new)}", percent(old), percent(new), gain(old, new)]
            rows.append([*line, by_seed, sampled])
    heading = ["", "answers", "cold start", "after RL", "gain", "by seed", "gain in sampled reward"]
    return table(heading, rows)


def dtr_where_metres_matter(seeds: Seeds) -> str | None:
    answers = seeds.answers("eval-rl")
    if not answers:
        return None
    rows = []
    for task in (None, *families(answers)):
        lor = as_if_on_one_path(pool(answers, "lor", task))
        dtr = as_if_on_one_path(pool(answers, "dtr", task))
        by_seed = ""
        if task is None:
            dtr_of_seeds = [as_if_on_one_path(pool([seed], "dtr")) for seed in answers]
            by_seed = gains_by_seed([lor], dtr_of_seeds)
        rows.append([task or "**all**", percent(lor), percent(dtr), gain(lor, dtr), by_seed])
    return table(["", "LOR", "DTR", "DTR - LOR", "by seed"], rows)


def as_if_on_one_path(rows: list[dict]) -> list[dict]:
    """Let both paths' answers to a question have one id, so that they can be paired."""
    same = []
    for row in rows:
        seed = row["id"].partition(" ")[0]
        # Pairs are matched by (id, path), of which one answer is LOR and the other DTR.
        same.append(row | {"id": f"{seed} {row['question_id']}", "path": "either"})
    return same


def joint_training(seeds: Seeds) -> str | None:
    joint = seeds.answers("eval-rl")
    rows = []
    for path in PATHS:
        alone = seeds.answers(f"eval-rl-{path}-only")
        if not (joint and alone):
            return None
        one = pool(alone, path)
        both = pool(joint, path)
        seeds_alone = gains_by_seed(alone, joint, path)
        rows.append([path.upper(), percent(one), percent(both), gain(one, both), seeds_alone])
    return table(["", "RL on this path", "RL on both", "both - one", "by seed"], rows)


def detection_reward(seeds: Seeds) -> str | None:
    runs = {"0": "eval-rl-detect-0", ".1 (the paper's)": "eval-rl", ".3": "eval-rl-detect-3"}
    base = pool(seeds.answers("eval-rl"), "dtr")
    # Path dtr alone writes centres.
    rows = [centres_line("cold start", pool(seeds.answers("eval-sft"), "dtr"), base)]
    for weight, name in runs.items():
        answers = pool(seeds.answers(name), "dtr")
        if not answers:
            return None
        rows.append(centres_line(weight, answers, base))
    heading = ["weight", "centres, m", "detect", "accuracy", "accuracy, beside .1"]
    return table(heading, rows)


def centres_line(name: str, rows: list[dict], base: list[dict]) -> list[str]:
    return [name, centre_error(rows), percent(rows, "detect"), percent(rows), gain(base, rows)]


def cold_starts(seeds: Seeds) -> str | None:
    runs = {
        "both paths and grounding": ("eval-sft", "rl", "eval-rl"),
        "LOR alone": ("lor-eval-sft", "lor-rl", "lor-eval-rl"),
        "DTR alone": ("dtr-eval-sft", "dtr-rl", "dtr-eval-rl"),
        "without grounding": ("headless-eval-sft", "headless-rl", "headless-eval-rl"),
    }
    rows = []
    for name, (sft, rl, after) in runs.items():
        metrics = seeds.metrics(rl)
        before_rl = seeds.answers(sft)
        after_rl = seeds.answers(after)
        if not (metrics and after_rl):
            return None
        # Ten steps: one step's reward is that of 16 prompts, and says little.
        start = [run[:10] for run in metrics]
        end = [run[-10:] for run in metrics]
        row = [name]
        for path in PATHS:
            old = pool(before_rl, path)
            new = pool(after_rl, path)
            by_seed = ", ".join(percent(pool([seed], path)) for seed in after_rl)
            row += [f"{percent(old)} -> {percent(new)}", by_seed, percent(new, "format")]
        row.append(f"{mean_of(start, 'reward'):.2f} -> {mean_of(end, 'reward'):.2f}")
        rows.append(row)
    of_paths = ["LOR", "by seed", "format", "DTR", "by seed", "format"]
    return table(["cold start", *of_paths, "reward in RL, first and last 10"], rows)


def mean_of(runs: list[list[dict]], column: str) -> float:
    """Return the mean of a column over the rows of all seeds."""
    return fmean([row[column] for row in chain.from_iterable(runs)])


def transfer(seeds: Seeds) -> str | None:
    before = seeds.answers("eval-sft-loft")
    after = seeds.answers("eval-rl-loft")
    if not (before and after):
        return None
    rows = []
    for path in PATHS:
        old = pool(before, path)
        new = pool(after, path)
        # Not paired: these are other questions, about rooms of the style that was trained on.
        house = percent(pool(seeds.answers("eval-rl"), path))
        by_seed = gains_by_seed(before, after, path)
        rows.append([path.upper(), percent(old), percent(new), gain(old, new), by_seed, house])
    heading = ["", "cold start", "after RL", "gain", "by seed", "own style, after RL"]
    return table(heading, rows)


def strict_rewards(seeds: Seeds) -> str | None:
    runs = {"strict": "eval-rl", "official": "eval-rl-official"}
    found = {name: pool(seeds.answers(folder)) for name, folder in runs.items()}
    if not all(found.values()):
        return None
    examples = seeds.examples()
    rows = []
    for name, answers in found.items():
        # Both runs are scored by both rules: the rows have the strict ones, which eval.py applies.
        official = [official_total(row, examples) for row in answers]
        rows.append(
            [
                name,
                percent(answers),
                percent(answers, "format"),
                percent(answers, "total"),
                f"{100 * fmean(official):.1f}",
                centre_error(answers),
            ]
        )
    heading = ["RL under", "accuracy", "format", "strict total", "official total", "centres, m"]
    return table(heading, rows) + "\n\n" + exploits(found["official"], examples)


def official_total(row: dict, examples: dict[str, Example]) -> float:
    """Score an answer by the official rules. Where they make "nan" of it, it earns nothing."""
    example = examples[row["id"].partition(" ")[2]]
    total = score(row["text"], example, "official").total
    return total if math.isfinite(total) else 0.0


def exploits(rows: list[dict], examples: dict[str, Example]) -> str:
    """Return three answers that the official rules pay most for, and ours least."""
    # Examples, not a measure: the worst three of all answers.
    paid = [(official_total(row, examples) - row["total"], row) for row in rows]
    paid.sort(key=itemgetter(0), reverse=True)
    texts = ["What the official rules pay for most that the strict ones don't pay for:", ""]
    for extra, row in paid[:3]:
        text = " ".join(row["text"].split())
        texts.append(
            f"- truth `{row['truth']}`, {row['path']}: `{text}` "
            f"(official {row['total'] + extra:.2f}, strict {row['total']:.2f})"
        )
    return "\n".join(texts)


def taken_away(seeds: Seeds) -> str | None:
    runs = {
        "nothing": "eval-rl",
        "depth": "flat-eval-rl",
        "region tokens (boxes in words)": "text-eval-rl",
        "the 3D head's loss": "headless-eval-rl",
    }
    # The full training; each of the others lacks one thing of it.
    base = seeds.answers("eval-rl")
    rows = []
    for name, folder in runs.items():
        answers = seeds.answers(folder)
        if not answers:
            return None
        row = [name]
        for path in PATHS:
            own = pool(answers, path)
            change = ["", ""]
            if name != "nothing":
                change = [gain(pool(base, path), own), gains_by_seed(base, answers, path)]
            row += [percent(own), *change]
        rows.append([*row, centre_error(pool(answers, "dtr"))])
    heading = ["taken away", "LOR", "change", "by seed", "DTR", "change", "by seed", "centres, m"]
    return table(heading, rows)


CLAIMS: dict[str, Callable[[Seeds], str | None]] = {
    "RL lifts both paths": rl_lifts_both_paths,
    "DTR excels where regions and metres matter, LOR holds elsewhere": dtr_where_metres_matter,
    "Joint training helps both": joint_training,
    "The detection reward sharpens geometry": detection_reward,
    "A blended cold start keeps RL stable": cold_starts,
    "It transfers without tuning": transfer,
    "Strict rewards matter": strict_rewards,
    "Depth, region token, 3D head": taken_away,
}


def write(folder: Path, into: Path | None) -> None:
    """Print the tables, or put them between the marks of a page."""
    seeds = Seeds(folder)
    parts = []
    missing = []
    for name, claim in CLAIMS.items():
        text = claim(seeds)
        if text is None:
            missing.append(name)
        else:
            parts.append(f"### {name}\n\n{text}")
    if missing:
        parts.append("Not measured yet: " + "; ".join(missing) + ".")
    text = "\n\n".join(parts)
    if into is None:
        print(text)
        return
    with writing(into, "--into has to be a page"):
        page = into.read_text(encoding="utf-8")
        if BEGIN not in page or END not in page:
            raise UserError(f"{into}: it has no lines {BEGIN} and {END}")
        # What stands outside of the marks is written by hand, and stays.
        head = page[: page.index(BEGIN) + len(BEGIN)]
        tail = page[page.index(END) :]
        into.write_text(f"{head}\n\n{text}\n\n{tail}", encoding="utf-8")


if __name__ == "__main__":
    cfg = flags.parse(Config, __doc__)
    launch("claims", write, cfg.folder, cfg.into)
