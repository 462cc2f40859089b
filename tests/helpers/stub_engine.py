"""An engine that echoes: its n-th token is the prompt's n-th, over and over. It speaks the real engine's protocol.

Runs as a task beside the server under test, or as a process that is started as the real one is. There `--model` is the
folder of the tokenizer, and the environment's STUB_MODE (`fail`, `exit`, `deaf` or nothing) says how it misbehaves,
STUB_DELAY how long its steps take (s), STUB_CONTEXT how many tokens a sequence may have.
"""

import asyncio
import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from minisgl.core.types import EngineStats, FinishReason, ModelInfo, Request, TokenEvent, TokenLogprobs
from minisgl.server import ipc
from minisgl.text.tokenizer import Tokenizer


class StubEngine:
    """`delay` is the time of a step in s; each step gives every live request one token.

    Where `say` is set it gives a request's tokens, and after them comes EOS.
    """

    def __init__(self, sockets: str, model: ModelInfo, folder: Path, delay: float = 0.0) -> None:
        self.sockets = sockets
        self.model = model
        self.folder = folder
        self.delay = delay
        self.live: dict[str, tuple[Request, int]] = {}
        self.seen: list[Request] = []
        self.aborted: list[str] = []
        self.refuse: str | None = None
        self.deaf = False
        self.end_silently = False  # each request ends at once, as one whose grammar allows no token
        self.steps = 0
        self.generated = 0
        self.given: dict[str, int] = {}
        self.say: Callable[[Request], Sequence[int]] | None = None
        self.first: ipc.FromEngine = ipc.Ready(model, str(folder), ["stub = on: it echoes"])
        self._changed = asyncio.Event()
        self._links: list[asyncio.StreamWriter] = []
        self._owners: dict[str, asyncio.StreamWriter] = {}

    async def run(self) -> None:
        server = await asyncio.start_unix_server(self._serve, ipc.address(self.sockets))
        try:
            await self._steps()
        finally:
            server.close()
            self.hang_up()

    def hang_up(self) -> None:
        for link in self._links:
            link.close()

    async def _serve(self, reader: asyncio.StreamReader, link: asyncio.StreamWriter) -> None:
        decoder: msgspec.msgpack.Decoder[ipc.ToEngine] = msgspec.msgpack.Decoder(ipc.ToEngine)
        self._links.append(link)
        self.send(self.first, link)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                size = int.from_bytes(await reader.readexactly(ipc.PREFIX), "little")
                self._handle(decoder.decode(await reader.readexactly(size)), link)
        self._links.remove(link)
        link.close()
        self._abort([name for name, owner in self._owners.items() if owner is link])

    def send(self, message: ipc.FromEngine, link: asyncio.StreamWriter) -> None:
        link.write(ipc.frame(msgspec.msgpack.encode(message)))

    def _send_events(self, events: list[TokenEvent]) -> None:
        for link in self._links:
            if own := [event for event in events if self._owners.get(event.id) is link]:
                self.send(ipc.Events(own), link)

    def _handle(self, message: ipc.ToEngine, link: asyncio.StreamWriter) -> None:
        match message:
            case ipc.Add(request):
                self.seen.append(request)
                self._owners[request.id] = link
                if self.refuse is not None:
                    self._send_events([TokenEvent(id=request.id, finish=FinishReason.ERROR, error=self.refuse)])
                else:
                    self.live[request.id] = (request, 0)
                    self._changed.set()
            case ipc.Abort(ids):
                self._abort(ids)
            case ipc.Query(nonce, action, argument):
                count = 7
                if action == "abort":
                    assert not isinstance(argument, int)
                    ids = [name for name in self.live if ipc.belongs_to(name, argument)]
                    self._abort(ids)
                    count = len(ids)
                if not self.deaf:
                    self.send(ipc.Reply(nonce, self.stats(), count), link)

    def _abort(self, ids: Sequence[str]) -> None:
        for request_id in ids:
            if self.live.pop(request_id, None) is not None:
                self.aborted.append(request_id)
                self._send_events([TokenEvent(id=request_id, finish=FinishReason.ABORT)])

    async def _steps(self) -> None:
        while True:
            if not self.live:
                self._changed.clear()
                await self._changed.wait()
            await asyncio.sleep(self.delay)
            admitted = [TokenEvent(id=request_id) for request_id, (_, done) in self.live.items() if done == 0]
            if events := [self._advance(request_id) for request_id in list(self.live)]:
                self.steps += 1
                self._send_events(admitted + events)

    def stats(self) -> EngineStats:
        return EngineStats(
            running=len(self.live),
            pages_total=100,
            pages_free=60,
            pages_cached=10,
            pages_evictable=10,
            steps=self.steps,
            retracted=2,
            aborted=len(self.aborted),
            prompt_tokens=sum(len(request.prompt) for request in self.seen),
            cached_prompt_tokens=sum(len(request.prompt) // 2 for request in self.seen),
            generated_tokens=self.generated,
        )

    def _advance(self, request_id: str) -> TokenEvent:
        request, done = self.live[request_id]
        params = request.params
        if self.end_silently:
            del self.live[request_id]
            return TokenEvent(id=request_id, finish=FinishReason.STOP)
        self.generated += 1
        self.given[request_id] = done + 1
        token = self._token(request, done)
        done += 1
        limit = self.model.max_seq_len - len(request.prompt)
        finish = FinishReason.LENGTH if done >= min(limit, params.max_tokens or limit) else None
        stops = () if params.ignore_eos else self.model.eos_token_ids
        if token in (*params.stop_token_ids, *stops) and done > params.min_tokens:
            finish = FinishReason.STOP
        if finish is None:
            self.live[request_id] = (request, done)
        else:
            del self.live[request_id]
        return TokenEvent(
            id=request_id,
            tokens=(token,),
            finish=finish,
            cached_tokens=len(request.prompt) // 2,
            logprobs=() if params.logprobs is None else (scored(token, done - 1, params.logprobs),),
            prompt_logprobs=prompt_scored(request) if done == 1 else (),
        )

    def _token(self, request: Request, done: int) -> int:
        if self.say is None:
            return request.prompt[done % len(request.prompt)]
        said = self.say(request)
        return said[done] if done < len(said) else self.model.eos_token_ids[0]


def scored(token: int, position: int, top: int) -> TokenLogprobs:
    """Log-probabilities that a test can compute too: the token is the second of the likeliest."""
    ids = (token + 1, token, *range(token + 2, token + top))[:top]
    return TokenLogprobs(-1.0 - position, ids, tuple(-0.5 - position - 0.5 * i for i in range(top)))


def prompt_scored(request: Request) -> tuple[TokenLogprobs | None, ...]:
    top = request.params.prompt_logprobs
    if top is None:
        return ()
    return (None, *(scored(token, i + 1, top) for i, token in enumerate(request.prompt[1:])))


async def serve_process() -> None:
    """What `python -m minisgl.server.engine_process` does, with a stub."""
    start = msgspec.json.decode(sys.stdin.buffer.readline())
    folder = Path(start["config"]["model"])
    mode = os.environ.get("STUB_MODE", "")
    if mode == "exit":
        sys.exit(3)
    delay, context = float(os.environ.get("STUB_DELAY", "0.01")), int(os.environ.get("STUB_CONTEXT", "512"))
    size = Tokenizer.load(folder).backend.get_vocab_size()
    model = ModelInfo(name="stub", vocab_size=size, max_seq_len=context, eos_token_ids=(1,))
    engine = StubEngine(start["folder"], model, folder, delay)
    engine.deaf = mode == "deaf"
    serving = asyncio.create_task(engine.run())
    if mode == "fail":
        engine.first = ipc.Failed("no such model, says the stub")
        while not engine._links:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
        sys.exit(1)
    await asyncio.to_thread(sys.stdin.buffer.read)
    serving.cancel()
    await asyncio.gather(serving, return_exceptions=True)


if __name__ == "__main__":
    asyncio.run(serve_process())
