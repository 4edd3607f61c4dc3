"""What conversions of a text decoder share: the checkpoint they read, the run they begin."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from adaptive.models.decoder.model import DecoderConfig
from launch.checkpoint.beginning import check_new_run
from launch.checkpoint.files import find_checkpoint, read_whole
from launch.checkpoint.models import SavedDecoder, add_checkpoint, load_decoder
from launch.checkpoint.published import copy_tokenizer, is_published, read_published
from launch.run.config import from_mapping
from launch.run.errors import BadInput
from launch.run.sections import RunConfig


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


def read(source: str) -> tuple[dict[str, Tensor], DecoderConfig, RunConfig | None]:
    """Whole float32 weights, the decoder's configuration and, of our own, the run's.

    Raises:
        BadInput: nothing there that can be read.
    """
    folder = Path(source).expanduser()
    if is_published(folder):
        return *read_published(folder), None
    whole = read_whole(find_checkpoint(folder), moments=False)
    if not isinstance(whole.config.model, DecoderConfig):
        raise BadInput(f"{source}: holds no decoder")
    weights = dict(whole.weights)
    if whole.config.model.tie_embeddings:
        weights.setdefault("output.weight", weights["embedding.weight"])
    return weights, whole.config.model, whole.config


def distinct(weights: dict[str, Tensor], config: DecoderConfig) -> dict[str, Tensor]:
    """Tied weights once, as checkpoints have them."""
    return {
        name: tensor
        for name, tensor in weights.items()
        if not (config.tie_embeddings and name == "output.weight")
    }


def run_of(config: DecoderConfig, source: str, out: Path) -> RunConfig:
    """A run that goes on with a published decoder, whose tokenizer is copied into `out`."""
    run = from_mapping({"data": {"seq_len": min(config.max_seq_len, 512)}})
    tokenizer = copy_tokenizer(Path(source), out / "tokenizer")
    return run if tokenizer is None else replace(run, data=replace(run.data, tokenizer=tokenizer))
