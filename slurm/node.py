"""Runs on every node, inside the container: checks what training needs, then becomes torchrun.

    python3 RUN_DIR/job/node.py RUN_DIR/job/node.json

Prints one line that begins with `titan-node:` and writes the same facts to RUN_DIR/nodes/<%4n>-<host>.json; the nodes
agree on one verdict, which node 0 writes to RUN_DIR/nodes/check.json. Exits with 20, and without having started
torchrun on any node, when a check fails. With more nodes than train (TITAN_NODES) the verdict chooses: who is left out
exits with 0, spare or unfit. Standard library only: torch is looked at by processes of its own (check/).
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import io
import json
import os
import platform
import re
import resource
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # `titan` and `check` are copied beside this file

from check import Findings, bounded, read, workers, write
from check.agree import ARRIVE_S, HELLO_S, REPORT_S, agree, hosts_of, measure
from check.health import driver_needed, look
from check.meeting import Lost
from check.network import find_network
from check.verdict import judge, lines
from check.watch import asked_through
from titan import Refused, checkpoints
from titan.caches import filesystem_of, scratch_dir
from titan.command import NODE_SCHEMA, Rendezvous, config_files, hang_s, torchrun_command
from titan.data import check_data, check_tokenizer
from titan.weights import SHAPES, starting_weights

CHECK_FAILED = 20  # this process's exit code when the job cannot train; docs/exit-codes.md names it
MEASURED = ("product", "all-reduce-node", "all-reduce")  # problems that the workers' libraries know more of
SEVERAL_READ_S = 600  # for all checkpoints
READ_S = 120  # for data, tokenizer and weights: a network file system that is gone answers never

Facts = dict[str, Any]


def main(argv: list[str]) -> int:
    """Does not return when all is well: the process is torchrun from then on."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # node.json may hold half a character
    now = time.time()
    facts: Facts = {"schema": 1, "ok": False, "node": 0, "host": "?", "problems": [], "warnings": []}
    facts.update(time=now, utc_offset_s=time.localtime(now).tm_gmtoff)
    found = Findings(facts["problems"], facts["warnings"])
    crew: list[Any] = []
    run_dir: Path | None = None
    try:
        node_id = _number(os.environ.get("SLURM_NODEID", "0"))
        host = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
        facts.update(node=node_id, host=host, cluster=os.environ.get("SLURM_CLUSTER_NAME", ""))
        node = read_node(argv)
        run_dir = Path(node["placed"]["run_dir"])
        command, added = examine(node, run_dir, facts, crew, found)
        status = conclude(node, run_dir, facts, crew, found)
        if status is not None:
            return status
        if "head" in facts:
            command = prepare(node, run_dir, facts, added)
        facts.update(ok=True, command=command, environment=added)
        save(run_dir, facts)
        say(ok_line(facts))
        for note in facts["warnings"]:
            say(f"titan-node: warn node={node_id} host={host} why={_quoted(note['what'])}")
        assignments = [f"{name}={shlex.quote(value)}" for name, value in added.items()]
        say(f"titan-command: {' '.join(assignments)} {shlex.join(command)}")
        workers.stop(crew)
        os.chdir(run_dir)
        if os.environ.get("LAUNCHER_CORE_DUMPS") != "1":  # gigabytes for each rank, in the run directory
            resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
        if hang_s(os.environ) or node["recipe"]["checkpoint_interval"] > 0:
            watch_it(argv[1], node_id, host)
        os.execvp(command[0], command)
    except Refused as refused:
        found.error("node.json", refused)
        return fail(facts, run_dir)
    except Exception as error:  # nobody foresaw it: the log must hold what a report needs
        found.unexpected(error)
        return fail(facts, run_dir)
    finally:
        workers.stop(crew)


def watch_it(node_json: str, node_id: int, host: str) -> None:
    """Starts what ends the run if it hangs; a child of torchrun, which this process becomes."""
    program = Path(__file__).resolve().parent / "check" / "watch.py"
    with contextlib.suppress(OSError):  # without it, torchtitan's own timeouts end a run that hangs
        words = [node_json, str(node_id), host, str(os.getpid())]
        subprocess.Popen([sys.executable, str(program), *words], stdin=subprocess.DEVNULL)


def examine(
    node: dict[str, Any], run_dir: Path, facts: Facts, crew: list[Any], found: Any
) -> tuple[list[str], dict[str, str]]:
    """Everything that this node finds out by itself, into `facts`; the workers that it starts, into `crew`.

    Returns torchrun's command line and the variables that were added for it. What is wrong goes to
    facts["problems"], all of it, so that one attempt shows everything that must be mended.
    """
    facts.update(check=node["job"]["check"], device=node["profile"]["device"], profile=node["job"]["gpu"])
    facts.update(hostname=socket.gethostname(), driver=driver_version())
    env, added, scratch = os.environ, {}, None
    with found.noting("run directory"):
        ours, fix = (run_dir / "nodes", run_dir / "titan"), "a directory shared by all nodes that you can write on them"
        check_writable(ours[0], f"the run directory {run_dir}", f"{fix}: --runs-dir DIR", ours)
        tell(run_dir, facts, "software and data")
    with found.noting("network"):
        facts.update(find_network(node, env))
    with found.noting("scratch"):
        scratch = scratch_dir(env, node["profile"]["scratch"])
        facts.update(scratch=f"{scratch} ({filesystem_of(scratch)})")
        added = environment(node, facts.get("iface", ""), scratch, env)
        env.update(added)  # the caches must be in place before torch is imported
    with found.noting("software"):
        facts.update(software(("safetensors",) if node["job"]["init_from"] else ()))
        if scratch is not None:  # torch takes seconds to import: meanwhile the rest is looked at
            count = node["profile"]["gpus_per_node"] if facts["check"] == "full" else 1
            crew += workers.start(count, node["profile"]["device"], scratch, env)
    with found.noting("data"):
        facts.update(within(READ_S, node["placed"]["data"], check_data, node))
    with found.noting("tokenizer"):
        within(READ_S, node["placed"]["tokenizer"], check_tokenizer, Path(node["placed"]["tokenizer"]))
    if facts["check"] != "off" and scratch is not None:
        with found.noting("health"):
            facts.update(look(node, facts["host"], env, {"scratch": scratch, "run": run_dir}, found))
    if crew:
        greet(node, facts, crew, found)
    if hang_s(env):
        added.update(asked_through(run_dir, facts["node"], facts["host"], env))
        env.update(added)
    if "torchtitan" in facts:
        whole, folder = [], checkpoints.folder_of(node)
        if node["recipe"]["checkpoint_interval"] > 0 or node["job"]["init_from"]:
            with found.noting("checkpoints"):
                whole, damaged = within(SEVERAL_READ_S, str(folder), find_checkpoints, node, folder)
                if facts["node"] == 0:
                    with found.noting("checkpoint-folder"):
                        tend_checkpoints(node, folder, whole, damaged, facts, found)
        own = folder / f"step-{whole[-1]}" if whole else None
        with found.noting("weights"):
            facts.update(within(READ_S, node["job"]["init_from"], starting_weights, node, own))
    command: list[str] = []
    if {"torch", "torchtitan", "address"} <= facts.keys():
        with found.noting("command"):
            command = prepare(node, run_dir, facts, added)
    if crew and facts["check"] == "full" and not facts["problems"]:
        tell(run_dir, facts, "speed")
        facts.update(measure(crew, node, facts["host"], env, found))
    return command, added


def find_checkpoints(node: dict[str, Any], folder: Path) -> tuple[list[int], list[Any]]:
    """Whole and damaged ones. The folder itself is not made: where it exists, torchtitan 0.2 takes no other weights."""
    if node["recipe"]["checkpoint_interval"] > 0:
        place, fix = folder if folder.is_dir() else folder.parent, "a directory that every node can write"
        check_writable(place, f"the checkpoint directory {folder}", f"{fix}: --checkpoint-dir DIR")
    return checkpoints.look(folder)  # type: ignore[no-any-return]


def tend_checkpoints(
    node: dict[str, Any], folder: Path, whole: list[int], damaged: list[Any], facts: Facts, found: Any
) -> None:
    """For all nodes: sets damaged ones aside, looks for room, and refuses those of another kind of run."""
    version, recipe = facts["torchtitan"], node["recipe"]
    if wrong := checkpoints.foreign(checkpoints.record_of(folder), node, version):
        why = f"the checkpoints in {folder} do not fit this run: {'; '.join(wrong)}"
        fix = "use the settings and the image that wrote them, or another --name or --checkpoint-dir"
        found.problem("checkpoint-foreign", why, fix, "run")
        return
    checkpoints.set_aside(folder, damaged)
    goes_on = f"training goes on from step {whole[-1]}" if whole else "training starts from the beginning"
    for one in damaged:
        what = f"checkpoint step {one.step}: {one.why}; it was moved to {folder / checkpoints.ASIDE}; {goes_on}"
        found.warning("checkpoint-damaged", what)
    facts["checkpoint_step"] = max(whole, default=0)
    shape, free = SHAPES.get(recipe["flavor"]), checkpoints.free_bytes(folder)
    count, each = checkpoints.to_come(recipe, whole), shape.checkpoint_bytes if shape else 0
    if free is not None and free < count * each:
        what = f"{count} checkpoints take {count * each / 1e9:,.0f} GB; {free / 1e9:,.0f} GB are free in {folder}"
        if free < each:
            found.problem("checkpoint-space", what, "make room, or use another --checkpoint-dir", "run")
            return
        found.warning("checkpoint-space", what)
    if not whole and node["job"]["init_from"] and version.startswith("0.2."):
        if not checkpoints.make_way(folder):
            why = f"{folder} exists and holds no finished checkpoint: torchtitan 0.2 would start from random weights"
            again = f"start from {node['job']['init_from']} again after: rm -r {shlex.quote(str(folder))}"
            raise Refused(why, f"look at it, then {again}")
    elif recipe["checkpoint_interval"] > 0 and not checkpoints.record_of(folder):
        write(folder / checkpoints.RECORD, checkpoints.origin(node, version))


def greet(node: dict[str, Any], facts: Facts, crew: list[Any], found: Any) -> None:
    """What the workers say of torch and of the GPUs; a driver that is too old is told by its number."""
    answers = workers.ask(crew, {"do": "look", "gpus": node["profile"]["gpus_per_node"]}, HELLO_S)
    first = answers[0]
    facts.update({key: value for key, value in first.items() if key not in ("problem", "fix", "fault")})
    needed = driver_needed(facts["driver"], first.get("cuda", ""))
    old = f"driver {facts['driver']} is older than CUDA {first.get('cuda')} needs ({needed})" if needed else ""
    bad = next((answer for answer in answers if "problem" in answer), None)
    if bad is not None:
        why, fix = bad["problem"], bad.get("fix", "look at the log of this node; launcher image inspect FILE")
        if old:
            why = f"{why}; {old}"
            fix = f"use a newer driver, or an image with an older CUDA or with NVIDIA's cuda-compat package; {fix}"
        found.problem("gpus", why, fix, "run" if old else bad.get("fault", "node"))
    elif old and node["profile"]["device"] == "cuda":
        found.warning("driver", f"{old}: it runs thanks to the image's forward compatibility")
    wanted = node["profile"]["gpu"]
    named = re.search(rf"(?<![A-Z]){re.escape(wanted)}", facts.get("gpu", ""))
    if facts.get("gpu") and node["profile"]["device"] == "cuda" and not named:
        found.warning("gpus", f"the profile is for {wanted}, but the node has {facts['gpu']}")


def prepare(node: dict[str, Any], run_dir: Path, facts: Facts, added: dict[str, str]) -> list[str]:
    """torchrun's command line; the files that it reads are written. Raises Refused for what cannot be run."""
    command: list[str] = torchrun_command(
        node, facts["torchtitan"], rendezvous(facts), torch_version=facts["torch"], python=sys.executable
    )
    ours = any(argument.startswith(("titan.", "--module=titan.")) for argument in command)
    if "PYTHONPATH" not in added and (ours or node["placed"]["data_source"].startswith("s3://")):
        path = [str(run_dir / "job"), os.environ.get("PYTHONPATH", "")]
        added["PYTHONPATH"] = os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    for file, text in config_files(node, facts["torchtitan"]).items():
        write(Path(file), text)
    return command


def rendezvous(facts: Facts) -> Any:
    """Where the nodes meet, as the job script says it, and after a choice among them as the verdict does."""
    return Rendezvous(
        job_id=os.environ.get("TITAN_JOB_ID") or "0",
        node_id=facts.get("rank", facts["node"]),
        node_name=facts["host"],
        head_addr=facts.get("head") or os.environ.get("TITAN_HEAD_ADDR") or "127.0.0.1",
        head_port=_number(os.environ.get("TITAN_HEAD_PORT", "0")),
        step_nodes=_number(os.environ.get("TITAN_NODES", "")),
    )


def conclude(node: dict[str, Any], run_dir: Path, facts: Facts, crew: list[Any], found: Any) -> int | None:
    """None where this node trains. Else the process's exit code, with what is wrong printed and recorded:
    CHECK_FAILED, or 0 where the others train without it, whom srun would end for another code.
    """
    where = rendezvous(facts)
    has_spares = where.step_nodes > node["job"]["nodes"]
    alone = max(where.step_nodes, node["job"]["nodes"]) == 1
    can_meet = alone or (facts.get("address") and 0 < where.head_port < 65536)
    if not can_meet or (facts["check"] == "off" and not has_spares):
        if not facts["problems"]:
            return None
        fail(facts, run_dir)
        return 0 if has_spares and facts["node"] and others_train(run_dir, ARRIVE_S) else CHECK_FAILED
    before, stand_in = len(facts["problems"]), 0
    if before:
        fail(facts, run_dir)
    else:
        tell(run_dir, facts, "the nodes together")

    def publish(verdict: dict[str, Any]) -> None:
        """The verdict and what it says of this node, told and recorded before another's end can end this process."""
        if facts["node"] in (0, stand_in):
            with contextlib.suppress(OSError):  # a run directory that cannot be written is in the verdict
                write(run_dir / "nodes" / "check.json", verdict)
            for line in lines(verdict):
                say(line)
        # srun ends all when the first has ended, and would tell of a signal, not of a code.
        if not verdict["ok"]:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if mine := [one for one in verdict["unfit"] if one["node"] == facts["node"]]:
            found.problems.clear()
            for one in mine:
                found.problem(one["name"], one["why"], one["fix"], one["fault"])
            fail(facts, run_dir, before)
            if any(one["name"] in MEASURED for one in mine) and (text := workers.printed(crew)):
                say(text)  # it goes with the workers
        elif not verdict["ok"]:
            other = verdict["unfit"][0]
            facts["stopped"] = f"{other['host']} is unfit: {other['why']}"
            facts["ok"] = True  # this node is
            with contextlib.suppress(Exception):  # what is printed says it
                save(run_dir, facts)
            say(f"titan-check: stop node={facts['node']} host={facts['host']} because {facts['stopped']}")

    facts["check_s"] = round(time.time() - facts["time"], 1)
    try:
        verdict = agree(facts, node, crew, publish, where, (lambda: others_train(run_dir)) if has_spares else None)
    except Lost as lost:
        if has_spares and facts["node"] and not facts["problems"] and not any((run_dir / "nodes").glob("0000-*")):
            # Node 0's container never began, while this one's did: only the others can say so.
            stand_in = facts["node"]
            every = {**node, "job": {"nodes": where.step_nodes}}
            publish(judge({stand_in: facts}, every, hosts_of({0}, run_dir)))
            return CHECK_FAILED
        found.error("meeting", lost)
        fail(facts, run_dir, before)
        return 0 if has_spares and facts["node"] and others_train(run_dir, REPORT_S) else CHECK_FAILED
    if not verdict["ok"]:
        return CHECK_FAILED
    if not (chosen := verdict.get("chosen")):
        return None
    if facts["host"] in chosen:
        facts.update(rank=chosen.index(facts["host"]), head=verdict["head"])
        return None
    if not facts["problems"]:
        facts.update(ok=True, spare=True)
        with contextlib.suppress(OSError):  # what is printed says it
            save(run_dir, facts)
        say(f"titan-check: spare node={facts['node']} host={facts['host']} (chosen: {', '.join(chosen)})")
    return 0


def others_train(run_dir: Path, wait_s: float = 0) -> bool:
    """Whether the others met, and enough of them are fit, by their verdict in the run directory; it may be late."""
    deadline = time.monotonic() + wait_s
    while not (verdict := read(run_dir / "nodes" / "check.json")) and time.monotonic() < deadline:
        time.sleep(1)
    return verdict.get("ok") is True


def fail(facts: Facts, run_dir: Path | None, told: int = 0) -> int:
    """Says why this node cannot train, a line for each problem, and in its record. The first `told` were said."""
    first = facts["problems"][0]
    facts.update(ok=False, why=first["what"], fix=first["fix"])
    place = f"node={facts['node']} host={facts['host']}"
    for one in facts["problems"][told:]:
        say(f"titan-node: FAIL {place} why={_quoted(one['what'])} fix={_quoted(one['fix'])}")
        if trace := one.pop("traceback", ""):
            say(trace)
    with contextlib.suppress(Exception):  # what was printed has said it
        if run_dir is not None:
            save(run_dir, facts)
    return CHECK_FAILED


def save(run_dir: Path, facts: Facts) -> None:
    """This node's own record."""
    facts["check_s"] = round(time.time() - facts["time"], 1)
    file = run_dir / "nodes" / f"{facts['node']:04d}-{facts['host']}.json"
    write(file, facts)
    file.with_suffix(".doing").unlink(missing_ok=True)


def tell(run_dir: Path, facts: Facts, doing: str) -> None:
    """What this node is at, for who watches the run: a check may take minutes, and its log is silent until its end."""
    with contextlib.suppress(OSError):
        file = run_dir / "nodes" / f"{facts['node']:04d}-{facts['host']}.doing"
        write(file, {"doing": doing, "time": facts["time"]})


def ok_line(facts: Facts) -> str:
    """One line; of several GPUs' figures, the slowest one's."""
    parts = [f"titan-node: ok node={facts['node']} host={facts['host']} device={facts['device']}"]
    parts += [f"gpus={facts['gpus']} gpu={_quoted(facts['gpu'])}"]
    parts += [f"{name}={facts[name] or 'none'}" for name in ("torch", "cuda", "torchtitan", "iface")]
    for name in ("product_tflops", "copy_gbs"):
        if facts.get("speed"):
            parts.append(f"{name}={min(gpu[name] for gpu in facts['speed']):.4g}")
    parts += [f"{name}={facts[name]:.4g}" for name in ("allreduce_node_gbs", "allreduce_job_gbs") if name in facts]
    return " ".join([*parts, *([f"check_s={facts['check_s']:.1f}"] if facts["check"] != "off" else [])])


def say(line: str) -> None:
    print(line, flush=True)  # exec throws away what is still buffered


def within(seconds: float, what: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """The function's result. Raises Refused where it takes longer: it is left behind, nothing else can be done."""
    (result,) = bounded(seconds, [partial(function, *arguments)])
    if result is None:
        raise Refused(f"{what} does not answer within {seconds:.0f} s", "look at its file system: df, mount, dmesg")
    return result.result()


def read_node(argv: list[str]) -> dict[str, Any]:
    """The object in the file that `argv` names. Raises Refused for a file that is not what the launcher writes."""
    if len(argv) != 2:
        raise Refused("one argument is needed", "python3 RUN_DIR/job/node.py RUN_DIR/job/node.json")
    try:
        value = json.loads(Path(argv[1]).read_text(encoding="utf-8"))
    except OSError as error:
        raise Refused(f"{argv[1]}: {error.strerror}", "mount the run directory at its own path") from error
    except (ValueError, RecursionError) as error:
        raise Refused(f"{argv[1]} is not JSON: {error}", "submit again: launcher submit <run_dir>/run.toml") from error
    if not isinstance(value, dict) or value.get("schema") != NODE_SCHEMA:
        why = f"{argv[1]} is not an object of schema {NODE_SCHEMA}"
        raise Refused(why, "submit again with the launcher that wrote it")
    return value


def check_writable(folder: Path, what: str, fix: str, make: tuple[Path, ...] = ()) -> None:
    probe = folder / f".probe.{os.urandom(8).hex()}"
    try:
        for wanted in make:
            wanted.mkdir(parents=True, exist_ok=True)
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        raise Refused(f"{what} cannot be written: {error.strerror}", fix) from error


def environment(node: dict[str, Any], iface: str, scratch: Path, env: Any) -> dict[str, str]:
    """Variables that training needs and that nobody has set: interfaces, caches, offline mode, a home."""
    wanted = {
        "HF_HOME": str(scratch / "huggingface"),
        "HF_DATASETS_CACHE": str(scratch / "huggingface" / "datasets"),
        "TRITON_CACHE_DIR": str(scratch / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor"),
        # Otherwise torchrun holds the ranks' lines back, 8 KB of them, and prints them after what it says of their end.
        "PYTHONUNBUFFERED": "1",
    }
    if iface:
        wanted["NCCL_SOCKET_IFNAME"] = f"={iface}"  # NCCL takes a plain name for a prefix: eth1 is eth10, too
        wanted.update(dict.fromkeys(("GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME"), iface))
    if node["placed"]["data"] != "hub" and not env.get("HF_HUB_OFFLINE"):
        wanted.update(dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"), "1"))
    added = {name: value for name, value in wanted.items() if not env.get(name)}
    if not os.access(env.get("HOME") or "/nonexistent", os.W_OK):
        added["HOME"] = str(scratch)
    if node["profile"]["device"] == "cpu":
        added["CUDA_VISIBLE_DEVICES"] = ""  # asked for the CPU: GPUs that happen to be there are not used
    return added


def software(more: tuple[str, ...] = ()) -> Facts:
    """Versions that decide a run's numbers. Raises Refused where torch, torchtitan or one of `more` is missing.

    torch itself is imported by the workers alone.
    """
    image = "use an image that has it (launcher image build), or with --runtime bare: --python PATH/TO/python3"
    for package in ("torch", "torchtitan", *more):
        if importlib.util.find_spec(package) is None:
            raise Refused(f"{package} is not installed for {sys.executable}", image)
    try:
        titan = importlib.metadata.version("torchtitan")
    except importlib.metadata.PackageNotFoundError as error:
        raise Refused("torchtitan can be imported but was not installed", "pip install --no-deps -e .") from error
    return {"python": platform.python_version(), "arch": platform.machine(), "torchtitan": titan}


def driver_version() -> str:
    """NVIDIA's kernel driver; empty where there is none."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return ""
    match = re.search(r"\b\d{3}\.\d+(?:\.\d+)?\b", text)
    return match.group(0) if match else ""


def _number(text: str) -> int:
    return int(text) if text.isdecimal() else 0


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
