"""runs/claims.sh with a stand-in for every command, and the tables that it makes of their files."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from errors import UserError
from runs import claims

ROOT = Path(__file__).parents[2]

# Answers for `python`: renders nothing, trains nothing, and writes what the real one would, small.
# Of four questions a path, as many are right as the name of the eval says.
STAND_IN = """#!{python}
import json, os, sys
from pathlib import Path
words = sys.argv[1:]
if words[:2] in (["-m", "runs.claims"], ["-c", words[1]]) or words[0] == "report.py":
    os.execv("{python}", ["{python}", *words] if words[0] != "report.py" else ["{python}", "-c", ""])
out = Path(words[words.index("--out") + 1])
out.mkdir(parents=True, exist_ok=True)
with open("{log}", "a") as log:
    log.write(" ".join(words) + "\\n")
if "data.scenes" in words:
    (out / "rows.jsonl").write_text("")
elif "model.tiny" in words:
    (out / "spatial.safetensors").write_text("")
elif "eval.py" in words:
    right = 3 if "rl" in out.name.replace("eval", "") else 1
    rows = []
    for path in ("lor", "dtr"):
        for i in range(4):
            good = float(i < right)
            rows.append(dict(id=f"q{{i}}-{{path}}", question_id=f"q{{i}}", path=path, cluster=f"{{out.parent}}/q{{i}}.png",
                task="depth", accuracy=good, format=1.0, total=good, detect=good if path == "dtr" else None,
                text_errors={{"a": 0.1 * (i + 1)}} if path == "dtr" else {{}}, text="<think>a</think><answer>B</answer>",
                truth="A"))
    (out / "predictions.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
    (out / "summary.json").write_text("{{}}")
else:
    (out / "metrics.jsonl").write_text("".join(json.dumps(dict(reward=step / 100)) + "\\n" for step in range(40)))
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """All folders of runs/claims.sh for two seeds, and the commands that it gave."""
    folder = tmp_path_factory.mktemp("claims")
    python = folder / "python"
    log = folder / "log"
    python.write_text(STAND_IN.format(python=sys.executable, log=log))
    python.chmod(0o755)
    environment = os.environ | {"PYTHON": str(python), "OUT": str(folder / "out"), "SEEDS": "0 1"}
    environment |= {"RANKS": "1"}
    # Its last command, which reads the (empty) questions, is left to the tests.
    subprocess.run(["sh", "runs/claims.sh"], cwd=ROOT, env=environment, capture_output=True)
    return folder / "out", log.read_text().splitlines()


def test_every_claim_finds_its_runs(made, monkeypatch, capsys):
    folder, _ = made
    # The one claim that reads the questions themselves.
    monkeypatch.setattr(claims, "official_total", lambda row, examples: 0.5)
    monkeypatch.setattr(claims.Seeds, "examples", lambda self: {})
    claims.write(folder, None)
    text = capsys.readouterr().out
    assert [line[4:] for line in text.splitlines() if line.startswith("### ")] == list(
        claims.CLAIMS
    )
    assert "Not measured yet" not in text
    # 1 of 4 right before, 3 of 4 after: half of the questions change, in both seeds.
    line = next(line for line in text.splitlines() if line.startswith("| **LOR**"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[:4] == ["**LOR**", "8", "25.0", "75.0"] and cells[5] == "+50.0, +50.0"
    # Four clusters of two equal answers each: sqrt(4 / 3 * 4 * 1^2) / 8.
    assert cells[4] == f"+50.0 ± {100 * (4 / 3 * 4) ** 0.5 / 8:.1f}"
    assert re.search(r"\| 0 \| 0\.250 ± ", text)
    assert "| LOR alone | 25.0 -> 75.0 | 75.0, 75.0 | " in text
    taken_away = [line for line in text.splitlines() if line.startswith("| the 3D head's loss | ")]
    assert len(taken_away) == 1 and taken_away[0].count("| +0.0 ± 0.0 | +0.0, +0.0 |") == 2


def test_every_seed_has_its_own_scenes_and_the_same_test(made):
    _, commands = made
    scenes = [line for line in commands if "data.scenes" in line]
    seeds = {}
    for line in scenes:
        name = re.search(r"scenes/(\S+)", line)[1]
        seeds.setdefault(name, set()).add(int(re.search(r"--seed (\d+)", line)[1]))
    assert seeds["test"] == {3000} and seeds["loft"] == {4000}
    assert seeds["train"] == {1000, 11000} == seeds["train-flat"]
    own = [seeds[name] for name in ("told", "train", "mixed", "rl", "test", "loft")]
    assert len(set.union(*own)) == sum(map(len, own))


def test_one_path_gets_as_many_rollouts_alone(made):
    _, commands = made
    prompts = {}
    for line in commands:
        if "train_rl.py" in line:
            name = re.search(r"seed-0/(\S+)", line[line.index("--out") :])
            prompts[name and name[1]] = int(re.search(r"--prompts (\d+)", line)[1])
    assert prompts["rl"] == 16 and prompts["rl-lor-only"] == prompts["rl-dtr-only"] == 8


def test_boxes_in_words_are_asked_as_they_were_trained(made):
    """A checkpoint of --regions text refuses to be asked about region tokens."""
    _, commands = made
    of_text = [line for line in commands if "/text-" in line]
    assert len(of_text) == 2 * 5 and all("--regions text" in line for line in of_text)
    assert not any("--regions" in line for line in commands if line not in of_text)


def test_a_seed_without_its_run_before_is_left_out():
    def row(seed, right):
        name = f"seed-{seed} q"
        return dict(id=name, path="lor", cluster="q", task="depth", accuracy=float(right))

    before, after = [[row(1, 0)]], [[row(0, 1)], [row(1, 1)]]
    assert claims.gains_by_seed(before, after, "lor") == "+100.0"


def test_what_is_missing_is_named(tmp_path, capsys):
    with pytest.raises(UserError, match="no folder seed-0"):
        claims.write(tmp_path, None)
    (tmp_path / "seed-0").mkdir()
    claims.write(tmp_path, None)
    said = capsys.readouterr().out
    assert said.startswith("Not measured yet") and all(name in said for name in claims.CLAIMS)


def test_the_page_keeps_what_stands_around_the_tables(tmp_path):
    (tmp_path / "seed-0").mkdir()
    page = tmp_path / "page.md"
    page.write_text(f"before\n{claims.BEGIN}\n(an older table)\n{claims.END}\nafter\n")
    claims.write(tmp_path, page)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "older" not in text
    page.write_text("no marks")
    with pytest.raises(UserError, match="it has no lines"):
        claims.write(tmp_path, page)
    assert page.read_text() == "no marks"
