"""Make a mixture of experts of a dense decoder: `python -m launch.convert upcycling SOURCE OUT`.

SOURCE is a run of ours, a checkpoint, or a directory of `transformers` (Llama, Mistral, Qwen 2,
Qwen 3: config.json and *.safetensors). OUT becomes a run's folder, whose first forward equals the
dense model's: `python -m launch.start --config OUT/run.yaml` trains it on (weights without
moments), `launch.generate` samples from it. With --mixtral, OUT becomes a directory of
`transformers` instead, of an upcycled or trained mixture; a Mixtral directory as SOURCE is taken
as it is.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from adaptive.blocks.mixture_of_experts import MixtureOfExpertsConfig
from adaptive.models.convert.upcycling import upcycle
from adaptive.models.decoder.model import DecoderConfig
from adaptive.models.weights.transformers import (
    decoder_config,
    from_transformers,
    mixtral_settings,
    to_mixtral,
)
from launch.checkpoint.beginning import begin_run
from launch.checkpoint.files import find_checkpoint, read_whole, save_tensors
from launch.run.config import from_mapping
from launch.run.errors import BadInput
from launch.run.options import check_seed
from launch.run.plain_data import read_json
from launch.run.sections import RunConfig
from launch.run.terminal import announced
from launch.run.trust import add_trust_option
from launch.run.writable import check_folder


def add_options(parser: argparse.ArgumentParser) -> None:
    add_trust_option(parser)
    parser.add_argument("source", help="a run, a checkpoint, or a directory of transformers")
    parser.add_argument("out", type=Path, help="folder to write; must not exist")
    parser.add_argument("--experts", type=int, default=8, help="experts a layer (default 8)")
    parser.add_argument("--top-k", type=int, default=2, help="experts a token (default 2)")
    parser.add_argument("--every", type=int, default=1, help="experts in every n-th layer")
    parser.add_argument("--router", default="linear", help="linear or hyperspherical")
    parser.add_argument("--seed", type=int, default=0, help="of the routers")
    parser.add_argument("--mixtral", action="store_true", help="write a directory of transformers")


def convert(options: argparse.Namespace) -> Path:
    """Read, upcycle where dense, write; returns what was written."""
    check_seed(options.seed)
    out: Path = options.out
    if out.exists():
        raise BadInput(f"{out}: exists; give a new folder")
    check_folder("out", out)
    try:
        return _convert(options, out)
    except ValueError as error:
        raise BadInput(str(error)) from None


def _convert(options: argparse.Namespace, out: Path) -> Path:
    with announced(f"reading {options.source}"):
        weights, config, run = read(options.source)
    if config.mixture_of_experts is None:
        experts = MixtureOfExpertsConfig(
            num_experts=options.experts,
            top_k=options.top_k,
            schedule=options.every if options.every != 1 else "all",
            router=options.router,
        )
        torch.manual_seed(options.seed)
        weights, config = upcycle(weights, config, experts)
    count = sum({id(tensor): tensor.numel() for tensor in weights.values()}.values())
    assert config.mixture_of_experts is not None
    print(f"{count:,} parameters, {config.mixture_of_experts.num_experts} experts")
    if options.mixtral:
        settings, named = mixtral_settings(config), to_mixtral(weights, config)
        out.mkdir(parents=True)
        save_tensors(named, out / "model.safetensors")
        (out / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        return out
    if run is None:
        run = from_mapping({"data": {"seq_len": min(config.max_seq_len, 512)}})
    return begin_run(run, _distinct(weights, config), output=out, model=config)


def read(source: str) -> tuple[dict[str, Tensor], DecoderConfig, RunConfig | None]:
    """Whole float32 weights, the decoder's configuration and, of our own, the run's.

    Raises:
        BadInput: nothing there that can be read.
    """
    folder = Path(source).expanduser()
    settings_file = folder / "config.json"
    if settings_file.is_file():
        settings = _settings(settings_file)
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise BadInput(f"{folder}: has no *.safetensors")
        config = decoder_config(settings)
        theirs = {name: t.float() for file in files for name, t in _tensors(file).items()}
        return from_transformers(theirs, config), config, None
    whole = read_whole(find_checkpoint(folder), moments=False)
    if not isinstance(whole.config.model, DecoderConfig):
        raise BadInput(f"{source}: holds no decoder")
    weights = dict(whole.weights)
    if whole.config.model.tie_embeddings:
        weights.setdefault("output.weight", weights["embedding.weight"])
    return weights, whole.config.model, whole.config


def _settings(file: Path) -> dict[str, Any]:
    try:
        settings = read_json(file)
    except (OSError, ValueError) as error:
        raise BadInput(f"{file}: is no JSON: {error}") from None
    if not isinstance(settings, dict):
        raise BadInput(f"{file}: must hold the settings of a model")
    return settings


def _tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except SafetensorError as error:
        raise BadInput(f"{file}: cannot be read: {error}") from None


def _distinct(weights: dict[str, Tensor], config: DecoderConfig) -> dict[str, Tensor]:
    """Tied weights once, as checkpoints have them."""
    return {
        name: tensor
        for name, tensor in weights.items()
        if not (config.tie_embeddings and name == "output.weight")
    }
