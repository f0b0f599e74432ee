"""docs/metrics.md has every column that a run logs and that eval prints, and no other; the scripts
that write its ranges and the leaderboard's rows compute what they say."""

import json
import re

import pytest
from commands import ROOT, metrics

import eval as evaluation
import train_rl
import train_sft
from errors import UserError
from eval_table import COLUMNS, COUNTS
from runs import leaderboard, ranges
from srreal import REWARDS

PAGE = (ROOT / "docs" / "metrics.md").read_text()


def names_in(*titles: str) -> set[str]:
    """Return the names in the first cells of the tables of these sections."""
    names = set()
    for title in titles:
        section = PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]
        names |= set(re.findall(r"^\| `([^`]+)` \|", section, re.M))
    return names


@pytest.fixture(scope="module")
def runs(tiny_home, tmp_path_factory):
    """A folder with sft/ and rl/: a step of each, both paths, validated."""
    out = tmp_path_factory.mktemp("runs")
    data = (str(tiny_home / "scenes" / "rows.jsonl"),)
    common = dict(model=str(tiny_home / "tiny"), data=data, steps=1, eval_data=data)
    train_sft.main(train_sft.Config(**common, out=str(out / "sft"), batch=4))
    sizes = dict(prompts=2, group=2, max_new_tokens=2, filter="none", eval_limit=2)
    train_rl.main(train_rl.Config(**common | sizes, out=str(out / "rl")))
    return out


def test_every_column_of_sft_is_explained(runs):
    (row,) = metrics(runs / "sft")
    assert set(row) == names_in("Both scripts", "train_sft.py")


def test_every_column_of_rl_is_explained(runs):
    (row,) = metrics(runs / "rl")
    base = set()
    for column in row:
        column = re.sub("^val0?_", "", column)
        base.add(re.sub("^(lor|dtr)_", "", column))
    assert {"val_lor_accuracy", "val0_reward", "dtr_detect"} <= row.keys()
    explained = names_in("Both scripts", "train_rl.py")
    # A fork's own reward has a column, too, which its author knows.
    assert explained <= base <= explained | REWARDS.keys()


def test_every_column_of_evals_table_is_explained(tiny_home, tmp_path, capsys):
    evaluation.main(
        evaluation.Config(
            model=str(tiny_home / "tiny"),
            data=(str(tiny_home / "scenes" / "rows.jsonl"),),
            out=str(tmp_path / "eval"),
            path="lor",
            limit=1,
            max_new_tokens=2,
            again=0,
        )
    )
    lines = capsys.readouterr().out.splitlines()
    (heading,) = (line for line in lines if re.match(r"\s+n\s", line))
    printed = set(re.split(r"\s{2,}", heading.strip())) - {"n"}
    explained = names_in("eval.py")
    # Those of boxes are printed only where some are asked for.
    assert printed <= explained | REWARDS.keys()
    assert explained <= {*COLUMNS.values(), *COUNTS} <= explained | REWARDS.keys()


# ---- The ranges


def test_ranges_by_hand():
    rows = [{"loss": float(step), "kl": None, "x": 3.0} for step in range(1, 21)]
    start, end, low, high = ranges.range_of(rows, "loss")
    # A tenth of 20 steps is two; 5 % of the 19 gaps between 1 and 20 are .95.
    assert (start, end) == (1.5, 19.5)
    assert low == pytest.approx(1.95) and high == pytest.approx(19.05)
    assert ranges.range_of(rows, "kl") is None
    assert ranges.words((1.5, 19.5, 1.95, 19.05)) == "1.5 -> 19.5 (1.95 to 19.1)"
    assert ranges.words((3.0, 3.0, 3.0, 3.0)) == "3"
    assert [ranges.short(v) for v in (0, 12345.6, -0.5, 0.00012)] == [
        "0",
        "12,346",
        "-0.5",
        "1.2e-04",
    ]


TABLE = """# Title

<!-- ranges -->
old
<!-- end of ranges -->

## Both scripts

| column | what | seen | else |
|---|---|---|---|
| `loss` | the \\| of it | old | stays |
| `seconds` | time | | stays |

## train_rl.py

| column | what | seen | else |
|---|---|---|---|
| `kl` | what it is | | stays |
| `gone` | | | |

## eval.py

| column | what | seen |
|---|---|---|
| `head m` | metres | |
| `truncated` | cut | |
"""


def test_ranges_are_written_into_the_cells_seen():
    sft = [{"step": 1, "loss": 2.0, "seconds": 1.0}]
    rl = [
        {"step": 1, "loss": 0.5, "lor_reward": 0.0, "dtr_reward": 0.0, "lor_kl": 0.1, "dtr_kl": 0}
    ]
    summary = {"results": {"lor": {"all": {"head_errors": {"value": 0.25}, "truncated": 3}}}}
    page = ranges.fill(TABLE, {"SFT": sft, "RL": rl}, summary, "a run")
    wanted = (
        TABLE.replace("old\n<", "a run\n<")
        .replace("| old |", "| SFT 2, RL 0.5 |")
        .replace("| what it is | |", "| what it is | dtr 0; lor 0.1 |")
        .replace("| metres | |", "| metres | lor 0.25 |")
        .replace("| cut | |", "| cut | lor 3 |")
    )
    assert page == wanted
    # Written twice it is the same.
    assert ranges.fill(page, {"SFT": sft, "RL": rl}, summary, "a run") == page


def test_one_run_is_printed_and_what_is_no_run_ends_in_one_line(runs, tmp_path, capsys):
    ranges.main(ranges.Config(runs / "rl"))
    said = capsys.readouterr().out
    assert "| rl | start | end | 5 % | 95 % |" in said and "| lor_detect | null |" in said
    with pytest.raises(UserError, match="--write takes a speedrun's folder"):
        ranges.main(ranges.Config(runs / "rl", write=True))
    with pytest.raises(UserError, match="metrics.jsonl can't be read"):
        ranges.main(ranges.Config(tmp_path))
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(UserError, match="no step yet"):
        ranges.main(ranges.Config(tmp_path))


# ---- The leaderboard


def fake_run(folder, seconds: float, lor: float, n: int = 1022):
    for stage, steps in (("worked", 2), ("sft", 1), ("rl", 1)):
        (folder / stage).mkdir(parents=True)
        rows = [json.dumps({"step": i + 1, "seconds": seconds}) for i in range(steps)]
        (folder / stage / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    (folder / "eval-rl").mkdir()
    results = {}
    for path, accuracy in (("lor", lor), ("dtr", 0.9)):
        results[path] = {"all": {"accuracy": {"value": accuracy}, "n": n}}
    (folder / "eval-rl" / "summary.json").write_text(json.dumps({"results": results}))
    return folder


def test_a_row_of_three_seeds_and_what_others_lack(tmp_path, capsys):
    good = [fake_run(tmp_path / str(s), s, 0.86 + s / 10000) for s in (60, 120, 600)]
    leaderboard.main(leaderboard.Config(tuple(good)))
    said = capsys.readouterr().out
    # Of 4, 8 and 40 minutes the median; of 86.6, 87.2 and 92.0, too.
    assert said == "| 8.0 min (SFT 6.0, RL 2.0) | | 87.2 | 90.0 | 3 | | |\n"
    low = fake_run(tmp_path / "low", 60, 0.849)
    few = fake_run(tmp_path / "few", 60, 0.9, n=100)
    leaderboard.main(leaderboard.Config((low, few)))
    said = capsys.readouterr().out
    assert "84.9 on lor, not 85" in said and "100 questions on dtr, not 1022" in said
    assert "2 of 3 seeds" in said
    with pytest.raises(UserError, match="summary.json"):
        leaderboard.main(leaderboard.Config((tmp_path / "none",)))
