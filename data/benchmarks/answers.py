"""What a response says: the letter, number or text that answers a question.

Everything here reads one answer or none; none is wrong. In <answer> only the forms count that
srreal.answer_score takes, or an option's text; of letters only those that the question has options
for. Without <answer> it is what the last "answer is X"
says, else the only letter (number) in the text, or a text of a few words. Where an A may be an
article beside another letter, none. Numbers are signed, and may have a unit.
"""

import math
import re

import numpy as np

from srreal import CHOICE, QUANTITY, UNITS, Example, answer_score, number

LETTERS = "ABCDEFGH"
# An option of a question, each in its line or all in one. data/rationale.py reads them so, too.
OPTION = re.compile(
    r"(?<![\w(])\(?([A-H])[.)]\s*(.+?)(?=\s+\(?[A-H][.)]|\s*$|\.?\s+(?:Please|Answer)\b)", re.M
)
# What an option may begin with: "A.", "A)", "(A)", "A:".
MARKER = re.compile(r"(?<![\w(])\(?([A-H])[.):](?=\s)")
SAYS = r"\b(?i:answer(?:\s+is\b\s*:?|\s*:))[\s*_\"'`]*"
# In lower case, b to h are no words, and a is none at the end or before a sign.
EXPLICIT = re.compile(
    SAYS + r"(?:[Oo]ption\s+)?[(\[{]?([A-Hb-h]|a(?=[^\w\s]|\s*(?:\n|$)))(?!\.?\w|['’-])"
    r"(?!\s*(?:or|and|/)\s*\(?[A-Ha-h]\b)"
)
# A letter that is a word of its own; and one that is surely no article, as A is in "A chair".
ALONE = r"(?<![\w'’-])({})(?![\w'’-])"
NO_NOUN = "is|are|was|or|and|because|since|as|but|for|seems|looks|appears|has|would|must|should|can"
NO_ARTICLE = (
    r"[B-H]|(?<=[Oo]ption )A|(?<=[Cc]hoice )A|(?<=[Ll]etter )A"
    rf"|A(?![ \t]+(?!(?:{NO_NOUN})\b)\w)"
)
ANY_LETTER = re.compile(ALONE.format("[A-H]"))
SURE_LETTER = re.compile(ALONE.format(NO_ARTICLE))
SAID_NUMBER = re.compile(SAYS + r"\(?" + QUANTITY.pattern + r"(?![\w.]*\w)")
ANY_NUMBER = re.compile(rf"(?<![\w.,^+\u2212-]){QUANTITY.pattern}(?![\w^]|[.,][0-9])")
ASKED_UNIT = re.compile(rf"\b(?:in|how many) ({'|'.join(UNITS)})\b", re.I)
FEW = 4  # words of a response that can be an answer by itself; more is prose


def answer_block(response: str) -> str | None:
    """Return what stands in the first <answer> block, or None."""
    inside, closed, _ = response.partition("<answer>")[2].partition("</answer>")
    return inside if closed else None


def answer_text(response: str) -> str:
    """Return what a published rule reads: the first <answer> block, else the whole response."""
    block = answer_block(response)
    return response if block is None else block


def options_of(question: str) -> list[tuple[str, str]]:
    """Return the letters and texts of a question's options, which come in order; [] without any."""
    markers = option_markers(question)
    options = []
    ends = [marker.start() for marker in markers[1:]]
    if markers:
        ends.append(len(question))
    for marker, end in zip(markers, ends, strict=True):
        text = question[marker.end() : end].strip().split("\n")[0]
        options.append((marker[1], text.rstrip(" ,;")))
    return options


def option_markers(question: str) -> list[re.Match]:
    """Return the letters that options begin with; [] without any."""
    every = list(MARKER.finditer(question))
    # A question may have a list of its own, as of things to be put in order. So what stands behind
    # "Options:" goes first, and of several lists the last.
    announced = question.rfind("Options:")
    behind = [marker for marker in every if marker.start() > announced]
    for markers in (behind, every):
        # Those that begin a line are a list; letters within a line may be labels it speaks of.
        leading = [marker for marker in markers if begins_line(question, marker)]
        if lists := runs(leading):
            return lists[-1]
        if within := runs(markers):
            # The last of the longest.
            return max(reversed(within), key=len)
    return []


def begins_line(question: str, marker: re.Match) -> bool:
    return question[: marker.start()].rstrip(" ")[-1:] in ("", "\n")


def runs(markers: list[re.Match]) -> list[list[re.Match]]:
    """Return the runs A, B, ... of at least two letters, one for each A that begins one."""
    found = []
    for i, first in enumerate(markers):
        if first[1] != "A":
            continue
        run = [first]
        for marker in markers[i + 1 :]:
            if len(run) < len(LETTERS) and marker[1] == LETTERS[len(run)]:
                run.append(marker)
        if len(run) > 1:
            found.append(run)
    return found


def count_options(question: str) -> int:
    return len(options_of(question))


def plain(text: str) -> str:
    return " ".join(text.lower().split()).removesuffix(".")


def read_choice(response: str, question: str, truth: str = "A") -> str | None:
    """Return the letter that a response chooses, or None.

    There are as many letters as the question shows options, and at least those up to the truth.
    """
    # An <answer> is taken at its word. Elsewhere the last "answer is X" goes first, and letters
    # that are surely no articles may contradict each other.
    text = answer_text(response).strip()
    options = options_of(question)
    shown = len(options) or len(LETTERS)
    letters = LETTERS[: max(shown, LETTERS.index(truth) + 1)]
    sure = set()
    if answer_block(response) is None:
        explicit = [said for said in EXPLICIT.findall(text) if said.upper() in letters]
        if explicit:
            return explicit[-1].upper()
        sure = set(SURE_LETTER.findall(text)) & set(letters)
    for letter in letters:
        # Another sure letter speaks against it: "A. It is near.\nB. It is far."
        if sure <= {letter} and re.fullmatch(CHOICE.replace("L", letter), text, re.I | re.S):
            return letter
    # The option's text in place of its letter.
    for letter, option in OPTION.findall(question) + options:
        if plain(option) == plain(text) and letter in letters:
            return letter
    if len(sure) == 1 and sure == set(ANY_LETTER.findall(text)) & set(letters):
        return sure.pop()
    return None


def read_number(response: str, question: str) -> float | None:
    """Return the number that a response states, in the unit that is asked for, else in metres."""
    found = find_quantity(response)
    if not found:
        return None
    value, unit = found.groups()
    stated = number(f"{value} {unit or 'm'}")
    asked = ASKED_UNIT.search(question)
    # A number without a unit is in the one that is asked for.
    return stated / number(f"1 {asked[1]}") if unit and asked else stated


def find_quantity(response: str) -> re.Match | None:
    block = answer_block(response)
    if block is not None:
        return QUANTITY.fullmatch(block.strip())
    text = response.replace("**", "").strip()
    if alone := QUANTITY.fullmatch(text):
        return alone
    if explicit := list(SAID_NUMBER.finditer(text)):
        return explicit[-1]
    # The same number twice is one answer, also in other units.
    every = list(ANY_NUMBER.finditer(text))
    different = {number(found[0]) for found in every}
    return every[0] if len(different) == 1 else None


def said_text(text: str) -> str | None:
    """Return what the last "answer is" says, to the end of its sentence."""
    ends = [found.end() for found in re.finditer(SAYS, text)]
    if not ends:
        return None
    sentence = re.split(r"[.!](?:\s|$)|\n", text[ends[-1] :], maxsplit=1)[0]
    return sentence.strip(" *_\"'`") or None


def read_text(response: str, words: int = FEW) -> str | None:
    """Return what <answer> holds or "answer is" says, else a response of at most so many words."""
    # Bold type around a short answer is no part of it.
    text = answer_block(response)
    if text is None:
        whole = response.replace("**", "")
        text = said_text(whole)
        if text is None and len(whole.split()) <= words:
            text = whole
    return plain(text or "") or None


# ---- Scores: 0..1, or None where no answer can be read


def robust(response: str, example: Example) -> float | None:
    """Compare a letter, a number or a text with the truth."""
    truth = example.answer.strip()
    if truth in tuple(LETTERS):
        letter = read_choice(response, example.question, truth)
        return None if letter is None else float(letter == truth)
    if QUANTITY.fullmatch(truth) and math.isfinite(number(truth)):
        value = read_number(response, example.question)
        true = read_number(truth, example.question)
        return None if value is None else float(math.isclose(value, true, abs_tol=1e-9))
    said = read_text(response, max(FEW, len(truth.split())))
    return None if said is None else answer_score(said, example.answer)


THRESHOLDS = np.linspace(0.5, 0.95, 10)
# For `mra`: ties of relative errors count as right, whichever way their floats fall.
SLACK = 1e-9


def mra(value: float, true: float, slack: float = 0.0) -> float:
    """Mean relative accuracy: the share of thresholds t with |value - true| / |true| <= 1 - t.

    A truth of 0 takes the absolute error. slack: for ties, which fall as numpy's floats do.
    """
    error = value - true if true == 0 else (value - true) / true
    return float((abs(error) <= 1 - THRESHOLDS + slack).mean())
