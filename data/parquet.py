"""The rows of a parquet file, in bounded memory; data/rows.py has those of JSON."""

from collections.abc import Iterator
from pathlib import Path

from data.rows import Bad


def parquet_rows(file: Path, batch: int = 64) -> Iterator[tuple[int, dict | Bad]]:
    """Yield (number from 1, row); or at last (number of the last good row, what is wrong)."""
    import pyarrow.parquet  # takes a second, and only such files need it

    number = 0
    try:
        for table in pyarrow.parquet.ParquetFile(file).iter_batches(batch):
            for row in table.to_pylist():
                number += 1
                yield number, row
    except (ValueError, OSError) as error:  # pyarrow's own errors are these, too
        yield number, Bad("row", f"unreadable: {error}")
