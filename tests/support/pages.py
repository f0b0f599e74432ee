"""What tests of docs/ share: pages that are generated, their tables, and the glossary's words."""

import re

from commands import ROOT

DECIMAL = re.compile(r"[+-]?\d+\.\d+")
# Two CPUs: three units of the last digit that is printed, or one per cent.
UNITS = 3
SHARE = 0.01


def differences(written: str, committed: str) -> list[str]:
    """Return the lines in which two texts differ by more than two CPUs' rounding of decimals.

    Words and integers have to be equal; of blanks only whether there are some, since columns move
    with a sign.
    """
    ours = written.splitlines()
    theirs = committed.splitlines()
    if len(ours) != len(theirs):
        return [f"{len(ours)} lines written, {len(theirs)} committed"]
    found = []
    for number, (a, b) in enumerate(zip(ours, theirs, strict=True), 1):
        if a != b and not are_close(a, b):
            found.append(f"line {number}: {a!r} written, {b!r} committed")
    return found


def are_close(a: str, b: str) -> bool:
    if frame(a) != frame(b):
        return False
    pairs = zip(DECIMAL.findall(a), DECIMAL.findall(b), strict=True)
    return all(close(x, y) for x, y in pairs)


def frame(line: str) -> str:
    """Return a line with its decimals taken out, and its blanks made one."""
    return " ".join(DECIMAL.sub(" # ", line).split())


def close(x: str, y: str) -> bool:
    digits = len(y.partition(".")[2])
    allowed = max(UNITS * 10.0**-digits, SHARE * abs(float(y)))
    return abs(float(x) - float(y)) <= allowed * (1 + 1e-9)


def first_cells(page: str) -> list[str]:
    """Return the first cell of each line of a page's tables, headings left out."""
    cells = []
    lines = page.splitlines()
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        is_heading = re.match(r"\|[\s|:-]+$", following)
        if line.startswith("|") and not is_heading and not re.match(r"\|[\s|:-]+$", line):
            cells.append(line.split("|")[1].strip())
    return cells


def glossary() -> set[str]:
    """Return the words that docs/glossary.md explains, in lower case."""
    words = set()
    for cell in first_cells((ROOT / "docs" / "glossary.md").read_text()):
        words.update(word.strip().lower() for word in cell.split(","))
    return words


def words_in_italics(page: str) -> set[str]:
    """Return what stands between single stars, code blocks and "Read:" lines left out."""
    text = re.sub(r"```.*?```", "", page, flags=re.S)
    found = re.findall(r"(?<![*\w])\*([^*\n]+)\*(?!\*)", text)
    return {word.lower() for word in found if not word.startswith("Read:")}
