"""What reaches a terminal: nothing that drives, reorders or hides, whoever wrote the text; and commands to type again.

The program runs in this process, on streams that refuse what their encoding lacks.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from launcher.base import output
from launcher.base.errors import quoted
from launcher.base.output import echo, plain, style
from launcher.cli import main
from launcher.commands import start
from launcher.image.squashfs_file import sidecar_path
from tests.conftest import EXAMPLES, ROOT
from tests.unit.bad_node_records import ECC, record
from tests.unit.outcomes import write_run

FEW = settings(max_examples=EXAMPLES // 3)  # each runs twenty commands
HOSTILE = [
    "\x1b]0;x\x07\x1b[31mrun\x1b[0m",  # a title, a colour
    "\x9b2J\x85\u2028\x08\x7f",  # C1, ends of lines, backspace
    "a\nerror: b\r\t",
    "rtl\u202etxt\u200b\u2066",
    "not-utf-8-\udcff\udc80",
    "a b;touch pwned;$(touch pwned)`touch pwned`'\"\\|*?~!#&",
    "--help",
    "[red]|x|<b>é漢🙂",
]
NAMES = st.binary(min_size=1, max_size=40).map(lambda raw: os.fsdecode(raw.translate(None, b"\0/") or b"x"))


class Terminal(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True


def said(*words: str, encoding: str = "utf-8", stream: type[io.TextIOWrapper] = io.TextIOWrapper) -> tuple[str, str]:
    """What `launcher WORDS` writes to stdout and stderr."""
    out, err = (stream(io.BytesIO(), encoding=encoding, errors="strict", write_through=True) for _ in range(2))
    with mock.patch.multiple(sys, argv=["launcher", *words], stdout=out, stderr=err), contextlib.suppress(SystemExit):
        main()
    decoded = "latin-1" if encoding == "latin-1" else "utf-8"  # click writes UTF-8 where the encoding is ASCII
    return written(out).decode(decoded), written(err).decode(decoded)


def written(stream: io.TextIOWrapper) -> bytes:
    assert isinstance(stream.buffer, io.BytesIO)
    return stream.buffer.getvalue()


def is_clean(text: str) -> bool:
    return all(c.isprintable() or c in "\n\t" for c in text)


def hostile_run(workplace: Path, name: str, exit_code: int = 1) -> Path:
    """A failed run of that name, in whose records and logs the name stands wherever others write."""
    shutil.rmtree(workplace / "runs", ignore_errors=True)
    run = write_run(workplace / "runs" / name, end=json.dumps({"exit_code": exit_code}), gpu=name, name=name)
    log = run / "logs" / "0000-gb200-001.log"
    with log.open("a", encoding="utf-8", errors="surrogateescape") as stream:
        stream.write(f"[rank0]:Traceback (most recent call last):\n[rank0]:RuntimeError: {name}\n")
    log.with_name("0001-gb200-002.log").rename(log.with_name(f"0001-{name}.log"))
    return run


COMMANDS = (
    ("list",),
    ("status", "."),
    ("logs", "."),
    ("watch", "."),
    ("cancel", "."),
    ("results", "."),
    ("results", "--all"),
    ("results", "--all", "--format", "markdown"),
    ("results", "--all", "--format", "csv"),
    ("accept", "."),
    ("compare", ".", "published"),
    ("report", "-o", "-"),
)


@FEW
@given(NAMES)
@example(HOSTILE[0])
@example(HOSTILE[1])
@example(HOSTILE[2])
@example(HOSTILE[3])
@example(HOSTILE[4])
@example(HOSTILE[7])
def test_no_command_prints_what_drives_a_terminal(workplace: Path, name: str) -> None:
    run = hostile_run(workplace, name)
    for command in COMMANDS:
        words = [str(run) if word == "." else word for word in command]
        assert all(map(is_clean, said(*words))), words
        if words[0] not in ("watch", "report"):
            coloured = "".join(said(*words, stream=Terminal))
            assert is_clean(re.sub(r"\x1b\[(0|1|2|3[1-6])m", "", coloured)), words


@pytest.mark.parametrize("name", HOSTILE)
def test_every_stream_takes_every_name(workplace: Path, name: str) -> None:
    run = str(hostile_run(workplace, name))
    for encoding in ("ascii", "latin-1", "utf-8"):
        for words in (
            ("list",),
            ("status", run),
            ("logs", run),
            ("watch", run),
            ("results", run),
            ("results", "no" + name),
        ):
            said(*words, encoding=encoding)
        listed = json.loads(said("list", "--json", encoding=encoding)[0])
        assert [row["run"] for row in listed] == [name]


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize(
    "words", ["{}", "list --{}", "list {}", "submit --nodes {}", "submit --image {}", "results {}"]
)
def test_errors_about_what_was_typed(workplace: Path, words: str, name: str) -> None:
    out, err = said(*(word.format(name) for word in words.split()))
    assert is_clean(out + err)


def test_errors_of_other_programs(workplace: Path, fake_slurm: Callable[[str, str], Path]) -> None:
    for command in ("squeue", "sacct", "scontrol", "sinfo", "sbatch"):
        fake_slurm(command, r"printf 'a\e[31m\xff\xc2\x9b2Jb\nslurm: c\n' >&2; exit 1")
    run = hostile_run(workplace, "r")
    (run / "end.json").unlink()
    (run / "intent.json").write_text('{"scheduler": "slurm", "job_name": "x", "at": 1}')
    for words in (("status", "r"), ("list",), ("cluster", "show"), ("cluster", "nodes")):
        assert all(map(is_clean, said(*words)))


@pytest.mark.parametrize("name", HOSTILE)
def test_images_and_staged_directories(workplace: Path, image: Path, name: str) -> None:
    sidecar = sidecar_path(image)
    about = json.loads(sidecar.read_text())
    sidecar.write_text(json.dumps({**about, "arch": name, "channel": name, "versions": {"torch": name, name: name}}))
    image.rename(workplace / f"{name}.sqsh")
    sidecar.rename(workplace / f"{name}.sqsh.json")
    (workplace / name / ".staged").mkdir(parents=True)
    (workplace / name / ".staged" / "manifest.json").write_text(json.dumps({"schema": 1, "kind": name, "source": name}))
    for words in (("image", "inspect", f"./{name}.sqsh"), ("stage", "list", f"./{name}"), ("stage", "list", ".")):
        assert all(map(is_clean, said(*words)))


def test_only_what_style_made_has_a_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    terminal = Terminal(io.BytesIO(), encoding="utf-8", write_through=True)
    echo(style("a\x1b[0mb", fg="red") + " \x1b[31mc", "d\ne", file=terminal)
    assert written(terminal) == b"\x1b[31ma?[0mb\x1b[0m ?[31mc\nd?e\n"
    monkeypatch.setenv("NO_COLOR", "1")
    echo(style("a", fg="red"), file=terminal)
    assert written(terminal).endswith(b"\na\n")


def test_one_module_prints() -> None:
    prints = re.compile(r"click\.s?echo|(?<![\w.])print\(")
    on_nodes = ("titan", "again.py")
    files = [file for file in (ROOT / "launcher").rglob("*.py") if not {*on_nodes} & {*file.parts}]
    assert [file.name for file in files if prints.search(file.read_text(encoding="utf-8"))] == ["output.py"]


# --- commands to type -------------------------------------------------------------------------------------


def typed(text: str, workplace: Path) -> list[list[str]]:
    """The words of each `launcher ...` in a line, as bash reads them."""
    script = "launcher() { printf '%s\\0' \"$@\"; printf '\\n\\0'; }\n" + text
    done = subprocess.run(["bash", "-c", script], cwd=workplace, capture_output=True, check=True)
    assert not (workplace / "pwned").exists() and not done.stderr
    return [block.split("\0")[:-1] for block in os.fsdecode(done.stdout).split("\n\0")[:-1]]


@given(NAMES)
@example("\udcff1\x1b1'\\\u202e ")
def test_a_quoted_word_is_read_back_and_is_not_changed_when_printed(name: str) -> None:
    assert plain(quoted(name)) == quoted(name)
    if name.isprintable():
        assert shlex.split(quoted("launcher", "watch", name)) == ["launcher", "watch", name]
    done = subprocess.run(["bash", "-c", f"printf %s {quoted(name)}"], capture_output=True, check=True)
    assert done.stdout == os.fsencode(name)


@pytest.mark.parametrize("name", HOSTILE)
def test_proposed_commands_name_the_run(workplace: Path, name: str) -> None:
    run = hostile_run(workplace, name)
    called = str(run) if name.startswith("-") else name
    everything = said("status", str(run))[1].rpartition("everything: ")[2]
    assert typed(everything, workplace) == [["logs", called]]
    (run / "end.json").unlink()
    (run / "intent.json").write_text('{"scheduler": "local", "job_name": "x", "at": 1}')
    shown = said("status", str(run))[0]
    lines = dict(line.strip().split(": ", 1) for line in shown.splitlines() if re.match("  (look|again): ", line))
    assert typed(lines["look"], workplace) == [["logs", called]]
    assert typed(lines["again"], workplace) == [["cancel", called], ["submit", f"{run}/run.toml"]]


@pytest.mark.parametrize("name", HOSTILE)
def test_proposed_commands_name_the_directory(workplace: Path, name: str) -> None:
    (workplace / name).mkdir()
    fix = said("status", "absent", f"--runs-dir={name}")[1].rpartition("try: ")[2]
    assert typed(fix, workplace) == [["list", "--runs-dir", name]]


@pytest.mark.parametrize("name", HOSTILE)
def test_what_a_node_says_of_itself(workplace: Path, name: str) -> None:
    run = hostile_run(workplace, name, exit_code=11)
    (run / "intent.json").write_text('{"scheduler": "slurm", "job_name": "x", "at": 1}')
    problem = {**ECC, "what": name, "fix": name}
    (run / "nodes" / "0000-n.json").write_text(json.dumps(record(name, problem)))
    out, err = said("status", str(run))
    assert is_clean(out + err)


def test_completion_offers_what_a_shell_reads_as_one_word(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*HOSTILE, "my-run"):
        (workplace / "runs" / name).mkdir(parents=True)
    for name, value in {
        "_LAUNCHER_COMPLETE": "bash_complete",
        "COMP_WORDS": "launcher watch ",
        "COMP_CWORD": "2",
    }.items():
        monkeypatch.setenv(name, value)
    assert said()[0] == "plain,my-run\n"


def test_a_script_reaches_a_file_unchanged_and_a_terminal_cleaned(workplace: Path) -> None:
    words = ("render", "--gpu", "gb200", "--image", "/i/no\u00a0break.sqsh")
    assert "no\u00a0break" in said(*words)[0]
    assert is_clean(said(*words, stream=Terminal)[0])


@pytest.mark.parametrize(("answer", "code"), [("y\n", 0), ("\n", 0), ("n\n", 1)])
def test_no_is_an_answer_and_no_interruption(answer: str, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(answer))
    try:
        output.confirm("Submit?")
        ended: object = 0
    except SystemExit as end:
        ended = end.code
    assert ended == code


@pytest.mark.parametrize(("quiet", "on_terminal"), [(False, True), (True, True), (False, False)])
def test_who_is_asked(quiet: bool, on_terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(start, "is_terminal", lambda _: on_terminal)
    monkeypatch.setattr(start, "confirm", lambda question, err: asked.append(question))
    start.ask_first(lambda: "Submit?", quiet)
    assert asked == ["Submit?"] * (on_terminal and not quiet)
