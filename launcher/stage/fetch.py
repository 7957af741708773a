"""Many files of one repository into one directory: several at once, verified, under a lock.

A file is written below .staged/partial and renamed when its bytes are the source's. So nothing unverified ever has a
final name, and whatever ends this process, the next call brings what is missing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from launcher.base.errors import ExitStatus, LauncherError
from launcher.base.output import counted, say
from launcher.stage.hub import Repo, pin
from launcher.stage.manifest import (
    Manifest,
    StagedFile,
    check_bytes,
    is_verified,
    read_manifest,
    write_manifest,
    wrong_size,
)
from launcher.stage.progress import JOBS, Progress, each
from launcher.stage.s3 import Bucket
from launcher.stage.source import RemoteFile
from launcher.stage.target import Incoming, Work, at_work, check_space, gigabytes, in_the_way


@dataclass(frozen=True)
class Outcome:
    """What a call did: files that were there already, that were downloaded, and how long that took."""

    target: Path
    manifest: Manifest
    present: int
    downloaded: int
    bytes_downloaded: int
    seconds: float

    @property
    def bytes(self) -> int:
        return sum(self.manifest.files[path].bytes for path in self.manifest.wanted)

    def as_dict(self) -> dict[str, object]:
        return {
            "directory": str(self.target),
            "kind": self.manifest.kind,
            "source": self.manifest.source,
            "revision": self.manifest.revision,
            "files": len(self.manifest.wanted),
            "bytes": self.bytes,
            "present": self.present,
            "downloaded": self.downloaded,
            "bytes_downloaded": self.bytes_downloaded,
            "seconds": round(self.seconds, 3),
        }

    def line(self) -> str:
        """For people."""
        line = f"{self.target}: {counted(len(self.manifest.wanted), 'file')}, {gigabytes(self.bytes)}, verified; "
        if not self.downloaded:
            return line + "nothing to download"
        rate = self.bytes_downloaded / max(self.seconds, 1e-3)
        return f"{line}{self.downloaded} downloaded in {self.seconds:,.0f} s ({gigabytes(rate)}/s)"


def known_manifest(target: Path, kind: str, source: str) -> Manifest | None:
    """The manifest of an earlier call. Raises LauncherError when the directory was staged from something else.

    One that is damaged counts as none: then every file is read again.
    """
    try:
        found = read_manifest(target)
    except LauncherError as error:
        if error.status == ExitStatus.FILESYSTEM:
            raise
        say(f"warning: {error.what}: every file is read again")
        return None
    # A tokenizer's directory may grow into a model's: the weights come from the same repository.
    kinds = {kind, "tokenizer", "model"} if kind != "c4" else {"c4"}
    if found is not None and (found.source != source or found.kind not in kinds):
        raise LauncherError(
            "target-holds-other",
            f"--to {target}: holds {found.kind} from {found.source}, not from {source}",
            "name another directory",
        )
    return found


def open_repo(target: Path, name: str, repo_kind: str, kind: str, revision: str | None, token: str) -> Repo:
    """The repository at the commit that `target` was begun with, else at `revision`, else at the newest."""
    asked = Repo(name, repo_kind, "", token)
    found = known_manifest(target, kind, asked.source)
    repo = pin(name, repo_kind, revision or (found.revision if found else None), token)
    if found is not None and found.revision != repo.revision:
        raise LauncherError(
            "target-holds-other",
            f"--to {target}: holds revision {found.revision}, asked for is {repo.revision}",
            "leave --revision out to continue, or name another directory: two revisions cannot be mixed",
        )
    return repo


def fetch(
    target: Path,
    source: Repo | Bucket,
    wanted: Sequence[RemoteFile],
    kind: str,
    jobs: int = JOBS,
    train_files_in_all: int = 0,
) -> Outcome:
    """Brings every file of `wanted` below `target`, verified against its source, and records it.

    Files that are there are kept when their bytes are right, and replaced when they are not. Raises LauncherError, or
    KeyboardInterrupt on Ctrl-C; in both cases a later call brings what is missing.
    """
    began = time.monotonic()
    with at_work(target, say) as work:
        found = known_manifest(target, kind, source.source)
        files = dict(found.files) if found and found.revision == source.revision else {}
        left = _left(target, wanted, files)
        for folder in {Path(file.path).parts[:-1] for file in left}:
            work.top.below(*folder)  # refuses a link before anything is downloaded
        missing = {file.path for file in left if _is_wrong(target / file.path, file)}
        check_space(target, sum(file.bytes for file in left if file.path in missing))
        # What was verified before stays in the list; what was wanted before and never came does not.
        paths = tuple({file.path for file in wanted} | files.keys())
        kind = "model" if found and found.kind == "model" else kind
        manifest = Manifest(kind, source.source, source.revision, files, paths, train_files_in_all)
        write_manifest(work, manifest)
        came: list[RemoteFile] = []

        def bring(file: RemoteFile, progress: Progress) -> StagedFile:
            if file.path not in missing and (staged := _kept(target / file.path, file, progress)):
                return staged
            came.append(file)
            return download_right(source.download, file, work, progress)

        try:
            for file, staged in each("staging", left, bring, jobs):
                files[file.path] = staged  # and with it in the manifest
                write_manifest(work, manifest)
        except BaseException:
            have = f"{len(files)} of {counted(len(paths), 'file')}"
            say(f"stopped: {have} are complete in {target}; the same command continues")
            raise
        size = sum(file.bytes for file in came)
        return Outcome(target, manifest, len(wanted) - len(came), len(came), size, time.monotonic() - began)


def _left(target: Path, wanted: Sequence[RemoteFile], files: dict[str, StagedFile]) -> list[RemoteFile]:
    """Files that are not known to be there untouched.

    Forgets what the manifest says about them, so that it never claims more than is known.
    """
    left = []
    for file in wanted:
        entry = files.get(file.path)
        if entry and (entry.bytes, entry.sha256) != (file.bytes, file.sha256 or entry.sha256):
            entry = None  # edited by hand: the source's word counts
        if entry and is_verified(target, file.path, entry):
            continue
        files.pop(file.path, None)
        left.append(file if file.sha256 or file.blob or not entry else replace(file, sha256=entry.sha256))
    return sorted(left, key=lambda file: file.path)


def _is_wrong(path: Path, file: RemoteFile) -> bool:
    """Whether a file must be downloaded, without reading it. Raises LauncherError for what cannot be replaced."""
    what = wrong_size(path, file.bytes)
    if "not a file" in what:
        raise in_the_way(path, what)
    if what and what != "missing":
        say(f"{path}: {what}; downloaded again")
    return bool(what) or not (file.sha256 or file.blob)  # nothing says what its bytes should be


def _kept(path: Path, file: RemoteFile, progress: Progress) -> StagedFile | None:
    """A file that was there: kept when its bytes are the source's."""
    try:
        staged = check_bytes(path, file, progress.add)
        why = "other bytes than the source's"
    except OSError as error:
        staged, why = None, error.strerror or str(error)
    if staged is None:
        progress.say(f"{path}: {why}; downloaded again")
    return staged


def download_right(
    download: Callable[[RemoteFile, Incoming], None], file: RemoteFile, work: Work, progress: Progress
) -> StagedFile:
    """A file from its source, under its final name when its bytes are right; once more when they are not.

    Nothing is kept of wrong ones.
    """
    *folders, name = Path(file.path).parts
    for _ in range(2):
        with work.unfinished(file.bytes, progress.add) as stream:
            download(file, stream)
            if staged := check_bytes(stream.handle, file):
                work.keep(stream, work.top.below(*folders), name)
                return staged
            stream.restart()
        progress.say(f"{file.path}: wrong bytes (the checksum differs from the announced one)")
    raise LauncherError(
        "wrong-bytes",
        f"{file.path}: wrong bytes twice: not those of {(file.sha256 or file.blob or f'{file.bytes:,} bytes')[:16]}",
        "a proxy or cache on the way may change files; nothing of it was kept; the same command tries again",
        status=ExitStatus.ERROR,
    )
