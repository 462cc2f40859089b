"""The answer to one request, whole or as chunks; the two endpoints differ in the objects they are made of."""

from __future__ import annotations

import abc
import time
from collections.abc import Sequence
from contextlib import aclosing
from typing import Literal

import msgspec

from minisgl.server.generation import Choice, Generation, Piece
from minisgl.server.responses import (
    AssistantMessage,
    ChatChoice,
    ChunkChoice,
    Delta,
    Result,
    TextChoice,
    Usage,
    sse,
)
from minisgl.server.streaming import Chunks


class Answer(abc.ABC):
    """One answer. `include_usage` adds a last chunk to a stream, and an empty `usage` to every other one."""

    whole_object: Literal["chat.completion", "text_completion"]
    chunk_object: Literal["chat.completion.chunk", "text_completion"]

    def __init__(self, generation: Generation, model: str, include_usage: bool) -> None:
        self.generation = generation
        self.model = model
        self.include_usage = include_usage
        self.id = generation.choices[0].request.id.rpartition("-")[0]
        self.created = int(time.time())

    @abc.abstractmethod
    def whole_choices(self, choices: Sequence[Choice]) -> list[ChatChoice] | list[TextChoice]:
        """The finished choices."""

    @abc.abstractmethod
    def opening(self) -> list[ChunkChoice] | list[TextChoice]:
        """What a stream says before its first text; empty for nothing."""

    @abc.abstractmethod
    def parts(self, piece: Piece) -> list[ChunkChoice] | list[TextChoice]:
        """A piece of text, as one choice a chunk."""

    async def whole(self) -> Result:
        """Generate all of it."""
        await self.generation.whole()
        return Result(
            id=self.id,
            object=self.whole_object,
            created=self.created,
            model=self.model,
            choices=self.whole_choices(self.generation.choices),
            usage=self.generation.usage(),
        )

    async def chunks(self) -> Chunks:
        """Generate it piece by piece, as server-sent events."""
        waiting_for_first = True
        async with aclosing(self.generation.pieces()) as batches:
            async for pieces in batches:
                opening = self.opening() if waiting_for_first else []
                waiting_for_first = False
                choices = [*opening, *(part for piece in pieces for part in self.parts(piece))]
                if choices:
                    yield b"".join(self.chunk([choice]) for choice in choices)
        if self.include_usage:
            yield self.chunk([], self.generation.usage())

    def chunk(self, choices: list[ChunkChoice] | list[TextChoice], usage: Usage | None = None) -> bytes:
        """One event."""
        return sse(
            Result(
                id=self.id,
                object=self.chunk_object,
                created=self.created,
                model=self.model,
                choices=choices,
                usage=usage if self.include_usage else msgspec.UNSET,
            )
        )


class ChatAnswer(Answer):
    """/v1/chat/completions: the first chunk has the role, the last one of a choice only its finish reason."""

    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def whole_choices(self, choices: Sequence[Choice]) -> list[ChatChoice]:
        """Messages."""
        return [ChatChoice(c.index, AssistantMessage(c.stream.text), c.finish) for c in choices]

    def opening(self) -> list[ChunkChoice]:
        """The role of each choice."""
        return [ChunkChoice(c.index, Delta(role="assistant", content="")) for c in self.generation.choices]

    def parts(self, piece: Piece) -> list[ChunkChoice]:
        """A delta of content, and one that says why it ended."""
        parts = [ChunkChoice(piece.index, Delta(content=piece.text))] if piece.text else []
        if piece.finish is not None:
            parts.append(ChunkChoice(piece.index, Delta(), piece.finish))
        return parts


class TextAnswer(Answer):
    """/v1/completions: plain texts, the last one of a choice with its finish reason."""

    whole_object = "text_completion"
    chunk_object = "text_completion"

    def whole_choices(self, choices: Sequence[Choice]) -> list[TextChoice]:
        """Texts."""
        return [TextChoice(c.index, c.stream.text, c.finish) for c in choices]

    def opening(self) -> list[TextChoice]:
        """Nothing: a text has no role."""
        return []

    def parts(self, piece: Piece) -> list[TextChoice]:
        """The text, and why it ended if it did."""
        if not piece.text and piece.finish is None:
            return []
        return [TextChoice(piece.index, piece.text, piece.finish)]
