"""The loop with teacher, referee and generator behind an API: paid once, within the budget, and no key anywhere."""

import fcntl
import json
import os
import pty
import random
import select
import subprocess
import termios
import time
from pathlib import Path
from typing import Any

import pytest

from tests.fake_openai import FakeOpenAI
from tests.lion import COMMAND, arguments, digests, environment, kill_after, lion, shown

KEY = "sk-test-0123456789abcdef"
KILLS = int(os.environ.get("LION_TEST_KILLS", "4"))
CONCURRENCY = 4
PRICE = {"input": 1, "output": 4}


def paid(server: FakeOpenAI, tiny: Path, *more: str) -> list[str]:
    """The smoke run with the three paid roles at a server."""
    model = json.dumps(
        {"kind": "openai", "model": "gpt-test", "base_url": server.url, "price": PRICE, "max_concurrency": CONCURRENCY}
    )
    roles = [f"--set=teacher.model={model}", f"--set=generate.model={model}", "--set=generate.method=prompt"]
    referee = f"--set=referee={json.dumps({'kind': 'llm', 'model': json.loads(model)})}"
    command = [part for part in arguments(tiny) if "teacher" not in part and "generate" not in part]
    roles += ["--set=generate.sampling.max_tokens=200", "--set=generate.sampling.stop=[]"]
    return [*command, *roles, referee, "--set=teacher.sampling.max_tokens=200", *more]


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_again_and_again_a_paid_run_ends_the_same_and_buys_nothing_twice(
    tmp_path: Path, tiny_model: Path
) -> None:
    """Five of a hundred requests fail in some way; `lion run` is killed at random and started again."""
    with FakeOpenAI(key=KEY, faults=0.05, latency=0.02) as server:
        started = time.monotonic()
        done = lion(tmp_path / "whole", *paid(server, tiny_model))
        seconds = time.monotonic() - started
        undisturbed = set(server.billed)
        assert set(server.billed.values()) == {1}
        _no_key_in(tmp_path, done.stdout + done.stderr)

        for record in (tmp_path / "whole" / "results").iterdir():
            record.unlink()  # every stage is done again, from the journal
        before = digests(tmp_path / "whole")
        lion(tmp_path / "whole", *paid(server, tiny_model))
        assert set(server.billed.values()) == {1}
        assert digests(tmp_path / "whole") == before

        server.billed.clear()
        rng = random.Random(1)
        for _ in range(KILLS):
            kill_after(rng.uniform(0.1, 0.45) * seconds, tmp_path / "killed", *paid(server, tiny_model))
        lion(tmp_path / "killed", *paid(server, tiny_model))
        assert digests(tmp_path / "killed") == before
        assert set(server.billed) == undisturbed
        twice = sum(server.billed.values()) - len(server.billed)
        assert twice <= KILLS * 2 * CONCURRENCY  # in flight, or answered and not yet durable
        judged = [record["evaluation"]["reviews"] for record in shown(tmp_path / "killed")["iterations"]]
        assert all(reviews["rows"] for reviews in judged), "the referee compares the held-out answers, too"
        (report,) = (tmp_path / "killed").glob("runs/*/report.html")
        assert "Judged: the referee" in report.read_text()
        rows: list[dict[str, Any]] = json.loads(lion(tmp_path / "killed", "spend", "--json").stdout)
        assert {row["role"] for row in rows} == {"teacher", "referee", "generator"}
        assert sum(row["requests"] for row in rows) == len(undisturbed)


@pytest.mark.slow
def test_a_terminal_that_is_gone_costs_no_answer(tmp_path: Path, tiny_model: Path) -> None:
    ours, theirs = pty.openpty()
    with FakeOpenAI(key=KEY, latency=1.0) as server:
        child = subprocess.Popen(
            [*COMMAND, *paid(server, tiny_model)], env=environment(tmp_path), stdin=theirs, stdout=theirs, stderr=theirs,
            start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(theirs)
        while server.received < 10:
            if select.select([ours], [], [], 0.02)[0]:
                os.read(ours, 4096)
        os.close(ours)  # as when the connection to the machine breaks
        assert child.wait(timeout=60) in (143, 1), "1 where something was just being written there"
        bought = server.bill()["requests"]
    rows = json.loads(lion(tmp_path, "spend", "--json").stdout)
    assert sum(row["requests"] for row in rows) == bought and not any(row["lost_requests"] for row in rows)
    assert shown(tmp_path)["state"] in ("interrupted", "failed")


def _no_key_in(place: Path, *texts: str) -> None:
    for folder, _, files in os.walk(place):
        for name in files:
            assert KEY.encode() not in (Path(folder) / name).read_bytes(), f"the key is in {name}"
    assert not any(KEY in text for text in texts)


def estimated(server: FakeOpenAI, tiny: Path, home: Path, *more: str) -> dict[str, Any]:
    """What `lion estimate --json` says of the paid smoke run."""
    command = ["estimate", *paid(server, tiny)[1:], *more, "--json"]
    return json.loads(lion(home, *command).stdout)


@pytest.mark.slow
def test_a_cap_of_a_quarter_of_the_estimate_holds_and_a_higher_one_goes_on(tmp_path: Path, tiny_model: Path) -> None:
    lengths = [f"--assume={name}" for name in ("teacher_tokens=53", "referee_tokens=40", "generator_tokens=35", "student_tokens=8", "new_share=0.9")]  # fmt: skip
    with FakeOpenAI(key=KEY) as server:
        dollars = estimated(server, tiny_model, tmp_path, *lengths)["usd"]
        dear = {name: value * 2.0 / dollars for name, value in PRICE.items()}  # so that the run costs two dollars
        command = paid(server, tiny_model)
        command = [part.replace(json.dumps(PRICE), json.dumps(dear)) for part in command]
        stopped = lion(tmp_path, *command, "--set=budget.max_usd=0.5", code=3)
        assert "paused" in stopped.stderr and "budget.max_usd = 0.5 is reached" in stopped.stderr
        assert 0.3 < _dollars(server, dear) <= 0.5
        assert shown(tmp_path)["state"] == "paused"
        lion(tmp_path, *command, "--set=budget.max_usd=5")
        assert set(server.billed.values()) == {1}
        assert _dollars(server, dear) == pytest.approx(2.0, rel=0.1)  # the estimate was right
    assert shown(tmp_path)["state"] == "completed"


def _dollars(server: FakeOpenAI, price: dict[str, float]) -> float:
    return (server.tokens["prompt"] * price["input"] + server.tokens["completion"] * price["output"]) / 1e6


def test_a_wrong_key_ends_the_command_with_one_clear_line(tmp_path: Path, tiny_model: Path) -> None:
    seeds = tmp_path / "seeds.jsonl"
    seeds.write_text(json.dumps({"instruction": "When did it start?", "context": "It started in 2004."}))
    with FakeOpenAI(key="another") as server:
        further = "--set=teacher.further=[{category: cooking, model: {kind: local}}]"
        done = lion(tmp_path, *paid(server, tiny_model, f"--seeds={seeds}", further), code=2)
    assert "Traceback" not in done.stderr
    assert KEY not in done.stderr
    assert "hold more than is read, in so many rows: `context` (1)" in done.stderr, "said before anything is paid"
    assert "No seed is of the category cooking, so that its teacher is asked for none." in done.stderr
    assert "`context` (1)" in shown(tmp_path)["warnings"][-2]


def test_a_wrong_key_of_any_role_is_found_before_a_model_of_this_machine_is_prepared(
    tmp_path: Path, tiny_model: Path
) -> None:
    with FakeOpenAI(key="another") as server:
        model = {"kind": "openai", "model": "gpt-test", "base_url": server.url, "price": PRICE}
        referee = f"--set=referee={json.dumps({'kind': 'llm', 'model': model})}"
        done = lion(tmp_path, *arguments(tiny_model, referee), code=2)
    assert "gpt-test at " in done.stderr and list(shown(tmp_path)["baseline"]["seconds"]) == ["seed"]


def test_a_missing_key_is_named_before_anything_is_written(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    with FakeOpenAI() as server:
        done = lion(tmp_path / "home", *paid(server, tiny_model), code=2)
    assert "OPENAI_API_KEY is not set" in " ".join(done.stderr.split())
    assert not (tmp_path / "home").exists()
