"""Mixture of experts: every token is computed by a few of many feed-forwards.

Shape legend: B batch, S sequence, T = B*S or packed tokens, D width, E experts, K experts a token,
N taken (token, expert) pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from adaptive.blocks.experts import Experts, SharedExperts
from adaptive.blocks.mixtral_weights import load_mixtral_weights, mixtral_sizes, mixtral_weights
from adaptive.blocks.protocol import LayerContext, MakeFeedForward, Method, RoutedBlock
from adaptive.blocks.wrapping import without_padding
from adaptive.ops.expert_feed_forward import Activation, check_activation
from adaptive.ops.flop_counter import FlopCounter, Work
from adaptive.ops.permute import permute, unpermute
from adaptive.ops.ranking import count_by_unit
from adaptive.routing.assignment import Assignment
from adaptive.routing.balance import ExpertBias, biased, load_balancing_loss, total_of
from adaptive.routing.collapse import collapse_statistics
from adaptive.routing.forced import forced_choice
from adaptive.routing.hyperspherical import Gate, HypersphericalRouter
from adaptive.routing.layout import TokenLayout, valid_tokens
from adaptive.routing.losses import z_loss
from adaptive.routing.recompute import decide, recomputing
from adaptive.routing.routers import LinearRouter, jittered
from adaptive.routing.schedules import listed_layers
from adaptive.routing.scope import BatchScope
from adaptive.routing.tape import (
    AuxiliaryLoss,
    RoutingRecord,
    current_tape,
    masked_mean,
)
from adaptive.routing.token_choice import (
    ExpertGroups,
    check_expert_choice,
    experts_choose,
    gate_scores,
    token_choice,
    told_choice,
)
from parallel.expert import combine, dispatch, plan_dispatch
from parallel.mesh import Mesh
from parallel.rows import gather_over_shards
from parallel.tensor import enter_tensor_region, leave_tensor_region

ExpertsChoice = Literal["token", "expert"]
RouterKind = Literal["linear", "hyperspherical"]
PAPER_TEMPERATURE = {"softmax": 0.3, "sigmoid": 0.07}


class MixtureOfExperts(RoutedBlock):
    """A feed-forward of many experts, of which each token uses `top_k`. No residual.

    `out = Σ_k weight_k · expert_k(x)` over the chosen experts: those with the highest scores, where
    scores are the gate (softmax or sigmoid) of the router's logits. Dropless by default.

    Example:
        ffn = MixtureOfExperts(dim, ffn_dim, 8, router=HypersphericalRouter(dim, 8))
        x = x + ffn(norm(x))

    Args:
        dim, ffn_dim: D, and the width of every expert.
        num_experts: E.
        top_k: K, experts a token.
        router: hidden [T, D] -> router logits [T, E]; None: a LinearRouter. Its attribute `gate`,
            if it has one, is the gate; its method `balance_logits`, if it has one, makes the
            logits of the balance loss.
        capacity_factor: None: dropless. Positive: an expert takes at most that many times an even
            load; 0: what is needed; negative: what is needed up to that bound (see `capacity_of`).
            What is dropped leaves as zero, so it passes by the residual, and is counted. In
            training only: evaluation drops nothing, or a token would depend on later ones.
        activation: "swiglu" or "gelu".
        gate: logits to scores, "softmax" over the experts or "sigmoid" of each; None: the
            router's own, else softmax.
        renormalize: the chosen weights sum to 1. None: yes if `top_k` > 1; a single weight would be
            1 whatever the router says.
        choice: "token", or "expert": every expert chooses its tokens, which is **not causal**
            (needs a positive `capacity_factor`).
        groups: limits a token's experts to some groups of experts.
        jitter: in training the router sees `h * U(1 - jitter, 1 + jitter)`.
        balance_coefficient, z_coefficient: of the two losses.
        bias_rate: above 0, balance without a loss: step size of the bias (`ExpertBias`).
        shared_experts: this many times `ffn_dim` of feed-forward that every token uses.
        shared_gate: weigh what they say by `sigmoid(h w)` of each token (Qwen2-MoE).
        freeze_router, freeze_experts: leave them out of training (fine-tuning).
        std, output_std: of the initial weights of the experts, see `Experts`.
        mesh: how the ranks share the experts, and the channels of each.

    Attributes:
        causal: False with expert choice: what a token becomes then depends on later ones.
        measures_collapse: record what `collapse_statistics` computes; slow, for evaluation.

    Sources: Switch Transformer, arXiv 2101.03961; Mixtral, arXiv 2401.04088, section 2.1; X-MoE,
    arXiv 2204.09179.
    """

    kind = "mixture_of_experts"
    num_idle = 0

    def __init__(
        self,
        dim: int,
        ffn_dim: int,
        num_experts: int,
        *,
        top_k: int = 2,
        router: nn.Module | None = None,
        capacity_factor: float | None = None,
        activation: Activation = "swiglu",
        gate: Gate | None = None,
        renormalize: bool | None = None,
        choice: ExpertsChoice = "token",
        groups: ExpertGroups | None = None,
        jitter: float = 0.0,
        balance_coefficient: float = 0.01,
        z_coefficient: float = 0.0,
        bias_rate: float = 0.0,
        shared_experts: int = 0,
        shared_gate: bool = False,
        freeze_router: bool = False,
        freeze_experts: bool = False,
        std: float = 0.02,
        output_std: float | None = None,
        mesh: Mesh | None = None,
    ) -> None:
        super().__init__()
        units = num_experts + self.num_idle
        renormalize = top_k > 1 if renormalize is None else renormalize
        if not 1 <= top_k <= units:
            raise ValueError(f"top_k={top_k}: must be between 1 and num_experts={units}")
        if renormalize and top_k == 1:
            raise ValueError("renormalize=True: needs top_k of 2 or more, or no router learns")
        if not 0 <= jitter < 1:
            raise ValueError(f"jitter={jitter}: must be in [0, 1)")
        if shared_experts < 0:
            raise ValueError(f"shared_experts={shared_experts}: must be 0 or more")
        if shared_gate and not shared_experts:
            raise ValueError("shared_gate=True: needs shared_experts of 1 or more")
        if choice not in get_args(ExpertsChoice):
            raise ValueError(f"choice={choice!r}: must be token or expert")
        if choice == "expert":
            check_expert_choice(capacity_factor, groups, bias_rate)
        if groups is not None:
            groups.check(units, top_k)
        self.dim, self.num_experts, self.top_k = dim, num_experts, top_k
        self.capacity_factor, self.renormalize = capacity_factor, renormalize
        self.choice, self.groups, self.jitter = choice, groups, jitter
        self.balance_coefficient, self.z_coefficient = balance_coefficient, z_coefficient
        self.causal = choice == "token"
        self.replayed_choices = units + 1 if self.causal else 0  # the last: to no expert
        self.measures_collapse = False
        self.mesh = Mesh.single() if mesh is None else mesh
        self.router = LinearRouter(dim, units, mesh=self.mesh) if router is None else router
        self.gate: Gate = getattr(self.router, "gate", "softmax") if gate is None else gate
        if self.gate not in get_args(Gate):
            raise ValueError(f"gate={self.gate!r}: must be softmax or sigmoid")
        given: dict[str, Any] = {"activation": activation, "std": std, "output_std": output_std}
        self.experts = Experts(dim, ffn_dim, num_experts, mesh=self.mesh, **given)
        self.shared = None
        if shared_experts:
            given |= {"gated": shared_gate, "mesh": self.mesh}
            self.shared = SharedExperts(dim, shared_experts * ffn_dim, **given)
        self.expert_bias = ExpertBias(units, rate=bias_rate) if bias_rate else None
        self.router.requires_grad_(not freeze_router)
        self.experts.requires_grad_(not freeze_experts)

    def forward(
        self,
        hidden: Tensor,
        *,
        token_mask: Tensor | None = None,
        layout: TokenLayout | None = None,
    ) -> Tensor:
        """The weighted sum of every token's experts.

        Args:
            hidden: [B, S, D] or packed [T, D].
            token_mask: bool, [B, S] or [T]; False at padding, which goes to no expert.
            layout: of packed tokens; only its shard sizes are read, each token stands alone.

        Returns:
            The shape and dtype of `hidden`; zeros at padding.
        """
        hidden_TD, valid_T = self._flat(hidden, token_mask)
        routed_TD = without_padding(hidden_TD, valid_T)
        # Under sequence parallelism everybody's tokens are computed here, and chosen for together.
        shards = None if layout is None else layout.shard_sizes
        if self.jitter and self.training:
            routed_TD = jittered(routed_TD, self.jitter, self.mesh, shards)
        logits_TE = self.router(routed_TD)
        scores_TE = gate_scores(logits_TE, self.gate)
        # Context ranks compute their own, like data ranks.
        mesh = self.mesh.without_context() if self.mesh.sequence_parallel else Mesh.single()
        within = None if shards is None else self.mesh.tensor_sizes(shards)
        gather = partial(gather_over_shards, mesh=mesh, shard_sizes=within)
        everyone_T = None if valid_T is None else gather(valid_T)
        if self.told is None:
            assignment = decide(lambda: self.choose(gather(scores_TE), everyone_T))
        else:
            assignment = decide(lambda: self._told(scores_TE.shape[0], gather, everyone_T))
        own = decide(lambda: self._own(assignment, hidden_TD.shape[0], within))
        own = own.with_weights(self._weights(scores_TE, own))
        enter = partial(enter_tensor_region, mesh=self.mesh, shard_sizes=shards)
        x_TD = enter(hidden_TD)
        assert own.weights is not None
        out_TD = self.compute(x_TD, assignment.with_weights(enter(own.weights)))
        if self.shared is not None:
            weights_T1 = self.shared.weights(without_padding(hidden_TD, valid_T))
            weights_T1 = None if weights_T1 is None else enter(weights_T1)
            out_TD = out_TD + self.shared(x_TD, valid_T=everyone_T, weights_T1=weights_T1)
        out_TD = leave_tensor_region(out_TD, self.mesh, shard_sizes=shards)
        self._observe(hidden_TD, logits_TE, scores_TE, own, valid_T)
        return out_TD.to(hidden.dtype).view_as(hidden)

    def choose(self, scores_TE: Tensor, valid_T: Tensor | None) -> Assignment:
        """Which experts each token goes to. Override for a choice of your own; not differentiated.

        Args:
            scores_TE: after the gate, float32.
            valid_T: bool [T] or None, False at padding.
        """
        if self.choice == "expert":
            assert self.capacity_factor is not None
            return experts_choose(
                scores_TE, self.capacity_factor, top_k=self.top_k, valid_T=valid_T
            )
        return token_choice(
            scores_TE,
            self.top_k,
            bias_E=None if self.expert_bias is None else self.expert_bias.bias,
            groups=self.groups,
            valid_T=valid_T,
            # What is dropped depends on the tokens after it: text could not be generated.
            capacity_factor=self.capacity_factor if self.training else None,
            num_idle=self.num_idle,
        )

    def _told(self, tokens: int, gather: Any, valid_T: Tensor | None) -> Assignment:
        index_TK = gather(forced_choice(self, tokens))
        sizes = (self.top_k, self.num_experts)
        return told_choice(index_TK, *sizes, valid_T=valid_T, num_idle=self.num_idle)

    def compute(self, hidden_TD: Tensor, assignment: Assignment) -> Tensor:
        """Run the experts on the taken pairs and sum them by weight: [T, D] -> [T, D].

        With expert parallelism rows travel twice; every rank joins, whatever was routed.
        """
        if self.mesh.expert == 1:
            return self.experts(
                hidden_TD,
                pairs_N=assignment.pairs,
                rows_per_expert_e=assignment.tokens_per_expert,
                weights_TK=assignment.weights,
                top_k=assignment.top_k,
            )
        plan = decide(lambda: plan_dispatch(assignment.tokens_per_expert, self.mesh))
        rows_ND = permute(hidden_TD, assignment.pairs, assignment.top_k)
        rows_RD = dispatch(rows_ND, plan, self.mesh)
        rows_RD = self.experts(rows_RD, pairs_N=plan.order, rows_per_expert_e=plan.rows_per_expert)
        rows_ND = combine(rows_RD, plan, self.mesh)
        shape = (hidden_TD.shape[0], assignment.top_k)
        return unpermute(rows_ND, assignment.pairs, assignment.weights, shape)

    def start_step(self, step: int) -> None:
        """Move the expert bias by the load of the step before. The training loop calls it."""
        if self.expert_bias is not None and self.training:
            self.expert_bias.update()

    def _flat(self, hidden: Tensor, token_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if hidden.dim() not in (2, 3) or hidden.shape[-1] != self.dim:
            raise ValueError(
                f"hidden of shape {list(hidden.shape)}: must be [B, S, {self.dim}] "
                f"or [T, {self.dim}]"
            )
        if token_mask is not None and token_mask.shape != hidden.shape[:-1]:
            raise ValueError(
                f"token_mask of shape {list(token_mask.shape)}: must be {list(hidden.shape[:-1])}"
            )
        valid_T = None if token_mask is None else valid_tokens(token_mask).flatten()
        return hidden.flatten(0, -2), valid_T

    def _own(self, assignment: Assignment, rows: int, shards: tuple[int, ...] | None) -> Assignment:
        """The part of a choice for all tokens that concerns this rank's."""
        if not self.mesh.sequence_parallel:
            return assignment
        rank = self.mesh.tensor_rank
        start = rank * rows if shards is None else sum(shards[:rank])
        return assignment.of_rows(start, start + rows)

    def _weights(self, scores_TE: Tensor, assignment: Assignment) -> Tensor:
        """[T, K]: the scores of the chosen experts, never with the bias that chose them."""
        if self.choice == "expert":
            return scores_TE
        index_TK = assignment.expert_index.clamp(max=scores_TE.shape[1] - 1)
        weights_TK = scores_TE.gather(1, index_TK)
        if self.renormalize:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True).clamp(min=1e-20)
        return weights_TK

    def _observe(
        self,
        hidden_TD: Tensor,
        logits_TE: Tensor,
        scores_TE: Tensor,
        assignment: Assignment,
        valid_T: Tensor | None,
    ) -> None:
        """Losses and the record, on a tape; and the load that moves the expert bias."""
        tape = current_tape()
        counts_bias = self.expert_bias is not None and self.training
        if tape is None and not counts_bias:
            return
        units = self.num_experts + self.num_idle
        load_E = count_by_unit(assignment.expert_index, units + 1)[:units]
        tokens = logits_TE.shape[0] if valid_T is None else valid_T.sum()
        counts = torch.cat([load_E, load_E.new_ones(1) * tokens])
        total = total_of(counts, tape, self.mesh)
        if counts_bias and not recomputing() and not (tape is not None and tape.scope.counting):
            assert self.expert_bias is not None
            # Every micro-batch is told the total of all of them.
            micro_batches = 1 if tape is None else tape.scope.micro_batches
            count = partial(self.expert_bias.count, total[:-1] / micro_batches)
            count() if tape is None else tape.when_done(count)
        if tape is not None:
            probabilities_TE = self._balanced(logits_TE, scores_TE)
            losses = self._losses(logits_TE, probabilities_TE, total, valid_T)
            record = self._record(probabilities_TE, assignment, valid_T, load_E[: self.num_experts])
            if self.measures_collapse:
                record.statistics = collapse_statistics(hidden_TD, assignment, self.router, valid_T)
            record.scores = biased(scores_TE.detach(), self.expert_bias)
            tape.record(self, record, losses)

    def _balanced(self, logits_TE: Tensor, scores_TE: Tensor) -> Tensor:
        """float32 [T, E]: the distribution that the balance loss spreads, softmax of the logits."""
        balance_logits = getattr(self.router, "balance_logits", None)
        if self.gate == "softmax" and balance_logits is None:
            return scores_TE
        balance_TE = logits_TE if balance_logits is None else balance_logits(logits_TE)
        return balance_TE.softmax(-1, dtype=torch.promote_types(balance_TE.dtype, torch.float32))

    def _losses(
        self, logits_TE: Tensor, probabilities_TE: Tensor, total: Tensor, valid_T: Tensor | None
    ) -> dict[str, AuxiliaryLoss]:
        """This rank's shares of the losses. `total` [units + 1]: global choices, valid tokens."""
        # Inside a depth-routed block fewer tokens reach this router than the batch has.
        reached = BatchScope(tokens=total[-1])
        losses = {}
        if self.balance_coefficient and self.choice == "token":
            share = load_balancing_loss(probabilities_TE, total[:-1], valid_T, reached)
            losses["load_balancing"] = AuxiliaryLoss(share, self.balance_coefficient)
        if self.z_coefficient:
            share = z_loss(logits_TE, valid_T, reached)
            losses["z"] = AuxiliaryLoss(share, self.z_coefficient)
        return losses

    @torch.no_grad()
    def _record(
        self,
        probabilities_TE: Tensor,
        assignment: Assignment,
        valid_T: Tensor | None,
        load_E: Tensor,
    ) -> RoutingRecord:
        """What became of this rank's tokens. `load_E` is of the experts that compute."""
        assert assignment.weights is not None
        weights_N = assignment.weights.flatten()[assignment.pairs]
        taken, wanted = assignment.pairs.shape[0], assignment.wanted_per_expert.sum()
        return RoutingRecord(
            name="",
            kind=self.kind,
            tokens=probabilities_TE.shape[0] if valid_T is None else valid_T.sum(),
            executed=taken,
            load=load_E,
            choices=probabilities_TE.shape[1],
            entropy=masked_mean(torch.special.entr(probabilities_TE).sum(-1), valid_T),
            dropped=1 - taken / wanted.clamp(min=1),
            dead_units=(load_E == 0).sum(),
            weight_mean=masked_mean(weights_N, None),
            weight_std=weights_N.float().std(correction=0) if taken else None,
            weights=weights_N,
            chosen=assignment.expert_index,
        )

    def count_flops(self, count: FlopCounter, work: Work) -> None:
        """Products of the router, the chosen experts and the shared ones, see FlopCounter."""
        factor = self.capacity_factor if self.choice == "expert" else None
        planned = work.times(self.top_k * (1 if factor is None else factor))
        chosen = count.chosen(self, planned=planned, dense=planned)
        count.routing(self.router, work)
        self.experts.count_flops(count, chosen)
        if self.shared is not None:
            self.shared.count_flops(count, work)

    @classmethod
    def from_mixtral_state_dict(
        cls, weights: Mapping[str, Tensor], *, top_k: int, **options: Any
    ) -> MixtureOfExperts:
        """A block with a Mixtral layer's weights: softmax over all experts, top-k renormalised.

        Args:
            weights: `gate.weight` [E, D], `experts.gate_up_proj` [E, 2F, D] with the gate half
                first, `experts.down_proj` [E, D, F].
            top_k: experts a token.
            options: further arguments of the constructor.
        """
        num_experts, dim, ffn_dim = mixtral_sizes(weights)
        block = cls(dim, ffn_dim, num_experts, top_k=top_k, **options)
        load_mixtral_weights(block, weights)
        return block

    def mixtral_state_dict(self) -> dict[str, Tensor]:
        """The weights under Mixtral's names, see `from_mixtral_state_dict`.

        Raises:
            ValueError: if the block is no Mixtral layer, or this rank holds only a part of it.
        """
        return mixtral_weights(self)


class ExpertsWithIdle(MixtureOfExperts):
    """A mixture of experts some of which do nothing: their share of a token is the residual.

    A token that chooses an idle expert computes that much less. Idle experts are the last units of
    the router and take part in balancing; they hold no weights, and nobody sends them rows.

    Args:
        dim, ffn_dim, num_experts: as of MixtureOfExperts; `num_experts` are those that compute.
        idle_experts: how many do nothing.
        options: those of MixtureOfExperts. A router given must score
            `num_experts + idle_experts` units. Expert choice has no idle experts.

    Source: Mixture-of-Depths, arXiv 2404.02258, section 4.5 (integrated MoDE).
    """

    kind = "mixture_of_depths_and_experts"

    def __init__(
        self, dim: int, ffn_dim: int, num_experts: int, *, idle_experts: int = 1, **options: Any
    ) -> None:
        if idle_experts < 1:
            raise ValueError(f"idle_experts={idle_experts}: must be at least 1")
        if options.get("choice", "token") != "token":
            raise ValueError("choice=expert: idle experts are for tokens to choose")
        self.num_idle = idle_experts
        super().__init__(dim, ffn_dim, num_experts, **options)


@dataclass(frozen=True)
class MixtureOfExpertsConfig(Method):
    """Which layers of a decoder have experts in place of their feed-forward, and how.

    Attributes:
        schedule: "all", a number n (layers n-1, 2n-1, …), or a list of layers.
        ffn_dim: width of one expert; None: the decoder's.
        router: "linear" or "hyperspherical".
        projection_dim, temperature: of the hyperspherical router; None: the paper's.
        idle_experts: experts that do nothing beside the others (integrated MoDE).
        num_groups, chosen_groups: above 1 group, a token's experts come from so many of them.
        num_experts, top_k, gate, capacity_factor, activation, renormalize, choice, jitter,
        balance_coefficient, z_coefficient, bias_rate, shared_experts, shared_gate,
        freeze_router, freeze_experts: see `MixtureOfExperts`.
    """

    name = "mixture_of_experts"
    place = "feed_forward"
    blocks = (MixtureOfExperts,)

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
    shared_gate: bool = False
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
        of_router = ("router", "projection_dim", "temperature", "num_groups", "chosen_groups")
        options = self.options(
            without=("num_experts", "schedule", "ffn_dim", "idle_experts", *of_router)
        )
        if self.idle_experts:
            options["idle_experts"] = self.idle_experts
        if self.num_groups != 1 or self.chosen_groups != 1:
            options["groups"] = ExpertGroups(self.num_groups, self.chosen_groups)
        make = ExpertsWithIdle if self.idle_experts else MixtureOfExperts
        return make(
            dim,
            ffn_dim if self.ffn_dim is None else self.ffn_dim,
            self.num_experts,
            router=self._router(dim, units, std, mesh),
            std=std,
            output_std=output_std,
            mesh=mesh,
            **options,
        )

    def build(self, context: LayerContext, inner: MakeFeedForward) -> nn.Module:
        return self.feed_forward(
            context.dim,
            ffn_dim=context.ffn_dim,
            std=context.std,
            output_std=context.output_std,
            mesh=context.mesh,
        )

    def ffn_rows(self, ffn_dim: int) -> int:
        width = ffn_dim if self.ffn_dim is None else self.ffn_dim
        return width * (self.top_k + self.shared_experts)

    @property
    def expert_axis(self) -> tuple[int, int]:
        return self.num_experts, self.top_k

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
