"""Reading published request traces: when each request came, how long it was, and which blocks of its prompt recurred.

Formats, told apart by their first line:

- Qwen-Bailian (Wang et al., "KVCache Cache in the Wild", ATC 2025): JSON lines, `timestamp` in s, blocks of 16 tokens.
- Mooncake (Qin et al., FAST 2025): JSON lines, `timestamp` in ms, blocks of 512 tokens.
- Azure LLM inference traces (Patel et al., "Splitwise", ISCA 2024): CSV with a date, no blocks.
"""

from __future__ import annotations

import csv
import datetime
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

import msgspec

from minisgl.errors import ConfigError

Count = Annotated[int, msgspec.Meta(ge=1)]
AZURE_FIELDS: Final = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
SECONDS: Final = {"bailian": 1.0, "mooncake": 1e-3}
"""The unit of a format's `timestamp`, in s."""
BLOCK: Final = {"bailian": 16, "mooncake": 512, "azure": 0}
"""Tokens that a hash id stands for."""


class JsonRow(msgspec.Struct, frozen=True):
    """A line of either JSON format; what else a line has is of no use here."""

    timestamp: Annotated[float, msgspec.Meta(ge=0)]
    input_length: Count
    output_length: Count
    hash_ids: list[Annotated[int, msgspec.Meta(ge=0)]] = []
    turn: Count = 1


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """`arrival` in s after the first request; lengths in tokens; `turn` counts from 1 within a conversation.

    The i-th of `hash_ids` names the content of the i-th block of the prompt, the last of which may be cut short.
    """

    arrival: float
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...] = ()
    turn: int = 1


@dataclass(frozen=True)
class Trace:
    """Requests in order of arrival; `block` is the size of their blocks in tokens, 0 where nothing is known of them."""

    format: str
    block: int
    requests: tuple[TraceRequest, ...]


def read_trace(path: Path, limit: int) -> Trace:
    """The first `limit` requests of a trace. Raises ConfigError naming the file, and the line where one is wrong."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = ((number, line) for number, line in enumerate(file, 1) if line.strip())
            first = next(lines, None)
            if first is None:
                raise ConfigError(f"{path}: the trace is empty")
            kind = detect(path, first[1])
            if kind == "azure":
                rows = read_csv(path, itertools.chain([first], lines))
            else:
                rows = read_json_lines(path, kind, itertools.chain([first], lines))
            requests = sorted(itertools.islice(rows, limit), key=lambda request: request.arrival)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: this is no text: {error}") from error
    if not requests:
        raise ConfigError(f"{path}: the trace has no requests")
    start = requests[0].arrival
    moved = (TraceRequest(r.arrival - start, r.input_length, r.output_length, r.hash_ids, r.turn) for r in requests)
    return Trace(kind, BLOCK[kind], tuple(moved))


def detect(path: Path, line: str) -> str:
    """The format that a trace's first line is of."""
    if not line.lstrip().startswith("{"):
        header = [name.strip() for name in line.split(",")]
        if all(name in header for name in AZURE_FIELDS):
            return "azure"
        raise ConfigError(f"{path}: line 1 is neither a JSON object nor a header with {', '.join(AZURE_FIELDS)}")
    try:
        row = msgspec.json.decode(line)
    except msgspec.DecodeError as error:
        raise ConfigError(f"{path}:1: {error}") from error
    return "bailian" if "chat_id" in row else "mooncake"


def read_json_lines(path: Path, kind: str, lines: Iterator[tuple[int, str]]) -> Iterator[TraceRequest]:
    """The requests of a trace in JSON lines."""
    decoder = msgspec.json.Decoder(JsonRow)
    block = BLOCK[kind]
    for number, line in lines:
        try:
            row = decoder.decode(line)
        except msgspec.DecodeError as error:
            raise ConfigError(f"{path}:{number}: {error}") from error
        ids, length = len(row.hash_ids), row.input_length
        if ids and not length // block <= ids <= -(-length // block):
            raise ConfigError(f"{path}:{number}: {ids} hash_ids for {length} tokens in blocks of {block} ({kind})")
        hash_ids = tuple(row.hash_ids)
        yield TraceRequest(row.timestamp * SECONDS[kind], length, row.output_length, hash_ids, row.turn)


def read_csv(path: Path, lines: Iterator[tuple[int, str]]) -> Iterator[TraceRequest]:
    """The requests of a trace as CSV with a header."""
    _, header = next(lines)
    names = [name.strip() for name in header.split(",")]
    for number, line in lines:
        values = next(csv.reader([line]))
        row = dict(zip(names, values, strict=False))
        try:
            when = datetime.datetime.fromisoformat(row["TIMESTAMP"])
            tokens_in, tokens_out = int(row["ContextTokens"]), int(row["GeneratedTokens"])
        except KeyError as error:
            raise ConfigError(f"{path}:{number}: the line has no {error.args[0]}") from error
        except ValueError as error:
            raise ConfigError(f"{path}:{number}: {error}") from error
        if tokens_in < 1 or tokens_out < 1:
            raise ConfigError(f"{path}:{number}: ContextTokens and GeneratedTokens must be at least 1")
        arrival = when.replace(tzinfo=when.tzinfo or datetime.UTC).timestamp()
        yield TraceRequest(arrival, tokens_in, tokens_out)
