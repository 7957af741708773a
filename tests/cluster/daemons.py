"""Processes and cables for `slurm_cluster`: started, recorded, found again after a crash, and ended.

A node is a process in namespaces of its own. The namespaces have no names: they live as long as the
process that made them, so ending process 1 of a node ends everything on it, running jobs included,
and takes the node's network interface with it.
"""

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

REGISTRY = Path("/run/launcher-test-slurm")
"""One file per running cluster, named after its subnet: who started it, and what it started."""

OWN_NAMESPACES = (
    "unshare",
    "--pid",
    "--mount",
    "--mount-proc",
    "--propagation",
    "slave",
    "--fork",
    "--kill-child",
)
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


# ------------------------------------------------------------------------------------- the record


def claim_subnet(directory: Path) -> tuple[Path, str]:
    """A /24 that neither the host nor another test cluster uses, and the record file that claims it."""
    REGISTRY.mkdir(mode=0o755, exist_ok=True)
    taken = output("ip", "-4", "-o", "address", "show")
    for number in range(1, 255):
        subnet = f"10.213.{number}"
        record = REGISTRY / f"{number}.json"
        if f" {subnet}." in taken:
            continue
        with contextlib.suppress(FileExistsError):
            record.touch(exist_ok=False)
            owner = [os.getpid(), _started_at(os.getpid())]
            _write(record, {"directory": str(directory), "owner": owner, "processes": []})
            return record, subnet
    raise RuntimeError(f"no free subnet in 10.213.0.0/16; the test clusters that run are in {REGISTRY}")


def spawn(record: Path, log: Path, *command: str) -> int:
    """Start a process that outlives this call, note its pid in the record, and return the pid."""
    with log.open("ab") as stream:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            cwd=log.parent,
            env={"PATH": SYSTEM_PATH},
            start_new_session=True,
        )
    content = json.loads(record.read_text())
    content["processes"].append([process.pid, _started_at(process.pid)])
    _write(record, content)
    return process.pid


def remove_leftovers() -> None:
    """End clusters whose starter is gone, so that a killed test run does not leave daemons for ever."""
    for record in REGISTRY.glob("*.json"):
        try:
            owner = json.loads(record.read_text())["owner"]
        except (ValueError, KeyError, OSError):
            continue  # being written by another start at this moment
        if not _alive(*owner):
            stop_recorded(record)


def stop_recorded(record: Path) -> None:
    """End the recorded processes that are certainly ours, the last started first; forget the record.

    A pid may have been reused since it was recorded: start time and command line must both agree.
    """
    try:
        content = json.loads(record.read_text())
    except FileNotFoundError:
        return
    for pid, started_at in reversed(content["processes"]):
        if _alive(pid, started_at) and content["directory"] in _command_line(pid):
            _end(pid, started_at)
    record.unlink(missing_ok=True)


def _write(record: Path, content: dict[str, object]) -> None:
    temporary = record.with_suffix(".tmp")
    temporary.write_text(json.dumps(content))
    temporary.replace(record)


def _end(pid: int, started_at: int) -> None:
    """SIGKILL: nothing is worth saving. First to process 1 of the namespaces, so that its parent,
    `unshare`, can still collect it; the kernel ends what else runs in them."""
    for target in (*_children(pid), pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(target, signal.SIGKILL)
        with contextlib.suppress(TimeoutError):
            wait_for(lambda: not _alive(pid, started_at), "", timeout=5)
    with contextlib.suppress(ChildProcessError):  # started by an earlier run, so not our child
        os.waitpid(pid, os.WNOHANG)


def _children(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def _started_at(pid: int) -> int:
    """Clock ticks since boot at which a process started; with the pid it names a process uniquely.

    0 if there is no such process, or if it has ended and only waits to be collected by its parent.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] == "Z" else int(fields[19])


def _alive(pid: int, started_at: int) -> bool:
    return started_at != 0 and _started_at(pid) == started_at


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


# ------------------------------------------------------------------------------------- the network


def start_bridge(record: Path, log: Path) -> int:
    """The switch between the nodes, in a namespace: on the host, docker's rules would filter it."""
    hold = ("sh", "-c", "sleep infinity", str(log))
    pid = spawn(record, log, *OWN_NAMESPACES, "--net", *hold)
    wait_for(lambda: has_own_network(pid), "the bridge's network namespace")
    in_network_of(pid, "ip", "link", "add", "name", "switch", "type", "bridge")
    in_network_of(pid, "ip", "link", "set", "switch", "up")
    return pid


def plug_in(bridge: int, pid: int, interface: str, address: str) -> None:
    """A cable from the bridge to the network namespace of `pid`, where it is called `interface`."""
    port = f"port{address.rpartition('.')[2]}"
    peer = ("type", "veth", "peer", "name", interface, "netns", str(pid))
    with contextlib.suppress(RuntimeError):  # of a node that has just ended: its network may live a moment longer
        in_network_of(bridge, "ip", "link", "delete", port)
    in_network_of(bridge, "ip", "link", "add", "name", port, *peer)
    in_network_of(bridge, "ip", "link", "set", port, "master", "switch", "up")
    in_network_of(pid, "ip", "link", "set", interface, "up")
    in_network_of(pid, "ip", "address", "add", f"{address}/24", "dev", interface)


def has_own_network(pid: int) -> bool:
    """Whether the process has left the host's network namespace."""
    with contextlib.suppress(OSError):
        return os.readlink(f"/proc/{pid}/ns/net") != os.readlink("/proc/self/ns/net")
    return False


def in_network_of(pid: int, *command: str) -> str:
    """What a command prints when run in the network namespace of `pid`."""
    return output("nsenter", f"--net=/proc/{pid}/ns/net", *command)


# ------------------------------------------------------------------------------------------- small


def processes() -> Iterator[tuple[int, str, list[str]]]:
    """Of all processes of the machine: the pid, the command line with a NUL after each word, NAME=VALUE for each
    variable.
    """
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            command, variables = ((entry / name).read_text(errors="replace") for name in ("cmdline", "environ"))
            yield int(entry.name), command, variables.split("\0")


def wait_for(condition: Callable[[], bool], what: str, timeout: float = 40) -> None:
    """Poll until the condition holds; after `timeout` seconds raise TimeoutError naming `what`."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout:.0f} s for {what}")
        time.sleep(0.01)


def output(*command: str) -> str:
    """What a command prints; RuntimeError with its stderr when it fails."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout
