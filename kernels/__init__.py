"""One file a kernel: formula, PyTorch reference (the specification), Triton, autograd, the public
call."""
