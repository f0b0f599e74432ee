"""Cold start: from rows with truth to rows with a rationale, computed from the truth or written by
an expert.

    python -m data.coldstart --data out/train --out out/cold python -m data.coldstart --data
    out/train --out out/cold --expert Qwen/Qwen2.5-VL-7B-Instruct --samples 8

computed   by the rules of data/rationale.py, where the row's objects answer the question.
expert     any Qwen-VL checkpoint, our own included, samples whole responses through model.rollout.generate.
           It is told the right answer and, on path dtr, the scene graph.

Of the samples of a question FILTERS throw out what a model should not learn to write; of the rest
that is kept which names most objects, then with most checked equations, then the first. A kept row
has the sample's <think>; its <detect> and <answer> are the truth's. tried.jsonl gets a line a
question, and a second call goes on behind it; at the end rows.jsonl (our own row format:
data/__init__.py) and summary.json are written.

Departures from the paper: it filters nothing, and its example speaks of "the provided scene graph",
miscalculates, and uses other centres than it detected. Names come from the rows, not from a
language model.
"""

import hashlib
import json
import math
import os
import re
import sys
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from PIL import Image
from tqdm import tqdm

import data
from data.arithmetic import equations, unknown_numbers, wrong
from data.benchmarks.answers import said_text
from data.rationale import centres, compute, taught
from srreal import UNITS, Example, answer_score, number, parse, several_views, write_detect


@dataclass
class Config:
    # rows with truth: path or kind:path; each is asked on its own path, lor or dtr
    data: tuple[str, ...]
    out: Path  # folder to write: rows.jsonl, summary.json, tried.jsonl
    expert: str | None = None  # checkpoint directory or hub id; None: computed from the truth
    samples: int = 4  # drawn for each question; the best is kept
    # least and most words of a rationale; a word: at most 10 characters
    words: tuple[int, int] = (8, 300)
    limit: int | None = None  # at most so many questions, from the first
    seed: int = 0  # of the wordings and of the expert's sampling
    temperature: float = 1.0  # of the expert's sampling
    max_new_tokens: int = 768  # of the expert; a longer response is cut, and so is ill-formed
    # how the expert reads a region; token: one that we trained
    regions: Literal["token", "text"] = "text"
    max_pixels: int | None = None  # the expert's image size limit; None: the checkpoint's own
    skip_bad_rows: bool = False  # go on without the unusable rows, and count them


# ---- filters: (parsed, example, config, rationales kept so far) -> True: throw it out. The first
# is counted.
GIVEN, WHAT = "(?:provided|given|supplied|stated)", "(?:answer|cent|coord|3d|box)"
LEAK = re.compile(
    r"scene[ _-]?graph|detect section|ground[ _-]?truth|annotat|metadata|center_?3d|bbox_?2d"
    rf"|the (?:\w+ )?hint|reference answer|{GIVEN} {WHAT}|{GIVEN} (?:that )?(?:the )?(?:\w+ )?answer"
    rf"|\b{WHAT}\w* (?:(?:is|are|was|were) )?{GIVEN}|(?:was|were|been|am) (?:given|told|provided)",
    re.I,
)
CLAIM = re.compile(
    r"(?i:answer is|answer:|option)[\s\"'(*]*([A-E]\b|[-+]?\d+(?:\.\d+)?"
    rf"(?:\s*(?ai:{'|'.join(UNITS)})\b(?<!in(?= \w)))?)"
)  # not: 2 in the image


def claimed(think: str, truth: str) -> bool:
    """Whether the answer that <think> says last, where it says one, is the true one."""
    if truth in tuple("ABCDE") or math.isfinite(number(truth)):
        return all(answer_score(said, truth) > 0.999 for said in CLAIM.findall(think)[-1:])
    said = said_text(think)  # "yes, as it is red" says yes
    return said is None or any(
        answer_score(said[: end.start()].strip("\"'"), truth) > 0.999
        for end in re.finditer(r"[,;] (?!move_|rotate_)|$", said)
    )


FILTERS = {
    "grammar": lambda p, e, cfg, kept: not (p.well_formed and taught(e, e.path, p.think)),
    "answer": lambda p, e, cfg, kept: (
        not (  # <answer>, and what <think> says last
            answer_score(p.answer, e.answer) > 0.999 and claimed(p.think, e.answer)
        )
    ),
    "leak": lambda p, e, cfg, kept: LEAK.search(p.think),
    "length": lambda p, e, cfg, kept: (
        not (  # the two behind it take bounded time by that
            cfg.words[0] <= len(p.think.split()) <= cfg.words[1]
            and len(p.think) <= 10 * cfg.words[1]
        )
    ),
    "numbers": lambda p, e, cfg, kept: (
        e.path == "dtr"
        and unknown_numbers(  # LOR detects nothing
            p.think, f"{e.question} {e.answer}", [xyz for *_, xyz in centres(e)]
        )
    ),
    "arithmetic": lambda p, e, cfg, kept: any(wrong(*equation) for equation in equations(p.think)),
    "duplicate": lambda p, e, cfg, kept: same(p.think) in kept,
}


def same(think: str) -> str:
    return " ".join(think.lower().split())


def judge(text: str | None, e: Example, cfg: Config, kept: set) -> str | None:
    """The name of the filter that throws a response out; None keeps it."""
    if text is None:
        return "no rule"
    parsed = parse(text, e.path)
    return next((name for name, out in FILTERS.items() if out(parsed, e, cfg, kept)), None)


def best(thoughts: list[str], e: Example) -> str | None:
    named = lambda think: sum(mention.lower() in think.lower() for mention in e.objects)  # noqa: E731
    return max(thoughts, key=lambda think: (named(think), len(equations(think))), default=None)


# ---- the expert
HINT = """

The right answer is {answer}.{graph} Write the reply for a textbook: {low} to {high} words of reasoning that
lead from what the image shows to this answer{use}, as one who was told nothing. End with: So the answer is
{answer}."""


def told(e: Example, cfg: Config) -> Example:
    """The question with the right answer and, on path dtr, the scene graph."""
    graph, use = "", ""
    if e.path == "dtr":
        graph = f" The detect section is:\n{write_detect(e)}\n"
        use = " and, of numbers, use these centres' alone"
    hint = HINT.format(answer=e.answer, graph=graph, use=use, low=cfg.words[0], high=cfg.words[1])
    return replace(e, question=e.question + hint)


def sampler(cfg: Config):
    """A function: Examples -> the texts (or None) of their samples."""
    if cfg.expert is None:
        seeds = [f"{cfg.seed} {k}" for k in range(cfg.samples)]
        return lambda examples: [[compute(e, seed) for seed in seeds] for e in examples]
    import torch  # only here a model is needed

    from model import Processor, QwenVL, generate

    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans for every new shape
    model = QwenVL.from_pretrained(cfg.expert, "cuda" if torch.cuda.is_available() else "cpu")
    processor = Processor.from_pretrained(
        cfg.expert, max_pixels=cfg.max_pixels, regions=cfg.regions
    )
    return lambda examples: [
        [rollout.text for rollout in group]
        for group in generate(
            model,
            processor,
            [told(e, cfg) for e in examples],
            n=cfg.samples,
            temperature=cfg.temperature,
            max_new_tokens=cfg.max_new_tokens,
            seed=cfg.seed,
        )
    ]


# ---- rows out
def as_row(e: Example, think: str, out: Path) -> dict:
    """A row of our own format, files relative to `out`. Images and depths that are no files are
    saved, once for both paths; a region that is a mask becomes its box, as the format holds no
    masks."""
    stem, ends = hashlib.sha1(e.id.encode()).hexdigest()[:16], {"images": "jpg", "depths": "png"}
    row = {key: v for key, v in vars(e).items() if v not in (None, "", [], {})} | {
        "rationale": think
    }
    for folder in {"images", "depths"} & row.keys():
        files = (f"{folder}/{stem}-{k}.{ends[folder]}" for k in range(len(row[folder])))
        row[folder] = [
            item and os.path.relpath(item, out)
            if isinstance(item, str | Path | None)
            else saved(item, out, file)
            for item, file in zip(row[folder], files, strict=True)
        ]
    return row | {"regions": [(view, box_of(region)) for view, region in e.regions]}


def saved(item, out: Path, file: str) -> str:
    """An image as a JPEG (photographs as PNGs fill the disk), a depth map in metres as
    millimetres."""
    part = out / f"{file}.part"
    if (out / file).is_file():
        return file
    if file.startswith("depths/"):
        metres = np.nan_to_num(np.asarray(item), posinf=0)
        picture = Image.fromarray((metres * 1000).round().clip(0, 65535).astype(np.uint16))
    else:
        picture = item.convert("RGB")
    part.parent.mkdir(exist_ok=True)
    picture.save(part, file[-3:].replace("jpg", "jpeg"), quality=95, subsampling=0)
    os.replace(part, out / file)
    return file


def box_of(region) -> list:
    if np.ndim(region) == 2:
        v, u = np.nonzero(region)
        region = u.min(), v.min(), u.max() + 1, v.max() + 1
    return [float(x) for x in region]


def begin(cfg: Config) -> list[dict]:
    """The lines of tried.jsonl of a call before; ValueError if that had other settings."""
    cfg.out.mkdir(parents=True, exist_ok=True)
    config, tried = cfg.out / "config.json", cfg.out / "tried.jsonl"
    lines = tried.read_bytes().splitlines(keepends=True) if tried.exists() else []
    whole = [line for line in lines if line.endswith(b"\n")]  # a torn last line goes
    settings = json.loads(json.dumps(asdict(cfg), default=str))
    old = json.loads(config.read_text()) if whole else settings
    for key in settings.keys() - {"out", "limit"}:
        if settings[key] != old.get(key):
            raise ValueError(
                f"{cfg.out} was begun with --{key.replace('_', '-')} {old.get(key)}, "
                f"now it is {settings[key]}: choose another --out"
            )
    config.write_text(json.dumps(settings, indent=1) + "\n")
    if whole != lines:
        os.truncate(tried, sum(map(len, whole)))
    return [json.loads(line) for line in whole]


def finish(tried: list[dict], out: Path) -> dict:
    """Writes rows.jsonl and summary.json: by path questions, kept, samples, what each filter threw
    out."""
    summary: dict = {}
    for line in tried:
        zeros = dict.fromkeys(("questions", "kept", "samples", "no rule", *FILTERS), 0)
        counts, thrown_out = summary.setdefault(line["path"], Counter(zeros)), line["thrown_out"]
        counts.update(
            questions=1, kept=bool(line["row"]), samples=line["good"] + sum(thrown_out.values())
        )
        counts.update(thrown_out)
    (out / "rows.part").write_text(
        "".join(json.dumps(line["row"]) + "\n" for line in tried if line["row"])
    )
    os.replace(out / "rows.part", out / "rows.jsonl")
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    return summary


NAMED = (
    r"\bfirst\b",
    *(rf"\b{nth} (?:image|frame|view|picture|photo)\b" for nth in ("second", "third")),
)


def framed(e: Example) -> Example:
    """With the view that a rationale speaks of, as in the paper: the question's, else its first
    mark's."""
    if e.frame is not None or not several_views(e):
        return e
    named = (k for k, words in enumerate(NAMED) if re.search(words, e.question, re.I))
    k = next(named, e.regions[0][0] if e.regions else None)
    return (
        replace(e, frame=k) if e.objects and all(k in views for views in e.objects.values()) else e
    )


def questions(cfg: Config) -> list[Example]:
    """Those that can be taught: on path dtr, with objects and a view of them all."""
    if not (cfg.samples >= 1 and 1 <= cfg.words[0] <= cfg.words[1]):
        raise ValueError(
            f"--samples {cfg.samples} --words {cfg.words[0]} {cfg.words[1]}: "
            "at least 1, and least <= most"
        )
    asked = [framed(e) for e in data.load(cfg.data, cfg.skip_bad_rows) if e.path in ("lor", "dtr")]
    examples = [e for e in asked if taught(e, e.path)]
    if not examples:
        raise ValueError(
            f"{' '.join(cfg.data)}: no row on path lor or dtr"
            + " has objects in a view of them all" * bool(asked)
        )
    if len(examples) < len(asked):
        print(
            f"{len(asked) - len(examples)} dtr rows without objects, or a view of them all, are left out"
        )
    return examples[: cfg.limit]


def main(cfg: Config) -> dict:
    examples = questions(cfg)
    tried = begin(cfg)
    done = {(line["id"], line["path"]) for line in tried}
    todo = [e for e in examples if (e.id, e.path) not in done]
    kept = {same(line["row"]["rationale"]) for line in tried if line["row"]}
    sample, width = sampler(cfg) if todo else None, max(1, 128 // cfg.samples)
    with (
        open(cfg.out / "tried.jsonl", "a") as file,
        tqdm(total=len(todo), desc="cold start", unit="question") as bar,
    ):
        for asked in (todo[i : i + width] for i in range(0, len(todo), width)):
            for e, texts in zip(asked, sample(asked), strict=True):
                verdicts = [judge(text, e, cfg, kept) for text in texts]
                good = [
                    text for text, verdict in zip(texts, verdicts, strict=True) if verdict is None
                ]
                think = best([parse(text, e.path).think.strip() for text in good], e)
                kept |= {same(think)} if think else set()
                tried.append(
                    {
                        "id": e.id,
                        "path": e.path,
                        "good": len(good),
                        "thrown_out": Counter(filter(None, verdicts)),
                        "row": as_row(e, think, cfg.out) if think else None,
                    }
                )
                file.write(json.dumps(tried[-1]) + "\n")
            file.flush()
            bar.update(len(asked))
    summary = finish(tried, cfg.out)
    for path, counts in summary.items():
        print(f"{path}: " + ", ".join(f"{name} {count}" for name, count in counts.items()))
    return summary


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=__doc__.split("\n\n")[0]))
    # rows, files, checkpoint, settings: what a user can mend
    except (ValueError, OSError) as error:
        print(f"coldstart: {error}", file=sys.stderr)
        sys.exit(2)
