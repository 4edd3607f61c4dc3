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
import torch.nn.functional as F
from torch import Tensor, nn

from adaptive.models.diffusion.samplers import SamplingConfig
from launch.data.images import ImageData
from launch.run.errors import BadInput, OneLineParser, exit_on_bad_input
from launch.run.options import check_counts, check_seed
from launch.run.writable import check_file
from launch.sample import (
    add_sampling_options,
    draw_samples,
    load_diffusion,
    sampling_config,
)

FEATURES = 64


def main(arguments: list[str] | None = None) -> None:
    """Measure each kind of guidance asked for; print a table, write JSON where asked."""
    with exit_on_bad_input():
        options = _options(arguments)
        model, run = load_diffusion(options.checkpoint, weights=options.weights)
        data = ImageData(run.data, run.model)
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


class Judge:
    """A small classifier of the real training images, and the statistics of its features.

    Args:
        data: real images; the training part trains, the held-out part measures it.
        num_classes: of the model.
        seed: of the classifier.
        epochs: of its training.
    """

    def __init__(
        self, data: ImageData, *, num_classes: int, seed: int = 0, epochs: int = 30
    ) -> None:
        self.data = data
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.classifier = Classifier(data.source.image(0).shape[0], num_classes)
            self._train(epochs)
        self.classifier.eval()
        self._real = self.features(data.images(data.train))

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """float64 [N, FEATURES]."""
        parts = [self.classifier.features(part) for part in images.split(256)]
        return torch.cat(parts).double()

    @torch.no_grad()
    def of_samples(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        """Accuracy against the labels, and Fréchet distance to the real training images."""
        features = self.features(images)
        predicted = self.classifier.output(features.float()).argmax(1)
        return {
            "accuracy": float((predicted == labels).double().mean()),
            "frechet_distance": float(frechet_distance(features, self._real)),
        }

    def of_real_images(self) -> dict[str, float]:
        """What held-out real images reach: the mark for samples."""
        held_out = self.data.validation
        if len(held_out) < 2:
            raise BadInput("data.validation_fraction: leaves no held-out images to measure with")
        return self.of_samples(self.data.images(held_out), self.data.labels(held_out))

    def _train(self, epochs: int) -> None:
        images = self.data.images(self.data.train)
        labels = self.data.labels(self.data.train)
        optimizer = torch.optim.AdamW(self.classifier.parameters(), lr=2e-3, weight_decay=0.01)
        for _ in range(epochs):
            for rows in torch.randperm(len(labels)).split(128):
                loss = F.cross_entropy(self.classifier(images[rows]), labels[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()


class Classifier(nn.Module):
    """Three convolutions and two linear layers; `features` is the layer before the last."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(256, FEATURES),
            nn.ReLU(),
        )
        self.output = nn.Linear(FEATURES, num_classes)

    def features(self, images: Tensor) -> Tensor:
        return self.body(images)

    def forward(self, images: Tensor) -> Tensor:
        return self.output(self.body(images))


def frechet_distance(a_NF: Tensor, b_MF: Tensor) -> Tensor:
    """`|μa - μb|² + tr(Σa + Σb - 2 (Σa Σb)^½)` of two sets of features, float64.

    Source: arXiv 1706.08500, equation 6.
    """
    a_NF, b_MF = a_NF.double(), b_MF.double()
    mean_gap = (a_NF.mean(0) - b_MF.mean(0)).square().sum()
    cov_a, cov_b = torch.cov(a_NF.T), torch.cov(b_MF.T)
    # tr((Σa Σb)^½) from symmetric matrices only: the eigenvalues of Σa^½ Σb Σa^½.
    values, vectors = torch.linalg.eigh(cov_a)
    root_a = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    crossed = torch.linalg.eigvalsh(root_a @ cov_b @ root_a).clamp(min=0).sqrt().sum()
    return mean_gap + cov_a.trace() + cov_b.trace() - 2 * crossed


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
