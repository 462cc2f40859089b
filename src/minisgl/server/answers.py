"""The answer to one request, whole or as chunks; the endpoints differ in the objects they are made of."""

from __future__ import annotations

import abc
import time
from collections.abc import Sequence
from contextlib import aclosing
from typing import Any, Literal

import msgspec

from minisgl.server.generation import Generation, Piece
from minisgl.server.prepared import Wanted
from minisgl.server.responses import ChatChoice, ChunkChoice, Result, TextChoice, Usage, sse
from minisgl.server.streaming import Chunks


class Answer(abc.ABC):
    """One answer, as it is `wanted`. Without usage in a stream the field is absent, else null in all but the last.

    With `continuous_usage` every chunk has it.
    """

    whole_object: Literal["chat.completion", "text_completion"]
    chunk_object: Literal["chat.completion.chunk", "text_completion"]

    def __init__(self, generation: Generation, model: str, wanted: Wanted) -> None:
        self.generation = generation
        self.model = model
        self.include_usage = wanted.include_usage
        self.continuous_usage = wanted.continuous_usage
        self.id = generation.choices[0].request.id.rpartition("-")[0]
        self.created = int(time.time())

    @abc.abstractmethod
    def whole_choices(self) -> Sequence[ChatChoice] | Sequence[TextChoice]:
        """The finished choices."""

    @abc.abstractmethod
    def parts(self, piece: Piece) -> Sequence[ChunkChoice] | Sequence[TextChoice]:
        """A piece of text, as one choice a chunk."""

    async def whole(self) -> Result[Any]:
        """Generate all of it."""
        await self.generation.whole()
        return Result(
            id=self.id,
            object=self.whole_object,
            created=self.created,
            model=self.model,
            choices=self.whole_choices(),
            usage=self.generation.usage(),
        )

    async def chunks(self) -> Chunks:
        """Generate it piece by piece, as server-sent events; what came together is given together."""
        async with aclosing(self.generation.pieces()) as batches:
            async for pieces in batches:
                choices = [part for piece in pieces for part in self.parts(piece)]
                if choices:
                    usage = self.generation.usage() if self.continuous_usage else None
                    yield b"".join([self.chunk([choice], usage) for choice in choices])
        if self.include_usage:
            yield self.chunk([], self.generation.usage())

    def chunk(self, choices: Sequence[ChunkChoice | TextChoice], usage: Usage | None) -> bytes:
        """One event."""
        result: Result[Any] = Result(
            id=self.id,
            object=self.chunk_object,
            created=self.created,
            model=self.model,
            choices=choices,
            usage=usage if self.include_usage else msgspec.UNSET,
        )
        return sse(result)
