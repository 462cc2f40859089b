"""The engine and its HTTP server as an application of Ray Serve: `minisgl ray`, `serve run minisgl.ray_app:build`."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import signal
import threading
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any, Final, NoReturn

from minisgl import __version__
from minisgl.cli import Parser, add_config_flags, config_from, guarded
from minisgl.config import Config, flag_of, flags_of
from minisgl.errors import ConfigError, ModelError
from minisgl.formats.hub import find_local
from minisgl.server.engine_client import MAX_LIVE
from minisgl.server.launch import address, check_public, listen_socket
from minisgl.system import install_command, print_text

if TYPE_CHECKING:
    from ray.serve import Application
    from ray.serve.config import AutoscalingContext

NAME: Final = "minisgl"  # of the application
TARGET_WAITING: Final = 16.0  # requests that wait at a replica, as in deploy/k8s/autoscaling.yaml
TARGET_KV_USE: Final = 0.8
GRACE_SECONDS: Final = 5.0  # for the last bytes of a drained replica
STOP_SECONDS: Final = 30.0  # for Ray itself to stop, beside the drain
# Settings that a group of replicas behind Ray Serve's proxy does not have, and why.
REFUSED: Final = {
    "shell": "the chat in the terminal has no replicas: minisgl chat",
    "trace_steps": "all replicas would write the same file",
    "record": "all replicas would write the same file",
    "kv_events_config": "clients cannot choose a replica, so nobody can follow the events",
    "debug_endpoints": "they show one engine, and Ray Serve's proxy reaches any",
    "write_timeout": "Ray Serve's proxy writes to the clients",
}

ABOUT: Final = """\
Serve a language model with several replicas, which Ray Serve starts, watches, scales and replaces.
Without RAY_ADDRESS it starts Ray on this machine; with it, it joins that cluster."""


@dataclasses.dataclass(frozen=True)
class Scale:
    least: int
    most: int
    upscale_delay_s: float = 30.0
    downscale_delay_s: float = 600.0


class ArgumentParser(Parser):
    """For the arguments of `serve run`: what is wrong is an error for Ray to show."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def parse(arguments: Sequence[str], kind: type[Parser] = Parser) -> tuple[Config, Scale]:
    parser = kind(prog="minisgl ray", usage="minisgl ray [MODEL] [flags]", description=ABOUT)
    parser.add_argument("positional_model", nargs="?", metavar="MODEL", help="as --model")
    group = parser.add_argument_group("Ray Serve")
    group.add_argument("--replicas", default="1", metavar="N | A:B", help="replicas of the engine; A:B scales between")
    for name, default, when in (("upscale", 30.0, "is started"), ("downscale", 600.0, "is stopped")):
        text = f"seconds that the load must have asked for it before a replica {when} (default: {default:g})"
        group.add_argument(f"--{name}-delay-s", type=float, default=default, metavar="X", help=text)
    add_config_flags(parser)
    given = parser.parse_args(arguments)
    config = config_from(parser, given)
    for name, why in REFUSED.items():
        if getattr(config, name) != getattr(Config, name):
            parser.error(f"{flag_of(name)} is not for replicas: {why}")
    match = re.fullmatch(r"([1-9]\d{0,3})(?::([1-9]\d{0,3}))?", given.replicas)
    if match is None or int(match[1]) > int(match[2] or match[1]):
        parser.error(f"--replicas must be N or A:B with 1 <= A <= B, got {given.replicas!r}")
    if not all(0 <= delay < math.inf for delay in (given.upscale_delay_s, given.downscale_delay_s)):
        parser.error("--upscale-delay-s and --downscale-delay-s must be at least 0, and finite")
    least, most = int(match[1]), int(match[2] or match[1])
    return config, Scale(least, most, given.upscale_delay_s, given.downscale_delay_s)


def flags_from(args: Mapping[str, Any]) -> list[str]:
    switches = {flag for field in dataclasses.fields(Config) if field.default is False for flag in flags_of(field)}
    flags: list[str] = []
    for name, value in args.items():
        flag, text = flag_of(name), ",".join(map(str, value)) if isinstance(value, list) else str(value)
        if value is not None and (flag not in switches or text.lower() != "false"):
            flags.append(flag if text.lower() == "true" else f"{flag}={text}")
    return flags


def build(args: Mapping[str, Any]) -> Application:
    """The application from the flags of `minisgl ray`, as `serve run` gives them: {"model": "…", "tp": "4"}."""
    config, scale = parse(flags_from(args), ArgumentParser)
    for name in ("host", "port", "ssl_certfile", "ssl_keyfile"):
        if getattr(config, name) != getattr(Config, name):
            raise ConfigError(f"{flag_of(name)}: Ray Serve's http_options say where its proxy listens")
    return build_application(config, scale)


def build_application(config: Config, scale: Scale) -> Application:
    import ray
    from ray import serve
    from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig
    from ray.serve.schema import LoggingConfig

    from minisgl import ray_deployments

    on_gpus = config.device == "cuda" or (config.device == "auto" and ray.cluster_resources().get("GPU", 0) > 0)
    engine_config = config.without_keys().replace(device="cuda" if on_gpus else "cpu", request_timeout=None)
    options: dict[str, Any] = {"ray_actor_options": {"num_cpus": config.tp}}
    if on_gpus:
        # One bundle, so that the replica's process, which starts the engine, sees all of its GPUs.
        options["ray_actor_options"] = {"num_cpus": 1, "num_gpus": config.tp}
        options["placement_group_bundles"] = [{"CPU": 1, "GPU": config.tp}]
        options["placement_group_strategy"] = "STRICT_PACK"
    if scale.least == scale.most:
        options["num_replicas"] = scale.most
    else:
        options["autoscaling_config"] = AutoscalingConfig(
            min_replicas=scale.least,
            max_replicas=scale.most,
            upscale_delay_s=scale.upscale_delay_s,
            downscale_delay_s=scale.downscale_delay_s,
            policy=AutoscalingPolicy(policy_function=desired_replicas),
        )
    quiet = LoggingConfig(enable_access_log=False)  # the application has its own
    replicas = serve.deployment(
        name="Engine",
        max_ongoing_requests=MAX_LIVE,
        max_queued_requests=MAX_LIVE,
        request_router_config=RequestRouterConfig(request_router_class=ray_deployments.PrefixRequestRouter),
        health_check_period_s=5.0,
        graceful_shutdown_timeout_s=config.drain_timeout,
        logging_config=quiet,
        **options,
    )(ray_deployments.EngineReplica)
    max_live = MAX_LIVE * scale.most
    ingress = serve.deployment(
        name="Ingress",
        num_replicas=config.api_workers,
        max_ongoing_requests=2 * max_live,  # the application turns requests away itself, in its own words
        max_surge_percent=100,
        graceful_shutdown_timeout_s=config.drain_timeout + GRACE_SECONDS,
        logging_config=quiet,
        ray_actor_options={"num_cpus": 0},  # beside the replicas, whose GPUs leave cores
    )(ray_deployments.Ingress)
    application: Application = ingress.bind(replicas.bind(engine_config), config, max_live)
    return application


def desired_replicas(context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
    """As many replicas as bring waiting requests and KV use to their targets. Serve keeps the bounds and the delays."""
    metrics = context.aggregated_metrics or {}
    waiting, kv_use = (list(metrics.get(name, {}).values()) for name in ("waiting", "kv_use"))
    if not waiting or not kv_use:
        return context.target_num_replicas, {}
    pressure = max(fmean(waiting) / TARGET_WAITING, fmean(kv_use) / TARGET_KV_USE)
    return max(1, math.ceil(len(waiting) * pressure)), {}


def run(config: Config, scale: Scale) -> int:
    """Serve until SIGINT or SIGTERM; then live requests may go on for the drain timeout."""
    try:
        import ray
        from ray import serve
    except ImportError as error:
        raise ConfigError(f"minisgl ray needs Ray Serve: {install_command('minisgl[ray]')} ({error})") from error
    find_local(config.model)
    with listen_socket(config.host, config.port) as listener:  # what is wrong with it is said before Ray starts
        check_public(config, listener)
        port, url = listener.getsockname()[1], address(listener, config)
    try:
        ray.init(include_dashboard=False)
    except ConnectionError as error:
        raise ConfigError(f"{error}; RAY_ADDRESS names the cluster, RAY_AUTH_TOKEN is its key") from error
    for number in (signal.SIGINT, signal.SIGTERM):  # in place of Ray's own handlers
        signal.signal(number, signal.default_int_handler)
    if serve.status().proxies:
        raise ConfigError("Ray Serve runs in this cluster already: use serve deploy, with minisgl.ray_app:build")
    tls = {"ssl_certfile": config.ssl_certfile, "ssl_keyfile": config.ssl_keyfile}
    serve.start(http_options={"host": config.host, "port": port, **tls})
    print_text("starting the replicas …")
    try:
        serve.run(build_application(config, scale), name=NAME, route_prefix="/", blocking=False)
        print_text(f"\nMini-SGLang {__version__} is ready on {url}/v1\n", to_stdout=True)
        threading.Event().wait()
    except KeyboardInterrupt:
        print_text("stopping; once more to stop at once")
        # A Ray that is broken is waited for without end, and not in Python, where a second signal would be seen.
        watchdog = threading.Timer(config.drain_timeout + STOP_SECONDS, os._exit, (1,))
        watchdog.daemon = True
        watchdog.start()
    except RuntimeError as error:  # Serve's; why a replica could not start is in the status, at the end of a traceback
        deployments = serve.status().applications[NAME].deployments.values()
        said = [
            line for each in deployments for line in each.message.splitlines() if line.startswith("minisgl.errors.")
        ]
        raise ModelError(said[-1].partition(": ")[2] if said else str(error)) from error
    finally:
        serve.delete(NAME)
        serve.shutdown()
        ray.shutdown()
    return 0


def main(arguments: Sequence[str]) -> int:
    config, scale = parse(arguments)
    return guarded(lambda: run(config, scale))
