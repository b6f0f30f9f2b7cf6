"""The client against a real HTTP server that misbehaves: nothing lost, nothing paid twice, no cap passed."""

import math
import os
import pickle
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from storage.files import StorageError
from storage.journal import Journal, Wish
from tasks.models import client
from tasks.models.budget import Account, Budget, Limits
from tasks.models.chat import Reply, Request, Sampling, Status
from tasks.models.client import answer_all
from tasks.models.endpoint import OpenAIModel, key_of
from tasks.models.errors import BudgetReached, FatalEndpointError, TooManyFailures, UnknownPrice, scrubbed
from tasks.models.exchange import check_access
from tasks.models.pacing import Gate, Pace, Throttle, asked_wait
from tasks.models.prices import Price
from tasks.models.wire import Said, keyer
from tests.fake_openai import FakeOpenAI

ROOT = Path(__file__).parents[3]
KEY = "sk-test-0123456789abcdef"
PRICE = Price(input=1.0, output=4.0)
SCHEMA = {
    "type": "object",
    "properties": {"first_score": {"type": "number"}},
    "required": ["first_score"],
    "additionalProperties": False,
}


@pytest.fixture(autouse=True)
def environment(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def questions(count: int, prefix: str = "question", **more: Any) -> list[Request]:
    return [
        Request(f"r{number}", ({"role": "user", "content": f"{prefix} {number}"},), **more) for number in range(count)
    ]


def ask(
    server: FakeOpenAI,
    requests: list[Request],
    *,
    budget: Budget | None = None,
    run_id: str = "run",
    role: str = "teacher",
    sampling: Sampling | None = None,
    on_progress: Callable[..., None] = lambda done, total, figures: None,
    **settings: Any,
) -> list[Reply]:
    model = OpenAIModel(**{"model": "fake", "base_url": server.url, "price": PRICE, "deadline": 20, **settings})
    account = Account(run_id=run_id, role=role, iteration=2, budget=budget or Budget())
    return answer_all(model, requests, sampling or Sampling(max_tokens=100), account, on_progress)


# --- answers -----------------------------------------------------------------------------------------------------


def test_replies_come_in_the_order_of_the_requests() -> None:
    with FakeOpenAI(answer=lambda body: body["messages"][0]["content"].upper()) as server:
        replies = ask(server, questions(300))
    assert [(reply.id, reply.text) for reply in replies] == [(f"r{n}", f"QUESTION {n}") for n in range(300)]
    assert replies[0].model == "fake-2026-01-01" and replies[0].finish_reason == "stop"
    assert replies[0].prompt_tokens > 0 and replies[0].completion_tokens > 0


@pytest.mark.parametrize("mode", ["online", "batch"])
def test_a_second_call_sends_no_request_and_needs_no_key(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeOpenAI() as server:
        first = ask(server, questions(50))
        monkeypatch.delenv("OPENAI_API_KEY")
        assert ask(server, questions(50), run_id="another run", mode=mode) == first
        assert server.received == 50


def test_equal_requests_of_one_call_are_sent_once_and_another_draw_again() -> None:
    one, two = questions(1)[0], questions(1, draw=1)[0]
    with FakeOpenAI() as server:
        replies = ask(server, [one, Request("twin", one.messages), two])
        assert server.received == 2
    assert [reply.id for reply in replies] == ["r0", "twin", "r0"]


def test_operational_settings_are_in_no_key_and_all_others_are() -> None:
    request, model = questions(1)[0], OpenAIModel(model="m")
    same = [{"max_concurrency": 1}, {"timeout": 1}, {"price": "free"}, {"mode": "batch"}, {"api_key_env": "X"}]
    other = [{"model": "n"}, {"base_url": "http://x/v1"}, {"extra_body": {"top_k": 1}}]
    key = keyer(model, Sampling())(request)
    keys = [keyer(OpenAIModel(**{"model": "m", **change}), Sampling())(request) for change in [*same, *other]]
    assert keys[: len(same)] == [key] * len(same)
    assert len({key, *keys[len(same) :]}) == 1 + len(other)
    operational = {
        name
        for name, field in OpenAIModel.model_fields.items()
        if isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("operational")
    }
    assert OpenAIModel.model_fields.keys() - operational == {"kind", "model", "base_url", "extra_body"}


@pytest.mark.parametrize(
    ("fate", "status"),
    [
        ("length", Status.TRUNCATED),
        ("filter", Status.FILTERED),
        ("prompt-filter", Status.FILTERED),
        ("prompt-filter-of-xai", Status.FILTERED),
        ("prompt-filter-of-openrouter", Status.FILTERED),
        ("refusal", Status.REFUSED),
        ("empty", Status.EMPTY),
    ],
)
def test_an_answer_that_is_not_whole_is_an_outcome_and_is_kept(fate: str, status: Status) -> None:
    with FakeOpenAI(always=fate) as server:
        assert [reply.status for reply in ask(server, questions(3))] == [status] * 3
        ask(server, questions(3))
        assert server.received == 3


def test_progress_tells_what_came_from_the_journal_what_failed_and_what_was_paid(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tasks.models.client.PROGRESS_SECONDS", 0)
    seen: list[Any] = []
    with FakeOpenAI() as server:
        ask(server, questions(20))
        server.script.append("too-long")
        ask(server, questions(60), max_failed_share=1, on_progress=lambda *told: seen.append(told))
        paid = PRICE.cost(server.bill()["prompt_tokens"], 0, server.bill()["completion_tokens"])
    with Journal() as journal:
        usd = journal.spent("run").usd
    assert usd == pytest.approx(paid)
    # The last before the end has been counted one by one.
    assert [(done, total) for done, total, _ in seen[-2:]] == [(60, 60)] * 2
    assert seen[-2][2] == seen[-1][2]
    assert {**seen[-1][2], "usd": 0} == {"usd": 0, "from journal": 20, "failed": 1}
    assert 0 < seen[-1][2]["usd"] < usd


# --- transient faults ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [
        "429",
        "429-seconds",
        "429-ms",
        "429-date",
        "429-reset",
        "500",
        "503",
        "408",
        "409",
        "drop",
        "gone",
        "cut-json",
        "too-deep",
        "not-json",
        "html",
        "no-choices",
    ],
)
def test_a_transient_fault_is_tried_again(fault: str) -> None:
    with FakeOpenAI(script=[fault]) as server:
        replies = ask(server, questions(2), max_concurrency=1)
        assert [reply.status for reply in replies] == [Status.OK, Status.OK]
        assert server.bill()["twice"] == {} and server.received == 3


def test_a_hanging_request_is_given_up_and_tried_again() -> None:
    with FakeOpenAI(script=["hang"]) as server:
        assert ask(server, questions(1), timeout=0.3)[0].status == Status.OK


def test_random_faults_leave_every_answer_billed_once() -> None:
    with FakeOpenAI(faults=0.2, seed=1) as server:
        replies = ask(server, questions(200), max_concurrency=64)
        assert {reply.status for reply in replies} == {Status.OK}
        assert server.bill()["distinct"] == 200 and server.bill()["twice"] == {}
    with Journal() as journal:
        (spent,) = journal.spend("run")
        assert (spent.role, spent.iteration) == ("teacher", 2) and spent.lost_requests >= server.bill()["lost"] > 0


def test_one_429_with_a_hint_is_asked_again_once() -> None:
    with FakeOpenAI(script=["429-seconds"], latency=0.01) as server:
        ask(server, questions(8), max_concurrency=2)
        assert server.received == 9


def test_an_endpoint_that_is_not_there_gives_failed_replies_with_the_reason() -> None:
    with FakeOpenAI() as server:
        pass  # gone
    replies = ask(server, questions(2), deadline=0, max_failed_share=1)
    assert [reply.status for reply in replies] == [Status.FAILED] * 2
    assert replies[0].error == "no connection (ConnectionRefusedError)"
    with Journal() as journal:
        assert journal.spend() == []  # it was never sent


def test_a_failure_is_not_kept_and_the_next_call_asks_again() -> None:
    with FakeOpenAI(script=["500"]) as server:
        assert ask(server, questions(1), deadline=0, max_failed_share=1)[0].status == Status.FAILED
        assert ask(server, questions(1))[0].status == Status.OK


def test_too_many_failures_end_the_call_with_a_table_of_reasons() -> None:
    with FakeOpenAI(script=["ok", "ok", "500", "drop", "ok"], always="500") as server:
        with pytest.raises(TooManyFailures) as caught:
            ask(server, questions(100), deadline=0, max_failed_share=0.05, max_concurrency=1)
        assert server.received < 20  # it stops early
        assert "     1  the connection broke (ContentLengthError)" in str(caught.value)
        assert "  HTTP 500: The server had an error" in str(caught.value)
        with Journal() as journal:
            assert journal.spent("run").requests >= 3


def test_a_prompt_that_is_too_long_fails_alone_and_at_once() -> None:
    with FakeOpenAI(script=["too-long"]) as server:
        replies = ask(server, questions(3), max_concurrency=1, max_failed_share=0.5)
        assert [reply.status for reply in replies] == [Status.FAILED, Status.OK, Status.OK]
        assert server.received == 3


# --- fatal faults -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("401", "OPENAI_API_KEY"),
        ("403", "rights"),
        ("404", "model's name"),
        ("400", "rejected"),
        ("quota", "Top up"),
        ("type-is-no-word", "rejected"),
    ],
)
def test_a_fatal_fault_stops_within_one_request_a_worker_and_says_what_to_do(fault: str, says: str) -> None:
    with FakeOpenAI(script=["ok"] * 10, always=fault) as server:
        with pytest.raises(FatalEndpointError, match=says):
            ask(server, questions(500), max_concurrency=8)
        assert server.received <= 10 + 8
        with Journal() as journal:
            assert journal.spent("run").requests == server.bill()["requests"] == 10


def test_a_wrong_key_is_told_at_once_without_telling_the_key() -> None:
    with FakeOpenAI(key="another") as server, pytest.raises(FatalEndpointError) as caught:
        ask(server, questions(50))
    told = str(caught.value) + repr(caught.value) + str(pickle.dumps(caught.value))
    assert KEY not in told and "rejected" in told
    assert caught.value.__context__ is None


def test_what_a_header_has_from_the_environment_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_KEY", "0123abcd-of-azure")
    model: Any = {"headers": {"api-key": "$AZURE_KEY"}}
    with FakeOpenAI(key="another") as server:
        for asked in (
            lambda: check_access(OpenAIModel(model="m", base_url=server.url, **model)),
            lambda: ask(server, questions(1), **model),
        ):
            with pytest.raises(FatalEndpointError, match=r"provided: \*\*\*"):
                asked()


def test_an_endpoint_that_is_elsewhere_is_named_and_what_headers_hold_is_not_sent_there() -> None:
    with FakeOpenAI() as other, FakeOpenAI(moved=other.url.removesuffix("/v1")) as server:
        for asked in (
            lambda: check_access(OpenAIModel(model="m", base_url=server.url)),
            lambda: ask(server, questions(1)),
            lambda: ask(server, questions(1), mode="batch"),
        ):
            with pytest.raises(FatalEndpointError, match=rf"{other.url}.*Set base_url"):
                asked()
        assert other.received == 0


def test_a_missing_key_is_told_before_anything_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    with FakeOpenAI() as server, pytest.raises(FatalEndpointError, match="OPENAI_API_KEY is not set"):
        ask(server, questions(1))
    assert server.received == 0


def test_the_key_comes_from_a_file_where_one_is_named(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("from-a-file\n")
    with FakeOpenAI(key="from-a-file") as server:
        ask(server, questions(1), api_key_file=str(tmp_path / "key"))
    with FakeOpenAI(key="another") as server, pytest.raises(FatalEndpointError, match=f"the key in {tmp_path}/key"):
        ask(server, questions(1), api_key_file=str(tmp_path / "key"))


def test_a_file_with_the_key_may_be_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "key").write_text("from-a-file")
    assert key_of(OpenAIModel(model="m", api_key_file="~/key")) == "from-a-file"


@pytest.mark.parametrize("text", ["", "\n", "sk-with-a-quote”", "sk-one\nsk-two", b"\xff\xfes\0k\0"])
def test_a_key_that_cannot_be_sent_is_refused_and_not_told(text: str | bytes, tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(FatalEndpointError, match=f"{tmp_path}/key") as caught:
        check_access(OpenAIModel(model="m", base_url="http://127.0.0.1:9/v1", api_key_file=str(tmp_path / "key")))
    assert "sk-" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["http://", "http://[::1", "http://host:port/v1", "http://host/v1?version=1", "http://me:secret@host/v1"]
)
def test_an_address_that_cannot_work_is_refused_before_anything_is_asked(url: str) -> None:
    with pytest.raises(ValueError, match="base_url"):
        OpenAIModel(model="m", base_url=url)


@pytest.mark.parametrize("value", [date(2026, 1, 31), math.nan, {1, 2}])
def test_extra_body_that_is_no_json_is_refused_before_anything_is_asked(value: Any) -> None:
    with pytest.raises(ValueError, match="cannot be sent as JSON"):
        OpenAIModel(model="m", extra_body={"since": value})


def test_the_key_is_nowhere_in_the_home(home: Path) -> None:
    with FakeOpenAI(faults=0.3) as server:
        ask(server, questions(50))
    for path in home.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes()


def test_a_key_that_is_rejected_where_none_is_named_is_to_be_named() -> None:
    with FakeOpenAI(key="another") as server, pytest.raises(FatalEndpointError, match=r"api_key_env is null") as caught:
        ask(server, questions(1), api_key_env=None)
    assert "$None" not in str(caught.value)


@pytest.mark.parametrize("name", ["", "X Title", "Täg", "X\r\nY", "X:"])
def test_a_header_that_cannot_be_sent_is_refused_before_anything_is_asked(name: str) -> None:
    with pytest.raises(ValueError, match="no header can be called"):
        OpenAIModel(model="m", headers={name: "lion"})


def test_headers_name_their_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="looks like a secret"):
        OpenAIModel(model="m", headers={"api-key": "abc"})
    with FakeOpenAI() as server, pytest.raises(FatalEndpointError, match="AZURE_KEY"):
        ask(server, questions(1), headers={"api-key": "$AZURE_KEY"})
    monkeypatch.setenv("AZURE_KEY", "abc")
    with FakeOpenAI() as server:
        ask(server, questions(1), headers={"api-key": "$AZURE_KEY"})


def test_what_looks_like_a_key_is_scrubbed() -> None:
    assert scrubbed("bad key sk-proj-abcd1234ef and hush", "hush") == "bad key *** and ***"
    assert "abc.def" not in scrubbed("Authorization: Bearer abc.def")


@pytest.mark.parametrize(
    "error",
    [
        FatalEndpointError("http://e", "m", "no", "do"),
        TooManyFailures(3, 10, 0.1, {"HTTP 500": 3}),
        BudgetReached("budget.max_usd", 1.0, 0.7, 0.2, 0.2),
        UnknownPrice("m", ["a"]),
    ],
)
def test_errors_survive_pickling(error: Exception) -> None:
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_the_message_at_a_cap_adds_up() -> None:
    shown = str(BudgetReached("budget.max_usd", 1.0, 0.7, 0.2, 0.15))
    assert "0.7 is spent, 0.2 set aside for requests under way, and the next request may take 0.15" in shown
    assert "0.9 is spent, and the next" in str(BudgetReached("budget.max_usd", 1.0, 0.9, 0.0, 0.15))


# --- budget -------------------------------------------------------------------------------------------------------


def cost_of(server: FakeOpenAI) -> float:
    return PRICE.cost(server.bill()["prompt_tokens"], 0, server.bill()["completion_tokens"])


def test_a_cap_is_told_in_whole_figures() -> None:
    told = str(BudgetReached("budget.max_tokens", 20_000_000, 19_998_123, 0, 12_345))
    assert "= 20,000,000 is reached: 19,998,123 is spent, and the next request may take 12,345." in told
    told = str(BudgetReached("budget.max_usd", 50.0, 49.99998, 0, 0.00004))
    assert "= 50 is reached: 49.99998 is spent, and the next request may take 0.00004." in told


def test_the_cap_is_never_passed_and_raising_it_finishes_without_a_repetition() -> None:
    with FakeOpenAI(latency=0.002) as server:
        whole = 400 * PRICE.cost(8, 0, 40)
        with pytest.raises(BudgetReached, match="max_usd"):
            ask(server, questions(400), budget=Budget(max_usd=whole / 4))
        assert whole / 8 < cost_of(server) <= whole / 4
        with Journal() as journal:
            assert journal.spent("run").usd == pytest.approx(cost_of(server))
        assert len(ask(server, questions(400), budget=Budget(max_usd=10 * whole))) == 400
        assert server.bill()["twice"] == {}


@pytest.mark.parametrize(
    ("budget", "name"),
    [
        (Budget(max_requests=20), "budget.max_requests"),
        (Budget(max_tokens=2000), "budget.max_tokens"),
        (Budget(max_usd=1, max_requests=20, max_tokens=10**6), "budget.max_requests = 20"),
        (Budget(by_role={"teacher": Limits(max_requests=20)}), "budget.by_role.teacher.max_requests"),
    ],
)
def test_every_kind_of_cap_holds(budget: Budget, name: str) -> None:
    with FakeOpenAI() as server:
        with pytest.raises(BudgetReached, match=name):
            ask(server, questions(100), budget=budget)
        bill = server.bill()
        assert 0 < bill["requests"] <= 20 or bill["prompt_tokens"] + bill["completion_tokens"] <= 2000


def test_the_cap_holds_though_replies_are_lost_on_their_way() -> None:
    with FakeOpenAI(script=["drop", "cut-json"] * 50) as server:
        with pytest.raises(BudgetReached):
            ask(server, questions(200), budget=Budget(max_requests=40))
        assert server.bill()["requests"] + server.bill()["lost"] <= 40


def test_a_lost_reply_ends_no_call_while_others_may_leave_of_their_money() -> None:
    budget = Budget(max_usd=16 * PRICE.worst(30, 100))  # as much as is set aside at first; answers take half of it
    with FakeOpenAI(script=["drop"]) as server, pytest.raises(BudgetReached) as caught:
        ask(server, questions(100), budget=budget, max_concurrency=8)
    assert caught.value.spent + 2 * caught.value.next_request > caught.value.limit


def test_whoever_waits_for_what_others_set_aside_under_the_cap_says_so_and_goes_on_once_it_is_free() -> None:
    shown: list[dict[str, Any]] = []
    with FakeOpenAI() as server, Journal() as other:
        other.claim("run", "referee", [Wish("another's", 1, 0.0)], [])

        def look(done: int, total: int, figures: dict[str, Any]) -> None:
            shown.append(figures)
            if any("under the cap" in name for name in figures):
                other.let_go()

        (reply,) = ask(server, questions(1), budget=Budget(max_requests=1), on_progress=look)
    assert reply.status is Status.OK
    assert shown[0] == {"usd": 0, "waiting under the cap for other requests of this run": 1}
    assert not any("under the cap" in name for name in shown[-1])


def test_money_is_set_aside_again_for_a_lost_reply_and_not_for_a_refused_request() -> None:
    with FakeOpenAI(script=["drop", "429", "429", "429"]) as server:
        (reply,) = ask(server, questions(1), budget=Budget(max_requests=2))
        assert reply.status is Status.OK
        assert (server.bill()["requests"], server.bill()["lost"]) == (1, 1)


def test_half_a_character_in_an_answer_costs_no_neighbour_its_answer() -> None:
    with FakeOpenAI(
        answer=lambda body: "half \ud83d" if body["messages"][0]["content"].endswith(" 3") else "whole"
    ) as server:
        replies = ask(server, questions(20))
        assert [reply.text for reply in replies] == ["half ?" if n == 3 else "whole" for n in range(20)]
        assert ask(server, questions(20)) == replies and server.bill()["requests"] == 20


def test_an_answer_that_never_arrives_is_not_paid_for_without_end() -> None:
    with FakeOpenAI(always="no-choices") as server:
        (reply,) = ask(server, questions(1), max_failed_share=1)
        assert reply.status is Status.FAILED and "5 times" in (reply.error or "")
        assert server.bill()["lost"] == 5
    with Journal() as journal:
        (spent,) = journal.spend()
        assert (spent.requests, spent.lost_requests) == (0, 5)


def test_a_gateway_that_gave_up_may_have_billed() -> None:
    with FakeOpenAI(script=["504", "500"]) as server:
        ask(server, questions(1))
    with Journal() as journal:
        assert [spent.lost_requests for spent in journal.spend()] == [1]


@pytest.mark.parametrize("fault", ["drop", "gone", "cut-json", "too-deep"])
def test_what_was_sent_and_brought_no_answer_counts_as_lost(fault: str) -> None:
    with FakeOpenAI(script=[fault]) as server:
        ask(server, questions(1))
        assert server.bill()["lost"] == 1
    with Journal() as journal:
        assert [spent.lost_requests for spent in journal.spend()] == [1]


def test_what_may_have_been_billed_counts_though_another_request_ends_the_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tasks.models.client.FIRST_BACKOFF", 15)  # by then the other has ended it
    with FakeOpenAI(script=["drop", "ok", "ok", "ok"], always="401") as server:
        with pytest.raises(FatalEndpointError, match="rejected"):
            ask(server, questions(20), max_concurrency=2)
        bill = server.bill()
    with Journal() as journal:
        (spent,) = journal.spend()
        assert (spent.requests, spent.lost_requests) == (bill["requests"], 1) and bill["lost"] == 1


def test_nothing_is_lost_where_no_connection_was_made() -> None:
    replies = answer_all(
        OpenAIModel(model="m", base_url="http://127.0.0.1:9", price="free", deadline=0, max_failed_share=1),
        questions(1), Sampling(), Account(run_id="run", role="teacher"), lambda done, total, figures: None,
    )  # fmt: skip
    assert "no connection" in (replies[0].error or "")
    with Journal() as journal:
        assert journal.spend() == []


def test_an_endpoint_that_asks_for_no_wait_is_still_given_time() -> None:
    with FakeOpenAI(always="429-now") as server:
        ask(server, questions(4), deadline=2, max_failed_share=1)
        assert server.received < 60


@pytest.mark.parametrize("fate", ["too-long-without-a-code", "too-long-in-detail", "too-long-in-text"])
def test_a_server_that_has_no_code_for_it_is_understood_when_a_prompt_is_too_long(fate: str) -> None:
    with FakeOpenAI(script=[fate]) as server:
        replies = ask(server, questions(8), max_failed_share=1, max_concurrency=1)
        assert [reply.status for reply in replies].count(Status.OK) == 7
        assert "too long" in next(reply.error or "" for reply in replies if reply.status is Status.FAILED)


def test_a_model_that_takes_no_temperature_is_asked_without() -> None:
    with FakeOpenAI(always="no-temperature") as server:
        assert {reply.status for reply in ask(server, questions(4))} == {Status.OK}
        assert "temperature" not in server.requests[-1]


def test_an_endpoint_that_asks_for_more_time_than_there_is_says_how_much() -> None:
    with FakeOpenAI(script=["429-seconds"]) as server, pytest.raises(TooManyFailures, match="a pause of 1 min, more"):
        ask(server, questions(1), deadline=0)


def test_a_cap_on_a_role_that_is_misspelt_is_refused() -> None:
    with pytest.raises(ValueError, match=r"called teachr\. There are: teacher, referee, generator"):
        Budget(by_role={"teachr": Limits(max_usd=1)})


def test_two_calls_at_once_pay_once_and_keep_the_cap_together() -> None:
    results: list[Any] = []

    def call(server: FakeOpenAI) -> None:
        try:
            results.append(ask(server, questions(200), budget=Budget(max_requests=200)))
        except BaseException as error:
            results.append(error)

    with FakeOpenAI(latency=0.005) as server:
        threads = [threading.Thread(target=call, args=(server,)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert server.bill()["requests"] == server.bill()["distinct"] == 200
    assert results[0] == results[1]


def test_an_unknown_model_needs_a_price_or_the_word_free() -> None:
    with FakeOpenAI() as server:
        with pytest.raises(UnknownPrice, match="price: free"):
            ask(server, questions(1), price=None)
        assert server.received == 0
        ask(server, questions(1), price="free")
    with Journal() as journal:
        assert journal.spend()[0].usd == 0 and journal.spend()[0].requests == 1


# --- dialects -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fault", "ends_as"), [("no-schema", "json_object"), ("no-format", None)])
def test_an_endpoint_without_structured_output_is_found_out_once_and_remembered(fault: str, ends_as: str) -> None:
    with FakeOpenAI(always=fault) as server:
        replies = ask(server, questions(5, response_schema=SCHEMA), max_concurrency=1)
        assert {reply.status for reply in replies} == {Status.OK}
        assert server.requests[-1].get("response_format", {}).get("type") == ends_as
        before = server.received
        ask(server, questions(5, "more", response_schema=SCHEMA), max_concurrency=1)
        assert server.received == before + 5


def test_an_endpoint_that_wants_max_completion_tokens_gets_them() -> None:
    with FakeOpenAI(always="no-max-tokens") as server:
        assert ask(server, questions(3))[0].status == Status.OK
        assert server.requests[-1]["max_completion_tokens"] == 100


def test_the_body_carries_sampling_and_extra_fields() -> None:
    with FakeOpenAI() as server:
        sampling = Sampling(temperature=0.3, top_p=0.9, max_tokens=7, stop=("END",))
        ask(server, questions(1), sampling=sampling, extra_body={"reasoning_effort": "low"})
        (body,) = server.requests
    del body["messages"]
    assert body == {
        "model": "fake",
        "temperature": 0.3,
        "max_tokens": 7,
        "top_p": 0.9,
        "stop": ["END"],
        "reasoning_effort": "low",
    }


def test_extra_body_cannot_replace_what_the_key_is_made_of() -> None:
    with pytest.raises(ValueError, match="extra_body has n, stream"):
        OpenAIModel(model="m", extra_body={"stream": True, "n": 2})


# --- pace ---------------------------------------------------------------------------------------------------------


def test_no_more_requests_than_allowed_are_under_way() -> None:
    with FakeOpenAI(latency=0.01) as server:
        ask(server, questions(60), max_concurrency=7)
        assert server.most_active == 7


def test_concurrency_halves_once_for_a_burst_and_grows_back() -> None:
    throttle = Throttle(64)
    sent_at = time.monotonic()
    for _ in range(20):
        throttle.slow_down(sent_at)
    assert throttle.limit == 32
    for _ in range(32 * 40):
        throttle.speed_up()
    assert 55 < throttle.limit <= 64


def test_a_burst_that_was_too_much_halves_what_is_under_way_and_answers_let_it_grow_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tasks.models.client.FIRST_BACKOFF", 0.001)
    closed: list[float] = []
    monkeypatch.setattr(Gate, "close_for", lambda gate, seconds: closed.append(seconds))
    under_way: list[int] = []

    def answer(body: dict[str, Any]) -> str:
        under_way.append(server.active)
        return "yes"

    with FakeOpenAI(script=["429-seconds"] * 8, latency=0.04, answer=answer) as server:
        ask(server, questions(100), max_concurrency=8)
    assert under_way[0] < 8 == max(under_way)
    assert closed == [0.05] * 8  # for as long as the endpoint asks nobody asks it


def test_nothing_is_sent_while_the_endpoint_wants_to_be_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.fake_openai.WAIT", 0.5)
    early: list[float] = []
    exchange = client._Call._exchange

    async def watched(call: client._Call, question: client._Question) -> Said:
        early.append(call.gate._opens_at - time.monotonic())
        return await exchange(call, question)

    monkeypatch.setattr(client._Call, "_exchange", watched)
    with FakeOpenAI(script=["429-seconds"]) as server:
        ask(server, questions(12), requests_per_minute=600)  # most of them wait for their turn when it says so
    assert len(early) == 13 and max(early) <= 0


def test_of_a_minute_is_taken_what_was_used_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: Counter[Pace] = Counter()

    async def take(pace: Pace, amount: int) -> None:
        taken[pace] += amount

    monkeypatch.setattr(Pace, "take", take)
    monkeypatch.setattr(Pace, "give_back", lambda pace, amount: taken.subtract({pace: amount}))
    with FakeOpenAI(script=["500"]) as server:
        ask(server, questions(20))
        bill = server.bill()
    assert sorted(taken.values()) == [21, bill["prompt_tokens"] + bill["completion_tokens"]]


def test_requests_per_minute_are_kept() -> None:
    with FakeOpenAI() as server:
        started = time.monotonic()
        ask(server, questions(40), requests_per_minute=1200)  # 20 a second, of which a second's worth may go at once
        assert time.monotonic() - started > 0.9


def test_tokens_not_used_are_given_back_to_the_minute() -> None:
    pace = Pace(60_000)
    pace.give_back(-5000)
    owed = pace._paid_until
    pace.give_back(5000)
    assert pace._paid_until == pytest.approx(owed - 5)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "20"}, 20),
        ({"retry-after": "1.5"}, 1.5),
        ({"retry-after-ms": "250"}, 0.25),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:20 GMT", "date": "Wed, 21 Oct 2015 07:28:00 GMT"}, 20),
        ({"retry-after": "soon"}, None),
        ({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "1m30.5s"}, 90.5),
        ({"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "20ms"}, 0.02),
        ({"x-ratelimit-remaining-tokens": "7", "x-ratelimit-reset-tokens": "6m0s"}, None),
        ({"x-ratelimit-reset": "1000000000001"}, 0),
    ],
)
def test_what_an_endpoint_asks_for_is_understood(headers: dict[str, str], seconds: float | None) -> None:
    assert asked_wait(headers) == seconds


# --- a journal that cannot be written ---------------------------------------------------------------------------


def test_answers_that_could_not_be_written_at_once_are_kept_with_those_under_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    failures, add = [StorageError("locked")], Journal.add

    def fails_once(*args: Any) -> None:
        if failures:
            raise failures.pop()
        add(*args)

    monkeypatch.setattr(Journal, "add", fails_once)
    with FakeOpenAI(latency=0.05) as server:
        with pytest.raises(StorageError, match="locked"):
            ask(server, questions(60), max_concurrency=8)
        assert 0 < server.received < 60
        ask(server, questions(60))
        assert server.bill()["twice"] == {} and server.received == 60


def test_answers_that_no_journal_could_keep_count_as_lost(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storage.journal.BUSY_SECONDS", 0.05)
    Journal().close()
    other = sqlite3.connect(home / "journal.sqlite", isolation_level=None, check_same_thread=False)

    def locks_and_says(body: dict[str, Any]) -> str:
        if not other.in_transaction:
            other.execute("BEGIN IMMEDIATE")
        return "yes"

    with FakeOpenAI(answer=locks_and_says) as server:
        with pytest.raises(StorageError, match="cannot be written"):
            ask(server, questions(8), max_concurrency=8)
        other.close()
        with Journal() as journal:
            (spent,) = journal.spend()
            assert spent.lost_requests >= server.bill()["requests"] > 0 == spent.requests


# --- interruptions --------------------------------------------------------------------------------------------------

CALLER = """
import sys
from tasks.models import client
from tasks.models.budget import Account
from tasks.models.chat import Sampling
from tasks.models.client import answer_all
from tasks.models.endpoint import OpenAIModel
from tests.tasks.models.test_client import questions
if len(sys.argv) > 3:
    client.DRAIN_SECONDS = client.TERMINATED_SECONDS = float(sys.argv[3])
model = OpenAIModel(model="fake", base_url=sys.argv[1], price="free", max_concurrency=16)
answer_all(model, questions(int(sys.argv[2])), Sampling(), Account(run_id="run", role="teacher"), lambda *a: None)
"""


def start_caller(server: FakeOpenAI, count: int, *patience: str) -> "subprocess.Popen[str]":
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", CALLER, server.url, str(count), *patience]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        text=True,
        stderr=subprocess.PIPE,
        # A shell's background job ignores SIGINT, and so would all that it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_until(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.005)


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_what_is_under_way_is_kept_when_the_process_is_told_to_stop(stop: signal.Signals) -> None:
    with FakeOpenAI(latency=0.3) as server:
        caller = start_caller(server, 200)
        wait_until(lambda: server.received >= 16)
        caller.send_signal(stop)
        _, said = caller.communicate()
        assert caller.returncode == -stop
        assert re.search(r"Answers under way, to be paid for: [1-9]", said)
        assert ("Ctrl-C again gives them up" in said) == (stop == signal.SIGINT)
        with Journal() as journal:
            assert journal.spent("run").requests == server.bill()["requests"] >= 16
        assert server.received < 64


def test_a_call_leaves_to_sigterm_what_it_did_before() -> None:
    def handler(*args: Any) -> None: ...

    before = signal.signal(signal.SIGTERM, handler)
    try:
        with FakeOpenAI() as server:
            ask(server, questions(1))
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=["kill", "sigterm", "ctrl-c"])
def test_what_was_with_the_endpoint_when_the_process_ended_counts_as_lost(stop: signal.Signals) -> None:
    with FakeOpenAI(latency=30) as server:
        caller = start_caller(server, 40, "0.2")
        wait_until(lambda: server.received >= 16)
        caller.send_signal(stop)
        caller.communicate()
        sent = server.received
    with Journal() as journal:
        (spent,) = journal.spend()
        assert spent.requests == 0 and spent.lost_requests >= sent == 16
        assert (
            spent.lost_requests == 16 or stop == signal.SIGKILL
        )  # a dead process says of no request whether it was sent
        assert spent.model == "fake" and spent.lost_tokens > 0


@pytest.mark.slow
def test_killed_twenty_times_every_answer_is_paid_once_but_those_under_way() -> None:
    with FakeOpenAI(faults=0.05, latency=0.02) as server:
        for kill in range(20):
            caller = start_caller(server, 2000)
            target = server.received + 40 + 7 * kill
            wait_until(lambda: server.received >= target or caller.poll() is not None)  # noqa: B023 (called at once)
            caller.kill()
            caller.communicate()
        caller = start_caller(server, 2000)
        assert caller.wait() == 0, caller.communicate()
        bill = server.bill()
        assert bill["distinct"] == 2000
        assert bill["requests"] - 2000 <= 20 * (16 + 16)  # under way, or answered and not yet durable


def test_a_rejected_key_is_found_without_a_paid_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-wrong-0123456789")
    with FakeOpenAI(key="right") as server:
        with pytest.raises(FatalEndpointError, match="the key was rejected") as caught:
            check_access(OpenAIModel(model="m", base_url=server.url))
        assert server.received == 0
    assert "0123456789" not in str(caught.value)


def test_an_endpoint_without_a_list_of_models_is_given_the_benefit_of_the_doubt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    with FakeOpenAI() as server:
        check_access(OpenAIModel(model="m", base_url=server.url + "/elsewhere"))
    check_access(OpenAIModel(model="m", base_url="http://127.0.0.1:9/v1"))


@pytest.mark.parametrize("status", [401, 403])
def test_a_key_that_may_only_ask_is_not_taken_for_a_wrong_one(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(server: FakeOpenAI, request: web.Request) -> web.Response:
        message = "You have insufficient permissions for this operation. Missing scopes: api.model.read."
        return web.json_response({"error": {"message": message}}, status=status)

    monkeypatch.setattr(FakeOpenAI, "_models", refuse)
    with FakeOpenAI() as server:
        check_access(OpenAIModel(model="m", base_url=server.url))


def test_an_endpoint_without_a_key_is_told_how_to_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(FatalEndpointError, match=r"api_key_env \(null: none is needed\)"):
        key_of(OpenAIModel(model="m"))
    assert key_of(OpenAIModel(model="m", api_key_env=None)) == "none"
