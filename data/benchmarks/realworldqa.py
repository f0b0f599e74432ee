"""RealWorldQA: questions about pictures from cars and phones.

official  lmms-eval's rule, which ERQA shares (letter_or_text): a truth of A to D against the letter
          that is read, any other by equality of the lower-cased text without its last dots.
"""

from collections.abc import Iterator

from data.benchmarks.means import by_sample
from data.benchmarks.schema import TEST, Benchmark, Item, Row, letter_or_text

# ---- Rows


def read(row: Row) -> Iterator[Item]:
    # Rows have no ids, and question and options are one text, which ends in its own instruction.
    name = f"realworldqa_{row.number}"
    yield Item(name, row.images("image"), row.text("answer"), "", row.text("question"))


REALWORLDQA = Benchmark(
    hub="xai-org/RealworldQA",
    rows=765,
    files=(TEST,),
    read=read,
    official=letter_or_text,
    aggregate=by_sample,
    others=("Qwen2.5-VL-7B", "Spatial-SSRL", {"overall": 68.63}),
)
