"""Apptainer for real: a SIF is made from a squashfs, looked at, and runs the unmodified local job.

Apptainer comes from a root directory of Debian sid, made once with mmdebstrap (about a minute) and kept in the cache.
The training run is for LAUNCHER_TEST_APPTAINER=1 alone: packing the channel cpu takes more than a minute.
"""

from __future__ import annotations

import json
import os
import platform
import pwd
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from launcher.base.errors import LauncherError, install
from launcher.image import DOCKER
from launcher.image import sif as module
from launcher.image.sif import sif
from launcher.image.squashfs_file import ImageFacts
from tests.conftest import Launch
from tests.image.converter import needs_tools
from tests.image.images import cpu_squashfs, debian

pytestmark = needs_tools
PACKAGES = "apptainer,squashfuse"
# In namespaces of its own nothing stays mounted. pivot_root, as the kernel lets no user namespace begin in a chroot;
# a user namespace, as Apptainer asks for every capability when root calls it, and root in a container lacks some.
WRAPPER = r"""#!/bin/sh
exec unshare --mount --propagation private sh -ec '
root=$1 cwd=$PWD && shift && PATH=$PATH:/usr/sbin:/sbin
mount --bind "$root" "$root"
for dir in /* /var/tmp; do
  case $dir in /bin | /etc | /lib* | /lost+found | /sbin | /usr | /var) continue ;; esac
  if [ -d "$dir" ] && [ ! -L "$dir" ]; then mkdir -p "$root$dir" && mount --rbind "$dir" "$root$dir"; fi
done
cd "$root" && pivot_root . mnt && umount -l /mnt && cd "$cwd"
exec unshare --user --map-root-user /usr/bin/apptainer "$@"
' sh {root} "$@"
"""
SUBMIT = ["submit", "--local", "--runtime", "apptainer", "--gpu", "cpu", "--recipe", "debug", "--image"]
ENVIRONMENT = 'PATH=/usr/bin:/bin\nGREETING=it\'s "from" $HOME\nWHO=the image\n'


@pytest.fixture(scope="session")
def apptainer() -> Iterator[Path]:
    """A directory for PATH with the program `apptainer` in it."""
    pytest.importorskip("spython")
    # Mirrors that are kept at a date have indexes that are past theirs: as this machine's own apt has it.
    done = subprocess.run(["apt-config", "dump", "Acquire::Check-Valid-Until"], capture_output=True, text=True)
    options = ["--variant=minbase"] + [f"--aptopt={line}" for line in done.stdout.splitlines() if '"' in line]
    tar = debian("apptainer-sid", "sid", DOCKER[platform.machine()], *options, f"--include={PACKAGES}")
    # Not pytest's own directory, whose name is long and which stays.
    with tempfile.TemporaryDirectory(prefix="sid-", dir="/var/tmp") as folder:
        root = Path(folder) / "root"
        root.mkdir()
        subprocess.run(["tar", "-xf", str(tar), "-C", str(root)], check=True)
        for name in ("hosts", "passwd", "group", "resolv.conf", "localtime"):
            if Path("/etc", name).exists():
                (root / "etc" / name).unlink(missing_ok=True)
                shutil.copy(f"/etc/{name}", root / "etc" / name)
        program = Path(folder) / "bin" / "apptainer"
        program.parent.mkdir()
        program.write_text(WRAPPER.replace("{root}", shlex.quote(str(root))))
        program.chmod(0o755)
        done = subprocess.run(
            ["unshare", "--user", "--map-root-user", "--mount", "true"], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"no user namespaces here: {done.stderr}")
        yield program.parent


@pytest.fixture(scope="session")
def squashfs(apptainer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image as `launcher image convert` makes them, with no more than a shell in it."""
    folder = tmp_path_factory.mktemp("squashfs")
    root = folder / "root"
    for name in ("etc", "bin", "dev", "proc", "sys", "tmp", "var/tmp", "root"):
        (root / name).mkdir(parents=True)
    (root / "etc" / "environment").write_text(ENVIRONMENT)
    programs = [shutil.which(name) or "" for name in ("sh", "env", "ls", "true", "touch", "cat")]
    libraries = subprocess.run(["ldd", *programs], capture_output=True, text=True, check=True).stdout
    for path in {*programs, *(word for word in libraries.split() if word.startswith("/") and word[-1] != ":")}:
        copy = root / ("bin/" + Path(path).name if path in programs else path.lstrip("/"))
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    image = folder / "small.sqsh"
    subprocess.run(["mksquashfs", root, image, "-all-root", "-quiet", "-no-progress"], check=True)
    return image


@pytest.fixture(scope="session")
def small_sif(apptainer: Path, squashfs: Path) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{apptainer}{os.pathsep}{os.environ['PATH']}")
        yield sif(squashfs, squashfs.with_suffix(".sif"))


def test_a_squashfs_becomes_a_sif_with_its_environment(small_sif: Path) -> None:
    done = subprocess.run(["apptainer", "exec", "--cleanenv", str(small_sif), "env"], capture_output=True, text=True)
    assert {'GREETING=it\'s "from" $HOME', "WHO=the image"} <= set(done.stdout.splitlines()), done.stderr
    labels = subprocess.run(["apptainer", "inspect", str(small_sif)], capture_output=True, text=True).stdout
    assert f"titan.arch: {platform.machine()}" in labels
    assert b"SIF_MAGIC" in small_sif.read_bytes()[:64]  # what `submit` looks for
    assert list(small_sif.parent.glob(".*")) == []


def test_the_job_in_it(small_sif: Path, launch: Launch, workplace: Path) -> None:
    """The job's variables win over the image's and arrive as they are; nothing of the home does, even where it
    is the working directory, as with sbatch; the run directory can be written and its mounts be read."""
    home = pwd.getpwuid(os.geteuid()).pw_dir  # Apptainer asks for that, not for $HOME
    (workplace / "shared dir").mkdir()
    (workplace / "shared dir" / "here").touch()
    probe = workplace / "shared dir" / "probe"
    script = (
        f'env; pwd; [ -z "$(ls -A {home})" ] && echo empty home; ls "/mnt point"; touch "/mnt point/x" written; exit 7'
    )
    probe.write_text(f"#!/bin/sh\n{script}\n")
    probe.chmod(0o755)
    assert os.listdir(home), "no test without something that the container must not see"
    options = ["--name", "r", "--env", "WHO=the job", "--env", 'AGAIN=$(id) "q" it\'s a,b', "--follow"]
    options += ["--mount", f"{workplace}/shared dir:/mnt point:ro", "--python", "/mnt point/probe"]
    done = launch(*SUBMIT, str(small_sif), *options, "--runs-dir", str(workplace / "runs"))
    log = "\n".join(path.read_text() for path in (workplace / "runs" / "r" / "logs").glob("0000-*"))
    lines = log.splitlines()
    assert "WHO=the job" in lines and 'AGAIN=$(id) "q" it\'s a,b' in lines, log
    assert 'GREETING=it\'s "from" $HOME' in lines and str(workplace / "runs" / "r") in lines
    script = (workplace / "runs" / "r" / "job.sbatch").read_text()
    command = next(line for line in script.splitlines() if "apptainer exec" in line).split(' >"$run_dir')[0]
    by_hand = subprocess.run(["bash", "-c", command], cwd=home, capture_output=True, text=True)
    assert "empty home" in by_hand.stdout.splitlines(), by_hand.stderr
    assert "here" in lines and "Read-only file system" in log
    assert (workplace / "runs" / "r" / "written").exists()
    end = json.loads((workplace / "runs" / "r" / "end.json").read_text())
    assert end["exit_code"] == 7, done.stdout + done.stderr


@pytest.mark.skipif(os.environ.get("LAUNCHER_TEST_APPTAINER") != "1", reason="minutes: LAUNCHER_TEST_APPTAINER=1")
def test_training_in_it(apptainer: Path, launch: Launch, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{apptainer}{os.pathsep}{os.environ['PATH']}")
    image = sif(cpu_squashfs(), workplace / "titan-cpu.sif")
    done = launch(*SUBMIT, str(image), "--name", "r", "--follow", timeout=900)
    assert "r: COMPLETED" in done.stdout, done.stdout + done.stderr


def test_what_apptainer_refuses_is_told_in_its_words(apptainer: Path, squashfs: Path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", f"{apptainer}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("APPTAINER_TMPDIR", "/nowhere")
    output = squashfs.with_name("refused.sif")
    with pytest.raises(LauncherError, match="apptainer build failed with code 255") as caught:
        sif(squashfs, output)
    assert "/nowhere" in caught.value.original
    assert not output.exists() and not list(output.parent.glob(".*"))


def test_an_images_words_begin_no_section_of_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What %post holds is run by `apptainer build`; an image's description may come from anybody."""
    versions = {"torch": "2\n%post\n    touch /tmp/here", "torchtitan\n%post": "0.3"}
    facts = ImageFacts("x.sqsh", "x86_64\n%post", "image", "zstd", 1, channel="a\r%post\n", versions=versions)
    monkeypatch.setattr(module, "inspect", lambda _path: facts)
    tree = SimpleNamespace(read=lambda *_: b"A=1\n%post\nB='\n%post\n")
    monkeypatch.setattr(module, "Tree", lambda _path: tree)
    sections = [line for line in module._definition(tmp_path / "x.sqsh").splitlines() if line.startswith("%")]
    assert sections == ["%environment", "%labels"]


@pytest.mark.parametrize(
    ("lacks", "what", "fix"),
    [
        ("apptainer", "apptainer: no such program", "apt-get install apptainer"),
        ("spython", "through spython, which is not installed", install("apptainer")),
    ],
)
def test_nothing_to_make_a_sif_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lacks: str, what: str, fix: str
) -> None:
    pytest.importorskip("spython")
    monkeypatch.setenv("PATH", str(tmp_path))
    if lacks == "spython":
        monkeypatch.setitem(sys.modules, "spython.main", None)
    with pytest.raises(LauncherError, match=what) as caught:
        sif(tmp_path / "x.sqsh", tmp_path / "x.sif")
    assert fix in caught.value.fix
