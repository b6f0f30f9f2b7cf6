"""Writes and reads snapshots: immutable Parquet, named by the digest of its bytes.

Each file's footer tells its lineage: which step wrote it, in which version, from which inputs. Parquet files of others
are read and written here, too.

    >>> write_snapshot("verdicts", rows, step="discriminate", version=1, inputs=[reviews])   # doctest: +SKIP
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from storage.files import (
    Snapshot,
    StorageError,
    canonical_json,
    digest_of,
    digest_of_bytes,
    repeated,
    write_atomic,
)
from storage.tables import SCHEMAS

ROWS_PER_GROUP = 65_536  # DuckDB reads row groups in parallel; a pool of the paper's size is one or two
LINEAGE = b"lion.lineage"


def instruction_id(instruction: str, input: str | None) -> str:
    """The same words are the same row, wherever they come from: 16 hex characters."""
    return digest_of([instruction, input or None])[:16]


def write_snapshot(
    table: str, rows: Iterable[Mapping[str, Any]], *, step: str, version: int, inputs: Sequence[Snapshot] = ()
) -> Snapshot:
    """Write rows as one immutable file.

    Args:
        table: which schema of `storage.tables` the rows follow. A column that a row lacks is null.
        step, version, inputs: the lineage, kept in the footer and so part of the digest.

    Raises:
        StorageError: a row does not fit the table.
    """
    lineage = {"step": step, "version": version, "inputs": [snapshot.digest for snapshot in inputs]}
    schema = SCHEMAS[table].with_metadata({LINEAGE: canonical_json(lineage)})
    try:
        data = pa.Table.from_pylist(list(rows), schema=schema)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise StorageError(f"a row does not fit the table {table}: {error}") from error
    for field in schema:
        if not field.nullable and data[field.name].null_count:
            raise StorageError(f"{table}.{field.name} must not be null, and is in {data[field.name].null_count} rows")
    sink = pa.BufferOutputStream()
    pq.write_table(data, sink, compression="zstd", row_group_size=ROWS_PER_GROUP)
    content = sink.getvalue().to_pybytes()
    digest = digest_of_bytes(content)
    snapshot = Snapshot(table=table, digest=digest, rows=data.num_rows)
    write_atomic(snapshot.path, content)  # also over a file of that name: it may be the damaged one
    return snapshot


def read_rows(snapshot: Snapshot, columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """The rows of a snapshot in their order, as dicts of the named columns (all by default).

    Raises:
        StorageError: it is gone or damaged.
    """
    try:
        return pq.read_table(snapshot.path, columns=list(columns) if columns else None, memory_map=True).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise _gone(snapshot) from error


def read_lineage(snapshot: Snapshot) -> dict[str, Any]:
    """`step`, `version` and `inputs` (digests) from the footer.

    Raises:
        StorageError: it is gone or damaged.
    """
    try:
        return json.loads(pq.read_schema(snapshot.path).metadata[LINEAGE])
    except (pa.ArrowException, OSError) as error:
        raise _gone(snapshot) from error


def _gone(snapshot: Snapshot) -> StorageError:
    return StorageError(
        f"{snapshot.path} is gone or damaged. The same command as before notices it, and makes it again."
    )


def by_id(snapshot: Snapshot, columns: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    """Rows by instruction_id, in their order. Stages join by this, never by position."""
    wanted = None if columns is None else ["instruction_id", *columns]
    return {row["instruction_id"]: row for row in read_rows(snapshot, wanted)}


def read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of any Parquet file, a batch in memory at a time.

    Raises:
        StorageError: it is not Parquet, or two columns have one name.
    """
    try:
        file = pq.ParquetFile(path)
        if twice := repeated(file.schema_arrow.names):
            raise StorageError(f"{path}: the column {', '.join(twice)} is there twice")
        for batch in file.iter_batches():
            yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:  # what is damaged within is an OSError without a name
        raise StorageError(f"{path}: not Parquet ({error})") from error


def write_parquet(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows to a Parquet file outside of the home, for other programs; types as the rows have them."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(list(rows)), sink, compression="zstd")
    write_atomic(path, sink.getvalue().to_pybytes())
