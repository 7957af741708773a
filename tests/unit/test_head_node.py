"""The head node's address: found on the host, never loopback. The rendered script runs; Slurm's commands are
scripts.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from launcher.config.layers import Layer, merge
from launcher.config.render import render
from launcher.config.resolve import placed

GETENT = """case "$1 $2" in
"passwd "*) echo "u:x:0:0::/root:/bin/bash" ;;
"ahostsv4 "*) grep -v : "HERE/addresses/$2" 2>/dev/null || exit 2 ;;
"ahosts "*) cat "HERE/addresses/$2" 2>/dev/null || exit 2 ;;
esac"""
SCONTROL = """case "$*" in
"show hostnames "*) printf '%s\\n' node-1 node-2 ;;
"-o show node node-1") 
  echo "NodeName=node-1 Arch=x86_64 NodeAddr=$(cat HERE/node_addr) NodeHostName=node-1 State=IDLE" ;;
"-o show node "*) echo "NodeName=$5 NodeAddr=$5 NodeHostName=$5" ;;
"-o show job "*)
  echo "$@" >>HERE/asked
  [ "$(wc -l <HERE/asked)" -ge 3 ] || kill $PPID # as Slurm ends all processes of a job
  echo "JobId=1 JobState=COMPLETING Reason=NodeDown" ;;
esac"""


@pytest.fixture
def job(tmp_path: Path):
    """Runs a two-node job script; returns what srun's environment held, or the failed process."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (tmp_path / "addresses").mkdir()
    seen = "$TITAN_HEAD_ADDR $TITAN_HEAD_PORT $TITAN_JOB_ID"
    srun = f'printf \'{{"addr": "%s", "port": "%s", "id": "%s"}}\' {seen} >HERE/seen.json'
    for name, text in (
        ("getent", GETENT),
        ("scontrol", SCONTROL),
        ("srun", srun),
        ("ip", "cat HERE/route"),
        ("sleep", ""),
    ):
        (folder / name).write_text(f"#!/bin/bash\n{text}\n".replace("HERE", str(tmp_path)))
        (folder / name).chmod(0o755)
    values = {"job.name": "r", "job.runs_dir": str(tmp_path), "job.image": "/x.sqsh", "job.nodes": 2}
    values["job.slurm_bin"] = str(folder)
    script = render(placed(merge([Layer(values, dict.fromkeys(values, "test"))])))

    def run(addresses: dict[str, str], node_addr: str = "node-1", route: str = "", job_id: str = "41234"):
        shutil.rmtree(tmp_path / "r", ignore_errors=True)
        (tmp_path / "r").mkdir()
        for name, text in addresses.items():
            (tmp_path / "addresses" / name).write_text(text)
        (tmp_path / "node_addr").write_text(node_addr)
        (tmp_path / "route").write_text(route)
        env = {"SLURM_JOB_ID": job_id, "SLURM_JOB_NODELIST": "node-[1-2]", "PATH": os.environ["PATH"]}
        done = subprocess.run(["bash"], input=script, env=env, capture_output=True, text=True)
        return json.loads((tmp_path / "seen.json").read_text()) if done.returncode == 0 else done

    return run


def hosts(*addresses: str) -> str:
    return "".join(f"{a} STREAM node\n{a} DGRAM\n{a} RAW\n" for a in addresses)


class Node(NamedTuple):
    """What the first node's name resolves to, and more where it counts; the address that the job takes."""

    taken: str
    addresses: tuple[str, ...]
    name: str = "node-1"  # Slurm's NodeAddr
    peer: str = ""
    route: str = ""


NODES = {
    "the first": Node("10.0.0.7", ("10.0.0.7", "10.0.0.8")),
    "not loopback": Node("10.0.0.7", ("127.0.1.1", "10.0.0.7", "10.0.0.8")),
    "Slurm's own": Node("10.1.1.1", ("10.1.1.1",), name="10.1.1.1"),
    "IPv4 where there is both": Node("10.0.0.7", ("2001:db8::7", "10.0.0.7")),
    "Debian's 127.0.1.1: towards a peer": Node(
        "10.0.0.7", ("127.0.1.1",), peer="10.0.0.9", route="10.0.0.9 dev eth0 src 10.0.0.7 uid 0\n    cache"
    ),
}


@pytest.mark.parametrize("node", NODES.values(), ids=NODES.keys())
def test_the_address_that_is_taken(node: Node, job) -> None:
    peer = {"node-2": hosts(node.peer)} if node.peer else {}
    seen = job({node.name: hosts(*node.addresses), **peer}, node_addr=node.name, route=node.route)
    assert seen == {"addr": node.taken, "port": "21234", "id": "41234"}


def test_nothing_but_loopback_is_refused(job, tmp_path: Path) -> None:
    for route in ("", "local 127.0.1.1 dev lo src 127.0.0.1 uid 0"):
        done = job({"node-1": hosts("127.0.1.1"), "node-2": hosts("127.0.1.1")}, route=route)
        assert done.returncode == 76 and "no address but loopback" in done.stderr
        assert "getent ahosts node-1" in done.stderr and not (tmp_path / "seen.json").exists()
        assert json.loads((tmp_path / "r" / "end.json").read_text())["exit_code"] == 76


@pytest.mark.parametrize(
    ("addresses", "said"),
    [
        ((), "node-1 does not resolve to any address"),
        (("127.0.1.1", "::1", "fe80::1"), "node-1 resolves to no address but loopback"),
        (("2001:db8::7",), "node-1 has no IPv4 address in the network"),
        (("127.0.1.1", "2001:db8::7"), "node-1 has no IPv4 address in the network"),
    ],
)
def test_why_there_is_no_address(job, addresses: tuple[str, ...], said: str) -> None:
    done = job({"node-1": hosts(*addresses)} if addresses else {})
    assert (done.returncode, f"launcher: {said}" in done.stderr) == (76, True), done.stderr


def test_a_step_that_ended_well_waits_for_slurms_word(job, tmp_path: Path) -> None:
    """srun answers 0 when a lost node ends its step before any task has ended."""
    job({"node-1": hosts("10.0.0.7")})
    end = json.loads((tmp_path / "r" / "end.json").read_text())
    assert (end["exit_code"], end["slurm"]) == (0, "JobState=COMPLETING Reason=NodeDown")


def test_port_and_id_come_from_the_job(job) -> None:
    ports = {job({"node-1": hosts("10.0.0.7")}, job_id=str(n))["port"] for n in (1, 9999, 10000, 123456789)}
    assert ports == {"20001", "29999", "20000", "26789"}
