"""AdaptiveComputationModule: a row of small learners, of which a gate runs the first few.

Shape legend: B batch, S sequence, T valid tokens, R tokens of one learner, D width, N learners,
K = N + 1 choices (0 to N learners).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptive.blocks.budgeted_feed_forward import BudgetedFeedForward, BudgetedFeedForwardConfig
from adaptive.blocks.feed_forward import SwiGLU
from adaptive.ops.flop_counter import FlopCounter, Work
from adaptive.routing.density import Target, Usage
from adaptive.routing.gumbel import GumbelSchedule
from adaptive.routing.layout import TokenLayout
from adaptive.routing.losses import choice_diversity
from adaptive.routing.routers import LinearRouter
from adaptive.routing.tape import AuxiliaryLoss, RoutingTape
from parallel.mesh import Mesh


class AdaptiveComputationModule(BudgetedFeedForward):
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
        mesh = Mesh.single() if mesh is None else mesh
        super().__init__(
            budget,
            coefficient=budget_coefficient,
            penalty="absolute",
            over=budget_over,
            controller_gain=controller_gain,
            schedule=schedule,
            mesh=mesh,
        )
        if num_learners < 1 or ffn_dim % num_learners:
            raise ValueError(f"num_learners={num_learners}: must divide ffn_dim={ffn_dim}")
        if diversity_coefficient < 0:
            raise ValueError(f"diversity_coefficient={diversity_coefficient}: must be 0 or more")
        make_ffn = partial(SwiGLU, dim, mesh=mesh) if make_ffn is None else make_ffn
        width = ffn_dim // num_learners
        self.learners = nn.ModuleList([make_ffn(width) for _ in range(num_learners)])
        self.path_costs = tuple(count / num_learners for count in range(num_learners + 1))
        gate_dim = max(1, min(dim // 4, 64)) if gate_dim is None else gate_dim
        self.gate = LearnerGate(dim, gate_dim, num_learners + 1, mesh=mesh)
        self.diversity_coefficient = diversity_coefficient

    @property
    def units(self) -> Sequence[nn.Module]:
        return list(self.learners)

    def score(self, x_TD: Tensor) -> Tensor:
        return self.gate(x_TD)

    def runs(self, chosen_T: Tensor) -> Tensor:
        counts_N = torch.arange(1, len(self.learners) + 1, device=chosen_T.device)
        return chosen_T[:, None] >= counts_N

    def soft_runs(self, soft_TK: Tensor) -> Tensor:
        # P(count >= i), i = 1…N.
        return soft_TK.flip(1).cumsum(1).flip(1)[:, 1:]

    def cost(self, gates_TU: Tensor) -> Tensor:
        return gates_TU.mean(1)

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

    def _losses(
        self, cost_T: Tensor, router_logits_TK: Tensor, tape: RoutingTape
    ) -> tuple[dict[str, AuxiliaryLoss], Usage]:
        losses, usage = super()._losses(cost_T, router_logits_TK, tape)
        diversity = choice_diversity(router_logits_TK.softmax(-1), tape)
        losses["diversity"] = AuxiliaryLoss(-diversity, self.diversity_coefficient)
        return losses, usage


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

    name = "adaptive_computation"
    blocks = (AdaptiveComputationModule,)
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
