"""Checks a text's numbers: its equations are computed again, its numbers traced to where they come
from.

An equation is a chain of sides of digits, + - * / ^ ( ) and sqrt, joined by = ~ < >; units, TeX and
signs such as ≈ are brought to these. All else is prose, and so is a side longer than LONGEST:
equations() is linear in the text. unknown_numbers() compares the text's numbers with all known
ones: the caller bounds the text.
"""

import ast
import math
import operator
import re
from collections.abc import Iterable
from itertools import combinations, pairwise

NUMBER = re.compile(r"(?<![\w.])\d+(?:\.\d+)?(?![\w%])")
SIGN, CHAIN = re.compile("[=~<>]"), re.compile(r"(?:sqrt|[-+*/^().\d\s=~<>])++")
BETWEEN = re.compile(r"\bbetween (\d+(?:\.\d+)?) ?and (\d+(?:\.\d+)?)")
CLAUSE = re.compile(r"[.,;:](?:\s|$)|\n")
PLAIN = str.maketrans(
    dict(zip("×·−≈≤≥²√", ["*", "*", "-", "~", "<", ">", "^2", "sqrt"], strict=True))
)
FORMS = (
    (r"\\sqrt\{([^{}]*)\}", r"sqrt(\1)"),
    (r"\\approx", "~"),
    (r"\\times|\\cdot", "*"),
    (r"\$", ""),
    (r"(?<=\d)\s*+(?:m|met(?:er|re)s?)\b", ""),
    (r"sqrt\s*+(\d++(?:\.\d+)?)", r"sqrt(\1)"),
)
OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: math.pow,
}
LONGEST = 200  # characters of a side


def plain(text: str) -> str:
    """Without units and TeX."""
    text = text.translate(PLAIN)
    for form, instead in FORMS:
        text = re.sub(form, instead, text)
    return text


def walk(node) -> float:
    match node:
        case ast.Constant(value=int() | float()):
            return float(node.value)
        case ast.UnaryOp(op=ast.USub()):
            return -walk(node.operand)
        case ast.BinOp() if type(node.op) in OPERATORS:
            return OPERATORS[type(node.op)](walk(node.left), walk(node.right))
        case ast.Call(func=ast.Name(id="sqrt"), args=[inner]):
            return math.sqrt(walk(inner))
    raise ValueError(node)


def value(side: str) -> float:
    """Of one side of an equation; nan where it is none."""
    try:
        side = side.strip().replace("^", "**") if len(side) <= LONGEST else ""
        return walk(ast.parse(side, mode="eval").body)
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        return math.nan


def equations(text: str) -> list[tuple[str, str, str]]:
    """(left, sign, right) of all that can be computed again."""
    found = []
    for chain in (chain for clause in CLAUSE.split(plain(text)) for chain in CHAIN.findall(clause)):
        pairs = zip(pairwise(SIGN.split(chain)), SIGN.findall(chain), strict=True)
        found += [(a, sign, b) for (a, b), sign in pairs if math.isfinite(value(a) - value(b))]
    return found


def rounded(value: float) -> float:
    """Round as the detect block writes a number: two decimals, and never -0.0."""
    return round(value, 2) + 0.0


def half_unit(number: str) -> float:
    return 0.5 * 10.0 ** -len(number.partition(".")[2])  # of its last digit


def wrong(left: str, sign: str, right: str) -> bool:
    """Beyond what the rounding of the right side explains."""
    gap, slack = value(left) - value(right), sum(map(half_unit, NUMBER.findall(right))) + 1e-9
    return {"=": abs(gap) > slack, "~": abs(gap) > 2 * slack, "<": gap >= 0, ">": gap <= 0}[sign]


def unknown_numbers(
    text: str, given: str, points: Iterable[tuple[float, float, float]]
) -> list[str]:
    """Numbers that `given` lacks and that don't follow from points (x, y, z) in metres: neither
    steps between two (or the origin), nor distances, nor squares of these, nor an equation's result
    from known numbers. All up to half a unit of the last digit; a unit, where they stand in
    "between 3 and 4 m"."""
    pairs = combinations([(0.0, 0.0, 0.0), *points], 2)
    steps = [[abs(q - p) for p, q in zip(a, b, strict=True)] for a, b in pairs]
    measured = {
        v for s in steps for v in (*s, *(x * x for x in s), math.hypot(*s), math.hypot(*s) ** 2)
    }
    measured |= {math.hypot(*(round(x, 1) for x in s)) for s in steps}  # some work with one decimal
    between = {n for pair in BETWEEN.findall(plain(text)) for n in pair}
    known = {0.0, 1.0, 2.0, 90.0, 180.0, 360.0, *map(float, NUMBER.findall(given))}

    def fits(number: str) -> bool:
        n, near = float(number), half_unit(number) * (2 if number in between else 1) + 1e-9
        return any(abs(n - v) <= near for v in known) or any(
            abs(n - v) <= near + 0.011 for v in measured
        )

    for left, _, right in equations(text):
        if all(map(fits, NUMBER.findall(left))):
            known |= {*map(float, NUMBER.findall(right))}
    return [number for number in dict.fromkeys(NUMBER.findall(plain(text))) if not fits(number)]
