"""`launcher image`: its help, and `convert`, against a stand-in for the engine."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher import cli
from launcher.base.errors import ExitStatus
from launcher.commands.image import image, is_reference
from launcher.image import engine as docker_engine
from launcher.image.squashfs_file import sidecar_path, superblock
from tests.conftest import Launch
from tests.unit.image_commands import ABOUT, Api, Run, api, exported, needs_tools, run

__all__ = ["api", "run"]  # fixtures


# ------------------------------------------------------------------------------------------------------ help


@pytest.mark.parametrize("name", image.commands)
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
    script = (
        "import sys; from launcher.cli import launcher; launcher.main(['--help'], standalone_mode=False); "
        "print(*sys.modules)"
    )
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
        "_LAUNCHER_COMPLETE": "bash_complete",
        "COMP_WORDS": " ".join(typed),
        "COMP_CWORD": str(len(typed) - 1),
    }
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
    assert "the image is for x86_64, the GPU profile for aarch64" in refused.stdout
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
    assert run("convert", "titan:cpu-amd64", "-o", "images", "--force").stdout == "images/titan-cpu-amd64.sqsh\n"
    assert superblock(path).inodes > 1


@pytest.mark.parametrize(
    ("arguments", "words", "code"),
    [
        (["titan:cpu-amd64", "-o", "no/where/x.sqsh"], "mkdir -p no/where", ExitStatus.FILESYSTEM),
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
def test_an_export_that_breaks_off_leaves_neither_a_file_nor_a_container(run: Run, api: Api, workplace: Path) -> None:
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


@pytest.mark.parametrize("image", ["", "../../containers/json", "titan:", "Titan:x", "titan cpu", "titan:x?all=1"])
def test_what_cannot_be_an_image_is_refused_before_the_engine_is_asked(
    run: Run, monkeypatch: pytest.MonkeyPatch, image: str
) -> None:
    monkeypatch.setattr(docker_engine, "connect", None)
    for command in ("convert",) if image.startswith("../") else ("convert", "check"):  # there a file's path
        done = run(command, image)
        assert (done.code, done.stdout) == (ExitStatus.USAGE, "")
        assert "is not the name of an image" in done.stderr


@pytest.mark.parametrize(
    "name",
    [
        "titan:cpu-amd64",
        "localhost:5000/team/titan",
        "Registry.example.com/a_b/c--d:X.1",
        "0123456789ab",
        f"titan@sha256:{'a' * 64}",
        f"sha256:{'a' * 64}",
        "[::1]:5000/titan:x",
    ],
)
def test_names_that_an_engine_takes(name: str) -> None:
    assert is_reference(name)


@pytest.mark.parametrize("name", ["x.txt/", "nowhere/"])
def test_a_slash_at_the_end_means_a_directory(run: Run, api: Api, workplace: Path, name: str) -> None:
    (workplace / "x.txt").write_text("mine")
    done = run("convert", "titan:cpu-amd64", "--force", "-o", name)
    assert (done.code, done.stdout) == (ExitStatus.FILESYSTEM, "")
    assert f"{name}: no such directory" in done.stderr
    assert (workplace / "x.txt").read_text() == "mine"


def test_conversion_by_enroot_is_gone(run: Run, api: Api) -> None:
    done = run("convert", "titan:cpu-amd64", "--with", "enroot")
    assert done.code == ExitStatus.USAGE and "--with is gone" in done.stderr
