"""SizedFeedForward: a big and a small feed-forward and a bypass; every token takes one of them.

Shape legend: B batch, S sequence, T valid tokens, R tokens of one path, D width, P paths.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptive.blocks.budgeted_feed_forward import BudgetedFeedForwardConfig
from adaptive.blocks.feed_forward import SwiGLU
from adaptive.blocks.wrapping import flatten_tokens
from adaptive.ops.flop_counter import FlopCounter, Work
from adaptive.ops.pack import combine_, pack
from adaptive.routing.density import DensityControl, DensityController, Target, Usage
from adaptive.routing.forced import forced_choice
from adaptive.routing.gumbel import (
    GumbelSchedule,
    gumbel_choice,
    soft_choice,
    straight_through,
)
from adaptive.routing.layout import TokenLayout
from adaptive.routing.recompute import decide
from adaptive.routing.routers import LinearRouter
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

PATHS = ("bypass", "small", "big")
BYPASS, SMALL, BIG = range(3)


class SizedChoice(NamedTuple):
    """What recomputation repeats: each token's path, the noise, and the tokens of each unit."""

    chosen: Tensor
    noise: Tensor
    small: Selection
    big: Selection


class SizedFeedForward(nn.Module):
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
        super().__init__()
        small = max(ffn_dim // 4, 1) if small_ffn_dim is None else small_ffn_dim
        if not 1 <= small < ffn_dim:
            raise ValueError(f"small_ffn_dim={small}: must be between 1 and ffn_dim={ffn_dim}")
        if not 0 < budget <= 1:
            raise ValueError(f"budget={budget}: must be in (0, 1]")
        if random_steps < 0:
            raise ValueError(f"random_steps={random_steps}: must be 0 or more")
        self.mesh = mesh = Mesh.single() if mesh is None else mesh
        make_ffn = partial(SwiGLU, dim, mesh=mesh) if make_ffn is None else make_ffn
        self.big, self.small = make_ffn(ffn_dim), make_ffn(small)
        self.path_costs = (0.0, small / ffn_dim, 1.0)
        self.random_steps = random_steps
        self.random = False
        self.schedule = GumbelSchedule() if schedule is None else schedule
        self.temperature, self.noise = self.schedule.at(0)
        self.router = LinearRouter(dim, len(PATHS), bias=True, mesh=mesh)
        controller = DensityController(budget, gain=controller_gain) if controller_gain else None
        self.control = DensityControl(
            budget, coefficient=budget_coefficient, over=budget_over, controller=controller
        )

    @property
    def budget(self) -> float:
        """Target mean cost."""
        return self.control.target

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
            The shape and dtype of `hidden`; zero where a token bypasses.
        """
        flat, layout, valid = flatten_tokens(hidden, layout, token_mask)
        if valid is None:
            return self._forward_packed(flat, layout, None).view_as(hidden)
        source_layout, mask = layout, valid
        present = decide(lambda: self._selections(mask[:, None], source_layout)[0])
        out_TD = self._forward_packed(pack(flat, present.indices), present.layout, mask)
        return torch.zeros_like(flat).index_copy(0, present.indices, out_TD).view_as(hidden)

    def count_flops(self, count: FlopCounter, work: Work) -> None:
        """Router for all tokens, each unit for its own; a plan that spends the budget."""
        count.routing(self.router, work)
        # A plan knows the budget only; it counts it as tokens of the big unit.
        count(self.big, count.chosen(self, planned=work.share(self.budget), dense=work))

    def start_step(self, step: int) -> None:
        """Set the stage, and temperature and noise, of a training step."""
        self.random = step < self.random_steps
        self.temperature, self.noise = self.schedule.at(step - self.random_steps)

    def _forward_packed(self, x_TD: Tensor, layout: TokenLayout, valid: Tensor | None) -> Tensor:
        router_logits_TP = self.router(x_TD)
        choice = decide(lambda: self._choose(router_logits_TP, layout))
        soft_TP = soft_choice(router_logits_TP, choice.noise, temperature=self.temperature)
        hard_TP = F.one_hot(choice.chosen, len(PATHS))
        # In the random stage the router takes part, as ZeRO 3 wants it, and learns nothing.
        gates_TP = straight_through(hard_TP, soft_TP * 0 if self.random else soft_TP)
        out_TD = torch.zeros_like(x_TD)
        for unit, taken, path in ((self.small, choice.small, SMALL), (self.big, choice.big, BIG)):
            update_RD = unit(pack(x_TD, taken.indices), layout=taken.layout)
            gates_R = pack(gates_TP[:, path].contiguous(), taken.indices)
            out_TD = combine_(out_TD, update_RD, taken.indices, gates_R)
        tape = current_tape()
        if tape is not None:
            self._record(tape, choice, gates_TP, router_logits_TP, valid)
        return out_TD

    def _choose(self, router_logits_TP: Tensor, layout: TokenLayout) -> SizedChoice:
        # Random paths are draws from equal logits.
        logits_TP = torch.zeros_like(router_logits_TP) if self.random else router_logits_TP
        noise = self.noise if self.training else 0.0
        chosen_T, noise_TP = gumbel_choice(
            logits_TP,
            noise=1.0 if self.random else noise,
            mesh=self.mesh,
            shard_sizes=layout.shard_sizes,
        )
        forced_T = forced_choice(self, chosen_T.shape[0])
        chosen_T = chosen_T if forced_T is None else forced_T
        taken_TU = torch.stack([chosen_T == SMALL, chosen_T == BIG], dim=1)
        return SizedChoice(chosen_T, noise_TP, *self._selections(taken_TU, layout))

    def _selections(self, taken_TU: Tensor, layout: TokenLayout) -> list[Selection]:
        taken_TU = gather_over_shards(taken_TU, self.mesh, layout.shard_sizes)
        chosen = Selection.from_masks(taken_TU, layout)
        return [selection.on_shard(layout, self.mesh) for selection in chosen]

    def _record(
        self,
        tape: RoutingTape,
        choice: SizedChoice,
        gates_TP: Tensor,
        router_logits_TP: Tensor,
        valid: Tensor | None,
    ) -> None:
        # A vector of the costs would be copied from the host, which waits.
        priced = zip(self.path_costs, gates_TP.unbind(1), strict=True)
        cost_T = torch.stack([cost * gates_T for cost, gates_T in priced]).sum(0)
        losses: dict[str, AuxiliaryLoss] = {}
        if self.random:
            usage = Usage.measure(cost_T, tape)
        else:
            losses, usage = self.control.losses(cost_T, tape, kind=self.kind)
        load = gates_TP.detach().sum(0)
        # Without the noise: what the router says of a token, not what was drawn for it.
        probability_TP = router_logits_TP.detach().softmax(-1)
        shares = load / max(gates_TP.shape[0], 1)
        record = RoutingRecord(
            name="",
            kind=self.kind,
            tokens=gates_TP.shape[0],
            # In units of the big feed-forward, so that FLOPs follow.
            executed=cost_T.detach().sum(),
            planned_share=self.budget,
            load=load,
            entropy=masked_mean(torch.special.entr(probability_TP).sum(-1), None),
            statistics={"cost": usage.density}
            | self.control.statistics()
            | {f"share/{name}": share for name, share in zip(PATHS, shares, strict=True)},
            weights=probability_TP[:, BIG],
            chosen=_spread(choice.chosen, valid),
        )
        tape.record(self, record, losses)


def _spread(chosen_T: Tensor, valid: Tensor | None) -> Tensor:
    """The choices [tokens of the source, 1]; -1 at padding."""
    if valid is not None:
        places = chosen_T.new_full((valid.shape[0],), -1)
        chosen_T = places.masked_scatter_(valid, chosen_T)
    return chosen_T[:, None]


@dataclass(frozen=True, kw_only=True)
class SizedFeedForwardConfig(BudgetedFeedForwardConfig):
    """Which layers of a decoder have feed-forwards of two sizes, and how they are chosen.

    Attributes:
        small_ffn_dim: width of the small one; null: a quarter of the layer's `ffn_dim`.
        random_steps: see `SizedFeedForward`.
        budget, layers, budget_coefficient, budget_over, controller_gain, schedule: see
            `BudgetedFeedForwardConfig`.
    """

    not_negative: ClassVar[tuple[str, ...]] = (
        *BudgetedFeedForwardConfig.not_negative,
        "random_steps",
    )

    small_ffn_dim: int | None = None
    random_steps: int = 0

    def block(
        self, dim: int, ffn_dim: int, *, make_ffn: Callable[[int], nn.Module], mesh: Mesh | None
    ) -> nn.Module:
        return SizedFeedForward(
            dim,
            ffn_dim,
            small_ffn_dim=self.small_ffn_dim,
            budget=self.budget,
            make_ffn=make_ffn,
            random_steps=self.random_steps,
            budget_coefficient=self.budget_coefficient,
            budget_over=self.budget_over,
            controller_gain=self.controller_gain,
            schedule=self.schedule,
            mesh=mesh,
        )
