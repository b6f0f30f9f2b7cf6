"""A model that can be asked: settings and checkpoint. `answer` is the one way to ask it."""

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from storage.files import Checkpoint
from tasks.models.chat import OnProgress, Reply, Request, Sampling
from tasks.models.local import LocalModel, answer_locally

ModelSettings = LocalModel  # where other kinds of model join: a union, told apart by `kind`


class ReadyModel(BaseModel):
    """What a stage is given to ask."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    settings: ModelSettings
    checkpoint: Checkpoint


def answer(
    model: ReadyModel, requests: Sequence[Request], sampling: Sampling, *, seed: int, on_progress: OnProgress
) -> list[Reply]:
    """Replies in the order of the requests.

    Raises:
        JobError: the model's process ended without a result.
    """
    if not requests:
        return []
    return answer_locally(model.settings, model.checkpoint, requests, sampling, seed=seed, on_progress=on_progress)
