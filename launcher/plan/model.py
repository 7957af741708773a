"""The size of torchtitan's own Llama 3, without its memory: built on torch's meta device. Needs torch and
torchtitan.
"""

from __future__ import annotations


def count(flavor: str) -> int | None:
    """Parameters of the model, both eras; None for a flavor that it does not have. Takes seconds: torch is imported."""
    import torch
    from torchtitan.models import llama3

    with torch.device("meta"):
        if hasattr(llama3, "llama3_args"):  # up to 0.2
            arguments = llama3.llama3_args.get(flavor)
            model = llama3.Transformer(arguments) if arguments else None
        else:
            model = llama3.model_registry(flavor).model.build() if flavor in llama3.llama3_configs else None
    return sum(parameter.numel() for parameter in model.parameters()) if model is not None else None
