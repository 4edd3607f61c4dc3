"""permute and unpermute: tokens to the order of experts, and expert outputs back to tokens.

Shape legend: T tokens, K choices a token, N taken pairs, D width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from adaptive.ops.backend import choose, refuses_triton, register


def permute(x_TD: Tensor, pairs_N: Tensor, top_k: int) -> Tensor:
    """Copy each taken pair's token into the pair's place: `out[n] = x[pairs[n] // top_k]`.

    Args:
        x_TD: [T, D], any float dtype.
        pairs_N: int64 [N], distinct pairs `token * top_k + choice`. N may be 0.
        top_k: K.

    Returns:
        [N, D]. A token's gradient is the sum over its taken pairs, zero if it has none.
    """
    return choose("permute", x_TD).function(x_TD, pairs_N, top_k)


def unpermute(
    y_ND: Tensor, pairs_N: Tensor, weights_TK: Tensor | None, shape: tuple[int, int]
) -> Tensor:
    """Sum every token's taken pairs: `out[t] = Σ weights[t, k] * y[n]` over pairs n = (t, k).

    Args:
        y_ND: [N, D], a row for each taken pair.
        pairs_N: int64 [N], as in `permute`.
        weights_TK: [T, K] or None (ones); the gradient of a pair is `<grad_out[t], y[n]>`, and 0
            where the pair is not taken.
        shape: (T, K).

    Returns:
        [T, D] in the dtype of `y`; zeros where a token has no taken pair.
    """
    return choose("unpermute", y_ND).function(y_ND, pairs_N, weights_TK, shape)


def sum_pairs(
    y_ND: Tensor, pairs_N: Tensor, weights_TK: Tensor | None, shape: tuple[int, int]
) -> Tensor:
    """`unpermute` without a gradient: what autograd functions call."""
    return choose("sum_pairs", y_ND).function(y_ND, pairs_N, weights_TK, shape)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, pairs_N: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(pairs_N)
        ctx.shape = (x_TD.shape[0], top_k)
        return x_TD.index_select(0, pairs_N // top_k)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None, None]:
        (pairs_N,) = ctx.saved_tensors
        return sum_pairs(grad_ND.contiguous(), pairs_N, None, ctx.shape), None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y_ND: Tensor, pairs_N: Tensor, weights_TK: Tensor | None, shape: tuple[int, int]
    ) -> Tensor:
        ctx.save_for_backward(y_ND, pairs_N, weights_TK)
        ctx.top_k = shape[1]
        return sum_pairs(y_ND, pairs_N, weights_TK, shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None, Tensor | None, None]:
        y_ND, pairs_N, weights_TK = ctx.saved_tensors
        grad_ND = grad_TD.index_select(0, pairs_N // ctx.top_k)
        if weights_TK is None:
            return grad_ND, None, None, None
        wide = torch.promote_types(y_ND.dtype, torch.float32)
        grad_weights = torch.zeros_like(weights_TK)
        per_pair_N = (grad_ND.to(wide) * y_ND).sum(-1)
        grad_weights.view(-1)[pairs_N] = per_pair_N.to(weights_TK.dtype)
        return grad_ND * pair_weights(weights_TK, pairs_N, grad_ND), None, grad_weights, None


def pair_weights(weights_TK: Tensor, pairs_N: Tensor, like: Tensor) -> Tensor:
    """[N, 1]: the weight of each taken pair, in the dtype of `like`."""
    return weights_TK.flatten().index_select(0, pairs_N).to(like.dtype)[:, None]


def _sum_by_index_add(
    y_ND: Tensor, pairs_N: Tensor, weights_TK: Tensor | None, shape: tuple[int, int]
) -> Tensor:
    if weights_TK is not None:
        y_ND = y_ND * pair_weights(weights_TK, pairs_N, y_ND)
    out_TD = y_ND.new_zeros(shape[0], y_ND.shape[1])
    return out_TD.index_add_(0, pairs_N // shape[1], y_ND)


def _sum_by_gather(
    y_ND: Tensor, pairs_N: Tensor, weights_TK: Tensor | None, shape: tuple[int, int]
) -> Tensor:
    """Every token fetches its rows: deterministic, nothing is added twice through memory."""
    tokens, top_k = shape
    taken = pairs_N.shape[0]
    if taken == 0:
        return y_ND.new_zeros(tokens, y_ND.shape[1])
    rows = torch.arange(taken, device=y_ND.device)
    weights = None if weights_TK is None else weights_TK.to(y_ND.dtype)
    if taken == tokens * top_k:
        place_TK = torch.empty_like(pairs_N).index_copy_(0, pairs_N, rows).view(tokens, top_k)
        return F.embedding_bag(place_TK, y_ND, mode="sum", per_sample_weights=weights)
    # Some pairs are not taken: bags of different sizes, token after token.
    in_order, place_N = pairs_N.sort()
    starts_T = torch.searchsorted(
        in_order, torch.arange(0, tokens * top_k, top_k, device=y_ND.device)
    )
    if weights is not None:
        weights = weights.flatten().index_select(0, in_order)
    return F.embedding_bag(place_N, y_ND, starts_T, mode="sum", per_sample_weights=weights)


def _refuses_gather(y_ND: Tensor) -> str | None:
    if y_ND.dtype == torch.float64 and y_ND.device.type != "cpu":
        return "embedding_bag in float64 is checked on a CPU only"
    return None


def _permute_kernel(x_TD: Tensor, pairs_N: Tensor, top_k: int) -> Tensor:
    from adaptive.ops.kernels.permute import permute as kernel

    return kernel(x_TD, pairs_N, top_k)


def _unpermute_kernel(
    y_ND: Tensor, pairs_N: Tensor, weights_TK: Tensor | None, shape: tuple[int, int]
) -> Tensor:
    from adaptive.ops.kernels.permute import unpermute as kernel

    return kernel(y_ND, pairs_N, weights_TK, shape)


def _sum_kernel(
    y_ND: Tensor, pairs_N: Tensor, weights_TK: Tensor | None, shape: tuple[int, int]
) -> Tensor:
    from adaptive.ops.kernels.permute import sum_pairs as kernel

    return kernel(y_ND, pairs_N, weights_TK, shape)


register("permute", "reference", _Permute.apply)
register("permute", "triton", _permute_kernel, refuses_triton)
register("unpermute", "reference", _Unpermute.apply)
register("unpermute", "triton", _unpermute_kernel, refuses_triton)
register("sum_pairs", "reference", _sum_by_index_add)
register("sum_pairs", "torch", _sum_by_gather, _refuses_gather)
register("sum_pairs", "triton", _sum_kernel, refuses_triton)
