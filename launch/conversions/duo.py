"""Give a trained decoder's layers a small feed-forward and a bypass beside the one they have.

    python -m launch.convert duo runs/dense --output runs/duo --budget 0.5 --random-steps 60

The function does not change while every token takes the big feed-forward; the small one starts from
the hidden units that matter most. The run that begins here trains random paths first, then routers.
Prints the held-out loss of each size alone.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch

from adaptive.blocks.sized_feed_forward import PATHS, SizedFeedForwardConfig
from adaptive.models.convert.duo import convert as with_sizes
from adaptive.models.convert.duo import sized_modules
from adaptive.routing.forced import force_choices
from launch.checkpoint.beginning import begin_run
from launch.checkpoint.files import named_tensors
from launch.checkpoint.models import held_out_loss, training_ids
from launch.conversions.source import add_source, open_source
from launch.run.errors import as_bad_input
from launch.run.options import check_counts
from launch.run.terminal import announced


def add_options(parser: argparse.ArgumentParser) -> None:
    add_source(parser)
    parser.add_argument("--budget", type=float, default=0.5, help="mean cost to train for")
    parser.add_argument("--small-ffn-dim", type=int, help="by default a quarter of the big one")
    parser.add_argument("--random-steps", type=int, default=60, help="steps of random paths")
    parser.add_argument("--batch-size", type=int, default=8, help="rows to judge hidden units on")
    parser.add_argument("--rows", type=int, default=16, help="held-out rows of the losses told")


def convert(options: argparse.Namespace) -> Path:
    """Load, add the sizes, write; returns the checkpoint."""
    check_counts(options, "batch_size", "rows")
    source = open_source(options)
    task, train = source.task, source.config.train
    with as_bad_input(source.folder), announced("choosing the small feed-forwards' units"):
        wanted = SizedFeedForwardConfig(
            budget=options.budget,
            small_ffn_dim=options.small_ffn_dim,
            random_steps=options.random_steps,
        )
        batches = training_ids(task, options.batch_size)
        student = with_sizes(source.model, wanted, list(islice(batches, 4)))
    loss = held_out_loss(source.model, task, rows=options.rows, at_once=1)
    print(f"{'source':24s} loss {loss:.4f}", flush=True)
    for path, name in enumerate(PATHS):
        paths_T = torch.full((task.tokens(range(1)),), path)
        with force_choices(dict.fromkeys(sized_modules(student).values(), paths_T)):
            loss = held_out_loss(student, task, rows=options.rows, at_once=1)
        print(f"{f'every token {name}':24s} loss {loss:.4f}", flush=True)
    # Routers have no gradient while paths are random.
    train = replace(train, move_within=max(train.move_within, options.random_steps + 2))
    return begin_run(
        source.config,
        named_tensors(student),
        output=Path(options.output),
        model=student.config,
        train=train,
    )
