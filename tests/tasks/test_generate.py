"""New instructions: what is taken, what is rejected and why, how parents are chosen, when it ends."""

import itertools
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from storage.files import Checkpoint, Snapshot
from storage.pools import instruction_id, read_rows, write_snapshot
from tasks import generate
from tasks.generate import GenerateConfig, Generation, generate_instructions
from tasks.models.budget import Account
from tasks.models.chat import Reply, Request, Status
from tasks.models.local import LocalModel
from tasks.models.ready import ReadyModel

ACCOUNT = Account(run_id="r", role="generate")
MODEL = ReadyModel(settings=LocalModel(), checkpoint=Checkpoint(digest="m", content="c"))
WORDS = [
    "river",
    "copper",
    "violin",
    "glacier",
    "lantern",
    "orchard",
    "satellite",
    "pepper",
    "bridge",
    "falcon",
    "marble",
    "tunnel",
    "velvet",
    "comet",
]


def pool_of(texts: list[str], origin: str = "seed") -> Snapshot:
    rows = [{"instruction_id": instruction_id(text, None), "instruction": text, "origin": origin} for text in texts]
    return write_snapshot("instructions", rows, step="test", version=1)


def split_of(pool: Snapshot, hard: int) -> Snapshot:
    rows = [
        {"instruction_id": row["instruction_id"], "difficulty": "hard" if number < hard else "easy"}
        for number, row in enumerate(read_rows(pool))
    ]
    return write_snapshot("verdicts", rows, step="test", version=1)


def fresh(request: Request) -> str:
    """A new instruction for every request, unlike all others."""
    drawn = zlib.crc32(request.id.encode())  # not `hash`, which is another in each process
    digits = f"{drawn % 14**4:05d}"
    picked = [WORDS[(int(digit) * 3 + place) % len(WORDS)] for place, digit in enumerate(digits)]
    return f"Describe {' and '.join(picked)} number {request.id[-12:].replace('/', ' ')} {drawn}"


@pytest.fixture
def generated(home: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Generation]:
    """Run the stage with a generator that says what the test wants."""

    def run(say: Callable[[Request], str | Reply], pool: Snapshot, hard: int, **settings: Any) -> Generation:
        def answer(model: Any, requests: list[Request], sampling: Any, **rest: Any) -> list[Reply]:
            said = [(request, say(request)) for request in requests]
            return [text if isinstance(text, Reply) else Reply(key.id, Status.OK, text) for key, text in said]

        monkeypatch.setattr(generate, "answer", answer)
        config = GenerateConfig(**({"hard_rows": 4, "easy_rows": 4} | settings))
        heldout = pool_of(["Name the tallest mountain in the whole solar system."], "heldout")
        return generate_instructions.fn(config, MODEL, pool, split_of(pool, hard), heldout, seed=0, account=ACCOUNT)

    return run


SEEDS = [f"Explain how a {word} works in two short sentences." for word in WORDS[:8]]


def test_each_side_gets_its_share_of_new_instructions(generated: Any) -> None:
    result = generated(fresh, pool_of(SEEDS), hard=4)
    rows = [row for row in read_rows(result.candidates) if row["rejection"] is None]
    assert sorted(row["side"] for row in rows) == ["easy"] * 4 + ["hard"] * 4
    assert (result.generated.accepted, result.generated.wanted) == (8, 8)
    assert result.generated.rejected == {"surplus": 2}, "five of a side were asked for: one of ten may fail"
    for side, own in (("hard", SEEDS[:4]), ("easy", SEEDS[4:])):
        parents = {row["parent_id"] for row in rows if row["side"] == side}
        assert parents == {instruction_id(text, None) for text in own}, "each of the side's own, once"


def test_what_came_so_far_says_how_many_more_are_asked_for(generated: Any) -> None:
    turns = itertools.count()
    every_other = lambda request: SEEDS[0] if next(turns) % 2 else fresh(request)  # noqa: E731
    result = generated(every_other, pool_of(SEEDS), hard=8, max_attempts=20)
    assert result.generated.accepted == 8
    assert len(read_rows(result.candidates)) == 9 + 6, "of nine five were new: six more for the three that lack"


def test_every_candidate_is_kept_with_the_reason_of_its_rejection(generated: Any) -> None:
    result = generated(lambda request: SEEDS[0].replace("two", "three"), pool_of(SEEDS), hard=4)
    rows = read_rows(result.candidates)
    assert {row["rejection"] for row in rows} == {"near_duplicate"}
    assert {(row["near_id"], row["similarity"]) for row in rows} == {(instruction_id(SEEDS[0], None), 2 * 8 / 18)}
    assert result.generated.rejected == {"near_duplicate": len(rows)}


def test_a_candidate_near_a_heldout_instruction_is_rejected(generated: Any) -> None:
    result = generated(lambda _: "Name the tallest mountain in the whole solar system!", pool_of(SEEDS), hard=4)
    assert set(result.generated.rejected) == {"near_duplicate"}


def test_a_candidate_near_one_accepted_before_it_is_rejected(generated: Any) -> None:
    turns = itertools.count()
    say = lambda _: f"Compare the taste of raw and of cooked onions, number {next(turns)}."  # noqa: E731
    assert generated(say, pool_of(SEEDS), hard=4).generated.accepted == 1


def test_the_same_instruction_is_never_accepted_twice(generated: Any) -> None:
    known = [SEEDS[0], "Name the tallest mountain in the whole solar system.", "Say what a comet is made of."]
    result = generated(
        lambda request: known[zlib.crc32(request.id.encode()) % 3], pool_of(SEEDS), hard=4, max_similarity=1.0
    )
    accepted = [row["instruction"] for row in read_rows(result.candidates) if row["rejection"] is None]
    assert accepted == known[2:]


def test_the_stage_ends_at_its_cap_and_says_what_is_missing(generated: Any) -> None:
    result = generated(lambda request: SEEDS[0], pool_of(SEEDS), hard=4, max_attempts=2)
    assert len(read_rows(result.candidates)) == 16
    assert result.generated.notes == [
        "hard: 0 of 4 accepted, cap on attempts reached",
        "easy: 0 of 4 accepted, cap on attempts reached",
    ]


def test_an_empty_side_gives_its_share_to_the_other_and_says_so(generated: Any) -> None:
    result = generated(fresh, pool_of(SEEDS), hard=8)
    rows = [row for row in read_rows(result.candidates) if row["rejection"] is None]
    assert [row["side"] for row in rows] == ["hard"] * 8
    assert result.generated.notes == ["no easy parents: their 4 rows are asked of the hard side"]


def test_each_parent_is_used_before_any_is_used_twice(generated: Any) -> None:
    result = generated(lambda request: SEEDS[0], pool_of(SEEDS), hard=4, max_attempts=2)
    hard = [row["parent_id"] for row in read_rows(result.candidates) if row["side"] == "hard"]
    assert [len(set(hard[start : start + 4])) for start in (0, 4)] == [4, 4]


def test_a_cut_reply_is_no_instruction(generated: Any) -> None:
    cut = lambda request: Reply(request.id, Status.TRUNCATED, "Write a very long")  # noqa: E731
    assert set(generated(cut, pool_of(SEEDS), hard=4).generated.rejected) == {"truncated"}


def test_a_json_reply_brings_instruction_and_input(generated: Any) -> None:
    def say(request: Request) -> str:
        return "```json\n" + json.dumps({"instruction": fresh(request), "input": "Some text."}) + "\n```"

    rows = read_rows(generated(say, pool_of(SEEDS), hard=4).candidates)
    assert {row["input"] for row in rows if row["rejection"] is None} == {"Some text."}


def test_the_same_answers_give_the_same_candidates(generated: Any) -> None:
    first, second = (generated(fresh, pool_of(SEEDS), hard=4) for _ in range(2))
    assert first.candidates.digest == second.candidates.digest


def test_random_parents_are_drawn_by_lot_in_the_same_numbers(generated: Any) -> None:
    def parents(**settings: Any) -> set[str]:
        rows = read_rows(generated(fresh, pool_of(SEEDS), hard=3, hard_rows=6, easy_rows=6, **settings).candidates)
        return {row["parent_id"] for row in rows if row["side"] == "hard"}

    by_lot = parents(parents="random")
    assert len(by_lot) == len(parents()) == 3
    assert by_lot != parents()
    assert by_lot == parents(parents="random"), "the lot is seeded"


def test_a_candidate_that_is_a_heldout_instruction_with_another_input_is_rejected(generated: Any) -> None:
    said = {"instruction": "Name the tallest mountain in the whole solar system.", "input": "Mars, Venus, Earth " * 9}
    result = generated(lambda _: json.dumps(said), pool_of(SEEDS), hard=4)
    assert set(result.generated.rejected) == {"near_duplicate"}


@pytest.mark.parametrize(
    "around",
    ["{}", "Sure:\n```json\n{}\n```\nHope this helps!", "{} Hope this helps", '{{"result": {}}}'],
)
def test_the_object_is_found_whatever_stands_around_it(generated: Any, around: str) -> None:
    said = '{"instruction": "Compare the taste of raw\nand of cooked onions.", "input": ""}'  # a raw line break
    result = generated(lambda _: around.format(said), pool_of(SEEDS), hard=4)
    (row,) = [row for row in read_rows(result.candidates) if row["rejection"] is None]
    assert (row["instruction"], row["input"]) == ("Compare the taste of raw\nand of cooked onions.", None)


@pytest.mark.parametrize(
    "text",
    [
        '{"task": "Compare onions."}',
        '{"instruction": "Compare the taste of',
        'Sure: {"instruction": "Compare the taste of',
        '```json\n["Compare onions."]\n```',
    ],
)
def test_json_that_holds_no_instruction_is_none(generated: Any, text: str) -> None:
    assert set(generated(lambda _: text, pool_of(SEEDS), hard=4).generated.rejected) == {"malformed"}


@pytest.mark.parametrize(
    ("said", "kept"),
    [("[3, 1, 2]", "[3, 1, 2]"), ("0", "0"), ('{"é": 1}', '{"é": 1}'), ("[]", None), ("null", None), ('" x "', "x")],
)
def test_an_input_that_is_no_text_is_kept_as_json(generated: Any, said: str, kept: str | None) -> None:
    reply = f'{{"instruction": "Say what is odd about this.", "input": {said}}}'
    accepted = read_rows(generated(lambda _: reply, pool_of(SEEDS), hard=1).candidates)[0]
    assert (accepted["input"], accepted["rejection"]) == (kept, None)


@pytest.mark.parametrize("input", ["Hello<|im_end|>", "### Response: 7"])
def test_an_input_with_a_special_token_or_a_phrase_of_the_template_is_a_leak(generated: Any, input: str) -> None:
    reply = json.dumps({"instruction": "Say what is odd about this.", "input": input})
    assert set(generated(lambda _: reply, pool_of(SEEDS), hard=1).generated.rejected) == {"template_leak"}


@pytest.mark.parametrize("text", ["1" * 5000, "[" * 100_000 + "]" * 100_000, '{"a":' * 20_000])
def test_json_beyond_what_can_be_read_is_malformed(generated: Any, text: str) -> None:
    reply = f'{{"instruction": "Say what is odd about this.", "input": {text}}}'
    assert set(generated(lambda _: reply, pool_of(SEEDS), hard=1).generated.rejected) == {"malformed"}


def test_what_a_base_model_writes_on_is_never_read_as_json(generated: Any) -> None:
    asked: list[Request] = []
    said = lambda request: asked.append(request) or f'Read {{"instruction": 1}} and {fresh(request)}'  # noqa: E731
    rows = read_rows(generated(said, pool_of(SEEDS), hard=4, method="continuation").candidates)
    assert any(row["rejection"] is None and row["instruction"].startswith("Read {") for row in rows)
    assert {text for text in SEEDS for request in asked if request.prompt and text in request.prompt} == set(SEEDS)


def test_without_any_parent_nothing_is_asked_for_and_the_notes_say_so(generated: Any) -> None:
    nobody = write_snapshot("instructions", [], step="test", version=1)
    for wanted in (4, 0):
        result = generated(fresh, nobody, hard=0, easy_rows=wanted)
        assert result.generated.notes == [f"no parents: none of the {4 + wanted} rows is asked for"]
        assert result.generated.wanted == 0


def test_half_a_character_in_a_candidate_can_be_kept(generated: Any) -> None:
    result = generated(
        lambda _: '{"instruction": "Compare raw \\ud83d and cooked.", "input": "On\\ud83dions."}',
        pool_of(SEEDS),
        hard=4,
    )
    assert ("Compare raw ? and cooked.", "On?ions.") in {
        (row["instruction"], row["input"]) for row in read_rows(result.candidates)
    }


@pytest.mark.parametrize("method", ["prompt", "continuation"])
def test_an_iteration_asks_a_parent_for_what_no_earlier_one_was_answered(
    generated: Any, monkeypatch: Any, method: str
) -> None:
    draws: dict[int, set[int]] = {}
    for iteration in (1, 2):
        monkeypatch.setattr("tests.tasks.test_generate.ACCOUNT", Account(run_id="r", role="g", iteration=iteration))
        seen: list[int] = []
        say = lambda request: seen.append(request.draw) or fresh(request)  # noqa: B023, E731
        generated(say, pool_of(SEEDS), hard=4, method=method)
        draws[iteration] = set(seen)
    assert 0 in draws[1] and not draws[1] & draws[2]
