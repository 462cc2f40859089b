"""What an ambiguous grammar with many choices does to another stream on the bundled model, in figures.

Each token of such a text costs more than the one before, until its rows sit out. GRAMMAR_SOAK_CHOICES says how many
choices there are, 128 by default, and GRAMMAR_SOAK_SECONDS for how long.
"""

import asyncio
import itertools
import os
import statistics
import time
from typing import Any

import httpx
import pytest

from helpers.processes import server

AMBIGUOUS = 'start: start start | "a"'
CHOICES = int(os.environ.get("GRAMMAR_SOAK_CHOICES", "128"))
SECONDS = float(os.environ.get("GRAMMAR_SOAK_SECONDS", "120"))


async def gaps(http: httpx.AsyncClient, seconds: float) -> list[float]:
    """Seconds between the tokens of a stream."""
    body = {"prompt": "Once", "max_tokens": 4000, "min_tokens": 4000, "stream": True, "temperature": 0}
    times: list[float] = []
    async with http.stream("POST", "/v1/completions", json=body) as answer:
        async for line in answer.aiter_lines():
            times += [time.perf_counter()] if line else []
            if len(times) > 1 and times[-1] - times[0] > seconds:
                break
    return sorted(later - earlier for earlier, later in itertools.pairwise(times))


async def beside(http: httpx.AsyncClient, seconds: float, **asked: Any) -> float:
    """The median gap of a stream in the last quarter of the time that another request runs; prints it."""
    body = {"prompt": "a", "n": CHOICES, "max_tokens": 400, "min_tokens": 400, **asked}
    other = asyncio.create_task(http.post("/v1/completions", json=body))
    await asyncio.sleep(seconds * 3 / 4)
    there = not other.done()
    found = await gaps(http, seconds / 4)
    median, worst = statistics.median(found), found[-1]
    print(f"{asked or 'no grammar'}: median {1e3 * median:.0f} ms, longest {1e3 * worst:.0f} ms, still there: {there}")
    other.cancel()
    await asyncio.gather(other, return_exceptions=True)
    await asyncio.sleep(1)
    return median


@pytest.mark.soak
@pytest.mark.timeout(900)
async def test_another_stream_goes_on_beside_a_dear_grammar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOG_LEVEL", "WARNING")
    with server("--num-pages", "3600") as (_, url):
        async with httpx.AsyncClient(base_url=url, timeout=600) as http:
            calm = statistics.median(await gaps(http, 5))
            print(f"\nalone: median {1e3 * calm:.0f} ms")
            plain = await beside(http, 16)
            dear = await beside(http, SECONDS, guided_grammar=AMBIGUOUS)
    assert dear <= 2 * calm, f"{1e3 * plain:.0f} ms beside a plain request"
