"""PlacedRun -> job script. Pure: the same spec gives the same text, on any machine, at any time."""

from __future__ import annotations

import shlex
from functools import cache

import jinja2

from launcher.base.files import data_dir
from launcher.config import sbatch
from launcher.config.runtime import node_command, srun_flags
from launcher.config.spec import PlacedRun
from launcher.scheduler.parse import compress


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
        gpus_per_node=profile.gpus_per_node,
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
        "nodes": str(job.nodes),
        "ntasks-per-node": "1",
        "gres": profile.gres and f"{profile.gres}:{profile.gpus_per_node}",
        "exclusive": None,
        "mem": "0",
        "time": job.time,
        **{option: getattr(job, option) for option in sbatch.PLACEMENT},
        "exclude": ",".join(filter(None, (job.exclude, compress(spec.avoid)))),
        "segment": str(spec.segment or ""),
        "export": "NIL",
        "no-requeue": None,
        "output": f"{spec.run_dir}/logs/job.log",
        "open-mode": "append",
    }


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(data_dir("slurm")),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # a shell script, quoted by the filter below, is not HTML
    )
    environment.filters["quote"] = shlex.quote
    environment.filters["comment"] = lambda text: "".join(c if c.isprintable() else "?" for c in text)
    return environment.get_template("job.sbatch.j2")
