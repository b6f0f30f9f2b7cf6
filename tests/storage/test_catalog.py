"""The views: readable with DuckDB alone, with run and iteration in front."""

from pathlib import Path

import duckdb
import pytest

from storage.catalog import ask, life_of, publish, query
from storage.files import Snapshot, StorageError
from storage.pools import instruction_id, write_snapshot
from storage.runs import IterationRecord, Manifest
from tests.recorded import HELDOUT, IDS, record_run


def instructions(*names: str, parent: str | None = None) -> Snapshot:
    rows = [
        {
            "instruction_id": name,
            "instruction": f"Do {name}.",
            "origin": "hard" if parent else "seed",
            "parent_id": parent,
        }
        for name in names
    ]
    return write_snapshot("instructions", rows, step="test", version=1)


def a_run(run_id: str, pool: Snapshot, grown: Snapshot) -> Manifest:
    candidate = {"instruction_id": "c", "parent_id": "a", "side": "hard", "draw": 0, "instruction": "Do c."}
    candidates = write_snapshot("candidates", [candidate], step="test", version=1)
    manifest = Manifest(run_id=run_id, next_pools={"train_pool": grown, "cache_pool": grown})
    made = {"train_pool": pool, "cache_pool": pool, "candidates": candidates}
    manifest.iterations.append(IterationRecord(iteration=1, snapshots=made))
    manifest.save()
    return manifest


def test_any_duckdb_client_opens_the_catalog(home: Path) -> None:
    a_run("one", instructions("a", "b"), instructions("c", parent="a"))
    with duckdb.connect(str(publish()), read_only=True) as connection:
        rows = connection.execute("select run_id, iteration, instruction_id from train_pool order by all").fetchall()
    assert rows == [("one", 1, "a"), ("one", 1, "b"), ("one", 2, "c")]


def test_an_object_that_two_runs_share_is_seen_in_both(home: Path) -> None:
    pool, grown = instructions("a"), instructions("c", parent="a")
    a_run("one", pool, grown)
    a_run("two", pool, grown)
    counted = ask("select run_id, count(*) as n from train_pool where iteration = 1 group by all order by all")
    assert counted == [{"run_id": "one", "n": 1}, {"run_id": "two", "n": 1}]


def test_views_without_rows_are_there_with_their_columns(home: Path) -> None:
    assert ask("select run_id, difficulty from verdicts") == []
    assert ask("select count(*) as n from reviews") == [{"n": 0}]


def test_a_home_may_have_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("st*r", "star", "b[ar]", "ba", "model=llama", "origin=x", "it's 50%"):
        monkeypatch.setenv("LION_HOME", str(tmp_path / name))
        pool = record_run().iterations[0].snapshots["train_pool"]
        assert query("select origin from pool", pool=pool) == [{"origin": "seed"}] * 3, name
        assert ask("select distinct run_id, model from responses order by all") == [
            {"run_id": "recorded-1", "model": model} for model in ("s", "t")
        ], name


def test_publishing_does_not_disturb_a_client_that_has_it_open(home: Path) -> None:
    a_run("one", instructions("a"), instructions("c", parent="a"))
    with duckdb.connect(str(publish())) as client:
        publish()
        assert client.execute("select count(*) from train_pool").fetchone() == (2,)


def test_the_life_of_a_row_shows_parent_and_children(home: Path) -> None:
    pool = instructions("a")
    a_run("one", pool, instructions("c", parent="a"))
    assert [row["instruction_id"] for row in life_of("a")["children"]] == ["c"]
    assert [row["instruction_id"] for row in life_of("c")["parent"]] == ["a"]


def test_a_rejected_candidate_and_a_heldout_instruction_have_a_life(home: Path) -> None:
    record_run()
    rejected = {"instruction_id": "r", "parent_id": "a", "side": "hard", "draw": 0, "rejection": "too_short"}
    run = a_run("one", instructions("a"), instructions("c", parent="a"))
    run.iterations[0].snapshots["candidates"] = write_snapshot("candidates", [rejected], step="test", version=1)
    run.save()
    assert [row["rejection"] for row in life_of("r")["candidate"]] == ["too_short"]
    heldout = instruction_id(HELDOUT[0], None)
    assert [row["score"] for row in life_of(heldout)["evaluations"]] == [1.0, 6.0]


def test_a_statement_that_says_nothing_has_no_rows(home: Path) -> None:
    assert ask("  -- nothing") == []


def test_a_damaged_table_is_named_with_its_run(home: Path) -> None:
    run = record_run()
    run.iterations[0].snapshots["verdicts"].path.write_bytes(b"x")
    with pytest.raises(StorageError, match=r"verdicts.*is damaged\. The command of recorded-1"):
        ask("select 1 as one")


def test_columns_of_one_name_are_all_there(home: Path) -> None:
    assert ask("select 1 as a, 2 as a, 3 as a") == [{"a": 1, "a_1": 2, "a_2": 3}]
    assert ask("select 1 as a, 2 as a, 3 as a_1, 4 as a_1") == [{"a": 1, "a_2": 2, "a_1": 3, "a_1_1": 4}]


def test_every_view_has_the_rows_of_its_own_table_with_run_and_iteration(home: Path) -> None:
    run = record_run()
    counted = {
        view: ask(f"select run_id, iteration, count(*) as n from {view} group by all order by iteration")
        for view in ("train_pool", "cache_pool", "responses", "reviews", "verdicts", "candidates")
    }
    rows = {"train_pool": 3, "cache_pool": 3, "responses": 6, "reviews": 6, "verdicts": 3, "candidates": 1}
    assert counted == {view: [{"run_id": run.run_id, "iteration": 1, "n": n}] for view, n in rows.items()}
    assert ask("select iteration, sum(score) as total from evaluations group by all order by all") == [
        {"iteration": 0, "total": 3.0},
        {"iteration": 1, "total": 9.0},
    ]


def test_the_life_of_a_row_shows_what_was_said_of_it_and_of_no_other(home: Path) -> None:
    record_run()
    life = life_of(IDS[0])
    assert [row["instruction"] for row in life["instruction"]] == ["Why is the sky blue?"]
    assert (life["parent"], life["candidate"], life["evaluations"]) == ([], [], [])
    assert [(row["role"], row["response"]) for row in life["responses"]] == [
        ("student", "It is blue."),
        ("teacher", "Rayleigh scattering."),
    ]
    assert [(row["order"], row["teacher_score"], row["student_score"]) for row in life["reviews"]] == [
        ("student_first", 8.0, 5.0),
        ("teacher_first", 9.0, 4.0),
    ]
    assert [(row["iteration"], row["score_gap"], row["difficulty"]) for row in life["verdicts"]] == [(1, 4.0, "hard")]
    assert [row["rejection"] for row in life["children"]] == ["near_duplicate"]


def test_a_statement_that_cannot_be_run_is_answered_with_the_views_there_are(home: Path) -> None:
    with pytest.raises(StorageError, match=r"(?s)no_such_view.*Views: train_pool, cache_pool, responses"):
        ask("select * from no_such_view")


def test_a_snapshot_that_is_gone_leaves_the_other_rows_to_be_asked(home: Path) -> None:
    run = record_run()
    run.iterations[0].snapshots["student_responses"].path.unlink()
    assert ask("select distinct role from responses") == [{"role": "teacher"}]


def test_a_statement_has_its_parameters(home: Path) -> None:
    record_run()
    assert ask("select score_gap from verdicts where difficulty = $said", {"said": "easy"}) == [{"score_gap": 0.0}]
