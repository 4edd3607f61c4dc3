"""LearnedBudget: how many tokens a layer drops and merges is learnt, at a target of operations.

Shape legend: T packed tokens, B sequences, S tokens of each, D width, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from adaptive.blocks.protocol import MergingContext, Method, Place, RoutedBlock
from adaptive.blocks.token_merging import attention_received, count_attention_received
from adaptive.ops.flop_counter import FlopCounter, Work
from adaptive.ops.merge import merge
from adaptive.routing.budgets import (
    Matched,
    Taken,
    by_counts,
    by_thresholds,
    expected_counts,
    match_halves,
    match_ranks,
    survival,
)
from adaptive.routing.density import DensityControl, DensityController
from adaptive.routing.grouping import Grouping
from adaptive.routing.layout import TokenLayout
from adaptive.routing.recompute import decide
from adaptive.routing.tape import AuxiliaryLoss, RoutingRecord, current_tape

Kind = Literal["ltmp", "diffrate"]

_TEMPERATURE = 0.1  # LTMP's τ
_RATE = 20.0  # budgets learn at so many times the rate of weights: 1e-3 a step moves no count
_FIRST_LOGIT = 8.0  # of keeping all tokens, at first: 0.98 of the probability among 65 counts


class LearnedBudget(RoutedBlock):
    """Wraps a layer in two halves (`MergeableLayer`): tokens are dropped and merged between them.

    Called as TokenMerging is. In evaluation what is taken away is gone; in training every token is
    computed, and `Grouping.kept` tells later layers, as a mask with a gradient, who is left: so the
    task says what a token that was taken away would have been worth. Both compute the same values.

    The loss is `coefficient (share - target)²` over all layers and the global batch, the share that
    of the layers' operations which evaluation would execute, by their `count_flops`; a controller's
    price holds it there.

    Args:
        layer: `attend` (with `key_mask`) and `feed_forward`.
        kind, target, coefficient, controller_gain: see LearnedBudgetConfig.
        tokens: of every sequence, ahead of the first layer.
        num_layers: that share the target.
        protected: tokens at the beginning of every sequence that stay (a class token).

    Sources: LTMP, arXiv 2305.10780; DiffRate, arXiv 2305.17997. Where this deviates from their
    code: docs/learned_budgets.md.
    """

    kind = "learned_budget"
    causal = False

    def __init__(
        self,
        layer: nn.Module,
        *,
        kind: Kind = "ltmp",
        target: float = 0.65,
        coefficient: float = 10.0,
        controller_gain: float = 0.02,
        tokens: int,
        num_layers: int = 1,
        protected: int = 0,
    ) -> None:
        super().__init__()
        LearnedBudgetConfig(kind, target, coefficient, controller_gain)
        self.layer: Any = layer
        self.budget, self.tokens, self.protected = kind, tokens, protected
        self.planned = _kept_a_layer(target, num_layers)
        # LTMP's first thresholds; DiffRate begins by keeping all.
        first = torch.tensor([0.9, 0.0])
        if kind == "diffrate":
            first = torch.zeros(2, tokens).index_fill(1, torch.tensor([tokens - 1]), _FIRST_LOGIT)
        self.limits = nn.Parameter(first)
        self.limits.rate = _RATE  # type: ignore[attr-defined]
        self.control = DensityControl(
            target,
            coefficient=coefficient / num_layers,
            controller=DensityController(target, gain=controller_gain) if controller_gain else None,
            over="model",
        )

    def start_step(self, step: int) -> None:
        """Move the controller's price."""
        if self.control.controller is not None:
            self.control.controller.start_step(step)

    def forward(
        self,
        x_TD: Tensor,
        *,
        layout: TokenLayout,
        sizes: Tensor | None = None,
        kept: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Grouping | None]:
        """Attention over all that are left, dropping and merging, feed-forward over the groups.

        The grouping is None where evaluation takes nothing away.

        Args:
            x_TD: [T, D], packed.
            layout: of the tokens; in training of sequences of one length.
            sizes: float [T], what each stands for after earlier merging; None: 1.
            kept: float [T], 0 for tokens that earlier layers took away in training; None: 1.
            kwargs: for the layer's `attend`.
        """
        bias = None if sizes is None else sizes.log()
        given = {} if kept is None else {"key_mask": kept}
        x_TD, heads = self.layer.attend(x_TD, layout=layout, key_bias=bias, **given, **kwargs)
        open_T = torch.ones_like(x_TD[:, 0], dtype=torch.bool) if kept is None else kept > 0
        metric_TC = self.layer.mean_over_heads(heads.unrotated_keys)
        with torch.no_grad():
            received_T = self.layer.mean_over_heads(
                attention_received(
                    heads.queries,
                    heads.keys,
                    layout,
                    key_bias=bias,
                    kept_T=None if kept is None else open_T,
                )[..., None]
            ).squeeze(-1)
        if self.training:
            return self._masked(x_TD, metric_TC, received_T, layout, sizes, kept, open_T)
        grouping = decide(lambda: self._grouping(metric_TC, received_T, layout, sizes))
        self._record(layout, grouping.cu_seqlens.diff(), grouping.representatives, {})
        if grouping.groups == layout.tokens:
            return self.layer.feed_forward(x_TD), None
        return self.layer.feed_forward(merge(x_TD, sizes, grouping)), grouping

    def _masked(
        self,
        x_TD: Tensor,
        metric_TC: Tensor,
        received_T: Tensor,
        layout: TokenLayout,
        sizes: Tensor | None,
        kept: Tensor | None,
        open_T: Tensor,
    ) -> tuple[Tensor, Grouping]:
        """Training: the means of groups stand at their representatives, the rest is masked."""
        shape = layout.batch_size, layout.max_seqlen
        metric_BSC, received_BS, open_BS = (
            x.unflatten(0, shape) for x in (metric_TC, received_T, open_T)
        )
        matched = decide(lambda: self._match(metric_BSC, received_BS, open_BS))
        taken = self._taken(matched, open_BS)
        before_BS = taken.keeps.new_ones(shape) if kept is None else kept.unflatten(0, shape)
        left_BS = before_BS * taken.stays * taken.keeps
        moving_BS = before_BS * (1 - taken.stays)
        if self.budget == "diffrate":  # which drops first
            moving_BS = moving_BS * taken.keeps
        size_BS = torch.ones_like(left_BS) if sizes is None else sizes.unflatten(0, shape)
        size_BS = size_BS.to(left_BS.dtype)
        weight_BS = moving_BS * size_BS
        gained_BS = torch.zeros_like(weight_BS).scatter_add(1, matched.into, weight_BS)
        x_BSD = x_TD.unflatten(0, shape)
        into_BSD = matched.into[..., None].expand_as(x_BSD)
        moved_BSD = (weight_BS[..., None] * x_BSD).to(x_BSD.dtype)
        sum_BSD = (size_BS[..., None] * x_BSD).to(x_BSD.dtype).scatter_add(1, into_BSD, moved_BSD)
        x_BSD = (sum_BSD / (size_BS + gained_BS)[..., None]).to(x_TD.dtype)
        new_T = (size_BS + gained_BS).detach().flatten().float()  # as in evaluation
        self._record(
            layout,
            layout.cu_seqlens.diff(),
            None,
            *self._losses(before_BS.sum(-1), left_BS.sum(-1)),
        )
        whole = replace(Grouping.whole(layout, new_T), kept=left_BS.flatten())
        return self.layer.feed_forward(x_BSD.flatten(0, 1)), whole

    @torch.no_grad()
    def _grouping(
        self, metric_TC: Tensor, received_T: Tensor, layout: TokenLayout, sizes: Tensor | None
    ) -> Grouping:
        """Evaluation: who is in which group, or dropped. Synchronises with the host."""
        if layout.uniform:
            lengths = [layout.tokens]
            shapes = [(layout.batch_size, layout.max_seqlen)]
        else:
            lengths = layout.cu_seqlens.diff().tolist()
            shapes = [(1, length) for length in lengths]
        targets, start = [], 0
        pieces = zip(metric_TC.split(lengths), received_T.split(lengths), shapes, strict=True)
        for metric, received, (batch, length) in pieces:
            metric_BSC, received_BS = (x.unflatten(0, (batch, length)) for x in (metric, received))
            open_BS = torch.ones_like(received_BS, dtype=torch.bool)
            matched = self._match(metric_BSC, received_BS, open_BS)
            stays, keeps = (x > 0 for x in self._taken(matched, open_BS))
            own = torch.arange(length, device=stays.device).expand_as(stays)
            target = torch.where(stays, own, matched.into)
            # LTMP drops whole groups after merging; DiffRate drops tokens before.
            alive = keeps if self.budget == "diffrate" else keeps.gather(1, target)
            first = torch.arange(batch, device=stays.device)[:, None] * length + start
            targets.append(torch.where(alive, target + first, -1).flatten())
            start += batch * length
        return Grouping.from_targets(torch.cat(targets), layout, sizes)

    def _match(self, metric_BSC: Tensor, received_BS: Tensor, open_BS: Tensor) -> Matched:
        given = metric_BSC, received_BS, open_BS, self._protected(open_BS)
        if self.budget == "ltmp":
            return match_halves(*given)
        staying, _ = self._counts(survival(self.limits))
        return match_ranks(*given, staying=staying)

    def _taken(self, matched: Matched, open_BS: Tensor) -> Taken:
        if self.budget == "ltmp":
            protected_BS = self._protected(open_BS)
            return by_thresholds(
                matched, self.limits, open_BS, protected_BS, temperature=_TEMPERATURE
            )
        survival_2K = survival(self.limits)
        return by_counts(matched, *self._counts(survival_2K), survival_2K)

    def _counts(self, survival_2K: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens left by merging and by dropping: what is protected, and one at least."""
        counts_2 = expected_counts(survival_2K).clamp(min=min(self.protected + 1, self.tokens))
        return counts_2.amin(), counts_2[1]

    def _protected(self, like_BS: Tensor) -> Tensor:
        place_S = torch.arange(like_BS.shape[1], device=like_BS.device)
        return (place_S < self.protected).expand_as(like_BS)

    def _losses(
        self, entering_B: Tensor, left_B: Tensor
    ) -> tuple[dict[str, AuxiliaryLoss], dict[str, Tensor]]:
        """The pull towards the target, and statistics. A collective inside a tape."""
        tape = current_tape()
        if tape is None:
            return {}, {}
        share = self.operations(entering_B, left_B)
        losses, usage = self.control.losses(share.float().expand(len(left_B)), tape, kind=self.kind)
        statistics = {"share_of_operations": usage.density, **self.control.statistics()}
        statistics["kept"] = (left_B.sum() / (len(left_B) * self.tokens)).detach()
        return losses, statistics

    def operations(self, entering_B: Tensor, left_B: Tensor) -> Tensor:
        """The layer's operations in evaluation over those of the dense layer, differentiable.

        Counted sample by sample: attention costs the mean of squares, not the square of a mean.

        Args:
            entering_B, left_B: tokens of every sequence ahead of the layer, and that it leaves.
        """
        whole = FlopCounter(nominal=True)
        whole(self.layer, Work.dense(len(left_B), self.tokens))
        counter = FlopCounter()
        self._count(counter, Work.of(entering_B), Work.of(left_B))
        return counter.total().forward / whole.total().forward

    def _record(
        self,
        layout: TokenLayout,
        lengths_B: Tensor,
        representatives: Tensor | None,
        losses: dict[str, AuxiliaryLoss],
        statistics: dict[str, Tensor] | None = None,
    ) -> None:
        tape = current_tape()
        if tape is None:
            return
        record = RoutingRecord(
            name="",
            kind=self.kind,
            tokens=layout.tokens,
            executed=lengths_B.sum(),
            executed_lengths=lengths_B,
            planned_share=self.planned,
            statistics=statistics or {},
        )
        if representatives is not None:
            stands_T = torch.zeros(layout.tokens, dtype=torch.bool, device=lengths_B.device)
            record.chosen = stands_T.index_fill(0, representatives, True)
        tape.record(self, record, losses)

    def merged(self, count: FlopCounter, work: Work) -> Work:
        """The work on what is left of some tokens: the feed-forward's, and the next layer's."""
        return count.chosen(self, planned=work.share(self.planned), dense=work)

    def count_flops(self, count: FlopCounter, work: Work) -> None:
        """Attention over all, the comparisons, the feed-forward over what is left."""
        self._count(count, work, self.merged(count, work))

    def _count(self, count: FlopCounter, work: Work, left: Work) -> None:
        attention = self.layer.attention
        count(attention, work)
        count.comparison(attention.head_dim, work)
        count_attention_received(count, attention, work)
        count(self.layer.ffn, left)


def _kept_a_layer(target: float, num_layers: int) -> float:
    """What each of equal layers must leave for all to cost the target, attention half of each."""
    low, high = 0.0, 1.0
    for _ in range(40):
        kept = (low + high) / 2
        cost = sum(kept**layer * (1 + kept) / 2 for layer in range(num_layers)) / num_layers
        low, high = (kept, high) if cost < target else (low, kept)
    return high


@dataclass(frozen=True)
class LearnedBudgetConfig(Method):
    """How many tokens a layer drops and merges is learnt (LTMP, DiffRate).

    Attributes:
        kind: "ltmp": a threshold of similarity, and one of attention received, for every layer;
            "diffrate": a count for each, the same for all images.
        target: share of the layers' operations that evaluation should execute, in (0, 1].
        coefficient: of the squared distance to it.
        controller_gain: how fast a price moves that holds the target, see `DensityController`;
            0: none, as in the papers, where the task pulls the share away from it.
    """

    name: ClassVar[str] = "learned_budget"
    place: ClassVar[Place] = "merging"
    blocks: ClassVar[tuple[type[nn.Module], ...]] = (LearnedBudget,)
    excludes: ClassVar[tuple[str, ...]] = ("merging",)

    kind: Kind = "ltmp"
    target: float = 0.65
    coefficient: float = 10.0
    controller_gain: float = 0.02

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind={self.kind!r}: must be one of {', '.join(get_args(Kind))}")
        if not 0 < self.target <= 1:
            raise ValueError(f"target={self.target}: must be above 0 and at most 1")
        for name in ("coefficient", "controller_gain"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be 0 or more")

    def build(self, context: MergingContext, inner: nn.Module) -> LearnedBudget:
        """The layer, dropping and merging."""
        return LearnedBudget(
            inner,
            tokens=context.tokens,
            num_layers=context.num_layers,
            protected=context.protected,
            **self.options(),
        )
