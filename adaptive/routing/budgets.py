"""Which tokens a learned budget drops or merges: by thresholds (LTMP) or by counts (DiffRate).

Both work on sequences of one length S of which some tokens are gone already (`open` False), so that
training, which computes all of them, decides as evaluation does on those that are left.

Shape legend: B sequences, S tokens of each, C width of the metric, K candidates of a count.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from adaptive.routing.gumbel import straight_through


class Matched(NamedTuple):
    """What tokens are compared by; no gradient.

    Attributes:
        received: float [B, S], importance: of thresholds, the greatest of whoever would merge into
            a token is taken later.
        similar: float [B, S], cosine of a token and `into`; -inf where it may not merge.
        into: int64 [B, S], the place that a token would merge into.
        rank: int64 [B, S], place in the order of importance, 0 the greatest; protected tokens
            first, those that are gone last.
    """

    received: Tensor
    similar: Tensor
    into: Tensor
    rank: Tensor


class Taken(NamedTuple):
    """What becomes of every token: 0 or 1, with the gradient of what decided.

    Attributes:
        stays: float [B, S], 0 where it merges into another.
        keeps: float [B, S], 0 where it is dropped.
    """

    stays: Tensor
    keeps: Tensor


def ranked(received_BS: Tensor, open_BS: Tensor, protected_BS: Tensor) -> Tensor:
    """int64 [B, S]: place in the order of importance, ties by the earlier token."""
    key_BS = received_BS.masked_fill(protected_BS, torch.inf).masked_fill(~open_BS, -torch.inf)
    order_BS = key_BS.argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(order_BS.shape[1], device=order_BS.device).expand_as(order_BS)
    return torch.empty_like(order_BS).scatter(1, order_BS, places)


def match_halves(
    metric_BSC: Tensor, received_BS: Tensor, open_BS: Tensor, protected_BS: Tensor
) -> Matched:
    """Of what is left, tokens at even places may merge into their most similar one at odd places.

    Source: ToMe, arXiv 2210.09461, section 3, as LTMP, arXiv 2305.10780, section 3.2 uses it.
    """
    place_BS = open_BS.cumsum(-1) - 1
    free_BS = open_BS & ~protected_BS
    from_BS, to_BS = free_BS & (place_BS % 2 == 0), free_BS & (place_BS % 2 == 1)
    return _matched(
        metric_BSC, received_BS, from_BS, to_BS, ranked(received_BS, open_BS, protected_BS)
    )


def match_ranks(
    metric_BSC: Tensor,
    received_BS: Tensor,
    open_BS: Tensor,
    protected_BS: Tensor,
    *,
    staying: Tensor,
) -> Matched:
    """The `staying` most important tokens receive the others, each its most similar one.

    Source: DiffRate, arXiv 2305.17997, section 3.2.
    """
    rank_BS = ranked(received_BS, open_BS, protected_BS)
    stays_BS = open_BS & (rank_BS < staying)
    from_BS = open_BS & ~stays_BS & ~protected_BS
    return _matched(metric_BSC, received_BS, from_BS, stays_BS & ~protected_BS, rank_BS)


def _matched(
    metric_BSC: Tensor, received_BS: Tensor, from_BS: Tensor, to_BS: Tensor, rank_BS: Tensor
) -> Matched:
    wide = torch.promote_types(metric_BSC.dtype, torch.float32)
    unit_BSC = F.normalize(metric_BSC.to(wide), dim=-1)
    closed_BSS = ~(from_BS[:, :, None] & to_BS[:, None])
    similar_BSS = (unit_BSC @ unit_BSC.transpose(1, 2)).masked_fill(closed_BSS, -torch.inf)
    similar_BS, into_BS = similar_BSS.max(-1)
    return Matched(received_BS, similar_BS, into_BS, rank_BS)


def by_thresholds(
    matched: Matched,
    thresholds_2: Tensor,
    open_BS: Tensor,
    protected_BS: Tensor,
    *,
    temperature: float,
) -> Taken:
    """Merge where the cosine is above a threshold, then drop groups that matter less than another.

    `STE(σ((v - θ) / τ) > ½)`. A group matters as its most important member does. The most important
    token of a sequence always stays, so that none is emptied.

    Args:
        thresholds_2: differentiable: of the cosine, of attention received.
        temperature: τ.

    Source: LTMP, arXiv 2305.10780, section 3.
    """
    of_cosine, of_attention = thresholds_2.to(matched.received.dtype)
    merges_BS = matched.similar > of_cosine
    # A σ of -inf is 0, with the gradient 0: a token without a partner says nothing.
    soft_BS = ((matched.similar - of_cosine) / temperature).sigmoid()
    stays_BS = straight_through(~merges_BS, 1 - soft_BS)
    score_BS = matched.received.scatter_reduce(
        1, matched.into, matched.received.masked_fill(~merges_BS, -torch.inf), "amax"
    )
    safe_BS = protected_BS | (matched.rank == 0)
    # The most important token may have merged: then its group holds its score, and stays.
    moved_BS = (safe_BS & merges_BS).int()
    most_BS = safe_BS.int().scatter_reduce(1, matched.into, moved_BS, "amax").bool()
    keeps_BS = (score_BS > of_attention) | most_BS
    soft_BS = ((score_BS - of_attention) / temperature).sigmoid()
    soft_BS = torch.where(most_BS | ~open_BS, soft_BS.detach(), soft_BS)
    return Taken(stays_BS, straight_through(keeps_BS, soft_BS))


def by_counts(matched: Matched, staying: Tensor, dropping: Tensor, survival_2K: Tensor) -> Taken:
    """Drop all but so many tokens, then merge all but so many, the least important first.

    The gradient of a token's being kept is that of the probability that its rank survives: their
    sum is the expected count, so a budget of counts and one of masks have the same gradient.

    Args:
        staying, dropping: int64 scalars: tokens left by merging, and by dropping.
        survival_2K: see `survival`: of merging, of dropping.

    Source: DiffRate, arXiv 2305.17997, section 3.2.
    """
    soft_2BS = survival_2K[:, matched.rank.clamp(max=survival_2K.shape[1] - 1)]
    merges_BS = (matched.rank >= staying) & matched.similar.isfinite()
    stays_BS = straight_through(~merges_BS, soft_2BS[0])
    return Taken(stays_BS, straight_through(matched.rank < dropping, soft_2BS[1]))


def survival(logits_2K: Tensor) -> Tensor:
    """float [2, K]: P(rank j survives), the probability of all counts 1 … K that are above j.

    Rank 0 always does. The sum over ranks is the expected count.
    """
    chances_2K = logits_2K.softmax(-1)
    return chances_2K.flip(-1).cumsum(-1).flip(-1)


def expected_counts(survival_2K: Tensor) -> Tensor:
    """int64 [2]: `⌈Σ π_c c⌉`, no gradient; a ten-thousandth above a number is that number."""
    return (survival_2K.detach().double().sum(-1) - 1e-4).ceil().long().clamp(min=1)
