"""Streamed tokens/s through one or more API processes, with an engine that costs nothing: what HTTP alone can carry.

On the machine's cores: the server as `minisgl` starts it, in place of its engine a process that gives every running
request a token each step, and clients on plain sockets that count events, in a process for each API process.

    python benchmark/streaming.py [--api-workers 1] [--clients 64] [--step 0.003] [--tokens 200] [--seconds 10]
                                  [--profile FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import zmq

from minisgl.core.types import EngineStats, FinishReason, ModelInfo, TokenEvent
from minisgl.server import ipc

BACKLOG = 4
"""Steps the engine may be ahead of what the server has read from its socket."""


class Stub:
    """Speaks the engine's protocol: tokens of the prompt, over and over, one a step for every request."""

    def __init__(self, to_engine: str, from_engine: str, folder: str) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.inbox = self.context.socket(zmq.PULL)
        self.outboxes: dict[int, zmq.Socket[bytes]] = {}
        self.live: dict[int, dict[str, tuple[list[int], int, int]]] = {}
        model = ModelInfo(name="stub", vocab_size=49152, max_seq_len=1 << 20, eos_token_ids=(0,))
        self.ready = ipc.Ready(model, folder, [])
        self.attach(ipc.Attach(0, to_engine, from_engine))

    def attach(self, order: ipc.Attach) -> None:
        """Begin to serve a process."""
        outbox = self.outboxes[order.link] = self.context.socket(zmq.PUSH)
        outbox.setsockopt(zmq.SNDHWM, BACKLOG)
        outbox.connect(order.from_engine)
        self.inbox.connect(order.to_engine)
        self.live[order.link] = {}
        self.send(order.link, self.ready)

    def send(self, link: int, message: ipc.FromEngine) -> None:
        """Say something; a process that is `BACKLOG` steps behind is waited for."""
        self.outboxes[link].send(msgspec.msgpack.encode(message))

    def take(self, message: ipc.ToEngine) -> None:
        """Do what a process asks."""
        match message:
            case ipc.Add(request, link):
                self.live[link][request.id] = (request.prompt, 0, request.params.max_tokens or 16)
            case ipc.Abort(ids):
                for live in self.live.values():
                    for name in ids:
                        live.pop(name, None)
            case ipc.Ping(nonce, link):
                self.send(link, ipc.Pong(nonce, EngineStats(running=sum(map(len, self.live.values())))))
            case ipc.Attach():
                self.attach(message)
            case ipc.Detach(link):
                self.outboxes.pop(link).close(linger=0)
                del self.live[link]

    def step(self) -> None:
        """Give every request a token."""
        for link, live in self.live.items():
            events = []
            for name, (prompt, done, limit) in list(live.items()):
                finish = FinishReason.LENGTH if done + 1 >= limit else None
                events.append(TokenEvent(id=name, tokens=(prompt[done % len(prompt)],), finish=finish))
                if finish is None:
                    live[name] = (prompt, done + 1, limit)
                else:
                    del live[name]
            if events:
                self.send(link, ipc.Events(events))

    def run(self, step: float) -> None:
        """Serve for ever, a step each `step` s while there is something to do."""
        decoder = msgspec.msgpack.Decoder(ipc.ToEngine)
        due = time.perf_counter()
        while True:
            while self.inbox.poll(0 if any(self.live.values()) else 1000):
                self.take(decoder.decode(self.inbox.recv()))
            if not any(self.live.values()):
                due = time.perf_counter()
                continue
            due = max(due + step, time.perf_counter() - step)
            time.sleep(max(0.0, due - time.perf_counter()))
            self.step()


def engine() -> None:
    """Be the engine's process."""
    start = msgspec.json.decode(sys.stdin.buffer.readline())
    stub = Stub(start["to_engine"], start["from_engine"], start["config"]["model"])
    stub.run(float(os.environ.get("STEP_SECONDS", "0.003")))


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


def drive(port: int, options: argparse.Namespace) -> tuple[float, float]:
    """The load of all clients, from as many processes as serve them: tokens/s and events/s."""
    count = options.api_workers
    shares = [options.clients // count + (i < options.clients % count) for i in range(count)]
    flags = ["--tokens", str(options.tokens), "--seconds", str(options.seconds), "--drive", str(port)]
    with contextlib.ExitStack() as stack:
        drivers = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, __file__, *flags, "--clients", str(share)], stdout=subprocess.PIPE, text=True
                )
            )
            for share in shares
        ]
        figures = [json.loads(driver.communicate()[0]) for driver in drivers]
    return sum(tokens for tokens, _ in figures), sum(events for _, events in figures)


def serve(folder: str, api_workers: int) -> None:
    """The server under test, in a process of its own."""
    from minisgl.config import Config
    from minisgl.server import launch

    config = Config(model=folder, port=0, log_level="WARNING", api_workers=api_workers)
    launch.serve(config, [sys.executable, __file__, "--engine"])


def cpu_seconds(pid: int) -> float:
    """Time that a process has computed."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def api_processes(pid: int) -> list[int]:
    """The processes of a server that speak HTTP."""
    started = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [c for c in started if b"api_process" in Path(f"/proc/{c}/cmdline").read_bytes()] or [pid]


def measure(options: argparse.Namespace) -> None:
    """Start everything, and print what came through."""
    from minisgl.formats.hub import locate_model

    profile = ["-m", "cProfile", "-o", options.profile] if options.profile else []
    flags = ["--server", str(locate_model(None, "huggingface")), "--api-workers", str(options.api_workers)]
    environment = {**os.environ, "STEP_SECONDS": str(options.step)}
    server = subprocess.Popen(
        [sys.executable, *profile, __file__, *flags], stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert server.stdout is not None
        port = next(int(found[1]) for line in server.stdout if (found := re.search(r"http://.*:(\d+)/v1\n", line)))
        pids = api_processes(server.pid)
        before, started = [cpu_seconds(pid) for pid in pids], time.perf_counter()
        tokens, events = drive(port, options)
        took = time.perf_counter() - started
        busy = [(cpu_seconds(pid) - used) / took for pid, used in zip(pids, before, strict=True)]
    finally:
        server.terminate()
        server.wait()
    offered = options.clients / options.step
    print(
        f"{tokens:,.0f} streamed tokens/s of {offered:,.0f} offered, {events:,.0f} events/s, "
        f"{options.clients} clients, {options.tokens} tokens an answer; "
        f"API processes were busy {', '.join(f'{share:.0%}' for share in busy)}"
    )


def main() -> None:
    """Measure, or be one of the processes that it takes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--api-workers", type=int, default=1, help="API processes of the server")
    parser.add_argument("--clients", type=int, default=64, help="connections, each with one answer at a time")
    parser.add_argument("--tokens", type=int, default=200, help="tokens of an answer")
    parser.add_argument("--seconds", type=float, default=10.0, help="time measured, after 2 s to warm up")
    parser.add_argument("--step", type=float, default=0.003, help="seconds of an engine's step")
    parser.add_argument("--profile", help="write a cProfile of the server process to this file")
    parser.add_argument("--engine", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--server", help=argparse.SUPPRESS)
    parser.add_argument("--drive", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.engine:
        engine()
    elif options.server:
        serve(options.server, options.api_workers)
    elif options.drive:
        print(json.dumps(asyncio.run(load(options.drive, options.clients, options.tokens, options.seconds))))
    else:
        measure(options)


if __name__ == "__main__":
    main()
