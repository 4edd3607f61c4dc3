r"""TokenFormer checkpoints from and to their published form.

    python -m launch.convert tokenformer load weights.safetensors --num-heads 12 \
        --output runs/150M
    python -m launch.convert tokenformer save runs/tokenformer_lm weights.safetensors

`load` begins a run with published weights (safetensors, or a .bin or .pt of tensors); --config
names the recipe of everything but the model. `save` writes a run's weights under their published
names.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from adaptive.models.weights.tokenformer import from_tokenformer_state_dict, tokenformer_state_dict
from launch.checkpoint.beginning import begin_run, check_new_run
from launch.checkpoint.files import named_tensors, save_tensors
from launch.checkpoint.models import add_checkpoint, load_decoder
from launch.run.config import load_config
from launch.run.errors import BadInput, as_bad_input
from launch.run.terminal import announced
from launch.run.writable import check_file


def add_options(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="command", required=True)
    load = commands.add_parser("load", help="begin a run with published weights")
    load.add_argument("weights", type=Path, help="file of published weights")
    load.add_argument("--num-heads", type=int, required=True)
    load.add_argument("--config", metavar="YAML", help="recipe of everything but the model")
    load.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the run")
    save = commands.add_parser("save", help="write a run's weights under published names")
    add_checkpoint(save)
    save.add_argument("weights", type=Path, help="safetensors file to write")


def convert(options: argparse.Namespace) -> Path:
    """Load or save; returns what was written."""
    if options.command == "save":
        return save_published(options.checkpoint, options.weights)
    return load_published(
        options.weights, options.output, num_heads=options.num_heads, recipe=options.config
    )


def load_published(
    weights: Path, output: Path, *, num_heads: int, recipe: str | None = None
) -> Path:
    """Begin the run `output` with published weights; its checkpoint.

    Raises:
        BadInput: the file holds no TokenFormer, or the output cannot be written or holds
            checkpoints.
    """
    check_new_run(output)
    config = load_config(recipe, [f"output={output}"])
    with as_bad_input(weights), announced(f"reading {weights}"):
        model = from_tokenformer_state_dict(_read(weights), num_heads=num_heads)
    tensors = {name: _float(tensor) for name, tensor in named_tensors(model).items()}
    return begin_run(config, tensors, output=output, model=model.config)


def save_published(checkpoint: str, weights: Path) -> Path:
    """Write a run's weights under their published names.

    Raises:
        BadInput: its model has no published form, or the file cannot be written.
    """
    check_file("weights", weights)
    model = load_decoder(checkpoint).model
    with as_bad_input(checkpoint):
        save_tensors(tokenformer_state_dict(model), weights)
    return weights


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise BadInput(f"{path}: no such file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # an unpickler meets anything in a damaged file
        raise BadInput(f"{path}: cannot be read: {error}") from None
    if not isinstance(tensors, dict):
        raise BadInput(f"{path}: must hold a dictionary of tensors")
    return tensors


def _float(tensor: Tensor) -> Tensor:
    """Half precision as float32, as checkpoints have it; float64 stays."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
