"""What each metric is, in a sentence, from the tables of docs/metrics.md and nowhere else."""

import re
from pathlib import Path

from eval_table import COLUMNS
from srreal import PATHS, REWARDS

PAGE = Path(__file__).parent.parent / "docs" / "metrics.md"
# A column of metrics.jsonl: val_ or val0_ (of a validation), the path, and what was measured.
# Both prefixes may be missing: val_lor_reward, lor_reward and reward are all matched.
COLUMN = re.compile(rf"(val0?_)?(?:({'|'.join(PATHS)})_)?(.+)")
VALIDATIONS = {
    "val_": "On --eval-data, greedy, after the step's update. ",
    "val0_": "On --eval-data, greedy, before any update. ",
}


def read_tables(page: str) -> dict[str, str]:
    """Return name -> what it is, of the tables of a Markdown page whose second column says that.

    The first column holds one or several names in backticks; a third on what it means when the
    number leaves its range is added.
    """
    explained = {}
    headings: list[str] = []
    for line in page.splitlines():
        if not line.startswith("|"):
            headings = []
            continue
        # A bar inside of a cell is escaped.
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if not headings:
            headings = cells
        elif len(cells) == len(headings) and headings[1].startswith("what it is"):
            text = in_words(dict(zip(headings, cells, strict=True)))
            # A name in two tables means the same; the first one explains it.
            for name in re.findall(r"`([^`]+)`", cells[0]):
                explained.setdefault(name, text)
    return explained


def in_words(cells: dict[str, str]) -> str:
    """Join what a metric is and what it means when it leaves its range, without Markdown."""
    sentences = []
    for heading, text in cells.items():
        if heading.startswith("what it is"):
            sentences.insert(0, sentence(text))
        elif heading.startswith("seen") and text:
            sentences.append(sentence(f"seen: {text}"))
        elif heading.startswith("what it means") and text:
            sentences.append(sentence(text))
    return " ".join(sentences)


def sentence(text: str) -> str:
    text = re.sub(r"[`\\]|\*\*", "", text)
    # Of a link its text stays: the page has no docs/ beside it.
    text = re.sub(r"\[([^]]+)\]\([^)]+\)", r"\1", text)
    text = text[:1].upper() + text[1:]
    return text if text.endswith((".", "?", "!")) else f"{text}."


class Explained:
    """Looks names of metrics up: columns of metrics.jsonl, and keys of eval's results."""

    def __init__(self):
        # A copy of the tree may lack its docs; then nothing is explained but rewards.
        self.table = read_tables(PAGE.read_text()) if PAGE.exists() else {}

    def __call__(self, name: str) -> str:
        """Return what the metric is; "" where nobody has said it."""
        validation, _, measured = COLUMN.fullmatch(name).groups("")
        # eval's table has shorter headings than its keys: text_errors stands there as text m.
        known = self.table.get(measured) or self.table.get(COLUMNS.get(measured, measured))
        if known is None and measured in REWARDS:
            # A fork's own: what its function says of itself.
            words = (REWARDS[measured].__doc__ or "").strip().partition("\n")[0]
            known = sentence(words or f"{measured}, an entry of srreal.REWARDS")
        return VALIDATIONS.get(validation, "") + (known or "")
