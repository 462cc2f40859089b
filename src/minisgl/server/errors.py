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


class UnauthorizedError(InvalidRequestError):
    """The request has no API key, or a wrong one (RFC 6750)."""

    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class RetryLaterError(MinisglError):
    """The same request may succeed after `retry_after` s, which the response's Retry-After says."""

    status = 503

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class OverloadedError(RetryLaterError):
    """As many requests are live as the server keeps."""

    type = "overloaded_error"
    code = "overloaded"


class QueueFullError(RetryLaterError):
    """As many requests or prompt tokens wait as the operator allows."""

    status = 429
    type = "rate_limit_error"
    code = "queue_full"


class ApiProcessError(MinisglError):
    """An API process does not answer, cannot be started, or dies again and again."""

    status = 503
    code = "api_process_unavailable"


class DrainingError(RetryLaterError):
    """The server finishes what it has and takes nothing new."""

    code = "shutting_down"


class RequestTimeoutError(MinisglError):
    """The request took longer than `--request-timeout`; what it held is free again."""

    status = 504
    type = "timeout_error"
    code = "request_timeout"


class RequestAbortedError(MinisglError):
    """The operator ended the request. The status is one that clients do not retry by themselves."""

    status = 499
    type = "invalid_request_error"
    code = "request_aborted"


def error_body(error: MinisglError) -> dict[str, Any]:
    """OpenAI's error object: `{"error": {"message", "type", "param", "code"}}`."""
    return {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}}


def error_headers(error: MinisglError) -> dict[str, str]:
    """The headers that say more of an error than its body: when to come again, or how to identify oneself."""
    if isinstance(error, RetryLaterError):
        return {"retry-after": str(error.retry_after)}
    return {"www-authenticate": "Bearer"} if isinstance(error, UnauthorizedError) else {}


def internal_error() -> MinisglError:
    """A fault of ours, as far as a client may know of it."""
    return MinisglError("internal error: the server's log says more", code="internal_error")
