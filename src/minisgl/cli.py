"""The command line: flags made from the fields of `Config`, and what they start.

Exit status: 0 done, 1 could not start or ended with an error, 2 a bad command line, 130 interrupted.
"""

import argparse
import dataclasses
import os
import sys
import traceback
import types
import typing
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from typing import Any, Final, NoReturn

from minisgl import __version__
from minisgl.config import Config, check, debugging, flag_of, flags_of, from_environment, launcher, split_words
from minisgl.errors import ConfigError, MinisglError, did_you_mean
from minisgl.system import open_standard_streams, print_text

# Sections of `--help`, by the first of the fields of `Config` in each.
GROUPS: Final = {
    "model": "model", "tp": "parallelism", "max_running_requests": "scheduling", "page_size": "KV cache",
    "attn": "kernels", "trace_steps": "observation", "host": "interface", "metrics_prefix": "gateways",
    "api_key": "access", "ssl_certfile": "TLS", "max_queued_requests": "limits", "request_timeout": "timeouts",
}  # fmt: skip
SERVER_GROUPS: Final = ("interface", "gateways", "access", "TLS", "limits", "timeouts")  # a benchmark has none of them

ABOUT: Final = """\
Serve a language model over OpenAI's HTTP API, or chat with it.

examples:
  minisgl chat                                      chat with the bundled small model
  minisgl serve Qwen/Qwen3-0.6B                     serve a model at http://127.0.0.1:1919/v1
  minisgl serve Qwen/Qwen3-32B --tp 4 --port 30000  serve it on four GPUs

commands:
  serve [MODEL]  serve HTTP; also without a command
  chat [MODEL]   chat in this terminal; also --shell
  bench NAME     measure: offline, online, ablation or compare; see minisgl bench NAME --help
  ray [MODEL]    serve HTTP with several replicas, under Ray Serve; see minisgl ray --help
  simulate       a load test in virtual time, without a GPU; see minisgl simulate --help"""


COMMANDS: Final = ("serve", "chat", "bench", "ray", "simulate")
METAVARS: Final = {int: "N", float: "X", str: "TEXT"}


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, and which takes no abbreviated flag."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def build_parser(command: str | None = None) -> Parser:
    """The parser of `minisgl`, or of a command; a flag that was not given leaves nothing in the namespace."""
    usage = f"minisgl {command or '[serve | chat | bench]'} [MODEL] [flags]"
    parser = Parser(prog="minisgl", usage=usage, description=ABOUT)
    parser.add_argument("positional_model", nargs="?", metavar="MODEL", help="as --model")
    parser.add_argument("--version", action="version", version=f"minisgl {__version__}")
    add_config_flags(parser)
    parser.epilog = "environment:"
    for field in dataclasses.fields(Config):
        if name := field.metadata["env"]:
            default = f" (default: {field.default})" if field.default else ""
            line = "1  do not {}" if field.default is True else "VALUE  {}" + default
            parser.epilog += f"\n  {name}={line.format(field.metadata['help'])}"
    return parser


def add_config_flags(parser: argparse.ArgumentParser, *, without: Sequence[str] = ()) -> None:
    """Add the flags of `Config`, group by group, with their defaults in the help; `without` names groups to skip."""
    hints = typing.get_type_hints(Config)
    for field in dataclasses.fields(Config):
        if title := GROUPS.get(field.name):
            group = None if title in without else parser.add_argument_group(title)
        if group is not None and field.metadata["flag"]:
            add_flag(group, field, hints[field.name])


def add_flag(group: argparse._ArgumentGroup, field: dataclasses.Field[Any], hint: Any) -> argparse.Action:
    text = field.metadata["help"]
    options: dict[str, Any]
    if hint is bool:
        options = {"action": "store_true"}
    elif typing.get_origin(hint) is tuple:
        options = {"nargs": "+", "metavar": "NAME"}
    else:
        if isinstance(hint, types.UnionType):
            (hint,) = (part for part in typing.get_args(hint) if part is not types.NoneType)
        if field.default is not None:
            text += f" (default: {field.default})"
        choices = field.metadata["choices"] or None
        options = {"type": hint, "choices": choices, "metavar": None if choices else METAVARS[hint]}
    options |= {"dest": field.name, "default": argparse.SUPPRESS, "help": text.replace("%", "%%")}
    return group.add_argument(*flags_of(field), **options)


def config_from(parser: argparse.ArgumentParser, namespace: argparse.Namespace) -> Config:
    """The configuration that the flags and the environment say; a value out of range is the parser's error."""
    said = {name: value for name, value in vars(namespace).items() if name in Config.__dataclass_fields__}
    if (model := getattr(namespace, "positional_model", None)) is not None:
        if "model" in said:
            parser.error(f"the model is given twice: {model} and --model {namespace.model}")
        said["model"] = model
    for name, value in said.items():
        if isinstance(value, list):  # of words, perhaps with commas
            said[name] = split_words(value)
            if not said[name]:
                parser.error(f"argument {flag_of(name)}: expected at least one value")
    try:
        config = from_environment().replace(**said)
        check(config)
    except ConfigError as error:
        parser.error(error.message)
    return config


def parse(arguments: Sequence[str]) -> Config:
    """The configuration that a command line asks for; exits with status 2 and one line when it cannot be read."""
    command = arguments[0] if arguments and arguments[0] in ("serve", "chat") else None
    parser = build_parser(command)
    namespace, rest = parser.parse_known_args(arguments[1:] if command else arguments)
    model = namespace.positional_model
    if model in COMMANDS and command is None:
        parser.error(f"the command comes first: {model}")
    if model and command is None and (hint := did_you_mean(model, COMMANDS)) and not os.path.exists(model):
        parser.error(f"no command {model}{hint}")
    if rest:
        hint = did_you_mean(rest[0], [flag for action in parser._actions for flag in action.option_strings])
        parser.error(f"unrecognized arguments: {' '.join(rest)}{hint}")
    if command == "serve" and "shell" in namespace:
        parser.error("--shell chats: write minisgl chat, or leave --shell out")
    if command == "chat":
        namespace.shell = True
    return config_from(parser, namespace)


def guarded(run: Callable[[], int]) -> int:
    """Run; an error raised on purpose becomes one line on standard error, with a traceback when debugging."""
    try:
        return run()
    except MinisglError as error:
        if debugging():
            print_text(traceback.format_exc())
        print_text(f"error: {error.message}")
        return 1
    except KeyboardInterrupt:
        return 130


def start(config: Config) -> int:
    launched = launcher(config.tp)
    if launched is not None and launched.rank > 0:
        from minisgl.distributed.worker import serve_rank

        return serve_rank(launched)
    from minisgl.formats.hub import find_local

    find_local(config.model)  # what is not there is said before anything starts
    if config.shell:
        from minisgl.chat import run_shell

        open_standard_streams()
        run_shell(config)
    else:
        from minisgl.server.launch import serve

        serve(config)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and not arguments[0].startswith("-"):  # perhaps of another package, such as bench
        for point in entry_points(group="minisgl.commands", name=arguments[0]):
            return int(point.load()(arguments[1:]))
    config = parse(arguments)
    return guarded(lambda: start(config))
