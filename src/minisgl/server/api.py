"""What every endpoint works with."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable

from minisgl.errors import InvalidRequestError, UnsupportedParameterError
from minisgl.server.engine_client import EngineClient
from minisgl.server.preparation import Preparation
from minisgl.server.prepared import Converted, Kind, Prepared
from minisgl.tokenizer.tokenizer import Tokenizer
from minisgl.types import Grammar, ModelInfo


@dataclasses.dataclass(frozen=True, kw_only=True)
class Api:
    """One served model. `created` is a Unix time in s, `health_timeout` in s.

    `check_grammar` raises InvalidRequestError for a grammar that cannot
    be enforced; without it none can be.
    """

    service: EngineClient
    preparation: Preparation
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

    async def convert(self, kind: Kind, body: bytes) -> bytes:
        """The JSON that answers a request that generates nothing; raises InvalidRequestError."""
        converted = await self._prepare(kind, body)
        assert isinstance(converted, Converted)
        return converted.json

    async def _prepare(self, kind: Kind, body: bytes) -> Prepared | Converted:
        with self.service.metrics.preparing.track_inprogress():
            return await asyncio.to_thread(self.preparation.prepare, kind, body)

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
