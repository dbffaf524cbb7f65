"""Parquet in and out, with the schema checked before any row is read."""

from __future__ import annotations

import io
from typing import Any

from kdcache_stores.errors import FormatError


def write_table(table: Any) -> bytes:
    """An Arrow table as Parquet."""
    import pyarrow.parquet as pq

    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def read_table(data: bytes, columns: dict[str, str], limit: int, where: str) -> Any:
    """The named columns of a Parquet file of at most `limit` rows, as an Arrow table.

    Args:
        data: the file.
        columns: Arrow type of each column, as text; "?" behind it allows nulls.
        limit: rows beyond it raise.
        where: how errors name the file.

    Raises `FormatError` for anything else than a Parquet file with these columns.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(io.BytesIO(data))
        if file.metadata.num_rows > limit:
            raise FormatError(f"{where} states {file.metadata.num_rows} rows, more than {limit}")
        for name, kind in columns.items():
            index = file.schema_arrow.get_field_index(name)
            found = str(file.schema_arrow.field(index).type) if index >= 0 else "none"
            if found != kind.rstrip("?"):
                raise FormatError(f"{where}: column {name} must be {kind}, found {found:.80}")
        table = file.read(columns=list(columns))
        table.validate(full=True)
    except FormatError:
        raise
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        raise FormatError(f"{where} is no Parquet file that Arrow reads: {error}") from None
    for name, kind in columns.items():
        if not kind.endswith("?") and table.column(name).null_count:
            raise FormatError(f"{where}: column {name} holds nulls")
    return table
