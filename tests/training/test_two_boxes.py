"""Two boxes: `torchrun --nnodes 2` trains as one process does.

Two agents of torchrun on this machine stand in for the boxes, over gloo. They share a disk, as two
boxes have to.
"""

import socket

import pytest
from commands import finish, flags, metrics, start

# (script, its flags, ranks of a box)
RUNS = {
    # Replicas: each rank has the whole model.
    "rl": ("train_rl.py", dict(data="numbers.jsonl", prompts=4, group=16, max_new_tokens=1), 1),
    # A mesh of 2 x 2: shards within a box, replicas across.
    "sft, sharded": ("train_sft.py", dict(data="rows.jsonl", batch=6, warmup=0, shard="always"), 2),
}


def two_boxes(ranks: int, *command) -> list:
    """Start `torchrun --nnodes 2 --nproc_per_node RANKS COMMAND` on each of two boxes."""
    with socket.socket() as probe:  # a port that was free a moment ago
        probe.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{probe.getsockname()[1]}"
    agent = dict(nnodes=2, nproc_per_node=ranks, rdzv_backend="c10d", rdzv_endpoint=place)
    agent["local_addr"] = "127.0.0.1"
    return [start("-m", "torch.distributed.run", *flags(agent), *command) for _ in range(2)]


@pytest.mark.parametrize("name", RUNS)
def test_two_boxes_equal_one_process(name, tiny_home, tmp_path):
    script, options, ranks = RUNS[name]
    # Of two steps: the second one's numbers come from what all boxes have learnt in the first.
    options = options | dict(model=tiny_home / "tiny", steps=2, lr=1e-4, save_every=2)
    options["data"] = tiny_home / "scenes" / options["data"]
    finish(
        start(script, *flags(options | dict(out=tmp_path / "one"))),
        *two_boxes(ranks, script, *flags(options | dict(out=tmp_path / "two"))),
    )
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert len(one) == len(two) == 2  # the first rank of the first box writes, nobody else
    for wanted, found in zip(one, two, strict=True):
        assert wanted["grad_norm"] > 0, "no completion earned anything: take another --seed"
        assert found["tokens"] == wanted["tokens"]
        # Seen: 4e-8 in the loss (RL's is a sum that cancels), 2e-7 of the norm.
        assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-6, abs=1e-6)
        assert found["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-5)
