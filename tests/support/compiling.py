"""Compile a Triton kernel for sm_90 without a GPU, and read what ptxas says of it."""

import re
import subprocess

import pytest
from triton import compile as triton_compile
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from kernels import interpreted

not_interpreted = pytest.mark.skipif(interpreted(), reason="interpreted functions don't compile")


def pointers(names, types):
    """{name: pointer type} of names and types that stand in two strings in the same order."""
    return {name: "*" + kind for name, kind in zip(names.split(), types.split(), strict=True)}


def scalars(names, kind):
    return dict.fromkeys(names.split(), kind)


def compiled_for_sm90(kernel, signature, constants, options):
    """Compile with pointers 16-byte aligned, as torch's are, and an i32:16 divisible by 16."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else signature[name] for name in names}
    sixteen = [(i,) for i, name in enumerate(names) if re.search(r"^\*|:16$", signature[name])]
    source = ASTSource(
        kernel,
        {name: kind.removesuffix(":16") for name, kind in signature.items()},
        {(names.index(k),): v for k, v in constants.items()},
        {i: [["tt.divisibility", 16]] for i in sixteen},
    )
    return triton_compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def in_fp64(ptx):
    """Whether a kernel computes in fp64.

    It does, where none was meant, at a constant below fp32's smallest normal number, 1.18e-38: such
    a constant is fp64 to Triton, and so is what it meets.
    """
    return ".f64" in ptx


def build(folder, *kernel):
    """Return PTX, ptxas's report and the bytes of shared memory."""
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
