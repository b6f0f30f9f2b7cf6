"""The whole configuration of a run, composed from the stages' own; presets, and overrides on top of them.

>>> resolve("offline", ["iterations=1", "discriminate.threshold=0.4"]).iterations
1
"""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from storage.files import OPERATIONAL, digest_of
from tasks.discriminate import DiscriminateConfig
from tasks.evaluate import EvaluationConfig
from tasks.finetune import FinetuneConfig
from tasks.generate import GenerateConfig
from tasks.models.budget import Budget
from tasks.models.ready import ModelSettings
from tasks.policies import identity
from tasks.referee import LLMReferee, RefereeConfig, ReferenceReferee
from tasks.seed import SeedConfig
from tasks.selection import StopConfig
from tasks.shards import TaskRunner
from tasks.student import StudentConfig
from tasks.teacher import TeacherConfig

PRESETS = Path(__file__).parent / "presets"

Settings = TypeVar("Settings", bound=BaseModel)


class ConfigError(ValueError):
    """A setting cannot be used. The message names it and the way out."""


# What one changes from run to run; a deployment's form has these on top.
Iterations = Annotated[int, Field(ge=1, le=100, description="How often the loop turns (the paper: 3).")]
StartFrom = Annotated[
    str,
    Field(
        pattern=r"^(base|latest|run:[a-z0-9-]+(:[1-9]\d*)?)$",
        description="`base`: the first pools and an untrained student. `latest`: go on where the last run of this name "
        "ended, or failed. `run:ID` or `run:ID:ITERATION`: go on from there.",
    ),
]
Approve = Annotated[
    Literal["none", "spend", "iteration"],
    Field(
        description="Wait for a person: before each iteration, with what it will ask of models (`spend`), or after "
        "each, with what came of it (`iteration`). Needs a Prefect server.",
        json_schema_extra=OPERATIONAL,
    ),
]
ApproveWithin = Annotated[
    int,
    Field(
        ge=1,
        le=30 * 86_400,
        description="Seconds that a question to a person stays open. Then the run ends, with everything kept.",
        json_schema_extra=OPERATIONAL,
    ),
]
RunShards = Annotated[
    TaskRunner,
    Field(
        description="What runs the shards of a local model: threads on this machine, or Ray (pip install -e '.[ray]'), "
        "the one at RAY_ADDRESS or a local one.",
        json_schema_extra=OPERATIONAL,
    ),
]


class DistillConfig(BaseModel):
    """Adversarial distillation: N iterations of imitation, discrimination and generation."""

    model_config = ConfigDict(frozen=True, extra="forbid", title="Distillation")

    name: str = Field(
        "run", pattern=r"^[a-z0-9][a-z0-9-]{0,39}$", description="The run's name: small letters, digits, -."
    )
    iterations: Iterations = 3
    start_from: StartFrom = "base"
    approve: Approve = "none"
    approve_within: ApproveWithin = 86_400
    task_runner: RunShards = "threads"
    seed: int = Field(0, ge=0, le=2**31 - 1, description="Of everything random. The same seed gives the same result.")
    seeds: SeedConfig = Field(SeedConfig(), description="The first instructions, and the held-out ones.")
    teacher: TeacherConfig = Field(TeacherConfig(), description="The model that is learned from.")
    student: StudentConfig = Field(StudentConfig(), description="The compact model that learns.")
    finetune: FinetuneConfig = Field(FinetuneConfig(), description="Imitation: how the student is trained.")
    referee: RefereeConfig = Field(ReferenceReferee(), description="Who compares the two models' answers.")
    discriminate: DiscriminateConfig = Field(DiscriminateConfig(), description="Where hard begins.")
    generate: GenerateConfig = Field(GenerateConfig(), description="Who writes new instructions, and how many.")
    budget: Budget = Field(Budget(), description="What a run may spend at most.", json_schema_extra=OPERATIONAL)
    evaluation: EvaluationConfig = Field(EvaluationConfig(), description="The held-out check after each iteration.")
    keep: Literal["best", "last"] = Field(
        "best", description="best: a student that is worse than an earlier one is not built upon. last: it is (paper)."
    )
    stop: StopConfig = Field(StopConfig(), description="When the loop ends before its last iteration.")

    def models(self) -> dict[str, ModelSettings]:
        """Every model of the run by what it does: teacher, teacher 2 ..., student, generator, referee."""
        teachers = enumerate(self.teacher.models, 1)
        found: dict[str, ModelSettings] = {
            f"teacher {number}" if number > 1 else "teacher": model for number, model in teachers
        }
        found |= {"student": self.student.model, "generator": self.generate.model}
        return found | ({"referee": self.referee.model} if isinstance(self.referee, LLMReferee) else {})

    def warnings(self) -> list[str]:
        """What is possible and perhaps not meant, a sentence each."""
        models = {name: identity(model) for name, model in self.models().items()}
        judged = [name for name in models if name.startswith("teacher") and models[name] == models.get("referee")]
        if not judged:
            return []
        return [
            f"The referee and the {judged[0]} are the same model. Models prefer their own answers, "
            "so gaps and relative scores lean to the teacher's side."
        ]

    @property
    def run_id(self) -> str:
        """The run's name and a digest of all that decides its result: the same command finds the same run.

        Raises:
            SeedError: a file of instructions is not there.
        """
        return f"{self.name}-{digest_of([identity(self), self.seeds.digests()])[:8]}"


def presets() -> list[str]:
    """The names of all presets."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def resolve(
    preset: str | None = None,
    overrides: Sequence[str] = (),
    file: Path | None = None,
    base: dict[str, Any] | None = None,
    **given: Any,
) -> DistillConfig:
    """Defaults, then `base` (another run's settings), a preset, a file, `key.path=value` overrides; the later wins.

    Raises:
        ConfigError: a name is unknown, or a value is out of its bounds. Names the field and what would do.
    """
    settings: dict[str, Any] = base or {}
    if preset is not None:
        if preset not in presets():
            raise ConfigError(f"no preset {preset!r}. There are: {', '.join(presets())}.")
        settings = {"name": preset, **_load(PRESETS / f"{preset}.yaml")}
    if file is not None:
        settings = _merged(settings, _load(file))
    return _validated(DistillConfig, _merged(_overridden(settings, overrides), given))


def changed(settings: Settings, overrides: Sequence[str]) -> Settings:
    """Settings of any kind with `key.path=value` laid upon them.

    Raises:
        ConfigError: as for `resolve`.
    """
    return _validated(type(settings), _overridden(settings.model_dump(mode="json"), overrides))


def _overridden(settings: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals or not path:
            raise ConfigError(f"--set {override}: write it as key.path=value, for example --set iterations=1")
        try:
            value = yaml.load(text, _OnceEach)
        except (yaml.YAMLError, RecursionError) as error:
            raise ConfigError(f"--set {override}: not YAML ({' '.join(str(error).split())}).") from None
        settings = _merged(settings, _nested(path.strip().split("."), value))
    return settings


def _validated(kind: type[Settings], settings: dict[str, Any]) -> Settings:
    try:
        return kind.model_validate(settings)
    except ValidationError as error:
        raise ConfigError(_faults_in(error)) from None


def _load(path: Path) -> dict[str, Any]:
    try:
        settings = yaml.load(path.read_text(encoding="utf-8"), _OnceEach)
    except OSError as error:
        raise ConfigError(f"{path}: {(error.strerror or str(error)).lower()}.") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: not YAML ({' '.join(str(error).split())}).") from None
    if not isinstance(settings or {}, dict):
        raise ConfigError(f"{path}: expected settings by name, as in `iterations: 2`.")
    return settings or {}


class _OnceEach(yaml.SafeLoader):
    """YAML in which no name stands twice (of two `budget:` the first would be passed over in silence), and in which 5e-05
    is a number, as JSON writes it and `explain` prints it."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for name, _ in node.value:
            if (said := str(name.value)) in seen:
                raise yaml.MarkedYAMLError(None, None, f"{said} is there twice", name.start_mark)
            seen.add(said)
        return node


_OnceEach.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _nested(path: list[str], value: Any) -> dict[str, Any]:
    for key in reversed(path):
        value = {key: value}
    return value


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` laid upon `base`, level by level. A change of `kind`, which is local where none is said, starts that level
    anew."""
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            kind = old.get("kind", "local")
            value = _merged(old, value) if value.get("kind", kind) == kind else value
        result[key] = value
    return result


def _faults_in(error: ValidationError) -> str:
    """All faults of a configuration, a line each: the field, what it was, what is wanted."""
    lines = []
    for fault in error.errors():
        field = ".".join(str(part) for part in fault["loc"] if part not in {"local", "openai", "llm", "reference"})
        if fault["type"] == "extra_forbidden":
            lines.append(f"{field}: no such setting. `lion config` lists them all.")
        else:
            message = fault["msg"].removeprefix("Value error, ")
            untold = isinstance(fault["input"], dict) or field.endswith("base_url")  # a password or a key may be in it
            given = "" if untold else f" (given: {fault['input']!r})"
            lines.append(f"{field or 'settings'}: {message[:1].lower()}{message[1:]}{given}")
    return "\n".join(lines)


def explain(config: BaseModel) -> str:
    """All settings as YAML, each under its help text; the file can be given back with --config."""
    return "\n".join(_explained_fields(config, ""))


def _explained_fields(model: BaseModel, indent: str) -> Iterator[str]:
    plain = model.model_dump(mode="json")
    for name, field in type(model).model_fields.items():
        value = getattr(model, name)
        if field.description:
            yield f"{indent}# {field.description}"
        if isinstance(value, BaseModel):
            yield f"{indent}{name}:"
            yield from _explained_fields(value, indent + "  ")
        else:
            yield f"{indent}{name}: {json.dumps(plain[name], ensure_ascii=False)}"
