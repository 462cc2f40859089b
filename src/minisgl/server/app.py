"""The ASGI application."""

from __future__ import annotations

from collections.abc import Callable

from fastapi import FastAPI

from minisgl import __version__
from minisgl.server.admin import Setup, make_admin_router
from minisgl.server.api import Api, Preparer, ThreadPreparer
from minisgl.server.handlers import install_error_handlers
from minisgl.server.openapi import install_document
from minisgl.server.preparation import Preparation
from minisgl.server.routes import make_router
from minisgl.server.service import EngineService
from minisgl.tokenizer.tokenizer import Tokenizer
from minisgl.types import Grammar, ModelInfo


def create_app(
    service: EngineService,
    model: ModelInfo,
    tokenizer: Tokenizer,
    *,
    health_timeout: float = 5.0,
    setup: Setup | None = None,
    check_grammar: Callable[[Grammar], None] | None = None,
    preparer: Preparer | None = None,
) -> FastAPI:
    """The OpenAI-compatible server of one model; `/health` waits for the engine for `health_timeout` s.

    Without `check_grammar` structured output is refused by name; without a `preparer` requests are read in threads.
    """
    setup = setup or Setup()
    preparation = Preparation(model, tokenizer, service.max_live, setup.config.served_model_name)
    api = Api(
        service=service,
        preparation=preparation,
        preparer=preparer or ThreadPreparer(preparation),
        health_timeout=health_timeout,
        check_grammar=check_grammar,
    )
    return make_app(api, setup)


def make_app(api: Api, setup: Setup) -> FastAPI:
    """All endpoints, with their document and their errors."""
    app = FastAPI(title="Mini-SGLang", version=__version__, docs_url=None, redoc_url=None)
    install_document(app)
    install_error_handlers(app)
    app.include_router(make_router(api))
    app.include_router(make_admin_router(api, setup))
    return app
