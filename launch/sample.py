"""Sample images from a trained diffusion transformer: a PNG grid, an .npz archive, or both.

python -m launch.sample runs/sprint_dit --png samples.png --npz samples.npz
"""

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
from launch.data.images import tile, to_pixels
from launch.run.errors import BadInput, OneLineParser, exit_on_bad_input
from launch.run.options import check_counts, check_seed
from launch.run.sections import RunConfig
from launch.run.writable import check_file
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


def main(arguments: list[str] | None = None) -> None:
    """Sample, write what was asked for, print what it cost."""
    with exit_on_bad_input():
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
        samples = draw_samples(
            model, labels, config, seed=options.seed, batch_size=options.batch_size
        )
        print(samples.line)
        if options.png is not None:
            write_png(samples.images, Path(options.png), columns=options.per_class)
        if options.npz is not None:
            write_npz(samples, Path(options.npz))
        for path in outputs:
            print(f"written {path}")


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
    }
    changes = {name: value for name, value in given.items() if value is not None}
    try:
        return dataclasses.replace(run.data.sampling, **changes)
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
    parser.add_argument("checkpoint", help="a run's folder, or one of its checkpoints")
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
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=100, help="images sampled at once")
    parser.add_argument(
        "--weights", choices=["average", "trained"], default="average", help="which to sample with"
    )


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="python -m launch.sample",
        description=__doc__,
        epilog="Options left out are those of the run's section data.sampling.",
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
