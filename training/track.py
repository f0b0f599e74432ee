"""--track: what a run tells wandb or trackio. Both are optional, and imported only when asked for.

A tracker gets the columns of metrics.jsonl under their names, at the step of the row, and of
train_rl.py now and then a table of rollouts with their images. The first rank tells it. A tracker
that fails ends no training: that is said once, and the run goes on without it.

A resumed run goes on in the same tracker run, whose name is kept in the run's directory.
"""

import importlib.util
import io
import os
import re
import tempfile
import uuid
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

from errors import UserError
from pictures import read_picture
from training import ranks

PROJECT = "sr-real"  # WANDB_PROJECT overrides it
NAME_FILE = "tracker_name"
# Bounds of a table of rollouts: all of it stays below 1 MB.
ROWS = 64
TEXT = 4000  # characters
SIDE = 256  # pixels of an image's longer side; as a JPEG some 15 kB


# ---- The trackers


class Wandb:
    """A run of wandb, in whichever mode WANDB_MODE says. Its files lie in OUT/wandb."""

    def __init__(self, cfg, name: str):
        self.package = import_module("wandb")
        # Without it a run that has lost its network would never end. What is not uploaded stays.
        os.environ.setdefault("WANDB_FINISH_TIMEOUT", "120")
        self.run = self.package.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=name,
            name=name,
            dir=cfg.out,
            config=asdict(cfg),
            resume="allow",
            # The progress bar and the log are the terminal's; a copy would have all its redraws.
            settings=self.package.Settings(console="off"),
        )

    def finish(self, failed: bool) -> None:
        self.run.finish(exit_code=1 if failed else 0)


class Trackio:
    """A run of trackio: by default in the user's cache, at TRACKIO_DIR or TRACKIO_SPACE_ID."""

    def __init__(self, cfg, name: str):
        self.package = import_module("trackio")
        self.run = self.package.init(
            project=PROJECT, name=name, config=asdict(cfg), resume="allow", embed=False
        )

    def finish(self, failed: bool) -> None:
        # It has no word for a run that failed.
        self.package.finish()


TRACKERS = {"wandb": Wandb, "trackio": Trackio}


def check(kind: str) -> None:
    """Raise UserError where the package of a tracker is missing; "none" needs none."""
    if kind == "none":
        return
    # Found, not imported: the other ranks never need it, and a run may still be refused.
    spec = importlib.util.find_spec(kind)
    # A folder ./wandb with old runs looks like a package, but for its origin.
    if spec is None or spec.origin is None:
        raise UserError(f"--track {kind}: that package is missing; pip install {kind}")


# ---- What the loops call


class Tracker:
    """The tracker of a run, or none: a context that closes it, whatever ends the run."""

    def __init__(self, kind: str):
        self.kind = kind
        self.backend = None
        self.works = False

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if self.backend is not None:
            self._attempt(self.backend.finish, error is not None)

    def start(self, cfg) -> None:
        """Begin, or go on with, the tracker run of cfg.out. Other ranks than the first do not."""
        self.works = self.kind != "none" and ranks.is_first()
        if self.works:
            self._attempt(self._start, cfg)

    def _start(self, cfg) -> None:
        self.backend = TRACKERS[self.kind](cfg, name_of_run(Path(cfg.out)))

    def log(self, row: dict) -> None:
        """Log the row of a step, without what is null in it."""
        columns = {}
        for name, value in row.items():
            if value is not None and name != "step":
                columns[name] = value
        if self.works:
            self._attempt(self._log, columns, row["step"])

    def log_rollouts(self, step: int, rows: list[dict], images: dict) -> None:
        """Log rows of rollouts.jsonl as a table. images: (path, group) -> JPEG."""
        if self.works and rows:
            self._attempt(self._log_rollouts, step, rows, images)

    def _log(self, columns: dict, step: int) -> None:
        self.backend.run.log(columns, step=step)

    def _log_rollouts(self, step: int, rows: list[dict], images: dict) -> None:
        package = self.backend.package
        # Both packages copy an image's file while they log it, and keep its format.
        with tempfile.TemporaryDirectory() as folder:
            shown = {}
            for number, (key, content) in enumerate(images.items()):
                file = Path(folder) / f"{number}.jpg"
                file.write_bytes(content)
                shown[key] = package.Image(str(file))
            lines = table_rows(rows, shown)
            data = [list(line.values()) for line in lines]
            table = package.Table(columns=list(lines[0]), data=data)
            # Inside of the `with`: the images' files have to be there until they are logged.
            self._log({"rollouts": table}, step)

    def _attempt(self, call, *arguments) -> None:
        try:
            call(*arguments)
        # Whatever a package of others may raise: a lost network, a full disk, a missing key.
        except Exception as error:
            if self.works:  # once is enough
                lines = str(error).strip().splitlines() or [""]
                why = f"{type(error).__name__}: {lines[0]}"
                ranks.say(f"--track {self.kind} failed ({why}); the run goes on without it")
            self.works = False


def name_of_run(out: Path) -> str:
    """Return the name of a run in its tracker: made once, and then kept in the run's directory."""
    file = out / NAME_FILE
    if file.exists():
        return file.read_text().strip()
    # Not the folder's name alone, which many runs share; wandb takes no other characters.
    folder = re.sub(r"[^\w.-]+", "-", out.resolve().name)[-40:]
    name = f"{folder}-{uuid.uuid4().hex[:8]}"
    file.write_text(f"{name}\n")
    return name


# ---- Rollouts


def thumbnail(image) -> bytes:
    """Return a small JPEG of an Example's image."""
    # thumbnail() works in place, and the picture may be the row's own.
    small = read_picture(image).copy()
    small.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def table_rows(rows: list[dict], images: dict) -> list[dict]:
    """Return the lines of a table: few enough, of every path, and with their images.

    images: (path, group) -> what the table shows in that cell; a question without is text alone.
    """
    # Group by group, so that a cut leaves rows of every path.
    in_turn = sorted(rows, key=lambda row: (row["group"], row["path"], row["sample"]))
    lines = []
    for row in in_turn[:ROWS]:
        lines.append(
            {
                "path": row["path"],
                "group": row["group"],
                "sample": row["sample"],
                "image": images.get((row["path"], row["group"])),
                "question": row["question"][:TEXT],
                "truth": row["truth"][:TEXT],
                "text": row["text"][:TEXT],
                **row["parts"],
                "total": row["total"],
                "advantage": row["advantage"],
                "kept": row["kept"],
                "finished": row["finished"],
            }
        )
    return lines
