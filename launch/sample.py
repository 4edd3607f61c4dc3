"""Sample images from a trained diffusion transformer: a PNG grid, an .npz archive, or both.

python -m launch.sample runs/sprint_dit --png samples.png --npz samples.npz
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from launch.generation.images import (
    add_sampling_options,
    draw_samples,
    load_diffusion,
    sampling_config,
    write_npz,
    write_png,
)
from launch.run.errors import BadInput, OneLineParser, program
from launch.run.options import check_counts, check_seed
from launch.run.writable import check_file


@program
def main(arguments: list[str] | None = None) -> None:
    """Sample, write what was asked for, print what it cost."""
    options = _parser().parse_args(arguments)
    check_seed(options.seed)
    outputs = []
    for name, path in (("--png", options.png), ("--npz", options.npz)):
        if path is not None:
            check_file(name, path)
            outputs.append(Path(path))
    model, run = load_diffusion(options.checkpoint, weights=options.weights)
    config = sampling_config(run, options)
    labels = _labels(options, model.config.num_classes)
    if options.png is not None and model.config.channels not in (1, 3):
        raise BadInput(
            f"--png={options.png}: {model.config.channels} channels are no picture: use --npz"
        )
    samples = draw_samples(model, labels, config, seed=options.seed, batch_size=options.batch_size)
    print(samples.line)
    if options.png is not None:
        write_png(samples.images, Path(options.png), columns=options.per_class)
    if options.npz is not None:
        write_npz(samples, Path(options.npz))
    for path in outputs:
        print(f"written {path}")


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="python -m launch.sample",
        description=__doc__,
        epilog="Options left out are those of the run's section sampling.",
    )
    add_sampling_options(parser)
    parser.add_argument("--labels", help="class numbers, e.g. 0,3,7; by default all")
    parser.add_argument("--per-class", type=int, default=8, help="images of every class")
    parser.add_argument("--png", metavar="FILE", help="write a grid, one row a class")
    parser.add_argument("--npz", metavar="FILE", help="write an archive for evaluation programs")
    return parser


def _labels(options: argparse.Namespace, num_classes: int) -> Tensor:
    check_counts(options, "per_class", "batch_size")
    words = options.labels.split(",") if options.labels else [str(n) for n in range(num_classes)]
    for word in words:
        # `isdigit` takes what `int` does not, such as a superscript.
        if not word.strip().isdecimal() or int(word) >= num_classes:
            raise BadInput(
                f"--labels={options.labels}: {word!r} must be between 0 and {num_classes - 1}"
            )
    return torch.tensor([int(word) for word in words]).repeat_interleave(options.per_class)


if __name__ == "__main__":
    main()
