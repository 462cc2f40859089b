"""The server's own errors, and how every error looks to OpenAI's clients.

Light on imports: the launcher needs it before there is an HTTP side.
"""

from __future__ import annotations

from typing import Any

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
    """OpenAI's error object: `{"error": {"message", "type", "param", "code"}}`."""
    return {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}}


def internal_error() -> MinisglError:
    """A fault of ours, as far as a client may know of it."""
    return MinisglError("internal error: the server's log says more", code="internal_error")
