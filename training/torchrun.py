"""torchrun, but a run that ends early ends in its own line alone, and with its own exit code.

    python -m training.torchrun --standalone --nproc_per_node 2 train_sft.py (and its flags)

torchrun adds a traceback of its own and exits with 1, whatever a rank has said and returned, and
gives ranks 30 s to save after Ctrl-C. Here they get ten minutes.
"""

import logging
import os
import signal
import sys

# A shell starts a background process with Ctrl-C ignored. Before the slow imports.
signal.signal(signal.SIGINT, signal.default_int_handler)
# torch would warn of each rank that it passes the signal on to.
logging.disable(logging.CRITICAL)
os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")


def main() -> int:
    """Run torchrun's command line; return the exit code."""
    try:
        from torch.distributed import run
        from torch.distributed.elastic.multiprocessing import SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    try:
        run.main()
    except SignalException as stopped:
        return 128 + stopped.sigval
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        if failure.exitcode > 0:
            return failure.exitcode
        # The rank could not say it itself.
        name = signal.Signals(-failure.exitcode).name
        print(f"rank {rank} was ended by {name}", file=sys.stderr)
        return 128 - failure.exitcode
    return 0


if __name__ == "__main__":
    sys.exit(main())
