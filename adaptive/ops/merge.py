"""merge and unmerge: the mean of every group's tokens, and groups back to their tokens.

Shape legend: T tokens, G groups, D width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from adaptive.ops.backend import choose, refuses_triton, register
from adaptive.routing.grouping import Grouping


def merge(x_TD: Tensor, size_T: Tensor | None, grouping: Grouping) -> Tensor:
    """The mean of each group's members, by size: `y_g = Σ s_i w_i x_i / Σ s_i w_i`, i in g.

    Args:
        x_TD: [T, D], any float dtype; sums are taken in float32 (float64 for float64).
        size_T: float [T], how many original tokens each token stands for; None: 1. No gradient.
        grouping: who is in which group; its `weights` are w, 1 where None.

    Returns:
        [G, D] in the dtype of `x`. The gradient of a member is `s_i w_i / Σ s w · ∂y_g`, of a
        dropped token 0, of a weight `s_i <∂y_g, x_i - y_g> / Σ s w`.

    Raises:
        ValueError: if `x` or `size` are not of the grouping's T tokens.

    Source: ToMe, arXiv 2210.09461, section 3 ("tracking token size").
    """
    for name, given in (("x", x_TD), ("size", size_T)):
        if given is not None and given.shape[0] != grouping.tokens:
            raise ValueError(f"{name} of {given.shape[0]} tokens: must be of {grouping.tokens}")
    if grouping.groups == 0:
        return x_TD[:0]
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    share_T = None if size_T is None else size_T.detach().to(wide)
    if grouping.weights is not None:
        weights_T = grouping.weights.to(wide)
        share_T = weights_T if share_T is None else share_T * weights_T
    if share_T is None:
        share_T = torch.ones(grouping.tokens, dtype=wide, device=x_TD.device)
    group_T, members = grouping.group.clamp(min=0), grouping.members
    if not grouping.complete:
        share_T = share_T * (grouping.group >= 0)
    total_G = group_sum(share_T[:, None], None, group_T, members).squeeze(1)
    # A group whose members all weigh 0 would divide by it: it is 0, without a gradient.
    total_G = torch.where(total_G == 0, 1, total_G)
    return group_sum(x_TD, share_T / total_G.index_select(0, group_T), group_T, members)


def unmerge(y_GD: Tensor, grouping: Grouping) -> Tensor:
    """Every token its group's row: `x_i = y_group(i)`; zeros for dropped tokens.

    Args:
        y_GD: [G, D], any float dtype.

    Returns:
        [T, D]. The gradient of a group is the sum over its members.

    Source: ToMeSD, arXiv 2303.17604, section 3.
    """
    if y_GD.shape[0] != grouping.groups:
        raise ValueError(f"y of {y_GD.shape[0]} groups: must be of {grouping.groups}")
    x_TD = _Unmerge.apply(y_GD, grouping.group.clamp(min=0), *grouping.members)
    return x_TD if grouping.complete else x_TD * (grouping.group >= 0).to(x_TD.dtype)[:, None]


def group_sum(
    x_TD: Tensor, share_T: Tensor | None, group_T: Tensor, members: tuple[Tensor, Tensor]
) -> Tensor:
    """`y_g = Σ share_i x_i` over the members of g, added in their order: repeats bit for bit.

    Args:
        x_TD: [T, D]; float32 sums (float64 for float64).
        share_T: [T] or None (ones), differentiable; 0 for dropped tokens.
        group_T: int64 [T], any group for dropped tokens.
        members: `Grouping.members`.

    Returns:
        [G, D] in the dtype of `x`; zeros for a group without members.
    """
    return _GroupSum.apply(x_TD, share_T, group_T, *members)


class _GroupSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        share_T: Tensor | None,
        group_T: Tensor,
        order_T: Tensor,
        starts_G: Tensor,
    ) -> Tensor:
        weighted = share_T is not None and ctx.needs_input_grad[1]
        ctx.save_for_backward(x_TD if weighted else None, share_T, group_T)
        return choose("group_sum", x_TD).function(x_TD, share_T, order_T, starts_G)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_GD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, share_T, group_T = ctx.saved_tensors
        grad_TD = grad_GD.index_select(0, group_T)
        grad_share = None
        if ctx.needs_input_grad[1]:
            grad_share = (grad_TD.to(share_T.dtype) * x_TD).sum(-1)
        if share_T is not None and ctx.needs_input_grad[0]:
            grad_TD.mul_(share_T.to(grad_TD.dtype)[:, None])
        return grad_TD, grad_share, None, None, None


class _Unmerge(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y_GD: Tensor, group_T: Tensor, order_T: Tensor, starts_G: Tensor
    ) -> Tensor:
        ctx.save_for_backward(order_T, starts_G)
        return y_GD.index_select(0, group_T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None, None, None]:
        grad_GD = choose("group_sum", grad_TD).function(grad_TD, None, *ctx.saved_tensors)
        return grad_GD, None, None, None


def _sum_reference(
    x_TD: Tensor, share_T: Tensor | None, order_T: Tensor, starts_G: Tensor
) -> Tensor:
    """Bags of rows; the last one holds what is dropped, and is thrown away."""
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    weights = None if share_T is None else share_T.to(wide).index_select(0, order_T)
    if x_TD.shape[0] == 0:
        return x_TD.new_zeros(len(starts_G) - 1, x_TD.shape[1])
    rows_TD = x_TD.to(wide).contiguous()
    bags_GD = F.embedding_bag(order_T, rows_TD, starts_G, mode="sum", per_sample_weights=weights)
    return bags_GD[:-1].to(x_TD.dtype)


def _sum_kernel(x_TD: Tensor, share_T: Tensor | None, order_T: Tensor, starts_G: Tensor) -> Tensor:
    from adaptive.ops.kernels.merge import group_sum as kernel

    return kernel(x_TD, share_T, order_T, starts_G)


register("group_sum", "reference", _sum_reference)
register("group_sum", "triton", _sum_kernel, refuses_triton)
