"""One step of Muon on the tiny model's matrices, ours against torch.optim's, on one thread.

    python -m bench.muon
    ONEDNN_MAX_CPU_ISA=AVX2 python -m bench.muon    as on a CPU without instructions for bf16

torch's orthogonalises in bf16, ours in fp32. Gradients are drawn anew for every step.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import flags
from flags import Count, Seed
from model import tiny
from model.qwen_vl import QwenVL
from training.optim import BLOCK_MATRIX, Optimizer


@dataclass
class Config:
    repeats: Count = 20  # steps of each, in turn
    seed: Seed = 0

    def __post_init__(self):
        flags.check(self)


def block_matrices(seed: int) -> dict[str, Tensor]:
    with tempfile.TemporaryDirectory() as folder:
        tiny.write("qwen3_vl", folder, seed)
        model = QwenVL.from_pretrained(folder)
    named = model.named_parameters()
    return {n: p for n, p in named if p.ndim == 2 and BLOCK_MATRIX.search(n)}


def milliseconds(params: list[Tensor], step: Callable[[], object]) -> float:
    for param in params:
        param.grad = torch.randn_like(param)
    started = time.perf_counter()
    step()
    return 1000 * (time.perf_counter() - started)


def main(config: Config) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(config.seed)
    named = block_matrices(config.seed)
    params = list(named.values())
    ours = Optimizer(named.items(), muon=True)
    theirs = torch.optim.Muon(params, adjust_lr_fn="match_rms_adamw")
    contenders = {
        "ours": lambda: ours.step(1e-3, clip_norm=0.0, loss=0.0, name="bench"),
        "torch.optim.Muon": theirs.step,
    }
    times = {name: [] for name in contenders}
    for _ in range(config.repeats + 1):
        for name, step in contenders.items():
            times[name].append(milliseconds(params, step))
    for name, all_times in times.items():
        # The first step of each warms up.
        print(f"{name:16} {statistics.median(all_times[1:]):7.1f} ms")


if __name__ == "__main__":
    main(flags.parse(Config, __doc__))
