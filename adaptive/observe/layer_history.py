"""LayerHistory: what each layer's statistics were over the steps of a run, to be drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from adaptive.observe.pictures import history_map
from adaptive.observe.sinks import of_layer

_LEFT_OUT = ("tokens", "executed", "units", "planned_share")


class LayerHistory:
    """Statistics by layer and step; of a long run every second, fourth, … writing is kept.

    Args:
        columns: writings kept at most, an even number.
    """

    def __init__(self, columns: int = 256) -> None:
        self._columns = columns
        self._kinds: dict[str, _Writings] = {}

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Take what was written at a step; what is of no layer is left out."""
        found: dict[str, dict[tuple[str, str], float]] = {}
        for name, value in values.items():
            parts = of_layer(name)
            if parts is not None and parts[2] not in _LEFT_OUT:
                prefix, layer, statistic = parts
                found.setdefault(prefix, {})[statistic, layer] = value
        for prefix, of_layers in found.items():
            self._kinds.setdefault(prefix, _Writings(self._columns)).add(step, of_layers)

    def pictures(self) -> dict[str, Tensor]:
        """`routing_over_steps/STATISTIC`, …, of those that at least two layers have."""
        return {
            f"{prefix}_over_steps/{statistic}": picture
            for prefix, writings in self._kinds.items()
            for statistic, picture in writings.pictures().items()
        }


class _Writings:
    """Those of one prefix, which come at steps of their own."""

    def __init__(self, columns: int) -> None:
        self._columns, self._every, self._count = columns, 1, 0
        self._kept: list[tuple[int, dict[tuple[str, str], float]]] = []

    def add(self, step: int, values: dict[tuple[str, str], float]) -> None:
        if self._count % self._every == 0:
            if len(self._kept) == self._columns:
                self._kept, self._every = self._kept[::2], 2 * self._every
            self._kept.append((step, values))
        self._count += 1

    def pictures(self) -> dict[str, Tensor]:
        layers: dict[str, dict[str, None]] = {}
        for _, values in self._kept:
            for statistic, layer in values:
                layers.setdefault(statistic, {})[layer] = None
        steps = [step for step, _ in self._kept]
        return {
            statistic: history_map(statistic, list(of), steps, self._values(statistic, list(of)))
            for statistic, of in layers.items()
            if len(of) > 1 and len(steps) > 1
        }

    def _values(self, statistic: str, layers: list[str]) -> Tensor:
        """float32 [layers, steps]; NaN where a layer had none."""
        rows = [
            [values.get((statistic, layer), math.nan) for _, values in self._kept]
            for layer in layers
        ]
        return torch.tensor(rows)
