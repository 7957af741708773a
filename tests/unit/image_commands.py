"""A stand-in for the docker command, and `launcher image` as a user types it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from launcher import cli
from launcher.image import build as building
from launcher.image.build import Built
from tests.image.converter import File, tar_of

ABOUT = {
    "schema": 1,
    "channel": "cpu",
    "arch": "amd64",
    "driver_min": None,
    "sm": [],
    "created": "2026-01-01T00:00:00Z",
    "versions": {"python": "3.11.2", "torch": "2.13.0+cpu", "cuda": None, "nccl": None, "torchtitan": "0.3.0"},
}
# In its folder: the images that it has, by name and by id; the containers that were made and not removed; what it
# exports; and `on-create` and `on-export`, commands that a test puts there.
DOCKER = """#!/bin/sh
cd "$(dirname "$0")"
for last in "$@"; do case $last in --name=*) name=${last#--name=} ;; esac; done
case "$1 $2" in
  "version "*) echo amd64 ;;
  "image inspect") cat "images/$3" 2>/dev/null || { echo "Error: No such image: $3" >&2; exit 1; } ;;
  "create "*) . ./on-create; touch "containers/$name" ;;
  "export "*) cat export.tar; . ./on-export ;;
  "rm "*) rm "containers/$last" ;;
esac
"""


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


def exported(about: dict[str, Any], size: int = 0, name: str = "big") -> bytes:
    """A root directory as an engine streams it, with a file of that size and name."""
    return tar_of(File("etc/titan-image.json", json.dumps(about).encode()), File(name, bytes(size)))


@dataclass(frozen=True)
class Engine:
    """The stand-in's folder."""

    folder: Path

    def exports(self, stream: bytes, then: str = "") -> None:
        (self.folder / "export.tar").write_bytes(stream)
        (self.folder / "on-export").write_text(then)

    def creates(self, first: str) -> None:
        (self.folder / "on-create").write_text(first)

    def containers(self) -> list[str]:
        return os.listdir(self.folder / "containers")


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """An engine for amd64 with two images of the channel cpu and a foreign one."""
    folder = tmp_path / "engine"
    for name in ("images", "containers"):
        (folder / name).mkdir(parents=True)
    for tag, title, arch in (
        ("titan:cpu-amd64", "titan-cpu", "amd64"),
        ("titan:cpu-arm64", "titan-cpu", "arm64"),
        ("other:1", None, "amd64"),
    ):
        labels = {"org.opencontainers.image.title": title} if title else None
        about = {"Id": f"sha256:{title}{arch}", "Architecture": arch, "Size": 5, "Config": {"Labels": labels}}
        for name in (tag, f"sha256:{title}{arch}"):
            (folder / "images" / name).write_text(json.dumps([about]))
    (folder / "docker").write_text(DOCKER)
    (folder / "docker").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    found = Engine(folder)
    found.exports(exported(ABOUT))
    found.creates("")
    return found


@pytest.fixture
def builds(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What was asked to be built; the images are there already."""
    asked: list[dict[str, Any]] = []

    def build(name: str, arch: str, **options: Any) -> Built:
        asked.append({"name": name, "arch": arch, **options})
        tag = options["tag"] or f"titan:{name}-{arch}"
        return Built(name, arch, tag, f"sha256:{arch}", 5, 1.5)

    monkeypatch.setattr(building, "build", build)
    return asked
