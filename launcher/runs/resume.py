"""Whether a run that has ended can go on, and from where."""

from __future__ import annotations

import dataclasses

from launcher.base.errors import ExitStatus, LauncherError, quoted
from launcher.config.spec import RunSpec
from launcher.runs import control
from launcher.runs import directory as runs
from launcher.runs.again import checkpoint_step
from launcher.runs.directory import Run
from launcher.scheduler.state import JobState
from launcher.titan import checkpoints

# Of the recipe, what may differ between two attempts: with another model, batch or degree it would be another run.
MAY_CHANGE = {"steps", "log_freq", "tensorboard", "checkpoint_interval", "checkpoint_keep"}


def check_resumable(run: Run, asked: RunSpec) -> int:
    """The step after which it goes on; 0: from the beginning. Raises LauncherError where it cannot go on as `asked`."""
    anew = quoted("launcher", "submit", run.path / "run.toml", "--name", "NAME")
    if run.is_copy:
        what = f"{run.path} is a copy, or was moved: its job would write to {run.made_at}"
        raise LauncherError("run-copied", what, anew)
    state, node = check_ended(run), run.asked
    now = {"recipe": dataclasses.asdict(asked.recipe), "titan": dict(asked.titan)}
    now |= {"job": {"nodes": asked.job.nodes}, "profile": {"gpus_per_node": asked.profile.gpus_per_node}}
    for table, settings in now.items():
        for key, value in settings.items():
            if key not in MAY_CHANGE and node[table].get(key, value) != value:
                what = f"{table}.{key} was {node[table][key]!r}, is {value!r} now: that is another run"
                raise LauncherError("resume-changed", what, anew)
    if state.name == "COMPLETED" and asked.recipe.steps <= run.steps:
        more = quoted("launcher", "resume", run.reference, "--steps", 2 * run.steps)
        raise LauncherError("resume-complete", f"{run.name} has done all of its {run.steps} steps", more)
    folder = checkpoints.folder_of(node)
    if wrong := checkpoints.foreign(checkpoints.record_of(folder), node):
        raise LauncherError("resume-changed", f"the checkpoints in {folder} are of {'; '.join(wrong)}", anew)
    return checkpoint_step(run.path, node)


def check_ended(run: Run) -> JobState:
    """How it ended. Raises LauncherError where it goes on, or nobody knows: then another job would train it twice."""
    state = control.state(run)
    if state.active:
        fix = quoted("launcher", "watch", run.reference)
        raise LauncherError("run-active", f"{run.name} has not ended: it is {state.name}", fix)
    if not (state.known or state.gone):
        what = f"nobody knows whether {run.name} has ended: {state.reason}"
        raise LauncherError("run-active", what, "scontrol ping", status=ExitStatus.JOB_UNKNOWN)
    if (run.intent or {}).get("in_doubt") and not (run.job or run.claimed_by) and runs.age_s(run) < control.DOUBT_S:
        what = f"Slurm may still have the job of {run.name}: it did not answer when it was submitted"
        raise LauncherError("in-doubt", what, "wait for an hour", status=ExitStatus.CLUSTER)
    return state
