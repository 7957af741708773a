"""`launcher image`, against a stand-in for docker-py's calls."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import Mock

import pytest

from launcher import cli
from launcher.base.errors import ExitStatus, LauncherError
from launcher.base.output import print_error
from launcher.commands.image import image as group
from launcher.commands.image import is_reference
from launcher.image import build as building
from launcher.image import check as checking
from launcher.image import engine as docker_engine
from launcher.image import lock as locking
from launcher.image import registry
from launcher.image.channels import channels
from launcher.image.check import Checked
from launcher.image.registry import Pushed
from launcher.image.squashfs_file import sidecar_path, superblock
from launcher.image.squashfs_tools import Ran
from tests.conftest import ROOT, Launch
from tests.image.converter import VERSIONS, needs_tools
from tests.unit.image_commands import Api, Run, api, builds, exported, run

__all__ = ["api", "builds", "run"]  # fixtures


def files(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.is_file()]


class Refusal(NamedTuple):
    command: str
    words: str
    code: ExitStatus


USAGE, INVALID = ExitStatus.USAGE, ExitStatus.INVALID
FILESYSTEM, NOT_FOUND = ExitStatus.FILESYSTEM, ExitStatus.NOT_FOUND
DIGEST = f"@sha256:{'a' * 64}"


@pytest.mark.parametrize(
    "case",
    [
        Refusal("build stabel", "one of nightly, stable, reference, cpu", NOT_FOUND),
        Refusal("build cpu --arch all --tag mine:1", "--tag and --lock cannot be used", USAGE),
        Refusal("build cpu --arch all -o x.sqsh", "-o must be a directory", USAGE),
        Refusal("build cpu -o no/where/", "mkdir -p no", FILESYSTEM),
        Refusal("build cpu --arch sparc", "is not one of", USAGE),
        Refusal("build cpu --base debian:", "is not the name of an image", USAGE),
        Refusal(f"build cpu --tag titan{DIGEST}", "is not the name of an image", USAGE),
        Refusal("build cpu --tag Titan", "is not the name of an image", USAGE),
        Refusal("build cpu --push ", "is not the name of an image", USAGE),
        Refusal("build cpu --push https://x/titan", "is not the name of an image", USAGE),
        Refusal("build cpu --push x.example/Titan", "is not the name of an image", USAGE),
        Refusal("build cpu --push x.example/titan:", "is not the name of an image", USAGE),
        Refusal("build cpu --push --insecure", "is not the name of an image", USAGE),
        Refusal(f"build cpu --push x/titan{DIGEST}", "is not the name of an image", USAGE),
        Refusal("build cpu --index-url https://me:s3cret@mirror.example/", "would stay readable in the image", USAGE),
        Refusal("build cpu --torch-index https://s3cret@mirror.example/", "would stay readable in the image", USAGE),
        Refusal("build cpu --lock none.txt", "there is no lock none.txt", INVALID),
        Refusal("build cpu --lock x.sqsh", "it pins no package", INVALID),
        Refusal("build cpu --lock binary.txt", "it is not text", INVALID),
        Refusal("build cpu --lock bare.txt", "b has no hash", INVALID),
        Refusal("convert titan:cpu-amd64 -o no/where/x.sqsh", "mkdir -p no/where", FILESYSTEM),
        Refusal("convert titan:cpu-amd64 -o pipe --force", "pipe is not a file", INVALID),
        Refusal("convert titan:cpu-amd64 -o x.txt", "x.txt exists", INVALID),
        Refusal("convert titan:cpu-amd64 --force -o x.txt/", "x.txt/: no such directory", FILESYSTEM),
        Refusal("convert titan:cpu-amd64 -o nowhere/", "nowhere/: no such directory", FILESYSTEM),
        Refusal("convert other:1", "name the file with -o FILE", USAGE),
        Refusal("convert nothing:1", "has no image 'nothing:1'", NOT_FOUND),
        Refusal("convert titan:cpu-amd64 --with enroot", "--with is gone", USAGE),
        Refusal("convert ../../containers/json", "is not the name of an image", USAGE),
        Refusal("convert titan:x?all=1", "is not the name of an image", USAGE),
        Refusal("convert ", "is not the name of an image", USAGE),
        Refusal("check ", "the path is empty", USAGE),
        Refusal("check short.sqsh", "cut off: 4 bytes", INVALID),
        Refusal("check missing.sqsh", "No such file", INVALID),
        Refusal("inspect x.txt", "not a squashfs", INVALID),
        Refusal("inspect missing.sqsh", "No such file", INVALID),
        Refusal("inspect x.sqsh --driver new", "is not a version", USAGE),
        Refusal("inspect x.sqsh --gpu h800", "h800", NOT_FOUND),
        Refusal("inspect my:one", "launcher image check my:one, or: launcher image convert my:one", INVALID),
        Refusal("sif my:one", "launcher image convert my:one", USAGE),
        Refusal("sif x.sqsh --recipe", "make a squashfs", USAGE),
        Refusal("lock stable -o mine.txt", "-o names one file", USAGE),
        Refusal("lock stable --arch arm64 -o .", "is a directory", USAGE),
    ],
    ids=lambda case: case.command,
)
def test_what_is_refused_is_refused_before_anything_is_made(
    run: Run, api: Api, workplace: Path, monkeypatch: pytest.MonkeyPatch, case: Refusal
) -> None:
    monkeypatch.setattr(docker_engine, "command", None)  # it does not come so far
    os.mkfifo(workplace / "pipe")
    texts = {"x.txt": b"mine", "short.sqsh": b"hsqs", "x.sqsh": b"hello", "binary.txt": b"\xff"}
    texts["bare.txt"] = b"a==1 --hash=sha256:0\nb==2\n"
    for name, text in texts.items():
        (workplace / name).write_bytes(text)
    done = run(*case.command.split(" "))
    assert case.words in done.stderr and "s3cret" not in done.stderr
    assert (done.code, done.stdout) == (case.code, "")
    assert {name: (workplace / name).read_bytes() for name in files(workplace)} == texts
    assert api.containers == []


@pytest.mark.parametrize(
    "name",
    [
        "titan:cpu-amd64",
        "localhost:5000/team/titan",
        "Registry.example.com/a_b/c--d:X.1",
        "0123456789ab",
        f"titan{DIGEST}",
        DIGEST[1:],
        "[::1]:5000/titan:x",
    ],
)
def test_names_that_an_engine_takes(name: str) -> None:
    assert is_reference(name)


# ------------------------------------------------------------------------------------------------------ help


@pytest.mark.parametrize("name", group.commands)
def test_every_command_explains_itself_with_an_example(run: Run, name: str) -> None:
    done = run(name, "--help")
    assert done.code == 0
    assert "--json" in done.stdout and f"\n  launcher image {name}" in done.stdout
    if name in ("build", "lock"):
        listed = re.findall(r"^ +(\w+)  ", done.stdout.partition("Channels:\n")[2], re.M)
        assert listed == ["nightly", "stable", "reference", "cpu"]


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("image in", "plain,inspect"),
        ("image build st", "plain,stable"),
        ("image inspect x.sqsh --gpu gb2", "plain,gb200"),
        ("image check ti", "file,ti"),
        ("image convert titan:cpu-amd64 -o /da", "file,/da"),
    ],
)
def test_shell_completion(launch: Launch, typed: str, expected: str) -> None:
    words = {"COMP_WORDS": f"launcher {typed}", "COMP_CWORD": str(len(typed.split()))}
    assert launch(_LAUNCHER_COMPLETE="bash_complete", **words).stdout.split() == [expected]


# ----------------------------------------------------------------------------------------------------- build


def test_build_hands_its_options_on_and_prints_the_tag(run: Run, builds: list[dict[str, Any]]) -> None:
    done = run("build", "cpu", "--base", "debian:12", "--index-url", "https://mirror.example/simple", "--no-cache")
    assert (done.code, done.stdout) == (0, "titan:cpu-amd64\n")
    run("build", "--torch-index", "", "--network", "host")
    none: dict[str, Any] = {"tag": "", "base": "", "lock_file": None, "torch_index": None}
    none |= {"index_url": "", "network": "", "no_cache": False}
    mirror = {"base": "debian:12", "index_url": "https://mirror.example/simple", "no_cache": True}
    assert builds == [
        none | {"name": "cpu", "arch": "amd64"} | mirror,
        none | {"name": "nightly", "arch": "amd64", "torch_index": "", "network": "host"},
    ]


@needs_tools
def test_build_both_architectures_and_convert_them(run: Run, builds: list[dict[str, Any]], workplace: Path) -> None:
    images = json.loads(run("build", "cpu", "--arch", "all", "-o", ".", "--json").stdout)["images"]
    assert [one["squashfs"] for one in images] == ["titan-cpu-amd64.sqsh", "titan-cpu-arm64.sqsh"]
    assert [one["arch"] for one in images] == [one["arch"] for one in builds] == ["amd64", "arm64"]
    for one in images:
        assert sidecar_path(workplace / one["squashfs"]).is_file()

    again = run("build", "cpu", "-o", ".")
    assert again.code == INVALID and "titan-cpu-amd64.sqsh exists" in again.stderr
    assert len(builds) == 2  # refused before the build, which takes minutes
    done = run("build", "cpu", "-o", ".", "--force")
    assert done.stdout == "titan-cpu-amd64.sqsh\n"
    assert "next: launcher submit --image titan-cpu-amd64.sqsh" in done.stderr


def test_build_without_mksquashfs_learns_it_first(
    run: Run, builds: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    done = run("build", "cpu", "-o", ".")
    assert "mksquashfs: No such file" in done.stderr and builds == []


def test_an_architecture_that_nothing_here_runs(
    run: Run, builds: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(docker_engine, "emulator", lambda arch: "")
    done = run("build", "cpu", "--arch", "all")
    assert done.code == ExitStatus.ERROR and "qemu-user-static" in done.stderr and builds == []


def test_push_makes_one_list_of_what_was_built(
    run: Run, builds: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    listed: list[Any] = []

    def push(tag: str, reference: str, *, engine: Any) -> Pushed:
        return Pushed(tag.rpartition("-")[2], f"sha256:of-{tag}", reference)

    def manifest_list(reference: str, pushed: list[Pushed], *, engine: Any) -> str:
        listed.append((reference, [one.arch for one in pushed]))
        return "sha256:list"

    monkeypatch.setattr(registry, "push", push)
    monkeypatch.setattr(registry, "manifest_list", manifest_list)
    done = run("build", "cpu", "--arch", "all", "--push", "localhost:5000/titan:cpu")
    assert done.stdout.splitlines()[-1] == "localhost:5000/titan:cpu@sha256:list"
    assert listed == [("localhost:5000/titan:cpu", ["amd64", "arm64"])]


def test_no_engine(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = LauncherError("docker-silent", "no", "sudo systemctl start docker", status=ExitStatus.ERROR)
    monkeypatch.setattr(docker_engine, "connect", Mock(side_effect=refused))
    for arguments in (["build", "cpu"], ["convert", "titan:cpu-amd64"], ["check", "titan:cpu-amd64"]):
        done = run(*arguments)
        assert (done.code, done.stdout) == (ExitStatus.ERROR, "")
        assert "try: sudo systemctl start docker" in done.stderr


# --------------------------------------------------------------------------------------------------- convert


@needs_tools
def test_convert_and_inspect(run: Run, api: Api, workplace: Path) -> None:
    done = run("convert", "titan:cpu-amd64")
    assert (done.code, done.stdout) == (0, "titan-cpu-amd64.sqsh\n")
    assert "converting titan:cpu-amd64" in done.stderr and "sha256" in done.stderr
    assert api.containers == []
    path = workplace / "titan-cpu-amd64.sqsh"
    assert superblock(path).compressor == "zstd"

    text = run("inspect", path.name).stdout
    assert re.search(r"^  architecture +x86_64$", text, re.M)
    assert re.search(r"^  torch +2\.13\.0\+cpu$", text, re.M)
    assert re.search(r"^  cuda +none$", text, re.M)
    assert re.search(r"^  known from +titan-cpu-amd64\.sqsh\.json$", text, re.M)

    value = json.loads(run("inspect", path.name, "--json").stdout)
    found = (value["arch"], value["channel"], value["source"], value["problems"])
    assert found == ("x86_64", "cpu", "sidecar", [])

    assert run("inspect", path.name, "--gpu", "cpu").code == 0
    refused = run("inspect", path.name, "--gpu", "gb200")
    assert refused.code == INVALID
    assert "the image is for x86_64, the GPU profile for aarch64" in refused.stdout
    assert "built without CUDA" in refused.stdout and "try: launcher image build" in refused.stdout
    refused = run("inspect", path.name, "--driver", "580.95.05", "--json")
    assert refused.code == INVALID
    assert [problem["what"] for problem in json.loads(refused.stdout)["problems"]] == [
        "torch 2.13.0+cpu in the image is built without CUDA"
    ]


@needs_tools
def test_convert_as_json_for_a_cluster_that_mounts(run: Run, api: Api, workplace: Path) -> None:
    value = json.loads(run("convert", "other:1", "-o", "x.sqsh", "--for", "mount", "--json").stdout)
    assert value["path"] == "x.sqsh"
    assert value["squashfs"]["compressor"] == "lz4"
    assert value["versions"] == VERSIONS


@needs_tools
def test_convert_into_a_folder_replaces_what_is_there_when_told_to(run: Run, api: Api, workplace: Path) -> None:
    path = workplace / "images" / "titan-cpu-amd64.sqsh"
    path.parent.mkdir()
    path.write_text("mine")
    assert run("convert", "titan:cpu-amd64", "-o", "images", "--force").stdout == "images/titan-cpu-amd64.sqsh\n"
    assert superblock(path).inodes > 1


class BrokenOff(NamedTuple):
    stream: bytes
    code: ExitStatus
    words: str
    then: Callable[[], BaseException] | None = None


def died() -> BaseException:
    from requests.exceptions import ChunkedEncodingError

    return ChunkedEncodingError("the engine died")


WHOLE = exported(5_000_000)


@needs_tools
@pytest.mark.parametrize(
    "case",
    [
        BrokenOff(WHOLE[:3_000_000], ExitStatus.ERROR, "incomplete or damaged"),
        BrokenOff(WHOLE[:3_000_000], ExitStatus.ERROR, "stopped answering", died),
        BrokenOff(WHOLE[:3_000_000], ExitStatus.INTERRUPTED, "", KeyboardInterrupt),
        BrokenOff(exported(9, "../out"), INVALID, "a name that leads out of it: '../out'"),
    ],
    ids=["cut", "died", "Ctrl-C", "strange"],
)
def test_a_conversion_that_breaks_off_leaves_neither_a_file_nor_a_container(
    run: Run, api: Api, workplace: Path, monkeypatch: pytest.MonkeyPatch, case: BrokenOff
) -> None:
    """The engine would keep the container for ever."""
    seen: list[list[str]] = []

    def show(error: LauncherError) -> None:
        seen.append(list(api.containers))
        print_error(error)

    monkeypatch.setattr(cli, "print_error", show)
    api.stream, api.then = case.stream, case.then
    done = run("convert", "titan:cpu-amd64")
    assert done.code == case.code and case.words in done.stderr
    assert (files(workplace), api.containers) == ([], [])
    assert all(containers == [] for containers in seen)  # gone before the error is printed


@needs_tools
def test_a_container_that_cannot_be_made(run: Run, api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    from docker.errors import APIError

    refuse = Mock(side_effect=APIError("no space left on device"))
    monkeypatch.setattr(api, "create_container", refuse, raising=False)
    done = run("convert", "titan:cpu-amd64")
    assert "makes no container" in done.stderr and "no space left" in done.stderr and "damaged" not in done.stderr


def test_ctrl_c_while_the_engine_makes_the_container(run: Run, api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    made = api.create_container
    answered = []

    def create_container(*arguments: Any, **options: Any) -> dict[str, str]:
        signal.raise_signal(signal.SIGINT)
        answered.append(made(*arguments, **options))  # the engine makes it, whatever happens to its caller
        return answered[0]

    monkeypatch.setattr(api, "create_container", create_container, raising=False)
    assert run("convert", "titan:cpu-amd64").code == ExitStatus.INTERRUPTED
    assert (len(answered), api.containers) == (1, [])


@needs_tools
@pytest.mark.parametrize("name", ["--output=~/x.sqsh", "--output=~/folder/"])
def test_the_home_directory_in_a_path_that_no_shell_expanded(run: Run, api: Api, workplace: Path, name: str) -> None:
    home = workplace / "home"
    (home / "folder").mkdir()
    path = Path(run("convert", "titan:cpu-amd64", name).stdout.strip())
    assert path.is_file() and home in path.parents
    assert "x86_64" in run("inspect", str(path).replace(str(home), "~")).stdout


# ----------------------------------------------------------------------------------- inspect, check, lock, sif


@pytest.mark.parametrize(
    ("nodes", "code"),
    [
        (["--gpu", "b200"], 0),
        (["--gpu", "b200", "--driver", "580.95.05"], 0),
        (["--gpu", "b200", "--driver", "570.124.06"], INVALID),
        (["--driver", "570.124.06"], INVALID),
        (["--gpu", "gb200"], INVALID),
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


def test_check_where_a_program_is_missing_says_which(run: Run, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert "unsquashfs: No such file" in run("check", str(image)).stderr


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("skipped", 0), ("failed", INVALID)])
def test_check_has_a_line_for_each(run: Run, monkeypatch: pytest.MonkeyPatch, status: str, code: int) -> None:
    limits = []

    def check(image: str, *, timeout_s: float) -> list[Checked]:
        limits.append(timeout_s)
        return [Checked("torch", "ok", "2.13.0"), Checked("one NCCL", status, "two\x1b[31m")]

    monkeypatch.setattr(checking, "check", check)
    done = run("check", "titan:cpu-amd64", "--timeout", "60")
    assert done.stdout.splitlines() == ["ok       torch     2.13.0", f"{status:7}  one NCCL  two?[31m"]
    assert (done.code, limits) == (code, [60])
    value = json.loads(run("check", "titan:cpu-amd64", "--json").stdout)
    assert value["ok"] == (code == 0)
    assert value["checks"][0] == {"name": "torch", "status": "ok", "found": "2.13.0"}


def test_lock_makes_both_architectures_unless_told_otherwise(
    run: Run, monkeypatch: pytest.MonkeyPatch, workplace: Path
) -> None:
    def lock(name: str, arch: str, *, torch_index: str | None, output: Path | None) -> Path:
        path = output or Path(f"{name}-{arch}.txt")
        path.write_text("torch==2.14.1 \\\n    --hash=sha256:0\n")
        return path

    monkeypatch.setattr(locking, "lock", lock)
    assert run("lock", "stable").stdout.split() == ["stable-amd64.txt", "stable-arm64.txt"]
    value = json.loads(run("lock", "stable", "--arch", "arm64", "-o", "mine.txt", "--json").stdout)
    assert value == [{"channel": "stable", "arch": "arm64", "path": "mine.txt", "packages": {"torch": "2.14.1"}}]


def test_sif(run: Run, monkeypatch: pytest.MonkeyPatch, workplace: Path) -> None:
    def sif(squashfs: Path, output: Path) -> Path:
        output.write_bytes(b"SIF")
        return output

    monkeypatch.setattr("launcher.commands.image.sif", sif)
    (workplace / "titan-cpu-amd64.sqsh").touch()
    assert run("sif", "titan-cpu-amd64.sqsh").stdout == "titan-cpu-amd64.sif\n"
    assert run("sif", "titan-cpu-amd64.sqsh").code == INVALID
    value = json.loads(run("sif", "titan-cpu-amd64.sqsh", "-o", "x.sif", "--json").stdout)
    assert value == {"path": "x.sif", "bytes": 3}


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


class Said(NamedTuple):
    by_the_build: str
    what: str
    fix: str = ""


STEP = 'The command \'/bin/sh -c if [ ! -e "$lock" ]; then echo "no lock: containers/locks/${lock##*/}"\' failed'


@pytest.mark.parametrize(
    "case",
    [
        Said(STEP, "the build of channel stable for arm64 failed"),  # the engine prints a failed step's command
        Said("no lock: containers/locks/stable-amd64.txt", "the base image debian:12 is not for arm64"),
        Said("qemu: uncaught target signal 11 (Segmentation fault) - core dumped", "the emulator of arm64", "qemu 10"),
        Said("write /x: no space left on device", "the disk of the Docker engine is full", "docker system prune"),
        Said("Cannot connect to the Docker daemon at unix:///x", "stopped answering", "systemctl status docker"),
    ],
    ids=lambda case: case.what,
)
def test_why_a_build_failed(case: Said) -> None:
    error = building._explain(case.by_the_build, "stable", "arm64", "debian:12", Path("stable-arm64.txt"))
    assert case.what in error.what and case.fix in error.fix and error.original == case.by_the_build


def test_an_old_emulator_is_named_before_the_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    qemu, lock = tmp_path / "qemu-aarch64-static", tmp_path / "lock.txt"
    qemu.write_text("#!/bin/sh\necho qemu-aarch64 version $QEMU.22 '(Debian 1:7.2+dfsg)'\n")
    qemu.chmod(0o755)
    lock.write_text("six==1.17.0 --hash=sha256:0\n")
    (tmp_path / "qemu-aarch64").write_text(f"enabled\ninterpreter {qemu}\nflags: OCF\n")
    monkeypatch.setattr(docker_engine, "BINFMT", tmp_path)
    monkeypatch.setattr(docker_engine, "command", lambda *_: (1, "qemu: uncaught target signal 11"))
    engine = docker_engine.Engine(None, "unix:///x", "20.10", "amd64", "Debian")
    for version, warned in (("7.2", True), ("10.0", False)):
        monkeypatch.setenv("QEMU", version)
        with pytest.raises(LauncherError, match="the emulator of arm64 crashed"):
            building.build("stable", "arm64", engine=engine, lock_file=lock)
        assert ("warning: the emulator of arm64 is qemu 7: " in capsys.readouterr().err) == warned
    qemu.unlink()
    assert docker_engine.emulator_version("arm64") == 0  # as where it is in a container alone


def test_a_base_by_digest_and_the_repository_of_ci_are_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lock.txt").write_text("torch==2.14.1 --hash=sha256:0\n")
    monkeypatch.delenv("GITHUB_REPOSITORY", raising=False)
    plain = {f"org.opencontainers.image.{key}" for key in ("base.name", "version")}
    assert building.labels("debian:12", tmp_path / "lock.txt").keys() == plain
    monkeypatch.setenv("GITHUB_REPOSITORY", "owner/name")
    found = building.labels("debian:12@sha256:ab", tmp_path / "lock.txt")
    assert [found[f"org.opencontainers.image.{key}"] for key in ("base.name", "base.digest", "source")] == [
        *("debian:12", "sha256:ab", "https://github.com/owner/name"),
    ]


def test_a_machine_without_user_namespaces_is_found_out_before_anything_is_unpacked(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Ubuntu 24.04: namespaces can be made, but nothing can be mounted in them."""

    def refuse(command: list[str], *_: object, **__: object) -> Ran:
        assert command[0] == "unshare" and "mount" in command and "--map-root-user" in command
        return Ran(32, b"", "mount: /tmp: permission denied.", False)

    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(checking, "run", refuse)
    with pytest.raises(LauncherError, match="does not let you create") as error:
        checking.check(str(image))
    assert "sudo launcher image check" in error.value.fix and "permission denied" in error.value.original


def test_what_the_dockerfile_is_told() -> None:
    """The values alone: tests/image/test_build.py builds with them."""
    nightly, cpu = channels()["nightly"], channels()["cpu"]
    told = building.build_arguments(nightly)
    assert (told["EXTRA_INDEX_URL"], told["VISIBLE_DEVICES"]) == (nightly.torch_index, "all")
    assert building.build_arguments(nightly, index="")["EXTRA_INDEX_URL"] == ""  # none: not the channel's
    assert building.build_arguments(cpu)["VISIBLE_DEVICES"] == "void"  # enroot's hook would ask for GPUs
