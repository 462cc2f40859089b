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
from minisgl.server.admin import Setup
from minisgl.server.api import Api, ThreadPreparer
from minisgl.server.app import make_app
from minisgl.server.door import with_door
from minisgl.server.peers import Alone, Peers
from minisgl.server.service import EngineService
from minisgl.server.tally import Tally
from minisgl.server.tokenizer_messages import TokenizerSetup
from minisgl.server.tokenizer_pool import TokenizerPool
from minisgl.text.grammar_check import GrammarCompiler
from minisgl.text.tokenizer import Tokenizer


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

    @property
    def tally(self) -> Tally:
        """What it has counted."""
        return self.api.tally


@contextlib.asynccontextmanager
async def open_front(
    config: Config,
    service: EngineService,
    ready: Ready,
    *,
    tokenizers: int,
    started: float,
    peers: Peers | None = None,
) -> AsyncIterator[Front]:
    """Have it for as long as the context lasts, with so many tokenizer processes; raises ModelError.

    `started` is when the server was, on the monotonic clock.
    """
    model = ready.model
    if config.served_model_name:
        model = msgspec.structs.replace(model, name=config.served_model_name[0])
    tokenizing = TokenizerSetup(
        model=model,
        folder=ready.folder,
        standin=config.dummy_weight and not Tokenizer.exists(Path(ready.folder)),
        max_live=service.max_live,
        names=config.served_model_name,
        log_level=config.log_level,
    )
    preparation = tokenizing.preparation()
    pool = await TokenizerPool.start(tokenizing, tokenizers) if tokenizers else None
    grammars = GrammarCompiler(Path(ready.folder), model.vocab_size, model.eos_token_ids)
    api = Api(
        service=service,
        preparation=preparation,
        preparer=pool or ThreadPreparer(preparation),
        peers=peers or Alone(),
        check_grammar=None if tokenizing.standin else grammars.check,
    )
    app = with_door(make_app(api, Setup(config, ready.notes, ready.folder, started)), service.metrics, config)
    try:
        yield Front(app, api, tokenizing.standin)
    finally:
        grammars.close()
        if pool is not None:
            await pool.close()
