"""A certificate that nobody trusts, as behind an inspecting proxy: it is said at once, and how to go on."""

from __future__ import annotations

import datetime
import math
import ssl
from ipaddress import ip_address
from pathlib import Path

import pytest

from launcher.stage import web
from tests.conftest import Launch
from tests.stage.conftest import reader
from tests.stage.hub_server import Hub

x509 = pytest.importorskip("cryptography.x509")
pytest.importorskip("botocore")


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """Signed by itself, with its key, for this machine alone."""
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([])
    now, day = datetime.datetime.now(datetime.UTC), datetime.timedelta(days=1)
    made = x509.CertificateBuilder(name, name, key.public_key(), 1, now - day, now + day).add_extension(
        x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=True
    )
    pem = serialization.Encoding.PEM
    text = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path = tmp_path / "server.pem"
    path.write_bytes(text + made.sign(key, hashes.SHA256()).public_bytes(pem))
    return path


CLIENTS = {
    "hub": ["c4", "--files", "1"],
    "web": ["image", "https://{}/titan.sqsh"],
    "s3": ["c4", "--files", "1", "--from", "s3://bucket/c4"],
}


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("trusted", [False, True])
def test_what_is_not_trusted_is_told_from_a_broken_network(client, trusted, hub: Hub, certificate, launch, monkeypatch):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    hub.hub.socket = context.wrap_socket(hub.hub.socket, server_side=True, do_handshake_on_connect=False)
    monkeypatch.setattr(hub.hub, "handle_error", lambda *_: None)  # a client that does not trust us goes away
    for name in (*web.BUNDLES, "SSL_CERT_DIR", "HTTPS_PROXY", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    endpoint = hub.endpoint.replace("http:", "https:")
    reader(monkeypatch, endpoint)
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    if trusted:
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    else:
        monkeypatch.setattr(web, "BACKOFF_S", math.inf)  # trying again, which does not help, would fail
    words = [word.format(endpoint.removeprefix("https://")) for word in CLIENTS[client]]
    said = launch("stage", *words, "--to", "place", alone=True).stderr
    assert ("self-signed certificate) [certificate]" in said and "export SSL_CERT_FILE=" in said) == (not trusted), said


def test_a_bundle_that_is_not_there(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", "/nope.pem")
    said = launch("stage", "c4", "--to", "place", "--files", "1", alone=True).stderr
    assert "SSL_CERT_FILE=/nope.pem: no such file [certificate]" in said
