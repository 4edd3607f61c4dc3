"""Keeping the load of experts even: the balance loss, and balancing without a loss.

Shape legend: T tokens, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from adaptive.ops.exact_buffers import ExactBuffers
from adaptive.routing.recompute import decide
from adaptive.routing.scope import BatchScope
from adaptive.routing.tape import RoutingTape
from parallel.mesh import Mesh


def load_balancing_loss(
    probabilities_TE: Tensor, load_E: Tensor, valid_T: Tensor | None, scope: BatchScope
) -> Tensor:
    """This rank's share of `E * Σ_e f_e p_e`: 1 when all experts get the same, E at worst.

    Args:
        probabilities_TE: float [T, E], the router's distribution; p is its mean over the valid
            tokens of the global batch.
        load_E: [E], choices of each expert in the **global** batch (`RoutingTape.total`); f is its
            share of all choices. Not differentiated.
        valid_T: bool [T] or None; padding counts neither in f nor in p.

    Source: Switch Transformer, arXiv 2101.03961, section 2.2; X-MoE, arXiv 2204.09179, section 3.4.
    """
    share_E = load_E.to(probabilities_TE.dtype) / load_E.sum().clamp(min=1)
    per_token_T = probabilities_TE @ share_E
    if valid_T is None:
        total, tokens = per_token_T.sum(), per_token_T.shape[0]
        return scope.share_of(total, tokens) * load_E.shape[0]
    total = torch.where(valid_T, per_token_T, 0).sum()
    return scope.share_of(total, valid_T.sum()) * load_E.shape[0]


def total_of(counts: Tensor, tape: RoutingTape | None, mesh: Mesh) -> Tensor:
    """Counts of the global batch; without a tape, of this micro-batch over the ranks.

    A collective: every rank calls it.
    """
    counts = counts.float()
    if tape is not None:
        return tape.total(counts)

    def summed() -> Tensor:
        if mesh.token_group is not None:
            torch.distributed.all_reduce(counts, group=mesh.token_group)
        return counts

    return decide(summed)


class ExpertBias(ExactBuffers):
    """A bias per expert that only the choice sees, moved against the load error once a step.

    `bias += rate * sign(mean load - load)`, with the load of the whole global batch, so every rank
    moves alike. Both buffers belong to a checkpoint: a run resumes with the load that it had
    counted.

    Args:
        num_experts: E.
        rate: γ, the paper's 0.001.

    Source: auxiliary-loss-free load balancing, arXiv 2408.15664, algorithm 1.
    """

    # Steps are smaller than the ulp of a bfloat16 bias.
    exact_buffers = ("bias", "load")
    bias: Tensor
    load: Tensor

    def __init__(self, num_experts: int, *, rate: float = 0.001) -> None:
        super().__init__()
        if not rate > 0:
            raise ValueError(f"bias rate={rate}: must be positive")
        self.rate = rate
        self.register_buffer("bias", torch.zeros(num_experts))
        self.register_buffer("load", torch.zeros(num_experts))

    @torch.no_grad()
    def count(self, load_E: Tensor) -> None:
        """Add a micro-batch's share of what the global batch sent to each expert."""
        self.load += load_E.to(self.load.dtype)

    @torch.no_grad()
    def update(self) -> None:
        """Move the bias by the load counted since the last update. Nothing counted: no move."""
        self.bias += self.rate * torch.sign(self.load.mean() - self.load)
        self.load.zero_()


def biased(scores_TE: Tensor, bias: ExpertBias | None) -> Tensor:
    """[T, E]: what experts are chosen by."""
    return scores_TE if bias is None else scores_TE + bias.bias
