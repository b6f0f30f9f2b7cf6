"""The journal: what is answered stays answered, what is claimed is claimed once, and no cap is passed."""

import os
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from storage.files import StorageError
from storage.journal import MIGRATIONS, Answer, Batch, Cap, Journal, Loss, Totals, Wish, now

ROOT = Path(__file__).parents[2]
ANSWER = Answer(
    key="k1",
    run_id="run",
    role="teacher",
    iteration=1,
    endpoint="http://e/v1",
    model="m",
    model_returned="m-1",
    text="Grüße, 世界",
    status="ok",
    finish_reason="stop",
    prompt_tokens=10,
    cached_tokens=4,
    completion_tokens=5,
    cost_usd=0.25,
    price='{"input":1}',
    latency_seconds=0.5,
    attempts=2,
    created="2026-01-02T03:04:05.000+00:00",
)


@pytest.fixture
def journal(home: Path):
    with Journal() as journal:
        yield journal


def wishes(*keys: str, tokens: int = 10, usd: float = 0.1) -> list[Wish]:
    return [Wish(key, tokens, usd) for key in keys]


def test_an_answer_is_found_as_it_was_written(journal: Journal) -> None:
    free = replace(ANSWER, key="k2", text=None, finish_reason=None, cost_usd=None, price=None)
    journal.add([ANSWER, free])
    assert journal.find(["k1", "k2", "k3"]) == {"k1": ANSWER, "k2": free}


def test_an_answer_outlives_the_journal_object(home: Path) -> None:
    with Journal() as journal:
        journal.add([ANSWER])
    with Journal() as journal:
        assert journal.find(["k1"]) == {"k1": ANSWER}


def test_an_answer_is_there_after_kill_9(home: Path) -> None:
    code = (
        "import os, signal; from storage.journal import *; from tests.storage.test_journal import ANSWER\n"
        "j = Journal(); j.add([ANSWER]); j.claim('run', 'teacher', [Wish('k9', 1, 1.0)], [])\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    with Journal() as journal:
        assert journal.find(["k1"]) == {"k1": ANSWER}
        assert journal.claim("run", "teacher", wishes("k9"), []).granted == {"k9"}  # the dead hold nothing
    assert [path.name for path in (home / "locks").iterdir()] == ["journal-opening.lock"]


def test_an_answer_is_on_the_disk_when_it_is_used_and_whoever_reads_keeps_nobody_from_writing(home: Path) -> None:
    """What kill -9 cannot show: a machine that loses its power."""
    with Journal() as journal:
        assert journal._db.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL
        with sqlite3.connect(journal.path) as reader:
            reader.execute("BEGIN")
            assert reader.execute("SELECT count(*) FROM answers").fetchone() == (0,)
            journal.add([ANSWER])


def test_an_answer_is_never_overwritten_nor_charged_twice(journal: Journal) -> None:
    journal.add([ANSWER])
    journal.add([replace(ANSWER, text="another", cost_usd=9.0)])
    assert journal.find(["k1"])["k1"].text == ANSWER.text
    assert journal.spent("run") == Totals(0.25, 1, 15)


def test_thousands_of_keys_are_looked_up_at_once(journal: Journal) -> None:
    journal.add([replace(ANSWER, key=f"k{number}") for number in range(5000)])
    assert len(journal.find([f"k{number}" for number in range(60_000)])) == 5000


def test_spend_is_told_by_role_iteration_model_and_day(journal: Journal) -> None:
    journal.add([ANSWER, replace(ANSWER, key="k2"), replace(ANSWER, key="k3", role="referee", cost_usd=None)])
    journal.add([replace(ANSWER, key="k4", run_id="other", created="2026-01-03T00:00:00+00:00")])
    rows = journal.spend("run")
    assert [(row.role, row.day, row.requests, row.usd) for row in rows] == [
        ("referee", "2026-01-02", 1, 0.0),
        ("teacher", "2026-01-02", 2, 0.5),
    ]
    assert (rows[1].prompt_tokens, rows[1].cached_tokens, rows[1].completion_tokens) == (20, 8, 10)
    assert [row.run_id for row in journal.spend()] == ["run", "run", "other"]  # by day
    assert journal.spent("run", "referee") == Totals(0.0, 1, 15)


def test_spend_of_one_day_adds_up_over_many_transactions(journal: Journal) -> None:
    for number in range(3):
        journal.add([replace(ANSWER, key=f"k{number}")], [Loss("run", "teacher", 1, "m", 100, 0.5, ANSWER.created, 2)])
    (row,) = journal.spend()
    assert (row.requests, row.prompt_tokens, row.cached_tokens, row.completion_tokens, row.usd) == (3, 30, 12, 15, 0.75)
    assert (row.lost_requests, row.lost_tokens, row.lost_usd) == (6, 300, 1.5)
    assert journal.spent("run") == Totals(2.25, 9, 345)


def test_what_may_have_been_billed_counts_towards_the_caps_and_is_told_apart(journal: Journal) -> None:
    journal.add([ANSWER], [Loss("run", "teacher", 1, "m", 100, 0.5, ANSWER.created)])
    (row,) = journal.spend("run")
    assert (row.requests, row.usd, row.lost_requests, row.lost_usd) == (1, 0.25, 1, 0.5)
    assert journal.spent("run") == Totals(0.75, 2, 115)


def test_a_key_is_claimed_by_one_journal_only(home: Path) -> None:
    with Journal() as one, Journal() as other:
        assert one.claim("run", "teacher", wishes("a", "b"), []).granted == {"a", "b"}
        claimed = other.claim("run", "teacher", wishes("b", "c"), [])
        assert (claimed.granted, claimed.elsewhere) == ({"c"}, {"b"})
        one.add([replace(ANSWER, key="b")], release=["a"])
        claimed = other.claim("run", "teacher", wishes("a", "b"), [])
        assert (claimed.granted, set(claimed.answered)) == ({"a"}, {"b"})


def test_a_claim_is_released_alone_and_by_its_owner_alone(home: Path) -> None:
    with Journal() as one, Journal() as other:
        one.claim("run", "teacher", wishes("a", "b"), [])
        one.add([], release=["a"])
        other.add([], release=["b"])
        claimed = other.claim("run", "teacher", wishes("a", "b"), [])
        assert (claimed.granted, claimed.elsewhere) == ({"a"}, {"b"})


def test_a_closed_journal_lets_go_of_its_claims(home: Path) -> None:
    with Journal() as one:
        one.claim("run", "teacher", wishes("a"), [], model="m")
    with Journal() as other:
        assert other.claim("run", "teacher", wishes("a"), []).granted == {"a"}
        assert other.spend() == []  # nothing was under way, so nothing is lost


@pytest.mark.parametrize("cap", [Cap(max_usd=0.35), Cap(max_requests=3), Cap(max_tokens=30), Cap("teacher", 0.3000001)])
def test_claims_of_two_journals_never_pass_a_cap_together(home: Path, cap: Cap) -> None:
    with Journal() as one, Journal() as other:
        assert len(one.claim("run", "teacher", wishes("a", "b"), [cap]).granted) == 2
        claimed = other.claim("run", "teacher", wishes("c", "d"), [cap])
        assert claimed.granted == {"c"}
        assert claimed.over and claimed.over.reserved.requests == 2


def test_real_usage_makes_room_for_more(journal: Journal) -> None:
    cap = Cap(max_usd=1.0)
    assert journal.claim("run", "teacher", wishes("a", "b", usd=0.6), [cap]).granted == {"a"}
    journal.add([replace(ANSWER, key="a", cost_usd=0.1)])
    assert journal.claim("run", "teacher", wishes("b", usd=0.6), [cap]).granted == {"b"}


def test_a_cap_of_one_role_does_not_bind_another(journal: Journal) -> None:
    journal.add([ANSWER])
    assert journal.claim("run", "teacher", wishes("a"), [Cap("teacher", max_requests=1)]).over
    assert journal.claim("run", "referee", wishes("a"), [Cap("referee", max_requests=1)]).granted == {"a"}
    assert not journal.claim("other run", "teacher", wishes("b"), [Cap(max_requests=1)]).over


@pytest.mark.parametrize("cap", [Cap(max_usd=0.25), Cap(max_requests=2), Cap(max_tokens=29)])
def test_claiming_again_reserves_as_much_again(journal: Journal, cap: Cap) -> None:
    assert journal.claim("run", "teacher", wishes("a"), [cap]).granted
    assert journal.claim("run", "teacher", wishes("a"), [cap]).granted
    assert journal.claim("run", "teacher", wishes("a"), [cap]).over


def test_the_claims_of_a_batch_outlive_its_process(home: Path) -> None:
    batch = Batch("t", None, "creating", "run", "teacher", "http://e/v1", "m", ("a",), now())
    with Journal() as journal:
        journal.claim("run", "teacher", wishes("a"), [])
        journal.keep_batch(batch)
    with Journal() as journal:
        assert journal.claim("run", "teacher", wishes("a"), []).elsewhere == {"a"}
        assert journal.open_batches("http://e/v1", "m") == [batch]
        journal.keep_batch(replace(batch, batch_id="b1", state="collected"))
        assert journal.open_batches("http://e/v1", "m") == []
        assert journal.claim("run", "teacher", wishes("a"), []).granted == {"a"}


def test_what_was_learnt_is_remembered_for_all_processes(home: Path) -> None:
    with Journal() as journal:
        assert journal.recall("x") is None
        journal.remember("x", "1")
        journal.remember("x", "2")
    with Journal() as journal:
        assert journal.recall("x") == "2"


def test_a_failed_transaction_leaves_nothing_behind(journal: Journal) -> None:
    with pytest.raises(sqlite3.IntegrityError):
        journal.add([ANSWER, replace(ANSWER, key="k2", status=None)])  # type: ignore[arg-type]
    assert journal.find(["k1", "k2"]) == {}
    journal.add([ANSWER])
    assert journal.find(["k1"])


def test_claims_whose_answers_could_not_be_written_count_as_lost(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storage.journal.BUSY_SECONDS", 0.05)
    journal, still = Journal(), Journal()
    journal.claim("run", "teacher", wishes("k1"), [], model="m")
    still.claim("run", "teacher", wishes("k2"), [], model="m")
    with sqlite3.connect(home / "journal.sqlite", isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StorageError, match=r"journal\.sqlite cannot be written \(database is locked\)"):
            journal.add([ANSWER])
        with pytest.raises(StorageError, match="cannot be written"):
            still.close()
        other.execute("ROLLBACK")
    journal.close()
    with Journal() as following:  # of the same process, as when a stage is tried again
        assert [spent.lost_requests for spent in following.spend()] == [2]
        assert following.claim("run", "teacher", wishes("k1", "k2"), []).granted == {"k1", "k2"}


def test_a_journal_of_a_newer_version_is_refused_by_name(home: Path) -> None:
    Journal().close()
    db = sqlite3.connect(home / "journal.sqlite")
    db.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    db.close()
    with pytest.raises(StorageError, match="newer lion"):
        Journal()


def test_many_processes_share_one_journal(home: Path) -> None:
    code = (
        "import sys; from dataclasses import replace; from storage.journal import *\n"
        "from tests.storage.test_journal import ANSWER\n"
        "with Journal() as j:\n"
        "    for n in range(0, 200, 20):\n"
        "        keys = [f'k{i}' for i in range(n, n + 20)]\n"
        "        granted = j.claim('run', 'teacher', [Wish(key, 1, 0.1) for key in keys], []).granted\n"
        "        j.add([replace(ANSWER, key=key, text=sys.argv[1]) for key in sorted(granted)])\n"
        "        print(len(granted))\n"
    )
    command = [sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen([*command, str(n)], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        for n in range(4)
    ]
    counts = [sum(map(int, process.communicate()[0].split())) for process in processes]
    assert [process.returncode for process in processes] == [0] * 4
    assert sum(counts) == 200  # each was granted to exactly one
    with Journal() as journal:
        assert journal.spent("run").requests == 200


def test_what_a_dead_process_had_sent_counts_as_lost_and_what_it_had_only_claimed_does_not(home: Path) -> None:
    code = (
        "import os; from storage.journal import *\n"
        "j = Journal(); w = [Wish(k, 10, 0.5) for k in 'abc']\n"
        "j.claim('run', 'teacher', w[:2], [], iteration=3, model='m')\n"
        "j.claim('run', 'teacher', w[:1], [], iteration=3, model='m')\n"
        "j.claim('run', 'teacher', w[2:], [])\n"
        "os.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", code])
    with Journal() as journal:
        (spent,) = journal.spend()
        assert (spent.iteration, spent.model, spent.requests) == (3, "m", 0)
        assert (spent.lost_requests, spent.lost_tokens, spent.lost_usd) == (3, 30, 1.5)
        cap = Cap(max_requests=3)
        assert journal.claim("run", "teacher", [Wish("d", 1, 0.0)], [cap]).over
    with Journal() as journal:
        assert journal.spend() == [spent], "it is counted once"


def test_a_journal_of_the_first_version_is_brought_up_to_date(home: Path) -> None:
    home.mkdir()
    with sqlite3.connect(home / "journal.sqlite") as db:
        MIGRATIONS[0](db)
        db.execute("PRAGMA user_version = 1")
        db.execute("INSERT INTO claims VALUES ('k', 'dead', 'run', 'teacher', 5, 0.5)")
    with Journal() as journal:
        assert journal.claim("run", "teacher", [Wish("k", 5, 0.5)], [], model="m").granted == {"k"}


def test_a_journal_whose_update_was_cut_off_is_brought_up_to_date_by_the_next(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_off(db: sqlite3.Connection) -> None:
        MIGRATIONS[1](db)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("storage.journal.MIGRATIONS", [MIGRATIONS[0], cut_off])
        Journal()
    with Journal() as journal:
        assert journal.claim("run", "teacher", wishes("a"), [], model="m").granted == {"a"}


def test_a_file_that_is_no_journal_is_named(home: Path) -> None:
    home.mkdir()
    (home / "journal.sqlite").write_text("no database" * 1000)
    with pytest.raises(StorageError, match=r"journal\.sqlite cannot be used .* restore it"):
        Journal()


def test_damage_that_lies_deep_in_the_journal_is_named_where_it_is_met(home: Path) -> None:
    keys = [f"k{number}" for number in range(2000)]
    with Journal() as journal:
        journal.add([replace(ANSWER, key=key) for key in keys])
    file = home / "journal.sqlite"
    data = bytearray(file.read_bytes())
    data[50 * 4096 : 60 * 4096] = bytes(10 * 4096)  # within the answers; what is read at opening is whole
    file.write_bytes(data)
    with Journal() as journal:
        with pytest.raises(StorageError, match=r"journal\.sqlite cannot be used .* restore it"):
            journal.find(keys)
        with pytest.raises(StorageError, match=r"journal\.sqlite cannot be used .* restore it"):
            journal.add([replace(ANSWER, key=f"{key}+") for key in keys])
