"""Scores to choices: which tokens, or which experts, take part.

Shape legend: B sequences, S sequence length, T packed tokens, K kept per sequence.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from adaptive.ops.ranking import highest_columns
from adaptive.routing.layout import TokenLayout
from adaptive.routing.selection import Selection


def capacity_tokens(capacity: float, seq_len: int) -> int:
    """Tokens kept of a sequence: `round(capacity * seq_len)`, halves up, at least 1."""
    if not 0 < capacity <= 1:
        raise ValueError(f"capacity={capacity}: must be in (0, 1]")
    return min(seq_len, max(1, math.floor(capacity * seq_len + 0.5)))


def expert_choice(scores_BS: Tensor, capacity: int, valid_BS: Tensor | None = None) -> Selection:
    """Choose the `capacity` highest-scoring tokens of every sequence.

    Exactly `capacity` tokens are chosen, ties broken by the earlier position, and they are
    returned in their original order, so that causal attention among them stays causal. The
    shapes depend on `capacity` alone: no host synchronisation unless `valid_BS` is given.

    Looks at the whole sequence, hence at the future: not for sampling.

    Args:
        scores_BS: router scores, float, shape [batch, sequence]. Only their order is used.
        capacity: tokens kept per sequence, 1 <= capacity <= sequence.
        valid_BS: bool, False at padding, which is never chosen.

    Returns:
        Selection of batch * capacity tokens, without weights.

    Raises:
        ValueError: if `capacity` is out of range or a sequence has fewer valid tokens.

    Source: Mixture-of-Depths, arXiv 2404.02258, section 3.3.
    """
    batch, seq_len = scores_BS.shape
    if not 1 <= capacity <= seq_len:
        raise ValueError(
            f"capacity={capacity}: must be between 1 and the sequence length {seq_len}"
        )
    if valid_BS is not None and int(valid_BS.sum(1).min()) < capacity:
        raise ValueError(
            f"capacity={capacity}: a sequence has only {int(valid_BS.sum(1).min())} valid tokens"
        )
    columns_BK = highest_columns(_padding_last(scores_BS, valid_BS), capacity)
    rows = torch.arange(batch, device=scores_BS.device)
    return Selection(
        indices=(columns_BK + rows[:, None] * seq_len).flatten(),
        cu_seqlens=torch.arange(batch + 1, device=scores_BS.device, dtype=torch.int32) * capacity,
        max_seqlen=capacity,
        weights=None,
        batch_size=batch,
        seq_len=seq_len,
        positions=columns_BK.flatten(),
    )


def expert_choice_packed(
    scores_T: Tensor, layout: TokenLayout, capacity: float, valid_T: Tensor | None = None
) -> Selection:
    """`expert_choice` for packed or padded tokens: a share of every sequence's valid tokens.

    A uniform layout without a mask keeps static shapes and never reads a number back to the
    host. Otherwise each sequence keeps `capacity_tokens(capacity, its valid tokens)` and the
    host is synchronised once; a sequence without valid tokens keeps none.

    Args:
        scores_T: router scores, float [T].
        layout: where the tokens came from.
        capacity: share kept, in (0, 1].
        valid_T: bool [T], False at padding, which is never chosen.
    """
    if valid_T is None and layout.uniform:
        if layout.max_seqlen == 0:
            return Selection.whole(layout)
        keep = capacity_tokens(capacity, layout.max_seqlen)
        scores_BS = scores_T.view(layout.batch_size, layout.max_seqlen)
        chosen = expert_choice(scores_BS, keep)
        positions = layout.positions[chosen.indices]
        return Selection(
            chosen.indices,
            chosen.cu_seqlens,
            keep,
            None,
            chosen.batch_size,
            layout.max_seqlen,
            positions,
        )
    if not 0 < capacity <= 1:
        raise ValueError(f"capacity={capacity}: must be in (0, 1]")
    sequence_T = layout.sequence_ids
    column_T = torch.arange(layout.tokens, device=scores_T.device)
    column_T = column_T - layout.cu_seqlens.long()[sequence_T]
    shape = (layout.batch_size, layout.max_seqlen)
    present_BS = torch.zeros(shape, dtype=torch.bool, device=scores_T.device)
    everyone_T = torch.ones_like(sequence_T, dtype=torch.bool)
    present_BS[sequence_T, column_T] = everyone_T if valid_T is None else valid_T
    scores_BS = torch.zeros(shape, dtype=scores_T.dtype, device=scores_T.device)
    scores_BS[sequence_T, column_T] = scores_T.detach()
    order_BS = _best_first(scores_BS, present_BS)
    rank_BS = torch.empty_like(order_BS)
    places = torch.arange(layout.max_seqlen, device=scores_T.device).expand(shape)
    rank_BS.scatter_(1, order_BS, places)
    count_B = present_BS.sum(1)
    keep_B = torch.floor(count_B.double() * capacity + 0.5).long().clamp(min=1)
    chosen_BS = (rank_BS < torch.minimum(keep_B, count_B)[:, None]) & present_BS
    return Selection.from_mask(chosen_BS[sequence_T, column_T], layout)


def threshold_choice(
    logits_T: Tensor, layout: TokenLayout, threshold: Tensor | float, valid_T: Tensor | None = None
) -> Selection:
    """Choose every token whose logit exceeds `threshold`: causal, one token at a time if need be.

    The number of chosen tokens varies, so the host is synchronised once.

    Source: Mixture-of-Depths, arXiv 2404.02258, section 3.5 (sampling).
    """
    chosen_T = logits_T.detach() > threshold
    if valid_T is not None:
        chosen_T = chosen_T & valid_T
    return Selection.from_mask(chosen_T, layout)


def _best_first(scores_BS: Tensor, valid_BS: Tensor | None) -> Tensor:
    """int64 [B, S]: columns by falling score, ties by position, padding last."""
    scores_BS = _padding_last(scores_BS, valid_BS)
    return scores_BS.sort(dim=1, descending=True, stable=True).indices


def _padding_last(scores_BS: Tensor, valid_BS: Tensor | None) -> Tensor:
    """Detached scores, -inf at padding and finite elsewhere below the top."""
    scores_BS = scores_BS.detach()
    if valid_BS is None:
        return scores_BS
    lowest = torch.finfo(scores_BS.dtype).min
    return scores_BS.clamp(min=lowest).masked_fill(~valid_BS, -torch.inf)
