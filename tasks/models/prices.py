"""What a token costs: a small dated table, which a model's settings can override.

>>> price_of("gpt-4.1-mini-2025-04-14").output
1.6
"""

import re
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field

from tasks.models.errors import UnknownPrice

MILLION = 1_000_000


class Price(BaseModel):
    """Dollars per million tokens."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    input: float = Field(ge=0, description="Of the prompt.")
    output: float = Field(ge=0, description="Of the answer.")
    cached_input: float | None = Field(None, ge=0, description="Of the prompt's cached part. Null: as `input`.")
    batch_input: float | None = Field(None, ge=0, description="By the Batch API, of the prompt. Null: as `input`.")
    batch_output: float | None = Field(None, ge=0, description="By the Batch API, of the answer. Null: as `output`.")

    def cost(self, prompt: int, cached: int, completion: int) -> float:
        """Dollars for these tokens, `cached` being the part of `prompt` that the endpoint had seen before."""
        cheap = self.input if self.cached_input is None else self.cached_input
        return ((prompt - cached) * self.input + cached * cheap + completion * self.output) / MILLION

    @cache  # noqa: B019 (there are a handful of prices)
    def as_row(self) -> str:
        """The price as JSON, to be kept beside what was paid at it."""
        return self.model_dump_json(exclude_none=True)

    def batched(self) -> "Price":
        """The price by the Batch API. No provider promises the cached rate on top of it: it has none."""
        return Price(
            input=self.input if self.batch_input is None else self.batch_input,
            output=self.output if self.batch_output is None else self.batch_output,
        )

    def worst(self, prompt: int, completion: int) -> float:
        """The most that so many tokens can cost, whichever rate applies."""
        dearest = max(self.input, self.cached_input or 0)
        return (prompt * dearest + completion * self.output) / MILLION


def price_of(model: str, override: Price | Literal["free"] | None = None) -> Price | None:
    """The price of a model, null where it is free. A dated name counts as the undated one.

    Raises:
        UnknownPrice: neither the table nor the settings know it.
    """
    if override == "free":
        return None
    if override is not None:
        return override
    models = table()["models"]
    row = models.get(model) or models.get(re.sub(r"-20\d\d-\d\d-\d\d$", "", model))
    if row is None:
        raise UnknownPrice(model, sorted(models))
    return Price(**row)


@cache
def table() -> dict[str, Any]:
    """The table as it stands in `prices.yaml`: `as_of` and `models`."""
    return yaml.safe_load((Path(__file__).parent / "prices.yaml").read_bytes())
