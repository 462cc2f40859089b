"""An engine over the simulated device, and what each request must get from it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from helpers.constraints import Cycle
from helpers.simulated import SimulatedExecutor
from minisgl.config import Config
from minisgl.core.engine import Engine
from minisgl.core.plan import NewRows, StepPlan
from minisgl.core.types import MAX_STOP_TOKEN_IDS, ModelInfo, Request, SamplingParams, TokenEvent

VOCAB = 50
EOS = 7


def model_info(max_seq_len: int) -> ModelInfo:
    """A model of `VOCAB` tokens with one EOS id."""
    return ModelInfo(name="simulated", vocab_size=VOCAB, max_seq_len=max_seq_len, eos_token_ids=(EOS,))


def simulated_engine(*, num_pages: int = 64, max_seq_len: int = 128, page_size: int = 4, **settings: object) -> Engine:
    """An engine whose device is simulated; settings are fields of Config."""
    defaults: dict[str, object] = {"max_running_requests": 8, "max_prefill_length": 16}
    config = Config(page_size=page_size, **{**defaults, **settings})  # type: ignore[arg-type]
    assert config.max_running_requests is not None
    rows = config.max_running_requests
    length = min(max_seq_len, num_pages * page_size)
    executor = SimulatedExecutor(num_pages, page_size, rows, length, VOCAB)
    return Engine(executor, model_info(length), config, lambda grammar: Cycle(grammar, VOCAB, EOS))


def expected_tokens(request: Request, max_seq_len: int) -> list[int]:
    """The request's tokens on a simulated device of its own: one page a token, no cache, no batch mates."""
    params, prompt = request.params, request.prompt
    limit = max_seq_len if params.max_tokens is None else min(max_seq_len, len(prompt) + params.max_tokens)
    device = SimulatedExecutor(limit, 1, 1, limit, VOCAB)
    none, one = np.empty(0, np.int32), np.zeros(1, np.int32)
    stops = [*params.stop_token_ids, *([] if params.ignore_eos else [EOS])]
    init = NewRows(
        slots=one,
        temperatures=np.array([params.temperature], np.float32),
        top_ps=np.ones(1, np.float32),
        min_ps=np.zeros(1, np.float32),
        top_ks=one,
        seeds=np.array([params.seed or 0], np.int64),
        min_lens=np.array([len(prompt) + params.min_tokens], np.int32),
        stop_ids=np.array([stops + [-1] * (MAX_STOP_TOKEN_IDS - len(stops))], np.int32),
    )
    out: list[int] = []
    constraint = None if params.grammar is None else Cycle(params.grammar, VOCAB, EOS)
    while True:
        allowed = set(range(VOCAB) if constraint is None else constraint.allowed())
        allowed -= set(stops if len(out) < params.min_tokens else [])
        if not allowed:
            return out
        tokens = np.array(prompt if not out else out[-1:], np.int32)
        start = len(prompt) + len(out) - len(tokens)
        end = start + len(tokens)
        plan = StepPlan(
            step=len(out),
            init=None if out else init,
            page_slots=np.zeros(end - start, np.int32),
            page_indices=np.arange(start, end, dtype=np.int32),
            page_ids=np.arange(start, end, dtype=np.int32),
            decode_slots=none,
            decode_lens=none,
            prefill_slots=one,
            prefill_starts=np.array([start], np.int32),
            prefill_lens=np.array([len(tokens)], np.int32),
            prefill_final=np.ones(1, np.bool_),
            prefill_tokens=tokens,
            all_greedy=False,
            any_filter=False,
            any_min_len=False,
        )
        device.launch(plan)
        token = int(device.collect().tokens[0])
        out.append(min(allowed, key=lambda t: (t - token) % VOCAB))
        if constraint is not None:
            constraint.said += 1
        stopped = out[-1] in stops and len(out) > params.min_tokens
        if stopped or len(prompt) + len(out) >= limit:
            return out


def advance(engine: Engine, steps: int = 10_000) -> list[TokenEvent]:
    """The events of so many steps, or of all until nothing is left; the cache is checked after each."""
    events: list[TokenEvent] = []
    for _ in range(steps):
        if not engine.has_work:
            return events
        events += engine.step()
        engine.cache.check()
    assert steps < 10_000, f"still busy: {engine.stats()}"
    return events


def run(engine: Engine, requests: Sequence[Request]) -> dict[str, list[TokenEvent]]:
    """Add all requests and run to the end: the events of each."""
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
    """All tokens of one request's events."""
    return [token for event in events for token in event.tokens]


def request(name: str, prompt: Sequence[int], priority: int = 0, **params: object) -> Request:
    """A request with sampling parameters by name; greedy unless said otherwise."""
    return Request.make(name, list(prompt), SamplingParams(**{"temperature": 0.0, **params}), priority)  # type: ignore[arg-type]
