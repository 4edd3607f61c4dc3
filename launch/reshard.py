"""Turn a checkpoint of any ranks into one for any others: `python -m launch.reshard --help`."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from launch.checkpoint.files import find_checkpoint, read_whole, write_whole
from launch.checkpoint.state import WholeState
from launch.run.config import ParallelConfig
from launch.run.errors import BadInput, OneLineParser, program
from launch.run.options import parse_mesh
from launch.run.sections import RunConfig
from launch.run.terminal import announced
from launch.run.trust import add_trust_option
from launch.run.writable import check_folder
from launch.run.zero import check_zero
from parallel.checkpoint import save_atomically
from parallel.mesh import data_degree
from parallel.ranks import on_ranks

_EPILOG = """\
What is written holds whole tensors, which a run of any ranks, mesh and ZeRO stage continues from
(output=… checkpoint.resume=NEW). --to names the mesh that it is meant for: the checkpoint is then
loaded there, on that many ranks of this machine, gathered again and compared bit by bit with the
one it came from. Exit code 1 if anything differs.
"""


def reshard(source: Path, output: Path) -> tuple[Path, WholeState]:
    """Write the whole state of a checkpoint as a checkpoint of its own.

    Args:
        source: a checkpoint, of any ranks.
        output: folder for the new one, which is named after its step.

    Returns:
        The new checkpoint, and what it holds.
    """
    whole = read_whole(source)
    written = save_atomically(output, whole.state.step, lambda folder: write_whole(folder, whole))
    return written, whole


def verify(checkpoint: Path, whole: WholeState, mesh: dict[str, Any], stage: int) -> str:
    """Load a checkpoint on the ranks of a mesh, gather it and compare.

    Returns:
        The name of the first tensor that differs; empty if none does.

    Raises:
        BadInput: the mesh does not fit the model, or DeepSpeed does not support it.
    """
    axes = {name: int(mesh.get(name, 1)) for name in ("tensor", "context", "expert")}
    ranks = int(mesh.get("data", 1)) * axes["tensor"] * axes["context"]
    check_zero(stage, tensor=axes["tensor"], expert=axes["expert"])
    try:
        data_degree(ranks, **axes)
    except ValueError as error:
        raise BadInput(f"--to: {error}") from None
    parallel = ParallelConfig(
        **axes,
        sequence_parallel=bool(mesh.get("sequence_parallel")),
        context_attention=mesh.get("context_attention", "ulysses"),
    )
    config = dataclasses.replace(
        whole.config,
        parallel=parallel,
        # A batch that any number of ranks can share; nothing is trained.
        train=dataclasses.replace(whole.config.train, batch_size=ranks, micro_batch_size=None),
        deepspeed={"zero_optimization": {"stage": stage}},
    )
    try:
        loaded: dict[str, Tensor] = on_ranks(_gathered, ranks, checkpoint, config)
    except ValueError as error:
        raise BadInput(f"--to: {error}") from None
    for name, tensor in _tensors(whole).items():
        if name not in loaded or not torch.equal(loaded[name], tensor.float()):
            return name
    return ""


@program
def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    mesh = None if options.to is None else parse_mesh(options.to)
    if mesh is not None:
        axes = {axis: int(mesh.get(axis, 1)) for axis in ("tensor", "expert")}
        check_zero(options.zero, **axes)
    check_folder("--output", options.output)
    source = find_checkpoint(options.checkpoint)
    written, whole = reshard(source, Path(options.output))
    different = ""
    if mesh is not None:
        with announced(f"loading it on {options.to}"):
            different = verify(written, whole, mesh, options.zero)
    if different:
        print(f"{written}: {different} differs after loading on {options.to}")
        return 1
    tensors = len(_tensors(whole))
    checked = "" if mesh is None else f"; all equal after loading on {options.to}"
    print(f"{written}: {tensors} tensors of step {whole.state.step}{checked}")
    return 0


def _tensors(whole: WholeState) -> dict[str, Tensor]:
    """Weights, buffers and moments under one name each."""
    moments = {f"exp_avg/{name}": tensor for name, tensor in whole.exp_avg.items()}
    moments |= {f"exp_avg_sq/{name}": tensor for name, tensor in whole.exp_avg_sq.items()}
    return {**whole.weights, **moments}


def _gathered(checkpoint: Path, config: RunConfig) -> dict[str, Tensor]:
    """On every rank: load, and give back whole tensors."""
    from launch.run.engine import Engine
    from launch.run.ranks import join_ranks
    from launch.tasks.registry import make_task
    from parallel.mesh import Mesh

    device = join_ranks()
    mesh = Mesh.create(**vars(config.parallel))
    task = make_task(config, mesh=mesh, device=device)
    engine = Engine(config, task, mesh=mesh, device=device)
    engine.load_whole(read_whole(checkpoint))
    weights = engine.full_weights()
    moments = engine.full_moments()
    return {**weights, **moments} if dist.get_rank() == 0 else {}


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="python -m launch.reshard",
        description="Turn a checkpoint of any ranks, mesh and ZeRO stage into one for any others.",
        epilog=_EPILOG,
    )
    add_trust_option(parser)
    parser.add_argument("checkpoint", help="a checkpoint, or a run's folder for its newest")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="where to write")
    parser.add_argument("--to", metavar="MESH", help="data=2,tensor=2: verify on that mesh")
    parser.add_argument("--zero", type=int, default=1, help="ZeRO stage of the verification (1)")
    return parser


if __name__ == "__main__":
    main()
