"""The ASGI application."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from minisgl import __version__
from minisgl.server.api import Api
from minisgl.server.errors import install_error_handlers
from minisgl.server.routes import make_router
from minisgl.server.service import EngineService
from minisgl.server.streaming import ClientGoneError
from minisgl.tokenizer.tokenizer import Tokenizer
from minisgl.types import ModelInfo


async def on_client_gone(request: Request, error: Exception) -> Response:
    """Nobody reads this; the status (nginx's "client closed request") is for the log."""
    return Response(status_code=499)


def create_app(
    service: EngineService, model: ModelInfo, tokenizer: Tokenizer, *, health_timeout: float = 5.0
) -> FastAPI:
    """The OpenAI-compatible server of one model; `/health` waits for the engine for `health_timeout` s."""
    app = FastAPI(title="Mini-SGLang", version=__version__, docs_url=None, redoc_url=None, openapi_url=None)
    install_error_handlers(app)
    app.add_exception_handler(ClientGoneError, on_client_gone)
    app.add_exception_handler(ClientDisconnect, on_client_gone)
    app.include_router(
        make_router(Api(service=service, model=model, tokenizer=tokenizer, health_timeout=health_timeout))
    )
    return app
