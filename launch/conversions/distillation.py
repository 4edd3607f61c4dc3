r"""Turn a trained dense decoder into a TokenFormer: every layer learns what it replaces.

    python -m launch.convert distillation runs/dense --tokens 384 --ffn-tokens 1024 \
        --output runs/tokenformer

Projections and feed-forwards become Pattention, each fitted to its predecessor's inputs and
outputs on training rows; embedding, norms and output stay. Prints a report a layer and the loss on
held-out rows before and after.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from adaptive.blocks.pattention import Pattention, PattentionConfig
from adaptive.models.convert.distillation import DistillationConfig, LayerReport, distill
from adaptive.models.decoder.model import Decoder, DecoderConfig
from launch.checkpoint.beginning import begin_run
from launch.checkpoint.files import named_tensors
from launch.checkpoint.models import SavedDecoder, held_out_loss
from launch.conversions.source import add_source, open_source
from launch.run.errors import BadInput, as_bad_input
from launch.run.terminal import announced
from launch.tasks import Task


def add_options(parser: argparse.ArgumentParser) -> None:
    add_source(parser)
    parser.add_argument(
        "--tokens", type=int, required=True, help="parameter tokens of the projections"
    )
    parser.add_argument("--ffn-tokens", type=int, required=True, help="of the feed-forwards")
    parser.add_argument(
        "--output-tokens", type=int, help="of the output projections; default: --tokens"
    )
    parser.add_argument("--steps", type=int, default=300, help="of each layer's training")
    parser.add_argument("--max-tokens", type=int, default=8192, help="that each layer learns from")


def convert(options: argparse.Namespace) -> Path:
    """Write a TokenFormer made from a dense checkpoint; returns the checkpoint."""
    try:
        pattention = PattentionConfig(
            tokens=options.tokens,
            ffn_tokens=options.ffn_tokens,
            output_tokens=options.output_tokens,
        )
        fitting = DistillationConfig(max_tokens=options.max_tokens, steps=options.steps)
    except ValueError as error:
        raise BadInput(f"--{error}") from None
    source, output = open_source(options), Path(options.output)
    return distill_decoder(source, output, pattention=pattention, fitting=fitting).checkpoint


class Distilled(NamedTuple):
    """A report a layer, the loss on held-out rows before and after, and what was written."""

    reports: list[LayerReport]
    before: float
    after: float
    checkpoint: Path


def distill_decoder(
    source: SavedDecoder, output: Path, *, pattention: PattentionConfig, fitting: DistillationConfig
) -> Distilled:
    """Write a TokenFormer made from a dense checkpoint as the beginning of the run `output`.

    Prints as it goes.

    Raises:
        BadInput: the source is no dense decoder, or a layer sees too few tokens.
    """
    model, config, folder = source.model, source.config, source.folder
    if config.model.pattention is not None:
        raise BadInput(f"{folder}: must be a decoder of linear layers, without model.pattention")
    try:
        successor = replace(config.model, pattention=pattention)
    except ValueError as error:
        raise BadInput(f"{folder}: model.{error}") from None
    students = students_of_decoder(model, successor, seed=config.train.seed)
    task = source.task
    before = held_out_loss(model, task)
    forwards = [_Forward(model, task, row) for row in range(_rows(task, fitting.max_tokens))]
    reports = []
    fitting_now = announced("fitting layer by layer, each tells when it is done")
    with as_bad_input(f"--max-tokens={fitting.max_tokens}"), fitting_now:
        for report in distill(model, forwards, students, config=fitting):
            print(report, flush=True)
            reports.append(report)
    model.config = successor
    after = held_out_loss(model, task)
    print(f"held-out loss {before:.4f} -> {after:.4f}")
    checkpoint = begin_run(config, named_tensors(model), output=output, model=successor)
    return Distilled(reports, before, after, checkpoint)


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
