"""Print how densely the Python files of this repository read: a yardstick, not a test.

    python tests/density.py [FILE or FOLDER ...]

A token is a name, an operator, a number or a string; a code line is one that holds a token, where
docstrings don't count. Comment share: lines that are nothing but a comment, of all lines. A
comprehension is nested if it has two `for` or contains another one.
"""

import ast
import sys
import tokenize
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
COUNTED = {tokenize.NAME, tokenize.OP, tokenize.NUMBER, tokenize.STRING}
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
COMPREHENSION = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


@dataclass
class Counts:
    lines: int = 0
    comments: int = 0
    code: int = 0
    tokens: int = 0
    nested: int = 0

    def add(self, other: "Counts") -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    def row(self, name: str) -> str:
        density = self.tokens / max(self.code, 1)
        comments = 100 * self.comments / max(self.lines, 1)
        return (
            f"{density:11.1f} {self.tokens:7,} {self.code:6,} {self.nested:7} {comments:8.1f} %"
            f"  {name}"
        )


def docstring_lines(tree: ast.AST) -> set[int]:
    lines = set()
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            docstring = node.body[0]
            lines.update(range(docstring.lineno, docstring.end_lineno + 1))
    return lines


def is_nested(node: ast.AST) -> bool:
    if not isinstance(node, COMPREHENSION):
        return False
    inside = [inner for inner in ast.walk(node) if isinstance(inner, COMPREHENSION)]
    return len(node.generators) > 1 or len(inside) > 1  # the walk meets the node itself, too


def count(path: Path) -> Counts:
    source = path.read_text()
    tree = ast.parse(source)
    skipped = docstring_lines(tree)
    counts = Counts(lines=len(source.splitlines()))
    code_lines = set()
    with path.open("rb") as file:
        for token in tokenize.tokenize(file.readline):
            line = token.start[0]
            if token.type == tokenize.COMMENT:
                if token.line.lstrip().startswith("#"):
                    counts.comments += 1
            elif token.type in COUNTED and line not in skipped:
                counts.tokens += 1
                # A string may go on over several lines.
                code_lines.update(range(line, token.end[0] + 1))
    counts.code = len(code_lines)
    counts.nested = sum(is_nested(node) for node in ast.walk(tree))
    return counts


def python_files(paths: list[Path]) -> list[Path]:
    """Return the files named and those in the folders named, without tests and hidden folders."""
    files = []
    for path in paths:
        if path.is_file():
            files.append(path)
            continue
        for file in sorted(path.rglob("*.py")):
            folders = file.relative_to(path).parts[:-1]
            if not any(name in ("tests", "out") or name.startswith(".") for name in folders):
                files.append(file)
    return files


def main(arguments: list[str]) -> None:
    files = python_files([Path(argument) for argument in arguments] or [ROOT])
    rows = [(path, count(path)) for path in files]
    rows.sort(key=lambda row: row[1].tokens / max(row[1].code, 1), reverse=True)
    total = Counts()
    print("tokens/line  tokens   code  nested  comments")
    for path, counts in rows:
        print(counts.row(path.as_posix()))
        total.add(counts)
    print(total.row(f"{len(rows)} files"))


if __name__ == "__main__":
    main(sys.argv[1:])
