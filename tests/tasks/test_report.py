"""The report says whether it helped: by the measure that the run goes by, with its interval, and of how many."""

import re
from dataclasses import asdict, replace
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from storage.catalog import query
from storage.files import Checkpoint
from storage.journal import Journal, Loss
from storage.pools import instruction_id
from storage.runs import Generated, Interval, JudgeHealth, Manifest
from storage.studies import Figures, Relative, Study
from tasks import report
from tasks.gains import MOST, Described, gain_charts, most_improved
from tasks.report import HARD_SHARE, MOST_CATEGORIES, charts, progress_rows, verdict, widest, write_report
from tasks.selection import compare
from tests import recorded
from tests.recorded import HELDOUT_IDS, IDS, evaluation, record_run, responses, reviews, snapshot
from tests.storage.test_journal import ANSWER


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


@pytest.mark.parametrize("iterations", [4, 9])
def test_every_iteration_has_a_colour_of_its_own_among_the_candidates(iterations: int) -> None:
    from tasks.report import _candidates, _chart

    rows = [{"iteration": i, "outcome": "accepted", "candidates": 5} for i in range(1, iterations + 1)]
    drawn = _chart("candidates", "", _candidates(rows))["svg"]
    assert len({*re.findall(r'<path aria-label="[^"]*" [^>]*fill="([^"]+)"', drawn)}) == iterations


def test_a_gain_on_one_instruction_is_not_called_better(home: Path) -> None:
    run = record_run()
    assert verdict(run).startswith("The student got better (")
    measured = run.iterations[0].evaluation
    assert measured
    run.iterations[0].evaluation = measured.model_copy(update={"without_loss": 1})
    assert verdict(run).startswith("That the student got better is not sure (")


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
    assert '[50.0, 50.0]</span><span class="under">of 1</span>' in text, "the other pair of answers has no valid review"


def test_answers_whose_loss_could_not_be_had_are_not_among_those_that_it_is_of(home: Path) -> None:
    run = record_run()
    assert run.baseline.evaluation
    run.baseline.evaluation = run.baseline.evaluation.model_copy(update={"without_loss": 1})
    text = words(page_of(run))
    assert "of 10, on 1 of 2 instructions" in text and "teacher's answers to 1 of 2 held-out instructions" in text


def test_an_iteration_that_did_not_end_is_not_counted(home: Path) -> None:
    run = record_run()
    run.iterations.append(run.iterations[0].model_copy(update={"iteration": 2, "evaluation": None}))
    text = " ".join(write_report(run).read_text().split())
    assert "after 1 iteration. <b>The student got better" in text
    assert "nats per token, 95 % interval" in text and "). The student to use is that of iteration 1.</b>" in text


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


@pytest.fixture
def run(home: Path) -> Manifest:
    """A run of two iterations, the second rolled back, none of whose counts are alike."""
    run = record_run()
    first, before = run.iterations[0], run.baseline.evaluation
    assert first.evaluation and before
    first.train_rows, first.cache_rows, first.trained_rows = 52_002, 34, 51_393
    first.left_out = {"failed": 1, "no_label": 89, "validation": 519}
    first.hard, first.easy, first.undecided = 5, 7, 11
    first.generated = Generated(accepted=13, rejected={"near_duplicate": 2, "surplus": 15}, wanted=19, notes=["few"])
    first.seconds, first.cached = {"finetune": 20.46, "teacher": 3.0}, {"finetune": False, "teacher": True}
    run.baseline.seconds, run.baseline.cached = {"seeds": 1.2}, {"seeds": False}
    worse = evaluation(("Lava", 25.0, 4.0), ("6", 11.0, 2.0))
    run.iterations.append(
        first.model_copy(
            update={
                "iteration": 2, "evaluation": worse, "comparison": compare(worse, first.evaluation, 1, 0),
                "rolled_back": True, "notes": ["rolled back"], "left_out": {}, "threshold": None,
                "generated": Generated(accepted=1, wanted=3), "seconds": {"finetune": 9.0}, "cached": {"finetune": False},
                "training": {"loss_by_step": [[1, 7.0], [2, 5.0]]},
            }
        )
    )  # fmt: skip
    return run


def page_of(run: Manifest) -> str:
    return write_report(run).read_text()


def table(page: str, column: str) -> list[list[str]]:
    """The cells of the table that has such a column."""
    (found,) = (each for each in re.findall("<table.*?>(.*?)</table>", page, re.S) if f">{column}</th>" in each)
    rows = re.findall("<tr>(.*?)</tr>", found, re.S)
    return [[words(cell) for cell in re.findall("<t[dh].*?>(.*?)</t[dh]>", row, re.S)] for row in rows]


def words(html: str) -> str:
    return " ".join(unescape(re.sub("<[^>]+>", " ", html)).split())


def articles(page: str) -> list[str]:
    return [words(article) for article in re.findall("<article>(.*?)</article>", page, re.S)]


def marks(drawn: list[dict[str, str]], title: str) -> list[str]:
    """What the chart says of each thing it draws, axes and legends left out."""
    (chart,) = (each for each in drawn if each["title"] == title)
    said = [unescape(text) for text in re.findall('aria-label="([^"]+)"', chart["svg"])]
    return sorted({text for text in said if not text.startswith(("X-axis", "Y-axis", "Symbol legend"))})


def test_each_iteration_is_a_row_of_the_table_with_every_count_under_its_own_name(run: Manifest) -> None:
    page = page_of(run)
    names, *rows = table(page, "train rows")
    assert [dict(zip(names, row, strict=True)) for row in rows[1:]] == [
        {"iteration": "1", "train rows": "51,393 of 52,002", "cache rows": "34", "hard": "5", "easy": "7"}
        | {"undecided": "11", "threshold": "1.00", "accepted": "13 of 19", "rejected": "17", "held-out loss": "1.500"}
        | {"score": "4.50", "gain in loss [95 %]": "+1.500 [+1.000, +2.000]", "seconds": "23"},
        {"iteration": "2", "train rows": "51,393 of 52,002", "cache rows": "34", "hard": "5", "easy": "7"}
        | {"undecided": "11", "threshold": "", "accepted": "1 of 3", "rejected": "0", "held-out loss": "1.800"}
        | {"score": "3.00", "gain in loss [95 %]": "-0.300 [-0.500, -0.100] rolled back", "seconds": "9"},
    ]
    assert rows[0] == ["start", *[""] * 8, "3.000", "1.50", "", "1"]
    said = words(page)
    assert "Iteration 1: few" in said and "Iteration 2: rolled back" in said
    why = "1 failed, 89 whose prompt fills max_length, 519 kept for validation"
    assert f"Iteration 1: not trained on: {why}" in said and "Iteration 2: not trained on" not in said
    assert "Seeds that are not used" not in said
    assert "Kept out of the pools because they are near a held-out instruction: 1 seeds, 2 candidates." in said
    assert "loss 3.000 → 1.500 nats per token, score 1.50 → 4.50 of 10" in said
    assert "The student to use is that of iteration 1." in said


def test_the_report_counts_the_seeds_that_are_not_used(run: Manifest) -> None:
    run.seeds |= {"duplicates": 1234, "beyond_max_rows": 5}
    said = words(page_of(run))
    assert "Seeds that are not used: 1,234 said before by another, 5 beyond seeds.max_rows." in said


def test_iterations_whose_figures_are_left_out_are_counted_all_the_same(run: Manifest) -> None:
    assert "after 2 iterations" in words(page_of(run))
    run.iterations[0].evaluation = None
    assert "after 2 iterations" in words(page_of(run))
    run.iterations.pop()
    assert "after 0 iterations" in words(page_of(run))


def test_a_student_that_was_rolled_back_without_a_figure_is_marked_so(run: Manifest) -> None:
    comparison = run.iterations[1].comparison
    assert comparison
    run.iterations[1].comparison = comparison.model_copy(update={"loss_gain": None})
    assert table(page_of(run), "train rows")[-1][-2] == "rolled back"


def test_the_stages_times_stand_under_their_iteration_and_what_was_there_already_is_cached(run: Manifest) -> None:
    assert table(page_of(run), "stage") == [
        ["stage", "before", "1", "2"],
        ["seeds", "1.2 s", "", ""],
        ["finetune", "", "20.5 s", "9.0 s"],
        ["teacher", "", "cached", ""],
    ]


def test_the_table_of_the_judge_has_each_share_under_its_own_name_and_no_share_is_no_zero(run: Manifest) -> None:
    unusable = {"unparsable": 3}
    run.iterations[0].judge = JudgeHealth(
        reviews=40, unusable=unusable, unusable_share=0.075, pairs=18, flip_share=0.5, tie_share=0.25, position_bias=-0.5,
        vote_agreement=0.75,
    )  # fmt: skip
    run.iterations[1].judge = JudgeHealth(reviews=2, pairs=0)
    names, *rows = table(page_of(run), "winner changes with the order")
    assert [dict(zip(names, row, strict=True)) for row in rows] == [
        {"iteration": "1", "reviews": "40", "unusable": "8% 3 unparsable", "pairs": "18"}
        | {"winner changes with the order": "50%", "ties": "25%"}
        | {"first place is worth": "-0.50 points", "votes agree": "75%"},
        {"iteration": "2", "reviews": "2", "unusable": "", "pairs": "0"}
        | {"winner changes with the order": "", "ties": "", "first place is worth": "", "votes agree": ""},
    ]


def test_what_was_paid_is_told_by_role_with_its_sum(run: Manifest) -> None:
    paid = replace(ANSWER, run_id=run.run_id, cost_usd=0.25, prompt_tokens=10, completion_tokens=7)
    lost = Loss(run.run_id, "referee", 0, "m", tokens=100, usd=0.75, created=ANSWER.created)
    with Journal() as journal:
        journal.add([paid, replace(paid, key="k2"), replace(paid, key="k3", role="referee", iteration=0)], [lost])
    names, *rows = table(page_of(run), "dollars")
    assert names == ["role", "model", "iteration", "requests", "tokens in", "out", "dollars", "perhaps"]
    assert sorted(rows) == [
        ["all", "", "", "3", "30", "21", "0.7500", ""],
        ["referee", "m", "before", "1", "10", "7", "0.2500", "0.7500"],
        ["teacher", "m", "1", "2", "20", "14", "0.5000", ""],
    ]


def test_the_evaluations_of_its_students_are_in_the_report_and_no_others(run: Manifest) -> None:
    mean, effect = Interval(value=0.8, low=0.7, high=0.9), Interval(value=-0.25, low=-1, high=1)
    figures = Figures(
        questions=9, by_order={}, mean=mean, pooled=None, wins=2, ties=3, losses=4, position_effect=effect
    )  # fmt: skip
    for run_id, name, suite in (
        (run.run_id, "q.jsonl", {}),
        ("another", "p", {}),
        (run.run_id, "s", {"arc": {"acc": 0.5}}),
    ):
        Study(
            study_id=name, student="s", checkpoint=Checkpoint(digest="d", content="c"), run_id=run_id, iteration=2,
            reference="teacher", questions=name, rows=8, settings={"referee": {"kind": "llm"}}, suite=suite,
            relative=None if suite else Relative(overall=figures, by_category={}, left_out=0, tie_margin=0.5),
        ).save()  # fmt: skip
    names, *rows = table(page_of(run), "against")
    assert rows[1] == ["arc", "2", "acc 0.5"]
    assert dict(zip(names, rows[0], strict=True)) == {
        "questions": "q.jsonl", "iteration": "2", "against": "teacher", "referee": "llm", "turns": "9",
        "relative score [95 %]": "80.0 % [70.0, 90.0]", "won / tied / lost": "2 / 3 / 4", "first place is worth": "-0.25 points",
    }  # fmt: skip
    assert len(rows) == 2


def test_each_answer_stands_under_the_name_of_who_gave_it(run: Manifest) -> None:
    made = run.iterations[1].snapshots
    cut = [row | {"status": "truncated"} for row in responses(["It is blue.", "4, 6, 8.", None], "student")]
    made["student_responses"] = snapshot("responses", cut, "student")
    assert articles(page_of(run)) == [
        "science · gap 4.00 Why is the sky blue? Teacher, 8.5 Rayleigh scattering. Student, 4.5 (cut) It is blue.",
        "science · gap 0.00 Name three prime numbers. Teacher, 6.0 2, 3 and 5. Student, 6.0 (cut) 4, 6, 8.",
        "science · score 1.00 → 6.00 What is a volcano? Before hm Now Lava. Teacher A mountain.",
        "science · score 2.00 → 3.00 Add 2 and 3. Before hm Now 5 Teacher 5",
    ]


def test_the_widest_gaps_are_those_of_the_last_iteration_that_was_judged(run: Manifest) -> None:
    first, last = run.iterations
    swapped = [
        {
            "instruction_id": key,
            "teacher_score": 9.0,
            "student_score": 9.0 - gap,
            "score_gap": gap,
            "difficulty": "hard",
        }
        for key, gap in zip(IDS, (1.0, 5.0, 3.0), strict=True)
    ]
    last.snapshots = first.snapshots | {"verdicts": snapshot("verdicts", swapped, "discriminate")}
    assert [(row["score_gap"], row["instruction"]) for row in widest(run, 2)] == [
        (5.0, recorded.SEEDS[1]),
        (3.0, recorded.SEEDS[2]),
    ]
    del last.snapshots["verdicts"]
    assert [row["score_gap"] for row in widest(run, 9)] == [4.0, 0.0]
    run.iterations.clear()
    assert widest(run, 9) == []


def test_only_answers_that_gained_are_most_improved_and_no_more_than_the_page_has_room_for(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorded, "HELDOUT", [f"Ask {number:02}." for number in range(MOST + 3)])
    run = record_run_with_scores([1.0] * (MOST + 3), [1.0, 0.5, *(2.0 + number for number in range(MOST + 1))])
    found = most_improved(run)
    assert [row["gained"] for row in found] == [float(gained) for gained in range(MOST + 1, 1, -1)]
    assert found[0]["instruction"] == f"Ask {MOST + 2:02}."
    one = evaluation(*(("hm", 1.0, score) for score in [0.5, *[1.0] * (MOST + 1), 3.0]))
    run.iterations[0].evaluation = one
    assert [row["gained"] for row in most_improved(run)] == [2.0], "an answer that stayed as good has not gained"
    run.iterations[0].rolled_back = True
    assert most_improved(run) == [], "the student to use is the one before training"


def record_run_with_scores(before: list[float], after: list[float]) -> Manifest:
    """A run of one iteration with these scores of its held-out answers."""
    ids = [instruction_id(text, None) for text in recorded.HELDOUT]
    run = Manifest(run_id="r", iterations=[])
    run.baseline.student = Checkpoint(digest="before", content="c")
    run.baseline.evaluation = evaluation(*(("hm", 1.0, score) for score in before))
    run.baseline.snapshots = {
        "heldout": snapshot("instructions", recorded.instructions(recorded.HELDOUT, "heldout"), "seed"),
        "heldout_answers": snapshot("responses", responses(["Yes."] * len(ids), "teacher", ids), "teacher"),
    }
    student = Checkpoint(digest="after", content="c")
    now = evaluation(*(("hm", 1.0, score) for score in after))
    run.iterations.append(recorded.IterationRecord(iteration=1, student=student, evaluation=now))
    return run


def test_the_charts_of_the_held_out_figures_draw_value_and_interval_of_each_iteration(run: Manifest) -> None:
    drawn, at = charts(run), "iteration (0: before training)"
    assert marks(drawn, "Held-out loss") == [
        f"{at}: 0; nats per token: 3; high: 3", f"{at}: 0; value: 3", f"{at}: 1; nats per token: 1; high: 2",
        f"{at}: 1; value: 1.5", f"{at}: 2; nats per token: 1.1; high: 2.5", f"{at}: 2; value: 1.8",
    ]  # fmt: skip
    assert marks(drawn, "Held-out score") == [
        f"{at}: 0; score: 1; high: 2", f"{at}: 0; value: 1.5", f"{at}: 1; score: 3; high: 6", f"{at}: 1; value: 4.5",
        f"{at}: 2; score: 2; high: 4", f"{at}: 2; value: 3",
    ]  # fmt: skip
    assert marks(drawn, "Relative score") == [
        f"{at}: 0; % of the teacher: 10; high: 20", f"{at}: 0; value: 15", f"{at}: 1; % of the teacher: 30; high: 60",
        f"{at}: 1; value: 45", f"{at}: 2; % of the teacher: 20; high: 40", f"{at}: 2; value: 30",
    ]  # fmt: skip
    assert marks(drawn, "Gain of each iteration") == [
        f"{at}: 1; nats per token: 1; high: 2", f"{at}: 1; value: 1.5", f"{at}: 2; nats per token: −0.5; high: −0.1",
        f"{at}: 2; value: −0.3", "zero: 0",
    ]  # fmt: skip
    assert marks(drawn, "Training loss") == [
        "optimizer step: 1; nats per token: 3; iteration: 1",
        "optimizer step: 1; nats per token: 7; iteration: 2",
    ]


def test_the_charts_of_the_rows_count_gaps_hard_ones_and_candidates(run: Manifest) -> None:
    run.iterations[1].threshold = 2.5
    drawn = charts(run)
    assert marks(drawn, "Score gaps, iteration 1") == [
        "score gap: 0 – 0.2; instructions: 1", "score gap: 3.8 – 4; instructions: 1", "threshold: 1",
    ]  # fmt: skip
    assert "threshold: 2.5" in marks(drawn, "Score gaps, iteration 2")
    (bar, label) = marks(drawn, "Hard share by category, iteration 2")
    assert label == f"{bar}; label: 1 of 2" and bar.endswith("%; category: science")
    assert marks(drawn, "What became of the candidates") == [
        "candidates: 13; outcome: accepted; iteration: 1", "candidates: 15; outcome: surplus; iteration: 1",
        "candidates: 1; outcome: accepted; iteration: 2", "candidates: 2; outcome: near_duplicate; iteration: 1",
    ]  # fmt: skip


def test_of_many_iterations_the_last_gaps_are_drawn_and_figures_stand_beside_the_first_and_the_last(
    run: Manifest,
) -> None:
    run.iterations = [run.iterations[0].model_copy(update={"iteration": number}) for number in range(1, 13)]
    gaps = [each for each in charts(run) if each["title"].startswith("Score gaps")]
    assert [each["title"].split()[-1] for each in gaps] == ["9", "10", "11", "12"]
    assert all(each["note"].endswith("Earlier iterations: in the view `verdicts`.") for each in gaps)
    loss = next(chart.to_dict() for title, _, chart in gain_charts(run) if title == "Held-out loss")
    (figures,) = (layer["data"] for layer in loss["layer"] if layer["mark"]["type"] == "text")
    assert [point["iteration"] for point in figures["values"]] == [0, 12]


def test_the_chart_of_gaps_counts_every_row_and_draws_no_more_marks_than_there_are_hundredths(run: Manifest) -> None:
    rows = [
        {"instruction_id": str(number), "score_gap": number % 4000 / 1000, "difficulty": "hard"}
        for number in range(20_000)
    ]
    run.iterations[0].snapshots["verdicts"] = snapshot("verdicts", rows, "discriminate")
    chart = report._gaps(run.iterations[0]).to_dict()
    assert len(chart["layer"][0]["data"]["values"]) == 400
    bars = [mark for mark in marks(charts(run), "Score gaps, iteration 1") if "instructions" in mark]
    assert bars[0] == "score gap: 0 – 0.2; instructions: 1000" and len(bars) == 20


def test_a_row_whose_teacher_is_weak_is_neither_left_nor_right_of_the_line(run: Manifest) -> None:
    made = run.iterations[0].snapshots
    (row,) = query("select * from verdicts where difficulty = 'hard'", verdicts=made["verdicts"])
    weak = {"score_gap": 3.0, "difficulty": "undecided", "reason": "weak_teacher"}
    verdicts = [row, row | {"instruction_id": IDS[1], "teacher_score": 4.0, "student_score": 1.0} | weak]
    made["verdicts"] = snapshot("verdicts", verdicts, "discriminate")
    bars = [mark for mark in marks(charts(run), "Score gaps, iteration 1") if "instructions" in mark]
    assert len(bars) == 1 and bars[0].endswith("instructions: 1")
    made["verdicts"] = snapshot("verdicts", verdicts[1:], "discriminate")
    run.iterations[0].threshold = None
    drawn = charts(run)
    assert not [mark for mark in marks(drawn, "Score gaps, iteration 1") if "instructions" in mark]


def test_what_there_are_no_data_for_has_no_chart(home: Path) -> None:
    assert charts(Manifest(run_id="r")) == []
    assert [asdict(line) for line in progress_rows(Manifest(run_id="r"))] == [
        {"iteration": 0, "loss": None, "score": None, "heldout": 0, "measured": 0, "scored": 0, "relative": None}
        | {"judged": 0, "seconds": {}, "cached": {}, "record": None}
    ]


def test_the_lineage_names_every_snapshot_by_what_it_is_in_the_run(run: Manifest) -> None:
    names, *rows = table(page_of(run), "snapshot")
    assert names == ["snapshot", "iteration", "rows", "made by", "from", "digest"]
    made = run.iterations[0].snapshots
    for row in (
        ["heldout_answers", "before", "2", "teacher v1", "heldout (before)", run.baseline.snapshots["heldout_answers"].digest],
        ["verdicts", "1", "3", "discriminate v1", "reviews (1)", made["verdicts"].digest],
        ["reviews", "1", "6", "referee v1", "seeds (before), teacher_responses (1), student_responses (1)", made["reviews"].digest],
        ["student", "before", "", "prepare", "", "recorded-1-start"],
        ["student", "1", "", "finetune", "", "recorded-1-trained"],
    ):  # fmt: skip
        assert row in rows
    made["reviews"].path.unlink()
    rows = table(page_of(run), "snapshot")[1:]
    assert ["verdicts", "1", "3", "discriminate v1", "reviews (1)", made["verdicts"].digest] in rows
    assert not [row for row in rows if row[0] == "reviews"], "what is gone is not shown"
