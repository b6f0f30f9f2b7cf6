"""The Batch API against a real HTTP server: handed in once, found again after a crash, nothing paid twice."""

import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from storage.journal import Batch, Journal, Wish, now
from tasks.models import batch as batch_module
from tasks.models import client as client_module
from tasks.models.budget import Account, Budget
from tasks.models.chat import Reply, Request, Sampling, Status
from tasks.models.client import answer_all
from tasks.models.endpoint import OpenAIModel
from tasks.models.errors import BudgetReached, FatalEndpointError, Unreachable
from tasks.models.prices import Price
from tasks.models.wire import keyer, wish_of
from tests.fake_openai import FakeOpenAI
from tests.tasks.models.test_client import questions

PRICE = Price(input=1.0, output=4.0, batch_input=0.5, batch_output=2.0)
SAMPLING = Sampling(max_tokens=100)


@pytest.fixture(autouse=True)
def environment(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test-0123456789abcdef")


def settings(server: FakeOpenAI, **more: Any) -> OpenAIModel:
    return OpenAIModel(
        **{"model": "fake", "base_url": server.url, "price": PRICE, "mode": "batch", "batch_poll": 0.02, **more}
    )


def ask(server: FakeOpenAI, requests: list[Request], budget: Budget | None = None, **more: Any) -> list[Reply]:
    account = Account(run_id="run", role="teacher", iteration=2, budget=budget or Budget())
    return answer_all(settings(server, **more), requests, SAMPLING, account, lambda done, total, figures: None)


def test_a_batch_answers_all_at_the_batch_price() -> None:
    with FakeOpenAI() as server:
        replies = ask(server, questions(20))
        bill = server.bill()
    assert [reply.id for reply in replies] == [f"r{n}" for n in range(20)]
    assert {reply.status for reply in replies} == {Status.OK}
    assert bill["distinct"] == 20 and bill["received"] == 0  # no ordinary request
    with Journal() as journal:
        cost = PRICE.batched().cost(bill["prompt_tokens"], 0, bill["completion_tokens"])
        (spent,) = journal.spend("run")
        assert (spent.role, spent.iteration, spent.usd) == ("teacher", 2, pytest.approx(cost))
        assert journal.open_batches(server.url, "fake") == []


def test_a_batch_and_ordinary_requests_share_their_answers() -> None:
    with FakeOpenAI() as server:
        first = ask(server, questions(5))
        assert ask(server, questions(5), mode="online") == first
        assert server.bill()["requests"] == 5


@pytest.mark.parametrize("fate", ["expire", "partly"])
def test_finished_rows_are_kept_and_the_rest_is_handed_in_again(fate: str) -> None:
    with FakeOpenAI() as server:
        server.batch_script.append(fate)
        assert {reply.status for reply in ask(server, questions(10))} == {Status.OK}
        assert len(server.batches) == 2
        assert server.bill()["twice"] == {} and server.received == 0


def test_rows_that_no_batch_answers_go_the_ordinary_way() -> None:
    with FakeOpenAI() as server:
        server.batch_script.extend(["partly"] * 10)
        assert {reply.status for reply in ask(server, questions(16))} == {Status.OK}
        assert len(server.batches) == batch_module.MAX_ROUNDS
        assert server.received == 2 and server.bill()["twice"] == {}


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """For how long one slept. Time passes by that alone."""
    slept: list[float] = []
    clock = SimpleNamespace(sleep=slept.append, monotonic=lambda: sum(slept))
    monkeypatch.setattr(batch_module, "time", clock)
    return slept


def test_a_batch_is_looked_at_as_often_as_the_settings_say_until_the_deadline(slept: list[float]) -> None:
    with FakeOpenAI() as server:
        server.batch_script.append("stuck")
        assert {reply.status for reply in ask(server, questions(4), batch_poll=30, batch_deadline=100)} == {Status.OK}
        assert slept == [30, 30, 30, 10]


def test_after_the_deadline_the_rest_goes_the_ordinary_way_and_the_batch_is_stopped() -> None:
    with FakeOpenAI() as server:
        server.batch_script.append("stuck")
        assert {reply.status for reply in ask(server, questions(4), batch_deadline=0.2)} == {Status.OK}
        assert server.batches["batch_0"]["status"] == "cancelled"
        assert server.received == 4 and server.bill()["twice"] == {}


@pytest.mark.parametrize(("fate", "left"), [("slow", 2), ("late", 0)])
def test_what_a_batch_has_answered_by_the_time_it_is_stopped_is_kept(fate: str, left: int, slept: list[float]) -> None:
    with FakeOpenAI() as server:
        server.batch_script.append(fate)
        assert {reply.status for reply in ask(server, questions(4), batch_deadline=1, deadline=0)} == {Status.OK}
        assert server.received == left and server.bill()["requests"] == 4 and server.bill()["twice"] == {}


def test_a_batch_that_does_not_stop_is_named_and_found_again(slept: list[float]) -> None:
    with FakeOpenAI() as server:
        server.batch_script.append("endless")
        with pytest.raises(FatalEndpointError, match="the batches batch_0 do not stop"):
            ask(server, questions(4), batch_poll=3600, batch_deadline=3600)
        assert sum(slept) > 3600 + batch_module.CANCEL_SECONDS and server.received == 0
        server.batches["batch_0"]["status"] = "cancelled"
        assert {reply.status for reply in ask(server, questions(4))} == {Status.OK}
        assert server.bill()["requests"] == 4


def test_a_refused_batch_is_told_and_holds_nothing() -> None:
    with FakeOpenAI() as server:
        server.batch_script.append("fail")
        with pytest.raises(FatalEndpointError, match="mode: online"):
            ask(server, questions(4))
        assert {reply.status for reply in ask(server, questions(4))} == {Status.OK}


def test_where_the_endpoints_queue_has_no_room_smaller_batches_go_one_after_the_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(batch_module, "MAX_ROWS", 20)
    with FakeOpenAI() as server:
        server.batch_room = 12
        assert {reply.status for reply in ask(server, questions(30))} == {Status.OK}
        assert server.bill()["requests"] == 30 and server.bill()["twice"] == {} and server.received == 0
        done = [
            len(server.files[each["input_file_id"]].splitlines())
            for each in server.batches.values()
            if each["output_file_id"]
        ]
        assert sum(done) == 30 and max(done) <= 12
        server.batch_room = 0
        with pytest.raises(FatalEndpointError, match=r"Enqueued token limit.*Use mode: online"):
            ask(server, questions(2, "one more"))


def test_batches_are_split_at_the_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_module, "MAX_ROWS", 4)
    with FakeOpenAI() as server:
        ask(server, questions(10))
        assert sorted(len(data.splitlines()) for name, data in server.files.items() if name in used(server)) == [
            2,
            4,
            4,
        ]
    monkeypatch.setattr(batch_module, "MAX_BYTES", 700)
    with FakeOpenAI() as server:
        ask(server, questions(10, "longer"))
        assert all(len(server.files[name]) <= 700 for name in used(server)) and len(server.batches) > 2


def used(server: FakeOpenAI) -> set[str]:
    return {batch["input_file_id"] for batch in server.batches.values()}


class Crash(BaseException):
    """Stands for kill -9."""


def crash(*args: Any) -> Any:
    raise Crash


def create_and_crash(*args: Any) -> Any:
    CREATE(*args)
    raise Crash


CREATE = batch_module.Batches._create
KEEP_BATCH = Journal.keep_batch


def dies_at(name: str, how: Callable[..., Any], server: FakeOpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process asks six questions and dies at this method of its batches."""
    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(batch_module.Batches, name, how)
        ask(server, questions(6))


@pytest.mark.parametrize(
    ("name", "how"),
    [("_create", crash), ("_create", create_and_crash), ("_collected", crash)],
    ids=["before it is created", "after it was created", "while it is waited for"],
)
def test_a_batch_is_found_again_after_a_crash(
    name: str, how: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with FakeOpenAI() as server:
        dies_at(name, how, server, monkeypatch)
        assert {reply.status for reply in ask(server, questions(6))} == {Status.OK}
        assert len(server.batches) == 1 and server.bill()["requests"] == 6 and server.received == 0


def test_a_batch_keeps_the_cap_and_what_fits_is_answered() -> None:
    with FakeOpenAI() as server:
        with pytest.raises(BudgetReached):
            ask(server, questions(30), Budget(max_requests=12))
        assert server.bill()["requests"] == 12
        ask(server, questions(30), Budget(max_requests=30))
        assert server.bill()["requests"] == 30 and server.bill()["twice"] == {}


def test_requests_of_a_batch_under_way_are_not_asked_elsewhere() -> None:
    with FakeOpenAI() as server:
        model = settings(server)
        key = keyer(model, SAMPLING)(questions(1)[0])
        with Journal() as journal:
            journal.claim("run", "teacher", [Wish(key, 1, 0.0)], [])
            journal.keep_batch(Batch("t", "b", "open", "run", "teacher", model.base_url, "fake", (key,), now()))
        with Journal() as journal:
            assert journal.claim("run", "teacher", [Wish(key, 1, 0.0)], []).elsewhere == {key}
            (batch,) = journal.open_batches(model.base_url, "fake")
            journal.keep_batch(replace(batch, state="collected"))


def test_a_batch_that_was_made_just_before_an_outage_is_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def create_and_break(*args: Any) -> Any:
        CREATE(*args)
        raise OSError("the reply was lost")

    with FakeOpenAI() as server:
        with monkeypatch.context() as patch, pytest.raises(Unreachable, match="found again"):
            patch.setattr(batch_module.Batches, "_create", create_and_break)
            ask(server, questions(6), deadline=0)
        assert {reply.status for reply in ask(server, questions(6))} == {Status.OK}
        assert len(server.batches) == 1 and server.bill()["twice"] == {}


def test_a_batch_that_is_just_being_handed_in_is_not_taken_for_one_that_never_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    replies: list[list[Reply]] = []
    with FakeOpenAI() as server:
        other = threading.Thread(target=lambda: replies.append(ask(server, questions(6))))

        def create_while_another_asks(*args: Any) -> str:
            monkeypatch.setattr(batch_module.Batches, "_create", CREATE)
            other.start()
            other.join(0.3)  # it waits for us
            return CREATE(*args)

        monkeypatch.setattr(batch_module.Batches, "_create", create_while_another_asks)
        replies.append(ask(server, questions(6)))
        other.join()
        assert replies[0] == replies[1] and len(server.batches) == 1 and server.bill()["twice"] == {}


def test_a_batch_whose_making_was_not_heard_of_is_not_made_twice() -> None:
    with FakeOpenAI() as server:
        server.batches["another"] = {"id": "another", "object": "batch", "metadata": None}  # the account's, not ours
        server.batch_script.append("unheard")
        assert {reply.status for reply in ask(server, questions(6))} == {Status.OK}
        assert len(server.batches) == 2 and server.bill()["twice"] == {}


def test_a_batch_is_waited_for_though_the_settings_ask_for_none_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeOpenAI() as server:
        dies_at("_collected", crash, server, monkeypatch)
        assert {reply.status for reply in ask(server, questions(8), mode="online")} == {Status.OK}
        assert server.received == 2 and server.bill()["twice"] == {}


@pytest.mark.parametrize("mode", ["batch", "online"])
def test_a_batch_that_nobody_asks_for_any_more_does_not_hold_the_cap_of_its_run_for_ever(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FakeOpenAI() as server:
        dies_at("_collected", crash, server, monkeypatch)
        others = questions(6, "in other words ")
        assert {reply.status for reply in ask(server, others, Budget(max_requests=12), mode=mode)} == {Status.OK}
        assert server.bill()["requests"] == 12
        assert {reply.status for reply in ask(server, questions(6), Budget(max_requests=12))} == {Status.OK}  # kept
        assert server.bill()["requests"] == 12


def test_a_batch_that_is_gone_is_named_and_given_up_only_where_one_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeOpenAI() as server:
        dies_at("_collected", crash, server, monkeypatch)
        server.batches.clear()
        with pytest.raises(FatalEndpointError, match="batch_0 of 6 requests is not there any more"):
            ask(server, questions(6), mode="online")
        assert {reply.status for reply in ask(server, questions(6), give_up_batches=True)} == {Status.OK}
    with Journal() as journal:
        (spent,) = journal.spend()
        assert (spent.requests, spent.lost_requests) == (6, 6)


def test_a_batch_learns_how_an_endpoint_wants_to_be_asked() -> None:
    with FakeOpenAI() as server:
        server.batch_script.extend(["no-max-tokens"] * 5)
        assert {reply.status for reply in ask(server, questions(6))} == {Status.OK}
        assert len(server.batches) == 2 and server.received == 0


def spoil_first_output(server: FakeOpenAI, how: Callable[[bytes], bytes]) -> None:
    """The answers of the first batch are not what they should be; an empty file is none."""
    work_off = server._work_off

    def spoiled(batch: dict[str, Any]) -> None:
        work_off(batch)
        if batch["id"] == "batch_0":
            server.files[batch["output_file_id"]] = how(server.files[batch["output_file_id"]])

    server._work_off = spoiled  # type: ignore[method-assign]


def test_a_prompt_that_a_filter_withholds_is_an_outcome_and_goes_into_no_other_batch() -> None:
    def withhold(data: bytes) -> bytes:
        first, *others = data.splitlines()
        body = {"error": {"code": "content_filter", "message": "no"}}
        return b"\n".join(
            [json.dumps(json.loads(first) | {"response": {"status_code": 400, "body": body}}).encode(), *others]
        )

    with FakeOpenAI() as server:
        spoil_first_output(server, withhold)
        replies = ask(server, questions(6))
        assert [reply.status for reply in replies] == [Status.FILTERED] + [Status.OK] * 5
        assert ask(server, questions(6)) == replies and len(server.batches) == 1 and server.received == 0


def test_whoever_asks_for_a_part_of_a_batch_keeps_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse_last(data: bytes) -> bytes:
        *others, last = data.splitlines()
        body = {"error": {"message": "Use 'max_completion_tokens'"}}
        return b"\n".join(
            [*others, json.dumps(json.loads(last) | {"response": {"status_code": 400, "body": body}}).encode()]
        )

    monkeypatch.setattr(batch_module, "ANSWERS_AT_ONCE", 2)
    with FakeOpenAI() as server:
        spoil_first_output(server, refuse_last)
        dies_at("_collected", crash, server, monkeypatch)
        assert {reply.status for reply in ask(server, questions(2))} == {Status.OK}
        assert {reply.status for reply in ask(server, questions(5))} == {Status.OK}
        assert len(server.batches) == 1 and server.received == 0


def test_whoever_asks_for_a_part_of_a_batch_is_told_of_that_part(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int, dict[str, Any]]] = []
    with FakeOpenAI() as server:
        dies_at("_collected", crash, server, monkeypatch)
        account = Account(run_id="run", role="teacher")
        answer_all(settings(server), questions(2), SAMPLING, account, lambda *figures: seen.append(figures))
    assert [(done, total) for done, total, _ in seen] == [(2, 2)] * len(seen)
    assert not any("go by ordinary requests" in figures for _, _, figures in seen)


def test_a_row_of_a_batch_without_an_answer_in_it_counts_as_lost() -> None:
    with FakeOpenAI() as server:
        spoil_first_output(server, lambda data: data.replace(b'"choices"', b'"no choices"', 2))
        assert {reply.status for reply in ask(server, questions(6))} == {Status.OK}
        assert server.bill()["requests"] == 8
    with Journal() as journal:
        (spent,) = journal.spend()
        assert (spent.requests, spent.lost_requests) == (6, 2) and spent.lost_usd > 0


def test_what_a_batch_lost_counts_once_though_the_process_died_as_it_collected_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def keep_unless_collected(journal: Journal, batch: Batch) -> None:
        crash() if batch.state == "collected" else KEEP_BATCH(journal, batch)

    with FakeOpenAI() as server:
        spoil_first_output(server, lambda data: data.replace(b'"choices"', b'"no choices"', 2))
        with monkeypatch.context() as patch, pytest.raises(Crash):
            patch.setattr(Journal, "keep_batch", keep_unless_collected)
            ask(server, questions(6))
        assert {reply.status for reply in ask(server, questions(6))} == {Status.OK}
    with Journal() as journal:
        (spent,) = journal.spend()
        assert (spent.requests, spent.lost_requests) == (6, 2)


def test_a_request_of_a_finished_batch_that_no_row_speaks_of_counts_as_lost() -> None:
    with FakeOpenAI() as server:
        spoil_first_output(server, lambda data: data[: data.rindex(b"\n")])
        assert {reply.status for reply in ask(server, questions(6))} == {Status.OK}
        assert server.bill()["requests"] == 7
    with Journal() as journal:
        (spent,) = journal.spend()
        assert (spent.requests, spent.lost_requests) == (6, 1) and spent.lost_usd > 0


def test_whoever_asks_for_a_part_of_a_batch_counts_all_that_it_may_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three rows of it without an answer, one without usage, none of them asked for by who collects it."""

    def spoil(data: bytes) -> bytes:
        rows = [json.loads(line) for line in data.splitlines()]
        for row in rows[2:5]:
            row["response"]["body"]["choices"] = []
        del rows[5]["response"]["body"]["usage"]
        return b"\n".join(json.dumps(row).encode() for row in rows)

    with FakeOpenAI() as server:
        spoil_first_output(server, spoil)
        dies_at("_collected", crash, server, monkeypatch)
        key_of = keyer(settings(server), SAMPLING)
        wishes = [wish_of(key_of(asked), asked, SAMPLING, PRICE.batched()) for asked in questions(6)]
        assert {reply.status for reply in ask(server, questions(2))} == {Status.OK}
    with Journal() as journal:
        (spent,) = journal.spend()
        assert (spent.requests, spent.lost_requests) == (3, 3)
        assert spent.lost_usd == pytest.approx(sum(wish.usd for wish in wishes[2:5]))
        (uncounted,) = journal.find([wishes[5].key]).values()
        assert uncounted.prompt_tokens == wishes[5].tokens - SAMPLING.max_tokens


@pytest.mark.parametrize("body", ["Internal error", {"error": "busy"}, {"error": {"code": [7]}}, ["no"], None], ids=str)
def test_a_row_that_says_in_its_own_way_what_went_wrong_keeps_no_other_answer_back(body: Any) -> None:
    def spoil(data: bytes) -> bytes:
        rows = [json.loads(line) for line in data.splitlines()]
        for row, status in zip(rows, (400, 500), strict=False):
            row["response"] = {"status_code": status, "request_id": "r", "body": body}
        return "\n".join(map(json.dumps, rows)).encode()

    with FakeOpenAI() as server:
        spoil_first_output(server, spoil)
        assert {reply.status for reply in ask(server, questions(6))} == {Status.OK}
        assert server.bill()["distinct"] == 6 and server.bill()["requests"] == 8
        assert server.received == 1  # what was refused goes into no further batch


@pytest.mark.parametrize(
    "row", [b"null", b"{}", b'{"custom_id": null}', b'{"custom_id": "x", "response": "busy"}'], ids=str
)
def test_a_row_that_is_nobodys_keeps_no_answer_back(row: bytes) -> None:
    with FakeOpenAI() as server:
        spoil_first_output(server, lambda data: row + b"\n" + data)
        assert {reply.status for reply in ask(server, questions(6))} == {Status.OK}
        assert server.bill()["requests"] == 6


def test_answers_that_arrive_in_part_are_fetched_again() -> None:
    whole = b""

    def cut(data: bytes) -> bytes:
        nonlocal whole
        whole = data
        return data[:-40]

    with FakeOpenAI() as server:
        spoil_first_output(server, cut)
        with pytest.raises(Unreachable, match=r"not the whole of it.*Run the same command later"):
            ask(server, questions(6), deadline=0)
        server.files[server.batches["batch_0"]["output_file_id"]] = whole
        assert {reply.status for reply in ask(server, questions(6))} == {Status.OK}
        assert server.bill()["requests"] == 6


def test_answers_that_are_gone_are_named_and_given_up_only_where_one_says_so() -> None:
    with FakeOpenAI() as server:
        spoil_first_output(server, lambda data: b"")
        with pytest.raises(FatalEndpointError, match="a file of the batch batch_0 of 6 requests is not there any more"):
            ask(server, questions(6))
        assert {reply.status for reply in ask(server, questions(6), give_up_batches=True)} == {Status.OK}
    with Journal() as journal:
        (spent,) = journal.spend()
        assert (spent.requests, spent.lost_requests) == (6, 6)


def test_what_was_answered_is_not_lost_with_what_is_gone() -> None:
    with FakeOpenAI() as server:
        server.batch_script.append("partly")
        work_off = server._work_off

        def without_errors(batch: dict[str, Any]) -> None:
            work_off(batch)
            server.files[batch["error_file_id"]] = b""  # none
            server._work_off = work_off  # type: ignore[method-assign]

        server._work_off = without_errors  # type: ignore[method-assign]
        assert {reply.status for reply in ask(server, questions(6), give_up_batches=True)} == {Status.OK}
        assert server.bill()["requests"] == 6
    with Journal() as journal:
        (spent,) = journal.spend()
        assert (spent.requests, spent.lost_requests) == (6, 3)


def test_a_batch_that_another_process_hands_in_meanwhile_and_leaves_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    resumed = batch_module.Batches._resumed
    seen: list[list[Batch]] = [[]]  # at the first look it is not there yet
    with FakeOpenAI() as server:
        dies_at("_collected", crash, server, monkeypatch)
        monkeypatch.setattr(batch_module.Batches, "_resumed", lambda batches: seen.pop() if seen else resumed(batches))
        assert {reply.status for reply in ask(server, questions(6))} == {Status.OK}
        assert server.bill()["twice"] == {} and server.received == 0


def test_an_ordinary_call_collects_a_batch_that_another_process_hands_in_meanwhile_and_leaves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    to_collect = client_module.batches_to_collect
    seen: list[list[Batch]] = [[]]  # at the first look it is not there yet
    with FakeOpenAI() as server:
        dies_at("_collected", crash, server, monkeypatch)
        server.script.append("too-long")  # of what the batch does not hold
        monkeypatch.setattr(
            client_module, "batches_to_collect", lambda *call: seen.pop() if seen else to_collect(*call)
        )
        replies = ask(
            server, [*questions(8), replace(questions(1)[0], id="again")], mode="online", max_failed_share=0.5
        )
        assert [reply.status for reply in replies].count(Status.OK) == 8
        assert (replies[-1].id, replies[-1].text) == ("again", replies[0].text)
        assert server.bill()["twice"] == {} and server.received == 2
