"""One streamed completion, seen from its client: when its tokens came, and how many the server says there were."""

from __future__ import annotations

import asyncio
import json
from array import array
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from minisgl.bench.online.http1 import Exchange, Target, WireError, connect


@dataclass(slots=True)
class Record:
    """What became of one request. Times are in s on the performance counter, `times` one for each event with tokens.

    Counts are the server's own, from `usage`; None is what it did not say. `failure` is a short kind that many requests
    may share, `detail` what exactly happened to this one.
    """

    index: int
    due: float = 0.0
    sent: float = 0.0
    times: array[float] = field(default_factory=lambda: array("d"))
    expected_input: int | None = None
    expected_output: int = 0
    expected_cached: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int | None = None
    text: str = ""
    failure: str | None = None
    detail: str = ""


class BadAnswerError(Exception):
    """An answer that cannot be counted: its kind and its words."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(f"{kind}: {detail}")
        self.kind = kind
        self.detail = detail


class Stream(Exchange):
    """The server-sent events of a completion (WHATWG HTML, section 9.2), most of them counted and not decoded."""

    def __init__(self, record: Record, keep: bool) -> None:
        super().__init__()
        self.record = record
        self.finished = False
        self.error: bytes = b""
        self.events: list[bytes] = []
        """The last two events, or all of them where the answer's text is wanted."""
        self._keep = keep
        self._partial = b""
        self._body = bytearray()

    def on_body(self, data: bytes, now: float) -> None:
        """Take in events, or the body of an error."""
        if self.status != 200:
            self._body += data
            return
        data = self._partial + data
        if b"\r" in data:
            data = data.replace(b"\r\n", b"\n")
        events = data.split(b"\n\n")
        self._partial = events.pop()
        for event in events:
            self._take(event, now)

    def _take(self, event: bytes, now: float) -> None:
        if not event.startswith(b"data:"):  # a comment, or fields before the data
            lines = [line for line in event.split(b"\n") if line.startswith(b"data:")]
            if not lines:
                return
            event = lines[0]
        data = event[5:].strip()
        if data == b"[DONE]":
            self.finished = True
            return
        if b'"error"' in data and "error" in (decoded := decode(data)) and decoded["error"]:
            self.error = data
            return
        record = self.record
        if not record.times and not has_token(decode(data)):
            return
        record.times.append(now)
        if not self._keep and len(self.events) == 2:
            del self.events[0]
        self.events.append(data)

    def settle(self) -> None:
        """Read the counts when all has come. Raises BadAnswerError."""
        if self.status != 200:
            raise BadAnswerError(f"HTTP {self.status}", error_text(bytes(self._body)))
        if self.error:
            raise BadAnswerError("error in the stream", error_text(self.error))
        if not self.finished:
            raise BadAnswerError("cut off", "the stream ended without [DONE]")
        decoded = [decode(event) for event in self.events]
        usage = next((event["usage"] for event in reversed(decoded[-2:]) if event.get("usage")), None)
        # The last events may hold the usage, or the reason of the end, and no token.
        while decoded and len(self.record.times) > 1 and not has_token(decoded[-1]):
            decoded.pop()
            self.record.times.pop()
        if not isinstance(usage, dict):
            raise BadAnswerError("no usage", "the server did not count the tokens: stream_options.include_usage")
        record = self.record
        record.prompt_tokens = int(usage["prompt_tokens"])
        record.completion_tokens = int(usage["completion_tokens"])
        details = usage.get("prompt_tokens_details")
        if isinstance(details, dict) and details.get("cached_tokens") is not None:
            record.cached_tokens = int(details["cached_tokens"])
        if not record.times or not record.completion_tokens:
            raise BadAnswerError("no tokens", f"{record.completion_tokens} tokens in {len(record.times)} events")
        if self._keep:
            record.text = "".join(text_of(event) for event in decoded)


def decode(data: bytes) -> dict[str, Any]:
    """A JSON object. Raises WireError, which ends the exchange."""
    try:
        value = json.loads(data)
    except ValueError as error:
        raise WireError(f"an event is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise WireError("an event is not a JSON object")
    return value


def has_token(event: Mapping[str, Any]) -> bool:
    """Whether an event stands for a token: it has a choice, and in a chat its delta has more than the role."""
    for choice in event.get("choices") or ():
        if "delta" not in choice:
            return True
        delta = choice["delta"] or {}
        if any(value for name, value in delta.items() if name != "role"):
            return True
    return False


def text_of(event: Mapping[str, Any]) -> str:
    """The text of an event's first choice."""
    choices = event.get("choices") or [{}]
    return str(choices[0].get("text") or (choices[0].get("delta") or {}).get("content") or "")


def error_text(body: bytes) -> str:
    """What an error body says, in OpenAI's form or any other."""
    try:
        error = json.loads(body)["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        return body[:200].decode(errors="replace")


async def stream_completion(
    target: Target,
    path: str,
    body: bytes,
    record: Record,
    ready: Callable[[], Awaitable[None]],
    timeout: float,
    keep: bool,
) -> None:
    """Connect, wait for `ready()`, send, and fill the record; what goes wrong ends up in it.

    `timeout` is how long connecting may take, and then the answer, in s.
    """
    stream = Stream(record, keep)
    request = target.request("POST", path, body)
    try:
        async with asyncio.timeout(timeout) as limit:
            await connect(target, stream)
            limit.reschedule(None)
            await ready()
            limit.reschedule(asyncio.get_running_loop().time() + timeout)
            record.sent = stream.send(request)
            await stream.done
        stream.settle()
    except BadAnswerError as error:
        record.failure, record.detail = error.kind, error.detail
    except TimeoutError:
        record.failure, record.detail = "timeout", f"nothing more within {timeout:g} s"
    except WireError as error:
        kind = "cut off" if stream.status in (0, 200) else f"HTTP {stream.status}"
        record.failure, record.detail = kind, str(error)
    except OSError as error:
        record.failure, record.detail = f"connect: {type(error).__name__}", str(error)
    except (KeyError, TypeError, ValueError) as error:
        record.failure, record.detail = "malformed answer", f"{type(error).__name__}: {error}"
    finally:
        stream.close()
