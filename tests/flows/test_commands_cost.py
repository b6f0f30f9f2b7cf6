"""What `lion estimate` and `lion spend` tell: every line, their sum, and apart what may be lost."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flows.cli import app
from flows.terminal import Refusal
from storage.journal import Journal, Loss
from tests.flows.test_estimate import PAID
from tests.storage.test_journal import ANSWER


def told(*command: str) -> str:
    return CliRunner().invoke(app, command, catch_exceptions=False).stdout


def test_spend_tells_what_was_paid_and_apart_from_it_what_may_be_lost(home: Path) -> None:
    assert told("spend") == "Nothing was paid for in this home.\n"
    with Journal() as journal:
        journal.add([ANSWER, replace(ANSWER, key="k2", run_id="other", iteration=0, prompt_tokens=1234)])
        journal.add([], [Loss("run", "teacher", 1, "m", 100, 0.125, ANSWER.created, 3)])
    rows = [line.split() for line in told("spend").splitlines()]
    assert rows[1:-1] == [
        ["other", "start", "teacher", "m", "2026-01-02", "1", "1,234", "5", "0.2500"],
        ["run", "1", "teacher", "m", "2026-01-02", "1", "10", "5", "0.2500"],
        ["Total:", "0.5000", "dollars."],
    ]
    assert " ".join(rows[-1]) == "At most 0.1250 more may have been billed for 3 lost answers."
    assert told("spend", "--run", "oth").splitlines()[-1] == "Total: 0.2500 dollars."
    assert [row["usd"] for row in json.loads(told("spend", "--run", "run", "--json"))] == [0.25]
    with pytest.raises(Refusal, match=r"a run 'else'\. Paid for: other, run\."):
        told("spend", "--run", "else")


def test_estimate_tells_every_line_their_sum_and_whether_it_is_more_than_the_cap(home: Path) -> None:
    command = ["estimate", "--preset", "lion-7b", *(f"--set={setting}" for setting in PAID)]
    known = json.loads(told(*command, "--json"))
    lines = told(*command, "--set=budget.max_usd=100").splitlines()
    shown = [line.split() for line in lines[1 : len(known["lines"]) + 1]]
    assert lines[0].split() == [
        "stage",
        "model",
        "requests",
        "tokens",
        "in",
        "out",
        "dollars",
    ]  # nothing was paid before
    assert [float(row[-1]) for row in shown] == [pytest.approx(line["usd"], abs=1e-4) for line in known["lines"]]
    assert [row[0] for row in shown[:2]] == ["start", "start"] and shown[-1][0] == "2"
    requests = sum(line["requests"] for line in known["lines"])
    total = sum(line["usd"] for line in known["lines"])
    assert known["usd"] == pytest.approx(total)
    assert f"Total: {total:,.4f} dollars, {requests:,} requests." in lines
    assert not any("would pause" in line for line in lines)
    assert "That is more than budget.max_usd = 0.001: the run would pause there" in told(
        *command, "--set=budget.max_usd=0.001"
    )
    assert told("estimate", "--preset", "offline").startswith("Nothing in this run is paid for")
