"""A stand-in for what `launcher image` calls, and the commands as a user types them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launcher import cli
from launcher.base.output import say
from launcher.image import build as building
from launcher.image import engine as docker_engine
from launcher.image.build import Built
from tests.image.converter import DESCRIPTION, File, tar_of


@dataclass(frozen=True)
class Done:
    code: int
    stdout: str
    stderr: str


Run = Callable[..., Done]


@pytest.fixture
def run(workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`launcher image ...` in this process, where its parts can be replaced; with its messages and exit code."""

    def call(*arguments: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["launcher", "image", *arguments])
        code = 0
        try:
            cli.main()
        except SystemExit as exit:
            code = int(exit.code or 0)
        return Done(code, *capsys.readouterr())

    return call


def exported(size: int = 0, name: str = "big") -> bytes:
    """A root directory as an engine streams it, with a file of that size and name."""
    return tar_of(DESCRIPTION, File(name, bytes(size)))


@dataclass
class Api:
    """The calls of docker-py that a conversion makes."""

    images: dict[str, dict[str, Any]]
    stream: bytes
    then: Callable[[], BaseException] | None = None  # what comes after the stream
    containers: list[str] = field(default_factory=list)  # made and not removed

    def inspect_image(self, name: str) -> dict[str, Any]:
        for tag, about in self.images.items():
            if name in (tag, about["Id"]):
                return about
        import docker

        raise docker.errors.ImageNotFound(name)

    def create_host_config(self, **_: Any) -> dict[str, Any]:
        return {}

    def create_container(self, image: str, *_: Any, name: str, **__: Any) -> dict[str, str]:
        self.containers.append(name)
        return {"Id": f"id of {name}"}

    def export(self, _: str, chunk_size: int) -> Iterator[bytes]:
        for at in range(0, len(self.stream), chunk_size):
            yield self.stream[at : at + chunk_size]
        if self.then:
            raise self.then()

    def remove_container(self, container: str, **_: Any) -> None:
        import docker

        if container not in self.containers:
            raise docker.errors.NotFound(container)
        self.containers.remove(container)


def inspected(arch: str = "amd64", title: str = "titan-cpu") -> dict[str, Any]:
    labels = {"org.opencontainers.image.title": title} if title else None
    return {"Id": f"sha256:{title}{arch}", "Architecture": arch, "Size": 5, "Config": {"Labels": labels}}


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Api:
    """An engine for amd64 with two images of the channel cpu and a foreign one."""
    pytest.importorskip("docker")
    found = Api(
        {"titan:cpu-amd64": inspected(), "titan:cpu-arm64": inspected("arm64"), "other:1": inspected(title="")},
        exported(),
    )
    engine = docker_engine.Engine(SimpleNamespace(api=found), "unix:///made-up.sock", "28.0", "amd64", "Debian")
    monkeypatch.setattr(docker_engine, "connect", lambda: engine)
    monkeypatch.setattr(docker_engine, "emulator", lambda arch: "qemu")
    return found


@pytest.fixture
def builds(api: Api, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What was asked to be built; the images are there already."""
    asked: list[dict[str, Any]] = []

    def build(name: str, arch: str, *, engine: Any, **options: Any) -> Built:
        asked.append({"name": name, "arch": arch, **options})
        say(f"Step 1/9 : building\t{arch}")
        tag = options["tag"] or f"titan:{name}-{arch}"
        return Built(name, arch, tag, f"sha256:{arch}", 5, 1.5)

    monkeypatch.setattr(building, "build", build)
    return asked
