"""Log-probabilities as OpenAI's two endpoints write them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from minisgl.core.types import TokenLogprobs
from minisgl.server.responses import ChatLogprobs, TextLogprobs, TokenLogprob, TopLogprob
from minisgl.text.tokenizer import Tokenizer

LEAST = -9999.0
"""What stands for minus infinity, which JSON does not have; OpenAI's value."""


class Scored(NamedTuple):
    """A token, its log-probabilities (None at the beginning of a prompt), and where its text begins in its choice's."""

    token: int
    logprobs: TokenLogprobs | None
    start: int


@dataclasses.dataclass(frozen=True)
class LogprobWriter:
    """Writes log-probabilities with the tokens of a vocabulary; `as_ids` writes `token_id:5` for them."""

    tokenizer: Tokenizer
    as_ids: bool

    def text(self, token: int) -> str:
        """A token as text. A part of a character is `bytes:` and its bytes, escaped."""
        if self.as_ids:
            return f"token_id:{token}"
        value = self.tokenizer.token_bytes(token)
        try:
            return value.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in value)

    def chat(self, scored: Iterable[Scored]) -> ChatLogprobs:
        """The object of a chat choice."""
        return ChatLogprobs(
            [
                TokenLogprob(self.text(token), finite(found.logprob), list(self.tokenizer.token_bytes(token)), top)
                for token, found, _ in scored
                if found is not None
                for top in [[self._top(*entry) for entry in zip(found.top_ids, found.top_logprobs, strict=True)]]
            ]
        )

    def _top(self, token: int, logprob: float) -> TopLogprob:
        return TopLogprob(self.text(token), finite(logprob), list(self.tokenizer.token_bytes(token)))

    def completion(self, scored: Sequence[Scored]) -> TextLogprobs:
        """The object of a completion's choice; the token itself is always among the likeliest."""
        return TextLogprobs(
            tokens=[self.text(token) for token, _, _ in scored],
            token_logprobs=[None if found is None else finite(found.logprob) for _, found, _ in scored],
            top_logprobs=[self._likeliest(token, found) for token, found, _ in scored],
            text_offset=[start for _, _, start in scored],
        )

    def _likeliest(self, token: int, found: TokenLogprobs | None) -> dict[str, float] | None:
        if found is None:
            return None
        top: dict[str, float] = {}
        for other, logprob in zip((*found.top_ids, token), (*found.top_logprobs, found.logprob), strict=True):
            top.setdefault(self.text(other), finite(logprob))
        return top


def finite(logprob: float) -> float:
    """A log-probability that JSON can hold."""
    return max(logprob, LEAST)


def mean_logprob(scored: Sequence[Scored]) -> float:
    """The mean over an answer's tokens, by which answers of different length compare."""
    values = [entry.logprobs.logprob for entry in scored if entry.logprobs is not None]
    return sum(values) / len(values) if values else LEAST
