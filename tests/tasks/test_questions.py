"""Questions of every form are read and asked turn by turn; answers come from a model or from a file."""

import json
from pathlib import Path
from typing import Any

import pytest

from storage.files import Checkpoint
from storage.pools import by_id, read_rows
from tasks import questions as module
from tasks.models.budget import Account
from tasks.models.chat import Reply, Request, Sampling, Status
from tasks.models.local import LocalModel
from tasks.models.ready import ReadyModel
from tasks.mtbench import answer_lines, question_lines, review_lines
from tasks.questions import Questions, answer_questions, read_answers, read_questions, transcripts
from tasks.seed import SeedError, read_seeds

FASTCHAT = [
    {"question_id": 81, "category": "writing", "turns": ["Write a poem.", "Make it shorter."]},
    {"question_id": 82, "category": "math", "turns": ["What is 2 + 2?"]},
]
MODEL = ReadyModel(settings=LocalModel(), checkpoint=Checkpoint(digest="m", content="c"))


def lines(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def asked(home: Path, tmp_path: Path) -> Questions:
    return read_questions(lines(tmp_path / "question.jsonl", *FASTCHAT))


def test_a_question_of_two_turns_is_two_rows_and_the_first_is_the_parent(asked: Questions) -> None:
    first, second, third = read_rows(asked.turns)
    assert [row["instruction"] for row in (first, second, third)] == [
        "Write a poem.",
        "Make it shorter.",
        "What is 2 + 2?",
    ]
    assert (second["parent_id"], third["parent_id"]) == (first["instruction_id"], None)
    assert (second["category"], asked.source_ids) == ("writing", [81, 82])


def test_the_same_second_turn_after_another_first_is_another_row(home: Path, tmp_path: Path) -> None:
    rows = [{"question_id": n, "turns": [f"Write {n}.", "Make it shorter."]} for n in (1, 2)]
    assert len(by_id(read_questions(lines(tmp_path / "q.jsonl", *rows)).turns)) == 4


def test_without_a_file_the_held_out_instructions_are_asked(home: Path) -> None:
    asked = [row["instruction"] for row in read_rows(read_questions("bundled").turns)]
    assert asked == [row["instruction"] for row in read_seeds("bundled", bundled="heldout.jsonl").rows]


def test_questions_that_begin_alike_are_counted_and_not_dropped_in_silence(home: Path, tmp_path: Path) -> None:
    rows = [{"question_id": n, "turns": ["Hello.", last]} for n, last in ((1, "Who are you?"), (2, "Bye."))]
    found = read_questions(lines(tmp_path / "q.jsonl", *rows))
    assert (found.source_ids, found.left_out) == ([1], 1)


def test_answers_to_other_questions_are_called_so(asked: Questions, tmp_path: Path) -> None:
    path = lines(tmp_path / "answers.jsonl", {"question_id": 99, "choices": [{"turns": ["Four."]}]})
    with pytest.raises(SeedError, match="answers none of the questions"):
        read_answers(Path(path), asked)


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Rewrite.", "input": "A text.", "output": "Text."},
        {
            "id": "user_oriented_task_0",
            "instruction": "Rewrite.",
            "instances": [{"input": "A text.", "output": "Text."}],
        },
    ],
)
def test_alpaca_and_the_user_oriented_form_are_read_with_their_input_and_output(
    home: Path, tmp_path: Path, row: dict[str, Any]
) -> None:
    (found,) = read_rows(read_questions(lines(tmp_path / "q.jsonl", row)).turns)
    assert (found["instruction"], found["input"], found["output"]) == ("Rewrite.", "A text.", "Text.")


def test_messages_give_their_users_turns(home: Path, tmp_path: Path) -> None:
    messages = [{"role": role, "content": role + str(n)} for n in (1, 2) for role in ("user", "assistant")]
    found = read_rows(read_questions(lines(tmp_path / "q.jsonl", {"messages": messages})).turns)
    assert [row["instruction"] for row in found] == ["user1", "user2"]


@pytest.mark.parametrize("turns", [[], "What?", [1], ["What?", None]])
def test_turns_that_are_no_texts_are_named_with_their_line(home: Path, tmp_path: Path, turns: Any) -> None:
    path = lines(tmp_path / "q.jsonl", FASTCHAT[1], {"question_id": 1, "turns": turns})
    with pytest.raises(SeedError, match=r"q\.jsonl, line 2: `turns` must be a list of texts"):
        read_questions(path)


def answered(monkeypatch: pytest.MonkeyPatch, asked: Questions, say: Any) -> tuple[dict[str, Any], list[Request]]:
    seen: list[Request] = []

    def answer(model: Any, requests: list[Request], *rest: Any, **more: Any) -> list[Reply]:
        seen.extend(requests)
        return [Reply(request.id, *say(request)) for request in requests]

    monkeypatch.setattr(module, "answer", answer)
    account = Account(run_id="r", role="student")
    snapshot = answer_questions.fn("student", MODEL, asked.turns, Sampling(), "Be brief.", 0, account)
    return by_id(snapshot), seen


def test_the_second_turn_is_asked_with_the_models_own_first_answer(
    monkeypatch: pytest.MonkeyPatch, asked: Questions
) -> None:
    rows, seen = answered(monkeypatch, asked, lambda request: (Status.OK, f"answer {len(request.messages)}"))
    assert [len(request.messages) for request in seen] == [2, 2, 4]
    assert [message["role"] for message in seen[2].messages] == ["system", "user", "assistant", "user"]
    assert seen[2].messages[2]["content"] == "answer 2"
    assert [row["response"] for row in rows.values()] == ["answer 2", "answer 4", "answer 2"]


def test_a_turn_after_a_failed_one_is_not_asked_and_has_no_answer(
    monkeypatch: pytest.MonkeyPatch, asked: Questions
) -> None:
    rows, seen = answered(monkeypatch, asked, lambda request: (Status.FAILED, None))
    assert len(seen) == 2
    second = rows[asked.conversations[0][1]]
    assert (second["status"], second["response"]) == ("failed", None)


def test_answers_come_from_fastchats_file_or_from_the_outputs_of_the_same_instructions(
    asked: Questions, tmp_path: Path
) -> None:
    fastchat = {"question_id": 81, "model_id": "gpt-4", "choices": [{"index": 0, "turns": ["Roses.", "Rose."]}]}
    snapshot, missing = read_answers(Path(lines(tmp_path / "gpt-4.jsonl", fastchat)), asked)
    rows = list(by_id(snapshot).values())
    assert [row["response"] for row in rows] == ["Roses.", "Rose.", None]
    assert (missing, rows[2]["status"], rows[0]["model"]) == (1, "failed", "gpt-4")
    alpaca = [{"instruction": "What is 2 + 2?", "output": "4"}, {"instruction": "Write a poem.", "output": ""}]
    snapshot, missing = read_answers(Path(lines(tmp_path / "mine.jsonl", *alpaca)), asked)
    assert ([row["response"] for row in by_id(snapshot).values()], missing) == ([None, None, "4"], 2)


def test_what_was_written_for_no_answer_is_none_when_it_is_read_again(asked: Questions, tmp_path: Path) -> None:
    statuses = dict(zip(by_id(asked.turns), (("ok", "Roses."), ("failed", None), ("empty", ""))))
    said = {key: {"response": text, "status": status} for key, (status, text) in statuses.items()}
    path = tmp_path / "reference.jsonl"
    path.write_text("".join(answer_lines("teacher", asked.source_ids, asked.conversations, said)))
    snapshot, missing = read_answers(path, asked)
    assert [(row["status"], row["response"]) for row in read_rows(snapshot)] == list(statuses.values())
    assert missing == 1


@pytest.mark.parametrize("choices", [[], None, [{}], [{"turns": "Roses."}], [{"turns": ["Roses.", None]}]])
def test_an_answer_that_is_no_list_of_texts_is_named_with_its_line(
    asked: Questions, tmp_path: Path, choices: Any
) -> None:
    good = {"question_id": 82, "choices": [{"turns": ["Four."]}]}
    path = lines(tmp_path / "gpt.jsonl", good, {"question_id": 81, "choices": choices})
    with pytest.raises(SeedError, match=r"gpt\.jsonl, line 2: expected the answers as `choices\[0\]\.turns`"):
        read_answers(Path(path), asked)


def test_half_a_character_in_an_answer_is_named_with_its_line_and_a_model_without_a_name_has_the_files(
    asked: Questions, tmp_path: Path
) -> None:
    answer = {"question_id": 82, "model_id": None, "choices": [{"turns": ["Four \ud83d"]}]}
    with pytest.raises(SeedError, match=r"gpt\.jsonl, line 1: half of a character is in it"):
        read_answers(Path(lines(tmp_path / "gpt.jsonl", answer)), asked)
    snapshot, _ = read_answers(Path(lines(tmp_path / "gpt.jsonl", answer | {"choices": [{"turns": ["4"]}]})), asked)
    assert {row["model"] for row in read_rows(snapshot)} == {"gpt"}


def test_a_file_that_answers_nothing_is_refused(asked: Questions, tmp_path: Path) -> None:
    path = Path(lines(tmp_path / "other.jsonl", {"instruction": "Something else.", "output": "x"}))
    with pytest.raises(SeedError, match="answers none of the questions"):
        read_answers(path, asked)


def test_a_referee_reads_a_later_turn_with_all_before_it(monkeypatch: pytest.MonkeyPatch, asked: Questions) -> None:
    answered(monkeypatch, asked, lambda request: (Status.OK, f"answer {len(request.messages)}"))
    account = Account(run_id="r", role="student")
    own = answer_questions.fn("student", MODEL, asked.turns, Sampling(), None, 0, account)
    turns, said = transcripts(asked.turns, own)
    first, second = (by_id(turns)[key]["instruction"] for key in asked.conversations[0])
    assert first == "Write a poem."
    assert second == "[Turn 1]\nWrite a poem.\n\n[Turn 2]\nMake it shorter."
    assert by_id(said)[asked.conversations[0][1]]["response"] == "[Turn 1]\nanswer 1\n\n[Turn 2]\nanswer 3"


def test_mt_bench_files_have_its_fields_and_an_error_where_no_review_is_valid(asked: Questions) -> None:
    turns = by_id(asked.turns)
    ids, talks = asked.source_ids, asked.conversations
    written = [json.loads(line) for line in question_lines(ids, talks, turns)]
    assert written[0] == FASTCHAT[0]
    said = {key: {"response": key, "status": "ok"} for key in turns}
    answer = json.loads(answer_lines("mine", ids, talks, said)[0])
    assert (answer["question_id"], answer["model_id"], answer["choices"][0]["turns"]) == (81, "mine", talks[0])
    reviews = [
        {"instruction_id": talks[0][0], "order": "student_first", "student_score": 9, "teacher_score": 5},
        {"instruction_id": talks[0][0], "order": "teacher_first", "student_score": 4, "teacher_score": 5},
        {"instruction_id": talks[0][1], "order": "student_first", "student_score": None, "teacher_score": None},
        {"instruction_id": talks[1][0], "order": "unordered", "student_score": 5, "teacher_score": 5},
    ]
    rows = [row | {"evidence": None, "outcome": "ok"} for row in reviews]
    pairs = [json.loads(line) for line in review_lines("mine", "gpt", "llm", ids, talks, rows)]
    assert [(pair["question_id"], pair["turn"]) for pair in pairs] == [(81, 1), (81, 2), (82, 1)]
    assert [(pair["g1_winner"], pair["g2_winner"]) for pair in pairs] == [
        ("model_1", "model_2"), ("error", "error"), ("tie", "tie"),
    ]  # fmt: skip


def test_votes_that_even_out_are_a_tie_in_mt_bench_files_though_their_sum_is_off(asked: Questions) -> None:
    key = asked.conversations[1][0]
    rows = [
        {"instruction_id": key, "order": "student_first", "student_score": own, "teacher_score": 8.1, "evidence": "x"}
        for own in (8.3, 7.9)
    ]
    (pair,) = map(json.loads, review_lines("mine", "gpt", "llm", [82], [[key]], rows))
    assert pair["g1_winner"] == "tie"


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ((1, 1), "the id 1 is there twice"),
        ((1, "1"), "the id '1' is there twice"),  # an answer could be either's
        ((2, None), "the id 2 is there twice; one without an id has its number"),
        ((1, 1.5), "must be a text or a whole"),
    ],
)
def test_an_id_that_names_two_questions_or_none_is_refused(tmp_path: Path, home: Path, ids: Any, message: str) -> None:
    rows = [{"question_id": id, "turns": [f"Question {number}?"]} for number, id in enumerate(ids)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SeedError, match=message):
        read_questions(str(tmp_path / "q.jsonl"))


@pytest.mark.parametrize("later", [None, [{"type": "image_url"}]])
def test_a_later_turn_that_is_no_text_is_named(home: Path, tmp_path: Path, later: Any) -> None:
    said = [{"role": "user", "content": text} for text in ("What is on it?", later)]
    (tmp_path / "q.jsonl").write_text(json.dumps({"messages": said}))
    with pytest.raises(SeedError, match=r"q\.jsonl, question 1: a later turn must be a text"):
        read_questions(str(tmp_path / "q.jsonl"))
