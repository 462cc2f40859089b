"""Incremental detokenisation: the text that can safely be shown while tokens are still coming."""

from __future__ import annotations

from collections.abc import Sequence

import tokenizers
from tokenizers.decoders import DecodeStream

from minisgl.core.types import FinishReason, SamplingParams, TokenEvent


class TextStream:
    """The text of one request. Once a stop string is completed it is `stopped`: further tokens are ignored.

    The texts that `push` and `finish` return, joined, are what `Tokenizer.decode` says of all tokens, cut where the
    stop string that is completed first (`matched`) begins. `hidden` are token ids that have no text. `num_tokens`
    counts the tokens taken in, the one that completed the stop string included; `starts` says how many characters came
    before each; `num_characters` counts the characters decoded so far, those held back included.
    """

    def __init__(self, backend: tokenizers.Tokenizer, hidden: frozenset[int], params: SamplingParams) -> None:
        self.num_tokens = 0
        self.num_characters = 0
        self.starts: list[int] = []
        self.matched: str | None = None
        self._backend = backend
        self._hidden = hidden
        self._stops = params.stop
        self._min_tokens = params.min_tokens
        self._longest = max(map(len, params.stop), default=0)
        self._decoder = DecodeStream(skip_special_tokens=False)
        self._ids: list[int] = []
        self._pending = False  # the last tokens have given no text yet
        self._held = ""  # decoded, but it may begin a stop string
        self._shown: list[str] = []

    @property
    def stopped(self) -> bool:
        return self.matched is not None

    @property
    def text(self) -> str:
        return "".join(self._shown)

    def push(self, tokens: Sequence[int]) -> str:
        """Take in tokens; the text that can be shown now."""
        before = len(self._shown)
        for token in tokens:
            if self.stopped:
                break
            self.num_tokens += 1
            self.starts.append(self.num_characters)
            if token not in self._hidden and (piece := self._decode(token)):
                self._take(piece)
        return "".join(self._shown[before:])

    def finish(self) -> str:
        """What was held back, when the request ended for another reason than a stop string."""
        before = len(self._shown)
        if self._pending and not self.stopped:
            self._pending = False
            self._take(self._rest())
        if not self.stopped:
            self._shown.append(self._held)
            self._held = ""
        return "".join(self._shown[before:])

    def _decode(self, token: int) -> str:
        """The text that `token` completes; empty while its end may be half a character."""
        self._ids.append(token)
        try:
            piece = self._decoder.step(self._backend, token) or ""
        except Exception:  # the decoder's own type: earlier text changed, as byte-fallback runs can
            piece = self._rest()
            self._decoder = DecodeStream(ids=[token], skip_special_tokens=False)
        self._pending = not piece
        self.num_characters += len(piece)
        return piece

    def _rest(self) -> str:
        """The text of all tokens behind the characters decoded so far."""
        return self._backend.decode(self._ids, skip_special_tokens=False)[self.num_characters :]

    def _take(self, piece: str) -> None:
        """Show what cannot belong to a stop string any more; a match must end inside `piece`."""
        if not self._stops:
            self._shown.append(piece)
            return
        text = self._held + piece
        matches = self._matches(text, len(self._held)) if self.num_tokens >= self._min_tokens else []
        if matches:
            _, safe, self.matched = min(matches)  # the one completed first; of several, the longest
            self._held = ""
        else:
            safe = self._safe_length(text)
            self._held = text[safe:]
        if safe:
            self._shown.append(text[:safe])

    def _matches(self, text: str, old: int) -> list[tuple[int, int, str]]:
        """(end, start, stop string) of each stop string that is completed after the first `old` characters."""
        starts = [(text.find(stop, max(0, old - len(stop) + 1)), stop) for stop in self._stops]
        return [(start + len(stop), start, stop) for start, stop in starts if start >= 0]

    def _safe_length(self, text: str) -> int:
        """Where the longest suffix begins that is a proper prefix of a stop string."""
        for start in range(max(0, len(text) - self._longest + 1), len(text)):
            suffix = text[start:]
            if any(stop.startswith(suffix) for stop in self._stops):
                return start
        return len(text)


def shown_tokens(event: TokenEvent) -> tuple[int, ...]:
    """The event's tokens without the stop token that ended the request: it is not part of the text."""
    return event.tokens[:-1] if event.finish is FinishReason.STOP else event.tokens
