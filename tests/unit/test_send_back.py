"""Which hardware to send back, and what goes into a support ticket. The driver's lines are as NVIDIA documents them."""

from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest

from launcher.base.errors import ExitStatus
from launcher.commands import archive
from launcher.nodes import hardware
from launcher.runs.directory import Run
from tests.conftest import Launch
from tests.unit.bad_node_records import ECC, record
from tests.unit.test_bad_node_commands import unfit_run

GPUS = [
    {"index": number, "uuid": f"GPU-{number}", "serial": f"16500{number}", "bus_id": f"00000000:{bus}:00.0"}
    for number, bus in enumerate(("1B", "C6"))
]
# NVIDIA's Xid documentation and catalog
FALLEN = "NVRM: Xid (PCI:0000:c6:00): 79, pid=1101234, name=nvc:[driver], GPU has fallen off the bus."
REMAPPED = (
    "NVRM: Xid (PCI:0000:1b:00): 63, pid=1896, Row Remapper: New row marked for remapping, reset gpu to activate."
)
APPLICATION = "NVRM: Xid (PCI:0000:1b:00): 13, pid='<unknown>', Graphics SM Warp Exception"
ASKS = "NVRM: Xid (PCI:0000:c6:00): 154, GPU recovery action changed from 0x0 (None) to 0x2 (Node Reboot Required)"
RESETS = ASKS.replace("0x2 (Node Reboot Required)", "0x1 (GPU Reset Required)")
SWITCH = "nvidia-nvswitch3: SXid (PCI:0000:c1:00.0): 28006, Non-fatal, Link 46 MC TS crumbstore MCTO"


@pytest.mark.parametrize(
    ("line", "action", "gpu"),
    [
        (FALLEN, "reboot", "GPU 1, GPU-1, serial 165001"),
        (REMAPPED, "watch", "GPU 0, GPU-0, serial 165000"),
        (REMAPPED.replace("1b", "e1"), "watch", "GPU at 0000:e1:00"),
        (APPLICATION, "", ""),
        (ASKS, "reboot", "GPU 1, GPU-1, serial 165001"),
        (RESETS, "reset", "GPU 1, GPU-1, serial 165001"),
        (SWITCH, "watch", ""),
        (SWITCH.replace("Non-fatal", "Fatal"), "isolate", ""),
    ],
)
def test_what_to_do_after_a_line_of_the_driver(line: str, action: str, gpu: str) -> None:
    match = hardware.ERROR.search(f"[123.4] {line}")
    assert match
    found = hardware.driver_error("gpu7", match, GPUS)
    assert ((found.action, found.gpu) if found else ("", "")) == (action, gpu)
    assert not found or (found.source.startswith("https://docs.nvidia.com/") and found.xid)


def test_every_action_is_one_of_four() -> None:
    assert {row["action"] for row in hardware._table()["xid"]} == {"reset", "reboot", "isolate", "watch"}


HANG = {"kind": "behind", "host": "gpu8", "rank": 9, "local_rank": 1, "waiting": 15}


@pytest.fixture
def broken(workplace: Path) -> Path:
    """A run that ended with a hang, an Xid and a node that had failed its check."""
    records = [record("gpu7", gpu_health=GPUS), record("gpu8", gpu_health=GPUS), record("gpu9", ECC)]
    run = unfit_run(workplace, "broken", *records, code=1)
    (run / "logs" / "0000-gpu7.log").write_text(f"titan-kernel: {FALLEN}\ntitan-kernel: {FALLEN}\nuser: {REMAPPED}\n")
    (run / "nodes" / "hang.json").write_text(json.dumps({"culprit": HANG, "why": "rank 9 is behind"}))
    return run


def test_of_a_run_each_fault_once(broken: Path, launch: Launch) -> None:
    found = [(one.host, one.xid, one.action, one.gpu) for one in hardware.of_run(Run(broken))]
    assert found == [
        ("gpu7", 79, "reboot", "GPU 1, GPU-1, serial 165001"),
        ("gpu9", None, "isolate", ""),
        ("gpu8", None, "watch", "GPU 1, GPU-1, serial 165001"),
    ]
    told = launch("status", "broken")
    assert "gpu7, GPU 1, GPU-1, serial 165001: Xid 79: GPU has fallen off the bus; action: reboot" in told.stderr
    assert "scontrol update NodeName=gpu7 State=DRAIN 'Reason=Xid 79: GPU has fallen off the bus'" in told.stderr
    said = json.loads(launch("status", "broken", "--json").stdout)
    assert [one["host"] for one in said["hardware"]] == ["gpu7", "gpu9", "gpu8"] and said["hang"]["culprit"] == HANG


@pytest.mark.parametrize("text", ["", "{", "[]", '{"culprit": 7}', '{"culprit": {"host": 3}}', '{"culprit": {}}'])
def test_a_damaged_verdict_breaks_nothing(broken: Path, launch: Launch, text: str) -> None:
    (broken / "nodes" / "hang.json").write_text(text)
    assert [one.host for one in hardware.of_run(Run(broken))] == ["gpu7", "gpu9"]
    assert "gpu7" in launch("status", "broken").stderr


QUOTED = 'a value "in quotes"'


def packed(path: Path) -> dict[str, str]:
    with tarfile.open(path) as tar:
        members: list[Any] = [(member.name, tar.extractfile(member)) for member in tar.getmembers()]
        return {name: stream.read().decode() for name, stream in members}


def test_an_archive_holds_no_secret(
    broken: Path, launch: Launch, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive, "HEAD", 1 << 12)
    monkeypatch.setattr(archive, "TAIL", 3 << 12)
    token = "hf_" + "a" * 30
    (broken / "secret.env").write_text("export MY_TOKEN=hunter2hunter2\n")
    (broken / "run.toml").write_text('secret_env = ["MINE"]\nproxy = "http://ada:hunter2@proxy:3128"\n')
    (broken / "logs" / "0001-gpu8.log").write_text(f"used {token}\nand opensesame99\n")
    key = "-----BEGIN RSA PRIVATE KEY-----\nMIIEow\nkR7q\n-----END RSA PRIVATE KEY-----"
    (broken / "logs" / "0002-gpu9.log").write_text(f"hunter2hunter2\n{json.dumps(QUOTED)}\n{key}\n")
    half = f"{'y' * 79}\n" * (1 << 8)
    (broken / "logs" / "0003-gpu9.log").write_text(f"{half[: (1 << 12) - 5]}{token} {half}")
    outside = broken.with_name("outside")
    outside.mkdir()
    (outside / "more.json").write_text("outside")
    os.symlink(outside, broken / "attempts")
    (broken / "titan" / "checkpoint").mkdir(parents=True)
    (broken / "titan" / "checkpoint" / "weights.json").write_text("weights")
    (broken / "data").mkdir()
    (broken / "data" / "shard.json").write_text("data")
    os.symlink("/etc/passwd", broken / "logs" / "link.log")
    os.mkfifo(broken / "logs" / "pipe.log")
    done = launch("archive", "broken", DB_PASSWORD="opensesame99", DB_PWD="opensesame", MINE=QUOTED)
    assert done.returncode == 0 and "broken.tar.gz" in done.stdout, done.stderr
    files = packed(workplace / "broken.tar.gz")
    text = "".join(f"{name} {body}" for name, body in files.items())
    secrets = ("hunter2", "hf_a", "opensesame99", "secret.env", "in quo", "kR7q")
    assert not [word for word in (*secrets, "root:", "weights", "outside") if word in text]
    assert files["broken/logs/0001-gpu8.log"] == "used (hidden)\nand (hidden)\n"
    assert {"broken/run.toml", "broken/nodes/hang.json", "broken/job/node.json", "broken/about.json"} <= files.keys()
    assert json.loads(files["broken/about.json"])["nodes"][0]["xid"] == 79


def test_an_archive_replaces_nothing_unasked_and_cuts_what_is_long(
    broken: Path, launch: Launch, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive, "HEAD", 1 << 10)
    monkeypatch.setattr(archive, "TAIL", 3 << 10)
    (broken / "logs" / "job.log").write_text("begin\n" + "x" * 100 + "\n" * (5 << 10) + "end\n")
    assert launch("archive", "broken", "-o", "t.tar.gz").returncode == 0
    log = packed(workplace / "t.tar.gz")["broken/logs/job.log"]
    assert log.startswith("begin") and log.endswith("end\n") and "bytes left out]" in log and len(log) < 5 << 10
    before = (workplace / "t.tar.gz").read_bytes()
    refused = launch("archive", "broken", "-o", "t.tar.gz")
    assert refused.returncode == ExitStatus.INVALID and "[file-exists]" in refused.stderr
    assert (workplace / "t.tar.gz").read_bytes() == before
    assert launch("archive", "broken", "-o", "t.tar.gz", "--force", "--json").returncode == 0
    assert not list(workplace.glob(".*.tmp"))
