"""A whole server in the test's event loop: uvicorn on a free port, the engine client, and an echoing engine."""

import asyncio
import contextlib
import dataclasses
import json
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
from openai import AsyncOpenAI

from helpers.stub_engine import StubEngine
from helpers.tiny_tokenizers import write_tokenizer
from minisgl.config import Config
from minisgl.core.types import Grammar, ModelInfo
from minisgl.server.api_process import HttpServer, with_middleware
from minisgl.server.app import make_app
from minisgl.server.engine_client import SocketEngineClient
from minisgl.server.preparation import Api, Check, Preparation
from minisgl.system import PrivateFolder
from minisgl.text.tokenizer import Tokenizer

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ prefix | default('') }}{% endif %}"
)
MODEL = "stub-model"
JSON = {"Content-Type": "application/json"}  # also of the bodies that tests give as bytes


@dataclasses.dataclass
class Web:
    """The HTTP side of a server, on a port of its own, and clients for it."""

    client: SocketEngineClient
    tokenizer: Tokenizer
    http: httpx.AsyncClient
    openai: AsyncOpenAI
    port: int

    async def connect(self, *pieces: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection of its own on which these pieces were sent, a little apart."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        for number, piece in enumerate(pieces):
            await asyncio.sleep(0.05 if number else 0.0)
            writer.write(piece)
        return reader, writer

    async def until(self, condition: Callable[[], bool], timeout: float = 5.0) -> None:
        async with asyncio.timeout(timeout):
            while not condition():
                await asyncio.sleep(0.005)


@dataclasses.dataclass
class Serving(Web):
    """Handles on everything a test may want to look at."""

    engine: StubEngine

    def speak(self, text: str) -> None:
        """From now on the engine says this, then EOS."""
        ids = self.tokenizer.encode(text)
        self.engine.say = lambda request: ids


def raw_post(path: str, body: object) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
    return f"{head}\r\n\r\n".encode() + data


def events(body: str) -> list[Any]:
    """The JSON of a stream's events; it must end as streams do."""
    lines = body.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


# Runs an engine that connects to the sockets in this folder, for as long as the context lasts.
StartEngine = Callable[[str], contextlib.AbstractAsyncContextManager[object]]


@contextlib.asynccontextmanager
async def web(
    folder: Path,
    model: ModelInfo,
    start_engine: StartEngine,
    *,
    template: str | None = CHAT_TEMPLATE,
    add_bos: bool = False,
    state: str = "",
    health_timeout: float = 5.0,
    max_live: int = 8,
    check_grammar: Callable[[Grammar], Check | None] | None = None,
    **flags: Any,
) -> AsyncIterator[Web]:
    """Serve `model` over HTTP; `flags` are fields of Config."""
    config = Config(**flags)
    tokenizer = Tokenizer.load(write_tokenizer(folder, template=template, add_bos=add_bos, state=state))
    sockets = PrivateFolder()
    client = SocketEngineClient(sockets.name, config, max_live=max_live)
    # With the protocol named asyncio switches off Nagle's delay on each connection, as it does in production.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    port = listener.getsockname()[1]
    listening = asyncio.Event()
    preparation = Preparation(model, tokenizer, max_live, config.served_model_name, check_grammar)
    api = Api(client, preparation, config, ["stub = on"], str(folder), time.monotonic(), health_timeout)
    server = HttpServer(with_middleware(make_app(api), client.metrics, config), listening.set, config)
    url = f"http://127.0.0.1:{port}" if config.ssl_certfile is None else f"https://127.0.0.1:{port}"
    verify = config.ssl_certfile is None or ssl.create_default_context(cafile=config.ssl_certfile)
    try:
        async with start_engine(sockets.name):
            await client.ready()
            running = asyncio.create_task(server.serve([listener]))
            await listening.wait()
            try:
                async with (
                    httpx.AsyncClient(base_url=url, timeout=20.0, verify=verify, headers=JSON) as http,
                    AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=20.0) as openai,
                ):
                    yield Web(client, tokenizer, http, openai, port)
            finally:
                client.fail("the test is over")
                server.should_exit = True
                await running
    finally:
        listener.close()
        await client.close()
        sockets.cleanup()


@contextlib.asynccontextmanager
async def serving(
    folder: Path, *, delay: float = 0.0, max_seq_len: int = 128, **settings: Any
) -> AsyncIterator[Serving]:
    """Serve a model whose engine echoes; `settings` are those of `web`."""
    vocab_size = Tokenizer.load(write_tokenizer(folder, state=settings.get("state", ""))).backend.get_vocab_size()
    model = ModelInfo(name=MODEL, vocab_size=vocab_size, max_seq_len=max_seq_len, eos_token_ids=(1,))
    engines: list[StubEngine] = []

    @contextlib.asynccontextmanager
    async def echoing(sockets: str) -> AsyncIterator[None]:
        engines.append(StubEngine(sockets, model, folder, delay))
        task = asyncio.create_task(engines[0].run())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async with web(folder, model, echoing, **settings) as side:
        yield Serving(**vars(side), engine=engines[0])
