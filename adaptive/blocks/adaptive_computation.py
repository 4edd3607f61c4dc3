"""AdaptiveComputationModule: a row of small learners, of which a gate runs the first few.

Shape legend: B batch, S sequence, T valid tokens, R tokens of one learner, D width, N learners,
K = N + 1 choices (0 to N learners).
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
from adaptive.routing.density import DensityControl, DensityController, Target
from adaptive.routing.forced import forced_choice
from adaptive.routing.gumbel import GumbelSchedule, gumbel_choice, soft_choice, straight_through
from adaptive.routing.layout import TokenLayout
from adaptive.routing.losses import choice_diversity
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


class LearnerChoice(NamedTuple):
    """What recomputation repeats: learners of each token, the noise, and each learner's tokens."""

    chosen: Tensor
    noise: Tensor
    taken: list[Selection]


class AdaptiveComputationModule(nn.Module):
    """`update = Σ_{i <= k} learner_i(x)`, where a gate picks k in 0…N for each token.

    Takes the place of a feed-forward: the input is the normed hidden state, the output the update
    without residual. Learner i runs for the tokens that asked for at least i, and for no other.
    The gate is a straight-through Gumbel-softmax over the N + 1 counts; the gradient that reaches
    "at least i" is `<grad_out, learner_i(x)>` where the learner ran, zero where it did not. In
    evaluation the argmax decides. Training from a trained feed-forward has three stages
    (`adaptive.models.convert.acm`): learners imitate it, the gate learns labels made from the
    learners' errors, then the whole model trains with the two losses here:

    - the budget, `|mean cost - budget|` over all modules of the model, cost = k / N;
    - diversity, minus the mutual information between token and k: the gate uses every count, and
      is sure of each. (The paper adds up distances between pairs of tokens, which would need all
      tokens of the global batch in one place.)

    Args:
        dim: width D.
        ffn_dim: hidden width of all learners together; a multiple of `num_learners`.
        num_learners: N.
        budget: target mean cost, in (0, 1].
        make_ffn: makes a learner of a given width, called as `learner(x_RD, layout=…)`; by
            default SwiGLU.
        gate_dim: hidden width of the gate; None: a quarter of `dim`, at most 64.
        budget_coefficient, diversity_coefficient: weights of the losses.
        budget_over: the budget is for every "layer", or for the mean over the "model".
        controller_gain: above 0, a `DensityController` with this gain holds the budget as well.
        schedule: temperature and noise over training steps.
        mesh: how the ranks share the model; one rank by default.

    Raises:
        ValueError: if an option is out of range.

    Source: Adaptive Computation Modules, arXiv 2312.10193, section 3.
    """

    kind = "adaptive_computation"

    def __init__(
        self,
        dim: int,
        ffn_dim: int,
        *,
        num_learners: int = 4,
        budget: float = 0.5,
        make_ffn: Callable[[int], nn.Module] | None = None,
        gate_dim: int | None = None,
        budget_coefficient: float = 0.1,
        diversity_coefficient: float = 0.01,
        budget_over: Target = "model",
        controller_gain: float = 0.0,
        schedule: GumbelSchedule | None = None,
        mesh: Mesh | None = None,
    ) -> None:
        super().__init__()
        if num_learners < 1 or ffn_dim % num_learners:
            raise ValueError(f"num_learners={num_learners}: must divide ffn_dim={ffn_dim}")
        if not 0 < budget <= 1:
            raise ValueError(f"budget={budget}: must be in (0, 1]")
        if diversity_coefficient < 0:
            raise ValueError(f"diversity_coefficient={diversity_coefficient}: must be 0 or more")
        self.mesh = mesh = Mesh.single() if mesh is None else mesh
        make_ffn = partial(SwiGLU, dim, mesh=mesh) if make_ffn is None else make_ffn
        width = ffn_dim // num_learners
        self.learners = nn.ModuleList([make_ffn(width) for _ in range(num_learners)])
        self.path_costs = tuple(count / num_learners for count in range(num_learners + 1))
        gate_dim = max(1, min(dim // 4, 64)) if gate_dim is None else gate_dim
        self.gate = LearnerGate(dim, gate_dim, num_learners + 1, mesh=mesh)
        self.diversity_coefficient = diversity_coefficient
        self.schedule = GumbelSchedule() if schedule is None else schedule
        self.temperature, self.noise = self.schedule.at(0)
        controller = DensityController(budget, gain=controller_gain) if controller_gain else None
        self.control = DensityControl(
            budget,
            coefficient=budget_coefficient,
            penalty="absolute",
            over=budget_over,
            controller=controller,
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
            The shape and dtype of `hidden`; zero where no learner ran.
        """
        flat, layout, valid = flatten_tokens(hidden, layout, token_mask)
        if valid is None:
            return self._forward_packed(flat, layout, None).view_as(hidden)
        source_layout, mask = layout, valid
        present = decide(lambda: self._selections(mask[:, None], source_layout)[0])
        out_TD = self._forward_packed(pack(flat, present.indices), present.layout, mask)
        return torch.zeros_like(flat).index_copy(0, present.indices, out_TD).view_as(hidden)

    def prefix_updates(self, x_TD: Tensor, layout: TokenLayout) -> Tensor:
        """[N, T, D]: the update of every token by its first 1, 2, …, N learners.

        What distillation compares with the feed-forward that is replaced.
        """
        each_NTD = torch.stack([learner(x_TD, layout=layout) for learner in self.learners])
        return each_NTD.cumsum(0)

    def count_flops(self, count: FlopCounter, work: Work) -> None:
        """Gate for all tokens, learners for those that ask for them; a plan spends the budget."""
        count.routing(self.gate, work)
        chosen = count.chosen(self, planned=work.share(self.budget), dense=work)
        for learner in self.learners:
            count(learner, chosen)

    def start_step(self, step: int) -> None:
        """Set temperature and noise of a training step."""
        self.temperature, self.noise = self.schedule.at(step)

    def _forward_packed(self, x_TD: Tensor, layout: TokenLayout, valid: Tensor | None) -> Tensor:
        router_logits_TK = self.gate(x_TD)
        choice = decide(lambda: self._choose(router_logits_TK, layout))
        soft_TK = soft_choice(router_logits_TK, choice.noise, temperature=self.temperature)
        # P(count >= i), i = 1…N, and whether it is.
        soft_TN = soft_TK.flip(1).cumsum(1).flip(1)[:, 1:]
        counts_N = torch.arange(1, len(self.learners) + 1, device=x_TD.device)
        gates_TN = straight_through(choice.chosen[:, None] >= counts_N, soft_TN)
        out_TD = torch.zeros_like(x_TD)
        for learner, taken, gates_T in zip(
            self.learners, choice.taken, gates_TN.unbind(1), strict=True
        ):
            update_RD = learner(pack(x_TD, taken.indices), layout=taken.layout)
            out_TD = combine_(out_TD, update_RD, taken.indices, pack(gates_T, taken.indices))
        tape = current_tape()
        if tape is not None:
            self._record(tape, choice, gates_TN, router_logits_TK, valid)
        return out_TD

    def _choose(self, router_logits_TK: Tensor, layout: TokenLayout) -> LearnerChoice:
        chosen_T, noise_TK = gumbel_choice(
            router_logits_TK,
            noise=self.noise if self.training else 0.0,
            mesh=self.mesh,
            shard_sizes=layout.shard_sizes,
        )
        forced_T = forced_choice(self, chosen_T.shape[0])
        chosen_T = chosen_T if forced_T is None else forced_T
        counts_N = torch.arange(1, len(self.learners) + 1, device=chosen_T.device)
        taken = self._selections(chosen_T[:, None] >= counts_N, layout)
        return LearnerChoice(chosen_T, noise_TK, taken)

    def _selections(self, taken_TN: Tensor, layout: TokenLayout) -> list[Selection]:
        taken_TN = gather_over_shards(taken_TN, self.mesh, layout.shard_sizes)
        chosen = Selection.from_masks(taken_TN, layout)
        return [selection.on_shard(layout, self.mesh) for selection in chosen]

    def _record(
        self,
        tape: RoutingTape,
        choice: LearnerChoice,
        gates_TN: Tensor,
        router_logits_TK: Tensor,
        valid: Tensor | None,
    ) -> None:
        cost_T = gates_TN.mean(1)
        losses, usage = self.control.losses(cost_T, tape, kind=self.kind)
        probabilities_TK = router_logits_TK.softmax(-1)
        diversity = choice_diversity(probabilities_TK, tape)
        losses["diversity"] = AuxiliaryLoss(-diversity, self.diversity_coefficient)
        chosen_T = choice.chosen
        counts_K = torch.arange(len(self.path_costs), device=chosen_T.device)
        if valid is not None:
            places = chosen_T.new_full((valid.shape[0],), -1)
            chosen_T = places.masked_scatter_(valid, chosen_T)
        record = RoutingRecord(
            name="",
            kind=self.kind,
            tokens=gates_TN.shape[0],
            # In units of the whole row of learners, so that FLOPs follow.
            executed=cost_T.detach().sum(),
            planned_share=self.budget,
            load=(choice.chosen[:, None] == counts_K).sum(0),
            entropy=masked_mean(torch.special.entr(probabilities_TK.detach()).sum(-1), None),
            statistics={"cost": usage.density} | self.control.statistics(),
            weights=cost_T.detach(),
            chosen=chosen_T[:, None],
        )
        tape.record(self, record, losses)


class LearnerGate(nn.Module):
    """Two layers that score how many learners a token wants: [T, D] -> logits [T, K], float32."""

    def __init__(
        self, dim: int, hidden: int, num_choices: int, *, mesh: Mesh | None = None
    ) -> None:
        super().__init__()
        self.up = LinearRouter(dim, hidden, std=dim**-0.5, bias=True, mesh=mesh)
        self.down = LinearRouter(hidden, num_choices, bias=True, mesh=mesh)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x_TD)))


@dataclass(frozen=True, kw_only=True)
class AdaptiveComputationConfig(BudgetedFeedForwardConfig):
    """Which layers of a decoder have rows of learners in place of a feed-forward.

    Attributes:
        num_learners: learners of a row.
        gate_dim: hidden width of gates; null: a quarter of the model's, at most 64.
        diversity_coefficient: see `AdaptiveComputationModule`.
        budget, layers, budget_coefficient, budget_over, controller_gain, schedule: see
            `BudgetedFeedForwardConfig`.
    """

    not_negative: ClassVar[tuple[str, ...]] = (
        *BudgetedFeedForwardConfig.not_negative,
        "diversity_coefficient",
    )

    num_learners: int = 4
    gate_dim: int | None = None
    diversity_coefficient: float = 0.01
    budget_over: Target = "model"

    def __post_init__(self) -> None:
        if self.num_learners < 1:
            raise ValueError(f"num_learners={self.num_learners}: must be at least 1")
        super().__post_init__()

    def block(
        self, dim: int, ffn_dim: int, *, make_ffn: Callable[[int], nn.Module], mesh: Mesh | None
    ) -> nn.Module:
        return AdaptiveComputationModule(
            dim,
            ffn_dim,
            num_learners=self.num_learners,
            budget=self.budget,
            make_ffn=make_ffn,
            gate_dim=self.gate_dim,
            budget_coefficient=self.budget_coefficient,
            diversity_coefficient=self.diversity_coefficient,
            budget_over=self.budget_over,
            controller_gain=self.controller_gain,
            schedule=self.schedule,
            mesh=mesh,
        )
