"""The OpenAPI document against the server, by schemathesis: requests made up from it, right ones and wrong ones.

SCHEMATHESIS_CASES says how many for each endpoint, 500 for the whole test; by default fewer, which takes a minute.
"""

import os
from pathlib import Path

import httpx
import pytest

from helpers.server_process import server
from helpers.templates import QWEN_TOOLS
from helpers.third_party import CLIENT_TESTS, Clients

CONFORMANCE = ("status_code", "content_type", "response_headers", "response_schema")
CHECKS = ("not_a_server_error", *(f"{what}_conformance" for what in CONFORMANCE), "negative_data_rejection")


@pytest.mark.clients
@pytest.mark.timeout(1800)
def test_the_openapi_document_is_true(clients: Clients, tmp_path: Path) -> None:
    cases = os.environ.get("SCHEMATHESIS_CASES", "100")
    stub = {"STUB_DELAY": "0", "STUB_CONTEXT": "192", "LOG_LEVEL": "WARNING"}
    with server(tmp_path / "model", tmp_path / "tmp", environ=stub, template=QWEN_TOOLS) as (_, url):
        clients.run(
            "schemathesis",
            *("run", f"{url}/openapi.json", "--no-color", "--checks", ",".join(CHECKS), "--max-examples", cases),
            *("--phases", "examples,coverage,fuzzing", "--continue-on-failure", "--generation-database", "none"),
            *("--request-timeout", "60"),
            environ={"SCHEMATHESIS_HOOKS": "schemathesis_hooks", "PYTHONPATH": str(CLIENT_TESTS)},
            seconds=1700,
        )
        assert httpx.get(f"{url}/health").json() == {"status": "ok", "running": 0, "waiting": 0}
        assert httpx.get(f"{url}/server_info").json()["queued"] == {"requests": 0, "tokens": 0}
