"""SIGTERM and Ctrl-C: what to do with them before the loop, and in it."""

import os
import signal
import sys
import time

import torch.distributed as dist

from training import ranks

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Seconds in which a second signal of the same number counts as the first: a scheduler's reaches
# every process of a job, and torchrun passes on its own.
ECHO = 1.0


class Interrupted(KeyboardInterrupt):
    """The end of a command that a signal asked for; its text says what is saved."""

    def __init__(self, signum: int, text: str = ""):
        super().__init__(text)
        self.signum = signum

    @property
    def exit_code(self) -> int:
        return 128 + self.signum


class Interrupts:
    """A context in which a signal raises Interrupted: at once, or after the step (`defer`).

    After `defer` the first signal is kept until the loop asks for it, and the second raises at
    once. Under torchrun, where ranks wait for each other, a second signal of another kind ends the
    process without a message.
    """

    def __init__(self):
        self.deferred = False
        self.signum = 0  # of the first signal after `defer`
        self.since = 0.0
        self.before: dict = {}

    def __enter__(self) -> "Interrupts":
        for signum in SIGNALS:
            self.before[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, kind, error, traceback) -> None:
        for signum, handler in self.before.items():
            signal.signal(signum, handler)
        # It came behind the last step's `arrived`; or a rank that has ended, and has said why, took
        # along those that wait for it.
        others_left = isinstance(error, RuntimeError) and ranks.did_not_answer(error)
        if self.signum and (error is None or others_left):
            raise Interrupted(self.signum) from error

    def defer(self) -> None:
        """From now on let the step be finished: the loop asks `arrived` at the end of each."""
        self.deferred = True

    def arrived(self) -> int:
        """Return the signal that any rank has got, or 0: all ranks stop at one step. Collective."""
        return int(ranks.all_reduce([self.signum], "MAX")[0])

    def _handle(self, signum: int, frame) -> None:
        together = dist.is_initialized()
        if together and signum == self.signum and time.monotonic() - self.since < ECHO:
            return
        if self.signum or not self.deferred:
            raise Interrupted(signum)
        self.signum = signum
        self.since = time.monotonic()
        if together:
            # A second Ctrl-C reaches them as torchrun's SIGTERM, also while they wait in C.
            (other,) = set(SIGNALS) - {signum}
            signal.signal(other, signal.SIG_DFL)
        if ranks.is_first() and sys.stderr.isatty():
            # Not by print, which may have been interrupted itself.
            os.write(2, b"\nfinishing the step, then saving; once more ends at once\n")


def raise_if(signum: int, text: str) -> None:
    """End the command as a signal has asked; 0: there was none."""
    if signum:
        raise Interrupted(signum, text)


def reset() -> None:
    """Let signals end this process at once, without a word: it is about to end by itself."""
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_DFL)
