"""What is wanted soon, made by worker processes before it is asked for.

Only time depends on it: what no worker has begun, or what one failed to make, is made in line by
whoever asks for it. So any number of workers gives the same bits, and a bad file the same words.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, CancelledError, ProcessPoolExecutor
from multiprocessing import forkserver, get_context, parent_process

import torch

AHEAD = 256  # at most so many are under way, or made and not asked for yet


class Ahead:
    """`make(*args)`, a pure function that can be pickled, in `workers` processes; 0: always in
    line.

    The processes are forked from a server that has imported make's module and nothing else: no
    CUDA, no threads, no data. They compute with one thread, and end with this process, however that
    ends.
    """

    def __init__(self, make: Callable, workers: int):
        self.make, self.pool, self.lock, self.told = make, None, threading.Lock(), False
        self.coming, self.waiting = {}, {}  # key -> future; key -> args
        if workers:
            context = get_context("forkserver")
            context.set_forkserver_preload([type(make).__module__])
            self.pool = ProcessPoolExecutor(workers, context, begin)
            threads = os.environ.get("OMP_NUM_THREADS")
            os.environ["OMP_NUM_THREADS"] = "1"  # the server's, and so the workers'; read at import
            forkserver.ensure_running()
            del os.environ["OMP_NUM_THREADS"]
            os.environ |= {"OMP_NUM_THREADS": threads} if threads else {}

    def expect(self, wanted: dict) -> None:
        """key -> args, in the order of use. What was expected before, and isn't now, is let go."""
        with self.lock:
            for key in self.coming.keys() - wanted.keys():
                self.coming.pop(key).cancel()
            self.waiting = {key: args for key, args in wanted.items() if key not in self.coming}
            self._submit()

    def _submit(self) -> None:
        while self.pool and self.waiting and len(self.coming) < AHEAD:
            key = next(iter(self.waiting))
            try:
                self.coming[key] = self.pool.submit(self.make, *self.waiting.pop(key))
            except BrokenExecutor as error:
                self.pool = self._tell(error)

    def take(self, key, args: tuple):
        """make(*args), which nobody else is told again."""
        with self.lock:
            self.waiting.pop(key, None)
            future = self.coming.pop(key, None)
            self._submit()
        error = None
        if future and not future.cancel():
            try:
                return future.result()
            except CancelledError:  # what is expected has changed meanwhile
                pass
            except Exception as failed:
                error = failed
        made = self.make(*args)  # a bad file fails here again, where the caller knows of which row
        if error:
            self._tell(error)
        return made

    def _tell(self, error: Exception) -> None:
        """Once, what only workers fail at: one was killed (by want of memory?), or args can't be
        pickled."""
        if not self.told:
            print(
                f"workers: {error}: done in line, which takes longer", file=sys.stderr, flush=True
            )
        self.told = True


def begin() -> None:
    """In a worker: an interrupt is its parent's business; and a killed parent tells nobody to
    end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    threading.Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()
