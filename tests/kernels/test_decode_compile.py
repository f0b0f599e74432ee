"""Without a GPU: the decode kernels compile for sm_90 as shipped, with no spills, within shared
memory."""

import re

import pytest
from compiling import build, in_fp64, not_interpreted, pointers

from kernels import decode_attention as attention

STRIDES = dict(scale="fp32", chunk="i32", row_stride="i32:16", head_stride="i32:16")
PREFIX = pointers("q k v lengths members out lse", "bf16 bf16 bf16 i64 i64 fp32 fp32") | STRIDES
SUFFIX = STRIDES | pointers(
    "q k v lengths members member_index prefix_out prefix_lse",
    "bf16 bf16 bf16 i64 i64 i64 fp32 fp32",
)


def sizes(heads, kv, rows, width=128):
    return dict(q_heads=heads, kv_heads=kv, D=width, WIDE=width, ROWS=rows, BLOCK=64, UPCAST=False)


def prefix(heads, kv, rows, n=8, width=128):
    return attention._prefix_kernel, PREFIX, sizes(heads, kv, rows, width) | dict(N=n)


def suffix(heads, kv, splits, prefix_splits=8, width=128):
    """With one split it writes the result itself, in bf16."""
    constants = sizes(heads, kv, 16, width) | dict(PREFIX_SPLITS=prefix_splits)
    if splits == 1:
        signature = SUFFIX | pointers("out", "bf16")
        return attention._suffix_kernel, signature, constants | dict(lse=None)
    return attention._suffix_kernel, SUFFIX | pointers("out lse", "fp32 fp32"), constants


HEADS = {"gqa8": (16, 2), "gqa7": (28, 4), "gqa4": (32, 8)}  # Qwen2.5-VL-3B, 7B, Qwen3-VL-8B
ROWS = {"gqa8": 64, "gqa7": 64, "gqa4": 32}  # queries of a prompt's 8 samples
KERNELS = {
    **{f"prefix-{gqa}": prefix(*heads, ROWS[gqa]) for gqa, heads in HEADS.items()},
    **{f"suffix-{gqa}": suffix(*heads, splits=1) for gqa, heads in HEADS.items()},
    "suffix-gqa7-split": suffix(28, 4, splits=4),
    "suffix-gqa8-most-parts": suffix(16, 2, splits=1, prefix_splits=attention.MAX_SPLITS),
    # Qwen3.5: 0.8B and 2B, 4B and 9B, 27B. Heads of 256.
    "prefix-gqa4-256": prefix(8, 2, 32, width=256),
    "prefix-gqa6-256": prefix(24, 4, 32, width=256),
    "suffix-gqa4-256": suffix(16, 4, splits=1, width=256),
    "suffix-gqa6-256": suffix(24, 4, splits=4, width=256),
    "merge": (
        attention._merge_kernel,
        pointers("parts lse out", "fp32 fp32 bf16") | dict(splits="i32"),
        dict(D=128, WIDE=128, SPLITS=8),
    ),
}


@not_interpreted
@pytest.mark.parametrize("name", KERNELS)
def test_compiles_for_sm90(name, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    ptx, report, shared = build(tmp_path, *KERNELS[name], dict(num_warps=4))
    assert re.search(r"\b0 bytes spill stores, 0 bytes spill loads", report), report
    assert shared <= 227 * 1024
    assert not in_fp64(ptx)
    assert ("wgmma" in ptx) == (name in ("prefix-gqa8", "prefix-gqa7"))  # tiles of 64 rows
    print(name, *re.findall(r"Used \d+ registers", report), f"{shared} bytes shared")


@pytest.mark.parametrize(
    "slots, n, kv_heads, length, splits, programs",
    [
        # A prompt's keys: cut by its 8 samples' key-value heads.
        (16, 8, 2, 896, 7, 28),  # no split under 128 keys: 2 prompts are few bytes
        (16, 8, 8, 896, 7, 112),
        (64, 8, 2, 896, 7, 112),
        (64, 8, 2, 1024, 8, 128),
        (64, 8, 4, 1024, 4, 128),
        (64, 8, 8, 1024, 2, 128),
        (256, 8, 2, 1024, 2, 128),
        (256, 8, 8, 1024, 1, 256),
        (8, 8, 2, 8192, 16, 32),  # at most 16
        # A slot's own: samples of their own prompt, n = 1.
        (16, 1, 2, 1024, 4, 128),
        (64, 1, 2, 1024, 1, 128),
        (64, 1, 8, 1024, 1, 512),
        (256, 1, 2, 1024, 1, 512),
        (16, 1, 2, 256, 2, 64),
        (16, 1, 2, 0, 1, 32),
    ],
)
def test_splits_fill_the_multiprocessors(slots, n, kv_heads, length, splits, programs):
    rows = slots // n * kv_heads
    found, chunk = attention.splits_for(rows, length, 128)
    assert (found, rows * found) == (splits, programs)
    assert found * chunk >= length and chunk % 128 == 0
