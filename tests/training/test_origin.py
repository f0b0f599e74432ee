"""What a run and an evaluation say about when they were made, and by which commit."""

import json
import re
import subprocess

import train_rl
from training import folder, origin


def test_a_run_that_goes_on_is_as_old_as_it_was(tmp_path, monkeypatch):
    made = {"commit": "abc", "date": "2026-01-02 03:04 UTC"}
    monkeypatch.setattr(folder, "origin", lambda: made)
    config = train_rl.Config("m", ("d",), str(tmp_path))
    folder.write_config(config)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["script"] == "train_rl" and made.items() <= written.items()

    monkeypatch.setattr(folder, "origin", lambda: {"commit": "def", "date": "later"})
    config.resume = True
    folder.write_config(config)
    written = json.loads((tmp_path / "config.json").read_text())
    assert made.items() <= written.items()


def test_a_commit_is_that_of_this_code_alone(tmp_path, monkeypatch):
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", origin.origin()["date"])
    repository = tmp_path / "somebody"
    inside = repository / "code"
    inside.mkdir(parents=True)
    name = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "init", "-q", repository], check=True)
    commit = ["git", *name, "-C", repository, "commit", "-q", "--allow-empty", "-m", "one"]
    subprocess.run(commit, check=True)
    monkeypatch.setattr(origin, "ROOT", repository)
    assert re.fullmatch("[0-9a-f]{7,}", origin.commit())
    (repository / "file").write_text("1")
    subprocess.run(["git", "-C", repository, "add", "file"], check=True)
    assert origin.commit().endswith("-dirty")
    # A copy without a repository of its own.
    monkeypatch.setattr(origin, "ROOT", inside)
    assert origin.commit() is None
