"""`launcher image lock`: pins every package of a channel with its hashes. uv does the resolving."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from urllib.parse import urlsplit

from launcher.base.errors import ExitStatus, LauncherError, install
from launcher.base.files import filesystem_error, read_bytes, write_text
from launcher.base.output import say
from launcher.image import ARCHES
from launcher.image.channels import Channel, channel, lock_path

_UNREACHABLE = re.compile(r"(?:Failed to fetch|error sending request for url|Request failed)[^\n]*?(https?://[^\s`)]+)")


def lock(name: str, arch: str, *, torch_index: str | None = None, output: Path | None = None) -> Path:
    """Writes the newest set of packages that channel `name` allows for `arch` (Docker's word); returns the file.

    `torch_index` replaces the channel's own (a mirror); empty: torch comes from where everything else does.
    Mirrors of PyPI are uv's business (UV_DEFAULT_INDEX, UV_FIND_LINKS). No address of an index and no path of
    this machine gets into the file, except the files' addresses of a channel that records them.
    Raises LauncherError when an index cannot be reached or nothing satisfies the channel.
    """
    chosen = channel(name)
    index = chosen.torch_index if torch_index is None else torch_index
    target = output or lock_path(name, arch)
    say(f"resolving channel {name} for {arch}, Python {chosen.python}: {', '.join(chosen.packages)}")
    text = f"# Channel {name}, {arch}, Python {chosen.python}. Made by: launcher image lock {name} --arch {arch}\n"
    text += _requirements(_pylock(chosen, arch, index), urlsplit(index).netloc if chosen.record_urls else "")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise filesystem_error(target, error) from error
    write_text(target, text)
    say(f"{target}: {len(pinned(text))} packages")
    return target


def pinned(text: str) -> dict[str, str]:
    """Name -> version of every package in a lock, whether it is pinned by version or by address."""
    found = {}
    for line in text.splitlines():
        if match := re.match(r"([A-Za-z0-9._-]+)==([^\s;\\]+)", line):
            found[match[1]] = match[2]
        elif match := re.match(r"([A-Za-z0-9._-]+) @ \S*/[^/\s-]+-([^/\s-]+)-[^/\s]+\.whl", line):
            found[match[1]] = match[2].replace("%2B", "+")
    return found


def need_lock(path: Path, fix: str) -> None:
    """Raises LauncherError with `fix` unless `path` is a lock: packages that are pinned, each with its hashes."""
    try:
        text = read_bytes(path, wait=True).decode("utf-8")
    except FileNotFoundError:
        raise LauncherError("lock-missing", f"there is no lock {path}", fix) from None
    except OSError as error:
        raise LauncherError("unreadable", f"{path}: {error.strerror}", fix, status=ExitStatus.FILESYSTEM) from None
    except UnicodeDecodeError:
        raise LauncherError("lock-damaged", f"{path} is not a lock file: it is not text", fix) from None
    # A requirement goes on where a line ends with a backslash.
    requirements = re.sub(r"\\\n", " ", text).splitlines()
    why = "" if pinned(text) else "it pins no package"
    for line in requirements:
        if pinned(line) and "--hash=sha256:" not in line:
            why = why or f"{next(iter(pinned(line)))} has no hash"
    if why:
        raise LauncherError("lock-damaged", f"{path} is not a lock file: {why}", fix)


def _pylock(chosen: Channel, arch: str, index: str) -> str:
    """What uv resolves, as pylock.toml: torch from its own index only, everything else from PyPI only."""
    lines = ["[project]", 'name = "titan-image"', 'version = "0"']
    lines += [f'requires-python = ">={chosen.python}"', f"dependencies = {json.dumps(chosen.packages)}"]
    if index:
        lines += ["[tool.uv.sources]", *(f'{name} = {{ index = "torch" }}' for name in chosen.from_torch_index)]
        lines += ["[[tool.uv.index]]", 'name = "torch"', f"url = {json.dumps(index)}", "explicit = true"]
    beside_python = Path(sys.executable).with_name("uv")
    uv = str(beside_python) if beside_python.exists() else "uv"
    command = [uv, "pip", "compile", "pyproject.toml", "--quiet", "--no-header", "--generate-hashes"]
    command += ["--only-binary=:all:", "--python-version", chosen.python]
    # glibc 2.28: what torch's own wheels ask for, and older than that of every base image.
    command += ["--python-platform", f"{ARCHES[arch]}-manylinux_2_28"]
    command += ["--format=pylock.toml", "--output-file=pylock.toml"]
    # In a folder of its own: its project file decides, not one above the working directory.
    with tempfile.TemporaryDirectory(prefix="titan-lock-") as folder:
        (Path(folder) / "pyproject.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")
        environment = os.environ | {"NO_COLOR": "1"}
        try:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
        except OSError:
            what = "locks are made with uv, which is not installed"
            raise LauncherError("package-missing", what, install("image"), status=ExitStatus.ERROR) from None
        if done.returncode:
            raise _refused(chosen, index, done.stderr)
        return (Path(folder) / "pylock.toml").read_text(encoding="utf-8")


def _requirements(pylock: str, recorded: str) -> str:
    """As pip reads them; by address what the server `recorded` has, as it forgets its versions."""
    lines = []
    for package in tomllib.loads(pylock)["packages"]:
        wheels = package["wheels"]
        pin = f"{package['name']}=={package['version']}"
        if recorded and urlsplit(wheels[0]["url"]).netloc == recorded:
            wheels = wheels[:1]
            pin = f"{package['name']} @ {wheels[0]['url']}"
        lines.append(" \\\n".join([pin, *(f"    --hash=sha256:{wheel['hashes']['sha256']}" for wheel in wheels)]))
    return "\n".join(lines) + "\n"


def _refused(chosen: Channel, index: str, words: str) -> LauncherError:
    if unreachable := _UNREACHABLE.search(words):
        fix = "check the network and the proxy, or give a mirror of torch's index: --torch-index URL"
        if index and chosen.cuda:
            fix += "; a channel that needs PyPI alone: make image CHANNEL=stable, or launcher image build stable"
        what = f"channel {chosen.name}: the package index {unreachable[1]} cannot be reached"
        return LauncherError("index-silent", what, fix, status=ExitStatus.ERROR, original=words)
    if "No solution found" in words:
        what = f"channel {chosen.name}: no set of packages satisfies {', '.join(chosen.packages)}"
        fix = "change `packages` of the channel in containers/channels.toml"
        return LauncherError("lock-unsolvable", what, fix, original=words)
    what = f"channel {chosen.name}: uv made no lock, for the reason below"
    fix = "uv --version: a current one is pip install --upgrade uv; its settings: env | grep ^UV_; df -h ~/.cache/uv"
    return LauncherError("lock-failed", what, fix, status=ExitStatus.ERROR, original=words)
