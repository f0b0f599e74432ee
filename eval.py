"""Ask a model the questions of a data set or a benchmark; keep every answer; print one table.

    python eval.py --model out/rl/step-000150 --data out/scenes/test --out out/eval-rl
    python eval.py --model DIR --benchmark cv-bench --path direct --out out/cv-bench
    torchrun --nproc_per_node 8 eval.py --model DIR --benchmark spar-bench --data /sets/SPAR-Bench
    torchrun --nproc_per_node 8 eval.py --model DIR --suite easi8 --data /sets --path direct

A question is asked on each path (--path both: lor and dtr) by its own row, or by a copy of the row
there is. How a number is computed (eval_table.py):

  accuracy    mean strict `accuracy`, what RL rewards: 0 for a malformed response. `any format`
              scores whatever answer could be read. `total` is the whole reward; every other entry
              of srreal.REWARDS has a column of its own.
  chance      the best constant answer to each task, chosen on the very questions that it is scored
              on; and for centres (in summary.json) the median position of the task's objects.
  detect      mean over the answers on paths that detect, to questions with known objects.
  text m      median distance to the truth of the centres in <detect>, over the true objects that
              are placed; on path direct of those in its <3d_box> lines (`accuracy`, of equal text,
              is about 0 there).
  head m      the same for the 3D head, over regions with a known object. It reads the prompt alone.
  ±           one standard error. Questions that share an image or a video, also through others,
              or a benchmark's scene, are not independent: residuals are summed by such clusters
              first. Of a median: half the distance of the quantiles 1/2 ± 1/(2 sqrt(clusters)).
  unparsed    no answer could be read. truncated: no end token within --max-new-tokens. tokens: mean
              length.
  size m      the mean difference of width, height and length, median over the boxes whose size is
              asked for.
  2D IoU      of the answer with the true box, where one is asked for (RefCOCO; `accuracy` is 0
              there). IoU>.5: the share above, as published. Both only where there are such
              questions.
  (no depth)  the same of --again questions, asked once more without depth
              (predictions-no-depth.jsonl).

A benchmark also gets its own table, by its published scorer and by ours (data/benchmarks), in per
cent; the last columns are others' figures, unless a part of the set is asked (--limit, one task) or
there. What each answer got by both stands in predictions.jsonl (`official`, `robust`). Its --data
is where it was downloaded to. Table and summary.json say what was shown: images or frames of a
video, how many, and of how many pixels. A video is shown as --frames k images:
int(i (n - 1) / (k - 1)) of its n frames, i = 0 .. k - 1 (data/frames.py). On two paths, a line
compares them by question.

--suite asks all of its benchmarks that are there: each lies in a folder of its name below --data,
and gets one below --out, as if it were asked alone; then comes one table, also in suite.json. Those
that are missing are named; one that can't be read is, too, and ends in exit code 2 after the rest.

Several ranks share the questions and give the numbers of one. Interrupted, the same command goes on
behind the answers in predictions.jsonl; after a finished eval it only prints the table again. An
--out with answers of another eval (model, data, path, sampling) is refused.

`--no-depth` withholds the depth. `--blind` also greys the image and makes each region the whole
image, so no position leaks: what the model scores then, it has from the wording.
"""

import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

import flags
from flags import Count, CountOrZero, PositiveOrZero, Seed, ShareAboveZero
from srreal import PATHS, Example, Parsed, answer_score, parse, score


@dataclass
class Config:
    model: str  # checkpoint directory or hub id
    # data sets (path or kind:path); of a benchmark: its directory or hub id
    data: tuple[str, ...] = ()
    # a name of data/benchmarks, or one task of it: blink/Relative_Depth
    benchmark: str | None = None
    # all benchmarks of a table that papers share, each in --data/NAME, in place of --benchmark
    suite: Literal["easi8"] | None = None
    # of a video so many are shown, as images: int(i (n - 1) / (k - 1)) of n, i = 0 .. k - 1
    frames: Count = 32
    path: Literal[(*PATHS, "both")] = "both"  # how to ask; both: lor and dtr
    # at most so many questions, the same ones for every model; None: all
    limit: Count | None = None
    max_new_tokens: Count = 1024  # a longer answer is cut and counted as truncated
    temperature: PositiveOrZero = 0.0  # 0 is greedy
    # sample among the likeliest tokens of this probability in sum; 1: all
    top_p: ShareAboveZero = 1.0
    # gets predictions.jsonl (a row an answer) and summary.json (the table); "": out/eval/MODEL-DATA
    out: str = ""
    seed: Seed = 0  # of the sampling noise
    regions: Literal["token", "text"] = "token"  # how the model was trained to read a region
    max_pixels: Count | None = None  # image size limit; None: the checkpoint's own
    depth: bool = True  # --no-depth: images only
    # at most so many questions are asked once more without their depth; 0: none
    again: CountOrZero = 200
    # grey images, no depth, each region the whole image: what the wording alone earns
    blind: bool = False
    # processes a rank that read images ahead; 0: none; None: up to 8 on CUDA, 0 on a CPU
    workers: CountOrZero | None = None
    skip_bad_rows: bool = False  # go on without the unusable rows, and count them

    def __post_init__(self):
        flags.check(self)


if __name__ == "__main__":
    # Before the imports that take seconds: --help and a wrong flag are answered at once.
    cfg = flags.parse(Config, __doc__)

import numpy as np
from PIL import Image
from tqdm import tqdm

import data as datasets
from data import benchmarks
from data.benchmarks import table
from data.benchmarks.means import Mean
from data.boxes import box_iou, read_boxes_3d
from data.frames import Frame
from data.marks import Marked
from errors import UserError
from eval_table import (
    COLUMNS,
    by_path,
    connected,
    paired_by_question,
    points,
    print_table,
    question_id,
    summarise_paths,
    true_centres,
)
from mentions import object_of
from model.processor import BOX_2D, has_depth, truths
from model.rollout import predict_centres, sample_groups
from pictures import is_data_uri, picture_size
from training import folder, ranks, run
from training.origin import origin
from training.policy import load_model

BOTH = ("lor", "dtr")
# Answers between two writes: what an interrupted eval loses at most.
CHUNK = 512
PREDICTIONS = "predictions.jsonl"
WITHOUT_DEPTH = "predictions-no-depth.jsonl"
# Settings whose values say nothing to a reader.
NOT_SHOWN = {
    "checkpoint": "the files of --model have changed",
    "columns": "another version has measured them",
}


# ---- What is asked


@dataclass
class Asked:
    """What is asked of a set."""

    examples: list[Example]
    rows: int = 0  # of a benchmark: how many are there, of how many published ones
    published_rows: int = 0
    is_whole: bool = False  # all of a benchmark is there, and asked


def questions(config: Config) -> Asked:
    """Read the set or the benchmark, and choose what is asked of it."""
    if config.benchmark:
        loaded = benchmark_questions(config)
        examples = loaded.examples
    else:
        loaded = None
        examples = datasets.load(config.data, skip_bad_rows=config.skip_bad_rows)
    asked = select(examples, config.path, config.limit)
    if not asked:
        raise UserError("there is nothing to ask: give --data or --benchmark")
    count = len({question_id(example) for example in examples})
    is_limited = config.limit is not None and config.limit < count
    if is_limited:
        datasets.say(f"--limit: {config.limit} of {count} questions are asked")
    if loaded is None:
        return Asked(asked)
    # Only then may a published figure stand beside ours.
    is_whole = loaded.is_complete and not is_limited and "/" not in config.benchmark
    return Asked(asked, loaded.rows, loaded.published, is_whole)


def benchmark_questions(config: Config) -> benchmarks.Loaded:
    if len(config.data) > 1:
        raise UserError(f"--data {' '.join(config.data)}: a benchmark lies in one place")
    root = config.data[0] if config.data else None
    try:
        return benchmarks.read(
            config.benchmark, root, config.path, config.skip_bad_rows, config.frames
        )
    except datasets.BadRows as bad:
        told = bad.told(config.out)
        raise UserError(f"{told}\n(a benchmark is read whole, or with --skip-bad-rows)") from None


def asked_as(example: Example, path: str) -> Example:
    """Return a copy on another path, of the same question."""
    name = question_id(example)
    copy = replace(example, path=path)
    # A question called turn-lor, asked as lor, would be taken for the question turn.
    if question_id(copy) != name:
        copy.id = f"{name}-{path}"
    return copy


def select(examples: list[Example], path: str, limit: int | None) -> list[Example]:
    """Return each question once on each path that is asked for, at most so many questions."""
    by_question: dict[str, dict[str, Example]] = {}
    for example in examples:
        rows = by_question.setdefault(question_id(example), {})
        first = rows.setdefault(example.path, example)
        if first is not example:
            raise UserError(
                f"{first.id!r} and {example.id!r} are both the {example.path} row of question "
                f"{question_id(example)!r}: their answers could not be told apart"
            )
    # Those with the lowest hashes: the same ones in any order of the rows, and of every task its
    # share.
    in_hash_order = sorted(by_question, key=lambda name: hashlib.sha1(name.encode()).digest())
    kept = set(in_hash_order[:limit])
    selected = []
    paths = BOTH if path == "both" else (path,)
    for wanted in paths:
        for name, rows in by_question.items():
            if name in kept:
                any_row = next(iter(rows.values()))
                selected.append(rows.get(wanted) or asked_as(any_row, wanted))
    return selected


def seen(example: Example, config: Config) -> Example:
    """Return what the model gets to see of a question."""
    if not config.blind:
        return example if config.depth else replace(example, depths=None)
    # Images keep their sizes, so prompts are as long as they were.
    sizes = [picture_size(image) for image in example.images]
    return replace(
        example,
        images=[grey(size) for size in sizes],
        depths=None,
        intrinsics=None,
        # A region's place would tell where the object is.
        regions=[(view, (0, 0, *sizes[view])) for view, _ in example.regions],
    )


@lru_cache
def grey(size: tuple[int, int]) -> Image.Image:
    # One for all of a size, so that it is encoded once.
    return Image.new("RGB", size, (128, 128, 128))


# ---- What an answer is measured by


def best_constants(examples: list[Example], candidates: int = 64) -> dict[str, tuple]:
    """Return task -> its best constant answer, and its median true centre or None.

    candidates: how many of the commonest truths are tried as an answer.
    """
    by_task: dict[str, list[Example]] = {}
    for example in examples:
        by_task.setdefault(example.task, []).append(example)
    return {task: best_constant(members, candidates) for task, members in by_task.items()}


def best_constant(examples: list[Example], candidates: int) -> tuple[str, list | None]:
    # Not the commonest truth: of numbers, one in the middle earns more.
    counts = Counter(example.answer for example in examples)

    # Each truth is scored once, however many questions have it.
    def earned(guess: str) -> float:
        return sum(answer_score(guess, truth) * n for truth, n in counts.items())

    common = sorted(counts, key=lambda answer: (-counts[answer], answer))
    # Scored candidates x truths times. The best answer may not be among the commonest: then chance
    # is a little too low.
    best = max(common[:candidates], key=earned)
    centres = []
    for example in examples:
        centres += true_centres(example, example.frame or 0).values()
    return best, np.median(centres, axis=0).tolist() if centres else None


def distances(centres: dict, truth: dict) -> dict[str, float]:
    return {name: math.dist(centres[name], truth[name]) for name in truth if name in centres}


def written_boxes(text: str, parsed: Parsed, example: Example) -> dict[str, tuple]:
    """Return mention -> (centre, size or None) of an answer's boxes; a mention's first counts."""
    # Only grounding data, which asks on path direct, has boxes of two forms and with sizes.
    if example.path != "direct":
        boxes = {}
        for mention, _, centre in parsed.boxes:
            boxes.setdefault(mention.lower(), (centre, None))
        return boxes
    boxes = read_boxes_3d(text)
    if boxes and len(example.objects) == 1:
        # A lone object needs no mention.
        (mention,) = example.objects
        first = next(iter(boxes.values()))
        return {mention.lower(): first}
    return boxes


def size_errors(written: dict[str, tuple], example: Example) -> dict[str, float]:
    """Return mention -> the mean |difference| of the sides, where a size is asked for."""
    if not example.sizes or 'size="' not in example.answer:
        return {}
    errors = {}
    for mention, true in example.sizes.items():
        _, size = written.get(mention.lower(), (None, None))
        if size:
            errors[mention.lower()] = float(np.abs(np.subtract(size, true)).mean())
    return errors


def head_errors(head, example: Example) -> dict[int, float]:
    """Return region -> distance of the 3D head's centre, over the regions with a known object."""
    known = {}
    for k, (centre, _) in enumerate(truths(example)):
        if np.isfinite(centre).all():
            known[k] = centre
    return distances(dict(enumerate(head)), known)


def true_box(example: Example, processor) -> str | None:
    """Return the true 2D box as the model's family writes it, where one is asked for."""
    if not BOX_2D.search(example.answer):
        return None
    return processor.decode(processor.target_ids(example))


def image_name(image) -> str | None:
    """Return what two questions about one image have in common: its path, or its file's hash."""
    if isinstance(image, Frame):
        return f"{image.video}#{image.index}"
    source = image.source if isinstance(image, Marked) else image
    if is_data_uri(source):
        source = source.encode()
    # Parquet files hold one image in many rows; its bytes tell that it is the same.
    if isinstance(source, bytes):
        return f"sha1 {hashlib.sha1(source).hexdigest()}"
    return str(source) if isinstance(source, str | Path) else None


def name_clusters(examples: list[Example], benchmark: str | None) -> list[str]:
    """Name the cluster of each: all that share an image, a video or a scene, also through others.

    It is named by the first image of its first question.
    """
    shared = []
    names = []
    for example in examples:
        images = [image_name(image) for image in example.images]
        # All paths of a question are one cluster, even without an image that has a name.
        own = f"question {question_id(example)}"
        found = [own, *filter(None, images)]
        scene = benchmarks.scene_of(benchmark, example) if benchmark else None
        if scene is not None:
            found.append(f"scene {scene}")
        shared.append(found)
        names.append(images[0] if images and images[0] else question_id(example))
    # Union-find over all names: A and B share an image, B and C a scene, so all three are one.
    return [names[first] for first in connected(shared)]


def answer_row(
    example: Example,
    rollout,
    head,
    constant: tuple,
    box: str | None = None,
    cluster: str | None = None,
    pixels: list[int] | None = None,
) -> dict:
    """Return a line of predictions.jsonl: the question, the answer, and what it is measured by.

    head (k, 3): the 3D head's centres, each in the frame of its region's image. constant: see
    `best_constants`. box: the true 2D box, where one is asked for. cluster: see `name_clusters`.
    pixels: the sizes of its images as the model reads them.
    """
    parsed = parse(rollout.text, example.path)
    scores = score(rollout.text, example)
    parts = dict(scores.parts)
    # An empty cell rather than a 0 where there is nothing to detect, or to compare it with.
    if not (example.objects and "detect" in PATHS[example.path].sections):
        parts["detect"] = None
    written = written_boxes(rollout.text, parsed, example)
    centres = {mention: centre for mention, (centre, _) in written.items()}
    guess, median_centre = constant
    usual = true_centres(example, example.frame or 0)
    iou = None if box is None else box_iou(parsed.answer, box)
    return dict(
        id=example.id,
        question_id=question_id(example),
        path=example.path,
        task=example.task,
        images=[image_name(image) for image in example.images],
        pixels=pixels or [],
        cluster=cluster or name_clusters([example], None)[0],
        question=example.question,
        text=rollout.text,
        parsed=asdict(parsed),
        answer=parsed.answer,
        truth=example.answer,
        tokens=len(rollout.tokens),
        finished=rollout.finished,
        truncated=not rollout.finished,
        unparsed=parsed.answer is None,
        total=scores.total,
        **parts,
        any_format=answer_score(parsed.answer, example.answer),
        chance=answer_score(guess, example.answer),
        iou=iou,
        iou50=None if iou is None else float(iou > 0.5),
        head_centres=np.asarray(head, dtype=float).round(4).tolist(),
        region_mentions=[
            object_of(text, example.objects) for text in example.question.split("<mask>")[:-1]
        ],
        text_errors=distances(centres, true_centres(example, parsed.frame)),
        head_errors=head_errors(head, example),
        size_errors=size_errors(written, example),
        chance_errors=distances(dict.fromkeys(usual, median_centre), usual),
    )


# ---- Asking, and going on where an eval was interrupted


def default_out(config: Config) -> str:
    """Return a folder that is named by the model and by what it is asked."""
    parts = Path(config.model).parts or ("model",)
    # A step's folder says little without its run's.
    model = parts[-2:] if parts[-1].startswith("step-") else parts[-1:]
    asked = []
    if config.suite or config.benchmark:
        asked = [(config.suite or config.benchmark).replace("/", "-")]
    if not asked:
        for source in map(str, config.data):
            path = source.partition(",")[0].partition("@")[0].rpartition(":")[2]
            asked.append(Path(path).name)
    return str(Path("out", "eval", "-".join([*model, *asked])))


def refuse_other_answers(config: Config) -> None:
    """Raise UserError where --out holds answers of an eval that asked something else.

    Called by all ranks; the first alone looks, others may not see its disk as it is now.
    """
    problem = None
    out = Path(config.out)
    if ranks.is_first() and has_answers(out):
        now = settings_of(config)
        then = earlier_settings(out)
        if then is None:
            problem = f"{out} holds answers, and no settings.json that says of what"
        # Answers of two models in one file would make a table of neither.
        elif differences := differing(then, now):
            problem = f"{out} holds the answers of another eval: {differences}"
    remedy = f"choose another --out, or delete its {PREDICTIONS} and settings.json"
    ranks.raise_together(problem and f"{problem}; {remedy}")


def has_answers(out: Path) -> bool:
    return any(file.stat().st_size for file in out.glob("predictions*.jsonl*"))


def differing(then: dict, now: dict) -> str:
    """Return the settings that differ, with both values."""
    said = []
    for name, value in now.items():
        before = then.get(name)
        if folder.as_json(before) == folder.as_json(value):
            continue
        if name in NOT_SHOWN:
            said.append(NOT_SHOWN[name])
        else:
            flag = flags.flag(name)
            said.append(f"{flag} {folder.shown(before)}, now it is {folder.shown(value)}")
    return "; ".join(said)


def earlier_answers(config: Config, asked: dict[str, list[Example]]) -> dict[str, dict]:
    """Return file -> (id, path) -> row of what the same eval had answered when it stopped.

    On the first rank; {} on the others, which may not see its disk as it is now.
    """
    if not ranks.is_first():
        return {name: {} for name in asked}
    out = Path(config.out)
    return {name: answered(out, name, examples) for name, examples in asked.items()}


def begin(config: Config, done: dict[str, dict]) -> None:
    """Make --out ready, with the rows of what is answered already. Collective."""
    problem = None
    if ranks.is_first():
        problem = folder.attempt(Path(config.out), write_beginning, config, done)
    ranks.raise_together(problem)


def write_beginning(config: Config, done: dict[str, dict]) -> None:
    out = Path(config.out)
    (out / "summary.json").unlink(missing_ok=True)
    folder.replace_text(out / "settings.json", json.dumps(settings_of(config), indent=1))
    for name, rows in done.items():
        write_rows(out, name, rows.values())


def settings_of(config: Config) -> dict:
    """Return what the rows depend on, as JSON gives it back."""
    # The columns, too: rows that an older version wrote lack some.
    files = []
    for file in sorted(Path(config.model).glob("*.safetensors")):
        state = file.stat()
        # Not the contents: a hash would have to read the whole checkpoint.
        files.append((file.name, state.st_size, state.st_mtime_ns))
    # Neither changes an answer: a folder may be moved, and go on with other workers.
    settings = asdict(replace(config, out="", workers=None))
    settings |= {"checkpoint": files, "columns": [*COLUMNS, "pixels"]}
    return json.loads(json.dumps(settings))


def earlier_settings(out: Path) -> dict | None:
    with suppress(OSError, ValueError):
        return json.loads((out / "settings.json").read_text())
    return None


def answered(out: Path, name: str, examples: list[Example]) -> dict[tuple, dict]:
    """Return (id, path) -> row of all ranks' rows that answer one of these examples."""
    texts = {(e.id, e.path): (e.question, e.answer) for e in examples}
    rows = {}
    for file in out.glob(f"{name}*"):
        for line in file.read_text().splitlines():
            # An interrupted eval may leave a torn line.
            with suppress(ValueError, KeyError, TypeError):
                row = json.loads(line)
                key = (row["id"], row["path"])
                if texts.get(key) == (row["question"], row["truth"]):
                    rows[key] = row
    return rows


def write_rows(out: Path, name: str, rows) -> None:
    """Write all rows into one file, in place of the ranks' own."""
    folder.replace_text(out / name, as_lines(rows))
    for part in out.glob(f"{name}.*"):
        part.unlink()


def append_rows(path: Path, rows: list[dict]) -> None:
    with path.open("a") as file:
        file.write(as_lines(rows))


def as_lines(rows) -> str:
    return "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)


def answer_all(
    config: Config, examples: list[Example], model, processor, name: str, done: dict
) -> list:
    """Return the rows of all examples, in their order; [] on all ranks but 0.

    done: (id, path) -> row of what needs no answer any more; on rank 0 only.
    """
    rank, world, _ = ranks.start_ranks()
    known = set(ranks.broadcast(list(done)))
    constants = best_constants(examples)
    clusters = {}
    names = name_clusters(examples, config.benchmark)
    for example, cluster in zip(examples, names, strict=True):
        clusters[example.id, example.path] = cluster
    unanswered = [example for example in examples if (example.id, example.path) not in known]
    local_examples = local_share(unanswered, rank, world)
    # A file a rank, so that what each has written is kept if any is interrupted.
    own_file = Path(config.out) / (f"{name}.{rank}" if rank else name)
    bar = tqdm(
        total=len(local_examples), desc="eval", unit="answer", smoothing=0.05, disable=rank > 0
    )
    rows = []
    problem = None
    for start in range(0, len(local_examples), CHUNK):
        chunk = local_examples[start : start + CHUNK]
        new_rows = []
        for row in answer_chunk(config, chunk, model, processor, constants, clusters):
            new_rows.append(row)
            bar.update()
        # A row at a time the bar moves; a chunk at a time the disk is written.
        rows += new_rows
        problem = folder.attempt(own_file, append_rows, own_file, new_rows)
        if problem:
            break
    bar.close()
    ranks.raise_together(problem)

    # Only now: up to here each rank has written a file of its own.
    for row in ranks.gather(rows):
        done[row["id"], row["path"]] = row
    rows = []
    if rank == 0:
        rows = [done[example.id, example.path] for example in examples]
        problem = folder.attempt(own_file, write_rows, own_file.parent, name, rows)
    ranks.raise_together(problem)
    return rows


def local_share(examples: list[Example], rank: int, world: int) -> list[Example]:
    """Return a rank's share, those with the same images one behind the other.

    So they are on one rank, in one pass, and their images are encoded once: 18 questions of a video
    of VSI-Bench.
    """
    groups: dict[tuple, list[Example]] = {}
    for k, example in enumerate(examples):
        key = tuple(map(same_image, example.images))
        groups.setdefault(key or (k,), []).append(example)
    share = []
    # By turns, not in blocks: tasks stand one behind the other, and differ in length.
    for group in list(groups.values())[rank::world]:
        share += group
    return share


def same_image(image) -> str | int:
    """Return what is equal for the same image: its path, else which object it is."""
    return str(image) if isinstance(image, str | Path) else id(image)


def answer_chunk(
    config: Config,
    examples: list[Example],
    model,
    processor,
    constants: dict,
    clusters: dict,
) -> Iterator[dict]:
    """Ask a chunk of questions at once; yield a row for each, in their order."""
    shown = [seen(example, config) for example in examples]
    # A forward pass of prompts without regions would be wasted on the head.
    with_regions = [example for example in shown if example.regions]
    # In the order of use, for the workers that read images ahead.
    processor.prefetch(with_regions + shown)
    # An iterator, as only examples with regions take the next.
    heads = iter(predict_centres(model, processor, with_regions) if with_regions else [])
    groups = sample_groups(
        model,
        processor,
        shown,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        seed=config.seed,
    )
    for example, (rollout,) in zip(examples, groups, strict=True):
        head = next(heads) if example.regions else []
        box = true_box(example, processor)
        cluster = clusters[example.id, example.path]
        pixels = pixels_read(example, processor)
        yield answer_row(example, rollout, head, constants[example.task], box, cluster, pixels)


def pixels_read(example: Example, processor) -> list[int]:
    """Return the sizes, in pixels, that the model reads an example's images in."""
    sizes = {picture_size(image) for image in example.images}
    return sorted({processor.pixels_of(size) for size in sizes})


# ---- A benchmark's own table


def mark_answers(config: Config, pairs: list[tuple[Example, dict]]) -> table.Marks:
    """Mark a path's answers by both scorers, each row as well; pairs: (question, row)."""
    texts = [(example, row["text"]) for example, row in pairs]
    for scorer in table.SCORERS:
        marks = benchmarks.marks(config.benchmark, texts, scorer)
        for mark, (_, row) in zip(marks, pairs, strict=True):
            row[scorer] = mark or 0.0
    clusters = [row["cluster"] for _, row in pairs]
    return table.marks_of(config.benchmark, texts, clusters)


def print_benchmark(config: Config, path: str, marks: table.Marks, asked: Asked) -> None:
    """Print per cent by both scorers and, where all was asked, somebody else's figure."""
    # Somebody else's figure of the whole set says nothing about a part of it.
    figures = table.published(config.benchmark) if asked.is_whole else ()
    table.print_marks(config.benchmark, path, marks, figures)
    examples = [example for example in asked.examples if example.path == path]
    if "detect" in PATHS[path].sections:
        with_regions = [example for example in examples if example.regions]
        print(f"  ({len(with_regions)} of {len(examples)} questions had regions)")
    name, _, _ = config.benchmark.partition("/")
    if benchmarks.BENCHMARKS[name].judged:
        print(f"  ({benchmarks.BENCHMARKS[name].judged})")


def print_notes(config: Config, asked: Asked, shown: dict) -> None:
    """Print what was shown, and whether all of the set is there."""
    print(f"  (input: {table.input_line(shown)})")
    if asked.rows != asked.published_rows:
        print(
            f"  (incomplete: {asked.rows:,} of {asked.published_rows:,} rows are there, so no "
            "published figure is shown)"
        )


def benchmark_summary(config: Config, asked: Asked, rows: list[dict]) -> dict:
    """Print the benchmark's table for each path; return what summary.json says of it."""
    summary = {"benchmark": {}, "standard_errors": {}}
    shown = table.input_of(asked.examples, [row["pixels"] for row in rows])
    both = list(zip(asked.examples, rows, strict=True))
    for path in dict.fromkeys(row["path"] for row in rows):
        pairs = [(example, row) for example, row in both if row["path"] == path]
        marks = mark_answers(config, pairs)
        summary["benchmark"][path] = marks.values()
        summary["standard_errors"][path] = marks.standard_errors()
        print_benchmark(config, path, marks, asked)
    print_notes(config, asked, shown)
    others = []
    # Somebody else's figures are of the whole set.
    published = table.published(config.benchmark) if asked.is_whole else ()
    for model, source, figures in published:
        others.append({"model": model, "source": source, "figures": figures})
    counts = {
        "rows": asked.rows,
        "published_rows": asked.published_rows,
        "questions": len({row["question_id"] for row in rows}),
    }
    return summary | counts | {"input": shown, "published": others}


def print_comparison(rows: list[dict]) -> None:
    """Print how the second of two paths differs from the first, paired by question."""
    groups = by_path(rows)
    if len(groups) != 2:
        return
    first, second = groups.values()
    change = paired_by_question(first, second)
    names = " - ".join(path.upper() for path in reversed(groups))
    print(f"paired over {change['n']:,} questions: {names} {points(change)} points of accuracy")


# ---- One eval, or all of a suite


class Checkpoint:
    """The model and its processor, loaded when the first question needs an answer."""

    def __init__(self, config: Config, device):
        self.config = config
        self.device = device
        self.model = None
        self.processor = None

    def load(self, examples: list[Example]) -> tuple:
        """Return (model, processor); say which parts these examples use that never learnt."""
        config = self.config
        if self.processor is None:
            # The 3D head is read, too.
            self.processor = run.load_processor(config.model, config, examples, (), True)
            self.model = load_model(config.model, self.device, None, 0, config.regions)
        else:
            for sentence in self.processor.untrained_parts(examples, (), True):
                ranks.say(sentence)
        return self.model, self.processor


def main(config: Config) -> dict | None:
    """Return the summary; None on all ranks but 0."""
    if config.suite:
        return ask_suite(config)
    config = replace(config, out=config.out or default_out(config))
    asked = questions(config)
    place = ranks.start_ranks()
    with folder.lock(config.out):
        return ask_all(config, asked, Checkpoint(config, place.device))


def ask_all(config: Config, asked: Asked, checkpoint: Checkpoint) -> dict | None:
    """Ask what has no answer yet, print the table, and write the summary, which is returned."""
    refuse_other_answers(config)
    examples = asked.examples
    # File -> the settings that its questions are asked with, and the questions.
    runs = {PREDICTIONS: (config, examples)}
    with_depth = [example for example in examples if has_depth(example)]
    if with_depth and config.again and config.depth and not config.blind:
        asked_again = select(with_depth, config.path, config.again)
        count = len({question_id(example) for example in with_depth})
        if config.again < count:
            datasets.say(
                f"--again: {config.again} of {count} questions are asked once more without depth"
            )
        runs[WITHOUT_DEPTH] = (replace(config, depth=False), asked_again)
    done = earlier_answers(config, {name: of_run for name, (_, of_run) in runs.items()})
    left = sum(len(of_run) - len(done[name]) for name, (_, of_run) in runs.items())
    started = time.perf_counter()
    made = made_before(config)
    model = processor = None
    if ranks.broadcast(left):
        shown = examples
        if config.blind or not config.depth:
            shown = [replace(example, depths=None) for example in examples]
        model, processor = checkpoint.load(shown)
        begin(config, done)
    else:
        ranks.say(f"{config.out} has all answers: this is their table (to ask anew, delete it)")
    answers = {}
    for name, (settings, of_run) in runs.items():
        answers[name] = answer_all(settings, of_run, model, processor, name, done[name])
    if not ranks.is_first():
        return None

    # Of a table that is only printed again, date and seconds stay those of its answers.
    if processor is not None or not made:
        made = origin() | {"seconds": time.perf_counter() - started}
    rows = answers[PREDICTIONS]
    results = summarise_paths(rows, answers.get(WITHOUT_DEPTH, []))
    summary = {"config": asdict(config), "results": results, **made}
    print_table(results)
    print_comparison(rows)
    if config.benchmark:
        summary |= benchmark_summary(config, asked, rows)
    # Once more: of a benchmark, rows have got both scorers' marks.
    problem = folder.attempt(Path(config.out), write_end, config, rows, summary)
    if problem:
        raise UserError(problem)
    return summary


def made_before(config: Config) -> dict:
    """Return when and by which commit a finished eval was made, for one that is printed again."""
    with suppress(OSError, ValueError, KeyError):
        summary = json.loads((Path(config.out) / "summary.json").read_text())
        return {name: summary[name] for name in ("commit", "date", "seconds")}
    return {}


def write_end(config: Config, rows: list[dict], summary: dict) -> None:
    out = Path(config.out)
    write_rows(out, PREDICTIONS, rows)
    folder.replace_text(out / "summary.json", json.dumps(summary, indent=1, allow_nan=False))


def ask_suite(config: Config) -> dict | None:
    """Ask all benchmarks of a suite that are there; return what suite.json says."""
    if config.benchmark or len(config.data) != 1:
        raise UserError(
            f"--suite {config.suite}: give one --data, with a folder each, no --benchmark"
        )
    config = replace(config, out=config.out or default_out(config))
    root = Path(config.data[0])
    names = benchmarks.SUITES[config.suite]
    place = ranks.start_ranks()
    # What the first rank sees holds for all, or they would wait for each other.
    there = ranks.broadcast([name for name in names if (root / name).is_dir()])
    if not there:
        raise UserError(f"--suite {config.suite}: {root} has none of {', '.join(names)}")
    missing = [name for name in names if name not in there]
    # Loaded once, by the first benchmark that has something to ask.
    checkpoint = Checkpoint(config, place.device)
    sets = {}
    unreadable = {}
    for name in there:
        own = replace(
            config,
            suite=None,
            benchmark=name,
            data=(str(root / name),),
            out=str(Path(config.out, name)),
        )
        asked, problem = questions_or_problem(own)
        if problem:
            ranks.say(f"{name}: {problem}")
            unreadable[name] = problem
            continue
        with folder.lock(own.out):
            sets[name] = ask_all(own, asked, checkpoint)
    if ranks.is_first():
        summary = suite_summary(config, sets, missing, unreadable)
        path = Path(config.out, "suite.json")
        text = json.dumps(summary, indent=1, allow_nan=False)
        problem = folder.attempt(path.parent, write_suite, path, text)
        if problem:
            raise UserError(problem)
    if unreadable:
        raise UserError(f"not asked, as they can't be read: {', '.join(unreadable)} (see above)")
    return summary if ranks.is_first() else None


def write_suite(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    folder.replace_text(path, text)


def questions_or_problem(config: Config) -> tuple[Asked | None, str | None]:
    """Read a benchmark; return what is wrong with it on any rank. Collective."""
    asked = problem = None
    try:
        asked = questions(config)
    except UserError as error:
        problem = str(error)
    # Together: a rank that went on alone would wait in the next collective for ever.
    (is_bad,) = ranks.all_reduce([1 if problem else 0], "MAX")
    if is_bad and not problem:
        problem = "another rank can't read it"
    return asked, problem


# What suite.json says of each benchmark; summary.json in its folder has the rest.
KEPT = (
    "benchmark",
    "standard_errors",
    "rows",
    "published_rows",
    "questions",
    "input",
    "published",
)


def kept_of(summary: dict) -> dict:
    return {key: summary[key] for key in KEPT}


def suite_summary(config: Config, sets: dict, missing: list[str], unreadable: dict) -> dict:
    """Print the suite's table; return what suite.json says."""
    rows = []
    figures = {}
    for name, summary in sets.items():
        shown = table.input_line(summary["input"])
        # With --limit fewer than there are.
        counts = (summary["questions"], summary["published_rows"])
        if summary["published"]:
            figures[name] = table.published(name)
        for path, marks in summary["benchmark"].items():
            errors = summary["standard_errors"][path]
            cells = []
            for scorer in table.SCORERS:
                # Of translation alone MindCube has no overall.
                value = marks[scorer].get("overall")
                cells.append(value if value is None else Mean(value, errors[scorer]["overall"]))
            rows.append(table.SuiteRow(name, path, *counts, *cells, shown))
    table.print_suite(config.suite, rows, figures)
    for name in missing:
        print(f"  missing: {name} ({Path(config.data[0], name)})")
    return {
        "suite": config.suite,
        "config": asdict(config),
        "sets": {name: kept_of(summary) for name, summary in sets.items()},
        "missing": missing,
        "unreadable": unreadable,
    }


if __name__ == "__main__":
    run.launch(main, cfg)
