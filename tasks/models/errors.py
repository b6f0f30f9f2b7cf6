"""What can go wrong between us and a model, as one tree. All of it can be pickled, and none of it holds a key.

    ModelError
    ├── FatalEndpointError    no retry can mend it: key, model name, quota, a request the endpoint does not take
    │   └── Unreachable       or every retry was made
    ├── TransientError        worth another try; seen outside only as the text of a failed reply
    ├── RequestFailed         the endpoint does not take this one request; likewise
    ├── TooManyFailures       more requests than allowed stayed without an answer
    ├── BudgetReached         the next request could pass a cap
    └── UnknownPrice          a model that costs nobody knows what

Whatever is raised, the answers that had arrived are in the journal: the same call again goes on from there.
"""

import re

_SECRETS = re.compile(r"\b(?:sk|pk|key|xai|gsk)-[\w*.-]{6,}|(?<=Bearer )\S+", re.IGNORECASE)


def scrubbed(text: str, *secrets: str) -> str:
    """`text` without the given secrets and without anything that looks like a key, at most 500 characters of it."""
    for secret in secrets:
        if secret:
            text = text.replace(secret, "***")
    return _SECRETS.sub("***", text)[:500]


class ModelError(Exception):
    """A model was asked and could not answer."""


class FatalEndpointError(ModelError):
    """The endpoint will not answer, however often it is asked. Says what to do."""

    def __init__(self, endpoint: str, model: str, reason: str, way_out: str):
        self.endpoint, self.model, self.reason, self.way_out = endpoint, model, reason, way_out
        super().__init__(endpoint, model, reason, way_out)

    def __str__(self) -> str:
        return f"{self.model} at {self.endpoint}: {self.reason}. {self.way_out}"


class Unreachable(FatalEndpointError):
    """The endpoint was asked again and again and did not answer: what became of the last request is not known."""


class TransientError(ModelError):
    """One attempt failed, and another may not.

    `wait` is what the endpoint asks for, in seconds; `maybe_billed` says that an answer may have been made and
    got lost on its way; `hurried` that we are asking too fast; `reworded` that the next attempt is another request.
    """

    def __init__(
        self,
        reason: str,
        *,
        wait: float | None = None,
        maybe_billed: bool = False,
        hurried: bool = False,
        reworded: bool = False,
    ):
        self.reason, self.wait, self.maybe_billed, self.hurried = reason, wait, maybe_billed, hurried
        self.reworded = reworded
        super().__init__(reason)

    def __str__(self) -> str:
        return self.reason


class RequestFailed(ModelError):
    """The endpoint does not take this one request, though it may take others: a prompt that is too long."""


class TooManyFailures(ModelError):
    """More than the allowed share of requests stayed without an answer."""

    def __init__(self, failed: int, total: int, allowed: float, reasons: dict[str, int]):
        self.failed, self.total, self.allowed, self.reasons = failed, total, allowed, reasons
        super().__init__(failed, total, allowed, reasons)

    def __str__(self) -> str:
        ranked = sorted(self.reasons.items(), key=lambda item: -item[1])
        table = "\n".join(f"  {count:6}  {reason}" for reason, count in ranked)
        return (
            f"{self.failed} of {self.total} requests stayed without an answer, more than max_failed_share = "
            f"{self.allowed:g} allows. What did arrive is kept; the same command again asks only for the rest.\n{table}"
        )


def _whole(amount: float) -> str:
    """Dollars, requests or tokens, to the millionth and without an exponent."""
    return f"{amount:,.6f}".rstrip("0").rstrip(".")


class BudgetReached(ModelError):
    """The next request could pass a cap, so it was not sent."""

    def __init__(self, cap: str, limit: float, spent: float, set_aside: float, next_request: float):
        self.cap, self.limit, self.spent, self.set_aside, self.next_request = cap, limit, spent, set_aside, next_request
        super().__init__(cap, limit, spent, set_aside, next_request)

    def __str__(self) -> str:
        set_aside = f"{_whole(self.set_aside)} set aside for requests under way, " if self.set_aside else ""
        return (
            f"{self.cap} = {_whole(self.limit)} is reached: {_whole(self.spent)} is spent, {set_aside}and the next request "
            f"may take {_whole(self.next_request)}. All answers are kept; raise the cap and run the same command to go on."
        )


class UnknownPrice(ModelError):
    """The price table does not know a model."""

    def __init__(self, model: str, known: list[str]):
        self.model, self.known = model, known
        super().__init__(model, known)

    def __str__(self) -> str:
        return (
            f"no price is known for the model {self.model!r}. Give one in dollars per million tokens, "
            "`price: {input: 0.4, output: 1.6}`, or say `price: free`. "
            f"Known are: {', '.join(self.known)}"
        )
