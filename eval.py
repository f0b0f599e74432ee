"""Ask a model the questions of a data set or a benchmark in both paths; keep every answer; print
one table.

    python eval.py --model out/rl/step-000150 --data out/scenes/test --out out/eval-rl python
    eval.py --model Qwen/Qwen3-VL-8B-Instruct --benchmark cv-bench --path direct --out out/cv-bench
    torchrun --nproc_per_node 8 eval.py --model DIR --benchmark spar-bench --data /sets/SPAR-Bench

A question is asked in each path by its own row, or by a copy of the row there is. How a number is
computed:

  accuracy    mean strict `accuracy`, what RL rewards: 0 for a malformed response. `any format` scores
              whatever answer could be read. `total` is the whole reward.
  chance      the best constant answer to each task, chosen on the very questions that it is scored on; and
              for centres (in summary.json) the median position of the task's objects.
  detect      mean over the DTR answers to questions with known objects.
  text m      median distance to the truth of the centres in <detect>, over the true objects that are placed;
              on path direct of those in its <3d_box> lines (`accuracy`, of equal text, is about 0
              there).
  head m      the same for the 3D head, over regions with a known object. It reads the prompt alone.
  ±           one standard error. Questions of one image are not independent: residuals are summed by image
              first. Of a median: half the distance of the quantiles 1/2 ± 1/(2 sqrt(images)).
  unparsed    no answer could be read. truncated: no end token within --max-new-tokens. tokens: mean length.
  size m      the mean difference of width, height and length, median over the boxes whose size is asked for.
  2D IoU      of the answer with the true box, where one is asked for (RefCOCO; `accuracy` is 0 there).
              IoU>.5: the share above, as published. Both only where there are such questions.
  (no depth)  the same of --again questions, asked once more without depth:
  predictions-no-depth.jsonl.

A benchmark also gets its own table, by its published scorer and by ours (data/benchmarks), in per
cent; the last column is somebody else's figure, unless --limit or one task is asked for. What each
answer got by both stands in predictions.jsonl (`official`, `robust`). Its --data is where it was
downloaded to.

Several ranks share the questions and give the numbers of one. Interrupted, the same command goes on
behind the answers in predictions.jsonl; after a finished eval, or with other settings, it starts
again.

`--no-depth` withholds the depth. `--blind` also greys the image and makes each region the whole
image, so no position leaks: what the model scores then, it has from the wording.
"""

import hashlib
import json
import math
import os
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch.distributed as dist
from PIL import Image
from tqdm import tqdm

import data as datasets
import trainer
from data import benchmarks
from data.boxes import box_iou, read_boxes_3d
from data.marks import Marked
from model.processor import BOX_2D, object_of, truths
from model.rollout import generate, predict_centres
from srreal import Example, answer_score, parse, score

COLUMNS = {
    "accuracy": "accuracy",
    "any_format": "any format",
    "chance": "chance",
    "format": "format",
    "detect": "detect",
    "total": "total",
    "text_errors": "text m",
    "head_errors": "head m",
    "size_errors": "size m",
    "tokens": "tokens",
    "iou": "2D IoU",
    "iou50": "IoU>.5",
}
BOXED = ("size_errors", "iou", "iou50")  # columns of questions about boxes
COUNTS = ("unparsed", "truncated")
CHUNK = 512  # answers between two writes


@dataclass
class Config:
    model: str  # checkpoint directory or hub id
    # data sets (path or kind:path); of a benchmark: its directory or hub id
    data: tuple[str, ...] = ()
    # a name of data/benchmarks, or one task of it: blink/Relative_Depth
    benchmark: str | None = None
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
    # grey images, no depth, each region the whole image: what the wording alone earns
    blind: bool = False
    # processes a rank that read images ahead; None: up to 8 on CUDA, 0 on a CPU
    workers: int | None = None
    skip_bad_rows: bool = False  # go on without the unusable rows, and count them


def estimate(values, clusters, median: bool = False) -> dict | None:
    """Mean or median, standard error (None from one cluster), n. By singletons: the usual sd /
    sqrt(n)."""
    if not len(values):
        return None
    values, k = np.asarray(values, dtype=float), len(set(clusters))
    if median:
        value, half = np.median(values), 0.5 / math.sqrt(k)
        se = np.ptp(np.quantile(values, (0.5 - half, 0.5 + half))) / 2
    else:
        value = values.mean()
        sums = np.bincount(np.unique(clusters, return_inverse=True)[1], values - value)
        se = math.sqrt((sums**2).sum() * k / max(k - 1, 1)) / len(values)
    return dict(value=float(value), se=float(se) if k > 1 else None, n=len(values))


def summarise(rows: list[dict]) -> dict:
    """metric -> estimate over rows of predictions.jsonl, None where no row has the metric; and the
    counts."""
    result = dict(n=len(rows)) | {metric: sum(row[metric] for row in rows) for metric in COUNTS}
    for metric in (*COLUMNS, "chance_errors"):
        many = metric.endswith("errors")  # one distance an object, not one number an answer
        pairs = [
            (value, row["cluster"])
            for row in rows
            for value in (row[metric].values() if many else [row[metric]])
            if value is not None
        ]
        result[metric] = estimate(
            [value for value, _ in pairs], [image for _, image in pairs], median=many
        )
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
    """Each question once in each path asked for. A limit keeps the lowest hashes: so many of every
    task."""
    questions: dict[str, dict[str, Example]] = {}
    for example in examples:
        first = questions.setdefault(question_id(example), {}).setdefault(example.path, example)
        if first is not example:
            raise trainer.Stop(
                f"{first.id!r} and {example.id!r} are both the {example.path} row of question "
                f"{question_id(example)!r}: their answers could not be told apart"
            )
    kept = set(sorted(questions, key=lambda name: hashlib.sha1(name.encode()).digest())[:limit])
    return [
        forms.get(asked) or asked_as(next(iter(forms.values())), asked)
        for asked in (("lor", "dtr") if path == "both" else (path,))
        for name, forms in questions.items()
        if name in kept
    ]


def seen(example: Example, config: Config) -> Example:
    """What the model gets to see of it."""
    if not config.blind:
        return example if config.depth else replace(example, depths=None)
    sizes = [
        (Image.open(image) if isinstance(image, str | Path) else image).size
        for image in example.images
    ]
    return replace(
        example,
        images=[Image.new("RGB", size, (128, 128, 128)) for size in sizes],
        depths=None,
        intrinsics=None,
        regions=[(view, (0, 0, *sizes[view])) for view, _ in example.regions],
    )


def best_constants(examples: list[Example], candidates: int = 64) -> dict[str, tuple]:
    """task -> (the common answer that earns most if given to all questions, the median true
    centre)."""
    best = {}
    for task in {example.task for example in examples}:
        members = [example for example in examples if example.task == task]
        truths = Counter(example.answer for example in members)
        common = sorted(truths, key=lambda answer: (-truths[answer], answer))[:candidates]
        earned = {
            guess: sum(answer_score(guess, t) * n for t, n in truths.items()) for guess in common
        }
        centres = [
            c for example in members for c in true_centres(example, example.frame or 0).values()
        ]
        best[task] = (
            max(common, key=earned.get),
            np.median(centres, axis=0).tolist() if centres else None,
        )
    return best


def true_centres(example: Example, view: int | None) -> dict[str, tuple]:
    """mention -> centre in the camera frame of that view, where known; of one view there is just
    that."""
    found = {
        m.lower().strip(): c.get(view) if isinstance(c, dict) else c
        for m, c in example.objects.items()
    }
    return {mention: centre for mention, centre in found.items() if centre is not None}


def distances(centres: dict, truth: dict) -> dict[str, float]:
    return {name: math.dist(centres[name], truth[name]) for name in truth if name in centres}


def image_name(image) -> str | None:
    """What two questions about the same image have in common: its path, or its file's hash."""
    source = image.source if isinstance(image, Marked) else image
    if isinstance(source, bytes):
        return f"sha1 {hashlib.sha1(source).hexdigest()}"
    return str(source) if isinstance(source, str | Path) else None


def box_of(example: Example, processor) -> str | None:
    """The true 2D box as the model's family writes it, where one is asked for."""
    return (
        processor.decode(processor.target_ids(example)) if BOX_2D.search(example.answer) else None
    )


def boxes_said(text: str, example: Example) -> dict[str, tuple]:
    """mention -> (centre, size or None) of a direct answer's boxes. Of a lone object it needs no
    mention."""
    boxes = read_boxes_3d(text) if example.path == "direct" else {}
    if len(example.objects) != 1:
        return boxes
    return {
        mention.lower(): box for mention, box in zip(example.objects, boxes.values(), strict=False)
    }


def size_errors(said: dict[str, tuple], example: Example) -> dict[str, float]:
    """mention -> the mean |difference| of its sides, of the objects whose size is asked for."""
    asked = example.sizes if 'size="' in example.answer else None
    true = {mention.lower(): size for mention, size in (asked or {}).items()}
    return {
        mention: float(np.abs(np.subtract(said[mention][1], size)).mean())
        for mention, size in true.items()
        if said.get(mention, (None, None))[1]
    }


def answer_row(example: Example, rollout, head, constant: tuple, box: str | None = None) -> dict:
    """A line of predictions.jsonl. head (k, 3): the 3D head's centres, each in its region's image's
    frame."""
    parsed, scores = parse(rollout.text, example.path), score(rollout.text, example)
    images = [image_name(image) for image in example.images]
    # the first counts
    boxes = {mention.lower(): centre for mention, _, centre in reversed(parsed.boxes)}
    said = boxes_said(rollout.text, example)
    boxes |= {mention: centre for mention, (centre, _) in said.items()}
    usual = true_centres(example, example.frame or 0)
    iou = None if box is None else box_iou(parsed.answer, box)
    regions = {
        k: centre for k, (centre, _) in enumerate(truths(example)) if np.isfinite(centre).all()
    }
    return dict(
        id=example.id,
        question_id=question_id(example),
        path=example.path,
        task=example.task,
        images=images,
        cluster=images[0] if images and images[0] else question_id(example),
        question=example.question,
        text=rollout.text,
        parsed=asdict(parsed),
        answer=parsed.answer,
        truth=example.answer,
        tokens=len(rollout.tokens),
        finished=rollout.finished,
        truncated=not rollout.finished,
        unparsed=parsed.answer is None,
        accuracy=scores.accuracy,
        format=scores.format,
        total=scores.total,
        detect=scores.detect if example.path == "dtr" and example.objects else None,
        any_format=answer_score(parsed.answer, example.answer),
        chance=answer_score(constant[0], example.answer),
        iou=iou,
        iou50=None if iou is None else float(iou > 0.5),
        head_centres=np.asarray(head, dtype=float).round(4).tolist(),
        region_mentions=[
            object_of(text, example.objects) for text in example.question.split("<mask>")[:-1]
        ],
        text_errors=distances(boxes, true_centres(example, parsed.frame)),
        head_errors=distances(dict(enumerate(head)), regions),
        size_errors=size_errors(said, example),
        chance_errors=distances(dict.fromkeys(usual, constant[1]), usual),
    )


def begin(config: Config, asked: dict[str, list[Example]]) -> dict[str, dict]:
    """File -> (id, path) -> row, of what an interrupted eval has answered. Rank 0's view of
    --out."""
    out, checkpoint = Path(config.out), sorted(Path(config.model).glob("*.safetensors"))
    out.mkdir(parents=True, exist_ok=True)
    settings = asdict(replace(config, out="")) | {
        "checkpoint": [
            (file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in checkpoint
        ],
        "columns": [*COLUMNS],
    }  # rows that an older version wrote lack some
    settings, old, done = json.loads(json.dumps(settings)), None, {name: {} for name in asked}
    with suppress(OSError, ValueError):
        old = json.loads((out / "settings.json").read_text())
    if old == settings:
        done = {name: answered(out, name, examples) for name, examples in asked.items()}
        if (out / "summary.json").exists() and all(
            len(done[name]) == len(asked[name]) for name in asked
        ):
            done = {name: {} for name in asked}  # it had finished
    (out / "summary.json").unlink(missing_ok=True)
    for name in asked:
        write_rows(out, name, done[name].values())
    (out / "settings.json").write_text(json.dumps(settings, indent=1))
    return done


def answered(out: Path, name: str, examples: list[Example]) -> dict[tuple, dict]:
    """The rows, of all ranks' files, that still answer one of the examples."""
    texts = {(e.id, e.path): (e.question, e.answer) for e in examples}
    rows = {}
    for line in (line for file in out.glob(f"{name}*") for line in file.read_text().splitlines()):
        with suppress(ValueError, KeyError, TypeError):  # a torn line
            row = json.loads(line)
            if texts.get((row["id"], row["path"])) == (row["question"], row["truth"]):
                rows[row["id"], row["path"]] = row
    return rows


def write_rows(out: Path, name: str, rows) -> None:
    """All of them, into one file, in place of the ranks' own."""
    aside = out / f"{name}.partial"
    aside.write_text("".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))
    os.replace(aside, out / name)
    for part in out.glob(f"{name}.*"):
        part.unlink()


def answer_all(
    config: Config, examples: list[Example], model, processor, name: str, done: dict
) -> list:
    """The rows of all examples, in their order; [] on all ranks but 0. Each rank answers its share
    of what rank 0 has not done."""
    (rank, world, _), out, rows = trainer.setup(), Path(config.out), []
    known, constants = set(share([*done])), best_constants(examples)
    mine = [example for example in examples if (example.id, example.path) not in known][rank::world]
    out.mkdir(parents=True, exist_ok=True)
    with (
        tqdm(total=len(mine), desc="eval", unit="answer", smoothing=0.05, disable=rank > 0) as bar,
        open(out / (f"{name}.{rank}" if rank else name), "a") as file,
    ):
        for start in range(0, len(mine), CHUNK):
            asked = mine[start : start + CHUNK]
            shown = [seen(example, config) for example in asked]
            marked = [example for example in shown if example.regions]
            processor.expect(marked + shown)
            heads = iter(
                trainer.mendable(predict_centres, model, processor, marked) if marked else []
            )
            options = dict(max_new_tokens=config.max_new_tokens, temperature=config.temperature)
            answers = trainer.mendable(
                generate, model, processor, shown, **options, seed=config.seed, progress=bar.update
            )
            for example, (answer,) in zip(asked, answers, strict=True):
                head = next(heads) if example.regions else []
                rows.append(
                    answer_row(
                        example, answer, head, constants[example.task], box_of(example, processor)
                    )
                )
            file.writelines(json.dumps(row, allow_nan=False) + "\n" for row in rows[-len(asked) :])
            file.flush()
    found = done | {(row["id"], row["path"]): row for row in gathered(rows)}
    if rank:
        return []
    rows = [found[example.id, example.path] for example in examples]
    write_rows(out, name, rows)
    return rows


def share(value):
    """Rank 0's value, on every rank."""
    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box)
    return box[0]


def gathered(rows: list) -> list:
    """All ranks' rows, on rank 0."""
    if not dist.is_initialized():
        return rows
    parts = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(rows, parts)
    return [row for part in parts or [] for row in part]


def show(number: dict | None, digits: int) -> str:
    error = f"±{number['se']:.{digits}f}" if number and number["se"] is not None else ""
    return f"{number['value']:.{digits}f}{error}" if number else "-"


def print_table(results: dict) -> None:
    lines = [(path.upper(), tasks["all"]) for path, tasks in results.items()]
    for path, tasks in results.items():
        lines += [
            (f"{path} ({task})" if task == "no depth" else f"{path} {task}", row)
            for task, row in tasks.items()
            if task != "all"
        ]
    columns = [
        metric for metric in COLUMNS if metric not in BOXED or any(row[metric] for _, row in lines)
    ]
    heads = "".join(f"{COLUMNS[metric]:>12}" for metric in columns)
    print(f"\n{'':22}{'n':>6}{heads}  unparsed  truncated")
    for name, row in lines:
        cells = [show(row[metric], 1 if metric == "tokens" else 3) for metric in columns]
        print(
            f"{name:22}{row['n']:>6}"
            + "".join(f"{cell:>12}" for cell in cells)
            + f"{row['unparsed']:>10}{row['truncated']:>11}"
        )


def print_benchmark(
    config: Config, path: str, scores: dict[str, dict], asked: list[Example]
) -> None:
    """Per cent by both scorers, beside somebody else's figure of somebody else's model where all is
    asked."""
    name, _, task = config.benchmark.partition("/")
    model, source, figures = benchmarks.BENCHMARKS[name].others
    whole = not task and config.limit is None
    others = f"    {model} ({source})" if whole else ""
    print(f"\n{config.benchmark + ' ' + path:34}{'official':>10}{'robust':>10}{others}")
    for key, value in scores["official"].items():
        other = f"{figures[key]:>14.1f}" if whole and key in figures else ""
        print(f"  {key:32}{value:>10.1f}{scores['robust'][key]:>10.1f}{other}")
    for column, error in scores.get("errors", {}).items():
        print(
            f"  {column + (' off, degrees' if column == 'direction' else ' off / truth'):32}{error:>10.2f}"
        )
    if path == "dtr":
        print(f"  ({sum(bool(e.regions) for e in asked)} of {len(asked)} questions had regions)")
    if benchmarks.BENCHMARKS[name].judged:
        print(f"  ({benchmarks.BENCHMARKS[name].judged})")


def questions(config: Config) -> list[Example]:
    if config.benchmark:
        if len(config.data) > 1:
            raise trainer.Stop(f"--data {' '.join(config.data)}: a benchmark lies in one place")
        root, skip = config.data[0] if config.data else None, config.skip_bad_rows
        try:
            examples = trainer.mendable(benchmarks.load, config.benchmark, root, config.path, skip)
        except datasets.BadRows as bad:
            raise trainer.Stop(
                f"{bad}\n(a benchmark is read whole, or with --skip-bad-rows)"
            ) from None
    else:
        examples = trainer.mendable(datasets.load, config.data, skip_bad_rows=config.skip_bad_rows)
    if config.limit is not None and config.limit < 1 or config.again < 0:
        raise trainer.Stop(
            f"--limit {config.limit} --again {config.again}: at least 1 and 0 are wanted"
        )
    examples = select(examples, config.path, config.limit)
    if not examples:
        raise trainer.Stop("there is nothing to ask: give --data or --benchmark")
    return examples


def main(config: Config) -> dict | None:
    """The summary; on the other ranks None."""
    examples = questions(config)
    processor, (rank, _, device) = trainer.load_processor(config.model, config), trainer.setup()
    model, runs = trainer.load(config.model, device), {"predictions.jsonl": (config, examples)}
    deep = [
        example for example in examples if any(depth is not None for depth in example.depths or ())
    ]
    if deep and config.again and config.depth and not config.blind:
        bare = replace(config, depth=False), select(deep, config.path, config.again)
        runs["predictions-no-depth.jsonl"] = bare
    asked = {name: wanted for name, (_, wanted) in runs.items()}
    done = begin(config, asked) if rank == 0 else {name: {} for name in asked}
    rows = {
        name: answer_all(how, wanted, model, processor, name, done[name])
        for name, (how, wanted) in runs.items()
    }
    if rank:
        return None
    groups = {}  # path -> task | "all" -> rows
    for row in rows["predictions.jsonl"]:
        for task in {"all", row["task"] or "all"}:
            groups.setdefault(row["path"], {}).setdefault(task, []).append(row)
    results = {
        path: {task: summarise(by_task[task]) for task in sorted(by_task)}
        for path, by_task in groups.items()
    }
    bare = rows.get("predictions-no-depth.jsonl", [])
    for path in dict.fromkeys(row["path"] for row in bare):
        results[path]["no depth"] = summarise([row for row in bare if row["path"] == path])
    summary = dict(config=asdict(config), results=results)
    print_table(results)
    for path in results if config.benchmark else ():
        answers = zip(examples, rows["predictions.jsonl"], strict=True)
        answers = [(example, row) for example, row in answers if example.path == path]
        marks = {}
        for scorer in ("official", "robust"):
            mark = partial(benchmarks.score, config.benchmark, scorer=scorer)
            marks[scorer] = mark([(example, row["text"]) for example, row in answers])
            for example, row in answers:
                row[scorer] = mark([(example, row["text"])])["overall"]
        errors = benchmarks.BENCHMARKS[config.benchmark.partition("/")[0]].errors
        if errors:
            marks["errors"] = errors([(example, row["text"]) for example, row in answers])
        summary.setdefault("benchmark", {})[path] = marks
        print_benchmark(config, path, marks, [example for example, _ in answers])
    # with both scorers' marks
    write_rows(Path(config.out), "predictions.jsonl", rows["predictions.jsonl"])
    (Path(config.out) / "summary.json").write_text(json.dumps(summary, indent=1, allow_nan=False))
    return summary


if __name__ == "__main__":
    trainer.launch(main, Config)
