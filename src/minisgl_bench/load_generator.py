"""Sending sessions to a server: at their times whatever it does (open loop), or so many at once (closed loop)."""

import argparse
import asyncio
import json
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from minisgl_bench.client import RequestRecord, Target, stream_completion
from minisgl_bench.traffic import IdPrompts, Session, TextPrompts, Turn

LEAD: Final = 0.2
"""How long before its time a request gets its connection, in s."""
PATHS: Final = {"ids": "/v1/completions", "text": "/v1/completions", "chat": "/v1/chat/completions"}


@dataclass(frozen=True)
class LoadClient:
    """How requests are made; `options` are those of `minisgl bench online`."""

    target: Target
    model: str
    prompts: IdPrompts | TextPrompts
    options: argparse.Namespace

    @property
    def keep_text(self) -> bool:
        """Whether answers are sent back in later turns."""
        return self.options.endpoint == "chat" and self.options.chats is not None

    def body(self, turn: Turn, seed: int, answers: Sequence[str]) -> bytes:
        fields: dict[str, Any] = {
            "model": self.model,
            **self.prompts.fields(turn, seed, answers),
            "max_tokens": turn.output_length,
            "temperature": self.options.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
            **({} if self.options.no_ignore_eos else {"ignore_eos": True}),
        }
        return json.dumps(fields, separators=(",", ":")).encode()


@dataclass(slots=True)
class PlannedSession:
    """A session with what is known before the start: a record for each turn, and the bodies that need no answer."""

    session: Session
    records: list[RequestRecord]
    bodies: list[bytes | None]


def prepare(client: LoadClient, sessions: Sequence[Session], seed: int, hits: Sequence[int]) -> list[PlannedSession]:
    """Make records and bodies; `hits` are the expected cached tokens of all turns, in order."""
    planned: list[PlannedSession] = []
    index = 0
    for session in sessions:
        item = PlannedSession(session, [], [])
        for turn in session.turns:
            record = RequestRecord(index, expected_output=turn.output_length, expected_cached=hits[index])
            record.expected_input = client.prompts.expected_tokens(turn)
            item.records.append(record)
            item.bodies.append(None if client.keep_text else client.body(turn, seed, ()))
            index += 1
        planned.append(item)
    return planned


async def play(
    client: LoadClient, planned: PlannedSession, seed: int, start: float | None, done: Callable[[int], None]
) -> None:
    """Send a session's turns one after the other; the first at its time after `start`, or at once where it is None."""
    answers: list[str] = []
    due = None if start is None else start + planned.session.due
    for number, (turn, record) in enumerate(zip(planned.session.turns, planned.records, strict=True)):
        await sleep_until(None if due is None else due - LEAD)
        body = planned.bodies[number] or client.body(turn, seed, answers)
        planned.bodies[number] = None
        await complete(client, body, record, due)
        done(1)
        if record.failure is not None:
            for later in planned.records[number + 1 :]:
                later.failure, later.detail = "not sent", "an earlier turn failed"
                done(1)
            return
        answers.append(record.text)
        due = time.perf_counter() + planned.session.think if planned.session.think else None


async def sleep_until(due: float | None) -> None:
    if due is not None and (left := due - time.perf_counter()) > 0:
        await asyncio.sleep(left)


async def complete(client: LoadClient, body: bytes, record: RequestRecord, due: float | None) -> None:

    async def ready() -> None:
        await sleep_until(due)
        record.due = time.perf_counter() if due is None else due

    path, timeout = PATHS[client.options.endpoint], client.options.timeout
    await stream_completion(client.target, path, body, record, ready, timeout, client.keep_text)


async def open_loop(
    client: LoadClient, planned: Sequence[PlannedSession], seed: int, done: Callable[[int], None]
) -> None:
    """Start each session at its time; `planned` is in order of time."""
    start = time.perf_counter() + LEAD
    async with asyncio.TaskGroup() as group:
        for item in planned:
            await sleep_until(start + item.session.due - LEAD)
            group.create_task(play(client, item, seed, start, done))


async def closed_loop(
    client: LoadClient, planned: Sequence[PlannedSession], seed: int, concurrency: int, done: Callable[[int], None]
) -> None:
    """Keep `concurrency` sessions going: the next starts when one ends."""
    queue = deque(planned)

    async def work() -> None:
        while queue:
            await play(client, queue.popleft(), seed, None, done)

    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, len(queue))):
            group.create_task(work())
