"""Asks by the Batch API: cheaper, and done within a day. Leaves the answers in the journal and returns nothing.

A batch is written down *before* it is handed in, with a token that goes along as its metadata. So whenever the
process dies, the next one finds the batch at the endpoint by its token and waits for it; the batch itself holds
the claims on its requests, and nobody asks them a second time meanwhile. Rows that a batch leaves unanswered go
into another one, a few times; what is unanswered then, or at the deadline, is the caller's.
"""

import io
import json
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any, TypeVar

import httpx2
import openai
import tenacity

from storage.files import locked
from storage.journal import Answer, Batch, Journal, Wish, now
from tasks.models.budget import Account, budget_reached
from tasks.models.chat import OnProgress, Request, Sampling
from tasks.models.endpoint import OpenAIModel, fatal, secrets_of
from tasks.models.errors import FatalEndpointError, ModelError, TransientError, Unreachable, scrubbed
from tasks.models.exchange import client_of
from tasks.models.pacing import asked_wait
from tasks.models.prices import Price
from tasks.models.wire import (
    FILTERED,
    answer_of,
    body_of,
    code_of,
    failure,
    is_filtered,
    known_dialect,
    narrower,
    remember_dialect,
    said,
    wish_of,
    words_of,
)

MAX_ROWS, MAX_BYTES = 50_000, 200_000_000  # of one batch, as OpenAI publishes them
MAX_ROUNDS = 3  # how often a row goes into a batch
CANCEL_SECONDS = 900  # an endpoint may take ten minutes to stop a batch
ANSWERS_AT_ONCE = 500
TOKEN = "lion_token"
ENDED = {"completed", "failed", "expired", "cancelled"}

T = TypeVar("T")


def batches_to_collect(journal: Journal, model: OpenAIModel, run_id: str, keys: Collection[str]) -> list[Batch]:
    """Batches that are out and have to do with a call: with a request of it, or with what its run may still spend.

    The latter is where a run that was cut off goes on with other prompts: nobody asks for that batch's answers any more,
    and what it holds under the run's caps would never be free again.
    """
    out = journal.open_batches(model.base_url, model.model)
    return [batch for batch in out if batch.run_id == run_id or not set(batch.keys).isdisjoint(keys)]


class Batches:
    """Requests of one call that go by batches.

    Args:
        requests: by key, none of them answered yet.
        price: by the Batch API.
    """

    def __init__(
        self,
        model: OpenAIModel,
        requests: Mapping[str, Request],
        sampling: Sampling,
        account: Account,
        price: Price | None,
        journal: Journal,
        on_progress: OnProgress,
    ):
        self.model, self.requests, self.sampling, self.account = model, requests, sampling, account
        self.price, self.journal, self.on_progress = price, journal, on_progress
        self.secrets = secrets_of(model)
        self.client = client_of(model, model.timeout)
        self.deadline = time.monotonic() + model.batch_deadline
        self.wishes = {key: wish_of(key, request, sampling, price) for key, request in requests.items()}
        self.rounds = dict.fromkeys(requests, 0)
        self.most_rows = MAX_ROWS  # of a batch; fewer, and one batch at a time, where the queue has no room
        self.answered: set[str] = set()

    def run(self) -> None:
        """Wait for the batches that are out, hand in the rest, until nothing is left or time is up.

        Where the settings ask for batches no longer, those that are out are waited for all the same: they are paid for.

        Raises:
            FatalEndpointError: the endpoint does not take the batch.
            BudgetReached: the next request could pass a cap. Batches under way are collected first.
        """
        with self.client:
            out = self._resumed()
            while time.monotonic() < self.deadline:
                if self.model.mode == "batch":
                    out += self._submitted({key for batch in out for key in batch.keys})
                if not (out := out or self._resumed()):  # another process may have handed in what we could not
                    break
                out = [batch for batch in out if not self._collected(batch)]
                self._report("batches" if self.most_rows == MAX_ROWS else f"batches of {self.most_rows:,}", len(out))
                if out:
                    time.sleep(min(self.model.batch_poll, max(0.0, self.deadline - time.monotonic())))
            self._cancel(out)
            if left := len(self.requests.keys() - self.answered):
                self._report("go by ordinary requests", left)

    def _report(self, what: str, count: int) -> None:
        done = len(self.requests.keys() & self.answered)  # a batch of another run may have answered others, too
        self.on_progress(done, len(self.requests), {what: count})

    # --- handing in -------------------------------------------------------------------------------------------------

    def _resumed(self) -> list[Batch]:
        """Batches of ours that an earlier process handed in."""
        with locked("batches"):  # so that nobody is just handing one in
            found = []
            for batch in batches_to_collect(self.journal, self.model, self.account.run_id, self.requests.keys()):
                if batch.batch_id is None and (there := self._at_endpoint(batch.token)):
                    batch = replace(batch, batch_id=there, state="open")
                    self.journal.keep_batch(batch)
                if batch.batch_id is None:  # it was written down and never handed in
                    self.journal.keep_batch(replace(batch, state="collected"))
                else:
                    found.append(batch)
            return found

    def _submitted(self, under_way: set[str]) -> list[Batch]:
        """Hand in what is neither answered nor under way, as far as the caps allow."""
        waiting = [
            key
            for key in self.requests
            if key not in self.answered and key not in under_way and self.rounds[key] < MAX_ROUNDS
        ]
        if self.most_rows < MAX_ROWS:
            waiting = [] if under_way else waiting[: self.most_rows]
        if not waiting:
            return []
        with locked("batches"):
            account, wishes = self.account, [self.wishes[key] for key in waiting]
            claimed = self.journal.claim(
                account.run_id, account.role, wishes, account.caps(), iteration=account.iteration
            )
            self.answered |= claimed.answered.keys()
            granted = [key for key in waiting if key in claimed.granted]
            if claimed.over and not granted and not under_way and claimed.over.reserved.requests == 0:
                refused = next(k for k in waiting if k not in claimed.answered and k not in claimed.elsewhere)
                raise budget_reached(claimed.over, self.wishes[refused])
            return [self._hand_in(keys, data) for keys, data in self._files(granted)]

    def _files(self, keys: list[str]) -> Iterator[tuple[tuple[str, ...], bytes]]:
        """The rows of batches, split at the limits of one."""
        dialect = known_dialect(self.journal, self.model)
        taken: list[str] = []
        data = io.BytesIO()
        for key in keys:
            body = body_of(self.model, self.sampling, self.requests[key], dialect)
            row = {"custom_id": key, "method": "POST", "url": "/v1/chat/completions", "body": body}
            line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
            if taken and (len(taken) == MAX_ROWS or data.tell() + len(line) > MAX_BYTES):
                yield tuple(taken), data.getvalue()
                taken, data = [], io.BytesIO()
            taken.append(key)
            data.write(line)
        if taken:
            yield tuple(taken), data.getvalue()

    def _hand_in(self, keys: tuple[str, ...], data: bytes) -> Batch:
        account, token = self.account, uuid.uuid4().hex
        batch = Batch(
            token, None, "creating", account.run_id, account.role, self.model.base_url, self.model.model, keys, now()
        )
        self.journal.keep_batch(batch)
        for key in keys:
            self.rounds[key] += 1
        try:
            file = self._patiently(lambda: self.client.files.create(file=(f"{token}.jsonl", data), purpose="batch"))
            batch_id = self._patiently(lambda: self._at_endpoint(token) or self._create(file.id, token))
        except Unreachable:  # it may be there: the next run looks for it by its token
            raise
        except FatalEndpointError:
            self.journal.keep_batch(replace(batch, state="collected"))
            raise
        batch = replace(batch, batch_id=batch_id, state="open")
        self.journal.keep_batch(batch)
        return batch

    def _create(self, file_id: str, token: str) -> str:
        return self.client.batches.create(
            input_file_id=file_id, endpoint="/v1/chat/completions", completion_window="24h", metadata={TOKEN: token}
        ).id

    def _at_endpoint(self, token: str) -> str | None:
        """The id of the batch that carries our token, if the endpoint has it."""

        def look() -> str | None:
            batches = self.client.batches.list(limit=100)
            return next((batch.id for batch in batches if (batch.metadata or {}).get(TOKEN) == token), None)

        return self._patiently(look)

    # --- collecting -------------------------------------------------------------------------------------------------

    def _collected(self, batch: Batch) -> bool:
        """Whether the batch has ended; its answers are then in the journal and its claims are gone."""
        name = f"the batch {batch.batch_id} of {len(batch.keys)} requests"
        there = self._patiently(_if_there, self.client.batches.retrieve, batch.batch_id)
        if there is None:
            self._give_up(batch, name)
            return True
        if there.status not in ENDED:
            return False
        silent = set(batch.keys)
        for file_id in filter(None, (there.output_file_id, there.error_file_id)):
            rows = self._patiently(_if_there, self._rows_of, file_id)
            if rows is None:
                self._give_up(batch, f"a file of {name}")
                return True
            self._keep(batch, rows)
            silent -= {row["custom_id"] for row in rows}
        if there.status == "completed":  # each request has a row there; without it nobody knows what it cost
            self.journal.lose(batch, silent)
        self.journal.keep_batch(replace(batch, state="collected"))
        if there.status == "failed":
            errors = there.errors.data if there.errors and there.errors.data else []
            if len(batch.keys) > 1 and any("enqueued" in str(error.message).lower() for error in errors):
                self._take_fewer(batch)
                return True
            reason = "; ".join(str(error.message) for error in errors[:3]) or "no reason given"
            told = f"the batch {there.id} was refused ({scrubbed(reason, *self.secrets)})"
            raise fatal(self.model, told, "Use mode: online")
        return True

    def _take_fewer(self, batch: Batch) -> None:
        """Hand in half as many rows from now on: an endpoint takes so many prompt tokens at a time as the account may
        have in its queue (OpenAI's first tier: 2 million of a small model)."""
        self.most_rows = len(batch.keys) // 2
        for key in self.rounds.keys() & set(batch.keys):
            self.rounds[key] -= 1

    def _rows_of(self, file_id: str) -> list[dict[str, Any]]:
        """The rows of a file. One without our name for the request is nobody's, and no reason to lose the others."""
        lines = self.client.files.content(file_id).content.splitlines()
        rows = [json.loads(line) for line in lines if line.strip()]
        return [row for row in rows if isinstance(row, dict) and isinstance(row.get("custom_id"), str)]

    def _give_up(self, batch: Batch, gone: str) -> None:
        """Let go of a batch that the endpoint does not know, if the settings say so; what it leaves open counts as lost."""
        if not self.model.give_up_batches:
            raise fatal(
                self.model,
                f"{gone} is not there any more",
                "Use the key that it was handed in with; or set give_up_batches: true to ask them again, which may be "
                "billed a second time",
            )
        self.journal.lose(batch, batch.keys)
        self.journal.keep_batch(replace(batch, state="collected"))

    def _keep(self, batch: Batch, rows: list[dict[str, Any]]) -> None:
        answers: list[Answer] = []
        lost: list[str] = []
        refused: list[tuple[str, int, dict[str, Any]]] = []
        held = self.journal.held_by(batch)
        for row in rows:
            status = _response_in(row).get("status_code")
            if answer := self._answer(batch, row, held):
                answers.append(answer)
            elif status == 200:  # billed, and no answer in it
                lost.append(row["custom_id"])
            elif status in (400, 422) and row["custom_id"] in self.requests:  # whatever it is
                refused.append((row["custom_id"], status, _error_in(row["response"].get("body"))))
        for start in range(0, len(answers), ANSWERS_AT_ONCE):
            self.journal.add(answers[start : start + ANSWERS_AT_ONCE])
        self.journal.lose(batch, lost)
        self.answered |= {answer.key for answer in answers}
        self._understand(refused)

    def _understand(self, refused: list[tuple[str, int, dict[str, Any]]]) -> None:
        """Rows that the endpoint will never take: ask them in another dialect where that helps; else no batch does."""
        dialect = known_dialect(self.journal, self.model)
        for key, status, error in refused:
            body = body_of(self.model, self.sampling, self.requests[key], dialect)
            message = scrubbed(str(error.get("message") or ""), *self.secrets)
            if found := narrower(dialect, status, message, body):
                remember_dialect(self.journal, self.model, found)
                self.rounds[key] -= 1
            else:
                self.rounds[key] = MAX_ROUNDS  # an ordinary request will say why

    def _answer(self, batch: Batch, row: dict[str, Any], held: Mapping[str, Wish]) -> Answer | None:
        """A row of a batch's files as an answer, if it is one."""
        key, response = row["custom_id"], _response_in(row)
        body = response.get("body")
        if response.get("status_code") == 200:
            try:
                heard = said(body, held.get(key) or Wish(key, self.sampling.max_tokens, 0), self.sampling)
            except TransientError:
                return None
        elif is_filtered(_error_in(body).get("code"), _error_in(body).get("message")):
            heard = FILTERED
        else:
            return None
        return answer_of(
            heard,
            key=key,
            run_id=batch.run_id,
            role=batch.role,
            iteration=self.account.iteration,
            model=self.model,
            price=self.price,
            latency_seconds=0,
            attempts=self.rounds.get(key) or 1,
        )

    def _cancel(self, out: list[Batch]) -> None:
        """Stop what is still out: its rows go by ordinary requests, and are not to be paid here as well."""
        for batch in out:
            self._patiently(_stop_unless_over, self.client.batches.cancel, batch.batch_id)
        give_up = time.monotonic() + CANCEL_SECONDS
        while out := [batch for batch in out if not self._collected(batch)]:
            if time.monotonic() > give_up:
                ids = ", ".join(str(batch.batch_id) for batch in out)
                raise fatal(
                    self.model, f"the batches {ids} do not stop", "Run the same command later: it finds them again"
                )
            time.sleep(min(self.model.batch_poll, 10))

    # --- talking ----------------------------------------------------------------------------------------------------

    def _patiently(self, ask: Callable[..., T], *args: Any) -> T:
        """The endpoint's answer to `ask(*args)`, asked for again while it may still come."""
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(TransientError),
            wait=tenacity.wait_random_exponential(multiplier=0.5, max=30),
            stop=tenacity.stop_before_delay(self.model.deadline),
            reraise=True,
        )
        try:
            return retrying(self._once, ask, *args)
        except TransientError as error:
            way_out = "Run the same command later: batches under way are found again"
            trouble = Unreachable(self.model.base_url, self.model.model, str(error), way_out)
        raise trouble

    def _once(self, ask: Callable[..., T], *args: Any) -> T:
        trouble: ModelError  # raised outside of the handlers: the SDK's errors know the key
        try:
            return ask(*args)
        except openai.APIStatusError as error:
            code, wait = code_of(error), asked_wait(error.response.headers)
            trouble = failure(self.model, error.status_code, code, words_of(error, self.secrets), wait)
        except (openai.APIConnectionError, httpx2.HTTPError, OSError) as error:
            trouble = TransientError(f"the connection broke ({type(error).__name__})")
        except ValueError:
            trouble = TransientError("a file that is not JSON, or not the whole of it")
        raise trouble


def _if_there(ask: Callable[[str], T], id: str) -> T | None:
    """What is asked for, null where the endpoint does not know it."""
    try:
        return ask(id)
    except openai.NotFoundError:
        return None


def _stop_unless_over(stop: Callable[[str], object], id: str) -> None:
    """Stop a batch. One that has ended since it was looked at is none to be stopped, and endpoints say so by 409 or 400."""
    with suppress(openai.ConflictError, openai.BadRequestError):
        stop(id)


def _response_in(row: dict[str, Any]) -> dict[str, Any]:
    """What a row got for a reply; nothing where it is null, or a gateway's text."""
    response = row.get("response")
    return response if isinstance(response, dict) else {}


def _error_in(body: Any) -> dict[str, Any]:
    """What a row's body says went wrong. Some servers put text where the API has an object."""
    error = body.get("error") if isinstance(body, dict) else body
    return error if isinstance(error, dict) else {"message": str(error or "")}
