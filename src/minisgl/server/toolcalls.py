"""Finding the calls in an answer's text, while it is coming."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection

import msgspec

from minisgl.server.callforms import CallForm
from minisgl.server.parts import CallArguments, CallBroken, CallEnd, CallStart, Content, Part, merged, partial_end

HEAD = re.compile(
    r'\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*"([^"\\]*)"\s*,\s*"(arguments|parameters)"\s*:\s*(?=\{)'
)
"""The usual beginning of a call: with it the arguments can be given on as they come."""
HEAD_LIMIT = 1024
"""Characters in which that beginning is looked for; a call that begins otherwise is given as a whole."""
OUTSIDE_STRINGS = frozenset(' \t\r\n{}[]:,"0123456789+-.eEtrufalsn')
"""Characters that JSON has outside its strings."""


class ToolParser:
    """Splits text into content and calls of the given form; only functions of these `names` can be called.

    What turns out to be no call is content. `limit` bounds the calls: those beyond it are dropped. However the text is
    cut into pieces, the parts are the same once neighbours are joined.
    """

    def __init__(self, form: CallForm, names: Collection[str], limit: int | None = None) -> None:
        self._form = form
        self._names = names
        self._limit = limit
        self._buffer = ""  # not decided yet
        self._raw = ""  # taken since the last thing that was given: content if no call comes of it
        self._trim = False  # blanks after a call are not content
        self._in_list = False
        self._next = 0
        self._object = CallScanner()
        self._state: Callable[[list[Part]], bool] = self._at_start if form.at_start else self._content

    def push(self, text: str) -> list[Part]:
        """Take in text; the parts that are certain now."""
        self._buffer += text
        parts: list[Part] = []
        while self._state(parts):
            pass
        return merged(parts)

    def finish(self) -> list[Part]:
        """What was held back, at the end of the text; a call that is not complete is none."""
        parts: list[Part] = []
        if self._state == self._call:
            self._fail(parts)
        if self._state != self._after:
            self._say(parts, self._raw + self._buffer)
        self._raw = self._buffer = ""
        return merged(parts)

    def _say(self, parts: list[Part], text: str) -> None:
        text = text.lstrip() if self._trim else text
        if text:
            parts.append(Content(text))
            self._trim = False

    def _take(self, size: int) -> None:
        self._raw += self._buffer[:size]
        self._buffer = self._buffer[size:]

    def _skip_blanks(self) -> bool:
        """Take blanks; whether anything follows."""
        self._take(len(self._buffer) - len(self._buffer.lstrip()))
        return bool(self._buffer)

    def _give_up(self, parts: list[Part]) -> bool:
        """What was taken is content; what was not is looked at anew."""
        raw, self._raw = self._raw, ""
        self._say(parts, raw)
        return self._go(self._content)

    def _go(self, state: Callable[[list[Part]], bool]) -> bool:
        self._state = state
        return True

    def _at_start(self, parts: list[Part]) -> bool:
        if not self._skip_blanks():
            return False
        opening = self._form.opening
        if opening.startswith(self._buffer) and self._buffer != opening:
            return False
        if opening and self._buffer.startswith(opening):
            self._take(len(opening))
        return self._go(self._before)

    def _content(self, parts: list[Part]) -> bool:
        if self._form.at_start:
            self._say(parts, self._buffer)
            self._buffer = ""
            return False
        opening = self._form.opening
        start = self._buffer.find(opening)
        if start >= 0:
            said = self._buffer[:start].rstrip()
            self._say(parts, said)
            self._buffer = self._buffer[len(said) :]
            self._take(start - len(said) + len(opening))
            self._in_list = False
            return self._go(self._before)
        safe = len(self._buffer[: len(self._buffer) - partial_end(self._buffer, opening)].rstrip())
        self._say(parts, self._buffer[:safe])
        self._buffer = self._buffer[safe:]
        return False

    def _before(self, parts: list[Part]) -> bool:
        if not self._skip_blanks():
            return False
        if self._form.listed and not self._in_list:
            if self._buffer[0] != "[":
                return self._give_up(parts)
            self._in_list = True
            self._take(1)
            return True
        if self._buffer[0] != "{":
            return self._give_up(parts)
        self._object = CallScanner()
        return self._go(self._call)

    def _call(self, parts: list[Part]) -> bool:
        scan = self._object
        scan.read(self._buffer, self._names)
        if scan.name is not None:
            if not scan.announced:
                scan.announced = True
                self._call_part(parts, CallStart(self._next, scan.name))
            end = scan.at if scan.arguments_end is None else scan.arguments_end
            self._call_part(parts, CallArguments(self._next, self._buffer[scan.sent : end]))
            scan.sent = max(scan.sent, end)
        if scan.failed:
            return self._fail(parts)
        if not scan.complete:
            return False
        call = scan.call(self._buffer, self._names)
        if call is None:
            scan.failed = True
            return self._fail(parts)
        if scan.name is None:
            self._call_part(parts, CallStart(self._next, call[0]))
            self._call_part(parts, CallArguments(self._next, call[1]))
        self._call_part(parts, CallEnd(self._next))
        self._next += 1
        self._buffer, self._raw = self._buffer[scan.at :], ""
        self._trim = True
        return self._go(self._after)

    def _call_part(self, parts: list[Part], part: Part) -> None:
        if self._limit is None or self._next < self._limit:
            parts.append(part)

    def _fail(self, parts: list[Part]) -> bool:
        """The object is no call. What was given as arguments is not looked at again."""
        scan = self._object
        if scan.name is None:
            return self._give_up(parts)
        raw, self._raw = self._raw, ""
        self._call_part(parts, CallBroken(self._next, raw + self._buffer[: scan.at], self._buffer[scan.sent : scan.at]))
        self._next += 1
        self._buffer = self._buffer[scan.at :]
        self._trim = False
        return self._go(self._content)

    def _after(self, parts: list[Part]) -> bool:
        if not self._skip_blanks():
            return False
        first, closing = self._buffer[0], self._form.closing
        if self._in_list:
            if first not in ",]":
                return self._give_up(parts)
            self._take(1)
            if first == ",":
                return self._go(self._before)
        elif self._form.at_start:
            if first == ";":
                self._take(1)
            return self._go(self._before) if first in ";{" else self._give_up(parts)
        elif closing.startswith(self._buffer) and self._buffer != closing:
            return False
        elif self._buffer.startswith(closing):
            self._take(len(closing))
        self._raw = ""
        return self._go(self._content)


class CallScanner:
    """Reads the JSON object that may be a call, each character once; positions are those of the text it is given.

    `at` is how far it has read. It is `complete` after the closing brace, and `failed` at what is no JSON.
    """

    def __init__(self) -> None:
        self.at = 0
        self.complete = False
        self.failed = False
        self.name: str | None = None
        self.announced = False
        self.sent = 0
        self.arguments_end: int | None = None
        self._arguments_start = 0
        self._key = ""
        self._head_looked_for = False
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def read(self, text: str, names: Collection[str]) -> None:
        """Go on in `text`, which begins with the object's brace and has grown since the last time."""
        if not self._head_looked_for:
            head = HEAD.match(text[:HEAD_LIMIT])
            self._head_looked_for = head is not None or len(text) >= HEAD_LIMIT
            if head is not None and head[1] in names:
                self.name, self._key = head[1], head[2]
                self._arguments_start = self.sent = head.end()
        at = self.at
        while at < len(text) and not self.complete and not self.failed:
            self._step(text[at], at)
            at += 1
        self.at = at - 1 if self.failed else at

    def _step(self, character: str, at: int) -> None:
        if self._escaped:
            self._escaped = False
        elif self._in_string:
            self._escaped = character == "\\"
            self._in_string = character != '"'
        elif character not in OUTSIDE_STRINGS:
            self.failed = True
        elif character == '"':
            self._in_string = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
            self.complete = self._depth == 0
            if self._depth == 1 and self.name is not None and self.arguments_end is None:
                self.arguments_end = at + 1

    def call(self, text: str, names: Collection[str]) -> tuple[str, str] | None:
        """Name and arguments of the complete object, None when it is no call."""
        value = decoded(text[: self.at])
        if not isinstance(value, dict) or not isinstance(value.get("name"), str) or value["name"] not in names:
            return None
        if self.name is not None:
            shown = text[self._arguments_start : self.arguments_end]
            same = value["name"] == self.name and value[self._key] == decoded(shown)
            return (self.name, shown) if same else None
        arguments = value.get("arguments", value.get("parameters", {}))
        if not isinstance(arguments, dict):
            return None
        return value["name"], msgspec.json.encode(arguments).decode()


def decoded(text: str) -> object:
    """The JSON value, None when it is none."""
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError):
        return None
