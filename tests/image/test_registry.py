"""Images of both architectures in a real registry (Debian's docker-registry, on the loopback interface), and one list
of them.
"""

from __future__ import annotations

import base64
import json
import shutil
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from launcher.base.errors import LauncherError
from launcher.image import engine as docker_engine
from launcher.image.engine import Engine
from launcher.image.registry import Pushed, manifest_list, push
from tests.image.dockerd import daemon

LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
PASSWORD = "correct horse"
# user `titan`, in bcrypt: what docker-registry reads
HTPASSWD = "titan:$2b$05$Am5lRSQqPPyENCnTRDPh6ev9P9FFwldhV2QbagkWmc59xUbv7jKU6\n"
BOTH = ("amd64", "arm64")


@contextmanager
def running_registry(folder: Path, htpasswd: str = "") -> Iterator[str]:
    """host:port of a registry whose files are in `folder`."""
    if not shutil.which("docker-registry"):
        pytest.skip("missing Debian package: apt install docker-registry")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = probe.getsockname()
    host = "{}:{}".format(*address)
    config: dict[str, Any] = {
        "version": 0.1,
        "log": {"level": "error"},
        "storage": {"filesystem": {"rootdirectory": str(folder / "data")}},
        "http": {"addr": host},
    }
    if htpasswd:
        (folder / "htpasswd").write_text(htpasswd)
        config["auth"] = {"htpasswd": {"realm": "titan", "path": str(folder / "htpasswd")}}
    (folder / "config.yml").write_text(json.dumps(config))  # YAML, too
    command = ["docker-registry", "serve", str(folder / "config.yml")]
    with daemon(command, folder / "log", lambda _: socket.socket().connect_ex(address) == 0):
        yield host


@pytest.fixture(autouse=True)
def no_logins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Whoever runs the tests may be logged in somewhere; docker-py and the docker command both look here."""
    folder = tmp_path / "docker-config"
    folder.mkdir()
    monkeypatch.setenv("DOCKER_CONFIG", str(folder))
    return folder


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_registry(tmp_path_factory.mktemp("registry")) as host:
        yield host


@pytest.fixture(scope="module")
def images(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Architecture -> tag of an image: as small as can be, as the engine compresses what it pushes, at 20 MB/s."""
    tags = {arch: f"titan-test:registry-{arch}" for arch in BOTH}
    for arch, tag in tags.items():
        folder = tmp_path_factory.mktemp(arch)
        (folder / "Dockerfile").write_text(f'FROM scratch\nCOPY Dockerfile /\nCMD ["/{arch}"]\n')
        build = ["build", f"--tag={tag}", f"--platform=linux/{arch}", str(folder)]
        code, output = docker_engine.command(engine, build)
        assert code == 0, output
    return tags


def manifest(host: str, path: str, tag: str) -> dict[str, Any] | None:
    """What the registry itself says; None where it has no such tag."""
    request = urllib.request.Request(f"http://{host}/v2/{path}/manifests/{tag}", headers={"Accept": LIST})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return dict(json.load(answer)) | {"digest": answer.headers["Docker-Content-Digest"]}
    except urllib.error.HTTPError as error:
        assert error.code == 404
        return None


# ------------------------------------------------------------------------------------------ what works


def test_both_architectures_are_pushed_and_one_name_serves_them(
    engine: Engine, images: dict[str, str], host: str, capsys: pytest.CaptureFixture[str]
) -> None:
    reference = f"{host}/team/titan:tiny"
    pushed = [push(images[arch], reference, engine=engine) for arch in BOTH]
    assert [(image.arch, image.reference) for image in pushed] == [(a, f"{reference}-{a}") for a in BOTH]
    assert "Pushed" in capsys.readouterr().err and manifest(host, "team/titan", "tiny") is None
    digest = manifest_list(reference, pushed, engine=engine)
    there = manifest(host, "team/titan", "tiny")
    assert there and there["digest"] == digest and there["mediaType"] == LIST
    assert {(entry["platform"]["architecture"], entry["digest"]) for entry in there["manifests"]} == {
        (image.arch, image.digest) for image in pushed
    }
    # By digest: the tags of the single images may belong to another push meanwhile.
    assert manifest_list(f"{host}/team/titan", pushed, engine=engine) == digest
    ids = {arch: docker_engine.inspect(engine, images[arch])["Id"] for arch in BOTH}
    for arch in BOTH:
        pulled = engine.client.images.pull(f"{host}/team/titan", tag="tiny", platform=f"linux/{arch}")
        assert (pulled.attrs["Architecture"], pulled.id) == (arch, ids[arch])


def test_a_second_list_holds_nothing_of_the_first(engine: Engine, images: dict[str, str], host: str) -> None:
    reference = f"{host}/titan:again"
    both = [push(images[arch], reference, engine=engine) for arch in BOTH]
    first = manifest_list(reference, both, engine=engine)
    assert manifest_list(reference, both[::-1], engine=engine)
    one = manifest_list(reference, both[:1], engine=engine)
    there = manifest(host, "titan", "again")
    assert there and one == there["digest"] != first and len(there["manifests"]) == 1


def test_the_login_of_the_docker_command_is_used(
    engine: Engine, images: dict[str, str], tmp_path: Path, no_logins: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with running_registry(tmp_path, HTPASSWD) as host:
        reference = f"{host}/titan:tiny"
        for wrong in ({}, {"auths": {host: {"auth": base64.b64encode(b"titan:wrong").decode()}}}):
            (no_logins / "config.json").write_text(json.dumps(wrong))
            with pytest.raises(LauncherError, match=f"the registry {host} did not accept {reference}-arm64") as error:
                push(images["arm64"], reference, engine=docker_engine.connect())
            assert error.value.fix == f"docker login {host}" and error.value.original
            with pytest.raises(LauncherError, match="did not accept") as error:
                manifest_list(reference, [Pushed("arm64", f"sha256:{'0' * 64}", "")], engine=engine)
            assert f"docker login {host}" in error.value.fix
        right = base64.b64encode(f"titan:{PASSWORD}".encode()).decode()
        (no_logins / "config.json").write_text(json.dumps({"auths": {host: {"auth": right}}}))
        pushed = push(images["arm64"], reference, engine=docker_engine.connect())
        assert manifest_list(reference, [pushed], engine=engine)
        said = capsys.readouterr().err
        assert "Pushed" in said and PASSWORD not in said and right not in said


# ------------------------------------------------------------------------------------------ what is refused


def test_an_image_that_left_the_registry_fails_the_list(engine: Engine, images: dict[str, str], host: str) -> None:
    reference = f"{host}/titan:gone"
    here = push(images["amd64"], reference, engine=engine)
    gone = Pushed("arm64", f"sha256:{'0' * 64}", f"{reference}-arm64")
    with pytest.raises(LauncherError, match="did not accept"):
        manifest_list(reference, [here, gone], engine=engine)
    assert manifest(host, "titan", "gone") is None


def test_a_registry_that_is_down(engine: Engine, images: dict[str, str], tmp_path: Path) -> None:
    with running_registry(tmp_path) as host:
        reference = f"{host}/titan:tiny"
        pushed = push(images["arm64"], reference, engine=engine)
    with pytest.raises(LauncherError, match=f"the registry {host} did not accept") as error:
        push(images["arm64"], reference, engine=engine)
    assert "connection refused" in error.value.original
    with pytest.raises(LauncherError, match=f"the registry {host} did not accept"):
        manifest_list(reference, [pushed], engine=engine)


@pytest.mark.parametrize(
    ("reference", "plain"),
    [
        ("localhost:5000/titan", True),
        ("localhost/titan", True),
        ("127.9.9.9:5000/a/titan:x", True),
        ("localhost", False),
        ("docker.io/titan", False),
        ("localhost.example:5000/titan", False),
        ("127.0.0.1.example/titan", False),
        ("10.0.0.1:5000/titan", False),
    ],
)
def test_plain_http_is_for_the_loopback_interface_alone(
    reference: str, plain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("docker")
    asked: list[list[str]] = []

    def command(_: Engine, arguments: list[str]) -> tuple[int, str]:
        asked.append(arguments)
        return 0, f"sha256:{'0' * 64}"

    monkeypatch.setattr(docker_engine, "command", command)
    engine = Engine(None, "unix:///run/docker.sock", "28.0", "amd64", "Debian")
    manifest_list(reference, [Pushed("amd64", f"sha256:{'0' * 64}", "")], engine=engine)
    assert [("--insecure" in words) for words in asked] == [False, plain, plain]
