"""Cards, push, compare, contamination and the report on a recorded run, in this process."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from flows.cli import app
from flows.terminal import Refusal
from storage.files import StorageError
from storage.journal import Journal
from storage.pools import read_rows
from storage.runs import Manifest
from storage.studies import Study
from tasks.prepare import ModelNotFound
from tasks.report import write_report
from tests import recorded
from tests.recorded import HELDOUT_IDS, SEEDS, record_run
from tests.storage.test_journal import ANSWER


@pytest.fixture
def run(home: Path) -> Manifest:
    return record_run()


def said(*args: str) -> str:
    done = CliRunner().invoke(app, list(args), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_the_card_tells_data_method_scores_with_intervals_terms_and_limits(run: Manifest, tmp_path: Path) -> None:
    said("card", "--to", str(tmp_path / "README.md"))
    card = (tmp_path / "README.md").read_text()
    assert card.startswith('---\nlicense: "apache-2.0"\n')
    assert "| 1 (this one) | 1.500 | 4.50 | 45.0 % [30.0, 60.0] | +1.500 [+1.000, +2.000] |" in card
    for part in ("## Data", "## Training", "`learning_rate`: 0.001", "## Licence", "## Limits", "arXiv 2305.12870"):
        assert part in card
    assert "trained on 2 of 3 rows; 1 hard, 1 easy, 1 undecided" in card


def test_the_card_says_of_how_many_answers_its_figures_are_and_whose_scores_the_relative_ones_are(
    run: Manifest,
) -> None:
    assert "On 2 of 2 held-out instructions" in said("card") and "score is its share of the teacher's" in said("card")
    evaluation = run.iterations[0].evaluation
    assert evaluation
    judged = recorded.snapshot("reviews", recorded.reviews((HELDOUT_IDS[0], "teacher_first", 9.0, 4.0)), "referee")
    of_one = recorded.snapshot("evaluations", read_rows(evaluation.details)[:1], "evaluate")
    run.iterations[0].evaluation = evaluation.model_copy(update={"details": of_one, "reviews": judged})
    run.save()
    card = said("card")
    assert "On 1 of 2 held-out instructions" in card and "score is what the referee gave them" in card


def test_the_card_has_no_figures_of_another_referee_or_of_other_answers_in_its_columns(run: Manifest) -> None:
    first, orders = run.iterations[0], ("teacher_first", "student_first")
    assert first.evaluation
    judged = recorded.reviews(*((HELDOUT_IDS[0], order, 8.0, 7.0) for order in orders))
    by_model = first.evaluation.model_copy(update={"reviews": recorded.snapshot("reviews", judged, "referee")})
    run.iterations.append(first.model_copy(update={"iteration": 2, "evaluation": by_model}))
    run.save()
    assert "| 1 | 1.500 | 4.50 |  | +1.500" in said("card", run.run_id)
    assert "| 0 | 3.000 | 1.50 |  |" in said("card", run.run_id)
    assert "| 2 (this one) | 1.500 | 4.50 | 87.5 % [87.5, 87.5] |" in said("card", run.run_id)
    assert "| 0 | 3.000 | 1.50 | 15.0 % " in said("card", f"{run.run_id}/1"), "by the same metric"
    run.iterations[0].evaluation = None  # as of another teacher
    run.save()
    assert "| 1 |  |  |  |  |" in said("card", run.run_id)


def test_card_and_report_say_of_how_many_rows_a_suites_figures_are(run: Manifest) -> None:
    (_, student) = run.students()[1]
    Study(
        study_id="suite-1", student="s", checkpoint=student, run_id=run.run_id, iteration=1, reference="lm-eval",
        questions="arc", rows=0, settings={"limit": 20}, suite={"arc": {"acc": 0.5}},
    ).save()  # fmt: skip
    assert "- `arc` (first 20 rows of a task): {'acc': 0.5}" in said("card")
    assert "first 20 rows of a task" in write_report(run).read_text()


def test_card_and_report_name_every_teacher_whose_text_taught_the_model(home: Path) -> None:
    run = record_run("several-1", None, "teacher.further=[{share: 0.2, model: {kind: openai, model: o4-mini}}]")
    assert "A student distilled from **embedded**, **o4-mini** by" in said("card")
    assert "teacher embedded, o4-mini<" in write_report(run).read_text()


@pytest.mark.parametrize("args", [["best"], ["serve"], ["card"]])
def test_a_student_whose_checkpoint_is_gone_is_refused_by_name(run: Manifest, args: list[str]) -> None:
    (path,) = {checkpoint.path for number, checkpoint in run.students() if number == 1}
    shutil.rmtree(path)
    done = CliRunner().invoke(app, args)
    assert isinstance(done.exception, Refusal) and f"{run.run_id}/1 is gone: {path}" in str(done.exception)


def test_a_run_whose_rows_are_gone_is_told_so_by_what_reads_them(run: Manifest, tmp_path: Path) -> None:
    for path in (tmp_path / "home" / "objects" / "evaluations").iterdir():
        path.write_bytes(path.read_bytes()[:-9])
    done = CliRunner().invoke(app, ["compare", run.run_id, run.run_id])
    assert isinstance(done.exception, StorageError) and "is gone or damaged" in str(done.exception)


def test_a_name_that_is_no_run_is_taken_for_a_model_with_the_runs_that_there_are(run: Manifest) -> None:
    done = CliRunner().invoke(app, ["card", "--to", "card.md", "./nope"])
    assert f"no run here (there are: {run.run_id})" in done.output and isinstance(done.exception, ModelNotFound)


def test_without_a_token_push_only_says_what_would_go(run: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    output = said("push", "me/mine")
    assert "Dry run" in output
    assert {"config.json", "model.safetensors", "README.md"} <= set(output.split())
    assert "job.json" not in output and "log.txt" not in output


def test_with_a_token_the_model_and_its_card_go_to_a_private_repository(
    run: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, Any]] = []

    class Hub:
        def __init__(self, token: str):
            calls.append(("token", token))

        def __getattr__(self, name: str) -> Any:
            return lambda *args, **given: calls.append((name, {"args": args, **given}))

    huggingface_hub = pytest.importorskip("huggingface_hub", reason="needs the extra hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    output = said("push", "me/mine")
    asked = dict(calls)
    assert asked["create_repo"] == {"args": ("me/mine",), "private": True, "exist_ok": True}
    assert asked["upload_folder"]["allow_patterns"] == ["config.json", "model.safetensors"]
    assert asked["upload_file"]["path_or_fileobj"].startswith(b"---\nlicense")
    assert "hf_secret" not in output


def test_best_says_whether_the_student_before_any_training_was_beaten_or_none_was_measured(run: Manifest) -> None:
    run.baseline.student = run.iterations[0].student
    run.iterations[0].rolled_back = True
    run.save()
    assert "was never beaten" in said("best")
    run.iterations[0].evaluation = None
    run.save()
    assert "the student before any training; none was measured since" in said("best")


def test_compare_puts_runs_side_by_side_with_the_settings_that_differ(run: Manifest) -> None:
    record_run("second-1", None, "seed=7")
    rows = json.loads(said("compare", "recorded", "second", "--json"))
    assert [row["run"] for row in rows] == ["recorded-1", "second-1"]
    assert rows[1]["gain in loss over the first"] == "0.000 [0.000, 0.000]"
    assert rows[0]["relative"] == "0.450 [0.300, 0.600]"
    table = said("compare", "recorded", "second")
    assert re.search(r"seed\s*│\s*0\s*│\s*7", table)


def test_compare_counts_the_rows_that_made_the_best_student_and_no_others(run: Manifest) -> None:
    run.iterations.append(run.iterations[0].model_copy(update={"iteration": 2, "rolled_back": True}))
    run.save()
    (row, _) = json.loads(said("compare", "recorded", "recorded", "--json"))
    assert (row["best iteration"], row["rows trained on"]) == ("1 of 2", 2)


def test_compare_counts_what_the_nights_before_have_paid_as_far_as_a_run_goes_on_from_them(run: Manifest) -> None:
    night = record_run("second-1", None, f"start_from=run:{run.run_id}:1")
    with Journal() as journal:
        for key, (payer, iteration, usd) in enumerate([(run, 0, 0.25), (run, 1, 0.5), (run, 2, 8.0), (night, 2, 1.0)]):
            paid = {"key": str(key), "run_id": payer.run_id, "iteration": iteration, "cost_usd": usd}
            journal.add([replace(ANSWER, **paid)])
    assert [row["usd"] for row in json.loads(said("compare", "rec", "second", "--json"))] == [8.75, 1.75]


def test_compare_names_a_run_whose_student_was_held_against_other_answers(
    run: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = recorded.snapshot
    monkeypatch.setattr(recorded, "snapshot", lambda *given: plain(*given, run.baseline.snapshots["seeds"]))
    record_run("second-1")
    assert "No gain: second-1 was held against other held-out answers than recorded-1." in said(
        "compare", "rec", "second"
    )


def test_compare_says_so_where_losses_are_of_other_tokens(run: Manifest) -> None:
    other = record_run("second-1")
    evaluation = other.iterations[0].evaluation
    assert evaluation
    longer = [row | {"tokens": 20} for row in read_rows(evaluation.details)]
    of_others = {"details": recorded.snapshot("evaluations", longer, "evaluate"), "loss": 0.75}
    other.iterations[0].evaluation = evaluation.model_copy(update=of_others)
    other.save()
    assert "No gain in loss: to second-1 the held-out answers are other tokens than to recorded-1." in said(
        "compare", "rec", "second"
    )


def test_compare_puts_a_referees_scores_and_a_metrics_not_in_one_row(run: Manifest) -> None:
    other = record_run("second-1")
    evaluation, orders = other.iterations[0].evaluation, ("teacher_first", "student_first")
    assert evaluation
    judged = recorded.reviews(*((HELDOUT_IDS[0], order, 8.0, 7.0) for order in orders))
    reviews = recorded.snapshot("reviews", judged, "referee")
    other.iterations[0].evaluation = evaluation.model_copy(update={"reviews": reviews})
    other.save()
    rows = json.loads(said("compare", "rec", "second", "--json"))
    assert [row["relative"] for row in rows] == ["0.450 [0.300, 0.600]", ""]
    assert "No relative score: second-1 has another kind of referee than recorded-1." in said(
        "compare", "rec", "second"
    )


def test_contamination_finds_pool_rows_near_an_evaluation(run: Manifest, tmp_path: Path) -> None:
    file = tmp_path / "question.jsonl"
    file.write_text(json.dumps({"question_id": 1, "turns": ["Something new entirely.", "Why is the sky so blue?"]}))
    (row,) = json.loads(CliRunner().invoke(app, ["contamination", "--against", str(file), "--json"]).stdout)
    assert (row["instruction"], row["near"], row["run_id"]) == (SEEDS[0], "Why is the sky so blue?", "recorded-1")
    assert "0 of 3 instructions" in said("contamination", "--against", "bundled")


def test_the_report_shows_intervals_gains_training_and_the_most_improved(run: Manifest) -> None:
    page = write_report(run).read_text()
    for title in ("Relative score", "Gain of each iteration", "Training loss", "Most improved", "Lineage"):
        assert title in page
    assert "+1.500" in page and "[+1.000, +2.000]" in page
    assert "1.00 &rarr; 6.00" in page and "Lava." in page
    assert "1 seeds, 1 candidates" in page
    assert re.findall(r"""(?:src|href)=["'](?!#)([^"']+)""", page) == []
