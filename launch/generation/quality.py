"""How good sampled images are, by a small classifier of the real ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from launch.data.images import ImageData
from launch.run.errors import BadInput

FEATURES = 64


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
