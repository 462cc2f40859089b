"""The ASGI application."""

from __future__ import annotations

from collections.abc import Callable

from fastapi import FastAPI

from minisgl import __version__
from minisgl.server.admin import Setup, make_admin_router
from minisgl.server.api import Api
from minisgl.server.handlers import install_error_handlers
from minisgl.server.openapi import install_document
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
) -> FastAPI:
    """The OpenAI-compatible server of one model; `/health` waits for the engine for `health_timeout` s.

    Without `check_grammar` structured output is refused by name.
    """
    setup = setup or Setup()
    app = FastAPI(title="Mini-SGLang", version=__version__, docs_url=None, redoc_url=None)
    install_document(app)
    install_error_handlers(app)
    api = Api(
        service=service,
        model=model,
        tokenizer=tokenizer,
        health_timeout=health_timeout,
        names=setup.config.served_model_name,
        check_grammar=check_grammar,
    )
    app.include_router(make_router(api))
    app.include_router(make_admin_router(api, setup))
    return app
