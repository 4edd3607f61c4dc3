"""Make a mixture of experts of a dense decoder: `python -m launch.convert upcycling SOURCE OUT`.

SOURCE is a run of ours, a checkpoint, or what `launch.convert transformers` takes. OUT becomes a
run's folder, whose first forward equals the dense model's: `python -m launch.start --config
OUT/run.yaml` trains it on (weights without moments), `launch.generate` samples from it, and
`launch.convert to_transformers` makes a Mixtral of it. A mixture as SOURCE is taken as it is.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from adaptive.blocks.mixture_of_experts import MixtureOfExpertsConfig
from adaptive.models.convert.upcycling import upcycle
from launch.checkpoint.beginning import begin_run
from launch.conversions.source import distinct, read, run_of
from launch.run.errors import BadInput
from launch.run.options import check_seed
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
    run = run_of(config, options.source, out) if run is None else run
    return begin_run(run, distinct(weights, config), output=out, model=config)
