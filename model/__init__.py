"""The model: Qwen-VL with region tokens, a point map and a 3D head; its processor; its sampler."""

from model.batch import Batch
from model.processor import Processor
from model.qwen_vl import QwenVL
from model.rollout import Rollout, generate

__all__ = ["Batch", "Processor", "QwenVL", "Rollout", "generate"]
