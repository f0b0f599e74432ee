"""The one kind of error that is the user's to mend: a flag, a file, a row, a checkpoint, a disk."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path


class UserError(Exception):
    """A mistake that whoever runs a command can mend; its text says where, and what to do.

    It is raised where a file is opened, a row is parsed, a flag is checked, and ends a command in
    its text alone, with exit code 2. Every other exception is a bug, and keeps its traceback.
    """


@contextlib.contextmanager
def writing(path: Path | str, place: str = "--out has to be a folder") -> Iterator[None]:
    """Raise UserError where the disk is full, or path may not be written. For writes alone.

    place: how the error says where the user chose the path.
    """
    try:
        yield
    except Exception as error:
        # What safetensors and tokenizers raise of a full disk is no OSError.
        if not isinstance(error, OSError) and "os error" not in str(error):
            raise
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"can't write {path}: {reason}; {place} that you may write to, on a disk with room"
        ) from error


def launch(name: str, main: Callable, *arguments) -> None:
    """Run main(*arguments), of a command line; a mistake and Ctrl-C end it in one line."""
    try:
        main(*arguments)
    except UserError as error:
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        sys.exit(130)
