"""Attacks on a server of the bundled model: what it holds, and in figures that are printed, what other clients notice.

`BEFORE` are the figures of the program before it had these bounds, on two cores. The attackers run on the same cores,
where nothing else should.
"""

import asyncio
import contextlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

import httpx
import pytest

from helpers.processes import MINISGL, environment, server
from server.test_soak import resident

BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 4, "stream": True}
CALM_SECONDS, ATTACK_SECONDS = 20.0, 30.0
ASKED = 200  # requests beside idle connections
BEFORE = "before: TTFT p50 9052, p99 15271 ms, the first one after the attack 76 s; lag p99 7157 ms; RSS 4977 MiB"
BEFORE_CONNECTIONS = "before: 1 API process, 1100 connections: 0 answers in 10 s, 3657823 bytes/s of log"


def percentile(times: Sequence[float], share: float) -> float:
    return sorted(times)[min(len(times) - 1, int(len(times) * share))]


async def first_tokens(http: httpx.AsyncClient, until: float, times: list[float]) -> None:
    """One short chat after the other; the time of each to its first event (s)."""
    while time.monotonic() < until:
        start = time.monotonic()
        async with http.stream("POST", "/v1/chat/completions", json=BODY) as answer:
            lines = answer.aiter_lines()
            await anext(lines)
            times.append(time.monotonic() - start)
            assert answer.status_code == 200
            async for _ in lines:
                pass


async def lags(http: httpx.AsyncClient, until: float, times: list[float]) -> None:
    """How long the event loop takes for next to nothing (s)."""
    while time.monotonic() < until:
        start = time.monotonic()
        await http.get("/version")
        times.append(time.monotonic() - start)
        await asyncio.sleep(0.02)


async def watch(url: str, pid: int, seconds: float) -> tuple[list[float], list[float], int]:
    """Times to the first token, lags, and the most memory of the API process in bytes."""
    ttft: list[float] = []
    lag: list[float] = []
    until, most = time.monotonic() + seconds, 0
    async with httpx.AsyncClient(base_url=url, timeout=120) as http:
        both = asyncio.gather(first_tokens(http, until, ttft), lags(http, until, lag))
        while not both.done():
            most = max(most, resident(pid))
            await asyncio.sleep(0.02)
        await both
    return ttft, lag, most


def report(name: str, ttft: Sequence[float], lag: Sequence[float], most: int) -> str:
    return (
        f"{name}: {len(ttft)} chats, TTFT p50 {percentile(ttft, 0.5) * 1e3:.0f}, p99 {percentile(ttft, 0.99) * 1e3:.0f}"
        f" ms; lag p99 {percentile(lag, 0.99) * 1e3:.0f}, most {max(lag) * 1e3:.0f} ms; RSS {most / 2**20:.0f} MiB"
    )


@pytest.mark.soak
@pytest.mark.timeout(600)
async def test_sixteen_clients_with_huge_bodies_disturb_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOG_LEVEL", "WARNING")
    with server() as (process, url):
        await watch(url, process.pid, 2.0)
        calm = await watch(url, process.pid, CALM_SECONDS)
        port = url.rpartition(":")[2]
        command = [sys.executable, "-m", "helpers.attackers", port, str(ATTACK_SECONDS)]
        with Popen(command, stdout=PIPE, env=environment(), text=True) as attackers:
            attacked = await watch(url, process.pid, ATTACK_SECONDS)
            outcomes, _ = attackers.communicate(timeout=60)
        after = await watch(url, process.pid, 2.0)
        print(f"\n{BEFORE}\n{report('calm', *calm)}\n{report('attacked', *attacked)}\n{report('after', *after)}")
        print(json.dumps(json.loads(outcomes), indent=1))
    assert attacked[2] <= 2**30


@pytest.mark.soak
@pytest.mark.timeout(300)
@pytest.mark.parametrize("workers", [1, 2])
async def test_more_idle_connections_than_descriptors_stop_nobody(workers: int, tmp_path: Path) -> None:
    log = tmp_path / "log"
    script = f'ulimit -n 1024; exec "$0" "$@" 2>{log}'
    command = ("bash", "-c", script, *MINISGL)
    with server("--api-workers", str(workers), command=command) as (_, url):
        host, port = url.removeprefix("http://").split(":")
        idle: list[asyncio.StreamWriter] = []
        for _ in range(1100 * workers):
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(1):
                    idle.append((await asyncio.open_connection(host, int(port)))[1])
        before, answered, slowest = log.stat().st_size, 0, 0.0
        for _ in range(ASKED):
            start = time.monotonic()
            with contextlib.suppress(httpx.TransportError):
                async with httpx.AsyncClient(base_url=url, timeout=5) as http:
                    answered += (await http.get("/health")).status_code == 200
            slowest = max(slowest, time.monotonic() - start)
        logged = log.stat().st_size - before
        lines = [line for line in log.read_text().splitlines() if "more than" in line or "Traceback" in line]
        print(f"\n{BEFORE_CONNECTIONS}\n{workers} API processes, {len(idle)} connections", end=": ")
        print(f"{answered} answers, the slowest {slowest * 1e3:.0f} ms; {logged} bytes of log", end="; ")
        print(f"{len(lines)} lines about it: {lines[:2]}")
        for writer in idle:
            writer.transport.abort()
        assert answered == ASKED
        assert 1 <= len(lines) <= workers
        assert logged < 200 * ASKED  # a line of the access log each
