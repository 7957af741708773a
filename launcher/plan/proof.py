"""What torchtitan itself makes of a run before it queues: launcher/titan/prove.py, run here or, as text, by srun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from launcher.base.errors import LauncherError, install, quoted
from launcher.base.files import PACKAGE
from launcher.base.output import counted
from launcher.config.hardware import of_gpu
from launcher.config.spec import PlacedRun, node_config

TIMEOUT_S = 900  # one minute on an idle core
_NEEDED = {"job": ("nodes", "init_from"), "profile": ("device", "gpus_per_node")}  # of node.json's larger tables


def prove(run: PlacedRun) -> dict[str, Any]:
    """The facts that the program prints. Raises LauncherError where the Python has no torchtitan, or the program fails.

    The Python is `--python`, or with the bare runtime the one of the run, else the launcher's own.
    """
    named = run.job.runtime == "bare" or run.origin.get("job.python", "").startswith("option")
    python = run.job.python if named else sys.executable
    with tempfile.TemporaryDirectory(prefix="launcher-proof-") as folder:
        os.symlink(PACKAGE / "titan", Path(folder) / "titan")
        path = os.pathsep.join(filter(None, (folder, os.environ.get("PYTHONPATH", ""))))
        try:
            done = subprocess.run(
                [python, *_arguments(run)],
                capture_output=True,
                text=True,
                errors="replace",
                stdin=subprocess.DEVNULL,
                cwd=folder,
                env=os.environ | {"PYTHONPATH": path},
                timeout=TIMEOUT_S,
            )
        except OSError as error:
            raise LauncherError("proof-python", f"{python}: {error.strerror}", _elsewhere(run)) from error
        except subprocess.TimeoutExpired as error:
            what = f"torchtitan did not build this run in {TIMEOUT_S} s"
            raise LauncherError("proof-failed", what, "try again on a less busy machine") from error
    try:
        facts = json.loads(done.stdout.splitlines()[-1])
        if not facts.setdefault("missing", ""):
            lines(facts)  # another program's JSON lacks what is printed later, and fails here
            _refusal(facts)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        what = f"the proof did not run to its end in {python}"
        raise LauncherError("proof-failed", what, by_srun(run), original=done.stderr[-2000:]) from error
    if facts["missing"]:
        where = "" if _has_no_image(run) else ": run the proof inside the image, and read the last line"
        raise LauncherError("proof-python", f"{python} has no {facts['missing']}{where}", _elsewhere(run))
    found: dict[str, Any] = facts
    return found


def _arguments(run: PlacedRun) -> list[str]:
    node = node_config(run)
    needed: dict[str, Any] = {name: {key: node[name][key] for key in keys} for name, keys in _NEEDED.items()}
    needed |= {name: node[name] for name in ("recipe", "titan", "placed")}
    known = of_gpu(run.profile.gpu)
    needed |= {"compute_capability": list(known.compute_capability)} if known else {}
    ranks = sorted({0, run.gpus - 1})
    return ["-m", "titan.prove", json.dumps(needed, separators=(",", ":")), *map(str, ranks)]


def _has_no_image(run: PlacedRun) -> bool:
    return run.job.runtime == "bare" or run.job.scheduler == "local"


def _elsewhere(run: PlacedRun) -> str:
    """What to type where this Python cannot prove the run."""
    return f"{install('train')}; or --python PATH of one that has it" if _has_no_image(run) else by_srun(run)


def by_srun(run: PlacedRun) -> str:
    """A shell command that does the same in the run's image on one node, which must see the launcher's folder."""
    job, inside = run.job, "/launcher/titan"
    step = ["srun", "-N1", "-n1", *([f"--partition={job.partition}"] if job.partition else [])]
    step += [f"--account={job.account}"] if job.account else []
    image = job.image or f"IMAGE.{'sif' if job.runtime == 'apptainer' else 'sqsh'}"
    mount = f"{PACKAGE}/titan:{inside}"
    program = ["env", f"PYTHONPATH={Path(inside).parent}", job.python, *_arguments(run)]
    if job.runtime == "pyxis":
        step += [f"--container-image={image}", f"--container-mounts={mount}:ro", "--no-container-mount-home"]
    elif job.runtime == "apptainer":
        step += ["apptainer", "exec", "--no-mount", "home,cwd", "--bind", mount, image]
    else:
        program[1] = f"PYTHONPATH={PACKAGE}"
    return quoted(*step, *program)


def check(facts: dict[str, Any]) -> None:
    """Raises LauncherError, with torchtitan's words, for a run that it refuses."""
    if error := _refusal(facts):
        raise error


def _refusal(facts: dict[str, Any]) -> LauncherError | None:
    refused = facts["refused"]
    if refused:
        rank = "" if refused["rank"] is None else f" on rank {refused['rank']} of {facts['world']:,}"
        what = f"torchtitan {facts['torchtitan']} refuses this run in its {refused['part']}{rank}"
        fix = refused.get("fix") or "change what its words name, then again: launcher plan --prove"
        return LauncherError("proof-refused", what, fix, original=str(refused["why"]))
    return None


def lines(facts: dict[str, Any]) -> list[str]:
    """The proof for people; nothing of a refusal, which is an error."""
    rows = []
    if not facts["refused"]:
        took = f"{facts['torchtitan']} takes it at {counted(facts['world'], 'rank')}, {facts['seconds']:.0f} s"
        rows.append(f"torchtitan {took}; tried in shapes alone, without kernels and memory")
    for one in facts["ranks"]:
        degrees = ", ".join(f"{name} {size}" for name, size in one.get("mesh", {}).items() if size > 1)
        held = f"{one['parameters']:,} parameters" if "parameters" in one else ""
        untried = f"not tried to its end here: {one['untried']}" if one["untried"] else ""
        rows.append(f"rank {one['rank']}: {'; '.join(filter(None, (degrees, held, untried or 'one step')))}")
    return [f"{'' if at else 'proof':12}{row}" for at, row in enumerate(rows)]
