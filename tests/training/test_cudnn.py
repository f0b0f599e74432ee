"""cuDNN's attention is off from the start of every script and bench that may run on a GPU.

Torch prefers it on sm_90, where it builds a plan for every new shape: tenths of a second each.
"""

from pathlib import Path

import pytest
import torch

import eval as evaluation
import train_rl
import train_sft
from bench import kernels, rollout, train
from data import coldstart, depth
from srreal import Example


class Ready(Exception):
    """Raised in the place of what loads a model, or starts to measure."""


def stop(*_, **__):
    raise Ready


# Script: (its call, what stands in until it is set up)
SCRIPTS = {
    "train_sft.py": (
        lambda: train_sft.main(train_sft.Config("m", (), "o")),
        {"training.checkpoints.find_start": stop},
    ),
    "train_rl.py": (
        lambda: train_rl.main(train_rl.Config("m", (), "o")),
        {"training.checkpoints.find_start": stop},
    ),
    "eval.py": (
        lambda: evaluation.main(evaluation.Config("m")),
        {
            "eval.questions": lambda _: evaluation.Asked([Example("a", "lor", [], "?", "A")]),
            "training.run.load_processor": lambda *_: None,
            "eval.load_model": stop,
        },
    ),
    "data/coldstart.py": (
        lambda: coldstart.sampler(coldstart.Config((), Path(), expert="m")),
        {"model.QwenVL.from_pretrained": stop},
    ),
    "data/depth.py": (
        lambda: depth.main(depth.Config((), "m")),
        {
            "data.depth.missing": lambda _: {},
            "data.depth.AutoModelForDepthEstimation.from_pretrained": stop,
        },
    ),
    "bench/kernels.py": (lambda: kernels.main([]), {"bench.kernels.device_name": stop}),
    "bench/rollout.py": (rollout.gpu, {"bench.rollout.ceilings": stop}),
    "bench/train.py": (lambda: train.main(train.Config()), {"bench.train.load": stop}),
}


@pytest.fixture
def as_torch_starts():
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    yield
    torch.backends.cuda.enable_cudnn_sdp(before)


@pytest.mark.parametrize("script", SCRIPTS)
def test_cudnn_attention_is_off(script, as_torch_starts, monkeypatch):
    call, stand_ins = SCRIPTS[script]
    for name, value in stand_ins.items():
        monkeypatch.setattr(name, value)
    with pytest.raises(Ready):
        call()
    assert not torch.backends.cuda.cudnn_sdp_enabled()
