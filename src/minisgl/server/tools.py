"""How models write tool calls, grammars of them, and parsing a completion as it comes: reasoning, content and calls."""

import dataclasses
import json
import re
import uuid
from collections.abc import Callable, Sequence
from typing import Any, Literal

import msgspec

from minisgl.core.types import REASONING_END, REASONING_START, Calls, FinishReason, Grammar
from minisgl.server.protocol import ChatRequest, Tool
from minisgl.server.responses import ChatDelta, FunctionCall, ToolCall
from minisgl.text.json_schema import rewritten
from minisgl.text.tokenizer import partial_end

# The usual beginning of a call: with it the arguments can be streamed, and keep the model's own spelling. It is looked
# for in so many characters; the arguments of a call that begins otherwise are written anew.
CALL_HEAD = re.compile(
    r'\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*"([^"\\]*)"\s*,\s*"(arguments|parameters)"\s*:\s*(?=\{)'
)
HEAD_LIMIT = 1024
Reasoning = Literal["none", "possible", "begun"]
State = Callable[[], "State | None"]  # of a parser: reads on, and says which one follows where it has read its part
JSON_STEP = re.compile(r'[^"\\{}\[\]]+|\\.|["{}\[\]]', re.DOTALL)
OUTSIDE_STRINGS = " \t\r\n:,0123456789+-.eEtrufalsn"  # what JSON has outside its strings, brackets aside


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToolFormat:
    """How a model writes calls; each is a JSON object with `name`, and its `arguments` or `parameters`."""

    opening: str = ""  # comes before the calls, and `closing` after them
    closing: str = ""
    separator: str = ""  # between two calls, where the second has no opening of its own
    listed: bool = False  # opening and closing surround a JSON list of calls
    at_start: bool = False  # the completion is the call, `opening` may be missing, and text after it is no call
    short_ids: bool = False  # nine letters or digits each
    generic: bool = False  # the model does not know it
    only_calls: bool = False  # a grammar lets the completion be nothing else

    def new_id(self) -> str:
        return uuid.uuid4().hex[:9] if self.short_ids else f"call_{uuid.uuid4().hex[:24]}"

    def forced(self) -> "ToolFormat":
        """The format of a completion that a grammar makes a list of calls, whatever the model's own."""
        return dataclasses.replace(MISTRAL, opening="", at_start=True, short_ids=self.short_ids, only_calls=True)

    def text_without_calls(self) -> Grammar:
        return Grammar(kind="lark", source=f"start: TEXT\nTEXT: /(?s:.*)/ & ~/(?s:.*{self.opening}.*)/")

    def with_optional_calls(self, grammar: Grammar, chat: ChatRequest) -> Grammar:
        tools, many = chat.offered_tools, chat.parallel_tool_calls is not False
        if self.listed:
            calls = Calls(schema=call_list_schema(tools, not many), several=False, opening=self.opening)
        else:
            name, opening = ("parameters", "") if self.at_start else ("arguments", self.opening)
            schema = json.dumps(call_schema(tools, name))
            calls = Calls(schema=schema, several=many, opening=opening, closing=self.closing, separator=self.separator)
        return msgspec.structs.replace(grammar, calls=calls)


# Qwen 2.5 and 3, Hermes: `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, any number of times.
HERMES = ToolFormat(opening="<tool_call>", closing="</tool_call>")
# Mistral: `[TOOL_CALLS] [{"name": …, "arguments": {…}}, …]`; its templates refuse ids of another length.
MISTRAL = ToolFormat(opening="[TOOL_CALLS]", closing="]", separator=",", listed=True, short_ids=True)
# Llama 3.1 to 3.3: the completion is `{"name": …, "parameters": {…}}`, several of them separated by `;`.
LLAMA = ToolFormat(opening="<|python_tag|>", separator=";", at_start=True)
# A model whose template has no place for tools: it was not trained to call, so a grammar holds it to Hermes' format.
GENERIC = dataclasses.replace(HERMES, generic=True)


def detect_tool_format(template: str, takes_tools: bool) -> ToolFormat | None:
    """The format that a chat template shows; None for one that takes tools and shows none of these formats."""
    if not takes_tools:
        return GENERIC
    if "<function=" in template or "[ARGS]" in template:
        return None
    if HERMES.opening in template:
        return HERMES
    if MISTRAL.opening in template:
        return MISTRAL
    return LLAMA if LLAMA.opening in template or '"parameters"' in template else None


def forced_call_grammar(chat: ChatRequest) -> Grammar:
    """A JSON list of calls of the tools that may be called: one, or several where the request allows it."""
    name = chat.named_tool
    tools = [tool for tool in chat.offered_tools if name is None or tool.function.name == name]
    single = name is not None or chat.parallel_tool_calls is False
    return Grammar(kind="json_schema", source=call_list_schema(tools, single))


def call_list_schema(tools: Sequence[Tool], single: bool) -> str:
    most = {"maxItems": 1} if single else {}
    return json.dumps({"type": "array", "items": call_schema(tools, "arguments"), "minItems": 1, **most})


def call_schema(tools: Sequence[Tool], arguments: str) -> dict[str, Any]:
    """The JSON schema of a call; `arguments` is the model's name for what it calls the tool with."""
    calls: list[dict[str, Any]] = []
    for index, tool in enumerate(tools):
        schema = {"additionalProperties": False} if tool.function.parameters is None else tool.function.parameters
        # Its references begin at its own `$id`; with a `$schema`, older drafts would ignore that beside `$ref`.
        schema = {**schema, "type": "object", "$id": f"urn:tool:{index}"}
        schema.pop("$schema", None)
        followed = rewritten(schema, lenient=True) if tool.function.strict is False else schema
        properties = {"name": {"const": tool.function.name}, arguments: followed}
        required = ["name", arguments]
        calls.append({"type": "object", "properties": properties, "required": required, "additionalProperties": False})
    return calls[0] if len(calls) == 1 else {"anyOf": calls}


@dataclasses.dataclass(frozen=True)
class ParserConfig:
    tool_format: ToolFormat | None = None  # None: calls are not looked for
    names: frozenset[str] = frozenset()  # of the functions that can be called
    max_calls: int | None = None  # those beyond are dropped
    reasoning: Reasoning | None = None  # what the prompt allows of it, or has begun; None: it is not looked for

    @property
    def special_tokens(self) -> tuple[str, ...]:
        marks = (REASONING_START, REASONING_END) if self.reasoning is not None else ()
        if self.tool_format is None or self.tool_format.at_start:
            return marks
        return (*marks, *filter(None, (self.tool_format.opening, self.tool_format.closing)))


@dataclasses.dataclass
class JsonObjectScanner:
    """Finds the end of the JSON object at `at` of a growing text, and looks at each character once."""

    at: int  # how far it has read
    complete: bool = False  # it has read the last brace
    failed: bool = False  # at what is no JSON
    value_end: int | None = None  # of the first object or list in the object
    depth: int = 0
    in_string: bool = False

    def read(self, text: str) -> None:
        for match in JSON_STEP.finditer(text, self.at):
            step = match[0]
            self.at = match.end()
            if self.in_string:
                self.in_string = step != '"'
            elif step == '"':
                self.in_string = True
            elif step in "{[":
                self.depth += 1
            elif step in "}]":
                self.depth -= 1
                if self.depth == 1 and self.value_end is None:
                    self.value_end = self.at
                if self.depth == 0:
                    self.complete = True
                    return
            elif wrong := step.lstrip(OUTSIDE_STRINGS):
                self.at -= len(wrong)
                self.failed = True
                return


class OutputParser:
    """Parses one completion. However its text is cut into pieces, the deltas put together are the same. With `stream`
    arguments are given as they come; where it turns out to be no call then, the rest of it is content.
    """

    def __init__(self, config: ParserConfig, stream: bool) -> None:
        self.num_calls = 0
        self._config = config
        self._format = config.tool_format or ToolFormat()
        self._stream = stream
        self._buffer = ""  # what is not decided yet
        self._at = 0  # what comes before belongs to a call if there is one, else to the content
        self._trim = False  # blanks at the beginning of reasoning, and after it or a call, are dropped
        self._index = -1  # of the last call that was announced
        self._deltas: list[ChatDelta] = []  # of the current push
        self._after_reasoning: State = self._before if self._format.at_start else self._content
        self._state: State = self._after_reasoning if config.reasoning is None else self._start

    def push(self, text: str, finish: FinishReason | None) -> list[ChatDelta]:
        """What `text` brings; with its `finish` also what was held back."""
        self._deltas = []
        self._buffer += text
        self._ended = finish is not None
        while (following := self._state()) is not None:
            self._state = following
        if finish is not None:
            self._end(finish is FinishReason.LENGTH)
        return self._deltas

    def _end(self, was_cut: bool) -> None:
        """A call that is not complete is none, unless the text was cut."""
        if self._state == self._reasoning:
            self._say(len(self._buffer.rstrip()))
            return
        if self._state == self._object:
            if self._head is not None and (was_cut or self._format.only_calls):
                self._give_arguments(self._head)
                return
            self._fail()
        if self._state != self._after or not self._format.closing.startswith(self._buffer.strip()):
            self._say(len(self._buffer))

    def _drop(self, size: int) -> None:
        self._buffer, self._at = self._buffer[size:], 0

    def _say(self, size: int) -> None:
        reasons = self._state == self._reasoning
        text = "" if self._format.only_calls and not reasons else self._buffer[:size]
        self._drop(size)
        if text := text.lstrip() if self._trim else text:
            self._deltas.append(ChatDelta(reasoning_content=text) if reasons else ChatDelta(content=text))
            self._trim = False

    def _say_before(self, mark: str) -> bool:
        """Say what comes before a mark, without the blanks between; whether the mark has come."""
        before, found, _ = self._buffer.partition(mark)
        if not found:
            before = before[: len(before) - partial_end(before, mark)]
        self._say(len(before.rstrip()))
        return bool(found)

    def _start(self) -> "State | None":
        """Before reasoning, which the prompt may have begun."""
        text = self._buffer.lstrip()
        if REASONING_START.startswith(text) and not self._ended:
            return None
        if self._config.reasoning != "begun" and not text.startswith(REASONING_START):
            return self._after_reasoning
        self._buffer, self._trim = text.removeprefix(REASONING_START), True
        return self._reasoning

    def _reasoning(self) -> "State | None":
        if not self._say_before(REASONING_END):
            return None
        self._drop(self._buffer.index(REASONING_END) + len(REASONING_END))
        self._trim = True
        return self._after_reasoning

    def _content(self) -> "State | None":
        opening = self._format.opening
        if self._format.at_start or not opening:
            self._say(len(self._buffer))
            return None
        if not self._say_before(opening):  # blanks before a call are not content
            return None
        self._at = self._buffer.index(opening) + len(opening)
        return self._before

    def _before(self) -> "State | None":
        """Between the opening and the brace of a call."""
        rest = self._buffer[self._at :].lstrip()
        if self._format.at_start:
            if self._format.opening.startswith(rest):
                return None
            rest = rest.removeprefix(self._format.opening).lstrip()
        if self._format.listed:
            rest = rest.removeprefix("[").lstrip()
        if not rest:
            return None
        return self._begin(rest) if rest.startswith("{") else self._give_up()

    def _begin(self, call: str) -> "State":
        self._at = len(self._buffer) - len(call)
        self._scanner = JsonObjectScanner(self._at)
        self._head: re.Match[str] | None = None
        self._announced = False
        self._sent = 0  # up to here the buffer was given as arguments
        return self._object

    def _object(self) -> "State | None":
        scanner = self._scanner
        if self._head is None and scanner.at < self._at + HEAD_LIMIT:
            head = CALL_HEAD.match(self._buffer, self._at, self._at + HEAD_LIMIT)
            self._head = head if head is not None and head[1] in self._config.names else None
        scanner.read(self._buffer)
        if self._stream and self._head is not None:
            self._give_arguments(self._head)
        if not (scanner.complete or scanner.failed):
            return None
        call = self._call() if scanner.complete else None
        if call is None:
            return self._fail()
        if not self._announced:
            self._give(*call)
        self.num_calls += 1
        self._trim = True
        self._drop(scanner.at)
        return self._after

    def _give_arguments(self, head: re.Match[str]) -> None:
        end = self._scanner.value_end or self._scanner.at
        begin = max(self._sent, head.end())
        if end > begin:
            self._give(head[1], self._buffer[begin:end])
            self._sent = end

    def _call(self) -> tuple[str, str] | None:
        value = decode_json(self._buffer[self._at : self._scanner.at])
        name = value.get("name") if isinstance(value, dict) else None
        if not isinstance(value, dict) or not isinstance(name, str) or name not in self._config.names:
            return None
        if self._head is not None:
            shown = self._buffer[self._head.end() : self._scanner.value_end]
            same = name == self._head[1] and value[self._head[2]] == decode_json(shown)
            return (name, shown) if same else None
        arguments = value.get("arguments", value.get("parameters", {}))
        return (name, msgspec.json.encode(arguments).decode()) if isinstance(arguments, dict) else None

    def _give(self, name: str, arguments: str) -> None:
        if self._config.max_calls is not None and self.num_calls >= self._config.max_calls:
            return
        if not self._announced:
            self._announced = True
            self._index += 1
            function = FunctionCall(arguments="" if self._stream else arguments, name=name)
            call = ToolCall(index=self._index, id=self._format.new_id(), type="function", function=function)
            self._deltas.append(ChatDelta(tool_calls=[call]))
        if self._stream:
            call = ToolCall(index=self._index, function=FunctionCall(arguments=arguments))
            self._deltas.append(ChatDelta(tool_calls=[call]))

    def _give_up(self) -> "State":
        """What was looked at is content; what follows is looked at anew."""
        self._say(self._at)
        return self._content

    def _fail(self) -> "State":
        """The object is no call. What was given as arguments is not looked at again."""
        if not self._announced:
            return self._give_up()
        rest = self._scanner.at - self._sent
        self._drop(self._sent)
        self._trim = False
        self._say(rest)
        return self._content

    def _after(self) -> "State | None":
        rest = self._buffer.lstrip()
        call = rest.removeprefix(self._format.separator).lstrip()
        if self._format.separator and call.startswith("{"):
            return self._begin(call)
        if not call or (self._format.closing.startswith(rest) and rest != self._format.closing):
            return None
        self._drop(len(self._buffer) - len(rest.removeprefix(self._format.closing)))
        return self._content


def decode_json(text: str) -> object:
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError):
        return None
