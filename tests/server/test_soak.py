"""64 clients for minutes on the bundled model, with mixed requests and aborts (`make test-soak`).

SOAK_SECONDS says how long, 120 by default. Nothing may go unanswered, no page may leak, and after the first minute the
memory of both processes may grow by 2 % at most.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from helpers.processes import children

CLIENTS = 64
WARM_SECONDS = 60.0


@contextmanager
def server(*flags: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The program as a user starts it."""
    command = [sys.executable, "-m", "minisgl", "--port", "0", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "LOG_LEVEL": "WARNING"})
    assert process.stdout is not None
    try:
        url = next(found[1] for line in process.stdout if (found := re.search(r"is ready.*(http://\S+)/v1", line)))
        yield process, url
    finally:
        process.send_signal(signal.SIGTERM)
        process.stdout.close()
        process.wait(60)


def resident(pid: int) -> int:
    """Bytes of memory that a process holds."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def growth(sizes: list[int]) -> float:
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
        if not body.get("stream"):
            try:
                async with asyncio.timeout(None if leave_after is None else leave_after / 20):
                    answer = await http.post(path, json=body)
            except TimeoutError:
                outcomes["left"] += 1
                continue
            good = answer.status_code == (400 if body["max_tokens"] < 0 else 200)
            outcomes["good" if good else f"bad {answer.status_code} {answer.text[:200]}"] += 1
            continue
        events: list[str] = []
        async with http.stream("POST", path, json=body) as answer:
            async for line in answer.aiter_lines():
                if line.startswith("data: "):
                    events.append(line)
                if leave_after is not None and len(events) > leave_after:
                    break
        if leave_after is not None and len(events) > leave_after:
            outcomes["left"] += 1
        elif answer.status_code == 400:
            outcomes["good" if body["max_tokens"] < 0 else "bad 400"] += 1
        else:
            whole = events[-1] == "data: [DONE]" and "error" not in json.loads(events[-2][6:])
            outcomes["good" if whole else f"bad {events[-2]}"] += 1


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_minutes_of_mixed_load_leak_nothing() -> None:
    seconds = float(os.environ.get("SOAK_SECONDS", "120"))
    flags = ("--num-pages", "256", "--max-running-requests", "32")

    async def main(process: subprocess.Popen[str], url: str) -> None:
        pids = [process.pid, *children(process.pid)]
        outcomes, memory = Counter[str](), list[tuple[float, list[int]]]()
        started = time.monotonic()
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as http:
            clients = [
                asyncio.create_task(client(http, random.Random(i), started + seconds, outcomes)) for i in range(CLIENTS)
            ]
            while time.monotonic() < started + seconds:
                await asyncio.sleep(2)
                memory.append((time.monotonic() - started, [resident(pid) for pid in pids]))
                if random.random() < 0.1:
                    await http.post("/flush_cache")
            await asyncio.gather(*clients)
            bad = {what: count for what, count in outcomes.items() if what not in ("good", "left")}
            assert not bad
            assert outcomes["good"] > CLIENTS
            async with asyncio.timeout(30):
                while True:
                    stats = (await http.get("/server_info")).json()["stats"]
                    if not stats["running"] and not stats["waiting"]:
                        break
                    await asyncio.sleep(0.1)
            await http.post("/flush_cache")
            stats = (await http.get("/server_info")).json()
            assert stats["stats"]["pages_free"] == stats["stats"]["pages_total"]
            assert stats["queued"] == {"requests": 0, "tokens": 0}
            print(f"\n{dict(outcomes)}; {stats['stats']}")
            grown = []
            for name, sizes in zip(("API", "engine"), zip(*(sizes for _, sizes in memory), strict=True), strict=True):
                warm = [
                    size for (at, _), size in zip(memory, sizes, strict=True) if at >= min(WARM_SECONDS, seconds / 2)
                ]
                grown.append(growth(warm))
                print(f"{name}: growth {grown[-1]:.2%}; MiB every 10 s:", [size // 2**20 for size in sizes[::5]])
            assert max(grown) < 0.02

    with server(*flags) as (process, url):
        asyncio.run(main(process, url))
