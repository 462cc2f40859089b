"""From requests in the engine to text: the part that streaming and whole answers share."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncGenerator, Iterable, Sequence

from minisgl.errors import EngineDeadError, InvalidRequestError
from minisgl.server.engine_client import ENGINE_DIED, EngineClient
from minisgl.server.logprobs import Scored
from minisgl.server.responses import Usage
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

    def take(self, events: Sequence[TokenEvent]) -> Piece:
        """Take in events that came together, at least one; raises what the engine refused the request for."""
        event = events[0] if len(events) == 1 else joined(events)
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
        # Each on its own: a request that ends without a token has no stop token, whatever came together with its end.
        text = self.stream.push([token for each in events for token in shown_tokens(each)])
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
        service: EngineClient,
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
                pieces = []
                for request_id, own in self._by_request(events):
                    choice = self._by_id[request_id]
                    if choice.finish is not None:
                        continue
                    piece = choice.take(own)
                    pieces.append(piece)
                    if piece.finish is not None and own[-1].finish is None:
                        submission.abort([request_id])
                if pieces:
                    yield pieces

    def _by_request(self, events: Sequence[TokenEvent]) -> Iterable[tuple[str, Sequence[TokenEvent]]]:
        if len(self.choices) == 1:
            return [(events[0].id, events)]
        own: dict[str, list[TokenEvent]] = {}
        for event in events:
            own.setdefault(event.id, []).append(event)
        return own.items()

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


def joined(events: Sequence[TokenEvent]) -> TokenEvent:
    """Successive events of one request as one."""
    last = events[-1]
    return TokenEvent(
        id=last.id,
        tokens=tuple(token for event in events for token in event.tokens),
        finish=last.finish,
        cached_tokens=last.cached_tokens,
        error=last.error,
        logprobs=tuple(entry for event in events for entry in event.logprobs),
        prompt_logprobs=next((event.prompt_logprobs for event in events if event.prompt_logprobs), ()),
    )
