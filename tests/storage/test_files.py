"""Digests, atomic writes, locks, pointers."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from storage.files import (
    Checkpoint,
    Snapshot,
    StorageError,
    digest_of,
    digest_of_model,
    is_locked,
    locked,
    write_atomic,
)
from storage.pools import read_lineage, read_rows, write_snapshot


def a_snapshot() -> Snapshot:
    rows = [{"instruction_id": "a", "difficulty": "hard", "score_gap": 2.5}]
    return write_snapshot("verdicts", rows, step="discriminate", version=1)


def test_equal_values_have_equal_digests_whatever_their_order() -> None:
    assert digest_of({"b": 1, "a": [1, None]}) == digest_of({"a": [1, None], "b": 1})
    assert digest_of([1, 2]) != digest_of([2, 1])


def test_a_value_that_json_cannot_say_has_no_digest() -> None:
    with pytest.raises(TypeError):
        digest_of({1, 2})
    with pytest.raises(ValueError, match="JSON compliant"):
        digest_of(float("nan"))


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomic(path, "old")
    with pytest.raises(TypeError):
        write_atomic(path, 7)  # type: ignore[arg-type]
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_on_the_disk_before_it_has_its_name_and_a_team_can_read_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (done.append(f"{os.fstat(file).st_size} bytes"), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda *paths: (done.append("renamed"), replace(*paths)))
    write_atomic(tmp_path / "file", "new")
    assert done == ["3 bytes", "renamed"]
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o644


def test_the_same_rows_are_the_same_object(home: Path) -> None:
    assert a_snapshot() == a_snapshot()
    assert len(list((home / "objects" / "verdicts").iterdir())) == 1


def test_a_snapshot_carries_its_lineage(home: Path) -> None:
    first = a_snapshot()
    second = write_snapshot("verdicts", read_rows(first), step="copy", version=3, inputs=[first])
    assert read_lineage(second) == {"step": "copy", "version": 3, "inputs": [first.digest]}
    assert second.digest != first.digest


def test_a_damaged_snapshot_is_noticed(home: Path) -> None:
    snapshot = a_snapshot()
    snapshot.verify()
    content = bytearray(snapshot.path.read_bytes())
    content[20] ^= 1  # same size, one bit
    snapshot.path.write_bytes(content)
    with pytest.raises(StorageError, match="damaged"):
        snapshot.verify()


def test_a_missing_snapshot_is_noticed(home: Path) -> None:
    snapshot = a_snapshot()
    snapshot.path.unlink()
    with pytest.raises(StorageError, match="missing"):
        snapshot.verify()
    for read in (read_rows, read_lineage):
        with pytest.raises(StorageError, match="is gone or damaged"):
            read(snapshot)


def test_a_row_that_does_not_fit_its_table_is_refused(home: Path) -> None:
    with pytest.raises(StorageError, match=r"verdicts\.difficulty must not be null"):
        write_snapshot("verdicts", [{"instruction_id": "a"}], step="x", version=1)
    with pytest.raises(StorageError, match="does not fit"):
        write_snapshot(
            "verdicts", [{"instruction_id": "a", "difficulty": "hard", "score_gap": "wide"}], step="x", version=1
        )


def test_a_checkpoint_is_whole_only_with_its_result_and_its_weights(home: Path) -> None:
    folder = home / "checkpoints" / "abc"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    checkpoint = Checkpoint(digest="abc", content=digest_of_model(folder))
    with pytest.raises(StorageError, match="incomplete"):
        checkpoint.verify()
    (folder / "result.json").write_text("{}")
    checkpoint.verify()
    (folder / "model.safetensors").write_bytes(b"weightz")
    with pytest.raises(StorageError, match="damaged"):
        checkpoint.verify()


def test_a_lock_dies_with_its_holder(home: Path) -> None:
    code = (
        "from storage.files import locked\nimport time\nwith locked('x'):\n print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=os.environ.copy())
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    assert is_locked("x")

    def give_up() -> None:
        raise TimeoutError

    with pytest.raises(TimeoutError), locked("x", on_wait=give_up):
        pass
    waited = []
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with locked("x", on_wait=lambda: waited.append(time.time())):
        assert not waited
    assert not is_locked("x")


def test_who_only_looks_at_a_lock_holds_it_for_nobody_else(home: Path) -> None:
    with locked("x"):
        pass
    with ThreadPoolExecutor(2) as pool:
        assert not any(pool.map(lambda _: is_locked("x"), range(4000)))


def test_a_lock_whose_file_is_taken_away_meanwhile_is_held_by_nobody(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_now = Path.open

    def taken_away(path: Path, *options: Any) -> Any:
        path.unlink()
        return open_now(path, *options)

    with locked("journal-x"):
        monkeypatch.setattr(Path, "open", taken_away)
        assert not is_locked("journal-x")
