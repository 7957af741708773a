"""The test cluster behaves as Slurm with Pyxis does: what other tests rely on is shown here first."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.config import sbatch
from tests.cluster import slurm_cluster
from tests.cluster.daemons import REGISTRY, processes, remove_leftovers, wait_for
from tests.cluster.slurm_cluster import Cluster, User, finished_job, job_fields, running_cluster, slurm_run
from tests.conftest import ROOT


@pytest.fixture(autouse=True)
def only_the_stand_in(slurm: Cluster) -> None:
    if slurm.record is None:
        pytest.skip("these test the cluster that the tests start, not the one that is there")


def submit(slurm: Cluster, user: User | None, directory: Path, script: str, *options: str) -> str:
    """sbatch a script whose output goes to `directory`/out; the job's id."""
    (directory / "job.sh").write_text(f"#!/bin/bash\n#SBATCH --output={directory}/out\n{script}\n")
    done = slurm_run(slurm, ["sbatch", "--parsable", *options, directory / "job.sh"], user, directory)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def run_in(slurm: Cluster, image: Path | str, user: User, *words: str, **env: str) -> tuple[int, str]:
    """Exit code and combined output of one `srun` in a container."""
    done = slurm_run(slurm, ["srun", f"--container-image={image}", *words], user, env=env)
    return done.returncode, done.stdout + done.stderr


def processes_with(text: str) -> list[int]:
    return [pid for pid, command, _ in processes() if text in command.replace("\0", " ")]


# ------------------------------------------------------------------------------------------ Slurm
# Nodes, GPUs and partitions, and that there is no accounting: test_cluster_show.py. Values that reach a container, a
# log for each node, nodes that talk to each other, and the image that trains: test_launcher_on_slurm.py.


def test_gpus_are_allocated(slurm: Cluster, ordinary_user: User, small_image: Path) -> None:
    code, text = run_in(slurm, small_image, ordinary_user, "--gres=gpu:2", "printenv", "CUDA_VISIBLE_DEVICES")
    assert (code, text.strip()) == (0, "0,1")


def test_any_value_of_an_option_is_read_as_it_was_written(slurm: Cluster, user_dir: Path, ordinary_user: User) -> None:
    value = 'it\'s "quoted" #1 \\ \\\\ $(id) `id` a  b'
    (line,) = sbatch.lines({}, [f"comment={value}"])
    job = submit(slurm, ordinary_user, user_dir, f"#SBATCH {line}\ntrue")
    shown = slurm_run(slurm, ["scontrol", "show", "job", job]).stdout
    assert f"Comment={value}" in shown, shown
    finished_job(slurm, job)


def test_finished_job_is_found_by_name(slurm: Cluster, ordinary_user: User, user_dir: Path) -> None:
    job = submit(slurm, ordinary_user, user_dir, "exit 3", "--job-name=once-only")
    assert finished_job(slurm, job)["ExitCode"] == "3:0"
    found = slurm_run(slurm, ["squeue", "-h", "--name", "once-only", "-t", "all", "-o", "%i|%T"], ordinary_user)
    assert found.stdout.strip() == f"{job}|FAILED"


# -------------------------------------------------------------------------------- the end of a job

STUBBORN = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.setsid()
    time.sleep(600)
open(f"/shared/up-{os.environ['SLURM_NODEID']}", "w").close()
signal.signal(signal.SIGTERM, signal.SIG_DFL)
time.sleep(600)
"""

# Slurm sends SIGTERM more than once, and to the commands that a trap runs, too: so they must ignore it.
TRAP = """
    state() { scontrol -o show job "$SLURM_JOB_ID" | tr ' ' '\\n' | grep -E '^(JobState|Reason)=' | paste -sd ' '; }
    trap 'trap "" TERM; echo "at the end: $(state)"' EXIT
    trap 'trap "" TERM; exit 143' TERM
"""


def test_scancel_ends_every_process(slurm: Cluster, ordinary_user: User, user_dir: Path, small_image: Path) -> None:
    """Also those that ignore SIGTERM and have left the task's session, as torchrun's workers have."""
    (user_dir / "stubborn.py").write_text(STUBBORN)
    mount = f"--container-mounts={user_dir}:/shared"
    script = f"{TRAP}\nsrun --container-image={small_image} {mount} python3 /shared/stubborn.py {user_dir} & wait"
    job = submit(slurm, ordinary_user, user_dir, script, "--nodes=2", "--ntasks-per-node=1")
    wait_for(lambda: len(list(user_dir.glob("up-*"))) == 2, "both tasks")
    wait_for(lambda: len(processes_with(f"stubborn.py {user_dir}")) >= 6, "their children", 10)
    assert slurm_run(slurm, ["scancel", job], ordinary_user).returncode == 0
    assert finished_job(slurm, job)["JobState"] == "CANCELLED"
    assert "at the end: JobState=COMPLETING Reason=None" in (user_dir / "out").read_text()
    wait_for(lambda: not processes_with(f"stubborn.py {user_dir}"), "the end of the job's processes", 10)


def test_time_limit(slurm: Cluster, ordinary_user: User, user_dir: Path) -> None:
    job = submit(slurm, ordinary_user, user_dir, f"{TRAP}\nsrun sleep 300 & wait", "--time=5")
    wait_for(lambda: job_fields(slurm, job)["JobState"] == "RUNNING", "the job's start")
    # Limits are whole minutes; an earlier end, which only an operator may set, spares the wait.
    assert slurm_run(slurm, ["scontrol", "update", f"jobid={job}", "endtime=now+2seconds"]).returncode == 0
    assert finished_job(slurm, job)["JobState"] == "TIMEOUT"
    text = (user_dir / "out").read_text()
    assert "CANCELLED AT" in text
    assert "DUE TO TIME LIMIT" in text
    assert "at the end: JobState=COMPLETING Reason=TimeLimit" in text


# -------------------------------------------------------------------------------------- containers


@pytest.mark.parametrize(
    ("image", "options", "code", "message"),
    [
        ("/nope/x.sqsh", "", 1, "pyxis: failed to create container filesystem for image: /nope/x.sqsh"),
        ("/nope/x.sqsh", "", 1, "[ERROR] No such file or directory: /nope/x.sqsh"),
        ("/etc/passwd", "", 1, "[ERROR] Invalid image format: /etc/passwd"),
        ("TRUNCATED", "", 1, "FATAL ERROR: File system corruption detected"),
        ("ubuntu:24.04", "", 1, "pyxis: failed to import docker image"),
        (
            "IMAGE",
            "--container-mounts=/nope/dir:/x",
            1,
            "pyxis: --container-mounts: source path does not exist: /nope/dir",
        ),
        (
            "IMAGE",
            "--container-mounts=/tmp:x",
            255,
            "srun: error: pyxis: mount target must be a relative path or an absolute path",
        ),
        ("IMAGE", "--container-workdir=/nope", 1, "pyxis: couldn't chdir to /nope: No such file or directory"),
        ("IMAGE", "--container-env=NVIDIA_VISIBLE_DEVICES", 1, "98-nvidia.sh exited with return code 1"),
        ("IMAGE", "--no-such-option", 255, "srun: unrecognized option '--no-such-option'"),
        ("IMAGE", "--chdir=/", 2, "error: execve(): no-such-program: No such file or directory"),
    ],
)
def test_error_messages(
    slurm: Cluster,
    ordinary_user: User,
    user_dir: Path,
    small_image: Path,
    image: str,
    options: str,
    code: int,
    message: str,
) -> None:
    if image == "TRUNCATED":
        image = str(user_dir / "truncated.sqsh")
        with small_image.open("rb") as whole:
            Path(image).write_bytes(whole.read(100_000))
    image = image.replace("IMAGE", str(small_image))
    words = [*options.split(), "no-such-program"]
    seen, text = run_in(slurm, image, ordinary_user, *words, NVIDIA_VISIBLE_DEVICES="all")
    assert message in text
    assert seen == code


def test_mounts_without_image_are_ignored(slurm: Cluster, ordinary_user: User) -> None:
    done = slurm_run(slurm, ["srun", "--container-mounts=/nope:/nope", "echo", "on the host"], ordinary_user)
    assert (done.returncode, done.stdout) == (0, "on the host\n")


def test_what_a_container_sees(slurm: Cluster, ordinary_user: User, user_dir: Path, small_image: Path) -> None:
    (user_dir / "file").write_text("from the host\n")
    home = str(ordinary_user.home)
    look = f"id -un; pwd; ls /tmp | wc -l; cat /a/b; test -e {home} || echo no home; cat /run/z/file; touch /ro/x"
    mounts = f"{user_dir}/file:/a/b,{user_dir}:/ro:ro,{user_dir}:/var/run/z"
    command = ["srun", f"--container-image={small_image}", f"--container-mounts={mounts}", "sh", "-c", look]
    done = slurm_run(slurm, command, ordinary_user)
    assert done.stdout.splitlines() == [
        ordinary_user.name,
        "/",
        "0",
        "from the host",
        "no home",
        "from the host",
    ]
    assert "touch: cannot touch '/ro/x': Read-only file system" in done.stderr
    assert not Path("/run/z").exists()  # the image's link /var/run did not lead out of it


def test_working_directory(slurm: Cluster, ordinary_user: User, small_image: Path) -> None:
    home = str(ordinary_user.home)
    assert run_in(slurm, small_image, ordinary_user, "pwd") == (0, "/\n")
    assert run_in(slurm, small_image, ordinary_user, "--container-mount-home", "pwd") == (0, f"{home}\n")
    assert run_in(slurm, small_image, ordinary_user, "--container-workdir=/usr/lib", "pwd") == (
        0,
        "/usr/lib\n",
    )


def test_root_file_system(slurm: Cluster, ordinary_user: User, small_image: Path) -> None:
    assert run_in(slurm, small_image, ordinary_user, "--container-remap-root", "id", "-u") == (0, "0\n")
    as_root = slurm_run(slurm, ["srun", f"--container-image={small_image}", "touch", "/new"])
    assert as_root.returncode == 0, as_root.stderr
    read_only = ["srun", f"--container-image={small_image}", "--container-readonly", "touch", "/new"]
    assert "Read-only file system" in slurm_run(slurm, read_only).stderr


def test_who_sets_a_variable(slurm: Cluster, ordinary_user: User, small_image: Path) -> None:
    def seen(*options: str, **env: str) -> str:
        show = 'echo "$TEST_IMAGE|$ONLY_JOB|$PATH"'
        variables = {"TEST_IMAGE": "from the job", "ONLY_JOB": "1", "PATH": "/job:/usr/bin:/bin"} | env
        return run_in(slurm, small_image, ordinary_user, *options, "sh", "-c", show, **variables)[1].strip()

    profile = "/usr/local/bin:/usr/bin:/bin:/usr/local/games:/usr/games"
    assert seen() == f"from the image|1|{profile}"
    assert seen(ENROOT_LOGIN_SHELL="no") == "from the image|1|/usr/local/bin:/usr/bin:/bin"
    assert seen("--container-env=TEST_IMAGE") == f"from the job|1|{profile}"
    assert seen("--container-env=PATH,TEST_IMAGE") == "from the job|1|/job:/usr/bin:/bin"


def test_container_leaves_nothing(slurm: Cluster, ordinary_user: User, user_dir: Path, small_image: Path) -> None:
    image = user_dir / "mine.sqsh"  # of its own, because the other image may be in use by another test run
    shutil.copy(small_image, image)

    def devices() -> list[str]:
        files = [(path, path.read_text().strip()) for path in Path("/sys/block").glob("loop*/loop/backing_file")]
        return [str(path) for path, file in files if file == str(image)]

    job = slurm_run(slurm, ["sbatch", "--parsable", f"--container-image={image}", "--wrap", "sleep 60"]).stdout
    wait_for(lambda: len(devices()) == 1, "the image's loop device", 20)
    slurm_run(slurm, ["scancel", job.strip()])
    wait_for(lambda: not devices(), "the end of the loop device", 20)
    assert str(slurm.directory / "containers") not in Path("/proc/mounts").read_text()


# ------------------------------------------------------------------------------- start and stop


def running_below(directory: Path) -> list[int]:
    return processes_with(f"{directory}/")


@pytest.fixture
def open_dir(ordinary_user: User, user_dir: Path) -> Path:
    ordinary_user.home.chmod(0o755)
    user_dir.chmod(0o755)
    return user_dir


def test_two_clusters_side_by_side(slurm: Cluster, open_dir: Path) -> None:
    with running_cluster(open_dir, nodes=1, gpus_per_node=8) as second:
        assert second.record != slurm.record
        assert slurm_run(second, ["srun", "printenv", "SLURMD_NODENAME"]).stdout == "gpu-compute-node-001\n"
        assert running_below(open_dir)
    assert not running_below(open_dir)
    assert slurm_run(slurm, ["srun", "true"]).returncode == 0


def test_failed_start_leaves_nothing(slurm: Cluster, open_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm_cluster, "NODE_SCRIPT", "#!/bin/sh\necho broken on purpose\nsleep 60\n")
    monkeypatch.setattr(slurm_cluster, "START_TIMEOUT_S", 1.0)
    with pytest.raises(RuntimeError, match=r"(?s)waited 1 s for 1 idle nodes.*broken on purpose"):
        slurm_cluster.start_cluster(open_dir, nodes=1)
    assert not running_below(open_dir)
    assert not [record for record in REGISTRY.glob("*.json") if str(open_dir) in record.read_text()]


def test_killed_starter_is_cleaned_up_after(slurm: Cluster, open_dir: Path) -> None:
    code = (
        "import os, pathlib; from tests.cluster import slurm_cluster as s; "
        "s.start_cluster(pathlib.Path(os.environ['D']), nodes=1); os._exit(1)"
    )
    environment = dict(os.environ) | {"D": str(open_dir), "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=False)
    assert running_below(open_dir)
    remove_leftovers()
    wait_for(lambda: not running_below(open_dir), "the end of the leftovers", 5)
