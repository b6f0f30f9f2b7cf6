"""Asks an OpenAI-compatible endpoint: many requests at a time, none of them twice, all within the budget.

    answer_all ── journal.find ──► answered before: no request, no key needed
        └── a call of one event loop
              feeder    claims requests in groups: not answered, not asked by another process, within the caps
              workers   one request at a time each; try again what may work (tenacity); stop at what cannot
              writer    makes finished answers durable, many in one transaction, before anyone sees them

Knows nothing of teachers, pools or Prefect, nor of what goes over the wire: `tasks.models.exchange` does.
"""

import asyncio
import contextlib
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, TypeVar

import tenacity

from storage.files import StorageError
from storage.journal import Answer, Claimed, Journal, Loss, Wish, now
from tasks.models.batch import Batches, batches_to_collect
from tasks.models.budget import Account, budget_reached
from tasks.models.chat import OnProgress, Reply, Request, Sampling, Status
from tasks.models.endpoint import OpenAIModel
from tasks.models.errors import ModelError, RequestFailed, TooManyFailures, TransientError
from tasks.models.exchange import connected
from tasks.models.pacing import Gate, Pace, Throttle
from tasks.models.prices import Price, price_of
from tasks.models.wire import (
    Dialect,
    Said,
    answer_of,
    keyer,
    known_dialect,
    remember_dialect,
    reply_of,
    wish_of,
)

COMMIT_SECONDS = 0.02  # how long finished answers gather before they are made durable together
POLL_SECONDS = 0.25  # between two looks at what other processes are doing
PROGRESS_SECONDS = 0.5
DRAIN_SECONDS = 60  # after Ctrl-C: how long requests under way, which are paid for, may still take
TERMINATED_SECONDS = 5  # the same after SIGTERM: whoever sends it kills soon after
MOST_LOST = 5  # answers to one request that may have been billed and did not arrive
FIRST_BACKOFF, LONGEST_BACKOFF = 0.5, 30.0
KEYS_AT_ONCE = 1000

T = TypeVar("T")


def answer_all(
    model: OpenAIModel, requests: Sequence[Request], sampling: Sampling, account: Account, on_progress: OnProgress
) -> list[Reply]:
    """Replies in the order of the requests. What was answered before, in any run, costs nothing.

    Raises:
        FatalEndpointError: a wrong key, an unknown model, no quota, a request the endpoint does not take.
        BudgetReached: the next request could pass a cap.
        TooManyFailures: more than `max_failed_share` of the requests stayed without an answer.
        UnknownPrice: the model needs a price.

    Whichever is raised, every answer that arrived is in the journal, and the same call goes on from there.
    """
    price = price_of(model.model, model.price)
    with Journal() as journal:
        call = _Call(model, requests, sampling, account, price, journal, on_progress)
        call.look_up()
        while call.missing:
            if model.mode == "batch" or batches_to_collect(journal, model, account.run_id, call.missing.keys()):
                missing = {key: requests[index] for key, index in call.missing.items()}
                Batches(model, missing, sampling, account, price and price.batched(), journal, on_progress).run()
                call.look_up()  # what the batches left unanswered goes the ordinary way
            if call.missing:
                try:
                    asyncio.run(call.ask())
                finally:
                    call.keep_the_rest()
        return call.finished()


@dataclass(slots=True)
class _Question:
    """A request on its way."""

    index: int  # in the call's requests
    wish: Wish
    attempts: int = 0
    lost: int = 0  # attempts that may have been billed without an answer
    claims: int = 1  # how many attempts money is set aside for
    sent_at: float = 0.0


@dataclass(slots=True)
class _Outcome:
    """A request at its end: an answer, or why there is none."""

    question: _Question
    answer: Answer | None
    error: str | None = None


class _Call:
    """One `answer_all` while it runs."""

    def __init__(
        self,
        model: OpenAIModel,
        requests: Sequence[Request],
        sampling: Sampling,
        account: Account,
        price: Price | None,
        journal: Journal,
        on_progress: OnProgress,
    ):
        self.model, self.requests, self.sampling, self.account = model, requests, sampling, account
        self.price, self.journal, self.on_progress = price, journal, on_progress
        self.replies: list[Reply | None] = [None] * len(requests)
        self.missing: dict[str, int] = {}  # key -> index of the request
        self.twins: list[tuple[int, int]] = []  # (index, index of an equal request before it)
        self.failures: Counter[str] = Counter()
        self.error: BaseException | None = None
        self.feeder: asyncio.Task[None] | None = None
        self.workers: list[asyncio.Task[None]] = []
        self.flying: set[asyncio.Task[None]] = set()  # workers whose request is with the endpoint: not to be disturbed
        self.outcomes: list[_Outcome] = []  # not yet durable
        self.usd = 0.0
        self.done = self.found = self.elsewhere = self.set_aside = 0
        self.reported_at = 0.0

    # --- before and after -------------------------------------------------------------------------------------------

    def look_up(self) -> None:
        """Fill in the replies that the journal has; what has none then is `missing`."""
        key_of_request = keyer(self.model, self.sampling)
        self.twins = []
        firsts: dict[str, int] = {}
        for start in range(0, len(self.requests), KEYS_AT_ONCE):
            part = range(start, min(start + KEYS_AT_ONCE, len(self.requests)))
            keys = {index: key_of_request(self.requests[index]) for index in part}
            found = self.journal.find(keys.values())
            for index, key in keys.items():
                if key in found:
                    self.found += self.replies[index] is None
                    self.replies[index] = reply_of(self.requests[index].id, found[key])
                elif key in firsts:
                    self.twins.append((index, firsts[key]))
                else:
                    firsts[key] = index
        self._look_for_missing(firsts)

    def _look_for_missing(self, among: Mapping[str, int]) -> None:
        self.missing = {key: index for key, index in among.items() if self.replies[index] is None}
        self.done = sum(reply is not None for reply in self.replies)

    def finished(self) -> list[Reply]:
        """All replies, once nothing is missing any more."""
        for index, first in self.twins:
            original = self.replies[first]
            assert original is not None
            self.replies[index] = replace(original, id=self.requests[index].id)
        replies = [reply for reply in self.replies if reply is not None]
        assert len(replies) == len(self.requests)
        self.on_progress(len(replies), len(replies), self.figures())
        return replies

    def figures(self) -> dict[str, Any]:
        """What is worth showing while it runs."""
        shown: dict[str, Any] = {"usd": round(self.usd, 6)}
        if self.found:
            shown["from journal"] = self.found
        if self.failures:
            shown["failed"] = self.failures.total()
        if self.elsewhere:
            shown["asked by another run"] = self.elsewhere
        if self.set_aside:
            shown["waiting under the cap for other requests of this run"] = self.set_aside
        return shown

    def keep_the_rest(self) -> None:
        """Make durable what there was no time for before the loop of events ended."""
        self.journal.add(*self._to_be_kept(self.outcomes))
        self.outcomes = []

    # --- the call ---------------------------------------------------------------------------------------------------

    async def ask(self) -> None:
        """Ask for what is missing, and return when every answer is durable.

        What is missing still is with a batch that another process has handed in meanwhile.
        """
        work = asyncio.ensure_future(self._ask())
        with _terminated_by_signal(asyncio.current_task()) as terminated:
            try:
                await asyncio.shield(work)
            except asyncio.CancelledError:
                self.stop(asyncio.CancelledError())
                patience = TERMINATED_SECONDS if terminated else DRAIN_SECONDS
                if self.flying:
                    _tell_of_the_last(len(self.flying), patience, by_hand=not terminated)
                await asyncio.wait([work], timeout=patience)
                work.cancel()
                await asyncio.wait([work])
                self.keep_the_rest()
                self.journal.let_go()  # the signal may end this process before the journal is closed
                raise
        self._look_for_missing(self.missing)

    async def _ask(self) -> None:
        self.throttle, self.gate = Throttle(self.model.max_concurrency), Gate()
        self.requests_pace, self.tokens_pace = Pace(self.model.requests_per_minute), Pace(self.model.tokens_per_minute)
        self.queue: asyncio.Queue[_Question | None] = asyncio.Queue()
        self.unsettled = 0  # claimed, and not yet durable
        self.waiting = 0  # of these: for money to be asked again
        self.settled, self.arrived = asyncio.Event(), asyncio.Event()
        self.closing = False
        self.retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception(self._worth_another_try),
            wait=self._wait,
            stop=tenacity.stop_before_delay(self.model.deadline),
            reraise=True,
        )
        dialect = known_dialect(self.journal, self.model)
        with ThreadPoolExecutor(1, "journal") as self.thread:
            async with connected(self.model, self.sampling, dialect, self._remember) as self.connection:
                await self._run_tasks()
        if self.error is not None:
            raise self.error

    async def _run_tasks(self) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                writer = group.create_task(self._write())
                self.feeder = group.create_task(self._feed())
                count = min(self.model.max_concurrency, len(self.missing))
                self.workers = [group.create_task(self._work()) for _ in range(count)]
                await asyncio.wait([self.feeder, *self.workers])
                self.closing = True
                self.arrived.set()
                await writer
        except BaseExceptionGroup as group_error:  # a fault of ours, or of the disk: one is enough to be told
            raise group_error.exceptions[0] from None

    def stop(self, error: BaseException) -> None:
        """Send nothing more. What is with the endpoint is paid for: it is awaited and kept."""
        if self.error is None:
            self.error = error
            here = asyncio.current_task()
            for task in (self.feeder, *self.workers):
                if task and task is not here and task not in self.flying:
                    task.cancel()

    async def _in_thread(self, function: Callable[..., T], *args: Any) -> T:
        """What the function gives. Once asked for it is done, though nobody may wait for it any more."""
        return await asyncio.shield(asyncio.get_running_loop().run_in_executor(self.thread, function, *args))

    async def _remember(self, dialect: Dialect) -> None:
        await self._in_thread(remember_dialect, self.journal, self.model, dialect)

    # --- the feeder -------------------------------------------------------------------------------------------------

    async def _feed(self) -> None:
        """Claim what is missing, group by group, just ahead of the workers."""
        fresh = (
            _Question(index, wish_of(key, self.requests[index], self.sampling, self.price))
            for key, index in self.missing.items()
        )
        ready: deque[_Question] = deque()  # to be claimed, in order
        elsewhere: deque[_Question] = deque()  # another process is asking
        ahead = 2 * self.model.max_concurrency
        looked_at = time.monotonic()
        while self.error is None:
            ready.extend(islice(fresh, max(0, ahead - len(ready))))
            self.elsewhere = len(elsewhere)
            if elsewhere and (not ready or time.monotonic() - looked_at > POLL_SECONDS):
                if not ready:
                    if await self._are_in_batches(elsewhere):
                        break  # whoever handed them in may be gone: we collect them
                    self._report()
                    await asyncio.sleep(POLL_SECONDS)
                looked_at = time.monotonic()
                ready.extendleft(reversed(elsewhere))
                elsewhere.clear()
            if not ready:
                break
            while (room := ahead - self.unsettled) < min(len(ready), self.model.max_concurrency // 2 + 1):
                await self._until_settled()
            group = [ready.popleft() for _ in range(min(room, len(ready)))]
            try:
                claimed = await self._claim([question.wish for question in group])
            except StorageError as error:
                return self.stop(error)
            waiting, refused = self._dealt(group, claimed)
            elsewhere.extend(waiting)
            ready.extendleft(reversed(refused))
            if claimed.over and not claimed.granted:
                if claimed.over.reserved.requests == 0:
                    self.stop(budget_reached(claimed.over, refused[0].wish))
                    break
                if self.unsettled == 0:  # of another process, or of a batch that nobody has collected yet
                    self.set_aside = claimed.over.reserved.requests
                    self._report()
                await self._until_settled(POLL_SECONDS)
            self.set_aside = 0
        for _ in self.workers:
            self.queue.put_nowait(None)

    def _dealt(self, group: list[_Question], claimed: Claimed) -> tuple[list[_Question], list[_Question]]:
        """Hand to the workers what was granted and fill in what was answered; what another process asks, and what no cap
        has room for."""
        elsewhere, refused = [], []
        for question in group:
            key = question.wish.key
            if key in claimed.granted:
                self.unsettled += 1
                self.queue.put_nowait(question)
            elif key in claimed.answered:
                self.replies[question.index] = reply_of(self.requests[question.index].id, claimed.answered[key])
                self.done += 1
            elif key in claimed.elsewhere:
                elsewhere.append(question)
            else:
                refused.append(question)
        return elsewhere, refused

    async def _claim(self, wishes: list[Wish]) -> Claimed:
        account = self.account
        sent = partial(self.journal.claim, iteration=account.iteration, model=self.model.model)
        return await self._in_thread(sent, account.run_id, account.role, wishes, account.caps())

    async def _are_in_batches(self, questions: Iterable[_Question]) -> bool:
        keys = [question.wish.key for question in questions]
        sought = self.journal, self.model, self.account.run_id, keys
        return bool(await self._in_thread(batches_to_collect, *sought))

    async def _until_settled(self, seconds: float | None = None) -> None:
        self.settled.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.settled.wait()

    # --- a worker ---------------------------------------------------------------------------------------------------

    async def _work(self) -> None:
        while self.error is None and (question := await self.queue.get()):
            try:
                self._settle(_Outcome(question, await self._answered(question)))
            except (TransientError, RequestFailed) as error:
                self._settle(_Outcome(question, None, str(error)))
            except asyncio.CancelledError:  # stopped between two attempts: the first may have cost something
                self._settle(_Outcome(question, None, "stopped"))
                raise
            except (ModelError, StorageError) as error:
                self._settle(_Outcome(question, None, str(error)))
                self.stop(error)

    async def _answered(self, question: _Question) -> Answer:
        """The answer, at the first attempt or, from its failure on, at as many as tenacity lets us make.

        Most requests succeed at once, and tenacity's setting up would be a twentieth of all our work.
        """
        try:
            return await self._attempt(question)
        except TransientError as error:
            failed = [error]

        async def again() -> Answer:
            if failed:
                raise failed.pop()
            return await self._attempt(question)

        return await self.retrying.copy()(again)

    def _settle(self, outcome: _Outcome) -> None:
        self.outcomes.append(outcome)
        self.arrived.set()

    def _worth_another_try(self, error: BaseException) -> bool:
        return isinstance(error, TransientError) and self.error is None

    def _wait(self, state: tenacity.RetryCallState) -> float:
        """Back-off with jitter, and never less than the endpoint asks for."""
        error = state.outcome.exception() if state.outcome else None
        assert isinstance(error, TransientError)
        if error.reworded:
            return 0
        asked = error.wait
        backoff = tenacity.wait_random_exponential(multiplier=FIRST_BACKOFF, max=LONGEST_BACKOFF)(state)
        return backoff if asked is None else asked + min(backoff, 1 + asked / 4)

    async def _attempt(self, question: _Question) -> Answer:
        """Send a request once."""
        if question.lost == question.claims:
            await self._set_aside_again(question)
        await self.requests_pace.take(1)
        await self.tokens_pace.take(question.wish.tokens)
        await self.throttle.acquire()
        await self.gate.passed()  # last: it may have closed for those who waited for the others
        question.attempts += 1
        question.sent_at = time.monotonic()
        used = 0
        try:
            heard = await self._exchange(question)
            used = heard.usage.prompt_tokens + heard.usage.completion_tokens
            self.throttle.speed_up()
            return self._answer(question, heard)
        except TransientError as error:
            question.lost += error.maybe_billed
            if question.lost == MOST_LOST:
                raise RequestFailed(f"{error}, {MOST_LOST} times, and each may be billed") from None
            if error.hurried:
                self.throttle.slow_down(question.sent_at)
                self.gate.close_for(min(error.wait or 0, self.model.deadline))
            raise
        except asyncio.CancelledError:  # while it was with the endpoint
            question.lost += 1
            raise
        finally:
            self.throttle.release()
            self.tokens_pace.give_back(question.wish.tokens - used)

    async def _set_aside_again(self, question: _Question) -> None:
        """Ask for as much as was reserved again, as the last attempt may have used it up. What others that are under
        way may still leave of theirs is waited for."""
        self.waiting += 1
        try:
            while over := (await self._claim([question.wish])).over:
                if self.waiting >= min(self.unsettled, len(self.workers)):
                    raise budget_reached(over, question.wish)
                await self._until_settled(POLL_SECONDS)
            question.claims += 1
        finally:
            self.waiting -= 1

    async def _exchange(self, question: _Question) -> Said:
        here = asyncio.current_task()
        assert here is not None
        self.flying.add(here)
        try:
            return await self.connection.send(self.requests[question.index], question.wish)
        finally:
            self.flying.discard(here)

    def _answer(self, question: _Question, heard: Said) -> Answer:
        return answer_of(
            heard,
            key=question.wish.key,
            run_id=self.account.run_id,
            role=self.account.role,
            iteration=self.account.iteration,
            model=self.model,
            price=self.price,
            latency_seconds=round(time.monotonic() - question.sent_at, 4),
            attempts=question.attempts,
        )

    # --- the writer -------------------------------------------------------------------------------------------------

    async def _write(self) -> None:
        """Make what arrived durable, then visible."""
        while not (self.closing and not self.outcomes):
            await self.arrived.wait()
            if not self.closing:
                await asyncio.sleep(COMMIT_SECONDS)
                self.arrived.clear()
            group, self.outcomes = self.outcomes, []
            try:
                await self._in_thread(self.journal.add, *self._to_be_kept(group))
            except StorageError as error:  # tried once more when all that is under way has arrived
                self.outcomes = group + self.outcomes
                return self.stop(error)
            self.unsettled -= len(group)
            for outcome in group:
                self._show(outcome)
            self.settled.set()
            self._report()
            allowed = self.model.max_failed_share
            if self.failures.total() > allowed * len(self.requests):
                reasons = dict(self.failures)
                self.stop(TooManyFailures(self.failures.total(), len(self.requests), allowed, reasons))

    def _to_be_kept(self, group: list[_Outcome]) -> tuple[list[Answer], list[Loss], list[str]]:
        """Answers, losses and the claims to let go of."""
        answers = [outcome.answer for outcome in group if outcome.answer]
        losses = [self._loss(outcome.question) for outcome in group if outcome.question.lost]
        return answers, losses, [outcome.question.wish.key for outcome in group if not outcome.answer]

    def _report(self) -> None:
        if time.monotonic() - self.reported_at > PROGRESS_SECONDS:
            self.reported_at = time.monotonic()
            self.on_progress(self.done, len(self.requests), self.figures())

    def _loss(self, question: _Question) -> Loss:
        account, wish = self.account, question.wish
        return Loss(
            run_id=account.run_id,
            role=account.role,
            iteration=account.iteration,
            model=self.model.model,
            tokens=wish.tokens * question.lost,
            usd=wish.usd * question.lost,
            created=now(),
            requests=question.lost,
        )

    def _show(self, outcome: _Outcome) -> None:
        index, answer = outcome.question.index, outcome.answer
        id = self.requests[index].id
        self.done += 1
        if answer:
            self.replies[index] = reply_of(id, answer)
            self.usd += answer.cost_usd or 0
        elif self.error is None:
            self.replies[index] = Reply(id, Status.FAILED, None, model=self.model.model, error=outcome.error)
            self.failures[outcome.error or ""] += 1


def _tell_of_the_last(count: int, seconds: float, by_hand: bool) -> None:
    """Who has pressed Ctrl-C and hears nothing presses it again, and gives up what is paid for."""
    again = " Ctrl-C again gives them up." if by_hand else ""
    print(
        f"\n  Stopping. Answers under way, to be paid for: {count}. They are waited for, {seconds:g} s at most.{again}",
        file=sys.stderr,
        flush=True,
    )


@contextlib.contextmanager
def _terminated_by_signal(work: asyncio.Task[None] | None) -> Iterator[list[int]]:
    """While the block runs, SIGTERM cancels `work`; afterwards it does what it did before, if it came at all.

    Gives a list that is empty until the signal comes. Without effect outside of the main thread, which alone
    gets signals.
    """
    came: list[int] = []
    if work is None or threading.current_thread() is not threading.main_thread():
        yield came
        return

    def terminate() -> None:
        came.append(signal.SIGTERM)
        work.cancel()

    loop, before = asyncio.get_running_loop(), signal.getsignal(signal.SIGTERM)
    loop.add_signal_handler(signal.SIGTERM, terminate)
    try:
        yield came
    finally:
        loop.remove_signal_handler(signal.SIGTERM)
        signal.signal(signal.SIGTERM, before)
        if came:
            signal.raise_signal(signal.SIGTERM)
