"""The rows of a parquet file, in bounded memory; data/rows.py has those of JSON."""

from collections.abc import Iterator
from pathlib import Path

from data.rows import Bad


def parquet_rows(file: Path, field: str = "row") -> Iterator[tuple[int, dict | Bad]]:
    """Yield (number from 1, row); at last, where it is damaged, what is wrong with a field."""
    import pyarrow.parquet  # takes a second, and only such files need it

    number = 0
    try:
        for table in pyarrow.parquet.ParquetFile(file).iter_batches(16):
            for row in table.to_pylist():
                number += 1
                yield number, row
    except (ValueError, OSError) as error:  # pyarrow's own errors are these, too
        yield number, Bad(field, f"unreadable: {error}")
