"""LayerHistory: what each layer's statistics were over the steps of a run, to be drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from adaptive.observe.pictures import history_map

_PREFIX = "routing/"
_LEFT_OUT = ("tokens", "executed", "units", "planned_share")


class LayerHistory:
    """Statistics by layer and step; of a long run every second, fourth, … writing is kept.

    Args:
        columns: writings kept at most, an even number.
    """

    def __init__(self, columns: int = 256) -> None:
        self._columns, self._every, self._count = columns, 1, 0
        self._kept: list[tuple[int, dict[str, float]]] = []

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Take what was written at a step; what is of no layer is left out."""
        found = {name: value for name, value in values.items() if name.startswith(_PREFIX)}
        if not found:
            return
        if self._count % self._every == 0:
            if len(self._kept) == self._columns:
                self._kept, self._every = self._kept[::2], 2 * self._every
            self._kept.append((step, found))
        self._count += 1

    def pictures(self) -> dict[str, Tensor]:
        """`routing_over_steps/STATISTIC`, of those that at least two layers have."""
        layers: dict[str, dict[str, None]] = {}
        for _, values in self._kept:
            for name in values:
                layer, _, statistic = name.removeprefix(_PREFIX).partition("/")
                if statistic and statistic not in _LEFT_OUT:
                    layers.setdefault(statistic, {})[layer] = None
        steps = [step for step, _ in self._kept]
        return {
            f"routing_over_steps/{statistic}": history_map(
                statistic, list(of), steps, self._values(statistic, list(of))
            )
            for statistic, of in layers.items()
            if len(of) > 1 and len(steps) > 1
        }

    def _values(self, statistic: str, layers: list[str]) -> Tensor:
        """float32 [layers, steps]; NaN where a layer had none."""
        rows = [
            [values.get(f"{_PREFIX}{layer}/{statistic}", math.nan) for _, values in self._kept]
            for layer in layers
        ]
        return torch.tensor(rows)
