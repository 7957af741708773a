"""What a staged directory holds, whether it is complete, and for which runs it suffices. Asks no server."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.errors import ExitStatus, LauncherError
from launcher.stage import c4, tokenizer
from launcher.stage.manifest import Manifest, Problem, look, read, read_manifest
from launcher.stage.progress import Progress
from launcher.stage.target import gigabytes

PLACES = ("/data/c4", "/data/tokenizers", "/data/models")  # where the defaults of `submit` look
# Shapes of the published rows: GPU type, nodes, GPUs of each.
SHAPES = (("h200", 1, 8), ("gb200", 3, 4), ("gb200", 9, 4), ("gb200", 17, 4))


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
        return sum(1 for name in names if (match := c4.SHARD.fullmatch(name)) and match[1] == "train")

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
            words["c4"] += f" --from {self.manifest.source}"
        repo = self.manifest.source.removeprefix("hf://")
        return f"launcher stage {words.get(self.manifest.kind, f'{self.manifest.kind} {repo}')} --to {self.directory}"

    def _wanted_train_files(self) -> int:
        paths = {*self.manifest.wanted, *self.manifest.files}
        return sum(1 for path in paths if "c4-train" in path)

    def lines(self) -> list[str]:
        """For people: what it is, its state, what it is good for."""
        size = sum(file.bytes for file in self.manifest.files.values())
        state = "complete" if not self.problems else f"INCOMPLETE, {len(self.problems)} files"
        first = (
            f"{self.directory}: {self.manifest.kind} from {self.manifest.source} at {self.manifest.revision[:12]}, "
            f"{len(self.manifest.files)} files, {gigabytes(size)}, {state}"
        )
        rows = [f"{problem.path}: {problem.what}" for problem in self.problems[:10]]
        if len(self.problems) > 10:
            rows.append(f"… and {len(self.problems) - 10} more")
        if self.unknown:
            rows.append(
                f"{len(self.unknown)} files in en/ are not verified ({self.unknown[0]}, …): stage or remove them"
            )
        return [first, *(f"  {row}" for row in (*rows, *self.suffices()))]

    def suffices(self) -> list[str]:
        """For which runs."""
        if self.manifest.kind != "c4":
            if self.problems:
                return []
            use = {"tokenizer": "--tokenizer", "model": "--tokenizer, and its weights"}[self.manifest.kind]
            return [f"for: launcher submit {use} {self.directory}" if use == "--tokenizer" else f"for: {use}"]
        train = self.train_files
        if not train:
            return ["no train file: for no run"]
        even = [str(n) for n in range(1, train + 1) if train % n == 0]
        shown = ", ".join(even if len(even) <= 12 else [*even[:5], "…", *even[-5:]])
        rows = [
            f"{train} of {self.manifest.train_files_in_all} train files, about "
            f"{c4.billions(train * c4.TOKENS_PER_FILE)} tokens",
            f"for up to {train} data-parallel ranks; all files are used by {shown}",
        ]
        return rows + [
            f"llama3-8b on {nodes} x {gpus} {gpu.upper()}: {steps:,} steps"
            for gpu, nodes, gpus in SHAPES
            if (steps := steps_of(train, gpu, nodes * gpus))
        ]

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
            tokens = self.train_files * c4.TOKENS_PER_FILE
            value |= {
                "unknown_files": self.unknown,
                "train_files": self.train_files,
                "train_files_in_all": self.manifest.train_files_in_all,
                "tokens": tokens,
                "largest_data_parallel_degree": self.train_files,
            }
        return value


def steps_of(train_files: int, gpu: str, ranks: int) -> int:
    """Steps of llama3-8b until `ranks` data-parallel ranks have read the files once; 0 for more ranks than files."""
    from launcher.layers import find, merge, read_layer

    recipe = merge([read_layer(find("recipes", "llama3-8b"), "recipe", gpu)]).recipe
    used = train_files - train_files % ranks
    return used * c4.TOKENS_PER_FILE // (recipe.local_batch_size * recipe.seq_len * ranks)


def verify(directory: Path, deep: bool = False) -> Report:
    """Raises LauncherError for a directory that has no manifest, with what gives it one."""
    if not directory.is_dir():
        raise LauncherError(f"{directory}: no such directory", f"launcher stage c4 --to {directory} --files 8",
                            status=ExitStatus.NOT_FOUND)  # fmt: skip
    manifest = read_manifest(directory)
    if manifest is None:
        if c4.looks_like_c4(directory):
            count = len(list((directory / "en").glob("c4-train.*.json.gz")))
            fix = f"launcher stage c4 --to {directory} --files {max(count, 1)}    checks what is there, and keeps it"
        elif tokenizer.looks_like_tokenizer(directory):
            fix = f"launcher stage tokenizer --to {directory}    checks what is there, and keeps it"
        else:
            fix = "launcher stage list DIR, with a directory that was staged"
        raise LauncherError(f"{directory}: not staged by the launcher: nothing is known about its files", fix,
                            status=ExitStatus.NOT_FOUND)  # fmt: skip
    problems, unread = look(directory, manifest, deep)
    size = sum(manifest.files[path].bytes for path in unread)
    with Progress("reading", len(unread), size, 0, sys.stderr) as progress:

        def on_bytes(count: int) -> None:
            progress.add(count)
            progress.refresh()

        problems += read(directory, manifest, unread, on_bytes) if unread else []
    return Report(directory, manifest, tuple(problems))


def staged_below(places: list[Path]) -> list[Path]:
    """Staged directories: the places themselves, and those directly inside them."""
    found = []
    for place in places:
        try:
            inside = sorted(
                path for path in place.iterdir() if path.is_dir() and not path.name.startswith(".")
            )
        except OSError:
            continue
        found += [path for path in (place, *inside) if (path / ".staged" / "manifest.json").exists()]
    return found
