"""What a run writes down of its stages, and when."""

from pathlib import Path
from typing import Any

import pytest
from prefect.client.schemas.objects import State, StateType

from flows import steps
from storage.files import Checkpoint
from storage.runs import IterationRecord, Manifest, load_manifest

STUDENT = Checkpoint(digest="d", content="c")


class Stage:
    """One that Prefect does not run."""

    def __init__(self, name: str, function: Any):
        self.name, self.function = name, function

    def with_options(self, **_: Any) -> Any:
        return lambda *inputs, return_state: State(type=StateType.COMPLETED, data=self.function(*inputs))


def test_what_a_stage_made_is_written_down_before_the_next_one_begins(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "stage_key_of", lambda stage, inputs: f"{stage.name}-key")
    record = IterationRecord(iteration=1)
    manifest = Manifest(run_id="run-1", iterations=[record])
    step = steps.Steps(manifest, record)

    record.student = step(Stage("finetune", lambda: STUDENT))
    seen: list[Manifest | None] = step(Stage("evaluate", lambda: [load_manifest("run-1")]))
    (during,) = seen
    assert during and during.pointers() == [STUDENT], "whoever is killed now keeps the student from gc"
    assert during.stage_keys == ["finetune-key"]
