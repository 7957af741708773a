"""`launcher plan`: what a run will need and reach. The edge of launcher/plan/plan.py."""

from __future__ import annotations

import click

from launcher.base.errors import quoted
from launcher.base.output import as_json, duration, echo, print_json
from launcher.commands.asked import describe_run, spec_of
from launcher.config import resolve
from launcher.config.help import RunCommand
from launcher.config.options import RunOptions, run_options
from launcher.config.spec import PlacedRun, RunSpec
from launcher.plan import plan as core
from launcher.plan import proof
from launcher.plan.plan import START_S, Plan
from launcher.preflight.placement import with_gpu_memory
from launcher.scheduler import slurm
from launcher.scheduler.detect import detected


@click.command(cls=RunCommand)
@run_options
@click.option(
    "--prove", "proved", is_flag=True, help="Have torchtitan build the run at full size, without GPUs (a minute)."
)
@as_json
def plan(options: RunOptions, proved: bool, as_json: bool) -> None:
    """Predict a run: memory, tokens/s, time, node-hours and C4 files. Image and data need not exist.

    The speed comes from the nearest published row; without one, no speed is given. After the run, `results` compares
    the prediction with what was measured.

    \b
    launcher plan --gpu gb200 --nodes 9
    launcher plan --gpu h100 --nodes 4 --recipe llama3-70b --json
    launcher plan --gpu h100 --nodes 32 --recipe llama3-70b-tp --prove
    """
    spec = _on_its_nodes(spec_of(options, image_needed=False))
    found = core.plan(spec)
    if not as_json:
        echo(*lines(spec, found))
    facts = proof.prove(spec if isinstance(spec, PlacedRun) else resolve.placed(spec)) if proved else None
    if as_json:
        known = core.as_dict(found) | {"parameters": core.parameters_of(spec), "counted_by": ""}  # a key of old
        print_json(known | ({"proof": facts} if facts else {}))
    elif facts:
        echo(*proof.lines(facts))
    if facts:
        proof.check(facts)


def _on_its_nodes(spec: RunSpec) -> RunSpec:
    """With the memory of the nodes' GPUs, unless `--gpu` alone says which: that may be of another cluster."""
    elsewhere = spec.origin.get("job.gpu", "").startswith("option") and not spec.job.partition
    if elsewhere or spec.job.scheduler != "slurm" or not slurm.bin_dir():
        return spec
    return with_gpu_memory(resolve.placed(spec), detected())


def lines(spec: RunSpec, found: Plan) -> list[str]:
    """The plan for people. Pure."""
    recipe = spec.recipe
    rows = [
        f"{describe_run(spec)}, "
        f"batch {recipe.local_batch_size}, {recipe.steps:,} steps of {found.tokens // recipe.steps:,} tokens",
        "",
        f"memory      {_memory(spec, found)}",
    ]
    if found.memory:
        of_what = "weights and optimizer", "saved activations", "recomputed", "logits", "gathered weights"
        parts = zip(of_what, ("states", "saved", "recomputed", "logits", "gathered"), strict=True)
        rows.append("            " + ", ".join(f"{text} {getattr(found.memory, key):.1f}" for text, key in parts))
    rows += [f"            try: {change}" for change in found.advice]
    if found.tps is None:
        rows.append(f"tokens/s    cannot say: {'; '.join(found.differs)}")
    else:
        rows.append(f"tokens/s    {found.tps:,.0f} per GPU, as {found.basis}")
        rows += [f"            {text}" for text in found.differs]
    if found.wall_s and found.node_hours:
        rows.append(
            f"wall time   {duration(found.wall_s)}, of it {duration(START_S)} assumed for the start; after the queue"
        )
        rows.append(f"node-hours  {found.node_hours:.2f}{_limit(spec, found)}")
    else:
        rows.append(f"wall time   cannot say{_limit(spec, found)}")
    if found.c4_files is not None:
        where = f" --to {quoted(spec.job.data)}" if spec.job.data.startswith("/") else ""
        rows.append(f"C4 files    {found.c4_files} of 1024: launcher stage c4{where} --files {found.c4_files}")
    if found.checkpoint_gb:
        rows.append(
            f"checkpoints {found.checkpoint_gb:,.3g} GB each, for a moment {recipe.checkpoint_keep + 1} of them"
        )
    return [*rows, *(f"note        {note}" for note in found.notes)]


def _memory(spec: RunSpec, found: Plan) -> str:
    if found.memory_gib is None:
        return "cannot say"
    about = "about " if spec.recipe.compile else ""
    text = f"{about}{found.memory_gib:.1f} GiB"
    if found.device_gib:
        text += f" of {found.device_gib:g} ({found.memory_gib / found.device_gib:.0%}): {found.verdict}"
    if spec.recipe.compile and found.memory:
        text += f"; {found.memory.total:.1f} without torch.compile"
    return text


def _limit(spec: RunSpec, found: Plan) -> str:
    if found.limit_s is None:
        return ""
    most = f"; --time {spec.job.time} allows {spec.allocated * found.limit_s / 3600:.2f}"
    if found.wall_s and found.wall_s > found.limit_s:
        minutes = -(-int(found.wall_s * 1.2) // 60)
        return f"{most}: TOO SHORT, try --time {minutes // 60:02d}:{minutes % 60:02d}:00"
    return most
