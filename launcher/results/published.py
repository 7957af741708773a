"""Published rows, and which of several results another one is measured by. Pure, but for reading the packaged file.

A row becomes an Outcome as a run does, with one value where a run has a spread: whatever compares two runs compares
a run with a row, too.
"""

from __future__ import annotations

import csv
import io
import math
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from launcher.base.errors import LauncherError
from launcher.base.files import data_dir
from launcher.config.mfu import peak_of
from launcher.results.measure import spread
from launcher.results.outcome import Outcome

PUBLISHED, TABLE = "PUBLISHED", "TABLE"  # `state` of an Outcome made from a row: of our table, of somebody's
NEAR = 2.0  # factor in the number of GPUs within which tokens/s per GPU are compared without more ado
LONG = 100  # steps: rows of shorter runs come second; one that names no step is not known to be short
_MOST = 10**9  # a count above it is damage, not a cluster
_DEGREES = ("tensor_parallel", "context_parallel", "pipeline_parallel", "dp_replicate")
_COUNTS = ("nodes", "gpus", "local_batch_size", "step", "seq_len", "global_batch_size", *_DEGREES)
_NUMBERS = ("tps", "loss", "grad_norm", "memory_gib", "memory_pct", "tflops", "mfu_pct")
_NEEDED = ("gpu", "nodes", "gpus", "local_batch_size", "tps")
_FLAGS = ("compile", "async_tensor_parallel", "like_for_like", "power_limited")
TORCHTITAN = "torchtitan"  # `framework` of every run, and of a row that names none
LIMITED = "profile.power_limited"  # of a row: its GPUs were given less power than their type may draw
# What changes the work of a step, with what it is called to people.
ALIKE = {
    "recipe.model": "model",
    "recipe.flavor": "size of the model",
    "recipe.seq_len": "sequence length",
    "recipe.local_batch_size": "local batch size",
    "recipe.param_dtype": "precision",
    "recipe.quantize": "quantisation",
    "recipe.compile": "compile",
    "recipe.activation_checkpoint": "activation checkpointing",
    "recipe.tensor_parallel": "tensor parallel degree",
    "recipe.context_parallel": "context parallel degree",
    "recipe.pipeline_parallel": "pipeline parallel degree",
    "recipe.dp_replicate": "replicas of FSDP's shards",
    "recipe.async_tensor_parallel": "async tensor parallel",
    "recipe.like_for_like": "like_for_like",
    "framework": "framework",
}
# Without these nobody can say that two steps are the same work; the rest is passed over where a side does not know it.
_MUST_BE_KNOWN = tuple(ALIKE)[:7]


def published() -> list[Outcome]:
    """The rows of slurm/reference-results.csv, which name their sources."""
    path = data_dir("slurm") / "reference-results.csv"
    return rows_of(path.read_text(encoding="utf-8"), str(path), PUBLISHED)


def rows_of(text: str, where: str, state: str = TABLE) -> list[Outcome]:
    """Every row of a CSV in the form of slurm/reference-results.csv; columns after `source` may be missing.

    What `launcher results --format csv` writes is read, too: by its medians, without the runs that are not complete.

    Raises LauncherError with file, line and column for anything that is not such a row: a formula is not a number.
    """
    try:
        reader = csv.DictReader(io.StringIO(text.removeprefix("\ufeff"), newline=""), strict=True)
        missing = [name for name in _NEEDED if name not in (reader.fieldnames or ())]
        if missing:
            raise LauncherError(
                "table",
                f"{where}: not a table of results: no column {', '.join(missing)}",
                "write it in the form of slurm/reference-results.csv, or as launcher results --format json",
            )
        rows = []
        for row in reader:
            if (row.get("complete") or "").strip().lower() != "false":
                rows.append(_outcome(row, f"{where}:{reader.line_num}", state))
    except csv.Error as error:
        raise LauncherError("table", f"{where}: not a CSV file: {error}") from error
    if not rows:
        raise LauncherError("table", f"{where}: has no complete result")
    return rows


def _outcome(row: Mapping[str, Any], where: str, state: str) -> Outcome:
    """One row; `row` is what csv.DictReader makes of a line, None for a cell that is not there."""
    cells = {name: (value or "").strip() for name, value in row.items() if isinstance(value, (str, type(None)))}
    cells["tps"] = cells.get("median_tps") or cells["tps"]
    numbers = {name: _number(cells.get(name, ""), where, name) for name in (*_COUNTS, *_NUMBERS)}
    for name in _COUNTS:
        value = numbers[name]
        if value is not None and (value != int(value) or value > _MOST):
            raise _refused(where, name, cells[name], "is not a whole number, or too large")
    count = {name: int(numbers[name] or 0) for name in _COUNTS}
    for name in _NEEDED:
        if not cells[name] or not numbers.get(name, 1):
            raise LauncherError("table", f"{where}: column {name} is empty or 0")
    gpu, nodes, gpus, batch = cells["gpu"], count["nodes"], count["gpus"], count["local_batch_size"]
    if gpus % nodes:
        raise LauncherError("table", f"{where}: {gpus} GPUs cannot be divided evenly among {nodes} nodes")
    precision, quantize = _precision(cells.get("precision", ""))
    quantize = cells.get("quantization") or quantize
    flags = {name: _flag(cells.get(name, ""), where, name) for name in _FLAGS}
    settings: dict[str, Any] = {
        "profile.gpu": gpu,
        "profile.gpus_per_node": gpus // nodes,
        "job.nodes": nodes,
        "job.init_from": cells.get("init_from"),
        "recipe.local_batch_size": batch,
        "recipe.model": cells.get("model"),
        "recipe.flavor": cells.get("flavor"),
        "recipe.seq_len": count["seq_len"] or None,
        "recipe.param_dtype": precision,
        "recipe.quantize": quantize,
        "recipe.compile": flags["compile"],
        "recipe.activation_checkpoint": cells.get("activation_checkpoint"),
        "recipe.like_for_like": flags["like_for_like"],
        "framework": cells.get("framework") or TORCHTITAN,
        LIMITED: flags["power_limited"],
    }
    medians = {name: spread([] if value is None else [value]) for name, value in numbers.items()}
    ranks = math.prod(count[name] or 1 for name in _DEGREES if name != "dp_replicate")  # that share a batch
    if settings["recipe.flavor"]:  # a row that says nothing else means FSDP over all ranks, from a random start
        settings |= {f"recipe.{name}": count[name] or 1 for name in _DEGREES}
        settings["recipe.async_tensor_parallel"] = bool(flags["async_tensor_parallel"])
    step = f", step {count['step']}" if count["step"] else ""
    return Outcome(
        run=cells.get("run") or f"{cells.get('source') or 'a row'} ({gpu}, {gpus} GPUs{step})",
        state=state,
        date=cells.get("date", ""),
        gpu=gpu,
        nodes=nodes,
        gpus=gpus,
        local_batch_size=batch,
        global_batch_size=count["global_batch_size"] or batch * max(1, gpus // ranks),
        seq_len=count["seq_len"],
        precision=f"{precision} + {quantize}" if precision and quantize != "none" else precision,
        compile=bool(flags["compile"]),
        steps=count["step"],
        step=count["step"] or None,
        loss=numbers["loss"],
        grad_norm=numbers["grad_norm"],
        memory_pct=numbers["memory_pct"],
        tps=medians["tps"],
        tflops=medians["tflops"],
        memory_gib=medians["memory_gib"],
        mfu_pct=numbers["mfu_pct"],
        peak_tflops=peak_of(numbers["tflops"], numbers["mfu_pct"]),
        versions={name: cells[name] for name in ("driver", "cuda") if cells.get(name)},
        settings={key: value for key, value in settings.items() if value not in ("", None)},
        source=cells.get("source", ""),
    )


def _precision(text: str) -> tuple[str, str]:
    """`bfloat16 + float8` as the recipe says it; ("", "") where it is not said."""
    dtype, plus, quantized = (part.strip() for part in text.partition("+"))
    return dtype, (quantized if plus else "none") if dtype else ""


def _flag(text: str, where: str, column: str) -> bool | None:
    """None for an empty cell."""
    if text.lower() not in ("", "true", "false"):
        raise _refused(where, column, text, "is neither true nor false")
    return text.lower() == "true" if text else None


def _number(text: str, where: str, column: str) -> float | None:
    """None for an empty cell; thousands' commas are read. Raises LauncherError for NaN, infinity and anything else."""
    if not text:
        return None
    try:
        value = float(text.replace(",", "").replace("_", "?"))  # Python would read 1_000
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value < 0:
        raise _refused(where, column, text, "is not a number that a result can have")
    return value


def _refused(where: str, column: str, text: str, why: str) -> LauncherError:
    return LauncherError("table", f"{where}: column {column}: {text[:40]!r} {why}")


def is_row(outcome: Outcome) -> bool:
    """Whether it was one value in a table, and not a run."""
    return outcome.state in (PUBLISHED, TABLE)


@cache
def _sources() -> dict[str, dict[str, str]]:
    return tomllib.loads((data_dir("slurm") / "reference-sources.toml").read_text(encoding="utf-8"))


def publisher(outcome: Outcome) -> dict[str, str]:
    """Who published a row: `name`, and `link` to where it lies; "" of everything else."""
    return {"name": outcome.source, "link": ""} | _sources().get(outcome.source, {})


def called(outcome: Outcome) -> str:
    """A result's name to people: of a published row `published (Crusoe, 9 x GB200)`, else the run's."""
    if outcome.state != PUBLISHED:
        return outcome.run
    return f"published ({publisher(outcome)['name']}, {outcome.nodes} x {outcome.gpu})"


def same_gpu(a: str, b: str) -> bool:
    """GB200 is not B200, and H200 is not H100: a longer name that contains the other is another GPU."""
    return a.strip().casefold() == b.strip().casefold()


def described(outcome: Outcome) -> dict[str, Any]:
    """Its settings; where its fields speak of the same keys they count, as they are what is shown."""
    precision, quantize = _precision(outcome.precision)
    of_fields = {
        "profile.gpu": outcome.gpu,
        "job.nodes": outcome.nodes,
        "recipe.local_batch_size": outcome.local_batch_size,
        "recipe.seq_len": outcome.seq_len,
        "recipe.param_dtype": precision,
        "recipe.quantize": quantize,
    }
    if not is_row(outcome):  # a row that does not say has False there, too
        of_fields["recipe.compile"] = outcome.compile
    known = {key: value for key, value in of_fields.items() if value not in ("", 0, None) or value is False}
    return {"framework": TORCHTITAN} | dict(outcome.settings) | known


def unlike(a: Outcome, b: Outcome) -> list[str]:
    """Why the work of a step differs between the two, one clause per setting; empty for like with like."""
    found, other = described(a), described(b)
    reasons = [
        f"{word} {say(found[key])}, not {say(other[key])}"
        for key, word in ALIKE.items()
        if key in found and key in other and found[key] != other[key]
    ]
    for side, known in ((a, found), (b, other)):
        if lost := [ALIKE[key] for key in _MUST_BE_KNOWN if key not in known]:
            reasons.append(f"{called(side)} does not say its {', '.join(lost)}")
    parts = [_accumulation(side) for side in (a, b)]
    if None not in parts and parts[0] != parts[1]:
        reasons.append(f"{say(parts[0])} batches a step and GPU, not {say(parts[1])}")
    return reasons


def _accumulation(outcome: Outcome) -> float | None:
    """Sequences per step and GPU in units of the local batch size: 1 without gradient accumulation."""
    at_once = outcome.gpus * outcome.local_batch_size
    return outcome.global_batch_size / at_once if at_once > 0 and outcome.global_batch_size > 0 else None


def say(value: object) -> str:
    """A setting's value for people: `true`, `5`, `"a, b"`."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, float):
        return f"{value:.12g}"
    return str(value) or '""'


@dataclass(frozen=True, slots=True)
class Match:
    """What a result is measured by, or why there is nothing."""

    row: Outcome | None
    why_not: str = ""
    factor: float = 1.0  # the larger number of GPUs through the smaller


def best_match(outcome: Outcome, rows: Sequence[Outcome]) -> Match:
    """The row of the same GPU and settings; of several a long run's, then the nearest number of GPUs, where rows
    within a factor of two that were measured with the same driver come before others; the same number comes before all.
    Rows of GPUs with limited power come last.

    Near is meant as a ratio: 36 GPUs are nearer to 68 than to 12. Of two as near, the larger; then the first.
    """
    row = nearest(outcome, rows)
    if row is None:
        known = ", ".join(sorted({row.gpu for row in rows})) or "nothing"
        return Match(None, f"there is no result for {outcome.gpu} to compare with, only for {known}")
    if reasons := unlike(outcome, row):
        return Match(None, f"not like with like, against {called(row)}: {'; '.join(reasons)}")
    return Match(row, factor=factor_between(outcome, row))


def nearest(outcome: Outcome, rows: Sequence[Outcome]) -> Outcome | None:
    """The row to show beside it: of the same GPU, with the fewest settings that differ; None where no GPU is the
    same.
    """
    same = [row for row in rows if same_gpu(outcome.gpu, row.gpu)]
    return min(same, key=lambda row: _distance(outcome, row), default=None)


def beside(outcomes: Iterable[Outcome], rows: Iterable[Outcome]) -> list[Outcome]:
    """The rows that say something of one of the results: of its GPU, model, sequence length and framework."""
    keys = ("recipe.model", "recipe.flavor", "recipe.seq_len", "framework")
    kinds = [
        (one.gpu, [(key, known[key]) for key in keys if key in known]) for one in outcomes for known in [described(one)]
    ]
    found = []
    for row in rows:
        own = described(row)
        if any(same_gpu(gpu, row.gpu) and all(own.get(k, v) == v for k, v in known) for gpu, known in kinds):
            found.append(row)
    return found


def _distance(outcome: Outcome, row: Outcome) -> tuple[int, bool, bool, bool, bool, float, int, bool]:
    factor = factor_between(outcome, row)
    # Rounded, so that 8 GPUs are exactly as far from 4 as from 16.
    return (
        len(unlike(outcome, row)),
        LIMITED in row.settings,
        (row.step or LONG) < LONG <= outcome.steps,
        factor > NEAR,
        1 < factor <= NEAR and _other_driver(outcome, row),
        round(math.log(factor), 9),
        -row.gpus,
        _other_driver(outcome, row),
    )


def _other_driver(a: Outcome, b: Outcome) -> bool:
    """H100s were published with two drivers, 15% apart: more than their numbers of GPUs account for."""
    both = a.versions.get("driver"), b.versions.get("driver")
    return None not in both and not same_version(str(both[0]), str(both[1]))


def same_version(a: str, b: str) -> bool:
    """580 and 580.95.05 are the same as far as 580 goes."""
    short, long = sorted((a, b), key=len)
    return long == short or (short.replace(".", "").isdigit() and long.startswith(f"{short}."))


def factor_between(a: Outcome, b: Outcome) -> float:
    few, many = sorted((a.gpus, b.gpus))
    return many / few if few > 0 else math.inf
