"""`minisgl bench NAME`: the flags of the benchmarks. What a benchmark runs is imported once its flags are read."""

import argparse
import contextlib
import dataclasses
import importlib
import itertools
import math
import os
import typing
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from minisgl.cli import SERVER_GROUPS, Parser, add_config_flags, add_flag, config_from, guarded, parse
from minisgl.config import Config
from minisgl.errors import ConfigError
from minisgl.system import install_command
from minisgl_bench.workload import PeakRates

ENGINE: Final = {
    "offline": "Throughput of a batch of random prompts, EOS ignored. Defaults: the published workload of 256 requests "
    "on a GPU, a smaller one on a CPU.",
    "compare": "The workload of `minisgl bench offline` through another engine, in a process of its own, and then "
    "through this one, with the same flags as far as both have them.",
    "fidelity": "How far log-probabilities are from the same model's without --quantization and --kv-cache-dtype.",
    "ablation": "Turns one setting at a time away from the configuration given here, over weights loaded once.",
}
PARTS: Final = ("attention", "calibrate", "collectives", "gemm", "grammar", "kernels", "streaming")
ABLATIONS: Final = (
    "overlap", "launch-ahead", "quantization", "graphs", "chats", "system-prompt", "attention", "page-size",
    "chunk-size",
)  # fmt: skip
ROUTER_NAMES: Final = ("random", "round-robin", "least-loaded", "prefix")
SLO_NAMES: Final = ("ttft", "tpot", "e2e")
UNITS: Final = {"ms": 1e-3, "s": 1.0}
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


natural = partial(count, least=0)
not_negative = partial(number, words="of at least 0")


def several(text: str, convert: Callable[[str], Any]) -> tuple[Any, ...]:
    try:
        return tuple(map(convert, text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not made of numbers, separated by commas") from None


def burstiness(text: str) -> float:
    return math.inf if text == "inf" else number(text)


def length_range(text: str) -> tuple[int, int]:
    low, _, high = text.partition(":")
    if not (low.isdecimal() and (high or low).isdecimal() and 1 <= int(low) <= int(high or low)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a length N or a range A:B from 1 up, the smaller one first")
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
            names = ", ".join(SLO_NAMES)
            raise argparse.ArgumentTypeError(f"{part!r} is not one of {names} with a limit, as ttft=300ms")
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


def one_of(names: Sequence[str], text: str) -> str:
    if text not in names:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(names)}")
    return text


ablations = partial(several, convert=partial(one_of, ABLATIONS))
routers = partial(several, convert=partial(one_of, ROUTER_NAMES))


def losing(text: str) -> float | None:
    return None if text == "never" else number(text)


TO_WHOM: Final = "to whom"
HOW_THEY_COME: Final = (
    "One of --trace, --rate, --concurrency says how requests come; with --trace the other two replace its times."
)
GPU_HELP: Final = "h200 (default), h100, a100, or a .json file of `minisgl bench calibrate`"
HASH_HELP: Final = "make each token a hash of what its pages hold, as the tests do: slow, and it finds a broken cache"
# The fields of `Config` that a simulation can compare.
GRID: Final = (
    "model", "model_source", "quantization", "kv_cache_dtype", "max_seq_len_override", "tp", "all_reduce",
    "max_running_requests", "max_prefill_length", "schedule_policy", "launch_ahead", "eviction", "page_size",
    "num_pages", "memory_ratio", "cache", "cuda_graph_max_bs", "piecewise_cuda_graph_max_tokens",
)  # fmt: skip
FlagRow = tuple[str, Any, Any, str | None, str]
# Of `minisgl bench online`, by group: flag, what it is when it was not given, type (or choices, or None for a switch),
# metavar, help. Times are in s.
# fmt: off
FLAGS: Final[dict[str, tuple[FlagRow, ...]]] = {
    "how requests come": (
        ("trace", None, Path, "FILE", "replay a trace: Qwen-Bailian, Mooncake (JSON lines), Azure (CSV)"),
        ("scale", (1.0,), partial(several, convert=number), "X,Y", "of gaps between arrivals; 0.5 is twice as fast"),
        ("rate", (), partial(several, convert=number), "X,Y", "requests (with --chats: conversations) per second"),
        ("burstiness", 1.0, burstiness, "X", "of --rate: 1 Poisson (default), less bursts, inf evenly spaced"),
        ("concurrency", (), partial(several, convert=count), "N,M", "so many at once, the next when one ends"),
        ("seeds", (0,), partial(several, convert=natural), "N,M", "of lengths, times, tokens: each is run (0)"),
    ),
    "what is sent": (
        ("requests", None, count, "N", "requests (default: 1000 of a trace, else 256; 16 for --serve on a CPU)"),
        ("input-len", None, length_range, "A:B", "tokens of a prompt (default: 100:1024; --serve on CPU 32:128)"),
        ("output-len", None, length_range, "A:B", "tokens in an answer (the same defaults)"),
        ("max-input-len", None, count, "N", "cut the trace's longer prompts"),
        ("max-output-len", None, count, "N", "cut the trace's longer answers"),
        ("chats", None, count, "N", "conversations of several turns behind shared system prompts"),
        ("turns", 4, count, "N", "turns in each (default: 4)"),
        ("system-prompts", 1, count, "N", "different ones (default: 1)"),
        ("system-len", 512, count, "N", "tokens in a system prompt (default: 512)"),
        ("think", 0.0, not_negative, "S", "seconds between an answer and the next turn (default: 0)"),
        ("endpoint", "ids", ("ids", "text", "chat"), None, "ids (default) or text: /v1/completions; chat"),
        # ids below are special or bytes in many vocabularies; ids above are not in every vocabulary
        ("tokens", (256, 10_000), token_range, "LOW:HIGH", "token ids to send (default: 256:10000)"),
        ("salt", None, int, "N", "of the tokens beside the seed (default: random, so that no server has them cached)"),
        ("temperature", 0.6, not_negative, "X", "of the sampling (default: 0.6)"),
        ("no-ignore-eos", False, None, None, "for servers that do not know ignore_eos"),
        ("warmup", 32, natural, "N", "requests with short answers before the first run (default: 32)"),
    ),
    TO_WHOM: (
        ("url", "http://127.0.0.1:1919", str, "URL", "the server (default: http://127.0.0.1:1919)"),
        ("serve", None, None, None, "start a server on a free port, with the flags given, and stop it in the end"),
        ("model", None, str, "NAME", "at the server (default: the first listed); with --serve the one to serve"),
        ("api-key", None, str, "KEY", "bearer token (default: OPENAI_API_KEY or MINISGL_API_KEY in the environment)"),
        ("timeout", 600.0, number, "S", "seconds for a request (default: 600)"),
        ("server-pid", None, count, "PID", "whose CPU time to report, with its children (default: a local listener's)"),
        ("cache-page", 16, count, "N", "tokens in a page of the server's prefix cache (default: 16)"),
    ),
    "what is reported": (
        ("slo", {}, slo, "ttft=X,tpot=Y", "limits for goodput: of ttft, tpot, e2e, in ms or with a unit"),
        ("json", None, Path, "FILE", JSON_HELP + "; pictures go beside it"),
    ),
}
EXCLUDED: Final = (
    ("rate", "concurrency"), ("rate", "scale"), ("concurrency", "burstiness"), ("concurrency", "scale"),
    ("chats", "trace"), ("chats", "requests"), ("input_len", "trace"), ("output_len", "trace"),
)
NEEDED: Final = {
    "scale": "trace", "max_input_len": "trace", "max_output_len": "trace", "burstiness": "rate",
    "turns": "chats", "system_prompts": "chats", "system_len": "chats", "think": "chats",
}
FLEET: Final[dict[str, tuple[FlagRow, ...]]] = {
    "several replicas": (
        ("replicas", (1,), partial(several, convert=count), "N,M", "engines that share the requests (default: 1)"),
        ("router", ("least-loaded",), routers, "A,B", "which replica gets a request: "
         "random, round-robin, least-loaded (default), or prefix: the one that has most of it, unless it is too busy"),
        ("lose", (None,), partial(several, convert=losing), "S,T", "when a replica dies, in s, or never (default); "
         "clients send again what it had not answered"),
        ("repeat", 1, count, "N", "times that all requests come, each time of new users (default: 1)"),
    ),
}
# An answer begins within a second and then comes at 20 tokens a second, faster than people read.
SIMULATED_SLO: Final = {"ttft": 1.0, "tpot": 0.05}
# fmt: on


def add_flags(parser: Parser, rows_of: Mapping[str, Sequence[FlagRow]]) -> dict[str, Any]:
    """Add flags group by group, absent ones leaving nothing in the namespace; what they are then."""
    defaults = {}
    for title, rows in rows_of.items():
        group = parser.add_argument_group(title)
        for name, default, kind, metavar, text in rows:
            defaults[name.replace("-", "_")] = default
            if kind is None:
                group.add_argument(f"--{name}", action="store_true", help=text)
            elif isinstance(kind, tuple):
                group.add_argument(f"--{name}", choices=kind, help=text)
            else:
                group.add_argument(f"--{name}", type=kind, metavar=metavar, help=text)
    return defaults


def check_traffic(parser: Parser, said: Mapping[str, Any]) -> None:
    """End with the parser's error where flags contradict each other or one lacks another."""
    for name, other in EXCLUDED:
        if name in said and other in said:
            parser.error(f"--{name} does not go with --{other}".replace("_", "-"))
    if not said.keys() & {"trace", "rate", "concurrency"}:
        parser.error("one of --trace, --rate, --concurrency is required")
    for name, other in NEEDED.items():
        if name in said and other not in said:
            parser.error(f"--{name} needs --{other}".replace("_", "-"))


def online_options(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of `minisgl bench online`. `serve` holds the flags of a server of our own, None for one at `url`."""
    parser = Parser(
        prog="minisgl bench online",
        description="Sends requests to a server that speaks OpenAI's protocol and measures what each client would see.",
        epilog=f"{HOW_THEY_COME} --serve takes all flags of `minisgl` beside these.",
        argument_default=argparse.SUPPRESS,
    )
    defaults = add_flags(parser, FLAGS)
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
    check_traffic(parser, said)
    return argparse.Namespace(**{**defaults, **said})


def simulate_parser() -> tuple[Parser, dict[str, Any]]:
    """The parser of `minisgl simulate`, and what a flag is that was not given."""
    parser = Parser(
        prog="minisgl simulate",
        description="Runs the scheduler, the prefix cache and the engine's loop in virtual time, over a model of what "
        "steps cost on a GPU, and reports what clients would see. No GPU and no weights are needed.",
        epilog=f"{HOW_THEY_COME} Flags of the configuration take several values, separated by commas; every "
        "combination is simulated.",
        argument_default=argparse.SUPPRESS,
    )
    what = parser.add_argument_group("what is simulated")
    what.add_argument("--gpu", type=partial(several, convert=str), metavar="A,B", help=GPU_HELP)
    what.add_argument("--hash-tokens", action="store_true", help=HASH_HELP)
    what.add_argument("--trace-steps", metavar="FILE", help="trace every step of the one simulation, for Perfetto")
    fields, hints = {field.name: field for field in dataclasses.fields(Config)}, typing.get_type_hints(Config)
    for name in GRID:
        flag = add_flag(what, fields[name], hints[name])
        convert: Any = flag.type
        flag.type, flag.choices, flag.metavar = partial(several, convert=convert), None, "X,Y"
    left_out = ("endpoint", "tokens", "salt", "temperature", "no-ignore-eos", "warmup")
    rows = {title: [row for row in rows if row[0] not in left_out] for title, rows in FLAGS.items() if title != TO_WHOM}
    absent = {"gpu": ("h200",), "hash_tokens": False, "trace_steps": None, "small": False}
    return parser, {**absent, **add_flags(parser, {**FLEET, **rows}), "slo": SIMULATED_SLO}


def simulate(arguments: Sequence[str]) -> int:
    parser, defaults = simulate_parser()
    said = vars(parser.parse_args(arguments))
    check_traffic(parser, said)
    grid = {name: said.pop(name) for name in GRID if name in said}
    configs = []
    for values in itertools.product(*grid.values()):
        chosen = dict(zip(grid, values, strict=True))
        configs.append((chosen, config_from(parser, argparse.Namespace(**chosen))))
    options = argparse.Namespace(**{**defaults, **said})
    run = importlib.import_module("minisgl_bench.simulation").run
    return guarded(lambda: int(run(configs, options, arguments)))


def load_kind(options: argparse.Namespace) -> str:
    return "concurrency" if options.concurrency else "rate" if options.rate else "scale"


def online(arguments: Sequence[str]) -> int:
    options = online_options(arguments)

    def start() -> int:
        try:
            run = importlib.import_module("minisgl_bench.online").run
        except ModuleNotFoundError as error:
            if error.name not in ("httptools", "psutil"):
                raise
            command = install_command("httptools", "psutil")
            raise ConfigError(f"bench online needs httptools and psutil: {command}") from error
        hidden = {options.api_key: "KEY", f"--api-key={options.api_key}": "--api-key=KEY"}
        return int(run(options, [hidden.get(word, word) for word in arguments]))

    return guarded(start)


def engine_parser(name: str) -> Parser:
    parser = Parser(prog=f"minisgl bench {name}", description=ENGINE[name])
    add = parser.add_argument_group(name).add_argument
    add("--json", type=Path, metavar="FILE", help=JSON_HELP)
    if name == "ablation":
        names = ", ".join(ABLATIONS)
        add("--only", type=ablations, default=ABLATIONS, metavar="A,B", help=f"of {names} (default: all)")
        add("--seconds", type=not_negative, metavar="S", help="of a run (default: 5; on a CPU one workload)")
    elif name == "fidelity":
        text = "greedy tokens after each of 20 prompts (default: 64)"
        add("--output-len", type=count, default=64, metavar="N", help=text)
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


def main(arguments: Sequence[str]) -> int:
    parser = Parser(prog="minisgl bench", description="Measure, and print the command that measures it again.")
    text = "offline: a batch through the offline API; online: requests to a server at the times of a trace, or others; "
    text += "simulate: the same in virtual time; ablation: each setting against the default; "
    text += "fidelity: what quantisation changes; compare: another engine too; the others: parts alone"
    parser.add_argument("name", choices=("online", "simulate", *ENGINE, *PARTS), help=text)
    name, rest = parser.parse_args(arguments[:1]).name, arguments[1:]
    if name in ("online", "simulate"):
        return online(rest) if name == "online" else simulate(rest)
    if name in PARTS:
        if name == "gemm":
            name, rest = "kernels", ["--only", "gemm", *rest]
        part = importlib.import_module(f"minisgl_bench.{name}")
        return guarded(lambda: int(part.main(rest)))
    parser = engine_parser(name)
    options = parser.parse_args(rest)
    config = config_from(parser, options)
    return guarded(lambda: int(importlib.import_module(f"minisgl_bench.{name}").run(config, options, rest)))
