"""docs/one_step.md is what `python -m learn.one_step` writes, and its numbers add up."""

import math
import re
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from statistics import fmean, stdev

import numpy as np
import pytest
from commands import ROOT
from pages import differences, glossary, words_in_italics
from PIL import Image

from learn import one_step
from srreal import score

PAGE = ROOT / "docs" / "one_step.md"


@pytest.fixture(scope="module")
def taken(tmp_path_factory):
    """(what the template is filled with, the picture), computed in a process of its own.

    As `make docs` does: what other tests have set in this one must not show on the page.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(one_step.compute, tmp_path_factory.mktemp("room")).result()


def test_the_completions_are_the_checkpoints_own(taken):
    values, _ = taken
    gap = values["metrics"]["mismatch_max"]
    assert gap < 1e-3, "the checkpoint is another: python -m learn.one_step --sample"


def test_the_page_is_what_the_script_writes(taken):
    values, picture = taken
    found = differences(one_step.render(values), PAGE.read_text())
    assert not found, "\n".join(["make docs writes the page again", *found[:5]])
    committed = Image.open(one_step.PICTURE).convert("RGB")
    assert committed.size == picture.size
    difference = np.asarray(picture).astype(int) - np.asarray(committed)
    assert np.abs(difference).mean() < 1


def test_advantages_and_loss_by_hand(taken):
    values, _ = taken
    completions = values["completions"]
    totals = [score(c["text"], values["example"]).total for c in completions]
    advantages = [(total - fmean(totals)) / (stdev(totals) + 1e-6) for total in totals]
    assert [c["advantage"] for c in completions] == pytest.approx(advantages, abs=1e-9)
    # All ratios are 1 and the KL is 0: each token's loss is -A.
    tokens = [c["tokens"] for c in completions]
    loss = -sum(a * n for a, n in zip(advantages, tokens, strict=True)) / sum(tokens)
    assert values["loss"] == pytest.approx(loss, abs=1e-4)
    best = max(advantages)
    for row in values["best_tokens"]:
        assert row["loss"] == pytest.approx(-best, abs=1e-3)
        # A > 0: of the clip only the upper end can bind. The reference is the policy before.
        ratio = row["ratio"]
        surrogate = -row["weight"] * min(ratio, 1.3) * best
        k3 = 1 / ratio + math.log(ratio) - 1
        assert row["next_loss"] == pytest.approx(surrogate + values["cfg"].kl * k3, abs=1e-4)


def test_the_step_raises_what_was_better_than_the_group(taken):
    values, _ = taken
    gain = sum(c["advantage"] * (c["after"] - c["before"]) for c in values["completions"])
    assert gain > 0
    assert values["second"]["kl"] > values["metrics"]["kl"] == 0
    assert 0 < values["norms"]["rms"] <= 1.05 * values["lr"] * values["cfg"].vector_rate


def test_regions_are_weighed_by_area(taken):
    values, _ = taken
    for region in values["regions"]:
        weights = np.array(region["weights"])
        assert weights.sum() == pytest.approx(1)
        x0, y0, x1, y1 = region["box"]
        width, height = values["size"]
        rows, columns = values["grid"]
        # The share of the box that lies in each column and in each row of patches.
        across = overlaps(x0, x1, width / columns, columns) / (x1 - x0)
        down = overlaps(y0, y1, height / rows, rows) / (y1 - y0)
        # The page shows the patches that the box touches.
        expected = np.outer(down, across)[np.ix_(region["rows"], region["columns"])]
        assert weights == pytest.approx(expected, abs=1e-6)


def overlaps(low, high, size, count):
    """How much of [low, high] lies in each of `count` cells of a size, from 0 on."""
    starts = np.arange(count) * size
    return np.clip(np.minimum(high, starts + size) - np.maximum(low, starts), 0, None)


def test_what_it_says_to_read_is_there():
    lines = re.findall(r"^\*Read: (.*)\*$", one_step.TEMPLATE.read_text(), re.M)
    assert len(lines) == 11
    for line in lines:
        waiting = []
        for name in re.findall(r"`([^`]+)`", line):
            if not name.endswith(".py"):
                waiting.append(name)
                continue
            text = (ROOT / name).read_text()
            for wanted in waiting:
                defined = rf"^\s*(def|class) {wanted.split('.')[-1]}\b|^{wanted} = "
                assert re.search(defined, text, re.M), f"{wanted} in {name}"
            waiting = []


def test_a_changed_page_is_noticed():
    committed = "| 0 | 1.7 | yes | -0.471 |\nloss +0.0829, 775 tokens\n"
    assert not differences("| 0 | 1.7 | yes |  -0.472 |\nloss +0.0831, 775 tokens\n", committed)
    for other in (
        committed.replace("yes", "no"),
        committed.replace("775", "776"),
        committed.replace("0.471", "0.478"),
        committed.replace("+0.0829", "+0.0839"),
        committed + "more\n",
    ):
        assert differences(other, committed)


@pytest.mark.parametrize("page", ["one_step.md", "metrics.md", "leaderboard.md"])
def test_words_in_italics_are_in_the_glossary(page):
    words = words_in_italics((ROOT / "docs" / page).read_text())
    assert words and words <= glossary(), words - glossary()
