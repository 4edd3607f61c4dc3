"""Train the adapter that self-speculative decoding drafts with.

    python -m launch.train_exit RUN --exit-layer 2
    python -m launch.generate RUN --temperature 0 --exit-adapter RUN/exit-adapter.safetensors

The model of the run stays as it is; the adapter learns to predict what the whole model predicts,
on the run's own training rows.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from adaptive.models.decoder.model import Decoder
from adaptive.models.decoder.speculative import ExitAdapter, distil_adapter
from launch.checkpoint.files import load_model
from launch.data.text import Corpus
from launch.generate import chosen_device
from launch.run.errors import BadInput, OneLineParser, exit_on_bad_input
from launch.run.options import check_counts, check_positive, check_seed
from launch.run.sections import RunConfig
from launch.run.writable import check_file
from launch.tasks.decode_depth import save_adapter


def arguments_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="python -m launch.train_exit",
        description=__doc__,
    )
    parser.add_argument("checkpoint", help="a checkpoint, or the folder of a run")
    parser.add_argument("--exit-layer", type=int, default=2, help="layers that draft")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps")
    parser.add_argument("--batch-size", type=int, default=8, help="rows of a step")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--output", help="by default RUN/exit-adapter.safetensors")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="cpu, cuda, cuda:1; by default cuda where there is one")
    return parser


def main(arguments: list[str] | None = None) -> None:
    with exit_on_bad_input():
        train(arguments_parser().parse_args(arguments))


def train(options: argparse.Namespace) -> None:
    """Load, train, save."""
    check_counts(options, "steps", "batch_size")
    check_positive(options, "learning_rate")
    check_seed(options.seed)
    root = Path(options.checkpoint)
    output = Path(options.output) if options.output else root / "exit-adapter.safetensors"
    if options.output or root.is_dir():
        check_file("--output", output)
    model, config = load_model(options.checkpoint)
    if not isinstance(model, Decoder):
        raise BadInput(f"{options.checkpoint}: holds a {type(model).__name__}, not a text decoder")
    model = model.to(chosen_device(options.device))
    torch.manual_seed(options.seed)
    try:
        adapter = ExitAdapter.of(model, options.exit_layer).to(model.embedding.weight.device)
    except ValueError as error:
        raise BadInput(f"--exit-layer: {error}") from None
    batches = training_rows(config, options, device=model.embedding.weight.device)
    steps = distil_adapter(model, adapter, batches, learning_rate=options.learning_rate)
    for number, (loss, same) in enumerate(steps, start=1):
        if number % 20 == 0 or number == options.steps:
            print(
                f"step {number}/{options.steps}  cross-entropy {loss:.4f}  same token {same:.0%}",
                flush=True,
            )
    save_adapter(adapter, output)
    print(f"adapter: {output}")


def training_rows(
    config: RunConfig, options: argparse.Namespace, *, device: torch.device
) -> Iterator[Tensor]:
    """int64 [B, S] token ids of the run's training stream, one batch a step."""
    corpus = Corpus(config.data)
    for step in range(options.steps):
        first = step * options.batch_size
        rows = [corpus.train_row(options.seed, first + row) for row in range(options.batch_size)]
        yield torch.from_numpy(np.stack(rows)[:, :-1]).to(device)


if __name__ == "__main__":
    main()
