"""OpenAI's other endpoints, and those of other servers, refused by name."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from minisgl.errors import InvalidRequestError

UNSUPPORTED = (
    *("embeddings", "moderations", "responses", "files", "batches", "uploads", "realtime", "rerank", "score"),
    *("audio", "images", "videos", "fine_tuning", "assistants", "threads", "vector_stores", "evals", "containers"),
    *("conversations", "messages", "engines", "edits", "organization", "skills"),
)
"""Beneath /v1."""
UNSUPPORTED_OUTSIDE = ("embeddings", "rerank", "score", "pooling", "classify", "encode")


class UnsupportedEndpointError(InvalidRequestError):
    """An endpoint that is known elsewhere and not built here."""

    status = 404
    code = "unsupported_endpoint"


def add_unsupported(router: APIRouter) -> None:
    """Answer all of them with 404 and a sentence."""

    async def refuse(request: Request) -> Response:
        raise UnsupportedEndpointError(f"{request.url.path} is not supported by this server")

    methods = ["GET", "POST", "PUT", "PATCH", "DELETE"]
    bases = [f"/v1/{name}" for name in UNSUPPORTED] + [f"/{name}" for name in UNSUPPORTED_OUTSIDE]
    for base in bases:
        for path in (base, base + "/{rest:path}"):
            router.add_api_route(path, refuse, methods=methods, include_in_schema=False)
