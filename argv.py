"""What a command line may say that tyro doesn't take: a flag of several values, given twice."""

from typing import get_args, get_origin, get_type_hints


def join_repeated(arguments: list[str], config: type) -> list[str]:
    """Return the arguments with `--data A --data B` as `--data A B`; tyro alone would keep B.

    config: the dataclass of the flags. Those of several values are its tuples of any length.
    """
    several = set()
    for name, hint in get_type_hints(config).items():
        if get_origin(hint) is tuple and ... in get_args(hint):
            several.add(name)
    groups: list[list[str]] = []  # a flag with its values
    for argument in arguments:
        if argument.startswith("--") or not groups:
            groups.append([argument])
        else:
            groups[-1].append(argument)
    joined = []
    first: dict[str, list[str]] = {}  # by name, the group that takes the values of later ones
    for group in groups:
        flag, equals, value = group[0].partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if name not in several:
            joined.append(group)
            continue
        values = [value, *group[1:]] if equals else group[1:]
        if name in first:
            first[name] += values
        else:
            first[name] = [flag, *values]
            joined.append(first[name])
    words = []
    for group in joined:
        words += group
    return words
