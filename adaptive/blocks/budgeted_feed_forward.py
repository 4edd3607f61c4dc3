"""What every feed-forward with a budget is configured by: where it stands and what it may cost."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

from torch import nn

from adaptive.routing.density import Target
from adaptive.routing.gumbel import GumbelSchedule
from adaptive.routing.schedules import listed_layers
from parallel.mesh import Mesh


@dataclass(frozen=True, kw_only=True)
class BudgetedFeedForwardConfig:
    """The layers of a decoder whose feed-forward chooses its compute a token, and their budget.

    Attributes:
        budget: target mean cost, as a share of the whole feed-forward's compute.
        layers: "all", or a list of layers.
        budget_coefficient, budget_over, controller_gain, schedule: see the block.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}
    not_negative: ClassVar[tuple[str, ...]] = ("budget_coefficient", "controller_gain")

    budget: float = 0.5
    layers: str | list[int] = "all"
    budget_coefficient: float = 0.1
    budget_over: Target = "layer"
    controller_gain: float = 0.0
    schedule: GumbelSchedule = field(default_factory=GumbelSchedule)

    def __post_init__(self) -> None:
        if not 0 < self.budget <= 1:
            raise ValueError(f"budget={self.budget}: must be in (0, 1]")
        if isinstance(self.layers, str) and self.layers != "all":
            raise ValueError(f"layers={self.layers!r}: must be all or a list of layers")
        for name in self.not_negative:
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0:
                raise ValueError(f"{name}={value}: must be 0 or more")

    def routed_layers(self, num_layers: int) -> list[int]:
        """The layers that have the block.

        Raises:
            ValueError: if a listed layer does not exist, or none is listed.
        """
        if isinstance(self.layers, str):
            return list(range(num_layers))
        return listed_layers(self.layers, num_layers, key="layers")

    def feed_forward(
        self,
        dim: int,
        ffn_dim: int,
        *,
        layer: int,
        make_ffn: Callable[[int], nn.Module],
        mesh: Mesh | None = None,
    ) -> nn.Module:
        """The feed-forward of a layer: the block, or plain where the layer is not listed."""
        if not isinstance(self.layers, str) and layer not in self.layers:
            return make_ffn(ffn_dim)
        return self.block(dim, ffn_dim, make_ffn=make_ffn, mesh=mesh)

    def block(
        self, dim: int, ffn_dim: int, *, make_ffn: Callable[[int], nn.Module], mesh: Mesh | None
    ) -> nn.Module:
        """The block of this configuration; every kind has its own."""
        raise NotImplementedError
