"""What may go: what no run refers to any more, and what a run has made that shall be made again."""

import json
import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from storage.files import Checkpoint, Pointer, StorageError, home, is_locked
from storage.runs import Manifest, list_manifests
from storage.studies import Study, list_studies


def collect(*, delete: bool) -> list[tuple[Path, int]]:
    """Find what can go, with its size in bytes; delete it only if asked.

    Kept: whatever a manifest or a study points to, the records of its stages, the journal. An unfinished job folder is
    reported too, and going on without it costs only the time it stands for.

    Raises:
        StorageError: asked to delete while something is being made in this home, which nothing refers to yet.
    """
    if delete and (busy := sorted(path.stem for path in home().glob("locks/*.lock") if is_locked(path.stem))):
        raise StorageError(
            f"This home is at work ({', '.join(busy)}). Delete once that has ended; nothing was deleted."
        )
    records = _records()
    kept = {pointer.path for pointer in _pointers(records)}
    kept |= {home() / "results" / key for record in records for key in record.stage_keys}
    places = [
        *home().glob("objects/*/*"),
        *home().glob("checkpoints/*"),
        *home().glob("results/*"),
        *home().glob("jobs/*"),
    ]
    found = sorted((path, _size(path)) for path in places if path not in kept)
    if delete:
        for path, _ in found:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    return found


def forget(manifest: Manifest) -> None:
    """Take away what makes a run's stages count as done: their records, its models, and what these have answered.

    A model that another run or a study refers to stays: that one could not make it again.
    """
    others = [
        record for record in _records() if not (isinstance(record, Manifest) and record.run_id == manifest.run_id)
    ]
    kept = set(_pointers(others))
    models = {pointer for pointer in manifest.pointers() if isinstance(pointer, Checkpoint)}
    asked = {str(model.path) for model in models}
    for key in manifest.stage_keys:
        (home() / "results" / key).unlink(missing_ok=True)
    for result in home().glob("jobs/*/result.json"):
        if json.loads(result.with_name("job.json").read_bytes()).get("model") in asked:
            shutil.rmtree(result.parent)
    for model in models - kept:
        shutil.rmtree(model.path, ignore_errors=True)


def _records() -> list[Manifest | Study]:
    return [*list_manifests(), *list_studies()]


def _pointers(records: Iterable[Manifest | Study]) -> list[Pointer]:
    return [pointer for record in records for pointer in record.pointers()]


def _size(path: Path) -> int:
    inside = [Path(folder, name) for folder, _, names in os.walk(path) for name in names]
    size = 0
    for file in inside if path.is_dir() else [path]:
        with suppress(FileNotFoundError):  # of a job that is at work: it is gone since it was found
            size += file.lstat().st_size
    return size
