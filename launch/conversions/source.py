"""What conversions of a text decoder share: the checkpoint they read, the run they begin."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from launch.checkpoint.beginning import check_new_run
from launch.checkpoint.files import find_checkpoint
from launch.checkpoint.models import SavedDecoder, add_checkpoint, load_decoder


def add_source(parser: argparse.ArgumentParser) -> None:
    """The arguments that `open_source` reads."""
    add_checkpoint(parser)
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of the run to come")


def open_source(options: argparse.Namespace) -> SavedDecoder:
    """The decoder to convert, after a look at where the result goes.

    What a conversion draws follows from the run's seed: made again, the result is the same.

    Raises:
        BadInput: no decoder there, or the output is in use.
    """
    folder = find_checkpoint(options.checkpoint)
    check_new_run(Path(options.output), source=folder)
    saved = load_decoder(folder)
    torch.manual_seed(saved.config.train.seed)
    return saved
