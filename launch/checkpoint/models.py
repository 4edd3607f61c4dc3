"""The model of a checkpoint on one rank: read, held against held-out data, shown training rows."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from adaptive.models.decoder.model import Decoder
from launch.checkpoint.files import find_checkpoint, load_model
from launch.run.errors import BadInput
from launch.run.sections import RunConfig
from launch.run.terminal import announced
from launch.run.trust import add_trust_option
from launch.tasks import Task
from launch.tasks.language_model import LanguageModelTask
from launch.tasks.registry import make_task


@dataclass(frozen=True)
class SavedModel:
    """The model of a checkpoint.

    Attributes:
        model: in evaluation mode.
        config: of its run.
        task: of its run, on one rank and the CPU.
        folder: the checkpoint.
    """

    model: nn.Module
    config: RunConfig
    task: Task
    folder: Path


@dataclass(frozen=True)
class SavedDecoder(SavedModel):
    """The text decoder of a checkpoint."""

    model: Decoder


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """The argument of every program that reads one checkpoint."""
    add_trust_option(parser)
    parser.add_argument("checkpoint", help="a checkpoint, or the folder of a run: its newest")


def add_device(parser: argparse.ArgumentParser) -> None:
    """The option `--device`, for `load_decoder`."""
    parser.add_argument("--device", help="cpu, cuda, cuda:1; by default cuda where there is one")


def load_decoder(path: str | Path, *, device: str | None = "cpu") -> SavedDecoder:
    """Read the decoder of a run or checkpoint.

    Args:
        path: see `find_checkpoint`.
        device: where it goes; None: the best there is.

    Raises:
        BadInput: no such device or checkpoint, or it holds another kind of model.
    """
    saved = load_language_model(path, device=device)
    if not isinstance(saved, SavedDecoder):
        raise BadInput(f"{path}: holds a {type(saved.model).__name__}, not a text decoder of ours")
    return saved


def load_language_model(path: str | Path, *, device: str | None = "cpu") -> SavedModel:
    """Read a run's decoder (then a SavedDecoder), or its causal model of transformers.

    Args, Raises: as `load_decoder`.
    """
    where = choose_device(device)
    folder = find_checkpoint(path)
    model, config = load_model(folder)
    model, task = model.to(where), make_task(config)
    if isinstance(model, Decoder):
        return SavedDecoder(model, config, task, folder)
    if not isinstance(task, LanguageModelTask):
        raise BadInput(f"{path}: holds a {type(model).__name__}, not a text decoder")
    return SavedModel(model, config, task, folder)


def choose_device(name: str | None) -> torch.device:
    """The device of `--device`; None: the best there is.

    Raises:
        BadInput: no such device.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"--device={name}: {str(error).splitlines()[0]}") from None
    return device


@torch.no_grad()
def held_out_loss(
    model: nn.Module, task: Task, *, rows: int | None = None, at_once: int = 8
) -> float:
    """Mean loss over the task's fixed held-out rows.

    Args:
        model: as it is, in evaluation mode.
        task: on one rank.
        rows: the first so many; None: all.
        at_once: rows of one forward.
    """
    last = task.validation_rows if rows is None else min(rows, task.validation_rows)
    total, count = 0.0, 0
    with (
        announced(f"measuring the loss of {last} held-out rows"),
        torch.random.fork_rng(devices=[]),
    ):
        torch.manual_seed(0)
        for start in range(0, last, at_once):
            batch = task.validation_batch(range(start, min(start + at_once, last)))
            value, number = task.validation_sums(model, batch)["loss"]
            total, count = total + float(value), count + number
    return total / count


def training_ids(task: Task, batch_size: int) -> Iterator[Tensor]:
    """int64 [B, S] token ids of a text run's training stream, from its beginning.

    Raises:
        BadInput: its rows are packed, so that ids alone do not say what a text is.
    """
    if task.config.data.packing != "windows":
        raise BadInput(
            f"data.packing={task.config.data.packing}: must be windows for a program that learns "
            "from plain text; train the run's own recipe to learn from packed rows"
        )
    row = 0
    while True:
        yield task.batch(range(row, row + batch_size))["input_ids"]
        row += batch_size
