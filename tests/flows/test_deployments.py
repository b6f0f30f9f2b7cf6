"""What is registered on a Prefect server is valid: every parameter set, every automation, the schedule."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Event, Thread
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import yaml
from prefect.automations import Automation
from prefect.exceptions import Pause
from prefect.schedules import Cron
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.utilities.callables import parameter_schema

from flows import deployed
from flows.chain import settled
from flows.config import DistillConfig, presets, resolve
from flows.deployed import _said, distill
from storage.files import Snapshot, locked
from storage.journal import Journal
from storage.pools import write_snapshot
from storage.runs import Baseline, IterationRecord, Manifest, chains, load_manifest
from tests import recorded
from tests.storage.test_journal import ANSWER

ROOT = Path(__file__).parents[2]
DEPLOYMENTS: list[dict[str, Any]] = yaml.safe_load((ROOT / "deployments" / "prefect.yaml").read_text())["deployments"]
AUTOMATIONS: list[dict[str, Any]] = yaml.safe_load((ROOT / "deployments" / "automations.yaml").read_text())


def config_of(parameters: dict[str, Any]) -> DistillConfig:
    return resolve(parameters["preset"], **_said(parameters))


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=lambda entry: entry["tags"][-1])
def test_every_parameter_set_is_valid_and_its_entrypoint_is_there(deployment: dict[str, Any]) -> None:
    module, _, name = deployment["entrypoint"].partition(":")
    assert module == "flows/deployed.py"
    flow = getattr(deployed, name)
    given = deployment["parameters"] | ({"data": "answers.jsonl"} if name == "finetune" else {})
    flow.validate_parameters(given)
    if name == "distill":
        config_of(given)
    else:
        resolve(given["preset"])


@pytest.mark.parametrize("preset", presets())
def test_every_preset_is_a_deployment_that_runs_what_the_preset_says(preset: str) -> None:
    (deployment,) = [entry for entry in DEPLOYMENTS if (entry["name"], entry["tags"]) == (preset, [f"preset:{preset}"])]
    assert config_of(deployment["parameters"]).run_id == resolve(preset).run_id


def test_nights_go_on_from_each_other_one_at_a_time_once_they_are_switched_on() -> None:
    (nightly,) = [entry for entry in DEPLOYMENTS if entry["name"] == "nightly"]
    assert (nightly["parameters"]["iterations"], nightly["parameters"]["start_from"]) == (1, "latest")
    assert nightly["concurrency_limit"] == {"limit": 1, "collision_strategy": "ENQUEUE"}
    (schedule,) = nightly["schedules"]
    assert schedule["active"] is False
    Cron(schedule["cron"], timezone=schedule["timezone"])


def test_a_night_whose_question_of_before_is_answered_with_stop_is_over(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = settled(resolve("smoke", ["start_from=latest"]))
    night(begun, "paused", "last night's").save()
    message, went_through = tonight(monkeypatch, "tonight's", iterations=0)
    assert message == f"Runs: {begun.run_id}"
    assert went_through == [begun.run_id]


def night(config: DistillConfig, state: Any, *flow_runs: str, iterations: int = 0) -> Manifest:
    """What a night leaves."""
    made = Manifest(run_id=config.run_id, config=config.model_dump(mode="json"), state=state, flow_runs=list(flow_runs))
    made.iterations = [IterationRecord(iteration=number + 1) for number in range(iterations)]
    return made


def tonight(monkeypatch: pytest.MonkeyPatch, flow_run: str, iterations: int = 1) -> tuple[str, list[str]]:
    """What a night says at its end, and the runs that it went through, each of so many iterations in all."""

    def fn(config: DistillConfig) -> str:
        went_through.append(config.run_id)
        night(config, "completed", flow_run, iterations=iterations).save()
        return config.run_id

    went_through: list[str] = []
    monkeypatch.setattr(deployed.loop, "fn", fn)
    monkeypatch.setattr(deployed, "flow_run", SimpleNamespace(id=flow_run))
    config = resolve("smoke")
    ended = distill.fn(preset="smoke", start_from="latest", iterations=config.iterations)
    assert ended.message
    return ended.message, went_through


def test_a_night_that_was_suspended_goes_on_with_what_it_had_begun_alone(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = settled(resolve("smoke", ["start_from=latest"]))
    night(begun, "paused", "tonight's").save()
    assert tonight(monkeypatch, "tonight's")[1] == [begun.run_id]
    night(begun, "paused", "last night's").save()
    assert len(tonight(monkeypatch, "tonight's")[1]) == 2, "what last night had begun, and its own"


def test_a_night_is_not_retried_beyond_what_a_later_one_has_finished(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = settled(resolve("smoke", ["start_from=latest"]))
    night(begun, "completed", "this one's", "a later one's", iterations=1).save()
    night(settled(resolve("smoke", ["start_from=latest"])), "failed", "a later one's").save()
    message, went_through = tonight(monkeypatch, "this one's")
    assert not went_through and message.startswith(f"Runs: {begun.run_id}, which are done")


def test_every_setting_is_in_the_form_with_help_and_bounds() -> None:
    schema = parameter_schema(distill).model_dump()["properties"]
    assert set(DistillConfig.model_fields) == set(schema) - {"preset"}
    assert all(field.get("description") for field in schema.values())
    assert (schema["iterations"]["minimum"], schema["iterations"]["maximum"]) == (1, 100)
    assert schema["approve"]["enum"] == ["none", "spend", "iteration"]


def test_a_group_changes_only_what_it_says() -> None:
    changed = config_of({"preset": "offline", "discriminate": {"threshold": 0.4}})
    assert changed.discriminate.threshold_kind == "quantile"
    assert changed == resolve("offline", ["discriminate.threshold=0.4"])


@pytest.mark.parametrize("automation", AUTOMATIONS, ids=lambda entry: entry["name"])
def test_every_automation_is_one(automation: dict[str, Any]) -> None:
    actions = [
        {key: value for key, value in action.items() if key != "block"}
        | ({"block_document_id": "00000000-0000-0000-0000-000000000000"} if "block" in action else {})
        for action in automation["actions"]
    ]
    Automation.model_validate(automation | {"actions": actions})


def test_a_suspended_run_that_leaves_is_not_taken_for_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    def suspended(*_: Any) -> None:
        raise Pause

    told: list[str] = []
    monkeypatch.setattr(deployed, "emit_event", lambda event, resource: told.append(event), raising=False)
    for what in ("loop", "study"):
        monkeypatch.setattr(getattr(deployed, what), "fn", suspended)
    for flow in (deployed.distill, deployed.evaluate):
        with pytest.raises(Pause):
            flow.fn(preset="smoke")
    (marks,) = [automation for automation in AUTOMATIONS if automation["name"] == "lion marks what died"]
    assert len(told) == 2 and set(told) <= set(marks["trigger"]["expect"])


def test_runs_that_go_on_from_each_other_are_one_chain() -> None:
    def run(name: str, start: str) -> Manifest:
        return Manifest(run_id=name, config={"start_from": start}, baseline=Baseline(), iterations=[])

    runs = [run("c", "run:b:2"), run("alone", "base"), run("fork", "run:a:1"), run("b", "run:a"), run("a", "base")]
    assert [[manifest.run_id for manifest in chain] for chain in chains(runs)] == [
        ["c", "b", "a"],
        ["alone"],
        ["fork", "a"],
    ]


@pytest.fixture
def earlier(home: Path) -> Manifest:
    """A run of two finished iterations, and the first stages of a third."""
    from storage.files import Checkpoint
    from storage.runs import Evaluation

    def snapshot(digest: str) -> Snapshot:
        return Snapshot(digest=digest, table="instructions", rows=1)

    def record(iteration: int, done: bool) -> IterationRecord:
        made = {name: snapshot(f"{name}-{iteration}") for name in ("train_pool", "cache_pool", "teacher_responses")}
        if done:
            made["candidates"] = snapshot("candidates")
        evaluation = Evaluation(loss=1.0, score=None, rows=1, scored=0, details=snapshot("e")) if done else None
        student = Checkpoint(digest=f"student-{iteration}", content="")
        return IterationRecord(iteration=iteration, snapshots=made, student=student, evaluation=evaluation)

    config = resolve("smoke").model_dump(mode="json")
    manifest = Manifest(run_id="smoke-1", state="failed", config=config)
    manifest.iterations = [record(1, True), record(2, True), record(3, False)]
    manifest.baseline.snapshots["heldout"] = held_out("What is a volcano?")
    manifest.save()
    return manifest


def held_out(*texts: str) -> Snapshot:
    rows = [{"instruction_id": text, "instruction": text, "origin": "heldout"} for text in texts]
    return write_snapshot("instructions", rows, step="test", version=1)


def test_a_run_that_goes_on_holds_out_nothing_that_may_have_been_learned(earlier: Manifest) -> None:
    from flows.chain import start_of
    from flows.config import ConfigError

    start = start_of(resolve("smoke", ["start_from=run:smoke-1"]))
    assert start
    start.check_holds_out(held_out("What is a volcano?"))
    with pytest.raises(ConfigError, match="1 held-out instructions were not held out before"):
        start.check_holds_out(held_out("What is a volcano?", "Add 2 and 3."))


def test_held_out_figures_of_other_answers_are_not_shown_beside_a_runs_own(home: Path) -> None:
    from flows.chain import Start
    from flows.distill import Run
    from storage.catalog import query
    from tasks.refresh import Pools

    earlier = recorded.record_run()
    alike, baseline = earlier.iterations[0], earlier.baseline
    assert alike.evaluation
    rows = query("select * from rows", rows=alike.evaluation.details)
    elsewhere = recorded.snapshot("evaluations", rows, "evaluate", baseline.snapshots["heldout_answers"])
    other = alike.model_copy(
        update={"iteration": 2, "evaluation": alike.evaluation.model_copy(update={"details": elsewhere})}
    )
    alike.rolled_back = other.rolled_back = True  # so neither goes on, and neither is measured again
    pools = Pools(train=baseline.snapshots["seeds"], cache=baseline.snapshots["seeds"])
    run = Run(resolve("smoke"), Manifest(run_id="r", baseline=baseline))
    run.standing = baseline
    run.go_on_from(Start([alike, other], pools, baseline.snapshots["heldout"], same_teacher=False))
    assert list(run.manifest.evaluations()) == [0, 1]
    [warning] = run.manifest.warnings
    assert "iteration 2 are of other answers" in warning


def test_a_run_that_ends_at_once_says_how_and_still_refers_to_all_that_it_had_made(earlier: Manifest) -> None:
    from flows.approval import NotApproved
    from flows.chain import is_begun
    from flows.steps import recorded

    config = resolve("smoke", ["start_from=run:smoke-1"])
    assert not is_begun(config)
    made = set(earlier.pointers())
    earlier.model_copy(update={"run_id": config.run_id}).save()
    ends: list[tuple[BaseException, str, str]] = [
        (NotApproved("nobody answered"), "paused", "nobody answered"),
        (Pause(), "paused", "Resume there goes on"),
        (KeyboardInterrupt(), "interrupted", "everything finished is kept"),
        (RuntimeError("no key"), "failed", "RuntimeError: no key"),
    ]
    for error, state, why in ends:
        with pytest.raises(type(error)), recorded(config):
            raise error
        ended = load_manifest(config.run_id)
        assert ended and ended.error and (ended.state, why in ended.error) == (state, True)
    failed = load_manifest(config.run_id)
    assert failed and failed.state == "failed" and len(failed.iterations) == 3
    assert set(failed.pointers()) >= made and is_begun(config)
    with recorded(config):
        pass
    completed = load_manifest(config.run_id)
    assert completed and completed.pointers() == [] and not is_begun(config)


def test_a_run_whose_server_is_gone_names_it_and_no_bare_connection(home: Path) -> None:
    from flows.steps import LostServer, recorded

    config = resolve("smoke")
    with pytest.raises(LostServer, match="the Prefect server of this run"), recorded(config):
        raise httpx.ConnectError("[Errno 111] Connection refused")
    ended = load_manifest(config.run_id)
    assert ended and ended.state == "failed" and ended.error
    assert ended.error == "the Prefect server of this run does not answer any more ([Errno 111] Connection refused)"


def test_a_run_that_an_upgrade_gave_another_id_says_what_its_caps_do_not_count(home: Path) -> None:
    from flows.steps import recorded

    config = resolve("smoke")
    before = Manifest(run_id="smoke-1", config=config.model_dump(mode="json"))
    with Journal() as journal:
        journal.add([replace(ANSWER, run_id="smoke-1", cost_usd=1.5)])

    def warnings() -> list[str]:
        before.save()
        with recorded(config) as manifest:
            return manifest.warnings

    assert warnings() == [], "a run of this version, whose seeds may be others"
    del before.config["keep"]
    (warning,) = warnings()
    assert "smoke-1 had these settings" in warning and "1.50 dollars in 1 requests" in warning
    before.config["iterations"] = 7
    assert warnings() == [], "other settings"
    (home / "runs" / "smoke-1" / "manifest.json").write_text("{")
    with recorded(config) as manifest:
        assert manifest.warnings == [], "what is damaged of another run is no fault of this one"


def test_a_run_goes_on_after_any_finished_iteration_of_another(earlier: Manifest) -> None:
    from flows.chain import start_of

    last = start_of(resolve("smoke", ["start_from=run:smoke-1"]))
    first = start_of(resolve("smoke", ["start_from=run:smoke-1:1", "teacher.draw=1"]))
    assert last and first
    assert (last.records[-1].student.digest, last.pools.cache.digest, last.same_teacher) == (
        "student-2",
        "cache_pool-3",
        True,
    )
    assert (first.records[-1].student.digest, first.pools.train.digest, first.same_teacher) == (
        "student-1",
        "train_pool-2",
        False,
    )


@pytest.mark.parametrize("start", ["run:smoke-1:3", "run:gone"])
def test_a_run_does_not_go_on_from_what_is_not_there(earlier: Manifest, start: str) -> None:
    from flows.chain import start_of
    from flows.config import ConfigError

    with pytest.raises(ConfigError, match="start_from"):
        start_of(resolve("smoke", [f"start_from={start}"]))


def test_a_run_goes_on_only_where_both_its_records_and_its_pools_are_there(earlier: Manifest) -> None:
    from flows.chain import start_of
    from flows.config import ConfigError

    unfinished = earlier.iterations.pop()
    earlier.save()
    with pytest.raises(ConfigError, match="has 1 finished iterations to go on from, not 2"):
        start_of(resolve("smoke", ["start_from=run:smoke-1:2"]))  # the pools after it were not made
    going_on = start_of(resolve("smoke", ["start_from=run:smoke-1"]))
    assert going_on and going_on.pools.cache.digest == "cache_pool-2"
    earlier.next_pools = unfinished.snapshots
    earlier.save()
    going_on = start_of(resolve("smoke", ["start_from=run:smoke-1"]))
    assert going_on and going_on.pools.cache.digest == "cache_pool-3"
    with pytest.raises(ConfigError, match="not 3"):
        start_of(resolve("smoke", ["start_from=run:smoke-1:3"]))
    earlier.iterations = []
    earlier.save()
    with pytest.raises(ConfigError, match="has 0 finished"):
        start_of(resolve("smoke", ["start_from=run:smoke-1"]))


def test_latest_is_the_start_of_a_failed_run_and_the_end_of_a_good_one(earlier: Manifest) -> None:
    from flows.chain import settled

    wish = resolve("smoke", ["start_from=latest"])
    assert settled(wish).start_from == "base"
    assert settled(wish.model_copy(update={"name": "other"})).start_from == "base"
    earlier.state = "completed"
    earlier.save()
    assert settled(wish).start_from == "run:smoke-1:3"
    assert settled(wish.model_copy(update={"name": "other"})).start_from == "base"
    for named in ("base", "run:smoke-1:1"):
        assert settled(resolve("smoke", [f"start_from={named}"])).start_from == named


def test_latest_is_the_base_where_the_last_run_failed_before_a_run_could_go_on_from_another(earlier: Manifest) -> None:
    from flows.chain import settled

    earlier.state, earlier.config = "failed", {"name": earlier.config["name"]}  # as it was written then
    earlier.save()
    assert settled(resolve("smoke", ["start_from=latest"])).start_from == "base"


def test_a_person_can_lower_the_number_of_rows_and_not_raise_it() -> None:
    from flows.approval import lowered

    config = resolve("lion-7b")
    fewer = lowered(config, 100).generate
    assert (fewer.hard_rows, fewer.easy_rows) == (50, 50)
    uneven = lowered(resolve("lion-7b", ["generate.hard_rows=30", "generate.easy_rows=10"]), 20).generate
    assert (uneven.hard_rows, uneven.easy_rows) == (15, 5)
    assert lowered(config, 10_000) == config


def test_a_question_without_a_server_to_answer_it_is_refused() -> None:
    from flows.approval import Approval
    from flows.config import ConfigError

    with pytest.raises(ConfigError, match="make up"):
        Approval(resolve("smoke", ["approve=spend"]))


def test_a_stage_keeps_the_limit_of_what_it_uses() -> None:
    from storage.files import Checkpoint
    from tasks.models.endpoint import OpenAIModel
    from tasks.models.local import LocalModel
    from tasks.models.ready import ReadyModel
    from tasks.policies import limits_of

    checkpoint = Checkpoint(digest="a", content="b")
    here = ReadyModel(settings=LocalModel(), checkpoint=checkpoint)
    there = ReadyModel(settings=OpenAIModel(model="m"))
    assert limits_of(["x", here]) == limits_of(["x", checkpoint]) == {"lion-gpu"}
    assert limits_of(["x", there]) == {"lion-teacher-api"}
    assert limits_of(["x", [there, here]]) == {"lion-gpu", "lion-teacher-api"}
    assert limits_of(["x", 1, None]) == set()


@pytest.mark.parametrize(
    ("parameters", "override"),
    [
        ({"preset": "offline", "student": {"start": {"layers": 20}}}, "student.start.layers=20"),
        (
            {"preset": "lion-7b", "finetune": {"training": {"processes_per_node": 4}}},
            "finetune.training.processes_per_node=4",
        ),
        ({"preset": "lion-7b", "referee": {"sampling": {"max_tokens": 100}}}, "referee.sampling.max_tokens=100"),
    ],
)
def test_part_of_a_group_is_checked_once_it_is_laid_upon_the_preset(parameters: dict[str, Any], override: str) -> None:
    assert not distill.should_validate_parameters
    assert config_of(parameters) == resolve(parameters["preset"], [override])


def test_a_run_that_is_begun_again_shows_what_it_had_until_it_has_as_much(earlier: Manifest) -> None:
    again = Manifest(run_id=earlier.run_id, config=earlier.config)
    again.begin_again(earlier)
    again.save()
    shown = load_manifest(earlier.run_id)
    assert shown and (shown.state, len(shown.iterations), shown.started) == ("running", 3, earlier.started)
    again.state, again.error = "failed", "no key"
    again.save()
    shown = load_manifest(earlier.run_id)
    assert shown and (shown.state, shown.error, len(shown.iterations)) == ("failed", "no key", 3)
    again.iterations = earlier.iterations[:2]
    again.save()
    shown = load_manifest(earlier.run_id)
    assert shown and len(shown.iterations) == 2, "as many students are measured"
    assert set(shown.pointers()) >= set(earlier.pointers()), "gc keeps what the third iteration had begun"


def test_latest_passes_over_a_run_that_was_stopped_before_its_first_iteration(earlier: Manifest) -> None:
    from flows.chain import settled

    earlier.state, earlier.iterations = "completed", []
    earlier.config = earlier.config | {"start_from": "run:another:2"}
    earlier.save()
    assert settled(resolve("smoke", ["start_from=latest"])).start_from == "run:another:2"


def test_what_changes_no_answer_makes_no_other_teacher(earlier: Manifest) -> None:
    from flows.chain import start_of

    same = start_of(
        resolve("smoke", ["start_from=run:smoke-1", "teacher.license=mine", "teacher.model.max_batch_rows=7"])
    )
    other = start_of(resolve("smoke", ["start_from=run:smoke-1", "teacher.sampling.max_tokens=7"]))
    assert same and other and (same.same_teacher, other.same_teacher) == (True, False)
    reseeded = start_of(resolve("smoke", ["start_from=run:smoke-1", "seed=1"]))
    assert reseeded and not reseeded.same_teacher, "it draws other answers"
    earlier.config["teacher"]["a_setting_of_an_earlier_version"] = 1
    earlier.save()
    unknown = start_of(resolve("smoke", ["start_from=run:smoke-1"]))
    assert unknown and not unknown.same_teacher


class TestApproval:
    @pytest.fixture
    def said(self, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
        """What a person will say, one after the other; what they were asked goes to `asked`."""
        from flows import approval

        answers: list[dict[str, Any]] = []
        self.asked: list[tuple[str, str]] = []

        def ask(_: Any, text: str, key: str) -> approval.Answer:
            self.asked.append((text, key))
            return approval.Answer(**answers.pop(0))

        monkeypatch.setattr(approval.Approval, "_ask", ask)
        monkeypatch.setattr(approval, "on_a_server", lambda: True)
        return answers

    def before(self, manifest: Manifest, iteration: int, **changes: Any) -> tuple[int, bool]:
        """Rows that are wanted after the question, and whether the run ends."""
        from flows.approval import Approval
        from tasks.refresh import Pools

        config = resolve("smoke", ["approve=spend"]).model_copy(update=changes)
        approval = Approval(config)
        pools = Pools(train=held_out("a"), cache=held_out("a", "b", "c"))
        wanted = approval.before(config, manifest, iteration, pools, unanswered=3).generate
        return wanted.hard_rows + wanted.easy_rows, approval.is_over

    def test_fewer_rows_are_for_one_iteration_alone(self, earlier: Manifest, said: list[dict[str, Any]]) -> None:
        said += [{"max_new_rows": 2}, {}]
        assert [self.before(earlier, 1)[0], self.before(earlier, 2)[0]] == [2, 6]
        assert self.before(earlier, 1, approve="none") == (2, False), "what was said holds, whoever asks now"
        assert "| teacher | 3 |" in self.asked[0][0] and len(self.asked) == 2

    def test_whoever_stopped_a_run_is_asked_again_when_it_is_started_again(
        self, earlier: Manifest, said: list[dict[str, Any]]
    ) -> None:
        said += [{"decision": "stop here"}, {"decision": "go on"}]
        assert [self.before(earlier, 1)[1], self.before(earlier, 1, approve="none")[1]] == [True, False]
        assert [self.before(earlier, 1)[1] for _ in range(2)] == [False, False]
        assert len(self.asked) == 2

    def test_what_came_of_an_iteration_is_asked_about_once_there_is_one(
        self, earlier: Manifest, said: list[dict[str, Any]]
    ) -> None:
        first, said[:] = earlier.model_copy(update={"iterations": []}), [{}]
        self.before(first, 1, approve="iteration")
        assert not self.asked
        self.before(earlier, 4, approve="iteration")
        assert "| 2 | 1.000 |  | 0 | 0 |" in self.asked[0][0]

    def test_a_run_that_nobody_approved_of_can_be_gone_on_from(
        self, earlier: Manifest, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import flows.distill as page
        from flows import approval
        from flows.chain import start_of
        from tasks.refresh import Pools

        class Run:
            """One whose iterations cost nothing."""

            def __init__(self, config: DistillConfig, manifest: Manifest):
                self.config, self.manifest = config, manifest

            def baseline(self, start: Any) -> tuple[Pools, None]:
                self.manifest.baseline.snapshots["heldout"] = held_out("h")
                return Pools(train=held_out("a"), cache=held_out("a")), None

            def iterate(self, iteration: int, pools: Pools, student: None) -> tuple[Pools, None]:
                self.manifest.iterations.append(earlier.iterations[iteration - 1])
                self.manifest.save()
                assert not load_manifest(self.config.run_id).next_pools, "these would be of the iteration before"
                return Pools(train=held_out("b"), cache=held_out("a", "b")), None

            def unanswered_in(self, pools: Pools) -> int:
                return 0

            def is_stalled(self, *, last: bool) -> bool:
                return False

        def ask(*_: Any) -> None:
            waiting.append(start_of(resolve("smoke", [f"start_from=run:{config.run_id}"])))
            raise approval.NotApproved("nobody answered")

        monkeypatch.setattr(approval.Approval, "_ask", ask)
        monkeypatch.setattr(approval, "on_a_server", lambda: True)
        monkeypatch.setattr(page, "Run", Run)
        for name in ("write_report", "publish_catalog", "publish_artifacts"):
            monkeypatch.setattr(page, name, lambda *_: None)
        config = resolve("smoke", ["approve=iteration", "iterations=2"])
        waiting: list[Any] = []
        with pytest.raises(approval.NotApproved):
            page.distill.fn(config)
        start = start_of(resolve("smoke", [f"start_from=run:{config.run_id}"]))
        assert waiting == [start], "and so can one that is killed while it waits"
        assert start and (len(start.records), start.pools.train, start.pools.cache.rows) == (1, held_out("b"), 2)

    def test_a_forecast_tells_the_requests_to_come_and_what_each_role_has_cost(self, earlier: Manifest) -> None:
        from flows.approval import forecast
        from tasks.refresh import Pools

        with Journal() as journal:
            paid = replace(ANSWER, run_id=earlier.run_id)
            journal.add([paid, replace(paid, key="k2"), replace(paid, key="k3", role="referee", cost_usd=3.0)])
        pools = Pools(train=held_out("a"), cache=held_out("a", "b", "c"))

        def told(*settings: str) -> str:
            given = ["generate.hard_rows=6", "generate.easy_rows=2", "referee.votes=2", *settings]
            return forecast(resolve("lion-7b", given), earlier, pools, 7)

        text = told()
        assert "| teacher | 7 | $0.50 for 2 requests |\n| generator | 8 to 24 | $0.00 for 0 requests |" in text
        assert "| referee | 16 | $3.00 for 1 requests |" in text, (
            "three rows and one held-out one, two orders, two votes"
        )
        assert "From here on the run is estimated at $0.00" in text, "after three of three iterations"
        assert "| referee | 12 |" in told("evaluation.by_referee=false")
        assert "estimated" not in told("start_from=run:smoke-1"), "it is not known what that run begins with"

    def test_a_forecast_tells_what_is_still_to_be_paid_and_not_what_was(self, earlier: Manifest) -> None:
        from flows.approval import forecast
        from flows.estimate import estimate_run
        from tasks.refresh import Pools

        config = resolve("lion-7b", ["iterations=5", "generate.hard_rows=600"])
        lines, _ = estimate_run(config)
        to_come = sum(line.usd or 0 for line in lines if line.iteration in {4, 5})
        text = forecast(config, earlier, Pools(train=held_out("a"), cache=held_out("a", "b", "c")), 7)
        assert f"estimated at ${to_come:.2f} (" in text and to_come > 1


def test_a_server_of_another_home_is_not_taken_for_ones_own(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flows import service

    monkeypatch.setattr(service, "_answers", lambda: True)
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:4200/api"}):
        with pytest.raises(service.ServiceError, match="not started for"):
            service.start_server()
        monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:4200/api")
        assert service.start_server() is False


def test_what_has_a_page_for_any_address_is_not_taken_for_a_server(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flows import service

    replies = [httpx.Response(200, html="<p>A page.</p>"), httpx.Response(404), httpx.Response(200, json=True)]
    monkeypatch.setattr(service.httpx, "get", lambda *_, **__: replies.pop(0))
    assert [service._answers() for _ in range(3)] == [False, False, True]


def test_two_who_start_or_end_one_homes_server_wait_for_each_other(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flows import commands_service, service

    stopped, told = list[str](), Event()
    monkeypatch.setattr(service, "stop", stopped.append)
    monkeypatch.setattr(commands_service, "note", SimpleNamespace(print=lambda *_: told.set()))
    waiting = Thread(target=commands_service.down)
    with locked("service"):
        waiting.start()
        assert told.wait(30) and not stopped
    waiting.join()
    assert stopped == ["worker", "server"]


def test_a_server_of_another_machine_is_used_and_asks_for_no_password_of_ones_own(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows import service

    url = "http://prefect.example.com:4200/api"
    monkeypatch.setenv("PREFECT_API_URL", url)
    monkeypatch.delenv("PREFECT_SERVER_API_AUTH_STRING", raising=False)
    with temporary_settings({PREFECT_API_URL: url}):
        monkeypatch.setattr(service, "_answers", lambda: True)
        assert service.start_server() is False
        monkeypatch.setattr(service, "_answers", lambda: False)
        with pytest.raises(service.ServiceError, match="only with a password"):
            service.start_server()


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "http://127.0.0.1:9/api/"])
def test_a_server_that_would_not_be_heard_where_the_api_is_looked_for_is_not_started(
    home: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows import service

    monkeypatch.setattr(service, "_start", lambda name, arguments: pytest.fail("started"))
    with (
        temporary_settings({PREFECT_API_URL: url}),
        pytest.raises(service.ServiceError, match=r"export PREFECT_API_URL=http://127\.0\.0\.1:9/api$"),
    ):
        service.start_server()


def test_whoever_changed_a_deployments_parameters_on_the_server_is_told_that_they_are_gone() -> None:
    from flows import service

    was: Any = SimpleNamespace(work_pool_name="lion", parameters={"preset": "offline", "name": "mine", "seed": 1})
    now: Any = SimpleNamespace(work_pool_name="lion", parameters={"preset": "offline", "name": "nightly"})
    told = service._no_longer(was, now)
    assert told == " (its parameters are those of deployments/prefect.yaml again: name, seed)"
    assert service._no_longer(now, now) == service._no_longer(None, now) == ""


def test_what_is_to_be_registered_where_no_server_answers_says_how_to_start_one(home: Path) -> None:
    from flows import service

    with (
        temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}),
        pytest.raises(service.ServiceError, match=r"no Prefect server answers at http://127\.0\.0\.1:9 .*`lion up`"),
    ):
        service.register()


@contextmanager
def posing_as(name: str, home: Path, **variables: str) -> Iterator[int]:
    """A process that is taken for the server or the worker of `home`, unless its own variables say that it is none."""
    code = "import time; time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", code, "prefect", name], env=os.environ | variables)
    try:
        (home / "prefect").mkdir(parents=True, exist_ok=True)
        (home / "prefect" / f"{name}.pid").write_text(str(child.pid))
        deadline = time.monotonic() + 10
        while b"prefect" not in Path(f"/proc/{child.pid}/cmdline").read_bytes() and time.monotonic() < deadline:
            time.sleep(0.01)
        yield child.pid
    finally:
        child.kill()
        child.wait()


def test_a_process_of_another_home_is_not_taken_for_ones_own(home: Path) -> None:
    from flows import service

    for value, ours in ((str(home), True), ("/another", False)):
        with posing_as("server", home, LION_HOME=value) as pid:
            found = service._process("server")
            assert (found is not None and found.pid == pid) is ours


def test_a_server_that_an_earlier_version_started_is_told_from_one_of_this_version(home: Path) -> None:
    from flows import service

    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:4200/api"}):
        assert not service.is_outdated("server"), "none runs"
        now = service.environment()
        with posing_as("server", home, **now):
            assert not service.is_outdated("server")
        before = now | {"PREFECT_SERVER_CSRF_PROTECTION_ENABLED": "false"}
        with posing_as("server", home, **before):
            assert service.is_outdated("server")


def test_a_worker_that_lacks_a_key_or_looks_into_another_pool_is_told_from_one_as_it_would_be_now(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows import service

    with (
        temporary_settings({PREFECT_API_URL: "http://127.0.0.1:4200/api"}),
        posing_as("worker", home, **service.environment()),
    ):
        assert not service.is_outdated("worker")
        for name in ("OPENAI_API_KEY", "LION_WORK_POOL"):
            with monkeypatch.context() as changed:
                changed.setenv(name, "another")
                assert service.is_outdated("worker")
        assert not service.is_outdated("worker")
