"""Stands in for `triton` and `triton.language` where Triton can't be imported: macOS, Windows.

The kernels' files can be imported there, and every call runs its PyTorch reference, on the CPU.
"""


class Kernel:
    """A kernel that can't be launched."""

    def __init__(self, function):
        self.__doc__ = function.__doc__

    def __getitem__(self, grid):
        raise ModuleNotFoundError(
            "on a GPU the kernels need Triton, which can't be imported here; CUDA_VISIBLE_DEVICES= "
            "runs on the CPU"
        )


jit = Kernel


def constexpr(value):
    return value
