"""Labelled images or latents for a model, split into those to train on and those held out.

Shape legend: B images of a batch, C channels, H height, W width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from adaptive.models.diffusion.model import DiffusionConfig
from launch.data.arrays import mapped_array
from launch.data.image_sources import (
    Arrays,
    Digits,
    ImageSource,
    Pictures,
    TensorFiles,
    times,
)
from launch.data.rendered import Rendered
from launch.data.sources import check_path, files_below
from launch.data.text import permuted
from launch.run.errors import BadInput
from launch.run.terminal import announced
from launch.tasks import row_generator

_PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
_ARRAYS = (".npy",)
_TENSORS = (".safetensors",)


@dataclass(frozen=True)
class ImageConfig:
    """Images to learn from.

    Attributes:
        path: a folder with one folder of images (or of .npy latents) a class, or with .safetensors
            files of tensors `images` and `labels`; null: scikit-learn's 8x8 digits.
        rendered: without a path: so many pictures of ten shapes, drawn here at the model's size;
            null: none.
        validation_fraction: share of images that is held out, chosen by a hash of their place.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    path: str | None = None
    rendered: int | None = None
    validation_fraction: float = 0.1

    def __post_init__(self) -> None:
        check_path(self.path)
        if self.rendered is not None and (self.rendered < 1 or self.path is not None):
            raise ValueError(f"rendered={self.rendered}: must be above 0, and path null")
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(f"validation_fraction={self.validation_fraction}: must be in [0, 1)")


@dataclass(frozen=True)
class DiffusionImageConfig(ImageConfig):
    """Images for a diffusion transformer.

    Attributes:
        features: a .npy file [images, tokens, width] of features to align to, in the order of the
            sorted file names (see model.alignment); null: none.
        class_drop: probability that a training image loses its label.
    """

    features: str | None = None
    class_drop: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.class_drop <= 1:
            raise ValueError(f"class_drop={self.class_drop}: must be in [0, 1]")


class ImageModel(Protocol):
    """What a model's configuration says of its images."""

    @property
    def image_size(self) -> int: ...

    @property
    def channels(self) -> int: ...

    @property
    def num_classes(self) -> int: ...


class ImageData:
    """The images of an ImageConfig for a model, split into training and held-out ones.

    Args:
        config: where they are.
        model: what it takes.
        verify: look into every picture's header now; otherwise when it is read.

    Raises:
        BadInput: names the first file or label that does not fit.
    """

    def __init__(self, config: ImageConfig, model: ImageModel, *, verify: bool = True) -> None:
        self.config = config
        shape = (model.channels, model.image_size, model.image_size)
        with announced(f"reading data.path={config.path}"):
            self.source = _open(config, shape, verify=verify)
        labels = self.source.labels
        if not len(labels):
            raise BadInput(f"data.path={config.path}: its files hold no image")
        wrong = np.flatnonzero((labels < 0) | (labels >= model.num_classes))
        if len(wrong):
            raise BadInput(
                f"data.path={config.path or 'digits'}: label {labels[wrong[0]]} of image "
                f"{wrong[0]}: must be below model.num_classes={model.num_classes}"
            )
        held_out = np.array(
            [_unit_hash(i) < config.validation_fraction for i in range(len(labels))]
        )
        self.train, self.validation = np.flatnonzero(~held_out), np.flatnonzero(held_out)
        if not len(self.train):
            raise BadInput(f"data.path={config.path}: no image is left to train on")
        if config.path is not None:
            # Folders come class after class, and validation takes the times of noise in this order:
            # each class would be measured at times of its own.
            order = np.argsort([_unit_hash(int(index)) for index in self.validation])
            self.validation = self.validation[order]

    def train_index(self, seed: int, row: int) -> int:
        """The image of row `row` of the training stream; every epoch has an order of its own."""
        epoch, place = divmod(row, len(self.train))
        key = int(row_generator(seed, epoch, stream=1).integers(2**63))
        return int(self.train[permuted(place, len(self.train), key)])

    def images(self, indices: Sequence[int] | np.ndarray) -> Tensor:
        """float32 [B, C, H, W]."""
        return torch.stack([self.source.image(int(index)) for index in indices])

    def labels(self, indices: Sequence[int] | np.ndarray) -> Tensor:
        """int64 [B]."""
        return torch.from_numpy(self.source.labels[np.asarray(indices, dtype=np.int64)])


class DiffusionImageData(ImageData):
    """Images for a diffusion transformer, with the user's features of them where there are any."""

    def __init__(
        self, config: DiffusionImageConfig, model: DiffusionConfig, *, verify: bool = True
    ) -> None:
        super().__init__(config, model, verify=verify)
        self.features = _features(config.features, len(self.source.labels), model)

    def feature_rows(self, indices: Sequence[int]) -> Tensor:
        """float32 [B, S, F]: the user's features of these images."""
        assert self.features is not None
        return torch.from_numpy(self.features[np.asarray(indices)].astype(np.float32))


def _features(path: str | None, images: int, model: DiffusionConfig) -> np.ndarray | None:
    if (path is None) != (model.alignment is None):
        raise BadInput("data.features and model.alignment: give both or none")
    if path is None or model.alignment is None:
        return None
    features = mapped_array(Path(path).expanduser(), named=f"data.features={path}")
    wanted = (images, model.tokens, model.alignment.feature_dim)
    if features.shape != wanted:
        raise BadInput(
            f"data.features={path}: is {times(features.shape)}, must be {times(wanted)} "
            f"(images, tokens, model.alignment.feature_dim)"
        )
    return features


def _open(config: ImageConfig, shape: tuple[int, int, int], *, verify: bool) -> ImageSource:
    path = config.path
    if config.rendered is not None:
        return Rendered(config.rendered, shape)
    if path is None:
        return Digits(shape)
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise BadInput(f"data.path={path}: no such folder")
    files = files_below(folder, keep_ways=True)
    kinds = {suffix: kind for kind in (_PICTURES, _ARRAYS, _TENSORS) for suffix in kind}
    known = [p for p in files if p.suffix.lower() in kinds]
    if not known:
        suffixes = ", ".join(kinds)
        raise BadInput(f"data.path={path}: holds none of {suffixes}")
    kind = kinds[known[0].suffix.lower()]
    for file in known:
        if kinds[file.suffix.lower()] != kind:
            raise BadInput(f"{file}: is no {kind[0]} as {known[0].name} is; use one kind a folder")
    if kind == _TENSORS:
        return TensorFiles(known, shape)
    if kind == _ARRAYS:
        return Arrays(folder, known, shape)
    pictures = Pictures(folder, known, shape)
    if verify:
        pictures.verify()
    return pictures


def to_pixels(images_BCHW: Tensor) -> np.ndarray:
    """Pictures in [-1, 1] as uint8 [B, H, W, C], the layout of evaluation archives."""
    scaled = ((images_BCHW.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return scaled.permute(0, 2, 3, 1).cpu().numpy()


def tile(pixels_BHWC: np.ndarray, columns: int, *, gap: int = 1, zoom: int = 1) -> np.ndarray:
    """Pictures side by side in rows of `columns`: uint8 [rows, width, C], grey between."""
    batch, height, width, channels = pixels_BHWC.shape
    rows = -(-batch // columns)
    sheet = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, channels), 128)
    for index, picture in enumerate(pixels_BHWC):
        row, column = divmod(index, columns)
        top, left = gap + row * (height + gap), gap + column * (width + gap)
        sheet[top : top + height, left : left + width] = picture
    return sheet.astype(np.uint8).repeat(zoom, 0).repeat(zoom, 1)


def _unit_hash(index: int) -> float:
    digest = hashlib.sha256(index.to_bytes(8, "big")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
