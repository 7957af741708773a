"""`launcher image build`, inspect, check, lock and sif, against a stand-in for the engine."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from launcher.base.errors import ExitStatus, LauncherError
from launcher.image import build as building
from launcher.image import check as checking
from launcher.image import engine as docker_engine
from launcher.image import lock as locking
from launcher.image import registry
from launcher.image.channels import channels
from launcher.image.check import Checked
from launcher.image.squashfs_file import sidecar_path
from launcher.image.squashfs_tools import Ran
from tests.conftest import ROOT
from tests.unit.image_commands import Api, Run, api, builds, needs_tools, run

__all__ = ["api", "builds", "run"]  # fixtures


# ----------------------------------------------------------------------------------------------------- build


def test_build_prints_the_tag_and_streams_the_progress(run: Run, builds: list[dict[str, Any]]) -> None:
    done = run("build", "cpu", "--base", "debian:12", "--index-url", "https://mirror.example/simple", "--no-cache")
    assert (done.code, done.stdout) == (0, "titan:cpu-amd64\n")
    assert re.search(r"^Step 1/9 : building +amd64$", done.stderr, re.M)
    asked = builds[0]
    assert (asked["name"], asked["arch"], asked["base"]) == ("cpu", "amd64", "debian:12")
    assert (asked["index_url"], asked["no_cache"], asked["lock_file"]) == (
        "https://mirror.example/simple",
        True,
        None,
    )
    assert asked["torch_index"] is None


def test_build_takes_nightly_unless_told_otherwise(run: Run, builds: list[dict[str, Any]]) -> None:
    run("build", "--torch-index", "")
    assert (builds[0]["name"], builds[0]["torch_index"]) == ("nightly", "")


@needs_tools
def test_build_both_architectures_and_convert_them(run: Run, builds: list[dict[str, Any]], workplace: Path) -> None:
    done = run("build", "cpu", "--arch", "all", "-o", ".", "--json")
    images = json.loads(done.stdout)["images"]
    assert [one["squashfs"] for one in images] == ["titan-cpu-amd64.sqsh", "titan-cpu-arm64.sqsh"]
    assert [one["arch"] for one in images] == [one["arch"] for one in builds] == ["amd64", "arm64"]
    for one in images:
        assert sidecar_path(workplace / one["squashfs"]).is_file()

    again = run("build", "cpu", "-o", ".")
    assert again.code == ExitStatus.INVALID and "titan-cpu-amd64.sqsh exists" in again.stderr
    assert len(builds) == 2  # refused before the build, which takes minutes
    done = run("build", "cpu", "-o", ".", "--force")
    assert done.stdout == "titan-cpu-amd64.sqsh\n"
    assert "next: launcher submit --image titan-cpu-amd64.sqsh" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words", "code"),
    [
        (["stabel"], "one of nightly, stable, reference, cpu", ExitStatus.NOT_FOUND),
        (["cpu", "--arch", "all", "--tag", "mine:1"], "takes no --tag", ExitStatus.USAGE),
        (["cpu", "--arch", "all", "-o", "x.sqsh"], "-o has to be a directory", ExitStatus.USAGE),
        (["cpu", "-o", "no/where/"], "mkdir -p no", ExitStatus.FILESYSTEM),
        (["cpu", "--arch", "sparc"], "is not one of", ExitStatus.USAGE),
        (["cpu", "--push", ""], "is not the name of an image", ExitStatus.USAGE),
        (["cpu", "--push", "https://x/titan"], "is not the name of an image", ExitStatus.USAGE),
        (["cpu", "--push", "x.example/Titan"], "is not the name of an image", ExitStatus.USAGE),
        (["cpu", "--push", "x.example/titan:"], "is not the name of an image", ExitStatus.USAGE),
        (["cpu", "--push", "--insecure"], "is not the name of an image", ExitStatus.USAGE),
        (["cpu", "--push", f"x/titan@sha256:{'a' * 64}"], "is not the name of an image", ExitStatus.USAGE),
        (["cpu", "--tag", "Titan Mine"], "is not the name of an image", ExitStatus.USAGE),
        (["cpu", "--tag", f"titan@sha256:{'a' * 64}"], "is not the name of an image", ExitStatus.USAGE),
        (["cpu", "--base", "debian:"], "is not the name of an image", ExitStatus.USAGE),
        (
            ["cpu", "--index-url", "https://me:s3cret@mirror.example/"],
            "would stay in the image",
            ExitStatus.USAGE,
        ),
        (
            ["cpu", "--torch-index", "https://s3cret@mirror.example/"],
            "would stay in the image",
            ExitStatus.USAGE,
        ),
    ],
)
def test_build_refuses_before_it_builds(
    run: Run, builds: list[dict[str, Any]], arguments: list[str], words: str, code: ExitStatus
) -> None:
    done = run("build", *arguments)
    assert words in done.stderr
    assert "s3cret" not in done.stderr
    assert (done.code, done.stdout, builds) == (code, "", [])


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nightly"], {"EXTRA_INDEX_URL": channels()["nightly"].torch_index, "VISIBLE_DEVICES": "all"}),
        (["nightly", "--torch-index", ""], {"EXTRA_INDEX_URL": ""}),  # none: not the channel's
        (["cpu"], {"VISIBLE_DEVICES": "void"}),  # enroot's hook would ask for GPUs
    ],
)
def test_what_the_dockerfile_is_told(
    run: Run, api: Api, workplace: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], told: dict[str, str]
) -> None:
    asked: list[str] = []

    def command(_engine: object, words: list[str], *_: object) -> tuple[int, str]:
        asked.extend(words)
        return 1, "not built here"

    monkeypatch.setattr(docker_engine, "command", command)
    (workplace / "lock.txt").write_text("torch==2.14.1 --hash=sha256:0\n")
    done = run("build", *arguments, "--lock", "lock.txt")
    assert asked, done.stderr
    given = dict(word.removeprefix("--build-arg=").split("=", 1) for word in asked if word.startswith("--build-arg="))
    assert told.items() <= given.items()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"hello\n", "it pins no package"),
        (b"torch==2.14.1\n", "torch has no hash"),
        (b"a==1 --hash=sha256:0\nb==2\n", "b has no hash"),
        (b"\xff\xfe", "it is not text"),
        (None, "there is no lock mine.txt"),
    ],
)
def test_build_refuses_a_lock_that_is_none(
    run: Run, api: Api, workplace: Path, monkeypatch: pytest.MonkeyPatch, text: bytes | None, words: str
) -> None:
    monkeypatch.setattr(docker_engine, "command", None)  # it does not come so far
    if text is not None:
        (workplace / "mine.txt").write_bytes(text)
    done = run("build", "cpu", "--lock", "mine.txt")
    assert done.code == ExitStatus.INVALID
    assert words in done.stderr and "try: launcher image lock cpu --arch amd64" in done.stderr


def test_build_without_mksquashfs_learns_it_first(
    run: Run, builds: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    done = run("build", "cpu", "-o", ".")
    assert "mksquashfs: no such program" in done.stderr and builds == []


def test_an_architecture_that_nothing_here_runs(
    run: Run, builds: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(docker_engine, "emulates", lambda arch: False)
    done = run("build", "cpu", "--arch", "all")
    assert done.code == ExitStatus.ERROR and "qemu-user-static" in done.stderr and builds == []


@dataclass(frozen=True)
class Pushed:
    arch: str
    digest: str
    reference: str


def test_push_makes_one_list_of_what_was_built(
    run: Run, builds: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    listed: list[Any] = []

    def push(tag: str, reference: str, *, engine: Any, say: Any) -> Pushed:
        return Pushed(tag.rpartition("-")[2], f"sha256:of-{tag}", reference)

    def manifest_list(reference: str, pushed: list[Pushed], *, engine: Any, say: Any) -> str:
        listed.append((reference, [one.arch for one in pushed]))
        return "sha256:list"

    monkeypatch.setattr(registry, "push", push)
    monkeypatch.setattr(registry, "manifest_list", manifest_list)
    done = run("build", "cpu", "--arch", "all", "--push", "localhost:5000/titan:cpu")
    assert done.stdout.splitlines()[-1] == "localhost:5000/titan:cpu@sha256:list"
    assert listed == [("localhost:5000/titan:cpu", ["amd64", "arm64"])]


# ----------------------------------------------------------------------------------- inspect, check, lock, sif


def test_inspect_refuses(run: Run, workplace: Path) -> None:
    (workplace / "x.sqsh").write_text("hello")
    assert run("inspect", "x.sqsh").code == ExitStatus.INVALID
    assert "no such file" in run("inspect", "missing.sqsh").stderr.lower()
    assert run("inspect", "x.sqsh", "--driver", "new").code == ExitStatus.USAGE
    assert run("inspect", "x.sqsh", "--gpu", "h800").code == ExitStatus.NOT_FOUND


def test_inspect_of_an_engines_image_names_the_commands_for_it(run: Run, workplace: Path) -> None:
    done = run("inspect", "my:one")
    assert done.code == ExitStatus.INVALID
    assert "launcher image check my:one, or: launcher image convert my:one" in done.stderr
    assert "image convert" not in run("inspect", "./missing.sqsh").stderr


def test_check_of_a_file_that_is_no_image(run: Run, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")  # no chmod either
    (workplace / "x.sqsh").write_bytes(b"hsqs")
    for name, words in (("x.sqsh", "cut off: 4 bytes"), ("missing.sqsh", "No such file")):
        done = run("check", name)
        assert (done.code, words in done.stderr) == (ExitStatus.INVALID, True), done.stderr


def test_check_where_a_program_is_missing_says_which(run: Run, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert "unsquashfs: no such program" in run("check", str(image)).stderr


@pytest.mark.parametrize(
    ("nodes", "code"),
    [
        (["--gpu", "b200"], 0),
        (["--gpu", "b200", "--driver", "580.95.05"], 0),
        (["--gpu", "b200", "--driver", "570.124.06"], ExitStatus.INVALID),
        (["--driver", "570.124.06"], ExitStatus.INVALID),
        (["--gpu", "gb200"], ExitStatus.INVALID),
    ],
)
def test_inspect_compares_with_the_nodes(run: Run, image: Path, nodes: list[str], code: int) -> None:
    about = json.loads(sidecar_path(image).read_text())
    about |= {"arch": "amd64", "driver_min": "580", "sm": ["sm_100"]}
    about["versions"] |= {"cuda": "13.0"}
    sidecar_path(image).write_text(json.dumps(about))
    assert run("inspect", str(image)).code == 0
    done = run("inspect", str(image), *nodes)
    assert done.code == code
    assert ("problem: " in done.stdout) == bool(code)
    assert re.search(r"^  driver +580 or newer$", done.stdout, re.M)


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("skipped", 0), ("failed", ExitStatus.INVALID)])
def test_check_has_a_line_for_each(run: Run, monkeypatch: pytest.MonkeyPatch, status: str, code: int) -> None:
    limits = []

    def check(image: str, *, timeout_s: float) -> list[Checked]:
        limits.append(timeout_s)
        return [Checked("torch", "ok", "2.13.0"), Checked("one NCCL", status, "two\x1b[31m")]

    monkeypatch.setattr(checking, "check", check)
    done = run("check", "titan:cpu-amd64", "--timeout", "60")
    assert done.stdout.splitlines() == ["ok       torch     2.13.0", f"{status:7}  one NCCL  two?[31m"]
    assert (done.code, limits) == (code, [60])
    done = run("check", "titan:cpu-amd64", "--json")
    value = json.loads(done.stdout)
    assert (done.code, value["ok"]) == (code, code == 0)
    assert value["checks"][0] == {"name": "torch", "status": "ok", "found": "2.13.0"}


def test_lock_makes_both_architectures_unless_told_otherwise(
    run: Run, monkeypatch: pytest.MonkeyPatch, workplace: Path
) -> None:
    def lock(name: str, arch: str, *, torch_index: str | None, output: Path | None, say: Any) -> Path:
        path = output or Path(f"{name}-{arch}.txt")
        path.write_text("torch==2.14.1 \\\n    --hash=sha256:0\n")
        return path

    monkeypatch.setattr(locking, "lock", lock)
    assert run("lock", "stable").stdout.split() == ["stable-amd64.txt", "stable-arm64.txt"]
    value = json.loads(run("lock", "stable", "--arch", "arm64", "-o", "mine.txt", "--json").stdout)
    assert value == [{"channel": "stable", "arch": "arm64", "path": "mine.txt", "packages": {"torch": "2.14.1"}}]
    assert run("lock", "stable", "-o", "mine.txt").code == ExitStatus.USAGE
    assert run("lock", "stable", "--arch", "arm64", "-o", ".").code == ExitStatus.USAGE


def test_sif(run: Run, monkeypatch: pytest.MonkeyPatch, workplace: Path) -> None:
    def sif(squashfs: Path, output: Path, *, say: Any) -> Path:
        output.write_bytes(b"SIF")
        return output

    monkeypatch.setattr("launcher.commands.image.sif", sif)
    (workplace / "titan-cpu-amd64.sqsh").touch()
    assert run("sif", "titan-cpu-amd64.sqsh").stdout == "titan-cpu-amd64.sif\n"
    assert run("sif", "titan-cpu-amd64.sqsh").code == ExitStatus.INVALID
    value = json.loads(run("sif", "titan-cpu-amd64.sqsh", "-o", "x.sif", "--json").stdout)
    assert value == {"path": "x.sif", "bytes": 3}
    for arguments, words in ((["x.sqsh", "--recipe"], "make a squashfs"), (["titan:x"], "image convert titan:x")):
        gone = run("sif", *arguments)
        assert gone.code == ExitStatus.USAGE and words in gone.stderr


def test_no_engine(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def connect() -> None:
        raise LauncherError(
            "docker-silent", "no Docker engine answers", "sudo systemctl start docker", status=ExitStatus.ERROR
        )

    monkeypatch.setattr(docker_engine, "connect", connect)
    for arguments in (["build", "cpu"], ["convert", "titan:cpu-amd64"], ["check", "titan:cpu-amd64"]):
        done = run(*arguments)
        assert (done.code, done.stdout) == (ExitStatus.ERROR, "")
        assert "try: sudo systemctl start docker" in done.stderr


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_make_image_is_one_command_for_any_channel_and_architecture() -> None:
    def planned(*variables: str) -> str:
        command = ["make", "--dry-run", "VENV=/nonexistent/venv", "image", *variables]
        environment = {name: value for name, value in os.environ.items() if name not in ("CHANNEL", "ARCH")}
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout

    assert "/launcher image build 'nightly'  --output . --force" in planned()
    assert "build 'cpu' --arch 'all' --output . --force --network host" in planned(
        "CHANNEL=cpu", "ARCH=all", "BUILD_FLAGS=--network host"
    )
    assert "torch" not in planned("CHANNEL=cpu").replace("torchtitan", "")


def test_a_failed_step_whose_command_is_printed_is_not_taken_for_the_wrong_architecture() -> None:
    names = {"channel": "stable", "arch": "amd64", "base": "debian:12", "lock": "stable-amd64.txt"}
    printed = 'The command \'/bin/sh -c if [ ! -e "$lock" ]; then echo "no lock: containers/locks/${lock##*/}"\' failed'
    assert "is not for amd64" not in building._explain(printed, **names).what
    assert "is not for amd64" in building._explain("no lock: containers/locks/stable-arm64.txt", **names).what


def test_an_emulator_that_crashes_is_named() -> None:
    names = {"channel": "stable", "arch": "arm64", "base": "debian:12", "lock": "stable-arm64.txt"}
    error = building._explain("qemu: uncaught target signal 11 (Segmentation fault) - core dumped", **names)
    assert "the emulator" in error.what and "qemu 10" in error.fix


def test_a_machine_without_user_namespaces_is_found_out_before_anything_is_unpacked(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Ubuntu 24.04: namespaces can be made, but nothing can be mounted in them."""

    def refuse(command: list[str], *_: object, **__: object) -> Ran:
        assert command[0] == "unshare" and "mount" in command and "--map-root-user" in command
        return Ran(32, b"", "mount: /tmp: permission denied.", False)

    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(checking, "run", refuse)
    with pytest.raises(LauncherError, match="does not let you make") as error:
        checking.check(str(image))
    assert "sudo launcher image check" in error.value.fix and "permission denied" in error.value.original
