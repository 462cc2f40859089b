"""What is sent: sessions of turns, whose prompts are made of named segments so that what recurs is known beforehand."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from minisgl.bench.online.traces import Trace, TraceRequest
from minisgl.bench.workload import HIGHEST_TOKEN, WorkloadSpec, make_workload
from minisgl.errors import ConfigError


class Segment(NamedTuple):
    """`length` tokens of the endless sequence named `key`: equal keys have equal tokens as far as both go."""

    key: tuple[str, int]
    length: int


class Message(NamedTuple):
    """A part of a prompt. Where a prompt is no conversation it is a single message of the user."""

    role: str
    segments: tuple[Segment, ...]


@dataclass(frozen=True)
class Turn:
    """One request: its prompt, and how many tokens its answer shall have."""

    messages: tuple[Message, ...]
    output_length: int

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The whole prompt."""
        return tuple(segment for message in self.messages for segment in message.segments)

    @property
    def input_length(self) -> int:
        """Tokens in the prompt."""
        return sum(segment.length for segment in self.segments)


@dataclass(frozen=True)
class Session:
    """Requests of one client, each sent `think` s after the answer to the one before; mostly there is just one.

    `due` is when the first is sent, in s after the start.
    """

    turns: tuple[Turn, ...]
    due: float = 0.0
    think: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Chats:
    """Conversations: `turns` messages of the user, each after everything said before, behind a shared system prompt.

    Conversation i has system prompt i modulo `system_prompts`, of `system_len` tokens. Ranges are inclusive, in tokens.
    """

    chats: int
    turns: int = 4
    system_prompts: int = 1
    system_len: int = 512
    message_len: tuple[int, int] = (32, 256)
    answer_len: tuple[int, int] = (32, 256)
    think: float = 0.0


def cut(segments: Sequence[Segment], length: int) -> tuple[Segment, ...]:
    """The first `length` tokens."""
    kept: list[Segment] = []
    for segment in segments:
        if length <= 0:
            break
        kept.append(Segment(segment.key, min(segment.length, length)))
        length -= segment.length
    return tuple(kept)


def single(segments: tuple[Segment, ...], output_length: int) -> Turn:
    """A request that is no conversation."""
    return Turn((Message("user", segments),), output_length)


def trace_segments(request: TraceRequest, block: int, index: int) -> tuple[Segment, ...]:
    """A traced prompt's blocks, and behind them what the trace knows nothing of, which is the request's own."""
    covered = min(len(request.hash_ids) * block, request.input_length)
    blocks = [Segment(("block", name), block) for name in request.hash_ids]
    rest = request.input_length - covered
    return (*cut(blocks, covered), *((Segment(("own", index), rest),) if rest else ()))


def from_trace(trace: Trace, scale: float, max_input: int | None, max_output: int | None) -> list[Session]:
    """A session for each request, cut to the limits; gaps between arrivals are `scale` times the trace's."""
    sessions = []
    for index, request in enumerate(trace.requests):
        segments = trace_segments(request, trace.block, index)
        if max_input is not None:
            segments = cut(segments, max_input)
        length = min(request.output_length, max_output or request.output_length)
        sessions.append(Session((single(segments, length),), request.arrival * scale))
    return sessions


def from_workload(spec: WorkloadSpec) -> list[Session]:
    """The lengths that `minisgl bench offline` draws from the same spec; nothing recurs."""
    workload = make_workload(spec, vocab_size=HIGHEST_TOKEN + 1)
    pairs = zip(workload.prompts, workload.params, strict=True)
    turns = [
        single((Segment(("own", i), len(prompt)),), params.max_tokens or 1) for i, (prompt, params) in enumerate(pairs)
    ]
    return [Session((turn,)) for turn in turns]


def from_chats(spec: Chats, seed: int) -> list[Session]:
    """A session for each conversation; its turns take up the ones before with answers of made-up tokens."""
    draw = random.Random(seed)
    sessions = []
    for chat in range(spec.chats):
        system = Message("system", (Segment(("system", chat % spec.system_prompts), spec.system_len),))
        history: tuple[Message, ...] = (system,) if spec.system_len else ()
        turns = []
        for number in range(spec.turns):
            name = chat * spec.turns + number
            said = Message("user", (Segment(("message", name), draw.randint(*spec.message_len)),))
            answer = draw.randint(*spec.answer_len)
            turns.append(Turn((*history, said), answer))
            history = (*history, said, Message("assistant", (Segment(("answer", name), answer),)))
        sessions.append(Session(tuple(turns), think=spec.think))
    return sessions


def all_turns(sessions: Sequence[Session]) -> Iterator[Turn]:
    """Every request."""
    return (turn for session in sessions for turn in session.turns)


def require_fit(sessions: Sequence[Session], limit: int | None) -> None:
    """Raise ConfigError where a request is longer than the server's `limit` in tokens, if that is known."""
    needs = [turn.input_length + turn.output_length for turn in all_turns(sessions)]
    if limit is not None and (long := [need for need in needs if need > limit]):
        raise ConfigError(
            f"{len(long)} of {len(needs)} requests are longer than the {limit} tokens that the server takes, the "
            f"longest has {max(long)}: give --max-input-len and --max-output-len, or shorter ranges"
        )
