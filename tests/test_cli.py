"""The command line: every published command and every spelling parses to what it says; errors are one line."""

import dataclasses
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from minisgl import __version__, cli
from minisgl.config import Config, Machine, flags_of, resolve
from minisgl.errors import ModelError

QWEN, QWEN_32B = "Qwen/Qwen3-0.6B", "Qwen/Qwen3-32B"
LLAMA_70B = "meta-llama/Llama-3.1-70B-Instruct"

# Published commands, and the fields that each sets; the others keep their defaults.
# fmt: off
COMMANDS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("python -m minisgl", {}),
    ('python -m minisgl --model "Qwen/Qwen3-0.6B"', {"model": QWEN}),
    ('python -m minisgl --model "Qwen/Qwen3-0.6B" --shell', {"model": QWEN, "shell": True}),
    ('python -m minisgl --model "meta-llama/Llama-3.1-70B-Instruct" --tp 4 --port 30000',
     {"model": LLAMA_70B, "tp": 4, "port": 30000}),
    ('python -m minisgl --model "meta-llama/Llama-3.1-70B-Instruct" --tp 4', {"model": LLAMA_70B, "tp": 4}),
    ('python -m minisgl --model "Qwen/Qwen3-32B" --tp 4 --cache naive', {"model": QWEN_32B, "tp": 4, "cache": "naive"}),
    ('MINISGL_DISABLE_OVERLAP_SCHEDULING=1 python -m minisgl --model "Qwen/Qwen3-0.6B"',
     {"model": QWEN, "overlap": False}),
    ('LOG_LEVEL=DEBUG python -m minisgl --model "Qwen/Qwen3-0.6B"', {"model": QWEN, "log_level": "DEBUG"}),
    ('nsys profile -o profile.qdrep python -m minisgl --model "Qwen/Qwen3-0.6B"', {"model": QWEN}),
    ("""python -m minisgl --model "Qwen/Qwen3-32B" --tp 4 --cuda-graph-max-bs 256 --max-prefill-length 16384 \\
            --attn fa,fi --memory-ratio 0.9 --cache-type radix""",
     {"model": QWEN_32B, "tp": 4, "cuda_graph_max_bs": 256, "max_prefill_length": 16384, "attn": "fa,fi",
      "memory_ratio": 0.9}),
    ("""python -m minisgl --model "Qwen/Qwen3-0.6B" --memory-ratio 0.7 --cuda-graph-max-bs 64 \\
            --max-prefill-length 4096 --page-size 16""",
     {"model": QWEN, "memory_ratio": 0.7, "cuda_graph_max_bs": 64, "max_prefill_length": 4096, "page_size": 16}),
    ("""python -m minisgl --model "Qwen/Qwen3-14B" --max-seq-len-override 32768 --max-prefill-length 16384 \\
            --page-size 256 --memory-ratio 0.95 --cache-type radix""",
     {"model": "Qwen/Qwen3-14B", "max_seq_len_override": 32768, "max_prefill_length": 16384, "page_size": 256,
      "memory_ratio": 0.95}),
    ("""MINISGL_DISABLE_OVERLAP_SCHEDULING=1 LOG_LEVEL=DEBUG \\
            python -m minisgl --model "Qwen/Qwen3-0.6B" --cuda-graph-max-bs 0 --shell""",
     {"model": QWEN, "overlap": False, "log_level": "DEBUG", "cuda_graph_max_bs": 0, "shell": True}),
)
# fmt: on

# Published flags with their values, and every other spelling.
SPELLINGS: tuple[tuple[str, dict[str, Any]], ...] = (
    *((f"{flag} a/b", {"model": "a/b"}) for flag in ("--model", "--model-path")),
    ("--model-source huggingface", {}),
    ("--model-source modelscope", {"model_source": "modelscope"}),
    *((f"{flag} 2", {"tp": 2}) for flag in ("--tp", "--tp-size", "--tensor-parallel-size")),
    ("--host 0.0.0.0", {"host": "0.0.0.0"}),
    ("--port 8000", {"port": 8000}),
    ("--api-workers 3", {"api_workers": 3}),
    *((flag, {"shell": True}) for flag in ("--shell", "--shell-mode", "chat", "chat --shell-mode")),
    *((f"{flag} 8192", {"max_prefill_length": 8192}) for flag in ("--max-prefill-length", "--max-extend-length")),
    *((line, {"page_size": 256}) for line in ("--page-size 256", "--page-size=256")),
    ("--num-pages 10000", {"num_pages": 10000}),
    ("--memory-ratio 0.85", {"memory_ratio": 0.85}),
    (
        "--trace-steps t.json --record r.jsonl --debug-endpoints",
        {"trace_steps": "t.json", "record": "r.jsonl", "debug_endpoints": True},
    ),
    ("--attn auto", {}),
    *((f"--attn {attn}", {"attn": attn}) for attn in ("fa", "fa,fi", "trtllm")),
    *((f"{flag} triton,torch", {"attn": "triton,torch"}) for flag in ("--attn", "--attention-backend")),
    ("--cuda-graph-max-bs 256", {"cuda_graph_max_bs": 256}),
    *((f"{flag} 0", {"cuda_graph_max_bs": 0}) for flag in ("--cuda-graph-max-bs", "--graph")),
    ("--launch-ahead one-step", {"launch_ahead": "one-step"}),
    ("--piecewise-cuda-graph-max-tokens 512", {"piecewise_cuda_graph_max_tokens": 512}),
    ("--cache-type radix", {}),
    *((f"{flag} naive", {"cache": "naive"}) for flag in ("--cache", "--cache-type")),
    ("--max-running-requests 128", {"max_running_requests": 128}),
    ("--max-seq-len-override 8192", {"max_seq_len_override": 8192}),
    ("--dtype auto", {}),
    *((f"--dtype {dtype}", {"dtype": dtype}) for dtype in ("bfloat16", "float16", "float32")),
    *((f"--quantization {scheme}", {"quantization": scheme}) for scheme in ("fp8", "int8")),
    ("--kv-cache-dtype fp8_e4m3", {"kv_cache_dtype": "fp8_e4m3"}),
    ("--disable-pynccl", {"disable_pynccl": True}),
    ("--all-reduce fused", {"all_reduce": "fused"}),
    *((flag, {"dummy_weight": True}) for flag in ("--dummy-weight", "--dummy-weights")),
    ("--device cpu", {"device": "cpu"}),
    *((f"{flag} lpm:patience=5", {"schedule_policy": "lpm:patience=5"}) for flag in ("--schedule-policy", "--policy")),
    ("--policy my/own.py:Policy", {"schedule_policy": "my/own.py:Policy"}),
    ("--eviction slru", {"eviction": "slru"}),
    *((f"--served-model-name {names}", {"served_model_name": ("a", "b")}) for names in ("a b", "a,b")),
    ("--api-key one,two three", {"api_key": ("one", "two", "three")}),
    ("--allow-public", {"allow_public": True}),
    ("--allowed-hosts a.example,*.b.example", {"allowed_hosts": ("a.example", "*.b.example")}),
    ("--client-priorities 0:9", {"client_priorities": ("0:9",)}),
    ("--api-key a b --client-priorities 0:9 2=-5:5", {"api_key": ("a", "b"), "client_priorities": ("0:9", "2=-5:5")}),
    ("--client-priorities=-5:9", {"client_priorities": ("-5:9",)}),
    ("--cors-origins https://a.example *", {"cors_origins": ("https://a.example", "*")}),
    ("--ssl-certfile c.pem --ssl-keyfile k.pem", {"ssl_certfile": "c.pem", "ssl_keyfile": "k.pem"}),
    ("--max-queued-requests 7", {"max_queued_requests": 7}),
    ("--max-queued-tokens 9000", {"max_queued_tokens": 9000}),
    ("--request-timeout 1.5", {"request_timeout": 1.5}),
    ("--write-timeout 5", {"write_timeout": 5.0}),
    ("--max-body-size 1048576", {"max_body_size": 1048576}),
    ("--drain-timeout 0", {"drain_timeout": 0.0}),
    ("--metrics-prefix vllm", {"metrics_prefix": "vllm"}),
    ("--kv-events-config {}", {"kv_events_config": "{}"}),
    ("a/b", {"model": "a/b"}),
    ("gpt2 --port 1", {"model": "gpt2", "port": 1}),
    ("--port 1 a/b", {"model": "a/b", "port": 1}),
    ("a/b --shell", {"model": "a/b", "shell": True}),
    ("serve serve", {"model": "serve"}),
    ("serve", {}),
    ("serve a/b --tp 2", {"model": "a/b", "tp": 2}),
    ("serve --model a/b", {"model": "a/b"}),
    ("serve --port 1 a/b", {"model": "a/b", "port": 1}),
    ("chat a/b", {"model": "a/b", "shell": True}),
)

BAD_LINES = (
    ("--no-such-flag", "unrecognized arguments: --no-such-flag"),
    ("--page 16", "unrecognized arguments: --page; did you mean --page-size?"),
    ("--port 80 chat", "the command comes first: chat"),
    ("sevre a/b", "no command sevre; did you mean serve?"),
    ("chatt", "no command chatt; did you mean chat?"),
    ("benhc offline", "no command benhc; did you mean bench?"),
    ("simulat --rate 1", "no command simulat; did you mean simulate?"),
    ("a/b c", "unrecognized arguments: c"),
    ("a/b --model c", "the model is given twice: a/b and --model c"),
    ("serve --pagesize 16", "unrecognized arguments: --pagesize; did you mean --page-size?"),
    ("--gpu 1", "unrecognized arguments: --gpu ("),
    ("serve a b", "unrecognized arguments: b"),
    ("serve --page 16", "unrecognized arguments: --page; did you mean --page-size? ("),
    ("chat a --model b", "the model is given twice: a and --model b"),
    ("serve --shell", "--shell chats: write minisgl chat"),
    ("chat --page-size 0", "--page-size must be between 1 and 256, got 0"),
    ("--page-size", "expected one argument"),
    ("--page-size x", "invalid int value: 'x'"),
    ("--port 65536", "--port must be between 0 and 65535, got 65536"),
    ("--memory-ratio nan", "--memory-ratio must be in (0, 1], got nan"),
    ("--dtype int8", "invalid choice: 'int8'"),
    ("--quantization int4", "invalid choice: 'int4'"),
    ("--kv-cache-dtype int8", "invalid choice: 'int8'"),
    ("--cache lru", "invalid choice: 'lru'"),
    ("--attn fa,fi,fa", "--attn must be auto, one of fa, fi, trtllm, triton, torch, or two"),
    ("--tp 0", "--tp must be at least 1, got 0"),
    ("--api-key ,", "argument --api-key: expected at least one value"),
    ("--api-key schlüssel", "--api-key must be made of printable ASCII"),
    ("--allowed-hosts http://a.example", "--allowed-hosts takes names without scheme, port and path"),
    ("--ssl-certfile c.pem", "--ssl-certfile and --ssl-keyfile go together"),
    ("--max-queued-requests 0", "--max-queued-requests must be at least 1, got 0"),
    ("--request-timeout 0", "--request-timeout must be above 0 s and at most a year, got 0.0"),
    ("--write-timeout nan", "--write-timeout must be above 0 s and at most a year, got nan"),
    ("--drain-timeout -1", "--drain-timeout must be at least 0 s and at most a year, got -1.0"),
    ("bench", "required: name"),
    ("bench nonsense", "invalid choice: 'nonsense'"),
    ("bench online", "one of --trace, --rate, --concurrency is required"),
    ("bench online --rate 1 --scale 2", "--rate does not go with --scale"),
    ("bench online --trace x --input-len 5", "--input-len does not go with --trace"),
    ("bench online --rate 1 --turns 3", "--turns needs --chats"),
    ("bench online --rate 1 --page-size 16", "unrecognized arguments: --page-size 16"),
    ("bench online --rate 1 --serve --page-size 0", "--page-size must be between 1 and 256"),
    ("bench streaming --step 0", "'0' is not a number above 0"),
    ("bench collectives --tp 0", "'0' is not a count of at least 1"),
    ("bench online --rate 1 --serve --url x", "--serve starts the server: it does not go with --url"),
    ("bench online --rate 0", "'0' is not a number above 0"),
    ("bench online --rate 1 --slo itl=3", "not one of ttft, tpot, e2e with a limit"),
    ("bench online --rate 1 --tokens 9:3", "not a range LOW:HIGH of token ids"),
    ("bench online --rate 1 --warmup -1", "'-1' is not a count of at least 0"),
    ("bench online --rate 1 --temperature -1", "'-1' is not a number of at least 0"),
    ("bench online --rate 1 --slo ttft", "'ttft' is not one of ttft, tpot, e2e with a limit"),
    ("bench ablation --seconds x", "'x' is not a number of at least 0"),
    ("bench ablation --only speed", "'speed' is not one of overlap"),
    ("bench offline --port 1", "unrecognized arguments: --port 1"),
    ("bench offline --input-len 9:3", "the smaller one first"),
    ("bench offline --input-len x", "not a length N or a range A:B"),
    ("bench offline --page-size 0", "--page-size must be between 1 and 256"),
)


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MINISGL_DISABLE_OVERLAP_SCHEDULING", "LOG_LEVEL", "MINISGL_API_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Mock:
    """Stands for the modules of the shell and the server, and records what `main` calls there."""
    module = Mock()
    for name in ("minisgl.chat", "minisgl.server.launch"):
        monkeypatch.setitem(sys.modules, name, module)
    return module


@pytest.mark.parametrize(
    ("command", "expected"), [*COMMANDS, *((f"python -m minisgl {line}", fields) for line, fields in SPELLINGS)]
)
def test_published_commands_and_every_spelling_set_their_fields(
    command: str, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = shlex.split(command.replace("\\\n", " "))
    for word in words[: words.index("python")]:
        if "=" in word:
            monkeypatch.setenv(*word.split("="))
    config = cli.parse(words[words.index("minisgl") + 1 :])
    assert dataclasses.asdict(config) == dataclasses.asdict(Config()) | expected


def test_every_flag_is_in_the_tables_and_every_help_group_begins_with_a_field() -> None:
    used = {word.partition("=")[0] for line, _ in SPELLINGS for word in line.split() if word.startswith("--")}
    assert used == {flag for field in dataclasses.fields(Config) for flag in flags_of(field)}
    names = [field.name for field in dataclasses.fields(Config)]
    assert list(cli.GROUPS) == [name for name in names if name in cli.GROUPS]
    assert names[0] in cli.GROUPS
    assert set(cli.SERVER_GROUPS) < set(cli.GROUPS.values())


@pytest.mark.parametrize(("line", "message"), BAD_LINES)
def test_bad_command_line_is_one_line_and_status_2(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^2$"):
        cli.main(line.split())
    assert re.fullmatch(rf"error: .*{re.escape(message)}.*\n", capsys.readouterr().err)


def test_the_server_starts_unless_the_shell_is_asked_for(started: Mock) -> None:
    for line in ("--port 80", "serve --port 80", "chat --port 80", "--shell --max-running-requests 7 --port 80"):
        assert cli.main(line.split()) == 0
    assert [name for name, _, _ in started.mock_calls] == ["serve", "serve", "run_shell", "run_shell"]
    configs: list[Config] = [config for _, (config,), _ in started.mock_calls]
    assert {config.port for config in configs} == {80}
    assert [resolve(config, Machine()).config.max_running_requests for config in configs] == [256, 256, 1, 7]


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("/no/such/model", "no such file or folder"),
        ("{}", "holds no config.json"),
        ("{}/model.bin", "not a GGUF file"),
        ("{}/fifo.gguf", "neither a folder nor a regular file"),
        ("what is this?", "nor the id of a model"),
        ("~no-such-user/model", "home directory"),
        ("a" * 300, "File name too long"),
    ],
)
@pytest.mark.parametrize("command", ["serve", "chat"])
def test_a_model_that_is_not_there_is_said_before_anything_starts(
    started: Mock, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, model: str, words: str
) -> None:
    (tmp_path / "model.bin").touch()
    os.mkfifo(tmp_path / "fifo.gguf")
    assert cli.main([command, "--model", model.format(tmp_path)]) == 1
    assert re.fullmatch(rf"error: .*{re.escape(words)}.*\n", capsys.readouterr().err)
    assert started.mock_calls == []


def test_the_end_of_the_server_is_one_line_and_a_traceback_only_when_debugging(
    started: Mock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong, said = ModelError("/nowhere: no config.json there"), "error: /nowhere: no config.json there\n"
    monkeypatch.setenv("LOG_LEVEL", "INFO")
    for error, outcome in ((wrong, (1, said)), (KeyboardInterrupt(), (130, ""))):
        started.serve.side_effect = error
        assert (cli.main([]), capsys.readouterr().err) == outcome
    monkeypatch.setenv("LOG_LEVEL", "debug")
    started.serve.side_effect = wrong
    assert cli.main([]) == 1
    printed = capsys.readouterr().err
    assert printed.endswith(said)
    assert "Traceback" in printed


def test_help_names_every_flag_default_and_switch(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        cli.main(["--help"])
    out = capsys.readouterr().out
    examples = re.findall(r"^  minisgl (.+?)  +\S", out.partition("commands:")[0], re.MULTILINE)
    assert [cli.parse(example.split()).shell for example in examples] == [True, False, False]
    text = " ".join(out.split())
    assert "usage: minisgl [serve | chat | bench] [MODEL] [flags] Serve a language model" in text
    for field in dataclasses.fields(Config):
        assert all(flag in text for flag in flags_of(field))
        assert field.metadata["env"] is None or field.metadata["env"] in text
    assert "tokens in a KV page (default: 16)" in text
    assert "(default: 1919)" in text


@pytest.mark.parametrize(
    "line", ["--help", "serve --help", "bench offline --help", "bench online --help", "bench simulate --help"]
)
def test_help_needs_no_heavy_imports(line: str) -> None:
    code = (
        f"import sys\nfrom minisgl.cli import main\ntry:\n    main({line.split()})\nexcept SystemExit: pass\n"
        "bad = {'torch', 'transformers', 'starlette', 'numpy'} & set(sys.modules)\nsys.exit(str(bad) if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_module_and_console_command_are_the_same_program() -> None:
    done = subprocess.run([sys.executable, "-m", "minisgl", "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"minisgl {__version__}\n")
