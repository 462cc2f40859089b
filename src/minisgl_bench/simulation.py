"""Engines in virtual time, and clients that send them sessions of requests."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import msgspec
import numpy as np

from minisgl.config import Config, Machine, resolve
from minisgl.core.engine import Engine
from minisgl.core.model_config import ModelSpec
from minisgl.core.types import ModelInfo, Request, SamplingParams, TokenEvent
from minisgl.distributed.shard import check_shards
from minisgl.errors import ConfigError
from minisgl_bench import traffic
from minisgl_bench.cost_model import CostModel, GpuConstants, pages_that_fit
from minisgl_bench.metrics import RequestRecord
from minisgl_bench.simulated_executor import SimulatedExecutor, TimedExecutor
from minisgl_bench.traffic import Session, Turn


class Replica:
    """One engine on simulated GPUs. `step` takes in what is due by its clock and moves on to the end of a step.

    Several can be stepped under one clock: always the one whose `executor.now` is furthest behind.
    """

    def __init__(self, spec: ModelSpec, config: Config, gpu: GpuConstants, exact: bool = False) -> None:
        check_shards(spec, config.tp)
        if config.quantization or spec.fp8 or config.kv_cache_dtype != "auto":
            raise ConfigError("the simulator knows no FP8: leave out --quantization and --kv-cache-dtype")
        self.gpu = gpu
        machine = Machine(True, gpu.name, gpu.memory, config.tp)
        self.config = config = resolve(config, machine, spec.checkpoint_dtype).config
        assert config.max_running_requests is not None
        wanted = config.max_seq_len_override or spec.max_position
        pages = config.num_pages or pages_that_fit(spec, config, gpu, wanted)
        length = min(wanted, pages * config.page_size)
        self.model = ModelInfo(name=spec.architecture, vocab_size=spec.vocab_size, max_seq_len=length, eos_token_ids=())
        self.cost, vocab = CostModel(spec, config, gpu), spec.vocab_size
        rows, page = config.max_running_requests, config.page_size
        device = SimulatedExecutor(pages, page, rows, length, vocab) if exact else None
        self.executor = TimedExecutor(pages, vocab, self.cost, device)
        self.engine = Engine(self.executor, self.model, config, clock=lambda: self.executor.now)
        self._coming: list[tuple[float, int, Request]] = []  # a heap of what is not at the server yet
        self._received: deque[tuple[float, Request]] = deque()  # and when the engine gets it
        self._server_free_at = 0.0
        self._sent = 0

    @property
    def has_work(self) -> bool:
        return self.engine.has_work or bool(self._coming or self._received)

    @property
    def seen_at(self) -> float:
        """When clients see the events of the last step: the server first handles what came before them."""
        return max(self.executor.now, self._server_free_at) + self.gpu.event_seconds

    def send(self, request: Request, time: float) -> None:
        """Let a request reach the server at this time, which may be past already."""
        heapq.heappush(self._coming, (time, self._sent, request))
        self._sent += 1

    def step(self) -> list[TokenEvent]:
        """The engine's events at the time that it is afterwards. An idle engine waits for a request."""
        clock, idle = self.executor, not self.engine.has_work
        if idle and not self._received:
            clock.now = max(clock.now, self._coming[0][0])
        while self._coming and self._coming[0][0] <= clock.now:
            time, _, request = heapq.heappop(self._coming)
            self._server_free_at = max(self._server_free_at, time) + self.gpu.request_seconds
            self._received.append((self._server_free_at, request))
        if idle:
            clock.now = max(clock.now, self._received[0][0])
        while self._received and self._received[0][0] <= clock.now:
            self.engine.add(self._received.popleft()[1])
        return self.engine.step()


class _Waiting(NamedTuple):
    """What a client still has to send in a session."""

    session: Session
    turns: deque[tuple[Turn, RequestRecord]]


class Clients:
    """Sends sessions to a replica and keeps what each request sees, as `minisgl bench online` does with a server.

    In an open loop (`concurrency` None) sessions begin at their times, else so many go on at once.
    """

    def __init__(
        self, replica: Replica, sessions: Sequence[Session], hits: Sequence[int], concurrency: int | None, seed: int
    ) -> None:
        self.replica, self.seed = replica, seed
        self.records: list[RequestRecord] = []
        self._live: dict[str, tuple[RequestRecord, _Waiting]] = {}
        self._queue: deque[_Waiting] = deque()
        for session in sessions:
            waiting = _Waiting(session, deque())
            for turn in session.turns:
                index, lengths = len(self.records), (turn.input_length, turn.output_length)
                record = RequestRecord(index, expected_input=lengths[0], expected_output=lengths[1])
                record.expected_cached = hits[index] if hits else 0
                self.records.append(record)
                waiting.turns.append((turn, record))
            self._queue.append(waiting)
        for _ in range(len(self._queue) if concurrency is None else min(concurrency, len(self._queue))):
            waiting = self._queue.popleft()
            self._send(waiting, waiting.session.due if concurrency is None else 0.0)

    def _send(self, waiting: _Waiting, time: float) -> None:
        turn, record = waiting.turns.popleft()
        record.due = record.sent = time
        vocab = self.replica.model.vocab_size
        prompt = traffic.segment_numbers(self.seed, turn.segments, vocab).astype(np.int32)
        params = turn.sampling or SamplingParams(temperature=0.6, ignore_eos=True)
        seed = record.index if params.seed is None else params.seed
        params = msgspec.structs.replace(params, max_tokens=turn.output_length, seed=seed, logprobs=None)
        self._live[str(record.index)] = record, waiting
        request = Request(id=str(record.index), prompt_bytes=prompt.tobytes(), params=params, priority=turn.priority)
        self.replica.send(request, time)

    def run(self, done: Callable[[int], object]) -> None:
        """Until every request has its answer."""
        while self.replica.has_work:
            self.step(done)

    def step(self, done: Callable[[int], object]) -> None:
        events = self.replica.step()
        time = self.replica.seen_at
        for event in events:
            record, waiting = self._live[event.id]
            if event.tokens:
                record.times.append(time)
            if event.finish is None:
                continue
            del self._live[event.id]
            record.prompt_tokens, record.completion_tokens = record.expected_input or 0, len(record.times)
            record.cached_tokens = event.cached_tokens
            if waiting.turns:
                self._send(waiting, time + waiting.session.think)
            elif self._queue:
                self._send(self._queue.popleft(), time)
            done(1)
