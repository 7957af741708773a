"""The cells of a sweep as they are on disk and in Slurm, and whether those to come can run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.base.errors import ExitStatus, LauncherError
from launcher.base.finding import ERROR, OK
from launcher.base.output import warn
from launcher.config import resolve
from launcher.config.layers import Layer, absolute, merge, read_layer
from launcher.config.options import RunOptions
from launcher.config.spec import RunSpec
from launcher.preflight.cluster import look
from launcher.preflight.here import look_here
from launcher.preflight.text import refusal, sentence
from launcher.results.outcome import Outcome
from launcher.results.read import outcome_of
from launcher.runs import control
from launcher.runs.directory import Run
from launcher.scheduler.state import JobState
from launcher.sweep import table as matrix


@dataclass(frozen=True)
class Cell:
    """A cell's settings under its own name, its runs so far in order, and how the last of them stands."""

    spec: RunSpec
    runs: tuple[Run, ...]
    state: JobState | None

    @property
    def is_cut_off(self) -> bool:
        """The launcher died before Slurm had its last run, which can be made sure of."""
        run = self.runs[-1] if self.runs else None
        if run is None or self.state is None or self.state.known or run.is_local:
            return False
        return not run.job and not run.claimed_by and not run.is_copy

    @property
    def outcome(self) -> Outcome | None:
        """The result of its last run, read from its logs at each call."""
        return outcome_of(self.runs[-1], self.state, with_data_share=False) if self.runs and self.state else None

    def has_next(self, retry: bool) -> bool:
        """Whether it is to be submitted, as `sweep.has_next` has it."""
        complete = bool(retry and (found := self.outcome) and found.complete)
        return matrix.has_next(self.state, self.is_cut_off, retry, complete)

    @property
    def next_spec(self) -> RunSpec:
        if not self.runs:
            return self.spec
        return resolve.renamed(
            self.spec, matrix.attempt_name(self.spec.job.name, len(self.runs) + 1), "launcher sweep, again"
        )


def specs_of(options: RunOptions) -> tuple[str, list[RunSpec]]:
    """The sweep's name and every cell under its own. Raises LauncherError for those that cannot be, together."""
    values, origin = dict(options.values), dict(options.origin)
    name = str(values.pop("job.name", ""))
    nodes, recipes, batches = (values.pop(key, ()) for key in matrix.AXES)
    recipes = [absolute("job.recipe", recipe, Path.cwd()) for recipe in recipes]
    shapes = matrix.matrix(recipes, nodes, batches)
    problems: dict[str, LauncherError] = {}
    specs: list[RunSpec] = []
    for shape in shapes:
        mine = dict(zip(matrix.AXES, (shape.nodes, shape.recipe, shape.batch), strict=True))
        chosen = {key: value for key, value in mine.items() if value is not None}
        layer = Layer(
            values | {"job.name": "sweep"} | chosen,
            origin | dict.fromkeys(("job.name", *chosen), "launcher sweep"),
            secret_env=options.secret_env,
        )
        try:
            spec = resolve.resolve(layer, options.config, options.run_file, os.environ)
        except LauncherError as error:
            problems[str(shape)] = error
            continue
        if options.run_file is None:  # asked of Slurm or the machine once, not for each cell
            values["job.gpu"], origin["job.gpu"] = spec.job.gpu, spec.origin["job.gpu"]
        specs.append(spec)
    if problems:
        raise matrix.refused_together(problems, len(shapes))
    name = name or matrix.default_name(specs)
    named: dict[str, RunSpec] = {}
    for spec in specs:
        cell = matrix.cell_name(name, spec)
        if cell in named:
            raise LauncherError(
                f"two cells would be named {cell}: {named[cell].job.recipe} and {spec.job.recipe}",
                "give the recipes' files different names",
            )
        named[cell] = resolve.renamed(spec, cell, f"launcher sweep {name}")
    return name, list(named.values())


def standings(specs: Sequence[RunSpec]) -> list[Cell]:
    """Every cell with its runs. Raises LauncherError where one has other settings, or Slurm is needed and silent."""
    found: dict[str, list[Run]] = {}
    for spec in specs:
        mine = found[spec.job.name] = []
        for attempt in range(1, matrix.MAX_ATTEMPTS + 1):
            path = Path(spec.job.runs_dir) / matrix.attempt_name(spec.job.name, attempt)
            if not os.path.lexists(path):
                break
            mine.append(Run(path))
        else:
            raise LauncherError(f"{spec.job.name} was tried {len(mine)} times", "another --name")
        if not mine:
            continue
        earlier = merge([read_layer(mine[-1].path / "run.toml", f"file {mine[-1].path}/run.toml")])
        if changed := matrix.differences(earlier, spec):
            raise LauncherError(
                f"{mine[-1].name} exists with other settings: {'; '.join(changed[:4])}",
                "another --name, or the settings of before",
                status=ExitStatus.EXISTS,
                original="\n".join(changed[4:]),
            )
    last = [mine[-1] for mine in found.values() if mine]
    states = control.states(last)
    for run in last:
        if not states[run.name].known:
            # Raises where Slurm is silent: nothing is submitted on a guess.
            states[run.name] = control.state(run)
    return [
        Cell(spec, tuple(mine), states[mine[-1].name] if mine else None)
        for spec, mine in zip(specs, found.values(), strict=True)
    ]


def ready_to_submit(wanted: Sequence[Cell], force: bool, dry_run: bool, cells: int) -> list[tuple[Cell, RunSpec]]:
    """What is to be submitted, each as the cluster can place it. Raises one LauncherError for all that cannot run."""
    ready: list[tuple[Cell, RunSpec]] = []
    problems: dict[str, LauncherError] = {}
    notes: dict[str, None] = {}
    for cell in wanted:
        spec = cell.next_spec
        try:
            spec, checks = look_here(spec)
            if not dry_run:  # Slurm is asked once, for all cells
                spec, of_cluster = look(spec)
                checks += of_cluster
        except LauncherError as error:
            problems[spec.job.name] = error
            continue
        refused = refusal(checks, force)
        if refused:
            problems[spec.job.name] = refused
        said = [check for check in checks if check.status != OK and not (refused and check.status == ERROR)]
        notes |= {sentence(check): None for check in said}
        ready.append((cell, spec))
    if problems:
        raise matrix.refused_together(problems, cells)
    for note in notes:
        warn(note)
    return ready
