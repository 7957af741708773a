"""Many files of one repository into one directory: several at once, continued, verified, under a lock.

A file is written below .staged/partial, under a name that holds its checksum, and renamed when its bytes are the
Hub's. So nothing unverified ever has a final name, and whatever ends this process, the next call goes on.
"""

from __future__ import annotations

import contextlib
import os
import stat
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from launcher.base.errors import ExitStatus, LauncherError
from launcher.base.output import say
from launcher.stage.hub import Repo, pin
from launcher.stage.manifest import (
    BLOCK,
    Manifest,
    StagedFile,
    describe_wrong,
    is_verified,
    open_at_once,
    read_manifest,
    write_manifest,
)
from launcher.stage.progress import Progress
from launcher.stage.shards import in_files
from launcher.stage.source import RemoteFile, Source
from launcher.stage.target import (
    Stopped,
    Work,
    at_work,
    check_space,
    gigabytes,
    in_the_way,
    refuse_foreign,
    write_error,
)

JOBS = 8  # files at once
SECONDS_BETWEEN_MANIFESTS = 2.0  # a verified file that is not in it yet is only read again


@dataclass(frozen=True)
class Outcome:
    """What a call did: files that were there already, that were downloaded, and how long that took."""

    manifest: Manifest
    present: int
    downloaded: int
    bytes_downloaded: int
    seconds: float

    def as_dict(self, target: Path) -> dict[str, object]:
        return {
            "directory": str(target),
            "kind": self.manifest.kind,
            "source": self.manifest.source,
            "revision": self.manifest.revision,
            "files": len(self.manifest.wanted),
            "bytes": sum(self.manifest.files[path].bytes for path in self.manifest.wanted),
            "present": self.present,
            "downloaded": self.downloaded,
            "bytes_downloaded": self.bytes_downloaded,
            "seconds": round(self.seconds, 3),
        }


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
            f"--to {target}: holds {found.kind} from {found.source}, not from {source}",
            "name another directory",
        )
    return found


def open_repo(target: Path, name: str, repo_kind: str, kind: str, revision: str | None, token: str | None) -> Repo:
    """The repository at the commit that `target` was begun with, else at `revision`, else at the newest."""
    asked = Repo(name, repo_kind, "", token)
    found = known_manifest(target, kind, asked.source)
    repo = pin(name, repo_kind, revision or (found.revision if found else None), token)
    if found is not None and found.revision != repo.revision:
        raise LauncherError(
            f"--to {target}: holds revision {found.revision}, asked for is {repo.revision}",
            "leave --revision out to continue, or name another directory: two revisions do not mix",
        )
    return repo


def fetch(
    target: Path,
    source: Source,
    wanted: Sequence[RemoteFile],
    kind: str,
    ours: Callable[[Path], bool],
    jobs: int = JOBS,
    train_files_in_all: int = 0,
) -> Outcome:
    """Brings every file of `wanted` below `target`, verified against its source, and records it.

    Files that are there are kept when their bytes are right, and replaced when they are not. Raises LauncherError;
    on Ctrl-C, KeyboardInterrupt after everything has stopped. In both cases a later call continues.
    """
    began = time.monotonic()
    refuse_foreign(target, ours)
    with at_work(target, say) as work:
        found = known_manifest(target, kind, source.source)
        files = dict(found.files) if found and found.revision == source.revision else {}
        if found and found.kind == "model":
            kind = "model"
        missing, unread = _sorted(target, wanted, files)
        paths = {file.path for file in wanted}
        # What was verified before stays in the list; what was wanted before and never came does not.
        manifest = Manifest(
            kind, source.source, source.revision, files, tuple(paths | files.keys()), train_files_in_all
        )
        state = _State(target, work, source, manifest, jobs)
        present = len(wanted) - len(missing) - len(unread)
        if unread:
            wrong = state.run("checking", unread, 0, state.adopt)
            missing += wrong
            present += len(unread) - len(wrong)
        for folder in {Path(file.path).parts[:-1] for file in missing}:
            work.top.below(*folder).close()  # refuses a link before anything is downloaded
        work.partial.clear(_partial(file) for file in missing)
        already = sum(min(work.partial.size(_partial(file)), file.bytes) for file in missing)
        check_space(target, sum(file.bytes for file in missing) - already)
        state.save()
        if missing:
            state.run("downloading", sorted(missing, key=lambda file: file.path), already, state.bring)
        state.save()
        size = sum(file.bytes for file in missing) - already
        return Outcome(state.manifest, present, len(missing), size, time.monotonic() - began)


def _sorted(
    target: Path, wanted: Sequence[RemoteFile], files: dict[str, StagedFile]
) -> tuple[list[RemoteFile], list[RemoteFile]]:
    """Files to download, and files to read first: of the right size, but not known to be untouched.

    Forgets what the manifest says about them, so that it never claims more than is known.
    """
    missing, unread = [], []
    for file in wanted:
        entry = files.get(file.path)
        if entry and (entry.bytes, entry.sha256) != (file.bytes, file.sha256 or entry.sha256):
            entry = None  # edited by hand: the Hub's word counts
        if entry and is_verified(target, file.path, entry):
            continue
        files.pop(file.path, None)
        try:
            there = (target / file.path).stat()
        except NotADirectoryError:
            raise in_the_way(target / Path(file.path).parts[0], "a file, not a directory") from None
        except OSError:
            missing.append(file)
            continue
        if not stat.S_ISREG(there.st_mode):
            what = "a directory, not a file" if stat.S_ISDIR(there.st_mode) else "no file"
            raise in_the_way(target / file.path, what)
        size = there.st_size
        if size == file.bytes:
            unread.append(file)
        else:
            say(f"{target / file.path}: {describe_wrong(target / file.path, size, file.bytes)}; downloaded again")
            missing.append(file)
    return missing, unread


class _State:
    """One call's work: the manifest as it grows, and the pool that fills it."""

    def __init__(self, target: Path, work: Work, source: Source, manifest: Manifest, jobs: int) -> None:
        self.target, self.work, self.source, self.manifest, self.jobs = target, work, source, manifest, jobs
        self.stop = threading.Event()
        self.saved = 0.0
        self.progress: Progress | None = None

    def save(self) -> None:
        write_manifest(self.work.state, self.manifest)
        self.saved = time.monotonic()

    def run(
        self,
        title: str,
        files: Sequence[RemoteFile],
        already: int,
        work: Callable[[RemoteFile, Progress], StagedFile | None],
    ) -> list[RemoteFile]:
        """`work` on each file, several at once; what it returns goes into the manifest. Returns where it gave None."""
        refused = []
        progress = Progress(title, len(files), sum(file.bytes for file in files), already, sys.stderr)
        with progress, ThreadPoolExecutor(self.jobs, thread_name_prefix="stage") as pool:
            pending: dict[Future[StagedFile | None], RemoteFile] = {
                pool.submit(work, file, progress): file for file in files
            }
            try:
                while pending:
                    done, _ = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
                    for future in done:
                        file = pending.pop(future)
                        staged = future.result()
                        progress.done_files += 1
                        if staged is None:
                            refused.append(file)
                        else:
                            self.manifest = self.manifest.with_file(file.path, staged)
                    progress.refresh()
                    if done and time.monotonic() - self.saved > SECONDS_BETWEEN_MANIFESTS:
                        self.save()
            except BaseException:
                self.stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
                for future in pending:  # verified while we were stopping
                    if future.done() and not future.cancelled() and future.exception() is None:
                        staged = future.result()
                        if staged is not None:
                            self.manifest = self.manifest.with_file(pending[future].path, staged)
                with contextlib.suppress(LauncherError):  # the disk may be what went wrong
                    self.save()
                progress.say(
                    f"stopped: {len(self.manifest.files)} of {in_files(len(self.manifest.wanted))} are complete in "
                    f"{self.target}; the same command continues"
                )
                raise
        return refused

    def adopt(self, file: RemoteFile, progress: Progress) -> StagedFile | None:
        """A file that was there: kept when its bytes are the Hub's."""
        path = self.target / file.path
        digests, buffer = file.digests(), bytearray(BLOCK)
        before = path.stat().st_mtime_ns
        try:
            with open_at_once(path) as stream:
                while count := stream.readinto(buffer):
                    if self.stop.is_set():
                        raise Stopped
                    digests.update(memoryview(buffer)[:count])
                    progress.add(count)
        except OSError as error:
            progress.say(f"{path}: {error.strerror}; downloaded again")
            return None
        if digests.match(file):
            return StagedFile(file.bytes, digests.sha256.hexdigest(), before)
        progress.say(f"{path}: other bytes than the Hub's; downloaded again")
        return None

    def bring(self, file: RemoteFile, progress: Progress) -> StagedFile:
        """A file from the Hub, under its final name when its bytes are right; wrong ones are tried once more."""
        with self.work.partial.begin(_partial(file)) as stream:
            digests = self.source.download(file, stream, progress.add, self.stop)
            if not digests.match(file):
                progress.say(f"{file.path}: wrong bytes (checksum differs from the Hub's); downloaded again")
                progress.add(-file.bytes)
                stream.truncate(0)
                digests = self.source.download(file, stream, progress.add, self.stop)
            if not digests.match(file):
                self.work.partial.remove(Path(str(stream.name)).name)
                raise LauncherError(
                    f"{file.path}: wrong bytes twice: the Hub announces {file.digest[:16]}…, received was "
                    f"{digests.sha256.hexdigest()[:16]}…",
                    "a proxy or cache on the way may change files; nothing of it was kept; the same command tries "
                    "again",
                    status=ExitStatus.ERROR,
                )
            try:
                os.fsync(stream.fileno())  # the manifest must not outlive the bytes it vouches for
                found = os.fstat(stream.fileno())
                self.work.partial.finish(stream, self.target / file.path, self.work.top)
            except OSError as error:
                raise write_error(self.target / file.path, error) from error
        return StagedFile(found.st_size, digests.sha256.hexdigest(), found.st_mtime_ns)


def _partial(file: RemoteFile) -> str:
    """By content, not by name alone: what another revision has left is never continued."""
    return f"{file.digest[:24]}-{Path(file.path).name}"


def summary(outcome: Outcome, target: Path) -> str:
    """One line for people about what a call did."""
    size = sum(outcome.manifest.files[path].bytes for path in outcome.manifest.wanted)
    line = f"{target}: {in_files(len(outcome.manifest.wanted))}, {gigabytes(size)}, verified"
    if outcome.downloaded:
        rate = outcome.bytes_downloaded / max(outcome.seconds, 1e-3)
        return f"{line}; {outcome.downloaded} downloaded in {outcome.seconds:,.0f} s ({gigabytes(rate)}/s)"
    return f"{line}; nothing to download"
