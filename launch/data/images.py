"""Labelled images or latents: scikit-learn's digits, or a folder of the user's own.

Shape legend: C channels, H height, W width, N images of a file.
"""

from __future__ import annotations

import hashlib
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from adaptive.models.diffusion.model import DiffusionConfig
from launch.data.arrays import mapped_array
from launch.data.sources import check_path, files_below
from launch.data.text import permuted
from launch.run.errors import BadInput
from launch.run.terminal import announced
from launch.tasks import row_generator

_PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
_FORMATS = ("PNG", "JPEG", "BMP", "WEBP")  # what is in a file: Pillow runs programs for some others
_ARRAYS = (".npy",)
_TENSORS = (".safetensors",)


@dataclass(frozen=True)
class ImageConfig:
    """Images to learn from.

    Attributes:
        path: a folder with one folder of images (or of .npy latents) a class, or with .safetensors
            files of tensors `images` and `labels`; null: scikit-learn's 8x8 digits.
        validation_fraction: share of images that is held out, chosen by a hash of their place.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    path: str | None = None
    validation_fraction: float = 0.1

    def __post_init__(self) -> None:
        check_path(self.path)
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


class ImageSource(ABC):
    """Numbered images with labels, all of one shape, read when asked for."""

    classes: list[str]
    labels: np.ndarray

    @abstractmethod
    def image(self, index: int) -> Tensor:
        """float32 [C, H, W]; pictures in [-1, 1], latents as they are."""


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
            self.source = _open(config.path, shape, verify=verify)
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
            f"data.features={path}: is {_times(features.shape)}, must be {_times(wanted)} "
            f"(images, tokens, model.alignment.feature_dim)"
        )
    return features


def _open(path: str | None, shape: tuple[int, int, int], *, verify: bool) -> ImageSource:
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


def _check_one_class(files: list[Path], names: list[str]) -> None:
    classes: dict[tuple[int, int], str] = {}
    for file, name in zip(files, names, strict=True):
        status = file.stat()
        other = classes.setdefault((status.st_dev, status.st_ino), name)
        if other != name:
            raise BadInput(f"{file}: is in the classes {other} and {name}: leave it in one")


class Digits(ImageSource):
    """scikit-learn's 1,797 handwritten digits, 8x8, one channel."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        from sklearn.datasets import load_digits

        if shape != (1, 8, 8):
            raise BadInput(
                f"data.path=null: the digits are 1x8x8, the model takes {_times(shape)}; "
                f"set model.channels=1 and model.image_size=8"
            )
        digits = load_digits()
        self.classes = [str(name) for name in digits.target_names]
        self.labels = digits.target.astype(np.int64)
        self._images = torch.from_numpy(digits.images).float()[:, None] / 8 - 1

    def image(self, index: int) -> Tensor:
        return self._images[index]


class _ClassFolders(ImageSource):
    """Files in one folder a class; classes are numbered in the order of their names."""

    def __init__(self, folder: Path, files: list[Path]) -> None:
        names = []
        for file in files:
            parts = file.relative_to(folder).parts
            if len(parts) < 2:
                raise BadInput(f"{file}: must be in a folder named for its class")
            names.append(parts[0])
        self.classes = sorted(set(names))
        _check_one_class(files, names)
        numbers = {name: number for number, name in enumerate(self.classes)}
        self._file_labels = np.array([numbers[name] for name in names], dtype=np.int64)


class Pictures(_ClassFolders):
    """Pictures of one size, in one folder a class."""

    def __init__(self, folder: Path, files: list[Path], shape: tuple[int, int, int]) -> None:
        super().__init__(folder, files)
        self.labels, self._files = self._file_labels, files
        self._mode, self._size = _mode(shape), (shape[2], shape[1])

    def verify(self) -> None:
        """Look into the header of every file."""
        for file in self._files:
            self._open(file).close()

    def image(self, index: int) -> Tensor:
        file = self._files[index]
        with self._open(file) as picture:
            try:
                pixels = np.asarray(_upright(picture).convert(self._mode))
            except Exception as error:  # a decoder meets anything in a damaged file
                raise BadInput(f"{file}: is no intact picture: {error}") from None
        pixels = pixels[:, :, None] if pixels.ndim == 2 else pixels
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 127.5 - 1

    def _open(self, file: Path) -> Any:
        from PIL import Image

        try:
            with warnings.catch_warnings():
                # Of many pixels, which the size below refuses unless they were asked for.
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                picture = Image.open(file, formats=_FORMATS)
        except Exception as error:  # also of too many pixels to be meant
            raise BadInput(f"{file}: is no intact picture: {error}") from None
        if picture.size != self._size:
            raise BadInput(
                f"{file}: is {_times(picture.size)} pixels, must be {_times(self._size)} "
                f"(model.image_size)"
            )
        return picture


def _upright(picture: Any) -> Any:
    """The picture as it is meant to be seen, 8 bits a channel."""
    from PIL import Image, ImageOps

    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):  # 16 bits of grey, which Pillow's `convert` cuts off at 255
        picture = Image.fromarray((np.asarray(picture) / 257).round().astype(np.uint8))
    return picture


class Arrays(_ClassFolders):
    """`.npy` latents, [C, H, W] or [N, C, H, W] a file, in one folder a class; memory-mapped."""

    def __init__(self, folder: Path, files: list[Path], shape: tuple[int, int, int]) -> None:
        super().__init__(folder, files)
        self._arrays: list[np.ndarray] = []
        counts = []
        for file in files:
            array = mapped_array(file)
            array = array[None] if array.ndim == 3 else array
            _check_shape(file, array.shape[1:], shape)
            self._arrays.append(array)
            counts.append(len(array))
        self.labels = np.repeat(self._file_labels, counts)
        self._starts = np.concatenate([[0], np.cumsum(counts)])

    def image(self, index: int) -> Tensor:
        file = int(np.searchsorted(self._starts, index, side="right")) - 1
        return torch.from_numpy(self._arrays[file][index - self._starts[file]].astype(np.float32))


class TensorFiles(ImageSource):
    """`.safetensors` files with `images` [N, C, H, W] and integer `labels` [N]."""

    def __init__(self, files: list[Path], shape: tuple[int, int, int]) -> None:
        labels = []
        self._files = files
        for file in files:
            try:
                with safe_open(file, framework="pt") as tensors:
                    names = set(tensors.keys())
                    for name in ("images", "labels"):
                        if name not in names:
                            raise BadInput(f"{file}: has no tensor `{name}`")
                    sizes = tensors.get_slice("images").get_shape()
                    own = tensors.get_tensor("labels")
            except SafetensorError as error:
                raise BadInput(f"{file}: is no safetensors file: {error}") from None
            _check_shape(file, tuple(sizes[1:]), shape)
            if list(own.shape) != sizes[:1] or own.is_floating_point():
                raise BadInput(f"{file}: labels must be {sizes[0]} integers, one an image")
            labels.append(own.numpy().astype(np.int64))
        self.labels = np.concatenate(labels)
        self.classes = [str(number) for number in range(int(self.labels.max(initial=-1)) + 1)]
        self._starts = np.concatenate([[0], np.cumsum([len(own) for own in labels])])

    def image(self, index: int) -> Tensor:
        file = int(np.searchsorted(self._starts, index, side="right")) - 1
        place = int(index - self._starts[file])
        return self._open_files[file].get_slice("images")[place : place + 1][0].float()

    @cached_property
    def _open_files(self) -> list[safe_open]:
        return [safe_open(file, framework="pt") for file in self._files]


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


def _mode(shape: tuple[int, int, int]) -> str:
    modes = {1: "L", 3: "RGB", 4: "RGBA"}
    if shape[0] not in modes:
        raise BadInput(f"model.channels={shape[0]}: pictures have 1, 3 or 4 channels")
    return modes[shape[0]]


def _check_shape(file: Path, shape: tuple[int, ...], wanted: tuple[int, int, int]) -> None:
    if tuple(shape) != wanted:
        raise BadInput(
            f"{file}: images are {_times(shape) or 'single numbers'}, must be {_times(wanted)} "
            f"(model.channels, model.image_size)"
        )


def _times(sizes: Sequence[int]) -> str:
    return "x".join(str(size) for size in sizes)


def _unit_hash(index: int) -> float:
    digest = hashlib.sha256(index.to_bytes(8, "big")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
