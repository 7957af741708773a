"""Runs on every node, inside the container: checks what training needs, then becomes torchrun.

    python3 RUN_DIR/job/node.py RUN_DIR/job/node.json

Prints one line that begins with `titan-node:` and writes the same facts to RUN_DIR/nodes/<%4n>-<host>.json. Exits
with 20, and without having started anything, when a check fails. Standard library only, until torch is looked at.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import importlib.util
import ipaddress
import json
import os
import platform
import re
import shlex
import socket
import struct
import sys
import time
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # `titan` is copied beside this file

from titan import Refused  # type: ignore[import-not-found]
from titan.caches import filesystem_of, scratch_dir  # type: ignore[import-not-found]
from titan.command import (  # type: ignore[import-not-found]
    Rendezvous,
    check_node,
    config_files,
    torchrun_command,
)
from titan.data import check_data, check_tokenizer  # type: ignore[import-not-found]
from titan.weights import starting_weights  # type: ignore[import-not-found]

CHECK_FAILED = 20  # this process's exit code when the node cannot train; docs/exit-codes.md names it

SIOCGIFADDR = 0x8915  # linux/sockios.h: the IPv4 address of a network interface

Facts = dict[str, Any]


def main(argv: list[str]) -> int:
    """Does not return when all is well: the process is torchrun from then on."""
    facts: Facts = {"schema": 1, "ok": False, "node": 0, "host": "?", "time": int(time.time())}
    run_dir: Path | None = None
    try:
        node_id = _number(os.environ.get("SLURM_NODEID", "0"))
        host = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
        facts.update(node=node_id, host=host)
        node = read_node(argv)
        run_dir = Path(node["run_dir"])
        check_run_dir(run_dir)
        facts.update(device=node["device"], profile=node.get("profile", ""), hostname=socket.gethostname())
        facts.update(check_data(node))
        check_tokenizer(Path(node["tokenizer"]))
        facts.update(find_network(node, os.environ))
        scratch = scratch_dir(os.environ, node["scratch"])
        facts.update(scratch=f"{scratch} ({filesystem_of(scratch)})")
        added = environment(node, facts["iface"], scratch, os.environ)
        os.environ.update(added)  # the caches must be in place before torch is imported
        facts.update(software(("safetensors",) if node["init_from"] else ()))
        facts.update(starting_weights(node, facts["torchtitan"]))
        facts.update(check_device(node))
        rendezvous = Rendezvous(
            job_id=os.environ.get("TITAN_JOB_ID") or "0",
            node_id=node_id,
            node_name=host,
            head_addr=os.environ.get("TITAN_HEAD_ADDR") or "127.0.0.1",
            head_port=_number(os.environ.get("TITAN_HEAD_PORT", "0")),
            local_addr=facts["address"],
        )
        command = torchrun_command(
            node, facts["torchtitan"], rendezvous, torch_version=facts["torch"], python=sys.executable
        )
        ours = any(argument.startswith(("titan.", "--module=titan.")) for argument in command)
        if ours or node["data_source"].startswith("s3://"):
            path = [str(run_dir / "job"), os.environ.get("PYTHONPATH", "")]
            added["PYTHONPATH"] = os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, path))
        for file, text in config_files(node, facts["torchtitan"]).items():
            write(Path(file), text)
        facts.update(ok=True, command=command, environment=added)
        write(record(run_dir, facts), json.dumps(facts, indent=2) + "\n")
        say(ok_line(facts))
        if facts.get("data_pointers") and node_id == 0:
            pointers = (
                f"{facts['data_pointers']} of {facts['data_files']} shards are Git LFS pointers, not data"
            )
            say(f"titan-node: warn node=0 host={host} why={_quoted(pointers)}")
        assignments = [f"{name}={shlex.quote(value)}" for name, value in added.items()]
        say(f"titan-command: {' '.join(assignments)} {shlex.join(command)}")
        os.chdir(run_dir)
        os.execvp(command[0], command)
    except Refused as refused:
        return fail(facts, run_dir, refused.why, refused.fix)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return fail(
            facts, run_dir, f"{where}{error.strerror or error}", "the mounts and permissions on this node"
        )
    except Exception as error:  # nobody foresaw it: the log must hold what a report needs
        why = f"unexpected: {type(error).__name__}: {error}"
        status = fail(facts, run_dir, why, "report this with the traceback that follows in this log")
        say(traceback.format_exc())
        return status


def fail(facts: Facts, run_dir: Path | None, why: str, fix: str) -> int:
    """Says why this node cannot train, in one line and, where that can be written, in its record."""
    why, fix = " ".join(why.split()), " ".join(fix.split())
    facts.update(ok=False, why=why, fix=fix)
    say(f"titan-node: FAIL node={facts['node']} host={facts['host']} why={_quoted(why)} fix={_quoted(fix)}")
    if run_dir is not None:
        with contextlib.suppress(Exception):  # the line above has said it
            write(record(run_dir, facts), json.dumps(facts, indent=2) + "\n")
    return CHECK_FAILED


def ok_line(facts: Facts) -> str:
    parts = [f"titan-node: ok node={facts['node']} host={facts['host']} device={facts['device']}"]
    parts += [f"gpus={facts['gpus']} gpu={_quoted(facts['gpu'])}"]
    parts += [f"{name}={facts[name] or 'none'}" for name in ("torch", "cuda", "torchtitan", "iface")]
    return " ".join(parts)


def say(line: str) -> None:
    encoding = sys.stdout.encoding or "utf-8"
    printable = line.encode(encoding, "backslashreplace").decode(encoding)  # half a character, from node.json
    print(printable, flush=True)  # exec throws away what is still buffered


def record(run_dir: Path, facts: Facts) -> Path:
    return run_dir / "nodes" / f"{facts['node']:04d}-{facts['host']}.json"


def write(path: Path, text: str) -> None:
    """Through a temporary name: several nodes may write the same file in a shared directory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_node(argv: list[str]) -> dict[str, Any]:
    """The object in the file that `argv` names. Raises Refused for a file that is not what the launcher writes."""
    if len(argv) != 2:
        raise Refused("one argument is needed", "python3 RUN_DIR/job/node.py RUN_DIR/job/node.json")
    try:
        value = json.loads(Path(argv[1]).read_text(encoding="utf-8"))
    except OSError as error:
        raise Refused(f"{argv[1]}: {error.strerror}", "mount the run directory at its own path") from error
    except (ValueError, RecursionError) as error:
        raise Refused(
            f"{argv[1]} is not JSON: {error}", "submit again: launcher submit <run_dir>/run.toml"
        ) from error
    node: dict[str, Any] = check_node(value)
    return node


def check_run_dir(run_dir: Path) -> None:
    probe = run_dir / "nodes" / f".probe.{socket.gethostname()}.{os.getpid()}"
    try:
        for folder in (run_dir / "nodes", run_dir / "titan"):
            folder.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise Refused(
            f"the run directory {run_dir} cannot be written: {error.strerror}",
            "a directory shared by all nodes that you can write on them: --runs-dir DIR",
        ) from error


def find_network(node: dict[str, Any], env: Any) -> Facts:
    """The interface that carries the route to the head node, and this node's address on it.

    Raises Refused where several nodes would each meet only themselves.
    """
    head, several = env.get("TITAN_HEAD_ADDR", ""), node["nodes"] > 1
    fix = "start it with the job script: sbatch <run_dir>/job.sbatch"
    if not head:
        if several:
            raise Refused("TITAN_HEAD_ADDR is not set: the nodes cannot find each other", fix)
        head = "127.0.0.1"
    try:
        family, _, _, _, address = socket.getaddrinfo(head, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # sends nothing: it only asks the kernel for the route
            local = str(probe.getsockname()[0])
    except OSError as error:
        raise Refused(f"there is no route to the head node {head}: {error.strerror or error}", fix) from error
    if several and node["device"] == "cuda" and ipaddress.ip_address(local).is_loopback:
        raise Refused(f"the head node's address {head} is loopback: every node would train alone", fix)
    return {"address": local, "iface": interface_of(local)}


def interface_of(address: str) -> str:
    """The name of the interface whose IPv4 address this is; empty when none has it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, request)
            except OSError:  # an interface without an IPv4 address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return ""


def environment(node: dict[str, Any], iface: str, scratch: Path, env: Any) -> dict[str, str]:
    """Variables that training needs and that nobody has set: interfaces, caches, offline mode, a home."""
    wanted = {
        "HF_HOME": str(scratch / "huggingface"),
        "HF_DATASETS_CACHE": str(scratch / "huggingface" / "datasets"),
        "TRITON_CACHE_DIR": str(scratch / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor"),
    }
    if iface:
        wanted.update(dict.fromkeys(("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME"), iface))
    if node["data"] != "hub" and not env.get("HF_HUB_OFFLINE"):
        wanted.update(dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"), "1"))
    added = {name: value for name, value in wanted.items() if not env.get(name)}
    if not os.access(env.get("HOME") or "/nonexistent", os.W_OK):
        added["HOME"] = str(scratch)
    if node["device"] == "cpu":
        added["CUDA_VISIBLE_DEVICES"] = ""  # asked for the CPU: GPUs that happen to be there are not used
    return added


def software(more: tuple[str, ...] = ()) -> Facts:
    """Versions that decide a run's numbers. Raises Refused where torch, torchtitan or one of `more` is missing."""
    image = (
        "an image that holds it (containers/ builds one), or with --runtime bare: --python PATH/TO/python3"
    )
    for package in ("torch", "torchtitan", *more):
        if importlib.util.find_spec(package) is None:
            raise Refused(f"{package} is not installed for {sys.executable}", image)
    try:
        titan = importlib.metadata.version("torchtitan")
    except importlib.metadata.PackageNotFoundError as error:
        raise Refused(
            "torchtitan can be imported but was not installed", "pip install --no-deps -e ."
        ) from error
    try:
        import torch
    except Exception as error:  # a broken image breaks here in many ways
        raise Refused(f"import torch fails: {type(error).__name__}: {error}", image) from error
    return {
        "python": platform.python_version(),
        "arch": platform.machine(),
        "torch": str(torch.__version__),
        "torchtitan": titan,
        "cuda": torch.version.cuda or "",
        "nccl": "",
        "driver": driver_version(),
    }


def driver_version() -> str:
    """NVIDIA's kernel driver; empty where there is none."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return ""
    match = re.search(r"\b\d{3}\.\d+(?:\.\d+)?\b", text)
    return match.group(0) if match else ""


def check_device(node: dict[str, Any]) -> Facts:
    """As many usable GPUs as the profile says. A missing one is a failure, never a reason to train on the CPU."""
    if node["device"] == "cpu":
        return {"gpus": 0, "gpu": "CPU", "gpu_names": []}
    import torch

    expected = node["gpus_per_node"]
    if not torch.version.cuda:
        raise Refused(
            f"torch {torch.__version__} was built without CUDA", "an image with a CUDA build of torch"
        )
    visible = torch.cuda.device_count()
    try:
        torch.cuda.init()
        names = [torch.cuda.get_device_name(index) for index in range(visible)]
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
    except (
        Exception
    ) as error:  # CUDA reports an old driver, a missing one and a broken GPU in different classes
        raise Refused(
            f"CUDA {torch.version.cuda} does not start: {error}",
            "nvidia-smi in the container; the image needs NVIDIA_VISIBLE_DEVICES=all and"
            " NVIDIA_DRIVER_CAPABILITIES=compute,utility, the node a driver for this CUDA",
        ) from error
    if visible != expected:
        raise Refused(
            f"{visible} GPUs are visible, the profile says {expected}",
            f"nvidia-smi -L on this node; the job must ask for --gres=gpu:{expected}, and CUDA_VISIBLE_DEVICES"
            f" ({os.environ.get('CUDA_VISIBLE_DEVICES', 'unset')}) must not hide any",
        )
    return {"gpus": visible, "gpu": names[0], "gpu_names": names, "nccl": nccl}


def _number(text: str) -> int:
    return int(text) if text.isdecimal() else 0


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
