"""The parameters that `launcher plan` computes are those of torchtitan's own model, in both eras."""

from __future__ import annotations

import json
import subprocess

from launcher.titan.weights import SHAPES
from tests.train.test_real_trainer import ROOT, python

__all__ = ["python"]  # a fixture

COUNT = """
import json, sys
sys.path.insert(0, sys.argv[1])
from launcher.plan.model import count
print("ANSWER" + json.dumps({flavor: count(flavor) for flavor in sys.argv[2:]}))
"""


def test_the_formula_counts_as_torchtitan_does(python: str) -> None:
    command = [python, "-c", COUNT, str(ROOT), *SHAPES, "no-such-flavor"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    answer = [line for line in done.stdout.splitlines() if line.startswith("ANSWER")]
    assert answer, done.stderr[-3000:]
    expected = {name: model.parameters for name, model in SHAPES.items()}
    assert json.loads(answer[0].removeprefix("ANSWER")) == expected | {"no-such-flavor": None}
