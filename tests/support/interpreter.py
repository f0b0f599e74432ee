"""Where Triton's interpreter can't run the kernels, tests of them skip and say so."""

import numpy
import pytest
import triton
from packaging.version import Version

needs_interpreter = pytest.mark.skipif(
    Version(triton.__version__) < Version("3.7.1") and Version(numpy.__version__) >= Version("2.4"),
    reason="before 3.7.1, Triton's interpreter fails at every loop to a run-time bound with numpy >= 2.4",
)
