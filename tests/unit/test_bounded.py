"""What others wrote is read up to a limit, and numbers that nothing can compute with are no tracebacks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from launcher import titan
from launcher.base.errors import LauncherError
from launcher.base.files import read_bytes, read_json
from launcher.base.values import parse_json, parse_toml, whole
from launcher.cli import launcher as group
from launcher.cli import main
from launcher.config.layers import read_layer
from launcher.image import engine as docker_engine
from launcher.image.check import check
from launcher.image.convert import image_config
from launcher.image.engine import Engine
from launcher.image.squashfs_tools import TAIL, Ran, run
from launcher.stage.manifest import read_manifest
from launcher.titan import data, registry_era
from tests.conftest import limited

HUGE = "9" * 5000


def refused(*words: str, cwd: Path) -> str:
    def program() -> None:
        os.chdir(cwd)
        main()

    done = limited(program, ["launcher", *words], HOME=str(cwd))
    assert "Traceback" not in done.stderr and done.returncode in (0, 3, 4, 7, 9), done.stderr[-2000:]
    return done.stderr + done.stdout


@pytest.fixture
def endless(tmp_path: Path) -> Path:
    """More than the commands below may have of memory; it takes no room on the disk."""
    path = tmp_path / "endless"
    path.touch()
    os.truncate(path, 1 << 30)
    return path


READERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a file": (read_bytes, "more than 4 MiB"),
    "mine.toml": (lambda path: read_layer(path, "file"), "more than 4 MiB"),
    "README.md": (lambda path: data._header(path, ""), "more than 256 MiB|not JSON"),
    "config.json": (lambda path: titan.read_object(path, ""), "more than 256 MiB|not JSON"),
}


@pytest.mark.parametrize("name", READERS)
def test_a_file_that_never_ends(name: str, tmp_path: Path, endless: Path) -> None:
    read, said = READERS[name]
    (tmp_path / name).symlink_to(endless)
    with pytest.raises((OSError, LauncherError, titan.Refused), match=said):
        read(tmp_path / name)
    assert read_json(endless) is None


def test_a_configuration_that_never_ends(tmp_path: Path) -> None:
    assert "more than 4 MiB" in refused("submit", "--config", "/dev/zero", "--dry-run", cwd=tmp_path)


def test_a_pipe_that_the_user_names_is_read_to_its_end() -> None:
    reader, writer = os.pipe()
    os.write(writer, b'[job]\nname = "x"\n')
    os.close(writer)
    assert read_layer(Path(f"/dev/fd/{reader}"), "file").values == {"job.name": "x"}
    os.close(reader)


def test_a_staged_directory_whose_manifest_never_ends(tmp_path: Path, endless: Path) -> None:
    (tmp_path / "c4" / ".staged").mkdir(parents=True)
    endless.rename(tmp_path / "c4" / ".staged" / "manifest.json")
    with pytest.raises(LauncherError, match="damaged"):
        read_manifest(tmp_path / "c4")


HOSTILE = {
    "deep": "[" * 200_000,
    "driver of 5,000 digits": json.dumps(
        {"schema": 1, "arch": "arm64", "versions": {"torch": "1"}, "driver_min": HUGE}
    ),
    "schema of 5,000 digits": f'{{"schema": {HUGE}, "arch": "arm64", "versions": {{"torch": "1"}}}}',
    "endless": "",  # 1 GB in a few kB of squashfs: read up to its limit, it is no description
}


@pytest.mark.skipif(not shutil.which("mksquashfs"), reason="needs squashfs-tools")
@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_words_in_an_image(what: str, tmp_path: Path, endless: Path) -> None:
    (tmp_path / "root" / "etc").mkdir(parents=True)
    if HOSTILE[what]:
        endless.write_text(HOSTILE[what])
    endless.rename(tmp_path / "root" / "etc" / "titan-image.json")
    image = str(tmp_path / "x.sqsh")
    subprocess.run(["mksquashfs", str(tmp_path / "root"), image, "-quiet", "-no-progress"], check=True)
    inspected = refused("image", "inspect", image, cwd=tmp_path)
    submitted = refused("submit", "--gpu", "gb200", "--dry-run", "--image", image, cwd=tmp_path)
    if what == "endless":
        assert "the files in it" in inspected and "no torch" in submitted


@pytest.mark.parametrize("depth", [65, 700, 100_000])
def test_what_is_nested_deeper_than_anybody_nests(depth: int) -> None:
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json("[" * depth + "]" * depth)
    assert parse_json("[" * 60 + "]" * 60) is not None


@pytest.mark.parametrize("part", ['"="', "'#'", '"\\""', "a" + " " * 500, '"[,]" '])
def test_a_key_of_many_parts_however_they_are_written(part: str) -> None:
    for line in (".".join([part] * 30_000) + " = 1", f"[{'.'.join([part] * 30_000)}]"):
        with pytest.raises(ValueError, match="too many parts"):
            parse_toml(line)
    assert parse_toml(f"{'.'.join([part] * 10)} = 1")
    assert parse_toml('x = "10.0.0.1,10.0.0.2"\na.b.c = 1') == {"x": "10.0.0.1,10.0.0.2", "a": {"b": {"c": 1}}}


def test_no_room_for_temporary_files(workplace: Path) -> None:
    full = "import errno, tempfile\ndef none(): raise FileNotFoundError(errno.ENOENT, 'none usable in [...]')"
    program = f"{full}\ntempfile._get_default_tempdir = none\nfrom launcher.cli import main\nmain()"
    words = ["image", "lock", "cpu"]
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True)
    assert done.returncode == 7 and "no place for temporary files [unwritable]" in done.stderr, done.stderr


@pytest.mark.parametrize(
    "config",
    [[], {"Labels": "x"}, {"Volumes": {"a": 1, 2: 3}}, {"Env": [1]}, {"Cmd": 5}],
)
def test_an_image_whose_configuration_makes_no_sense(config: Any) -> None:
    with pytest.raises(LauncherError, match="is invalid"):
        image_config({"Config": config or [1]})


def test_an_images_time() -> None:
    assert image_config({"Created": "9999-01-01T00:00:00Z"}).created == 2**32 - 1
    ours = {"Created": "2026-11-29T10:00:00Z", "Config": {"Labels": {"org.opencontainers.image.created": "1970-01-02"}}}
    assert image_config(ours).created == 0  # not a time: none
    ours["Config"] = {"Labels": {"org.opencontainers.image.created": "1970-01-02T00:00:00Z"}}
    assert image_config(ours).created == 86400
    with pytest.raises(LauncherError, match="is invalid"):
        image_config({"Created": "2026-99-99T00:00:00Z"})


@pytest.mark.parametrize("text", ["²", "٣", "", "-1", "1e3", "1_0", HUGE, " 1"])
def test_what_is_no_whole_number(text: str) -> None:
    assert whole(text) is None
    assert registry_era._major_minor(f"0.{text}") == (99, 0) or text in ("-1", "1e3", "1_0", " 1")


@given(st.integers(0, 10**15 - 1))
def test_whole_numbers(number: int) -> None:
    assert whole(str(number)) == number


def test_numbers_that_nothing_can_compute_with() -> None:
    assert parse_json(f"[1e999, NaN, -Infinity, {HUGE}, 1{'0' * 30}, 12, 0.5]") == [None] * 5 + [12, 0.5]
    for text in ("[" * 200_000, "{" * 200_000):
        with pytest.raises(ValueError):
            parse_json(text)
    for text in (f"x = {HUGE}", f"x = 0x{'f' * 4000}", f"x = [[0x{'f' * 40}]]", "x = " + "[" * 5000):
        with pytest.raises(ValueError):
            parse_toml(text)


@pytest.mark.parametrize("value", [HUGE, f"0x{'f' * 4000}", f"-{HUGE}", "1" + "0" * 19])
@pytest.mark.parametrize(
    "option", ["--set=recipe.steps={}", "--set=recipe.lr={}", "--steps={}", "--nodes={}", "--time={}"]
)
def test_settings_of_too_many_digits(tmp_path: Path, option: str, value: str, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["launcher", "render", "--gpu", "cpu", "--image", "/x.sqsh", option.format(value)])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code in (2, 3)
    assert len(capsys.readouterr().err) < 12_000


def test_a_stage_of_too_many_steps(tmp_path: Path) -> None:
    assert "is not one of" in refused("stage", "c4", "--to", "x", "--for", f"steps={HUGE}", cwd=tmp_path)


# Any value in any record of a run: its commands say something, and no traceback.
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.just(int("9" * 4000)),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)
RECORDS = {
    "intent.json": ("at", "scheduler", "job_name"),
    "job.json": ("job_id", "host", "start_ticks"),
    "end.json": ("exit_code", "signal", "slurm", "began_at", "ended_at"),
    "cancelled": ("at", "job_id"),
}
FIELDS = [(name, key) for name, keys in RECORDS.items() for key in keys]


@given(st.sampled_from(FIELDS), VALUES, st.sampled_from(["list", "status", "results", "cancel"]))
def test_any_value_in_any_record(tmp_path: Path, field: tuple[str, str], value: object, command: str) -> None:
    run = tmp_path / "runs" / "r"
    shutil.rmtree(run, ignore_errors=True)
    (run / "claim").mkdir(parents=True)
    good: dict[str, dict[str, Any]] = {
        "intent.json": {"at": 1.7e9, "scheduler": "local", "job_name": "r.x"},
        "job.json": {"job_id": "4000000", "host": os.uname().nodename, "start_ticks": 1},
    }
    name, key = field
    records = good | ({} if name in good else {name: {}})
    records[name] = {**records[name], key: value}
    for file, record in records.items():
        (run / file).write_text(json.dumps(record), encoding="utf-8", errors="surrogatepass")
    (run / "claim" / "job_id").write_text(str(value)[:50], encoding="utf-8", errors="replace")
    words = [command, "--runs-dir", str(run.parent), *(["r"] if command != "list" else [])]
    done = CliRunner().invoke(group, words)
    assert done.exception is None or isinstance(done.exception, (SystemExit, LauncherError)), done.exception


def test_a_program_that_prints_without_end_is_ended() -> None:
    ran = run(["sh", "-c", "yes no | head -c 300000 >&2; yes"], 1000)
    assert (len(ran.out), ran.cut, len(ran.err)) == (1000, True, TAIL)
    with pytest.raises(LauncherError, match="sh did not end within"):
        run(["sh", "-c", "sleep 60; true"], 1000, timeout_s=0.1)


@pytest.mark.parametrize(
    "printed",
    [
        b"",
        b"[]",
        b'{"checks": []}',
        b'{"checks": [{"name": "torch", "status": "ok"}]}',
        b'{"checks": [{"name": "torch", "status": "fine", "found": ""}]}',
        b'{"checks": [{"name": ["torch"], "status": "ok", "found": ""}]}',
    ],
)
def test_what_an_image_prints_in_the_place_of_its_checks(printed: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docker_engine, "run", lambda *_, **__: Ran(0, printed, "its own words", False))
    with pytest.raises(LauncherError, match="the checks did not run in titan:x") as error:
        check("titan:x", engine=Engine(None, "unix:///x", "28", "amd64", "Debian"))
    assert error.value.original
