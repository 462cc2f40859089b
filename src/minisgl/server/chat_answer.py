"""Answers of /v1/chat/completions: messages, and the deltas of a stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import assert_never

import msgspec

from minisgl.core.types import FinishReason
from minisgl.server.answers import Answer
from minisgl.server.generation import Choice, Generation, Piece
from minisgl.server.logprobs import LogprobWriter, Scored
from minisgl.server.parts import CallArguments, CallBroken, CallEnd, CallStart, Content, Part, Reasoning
from minisgl.server.prepared import Wanted
from minisgl.server.reading import Reading
from minisgl.server.responses import (
    AssistantMessage,
    ChatChoice,
    ChatLogprobs,
    ChunkChoice,
    Delta,
    FinishWord,
    FunctionCall,
    ToolCall,
)


class ChatAnswer(Answer):
    """The first chunk of a choice has the role, the last one only its finish reason."""

    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, generation: Generation, model: str, wanted: Wanted, reading: Reading) -> None:
        super().__init__(generation, model, wanted)
        self.reading = reading
        writer = LogprobWriter(generation.tokenizer, wanted.token_ids)
        self._logprobs = writer if wanted.logprobs else None
        self._streams = [ChoiceStream(choice, reading, self._logprobs) for choice in generation.choices]

    def whole_choices(self) -> list[ChatChoice]:
        """Messages."""
        return [self._whole_choice(choice) for choice in self.generation.choices]

    def parts(self, piece: Piece) -> list[ChunkChoice]:
        """Deltas."""
        return self._streams[piece.index].take(piece)

    def _whole_choice(self, choice: Choice) -> ChatChoice:
        reader = self.reading.reader()
        parts = [Content(choice.text)] if reader is None else [*reader.push(choice.text), *reader.finish()]
        message = message_of(parts, self.reading)
        called = bool(message.tool_calls)
        logprobs = None if self._logprobs is None else self._logprobs.chat(choice.scored)
        return ChatChoice(choice.index, message, finish_word(choice.finish, called), logprobs)


class ChoiceStream:
    """The deltas of one choice. Log-probabilities of text that is held back go with the next delta there is."""

    def __init__(self, choice: Choice, reading: Reading, logprobs: LogprobWriter | None) -> None:
        self._index = choice.index
        self._reading = reading
        self._reader = reading.reader()
        self._logprobs = logprobs
        self._scored: list[Scored] = []
        self._opened = False
        self._called = False

    def take(self, piece: Piece) -> list[ChunkChoice]:
        """The deltas of a piece."""
        deltas: list[Delta] = []
        if not self._opened:
            self._opened = True
            deltas.append(Delta(role="assistant", content=""))
        if self._reader is None:
            if piece.text:
                deltas.append(Delta(content=piece.text))
        else:
            parts = self._reader.push(piece.text)
            if piece.finish is not None:
                parts += self._reader.finish()
            deltas += filter(None, map(self._delta, parts))
        choices = [ChunkChoice(self._index, delta) for delta in deltas]
        if piece.finish is not None:
            choices.append(ChunkChoice(self._index, Delta(), finish_word(piece.finish, self._called)))
        if self._logprobs is not None:
            self._scored += piece.scored
            # The opening delta has no text; what follows it has.
            place = next((i for i, c in enumerate(choices) if c.delta.role is msgspec.UNSET), None)
            if self._scored and place is not None:
                choices[place] = msgspec.structs.replace(choices[place], logprobs=self._take_logprobs())
        return choices

    def _take_logprobs(self) -> ChatLogprobs:
        assert self._logprobs is not None
        scored, self._scored = self._scored, []
        return self._logprobs.chat(scored)

    def _delta(self, part: Part) -> Delta | None:
        match part:
            case Content(text):
                return Delta(content=text)
            case Reasoning(text):
                return Delta(reasoning_content=text)
            case CallStart(index, name):
                function = FunctionCall(arguments="", name=name)
                call = ToolCall(index=index, id=new_id(self._reading), type="function", function=function)
                return Delta(tool_calls=[call])
            case CallArguments(index, text):
                return Delta(tool_calls=[ToolCall(index=index, function=FunctionCall(arguments=text))])
            case CallEnd():
                self._called = True
                return None
            case CallBroken(_, _, rest):
                return Delta(content=rest) if rest else None
            case _:
                assert_never(part)


def message_of(parts: Sequence[Part], reading: Reading) -> AssistantMessage:
    """A whole message. A call that broke off is content, as the model wrote it."""
    content: list[str] = []
    reasoning: list[str] = []
    calls: dict[int, tuple[str, list[str]]] = {}
    for part in parts:
        match part:
            case Content(text):
                content.append(text)
            case Reasoning(text):
                reasoning.append(text)
            case CallStart(index, name):
                calls[index] = name, []
            case CallArguments(index, text):
                calls[index][1].append(text)
            case CallBroken(index, raw, _):
                del calls[index]
                content.append(raw)
            case CallEnd():
                pass
            case _:
                assert_never(part)
    tool_calls = [
        ToolCall(id=new_id(reading), type="function", function=FunctionCall("".join(arguments), name))
        for name, arguments in calls.values()
    ]
    return AssistantMessage(
        content="".join(content) or (None if tool_calls else ""),
        reasoning_content="".join(reasoning) or msgspec.UNSET,
        tool_calls=tool_calls or msgspec.UNSET,
    )


def new_id(reading: Reading) -> str:
    """The id of a call."""
    assert reading.form is not None
    return reading.form.new_id()


def finish_word(finish: FinishReason | None, called: bool) -> FinishWord | None:
    """Why a choice ended, in OpenAI's words; a call is a reason of its own."""
    match finish:
        case FinishReason.STOP:
            return "tool_calls" if called else "stop"
        case FinishReason.LENGTH:
            return "length"
        case _:
            return None
