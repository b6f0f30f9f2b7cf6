"""What a person does in the Prefect UI, in a real browser: fill in the form, look, retry what failed, cancel."""

import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.browser import needs_chromium, picture
from tests.flows.test_service import LONG
from tests.service import Service, kill, process_of_flow

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

pytestmark = [pytest.mark.slow, pytest.mark.flaky(reruns=1), pytest.mark.timeout(900), needs_chromium]


def open_run(page: "Page", service: Service, run: str) -> None:
    page.goto(f"{service.url}/v2/runs/flow-run/{run}")
    page.get_by_role("tab", name="Artifacts").wait_for()


def heard(page: "Page", button: "Locator", route: str) -> bool:
    """Press a button that asks the server; False where SQLite was busy, which the page calls an error."""
    with page.expect_response(lambda reply: reply.url.endswith(route)) as reply:
        button.click()
    assert reply.value.ok or reply.value.status == 503, reply.value.text()
    return reply.value.ok


def choose(page: "Page", action: str, confirm: str) -> None:
    """An action of the menu of a run, and yes to its question; again as long as the server is busy."""
    while True:
        page.get_by_role("button", name="Open menu").first.click()
        page.get_by_role("menuitem", name=action, exact=True).click()
        dialog = page.get_by_role("alertdialog")
        if heard(page, dialog.get_by_role("button", name=confirm, exact=True), "/set_state"):
            break
        page.reload()


def test_a_run_is_started_by_the_form_and_shows_what_came_of_it(page: "Page", service: Service, tmp_path: Path) -> None:
    deployment = service.api.get("/deployments/name/distill/smoke").json()
    page.goto(f"{service.url}/v2/deployments/deployment/{deployment['id']}/run")
    iterations = page.get_by_label("iterations (Optional)")
    iterations.wait_for()
    assert page.get_by_text("How often the loop turns.").is_visible()
    iterations.fill("2")
    iterations.fill("1")
    picture(page, "form", tmp_path)
    while not heard(page, page.get_by_role("button", name="Submit"), "/create_flow_run"):
        pass
    page.wait_for_url("**/deployments/deployment/*?tab=Runs")
    asked = {"deployments": {"id": {"any_": [deployment["id"]]}}, "sort": "EXPECTED_START_TIME_DESC", "limit": 1}
    (run,) = service.post("/flow_runs/filter", **asked)
    assert run["parameters"]["iterations"] == 1
    service.wait(run["id"], "Completed")
    assert service.tasks(run["id"])["teacher · iteration 1"] in {"Completed", "Cached"}  # another test may have asked
    open_run(page, service, run["id"])
    page.get_by_text("Completed").first.wait_for()
    page.get_by_role("tab", name="Artifacts").click()
    page.get_by_text("smoke-iterations").first.wait_for()
    picture(page, "artifacts", tmp_path)
    chart = service.artifacts(run["id"])["smoke-held-out-loss"]["id"]
    page.goto(f"{service.url}/v2/artifacts/artifact/{chart}")
    page.locator("img[src^='data:image/svg']").first.wait_for()
    picture(page, "chart", tmp_path)


def test_a_run_killed_in_training_is_retried_from_its_checkpoint(
    page: "Page", service: Service, tmp_path: Path
) -> None:
    training = {"training": {"num_train_epochs": 40, "save_steps": 1}}
    run = service.start(name="killed", finetune=training)
    trainer = service.until_it_trains()
    history = service.folder_of(trainer) / "history.jsonl"
    kill(process_of_flow(trainer))
    service.wait(run, "Crashed")
    while service.trainers():
        time.sleep(0.1)
    before = len(history.read_text().splitlines())
    open_run(page, service, run)
    page.get_by_text("Crashed").first.wait_for()
    picture(page, "crashed", tmp_path)
    choose(page, "Retry", "Retry")
    deadline = time.monotonic() + 400
    while service.state(run)["name"] != "Completed":
        assert time.monotonic() < deadline, service.state(run)
        time.sleep(1)
    tasks = service.tasks(run)
    assert (tasks["teacher · iteration 1"], tasks["finetune · iteration 1"]) == ("Cached", "Completed")
    steps = len(history.read_text().splitlines())
    assert 120 <= steps < 120 + before, "it began again from the first step"


def test_a_run_is_cancelled_by_the_menu(page: "Page", service: Service) -> None:
    run = service.start(name="stopped", finetune=LONG)
    service.until_it_trains()
    open_run(page, service, run)
    page.get_by_text("Running").first.wait_for()
    choose(page, "Cancel", "Cancel Flow Run")
    asked = time.monotonic()
    while service.trainers():
        assert time.monotonic() - asked < 10, "the trainer is still there"
        time.sleep(0.1)
    service.wait(run, "Cancelled")
    page.get_by_text("Cancelled").first.wait_for()
