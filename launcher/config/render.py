"""PlacedRun -> job script. Pure: the same spec gives the same text, on any machine, at any time."""

from __future__ import annotations

import shlex
from functools import cache

import jinja2

from launcher.base.files import data_dir
from launcher.config import sbatch
from launcher.config.runtime import again_command, node_command, srun_flags
from launcher.config.spec import PlacedRun, node_config
from launcher.scheduler.parse import compress, seconds
from launcher.titan.checkpoints import folder_of


def render(spec: PlacedRun) -> str:
    """The text of job.sbatch, for Slurm or for the local scheduler."""
    job, profile = spec.job, spec.profile
    return _template().render(
        name=job.name,
        run_dir=spec.run_dir,
        scheduler=job.scheduler,
        runtime=job.runtime,
        recipe=job.recipe,
        gpu=profile.gpu,
        nodes=job.nodes,
        allocated=spec.allocated,
        segment=spec.segment,
        gpus_per_node=profile.gpus_per_node,
        restarts=spec.begins_anew,
        checkpoints=str(folder_of(node_config(spec))) if spec.recipe.checkpoint_interval else "",
        signal_s=_signal_s(spec),
        again=again_command(spec),
        slurm_bin=job.slurm_bin,
        options=sbatch.lines(_options(spec), job.sbatch),
        env=sorted(spec.env.items()),
        srun_flags=srun_flags(spec),
        command=node_command(spec),
    )


def _options(spec: PlacedRun) -> dict[str, str | None]:
    """What sbatch is told, in the order of the script; None for a flag, "" for what is not said."""
    job, profile = spec.job, spec.profile
    return {
        "job-name": spec.job_name,
        "nodes": str(spec.allocated),
        "ntasks-per-node": "1",
        "gres": profile.gres and f"{profile.gres}:{profile.gpus_per_node}",
        "exclusive": None,
        "mem": "0",
        "time": job.time,
        **{option: getattr(job, option) for option in sbatch.PLACEMENT},
        "exclude": ",".join(filter(None, (job.exclude, compress(spec.avoid)))),
        "segment": str(spec.segment or ""),
        "export": "NIL",
        **_endings(spec),
        "output": f"{spec.run_dir}/logs/job.log",
        "open-mode": "append",
    }


def _endings(spec: PlacedRun) -> dict[str, str | None]:
    """A run that begins anew outlives its nodes; Slurm queues it again only where that is so."""
    if not spec.begins_anew:
        return {"no-requeue": None}
    signal_s = _signal_s(spec)
    return {"requeue": None, "no-kill": None, "signal": f"B:USR1@{signal_s}" if signal_s else ""}


def _signal_s(spec: PlacedRun) -> int:
    """How long before its time limit Slurm warns the job, so that it can write one more checkpoint and end."""
    limit_s = seconds(spec.job.time) or 0
    return min(600, limit_s // 4) if spec.recipe.checkpoint_interval else 0


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(data_dir("slurm")),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        optimized=False,  # it is rendered once
        autoescape=False,  # a shell script, quoted by the filter below, is not HTML
    )
    environment.filters["quote"] = shlex.quote
    environment.filters["comment"] = lambda text: "".join(c if c.isprintable() else "?" for c in text)
    return environment.get_template("job.sbatch.j2")
