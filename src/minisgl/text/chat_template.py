"""Conversations as a model's text, through its chat template.

Templates differ in what they take: content as a text or as a list of parts, tools or none, arguments of calls as an
object or as text. Probes, small conversations that are rendered at the start, find out what a template shows, and every
conversation is put into that form. What a template cannot show is written into the content, in Hermes' format.
"""

import contextlib
import json
import signal
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minisgl.core.model_config import read_small
from minisgl.errors import InvalidRequestError, ModelError, UnsupportedParameterError
from minisgl.system import Helper

WALL_SECONDS = 20.0  # for an answer of the process; its own limit is on CPU time
MAX_SOURCE_BYTES = 1 << 22
WORD = "probe of the words"
CALL: dict[str, Any] = {"name": "called", "arguments": {"word": "x"}}
OFFERED = {"name": "offered", "description": "x", "parameters": {"type": "object", "properties": {}}}
TOOL = {"type": "function", "function": OFFERED}
TOOLS_TEXT = """You may call functions. Each line is the JSON description of one:
{tools}
To call one, write nothing but its name and its arguments as JSON, in this form:
<tool_call>
{{"name": "function name", "arguments": {{"parameter name": "value"}}}}
</tool_call>
Where no function helps, answer in plain text."""


class TemplateLimitError(InvalidRequestError):
    """A rendering took too much time, or its process died of it."""


class TemplateProcess:
    """The process of `template_process`, started again when it ended. Safe to use from several threads."""

    def __init__(self, source: str, tokens: Mapping[str, str]) -> None:
        self._setup = json.dumps({"source": source, "tokens": tokens}).encode()
        self._lock = threading.Lock()
        self.variables = self._start()

    def render(self, variables: Mapping[str, Any]) -> str:
        """Raises InvalidRequestError when the template refuses, TemplateLimitError when it takes too much."""
        try:
            line = json.dumps(variables).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidRequestError(f"chat templates take JSON values only: {error}", param="messages") from error
        with self._lock:
            reply = self._ask(line)
            if reply is None and self._helper.process.returncode != -signal.SIGPROF:
                reply = self._ask(line)  # it was ended from outside
        if reply is None:
            raise TemplateLimitError("the model's chat template takes too much time for this", param="messages")
        if "error" in reply:
            raise InvalidRequestError(f"the model's chat template refuses this: {reply['error']}", param="messages")
        return str(reply["text"])

    def _start(self) -> frozenset[str]:
        self._helper = Helper("minisgl.text.template_process")
        self._helper.link.settimeout(WALL_SECONDS)
        reply = self._ask(self._setup) or {"error": "it takes too much time"}
        if "error" in reply:
            self._helper.end()
            raise ModelError(f"the model's chat template is broken: {reply['error']}")
        return frozenset(reply["variables"])

    def _ask(self, line: bytes) -> dict[str, Any] | None:
        if not self._helper.end.alive:
            self._start()
        with contextlib.suppress(OSError):
            self._helper.link.sendall(line + b"\n")
            if (reply := self._helper.replies.readline()).endswith(b"\n"):
                decoded: dict[str, Any] = json.loads(reply)
                return decoded
        self._helper.end()
        return None


class ChatTemplate:
    """A model's template. `variables` are the names that it takes, `tokens` the named special tokens it may print. Safe
    to use from several threads. Raises ModelError when the source is no template.
    """

    def __init__(self, source: str, tokens: Mapping[str, str]) -> None:
        self.source = source
        self._tokens = frozenset(tokens)
        self._process = TemplateProcess(source, tokens)
        self.variables = self._process.variables
        self.takes_tools = "tools" in self.variables
        self._in_parts: dict[str, bool] = {}  # the roles that it shows: whether it takes their content as a list
        self._lost: set[str] = set()  # roles whose content it leaves out
        self._shows_calls = self._takes_text_arguments = True
        self._no_content: str | None = ""  # of a message that is calls only
        self._probe()

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool, /, **variables: Any) -> str:
        """The conversation as text. Raises InvalidRequestError when the template refuses it or leaves words out."""
        if taken := sorted((self._tokens | {"messages", "add_generation_prompt"}) & variables.keys()):
            raise InvalidRequestError(f"{taken[0]} cannot be set here", param="chat_template_kwargs")
        try:
            adapted = self._adapt(messages, variables.get("tools") or ())
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InvalidRequestError(f"a message is not as OpenAI's are: {error!r}", param="messages") from error
        text = self._process.render({**variables, "messages": adapted, "add_generation_prompt": add_generation_prompt})
        for message in adapted if self._lost else ():
            role, content = str(message.get("role")), str(text_of(message["content"]) or "")
            if role in self._lost and content.strip() not in text:
                reason = f"the model's chat template leaves out what the role {role} says"
                raise InvalidRequestError(reason, param="messages")
        return text

    def _adapt(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any]) -> list[dict[str, Any]]:
        """The messages in the template's form, and with what it does not show by itself."""
        adapted: list[dict[str, Any]] = []
        before = None
        for message in messages:
            role, content, calls = message.get("role"), text_of(message.get("content")), message.get("tool_calls")
            new = {**message, "content": content}
            if calls and self._shows_calls:
                new["content"] = content or self._no_content
                new["tool_calls"] = [
                    {**call, "function": function_of(call, self._takes_text_arguments)} for call in calls
                ]
            elif calls:
                del new["tool_calls"]
                written = [tagged("tool_call", json.dumps(function_of(call), ensure_ascii=False)) for call in calls]
                new["content"] = "\n".join(filter(None, (content, *written)))
            if role == "tool" and "tool" not in self._in_parts:
                new = {"role": "user", "content": tagged("tool_response", content)}
                if before == "tool":  # many templates want user and assistant in turn
                    new["content"] = f"{adapted.pop()['content']}\n{new['content']}"
            adapted.append(new)
            before = role
        if tools and not self.takes_tools:
            self._describe(tools, adapted)
        for message in adapted:
            content = message["content"]
            if isinstance(content, str) and self._in_parts.get(str(message.get("role")), self._in_parts.get("user")):
                message["content"] = [{"type": "text", "text": content}]
        return adapted

    def _describe(self, tools: Sequence[Any], messages: list[dict[str, Any]]) -> None:
        text = TOOLS_TEXT.format(tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))
        role = "system" if "system" in self._in_parts else "user"
        first = next((message for message in messages if message.get("role") == role), None)
        if first is None or (role == "system" and first is not messages[0]):
            messages.insert(0, {"role": role, "content": text})
        else:
            both = (first["content"], text) if role == "system" else (text, first["content"])
            first["content"] = "\n\n".join(both)

    def _probe(self) -> None:
        """Find out what the template shows. Raises ModelError when that alone takes too much."""
        user, calling = turn("user"), turn("assistant", "", tool_calls=[made_call(CALL["arguments"])])
        self._probe_role("user", turn("user", WORD))
        self._probe_role("system", turn("system", WORD), user)
        self._probe_role("assistant", user, turn("assistant", WORD), user)
        if CALL["name"] not in (self._try(user, calling) or ""):
            self._no_content = None
            self._shows_calls = CALL["name"] in (self._try(user, calling) or "")
        if self._shows_calls:
            text_call = turn("assistant", "", tool_calls=[made_call(WORD)])
            self._takes_text_arguments = WORD in (self._try(user, text_call) or "")
        self._probe_role("tool", user, calling, turn("tool", WORD, tool_call_id="probe0001"))
        self._lost.discard("tool")  # it is the user's then

    def _probe_role(self, role: str, *messages: Mapping[str, Any]) -> None:
        """Find out in which of the two shapes the template shows WORD, which this role says."""
        rendered = False
        for in_parts in (False, True):
            self._in_parts[role] = in_parts
            text = self._try(*messages)
            if text is not None and WORD in text:
                return
            rendered = rendered or text is not None
        del self._in_parts[role]
        if rendered:
            self._lost.add(role)

    def _try(self, *messages: Mapping[str, Any]) -> str | None:
        variables = {"tools": [TOOL], "add_generation_prompt": False}
        try:
            return self._process.render({"messages": self._adapt(messages, ()), **variables})
        except TemplateLimitError as error:
            raise ModelError("the model's chat template takes too much time for a short conversation") from error
        except InvalidRequestError:
            return None


def turn(role: str, content: str = "x", **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def made_call(arguments: object) -> dict[str, Any]:
    return {"id": "probe0001", "type": "function", "function": {**CALL, "arguments": arguments}}


def tagged(tag: str, text: str) -> str:
    return f"<{tag}>\n{text}\n</{tag}>"


def text_of(content: Any) -> Any:
    """A message's content as one text, its parts as lines; what is neither stays as it is."""
    if content is None:
        return ""
    if not isinstance(content, list):
        return content
    for part in content:
        if part["type"] != "text":
            raise UnsupportedParameterError(f"content of type {part['type']!r} is not supported", param="messages")
    return "\n".join(part["text"] for part in content)


def function_of(call: Mapping[str, Any], text_allowed: bool = True) -> dict[str, Any]:
    """The name and the arguments of a call, an object or where allowed any text: a cut answer has no whole JSON."""
    function = call.get("function", call)
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        with contextlib.suppress(ValueError, RecursionError):
            decoded = json.loads(arguments)
            arguments = decoded if isinstance(decoded, dict) else arguments
        if isinstance(arguments, str) and not text_allowed:
            arguments = {}
    return {"name": function["name"], "arguments": arguments}


def cut_after(text: str, content: str) -> str:
    """A rendered conversation up to the end of its last message's content, whose outer blanks the template may strip.
    Raises InvalidRequestError when the content is empty or the template does not show it.
    """
    bare = content.strip()
    start = text.rfind(bare) if bare else -1
    if start < 0:
        raise InvalidRequestError("the last message has no content that can be continued", param="messages")
    whole = content.lstrip()
    return text[: start + len(whole if text.startswith(whole, start) else bare)]


def read_templates(folder: Path, tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """The sources of a checkpoint's chat templates by their names, of which "default" and "tool_use" are known."""
    found = tokenizer_config.get("chat_template") or {}
    if isinstance(found, str):
        found = {"default": found}
    elif isinstance(found, list) and all(isinstance(item, dict) for item in found):
        found = {item.get("name"): item.get("template") for item in found}
    if not isinstance(found, dict) or not all(isinstance(text, str) for pair in found.items() for text in pair):
        raise ModelError(f"{folder / 'tokenizer_config.json'}: chat_template is no text and no list of named ones")
    files = {file.stem: file for file in sorted(folder.glob("additional_chat_templates/*.jinja"))}
    if (own := folder / "chat_template.jinja").exists():
        files["default"] = own
    return found | {name: read_source(file) for name, file in files.items()}


def read_source(file: Path) -> str:
    try:
        return read_small(file, MAX_SOURCE_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ModelError(f"{file}: not UTF-8 at byte {error.start}") from error
