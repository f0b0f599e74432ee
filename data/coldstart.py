"""Cold start: gives rows with truth a rationale, computed from the truth or written by an expert.

    python -m data.coldstart --data out/train --out out/cold
    python -m data.coldstart --data out/train --out out/cold \\
        --expert Qwen/Qwen2.5-VL-7B-Instruct --samples 8

computed   by the rules of data/rationale.py, where the row's objects answer the question.
expert     any Qwen-VL checkpoint, our own included, samples whole responses. It is told the right
           answer and, on path dtr, the scene graph.

Of the samples of a question FILTERS throw out what a model should not learn to write; of the rest
that is kept which names most objects, then with most checked equations, then the first. A kept row
has the sample's <think>; its <detect> and <answer> are the truth's. tried.jsonl gets a line a
question, and a second call goes on behind it; at the end rows.jsonl (our own row format:
data/schema.py) and summary.json are written.

Departures from the paper: it filters nothing, and its example speaks of "the provided scene graph",
miscalculates, and uses other centres than it detected. Names come from the rows, not from a
language model.
"""

import hashlib
import json
import os
import re
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image
from tqdm import tqdm

import data
import flags
from data.arithmetic import equations, unknown_numbers, wrong
from data.benchmarks.answers import said_text
from data.geometry import box_of
from data.rationale import centres, compute, is_teachable
from errors import UserError, launch, writing
from flags import Count, Positive, Seed
from pictures import is_data_uri, read_picture
from srreal import (
    NUMERAL,
    UNITS,
    Example,
    answer_score,
    parse,
    several_views,
    truth_kind,
    write_detect,
)


@dataclass
class Config:
    # rows with truth: path or kind:path; each is asked on its own path, lor or dtr
    data: tuple[str, ...]
    out: Path  # folder to write: rows.jsonl, summary.json, tried.jsonl
    expert: str | None = None  # checkpoint directory or hub id; None: computed from the truth
    samples: Count = 4  # drawn for each question; the best is kept
    # least and most words of a rationale; a word: at most 10 characters
    words: tuple[Count, Count] = (8, 300)
    limit: Count | None = None  # at most so many questions, from the first; None: all
    seed: Seed = 0  # of the wordings and of the expert's sampling
    temperature: Positive = 1.0  # of the expert's sampling
    max_new_tokens: Count = 768  # of the expert; a longer response is cut, and so is ill-formed
    # how the expert reads a region; token: one that we trained
    regions: Literal["token", "text"] = "text"
    max_pixels: Count | None = None  # the expert's image size limit; None: the checkpoint's own
    skip_bad_rows: bool = False  # go on without the unusable rows, and count them

    def __post_init__(self):
        flags.check(self)
        least, most = self.words
        if least > most:
            raise UserError(f"--words {least} {most}: the least comes first")


# ---- filters: (parsed, example, config, rationales kept so far) -> whether it is thrown out


def breaks_grammar(parsed, e, cfg, kept):
    return not (parsed.well_formed and is_teachable(e, e.path, parsed.think))


def is_wrong(parsed, e, cfg, kept):
    """Return whether <answer>, or what <think> says last, is another answer than the true one."""
    if not is_right(parsed.answer, e.answer):
        return True
    return not claims_truth(parsed.think, e.answer)


# Words by which an expert gives away that it was told the answer.
GIVEN = "(?:provided|given|supplied|stated)"
WHAT = "(?:answer|cent|coord|3d|box)"
LEAK = re.compile(
    r"scene[ _-]?graph|detect section|ground[ _-]?truth|annotat|metadata|center_?3d|bbox_?2d"
    rf"|the (?:\w+ )?hint|reference answer|{GIVEN} {WHAT}"
    rf"|{GIVEN} (?:that )?(?:the )?(?:\w+ )?answer"
    rf"|\b{WHAT}\w* (?:(?:is|are|was|were) )?{GIVEN}|(?:was|were|been|am) (?:given|told|provided)",
    re.I,
)


def leaks(parsed, e, cfg, kept):
    """Return whether the rationale speaks of what the expert was told."""
    return LEAK.search(parsed.think) is not None


def is_too_short_or_long(parsed, e, cfg, kept):
    least, most = cfg.words
    count = len(parsed.think.split())
    return not least <= count <= most or len(parsed.think) > 10 * most


def has_unknown_numbers(parsed, e, cfg, kept):
    # On path lor nothing is detected that numbers could come from: it may estimate.
    if e.path != "dtr":
        return False
    points = [xyz for *_, xyz in centres(e)]
    return bool(unknown_numbers(parsed.think, f"{e.question} {e.answer}", points))


def miscalculates(parsed, e, cfg, kept):
    return any(wrong(*equation) for equation in equations(parsed.think))


def is_duplicate(parsed, e, cfg, kept):
    return normalized(parsed.think) in kept


# The first that throws a response out is counted. Numbers and arithmetic take a time that the
# length bounds, so they stand behind it.
FILTERS = {
    "grammar": breaks_grammar,
    "answer": is_wrong,
    "leak": leaks,
    "length": is_too_short_or_long,
    "numbers": has_unknown_numbers,
    "arithmetic": miscalculates,
    "duplicate": is_duplicate,
}

# What a rationale says that the answer is.
CLAIM = re.compile(
    rf"(?i:answer is|answer:|option)[\s\"'(*]*([A-E]\b|{NUMERAL}(?<!\.)"
    # A unit may follow, but not as in: 2 in the image.
    rf"(?:\s*(?ai:{'|'.join(UNITS)})(?!\w)(?<!in(?= \w)))?)"
)


def claims_truth(think: str, truth: str) -> bool:
    """Return whether the answer that <think> says last, where it says one, is the true one."""
    if truth_kind(truth) in ("choice", "number"):
        claims = CLAIM.findall(think)
        return not claims or is_right(claims[-1], truth)
    text = said_text(think)
    if text is None:
        return True
    # "yes, as it is red" says yes: any beginning up to a comma may be it.
    for end in re.finditer(r"[,;] (?!move_|rotate_)|$", text):
        if is_right(text[: end.start()].strip("\"'"), truth):
            return True
    return False


def is_right(answer: str | None, truth: str) -> bool:
    # The score of a number falls with its distance: this is the truth but for a last digit.
    return answer_score(answer, truth) > 0.999


def normalized(think: str) -> str:
    return " ".join(think.lower().split())


def judge(text: str | None, e: Example, cfg: Config, kept: set) -> str | None:
    """Return the name of the filter that throws a response out; None keeps it."""
    if text is None:
        return "no rule"
    parsed = parse(text, e.path)
    for name, throws_out in FILTERS.items():
        if throws_out(parsed, e, cfg, kept):
            return name
    return None


def best(thoughts: list[str], e: Example) -> str | None:
    """Return the one that names most objects, then has most equations, then comes first."""

    def merit(think):
        named = [mention for mention in e.objects if mention.lower() in think.lower()]
        return len(named), len(equations(think))

    return max(thoughts, key=merit, default=None)


# ---- the expert

HINT = (
    "\n\nThe right answer is {answer}.{graph} Write the reply for a textbook: {low} to {high} "
    "words of reasoning that\nlead from what the image shows to this answer{use}, as one who was "
    "told nothing. End with: So the answer is\n{answer}."
)


def with_hint(e: Example, cfg: Config) -> Example:
    """Add the right answer to the question and, on path dtr, the scene graph."""
    graph = ""
    use = ""
    if e.path == "dtr":
        graph = f" The detect section is:\n{write_detect(e)}\n"
        use = " and, of numbers, use these centres' alone"
    low, high = cfg.words
    hint = HINT.format(answer=e.answer, graph=graph, use=use, low=low, high=high)
    return replace(e, question=e.question + hint)


def sampler(cfg: Config):
    """Return a function: Examples -> the texts (or None) of their samples."""
    return computed(cfg) if cfg.expert is None else written(cfg)


def computed(cfg):
    seeds = [f"{cfg.seed} {k}" for k in range(cfg.samples)]

    def sample(examples):
        texts = []
        for e in examples:
            texts.append([compute(e, seed) for seed in seeds])
        return texts

    return sample


def written(cfg):
    # Here alone a model is needed: computed rationales work without torch.
    import torch

    from model import Processor, QwenVL, generate

    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans for every new shape
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = QwenVL.from_pretrained(cfg.expert, device, regions=cfg.regions)
    processor = Processor.from_pretrained(
        cfg.expert, max_pixels=cfg.max_pixels, regions=cfg.regions
    )

    def sample(examples):
        groups = generate(
            model,
            processor,
            [with_hint(e, cfg) for e in examples],
            n=cfg.samples,
            temperature=cfg.temperature,
            max_new_tokens=cfg.max_new_tokens,
            seed=cfg.seed,
        )
        texts = []
        for group in groups:
            texts.append([rollout.text for rollout in group])
        return texts

    return sample


# ---- rows


def as_row(e: Example, think: str, out: Path) -> dict:
    """Return a row of our own format with that rationale, files relative to `out`.

    Images and depths that are no files are saved, once for both paths; a region that is a mask
    becomes its box, as the format holds no masks.
    """
    row = {key: value for key, value in vars(e).items() if value not in (None, "", [], {})}
    row["rationale"] = think
    stem = hashlib.sha1(e.id.encode()).hexdigest()[:16]
    row["images"] = [
        as_file(image, out, f"images/{stem}-{k}.jpg") for k, image in enumerate(e.images)
    ]
    if e.depths:
        row["depths"] = [
            as_file(depth, out, f"depths/{stem}-{k}.png") for k, depth in enumerate(e.depths)
        ]
    row["regions"] = [
        (view, [float(side) for side in box_of(region)]) for view, region in e.regions
    ]
    return row


def as_file(item, out: Path, file: str) -> str | None:
    """Return the path of an image or depth map relative to `out`, in `file` if it is in none."""
    if item is None:
        return None
    # Files stay where they are; a moved --out loses them.
    if isinstance(item, str | Path) and not is_data_uri(item):
        return os.path.relpath(item, out)
    if not (out / file).is_file():
        save(item, out / file)
    return file


def save(item, file: Path) -> None:
    """Save an image as a JPEG (photographs as PNGs fill the disk), depth in metres as a PNG."""
    if file.suffix == ".png":
        metres = np.nan_to_num(np.asarray(item), posinf=0)
        millimetres = (metres * 1000).round().clip(0, 65535)
        picture = Image.fromarray(millimetres.astype(np.uint16))
    else:
        picture = read_picture(item)
    # Whole or not at all: a second call takes a file that is there.
    part = file.with_name(f"{file.name}.part")
    kind = "png" if file.suffix == ".png" else "jpeg"
    with writing(file):
        file.parent.mkdir(exist_ok=True)
        picture.save(part, kind, quality=95, subsampling=0)
        os.replace(part, file)


# ---- a run, and a run that goes on


def begin(cfg: Config) -> list[dict]:
    """Return the lines of tried.jsonl of a call before; UserError if that had other settings."""
    config = cfg.out / "config.json"
    tried = cfg.out / "tried.jsonl"
    # As JSON returns them: paths are texts, tuples are lists.
    settings = json.loads(json.dumps(asdict(cfg), default=str))
    try:
        cfg.out.mkdir(parents=True, exist_ok=True)
        lines = tried.read_bytes().splitlines(keepends=True) if tried.exists() else []
        # A last line that was cut off is asked again.
        whole = [line for line in lines if line.endswith(b"\n")]
        before = [json.loads(line) for line in whole]
        old = json.loads(config.read_text()) if before else settings
    except (OSError, ValueError) as error:
        raise UserError(f"--out {cfg.out}: {error}") from error
    for key in settings.keys() - {"out", "limit"}:
        if settings[key] != old.get(key):
            raise UserError(
                f"{cfg.out} was begun with {flags.flag(key)} {old.get(key)}, "
                f"now it is {settings[key]}: choose another --out"
            )
    with writing(cfg.out):
        config.write_text(json.dumps(settings, indent=1) + "\n")
        if whole != lines:
            os.truncate(tried, sum(map(len, whole)))
    return before


def questions(cfg: Config) -> list[Example]:
    """Return those that can be taught: on path dtr, with objects and a view of them all."""
    # Each once, however often it comes an epoch.
    try:
        loaded = {(e.id, e.path): e for e in data.load(cfg.data, cfg.skip_bad_rows)}.values()
    except data.BadRows as bad:
        told = bad.told(cfg.out)
        if not cfg.skip_bad_rows:
            told += "\n(--skip-bad-rows goes on without them)"
        raise UserError(told) from bad
    asked = [with_frame(e) for e in loaded if e.path in ("lor", "dtr")]
    examples = [e for e in asked if is_teachable(e, e.path)]
    left_out = len(asked) - len(examples)
    if not examples:
        what = "no row on path lor or dtr"
        if asked:
            what += " has objects in a view of them all"
        raise UserError(f"{' '.join(cfg.data)}: {what}")
    if left_out:
        print(f"{left_out} dtr rows without objects, or a view of them all, are left out")
    if len(asked) < len(loaded):
        print(f"{len(loaded) - len(asked)} rows on other paths than lor and dtr are left out")
    if cfg.limit and cfg.limit < len(examples):
        print(f"--limit: the first {cfg.limit} of {len(examples)} questions are taken")
    return examples[: cfg.limit]


# The k-th pattern names view k.
VIEWS = (
    r"\bfirst\b",
    r"\bsecond (?:image|frame|view|picture|photo)\b",
    r"\bthird (?:image|frame|view|picture|photo)\b",
)


def with_frame(e: Example) -> Example:
    """Set the view that a rationale speaks of, as in the paper.

    It is the question's, else its first mark's, where all objects have a centre in it.
    """
    if e.frame is not None or not several_views(e):
        return e
    # The first view that the question names wins over the view of its first mark.
    named = [k for k, words in enumerate(VIEWS) if re.search(words, e.question, re.I)]
    marked = [view for view, _ in e.regions]
    frame = next(iter(named + marked), None)
    if e.objects and all(frame in views for views in e.objects.values()):
        return replace(e, frame=frame)
    return e


def try_question(e: Example, texts: list, cfg: Config, kept: set) -> dict:
    """Judge the samples of a question; return its line of tried.jsonl. kept grows by the best."""
    # Samples are judged before one is kept, so they can't be each other's duplicates.
    good = []
    thrown_out = Counter()
    for text in texts:
        verdict = judge(text, e, cfg, kept)
        if verdict is None:
            good.append(parse(text, e.path).think.strip())
        else:
            thrown_out[verdict] += 1
    think = best(good, e)
    if think is not None:
        kept.add(normalized(think))
    # A line for each question, also of one without a row, says what a second call needn't ask.
    return {
        "id": e.id,
        "path": e.path,
        "good": len(good),
        "thrown_out": thrown_out,
        "row": None if think is None else as_row(e, think, cfg.out),
    }


def finish(tried: list[dict], out: Path) -> dict:
    """Write rows.jsonl and summary.json.

    By path: questions, kept, samples, and what each filter threw out.
    """
    summary: dict = {}
    columns = ("questions", "kept", "samples", "no rule", *FILTERS)
    for line in tried:
        counts = summary.setdefault(line["path"], Counter(dict.fromkeys(columns, 0)))
        counts["questions"] += 1
        counts["kept"] += 1 if line["row"] else 0
        counts["samples"] += line["good"] + sum(line["thrown_out"].values())
        counts.update(line["thrown_out"])
    rows = [json.dumps(line["row"]) + "\n" for line in tried if line["row"]]
    with writing(out):
        (out / "rows.part").write_text("".join(rows))
        os.replace(out / "rows.part", out / "rows.jsonl")
        (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    return summary


def main(cfg: Config) -> dict:
    examples = questions(cfg)
    tried = begin(cfg)
    done = {(line["id"], line["path"]) for line in tried}
    todo = [e for e in examples if (e.id, e.path) not in done]
    kept = {normalized(line["row"]["rationale"]) for line in tried if line["row"]}
    sample = sampler(cfg) if todo else None
    # So many questions at a time: enough for the expert's batch, little to lose when it is stopped.
    width = max(1, 128 // cfg.samples)
    bar = tqdm(total=len(todo), desc="cold start", unit="question")
    path = cfg.out / "tried.jsonl"
    with bar:
        for start in range(0, len(todo), width):
            asked = todo[start : start + width]
            lines = []
            for e, texts in zip(asked, sample(asked), strict=True):
                lines.append(try_question(e, texts, cfg, kept))
            with writing(path), path.open("a") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
            tried += lines
            bar.update(len(asked))
    summary = finish(tried, cfg.out)
    for path, counts in summary.items():
        columns = ", ".join(f"{name} {count}" for name, count in counts.items())
        print(f"{path}: {columns}")
    return summary


if __name__ == "__main__":
    launch("coldstart", main, flags.parse(Config, __doc__))
