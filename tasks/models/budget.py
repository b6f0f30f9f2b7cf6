"""Who pays for a call, and how much at most."""

from pydantic import BaseModel, ConfigDict, Field, field_validator

from storage.journal import Cap, Over, Wish
from tasks.models.errors import BudgetReached

ROLES = ("teacher", "referee", "generator")


class Limits(BaseModel):
    """What may be spent at most. Null is no limit."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    max_usd: float | None = Field(None, ge=0, description="Dollars.")
    max_requests: int | None = Field(None, ge=0, description="Requests sent.")
    max_tokens: int | None = Field(None, ge=0, description="Tokens, of prompts and answers together.")


class Budget(Limits):
    """What a run may spend, over all of its iterations and restarts, and what a role of it may."""

    by_role: dict[str, Limits] = Field({}, description="Further limits for a role: teacher, referee, generator.")

    @field_validator("by_role")
    @classmethod
    def _are_roles(cls, by_role: dict[str, Limits]) -> dict[str, Limits]:
        if unknown := sorted(by_role.keys() - set(ROLES)):  # a cap on a name that is misspelt would hold nobody
            raise ValueError(f"no role that pays is called {', '.join(unknown)}. There are: {', '.join(ROLES)}")
        return by_role


class Account(BaseModel):
    """On whose behalf a call is made."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run_id: str
    role: str
    iteration: int = 0
    budget: Budget = Budget()

    def caps(self) -> list[Cap]:
        """All the caps that a request of this account has to keep."""
        caps = [Cap(None, self.budget.max_usd, self.budget.max_requests, self.budget.max_tokens)]
        if mine := self.budget.by_role.get(self.role):
            caps.append(Cap(self.role, mine.max_usd, mine.max_requests, mine.max_tokens))
        return caps


def budget_reached(over: Over, wish: Wish) -> BudgetReached:
    """The error that says which cap stands in the way of `wish`, and by how much."""
    name = f"budget.by_role.{over.cap.role}" if over.cap.role else "budget"
    limit = f"max_{over.what}"
    spent, reserved = (getattr(totals, over.what) for totals in (over.spent, over.reserved))
    needed = {"usd": wish.usd, "requests": 1, "tokens": wish.tokens}[over.what]
    return BudgetReached(f"{name}.{limit}", getattr(over.cap, limit), spent, reserved, needed)
