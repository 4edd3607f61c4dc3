"""Which layers of a decoder may be skipped: the section `model.skip_layer` of a recipe."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

from torch import nn

from adaptive.blocks.skip_layer import Granularity, Keys, SkipLayer, SkippedGradient
from adaptive.routing.density import Target
from adaptive.routing.gumbel import GumbelSchedule
from adaptive.routing.schedules import DepthSchedule, capacities_over_depth
from parallel.mesh import Mesh


@dataclass(frozen=True)
class SkipLayerConfig:
    """Which layers of a decoder may be skipped, and how.

    Attributes:
        density: target share of executing tokens in these layers.
        layers: "all", "every_other" (layers 1, 3, 5, …), or a list of layers; "linear" and
            "cosine" let the target fall over depth (see `capacities_over_depth`).
        floor, dense_above: of the falling targets.
        keys, granularity, skipped_gradient, density_coefficient, density_over, controller_gain,
            schedule: see `SkipLayer`. A target over the model wants equal `layers` targets.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    density: float = 0.5
    layers: DepthSchedule | list[int] = "all"
    floor: float | None = None
    dense_above: float = 0.85
    keys: Keys = "all"
    granularity: Granularity = "block"
    skipped_gradient: SkippedGradient = "masked"
    density_coefficient: float = 0.1
    density_over: Target = "layer"
    controller_gain: float = 0.0
    schedule: GumbelSchedule = field(default_factory=GumbelSchedule)

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise ValueError(f"density={self.density}: must be in (0, 1]")
        for name in ("density_coefficient", "controller_gain"):
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0:
                raise ValueError(f"{name}={value}: must be 0 or more")

    def densities(self, num_layers: int) -> list[float]:
        """The target of every layer; 1.0 where it always runs."""
        return capacities_over_depth(
            num_layers,
            capacity=self.density,
            schedule=self.layers,
            floor=self.floor,
            dense_above=self.dense_above,
            key="layers",
        )

    def wrap(
        self, block: nn.Module, *, layer: int, num_layers: int, dim: int, mesh: Mesh | None = None
    ) -> nn.Module:
        """The block itself where the layer always runs, else the block that may be skipped."""
        density = self.densities(num_layers)[layer]
        if density == 1:
            return block
        return SkipLayer(
            block,
            dim,
            density=density,
            keys=self.keys,
            granularity=self.granularity,
            mesh=mesh,
            skipped_gradient=self.skipped_gradient,
            density_coefficient=self.density_coefficient,
            density_over=self.density_over,
            controller_gain=self.controller_gain,
            schedule=self.schedule,
        )
