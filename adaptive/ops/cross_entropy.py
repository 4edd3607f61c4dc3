"""cross_entropy: the loss of every token over a large vocabulary.

Shape legend: T tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from adaptive.ops.backend import choose, register
from parallel.linear import plain_eager
from parallel.vocab_cross_entropy import cached_rows


def cross_entropy(logits_TV: Tensor, targets_T: Tensor, *, overwrite: bool = False) -> Tensor:
    """Cross-entropy of every token, nats.

    Args:
        logits_TV: float [T, V].
        targets_T: int64 [T], in [0, V).
        overwrite: their gradient may take the place of the logits in memory, as soon as the loss
            is computed. Use the logits for nothing else then; a second backward through them
            raises.

    Returns:
        float32 [T] (float64 for float64 logits), whatever the dtype of the logits.
    """
    return choose("cross_entropy", logits_TV).function(logits_TV, targets_T, overwrite)


def _reference(logits_TV: Tensor, targets_T: Tensor, overwrite: bool) -> Tensor:
    dtype = torch.promote_types(logits_TV.dtype, torch.float32)
    return F.cross_entropy(logits_TV.to(dtype), targets_T, reduction="none")


class _InBlocks(torch.autograd.Function):
    """Softmax a few rows at a time, twice: beyond the logits and their gradient no [T, V] exists.

    torch's own keeps the log-softmax and, of 16-bit logits, copies in 32 bits.
    """

    @staticmethod
    def forward(ctx: Any, logits_TV: Tensor, targets_T: Tensor, overwrite: bool) -> Tensor:
        losses_T = torch.empty_like(targets_T, dtype=torch.float32)
        for rows in cached_rows(logits_TV):
            log_softmax = torch.log_softmax(logits_TV[rows], -1, dtype=torch.float32)
            losses_T[rows] = -log_softmax.gather(1, targets_T[rows, None]).squeeze(1)
        ctx.save_for_backward(logits_TV, targets_T, losses_T)
        ctx.overwrite = overwrite
        return losses_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor, None, None]:
        logits_TV, targets_T, losses_T = ctx.saved_tensors
        grad_TV = logits_TV if ctx.overwrite else torch.empty_like(logits_TV)
        for rows in cached_rows(logits_TV):
            softmax = torch.softmax(logits_TV[rows], -1, dtype=torch.float32)
            softmax.scatter_(1, targets_T[rows, None], torch.expm1(-losses_T[rows, None]))
            grad_TV[rows] = softmax.mul_(grad_T[rows, None])
        return grad_TV, None, None


def _in_blocks(logits_TV: Tensor, targets_T: Tensor, overwrite: bool) -> Tensor:
    # A leaf is somebody's; writing into an expanded tensor would write several rows at once.
    overwrite = overwrite and not logits_TV.is_leaf and logits_TV.is_contiguous()
    return _InBlocks.apply(logits_TV, targets_T, overwrite)


def _refuses_blocks(logits_TV: Tensor) -> str | None:
    if logits_TV.dtype == torch.float64:
        return "computes in float32"
    return None


def _refuses_call(_: Tensor) -> str | None:
    return None if plain_eager() else "compiled, transformed or autocast"


register("cross_entropy", "reference", _reference)
register("cross_entropy", "torch", _in_blocks, _refuses_blocks, _refuses_call)
