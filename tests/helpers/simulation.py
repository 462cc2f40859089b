"""An engine over a simulated device, and what each request must get from it."""

import gc
import statistics
import sys
from collections.abc import Callable, Sequence

import numpy as np

from helpers.constraints import Cycle
from helpers.invariants import check_cache
from minisgl.config import Config
from minisgl.core.engine import Engine
from minisgl.core.plan import StepPlan
from minisgl.core.types import ModelInfo, Request, SamplingParams, TokenEvent
from minisgl.plugins import load_policies
from minisgl_bench.simulated_executor import SimulatedExecutor, StepSeconds, TimedExecutor

VOCAB = 50
EOS = 7


def model_info(max_seq_len: int) -> ModelInfo:
    return ModelInfo(name="simulated", vocab_size=VOCAB, max_seq_len=max_seq_len, eos_token_ids=(EOS,))


def simulated_engine(*, num_pages: int = 64, max_seq_len: int = 128, page_size: int = 4, **settings: object) -> Engine:
    """An engine whose device is simulated; settings are fields of Config."""
    defaults: dict[str, object] = {"max_running_requests": 8, "max_prefill_length": 16}
    config = Config(page_size=page_size, **{**defaults, **settings})  # type: ignore[arg-type]
    assert config.max_running_requests is not None
    rows = config.max_running_requests
    length = min(max_seq_len, num_pages * page_size)
    executor, policies = SimulatedExecutor(num_pages, page_size, rows, length, VOCAB), load_policies(config)
    return Engine(executor, model_info(length), config, lambda grammar: Cycle(grammar, VOCAB, EOS), policies=policies)


def instant_engine(num_pages: int, max_seq_len: int, config: Config) -> Engine:
    """An engine whose device takes no time of the host's, and samples anything."""
    model = ModelInfo(name="instant", vocab_size=2**30, max_seq_len=max_seq_len, eos_token_ids=())
    return Engine(TimedExecutor(num_pages, 2**30, lambda plan: StepSeconds(0.0, 0.0, 1e-3)), model, config)


def calls(work: Callable[..., object], *arguments: object) -> int:
    """How many functions `work` calls, in Python and in C."""
    count = 0

    def profile(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    gc.disable()  # which may call functions of its own
    sys.setprofile(profile)
    try:
        work(*arguments)
    finally:
        sys.setprofile(before)
        gc.enable()
    return count


def calls_of_a_step(engine: Engine, steps: int = 15) -> float:
    """The median of so many steps: some take pages beside."""
    return statistics.median(calls(engine.step) for _ in range(steps))


def expected_tokens(request: Request, max_seq_len: int) -> list[int]:
    """The request's tokens on a simulated device of its own: one page a token, no plans, no cache, no batch mates."""
    params, prompt = request.params, request.prompt
    limit = max_seq_len if params.max_tokens is None else min(max_seq_len, len(prompt) + params.max_tokens)
    device = SimulatedExecutor(limit, 1, 1, limit, VOCAB)
    device.page_table[0] = np.arange(limit)
    device.seed[0] = (params.seed or 0) if params.temperature > 0 else 0
    stops = [*params.stop_token_ids, *([] if params.ignore_eos else [EOS])]
    constraint = None if params.grammar is None else Cycle(params.grammar, VOCAB, EOS)
    out: list[int] = []
    device._write(0, 0, np.array(prompt, np.int32))
    while True:
        allowed = set(range(VOCAB) if constraint is None else constraint.allowed())
        allowed -= set(stops if len(out) < params.min_tokens else [])
        if not allowed:
            return out
        token = device._next(0)
        out.append(min(allowed, key=lambda t: (t - token) % VOCAB))
        if constraint is not None:
            constraint.said += 1
        stopped = out[-1] in stops and len(out) > params.min_tokens
        if stopped or len(prompt) + len(out) >= limit:
            return out
        device._write(0, len(prompt) + len(out) - 1, np.array(out[-1:], np.int32))


def advance(engine: Engine, steps: int = 10_000) -> list[TokenEvent]:
    """The events of so many steps, or of all until nothing is left; the cache is checked after each."""
    events: list[TokenEvent] = []
    for _ in range(steps):
        if not engine.has_work:
            return events
        events += engine.step()
        check_cache(engine.cache)
    assert steps < 10_000, f"still busy: {engine.stats()}"
    return events


def run(engine: Engine, requests: Sequence[Request]) -> dict[str, list[TokenEvent]]:
    for request in requests:
        engine.add(request)
    events = advance(engine)
    return {request.id: [event for event in events if event.id == request.id] for request in requests}


def check_answers(engine: Engine, requests: Sequence[Request], events: dict[str, list[TokenEvent]]) -> None:
    """Assert that each request got its tokens and then one terminal event, and that the engine holds nothing."""
    for request in requests:
        mine = events[request.id]
        assert tokens_of(mine) == expected_tokens(request, engine.model.max_seq_len)
        assert [event.finish is not None for event in mine] == [False] * (len(mine) - 1) + [True]
    assert engine.cache.num_owned == 0
    assert engine.stats().running == engine.stats().waiting == 0


def record_plans(engine: Engine) -> list[StepPlan]:
    """What the engine launches from here on, in a list that grows."""
    plans: list[StepPlan] = []
    launch = engine.executor.launch

    def record(plan: StepPlan) -> None:
        plans.append(plan)
        launch(plan)

    engine.executor.launch = record  # type: ignore[method-assign]
    return plans


def tokens_of(events: Sequence[TokenEvent]) -> list[int]:
    return [token for event in events for token in event.tokens]


def request(name: str, prompt: Sequence[int], priority: int = 0, **params: object) -> Request:
    """A request with sampling parameters by name; greedy unless said otherwise."""
    return Request.make(name, list(prompt), SamplingParams(**{"temperature": 0.0, **params}), priority)  # type: ignore[arg-type]
