"""One file a kernel: the formula, the PyTorch reference (the specification), Triton, autograd, the public call."""
