"""How fast one may ask: as many at a time and a minute as the settings allow, and as the endpoint asks for.

Pure arithmetic on the clock, apart from waiting. Knows nothing of requests.
"""

import asyncio
import re
import time
from collections import deque
from collections.abc import Mapping
from email.utils import parsedate_to_datetime

BURST_SECONDS = 1.0  # how much of an unused minute may be used at once


class Throttle:
    """At most `limit` at a time: halved when we are too fast, one more each time that as many went well."""

    def __init__(self, most: int):
        self.most = most
        self.limit = float(most)
        self.active = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._halved_at = 0.0

    async def acquire(self) -> None:
        """Wait for a place."""
        while self.active >= int(self.limit):
            turn = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
            await turn
        self.active += 1

    def release(self) -> None:
        """Give the place to whoever waits."""
        self.active -= 1
        free = int(self.limit) - self.active
        while self._waiting and free > 0:
            turn = self._waiting.popleft()
            if not turn.done():  # cancelled while it waited
                turn.set_result(None)
                free -= 1

    def slow_down(self, sent_at: float) -> None:
        """Halve, once for all the requests that were sent before the last halving could show."""
        if sent_at >= self._halved_at:
            self.limit = max(1.0, self.limit / 2)
            self._halved_at = time.monotonic()

    def speed_up(self) -> None:
        """After an answer."""
        if self.limit < self.most:
            self.limit = min(float(self.most), self.limit + 1 / self.limit)


class Pace:
    """So much a minute. What is taken beyond that is owed, and waited for."""

    def __init__(self, per_minute: int | None):
        self._seconds_each = 60 / per_minute if per_minute else 0.0
        self._paid_until = 0.0  # the moment at which all that was taken has become free again

    async def take(self, amount: int) -> None:
        """Take an amount, and wait until it may be used."""
        if self._seconds_each:
            now = time.monotonic()
            self._paid_until = max(self._paid_until, now - BURST_SECONDS)
            wait = self._paid_until - now
            self._paid_until += amount * self._seconds_each
            if wait > 0:
                await asyncio.sleep(wait)

    def give_back(self, amount: int) -> None:
        """Return what was taken and not used."""
        self._paid_until -= amount * self._seconds_each


class Gate:
    """Closed for all while the endpoint wants to be left alone."""

    def __init__(self) -> None:
        self._opens_at = 0.0

    def close_for(self, seconds: float) -> None:
        """Let nobody through for so long."""
        self._opens_at = max(self._opens_at, time.monotonic() + seconds)

    async def passed(self) -> None:
        """Wait until it is open."""
        while (wait := self._opens_at - time.monotonic()) > 0:
            await asyncio.sleep(wait)


def asked_wait(headers: Mapping[str, str]) -> float | None:
    """Seconds that an endpoint asks to wait, from whichever header says so; null where none does."""
    if (hint := headers.get("retry-after-ms")) and (seconds := _number(hint)) is not None:
        return seconds / 1000
    if hint := headers.get("retry-after"):
        return _retry_after(hint, headers.get("date"))
    resets = []
    for what in ("-requests", "-tokens", ""):
        exhausted = headers.get(f"x-ratelimit-remaining{what}", "0").strip() in {"0", ""}
        if exhausted and (hint := headers.get(f"x-ratelimit-reset{what}")):
            resets.append(_reset(hint))
    return max((seconds for seconds in resets if seconds is not None), default=None)


def _retry_after(hint: str, date: str | None) -> float | None:
    """Seconds as a number, or the date at which to come back, by the endpoint's clock if it tells it: ours may be wrong."""
    if (seconds := _number(hint)) is not None:
        return seconds
    try:
        there = parsedate_to_datetime(date).timestamp() if date else time.time()
        return max(0.0, parsedate_to_datetime(hint).timestamp() - there)
    except ValueError:
        return None


def _reset(hint: str) -> float | None:
    """A duration ("1m30.5s", "20ms", "2") or the moment itself, in seconds or milliseconds since 1970."""
    if (number := _number(hint)) is not None:
        if number > 1e11:
            number /= 1000
        return max(0.0, number - time.time()) if number > 1e9 else number
    parts = re.findall(r"(\d+(?:\.\d+)?)(ms|d|h|m|s)", hint)
    units = {"d": 86_400.0, "h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}
    return sum(float(amount) * units[unit] for amount, unit in parts) if parts else None


def _number(text: str) -> float | None:
    """A finite number that is not negative, or null."""
    return float(text) if re.fullmatch(r"\s*\d+(\.\d+)?\s*", text) else None
