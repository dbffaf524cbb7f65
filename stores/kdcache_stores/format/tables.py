"""Parquet in and out, with the schema checked before any row is read.

Only this module opens Parquet. Arrow's threads outlive the interpreter: one that lets go of Python's
memory while the process ends takes the process down with it (SIGABRT). So what is read lies in Arrow's
own memory, and is read in the caller's thread.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from kdcache_stores.errors import FormatError

_SMALL = 2**16
_ROWS = 4
"""A table may hold `_SMALL` rows, or `_ROWS` for each byte of its file: rows whose keys count up take a byte
and more, those of a manifest, with a digest each, 40 and more."""
_TEXT = 2**24
MEAN_TEXT = 1024
"""The texts of a table may take `_TEXT` bytes, or `MEAN_TEXT` a row: a long one, often repeated, is small."""


def write_table(table: Any) -> bytes:
    """An Arrow table as Parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    data: bytes = sink.getvalue().to_pybytes()
    return data


def table_writer(path: str | os.PathLike[str], schema: Any) -> Any:
    """A `pyarrow.parquet.ParquetWriter` of a local file, for a table that is written batch by batch."""
    import pyarrow.parquet as pq

    return pq.ParquetWriter(path, schema, compression="zstd")


def read_table(data: bytes, columns: dict[str, str], limit: int, where: str) -> Any:
    """The named columns of a Parquet file of at most `limit` rows, as an Arrow table.

    Args:
        data: the file.
        columns: Arrow type of each column, as text; "?" behind it allows nulls, "??" lets it be absent.
        limit: rows beyond it raise.
        where: how errors name the file.

    Raises `FormatError` for anything else than a Parquet file with these columns.
    """
    import pyarrow as pa

    try:
        file = _open(data)
        if file.metadata.num_rows > limit:
            raise FormatError(f"{where} states {file.metadata.num_rows} rows, more than {limit}")
        present = set(file.schema_arrow.names)
        columns = {n: kind for n, kind in columns.items() if n in present or kind[-2:] != "??"}
        for name, kind in columns.items():
            index = file.schema_arrow.get_field_index(name)
            stated = str(file.schema_arrow.field(index).type) if index >= 0 else "none"
            if stated != kind.rstrip("?"):
                raise FormatError(f"{where}: column {name} must be {kind}, found {stated:.80}")
        table = _bounded(data, file, list(columns), where)
        table.validate(full=True)
    except FormatError:
        raise
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        raise FormatError(f"{where} is no Parquet file that Arrow reads: {error}") from None
    for name, kind in columns.items():
        if not kind.endswith("?") and table.column(name).null_count:
            raise FormatError(f"{where}: column {name} holds nulls")
    return table


def read_metadata(data: bytes) -> dict[bytes, bytes]:
    """Keys and values in the schema of a Parquet file that `read_table` has read."""
    return dict(_open(data).schema_arrow.metadata or {})


def open_table(file: Any) -> Any:
    """A `pyarrow.parquet.ParquetFile` over an open binary file, for tables that are not read whole.

    Read it with `use_threads=False`. Raises `pyarrow.ArrowException`.
    """
    import pyarrow.parquet as pq

    return pq.ParquetFile(file, pre_buffer=False)


def _bounded(data: bytes, file: Any, columns: list[str], where: str) -> Any:
    """The columns of a file, once it is known how much memory they take: few bytes may claim much."""
    import pyarrow as pa
    import pyarrow.compute as pc

    rows, schema, taken = file.metadata.num_rows, file.schema_arrow, 0
    if rows > max(_SMALL, _ROWS * len(data)):
        raise FormatError(f"{where} of {len(data)} bytes claims {rows} rows")
    # As a dictionary a text takes memory once, however often it is repeated.
    texts = [name for name in columns if schema.field(name).type in (pa.string(), pa.binary())]
    table = _open(data, texts).read(columns=columns, use_threads=False)
    for name in texts:
        for chunk in table.column(name).chunks:
            if isinstance(chunk, pa.DictionaryArray):
                lengths = pc.binary_length(chunk.dictionary).take(chunk.indices)
                taken += pc.sum(lengths).as_py() or 0
    if taken > max(_TEXT, MEAN_TEXT * rows):
        raise FormatError(
            f"{where} of {len(data)} bytes claims {rows} rows with {taken} bytes of text, more than "
            f"{MEAN_TEXT} a row"
        )
    return table.cast(pa.schema([schema.field(name) for name in table.column_names]))


def _open(data: bytes, dictionaries: Sequence[str] = ()) -> Any:
    """A `pyarrow.parquet.ParquetFile` over a copy in Arrow's memory; some columns as dictionaries."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    copy = pa.allocate_buffer(len(data))
    np.frombuffer(copy, np.uint8)[:] = np.frombuffer(data, np.uint8)
    return pq.ParquetFile(
        pa.BufferReader(copy), pre_buffer=False, read_dictionary=list(dictionaries)
    )
