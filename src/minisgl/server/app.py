"""The ASGI application."""

from __future__ import annotations

from fastapi import FastAPI

from minisgl import __version__
from minisgl.server.admin import Setup, make_admin_router
from minisgl.server.api import Api
from minisgl.server.handlers import install_error_handlers
from minisgl.server.openapi import install_document
from minisgl.server.page import make_page_router
from minisgl.server.routes import make_router


def make_app(api: Api, setup: Setup) -> FastAPI:
    """All endpoints, with their document and their errors."""
    app = FastAPI(title="Mini-SGLang", version=__version__, docs_url=None, redoc_url=None)
    install_document(app)
    install_error_handlers(app)
    app.include_router(make_router(api))
    app.include_router(make_admin_router(api, setup))
    app.include_router(make_page_router())
    return app
