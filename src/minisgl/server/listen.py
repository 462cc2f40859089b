"""The address a server listens on, and who may reach it. What is wrong with it is said before a model loads."""

from __future__ import annotations

import ipaddress
import socket
import ssl

from minisgl.config import Config
from minisgl.errors import ConfigError

BACKLOG = 2048
"""Connections that may wait to be accepted."""


def listen_socket(host: str, port: int) -> socket.socket:
    """A socket bound to the address and not listening yet: taken before the model is loaded, answering after.

    Raises ConfigError when the address cannot be had.
    """
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"--host {host}: {error.strerror}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(where)
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}; choose another --port") from error
    return listener


def listen(listener: socket.socket, write_timeout: float) -> None:
    """Take connections. What a client that vanished has not acknowledged after `write_timeout` s is given up.

    Raises ConfigError when another process took the port while the model loaded.
    """
    # Connections inherit it (RFC 5482).
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(write_timeout * 1000))
    try:
        listener.listen(BACKLOG)
    except OSError as error:
        raise ConfigError(f"cannot listen on the port any more: {error.strerror}") from error


def check_public(config: Config, listener: socket.socket) -> None:
    """Raise ConfigError for an address that other machines reach where anybody could use it unasked."""
    host = str(listener.getsockname()[0]).partition("%")[0]
    if not (config.api_key or config.allow_public or ipaddress.ip_address(host).is_loopback):
        raise ConfigError(
            f"--host {config.host} can be reached from other machines, and nobody needs a key: "
            "set --api-key or MINISGL_API_KEY, or give --allow-public"
        )


def check_certificate(config: Config) -> None:
    """Raise ConfigError for TLS files that cannot be used, before anything is loaded."""
    if config.ssl_certfile is None:
        return
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(config.ssl_certfile, config.ssl_keyfile, lambda: "")
    except (OSError, ssl.SSLError) as error:
        files = f"--ssl-certfile {config.ssl_certfile} --ssl-keyfile {config.ssl_keyfile}"
        raise ConfigError(f"{files}: {error.strerror or error}") from error


def address(listener: socket.socket, config: Config) -> str:
    """The URL to reach a bound socket from this machine."""
    scheme = "http" if config.ssl_certfile is None else "https"
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
