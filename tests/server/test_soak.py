"""64 clients for minutes on the bundled model, with mixed requests and aborts (`make test-soak`).

SOAK_SECONDS says how long, 120 by default. Nothing may go unanswered, no page may leak, and after the first minute the
memory of both processes may grow by 2 % at most.
"""

import asyncio
import json
import os
import random
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from helpers.processes import children, server

CLIENTS = 64
WARM_SECONDS, SAMPLE_SECONDS = 60.0, 2.0


def resident(pid: int) -> int:
    """Bytes of memory that a process holds."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def growth(sizes: Sequence[int]) -> float:
    """By how much the largest of the last quarter exceeds the largest of the first."""
    some = max(1, len(sizes) // 4)
    return max(sizes[-some:]) / max(sizes[:some]) - 1


def make_request(rng: random.Random) -> tuple[str, dict[str, Any]]:
    """A path and a body: chats and completions, long and short, greedy and not, some of them wrong."""
    sampling: dict[str, Any] = rng.choice(
        ({"temperature": 0}, {"temperature": 0.8, "top_p": 0.9}, {"top_k": 20, "seed": rng.randrange(100)})
    )
    shared = "You are a helpful assistant who knows many stories. " * rng.choice((1, 4))
    text = shared + " ".join(rng.choices(("sea", "sky", "tree", "stone", "river", "cloud"), k=rng.randint(1, 60)))
    limit = rng.choice((1, 4, 16, 48))
    stream = rng.random() < 0.6
    if rng.random() < 0.05:
        return "/v1/completions", {"prompt": text, "max_tokens": -1}
    if rng.random() < 0.5:
        messages = [{"role": "system", "content": shared}, {"role": "user", "content": text}]
        return "/v1/chat/completions", {"messages": messages, "max_tokens": limit, "stream": stream, **sampling}
    prompt = [text, text + " and more"] if rng.random() < 0.2 else text
    body = {"prompt": prompt, "max_tokens": limit, "stream": stream, "stop": rng.choice((None, ["the"])), **sampling}
    return "/v1/completions", body


async def client(http: httpx.AsyncClient, rng: random.Random, until: float, outcomes: Counter[str]) -> None:
    """Ask for one answer after the other; sometimes leave in the middle of one."""
    while time.monotonic() < until:
        path, body = make_request(rng)
        leave_after = rng.randint(0, 10) if rng.random() < 0.2 else None
        status = 400 if body["max_tokens"] < 0 else 200
        events: list[str] = []
        try:
            async with (
                asyncio.timeout(None if leave_after is None or body.get("stream") else leave_after / 20),
                http.stream("POST", path, json=body) as answer,
            ):
                async for line in answer.aiter_lines():
                    events += [line] if line else []
                    if leave_after is not None and len(events) > leave_after:
                        raise TimeoutError
        except TimeoutError:
            outcomes["left"] += 1
            continue
        whole = not body.get("stream") or status == 400
        whole = whole or (events[-1] == "data: [DONE]" and "error" not in json.loads(events[-2][6:]))
        outcomes["good" if answer.status_code == status and whole else f"bad {answer.status_code} {events[-2:]}"] += 1


@pytest.mark.soak
@pytest.mark.timeout(3600)
async def test_minutes_of_mixed_load_leak_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = float(os.environ.get("SOAK_SECONDS", "120"))
    monkeypatch.setenv("LOG_LEVEL", "WARNING")
    outcomes, memory = Counter[str](), list[list[int]]()
    # The memory that torch keeps for each length of a batch is taken early when there are few lengths.
    flags = ("--max-running-requests", "32", "--max-prefill-length", "64")
    with server(*flags) as (process, url):
        pids, until = [process.pid, *children(process.pid)], time.monotonic() + seconds
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as http:
            clients = [asyncio.create_task(client(http, random.Random(i), until, outcomes)) for i in range(CLIENTS)]
            while time.monotonic() < until:
                await asyncio.sleep(SAMPLE_SECONDS)
                memory.append([resident(pid) for pid in pids])
                if random.random() < 0.1:
                    await http.post("/flush_cache")
            await asyncio.gather(*clients)
            async with asyncio.timeout(30):
                stats = (await http.get("/server_info")).json()["stats"]
                while stats["running"] or stats["waiting"]:
                    await asyncio.sleep(0.1)
                    stats = (await http.get("/server_info")).json()["stats"]
            await http.post("/flush_cache")
            info = (await http.get("/server_info")).json()
    print(f"\n{dict(outcomes)}; {info['stats']}")
    assert {what for what in outcomes if what not in ("good", "left")} == set()
    assert outcomes["good"] > CLIENTS
    assert info["stats"]["pages_free"] == info["stats"]["pages_total"]
    assert info["queued"] == {"requests": 0, "tokens": 0}
    warm = int(min(WARM_SECONDS, seconds / 2) / SAMPLE_SECONDS)
    for name, sizes in zip(("API", "engine"), zip(*memory, strict=True), strict=True):
        print(f"{name}: growth {growth(sizes[warm:]):.2%}; MiB every 10 s:", [size // 2**20 for size in sizes[::5]])
    assert max(growth(sizes[warm:]) for sizes in zip(*memory, strict=True)) < 0.02
