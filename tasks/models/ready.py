"""A model that can be asked: settings, and for a local one the checkpoint. `answer` is the one way to ask it."""

from collections.abc import Iterable, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Discriminator, Tag

from storage.files import Checkpoint
from tasks.models.budget import Account
from tasks.models.chat import OnProgress, Reply, Request, Sampling
from tasks.models.client import answer_all
from tasks.models.endpoint import OpenAIModel
from tasks.models.exchange import check_access
from tasks.models.local import LocalModel, answer_locally
from tasks.models.prices import price_of


def _kind(settings: Any) -> str:
    """What tells the kinds apart: a model is local unless it says otherwise."""
    return settings.get("kind", "local") if isinstance(settings, dict) else getattr(settings, "kind", "local")


ModelSettings = Annotated[
    Annotated[LocalModel, Tag("local")] | Annotated[OpenAIModel, Tag("openai")], Discriminator(_kind)
]


class ReadyModel(BaseModel):
    """What a stage is given to ask."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    settings: ModelSettings
    checkpoint: Checkpoint | None = None  # null for an endpoint


def check_access_to(models: Iterable[ModelSettings]) -> None:
    """See, before anything is paid or computed, that those who are asked far away take their key, and what they cost.

    Raises:
        FatalEndpointError: a key is not there, or not taken.
        UnknownPrice: neither the table nor the settings know it.
    """
    for model in models:
        if isinstance(model, OpenAIModel):
            check_access(model)
            price_of(model.model, model.price)


def answer(
    model: ReadyModel,
    requests: Sequence[Request],
    sampling: Sampling,
    *,
    seed: int,
    on_progress: OnProgress,
    account: Account | None = None,
) -> list[Reply]:
    """Replies in the order of the requests, from wherever the model is.

    Args:
        account: who pays; an endpoint is not asked without one.

    Raises:
        JobError: a local model's process ended without a result.
        ModelError: an endpoint does not answer, or a cap is reached; what had arrived is in the journal.
    """
    if not requests:
        return []
    if isinstance(model.settings, OpenAIModel):
        assert account is not None, "an endpoint is asked on somebody's account"
        return answer_all(model.settings, requests, sampling, account, on_progress)
    assert model.checkpoint is not None, "a local model is prepared before it is asked"
    return answer_locally(model.settings, model.checkpoint, requests, sampling, seed=seed, on_progress=on_progress)
