"""The docs say what is: every command in them exists with its options, and pages made from code are up to date."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from docs.tables import PAGES, page
from launcher.cli import launcher
from tests.conftest import ROOT, Launch

DOCS = ROOT / "docs"
WRITTEN = (ROOT / "README.md", *sorted(DOCS.rglob("*.md")))
# An indented block, or a fenced one; what stands between backquotes in a line.
CODE = re.compile(r"(?:^    .+\n)+|^```\w*\n(.*?)^```", re.MULTILINE | re.DOTALL)
QUOTED = re.compile(r"`(launcher [^`\n]+)`")
START = re.compile(r"(?:^|(?<=[\s/(]))launcher(?= [a-z-])")
# Ends of a command in a shell, or the two spaces before what a page says about it.
END = re.compile(r"\s\s+|\s#|\s?\d?>|[|;&)…]|\s\.\.\.|$")


def commands(text: str) -> Iterator[str]:
    """Every `launcher ...` that a page of docs tells its reader to type, without what follows it in the shell."""
    blocks = [block[1] or block[0] for block in CODE.finditer(text)]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines() + QUOTED.findall(text)
    for line in lines:
        line = re.sub(r"^ {0,4}(\$ )?", "", line)  # further in, it is a sentence that goes on
        # A line that begins with other words is a program's answer, or one of a file.
        if re.match(r"(launcher|ssh|export|[A-Z_]+=|\d\d? \d|\S*/launcher) ?", line) and (start := START.search(line)):
            command = re.sub(r"  +(?=-)", " ", line[start.start() :])
            yield _until_its_end(command)


def _until_its_end(text: str) -> str:
    """`text` up to what ends a command outside of quotes."""
    quote = ""
    for at, letter in enumerate(text):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif END.match(text, at):
            return text[:at]
    return text


def problem(command: str) -> str:
    """What of a command line does not exist; nothing is run, and no file that it names is looked for."""
    words = shlex.split(command)[1:]
    context = click.Context(launcher, info_name="launcher", **launcher.context_settings)  # as the program has it
    while isinstance(group := context.command, click.Group) and words and not words[0].startswith("-"):
        name = words.pop(0)
        found = group.get_command(context, name)
        if found is None:
            return f"no command {name}"
        context = click.Context(found, context, name)
    if isinstance(context.command, click.Group) and not words:
        return ""  # `launcher image` as the name of a group
    try:
        given, left, _ = context.command.make_parser(context).parse_args(list(words))
    except click.UsageError as error:
        return error.format_message()
    if left:
        return f"{left[0]} is one word too many"
    for parameter in context.command.params:
        values = given.get(parameter.name or "")
        kind: Any = parameter.type if isinstance(parameter.type, (click.Choice, click.types.IntParamType)) else None
        for value in values if isinstance(values, (list, tuple)) else [values]:
            if kind and isinstance(value, str) and not value.isupper():  # N: any number
                try:
                    kind.convert(value, parameter, context)
                except click.UsageError as error:
                    return error.format_message()
    return ""


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_in_the_docs_exists_and_takes_what_it_is_given(path: Path) -> None:
    wrong = {text: said for text in commands(path.read_text(encoding="utf-8")) if (said := problem(text))}
    assert wrong == {}


HOW_TO = [
    pytest.param(name, command, id=f"{name}-{at}")
    for name in ("index.md", "from-the-manual.md", "run.md", "how-to.md")
    for at, command in enumerate(commands((DOCS / name).read_text(encoding="utf-8")))
    if re.match(r"launcher (submit|plan|config show|accept) .*(--|/)", command)
]


@pytest.mark.parametrize(("name", "command"), HOW_TO)
def test_what_a_page_tells_to_submit_becomes_a_script(
    name: str, command: str, launch: Launch, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the files that the page shows, and the runs that it names; everything but handing it to Slurm."""
    text, workplace = (DOCS / name).read_text(encoding="utf-8"), image.parent
    for file, content in re.findall(r"^```toml\n# ([\w.-]+\.toml)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        (workplace / file).write_text(content)
    named = re.findall(r"runs/([\w-]+)/run\.toml", command)
    for run in named:
        (workplace / "runs" / run).mkdir(parents=True)
        earlier = (ROOT / "tests/compat/v0.1/runs/completed/run.toml").read_text(encoding="utf-8")
        (workplace / "runs" / run / "run.toml").write_text(earlier.replace("@PLACE@", str(workplace)))
    monkeypatch.setenv("PWD", str(workplace))
    for variable in re.findall(r"export (\w+)=\.\.\.", text):
        monkeypatch.setenv(variable, "x")
    words = shlex.split(os.path.expandvars(command))[1:]
    if not named and not {"--gpu", "--local"} & set(words):
        words += ["--gpu", "gb200"]
    if words[0] in ("submit", "accept"):
        words = ["submit", *words[1:], "--dry-run"]
    done = launch(*(word for word in words if word not in ("--follow", "--yes")))
    assert done.returncode == 0, done.stderr
    assert words[0] != "submit" or "#!/bin/bash" in done.stdout


def test_the_commands_are_found() -> None:
    text = """
    launcher list                    runs
    ssh login launcher report -o - > page.html
    launcher submit --steps 5 \\
        --set a=b | head
    my-run: launcher is a word here

```text
$ launcher accept x
PASS
```
In a line, `launcher cancel x`.
"""
    found = ["launcher list", "launcher report -o -", "launcher submit --steps 5 --set a=b", "launcher accept x"]
    assert [" ".join(command.split()) for command in commands(text)] == [*found, "launcher cancel x"]


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("launcher submit --nodes 9 --steps N --check quick", ""),
        ("launcher image", ""),
        ("launcher smubit", "no command smubit"),
        ("launcher submit --node-count 9", "No such option"),
        ("launcher submit --steps many", "'many' is not a valid int"),
        ("launcher submit --check some", "'some' is not one of"),
        ("launcher watch a b", "b is one word too many"),
    ],
)
def test_a_command_that_does_not_exist_is_found_out(command: str, said: str) -> None:
    assert (said in problem(command)) if said else problem(command) == ""


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_pages_made_from_code_are_up_to_date(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert page(text) == text, "run `make docs`"


def test_the_site_names_every_page_once() -> None:
    """mkdocs would leave the others out of its menu."""
    menu = re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:")[1])
    assert sorted(menu) == sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))


def test_links_and_pictures_of_the_docs_lead_somewhere() -> None:
    """Also in a checkout and on GitHub, where no mkdocs looks at them."""
    for path in WRITTEN:
        text = CODE.sub("", path.read_text(encoding="utf-8"))
        for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", text):
            assert (path.parent / target).exists(), f"{path}: {target}"


def test_the_pictures_are_small_and_fetch_nothing() -> None:
    pictures = list((DOCS / "img").iterdir())
    assert {path.name for path in pictures} >= {"page.png", "watch.svg"}
    for path in pictures:
        assert path.stat().st_size < 200_000, path
    shown = (DOCS / "img" / "watch.svg").read_text(encoding="utf-8")
    assert not re.search(r"url\(.?http|href|<script", shown) and "tokens/s" in shown and "loss" in shown


def test_the_film_of_watch_goes_from_the_queue_to_the_end_and_rests_there_for_those_who_want_no_motion() -> None:
    shown = (DOCS / "img" / "watch.svg").read_text(encoding="utf-8").replace("&#160;", " ")
    steps = [int(step) for step in re.findall(r"step (\d+)/20", shown)]
    assert steps == sorted(steps) and steps[-1] == 20 and len(set(steps)) > 5
    assert shown.count("my-run: COMPLETED") == 1 and shown.index("checking nodes") < shown.index("my-run: COMPLETED")
    last = re.search(r"matrix \{ font:[^}]*transform: (translateY\(-[\d.]+px\));", shown)
    assert (
        last
        and f"to {{ transform: {last[1]}; }}" in shown
        and "@media (prefers-reduced-motion: no-preference)" in shown
    )


def test_every_file_of_a_run_directory_is_described(launch: Launch, workplace: Path) -> None:
    """Of a run just made, and of those of earlier versions; a folder is described as a whole."""
    text = (DOCS / "reference" / "run-directory.md").read_text(encoding="utf-8")
    described = {name.rstrip("/") for name in re.findall(r"^\| `([^`]+)`", text, re.MULTILINE)}
    done = launch("submit", "--local", "--recipe", "debug", "--name", "r", "--python", "/bin/true", "--follow")
    assert done.returncode == 0, done.stderr
    earlier = (ROOT / "tests" / "compat").glob("v*/runs/*")
    found = {file.name for run in (workplace / "runs" / "r", *earlier) for file in run.iterdir() if run.is_dir()}
    assert found - described == set()
