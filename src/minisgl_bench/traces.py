"""Reading published request traces: when each request came, how long it was, and which blocks of its prompt recurred.

Formats, told apart by their first line:

- Qwen-Bailian (Wang et al., "KVCache Cache in the Wild", ATC 2025): JSON lines, `timestamp` in s, blocks of 16 tokens.
- Mooncake (Qin et al., FAST 2025): JSON lines, `timestamp` in ms, blocks of 512 tokens.
- Azure LLM inference traces (Patel et al., "Splitwise", ISCA 2024): CSV with a date, no blocks.
"""

import csv
import datetime
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
    requests: list[TraceRequest] = []
    kind, names = "", [""]
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for number, line in enumerate(file, 1):
                if len(requests) == limit:
                    break
                if not line.strip():
                    continue
                if not kind:
                    kind = detect(path, line)
                    names = [name.strip() for name in line.split(",")]
                    if kind == "azure":
                        continue
                try:
                    requests.append(read_azure(line, names) if kind == "azure" else read_json(line, kind))
                except ValueError as error:  # msgspec's errors are such
                    raise ConfigError(f"{path}:{number}: {error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: this is no text: {error}") from error
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    if not requests:
        raise ConfigError(f"{path}: the trace {'has no requests' if kind else 'is empty'}")
    requests.sort(key=lambda request: request.arrival)
    start = requests[0].arrival
    return Trace(kind, BLOCK[kind], tuple(replace(request, arrival=request.arrival - start) for request in requests))


def detect(path: Path, line: str) -> str:
    if not line.lstrip().startswith("{"):
        header = [name.strip() for name in line.split(",")]
        if all(name in header for name in AZURE_FIELDS):
            return "azure"
        raise ConfigError(f"{path}: line 1 is neither a JSON object nor a header with {', '.join(AZURE_FIELDS)}")
    try:
        return "bailian" if "chat_id" in msgspec.json.decode(line) else "mooncake"
    except msgspec.DecodeError as error:
        raise ConfigError(f"{path}:1: {error}") from error


def read_json(line: str, kind: str) -> TraceRequest:
    """A request of a trace in JSON lines. Raises ValueError."""
    row = msgspec.json.decode(line, type=JsonRow)
    ids, length, block = len(row.hash_ids), row.input_length, BLOCK[kind]
    if ids and not length // block <= ids <= -(-length // block):
        raise ValueError(f"{ids} hash_ids for {length} tokens in blocks of {block} ({kind})")
    return TraceRequest(row.timestamp * SECONDS[kind], length, row.output_length, tuple(row.hash_ids), row.turn)


def read_azure(line: str, names: Sequence[str]) -> TraceRequest:
    """A request of a trace as CSV, whose dates are in UTC unless they say otherwise. Raises ValueError."""
    row = dict(zip(names, next(csv.reader([line])), strict=False))
    if missing := [name for name in AZURE_FIELDS if name not in row]:
        raise ValueError(f"the line has no {missing[0]}")
    when = datetime.datetime.fromisoformat(row["TIMESTAMP"])
    tokens_in, tokens_out = int(row["ContextTokens"]), int(row["GeneratedTokens"])
    if tokens_in < 1 or tokens_out < 1:
        raise ValueError("ContextTokens and GeneratedTokens must be at least 1")
    return TraceRequest(when.replace(tzinfo=when.tzinfo or datetime.UTC).timestamp(), tokens_in, tokens_out)
