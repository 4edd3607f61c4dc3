r"""Turn a trained dense decoder into a TokenFormer: every layer learns what it replaces.

    python -m launch.convert distillation runs/dense --tokens 384 --ffn-tokens 1024 \
        --output runs/tokenformer

Projections and feed-forwards become Pattention, each fitted to its predecessor's inputs and
outputs on training rows; embedding, norms and output stay. Prints a report a layer and the loss on
held-out rows before and after, and writes a checkpoint that a run continues from.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from adaptive.blocks.pattention import Pattention, PattentionConfig
from adaptive.models.convert.distillation import DistillationConfig, LayerReport, distill
from adaptive.models.decoder.model import Decoder, DecoderConfig
from launch.checkpoint.files import find_checkpoint, load_model, named_tensors, write_whole
from launch.checkpoint.state import RunState, WholeState
from launch.grow import check_output
from launch.run.config import save_resolved
from launch.run.errors import BadInput, OneLineParser, exit_on_bad_input
from launch.run.sections import RunConfig
from launch.run.terminal import command
from launch.tasks import Task
from launch.tasks.registry import task_class
from parallel.checkpoint import save_atomically
from parallel.mesh import Mesh


def main(arguments: list[str] | None = None) -> None:
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with exit_on_bad_input():
        options = _parser().parse_args(arguments)
        try:
            pattention = PattentionConfig(
                tokens=options.tokens,
                ffn_tokens=options.ffn_tokens,
                output_tokens=options.output_tokens,
            )
            fitting = DistillationConfig(max_tokens=options.max_tokens, steps=options.steps)
        except ValueError as error:
            raise BadInput(f"--{error}") from None
        distill_checkpoint(
            options.checkpoint, Path(options.output), pattention=pattention, fitting=fitting
        )


def distill_checkpoint(
    source: str | Path, output: Path, *, pattention: PattentionConfig, fitting: DistillationConfig
) -> tuple[list[LayerReport], float, float]:
    """Write a TokenFormer made from a dense checkpoint as the beginning of the run `output`.

    Prints as it goes. The source is only read.

    Returns:
        The reports, and the loss on held-out rows before and after.

    Raises:
        BadInput: the checkpoint is no dense decoder, a layer sees too few tokens, or the output is
            in use.
    """
    folder = find_checkpoint(source)
    check_output(output, folder)
    model, config = load_model(folder)
    if not isinstance(model, Decoder) or config.model.pattention is not None:
        raise BadInput(f"{folder}: must be a decoder of linear layers, without model.pattention")
    try:
        successor = replace(config.model, pattention=pattention)
    except ValueError as error:
        raise BadInput(f"{folder}: model.{error}") from None
    students = students_of_decoder(model, successor, seed=config.train.seed)
    task = task_class(config.task)(config, mesh=Mesh.single(), device=torch.device("cpu"))
    before = held_out_loss(model, task)
    forwards = [_Forward(model, task, row) for row in range(_rows(task, fitting.max_tokens))]
    reports = []
    try:
        for report in distill(model, forwards, students, config=fitting):
            print(report, flush=True)
            reports.append(report)
    except ValueError as error:
        raise BadInput(f"--max-tokens={fitting.max_tokens}: {error}") from None
    model.config = successor
    after = held_out_loss(model, task)
    checkpoint = _write(model, config, successor, output)
    print(f"held-out loss {before:.4f} -> {after:.4f}")
    print(f"checkpoint    {checkpoint}")
    print(f"continue      {command('launch.start', '--config', output / 'run.yaml')}")
    return reports, before, after


def students_of_decoder(
    model: nn.Module, successor: DecoderConfig, *, seed: int
) -> dict[str, Pattention]:
    """The Pattention layers of a decoder of that configuration, by the path of what they replace.

    Raises:
        BadInput: the decoder has layers that Pattention does not replace one for one.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        built = Decoder(successor)
    paths = dict(model.named_modules())
    students = {n: m for n, m in built.named_modules() if isinstance(m, Pattention)}
    missing = [name for name in students if name not in paths]
    if missing or not students:
        raise BadInput(f"{missing[0] if missing else 'model'}: is not in the dense decoder")
    return students


@torch.no_grad()
def held_out_loss(model: nn.Module, task: Task) -> float:
    """Mean loss over the task's held-out rows."""
    total, count = 0.0, 0
    for start in range(0, task.validation_rows, 8):
        batch = task.validation_batch(range(start, min(start + 8, task.validation_rows)))
        value, number = task.validation_sums(model, batch)["loss"]
        total, count = total + float(value), count + number
    return total / count


class _Forward:
    """One training row through the model, its tokens routed as in training."""

    def __init__(self, model: nn.Module, task: Task, row: int) -> None:
        self.model, self.task, self.row = model, task, row

    def __call__(self) -> None:
        self.model.train()
        self.model(self.task.batch(range(self.row, self.row + 1))["input_ids"])
        self.model.eval()


def _rows(task: Task, tokens: int) -> int:
    """Rows that give a dense layer so many tokens; a routed one may see fewer."""
    return -(-tokens // task.tokens(range(1)))


def _write(model: nn.Module, config: RunConfig, successor: DecoderConfig, output: Path) -> Path:
    config = replace(
        config,
        model=successor,
        output=str(output),
        phases=[],
        checkpoint=replace(config.checkpoint, resume="auto"),
    )
    weights = {name: tensor.detach() for name, tensor in named_tensors(model).items()}
    whole = WholeState(weights=weights, exp_avg={}, exp_avg_sq={}, state=RunState(), config=config)
    checkpoint = save_atomically(output / "checkpoints", 0, lambda to: write_whole(to, whole))
    save_resolved(config, output / "run.yaml")
    return checkpoint


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="python -m launch.convert distillation",
        description=__doc__,
    )
    parser.add_argument("checkpoint", help="a dense checkpoint, or a run (its newest intact one)")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of the new run")
    parser.add_argument(
        "--tokens", type=int, required=True, help="parameter tokens of the projections"
    )
    parser.add_argument("--ffn-tokens", type=int, required=True, help="of the feed-forwards")
    parser.add_argument(
        "--output-tokens",
        type=int,
        help="of the output projections; default: --tokens",
    )
    parser.add_argument("--steps", type=int, default=300, help="of each layer's training")
    parser.add_argument("--max-tokens", type=int, default=8192, help="that each layer learns from")
    return parser
