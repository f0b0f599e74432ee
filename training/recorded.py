"""The flags that a run was begun with, as config.json has them: the defaults of its --resume.

Read before torch is imported, so that a wrong flag is answered at once.
"""

import json
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import tyro

from errors import UserError


def read_config(out: str) -> dict | None:
    """Return config.json of the run in `out`, None where there is none."""
    path = Path(out) / "config.json"
    try:
        config = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} can't be read ({error}): copy it back, or delete it and give all flags"
        ) from error
    if not isinstance(config, dict):
        raise UserError(f"{path} is no object: copy it back, or delete it and give all flags")
    return config


def recorded_flags(config: type, arguments: list[str]):
    """Return the defaults of a command line: on --resume those that the run was begun with.

    None: the Config's own. What is named on the command line keeps its own default, so that it is
    read as ever.
    """
    given = given_flags(config, arguments)
    if "--resume" not in arguments or not given.get("out"):
        return None
    recorded = read_config(given["out"])
    required = {field.name for field in fields(config) if field.default is MISSING}
    if recorded is None:
        # A run's first start with --resume, as a scheduler's script has it: nothing is recorded
        # yet.
        if required <= given.keys():
            return None
        lacking = " and ".join(f"--{name}" for name in sorted(required - given.keys()))
        raise UserError(
            f"{given['out']}/config.json is missing, from which --resume takes the run's flags: "
            f"give {lacking}, or the --out of a run"
        )
    # tyro adds to a default, or lets it stand, by the kind of a flag: so what is given here gets
    # none of the run's.
    values = {}
    hints = get_type_hints(config)
    for field in fields(config):
        if field.name not in given and field.name in recorded:
            value = recorded[field.name]
            if not fits(value, hints[field.name]):
                raise UserError(
                    f"{given['out']}/config.json: {field.name} is {value!r}: copy the file back, "
                    "or delete it and give all flags"
                )
            # JSON has no tuples.
            values[field.name] = tuple(value) if isinstance(value, list) else value
        elif field.name in required:
            # It stands on the command line, where tyro finds it, or says that it is missing.
            values[field.name] = tyro.MISSING
    return config(**values)


def fits(value, hint) -> bool:
    """Return whether a value that JSON has given back is one of a field of that type."""
    parts = get_args(hint)
    origin = get_origin(hint)
    if origin is Literal:
        return value in parts
    if origin is tuple:
        # (str, ...) or (int, int): all items are of one type.
        return isinstance(value, list) and all(fits(item, parts[0]) for item in value)
    if parts:  # int | None
        return any(fits(value, part) for part in parts)
    if hint is float:
        return type(value) in (int, float)
    # Not isinstance: True is an int for Python, and no number of steps.
    return type(value) is hint


def given_flags(config: type, arguments: list[str]) -> dict[str, str]:
    """Return name -> the first word behind it, of the flags that are named on the command line."""
    names = {field.name for field in fields(config)}
    given = {}
    for i, word in enumerate(arguments):
        # --data=A as well as --data A; tyro takes --save_every for --save-every.
        flag, is_joined, value = word.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if name not in names:
            # --no-fused-loss names fused_loss.
            name = name.removeprefix("no_")
        if flag.startswith("--") and name in names:
            following = arguments[i + 1 : i + 2]
            given[name] = value if is_joined else "".join(following)
    return given
