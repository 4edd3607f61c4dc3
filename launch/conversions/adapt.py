"""Make a dense decoder one whose layers are routed: `launch.convert adapt SOURCE OUT key=value …`.

    python -m launch.convert adapt runs/dense runs/routed \
        'model.mixture_of_depths={capacity: 0.5, schedule: [3, 5]}' train.steps=200

SOURCE is a run of ours, a checkpoint, or what `launch.convert transformers` takes. Keys name the
methods that wrap layers (Mixture-of-Depths, SkipLayer, …) and whatever else of the run is new. OUT
becomes a run's folder: trained layers as they were, routers drawn. `--layers` instead makes a dense
model of some of the layers, which costs as much as a routed one: the control to train beside it.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from adaptive.blocks.method import methods
from adaptive.models.convert.layers import keep_layers, wrap_layers
from adaptive.models.decoder.model import DecoderConfig
from launch.checkpoint.beginning import begin_run
from launch.conversions.source import distinct, read, run_of
from launch.run.config import load_config, save_resolved
from launch.run.errors import BadInput
from launch.run.options import check_seed
from launch.run.sections import RunConfig
from launch.run.terminal import announced
from launch.run.trust import add_trust_option
from launch.run.writable import check_folder


def add_options(parser: argparse.ArgumentParser) -> None:
    add_trust_option(parser)
    parser.add_argument("source", help="a run, a checkpoint, or a model of transformers")
    parser.add_argument("out", type=Path, help="folder to write; must not exist")
    parser.add_argument("--layers", metavar="N,N,…", help="a dense model of these, in this order")
    parser.add_argument("--seed", type=int, default=0, help="of the routers")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the run to come")


def convert(options: argparse.Namespace) -> Path:
    """Read, wrap or leave out layers, write; returns what was written."""
    check_seed(options.seed)
    out: Path = options.out
    if out.exists():
        raise BadInput(f"{out}: exists; give a new folder")
    check_folder("out", out)
    with announced(f"reading {options.source}"):
        weights, dense, run = read(options.source)
    run = run_of(dense, options.source, out) if run is None else run
    run = dataclasses.replace(run, model=dense)
    torch.manual_seed(options.seed)
    try:
        if options.layers is not None:
            layers = [_whole_number(word) for word in options.layers.split(",")]
            weights, dense = keep_layers(weights, dense, layers)
            run = _overridden(dataclasses.replace(run, model=dense), options.overrides)
            if run.model != dense:
                raise ValueError("--layers makes a dense model: give no keys of the section model")
        else:
            run = _overridden(run, [*_defaults(dense, options.overrides), *options.overrides])
            assert isinstance(run.model, DecoderConfig)
            weights = wrap_layers(weights, dense, run.model)
    except ValueError as error:
        raise BadInput(str(error)) from None
    assert isinstance(run.model, DecoderConfig)
    return begin_run(run, distinct(weights, run.model), output=out)


def _whole_number(word: str) -> int:
    if not word.strip().isdecimal():
        raise ValueError(f"--layers: {word!r}: must be numbers of layers, as 0,1,3")
    return int(word)


def _overridden(run: RunConfig, overrides: list[str]) -> RunConfig:
    with TemporaryDirectory() as folder:
        save_resolved(run, Path(folder) / "run.yaml")
        return load_config(Path(folder) / "run.yaml", overrides)


def _defaults(dense: DecoderConfig, overrides: list[str]) -> list[str]:
    """What differs by default where a method goes into layers that are trained."""
    given = {word.partition("=")[0].partition(".")[2].partition(".")[0] for word in overrides}
    return [
        f"model.{method.name}.{key}={value}"
        for method in methods("layer")
        if method.name in given and getattr(dense, method.name) is None
        for key, value in method.pretrained.items()
    ]
