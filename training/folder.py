"""A run's directory: its lock, the flags that it was begun with, its rows.

    lock             who is at work in it; there is none once the run has ended
    config.json      the script and its flags, with which --resume goes on; commit and date
    metrics.jsonl    a row a step
    rollouts.jsonl   a row a logged completion (train_rl.py)
    tracker_name     the run's name in its tracker (track.py)
    step-000123/     a checkpoint (checkpoints.py)

The first rank reads and writes them; what goes wrong there is raised on all ranks.
"""

import contextlib
import json
import os
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields
from pathlib import Path

import flags
from errors import UserError, writing
from training import ranks
from training.origin import origin
from training.recorded import read_config

# What may change on --resume, for it does not change what a run means.
MAY_CHANGE = (
    "out",  # a folder may be moved
    "resume",
    "save_every",
    "keep",
    "eval_every",
    "log_groups",
    "track",
    # memory and speed
    "workers",
    "micro_tokens",
    "slots",
    "shard",
    "checkpointing",
)


def attempt(path: Path, write: Callable, *arguments) -> str | None:
    """Call write(*arguments); return a line on what is wrong with the disk or the folder of path.

    It is not raised, for the other ranks may wait for this one: `ranks.raise_together` does, later.
    """
    try:
        with writing(path):
            write(*arguments)
    except UserError as error:
        return str(error)
    return None


# ---- The lock


@contextlib.contextmanager
def lock(out: str) -> Iterator[None]:
    """Keep other runs out of the folder meanwhile, and make it where it is missing. Collective.

    A folder in which nothing was written goes again. UserError where another run is at work.
    """
    path = Path(out) / "lock"
    made = []
    problem = None
    if ranks.is_first():
        # What this call makes, from the inside out, as it is removed again if it stays empty.
        made = [folder for folder in (path.parent, *path.parent.parents) if not folder.exists()]
        problem = attempt(path.parent, path.parent.mkdir, 0o777, True, True)
        # Each only where nothing went wrong before: the first problem is the one that is told.
        problem = problem or holder(path) or attempt(path, write_lock, path)
    try:
        ranks.raise_together(problem)
        yield
    finally:
        # Another run's lock is not ours to take away.
        if ranks.is_first() and problem is None:
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            for folder in made:
                # Raises for a folder that isn't empty, and ends the loop there: its parents aren't,
                # either.
                folder.rmdir()


def holder(path: Path) -> str | None:
    """Return who else holds the lock, and what to do; take away what a dead process has left."""
    try:
        record = json.loads(path.read_text())
        host = record["host"]
        pid = int(record["pid"])
        alive = pid > 0 and is_alive(pid)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return f"{path} can't be read: delete it if no run is at work in this folder"
    if host != socket.gethostname():
        return (
            f"{path}: process {pid} on {host} is at work in this folder; "
            "if it no longer is, delete that file"
        )
    if alive:
        return (
            f"{path}: process {pid} is at work in this folder; choose another --out, or end it "
            "(if that process is no run, delete that file)"
        )
    ranks.say(f"{path}: process {pid}, which is dead, left it behind")
    path.unlink(missing_ok=True)
    return None


def write_lock(path: Path) -> None:
    """Write who this is; FileExistsError where another run was quicker."""
    record = {"host": socket.gethostname(), "pid": os.getpid()}
    # Exclusive: of two runs that find no lock at once, one fails here.
    file = path.open("x")
    try:
        with file:
            file.write(json.dumps(record))
    except OSError:
        path.unlink()
        raise


def is_alive(pid: int) -> bool:
    # A container's processes have the same few numbers each time: one's own was another's.
    if pid == os.getpid():
        return False
    try:
        # Signal 0 does nothing but ask whether there is such a process.
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    # A dead process whose parent never asks (PID 1 of many containers) is a zombie, Z, for good.
    # Not by its command line: that is empty in a process that has just begun, too.
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        # It has ended since, or this system has no /proc.
        return not Path("/proc/self").exists()
    # "PID (name) STATE ...", where a name may hold anything.
    state = status.rpartition(") ")[2][:1]
    return state not in ("Z", "X")


# ---- config.json


def write_config(cfg) -> None:
    """Write config.json of the run, whole or not at all: a resumed run reads it. Collective."""
    path = Path(cfg.out) / "config.json"
    problem = None
    if ranks.is_first():
        path.parent.mkdir(parents=True, exist_ok=True)
        # A run that goes on is as old as it was.
        before = (read_config(cfg.out) or {}) if cfg.resume else {}
        made = {name: before.get(name, value) for name, value in origin().items()}
        config = {"script": script_of(cfg), **asdict(cfg), **made}
        # Before the file is opened: a value that JSON doesn't know leaves the old one as it is.
        text = json.dumps(config, indent=1, allow_nan=False) + "\n"
        problem = attempt(path, replace_text, path, text)
    ranks.raise_together(problem)


def replace_text(path: Path, text: str) -> None:
    """Write a file aside and rename it; what stands there stays where that fails."""
    aside = path.with_name(f"{path.name}.partial")
    try:
        aside.write_text(text)
        # Atomic within a file system: a reader sees the old text or the new one.
        os.replace(aside, path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise


def script_of(cfg) -> str:
    """Return the name of the script whose flags these are."""
    module = type(cfg).__module__
    return Path(sys.argv[0]).stem if module == "__main__" else module


# ---- Going on


def refuse_other_flags(cfg) -> None:
    """Raise UserError where the run in --out was begun with flags that mean another run."""
    before = read_config(cfg.out)
    path = Path(cfg.out) / "config.json"
    if before is None:
        ranks.say(f"{path} is missing: these flags can't be compared with the run's")
        return
    script = script_of(cfg)
    if before.get("script", script) != script:
        raise UserError(f"{cfg.out} is a run of {before['script']}.py, and this is {script}.py")
    differences = []
    for field in fields(cfg):
        # A version that lacks a flag did what is its default now.
        then = before.get(field.name, field.default)
        now = getattr(cfg, field.name)
        if field.name in MAY_CHANGE or as_json(then) == as_json(now):
            continue
        # Any other schedule's rate depends, at every step, on how many there are.
        if field.name == "steps" and now > then and before.get("schedule") == "constant":
            continue
        differences.append(f"{flags.flag(field.name)} {shown(then)}, now it is {shown(now)}")
    if differences:
        raise UserError(
            f"{path}: the run had {'; '.join(differences)}: leave that flag out, or choose "
            "another --out"
        )


def as_json(value):
    """Return a flag's value as config.json gives it back; of a path without ./ and a last slash."""
    if isinstance(value, tuple | list):
        return [as_json(item) for item in value]
    return os.path.normpath(value) if isinstance(value, str) else value


def shown(value) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


# ---- Rows


class Rows:
    """A file of JSON rows, each of a `step`. The first rank writes.

    done: steps of the checkpoint that a run goes on from: rows of later steps go, and a torn line.
    """

    def __init__(self, path: Path, done: int):
        self.path = path
        self.file = None
        problem = None
        if ranks.is_first():
            problem = attempt(path, self.open, done)
        ranks.raise_together(problem)

    def open(self, done: int) -> None:
        # Whole or not at all, as config.json: killed meanwhile, no row is lost.
        replace_text(self.path, "".join(self.lines_up_to(done)))
        self.file = self.path.open("a")

    def lines_up_to(self, done: int) -> list[str]:
        """Return the lines of the first `done` steps; say where some are missing."""
        if not done:
            return []
        kept = []
        steps = set()
        for row, line in whole_rows(self.path):
            if row["step"] <= done:
                kept.append(line)
                steps.add(row["step"])
        if len(steps) < done:
            ranks.say(f"{self.path} has rows of {len(steps)} of the {done} steps that are done")
        return kept

    def append(self, rows: list[dict]) -> None:
        """Write the rows of a step. Collective."""
        problem = None
        if self.file:
            problem = attempt(self.path, self.write, rows)
        ranks.raise_together(problem)

    def write(self, rows: list[dict]) -> None:
        for row in rows:
            self.file.write(json.dumps(row, allow_nan=False) + "\n")
        # A row is there as soon as its step is done, for whoever watches, and after a kill.
        self.file.flush()


def whole_rows(path: Path) -> list[tuple[dict, str]]:
    """Return (row, line) of all lines that are not torn; [] where there is no file."""
    try:
        text = path.read_text(errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from error
    rows = []
    for line in text.splitlines(keepends=True):
        try:
            row = json.loads(line)
            # A number, or TypeError: the caller compares it.
            row["step"] += 0
        except (ValueError, KeyError, TypeError):
            continue
        if line.endswith("\n"):
            rows.append((row, line))
    return rows
