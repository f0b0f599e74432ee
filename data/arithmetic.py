"""Checks a text's numbers: computes its equations again, and traces each number to its source.

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

# No part of a word, of a longer number or of a percentage.
NUMBER = re.compile(r"(?<![\w.])\d+(?:\.\d+)?(?![\w%])")
SIGN = re.compile("[=~<>]")
# Possessive (++): no way back, so that the time stays linear.
CHAIN = re.compile(r"(?:sqrt|[-+*/^().\d\s=~<>])++")
# Says of a length in which whole metre it lies.
BETWEEN = re.compile(r"\bbetween (\d+(?:\.\d+)?) ?and (\d+(?:\.\d+)?)")
CLAUSE = re.compile(r"[.,;:](?:\s|$)|\n")
SIGNS = {
    "×": "*",
    "·": "*",
    "−": "-",
    "≈": "~",
    "≤": "<",
    "≥": ">",
    "²": "^2",
    "√": "sqrt",
}
PLAIN = str.maketrans(SIGNS)
FORMS = (
    (r"\\sqrt\{([^{}]*)\}", r"sqrt(\1)"),
    (r"\\approx", "~"),
    (r"\\times|\\cdot", "*"),
    (r"\$", ""),
    (r"(?<=\d)\s*+(?:m|met(?:er|re)s?)\b", ""),
    (r"sqrt\s*+(\d++(?:\.\d+)?)", r"sqrt(\1)"),
)
# Sides are parsed as Python and walked: nothing in a text is ever run.
OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: math.pow,
}
LONGEST = 200  # characters of a side


def rounded(value: float) -> float:
    """Round as the detect block writes a number: two decimals, and never -0.0."""
    return round(value, 2) + 0.0


# Names of a step's ways along x, y and z of the camera: against the axis, and along it.
SIDES = ("left", "right")
DEPTHS = ("nearer", "farther")
WAYS = (SIDES, ("up", "down"), DEPTHS)


def by_sign(value: float, names: tuple[str, str]) -> str:
    """Return the second name of a positive value, else the first."""
    return names[1] if value > 0 else names[0]


def plain(text: str) -> str:
    """Return the text without units and TeX."""
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
    """Compute one side of an equation; nan where the text is none."""
    if len(side) > LONGEST:
        return math.nan
    try:
        tree = ast.parse(side.strip().replace("^", "**"), mode="eval")
        return walk(tree.body)
    # Deep nesting ends the parser in a RecursionError or a MemoryError.
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        return math.nan


def equations(text: str) -> list[tuple[str, str, str]]:
    """Return (left, sign, right) of all that can be computed again."""
    found = []
    for clause in CLAUSE.split(plain(text)):
        for chain in CHAIN.findall(clause):
            sides = pairwise(SIGN.split(chain))
            for (left, right), sign in zip(sides, SIGN.findall(chain), strict=True):
                if math.isfinite(value(left) - value(right)):
                    found.append((left, sign, right))
    return found


def half_unit(number: str) -> float:
    """Return half a unit of the number's last digit, which rounding may have changed."""
    decimals = len(number.partition(".")[2])
    return 0.5 * 10.0**-decimals


def wrong(left: str, sign: str, right: str) -> bool:
    """Return whether an equation is off by more than the rounding of its right side explains."""
    gap = value(left) - value(right)
    # Beside float's own error.
    slack = sum(map(half_unit, NUMBER.findall(right))) + 1e-9
    match sign:
        case "=":
            return abs(gap) > slack
        case "~":
            return abs(gap) > 2 * slack
        case "<":
            return gap >= 0
    return gap <= 0


def unknown_numbers(
    text: str, given: str, points: Iterable[tuple[float, float, float]]
) -> list[str]:
    """Return the text's numbers that neither `given` nor points (x, y, z) in metres explain.

    From points follow steps between two (or the origin), distances, squares of these; then the
    result of each equation from known numbers. All up to half a unit of the last digit; a whole
    one, where a number stands in "between 3 and 4 m".
    """
    between = set()
    for pair in BETWEEN.findall(plain(text)):
        between |= {*pair}
    # Small counts and the angles of turns come from nowhere else.
    known = {0.0, 1.0, 2.0, 90.0, 180.0, 360.0, *map(float, NUMBER.findall(given))}
    measures = measures_of(points)

    def is_known(number: str) -> bool:
        near = half_unit(number) * (2 if number in between else 1) + 1e-9
        # Centres are rounded to 0.01 m, and so is what is measured between them.
        return is_near(number, known, near) or is_near(number, measures, near + 0.011)

    # In the order of the text: a result may be used behind its equation.
    for left, _, right in equations(text):
        if all(map(is_known, NUMBER.findall(left))):
            known |= {*map(float, NUMBER.findall(right))}
    numbers = dict.fromkeys(NUMBER.findall(plain(text)))
    return [number for number in numbers if not is_known(number)]


def is_near(number: str, values: set[float], distance: float) -> bool:
    return any(abs(float(number) - value) <= distance for value in values)


def measures_of(points: Iterable) -> set[float]:
    """Return all steps, distances and their squares between two points, or one and the origin."""
    measures = set()
    for a, b in combinations([(0.0, 0.0, 0.0), *points], 2):
        steps = [abs(q - p) for p, q in zip(a, b, strict=True)]
        distance = math.hypot(*steps)
        measures |= {*steps, distance}
        measures |= {x * x for x in steps}
        measures.add(distance**2)
        # Some work with steps of one decimal.
        measures.add(math.hypot(*(round(x, 1) for x in steps)))
    return measures
