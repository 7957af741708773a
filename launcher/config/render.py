"""RunSpec -> job script. Pure: the same spec gives the same text, on any machine, at any time."""

from __future__ import annotations

import shlex
from functools import cache

import jinja2

from launcher.base.files import data_dir
from launcher.config.runtime import node_command, srun_flags
from launcher.config.spec import RunSpec
from launcher.scheduler.parse import compress

PLACEMENT = ("partition", "account", "qos", "reservation", "nodelist", "exclude", "segment")


def render(spec: RunSpec) -> str:
    """The text of job.sbatch, for Slurm or for the local scheduler."""
    job, profile = spec.job, spec.profile
    return _template().render(
        name=job.name,
        job_name=spec.job_name,
        run_dir=spec.run_dir,
        scheduler=job.scheduler,
        runtime=job.runtime,
        recipe=job.recipe,
        gpu=profile.gpu,
        gres=profile.gres,
        nodes=job.nodes,
        gpus_per_node=profile.gpus_per_node,
        time=job.time,
        slurm_bin=job.slurm_bin,
        placement=[(option, value) for option in PLACEMENT if (value := _asked(spec, option))],
        env=sorted(spec.env.items()),
        srun_flags=srun_flags(spec),
        command=node_command(spec),
    )


def _asked(spec: RunSpec, option: str) -> str | int:
    """What Slurm is asked for; nodes that failed their check are left out beside those of --exclude."""
    value: str | int = getattr(spec.job, option)
    return ",".join(filter(None, (str(value), compress(spec.avoid)))) if option == "exclude" else value


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
