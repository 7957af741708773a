"""`-m titan.prove NODE RANK...`: what torchtitan makes of a run, tried in one process on a CPU. NODE: node.json's text.

One rank of the whole world at a time: the settings are read, the mesh is made, the model is built, quantized and
split, and one step is made. Communication is torch's fake backend, and parameters and activations are fake tensors:
they have a shape and no memory. What torchtitan asks of the GPU is answered by its compute capability in NODE. No data
is read. The last line of the output is the proof, in JSON.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import io
import json
import os
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import Refused, cpu
from .command import config_files, trainer_arguments

Facts = dict[str, Any]
MESH = ("pp", "dp_replicate", "dp_shard", "cp", "tp")


def main(argv: list[str]) -> int:
    began = time.monotonic()
    node, ranks = json.loads(argv[1]), [int(rank) for rank in argv[2:]]
    world = node["job"]["nodes"] * node["profile"]["gpus_per_node"]
    facts: Facts = {"world": world, "ranks": [], "refused": None, "missing": ""}
    facts["missing"] = " and no ".join(name for name in ("torch", "torchtitan") if not importlib.util.find_spec(name))
    if not facts["missing"]:
        with tempfile.TemporaryDirectory() as folder:
            try:
                prove(node, ranks, Path(folder), facts)
            except Refused as refused:
                facts["refused"] = _refused(refused.why) | {"fix": refused.fix}
    facts["seconds"] = round(time.monotonic() - began, 1)
    print(json.dumps(facts), flush=True)
    return 0


def prove(node: Facts, ranks: list[int], folder: Path, facts: Facts) -> None:
    """Fills `facts`, up to the first thing that is refused. Raises Refused for what the launcher itself refuses."""
    os.environ.update(LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", CUDA_VISIBLE_DEVICES="")
    import torch

    facts.update(torch=torch.__version__, torchtitan=importlib.metadata.version("torchtitan"))
    node["placed"]["run_dir"] = str(folder)
    # A checkpoint is written beside training through a process group of gloo's, which has no fake one.
    node["titan"] = {**node["titan"], "checkpoint.async_mode": "disabled"}
    arguments = trainer_arguments(node, facts["torchtitan"], facts["torch"])
    for path, text in config_files(node, facts["torchtitan"]).items():
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(text, encoding="utf-8")
    torch.set_num_threads(1)  # it is forked below
    torch.compile = lambda model=None, **_: model or (lambda function: function)
    torch.nn.Module.compile = lambda self, *_, **__: None
    torch.nn.init.trunc_normal_ = lambda tensor, *_, **__: tensor  # it looks at values, which fake tensors lack
    cpu.patch()
    importlib.import_module("torchtitan.tools.utils")
    capability = node.get("compute_capability") or [99, 0]
    for name, imported in list(sys.modules.items()):  # those that come later find it there
        if name.startswith("torchtitan.") and hasattr(imported, "has_cuda_capability"):
            vars(imported)["has_cuda_capability"] = lambda major, minor: [major, minor] <= capability
    printed = io.StringIO()
    try:
        from torchtitan.config import ConfigManager

        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            config = ConfigManager().parse_args(arguments)
    except SystemExit:  # of the options' parser, which draws a box around its words
        # The box alone, whose frame may be blank: libraries print, too, while they are imported.
        box = " ".join(line for line in printed.getvalue().splitlines() if line[:1] in " ╭│╰")
        words = re.sub(r"[^\x20-\x7e]+|-{9,}", " ", box)
        facts["refused"] = _refused(" ".join(words.split())[:2000])
        return
    except Exception as error:  # of whatever kind: reading the settings is torchtitan's own work alone
        facts["refused"] = _refused(_words(error))
        return
    for rank in ranks:
        found = _in_a_child(lambda rank=rank: one_rank(config, rank, facts["world"]))
        if "part" in found:
            facts["refused"] = found
            return
        facts["ranks"].append(found)


def _in_a_child(work: Any) -> Facts:
    """A process can be one rank only; a copy of this one has its imports."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        try:
            with os.fdopen(writer, "w") as stream:
                json.dump(work(), stream)
        finally:  # whatever happened, the copy does not go on with its parent's work
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as stream:
        text = stream.read()
    _, status = os.waitpid(child, 0)
    found: Facts = json.loads(text) if text else {"untried": f"the process ended with status {status}"}
    return found


def one_rank(config: Any, rank: int, world: int) -> Facts:
    """The mesh and what this rank holds, and what of it was `untried`; or `why` torchtitan refused, in which `part`."""
    begun = ["mesh"]
    found: Facts = {"rank": rank, "untried": ""}
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), NGPU=str(world))
    try:
        with fake_from_the_first_parameter(begun):
            trainer, module = _trainer(config, rank, world)
            begun.append("step")
            parameters = [parameter for part in trainer.model_parts for parameter in part.parameters()]
            found["parameters"] = sum(getattr(each, "_local_tensor", each).numel() for each in parameters)
            found["mesh"] = {name: getattr(trainer.parallel_dims, name) for name in MESH}
            _step(trainer)
            stages = trainer.parallel_dims.get_optional_mesh("pp")
            # Each by itself: for all of them at once, torch tries every way to split them, half of the proof's time.
            module.dist_utils.clip_grad_norm_(parameters, 1.0, foreach=False, pp_mesh=stages)
            trainer.optimizers.step()
    except Exception as error:  # of whatever kind: `_ours` tells a refusal from what only a GPU can do
        if not _ours(error, begun[-1]):
            return {"rank": rank, "part": begun[-1], "why": _words(error)}
        found["untried"] = f"{begun[-1]}: {_words(error)}"
    return found


def _ours(error: Exception, part: str) -> bool:
    """Whether this way of trying failed, and not the run: at a kernel that only a GPU has, or a value that is fake."""
    if type(error).__module__.startswith("torch._subclasses") or "data is not allocated" in str(error):
        return True
    # torch and torchtitan refuse shapes that do not go together by one of these two; NotImplementedError is a
    # RuntimeError, too, and stands for a missing kernel.
    files = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]
    of_shapes = isinstance(error, (RuntimeError, ValueError)) and not isinstance(error, NotImplementedError)
    return part == "step" and (not of_shapes or any("/torchao/" in file for file in files))


@contextlib.contextmanager
def fake_from_the_first_parameter(begun: list[str]) -> Iterator[None]:
    """Tensors are fake from where memory would be taken. Before, meshes are made, whose numbers must be real."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode, own = FakeTensorMode(allow_non_fake_inputs=True), torch.nn.Module.to_empty

    def to_empty(self: Any, **how: Any) -> Any:
        if begun[-1] == "mesh":
            begun.append("model")
            mode.__enter__()
        return own(self, **how)

    torch.nn.Module.to_empty = to_empty
    yield  # never undone: this process ends


def _trainer(config: Any, rank: int, world: int) -> tuple[Any, Any]:
    """torchtitan's trainer, without tokenizer and data, and its module."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    # torchtitan's own fake backend is rank 0 alone; it takes a group that is there.
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    if hasattr(config, "job"):  # up to 0.2
        from torchtitan import train as module
        from torchtitan.protocols import train_spec

        spec = train_spec.get_train_spec(config.model.name)
        spec.build_tokenizer_fn = spec.build_dataloader_fn = None
        train_spec.get_train_spec = lambda name: spec
    else:
        from torchtitan import trainer as module

        module.wrap_with_cuda_graph = lambda function: function
        for part in (config.tokenizer, config.dataloader):
            type(part).build = lambda self, **_: None
    return module.Trainer(config), module


def _step(trainer: Any) -> None:
    import torch

    old = hasattr(trainer, "job_config")
    config = trainer.job_config if old else trainer.config
    staged = trainer.parallel_dims.pp_enabled
    rows = config.parallelism.pipeline_parallel_microbatch_size if staged else config.training.local_batch_size
    shape = rows, config.training.seq_len
    trainer.device = torch.device("cpu")  # without the number that tensors made here lack, too

    def batch() -> tuple[Facts, Any]:
        names = ("input",) if old else ("input", "positions")
        return {name: torch.zeros(shape, dtype=torch.int64) for name in names}, torch.zeros(shape, dtype=torch.int64)

    inputs: Any
    labels: Any
    if old and trainer.parallel_dims.cp_enabled:
        _attend_as_a_gpu()
    if old and staged:
        return _through_stages(trainer, *batch())
    if staged:
        inputs, labels = zip(*(batch() for _ in range(trainer.num_pipeline_parallel_microbatches)), strict=True)
        inputs, labels = list(inputs), list(labels)
    else:
        inputs, labels = batch()
    trainer.forward_backward_step(input_dict=inputs, labels=labels, global_valid_tokens=torch.tensor(1.0))


def _through_stages(trainer: Any, inputs: Facts, labels: Any) -> None:
    """What each of this rank's stages makes of a microbatch. How stages tell each other shapes needs real values."""
    import torch

    tokens, labels, more, known = trainer.post_dataloading_process(inputs, labels)
    with trainer.train_context():
        for part in trainer.model_parts:
            if part.tok_embeddings is not None:
                made = part(tokens, **more, **known)
            else:  # tensor parallel ranks hand on a part of the sequence each
                shape = tokens.shape[0], tokens.shape[1] // trainer.parallel_dims.tp, trainer.model_args.dim
                made = part(torch.zeros(shape, requires_grad=True), **known)
            (made.sum() if part.output is None else trainer.loss_fn(made, labels)).backward()


def _attend_as_a_gpu() -> None:
    """Context parallelism knows a GPU's kernels alone. This one has shapes for every device."""
    import torch

    def attention(query: Any, key: Any, value: Any, *, scale: Any, is_causal: bool, enable_gqa: bool) -> Any:
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal, scale=scale)[0]

    torch.nn.functional.scaled_dot_product_attention = attention


def _refused(why: str) -> Facts:
    return {"part": "settings", "rank": None, "why": why}


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:2000]


if __name__ == "__main__":
    sys.exit(main(sys.argv))
