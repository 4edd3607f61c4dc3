"""Samplers: from noise to images along the velocity of a diffusion transformer.

Time runs from 1 (noise) to 0 (data) in equal steps. Shape legend: B images, C channels, H W.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from adaptive.flops import planned_flops
from adaptive.models.diffusion.merging import merged_attention
from adaptive.models.diffusion.model import DiffusionTransformer, Guidance

Velocity = Callable[[Tensor, float], Tensor]
"""(x [B, ...], t) -> velocity `ε - x0` of the same shape."""

Noise = Callable[[], Tensor]
"""() -> standard normal, shaped like x."""

Sampler = Literal["heun", "euler", "sde"]


@dataclass(frozen=True)
class SamplingConfig:
    """How images are sampled.

    Attributes:
        sampler: "heun" or "euler" integrate the ODE, "sde" is Euler-Maruyama.
        steps: of equal length in time.
        guidance: "path_drop", "classifier_free", or "none".
        scale: guidance scale w of `v_u + w (v_c - v_u)`.
        guidance_low, guidance_high: times between which guidance applies; outside, the
            conditional velocity alone is used.
        merge: share of the tokens that merge around every attention (ToMeSD); 0: none.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    sampler: Sampler = "heun"
    steps: int = 25
    guidance: Literal["path_drop", "classifier_free", "none"] = "path_drop"
    scale: float = 2.0
    guidance_low: float = 0.0
    guidance_high: float = 1.0
    merge: float = 0.0

    def __post_init__(self) -> None:
        if self.sampler not in get_args(Sampler):
            raise ValueError(f"sampler={self.sampler!r}: must be {', '.join(get_args(Sampler))}")
        if self.steps < 1:
            raise ValueError(f"steps={self.steps}: must be at least 1")
        if self.guidance not in (*get_args(Guidance), "none"):
            raise ValueError(
                f"guidance={self.guidance!r}: must be path_drop, classifier_free or none"
            )
        if not 0 <= self.scale < math.inf:
            raise ValueError(f"scale={self.scale}: must be 0 or more and finite")
        if not 0 <= self.guidance_low <= self.guidance_high <= 1:
            raise ValueError(
                f"guidance_low={self.guidance_low}, guidance_high={self.guidance_high}: "
                f"must be 0 <= low <= high <= 1"
            )

        if not 0 <= self.merge < 1:
            raise ValueError(f"merge={self.merge}: must be in [0, 1)")

    def guides(self, t: float) -> bool:
        """Whether guidance applies at time t."""
        applies = self.guidance != "none" and self.scale != 1
        return applies and self.guidance_low <= t <= self.guidance_high


def euler(velocity: Velocity, x: Tensor, steps: int) -> Tensor:
    """First-order integration of `dx = v dt` from t = 1 to t = 0."""
    for t, _ in _intervals(steps):
        x = x - velocity(x, t) / steps
    return x


def heun(velocity: Velocity, x: Tensor, steps: int) -> Tensor:
    """Second-order integration (trapezoidal), two evaluations a step."""
    for t, next_t in _intervals(steps):
        first = velocity(x, t)
        second = velocity(x - first / steps, next_t)
        x = x - (first + second) / (2 * steps)
    return x


def sde(velocity: Velocity, x: Tensor, steps: int, noise: Noise) -> Tensor:
    """Euler-Maruyama on the reverse SDE whose diffusion is `w(t) = t`; no noise in the last step.

    `dx = (v - ½ w s) dt + √w dW` with the score `s = -(x + (1 - t) v) / t`, so that
    `-½ w s = ½ (x + (1 - t) v)` is finite everywhere.

    Source: SiT, arXiv 2401.08740, section 3 (diffusion coefficient σ_t).
    """
    for t, next_t in _intervals(steps):
        v = velocity(x, t)
        x = x - (v + 0.5 * (x + (1 - t) * v)) / steps
        if next_t > 0:
            x = x + (t / steps) ** 0.5 * noise()
    return x


@torch.no_grad()
def sample(
    model: DiffusionTransformer,
    labels_B: Tensor,
    config: SamplingConfig,
    *,
    seed: int = 0,
    first: int = 0,
) -> Tensor:
    """Images for the given labels: float32 [B, C, H, W].

    Every image has random numbers of its own, from (seed, first + its place), so it does not
    depend on the batch that it is sampled in.

    Args:
        model: used in evaluation mode, and left in the mode it was in.
        labels_B: int64 [B], on the model's device; the null label samples without a class.
        config: sampler and guidance.
        seed: of the noise.
        first: number of the first image.

    Raises:
        ValueError: if a label is out of range.
    """
    classes = model.config.num_classes
    wrong = labels_B[(labels_B < 0) | (labels_B > classes)]
    if len(wrong):
        raise ValueError(f"label {int(wrong[0])}: must be between 0 and {classes - 1}")
    noise = image_noise(model, range(first, first + len(labels_B)), seed, labels_B.device)

    def velocity(x: Tensor, t: float) -> Tensor:
        t_B = torch.full((x.shape[0],), t, device=x.device)
        if not config.guides(t):
            return model(x, t_B, labels_B).float()
        guidance: Guidance = "path_drop" if config.guidance == "path_drop" else "classifier_free"
        return model.guided(x, t_B, labels_B, scale=config.scale, guidance=guidance).float()

    training = model.training
    model.eval()
    try:
        x = noise()
        with merged_attention(model, config.merge, seed=seed):
            if config.sampler == "sde":
                return sde(velocity, x, config.steps, noise)
            return (heun if config.sampler == "heun" else euler)(velocity, x, config.steps)
    finally:
        model.train(training)


def image_noise(
    model: DiffusionTransformer,
    images: Sequence[int],
    seed: int,
    device: torch.device | str | None = None,
) -> Noise:
    """Standard normal of numbered images, each from a generator of its own."""
    config = model.config
    shape = (config.channels, config.image_size, config.image_size)
    # Drawn on the CPU: the same images on every device. An odd factor keeps (seed, image) apart.
    generators = [
        torch.Generator().manual_seed((seed * 0x9E3779B97F4A7C15 + image) % 2**63)
        for image in images
    ]
    return lambda: torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)


def operations_per_image(model: DiffusionTransformer, config: SamplingConfig) -> int:
    """Floating-point operations of sampling one image."""
    times = [t for t, _ in _intervals(config.steps)]
    if config.sampler == "heun":
        times += [t for _, t in _intervals(config.steps)]
    guided = sum(config.guides(t) for t in times)
    training = model.training
    model.eval()
    with merged_attention(model, config.merge):
        plain = planned_flops(model, 1, model.config.tokens)
        guidance: Guidance = "path_drop" if config.guidance == "path_drop" else "classifier_free"
        of_guided = model.guided_flops(1, guidance=guidance) if guided else 0
    model.train(training)
    return guided * of_guided + (len(times) - guided) * plain


def _intervals(steps: int) -> list[tuple[float, float]]:
    # As fractions, rounded once: 1 - 8 / 10 lies below the 0.2 at which guidance may end.
    return [((steps - i) / steps, (steps - i - 1) / steps) for i in range(steps)]
