"""Streamed tokens/s through one or more API processes, with an engine that costs nothing: what HTTP alone can carry.

    minisgl bench streaming [--api-workers 1] [--clients 64] [--step 0.003] [--tokens 200] [--seconds 10]

The server is as `minisgl` starts it, but its engine gives every running request a token each step.
"""

import argparse
import re
import subprocess
import sys
import time
from collections.abc import Sequence

import msgspec
import zmq

from minisgl.cli import Parser
from minisgl.config import Config
from minisgl.core.types import EngineStats, FinishReason, ModelInfo, TokenEvent
from minisgl.formats.hub import locate_model
from minisgl.server.ipc import Abort, Add, Attach, Detach, Events, FromEngine, Ping, Pong, Ready, ToEngine
from minisgl.server.launch import serve
from minisgl_bench.command import online

BACKLOG = 4  # steps the engine may be ahead of what the server has read from its socket
PROGRAM = [sys.executable, "-m", "minisgl_bench", "streaming"]


class EchoEngine:
    """Speaks the engine's protocol: tokens of the prompt, over and over, one a step for every request."""

    def __init__(self, to_engine: str, from_engine: str, folder: str) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.inbox = self.context.socket(zmq.PULL)
        self.outboxes: dict[int, zmq.Socket[bytes]] = {}
        self.live: dict[int, dict[str, tuple[memoryview[int], int, int]]] = {}  # prompt, tokens given, their limit
        model = ModelInfo(name="stub", vocab_size=49152, max_seq_len=1 << 20, eos_token_ids=(0,))
        self.ready = Ready(model, folder, [])
        self.handle(Attach(0, to_engine, from_engine))

    def send(self, link: int, message: FromEngine) -> None:
        self.outboxes[link].send(msgspec.msgpack.encode(message))  # waits for a process that is BACKLOG steps behind

    def handle(self, message: ToEngine) -> None:
        match message:
            case Add(request, link):
                self.live[link][request.id] = (request.prompt, 0, request.params.max_tokens or 16)
            case Abort(ids):
                for live in self.live.values():
                    for name in ids:
                        live.pop(name, None)
            case Ping(nonce, link):
                self.send(link, Pong(nonce, EngineStats(running=sum(map(len, self.live.values())))))
            case Attach(link, to_engine, from_engine):
                outbox = self.outboxes[link] = self.context.socket(zmq.PUSH)
                outbox.setsockopt(zmq.SNDHWM, BACKLOG)
                outbox.connect(from_engine)
                self.inbox.connect(to_engine)
                self.live[link] = {}
                self.send(link, self.ready)
            case Detach(link):
                self.outboxes.pop(link).close(linger=0)
                del self.live[link]

    def step(self) -> None:
        for link, live in self.live.items():
            events = []
            for name, (prompt, done, limit) in list(live.items()):
                finish = FinishReason.LENGTH if done + 1 >= limit else None
                token = prompt[(done + len(prompt) // 2) % len(prompt)]  # its first ones are special and have no text
                events.append(TokenEvent(id=name, tokens=(token,), finish=finish))
                live[name] = (prompt, done + 1, limit)
                if finish is not None:
                    del live[name]
            if events:
                self.send(link, Events(events))

    def run(self, step: float) -> None:
        decoder = msgspec.msgpack.Decoder(ToEngine)
        due = time.perf_counter()
        while True:
            while self.inbox.poll(0 if any(self.live.values()) else 1000):
                self.handle(decoder.decode(self.inbox.recv()))
            if not any(self.live.values()):
                due = time.perf_counter()
                continue
            due = max(due + step, time.perf_counter() - step)
            time.sleep(max(0.0, due - time.perf_counter()))
            self.step()


def measure(options: argparse.Namespace) -> int:
    command = [*PROGRAM, "--serve", "--api-workers", str(options.api_workers), "--step", str(options.step)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            url = next(found[1] for line in server.stdout if (found := re.search(r"(http://.*:\d+)/v1\n", line)))
            print(f"the engine offers {options.clients / options.step:,.0f} tokens/s to {options.clients} clients")
            count = max(1, round(options.seconds / options.step / options.tokens)) * options.clients
            load = ["--concurrency", options.clients, "--requests", count, "--output-len", options.tokens]
            sent = ["--endpoint", "chat", "--input-len", 64, "--warmup", options.clients]
            return online(list(map(str, ["--url", url, "--server-pid", server.pid, *load, *sent])))
        finally:
            server.terminate()


def main(arguments: Sequence[str]) -> int:
    parser = Parser(prog="minisgl bench streaming", description=__doc__)
    parser.add_argument("--api-workers", type=int, default=1, help="API processes of the server")
    parser.add_argument("--clients", type=int, default=64, help="connections, each with one answer at a time")
    parser.add_argument("--tokens", type=int, default=200, help="tokens of an answer")
    parser.add_argument("--seconds", type=float, default=10.0, help="time to measure, as far as the server keeps up")
    parser.add_argument("--step", type=float, default=0.003, help="seconds of an engine's step")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--engine", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.engine:
        start = msgspec.json.decode(sys.stdin.buffer.readline())
        EchoEngine(start["to_engine"], start["from_engine"], start["config"]["model"]).run(options.step)
    elif options.serve:
        folder = str(locate_model(None, "huggingface"))
        config = Config(model=folder, port=0, log_level="WARNING", api_workers=options.api_workers)
        serve(config, [*PROGRAM, "--engine", "--step", str(options.step)])
    else:
        return measure(options)
    return 0
