"""permute and unpermute: tokens to their experts' rows and back, summed over the top-k.

The scatter-add of K copies is a gather of each token's K rows, summed in float32 in a fixed
order: no atomics, so results repeat bit for bit.

Shape legend: T tokens, K top-k, N = T * K rows in expert order, D width.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from adaptive.ops.kernels.launching import cdiv, contiguous_rows, on_device, row_blocks
from adaptive.ops.kernels.pack import gather_rows, invert_index, weighted_rows_backward

# mypy: disable-error-code="no-untyped-def"


@triton.jit(do_not_specialize=["tokens"])
def _sum_places(
    rows_in,
    places,
    weights,
    out,
    tokens,
    width,
    rows_stride,
    TOP_K: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (t < tokens)[:, None] & (c < width)[None, :]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in tl.static_range(TOP_K):
        slot = t.to(tl.int64) * TOP_K + k
        row = tl.load(places + slot, mask=t < tokens, other=-1).to(tl.int64)
        x = tl.load(
            rows_in + row[:, None] * rows_stride + c[None, :],
            mask=inside & (row >= 0)[:, None],
            other=0,
        ).to(tl.float32)
        if WEIGHTED:
            x *= tl.load(weights + slot, mask=t < tokens, other=0).to(tl.float32)[:, None]
        total += x
    tl.store(out + t.to(tl.int64)[:, None] * width + c[None, :], total, mask=inside)


@torch.library.custom_op("adaptive::sum_places", mutates_args=())
def sum_places(rows_ND: Tensor, places_TK: Tensor, weights_TK: Tensor | None) -> Tensor:
    """`out[t] = sum_k w[t, k] * rows[places[t, k]]`, accumulated in float32; place -1 adds 0."""
    rows_ND = contiguous_rows(rows_ND)
    (tokens, top_k), width = places_TK.shape, rows_ND.shape[1]
    out = rows_ND.new_empty(tokens, width)
    if out.numel():
        block, columns = row_blocks(tokens, width)
        with on_device(out):
            _sum_places[(cdiv(tokens, block), cdiv(width, columns))](
                rows_ND,
                places_TK.contiguous(),
                None if weights_TK is None else weights_TK.contiguous(),
                out,
                tokens,
                width,
                rows_ND.stride(0),
                TOP_K=top_k,
                WEIGHTED=weights_TK is not None,
                ROWS=block,
                COLUMNS=columns,
            )
    return out


@sum_places.register_fake
def _(rows_ND: Tensor, places_TK: Tensor, weights_TK: Tensor | None) -> Tensor:
    return rows_ND.new_empty(places_TK.shape[0], rows_ND.shape[1])


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, pairs_N: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(pairs_N)
        ctx.shape = (x_TD.shape[0], top_k)
        return gather_rows(x_TD, pairs_N, top_k)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None, None]:
        (pairs_N,) = ctx.saved_tensors
        return sum_pairs(grad_ND, pairs_N, None, ctx.shape), None, None


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
        flat = None if weights_TK is None else weights_TK.reshape(-1)
        grad_ND, grad_flat = weighted_rows_backward(grad_TD, pairs_N, y_ND, flat, ctx.top_k)
        if weights_TK is None:
            return grad_ND, None, None, None
        return grad_ND, None, grad_flat.view_as(weights_TK).to(weights_TK.dtype), None


def sum_pairs(
    y_ND: Tensor, pairs_N: Tensor, weights_TK: Tensor | None, shape: tuple[int, int]
) -> Tensor:
    """`adaptive.ops.permute.sum_pairs`: no gradient."""
    tokens, top_k = shape
    places_TK = invert_index(pairs_N, tokens * top_k).view(tokens, top_k)
    return sum_places(y_ND, places_TK, weights_TK)


def permute(x_TD: Tensor, pairs_N: Tensor, top_k: int) -> Tensor:
    """`adaptive.ops.permute.permute`."""
    return _Permute.apply(x_TD, pairs_N, top_k)


def unpermute(
    y_ND: Tensor, pairs_N: Tensor, weights_TK: Tensor | None, shape: tuple[int, int]
) -> Tensor:
    """`adaptive.ops.permute.unpermute`."""
    return _Unpermute.apply(y_ND, pairs_N, weights_TK, shape)
