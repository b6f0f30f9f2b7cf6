"""Digests, atomic writes, locks, and the two pointers that stages hand to each other.

A pointer is a few bytes of JSON that names an immutable thing on disk by its digest. Stages take pointers
and return pointers; the rows and the weights themselves never travel through Prefect.

Knows nothing of tables or DuckDB, and of models only which files belong to one.

    >>> digest_of({"b": 1, "a": [1, 2]}) == digest_of({"a": [1, 2], "b": 1})
    True
"""

import csv
import fcntl
import hashlib
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from pydantic import BaseModel, ConfigDict
from pydantic.config import JsonDict

# For Field(json_schema_extra=OPERATIONAL): the setting changes how, never what, and is in no digest.
OPERATIONAL: JsonDict = {"operational": True}
DIGEST_LENGTH = 32  # hex characters: 128 bits, far beyond any pool's birthday bound


class StorageError(Exception):
    """Something kept on disk is missing, damaged or cannot be read."""


def home() -> Path:
    """The folder that holds everything: `$LION_HOME`, by default `./.lion`."""
    return expanded(os.environ.get("LION_HOME") or ".lion").resolve()


def expanded(path: str) -> Path:
    """The path that a user names, with `~` and `~user` for home folders; where there is no such user it stays as it is."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text.

    Raises:
        TypeError: the value holds something JSON cannot say (a set, a path, an object).
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest_of_bytes(data: bytes) -> str:
    """Digest of bytes, as hex."""
    return hashlib.sha256(data).hexdigest()[:DIGEST_LENGTH]


def digest_of(value: Any) -> str:
    """Digest of a JSON-like value, independent of key order."""
    return digest_of_bytes(canonical_json(value).encode())


_digests: dict[tuple[str, int, int], str] = {}  # (path, size, mtime) -> digest: a process hashes a file once


def digest_of_file(path: Path) -> str:
    """Digest of a file's bytes, read in pieces; remembered as long as size and time stay the same."""
    stat = path.stat()
    seen = (str(path), stat.st_size, stat.st_mtime_ns)
    if seen not in _digests:
        with path.open("rb") as file:
            _digests[seen] = hashlib.file_digest(file, "sha256").hexdigest()[:DIGEST_LENGTH]
    return _digests[seen]


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write a whole file or nothing: temporary file beside it, flushed to disk, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would shut out the team that shares a home
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A new folder that is filled under another name, and is there only when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as name:
        folder = Path(name) / "made"
        folder.mkdir()
        yield folder
        folder.rename(path)


def write_json_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows as JSON, a line each, whole or not at all. What JSON has no form for, such as a date, becomes text."""
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows))


def write_json_list(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows as one JSON list, whole or not at all; see `write_json_lines`."""
    write_atomic(path, json.dumps(rows, indent=1, ensure_ascii=False, default=str) + "\n")


def read_csv(text: str, **options: Any) -> "csv.DictReader[str]":
    """The rows of a CSV file; a cell may be as long as a text is, which Python by itself does not allow."""
    csv.field_size_limit(sys.maxsize)
    return csv.DictReader(io.StringIO(text, newline=""), **options)


def repeated(names: Sequence[str]) -> list[str]:
    """The names of columns that are there more than once: of two such columns a row, which is a dict, has one."""
    return sorted({name for name in names if names.count(name) > 1})


def lock_file(name: str) -> Path:
    """The file whose lock is the lock `name` of this home."""
    return home() / "locks" / f"{name}.lock"


@contextmanager
def locked(name: str, on_wait: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Hold the lock `name` of this home. The kernel lets go of it when its holder dies, however it dies.

    Args:
        on_wait: called once where somebody else holds it, before waiting for them.
    """
    path = lock_file(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        if not flock(file, timeout=0):
            on_wait()
            flock(file)
        yield


def flock(file: TextIO, timeout: float | None = None) -> bool:
    """Lock an open file, waiting at most `timeout` seconds (for ever by default); False where it was not had."""
    deadline = None if timeout is None else time.monotonic() + timeout
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if deadline is None else fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if deadline is None or time.monotonic() >= deadline:
                return False
            time.sleep(0.05)


def is_locked(name: str) -> bool:
    """Whether somebody holds the lock `name` now."""
    try:
        file = lock_file(name).open("r")
    except FileNotFoundError:  # a journal that is closed takes its own away
        return False
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: another one who only looks holds nothing
        except BlockingIOError:
            return True
        return False


class Snapshot(BaseModel):
    """A table at one moment: `objects/<table>/<digest>.parquet`, the digest being that of the file's bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    digest: str
    table: str
    rows: int

    @property
    def path(self) -> Path:
        """Where the file is on this machine."""
        return home() / "objects" / self.table / f"{self.digest}.parquet"

    def verify(self) -> None:
        """Check that the table is whole.

        Raises:
            StorageError: it is missing, or it is not what was written.
        """
        if not self.path.is_file():
            raise StorageError(f"{self.table} snapshot {self.digest} is missing: {self.path}")
        if digest_of_file(self.path) != self.digest:
            raise StorageError(f"{self.table} snapshot {self.digest} is damaged: {self.path}")


class Checkpoint(BaseModel):
    """A model: `checkpoints/<digest of the job that made it>/`, complete once `result.json` is there.

    `content` is the digest of the model's files. It is what `verify` checks; cache keys use `digest`, so that
    weights made again by the same job do not make anything after them run again.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    digest: str
    content: str

    @property
    def path(self) -> Path:
        """Where the folder is on this machine."""
        return home() / "checkpoints" / self.digest

    def verify(self) -> None:
        """Check that the model is whole.

        Raises:
            StorageError: it is missing, or it is not what was written.
        """
        if not (self.path / "result.json").is_file():
            raise StorageError(f"checkpoint {self.digest} is missing or incomplete: {self.path}")
        if digest_of_model(self.path) != self.content:
            raise StorageError(f"checkpoint {self.digest} is damaged: {self.path}")


Pointer = Snapshot | Checkpoint


MODEL_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",  # which shard holds what
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "vocab.*",
    "merges.txt",
    "*.model",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


def model_files(directory: Path) -> list[Path]:
    """What a model is loaded from, and no log or job file beside it: weights, configs, tokenizer, chat template."""
    return sorted({path for pattern in MODEL_FILES for path in directory.glob(pattern)})


def digest_of_model(directory: Path) -> str:
    """Digest of the files that a model is loaded from."""
    return digest_of({path.name: digest_of_file(path) for path in model_files(directory)})
