"""SkipLayer: every token decides whether a layer runs for it; one that skips costs nothing.

Shape legend: B batch, S sequence, T valid tokens, R executing tokens, D width.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptive.blocks.halves import attend, check_halves, feed_forward
from adaptive.blocks.protocol import LayerContext, Method, RoutedBlock
from adaptive.blocks.wrapping import flatten_tokens, held_keys, refuse_cache, run_block
from adaptive.ops.flop_counter import FlopCounter, Work
from adaptive.ops.pack import combine, pack
from adaptive.routing.density import DensityControl, DensityController, Target
from adaptive.routing.forced import forced_choice
from adaptive.routing.gumbel import (
    GumbelSchedule,
    gated_identity,
    gumbel_choice,
    soft_choice,
    straight_through,
)
from adaptive.routing.layout import TokenLayout
from adaptive.routing.recompute import decide
from adaptive.routing.routers import LinearRouter
from adaptive.routing.schedules import DepthSchedule, capacities_over_depth
from adaptive.routing.scope import BatchScope
from adaptive.routing.selection import Selection
from adaptive.routing.tape import RoutingRecord, RoutingTape, current_tape, masked_mean
from parallel.mesh import Mesh
from parallel.rows import gather_over_shards

Keys = Literal["all", "executing"]
Granularity = Literal["block", "attention", "ffn"]
SkippedGradient = Literal["masked", "none", "exact"]

EXECUTE = 1
"""Column of the router logits that means "execute"; column 0 means "skip"."""


class SkipDecision(NamedTuple):
    """What recomputation repeats: who executes, who skips (if asked for), the noise of the draw."""

    executing: Selection
    skipping: Selection | None
    noise: Tensor


class SkipLayer(RoutedBlock):
    """Runs `block` for the tokens whose router says so; the others leave bit for bit as they came.

    `out = (1 - g) h + g · block(h)` with `g` in {0, 1}: in training a straight-through
    Gumbel-softmax of two logits of the layer-normed input, in evaluation their argmax. Only
    executing tokens are computed: they alone are queries and pass the output projection and the
    feed-forward, while keys and values come from every token, so that a token that skips can
    still be attended to. Each token decides for itself: the choice is causal.

    The gradient of a gate is `<grad_out, block(h) - h>` where the token executes. Where it skips,
    `block(h)` was not computed, and `skipped_gradient` says what stands for it.

    Args:
        block: maps hidden states to updated hidden states, residual included. One with
            `takes_queries = True` (`DecoderLayer`) is called as
            `block(hidden_TD, layout=…, queries=selection)`. Any other runs on executing tokens
            alone (see `keys`), as `MixtureOfDepths` runs its block.
        dim: width D.
        density: target share of executing tokens, in (0, 1].
        keys: what executing tokens attend to: "all" tokens (the paper's) or "executing" ones. A
            block that cannot take queries apart from keys falls back to "executing", with a
            warning; the attribute `keys` tells which holds.
        granularity: what is skipped: the whole "block", its "attention" (the feed-forward runs
            for every token) or its "ffn". The latter two need a block with the attributes
            `attention_norm`, `attention`, `ffn_norm` and `ffn`, as `DecoderLayer` has.
        mesh: how the ranks share the model; one rank by default.
        skipped_gradient: the gate's gradient where the token skips. "masked": that of the formula
            with `block(h) := 0` where it was not computed, `<grad_out, -h>`; "none": zero; "exact":
            `<grad_out, block(h) - h>`, by a forward of the skipped tokens without gradient, which
            costs what it saves in the forward.
        density_coefficient: weight of `(density - target)²`.
        density_over: the target is for every "layer", or for the mean over the "model".
        controller_gain: above 0, a `DensityController` with this gain holds the target as well.
        schedule: temperature and noise over training steps.
        initial_bias: of the logit that means "execute", before training. At 2 next to every token
            executes in evaluation, and 88% of them in training, by noise.

    Raises:
        ValueError: if an option is out of range or the block cannot do what `granularity` asks.

    Source: SkipLayer, arXiv 2311.15436, section 3.
    """

    kind = "skip_layer"
    path_costs = (0.0, 1.0)
    replayed_choices = 2

    def __init__(
        self,
        block: nn.Module,
        dim: int,
        *,
        density: float = 0.5,
        keys: Keys = "all",
        granularity: Granularity = "block",
        mesh: Mesh | None = None,
        skipped_gradient: SkippedGradient = "masked",
        density_coefficient: float = 0.1,
        density_over: Target = "layer",
        controller_gain: float = 0.0,
        schedule: GumbelSchedule | None = None,
        initial_bias: float = 0.0,
    ) -> None:
        super().__init__()
        if not 0 < density <= 1:
            raise ValueError(f"density={density}: must be in (0, 1]")
        _check_member("keys", keys, get_args(Keys))
        _check_member("granularity", granularity, get_args(Granularity))
        _check_member("skipped_gradient", skipped_gradient, get_args(SkippedGradient))
        if granularity != "block":
            check_halves(block, granularity)
        self.block = block
        self.granularity = granularity
        self.keys = self._possible_keys(keys)
        self.skipped_gradient = skipped_gradient
        self.mesh = Mesh.single() if mesh is None else mesh
        self.schedule = GumbelSchedule() if schedule is None else schedule
        self.temperature, self.noise = self.schedule.at(0)
        self.router = LinearRouter(dim, 2, bias=True, mesh=mesh)
        assert self.router.bias is not None
        with torch.no_grad():
            self.router.bias[EXECUTE] = initial_bias
        self.control = DensityControl(
            density,
            coefficient=density_coefficient,
            over=density_over,
            controller=DensityController(density, gain=controller_gain)
            if controller_gain
            else None,
        )

    @property
    def density(self) -> float:
        """Target share of executing tokens."""
        return self.control.target

    def forward(
        self,
        hidden: Tensor,
        *,
        token_mask: Tensor | None = None,
        layout: TokenLayout | None = None,
        **inner_kwargs: Any,
    ) -> Tensor:
        """Update the executing tokens.

        Args:
            hidden: [B, S, D], or packed [T, D] with `layout`.
            token_mask: bool, [B, S] or [T]; False at padding, which never executes, is nobody's
                key, and counts in no loss.
            layout: where packed tokens came from.
            inner_kwargs: handed to the block.

        Returns:
            The shape and dtype of `hidden`.
        """
        flat, layout, valid = flatten_tokens(hidden, layout, token_mask)
        refuse_cache(self.block, inner_kwargs, layout)
        if valid is None:
            return self._forward_packed(flat, layout, None, inner_kwargs).view_as(hidden)
        source_layout, mask = layout, valid
        present = decide(lambda: self._selection(mask, source_layout))
        hidden_TD = pack(flat, present.indices)
        out_TD = self._forward_packed(hidden_TD, present.layout, mask, inner_kwargs)
        return flat.index_copy(0, present.indices, out_TD).view_as(hidden)

    def inner(self, packed_RD: Tensor, selection: Selection, **kwargs: Any) -> Tensor:
        """Run the block on executing tokens alone. Override to feed a block of your own.

        Args:
            packed_RD: [R, D], the executing tokens, sequence after sequence, in original order.
            selection: who they are: `positions`, `cu_seqlens`, `indices` into the valid tokens.
            kwargs: what the caller of the wrapper gave beyond its own arguments.

        Returns:
            [R, D], the updated tokens, residual included.
        """
        return run_block(self.block, packed_RD, selection.layout, **kwargs)

    def inner_among_all(
        self, hidden_TD: Tensor, layout: TokenLayout, selection: Selection, **kwargs: Any
    ) -> Tensor:
        """As `inner`, for `keys="all"`: executing tokens are queries, all tokens are keys.

        Override it, and pass `keys="all"`, for a block of your own that can do so.
        """
        return self.block(hidden_TD, layout=layout, queries=selection, **kwargs)

    def count_flops(self, count: FlopCounter, work: Work) -> None:
        """Router for all tokens, the skippable part for executing ones, the rest for all."""
        count.routing(self.router, work)
        planned = work.share(self.density)
        if self.keys == "all" and self.granularity != "ffn":
            planned = work.queries(self.density)
        executing = count.chosen(self, planned=planned, dense=work)
        if self.granularity == "block":
            count(self.block, executing)
            return
        for part in ("attention", "ffn"):
            count(getattr(self.block, part), executing if part == self.granularity else work)

    def start_step(self, step: int) -> None:
        """Set temperature and noise of a training step. The training loop calls it."""
        self.temperature, self.noise = self.schedule.at(step)

    def _forward_packed(
        self,
        hidden_TD: Tensor,
        layout: TokenLayout,
        valid: Tensor | None,
        kwargs: dict[str, Any],
    ) -> Tensor:
        if self.granularity == "ffn":
            hidden_TD = attend(self.block, hidden_TD, layout, None, **kwargs)
        router_logits_T2 = self.router(F.layer_norm(hidden_TD, hidden_TD.shape[-1:]))
        executing, skipping, noise_T2 = decide(
            lambda: self._choose(router_logits_T2, layout, valid)
        )
        soft_T2 = soft_choice(router_logits_T2, noise_T2, temperature=self.temperature)
        hard_T = executing.mask(hidden_TD.shape[0])
        gates_T = straight_through(hard_T, soft_T2[:, EXECUTE])

        update_RD = self._update(hidden_TD, layout, executing, kwargs)
        if torch.is_grad_enabled() and self.skipped_gradient != "none":
            missed_RD = None
            if skipping is not None:
                # A count of nothing: no other rank is asked, no bias or price inside is moved.
                aside = BatchScope()
                aside.start_census()
                with torch.no_grad(), RoutingTape(scope=aside):
                    missed_RD = self._update(hidden_TD, layout, skipping, kwargs)
            skipped = hidden_TD.shape[0] - executing.tokens
            rows = torch.nonzero_static(~hard_T, size=skipped).squeeze(1)
            hidden_TD = gated_identity(hidden_TD, gates_T, rows, missed_RD)
        gates_R = pack(gates_T, executing.indices)
        out_TD = combine(hidden_TD, update_RD, executing.indices, gates_R)

        tape = current_tape()
        if tape is not None:
            held_B = held_keys(kwargs)
            self._record(tape, executing, gates_T, router_logits_T2, noise_T2, valid, held_B)
        if self.granularity == "attention":
            out_TD = feed_forward(self.block, out_TD, layout)
        return out_TD

    def _update(
        self, hidden_TD: Tensor, layout: TokenLayout, tokens: Selection, kwargs: dict[str, Any]
    ) -> Tensor:
        """`block(h) - h` [R, D] of the chosen tokens, and of nothing else."""
        packed_RD = pack(hidden_TD, tokens.indices)
        if self.granularity == "attention":
            among = tokens if self.keys == "all" else None
            source = (hidden_TD, layout) if self.keys == "all" else (packed_RD, tokens.layout)
            return attend(self.block, *source, among, **kwargs) - packed_RD
        if self.granularity == "ffn":
            return feed_forward(self.block, packed_RD, tokens.layout) - packed_RD
        if self.keys == "all":
            return self.inner_among_all(hidden_TD, layout, tokens, **kwargs) - packed_RD
        return self.inner(packed_RD, tokens, **kwargs) - packed_RD

    def _choose(
        self, router_logits_T2: Tensor, layout: TokenLayout, valid: Tensor | None
    ) -> SkipDecision:
        noise = self.noise if self.training else 0.0
        choice = gumbel_choice(
            router_logits_T2, noise=noise, mesh=self.mesh, shard_sizes=layout.shard_sizes
        )
        forced_T = forced_choice(self, choice.chosen.shape[0], valid)
        executes_T = (choice.chosen if forced_T is None else forced_T) == EXECUTE
        skipping = None
        if self.skipped_gradient == "exact":
            skipping = self._selection(~executes_T, layout)
        return SkipDecision(self._selection(executes_T, layout), skipping, choice.noise)

    def _selection(self, chosen_T: Tensor, layout: TokenLayout) -> Selection:
        """The tokens of all ranks that share the pack, as this rank sees them."""
        chosen_T = gather_over_shards(chosen_T, self.mesh, layout.shard_sizes)
        return Selection.from_mask(chosen_T, layout).on_shard(layout, self.mesh)

    def _possible_keys(self, wanted: Keys) -> Keys:
        if wanted == "executing" or self.granularity != "block":
            return wanted
        overridden = type(self).inner_among_all is not SkipLayer.inner_among_all
        if overridden or getattr(self.block, "takes_queries", False):
            return wanted
        warnings.warn(
            f"keys='all': {type(self.block).__name__} does not take queries apart from keys "
            "(takes_queries), so executing tokens attend to executing tokens only; "
            "pass keys='executing' if that is meant",
            stacklevel=3,
        )
        return "executing"

    def _record(
        self,
        tape: RoutingTape,
        executing: Selection,
        gates_T: Tensor,
        router_logits_T2: Tensor,
        noise_T2: Tensor,
        valid: Tensor | None,
        held_B: Tensor | None,
    ) -> None:
        losses, usage = self.control.losses(gates_T, tape, kind=self.kind)
        executes_T = gates_T.detach() > 0
        chosen = executes_T
        if valid is not None:
            chosen = torch.zeros_like(valid).masked_scatter_(valid, executes_T)
        # Without the noise: what the router says of a token, not what was drawn for it.
        probability_T2 = router_logits_T2.detach().softmax(-1)
        probability_T = probability_T2[:, EXECUTE]
        # Of executing tokens, by whose number records of several batches are averaged.
        mean = masked_mean(probability_T, executes_T)
        variance = masked_mean((probability_T - mean).square(), executes_T)
        record = RoutingRecord(
            name="",
            kind=self.kind,
            tokens=gates_T.shape[0],
            executed=executing.tokens,
            executed_lengths=executing.cu_seqlens.diff(),
            key_lengths=held_B,
            planned_share=self.density,
            entropy=masked_mean(torch.special.entr(probability_T2).sum(-1), None),
            weight_mean=mean,
            weight_std=variance.sqrt(),
            statistics={"density": usage.density} | self.control.statistics(),
            weights=probability_T,
            chosen=chosen,
            scores=router_logits_T2.detach() + noise_T2,
        )
        tape.record(self, record, losses)


@dataclass(frozen=True)
class SkipLayerConfig(Method):
    """Which layers of a decoder may be skipped, and how.

    Attributes:
        density: target share of executing tokens in these layers.
        layers: "all", "every_other" (layers 1, 3, 5, …), or a list of layers; "linear" and
            "cosine" let the target fall over depth (see `capacities_over_depth`).
        floor, dense_above: of the falling targets.
        keys, granularity, skipped_gradient, density_coefficient, density_over, controller_gain,
            schedule, initial_bias: see `SkipLayer`. A target over the model wants equal `layers`
            targets.
    """

    name = "skip_layer"
    place = "layer"
    blocks = (SkipLayer,)
    excludes = ("mixture_of_depths",)
    sees_every_token = False
    # A trained layer goes on as it was; few layers of others take keys of all tokens.
    pretrained: ClassVar[Mapping[str, Any]] = {"keys": "executing", "initial_bias": 2.0}

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
    initial_bias: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise ValueError(f"density={self.density}: must be in (0, 1]")
        if not math.isfinite(self.initial_bias):
            raise ValueError(f"initial_bias={self.initial_bias}: must be finite")
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

    def share(self, layer: int, num_layers: int) -> float:
        return self.densities(num_layers)[layer]

    def routed_layers(self, num_layers: int) -> list[int]:
        return [n for n, density in enumerate(self.densities(num_layers)) if density < 1]

    def build(self, context: LayerContext, inner: nn.Module) -> SkipLayer:
        """The layer, which may be skipped."""
        density = self.share(context.layer, context.num_layers)
        options = self.options(without=("density", "layers", "floor", "dense_above"))
        return SkipLayer(inner, context.dim, density=density, mesh=context.mesh, **options)


def _check_member(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: must be one of {', '.join(allowed)}")
