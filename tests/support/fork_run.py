"""Train and evaluate inside of a fork: started by test_fork.py in the root of a changed copy.

    python tests/support/fork_run.py HOME OUT PATH [FLAG VALUE]...

One RL step on rows of HOME/scenes, put on that path, and an eval of them with --path PATH. The
further flags are train_rl.py's. OUT gets rl/ and eval/.
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, os.getcwd())  # the fork, not the tree that this file was started from

import tyro  # noqa: E402

import eval as evaluation  # noqa: E402
import train_rl  # noqa: E402

SIZES = ["--max-new-tokens", "4", "--seed", "0"]


def main(home: Path, out: Path, path: str, flags: list[str]) -> None:
    rows = []
    for line in (home / "scenes" / "rows.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["path"] == "lor":
            rows.append(json.dumps(row | {"path": path}))
    # Its paths are relative to the file.
    data = home / "scenes" / f"{path}-{out.name}.jsonl"
    data.write_text("\n".join(rows[:4]) + "\n")

    common = ["--model", str(home / "tiny"), "--data", str(data), *SIZES]
    train = ["--steps", "1", "--prompts", "2", "--group", "2", "--out", str(out / "rl")]
    train_rl.main(tyro.cli(train_rl.Config, args=[*common, *train, *flags]))
    ask = ["--path", path, "--limit", "2", "--again", "0", "--out", str(out / "eval")]
    evaluation.main(tyro.cli(evaluation.Config, args=[*common, *ask]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4:])
