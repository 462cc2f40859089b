"""Every error that can leave an endpoint becomes a response in OpenAI's form."""

from __future__ import annotations

from http import HTTPStatus

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from minisgl.errors import MinisglError
from minisgl.server.errors import error_body, error_headers, internal_error
from minisgl.server.responses import json_response
from minisgl.server.streaming import ClientGoneError


async def on_minisgl_error(request: Request, error: Exception) -> Response:
    """An error raised on purpose."""
    assert isinstance(error, MinisglError)
    return json_response(error_body(error), error.status, error_headers(error))


async def on_http_error(request: Request, error: Exception) -> Response:
    """What the router itself answers: 404, 405."""
    assert isinstance(error, HTTPException)
    shown = MinisglError(f"{request.method} {request.url.path}: {HTTPStatus(error.status_code).phrase}")
    shown.type = "invalid_request_error" if error.status_code < 500 else "server_error"
    shown.code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
    return json_response(error_body(shown), error.status_code, dict(error.headers or {}))


async def on_unexpected_error(request: Request, error: Exception) -> Response:
    """A fault of ours: the log has the details, the client does not."""
    return json_response(error_body(internal_error()), 500)


async def on_client_gone(request: Request, error: Exception) -> Response:
    """Nobody reads this; the status (nginx's "client closed request") is for the log."""
    return Response(status_code=499)


def install_error_handlers(app: FastAPI) -> None:
    """Make every error of `app` one of OpenAI's form."""
    app.add_exception_handler(MinisglError, on_minisgl_error)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(Exception, on_unexpected_error)
    app.add_exception_handler(ClientGoneError, on_client_gone)
    app.add_exception_handler(ClientDisconnect, on_client_gone)
