"""Flow matching: what a diffusion transformer is trained on, and its loss.

Shape legend: B batch, C channels, H W pixels, K kept tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from adaptive.models.diffusion.model import DiffusionConfig, DiffusionTransformer
from adaptive.routing.keeping import draw_keep_ids


class Draws(NamedTuple):
    """Every random choice of one training batch.

    Attributes:
        noise: [B, C, H, W], ε, standard normal.
        t: [B], times in (0, 1), float32.
        y: int64 [B], labels, some replaced by the null label.
        keep_ids: int64 [B, K], tokens that the middle computes.
        drop_path: bool [B], samples whose middle output is [MASK]; on the host, for the middle to
            leave them out without waiting for the device.
    """

    noise: Tensor
    t: Tensor
    y: Tensor
    keep_ids: Tensor
    drop_path: Tensor


def draw(
    labels_B: Tensor,
    config: DiffusionConfig,
    *,
    class_drop: float = 0.1,
    generator: torch.Generator | None = None,
) -> Draws:
    """Draw all that is random about training on images with these labels.

    Class dropout and path drop are independent of each other. Noise and times come first, so they
    are the same in both training stages from a generator of each batch's own; kept tokens come
    last, and take no numbers where all are kept.

    Args:
        labels_B: int64 [B], labels in [0, num_classes).
        config: of the model: image shape, `keep`, `keeping`, `path_drop`.
        class_drop: probability that a label becomes the null label.
        generator: of the labels' device; torch's default generator if None.

    Source: SPRINT, arXiv 2510.21986, section 4 (training details).
    """
    batch, device = labels_B.shape[0], labels_B.device
    shape = (batch, config.channels, config.image_size, config.image_size)
    noise = torch.randn(shape, generator=generator, device=device)
    t_B = draw_times(batch, generator=generator, device=device)
    drops_2B = torch.rand(2, batch, generator=generator, device=device)
    return Draws(
        noise=noise,
        t=t_B,
        y=torch.where(drops_2B[0] < class_drop, config.num_classes, labels_B),
        keep_ids=draw_keep_ids(
            batch,
            config.grid,
            keep=config.keep,
            keeping=config.keeping,
            generator=generator,
            device=device,
        ),
        drop_path=drops_2B[1] < config.path_drop,
    )


def draw_times(
    batch_size: int,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Times `t = σ / (1 + σ)` with `ln σ ~ N(0, 1)`: float32 [B]."""
    return torch.sigmoid(torch.randn(batch_size, generator=generator, device=device))


def noised(x0_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor) -> Tensor:
    """`x_t = (1 - t) x0 + t ε`."""
    t = t_B.view(-1, *[1] * (x0_BCHW.dim() - 1)).to(x0_BCHW.dtype)
    return (1 - t) * x0_BCHW + t * noise_BCHW


def flow_matching_loss(
    model: DiffusionTransformer, x0_BCHW: Tensor, draws: Draws, *, features: Tensor | None = None
) -> Tensor:
    """Mean squared error of the velocity `ε - x0`, mean over pixels: float32 [B].

    Args:
        model: runs on the tokens and paths that `draws` says.
        x0_BCHW: images or latents.
        draws: from `draw`.
        features: for representation alignment, see `DiffusionTransformer.forward`.
    """
    x_t = noised(x0_BCHW, draws.noise, draws.t)
    # Without keep_ids a training model draws its own; all of them need no gathering.
    draws_own = model.training and model.trunk.keep < 1
    dense = draws.keep_ids.shape[1] == model.config.tokens and not draws_own
    velocity = model(
        x_t,
        draws.t,
        draws.y,
        keep_ids=None if dense else draws.keep_ids,
        drop_path=draws.drop_path,
        features=features,
    )
    error = velocity.float() - (draws.noise - x0_BCHW).float()
    return error.square().flatten(1).mean(1)
