"""What an endpoint says of itself is read so that no cap is passed, whatever it leaves out."""

from typing import Any

import pytest

from storage.journal import Wish
from tasks.models.chat import Sampling, Status
from tasks.models.errors import TransientError
from tasks.models.wire import Usage, said

WISH, SAMPLING = Wish("k", 150, 0.0), Sampling(max_tokens=100)  # a prompt of at most 50 tokens


def usage_of(usage: Any, text: str = "twelve bytes") -> Usage:
    return said({"choices": [{"message": {"content": text}}], "usage": usage}, WISH, SAMPLING).usage


def test_what_is_counted_is_taken_as_it_is() -> None:
    counted = {
        "prompt_tokens": 20,
        "completion_tokens": 7,
        "total_tokens": 27,
        "prompt_tokens_details": {"cached_tokens": 16},
    }
    assert usage_of(counted) == Usage(20, 16, 7)
    assert usage_of({"prompt_tokens": 20, "completion_tokens": 0, "total_tokens": 20}, "") == Usage(20, 0, 0)


def test_thoughts_that_are_counted_in_the_total_alone_are_paid_for() -> None:
    assert usage_of({"prompt_tokens": 20, "completion_tokens": 7, "total_tokens": 927}) == Usage(20, 0, 907)


@pytest.mark.parametrize(
    "usage",
    [None, {}, [], {"prompt_tokens": 0, "completion_tokens": 0}, {"input_tokens": 3}, {"prompt_tokens": "many"}, {"prompt_tokens": -4}],
)  # fmt: skip
def test_what_is_not_counted_gets_its_bound(usage: Any) -> None:
    assert usage_of(usage) == Usage(50, 0, 12)


def test_what_goes_into_the_journal_can_be_stored() -> None:
    heard = said(
        {"model": "m\udc00", "choices": [{"message": {"content": "\ud83d"}, "finish_reason": 3}]}, WISH, SAMPLING
    )
    assert (heard.model, heard.text, heard.finish_reason) == ("m?", "?", "3")


@pytest.mark.parametrize(
    ("finish_reason", "status"),
    [
        ("stop", Status.OK),
        (None, Status.OK),
        ("length", Status.TRUNCATED),
        ("model_length", Status.TRUNCATED),
        ("MAX_TOKENS", Status.TRUNCATED),
        ("insufficient_system_resource", Status.TRUNCATED),
    ],
)
def test_an_answer_that_was_cut_is_no_whole_one_however_an_endpoint_calls_it(
    finish_reason: str | None, status: Status
) -> None:
    payload = {"choices": [{"message": {"content": "It goes on and"}, "finish_reason": finish_reason}]}
    assert said(payload, WISH, SAMPLING).status == status


def test_an_answer_in_parts_is_its_text_without_the_thoughts() -> None:
    thought = {"type": "thinking", "thinking": [{"type": "text", "text": "Let me see."}]}
    parts = [thought, {"type": "text", "text": "Half "}, {"type": "text", "text": "an answer."}]
    heard = said({"choices": [{"message": {"content": parts}, "finish_reason": "stop"}]}, WISH, SAMPLING)
    assert (heard.text, heard.status) == ("Half an answer.", Status.OK)
    assert said({"choices": [{"message": {"content": [thought]}}]}, WISH, SAMPLING).status == Status.EMPTY


@pytest.mark.parametrize("content", [["a"], [{"text": "a"}], [{"type": "text", "text": 5}], {"text": "a"}, 5])
def test_what_is_no_text_is_no_answer(content: Any) -> None:
    with pytest.raises(TransientError, match="without an answer"):
        said({"choices": [{"message": {"content": content}}]}, WISH, SAMPLING)
