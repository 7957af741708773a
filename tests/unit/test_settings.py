"""Settings of torchtitan's that a run names, against the lists of its releases."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from launcher.base.errors import ExitStatus
from launcher.base.finding import ERROR, WARNING
from launcher.base.secret import masked
from launcher.config.layers import Layer, merge
from launcher.config.spec import OWNED, PlacedRun, RunSpec, node_config
from launcher.preflight.settings import releases, unknown_settings
from launcher.titan import registry_era, toml_era
from launcher.titan.command import ERAS, common_settings
from tests.conftest import Launch, say_it_trains

NEWEST = tuple(newest for _, _, newest, _ in ERAS)


def with_settings(*keys: str, **given: str) -> RunSpec:
    """Of each the value 1, which most take, or the one that is given."""
    values = {f"titan.{key}": "1" for key in keys} | {f"titan.{key}": value for key, value in given.items()}
    return merge([Layer(values, dict.fromkeys(values, "option --set"))])


def test_the_lists_have_every_setting_that_the_launcher_writes() -> None:
    assert tuple(releases()) == NEWEST
    settings: dict[ModuleType, Callable[[Any, Any], dict[str, Any]]] = {
        toml_era: toml_era.settings,
        registry_era: lambda node, common: registry_era.settings(node, common, ""),
    }
    for _, _, version, era in ERAS:
        of_era = settings[era]
        for quantize in ("none", "float8", "mxfp8"):
            run = PlacedRun(**vars(merge([Layer({"recipe.quantize": quantize}, {"recipe.quantize": ""})])))
            written = of_era(node_config(run), common_settings(node_config(run)))
            assert written.keys() <= set(releases()[version])
            typed = {key: str(value) for key, value in written.items() if value is not None}
            assert not unknown_settings(with_settings(**typed), version)
        assert not unknown_settings(with_settings(**{"training.no_enable_cpu_offload": "true"}), version)
    assert set(OWNED) <= {name for names in releases().values() for name in names}


# (setting, torchtitan in the image) -> what to type instead
NEAREST = {
    ("steps", "0.3.0"): "--set recipe.steps=..., or --steps ...",
    ("stepz", "0.2.2"): "--set recipe.steps=..., or --steps ...",
    ("nodes", "0.3.0"): "--nodes ...",
    ("batch_size", "0.3.0"): "--set recipe.local_batch_size=..., or --batch-size ...",
    ("training.stepz", "0.3.0"): "--steps N, which is training.steps",
    ("training.max-nrom", "0.2.2"): "--set training.max_norm=...",
    ("profiling.enable_profiling", "0.3.0"): "--set profiler.enable_profiling=...",
    ("profiler.enable_profiling", "0.2.2"): "--set profiling.enable_profiling=...",
    ("optimizer.lr", "0.3.0"): "--set recipe.lr=...",
    ("model.name", "0.3.0"): "--set SECTION.SETTING=VALUE, as torchtitan writes it",
    ("job.partition", "0.3.0"): "--partition ...",
}


def test_the_nearest_is_named() -> None:
    for (key, version), instead in NEAREST.items():
        (finding,) = unknown_settings(with_settings(key), version)
        assert (finding.status, finding.certain, masked(finding.fix)) == (ERROR, False, instead)
        assert finding.facts == {"key": key, "origin": "option --set", "versions": (version,)}


# setting, value, what it takes, and what to type instead
VALUES = (
    ("training.max_norm", "big", ("a number", "a whole number"), ""),
    ("comm.init_timeout_seconds", "1500s", ("a whole number",), ""),
    ("training.gc_freq", "true", ("a whole number",), ""),
    ("training.dtype", "bf16", ("bfloat16", "float32"), "--set training.dtype=bfloat16"),
    ("training.dtype", "int8", ("bfloat16", "float32"), ""),
    ("checkpoint.async-mode", "asynch", ("disabled", "async", "async_with_pinned_mem"), "--set checkpoint.async-mode="),
    ("debug.seed", "x", ("None", "a whole number"), ""),
    ("training.enable_cpu_offload", "yes", ("true", "false"), ""),
)


def test_a_value_that_torchtitan_does_not_take_is_refused() -> None:
    for key, value, takes, fix in VALUES:
        for version, status in (*((newest, ERROR) for newest in NEWEST), ("9.9.0", WARNING)):
            (found,) = unknown_settings(with_settings(**{key: value}), version)
            assert (found.code, found.status, found.certain) == ("setting-value", status, False)
            if status == ERROR:
                assert found.facts["takes"] == takes and found.fix.startswith(fix) and bool(found.fix) == bool(fix)


def test_of_another_torchtitan_the_lists_only_warn() -> None:
    for version in ("0.3.0.dev20261101", "0.3.0+ours", "9.9.0", "unknown", ""):
        asked = with_settings("training.stepz", "optimizer.lr", **{"profiler.enable_profiling": "true"})
        found = unknown_settings(asked, version)
        assert [(finding.status, finding.facts["key"]) for finding in found] == [(WARNING, "training.stepz")]
        assert unknown_settings(with_settings("steps"), version)[0].status == ERROR


def test_a_module_of_the_users_may_add_settings() -> None:
    mine = with_settings("job.custom_config_module", "mine.alpha")
    assert [finding.status for finding in unknown_settings(mine, "0.2.2")] == [WARNING]


def test_submit_goes_by_the_torchtitan_in_the_image(
    launch: Launch, fake_slurm: Callable[[str, str], Path], image: Path, workplace: Path
) -> None:
    fake_slurm("sbatch", "echo 7")
    sample = ("--data", "sample", "--tokenizer", "sample")
    run = ("submit", "--gpu", "h200", "--image", str(image), "--recipe", "debug", *sample, "--dry-run")
    assert launch(*run, "--set", "profiler.profile_freq=10").returncode == 0
    say_it_trains(image, titan="0.2.2")
    done = launch(*run, "--set", "profiler.profile_freq=10")
    assert done.returncode == ExitStatus.INVALID
    assert "profiler.profile_freq (from option --set): torchtitan 0.2.2 has no such setting" in done.stderr
    assert "try: --set profiling.profile_freq=...; --force" in done.stderr and "[setting-unknown]" in done.stderr
    assert launch(*run, "--set", "profiler.profile_freq=10", "--force").returncode == 0
    say_it_trains(image, titan="0.3.0.dev20261101")
    done = launch(*run, "--set", "profiler.profil_freq=10")
    assert done.returncode == 0 and "torchtitan 0.2.2, 0.3.0 has no such setting" in done.stderr


def test_a_local_run_goes_by_the_torchtitan_that_is_installed(
    launch: Launch, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.2.2")
    run = ("preflight", "--local", "--gpu", "cpu", "--recipe", "debug", "--set", "training.stepz=5", "--json")
    checks = json.loads(launch(*run).stdout)["checks"]
    (found,) = (check for check in checks if check["code"] == "setting-unknown")
    assert (found["status"], found["facts"]["versions"]) == ("error", ["0.2.2"])
