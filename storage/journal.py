"""Every paid answer, durable before it is used, and who is asking for what right now.

All runs of a home share one journal: a request that was answered is found by the digest of what was asked and
is never paid for again. A request that is being asked is *claimed*, with the most it may cost, in the same
transaction that looks at the budget. So two processes never pay for the same thing, and together they never
pass a cap. A claim belongs to an open `Journal`, which holds a file lock: the kernel lets go of it when the
process dies, however it dies. Its claims are then worth nothing, and count as money that may be gone.

Knows nothing of endpoints, prompts or prices: the caller makes the digests and the dollars. That this is
SQLite is nobody's business outside this file.

    sqlite3 .lion/journal.sqlite "select role, sum(usd) from spend group by role"
"""

import json
import sqlite3
import threading
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import astuple, dataclass, field, fields, replace
from datetime import UTC, datetime
from operator import attrgetter
from types import TracebackType
from typing import Any, Self

from storage.files import StorageError, home, is_locked, lock_file, locked

_BATCH = "batch "  # what the name of a batch begins with where it holds claims
BUSY_SECONDS = 60  # how long one process waits for another's transaction; each takes milliseconds


@dataclass(frozen=True, slots=True)
class Answer:
    """One answered request, as it is kept for ever."""

    key: str  # digest of what was asked: endpoint, model, messages, sampling, schema, extra fields, draw
    run_id: str  # the run that paid
    role: str
    iteration: int
    endpoint: str
    model: str  # as asked for
    model_returned: str  # as the endpoint names what answered
    text: str | None
    status: str  # ok, truncated, filtered, refused or empty: all were billed. A failure is no answer.
    finish_reason: str | None
    prompt_tokens: int
    cached_tokens: int  # of the prompt's
    completion_tokens: int
    cost_usd: float | None  # null where the model is free
    price: str | None  # the price row it was reckoned with, as JSON
    latency_seconds: float
    attempts: int
    created: str  # UTC, ISO 8601


@dataclass(frozen=True, slots=True)
class Loss:
    """Money that may be gone without an answer: a reply cut off on its way is billed by some endpoints.

    It is reckoned at the most it can be, counts towards the caps, and is reported apart from what is known.
    """

    run_id: str
    role: str
    iteration: int
    model: str
    tokens: int
    usd: float
    created: str
    requests: int = 1


@dataclass(frozen=True, slots=True)
class Wish:
    """A request that somebody wants to send, with the most that it can use."""

    key: str
    tokens: int
    usd: float


@dataclass(frozen=True, slots=True)
class Cap:
    """What a run, or one role of it, may spend at most. Null is no limit."""

    role: str | None = None  # null: the whole run
    max_usd: float | None = None
    max_requests: int | None = None
    max_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Totals:
    """What has been spent, or what may still be spent by requests under way."""

    usd: float = 0.0
    requests: int = 0
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class Over:
    """Why a wish was not granted: the cap that it would pass, and what stands against it."""

    cap: Cap
    what: str  # usd, requests or tokens: which of the cap's limits
    spent: Totals
    reserved: Totals  # by requests under way, of any process; it shrinks as they are answered


@dataclass(slots=True)
class Claimed:
    """What came of a group of wishes. A wish found in none of the sets was not granted: see `over`."""

    granted: set[str] = field(default_factory=set)
    answered: dict[str, Answer] = field(default_factory=dict)  # by somebody else, since it was looked up
    elsewhere: set[str] = field(default_factory=set)  # another process is asking just now
    over: Over | None = None


@dataclass(frozen=True, slots=True)
class Spent:
    """A row of `spend`: what one role spent on one model on one day."""

    run_id: str
    role: str
    iteration: int
    model: str
    day: str
    requests: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    usd: float
    lost_requests: int  # sent, perhaps billed, never answered
    lost_tokens: int
    lost_usd: float


@dataclass(frozen=True, slots=True)
class Batch:
    """Requests handed to an endpoint together. The batch holds their claims, so they outlive the process."""

    token: str  # ours, sent along with the batch, so that it is found again after a crash at the wrong moment
    batch_id: str | None  # the endpoint's, null while it is being handed in
    state: str  # creating, open, collected
    run_id: str
    role: str
    endpoint: str
    model: str
    keys: tuple[str, ...]
    created: str

    @property
    def owner(self) -> str:
        """The name under which it holds claims."""
        return f"{_BATCH}{self.token}"


def now() -> str:
    """The time, as the journal writes it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class Journal:
    """The journal of a home. Open one for each call; close it, or leave its `with`, to let go of its claims.

    Whatever is asked of it raises StorageError where its file cannot be read or written; what was written before stays.
    """

    def __init__(self) -> None:
        """Open the journal of the home, and bring its schema up to date.

        Raises:
            StorageError: it cannot be used, or a newer version wrote it.
        """
        self.path = home() / "journal.sqlite"
        self._owner = uuid.uuid4().hex
        self._alive = ExitStack()  # holds our lock while this journal is open
        self._alive.enter_context(locked(_lock_of(self._owner)))
        self._is_written = True  # what the last transaction was to write
        self._thread = threading.RLock()  # one connection, whichever thread asks
        self._db = sqlite3.connect(self.path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        try:
            with locked("journal-opening"):  # SQLite does not queue for what follows
                self._db.execute("PRAGMA synchronous=FULL")  # a commit is on the disk when it returns
                self._db.execute("PRAGMA journal_mode=WAL")  # readers and a writer do not wait for each other
                self._migrate()
                with self._writing() as db:
                    self._drop_claims_of_the_dead(db)
        except sqlite3.DatabaseError as error:
            raise self._unusable(error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def let_go(self) -> None:
        """Let go of all claims: none of these requests is under way any more."""
        with self._writing() as db:
            db.execute("DELETE FROM claims WHERE owner = ?", (self._owner,))

    def close(self) -> None:
        """Let go of all claims and close. Where the last write failed they stay behind, to be counted as lost."""
        with self._thread:
            try:
                if self._is_written:
                    self.let_go()
            finally:
                self._db.close()
                lock_file(_lock_of(self._owner)).unlink(missing_ok=True)
                self._alive.close()

    # --- answers -----------------------------------------------------------------------------------------------

    def find(self, keys: Iterable[str]) -> dict[str, Answer]:
        """The answers to those of `keys` that have one."""
        with self._reading():
            return self._find(list(keys))

    def add(self, answers: Sequence[Answer], losses: Sequence[Loss] = (), release: Sequence[str] = ()) -> None:
        """Make answers durable, in one transaction, with what they cost; let go of their claims.

        An answer that is there already stays as it is and costs nothing more.

        Args:
            answers: what arrived.
            losses: what may have been billed without an answer.
            release: keys of claims to let go of though there is no answer.
        """
        spent: dict[tuple[str, str, int, str, str], list[float]] = defaultdict(lambda: [0] * 8)
        with self._writing() as db:
            for answer in answers:
                if db.execute(_INSERT, _as_row(answer)).rowcount == 1:
                    day = (answer.run_id, answer.role, answer.iteration, answer.model, answer.created[:10])
                    tokens = (answer.prompt_tokens, answer.cached_tokens, answer.completion_tokens)
                    _add_to(spent[day], (1, *tokens, answer.cost_usd or 0.0, 0, 0, 0))
            for loss in losses:
                day = (loss.run_id, loss.role, loss.iteration, loss.model, loss.created[:10])
                _add_to(spent[day], (0, 0, 0, 0, 0, loss.requests, loss.tokens, loss.usd))
            db.executemany(_UPSERT_SPEND, [(*day, *figures) for day, figures in spent.items()])
            db.executemany("DELETE FROM claims WHERE key = ?", [(answer.key,) for answer in answers])
            db.executemany("DELETE FROM claims WHERE key = ? AND owner = ?", [(key, self._owner) for key in release])

    # --- claims: who is asking, and what it may cost ----------------------------------------------------------------

    def claim(
        self,
        run_id: str,
        role: str,
        wishes: Sequence[Wish],
        caps: Sequence[Cap],
        *,
        iteration: int = 0,
        model: str | None = None,
    ) -> Claimed:
        """Claim the right to send requests, as many of `wishes` in their order as the caps leave room for.

        A key that this journal has claimed already is claimed once more and the amounts add up: that is how a
        request whose first attempt may have been billed asks for room for a second.

        Args:
            model: which they are sent to from now on: if this process dies, nobody knows which were, and all count as
                lost. Null where nothing is sent yet, as before a batch is handed in.
        """
        result = Claimed()
        with self._writing() as db:
            self._drop_claims_of_the_dead(db)
            result.answered = self._find([wish.key for wish in wishes])
            keys = json.dumps([wish.key for wish in wishes])
            held = db.execute(f"SELECT key FROM claims WHERE owner != ? AND {_AMONG}", (self._owner, keys))
            result.elsewhere = {key for (key,) in held} - result.answered.keys()
            standing = [
                (cap, _totals(db, _SPENT, run_id, cap.role), _totals(db, _RESERVED, run_id, cap.role)) for cap in caps
            ]
            wanted = Totals()  # so far
            for wish in wishes:
                if wish.key in result.answered or wish.key in result.elsewhere:
                    continue
                wanted = Totals(wanted.usd + wish.usd, wanted.requests + 1, wanted.tokens + wish.tokens)
                result.over = _first_passed(standing, wanted)
                if result.over:
                    break
                result.granted.add(wish.key)
            granted = [wish for wish in wishes if wish.key in result.granted]
            rows = [(w.key, self._owner, run_id, role, iteration, model, w.tokens, w.usd) for w in granted]
            db.executemany(_UPSERT_CLAIM, rows)
        return result

    def _drop_claims_of_the_dead(self, db: sqlite3.Connection) -> None:
        owners = db.execute("SELECT DISTINCT owner FROM claims WHERE owner != ?", (self._owner,)).fetchall()
        for (owner,) in owners:
            if not owner.startswith(_BATCH) and not is_locked(_lock_of(owner)):
                db.execute(_lose_claims("owner = ? AND model IS NOT NULL", "model"), (now()[:10], owner))
                db.execute("DELETE FROM claims WHERE owner = ?", (owner,))
                lock_file(_lock_of(owner)).unlink(missing_ok=True)

    # --- spend --------------------------------------------------------------------------------------------------------

    def spent(self, run_id: str, role: str | None = None) -> Totals:
        """What a run, or one role of it, has spent, with what it may have lost: the figure that caps look at."""
        with self._reading() as db:
            return _totals(db, _SPENT, run_id, role)

    def spend(self, run_id: str | None = None) -> list[Spent]:
        """What was spent, by run, role, iteration, model and day; of all runs where none is named."""
        where, values = ("WHERE run_id = ?", [run_id]) if run_id else ("", [])
        order = "ORDER BY day, run_id, iteration, role, model"
        with self._reading() as db:
            rows = db.execute(f"SELECT {_columns(Spent)} FROM spend {where} {order}", values)
            return [Spent(*row) for row in rows]

    # --- batches --------------------------------------------------------------------------------------------------------

    def open_batches(self, endpoint: str, model: str) -> list[Batch]:
        """Batches whose results are not collected yet, oldest first."""
        where = "WHERE endpoint = ? AND model = ? AND state != 'collected' ORDER BY created"
        with self._reading() as db:
            rows = db.execute(f"SELECT {_columns(Batch)} FROM batches {where}", (endpoint, model)).fetchall()
        return [replace(Batch(*row), keys=tuple(json.loads(row[7]))) for row in rows]

    def held_by(self, batch: Batch) -> dict[str, Wish]:
        """What a batch may still cost, by key: the claims that it holds, whoever asked for them."""
        with self._reading() as db:
            rows = db.execute("SELECT key, tokens, usd FROM claims WHERE owner = ?", (batch.owner,))
            return {row[0]: Wish(*row) for row in rows}

    def lose(self, batch: Batch, keys: Iterable[str]) -> None:
        """Count requests of a batch as lost, as far as it holds claims to them, and let go of these: nothing counts twice."""
        lost = f"owner = ? AND {_AMONG}"
        values = (batch.owner, json.dumps(list(keys)))
        with self._writing() as db:
            db.execute(_lose_claims(lost, "?"), (batch.model, now()[:10], *values))
            db.execute(f"DELETE FROM claims WHERE {lost}", values)

    def keep_batch(self, batch: Batch) -> None:
        """Write a batch down, or its new state. It takes over our claims, and lets go of them once collected."""
        values = (*astuple(batch)[:7], json.dumps(batch.keys), batch.created)
        with self._writing() as db:
            db.execute(f"INSERT OR REPLACE INTO batches ({_columns(Batch)}) VALUES ({_marks(Batch)})", values)
            if batch.state == "collected":
                db.execute("DELETE FROM claims WHERE owner = ?", (batch.owner,))
            else:
                mine = f"owner = ? AND {_AMONG}"
                db.execute(
                    f"UPDATE claims SET owner = ? WHERE {mine}", (batch.owner, self._owner, json.dumps(batch.keys))
                )

    # --- what was learnt about endpoints -----------------------------------------------------------------------------

    def recall(self, name: str) -> str | None:
        """What was remembered under `name`."""
        with self._reading() as db:
            row = db.execute("SELECT value FROM settings WHERE name = ?", (name,)).fetchone()
        return row[0] if row else None

    def remember(self, name: str, value: str) -> None:
        """Remember `value` under `name`, for this process and all others."""
        with self._writing() as db:
            db.execute("INSERT OR REPLACE INTO settings (name, value) VALUES (?, ?)", (name, value))

    # --- inside ---------------------------------------------------------------------------------------------------------

    def _unusable(self, error: sqlite3.Error) -> StorageError:
        return StorageError(f"{self.path} cannot be used ({error}). If it is damaged, restore it: it is what was paid.")

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._thread:
            try:
                yield self._db
            except sqlite3.DatabaseError as error:  # damage may lie deep: it opened all the same
                raise self._unusable(error) from error

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction that owns the right to write from its beginning, so that it never has to start over."""
        with self._thread:
            self._is_written = False
            try:
                self._db.execute("BEGIN IMMEDIATE")
                yield self._db
                self._db.execute("COMMIT")
            except BaseException as error:
                if self._db.in_transaction:  # a full disk ends it, too
                    self._db.execute("ROLLBACK")
                if isinstance(error, sqlite3.OperationalError):
                    raise StorageError(
                        f"{self.path} cannot be written ({error}). Make room on its disk, or close what holds it."
                    ) from error
                if type(error) is sqlite3.DatabaseError:  # damage; of its kinds one is a row of ours that does not fit
                    raise self._unusable(error) from error
                raise
            self._is_written = True

    def _migrate(self) -> None:
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if version > len(MIGRATIONS):
            raise StorageError(
                f"{self.path} was written by a newer lion (schema {version}, this one knows {len(MIGRATIONS)}): "
                "upgrade lion-distill, or point LION_HOME elsewhere"
            )
        for number, migration in enumerate(MIGRATIONS[version:], start=version + 1):
            with self._writing() as db:
                migration(db)
                db.execute(f"PRAGMA user_version = {number}")

    def _find(self, keys: list[str]) -> dict[str, Answer]:
        rows = self._db.execute(f"SELECT {_columns(Answer)} FROM answers WHERE {_AMONG}", (json.dumps(keys),))
        return {row[0]: Answer(*row) for row in rows}


def spend_of(run_id: str | None = None) -> list[Spent]:
    """What a run of this home, or all of them, paid. A home that never paid gets no journal by the question."""
    if not (home() / "journal.sqlite").is_file():
        return []
    with Journal() as journal:
        return journal.spend(run_id)


def answered_among(keys: Iterable[str]) -> set[str]:
    """Those of `keys` that this home has an answer to. It gets no journal by the question either."""
    if not (home() / "journal.sqlite").is_file():
        return set()
    with Journal() as journal:
        return set(journal.find(keys))


def _lock_of(owner: str) -> str:
    """The lock that an open journal of this name holds."""
    return f"journal-{owner}"


def _totals(db: sqlite3.Connection, select: str, run_id: str, role: str | None) -> Totals:
    """What `_SPENT` or `_RESERVED` finds of a run, or of one role of it."""
    where = "run_id = ? AND role = coalesce(?, role)"
    return Totals(*db.execute(f"{select} WHERE {where}", (run_id, role)).fetchone())


def _first_passed(standing: list[tuple[Cap, Totals, Totals]], wanted: Totals) -> Over | None:
    """The first cap that would be passed if so much were granted on top of what is spent and reserved."""
    for cap, spent, reserved in standing:
        for what in ("usd", "requests", "tokens"):
            limit = getattr(cap, f"max_{what}")
            if limit is not None and getattr(spent, what) + getattr(reserved, what) + getattr(wanted, what) > limit:
                return Over(cap, what, spent, reserved)
    return None


def _lose_claims(which: str, model: str) -> str:
    """The statement that counts claims as lost, to be given what `model` asks for, the day, and what `which` asks for."""
    return f"""
        INSERT INTO spend ({_columns(Spent)})
        SELECT run_id, role, iteration, {model} AS asked, ?, 0, 0, 0, 0, 0, sum(requests), sum(tokens), sum(usd)
        FROM claims WHERE {which} GROUP BY run_id, role, iteration, asked {_ADD_TO_SPEND}"""


def _add_to(figures: list[float], more: Iterable[float]) -> None:
    figures[:] = [figure + amount for figure, amount in zip(figures, more, strict=True)]


def _columns(row: type[Any]) -> str:
    return ", ".join(column.name for column in fields(row))


def _marks(row: type[Any]) -> str:
    return ", ".join("?" for _ in fields(row))


_AMONG = "key IN (SELECT value FROM json_each(?))"  # any number of keys in one parameter
_as_row = attrgetter(*(column.name for column in fields(Answer)))  # astuple would copy each value
_INSERT = f"INSERT INTO answers ({_columns(Answer)}) VALUES ({_marks(Answer)}) ON CONFLICT (key) DO NOTHING"
_SPENT = """
    SELECT total(usd + lost_usd), coalesce(sum(requests + lost_requests), 0),
           coalesce(sum(prompt_tokens + completion_tokens + lost_tokens), 0) FROM spend"""
_RESERVED = "SELECT total(usd), coalesce(sum(requests), 0), coalesce(sum(tokens), 0) FROM claims"
_ADD_TO_SPEND = """
    ON CONFLICT (run_id, role, iteration, model, day) DO UPDATE SET
        requests = requests + excluded.requests,
        prompt_tokens = prompt_tokens + excluded.prompt_tokens,
        cached_tokens = cached_tokens + excluded.cached_tokens,
        completion_tokens = completion_tokens + excluded.completion_tokens,
        usd = usd + excluded.usd,
        lost_requests = lost_requests + excluded.lost_requests,
        lost_tokens = lost_tokens + excluded.lost_tokens,
        lost_usd = lost_usd + excluded.lost_usd
"""
_UPSERT_SPEND = f"INSERT INTO spend ({_columns(Spent)}) VALUES ({_marks(Spent)}) {_ADD_TO_SPEND}"
_UPSERT_CLAIM = """
    INSERT INTO claims (key, owner, run_id, role, iteration, model, tokens, usd) VALUES (?, ?, ?, ?, ?, ?, ?, ?)
    ON CONFLICT (key) DO UPDATE SET
        requests = requests + 1, tokens = tokens + excluded.tokens, usd = usd + excluded.usd
"""


def _create(db: sqlite3.Connection) -> None:
    """Version 1. `spend` is the sum of `answers` by day, kept by the same transactions, so that a cap is one look."""
    db.execute("""
        CREATE TABLE answers (
            key TEXT PRIMARY KEY, run_id TEXT NOT NULL, role TEXT NOT NULL, iteration INTEGER NOT NULL,
            endpoint TEXT NOT NULL, model TEXT NOT NULL, model_returned TEXT NOT NULL,
            text TEXT, status TEXT NOT NULL, finish_reason TEXT,
            prompt_tokens INTEGER NOT NULL, cached_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL,
            cost_usd REAL, price TEXT, latency_seconds REAL NOT NULL, attempts INTEGER NOT NULL, created TEXT NOT NULL
        ) STRICT""")
    db.execute("""
        CREATE TABLE spend (
            run_id TEXT NOT NULL, role TEXT NOT NULL, iteration INTEGER NOT NULL, model TEXT NOT NULL, day TEXT NOT NULL,
            requests INTEGER NOT NULL, prompt_tokens INTEGER NOT NULL, cached_tokens INTEGER NOT NULL,
            completion_tokens INTEGER NOT NULL, usd REAL NOT NULL,
            lost_requests INTEGER NOT NULL, lost_tokens INTEGER NOT NULL, lost_usd REAL NOT NULL,
            PRIMARY KEY (run_id, role, iteration, model, day)
        ) STRICT""")
    db.execute("""
        CREATE TABLE claims (
            key TEXT PRIMARY KEY, owner TEXT NOT NULL, run_id TEXT NOT NULL, role TEXT NOT NULL,
            tokens INTEGER NOT NULL, usd REAL NOT NULL
        ) STRICT""")
    db.execute("""
        CREATE TABLE batches (
            token TEXT PRIMARY KEY, batch_id TEXT, state TEXT NOT NULL, run_id TEXT NOT NULL, role TEXT NOT NULL,
            endpoint TEXT NOT NULL, model TEXT NOT NULL, keys TEXT NOT NULL, created TEXT NOT NULL
        ) STRICT""")
    db.execute("CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT")


def _say_what_claims_are_for(db: sqlite3.Connection) -> None:
    """Version 2. What a process had under way when it died counts as lost, by model and iteration."""
    db.execute("ALTER TABLE claims ADD COLUMN requests INTEGER NOT NULL DEFAULT 1")
    db.execute("ALTER TABLE claims ADD COLUMN iteration INTEGER NOT NULL DEFAULT 0")
    db.execute("ALTER TABLE claims ADD COLUMN model TEXT")


MIGRATIONS: list[Callable[[sqlite3.Connection], None]] = [
    _create,
    _say_what_claims_are_for,
]  # in order, never edited once released
