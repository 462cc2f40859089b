"""Streamed tokens/s through one API process, with an engine that costs nothing: what HTTP alone can carry.

Three processes on the machine's cores: the server as `minisgl` starts it, in place of its engine one that gives every
running request a token each step, and clients on plain sockets that count events.

    python benchmark/streaming.py [--clients 64] [--step 0.003] [--tokens 200] [--seconds 10] [--profile FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import zmq

BACKLOG = 4
"""Steps the engine may be ahead of what the server has read from its socket."""


def engine() -> None:
    """Speak the engine's protocol: tokens of the prompt, over and over, one a step for every request."""
    from minisgl.engine.messages import Abort, Add, Events, Ping, Pong, Ready, ToEngine
    from minisgl.types import EngineStats, FinishReason, ModelInfo, TokenEvent

    start = msgspec.json.decode(sys.stdin.buffer.readline())
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    inbox, outbox = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    inbox.connect(start["to_engine"])
    outbox.setsockopt(zmq.SNDHWM, BACKLOG)
    outbox.connect(start["from_engine"])
    encoder, decoder = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(ToEngine)
    folder = start["config"]["model"]
    model = ModelInfo(name="stub", vocab_size=49152, max_seq_len=1 << 20, eos_token_ids=(0,))
    outbox.send(encoder.encode(Ready(model, folder, [])))
    live: dict[str, tuple[list[int], int, int]] = {}
    step = float(os.environ.get("STEP_SECONDS", "0.003"))
    due = time.perf_counter()
    while True:
        while inbox.poll(0 if live else 1000):
            match decoder.decode(inbox.recv()):
                case Add(request):
                    live[request.id] = (request.prompt, 0, request.params.max_tokens or 16)
                case Abort(ids):
                    for name in ids:
                        live.pop(name, None)
                case Ping(nonce):
                    outbox.send(encoder.encode(Pong(nonce, EngineStats(running=len(live)))))
        if not live:
            due = time.perf_counter()
            continue
        due = max(due + step, time.perf_counter() - step)
        time.sleep(max(0.0, due - time.perf_counter()))
        events = []
        for name, (prompt, done, limit) in list(live.items()):
            finish = FinishReason.LENGTH if done + 1 >= limit else None
            events.append(TokenEvent(id=name, tokens=(prompt[done % len(prompt)],), finish=finish))
            if finish is None:
                live[name] = (prompt, done + 1, limit)
            else:
                del live[name]
        outbox.send(encoder.encode(Events(events)))


class Client(asyncio.Protocol):
    """Sends one request after the other on one connection and counts the events of the answers."""

    def __init__(self, tokens: int) -> None:
        text = "Once upon a time there was a server that told stories to many clients at once. " * 4
        body = json.dumps({"messages": [{"role": "user", "content": text}], "max_tokens": tokens, "stream": True})
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        self.request = (head + body).encode()
        self.events = 0
        self.answers = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ask."""
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        """Count, and ask again after the end of an answer."""
        self.events += data.count(b"data: ")
        if data.endswith(b"0\r\n\r\n"):
            self.answers += 1
            self.transport.write(self.request)


async def load(port: int, clients: int, tokens: int, seconds: float, warm: float = 2.0) -> tuple[float, float]:
    """Tokens/s of the answers that end, and events/s, after a time to warm up; an event may hold several tokens."""
    loop = asyncio.get_running_loop()
    made = [await loop.create_connection(lambda: Client(tokens), "127.0.0.1", port) for _ in range(clients)]
    await asyncio.sleep(warm)
    events, answers = sum(client.events for _, client in made), sum(client.answers for _, client in made)
    started = time.perf_counter()
    await asyncio.sleep(seconds)
    events, answers = sum(c.events for _, c in made) - events, sum(c.answers for _, c in made) - answers
    took = time.perf_counter() - started
    for transport, _ in made:
        transport.close()
    return answers * tokens / took, events / took


def serve(folder: str) -> None:
    """The server under test, in a process of its own."""
    from minisgl.config import Config
    from minisgl.server import launch

    launch.serve(Config(model=folder, port=0, log_level="WARNING"), [sys.executable, __file__, "--engine"])


def cpu_seconds(pid: int) -> float:
    """Time that a process has computed."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(options: argparse.Namespace) -> None:
    """Start everything, and print what came through."""
    from minisgl.models.locate import locate_model

    profile = ["-m", "cProfile", "-o", options.profile] if options.profile else []
    command = [sys.executable, *profile, __file__, "--server", str(locate_model(None, "huggingface"))]
    environment = {**os.environ, "STEP_SECONDS": str(options.step)}
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert server.stdout is not None
        port = next(int(found[1]) for line in server.stdout if (found := re.search(r"http://.*:(\d+)/v1\n", line)))
        before, started = cpu_seconds(server.pid), time.perf_counter()
        tokens, events = asyncio.run(load(port, options.clients, options.tokens, options.seconds))
        busy = (cpu_seconds(server.pid) - before) / (time.perf_counter() - started)
    finally:
        server.terminate()
        server.wait()
    offered = options.clients / options.step
    print(
        f"{tokens:,.0f} streamed tokens/s of {offered:,.0f} offered, {events:,.0f} events/s, "
        f"{options.clients} clients, {options.tokens} tokens an answer; the API process was busy {busy:.0%}"
    )


def main() -> None:
    """Measure, or be one of the processes that it takes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=64, help="connections, each with one answer at a time")
    parser.add_argument("--tokens", type=int, default=200, help="tokens of an answer")
    parser.add_argument("--seconds", type=float, default=10.0, help="time measured, after 2 s to warm up")
    parser.add_argument("--step", type=float, default=0.003, help="seconds of an engine's step")
    parser.add_argument("--profile", help="write a cProfile of the server process to this file")
    parser.add_argument("--engine", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--server", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.engine:
        engine()
    elif options.server:
        serve(options.server)
    else:
        measure(options)


if __name__ == "__main__":
    main()
