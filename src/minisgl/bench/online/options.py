"""What one `minisgl bench online` is asked to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

PAGE: Final = 16
TOKENS: Final = (256, 10_000)
"""Ids below are special or bytes in many vocabularies; ids above are not in every vocabulary."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Fields are as the flags of the same names say; None is what was not said, times are in s.

    `server` is how to start our own server, as flags; None for one that runs already at `url`.
    """

    trace: Path | None = None
    chats: int | None = None
    scales: tuple[float, ...] = (1.0,)
    rates: tuple[float, ...] = ()
    burstiness: float = 1.0
    concurrencies: tuple[int, ...] = ()
    requests: int | None = None
    input_len: tuple[int, int] | None = None
    output_len: tuple[int, int] | None = None
    max_input_len: int | None = None
    max_output_len: int | None = None
    turns: int = 4
    system_prompts: int = 1
    system_len: int = 512
    think: float = 0.0
    seeds: tuple[int, ...] = (0,)
    salt: int | None = None
    temperature: float = 0.6
    ignore_eos: bool = True
    url: str = "http://127.0.0.1:1919"
    server: Sequence[str] | None = None
    model: str | None = None
    api_key: str | None = None
    endpoint: str = "ids"
    tokens: tuple[int, int] = TOKENS
    page_size: int = PAGE
    server_pid: int | None = None
    timeout: float = 600.0
    warmup: int = 32
    slo: Mapping[str, float]
    json: Path | None = None
    samples: Path | None = None
    small: bool = False


@dataclass(frozen=True)
class Load:
    """How requests come in one run: `kind` is scale, rate or concurrency."""

    kind: str
    value: float

    @property
    def label(self) -> str:
        """In words."""
        return f"{self.kind} {self.value:g}"


def loads(options: Options) -> list[Load]:
    """The runs to make, for each seed."""
    if options.concurrencies:
        return [Load("concurrency", value) for value in options.concurrencies]
    if options.rates:
        return [Load("rate", value) for value in options.rates]
    return [Load("scale", value) for value in options.scales]
