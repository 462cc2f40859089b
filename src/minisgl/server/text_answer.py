"""Answers of /v1/completions: plain texts, with the prompt before them when it is to be echoed."""

from __future__ import annotations

from collections.abc import Sequence

from minisgl.server.answers import Answer
from minisgl.server.chat_answer import finish_word
from minisgl.server.generation import Choice, Generation, Piece
from minisgl.server.logprobs import LogprobWriter, Scored, mean_logprob
from minisgl.server.prepared import Echo, Wanted
from minisgl.server.responses import TextChoice


class TextAnswer(Answer):
    """The last piece of a choice has its finish reason. `echoes` has a prompt for each, or is empty."""

    whole_object = "text_completion"
    chunk_object = "text_completion"

    def __init__(self, generation: Generation, model: str, wanted: Wanted, echoes: Sequence[Echo] = ()) -> None:
        super().__init__(generation, model, wanted)
        self.num_choices = wanted.num_choices
        self.echoes = echoes
        writer = LogprobWriter(generation.tokenizer, wanted.token_ids)
        self._logprobs = writer if wanted.logprobs else None
        self._opened: set[int] = set()
        self._scored: dict[int, list[Scored]] = {choice.index: [] for choice in generation.choices}

    def whole_choices(self) -> list[TextChoice]:
        """Texts; of more answers to a prompt than are wanted, those that are most probable by the token."""
        choices, copies = self.generation.choices, self.generation.copies
        best: list[Choice] = []
        for first in range(0, len(choices), copies):
            drawn = choices[first : first + copies]
            if copies > self.num_choices:
                drawn = sorted(drawn, key=lambda choice: -mean_logprob(choice.scored))[: self.num_choices]
            best += drawn
        return [self._choice(i, c, c.text, c.scored, opening=True, ended=True) for i, c in enumerate(best)]

    def parts(self, piece: Piece) -> list[TextChoice]:
        """The text, and why it ended if it did. Tokens without text yet go with the next piece that has some."""
        index = piece.index
        opening = bool(self.echoes) and index not in self._opened
        self._opened.add(index)
        scored = self._scored[index]
        scored += piece.scored
        if not (piece.text or opening) and piece.finish is None:
            return []
        self._scored[index] = []
        choice = self.generation.choices[index]
        return [self._choice(index, choice, piece.text, scored, opening=opening, ended=piece.finish is not None)]

    def _choice(
        self, index: int, choice: Choice, text: str, scored: Sequence[Scored], *, opening: bool, ended: bool
    ) -> TextChoice:
        shift = 0
        if self.echoes:
            echo = self.echoes[choice.index // self.generation.copies]
            shift = len(echo.text)
            scored = [Scored(token, found, start + shift) for token, found, start in scored]
            if opening:
                text = echo.text + text
                prompt = zip(choice.request.prompt, choice.prompt_logprobs, echo.starts, strict=False)
                scored = [*(Scored(*entry) for entry in prompt), *scored]
        logprobs = None if self._logprobs is None else self._logprobs.completion(scored)
        return TextChoice(index, text, finish_word(choice.finish, False) if ended else None, logprobs)
