"""Answers of /generate: an object for each answer, in a stream with all of its text so far."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from contextlib import aclosing
from typing import Any

import msgspec

from minisgl.core.types import FinishReason
from minisgl.server.generation import Choice, Generation
from minisgl.server.logprobs import LogprobWriter, Scored, finite
from minisgl.server.prepared import Wanted
from minisgl.server.responses import sse
from minisgl.server.streaming import Chunks

TokenEntry = tuple[float | None, int, str | None]
"""Log-probability, token id, and its text where that was asked for."""


class NativeMeta(msgspec.Struct, frozen=True, kw_only=True):
    """What /generate says beside the text; `e2e_latency` in s."""

    id: str
    finish_reason: dict[str, Any] | None
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    e2e_latency: float
    output_token_logprobs: list[TokenEntry] | msgspec.UnsetType = msgspec.UNSET
    output_top_logprobs: list[list[TokenEntry] | None] | msgspec.UnsetType = msgspec.UNSET
    input_token_logprobs: list[TokenEntry] | msgspec.UnsetType = msgspec.UNSET
    input_top_logprobs: list[list[TokenEntry] | None] | msgspec.UnsetType = msgspec.UNSET


class NativeResult(msgspec.Struct, frozen=True, kw_only=True):
    """An answer; `index` says which one it is in a stream of several."""

    text: str
    output_ids: list[int]
    meta_info: NativeMeta
    index: int | msgspec.UnsetType = msgspec.UNSET


class NativeAnswer:
    """The answer to one request, alone or as a list."""

    def __init__(self, generation: Generation, wanted: Wanted) -> None:
        self.generation = generation
        self.wanted = wanted
        self._writer = LogprobWriter(generation.tokenizer, False)
        self._started = time.monotonic()
        self._texts = [""] * len(generation.choices)

    async def whole(self) -> NativeResult | list[NativeResult]:
        """Generate all of it."""
        await self.generation.whole()
        results = [self._result(choice, choice.text) for choice in self.generation.choices]
        return results if self.wanted.is_batch else results[0]

    async def chunks(self) -> Chunks:
        """Generate it piece by piece, as server-sent events."""
        async with aclosing(self.generation.pieces()) as batches:
            async for pieces in batches:
                for piece in pieces:
                    self._texts[piece.index] += piece.text
                events = [sse(self._result(self.generation.choices[p.index], self._texts[p.index])) for p in pieces]
                yield b"".join(events)

    def _result(self, choice: Choice, text: str) -> NativeResult:
        asked = self.wanted
        meta = NativeMeta(
            id=choice.request.id,
            finish_reason=finish_of(choice),
            prompt_tokens=len(choice.request.prompt),
            completion_tokens=choice.num_tokens,
            cached_tokens=choice.cached_tokens,
            e2e_latency=round(time.monotonic() - self._started, 6),
        )
        if asked.logprobs:
            meta = msgspec.structs.replace(
                meta,
                output_token_logprobs=self._entries(choice.scored),
                output_top_logprobs=self._tops(choice.scored) if asked.top_logprobs else msgspec.UNSET,
            )
        if (start := asked.prompt_logprobs_from) is not None:
            prompt = [
                Scored(token, found, 0)
                for token, found in zip(choice.request.prompt, choice.prompt_logprobs, strict=False)
            ][start:]
            meta = msgspec.structs.replace(
                meta,
                input_token_logprobs=self._entries(prompt),
                input_top_logprobs=self._tops(prompt) if asked.top_logprobs else msgspec.UNSET,
            )
        index = choice.index if self.wanted.is_batch else msgspec.UNSET
        return NativeResult(text=text, output_ids=list(choice.token_ids), meta_info=meta, index=index)

    def _text(self, token: int) -> str | None:
        return self._writer.text(token) if self.wanted.logprob_texts else None

    def _entries(self, scored: Iterable[Scored]) -> list[TokenEntry]:
        return [(None if f is None else finite(f.logprob), token, self._text(token)) for token, f, _ in scored]

    def _tops(self, scored: Sequence[Scored]) -> list[list[TokenEntry] | None]:
        return [
            None
            if found is None
            else [(finite(p), t, self._text(t)) for t, p in zip(found.top_ids, found.top_logprobs, strict=True)]
            for _, found, _ in scored
        ]


def finish_of(choice: Choice) -> dict[str, Any] | None:
    """Why an answer ended: at its limit, or at a stop string or the token that is the last one."""
    if choice.finish is None:
        return None
    if choice.finish is FinishReason.LENGTH:
        return {"type": "length", "length": choice.num_tokens}
    return {"type": "stop", "matched": choice.stream.matched or choice.token_ids[-1]}
