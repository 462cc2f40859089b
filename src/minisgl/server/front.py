"""The HTTP side of an engine that is ready: the application, with the processes that help it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
from starlette.types import ASGIApp

from minisgl.config import Config
from minisgl.engine.messages import Ready
from minisgl.grammar.compiler import GrammarCompiler
from minisgl.server.admin import Setup
from minisgl.server.app import make_app
from minisgl.server.door import with_door
from minisgl.server.preparation import Api, Preparation
from minisgl.server.service import EngineService
from minisgl.tokenizer.standin import make_standin
from minisgl.tokenizer.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Front:
    """What answers HTTP. `standin` says that the model has no tokenizer, `chats` that it has a chat template."""

    app: ASGIApp
    api: Api
    standin: bool

    @property
    def chats(self) -> bool:
        """Whether there is a chat template."""
        return self.api.tokenizer.has_chat_template


@contextlib.asynccontextmanager
async def open_front(
    config: Config,
    service: EngineService,
    ready: Ready,
    *,
    started: float,
) -> AsyncIterator[Front]:
    """Have it for as long as the context lasts, with so many tokenizer processes; raises ModelError.

    `started` is when the server was, on the monotonic clock.
    """
    model = ready.model
    if config.served_model_name:
        model = msgspec.structs.replace(model, name=config.served_model_name[0])
    folder = Path(ready.folder)
    standin = config.dummy_weight and not Tokenizer.exists(folder)
    tokenizer = make_standin(model.vocab_size) if standin else Tokenizer.load(folder)
    grammars = GrammarCompiler(folder, model.vocab_size, model.eos_token_ids)
    check = None if standin else grammars.check
    preparation = Preparation(model, tokenizer, service.max_live, config.served_model_name, check)
    api = Api(service=service, preparation=preparation)
    app = with_door(make_app(api, Setup(config, ready.notes, ready.folder, started)), service.metrics, config)
    try:
        yield Front(app, api, standin)
    finally:
        grammars.close()
