"""Mixture-of-Depths: a router picks the tokens that a block computes; the rest pass by.

Shape legend: B batch, S sequence, T tokens, R selected tokens, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptive.blocks.halves import attend, check_halves, feed_forward
from adaptive.blocks.protocol import LayerContext, Method, RoutedBlock
from adaptive.blocks.wrapping import (
    flatten_tokens,
    held_keys,
    refuse_cache,
    run_block,
    without_padding,
)
from adaptive.ops.exact_buffers import ExactBuffers
from adaptive.ops.flop_counter import FlopCounter, Work
from adaptive.ops.pack import combine, pack
from adaptive.routing.choice import capacity_tokens, expert_choice_packed, threshold_choice
from adaptive.routing.forced import forced_choice
from adaptive.routing.layout import TokenLayout
from adaptive.routing.losses import choice_loss
from adaptive.routing.recompute import decide
from adaptive.routing.routers import LinearRouter
from adaptive.routing.schedules import DepthSchedule, annealed_capacity, capacities_over_depth
from adaptive.routing.selection import Selection
from adaptive.routing.tape import (
    AuxiliaryLoss,
    RoutingRecord,
    RoutingTape,
    current_tape,
    masked_mean,
)
from parallel.context import move_rows
from parallel.draws import draw_own_rows
from parallel.mesh import Mesh
from parallel.rows import even_shards, gather_over_shards
from parallel.tensor import replicated

Weight = Literal["raw", "sigmoid", "tanh_norm"]
PredictorKind = Literal["both", "bce", "mlp", "none"]
Choice = Literal["router", "random", "fixed"]
Keys = Literal["chosen", "all"]
Granularity = Literal["block", "ffn"]

_WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "raw": lambda logits: logits,
    "sigmoid": torch.sigmoid,
    "tanh_norm": lambda logits: 0.2 * torch.tanh(logits) + 1,
}


_GOLDEN = (math.sqrt(5) - 1) / 2


def update_weights(weight: Weight, logits: Tensor) -> Tensor:
    """What multiplies the updates of chosen tokens, of their router logits."""
    return _WEIGHTS[weight](logits)


class MixtureOfDepths(ExactBuffers, RoutedBlock):
    """Routes a share of every sequence's tokens through `block`; the others skip it.

    `out_i = h_i + w(r_i) · f_i(h̃)` for the chosen tokens, where `r = router(h)`, `h̃` are the
    chosen tokens in original order and `f(h̃) = block(h̃) - h̃`; `out_i = h_i`, bit for bit, for
    the others. In training the `capacity · S` highest-scoring tokens are chosen (expert choice),
    which looks at the future. In evaluation the choice is causal when there is a predictor:
    a token is chosen when its predictor logit exceeds `threshold`.

    Args:
        block: maps hidden states to updated hidden states, residual included. A block with the
            attribute `takes_packed = True` is called as `block(packed_RD, layout=…)`, any other
            as `block(chosen_BKD)`. Override `inner` to feed it anything else.
        dim: width D.
        capacity: share of tokens chosen, in (0, 1].
        weight: what multiplies the update: "raw" r (the paper's), "sigmoid" σ(r), or "tanh_norm"
            0.2·tanh(r)+1 with the router initialised at zero (p-MoD, arXiv 2412.04449).
        predictor: what decides causally at evaluation, trained against the choice made. "bce": the
            router's own logit, by an auxiliary loss that reaches the trunk; "mlp": a small MLP on
            detached hidden states, which leaves the trunk alone; "both": both losses, the MLP
            decides; "none": evaluation uses expert choice, which is **not causal**.
        predictor_coefficient: weight of each predictor loss.
        choice: "random" chooses tokens at random, "fixed" by their positions, evenly spread and the
            same in every sequence; both keep everything else: controls.
        keys: what chosen tokens attend to: the "chosen" ones (the paper's), or "all" tokens, which
            then give keys and values, as in SkipLayer. "all" needs a block with `takes_queries =
            True`, called as `block(hidden_TD, layout=…, queries=selection)`.
        granularity: what is routed: the whole "block", or its "ffn", while its attention runs for
            every token; that needs a block in halves, as `DecoderLayer` is.
        mesh: how the ranks share the model; one rank by default.

    Attributes:
        causal: whether evaluation mode chooses causally; may be set to False to measure the cost.
        threshold: predictor logit above which a token is chosen; 0 is the paper's `σ > 0.5`;
            `adaptive.blocks.calibration.calibrate` sets it to a quantile.

    Source: Mixture-of-Depths, arXiv 2404.02258, sections 3.2-3.5.
    """

    kind = "mixture_of_depths"
    replayed_choices = 2
    exact_buffers = ("threshold",)  # it lies between two logits, which are float32
    threshold: Tensor

    def __init__(
        self,
        block: nn.Module,
        dim: int,
        *,
        capacity: float = 0.125,
        weight: Weight = "raw",
        predictor: PredictorKind | None = "both",
        predictor_coefficient: float = 0.01,
        choice: Choice = "router",
        keys: Keys = "chosen",
        granularity: Granularity = "block",
        mesh: Mesh | None = None,
    ) -> None:
        super().__init__()
        predictor = "none" if predictor is None else predictor
        capacity_tokens(capacity, 1)
        _check_member("weight", weight, get_args(Weight))
        _check_member("predictor", predictor, get_args(PredictorKind))
        _check_member("choice", choice, get_args(Choice))
        _check_member("keys", keys, get_args(Keys))
        _check_member("granularity", granularity, get_args(Granularity))
        if granularity != "block":
            check_halves(block, granularity)
        self.block = block
        self.capacity = capacity
        self.weight = weight
        self.choice = choice
        if keys == "all" and not getattr(block, "takes_queries", False):
            raise ValueError(
                f"keys='all': {type(block).__name__} does not take queries apart from keys "
                "(takes_queries); must be 'chosen'"
            )
        self.keys = keys
        self.granularity = granularity
        self.trains_router_logit = predictor in ("both", "bce")
        self.predictor_coefficient = predictor_coefficient
        self.mesh = Mesh.single() if mesh is None else mesh
        self.annealing: CapacityAnnealing | None = None
        self.causal = predictor != "none" and choice == "router"
        std = 0.0 if weight == "tanh_norm" else 0.02
        self.router = LinearRouter(dim, 1, std=std, mesh=mesh)
        learns_choice = predictor in ("both", "mlp")
        self.predictor = ChoicePredictor(dim, mesh=mesh) if learns_choice else None
        self.register_buffer("threshold", torch.zeros(()))

    def forward(
        self,
        hidden: Tensor,
        *,
        token_mask: Tensor | None = None,
        layout: TokenLayout | None = None,
        **inner_kwargs: Any,
    ) -> Tensor:
        """Update the chosen tokens.

        Args:
            hidden: [B, S, D], or packed [T, D] with `layout`.
            token_mask: bool, [B, S] or [T]; False at padding, which is never chosen.
            layout: where packed tokens came from.
            inner_kwargs: handed to `inner`.

        Returns:
            The shape and dtype of `hidden`.
        """
        flat_TD, layout, valid_T = flatten_tokens(hidden, layout, token_mask)
        refuse_cache(self.block, inner_kwargs, layout)
        hidden_TD, present, packed_T = flat_TD, None, None
        if valid_T is not None and (self.keys == "all" or self.granularity == "ffn"):
            # Padding must be nobody's key: only valid tokens are seen.
            mask_T, source_layout = valid_T, layout
            present = decide(lambda: self._selection(mask_T, source_layout))
            hidden_TD, layout = pack(flat_TD, present.indices), present.layout
            valid_T, packed_T = None, valid_T
        if self.granularity == "ffn":
            hidden_TD = attend(self.block, hidden_TD, layout, None, **inner_kwargs)
        routed_TD = hidden_TD if valid_T is None else without_padding(hidden_TD, valid_T)
        logits_T = self.router(routed_TD).squeeze(-1)
        causal_logits_T = self._causal_logits(routed_TD, logits_T)
        selection = decide(
            lambda: self._choose(logits_T, causal_logits_T, layout, valid_T, packed_T)
        )
        weights_R = update_weights(self.weight, pack(logits_T, selection.indices))
        selection = selection.with_weights(weights_R)
        packed_RD = pack(hidden_TD, selection.indices)
        if self.keys == "all" and self.granularity == "block":
            all_kwargs = {"layout": layout, "queries": selection, **inner_kwargs}
            update_RD = self.block(hidden_TD, **all_kwargs) - packed_RD
        else:
            update_RD = self._update(packed_RD, selection, inner_kwargs)
        out_TD = combine(hidden_TD, update_RD, selection.indices, weights_R)
        tape = current_tape()
        if tape is not None:
            held_B = held_keys(inner_kwargs) if inner_kwargs else None
            self._record(tape, selection, logits_T, causal_logits_T, valid_T, packed_T, held_B)
        if present is not None:
            out_TD = flat_TD.index_copy(0, present.indices, out_TD)
        return out_TD.view_as(hidden)

    def inner(self, packed_RD: Tensor, selection: Selection, **kwargs: Any) -> Tensor:
        """Run the block on the chosen tokens. Override to feed a block of your own.

        Args:
            packed_RD: [R, D], the chosen tokens, sequence after sequence, in original order.
            selection: who they are: `positions`, `cu_seqlens`, `indices` into the flattened input.
                Under context parallelism the rows are shared evenly over the context ranks, so
                `indices` do not tell them; `layout` does.
            kwargs: what the caller of the wrapper gave beyond its own arguments.

        Returns:
            [R, D], the updated tokens, residual included.
        """
        return run_block(self.block, packed_RD, selection.layout, **kwargs)

    @property
    def decides(self) -> nn.Module | None:
        if not self.causal:
            return None
        return self.router if self.predictor is None else self.predictor

    def count_flops(self, count: FlopCounter, work: Work) -> None:
        """Router and predictor for all tokens, the block for the chosen ones among their keys."""
        count.routing(self.router, work)
        count.routing(self.predictor, work)
        planned = work.share(self.capacity)
        if self.keys == "all" and self.granularity == "block":
            planned = work.queries(self.capacity)
        chosen = count.chosen(self, planned=planned, dense=work)
        if self.granularity == "block":
            count(self.block, chosen)
            return
        for part, among in (("attention", work), ("ffn", chosen)):
            count(getattr(self.block, part), among)

    def _update(self, packed_RD: Tensor, selection: Selection, kwargs: dict[str, Any]) -> Tensor:
        """`block(h) - h` of the chosen tokens; context ranks share them evenly meanwhile."""
        before = selection.shard_sizes
        if self.mesh.context == 1 or before is None:
            return self._run(packed_RD, selection, kwargs) - packed_RD
        even = even_shards(sum(before), self.mesh.shards)
        rows_RD = move_rows(packed_RD, self.mesh, before=before, after=even)
        shared = replace(selection, shard_sizes=even, weights=None)
        update_RD = self._run(rows_RD, shared, kwargs) - rows_RD
        return move_rows(update_RD, self.mesh, before=even, after=before)

    def _run(self, packed_RD: Tensor, selection: Selection, kwargs: dict[str, Any]) -> Tensor:
        if self.granularity == "ffn":
            return feed_forward(self.block, packed_RD, selection.layout)
        return self.inner(packed_RD, selection, **kwargs)

    def start_step(self, step: int) -> None:
        """Set what follows a schedule over training steps. The training loop calls it."""
        if self.annealing is not None:
            self.capacity = self.annealing.at(step)

    def _causal_logits(self, hidden_TD: Tensor, logits_T: Tensor) -> Tensor:
        return logits_T if self.predictor is None else self.predictor(hidden_TD)

    def _choose(
        self,
        logits_T: Tensor,
        causal_logits_T: Tensor,
        layout: TokenLayout,
        valid_T: Tensor | None,
        packed_T: Tensor | None,
    ) -> Selection:
        told = self.told is not None
        forced_T = forced_choice(self, logits_T.shape[0], packed_T) if told else None
        if forced_T is not None:
            chosen_T = forced_T == 1
            return self._selection(chosen_T if valid_T is None else chosen_T & valid_T, layout)
        shared = self.mesh.shard_group is not None

        def gather(x_T: Tensor) -> Tensor:
            return gather_over_shards(x_T, self.mesh, layout.shard_sizes) if shared else x_T

        valid_T = None if valid_T is None else gather(valid_T)
        if self.causal and not self.training:
            selection = threshold_choice(gather(causal_logits_T), layout, self.threshold, valid_T)
        else:
            scores_T = logits_T
            if self.choice == "random":
                scores_T = draw_own_rows(
                    lambda tokens: logits_T.new_empty(tokens).uniform_(),
                    logits_T.shape[0],
                    self.mesh,
                    layout.shard_sizes,
                )
            elif self.choice == "fixed":
                # Multiples of the golden ratio: the k largest fractions are evenly spread.
                scores_T = (layout.positions.double() * _GOLDEN).frac().to(logits_T)
            selection = expert_choice_packed(gather(scores_T), layout, self.capacity, valid_T)
        return selection.on_shard(layout, self.mesh) if shared else selection

    def _selection(self, chosen_T: Tensor, layout: TokenLayout) -> Selection:
        """The tokens of all ranks that share the pack, as this rank sees them."""
        chosen_T = gather_over_shards(chosen_T, self.mesh, layout.shard_sizes)
        return Selection.from_mask(chosen_T, layout).on_shard(layout, self.mesh)

    def _record(
        self,
        tape: RoutingTape,
        selection: Selection,
        logits_T: Tensor,
        causal_logits_T: Tensor,
        valid_T: Tensor | None,
        packed_T: Tensor | None,
        held_B: Tensor | None,
    ) -> None:
        chosen_T = selection.mask(logits_T.shape[0])
        losses = {}
        if self.trains_router_logit:
            share = choice_loss(logits_T, chosen_T, valid_T, tape.scope)
            losses["router_bce"] = AuxiliaryLoss(share, self.predictor_coefficient)
        if self.predictor is not None:
            share = choice_loss(causal_logits_T, chosen_T, valid_T, tape.scope)
            losses["predictor_bce"] = AuxiliaryLoss(share, self.predictor_coefficient)
        weights_R = selection.weights
        assert weights_R is not None
        weights_R = weights_R.detach()
        logits_T, causal_logits_T = logits_T.detach(), causal_logits_T.detach()
        # Where the predictor itself chose there is nothing to compare.
        compares = bool(losses) and (self.training or not self.causal)
        predicted_T = causal_logits_T > self.threshold
        # Binary entropy of σ(r), from logits: softplus(r) - r σ(r).
        entropy_T = F.softplus(logits_T) - logits_T * torch.sigmoid(logits_T)
        record = RoutingRecord(
            name="",
            kind=self.kind,
            tokens=logits_T.shape[0] if valid_T is None else valid_T.sum(),
            executed=selection.tokens,
            executed_lengths=selection.cu_seqlens.diff(),
            key_lengths=held_B,
            planned_share=self.capacity,
            entropy=masked_mean(entropy_T, valid_T),
            weight_mean=masked_mean(weights_R, None),
            weight_std=weights_R.float().std(correction=0) if weights_R.numel() else None,
            predictor_accuracy=masked_mean(predicted_T == chosen_T, valid_T) if compares else None,
            statistics={"predicted_share": masked_mean(predicted_T, valid_T)} if compares else {},
            weights=weights_R,
            chosen=chosen_T
            if packed_T is None
            else torch.zeros_like(packed_T).masked_scatter_(packed_T, chosen_T),
            scores=logits_T if self.choice == "router" else None,
        )
        tape.record(self, record, losses)


class ChoicePredictor(nn.Module):
    """Predicts from a token alone whether expert choice will choose it.

    Reads detached hidden states, so training it leaves the rest of the model untouched.

    Forward: hidden [T, D] -> logits [T], float32 (float64 stays).

    Source: Mixture-of-Depths, arXiv 2404.02258, section 3.5, second method.
    """

    def __init__(self, dim: int, *, mesh: Mesh | None = None) -> None:
        super().__init__()
        self.mesh = Mesh.single() if mesh is None else mesh
        width = max(1, min(dim // 2, 128))
        self.up = _ReplicatedLinear(dim, width, mesh=self.mesh)
        self.down = _ReplicatedLinear(width, 1, mesh=self.mesh)

    def forward(self, hidden_TD: Tensor) -> Tensor:
        logits_T = self.down(F.gelu(self.up(hidden_TD.detach()))).squeeze(-1)
        return logits_T.to(torch.promote_types(logits_T.dtype, torch.float32))

    def count_flops(self, count: FlopCounter, work: Work) -> None:
        """The input is detached: no gradient flows to it."""
        count.linear(self.up.in_features, self.up.out_features, work, input_grad=False)
        count.linear(self.down.in_features, self.down.out_features, work)


class _ReplicatedLinear(nn.Linear):
    """A linear layer that is applied to this rank's own tokens.

    It is called, not read: under ZeRO 3 a weight is whole in its own module's forward only.
    """

    def __init__(self, in_features: int, out_features: int, *, mesh: Mesh) -> None:
        super().__init__(in_features, out_features)
        self.mesh = mesh

    def forward(self, x_TD: Tensor) -> Tensor:
        mesh = self.mesh
        if mesh.tensor_group is None:
            return F.linear(x_TD, self.weight, self.bias)
        return F.linear(x_TD, replicated(self.weight, mesh), replicated(self.bias, mesh))


@dataclass(frozen=True)
class CapacityAnnealing:
    """Capacity that falls linearly from `start` to `end` within `steps` training steps."""

    end: float
    steps: int
    start: float = 1.0

    def at(self, step: int) -> float:
        return annealed_capacity(step, start=self.start, end=self.end, steps=self.steps)


@dataclass(frozen=True)
class MixtureOfDepthsConfig(Method):
    """Which layers of a decoder are routed, and how.

    Attributes:
        capacity: share of tokens that routed layers compute.
        schedule: "every_other" (layers 1, 3, 5, …), "all", "linear", "cosine", or a list of layers.
        floor, dense_above: of the falling schedules, see `capacities_over_depth`.
        weight, predictor, predictor_coefficient, choice, keys, granularity: see
            `MixtureOfDepths`.
        anneal_steps: steps in which every routed layer's capacity falls from 1 to its own; 0: none.
    """

    name = "mixture_of_depths"
    place = "layer"
    blocks = (MixtureOfDepths,)
    excludes = ("skip_layer",)
    sees_every_token = False
    pretrained: ClassVar[Mapping[str, Any]] = {"weight": "tanh_norm"}  # 1 before training

    capacity: float = 0.125
    schedule: DepthSchedule | list[int] = "every_other"
    floor: float | None = None
    dense_above: float = 0.85
    weight: Weight = "raw"
    predictor: PredictorKind = "both"
    predictor_coefficient: float = 0.01
    choice: Choice = "router"
    keys: Keys = "chosen"
    granularity: Granularity = "block"
    anneal_steps: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.capacity <= 1:
            raise ValueError(f"capacity={self.capacity}: must be in (0, 1]")
        if not math.isfinite(self.predictor_coefficient) or self.predictor_coefficient < 0:
            raise ValueError(
                f"predictor_coefficient={self.predictor_coefficient}: must be 0 or more"
            )
        if self.anneal_steps < 0:
            raise ValueError(f"anneal_steps={self.anneal_steps}: must be 0 or more")

    def capacities(self, num_layers: int) -> list[float]:
        """The capacity of every layer; 1.0 where it is dense."""
        return capacities_over_depth(
            num_layers,
            capacity=self.capacity,
            schedule=self.schedule,
            floor=self.floor,
            dense_above=self.dense_above,
        )

    def share(self, layer: int, num_layers: int) -> float:
        return self.capacities(num_layers)[layer]

    def routed_layers(self, num_layers: int) -> list[int]:
        return [n for n, capacity in enumerate(self.capacities(num_layers)) if capacity < 1]

    def build(self, context: LayerContext, inner: nn.Module) -> MixtureOfDepths:
        """The layer, routed."""
        capacity = self.share(context.layer, context.num_layers)
        of_layers = ("capacity", "schedule", "floor", "dense_above", "anneal_steps")
        options = self.options(without=of_layers)
        routed = MixtureOfDepths(
            inner, context.dim, capacity=capacity, mesh=context.mesh, **options
        )
        if self.anneal_steps:
            routed.annealing = CapacityAnnealing(capacity, self.anneal_steps)
        return routed


def _check_member(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: must be one of {', '.join(allowed)}")
