"""`launcher plan --prove` where there is no torchtitan: what it asks for, and how answers are shown. The Python is a
stand-in; tests/train/test_proof.py has the real one.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Launch

PLAN = ("plan", "--gpu", "h100", "--nodes", "4", "--prove")
MESH = {"pp": 1, "dp_replicate": 2, "dp_shard": 16, "cp": 1, "tp": 1}
TAKEN: dict[str, Any] = {
    "world": 32,
    "torchtitan": "0.3.0",
    "ranks": [{"rank": rank, "mesh": MESH, "parameters": 250_945_664, "untried": ""} for rank in (0, 31)],
    "refused": None,
    "missing": "",
    "seconds": 21.3,
}
Answer = Callable[[object], str]
Fake = Callable[[str, str], Path]


@pytest.fixture
def answer(tmp_path: Path) -> Answer:
    """A Python that answers every program with this."""

    def written(facts: object) -> str:
        text = facts if isinstance(facts, str) else json.dumps(facts)
        (tmp_path / "python").write_text(f"#!/bin/sh\necho noise\nprintf '%s\\n' {shlex.quote(text)}\necho why >&2\n")
        (tmp_path / "python").chmod(0o755)
        return str(tmp_path / "python")

    return written


def test_a_run_that_torchtitan_takes(launch: Launch, answer: Answer) -> None:
    done = launch(*PLAN, "--python", answer(TAKEN))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("""
proof       torchtitan 0.3.0 takes it at 32 ranks, 21 s; tried in shapes alone, without kernels and memory
            rank 0: dp_replicate 2, dp_shard 16; 250,945,664 parameters; one step
            rank 31: dp_replicate 2, dp_shard 16; 250,945,664 parameters; one step
""")
    assert json.loads(launch(*PLAN, "--json", "--python", answer(TAKEN)).stdout)["proof"] == TAKEN
    assert "proof" not in json.loads(launch(*PLAN[:-1], "--json").stdout)


def test_a_run_that_torchtitan_refuses(launch: Launch, answer: Answer) -> None:
    refused = {"part": "mesh", "rank": 0, "why": "AssertionError: Invalid parallel dims"}
    facts = TAKEN | {"ranks": [], "refused": refused}
    for more in ((), ("--json",)):
        done = launch(*PLAN, *more, "--python", answer(facts))
        assert done.returncode == 3 and "memory" in done.stdout
        assert "torchtitan 0.3.0 refuses this run in its mesh on rank 0 of 32 [proof-refused]" in done.stderr
        assert "  | AssertionError: Invalid parallel dims\n" in done.stderr
    assert json.loads(done.stdout)["proof"]["refused"] == refused


def test_submit_proves_before_it_queues(launch: Launch, answer: Answer, image: Path, fake_slurm: Fake) -> None:
    run = ("--gpu", "h100", "--nodes", "4", "--image", "titan.sqsh", "--data", "sample", "--tokenizer", "sample")
    submit = ("submit", *run, "--yes", "--prove", "--name", "r")
    fake_slurm("sbatch", "echo 7")
    taken, refusing = answer(TAKEN), {"part": "mesh", "rank": 0, "why": "AssertionError: Invalid parallel dims"}
    dry = launch(*submit, "--dry-run", "--python", taken)
    assert dry.returncode == 0 and "torchtitan 0.3.0 takes it at 32 ranks" in dry.stderr and "proof" not in dry.stdout
    assert json.loads(launch(*submit, "--dry-run", "--json", "--python", taken).stdout)["proof"] == TAKEN
    refused = answer(TAKEN | {"ranks": [], "refused": refusing})
    for more in ((), ("--dry-run",)):
        done = launch(*submit, *more, "--python", refused)
        assert done.returncode == 3 and "[proof-refused]\n  | AssertionError: Invalid parallel dims\n" in done.stderr
        assert done.stdout == "" and not Path("runs").exists()
    done = launch(*submit, "--python", answer(TAKEN))
    assert done.returncode == 0 and "one step\n" in done.stderr and "r: Slurm job 7" in done.stdout, done.stderr


def test_what_cannot_be_tried_is_no_refusal(launch: Launch, answer: Answer) -> None:
    untried = {"rank": 0, "untried": "step: NotImplementedError: no such kernel"}
    done = launch(*PLAN, "--python", answer(TAKEN | {"ranks": [untried]}))
    assert done.returncode == 0
    assert "rank 0: not tried to its end here: step: NotImplementedError: no such kernel\n" in done.stdout


@pytest.mark.parametrize(
    "said", ["", "[]", '{"missing": ', "{}", '{"missing": "", "refused": {"rank": null}, "ranks": []}']
)
def test_a_program_that_ends_early(said: str, launch: Launch, answer: Answer) -> None:
    done = launch(*PLAN, "--python", answer(said))
    assert done.returncode == 3 and "[proof-failed]\n  | why\n" in done.stderr


def test_without_torchtitan_the_image_is_asked(launch: Launch, tmp_path: Path) -> None:
    """The real program, in a Python without packages. What srun would run is a command that a shell takes."""
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    bare.chmod(0o755)
    done = launch(*PLAN, "--partition", "gpus", "--image", "titan.sqsh", "--python", str(bare))
    assert done.returncode == 3 and "has no torch and no torchtitan: run the proof inside" in done.stderr
    assert "[proof-python]" in done.stderr
    words = shlex.split(done.stderr.partition("try: ")[2])
    assert words[:4] == ["srun", "-N1", "-n1", "--partition=gpus"] and words[-2:] == ["0", "31"]
    assert any(word.startswith("--container-image=/") and word.endswith("/titan.sqsh") for word in words)
    assert json.loads(words[-3])["job"]["nodes"] == 4
    here = launch("plan", "--local", "--recipe", "debug", "--gpu", "cpu", "--python", str(bare), "--prove")
    assert here.returncode == 3 and "pip install" in here.stderr and "srun" not in here.stderr
    nowhere = launch(*PLAN, "--runtime", "apptainer", "--python", "/no/python")
    assert "/no/python: No such file or directory [proof-python]" in nowhere.stderr
    assert " IMAGE.sif " in nowhere.stderr and " exec " in nowhere.stderr
