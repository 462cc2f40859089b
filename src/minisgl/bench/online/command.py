"""`minisgl bench online`: its flags. What they start is imported when it is known that it will run."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from minisgl.bench.offline import JSON_HELP, length_range, positive
from minisgl.bench.online.options import PAGE, TOKENS, Options
from minisgl.cli import Parser, guarded, parse

EPILOG: Final = (
    "One of --trace, --rate, --concurrency says how requests come; with --trace the other two replace its times. "
    "--serve takes all flags of `minisgl` beside these."
)
SLO_NAMES: Final = ("ttft", "tpot", "e2e")
UNITS: Final = {"ms": 1e-3, "s": 1.0}


def number(text: str) -> float:
    """A finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def numbers(text: str) -> tuple[float, ...]:
    """Numbers above 0 with commas between them."""
    return tuple(number(part) for part in text.split(","))


def counts(text: str) -> tuple[int, ...]:
    """Counts with commas between them."""
    return tuple(positive(part) for part in text.split(","))


def seeds(text: str) -> tuple[int, ...]:
    """Whole numbers with commas between them."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers") from None


def burstiness(text: str) -> float:
    """The shape of the gaps' distribution, `inf` for none at all."""
    return math.inf if text == "inf" else number(text)


def not_negative(text: str) -> float:
    """A finite number of at least 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")
    return value


def none_or_more(text: str) -> int:
    """A count of at least 0."""
    if not text.isascii() or not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a count of at least 0")
    return int(text)


def duration(text: str) -> float:
    """`300ms` or `0.3s`, in s; a bare number is ms."""
    unit = next((unit for unit in UNITS if text.endswith(unit)), "")
    return number(text.removesuffix(unit)) * UNITS[unit or "ms"]


def slo(text: str) -> dict[str, float]:
    """`ttft=300ms,tpot=20ms` as limits in s."""
    limits = {}
    for part in text.split(","):
        name, _, limit = part.partition("=")
        if name not in SLO_NAMES or not limit:
            raise argparse.ArgumentTypeError(
                f"{part!r} is not one of {', '.join(SLO_NAMES)} with a limit, as ttft=300ms"
            )
        limits[name] = duration(limit)
    return limits


def token_range(text: str) -> tuple[int, int]:
    """`LOW:HIGH`, of which HIGH is not part."""
    low, _, high = text.partition(":")
    if not (low.isdecimal() and high.isdecimal() and int(low) < int(high)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a range LOW:HIGH of token ids")
    return int(low), int(high)


def build_parser() -> Parser:
    """The parser of `minisgl bench online`. A flag that was not given leaves nothing in the namespace."""
    parser = Parser(
        prog="minisgl bench online",
        description="Sends requests to a server that speaks OpenAI's protocol and measures what each client would see.",
        epilog=EPILOG,
        argument_default=argparse.SUPPRESS,
    )

    def flags(title: str) -> Callable[..., Any]:
        return parser.add_argument_group(title).add_argument

    add = flags("how requests come")
    add("--trace", type=Path, metavar="FILE", help="replay a trace: Qwen-Bailian, Mooncake (JSON lines), Azure (CSV)")
    add(
        "--scale",
        dest="scales",
        type=numbers,
        metavar="X,Y",
        help="factors for the gaps between arrivals; 0.5 is twice as fast",
    )
    add("--rate", dest="rates", type=numbers, metavar="X,Y", help="requests (with --chats: conversations) per second")
    add(
        "--burstiness",
        type=burstiness,
        metavar="X",
        help="of --rate: 1 Poisson (default), less bursts, inf evenly spaced",
    )
    add(
        "--concurrency",
        dest="concurrencies",
        type=counts,
        metavar="N,M",
        help="so many at once, the next when one ends",
    )
    add("--seeds", type=seeds, metavar="N,M", help="of lengths, times and tokens; each is run (default: 0)")
    add = flags("what is sent")
    add(
        "--requests",
        type=positive,
        metavar="N",
        help="requests (default: 1000 of a trace, else 256; 16 for --serve on a CPU)",
    )
    add(
        "--input-len",
        type=length_range,
        metavar="A:B",
        help="tokens in a prompt (default: 100:1024; 32:128 for --serve on a CPU); with --chats in a message",
    )
    add("--output-len", type=length_range, metavar="A:B", help="tokens in an answer (the same defaults)")
    add("--max-input-len", type=positive, metavar="N", help="cut the trace's longer prompts")
    add("--max-output-len", type=positive, metavar="N", help="cut the trace's longer answers")
    add("--chats", type=positive, metavar="N", help="conversations of several turns behind shared system prompts")
    add("--turns", type=positive, metavar="N", help="turns in each (default: 4)")
    add("--system-prompts", type=positive, metavar="N", help="different ones (default: 1)")
    add("--system-len", type=positive, metavar="N", help="tokens in a system prompt (default: 512)")
    add("--think", type=not_negative, metavar="S", help="seconds between an answer and the next turn (default: 0)")
    add(
        "--endpoint",
        choices=("ids", "text", "chat"),
        help="ids: token ids to /v1/completions (default), text: words to it, chat: words to /v1/chat/completions",
    )
    add("--tokens", type=token_range, metavar="LOW:HIGH", help=f"token ids to send (default: {TOKENS[0]}:{TOKENS[1]})")
    add(
        "--salt",
        type=int,
        metavar="N",
        help="of the tokens beside the seed (default: drawn: no server has them cached)",
    )
    add("--temperature", type=not_negative, metavar="X", help="of the sampling (default: 0.6)")
    add("--no-ignore-eos", dest="ignore_eos", action="store_false", help="for servers that do not know ignore_eos")
    add(
        "--warmup",
        type=none_or_more,
        metavar="N",
        help="requests with short answers before the first run (default: 32, at most as many as a run has)",
    )
    add = flags("to whom")
    add("--url", metavar="URL", help="the server (default: http://127.0.0.1:1919)")
    add(
        "--serve",
        action="store_true",
        help="start a server of our own on a free port, with the flags given, and stop it in the end",
    )
    add(
        "--model",
        metavar="NAME",
        help="the model's name at the server (default: the first one it lists); with --serve the model to serve",
    )
    add(
        "--api-key",
        metavar="KEY",
        help="sent as bearer token (default: OPENAI_API_KEY or MINISGL_API_KEY of the environment)",
    )
    add("--timeout", type=number, metavar="S", help="seconds for a request (default: 600)")
    add(
        "--server-pid",
        type=positive,
        metavar="PID",
        help="whose CPU time to report, with its children (default: who listens there, if local)",
    )
    add(
        "--cache-page",
        dest="page_size",
        type=positive,
        metavar="N",
        help=f"tokens in a page of the server's prefix cache (default: {PAGE})",
    )
    add = flags("what is reported")
    add("--slo", type=slo, metavar="ttft=X,tpot=Y", help="limits for goodput: of ttft, tpot, e2e, in ms or with a unit")
    add("--json", type=Path, metavar="FILE", help=JSON_HELP + "; pictures go beside it")
    add("--samples", type=Path, metavar="FILE", help="write a line of JSON for each request here")
    return parser


def options_from(parser: Parser, arguments: Sequence[str]) -> Options:
    """The options that a command line says; what does not fit together is the parser's error."""
    namespace, rest = parser.parse_known_args(arguments)
    said = vars(namespace)
    serve = said.pop("serve", False)
    key = said.pop("api_key", None) or os.environ.get("OPENAI_API_KEY") or os.environ.get("MINISGL_API_KEY")
    if rest and not serve:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if serve:
        if "url" in said:
            parser.error("--serve starts the server: it does not go with --url")
        server = ["--model", said.pop("model"), *rest] if "model" in said else rest
        said |= {"server": server, "page_size": said.get("page_size", parse(server).page_size)}

    def exclude(flag: str, name: str, *others: tuple[str, str]) -> None:
        for other, text in others:
            if name in said and other in said:
                parser.error(f"{flag} does not go with {text}")

    trace, scale = ("trace", "--trace"), ("scales", "--scale")
    exclude("--rate", "rates", ("concurrencies", "--concurrency"), scale)
    exclude("--concurrency", "concurrencies", ("burstiness", "--burstiness"), scale)
    exclude("--chats", "chats", trace, ("requests", "--requests"))
    exclude("--input-len", "input_len", trace)
    exclude("--output-len", "output_len", trace)
    if not said.keys() & {"trace", "rates", "concurrencies"}:
        parser.error("one of --trace, --rate, --concurrency is required")
    needs = {"scales": trace, "max_input_len": trace, "max_output_len": trace, "burstiness": ("rates", "--rate")}
    needs |= dict.fromkeys(("turns", "system_prompts", "system_len", "think"), ("chats", "--chats"))
    for name, (other, text) in needs.items():
        if name in said and other not in said:
            parser.error(f"--{name.replace('scales', 'scale').replace('_', '-')} needs {text}")
    return Options(**{"slo": {}, "api_key": key, **said})


def hidden(arguments: Sequence[str]) -> list[str]:
    """The command line without its key, as a report may show it."""
    shown = list(arguments)
    for index, word in enumerate(shown):
        if word == "--api-key" and index + 1 < len(shown):
            shown[index + 1] = "KEY"
        elif word.startswith("--api-key="):
            shown[index] = "--api-key=KEY"
    return shown


def main(arguments: Sequence[str]) -> int:
    """Entry point of `minisgl bench online`; the exit status."""
    options = options_from(build_parser(), arguments)

    def start() -> int:
        from minisgl.bench.online.run import run

        return run(options, hidden(arguments))

    return guarded(start, debug=os.environ.get("LOG_LEVEL", "").upper() == "DEBUG")
