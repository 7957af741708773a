"""`archive`: what a support ticket needs of a run, in one file, without secrets."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import tarfile
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import click

from launcher import version
from launcher.base.files import read_bytes, write_bytes
from launcher.base.output import as_json, echo, print_json
from launcher.base.secret import looks_secret, masked
from launcher.commands.image import target_path
from launcher.config.options import run_argument, runs_dir_option
from launcher.nodes import hardware
from launcher.runs import directory as runs
from launcher.runs.directory import SECRETS, Run

# Not the trainer's folder, which holds weights, nor the views of data.
FILES = ("*.toml", "*.json", "*.sbatch", "claim/*", "cancelled", "job/*.json", "job/titan.toml")
FOLDERS = ("logs", "nodes", "attempts")
_PRIVATE_KEY = re.compile(r"-----BEGIN [A-Z ]{0,40}PRIVATE KEY-----.{0,20000}?-----END", re.DOTALL)
HEAD, TAIL = 1 << 20, 3 << 20  # bytes of a file that is longer than both


@click.command()
@run_argument(required=True)
@runs_dir_option
@click.option("-o", "--output", metavar="FILE", help="File to write.  [default: NAME.tar.gz here]")
@click.option("--force", is_flag=True, help="Replace a file that exists.")
@as_json
def archive(run: str, runs_dir: Path, output: str | None, force: bool, as_json: bool) -> None:
    """Pack a run's logs, node checks, settings and versions for a support ticket.

    Hides secrets and cuts long logs in the middle. Data, weights and checkpoints are left out.

    \b
    launcher archive my-run
    launcher archive my-run -o ticket.tar.gz
    """
    found = runs.open_run(run, runs_dir)
    target = target_path(output, f"{found.name}.tar.gz", force)
    packed, names = io.BytesIO(), []
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, data in _contents(found):
            entry = tarfile.TarInfo(f"{found.name}/{name}")
            entry.size, entry.mode = len(data), 0o644
            tar.addfile(entry, io.BytesIO(data))
            names.append(name)
    write_bytes(target, packed.getvalue(), option="-o FILE")
    if as_json:
        return print_json({"run": found.name, "file": str(target), "files": names})
    echo(f"{target}: {len(names)} files of {found.name}; look into it before you send it: tar -tzf {target}")


def _contents(run: Run) -> Iterator[tuple[str, bytes]]:
    hidden = _secrets_of(run)
    paths = [path for pattern in FILES for path in run.path.glob(pattern)]
    paths += [path for folder in FOLDERS for path in (run.path / folder).rglob("*")]
    files = (path for path in paths if path.is_file() and path.resolve() == path)  # no link is followed
    for path in sorted(path for path in files if path.name != SECRETS):
        try:
            text = _read(path)
        except OSError as error:
            text = f"not read: {error.strerror}\n"
        yield str(path.relative_to(run.path)), _without(text, hidden).encode()
    about = {"launcher": version(), "nodes": [vars(one) | {"drain": one.drain} for one in hardware.of_run(run)]}
    yield "about.json", _without(json.dumps(about, indent=2) + "\n", hidden).encode()


def _secrets_of(run: Run) -> list[str]:
    """Values: of the shell's variables that look like secrets or that the run was given as such, and of those that the
    job still needs. The longest first: one may hold another.
    """
    given: object = None
    with suppress(OSError, ValueError, RecursionError):
        given = tomllib.loads(read_bytes(run.path / "run.toml").decode()).get("secret_env")
    names = given if isinstance(given, list) else []
    found = {value for name, value in os.environ.items() if looks_secret(name, value) or name in names}
    with suppress(OSError, ValueError):
        words = shlex.split(read_bytes(run.path / SECRETS).decode())
        found |= {word.partition("=")[2] for word in words}
    found |= {json.dumps(value)[1:-1] for value in found}
    return sorted((value for value in found if len(value) > 5), key=len, reverse=True)


def _read(path: Path) -> str:
    """Text; the middle of a long file is left out, in whole lines: of half a secret nobody sees that it is one."""
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK)) as stream:
        size = os.fstat(stream.fileno()).st_size
        data = stream.read(HEAD + TAIL)
        if size > HEAD + TAIL:
            stream.seek(size - TAIL)
            head, tail = data[: data.rfind(b"\n", 0, HEAD) + 1], stream.read(TAIL).partition(b"\n")[2]
            data = head + f"[{size - len(head) - len(tail)} bytes left out]\n".encode() + tail
    return data.decode("utf-8", "replace")


def _without(text: str, hidden: Sequence[str]) -> str:
    """Without what looks like a secret, and the values that are `hidden`."""
    for value in hidden:
        text = text.replace(value, "(hidden)")
    text = _PRIVATE_KEY.sub("(hidden)", text)
    return "\n".join(map(masked, text.split("\n")))
