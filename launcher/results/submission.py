"""A file for the benchmarks/ folder of torchtitan's repository, as its README asks for: who, model, hardware, results
with the whole configuration, versions and dates, notes. Pure functions.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

from launcher.base.errors import ExitStatus, LauncherError, quoted
from launcher.base.mfu import mfu_text
from launcher.base.output import counted
from launcher.config.spec import SAMPLE
from launcher.results.formats import in_order
from launcher.results.outcome import Outcome
from launcher.results.rows import escape, median_mfu_pct, mfu_at_other_peaks

# Where the submitter keeps things, and who pays, is nobody else's business.
_PRIVATE = re.compile(
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
        raise LauncherError(
            "entity-not-named",
            "a submission says whose it is: your name, team or company",
            "launcher results RUN --format torchtitan --entity my-team",
        )
    files: dict[str, list[Outcome]] = {}
    for outcome in in_order(outcomes):
        if not outcome.complete:
            raise LauncherError(
                "result-incomplete",
                f"{outcome.run} is not a result to be submitted: {outcome.lacks}",
                quoted("launcher", "results", outcome.run),
                status=ExitStatus.NO_DATA,
            )
        files.setdefault(file_name(outcome, entity), []).append(outcome)
    return {name: _document(group, entity) for name, group in files.items()}


def _document(outcomes: Sequence[Outcome], entity: str) -> str:
    first = outcomes[0]
    model = f"{first.settings.get('recipe.model', '?')} {first.settings.get('recipe.flavor', '')}".strip()
    dates = ", ".join(sorted({outcome.date[:10] for outcome in outcomes if outcome.date}))
    lines = [
        f"This was run by {escape(entity)} with titan-launcher{f' on {dates}' if dates else ''}.",
        *("", "### Models", "", escape(model)),
        *("", "### Hardware", ""),
        f"- {first.gpus} {escape(first.gpu)}, {first.gpus // first.nodes} in each of {counted(first.nodes, 'node')}",
        f"- NVIDIA driver: {escape(first.versions.get('driver') or 'not recorded')}",
        "- Interconnect: (please add it; the run directory does not know it)",
        *("", "### Results", ""),
        "Per GPU, over the logged steps after warm-up of all nodes: median (quartiles). Step 1 and the steps up to the",
        "first regular log line are warm-up.",
        "",
        "| Run | Steps | Batch | Sequence | Precision | Compile | TPS/GPU | TFLOP/s | MFU | Memory (GiB), most | "
        "Loss at the end |",
        "| --- | ---: | ---: | ---: | --- | --- | ---: | ---: | --- | ---: | ---: |",
        *(_result(outcome) for outcome in outcomes),
        *("", "### Configuration", ""),
        "Settings of titan-launcher, which names torchtitan's own; those after `titan.` are torchtitan's unchanged.",
    ]
    for outcome in outcomes:
        lines += ["", f"{escape(outcome.run)}:", "", "```toml", *_settings(outcome.settings), "```"]
    lines += [
        "",
        "### Versions and Dates",
        "",
        "| Run | Date (UTC) | What | Version |",
        "| --- | --- | --- | --- |",
    ]
    for outcome in outcomes:
        for name, version in outcome.versions.items():
            lines.append(f"| {escape(outcome.run)} | {outcome.date} | {name} | {escape(version)} |")
    notes = [f"- {escape(outcome.run)}: {escape(text)}" for outcome in outcomes for text in _notes(outcome)]
    return "\n".join([*lines, *(["", "### Notes", "", *notes] if notes else [])]) + "\n"


def _result(outcome: Outcome) -> str:
    tps, tflops, memory = outcome.tps, outcome.tflops, outcome.memory_gib
    assert tps is not None
    cells = (
        escape(outcome.run),
        str(outcome.steps),
        str(outcome.local_batch_size),
        str(outcome.seq_len),
        escape(outcome.precision),
        "on" if outcome.compile else "off",
        f"{tps.median:,.0f} ({tps.q1:,.0f} to {tps.q3:,.0f})",
        f"{tflops.median:,.2f}" if tflops else "",
        "; ".join(
            [
                mfu_text(median_mfu_pct(outcome), outcome.peak_tflops),
                *(mfu_text(mfu, peak) for peak, mfu in mfu_at_other_peaks(outcome).items()),
            ]
        ),
        f"{memory.high:.2f}" if memory else "",
        "" if outcome.loss is None else f"{outcome.loss:.5f}",
    )
    return f"| {' | '.join(cells)} |"


def _settings(settings: Mapping[str, object]) -> list[str]:
    shown = {key: value for key, value in settings.items() if not _PRIVATE.fullmatch(key)}
    return [
        f"{key} = {json.dumps(value, ensure_ascii=True)}".replace("`", "\\u0060")
        for key, value in sorted(shown.items())
    ]


def _notes(outcome: Outcome) -> list[str]:
    notes = list(outcome.notes)
    if outcome.settings.get("job.data") == SAMPLE:
        notes.append("the data was the launcher's own sample of text, not the data set that is named")
    if outcome.data_share is not None:
        notes.append(f"{100 * outcome.data_share:.1f}% of a step is waiting for data")
    if (slowest := outcome.slowest) and slowest.tps is not None:
        notes.append(f"the slowest node's median is {slowest.tps:,.0f} tokens/s per GPU")
    return notes
