"""A feed-forward of several units, of which a gate runs some for each token, within a budget.

Shape legend: B batch, S sequence, T valid tokens, R tokens of one unit, D width, U units,
K choices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from adaptive.blocks.protocol import LayerContext, MakeFeedForward, Method, RoutedBlock
from adaptive.blocks.wrapping import flatten_tokens
from adaptive.ops.pack import combine_, pack
from adaptive.routing.density import DensityControl, DensityController, Penalty, Target, Usage
from adaptive.routing.forced import forced_choice
from adaptive.routing.gumbel import GumbelSchedule, gumbel_choice, soft_choice, straight_through
from adaptive.routing.layout import TokenLayout
from adaptive.routing.recompute import decide
from adaptive.routing.schedules import listed_layers
from adaptive.routing.selection import Selection
from adaptive.routing.tape import (
    AuxiliaryLoss,
    RoutingRecord,
    RoutingTape,
    current_tape,
    masked_mean,
)
from parallel.mesh import Mesh
from parallel.rows import gather_over_shards


class UnitChoice(NamedTuple):
    """What recomputation repeats: each token's choice, the noise, and the tokens of each unit."""

    chosen: Tensor
    noise: Tensor
    taken: list[Selection]


class BudgetedFeedForward(RoutedBlock):
    """`update = Σ_u g_u · unit_u(x)`, where a token's choice among K says which gates g are 1.

    Takes the place of a feed-forward: the input is the normed hidden state, the output the update
    without residual. A unit runs for the tokens that chose it, and for no other. Choices are a
    straight-through Gumbel-softmax of the router's logits in training, their argmax in evaluation;
    the gradient of a gate is `<grad_out, unit(x)>` where the unit ran, zero where it did not.

    Args:
        budget: target mean cost, in (0, 1].
        coefficient, penalty, over, controller_gain: of `DensityControl`.
        schedule: temperature and noise over training steps.
        mesh: how the ranks share the model.
    """

    def __init__(
        self,
        budget: float,
        *,
        coefficient: float,
        penalty: Penalty,
        over: Target,
        controller_gain: float,
        schedule: GumbelSchedule | None,
        mesh: Mesh,
    ) -> None:
        super().__init__()
        if not 0 < budget <= 1:
            raise ValueError(f"budget={budget}: must be in (0, 1]")
        self.mesh = mesh
        self.schedule = GumbelSchedule() if schedule is None else schedule
        self.temperature, self.noise = self.schedule.at(0)
        controller = DensityController(budget, gain=controller_gain) if controller_gain else None
        self.control = DensityControl(
            budget, coefficient=coefficient, penalty=penalty, over=over, controller=controller
        )

    @property
    def budget(self) -> float:
        """Target mean cost."""
        return self.control.target

    @property
    def units(self) -> Sequence[nn.Module]:
        """The units, called as `unit(x_RD, layout=…)`."""
        raise NotImplementedError

    def score(self, x_TD: Tensor) -> Tensor:
        """Router logits [T, K]."""
        raise NotImplementedError

    def runs(self, chosen_T: Tensor) -> Tensor:
        """bool [T, U]: which units run for tokens that made these choices, int64 [T]."""
        raise NotImplementedError

    def soft_runs(self, soft_TK: Tensor) -> Tensor:
        """[T, U]: the probability that each unit runs, from that of each choice."""
        raise NotImplementedError

    def cost(self, gates_TU: Tensor) -> Tensor:
        """[T]: what the gates cost, as a share of the whole feed-forward's compute."""
        raise NotImplementedError

    def forward(
        self,
        hidden: Tensor,
        *,
        token_mask: Tensor | None = None,
        layout: TokenLayout | None = None,
    ) -> Tensor:
        """The update of every token.

        Args:
            hidden: normed hidden states, [B, S, D], or packed [T, D] with `layout`.
            token_mask: bool, [B, S] or [T]; False at padding, whose update is zero.
            layout: where packed tokens came from.

        Returns:
            The shape and dtype of `hidden`; zero where no unit ran.
        """
        flat, layout, valid = flatten_tokens(hidden, layout, token_mask)
        if valid is None:
            return self._forward_packed(flat, layout, None).view_as(hidden)
        source_layout, mask = layout, valid
        present = decide(lambda: self._selections(mask[:, None], source_layout)[0])
        out_TD = self._forward_packed(pack(flat, present.indices), present.layout, mask)
        return torch.zeros_like(flat).index_copy(0, present.indices, out_TD).view_as(hidden)

    @property
    def replayed_choices(self) -> int:  # type: ignore[override]
        return len(self.path_costs)

    def start_step(self, step: int) -> None:
        """Set temperature and noise of a training step."""
        self.temperature, self.noise = self.schedule.at(step)

    def _forward_packed(self, x_TD: Tensor, layout: TokenLayout, valid: Tensor | None) -> Tensor:
        router_logits_TK = self.score(x_TD)
        choice = decide(lambda: self._choose(router_logits_TK, layout, valid))
        soft_TK = soft_choice(router_logits_TK, choice.noise, temperature=self.temperature)
        gates_TU = straight_through(self.runs(choice.chosen), self.soft_runs(soft_TK))
        out_TD = torch.zeros_like(x_TD)
        for unit, taken, gates_T in zip(self.units, choice.taken, gates_TU.unbind(1), strict=True):
            update_RD = unit(pack(x_TD, taken.indices), layout=taken.layout)
            out_TD = combine_(out_TD, update_RD, taken.indices, pack(gates_T, taken.indices))
        tape = current_tape()
        if tape is not None:
            self._record(tape, choice, gates_TU, router_logits_TK, valid)
        return out_TD

    def _choose(
        self, router_logits_TK: Tensor, layout: TokenLayout, valid: Tensor | None
    ) -> UnitChoice:
        logits_TK, noise = self._drawn_from(router_logits_TK)
        chosen_T, noise_TK = gumbel_choice(
            logits_TK, noise=noise, mesh=self.mesh, shard_sizes=layout.shard_sizes
        )
        forced_T = forced_choice(self, chosen_T.shape[0], valid)
        chosen_T = chosen_T if forced_T is None else forced_T.flatten()
        return UnitChoice(chosen_T, noise_TK, self._selections(self.runs(chosen_T), layout))

    def _drawn_from(self, router_logits_TK: Tensor) -> tuple[Tensor, float]:
        """Logits, and the scale of the noise, of which the largest sum is the choice."""
        return router_logits_TK, self.noise if self.training else 0.0

    def _selections(self, taken_TU: Tensor, layout: TokenLayout) -> list[Selection]:
        taken_TU = gather_over_shards(taken_TU, self.mesh, layout.shard_sizes)
        chosen = Selection.from_masks(taken_TU, layout)
        return [selection.on_shard(layout, self.mesh) for selection in chosen]

    def _losses(
        self, cost_T: Tensor, router_logits_TK: Tensor, tape: RoutingTape
    ) -> tuple[dict[str, AuxiliaryLoss], Usage]:
        return self.control.losses(cost_T, tape, kind=self.kind)

    def _record(
        self,
        tape: RoutingTape,
        choice: UnitChoice,
        gates_TU: Tensor,
        router_logits_TK: Tensor,
        valid: Tensor | None,
    ) -> None:
        cost_T, chosen_T = self.cost(gates_TU), choice.chosen
        losses, usage = self._losses(cost_T, router_logits_TK, tape)
        # Without the noise: what the router says of a token, not what was drawn for it.
        probability_TK = router_logits_TK.detach().softmax(-1)
        choices_K = torch.arange(len(self.path_costs), device=chosen_T.device)
        load_K = (chosen_T[:, None] == choices_K).sum(0)
        record = RoutingRecord(
            name="",
            kind=self.kind,
            tokens=gates_TU.shape[0],
            # In units of the whole feed-forward, so that FLOPs follow.
            executed=cost_T.detach().sum(),
            planned_share=self.budget,
            load=load_K,
            entropy=masked_mean(torch.special.entr(probability_TK).sum(-1), None),
            statistics={"cost": usage.density}
            | self.control.statistics()
            | self._statistics(load_K / max(gates_TU.shape[0], 1)),
            weights=self._weights(cost_T.detach(), probability_TK),
            chosen=_spread(chosen_T, valid),
            scores=self._drawn_from(router_logits_TK.detach())[0] + choice.noise,
        )
        tape.record(self, record, losses)

    def _statistics(self, shares_K: Tensor) -> dict[str, Tensor]:
        """Numbers of a record beyond the cost, from the share of tokens that made each choice."""
        return {}

    def _weights(self, cost_T: Tensor, probability_TK: Tensor) -> Tensor:
        """[T]: what a record shows of each token."""
        return cost_T


def _spread(chosen_T: Tensor, valid: Tensor | None) -> Tensor:
    """The choices [tokens of the source, 1]; -1 at padding."""
    if valid is not None:
        places = chosen_T.new_full((valid.shape[0],), -1)
        chosen_T = places.masked_scatter_(valid, chosen_T)
    return chosen_T[:, None]


@dataclass(frozen=True, kw_only=True)
class BudgetedFeedForwardConfig(Method):
    """The layers of a decoder whose feed-forward chooses its compute a token, and their budget.

    Attributes:
        budget: target mean cost, as a share of the whole feed-forward's compute.
        layers: "all", or a list of layers.
        budget_coefficient, budget_over, controller_gain, schedule: see the block.
    """

    place = "feed_forward"
    excludes = ("linear", "feed_forward")
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
        if isinstance(self.layers, str):
            return list(range(num_layers))
        return listed_layers(self.layers, num_layers, key="layers")

    def build(self, context: LayerContext, inner: MakeFeedForward) -> nn.Module:
        """The block of this configuration, with units as the layer's own feed-forwards are."""
        (block,) = self.blocks
        options = self.options(without=("layers",))
        return block(context.dim, context.ffn_dim, make_ffn=inner, mesh=context.mesh, **options)
