"""A file for the benchmarks/ folder of torchtitan's repository, as its README asks for: who, model, hardware, results
with the whole configuration, versions and dates, notes. Pure functions.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from launcher.base.errors import ExitStatus, LauncherError, quoted
from launcher.base.output import counted
from launcher.base.values import by
from launcher.config.mfu import mfu_text
from launcher.config.spec import SAMPLE
from launcher.results.columns import COLUMNS
from launcher.results.formats import cell_text
from launcher.results.outcome import Outcome
from launcher.results.rows import escape, mfu_at_other_peaks

_SHOWN = ("recipe", "local_batch_size", "median_tps", "median_mfu_pct", "memory_gib", "loss", "data_share")
# Where the submitter keeps things, and who pays, is nobody else's business.
PRIVATE = re.compile(
    r"profile\.(mounts|scratch)|job\.(?!gpu$|recipe$|nodes$|runtime$|segment$).*|env\.(HOME|USER|.*PROXY.*)",
    re.IGNORECASE,
)


def file_name(outcome: Outcome, entity: str) -> str:
    """`[model]_[hardware]_[date]_[entity].md`; an underscore within a part would look like the next one's begin."""
    model = f"{outcome.settings.get('recipe.model', 'llama3')}-{outcome.settings.get('recipe.flavor', '')}"
    parts = (model, f"{outcome.gpus}x{outcome.gpu}", outcome.date[:7].replace("-", ""), entity)
    return "_".join(re.sub(r"[^a-z0-9.+-]+", "-", part.lower()).strip("-.") or "unknown" for part in parts) + ".md"


def submissions(outcomes: Sequence[Outcome], entity: str) -> dict[str, str]:
    """Text by file name; runs of one model on the same hardware in the same month share a file.

    Raises LauncherError for a run that is not a whole result, saying why, and where the entity has no letter.
    """
    if not re.search(r"[A-Za-z0-9]", entity):
        fix = "launcher results RUN --format torchtitan --entity my-team"
        raise LauncherError("entity-not-named", "a submission needs the name of a person, team or company", fix)
    for outcome in outcomes:
        if not outcome.complete:
            raise LauncherError(
                "result-incomplete",
                f"{outcome.run} cannot be submitted: {outcome.lacks}",
                quoted("launcher", "results", outcome.run),
                status=ExitStatus.NO_DATA,
            )
    files = by(lambda outcome: file_name(outcome, entity), outcomes)
    return {name: _document(group, entity) for name, group in files.items()}


def _document(outcomes: Sequence[Outcome], entity: str) -> str:
    first = outcomes[0]
    model = f"{first.settings.get('recipe.model', '?')} {first.settings.get('recipe.flavor', '')}".strip()
    dates = ", ".join(sorted({outcome.date[:10] for outcome in outcomes if outcome.date}))
    shown = [column for column in COLUMNS if column.key in _SHOWN]
    rows = [("Run", "Steps", *(column.title for column in shown), "TFLOP/s")]
    versions = [("Run", "Date (UTC)", "What", "Version")]
    settings, notes = [], []
    for outcome in outcomes:
        run, tflops = escape(outcome.run), outcome.tflops
        cells = (escape(cell_text(column.shown(outcome))) for column in shown)
        rows.append((run, str(outcome.steps), *cells, f"{tflops.median:,.2f}" if tflops else ""))
        versions += [(run, outcome.date, name, escape(version)) for name, version in outcome.versions.items()]
        settings += ["", f"{run}:", "", "```toml", *_settings(outcome), "```"]
        notes += [f"- {run}: {escape(text)}" for text in _notes(outcome)]
    lines = [
        f"This was run by {escape(entity)} with titan-launcher{f' on {dates}' if dates else ''}.",
        *("", "### Models", "", escape(model)),
        *("", "### Hardware", ""),
        f"- {first.gpus} {escape(first.gpu)}, {first.per_node} in each of {counted(first.nodes, 'node')}",
        f"- NVIDIA driver: {escape(first.versions.get('driver') or 'not recorded')}",
        "- Interconnect: (please add it; the run directory does not know it)",
        *("", "### Results", ""),
        "Per GPU, over the logged steps after warm-up of all nodes: median ± half the distance of the quartiles. Step",
        "1 and the steps up to the first regular log line are warm-up. Memory is the most of any node.",
        *("", *_table(rows), "", "### Configuration", ""),
        "Settings of titan-launcher, which names torchtitan's own; those after `titan.` are torchtitan's unchanged.",
        *settings,
        *("", "### Versions and Dates", "", *_table(versions)),
        *(("", "### Notes", "", *notes) if notes else ()),
    ]
    return "\n".join(lines) + "\n"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    head, *rest = (f"| {' | '.join(row)} |" for row in rows)
    return [head, f"|{' --- |' * len(rows[0])}", *rest]


def _settings(outcome: Outcome) -> list[str]:
    shown = sorted((key, value) for key, value in outcome.settings.items() if not PRIVATE.fullmatch(key))
    return [f"{key} = {json.dumps(value)}".replace("`", "\\u0060") for key, value in shown]


def _notes(outcome: Outcome) -> list[str]:
    notes = list(outcome.notes)
    if outcome.settings.get("job.data") == SAMPLE:
        notes.append("the data was the launcher's own sample of text, not the data set that is named")
    notes += [f"by another peak, MFU is {mfu_text(mfu, peak)}" for peak, mfu in mfu_at_other_peaks(outcome).items()]
    if (slowest := outcome.slowest) and slowest.tps is not None:
        notes.append(f"the slowest node's median is {slowest.tps:,.0f} tokens/s per GPU")
    return notes
