"""A certificate that nobody trusts, as behind an inspecting proxy: every client says so, once, and how to go on."""

from __future__ import annotations

import datetime
import ssl
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

from launcher.stage import web
from tests.conftest import Launch
from tests.stage.conftest import reader

x509 = pytest.importorskip("cryptography.x509")
pytest.importorskip("s3fs")


class Server(ThreadingHTTPServer):
    daemon_threads = True
    connections = 0

    def get_request(self) -> Any:
        self.connections += 1
        return super().get_request()

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that does not trust us goes away."""


class Nothing(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_error(404)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Signed by itself, with its key, for this machine alone."""
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([])
    now = datetime.datetime.now(datetime.UTC)
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    key_text = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path = tmp_path_factory.mktemp("certificate") / "server.pem"
    path.write_bytes(key_text + signed.public_bytes(pem))
    return path


@pytest.fixture
def server(certificate: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    running = Server(("127.0.0.1", 0), Nothing)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    running.socket = context.wrap_socket(running.socket, server_side=True, do_handshake_on_connect=False)
    threading.Thread(target=running.serve_forever, args=(0.05,), daemon=True).start()
    endpoint = f"https://127.0.0.1:{running.server_port}"
    for name in (*web.BUNDLES, "SSL_CERT_DIR", "HF_TOKEN", "HTTPS_PROXY", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    reader(monkeypatch, endpoint)
    yield running
    running.shutdown()
    running.server_close()


CLIENTS = [
    ["c4", "--files", "1"],
    ["image", "https://{}/titan.sqsh"],
    ["c4", "--files", "1", "--from", "s3://bucket/c4"],
]


@pytest.mark.parametrize("words", CLIENTS, ids=["hub", "web", "s3"])
@pytest.mark.parametrize("trusted", [False, True])
def test_what_is_not_trusted_is_told_from_a_broken_network(
    words: list[str], trusted: bool, server: Server, certificate: Path, launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    if trusted:
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    words = [word.format(f"127.0.0.1:{server.server_port}") for word in words]
    said = launch("stage", *words, "--to", "place", alone=True).stderr
    assert "Traceback" not in said
    if trusted:
        assert "[certificate]" not in said, said
    else:
        assert "self-signed certificate) [certificate]" in said and "export SSL_CERT_FILE=" in said, said
        assert server.connections == 1


def test_a_bundle_that_is_not_there(launch: Launch, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", "/nope.pem")
    said = launch("stage", "c4", "--to", "place", "--files", "1", alone=True).stderr
    assert "SSL_CERT_FILE=/nope.pem: no such file [certificate]" in said
