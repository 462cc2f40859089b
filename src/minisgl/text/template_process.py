"""The process that renders a chat template, which is not trusted: `python -m minisgl.text.template_process`.

The template runs in jinja2's immutable sandbox, sees plain JSON values only, and may use what the `transformers`
documentation on writing chat templates promises. The kernel ends the process when a rendering uses up its CPU time; a
sandbox alone does not bound what `9 ** 9 ** 9` takes. Standard input is a socket: lines of JSON come and go. The first
has the template's `source` and its special `tokens`, and the answer the template's `variables`; each other line has
the variables of a rendering, and the answer its `text`. An answer with an `error` says why there is none.
"""

import json
import signal
import socket
from datetime import datetime
from typing import Any

import jinja2
import jinja2.meta
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from minisgl.system import limit_memory

CPU_SECONDS = 1.0  # of a rendering
# A text that is much longer than what it was made of fills the memory of the process that asked for it.
FREE_CHARACTERS, MAX_GROWTH = 1 << 20, 8
MAX_REASON = 1000  # characters


class GenerationTag(Extension):
    """`{% generation %}…{% endgeneration %}` marks what to train on; here it is its content."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON as it is, where jinja2's own filter would escape HTML; templates may give the options by position."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def compiled(source: str, tokens: dict[str, str]) -> tuple[jinja2.Template, list[str]]:
    """A template and the variables that it takes. Raises ValueError with the reason where it is none."""
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols])
    env.filters["tojson"] = to_json
    env.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    env.globals["raise_exception"] = raise_exception
    try:
        template = env.from_string(source, globals={"tools": None, "documents": None, **tokens})
        return template, sorted(jinja2.meta.find_undeclared_variables(env.parse(source)))
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"line {error.lineno}: {error.message}") from error
    except (RecursionError, SyntaxError, MemoryError) as error:  # of jinja2's parser, and of Python's
        raise ValueError("it is nested too deeply") from error


def main() -> None:
    limit_memory()
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # that it is ignored would be inherited
    template: jinja2.Template | None = None
    with socket.socket(fileno=0) as link, link.makefile("rb") as lines:
        for line in lines:
            signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)  # too much CPU time ends the process (SIGPROF)
            try:
                if template is None:
                    template, variables = compiled(**json.loads(line))
                    reply = json.dumps({"variables": variables})
                elif len(text := template.render(json.loads(line))) > FREE_CHARACTERS + MAX_GROWTH * len(line):
                    raise ValueError(f"a prompt of {len(text)} characters is made of {len(line)}")
                else:
                    reply = json.dumps({"text": text})
            except Exception as error:  # the template is foreign code run on the user's values
                reply = json.dumps({"error": str(error)[:MAX_REASON] or type(error).__name__})
            signal.setitimer(signal.ITIMER_PROF, 0)
            link.sendall(reply.encode() + b"\n")


if __name__ == "__main__":
    main()
