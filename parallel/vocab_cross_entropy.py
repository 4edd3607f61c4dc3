"""Cross-entropy of logits that are split over the vocabulary, a few rows at a time.

Each rank sends three numbers a token: the largest of its logits, the sum of exponentials over it,
and the target's logit if that is its own. Megatron's keeps a softmax in 32 bits; here the gradient
may take the place of the logits.

Shape legend: T tokens, V vocabulary, v = V / n columns of this tensor rank, n tensor ranks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from parallel.mesh import Mesh
from parallel.rows import all_gather_rows


def vocab_cross_entropy(
    logits_Tv: Tensor, targets_T: Tensor, mesh: Mesh, *, overwrite: bool = False
) -> Tensor:
    """Cross-entropy of every token, nats, of logits that `column_linear` left split.

    Args:
        logits_Tv: this rank's columns, in rank order. Any may be -inf, but not all of a row's.
        targets_T: int64, in [0, V). Where they are split, the loss of any other is infinite.
        mesh: whose tensor ranks share the vocabulary; a collective over them.
        overwrite: the gradient may take the place of the logits in memory. Use them for nothing
            else then; a second backward through them raises.

    Returns:
        float32 [T] (float64 for float64 logits), the same on every tensor rank.
    """
    if mesh.tensor_group is None:
        dtype = torch.promote_types(logits_Tv.dtype, torch.float32)
        return F.cross_entropy(logits_Tv.to(dtype), targets_T, reduction="none")
    # A leaf is somebody's; writing into an expanded tensor would write several rows at once.
    overwrite = overwrite and not logits_Tv.is_leaf and logits_Tv.is_contiguous()
    return _Split.apply(logits_Tv, targets_T, mesh, overwrite)


def cached_rows(logits_TV: Tensor) -> list[slice]:
    """Rows whose softmax in 32 bits stays in a cache: 1 MiB of a CPU's, 32 MiB of a GPU's.

    Of 256 KiB, 1 MiB and 4 MiB the second was fastest on a CPU (V 8,192 to 128,000, two threads).
    """
    tokens, vocabulary = logits_TV.shape
    elements = 1 << (23 if logits_TV.is_cuda else 18)
    step = max(1, elements // max(1, vocabulary))
    return [slice(start, start + step) for start in range(0, tokens, step)]


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_Tv: Tensor, targets_T: Tensor, mesh: Mesh, overwrite: bool
    ) -> Tensor:
        assert mesh.tensor_group is not None
        (tokens, width), dtype = logits_Tv.shape, logits_Tv.dtype
        column_T = targets_T - mesh.tensor_rank * width
        own_T = (column_T >= 0) & (column_T < width)
        column_T1 = column_T.clamp(0, width - 1)[:, None]
        known = logits_Tv.new_empty(1, 3, tokens, dtype=torch.promote_types(dtype, torch.float32))
        largest_T, sum_T, target_T = known[0]
        for rows in cached_rows(logits_Tv):
            largest_T[rows] = logits_Tv[rows].amax(-1)
            # The largest probability among own columns is exp(0) over their sum.
            sum_T[rows] = torch.softmax(logits_Tv[rows], -1, dtype=known.dtype).amax(-1)
        sum_T.reciprocal_()
        # Of ranks without the target's logit -inf, so that the largest is the target's.
        target_T.copy_(logits_Tv.gather(1, column_T1).squeeze(1)).masked_fill_(~own_T, -torch.inf)
        of_ranks = all_gather_rows(known, mesh.tensor_group, (1,) * mesh.tensor)
        highest_T = of_ranks[:, 0].amax(0)
        sums = of_ranks[:, 1] * (of_ranks[:, 0] - highest_T).exp()
        losses_T = sums.sum(0).log() - (of_ranks[:, 2].amax(0) - highest_T)
        # Of all probability, what lies in own columns.
        share_T = sums[mesh.tensor_rank] / sums.sum(0)
        ctx.save_for_backward(logits_Tv, column_T1, own_T, share_T, losses_T)
        ctx.overwrite = overwrite
        return losses_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor, None, None, None]:
        logits_Tv, column_T1, own_T, share_T, losses_T = ctx.saved_tensors
        scale_T = share_T * grad_T
        # The target's probability less one, without cancelling.
        target_T = torch.expm1(-losses_T) * grad_T
        grad_Tv = logits_Tv if ctx.overwrite else torch.empty_like(logits_Tv)
        for rows in cached_rows(logits_Tv):
            part = torch.softmax(logits_Tv[rows], -1, dtype=scale_T.dtype).mul_(scale_T[rows, None])
            found = part.gather(1, column_T1[rows])
            found = torch.where(own_T[rows, None], target_T[rows, None], found)
            grad_Tv[rows] = part.scatter_(1, column_T1[rows], found)
        return grad_Tv, None, None, None
