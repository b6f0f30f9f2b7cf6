"""What no run refers to any more: snapshots, checkpoints, records and job folders that nothing leads to."""

import shutil
from pathlib import Path

from storage.files import home
from storage.runs import Manifest, list_manifests
from storage.studies import Study, list_studies


def collect(*, delete: bool) -> list[tuple[Path, int]]:
    """Find what can go, with its size in bytes; delete it only if asked.

    Kept: whatever a manifest or a study points to, the records of its stages, the journal. A run that is under way has its
    finished stages in its manifest; an unfinished job folder is reported too, and going on without it costs only
    the time it stands for.
    """
    records: list[Manifest | Study] = [*list_manifests(), *list_studies()]
    kept = {pointer.path for record in records for pointer in record.pointers()}
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
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return found


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.lstat().st_size for file in files if file.is_file())
