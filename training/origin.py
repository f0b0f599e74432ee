"""When something was run, and which commit of this code ran it."""

import subprocess
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def origin() -> dict[str, str | None]:
    """Return `commit`, None of a copy without git, and `date`: what a report says at its top."""
    return {"commit": commit(), "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"}


def commit() -> str | None:
    """Return the short hash of this code's commit, with -dirty behind it if files have changed."""
    # A copy that lies in somebody else's repository is not of that one's commit.
    top = git("rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != ROOT:
        return None
    return git("describe", "--always", "--dirty", "--exclude=*")


def git(*arguments: str) -> str | None:
    """Return what git prints, None where there is no git, or no repository."""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
