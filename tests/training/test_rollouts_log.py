"""rollouts.jsonl: what the policy wrote, step by step, and what each completion earned."""

import json
from pathlib import Path

import pytest

import train_rl
from srreal import REWARDS, score

KEYS = {
    *("step", "group", "sample", "id", "path", "question", "truth", "text", "tokens", "logprobs"),
    *("parts", "total", "advantage", "kept", "finished"),
}


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def train(home, out, **flags):
    defaults = dict(prompts=4, group=3, max_new_tokens=4, filter="none", save_every=1, lr=1e-3)
    data = (str(home / "scenes" / "rows.jsonl"),)
    train_rl.main(train_rl.Config(str(home / "tiny"), data, str(out), **defaults | flags))


def test_the_first_groups_of_each_path_are_kept_whole(tiny_home, tmp_path):
    train(tiny_home, tmp_path / "run", steps=2)
    rows = lines(tmp_path / "run" / "rollouts.jsonl")
    keys = [(row["step"], row["path"], row["group"], row["sample"]) for row in rows]
    wanted = [(s, p, 0, i) for s in (1, 2) for p in ("dtr", "lor") for i in range(3)]
    assert keys == wanted
    truths = {}
    for line in (tiny_home / "scenes" / "rows.jsonl").read_text().splitlines():
        row = json.loads(line)
        truths[row["id"]] = row["answer"]
    for row in rows:
        assert row.keys() == KEYS and row["parts"].keys() == REWARDS.keys()
        assert len(row["tokens"]) == len(row["logprobs"]) <= 4 and row["kept"]
        assert row["truth"] == truths[row["id"]] and row["text"] != ""
        assert all(logprob <= 0 for logprob in row["logprobs"])
    for start in range(0, len(rows), 3):
        group = rows[start : start + 3]
        assert sum(row["advantage"] for row in group) == pytest.approx(0, abs=1e-9)


def test_resume_drops_later_rows_and_0_writes_none(tiny_home, tmp_path):
    out = tmp_path / "run"
    train(tiny_home, out, steps=2, log_groups=2)
    before = lines(out / "rollouts.jsonl")
    assert {row["group"] for row in before} == {0, 1} and len(before) == 2 * 2 * 2 * 3
    with (out / "rollouts.jsonl").open("a") as file:
        file.write(json.dumps(before[0] | {"step": 3}) + "\n" + '{"step": 4, "te')
    train(tiny_home, out, steps=3, log_groups=2, resume=True)
    after = lines(out / "rollouts.jsonl")
    assert after[: len(before)] == before and {row["step"] for row in after} == {1, 2, 3}
    train(tiny_home, tmp_path / "none", steps=1, log_groups=0)
    assert not (tmp_path / "none" / "rollouts.jsonl").exists()


def test_parts_are_the_scores(tiny_home, tmp_path, monkeypatch):
    """A policy that writes well-formed text: its parts, total and advantage are those of `score`."""
    texts = iter(["<think>a</think><answer>A</answer>", "<think>a</think><answer>B</answer>"] * 99)
    real = score

    def other_text(text, example, rules):
        return real(next(texts), example, rules)

    monkeypatch.setattr(train_rl, "score", other_text)
    train(tiny_home, tmp_path / "run", steps=1, group=4)
    rows = [row for row in lines(tmp_path / "run" / "rollouts.jsonl") if row["path"] == "lor"]
    assert {row["parts"]["format"] for row in rows} == {1.0}
    for row in rows:
        assert row["total"] == pytest.approx(0.8 * row["parts"]["accuracy"] + 0.2)
