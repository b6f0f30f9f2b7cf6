"""A flow whose one stage answers in shards, in a process of its own, which tests may kill.

python -m tests.sharded threads 3 200
"""

import sys

from prefect import flow

from flows.terminal import prepare_for_a_flow
from storage.files import Checkpoint, home
from tasks.models.chat import Sampling
from tasks.models.local import LocalModel, answer_locally
from tasks.policies import stage
from tasks.shards import TaskRunner, shards_by
from tests.tiny import requests

SAMPLED = Sampling(temperature=0.8, max_tokens=48)
TINY = Checkpoint(digest="tiny", content="")


def texts(shards: int, count: int) -> list[str | None]:
    """Answers in the order of the requests, two rows of a shard at a time."""
    model = LocalModel(precision="fp32", shards=shards, max_batch_rows=2)
    replies = answer_locally(model, TINY, requests(count), SAMPLED, seed=3, on_progress=lambda *_: None)
    assert [reply.id for reply in replies] == [str(number) for number in range(count)]
    return [reply.text for reply in replies]


@stage("student", version=1)
def answer(shards: int, count: int) -> list[str | None]:
    return texts(shards, count)


@flow
def student(task_runner: TaskRunner, shards: int, count: int) -> list[str | None]:
    with shards_by(task_runner):
        named = answer.with_options(task_run_name="student · iteration 1", result_storage=home() / "results")
        return named(shards, count)


if __name__ == "__main__":
    prepare_for_a_flow()  # and mark the temporary server as ours
    student(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))  # type: ignore[arg-type]
