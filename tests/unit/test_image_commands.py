"""`launcher image ...` as a user types it. Where a Docker engine would be, a stand-in answers what an engine answers."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launcher import cli
from launcher.errors import ExitStatus, LauncherError
from launcher.image import build as building
from launcher.image import check as checking
from launcher.image import engine as docker_engine
from launcher.image import lock as locking
from launcher.image import registry
from launcher.image.build import Built
from launcher.image.channels import channel
from launcher.image.check import Checked
from launcher.image.commands import COMMANDS
from launcher.image.parameters import is_reference
from launcher.image.squashfs_file import sidecar_path, superblock
from tests.conftest import ROOT, Launch

needs_tools = pytest.mark.skipif(
    not (shutil.which("mksquashfs") and shutil.which("unsquashfs")), reason="needs squashfs-tools"
)
ABOUT = {
    "schema": 1, "channel": "cpu", "arch": "amd64", "driver_min": None, "sm": [], "created": "2026-01-01T00:00:00Z",
    "versions": {"python": "3.11.2", "torch": "2.13.0+cpu", "cuda": None, "nccl": None, "torchtitan": "0.3.0"},
}  # fmt: skip


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
    shell = b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x03\x00" + (62).to_bytes(2, "little") + bytes(44)
    files = {"bin/sh": shell, "etc/titan-image.json": json.dumps(about).encode(), name: bytes(size)}
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for path, data in files.items():
            info = tarfile.TarInfo(path)
            info.size, info.mode = len(data), 0o755
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


@dataclass
class Api:
    """The calls of docker-py that a conversion makes."""

    images: dict[str, dict[str, Any]]
    stream: bytes
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
        {
            "titan:cpu-amd64": inspected(),
            "titan:cpu-arm64": inspected("arm64"),
            "other:1": inspected(title=""),
        },
        exported(ABOUT),
    )
    engine = docker_engine.Engine(
        SimpleNamespace(api=found), "unix:///made-up.sock", "28.0", "amd64", "Debian"
    )
    monkeypatch.setattr(docker_engine, "connect", lambda: engine)
    monkeypatch.setattr(docker_engine, "emulator", lambda arch: "ready")
    return found


@pytest.fixture
def builds(api: Api, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What was asked to be built; the images are there already."""
    asked: list[dict[str, Any]] = []

    def build(name: str, arch: str, *, engine: Any, say: Callable[[str], None], **options: Any) -> Built:
        asked.append({"name": name, "arch": arch, **options})
        say(f"Step 1/9 : building\t{arch}")
        tag = options["tag"] or f"titan:{name}-{arch}"
        return Built(name, arch, tag, f"sha256:{arch}", 5, 1.5)

    monkeypatch.setattr(building, "build", build)
    return asked


# ------------------------------------------------------------------------------------------------------ help


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself_with_an_example(run: Run, name: str) -> None:
    done = run(name, "--help")
    assert done.code == 0
    assert "--json" in done.stdout
    assert f"\n  launcher image {name}" in done.stdout


@pytest.mark.parametrize("name", ["build", "lock"])
def test_help_lists_the_channels(run: Run, name: str) -> None:
    listed = run(name, "--help").stdout.partition("Channels:\n")[2]
    assert re.findall(r"^  (\w+)  ", listed, re.M) == ["nightly", "stable", "reference", "cpu"]


def test_the_group_is_in_the_launchers_help_and_not_imported_for_it(workplace: Path) -> None:
    script = "import sys; from launcher.cli import launcher; launcher.main(['--help'], standalone_mode=False); print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert re.search(r"^  image +Build, convert", out, re.M)
    assert "launcher.image" not in out.splitlines()[-1].split()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["image", "in"], "plain,inspect"),
        (["image", "build", "st"], "plain,stable"),
        (["image", "lock", "n"], "plain,nightly"),
        (["image", "inspect", "x.sqsh", "--gpu", "gb2"], "plain,gb200"),
        (["image", "check", "ti"], "file,ti"),
        (["image", "convert", "titan:cpu-amd64", "-o", "/da"], "file,/da"),
    ],
)
def test_shell_completion(launch: Launch, words: list[str], expected: str) -> None:
    typed = ["launcher", *words]
    environment = {
        "_LAUNCHER_COMPLETE": "bash_complete", "COMP_WORDS": " ".join(typed), "COMP_CWORD": str(len(typed) - 1)
    }  # fmt: skip
    assert launch(**environment).stdout.split() == [expected]


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
    assert (value["arch"], value["channel"], value["source"], value["problems"]) == (
        "x86_64",
        "cpu",
        "sidecar",
        [],
    )

    assert run("inspect", path.name, "--gpu", "cpu").code == 0
    refused = run("inspect", path.name, "--gpu", "gb200")
    assert refused.code == ExitStatus.INVALID
    assert "the image is for x86_64, the nodes are aarch64" in refused.stdout
    assert "built without CUDA" in refused.stdout and "try: launcher image build" in refused.stdout
    refused = run("inspect", path.name, "--driver", "580.95.05", "--json")
    assert refused.code == ExitStatus.INVALID
    assert [problem["what"] for problem in json.loads(refused.stdout)["problems"]] == [
        "torch 2.13.0+cpu in the image is built without CUDA"
    ]


@needs_tools
def test_convert_as_json_for_a_cluster_that_mounts(run: Run, api: Api, workplace: Path) -> None:
    value = json.loads(run("convert", "other:1", "-o", "x.sqsh", "--for", "mount", "--json").stdout)
    assert value["path"] == "x.sqsh"
    assert value["squashfs"]["compressor"] == "lz4"
    assert value["versions"] == ABOUT["versions"]


@needs_tools
def test_convert_replaces_a_file_only_when_told_to(run: Run, api: Api, workplace: Path) -> None:
    folder = workplace / "images"
    folder.mkdir()
    path = folder / "titan-cpu-amd64.sqsh"
    path.write_text("mine")
    refused = run("convert", "titan:cpu-amd64", "-o", "images")
    assert refused.code == ExitStatus.INVALID
    assert f"{path.relative_to(workplace)} exists" in refused.stderr and "--force" in refused.stderr
    assert path.read_text() == "mine" and not sidecar_path(path).exists()
    assert (
        run("convert", "titan:cpu-amd64", "-o", "images", "--force").stdout == "images/titan-cpu-amd64.sqsh\n"
    )
    assert superblock(path).inodes > 1


@pytest.mark.parametrize(
    ("arguments", "words", "code"),
    [
        (["titan:cpu-amd64", "-o", "no/where/x.sqsh"], "try: mkdir -p no/where", ExitStatus.FILESYSTEM),
        (["titan:cpu-amd64", "-o", "pipe", "--force"], "pipe is not a file", ExitStatus.INVALID),
        (["other:1"], "name the file with -o FILE", ExitStatus.USAGE),
        (["nothing:1"], "has no image 'nothing:1'", ExitStatus.NOT_FOUND),
    ],
)
def test_convert_refuses(
    run: Run, api: Api, workplace: Path, arguments: list[str], words: str, code: ExitStatus
) -> None:
    os.mkfifo(workplace / "pipe")
    done = run("convert", *arguments)
    assert words in done.stderr
    assert (done.code, done.stdout) == (code, "")
    assert [path.name for path in workplace.iterdir() if path.is_file()] == []


@needs_tools
def test_an_export_that_breaks_off_leaves_neither_a_file_nor_a_container(
    run: Run, api: Api, workplace: Path
) -> None:
    api.stream = exported(ABOUT, 5_000_000)[:3_000_000]
    done = run("convert", "titan:cpu-amd64")
    assert done.code == ExitStatus.ERROR and "incomplete or damaged" in done.stderr
    assert [path.name for path in workplace.iterdir() if path.is_file()] == []
    assert api.containers == []


@needs_tools
def test_the_container_is_gone_before_the_error_is_printed(
    run: Run, api: Api, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine would keep it for ever."""
    seen: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(cli, "print_error", lambda error: seen.append((error.what, list(api.containers))))
    api.stream = exported(ABOUT, 5_000_000, name="../out")
    assert run("convert", "titan:cpu-amd64").code == ExitStatus.INVALID
    assert seen == [("the image's export has a name that leads out of it: '../out'", [])]
    assert [path.name for path in workplace.iterdir() if path.is_file()] == []


@needs_tools
def test_a_container_that_cannot_be_made_is_not_called_damage(
    run: Run, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    import docker

    def refuse(*_: Any, **__: Any) -> None:
        raise docker.errors.APIError("no space left on device")

    monkeypatch.setattr(api, "create_container", refuse, raising=False)
    done = run("convert", "titan:cpu-amd64")
    assert "makes no container" in done.stderr and "no space left" in done.stderr
    assert "damaged" not in done.stderr


@needs_tools
def test_ctrl_c_leaves_neither_a_file_nor_a_container(
    run: Run, api: Api, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def export(_: str, chunk_size: int) -> Iterator[bytes]:
        yield exported(ABOUT, 5_000_000)[:chunk_size]
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "export", export, raising=False)
    assert run("convert", "titan:cpu-amd64").code == ExitStatus.INTERRUPTED
    assert [path.name for path in workplace.iterdir() if path.is_file()] == []
    assert api.containers == []


def test_ctrl_c_while_the_engine_makes_the_container(
    run: Run, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
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
def test_the_home_directory_in_a_path_that_no_shell_expanded(
    run: Run, api: Api, workplace: Path, name: str
) -> None:
    home = workplace / "home"
    (home / "folder").mkdir()
    path = Path(run("convert", "titan:cpu-amd64", name).stdout.strip())
    assert path.is_file() and home in path.parents
    assert "x86_64" in run("inspect", str(path).replace(str(home), "~")).stdout


@pytest.mark.parametrize(
    "image", ["", "../../containers/json", "titan:", "Titan:x", "titan cpu", "titan:x?all=1"]
)
def test_what_cannot_be_an_image_is_refused_before_the_engine_is_asked(
    run: Run, monkeypatch: pytest.MonkeyPatch, image: str
) -> None:
    monkeypatch.setattr(docker_engine, "connect", None)
    for command in ("convert", "check", "sif"):
        if image.startswith("../") and command != "convert":
            continue  # there it is the path of a file
        done = run(command, image)
        assert (done.code, done.stdout) == (ExitStatus.USAGE, "")
        assert "is not the name of an image" in done.stderr


@pytest.mark.parametrize(
    "name",
    [
        "titan:cpu-amd64", "localhost:5000/team/titan", "Registry.example.com/a_b/c--d:X.1", "0123456789ab",
        f"titan@sha256:{'a' * 64}", f"sha256:{'a' * 64}", "[::1]:5000/titan:x",
    ],
)  # fmt: skip
def test_names_that_an_engine_takes(name: str) -> None:
    assert is_reference(name)


@pytest.mark.parametrize("name", ["x.txt/", "nowhere/"])
def test_a_slash_at_the_end_means_a_directory(run: Run, api: Api, workplace: Path, name: str) -> None:
    (workplace / "x.txt").write_text("mine")
    done = run("convert", "titan:cpu-amd64", "--force", "-o", name)
    assert (done.code, done.stdout) == (ExitStatus.FILESYSTEM, "")
    assert f"{name}: " in done.stderr and "directory" in done.stderr
    assert (workplace / "x.txt").read_text() == "mine"


@needs_tools
def test_convert_by_enroot_which_is_not_here(run: Run, api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    done = run("convert", "titan:cpu-amd64", "--with", "enroot")
    assert done.code == ExitStatus.ERROR and "enroot: no such program" in done.stderr


# ----------------------------------------------------------------------------------------------------- build


def test_build_prints_the_tag_and_streams_the_progress(run: Run, builds: list[dict[str, Any]]) -> None:
    done = run(
        "build", "cpu", "--base", "debian:12", "--index-url", "https://mirror.example/simple", "--no-cache"
    )
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
def test_build_both_architectures_and_convert_them(
    run: Run, builds: list[dict[str, Any]], workplace: Path
) -> None:
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
        (["cpu", "--push", "https://x/titan"], "not the name of an image in a registry", ExitStatus.USAGE),
        (["cpu", "--push", ""], "not the name of an image in a registry", ExitStatus.USAGE),
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


def test_push_without_the_docker_command_learns_it_first(
    run: Run, builds: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    done = run("build", "cpu", "--push", "localhost:5000/titan:cpu")
    assert "docker: no such command" in done.stderr and builds == []


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
    monkeypatch.setattr(docker_engine, "has_buildx", None)  # it does not come so far
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
    monkeypatch.setattr(docker_engine, "emulator", lambda arch: f"no emulator for {arch}")
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

    def manifest_list(
        reference: str, pushed: list[Pushed], *, arches: list[str], engine: Any, say: Any
    ) -> str:
        listed.append((reference, [one.arch for one in pushed], arches))
        return "sha256:list"

    monkeypatch.setattr(registry, "push", push)
    monkeypatch.setattr(registry, "manifest_list", manifest_list)
    monkeypatch.setattr(registry, "check_push", lambda reference: None)  # needs the docker command
    done = run("build", "cpu", "--arch", "all", "--push", "localhost:5000/titan:cpu")
    assert done.stdout.splitlines()[-1] == "localhost:5000/titan:cpu@sha256:list"
    assert listed == [("localhost:5000/titan:cpu", ["amd64", "arm64"], ["amd64", "arm64"])]


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


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "No such file"),
        (b"", "the file is empty"),
        (b"hsqs", "cut off: 4 bytes"),
        (b"hello", "not a squashfs"),
    ],
)
def test_check_of_a_file_that_is_no_image(
    run: Run, workplace: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None, words: str
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")  # no chmod either
    if content is not None:
        (workplace / "x.sqsh").write_bytes(content)
    done = run("check", "x.sqsh")
    assert (done.code, words in done.stderr) == (ExitStatus.INVALID, True), done.stderr


def test_check_where_a_program_is_missing_says_which(
    run: Run, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "unsquashfs is missing" in run("check", str(image)).stderr


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
    assert done.stdout.splitlines() == [
        "ok       torch     2.13.0", f"{status:7}  one NCCL  two?[31m"
    ]  # fmt: skip
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
    assert value == [
        {"channel": "stable", "arch": "arm64", "path": "mine.txt", "packages": {"torch": "2.14.1"}}
    ]
    assert run("lock", "stable", "-o", "mine.txt").code == ExitStatus.USAGE
    assert run("lock", "stable", "--arch", "arm64", "-o", ".").code == ExitStatus.USAGE


def test_an_index_that_cannot_be_reached_names_the_channel_that_needs_none(
    run: Run, builds: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(*_: Any, **__: Any) -> Built:
        chosen = channel("nightly")
        stderr = f"error: Failed to fetch: `{chosen.torch_index}/torch/`"
        raise locking._explain(chosen, chosen.torch_index, stderr)

    monkeypatch.setattr(building, "build", build)
    done = run("build")
    assert done.code == ExitStatus.ERROR
    assert "cannot be reached" in done.stderr and "CHANNEL=stable" in done.stderr


def test_sif(run: Run, api: Api, monkeypatch: pytest.MonkeyPatch, workplace: Path) -> None:
    def sif(image: str, output: Path, *, engine: Any = None, say: Any) -> Path:
        output.write_bytes(b"SIF")
        return output

    monkeypatch.setitem(
        sys.modules,
        "launcher.image.sif",
        SimpleNamespace(sif=sif, recipe=lambda name: f"Bootstrap: docker {name}\n"),
    )
    assert run("sif", "titan:cpu-amd64").stdout == "titan-cpu-amd64.sif\n"
    assert run("sif", "titan:cpu-amd64").code == ExitStatus.INVALID
    value = json.loads(run("sif", "titan:cpu-arm64", "-o", "x.sif", "--json").stdout)
    assert value == {"path": "x.sif", "bytes": 3}
    assert run("sif", "stable", "--recipe").stdout == "Bootstrap: docker stable\n"
    assert run("sif", "stable", "--recipe", "-o", "x.def").stdout == "x.def\n"
    assert (workplace / "x.def").read_text() == "Bootstrap: docker stable\n"
    assert run("sif", "stable", "--recipe", "-o", "x.def").code == ExitStatus.INVALID
    assert run("sif", "stable", "--recipe", "--json").code == ExitStatus.USAGE
    api.images.clear()  # a squashfs needs no engine
    assert run("sif", "./titan-cpu-arm64.sqsh").stdout == "titan-cpu-arm64.sif\n"


def test_no_engine(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def connect() -> None:
        raise LauncherError(
            "no Docker engine answers", "sudo systemctl start docker", status=ExitStatus.ERROR
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
        return subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
        ).stdout

    assert "/launcher image build 'nightly'  --output . --force" in planned()
    assert "build 'cpu' --arch 'all' --output . --force --network host" in planned(
        "CHANNEL=cpu", "ARCH=all", "BUILD_FLAGS=--network host"
    )
    assert "torch" not in planned("CHANNEL=cpu").replace("torchtitan", "")
