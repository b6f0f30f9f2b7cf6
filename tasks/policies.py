"""How a stage is cached, locked, retried and named: `@stage(...)` around an ordinary typed function.

A stage's cache key says *what* is made, in content alone: stage, version, prompt texts, the settings that change
the result, the digests of the inputs. Never a run, a clock time or the source of the function, and of places only the
name that a local model was given. Whoever changes what a stage makes raises its `version`; whoever does not, keeps what
users have paid for.

The record of a finished stage is a small JSON file under `$LION_HOME/results`, written by Prefect. It is trusted
only while everything it points to is there and undamaged; otherwise that stage, and that one alone, runs again.
"""

import functools
import inspect
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any, Literal, TextIO

from prefect import task
from prefect.cache_policies import CacheKeyFnPolicy
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State, TaskRun
from prefect.concurrency.sync import concurrency
from prefect.context import TaskRunContext
from prefect.exceptions import ObjectNotFound
from prefect.locking.protocol import LockManager
from prefect.serializers import JSONSerializer, Serializer
from prefect.settings import PREFECT_API_URL
from prefect.tasks import Task
from prefect.transactions import IsolationLevel
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from storage.files import Checkpoint, Pointer, digest_of, flock, lock_file
from storage.runs import pointers_in
from tasks.models.budget import Account
from tasks.models.errors import ModelError
from tasks.models.ready import ReadyModel


def identity(value: Any) -> Any:
    """The part of a setting or an input that changes a stage's result, as JSON-like data.

    Raises:
        TypeError: the value has no identity of its own (an open file, a function).
    """
    if isinstance(value, Pointer):
        return value.digest
    if isinstance(value, BaseModel):
        fields = type(value).model_fields
        return {name: identity(getattr(value, name)) for name, field in fields.items() if not _is_operational(field)}
    if isinstance(value, dict):
        return {str(key): identity(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [identity(item) for item in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise TypeError(f"a stage cannot be keyed by a {type(value).__name__}: {value!r}")


def _is_operational(field: FieldInfo) -> bool:
    return isinstance(field.json_schema_extra, dict) and bool(field.json_schema_extra.get("operational"))


def stage_key(name: str, version: int, prompts: Iterable[str], parameters: dict[str, Any]) -> str:
    """The cache key of a stage for these parameters. Who pays (an Account) is not part of it."""
    kept = {key: identity(value) for key, value in parameters.items() if not isinstance(value, Account)}
    return f"{name}-{digest_of({'stage': name, 'version': version, 'prompts': list(prompts), 'parameters': kept})}"


class WholeResult(Serializer):  # no parameter: its registry cannot take one
    """JSON that does not load when what it points to is missing or damaged: Prefect then runs the stage again."""

    type: Literal["lion-whole-result"] = "lion-whole-result"

    def dumps(self, obj: Any) -> bytes:
        return JSONSerializer().dumps(obj)

    def loads(self, blob: bytes) -> Any:
        result = JSONSerializer().loads(blob)
        for pointer in pointers_in(result):
            pointer.verify()
        return result


class KernelLocks(LockManager):
    """One `flock` a stage key: two runs on one home never do a stage twice, and a dead holder holds nothing.

    Prefect's own file locks outlive a `kill -9` of their holder and then hang for ever.
    """

    def __init__(self) -> None:
        self._held: dict[str, tuple[str, TextIO]] = {}  # key -> holder, open file

    def __reduce__(self) -> tuple[Any, ...]:
        return KernelLocks, ()  # in another process, where a stage's shards may run, it holds nothing

    def acquire_lock(
        self, key: str, holder: str, acquire_timeout: float | None = None, hold_timeout: float | None = None
    ) -> bool:
        if self.is_lock_holder(key, holder):
            return True
        path = lock_file(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
        if not flock(file, acquire_timeout):
            file.close()
            return False
        self._held[key] = (holder, file)
        return True

    async def aacquire_lock(
        self, key: str, holder: str, acquire_timeout: float | None = None, hold_timeout: float | None = None
    ) -> bool:
        return self.acquire_lock(key, holder, acquire_timeout, hold_timeout)

    def release_lock(self, key: str, holder: str) -> None:
        if self.is_lock_holder(key, holder):
            self._held.pop(key)[1].close()

    def is_locked(self, key: str) -> bool:
        return not self.wait_for_lock(key, timeout=0)

    def is_lock_holder(self, key: str, holder: str) -> bool:
        return key in self._held and self._held[key][0] == holder

    def wait_for_lock(self, key: str, timeout: float | None = None) -> bool:
        path = lock_file(key)
        if not path.exists():
            return True
        with path.open("w") as file:
            return flock(file, timeout)

    async def await_for_lock(self, key: str, timeout: float | None = None) -> bool:
        return self.wait_for_lock(key, timeout)


def may_pass(task: Task[..., Any], task_run: TaskRun, state: State[Any]) -> bool:
    """Whether trying a failed stage again may help (Prefect's retry condition)."""
    error = state.result(raise_on_failure=False)
    return not isinstance(error, ValueError | ModelError)


def stage_key_of(stage: Task[..., Any], inputs: tuple[Any, ...]) -> str:
    """The cache key that a stage has for these inputs."""
    parameters = inspect.signature(stage.fn).bind(*inputs).arguments
    return stage.cache_policy.compute_key(None, parameters, {})  # type: ignore[arg-type, return-value]


GPU_LIMIT, API_LIMIT = "lion-gpu", "lion-teacher-api"


def limits_of(inputs: Iterable[Any]) -> set[str]:
    """The global concurrency limits that a stage with these inputs keeps: it runs a model here, or asks an endpoint."""
    found: set[str] = set()
    for value in inputs:
        if isinstance(value, list | tuple):
            found |= limits_of(value)
        elif isinstance(value, ReadyModel):
            found.add(GPU_LIMIT if value.checkpoint else API_LIMIT)
        elif isinstance(value, Checkpoint):
            found.add(GPU_LIMIT)
    return found


def on_a_server() -> bool:
    """Whether this process talks to a Prefect server that others see too."""
    return bool(PREFECT_API_URL.value())


def _is_defined(limit: str) -> bool:
    with get_client(sync_client=True) as client:
        try:
            return client.read_global_concurrency_limit_by_name(limit).active
        except ObjectNotFound:
            return False


def within_limits(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, run only while the limits of its inputs have free slots. A stage that is cached takes none."""

    @functools.wraps(function)
    def limited(*inputs: Any, **named: Any) -> Any:
        limits = limits_of([*inputs, *named.values()]) if on_a_server() else set()
        kept = sorted(limit for limit in limits if _is_defined(limit))
        with concurrency(kept) if kept else nullcontext():
            return function(*inputs, **named)

    return limited


def stage(name: str, *, version: int, prompts: Iterable[str] = ()) -> Callable[[Callable[..., Any]], Task[..., Any]]:
    """Make a function a stage: cached by content, locked while it runs, retried once by Prefect.

    Not retried are a ValueError, which says that the input is wrong, and a ModelError, whose requests were tried again
    one by one.

    Args:
        name: the stage's word, used in keys, task run names, tags and the manifest.
        version: raise it when the same inputs shall give another result.
        prompts: the prompt texts it uses. Editing one makes the stage run again.
    """
    texts = list(prompts)

    def key(context: TaskRunContext, parameters: dict[str, Any]) -> str:
        return stage_key(name, version, texts, parameters)

    policy = CacheKeyFnPolicy(cache_key_fn=key).configure(
        isolation_level=IsolationLevel.SERIALIZABLE, lock_manager=KernelLocks()
    )

    def decorate(function: Callable[..., Any]) -> Task[..., Any]:
        return task(
            name=name,
            cache_policy=policy,
            persist_result=True,
            result_serializer=WholeResult(),
            retries=1,
            retry_delay_seconds=5,
            retry_condition_fn=may_pass,
        )(within_limits(function))

    return decorate
