"""Ask a model the questions of a data set or a benchmark in both paths; keep every answer; print one table.

    python eval.py --model out/rl/step-000150 --data out/scenes/test --out out/eval-rl
    python eval.py --model Qwen/Qwen3-VL-8B-Instruct --benchmark cv-bench --path direct --out out/cv-bench

A question is asked in each path by its own row, or by a copy of the row there is. How a number is computed:

  accuracy    mean strict `accuracy`, what RL rewards: 0 for a malformed response. `any format` scores
              whatever answer could be read. `total` is the whole reward.
  chance      the best constant answer to each task, chosen on the very questions that it is scored on; and
              for centres (in summary.json) the median position of the task's objects.
  detect      mean over the DTR answers to questions with known objects.
  text m      median distance to the truth of the centres in <detect>, over the true objects that are placed.
  head m      the same for the 3D head, over regions with a known object. It reads the prompt alone.
  ±           one standard error. Questions of one image are not independent: residuals are summed by image
              first. Of a median: half the distance of the quantiles 1/2 ± 1/(2 sqrt(images)).
  unparsed    no answer could be read. truncated: no end token within --max-new-tokens. tokens: mean length.
  (no depth)  the same of --again questions, asked once more without depth: predictions-no-depth.jsonl.

`--no-depth` withholds the depth. `--blind` also greys the image and makes each region the whole image, so no
position leaks: what the model scores then, it has from the wording.
"""
import hashlib
import json
import math
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image
from tqdm import tqdm

import data as datasets
import trainer
from model.processor import object_of, truths
from model.rollout import generate, predict_centres
from srreal import Example, answer_score, parse, score

COLUMNS = {"accuracy": "accuracy", "any_format": "any format", "chance": "chance", "format": "format",
           "detect": "detect", "total": "total", "text_errors": "text m", "head_errors": "head m",
           "tokens": "tokens"}
COUNTS = ("unparsed", "truncated")
CHUNK = 512  # answers between two writes


@dataclass
class Config:
    model: str  # checkpoint directory or hub id
    data: tuple[str, ...] = ()  # data sets (path or kind:path); with --benchmark: where it was downloaded to
    benchmark: str | None = None  # a name of data/benchmarks.py, in place of --data
    path: Literal["lor", "dtr", "both", "direct"] = "both"  # how to ask
    limit: int | None = None  # at most so many questions (>= 1), the same ones for every model
    max_new_tokens: int = 1024  # a longer answer is cut and counted as truncated
    temperature: float = 0.0  # 0 is greedy
    out: str = "out/eval"  # gets predictions.jsonl (a row an answer) and summary.json (the table)
    seed: int = 0  # of the sampling noise
    regions: Literal["token", "text"] = "token"  # how the model was trained to read a region
    max_pixels: int | None = None  # image size limit; None: the checkpoint's own
    depth: bool = True  # --no-depth: images only
    again: int = 200  # at most so many questions are asked once more without their depth; 0: none
    blind: bool = False  # grey images, no depth, each region the whole image: what the wording alone earns
    skip_bad_rows: bool = False  # go on without the unusable rows, and count them


def estimate(values, clusters, median: bool = False) -> dict | None:
    """Mean or median, standard error (None from one cluster), n. By singletons: the usual sd / sqrt(n)."""
    if not len(values):
        return None
    values, k = np.asarray(values, dtype=float), len(set(clusters))
    if median:
        value, half = np.median(values), 0.5 / math.sqrt(k)
        se = np.ptp(np.quantile(values, (0.5 - half, 0.5 + half))) / 2
    else:
        value = values.mean()
        sums = np.bincount(np.unique(clusters, return_inverse=True)[1], values - value)
        se = math.sqrt((sums ** 2).sum() * k / max(k - 1, 1)) / len(values)
    return dict(value=float(value), se=float(se) if k > 1 else None, n=len(values))


def summarise(rows: list[dict]) -> dict:
    """metric -> estimate over rows of predictions.jsonl, None where no row has the metric; and the counts."""
    result = dict(n=len(rows)) | {metric: sum(row[metric] for row in rows) for metric in COUNTS}
    for metric in (*COLUMNS, "chance_errors"):
        many = metric.endswith("errors")  # one distance an object, not one number an answer
        pairs = [(value, row["cluster"]) for row in rows
                 for value in (row[metric].values() if many else [row[metric]]) if value is not None]
        result[metric] = estimate([value for value, _ in pairs], [image for _, image in pairs], median=many)
    return result


def paired(before: list[dict], after: list[dict], metric: str = "accuracy") -> dict | None:
    """The mean of after - before over the questions that both runs answered in the same path."""
    old = {(row["id"], row["path"]): row[metric] for row in before}
    both = [row for row in after if None not in (row[metric], old.get((row["id"], row["path"])))]
    change = [row[metric] - old[row["id"], row["path"]] for row in both]
    return estimate(change, [row["cluster"] for row in both])


def question_id(example: Example) -> str:
    """The id without its path: what a question's LOR and DTR rows have in common."""
    return example.id.removesuffix(f"-{example.path}")


def asked_as(example: Example, path: str) -> Example:
    """A copy on another path, of the same question."""
    copy, name = replace(example, path=path), question_id(example)
    return copy if question_id(copy) == name else replace(copy, id=f"{name}-{path}")


def select(examples: list[Example], path: str, limit: int | None) -> list[Example]:
    """Each question once in each path asked for. A limit keeps the lowest hashes: so many of every task."""
    questions: dict[str, dict[str, Example]] = {}
    for example in examples:
        first = questions.setdefault(question_id(example), {}).setdefault(example.path, example)
        if first is not example:
            raise trainer.Stop(f"{first.id!r} and {example.id!r} are both the {example.path} row of question "
                               f"{question_id(example)!r}: their answers could not be told apart")
    kept = set(sorted(questions, key=lambda name: hashlib.sha1(name.encode()).digest())[:limit])
    return [forms.get(asked) or asked_as(next(iter(forms.values())), asked)
            for asked in (("lor", "dtr") if path == "both" else (path,))
            for name, forms in questions.items() if name in kept]


def seen(example: Example, config: Config) -> Example:
    """What the model gets to see of it."""
    if not config.blind:
        return example if config.depth else replace(example, depths=None)
    sizes = [(Image.open(image) if isinstance(image, str | Path) else image).size for image in example.images]
    return replace(example, images=[Image.new("RGB", size, (128, 128, 128)) for size in sizes], depths=None,
                   intrinsics=None, regions=[(view, (0, 0, *sizes[view])) for view, _ in example.regions])


def best_constants(examples: list[Example], candidates: int = 64) -> dict[str, tuple]:
    """task -> (the common answer that earns most if given to all questions, the median true centre)."""
    best = {}
    for task in {example.task for example in examples}:
        members = [example for example in examples if example.task == task]
        truths = Counter(example.answer for example in members)
        common = sorted(truths, key=lambda answer: (-truths[answer], answer))[:candidates]
        earned = {guess: sum(answer_score(guess, t) * n for t, n in truths.items()) for guess in common}
        centres = [c for example in members for c in true_centres(example, example.frame or 0).values()]
        best[task] = max(common, key=earned.get), np.median(centres, axis=0).tolist() if centres else None
    return best


def true_centres(example: Example, view: int | None) -> dict[str, tuple]:
    """mention -> centre in the camera frame of that view, where known; of one view there is just that."""
    found = {m.lower().strip(): c.get(view) if isinstance(c, dict) else c for m, c in example.objects.items()}
    return {mention: centre for mention, centre in found.items() if centre is not None}


def distances(centres: dict, truth: dict) -> dict[str, float]:
    return {name: math.dist(centres[name], truth[name]) for name in truth if name in centres}


def answer_row(example: Example, rollout, head, constant: tuple) -> dict:
    """A line of predictions.jsonl. head (k, 3): the 3D head's centres, each in its region's image's frame."""
    parsed, scores = parse(rollout.text, example.path), score(rollout.text, example)
    images = [str(image) if isinstance(image, str | Path) else None for image in example.images]
    boxes = {mention.lower(): centre for mention, _, centre in reversed(parsed.boxes)}  # the first counts
    usual = true_centres(example, example.frame or 0)
    regions = {k: centre for k, (centre, _) in enumerate(truths(example)) if np.isfinite(centre).all()}
    return dict(
        id=example.id, question_id=question_id(example), path=example.path, task=example.task, images=images,
        cluster=images[0] if images and images[0] else question_id(example), question=example.question,
        text=rollout.text, parsed=asdict(parsed), answer=parsed.answer, truth=example.answer,
        tokens=len(rollout.tokens), finished=rollout.finished, truncated=not rollout.finished,
        unparsed=parsed.answer is None, accuracy=scores.accuracy, format=scores.format, total=scores.total,
        detect=scores.detect if example.path == "dtr" and example.objects else None,
        any_format=answer_score(parsed.answer, example.answer),
        chance=answer_score(constant[0], example.answer),
        head_centres=np.asarray(head, dtype=float).round(4).tolist(),
        region_mentions=[object_of(text, example.objects) for text in example.question.split("<mask>")[:-1]],
        text_errors=distances(boxes, true_centres(example, parsed.frame)),
        head_errors=distances(dict(enumerate(head)), regions),
        chance_errors=distances(dict.fromkeys(usual, constant[1]), usual))


def answer_all(config: Config, examples: list[Example], model, processor, name: str) -> list[dict]:
    constants, rows = best_constants(examples), []
    with (tqdm(total=len(examples), desc="eval", unit="answer", smoothing=0.05) as bar,
          open(Path(config.out) / name, "w") as file):
        for start in range(0, len(examples), CHUNK):
            asked = examples[start:start + CHUNK]
            shown = [seen(example, config) for example in asked]
            heads = predict_centres(model, processor, shown)
            answers = generate(model, processor, shown, max_new_tokens=config.max_new_tokens,
                               temperature=config.temperature, seed=config.seed, progress=bar.update)
            rows += [answer_row(example, answer, head, constants[example.task])
                     for example, (answer,), head in zip(asked, answers, heads, strict=True)]
            file.writelines(json.dumps(row, allow_nan=False) + "\n" for row in rows[start:])
    return rows


def show(number: dict | None, digits: int) -> str:
    error = f"±{number['se']:.{digits}f}" if number and number["se"] is not None else ""
    return f"{number['value']:.{digits}f}{error}" if number else "-"


def print_table(results: dict) -> None:
    lines = [(path.upper(), tasks["all"]) for path, tasks in results.items()]
    for path, tasks in results.items():
        lines += [(f"{path} ({task})" if task == "no depth" else f"{path} {task}", row)
                  for task, row in tasks.items() if task != "all"]
    heads = "".join(f"{title:>12}" for title in COLUMNS.values())
    print(f"\n{'':22}{'n':>6}{heads}  unparsed  truncated")
    for name, row in lines:
        cells = [show(row[metric], 1 if metric == "tokens" else 3) for metric in COLUMNS]
        print(f"{name:22}{row['n']:>6}" + "".join(f"{cell:>12}" for cell in cells)
              + f"{row['unparsed']:>10}{row['truncated']:>11}")


def benchmarks():
    try:
        from data import benchmarks  # here, because only --benchmark needs what it needs (pyarrow, the hub)
    except ImportError as error:
        raise trainer.Stop(f"--benchmark needs data/benchmarks.py ({error}); --data does not") from None
    return benchmarks


def main(config: Config) -> dict:
    if config.benchmark:
        examples = benchmarks().load(config.benchmark, root=config.data[0] if config.data else None)
    else:
        examples = trainer.mendable(datasets.load, config.data, skip_bad_rows=config.skip_bad_rows)
    if config.limit is not None and config.limit < 1 or config.again < 0:
        raise trainer.Stop(f"--limit {config.limit} --again {config.again}: at least 1 and 0 are wanted")
    examples = select(examples, config.path, config.limit)
    if not examples:
        raise trainer.Stop("there is nothing to ask: give --data or --benchmark")
    Path(config.out).mkdir(parents=True, exist_ok=True)
    processor = trainer.load_processor(config.model, config)
    model = trainer.load(config.model, trainer.setup()[2])
    rows, groups = answer_all(config, examples, model, processor, "predictions.jsonl"), {}
    for row in rows:  # groups: path -> task | "all" -> rows
        for task in {"all", row["task"] or "all"}:
            groups.setdefault(row["path"], {}).setdefault(task, []).append(row)
    results = {path: {task: summarise(by_task[task]) for task in sorted(by_task)}
               for path, by_task in groups.items()}
    deep = [example for example in examples if any(depth is not None for depth in example.depths or ())]
    if deep and config.again and config.depth and not config.blind:
        asked = select(deep, config.path, config.again)
        bare = answer_all(replace(config, depth=False), asked, model, processor, "predictions-no-depth.jsonl")
        for path in dict.fromkeys(row["path"] for row in bare):
            results[path]["no depth"] = summarise([row for row in bare if row["path"] == path])
    summary = dict(config=asdict(config), results=results)
    if config.benchmark:
        pairs = [(example, row["text"]) for example, row in zip(examples, rows, strict=True)]
        score_as = benchmarks().score
        summary["benchmark"] = {s: score_as(config.benchmark, pairs, s) for s in ("official", "robust")}
        print(json.dumps(summary["benchmark"], indent=1))
    (Path(config.out) / "summary.json").write_text(json.dumps(summary, indent=1, allow_nan=False))
    print_table(results)
    return summary


if __name__ == "__main__":
    trainer.launch(main, Config)
