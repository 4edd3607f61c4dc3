"""Pictures drawn from their number: ten shapes in any place, size, turn, colour and texture.

Harder than digits and as free: no download, no files, any size, the same on every machine.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from launch.data.image_sources import ImageSource, times
from launch.run.errors import BadInput

Field = Callable[[np.ndarray, np.ndarray], np.ndarray]


def _radius(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.hypot(x, y)


def _box(x: np.ndarray, y: np.ndarray, width: float, height: float) -> np.ndarray:
    return np.maximum(np.abs(x) - width, np.abs(y) - height)


def _triangle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    turns = 2 * np.pi * np.arange(3) / 3
    return np.max([x * np.sin(turn) - y * np.cos(turn) for turn in turns], axis=0) - 0.5


def _star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    wave = np.abs((5 * np.arctan2(y, x) / (2 * np.pi)) % 1 - 0.5) * 2
    return _radius(x, y) - 0.35 - 0.65 * wave


# Below 0 inside a shape of radius about 1, in about its units of length outside.
_SHAPES: dict[str, Field] = {
    "bars": lambda x, y: _box(np.abs(x) - 0.6, y, 0.25, 0.9),
    "crescent": lambda x, y: np.maximum(_radius(x, y) - 1, 0.8 - _radius(x - 0.5, y)),
    "cross": lambda x, y: np.minimum(_box(x, y, 1, 0.3), _box(x, y, 0.3, 1)),
    "disc": lambda x, y: _radius(x, y) - 0.9,
    "frame": lambda x, y: np.abs(_box(x, y, 0.65, 0.65)) - 0.2,
    "half disc": lambda x, y: np.maximum(_radius(x, y) - 1, y),
    "ring": lambda x, y: np.abs(_radius(x, y) - 0.7) - 0.25,
    "square": lambda x, y: _box(x, y, 0.8, 0.8),
    "star": _star,
    "triangle": _triangle,
}


class Rendered(ImageSource):
    """`count` pictures of one size, classes in turn, each a function of its number alone.

    Args:
        count: pictures.
        shape: channels, 1 (grey) or 3 (red, green, blue), height and width.
    """

    def __init__(self, count: int, shape: tuple[int, int, int]) -> None:
        channels, size, width = shape
        if channels not in (1, 3) or size != width:
            raise BadInput(f"data.rendered={count}: draws 1 or 3 channels, not {times(shape)}")
        self.classes = list(_SHAPES)
        self.labels = np.arange(count, dtype=np.int64) % len(_SHAPES)
        self._channels = channels
        ends = (np.arange(size) + 0.5) / size * 2 - 1
        self._y, self._x = np.meshgrid(ends, ends, indexing="ij")
        self._drawn: dict[int, Tensor] = {}

    def image(self, index: int) -> Tensor:
        if index not in self._drawn:
            self._drawn[index] = self._draw(index)
        return self._drawn[index]

    def _draw(self, index: int) -> Tensor:
        draw = np.random.default_rng(index)
        background, foreground = _colours(draw), _colours(draw)
        # Two greys that are too close would hide the shape.
        while abs(background.mean() - foreground.mean()) < 0.2:
            foreground = _colours(draw)
        scale, turn = draw.uniform(0.3, 0.6), draw.uniform(0, 2 * np.pi)
        across, down = draw.uniform(scale - 1, 1 - scale, 2)
        x, y = _turned(self._x - across, self._y - down, turn)
        field = _SHAPES[self.classes[self.labels[index]]](x / scale, y / scale) * scale
        inside = np.clip(0.5 - field * len(self._x) / 2, 0, 1)  # an edge is a pixel wide
        picture = (1 - inside) * _texture(draw, self._x, self._y, background)
        picture += inside * _texture(draw, x, y, foreground)
        picture += draw.normal(0, 0.02, picture.shape)
        if self._channels == 1:
            picture = picture.mean(0, keepdims=True)
        return torch.from_numpy(picture.clip(0, 1) * 2 - 1).float()


def _colours(draw: np.random.Generator) -> np.ndarray:
    """Two colours near each other, [2, 3] in [0, 1]."""
    middle = draw.uniform(0, 1, 3)
    return np.clip(middle + draw.uniform(-0.2, 0.2, (2, 3)), 0, 1)


def _turned(x: np.ndarray, y: np.ndarray, turn: float) -> tuple[np.ndarray, np.ndarray]:
    return x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)


def _texture(
    draw: np.random.Generator, x: np.ndarray, y: np.ndarray, colours: np.ndarray
) -> np.ndarray:
    """One of: plain, a gradient, stripes, checks. [3, H, W]."""
    kind = draw.integers(4)
    period, (first, second) = draw.uniform(0.25, 0.5), draw.uniform(0, 1, 2)
    x, y = _turned(x, y, draw.uniform(0, 2 * np.pi))
    waves = np.sin(2 * np.pi * (x / period + first)), np.sin(2 * np.pi * (y / period + second))
    share = [np.zeros_like(x), (x + 1.5) / 3, (waves[0] + 1) / 2, (waves[0] * waves[1] + 1) / 2]
    mixed = share[kind].clip(0, 1)
    return colours[0, :, None, None] * (1 - mixed) + colours[1, :, None, None] * mixed
