"""MixtureOfExpertsConfig: which layers of a decoder have experts, and which experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import nn

from adaptive.blocks.mixture_of_depths_and_experts import ExpertsWithIdle
from adaptive.blocks.mixture_of_experts import ExpertsChoice, MixtureOfExperts
from adaptive.ops.expert_feed_forward import Activation, check_activation
from adaptive.routing.hyperspherical import Gate, HypersphericalRouter
from adaptive.routing.routers import LinearRouter
from adaptive.routing.schedules import listed_layers
from adaptive.routing.token_choice import ExpertGroups
from parallel.mesh import Mesh

RouterKind = Literal["linear", "hyperspherical"]
PAPER_TEMPERATURE = {"softmax": 0.3, "sigmoid": 0.07}


@dataclass(frozen=True)
class MixtureOfExpertsConfig:
    """Which layers of a decoder have experts in place of their feed-forward, and how.

    Attributes:
        schedule: "all", a number n (layers n-1, 2n-1, …), or a list of layers.
        ffn_dim: width of one expert; None: the decoder's.
        router: "linear" or "hyperspherical".
        projection_dim, temperature: of the hyperspherical router; None: the paper's.
        idle_experts: experts that do nothing beside the others (integrated MoDE).
        num_groups, chosen_groups: above 1 group, a token's experts come from so many of them.
        num_experts, top_k, gate, capacity_factor, activation, renormalize, choice, jitter,
        balance_coefficient, z_coefficient, bias_rate, shared_experts, freeze_router,
        freeze_experts: see `MixtureOfExperts`.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    num_experts: int = 8
    top_k: int = 2
    schedule: Literal["all"] | int | list[int] = "all"
    ffn_dim: int | None = None
    router: RouterKind = "linear"
    projection_dim: int | None = None
    temperature: float | None = None
    gate: Gate = "softmax"
    capacity_factor: float | None = None
    activation: Activation = "swiglu"
    renormalize: bool | None = None
    choice: ExpertsChoice = "token"
    num_groups: int = 1
    chosen_groups: int = 1
    idle_experts: int = 0
    jitter: float = 0.0
    balance_coefficient: float = 0.01
    z_coefficient: float = 0.0
    bias_rate: float = 0.0
    shared_experts: int = 0
    freeze_router: bool = False
    freeze_experts: bool = False

    def __post_init__(self) -> None:
        # Building a tiny block checks every rule in the one place that has it.
        if self.router not in get_args(RouterKind):
            raise ValueError(f"router={self.router!r}: must be linear or hyperspherical")
        if self.ffn_dim is not None and self.ffn_dim < 1:
            raise ValueError(f"ffn_dim={self.ffn_dim}: must be at least 1")
        if self.idle_experts < 0:
            raise ValueError(f"idle_experts={self.idle_experts}: must be 0 or more")
        for name in ("balance_coefficient", "z_coefficient", "bias_rate"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)}: must be 0 or more")
        if isinstance(self.schedule, int) and self.schedule < 1:
            raise ValueError(f"schedule={self.schedule}: must be at least 1")
        check_activation(self.activation)
        with torch.device("meta"):
            self.feed_forward(1, ffn_dim=1)

    def routed_layers(self, num_layers: int) -> list[int]:
        """The layers that have experts.

        Raises:
            ValueError: if a listed layer does not exist, or no layer has experts.
        """
        if self.schedule == "all":
            return list(range(num_layers))
        if isinstance(self.schedule, int):
            if self.schedule > num_layers:
                raise ValueError(
                    f"schedule={self.schedule}: must be at most {num_layers}, the layers"
                )
            return list(range(self.schedule - 1, num_layers, self.schedule))
        return listed_layers(self.schedule, num_layers, key="schedule")

    def feed_forward(
        self,
        dim: int,
        *,
        ffn_dim: int,
        std: float = 0.02,
        output_std: float | None = None,
        mesh: Mesh | None = None,
    ) -> nn.Module:
        """The experts of one layer. `ffn_dim` is the decoder's, `std`s those of its weights."""
        units = self.num_experts + self.idle_experts
        options = {"idle_experts": self.idle_experts} if self.idle_experts else {}
        groups = None
        if self.num_groups != 1 or self.chosen_groups != 1:
            groups = ExpertGroups(self.num_groups, self.chosen_groups)
        make = ExpertsWithIdle if self.idle_experts else MixtureOfExperts
        return make(
            dim,
            ffn_dim if self.ffn_dim is None else self.ffn_dim,
            self.num_experts,
            top_k=self.top_k,
            router=self._router(dim, units, std, mesh),
            capacity_factor=self.capacity_factor,
            activation=self.activation,
            gate=self.gate,
            renormalize=self.renormalize,
            choice=self.choice,
            groups=groups,
            jitter=self.jitter,
            balance_coefficient=self.balance_coefficient,
            z_coefficient=self.z_coefficient,
            bias_rate=self.bias_rate,
            shared_experts=self.shared_experts,
            freeze_router=self.freeze_router,
            freeze_experts=self.freeze_experts,
            std=std,
            output_std=output_std,
            mesh=mesh,
            **options,
        )

    def _router(self, dim: int, units: int, std: float, mesh: Mesh | None) -> nn.Module:
        if self.router == "linear":
            return LinearRouter(dim, units, std=std, mesh=mesh)
        temperature = self.temperature
        return HypersphericalRouter(
            dim,
            units,
            projection_dim=self.projection_dim,
            temperature=PAPER_TEMPERATURE[self.gate] if temperature is None else temperature,
            gate=self.gate,
            mesh=mesh,
        )
