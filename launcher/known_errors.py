"""What a failed run's logs mean: the errors that are known, each with its cause and the next command.

KNOWN is data, in order of priority. tests/unit/test_known_errors.py has a line of output for every row and says where
it comes from; docs/errors.md lists them by family.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from functools import cache
from itertools import chain
from pathlib import Path

from launcher.follow import error_logs, last_lines
from launcher.secret import masked
from launcher.titan.log import first_error, open_log, plain_text

HEAD_BYTES = 1 << 16  # of each log: what starts a container is said at the beginning
TAIL_BYTES = 1 << 18
LINE_CHARS = 4096


class Where(Enum):
    """Which text a row may be matched with: the less a line proves by itself, the less of the logs is searched."""

    RAISED = auto()  # the first error's own lines: elsewhere it may be a warning that was survived
    PRINTED = auto()  # these, both ends of the job's and the nodes' logs, and how the job ended
    VICTIM = auto()  # the first error's first line, when nothing else is known: it also befalls a rank whose peer died


@dataclass(frozen=True)
class Known:
    """An error that is known. Both texts may name the pattern's groups and {node}; `fix` also {run}, {again}, {run_dir}."""

    name: str
    family: str  # a section of docs/errors.md
    where: Where
    pattern: str
    what: str
    fix: str


RAISED, PRINTED, VICTIM = Where.RAISED, Where.PRINTED, Where.VICTIM

# How a job ended is one more line to match: `run FAILED reason=... exit=137 logs=some`.
# fmt: off
KNOWN = (
    # What the launcher's own script and node.py found: they have said it best.
    Known("node-unfit", "launcher", PRINTED, r'titan-node: FAIL node=\d+ host=(?P<host>\S+) why="(?P<why>.*)" fix="(?P<fix>.*)"',
          "node {host} is not fit to train: {why}", "{fix}"),
    Known("run-dir-unwritable", "launcher", PRINTED, r"launcher: this node cannot write the run directory|^run FAILED .*exit=77\b",
          "a compute node cannot write the run directory", "launcher submit {again} --runs-dir DIR   (one that you can write on all nodes)"),
    Known("submitted-twice", "launcher", PRINTED, r"launcher: .* already holds job \S+: nothing is run twice|^run FAILED .*exit=75\b",
          "the run directory already holds a job, and nothing is run twice", "launcher submit {again}"),
    Known("head-is-loopback", "launcher", PRINTED, r"launcher: \S+ resolves to no address but loopback|^run FAILED .*exit=76\b",
          "the first node resolves to a loopback address, where no other node can reach it",
          "give it its network address in DNS, /etc/hosts or slurm.conf's NodeAddr; around it: launcher submit {again} --exclude NODE"),
    Known("node-unfit-exit", "launcher", PRINTED, r"^run FAILED .*exit=20\b", "a node is not fit to train, and its log does not say why", "launcher logs {run}"),

    # The kernel's limit on user namespaces says "No space left on device", too.
    Known("user-namespaces", "container", PRINTED, r"failed to create user namespace", "the node does not let users make user namespaces, which enroot needs",
          "srun -N1 sysctl user.max_user_namespaces kernel.apparmor_restrict_unprivileged_userns   (the administrator's to change)"),

    # Disks. Before the container's errors, of which they are the cause.
    Known("shm-full", "disk", PRINTED, r"shared memory segment /dev/shm",
          "/dev/shm of a node, or of its container, is too small for NCCL", "srun -N1 df -h /dev/shm; around it: launcher submit {again} --env NCCL_SHM_DISABLE=1"),
    Known("disk-full", "disk", PRINTED, r"No space left on device|\[Errno 28\]", "a disk is full; the lines below name the file",
          "srun -N1 df -h /tmp {run_dir}; then launcher submit {again}"),
    Known("quota", "disk", PRINTED, r"Disk quota exceeded|\[Errno 122\]", "your quota on a file system is used up; the lines below name the file",
          "quota -s; then launcher submit {again} --runs-dir DIR"),
    Known("stale-handle", "disk", PRINTED, r"Stale (?:NFS )?file handle|\[Errno 116\]",
          "a file on NFS was replaced or removed, or its server restarted, while the job used it", "launcher submit {again}   (leave image and data in place while jobs run)"),
    Known("read-only", "disk", RAISED, r"\[Errno 30\]|Read-only file system", "something was to be written where nothing can be: an image is read-only",
          "launcher submit {again} --mount SRC:DST   (a directory that can be written, in its place)"),

    # Pyxis and enroot.
    Known("no-pyxis", "container", PRINTED, r"nrecognized option '?--container-", "this cluster's srun does not know Pyxis's options: Pyxis is not installed",
          "launcher submit {again} --runtime apptainer --image FILE.sif"),
    Known("image-from-registry", "container", PRINTED, r"\[ERROR\] URL https?://\S+ returned|pyxis: importing docker image.*\.sqsh",
          "Pyxis took the image for one in a registry: a file's path must begin with / or .", "launcher submit {again} --image ./FILE.sqsh"),
    Known("image-missing", "container", PRINTED, r"\[ERROR\] No such file or directory: (?P<path>\S+)", "the node cannot see {path}",
          "srun -N1 ls -l {path}; onto a file system that all nodes mount: launcher stage image FILE.sqsh --to DIR"),
    Known("image-not-squashfs", "container", PRINTED, r"\[ERROR\] Invalid image format: (?P<path>\S+)", "{path} is not a squashfs", "launcher image inspect {path}"),
    Known("image-damaged", "container", PRINTED, r"Read on filesystem failed because EOF|File system corruption detected",
          "the image file is cut short or damaged", "launcher image inspect FILE.sqsh; copy it again, verified: launcher stage image FILE.sqsh --to DIR"),
    Known("image-has-devices", "container", PRINTED, r"create_inode: could not create character device",
          "the image holds device nodes, which only root can unpack", "launcher image convert IMAGE   (it leaves them out)"),
    Known("mount-source", "container", PRINTED, r"--container-mounts: source path does not exist: (?P<path>.+?)\s*$", "the node has no {path} to mount into the container",
          "srun -N1 ls -ld {path}; then launcher submit {again} --mount SRC:DST   (or --data, --tokenizer: what all nodes have; without the mounts of the profile: --set 'profile.mounts=[]')"),
    Known("mount-target", "container", PRINTED, r"pyxis: mount target must be", "the second part of a --mount is not a path that Pyxis takes",
          "launcher submit {again} --mount SRC:/ABSOLUTE/DST"),
    Known("wrong-architecture", "container", PRINTED, r"(?:enroot-switchroot: |execve\(\): |srun: error: ).*Exec format error", "the image is of another architecture than the node",
          "launcher image inspect FILE.sqsh --gpu PROFILE; one for GB200 and GB300: launcher image build --arch arm64 -o ."),
    Known("command-missing", "container", PRINTED, r"error: execve\(\): (?P<path>.+?): No such file or directory|enroot-switchroot: failed to execute: (?P<path2>.+?): No such file",
          "the image has no {path}{path2}", "launcher image inspect FILE.sqsh; then launcher submit {again} --python PATH"),
    Known("dev-fuse", "container", PRINTED, r"fuse: failed to open /dev/fuse|/dev/fuse: Permission denied", "the node does not let users mount the image: /dev/fuse cannot be opened",
          "srun -N1 ls -l /dev/fuse   (the administrator makes it 0666, or sets Pyxis's use_squashfuse=0)"),
    Known("mount-failed", "container", PRINTED, r"\[ERROR\] Failed to mount", "the node could not mount the image", "launcher image inspect FILE.sqsh; srun -N1 ls -l /dev/fuse"),
    Known("no-container-cli", "container", PRINTED, r"Command not found: nvidia-container-cli",
          "an image for GPUs on a node without NVIDIA's container tools", "sinfo -o '%N %G'; then launcher submit {again} --partition NAME; without GPUs: launcher submit --gpu cpu --recipe debug --image FILE.sqsh"),
    Known("driver-too-old-for-image", "container", PRINTED, r"nvidia-container-cli: requirement error: (?P<why>.+)", "the node's NVIDIA driver is too old for the image: {why}",
          "srun -N1 nvidia-smi; then launcher image inspect FILE.sqsh --driver VERSION"),
    Known("container-cli", "container", PRINTED, r"nvidia-container-cli: (?P<why>.+)", "NVIDIA's container tools cannot hand over the GPUs: {why}",
          "srun -N1 nvidia-smi -L; around the node: launcher submit {again} --exclude {node}"),
    Known("nvidia-hook", "container", PRINTED, r"98-nvidia\.sh exited with return code", "enroot's NVIDIA hook failed: the GPUs were not handed over",
          "srun -N1 nvidia-smi -L; around the node: launcher submit {again} --exclude {node}"),

    # Slurm, the kernel.
    Known("oom-kill", "slurm", PRINTED, r"oom[_-]kill event|OOM Killed|srun: error: .*Out Of Memory|^run OUT_OF_MEMORY", "a node ran out of main memory (not of GPU memory), and the kernel killed a process",
          "launcher submit {again} --batch-size N   (smaller); what a node has: sinfo -o '%N %m'"),
    Known("killed", "slurm", PRINTED, r"\(exitcode: -9\)|exitcode +: -9\b|is killed by signal: Killed|^run FAILED .*exit=137\b",
          "a process was killed by SIGKILL (137 is 128 + 9): most often the kernel's, for want of main memory", "srun -N1 -w {node} dmesg --ctime | grep -i 'out of memory'; then launcher submit {again}"),
    Known("time-limit", "slurm", PRINTED, r"DUE TO TIME LIMIT|^run (?:TIMEOUT|DEADLINE)\b", "the job's time limit ended it", "launcher submit {again} --time HH:MM:SS   (longer)"),
    Known("node-failure", "slurm", PRINTED, r"DUE TO NODE FAILURE|^run (?:NODE_FAIL|BOOT_FAIL)\b", "a node failed, and Slurm ended the job", "sinfo -R; then launcher submit {again} --exclude NODE"),
    Known("preempted", "slurm", PRINTED, r"DUE TO PREEMPTION|^run PREEMPTED\b", "a job of higher priority took the nodes", "launcher submit {again}"),
    Known("launch-failure", "slurm", PRINTED, r"^run (?:\S+ reason=JobLaunchFailure\b|LAUNCH_FAILED\b|FAILED reason=\S* exit=(?:0|53) logs=none)",
          "Slurm could not start the script (0:53): as a rule the node cannot write the run directory's logs/", "srun -N1 touch {run_dir}/logs/probe; then launcher submit {again} --runs-dir DIR"),
    Known("step-refused", "slurm", PRINTED, r"srun: error: Unable to create step for job", "Slurm gave the job its nodes, but refused the step on them", "scontrol show job JOBID; sinfo -R; then launcher submit {again}"),
    Known("cancelled", "slurm", PRINTED, r"^run (?:CANCELLED|REVOKED)\b", "the job was cancelled", "launcher submit {again}"),

    # CUDA, Triton.
    Known("driver-too-old", "cuda", PRINTED, r"driver version is insufficient|driver on your system is too old|forward compatibility was attempted|unsupported display driver",
          "the node's NVIDIA driver is older than the image's CUDA needs", "srun -N1 nvidia-smi; then launcher image inspect FILE.sqsh --driver VERSION"),
    Known("no-kernel-image", "cuda", PRINTED, r"no kernel image is available|is not compatible with the current PyTorch installation", "the image's torch was not built for this GPU (such as sm_100 of B200 and GB200)",
          "launcher image inspect FILE.sqsh --gpu PROFILE; a newer one: launcher image build stable -o ."),
    Known("ptxas", "cuda", PRINTED, r"is not defined for option 'gpu-name'|PTXAS error", "Triton's ptxas does not know this GPU (SM 100 and later need CUDA's own)",
          "launcher submit {again} --env TRITON_PTXAS_BLACKWELL_PATH=/usr/local/cuda/bin/ptxas"),
    Known("gpu-memory", "cuda", RAISED, r"CUDA out of memory|OutOfMemoryError|Cuda failure.*out of memory", "a GPU's memory is too small for this run", "launcher submit {again} --batch-size N   (smaller)"),
    Known("gpu-broken", "cuda", PRINTED, r"uncorrectable (?:ECC|NVLink) error|fallen off the bus|CUDA error: unspecified launch failure", "a GPU of {node}, or its link, is broken",
          "launcher submit {again} --exclude {node}; tell the administrator"),
    Known("fabric-not-ready", "cuda", RAISED, r"Error 802|system not yet initialized", "the NVLink fabric of {node} is not up", "srun -N1 -w {node} systemctl status nvidia-fabricmanager; then launcher submit {again} --exclude {node}"),
    Known("no-gpu", "cuda", RAISED, r"No CUDA GPUs are available|no CUDA-capable device is detected|Found no NVIDIA driver", "a rank on {node} sees no GPU",
          "srun -N1 -w {node} nvidia-smi -L; NVIDIA_VISIBLE_DEVICES=all in the image: launcher image inspect FILE.sqsh"),

    # The Hub and `datasets`.
    Known("hub-gated", "hub", RAISED, r"GatedRepoError|Cannot access gated repo|is a gated dataset", "the model or data set is gated: it wants an accepted licence, and a token of that account",
          "accept it on its page, then fetch it before the job: launcher stage tokenizer --to DIR --token-file FILE"),
    Known("hub-401", "hub", RAISED, r"401 Client Error|HTTP Error 401", "the Hub does not accept the token, or there is none", "hf auth whoami; then launcher stage tokenizer --to DIR --token-file FILE"),
    Known("hub-403", "hub", RAISED, r"403 Client Error|403 Forbidden|HTTP Error 403", "the Hub's token may not read this", "launcher stage tokenizer --to DIR --token-file FILE   (a token that may read it)"),
    Known("hub-429", "hub", RAISED, r"429 Client Error|429 Too Many Requests|HTTP Error 429|HTTP status code 429", "too many ranks asked the Hub at once, and it refuses them for a while",
          "launcher stage c4 --to DIR --for nodes=N,gpus=N,steps=N,batch=N; then launcher submit {again} --data DIR"),
    Known("hub-offline", "hub", RAISED, r"OfflineModeIsEnabled|offline mode is enabled|outgoing traffic has been disabled", "something is missing that was to come from the Hub, and the job does not ask the Hub (HF_HUB_OFFLINE=1)",
          "launcher stage verify DIR; launcher stage c4 --to DIR --for nodes=N,gpus=N,steps=N,batch=N"),
    Known("hub-unreachable", "hub", RAISED, r"Couldn't reach .*Hub|LocalEntryNotFoundError|Failed to resolve 'huggingface\.co'", "the compute nodes cannot reach the Hub",
          "launcher stage c4 --to DIR --for nodes=N,gpus=N,steps=N,batch=N; then launcher submit {again} --data DIR"),
    Known("builder-config", "hub", RAISED, r"BuilderConfig '(?P<config>[^']*)' not found", "the data directory has no README.md that describes the configuration {config}", "launcher stage c4 --to DIR --files N   (it puts the README.md beside en/)"),
    Known("no-data-files", "hub", RAISED, r"Couldn't find any data file at|DataFilesNotFoundError", "the data directory is not there, or holds no data", "launcher stage verify DIR; launcher stage c4 --to DIR --files N"),
    Known("shard-damaged", "hub", RAISED, r"BadGzipFile|zlib\.error|Compressed file ended before", "a file of the training data is damaged or cut short", "launcher stage verify DIR --deep; then launcher stage c4 --to DIR --files N"),

    # torchtitan.
    Known("dp-degree", "torchtitan", RAISED, r"dp_degree is inconsistent before and after checkpoint", "a checkpoint's data position only fits the data-parallel degree that it was written with",
          "launcher submit {again} --nodes N   (as many data-parallel ranks as before)"),
    Known("loss-not-finite", "torchtitan", RAISED, r"[Ll]oss is not finite|[Ll]oss is (?:NaN|Inf)|non-finite", "the loss or a gradient became NaN or infinite", "launcher logs {run} | grep step:; then launcher submit {again} --set optimizer.lr=1e-4   (smaller)"),
    Known("tokenizer-missing", "torchtitan", RAISED, r"Tokenizer path '[^']*' does not exist|No supported tokenizer files found", "there is no tokenizer where the run looks for it",
          "launcher stage tokenizer --to DIR; then launcher submit {again} --tokenizer DIR"),
    Known("unknown-setting", "torchtitan", RAISED, r"(?P<setting>(?:Unrecognized options|unrecognized arguments): [^│]{1,200}|Config function '[^']*' not found)", "torchtitan does not know a setting of this run ({setting})",
          "launcher config show {again}   (what was set); launcher logs {run}   (titan-node: torchtitan=VERSION)"),

    # NCCL.
    Known("nccl-no-interface", "nccl", PRINTED, r"(?i:no socket interface found)", "NCCL finds no network interface of the name that it was given", "launcher submit {again} --env NCCL_SOCKET_IFNAME=NAME   (ip -br addr on the node lists them)"),
    Known("nccl-locked-memory", "nccl", PRINTED, r"ibv_\w+ failed.*Cannot allocate memory", "InfiniBand may not lock memory on a node: its limit is too low", "srun -N1 bash -c 'ulimit -l'   (the administrator sets it to unlimited for slurmd)"),
    Known("nccl-ib", "nccl", PRINTED, r"NCCL WARN Call to ibv_\w+ failed|^Call to ibv_\w+ failed", "InfiniBand does not work between two nodes: the line below names the call", "srun -N1 ibstat; then launcher submit {again} --exclude NODE --env NCCL_DEBUG=INFO"),
    Known("port-in-use", "rendezvous", RAISED, r"EADDRINUSE|[Aa]ddress already in use", "another program on the first node has the rendezvous's port", "launcher submit {again}   (another job has another port)"),
    Known("nccl-timeout", "nccl", VICTIM, r"collective operation timeout|collective.*timed out", "a collective did not end in time: one rank hangs, failed unseen, or came late",
          "tail -n 3 {run_dir}/logs/*-*.log   (which node is behind?); longer limits: launcher submit {again} --set comm.init_timeout_seconds=1500"),
    Known("nccl-peer-gone", "nccl", VICTIM, r"ncclRemoteError|remote process exited|Got completion from peer", "NCCL lost a peer: its process died, or the network between two nodes failed", "launcher logs {run} | grep -m1 -i error; then launcher submit {again} --env NCCL_DEBUG=INFO"),
    Known("nccl-system", "nccl", VICTIM, r"unhandled system error|ncclSystemError", "NCCL could not use the network or a device", "launcher submit {again} --env NCCL_DEBUG=INFO   (then the log says which)"),
    Known("nccl-cuda", "nccl", VICTIM, r"unhandled cuda error|ncclUnhandledCudaError", "a CUDA call of NCCL's failed", "launcher submit {again} --env NCCL_DEBUG=INFO   (then the log says which)"),

    # What says nothing by itself.
    Known("container-not-started", "container", VICTIM, r"pyxis: (?:couldn't start container|container start failed|failed to create container filesystem|child \d+ failed)", "Pyxis could not start the container",
          "launcher logs {run}; launcher image inspect FILE.sqsh"),
    Known("head-unreachable", "rendezvous", VICTIM, r"client socket has (?:timed out|failed to connect)", "a node could not reach the first node", "launcher logs {run} | grep rendezvous; srun -N2 ip -br addr; then launcher submit {again}"),
    Known("rendezvous-timeout", "rendezvous", VICTIM, r"RendezvousTimeoutError", "not all nodes came to the rendezvous in time", "ls -l {run_dir}/logs   (whose log is missing or short?); then launcher submit {again} --exclude NODE"),
    Known("rendezvous-closed", "rendezvous", VICTIM, r"Rendezvous(?:Closed|GracefulExit)Error|[Rr]endezvous .*is closed", "the other nodes had already ended when this one came to the rendezvous", "ls -l {run_dir}/logs   (which log ends first?); launcher logs {run}"),
    Known("peer-gone", "rendezvous", VICTIM, r"Connection (?:closed|reset|refused)|Broken pipe|Dist(?:Network|Store|Backend)Error", "a rank lost the connection to another one, which died without a word", "ls -l {run_dir}/logs   (which log ends first?); launcher logs {run}"),
    Known("rendezvous-gone", "rendezvous", VICTIM, r"Rendezvous(?:Connection|State)Error|TCPStore", "a node lost the rendezvous on the first node, and nothing else is known", "launcher logs {run}"),
)
# fmt: on

# A line of either end of a log is matched only if it holds one of these: asking for words is quick.
_HINTS = (
    b"titan-node: FAIL",
    b"launcher: ",
    b"/dev/shm",
    b"No space left",
    b"quota exceeded",
    b"[Errno 28]",
    b"[Errno 122]",
    b"[Errno 116]",
    b"file handle",
    b"nrecognized option",
    b"[ERROR]",
    b"importing docker image",
    b"filesystem failed",
    b"system corruption",
    b"create_inode",
    b"--container-mounts",
    b"mount target",
    b"Exec format",
    b"execve()",
    b"enroot-switchroot",
    b"/dev/fuse",
    b"user namespace",
    b"nvidia-container-cli",
    b"98-nvidia",
    b"kill event",
    b"OOM Killed",
    b"Out Of Memory",
    b"exitcode",
    b"killed by signal",
    b"DUE TO ",
    b"Unable to create step",
    b"driver",
    b"forward compatibility",
    b"kernel image",
    b"current PyTorch",
    b"gpu-name",
    b"PTXAS",
    b"uncorrectable",
    b"off the bus",
    b"launch failure",
    b"socket interface",
    b"no socket",
    b"ibv_",
)
# First errors that leave open what came before them; any other exception is a cause, known or not.
_TELLS_LITTLE = re.compile(
    r"srun: error|slurmstepd|pyxis:|^\[ERROR\]|^enroot|exitcode|ChildFailedError|SignalException|NCCL WARN"
    r"|KeyboardInterrupt|SystemExit|CANCELLED AT"
)


@dataclass(frozen=True)
class Failure:
    """Why a run failed, as far as its logs tell: `name`, `cause` and `fix` are empty where the error is not known."""

    name: str
    cause: str
    fix: str
    path: Path | None  # the log that `lines` are from
    lines: Sequence[str]
    is_error: bool  # False where the lines are only the last ones

    def as_json(self) -> dict[str, object]:
        return {
            "known_error": self.name or None,
            "cause": self.cause or None,
            "fix": self.fix or None,
            "log": str(self.path) if self.path else None,
            "lines": list(map(masked, self.lines)),
        }

    def as_text(self) -> list[str]:
        """What is printed below a run's state: the cause, the fix, then the log's own lines."""
        said = [f"cause: {self.cause}", f"try: {self.fix}"] if self.name else []
        if self.lines:
            if self.is_error:
                title = "from" if self.name else "first error, in"
            else:
                title = "the last lines, in" if self.name else "no known error; the last lines, in"
            said += [f"{title} {self.path}:", *(f"| {masked(line)}" for line in self.lines)]
        return said


@cache
def _pattern(known: Known) -> re.Pattern[str]:
    return re.compile(known.pattern)


def explain(log_dir: Path, ended: str, reference: str, run_dir: Path) -> Failure:
    """Finds the cause of a failed run in its logs and in how it ended.

    `ended` is `how_it_ended`, `reference` names the run in a command. The first error of the rank that failed first
    decides; both ends of the logs are searched only where it leaves the cause open. Memory doesn't grow with the
    logs. Raises LauncherError when the directory of the logs cannot be read.
    """
    paths = error_logs(log_dir)
    error_path, error = first_error(paths) or (None, [])
    names = {
        "run": shlex.quote(reference),
        "run_dir": shlex.quote(str(run_dir)),
        "again": shlex.quote(str(run_dir / "run.toml")),
    }
    if found := _of_error(error):
        return _failure(*found, names, error_path, error, True)
    if not error or _leaves_open(error[0]):
        ends = [path for path in paths if "ranks" not in path.relative_to(log_dir).parts]
        if printed := _printed(ends, ended):
            known, match, path, lines = printed
            shown = (path, lines, True) if path else (error_path, error, bool(error))
            shown = shown if shown[1] else (*last_lines(paths, 5), False)
            return _failure(known, match, names, *shown)
        if error and (found := _match(error[0], VICTIM)):
            return _failure(*found, names, error_path, error, True)
    if error:
        return Failure("", "", "", error_path, error, True)
    path, lines = last_lines(paths, 5)
    return Failure("", "", "", path if lines else None, lines, False)


def how_it_ended(state: str, reason: str, exit_code: int | None, log_dir: Path) -> str:
    """One line for the patterns: Slurm's word, its reason, the script's exit code, and whether anything was logged."""
    try:
        logged = any(path.stat().st_size for path in log_dir.glob("*.log"))
    except OSError:
        logged = True
    return f"run {state} reason={reason.split(' ')[0]} exit={exit_code} logs={'some' if logged else 'none'}"


def _of_error(lines: Sequence[str]) -> tuple[Known, re.Match[str]] | None:
    code = False  # of a traceback's last frame: what it would say is not what was said
    for line in lines:
        is_frame, code = code or line.startswith('File "'), line.startswith('File "')
        if not is_frame and (found := _match(line, RAISED, PRINTED)):
            return found
    return None


def _match(line: str, *where: Where) -> tuple[Known, re.Match[str]] | None:
    for known in KNOWN:
        if known.where in where and (match := _pattern(known).search(line)):
            return known, match
    return None


def _leaves_open(line: str) -> bool:
    return bool(_TELLS_LITTLE.search(line)) or _match(line, VICTIM) is not None


def _printed(paths: Sequence[Path], ended: str) -> tuple[Known, re.Match[str], Path | None, list[str]] | None:
    """The most telling line at either end of the logs, with what follows it; of equals the first one."""
    best: tuple[int, Known, re.Match[str], Path | None, list[str]] | None = None
    following = 0
    texts: Iterator[tuple[Path | None, bytes]] = ((path, line) for path in paths for line in _ends(path))
    for path, line in chain(texts, [(None, ended.encode())]):
        if best and following and path == best[3] and b"[titan]" not in line:
            best[4].append(plain_text(line[:LINE_CHARS]))
            following -= 1
        if path and not _hinted(line):
            continue
        text = plain_text(line[:LINE_CHARS])
        found = _match(text, PRINTED)
        rank = KNOWN.index(found[0]) if found else 0
        if found and (best is None or rank < best[0]):
            best, following = (rank, *found, path, [text] if path else []), 4
    if best is None:
        return None
    return *best[1:4], [line for line in best[4] if line]


def _hinted(text: bytes) -> bool:
    return any(hint in text for hint in _HINTS)


def _ends(path: Path) -> Iterator[bytes]:
    """The lines at the beginning and the end of a file, or none where it cannot be read."""
    try:
        if (handle := open_log(path)) is None:
            return
        with handle:
            size = handle.seek(0, 2)
            blocks = [(0, HEAD_BYTES), (size - TAIL_BYTES, TAIL_BYTES)]
            if size <= HEAD_BYTES + TAIL_BYTES:
                blocks = [(0, size)]
            for start, length in blocks:
                handle.seek(start)
                block = handle.read(length)
                if _hinted(block):
                    yield from block.split(b"\n")
    except OSError:
        return


def _failure(
    known: Known,
    match: re.Match[str],
    names: dict[str, str],
    path: Path | None,
    lines: Sequence[str],
    is_error: bool,
) -> Failure:
    groups = {name: _unescaped(masked((value or "").strip())[:600]) for name, value in match.groupdict().items()}
    # What a log says is quoted in a command; a fix that node.py proposes is one already.
    quoted = {name: value if name == "fix" else shlex.quote(value) for name, value in groups.items()}
    node = _node(path)
    what = known.what.format(**groups, node=f"node {node}" if node else "a node")
    fix = known.fix.format(**(names | quoted), node=node or "NODE")
    return Failure(known.name, what, fix, path, lines, is_error)


def _unescaped(text: str) -> str:
    """node.py writes its sentences as JSON strings."""
    return text.replace('\\"', '"').replace("\\\\", "\\")


def _node(path: Path | None) -> str:
    """The node whose log it is, or ""; a rank's own log lies in a directory with its node's name."""
    for part in reversed((*path.parts[:-1], path.stem)) if path else ():
        if match := re.fullmatch(r"\d{4,}-([\w.-]+)", part):
            return match[1]
    return ""
