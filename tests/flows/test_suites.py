"""lm-eval on a checkpoint, offline, with a task file of our own."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flows.cli import app
from flows.students import Student
from flows.suites import evaluate_on_suites
from storage.files import Checkpoint
from tests.recorded import record_run

TASK = """
task: capitals
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
ROWS = [
    {"question": "Which city is the capital of Australia?", "choices": ["Canberra", "Sydney"], "label": 0},
    {"question": "Which city is the capital of France?", "choices": ["Lyon", "Paris"], "label": 1},
]


def test_a_suite_of_no_task_is_refused(home: Path) -> None:
    record_run()
    done = CliRunner().invoke(app, ["evaluate", "--suite", ","])
    assert "name tasks of lm-eval" in str(done.exception)


def test_without_the_extra_a_suite_is_refused(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record_run()
    monkeypatch.setattr("flows.suites.find_spec", lambda name: None)
    done = CliRunner().invoke(app, ["evaluate", "--suite", "bbh"])
    assert "lion-distill[suites]" in str(done.exception)


def test_a_task_file_that_changes_in_a_folder_of_the_folder_is_evaluated_anew(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flows.suites.find_spec", lambda name: True)
    monkeypatch.setattr("flows.suites.version", lambda name: "0")
    monkeypatch.setattr("flows.suites.run_job", lambda *job: {"results": {}})
    student, studies = Student("mine", Checkpoint(digest="m", content="c")), set()
    (tmp_path / "own" / "deeper").mkdir(parents=True)
    for task in ("a", "b"):
        (tmp_path / "own" / "deeper" / "task.yaml").write_text(task)
        studies.add(evaluate_on_suites(student, ["task"], tmp_path / "own", None, 0).study_id)
    assert len(studies) == 2


@pytest.mark.slow
@pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs the extra suites (lm-eval)")
def test_a_task_of_our_own_is_scored_and_stands_in_the_runs_report(
    home: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "capitals.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "capitals.yaml").write_text(TASK.format(data=data))
    run = record_run("recorded-1", tiny_model)
    args = ["evaluate", "--suite", "capitals", "--suite-tasks", str(tmp_path / "own"), "--json"]
    done = CliRunner().invoke(app, args, catch_exceptions=False)
    study = json.loads(done.stdout)
    assert study["suite"]["capitals"]["acc"] in {0, 0.5, 1}
    assert (study["run_id"], study["iteration"]) == ("recorded-1", 1)
    said = json.loads((home / "evaluations" / study["study_id"] / "lm-eval.json").read_text())
    assert said["results"]["capitals"]["acc,none"] == study["suite"]["capitals"]["acc"]
    assert "capitals" in (run.folder / "report.html").read_text()
