"""Policies by name: a shipped one, an entry point's, or a class in the user's own file; tried before they serve.

A specification is `lpm`, `lpm:patience=5` or `examples/srpt.py:Shortest:aging=500`: parameters follow after colons.
"""

import ctypes
import inspect
import itertools
import json
import logging
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from functools import partial
from importlib.machinery import SourceFileLoader
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, TypeVar

import numpy as np

from minisgl.config import Config
from minisgl.core.pages import CacheManager
from minisgl.core.plan import StepResult
from minisgl.core.policy import POLICIES, Policy
from minisgl.core.radix_cache import EVICTIONS, EvictionPolicy, Node
from minisgl.core.request_state import RequestState, RequestTable
from minisgl.core.scheduler import Scheduler
from minisgl.core.types import Request, SamplingParams
from minisgl.errors import ConfigError

T = TypeVar("T")
TRIAL_SECONDS = 10.0
TRIAL_STEPS = 2000
BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)

logger = logging.getLogger(__name__)


class GuardedEviction(EvictionPolicy):
    """A policy from outside; when it fails, LRU takes its place, or with `strict` the failure is raised."""

    def __init__(self, policy: EvictionPolicy, strict: bool = False) -> None:
        self.policy, self.strict = policy, strict

    def key(self, node: Node) -> float:
        try:
            if (key := float(self.policy.key(node))) == key:
                return key
            raise ValueError("the key is not a number")
        except (Exception, SystemExit):
            if self.strict:
                raise
            logger.exception("the eviction policy %s failed; lru takes its place", type(self.policy).__name__)
            self.policy = EvictionPolicy()
            return node.last_used


def load_policies(config: Config) -> tuple[Policy, EvictionPolicy]:
    return load_policy(config.schedule_policy), load_eviction(config.eviction)


def load_policy(spec: str) -> Policy:
    """The scheduling policy that `--schedule-policy` names; raises ConfigError for one that cannot serve."""
    if spec in POLICIES:
        return POLICIES[spec]()
    make = partial(construct, spec, POLICIES, "minisgl.policies", Policy)
    return in_time(spec, lambda: try_out(make(), EvictionPolicy(), make()))


def load_eviction(spec: str) -> EvictionPolicy:
    """The eviction policy that `--eviction` names; raises ConfigError for one that cannot serve."""
    if spec in EVICTIONS:
        return EVICTIONS[spec]()
    make = partial(construct, spec, EVICTIONS, "minisgl.evictions", EvictionPolicy)
    return in_time(spec, lambda: try_out(Policy(), GuardedEviction(make(), strict=True), GuardedEviction(make())))


def construct(spec: str, shipped: Mapping[str, Callable[..., T]], group: str, base: type[T]) -> T:
    source, *rest = spec.split(":")
    maker: Any = shipped.get(source)
    if source.endswith(".py"):
        name = rest.pop(0) if rest else ""
        maker = getattr(load_file(source), name, None)
        if maker is None:
            raise ConfigError(f"it has no class {name!r}: write {source}:Class")
    elif maker is None:
        if not (points := tuple(entry_points(group=group, name=source))):
            raise ConfigError(f"it is none of {', '.join(shipped)}, no entry point of {group}, and no path.py:Class")
        maker = points[0].load()
    if not (isinstance(maker, type) and issubclass(maker, base)):
        raise ConfigError(f"it is no subclass of {base.__module__}.{base.__name__}")
    return maker(**read_parameters(inspect.signature(maker), rest))


def read_parameters(signature: inspect.Signature, words: Iterable[str]) -> dict[str, Any]:
    """The parameters that are written in `words`, of which a signature must take each and lack none."""
    takes = {name: taken for name, taken in signature.parameters.items() if taken.kind in BY_NAME}
    takes_all = any(taken.kind is taken.VAR_KEYWORD for taken in signature.parameters.values())
    parameters: dict[str, Any] = {}
    for name, equals, text in (word.partition("=") for word in words):
        if not equals:
            raise ConfigError(f"a parameter is written name=value, not {name!r}")
        if name not in takes and not takes_all:
            raise ConfigError(f"it has no parameter {name}: it takes {', '.join(takes) or 'none'}")
        try:
            parameters[name] = json.loads(text)  # a number, true, false or null
        except ValueError:
            parameters[name] = text
        is_number = name in takes and type(takes[name].default) in (int, float)
        if is_number and not isinstance(parameters[name], (int, float)):
            raise ConfigError(f"{name} takes a number, not {text!r}")
    if missing := [name for name, taken in takes.items() if taken.default is taken.empty and name not in parameters]:
        raise ConfigError(f"it needs a value for {', '.join(missing)}")
    return parameters


def load_file(path: str) -> Any:
    loader = SourceFileLoader(f"minisgl_plugin_{Path(path).stem}", path)
    module = sys.modules[loader.name] = ModuleType(loader.name)  # where dataclasses look for their names
    module.__file__ = path
    loader.exec_module(module)
    return module


class WorkThread(threading.Thread, Generic[T]):
    """Does some work, whose result or error `done` has then. The interpreter's end does not wait for it."""

    def __init__(self, work: Callable[[], T], name: str | None = None) -> None:
        super().__init__(name=name, daemon=True)
        self.done: Future[T] = Future()
        self._work = work

    def run(self) -> None:
        try:
            self.done.set_result(self._work())
        except BaseException as error:
            self.done.set_exception(error)

    def stop(self, error: type[BaseException]) -> None:
        """Raise this in the work as soon as it runs Python again."""
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self.ident or 0), ctypes.py_object(error))


def in_time(spec: str, work: Callable[[], T]) -> T:
    """The result of `work`; raises ConfigError, which names `spec`, when it raises or takes too long."""
    thread = WorkThread(work, f"trial of {spec}")
    thread.start()
    try:
        error = thread.done.exception(TRIAL_SECONDS)
    except TimeoutError:
        thread.stop(SystemExit)
        raise ConfigError(f"the policy {spec} does not return: it was tried for {TRIAL_SECONDS:.0f} s") from None
    if error is None:
        return thread.done.result()
    file = str(Path(spec.partition(":")[0]))
    text = error.message if isinstance(error, ConfigError) else f"{type(error).__name__}: {error}"
    lines = [f" (line {f.lineno})" for f in traceback.extract_tb(error.__traceback__) if f.filename == file]
    raise ConfigError(f"the policy {spec} cannot be used: {text}{''.join(lines[-1:])}") from error


def try_out(policy: Policy, eviction: EvictionPolicy, fresh: T) -> T:
    """Serve made-up requests with these policies, in few pages; return `fresh`, which has seen none of them."""
    for shared in (True, False):
        seconds = itertools.count(1000.0, 0.5)
        table, cache = RequestTable(4, 48), CacheManager(14, 4, shared, 4, 12, eviction)
        scheduler = Scheduler(table, cache, policy, 12, 24)
        scheduler.policy.strict = True
        for number in range(24):
            prompt = [*range(4 * (number % 4)), *([number] * (1 + number * 5 % 23))]
            request = Request.make(str(number), prompt, SamplingParams(), priority=number % 3)
            limit = len(prompt) + 1 + number % 9
            scheduler.add(RequestState(request, number, next(seconds), 0, limit, ()))
            for _ in range(TRIAL_STEPS if number == 23 else 2):
                if not scheduler.live:
                    break
                cache.now = next(seconds)
                if (plan := scheduler.schedule()) is not None:
                    tokens = np.ones(len(plan.sampled_slots), np.int32)
                    scheduler.commit(plan, StepResult(step=plan.step, tokens=tokens))
        if scheduler.live:
            raise ConfigError(f"{len(scheduler.live)} of 24 requests had not ended after {TRIAL_STEPS} steps")
    return fresh
