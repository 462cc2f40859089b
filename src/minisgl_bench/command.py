"""`minisgl bench NAME`: the flags of the benchmarks. What a benchmark runs is imported once its flags are read."""

import argparse
import contextlib
import importlib
import math
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from minisgl.cli import SERVER_GROUPS, Parser, add_config_flags, config_from, guarded, parse
from minisgl.errors import ConfigError
from minisgl_bench.workload import PeakRates

NAMES: Final = (
    "offline", "online", "ablation", "compare", "attention", "collectives", "gemm", "grammar", "kernels", "streaming",
)  # fmt: skip
ABLATIONS: Final = ("overlap", "graphs", "chats", "system-prompt", "attention", "page-size", "chunk-size")
REPEATS: Final = 3
PAGE: Final = 16
TOKENS: Final = (256, 10_000)
"""Ids below are special or bytes in many vocabularies; ids above are not in every vocabulary."""
SLO_NAMES: Final = ("ttft", "tpot", "e2e")
UNITS: Final = {"ms": 1e-3, "s": 1.0}
EXTRA: Final = ("httptools", "psutil")
JSON_HELP: Final = (
    "write figures, hardware, versions and command here (default: benchmark/results/MODEL-GPU-NAME.json on a GPU; "
    "nowhere on a CPU)"
)


def count(text: str, least: int = 1) -> int:
    if not text.isascii() or not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a count of at least {least}")
    return int(text)


def number(text: str, words: str = "above 0") -> float:
    """A finite number above 0, or 0 itself where `words` allow it."""
    with contextlib.suppress(ValueError):
        if 0 < (value := float(text)) < math.inf or (value == 0 and words != "above 0"):
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is not a number {words}")


not_negative = partial(number, words="of at least 0")


def several(text: str, convert: Callable[[str], Any]) -> tuple[Any, ...]:
    return tuple(map(convert, text.split(",")))


def seeds(text: str) -> tuple[int, ...]:
    try:
        return tuple(map(int, text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers") from None


def burstiness(text: str) -> float:
    return math.inf if text == "inf" else number(text)


def length_range(text: str) -> tuple[int, int]:
    """`A:B` or `N` as an inclusive range of token counts."""
    low, _, high = text.partition(":")
    if not (low.isdecimal() and (high or low).isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a length N or a range A:B")
    if not 1 <= int(low) <= int(high or low):
        raise argparse.ArgumentTypeError(f"{text!r}: lengths are at least 1, the smaller one first")
    return int(low), int(high or low)


def token_range(text: str) -> tuple[int, int]:
    """`LOW:HIGH`, of which HIGH is not part."""
    low, _, high = text.partition(":")
    if not (low.isdecimal() and high.isdecimal() and int(low) < int(high)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a range LOW:HIGH of token ids")
    return int(low), int(high)


def slo(text: str) -> dict[str, float]:
    """`ttft=300ms,tpot=20` as limits in s; a bare number is ms."""
    limits = {}
    for part in text.split(","):
        name, _, limit = part.partition("=")
        if name not in SLO_NAMES or not limit:
            raise argparse.ArgumentTypeError(
                f"{part!r} is not one of {', '.join(SLO_NAMES)} with a limit, as ttft=300ms"
            )
        unit = next((unit for unit in UNITS if limit.endswith(unit)), "")
        limits[name] = number(limit.removesuffix(unit)) * UNITS[unit or "ms"]
    return limits


def peak_rates(text: str) -> PeakRates:
    try:
        values = {name: number(value) for name, _, value in (part.partition("=") for part in text.split(","))}
    except argparse.ArgumentTypeError:
        values = {}
    if set(values) != {"read", "flops"}:
        raise argparse.ArgumentTypeError(f"{text!r} is not read=BYTES_PER_SECOND,flops=FLOPS_PER_SECOND")
    return PeakRates(**values)


def ablations(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := [name for name in names if name not in ABLATIONS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(ABLATIONS)}")
    return names


# What was not said of `minisgl bench online`; times are in s. `small` asks for the lengths of a CPU.
DEFAULTS: Final[dict[str, Any]] = {
    "trace": None, "scale": (1.0,), "rate": (), "burstiness": 1.0, "concurrency": (), "seeds": (0,), "requests": None,
    "input_len": None, "output_len": None, "max_input_len": None, "max_output_len": None, "chats": None, "turns": 4,
    "system_prompts": 1, "system_len": 512, "think": 0.0, "endpoint": "ids", "tokens": TOKENS, "salt": None,
    "temperature": 0.6, "no_ignore_eos": False, "warmup": 32, "url": "http://127.0.0.1:1919", "serve": None,
    "model": None, "timeout": 600.0, "server_pid": None, "cache_page": PAGE, "slo": {}, "json": None, "samples": None,
}  # fmt: skip


# fmt: off
FLAGS: Final[dict[str, tuple[tuple[str, Any, str | None, str], ...]]] = {
    "how requests come": (
        ("trace", Path, "FILE", "replay a trace: Qwen-Bailian, Mooncake (JSON lines), Azure (CSV)"),
        ("scale", partial(several, convert=number), "X,Y", "factors for gaps between arrivals; 0.5 is twice as fast"),
        ("rate", partial(several, convert=number), "X,Y", "requests (with --chats: conversations) per second"),
        ("burstiness", burstiness, "X", "of --rate: 1 Poisson (default), less bursts, inf evenly spaced"),
        ("concurrency", partial(several, convert=count), "N,M", "so many at once, the next when one ends"),
        ("seeds", seeds, "N,M", "of lengths, times and tokens; each is run (default: 0)"),
    ),
    "what is sent": (
        ("requests", count, "N", "requests (default: 1000 of a trace, else 256; 16 for --serve on a CPU)"),
        ("input-len", length_range, "A:B", "tokens in a prompt or message (default: 100:1024; --serve on CPU 32:128)"),
        ("output-len", length_range, "A:B", "tokens in an answer (the same defaults)"),
        ("max-input-len", count, "N", "cut the trace's longer prompts"),
        ("max-output-len", count, "N", "cut the trace's longer answers"),
        ("chats", count, "N", "conversations of several turns behind shared system prompts"),
        ("turns", count, "N", "turns in each (default: 4)"),
        ("system-prompts", count, "N", "different ones (default: 1)"),
        ("system-len", count, "N", "tokens in a system prompt (default: 512)"),
        ("think", not_negative, "S", "seconds between an answer and the next turn (default: 0)"),
        ("endpoint", ("ids", "text", "chat"), None, "ids (default), text: /v1/completions; chat: /v1/chat/completions"),
        ("tokens", token_range, "LOW:HIGH", f"token ids to send (default: {TOKENS[0]}:{TOKENS[1]})"),
        ("salt", int, "N", "of the tokens beside the seed (default: random, so that no server has them cached)"),
        ("temperature", not_negative, "X", "of the sampling (default: 0.6)"),
        ("no-ignore-eos", None, None, "for servers that do not know ignore_eos"),
        ("warmup", partial(count, least=0), "N", "requests with short answers before the first run (default: 32)"),
    ),
    "to whom": (
        ("url", str, "URL", "the server (default: http://127.0.0.1:1919)"),
        ("serve", None, None, "start a server of our own on a free port, with the flags given, and stop it in the end"),
        ("model", str, "NAME", "its name at the server (default: the first listed); with --serve the model to serve"),
        ("api-key", str, "KEY", "sent as bearer token (default: OPENAI_API_KEY or MINISGL_API_KEY of the environment)"),
        ("timeout", number, "S", "seconds for a request (default: 600)"),
        ("server-pid", count, "PID", "whose CPU time to report, with its children (default: a local listener's)"),
        ("cache-page", count, "N", f"tokens in a page of the server's prefix cache (default: {PAGE})"),
    ),
    "what is reported": (
        ("slo", slo, "ttft=X,tpot=Y", "limits for goodput: of ttft, tpot, e2e, in ms or with a unit"),
        ("json", Path, "FILE", JSON_HELP + "; pictures go beside it"),
        ("samples", Path, "FILE", "write a line of JSON for each request here"),
    ),
}
"""By group: flag, type (or choices, or None for a switch), metavar, help."""
EXCLUDED: Final = (
    ("rate", "concurrency"), ("rate", "scale"), ("concurrency", "burstiness"), ("concurrency", "scale"),
    ("chats", "trace"), ("chats", "requests"), ("input_len", "trace"), ("output_len", "trace"),
)
NEEDED: Final = {
    "scale": "trace", "max_input_len": "trace", "max_output_len": "trace", "burstiness": "rate",
    "turns": "chats", "system_prompts": "chats", "system_len": "chats", "think": "chats",
}
# fmt: on


def online_options(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of a command line of `minisgl bench online`; what does not fit together is the parser's error.

    `serve` holds the flags of a server of our own; it is None for one that runs already at `url`.
    """
    parser = Parser(
        prog="minisgl bench online",
        description="Sends requests to a server that speaks OpenAI's protocol and measures what each client would see.",
        epilog="One of --trace, --rate, --concurrency says how requests come; with --trace the other two replace its "
        "times. --serve takes all flags of `minisgl` beside these.",
        argument_default=argparse.SUPPRESS,
    )
    for title, rows in FLAGS.items():
        group = parser.add_argument_group(title)
        for name, kind, metavar, text in rows:
            if kind is None:
                group.add_argument(f"--{name}", action="store_true", help=text)
            elif isinstance(kind, tuple):
                group.add_argument(f"--{name}", choices=kind, help=text)
            else:
                group.add_argument(f"--{name}", type=kind, metavar=metavar, help=text)
    namespace, rest = parser.parse_known_args(arguments)
    said = vars(namespace)
    said["api_key"] = said.get("api_key") or os.environ.get("OPENAI_API_KEY") or os.environ.get("MINISGL_API_KEY")
    if rest and "serve" not in said:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if "serve" in said:
        if "url" in said:
            parser.error("--serve starts the server: it does not go with --url")
        said["serve"] = ["--model", said.pop("model"), *rest] if "model" in said else rest
        said["cache_page"] = said.get("cache_page", parse(said["serve"]).page_size)
    for name, other in EXCLUDED:
        if name in said and other in said:
            parser.error(f"{spelled(name)} does not go with {spelled(other)}")
    if not said.keys() & {"trace", "rate", "concurrency"}:
        parser.error("one of --trace, --rate, --concurrency is required")
    for name, other in NEEDED.items():
        if name in said and other not in said:
            parser.error(f"{spelled(name)} needs {spelled(other)}")
    return argparse.Namespace(**{**DEFAULTS, **said})


def load_kind(options: argparse.Namespace) -> str:
    return "concurrency" if options.concurrency else "rate" if options.rate else "scale"


def spelled(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def without_key(arguments: Sequence[str]) -> list[str]:
    shown = list(arguments)
    for index, word in enumerate(shown):
        if word == "--api-key" and index + 1 < len(shown):
            shown[index + 1] = "KEY"
        elif word.startswith("--api-key="):
            shown[index] = "--api-key=KEY"
    return shown


def online(arguments: Sequence[str]) -> int:
    options = online_options(arguments)

    def start() -> int:
        try:
            from minisgl_bench.online import run
        except ModuleNotFoundError as error:
            if error.name not in EXTRA:
                raise
            raise ConfigError(f"bench online needs {' and '.join(EXTRA)}: pip install 'minisgl[bench]'") from error
        return run(options, without_key(arguments))

    return guarded(start, debug=debugging())


DESCRIPTIONS: Final = {
    "offline": "Throughput of a batch of random prompts, EOS ignored. Defaults: the published workload of 256 requests "
    "on a GPU, a smaller one on a CPU.",
    "compare": "The workload of `minisgl bench offline` through another engine, in a process of its own, and then "
    "through this one, with the same flags as far as both have them.",
    "ablation": "Turns one setting at a time away from the configuration given here, over weights loaded once.",
}


def engine_parser(name: str) -> Parser:
    """The parser of a benchmark that runs an engine in this process: its own flags, and the engine's."""
    parser = Parser(prog=f"minisgl bench {name}", description=DESCRIPTIONS[name])
    add = parser.add_argument_group(name).add_argument
    add("--json", type=Path, metavar="FILE", help=JSON_HELP)
    if name == "ablation":
        names = ", ".join(ABLATIONS)
        add("--only", type=ablations, default=ABLATIONS, metavar="A,B", help=f"of {names} (default: all)")
        text = f"runs of each, of which the median counts (default: {REPEATS})"
        add("--repeats", type=count, default=REPEATS, metavar="N", help=text)
    else:
        ranges = "(default: 100:1024; 32:128 on a CPU)"
        add("--num-requests", type=count, metavar="N", help="requests (default: 256; 16 on a CPU)")
        add("--input-len", type=length_range, metavar="A:B", help=f"tokens in a prompt {ranges}")
        add("--output-len", type=length_range, metavar="A:B", help=f"tokens generated {ranges}")
        add("--seed", type=int, metavar="N", help="of the workload (default: 0)")
        add("--temperature", type=float, metavar="X", help="of the sampling (default: 0.6)")
    if name == "compare":
        add("--with", dest="peer", choices=("vllm",), required=True, help="the other engine")
    if name == "offline":
        text = "then compare with it on the same prompts, greedy, float32: one request alone, and eight"
        add("--compare", choices=("transformers",), help=text)
        text = "bytes/s and flop/s that the roofline is computed from (default: measured on a GPU; none on a CPU)"
        add("--peak-rates", "--ceilings", type=peak_rates, metavar="read=X,flops=X", help=text)
        text = "skip the second, traced run that splits the time"
        add("--no-profile", dest="profile", action="store_false", help=text)
    add_config_flags(parser, without=SERVER_GROUPS)
    return parser


def engine_benchmark(name: str, arguments: Sequence[str]) -> int:
    parser = engine_parser(name)
    options = parser.parse_args(arguments)
    config = config_from(parser, options)

    def start() -> int:
        return int(importlib.import_module(f"minisgl_bench.{name}").run(config, options, arguments))

    return guarded(start, debug=config.log_level == "DEBUG")


def debugging() -> bool:
    return os.environ.get("LOG_LEVEL", "").upper() == "DEBUG"


def main(arguments: Sequence[str]) -> int:
    parser = Parser(prog="minisgl bench", description="Measure, and print the command that measures it again.")
    parser.add_argument(
        "name",
        choices=NAMES,
        help="offline: a batch of requests through the offline API; online: requests to a server at the times of a "
        "trace, or others; ablation: each setting against the default; compare: the batch through another engine too; "
        "the others: parts of the engine and the server alone",
    )
    name = parser.parse_args(arguments[:1]).name
    if name == "online":
        return online(arguments[1:])
    if name in DESCRIPTIONS:
        return engine_benchmark(name, arguments[1:])
    module = importlib.import_module(f"minisgl_bench.{name}")
    return guarded(lambda: int(module.main(arguments[1:])), debug=debugging())
