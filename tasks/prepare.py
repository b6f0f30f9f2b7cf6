"""Get the models ready: fetch or convert a base model, prune a student out of one. Each is made once a home."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from storage.files import Checkpoint, Snapshot, digest_of_model, expanded
from storage.pools import read_rows
from tasks.jobs.launch import make_checkpoint
from tasks.models.chat import conversation
from tasks.models.local import LocalModel
from tasks.policies import stage
from tasks.progress import progress

VERSION = 1
SAMPLE_PROMPTS = 20  # enough for a stable order of the layers: their influence differs by far more than its noise


class StudentInit(BaseModel):
    """Where the student starts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    init: Literal["base", "pruned"] = Field(
        "base", description="base: the model as it is. pruned: the model without its layers of least influence."
    )
    layers: int | None = Field(None, ge=1, description="How many layers a pruned student keeps.")

    @model_validator(mode="after")
    def _layers_go_with_pruned(self) -> "StudentInit":
        if (self.init == "pruned") != (self.layers is not None):
            raise ValueError("`layers` goes with `init: pruned`, and only with it")
        return self


def source_digest(settings: LocalModel) -> str:
    """What a model's name stands for: the content of a local folder, otherwise the name itself.

    Raises:
        ModelNotFound: the name looks like a folder, and no model with safetensors is in it.
    """
    name = settings.model_name_or_path
    folder = expanded(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelNotFound(f"{name}: no config.json in this folder, so no model. Name the folder of a checkpoint.")
        if not any(folder.glob("*.safetensors")):
            raise ModelNotFound(f"{name}: no *.safetensors in this folder. Save the model as safetensors first.")
        return digest_of_model(folder)
    if name.startswith(("/", "./", "../", "~")):
        raise ModelNotFound(f"{name}: no such folder. Name a folder, a Hub id, or `embedded`.")
    return name


class ModelNotFound(ValueError):
    """A model's name leads nowhere."""


@stage("prepare", version=VERSION)
def prepare_model(settings: LocalModel, source: str) -> Checkpoint:
    """Bring a base model into the home: the embedded one converted, one from the Hub fetched, a folder linked.

    Args:
        source: what `source_digest` says of it now.

    Raises:
        JobError: the model cannot be had.
    """
    name = settings.model_name_or_path
    folder = expanded(name)
    job: dict[str, Any] = {"source": str(folder.resolve()) if folder.is_dir() else name}
    with progress("prepare the model"):
        return make_checkpoint("tasks.jobs.convert", job, {"version": VERSION, "source": source})[0]


def base_model(settings: LocalModel) -> Checkpoint:
    """The base model, outside of any run: found again by its content where it is in the home.

    Raises:
        ModelNotFound: the name looks like a folder, and no model is in it.
        JobError: the model cannot be had.
    """
    return prepare_model.fn(settings, source_digest(settings))


@stage("prune", version=VERSION)
def prune_student(config: StudentInit, base: Checkpoint, pool: Snapshot) -> Checkpoint:
    """Make a student from a base model by dropping the layers that change their input least.

    Source: Men et al. 2024, ShortGPT (arXiv 2403.03853).

    Raises:
        JobError: the model has not that many layers, or is not of a kind that can be pruned.
    """
    return prune_by_prompts(
        config, base, [conversation(row["instruction"], row["input"]) for row in read_rows(pool)[:SAMPLE_PROMPTS]]
    )


def prune_by_prompts(config: StudentInit, base: Checkpoint, prompts: list[list[dict[str, str]]]) -> Checkpoint:
    """As `prune_student`, the layers' influence being that on these conversations."""
    job = {"model": str(base.path), "layers": config.layers, "prompts": prompts}
    identity = {"version": VERSION, "base": base.digest, "layers": config.layers, "prompts": prompts}
    with progress("prune the student"):
        return make_checkpoint("tasks.jobs.prune", job, identity)[0]
