"""The server's own errors, and how every error looks to OpenAI's clients."""

from typing import Any

from starlette.responses import Response

from minisgl.errors import InvalidRequestError, MinisglError
from minisgl.server.responses import json_response


class RetryLaterError(MinisglError, status=503):
    def __init__(self, message: str, retry_after: int = 5) -> None:  # s
        super().__init__(message)
        self.retry_after = retry_after


# fmt: off
class OverloadedError(RetryLaterError, type="overloaded_error", code="overloaded"): ...
class QueueFullError(RetryLaterError, status=429, type="rate_limit_error", code="queue_full"): ...
class DrainingError(RetryLaterError, code="shutting_down"): ...

class BodyTooLargeError(InvalidRequestError, status=413, code="request_too_large"): ...
class SlowBodyError(InvalidRequestError, status=408, code="body_timeout"): ...
class MediaTypeError(InvalidRequestError, status=415, code="unsupported_media_type"): ...
class UnauthorizedError(InvalidRequestError, status=401, type="authentication_error", code="invalid_api_key"): ...
class ForbiddenError(InvalidRequestError, status=403): ...  # for web pages that the user did not mean to let in

class ApiProcessError(MinisglError, status=503, code="api_process_unavailable"): ...
class RequestTimeoutError(MinisglError, status=504, type="timeout_error", code="request_timeout"): ...
# Of a status that clients do not retry by themselves.
class RequestAbortedError(MinisglError, status=499, type="invalid_request_error", code="request_aborted"): ...
# fmt: on


def error_body(error: MinisglError) -> dict[str, Any]:
    return {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}}


def error_response(error: MinisglError, **headers: str) -> Response:
    if error.retry_after is not None:
        headers["retry-after"] = str(error.retry_after)
    if isinstance(error, UnauthorizedError):
        headers["www-authenticate"] = "Bearer"
    return json_response(error_body(error), error.status, headers)


def known_error(error: Exception) -> MinisglError:
    """What a client may know of an error: nothing of a fault of ours."""
    if isinstance(error, MinisglError):
        return error
    return MinisglError("internal error: the server's log says more", code="internal_error")
