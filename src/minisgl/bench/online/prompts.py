"""Turns as the bodies of requests: token ids where the server takes them, else words that are one token each."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from minisgl.bench.online.sessions import Segment, Turn
from minisgl.bench.online.tokens import draw
from minisgl.errors import ConfigError

FEWEST_WORDS: Final = 16
PROBE_WORDS: Final = 8
WORDS: Final[Sequence[str]] = """\
the of and to in is that for it as was with be by on not he his but at are this have from or had an they
which one you were all her she there would their we him been has when who will no more if out so up said
what its about than into them can only other time new some could these two may first then do any like my now
over such our man me even most made after also did many off before must well back through years much where
your way down should because long each just state people those too little good world make very year still
see work life men day get here between own under right house water small place high number school great city
group part name line large side end
""".split()  # noqa: SIM905
"""Common words, most of which are one token, with a space before them, in most vocabularies."""


class Prompts(Protocol):
    """Makes prompts of segments."""

    def fields(self, turn: Turn, seed: int, answers: Sequence[str]) -> dict[str, Any]:
        """What the body says of the prompt; `answers` were given to the turns before."""

    def expected_tokens(self, turn: Turn) -> int | None:
        """The prompt's tokens as the server should count them; None where they depend on its chat template."""


@dataclass(frozen=True)
class IdPrompts:
    """Token ids for /v1/completions, from `low` up to below `high`."""

    low: int
    high: int

    def fields(self, turn: Turn, seed: int, answers: Sequence[str]) -> dict[str, Any]:
        """Exactly the turn's tokens."""
        return {"prompt": (draw(seed, turn.segments, self.high - self.low) + self.low).tolist()}

    def expected_tokens(self, turn: Turn) -> int | None:
        """All of them."""
        return turn.input_length


@dataclass(frozen=True)
class TextPrompts:
    """Words for /v1/completions. The server counts `overhead` tokens beside them, such as BOS."""

    words: tuple[str, ...]
    overhead: int

    def text(self, segments: Sequence[Segment], seed: int, less: int = 0) -> str:
        """As many words as the segments have tokens, without the last `less`, but at least one."""
        numbers = draw(seed, segments, len(self.words)).tolist()
        return " ".join(self.words[number] for number in numbers[: max(1, len(numbers) - less)])

    def fields(self, turn: Turn, seed: int, answers: Sequence[str]) -> dict[str, Any]:
        """One text."""
        return {"prompt": self.text(turn.segments, seed, self.overhead)}

    def expected_tokens(self, turn: Turn) -> int | None:
        """All of them: the overhead is taken off the prompt's end."""
        return turn.input_length


@dataclass(frozen=True)
class ChatPrompts(TextPrompts):
    """Messages for /v1/chat/completions. In a conversation the server's own answers are sent back to it."""

    def fields(self, turn: Turn, seed: int, answers: Sequence[str]) -> dict[str, Any]:
        """A message, or the conversation so far."""
        if len(turn.messages) == 1:
            content = self.text(turn.segments, seed, self.overhead)
            return {"messages": [{"role": turn.messages[0].role, "content": content}]}
        given = iter(answers)
        messages = []
        for message in turn.messages:
            content = next(given) if message.role == "assistant" else self.text(message.segments, seed)
            messages.append({"role": message.role, "content": content})
        return {"messages": messages}

    def expected_tokens(self, turn: Turn) -> int | None:
        """Known for a single message alone."""
        return turn.input_length if len(turn.messages) == 1 else None


async def calibrate(count: Callable[[str], Awaitable[int]]) -> tuple[tuple[str, ...], int]:
    """The words that are one token each for a server, and its overhead; `count` is how many tokens it sees in a text.

    Raises ConfigError when too few are, or when the counts do not add up.
    """
    first = WORDS[0]
    known = await count(" ".join([first] * PROBE_WORDS))
    overhead = known - PROBE_WORDS
    half = PROBE_WORDS // 2
    good = [w for w in WORDS if overhead >= 0 and await count(" ".join([first] * half + [w] * half)) == known]
    advice = "use --endpoint ids, which sends token ids"
    if len(good) < FEWEST_WORDS:
        raise ConfigError(
            f"the server's tokenizer has a token of their own for {len(good)} common words only; {advice}"
        )
    words = tuple(good)
    trial = TextPrompts(words, 0).text([Segment(("trial", 0), 4 * len(words))], 0)
    if (seen := await count(trial)) != 4 * len(words) + overhead:
        raise ConfigError(f"{4 * len(words)} words that are one token each are {seen} tokens together; {advice}")
    return words, overhead
