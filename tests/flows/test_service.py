"""The loop on a real Prefect server with a real worker: nights, cancelling, questions, a dead machine, no key."""

import json
import signal
import sqlite3
import subprocess
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from flows.service import STOP_SECONDS
from tests.fake_openai import FakeOpenAI
from tests.flows.conftest import KEY
from tests.lion import COMMAND, digests, lion, shown
from tests.service import ROOT, Service, kill, process_of_flow

pytestmark = [pytest.mark.slow, pytest.mark.flaky(reruns=1), pytest.mark.timeout(600)]
LONG = {
    "training": {
        "num_train_epochs": 100,
        "global_batch_size": 1,
        "per_device_train_batch_size": 1,
        "save_steps": 1,
    }
}


@pytest.fixture(scope="module")
def dead(service: Service) -> dict[str, Any]:
    """A run whose worker died with it, in the midst of a training: nobody is left to tell the server."""
    run = service.start(name="dead", finetune=LONG, seed=1)
    trainer = service.until_it_trains()
    worker = int((service.home / "prefect" / "worker.pid").read_text())
    kill(worker)
    kill(process_of_flow(trainer))
    return {"run": run, "died": datetime.now(UTC)}


@pytest.fixture(scope="module")
def whole(service: Service) -> dict[str, Any]:
    """Parameters of a run of three iterations that is complete."""
    parameters = {"iterations": 3, "name": "whole"}
    service.wait(service.start(**parameters), "Completed")
    return parameters


def test_up_again_brings_back_what_is_missing_and_makes_nothing_twice(service: Service, dead: dict[str, Any]) -> None:
    nightly = service.api.get("/deployments/name/distill/nightly").json()
    (schedule,) = nightly["schedules"]
    switched_on = {"active": True}
    assert service.api.patch(f"/deployments/{nightly['id']}/schedules/{schedule['id']}", json=switched_on).is_success
    due = service.start("nightly")
    with sqlite3.connect(service.home / "prefect" / "server.db", timeout=60) as database:
        changed = database.execute("update flow_run set auto_scheduled = true where id = ?", [due])
        assert changed.rowcount == 1, "as if its schedule had made it, while no worker ran"
    said = service.lion("up")
    assert service.api.get(f"/flow_runs/{due}").is_success, "it is done once there is a worker"
    service.post(f"/flow_runs/{due}/set_state", state={"type": "CANCELLING"})
    (schedule,) = service.api.get("/deployments/name/distill/nightly").json()["schedules"]
    assert schedule["active"] and schedule["schedule"]["cron"] == "0 1 * * *"
    off = {"active": False}
    assert service.api.patch(f"/deployments/{nightly['id']}/schedules/{schedule['id']}", json=off).is_success
    assert "A server answers already." in said
    assert "Worker started." in said
    names = [automation["name"] for automation in service.post("/automations/filter")]
    assert sorted(names) == sorted(set(names))
    assert len(names) == 4
    deployments = [entry["name"] for entry in service.post("/deployments/filter")]
    assert sorted(deployments) == ["lion-7b", "nightly", "offline", "offline", "offline", "smoke"]


def test_whoever_moves_the_deployments_to_another_pool_is_told(service: Service) -> None:
    elsewhere = service.environment | {"LION_WORK_POOL": "elsewhere"}
    try:
        done = subprocess.run([*COMMAND, "deploy"], cwd=ROOT, env=elsewhere, capture_output=True, text=True)
        assert "distill/nightly (its runs go to pool elsewhere, no longer to lion)" in done.stderr
    finally:
        assert "no longer to elsewhere" in service.lion("deploy")
    assert "no longer" not in service.lion("deploy")


def test_three_nights_are_one_chain_and_the_same_as_one_run_of_three_iterations(
    service: Service, whole: dict[str, Any]
) -> None:
    name = f"night{time.time_ns() % 10**9}"  # a second try begins a chain of its own
    night = {"deployment": "nightly", "name": name, "start_from": "latest"}
    both = [service.start(**night), service.start("nightly", name="other")]
    for run in both:
        service.wait(run, "Completed")
    told = (service.api.get(f"/flow_runs/{run}").json() for run in both)
    earlier, later = sorted(told, key=lambda run: run["start_time"])
    began, ended = datetime.fromisoformat(later["start_time"]), datetime.fromisoformat(earlier["end_time"])
    assert began >= ended, "two nights at once"

    away = service.tiny.rename(service.tiny.with_name("away"))
    try:
        service.wait(service.start(**night), "Failed")
    finally:
        away.rename(service.tiny)
    third = service.start(**night)
    assert len(service.wait(third, "Completed")["message"].split(",")) == 2, "the failed night, then this one"

    (chain,) = [line for line in json.loads(lion(service.home, "runs", "--json").stdout) if name in line["run"]]
    assert (chain["iterations"], len(chain["goes on from"].split(", ")), chain["state"]) == (3, 2, "completed")
    runs = {line["run"].split("-")[0]: line["run"] for line in json.loads(lion(service.home, "runs", "--json").stdout)}
    assert digests(service.home, chain["run"]) == digests(service.home, runs["whole"])
    assert shown(service.home, chain["run"])["iterations"][2]["cached"] == dict.fromkeys(
        shown(service.home, runs["whole"])["iterations"][2]["cached"], True
    )


def test_a_page_from_elsewhere_cannot_start_runs(service: Service) -> None:
    found = service.api.get("/deployments/name/distill/smoke").json()
    start, stranger = f"/deployments/{found['id']}/create_flow_run", {"origin": "http://evil.example"}
    asks = {"access-control-request-method": "POST", "access-control-request-headers": "content-type"}
    assert "access-control-allow-origin" not in service.api.options(start, headers=stranger | asks).headers
    assert "access-control-allow-origin" not in service.api.get("/flow_runs/count", headers=stranger).headers
    sent_unasked = httpx.post(f"{service.api.base_url}{start[1:]}", content="{}", headers=stranger)
    assert sent_unasked.status_code == 403, "a browser asks nobody where no type of content is named"


def test_a_run_shows_tables_charts_and_the_report_under_keys_that_stay(service: Service, whole: dict[str, Any]) -> None:
    run = service.start(**whole)
    service.wait(run, "Completed")
    assert set(service.tasks(run).values()) == {"Cached"}
    assert "finetune · iteration 2" in service.tasks(run)
    shown_there = service.artifacts(run)
    wanted = {"iterations", "hardest", "spend", "report", "held-out-loss", "held-out-score", "score-gaps"}
    assert {f"whole-{key}" for key in wanted} <= set(shown_there)
    assert len(json.loads(shown_there["whole-iterations"]["data"])) == 4
    assert 0 < len(json.loads(shown_there["whole-hardest"]["data"])) <= 10
    assert shown_there["whole-held-out-loss"]["data"].startswith("data:image/svg+xml;base64,")
    everything = service.post("/artifacts/filter")
    assert "progress-train-the-student" in {artifact["key"] for artifact in everything}


def test_a_run_on_ray_shows_its_shards(service: Service) -> None:
    pytest.importorskip("prefect_ray")
    model = {"model_name_or_path": str(service.tiny), "shards": 2}
    # A seed of its own: what another run has answered has no shards.
    run = service.start(name="on-ray", seed=11, task_runner="ray", student={"model": model})
    service.wait(run, "Completed")
    tasks = service.tasks(run)
    assert {tasks[f"student · iteration 1 · shard {number} of 2"] for number in (1, 2)} == {"Completed"}


def test_cancelling_ends_the_trainer_within_ten_seconds_and_keeps_what_was_done(service: Service) -> None:
    run = service.start(name="cancelled", finetune=LONG)
    kept = service.folder_of(service.until_it_trains())
    service.post(f"/flow_runs/{run}/set_state", state={"type": "CANCELLING"})
    asked = time.monotonic()
    while service.trainers():
        assert time.monotonic() - asked < 10, "the trainer is still there"
        time.sleep(0.1)
    service.wait(run, "Cancelled")
    assert shown(service.home, "cancelled")["state"] == "interrupted"
    assert list(kept.glob("trainer/checkpoint-*/complete")), "checkpoints are kept"


def test_a_paid_run_asks_first_and_leaves_no_key_on_the_server(service: Service) -> None:
    with FakeOpenAI(key=KEY) as endpoint:
        model = {"kind": "openai", "model": "gpt-test", "base_url": endpoint.url, "price": {"input": 1, "output": 4}}
        run = service.start(name="paid", approve="spend", teacher={"model": model, "sampling": {"max_tokens": 200}})
        service.wait(run, "Paused")
        asked = service.api.get(f"/flow_runs/{run}").json()["state"]["state_details"]["run_input_keyset"]
        question = service.api.get(f"/flow_runs/{run}/input/{asked['description']}").json()
        assert "| teacher | 12 |" in question
        answer = {"decision": "go on", "max_new_rows": 2}
        assert service.post(f"/flow_runs/{run}/resume", run_input=answer)["status"] == "ACCEPT"
        service.wait(run, "Completed")
    record = shown(service.home, "paid")["iterations"][0]
    assert record["generated"]["wanted"] == 2
    paid = json.loads(service.artifacts(run)["paid-spend"]["data"])
    assert {line["role"] for line in paid} == {"teacher"}
    database = service.home / "prefect" / "server.db"
    with sqlite3.connect(database) as connection:
        dumped = "\n".join(connection.iterdump())
    assert "gpt-test" in dumped and KEY not in dumped
    for file in [*database.parent.rglob("*"), *service.home.glob("runs/*/*"), *service.home.glob("results/*")]:
        assert file.is_dir() or KEY.encode() not in file.read_bytes(), f"the key is in {file}"


def test_a_worker_that_is_stopped_lets_its_runs_keep_the_answers_under_way(service: Service) -> None:
    pool = {"LION_WORK_POOL": "stopped"}  # of this worker alone
    worker = subprocess.Popen([*COMMAND, "worker"], cwd=ROOT, env=service.environment | pool)
    try:
        while not service.api.get("/work_pools/stopped").is_success:
            time.sleep(0.2)
        smoke = service.api.get("/deployments/name/distill/smoke").json()
        same = {key: smoke[key] for key in ("flow_id", "entrypoint", "pull_steps", "parameters")}
        service.post("/deployments/", name="stopped", work_pool_name="stopped", **same)
        with FakeOpenAI(key=KEY, latency=2) as endpoint:
            slow = f"slow-{endpoint.port}"
            model = {"kind": "openai", "model": slow, "base_url": endpoint.url, "price": "free", "max_concurrency": 2}
            run = service.start("stopped", name="stopped", seed=3, teacher={"model": model})
            while endpoint.received < 2:
                time.sleep(0.05)
            worker.terminate()
            assert worker.wait(timeout=STOP_SECONDS + 10) == 128 + signal.SIGTERM
            assert endpoint.bill()["requests"] == endpoint.received
            rows = json.loads(lion(service.home, "spend", "--json").stdout)
            (spent,) = (row for row in rows if row["model"] == slow)
            assert (spent["requests"], spent["lost_requests"]) == (endpoint.received, 0)
        assert service.state(run)["name"] == "Crashed", "as it said itself: it can be retried"
        assert shown(service.home, "stopped")["state"] == "interrupted"
    finally:
        worker.terminate()
        worker.wait()


def test_a_question_nobody_answers_ends_the_run_and_the_same_run_asks_again(service: Service) -> None:
    whole = {"name": "asked", "iterations": 2, "approve": "iteration"}
    run = service.start(**whole, approve_within=1)
    # The server fails a run whose pause has run out; the run itself then says how it ended.
    assert "nobody answered" in service.wait(run, "Cancelled", through="Failed")["message"]
    assert shown(service.home, "asked")["state"] == "paused"
    again = service.start(**whole)
    service.wait(again, "Paused")
    service.post(f"/flow_runs/{again}/resume", run_input={"decision": "stop here"})
    service.wait(again, "Completed")
    stopped = shown(service.home, "asked")
    assert (stopped["state"], len(stopped["iterations"])) == ("completed", 1)


def test_a_limit_that_is_defined_makes_stages_wait(service: Service) -> None:
    limit = service.post("/v2/concurrency_limits/", name="lion-gpu", limit=1, active_slots=1)
    try:
        run = service.start(name="limited", seed=2)
        service.wait(run, "Running")
        deadline = time.monotonic() + 240  # Prefect may record task runs a minute late
        while service.tasks(run).get("teacher · baseline") != "Running":
            assert time.monotonic() < deadline, service.tasks(run)
            time.sleep(0.2)
        time.sleep(5)  # ample for a tiny model, were it let in
        assert service.tasks(run)["teacher · baseline"] == "Running"
    finally:
        service.api.delete(f"/v2/concurrency_limits/{limit['id']}")
    service.post(f"/flow_runs/{run}/set_state", state={"type": "CANCELLING"})


def test_a_run_that_died_with_its_worker_is_found_within_two_minutes(service: Service, dead: dict[str, Any]) -> None:
    while (state := service.state(dead["run"]))["name"] != "Crashed":
        assert (datetime.now(UTC) - dead["died"]).total_seconds() < 400, state
        time.sleep(1)
    assert (datetime.fromisoformat(state["timestamp"]) - dead["died"]).total_seconds() < 120
    assert shown(service.home, "dead")["state"] == "running"  # it could not say so itself,
    (line,) = [line for line in json.loads(lion(service.home, "runs", "--json").stdout) if "dead" in line["run"]]
    assert line["state"] == "interrupted"  # but nobody holds it


def test_down_stops_what_up_started_also_twice_at_once(tmp_path: Path, tiny_model: Path) -> None:
    own = Service(tmp_path / "home", tiny_model)  # the shared one is still wanted
    try:
        ups = [subprocess.Popen([*COMMAND, "up"], cwd=ROOT, env=own.environment) for _ in range(2)]
        assert [up.wait() for up in ups] == [0, 0]
        assert own.api.get("/health").is_success
    finally:
        own.lion("down")
    with pytest.raises(httpx.HTTPError):
        own.api.get("/health")
    assert "was not running" in own.lion("down")
