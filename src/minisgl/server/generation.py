"""From requests in the engine to text: the part that streaming and whole answers share."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncGenerator, Sequence

from minisgl.errors import EngineDeadError, InvalidRequestError
from minisgl.server.responses import Usage
from minisgl.server.service import ENGINE_DIED, EngineService
from minisgl.tokenizer.detokenize import shown_tokens
from minisgl.tokenizer.tokenizer import Tokenizer
from minisgl.types import FinishReason, Request, TokenEvent


@dataclasses.dataclass(frozen=True, slots=True)
class Piece:
    """New text of one choice; `finish` is set in its last piece."""

    index: int
    text: str
    finish: FinishReason | None


class Choice:
    """One request's answer while it is being generated."""

    def __init__(self, index: int, request: Request, tokenizer: Tokenizer) -> None:
        self.index = index
        self.request = request
        self.stream = tokenizer.stream(request.params)
        self.finish: FinishReason | None = None
        self.num_tokens = 0
        self.cached_tokens = 0

    def take(self, event: TokenEvent) -> Piece:
        """Take in an event; raises what the engine refused the request for."""
        if event.finish is FinishReason.ERROR:
            raise InvalidRequestError(event.error or "the engine refused the request")
        if event.finish is FinishReason.ABORT:
            raise EngineDeadError(ENGINE_DIED)
        self.cached_tokens = event.cached_tokens
        self.finish = event.finish
        before = self.stream.num_tokens
        text = self.stream.push(shown_tokens(event))
        if self.finish is not None and not self.stream.stopped:
            text += self.stream.finish()
        if self.stream.stopped:
            self.finish = FinishReason.STOP
            self.num_tokens += self.stream.num_tokens - before
        else:
            self.num_tokens += len(event.tokens)
        return Piece(self.index, text, self.finish)


class Generation:
    """Several requests that answer one HTTP request, one choice each. They are in the engine while `pieces` runs."""

    def __init__(self, service: EngineService, tokenizer: Tokenizer, requests: Sequence[Request]) -> None:
        self.choices = [Choice(index, request, tokenizer) for index, request in enumerate(requests)]
        self._by_id = {choice.request.id: choice for choice in self.choices}
        self._service = service

    async def pieces(self) -> AsyncGenerator[list[Piece], None]:
        """What has come since the last look, in batches that hold at least one piece.

        Closing the iterator ends the requests in the engine. Raises MinisglError.
        """
        with self._service.submit([choice.request for choice in self.choices]) as submission:
            async for events in submission.batches():
                pieces = []
                for event in events:
                    choice = self._by_id[event.id]
                    if choice.finish is not None:
                        continue
                    piece = choice.take(event)
                    pieces.append(piece)
                    if piece.finish is not None and event.finish is None:
                        submission.abort([event.id])
                if pieces:
                    yield pieces

    async def whole(self) -> None:
        """Run to the end; the texts are in `choices`."""
        async for _ in self.pieces():
            pass

    def usage(self) -> Usage:
        """Tokens so far."""
        return Usage.of(
            sum(len(choice.request.prompt) for choice in self.choices),
            sum(choice.num_tokens for choice in self.choices),
            sum(choice.cached_tokens for choice in self.choices),
        )
