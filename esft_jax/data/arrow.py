"""Rows of Parquet files and of other Arrow tables, as the values of JSON; compressed files."""

import io
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from esft_jax.errors import InputError, one_line
from esft_jax.files import parse_json

# Rows in memory at once.
BATCH_ROWS = 256
# Bytes of a compressed file that are decompressed together.
_BUFFER = 1 << 20


def decompressed(file: IO[bytes], compression: str) -> io.BufferedReader:
    """What a compressed file holds; reading it raises an `OSError` if it is damaged or cut short.

    Args:
        compression: Arrow's name of it, such as `zstd`.
    """
    # A NativeFile is a raw stream but for its type.
    stream: Any = pa.CompressedInputStream(file, compression)
    return io.BufferedReader(stream, _BUFFER)


def parquet_rows(file: IO[bytes], path: str) -> Iterator[dict[str, Any]]:
    """The rows of an open file.

    Args:
        path: what messages begin with.

    Raises:
        InputError: naming the file, and the column if one is at fault.
    """
    try:
        # The end of a compressed file is known once all of it is read.
        whole: Any = file if file.seekable() else pa.BufferReader(file.read())
        table = pq.ParquetFile(whole, page_checksum_verification=True)
        yield from table_rows(table.iter_batches(BATCH_ROWS), path)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as Parquet: {one_line(error)}") from error


def table_rows(
    batches: Iterable[pa.RecordBatch | pa.Table], where: str
) -> Iterator[dict[str, Any]]:
    """The rows of a table, column names as keys.

    Texts that are declared to be JSON are parsed: so `datasets` writes values whose type differs
    from row to row.

    Args:
        where: what messages begin with.

    Raises:
        InputError: naming a column that appears twice, or whose values Python cannot hold.
    """
    number = 0
    for batch in batches:
        counts = Counter(batch.schema.names)
        if repeated := [name for name, count in counts.items() if count > 1]:
            raise InputError(f"{where}: column {repeated[0]!r} appears twice")
        columns = []
        for field, column in zip(batch.schema, batch.columns, strict=True):
            try:
                columns.append(column.to_pylist())
            except Exception as error:  # of Arrow, or of Python's types, such as time zones
                raise InputError(
                    f"{where}: column {field.name!r} ({field.type}) cannot be read: "
                    f"{one_line(error)}"
                ) from error
        for row in zip(*columns, strict=True):
            number += 1
            yield {
                field.name: _parsed(value, field.type, f"{where}:{number}: {field.name}")
                for field, value in zip(batch.schema, row, strict=True)
            }


def _parsed(value: Any, kind: pa.DataType, where: str) -> Any:
    """A value with all texts in it parsed that are declared to be JSON."""
    if value is None or not (pa.types.is_nested(kind) or isinstance(kind, pa.JsonType)):
        return value
    if isinstance(kind, pa.JsonType):
        return parse_json(value, where)
    if pa.types.is_struct(kind):
        # A struct has the keys of all rows; a null stands for each that this row lacks.
        return {
            field.name: _parsed(value[field.name], field.type, where)
            for field in kind
            if value[field.name] is not None
        }
    if isinstance(value, list) and not pa.types.is_map(kind):
        return [_parsed(item, kind.value_type, where) for item in value]
    return value
