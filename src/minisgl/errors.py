"""Typed errors. Each knows its HTTP status and how OpenAI's error object names it."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, ContextDecorator
from difflib import get_close_matches
from typing import Any


class MinisglError(Exception):
    """Base of every error raised on purpose. `param` names the request field at fault, if one is."""

    status = 500
    type = "server_error"
    code: str | None = None
    retry_after: int | None = None  # s, after which the same request may succeed

    def __init_subclass__(cls, status: int | None = None, type: str | None = None, code: str | None = None) -> None:
        cls.status, cls.type, cls.code = status or cls.status, type or cls.type, code or cls.code

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or self.code


class ConfigError(MinisglError):
    """A flag or a combination of flags that cannot be honoured."""


class UnknownKeywordError(MinisglError, TypeError):
    """A keyword argument that there is not, as in LLM(pagesize=16)."""


class ModelError(MinisglError):
    """A model that cannot be found, read or served; the message names file and tensor where there is one."""


class InvalidRequestError(MinisglError, status=400, type="invalid_request_error", code="invalid_value"):
    """A request that can never be served as it is."""


class ContextLengthError(InvalidRequestError, code="context_length_exceeded"):
    """The prompt, or the prompt and the tokens asked for, exceed what the model or the cache can hold."""


class UnsupportedParameterError(InvalidRequestError, code="unsupported_parameter"):
    """A field that is known but not implemented; refused by name rather than ignored."""


class ModelNotFoundError(InvalidRequestError, status=404, code="model_not_found"):
    """The request names a model that this server does not serve."""


class EngineDeadError(MinisglError, status=503, code="engine_unavailable"):
    """The engine ended; nothing can be generated any more."""


class NativePanicError(MinisglError, code="internal_error"):
    """A library in native code gave up, on its input or by a fault of its own."""


def is_panic(error: BaseException | None) -> bool:
    """Whether a library written in Rust panicked: each has a class of its own for that, which it does not export."""
    return type(error).__name__ == "PanicException"


class PanicGuard(AbstractContextManager[Any], ContextDecorator):
    """Around calls of libraries written in Rust: a panic, which is no Exception, becomes a NativePanicError."""

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if is_panic(error):
            raise NativePanicError(str(error)) from error


NO_PANICS = PanicGuard()


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a message about a name that there is not: the most similar one, if any is similar."""
    return "".join(f"; did you mean {close}?" for close in get_close_matches(name, known, 1, 0.7))
