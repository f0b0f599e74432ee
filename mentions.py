"""Which object a region stands for: the mention that the text before its <mask> ends with."""

import re
from collections.abc import Iterable

# A character that goes on with a word: not in scripts that write no blanks (Thai to Khmer, kana,
# Han).
LETTER = re.compile(r"[^\W\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]|-")


def object_of(text: str, mentions: Iterable[str]) -> str | None:
    """Find the longest of the mentions, in whole words, that the text ends with.

    Case and closing marks don't count.
    """
    text = without_closing_marks(text)
    fitting = [m for m in mentions if ends_with_words(text, without_closing_marks(m))]
    return max(fitting, key=len, default=None)


def without_closing_marks(text: str) -> str:
    """Strip a text of its case and of blanks, brackets and punctuation at its end."""
    return re.sub(r"\W+$", "", text.strip().lower())


def ends_with_words(text: str, words: str) -> bool:
    """Whether a text ends with words, as words: "armchair" doesn't with "chair"."""
    if not words or not text.endswith(words):
        return False
    start = len(text) - len(words)
    begins_within = start > 0 and LETTER.match(text, start - 1) and LETTER.match(text, start)
    return not begins_within
