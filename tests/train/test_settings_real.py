"""The lists of torchtitan's settings are those of the installed releases."""

from __future__ import annotations

import re

import pytest

from launcher.config.layers import Layer, merge
from launcher.preflight.settings import releases, unknown_settings
from launcher.titan.command import user_flags
from tests.train.test_real_trainer import answer, python, versions

__all__ = ["python"]  # a fixture

LIST = "import json; from tests.titan_settings import settings; print('ANSWER' + json.dumps(settings()))"


@pytest.fixture
def listed(python: str) -> str:
    """The installed torchtitan's version."""
    (version, _) = versions(python) or ("", "")
    assert version in releases(), "add it to the list with this Python: python -m tests.titan_settings"
    return version


def test_the_list_is_the_installed_releases(python: str, listed: str) -> None:
    assert answer(python, LIST) == releases()[listed], "python -m tests.titan_settings"


# One setting of each kind goes through the release's own reader with each of these values: that of its section alone,
# which takes a hundredth of the time of the whole.
VALUES = (
    *("5", "-1", "0", "1e3", "0.5", ".5", "1_000", " 7 ", "+3", "0x10", "nan", "inf", "-inf", "None", "none", "true"),
    *("False", "yes", "", "a,b", "auto", "foo"),
)
READ = """
import contextlib, functools, io, json, sys
import tyro
try:
    from torchtitan.models.llama3.config_registry import llama3_debugmodel as start
except ImportError:
    from torchtitan.config import JobConfig as start
found, config = [], start()
for section, flags in json.load(sys.stdin):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            part = functools.reduce(getattr, filter(None, section.split(".")), config)
            tyro.cli(type(part), default=part, args=flags)
            found.append(True)
        except SystemExit:
            found.append(False)
        except (AssertionError, ValueError):
            found.append(None)  # of a check that is not the parser's
print("ANSWER" + json.dumps(found))
"""


def test_values_are_refused_that_the_release_refuses_and_no_others(python: str, listed: str) -> None:
    of_kind = {
        kind: name
        for name, kind in releases()[listed].items()
        if kind and re.fullmatch(r"(?!activation_)[a-z_]+\.\w+", name)
    }
    bank = [(kind, name, value) for kind, name in of_kind.items() for value in (*VALUES, *kind.strip("{}").split(","))]
    parts = [(*name.rpartition("."), value) for _, name, value in bank]
    asked = [(section, user_flags({name: value})) for section, _, name, value in parts]
    for (kind, name, value), taken in zip(bank, answer(python, READ, given=asked), strict=True):
        spec = merge([Layer({f"titan.{name}": value}, {f"titan.{name}": "option --set"})])
        ours = not unknown_settings(spec, listed)
        assert ours or taken is False, (kind, name, value)
        assert not ours or taken is not False or not kind, (kind, name, value)
