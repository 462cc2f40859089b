"""What an ablation tries: settings that differ from the configuration in one thing, and workloads to try them on."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from minisgl.bench.workload import WorkloadSpec
from minisgl.config import Config

GROUPS: Final = ("overlap", "graphs", "chats", "system-prompt", "attention", "page-size", "chunk-size")
PAGE_SIZES: Final = (1, 4, 16, 64, 256)
CHUNK_SIZES: Final = (512, 1024, 2048, 4096, 8192, 16384, 32768)
GRAPH_BATCHES: Final = (0, 4, 64)
PIECEWISE_TOKENS: Final = (0, 512, 2048)
PIECEWISE_CHUNK: Final = 512
"""The chunk that they are tried at: the smaller a step, the more of it is its launch."""
EXECUTOR_FIELDS: Final = ("attn", "page_size", "cuda_graph_max_bs", "piecewise_cuda_graph_max_tokens")
"""Settings that need an executor of their own; with the others an engine can be built on one that is there."""


@dataclass(frozen=True, kw_only=True)
class Chats:
    """Conversations that go on together: in each turn a new message after everything said before."""

    conversations: int
    turns: int
    message: int
    answer: int


@dataclass(frozen=True, kw_only=True)
class SystemPrompt:
    """Requests that begin with the same `shared` tokens and go on with `own` of their own."""

    requests: int
    shared: int
    own: int
    answer: int


Scenario = WorkloadSpec | Chats | SystemPrompt

GPU_SCENARIOS: Final[dict[str, Scenario]] = {
    "batch": WorkloadSpec(num_requests=256, input_len=(100, 1024), output_len=(64, 256)),
    "long": WorkloadSpec(num_requests=32, input_len=(2048, 12288), output_len=(64, 128)),
    "chats": Chats(conversations=64, turns=4, message=512, answer=64),
    "system-prompt": SystemPrompt(requests=256, shared=2048, own=64, answer=64),
}
CPU_SCENARIOS: Final[dict[str, Scenario]] = {
    "batch": WorkloadSpec(num_requests=4, input_len=(16, 48), output_len=(8, 16)),
    "long": WorkloadSpec(num_requests=3, input_len=(64, 160), output_len=(8, 16)),
    "chats": Chats(conversations=2, turns=3, message=32, answer=8),
    "system-prompt": SystemPrompt(requests=4, shared=96, own=8, answer=8),
}
CPU_CHUNKS: Final = (16, 64, 256)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A setting to try on a scenario. `group` "default" is what the others of the scenario are compared with."""

    group: str
    label: str
    scenario: str
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Group and label in one."""
        return f"{self.group}: {self.label}"


def make_variants(config: Config, groups: Sequence[str], backends: Sequence[str], gpu: bool) -> list[Variant]:
    """The defaults of the scenarios that these groups need, and everything to compare with them.

    `config` is resolved; a value that it has already is not tried again. Variants that can share an executor follow one
    another, and the default is measured once more at the end: how far the two are apart is the noise.
    """
    tried: list[Variant] = []

    def vary(group: str, scenario: str, label: str, **changes: Any) -> None:
        if group in groups and any(getattr(config, name) != value for name, value in changes.items()):
            tried.append(Variant(group=group, label=label, scenario=scenario, changes=changes))

    other_cache = "naive" if config.cache == "radix" else "radix"
    vary("overlap", "batch", "off" if config.overlap else "on", overlap=not config.overlap)
    vary("chats", "chats", other_cache, cache=other_cache)
    vary("system-prompt", "system-prompt", other_cache, cache=other_cache)
    for chunk in CHUNK_SIZES if gpu else CPU_CHUNKS:
        vary("chunk-size", "long", str(chunk), max_prefill_length=chunk)
    for batch in GRAPH_BATCHES if gpu else ():
        vary("graphs", "batch", f"up to {batch}" if batch else "off", cuda_graph_max_bs=batch)
    for tokens in PIECEWISE_TOKENS if gpu else ():
        name = f"with prompts, up to {tokens}" if tokens else "with prompts, off"
        vary("graphs", "long", name, piecewise_cuda_graph_max_tokens=tokens, max_prefill_length=PIECEWISE_CHUNK)
    for page_size in PAGE_SIZES:
        vary("page-size", "batch", str(page_size), page_size=page_size)
    for pair in itertools.product(backends, repeat=2) if len(backends) > 1 else ():
        vary("attention", "batch", ",".join(pair), attn=",".join(pair))
    return [*_defaults(tried), *tried, *_defaults(tried)[:1]]


def _defaults(tried: Sequence[Variant]) -> list[Variant]:
    scenarios = dict.fromkeys(variant.scenario for variant in tried)
    return [Variant(group="default", label="as configured", scenario=name) for name in scenarios]
