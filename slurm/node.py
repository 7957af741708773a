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
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # `titan` is copied beside this file

from titan import Refused  # type: ignore[import-not-found]
from titan.command import (  # type: ignore[import-not-found]
    Rendezvous,
    check_node,
    config_files,
    torchrun_command,
)

CHECK_FAILED = 20  # this process's exit code when the node cannot train; docs/exit-codes.md names it

LFS_POINTER = b"version https://git-lfs"
GZIP_MAGIC = b"\x1f\x8b"
SMALLEST_SHARD = 200  # bytes; an LFS pointer is about 130
SIOCGIFADDR = 0x8915  # linux/sockios.h: the IPv4 address of a network interface

Facts = dict[str, Any]
FETCH_C4 = "hf download allenai/c4 --repo-type dataset --include README.md --include 'en/*' --local-dir {}"
FETCH_TOKENIZER = "hf download meta-llama/Llama-3.1-8B --include 'tokenizer*' --local-dir {}"


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
        facts.update(check_data(node["data"]))
        check_tokenizer(Path(node["tokenizer"]))
        facts.update(find_network(node, os.environ))
        added = environment(node, facts["iface"], scratch_dir(os.environ), os.environ)
        os.environ.update(added)  # the caches must be in place before torch is imported
        facts.update(software())
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
        if any(argument.startswith(("titan.", "--module=titan.")) for argument in command):
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


def check_data(data: str) -> Facts:
    """The training data can be read as C4: a header that names `en`, and shards that are not LFS pointers."""
    if data == "hub":
        return {"data": data, "data_files": 0}
    if not data:
        raise Refused("no data directory was given", "--data /data/c4")
    folder = Path(data)
    if not folder.is_dir():
        raise Refused(f"{folder} is not a directory on this node", f"mount it, or: {FETCH_C4.format(folder)}")
    header = _header(folder / "README.md")
    if not re.search(r"""^\s*-?\s*config_name:\s*["']?en["']?\s*$""", header, re.MULTILINE):
        raise Refused(
            f"{folder}/README.md does not describe the configuration `en`",
            f"fetch the Hub's README.md of allenai/c4 into {folder}: {FETCH_C4.format(folder)}",
        )
    shards = sorted((folder / "en").glob("*train*.json.gz")) or sorted((folder / "en").glob("*.json.gz"))
    if not shards:
        raise Refused(f"{folder}/en holds no *.json.gz", f"{FETCH_C4.format(folder)}")
    small = [shard for shard in shards if shard.stat().st_size < SMALLEST_SHARD]
    usable = [shard for shard in shards if shard not in small]
    with open((usable or small)[0], "rb") as stream:
        start = stream.read(len(LFS_POINTER))
    if not usable and start == LFS_POINTER:
        raise Refused(
            f"all {len(shards)} shards in {folder}/en are Git LFS pointers, not data",
            f"{FETCH_C4.format(folder)}",
        )
    if not start.startswith(GZIP_MAGIC):
        raise Refused(f"{(usable or small)[0]} is not a gzip file", f"{FETCH_C4.format(folder)}")
    return {"data": data, "data_files": len(shards), "data_pointers": len(small) if usable else 0}


def _header(readme: Path) -> str:
    """The YAML between the two `---` lines at the top; empty where there is none."""
    try:
        text = readme.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise Refused(
            f"{readme}: {error.strerror}", "fetch the Hub's README.md of allenai/c4 beside en/"
        ) from error
    match = re.match(r"---\n(.*?)\n---\s*$", text, re.DOTALL | re.MULTILINE)
    return match.group(1) if match else ""


def check_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        try:
            value = json.loads((folder / name).read_text(encoding="utf-8"))
        except OSError as error:
            raise Refused(
                f"{folder / name}: {error.strerror}", f"{FETCH_TOKENIZER.format(folder)}"
            ) from error
        except (ValueError, RecursionError) as error:
            raise Refused(f"{folder / name} is not JSON", f"{FETCH_TOKENIZER.format(folder)}") from error
        if not isinstance(value, dict):
            raise Refused(f"{folder / name} is not a tokenizer's file", f"{FETCH_TOKENIZER.format(folder)}")


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
    if node["data"] != "hub":
        wanted["HF_HUB_OFFLINE"] = "1"
    added = {name: value for name, value in wanted.items() if not env.get(name)}
    if not os.access(env.get("HOME") or "/nonexistent", os.W_OK):
        added["HOME"] = str(scratch)
    if node["device"] == "cpu":
        added["CUDA_VISIBLE_DEVICES"] = ""  # asked for the CPU: GPUs that happen to be there are not used
    return added


def scratch_dir(env: Any) -> Path:
    """A directory of this job's own on this node; caches inside it are code that will be run.

    TITAN_SCRATCH names one that the job script made up and removes when the job ends.
    """
    if given := env.get("TITAN_SCRATCH"):
        scratch = Path(given).absolute()  # torchrun starts in another directory
        scratch.mkdir(mode=0o700, parents=True, exist_ok=True)
        return scratch
    wanted = Path(tempfile.gettempdir()) / f"titan-{os.getuid()}-{env.get('TITAN_JOB_ID') or os.getpid()}"
    wanted.mkdir(mode=0o700, parents=True, exist_ok=True)
    if wanted.is_symlink() or wanted.stat().st_uid != os.getuid():  # somebody else was there first
        return Path(tempfile.mkdtemp(prefix=f"{wanted.name}-"))
    return wanted


def software() -> Facts:
    """Versions that decide a run's numbers. Raises Refused where torch or torchtitan is missing."""
    image = (
        "an image that holds it (containers/ builds one), or with --runtime bare: --python PATH/TO/python3"
    )
    for package in ("torch", "torchtitan"):
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
