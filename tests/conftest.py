"""Fixtures of several files."""

import json

import pytest
from commands import finish, start

# Of two layers, with a tokenizer that is learnt from few rooms.
MAKE_TINY = """if True:
    import sys
    from pathlib import Path
    from model import tiny
    shape = tiny.tiny_shape("qwen3_vl")
    shape.scenes = 20
    shape.vocabulary = 1000
    shape.text["num_hidden_layers"] = 2
    tiny.write("qwen3_vl", Path(sys.argv[1]), shape=shape)"""


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """What is remembered of images goes with the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny_home(tmp_path_factory):
    """A folder with tiny/, a random checkpoint, and scenes/: rows.jsonl of both paths, and
    numbers.jsonl.

    In numbers.jsonl the answer is one number, asked for without reasoning (path direct). That is
    one token of the tiny model, so that even its random completions earn something now and then: RL
    without a stand-in for the reward.
    """
    home = tmp_path_factory.mktemp("tiny-home")
    scenes = home / "scenes"
    finish(
        start("-c", MAKE_TINY, home / "tiny"),
        start("-m", "data.scenes", "--out", scenes, "--n", 6, "--seed", 1, "--size", 128, 96),
    )
    rows = [json.loads(line) for line in (scenes / "rows.jsonl").read_text().splitlines()]
    depths = [
        row | {"path": "direct"} for row in rows if row["path"] == "lor" and row["task"] == "depth"
    ]
    (scenes / "numbers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in depths))
    return home
