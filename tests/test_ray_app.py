"""What `minisgl ray` and `serve run` take, and how many replicas the load asks for; without Ray."""

import pickle
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from helpers.processes import free_port
from minisgl.config import flag_of
from minisgl.errors import ConfigError, MinisglError
from minisgl.ray_app import ArgumentParser, Scale, build, desired_replicas, flags_from, main, parse
from minisgl.server.errors import QueueFullError


def test_the_flags_of_serve_and_those_of_ray() -> None:
    config, scale = parse(["some/model", "--tp", "4", "--replicas", "1:8", "--downscale-delay-s", "60"])
    assert (config.model, config.tp) == ("some/model", 4)
    assert scale == Scale(1, 8, downscale_delay_s=60.0)
    assert parse(["--replicas", "3"])[1] == Scale(3, 3)
    assert parse([])[1] == Scale(1, 1)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--replicas", "0"], "--replicas must be N or A:B"),
        (["--replicas", "3:2"], "--replicas must be N or A:B"),
        (["--replicas", "1:"], "--replicas must be N or A:B"),
        (["--upscale-delay-s", "-1"], "must be at least 0"),
        (["--downscale-delay-s", "nan"], "must be at least 0"),
        (["--tp", "0"], "--tp must be at least 1"),
        (["a", "--model", "b"], "the model is given twice"),
        (["--record", "file"], "--record is not for replicas: all replicas would write the same file"),
        (["--debug-endpoints"], "--debug-endpoints is not for replicas"),
        (["--kv-events-config", "{}"], "--kv-events-config is not for replicas"),
        (["--shell"], "--shell is not for replicas"),
    ],
)
def test_what_replicas_cannot_do_is_refused_by_name(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match=said):
        parse(arguments, ArgumentParser)
    with pytest.raises(SystemExit, match="2"):
        parse(arguments)
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("name", ["host", "port", "ssl_certfile"])
def test_where_serves_proxy_listens_is_not_the_applications(name: str) -> None:
    value = {"port": 80}.get(name, "x")
    more = {"ssl_keyfile": "y"} if name == "ssl_certfile" else {}
    with pytest.raises(ConfigError, match="http_options"):
        build({name: value, **more})


def test_arguments_of_serve_run_are_flags() -> None:
    given = {"model": None, "replicas": 1, "dummy_weight": True, "allow_public": "false", "allowed_hosts": ["a", "b"]}
    assert flags_from(given) == ["--replicas=1", "--dummy-weight", "--allowed-hosts=a,b"]
    with pytest.raises(ConfigError, match="--tp must be at least 1, got 0"):
        build({**given, "tp": 0})
    for name, value in (("no_such", 1), ("no_such", False), ("overlap", False)):
        with pytest.raises(ConfigError, match=f"unrecognized arguments: {flag_of(name)}"):
            build({name: value})


def replicas_for(current: int, **metrics: list[float]) -> int:
    named = {name: dict(enumerate(values)) for name, values in metrics.items()}
    context: Any = SimpleNamespace(aggregated_metrics=named, target_num_replicas=current)
    return desired_replicas(context)[0]


@pytest.mark.parametrize(
    ("waiting", "kv_use", "replicas"),
    [
        ([0.0], [0.0], 1),
        ([16.0], [0.1], 1),
        ([17.0], [0.1], 2),
        ([0.0], [0.81], 2),
        ([64.0, 0.0], [0.9, 0.1], 4),
        ([0.0, 0.0, 0.0], [0.2, 0.2, 0.2], 1),
        ([0.0, 0.0, 0.0], [0.5, 0.5, 0.5], 2),
    ],
)
def test_waiting_requests_and_kv_use_say_how_many_replicas(
    waiting: list[float], kv_use: list[float], replicas: int
) -> None:
    assert replicas_for(len(waiting), waiting=waiting, kv_use=kv_use) == replicas


def test_replicas_that_say_nothing_yet_change_nothing() -> None:
    assert replicas_for(3) == 3
    assert replicas_for(2, waiting=[40.0]) == 2


def test_without_ray_the_command_names_the_extra(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main([]) == 1
    assert "minisgl ray needs Ray Serve" in (said := capsys.readouterr().err)
    assert "minisgl[ray]" in said


def test_a_cluster_that_cannot_be_joined_is_an_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(**options: bool) -> None:
        raise ConnectionError("Failed to connect to Ray cluster at 10.0.0.1:6379")

    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(init=init, serve=None))
    assert main(["--port", str(free_port())]) == 1
    assert "error: Failed to connect to Ray cluster at 10.0.0.1:6379; RAY_ADDRESS" in capsys.readouterr().err


def test_an_error_is_the_same_behind_a_replicas_border() -> None:
    for error in (QueueFullError("4 wait", 7), MinisglError("the step failed", code="internal_error")):
        same = pickle.loads(pickle.dumps(error))
        assert type(same) is type(error)
        assert vars(same) == vars(error)
