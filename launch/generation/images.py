"""Images drawn from a trained diffusion transformer, and the files they go into."""

from __future__ import annotations

import argparse
import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from adaptive.models.diffusion.model import DiffusionTransformer
from adaptive.models.diffusion.samplers import SamplingConfig, operations_per_image, sample
from launch.checkpoint.files import TASK_STATE, find_checkpoint, load_model
from launch.checkpoint.models import add_checkpoint
from launch.data.images import tile, to_pixels
from launch.run.errors import BadInput
from launch.run.sections import RunConfig
from launch.run.terminal import announced
from launch.tasks.diffusion import averaged_weights


@dataclass(frozen=True)
class Samples:
    """Sampled images, and what they cost.

    Attributes:
        images: float32 [N, C, H, W] on the CPU.
        labels: int64 [N].
        operations: floating-point operations of one image.
        seconds: for all of them.
    """

    images: Tensor
    labels: Tensor
    operations: int
    seconds: float

    @property
    def line(self) -> str:
        """Cost and speed in one line."""
        number = len(self.images)
        return (
            f"{number} images in {self.seconds:.1f} s: {number / self.seconds:.1f} images/s, "
            f"{self.operations / 1e6:,.1f} MFLOP an image"
        )


def load_diffusion(
    checkpoint: str | Path, *, weights: str = "average"
) -> tuple[DiffusionTransformer, RunConfig]:
    """The model of a run or checkpoint, on the GPU if there is one.

    Args:
        checkpoint: a checkpoint folder, or a run's folder.
        weights: "average" (the moving average) or "trained".

    Raises:
        BadInput: no checkpoint there, not of a diffusion run, or without an average.
    """
    folder = find_checkpoint(checkpoint)
    model, config = load_model(folder)
    if not isinstance(model, DiffusionTransformer):
        raise BadInput(f"{folder}: is a checkpoint of task={config.task}, must be of diffusion")
    if weights == "average":
        state = folder / TASK_STATE
        averaged = averaged_weights(load_file(state)) if state.is_file() else {}
        if not averaged:
            raise BadInput(f"{folder}: holds no averaged weights; use --weights=trained")
        model.load_state_dict(averaged, strict=False)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), config


def sampling_config(run: RunConfig, options: argparse.Namespace) -> SamplingConfig:
    """The run's own sampling options, with those given on the command line."""
    low, high = options.interval if options.interval is not None else (None, None)
    given = {
        "sampler": options.sampler,
        "steps": options.steps,
        "guidance": options.guidance,
        "scale": options.scale,
        "guidance_low": low,
        "guidance_high": high,
        "merge": options.merge,
    }
    changes = {name: value for name, value in given.items() if value is not None}
    try:
        return dataclasses.replace(run.sampling, **changes)
    except ValueError as error:
        raise BadInput(f"--{error}") from None


def draw_samples(
    model: DiffusionTransformer,
    labels_N: Tensor,
    config: SamplingConfig,
    *,
    seed: int = 0,
    batch_size: int = 64,
) -> Samples:
    """Sample an image for every label, in batches; the images do not depend on the batches."""
    device = next(model.parameters()).device
    begun = time.perf_counter()
    with announced(f"sampling {len(labels_N)} images"):
        images = [
            sample(model, part.to(device), config, seed=seed, first=start * batch_size).cpu()
            for start, part in enumerate(labels_N.split(batch_size))
        ]
    return Samples(
        images=torch.cat(images),
        labels=labels_N,
        operations=operations_per_image(model, config),
        seconds=time.perf_counter() - begun,
    )


def write_png(images: Tensor, path: Path, *, columns: int) -> None:
    """Write a grid of pictures, enlarged to at least 32 pixels each."""
    from PIL import Image

    sheet = tile(to_pixels(images), columns, zoom=max(1, 32 // images.shape[-1]))
    Image.fromarray(sheet[:, :, 0] if sheet.shape[-1] == 1 else sheet).save(path, format="PNG")


def write_npz(samples: Samples, path: Path) -> None:
    """Write pictures as `arr_0` uint8 [N, H, W, C], latents as float32 [N, C, H, W]; `labels`."""
    pictures = samples.images.shape[1] in (1, 3)
    images = to_pixels(samples.images) if pictures else samples.images.numpy()
    with open(path, "wb") as out:
        np.savez(out, arr_0=images, labels=samples.labels.numpy())


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """The options that `launch.sample` and `launch.quality` share."""
    add_checkpoint(parser)
    parser.add_argument("--sampler", choices=["heun", "euler", "sde"])
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance", choices=["path_drop", "classifier_free", "none"])
    parser.add_argument("--scale", type=float, help="guidance scale; 1 is no guidance")
    parser.add_argument(
        "--interval",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="times between which guidance applies; 0 is data, 1 is noise",
    )
    parser.add_argument(
        "--merge", type=float, help="share of tokens that merge around attention (ToMeSD), e.g. 0.5"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=100, help="images sampled at once")
    parser.add_argument(
        "--weights", choices=["average", "trained"], default="average", help="which to sample with"
    )
