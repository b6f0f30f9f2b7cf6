"""The estimate: counted from the settings, free where the journal has the answer, and open about what it assumes."""

from pathlib import Path

import pytest

from flows.config import ConfigError, resolve
from flows.estimate import estimate_run, total_usd
from storage.journal import Answer, Journal, now
from tasks.generate import PROMPTS
from tasks.models.wire import keyer
from tasks.referee import PROMPT
from tasks.seed import read_seeds, usable_seeds
from tests.storage.test_journal import ANSWER

PAID = (
    "seeds.max_rows=10",
    "seeds.max_heldout=5",
    "iterations=2",
    "generate.hard_rows=6",
    "generate.easy_rows=3",
    "referee.votes=2",
)


def lines(*given: str, overrides: tuple[str, ...] = PAID) -> dict[tuple[str, int], int]:
    found, _ = estimate_run(resolve("lion-7b", overrides), given)
    return {(line.stage, line.iteration): line.requests for line in found}


def test_requests_are_counted_through_the_loop(home: Path) -> None:
    assert lines("new_share=0.5") == {
        ("teacher", 0): 5,
        **{("referee, held out", iteration): 5 * 2 * 2 for iteration in (0, 1, 2)},
        ("teacher", 1): 10,
        ("referee", 1): 10 * 2 * 2,
        ("generator", 1): 18,
        ("teacher", 2): 9,
        ("referee", 2): 19 * 2 * 2,
        ("generator", 2): 18,
    }
    assert not home.exists()


def test_the_cap_on_attempts_bounds_the_generator(home: Path) -> None:
    assert lines("new_share=0.1")["generator", 1] == 27
    assert lines("new_share=1")["generator", 1] == 9
    assert ("generator", 1) not in lines(overrides=(*PAID, "generate.hard_rows=0", "generate.easy_rows=0"))


def test_models_of_this_machine_cost_nothing_and_are_not_in_it(home: Path) -> None:
    assert estimate_run(resolve("offline"))[0] == []
    assert (
        estimate_run(resolve("offline", ["referee={kind: llm, model: {kind: local}}", "evaluation.by_referee=true"]))[0]
        == []
    )


def test_dollars_are_tokens_times_price(home: Path) -> None:
    found, _ = estimate_run(resolve("lion-7b", PAID), ["teacher_tokens=100"])
    line = found[0]
    assert line.completion_tokens == 500
    assert line.usd == pytest.approx((line.prompt_tokens * 0.4 + line.completion_tokens * 1.6) / 1e6)
    batch = ("teacher.model.mode=batch",)
    cheaper, _ = estimate_run(resolve("lion-7b", PAID + batch), ["teacher_tokens=100"])
    assert cheaper[0].usd == pytest.approx(line.usd / 2)
    assert total_usd(found) > total_usd(cheaper)
    free, _ = estimate_run(resolve("lion-7b", (*PAID, *batch, "teacher.model.price=free")), ["teacher_tokens=100"])
    assert free[0].usd is None and total_usd(free) < total_usd(cheaper)


def test_prompts_are_reckoned_as_they_will_be_sent(home: Path) -> None:
    config = resolve("lion-7b", (*PAID, "teacher.system_prompt=Be brief."))
    found, _ = estimate_run(config, ["teacher_tokens=100", "student_tokens=60", "generator_tokens=80"])
    reckoned = {(line.stage, line.iteration): line.prompt_tokens for line in found}
    rows = [{"instruction_id": "x", **row} for row in usable_seeds(config.seeds).rows]
    new = {"instruction_id": "x", "instruction": "n" * (80 * 4 - 32), "input": None}  # without the JSON around it

    def tokens(*texts: str) -> float:
        return sum(len(text) / 4 + 4 for text in texts)

    asked = {
        iteration: tokens(*(m["content"] for row in those for m in config.teacher.request(row).messages))
        for iteration, those in ((1, rows), (2, [new] * 9))
    }
    reviewed = {
        iteration: 4 * tokens(*(PROMPT.render(instruction=row["instruction"], input=row["input"], first="t" * 400, second="s" * 240)
                                for row in those))
        for iteration, those in ((1, rows), (2, [*rows, *[new] * 9]))
    }  # fmt: skip
    drafted = {
        side: tokens(*(PROMPTS["prompt", side].render(instruction=row["instruction"], input=row["input"]) for row in rows))
        for side in ("hard", "easy")
    }  # fmt: skip
    for iteration in (1, 2):
        assert reckoned["teacher", iteration] == pytest.approx(asked[iteration], abs=1)
        assert reckoned["referee", iteration] == pytest.approx(reviewed[iteration], rel=0.01)
    assert reckoned["generator", 1] == pytest.approx(
        11 * (6 * drafted["hard"] + 3 * drafted["easy"]) / 9 / 10, rel=0.01
    )
    assert reckoned["generator", 2] > reckoned["generator", 1]  # its parents are longer


def test_no_answer_is_reckoned_longer_than_its_limit(home: Path) -> None:
    limits = ("teacher.sampling.max_tokens=90", "referee.sampling.max_tokens=70", "student.sampling.max_tokens=40")
    _, assumed = estimate_run(resolve("lion-7b", PAID + limits))
    roles = ("teacher", "referee", "student", "generator")
    assert [assumed[f"{role}_tokens"][0] for role in roles] == [90, 70, 40, 80]


def test_what_the_journal_has_is_free_and_tells_the_usual_length(home: Path) -> None:
    config = resolve("lion-7b", PAID)
    row = read_seeds("bundled").rows[0] | {"instruction_id": "x"}
    key = keyer(config.teacher.model, config.teacher.sampling)(config.teacher.request(row))  # type: ignore[arg-type]
    known = {"key": key, "model": "gpt-4.1-mini", "completion_tokens": 321, "created": now()}
    with Journal() as journal:
        journal.add([Answer(**{**{name: getattr(ANSWER, name) for name in ANSWER.__slots__}, **known})])
    found, assumed = estimate_run(config)
    line = next(line for line in found if (line.stage, line.iteration) == ("teacher", 1))
    assert (line.requests, line.answered) == (9, 1)
    assert assumed["teacher_tokens"] == (321, "mean of 1 answers in the journal")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("length=3", "no such assumption"),
        ("new_share=2", "up to 1"),
        ("teacher_tokens=x", "above 0"),
        ("teacher_tokens=0", "above 0"),
    ],
)
def test_an_assumption_that_cannot_be_is_named(home: Path, given: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        estimate_run(resolve("lion-7b"), [given])


def test_a_seed_near_a_heldout_instruction_is_not_reckoned_with(home: Path, tmp_path: Path) -> None:
    (tmp_path / "seeds.txt").write_text("Write a short poem about the last snow.\nWhy is the sky blue?\n")
    (tmp_path / "heldout.txt").write_text("Write a short poem about the first snow.\n")
    files = (f"seeds.path={tmp_path / 'seeds.txt'}", f"seeds.heldout={tmp_path / 'heldout.txt'}")
    assert lines(overrides=PAID + files)["teacher", 1] == 1


def test_answers_of_every_teacher_tell_the_usual_length(home: Path) -> None:
    config = resolve("lion-7b", [*PAID, "teacher.further=[{share: 0.5, model: {kind: openai, model: o4-mini}}]"])
    fields = {name: getattr(ANSWER, name) for name in ANSWER.__slots__} | {"created": now()}
    with Journal() as journal:
        for model, tokens in (("gpt-4.1-mini", 100), ("o4-mini", 300)):
            journal.add([Answer(**fields | {"key": model, "model": model, "completion_tokens": tokens})])
    found, assumed = estimate_run(config)
    assert assumed["teacher_tokens"] == (200, "mean of 2 answers in the journal")
    parts = [line.requests for line in found if (line.stage, line.iteration) == ("teacher", 1)]
    assert sum(parts) == 10 and len(parts) == 2 and 0 not in parts
