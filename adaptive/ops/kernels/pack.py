"""pack and combine: rows out of the residual stream and back.

Both are bandwidth-bound: a kernel reads and writes each row once. What scatters in the reference
is a gather here, through the inverse map (which output row comes from where), so that every
output element is written exactly once and no zero fill or copy precedes it.

Shape legend: T source tokens, R chosen rows, D width.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from adaptive.ops.kernels.launching import cdiv, contiguous_rows, on_device, row_blocks

# mypy: disable-error-code="no-untyped-def"


@triton.jit(do_not_specialize=["rows"])
def _invert(index, inverse, rows, BLOCK: tl.constexpr):
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    place = tl.load(index + r, mask=r < rows, other=0)
    tl.store(inverse + place, r, mask=r < rows)


@triton.jit(do_not_specialize=["rows"])
def _gather(
    source,
    index,
    out,
    rows,
    width,
    source_stride,
    TOP_K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (r < rows)[:, None] & (c < width)[None, :]
    place = tl.load(index + r, mask=r < rows, other=-1).to(tl.int64)
    x = tl.load(
        source + place[:, None] // TOP_K * source_stride + c[None, :],
        mask=inside & (place >= 0)[:, None],
        other=0,
    )
    tl.store(out + r.to(tl.int64)[:, None] * width + c[None, :], x, mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def _combine(
    hidden,
    update,
    inverse,
    weights,
    out,
    tokens,
    width,
    hidden_stride,
    update_stride,
    WEIGHTED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (t < tokens)[:, None] & (c < width)[None, :]
    row = tl.load(inverse + t, mask=t < tokens, other=-1).to(tl.int64)
    chosen = row >= 0
    x = tl.load(hidden + t.to(tl.int64)[:, None] * hidden_stride + c[None, :], mask=inside)
    added = tl.load(
        update + row[:, None] * update_stride + c[None, :],
        mask=inside & chosen[:, None],
        other=0,
    ).to(tl.float32)
    if WEIGHTED:
        added *= tl.load(weights + row, mask=chosen, other=0).to(tl.float32)[:, None]
    # A row that was not chosen keeps its bits, the sign of zero included.
    y = tl.where(chosen[:, None], (x.to(tl.float32) + added).to(x.dtype), x)
    tl.store(out + t.to(tl.int64)[:, None] * width + c[None, :], y, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _combine_in_place(
    hidden,
    update,
    index,
    weights,
    rows,
    width,
    hidden_stride,
    update_stride,
    WEIGHTED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (r < rows)[:, None] & (c < width)[None, :]
    place = tl.load(index + r, mask=r < rows, other=0).to(tl.int64)
    to = hidden + place[:, None] * hidden_stride + c[None, :]
    x = tl.load(to, mask=inside)
    added = tl.load(
        update + r.to(tl.int64)[:, None] * update_stride + c[None, :], mask=inside, other=0
    ).to(tl.float32)
    if WEIGHTED:
        added *= tl.load(weights + r, mask=r < rows, other=0).to(tl.float32)[:, None]
    tl.store(to, (x.to(tl.float32) + added).to(x.dtype), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _weighted_rows_backward(
    grad,
    index,
    rows_in,
    weights,
    grad_rows,
    grad_weights,
    rows,
    width,
    grad_stride,
    rows_stride,
    TOP_K: tl.constexpr,
    BY_PAIR: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    # Of `out[index[r] // TOP_K] += w * x[r]`: the gradients of x and of w in one pass. The weight
    # of row r is w[r], or w[index[r]] when BY_PAIR.
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    place = tl.load(index + r, mask=r < rows, other=0).to(tl.int64)
    row = r.to(tl.int64)
    weight_at = place if BY_PAIR else row
    scale = tl.full((ROWS,), 1.0, tl.float32)
    if WEIGHTED:
        scale = tl.load(weights + weight_at, mask=r < rows, other=0).to(tl.float32)
    dot = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, width, COLUMNS):
        c = start + tl.arange(0, COLUMNS)
        inside = (r < rows)[:, None] & (c < width)[None, :]
        from_grad = grad + place[:, None] // TOP_K * grad_stride + c[None, :]
        g = tl.load(from_grad, mask=inside, other=0).to(tl.float32)
        if WEIGHTED:
            x = tl.load(rows_in + row[:, None] * rows_stride + c[None, :], mask=inside, other=0)
            dot += g * x.to(tl.float32)
        tl.store(grad_rows + row[:, None] * width + c[None, :], g * scale[:, None], mask=inside)
    if WEIGHTED:
        tl.store(grad_weights + weight_at, tl.sum(dot, 1), mask=r < rows)


@torch.library.custom_op("adaptive::invert_index", mutates_args=())
def invert_index(index_R: Tensor, size: int) -> Tensor:
    """int32 [size]: the r with `index[r] == i`, or -1. Each i appears at most once."""
    inverse = torch.full((size,), -1, dtype=torch.int32, device=index_R.device)
    rows = index_R.shape[0]
    if rows:
        with on_device(index_R):
            _invert[(cdiv(rows, 1024),)](index_R.contiguous(), inverse, rows, BLOCK=1024)
    return inverse


@invert_index.register_fake
def _(index_R: Tensor, size: int) -> Tensor:
    return index_R.new_empty(size, dtype=torch.int32)


@torch.library.custom_op("adaptive::gather_rows", mutates_args=())
def gather_rows(source_TD: Tensor, index_R: Tensor, top_k: int = 1) -> Tensor:
    """`source[index // top_k]`, zeros where the index is -1."""
    source_TD = contiguous_rows(source_TD)
    rows, width = index_R.shape[0], source_TD.shape[1]
    out = source_TD.new_empty(rows, width)
    if out.numel():
        block, columns = row_blocks(rows, width)
        with on_device(out):
            _gather[(cdiv(rows, block), cdiv(width, columns))](
                source_TD,
                index_R.contiguous(),
                out,
                rows,
                width,
                source_TD.stride(0),
                TOP_K=top_k,
                ROWS=block,
                COLUMNS=columns,
            )
    return out


@gather_rows.register_fake
def _(source_TD: Tensor, index_R: Tensor, top_k: int = 1) -> Tensor:
    return source_TD.new_empty(index_R.shape[0], source_TD.shape[1])


@torch.library.custom_op("adaptive::combine_rows", mutates_args=())
def combine_rows(
    hidden_TD: Tensor, update_RD: Tensor, index_R: Tensor, weights_R: Tensor | None
) -> Tensor:
    """A new tensor: `hidden`, with `weights * update` added to the rows at `index`."""
    hidden_TD, update_RD = contiguous_rows(hidden_TD), contiguous_rows(update_RD)
    tokens, width = hidden_TD.shape
    out = hidden_TD.new_empty(tokens, width)
    if out.numel():
        inverse_T = invert_index(index_R, tokens)
        block, columns = row_blocks(tokens, width)
        with on_device(out):
            _combine[(cdiv(tokens, block), cdiv(width, columns))](
                hidden_TD,
                update_RD,
                inverse_T,
                None if weights_R is None else weights_R.contiguous(),
                out,
                tokens,
                width,
                hidden_TD.stride(0),
                update_RD.stride(0),
                WEIGHTED=weights_R is not None,
                ROWS=block,
                COLUMNS=columns,
            )
    return out


@combine_rows.register_fake
def _(hidden_TD: Tensor, update_RD: Tensor, index_R: Tensor, weights_R: Tensor | None) -> Tensor:
    return hidden_TD.new_empty(hidden_TD.shape)


@torch.library.custom_op("adaptive::combine_rows_", mutates_args={"hidden_TD"})
def combine_rows_(
    hidden_TD: Tensor, update_RD: Tensor, index_R: Tensor, weights_R: Tensor | None
) -> None:
    """Add `weights * update` to the rows of `hidden` at `index`."""
    if contiguous_rows(hidden_TD) is not hidden_TD:
        hidden_TD.copy_(combine_rows(hidden_TD, update_RD, index_R, weights_R))
        return
    update_RD = contiguous_rows(update_RD)
    rows, width = update_RD.shape
    if update_RD.numel():
        block, columns = row_blocks(rows, width)
        with on_device(hidden_TD):
            _combine_in_place[(cdiv(rows, block), cdiv(width, columns))](
                hidden_TD,
                update_RD,
                index_R.contiguous(),
                None if weights_R is None else weights_R.contiguous(),
                rows,
                width,
                hidden_TD.stride(0),
                update_RD.stride(0),
                WEIGHTED=weights_R is not None,
                ROWS=block,
                COLUMNS=columns,
            )


@combine_rows_.register_fake
def _(hidden_TD: Tensor, update_RD: Tensor, index_R: Tensor, weights_R: Tensor | None) -> None:
    return None


@torch.library.custom_op("adaptive::weighted_rows_backward", mutates_args=())
def weighted_rows_backward(
    grad_TD: Tensor, index_R: Tensor, rows_RD: Tensor, weights: Tensor | None, top_k: int
) -> tuple[Tensor, Tensor]:
    """Of `out[index[r] // top_k] += w[r] * rows[r]`: the gradients of rows and of weights.

    `top_k` 0 means 1 with weights by row; else weights are by pair, w[index[r]]. The gradient of
    weights is float32, flat, zero at pairs that no row has; empty without weights.
    """
    grad_TD, rows_RD = contiguous_rows(grad_TD), contiguous_rows(rows_RD)
    entries, width = rows_RD.shape
    grad_RD = torch.empty_like(rows_RD, memory_format=torch.contiguous_format)
    weights = None if weights is None else weights.contiguous()
    count = 0 if weights is None else weights.numel()
    grad_weights = grad_TD.new_zeros(count, dtype=torch.float32)
    if entries and width:
        block, columns = row_blocks(entries, width)
        with on_device(grad_TD):
            _weighted_rows_backward[(cdiv(entries, block),)](
                grad_TD,
                index_R.contiguous(),
                rows_RD,
                weights,
                grad_RD,
                grad_weights,
                entries,
                width,
                grad_TD.stride(0),
                rows_RD.stride(0),
                TOP_K=max(top_k, 1),
                BY_PAIR=top_k > 0,
                WEIGHTED=weights is not None,
                ROWS=block,
                COLUMNS=columns,
            )
    return grad_RD, grad_weights


@weighted_rows_backward.register_fake
def _(
    grad_TD: Tensor, index_R: Tensor, rows_RD: Tensor, weights: Tensor | None, top_k: int
) -> tuple[Tensor, Tensor]:
    count = 0 if weights is None else weights.numel()
    grad_RD = torch.empty_like(rows_RD, memory_format=torch.contiguous_format)
    return grad_RD, grad_TD.new_empty(count, dtype=torch.float32)


class _Pack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, indices_R: Tensor) -> Tensor:
        ctx.save_for_backward(indices_R)
        ctx.tokens = hidden_TD.shape[0]
        return gather_rows(hidden_TD, indices_R)

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None]:
        (indices_R,) = ctx.saved_tensors
        return _Unpack.apply(grad_RD, indices_R, ctx.tokens), None


class _Unpack(torch.autograd.Function):
    """The transpose of pack: a gather through the inverse map, zeros where there is none."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, indices_R: Tensor, tokens: int) -> Tensor:
        ctx.save_for_backward(indices_R)
        return gather_rows(rows_RD, invert_index(indices_R, tokens))

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
        in_place: bool,
    ) -> Tensor:
        ctx.save_for_backward(update_RD if weights_R is not None else None, indices_R, weights_R)
        ctx.update_dtype = update_RD.dtype
        if in_place:
            ctx.mark_dirty(hidden_TD)
            combine_rows_(hidden_TD, update_RD, indices_R, weights_R)
            return hidden_TD
        return combine_rows(hidden_TD, update_RD, indices_R, weights_R)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor, None, Tensor | None, None]:
        update_RD, indices_R, weights_R = ctx.saved_tensors
        if weights_R is None:
            rows_RD = gather_rows(grad_TD, indices_R).to(ctx.update_dtype)
            return grad_TD, rows_RD, None, None, None
        grad_RD, grad_weights_R = weighted_rows_backward(
            grad_TD, indices_R, update_RD, weights_R, 0
        )
        return grad_TD, grad_RD, None, grad_weights_R.to(weights_R.dtype), None


def pack(hidden_TD: Tensor, indices_R: Tensor) -> Tensor:
    """`adaptive.ops.pack.pack`."""
    return _Pack.apply(hidden_TD, indices_R)


def combine(
    hidden_TD: Tensor, update_RD: Tensor, indices_R: Tensor, weights_R: Tensor | None = None
) -> Tensor:
    """`adaptive.ops.pack.combine`."""
    return _Combine.apply(hidden_TD, update_RD, indices_R, weights_R, False)


def combine_(
    hidden_TD: Tensor, update_RD: Tensor, indices_R: Tensor, weights_R: Tensor | None = None
) -> Tensor:
    """`adaptive.ops.pack.combine_`: writes into `hidden` and returns it."""
    return _Combine.apply(hidden_TD, update_RD, indices_R, weights_R, True)
