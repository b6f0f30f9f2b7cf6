"""The loop with teacher, referee and generator behind an API: paid once, within the budget, and no key anywhere."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.fake_openai import FakeOpenAI
from tests.lion import arguments, digests, lion, shown

KEY = "sk-test-0123456789abcdef"


def paid(server: FakeOpenAI, tiny: Path, *more: str) -> list[str]:
    """The smoke run with the three paid roles at a server."""
    model = json.dumps(
        {"kind": "openai", "model": "gpt-test", "base_url": server.url, "price": {"input": 1, "output": 4}}
    )
    roles = [f"--set=teacher.model={model}", f"--set=generate.model={model}", "--set=generate.method=prompt"]
    referee = f"--set=referee={json.dumps({'kind': 'llm', 'model': json.loads(model)})}"
    command = [part for part in arguments(tiny) if "teacher" not in part and "generate" not in part]
    return [*command, *roles, referee, "--set=iterations=1", "--set=teacher.sampling.max_tokens=200", *more]


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


@pytest.mark.slow
def test_a_paid_run_buys_nothing_twice_and_leaves_no_key_behind(tmp_path: Path, tiny_model: Path) -> None:
    with FakeOpenAI(key=KEY) as server:
        done = lion(tmp_path, *paid(server, tiny_model))
        bought = dict(server.billed)
        assert set(bought.values()) == {1}
        run = shown(tmp_path)
        before = digests(tmp_path)
        for record in (tmp_path / "results").iterdir():
            record.unlink()  # every stage is done again, from the journal
        lion(tmp_path, *paid(server, tiny_model))
        assert dict(server.billed) == bought
        assert digests(tmp_path) != {} and digests(tmp_path) == before
    rows: list[dict[str, Any]] = json.loads(lion(tmp_path, "spend", "--json").stdout)
    assert {row["role"] for row in rows} == {"teacher", "referee", "generator"}
    assert sum(row["requests"] for row in rows) == len(bought)
    assert {row["run_id"] for row in rows} == {run["run_id"]}
    for folder, _, files in os.walk(tmp_path):
        for name in files:
            assert KEY.encode() not in (Path(folder) / name).read_bytes(), f"the key is in {name}"
    assert KEY not in done.stdout + done.stderr


@pytest.mark.slow
def test_a_cap_pauses_the_run_and_a_higher_one_goes_on(tmp_path: Path, tiny_model: Path) -> None:
    with FakeOpenAI(key=KEY) as server:
        stopped = lion(tmp_path, *paid(server, tiny_model, "--set=budget.max_requests=10"), code=3)
        assert "paused" in stopped.stderr
        assert len(server.billed) <= 10
        assert shown(tmp_path)["state"] == "paused"
        lion(tmp_path, *paid(server, tiny_model))
        assert set(server.billed.values()) == {1}
    assert shown(tmp_path)["state"] == "completed"


def test_a_wrong_key_ends_the_command_with_one_clear_line(tmp_path: Path, tiny_model: Path) -> None:
    with FakeOpenAI(key="another") as server:
        done = lion(tmp_path, *paid(server, tiny_model), code=2)
    assert "Traceback" not in done.stderr
    assert KEY not in done.stderr


def test_a_missing_key_is_named_before_anything_is_written(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    with FakeOpenAI() as server:
        done = lion(tmp_path / "home", *paid(server, tiny_model), code=2)
    assert "OPENAI_API_KEY is not set" in " ".join(done.stderr.split())
    assert not (tmp_path / "home").exists()
