"""The web page at /: what a browser gets, what it may do with it, and that it loads nothing from other servers."""

import base64
import hashlib
import re

import pytest

from helpers.serving import Serving
from minisgl.server.app import PAGE, page_headers

HTML = PAGE.read_text(encoding="utf-8")
POLICY = page_headers(PAGE.read_text("utf-8"))["Content-Security-Policy"]
KEY = {"Authorization": "Bearer one"}
SCRIPT = "".join(re.findall(r"<script>(.*?)</script>", HTML, re.DOTALL))


@pytest.mark.serving(api_key=("one",))
async def test_the_page_needs_no_key_and_what_it_asks_for_does(server: Serving) -> None:
    page = await server.http.get("/")
    assert (page.status_code, page.text) == (200, HTML)
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert page.headers["x-content-type-options"] == "nosniff"
    assert page.headers["content-security-policy"] == POLICY
    assert (await server.http.head("/")).status_code == 200
    assert (await server.http.post("/")).status_code == 405
    for path in re.findall(r'fetch\("([^"]+)"', SCRIPT):
        assert (await server.http.get(f"/{path}")).status_code == 401
    assert "/" not in (await server.http.get("/openapi.json", headers=KEY)).json()["paths"]


async def test_what_the_page_asks_for_is_there(server: Serving) -> None:
    paths = re.findall(r'fetch\("([^"]+)"', SCRIPT)
    assert sorted(paths) == ["v1/chat/completions", "v1/models"]
    assert (await server.http.get("/v1/models")).json()["data"][0]["id"]
    server.speak("hello there")
    body = {"messages": [{"role": "user", "content": "hi"}], "stream": True, "stream_options": {"include_usage": True}}
    text = (await server.http.post("/v1/chat/completions", json=body)).text
    lines = [line for line in text.splitlines() if line]
    assert all(line.startswith("data: ") for line in lines)  # all that its reader of events knows
    assert '"completion_tokens"' in lines[-2]
    assert lines[-1] == "data: [DONE]"


@pytest.mark.parametrize("tag", ["style", "script"])
def test_a_browser_runs_what_is_in_the_page_and_nothing_else(tag: str) -> None:
    (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", HTML, re.DOTALL)
    source = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    rules = dict(rule.strip().split(" ", 1) for rule in POLICY.split(";"))
    assert rules[f"{tag}-src"] == f"'sha256-{source}'"
    assert rules["default-src"] == "'none'"
    assert not re.search(r"\son\w+=|\sstyle=", HTML.replace(text, ""))  # the policy would keep them from working


def test_nothing_comes_from_elsewhere_and_text_never_becomes_markup() -> None:
    assert re.findall(r"https?://|//[a-z]+\.", HTML) == []
    assert re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(", SCRIPT) == []


def test_the_script_finds_every_element_it_looks_for() -> None:
    ids = set(re.findall(r'\sid="(\w+)"', HTML))
    fields = re.search(r"for \(const name of \[([^\]]+)\]", SCRIPT)
    assert fields is not None
    wanted = {*re.findall(r'find\("(\w+)"\)', SCRIPT), *re.findall(r'"(\w+)"', fields[1])}
    assert len(wanted) > 10
    assert wanted <= ids
