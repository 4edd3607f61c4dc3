"""SizedFeedForward: a big and a small feed-forward and a bypass; every token takes one of them.

Shape legend: B batch, S sequence, T valid tokens, R tokens of one unit, D width,
K paths (bypass, small, big), U units (small, big).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from adaptive.blocks.budgeted_feed_forward import BudgetedFeedForward, BudgetedFeedForwardConfig
from adaptive.blocks.feed_forward import SwiGLU
from adaptive.ops.flop_counter import FlopCounter, Work
from adaptive.routing.density import Target, Usage
from adaptive.routing.gumbel import GumbelSchedule
from adaptive.routing.routers import LinearRouter
from adaptive.routing.tape import AuxiliaryLoss, RoutingTape
from parallel.mesh import Mesh

PATHS = ("bypass", "small", "big")
BYPASS, SMALL, BIG = range(3)


class SizedFeedForward(BudgetedFeedForward):
    """`update = Σ_p g_p · ffn_p(x)` with one hard gate a token: big, small, or no update at all.

    Takes the place of a feed-forward: the input is the normed hidden state, the output the update
    without residual. Training has two stages. For `random_steps` steps every token takes a path at
    random, so that both units learn to serve any token; the router learns nothing yet. Then a
    straight-through Gumbel-softmax router chooses, under a penalty
    on `(cost - budget)²`, the cost of a token being its path's share of the big unit's compute.
    The gradient of a gate is `<grad_out, ffn_p(x)>` on the path taken, zero on those that were not
    computed (the masked formula). In evaluation the router's argmax decides.

    Args:
        dim: width D.
        ffn_dim: width of the big feed-forward.
        small_ffn_dim: width of the small one; None: a quarter of the big one's.
        budget: target mean cost, in (0, 1].
        make_ffn: makes a feed-forward of a given width, called as `ffn(x_RD, layout=…)`; by
            default SwiGLU.
        random_steps: training steps of the random stage; see `start_step`.
        budget_coefficient: weight of the penalty.
        budget_over: the budget is for every "layer", or for the mean over the "model".
        controller_gain: above 0, a `DensityController` with this gain holds the budget as well.
        schedule: temperature and noise over training steps after the random stage.
        mesh: how the ranks share the model; one rank by default.

    Attributes:
        random: whether tokens take random paths now, in training and in evaluation.

    Raises:
        ValueError: if an option is out of range.

    Source: Duo-LLM, arXiv 2410.10846, section 2.
    """

    kind = "sized_feed_forward"

    def __init__(
        self,
        dim: int,
        ffn_dim: int,
        *,
        small_ffn_dim: int | None = None,
        budget: float = 0.5,
        make_ffn: Callable[[int], nn.Module] | None = None,
        random_steps: int = 0,
        budget_coefficient: float = 0.1,
        budget_over: Target = "layer",
        controller_gain: float = 0.0,
        schedule: GumbelSchedule | None = None,
        mesh: Mesh | None = None,
    ) -> None:
        mesh = Mesh.single() if mesh is None else mesh
        super().__init__(
            budget,
            coefficient=budget_coefficient,
            penalty="squared",
            over=budget_over,
            controller_gain=controller_gain,
            schedule=schedule,
            mesh=mesh,
        )
        small = max(ffn_dim // 4, 1) if small_ffn_dim is None else small_ffn_dim
        if not 1 <= small < ffn_dim:
            raise ValueError(f"small_ffn_dim={small}: must be between 1 and ffn_dim={ffn_dim}")
        if random_steps < 0:
            raise ValueError(f"random_steps={random_steps}: must be 0 or more")
        make_ffn = partial(SwiGLU, dim, mesh=mesh) if make_ffn is None else make_ffn
        self.big, self.small = make_ffn(ffn_dim), make_ffn(small)
        self.path_costs = (0.0, small / ffn_dim, 1.0)
        self.random_steps = random_steps
        self.random = False
        self.router = LinearRouter(dim, len(PATHS), bias=True, mesh=mesh)

    @property
    def units(self) -> Sequence[nn.Module]:
        return self.small, self.big

    def score(self, x_TD: Tensor) -> Tensor:
        return self.router(x_TD)

    def runs(self, chosen_T: Tensor) -> Tensor:
        return torch.stack([chosen_T == SMALL, chosen_T == BIG], dim=1)

    def soft_runs(self, soft_TK: Tensor) -> Tensor:
        # In the random stage the router takes part, as ZeRO 3 wants it, and learns nothing.
        return (soft_TK * 0 if self.random else soft_TK)[:, SMALL:]

    def cost(self, gates_TU: Tensor) -> Tensor:
        # A vector of the costs would be copied from the host, which waits.
        priced = zip(self.path_costs[SMALL:], gates_TU.unbind(1), strict=True)
        return torch.stack([cost * gates_T for cost, gates_T in priced]).sum(0)

    def count_flops(self, count: FlopCounter, work: Work) -> None:
        """Router for all tokens, each unit for its own; a plan that spends the budget."""
        count.routing(self.router, work)
        # A plan knows the budget only; it counts it as tokens of the big unit.
        count(self.big, count.chosen(self, planned=work.share(self.budget), dense=work))

    def start_step(self, step: int) -> None:
        """Set the stage, and temperature and noise, of a training step."""
        self.random = step < self.random_steps
        super().start_step(step - self.random_steps)

    def _drawn_from(self, router_logits_TK: Tensor) -> tuple[Tensor, float]:
        # Random paths are draws from equal logits.
        if self.random:
            return torch.zeros_like(router_logits_TK), 1.0
        return super()._drawn_from(router_logits_TK)

    def _losses(
        self, cost_T: Tensor, router_logits_TK: Tensor, tape: RoutingTape
    ) -> tuple[dict[str, AuxiliaryLoss], Usage]:
        if self.random:
            return {}, Usage.measure(cost_T, tape)
        return super()._losses(cost_T, router_logits_TK, tape)

    def _statistics(self, shares_K: Tensor) -> dict[str, Tensor]:
        shares = zip(PATHS, shares_K, strict=True)
        return {f"share/{name}": share for name, share in shares}

    def _weights(self, cost_T: Tensor, probability_TK: Tensor) -> Tensor:
        return probability_TK[:, BIG]


@dataclass(frozen=True, kw_only=True)
class SizedFeedForwardConfig(BudgetedFeedForwardConfig):
    """Which layers of a decoder have feed-forwards of two sizes, and how they are chosen.

    Attributes:
        small_ffn_dim: width of the small one; null: a quarter of the layer's `ffn_dim`.
        random_steps: see `SizedFeedForward`.
        budget, layers, budget_coefficient, budget_over, controller_gain, schedule: see
            `BudgetedFeedForwardConfig`.
    """

    name = "sized_feed_forward"
    blocks = (SizedFeedForward,)
    not_negative: ClassVar[tuple[str, ...]] = (
        *BudgetedFeedForwardConfig.not_negative,
        "random_steps",
    )

    small_ffn_dim: int | None = None
    random_steps: int = 0
