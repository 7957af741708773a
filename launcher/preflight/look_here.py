"""What a run needs of the files on this machine. Asks Slurm nothing: `submit --dry-run` imports no more than this."""

from __future__ import annotations

from launcher import resolve
from launcher.errors import LauncherError
from launcher.preflight.check import ERROR, OK, WARNING, Check
from launcher.spec import RunSpec


def look_here(spec: RunSpec) -> tuple[RunSpec, list[Check]]:
    """What `submit` looks at without Slurm, as checks: image, weights, data, tokenizer."""
    from launcher.stage import view

    found: list[Check] = []
    of_image: list[Check] = []
    for name, check in (("image", resolve.check_image), ("weights", resolve.check_weights)):
        try:
            of_image += check(spec) or []
        except LauncherError as error:
            found.append(_stopped(name, error))
        else:
            if name == "image" and spec.job.image:
                found.append(Check(name, OK, spec.job.image))
    notes = resolve.warnings(spec)
    try:
        spec, of_the_data = view.plan(spec)
    except LauncherError as error:
        found.append(_stopped("data", error))
    else:
        notes += of_the_data
        if not of_the_data:
            found.append(Check("data", OK, view.describe(spec)))
    return spec, [*found, *of_image, *(Check("files", WARNING, note) for note in notes)]


def _stopped(name: str, error: LauncherError) -> Check:
    return Check(name, ERROR, error.what, error.original, error.fix, certain=True, error=error)
