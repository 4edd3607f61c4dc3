"""Who goes where: exact top-k of every row, and a stable counting sort by expert.

Neither returns anything whose shape depends on the numbers, so nothing waits for the host.

Shape legend: B rows, S columns, K kept a row, N entries, U units, P blocks of entries.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from adaptive.ops.kernels.launching import (
    INTERPRETED,
    cdiv,
    device_function,
    next_power_of_2,
    on_device,
)

# mypy: disable-error-code="no-untyped-def"

MOST_UNITS = 512
"""A tile of 32 entries by this many units is the largest that the counting sort holds."""

PROGRAMS = 2 if INTERPRETED else 128
"""About one a multiprocessor; with more rows than that, short ones share a program."""


@device_function
def _sortable(scores, at, mask):
    """uint32 that ascend with the scores: NaN highest, -0 like 0, what is masked lowest."""
    x = tl.load(scores + at, mask=mask, other=0).to(tl.float32) + 0.0
    bits = x.to(tl.uint32, bitcast=True)
    top: tl.constexpr = 0x80000000
    # Not ~bits: triton 3.6's interpreter has no -1 of 32 unsigned bits.
    key = tl.where(bits >= top, bits ^ 0xFFFFFFFF, bits | top)
    key = tl.where(x != x, 0xFFFFFFFF, key).to(tl.uint32)
    return tl.where(mask, key, 0).to(tl.uint32)


@triton.jit(do_not_specialize=["rows"])
def _highest(
    scores, out, rows, width, row_stride, count, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    present = (r < rows)[:, None]
    scores += r.to(tl.int64)[:, None] * row_stride
    # The count-th highest key, bit after bit: the largest t with at least `count` keys >= t.
    threshold = tl.zeros((ROWS,), tl.uint32)
    bit = tl.full((), 0x80000000, tl.uint32)
    for _ in range(0, 32):
        candidate = threshold | bit
        reached = tl.zeros((ROWS,), tl.int32)
        for start in range(0, width, COLUMNS):
            s = start + tl.arange(0, COLUMNS)[None, :]
            inside = present & (s < width)
            key = _sortable(scores, s, inside)
            reached += tl.sum(((key >= candidate[:, None]) & inside).to(tl.int32), 1)
        threshold = tl.where(reached >= count, candidate, threshold)
        bit = bit >> 1
    above = tl.zeros((ROWS,), tl.int32)
    for start in range(0, width, COLUMNS):
        s = start + tl.arange(0, COLUMNS)[None, :]
        inside = present & (s < width)
        key = _sortable(scores, s, inside)
        above += tl.sum(((key > threshold[:, None]) & inside).to(tl.int32), 1)
    # All above the threshold, and of those at it the first ones.
    wanted_ties = count - above
    ties = tl.zeros((ROWS,), tl.int32)
    taken = tl.zeros((ROWS,), tl.int32)
    for start in range(0, width, COLUMNS):
        s = start + tl.arange(0, COLUMNS)[None, :]
        inside = present & (s < width)
        key = _sortable(scores, s, inside)
        tie = ((key == threshold[:, None]) & inside).to(tl.int32)
        tie_rank = ties[:, None] + tl.cumsum(tie, 1)
        first_ties = (tie > 0) & (tie_rank <= wanted_ties[:, None])
        take = ((key > threshold[:, None]) & inside) | first_ties
        place = taken[:, None] + tl.cumsum(take.to(tl.int32), 1) - 1
        column = tl.broadcast_to(s, take.shape).to(tl.int64)
        tl.store(out + r.to(tl.int64)[:, None] * count + place, column, mask=take)
        ties += tl.sum(tie, 1)
        taken += tl.sum(take.to(tl.int32), 1)


@triton.jit
def _histograms(
    units, counts, entries, blocks, UNITS: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr
):
    block = tl.program_id(0)
    n = block * BLOCK + tl.arange(0, BLOCK)
    u = tl.arange(0, WIDE)
    unit = tl.load(units + n, mask=n < entries, other=-1)
    total = tl.sum((unit[:, None] == u[None, :]).to(tl.int32), 0)
    tl.store(counts + u * blocks + block, total, mask=u < UNITS)


@triton.jit
def _places(
    units,
    starts,
    order,
    entries,
    blocks,
    UNITS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    n = block * BLOCK + tl.arange(0, BLOCK)
    u = tl.arange(0, WIDE)
    unit = tl.load(units + n, mask=n < entries, other=-1)
    own = (unit[:, None] == u[None, :]).to(tl.int32)
    rank = tl.cumsum(own, 0) - 1
    start = tl.load(starts + u * blocks + block, mask=u < UNITS, other=0).to(tl.int32)
    place = tl.sum((rank + start[None, :]) * own, 1)
    tl.store(order + place, n.to(tl.int64), mask=n < entries)


@torch.library.custom_op("adaptive::highest_columns", mutates_args=())
def highest_columns(scores_BS: Tensor, count: int) -> Tensor:
    """`adaptive.ops.ranking.highest_columns`."""
    scores_BS = scores_BS if scores_BS.stride(1) == 1 else scores_BS.contiguous()
    rows, width = scores_BS.shape
    out_BK = torch.empty(rows, count, dtype=torch.int64, device=scores_BS.device)
    if out_BK.numel():
        columns = max(16, min(next_power_of_2(width), 4096))
        block = min(4096 // columns, next_power_of_2(cdiv(rows, PROGRAMS)))
        with on_device(out_BK):
            _highest[(cdiv(rows, block),)](
                scores_BS,
                out_BK,
                rows,
                width,
                scores_BS.stride(0),
                count,
                ROWS=block,
                COLUMNS=columns,
                num_warps=8,
            )
    return out_BK


@highest_columns.register_fake
def _(scores_BS: Tensor, count: int) -> Tensor:
    return scores_BS.new_empty(scores_BS.shape[0], count, dtype=torch.int64)


@torch.library.custom_op("adaptive::order_by_unit", mutates_args=())
def order_by_unit(units_N: Tensor, num_units: int) -> tuple[Tensor, Tensor]:
    """`adaptive.ops.ranking.order_by_unit`."""
    units_N = units_N.contiguous()
    entries = units_N.shape[0]
    order_N = torch.empty_like(units_N)
    if not entries:
        return order_N, units_N.new_zeros(num_units)
    wide = max(16, next_power_of_2(num_units))
    block = max(16, min(256, 16384 // wide))
    blocks = cdiv(entries, block)
    counts_UP = torch.empty(num_units, blocks, dtype=torch.int32, device=units_N.device)
    shape = {"UNITS": num_units, "WIDE": wide, "BLOCK": block}
    with on_device(units_N):
        _histograms[(blocks,)](units_N, counts_UP, entries, blocks, **shape)
        # Where a block's entries of a unit begin: after smaller units, and after earlier blocks.
        # One flat sum: torch scans a column of a matrix by one thread.
        flat = counts_UP.flatten()
        starts = flat.cumsum(0) - flat
        _places[(blocks,)](units_N, starts, order_N, entries, blocks, **shape)
    return order_N, counts_UP.sum(1)


@order_by_unit.register_fake
def _(units_N: Tensor, num_units: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(units_N), units_N.new_empty(num_units)
