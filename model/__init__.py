"""The model: Qwen-VL with region tokens, a point map and a 3D head; its processor; its sampler."""

from importlib import import_module

# Name -> its module, which is imported when the name is first asked for: torch takes seconds, and
# `python -m model.tiny --help` needs none of it.
HOMES = {
    "Batch": "model.batch",
    "Processor": "model.processor",
    "QwenVL": "model.qwen_vl",
    "Rollout": "model.rollout",
    "generate": "model.rollout",
}
__all__ = list(HOMES)


def __getattr__(name: str):
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(HOMES[name]), name)
