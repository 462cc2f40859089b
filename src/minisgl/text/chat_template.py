"""Chat templates, which are not trusted: they run in jinja2's immutable sandbox and see plain JSON values only.

A template may use what the `transformers` documentation on writing chat templates promises.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from minisgl.errors import InvalidRequestError, ModelError


class GenerationTag(Extension):
    """`{% generation %}…{% endgeneration %}` marks what to train on; here it is its content."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class PublicNamespace(Namespace):
    """jinja2's `namespace` without underscored names, which reach into the interpreter."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # without `self`, which may be an attribute's name
        self, *rest = args
        for name in dict(*rest, **kwargs):
            refuse_private(name)
        Namespace.__init__(self, *rest, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        refuse_private(name)
        super().__setitem__(name, value)


def refuse_private(name: object) -> None:
    if str(name).startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace attribute must not start with an underscore: {name!r}")


def raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)


def make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    """`dict(…)` without the type's other attributes."""
    return dict(*args, **kwargs)


def to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON as it is, where jinja2's own filter would escape HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def make_environment() -> ImmutableSandboxedEnvironment:
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols])
    env.filters["tojson"] = to_json
    env.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    env.globals |= {"dict": make_dict, "namespace": PublicNamespace}
    return env


class ChatTemplate:
    """A compiled template. `tokens` are the named special tokens it may print, `variables` the names that it takes.

    Raises ModelError when the source is no template.
    """

    def __init__(self, source: str, tokens: Mapping[str, str]) -> None:
        self.source = source
        self._tokens = dict(tokens)
        try:
            environment = make_environment()
            self._template = environment.from_string(source)
            self.variables = frozenset(jinja2.meta.find_undeclared_variables(environment.parse(source)))
        except jinja2.TemplateSyntaxError as error:
            raise ModelError(f"the model's chat template is broken: line {error.lineno}: {error.message}") from error

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool, /, **variables: Any) -> str:
        """The conversation as text. Raises InvalidRequestError when the template refuses it."""
        fixed = {**self._tokens, "messages": list(messages), "add_generation_prompt": add_generation_prompt}
        if taken := sorted(fixed.keys() & variables.keys()):
            raise InvalidRequestError(f"{taken[0]} cannot be set here", param="chat_template_kwargs")
        try:
            return self._template.render({"tools": None, "documents": None, **variables, **fixed})
        except Exception as error:  # the template is foreign code run on the user's values
            reason = str(error) or type(error).__name__
            raise InvalidRequestError(f"the model's chat template refuses this: {reason}", param="messages") from error


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


def read_template(folder: Path, tokenizer_config: Mapping[str, Any]) -> str | None:
    """The source of a checkpoint's chat template: its own file, or the configuration's single or "default" one."""
    if (file := folder / "chat_template.jinja").is_file():
        return file.read_text("utf-8")
    source = tokenizer_config.get("chat_template")
    if isinstance(source, list):
        named = {entry["name"]: entry["template"] for entry in source}
        source = named.get("default") or next(iter(named.values()), None)
    return source if isinstance(source, str) and source else None
