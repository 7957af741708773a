"""What may be guessed wrong about a job: numbers that Slurm gave away again, answers in doubt, copies, secrets."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.base.errors import ExitStatus
from launcher.titan import caches
from tests.conftest import Launch
from tests.unit.test_submission import SBATCH, SQUEUE, SUBMIT, Fake, jobs, run, slurm, status

__all__ = ["run", "slurm"]  # fixtures


def test_a_job_number_that_belongs_to_somebody_else_now(launch: Launch, run: Path, image: Path) -> None:
    (image.parent / "jobs.txt").write_text("100 somebody-elses-training RUNNING\n")
    assert status(launch)["state"] == "UNKNOWN"
    assert "cancelled" in launch("cancel", "r").stdout
    assert jobs(image) == ["100 somebody-elses-training RUNNING"]
    assert status(launch)["state"] == "CANCELLED"  # it had not begun, and its claim is taken


def test_a_job_that_slurm_hides_for_a_while_never_begins_after_it_was_cancelled(
    launch: Launch, run: Path, slurm: Fake
) -> None:
    slurm("squeue", ":")
    assert "launcher cancel r && launcher submit" in launch("status", "r").stdout
    assert launch("cancel", "r").returncode == 0
    slurm("squeue", SQUEUE)
    job = subprocess.run(["bash", "runs/r/job.sbatch"], env={"SLURM_JOB_ID": "100"}, capture_output=True, text=True)
    assert (job.returncode, "nothing is run twice" in job.stderr) == (75, True)


def test_a_job_that_has_begun_and_that_slurm_does_not_know_is_not_called_cancelled(
    launch: Launch, run: Path, slurm: Fake
) -> None:
    (run / "claim").mkdir()
    (run / "claim" / "job_id").write_text("100\n")
    slurm("squeue", ":")
    cancel = launch("cancel", "r")
    assert cancel.returncode == ExitStatus.JOB_UNKNOWN and "not cancelled" in cancel.stdout
    assert status(launch)["state"] == "UNKNOWN"


REFUSED = "echo 'sbatch: error: Invalid qos specification' >&2; exit 1"


@pytest.mark.parametrize(
    "script",
    [f"{SBATCH}\necho 4711", f"({SBATCH}) >/dev/null\necho 4711", f"({SBATCH}) >/dev/null\n{REFUSED}"],
    ids=["beside its number", "in place of its number", "refused"],
)
def test_a_job_is_found_whatever_sbatch_said(script: str, launch: Launch, slurm: Fake, image: Path) -> None:
    slurm("sbatch", script)
    assert launch(*SUBMIT).returncode == 0
    assert (status(launch)["state"], status(launch)["job_id"]) == ("PENDING", "100")
    assert launch("cancel", "r").returncode == 0
    assert jobs(image)[0].endswith("CANCELLED")


def test_a_job_of_an_earlier_run_of_this_name_is_not_taken_for_one_that_slurm_hides(
    launch: Launch, run: Path, image: Path
) -> None:
    name = jobs(image)[0].split()[1]
    (image.parent / "jobs.txt").write_text(f"99 {name} COMPLETED\n")
    assert status(launch)["state"] == "UNKNOWN"


def test_a_refused_job_of_which_slurm_keeps_a_record(launch: Launch, slurm: Fake, image: Path) -> None:
    slurm("sbatch", f"({SBATCH.replace('PENDING', 'FAILED')}) >/dev/null\n{REFUSED}")
    assert launch(*SUBMIT).returncode == ExitStatus.CLUSTER
    assert not (image.parent / "runs" / "r").exists()


def test_many_who_look_at_once_see_no_submission(launch: Launch, slurm: Fake, image: Path) -> None:
    slurm("sbatch", "kill -9 $PPID; kill -9 $$")  # no job.json, so that the lock is looked at
    launch(*SUBMIT, alone=True)
    with open(image.parent / "runs" / "r" / "submit.lock") as another:
        fcntl.flock(another, fcntl.LOCK_SH)  # as every reader holds it
        assert status(launch)["state"] == "UNKNOWN"


def test_a_job_of_another_user_is_seen(launch: Launch, run: Path, slurm: Fake, image: Path) -> None:
    name = jobs(image)[0].split()[1]
    slurm("squeue", f'case "$*" in *--jobs=100*) echo "100|RUNNING|{name}|None" ;; esac')
    assert status(launch)["state"] == "RUNNING"


def test_a_doubtful_answer_and_a_silent_controller_keep_the_run(launch: Launch, slurm: Fake, image: Path) -> None:
    slurm("sbatch", "exit 55")
    slurm("squeue", "exit 1")
    done = launch(*SUBMIT)
    assert done.returncode == ExitStatus.CLUSTER and "may or may not" in done.stderr
    assert launch("cancel", "r").returncode == ExitStatus.CLUSTER  # nobody to ask: it is not called cancelled
    slurm("squeue", ":")
    assert status(launch)["state"] == "UNKNOWN"


def test_a_job_number_that_cannot_be_written_down_is_said(launch: Launch, slurm: Fake, image: Path) -> None:
    slurm("sbatch", "mkdir job.json; echo 77")
    done = launch(*SUBMIT)
    assert done.returncode == ExitStatus.FILESYSTEM
    assert "submitted as job 77" in done.stderr and "do not submit it again" in done.stderr


def test_a_copy_is_not_the_run(launch: Launch, run: Path) -> None:
    copy = shutil.copytree(run, run.with_name("copy"))
    assert status(launch, "copy")["state"] == "UNKNOWN" and "copy" in status(launch, "copy")["reason"]
    assert "not cancelled" in launch("cancel", "copy").stdout
    assert status(launch)["state"] == "PENDING"
    (copy / "end.json").write_text('{"exit_code": 0}')
    assert status(launch, "copy")["state"] == "COMPLETED"


def test_secrets_go_when_slurm_says_that_it_is_over(launch: Launch, slurm: Fake, image: Path) -> None:
    launch(*SUBMIT, "--env", "A_TOKEN=x")
    secret = image.parent / "runs" / "r" / "secret.env"
    assert secret.exists() and (secret.parent / ".gitignore").read_text() == "secret.env\n"
    (image.parent / "jobs.txt").write_text(jobs(image)[0].replace("PENDING", "NODE_FAIL") + "\n")
    assert status(launch)["state"] == "NODE_FAIL" and not secret.exists()


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("training.local_batch_size=1", "--batch-size"),
        ("training.steps=10", "--steps"),
        ("compile.enable=true", "recipe.compile"),
    ],
)
def test_a_setting_that_would_make_the_row_false(setting: str, said: str, launch: Launch, image: Path) -> None:
    done = launch("render", "--gpu", "b200", "--image", "titan.sqsh", "--set", setting)
    assert (done.returncode, said in done.stderr) == (ExitStatus.INVALID, True)


def test_set_reaches_the_recipe_too(launch: Launch, image: Path) -> None:
    settings = ("recipe.activation_checkpoint=full", "recipe.lr=0.1", "training.max_norm=2.0")
    given = [word for setting in settings for word in ("--set", setting)]
    values = json.loads(launch("config", "show", "--gpu", "b200", "--image", "titan.sqsh", *given, "--json").stdout)
    assert values["recipe.activation_checkpoint"] == {"value": "full", "origin": "option --set"}
    assert (values["recipe.lr"]["value"], values["titan.training.max_norm"]["value"]) == (0.1, "2.0")
    assert launch("render", "--gpu", "b200", "--image", "x", "--set", "recipe.lrr=1").returncode == ExitStatus.INVALID


def test_a_file_for_the_cluster_does_not_stop_a_local_run(launch: Launch, workplace: Path) -> None:
    (workplace / "site.toml").write_text(
        '[job]\nimage = "/data/titan.sqsh"\nnodes = 9\nruntime = "pyxis"\npartition = "batch"\n'
        'python = "/opt/venv/bin/python"\n'
    )
    done = launch("render", "--local", "--gpu", "cpu", "--recipe", "debug", "-c", "site.toml")
    assert done.returncode == 0 and "/opt/venv" not in done.stdout, done.stderr


def test_a_profile_of_ones_own_keeps_the_gpus_settings(launch: Launch, workplace: Path) -> None:
    (workplace / "mine.toml").write_text('[profile]\ngpu = "H200"\ngpus_per_node = 4\n')
    shown = json.loads(launch("config", "show", "--gpu", "./mine.toml", "--image", "x", "--json").stdout)
    assert shown["recipe.local_batch_size"]["value"] == 4
    (workplace / "r.toml").write_text("[gpu.h20.recipe]\nsteps = 3\n")
    done = launch("render", "--gpu", "h200", "--image", "x", "-c", "r.toml")
    assert "there is no profile 'h20'" in done.stderr


def test_a_mount_that_holds_the_data_is_not_mounted_over(launch: Launch, workplace: Path) -> None:
    script = launch("render", "--gpu", "gb200", "--image", "x", "--mount", "/mnt/store:/data").stdout
    assert "/mnt/store:/data" in script and "/data/c4:/data/c4" not in script


def test_escape_sequences_of_others_do_not_reach_the_terminal(launch: Launch, slurm: Fake, image: Path) -> None:
    slurm("sbatch", r"printf 'sbatch: error: invalid partition: \033]0;pwned\007x\n' >&2; exit 1")
    assert "\x1b" not in launch(*SUBMIT).stderr
    (image.parent / "bad.toml").write_text('[job]\nname = "\x1b[31m\n', encoding="utf-8")
    assert "\x1b" not in launch(*SUBMIT, "-c", "bad.toml").stderr


def test_output_that_cannot_be_written(launch: Launch, workplace: Path) -> None:
    program = f"{sys.executable} -m launcher version"
    full, closed = (
        subprocess.run(["bash", "-c", f"{program} {where}"], capture_output=True, text=True)
        for where in (">/dev/full", "<&- | head -c1")
    )
    assert full.returncode == ExitStatus.FILESYSTEM and "No space left" in full.stderr
    assert "Traceback" not in full.stderr + closed.stderr


def test_a_directory_that_went_away(launch: Launch, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = workplace / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    done = launch("render", "--gpu", "b200", "--image", "/x")
    assert done.returncode == ExitStatus.INVALID and "no longer exists" in done.stderr


def test_one_sacct_for_a_list(launch: Launch, slurm: Fake, image: Path) -> None:
    for name in ("a", "b", "c"):
        launch(*SUBMIT[:-1], name)
    (image.parent / "jobs.txt").write_text("")
    slurm("sacct", f"echo x >>{image.parent}/asked; exit 1")
    assert {row["state"] for row in json.loads(launch("list", "--json").stdout)} == {"UNKNOWN"}
    assert (image.parent / "asked").read_text() == "x\n"


def test_a_node_that_cannot_write_the_run_directory(launch: Launch, workplace: Path) -> None:
    if os.getuid() != 0 or not shutil.which("setpriv"):
        pytest.skip("needs root and setpriv")
    script = launch("render", "--gpu", "b200", "--image", "/x", "--name", "r").stdout
    (workplace / "runs" / "r").mkdir(parents=True)
    os.chown(workplace / "runs" / "r", 65534, 65534)
    bash = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "bash"]
    env = {"SLURM_JOB_ID": "1", "PATH": os.environ["PATH"]}
    done = subprocess.run(bash, input=script, capture_output=True, text=True, env=env)
    assert (done.returncode, "cannot write the run directory" in done.stderr) == (77, True), done.stderr


def test_a_file_system_without_locks(launch: Launch, slurm: Fake, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(_descriptor: object, _how: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    assert launch(*SUBMIT, "--env", "A_TOKEN=x").returncode == 0
    run = image.parent / "runs" / "r"
    assert status(launch)["state"] == "PENDING" and launch("cancel", "r").returncode == 0
    (run / "job.json").unlink()  # as while it is being submitted: nobody may take its claim then
    (run / "cancelled").unlink()
    assert status(launch)["state"] == "SUBMITTING" and not (run / "claim").exists()
    intent = json.loads((run / "intent.json").read_text())
    (run / "intent.json").write_text(json.dumps({**intent, "at": intent["at"] - 1000}))
    assert status(launch)["state"] == "CANCELLED"  # found again by its name


def test_scratch_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSYS, "")))
    assert caches._held(tmp_path / "titan-0-7").is_dir()
