"""DuckDB over the snapshots: the queries that stages run, and the views that people look at pools through.

`catalog.duckdb` holds nothing but views over Parquet files, one a kind of row, each with `run_id` and
`iteration` in front, so that any DuckDB client opens it and needs nothing of this project:

    duckdb .lion/catalog.duckdb "select difficulty, count(*) from verdicts group by all"

`iteration` is the iteration that used or made the rows; the pools that the last iteration left behind carry the
number of the iteration that would use them. `evaluations` has the student before training as iteration 0.
"""

import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from glob import escape
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from storage.files import Snapshot, StorageError, home
from storage.runs import Manifest, list_manifests
from storage.tables import SCHEMAS

VIEWS = {  # view -> table
    "train_pool": "instructions",
    "cache_pool": "instructions",
    "responses": "responses",
    "reviews": "reviews",
    "verdicts": "verdicts",
    "candidates": "candidates",
    "evaluations": "evaluations",
}
Placed = tuple[str, int, Snapshot]  # run_id, iteration, snapshot


def query(sql: str, parameters: Mapping[str, Any] | None = None, **snapshots: Snapshot) -> list[dict[str, Any]]:
    """Run one SQL statement over snapshots, each known to it by its keyword; rows as dicts."""
    with duckdb.connect() as connection:
        for name, snapshot in snapshots.items():
            connection.sql(f"create view {name} as select * from {_parquet([snapshot])}")
        return _answer(connection, sql, parameters)[1]


def ask(sql: str, parameters: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
    """As `ask_with_names`, without the names."""
    return ask_with_names(sql, parameters)[1]


def ask_with_names(sql: str, parameters: Mapping[str, Any] | None = None) -> tuple[list[str], list[dict[str, Any]]]:
    """Run one SQL statement over the views of all runs of this home; names of the columns, and rows as dicts.

    Raises:
        StorageError: DuckDB cannot run it; the message is DuckDB's own.
    """
    with duckdb.connect() as connection:
        _define_views(connection)
        try:
            return _answer(connection, sql, parameters)
        except duckdb.Error as error:
            raise StorageError(f"{error}\nViews: {', '.join(VIEWS)}.") from error


def life_of(instruction_id: str) -> dict[str, list[dict[str, Any]]]:
    """Everything known of one instruction, by kind: itself, parent, responses, reviews, verdicts, children. A rejected
    candidate is known as one, and a held-out instruction by its evaluations."""
    statements = {
        "instruction": "select distinct on (instruction_id) * exclude (run_id, iteration) from cache_pool "
        "where instruction_id = $id",
        "parent": "select distinct on (instruction_id) * exclude (run_id, iteration) from cache_pool "
        "where instruction_id in (select parent_id from cache_pool where instruction_id = $id)",
        "candidate": "select run_id, iteration, side, draw, parent_id, instruction, input, rejection, near_id, similarity "
        "from candidates where instruction_id = $id",
        "responses": "select run_id, iteration, role, status, response from responses where instruction_id = $id",
        "reviews": 'select run_id, iteration, "order", vote, outcome, teacher_score, student_score, evidence '
        "from reviews where instruction_id = $id",
        "verdicts": "select run_id, iteration, score_gap, threshold, difficulty, reason from verdicts "
        "where instruction_id = $id",
        "children": "select run_id, iteration, instruction_id, side, rejection, instruction from candidates "
        "where parent_id = $id",
        "evaluations": "select run_id, iteration, status, response, loss_sum, tokens, score from evaluations "
        "where instruction_id = $id",
    }
    with duckdb.connect() as connection:
        _define_views(connection)
        return {
            name: _answer(connection, f"{statement} order by all", {"id": instruction_id})[1]
            for name, statement in statements.items()
        }


def publish() -> Path:
    """Write `catalog.duckdb` anew: beside the old one, then renamed, so that a client that has it open is not hurt.

    Raises:
        StorageError: a table of some run is damaged.
    """
    target = home() / "catalog.duckdb"
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".catalog.") as folder:
        fresh = Path(folder) / target.name
        with duckdb.connect(str(fresh)) as connection:
            _define_views(connection)
        os.replace(fresh, target)
    return target


def _answer(
    connection: duckdb.DuckDBPyConnection, sql: str, parameters: Mapping[str, Any] | None
) -> tuple[list[str], list[dict[str, Any]]]:
    cursor = connection.execute(sql, parameters) if parameters else connection.execute(sql)
    if cursor is None:  # nothing but white space and comments
        return [], []
    columns = [column[0] for column in cursor.description or ()]
    names: list[str] = []
    for column in columns:
        name, number = column, 0
        while name in names or (number and name in columns):  # a column may be called `a_1`
            number += 1
            name = f"{column}_{number}"
        names.append(name)
    return names, [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]


def _define_views(connection: duckdb.DuckDBPyConnection) -> None:
    """Give a database the views over all runs of this home.

    Raises:
        StorageError: a table of some run is damaged.
    """
    manifests = list_manifests()
    for view, table in VIEWS.items():
        placed = [item for manifest in manifests for item in _placed(manifest, view) if item[2].path.is_file()]
        try:
            connection.execute(f"create view {view} as {_select(SCHEMAS[table], placed)}")
        except duckdb.Error as error:
            damaged = [(run_id, snapshot) for run_id, _, snapshot in placed if not _is_parquet(snapshot.path)]
            if not damaged:
                raise
            run_id, snapshot = damaged[0]
            raise StorageError(
                f"{snapshot.path} is damaged. The command of {run_id} makes it again; moved away, the rest can be asked."
            ) from error


def _is_parquet(path: Path) -> bool:
    try:
        pq.read_metadata(path)
    except (pa.ArrowException, OSError):
        return False
    return True


def _placed(manifest: Manifest, view: str) -> list[Placed]:
    """Where this run's rows of a view are."""
    if view == "evaluations":
        return [(manifest.run_id, iteration, each.details) for iteration, each in manifest.evaluations().items()]
    found: list[Placed] = []
    for record in manifest.iterations:
        names = ("teacher_responses", "student_responses") if view == "responses" else (view,)
        found += [(manifest.run_id, record.iteration, record.snapshots[n]) for n in names if n in record.snapshots]
    if view in manifest.next_pools:
        found.append((manifest.run_id, len(manifest.iterations) + 1, manifest.next_pools[view]))
    return found


def _select(schema: pa.Schema, placed: Sequence[Placed]) -> str:
    """One statement over all files; a file that several iterations share is read once and joined to each."""
    if not placed:
        nothing = ", ".join(f"null::{_duckdb_type(field.type)} as {_name(field.name)}" for field in schema)
        return f"select null::varchar as run_id, null::integer as iteration, {nothing} where false"
    places = ", ".join(
        f"({_quoted(run_id)}, {iteration}, {_quoted(str(snapshot.path))})" for run_id, iteration, snapshot in placed
    )
    return (
        "select places.run_id, places.iteration, rows.* exclude (filename) "
        f"from {_parquet([snapshot for _, _, snapshot in placed], ', filename = true')} as rows "
        f"join (values {places}) as places (run_id, iteration, filename) using (filename)"
    )


def _parquet(snapshots: Iterable[Snapshot], more: str = "") -> str:
    """Files as a table. Their paths mean what they say: no pattern in them, and no column in a folder named `model=x`."""
    files = sorted({_quoted(escape(str(snapshot.path))) for snapshot in snapshots})
    return f"read_parquet([{', '.join(files)}], hive_partitioning = false{more})"


def _duckdb_type(type: pa.DataType) -> str:
    return {pa.string(): "varchar", pa.int32(): "integer", pa.float64(): "double", pa.bool_(): "boolean"}[type]


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _name(text: str) -> str:
    return '"' + text.replace('"', '""') + '"'
