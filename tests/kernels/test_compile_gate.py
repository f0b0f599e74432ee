"""Without a GPU: every Triton kernel compiles for sm_90 as shipped, and gives the right numbers
interpreted.

The gate assembles with the ptxas of triton's wheel and reads its report: no register spills, shared
memory within an H100's 227 KB, fp64 in one kernel only. Races it can't see.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import triton
from commands import ROOT
from compiling import build, compiled_for_sm90, in_fp64, not_interpreted, pointers, scalars
from interpreter import needs_interpreter

from kernels import (
    delta_step,
    gated_norm,
    layers,
    linear_logprob,
    policy_loss,
    rewards,
    sample,
    short_conv,
)

# File -> which of its tests: all of what runs on Triton, at sizes that an interpreter of about 1 ms
# a program can do.
INTERPRETED = {
    "test_linear_logprob": "not default_tiles and not memory and not workspace and not float64 and not dtype2",
    "test_policy_loss": "fp32 or huge or nothing or constants or new or below",
    "test_rewards": "",
    "test_sample": "triton or greedy or bad_input",
    "test_layers": "not float64 and not dtype2",
    "test_decode_attention": "",
    "test_delta": "(conv and dtype0) or (steps and heads1) or (norm and 20)",
    "test_checkpointing": "not commands",
}


# The one kernel that computes in fp64, as the host does: see its header.
IN_FP64 = "rewards"


def token_kernel(kind, extra):
    """`extra`: with reference and rollout log-probs."""
    loss = policy_loss.LOSSES[kind]
    signature = pointers(
        "logprob old_logprob advantage cu_seqlens partial_sums gradient",
        "fp32 fp32 fp32 i64 fp32 fp32",
    )
    if extra:
        signature |= pointers("ref_logprob rollout_logprob", "fp32 fp32")
    if loss.sequence_ratio:
        signature |= pointers("sequence_means", "fp32")
    if loss.dual_clip:
        signature |= scalars("dual_clip", "fp32")
    optional = ("ref_logprob", "rollout_logprob", "sequence_means", "dual_clip")
    constants = {name: None for name in optional if name not in signature}
    constants |= dict(SURROGATE=loss.surrogate.__name__, SEQUENCE_MEAN=loss.sequence_mean)
    signature |= scalars("tokens sequences steps", "i32") | scalars("low high kl cap", "fp32")
    return policy_loss._token_kernel, signature, constants | dict(BLOCK=256), {}


def bf16(names):
    return pointers(names, " ".join(["bf16"] * len(names.split())))


def layer_kernels(head, suffix=""):
    """Heads so wide, 8 KB of bf16 a program, as shipped. What is Liger's isn't compiled here."""
    warps = dict(num_warps=8)
    tile = dict(ROWS=layers.TILE // head, WIDE=head, BACK=False)
    strides = "tokens q_heads k_heads q_token q_head k_token v_token out_token out_head out_place"
    rope = bf16("q k v cos sin q_weight k_weight q_out k_out v_out")
    rope |= dict(at="*i64") | scalars("eps offset", "fp32")
    rope |= scalars(f"{strides} width rotary", "i32")
    normed = tile | dict.fromkeys(("v", "v_out", "at"))
    plain = normed | dict.fromkeys(("q_weight", "k_weight"))
    wide_angles = rope | pointers("cos sin", "fp32 fp32")
    grad = bf16("h weight d_out d_h") | dict(partial="*fp32")
    grad |= scalars("rows width", "i32") | scalars("eps offset", "fp32")
    grad_tile = dict(ROWS=layers.TILE // head, BLOCK=head)
    kernels = {
        "rope-write": (layers._rope_kernel, rope, tile, warps),
        "rope-normed": (layers._rope_kernel, rope, normed, warps),
        "rope": (layers._rope_kernel, rope, plain, warps),
        "rope-back": (layers._rope_kernel, rope, plain | dict(BACK=True), warps),
        "rope-fp32-angles": (layers._rope_kernel, wide_angles, plain, warps),
        "norm-grad": (layers._norm_grad_kernel, grad, grad_tile, warps),
    }
    return {name + suffix: case for name, case in kernels.items()}


def delta_kernels():
    """The published sizes of Qwen3.5: 16 key heads, 16 to 48 value heads, 128 wide, 4 taps."""
    tile = dict(TAPS=4, ROWS=short_conv.ROWS, CHANNELS=short_conv.CHANNELS)
    conv = bf16("x weight out") | dict(before="*i64") | scalars("rows channels", "i32")
    grad = conv | bf16("d_out d_x") | dict(partial="*fp32")
    kernels = {
        "conv": (short_conv._conv_kernel, conv, tile, {}),
        "conv-grad": (
            short_conv._conv_grad_kernel,
            grad,
            tile | dict(ROW_BLOCKS=short_conv.ROW_BLOCKS),
            {},
        ),
    }
    norm_tile = dict(ROWS=gated_norm.TILE // 128, BLOCK=128)
    norm = bf16("x z out") | pointers("weight", "fp32")
    norm |= scalars("rows width", "i32") | dict(eps="fp32")
    norm_grad = norm | bf16("d_out d_x d_z") | dict(partial="*fp32")
    kernels["gated-norm"] = (gated_norm._norm_kernel, norm, norm_tile, {})
    kernels["gated-norm-grad"] = (gated_norm._grad_kernel, norm_grad, norm_tile, {})
    step = bf16("mixed z b a conv dt_bias ring out")
    step |= pointers("A_log norm state place ended", "fp32 fp32 fp32 i64 i1")
    step |= scalars("mixed_slot z_slot b_slot a_slot", "i32") | scalars("eps scale", "fp32")
    for value_heads in (16, 32, 48):
        sizes = dict(key_heads=16, heads=value_heads, D=128, E=128, WIDE_D=128, WIDE_E=128, TAPS=4)
        kernel = delta_step._delta_step_kernel
        kernels[f"delta-step-{value_heads}"] = (kernel, step, sizes, dict(num_warps=8))
    return kernels


def sample_part(greedy):
    """fp32 logits and banned ids, as the rollout has them."""
    signature = pointers("logits keys positions banned floats ids", "fp32 i64 i64 i1 fp32 i32")
    signature |= scalars("vocab stride", "i32:16") | scalars("inv_temperature", "fp32")
    constants = dict(GREEDY=greedy, INTERPRETED=False, BLOCK=sample.BLOCK)
    return sample._part_kernel, signature, constants, dict(num_warps=1)


def tile_kernel(kernel, names, types, strides):
    signature = pointers(names, types) | scalars(strides, "i32")
    signature |= dict(column="i32", inv_temperature="fp32", cols="i32")
    return kernel, signature, dict(BLOCK=2048), {}


KERNELS = {  # name: kernel, signature, constants, options
    "fold": tile_kernel(
        linear_logprob._fold_kernel, "tile targets state", "fp32 i64 fp32", "state_stride"
    ),
    "dlogits": tile_kernel(
        linear_logprob._dlogits_kernel,
        "tile out targets stats grads",
        "fp32 bf16 i64 fp32 fp32",
        "stats_stride grads_stride",
    ),
    "sequence": (
        policy_loss._sequence_kernel,
        pointers("logprob old_logprob rollout_logprob cu_seqlens out", "fp32 fp32 fp32 i64 fp32")
        | dict(sequences="i32", cap="fp32"),
        dict(BLOCK=256),
        {},
    ),
    "finaliser": (
        policy_loss._finaliser,
        pointers("partial_sums out", "fp32 fp32") | scalars("blocks tokens", "i32"),
        dict(BLOCK=256),
        {},
    ),
    IN_FP64: (
        rewards._rewards_kernel,
        pointers(
            "parts weights group_start total_out advantage_out keep_out",
            "fp64 fp64 i64 fp64 fp64 i1",
        )
        | scalars("rewards accuracy_column", "i32"),
        dict(DIVIDE=True, BLOCK=32),
        dict(num_warps=1),
    ),
    "sample-part": sample_part(greedy=False),
    "sample-greedy": sample_part(greedy=True),
    "sample-row": (
        sample._row_kernel,
        pointers("logits floats ids tokens logprobs", "fp32 fp32 i32 i64 fp32")
        | dict(parts="i32", stride="i32:16", inv_temperature="fp32"),
        dict(PARTS=triton.next_power_of_2(triton.cdiv(151_936, sample.BLOCK))),
        dict(num_warps=1),
    ),
    **layer_kernels(128),
    **layer_kernels(256, "-256"),
    **delta_kernels(),
}
for kind, loss in policy_loss.LOSSES.items():
    if loss.surrogate in policy_loss.FUSED_SURROGATES:
        KERNELS[f"token-{kind}"] = token_kernel(kind, extra=kind != "grpo")


@not_interpreted
@pytest.mark.parametrize("name", KERNELS)
def test_compiles_for_sm90(name, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    ptx, report, shared = build(tmp_path, *KERNELS[name])
    assert in_fp64(ptx) == (name == IN_FP64)
    assert re.search(r"\b0 bytes spill stores, 0 bytes spill loads", report), report
    assert shared <= 227 * 1024
    print(name, *re.findall(r"Used \d+ registers", report), f"{shared} bytes shared")


@not_interpreted
def test_instructions_of_the_sampler(tmp_path, monkeypatch):
    """What its header counts, of which an H100 does 40 while it copies an element."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    build(tmp_path, *KERNELS["sample-part"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    command = [tool, "-c", tmp_path / "kernel.cubin"]
    code = subprocess.run(command, text=True, capture_output=True).stdout
    instructions = re.findall(r"^\s+/\*\w{4,}\*/", code, re.M)
    assert 20 < len(instructions) / (sample.BLOCK / 32) < 40


@not_interpreted
def test_an_argument_of_one_compiles(tmp_path, monkeypatch):
    """Triton makes a constant of an integer that equals 1: one token, one block, one head.

    A kernel that calls a tensor's methods on it then compiles for every size but that one.
    """
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    seen = set()
    for name, (kernel, signature, constants, options) in KERNELS.items():
        ones = {name: 1 for name, kind in signature.items() if kind.startswith(("i32", "i64"))}
        absent = tuple(key for key in constants if constants[key] is None)
        case = kernel, absent, constants.get("SURROGATE")
        if ones and case not in seen:
            compiled = compiled_for_sm90(kernel, signature, constants | ones, options)
            assert in_fp64(compiled.asm["ptx"]) == (name == IN_FP64)
        seen.add(case)


@needs_interpreter
def test_triton_interpreted_equals_the_references():
    """The kernels' own tests once more, with Triton in the place of the references."""
    chosen = []
    for file, selection in INTERPRETED.items():
        chosen.append(f"({file} and ({selection}))" if selection else file)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-rpfE", "-p", "no:cacheprovider"]
    command += [f"tests/kernels/{file}.py" for file in INTERPRETED]
    done = subprocess.run(
        [*command, "-k", " or ".join(chosen)],
        cwd=ROOT,
        text=True,
        capture_output=True,
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    for file in INTERPRETED:
        assert f"PASSED tests/kernels/{file}.py" in done.stdout, f"nothing was chosen of {file}"


def test_no_compiler_is_needed_on_a_cpu():
    """The calls never launch Triton on CPU tensors, so that no C compiler is asked for."""
    code = """if True:
        import torch, triton
        triton.JITFunction.run = lambda *a, **k: 1 / 0
        from kernels.linear_logprob import linear_logprob
        from kernels.layers import add_rms_norm, qk_norm_rope, swiglu
        from kernels.policy_loss import policy_loss
        from kernels.rewards import rewards_and_advantages
        from kernels.sample import sample
        linear_logprob(torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 1, 4]))
        policy_loss(torch.zeros(3), torch.zeros(3), torch.zeros(1), torch.tensor([0, 3]))
        sample(torch.randn(2, 5), torch.tensor([1, 2]), torch.tensor([0, 0]))
        x, weight = torch.randn(3, 4), torch.ones(4)
        swiglu(*add_rms_norm(x, x, weight))
        qk_norm_rope(x[:, None], x[:, None], x, x, weight, weight)
        parts, start = torch.ones(3, 2), torch.tensor([0, 3])
        rewards_and_advantages(parts, parts[:1], start, accuracy_column=0)"""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PATH": ""}
    environment.pop("TRITON_INTERPRET", None)
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, env=environment)
