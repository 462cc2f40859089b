"""Files that an engine writes while it works: a trace of its steps, and a recording of its traffic without any text."""

import hashlib
import itertools
import logging
import secrets
import time
from collections.abc import Sequence
from io import FileIO
from typing import Any, Final

import msgspec

from minisgl.core.engine import Observer
from minisgl.core.types import Request, SamplingParams, StepRecord, TokenEvent
from minisgl.errors import ConfigError

logger = logging.getLogger(__name__)

HOST, DEVICE, REQUESTS = 1, 2, 3  # the processes of a trace
BLOCK: Final = 16  # tokens that a recorded hash stands for
DEFAULTS: Final = SamplingParams()


class OutputFile:
    """A file that is given up, with a line in the log, when it cannot be written any more: the engine goes on."""

    def __init__(self, path: str, flag: str) -> None:
        """Raises ConfigError when the file cannot be created."""
        self._name = f"{flag} {path}"
        try:
            self._file = FileIO(path, "w")
        except OSError as error:
            raise ConfigError(f"{self._name}: {error.strerror}") from error

    def write(self, data: bytes | bytearray) -> None:
        try:
            while data and not self._file.closed:
                data = data[self._file.write(data) :]
        except OSError as error:
            logger.error("%s is not written any more: %s", self._name, error.strerror)
            self._file.close()

    def close(self) -> None:
        self._file.close()


class TraceWriter(Observer):
    """Writes Chrome's Trace Event Format: the host, the device, a track for each request, counters.

    Perfetto and chrome://tracing open it, also without its last line, which a crash leaves out.
    """

    def __init__(self, path: str) -> None:
        self._file = OutputFile(path, "--trace-steps")
        self._rows = bytearray()  # of a step, written together
        self._begin = b"[\n"
        self._ended = 0.0  # when the last step did
        self._tracks: dict[str, int] = {}  # of every request, which takes far less than its rows in the file
        for process, name in ((HOST, "host"), (DEVICE, "device"), (REQUESTS, "requests")):
            self._write("M", 0.0, process, 0, "process_name", args={"name": name})

    def observe(self, record: StepRecord) -> None:
        step, decodes, prompt = record.step, len(record.decodes), sum(chunk.length for chunk in record.chunks)
        counts = {"decodes": decodes, "prompt_tokens": prompt}
        self._span(record.planned, record.launched, HOST, 0, f"plan {step}", counts)
        self._span(record.launched, record.sent, HOST, 0, f"launch {step}", counts)
        self._span(record.awaited, record.arrived, HOST, 0, f"wait {step}", counts)
        self._span(record.arrived, record.committed, HOST, 0, f"commit {step}", counts)
        began, ended = record.device or (max(record.sent, self._ended), record.arrived)
        self._ended = ended
        if record.device is not None:
            self._span(began, ended, DEVICE, 0, f"step {step}: {decodes} decodes, {prompt} prompt tokens", counts)
        for name in record.retracted:
            self._instant(record.launched, name, "retracted")
        for name, cached in record.admitted:
            self._instant(record.launched, name, f"admitted, {cached} tokens cached")
        if tracks := [self._track(name) for name in record.decodes]:  # most of the file: all alike but for the track
            row = {"ph": "X", "ts": microseconds(began), "dur": microseconds(ended - began), "pid": REQUESTS}
            head = msgspec.json.encode({**row, "name": "decode", "args": {"step": step}})[:-1]
            self._rows += b"".join([b'%b%b,"tid":%d}' % (self._begin, head, track) for track in tracks])
        for chunk in record.chunks:
            text = f"prompt {chunk.start} to {chunk.start + chunk.length}"
            self._span(began, ended, REQUESTS, self._track(chunk.id), text, {"step": step})
        for name, reason in record.ended:
            self._instant(record.committed, name, f"end: {reason}")
        counts = {"running": record.running, "waiting": record.waiting}
        self._write("C", record.launched, HOST, 0, "requests", args=counts)
        counts = {"free": record.pages_free, "cached": record.pages_cached}
        self._write("C", record.launched, HOST, 0, "pages", args=counts)
        self._file.write(self._rows)
        self._rows.clear()

    def close(self) -> None:
        self._file.write(self._rows + b"\n]\n")
        self._file.close()

    def _track(self, request: str) -> int:
        if (track := self._tracks.get(request)) is None:
            track = self._tracks[request] = len(self._tracks) + 1
            self._write("M", 0.0, REQUESTS, track, "thread_name", args={"name": request})
        return track

    def _instant(self, time: float, request: str, name: str) -> None:
        self._write("i", time, REQUESTS, self._track(request), name, s="t")

    def _span(self, begin: float, end: float, process: int, track: int, name: str, args: dict[str, int]) -> None:
        self._write("X", begin, process, track, name, dur=microseconds(end - begin), args=args)

    def _write(self, kind: str, time: float, process: int, track: int, name: str, **more: Any) -> None:
        row = {"ph": kind, "ts": microseconds(time), "pid": process, "tid": track, "name": name, **more}
        self._rows += self._begin + msgspec.json.encode(row)
        self._begin = b",\n"


def microseconds(seconds: float) -> float:
    return round(seconds * 1e6, 3)


class TrafficRecorder(Observer):
    """Arrivals, lengths, hashes of prompts in blocks of 16 tokens and sampling parameters: never text or token ids.

    A line is written when a request ends, in the format of the Qwen-Bailian traces (Wang et al., "KVCache Cache in the
    Wild", ATC 2025). The hashes are keyed by a number that is not kept, so that no prompt can be guessed from them.
    """

    def __init__(self, path: str) -> None:
        self._file = OutputFile(path, "--record")
        self._key = secrets.token_bytes(32)
        self._start = time.monotonic()
        self._count = itertools.count()
        self._live: dict[str, dict[str, Any]] = {}

    def add(self, request: Request) -> None:
        changed = {
            name: value
            for name, value in msgspec.structs.asdict(request.params).items()
            if isinstance(value, int | float) and value != getattr(DEFAULTS, name)  # no text, no tokens
        }
        self._live[request.id] = {
            "chat_id": next(self._count),
            "timestamp": round(time.monotonic() - self._start, 6),
            "input_length": len(request.prompt),
            "output_length": 0,  # so far
            "hash_ids": self._hashes(request.prompt_bytes),
            "sampling": changed,
            "priority": request.priority,
        }

    def take(self, events: Sequence[TokenEvent]) -> None:
        for event in events:
            if (row := self._live.get(event.id)) is not None:
                row["output_length"] += len(event.tokens)
                if event.finish is not None:
                    row |= {"output_length": max(1, row["output_length"]), "finish": event.finish}
                    self._file.write(msgspec.json.encode(self._live.pop(event.id)) + b"\n")

    def close(self) -> None:
        self._file.close()

    def _hashes(self, prompt: bytes) -> list[int]:
        """A number below 2 ** 52 for each block that begins the prompt, the last of which may be shorter."""
        size, state, hashes = BLOCK * 4, hashlib.blake2b(key=self._key, digest_size=8), []
        for start in range(0, len(prompt), size):
            state.update(prompt[start : start + size])
            hashes.append(int.from_bytes(state.copy().digest()) >> 12)
        return hashes
