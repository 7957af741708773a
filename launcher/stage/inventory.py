"""What a staged directory holds, whether it is complete, and for which runs it suffices. Asks no server."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.base.errors import ExitStatus, LauncherError, quoted
from launcher.base.files import unreadable
from launcher.base.output import counted
from launcher.image.squashfs_file import sidecar_path, superblock
from launcher.stage import c4
from launcher.stage.image import NAME, described
from launcher.stage.manifest import Manifest, Problem, StagedFile, check, manifest_path, read, read_manifest
from launcher.stage.shards import IN_EN, TOKENS_PER_FILE
from launcher.stage.source import RemoteFile
from launcher.stage.target import gigabytes, is_directory, scaled

# Where the defaults of `submit` look.
PLACES = tuple(map(Path, ("/data/c4", "/data/tokenizers", "/data/models", "/data/images")))


IMAGES = "images"


@dataclass(frozen=True)
class Report:
    """One directory held against its manifest; staged images have one that was made of what lies beside them."""

    directory: Path
    manifest: Manifest
    problems: Sequence[Problem]

    @property
    def train_files(self) -> int:
        bad = {problem.path for problem in self.problems}
        paths = (path for path in self.manifest.files if path not in bad)
        return sum(1 for path in paths if (match := IN_EN.fullmatch(path)) and match[1] == "train")

    @property
    def unknown(self) -> list[str]:
        """Shards that nobody has verified. A run that reads the directory itself reads them, too."""
        names = c4.shard_names(self.directory) if self.manifest.kind == "c4" else []
        return [f"en/{name}" for name in names if f"en/{name}" not in self.manifest.files]

    @property
    def repair(self) -> str:
        """The command that completes the directory."""
        manifest = self.manifest
        paths = {*manifest.wanted, *manifest.files}
        if manifest.kind == "c4":
            words = f"c4 --files {sum('c4-train' in path for path in paths)}"
            words += " --validation" if any("c4-validation" in path for path in paths) else ""
            words += f" --from {quoted(manifest.source)}" if manifest.source.startswith("s3://") else ""
        elif manifest.kind == IMAGES:
            bad = quoted(*(self.directory / name for name in {problem.path: "" for problem in self.problems}))
            return f"rm {bad}, then for each: launcher stage image SOURCE --to {quoted(self.directory)}"
        else:
            words = f"{manifest.kind} {quoted(manifest.source.removeprefix('hf://'))}"
        return f"launcher stage {words} --to {quoted(self.directory)}"

    def lines(self) -> list[str]:
        """For people: what it is, its state, what it is good for."""
        manifest = self.manifest
        size = gigabytes(sum(file.bytes for file in manifest.files.values()))
        state = f"INCOMPLETE, {counted(len(self.problems), 'file')}" if self.problems else "complete"
        of = f" from {manifest.source} at {manifest.revision[:12]}" if manifest.source else ""
        rows = [f"{problem.path}: {problem.what}" for problem in self.problems[:10]]
        if len(self.problems) > 10:
            rows.append(f"… and {len(self.problems) - 10} more")
        if self.unknown:
            more = counted(len(self.unknown), "file")
            rows.append(f"not verified: {more} in en/ ({self.unknown[0]}, …): stage or remove")
        first = f"{self.directory}: {manifest.kind}{of}, {counted(len(manifest.files), 'file')}, {size}, {state}"
        return [first, *(f"  {row}" for row in (*rows, *self.suffices()))]

    def suffices(self) -> list[str]:
        """For which runs."""
        if self.manifest.kind == "c4":
            tokens = scaled(self.train_files * TOKENS_PER_FILE, " tokens")
            of = f"{self.train_files} of {self.manifest.train_files_in_all} train files, about {tokens}"
            even = [str(n) for n in range(1, self.train_files + 1) if self.train_files % n == 0]
            shown = ", ".join(even if len(even) <= 12 else [*even[:5], "…", *even[-5:]])
            used = f"; all of them are used by {shown}" if even else ""
            return [f"{of}: for up to {self.train_files} data-parallel ranks{used}"]
        if self.manifest.kind == IMAGES:
            return [f"{name}: {gigabytes(file.bytes)}" for name, file in self.manifest.files.items()]
        option = "--tokenizer" if self.manifest.kind == "tokenizer" else "--init-from"
        return [] if self.problems else [f"for: launcher submit {option} {quoted(self.directory)}"]

    def as_dict(self) -> dict[str, Any]:
        sizes = {path: file.bytes for path, file in self.manifest.files.items()}
        value: dict[str, Any] = {
            "directory": str(self.directory),
            "kind": self.manifest.kind,
            "files": len(sizes),
            "bytes": sum(sizes.values()),
            "complete": not self.problems,
            "problems": [{"path": problem.path, "what": problem.what} for problem in self.problems],
        }
        if self.manifest.kind == IMAGES:
            return value | {"images": sizes}
        value |= {"source": self.manifest.source, "revision": self.manifest.revision}
        if self.manifest.kind == "c4":
            value |= {
                "unknown_files": self.unknown,
                "train_files": self.train_files,
                "train_files_in_all": self.manifest.train_files_in_all,
                "tokens": self.train_files * TOKENS_PER_FILE,
                "largest_data_parallel_degree": self.train_files,
            }
        return value


def staged_images(directory: Path) -> list[str]:
    """Names that `launcher stage image` gives. Raises OSError."""
    return sorted(name for name in os.listdir(directory) if NAME.fullmatch(name))


def check_images(directory: Path, deep: bool) -> Report:
    """Heads, sizes and descriptions; with `deep`, every byte against the checksum in the name and the description."""
    files: dict[str, StagedFile] = {}
    problems, sound = [], []
    for name in staged_images(directory):
        path, said = directory / name, described(directory / name)
        size, digest = 0, str(said.get("sha256", name[:12]))
        try:
            size = superblock(path).file_size
            if digest.startswith(name[:12]) and said.get("bytes", size) == size:
                sound.append(RemoteFile(name, size, digest))
            else:
                problems.append(Problem(name, f"{sidecar_path(Path(name))} describes another image"))
        except LauncherError as error:
            problems.append(Problem(name, error.what.removeprefix(f"{path}: ")))
        files[name] = StagedFile(size, digest, 0)
    if deep:
        problems += read(directory, sound, "other bytes than its checksum says")
    return Report(directory, Manifest(IMAGES, "", "", files), problems)


def reports(directory: Path, deep: bool = False, read_images: bool = False) -> list[Report]:
    """What the manifest lists, and the images, which have none: of both, what is there. Raises LauncherError."""
    require_directory(directory)
    try:
        images = staged_images(directory)
    except OSError as error:
        raise unreadable(directory, error) from error
    found: list[Report] = []
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
        raise LauncherError(
            "not-staged",
            f"{directory}: was not staged by the launcher, so nothing is known about its files",
            f"launcher stage c4 --to {quoted(directory)} (or tokenizer, or model) checks it and brings the rest",
            status=ExitStatus.NOT_FOUND,
        )
    return Report(directory, manifest, check(directory, manifest, deep))


def staged_below(places: Iterable[Path]) -> list[Path]:
    """Staged directories, each once: the places themselves, and those directly inside them."""
    found: dict[str, Path] = {}
    for place in places:
        with contextlib.suppress(OSError):
            for path in (place, *(path for path in sorted(place.iterdir()) if not path.name.startswith("."))):
                with contextlib.suppress(OSError):
                    if os.path.exists(manifest_path(path)) or staged_images(path):
                        found.setdefault(os.path.realpath(path), path)
    return list(found.values())
