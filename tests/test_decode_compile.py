"""Without a GPU: the decode kernels compile for sm_90 as shipped, with no spills, within shared memory."""

import os
import re

import pytest
from test_compile_gate import build, pointers

from kernels import attention

SPLIT = pointers("q k v lengths members out lse", "bf16 bf16 bf16 i64 i64 fp32 fp32") | dict(
    scale="fp32", first="i32", splits="i32", chunk="i32", k_row="i64", k_head="i32", v_row="i64",
    v_head="i32")


def split(heads, kv, n, rows):
    constants = dict(q_heads=heads, kv_heads=kv, N=n, D=128, WIDE=128, ROWS=rows, BLOCK=64, UPCAST=False)
    return SPLIT, constants | ({"members": None} if n == 1 else {})


KERNELS = {  # of the shapes of Qwen2.5-VL-3B and Qwen3-VL-8B
    "prefix-gqa8": (attention._split_kernel, *split(16, 2, 8, 64)),
    "prefix-gqa4": (attention._split_kernel, *split(32, 8, 8, 32)),
    "suffix": (attention._split_kernel, *split(32, 8, 1, 16)),
    "merge": (attention._merge_kernel, pointers("parts lse out", "fp32 fp32 bf16") | dict(splits="i32"),
              dict(D=128, WIDE=128, SPLITS=16)),
}  # fmt: skip


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted functions don't compile")
@pytest.mark.parametrize("name", KERNELS)
def test_compiles_for_sm90(name, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    ptx, report, shared = build(tmp_path, *KERNELS[name], dict(num_warps=4))
    assert re.search(r"\b0 bytes spill stores, 0 bytes spill loads", report), report
    assert shared <= 227 * 1024
    assert ("wgmma" in ptx) == (name == "prefix-gqa8")  # a tile of 64 rows
