"""Sweeps: the matrix before it starts, what is submitted and what is not, whatever came before, and the table."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from launcher.base.errors import ExitStatus
from launcher.config.spec import Job, RunSpec
from launcher.scheduler.state import JobState
from launcher.sweep import cells, table
from launcher.titan.recipe import Recipe
from tests.conftest import Launch
from tests.unit.outcomes import outcome, spread
from tests.unit.test_submission import SBATCH, SQUEUE, Fake, jobs, slurm
from tests.unit.titan_log import STEPS
from tests.unit.titan_log import step as line

__all__ = ["slurm"]  # a fixture

SWEEP = ("sweep", "--gpu", "gb200", "--image", "titan.sqsh", "--data", "sample", "--name", "s", "--yes")
THREE = (*SWEEP, "--nodes", "1,2,4")
RUNS = [f"s-llama3-8b-{n}n-b5" for n in (1, 2, 4)]

DRY_RUN = """\
run                      now  nodes  GPUs  batch  node-hours  at most
s-llama3-8b-3n-b4        new      3    12      4        0.30     3.00
s-llama3-8b-9n-b4        new      9    36      4        0.91     9.00
s-llama3-8b-17n-b4       new     17    68      4        1.73    17.00
s-llama3-8b-3n-b5        new      3    12      5        0.34     3.00
s-llama3-8b-9n-b5        new      9    36      5        1.02     9.00
s-llama3-8b-17n-b5       new     17    68      5        1.95    17.00
s-llama3-8b-fast-3n-b4   new      3    12      4        0.30     3.00
s-llama3-8b-fast-9n-b4   new      9    36      4        0.91     9.00
s-llama3-8b-fast-17n-b4  new     17    68      4        1.73    17.00
s-llama3-8b-fast-3n-b5   new      3    12      5        0.34     3.00
s-llama3-8b-fast-9n-b5   new      9    36      5        1.02     9.00
s-llama3-8b-fast-17n-b5  new     17    68      5        1.95    17.00
s: 12 of 12 to submit, one after another: 12.48 node-hours expected, at most 116.00 by --time
"""


def args(image: Path) -> list[str]:
    """The options of every sbatch, without those of `--parsable` and the script."""
    lines = (image.parent / "args.txt").read_text().splitlines()
    return [" ".join(word for word in line.split()[1:-1]) for line in lines]


@pytest.fixture
def recorded(slurm: Fake, image: Path) -> Fake:
    slurm("sbatch", f'echo "$*" >>{image.parent}/args.txt\n{SBATCH}')
    return slurm


def end(image: Path, run: str, code: int = 0, hours: float = 0.5, steps: int = 100) -> None:
    """As the job's script writes its end; Slurm has forgotten the job."""
    folder = image.parent / "runs" / run
    if code == 0:  # every node's log of 100 steps
        lines = [line(step) for step in STEPS]
        for node in range(int(run.split("n-b")[0].rpartition("-")[2])):
            (folder / "logs" / f"{node:04}-n{node}.log").write_text("".join(lines[: 11 if steps >= 100 else 3]))
    began = 1_790_000_000 + 86400 * len([*folder.glob("attempts/*")])
    ended = {"exit_code": code, "signal": "", "began_at": began, "ended_at": began + int(hours * 3600)}
    (image.parent / "runs" / run / "end.json").write_text(json.dumps(ended))
    path = image.parent / "jobs.txt"
    kept = [line for line in path.read_text().splitlines() if f" {run}." not in line]
    path.write_text("".join(f"{line}\n" for line in kept))


def names(image: Path) -> list[str]:
    """Runs of the jobs that Slurm has, in the order of submission."""
    return [line.split()[1].rsplit(".", 1)[0] for line in jobs(image)]


def test_the_matrix_before_it_starts(launch: Launch, image: Path) -> None:
    lists = ("--nodes", "3,9,17", "--batch-size", "4,5", "--recipe", "llama3-8b,llama3-8b-fast")
    done = launch(*SWEEP, *lists, "--dry-run")
    assert (done.returncode, done.stdout) == (0, DRY_RUN), done.stderr
    assert not (image.parent / "runs").exists()
    rows = json.loads(launch(*SWEEP, *lists, "--dry-run", "--json").stdout)["cells"]
    assert (len(rows), rows[0]["limit_node_hours"], rows[0]["submit"]) == (12, 3.0, True)


BEHIND = ["", "--dependency=afterany:100", "--dependency=afterany:101"]


@pytest.mark.parametrize(("option", "waits"), [((), BEHIND), (("--parallel",), [""] * 3)])
def test_each_job_waits_for_the_one_before(
    option: tuple[str, ...], waits: list[str], launch: Launch, recorded: Fake, image: Path
) -> None:
    done = launch(*THREE, *option)
    assert done.returncode == 0, done.stderr
    assert names(image) == RUNS and args(image) == waits
    assert f"s-llama3-8b-4n-b5: Slurm job 102{', after job 101' if waits[2] else ''}\n" in done.stdout
    script = (image.parent / "runs" / RUNS[1] / "job.sbatch").read_text()
    assert "dependency" not in script  # the script repeats the run, whatever ran before


def test_the_same_command_again_goes_on(launch: Launch, recorded: Fake, image: Path) -> None:
    """One complete, one failed, one waiting, one new: only the new one is submitted, behind the one that waits."""
    launch(*THREE)
    end(image, RUNS[0])
    end(image, RUNS[1], code=1)
    done = launch(*SWEEP, "--nodes", "1,2,4,8")
    assert done.returncode == 0, done.stderr
    assert names(image) == [RUNS[2], "s-llama3-8b-8n-b5"]
    assert args(image)[3:] == ["--dependency=afterany:102"]
    assert "1 of 4 to submit" in done.stdout and "COMPLETED" in done.stdout

    done = launch(*THREE, "--retry")
    assert names(image)[2:] == [RUNS[1]]
    assert "s-llama3-8b-2n-b5  again" in done.stdout
    end(image, RUNS[2])
    end(image, RUNS[1], hours=1.0)
    submitted = len(args(image))
    table = launch(*THREE, "--retry", "--json")
    assert (table.returncode, len(args(image))) == (0, submitted)
    found = json.loads(table.stdout)
    assert [row["state"] for row in found["cells"]] == ["COMPLETED"] * 3
    assert [row["run"] for row in found["cells"]] == RUNS
    assert found["node_hours"] == pytest.approx(1 * 0.5 + 2 * (0.5 + 1.0) + 4 * 0.5)  # failures cost, too


def test_a_cell_that_ended_without_a_result_is_tried_again(launch: Launch, recorded: Fake, image: Path) -> None:
    launch(*THREE)
    for run in RUNS:
        end(image, run, steps=20 if run == RUNS[1] else 100)
    done = launch(*THREE)
    assert done.returncode == ExitStatus.JOB_FAILED and "INCOMPLETE: step 20 of 100" in done.stdout
    assert "--retry" in done.stderr
    launch(*THREE, "--retry")
    assert names(image) == [RUNS[1]]


@pytest.mark.parametrize("taken", [True, False], ids=["slurm-has-it", "slurm-has-it-not"])
def test_a_launcher_that_is_killed_while_it_submits(taken: bool, launch: Launch, recorded: Fake, image: Path) -> None:
    """SIGKILL while sbatch has the second run: the same command submits what is missing, and nothing twice."""
    kill = 'case "$*" in *-2n-*) kill -9 $PPID; exit 1 ;; esac'
    recorded("sbatch", f"{SBATCH}\n{kill}" if taken else f"{kill}\n{SBATCH}")
    assert launch(*THREE, alone=True).returncode == -signal.SIGKILL
    assert len(jobs(image)) == (2 if taken else 1)
    recorded("sbatch", f'echo "$*" >>{image.parent}/args.txt\n{SBATCH}')
    done = launch(*THREE)
    assert done.returncode == 0, done.stderr
    second = RUNS[1] if taken else f"{RUNS[1]}-2"
    assert names(image) == [RUNS[0], second, RUNS[2]]
    assert args(image)[-1] == "--dependency=afterany:101"  # behind the last of those that wait
    if not taken:  # should Slurm have it after all, it stops at the claim
        assert (image.parent / "runs" / RUNS[1] / "claim").is_dir()
    assert launch(*THREE).returncode == 0
    assert len(jobs(image)) == 3


def test_ctrl_c_between_two_submissions(launch: Launch, recorded: Fake, image: Path) -> None:
    recorded("sbatch", f"kill -INT $PPID\n{SBATCH}")
    done = launch(*THREE, alone=True)
    assert done.returncode == ExitStatus.INTERRUPTED
    assert "2 runs not submitted: to go on, the same command again" in done.stderr
    assert names(image) == RUNS[:1] and json.loads(launch("status", RUNS[0], "--json").stdout)["job_id"] == "100"
    recorded("sbatch", SBATCH)
    assert launch(*THREE).returncode == 0 and names(image) == RUNS


def test_a_cell_that_slurm_refuses_stops_the_rest(launch: Launch, recorded: Fake, image: Path) -> None:
    recorded("sbatch", f'case "$*" in *-2n-*) echo "error: QOSMaxSubmitJob" >&2; exit 1 ;; esac\n{SBATCH}')
    done = launch(*THREE)
    assert done.returncode == ExitStatus.CLUSTER and "QOSMaxSubmitJob" in done.stderr
    assert names(image) == RUNS[:1] and not (image.parent / "runs" / RUNS[1]).exists()


def test_a_silent_slurm_submits_nothing(launch: Launch, recorded: Fake, image: Path) -> None:
    launch(*SWEEP, "--nodes", "1")
    recorded("squeue", "exit 1")
    assert launch(*THREE).returncode == ExitStatus.CLUSTER and len(jobs(image)) == 1


def test_followed_to_the_end_of_all(launch: Launch, recorded: Fake, image: Path) -> None:
    """One job after another completes each time that Slurm is asked; the table comes when none is left."""
    step = r"""sed -i '0,/ \(PENDING\|RUNNING\)$/s// COMPLETED/' "$JOBS" """
    launch(*SWEEP, "--nodes", "1,2")
    recorded("squeue", f"{step}\n{SQUEUE}")
    done = launch(*SWEEP, "--nodes", "1,2", "--follow")
    assert done.returncode == ExitStatus.JOB_FAILED, done.stderr  # these jobs have logged nothing
    assert done.stdout.count("COMPLETED") == 2 and f"{RUNS[1]}: COMPLETED" in done.stderr


def test_other_settings_under_the_same_name(launch: Launch, recorded: Fake, image: Path) -> None:
    launch(*THREE)
    done = launch(*THREE, "--steps", "50")
    assert done.returncode == ExitStatus.EXISTS
    assert "recipe.steps was 100, is 50 now" in done.stderr and len(jobs(image)) == 3
    assert launch(*THREE, "--time", "3:00:00", "--exclude", "n7").returncode == 0  # where and how long: the same cell


def test_the_name_comes_from_the_settings(launch: Launch, image: Path) -> None:
    def name(*options: str) -> str:
        unnamed = [word for word in SWEEP if word not in ("--name", "s")]
        return str(json.loads(launch(*unnamed, *options, "--dry-run", "--json").stdout)["sweep"])

    assert name("--nodes", "2,1") == name("--nodes", "1,2") != name("--nodes", "1,2", "--steps", "7")


def test_one_cell_that_cannot_run_refuses_all(launch: Launch, recorded: Fake, image: Path) -> None:
    done = launch(*SWEEP, "--nodes", "1,20000", "--recipe", "llama3-8b,lama3-8b")
    assert done.returncode == ExitStatus.INVALID
    assert "--recipe llama3-8b --nodes 20000 cannot run, so nothing was submitted" in done.stderr
    assert "job.nodes = '20000'" in done.stderr
    (image.parent / "titan.sqsh").write_bytes(b"no squashfs")
    done = launch(*THREE)
    assert done.returncode == ExitStatus.INVALID and f"{RUNS[0]} cannot run" in done.stderr
    assert not (image.parent / "runs").exists()


def test_two_recipes_of_one_name(launch: Launch, image: Path) -> None:
    for folder in ("a", "b"):
        (image.parent / folder).mkdir()
        (image.parent / folder / "mine.toml").write_text("[recipe]\nsteps = 7\n")
    done = launch(*SWEEP, "--recipe", "a/mine.toml,b/mine.toml", "--dry-run")
    assert done.returncode == ExitStatus.INVALID and "two cells would be named s-mine-1n-b1" in done.stderr


MANY = ",".join(map(str, range(1, 1001)))


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (("--nodes", "3,,x"), ExitStatus.USAGE, "an empty item"),
        (("--nodes", ""), ExitStatus.USAGE, "an empty item"),
        (("--nodes", "3,x"), ExitStatus.USAGE, "'x' is not a number of at least 1"),
        (("--nodes", "0"), ExitStatus.USAGE, "'0' is not a number of at least 1"),
        (("--nodes", "-3"), ExitStatus.USAGE, "'-3' is not a number of at least 1"),
        (("--batch-size", "4,5,4"), ExitStatus.USAGE, "4 is listed twice"),
        (("--nodes", MANY, "--batch-size", MANY), ExitStatus.INVALID, "1,000,000 combinations: a sweep has at most"),
        (("--recipe", "nonsense"), ExitStatus.NOT_FOUND, "there is no recipe 'nonsense'"),
        (("--name", "a" * 50), ExitStatus.INVALID, "a name of 66 characters"),
        (("--name", "../elsewhere"), ExitStatus.INVALID, "letters, digits"),
        (("--local", "--parallel"), ExitStatus.USAGE, "--parallel is for Slurm"),
    ],
)
def test_bad_input(
    arguments: tuple[str, ...], status: ExitStatus, said: str, launch: Launch, recorded: Fake, image: Path
) -> None:
    done = launch(*SWEEP, *arguments)
    assert (done.returncode, said in done.stderr) == (status, True), done.stderr
    assert not (image.parent / "runs").exists()


def test_on_this_machine_one_after_another(launch: Launch, workplace: Path) -> None:
    python = workplace / "python"
    python.write_text(f"#!/bin/sh\necho begin >>{workplace}/order\nsleep 0.3\necho end >>{workplace}/order\n")
    python.chmod(0o755)
    local = ("sweep", "--local", "--gpu", "cpu", "--recipe", "debug", "--python", str(python), "--name", "l")
    done = launch(*local, "--batch-size", "2,4")
    assert done.returncode == ExitStatus.JOB_FAILED, done.stderr  # that Python trains nothing
    assert (workplace / "order").read_text().split() == ["begin", "end", "begin", "end"]
    assert "l-debug-1n-b4  COMPLETED" in done.stdout
    launch(*local, "--batch-size", "2,4")
    assert len((workplace / "order").read_text().split()) == 4


class Made(cells.Cell):
    """A cell whose result and node-hours are given."""

    hours: float | None = 1.0

    def node_hours(self, now_s: float) -> float | None:
        return self.hours


def row(nodes: int, tps: float | None = None, *problems: str, batch: int = 5, **more: Any) -> table.Row:
    """A cell's row: COMPLETED where it has tokens/s, unless `state` says so."""
    spec = RunSpec(
        job=Job(name=f"s-{nodes}n-b{batch}", nodes=nodes, recipe="llama3-8b"), recipe=Recipe(local_batch_size=batch)
    )
    cell = Made(spec, state=JobState(more.pop("state", "COMPLETED" if tps else "PENDING")))
    cell.__dict__.update(outcome=outcome(tps=spread(tps), problems=problems) if tps else None, **more)
    return table.result_row(cell, 0.0)


def test_the_table_and_its_scaling() -> None:
    """Against the fewest nodes of the same recipe and batch that are complete, of two sizes at least; never an
    incomplete run's figures.
    """
    rows = table.scaled(
        [
            row(3, 18284),
            row(9, 17975, hours=None),
            row(17, 17581),
            row(3, 9000, "step 40 of 100", batch=4),
            row(9, 18000, batch=4),
            row(17, batch=4, hours=0.0),
        ]
    )
    assert [row["scaling"] and round(row["scaling"], 3) for row in rows] == [1, 0.983, 0.962, None, None, None]
    assert [row["scaling_base_nodes"] for row in rows] == [3, 3, 3, None, None, None]
    assert table.table_lines(rows) == [
        "run       state      GPUs  tokens/s/GPU       quartiles      scaling  node-hours",
        "s-3n-b5   COMPLETED    24        18,284  18,211..18,357   100% of 3n        1.00",
        "s-9n-b5   COMPLETED    72        17,975  17,903..18,047  98.3% of 3n           ?",
        "s-17n-b5  COMPLETED   136        17,581  17,511..17,651  96.2% of 3n        1.00",
        "s-3n-b4   COMPLETED    24         9,000    8,964..9,036            -        1.00  INCOMPLETE: step 40 of 100",
        "s-9n-b4   COMPLETED    72        18,000  17,928..18,072            -        1.00",
        "s-17n-b4  PENDING     136             -               -            -        0.00",
        "at least 4.00 node-hours used",
    ]


def test_a_run_that_ended_without_a_step_is_no_result() -> None:
    rows = [row(3, state="COMPLETED"), row(9, 18000), row(17, 17640)]
    lines = table.table_lines(table.scaled(rows))
    assert lines[1].endswith("INCOMPLETE: no step was logged") and "100% of 9n" in lines[2]


@pytest.mark.parametrize(("time", "hours"), [("0", None), ("1-12:00:00", 4 * 36)])
def test_a_time_limit_in_node_hours(time: str, hours: float | None) -> None:
    spec = RunSpec(job=Job(nodes=4, time=time))
    planned = table.plan_row(cells.Cell(spec), spec)
    assert planned["limit_node_hours"] == hours
    assert ("without a limit" in table.plan_summary([planned], "side by side")) == (hours is None)
