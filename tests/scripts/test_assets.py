"""The checkpoint that the repository brings: what it weighs, that it answers, and `make rl`'s gain."""

import json
import subprocess
from pathlib import Path

import pytest
import warm
from commands import QUIET

from errors import UserError
from runs import gain

ROOT = Path(__file__).parents[2]
ASSETS = ROOT / "assets"


def test_it_is_small_and_has_a_card():
    size = sum(file.stat().st_size for file in (ASSETS / "tiny").iterdir())
    assert size < 4e6
    card = (ASSETS / "README.md").read_text()
    assert "commit" in card and "seed" in card and "MIT" in card
    for script in ASSETS.glob("*.sh"):
        assert script.name in card


@pytest.mark.parametrize("room", ["room-1", "room-2", "room-3"])
def test_every_room_can_be_asked_about(room, tmp_path):
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": warm.python(), "OUT": str(tmp_path)} | QUIET
    command = ["sh", f"assets/{room}.sh", "--max-new-tokens", "200"]
    made = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    asked = json.loads((tmp_path / "ask.json").read_text())
    assert [answer["path"] for answer in asked["answers"]] == ["lor", "dtr"]
    lor, dtr = asked["answers"]
    assert lor["finished"] and dtr["finished"] and lor["answer"] and dtr["answer"]
    # It places what the question names, within a metre or so of the camera's view.
    assert len(dtr["boxes"]) == asked["question"].count("<mask>")
    # Depth and camera were given, so nothing had to be assumed.
    assert asked["assumed"] == []


def answers(folder, totals):
    """Write a finished eval: path -> the total of each question, two questions an image."""
    folder.mkdir()
    rows = []
    for path, values in totals.items():
        for i, total in enumerate(values):
            row = {"id": f"q{i}", "path": path, "cluster": f"image {i // 2}", "total": total}
            rows.append(json.dumps(row) + "\n")
    (folder / "predictions.jsonl").write_text("".join(rows))
    (folder / "summary.json").write_text("{}")
    return folder


def test_a_gain_is_paired_and_clustered(tmp_path, capsys):
    before = answers(tmp_path / "before", {"lor": [0, 0, 1, 1], "dtr": [0.5, 0.5, 0.5, 0.5]})
    after = answers(tmp_path / "after", {"lor": [1, 1, 1, 1], "dtr": [0.5, 0.6, 0.5, 0.6]})
    gain.main(gain.Config(before, after))
    # Two images: +1 and 0 on LOR. Residuals sum to +1 and -1: sqrt(2 * 2 / 1) / 4.
    assert capsys.readouterr().out == "LOR +50.0 ± 50.0\nDTR +5.0 ± 0.0\n"


def test_a_gain_of_other_questions_is_one_line(tmp_path):
    before = answers(tmp_path / "before", {"lor": [0, 1]})
    with pytest.raises(UserError, match="there is no finished eval"):
        gain.main(gain.Config(before, tmp_path / "none"))
    after = answers(tmp_path / "after", {"dtr": [0, 1]})
    with pytest.raises(UserError, match="answers no question of .* on path lor"):
        gain.main(gain.Config(before, after))
