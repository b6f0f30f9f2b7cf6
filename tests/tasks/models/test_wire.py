"""What an endpoint says of itself is read so that no cap is passed, whatever it leaves out."""

from typing import Any

import pytest

from storage.journal import Wish
from tasks.models.chat import Request, Sampling, Status
from tasks.models.endpoint import OpenAIModel
from tasks.models.errors import FatalEndpointError, RequestFailed, TransientError
from tasks.models.prices import Price
from tasks.models.wire import Dialect, Usage, failure, narrower, said, wish_of

WISH, SAMPLING = Wish("k", 150, 0.0), Sampling(max_tokens=100)  # a prompt of at most 50 tokens


def test_what_a_request_may_use_is_bounded_by_the_bytes_of_all_that_is_sent() -> None:
    schema = {"type": "object", "properties": {"score": {"type": "number"}}}
    system, user = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "世界" * 50}
    price = Price(input=1, output=4)
    bare, with_system, with_schema = (
        wish_of("k", Request("r", messages, response_schema=asked), SAMPLING, price)
        for messages, asked in (((user,), None), ((system, user), None), ((user,), schema))
    )
    assert bare.tokens - 100 >= 300
    assert with_system.tokens - bare.tokens >= len("systemBe brief.")
    assert with_schema.tokens - bare.tokens >= len(str(schema))
    assert [wish.usd for wish in (bare, with_schema)] == [
        price.worst(wish.tokens - 100, 100) for wish in (bare, with_schema)
    ]


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


@pytest.mark.parametrize("cached", [30, -3, "all", float("nan"), 1e300])
def test_no_more_of_a_prompt_is_cheap_than_there_is(cached: Any) -> None:
    assert usage_of({"prompt_tokens": 20, "prompt_tokens_details": {"cached_tokens": cached}}).cached_tokens in {0, 20}


def test_thoughts_that_are_counted_in_the_total_alone_are_paid_for() -> None:
    assert usage_of({"prompt_tokens": 20, "completion_tokens": 7, "total_tokens": 927}) == Usage(20, 0, 907)


@pytest.mark.parametrize(
    "usage",
    [None, {}, [], {"prompt_tokens": 0, "completion_tokens": 0}, {"input_tokens": 3}, {"prompt_tokens": "many"}, {"prompt_tokens": -4}, {"prompt_tokens": 1e300}],
)  # fmt: skip
def test_what_is_not_counted_gets_its_bound(usage: Any) -> None:
    assert usage_of(usage) == Usage(50, 0, 12)


@pytest.mark.parametrize(
    ("message", "finish_reason", "usage", "most"),
    [
        ({"content": None, "refusal": "twelve bytes"}, "stop", None, 12),
        ({"content": "twelve"}, "content_filter", None, 100),
        ({"content": ""}, "content_filter", {"prompt_tokens": 50, "completion_tokens": 0}, 0),
    ],
)
def test_a_refusal_and_what_was_withheld_are_paid_for_where_nobody_counts(
    message: dict[str, Any], finish_reason: str, usage: Any, most: int
) -> None:
    heard = said({"choices": [{"message": message, "finish_reason": finish_reason}], "usage": usage}, WISH, SAMPLING)
    assert heard.usage == Usage(50, 0, most)


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
        ("content_filter: RECITATION", Status.FILTERED),
    ],
)
def test_an_answer_that_was_cut_is_no_whole_one_however_an_endpoint_calls_it(
    finish_reason: str | None, status: Status
) -> None:
    payload = {"choices": [{"message": {"content": "It goes on and"}, "finish_reason": finish_reason}]}
    assert said(payload, WISH, SAMPLING).status == status


def test_what_a_filter_withheld_is_an_answer_though_no_message_is_there() -> None:
    for choice in ({}, {"message": None}):
        filtered = {"choices": [choice | {"finish_reason": "content_filter: PROHIBITED_CONTENT"}]}
        heard = said(filtered | {"usage": {"prompt_tokens": 9, "completion_tokens": 0}}, WISH, SAMPLING)
        assert (heard.text, heard.status, heard.usage) == (None, Status.FILTERED, Usage(9, 0, 0))


def test_an_answer_in_parts_is_its_text_without_the_thoughts() -> None:
    thought = {"type": "thinking", "thinking": [{"type": "text", "text": "Let me see."}]}
    parts = [thought, {"type": "text", "text": "Half "}, {"type": "text", "text": "an answer."}]
    heard = said({"choices": [{"message": {"content": parts}, "finish_reason": "stop"}]}, WISH, SAMPLING)
    assert (heard.text, heard.status) == ("Half an answer.", Status.OK)
    assert said({"choices": [{"message": {"content": [thought]}}]}, WISH, SAMPLING).status == Status.EMPTY


def test_the_words_of_a_refusal_are_kept_where_there_are_no_others() -> None:
    heard = said({"choices": [{"message": {"content": None, "refusal": "Not that."}}]}, WISH, SAMPLING)
    assert (heard.text, heard.status) == ("Not that.", Status.REFUSED)


@pytest.mark.parametrize("content", [["a"], [{"text": "a"}], [{"type": "text", "text": 5}], {"text": "a"}, 5])
def test_what_is_no_text_is_no_answer(content: Any) -> None:
    with pytest.raises(TransientError, match="without an answer"):
        said({"choices": [{"message": {"content": content}}]}, WISH, SAMPLING)


def test_a_reply_that_broke_off_in_an_error_is_no_answer_and_may_be_billed() -> None:
    with pytest.raises(TransientError) as caught:
        said({"choices": [{"message": {"content": "It goes on and"}, "finish_reason": "error"}]}, WISH, SAMPLING)
    assert caught.value.maybe_billed


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [(402, "", "no"), (429, "insufficient_balance", ""), (429, "", "You exceeded your current quota")],
)
def test_an_account_that_is_empty_is_not_waited_for(status: int, code: str, message: str) -> None:
    error = failure(OpenAIModel(model="m"), status, code, message, 7.5)
    assert isinstance(error, FatalEndpointError) and "Top up" in str(error)


def test_a_limit_by_the_minute_is_waited_for_though_google_calls_it_a_quota() -> None:
    message = """You exceeded your current quota, please check your plan and billing details.
* Quota exceeded for metric: generativelanguage.googleapis.com/generate_requests_per_model, limit: 10, model: m
Please retry in 11.7s."""
    error = failure(OpenAIModel(model="m"), 429, "", message, None)
    assert isinstance(error, TransientError) and error.hurried


@pytest.mark.parametrize(
    "message",
    [
        "The input (600 tokens) is longer than the model's context length (512 tokens).",
        "This model's maximum prompt length is 131072 but the request contains 140000 tokens.",
        "The input token count (1196265) exceeds the maximum number of tokens allowed (1048575).",
    ],
)
def test_a_prompt_that_is_too_long_fails_alone_however_an_endpoint_says_so(message: str) -> None:
    assert isinstance(failure(OpenAIModel(model="m"), 400, "", message, None), RequestFailed)


def test_a_body_that_is_too_large_fails_alone() -> None:
    assert isinstance(failure(OpenAIModel(model="m"), 413, "", "Payload Too Large", None), RequestFailed)


@pytest.mark.parametrize(
    ("status", "maybe_billed", "hurried"),
    [(429, False, True), (500, False, False), (425, False, False), (408, True, False), (504, True, False), (524, True, False)],
)  # fmt: skip
def test_a_rejection_says_how_long_to_wait_and_whether_it_may_be_billed(
    status: int, maybe_billed: bool, hurried: bool
) -> None:
    error = failure(OpenAIModel(model="m"), status, "", "later", 7.5)
    assert isinstance(error, TransientError)
    assert (error.wait, error.maybe_billed, error.hurried) == (7.5, maybe_billed, hurried)
    assert str(error) == f"HTTP {status}: later"  # the pause is no longer than there is time for


@pytest.mark.parametrize(
    ("status", "message", "sent"),
    [
        (400, "use 'max_completion_tokens'", {"max_completion_tokens": 7}),
        (400, "'temperature' is not supported", {}),
        (400, "the temperature in your prompt is not supported", {"temperature": 0.7}),
        (400, "'temperature' must be at most 1", {"temperature": 1.5}),
        (400, "json_schema is not supported", {}),
        (400, "Invalid schema for response_format", {"response_format": {"type": "json_schema"}}),
        (400, "the prompt is not supported", {"response_format": {"type": "json_schema"}}),
        (500, "json_schema is not supported", {"response_format": {"type": "json_schema"}}),
    ],
)
def test_a_rejection_of_what_was_not_sent_or_not_for_its_kind_changes_no_request(
    status: int, message: str, sent: dict[str, Any]
) -> None:
    assert narrower(Dialect(), status, message, sent) is None


@pytest.mark.parametrize("status", [400, 422])
def test_a_field_that_is_not_known_is_left_out_by_itself(status: int) -> None:
    sent = {"max_tokens": 7, "temperature": 0.7, "response_format": {"type": "json_object"}}
    for message, found in (
        ("use 'max_completion_tokens'", Dialect(max_tokens="max_completion_tokens")),
        ("Unsupported value: 'top_p'", Dialect(temperature=False)),
        ("no response_format here", Dialect(response_format="text")),
    ):
        assert narrower(Dialect(), status, message, sent) == found
