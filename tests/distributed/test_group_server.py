"""A server over several ranks: one that dies mid-stream, a server that dies, and ranks that torchrun starts."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import openai
import pytest

from helpers.processes import BOUND, children, descendants, free_port, server, wait_until_gone
from helpers.tiny_models import save_model


def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def long_stream(url: str) -> openai.Stream[openai.types.Completion]:
    model = client(url).models.list().data[0].id
    stream = client(url).completions.create(
        model=model, prompt=[2, 3, 4], max_tokens=3000, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    return stream


@pytest.mark.parametrize("count", [3, 0])
def test_a_killed_rank_ends_every_stream_and_the_server(tmp_path: Path, count: int) -> None:
    save_model(tmp_path)
    with server("--model", str(tmp_path), "--tp", "2") as (process, url):
        everyone = descendants(process.pid)
        (engine,) = children(process.pid)
        (rank,) = children(engine)
        streams = [long_stream(url) for _ in range(count)]
        started = time.monotonic()
        os.kill(rank, signal.SIGKILL)
        for stream in streams:
            with pytest.raises(openai.APIError):
                list(stream)
        assert process.wait(BOUND) != 0
        assert time.monotonic() - started < BOUND
        wait_until_gone(everyone)


def test_every_rank_ends_with_a_killed_server(tmp_path: Path) -> None:
    save_model(tmp_path)
    with server("--model", str(tmp_path), "--tp", "2") as (process, _):
        everyone = descendants(process.pid)
        assert len(everyone) == 2
        process.kill()
        process.wait()
        wait_until_gone(everyone)


def answer(url: str) -> str:
    model = client(url).models.list().data[0].id
    said = client(url).completions.create(model=model, prompt=[5, 6, 7], max_tokens=24, seed=3, temperature=0.9)
    return said.choices[0].text


def test_ranks_that_torchrun_starts_answer_as_one_does(tmp_path: Path) -> None:
    save_model(tmp_path, "qwen3")
    with server("--model", str(tmp_path)) as (_, url):
        alone = answer(url)
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "minisgl")
    with server("--model", str(tmp_path), "--tp", "2", command=torchrun) as (process, url):
        everyone = descendants(process.pid)
        assert answer(url) == alone
    wait_until_gone(everyone)


def test_two_torchruns_with_a_rank_each_answer_as_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on two hosts; the ranks know of each other by address alone."""
    save_model(tmp_path, "qwen3")
    with server("--model", str(tmp_path)) as (_, url):
        alone = answer(url)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    program, port = (sys.executable, "-m", "torch.distributed.run"), str(free_port())

    def torchrun(host: int) -> list[str]:
        where = ["--master-addr", "127.0.0.1", "--master-port", port]
        return [*program, "--nnodes", "2", "--node-rank", str(host), "--nproc-per-node", "1", *where, "-m", "minisgl"]

    flags = ("--model", str(tmp_path), "--tp", "2", "--num-pages", "256")
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([*torchrun(1), *flags], **quiet) as second:  # type: ignore[call-overload]
        with server(*flags, command=torchrun(0)) as (first, url):
            everyone = [*descendants(first.pid), *descendants(second.pid)]
            assert len(everyone) >= 3
            assert answer(url) == alone
        wait_until_gone([*everyone, second.pid])


def test_an_llm_on_ranks_of_torchrun_ends_them_without_a_complaint(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from minisgl import LLM, SamplingParams\n"
        f"with LLM({str(save_model(tmp_path / 'model'))!r}, tp=4, num_pages=64, progress=False) as llm:\n"
        "    print(llm.generate([[2, 3]], SamplingParams(max_tokens=4), progress=False)[0].finish_reason)\n"
    )
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "4", str(script))
    done = subprocess.run(torchrun, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "length\n"), done.stderr
    assert "Traceback" not in done.stderr


def test_torchrun_with_another_number_of_ranks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "a", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    done = subprocess.run(
        [sys.executable, "-m", "minisgl", "--tp", "2"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert "--tp 2: WORLD_SIZE says that there are 4 ranks; give --tp 4" in done.stderr
