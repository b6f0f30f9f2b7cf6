"""Seed instructions: read a file of any usual form, write the first pool and the held-out set.

lion run --preset offline --seeds my_tasks.jsonl
"""

import csv
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from storage.files import OPERATIONAL, Snapshot, StorageError, digest_of, digest_of_file, expanded, read_csv, repeated
from storage.pools import instruction_id, read_parquet, write_snapshot
from tasks.contamination import find_near
from tasks.models.chat import NOT_STORABLE, is_storable
from tasks.policies import stage

VERSION = 2
BUNDLED = Path(__file__).parent / "data"
ACCEPTED = (
    "Accepted: .json or .jsonl (Alpaca, self-instruct, messages, FastChat questions), .csv, .parquet, "
    ".txt (a line each), hf:NAME[:SPLIT]"
)
TEXTS = ("instruction", "input", "output", "category")  # columns of a pool
# Columns that some form of instructions has.
READ = {"instruction", "input", "output", "category", "messages", "turns", "instances", "id", "question_id"}

Records = Iterator[tuple[str, Any]]  # where it stands ("line 3"), what stands there


class SeedError(ValueError):
    """A file of instructions cannot be used. The message names file, place and way out."""


class SeedConfig(BaseModel):
    """Where the first instructions come from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str = Field(
        "bundled",
        description="`bundled` (220 seeds of this project), a file (Alpaca JSON/JSONL, self-instruct, plain lines, "
        "CSV, Parquet), or `hf:dataset[:split]`.",
        json_schema_extra=OPERATIONAL,  # the digest of what is in it is the key
    )
    heldout: str = Field(
        "bundled",
        description="Instructions for evaluation, in the same forms. They never enter a pool.",
        json_schema_extra=OPERATIONAL,
    )
    max_rows: int | None = Field(None, ge=1, description="Use only the first so many seeds (all by default).")
    max_heldout: int | None = Field(None, ge=1, description="Use only the first so many held-out instructions.")

    def digests(self) -> tuple[str, str]:
        """Of what the two paths hold now; of a dataset far away, of its name.

        Raises:
            SeedError: a file is not there.
        """
        return _digest_of_source(self.path, "seeds.jsonl"), _digest_of_source(self.heldout, "heldout.jsonl")


class SeedPools(BaseModel):
    """The two pools that everything starts from."""

    pool: Snapshot
    heldout: Snapshot
    duplicates: int  # exact ones, left out of the pool
    near_heldout: int  # near duplicates of a held-out instruction, left out of the pool
    beyond_max_rows: int = 0
    passed_over: dict[str, int] = {}  # what else the two files hold, and in how many rows


class Seeds(BaseModel):
    """The instructions of one file, in its order, each once."""

    rows: list[dict[str, Any]]  # instruction, input, category, output; later_turns, and the source's own id
    duplicates: int
    passed_over: Counter[str]  # what a pool has no column for: in how many rows it stands


def read_seeds(path: str, bundled: str = "seeds.jsonl") -> Seeds:
    """Read instructions from `bundled`, a file or `hf:dataset[:split]`.

    Returns:
        Rows in the source's order. Exact duplicates (same instruction and input) are left out and counted.

    Raises:
        SeedError: the source is missing, damaged, of an unknown form, or holds nothing usable.
    """
    place, records = read_records(path, bundled)
    rows: dict[str, dict[str, Any]] = {}
    duplicates, passed_over = 0, Counter[str]()
    for where, record in records:
        row = read_row(record, f"{place}, {where}")
        passed_over.update(_passed_over(record, row))
        key = instruction_id(row["instruction"], row["input"])
        duplicates += key in rows
        rows.setdefault(key, row)
    if not rows:
        raise SeedError(f"{place}: no instruction in it. {ACCEPTED}.")
    return Seeds(rows=list(rows.values()), duplicates=duplicates, passed_over=passed_over)


def read_records(path: str, bundled: str = "seeds.jsonl") -> tuple[str, Records]:
    """What a source is called, and its records as they are, each with the place where it stands ("line 3").

    Raises:
        SeedError: the source is missing, damaged, or of an unknown form.
    """
    return _dataset(path) if path.startswith("hf:") else _file(_existing(path, bundled))


@stage("seed", version=VERSION)
def load_seeds(config: SeedConfig, seeds_digest: str, heldout_digest: str) -> SeedPools:
    """Write the seed pool and the held-out set. A seed near a held-out instruction enters no pool, and is counted.

    Args:
        seeds_digest, heldout_digest: of what the config's paths hold now (`SeedConfig.digests`).

    Raises:
        SeedError: a source cannot be used.
    """
    usable = usable_seeds(config)
    return SeedPools(
        pool=_write(usable.rows, "seed"),
        heldout=_write(usable.heldout, "heldout"),
        duplicates=usable.duplicates,
        near_heldout=usable.near_heldout,
        beyond_max_rows=usable.beyond_max_rows,
        passed_over=usable.passed_over,
    )


class UsableSeeds(NamedTuple):
    """What a run begins with."""

    rows: list[dict[str, Any]]
    heldout: list[dict[str, Any]]
    duplicates: int
    near_heldout: int
    beyond_max_rows: int
    passed_over: dict[str, int]


def usable_seeds(config: SeedConfig) -> UsableSeeds:
    """The seeds that are near no held-out instruction, at most `max_rows` of them, and what is held out.

    Raises:
        SeedError: a source cannot be used, or no seed is left.
    """
    seeds = read_seeds(config.path)
    held_out = read_seeds(config.heldout, bundled="heldout.jsonl")
    heldout = held_out.rows[: config.max_heldout]
    near = {id(row) for row, _ in find_near(seeds.rows, heldout)}
    clean = [row for row in seeds.rows if id(row) not in near]
    if not clean:
        raise SeedError(f"{config.path}: every seed is near a held-out instruction. Name other ones in seeds.heldout.")
    passed_over = dict(seeds.passed_over + held_out.passed_over)
    used = clean[: config.max_rows]
    return UsableSeeds(used, heldout, seeds.duplicates, len(near), len(clean) - len(used), passed_over)


def _write(rows: list[dict[str, Any]], origin: str) -> Snapshot:
    full = (
        {"instruction_id": instruction_id(row["instruction"], row["input"]), "origin": origin}
        | {key: row[key] for key in TEXTS}
        for row in rows
    )
    return write_snapshot("instructions", full, step="seed", version=VERSION)


# Reading ---------------------------------------------------------------------------------------------------------


def _digest_of_source(path: str, bundled: str) -> str:
    return digest_of(path) if path.startswith("hf:") else digest_of_file(_existing(path, bundled))


def _existing(path: str, bundled: str) -> Path:
    if not path.strip():
        raise SeedError(f"the name of a file of instructions is empty: leave it out, or name one. {ACCEPTED}.")
    file = BUNDLED / bundled if path == "bundled" else expanded(path)
    if file.is_dir():
        raise SeedError(f"{path} is a folder; name a file in it. {ACCEPTED}.")
    if not file.is_file():
        raise SeedError(f"{path}: no such file. {ACCEPTED}.")
    return file


def _file(path: Path) -> tuple[str, Records]:
    readers: dict[str, Callable[[Path], Records]] = {
        ".json": _json,
        ".jsonl": _jsonl,
        ".csv": _csv,
        ".parquet": _parquet,
        ".txt": _lines,
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise SeedError(f"{path}: cannot tell its form from the ending {path.suffix or '(none)'!r}. {ACCEPTED}.")
    return str(path), reader(path)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        form = "utf-16" if error.object[:2] in (b"\xff\xfe", b"\xfe\xff") else "latin1"
        raise SeedError(
            f"{path}, line {line}: not UTF-8 (byte {error.object[error.start]:#04x}). "
            f"Save the file as UTF-8, for example with: iconv -f {form} -t utf-8"
        ) from None


def _json(path: Path) -> Records:
    text = _text(path)
    if not text.strip():
        return
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and error.lineno > 1 and text.lstrip()[0] != "[":  # JSON lines by that name
            yield from _jsonl(path)
            return
        raise SeedError(f"{path}, line {error.lineno}, column {error.colno}: not JSON ({error.msg}).") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists in lists without end
        raise SeedError(f"{path}: not JSON that can be read ({error}).") from None
    if isinstance(data, dict) and not data.keys().isdisjoint(READ):  # JSON lines, of which there is one
        data = [data]
    if not isinstance(data, list):
        raise SeedError(f"{path}: expected a list of instructions, found {_kind(data)}.")
    for number, record in enumerate(data, 1):
        yield f"item {number}", record


def _jsonl(path: Path) -> Records:
    # Not splitlines(): a JSON text may hold U+2028, which is no end of line here.
    for number, line in enumerate(_text(path).split("\n"), 1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except json.JSONDecodeError as error:
                raise SeedError(f"{path}, line {number}, column {error.colno}: not JSON ({error.msg}).") from None
            except (ValueError, RecursionError) as error:
                raise SeedError(f"{path}, line {number}: not JSON that can be read ({error}).") from None


def _csv(path: Path) -> Records:
    reader = read_csv(_text(path), strict=True)
    try:
        if twice := repeated(reader.fieldnames or []):
            raise SeedError(f"{path}, line 1: the column {', '.join(twice)} is there twice. Rename one.")
        for record in reader:
            if None in record:
                raise SeedError(
                    f"{path}, line {reader.line_num}: more cells than columns. Put a text that holds commas in quotes."
                )
            yield f"line {reader.line_num}", record
    except csv.Error as error:
        raise SeedError(f"{path}, row after line {reader.line_num}: not CSV ({error}).") from None


def _parquet(path: Path) -> Records:
    try:
        for number, record in enumerate(read_parquet(path), 1):
            yield f"row {number}", record
    except StorageError as error:
        raise SeedError(f"{error}. {ACCEPTED}.") from None


def _lines(path: Path) -> Records:
    for number, line in enumerate(_text(path).split("\n"), 1):
        if line.strip():
            yield f"line {number}", {"instruction": line.strip()}


def _dataset(spec: str) -> tuple[str, Records]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise SeedError(f"{spec}: reading from the Hub needs the extra: pip install 'lion-distill[hub]'") from None
    name, _, split = spec.removeprefix("hf:").partition(":")
    try:
        rows = load_dataset(name, split=split or "train")
    except Exception as error:  # the library raises a dozen kinds; all mean that the dataset was not had
        raise SeedError(f"{spec}: the dataset cannot be had ({str(error).splitlines()[0]}).") from error
    return spec, ((f"row {number}", record) for number, record in enumerate(rows, 1))


def read_row(record: Any, where: str) -> dict[str, Any]:
    """One record of any known form as instruction, input, category, output; `where` is for the message.

    Raises:
        SeedError: the record is of no known form, or its instruction is empty.
    """
    columns = _in_columns(record, where)
    for key in TEXTS:
        if key in columns and not isinstance(columns[key], str):
            raise SeedError(f"{where}: `{key}` must be a text, found {_kind(columns[key])}.")
    if not is_storable(columns):
        raise SeedError(f"{where}: {NOT_STORABLE}")
    if "\0" in "".join(text for text in columns.values() if isinstance(text, str)):
        raise SeedError(f"{where}: a NUL is in it. A file in UTF-16 is made UTF-8 with: iconv -f utf-16 -t utf-8")
    texts = {key: columns.get(key, "").strip() or None for key in TEXTS}
    if texts["instruction"] is None:
        raise SeedError(f"{where}: `instruction` is empty. Fill it in, or remove the row.")
    return texts | {
        "later_turns": columns.get("later_turns", []),
        "source_id": columns.get("question_id", columns.get("id")),
    }


def _in_columns(record: Any, where: str) -> dict[str, Any]:
    """A record of any known form with its instruction in a column of that name, and without what is null."""
    if isinstance(record, str):
        record = {"instruction": record}
    if not isinstance(record, dict):
        raise SeedError(f"{where}: expected an object with an `instruction`, found {_kind(record)}.")
    columns = {key: value for key, value in record.items() if value is not None}
    if "messages" in columns and "instruction" not in columns:
        columns |= _from_messages(columns["messages"], where)
    if "turns" in columns and "instruction" not in columns:  # FastChat's question.jsonl
        columns |= _from_turns(columns["turns"], where)
    if isinstance(columns.get("instances"), list) and columns["instances"]:  # self-instruct
        first = columns["instances"][0]
        if not isinstance(first, dict):
            raise SeedError(f"{where}: `instances` must be objects, found {_kind(first)}.")
        columns |= {key: "" if first.get(key) is None else first[key] for key in ("input", "output")}
    if "instruction" not in columns:
        found = ", ".join(map(str, columns)) or "nothing"
        raise SeedError(f"{where}: no `instruction` (found: {found}). Rename the column, or add it.")
    return columns


def _passed_over(record: Any, row: dict[str, Any]) -> Iterator[str]:
    """What stands in a record and in no column of a pool: a dataset may call the input `context`."""
    if not isinstance(record, dict):
        return
    record = {key: value for key, value in record.items() if value not in (None, "", [])}
    yield from (f"`{key}`" for key in record if key not in READ)
    if row["later_turns"]:
        yield "turns after the first"
    if "instruction" not in record and any(said["role"] == "system" for said in record.get("messages", [])):
        yield "system messages"
    if isinstance(record.get("instances"), list) and len(record["instances"]) > 1:
        yield "instances after the first"


def _from_turns(turns: Any, where: str) -> dict[str, Any]:
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) for turn in turns):
        raise SeedError(f"{where}: `turns` must be a list of texts, the first the question, found {_kind(turns)}.")
    return {"instruction": turns[0], "later_turns": turns[1:]}


def _from_messages(messages: Any, where: str) -> dict[str, Any]:
    try:
        said = {message["role"]: message["content"] for message in reversed(messages)}  # the first of each role
        asked = [message["content"] for message in messages if message["role"] == "user"]
        answer = said.get("assistant")  # null where the model called a tool
        return {"instruction": said["user"], "output": "" if answer is None else answer, "later_turns": asked[1:]}
    except (TypeError, KeyError):
        raise SeedError(f"{where}: `messages` holds no message of the role `user`.") from None


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "a yes/no", int: "a number", float: "a number"}
    return names.get(type(value), "nothing" if value is None else type(value).__name__)
