"""What a run shows in the Prefect UI."""

import base64
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows import artifacts
from flows.artifacts import CELL, cell, publish_artifacts
from storage.journal import Journal
from storage.runs import Generated, JudgeHealth, Manifest
from tasks.report import charts
from tests.recorded import HELDOUT_IDS, record_run, reviews, snapshot
from tests.storage.test_journal import ANSWER

SERVER = "http://127.0.0.1:4200/api"


@pytest.fixture
def run(home: Path) -> Manifest:
    """A run none of whose counts are alike."""
    run = record_run("recorded-1", None, "name=mine")
    record = run.iterations[0]
    record.cache_rows = 34
    record.hard, record.easy, record.undecided = 5, 7, 11
    record.generated = Generated(accepted=13, rejected={"near_duplicate": 2, "surplus": 15}, wanted=19)
    record.seconds = {"finetune": 20.4, "teacher": 3.2}
    return run


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What Prefect's server is told, by key."""
    told: dict[str, Any] = {}

    def table(rows: list[dict[str, Any]], key: str, description: str) -> None:
        told[key] = (rows, description)

    def image(url: str, key: str, description: str) -> None:
        told[key] = (url, description)

    def link(url: str, link_text: str, key: str, description: str) -> None:
        told[key] = (url, description)

    for kind, create in (("table", table), ("image", image), ("link", link)):
        monkeypatch.setattr(artifacts, f"create_{kind}_artifact", create)
    return told


def published(run: Manifest) -> None:
    with temporary_settings({PREFECT_API_URL: SERVER}):
        publish_artifacts(run)


def test_each_iteration_has_its_counts_and_figures_and_a_missing_figure_is_no_zero(
    run: Manifest, shown: dict[str, Any]
) -> None:
    assert run.baseline.evaluation
    run.baseline.evaluation = run.baseline.evaluation.model_copy(update={"score": None})
    judged = [(HELDOUT_IDS[0], order, 8.0, 5.0) for order in ("teacher_first", "student_first")]
    evaluation = run.iterations[0].evaluation
    assert evaluation
    evaluation.reviews = snapshot("reviews", reviews(*judged), "referee")
    published(run)
    rows, said = shown["mine-iterations"]
    nothing = {"trained on": "", "hard / easy / undecided": "", "new / rejected": ""}
    assert rows == [
        {"iteration": "start", **nothing, "loss": 3.0, "score": "", "seconds": 0},
        {"iteration": 1, "trained on": "2 of 3", "hard / easy / undecided": "5 / 7 / 11", "new / rejected": "13 / 17"}
        | {"loss": 1.5, "score": 4.5, "judged, %": 62.5, "seconds": 24},
    ]
    assert said.startswith("Run recorded-1. The student got better (gain in loss: +1.5")


def test_the_hardest_rows_stand_widest_gap_first_with_each_answer_in_its_own_column(
    run: Manifest, shown: dict[str, Any]
) -> None:
    published(run)
    both = {"category": "science"}
    assert shown["mine-hardest"][0] == [
        both | {"gap": 4.0, "instruction": "Why is the sky blue?", "teacher": "Rayleigh scattering.", "student": "It is blue."},
        both | {"gap": 0.0, "instruction": "Name three prime numbers.", "teacher": "2, 3 and 5.", "student": "4, 6, 8."},
    ]  # fmt: skip


def test_the_referee_is_shown_where_it_is_a_model(run: Manifest, shown: dict[str, Any]) -> None:
    published(run)
    assert "mine-judge" not in shown
    run.iterations[0].judge = JudgeHealth(
        reviews=6, pairs=2, flip_share=0.5, tie_share=0.25, unusable={"unparsable": 1}
    )
    published(run)
    (row,) = shown["mine-judge"][0]
    assert (row["iteration"], row["reviews"], row["pairs"]) == (1, 6, 2)
    assert (row["flip_share"], row["tie_share"]) == (0.5, 0.25) and "unusable" not in row


def test_what_was_paid_is_shown_by_role_with_its_sum(run: Manifest, shown: dict[str, Any]) -> None:
    published(run)
    assert shown["mine-spend"] == ([{"nothing": "All models of this run are on this machine."}], "$0.00 so far.")
    paid = replace(ANSWER, run_id=run.run_id, cost_usd=0.123456, completion_tokens=7)
    with Journal() as journal:
        journal.add([paid, replace(paid, key="k2"), replace(paid, key="k3", role="referee", iteration=2, cost_usd=3.0)])
    published(run)
    rows, said = shown["mine-spend"]
    assert sorted(rows, key=lambda row: row["role"]) == [
        {"iteration": 2, "role": "referee", "model": "m", "requests": 1, "tokens": 17, "usd": 3.0},
        {"iteration": 1, "role": "teacher", "model": "m", "requests": 2, "tokens": 34, "usd": 0.2469},
    ]
    assert said == "$3.25 so far."


def test_every_chart_of_the_report_is_shown_under_a_key_that_stays(run: Manifest, shown: dict[str, Any]) -> None:
    run.iterations.append(run.iterations[0].model_copy(update={"iteration": 12, "threshold": 3.0}))
    published(run)
    made = {chart["title"]: chart for chart in charts(run)}
    keys = {"held-out-loss", "held-out-score", "relative-score", "gain-of-each-iteration", "training-loss"}
    keys |= {"score-gaps", "hard-share-by-category", "what-became-of-the-candidates"}
    images = {key.removeprefix("mine-"): told for key, told in shown.items() if told[0][:11] == "data:image/"}
    assert images.keys() == keys
    last = made["Score gaps, iteration 12"]
    url, said = images["score-gaps"]
    assert base64.b64decode(url.removeprefix("data:image/svg+xml;base64,")).decode() == last["svg"]
    assert said == f"Score gaps, iteration 12. {last['note']}"


def test_a_key_has_one_state_of_its_chart_for_each_iteration_in_its_history(
    run: Manifest, shown: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(artifacts, "create_image_artifact", lambda url, key, description: told.append(key))
    run.iterations.append(run.iterations[0].model_copy(update={"iteration": 2}))
    published(run)
    assert told.count("mine-score-gaps") == 1 and len(told) == len(set(told))


def test_the_report_is_linked_where_it_is_served(
    run: Manifest, shown: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LION_REPORTS_URL", raising=False)
    published(run)
    report = run.folder / "report.html"
    assert shown["mine-report"] == (report.as_uri(), str(report))
    monkeypatch.setenv("LION_REPORTS_URL", "https://reports.example/runs/")
    published(run)
    assert shown["mine-report"][0] == "https://reports.example/runs/recorded-1/report.html"


def test_without_a_server_there_is_nobody_to_show_it_to(run: Manifest, shown: dict[str, Any]) -> None:
    with temporary_settings({PREFECT_API_URL: None}):
        publish_artifacts(run)
    assert shown == {}


def test_a_text_that_is_too_long_for_a_table_is_cut_and_shows_it() -> None:
    assert cell("x" * CELL) == "x" * CELL
    assert cell("x" * CELL + "y") == "x" * CELL + " …"
    assert cell(None) == ""


@pytest.mark.parametrize(
    "text",
    [
        "![](http://evil.example/x.png)",
        "![x][y]\n\n[y]: http://evil.example/x.png",
        "[click](javascript:alert(1)) [click](http://evil.example) <http://evil.example>",
        '<img src="http://evil.example/x.png">',
    ],
)
def test_a_strangers_text_in_a_table_fetches_no_picture_and_is_no_link(text: str) -> None:
    tags = ("<img", "<a ")
    read = MarkdownIt().render
    assert any(tag in read(text) for tag in tags)
    assert not any(tag in read(cell(text)) for tag in tags)
    assert cell(text).replace("\u2060", "") == text
