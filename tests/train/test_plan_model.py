"""The parameters that `launcher plan` computes are those of torchtitan's own model, in both eras."""

from __future__ import annotations

from launcher.titan.weights import SHAPES
from tests.train.test_real_trainer import answer, python

__all__ = ["python"]  # a fixture

COUNT = """
import json, sys
from launcher.plan.model import count
print("ANSWER" + json.dumps({flavor: count(flavor) for flavor in sys.argv[1:]}))
"""


def test_the_formula_counts_as_torchtitan_does(python: str) -> None:
    counted = answer(python, COUNT, *SHAPES, "no-such-flavor")
    expected = {name: model.parameters for name, model in SHAPES.items()}
    assert counted == expected | {"no-such-flavor": None}
