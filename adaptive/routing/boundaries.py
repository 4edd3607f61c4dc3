"""Where segments of a text end: by a learned gate, at a stride, or at the ends of words.

Shape legend: B sequences, T tokens.
"""

from __future__ import annotations

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


def lead_bytes(ids_T: Tensor, layout: TokenLayout, before_B: Tensor | None = None) -> Tensor:
    """int64 [T]: the byte that began the UTF-8 character of each byte: itself or an earlier one.

    Args:
        ids_T: int64 [T], bytes.
        layout: of the tokens.
        before_B: int64 [B], of the byte before each sequence's first; None: 0, as of a text whose
            first byte begins no character.
    """
    place_T = torch.arange(layout.tokens, device=ids_T.device)
    begins_T = (ids_T & 0xC0) != 0x80
    last_T = torch.where(begins_T, place_T, -1).cummax(0).values
    inside_T = last_T >= layout.cu_seqlens[:-1].long()[layout.sequence_ids]
    if before_B is None:
        before_B = ids_T.new_zeros(layout.batch_size)
    return torch.where(inside_T, ids_T[last_T.clamp(min=0)], before_B[layout.sequence_ids])


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
    prior: float | Tensor,
    kind: BoundaryLoss = "binomial",
    slack: float = 0.0,
    script_T: Tensor | None = None,
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
        prior: share of tokens that should end a segment, in (0, 1); float [K]: of every script.
        kind: which loss.
        slack: λσ of the second.
        script_T: int64 [T], 0 … K-1: k and n are then of each script of a sequence, and their
            losses add up.

    Sources: MAGNET, arXiv 2407.08818, section 3 (a prior a script); dynamic pooling,
    arXiv 2211.09761, section 3.2; FLEXITOKENS, arXiv 2507.12720, section 3.
    """
    prior_K = ends_T.new_full((1,), prior) if isinstance(prior, float) else prior.to(ends_T.dtype)
    scripts, own_T = len(prior_K), layout.sequence_ids
    if script_T is not None:
        own_T = own_T * scripts + script_T
    prior_B = prior_K.repeat(layout.batch_size)
    n_B = torch.zeros_like(prior_B).index_add(0, own_T, torch.ones_like(ends_T))
    k_B = torch.zeros_like(prior_B).index_add(0, own_T, ends_T)
    if kind == "binomial":
        choose_B = torch.lgamma(n_B + 1) - torch.lgamma(k_B + 1) - torch.lgamma(n_B - k_B + 1)
        return -(choose_B + k_B * prior_B.log() + (n_B - k_B) * (-prior_B).log1p()).sum()
    return ((k_B - prior_B * n_B).relu() + ((prior_B - slack) * n_B - k_B).relu()).sum()
