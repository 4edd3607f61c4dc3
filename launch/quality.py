"""Measure the quality of samples: a classifier's accuracy, and the Fréchet distance.

The classifier is trained here on the run's real training images. Accuracy: how often it finds the
class that a sample was asked to be. Fréchet distance: between samples and real images, in the
classifier's features.

    python -m launch.quality runs/sprint_dit --samples 1000 --json quality.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from adaptive.models.diffusion.samplers import SamplingConfig
from launch.data.images import ImageData
from launch.generation.images import (
    add_sampling_options,
    draw_samples,
    load_diffusion,
    sampling_config,
)
from launch.generation.quality import FEATURES, Judge
from launch.run.errors import BadInput, OneLineParser, program
from launch.run.options import check_counts, check_seed
from launch.run.terminal import announced
from launch.run.writable import check_file


@program
def main(arguments: list[str] | None = None) -> None:
    """Measure each kind of guidance asked for; print a table, write JSON where asked."""
    options = _options(arguments)
    model, run = load_diffusion(options.checkpoint, weights=options.weights)
    data = ImageData(run.data, run.model)
    with announced("training the classifier on real images"):
        judge = Judge(data, num_classes=run.model.num_classes)
    rows = [{"guidance": "real images", **judge.of_real_images()}]
    guided = [options.guidance] if options.guidance else ["path_drop", "classifier_free"]
    for guidance in guided:
        options.guidance = guidance
        config = sampling_config(run, options)
        labels = torch.arange(options.samples) % len(data.source.classes)
        samples = draw_samples(
            model, labels, config, seed=options.seed, batch_size=options.batch_size
        )
        rows.append(
            {
                **_described(config),
                **judge.of_samples(samples.images, labels),
                "samples": options.samples,
                "operations_per_image": samples.operations,
                "images_per_second": round(options.samples / samples.seconds, 1),
            }
        )
    for row in rows:
        print(
            f"{row['guidance']:<16} accuracy {row['accuracy']:.3f}  "
            f"Fréchet distance {row['frechet_distance']:.3f}"
        )
    if options.json is not None:
        Path(options.json).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def _described(config: SamplingConfig) -> dict[str, object]:
    return {
        "guidance": config.guidance,
        "scale": config.scale,
        "interval": [config.guidance_low, config.guidance_high],
        "sampler": config.sampler,
        "steps": config.steps,
    }


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = OneLineParser(
        prog="python -m launch.quality",
        description=__doc__,
        epilog="Without --guidance, path-drop and classifier-free guidance are both measured.",
    )
    add_sampling_options(parser)
    parser.add_argument("--samples", type=int, default=1000, help="images to sample")
    parser.add_argument("--json", metavar="FILE", help="write the figures here")
    options = parser.parse_args(arguments)
    if options.samples < FEATURES:
        raise BadInput(f"--samples={options.samples}: must be at least {FEATURES}")
    check_counts(options, "batch_size")
    check_seed(options.seed)
    if options.json is not None:
        check_file("--json", options.json)
    return options


if __name__ == "__main__":
    main()
