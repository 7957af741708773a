"""PlacedRun -> job script. Pure: the same spec gives the same text, on any machine, at any time."""

from __future__ import annotations

import shlex
from functools import cache

import jinja2

from launcher.base.files import data_dir
from launcher.config.runtime import node_command, srun_flags
from launcher.config.spec import PlacedRun
from launcher.scheduler.parse import compress

PLACEMENT = ("partition", "account", "qos", "reservation", "nodelist")


def render(spec: PlacedRun) -> str:
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
        placement=[(option, value) for option, value in _placement(spec).items() if value],
        env=sorted(spec.env.items()),
        srun_flags=srun_flags(spec),
        command=node_command(spec),
    )


def _placement(spec: PlacedRun) -> dict[str, str | int]:
    asked: dict[str, str | int] = {option: getattr(spec.job, option) for option in PLACEMENT}
    exclude = ",".join(filter(None, (spec.job.exclude, compress(spec.avoid))))
    return asked | {"exclude": exclude, "segment": spec.segment}


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
