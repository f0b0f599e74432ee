"""The kernels. Each call runs Triton where `on_triton` says so, else its PyTorch reference."""

import os

from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # it has no wheel for macOS and Windows
    from kernels import absent as tl
    from kernels import absent as triton

__all__ = ["interpreted", "on_triton", "tl", "triton"]


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on the CPU (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def on_triton(tensor: Tensor) -> bool:
    """Whether calls with this tensor go to Triton: on CUDA, or interpreted."""
    return tensor.is_cuda or interpreted()
