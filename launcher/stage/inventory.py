"""What a staged directory holds, whether it is complete, and for which runs it suffices. Asks no server."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.base.errors import ExitStatus, LauncherError, quoted
from launcher.base.files import unreadable
from launcher.stage import c4, models
from launcher.stage.image import Images, check_images, staged_images
from launcher.stage.manifest import Manifest, Problem, check, manifest_path, read_manifest
from launcher.stage.shards import SHARD, TOKENS_PER_FILE, in_files
from launcher.stage.target import gigabytes, is_directory, scaled

PLACES = tuple(
    map(Path, ("/data/c4", "/data/tokenizers", "/data/models", "/data/images"))
)  # where the defaults of `submit` look


@dataclass(frozen=True)
class Report:
    """One directory held against its manifest."""

    directory: Path
    manifest: Manifest
    problems: tuple[Problem, ...]

    @property
    def train_files(self) -> int:
        bad = {problem.path for problem in self.problems}
        names = (path.removeprefix("en/") for path in self.manifest.files if path not in bad)
        return sum(1 for name in names if (match := SHARD.fullmatch(name)) and match[1] == "train")

    @property
    def unknown(self) -> list[str]:
        """Shards that nobody has verified. A run that reads the directory itself reads them, too."""
        names = c4.shard_names(self.directory) if self.manifest.kind == "c4" else []
        return [f"en/{name}" for name in names if f"en/{name}" not in self.manifest.files]

    @property
    def repair(self) -> str:
        """The command that completes the directory."""
        words = {"c4": f"c4 --files {self._wanted_train_files()}"}
        if any("c4-validation" in path for path in self.manifest.wanted):
            words["c4"] += " --validation"
        if self.manifest.source.startswith("s3://"):
            words["c4"] += f" --from {quoted(self.manifest.source)}"
        repo = self.manifest.source.removeprefix("hf://")
        return (
            f"launcher stage {words.get(self.manifest.kind, f'{self.manifest.kind} {quoted(repo)}')} --to "
            f"{quoted(self.directory)}"
        )

    def _wanted_train_files(self) -> int:
        paths = {*self.manifest.wanted, *self.manifest.files}
        return sum(1 for path in paths if "c4-train" in path)

    def lines(self) -> list[str]:
        """For people: what it is, its state, what it is good for."""
        size = sum(file.bytes for file in self.manifest.files.values())
        state = "complete" if not self.problems else f"INCOMPLETE, {in_files(len(self.problems))}"
        first = (
            f"{self.directory}: {self.manifest.kind} from {self.manifest.source} at {self.manifest.revision[:12]}, "
            f"{in_files(len(self.manifest.files))}, {gigabytes(size)}, {state}"
        )
        rows = [f"{problem.path}: {problem.what}" for problem in self.problems[:10]]
        if len(self.problems) > 10:
            rows.append(f"… and {len(self.problems) - 10} more")
        if self.unknown:
            rows.append(f"not verified: {in_files(len(self.unknown))} in en/ ({self.unknown[0]}, …): stage or remove")
        return [first, *(f"  {row}" for row in (*rows, *self.suffices()))]

    def suffices(self) -> list[str]:
        """For which runs."""
        if self.manifest.kind == "c4":
            train = self.train_files
            tokens = scaled(train * TOKENS_PER_FILE, " tokens")
            return [
                f"{train} of {self.manifest.train_files_in_all} train files, about {tokens}: "
                f"for up to {train} data-parallel ranks"
            ]
        option = "--tokenizer" if self.manifest.kind == "tokenizer" else "--init-from"
        return [] if self.problems else [f"for: launcher submit {option} {quoted(self.directory)}"]

    def as_dict(self) -> dict[str, Any]:
        value: dict[str, Any] = {
            "directory": str(self.directory),
            "kind": self.manifest.kind,
            "source": self.manifest.source,
            "revision": self.manifest.revision,
            "files": len(self.manifest.files),
            "bytes": sum(file.bytes for file in self.manifest.files.values()),
            "complete": not self.problems,
            "problems": [{"path": problem.path, "what": problem.what} for problem in self.problems],
        }
        if self.manifest.kind == "c4":
            tokens = self.train_files * TOKENS_PER_FILE
            value |= {
                "unknown_files": self.unknown,
                "train_files": self.train_files,
                "train_files_in_all": self.manifest.train_files_in_all,
                "tokens": tokens,
                "largest_data_parallel_degree": self.train_files,
            }
        return value


def reports(directory: Path, deep: bool = False, read_images: bool = False) -> list[Report | Images]:
    """What the manifest lists, and the images, which have none: of both, what is there. Raises LauncherError."""
    require_directory(directory)
    try:
        images = staged_images(directory)
    except OSError as error:
        raise unreadable(directory, error) from error
    found: list[Report | Images] = []
    if manifest_path(directory).exists() or not images:
        found.append(verify(directory, deep))
    if images:
        found.append(check_images(directory, read_images))
    return found


def require_directory(directory: Path) -> None:
    """Raises LauncherError for a file, for nothing, and for a place where this user may not look."""
    if not is_directory(directory):
        raise LauncherError(
            "directory-missing",
            f"{directory}: no such directory",
            f"launcher stage c4 --to {quoted(directory)} --files 8",
            status=ExitStatus.NOT_FOUND,
        )


def verify(directory: Path, deep: bool = False) -> Report:
    """Raises LauncherError for a directory that has no manifest, with what gives it one."""
    manifest = read_manifest(directory)
    if manifest is None:
        place = quoted(directory)
        if c4.looks_like_c4(directory):
            count = len(list((directory / "en").glob("c4-train.*.json.gz")))
            fix = f"launcher stage c4 --to {place} --files {max(count, 1)}    checks what is there, and keeps it"
        elif kind := models.kind_of(directory):
            fix = f"launcher stage {kind} --to {place}    checks what is there, and keeps it"
        else:
            fix = "launcher stage list DIR, with a directory that was staged"
        raise LauncherError(
            "not-staged",
            f"{directory}: not staged by the launcher: nothing is known about its files",
            fix,
            status=ExitStatus.NOT_FOUND,
        )
    return Report(directory, manifest, tuple(check(directory, manifest, deep)))


def staged_below(places: Sequence[Path]) -> list[Path]:
    """Staged directories, each once: the places themselves, and those directly inside them."""
    found: dict[str, Path] = {}
    for place in places:
        try:
            inside = [path for path in sorted(place.iterdir()) if not path.name.startswith(".")]
        except OSError:
            continue
        for path in (place, *inside):
            if os.path.isdir(path) and _is_staged(path):
                found.setdefault(os.path.realpath(path), path)
    return list(found.values())


def _is_staged(directory: Path) -> bool:
    try:
        return os.path.exists(manifest_path(directory)) or bool(staged_images(directory))
    except OSError:
        return False
