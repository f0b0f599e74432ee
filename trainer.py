"""SHIM until eval.py and bench/ have moved to training/."""

from errors import UserError as Stop  # noqa: F401
from model.lora import TRAIN  # noqa: F401
from training.batches import *  # noqa: F403
from training.checkpoints import *  # noqa: F403
from training.policy import *  # noqa: F403
from training.policy import load_model as load  # noqa: F401
from training.ranks import *  # noqa: F403
from training.ranks import all_reduce as reduce  # noqa: F401
from training.ranks import is_first, rank
from training.ranks import shard_by_length as deal  # noqa: F401
from training.ranks import start_ranks as setup  # noqa: F401
from training.run import *  # noqa: F403

FIRST = is_first()
RANK = rank()


def mendable(call, *args, **options):
    return call(*args, **options)
