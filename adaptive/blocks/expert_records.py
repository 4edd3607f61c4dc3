"""What a mixture of experts tells the tape: its losses and what it did.

Shape legend: T tokens, E units of the router (experts, and idle ones), N taken pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from adaptive.routing.assignment import Assignment
from adaptive.routing.balance import load_balancing_loss
from adaptive.routing.losses import z_loss
from adaptive.routing.scope import BatchScope
from adaptive.routing.tape import AuxiliaryLoss, RoutingRecord, masked_mean


def balanced_distribution(router: nn.Module, logits_TE: Tensor) -> Tensor:
    """float32 [T, E]: the distribution that the balance loss spreads, softmax of the logits.

    A router with a `balance_logits` method says which logits.
    """
    balance_logits = getattr(router, "balance_logits", None)
    balance_TE = logits_TE if balance_logits is None else balance_logits(logits_TE)
    return balance_TE.softmax(-1, dtype=torch.promote_types(balance_TE.dtype, torch.float32))


def expert_losses(
    logits_TE: Tensor,
    probabilities_TE: Tensor,
    total: Tensor,
    valid_T: Tensor | None,
    *,
    balance_coefficient: float,
    z_coefficient: float,
) -> dict[str, AuxiliaryLoss]:
    """This rank's shares of the balance and the z loss; those with coefficient 0 are left out.

    Means are over the tokens that reached this router anywhere in the global batch: inside a
    depth-routed block that is fewer than the batch has.

    Args:
        logits_TE: of the router.
        probabilities_TE: see `balanced_distribution`.
        total: float [E + 1], of the global batch: choices of each unit, then valid tokens.
        valid_T: bool [T] or None, False at padding.
        balance_coefficient, z_coefficient: of the losses.
    """
    reached = BatchScope(tokens=total[-1])
    losses = {}
    if balance_coefficient:
        share = load_balancing_loss(probabilities_TE, total[:-1], valid_T, reached)
        losses["load_balancing"] = AuxiliaryLoss(share, balance_coefficient)
    if z_coefficient:
        share = z_loss(logits_TE, valid_T, reached)
        losses["z"] = AuxiliaryLoss(share, z_coefficient)
    return losses


@torch.no_grad()
def expert_record(
    kind: str,
    probabilities_TE: Tensor,
    assignment: Assignment,
    valid_T: Tensor | None,
    load_E: Tensor,
) -> RoutingRecord:
    """What one mixture did with this rank's tokens. `load_E` is of the experts that compute."""
    assert assignment.weights is not None
    weights_N = assignment.weights.flatten()[assignment.pairs]
    taken, wanted = assignment.pairs.shape[0], assignment.wanted_per_expert.sum()
    return RoutingRecord(
        name="",
        kind=kind,
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
