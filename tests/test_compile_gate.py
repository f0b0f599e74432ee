"""Without a GPU: every Triton kernel compiles for sm_90 as shipped, and gives the right numbers
interpreted.

The gate assembles with the ptxas of triton's wheel and reads its report: no register spills, shared
memory within an H100's 227 KB, wgmma wherever a dot's tile has 64 rows or more. Races it can't see.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import triton
from interpreter import needs_interpreter
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from kernels import layers, linear_logprob, policy_loss, rewards, sample

ROOT = Path(__file__).parent.parent
# all of what runs on Triton, at sizes that an interpreter of about 1 ms a program can do
INTERPRETED = [
    (
        "test_linear_logprob.py",
        "not default_tiles and not memory and not workspace and not float64 and not dtype2",
    ),
    ("test_policy_loss.py", "fp32 or huge or nothing or constants"),
    ("test_rewards.py", ""),
    ("test_sample.py", "triton or greedy or bad_input"),
    ("test_layers.py", "not float64 and not dtype2"),
    ("test_attention.py", "decode"),
    ("test_checkpointing.py", "not commands"),
]


def pointers(names, types):
    return {name: "*" + kind for name, kind in zip(names.split(), types.split(), strict=True)}


def token_kernel(kind, extra, block=256):
    """`extra`: with reference and rollout log-probs."""
    names = (
        "new old advantage cu partial slope_out"
        + (" ref rollout" if extra else "")
        + " means" * (kind == "gspo")
    )
    types = "fp32 fp32 fp32 i64 fp32 fp32" + " fp32 fp32" * extra + " fp32" * (kind == "gspo")
    scalars = dict(
        tokens="i32",
        sequences="i32",
        steps="i32",
        low="fp32",
        high="fp32",
        dual="fp32",
        kl="fp32",
        cap="fp32",
    )
    constants = {name: None for name in ("ref", "rollout", "means") if name not in names.split()}
    return (
        policy_loss._token_kernel,
        pointers(names, types) | scalars,
        dict(KIND=kind, BLOCK=block, **constants),
        {},
    )


def layer_kernels(head=128):
    """Heads of 128, 8 KB of bf16 a program, as shipped. What is Liger's isn't compiled here."""
    bf16 = lambda names: pointers(names, " ".join(["bf16"] * len(names.split())))  # noqa: E731
    warps = dict(num_warps=8)
    half = dict(ROWS=layers.TILE // (head // 2), HALF=head // 2, BACK=False)
    strides = "tokens q_heads k_heads q_token k_token v_token out_token out_head out_place half"
    rope = bf16("q k v cos sin q_weight k_weight q_out k_out v_out") | dict(at="*i64", eps="fp32")
    rope |= dict.fromkeys(strides.split(), "i32")
    trained = half | dict.fromkeys(("v", "v_out", "at"))
    plain = trained | dict.fromkeys(("q_weight", "k_weight"))
    grad = bf16("h weight d_out d_h") | dict(partial="*fp32", rows="i32", width="i32", eps="fp32")
    return {
        "rope-write": (layers._rope_kernel, rope, half, warps),
        "rope-normed": (layers._rope_kernel, rope, trained, warps),
        "rope": (layers._rope_kernel, rope, plain, warps),
        "rope-back": (layers._rope_kernel, rope, plain | dict(BACK=True), warps),
        "rope-fp32-angles": (
            layers._rope_kernel,
            rope | pointers("cos sin", "fp32 fp32"),
            plain,
            warps,
        ),
        "norm-grad": (
            layers._norm_grad_kernel,
            grad,
            dict(ROWS=layers.TILE // head, BLOCK=head),
            warps,
        ),
    }


FUSED = dict(linear_logprob.FUSED)
FUSED_OPTIONS = {k: FUSED.pop(k) for k in ("num_warps", "num_stages")}
TILES = {
    "hidden": f"tensordesc<bf16[{FUSED['BM']}, {FUSED['BK']}]>",
    "weight": f"tensordesc<bf16[{FUSED['BN']}, {FUSED['BK']}]>",
}
SIX = dict(column="i32", inv_temperature="fp32", cols="i32")
KERNELS = {  # name: kernel, signature, constants, options
    "fold": (
        linear_logprob._fold_kernel,
        pointers("tile targets state", "fp32 i64 fp32") | SIX | dict(state_stride="i32"),
        dict(BLOCK=2048),
        {},
    ),
    "dlogits": (
        linear_logprob._dlogits_kernel,
        pointers("tile out targets stats grads", "fp32 bf16 i64 fp32 fp32")
        | SIX
        | dict(stats_stride="i32", grads_stride="i32"),
        dict(BLOCK=2048),
        {},
    ),
    "fused": (
        linear_logprob._fused_kernel,
        TILES
        | pointers("targets partial", "i64 fp32")
        | dict(n="i32", v="i32", h="i32", columns="i32", inv_temperature="fp32"),
        dict(UPCAST=False, **FUSED),
        FUSED_OPTIONS,
    ),
    "sequence": (
        policy_loss._sequence_kernel,
        pointers("new old rollout cu out", "fp32 fp32 fp32 i64 fp32")
        | dict(sequences="i32", cap="fp32"),
        dict(BLOCK=256),
        {},
    ),
    **{
        f"token-{kind}": token_kernel(kind, extra)
        for kind, extra in zip(policy_loss.KINDS, (1, 0, 1, 1, 1), strict=True)
    },
    "finaliser": (
        policy_loss._finaliser,
        pointers("partial out", "fp32 fp32") | dict(blocks="i32", tokens="i32"),
        dict(BLOCK=256),
        {},
    ),
    "rewards": (
        rewards._rewards_kernel,
        pointers(
            " ".join(rewards.Scored._fields) + " out keep",
            "i1 i1 fp64 i64 i64 fp64 i64 i64 i64 i64 fp64 i64 i64 i64 fp64 i64 i64 fp64 i1",
        )
        | dict(n="i32"),
        dict(BLOCK=32),
        dict(num_warps=1),
    ),
    **{
        name: (  # fp32 logits and banned ids, as the rollout has them
            sample._part_kernel,
            pointers("logits keys positions banned floats ids", "fp32 i64 i64 i1 fp32 i32")
            | dict(vocab="i32:16", stride="i32:16", inv_temperature="fp32"),
            dict(GREEDY=greedy, BLOCK=sample.BLOCK),
            dict(num_warps=1),
        )
        for name, greedy in (("sample-part", False), ("sample-greedy", True))
    },
    "sample-row": (
        sample._row_kernel,
        pointers("logits floats ids tokens logprobs", "fp32 fp32 i32 i64 fp32")
        | dict(parts="i32", stride="i32:16", inv_temperature="fp32"),
        dict(PARTS=triton.next_power_of_2(triton.cdiv(151_936, sample.BLOCK))),
        dict(num_warps=1),
    ),
    **layer_kernels(),
}


def compiled_for_sm90(kernel, signature, constants, options):
    """Pointers are 16-byte aligned, as torch's are; an i32:16 is divisible by 16: Triton uses
    that."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else signature[name] for name in names}
    sixteen = [(i,) for i, name in enumerate(names) if re.search(r"^\*|:16$", signature[name])]
    source = ASTSource(
        kernel,
        {name: kind.removesuffix(":16") for name, kind in signature.items()},
        {(names.index(k),): v for k, v in constants.items()},
        {i: [["tt.divisibility", 16]] for i in sixteen},
    )
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def without_fp64(ptx, signature):
    """Whether a kernel that isn't given any fp64 computes in none. It does where a constant lies
    below fp32's smallest normal number, 1.18e-38, as such a constant is fp64 to Triton, and so is
    what it meets."""
    return ".f64" not in ptx or any("fp64" in kind for kind in signature.values())


def build(folder, *kernel):
    """(PTX, ptxas's report, bytes of shared memory)."""
    compiled = compiled_for_sm90(*kernel)
    file = folder / "kernel.ptx"
    file.write_text(compiled.asm["ptx"])
    done = subprocess.run(
        [get_ptxas(90).path, "-arch=sm_90a", "-v", file, "-o", folder / "kernel.cubin"],
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return compiled.asm["ptx"], done.stdout + done.stderr, compiled.metadata.shared


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted functions can't be compiled"
)
@pytest.mark.parametrize("name", KERNELS)
def test_compiles_for_sm90(name, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    ptx, report, shared = build(tmp_path, *KERNELS[name])
    assert without_fp64(ptx, KERNELS[name][1])
    assert re.search(r"\b0 bytes spill stores, 0 bytes spill loads", report), report
    assert shared <= 227 * 1024
    assert ("wgmma" in ptx) == (name == "fused")
    print(name, *re.findall(r"Used \d+ registers", report), f"{shared} bytes shared")
    # what its header counts, of which an H100 does 40 while it copies an element
    if name == "sample-part":
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
        code = subprocess.run(
            [tool, "-c", tmp_path / "kernel.cubin"], text=True, capture_output=True
        ).stdout
        assert 20 < len(re.findall(r"^\s+/\*\w{4,}\*/", code, re.M)) / (sample.BLOCK / 32) < 40


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted functions can't be compiled"
)
def test_an_argument_of_one_compiles(tmp_path, monkeypatch):
    """Triton makes a constant of an integer that equals 1: one token, one block, one head. A kernel
    that asks it for a tensor's methods then compiles for every size but that one."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    seen = set()
    for kernel, signature, constants, options in KERNELS.values():
        ones = {name: 1 for name, kind in signature.items() if kind.startswith(("i32", "i64"))}
        case = kernel, tuple(k for k in constants if constants[k] is None), constants.get("KIND")
        if ones and case not in seen:
            compiled = compiled_for_sm90(kernel, signature, constants | ones, options)
            assert without_fp64(compiled.asm["ptx"], signature)
        seen.add(case)


@needs_interpreter
def test_triton_interpreted_equals_the_references():
    """The kernels' own tests once more, with Triton in the place of the references."""
    for file, selection in INTERPRETED:
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            f"tests/{file}",
            "-k",
            selection,
        ]
        done = subprocess.run(
            command,
            cwd=ROOT,
            text=True,
            capture_output=True,
            env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        )
        assert done.returncode == 0 and " passed" in done.stdout, (
            done.stdout[-3000:] + done.stderr[-1000:]
        )


def test_no_compiler_is_needed_on_a_cpu():
    """The calls never launch Triton on CPU tensors, so that no C compiler is asked for."""
    code = """if True:
        import torch, triton
        triton.JITFunction.run = lambda *a, **k: 1 / 0
        from kernels.linear_logprob import linear_logprob
        from kernels.layers import add_rms_norm, qk_norm_rope, swiglu
        from kernels.policy_loss import policy_loss
        from kernels.sample import sample
        linear_logprob(torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 1, 4]))
        policy_loss(torch.zeros(3), torch.zeros(3), torch.zeros(1), torch.tensor([0, 3]))
        sample(torch.randn(2, 5), torch.tensor([1, 2]), torch.tensor([0, 0]))
        x, weight = torch.randn(3, 4), torch.ones(4)
        swiglu(*add_rms_norm(x, x, weight)), qk_norm_rope(x[:, None], x[:, None], x, x, weight, weight)"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {
        "CUDA_VISIBLE_DEVICES": "",
        "PATH": "",
    }
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, env=environment)
