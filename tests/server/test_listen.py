"""The address: who may reach it, over TLS or not; what is wrong with it is said before anything is loaded."""

import socket
from pathlib import Path

import httpx
import pytest
from cryptography.hazmat.primitives import serialization

from helpers.certificates import write_certificate
from helpers.serving import serving
from minisgl.config import Config
from minisgl.errors import ConfigError
from minisgl.server.launch import address, check_certificate, check_public, listen_socket, serve


def bound(host: str) -> socket.socket:
    """A socket of that address, where the machine has it."""
    try:
        return listen_socket(host, 0)
    except ConfigError:
        pytest.skip(f"no {host} here")


async def test_tls_with_the_operators_certificate(tmp_path: Path) -> None:
    certfile, keyfile = write_certificate(tmp_path)
    async with serving(tmp_path / "model", ssl_certfile=certfile, ssl_keyfile=keyfile) as server:
        assert str(server.http.base_url).startswith("https://")
        answer = await server.http.post("/v1/completions", json={"prompt": "hi", "max_tokens": 4})
        assert answer.json()["usage"]["completion_tokens"] == 4
        streamed = await server.http.post("/v1/completions", json={"prompt": "hi", "max_tokens": 4, "stream": True})
        assert streamed.text.endswith("data: [DONE]\n\n")
        async with httpx.AsyncClient() as stranger:
            with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
                await stranger.get(f"https://127.0.0.1:{server.port}/ready")
            with pytest.raises(httpx.TransportError):
                await stranger.get(f"http://127.0.0.1:{server.port}/ready")


def test_tls_files_that_cannot_be_used_are_an_error_before_anything_is_loaded(tmp_path: Path) -> None:
    certfile, keyfile = write_certificate(tmp_path)
    check_certificate(Config(ssl_certfile=certfile, ssl_keyfile=keyfile))
    (other := tmp_path / "other").mkdir()
    _, stranger = write_certificate(other)
    for cert, key in ((certfile, "/no/such"), (certfile, stranger), (keyfile, certfile)):
        with pytest.raises(ConfigError, match=r"--ssl-certfile .*: ."):
            serve(Config(ssl_certfile=cert, ssl_keyfile=key), ["/nothing/that/could/start"])
    with pytest.raises(ConfigError, match="give both or neither"):
        serve(Config(ssl_certfile=certfile), ["/nothing/that/could/start"])


def test_an_encrypted_key_does_not_stop_to_ask_for_a_password(tmp_path: Path) -> None:
    certfile, keyfile = write_certificate(tmp_path)
    key = serialization.load_pem_private_key(Path(keyfile).read_bytes(), None)
    locked = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"x")
    )
    Path(keyfile).write_bytes(locked)
    with pytest.raises(ConfigError, match="--ssl-keyfile"):
        check_certificate(Config(ssl_certfile=certfile, ssl_keyfile=keyfile))


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_a_public_address_without_a_key_is_refused_unless_told_to(host: str) -> None:
    with bound(host) as listener:
        with pytest.raises(ConfigError, match="no key is asked for: set --api-key or MINISGL_API_KEY, or give"):
            check_public(Config(host=host), listener)
        check_public(Config(host=host, allow_public=True), listener)
        check_public(Config(host=host, api_key=("secret",)), listener)
    with pytest.raises(ConfigError, match="no key is asked for"):
        serve(Config(host=host, port=0), ["/nothing/that/could/start"])


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.0.0.2"])
def test_this_machine_alone_needs_no_key(host: str) -> None:
    with bound(host) as listener:
        check_public(Config(host=host), listener)


@pytest.mark.parametrize(("host", "shown"), [("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "127.0.0.1"), ("::1", "[::1]")])
def test_the_url_is_one_that_can_be_opened_and_says_tls(host: str, shown: str) -> None:
    with bound(host) as listener:
        port = listener.getsockname()[1]
        assert address(listener, Config()) == f"http://{shown}:{port}"
        assert address(listener, Config(ssl_certfile="c", ssl_keyfile="k")) == f"https://{shown}:{port}"
