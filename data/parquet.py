"""The rows of parquet and arrow files, in bounded memory; data/rows.py has those of JSON."""

from collections.abc import Iterator
from pathlib import Path

from data.rows import Bad


def parquet_rows(file: Path, field: str = "row") -> Iterator[tuple[int, dict | Bad]]:
    """Yield (number from 1, row); at last, where it is damaged, what is wrong with a field."""
    import pyarrow.parquet  # takes a second, and only such files need it

    def batches():
        yield from pyarrow.parquet.ParquetFile(file).iter_batches(16)

    yield from rows_of(batches(), field)


def arrow_rows(file: Path, field: str = "row") -> Iterator[tuple[int, dict | Bad]]:
    """Yield the same of a file that `save_to_disk` of the library datasets has written."""
    import pyarrow

    def batches():
        with pyarrow.memory_map(str(file)) as stored:
            for batch in pyarrow.ipc.open_stream(stored):
                for start in range(0, len(batch), 16):
                    yield batch.slice(start, 16)

    yield from rows_of(batches(), field)


def rows_of(batches: Iterator, field: str) -> Iterator[tuple[int, dict | Bad]]:
    number = 0
    try:
        for batch in batches:
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except (ValueError, OSError) as error:  # pyarrow's own errors are these, too
        yield number, Bad(field, f"unreadable: {error}")


def column_names(file: Path) -> list[str]:
    """Return the names of a parquet file's columns; none where it can't be read."""
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_schema(file).names
    except (ValueError, OSError):
        return []
