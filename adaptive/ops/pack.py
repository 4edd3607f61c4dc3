"""pack and combine: take the chosen tokens out, add their update back.

Shape legend: T source tokens, R chosen tokens, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from adaptive.ops.backend import choose, refuses_triton, register


def pack(hidden_TD: Tensor, indices_R: Tensor) -> Tensor:
    """Gather rows: `hidden[indices]`.

    Args:
        hidden_TD: [tokens, width], any float dtype.
        indices_R: int64 [R], each row at most once. R may be 0.

    Returns:
        [R, width]. The gradient of a row that was not taken is zero.
    """
    return choose("pack", hidden_TD).function(hidden_TD, indices_R)


def combine(
    hidden_TD: Tensor, update_RD: Tensor, indices_R: Tensor, weights_R: Tensor | None = None
) -> Tensor:
    """Add weighted updates to the rows they belong to: `out[i] = hidden[i] + w * update`.

    Rows that are not in `indices` leave bit for bit as they came in.

    Args:
        hidden_TD: [tokens, width], the residual stream.
        update_RD: [R, width], the block's update without the residual.
        indices_R: int64 [R], each row at most once. R may be 0.
        weights_R: float [R] or None (ones); its gradient is `<grad_out[i], update>`.

    Returns:
        [tokens, width], a new tensor in the dtype of `hidden`.
    """
    return choose("combine", hidden_TD).function(hidden_TD, update_RD, indices_R, weights_R)


def combine_(
    hidden_TD: Tensor, update_RD: Tensor, indices_R: Tensor, weights_R: Tensor | None = None
) -> Tensor:
    """`combine` that writes into `hidden` and returns it: only the chosen rows move.

    Allowed where autograd allows it: `hidden` is no leaf that needs a gradient, and nothing else
    needs its old values for a backward (autograd raises an error if something does). A router or
    norm that read `hidden` keeps it, so this is for inference and for streams that nothing else
    reads.
    """
    return choose("combine_", hidden_TD).function(hidden_TD, update_RD, indices_R, weights_R)


class _Pack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, indices_R: Tensor) -> Tensor:
        ctx.save_for_backward(indices_R)
        ctx.tokens = hidden_TD.shape[0]
        return hidden_TD.index_select(0, indices_R)

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None]:
        (indices_R,) = ctx.saved_tensors
        return _Unpack.apply(grad_RD, indices_R, ctx.tokens), None


class _Unpack(torch.autograd.Function):
    """The transpose of pack: rows to their places, zero elsewhere."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, indices_R: Tensor, tokens: int) -> Tensor:
        ctx.save_for_backward(indices_R)
        out = rows_RD.new_zeros(tokens, *rows_RD.shape[1:])
        return out.index_copy_(0, indices_R, rows_RD)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None, None]:
        (indices_R,) = ctx.saved_tensors
        return _Pack.apply(grad_TD, indices_R), None, None


class _Combine(torch.autograd.Function):
    """Saves the update and the weights, never the residual stream."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        update_RD: Tensor,
        indices_R: Tensor,
        weights_R: Tensor | None,
        in_place: bool = False,
    ) -> Tensor:
        ctx.save_for_backward(update_RD, indices_R, weights_R)
        added = update_RD
        if weights_R is not None:
            added = update_RD * weights_R.to(update_RD.dtype)[:, None]
        rows = hidden_TD.index_select(0, indices_R) + added
        rows = rows.to(hidden_TD.dtype)
        if in_place:
            ctx.mark_dirty(hidden_TD)
            return hidden_TD.index_copy_(0, indices_R, rows)
        return hidden_TD.index_copy(0, indices_R, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        update_RD, indices_R, weights_R = ctx.saved_tensors
        grad_RD = grad_TD.index_select(0, indices_R).to(update_RD.dtype)
        if weights_R is None:
            return grad_TD, grad_RD, None, None, None
        grad_weights_R = grad_RD.float() if grad_RD.dtype != torch.float64 else grad_RD
        grad_weights_R = (grad_weights_R * update_RD).sum(-1).to(weights_R.dtype)
        grad_update_RD = grad_RD * weights_R.to(grad_RD.dtype)[:, None]
        return grad_TD, grad_update_RD, None, grad_weights_R, None


def _pack_kernel(hidden_TD: Tensor, indices_R: Tensor) -> Tensor:
    if hidden_TD.dim() != 2:
        # One number a token (router weights, token ids): torch's gather is as good.
        return _Pack.apply(hidden_TD, indices_R)
    from adaptive.ops.kernels.pack import pack as kernel

    return kernel(hidden_TD, indices_R)


def _combine_kernel(
    hidden_TD: Tensor, update_RD: Tensor, indices_R: Tensor, weights_R: Tensor | None
) -> Tensor:
    from adaptive.ops.kernels.pack import combine as kernel

    return kernel(hidden_TD, update_RD, indices_R, weights_R)


def _combine_in_place(
    hidden_TD: Tensor, update_RD: Tensor, indices_R: Tensor, weights_R: Tensor | None
) -> Tensor:
    return _Combine.apply(hidden_TD, update_RD, indices_R, weights_R, True)


def _combine_in_place_kernel(
    hidden_TD: Tensor, update_RD: Tensor, indices_R: Tensor, weights_R: Tensor | None
) -> Tensor:
    from adaptive.ops.kernels.pack import combine_ as kernel

    return kernel(hidden_TD, update_RD, indices_R, weights_R)


def _refuses_combine(hidden_TD: Tensor) -> str | None:
    if hidden_TD.dim() != 2:
        return f"{hidden_TD.dim()} dimensions: the kernel moves rows of [T, D]"
    return None


register("pack", "reference", _Pack.apply)
register("pack", "triton", _pack_kernel, refuses_triton)
register("combine", "reference", _Combine.apply)
register("combine", "triton", _combine_kernel, refuses_triton, _refuses_combine)
register("combine_", "reference", _combine_in_place)
register("combine_", "triton", _combine_in_place_kernel, refuses_triton, _refuses_combine)
