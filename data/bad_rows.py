"""Rows that can't be used, said so that a thousand of them don't fill the screen."""

import os
import re
from pathlib import Path

from errors import UserError

EXAMPLES = 3  # of each reason
# Of more bad rows than MANY, only the commonest REASONS are spelled out.
MANY = 100
REASONS = 5
LONGEST = 400  # characters of a reason
FILE = "bad_rows.txt"


class BadRows(UserError, ValueError):
    """Rows that cannot be used: `.rows` holds (file, row, field, reason), rows counted from 1."""

    def __init__(self, rows: list[tuple]):
        super().__init__(rows)
        self.rows = rows

    def __len__(self) -> int:
        return len({(file, row) for file, row, *_ in self.rows})

    def by_kind(self) -> dict[str, list[tuple]]:
        """Return what is wrong -> its rows, the commonest first."""
        kinds: dict[str, list[tuple]] = {}
        for row in self.rows:
            _, _, field, reason = row
            # A reason's text up to the first colon is its kind; behind it stand the row's values.
            kinds.setdefault(f"{field}: {reason.partition(':')[0]}", []).append(row)
        return dict(sorted(kinds.items(), key=lambda kind: -len(kind[1])))

    def shown(self) -> dict[str, list[tuple]]:
        """Return what is wrong -> the rows that are spelled out."""
        kinds = list(self.by_kind().items())
        # More than that is one mistake made often; its rarer reasons would fill the screen.
        if len(self) > MANY:
            kinds = kinds[:REASONS]
        return {kind: rows[:EXAMPLES] for kind, rows in kinds}

    def __str__(self) -> str:
        lines = [f"{len(self)} rows cannot be used:"]
        shown = self.shown()
        rest = []
        for kind, rows in self.by_kind().items():
            if kind not in shown:
                rest += rows
                continue
            if len(rows) > 1:
                lines.append(f"{len(rows)} x {kind}")
            lines += map(line, shown[kind])
            if len(rows) > EXAMPLES:
                lines.append(f"... and {len(rows) - EXAMPLES} more")
        if rest:
            lines.append(f"... and {len(rest)} for other reasons")
        return "\n".join(lines)

    def summary(self, total: int) -> str:
        """Return a line: how many of all rows these are, and why."""
        why = [f"{len(rows)} x {kind}" for kind, rows in self.by_kind().items()]
        if len(why) > 2 * REASONS:
            why[2 * REASONS :] = ["..."]
        return f"{len(self)} of {total} rows: {'; '.join(why)}"

    def told(self, out: str | Path) -> str:
        """Return the text, whose whole list goes to a file in `out` if this doesn't show it all."""
        # Everything has been said already: no file for it.
        if sum(map(len, self.shown().values())) == len(self.rows):
            return str(self)
        return f"{self}\n{self.write(out)}"

    def write(self, out: str | Path) -> str:
        """Write the whole list into a folder; return a line that says where it is."""
        file = Path(out) / FILE
        text = "".join(f"{line(row)}\n" for row in self.rows)
        if os.environ.get("RANK", "0") == "0":
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                # A row's value may hold half a surrogate pair, which no encoding takes.
                file.write_text(text, errors="backslashreplace")
            except OSError as error:
                # Not raised: the bad rows are the news.
                return f"the whole list could not be written: {file}: {error.strerror}"
        return f"the whole list is in {file}"


def line(row: tuple) -> str:
    file, number, field, reason = row
    return f"{file}:{number}: {field}: {reason}"


def shortened(reason: str) -> str:
    """Return a reason as one line, without its middle if it is long: values may have any length."""
    reason = re.sub(r"\s*\n\s*", " ", reason.strip())
    if len(reason) <= LONGEST:
        return reason
    return f"{reason[: LONGEST - 100]} ... {reason[-80:]}"
