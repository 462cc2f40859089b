"""Tokenizer processes: they prepare what threads would, and one that dies takes only what it held with it."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from helpers.serving import CHAT_TEMPLATE
from helpers.tiny_tokenizers import write_tokenizer
from minisgl.core.types import ModelInfo
from minisgl.errors import InvalidRequestError, MinisglError, ModelError
from minisgl.server import tokenizer_pool
from minisgl.server.errors import OverloadedError, TokenizerDeadError
from minisgl.server.prepared import Converted, Kind, Prepared
from minisgl.server.tokenizer_messages import TokenizerSetup
from minisgl.server.tokenizer_pool import TokenizerPool
from minisgl.server.tokenizer_worker import TOKENIZER_COMMAND

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
TEMPLATE = CHAT_TEMPLATE + "{% if tools %}<tool_call>{{ tools | tojson }}</tool_call>{% endif %}<think></think>"
HI = [{"role": "user", "content": "hi there"}]
BODIES: tuple[tuple[Kind, dict[str, Any]], ...] = (
    ("chat", {"messages": HI, "seed": 1}),
    ("chat", {"messages": HI, "seed": 1, "n": 3, "stream": True, "stream_options": {"include_usage": True}}),
    ("chat", {"messages": HI, "seed": 1, "logprobs": True, "top_logprobs": 2, "logit_bias": {"7": -5}, "stop": ["x"]}),
    ("chat", {"messages": HI, "seed": 1, "tools": [TOOL], "parallel_tool_calls": False}),
    ("chat", {"messages": HI, "seed": 1, "tools": [TOOL], "tool_choice": "required"}),
    ("chat", {"messages": HI, "seed": 1, "response_format": {"type": "json_object"}}),
    ("completion", {"prompt": ["one", "two"], "seed": 2, "echo": True, "logprobs": 1, "best_of": 3}),
    ("completion", {"prompt": [5, 6, 7], "seed": 2, "echo": True, "max_tokens": 0, "priority": -4}),
    (
        "generate",
        {
            "text": ["one"],
            "sampling_params": {"sampling_seed": 3, "n": 2, "regex": "a+"},
            "return_logprob": True,
            "logprob_start_len": 1,
            "top_logprobs_num": 2,
            "return_text_in_logprobs": True,
        },
    ),
    ("tokenize", {"prompt": "hello world", "return_token_strs": True}),
    ("tokenize", {"messages": HI}),
    ("detokenize", {"tokens": [5, 6, 7]}),
)
BAD_BODIES: tuple[tuple[Kind, Any], ...] = (
    ("chat", {}),
    ("chat", []),
    ("chat", {"messages": HI, "model": "other"}),
    ("chat", {"messages": HI, "audio": {}}),
    ("chat", {"messages": HI, "max_completion_tokens": 10**6}),
    ("chat", {"messages": HI, "temperature": -1}),
    ("completion", {"prompt": "a" * 5000}),
    ("completion", {"prompt": "\ud800"}),
    ("generate", {"text": "x", "sampling_params": {"max_new_tokens": 0}}),
    ("detokenize", {"tokens": [10**6]}),
)


@pytest.fixture
def setup(tmp_path: Path) -> TokenizerSetup:
    """A small model's."""
    write_tokenizer(tmp_path, template=TEMPLATE)
    model = ModelInfo(name="m", vocab_size=512, max_seq_len=512, eos_token_ids=(1,))
    return TokenizerSetup(model=model, folder=str(tmp_path), standin=False, max_live=8)


def with_pool(setup: TokenizerSetup, size: int, check: Callable[[TokenizerPool], Awaitable[None]], **more: Any) -> None:
    """Run `check` with a pool, which is closed afterwards and leaves nothing."""

    @asynccontextmanager
    async def pool() -> AsyncIterator[TokenizerPool]:
        pool = await TokenizerPool.start(setup, size, **more)
        try:
            yield pool
        finally:
            pids = [worker.pid for worker in pool.workers]
            await pool.close()
            assert not any(Path(f"/proc/{pid}").exists() for pid in pids)

    async def main() -> None:
        async with asyncio.timeout(60), pool() as running:
            await check(running)

    asyncio.run(main())


async def until(condition: Callable[[], bool]) -> None:
    """Wait until something is so."""
    while not condition():
        await asyncio.sleep(0.01)


def shown(outcome: Prepared | Converted) -> str:
    """All of an outcome, without the ids, which are random."""
    return re.sub("[0-9a-f]{32}", "ID", msgspec.json.encode(outcome).decode())


def body_of(value: Any) -> bytes:
    """JSON, lone surrogates escaped."""
    return json.dumps(value).encode()


def test_processes_prepare_what_threads_do(setup: TokenizerSetup) -> None:
    here = setup.preparation()

    async def check(pool: TokenizerPool) -> None:
        for kind, value in BODIES:
            body = body_of(value)
            there = await pool.prepare(kind, body)
            assert shown(there) == shown(here.prepare(kind, body)), value
            assert type(there) is type(here.prepare(kind, body))
        for kind, value in BAD_BODIES:
            body = body_of(value)
            with pytest.raises(MinisglError) as expected:
                here.prepare(kind, body)
            with pytest.raises(InvalidRequestError) as found:
                await pool.prepare(kind, body)
            for part in ("status", "type", "code", "message", "param"):
                assert getattr(found.value, part) == getattr(expected.value, part), value

    with_pool(setup, 2, check)


def test_many_at_once_are_shared_and_each_gets_its_own(setup: TokenizerSetup) -> None:
    async def check(pool: TokenizerPool) -> None:
        bodies = [body_of({"prompt": [i + 1] * (i + 1), "priority": i}) for i in range(16)]
        outcomes = asyncio.gather(*(pool.prepare("completion", body) for body in bodies))
        await asyncio.sleep(0)
        assert [len(worker.held) for worker in pool.workers] == [4, 4]
        for i, outcome in enumerate(await outcomes):
            assert isinstance(outcome, Prepared)
            (request,) = outcome.requests
            assert (request.prompt.tolist(), request.priority) == ([i + 1] * (i + 1), i)

    with_pool(setup, 2, check)


def test_what_a_killed_process_held_fails_and_the_rest_goes_on(setup: TokenizerSetup) -> None:
    async def check(pool: TokenizerPool) -> None:
        victim = pool.workers[0]
        os.kill(victim.pid, signal.SIGSTOP)
        jobs = [asyncio.create_task(pool.prepare("tokenize", body_of({"prompt": "hello"}))) for _ in range(12)]
        await until(lambda: sum(job.done() for job in jobs) == 8)  # none waits behind the stopped one
        assert len(victim.held) == 4
        os.kill(victim.pid, signal.SIGKILL)
        outcomes = await asyncio.gather(*jobs, return_exceptions=True)
        failed = [outcome for outcome in outcomes if isinstance(outcome, TokenizerDeadError)]
        assert (len(failed), failed[0].status, failed[0].code) == (4, 503, "tokenizer_unavailable")
        assert sum(isinstance(outcome, Converted) for outcome in outcomes) == 8
        pool.check()
        await pool.prepare("tokenize", body_of({"prompt": "hello"}))
        await until(lambda: len(pool.workers) == 2)
        assert victim not in pool.workers

    with_pool(setup, 2, check)


def test_no_more_wait_than_may_be_live(setup: TokenizerSetup) -> None:
    async def check(pool: TokenizerPool) -> None:
        (worker,) = pool.workers
        os.kill(worker.pid, signal.SIGSTOP)
        body = body_of({"prompt": "hello"})
        jobs = [asyncio.create_task(pool.prepare("tokenize", body)) for _ in range(4 + setup.max_live)]
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError, match="8 requests wait to be tokenised"):
            await pool.prepare("tokenize", body)
        os.kill(worker.pid, signal.SIGCONT)
        assert len(await asyncio.gather(*jobs)) == 12

    with_pool(setup, 1, check)


def test_a_process_that_goes_on_after_a_stop_loses_nothing(setup: TokenizerSetup) -> None:
    async def check(pool: TokenizerPool) -> None:
        (worker,) = pool.workers
        os.kill(worker.pid, signal.SIGSTOP)
        jobs = [asyncio.create_task(pool.prepare("tokenize", body_of({"prompt": "hello"}))) for _ in range(9)]
        jobs[1].cancel()
        jobs[7].cancel()
        await asyncio.sleep(0.2)
        os.kill(worker.pid, signal.SIGCONT)
        outcomes = await asyncio.gather(*jobs, return_exceptions=True)
        assert [isinstance(outcome, Converted) for outcome in outcomes] == [i not in (1, 7) for i in range(9)]
        assert worker.held == {}

    with_pool(setup, 1, check)


def test_closing_ends_a_process_that_does_not_react(setup: TokenizerSetup) -> None:
    async def check(pool: TokenizerPool) -> None:
        os.kill(pool.workers[0].pid, signal.SIGSTOP)
        jobs = [asyncio.create_task(pool.prepare("tokenize", body_of({"prompt": "hello"}))) for _ in range(6)]
        await asyncio.sleep(0)
        await pool.close()
        outcomes = await asyncio.gather(*jobs, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [TokenizerDeadError] * 6

    with_pool(setup, 1, check)


def test_with_no_process_left_requests_fail_and_the_next_process_serves(
    setup: TokenizerSetup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first restarts fail, for as long as a file is there."""
    monkeypatch.setattr(tokenizer_pool, "PATIENCE_SECONDS", 0.2)
    monkeypatch.setattr(tokenizer_pool, "FIRST_PAUSE", 0.05)
    hindrance = tmp_path / "hindrance"
    command = ["sh", "-c", f'test -e {hindrance} && exit 5; exec "$@"', "sh", *TOKENIZER_COMMAND]

    async def check(pool: TokenizerPool) -> None:
        hindrance.touch()
        os.kill(pool.workers[0].pid, signal.SIGKILL)
        await until(lambda: not pool.workers)
        with pytest.raises(TokenizerDeadError):
            pool.check()
        with pytest.raises(TokenizerDeadError, match="there is no tokenizer process"):
            await pool.prepare("tokenize", body_of({"prompt": "hello"}))
        hindrance.unlink()
        await until(lambda: bool(pool.workers))
        assert isinstance(await pool.prepare("tokenize", body_of({"prompt": "hello"})), Converted)

    with_pool(setup, 1, check, command=command)


def test_a_process_that_cannot_start_says_why(setup: TokenizerSetup, tmp_path: Path) -> None:
    async def start(setup: TokenizerSetup, *command: str) -> None:
        await TokenizerPool.start(setup, 2, command or TOKENIZER_COMMAND)

    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ModelError, match="holds no tokenizer"):
        asyncio.run(start(msgspec.structs.replace(setup, folder=str(empty))))
    with pytest.raises(ModelError, match="ended with exit status 3 before it was ready"):
        asyncio.run(start(setup, "sh", "-c", "exit 3"))
    with pytest.raises(ModelError, match="cannot be started"):
        asyncio.run(start(setup, "/no/such/program"))
