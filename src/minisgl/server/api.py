"""What every endpoint works with."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable
from typing import Protocol

from minisgl.core.types import Grammar, ModelInfo
from minisgl.errors import InvalidRequestError, UnsupportedParameterError
from minisgl.server.errors import RetryLaterError
from minisgl.server.peers import Alone, Peers
from minisgl.server.preparation import Preparation
from minisgl.server.prepared import Converted, Kind, Prepared
from minisgl.server.service import EngineService
from minisgl.server.tally import Tally
from minisgl.text.tokenizer import Tokenizer


class Preparer(Protocol):
    """Does what `Preparation` does, off the event loop. `num_processes` of its own are ready."""

    @property
    def num_processes(self) -> int:
        """Processes that do nothing else."""

    async def prepare(self, kind: Kind, body: bytes) -> Prepared | Converted:
        """What a body asks for; raises InvalidRequestError."""

    def check(self) -> None:
        """Raise a MinisglError when it cannot do that any more."""


class ThreadPreparer:
    """Prepares in threads of this process."""

    def __init__(self, preparation: Preparation) -> None:
        self._preparation = preparation
        self.num_processes = 0

    async def prepare(self, kind: Kind, body: bytes) -> Prepared | Converted:
        """What a body asks for; raises InvalidRequestError."""
        return await asyncio.to_thread(self._preparation.prepare, kind, body)

    def check(self) -> None:
        """A thread is always there."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Api:
    """One served model. `created` is a Unix time in s, `health_timeout` in s.

    `peers` are the API processes beside this one. `check_grammar` raises InvalidRequestError for a grammar that cannot
    be enforced; without it none can be.
    """

    service: EngineService
    preparation: Preparation
    preparer: Preparer
    peers: Peers = dataclasses.field(default_factory=Alone)
    health_timeout: float = 5.0
    check_grammar: Callable[[Grammar], None] | None = None
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    @property
    def model(self) -> ModelInfo:
        """The model."""
        return self.preparation.model

    @property
    def tokenizer(self) -> Tokenizer:
        """Its tokenizer."""
        return self.preparation.tokenizer

    @property
    def names(self) -> tuple[str, ...]:
        """What requests may call it, where the operator said so."""
        return self.preparation.names

    async def prepare(self, kind: Kind, body: bytes) -> Prepared:
        """A request that generates; raises InvalidRequestError."""
        prepared = await self._prepare(kind, body)
        assert isinstance(prepared, Prepared)
        grammar = prepared.requests[0].params.grammar
        if grammar is not None:
            await asyncio.to_thread(self.require_grammar, grammar, prepared.grammar_field)
        return prepared

    @property
    def tally(self) -> Tally:
        """What this process has counted."""
        return Tally.of(self.service.metrics, self.service.queue, self.preparer.num_processes)

    async def convert(self, kind: Kind, body: bytes) -> bytes:
        """The JSON that answers a request that generates nothing; raises InvalidRequestError."""
        converted = await self._prepare(kind, body)
        assert isinstance(converted, Converted)
        return converted.json

    async def _prepare(self, kind: Kind, body: bytes) -> Prepared | Converted:
        metrics = self.service.metrics
        metrics.preparing += 1
        try:
            return await self.preparer.prepare(kind, body)
        except RetryLaterError as error:
            metrics.on_rejected(str(error.code))
            raise
        finally:
            metrics.preparing -= 1

    def require_grammar(self, grammar: Grammar, param: str | None) -> None:
        """Raise InvalidRequestError for a grammar that cannot be enforced; errors name `param`, where it comes from."""
        if self.check_grammar is None:
            raise UnsupportedParameterError("structured output is not available on this server", param=param)
        try:
            self.check_grammar(grammar)
        except InvalidRequestError as error:
            if error.param != "tools":
                error.param = param
            raise
