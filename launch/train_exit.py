"""Train the adapter that self-speculative decoding drafts with.

    python -m launch.train_exit RUN --exit-layer 2
    python -m launch.generate RUN --temperature 0 --exit-adapter RUN/exit-adapter.safetensors

The model of the run stays as it is; the adapter learns to predict what the whole model predicts,
on the run's own training rows.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch

from adaptive.models.decoder.speculation.exit_adapter import ExitAdapter, distil_adapter
from launch.checkpoint.models import add_checkpoint, add_device, load_decoder, training_ids
from launch.generation.depth import save_adapter
from launch.run.errors import OneLineParser, as_bad_input, program
from launch.run.options import check_counts, check_positive, check_seed
from launch.run.writable import check_file
from launch.tasks.registry import make_task


def arguments_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="python -m launch.train_exit",
        description=__doc__,
    )
    add_checkpoint(parser)
    parser.add_argument("--exit-layer", type=int, default=2, help="layers that draft")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps")
    parser.add_argument("--batch-size", type=int, default=8, help="rows of a step")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--output", help="by default RUN/exit-adapter.safetensors")
    parser.add_argument("--seed", type=int, default=0)
    add_device(parser)
    return parser


@program
def main(arguments: list[str] | None = None) -> None:
    """Load, train, save."""
    options = arguments_parser().parse_args(arguments)
    check_counts(options, "steps", "batch_size")
    check_positive(options, "learning_rate")
    check_seed(options.seed)
    root = Path(options.checkpoint)
    output = Path(options.output) if options.output else root / "exit-adapter.safetensors"
    if options.output or root.is_dir():
        check_file("--output", output)
    saved = load_decoder(options.checkpoint, device=options.device)
    model, device = saved.model, saved.model.embedding.weight.device
    torch.manual_seed(options.seed)
    with as_bad_input("--exit-layer"):
        adapter = ExitAdapter.of(model, options.exit_layer).to(device)
    train = replace(saved.config.train, seed=options.seed)
    batches = training_ids(make_task(replace(saved.config, train=train)), options.batch_size)
    steps = distil_adapter(
        model,
        adapter,
        (ids.to(device) for ids in islice(batches, options.steps)),
        learning_rate=options.learning_rate,
    )
    for number, (loss, same) in enumerate(steps, start=1):
        if number % 20 == 0 or number == options.steps:
            print(
                f"step {number}/{options.steps}  cross-entropy {loss:.4f}  same token {same:.0%}",
                flush=True,
            )
    save_adapter(adapter, output)
    print(f"adapter: {output}")


if __name__ == "__main__":
    main()
