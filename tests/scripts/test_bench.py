"""The kernels' bench: who runs out of memory is named, --judged repeats, one table for all
devices."""

import pytest
import torch

from bench import kernels as bench
from bench import train
from bench.table import table
from kernels.linear_logprob import linear_logprob
from model.qwen_vl import fused_linears


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(bench, "REPEATS", 1)
    monkeypatch.setattr(
        bench,
        "probes",
        lambda: (
            dict.fromkeys(("copy", "matmul"), lambda *_: torch.ones(9)),
            {"copy": 9.0, "matmul": 9.0},
        ),
    )


def test_who_runs_out_of_memory_is_left_out_and_named(quick, monkeypatch):
    def full(*inputs):
        raise torch.OutOfMemoryError("80 GB")

    contenders = {"ours": linear_logprob, "naive": full, "chunked": bench.chunked_logprob}
    case = bench.logprob_case(5, 4, 30, contenders, backward=True)
    monkeypatch.setitem(bench.CASES, "linear_logprob", lambda: [case])
    monkeypatch.setattr(bench, "apart", bench.alone)
    rows = {row["contender"]: row for row in bench.measure("linear_logprob", 0, case)}
    assert rows["naive"]["note"] == "out of memory" and "ms" not in rows["naive"]
    assert rows["ours"]["ms"] > 0 and rows["chunked"]["tflop_per_s"] > 0


def test_the_judged_case_alternates_runs_of_their_own(quick, monkeypatch):
    monkeypatch.setattr(bench, "JUDGED", (6, 4, 50))
    (case,), ran = bench.judged_cases(), []

    def apart(name, index, who):
        ran.append(who)
        return bench.alone(name, index, who)

    monkeypatch.setattr(bench, "apart", apart)
    rows = bench.measure("judged", 0, case)
    assert ran == ["ours", "naive"] * 2 and case.backward and case.flops == 8 * 6 * 4 * 50
    assert [row["contender"] for row in rows] == ["ours", "naive"] and all(
        row["ms"] > 0 for row in rows
    )


def report(cuda, **row):
    row = (
        dict(
            kernel="sample",
            shape="B=2",
            backward=False,
            contender="ours",
            ms=1.5,
            peak_mb=3.0,
            gb_per_s=8.0,
            percent_of_ceiling=80.0,
            ceiling="copy 10 GB/s",
        )
        | row
    )
    peer = {k: row[k] for k in ("kernel", "shape", "backward")}
    peer |= {"contender": "naive", "note": "out of memory"}
    return dict(
        device="one", cuda=cuda, dtype="torch.float32", versions={"torch": "2"}, rows=[row, peer]
    )


def test_one_table_says_what_no_gpu_has_run():
    text = table([report(False)])
    assert text.count("not measured") == len(bench.KERNELS)
    assert (
        "| `sample` B=2 | A | fwd | 1.5 / 3 | 8 GB/s, 80 % of copy 10 GB/s | out of memory |"
        in text
    )
    text = table([report(False), report(True, shape="B=256")])
    assert "| `sample` | a GPU |" not in text and "| `sample` B=256 | B | fwd |" in text
    assert text.count("not measured") == len(bench.KERNELS) - 1 and text.count("\n|---|") == 1


def test_the_model_of_a_true_shape_is_fused_as_the_product_s(tmp_path, monkeypatch):
    """bench.train makes it in place, not by way of a file, and bench.rollout takes it from
    there."""
    small = ("qwen3_vl", (128, 256, 2, 2, 1, 1500), (64, 128, 2, 2, 8))
    monkeypatch.setitem(train.SHAPES, "small", small)
    model, _ = train.load(train.Config("small"), str(tmp_path), torch.device("cpu"))
    assert model.decoder.sizes.vocab == 1500
    for layer in model.decoder.layers:
        attention = layer.self_attn
        assert fused_linears(attention.q_proj, attention.k_proj, attention.v_proj)
