"""`launcher image lock`: pins every package of a channel with its hashes. uv does the resolving."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launcher.base.errors import ExitStatus, LauncherError, install
from launcher.base.files import filesystem_error, read_bytes, write_text
from launcher.image import ARCHES
from launcher.image.channels import Channel, channel, docker_arch, lock_path

# glibc 2.28: what torch's own wheels ask for, and older than that of every base image.
_PLATFORM = "{}-manylinux_2_28"
_UNREACHABLE = re.compile(r"(?:Failed to fetch|error sending request for url|Request failed)[^\n]*?(https?://[^\s`)]+)")


def lock(
    name: str,
    arch: str,
    *,
    torch_index: str | None = None,
    output: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Path:
    """Writes the newest set of packages that channel `name` allows, and returns the file.

    `torch_index` replaces the channel's own (a mirror); empty: torch comes from where everything else does.
    Mirrors of PyPI are uv's business (UV_DEFAULT_INDEX, UV_FIND_LINKS). No address of an index and no path of
    this machine gets into the file, except the files' addresses of a channel that records them.
    Raises LauncherError when an index cannot be reached or nothing satisfies the channel.
    """
    chosen = channel(name)
    arch = docker_arch(arch)
    index = chosen.torch_index if torch_index is None else torch_index
    target = output or lock_path(name, arch)
    say(f"resolving channel {name} for {arch}, Python {chosen.python}: {', '.join(chosen.packages)}")
    with tempfile.TemporaryDirectory(prefix="titan-lock-") as folder:
        project = Path(folder) / "pyproject.toml"
        project.write_text(_project(chosen, index), encoding="utf-8")
        text = _compile(chosen, arch, index, project, "requirements.txt")
        if chosen.record_urls and index:
            pins = Path(folder) / "pins.txt"
            pins.write_text(text, encoding="utf-8")
            text = _with_urls(text, _compile(chosen, arch, index, project, "pylock.toml", pins), index, arch)
    header = f"# Channel {name}, {arch}, Python {chosen.python}. Made by: launcher image lock {name} --arch {arch}\n"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise filesystem_error(target, error) from error
    write_text(target, header + text)
    say(f"{target}: {len(pinned(header + text))} packages")
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
        raise LauncherError("lock-damaged", f"{path} is no lock: it is not text", fix) from None
    # A requirement goes on where a line ends with a backslash.
    requirements = re.sub(r"\\\n", " ", text).splitlines()
    if not pinned(text):
        raise LauncherError("lock-damaged", f"{path} is no lock: it pins no package", fix)
    for line in requirements:
        if pinned(line) and "--hash=sha256:" not in line:
            raise LauncherError("lock-damaged", f"{path} is no lock: {next(iter(pinned(line)))} has no hash", fix)


def _project(chosen: Channel, index: str) -> str:
    """A project file for uv: torch from its own index only, everything else from PyPI only."""
    lines = ["[project]", 'name = "titan-image"', 'version = "0"']
    lines += [f'requires-python = ">={chosen.python}"', f"dependencies = {json.dumps(list(chosen.packages))}"]
    if index:
        lines += [
            "[tool.uv.sources]",
            *(f'{name} = {{ index = "torch" }}' for name in chosen.from_torch_index),
        ]
        lines += ["[[tool.uv.index]]", 'name = "torch"', f"url = {json.dumps(index)}", "explicit = true"]
    return "\n".join(lines) + "\n"


def _compile(chosen: Channel, arch: str, index: str, project: Path, form: str, constraints: Path | None = None) -> str:
    """What `uv pip compile` answers, as requirements.txt or as pylock.toml."""
    output = project.with_name("compiled.txt" if form == "requirements.txt" else "pylock.toml")
    command = [
        _uv(),
        "pip",
        "compile",
        str(project),
        "--quiet",
        "--no-header",
        "--no-annotate",
        "--generate-hashes",
        "--only-binary=:all:",
        "--python-version",
        chosen.python,
        "--python-platform",
        _PLATFORM.format(ARCHES[arch]),
        "--format",
        form,
        "--output-file",
        str(output),
        *(["--constraints", str(constraints)] if constraints else []),
    ]
    # Its own project file decides, not one above the working directory.
    done = subprocess.run(
        command, cwd=project.parent, capture_output=True, text=True, env=os.environ | {"NO_COLOR": "1"}
    )
    if done.returncode:
        raise _explain(chosen, index, done.stderr)
    return output.read_text(encoding="utf-8")


def _uv() -> str:
    """The uv beside this Python (`pip install uv`), else the one on PATH."""
    try:
        import uv

        return str(uv.find_uv_bin())
    except (ImportError, FileNotFoundError):
        found = shutil.which("uv")
    if not found:
        raise LauncherError(
            "package-missing",
            "locks are made with uv, which is not installed",
            install("image"),
            status=ExitStatus.ERROR,
        )
    return found


def _explain(chosen: Channel, index: str, stderr: str) -> LauncherError:
    match = _UNREACHABLE.search(stderr)
    if match:
        fix = "check the network and the proxy, or give a mirror that is reachable: --torch-index URL"
        if index and match[1].startswith(index) and chosen.cuda:
            fix = (
                "a channel that needs PyPI alone: make image CHANNEL=stable, or launcher image build stable; or a "
                f"mirror of the index: --torch-index URL (now {index})"
            )
        return LauncherError(
            "index-silent",
            f"channel {chosen.name}: the package index {match[1]} cannot be reached",
            fix,
            status=ExitStatus.ERROR,
            original=stderr,
        )
    if "No solution found" not in stderr:
        return LauncherError(
            "lock-failed",
            f"channel {chosen.name}: uv made no lock, for the reason below",
            "uv --version: a current one is pip install --upgrade uv; its settings: env | grep ^UV_; df -h ~/.cache/uv",
            status=ExitStatus.ERROR,
            original=stderr,
        )
    return LauncherError(
        "lock-unsolvable",
        f"channel {chosen.name}: no set of packages satisfies {', '.join(chosen.packages)}",
        "change `packages` of the channel in containers/channels.toml",
        original=stderr,
    )


def _with_urls(text: str, pylock: str, index: str, arch: str) -> str:
    """`torch==X` becomes `torch @ https://…/torch-X-….whl` for every file that the torch index serves."""
    host = index.split("/")[2] if "://" in index else index
    addresses: dict[str, dict[str, Any]] = {}
    for package in tomllib.loads(pylock).get("packages", []):
        for wheel in package.get("wheels", []):
            if f"//{host}/" in wheel["url"] and wheel["url"].endswith((f"_{ARCHES[arch]}.whl", "-any.whl")):
                addresses[package["name"]] = wheel
    lines: list[str] = []
    replaced = False
    for line in text.splitlines():
        name = line.split("==")[0] if not line.startswith((" ", "#")) else ""
        if name:
            replaced = name in addresses
            if replaced:
                wheel = addresses[name]
                lines += [f"{name} @ {wheel['url']} \\", f"    --hash=sha256:{wheel['hashes']['sha256']}"]
        if not replaced:
            lines.append(line)
    return "\n".join(lines) + "\n"
