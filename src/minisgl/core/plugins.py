"""Policies by name: a shipped one, an entry point's, or a class in the user's own file; tried before they serve.

A specification is `lpm`, `lpm:patience=5` or `examples/srpt.py:Shortest:aging=500`: parameters follow after colons.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from minisgl.core.pages import CacheManager
from minisgl.core.plan import StepResult
from minisgl.core.policy import POLICIES, Policy
from minisgl.core.radix_cache import EVICTIONS, EvictionPolicy, GuardedEviction
from minisgl.core.request_state import RequestState, RequestTable
from minisgl.core.scheduler import Scheduler
from minisgl.core.types import Request, SamplingParams
from minisgl.errors import ConfigError

T = TypeVar("T")
TRIAL_SECONDS = 10.0
TRIAL_STEPS = 2000


def load_policy(spec: str) -> Policy:
    """The scheduling policy that `--schedule-policy` names; raises ConfigError for one that cannot serve."""

    def make() -> Policy:
        return construct(spec, POLICIES, "minisgl.policies", Policy)

    return make() if spec in POLICIES else in_time(spec, lambda: try_out(make(), EvictionPolicy(), make()))


def load_eviction(spec: str) -> EvictionPolicy:
    """The eviction policy that `--eviction` names; raises ConfigError for one that cannot serve."""

    def make() -> EvictionPolicy:
        return construct(spec, EVICTIONS, "minisgl.evictions", EvictionPolicy)

    if spec in EVICTIONS:
        return make()
    policy = in_time(spec, lambda: try_out(Policy(), GuardedEviction(make(), strict=True), make()))
    return GuardedEviction(policy)


def construct(spec: str, shipped: Mapping[str, Callable[..., T]], group: str, base: type[T]) -> T:
    """An object of the class that a specification names, with its parameters."""
    source, *rest = spec.split(":")
    maker: Any = shipped.get(source)
    if source.endswith(".py"):
        name = rest.pop(0) if rest else ""
        maker = getattr(load_file(Path(source)), name, None)
        if maker is None:
            raise ConfigError(f"it has no class {name!r}: write {source}:Class")
    elif maker is None:
        points = tuple(entry_points(group=group, name=source))
        if not points:
            raise ConfigError(f"it is none of {', '.join(shipped)}, no entry point of {group}, and no path.py:Class")
        maker = points[0].load()
    if not callable(maker) or not (maker in shipped.values() or (isinstance(maker, type) and issubclass(maker, base))):
        raise ConfigError(f"it is no subclass of {base.__module__}.{base.__name__}")
    parameters = [part.partition("=") for part in rest]
    if wrong := [name for name, equals, _ in parameters if not (name.isidentifier() and equals)]:
        raise ConfigError(f"a parameter is written name=value, not {wrong[0]!r}")
    made: T = maker(**{name: value_of(text) for name, _, text in parameters})
    return made


def load_file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"minisgl_plugin_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where dataclasses look for their names
    spec.loader.exec_module(module)
    return module


def value_of(text: str) -> object:
    """A number, true, false or null as in JSON; any other text as it is."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def in_time(spec: str, work: Callable[[], T]) -> T:
    """The result of `work`; raises ConfigError, which names `spec`, when it raises or takes too long."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name=f"trial of {spec}", daemon=True)
    thread.start()
    thread.join(TRIAL_SECONDS)
    if results:
        return results[0]
    if not errors:
        raise ConfigError(f"the policy {spec} does not return: it was tried for {TRIAL_SECONDS:.0f} s")
    error, file = errors[0], spec.partition(":")[0]
    text = error.message if isinstance(error, ConfigError) else f"{type(error).__name__}: {error}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(Path(file))]
    raise ConfigError(f"the policy {spec} cannot be used: {text}{f' (line {lines[-1]})' if lines else ''}") from error


def try_out(policy: Policy, eviction: EvictionPolicy, fresh: T) -> T:
    """Serve made-up requests with these policies, in few pages; return `fresh`, which has seen none of them.

    Raises what they raise, ValueError for a wrong answer, and ConfigError when a request never ends.
    """
    for shared in (True, False):
        seconds = itertools.count(1000.0, 0.5)
        table, cache = RequestTable(4, 48), CacheManager(14, 4, shared, 4, 12, eviction, seconds.__next__)
        scheduler = Scheduler(table, cache, policy, 12, seconds.__next__)
        scheduler.policy.strict = True
        for number in range(24):
            prompt = [*range(4 * (number % 4)), *([number] * (1 + number * 5 % 23))]
            request = Request.make(str(number), prompt, SamplingParams(), priority=number % 3)
            limit = len(prompt) + 1 + number % 9
            scheduler.add(RequestState(request, number, next(seconds), 0, limit, ()))
            for _ in range(TRIAL_STEPS if number == 23 else 2):
                if not scheduler.live:
                    break
                if (plan := scheduler.schedule()) is not None:
                    tokens = np.ones(len(plan.sampled_slots), np.int32)
                    scheduler.commit(plan, StepResult(step=plan.step, tokens=tokens))
        if scheduler.live:
            raise ConfigError(f"{len(scheduler.live)} of 24 requests had not ended after {TRIAL_STEPS} steps")
    return fresh
