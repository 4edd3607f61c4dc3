"""Where segments of a text end: by a learned gate, at a stride, or at the ends of words.

Shape legend: B sequences, T tokens.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from adaptive.routing.grouping import Grouping
from adaptive.routing.layout import TokenLayout

BoundaryLoss = Literal["binomial", "band"]


def stride_ends(layout: TokenLayout, stride: int) -> Tensor:
    """bool [T]: every `stride`-th token of a sequence ends a segment."""
    return (layout.positions + 1) % stride == 0


def word_ends(ids_T: Tensor) -> Tensor:
    """bool [T]: bytes of white space, which end the word before them. Bytes of UTF-8 text.

    Source: hierarchical byte and word models, arXiv 2501.10322, section 3 (words by white space).
    """
    tab, carriage_return, space = 9, 13, 32
    return (ids_T == space) | ((ids_T >= tab) & (ids_T <= carriage_return))


def segments_of(ends_T: Tensor, layout: TokenLayout, ends_soft_T: Tensor | None = None) -> Grouping:
    """Closed segments as groups, each at the position of its last token; open ones are dropped.

    What comes behind a sequence's last end belongs to a segment that nobody may read yet.
    Synchronises with the host once, for the number of segments.

    Args:
        ends_T: bool [T].
        layout: of the tokens.
        ends_soft_T: float [T], the values of `ends` with a gradient (straight-through); the
            grouping's weights are then 1 with the gradient of the number of ends before each
            token: a soft end moves the tokens behind it into the next segment.

    Source: dynamic pooling, arXiv 2211.09761, section 3 and equation 5.
    """
    tokens = torch.arange(layout.tokens, device=ends_T.device)
    last_T = layout.cu_seqlens[1:].long()[layout.sequence_ids]
    next_T = torch.where(ends_T, tokens, layout.tokens).flip(0).cummin(0).values.flip(0)
    target_T = torch.where(next_T < last_T, next_T, -1)
    made = Grouping.from_targets(target_T, layout)
    if ends_soft_T is None:
        return made
    before_T = ends_soft_T.cumsum(0) - ends_soft_T
    weights_T = 1 + (before_T - before_T.detach())
    return Grouping(
        made.group,
        made.sizes,
        made.cu_seqlens,
        made.positions,
        made.max_seqlen,
        weights=weights_T,
        representatives=made.representatives,
    )


def ends_before(ends_T: Tensor, layout: TokenLayout) -> Tensor:
    """int64 [T]: how many segments of its sequence have ended with or before each token."""
    count_T = ends_T.long().cumsum(0)
    running = torch.cat([count_T.new_zeros(1), count_T])
    return count_T - running[layout.cu_seqlens[:-1].long()][layout.sequence_ids]


def boundary_loss(
    ends_T: Tensor,
    layout: TokenLayout,
    *,
    prior: float,
    kind: BoundaryLoss = "binomial",
    slack: float = 0.0,
) -> Tensor:
    """Sum over sequences of what a wrong number of segment ends costs, nats, differentiable.

    With k ends in a sequence of n tokens:

    - "binomial": `-log Binomial(k; n, prior)`;
    - "band": `n (relu(k/n - prior) + relu(prior - slack - k/n))`: nothing between `prior - slack`
      and `prior`.

    Divided by the tokens of the global batch it is a mean that does not depend on how sequences
    were split over ranks; of sequences of one length it is the papers' mean over sequences.

    Args:
        ends_T: float [T], 0 or 1.
        layout: of the tokens.
        prior: share of tokens that should end a segment, in (0, 1).
        kind: which loss.
        slack: λσ of the second.

    Sources: dynamic pooling, arXiv 2211.09761, section 3.2; FLEXITOKENS, arXiv 2507.12720,
    section 3.
    """
    n_B = layout.cu_seqlens.diff().to(ends_T.dtype)
    k_B = ends_T.new_zeros(layout.batch_size).index_add(0, layout.sequence_ids, ends_T)
    if kind == "binomial":
        choose_B = torch.lgamma(n_B + 1) - torch.lgamma(k_B + 1) - torch.lgamma(n_B - k_B + 1)
        return -(choose_B + k_B * math.log(prior) + (n_B - k_B) * math.log1p(-prior)).sum()
    return ((k_B - prior * n_B).relu() + ((prior - slack) * n_B - k_B).relu()).sum()
