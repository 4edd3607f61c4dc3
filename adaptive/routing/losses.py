"""Auxiliary losses of routers, as shares of a mean over the global batch (see BatchScope).

Shape legend: T tokens, E experts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from adaptive.routing.scope import BatchScope
from adaptive.routing.tape import RoutingTape


def choice_loss(
    logits_T: Tensor, chosen_T: Tensor, valid_T: Tensor | None, scope: BatchScope
) -> Tensor:
    """Binary cross-entropy of causal logits against "was chosen", mean over valid tokens.

    Args:
        logits_T: float [T], of the router itself or of a predictor.
        chosen_T: bool [T], the targets.
        valid_T: bool [T] or None; padding counts neither above nor below.

    Source: Mixture-of-Depths, arXiv 2404.02258, section 3.5.
    """
    per_token_T = F.binary_cross_entropy_with_logits(
        logits_T.float(), chosen_T.float(), reduction="none"
    )
    return mean_over_tokens(per_token_T, valid_T, scope)


def z_loss(router_logits_TE: Tensor, valid_T: Tensor | None, scope: BatchScope) -> Tensor:
    """Mean of `logsumexp(logits)^2`, which keeps router logits small.

    Source: ST-MoE, arXiv 2202.08906, equation 5.
    """
    return mean_over_tokens(torch.logsumexp(router_logits_TE.float(), -1) ** 2, valid_T, scope)


def mean_over_tokens(per_token_T: Tensor, valid_T: Tensor | None, scope: BatchScope) -> Tensor:
    """This rank's share of a mean over the valid tokens of the global batch."""
    if valid_T is None:
        return scope.share_of(per_token_T.sum(), per_token_T.shape[0])
    # Multiplying would let a NaN at padding through.
    return scope.share_of(torch.where(valid_T, per_token_T, 0).sum(), valid_T.sum())


def choice_diversity(probabilities_TK: Tensor, tape: RoutingTape) -> Tensor:
    """This rank's share of the mutual information between token and choice, nats.

    `H(mean over tokens of p) - mean over tokens of H(p)`: high when all choices are used and each
    token is sure of its own. The first entropy is not linear in the tokens: it is expanded around
    the global mean. A collective: every rank calls it, tokens or none.

    Args:
        probabilities_TK: float [T, K], of valid tokens only.
        tape: knows the global batch.
    """
    tokens, choices = probabilities_TK.shape
    local_K = probabilities_TK.sum(0)
    known_K = local_K.detach().to(torch.promote_types(local_K.dtype, torch.float32))
    counts = torch.cat([known_K, known_K.new_full((1,), tokens)])
    total_K, total_tokens = tape.total(counts).split([choices, 1])
    number = total_tokens.squeeze().clamp(min=1)
    mean_K = total_K / number
    value = torch.special.entr(mean_K).sum() * tokens / number
    # The slope of p log p is infinite at 0, where a choice that nobody takes lies.
    tiny = torch.finfo(mean_K.dtype).tiny
    slope_K = -(mean_K.clamp(min=tiny).log() + 1)
    linear = (slope_K * (local_K - local_K.detach())).sum() / number
    return value + linear - torch.special.entr(probabilities_TK.clamp(min=tiny)).sum() / number
