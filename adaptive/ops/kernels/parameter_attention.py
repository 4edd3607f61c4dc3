"""Parameter attention that never holds a [tokens, parameter tokens] matrix.

`Θ(x Kᵀ) V` in chunks of tokens: the scores of one chunk fit the second-level cache, both products
run at the matrix library's speed, and one pass each makes a row's sum and its weights, in place.
The backward computes the scores again. A kernel that also fused the products would hold [rows,
out] sums in registers: beyond a width of 256 it must compute the scores once for every 256 output
columns, which costs more than a chunk's trip through the cache (docs/kernels.md).

Shape legend: T tokens, D input width, N parameter tokens of this rank, O output width, R rows of
one chunk.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from adaptive.ops.kernels.launching import (
    cdiv,
    device_function,
    on_device,
    row_blocks,
)
from parallel.autocast import computing_dtype

# mypy: disable-error-code="no-untyped-def"

CHUNK_BYTES = 32 << 20
"""Scores of one chunk. The backward holds two of these."""

NORM_FIRST = {"l2_norm_gelu": True, "gelu_l2_norm": False}


@device_function
def _gelu(z):
    return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))


@device_function
def _gelu_slope(z):
    density = tl.exp(-0.5 * z * z) * 0.3989422804014327
    return 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * density


@device_function
def _over_norm(squares, scale):
    # A row of zeros has no direction: its weights and gradients are zero. The bound is the smallest
    # normal float32; Triton takes a smaller number for a float64.
    return tl.where(squares > 1.2e-38, scale / tl.sqrt(tl.maximum(squares, 1.2e-38)), 0.0)


@triton.jit(do_not_specialize=["rows"])
def _squares(
    scores,
    squares,
    rows,
    width,
    NORM_FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    scores += r.to(tl.int64)[:, None] * width
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, width, COLUMNS):
        n = start + tl.arange(0, COLUMNS)[None, :]
        inside = (r < rows)[:, None] & (n < width)
        a = tl.load(scores + n, mask=inside, other=0).to(tl.float32)
        if not NORM_FIRST:
            a = _gelu(a)
        total += a * a
    tl.store(squares + r, tl.sum(total, 1), mask=r < rows)


@triton.jit(do_not_specialize=["rows"])
def _weights(
    scores,
    squares,
    scale,
    rows,
    width,
    NORM_FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (r < rows)[:, None] & (n < width)
    ratio = _over_norm(tl.load(squares + r, mask=r < rows, other=0), tl.load(scale))[:, None]
    at = scores + r.to(tl.int64)[:, None] * width + n
    a = tl.load(at, mask=inside, other=0).to(tl.float32)
    w = _gelu(a * ratio) if NORM_FIRST else _gelu(a) * ratio
    tl.store(at, w, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _shares(
    scores,
    grad,
    squares,
    scale,
    shares,
    rows,
    width,
    NORM_FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """<z, dz> of a row (norm first), or <w, dw>."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    ratio = _over_norm(tl.load(squares + r, mask=r < rows, other=0), tl.load(scale))[:, None]
    row = r.to(tl.int64)[:, None] * width
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, width, COLUMNS):
        n = start + tl.arange(0, COLUMNS)[None, :]
        inside = (r < rows)[:, None] & (n < width)
        a = tl.load(scores + row + n, mask=inside, other=0).to(tl.float32)
        g = tl.load(grad + row + n, mask=inside, other=0).to(tl.float32)
        if NORM_FIRST:
            z = a * ratio
            total += z * _gelu_slope(z) * g
        else:
            total += _gelu(a) * ratio * g
    tl.store(shares + r, tl.sum(total, 1), mask=r < rows)


@triton.jit(do_not_specialize=["rows"])
def _backward(
    scores,
    grad,
    squares,
    scale,
    shares,
    rows,
    width,
    NORM_FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Scores become weights, gradients of weights become gradients of scores."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (r < rows)[:, None] & (n < width)
    c = tl.load(scale)
    ratio = _over_norm(tl.load(squares + r, mask=r < rows, other=0), c)[:, None]
    share = (tl.load(shares + r, mask=r < rows, other=0) / (c * c))[:, None]
    at = r.to(tl.int64)[:, None] * width + n
    a = tl.load(scores + at, mask=inside, other=0).to(tl.float32)
    g = tl.load(grad + at, mask=inside, other=0).to(tl.float32)
    if NORM_FIRST:
        z = a * ratio
        w = _gelu(z)
        g = ratio * (_gelu_slope(z) * g - z * share)
    else:
        w = _gelu(a) * ratio
        g = ratio * (g - w * share) * _gelu_slope(a)
    tl.store(scores + at, w, mask=inside)
    tl.store(grad + at, g, mask=inside)


@torch.library.custom_op("adaptive::parameter_squares", mutates_args=())
def row_squares(scores_RN: Tensor, norm_first: bool) -> Tensor:
    """float32 [R]: the sum of squares of each row of what is normalised."""
    rows, width = scores_RN.shape
    squares_R = scores_RN.new_empty(rows, dtype=torch.float32)
    if rows:
        block, columns = row_blocks(rows, width, 2048)
        with on_device(scores_RN):
            _squares[(cdiv(rows, block),)](
                scores_RN, squares_R, rows, width, norm_first, block, columns
            )
    return squares_R


@row_squares.register_fake
def _(scores_RN: Tensor, norm_first: bool) -> Tensor:
    return scores_RN.new_empty(scores_RN.shape[0], dtype=torch.float32)


@torch.library.custom_op("adaptive::parameter_weights_", mutates_args={"scores_RN"})
def weights_(scores_RN: Tensor, squares_R: Tensor, scale: Tensor, norm_first: bool) -> None:
    """Scores become weights."""
    rows, width = scores_RN.shape
    if scores_RN.numel():
        block, columns = row_blocks(rows, width, 2048)
        with on_device(scores_RN):
            _weights[(cdiv(rows, block), cdiv(width, columns))](
                scores_RN, squares_R, scale, rows, width, norm_first, block, columns
            )


@weights_.register_fake
def _(scores_RN: Tensor, squares_R: Tensor, scale: Tensor, norm_first: bool) -> None:
    return None


@torch.library.custom_op("adaptive::parameter_shares", mutates_args=())
def row_shares(
    scores_RN: Tensor, grad_RN: Tensor, squares_R: Tensor, scale: Tensor, norm_first: bool
) -> Tensor:
    """float32 [R]: the part of a row's gradient that lies along the row itself."""
    rows, width = scores_RN.shape
    shares_R = scores_RN.new_empty(rows, dtype=torch.float32)
    if rows:
        block, columns = row_blocks(rows, width, 2048)
        with on_device(scores_RN):
            _shares[(cdiv(rows, block),)](
                scores_RN, grad_RN, squares_R, scale, shares_R, rows, width, norm_first, block,
                columns,
            )  # fmt: skip
    return shares_R


@row_shares.register_fake
def _(
    scores_RN: Tensor, grad_RN: Tensor, squares_R: Tensor, scale: Tensor, norm_first: bool
) -> Tensor:
    return scores_RN.new_empty(scores_RN.shape[0], dtype=torch.float32)


@torch.library.custom_op("adaptive::parameter_backward_", mutates_args={"scores_RN", "grad_RN"})
def backward_(
    scores_RN: Tensor,
    grad_RN: Tensor,
    squares_R: Tensor,
    scale: Tensor,
    shares_R: Tensor,
    norm_first: bool,
) -> None:
    """Scores become weights, gradients of weights become gradients of scores."""
    rows, width = scores_RN.shape
    if scores_RN.numel():
        block, columns = row_blocks(rows, width, 2048)
        with on_device(scores_RN):
            _backward[(cdiv(rows, block), cdiv(width, columns))](
                scores_RN, grad_RN, squares_R, scale, shares_R, rows, width, norm_first, block,
                columns,
            )  # fmt: skip


@backward_.register_fake
def _(
    scores_RN: Tensor,
    grad_RN: Tensor,
    squares_R: Tensor,
    scale: Tensor,
    shares_R: Tensor,
    norm_first: bool,
) -> None:
    return None


class _ParameterAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        keys_ND: Tensor,
        values_NO: Tensor,
        scale: Tensor,
        norm_first: bool,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        tokens, rows = x_TD.shape[0], chunk_rows(x_TD, keys_ND)
        out_TO = x_TD.new_empty(tokens, values_NO.shape[1])
        squares_T = x_TD.new_empty(tokens, dtype=torch.float32)
        buffer = x_TD.new_empty(min(rows, tokens), keys_ND.shape[0])
        for start in range(0, tokens, rows):
            end = min(start + rows, tokens)
            scores_RN = torch.mm(x_TD[start:end], keys_ND.t(), out=buffer[: end - start])
            squares_R = _sum_over(row_squares(scores_RN, norm_first), group)
            squares_T[start:end] = squares_R
            weights_(scores_RN, squares_R, scale, norm_first)
            torch.mm(scores_RN, values_NO, out=out_TO[start:end])
        ctx.save_for_backward(x_TD, keys_ND, values_NO, scale, squares_T)
        ctx.norm_first, ctx.group, ctx.rows = norm_first, group, rows
        return out_TO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, keys_ND, values_NO, scale, squares_T = ctx.saved_tensors
        norm_first, rows, tokens = ctx.norm_first, ctx.rows, x_TD.shape[0]
        grad_TO = grad_TO.contiguous()
        grad_x_TD = torch.empty_like(x_TD)
        # Summed over chunks in float32: a low-precision sum would round once a chunk.
        grad_keys_ND = torch.zeros_like(keys_ND, dtype=torch.float32)
        grad_values_NO = torch.zeros_like(values_NO, dtype=torch.float32)
        buffers = x_TD.new_empty(2, min(rows, tokens), keys_ND.shape[0])
        for start in range(0, tokens, rows):
            end = min(start + rows, tokens)
            scores_RN = torch.mm(x_TD[start:end], keys_ND.t(), out=buffers[0, : end - start])
            grad_RN = torch.mm(grad_TO[start:end], values_NO.t(), out=buffers[1, : end - start])
            squares_R = squares_T[start:end]
            shares_R = row_shares(scores_RN, grad_RN, squares_R, scale, norm_first)
            shares_R = _sum_over(shares_R, ctx.group)
            backward_(scores_RN, grad_RN, squares_R, scale, shares_R, norm_first)
            grad_values_NO += scores_RN.t() @ grad_TO[start:end]
            grad_keys_ND += grad_RN.t() @ x_TD[start:end]
            torch.mm(grad_RN, keys_ND, out=grad_x_TD[start:end])
        grads = (grad_x_TD, grad_keys_ND.to(keys_ND.dtype), grad_values_NO.to(values_NO.dtype))
        return *grads, None, None, None


def chunk_rows(x_TD: Tensor, keys_ND: Tensor) -> int:
    """Tokens of one chunk: a multiple of 128 whose scores take CHUNK_BYTES or little more."""
    row = max(1, keys_ND.shape[0] * x_TD.element_size())
    return max(1, CHUNK_BYTES // row // 128) * 128


def _sum_over(rows_R: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The sum over the tensor ranks, which hold other parameter tokens."""
    if group is not None and dist.get_world_size(group) > 1:
        dist.all_reduce(rows_R, group=group)
    return rows_R


def parameter_attention(
    x_TD: Tensor,
    keys_ND: Tensor,
    values_NO: Tensor,
    *,
    scale: Tensor | float,
    activation: str = "l2_norm_gelu",
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """`adaptive.ops.parameter_attention` for the activations with a norm, all parameter tokens.

    Args:
        x_TD: [T, D]; keys_ND: [N, D]; values_NO: [N, O].
        scale: number or 0-dimensional tensor, not differentiated.
        activation: "l2_norm_gelu" or "gelu_l2_norm".
        group: tensor ranks that hold the other parameter tokens.
    """
    dtype = computing_dtype(x_TD)
    x_TD, keys_ND, values_NO = (t.to(dtype) for t in (x_TD, keys_ND, values_NO))
    if isinstance(scale, Tensor):
        scale = scale.to(x_TD.device, torch.float32)
    else:
        # Not as_tensor: that would copy a number from the host, and wait.
        scale = torch.full((), scale, dtype=torch.float32, device=x_TD.device)
    return _ParameterAttention.apply(x_TD, keys_ND, values_NO, scale, NORM_FIRST[activation], group)
