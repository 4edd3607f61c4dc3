"""The Fréchet distance against its closed form, and the judge against real digits."""

import pytest
import torch

from adaptive.models import DiffusionConfig
from launch.data.images import ImageConfig, ImageData
from launch.generation.quality import Judge, frechet_distance


def features_with(mean: torch.Tensor, scale: torch.Tensor, count: int = 400) -> torch.Tensor:
    """Features whose sample mean and covariance are exactly `mean` and `diag(scale²)`."""
    generator = torch.Generator().manual_seed(count)
    raw = torch.randn(count, len(mean), generator=generator, dtype=torch.float64)
    raw = raw - raw.mean(0)
    white = torch.linalg.solve_triangular(
        torch.linalg.cholesky(torch.cov(raw.T)), raw.T, upper=False
    ).T
    return white * scale + mean


def test_frechet_distance_of_gaussians_is_the_closed_form() -> None:
    a_mean, b_mean = torch.tensor([0.0, 1, 2]), torch.tensor([1.0, 1, 0])
    a_scale, b_scale = torch.tensor([1.0, 2, 3]), torch.tensor([2.0, 2, 1])
    a, b = features_with(a_mean, a_scale), features_with(b_mean, b_scale, 500)
    want = ((a_mean - b_mean) ** 2).sum() + ((a_scale - b_scale) ** 2).sum()
    assert float(frechet_distance(a, b)) == pytest.approx(float(want), rel=1e-9)
    assert float(frechet_distance(a, a)) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_ignores_a_common_rotation() -> None:
    a = torch.randn(100, 4, dtype=torch.float64) * torch.tensor([1, 2, 3, 4])
    b = torch.randn(80, 4, dtype=torch.float64) + 1
    turn = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    torch.testing.assert_close(frechet_distance(a @ turn, b @ turn), frechet_distance(a, b))


def test_the_judge_knows_real_digits_and_tells_noise_apart() -> None:
    model = DiffusionConfig(image_size=8, channels=1, patch_size=2, num_classes=10)
    data = ImageData(ImageConfig(), model)
    judge = Judge(data, num_classes=10, epochs=8)
    real = judge.of_real_images()
    assert real["accuracy"] > 0.9
    held_out = data.labels(data.validation)
    noise = torch.rand(len(held_out), 1, 8, 8) * 2 - 1
    assert judge.of_samples(noise, held_out)["accuracy"] < 0.4
    assert judge.of_samples(noise, held_out)["frechet_distance"] > 5 * real["frechet_distance"]
    wrong = judge.of_samples(data.images(data.validation), (held_out + 1) % 10)
    assert wrong["accuracy"] < 0.1
