"""Going on from an earlier run: nights in a row make one chain, the same as one run of as many iterations.

A run that goes on takes over the records of the iterations before it, so that it shows the whole chain, and its own
iterations are counted on. What `latest` means is settled before a run gets its id: a run never changes its start.
"""

import math
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from flows.config import ConfigError, DistillConfig
from storage.files import Snapshot, StorageError
from storage.journal import spend_of
from storage.pools import by_id
from storage.runs import IterationRecord, Manifest, list_manifests, load_manifest, named_start
from tasks.policies import identity
from tasks.refresh import Pools
from tasks.teacher import TeacherConfig


@dataclass(frozen=True)
class Start:
    """Where a run goes on."""

    records: list[IterationRecord]  # of the iterations so far
    pools: Pools
    heldout: Snapshot  # what was kept out of these pools
    same_teacher: bool  # its answers may be taken over

    def check_holds_out(self, heldout: Snapshot) -> None:
        """See that no instruction is held out now that may be in the pools.

        Raises:
            ConfigError: there are some.
        """
        new = by_id(heldout, []).keys() - by_id(self.heldout, []).keys()
        if new:
            raise ConfigError(
                f"start_from: {len(new)} held-out instructions were not held out before, so the pools may hold them, and "
                "the student have learned them. Keep `seeds.heldout` as it was, or begin from the base."
            )


def settled(config: DistillConfig) -> DistillConfig:
    """The configuration with `latest` replaced by what it means now.

    That is the end of the last run of this name; the base where there is none; and where the last run has not ended
    well, the start which that run had: with unchanged settings it is then the same run, and goes on where it failed.
    """
    if config.start_from != "latest":
        return config
    last = next((run for run in list_manifests() if run.config["name"] == config.name), None)
    if last is None:
        start = "base"
    elif last.state == "completed":
        start = f"run:{last.run_id}:{len(last.iterations)}"
    else:
        start = last.start_from
    # Somebody stopped that run before its first iteration: it ended where it began.
    while (named := named_start(start)) and named[1] == 0:
        stopped = load_manifest(named[0])
        start = stopped.start_from if stopped else "base"
    return config.model_copy(update={"start_from": start})


def is_begun(config: DistillConfig) -> bool:
    """Whether this very run was begun before and has not come to its end."""
    before = load_manifest(config.run_id)
    return before is not None and before.state != "completed"


def begun_by(flow_run: str) -> list[Manifest]:
    """The runs that a flow run of Prefect's has been at: some only where it is retried, or was suspended and is resumed."""
    return [run for run in list_manifests() if flow_run in run.flow_runs]


def before_upgrade(config: DistillConfig) -> Manifest | None:
    """The run that these settings were in an earlier version, which knew fewer of them; each new one changes all ids."""
    try:
        runs = list_manifests()
    except StorageError:  # what is damaged of another run is no fault of this one
        return None
    for run in runs:
        try:
            settings = DistillConfig.model_validate(run.config)
        except ValidationError:
            continue
        knew_fewer = settings.model_dump(mode="json") != run.config
        if knew_fewer and run.run_id != config.run_id and identity(settings) == identity(config):
            return run
    return None


def paid_in_chain(run: Manifest) -> float:
    """Dollars that a run has paid, with those of the runs that it goes on from, as far as it does."""
    usd, last = 0.0, math.inf
    chained: Manifest | None = run
    while chained:
        usd += sum(line.usd for line in spend_of(chained.run_id) if line.iteration <= last)
        run_id, number = named_start(chained.start_from) or (None, None)
        chained, last = load_manifest(run_id) if run_id else None, math.inf if number is None else number
    return usd


def start_of(config: DistillConfig) -> Start | None:
    """Where this run goes on; None where it begins from the base.

    Raises:
        ConfigError: there is no such run, or its iteration was not finished.
    """
    if not (named := named_start(config.start_from)):
        return None
    run_id, number = named
    earlier = load_manifest(run_id)
    if earlier is None:
        raise ConfigError(f"start_from: no run {run_id!r} here. `lion runs` lists them.")
    left = [*(record.snapshots for record in earlier.iterations[1:]), earlier.next_pools]  # the pools after each
    finished = [
        record
        for record, pools in zip(earlier.iterations, left)
        if "candidates" in record.snapshots and "cache_pool" in pools
    ]
    wanted = len(finished) if number is None else number
    if not 0 < wanted <= len(finished):
        raise ConfigError(f"start_from: {run_id} has {len(finished)} finished iterations to go on from, not {wanted}.")
    following = left[wanted - 1]
    return Start(
        records=finished[:wanted],
        pools=Pools(train=following["train_pool"], cache=following["cache_pool"]),
        heldout=earlier.baseline.snapshots["heldout"],
        same_teacher=_same_teacher(earlier.config, config),
    )


def _same_teacher(earlier: dict[str, Any], config: DistillConfig) -> bool:
    """Whether an earlier run's teacher would be asked the same, whatever else was said of it."""
    try:
        teacher = TeacherConfig.model_validate(earlier["teacher"])
    except ValidationError:  # of an earlier version
        return False
    return identity(teacher) == identity(config.teacher) and earlier["seed"] == config.seed
