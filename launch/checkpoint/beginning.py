"""The beginning of a run: weights as its first checkpoint, and the run.yaml that trains it on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from launch.checkpoint.files import write_whole
from launch.checkpoint.state import RunState, WholeState
from launch.run.config import save_resolved
from launch.run.errors import BadInput
from launch.run.sections import RunConfig
from launch.run.terminal import command
from launch.run.writable import check_folder
from parallel.checkpoint import newest_intact, save_atomically


def check_new_run(output: Path, *, source: Path | None = None) -> None:
    """Check that a new run can begin in `output` without touching another.

    Args:
        output: folder of the run to come.
        source: the checkpoint that it is made of.

    Raises:
        BadInput: it cannot be written, is the source's folder, or holds checkpoints.
    """
    check_folder("--output", output)
    if source is not None:
        run = source.parent.parent if source.parent.name == "checkpoints" else source
        if output.resolve() in (source.resolve(), source.resolve().parent, run.resolve()):
            raise BadInput(f"--output={output}: must be another folder than the source's")
    if newest_intact(output / "checkpoints") is not None:
        raise BadInput(f"--output={output}: already holds checkpoints; choose a new folder")


def config_of_new_run(config: RunConfig, output: Path, **sections: Any) -> RunConfig:
    """The configuration of a run of its own in `output`, of one phase, with some other sections."""
    checkpoint = replace(config.checkpoint, resume="auto")
    return replace(config, output=str(output), phases=[], checkpoint=checkpoint, **sections)


def begin_run(
    config: RunConfig, weights: dict[str, Tensor], *, output: Path, **sections: Any
) -> Path:
    """Write the beginning of the run `output`: weights without moments, at step 0.

    Args:
        config: of the run that they come from.
        weights: float32, under the model's names; tied weights once.
        output: folder of the new run.
        sections: of the configuration that are others, such as `model`.

    Returns:
        The checkpoint.
    """
    config = config_of_new_run(config, output, **sections)
    whole = WholeState(
        {name: tensor.detach() for name, tensor in weights.items()}, {}, {}, RunState(), config
    )
    return write_run(whole)


def write_run(whole: WholeState) -> Path:
    """Write a state as the newest checkpoint of its run, and the run's configuration."""
    output = Path(whole.config.output)
    checkpoint = save_atomically(
        output / "checkpoints", whole.state.step, lambda folder: write_whole(folder, whole)
    )
    save_resolved(whole.config, output / "run.yaml")
    return checkpoint


def how_to_train(output: Path) -> str:
    """The command that trains a run which has been begun."""
    return command("launch.start", "--config", output / "run.yaml")
