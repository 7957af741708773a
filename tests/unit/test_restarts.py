"""What the job script does between two attempts. It runs as rendered; Slurm's commands and again.py are scripts."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.config.layers import Layer, merge
from launcher.config.render import render
from launcher.config.resolve import placed

ANSWERS = """case "$*" in
"show hostnames "*) echo "$3" | tr , '\\n' ;;
*"show node "*) echo "NodeName=$5 NodeAddr=10.0.0.7" ;;
"requeue "*) : ;;
"update "*) echo "$*" >>HERE/said ; kill -KILL "$PPID" ;;
*"show job "*) echo "JobId=7 JobState=RUNNING Restarts=0 NumNodes=2 NodeList=n1,n10 ExcNodeList=EXCLUDED Reason=None" ;;
esac"""
GETENT = 'echo "10.0.0.7 STREAM node"'
SINFO = "printf '%s idle\\n' n1 n10 n3 n4 n5; echo n6 down"
# A node that answers starts `true`; another one stands guard; a step does what its number says.
SRUN = """case "$*" in
*" bash -c "*) exit 0 ;;
*" true") case " $(cat HERE/dead) " in *"nodelist=${4#*=} "*) exit 1 ;; esac; exit 0 ;;
esac
echo step >>HERE/steps
. HERE/step"""
AGAIN = """import os, signal, sys
from pathlib import Path
here = Path("HERE")
with open(here / "asked", "a") as asked:
    print(*sys.argv[2:], sep="|", file=asked)
if (here / "script").exists():  # its process is to be told of the time limit now
    os.kill(int((here / "script").read_text()), signal.SIGUSR1)
    (here / "script").unlink()
verdicts = ["1 n1 n10", *(here / "verdicts").read_text().splitlines()]
print(verdicts[len((here / "asked").read_text().splitlines()) - 1])
"""

Job = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """Runs the script of a one-node run with a spare, in a job that has n1, where the script runs, and n10."""
    folder = tmp_path / "bin"

    def run(
        verdicts: list[str],
        step: str,
        dead: str = "",
        excluded: str = "(null)",
        scontrol: str = ANSWERS,
        **more: object,
    ):
        for path in ("bin", "r/job", "r/logs"):
            (tmp_path / path).mkdir(parents=True)
        answers = scontrol.replace("EXCLUDED", excluded)
        for name, text in (("scontrol", answers), ("getent", GETENT), ("sinfo", SINFO), ("srun", SRUN)):
            (folder / name).write_text(f"#!/bin/bash\n{text}\n".replace("HERE", str(tmp_path)))
            (folder / name).chmod(0o755)
        (tmp_path / "r/job/again.py").write_text(AGAIN.replace("HERE", str(tmp_path)))
        for name, text in (("verdicts", "\n".join(verdicts)), ("step", step), ("dead", dead)):
            (tmp_path / name).write_text(text.replace("HERE", str(tmp_path)))
        values: dict[str, object] = {
            "job.name": "r",
            "job.runs_dir": str(tmp_path),
            "job.runtime": "bare",
            "job.slurm_bin": str(folder),
        }
        values |= {"job.python": "python3", "job.nodes": 1, "job.spares": 1, **more}
        script = render(placed(merge([Layer(values, dict.fromkeys(values, "test"))])))
        env = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1,n10", "SLURMD_NODENAME": "n1", "PATH": os.environ["PATH"]}
        env |= {"SLURM_JOB_PARTITION": "p"}
        return subprocess.run(["bash"], input=script, env=env, capture_output=True, text=True, timeout=60)

    return run


def asked(tmp_path: Path) -> list[str]:
    return (tmp_path / "asked").read_text().splitlines()


def test_the_script_node_is_not_taken_for_one_with_a_longer_name(job: Job, tmp_path: Path) -> None:
    """n1 does not answer itself, n10 does: something else is wrong, and both count as alive."""
    job(["stop"], "exit 1", dead="nodelist=n1 ")
    assert "--alive|n1 n10|" in asked(tmp_path)[-1]


def test_a_controller_that_says_nothing_ends_no_job(job: Job, tmp_path: Path) -> None:
    silent = ANSWERS.replace('*"show job "*)', '*"show job "*) [ -e HERE/steps ] || exit 1;')
    done = job(["done"], "exit 0", scontrol=silent)
    assert done.returncode == 0 and (tmp_path / "steps").exists(), done.stderr


@pytest.mark.parametrize(("bad", "left_out"), [("", "n4"), ("n3", "n4,n3")])
def test_what_the_user_excludes_stays_so(job: Job, tmp_path: Path, bad: str, left_out: str) -> None:
    job([f"requeue {bad}"], "exit 1", excluded="n4")
    assert (tmp_path / "said").read_text() == f"update JobId=7 ExcNodeList={left_out}\n"


BLOCKS = "BlockName=a BlockIndex=0 Nodes=n1,n10 BlockSize=2\\nBlockName=b BlockIndex=1 Nodes=n3,n4 BlockSize=2\\n"


WITH_ONE_DOWN = f"{BLOCKS}BlockName=c BlockIndex=2 Nodes=n5,n6 BlockSize=2\\n"


@pytest.mark.parametrize(
    ("bad", "blocks", "refused"),
    [
        ("n1", BLOCKS, False),
        ("n1,n4", BLOCKS, True),
        ("n1,n4", WITH_ONE_DOWN, False),
        ("n1,n4", "SwitchName=s", False),
    ],
)
def test_a_segment_that_no_block_holds_without_the_bad_nodes(
    job: Job, tmp_path: Path, bad: str, blocks: str, refused: bool
) -> None:
    """Slurm would keep such a job for ever. One whose nodes are only down waits for their repair."""
    answers = f"""case "$*" in
    *"show partition p") echo "PartitionName=p Topology=racks State=UP"; exit ;;
    *"show topology racks") printf '{blocks}'; exit ;;
    esac\n{ANSWERS}"""
    job([f"requeue {bad}", ""], "exit 1", scontrol=answers, **{"job.segment": 2})
    assert (tmp_path / "said").exists() != refused
    assert asked(tmp_path)[2:] == (["refused|--why|too-few-in-blocks"] if refused else [])


def test_a_time_limit_that_came_between_two_steps(job: Job, tmp_path: Path) -> None:
    """The second step would go on until Slurm kills it."""
    step = 'if [ "$(cat HERE/steps)" = step ]; then echo "$PPID" >HERE/script; exit 1; fi; exec sleep 20'
    more = {"job.continues": 1, "job.time": "00:00:08", "recipe.checkpoint_interval": 1}
    job(["again n1 n10", "stop"], step, **more)
    first, second = asked(tmp_path)[1:]
    assert "--time-is-up" not in first and "--time-is-up" in second
