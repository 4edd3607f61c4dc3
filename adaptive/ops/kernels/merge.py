"""group_sum: the weighted sum of every group's rows, gathered in a fixed order, no atomics.

Shape legend: T tokens, G groups, D width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from adaptive.ops.kernels.launching import cdiv, contiguous_rows, on_device

# mypy: disable-error-code="no-untyped-def"

_COLUMNS = 256


@triton.jit(do_not_specialize=["width", "rows_stride"])
def _group_sum(
    rows_in,
    shares,
    order,
    starts,
    out,
    width,
    rows_stride,
    WEIGHTED: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    g = tl.program_id(0)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.load(starts + g)
    last = tl.load(starts + g + 1)
    total = tl.zeros((COLUMNS,), tl.float32)
    for place in range(first, last):
        token = tl.load(order + place)
        x = tl.load(rows_in + token * rows_stride + c, mask=c < width, other=0).to(tl.float32)
        if WEIGHTED:
            x *= tl.load(shares + token).to(tl.float32)
        total += x
    tl.store(out + g.to(tl.int64) * width + c, total, mask=c < width)


@torch.library.custom_op("adaptive::group_sum", mutates_args=())
def group_sum(rows_TD: Tensor, share_T: Tensor | None, order_T: Tensor, starts_G: Tensor) -> Tensor:
    """`out[g] = Σ share[i] * rows[i]` over i = order[starts[g] : starts[g + 1]], in float32."""
    rows_TD = contiguous_rows(rows_TD)
    groups, width = starts_G.shape[0] - 1, rows_TD.shape[1]
    out = rows_TD.new_empty(groups, width)
    if out.numel():
        columns = min(_COLUMNS, triton.next_power_of_2(width))
        with on_device(out):
            _group_sum[(groups, cdiv(width, columns))](
                rows_TD,
                None if share_T is None else share_T.contiguous(),
                order_T,
                starts_G,
                out,
                width,
                rows_TD.stride(0),
                WEIGHTED=share_T is not None,
                COLUMNS=columns,
            )
    return out


@group_sum.register_fake
def _(rows_TD: Tensor, share_T: Tensor | None, order_T: Tensor, starts_G: Tensor) -> Tensor:
    return rows_TD.new_empty(starts_G.shape[0] - 1, rows_TD.shape[1])
