r"""Whether an answer in LaTeX says what the truth says: by math-verify, which knows how to compute.

    2 \sqrt { 221 }   is   2\sqrt{221},  $2\sqrt{221}$,  \boxed{2\sqrt{221}},  \sqrt{884}

math-verify takes what it finds in a text, and computes all that it reads. A reward may do neither:

 1. The whole answer has to be one expression: `3 or 2\sqrt{221}` and two \boxed{} earn nothing.
    Beyond arithmetic it may use no sign and no word more often than the truth does, so a list, an
    equation, \approx or \max is an answer only where the truth is one.
 2. 9^{9^{9^9}} is refused unread. What else would take for ever computes in C, where no signal
    handler of Python's runs; so a process of its own compares, and the kernel ends it (`serve`).

The package is optional: data.load refuses rows with such truths where it is missing.
"""

import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from functools import lru_cache
from threading import Lock

LONGEST = 300  # characters of a truth; what is longer is prose
# CPU seconds of a comparison, not of the clock: the same on a busy machine. Most take 0.02.
CPU_SECONDS = 2.0
# Numbers that differ by more, relative to the truth, are not shown to math-verify: it would look
# long for a common form, and compares six decimals, of which 0.0 has all those of 10^{-8}.
TOLERANCE = 1e-5

# ---- Texts

MARKS = re.compile(r"[\\^$]")
PROSE = re.compile(r"(?<![\\A-Za-z])[A-Za-z][a-z]{2,}")
SIGNS = {
    "°": r"^\circ ",
    "×": r"\times ",
    "·": r"\cdot ",
    "÷": r"\div ",
    "−": "-",
    "π": r"\pi ",
    "²": "^2",
    "³": "^3",
    "**": "^",
    "≤": r"\leq ",
    "≥": r"\geq ",
    "<=": r"\leq ",
    ">=": r"\geq ",
}
# LaTeX's own sign of a root takes one digit.
ROOT = re.compile(r"√\s*([0-9]+(?:\.[0-9]+)?|[A-Za-z])")
WRAPPERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), (r"\boxed{", "}"))
# A unit behind an expression. A bare `m` may be a variable; in \text{} it is none.
WORDS = (
    "cm|mm|km|ft|feet|in|inch(?:es)?|(?:centi|milli|kilo)?met(?:er|re)s?|yards?|miles?|degrees?"
    "|units?"
)
AREA = r"(?:(?:square|sq\.?|cubic)\s+)?"
UNIT = re.compile(
    rf"(?<![A-Za-z\\])(?:{AREA}(?:{WORDS})|\\(?:text|mathrm|mbox)\s*\{{\s*{AREA}(?:m|{WORDS})\s*\}})"
    r"(?:\s*\^\s*\{?\s*[23]\s*\}?)?$"
)
# What any answer may use; all else only as often as the truth.
TOKEN = re.compile(r"\\(?:[A-Za-z]+|.)|(?:or|and)(?![A-Za-z])|[A-Za-z]{4,}|[A-Z]{2,}|[^\w\s]")
COMMANDS = r"\frac \dfrac \tfrac \sqrt \pi \cdot \times \div \left \right \circ \text \mathrm"
FREE = {*COMMANDS.split(), *"{}()[]+-*/^._", r"\,", r"\!", r"\;", r"\ ", "sqrt"}
# A power of a power or in an exponent, and exponents from 100 on: 9^{9^9}, (9^9)^9, 10^{1000}.
TOWER = re.compile(r"\^[{(]*-?(?:(?:\d+|[A-Za-z])[)}]*\^|\d{3})")
THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")


def is_latex(truth: str) -> bool:
    r"""Return whether a text is an expression in LaTeX: it has a \, ^ or $, and is no sentence."""
    if not MARKS.search(truth) or len(truth) > LONGEST:
        return False
    expression, _ = split_unit(plain(truth))
    return len(PROSE.findall(expression)) < 2


def plain(text: str) -> str:
    """Return an expression in one line, out of $...$ and one \\boxed{}, in LaTeX's own signs."""
    text = ROOT.sub(r"\\sqrt{\1}", text).replace("√", "sqrt")
    for sign, instead in SIGNS.items():
        text = text.replace(sign, instead)
    text = " ".join(text.split()).removesuffix(".")
    for opening, closing in WRAPPERS:
        inside = text.removeprefix(opening).removesuffix(closing)
        if text == f"{opening}{inside}{closing}":
            text = inside.strip()
    # In brackets it may be a list, or an interval.
    if not re.search(r"[(\[]|\\\{", text):
        text = THOUSANDS.sub("", text)
    return text.removesuffix(".")


def split_unit(text: str) -> tuple[str, str]:
    """Return an expression and the unit behind it, both without blanks that say nothing."""
    match = UNIT.search(text)
    expression = text[: match.start()] if match else text
    unit = re.sub(r"\\(?:text|mathrm|mbox)|[\s{}]", "", match[0]) if match else ""
    # A blank between two letters or digits stays, as in `\frac 12`.
    return re.sub(r"(?<!\w)\s+|\s+(?!\w)", "", expression), unit


def may_be_compared(truth: str, answer: str) -> bool:
    """Return whether the answer is one expression, which uses nothing that the truth doesn't."""
    # What is much longer than the truth has not been worked out.
    if not answer or len(answer) > 3 * len(truth) + 50 or TOWER.search(answer):
        return False
    in_truth = Counter(TOKEN.findall(truth))
    for token, count in Counter(TOKEN.findall(answer)).items():
        if token not in FREE and count > in_truth[token]:
            return False
    return True


# ---- Comparing


def is_installed() -> bool:
    """Return whether math-verify can be imported, with all that it needs."""
    try:
        import math_verify  # noqa: F401
    except ImportError:
        return False
    return True


def equal(truth: str, answer: str) -> bool:
    """Return whether an answer equals a truth of which `is_latex` holds. Never raises.

    A unit behind the answer has to be the truth's, where that has one. Without math-verify only
    equal texts are equal.
    """
    if len(answer) > 4 * LONGEST:
        return False
    truth, true_unit = split_unit(plain(truth))
    answer, unit = split_unit(plain(answer))
    # Either may leave it out: "5" answers "5 cm". Units are not converted.
    if unit and true_unit and unit != true_unit:
        return False
    if truth == answer:
        return True
    return may_be_compared(truth, answer) and is_installed() and verified(truth, answer)


# The completions of a group often agree.
@lru_cache(10_000)
def verified(truth: str, answer: str) -> bool:
    return COMPARER.ask(truth, answer)


class Comparer:
    """The process that compares: started at the first question, and again where it was ended."""

    def __init__(self):
        self.process: subprocess.Popen | None = None
        self.lock = Lock()  # a question and its reply belong together

    def ask(self, truth: str, answer: str) -> bool:
        with self.lock:
            if self.process is None:
                self.process = start()
            reply = ""
            try:
                self.process.stdin.write(json.dumps([truth, answer]) + "\n")
                self.process.stdin.flush()
                reply = self.process.stdout.readline()
            except BrokenPipeError:
                pass
            finally:
                # It was ended, or Ctrl-C came before the reply, which nobody may take for the next.
                if not reply:
                    self.stop()
            return reply == "equal\n"

    def stop(self) -> None:
        self.process.kill()
        # Waits, so that no zombie is left, and closes the pipes.
        self.process.communicate()
        self.process = None


COMPARER = Comparer()
READY = "ready\n"


def start() -> subprocess.Popen:
    """Start the process that compares. It ends when its input does, so with this process."""
    process = subprocess.Popen(
        [sys.executable, "-P", __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        # What can be imported here can be there.
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        # A terminal's Ctrl-C is for the command alone.
        start_new_session=True,
    )
    # Else every answer would be wrong from here on, and nobody would know why.
    if process.stdout.readline() != READY:
        raise RuntimeError(f"{__file__} can't import math-verify, which can be imported here")
    return process


# ---- In the process that compares


def serve() -> None:
    """Answer each line [truth, answer] by a line, until the input ends.

    When the timer runs out, the kernel ends this process, whatever it is computing: SIGPROF has no
    handler here. No line is the reply then.
    """
    import math_verify  # noqa: F401  before any time is taken

    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no reply
    print(READY, end="", file=replies, flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        try:
            same = compare(*json.loads(line))
        except Exception:  # of an expression that sympy can't handle: of any kind
            same = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        print("equal" if same else "different", file=replies, flush=True)


def compare(truth: str, answer: str) -> bool:
    """Return whether two expressions are equal; raises all sorts where one can't be read."""
    from math_verify import verify
    from sympy import Eq, solve

    # math-verify takes 50 for 50 %.
    if "%" not in truth and are_far_apart(value_of(truth), value_of(answer)):
        return False
    # It compares the solutions of equations, where it finds no difference if there are none.
    if isinstance(read(truth), Eq) and not solve(read(truth)):
        return False
    # The truth comes first: `x = 5` may be said as 5, but not the other way round. Its own timeout
    # is off, as the timer stands above it.
    return verify(read(truth), read(answer), timeout_seconds=None)


# A truth is compared with every completion of its group, and in eval with all other truths.
@lru_cache(10_000)
def read(text: str):
    """Return the sympy expression of all of a text, which isn't computed yet."""
    from latex2sympy2_extended import NormalizationConfig, latex2sympy, normalize_latex
    from math_verify.grader import should_treat_as_complex

    config = NormalizationConfig(malformed_operators=True, nits=True, boxed="none")
    return latex2sympy(
        normalize_latex(text, config),
        is_real=not should_treat_as_complex(text),
        convert_degrees=False,
        normalization_config=None,
    )


@lru_cache(10_000)
def value_of(text: str) -> complex | None:
    """Return the number that a text stands for; None of an expression in variables, a list ..."""
    expression = read(text)
    return complex(expression) if getattr(expression, "is_number", False) else None


def are_far_apart(gold: complex | None, said: complex | None) -> bool:
    if gold is None or said is None:
        return False
    return abs(gold - said) > TOLERANCE * abs(gold)


if __name__ == "__main__":
    serve()
