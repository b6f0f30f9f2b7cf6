"""Which checkpoint a person means: a run's best student, one of its iterations, a folder, a model's name."""

from dataclasses import dataclass
from typing import Any

from flows.terminal import Refusal, find_run, note
from storage.files import Checkpoint, expanded
from storage.runs import Manifest, list_manifests
from tasks.models.local import LocalModel
from tasks.prepare import base_model


@dataclass(frozen=True, slots=True)
class Student:
    """A checkpoint of this home, and where it comes from."""

    name: str  # as it was named, or RUN/ITERATION
    checkpoint: Checkpoint
    manifest: Manifest | None = None  # the run that made it
    iteration: int | None = None  # 0: before any training

    @property
    def run_id(self) -> str | None:
        """The run that made it, where one of this home did."""
        return self.manifest.run_id if self.manifest else None

    @property
    def config(self) -> dict[str, Any]:
        """The settings of the run that made it; empty for a model from elsewhere."""
        return self.manifest.config if self.manifest else {}

    @property
    def model(self) -> LocalModel:
        """How it is run."""
        return LocalModel.model_validate(self.config["student"]["model"]) if self.config else LocalModel()

    @property
    def system_prompt(self) -> str | None:
        """What it was trained to hear before every instruction."""
        return self.config["student"]["system_prompt"] if self.config else None


def best_student(manifest: Manifest) -> Student:
    """The student of a run to use: the last that was not rolled back.

    Raises:
        Refusal: the run has no student yet.
    """
    best = manifest.best()
    if best is None:
        raise Refusal(f"{manifest.run_id} has no student yet. The same command that started it goes on.")
    iteration, checkpoint = best
    return Student(f"{manifest.run_id}/{iteration}", checkpoint, manifest, iteration)


def find_student(name: str | None) -> Student:
    """The student that `name` means.

    Args:
        name: RUN or the beginning of its id (its best student), RUN/ITERATION, the path of a checkpoint in this
            home, a folder with a model, `embedded`, or a Hub id. Null: the best student of the last run.

    Raises:
        Refusal: nothing is called that, or its checkpoint is gone.
        JobError: a model from elsewhere cannot be had.
    """
    if name is not None and not name.strip():
        raise Refusal("the name of a student is empty: leave it out for the best of the last run, or name one.")
    student = _named(name)
    check_is_there(student)
    return student


def check_is_there(student: Student) -> None:
    """See that a checkpoint of this home is still there.

    Raises:
        Refusal: it is gone.
    """
    path = student.checkpoint.path
    if not (path / "config.json").is_file():
        raise Refusal(
            f"the checkpoint of {student.name} is gone: {path}. The same command as before notices it, and makes it again."
        )


def _named(name: str | None) -> Student:
    if name is None:
        return best_student(find_run(None))
    manifests = list_manifests()
    run, _, iteration = name.partition("/")
    folder = expanded(name)
    if run and not folder.is_dir():
        found = [manifest for manifest in manifests if manifest.run_id.startswith(run)]
        if found and not iteration:
            return best_student(found[0])
        if found and iteration.isdigit():
            return _of_iteration(found[0], int(iteration))
        if found and iteration:
            raise Refusal(f"{name}: an iteration is a number, as in {found[0].run_id}/1.")
    for manifest in manifests:
        for number, checkpoint in manifest.students():
            if checkpoint.path == folder.resolve():
                return Student(f"{manifest.run_id}/{number}", checkpoint, manifest, number)
    if manifests and name != "embedded" and not folder.is_dir():
        there = ", ".join(manifest.run_id for manifest in manifests)
        note.print(
            f"{name} is no run here (there are: {there}) and no folder: taken for a model's name.", soft_wrap=True
        )
    return Student(name, base_model(LocalModel(model_name_or_path=name)))


def _of_iteration(manifest: Manifest, iteration: int) -> Student:
    students = dict(manifest.students())
    if iteration not in students:
        there = ", ".join(map(str, students)) or "none"
        raise Refusal(f"{manifest.run_id} has no student of iteration {iteration}. There are: {there}.")
    return Student(f"{manifest.run_id}/{iteration}", students[iteration], manifest, iteration)
