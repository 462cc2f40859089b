"""The web page at /: a conversation with the model, in one file without anything from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

from fastapi import APIRouter
from starlette.responses import HTMLResponse, Response

PAGE = Path(__file__).with_name("page.html")


def policy(html: str) -> str:
    """What a browser may do with the page: its own style and script, and requests to this server (W3C, CSP 3)."""
    allowed = {tag: digest(re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)) for tag in ("style", "script")}
    return (
        f"default-src 'none'; style-src {allowed['style']}; script-src {allowed['script']}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def digest(texts: list[str]) -> str:
    """Sources of a policy that allow these texts and no others."""
    return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in texts)


def make_page_router() -> APIRouter:
    """The page, which is not part of the API."""
    router = APIRouter()
    html = PAGE.read_text(encoding="utf-8")
    headers = {
        "Content-Security-Policy": policy(html),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }

    @router.get("/", include_in_schema=False)
    async def page() -> Response:
        """The same for everybody: what it shows it asks the API for."""
        return HTMLResponse(html, headers=headers)

    return router
