"""The parameters that `launcher plan` computes are those of torchtitan's own model, in both eras."""

from __future__ import annotations

from launcher.titan.weights import SHAPES
from tests.train.test_real_trainer import answer, python

__all__ = ["python"]  # a fixture

COUNT = """
import json, sys, torch
from torchtitan.models import llama3

def count(flavor):
    with torch.device("meta"):
        if hasattr(llama3, "llama3_args"):  # up to 0.2
            model = llama3.Transformer(llama3.llama3_args[flavor])
        else:
            model = llama3.model_registry(flavor).model.build()
    return sum(parameter.numel() for parameter in model.parameters())

print("ANSWER" + json.dumps({flavor: count(flavor) for flavor in sys.argv[1:]}))
"""


def test_the_formula_counts_as_torchtitan_does(python: str) -> None:
    counted = answer(python, COUNT, *SHAPES)
    assert counted == {name: model.parameters for name, model in SHAPES.items()}
