"""Prices: by name, overridable, and never guessed."""

import datetime

import pytest

from tasks.models.errors import UnknownPrice
from tasks.models.prices import Price, price_of, table


def test_a_dated_name_has_the_price_of_its_model() -> None:
    assert price_of("gpt-4.1-mini-2025-04-14") == price_of("gpt-4.1-mini")


def test_an_override_goes_before_the_table_and_free_is_a_price() -> None:
    override = Price(input=0.015, output=0.06)
    assert price_of("gpt-4o", override) == override
    assert price_of("gpt-4o", "free") is None


def test_an_unknown_model_is_told_with_the_way_out() -> None:
    with pytest.raises(UnknownPrice, match=r"no price is known for the model 'llama'.*price: free"):
        price_of("llama")


def test_the_table_is_dated_and_every_row_is_a_price() -> None:
    assert isinstance(table()["as_of"], datetime.date)
    for model in table()["models"]:
        price = price_of(model)
        assert price and price.batch_input is not None and price.batch_input < price.input


def test_cost_counts_the_cached_part_once() -> None:
    price = Price(input=1.0, cached_input=0.25, output=4.0, batch_input=0.5, batch_output=2.0)
    assert price.cost(1_000_000, 0, 0) == 1.0
    assert price.cost(1_000_000, 400_000, 0) == pytest.approx(0.6 + 0.1)
    assert price.cost(0, 0, 500_000) == 2.0
    assert price.batched().cost(1_000_000, 400_000, 500_000) == pytest.approx(0.5 + 1.0)


def test_where_no_cheaper_rate_is_given_the_full_one_counts() -> None:
    price = Price(input=1.0, output=4.0)
    assert price.cost(1_000_000, 400_000, 0) == 1.0
    assert price.batched().cost(1_000_000, 0, 1_000_000) == 5.0


def test_the_worst_case_is_never_below_the_cost() -> None:
    price = Price(input=1.0, cached_input=2.0, output=4.0)
    assert price.worst(1000, 1000) >= price.cost(1000, 1000, 1000)


@pytest.mark.parametrize("wrong", [{"input": -1, "output": 1}, {"input": float("nan"), "output": 1}, {"input": 1}])
def test_a_price_that_makes_no_sense_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError):
        Price(**wrong)
