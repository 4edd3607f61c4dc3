"""TokenMerging: between a layer's attention and its feed-forward, like tokens become one.

Shape legend: T packed tokens, G groups, D width, H heads, h head width, B sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor, nn

from adaptive.blocks.protocol import MergingContext, Method, Place, RoutedBlock
from adaptive.ops.flop_counter import FlopCounter, Work
from adaptive.ops.merge import merge
from adaptive.routing.grouping import Grouping
from adaptive.routing.layout import TokenLayout
from adaptive.routing.merging import (
    Amount,
    adjacent,
    amount_of,
    bsm,
    mctf,
    pitome,
    random_pairs,
)
from adaptive.routing.recompute import decide
from adaptive.routing.tape import RoutingRecord, current_tape
from parallel.draws import draw_own_rows

Kind = Literal["bsm", "pitome", "pitome_text", "adjacent", "mctf", "random"]


class Heads(NamedTuple):
    """What attention compared: queries and keys [T, H, h], and keys before any rotation."""

    queries: Tensor
    keys: Tensor
    unrotated_keys: Tensor


class MergeableLayer(Protocol):
    """A layer in two halves, residuals included; `attention` and `ffn` count their operations.

    `attention` also tells its `num_heads` (of all ranks) and `head_dim`.
    """

    attention: nn.Module
    ffn: nn.Module

    def attend(
        self, x_TD: Tensor, *, layout: TokenLayout, key_bias: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Heads]:
        """The tokens after attention, whose scores have a bias a key, and its heads."""
        ...

    def feed_forward(self, x_TD: Tensor) -> Tensor:
        """The tokens after the feed-forward."""
        ...

    def mean_over_heads(self, x_THc: Tensor) -> Tensor:
        """[T, c]: the mean over the heads of all ranks, of which this one has H. No gradient."""
        ...


class TokenMerging(RoutedBlock):
    """Wraps a layer in two halves (`MergeableLayer`): tokens merge between them, for good.

    `forward(x_TD, layout=…, sizes=None) -> (x_GD, grouping)`: what is left of the tokens and who is
    in which group. The next layer takes `grouping.layout` and `grouping.sizes`. With an amount of 0
    the layer computes what it computes alone, bit for bit, and returns the grouping None.

    Gradients go through the averages; the matching has none.

    Args:
        layer: `attend` and `feed_forward`.
        kind, amount, threshold, margin, proportional: see TokenMergingConfig.
        protected: tokens at the beginning of every sequence that never merge (a class token).

    Sources: ToMe, arXiv 2210.09461; PiToMe, arXiv 2405.16148; A-ToMe, arXiv 2306.16009; MCTF,
    arXiv 2403.10030. Where their code deviates from them: docs/token_merging.md.
    """

    kind = "token_merging"
    causal = False

    def __init__(
        self,
        layer: nn.Module,
        *,
        kind: Kind = "bsm",
        amount: Amount | None = 8,
        threshold: float | None = None,
        margin: float = 0.9,
        proportional: bool = True,
        protected: int = 0,
    ) -> None:
        super().__init__()
        TokenMergingConfig(
            kind=kind, amount=amount, threshold=threshold, margin=margin, proportional=proportional
        )
        self.layer: Any = layer
        self.matching, self.amount, self.threshold = kind, amount, threshold
        self.margin, self.proportional, self.protected = margin, proportional, protected

    def forward(
        self, x_TD: Tensor, *, layout: TokenLayout, sizes: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Grouping | None]:
        """Attention over all tokens, merging, feed-forward over the groups.

        Args:
            x_TD: [T, D], packed.
            layout: of the tokens.
            sizes: float [T], what each stands for after earlier merging; None: 1, nothing merged.
            kwargs: for the layer's `attend`.
        """
        bias = None if sizes is None or not self.proportional else sizes.log()
        x_TD, heads = self.layer.attend(x_TD, layout=layout, key_bias=bias, **kwargs)
        grouping = None
        if self.amount != 0 or self.threshold is not None:
            grouping = decide(lambda: self.match(heads, layout, sizes))
            x_TD = merge(x_TD, sizes, grouping)
        self._record(layout, grouping)
        return self.layer.feed_forward(x_TD), grouping

    @torch.no_grad()
    def match(self, heads: Heads, layout: TokenLayout, sizes: Tensor | None) -> Grouping:
        """Who merges with whom. Compared are keys before rotation, mean over all heads."""
        metric_TC = self.layer.mean_over_heads(heads.unrotated_keys)
        options: dict[str, Any] = {"amount": self.amount}
        if self.protected:
            first = layout.cu_seqlens[:-1].long()[layout.sequence_ids]
            place_T = torch.arange(layout.tokens, device=first.device) - first
            options["protected_T"] = place_T < self.protected
        if self.matching == "random":
            # Draws are of the metric's device and dtype, and of every rank alike.
            device = metric_TC.device
            draws_T = draw_own_rows(lambda tokens: torch.rand(tokens, device=device), layout.tokens)
            return random_pairs(metric_TC, layout, sizes, draws_T=draws_T, **options)
        if self.matching in ("bsm", "adjacent"):
            match = bsm if self.matching == "bsm" else adjacent
            return match(metric_TC, layout, sizes, threshold=self.threshold, **options)
        if self.matching == "mctf":
            attention_T = self.layer.mean_over_heads(
                attention_received(heads.queries, heads.keys, layout)[..., None]
            ).squeeze(-1)
            return mctf(metric_TC, layout, sizes, attention_T=attention_T, **options)
        form: Any = "text" if self.matching == "pitome_text" else "image"
        return pitome(metric_TC, layout, sizes, margin=self.margin, form=form, **options)

    def _record(self, layout: TokenLayout, grouping: Grouping | None) -> None:
        tape = current_tape()
        if tape is None:
            return
        lengths_B = layout.cu_seqlens.diff()
        record = RoutingRecord(
            name="",
            kind=self.kind,
            tokens=layout.tokens,
            executed=layout.tokens if grouping is None else grouping.groups,
            executed_lengths=lengths_B if grouping is None else grouping.cu_seqlens.diff(),
        )
        if isinstance(self.amount, float):
            record.planned_share = 1 - self.amount
        if grouping is not None:
            # Who stands for its group, and how much the largest group stands for.
            assert grouping.representatives is not None
            stands_T = torch.zeros(layout.tokens, dtype=torch.bool, device=grouping.group.device)
            record.chosen = stands_T.index_fill(0, grouping.representatives, True)
            if grouping.groups:
                record.statistics["largest_group"] = grouping.sizes.amax().detach()
        tape.record(self, record)

    def merged(self, count: FlopCounter, work: Work) -> Work:
        """The work on what is left of some tokens: the feed-forward's, and the next layer's."""
        if self.amount is None:
            planned = work  # a threshold promises nothing
        else:
            most_B = torch.floor(work.tokens / 2)
            if self.matching == "adjacent":
                most_B = (work.tokens - 1).clamp(min=0)
            wanted_B = torch.full_like(work.tokens, float(self.amount))
            if isinstance(self.amount, float):
                wanted_B = torch.floor(work.tokens * self.amount + 1e-9)
            left_B = work.tokens - torch.minimum(wanted_B, most_B)
            planned = Work(left_B, left_B, left_B, work.sequences)
        return count.chosen(self, planned=planned, dense=work)

    def count_flops(self, count: FlopCounter, work: Work) -> None:
        """Attention over all, the comparison of keys, the feed-forward over what is left."""
        count(self.layer.attention, work)
        if self.amount != 0 or self.threshold is not None:
            self.count_matching(count, work)
        count(self.layer.ffn, self.merged(count, work))

    def count_matching(self, count: FlopCounter, work: Work) -> None:
        """The products of comparing keys, and of `mctf` those of attention received."""
        attention = self.layer.attention
        if self.matching in ("bsm", "mctf"):
            odd_B = torch.floor(work.tokens / 2)
            sides = Work(work.tokens - odd_B, odd_B, odd_B, work.sequences)
            count.comparison(attention.head_dim, sides)
        elif self.matching in ("pitome", "pitome_text"):
            count.comparison(attention.head_dim, work)
        if self.matching == "mctf":
            count_attention_received(count, attention, work)


def attention_received(
    q_THh: Tensor,
    k_THh: Tensor,
    layout: TokenLayout,
    *,
    key_bias: Tensor | None = None,
    kept_T: Tensor | None = None,
) -> Tensor:
    """[T, H]: the attention that each token receives, mean over the queries of its sequence.

    Args:
        q_THh, k_THh: queries and keys.
        layout: of the tokens.
        key_bias: [T], of every score of a key.
        kept_T: bool [T], with sequences of one length: the others are neither keys nor queries.
    """
    shape = (layout.batch_size, layout.max_seqlen)
    scale = q_THh.shape[-1] ** -0.5
    if layout.uniform:
        q, k = (x.unflatten(0, shape).transpose(1, 2) for x in (q_THh * scale, k_THh))
        scores = q @ k.transpose(2, 3)
        if key_bias is not None:
            scores = scores + key_bias.to(scores.dtype).unflatten(0, shape)[:, None, None]
        kept_B1S = None if kept_T is None else kept_T.unflatten(0, shape)[:, None]
        return _mean_over_queries(scores, kept_B1S).transpose(1, 2).flatten(0, 1)
    lengths = layout.cu_seqlens.diff().tolist()
    received, start = [], 0
    for q, k in zip(q_THh.split(lengths), k_THh.split(lengths), strict=True):
        scores_HQK = q.transpose(0, 1) @ k.permute(1, 2, 0) * scale
        if key_bias is not None:
            scores_HQK = scores_HQK + key_bias[start : start + len(k)].to(scores_HQK.dtype)
        received.append(_mean_over_queries(scores_HQK).t())
        start += len(k)
    return torch.cat(received)


def _mean_over_queries(scores_QK: Tensor, kept_Q: Tensor | None = None) -> Tensor:
    """Softmax over keys, then the mean over queries: [..., Q, K] -> [..., K]. No gradient.

    The shares are never written: their column sums are a product with 1 / (Q Z_q). Of queries
    that are not kept there are neither.
    """
    scores_QK = scores_QK.detach()
    if kept_Q is not None:
        scores_QK = scores_QK.masked_fill(~kept_Q[..., None, :], -torch.inf)
    powers_QK = scores_QK.sub_(scores_QK.amax(-1, keepdim=True)).exp_()
    weights_Q = 1 / powers_QK.sum(-1)
    if kept_Q is None:
        weights_Q = weights_Q / scores_QK.shape[-2]
    else:
        weights_Q = weights_Q * kept_Q / kept_Q.sum(-1, keepdim=True)
    return (weights_Q[..., None, :] @ powers_QK).squeeze(-2)


def count_attention_received(count: FlopCounter, attention: Any, work: Work) -> None:
    """Scores of all heads, and the sums over queries."""
    count.comparison((attention.head_dim + 1) * attention.num_heads, work)


@dataclass(frozen=True)
class TokenMergingConfig(Method):
    """Like tokens become one between a layer's halves.

    Attributes:
        kind: "bsm" (ToMe), "pitome" and "pitome_text" (its two forms), "adjacent" (neighbours),
            "mctf", or "random" pairs, the control of all.
        amount: tokens merged in each layer: a count, or a share of those that reach it; None: as
            many as the threshold lets.
        inflection: in [-1, 1], shifts merging over depth, the total unchanged: 1 begins with 0 and
            ends with twice the amount, -1 the other way (ToMe's `inflect`).
        threshold: pairs of a cosine below it do not merge ("bsm", "adjacent"); None: any do.
        margin: of pitome's energy, at the first layer; it falls linearly to 0 at the last.
        proportional: attention counts a merged token as many times as it has members. ToMe turns it
            off for models that were trained with merging.
    """

    name: ClassVar[str] = "token_merging"
    place: ClassVar[Place] = "merging"
    blocks: ClassVar[tuple[type[nn.Module], ...]] = (TokenMerging,)

    kind: Kind = "bsm"
    amount: Amount | None = 8
    inflection: float = 0.0
    threshold: float | None = None
    margin: float = 0.9
    proportional: bool = True

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind={self.kind!r}: must be one of {', '.join(get_args(Kind))}")
        if self.amount is None and self.threshold is None:
            raise ValueError("amount and threshold: give at least one of them")
        if self.amount is not None:
            amount_of(self.amount, 1)
        elif self.kind not in ("bsm", "adjacent"):
            raise ValueError(f"amount=None: must be given with kind={self.kind}")
        if self.threshold is not None and self.kind not in ("bsm", "adjacent"):
            raise ValueError(f"threshold={self.threshold}: must be None with kind={self.kind}")
        if not -1 <= self.inflection <= 1:
            raise ValueError(f"inflection={self.inflection}: must be in [-1, 1]")
        if not self.margin < 1:
            raise ValueError(f"margin={self.margin}: must be below 1")

    def amounts(self, num_layers: int) -> list[Amount | None]:
        """What each layer merges. Source: ToMe, arXiv 2210.09461, section 3, schedules."""
        if self.amount is None:
            return [None] * num_layers
        first = self.amount * (1 - self.inflection)
        step = 2 * self.amount * self.inflection / max(num_layers - 1, 1)
        amounts = [first + step * layer for layer in range(num_layers)]
        if isinstance(self.amount, int):
            return [int(amount) for amount in amounts]
        return [min(amount, 0.999) for amount in amounts]

    def build(self, context: MergingContext, inner: nn.Module) -> TokenMerging:
        """The layer, merging."""
        layer, num_layers = context.layer, context.num_layers
        options = self.options(without=("amount", "inflection", "margin"))
        return TokenMerging(
            inner,
            amount=self.amounts(num_layers)[layer],
            margin=self.margin * (1 - layer / max(num_layers - 1, 1)),
            protected=context.protected,
            **options,
        )
