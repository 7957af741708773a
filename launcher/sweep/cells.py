"""The cells of a sweep: which there are, under which names, how their runs stand, and whether the next can start.

A cell's run is named SWEEP-RECIPE-NODESn-bBATCH, and -2, -3 ... behind it where the cell was tried again. There is no
other record of a sweep: the same command again finds its runs by these names.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

from launcher.base.errors import ExitStatus, LauncherError
from launcher.base.secret import looks_secret
from launcher.config import resolve
from launcher.config.layers import Layer, absolute, merge, read_layer
from launcher.config.options import RunOptions
from launcher.config.spec import NAME, RunSpec
from launcher.results.outcome import Outcome
from launcher.results.read import outcome_of
from launcher.runs import control
from launcher.runs.attempts import attempts_of
from launcher.runs.directory import Run
from launcher.scheduler.state import JobState

MAX_CELLS = 100  # a slip of the keyboard otherwise fills Slurm's queue; docs/sweep.md says so
MAX_ATTEMPTS = 99
LONGEST_NAME = 60  # of the 63 characters of a run's name: "-99" still fits behind it
# The lists of a sweep. The last changes fastest, so that a scaling curve is complete early.
AXES = {"job.recipe": "--recipe", "recipe.local_batch_size": "--batch-size", "job.nodes": "--nodes"}
# Where and for how long a run waits and goes on, not what it measures: another choice makes no other cell.
WHERE = {"job.name", "job.runs_dir", "job.slurm_bin", "job.time", "job.account", "job.qos", "job.reservation"}
WHERE |= {"job.image_dir", "job.nodelist", "job.exclude", "job.segment", "job.check"}
WHERE |= {"job.spares", "job.max_restarts", "job.continues"}
# At their defaults these leave a sweep the name that it had before there were any: what came after version 0.1.
NEWER = {"job.constraint", "job.sbatch", "recipe.async_tensor_parallel", "recipe.like_for_like"}
NEWER |= {"recipe.checkpoint_keep", "job.checkpoint_dir"}


@dataclass(frozen=True)
class Cell:
    """A cell's settings under its own name, its runs so far in order, and how the last of them stands."""

    spec: RunSpec
    runs: tuple[Run, ...] = ()
    state: JobState | None = None

    @property
    def is_going(self) -> bool:
        return self.state is not None and self.state.active

    @property
    def is_cut_off(self) -> bool:
        """The launcher died before Slurm had its last run, which can be made sure of."""
        run = self.runs[-1] if self.runs else None
        if run is None or self.state is None or self.state.known or run.is_local:
            return False
        return not run.job and not run.claimed_by and not run.is_copy

    @cached_property
    def outcome(self) -> Outcome | None:
        """The result of its last run, from its logs."""
        return outcome_of(self.runs[-1], self.state, with_data_share=False) if self.runs and self.state else None

    def has_next(self, retry: bool) -> bool:
        """Whether it is to be submitted: never tried, cut off before Slurm had it, or ended without a whole result and
        to be tried again.
        """
        if self.state is None or self.is_cut_off:
            return True
        return retry and not self.state.active and not (self.outcome and self.outcome.complete)

    @property
    def next_spec(self) -> RunSpec:
        """Of a run that was cut off before Slurm had it, under another name: its own directory may still be used."""
        if not self.runs:
            return self.spec
        number = len(self.runs) + self.is_cut_off
        return resolve.renamed(self.spec, attempt_name(self.spec.job.name, number), "launcher sweep, again")

    @property
    def resumes(self) -> Run | None:
        """The run whose next attempt would be submitted, rather than a new run."""
        return None if self.is_cut_off or not self.runs else self.runs[-1]

    def node_hours(self, now_s: float) -> float | None:
        """Of all its runs, from their scripts' own times; None where one began and nothing says when it ended."""
        total = 0.0
        for attempt in (one for run in self.runs for one in attempts_of(run)):
            if attempt.began_at is None:  # never began
                continue
            if attempt.ended_at is None and not (self.is_going and attempt.path == str(self.runs[-1].path)):
                return None
            total += self.spec.allocated * max((attempt.ended_at or now_s) - attempt.began_at, 0) / 3600
        return total


def specs_of(options: RunOptions) -> tuple[str, list[RunSpec]]:
    """The sweep's name and every cell under its own. Raises LauncherError for the first that cannot be."""
    values, origin = dict(options.values), dict(options.origin)
    name = str(values.pop("job.name", ""))
    lists = [values.pop(key, ()) or (None,) for key in AXES]
    count = math.prod(map(len, lists))
    if count > MAX_CELLS:
        raise LauncherError(
            "sweep-too-large",
            f"{count:,} combinations: a sweep has at most {MAX_CELLS}",
            "shorter lists, or several sweeps",
        )
    specs: list[RunSpec] = []
    for combination in product(*lists):
        pairs = zip(AXES, combination, strict=True)
        chosen = {key: absolute(key, value, Path.cwd()) for key, value in pairs if value is not None}
        layer = Layer(
            values | {"job.name": "sweep"} | chosen,
            origin | dict.fromkeys(("job.name", *chosen), "launcher sweep"),
            secret_env=options.secret_env,
        )
        try:
            spec = resolve.resolve(layer, options.config, options.run_file, os.environ)
        except LauncherError as error:
            raise refused(" ".join(f"{AXES[key]} {value}" for key, value in chosen.items()), error) from error
        if options.run_file is None:  # asked of Slurm or the machine once, not for each cell
            values["job.gpu"], origin["job.gpu"] = spec.job.gpu, spec.origin["job.gpu"]
        specs.append(spec)
    name = name or _default_name(specs)
    named: dict[str, RunSpec] = {}
    for spec in specs:
        cell = cell_name(name, spec)
        if cell in named:
            raise LauncherError(
                "cells-collide",
                f"two cells would be named {cell}: {named[cell].job.recipe} and {spec.job.recipe}",
                "give the recipes' files different names",
            )
        named[cell] = resolve.renamed(spec, cell, f"launcher sweep {name}")
    return name, list(named.values())


def cell_name(sweep: str, spec: RunSpec) -> str:
    """The run's name. Raises LauncherError where it would be too long, or the sweep's name is none."""
    if not NAME.fullmatch(sweep):
        raise LauncherError(
            "value",
            f"--name {sweep[:80]!r}: letters, digits, '.', '_' and '-', beginning with a letter or digit",
            "--name scaling",
        )
    recipe = re.sub(r"[^A-Za-z0-9._-]", "-", Path(spec.job.recipe).stem)
    name = f"{sweep}-{recipe}-{spec.job.nodes}n-b{spec.recipe.local_batch_size}"
    if len(name) > LONGEST_NAME:
        raise LauncherError(
            "value",
            f"{name[:100]}: a name of {len(name)} characters; a cell's has at most {LONGEST_NAME}",
            f"a --name that is {len(name) - LONGEST_NAME} characters shorter, or a shorter file name of the recipe",
        )
    return name


def attempt_name(cell: str, attempt: int) -> str:
    return cell if attempt == 1 else f"{cell}-{attempt}"


def _default_name(specs: Sequence[RunSpec]) -> str:
    """The same for the same matrix and settings, whatever the order of the lists."""
    text = json.dumps(sorted(json.dumps(_comparable(spec), sort_keys=True) for spec in specs))
    return f"sweep-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _comparable(spec: RunSpec) -> dict[str, Any]:
    """What decides a cell's figures: every setting but where and how long it runs."""
    values, usual = spec.values(), RunSpec().values()
    values = {key: v for key, v in values.items() if key not in WHERE and not (key in NEWER and v == usual[key])}
    return {key: list(v) if isinstance(v, tuple) else v for key, v in values.items()}


def standings(specs: Sequence[RunSpec]) -> list[Cell]:
    """Every cell with its runs. Raises LauncherError where one has other settings, or Slurm is needed and silent."""
    tried = [_runs_of(spec) for spec in specs]
    last = [found[-1] for found in tried if found]
    states = control.states(last)
    for run in last:
        if not states[run.name].known:
            # Raises where Slurm is silent: nothing is submitted on a guess.
            states[run.name] = control.state(run)
    return [
        Cell(spec, found, states[found[-1].name]) if found else Cell(spec)
        for spec, found in zip(specs, tried, strict=True)
    ]


def _runs_of(spec: RunSpec) -> tuple[Run, ...]:
    """A cell's runs in order. Raises LauncherError for too many, and where the last is of other settings."""
    found: list[Run] = []
    while os.path.lexists(path := Path(spec.job.runs_dir) / attempt_name(spec.job.name, len(found) + 1)):
        found.append(Run(path))
        if len(found) == MAX_ATTEMPTS:
            raise LauncherError("run-exists", f"{spec.job.name} was tried {len(found)} times", "another --name")
    if not found:
        return ()
    file = found[-1].path / "run.toml"
    old, new = _comparable(merge([read_layer(file, f"file {file}")])), _comparable(spec)
    changed = [
        f"{key} is another secret now"
        if looks_secret(key, old.get(key)) or looks_secret(key, new.get(key))
        else f"{key} was {old.get(key, 'not set')!r}, is {new.get(key, 'not set')!r} now"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]
    if changed:
        raise LauncherError(
            "run-exists",
            f"{found[-1].name} exists with other settings: {'; '.join(changed[:4])}",
            "another --name, or the earlier settings",
            status=ExitStatus.EXISTS,
            original="\n".join(changed[4:]),
        )
    return tuple(found)


def refused(cell: str, error: LauncherError) -> LauncherError:
    """The error of a cell that cannot run."""
    what = f"{cell or 'it'} cannot run, so nothing was submitted: {error.what}"
    return LauncherError(error.code, what, error.fix, status=error.status, original=error.original)
