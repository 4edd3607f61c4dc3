r"""TokenFormer checkpoints from and to their published form.

    python -m launch.convert tokenformer load weights.safetensors --num-heads 12 \
        --output runs/150M
    python -m launch.convert tokenformer save runs/tokenformer_lm weights.safetensors

`load` begins a run with published weights (safetensors, or a .bin or .pt of tensors) and prints the
command that trains it on; --config names the recipe of everything but the model. `save` writes a
run's weights under their published names.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from adaptive.models.decoder.model import Decoder
from adaptive.models.weights.tokenformer import from_tokenformer_state_dict, tokenformer_state_dict
from launch.checkpoint.files import load_model, named_tensors, save_tensors, write_whole
from launch.checkpoint.state import RunState, WholeState
from launch.run.config import load_config, save_resolved
from launch.run.errors import BadInput, OneLineParser, exit_on_bad_input
from launch.run.terminal import command
from launch.run.writable import check_file, check_folder
from parallel.checkpoint import newest_intact, save_atomically


def main(arguments: list[str] | None = None) -> None:
    parser = OneLineParser(
        prog="python -m launch.convert tokenformer",
        description=__doc__,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    load = commands.add_parser("load", help="begin a run with published weights")
    load.add_argument("weights", help="file of published weights")
    load.add_argument("--num-heads", type=int, required=True)
    load.add_argument("--config", metavar="YAML", help="recipe of everything but the model")
    load.add_argument("--output", required=True, metavar="DIR", help="folder of the run")
    save = commands.add_parser("save", help="write a run's weights under published names")
    save.add_argument("checkpoint", help="a checkpoint, or a run")
    save.add_argument("weights", help="safetensors file to write")
    with exit_on_bad_input():
        options = parser.parse_args(arguments)
        if options.command == "load":
            written = load_published(
                Path(options.weights),
                Path(options.output),
                num_heads=options.num_heads,
                recipe=options.config,
            )
        else:
            written = save_published(options.checkpoint, Path(options.weights))
    print(f"written {written}")
    if options.command == "load":
        print(f"continue {command('launch.start', '--config', Path(options.output) / 'run.yaml')}")


def load_published(
    weights: Path, output: Path, *, num_heads: int, recipe: str | None = None
) -> Path:
    """Begin the run `output` with published weights; its checkpoint.

    Raises:
        BadInput: the file holds no TokenFormer, or the output cannot be written or holds
            checkpoints.
    """
    check_folder("--output", output)
    if newest_intact(output / "checkpoints") is not None:
        raise BadInput(f"--output={output}: already holds checkpoints; choose a new folder")
    config = load_config(recipe, [f"output={output}"])
    try:
        model = from_tokenformer_state_dict(_read(weights), num_heads=num_heads)
    except ValueError as error:
        raise BadInput(f"{weights}: {error}") from None
    config = replace(config, model=model.config, phases=[])
    tensors = {name: _float(tensor.detach()) for name, tensor in named_tensors(model).items()}
    whole = WholeState(weights=tensors, exp_avg={}, exp_avg_sq={}, state=RunState(), config=config)
    checkpoint = save_atomically(output / "checkpoints", 0, lambda to: write_whole(to, whole))
    save_resolved(config, output / "run.yaml")
    return checkpoint


def save_published(checkpoint: str, weights: Path) -> Path:
    """Write a run's weights under their published names.

    Raises:
        BadInput: its model has no published form, or the file cannot be written.
    """
    check_file("weights", weights)
    model, _ = load_model(checkpoint)
    if not isinstance(model, Decoder):
        raise BadInput(f"{checkpoint}: must be a language model")
    try:
        save_tensors(tokenformer_state_dict(model), weights)
    except ValueError as error:
        raise BadInput(f"{checkpoint}: {error}") from None
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
