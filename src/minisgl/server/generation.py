"""From requests in the engine to text: the part that streaming and whole answers share."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncGenerator, Sequence

from minisgl.errors import EngineDeadError, InvalidRequestError
from minisgl.server.logprobs import Scored
from minisgl.server.responses import Usage
from minisgl.server.service import ENGINE_DIED, EngineService
from minisgl.tokenizer.detokenize import shown_tokens
from minisgl.tokenizer.tokenizer import Tokenizer
from minisgl.types import FinishReason, Request, TokenEvent, TokenLogprobs


@dataclasses.dataclass(frozen=True, slots=True)
class Piece:
    """New text of one choice and, where they were asked for, its new tokens; `finish` is set in its last piece."""

    index: int
    text: str
    finish: FinishReason | None
    scored: Sequence[Scored] = ()

    def __add__(self, later: Piece) -> Piece:
        return Piece(self.index, self.text + later.text, later.finish, (*self.scored, *later.scored))


class Choice:
    """One request's answer while it is being generated. `scored` are its tokens, where log-probabilities were asked.

    With `hidden` the request is there for its prompt: what it generates is not shown.
    """

    def __init__(
        self, index: int, request: Request, tokenizer: Tokenizer, keep: Sequence[str] = (), hidden: bool = False
    ) -> None:
        self.index = index
        self.request = request
        self.stream = tokenizer.stream(request.params, keep)
        self.finish: FinishReason | None = None
        self.token_ids: list[int] = []
        self.cached_tokens = 0
        self.scored: list[Scored] = []
        self.prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()
        self._hidden = hidden

    @property
    def text(self) -> str:
        """All the text so far."""
        return self.stream.text

    @property
    def num_tokens(self) -> int:
        """Tokens so far; the one that ended the text is among them."""
        return len(self.token_ids)

    def take(self, event: TokenEvent) -> Piece:
        """Take in an event; raises what the engine refused the request for."""
        if event.finish is FinishReason.ERROR:
            raise InvalidRequestError(event.error or "the engine refused the request")
        if event.finish is FinishReason.ABORT:
            raise EngineDeadError(ENGINE_DIED)
        self.cached_tokens = event.cached_tokens
        self.finish = event.finish
        if event.prompt_logprobs:
            self.prompt_logprobs = event.prompt_logprobs
        if self._hidden:
            return Piece(self.index, "", self.finish)
        before = self.stream.num_tokens
        text = self.stream.push(shown_tokens(event))
        if self.finish is not None and not self.stream.stopped:
            text += self.stream.finish()
        taken = event.tokens
        if self.stream.stopped:
            self.finish = FinishReason.STOP
            taken = taken[: self.stream.num_tokens - before]
        self.token_ids += taken
        if self.request.params.logprobs is None:
            return Piece(self.index, text, self.finish)
        count = len(taken)
        starts = [*self.stream.starts[before:], self.stream.num_characters][:count]
        new = [Scored(*entry) for entry in zip(taken, event.logprobs[:count], starts, strict=True)]
        self.scored += new
        return Piece(self.index, text, self.finish, new)


class Generation:
    """Several requests that answer one HTTP request, one choice each. They are in the engine while `pieces` runs.

    `copies` requests in a row have the same prompt. `keep` and `hidden` are those of each `Choice`.
    """

    def __init__(
        self,
        service: EngineService,
        tokenizer: Tokenizer,
        requests: Sequence[Request],
        *,
        copies: int = 1,
        keep: Sequence[str] = (),
        hidden: bool = False,
    ) -> None:
        self.tokenizer = tokenizer
        self.choices = [Choice(i, request, tokenizer, keep, hidden) for i, request in enumerate(requests)]
        self.copies = copies
        self._by_id = {choice.request.id: choice for choice in self.choices}
        self._service = service

    async def pieces(self) -> AsyncGenerator[list[Piece], None]:
        """What has come since the last look, in batches that hold at least one piece and one of each choice at most.

        Closing the iterator ends the requests in the engine. Raises MinisglError.
        """
        with self._service.submit([choice.request for choice in self.choices]) as submission:
            async for events in submission.batches():
                pieces: dict[int, Piece] = {}
                for event in events:
                    choice = self._by_id[event.id]
                    if choice.finish is not None:
                        continue
                    piece = choice.take(event)
                    earlier = pieces.get(piece.index)
                    pieces[piece.index] = piece if earlier is None else earlier + piece
                    if piece.finish is not None and event.finish is None:
                        submission.abort([event.id])
                if pieces:
                    yield list(pieces.values())

    async def whole(self) -> None:
        """Run to the end; the texts are in `choices`."""
        async for _ in self.pieces():
            pass

    def usage(self) -> Usage:
        """Tokens so far; a prompt with several answers counts once."""
        firsts = self.choices[:: self.copies]
        return Usage.of(
            sum(len(choice.request.prompt) for choice in firsts),
            sum(choice.num_tokens for choice in self.choices),
            sum(choice.cached_tokens for choice in firsts),
        )
