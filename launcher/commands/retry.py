"""`submit --retry-bad-nodes N`: a run that stopped at a node's check starts again on other nodes."""

from __future__ import annotations

from collections.abc import Callable

from launcher.base.errors import LauncherError
from launcher.base.output import echo, print_error, print_json
from launcher.commands.runs import exit_for, watch_to_end
from launcher.runs.directory import Run

NAME_CHARS = 56  # of the first run's name: "-retry9" fits behind it


def follow(run: Run, retries: int, again: Callable[[str, str, set[str]], Run], as_json: bool) -> None:
    """Follows the run; where nodes failed their check, leaves them out and submits it again, at most `retries` times.

    `again(name, origin, hosts)` checks and submits the same run under another name, without these nodes. Exits with the
    last run's status.
    """
    first = run.name[:NAME_CHARS]
    for number in range(1, retries + 2):
        last = number > retries
        state, left_out = watch_to_end(run, as_json, "" if last else "; it is not retried then")
        if not state.unfit or last:
            break
        if not left_out:
            _say(run, "not retried: there is no node to leave out", as_json)
            break
        name = f"{first}-retry{number}"
        hosts = {node.host for node in left_out}
        _say(run, f"retry {number} of {retries} without {', '.join(sorted(hosts))}: {name}", as_json)
        try:
            run = again(name, f"retry {number} of {first}", hosts)
        except LauncherError as error:
            what = f"not retried: {error.what}"
            if as_json:
                _say(run, what, as_json)
            print_error(LauncherError(error.code, f"{run.name}: {what}", error.fix, original=error.original))
            break
    exit_for(state)


def _say(run: Run, text: str, as_json: bool) -> None:
    if as_json:
        print_json({"run": run.name, "retry": text}, indent=None)
    else:
        echo(f"{run.name}: {text}", err=True)
