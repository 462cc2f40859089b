"""Mini-SGLang: an OpenAI-compatible server, and an LLM inference engine that reads in an afternoon."""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from minisgl.core.types import FinishReason, SamplingParams

if TYPE_CHECKING:
    from minisgl.llm import LLM

try:
    __version__ = version("minisgl")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0+unknown"

__all__ = ["LLM", "FinishReason", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    """Import `LLM`, and torch with it, only when it is asked for."""
    if name == "LLM":
        from minisgl.llm import LLM

        return LLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
