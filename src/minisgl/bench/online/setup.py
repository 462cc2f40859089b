"""Before the first run: which server and model this is, what to send it, and that it answers at all."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Final

from minisgl.bench.online.arrivals import with_arrivals
from minisgl.bench.online.client import error_text
from minisgl.bench.online.drive import PATHS, Client, closed_loop, prepare
from minisgl.bench.online.http1 import Target, WireError, fetch, parse_target
from minisgl.bench.online.options import Load, Options
from minisgl.bench.online.prompts import ChatPrompts, IdPrompts, Prompts, TextPrompts, calibrate
from minisgl.bench.online.sessions import (
    Chats,
    Segment,
    Session,
    Turn,
    all_turns,
    from_chats,
    from_trace,
    from_workload,
    single,
)
from minisgl.bench.online.traces import read_trace
from minisgl.bench.workload import WorkloadSpec
from minisgl.errors import ConfigError

TRACE_REQUESTS: Final = 1000
SMALL: Final = WorkloadSpec(num_requests=16, input_len=(32, 128), output_len=(32, 128))
"""What our own server is asked on a CPU unless told otherwise: as `minisgl bench offline` there."""
WARM_SEED: Final = -1
WARM_TOKENS: Final = 16
PROBE_TOKENS: Final = 8


def make_sessions(options: Options, load: Load, seed: int) -> list[Session]:
    """What one run sends, in order of time."""
    if options.trace is not None:
        trace = read_trace(options.trace, options.requests or TRACE_REQUESTS)
        scale = load.value if load.kind == "scale" else 1.0
        sessions = from_trace(trace, scale, options.max_input_len, options.max_output_len)
    else:
        published = SMALL if options.small else WorkloadSpec()
        lengths = (options.input_len or published.input_len, options.output_len or published.output_len)
        if options.chats is not None:
            chats = Chats(
                chats=options.chats,
                turns=options.turns,
                system_prompts=options.system_prompts,
                system_len=options.system_len,
                message_len=lengths[0],
                answer_len=lengths[1],
                think=options.think,
            )
            sessions = from_chats(chats, seed)
        else:
            count = options.requests or published.num_requests
            spec = WorkloadSpec(num_requests=count, input_len=lengths[0], output_len=lengths[1], seed=seed)
            sessions = from_workload(spec)
    if load.kind == "rate":
        return with_arrivals(sessions, load.value, options.burstiness, seed)
    return sessions


async def call(target: Target, method: str, path: str, body: object = None) -> Any:
    """The JSON of an answer. Raises ConfigError with what the server says when it is none."""
    data = b"" if body is None else json.dumps(body).encode()
    try:
        status, raw = await fetch(target, method, path, data)
    except (OSError, WireError) as error:
        where = f"{target.host}:{target.port}{target.prefix}{path}"
        raise ConfigError(f"no answer from {where}: {error or type(error).__name__}") from error
    if status != 200:
        raise ConfigError(f"the server refuses {method} {path} with {status}: {error_text(raw)}")
    try:
        return json.loads(raw)
    except ValueError as error:
        raise ConfigError(f"what {path} says is not JSON: {error}") from error


async def make_client(options: Options) -> tuple[Client, int | None]:
    """How to ask this server, and the longest sequence it takes in tokens, where it says so."""
    target = parse_target(options.url, options.api_key)
    listed = await call(target, "GET", "/v1/models")
    found = listed.get("data") or [] if isinstance(listed, dict) else []
    cards = [card for card in found if isinstance(card, dict) and "id" in card]
    card = next((card for card in cards if options.model in (None, card["id"])), None)
    if card is None:
        names = ", ".join(str(card["id"]) for card in cards) or "none"
        raise ConfigError(
            f"--model {options.model}: the server lists {names}" if options.model else "no model is served"
        )
    prompts = await make_prompts(target, str(card["id"]), options)
    client = Client(
        target=target,
        model=str(card["id"]),
        endpoint=options.endpoint,
        prompts=prompts,
        temperature=options.temperature,
        ignore_eos=options.ignore_eos,
        timeout=options.timeout,
        keep_text=options.endpoint == "chat" and options.chats is not None,
    )
    limit = card.get("max_model_len")
    return client, limit if isinstance(limit, int) else None


async def make_prompts(target: Target, model: str, options: Options) -> Prompts:
    """Token ids, or words that were found to be one token each."""
    if options.endpoint == "ids":
        return IdPrompts(*options.tokens)

    async def count(text: str) -> int:
        asked = {"messages": [{"role": "user", "content": text}]} if options.endpoint == "chat" else {"prompt": text}
        body = {"model": model, "max_tokens": 1, **asked}
        said = await call(target, "POST", PATHS[options.endpoint], body)
        try:
            return int(said["usage"]["prompt_tokens"])
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                "the server does not say how many tokens a prompt has (usage.prompt_tokens); use --endpoint ids"
            ) from error

    words, overhead = await calibrate(count)
    return (ChatPrompts if options.endpoint == "chat" else TextPrompts)(words, overhead)


async def warm_up(client: Client, sessions: Sequence[Session], count: int) -> None:
    """One small request alone, then the first `count` with other tokens and short answers, all at once.

    Raises ConfigError with what the server says when the first fails: then all would.
    """
    probe = single((Segment(("probe", 0), PROBE_TOKENS),), 1)
    first = prepare(client, [Session((probe,))], WARM_SEED, [0])
    await closed_loop(client, first, WARM_SEED, 1, ignore)
    record = first[0].records[0]
    if record.failure is not None:
        raise ConfigError(f"the server does not answer a first request: {record.failure}: {record.detail}")
    turns = [
        turn
        for turn in all_turns(sessions)
        if not any(message.role == "assistant" for message in turn.messages) or not client.keep_text
    ][:count]
    short = [Session((Turn(turn.messages, min(turn.output_length, WARM_TOKENS)),)) for turn in turns]
    planned = prepare(client, short, WARM_SEED, [0] * len(short))
    await closed_loop(client, planned, WARM_SEED, max(1, len(planned)), ignore)


def ignore(done: int) -> None:
    """Nobody waits for a warm-up's progress."""
