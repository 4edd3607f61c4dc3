"""Where labelled images come from: scikit-learn's digits, or a folder of the user's own.

Shape legend: C channels, H height, W width, N images of a file.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from launch.data.arrays import mapped_array
from launch.run.errors import BadInput

_FORMATS = ("PNG", "JPEG", "BMP", "WEBP")  # what is in a file: Pillow runs programs for some others


class ImageSource(ABC):
    """Numbered images with labels, all of one shape, read when asked for."""

    classes: list[str]
    labels: np.ndarray

    @abstractmethod
    def image(self, index: int) -> Tensor:
        """float32 [C, H, W]; pictures in [-1, 1], latents as they are."""


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
                f"data.path=null: the digits are 1x8x8, the model takes {times(shape)}; "
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
                f"{file}: is {times(picture.size)} pixels, must be {times(self._size)} "
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


def _mode(shape: tuple[int, int, int]) -> str:
    modes = {1: "L", 3: "RGB", 4: "RGBA"}
    if shape[0] not in modes:
        raise BadInput(f"model.channels={shape[0]}: pictures have 1, 3 or 4 channels")
    return modes[shape[0]]


def _check_shape(file: Path, shape: tuple[int, ...], wanted: tuple[int, int, int]) -> None:
    if tuple(shape) != wanted:
        raise BadInput(
            f"{file}: images are {times(shape) or 'single numbers'}, must be {times(wanted)} "
            f"(model.channels, model.image_size)"
        )


def times(sizes: Sequence[int]) -> str:
    return "x".join(str(size) for size in sizes)
