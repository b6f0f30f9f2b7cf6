"""The pools of the next iteration: what was accepted, and all that came before."""

from pathlib import Path

from storage.pools import read_rows, write_snapshot
from tasks.refresh import refresh_pools


def test_what_was_accepted_is_trained_on_and_joins_what_was_there(home: Path) -> None:
    before = [{"instruction_id": "old", "instruction": "Add.", "input": "1 2", "origin": "seed"}]
    rejected = {"instruction_id": "bad", "instruction": "Add!", "rejection": "near_duplicate"}
    new = {"instruction_id": "new", "instruction": "Sort.", "input": "2 1", "category": "math", "rejection": None}
    candidates = [row | {"parent_id": "old", "side": "easy", "draw": 0} for row in (rejected, new)]
    pools = refresh_pools.fn(
        write_snapshot("instructions", before, step="test", version=1),
        write_snapshot("candidates", candidates, step="test", version=1),
    )
    (row,) = read_rows(pools.train)
    assert [row[key] for key in ("instruction_id", "instruction", "input", "category", "parent_id", "origin")] == [
        "new", "Sort.", "2 1", "math", "old", "easy"
    ]  # fmt: skip
    assert [row["instruction_id"] for row in read_rows(pools.cache)] == ["old", "new"]
