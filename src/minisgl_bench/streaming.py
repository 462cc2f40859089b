"""Streamed tokens/s through one or more API processes, with an engine that costs nothing: the limit of HTTP alone.

The server is as `minisgl` starts it; in place of its engine a process gives every running request a token each step.
The clients count events on plain sockets, in one process for each API process.
"""

import argparse
import asyncio
import json
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec
import psutil

from minisgl.cli import Parser
from minisgl.config import Config
from minisgl.core.types import EngineStats, FinishReason, ModelInfo, TokenEvent
from minisgl.errors import EngineDeadError
from minisgl.formats.hub import locate_model
from minisgl.server import ipc
from minisgl.server.launch import serve
from minisgl_bench.command import count, number

if TYPE_CHECKING:
    from minisgl.server.engine_process import Links

PROGRAM = (sys.executable, "-m", "minisgl_bench", "streaming")
WARM_UP_SECONDS = 2.0
PROMPT = "Once upon a time there was a server that told stories to many clients at once. " * 4


class EchoEngine:
    """Speaks the engine's protocol: tokens of the prompt, over and over, one a step for every request."""

    def __init__(self, links: "Links", folder: str) -> None:
        self.links = links
        self.live: dict[str, list[int]] = {}  # tokens to come, the next one last
        model = ModelInfo(name="stub", vocab_size=49152, max_seq_len=1 << 20, eos_token_ids=(0,))
        self.links.send_first(ipc.Ready(model, folder, []))

    def receive(self, milliseconds: int) -> None:
        for link, message in self.links.receive(milliseconds):
            match message:
                case ipc.Add(request):
                    echo = request.prompt[len(request.prompt) // 2 :].tolist()  # the first ones are special, textless
                    limit = request.params.max_tokens or 16
                    self.live[request.id] = (echo * (limit // len(echo) + 1))[:limit]
                case ipc.Abort(ids):
                    for name in ids:
                        self.live.pop(name, None)
                case ipc.Query(nonce):
                    self.links.send(ipc.Reply(nonce, EngineStats(running=len(self.live))), link)

    def step(self) -> None:
        events = []
        for name, tokens in list(self.live.items()):
            token = tokens.pop()
            finish = None if tokens else FinishReason.LENGTH
            events.append(TokenEvent(id=name, tokens=(token,), finish=finish))
            if finish is not None:
                del self.live[name]
        self.links.send_events(events)

    def run(self, step: float) -> None:
        due = time.perf_counter()
        while True:
            self.receive(0 if self.live else 1000)
            if not self.live:
                due = time.perf_counter()
                continue
            due = max(due + step, time.perf_counter() - step)
            time.sleep(max(0.0, due - time.perf_counter()))
            self.step()


class CountingClient(asyncio.Protocol):
    """Sends one chat after the other on one connection and counts the events of the completions."""

    def __init__(self, tokens: int) -> None:
        message = {"role": "user", "content": PROMPT}
        body = json.dumps({"messages": [message], "max_tokens": tokens, "stream": True, "ignore_eos": True})
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        head += "Content-Type: application/json\r\n\r\n"
        self.request = (head + body).encode()
        self.events = self.completions = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        self.events += data.count(b"data: ")
        if data.endswith(b"0\r\n\r\n"):
            self.completions += 1
            self.transport.write(self.request)


async def load(port: int, clients: int, tokens: int, seconds: float) -> tuple[float, float]:
    """Tokens/s of the completions that end within `seconds`, and events/s; an event may hold several tokens."""
    loop = asyncio.get_running_loop()
    made = []
    for _ in range(clients):
        made.append((await loop.create_connection(lambda: CountingClient(tokens), "127.0.0.1", port))[1])
    await asyncio.sleep(WARM_UP_SECONDS)
    for client in made:
        client.events = client.completions = 0
    started = time.perf_counter()
    await asyncio.sleep(seconds)
    took = time.perf_counter() - started
    return sum(client.completions for client in made) * tokens / took, sum(client.events for client in made) / took


def measure(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    with subprocess.Popen([*PROGRAM, *arguments, "--serve"], stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            ports = (found[1] for line in server.stdout if (found := re.search(r"http://.*:(\d+)/v1\n", line)))
            if (port := next(ports, None)) is None:
                raise EngineDeadError(f"the server ended with status {server.wait()} before it was ready")
            children = psutil.Process(server.pid).children()
            api = [child for child in children if "minisgl.server.api_process" in child.cmdline()]
            api = api or [psutil.Process(server.pid)]
            shares = [options.clients // len(api) + (i < options.clients % len(api)) for i in range(len(api))]
            before = [sum(process.cpu_times()[:2]) for process in api]
            began = time.perf_counter()
            commands = [[*PROGRAM, *arguments, "--port", port, "--clients", str(share)] for share in shares if share]
            drivers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
            figures = [json.loads(driver.communicate()[0]) for driver in drivers]
            took = time.perf_counter() - began
            busy = [(sum(process.cpu_times()[:2]) - was) / took for process, was in zip(api, before, strict=True)]
        finally:
            server.terminate()
    tokens, events = (sum(column) for column in zip(*figures, strict=True))
    print(f"offered   {options.clients / options.step:>10,.0f} tokens/s to {options.clients} clients")
    print(f"streamed  {tokens:>10,.0f} tokens/s in {events:,.0f} events/s")
    print(f"busy      {' '.join(f'{share:.0%}' for share in busy)} of a core by each API process")
    print(f"CPU       {sum(busy) / max(1, tokens) * 1e6:>10.1f} µs by API processes for each token")
    return 0


def main(arguments: Sequence[str]) -> int:
    parser = Parser(prog="minisgl bench streaming", description=__doc__)
    parser.add_argument("--api-workers", type=count, default=1, help="API processes of the server")
    parser.add_argument("--clients", type=count, default=64, help="connections, each with one completion at a time")
    parser.add_argument("--tokens", type=count, default=200, help="tokens of a completion")
    parser.add_argument("--seconds", type=number, default=10.0, help="time to measure")
    parser.add_argument("--step", type=number, default=0.003, help="seconds of an engine's step")
    parser.add_argument("--model", default="", help="folder whose tokenizer is used; default: the bundled model")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--engine", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.engine:
        setup = msgspec.json.decode(sys.stdin.buffer.readline(), type=ipc.EngineSetup)
        from minisgl.server.engine_process import Links  # with torch, which the clients would wait for

        EchoEngine(Links(setup.folder), str(setup.config.model)).run(options.step)
    elif options.serve:
        folder = options.model or str(locate_model(None, "huggingface"))
        config = Config(model=folder, port=0, log_level="WARNING", api_workers=options.api_workers)
        serve(config, [*PROGRAM, *arguments, "--engine"])
    elif options.port:
        print(json.dumps(asyncio.run(load(options.port, options.clients, options.tokens, options.seconds))))
    else:
        return measure(options, arguments)
    return 0
