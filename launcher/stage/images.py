"""What `launcher stage image` has put into a directory, and whether its bytes are still those of its name."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.base.errors import LauncherError, quoted
from launcher.base.files import read_json
from launcher.image.squashfs_file import sidecar_path, superblock
from launcher.stage.manifest import Problem, sha256_of
from launcher.stage.progress import Progress
from launcher.stage.target import gigabytes

NAME = re.compile(r"([0-9a-f]{12})-(.+)\.sqsh")


@dataclass(frozen=True)
class Images:
    """The staged images of one directory, by name and size."""

    directory: Path
    bytes: dict[str, int]
    problems: tuple[Problem, ...]
    read: bool  # all bytes were hashed; else heads, sizes and descriptions were looked at

    @property
    def repair(self) -> str:
        bad = " ".join(quoted(self.directory / name) for name in dict.fromkeys(p.path for p in self.problems))
        return f"rm {bad}, then for each: launcher stage image SOURCE --to {quoted(self.directory)}"

    def lines(self) -> list[str]:
        state = f"DAMAGED: {len(self.problems)}" if self.problems else "verified" if self.read else "not read"
        count = f"{len(self.bytes)} image{'' if len(self.bytes) == 1 else 's'}"
        wrong = {problem.path: problem.what for problem in self.problems}
        return [
            f"{self.directory}: {count}, {gigabytes(sum(self.bytes.values()))}, {state}",
            *(f"  {name}: {wrong.get(name, gigabytes(size))}" for name, size in self.bytes.items()),
        ]

    def as_dict(self) -> dict[str, Any]:
        return {
            "directory": str(self.directory),
            "kind": "images",
            "files": len(self.bytes),
            "bytes": sum(self.bytes.values()),
            "images": self.bytes,
            "complete": not self.problems,
            "problems": [{"path": problem.path, "what": problem.what} for problem in self.problems],
        }


def staged_images(directory: Path) -> list[str]:
    """Names that `launcher stage image` gives. Raises OSError."""
    return sorted(path.name for path in directory.iterdir() if NAME.fullmatch(path.name))


def check_images(directory: Path, read: bool) -> Images:
    """Heads, sizes and descriptions; with `read`, every byte against the checksum in the name and the description."""
    sizes: dict[str, int] = {}
    problems, sound = [], []
    for name in staged_images(directory):
        try:
            sizes[name] = superblock(directory / name).file_size
        except LauncherError as error:
            sizes[name] = 0
            problems.append(Problem(name, error.what.removeprefix(f"{directory / name}: ")))
            continue
        facts = (read_json(sidecar_path(directory / name)) or {}).get("squashfs")
        said = facts if isinstance(facts, dict) else {}
        if not str(said.get("sha256", name[:12])).startswith(name[:12]):
            problems.append(Problem(name, f"{sidecar_path(Path(name))} describes another image"))
        elif said.get("bytes", sizes[name]) != sizes[name]:
            problems.append(Problem(name, f"{sizes[name]:,} bytes instead of {said['bytes']:,}"))
        else:
            sound.append((name, str(said.get("sha256", name[:12]))))
    if read and sound:
        size = sum(sizes[name] for name, _ in sound)
        with Progress("reading", len(sound), size, 0, sys.stderr) as progress:

            def on_bytes(count: int) -> None:
                progress.add(count)
                progress.refresh()

            for name, digest in sound:
                try:
                    if not sha256_of(directory / name, on_bytes).startswith(digest):
                        problems.append(Problem(name, "other bytes than its checksum says"))
                except OSError as error:
                    problems.append(Problem(name, error.strerror or str(error)))
                progress.done_files += 1
    return Images(directory, sizes, tuple(problems), read)
