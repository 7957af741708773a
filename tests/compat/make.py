"""Makes tests/compat/v0.1: what a version of the launcher writes, for every later version to read, continue and repeat.

    python tests/compat/make.py CHECKOUT FOLDER

CHECKOUT is the version's own, with whose Python packages this one runs. Slurm is a few shell scripts, and the logs
and ends of runs are written here as the job script and torchtitan write them; the local run trains for real.
Paths of the place where it was made are replaced by @PLACE@, and files that only copy the program are left out.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

T0 = 1795331400  # 2026-11-22 07:10:00 UTC
SLURM = {
    "sbatch": "n=$(( $(cat $PLACE/ids) + 1 )); echo $n >$PLACE/ids; echo $n",
    "squeue": ":",
    "sacct": "echo 'Slurm accounting storage is disabled' >&2; exit 1",
    "scontrol": '[ "$*" = "show config" ] && echo "ClusterName = gpus"; exit 0',
    "sinfo": "exit 1",
    "srun": "exit 1",
    "scancel": ":",
}
STEP_03 = (
    "[rank0]:[titan] 2026-11-22 07:{minute:02}:31,413 - root - INFO - step: {step:2}  loss: {loss:8.5f}  "
    "grad_norm: {norm:7.4f}  memory: 158.61GiB(86.20%)  tps: {tps:,}  tflops: 1,018.20  mfu: 45.25%"
)
STEP_02 = (
    "[rank0]:[titan] 2026-11-22 07:{minute:02}:31,413 - root - INFO - \x1b[31mstep: {step:2}  "
    "\x1b[32mloss: {loss:7.4f}  \x1b[38;2;180;60;0mgrad_norm: {norm:7.4f}  \x1b[38;2;54;234;195mmemory: "
    "158.61GiB(86.20%)  \x1b[34mtps: {tps:,}  \x1b[36mtflops: 1,018.20  \x1b[35mmfu: 45.25%\x1b[39m"
)
OUT_OF_MEMORY = """\
[rank3]: Traceback (most recent call last):
[rank3]:   File "/opt/venv/lib/python3.12/site-packages/torchtitan/train.py", line 500, in train_step
[rank3]: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 7.83 GiB. GPU 3 has a total capacity \
of 184.00 GiB of which 3.10 GiB is free."""
ENDS = {  # exit code, signal, what Slurm said
    "completed": (0, "", "JobState=RUNNING Reason=None"),
    "completed-02": (0, "", "JobState=RUNNING Reason=None"),
    "out-of-memory": (1, "", "JobState=RUNNING Reason=None"),
    "cancelled": (143, "TERM", "JobState=COMPLETING Reason=None"),
    "timeout": (143, "TERM", "JobState=COMPLETING Reason=TimeLimit"),
    "unfit": (20, "", "JobState=RUNNING Reason=None"),
    "with-secret": (0, "", ""),
    "with-settings": (0, "", ""),
}
OPTIONS = {
    "with-secret": ["--env", "MY_TOKEN"],
    "with-settings": ["--set", "training.max_norm=2.0", "--env", "NCCL_DEBUG=INFO", "--time", "02:00:00"],
}


def main(checkout: Path, folder: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        place = Path(name).resolve()
        made(place, checkout)
        shutil.rmtree(folder, ignore_errors=True)
        for path in sorted(place.rglob("*")):
            inside = path.relative_to(place)
            if path.is_dir() or not _is_kept(inside):
                continue
            target = folder / inside
            target.parent.mkdir(parents=True, exist_ok=True)
            if path.is_symlink():
                target.symlink_to(os.readlink(path))
                continue
            data = path.read_bytes()
            if path.suffix not in (".gz", ".sqsh"):
                data = neutral(data.decode("utf-8", "surrogateescape"), place, checkout).encode(
                    "utf-8", "surrogateescape"
                )
            target.write_bytes(data)

        # What the version itself says of all that: the same is asked of every later one.
        answers = []
        for line in (Path(__file__).parent / "commands.txt").read_text().splitlines():
            done = called(shlex.split(line), place, environment(place, checkout))
            said = neutral(done.stdout, place, checkout)
            answers.append({"command": line, "code": done.returncode, "said": values(said)})
        (folder / "answers.json").write_text(json.dumps(answers, indent=1) + "\n")
        (folder / "made.json").write_text(json.dumps({"at": int(time.time())}) + "\n")


def called(words: Sequence[str], place: Path, env: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launcher", *words]
    return subprocess.run(command, cwd=place, env=env, capture_output=True, text=True)


def neutral(text: str, place: Path, checkout: Path) -> str:
    """Without the paths of the machine on which it was made."""
    text = text.replace(str(place), "@PLACE@").replace(str(checkout), "@CHECKOUT@")
    return text.replace(sys.executable, "/opt/titan/bin/python").replace(sys.prefix, "/opt/titan")


def values(text: str) -> object:
    """The JSON that a command printed: one value, or a list of those on its lines; None where there is none."""
    try:
        return json.loads(text)
    except ValueError:
        pass
    try:
        return [json.loads(line) for line in text.splitlines()]
    except ValueError:
        return None


def environment(place: Path, checkout: Path) -> dict[str, str]:
    found = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "HF_", "XDG_"))}
    return found | {
        "PLACE": str(place),
        "HOME": str(place / "home"),
        "PYTHONPATH": str(checkout),
        "MY_TOKEN": "not-a-real-token",
        "PATH": f"{place}/slurm-bin:{os.environ['PATH']}",
    }


def fake_slurm(place: Path) -> None:
    (place / "slurm-bin").mkdir()
    (place / "ids").write_text("100")
    for command, script in SLURM.items():
        (place / "slurm-bin" / command).write_text(f"#!/bin/bash\n{script}\n")
        (place / "slurm-bin" / command).chmod(0o755)


def _is_kept(path: Path) -> bool:
    if path.parts[0] in ("slurm-bin", "ids", "hub") or "scratch" in path.parts or "__pycache__" in path.parts:
        return False
    if "sample" in path.parts or "tb" in path.parts or "ranks" in path.parts or ".cache" in path.parts:
        return False
    return "job" not in path.parts or path.name == "node.json"


def made(place: Path, checkout: Path) -> None:
    sys.path.insert(0, str(checkout))
    from tests.conftest import say_it_trains, squashfs_head

    said = environment(place, checkout)
    (place / "home").mkdir()
    fake_slurm(place)
    image = place / "titan.sqsh"
    image.write_bytes(squashfs_head(4096).ljust(4096, b"\0"))
    say_it_trains(image)

    def launcher(*words: str, code: int | None = 0) -> str:
        done = called(words, place, said)
        assert code in (None, done.returncode), (words, done.returncode, done.stdout, done.stderr)
        return done.stdout

    sizes = f"--gpu gb200 --image {image} --data hub --tokenizer sample --yes --force"
    common = f"submit {sizes} --nodes 2 --check quick".split()
    for name in (*ENDS, "waiting", "cut-off", "old"):
        launcher(*common, "--name", name, *OPTIONS.get(name, []))
        (place / "runs" / name / "secret.env").unlink(missing_ok=True)
    for name, end in ENDS.items():
        _ended(place / "runs" / name, *end)
    (place / "runs" / "cut-off" / "job.json").unlink()
    shutil.copytree(place / "runs" / "completed", place / "copies" / "completed", symlinks=True)
    launcher(*["submit", "--local", "--gpu", "cpu", "--recipe", "debug", "--steps", "4", "--name", "local", "--follow"])
    launcher(*f"sweep {sizes} --nodes 2,3 --batch-size 4,5 --name sized --parallel".split())
    _ended(min((place / "runs").glob("sized-*")), 0, "", "")
    (place / "results.json").write_text(launcher("results", "completed", "--json"))
    (place / "results.csv").write_text(launcher("results", "completed", "completed-02", "--format", "csv"))
    (place / "accept.json").write_text(launcher("accept", "completed", "--json", code=None))
    launcher("cluster", "nodes", "add", "gpu-007", "--reason", "replaced cable", "--days", "365")
    launcher("cluster", "use", "gb200")
    with _hub(place) as endpoint:
        said |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(place / "hub"), "HF_HUB_DISABLE_XET": "1"}
        launcher("stage", "c4", "--to", "c4", "--files", "4")
    shutil.copytree(place / "c4", place / "c4-half")
    half = sorted((place / "c4-half" / "en").glob("c4-train*"))[-1]
    manifest = json.loads((place / "c4-half" / ".staged" / "manifest.json").read_text())
    digest = manifest["files"].pop(f"en/{half.name}")["sha256"]
    (place / "c4-half" / ".staged" / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    partial = place / "c4-half" / ".staged" / "partial" / f"{digest[:24]}-{half.name}"
    partial.parent.mkdir(exist_ok=True)
    partial.write_bytes(half.read_bytes()[:1000])
    half.unlink()
    (place / "images").mkdir()
    root = place / "hub" / "root"
    (root / "etc").mkdir(parents=True)
    versions = {"torch": "2.14.1", "cuda": "13.0", "torchtitan": "0.3.0"}
    about = {"schema": 1, "channel": "stable", "arch": "arm64", "driver_min": "580", "sm": ["sm_100"]}
    (root / "etc" / "titan-image.json").write_text(json.dumps({**about, "versions": versions}))
    how = ["-quiet", "-no-progress", "-all-root", "-mkfs-time", "1", "-all-time", "1"]
    subprocess.run(["mksquashfs", root, place / "hub" / "real.sqsh", *how], check=True)
    launcher("stage", "image", str(place / "hub" / "real.sqsh"), "--to", "images")


@contextmanager
def _hub(place: Path) -> Iterator[str]:
    """The loopback Hub of the tests, with twelve small files of C4."""
    from tests.stage.hub_server import running_hub

    folder = place / "hub" / "c4"
    try:
        from launcher import sample  # type: ignore[attr-defined]  # in version 0.1
    except ImportError:
        from launcher.stage import sample
    sample.write_c4_sample(folder, train_files=12, documents_per_file=5)
    with running_hub() as hub:
        files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        hub.add("dataset", "allenai/c4", files)
        yield hub.endpoint


def _ended(run: Path, code: int, signal: str, slurm: str) -> None:
    """As slurm/job.sbatch.j2 leaves a run of 100 steps on two nodes."""
    job_id = str(json.loads((run / "job.json").read_text())["job_id"])
    (run / "claim").mkdir()
    (run / "claim" / "job_id").write_text(f"{job_id}\n")
    (run / "logs").mkdir(exist_ok=True)
    line = STEP_02 if run.name.endswith("02") else STEP_03
    steps = [] if run.name == "unfit" else [1, *range(10, 31 if code else 101, 10)]
    for rank, node in enumerate(("gpu-001", "gpu-002")):
        rows = [
            line.format(minute=10 + at, step=step, loss=12 / (at + 1), norm=2.5 + at, tps=17900 + 10 * at - rank)
            for at, step in enumerate(steps)
        ]
        rows += OUT_OF_MEMORY.splitlines() if run.name == "out-of-memory" and rank else []
        (run / "logs" / f"{rank:04}-{node}.log").write_text("\n".join([*rows, ""]))
    (run / "logs" / "job.log").write_text(f"launcher: job {job_id} on gpu-[001-002], rendezvous 10.0.0.1:20101\n")
    if run.name == "cancelled":
        (run / "cancelled").write_text(json.dumps({"at": T0 + 600, "job_id": job_id}))
    if run.name == "unfit":
        (run / "nodes").mkdir()
        for rank, node in enumerate(("gpu-001", "gpu-002")):
            bad = {"name": "gpu-count", "why": "3 of 4 GPUs answer", "fix": "scontrol reboot gpu-002", "fault": "node"}
            record = {"host": node, "ok": not rank, "cluster": "gpus", "gpu": "NVIDIA GB200"}
            record |= {"why": bad["why"], "fix": bad["fix"], "problems": [bad]} if rank else {}
            (run / "nodes" / f"{rank:04}-{node}.json").write_text(json.dumps(record))
    (run / "end.json").write_text(
        f'{{"job_id": "{job_id}", "exit_code": {code}, "signal": "{signal}", "slurm": "{slurm}", '
        f'"began_at": {T0}, "ended_at": {T0 + 900}}}\n'
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve())
