"""Errors as OpenAI's clients expect them: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

import msgspec
from fastapi import FastAPI
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from minisgl.errors import InvalidRequestError, MinisglError

BODY_LIMIT = 16 * 2**20
"""Bytes a request body may have."""


class BodyTooLargeError(InvalidRequestError):
    """The request body exceeds `BODY_LIMIT`."""

    status = 413
    code = "request_too_large"


class OverloadedError(MinisglError):
    """As many requests are live as the server keeps; a client may try again later."""

    status = 503
    type = "overloaded_error"
    code = "overloaded"


def error_body(error: MinisglError) -> dict[str, Any]:
    """OpenAI's error object."""
    return {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}}


def internal_error() -> MinisglError:
    """A fault of ours, as far as a client may know of it."""
    return MinisglError("internal error: the server's log says more", code="internal_error")


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A response with `value` as JSON."""
    return Response(msgspec.json.encode(value), status, headers, media_type="application/json")


def invalid_field(error: ValidationError) -> InvalidRequestError:
    """The first complaint of pydantic, naming the field as the user wrote it: `messages.0.role`."""
    first = error.errors(include_url=False, include_context=False)[0]
    # Between the fields, `loc` names the members of unions: "str", "constrained-str", "list[TextPart]".
    parts = [str(part) for part in first["loc"]]
    param = ".".join(part for part in parts if part != "str" and (part.isidentifier() or part.isdigit()))
    if first["type"] == "extra_forbidden":
        return InvalidRequestError(f"unknown field: {param}", param=param, code="unknown_parameter")
    if first["type"] == "missing":
        return InvalidRequestError(f"{param} is required", param=param, code="missing_required_parameter")
    return InvalidRequestError(f"{param}: {first['msg']}", param=param)


async def on_minisgl_error(request: Request, error: Exception) -> Response:
    """An error raised on purpose."""
    assert isinstance(error, MinisglError)
    return json_response(error_body(error), error.status)


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


def install_error_handlers(app: FastAPI) -> None:
    """Make every error of `app` one of OpenAI's form."""
    app.add_exception_handler(MinisglError, on_minisgl_error)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(Exception, on_unexpected_error)
