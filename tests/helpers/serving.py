"""A whole server in the test's event loop: uvicorn on a free port, the service, and an echoing engine."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import httpx
from openai import AsyncOpenAI

from helpers.stub_engine import StubEngine
from helpers.tiny_tokenizers import write_tokenizer
from minisgl.server.app import create_app
from minisgl.server.child import socket_folder
from minisgl.server.http import HttpServer
from minisgl.server.service import EngineService
from minisgl.tokenizer.tokenizer import Tokenizer
from minisgl.types import Grammar, ModelInfo

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ prefix | default('') }}{% endif %}"
)
MODEL = "stub-model"


@dataclasses.dataclass
class Serving:
    """Handles on everything a test may want to look at."""

    service: EngineService
    engine: StubEngine
    tokenizer: Tokenizer
    http: httpx.AsyncClient
    openai: AsyncOpenAI
    port: int

    def speak(self, text: str) -> None:
        """From now on the engine says this, then EOS."""
        ids = self.tokenizer.encode(text)
        self.engine.say = lambda request: ids

    async def until(self, condition: Callable[[], bool], timeout: float = 5.0) -> None:
        """Wait until something is so."""
        async with asyncio.timeout(timeout):
            while not condition():
                await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def serving(
    folder: Path,
    *,
    delay: float = 0.0,
    template: str | None = CHAT_TEMPLATE,
    health_timeout: float = 5.0,
    check_grammar: Callable[[Grammar], None] | None = None,
    max_seq_len: int = 128,
) -> AsyncIterator[Serving]:
    """Serve a model whose engine echoes."""
    tokenizer = Tokenizer.load(write_tokenizer(folder, template=template))
    model = ModelInfo(name=MODEL, vocab_size=tokenizer.vocab_size, max_seq_len=max_seq_len, eos_token_ids=(1,))
    sockets = socket_folder()
    to_engine, from_engine = f"ipc://{sockets}/to", f"ipc://{sockets}/from"
    service = EngineService(to_engine, from_engine, max_live=8)
    engine = StubEngine(to_engine, from_engine, model, folder, delay)
    echoing = asyncio.create_task(engine.run())
    await service.ready()
    # With the protocol named asyncio switches off Nagle's delay on each connection, as it does in production.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    port = listener.getsockname()[1]
    listening = asyncio.Event()
    app = create_app(service, model, tokenizer, health_timeout=health_timeout, check_grammar=check_grammar)
    server = HttpServer(app, listening.set, debug=False)
    running = asyncio.create_task(server.serve([listener]))
    await listening.wait()
    try:
        url = f"http://127.0.0.1:{port}"
        async with (
            httpx.AsyncClient(base_url=url, timeout=20.0) as http,
            AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=20.0) as openai,
        ):
            yield Serving(service, engine, tokenizer, http, openai, port)
    finally:
        service.fail("the test is over")
        server.should_exit = True
        await running
        listener.close()
        echoing.cancel()
        await asyncio.gather(echoing, return_exceptions=True)
        await service.close()
        for path in sockets.iterdir():
            path.unlink()
        sockets.rmdir()


def serve_and(
    folder: Path, check: Callable[[Serving], Awaitable[None]], *, limit: float = 60, **settings: object
) -> None:
    """Run `check` against a server; the whole takes at most `limit` s."""

    async def main() -> None:
        async with asyncio.timeout(limit), serving(folder, **settings) as server:  # type: ignore[arg-type]
            await check(server)

    asyncio.run(main())
