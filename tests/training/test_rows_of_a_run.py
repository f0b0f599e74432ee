"""The rows of a run: --data given twice, bad rows in a file beside it, rows of text alone."""

import base64
import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import tyro
from commands import TIMEOUT, start

import data
import train_sft
from flags import join_repeated
from model.processor import Processor
from srreal import Example
from training import run


@dataclass
class Config:
    data: tuple[str, ...]  # sources
    eval_data: tuple[str, ...] = ()  # sources
    size: tuple[int, int] = (1, 2)  # two
    out: str = "out"  # folder
    steps: int = 3  # how many


@pytest.mark.parametrize(
    "line, wanted",
    [
        ("--data A --data B", {"data": ("A", "B")}),
        ("--data A B --steps 4 --data C", {"data": ("A", "B", "C"), "steps": 4}),
        ("--data=A --eval-data X --data B", {"data": ("A", "B"), "eval_data": ("X",)}),
        ("--data A --eval-data X --eval_data Y Z", {"eval_data": ("X", "Y", "Z")}),
        ("--data A A --size 3 4", {"data": ("A", "A"), "size": (3, 4)}),
        ("--data A --steps 4 --steps 5", {"data": ("A",), "steps": 5}),
        ("--data A,weight=2 --data B", {"data": ("A,weight=2", "B")}),
    ],
)
def test_a_flag_of_several_values_may_be_given_twice(line, wanted):
    taken = tyro.cli(Config, args=join_repeated(line.split(), Config))
    assert {name: getattr(taken, name) for name in wanted} == wanted


def test_other_arguments_stay_as_they_are():
    for line in ("--help", "--steps 4 --out x", "-h", "--steps -1", ""):
        assert join_repeated(line.split(), Config) == line.split()


def bad_rows(folder: Path, count: int) -> Path:
    folder.mkdir(exist_ok=True)
    file = folder / "bad.jsonl"
    file.write_text("{torn\n" * count)
    return file


def test_the_whole_list_of_bad_rows_lies_beside_the_run(tmp_path, tiny_home):
    good = tiny_home / "scenes" / "numbers.jsonl"
    command = ("train_sft.py", "--model", tiny_home / "tiny", "--steps", 1)
    several = ("--data", bad_rows(tmp_path / "many", 1000), "--data", good)
    ended = start(*command, *several, "--out", tmp_path / "out")
    few = start(*command, "--data", bad_rows(tmp_path / "few", 2), "--out", tmp_path / "none")
    said = ended.communicate(timeout=TIMEOUT)[0]
    assert ended.returncode == 2 and len(said.splitlines()) < 12
    assert "1000 x row: unreadable" in said and "--skip-bad-rows" in said
    assert f"the whole list is in {tmp_path}/out/bad_rows.txt" in said
    assert len((tmp_path / "out" / "bad_rows.txt").read_text().splitlines()) == 1000
    assert "2 rows cannot be used" in few.communicate(timeout=TIMEOUT)[0]
    assert few.returncode == 2 and not (tmp_path / "none").exists()  # all of it was said


def test_skipped_rows_of_both_flags_are_listed(tmp_path, capsys, tiny_home):
    good = str(tiny_home / "scenes" / "numbers.jsonl")
    torn = bad_rows(tmp_path, 5)
    cfg = SimpleNamespace(data=[good, str(torn)], eval_data=[good], skip_bad_rows=True)
    cfg.out = str(tmp_path / "out")
    training, validation = run.load_data(cfg)
    assert len(training) == len(validation) > 0
    said = capsys.readouterr().out
    assert "skipped 5 of" in said and f"the whole list is in {cfg.out}/bad_rows.txt" in said
    cfg.eval_data = [str(torn)]
    with pytest.raises(data.BadRows):  # nothing is left to validate on
        run.load_data(cfg)


def test_rows_without_a_rationale_are_one_message_that_says_what_makes_them(tmp_path, tiny_home):
    lines = [json.loads(line) for line in (tiny_home / "scenes" / "rows.jsonl").open()]
    for line in lines:
        line.pop("rationale")
    file = tiny_home / "scenes" / "bare.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(data.BadRows) as error:
        data.load([file], more=train_sft.why_not_trainable)
    said = str(error.value).splitlines()
    assert said[0] == f"{len(lines)} rows cannot be used:" and len(said) < 8
    assert f"{len(lines)} x target: no rationale to learn" in said[1]
    assert "python -m data.coldstart" in str(error.value)


def test_one_batch_of_rows_with_and_without_images(tmp_path, tiny_home):
    """A row of text alone gives the same, whatever is packed beside it."""
    scene = data.load([tiny_home / "scenes"])[:3]
    text = [Example(f"t{k}", "direct", [], f"Say {k}.", str(k)) for k in range(3)]
    processor = Processor.from_pretrained(tiny_home / "tiny")
    from model.qwen_vl import QwenVL

    model = QwenVL.from_pretrained(tiny_home / "tiny", "cpu", torch.float32).eval()
    mixed = [scene[0], text[0], text[1], scene[1], scene[2], text[2]]
    with torch.no_grad():
        alone = []
        for example in mixed:
            target = processor.target_ids(example)
            alone.append(model(processor([example], [[target]])).logprob)
        targets = [[processor.target_ids(example)] for example in mixed]
        together = model(processor(mixed, targets)).logprob
    assert torch.allclose(torch.cat(alone), together, atol=1e-4)


def test_sft_on_rows_with_and_without_images(tmp_path, tiny_home):
    rows = [json.loads(line) for line in (tiny_home / "scenes" / "rows.jsonl").open()][:4]
    image = (tiny_home / "scenes" / rows[0]["images"][0]).read_bytes()
    uri = f"data:image/png;base64,{base64.b64encode(image).decode()}"
    said = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    seen = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A room."}]
    chats = [{"conversations": said}] * 3 + [{"image": uri, "conversations": seen}]
    (tmp_path / "chat.json").write_text(json.dumps(chats))
    train_sft.main(
        train_sft.Config(
            str(tiny_home / "tiny"),
            (str(tiny_home / "scenes"), f"{tmp_path / 'chat.json'},weight=4"),
            str(tmp_path / "run"),
            steps=3,
            batch=8,
            max_pixels=56 * 56,
        )
    )
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert len(metrics) == 3 and all(0 < row["loss"] < 100 for row in metrics)
