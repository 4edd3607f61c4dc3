"""Give a trained decoder's layers a small feed-forward and a bypass beside the one they have.

    python -m launch.convert duo runs/dense --output runs/duo --budget 0.5 --random-steps 60
    python -m launch.start --config runs/duo/run.yaml

The function does not change while every token takes the big feed-forward; the small one starts from
the hidden units that matter most. The source is only read. The result is the beginning of a run of
its own: random paths first, then trained routers. Prints the held-out loss of each size alone.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from adaptive.blocks.sized_feed_forward import PATHS, SizedFeedForwardConfig
from adaptive.models.convert.duo import convert, sized_modules
from adaptive.models.decoder.model import Decoder
from adaptive.routing.forced import force_choices
from launch.checkpoint.files import find_checkpoint, load_model
from launch.conversions.acm import training_rows, write
from launch.data.text import Corpus
from launch.grow import check_output
from launch.run.errors import BadInput, OneLineParser, exit_on_bad_input
from launch.run.options import check_counts
from launch.run.terminal import command


def arguments_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="python -m launch.convert duo",
        description=__doc__,
    )
    parser.add_argument("checkpoint", help="a checkpoint, or the folder of a run")
    parser.add_argument("--output", required=True, help="folder of the run to come")
    parser.add_argument("--budget", type=float, default=0.5, help="mean cost to train for")
    parser.add_argument("--small-ffn-dim", type=int, help="by default a quarter of the big one")
    parser.add_argument("--random-steps", type=int, default=60, help="steps of random paths")
    parser.add_argument("--batch-size", type=int, default=8, help="rows to judge hidden units on")
    parser.add_argument("--rows", type=int, default=16, help="held-out rows of the losses told")
    return parser


def main(arguments: list[str] | None = None) -> None:
    with exit_on_bad_input():
        run(arguments_parser().parse_args(arguments))


def run(options: argparse.Namespace) -> None:
    """Load, convert, write."""
    check_counts(options, "batch_size", "rows")
    source, output = find_checkpoint(options.checkpoint), Path(options.output)
    check_output(output, source)
    teacher, config = load_model(source)
    if not isinstance(teacher, Decoder):
        raise BadInput(f"{source}: holds a {type(teacher).__name__}, not a text decoder")
    corpus = Corpus(config.data)
    try:
        wanted = SizedFeedForwardConfig(
            budget=options.budget,
            small_ffn_dim=options.small_ffn_dim,
            random_steps=options.random_steps,
        )
        batches = training_rows(corpus, config, options.batch_size)
        student = convert(teacher, wanted, [next(batches) for _ in range(4)])
    except ValueError as error:
        raise BadInput(f"{source}: {error}") from None
    print(f"{'source':24s} loss {held_out(teacher, corpus, options.rows):.4f}", flush=True)
    for path, name in enumerate(PATHS):
        loss = held_out(student, corpus, options.rows, path=path)
        print(f"{f'every token {name}':24s} loss {loss:.4f}", flush=True)
    # Routers have no gradient while paths are random.
    within = max(config.train.move_within, options.random_steps + 2)
    config = replace(config, train=replace(config.train, move_within=within))
    print(f"checkpoint {write(student, config, output)}")
    print(f"continue   {command('launch.start', '--config', output / 'run.yaml')}")


@torch.no_grad()
def held_out(model: Decoder, corpus: Corpus, rows: int, *, path: int | None = None) -> float:
    """Loss on held-out rows; with `path`, every token takes it in every layer."""
    total, tokens = 0.0, 0
    for row in range(min(rows, corpus.validation_rows)):
        ids = torch.from_numpy(corpus.validation_row(row))[None]
        length = ids.shape[1] - 1
        forced: dict[nn.Module, Tensor] = {}
        if path is not None:
            forced = dict.fromkeys(sized_modules(model).values(), torch.full((length,), path))
        with force_choices(forced):
            total += float(model.token_losses(ids[:, :-1], ids[:, 1:]).sum())
        tokens += length
    return total / tokens
