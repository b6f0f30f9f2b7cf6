"""The report says whether it helped: by the measure that the run goes by, with its interval, and of how many."""

from pathlib import Path
from typing import Any

import pytest

from storage.catalog import query
from storage.pools import instruction_id
from storage.runs import Manifest
from tasks.gains import Described, gain_charts
from tasks.report import HARD_SHARE, MOST_CATEGORIES, verdict, write_report
from tests import recorded
from tests.recorded import HELDOUT_IDS, evaluation, record_run, reviews, snapshot


def with_student(manifest: Manifest, *rows: tuple[str, float, float], **changed: Any) -> Manifest:
    """The run, its one student having these held-out answers."""
    manifest.iterations[0].evaluation = evaluation(*rows).model_copy(update=changed)
    return manifest


@pytest.mark.parametrize(
    ("measure", "said"), [("loss", "The student did not get better"), ("score", "The student got better")]
)
def test_better_is_what_the_runs_own_measure_says(home: Path, measure: str, said: str) -> None:
    run = with_student(record_run("r", None, f"stop.measure={measure}"), ("Lava.", 40.0, 6.0), ("5", 40.0, 3.0))
    assert verdict(run).startswith(f"{said} (gain in {measure}: ")


def test_a_gain_that_may_be_none_is_not_called_better(home: Path) -> None:
    run = with_student(record_run(), ("Lava.", 10.0, 6.0), ("5", 31.0, 3.0))
    assert verdict(run) == (
        "That the student got better is not sure (gain in loss: +0.950 nats per token, 95 % interval -0.100 to +2.000)."
    )


def test_every_held_out_figure_has_its_unit_and_number_and_a_missing_one_is_no_zero(home: Path) -> None:
    run = with_student(record_run(), ("Lava.", 20.0, 6.0), ("5", 10.0, 3.0), score=None, scored=0, rows=3)
    both = ("teacher_first", "student_first")
    judged = [(HELDOUT_IDS[0], order, 8.0, 4.0) for order in both] + [
        (HELDOUT_IDS[1], order, None, None) for order in both
    ]
    assert run.baseline.evaluation
    run.baseline.evaluation.reviews = snapshot("reviews", reviews(*judged), "referee")
    text = " ".join(write_report(run).read_text().split())
    assert "score 1.50 &rarr; <b>no figure</b> of 10, on 2 of 2 instructions, after 1 iteration." in text
    assert "At iteration 1 only 0 have a score." in text
    assert "[50.0, 50.0] of 1</span>" in text, "the other pair of answers has no valid review"


def test_an_iteration_that_did_not_end_is_not_counted(home: Path) -> None:
    run = record_run()
    run.iterations.append(run.iterations[0].model_copy(update={"iteration": 2, "evaluation": None}))
    text = " ".join(write_report(run).read_text().split())
    assert "after 1 iteration. <b>The student got better" in text
    assert "</b> The student to use is that of iteration 1." in text


def test_a_referees_scores_and_a_metrics_are_not_on_one_chart(home: Path) -> None:
    run = record_run()
    assert run.baseline.evaluation
    assert [point["iteration"] for point in points(run)] == [0, 1]
    assert "(ROUGE-L)" in relative_score_of(run)[1]
    judged = [(HELDOUT_IDS[0], order, 8.0, 4.0) for order in ("teacher_first", "student_first")]
    run.baseline.evaluation.reviews = snapshot("reviews", reviews(*judged), "referee")
    assert [(point["iteration"], point["value"]) for point in points(run)] == [(0, 50.0)]
    assert "(the referee's, mean of both orders)" in relative_score_of(run)[1]


def points(run: Manifest) -> list[dict[str, Any]]:
    """What the chart of the relative score shows."""
    return relative_score_of(run)[2].to_dict()["data"]["values"]


def relative_score_of(run: Manifest) -> Described:
    (described,) = (each for each in gain_charts(run) if each[0] == "Relative score")
    return described


def test_an_answer_that_does_not_end_is_cut_and_the_page_says_how_much(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorded, "SEEDS", ["<b>" * 10_000, *recorded.SEEDS[1:]])
    monkeypatch.setattr(recorded, "IDS", [instruction_id(text, None) for text in recorded.SEEDS])
    page = write_report(recorded.record_run()).read_text()
    assert "&lt;b&gt;" * 3333 + "&lt; … (20,000 characters more)" in page
    assert len(page) < 200_000


def test_a_damaged_evaluation_is_named_and_keeps_no_run_from_ending(home: Path) -> None:
    damaged = home / "evaluations" / "another-1" / "study.json"
    damaged.parent.mkdir(parents=True)
    damaged.write_text("{")
    assert f"Evaluations are not shown: {damaged} cannot be read" in write_report(record_run()).read_text()


@pytest.mark.parametrize(("categories", "bars"), [(MOST_CATEGORIES, MOST_CATEGORIES), (60, MOST_CATEGORIES)])
def test_the_hard_share_shows_the_largest_categories_and_counts_the_others(
    home: Path, categories: int, bars: int
) -> None:
    named = {f"i{number}": f"category {number:02}" for number in range(categories)}
    named |= {f"j{number}": f"category {number:02}" for number in range(9)}  # these have two
    pool = [{"instruction_id": id, "instruction": id, "category": name, "origin": "seed"} for id, name in named.items()]
    verdicts = [{"instruction_id": id, "difficulty": "hard" if id.startswith("j") else "easy"} for id in named]
    made = {"verdicts": snapshot("verdicts", verdicts, "discriminate"), "pool": snapshot("instructions", pool, "seed")}
    rows = query(HARD_SHARE, {"most": MOST_CATEGORIES}, **made)
    assert len(rows) == bars and sum(row["rows"] for row in rows) == categories + 9
    assert [(row["share"], row["hard"]) for row in rows[:9]] == [(0.5, 1)] * 9
    if categories > bars:
        others = categories - MOST_CATEGORIES + 1
        assert {"category": f"{others} smaller ones", "share": 0, "hard": 0, "rows": others} in rows
